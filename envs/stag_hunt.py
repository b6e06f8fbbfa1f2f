"""Markov Stag Hunt: thousands of copies as one batch of tensors, a PettingZoo view of it, and scripted partners.

The game is from Huang et al., "Efficient Adaptation in Mixed-Motive Environments via Hierarchical Opponent
Modeling and Planning", ICML 2024, arXiv 2406.08002. docs/stag_hunt.md has the rules and how to use this file.

    env = StagHuntVecEnv(4096, "cpu", 1, **preset_options("stag_hunt-8x8-4h1s"))
    env = parallel_env("stag_hunt-8x8-4h1s", render_mode="rgb_array")

Shapes: N envs, A players, P prey (stags, then hares), K bodies (players, blocks, stags, hares, in this order),
C = A + 3 planes (A players, blocks, stags, hares), R the side of `view`. A cell is row * width + column.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from typing import Any

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

ENV_ID = r"stag_hunt(-\d+x\d+-\d+h\d+s)?"  # the ids of this game
ACTION_NAMES = ("up", "down", "left", "right", "stay", "hunt stag", "hunt hare")
NUM_ACTIONS = len(ACTION_NAMES)
STAY, HUNT_STAG, HUNT_HARE = 4, 5, 6
MOVES = (  # (row, column) steps of actions 0 to 3
    (-1, 0),
    (1, 0),
    (0, -1),
    (0, 1),
)
NUM_MOVES = len(MOVES)
STAG_HUNTERS = 2  # it takes to catch a stag
STAG_VALUE, HARE_VALUE = 10.0, 1.0
SCRIPTED = ("random", "nearest_stag", "nearest_hare", "stay")


def _four_of_each(side: int, num_stags: int) -> dict[str, int]:
    """The constructor arguments of a square map with four players and four hares."""
    return {
        "height": side,
        "width": side,
        "num_players": 4,
        "num_stags": num_stags,
        "num_hares": 4,
    }


PRESETS = {
    "stag_hunt-4x4-4h1s": _four_of_each(side=4, num_stags=1),
    "stag_hunt-8x8-4h1s": _four_of_each(side=8, num_stags=1),
    "stag_hunt-8x8-4h2s": _four_of_each(side=8, num_stags=2),
}
PRESETS["stag_hunt"] = PRESETS["stag_hunt-4x4-4h1s"]

MIN_CONNECTED = 0.01  # share of random block layouts that must be connected, or redrawing them takes too long
BLOCK_POOL = 16_384  # block layouts an accelerator samples from


def preset_options(name: str) -> dict[str, int]:
    """The constructor arguments of a preset; UsageError for an unknown name."""
    if name not in PRESETS:
        raise UsageError(f"expected a stag hunt preset, one of {', '.join(PRESETS)}, got '{name}'; use one of these")
    return dict(PRESETS[name])


def describe_obs(num_agents: int, env_kwargs: dict[str, Any]) -> ObsSpec:
    """What the channels of a player's observation mean; the state has the same channels, with players as they sit."""
    others = (f"player i+{k}" for k in range(1, num_agents))
    window = bool(env_kwargs.get("view"))
    return ObsSpec(
        names=("self", *others, "blocks", "stags", "hares"),
        kinds=("agent",) * num_agents + ("binary",) * 3,
        ego="plane",
        window=window,
        hunts={
            "stags": (HUNT_STAG, STAG_HUNTERS),
            "hares": (HUNT_HARE, 1),
        },
        moves=MOVES,
        certain=not window,
    )


def ego_order(num_agents: int) -> Tensor:
    """[A, A] int64: row i lists the agents as agent i counts them: i, i + 1, i + 2 ... mod A.

    The one place where this order is defined, for the player planes of observations as for joint actions:
    `actions[..., ego_order(A)]` is [..., A, A], row i the joint action as agent i counts it.
    """
    seats = torch.arange(num_agents)
    return (seats[:, None] + seats) % num_agents


