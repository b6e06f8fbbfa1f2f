"""End-to-end training speed: hyper_mappo.py beside BenchMARL's MAPPO and, on pursuit, a CleanRL-style loop.

Env-steps per second of rollout, update and logging, the first update (start-up) left out. Sides in turn, each time in
a process of its own, `rounds` times over; medians. All have the same rollout size, epochs, minibatches and hidden
layers. Ours steps the batched twin of pursuit; the others, and `none-genuine` (our plain MAPPO), the genuine env in
processes. On VMAS ours and BenchMARL step the same batch of envs.

    python benchmark/train_speed.py --benchmarl-python benchmarl-venv/bin/python     # 2 cores, 20 minutes
    python benchmark/train_speed.py --sides none delta --rounds 5 --memory-sizes     # only these, no memory check
    python benchmark/train_speed.py --task balance --sides benchmarl none --memory-sizes \
        --benchmarl-python benchmarl-venv/bin/python
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

# Before torch is imported, for this program and all it starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from anywhere
import hyper_mappo
from benchmark import cleanrl_style
from benchmark.simulators import TASKS
from envs import make_vec_env
from runs import UsageError, command_line, flag, read_metrics

FORMS = ("none", *hyper_mappo.FORMS)
GENUINE = ("benchmarl", "cleanrl-style", "none-genuine")
CONTROL = ("actor-context",)  # --hyper none --actor-context
SHARED = ("update_epochs", "num_minibatches", "hidden_size", "seed")  # fields of all three programs
SIDES = (*GENUINE, *FORMS, *CONTROL)
Results = dict[str, list[dict]]  # of every side, a measurement per round


@dataclass
class Args:
    task: str = "pursuit"
    """pursuit, or a VMAS task of benchmark/simulators.py: balance, navigation, transport, discovery"""
    sides: tuple[str, ...] = SIDES
    """what to measure: peers, hyper forms, the control actor-context, none-genuine (plain, on the peers' envs)"""
    benchmarl_python: Path | None = None
    """interpreter of a virtual environment with benchmark/requirements-benchmarl.txt; None: that side is left out"""
    num_envs: int = 128
    """batched envs of our sides"""
    num_steps: int = 32
    """env steps of each of them per rollout; the peers' rollouts hold as many env steps in all"""
    peer_envs: int = 8
    """genuine envs of the other sides"""
    update_epochs: int = 4
    """passes over each rollout, all sides"""
    num_minibatches: int = 8
    """minibatches per epoch, all sides"""
    hidden_size: int = 128
    """width of the two hidden layers of actor and critic, all sides"""
    ours: str = "{}"
    """more hyper_mappo.Args for our sides, as JSON, e.g. '{"num_threads": 2}' or '{"cuda": false}'"""
    updates: int = 8
    """updates per measurement of our sides (at least 2); the first is start-up and not counted"""
    peer_updates: int = 3
    """the same for the sides on genuine envs"""
    rounds: int = 3
    """how often everything is measured"""
    memory_sizes: tuple[tuple[int, int], ...] = ((128, 32), (256, 32), (128, 64), (256, 64), (512, 64))
    """num_envs, num_steps of the memory check; no values: no check"""
    seed: int = 1
    """of envs, networks and actions"""


def peak_memory() -> float:
    """Most memory this process held so far, in bytes: of the GPU where it used one, else resident; nan: unknown."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")  # (getrusage would inherit the parent's peak)
    if not status.exists():
        return math.nan
    kilobytes = re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]
    return 1024.0 * int(kilobytes)


def train(side: str, fields: dict) -> dict:
    """One measurement, in a process of its own: env-steps per second, weights, peak memory."""
    if side == "cleanrl-style":
        return cleanrl_style.train(cleanrl_style.Args(**fields)) | {"peak": peak_memory()}
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        run_dir = hyper_mappo.main(hyper_mappo.Args(**fields, runs_dir=folder, eval_episodes=0))
        last_row = read_metrics(run_dir)[-1]
    sps = float(last_row["charts/SPS"])  # over the last (up to 10) updates, not the first
    weights = next(line for line in printed.getvalue().splitlines() if line.startswith("weights"))
    return {"sps": sps, "weights": weights.removeprefix("weights").strip(), "peak": peak_memory()}


def in_new_process(side: str, fields: dict) -> dict:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(train, side, fields).result()


def train_benchmarl(python: Path | None, fields: dict) -> dict:
    flags = [f"{flag(name)}={value}" for name, value in fields.items()]
    script = Path(__file__).with_name("benchmarl_mappo.py")
    done = subprocess.run([str(python), str(script), *flags], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def on_vmas(args: Args) -> bool:
    return args.task != "pursuit"


def our_fields(side: str, args: Args, num_envs: int, num_steps: int, updates: int) -> dict:
    """The hyper_mappo.Args of one of our sides."""
    fields = {name: getattr(args, name) for name in SHARED}
    fields["env_id"] = "pursuit"
    if on_vmas(args):
        fields["env_id"] = TASKS[args.task].env_id
    fields["backend"] = "pettingzoo" if side in GENUINE else "batched"
    fields["num_envs"] = num_envs
    fields["num_steps"] = num_steps
    fields["total_timesteps"] = updates * num_envs * num_steps
    fields["hyper"] = side if side in FORMS else "none"
    fields["actor_context"] = side == "actor-context"
    return fields | json.loads(args.ours)


def measure(side: str, args: Args) -> dict:
    if side not in GENUINE:
        return in_new_process(side, our_fields(side, args, args.num_envs, args.num_steps, args.updates))
    fields = {name: getattr(args, name) for name in SHARED}
    fields["updates"] = args.peer_updates
    if on_vmas(args):  # side is BenchMARL: its batch is ours
        fields |= {"num_envs": args.num_envs, "num_steps": args.num_steps}
        fields["task"] = TASKS[args.task].theirs
        return train_benchmarl(args.benchmarl_python, fields)
    num_steps = args.num_envs * args.num_steps // args.peer_envs
    if side == "none-genuine":
        return in_new_process(side, our_fields(side, args, args.peer_envs, num_steps, args.peer_updates))
    fields |= {"num_envs": args.peer_envs, "num_steps": num_steps}
    if side == "benchmarl":
        return train_benchmarl(args.benchmarl_python, fields)
    return in_new_process(side, fields | {"num_cpus": os.cpu_count()})


def multiplications(side: str, args: Args) -> float:
    """Multiply-adds per agent sample as hyper_mappo.py counts them; nan: on the genuine env, or not counted."""
    if side in GENUINE:
        return math.nan
    fields = our_fields(side, args, 1, 1, 1)
    spec = hyper_mappo.env_spec(make_vec_env(fields["env_id"], 2, torch.device("cpu"), args.seed, "batched"))
    return hyper_mappo.count_multiplications(spec, hyper_mappo.Args(**fields))


def speed_ratio(results: Results, above: str, below: str) -> float:
    """Median over rounds of the ratio of speeds within a round; nan: one of the sides was not measured."""
    ratios = []
    for fast, slow in zip(results.get(above, []), results.get(below, []), strict=False):
        ratios.append(fast["sps"] / slow["sps"])
    return statistics.median(ratios) if ratios else math.nan


def print_table(results: Results, args: Args) -> None:
    print(f"\nmedians of {args.rounds} rounds; time, counted multiplications: beside `none`; memory: no env processes")
    titles = ("x BenchMARL", "x CleanRL-style", "time", "counted", "time/counted", "peak MB", "weights")
    head = "".join(f"{title:>{len(title) + 2}}" for title in titles)
    print(f"{'':15}{'env-steps/s':>12}{'':22}{head}")
    counted_of_none = multiplications("none", args)
    for side, runs in results.items():
        time = speed_ratio(results, "none", side)
        counted = multiplications(side, args) / counted_of_none
        ratios = (
            speed_ratio(results, side, "benchmarl"),
            speed_ratio(results, side, "cleanrl-style"),
            time,
            counted,
            time / counted,
        )
        texts = ["-" if math.isnan(x) else f"{x:,.2f}" for x in ratios]
        texts.append(f"{max(run['peak'] for run in runs) / 1e6:,.0f}")
        cells = ""
        for text, title in zip(texts, titles, strict=False):  # (weights stand at the end)
            cells += f"{text:>{len(title) + 2}}"
        speeds = sorted(run["sps"] for run in runs)
        spread = f" ({speeds[0]:,.0f} ... {speeds[-1]:,.0f})"
        print(f"{side:15}{statistics.median(speeds):12,.0f}{spread:22}{cells}  {runs[0]['weights']}")


def check_memory(side: str, args: Args) -> None:
    """Peak memory at several sizes, and the straight line through it: base + bytes x num_envs x num_steps."""
    peaks, samples = [], []
    for num_envs, num_steps in args.memory_sizes:
        fields = our_fields(side, args, num_envs, num_steps, updates=2)
        peaks.append(in_new_process(side, fields)["peak"])
        samples.append(num_envs * num_steps)
    slope, base = statistics.linear_regression(samples, peaks)
    print(f"\npeak memory of {side} at num_envs x num_steps, MB: measured, on a straight line")
    error = 0.0
    for (num_envs, num_steps), peak, x in zip(args.memory_sizes, peaks, samples, strict=True):
        fitted = base + slope * x
        error = max(error, abs(peak - fitted))
        print(f"{num_envs:8d} x {num_steps:<5d}{peak / 1e6:10,.0f}{fitted / 1e6:10,.0f}")
    print(f"{base / 1e6:,.0f} MB + {slope:,.0f} bytes per env step of the rollout ({slope / 8:,.0f} per agent sample);")
    print(f"largest distance from the line: {error / (max(peaks) - min(peaks)):.1%} of the growth")


def check_args(args: Args) -> None:
    unknown = [side for side in args.sides if side not in SIDES]
    if unknown:
        raise UsageError(f"unknown side {', '.join(unknown)}: choose from {', '.join(SIDES)}")
    tasks = ["pursuit", *(name for name, task in TASKS.items() if task.theirs.startswith("vmas:"))]
    if args.task not in tasks:
        raise UsageError(f"unknown task {args.task}: choose from {', '.join(tasks)}")
    if on_vmas(args) and {"cleanrl-style", "none-genuine"} & set(args.sides):
        raise UsageError("cleanrl-style and none-genuine are of pursuit: give --sides without them, as benchmarl none")
    if min(args.updates, args.peer_updates) < 2:
        raise UsageError("--updates and --peer-updates must be at least 2: the first update is not counted")


def main(args: Args) -> None:
    check_args(args)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{os.cpu_count()} cores, {gpu}, torch {torch.__version__}, seed {args.seed}")
    genuine = "" if on_vmas(args) else f", as many on {args.peer_envs} genuine envs"
    print(f"rollout  {args.num_envs} x {args.num_steps} env steps of {args.task}{genuine}")
    print(f"update   {args.update_epochs} epochs x {args.num_minibatches} minibatches; MLPs 2 x {args.hidden_size}")
    results: Results = {side: [] for side in args.sides}
    if args.benchmarl_python is None and results.pop("benchmarl", None) is not None:
        print("benchmarl left out: install benchmark/requirements-benchmarl.txt in a venv, give --benchmarl-python")
    for i in range(args.rounds):
        for side, runs in results.items():
            runs.append(measure(side, args))
            print(f"round {i + 1}  {side:15}{runs[-1]['sps']:12,.0f} env-steps/s", flush=True)
    print_table(results, args)
    for side in ("none", hyper_mappo.Args.hyper):
        if args.memory_sizes and side in results:
            check_memory(side, args)


if __name__ == "__main__":
    sys.exit(command_line(Args, main, {}))
