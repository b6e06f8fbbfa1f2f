"""Markov Stag Hunt: thousands of copies as one batch of tensors, a PettingZoo view of it, and scripted partners.

The game is from Huang et al., "Efficient Adaptation in Mixed-Motive Environments via Hierarchical Opponent
Modeling and Planning", ICML 2024, arXiv 2406.08002. docs/stag_hunt.md has the rules and how to use this file.

    env = StagHuntVecEnv(4096, "cpu", 1, **preset_options("stag_hunt-8x8-4h1s"))
    env = parallel_env("stag_hunt-8x8-4h1s", render_mode="rgb_array")

Shapes: N envs, A players, I prey (stags, then hares). Maps, moves and observations are those of envs/grid_game.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs import ObsSpec, grid_game
from envs.grid_game import MOVE_NAMES, SIZE, STAY, USE, Cell, GridParallelEnv, GridVecEnv, always, points_of, uniform
from envs.grid_game import ego_order as ego_order
from envs.grid_game import sample_actions as sample_actions

ENV_ID = r"stag_hunt(-\d+x\d+-\d+h\d+s)?"  # the ids of this game
PREY = ("stag", "hare")
ACTION_NAMES = (*MOVE_NAMES, "hunt stag", "hunt hare")
NUM_ACTIONS = len(ACTION_NAMES)
HUNT_STAG, HUNT_HARE = USE, USE + 1
STAG_HUNTERS = 2  # it takes to catch a stag
STAG_VALUE, HARE_VALUE = 10.0, 1.0
SCRIPTED = ("random", "nearest_stag", "nearest_hare", "stay", "waits_at_stag")


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


def preset_options(name: str) -> dict[str, int]:
    """The constructor arguments of a preset; UsageError for an unknown name."""
    return grid_game.options_of(name, PRESETS, "stag hunt")


def describe_obs(num_agents: int, env_kwargs: dict[str, Any]) -> ObsSpec:
    """What the channels of a player's observation mean; the state has the same channels, with players as they sit."""
    return grid_game.describe_obs(PREY, (STAG_HUNTERS, 1), num_agents, env_kwargs)


