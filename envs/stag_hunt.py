"""Markov Stag Hunt: thousands of copies as one batch of tensors, a PettingZoo view of it, and scripted partners.

The game is from Huang et al., "Efficient Adaptation in Mixed-Motive Environments via Hierarchical Opponent
Modeling and Planning", ICML 2024, arXiv 2406.08002. docs/stag_hunt.md has the rules and how to use this file.

    env = StagHuntVecEnv(4096, "cpu", 1, **preset_options("stag_hunt-8x8-4h1s"))
    env = parallel_env("stag_hunt-8x8-4h1s", render_mode="rgb_array")

Shapes: N envs, A players, P prey (stags, then hares), K bodies (players, blocks, stags, hares, in this order),
C = A + 3 planes (A players, blocks, stags, hares), R the side of `view`. A cell is row * width + column.
"""

from __future__ import annotations

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

from envs import EnvStep, VecEnv

ACTION_NAMES = ("up", "down", "left", "right", "stay", "hunt stag", "hunt hare")
NUM_MOVES, STAY, HUNT_STAG, HUNT_HARE, NUM_ACTIONS = 4, 4, 5, 6, 7
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # (row, column) steps of actions 0 to 3
STAG_HUNTERS, STAG_VALUE, HARE_VALUE = 2, 10.0, 1.0
SCRIPTED = ("random", "nearest_stag", "nearest_hare", "stay")

PRESETS = {
    "stag_hunt-4x4-4h1s": {"height": 4, "width": 4, "num_players": 4, "num_stags": 1, "num_hares": 4},
    "stag_hunt-8x8-4h1s": {"height": 8, "width": 8, "num_players": 4, "num_stags": 1, "num_hares": 4},
    "stag_hunt-8x8-4h2s": {"height": 8, "width": 8, "num_players": 4, "num_stags": 2, "num_hares": 4},
}
PRESETS["stag_hunt"] = PRESETS["stag_hunt-4x4-4h1s"]

MIN_CONNECTED = 0.01  # share of random block layouts that must be connected, or redrawing them takes too long
BLOCK_POOL = 16_384  # block layouts an accelerator samples from


