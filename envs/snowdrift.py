"""Markov Snowdrift: thousands of copies as one batch of tensors, a PettingZoo view of it, and scripted partners.

The game is from Huang et al., "Efficient Adaptation in Mixed-Motive Environments via Hierarchical Opponent
Modeling and Planning", ICML 2024, arXiv 2406.08002. docs/snowdrift.md has the rules and how to use this file.

    env = SnowdriftVecEnv(4096, "cpu", 1, **preset_options("snowdrift-4x4-6d"))
    env = parallel_env("snowdrift-4x4-6d", render_mode="rgb_array")

Shapes: N envs, A players, I drifts. Maps, moves and observations are those of envs/grid_game.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs import ObsSpec, grid_game
from envs.grid_game import MOVE_NAMES, SIZE, STAY, USE, Cell, GridParallelEnv, GridVecEnv, always, points_of, uniform

ENV_ID = r"snowdrift(-\d+x\d+-\d+d)?"  # the ids of this game
ITEMS = ("drift",)
ACTION_NAMES = (*MOVE_NAMES, "clear")
NUM_ACTIONS = len(ACTION_NAMES)
CLEAR = USE
DRIFT_VALUE = 6.0  # to every player
CLEARING_COST = 4.0  # to those who clear it, together
SCRIPTED = ("random", "nearest_drift", "never_clears", "stay")


def _six_drifts(side: int, max_cycles: int) -> dict[str, int]:
    """The constructor arguments of a square map with four players and six drifts."""
    return {
        "height": side,
        "width": side,
        "num_players": 4,
        "num_drifts": 6,
        "max_cycles": max_cycles,
    }


PRESETS = {
    "snowdrift-4x4-6d": _six_drifts(side=4, max_cycles=15),
    "snowdrift-6x6-6d": _six_drifts(side=6, max_cycles=25),
}
PRESETS["snowdrift"] = PRESETS["snowdrift-4x4-6d"]


def preset_options(name: str) -> dict[str, int]:
    """The constructor arguments of a preset; UsageError for an unknown name."""
    return grid_game.options_of(name, PRESETS, "snowdrift")


def describe_obs(num_agents: int, env_kwargs: dict[str, Any]) -> ObsSpec:
    """What the channels of a player's observation mean; the state has the same channels, with players as they sit."""
    return grid_game.describe_obs(ITEMS, (1,), num_agents, env_kwargs)


class SnowdriftVecEnv(GridVecEnv):
    """N Markov Snowdrifts as one batch: a cleared drift pays every player, its clearers share the cost; nobody leaves.

    height, width, num_players, num_drifts, num_blocks: what is on the map; blocks are cells that nobody enters.
    max_cycles: steps until truncation. view: side of the window that each player sees, odd; None for the whole map.
    Raises UsageError for arguments that make no game.
    """

    items = ITEMS
    action_names = ACTION_NAMES

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str,
        seed: int,
        *,
        height: int = 4,
        width: int = 4,
        num_players: int = 4,
        num_drifts: int = 6,
        num_blocks: int = 0,
        max_cycles: int = 15,
        view: int | None = None,
    ):
        options = {
            "height": height,
            "width": width,
            "num_players": num_players,
            "num_drifts": num_drifts,
            "num_blocks": num_blocks,
            "max_cycles": max_cycles,
            "view": view,
        }
        super().__init__(num_envs, device, seed, options)
        self.env_id = f"snowdrift-{height}x{width}-{num_drifts}d"

    def _use_items(self, using: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """clearing [N, A, I] -> rewards [N, A], left [N, A], cleared [N, I]"""
        clearers = using.sum(1)  # [N, I]
        cleared = clearers > 0
        pay = DRIFT_VALUE * cleared.sum(1, keepdim=True)  # [N, 1]
        cost_share = CLEARING_COST / clearers.clamp(min=1)  # [N, I]
        costs = (using * cost_share[:, None]).sum(2)  # [N, A]
        nobody = torch.zeros_like(costs, dtype=torch.bool)
        return pay - costs, nobody, cleared

    @staticmethod
    def picture(state: np.ndarray) -> np.ndarray:
        return render_grid(state)


class SnowdriftParallelEnv(GridParallelEnv):
    """One Markov Snowdrift as a PettingZoo ParallelEnv."""

    metadata = {"name": "snowdrift_v0", "render_modes": ["rgb_array"], "render_fps": 4}
    batch = SnowdriftVecEnv


def parallel_env(preset: str = "snowdrift", **options: Any) -> SnowdriftParallelEnv:
    """A preset as a PettingZoo ParallelEnv. options: `render_mode` and what replaces values of the preset."""
    all_options = {**preset_options(preset), **options}
    return SnowdriftParallelEnv(**all_options)


grid_game.register_presets(__name__, PRESETS)


# Scripted partners


def action_probs(policy_name: str, obs: Tensor, action_mask: Tensor) -> Tensor:
    """The exact action distribution of a scripted player.

    policy_name: one of SCRIPTED. obs [..., H, W, A+2] of the whole map (`full_obs()` where the env has a `view`),
    action_mask [..., 6] bool -> [..., 6] float32. UsageError for an unknown name.
    """
    grid_game.check_script(policy_name, SCRIPTED)
    if policy_name == "random":
        return uniform(action_mask)
    if policy_name == "stay":
        return always(STAY, action_mask)
    if policy_name == "never_clears":
        choices = action_mask.clone()
        choices[..., CLEAR] = False
        return uniform(choices)
    return grid_game.use_nearest(obs, action_mask, plane=-1, use=CLEAR)


# Drawing


def render_grid(state: np.ndarray) -> np.ndarray:
    """Draws a state [H, W, A+2] (0/1 planes): players numbered, drifts white, blocks stone.

    Returns uint8 [H * CELL, W * CELL, 3].
    """
    return grid_game.render_grid(state, (_draw_drift,))


def _draw_drift(cell: Cell) -> None:
    snow, shade, edge = "#fdfeff", "#c9dcea", "#8fb0c8"
    outline = {"outline": edge, "width": round(SIZE * 0.02)}
    cell.ellipse(0.1, 0.5, 0.62, 0.9, fill=snow, **outline)
    cell.ellipse(0.4, 0.44, 0.92, 0.9, fill=snow, **outline)
    cell.ellipse(0.26, 0.24, 0.76, 0.78, fill=snow, **outline)
    cell.slab(0.14, 0.62, 0.88, 0.88, fill=snow)
    cell.ellipse(0.34, 0.76, 0.68, 0.86, fill=shade)
    for crack in ("0.4,0.42 0.48,0.34 0.6,0.36", "0.2,0.7 0.28,0.62", "0.7,0.58 0.8,0.62"):
        cell.line(points_of(crack), fill=shade, width=0.03)
