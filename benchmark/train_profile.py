"""Where hyper_mappo.py's time goes: envs, acting, the update's forward and backward pass, the rest.

Wraps the parts of the training loop with timers and trains for some updates; prints each part's share. One thread
computes the gradients, so that forward and backward passes do not overlap.

    python benchmark/train_profile.py --hyper none delta          # 2 minutes on 2 cores
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from anywhere
import hyper_mappo
from runs import get_device


@dataclass
class Args:
    env_id: str = "pursuit"
    """env to train on"""
    hyper: tuple[str, ...] = ("none", "delta")
    """forms to look at"""
    updates: int = 6
    """updates, the first of which is not counted"""
    seed: int = 1
    """of envs and networks"""


def profile(hyper: str, args: Args) -> dict[str, float]:
    """Seconds of each part over all updates but the first."""
    seconds: dict[str, float] = defaultdict(float)
    running, num_updates = False, 0

    def timed(name: str, function: Callable) -> Callable:
        def call(*inputs, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            out = function(*inputs, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] += (time.perf_counter() - start) * running
            return out

        return call

    def make_timed_env(*inputs, **kwargs):
        env = hyper_mappo_parts["make_vec_env"](*inputs, **kwargs)
        env.step = timed("env step", env.step)
        return env

    def after_rollout(*inputs):
        nonlocal running, num_updates
        running, num_updates = num_updates > 0, num_updates + 1
        return hyper_mappo_parts["compute_gae"](*inputs)

    names = ("make_vec_env", "act", "ppo_loss", "compute_gae", "gradient_cosine")
    hyper_mappo_parts = {name: getattr(hyper_mappo, name) for name in names}
    backward, adam = torch.Tensor.backward, torch.optim.Adam.step
    try:
        hyper_mappo.make_vec_env = make_timed_env
        hyper_mappo.act = timed("acting (forward)", hyper_mappo.act)
        hyper_mappo.ppo_loss = timed("update: forward", hyper_mappo.ppo_loss)
        hyper_mappo.gradient_cosine = timed("gradient cosine", hyper_mappo.gradient_cosine)
        hyper_mappo.compute_gae = timed("GAE", after_rollout)
        torch.Tensor.backward = timed("update: backward", backward)
        torch.optim.Adam.step = timed("update: Adam", adam)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            fields = {"env_id": args.env_id, "hyper": hyper, "seed": args.seed, "update_threads": 1}
            flags = hyper_mappo.Args(**fields, runs_dir=folder, eval_episodes=0)
            resolved, _ = hyper_mappo.check_args(flags, get_device(flags.cuda))
            total_timesteps = args.updates * resolved.num_envs * resolved.num_steps
            start = time.perf_counter()
            hyper_mappo.main(replace(flags, total_timesteps=total_timesteps))
            seconds["all updates, start-up and the rest"] = time.perf_counter() - start
    finally:
        for name, function in hyper_mappo_parts.items():
            setattr(hyper_mappo, name, function)
        torch.Tensor.backward, torch.optim.Adam.step = backward, adam
    return seconds


def main(args: Args) -> None:
    for hyper in args.hyper:
        seconds = profile(hyper, args)
        whole = seconds.pop("all updates, start-up and the rest")
        parts = sum(seconds.values())
        print(f"--hyper {hyper}: {parts:.1f} s in the timed parts of {args.updates - 1} updates ({whole:.1f} s in all)")
        for name, x in sorted(seconds.items(), key=lambda item: -item[1]):
            print(f"  {name:20s} {x / parts:6.1%}")


if __name__ == "__main__":
    main(tyro.cli(Args))