def preset_options(name: str) -> dict[str, int]:
    """The constructor arguments of a preset; ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"expected a stag hunt preset, one of {', '.join(PRESETS)}, got '{name}'; use one of these")
    return dict(PRESETS[name])


def ego_order(num_agents: int) -> torch.Tensor:
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
    None for the whole map. Raises ValueError for arguments that make no game.

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
        self.num_envs, self.device = num_envs, torch.device(device)
        self.agents = [f"player_{i}" for i in range(num_players)]
        num_planes = num_players + 3
        self.state_shape = (height, width, num_planes)
        self.obs_shape = (view, view, num_planes) if view else self.state_shape
        self.obs_dtype = self.state_dtype = torch.uint8
        self.action_space = gym.spaces.Discrete(NUM_ACTIONS)
        self._generator = torch.Generator(self.device)
        # Where Python may look at a tensor; an accelerator would stall, so it does more work instead.
        self._can_branch = self.device.type == "cpu"
        self._make_tables()
        self.reset(seed)

    def _check_options(self, num_envs: int) -> None:
        for name, value in {"num_envs": num_envs, **self.options}.items():
            if name == "view" and value is None:
                continue
            low = 0 if name in ("num_stags", "num_hares", "num_blocks") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"expected {name} to be a whole number >= {low}, got {value!r}; change {name}")
        o = self.options
        if o["view"] is not None and o["view"] % 2 == 0:
            raise ValueError(
                f"expected an odd view, so that a player is at its centre, got {o['view']}; use an odd one"
            )
        if o["num_stags"] + o["num_hares"] == 0:
            raise ValueError("expected at least one stag or hare, got none; raise num_stags or num_hares")
        content = o["num_players"] + o["num_stags"] + o["num_hares"] + o["num_blocks"]
        if o["height"] * o["width"] < content:
            raise ValueError(
                f"expected a grid with a cell for each of the {content} players, prey and blocks, got "
                f"{o['height']}x{o['width']}; use a larger grid or put less on it"
            )
        if o["num_blocks"]:
            trial = torch.Generator().manual_seed(0)
            share = self._draw_block_candidates(1024, trial)[1].float().mean().item()
            if share < MIN_CONNECTED:
                raise ValueError(
                    f"expected blocks that leave the free cells connected in at least {MIN_CONNECTED:.0%} of random "
                    f"draws, got {share:.1%} with num_blocks={o['num_blocks']}; use fewer blocks"
                )

    def _make_tables(self) -> None:
        """Constant tensors that `step` looks things up in."""
        height, width, num_planes = self.state_shape
        num_agents, num_cells = self.num_agents, height * width
        num_stags, num_hares, num_blocks = (self.options[f"num_{kind}"] for kind in ("stags", "hares", "blocks"))
        rows, cols = torch.arange(num_cells) // width, torch.arange(num_cells) % width  # [HW]

        steps = torch.tensor(MOVES)  # [4, 2]
        to_row, to_col = rows[:, None] + steps[:, 0], cols[:, None] + steps[:, 1]  # [HW, 4]
        on_map = (to_row >= 0) & (to_row < height) & (to_col >= 0) & (to_col < width)  # [HW, 4]
        next_cell = torch.arange(num_cells)[:, None].repeat(1, NUM_ACTIONS)  # [HW, 7], hunts and stay stay
        next_cell[:, :NUM_MOVES] = torch.where(on_map, to_row * width + to_col, next_cell[:, :NUM_MOVES])
        self._on_map, self._next_cell = on_map.to(self.device), next_cell.to(self.device)

        kinds = torch.tensor([0] * num_blocks + [1] * num_stags + [2] * num_hares)  # [K-A]
        self._plane = torch.cat([torch.arange(num_agents), num_agents + kinds]).to(self.device)  # [K]
        # Plane of body k in the observation of player i: the inverse of "which player is in plane j".
        ego_plane = torch.cat([ego_order(num_agents).argsort(1), (num_agents + kinds).expand(num_agents, -1)], 1)
        block_of_i = torch.arange(num_agents)[:, None] * num_cells * num_planes
        self._ego_offset = (block_of_i + ego_plane).to(self.device)  # [A, K], into one env's flat observations

        is_stag = (kinds[num_blocks:] == 1).to(self.device)  # [P]
        self._hunt_action = torch.where(is_stag, HUNT_STAG, HUNT_HARE)
        self._hunters_needed = torch.where(is_stag, STAG_HUNTERS, 1)
        self._prey_value = torch.where(is_stag, STAG_VALUE, HARE_VALUE)

        if self.options["view"]:
            reach = torch.arange(self.options["view"]) - self.options["view"] // 2  # [R]
            see_row = rows[:, None, None] + reach[:, None]  # [HW, R, 1]
            see_col = cols[:, None, None] + reach  # [HW, 1, R]
            seen = (see_row >= 0) & (see_row < height) & (see_col >= 0) & (see_col < width)  # [HW, R, R]
            window = torch.where(seen, see_row * width + see_col, num_cells)  # cell num_cells: outside
            self._window = window.flatten(1).to(self.device)  # [HW, R*R]
            self._outside = torch.zeros(num_planes, dtype=torch.uint8, device=self.device)  # [C]
            self._outside[num_agents] = 1

    # Episode starts

    def _draw_block_candidates(self, num: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """`num` uniform block layouts on the CPU: cells [num, blocks] int64, connected [num] bool."""
        height, width = self.options["height"], self.options["width"]
        cells = torch.rand(num, height * width, generator=generator).topk(self.options["num_blocks"], 1).indices
        free = torch.ones(num, height * width, dtype=torch.bool).scatter_(1, cells, False)
        start = free.int().argmax(1, keepdim=True)  # [num, 1], the first free cell
        flood = torch.zeros_like(free).scatter_(1, start, True).view(num, height, width)
        free = free.view(num, height, width)
        while True:
            wider = flood.clone()
            wider[:, 1:] |= flood[:, :-1]
            wider[:, :-1] |= flood[:, 1:]
            wider[:, :, 1:] |= flood[:, :, :-1]
            wider[:, :, :-1] |= flood[:, :, 1:]
            wider &= free
            if torch.equal(wider, flood):
                return cells, (flood == free).flatten(1).all(1)
            flood = wider

    def _draw_blocks(self, num: int, generator: torch.Generator) -> torch.Tensor:
        """`num` connected block layouts, redrawn until they are, on the CPU. [num, blocks] int64"""
        kept = torch.empty(0, self.options["num_blocks"], dtype=torch.int64)
        while len(kept) < num:
            cells, connected = self._draw_block_candidates(min(2 * num + 16, 4096), generator)
            kept = torch.cat([kept, cells[connected]])
        return kept[:num]

    def _draw_cells(self, num: int) -> torch.Tensor:
        """Start cells of all bodies in `num` new episodes. [num, K] int64"""
        height, width = self.options["height"], self.options["width"]
        num_blocks, num_agents = self.options["num_blocks"], self.num_agents
        # The largest of iid numbers: distinct cells in uniform order, without a loop.
        score = torch.rand(num, height * width, generator=self._generator, device=self.device)
        num_others = len(self._plane) - num_blocks
        if not num_blocks:
            return score.topk(num_others, 1).indices
        if self._block_pool is None:
            blocks = self._draw_blocks(num, self._generator)
        else:
            pick = torch.randint(BLOCK_POOL, (num,), generator=self._generator, device=self.device)
            blocks = self._block_pool[pick]  # [num, blocks]
        cells = score.scatter_(1, blocks, -1.0).topk(num_others, 1).indices
        return torch.cat([cells[:, :num_agents], blocks, cells[:, num_agents:]], 1)

    def reset(self, seed: int | None = None) -> EnvStep:
        """Starts N new episodes; the same seed gives the same ones. None goes on with the random numbers in use."""
        if seed is not None:
            self._generator.manual_seed(int(seed))
            self._block_pool = None  # where there is no test of connectedness while stepping
            if self.options["num_blocks"] and not self._can_branch:
                pool = self._draw_blocks(BLOCK_POOL, torch.Generator().manual_seed(int(seed)))
                self._block_pool = pool.to(self.device)
        return self.set_positions(self._draw_cells(self.num_envs))

    def set_positions(self, cells: torch.Tensor, alive: torch.Tensor | None = None) -> EnvStep:
        """Starts N new episodes from given positions; returns their first EnvStep.

        cells [N, K] int64: row * width + column of players, blocks, stags, hares, in this order. alive [N, K]
        bool: False for a player who left and for prey that was caught; None for nobody. Raises ValueError where
        blocks and prey are not on distinct cells, or a player stands in a block.
        """
        num_agents, num_cells = self.num_agents, self.options["height"] * self.options["width"]
        shape = (self.num_envs, len(self._plane))
        if alive is None:
            alive = torch.ones(shape, dtype=torch.bool, device=self.device)
        for name, value, dtype in (("cells", cells, torch.int64), ("alive", alive, torch.bool)):
            if tuple(value.shape) != shape or value.dtype != dtype:
                raise ValueError(
                    f"expected {name} {list(shape)} {dtype}, got {list(value.shape)} {value.dtype}; fix it"
                )
        cells, alive = cells.to(self.device, copy=True), alive.to(self.device, copy=True)
        blocks_end = num_agents + self.options["num_blocks"]
        fixed = cells[:, num_agents:].sort(1).values  # [N, K-A]
        in_block = (cells[:, :num_agents, None] == cells[:, None, num_agents:blocks_end]).any()
        if cells.min() < 0 or cells.max() >= num_cells or (fixed[:, 1:] == fixed[:, :-1]).any() or in_block:
            raise ValueError(
                f"expected cells 0 to {num_cells - 1}, blocks and prey on distinct ones and no player in a block, got "
                "others; fix the positions"
            )
        if not alive[:, num_agents:blocks_end].all():
            raise ValueError("expected every block to be alive, got one that is not; blocks never vanish")
        num_envs, device = self.num_envs, self.device
        per_agent = {"size": (num_envs, num_agents), "device": device}
        self._cells, self._alive = cells, alive
        self._timesteps = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self._returns = torch.zeros(**per_agent)
        return self._make_step(
            {
                "rewards": torch.zeros(**per_agent),
                "terminations": torch.zeros(**per_agent, dtype=torch.bool),
                "truncations": torch.zeros(num_envs, dtype=torch.bool, device=device),
                "episode_over": torch.zeros(num_envs, dtype=torch.bool, device=device),
                "final_cells": cells,
                "final_alive": alive,
                "episode_returns": self._returns,
                "episode_lengths": self._timesteps,
                "executed_actions": torch.full(**per_agent, fill_value=STAY, dtype=torch.int64),
            }
        )

    # What players see

    def _planes(self, cells: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """The state. cells [N, K] int64, alive [N, K] bool -> [N, H, W, C] uint8"""
        # A body that is gone writes 0 where nobody else writes: players have planes of their own, prey cells.
        flat = torch.zeros(len(cells), math.prod(self.state_shape), dtype=torch.uint8, device=self.device)
        flat.scatter_(1, cells * self.state_shape[2] + self._plane, alive.view(torch.uint8))
        return flat.view(-1, *self.state_shape)

    def _ego_planes(self, cells: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """The whole map for every player, zero for those who left. -> [N, A, H, W, C] uint8"""
        num_envs, num_agents = len(cells), self.num_agents
        index = (cells * self.state_shape[2])[:, None] + self._ego_offset  # [N, A, K]
        ones = alive[:, None] & alive[:, :num_agents, None]  # [N, A, K]
        # Scattering ones is several times faster than permuting the planes of the state.
        size = num_agents * math.prod(self.state_shape)
        flat = torch.zeros(num_envs, size, dtype=torch.uint8, device=self.device)  # [N, A*H*W*C]
        flat.scatter_(1, index.flatten(1), ones.flatten(1).view(torch.uint8))
        return flat.view(num_envs, num_agents, *self.state_shape)

    def _crop(self, full_obs: torch.Tensor, cells: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """The window around each player. full_obs [N, A, H, W, C] -> [N, A, *O] uint8"""
        if not self.options["view"]:
            return full_obs
        num_envs, num_agents = full_obs.shape[:2]
        num_planes = self.state_shape[2]
        outside = self._outside.expand(num_envs, num_agents, 1, num_planes)
        padded = torch.cat([full_obs.flatten(2, 3), outside], 2)  # [N, A, H*W+1, C]
        index = self._window[cells[:, :num_agents]]  # [N, A, R*R]
        window = padded.gather(2, index[..., None].expand(-1, -1, -1, num_planes))  # [N, A, R*R, C]
        window *= alive[:, :num_agents, None, None]
        return window.view(num_envs, num_agents, *self.obs_shape)

    def _action_mask(self, state: torch.Tensor, cells: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """Legal actions. state [N, H, W, C] -> [N, A, 7] bool; only stay for those who left"""
        num_envs, num_agents, num_planes = self.num_envs, self.num_agents, self.state_shape[2]
        cells = cells[:, :num_agents]  # [N, A]
        flat = state.view(num_envs, -1)  # [N, H*W*C]
        mask = torch.ones(num_envs, num_agents, NUM_ACTIONS, dtype=torch.bool, device=self.device)
        moves = self._on_map[cells]  # [N, A, 4]
        if self.options["num_blocks"]:
            block_plane = self._next_cell[cells][..., :NUM_MOVES] * num_planes + num_agents  # [N, A, 4]
            moves &= flat.gather(1, block_plane.flatten(1)).view_as(moves) == 0
        mask[..., :NUM_MOVES] = moves
        for action, plane in ((HUNT_STAG, num_agents + 1), (HUNT_HARE, num_agents + 2)):
            mask[..., action] = flat.gather(1, cells * num_planes + plane)
        mask &= alive[:, :num_agents, None]
        mask[..., STAY] = True
        return mask

    def _make_step(self, last: dict[str, torch.Tensor]) -> EnvStep:
        """The EnvStep of the positions now and of the transition `last` that led to them."""
        state = self._planes(self._cells, self._alive)
        self._state, self._last = state, last
        self._full_obs = self._ego_planes(self._cells, self._alive)
        self._mask = self._action_mask(state, self._cells, self._alive)
        cells, alive = last["final_cells"], last["final_alive"]
        return EnvStep(
            obs=self._crop(self._full_obs, self._cells, self._alive),
            state=state,
            action_mask=self._mask,
            active=self._alive[:, : self.num_agents],
            rewards=last["rewards"],
            terminations=last["terminations"],
            truncations=last["truncations"],
            episode_over=last["episode_over"],
            final_obs=lambda: self._crop(self._ego_planes(cells, alive), cells, alive),
            final_state=lambda: self._planes(cells, alive),
            episode_returns=last["episode_returns"],
            episode_lengths=last["episode_lengths"],
            executed_actions=last["executed_actions"],
        )

    def full_obs(self) -> torch.Tensor:
        """Observations of the whole map, whatever `view` is, for scripted partners. [N, A, H, W, A+3] uint8"""
        return self._full_obs

    def final_action_mask(self) -> torch.Tensor:
        """Legal actions in the `final_obs` of the last EnvStep. [N, A, 7] bool"""
        cells, alive = self._last["final_cells"], self._last["final_alive"]
        return self._action_mask(self._planes(cells, alive), cells, alive)

    # Stepping

    def _check_actions(self, actions: torch.Tensor) -> None:
        shape = (self.num_envs, self.num_agents)
        if not isinstance(actions, torch.Tensor) or tuple(actions.shape) != shape or actions.dtype != torch.int64:
            given = f"{list(actions.shape)} {actions.dtype}" if isinstance(actions, torch.Tensor) else type(actions)
            raise ValueError(f"expected actions {list(shape)} torch.int64, got {given}; convert or reshape them")
        if actions.device.type != self.device.type:
            raise ValueError(f"expected actions on {self.device}, got {actions.device}; move them there")

    def step(self, actions: torch.Tensor) -> EnvStep:
        """Steps all envs: everyone moves at once, then hunts. actions [N, A] int64 -> EnvStep

        Raises ValueError for a wrong shape, dtype or device and, on the CPU, for an action of an active player that
        is not 0 to 6; elsewhere the test would stall the device and such an action is executed as stay.
        """
        self._check_actions(actions)
        num_agents = self.num_agents
        players, prey = slice(num_agents), slice(num_agents + self.options["num_blocks"], None)
        active = self._alive[:, players]  # [N, A]
        actions = torch.where(active, actions, STAY)
        in_range = (actions >= 0) & (actions < NUM_ACTIONS)
        if self._can_branch and not in_range.all():
            bad = actions[~in_range][0].item()
            raise ValueError(
                f"expected actions 0 to {NUM_ACTIONS - 1}, got {bad}; see ACTION_NAMES in envs/stag_hunt.py"
            )
        legal = in_range & self._mask.gather(2, actions.clamp(0, NUM_ACTIONS - 1)[..., None])[..., 0]
        actions = torch.where(legal, actions, STAY)

        cells = self._cells.clone()  # [N, K]
        cells[:, players] = self._next_cell[cells[:, players], actions]
        # A legal hunt is on a living prey of that kind, and hunters do not move.
        same_cell = cells[:, players, None] == cells[:, None, prey]  # [N, A, P]
        hunting = same_cell & (actions[..., None] == self._hunt_action)  # [N, A, P]
        hunters = hunting.sum(1)  # [N, P]
        caught = hunters >= self._hunters_needed  # [N, P]
        share = caught * self._prey_value / hunters.clamp(min=1)  # [N, P]
        rewards = (hunting * share[:, None]).sum(2)  # [N, A]
        left = rewards > 0  # [N, A]

        alive = self._alive.clone()  # [N, K]
        alive[:, players] &= ~left
        alive[:, prey] &= ~caught
        timesteps, returns = self._timesteps + 1, self._returns + rewards
        no_more = ~(alive[:, players].any(1) & alive[:, prey].any(1))  # [N], no player or no prey
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
        self._cells, self._alive, self._timesteps, self._returns = cells, alive, timesteps, returns
        self._start_anew(last["episode_over"])
        return self._make_step(last)

    def _start_anew(self, over: torch.Tensor) -> None:
        """Starts new episodes where over [N]. Never in place: `final_obs` may still be computed from the old ones."""
        if self._can_branch:  # draw no more than needed
            index = over.nonzero()[:, 0]
            if not len(index):
                return
            self._cells = self._cells.index_copy(0, index, self._draw_cells(len(index)))
        else:
            self._cells = torch.where(over[:, None], self._draw_cells(self.num_envs), self._cells)
        self._alive = self._alive | over[:, None]
        self._timesteps = self._timesteps * ~over
        self._returns = self._returns * ~over[:, None]

    # Saving, drawing

    def state_dict(self) -> dict[str, Any]:
        tensors = {"cells": self._cells, "alive": self._alive, "timesteps": self._timesteps, "returns": self._returns}
        return {
            "options": dict(self.options),
            **{name: tensor.clone() for name, tensor in tensors.items()},
            "last": {name: tensor.clone() for name, tensor in self._last.items()},
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
        self._timesteps, self._returns = (state_dict[name].to(self.device) for name in ("timesteps", "returns"))
        self._generator.set_state(generator)
        pool = state_dict["block_pool"]
        self._block_pool = None if pool is None else pool.to(self.device)
        return self._make_step({name: tensor.to(self.device) for name, tensor in state_dict["last"].items()})

    def render(self) -> np.ndarray:
        return render_grid(self._state[0].cpu().numpy())


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
            raise ValueError(f"expected render_mode None or 'rgb_array', got {render_mode!r}; use one of these")
        self.render_mode = render_mode
        self._env = StagHuntVecEnv(1, "cpu", random.SystemRandom().randrange(2**31), **options)
        self._state: np.ndarray | None = None
        self.agents: list[str] = []
        self.possible_agents = self._env.agents
        box = {"low": 0, "high": 1, "dtype": np.uint8}
        self.state_space = gym.spaces.Box(shape=self._env.state_shape, **box)
        self.observation_spaces = {a: gym.spaces.Box(shape=self._env.obs_shape, **box) for a in self.possible_agents}
        self.action_spaces = {a: gym.spaces.Discrete(NUM_ACTIONS) for a in self.possible_agents}

    def observation_space(self, agent: str) -> gym.Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> gym.Space:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        step = self._env.reset(seed)
        self._state = step.state[0].numpy()
        self.agents = list(self.possible_agents)
        mask = self._by_agent(step.action_mask.to(torch.int8))
        return self._by_agent(step.obs), {a: {"action_mask": mask[a]} for a in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        """Plays one step; actions of agents that are not in `agents` are ignored.

        ValueError for an agent without an action, an action that is not 0 to 6, and before the first reset. Like
        PettingZoo's own environments it returns empty dicts when the episode is over.
        """
        self.state()  # refuses before the first reset
        if not self.agents:
            return {}, {}, {}, {}, {}
        missing = [a for a in self.agents if a not in actions]
        if missing:
            raise ValueError(f"expected an action of every agent in env.agents, got none of {missing}; add them")
        joint = [int(actions[a]) if a in self.agents else STAY for a in self.possible_agents]
        step = self._env.step(torch.tensor([joint]))
        # The batch has begun the next episode where this one ended; PettingZoo wants to see the end.
        self._state = step.final_state[0].numpy()
        obs, rewards, terminations = map(self._by_agent, (step.final_obs, step.rewards, step.terminations))
        mask, executed = map(self._by_agent, (self._env.final_action_mask().to(torch.int8), step.executed_actions))
        truncated = step.truncations.item()
        rewards = {a: reward.item() for a, reward in rewards.items()}
        terminations = {a: flag.item() for a, flag in terminations.items()}
        truncations = {a: truncated and not flag for a, flag in terminations.items()}
        infos = {a: {"action_mask": mask[a], "executed_action": executed[a].item()} for a in self.agents}
        self.agents = [a for a in self.agents if not (terminations[a] or truncations[a])]
        return obs, rewards, terminations, truncations, infos

    def _by_agent(self, values: torch.Tensor) -> dict[str, np.ndarray]:
        """values [1, A, ...] -> {agent: [...]} for agents in the episode"""
        return {a: values[0, i].numpy() for i, a in enumerate(self.possible_agents) if a in self.agents}

    def state(self) -> np.ndarray:
        """The state [H, W, A+3] uint8, at the end of an episode the last one."""
        if self._state is None:
            raise ValueError("expected a reset first, got none yet; call env.reset()")
        return self._state

    def render(self) -> np.ndarray | None:
        return render_grid(self.state()) if self.render_mode == "rgb_array" else None


def parallel_env(preset: str = "stag_hunt", **options: Any) -> StagHuntParallelEnv:
    """A preset as a PettingZoo ParallelEnv. options: `render_mode` and what replaces values of the preset."""
    return StagHuntParallelEnv(**{**preset_options(preset), **options})


if hasattr(pettingzoo, "register"):  # from 1.27 on
    for preset in PRESETS:
        pettingzoo.register(
            "parallel", f"{preset}-v0", entry_point="envs.stag_hunt:parallel_env", kwargs={"preset": preset}
        )


# Scripted partners


def action_probs(policy_name: str, obs: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """The exact action distribution of a scripted player.

    policy_name: one of SCRIPTED. obs [..., H, W, A+3] of the whole map (`full_obs()` where the env has a `view`),
    action_mask [..., 7] bool -> [..., 7] float32. Ties are even: the best accuracy that anyone can have in
    predicting a script is the mean of the largest probability. ValueError for an unknown name.
    """
    if policy_name not in SCRIPTED:
        raise ValueError(f"expected a scripted policy, one of {', '.join(SCRIPTED)}, got '{policy_name}'; use one")
    stay = torch.zeros(NUM_ACTIONS, device=obs.device)
    stay[STAY] = 1
    if policy_name == "stay":
        return stay.expand(action_mask.shape).clone()
    if policy_name == "random":
        return action_mask / action_mask.sum(-1, keepdim=True)

    plane, hunt = (-2, HUNT_STAG) if policy_name == "nearest_stag" else (-1, HUNT_HARE)
    height, width = obs.shape[-3:-1]
    cells = torch.arange(height * width, dtype=torch.float32, device=obs.device)
    cell = (obs[..., 0].flatten(-2) * cells).sum(-1).long()  # [...], own cell; argmax takes several times longer
    target = obs[..., plane].flatten(-2).to(torch.int16)  # [..., HW]
    closeness = _closeness(height, width, obs.device)[cell]  # [..., 5, HW]
    nearest = (closeness * target[..., None, :]).amax(-1)  # [..., 5], 0 without a target
    moves = action_mask[..., :NUM_MOVES]
    shortens = moves & (nearest[..., :NUM_MOVES] > nearest[..., NUM_MOVES:])  # [..., 4]
    moves = torch.where(shortens.any(-1, keepdim=True), shortens, moves)  # [..., 4]
    probs = torch.zeros(action_mask.shape, device=obs.device)
    probs[..., :NUM_MOVES] = moves / moves.sum(-1, keepdim=True).clamp(min=1)
    probs[..., STAY] = ~moves.any(-1)
    probs = torch.where(nearest[..., NUM_MOVES:] > 0, probs, stay)
    return torch.where(action_mask[..., hunt, None], stay.roll(hunt - STAY), probs)


@functools.lru_cache(maxsize=8)
def _closeness(height: int, width: int, device: torch.device) -> torch.Tensor:
    """[HW, 5, HW] int16: height + width - Manhattan distance from each cell's 4 neighbours and itself to each cell."""
    rows, cols = torch.arange(height * width) // width, torch.arange(height * width) % width  # [HW]
    steps = torch.tensor([*MOVES, (0, 0)])  # [5, 2]
    from_row, from_col = rows[:, None, None] + steps[:, :1], cols[:, None, None] + steps[:, 1:]  # [HW, 5, 1]
    return (height + width - (from_row - rows).abs() - (from_col - cols).abs()).to(device, torch.int16)


