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
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from envs import EnvStep, ObsSpec, VecEnv
from runs import UsageError

ENV_ID = r"((sisl/|pettingzoo\.sisl\.)pursuit_v\d+|pursuit)"  # the ids of this game
INDIVIDUAL_KWARGS = {"shared_reward": False}  # with these everyone is paid for itself; the mean stays the same
PURSUERS, EVADERS = 1, 2  # channels of observations, state and maps; 0 is the wall
MOVE_X = (-1, 1, 0, 0, 0)  # of actions 0 ... 4: left, right, up, down, stay
MOVE_Y = (0, 0, 1, -1, 0)
STARTS_TRIED = 1024  # by the constructor, to find out whether there is room for everyone
MAX_WINDOWS = 512  # different start windows among them

# What state_dict saves: the episodes in flight, and what the last step returned.
_STATE = (
    "pursuers evaders returns lengths prepared_pursuers prepared_evaders final_pursuers final_evaders "
    "rewards terminated truncations episode_over episode_returns episode_lengths"
).split()


def describe_obs(num_agents: int, env_kwargs: dict[str, Any]) -> ObsSpec:
    """What the channels of a pursuer's observation mean."""
    return ObsSpec(
        names=("walls", "pursuers", "evaders"),
        kinds=("binary", "count", "count"),
        ego="centre",
        team=PURSUERS,
        window=True,
        resimulates=True,
    )


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
    channels wall, number of pursuers, number of evaders. Raises UsageError for bad arguments.
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
        arguments = locals()
        self.env_kwargs = {name: arguments[name] for name in DEFAULTS}
        _check_arguments(num_envs, self.env_kwargs)
        _check_room(x_size, y_size, constraint_window, (n_pursuers, n_evaders))
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.agents = [f"pursuer_{i}" for i in range(n_pursuers)]
        self.obs_shape = (obs_range, obs_range, 3)
        self.state_shape = (y_size, x_size, 3)
        self.action_space = gym.spaces.Discrete(5)
        self.x_size = x_size
        self.y_size = y_size
        self.max_cycles = max_cycles
        self.n_evaders = n_evaders
        self.n_catch = n_catch
        self.obs_range = obs_range
        self.shared_reward = shared_reward
        self.freeze_evaders = freeze_evaders
        self.surround = surround
        self.catch_reward = catch_reward
        self.urgency_reward = urgency_reward
        self.constraint_window = constraint_window
        # On a CPU a branch on data is free. On an accelerator it would stall the queue, so there is none.
        self.no_sync = self.device.type != "cpu"
        self.generator = torch.Generator(self.device)
        self._make_cell_tables()
        self._make_constants(tag_reward)
        self._picture = None  # a genuine env that draws, made by the first render()
        self.reset(seed)

    def _make_cell_tables(self) -> None:
        """What depends on a cell alone."""
        wall = _wall(self.x_size, self.y_size)  # [Y, X] bool
        self.border = max(1, self.obs_range // 2)
        self.width = self.x_size + 2 * self.border
        self.grave = (self.y_size + 2 * self.border) * self.width
        held = self.grave + 1
        self.num_cells = self.grave + 2  # S

        y = torch.arange(self.y_size)[:, None]  # [Y, 1]
        x = torch.arange(self.x_size)  # [X]
        cell = self._cell(x, y)  # [Y, X]
        to_x = x[:, None] + torch.tensor(MOVE_X)  # [X, 5]
        to_y = y[..., None] + torch.tensor(MOVE_Y)  # [Y, 1, 5]
        to_cell = self._cell(to_x, to_y)  # [Y, X, 5]
        near_x = to_x.clamp(0, self.x_size - 1)
        near_y = to_y.clamp(0, self.y_size - 1)
        near_cell = self._cell(near_x, near_y)  # [Y, X, 5], the cell itself where a move leads off the map
        blocked = (near_cell != to_cell) | wall[near_y, near_x]

        def table(values: Tensor, elsewhere: Tensor) -> Tensor:
            """[Y, X, K] -> [S, K], with `elsewhere` ([K] or [S, 1]) in cells that are not on the map."""
            result = elsewhere.expand(self.num_cells, values.shape[2]).clone()
            result[cell] = values
            return result.to(self.device)

        stay = torch.arange(self.num_cells)[:, None]  # [S, 1]
        # [S * 5] where an action leads to. Moving off the map or into the wall is staying.
        next_cell = torch.where(blocked, cell[..., None], to_cell)
        self.next_cell = table(next_cell, stay).flatten()
        # [S, 4] whose evaders a pursuer tags. At the edge of the map its own cell stands in for the missing one.
        self.tag_cells = table(near_cell[..., :4], stay)
        # [S, 4] or [S, 1] where pursuers must stand to catch an evader. Walls and edges count as held, except that on
        # a map one cell wide the genuine env waits for one pursuer more than there are places: nobody is ever caught.
        if self.surround:
            closed = self.grave if 1 in (self.x_size, self.y_size) else held
            reach = to_cell.masked_fill(blocked, closed)
            self.reach = table(reach[..., :4], stay)
        else:
            self.reach = table(cell[..., None], stay)
        self.is_open = (~wall).to(self.device)  # [Y, X]
        self.start_cell = cell.flatten().to(self.device)  # [Y * X] by y * x_size + x
        # [S, 3] the map without anyone
        walls_only = F.pad(wall[..., None].byte(), (0, 2))  # [Y, X, 3]
        all_wall = torch.tensor([1, 0, 0], dtype=torch.uint8)
        self.blank = table(walls_only, all_wall)
        self.blank[held, PURSUERS] = 1

    def _make_constants(self, tag_reward: float) -> None:
        """Tensors made once: a new one on an accelerator would wait for it."""
        device, num_agents = self.device, self.num_agents
        # [1, 1] Counts wrap around: adding 255 is -1.
        one = {"size": (1, 1), "dtype": torch.uint8, "device": device}
        self.one = torch.full(**one, fill_value=1)
        self.minus_one = torch.full(**one, fill_value=255)
        # Where the rows of a pursuer's view begin, relative to its cell, in all maps laid end to end
        half = self.obs_range // 2
        row = torch.arange(self.obs_range) - half
        map_start = torch.arange(self.num_envs) * self.num_cells
        offset = map_start[:, None, None] + row * self.width - half
        self.view_offset = offset.to(device)  # [N, 1, R]
        # Pursuers move one after another and everyone is paid after every move: in j of A sub-steps pursuer j is
        # paid for the place where it was before.
        order = torch.arange(num_agents, device=device)
        self.old_tag_reward = tag_reward / num_agents * order  # [A]
        self.new_tag_reward = tag_reward / num_agents * (num_agents - order)  # [A]
        shape = (self.num_envs, num_agents)
        self.active = torch.ones(shape, dtype=torch.bool, device=device)

    def _cell(self, x: Tensor, y: Tensor) -> Tensor:
        row = y + self.border
        column = x + self.border
        return row * self.width + column

    def reset(self, seed: int | None = None) -> EnvStep:
        """Starts N new episodes; the same seed gives the same ones. None goes on with the random numbers in use."""
        if seed is not None:
            self.generator.manual_seed(seed)
        pursuers, evaders = self._draw_starts(self.num_envs)
        return self._begin(pursuers, evaders)

    def step(self, actions: Tensor, evader_actions: Tensor | None = None) -> EnvStep:
        """Steps all envs. actions: [N, A] int64 in 0 ... 4 (left, right, up, down, stay).

        evader_actions, [N, E] likewise, dictates the evaders' moves (those of caught evaders are ignored).
        Raises ValueError for a wrong shape, dtype or (on a CPU; elsewhere actions are clamped) value.
        """
        actions = self._check_actions("actions", actions, self.num_agents)
        if evader_actions is not None:
            evader_actions = self._check_actions("evader_actions", evader_actions, self.n_evaders)

        rewards = self._move_pursuers(actions)  # [N, A]
        took_part = self._catch_evaders()  # [N, A]
        rewards = rewards + self.catch_reward * took_part + self.urgency_reward
        if self.shared_reward:
            team_reward = rewards.mean(1, keepdim=True)
            rewards = team_reward.repeat(1, self.num_agents)
        self._move_evaders(evader_actions)

        self.rewards = rewards
        self.episode_returns = self.returns + rewards
        self.episode_lengths = self.lengths + 1
        self.truncations = self.episode_lengths >= self.max_cycles
        # At the time limit the genuine env reports no termination, even where the last evader was just caught.
        all_caught = (self.evaders == self.grave).all(1)  # [N]
        self.terminated = all_caught & ~self.truncations
        self.episode_over = self.terminated | self.truncations
        self.final_pursuers = self.pursuers
        self.final_evaders = self.evaders
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
        ours = {**self.env_kwargs, "num_envs": self.num_envs}
        theirs = {**state_dict["env_kwargs"], "num_envs": len(state_dict["pursuers"])}
        for name, value in ours.items():
            if theirs[name] != value:
                raise ValueError(
                    f"expected a state with {name}={value}, got {theirs[name]}; make the env with that value"
                )
        for name in _STATE:
            tensor = state_dict[name].to(self.device)
            setattr(self, name, tensor)
        self.steps = state_dict["steps"]
        if state_dict["generator_device"] == self.device.type:
            generator = state_dict["generator"].cpu()
            self.generator.set_state(generator)
        self.maps = self._draw_maps(self.pursuers, self.evaders)
        return self._env_step()

    def render(self) -> np.ndarray:
        """Env 0 as the genuine env draws it, uint8 [30 * y_size, 30 * x_size, 3]."""
        if self._picture is None:
            from pettingzoo.sisl.pursuit.pursuit_base import Pursuit

            self._picture = Pursuit(**self.env_kwargs, render_mode="rgb_array")
        pursuers, evaders = self.positions()
        place_in_genuine(
            self._picture,
            pursuers[0].tolist(),
            evaders[0].tolist(),
        )
        return self._picture.render()

    def close(self) -> None:
        if self._picture is not None:
            self._picture.close()
            self._picture = None

    # --- positions from and to outside

    def positions(self) -> tuple[Tensor, Tensor]:
        """(x, y) of everyone: [N, A, 2] and [N, E, 2] int64, (-1, -1) for evaders that were caught."""
        return self._xy(self.pursuers), self._xy(self.evaders)

    def _xy(self, cells: Tensor) -> Tensor:
        """[N, M] -> [N, M, 2]"""
        x = cells % self.width - self.border
        y = cells // self.width - self.border
        xy = torch.stack([x, y], dim=-1)
        caught = cells == self.grave
        return xy.masked_fill(caught[..., None], -1)

    def set_positions(self, pursuers: Tensor, evaders: Tensor) -> EnvStep:
        """Begins a new episode in every env with everyone at (x, y): [N, A, 2] and [N, E, 2] int64.

        Raises ValueError for a wrong shape or a place off the map or in the wall. Evaders at (-1, -1) are caught.
        """
        pursuer_cells = self._cells_at("pursuers", pursuers, self.num_agents)
        evader_cells = self._cells_at("evaders", evaders, self.n_evaders)
        return self._begin(pursuer_cells, evader_cells)

    def _cells_at(self, team: str, xy: Tensor, num: int) -> Tensor:
        """[N, num, 2] -> [N, num]"""
        shape = (self.num_envs, num, 2)
        if xy.shape != shape:
            raise ValueError(f"expected {team} of shape {shape}, got {tuple(xy.shape)}; give (x, y)")
        x, y = xy.to(self.device).unbind(-1)  # [N, num]
        near_x = x.clamp(0, self.x_size - 1)
        near_y = y.clamp(0, self.y_size - 1)
        allowed = (near_x == x) & (near_y == y)
        allowed &= self.is_open[near_y, near_x]
        cells = self._cell(x, y)
        if team == "evaders":
            caught = (x == -1) & (y == -1)
            allowed |= caught
            cells = cells.masked_fill(caught, self.grave)
        if not allowed.all():
            raise ValueError(f"expected {team} on free cells of the map, got one outside or in the wall; move it")
        return cells

    # --- parts of a step

    def _begin(self, pursuers: Tensor, evaders: Tensor) -> EnvStep:
        """Begins a new episode in every env."""
        self.steps = 0  # taken since; decides when the prepared starts are renewed
        self.pursuers = self.final_pursuers = self.prepared_pursuers = pursuers  # [N, A] cells
        self.evaders = self.final_evaders = self.prepared_evaders = evaders  # [N, E] cells
        self.maps = self._draw_maps(pursuers, evaders)  # [N, S, 3]
        nothing_yet = torch.zeros(self.num_envs, self.num_agents, device=self.device)
        self.rewards = self.returns = self.episode_returns = nothing_yet
        no_steps = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self.lengths = self.episode_lengths = no_steps
        nowhere = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self.terminated = self.truncations = self.episode_over = nowhere
        return self._env_step()

    def _check_actions(self, name: str, actions: Tensor, num: int) -> Tensor:
        shape = (self.num_envs, num)
        if actions.shape != shape or actions.dtype != torch.int64:
            raise ValueError(
                f"expected {name} of shape {shape} and dtype torch.int64, "
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

    def _move_pursuers(self, actions: Tensor) -> Tensor:
        """Each pursuer is paid for the evaders next to it, before and after: -> rewards [N, A]"""
        pursuer_map = self.maps[..., PURSUERS]  # [N, S], a view
        old_rewards = self._tags() * self.old_tag_reward
        _count(pursuer_map, self.pursuers, self.minus_one)
        self.pursuers = self._moved(self.pursuers, actions)
        _count(pursuer_map, self.pursuers, self.one)
        new_rewards = self._tags() * self.new_tag_reward
        return old_rewards + new_rewards

    def _catch_evaders(self) -> Tensor:
        """Evaders that are caught go to the grave: -> which pursuers took part [N, A] bool"""
        pursuer_map = self.maps[..., PURSUERS]
        evader_map = self.maps[..., EVADERS]
        evaders_reached_from = _rows(self.reach, self.evaders)  # [N, E, 4 or 1]
        pursuers_near = _look(pursuer_map, evaders_reached_from).amin(-1)  # [N, E]
        pursuers_needed = 1 if self.surround else self.n_catch
        caught = pursuers_near >= pursuers_needed
        # A pursuer took part when evaders vanish from the cells that it reaches.
        reached = _rows(self.reach, self.pursuers)  # [N, A, 4 or 1]
        evaders_before = _look(evader_map, reached)
        evader_map.scatter_add_(1, self.evaders, -caught.byte())
        evaders_after = _look(evader_map, reached)
        self.evaders = self.evaders.masked_fill(caught, self.grave)
        return (evaders_after != evaders_before).any(-1)

    def _move_evaders(self, actions: Tensor | None) -> None:
        if actions is None:
            if self.freeze_evaders:
                return
            actions = torch.randint(
                high=5,
                size=self.evaders.shape,
                generator=self.generator,
                device=self.device,
            )
        evader_map = self.maps[..., EVADERS]
        _count(evader_map, self.evaders, self.minus_one)
        self.evaders = self._moved(self.evaders, actions)
        _count(evader_map, self.evaders, self.one)

    def _moved(self, cells: Tensor, actions: Tensor) -> Tensor:
        index = cells * 5 + actions
        moved = self.next_cell.index_select(0, index.flatten())
        return moved.view_as(cells)

    def _tags(self) -> Tensor:
        """Evaders next to each pursuer, [N, A]."""
        evader_map = self.maps[..., EVADERS]
        cells = _rows(self.tag_cells, self.pursuers)  # [N, A, 4]
        return _look(evader_map, cells).sum(-1)

    def _restart(self) -> None:
        """Same-step autoreset: puts the envs whose episode is over at a new start."""
        over = self.episode_over
        over_column = over[:, None]  # [N, 1]
        self.returns = self.episode_returns.masked_fill(over_column, 0.0)
        self.lengths = self.episode_lengths.masked_fill(over, 0)
        if self.no_sync:
            # Which envs ended is unknown here, so every env holds a start that is prepared for it. Renewing them all
            # now and then is cheap; only an env that ends twice in between would start twice from the same place.
            if self.steps % min(16, self.max_cycles) == 0:
                self.prepared_pursuers, self.prepared_evaders = self._draw_starts(self.num_envs)
            self.steps += 1
            self.pursuers = torch.where(over_column, self.prepared_pursuers, self.pursuers)
            self.evaders = torch.where(over_column, self.prepared_evaders, self.evaders)
            self.maps = self._draw_maps(self.pursuers, self.evaders)
        elif over.any():
            rows = over.nonzero()[:, 0]
            pursuers, evaders = self._draw_starts(len(rows))
            self.pursuers = self.pursuers.index_copy(0, rows, pursuers)
            self.evaders = self.evaders.index_copy(0, rows, evaders)
            self.maps[rows] = self._draw_maps(pursuers, evaders)

    def _draw_starts(self, num: int) -> tuple[Tensor, Tensor]:
        """Cells [num, A] and [num, E] at the start of `num` episodes."""
        in_x = self._draw_window(num, self.x_size)  # [num, X]
        in_y = self._draw_window(num, self.y_size)  # [num, Y]
        free = self.is_open & in_x[:, None, :] & in_y[:, :, None]  # [num, Y, X]
        teams = (self.num_agents, self.n_evaders)
        places, _ = _place(free, teams, self.generator, self.no_sync)
        pursuers, evaders = places
        return self.start_cell[pursuers], self.start_cell[evaders]

    def _draw_window(self, num: int, size: int) -> Tensor:
        """The part of an axis of `size` cells in which everyone starts: [num, size] bool"""
        start = torch.rand(num, device=self.device, generator=self.generator)
        start = start * (1 - self.constraint_window)
        low = (size * start).long()
        high = (size * (start + self.constraint_window)).long()
        return _between(low, high, size)

    def _draw_maps(self, pursuers: Tensor, evaders: Tensor) -> Tensor:
        """[M, A] and [M, E] cells -> [M, S, 3] maps."""
        maps = self.blank.repeat(len(pursuers), 1, 1)
        _count(maps[..., PURSUERS], pursuers, self.one)
        _count(maps[..., EVADERS], evaders, self.one)
        return maps

    def _observe(self, maps: Tensor, pursuers: Tensor) -> Tensor:
        """[M, S, 3] maps, [M, A] -> [M, A, R, R, 3]."""
        R = self.obs_range
        # Each R neighbours in x of all maps, as rows that overlap in memory: a view is R of these rows, copied whole.
        runs = maps.flatten().unfold(0, 3 * R, 3)  # [M * S - R + 1, 3 * R]
        rows = pursuers[..., None] + self.view_offset[: len(maps)]  # [M, A, R]
        views = runs.index_select(0, rows.flatten())  # [M * A * R, 3 * R]
        return views.view(*pursuers.shape, R, R, 3)

    def _crop(self, maps: Tensor) -> Tensor:
        """[M, S, 3] maps -> [M, Y, X, 3], the state."""
        inside = slice(self.border, -self.border)
        on_grid = maps[:, : self.grave]
        bordered = on_grid.unflatten(1, (-1, self.width))  # [M, Y + 2 border, X + 2 border, 3]
        return bordered[:, inside, inside].contiguous()

    def _env_step(self) -> EnvStep:
        obs = self._observe(self.maps, self.pursuers)
        state = self._crop(self.maps)
        over = self.episode_over
        final_pursuers, final_evaders = self.final_pursuers, self.final_evaders

        def final(after: Tensor, look: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            """What the ended episodes came to, drawn again from the positions before the restart."""
            if self.no_sync:
                maps = self._draw_maps(final_pursuers, final_evaders)
                return look(maps, final_pursuers)
            if not over.any():
                return after
            rows = over.nonzero()[:, 0]
            pursuers, evaders = final_pursuers[rows], final_evaders[rows]
            maps = self._draw_maps(pursuers, evaders)
            return after.index_copy(0, rows, look(maps, pursuers))

        return EnvStep(
            obs=obs,
            state=state,
            action_mask=None,
            active=self.active,
            rewards=self.rewards,
            terminations=self.terminated[:, None].repeat(1, self.num_agents),
            truncations=self.truncations,
            episode_over=over,
            final_obs=lambda: final(obs, self._observe),
            final_state=lambda: final(state, lambda maps, _: self._crop(maps)),
            episode_returns=self.episode_returns,
            episode_lengths=self.episode_lengths,
        )


DEFAULTS = inspect.getfullargspec(PursuitVecEnv.__init__).kwonlydefaults  # of the game's own arguments


def _wall(x_size: int, y_size: int) -> Tensor:
    """[Y, X] bool."""
    x = torch.arange(x_size, dtype=torch.float64) / x_size
    y = torch.arange(y_size, dtype=torch.float64) / y_size
    in_x = (x > 0.3) & (x < 0.7)
    in_y = (y > 0.2) & (y < 0.8)
    return in_y[:, None] & in_x


def _rows(table: Tensor, cells: Tensor) -> Tensor:
    """table [S, K], cells [N, M] -> [N, M, K]."""
    rows = table.index_select(0, cells.flatten())
    return rows.view(*cells.shape, -1)


def _count(counts: Tensor, cells: Tensor, one: Tensor) -> None:
    """Adds `one` ([1, 1], plus or minus one) to counts [N, S] at cells [N, M]."""
    counts.scatter_add_(1, cells, one.expand_as(cells))


def _look(counts: Tensor, cells: Tensor) -> Tensor:
    """counts [N, S] at cells [N, M, K] -> [N, M, K]."""
    found = counts.gather(1, cells.flatten(1))
    return found.view(cells.shape)


def _between(low: Tensor, high: Tensor, size: int) -> Tensor:
    """low and high [M] -> [M, size] bool: whether low <= index < high"""
    index = torch.arange(size, device=low.device)
    from_low = index >= low[:, None]
    below_high = index < high[:, None]
    return from_low & below_high


def _place(
    free: Tensor,
    nums: tuple[int, ...],
    generator: torch.Generator,
    no_sync: bool,
) -> tuple[list[Tensor], Tensor]:
    """Places teams of `nums` on free [M, Y, X] -> flat cells [M, num] for each team; if all found room, [M] bool.

    The genuine env places one after another, uniform over the free cells that are neither taken nor next to a
    taken one. That is going through the cells in random order and taking each that has no taken neighbour. All
    at once: a cell whose random key is larger than those of its undecided neighbours is taken, its neighbours
    are not, and so on; the first `num` of the taken cells by key are the places, in that order. (Neighbours with
    equal keys, one pair in 10^9, are both left out.)

    Where there is no room left the genuine env would search for ever; here the rest goes to any other free cell.
    """
    num_maps, *map_shape = free.shape
    shape = (num_maps, len(nums), *map_shape)  # [M, teams, Y, X]
    taken_bonus = 2**30
    keys = torch.randint(
        low=1,
        high=taken_bonus,
        size=shape,
        dtype=torch.int32,
        generator=generator,
        device=free.device,
    )
    score = undecided = keys * free[:, None]
    # Each round decides at least two links of a chain of growing keys; that 16 rounds leave anything undecided
    # happens less often than 1e-15 (a chain of 32 neighbours in order).
    for _ in range(16):
        taken = undecided > _largest_neighbour(undecided)
        score = score + taken.int() * taken_bonus
        beside_taken = _largest_neighbour(taken.int()) > 0
        undecided = undecided.masked_fill(taken | beside_taken, 0)
        if not no_sync and not undecided.any():
            break
    places = []
    found_room = torch.ones(num_maps, dtype=torch.bool, device=free.device)
    for team, num in enumerate(nums):
        team_score = score[:, team].flatten(1)  # [M, Y * X]
        best, cells = team_score.topk(num)  # [M, num]
        places.append(cells)
        found_room &= best[:, -1] > taken_bonus
    return places, found_room


def _largest_neighbour(grid: Tensor) -> Tensor:
    """The largest of the up to four neighbours' values, 0 where there is none. [..., Y, X] -> the same."""
    grid = F.pad(grid, (1, 1, 1, 1))
    rows = grid[..., 1:-1, :]
    columns = grid[..., 1:-1]
    left, right = rows[..., :-2], rows[..., 2:]
    above, below = columns[..., :-2, :], columns[..., 2:, :]
    in_x = torch.maximum(left, right)
    in_y = torch.maximum(above, below)
    return torch.maximum(in_x, in_y)


AT_LEAST_ONE = "num_envs x_size y_size max_cycles n_evaders n_pursuers obs_range n_catch".split()


def _check_arguments(num_envs: int, env_kwargs: dict[str, Any]) -> None:
    """Raises UsageError in one line for numbers that the game cannot be played with."""
    _check_type("num_envs", num_envs, int)
    for name, default in DEFAULTS.items():
        _check_type(name, env_kwargs[name], type(default))
    numbers = {"num_envs": num_envs, **env_kwargs}
    for name in AT_LEAST_ONE:
        if numbers[name] < 1:
            raise UsageError(f"expected {name} >= 1, got {numbers[name]}; give a larger number")
    for name in ("n_evaders", "n_pursuers"):
        if numbers[name] > 255:
            raise UsageError(
                f"expected {name} <= 255 (counts are uint8), got {numbers[name]}; use fewer, or the genuine env"
            )
    obs_range, window = env_kwargs["obs_range"], env_kwargs["constraint_window"]
    if obs_range % 2 == 0:
        raise UsageError(f"expected an odd obs_range, got {obs_range}; a pursuer sits in the middle of its view")
    if not 0 < window <= 1:
        raise UsageError(f"expected constraint_window in (0, 1], got {window}; 1.0 is the whole map")


def _check_type(name: str, value: Any, kind: type) -> None:
    """A whole number will do for a float, but a bool is no number."""
    kinds = (int, float) if kind is float else kind
    bool_instead = isinstance(value, bool) and kind is not bool
    if bool_instead or not isinstance(value, kinds):
        raise UsageError(f"expected {name} of type {kind.__name__}, got {value!r}; give one")


def _check_room(
    x_size: int,
    y_size: int,
    window: float,
    nums: tuple[int, int],
) -> None:
    """UsageError where not everyone finds room in every window: tried out, as the genuine env may search for ever."""
    x_ranges = _windows(x_size, window)
    y_ranges = _windows(y_size, window)
    windows = list(itertools.product(x_ranges, y_ranges))
    every = math.ceil(len(windows) / MAX_WINDOWS)
    windows = windows[::every]
    repeats = math.ceil(STARTS_TRIED / len(windows))
    windows = windows * repeats  # M of ((x from, to), (y from, to))
    x_range, y_range = torch.tensor(windows).unbind(1)  # [M, 2] each
    in_x = _between(*x_range.T, x_size)  # [M, X]
    in_y = _between(*y_range.T, y_size)  # [M, Y]
    is_open = ~_wall(x_size, y_size)
    free = is_open & in_x[:, None, :] & in_y[:, :, None]  # [M, Y, X]
    room = int(free.sum((1, 2)).min())
    fits = max(nums) <= room
    if fits:
        generator = torch.Generator().manual_seed(0)
        _, found_room = _place(free, nums, generator, no_sync=False)
        fits = bool(found_room.all())
    if not fits:
        raise UsageError(
            f"expected room for {nums[0]} pursuers and {nums[1]} evaders with no two of a team side by side, got a "
            f"start window with {room} free cells on a {x_size} x {y_size} map; enlarge the map or the window"
        )


def _windows(size: int, window: float) -> list[tuple[int, int]]:
    """All (low, high) that a start window of relative size `window` may have along an axis of `size` cells."""
    last = 1 - window
    edges = {0.0, last}
    for i in range(size + 1):
        for edge in (i / size, i / size - window):
            if 0 < edge < last:
                edges.add(edge)
    between = itertools.pairwise(sorted(edges))
    middles = [(a + b) / 2 for a, b in between]
    found = set()
    for start in middles or [0.0]:
        low = int(size * start)
        high = int(size * (start + window))
        found.add((low, high))
    return sorted(found)


def place_in_genuine(
    genuine: Any,
    pursuers: list[tuple[int, int]],
    evaders: list[tuple[int, int]],
) -> None:
    """Puts everyone of a genuine env (pettingzoo's class Pursuit) at (x, y); evaders at (-1, -1) are caught."""
    from pettingzoo.sisl.pursuit.utils.agent_layer import AgentLayer
    from pettingzoo.sisl.pursuit.utils.agent_utils import create_agents

    def make_layer(places: list) -> AgentLayer:
        agents = create_agents(len(places), genuine.map_matrix, genuine.obs_range, genuine.np_random)
        for agent, (x, y) in zip(agents, places, strict=True):
            agent.set_position(x, y)
        return AgentLayer(genuine.x_size, genuine.y_size, agents)

    free_evaders = [(x, y) for x, y in evaders if x != -1]
    genuine.pursuer_layer = make_layer(pursuers)
    genuine.evader_layer = make_layer(free_evaders)
    genuine.pursuers = genuine.pursuer_layer.allies
    genuine.evaders = genuine.evader_layer.allies
    genuine.evaders_gone[:] = [x == -1 for x, _ in evaders]
    genuine.model_state[0] = genuine.map_matrix
    genuine.model_state[1] = genuine.pursuer_layer.get_state_matrix()
    genuine.model_state[2] = genuine.evader_layer.get_state_matrix()