class StagHuntVecEnv(VecEnv):
    """N Markov Stag Hunts as one batch; the contract is in envs/__init__.py.

    height, width, num_players, num_stags, num_hares, num_blocks: what is on the map; blocks are cells that
    nobody enters. max_cycles: steps until truncation. view: side of the window that each player sees, odd;
    None for the whole map. Raises UsageError for arguments that make no game.

    An illegal action and the action of a player who is not active are executed as stay (`executed_actions`).
    """

    backend = "batched"

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str,
        seed: int,
        *,
        height: int = 4,
        width: int = 4,
        num_players: int = 4,
        num_stags: int = 1,
        num_hares: int = 4,
        num_blocks: int = 0,
        max_cycles: int = 35,
        view: int | None = None,
    ):
        self.options = {
            "height": height,
            "width": width,
            "num_players": num_players,
            "num_stags": num_stags,
            "num_hares": num_hares,
            "num_blocks": num_blocks,
            "max_cycles": max_cycles,
            "view": view,
        }
        self._check_options(num_envs)
        self.env_id = f"stag_hunt-{height}x{width}-{num_hares}h{num_stags}s"
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.agents = [f"player_{i}" for i in range(num_players)]
        num_planes = num_players + 3
        self.state_shape = (height, width, num_planes)
        self.obs_shape = self.state_shape
        if view is not None:
            self.obs_shape = (view, view, num_planes)
        self.obs_dtype = self.state_dtype = torch.uint8
        self.action_space = gym.spaces.Discrete(NUM_ACTIONS)
        self._players = slice(num_players)  # of the K bodies
        self._blocks = slice(num_players, num_players + num_blocks)
        self._prey = slice(num_players + num_blocks, None)
        self._generator = torch.Generator(self.device)
        # Where Python may look at a tensor; an accelerator would stall, so it does more work instead.
        self._can_branch = self.device.type == "cpu"
        self._make_move_tables()
        self._make_body_tables()
        if view is not None:
            self._make_window_tables(view)
        self.reset(seed)

    def _check_options(self, num_envs: int) -> None:
        for name, value in {"num_envs": num_envs, **self.options}.items():
            if name == "view" and value is None:
                continue
            low = 0 if name in ("num_stags", "num_hares", "num_blocks") else 1
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not is_whole or value < low:
                raise UsageError(f"expected {name} to be a whole number >= {low}, got {value!r}; change {name}")
        view = self.options["view"]
        if view is not None and view % 2 == 0:
            raise UsageError(f"expected an odd view, so that a player is at its centre, got {view}; use an odd one")
        height, width = self.options["height"], self.options["width"]
        num_prey = self.options["num_stags"] + self.options["num_hares"]
        num_blocks = self.options["num_blocks"]
        if num_prey == 0:
            raise UsageError("expected at least one stag or hare, got none; raise num_stags or num_hares")
        num_bodies = self.options["num_players"] + num_prey + num_blocks
        if height * width < num_bodies:
            raise UsageError(
                f"expected a grid with a cell for each of the {num_bodies} players, prey and blocks, got "
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
        next_cell = cells[:, None].repeat(1, NUM_ACTIONS)  # [HW, 7], hunts and stay stay
        stay = next_cell[:, :NUM_MOVES]
        next_cell[:, :NUM_MOVES] = torch.where(on_map, to_cell, stay)
        self._on_map = on_map.to(self.device)
        self._next_cell = next_cell.to(self.device)

    def _make_body_tables(self) -> None:
        """In which plane each body is drawn, and what each prey takes and gives."""
        height, width, num_planes = self.state_shape
        num_agents, num_blocks = self.num_agents, self.options["num_blocks"]
        num_stags, num_hares = self.options["num_stags"], self.options["num_hares"]
        kinds = [0] * num_blocks + [1] * num_stags + [2] * num_hares
        kind_plane = num_agents + torch.tensor(kinds)  # [K-A]
        plane = torch.cat([torch.arange(num_agents), kind_plane])
        self._plane = plane.to(self.device)  # [K]
        # Plane of body k in the observation of player i: the inverse of "which player is in plane j".
        player_plane = ego_order(num_agents).argsort(1)  # [A, A]
        others_plane = kind_plane.expand(num_agents, -1)  # [A, K-A]
        ego_plane = torch.cat([player_plane, others_plane], 1)
        obs_start = torch.arange(num_agents) * height * width * num_planes
        ego_offset = obs_start[:, None] + ego_plane
        self._ego_offset = ego_offset.to(self.device)  # [A, K], into one env's flat observations

        is_stag = [True] * num_stags + [False] * num_hares
        is_stag = torch.tensor(is_stag, device=self.device)  # [P]
        self._hunt_action = torch.where(is_stag, HUNT_STAG, HUNT_HARE)
        self._hunters_needed = torch.where(is_stag, STAG_HUNTERS, 1)
        self._prey_value = torch.where(is_stag, STAG_VALUE, HARE_VALUE)

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
        prey = cells[:, num_agents:]
        return torch.cat([players, blocks, prey], 1)

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

        cells [N, K] int64: row * width + column of players, blocks, stags, hares, in this order. alive [N, K]
        bool: False for a player who left and for prey that was caught; None for nobody. Raises ValueError where
        blocks and prey are not on distinct cells, or a player stands in a block.
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
                f"expected cells 0 to {num_cells - 1}, blocks and prey on distinct ones and no player in a block, got "
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
        # A body that is gone writes 0 where nobody else writes: players have planes of their own, prey cells.
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
        """Legal actions. state [N, H, W, C] -> [N, A, 7] bool; only stay for those who left"""
        num_envs, num_agents = self.num_envs, self.num_agents
        num_planes = self.state_shape[2]
        cells = cells[:, self._players]  # [N, A]
        flat = state.view(num_envs, -1)  # [N, H*W*C]
        size = (num_envs, num_agents, NUM_ACTIONS)
        mask = torch.ones(size, dtype=torch.bool, device=self.device)
        moves = self._on_map[cells]  # [N, A, 4]
        if self.options["num_blocks"]:
            to_cells = self._next_cell[cells][..., :NUM_MOVES]
            block_plane = to_cells * num_planes + num_agents  # [N, A, 4]
            blocked = flat.gather(1, block_plane.flatten(1))
            moves &= blocked.view_as(moves) == 0
        mask[..., :NUM_MOVES] = moves
        stag_here = cells * num_planes + num_agents + 1
        hare_here = stag_here + 1
        mask[..., HUNT_STAG] = flat.gather(1, stag_here)
        mask[..., HUNT_HARE] = flat.gather(1, hare_here)
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
        """Observations of the whole map, whatever `view` is, for scripted partners. [N, A, H, W, A+3] uint8"""
        return self._full_obs

    def final_action_mask(self) -> Tensor:
        """Legal actions in the `final_obs` of the last EnvStep. [N, A, 7] bool"""
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
        """Steps all envs: everyone moves at once, then hunts. actions [N, A] int64 -> EnvStep

        Raises ValueError for a wrong shape, dtype or device and, on the CPU, for an action of an active player that
        is not 0 to 6; elsewhere the test would stall the device and such an action is executed as stay.
        """
        self._check_actions(actions)
        active = self._alive[:, self._players]  # [N, A]
        actions = self._legal_or_stay(actions, active)

        cells = self._cells.clone()  # [N, K]
        players = cells[:, self._players]  # [N, A], a view
        players[:] = self._next_cell[players, actions]
        rewards, caught = self._hunt(cells, actions)  # [N, A], [N, P]
        left = rewards > 0  # [N, A]
        alive = self._alive.clone()  # [N, K]
        alive[:, self._players] &= ~left
        alive[:, self._prey] &= ~caught

        timesteps = self._timesteps + 1
        returns = self._returns + rewards
        players_left = alive[:, self._players].any(1)  # [N]
        prey_left = alive[:, self._prey].any(1)
        no_more = ~(players_left & prey_left)
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
        in_range = (actions >= 0) & (actions < NUM_ACTIONS)
        if self._can_branch and not in_range.all():
            wrong = actions[~in_range][0].item()
            raise ValueError(
                f"expected actions 0 to {NUM_ACTIONS - 1}, got {wrong}; see ACTION_NAMES in envs/stag_hunt.py"
            )
        index = actions.clamp(0, NUM_ACTIONS - 1)
        legal = self._mask.gather(2, index[..., None])  # [N, A, 1]
        legal = in_range & legal[..., 0]
        return torch.where(legal, actions, STAY)

    def _hunt(self, cells: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """cells [N, K] after moving, actions [N, A] -> rewards [N, A], caught [N, P] bool"""
        # A legal hunt is on a living prey of that kind, and hunters do not move.
        players = cells[:, self._players]
        prey = cells[:, self._prey]
        same_cell = players[:, :, None] == prey[:, None, :]  # [N, A, P]
        hunting = same_cell & (actions[..., None] == self._hunt_action)
        hunters = hunting.sum(1)  # [N, P]
        caught = hunters >= self._hunters_needed
        share = caught * self._prey_value / hunters.clamp(min=1)
        rewards = (hunting * share[:, None]).sum(2)
        return rewards, caught

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
        return render_grid(state.numpy())


def _check_tensor(
    name: str,
    given: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    if tuple(given.shape) != shape or given.dtype != dtype:
        raise ValueError(f"expected {name} {list(shape)} {dtype}, got {list(given.shape)} {given.dtype}; fix it")


class StagHuntParallelEnv(ParallelEnv, EzPickle):
    """One Markov Stag Hunt as a PettingZoo ParallelEnv; the rules are those of StagHuntVecEnv, which it steps.

    Observations [H, W, A+3] uint8 (or [R, R, A+3] with `view`). infos[agent]: "action_mask" [7] int8, the legal
    actions, and, after a step, "executed_action", stay for an illegal one. options: the keyword arguments of
    StagHuntVecEnv. render_mode: None or "rgb_array".
    """

    metadata = {"name": "stag_hunt_v0", "render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, *, render_mode: str | None = None, **options: int | None):
        EzPickle.__init__(self, render_mode=render_mode, **options)
        if render_mode not in (None, "rgb_array"):
            raise UsageError(f"expected render_mode None or 'rgb_array', got {render_mode!r}; use one of these")
        self.render_mode = render_mode
        first_seed = random.SystemRandom().randrange(2**31)
        self._env = StagHuntVecEnv(1, "cpu", first_seed, **options)
        self._state: np.ndarray | None = None
        self.agents: list[str] = []
        self.possible_agents = self._env.agents
        obs_space = gym.spaces.Box(0, 1, self._env.obs_shape, np.uint8)
        self.state_space = gym.spaces.Box(0, 1, self._env.state_shape, np.uint8)
        self.observation_spaces = {agent: copy.deepcopy(obs_space) for agent in self.possible_agents}
        self.action_spaces = {agent: gym.spaces.Discrete(NUM_ACTIONS) for agent in self.possible_agents}

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

        ValueError for an agent without an action, an action that is not 0 to 6, and before the first reset. Like
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
        """The state [H, W, A+3] uint8, at the end of an episode the last one."""
        if self._state is None:
            raise ValueError("expected a reset first, got none yet; call env.reset()")
        return self._state

    def render(self) -> np.ndarray | None:
        if self.render_mode != "rgb_array":
            return None
        return render_grid(self.state())


def parallel_env(preset: str = "stag_hunt", **options: Any) -> StagHuntParallelEnv:
    """A preset as a PettingZoo ParallelEnv. options: `render_mode` and what replaces values of the preset."""
    all_options = {**preset_options(preset), **options}
    return StagHuntParallelEnv(**all_options)


if hasattr(pettingzoo, "register"):  # from 1.27 on
    for preset in PRESETS:
        pettingzoo.register(
            "parallel",
            f"{preset}-v0",
            entry_point="envs.stag_hunt:parallel_env",
            kwargs={"preset": preset},
        )


# Scripted partners


def action_probs(policy_name: str, obs: Tensor, action_mask: Tensor) -> Tensor:
    """The exact action distribution of a scripted player.

    policy_name: one of SCRIPTED. obs [..., H, W, A+3] of the whole map (`full_obs()` where the env has a `view`),
    action_mask [..., 7] bool -> [..., 7] float32. Ties are even: the best accuracy that anyone can have in
    predicting a script is the mean of the largest probability. UsageError for an unknown name.
    """
    if policy_name not in SCRIPTED:
        raise UsageError(f"expected a scripted policy, one of {', '.join(SCRIPTED)}, got '{policy_name}'; use one")
    if policy_name == "random":
        return action_mask / action_mask.sum(-1, keepdim=True)
    always_stay = _always(STAY, obs.device).expand(action_mask.shape)
    if policy_name == "stay":
        return always_stay.clone()
    if policy_name == "nearest_stag":
        target_plane, hunt = -2, HUNT_STAG
    else:
        target_plane, hunt = -1, HUNT_HARE

    nearness = _nearness(obs, target_plane)  # [..., 5] after actions 0 to 3 and where the player is
    now = nearness[..., NUM_MOVES:]  # [..., 1]
    legal_moves = action_mask[..., :NUM_MOVES]
    shortens = legal_moves & (nearness[..., :NUM_MOVES] > now)  # [..., 4]
    some_shortens = shortens.any(-1, keepdim=True)
    moves = torch.where(some_shortens, shortens, legal_moves)  # [..., 4]
    probs = torch.zeros(action_mask.shape, device=obs.device)
    num_moves = moves.sum(-1, keepdim=True)
    probs[..., :NUM_MOVES] = moves / num_moves.clamp(min=1)
    probs[..., STAY] = ~moves.any(-1)
    there_is_a_target = now > 0
    probs = torch.where(there_is_a_target, probs, always_stay)
    on_target = action_mask[..., hunt, None]
    return torch.where(on_target, _always(hunt, obs.device), probs)


def _always(action: int, device: torch.device) -> Tensor:
    """[7]"""
    probs = torch.zeros(NUM_ACTIONS, device=device)
    probs[action] = 1
    return probs


def _nearness(obs: Tensor, target_plane: int) -> Tensor:
    """[..., 5] int16: larger the nearer a target is from each neighbour and from the own cell, 0 without a target."""
    height, width = obs.shape[-3:-1]
    cells = torch.arange(height * width, dtype=torch.float32, device=obs.device)
    myself = obs[..., 0].flatten(-2)  # [..., HW]
    cell = (myself * cells).sum(-1).long()  # [...]; argmax takes several times longer
    targets = obs[..., target_plane].flatten(-2).to(torch.int16)  # [..., HW]
    closeness = _closeness(height, width, obs.device)[cell]  # [..., 5, HW]
    nearness = closeness * targets[..., None, :]
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
    """One action from each distribution. probs [..., 7] -> [...] int64"""
    rows = probs.flatten(0, -2)  # [B, 7]
    actions = torch.multinomial(rows, 1, generator=generator)
    return actions.view(probs.shape[:-1])


# Drawing

CELL = 80  # pixels a side in the picture
OVERSAMPLE = 4  # drawn larger and scaled down, for smooth edges
SIZE = CELL * OVERSAMPLE
PLAYER_COLOURS = "#d1495b #2e6fba #edae49 #7b4fa6 #00798c #e07a3f #c2649a #5a5a5a".split()

Points = list[tuple[float, float]]


def render_grid(state: np.ndarray) -> np.ndarray:
    """Draws a state [H, W, A+3] (0/1 planes): players numbered, stags brown, hares pale, blocks stone.

    Returns uint8 [H * CELL, W * CELL, 3].
    """
    height, width, num_planes = state.shape
    num_agents = num_planes - 3
    image = Image.new("RGB", (width * SIZE, height * SIZE))
    draw = ImageDraw.Draw(image)
    for row, col in np.ndindex(height, width):
        cell = _Cell(draw, row, col)
        cell.draw_ground()
        block, stag, hare = state[row, col, num_agents:]
        if block:
            _draw_block(cell)
        if stag:
            _draw_stag(cell)
        if hare:
            _draw_hare(cell)
        players = np.flatnonzero(state[row, col, :num_agents])
        if len(players):
            _draw_players(cell, players, prey=bool(stag or hare))
    return np.asarray(image.reduce(OVERSAMPLE))


class _Cell:
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

    def ellipse(self, left: float, top: float, right: float, bottom: float, **style: Any) -> None:
        corners = self.pixels([(left, top), (right, bottom)])
        self.draw.ellipse(corners, **style)

    def slab(self, left: float, top: float, right: float, bottom: float, fill: str) -> None:
        corners = self.pixels([(left, top), (right, bottom)])
        self.draw.rounded_rectangle(corners, SIZE * 0.12, fill=fill)

    def line(self, points: Points, fill: str, width: float) -> None:
        pixels = self.pixels(points)
        width = round(SIZE * width)
        self.draw.line(pixels, fill=fill, width=width, joint="curve")

    def polygon(self, points: Points, fill: str) -> None:
        self.draw.polygon(self.pixels(points), fill=fill)


def _points(text: str, side: int | None = None) -> Points:
    """ "u,v u,v ...", as SVG writes them. side: 1 or -1, u counts from the middle to the right or to the left."""
    points = []
    for pair in text.split():
        u, v = map(float, pair.split(","))
        if side is not None:
            u = 0.5 + side * u
        points.append((u, v))
    return points


def _draw_block(cell: _Cell) -> None:
    light, dark = "#7a858f", "#5d6670"
    cell.slab(0.04, 0.04, 0.96, 0.96, fill=dark)
    cell.slab(0.04, 0.04, 0.96, 0.86, fill=light)
    for crack in ("0.2,0.3 0.42,0.42 0.38,0.62", "0.6,0.2 0.7,0.36 0.62,0.5 0.8,0.66"):
        cell.line(_points(crack), fill=dark, width=0.03)


def _draw_stag(cell: _Cell) -> None:
    brown, dark, pale, antler = "#8a5a34", "#4a2f1b", "#c9a27a", "#6b5436"
    for side in (-1, 1):
        for branch in (
            "0.06,0.42 0.14,0.3 0.3,0.24 0.33,0.08",
            "0.14,0.3 0.12,0.1",
            "0.24,0.26 0.22,0.1",
        ):
            cell.line(_points(branch, side), fill=antler, width=0.045)
        ear = _points("0.1,0.44 0.28,0.36 0.16,0.54", side)
        cell.polygon(ear, fill=brown)
    head = _points("0.36,0.4 0.64,0.4 0.66,0.54 0.58,0.8 0.42,0.8 0.34,0.54")
    cell.polygon(head, fill=brown)
    cell.ellipse(0.41, 0.7, 0.59, 0.88, fill=pale)
    cell.ellipse(0.455, 0.72, 0.545, 0.79, fill=dark)
    for eye in (0.42, 0.58):
        cell.ellipse(eye - 0.03, 0.5, eye + 0.03, 0.56, fill=dark)


def _draw_hare(cell: _Cell) -> None:
    dark, pink = "#3b3530", "#e8a7a7"
    fur = {"fill": "#fbf7ef", "outline": "#a39a8c", "width": round(SIZE * 0.02)}
    for ear in (0.42, 0.58):
        cell.ellipse(ear - 0.07, 0.14, ear + 0.07, 0.58, **fur)
        cell.ellipse(ear - 0.03, 0.22, ear + 0.03, 0.5, fill=pink)
    cell.ellipse(0.3, 0.44, 0.7, 0.82, **fur)
    for eye in (0.42, 0.58):
        cell.ellipse(eye - 0.028, 0.55, eye + 0.028, 0.61, fill=dark)
    cell.ellipse(0.465, 0.65, 0.535, 0.7, fill=pink)


def _draw_players(cell: _Cell, players: np.ndarray, prey: bool) -> None:
    """Numbered discs side by side; small and in the corners where they would hide prey."""
    side = math.ceil(math.sqrt(len(players)))  # discs in a row
    if prey:
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
