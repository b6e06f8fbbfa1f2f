"""PettingZoo's sisl/pursuit as a batch of tensors: thousands of copies step at once, on any device.

The rules are those of pettingzoo.sisl.pursuit (v5, PettingZoo 1.27), read from its behaviour and
checked against it episode by episode (tests/test_pursuit.py). docs/pursuit.md says what was measured.

    env = PursuitVecEnv(num_envs=4096, device="cpu", seed=1)
    step = env.reset(seed=1)
    step = env.step(torch.randint(5, (4096, 8)))

Every env has one map with a border, flattened to S cells; cell = (y + border) * width + x + border.
A pursuer or evader is the index of its cell. Two more cells are not on the map: evaders that were
caught stay in the grave, and in `held` there is always a pursuer. All that depends on a cell alone
is a table: where an action leads, which cells matter to a pursuer or evader that stands there.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F

from envs import EnvStep, VecEnv

PURSUERS, EVADERS = 1, 2  # channels of observations, state and maps; 0 is the wall
MOVES = ((-1, 0), (1, 0), (0, 1), (0, -1), (0, 0))  # (x, y) of actions 0 ... 4

# What state_dict saves: the episodes in flight, and what the last step returned.
_STATE = (
    "pursuers evaders returns lengths prepared_pursuers prepared_evaders final_pursuers final_evaders "
    "rewards terminated truncations episode_over episode_returns episode_lengths"
).split()


class PursuitVecEnv(VecEnv):
    """N games of pursuit. Arguments after the star are those of the genuine env, with its defaults.

    x_size, y_size     cells of the map; a wall stands in the middle of it
    max_cycles         steps after which an episode is truncated
    shared_reward      every pursuer is paid the mean over pursuers
    n_evaders          1 ... 255
    n_pursuers         1 ... 255, the agents
    obs_range          R, odd: a pursuer sees the R x R cells around it
    n_catch            pursuers it takes on an evader's cell where `surround` is False
    freeze_evaders     evaders do not move
    tag_reward         paid for every evader on the four cells around a pursuer, 1 / n_pursuers of it per sub-step
    catch_reward       paid once per step to each pursuer that took part in a catch
    urgency_reward     paid to everyone in every step
    surround           an evader is caught when every open cell around it holds a pursuer
    constraint_window  relative size of the window in which everyone starts, in (0, 1]

    obs is [N, A, R, R, 3] and state [N, y_size, x_size, 3], both uint8: index order y, x, channel;
    channels wall, number of pursuers, number of evaders. Raises ValueError for bad arguments.
    """

    env_id = "pursuit"
    backend = "batched"
    obs_dtype = state_dtype = torch.uint8  # counts up to 255

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str,
        seed: int,
        *,
        x_size: int = 16,
        y_size: int = 16,
        max_cycles: int = 500,
        shared_reward: bool = True,
        n_evaders: int = 30,
        n_pursuers: int = 8,
        obs_range: int = 7,
        n_catch: int = 2,
        freeze_evaders: bool = False,
        tag_reward: float = 0.01,
        catch_reward: float = 5.0,
        urgency_reward: float = -0.1,
        surround: bool = True,
        constraint_window: float = 1.0,
    ):
        self.env_kwargs = {k: v for k, v in locals().items() if k not in ("self", "num_envs", "device", "seed")}
        _check_arguments(num_envs, **self.env_kwargs)
        self.num_envs, self.device = num_envs, torch.device(device)
        self.agents = [f"pursuer_{i}" for i in range(n_pursuers)]
        self.obs_shape = (obs_range, obs_range, 3)
        self.state_shape = (y_size, x_size, 3)
        self.action_space = gym.spaces.Discrete(5)
        self.x_size, self.y_size, self.max_cycles = x_size, y_size, max_cycles
        self.n_evaders, self.n_catch, self.obs_range = n_evaders, n_catch, obs_range
        self.shared_reward, self.freeze_evaders, self.surround = shared_reward, freeze_evaders, surround
        self.catch_reward, self.urgency_reward = catch_reward, urgency_reward
        self.constraint_window = constraint_window
        # On a CPU a branch on data is free. On an accelerator it would stall the queue, so there is none.
        self.no_sync = self.device.type != "cpu"
        self.generator = torch.Generator(self.device)
        self._make_tables(tag_reward)
        self._picture = None  # a genuine env that draws, made by the first render()
        self.reset(seed)

    def _make_tables(self, tag_reward: float) -> None:
        wall = _wall(self.x_size, self.y_size)  # [Y, X] bool
        self.border = max(1, self.obs_range // 2)
        self.width = self.x_size + 2 * self.border
        self.grave = (self.y_size + 2 * self.border) * self.width
        held = self.grave + 1
        num_cells = self.grave + 2  # S

        y, x = torch.meshgrid(torch.arange(self.y_size), torch.arange(self.x_size), indexing="ij")  # [Y, X]
        cell = self._cell(x, y)
        dx, dy = torch.tensor(MOVES).T  # [5]
        to_x, to_y = x[..., None] + dx, y[..., None] + dy  # [Y, X, 5]
        near_x, near_y = to_x.clamp(0, self.x_size - 1), to_y.clamp(0, self.y_size - 1)
        blocked = (near_x != to_x) | (near_y != to_y) | wall[near_y, near_x]
        to_cell = self._cell(to_x, to_y)

        def table(values: torch.Tensor, elsewhere: torch.Tensor) -> torch.Tensor:
            """[Y, X, K] -> [S, K], with `elsewhere` ([K] or [S, 1]) in cells that are not on the map."""
            result = elsewhere.expand(num_cells, values.shape[2]).clone()
            result[cell] = values
            return result.to(self.device)

        stay = torch.arange(num_cells)[:, None]  # [S, 1]
        # [S * 5] where an action leads to. Moving off the map or into the wall is staying.
        self.next_cell = table(torch.where(blocked, cell[..., None], to_cell), stay).flatten()
        # [S, 4] whose evaders a pursuer tags. At the edge of the map its own cell stands in for the missing one.
        self.tag_cells = table(self._cell(near_x, near_y)[..., :4], stay)
        # [S, 4] or [S, 1] where pursuers must stand to catch an evader. Walls and edges count as held, except that on
        # a map one cell wide the genuine env waits for one pursuer more than there are places: nobody is ever caught.
        if self.surround:
            closed = self.grave if 1 in (self.x_size, self.y_size) else held
            self.reach = table(to_cell.masked_fill(blocked, closed)[..., :4], stay)
        else:
            self.reach = table(cell[..., None], stay)
        self.is_open = (~wall).to(self.device)  # [Y, X]
        self.start_cell = cell.flatten().to(self.device)  # [Y * X] by y * x_size + x
        # [S, 3] the map without anyone
        self.blank = table(F.pad(wall[..., None].byte(), (0, 2)), torch.tensor([1, 0, 0], dtype=torch.uint8))
        self.blank[held, PURSUERS] = 1
        # [1, 1] made once: a new tensor on an accelerator would wait for it. Counts wrap around: adding 255 is -1.
        self.one, self.minus_one = torch.tensor([[[1]], [[255]]], dtype=torch.uint8, device=self.device)

        # Where the rows of a pursuer's view begin, relative to its cell, in all maps laid end to end
        half = self.obs_range // 2
        rows = (torch.arange(self.obs_range) - half) * self.width - half  # [R]
        self.view_offset = (torch.arange(self.num_envs)[:, None, None] * num_cells + rows).to(self.device)  # [N, 1, R]
        # Pursuers move one after another and everyone is paid after every move: in j of A sub-steps pursuer j is
        # paid for the place where it was before.
        order = torch.arange(self.num_agents, device=self.device)
        self.old_tag_reward = tag_reward / self.num_agents * order  # [A]
        self.new_tag_reward = tag_reward / self.num_agents * (self.num_agents - order)  # [A]
        self.active = torch.ones(self.num_envs, self.num_agents, dtype=torch.bool, device=self.device)

    def _cell(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (y + self.border) * self.width + x + self.border

    def reset(self, seed: int) -> EnvStep:
        self.generator.manual_seed(seed)
        return self._begin(*self._draw_starts(self.num_envs))

    def step(self, actions: torch.Tensor, evader_actions: torch.Tensor | None = None) -> EnvStep:
        """Steps all envs. actions: [N, A] int64 in 0 ... 4 (left, right, up, down, stay).

        evader_actions, [N, E] likewise, dictates the evaders' moves (those of caught evaders are ignored).
        Raises ValueError for a wrong shape, dtype or (on a CPU; elsewhere actions are clamped) value.
        """
        actions = self._check_actions("actions", actions, self.num_agents)
        if evader_actions is not None:
            evader_actions = self._check_actions("evader_actions", evader_actions, self.n_evaders)
        pursuer_map, evader_map = self.maps[..., PURSUERS], self.maps[..., EVADERS]  # [N, S] views

        # Pursuers move. Each is paid for the evaders next to it, before and after.
        rewards = self._tags() * self.old_tag_reward  # [N, A]
        _count(pursuer_map, self.pursuers, self.minus_one)
        self.pursuers = self._move(self.pursuers, actions)
        _count(pursuer_map, self.pursuers, self.one)
        rewards = rewards + self._tags() * self.new_tag_reward

        # Evaders are caught. A pursuer took part when evaders vanish from the cells that it reaches.
        pursuers_near = _look(pursuer_map, _rows(self.reach, self.evaders)).amin(-1)  # [N, E]
        caught = pursuers_near >= (1 if self.surround else self.n_catch)
        reached = _rows(self.reach, self.pursuers)  # [N, A, 4 or 1]
        evaders_near = _look(evader_map, reached)
        evader_map.scatter_add_(1, self.evaders, -caught.to(torch.uint8))
        self.evaders = self.evaders.masked_fill(caught, self.grave)
        took_part = (_look(evader_map, reached) != evaders_near).any(-1)  # [N, A]
        rewards = rewards + self.catch_reward * took_part + self.urgency_reward
        if self.shared_reward:
            rewards = rewards.mean(1, keepdim=True).repeat(1, self.num_agents)

        # The other evaders move.
        if evader_actions is None and not self.freeze_evaders:
            evader_actions = torch.randint(5, self.evaders.shape, device=self.device, generator=self.generator)
        if evader_actions is not None:
            _count(evader_map, self.evaders, self.minus_one)
            self.evaders = self._move(self.evaders, evader_actions)
            _count(evader_map, self.evaders, self.one)

        # At the time limit the genuine env reports no termination, even where the last evader was just caught.
        self.rewards = rewards
        self.episode_returns, self.episode_lengths = self.returns + rewards, self.lengths + 1
        self.truncations = self.episode_lengths >= self.max_cycles
        self.terminated = (self.evaders == self.grave).all(1) & ~self.truncations  # [N]
        self.episode_over = self.terminated | self.truncations
        self.final_pursuers, self.final_evaders = self.pursuers, self.evaders
        self._restart()
        return self._env_step()

    def state_dict(self) -> dict[str, Any]:
        """Positions, counters, what the last step returned, and the generator. Tensors are not copied: step
        replaces them and never writes into them."""
        tensors = {name: getattr(self, name) for name in _STATE}
        return tensors | {
            "env_kwargs": self.env_kwargs,
            "steps": self.steps,
            "generator": self.generator.get_state(),
            "generator_device": self.device.type,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> EnvStep:
        """Continues the episodes of another PursuitVecEnv with the same num_envs and arguments, else ValueError.

        Random numbers continue as well, unless the state comes from another type of device.
        """
        ours, theirs = self.env_kwargs | {"num_envs": self.num_envs}, dict(state_dict["env_kwargs"])
        theirs["num_envs"] = len(state_dict["pursuers"])
        for name, value in ours.items():
            if theirs[name] != value:
                raise ValueError(
                    f"expected a state with {name}={value}, got {theirs[name]}; make the env with that value"
                )
        for name in _STATE:
            setattr(self, name, state_dict[name].to(self.device))
        self.steps = state_dict["steps"]
        if state_dict["generator_device"] == self.device.type:
            self.generator.set_state(state_dict["generator"].cpu())
        self.maps = self._draw_maps(self.pursuers, self.evaders)
        return self._env_step()

    def render(self) -> np.ndarray:
        """Env 0 as the genuine env draws it, uint8 [30 * y_size, 30 * x_size, 3]."""
        if self._picture is None:
            from pettingzoo.sisl.pursuit.pursuit_base import Pursuit

            self._picture = Pursuit(**self.env_kwargs, render_mode="rgb_array")
        pursuers, evaders = self.positions()
        place_in_genuine(self._picture, pursuers[0].tolist(), evaders[0].tolist())
        return self._picture.render()

    def close(self) -> None:
        if self._picture is not None:
            self._picture.close()
            self._picture = None

    # --- positions from and to outside

    def positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, y) of everyone: [N, A, 2] and [N, E, 2] int64, (-1, -1) for evaders that were caught."""
        both = torch.cat([self.pursuers, self.evaders], 1)  # [N, A + E]
        xy = torch.stack([both % self.width, both // self.width], -1) - self.border
        xy = xy.masked_fill((both == self.grave)[..., None], -1)
        return xy[:, : self.num_agents], xy[:, self.num_agents :]

    def set_positions(self, pursuers: torch.Tensor, evaders: torch.Tensor) -> EnvStep:
        """Begins a new episode in every env with everyone at (x, y): [N, A, 2] and [N, E, 2] int64.

        Raises ValueError for a wrong shape or a place off the map or in the wall. Evaders at (-1, -1) are caught.
        """
        cells = []
        for name, xy, num in (("pursuers", pursuers, self.num_agents), ("evaders", evaders, self.n_evaders)):
            if xy.shape != (self.num_envs, num, 2):
                raise ValueError(
                    f"expected {name} of shape {(self.num_envs, num, 2)}, got {tuple(xy.shape)}; give (x, y)"
                )
            x, y = xy.to(self.device).unbind(-1)  # [N, num]
            caught = (x == -1) & (y == -1) if name == "evaders" else torch.zeros_like(x, dtype=torch.bool)
            near_x, near_y = x.clamp(0, self.x_size - 1), y.clamp(0, self.y_size - 1)
            free = (near_x == x) & (near_y == y) & self.is_open[near_y, near_x]
            if not (free | caught).all():
                raise ValueError(f"expected {name} on free cells of the map, got one outside or in the wall; move it")
            cells.append(self._cell(x, y).masked_fill(caught, self.grave))
        return self._begin(*cells)

    # --- parts of a step

    def _begin(self, pursuers: torch.Tensor, evaders: torch.Tensor) -> EnvStep:
        """Begins a new episode in every env."""
        self.steps = 0  # taken since; decides when the prepared starts are renewed
        N, A, device = self.num_envs, self.num_agents, self.device
        self.pursuers = self.final_pursuers = self.prepared_pursuers = pursuers  # [N, A] cells
        self.evaders = self.final_evaders = self.prepared_evaders = evaders  # [N, E] cells
        self.maps = self._draw_maps(pursuers, evaders)  # [N, S, 3]
        self.rewards = self.returns = self.episode_returns = torch.zeros(N, A, device=device)
        self.lengths = self.episode_lengths = torch.zeros(N, dtype=torch.int64, device=device)
        self.terminated = self.truncations = self.episode_over = torch.zeros(N, dtype=torch.bool, device=device)
        return self._env_step()

    def _check_actions(self, name: str, actions: torch.Tensor, num: int) -> torch.Tensor:
        if actions.shape != (self.num_envs, num) or actions.dtype != torch.int64:
            raise ValueError(
                f"expected {name} of shape {(self.num_envs, num)} and dtype torch.int64, "
                f"got {tuple(actions.shape)} and {actions.dtype}; give one number in 0 ... 4 per env and agent"
            )
        if actions.device.type != self.device.type:
            raise ValueError(f"expected {name} on {self.device}, got {actions.device}; move them with .to()")
        if self.no_sync:
            return actions.clamp(0, 4)
        low, high = actions.aminmax()
        if low < 0 or high > 4:
            raise ValueError(f"expected {name} in 0 ... 4, got {low.item()} ... {high.item()}; check who chose them")
        return actions

    def _move(self, cells: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self.next_cell.index_select(0, (cells * 5 + actions).flatten()).view_as(cells)

    def _tags(self) -> torch.Tensor:
        """Evaders next to each pursuer, [N, A]."""
        return _look(self.maps[..., EVADERS], _rows(self.tag_cells, self.pursuers)).sum(-1)

    def _restart(self) -> None:
        """Same-step autoreset: puts the envs whose episode is over at a new start."""
        over = self.episode_over
        self.returns = self.episode_returns.masked_fill(over[:, None], 0.0)
        self.lengths = self.episode_lengths.masked_fill(over, 0)
        if self.no_sync:
            # Which envs ended is unknown here, so every env holds a start that is prepared for it. Renewing them all
            # now and then is cheap; only an env that ends twice in between would start twice from the same place.
            if self.steps % min(16, self.max_cycles) == 0:
                self.prepared_pursuers, self.prepared_evaders = self._draw_starts(self.num_envs)
            self.steps += 1
            self.pursuers = torch.where(over[:, None], self.prepared_pursuers, self.pursuers)
            self.evaders = torch.where(over[:, None], self.prepared_evaders, self.evaders)
            self.maps = self._draw_maps(self.pursuers, self.evaders)
        elif over.any():
            rows = over.nonzero()[:, 0]
            pursuers, evaders = self._draw_starts(len(rows))
            self.pursuers = self.pursuers.index_copy(0, rows, pursuers)
            self.evaders = self.evaders.index_copy(0, rows, evaders)
            self.maps[rows] = self._draw_maps(pursuers, evaders)

    def _draw_starts(self, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cells [num, A] and [num, E] at the start of `num` episodes."""
        low, high = [], []
        for size in (self.x_size, self.y_size):
            start = torch.rand(num, device=self.device, generator=self.generator) * (1 - self.constraint_window)
            low.append((size * start).long())
            high.append((size * (start + self.constraint_window)).long())
        free = self.is_open & _inside(self.x_size, self.y_size, low, high)  # [num, Y, X]
        placed = _place(free, (self.num_agents, self.n_evaders), self.generator, self.no_sync)
        return tuple(self.start_cell[cells] for cells, _ in placed)

    def _draw_maps(self, pursuers: torch.Tensor, evaders: torch.Tensor) -> torch.Tensor:
        """[M, A] and [M, E] cells -> [M, S, 3] maps."""
        maps = self.blank.repeat(len(pursuers), 1, 1)
        _count(maps[..., PURSUERS], pursuers, self.one)
        _count(maps[..., EVADERS], evaders, self.one)
        return maps

    def _observe(self, maps: torch.Tensor, pursuers: torch.Tensor) -> torch.Tensor:
        """[M, S, 3] maps, [M, A] -> [M, A, R, R, 3]."""
        R = self.obs_range
        # Each R neighbours in x of all maps, as rows that overlap in memory: a view is R of these rows, copied whole.
        runs = maps.flatten().unfold(0, 3 * R, 3)  # [M * S - R + 1, 3 * R]
        rows = pursuers[..., None] + self.view_offset[: len(maps)]  # [M, A, R]
        return runs.index_select(0, rows.flatten()).view(*pursuers.shape, R, R, 3)

    def _crop(self, maps: torch.Tensor, pursuers: torch.Tensor) -> torch.Tensor:
        """[M, S, 3] maps -> [M, Y, X, 3], the state."""
        whole = maps[:, : self.grave].unflatten(1, (-1, self.width))  # [M, Y + 2 border, X + 2 border, 3]
        return whole[:, self.border : -self.border, self.border : -self.border].contiguous()

    def _env_step(self) -> EnvStep:
        obs, state = self._observe(self.maps, self.pursuers), self._crop(self.maps, self.pursuers)
        over, pursuers, evaders = self.episode_over, self.final_pursuers, self.final_evaders

        def final(look: Callable, after: torch.Tensor) -> torch.Tensor:
            """What the ended episodes came to, drawn again from the positions before the restart."""
            if self.no_sync:
                return look(self._draw_maps(pursuers, evaders), pursuers)
            if not over.any():
                return after
            rows = over.nonzero()[:, 0]
            return after.index_copy(0, rows, look(self._draw_maps(pursuers[rows], evaders[rows]), pursuers[rows]))

        return EnvStep(
            obs=obs,
            state=state,
            action_mask=None,
            active=self.active,
            rewards=self.rewards,
            terminations=self.terminated[:, None].repeat(1, self.num_agents),
            truncations=self.truncations,
            episode_over=over,
            final_obs=partial(final, self._observe, obs),
            final_state=partial(final, self._crop, state),
            episode_returns=self.episode_returns,
            episode_lengths=self.episode_lengths,
        )


def _wall(x_size: int, y_size: int) -> torch.Tensor:
    """[Y, X] bool."""
    x = torch.arange(x_size, dtype=torch.float64) / x_size
    y = torch.arange(y_size, dtype=torch.float64) / y_size
    return ((y > 0.2) & (y < 0.8))[:, None] & ((x > 0.3) & (x < 0.7))


def _rows(table: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """table [S, K], cells [N, M] -> [N, M, K]."""
    return table.index_select(0, cells.flatten()).view(*cells.shape, -1)


def _count(counts: torch.Tensor, cells: torch.Tensor, one: torch.Tensor) -> None:
    """Adds `one` ([1, 1], plus or minus one) to counts [N, S] at cells [N, M]."""
    counts.scatter_add_(1, cells, one.expand_as(cells))


def _look(counts: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """counts [N, S] at cells [N, M, K] -> [N, M, K]."""
    return counts.gather(1, cells.flatten(1)).view(cells.shape)


def _inside(x_size: int, y_size: int, low: list[torch.Tensor], high: list[torch.Tensor]) -> torch.Tensor:
    """Windows from low to high, each [x, y] of [M] -> [M, Y, X] bool."""
    in_x, in_y = (
        (torch.arange(size, device=lo.device) >= lo[:, None]) & (torch.arange(size, device=lo.device) < hi[:, None])
        for size, lo, hi in zip((x_size, y_size), low, high, strict=True)
    )
    return in_y[:, :, None] & in_x[:, None, :]


def _place(free: torch.Tensor, nums: tuple[int, ...], generator: torch.Generator, no_sync: bool) -> list:
    """Places teams of `nums` on free [M, Y, X]; for each team the flat cells [M, num] and if there was room [M] bool.

    The genuine env places one after another, uniform over the free cells that are neither taken nor next to a
    taken one. That is going through the cells in random order and taking each that has no taken neighbour. All
    at once: a cell whose random key is larger than those of its undecided neighbours is taken, its neighbours
    are not, and so on; the first `num` of the taken cells by key are the places, in that order. (Neighbours with
    equal keys, one pair in 10^9, are both left out.)

    Where there is no room left the genuine env would search for ever; here the rest goes to any other free cell.
    """
    shape = (len(free), len(nums), *free.shape[1:])  # [M, teams, Y, X]
    taken_bonus = 2**30
    keys = torch.randint(1, taken_bonus, shape, dtype=torch.int32, device=free.device, generator=generator)
    score = undecided = keys * free[:, None]
    # Each round decides at least two links of a chain of growing keys; that 16 rounds leave anything undecided
    # happens less often than 1e-15 (a chain of 32 neighbours in order).
    for _ in range(16):
        taken = undecided > _largest_neighbour(undecided)
        score = score + taken.int() * taken_bonus
        undecided = undecided.masked_fill(taken | (_largest_neighbour(taken.int()) > 0), 0)
        if not no_sync and not undecided.any():
            break
    best = [score[:, team].flatten(1).topk(num) for team, num in enumerate(nums)]
    return [(cells, values[:, -1] > taken_bonus) for values, cells in best]


def _largest_neighbour(grid: torch.Tensor) -> torch.Tensor:
    """The largest of the up to four neighbours' values, 0 where there is none. [..., Y, X] -> the same."""
    grid = F.pad(grid, (1, 1, 1, 1))
    rows, columns = grid[..., 1:-1, :], grid[..., 1:-1]
    in_x = torch.maximum(rows[..., :-2], rows[..., 2:])
    return torch.maximum(in_x, torch.maximum(columns[..., :-2, :], columns[..., 2:, :]))


def _check_arguments(num_envs: int, **kwargs: Any) -> None:
    """Raises ValueError in one line for what the game cannot be played with."""
    for name, value in {"num_envs": num_envs, **kwargs}.items():
        default = inspect.signature(PursuitVecEnv).parameters[name].default
        kind = int if name == "num_envs" else type(default)
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"expected {name} of type {kind.__name__}, got {value!r}; give one")
        at_least_one = ("num_envs", "x_size", "y_size", "max_cycles", "n_evaders", "n_pursuers", "obs_range", "n_catch")
        if name in at_least_one and value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}; give a larger number")
        if name in ("n_evaders", "n_pursuers") and value > 255:
            raise ValueError(f"expected {name} <= 255 (counts are uint8), got {value}; use fewer, or the genuine env")
    if kwargs["obs_range"] % 2 == 0:
        raise ValueError(
            f"expected an odd obs_range, got {kwargs['obs_range']}; a pursuer sits in the middle of its view"
        )
    window = kwargs["constraint_window"]
    if not 0 < window <= 1:
        raise ValueError(f"expected constraint_window in (0, 1], got {window}; 1.0 is the whole map")

    # Does everyone find room in every window? Tried out, because the genuine env may search for ever where not.
    x_size, y_size = kwargs["x_size"], kwargs["y_size"]
    windows = list(itertools.product(_windows(x_size, window), _windows(y_size, window)))
    windows = windows[:: math.ceil(len(windows) / 512)] * math.ceil(1024 / len(windows))
    (x_low, x_high), (y_low, y_high) = torch.tensor(windows).permute(1, 2, 0)  # [M] each
    free = ~_wall(x_size, y_size) & _inside(x_size, y_size, [x_low, y_low], [x_high, y_high])  # [M, Y, X]
    room = free.sum((1, 2)).min().item()
    nums = (kwargs["n_pursuers"], kwargs["n_evaders"])
    generator = torch.Generator().manual_seed(0)
    if max(nums) > room or not all(fits.all() for _, fits in _place(free, nums, generator, False)):
        raise ValueError(
            f"expected room for {nums[0]} pursuers and {nums[1]} evaders with no two of a team side by side, got a "
            f"start window with {room} free cells on a {x_size} x {y_size} map; enlarge the map or the window"
        )


def _windows(size: int, window: float) -> list[tuple[int, int]]:
    """All (low, high) that a start window of relative size `window` may have along an axis of `size` cells."""
    last = 1 - window
    edges = [i / size - offset for i in range(size + 1) for offset in (0, window)]
    edges = sorted({0.0, last, *(edge for edge in edges if 0 < edge < last)})
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)] or [0.0]
    return sorted({(int(size * start), int(size * (start + window))) for start in middles})


def place_in_genuine(genuine: Any, pursuers: list, evaders: list) -> None:
    """Puts everyone of a genuine env (pettingzoo's class Pursuit) at (x, y); evaders at (-1, -1) are caught."""
    from pettingzoo.sisl.pursuit.utils.agent_layer import AgentLayer
    from pettingzoo.sisl.pursuit.utils.agent_utils import create_agents

    caught = [x == -1 for x, _ in evaders]
    layers = []
    for places in (pursuers, [place for place, gone in zip(evaders, caught, strict=True) if not gone]):
        agents = create_agents(len(places), genuine.map_matrix, genuine.obs_range, genuine.np_random)
        for agent, (x, y) in zip(agents, places, strict=True):
            agent.set_position(x, y)
        layers.append(AgentLayer(genuine.x_size, genuine.y_size, agents))
    genuine.pursuer_layer, genuine.evader_layer = layers
    genuine.pursuers, genuine.evaders = (layer.allies for layer in layers)
    genuine.evaders_gone[:] = caught
    genuine.model_state[0] = genuine.map_matrix
    genuine.model_state[1], genuine.model_state[2] = (layer.get_state_matrix() for layer in layers)
