"""What it costs to check everything that a genuine env returns: the same env stepped with and without the checks.

    python benchmark/env_checks.py

In turn and several times over, in CPU time, so that a noisy machine matters little.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import VecEnv, make_vec_env, pettingzoo_vec, spaces  # noqa: E402


@dataclass
class Args:
    env_id: str = "pursuit"
    """a genuine env with discrete actions and no masks"""
    num_envs: int = 4
    """stepped in this process"""
    num_steps: int = 50
    """steps in one round"""
    rounds: int = 15
    """rounds of each kind"""
    seed: int = 1
    """of the envs and of the random actions"""


def unchecked_array(space: Any, value: Any) -> np.ndarray:
    return np.array(value, space.dtype)


def unchecked_state(env: pettingzoo_vec._SubEnv, truncated: bool) -> np.ndarray | None:
    return None if env.spec.state_shape is None else np.array(env.env.state())


UNCHECKED = [
    (spaces, "fitting_array", unchecked_array),
    (pettingzoo_vec._SubEnv, "_state", unchecked_state),
    (pettingzoo_vec._SubEnv, "_reward", lambda env, agent, rewards: rewards.get(agent, 0.0)),
    (pettingzoo_vec._SubEnv, "_flag", lambda env, agent, field, flags: bool(flags.get(agent))),
    (pettingzoo_vec._SubEnv, "_dicts", lambda env, name, number, call: call()),
    (pettingzoo_vec._SubEnv, "_present", lambda env: set(env.env.agents)),
    (pettingzoo_vec._SubEnv, "_action_mask", lambda env, obs, infos: None),
]


def cpu_time(env: VecEnv, actions: list[torch.Tensor]) -> float:
    """Seconds for one env step."""
    start = time.process_time()
    for joint in actions:
        env.step(joint)
    return (time.process_time() - start) / len(actions) / env.num_envs


def main(args: Args) -> None:
    torch.set_num_threads(1)
    env = make_vec_env(args.env_id, args.num_envs, "cpu", args.seed, backend="pettingzoo")
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.num_steps, args.num_envs, env.num_agents)
    actions = list(torch.randint(int(env.action_space.n), shape, generator=generator))
    cpu_time(env, actions)
    checked, unchecked = [], []
    for _ in range(args.rounds):
        env.reset(args.seed)  # the same steps in every round
        checked.append(cpu_time(env, actions))
        env.reset(args.seed)
        patches = [mock.patch.object(*patch) for patch in UNCHECKED]
        for patch in patches:
            patch.start()
        unchecked.append(cpu_time(env, actions))
        for patch in patches:
            patch.stop()
    for name, times in (("checked", checked), ("unchecked", unchecked)):
        print(
            f"{name:10} {1e6 * statistics.median(times):8.0f} us of CPU time an env step, least {1e6 * min(times):.0f}"
        )
    for name, which in (("medians", statistics.median), ("least", min)):
        print(f"{name:10} {100 * (which(checked) / which(unchecked) - 1):+8.1f} %")


if __name__ == "__main__":
    main(tyro.cli(Args))
