"""What learning costs: hyper_mappo.py end to end beside its environments stepping alone.

In one run, in turn, `rounds` times over: genuine pursuit through SuperSuit without learning, training on the same
(plain and hyper), the batched twin without learning, training on it (plain and hyper). Prints medians and ratios.

    python benchmark/train_speed.py          # 2 cores, 6 minutes
"""

from __future__ import annotations

import contextlib
import csv
import io
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from anywhere
import hyper_mappo
from benchmark.env_speed import batched_step, steps_per_second, supersuit_step
from envs import default_env_procs, make_vec_env


@dataclass
class Args:
    genuine_envs: int = 8
    """genuine envs, stepped in as many processes as there are cores"""
    batched_envs: int = 128
    """copies in the batched twin"""
    updates: int = 8
    """updates per measurement; the first is start-up and not counted"""
    rounds: int = 3
    """how often everything is measured; medians are reported"""
    seed: int = 1
    """of envs, networks and actions"""


def training_speed(hyper: str, backend: str, num_envs: int, args: Args) -> float:
    """Env-steps per second of hyper_mappo.py with its defaults: rollout, update and logging."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = hyper_mappo.Args(hyper=hyper, backend=backend, num_envs=num_envs, runs_dir=folder, seed=args.seed)
        flags.total_timesteps, flags.eval_episodes = args.updates * num_envs * flags.num_steps, 0
        run_dir = hyper_mappo.main(flags)
        with open(run_dir / "metrics.csv", newline="") as file:
            return float(list(csv.DictReader(file))[-1]["charts/SPS"])  # over all updates but the first


def main(args: Args) -> None:
    cpu = torch.device("cpu")
    procs = max(1, default_env_procs(args.genuine_envs))
    supersuit, close = supersuit_step("pursuit", args.genuine_envs, procs, args.seed)
    twin = batched_step(make_vec_env("pursuit", args.batched_envs, cpu, args.seed), args.seed)
    sides = {
        f"SuperSuit alone, {args.genuine_envs} envs in {procs} processes": lambda: steps_per_second(
            supersuit, args.genuine_envs, 10.0, cpu
        ),
        "training on it, --hyper none": lambda: training_speed("none", "pettingzoo", args.genuine_envs, args),
        "training on it, --hyper delta": lambda: training_speed("delta", "pettingzoo", args.genuine_envs, args),
        f"batched twin alone, {args.batched_envs} envs": lambda: steps_per_second(twin, args.batched_envs, 3.0, cpu),
        "training on the twin, --hyper none": lambda: training_speed("none", "batched", args.batched_envs, args),
        "training on the twin, --hyper delta": lambda: training_speed("delta", "batched", args.batched_envs, args),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, measure in sides.items():
            speeds[name].append(measure())
    close()
    base = speeds[next(iter(sides))]
    print(f"{'':46s} env-steps/s   ratio to SuperSuit alone (median of {args.rounds} rounds)")
    for name, values in speeds.items():
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        print(f"{name:46s} {statistics.median(values):11,.0f}   {ratio:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