class StagHuntVecEnv(GridVecEnv):
    """N Markov Stag Hunts as one batch: prey is caught by enough hunters in the same step, who share it and leave.

    height, width, num_players, num_stags, num_hares, num_blocks: what is on the map; blocks are cells that
    nobody enters. max_cycles: steps until truncation. view: side of the window that each player sees, odd;
    None for the whole map. Raises UsageError for arguments that make no game.
    """

    items = PREY
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
        num_stags: int = 1,
        num_hares: int = 4,
        num_blocks: int = 0,
        max_cycles: int = 35,
        view: int | None = None,
    ):
        options = {
            "height": height,
            "width": width,
            "num_players": num_players,
            "num_stags": num_stags,
            "num_hares": num_hares,
            "num_blocks": num_blocks,
            "max_cycles": max_cycles,
            "view": view,
        }
        super().__init__(num_envs, device, seed, options)
        self.env_id = f"stag_hunt-{height}x{width}-{num_hares}h{num_stags}s"
        self._hunters_needed = self._per_item((STAG_HUNTERS, 1))
        self._prey_value = self._per_item((STAG_VALUE, HARE_VALUE))

    def _use_items(self, using: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hunting [N, A, I] -> rewards [N, A], left [N, A], caught [N, I]"""
        hunters = using.sum(1)  # [N, I]
        caught = hunters >= self._hunters_needed
        share = caught * self._prey_value / hunters.clamp(min=1)
        rewards = (using * share[:, None]).sum(2)
        return rewards, rewards > 0, caught

    @staticmethod
    def picture(state: np.ndarray) -> np.ndarray:
        return render_grid(state)


class StagHuntParallelEnv(GridParallelEnv):
    """One Markov Stag Hunt as a PettingZoo ParallelEnv."""

    metadata = {"name": "stag_hunt_v0", "render_modes": ["rgb_array"], "render_fps": 4}
    batch = StagHuntVecEnv


def parallel_env(preset: str = "stag_hunt", **options: Any) -> StagHuntParallelEnv:
    """A preset as a PettingZoo ParallelEnv. options: `render_mode` and what replaces values of the preset."""
    all_options = {**preset_options(preset), **options}
    return StagHuntParallelEnv(**all_options)


grid_game.register_presets(__name__, PRESETS)


# Scripted partners


def action_probs(policy_name: str, obs: Tensor, action_mask: Tensor) -> Tensor:
    """The exact action distribution of a scripted player.

    policy_name: one of SCRIPTED. obs [..., H, W, A+3] of the whole map (`full_obs()` where the env has a `view`),
    action_mask [..., 7] bool -> [..., 7] float32. Ties are even: the best accuracy that anyone can have in
    predicting a script is the mean of the largest probability. UsageError for an unknown name.
    """
    grid_game.check_script(policy_name, SCRIPTED)
    if policy_name == "random":
        return uniform(action_mask)
    if policy_name == "stay":
        return always(STAY, action_mask)
    if policy_name == "nearest_stag":
        return grid_game.use_nearest(obs, action_mask, plane=-2, use=HUNT_STAG)
    if policy_name == "waits_at_stag":  # looks like nearest_stag, until the stag should be caught
        probs = grid_game.use_nearest(obs, action_mask, plane=-2, use=HUNT_STAG)
        probs[..., STAY] += probs[..., HUNT_STAG]
        probs[..., HUNT_STAG] = 0.0
        return probs
    return grid_game.use_nearest(obs, action_mask, plane=-1, use=HUNT_HARE)


# Drawing


def render_grid(state: np.ndarray) -> np.ndarray:
    """Draws a state [H, W, A+3] (0/1 planes): players numbered, stags brown, hares pale, blocks stone.

    Returns uint8 [H * CELL, W * CELL, 3].
    """
    return grid_game.render_grid(state, (_draw_stag, _draw_hare))


def _draw_stag(cell: Cell) -> None:
    brown, dark, pale, antler = "#8a5a34", "#4a2f1b", "#c9a27a", "#6b5436"
    for side in (-1, 1):
        for branch in (
            "0.06,0.42 0.14,0.3 0.3,0.24 0.33,0.08",
            "0.14,0.3 0.12,0.1",
            "0.24,0.26 0.22,0.1",
        ):
            cell.line(points_of(branch, side), fill=antler, width=0.045)
        ear = points_of("0.1,0.44 0.28,0.36 0.16,0.54", side)
        cell.polygon(ear, fill=brown)
    head = points_of("0.36,0.4 0.64,0.4 0.66,0.54 0.58,0.8 0.42,0.8 0.34,0.54")
    cell.polygon(head, fill=brown)
    cell.ellipse(0.41, 0.7, 0.59, 0.88, fill=pale)
    cell.ellipse(0.455, 0.72, 0.545, 0.79, fill=dark)
    for eye in (0.42, 0.58):
        cell.ellipse(eye - 0.03, 0.5, eye + 0.03, 0.56, fill=dark)


def _draw_hare(cell: Cell) -> None:
    dark, pink = "#3b3530", "#e8a7a7"
    fur = {"fill": "#fbf7ef", "outline": "#a39a8c", "width": round(SIZE * 0.02)}
    for ear in (0.42, 0.58):
        cell.ellipse(ear - 0.07, 0.14, ear + 0.07, 0.58, **fur)
        cell.ellipse(ear - 0.03, 0.22, ear + 0.03, 0.5, fill=pink)
    cell.ellipse(0.3, 0.44, 0.7, 0.82, **fur)
    for eye in (0.42, 0.58):
        cell.ellipse(eye - 0.028, 0.55, eye + 0.028, 0.61, fill=dark)
    cell.ellipse(0.465, 0.65, 0.535, 0.7, fill=pink)