def sample_actions(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One action from each distribution. probs [..., 7] -> [...] int64"""
    return torch.multinomial(probs.flatten(0, -2), 1, generator=generator).view(probs.shape[:-1])


# Drawing

CELL, OVERSAMPLE = 80, 4  # pixels a side in the picture; drawn larger and scaled down, for smooth edges
PLAYER_COLOURS = ("#d1495b", "#2e6fba", "#edae49", "#7b4fa6", "#00798c", "#e07a3f", "#c2649a", "#5a5a5a")


def render_grid(state: np.ndarray) -> np.ndarray:
    """Draws a state [H, W, A+3] (0/1 planes): players numbered, stags brown, hares pale, blocks stone.

    Returns uint8 [H * CELL, W * CELL, 3].
    """
    height, width, num_planes = state.shape
    num_agents, size = num_planes - 3, CELL * OVERSAMPLE
    image = Image.new("RGB", (width * size, height * size))
    draw = ImageDraw.Draw(image)
    for row, col in np.ndindex(height, width):
        x, y, here = col * size, row * size, state[row, col]
        ground = "#dfe8cc" if (row + col) % 2 else "#e8efd8"
        draw.rectangle((x, y, x + size - 1, y + size - 1), fill=ground)
        if here[num_agents]:
            _draw_block(draw, x, y, size)
        if here[num_agents + 1]:
            _draw_stag(draw, x, y, size)
        if here[num_agents + 2]:
            _draw_hare(draw, x, y, size)
        _draw_players(draw, x, y, size, np.flatnonzero(here[:num_agents]), prey=here[num_agents + 1 :].any())
    return np.asarray(image.reduce(OVERSAMPLE))


def _scaled(x: float, y: float, size: float, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x + u * size, y + v * size) for u, v in points]


def _draw_block(draw: ImageDraw.ImageDraw, x: float, y: float, size: float) -> None:
    draw.rounded_rectangle(_scaled(x, y, size, [(0.04, 0.04), (0.96, 0.96)]), size * 0.12, fill="#5d6670")
    draw.rounded_rectangle(_scaled(x, y, size, [(0.04, 0.04), (0.96, 0.86)]), size * 0.12, fill="#7a858f")
    for crack in ([(0.2, 0.3), (0.42, 0.42), (0.38, 0.62)], [(0.6, 0.2), (0.7, 0.36), (0.62, 0.5), (0.8, 0.66)]):
        draw.line(_scaled(x, y, size, crack), fill="#5d6670", width=round(size * 0.03), joint="curve")


def _draw_stag(draw: ImageDraw.ImageDraw, x: float, y: float, size: float) -> None:
    brown, dark, antler = "#8a5a34", "#4a2f1b", "#6b5436"
    for side in (-1, 1):

        def at(points: list[tuple[float, float]], side: int = side) -> list[tuple[float, float]]:
            return _scaled(x, y, size, [(0.5 + side * u, v) for u, v in points])

        for branch in (
            [(0.06, 0.42), (0.14, 0.3), (0.3, 0.24), (0.33, 0.08)],
            [(0.14, 0.3), (0.12, 0.1)],
            [(0.24, 0.26), (0.22, 0.1)],
        ):
            draw.line(at(branch), fill=antler, width=round(size * 0.045), joint="curve")
        draw.polygon(at([(0.1, 0.44), (0.28, 0.36), (0.16, 0.54)]), fill=brown)
    draw.polygon(
        _scaled(x, y, size, [(0.36, 0.4), (0.64, 0.4), (0.66, 0.54), (0.58, 0.8), (0.42, 0.8), (0.34, 0.54)]),
        fill=brown,
    )
    draw.ellipse(_scaled(x, y, size, [(0.41, 0.7), (0.59, 0.88)]), fill="#c9a27a")
    draw.ellipse(_scaled(x, y, size, [(0.455, 0.72), (0.545, 0.79)]), fill=dark)
    for eye in (0.42, 0.58):
        draw.ellipse(_scaled(x, y, size, [(eye - 0.03, 0.5), (eye + 0.03, 0.56)]), fill=dark)


def _draw_hare(draw: ImageDraw.ImageDraw, x: float, y: float, size: float) -> None:
    fur, edge, pink = "#fbf7ef", "#a39a8c", "#e8a7a7"
    line = round(size * 0.02)
    for ear in (0.42, 0.58):
        draw.ellipse(_scaled(x, y, size, [(ear - 0.07, 0.14), (ear + 0.07, 0.58)]), fill=fur, outline=edge, width=line)
        draw.ellipse(_scaled(x, y, size, [(ear - 0.03, 0.22), (ear + 0.03, 0.5)]), fill=pink)
    draw.ellipse(_scaled(x, y, size, [(0.3, 0.44), (0.7, 0.82)]), fill=fur, outline=edge, width=line)
    for eye in (0.42, 0.58):
        draw.ellipse(_scaled(x, y, size, [(eye - 0.028, 0.55), (eye + 0.028, 0.61)]), fill="#3b3530")
    draw.ellipse(_scaled(x, y, size, [(0.465, 0.65), (0.535, 0.7)]), fill=pink)


def _draw_players(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, players: np.ndarray, prey: bool) -> None:
    """Numbered discs side by side; small and in the corners where they would hide prey."""
    if not len(players):
        return
    side = max(math.ceil(math.sqrt(len(players))), 2 if prey else 1)
    radius = (0.36 if prey else 0.42) / max(side, 1.3)
    spread = 1.2 if prey else 1.0
    lift = 0 if prey else (1 - math.ceil(len(players) / side) / side) / 2  # to the middle of the cell
    font = ImageFont.load_default(radius * 1.2 * size)
    for slot, player in enumerate(players):
        u, v = (slot % side + 0.5) / side - 0.5, 0.5 - (slot // side + 0.5) / side - lift  # from the bottom up
        centre = (x + (0.5 + spread * u) * size, y + (0.5 + spread * v) * size)
        disc = _scaled(*centre, size, [(-radius, -radius), (radius, radius)])
        colour = PLAYER_COLOURS[player % len(PLAYER_COLOURS)]
        draw.ellipse(disc, fill=colour, outline="white", width=round(size * 0.025))
        draw.text(centre, str(player), fill="white", font=font, anchor="mm")
