"""What the adapters to batched simulators share (vmas_vec.py, jaxmarl_vec.py): checked actions, returns, saved steps.

All agents stay until their episode is over. Where they differ, shorter observations end in zeros and the choices that
an agent does not have are masked out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from envs import EnvStep, VecEnv
from runs import UsageError


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """The known names that are like it, as the middle of a message; empty where none is."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(matches)}? " if matches else ""


def check_arguments(env_id: str, env_kwargs: dict[str, Any], valid: list[str]) -> None:
    """Raises UsageError for an argument that the env does not have, and for a time limit that is none."""
    for argument in env_kwargs:
        if argument not in valid:
            raise UsageError(f"{env_id} has no argument {argument!r}, only {', '.join(valid)}")
    max_steps = env_kwargs.get("max_steps", 1)
    if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
        raise UsageError(f"{env_id}: expected max_steps >= 1, got {max_steps!r}: change it")


class SimulatorVecEnv(VecEnv):
    """N envs of a simulator, whose agents are all active all the time.

    A subclass sets env_id, num_envs, device, agents, obs_shape and state_shape, and calls _set_choices or sets
    action_space. `last` [name -> tensor] is what its last step returned: obs, final_obs, rewards [N, A], terminated,
    truncated [N] and what _begin or _count add; state and final_state where they are more than all observations, mask
    [N, A, n] where it changes, success [N] where an episode can be won.
    """

    backend = "batched"
    action_mask: Tensor | None = None  # [N, A, n], where agents have unlike numbers of choices
    last: dict[str, Tensor]

    # --- actions

    def _set_choices(self, sizes: list[int]) -> None:
        """Discrete actions: how many each agent has."""
        self.action_sizes = sizes
        self.action_space = gym.spaces.Discrete(max(sizes))
        own = torch.tensor(sizes, device=self.device)
        self.last_action = own - 1  # [A]
        numbers = torch.arange(max(sizes), device=self.device)
        legal = numbers < own[:, None]  # [A, n]
        if not legal.all():
            self.action_mask = legal.repeat(self.num_envs, 1, 1)

    def _typed(self, actions: Tensor, dtype: torch.dtype) -> Tensor:
        """The actions on the env's device. Raises ValueError for a wrong shape or dtype."""
        shape = (self.num_envs, self.num_agents, *self.action_space.shape)
        if actions.shape != shape or actions.dtype != dtype:
            raise ValueError(
                f"expected actions {list(shape)} {dtype}, got {list(actions.shape)} {actions.dtype}: reshape or convert"
            )
        return actions.to(self.device)

    def _choices(self, actions: Tensor) -> Tensor:
        """Discrete actions [N, A] on the env's device. Raises ValueError for a wrong shape, dtype or number."""
        actions = self._typed(actions, torch.int64)
        wrong = (actions < 0) | (actions > self.last_action)  # [N, A]
        if wrong.any():
            n, a = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"expected an action of {self.agents[a]} in 0 ... {self.action_sizes[a] - 1}, "
                f"got {actions[n, a].item()} in env {n}: use action_mask"
            )
        return actions

    # --- what a step returns

    def _begin(self) -> dict[str, Tensor]:
        """What `last` holds beside observations before anything happened."""
        nowhere = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self.returns = torch.zeros(self.num_envs, self.num_agents, device=self.device)
        self.lengths = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        return {
            "rewards": self.returns,
            "terminated": nowhere,
            "truncated": nowhere,
            "episode_returns": self.returns,
            "episode_lengths": self.lengths,
        }

    def _count(self, rewards: Tensor, over: Tensor) -> dict[str, Tensor]:
        """rewards [N, A], over [N] -> returns and lengths of the episodes so far; those that are over start at 0."""
        returns = self.returns + rewards
        lengths = self.lengths + 1
        self.returns = returns.masked_fill(over[:, None], 0.0)
        self.lengths = lengths.masked_fill(over, 0)
        return {"episode_returns": returns, "episode_lengths": lengths}

    def _env_step(self, executed_actions: Tensor | None = None) -> EnvStep:
        last = self.last
        state, final_state = last.get("state"), last.get("final_state")
        if state is None:
            state, final_state = last["obs"].flatten(1), last["final_obs"].flatten(1)  # [N, A, O] -> [N, A * O]
        return EnvStep(
            obs=last["obs"],
            state=state,
            action_mask=last.get("mask", self.action_mask),
            active=torch.ones_like(last["rewards"], dtype=torch.bool),
            rewards=last["rewards"],
            terminations=last["terminated"][:, None].repeat(1, self.num_agents),
            truncations=last["truncated"],
            episode_over=last["terminated"] | last["truncated"],
            final_obs=last["final_obs"],
            final_state=final_state,
            episode_returns=last["episode_returns"],
            episode_lengths=last["episode_lengths"],
            executed_actions=executed_actions,
            success=last.get("success"),
        )

    # --- saving

    def _saved_step(self) -> dict[str, Any]:
        """Which envs these are, and what the last step returned."""
        return {
            "env_id": self.env_id,
            "num_envs": self.num_envs,
            "last": {name: tensor.clone() for name, tensor in self.last.items()},
            "returns": self.returns,
            "lengths": self.lengths,
        }

    def _check_saved(self, state_dict: dict[str, Any]) -> None:
        for name in ("env_id", "num_envs"):
            ours, theirs = getattr(self, name), state_dict[name]
            if ours != theirs:
                raise ValueError(f"expected a state with {name}={ours}, got {theirs}; make the env with that value")

    def _restore_step(self, state_dict: dict[str, Any]) -> EnvStep:
        self.last = {name: tensor.to(self.device) for name, tensor in state_dict["last"].items()}
        self.returns = state_dict["returns"].to(self.device)
        self.lengths = state_dict["lengths"].to(self.device)
        return self._env_step()
