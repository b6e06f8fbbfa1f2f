"""What the grid games share: bodies on a map, as one batch of tensors, a PettingZoo view of it, scripts and pictures.

A game (envs/stag_hunt.py, envs/snowdrift.py) says which kinds of items lie on its map and what comes of using them;
docs/envs.md has the contract. Everybody moves at once, then those who stand on an item may use it.

Shapes: N envs, A players, I items (kind after kind), K bodies (players, blocks, items, in this order),
C = A + 1 + kinds planes (A players, blocks, one for each kind of item), n = 5 + kinds actions, R the side of `view`.
A cell is row * width + column.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pettingzoo
import torch
from gymnasium.utils import EzPickle
from pettingzoo import ParallelEnv
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from envs import EnvStep, ObsSpec, VecEnv
from runs import UsageError

MOVES = (  # (row, column) steps of actions 0 to 3
    (-1, 0),
    (1, 0),
    (0, -1),
    (0, 1),
)
MOVE_NAMES = ("up", "down", "left", "right", "stay")
NUM_MOVES = len(MOVES)
STAY = 4
USE = 5  # the action that uses an item of the first kind; those of other kinds follow

MIN_CONNECTED = 0.01  # share of random block layouts that must be connected, or redrawing them takes too long
BLOCK_POOL = 16_384  # block layouts an accelerator samples from


def ego_order(num_agents: int) -> Tensor:
    """[A, A] int64: row i lists the agents as agent i counts them: i, i + 1, i + 2 ... mod A.

    The one place where this order is defined, for the player planes of observations as for joint actions:
    `actions[..., ego_order(A)]` is [..., A, A], row i the joint action as agent i counts it.
    """
    seats = torch.arange(num_agents)
    return (seats[:, None] + seats) % num_agents


def describe_obs(
    items: tuple[str, ...],
    users_needed: tuple[int, ...],
    num_agents: int,
    env_kwargs: dict[str, Any],
) -> ObsSpec:
    """What the channels of a player's observation mean; the state has the same channels, with players as they sit.

    items: kinds of items in the order of their planes. users_needed: players it takes to use up one of each.
    """
    others = (f"player i+{k}" for k in range(1, num_agents))
    names = [f"{item}s" for item in items]
    actions = range(USE, USE + len(items))
    uses = zip(actions, users_needed, strict=True)
    window = bool(env_kwargs.get("view"))
    return ObsSpec(
        names=("self", *others, "blocks", *names),
        kinds=("agent",) * num_agents + ("binary",) * (1 + len(items)),
        ego="plane",
        window=window,
        hunts=dict(zip(names, uses, strict=True)),
        moves=MOVES,
        certain=not window,
    )


class GridVecEnv(VecEnv):
    """N grid games as one batch; the contract is in envs/__init__.py. A game adds its items and what using them brings.

    options: height, width, num_players, num_<item>s for each kind, num_blocks (cells that nobody enters), max_cycles
    (steps until truncation) and view (side of the window that each player sees, odd; None for the whole map). Raises
    UsageError for options that make no game.

    An illegal action and the action of a player who is not active are executed as stay (`executed_actions`).
    """

    backend = "batched"
    items: ClassVar[tuple[str, ...]]  # kinds, in the order of their planes and of the actions that use them
    action_names: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str,
        seed: int,
        options: dict[str, int | None],
    ):
        self.options = options
        self._check_options(num_envs)
        height, width, view = options["height"], options["width"], options["view"]
        num_players, num_blocks = options["num_players"], options["num_blocks"]
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.agents = [f"player_{i}" for i in range(num_players)]
        num_planes = num_players + 1 + len(self.items)
        self.num_actions = len(self.action_names)
        self.state_shape = (height, width, num_planes)
        self.obs_shape = self.state_shape
        if view is not None:
            self.obs_shape = (view, view, num_planes)
        self.obs_dtype = self.state_dtype = torch.uint8
        self.action_space = gym.spaces.Discrete(self.num_actions)
        self._players = slice(num_players)  # of the K bodies
        self._blocks = slice(num_players, num_players + num_blocks)
        self._items = slice(num_players + num_blocks, None)
        self._generator = torch.Generator(self.device)
        # Where Python may look at a tensor; an accelerator would stall, so it does more work instead.
        self._can_branch = self.device.type == "cpu"
        self._make_move_tables()
        self._make_body_tables()
        if view is not None:
            self._make_window_tables(view)
        self.reset(seed)

    def _use_items(self, using: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rules of the game. using [N, A, I] bool, who uses which item: its own cell's, which is there.

        Returns rewards [N, A] float32, left [N, A] bool (players who leave the map), gone [N, I] bool (items).
        """
        raise NotImplementedError

    @property
    def item_counts(self) -> list[int]:
        return [self.options[f"num_{item}s"] for item in self.items]

    def _per_item(self, values: tuple[float, ...]) -> Tensor:
        """One value for each kind -> one for each item [I]"""
        counts = torch.tensor(self.item_counts)
        per_item = torch.tensor(values).repeat_interleave(counts)
        return per_item.to(self.device)

    def _check_options(self, num_envs: int) -> None:
        num_names = [f"num_{item}s" for item in self.items]
        may_be_none = [*num_names, "num_blocks"]
        for name, value in {"num_envs": num_envs, **self.options}.items():
            if name == "view" and value is None:
                continue
            low = 0 if name in may_be_none else 1
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not is_whole or value < low:
                raise UsageError(f"expected {name} to be a whole number >= {low}, got {value!r}; change {name}")
        view = self.options["view"]
        if view is not None and view % 2 == 0:
            raise UsageError(f"expected an odd view, so that a player is at its centre, got {view}; use an odd one")
        height, width = self.options["height"], self.options["width"]
        num_items, num_blocks = sum(self.item_counts), self.options["num_blocks"]
        if num_items == 0:
            kinds, flags = " or ".join(self.items), " or ".join(num_names)
            raise UsageError(f"expected at least one {kinds}, got none; raise {flags}")
        num_bodies = self.options["num_players"] + num_items + num_blocks
        if height * width < num_bodies:
            raise UsageError(
                f"expected a grid with a cell for each of the {num_bodies} players, items and blocks, got "
                f"{height}x{width}; use a larger grid or put less on it"
            )
        if num_blocks:
            trial = torch.Generator().manual_seed(0)
            _, connected = self._draw_block_candidates(1024, trial)
            share = connected.float().mean().item()
            if share < MIN_CONNECTED:
                raise UsageError(
                    f"expected blocks that leave the free cells connected in at least {MIN_CONNECTED:.0%} of random "
                    f"draws, got {share:.1%} with num_blocks={num_blocks}; use fewer blocks"
                )

    def _cells_at(self, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
        """row and col of one shape -> their cells, and which of them are on the map"""
        height, width, _ = self.state_shape
        on_map = (row >= 0) & (row < height)
        on_map = on_map & (col >= 0) & (col < width)
        return row * width + col, on_map

    def _make_move_tables(self) -> None:
        """What an action does on each cell."""
        height, width, _ = self.state_shape
        cells = torch.arange(height * width)  # [HW]
        row_step, col_step = torch.tensor(MOVES).T  # [4]
        to_row = cells[:, None] // width + row_step  # [HW, 4]
        to_col = cells[:, None] % width + col_step
        to_cell, on_map = self._cells_at(to_row, to_col)
        next_cell = cells[:, None].repeat(1, self.num_actions)  # [HW, n], whoever uses an item stays
        stay = next_cell[:, :NUM_MOVES]
        next_cell[:, :NUM_MOVES] = torch.where(on_map, to_cell, stay)
        self._on_map = on_map.to(self.device)
        self._next_cell = next_cell.to(self.device)

    def _make_body_tables(self) -> None:
        """In which plane each body is drawn, and which action uses each item."""
        height, width, num_planes = self.state_shape
        num_agents, num_kinds = self.num_agents, len(self.items)
        first_plane = num_agents + 1  # of items; blocks are before it
        block_plane = torch.full((self.options["num_blocks"],), num_agents)
        item_plane = self._per_item(tuple(range(first_plane, num_planes))).cpu()
        fixed_plane = torch.cat([block_plane, item_plane])  # [K-A]
        plane = torch.cat([torch.arange(num_agents), fixed_plane])
        self._plane = plane.to(self.device)  # [K]
        # Plane of body k in the observation of player i: the inverse of "which player is in plane j".
        player_plane = ego_order(num_agents).argsort(1)  # [A, A]
        others_plane = fixed_plane.expand(num_agents, -1)  # [A, K-A]
        ego_plane = torch.cat([player_plane, others_plane], 1)
        obs_start = torch.arange(num_agents) * height * width * num_planes
        ego_offset = obs_start[:, None] + ego_plane
        self._ego_offset = ego_offset.to(self.device)  # [A, K], into one env's flat observations
        self._use_action = self._per_item(tuple(range(USE, USE + num_kinds)))  # [I]

    def _make_window_tables(self, view: int) -> None:
        """Which cells a player sees from each cell."""
        height, width, num_planes = self.state_shape
        num_cells = height * width
        cells = torch.arange(num_cells)[:, None, None]  # [HW, 1, 1]
        reach = torch.arange(view) - view // 2  # [R]
        see_row = cells // width + reach[:, None]  # [HW, R, 1]
        see_col = cells % width + reach  # [HW, 1, R]
        seen, on_map = self._cells_at(see_row, see_col)  # [HW, R, R]
        outside = num_cells  # one more cell, which is not on the map
        window = seen.masked_fill(~on_map, outside)
        self._window = window.flatten(1).to(self.device)  # [HW, R*R]
        self._outside = torch.zeros(num_planes, dtype=torch.uint8, device=self.device)  # [C]
        self._outside[self.num_agents] = 1  # a block

    # Episode starts

    def _draw_block_candidates(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`num` uniform block layouts on the CPU: cells [num, blocks] int64, connected [num] bool."""
        height, width = self.options["height"], self.options["width"]
        score = torch.rand(num, height * width, generator=generator)
        cells = score.topk(self.options["num_blocks"], dim=1).indices
        free = torch.ones(num, height * width, dtype=torch.bool)
        free.scatter_(1, cells, False)
        first_free = free.int().argmax(1, keepdim=True)  # [num, 1]
        flood = torch.zeros_like(free)
        flood.scatter_(1, first_free, True)
        flood = flood.view(num, height, width)
        free = free.view(num, height, width)
        while True:
            wider = flood.clone()
            wider[:, 1:] |= flood[:, :-1]
            wider[:, :-1] |= flood[:, 1:]
            wider[:, :, 1:] |= flood[:, :, :-1]
            wider[:, :, :-1] |= flood[:, :, 1:]
            wider &= free
            if torch.equal(wider, flood):
                break
            flood = wider
        connected = (flood == free).flatten(1).all(1)
        return cells, connected

    def _draw_blocks(self, num: int, generator: torch.Generator) -> Tensor:
        """`num` connected block layouts, redrawn until they are, on the CPU. [num, blocks] int64"""
        kept = torch.empty(0, self.options["num_blocks"], dtype=torch.int64)
        num_candidates = min(2 * num + 16, 4096)
        while len(kept) < num:
            cells, connected = self._draw_block_candidates(num_candidates, generator)
            kept = torch.cat([kept, cells[connected]])
        return kept[:num]

    def _draw_cells(self, num: int) -> Tensor:
        """Start cells of all bodies in `num` new episodes. [num, K] int64"""
        height, width, _ = self.state_shape
        num_blocks, num_agents = self.options["num_blocks"], self.num_agents
        # The largest of iid numbers: distinct cells in uniform order, without a loop.
        size = (num, height * width)
        score = torch.rand(size, generator=self._generator, device=self.device)
        num_others = len(self._plane) - num_blocks
        if not num_blocks:
            return score.topk(num_others, 1).indices
        if self._block_pool is None:
            blocks = self._draw_blocks(num, self._generator)
        else:
            pick = torch.randint(
                BLOCK_POOL,
                (num,),
                generator=self._generator,
                device=self.device,
            )
            blocks = self._block_pool[pick]  # [num, blocks]
        score.scatter_(1, blocks, -1.0)
        cells = score.topk(num_others, 1).indices
        players = cells[:, :num_agents]
        items = cells[:, num_agents:]
        return torch.cat([players, blocks, items], 1)

    def reset(self, seed: int | None = None) -> EnvStep:
        """Starts N new episodes; the same seed gives the same ones. None goes on with the random numbers in use."""
        if seed is not None:
            self._generator.manual_seed(int(seed))
            self._block_pool = None  # where there is no test of connectedness while stepping
            if self.options["num_blocks"] and not self._can_branch:
                generator = torch.Generator().manual_seed(int(seed))
                pool = self._draw_blocks(BLOCK_POOL, generator)
                self._block_pool = pool.to(self.device)
        cells = self._draw_cells(self.num_envs)
        return self.set_positions(cells)

    def set_positions(self, cells: Tensor, alive: Tensor | None = None) -> EnvStep:
        """Starts N new episodes from given positions; returns their first EnvStep.

        cells [N, K] int64: row * width + column of players, blocks, items, in this order. alive [N, K] bool: False
        for a player who left and for an item that was used up; None for nobody. Raises ValueError where blocks and
        items are not on distinct cells, or a player stands in a block.
        """
        shape = (self.num_envs, len(self._plane))
        if alive is None:
            alive = torch.ones(shape, dtype=torch.bool, device=self.device)
        _check_tensor("cells", cells, shape, torch.int64)
        _check_tensor("alive", alive, shape, torch.bool)
        self._cells = cells.to(self.device, copy=True)
        self._alive = alive.to(self.device, copy=True)
        self._check_positions(self._cells, self._alive)
        return self._begin()

    def _check_positions(self, cells: Tensor, alive: Tensor) -> None:
        height, width, _ = self.state_shape
        num_cells = height * width
        fixed = cells[:, self.num_agents :].sort(1).values  # [N, K-A]
        shared = fixed[:, 1:] == fixed[:, :-1]
        players = cells[:, self._players]
        blocks = cells[:, self._blocks]
        in_block = players[:, :, None] == blocks[:, None, :]  # [N, A, blocks]
        off_map = cells.min() < 0 or cells.max() >= num_cells
        if off_map or shared.any() or in_block.any():
            raise ValueError(
                f"expected cells 0 to {num_cells - 1}, blocks and items on distinct ones and no player in a block, got "
                "others; fix the positions"
            )
        if not alive[:, self._blocks].all():
            raise ValueError("expected every block to be alive, got one that is not; blocks never vanish")

    def _begin(self) -> EnvStep:
        """Starts N new episodes where everybody is now."""
        per_env = {"size": (self.num_envs,), "device": self.device}
        per_agent = {"size": (self.num_envs, self.num_agents), "device": self.device}
        self._timesteps = torch.zeros(**per_env, dtype=torch.int64)
        self._returns = torch.zeros(**per_agent)
        return self._make_step(
            {
                "rewards": torch.zeros(**per_agent),
                "terminations": torch.zeros(**per_agent, dtype=torch.bool),
                "truncations": torch.zeros(**per_env, dtype=torch.bool),
                "episode_over": torch.zeros(**per_env, dtype=torch.bool),
                "final_cells": self._cells,
                "final_alive": self._alive,
                "episode_returns": self._returns,
                "episode_lengths": self._timesteps,
                "executed_actions": torch.full(**per_agent, fill_value=STAY, dtype=torch.int64),
            }
        )

    # What players see

    def _planes(self, cells: Tensor, alive: Tensor) -> Tensor:
        """The state. cells [N, K] int64, alive [N, K] bool -> [N, H, W, C] uint8"""
        # A body that is gone writes 0 where nobody else writes: players have planes of their own, items cells.
        size = (len(cells), math.prod(self.state_shape))
        flat = torch.zeros(size, dtype=torch.uint8, device=self.device)
        num_planes = self.state_shape[2]
        index = cells * num_planes + self._plane
        flat.scatter_(1, index, alive.view(torch.uint8))
        return flat.view(-1, *self.state_shape)

    def _ego_planes(self, cells: Tensor, alive: Tensor) -> Tensor:
        """The whole map for every player, zero for those who left. -> [N, A, H, W, C] uint8"""
        num_envs, num_agents = len(cells), self.num_agents
        num_planes = self.state_shape[2]
        cell_start = cells * num_planes  # [N, K]
        index = cell_start[:, None] + self._ego_offset  # [N, A, K]
        seeing = alive[:, self._players]  # [N, A]
        ones = alive[:, None] & seeing[..., None]  # [N, A, K]
        # Scattering ones is several times faster than permuting the planes of the state.
        size = (num_envs, num_agents * math.prod(self.state_shape))
        flat = torch.zeros(size, dtype=torch.uint8, device=self.device)  # [N, A*H*W*C]
        ones = ones.flatten(1).view(torch.uint8)
        flat.scatter_(1, index.flatten(1), ones)
        return flat.view(num_envs, num_agents, *self.state_shape)

    def _crop(self, full_obs: Tensor, cells: Tensor, alive: Tensor) -> Tensor:
        """The window around each player. full_obs [N, A, H, W, C] -> [N, A, *O] uint8"""
        if not self.options["view"]:
            return full_obs
        num_envs, num_agents = full_obs.shape[:2]
        num_planes = self.state_shape[2]
        outside = self._outside.expand(num_envs, num_agents, 1, num_planes)
        cells_seen = full_obs.flatten(2, 3)  # [N, A, H*W, C]
        padded = torch.cat([cells_seen, outside], 2)  # [N, A, H*W+1, C]
        seen = self._window[cells[:, self._players]]  # [N, A, R*R]
        index = seen[..., None].expand(-1, -1, -1, num_planes)
        window = padded.gather(2, index)  # [N, A, R*R, C]
        window *= alive[:, self._players, None, None]
        return window.view(num_envs, num_agents, *self.obs_shape)

    def _action_mask(self, state: Tensor, cells: Tensor, alive: Tensor) -> Tensor:
        """Legal actions. state [N, H, W, C] -> [N, A, n] bool; only stay for those who left"""
        num_envs, num_agents = self.num_envs, self.num_agents
        num_planes = self.state_shape[2]
        cells = cells[:, self._players]  # [N, A]
        flat = state.view(num_envs, -1)  # [N, H*W*C]
        size = (num_envs, num_agents, self.num_actions)
        mask = torch.ones(size, dtype=torch.bool, device=self.device)
        moves = self._on_map[cells]  # [N, A, 4]
        if self.options["num_blocks"]:
            to_cells = self._next_cell[cells][..., :NUM_MOVES]
            block_plane = to_cells * num_planes + num_agents  # [N, A, 4]
            blocked = flat.gather(1, block_plane.flatten(1))
            moves &= blocked.view_as(moves) == 0
        mask[..., :NUM_MOVES] = moves
        item_plane = cells * num_planes + num_agents + 1  # of the first kind
        for kind in range(len(self.items)):
            mask[..., USE + kind] = flat.gather(1, item_plane + kind)
        mask &= alive[:, self._players, None]
        mask[..., STAY] = True
        return mask

    def _make_step(self, last: dict[str, Tensor]) -> EnvStep:
        """The EnvStep of the positions now and of the transition `last` that led to them."""
        state = self._planes(self._cells, self._alive)
        self._state = state
        self._last = last
        self._full_obs = self._ego_planes(self._cells, self._alive)
        obs = self._crop(self._full_obs, self._cells, self._alive)
        self._mask = self._action_mask(state, self._cells, self._alive)
        cells, alive = last["final_cells"], last["final_alive"]

        def final_obs() -> Tensor:
            full_obs = self._ego_planes(cells, alive)
            return self._crop(full_obs, cells, alive)

        return EnvStep(
            obs=obs,
            state=state,
            action_mask=self._mask,
            active=self._alive[:, : self.num_agents],
            rewards=last["rewards"],
            terminations=last["terminations"],
            truncations=last["truncations"],
            episode_over=last["episode_over"],
            final_obs=final_obs,
            final_state=lambda: self._planes(cells, alive),
            episode_returns=last["episode_returns"],
            episode_lengths=last["episode_lengths"],
            executed_actions=last["executed_actions"],
        )

    def full_obs(self) -> Tensor:
        """Observations of the whole map, whatever `view` is, for scripted partners. [N, A, H, W, C] uint8"""
        return self._full_obs

    def final_action_mask(self) -> Tensor:
        """Legal actions in the `final_obs` of the last EnvStep. [N, A, n] bool"""
        cells, alive = self._last["final_cells"], self._last["final_alive"]
        state = self._planes(cells, alive)
        return self._action_mask(state, cells, alive)

    # Stepping

    def _check_actions(self, actions: Tensor) -> None:
        shape = (self.num_envs, self.num_agents)
        if not isinstance(actions, Tensor):
            raise ValueError(f"expected actions {list(shape)} torch.int64, got {type(actions)}; convert them")
        if tuple(actions.shape) != shape or actions.dtype != torch.int64:
            raise ValueError(
                f"expected actions {list(shape)} torch.int64, got {list(actions.shape)} {actions.dtype}; "
                "convert or reshape them"
            )
        if actions.device.type != self.device.type:
            raise ValueError(f"expected actions on {self.device}, got {actions.device}; move them there")

    def step(self, actions: Tensor) -> EnvStep:
        """Steps all envs: everyone moves at once, then uses items. actions [N, A] int64 -> EnvStep

        Raises ValueError for a wrong shape, dtype or device and, on the CPU, for an action of an active player that
        is not 0 to n - 1; elsewhere the test would stall the device and such an action is executed as stay.
        """
        self._check_actions(actions)
        active = self._alive[:, self._players]  # [N, A]
        actions = self._legal_or_stay(actions, active)

        cells = self._cells.clone()  # [N, K]
        players = cells[:, self._players]  # [N, A], a view
        players[:] = self._next_cell[players, actions]
        # A legal use is of an item that is there, and its users do not move.
        on_item = players[:, :, None] == cells[:, None, self._items]  # [N, A, I]
        using = on_item & (actions[..., None] == self._use_action)
        rewards, left, gone = self._use_items(using)
        alive = self._alive.clone()  # [N, K]
        alive[:, self._players] &= ~left
        alive[:, self._items] &= ~gone

        timesteps = self._timesteps + 1
        returns = self._returns + rewards
        players_left = alive[:, self._players].any(1)  # [N]
        items_left = alive[:, self._items].any(1)
        no_more = ~(players_left & items_left)
        truncations = (timesteps >= self.options["max_cycles"]) & ~no_more
        last = {
            "rewards": rewards,
            "terminations": left | (active & no_more[:, None]),
            "truncations": truncations,
            "episode_over": no_more | truncations,
            "final_cells": cells,
            "final_alive": alive,
            "episode_returns": returns,
            "episode_lengths": timesteps,
            "executed_actions": actions,
        }
        self._cells = cells
        self._alive = alive
        self._timesteps = timesteps
        self._returns = returns
        self._start_anew(last["episode_over"])
        return self._make_step(last)

    def _legal_or_stay(self, actions: Tensor, active: Tensor) -> Tensor:
        """[N, A] -> [N, A]: stay for who is not active, and instead of what is illegal"""
        actions = torch.where(active, actions, STAY)
        in_range = (actions >= 0) & (actions < self.num_actions)
        if self._can_branch and not in_range.all():
            wrong = actions[~in_range][0].item()
            raise ValueError(
                f"expected actions 0 to {self.num_actions - 1} ({', '.join(self.action_names)}), got {wrong}; fix it"
            )
        index = actions.clamp(0, self.num_actions - 1)
        legal = self._mask.gather(2, index[..., None])  # [N, A, 1]
        legal = in_range & legal[..., 0]
        return torch.where(legal, actions, STAY)

    def _start_anew(self, over: Tensor) -> None:
        """Starts new episodes where over [N]. Never in place: `final_obs` may still be computed from the old ones."""
        if self._can_branch:  # draw no more than needed
            index = over.nonzero()[:, 0]
            if not len(index):
                return
            starts = self._draw_cells(len(index))
            self._cells = self._cells.index_copy(0, index, starts)
        else:
            starts = self._draw_cells(self.num_envs)
            self._cells = torch.where(over[:, None], starts, self._cells)
        self._alive = self._alive | over[:, None]
        self._timesteps = self._timesteps * ~over
        self._returns = self._returns * ~over[:, None]

    # Saving, drawing

    def state_dict(self) -> dict[str, Any]:
        last = self._last.items()
        last = {name: tensor.clone() for name, tensor in last}
        return {
            "options": dict(self.options),
            "cells": self._cells.clone(),
            "alive": self._alive.clone(),
            "timesteps": self._timesteps.clone(),
            "returns": self._returns.clone(),
            "last": last,
            "generator": self._generator.get_state(),
            "block_pool": self._block_pool,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> EnvStep:
        """Continues the episodes in flight. ValueError for another game, number of envs, or kind of device."""
        if state_dict["options"] != self.options:
            raise ValueError(
                f"expected a state of {self.options}, got one of {state_dict['options']}; use these options"
            )
        generator = state_dict["generator"].cpu()
        if generator.shape != self._generator.get_state().shape:
            raise ValueError(
                f"expected a state saved on {self.device.type}, got another's; continue on the same device"
            )
        self.set_positions(state_dict["cells"], state_dict["alive"])
        self._timesteps = state_dict["timesteps"].to(self.device)
        self._returns = state_dict["returns"].to(self.device)
        self._generator.set_state(generator)
        self._block_pool = state_dict["block_pool"]
        if self._block_pool is not None:
            self._block_pool = self._block_pool.to(self.device)
        last = state_dict["last"].items()
        last = {name: tensor.to(self.device) for name, tensor in last}
        return self._make_step(last)

    def render(self) -> np.ndarray:
        state = self._state[0].cpu()
        return self.picture(state.numpy())

    @staticmethod
    def picture(state: np.ndarray) -> np.ndarray:
        """A state [H, W, C] of 0 and 1, drawn"""
        raise NotImplementedError


def _check_tensor(
    name: str,
    given: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    if tuple(given.shape) != shape or given.dtype != dtype:
        raise ValueError(f"expected {name} {list(shape)} {dtype}, got {list(given.shape)} {given.dtype}; fix it")


class GridParallelEnv(ParallelEnv, EzPickle):
    """One grid game as a PettingZoo ParallelEnv; the rules are those of its `batch`, which it steps.

    Observations [H, W, C] uint8 (or [R, R, C] with `view`). infos[agent]: "action_mask" [n] int8, the legal actions,
    and, after a step, "executed_action", stay for an illegal one. options: the keyword arguments of the batch.
    render_mode: None or "rgb_array".
    """

    batch: ClassVar[type[GridVecEnv]]

    def __init__(self, *, render_mode: str | None = None, **options: int | None):
        EzPickle.__init__(self, render_mode=render_mode, **options)
        if render_mode not in (None, "rgb_array"):
            raise UsageError(f"expected render_mode None or 'rgb_array', got {render_mode!r}; use one of these")
        self.render_mode = render_mode
        first_seed = random.SystemRandom().randrange(2**31)
        self._env = self.batch(1, "cpu", first_seed, **options)
        self._state: np.ndarray | None = None
        self.agents: list[str] = []
        self.possible_agents = self._env.agents
        obs_space = gym.spaces.Box(0, 1, self._env.obs_shape, np.uint8)
        self.state_space = gym.spaces.Box(0, 1, self._env.state_shape, np.uint8)
        self.observation_spaces = {agent: copy.deepcopy(obs_space) for agent in self.possible_agents}
        self.action_spaces = {}
        for agent in self.possible_agents:
            self.action_spaces[agent] = gym.spaces.Discrete(self._env.num_actions)

    def observation_space(self, agent: str) -> gym.Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> gym.Space:
        return self.action_spaces[agent]

    def reset(
        self,
        seed: int | None = None,
        options: dict | None = None,
    ) -> tuple[dict, dict]:
        step = self._env.reset(seed)
        self._state = step.state[0].numpy()
        self.agents = list(self.possible_agents)
        masks = self._by_agent(step.action_mask.to(torch.int8))
        infos = {agent: {"action_mask": mask} for agent, mask in masks.items()}
        return self._by_agent(step.obs), infos

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        """Plays one step; actions of agents that are not in `agents` are ignored.

        ValueError for an agent without an action, an action that is not 0 to n - 1, and before the first reset. Like
        PettingZoo's own environments it returns empty dicts when the episode is over.
        """
        self.state()  # refuses before the first reset
        if not self.agents:
            return {}, {}, {}, {}, {}
        step = self._env.step(self._joint_action(actions))
        # The batch has begun the next episode where this one ended; PettingZoo wants to see the end.
        self._state = step.final_state[0].numpy()
        obs = self._by_agent(step.final_obs)
        mask = self._env.final_action_mask().to(torch.int8)
        masks = self._by_agent(mask)
        rewards, terminations = {}, {}
        truncations, infos = {}, {}
        truncated = step.truncations.item()
        for i, agent in enumerate(self.possible_agents):
            if agent not in self.agents:
                continue
            rewards[agent] = step.rewards[0, i].item()
            terminations[agent] = step.terminations[0, i].item()
            truncations[agent] = truncated and not terminations[agent]
            executed_action = step.executed_actions[0, i].item()
            infos[agent] = {"action_mask": masks[agent], "executed_action": executed_action}
        over = [agent for agent in self.agents if terminations[agent] or truncations[agent]]
        self.agents = [agent for agent in self.agents if agent not in over]
        return obs, rewards, terminations, truncations, infos

    def _joint_action(self, actions: dict[str, int]) -> Tensor:
        """{agent: action} of everyone in the episode -> [1, A] int64, stay for those who left"""
        missing = [agent for agent in self.agents if agent not in actions]
        if missing:
            raise ValueError(f"expected an action of every agent in env.agents, got none of {missing}; add them")
        joint = [STAY] * self._env.num_agents
        for i, agent in enumerate(self.possible_agents):
            if agent in self.agents:
                joint[i] = int(actions[agent])
        return torch.tensor([joint])

    def _by_agent(self, values: Tensor) -> dict[str, np.ndarray]:
        """values [1, A, ...] -> {agent: [...]} for agents in the episode"""
        rows = zip(self.possible_agents, values[0], strict=True)
        return {agent: row.numpy() for agent, row in rows if agent in self.agents}

    def state(self) -> np.ndarray:
        """The state [H, W, C] uint8, at the end of an episode the last one."""
        if self._state is None:
            raise ValueError("expected a reset first, got none yet; call env.reset()")
        return self._state

    def render(self) -> np.ndarray | None:
        if self.render_mode != "rgb_array":
            return None
        return self.batch.picture(self.state())


def register_presets(module: str, presets: dict[str, dict[str, int]]) -> None:
    """Makes a game's presets known to PettingZoo: pettingzoo.make("parallel", "<preset>-v0")."""
    if not hasattr(pettingzoo, "register"):  # before 1.27
        return
    for preset in presets:
        pettingzoo.register(
            "parallel",
            f"{preset}-v0",
            entry_point=f"{module}:parallel_env",
            kwargs={"preset": preset},
        )


def options_of(
    preset: str,
    presets: dict[str, dict[str, int]],
    game: str,
) -> dict[str, int]:
    """The constructor arguments of a preset; UsageError for an unknown name."""
    if preset not in presets:
        raise UsageError(f"expected a {game} preset, one of {', '.join(presets)}, got '{preset}'; use one of these")
    return dict(presets[preset])


# Scripted partners


def check_script(name: str, scripts: tuple[str, ...]) -> None:
    if name not in scripts:
        raise UsageError(f"expected a scripted policy, one of {', '.join(scripts)}, got '{name}'; use one")


def uniform(choices: Tensor) -> Tensor:
    """Evenly over the actions in choices [..., n] bool, never a row without any. -> [..., n] float32"""
    return choices / choices.sum(-1, keepdim=True)


def always(action: int, like: Tensor) -> Tensor:
    """That action only: probabilities of the shape of `like` [..., n]."""
    probs = torch.zeros(like.shape, device=like.device)
    probs[..., action] = 1
    return probs


def use_nearest(obs: Tensor, action_mask: Tensor, plane: int, use: int) -> Tensor:
    """The exact action distribution of a player after the nearest item in a plane of obs [..., H, W, C] -> [..., n]

    On an item, use it; else a legal move that shortens the Manhattan distance to a nearest one; without such a move
    any legal move; without an item, stay. Ties are even.
    """
    nearness = _nearness(obs, plane)  # [..., 5] after actions 0 to 3 and where the player is
    now = nearness[..., NUM_MOVES:]  # [..., 1]
    legal_moves = action_mask[..., :NUM_MOVES]
    shortens = legal_moves & (nearness[..., :NUM_MOVES] > now)  # [..., 4]
    some_shortens = shortens.any(-1, keepdim=True)
    moves = torch.where(some_shortens, shortens, legal_moves)  # [..., 4]
    probs = torch.zeros(action_mask.shape, device=obs.device)
    num_moves = moves.sum(-1, keepdim=True)
    probs[..., :NUM_MOVES] = moves / num_moves.clamp(min=1)
    probs[..., STAY] = ~moves.any(-1)
    there_is_an_item = now > 0
    probs = torch.where(there_is_an_item, probs, always(STAY, probs))
    on_item = action_mask[..., use, None]
    return torch.where(on_item, always(use, probs), probs)


def _nearness(obs: Tensor, plane: int) -> Tensor:
    """[..., 5] int16: larger the nearer an item is from each neighbour and from the own cell, 0 without one."""
    height, width = obs.shape[-3:-1]
    cells = torch.arange(height * width, dtype=torch.float32, device=obs.device)
    myself = obs[..., 0].flatten(-2)  # [..., HW]
    cell = (myself * cells).sum(-1).long()  # [...]; argmax takes several times longer
    items = obs[..., plane].flatten(-2).to(torch.int16)  # [..., HW]
    closeness = _closeness(height, width, obs.device)[cell]  # [..., 5, HW]
    nearness = closeness * items[..., None, :]
    return nearness.amax(-1)


@functools.lru_cache(maxsize=8)
def _closeness(height: int, width: int, device: torch.device) -> Tensor:
    """[HW, 5, HW] int16: height + width - Manhattan distance from each cell's 4 neighbours and itself to each cell."""
    cells = torch.arange(height * width)  # [HW]
    rows, cols = cells // width, cells % width
    row_step, col_step = torch.tensor([*MOVES, (0, 0)]).T  # [5]
    from_row = rows[:, None] + row_step  # [HW, 5]
    from_col = cols[:, None] + col_step
    row_distance = (from_row[..., None] - rows).abs()  # [HW, 5, HW]
    col_distance = (from_col[..., None] - cols).abs()
    closeness = height + width - row_distance - col_distance
    return closeness.to(device, torch.int16)


def sample_actions(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One action from each distribution. probs [..., n] -> [...] int64"""
    rows = probs.flatten(0, -2)  # [B, n]
    actions = torch.multinomial(rows, 1, generator=generator)
    return actions.view(probs.shape[:-1])


# Drawing

CELL = 80  # pixels a side in the picture
OVERSAMPLE = 4  # drawn larger and scaled down, for smooth edges
SIZE = CELL * OVERSAMPLE
PLAYER_COLOURS = "#d1495b #2e6fba #edae49 #7b4fa6 #00798c #e07a3f #c2649a #5a5a5a".split()

Points = list[tuple[float, float]]


def render_grid(state: np.ndarray, draw_items: tuple[Callable[[Cell], None], ...]) -> np.ndarray:
    """Draws a state [H, W, C] (0/1 planes): players numbered, blocks as stone, items by the functions of their kinds.

    Returns uint8 [H * CELL, W * CELL, 3].
    """
    height, width, num_planes = state.shape
    num_agents = num_planes - 1 - len(draw_items)
    image = Image.new("RGB", (width * SIZE, height * SIZE))
    draw = ImageDraw.Draw(image)
    for row, col in np.ndindex(height, width):
        cell = Cell(draw, row, col)
        cell.draw_ground()
        block, *items = state[row, col, num_agents:]
        if block:
            _draw_block(cell)
        for there, draw_item in zip(items, draw_items, strict=True):
            if there:
                draw_item(cell)
        players = np.flatnonzero(state[row, col, :num_agents])
        if len(players):
            _draw_players(cell, players, beside_item=any(items))
    return np.asarray(image.reduce(OVERSAMPLE))


class Cell:
    """A cell of the picture. Places and lengths are parts of its side, from the upper left corner."""

    def __init__(self, draw: ImageDraw.ImageDraw, row: int, col: int):
        self.draw = draw
        self.x = col * SIZE
        self.y = row * SIZE
        self.is_dark = (row + col) % 2 == 1

    def draw_ground(self) -> None:
        right = self.x + SIZE - 1
        bottom = self.y + SIZE - 1
        colour = "#dfe8cc" if self.is_dark else "#e8efd8"
        self.draw.rectangle((self.x, self.y, right, bottom), fill=colour)

    def pixels(self, points: Points) -> Points:
        pixels = []
        for u, v in points:
            x = self.x + u * SIZE
            y = self.y + v * SIZE
            pixels.append((x, y))
        return pixels

    def ellipse(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        **style: Any,
    ) -> None:
        corners = self.pixels([(left, top), (right, bottom)])
        self.draw.ellipse(corners, **style)

    def slab(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        fill: str,
    ) -> None:
        corners = self.pixels([(left, top), (right, bottom)])
        self.draw.rounded_rectangle(corners, SIZE * 0.12, fill=fill)

    def line(self, points: Points, fill: str, width: float) -> None:
        pixels = self.pixels(points)
        width = round(SIZE * width)
        self.draw.line(pixels, fill=fill, width=width, joint="curve")

    def polygon(self, points: Points, fill: str) -> None:
        self.draw.polygon(self.pixels(points), fill=fill)


def points_of(text: str, side: int | None = None) -> Points:
    """ "u,v u,v ...", as SVG writes them. side: 1 or -1, u counts from the middle to the right or to the left."""
    points = []
    for pair in text.split():
        u, v = map(float, pair.split(","))
        if side is not None:
            u = 0.5 + side * u
        points.append((u, v))
    return points


def _draw_block(cell: Cell) -> None:
    light, dark = "#7a858f", "#5d6670"
    cell.slab(0.04, 0.04, 0.96, 0.96, fill=dark)
    cell.slab(0.04, 0.04, 0.96, 0.86, fill=light)
    for crack in ("0.2,0.3 0.42,0.42 0.38,0.62", "0.6,0.2 0.7,0.36 0.62,0.5 0.8,0.66"):
        cell.line(points_of(crack), fill=dark, width=0.03)


def _draw_players(cell: Cell, players: np.ndarray, beside_item: bool) -> None:
    """Numbered discs side by side; small and in the corners where they would hide an item."""
    side = math.ceil(math.sqrt(len(players)))  # discs in a row
    if beside_item:
        side = max(side, 2)
        radius = 0.36 / side
        spread = 1.2
        lift = 0.0
    else:
        radius = 0.42 / max(side, 1.3)
        spread = 1.0
        num_rows = math.ceil(len(players) / side)
        lift = (1 - num_rows / side) / 2  # to the middle of the cell
    font = ImageFont.load_default(radius * 1.2 * SIZE)
    for slot, player in enumerate(players):
        row, col = divmod(slot, side)  # from the bottom up
        u = (col + 0.5) / side - 0.5
        v = 0.5 - (row + 0.5) / side - lift
        x = cell.x + (0.5 + spread * u) * SIZE
        y = cell.y + (0.5 + spread * v) * SIZE
        r = radius * SIZE
        colour = PLAYER_COLOURS[player % len(PLAYER_COLOURS)]
        disc = (x - r, y - r, x + r, y + r)
        cell.draw.ellipse(
            disc,
            fill=colour,
            outline="white",
            width=round(SIZE * 0.025),
        )
        cell.draw.text(
            (x, y),
            str(player),
            fill="white",
            font=font,
            anchor="mm",
        )
