"""Milliseconds per decision of plan.py and where they go, by the clock and in CPU time, in a batch of envs.

    python benchmark/plan_speed.py --world-model runs/WM --opponents runs/CVAE --num-threads 2 --no-busy

Partners play `--partners`; their steps and the env's are not counted. Rows go to benchmark/results/plan_speed.csv.
"""

from __future__ import annotations

import csv
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plan  # noqa: E402
from benchmark.run import RESULTS, describe_machine  # noqa: E402
from envs import make_vec_env  # noqa: E402


@dataclass
class Args:
    world_model: str
    """run folder of world_model.py"""
    opponents: str
    """run folder of pretrain_vae.py"""
    env_id: str = "stag_hunt-4x4-4h1s"
    """environment"""
    partners: tuple[str, ...] = ("nearest_hare:3", "nearest_stag:3", "random:3")
    """each is measured by itself"""
    methods: tuple[str, ...] = ("rollout",)
    """methods of plan.py, each measured by itself"""
    num_envs: int = 64
    """decisions in one batch"""
    steps: int = 6
    """decisions of each env that are timed, after one that is not"""
    samples: int = plan.Args.samples
    """K of plan.py"""
    horizon: int = plan.Args.horizon
    """H of plan.py"""
    num_threads: int = 1
    """CPU threads of torch"""
    busy: bool = True
    """whether other programs shared the cores: noted beside what is measured"""
    out: Path = RESULTS / "plan_speed.csv"
    """where rows are appended"""


class Clock:
    """CPU and clock time spent inside functions."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    def watch(
        self,
        owner: Any,
        name: str,
        label: str,
    ) -> None:
        """Counts the time of a method from now on."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            return self.time(label, lambda: function(*args, **kwargs))

        setattr(owner, name, timed)

    def time(self, label: str, run: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = run()
        self.wall[label] = self.wall.get(label, 0.0) + time.perf_counter() - wall
        self.cpu[label] = self.cpu.get(label, 0.0) + time.process_time() - cpu
        return result


def measure(args: Args, method: str, partners: str) -> None:
    """Prints a line for the whole and one for each part."""
    fields = {"env_id": args.env_id, "world_model": args.world_model, "opponents": args.opponents}
    plan_args = plan.Args(**fields, method=method, partners=(partners,), cuda=False)
    plan_args = replace(plan_args, samples=args.samples, horizon=args.horizon)
    env = make_vec_env(args.env_id, args.num_envs, "cpu", 1, "batched")
    planner = plan.make_planner(plan_args, env, {}, (0,))
    table = plan.seat_partners(plan_args, env)
    clock = Clock()
    clock.watch(planner.world, "step", "world model")
    clock.watch(planner.eyes, "list_cells", "lists of cells")
    clock.watch(planner.world, "masks", "legal actions")
    clock.watch(planner.opponents, "logits", "model of other agents")
    clock.watch(planner, "own_logits", "base policies")
    if planner.strangers is not None:
        for name in ("counts", "probs"):
            clock.watch(planner.strangers, name, "strangers")
    torch.manual_seed(1)
    step, memory = env.reset(1), planner.initial_state(args.num_envs)
    for t in range(args.steps + 1):
        if t == 1:  # the first was for warming up
            clock.cpu, clock.wall = {}, {}
            planner.decisions = 0
        before = step
        decide = functools.partial(planner.act, before, memory)
        actions, memory = clock.time("all", decide)
        actions = table.play(step, actions)
        remember = functools.partial(planner.remember, before, actions, memory)
        memory = clock.time("all", remember)
        step = env.step(actions)
    print(f"{method}, {partners}: {planner.decisions} decisions")
    for label in clock.cpu:
        cpu = 1000 * clock.cpu[label] / planner.decisions
        wall = 1000 * clock.wall[label] / planner.decisions
        print(f"  {label:24}{cpu:10.2f} {wall:10.2f}")
        keep(args, method, partners, label, cpu, wall)


def keep(
    args: Args,
    method: str,
    partners: str,
    part: str,
    cpu: float,
    wall: float,
) -> None:
    """Appends a row."""
    row = {
        "env_id": args.env_id,
        "partners": partners,
        "method": method,
        "part": part,
        "cpu_ms": f"{cpu:.2f}",
        "clock_ms": f"{wall:.2f}",
        "num_envs": args.num_envs,
        "num_threads": args.num_threads,
        "cores": "shared" if args.busy else "quiet",
        "machine": describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    is_new = not args.out.is_file()
    with open(args.out, "a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(row))
        if is_new:
            table.writeheader()
        table.writerow(row)


def main(args: Args) -> None:
    torch.set_num_threads(args.num_threads)
    print(f"{args.num_threads} threads, {args.num_envs} envs, K {args.samples}, H {args.horizon}")
    print(f"  {'ms per decision':24}{'CPU':>10} {'clock':>10}")
    for method in args.methods:
        for partners in args.partners:
            measure(args, method, partners)


if __name__ == "__main__":
    main(tyro.cli(Args))
