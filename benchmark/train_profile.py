"""Where hyper_mappo.py's time goes: envs, acting, the update's forward and backward pass, the rest.

Wraps the parts of the training loop with timers and trains for some updates; prints each part's share. One thread
computes the gradients, so that forward and backward passes do not overlap.

    python benchmark/train_profile.py --hyper none delta          # a minute on 2 cores
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
from unittest import mock

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from anywhere
import hyper_mappo
from runs import Metrics, get_device

TIMED = (  # where it is looked up, name, part
    (hyper_mappo, "act", "acting (forward)"),
    (hyper_mappo, "ppo_loss", "update: forward"),
    (hyper_mappo, "gradient_cosine", "gradient cosine"),
    (torch.Tensor, "backward", "update: backward"),
    (torch.optim.Adam, "step", "update: Adam"),
    (hyper_mappo, "refuse_non_finite", "check of numbers"),
    (Metrics, "log", "metrics"),
    (Metrics, "sync", "metrics"),
    (hyper_mappo, "save_checkpoint", "checkpoints"),
)


@dataclass
class Args:
    env_id: str = "pursuit"
    """env to train on"""
    hyper: tuple[str, ...] = ("none", "delta")
    """forms to look at"""
    updates: int = 11
    """updates, the first of which is not counted"""
    update_epochs: int | None = None
    """passes over each rollout; None: hyper_mappo.py's"""
    num_minibatches: int | None = None
    """minibatches per pass; None: hyper_mappo.py's"""
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
        env = make_vec_env(*inputs, **kwargs)
        env.step = timed("env step", env.step)
        return env

    def after_rollout(*inputs):
        nonlocal running, num_updates
        running, num_updates = num_updates > 0, num_updates + 1
        return compute_gae(*inputs)

    make_vec_env, compute_gae = hyper_mappo.make_vec_env, hyper_mappo.compute_gae
    with contextlib.ExitStack() as patches, tempfile.TemporaryDirectory() as folder:
        patches.enter_context(contextlib.redirect_stdout(io.StringIO()))
        patches.enter_context(mock.patch.object(hyper_mappo, "make_vec_env", make_timed_env))
        patches.enter_context(mock.patch.object(hyper_mappo, "compute_gae", timed("GAE", after_rollout)))
        for owner, name, part in TIMED:
            function = timed(part, getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, function))
        flags = hyper_mappo.Args(
            env_id=args.env_id,
            hyper=hyper,
            seed=args.seed,
            update_epochs=args.update_epochs,
            num_minibatches=args.num_minibatches,
            update_threads=1,
            runs_dir=folder,
            eval_episodes=0,
        )
        resolved, _ = hyper_mappo.check_args(flags, get_device(flags.cuda))
        total_timesteps = args.updates * resolved.num_envs * resolved.num_steps
        start = time.perf_counter()
        hyper_mappo.main(replace(flags, total_timesteps=total_timesteps))
        seconds["all updates, start-up and the rest"] = time.perf_counter() - start
    return seconds


def main(args: Args) -> None:
    for hyper in args.hyper:
        seconds = profile(hyper, args)
        whole = seconds.pop("all updates, start-up and the rest")
        parts = sum(seconds.values())
        print(f"--hyper {hyper}: {parts:.1f} s in the timed parts of {args.updates - 1} updates ({whole:.1f} s in all)")
        for name, x in sorted(seconds.items(), key=lambda item: -item[1]):
            print(f"  {name:20s} {x / parts:7.2%}")


if __name__ == "__main__":
    main(tyro.cli(Args))
