"""Comparisons on VMAS and JaxMARL: suites for benchmark/run.py and benchmark/plot.py, and BenchMARL's side of one.

    python benchmark/simulators.py run simulators-dispersion --jobs 1
    python benchmark/simulators.py plot simulators-dispersion --baseline "shared, id"
    python benchmark/simulators.py benchmarl --benchmarl-python benchmarl-venv/bin/python    # joins the next ones
    python benchmark/simulators.py curves simulators-benchmarl-balance simulators-benchmarl-transport

`run` and `plot` take what those two scripts take; `curves` shows what the runs were paid while they trained.
Rows: benchmark/results/SUITE.csv.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import plot, run
from runs import UsageError, command_line

# Where agents must specialise. All know who they are, and all have the same critic.
SPECIALISE = {
    "shared, id": "--hyper none --agent-id",
    "own actors": "--hyper none --agent-id --no-share-parameters",
    "full by id": "--hyper full --agent-id --hyper-context agent-id --context-size 4 --hyper-basis 4",
    "delta by id": "--hyper delta --agent-id --hyper-context agent-id",
    "last-layer by id": "--hyper last-layer --agent-id --hyper-context agent-id",
    "delta by all": "--hyper delta --agent-id",
    "full deltas by all": (
        "--hyper delta --hyper-rank 0 --agent-id --hyper-context joint --context-size 8 --hyper-basis 8"
    ),
}
for member in ("shared, id", "own actors", "full by id", "delta by all"):
    SPECIALISE[f"{member}, normalised"] = f"{SPECIALISE[member]} --norm-obs"
BATCH = "--num-envs 256 --num-steps 32 --eval-episodes 256 --ent-coef 0.005"
# Food of VMAS's own radius, 0.05, is found too seldom for anything to be learnt in so few env steps.
DISPERSION = "vmas:dispersion?food_radius=0.15"
# Everyone sees where all eight goals lie, but not which is its own: that hangs on who it is.
NAVIGATION = "vmas:navigation?n_agents=8&observe_all_goals=true&collisions=false&shared_rew=false"
BENCHMARL = "BenchMARL"
# As many gradient steps as the other side; the last has a quarter of them.
OURS = {
    "ours": "--update-epochs 4",
    "ours, normalised": "--update-epochs 4 --norm-obs",
    "ours, normalised, 1 epoch": "--update-epochs 1 --norm-obs",
}


@dataclass(frozen=True)
class Task:
    """An env of the comparison with BenchMARL, and the rollouts that both sides have."""

    theirs: str  # what BenchMARL's side calls it
    arguments: str = ""  # BenchMARL's own of the scenario
    num_envs: int = 128
    num_steps: int = 64
    updates: int = 25

    @property
    def env_id(self) -> str:
        return f"{self.theirs}?{self.arguments}" if self.arguments else self.theirs

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def flags(self) -> str:
        """Of ours: rollouts and minibatches as on the other side."""
        return (
            f"--env-id '{self.env_id}' --num-envs {self.num_envs} --num-steps {self.num_steps} "
            f"--total-timesteps {self.batch_size * self.updates} "
            "--num-minibatches 8 --eval-episodes 128 --hyper none"
        )


TASKS = {
    "balance": Task("vmas:balance", "n_agents=4&package_mass=5&random_package_pos_on_line=true"),
    "navigation": Task("vmas:navigation", "n_agents=3&collisions=true&agents_with_same_goal=1&shared_rew=false"),
    "transport": Task(
        "vmas:transport",
        "n_agents=4&n_packages=1&package_width=0.15&package_length=0.15&package_mass=50",
    ),
    "discovery": Task(
        "vmas:discovery",
        "n_agents=5&n_targets=7&agents_per_target=2&targets_respawn=true&shared_reward=true",
    ),
    "simple_spread": Task("mpe2.simple_spread_v3", num_envs=8, num_steps=125, updates=100),
}


def suite_of(task: str) -> str:
    """The suite that compares with BenchMARL."""
    return f"simulators-{BENCHMARL.lower()}-{task}"


SUITES = {
    "simulators-dispersion": run.compare(
        f"--env-id '{DISPERSION}' {BATCH} --total-timesteps 245760",
        SPECIALISE,
        5,
    ),
    "simulators-navigation": run.compare(
        f"--env-id '{NAVIGATION}' {BATCH} --total-timesteps 245760",
        {label: flags for label, flags in SPECIALISE.items() if label != "full deltas by all"},
        5,
    ),
}
for name, task in TASKS.items():
    SUITES[suite_of(name)] = run.compare(task.flags, OURS, 5)


@dataclass
class BenchmarlArgs:
    benchmarl_python: Path
    """interpreter of a virtual environment with benchmark/requirements-benchmarl.txt"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """scenarios"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds of its runs"""
    updates: int | None = None
    """rollouts of each run; None: as many as ours"""
    results: Path = run.RESULTS
    """folder of the rows and curves"""


def benchmarl_command(task: Task, updates: int, seed: int) -> list[str]:
    """BenchMARL's MAPPO: as many env steps, gradient steps and weights as ours."""
    return [
        "benchmark/benchmarl_mappo.py",
        "--task",
        task.theirs,
        "--num-envs",
        str(task.num_envs),
        "--num-steps",
        str(task.num_steps),
        "--updates",
        str(updates),
        "--num-threads",
        "1",
        "--seed",
        str(seed),
    ]


def benchmarl_row(args: BenchmarlArgs, name: str, seed: int) -> dict:
    """Trains, writes the curve of training returns, and gives the row; there is no evaluation."""
    task = TASKS[name]
    updates = args.updates or task.updates
    words = benchmarl_command(task, updates, seed)
    started = time.perf_counter()
    done = subprocess.run([args.benchmarl_python, *words], cwd=run.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"BenchMARL ended with: {done.stderr.strip().splitlines()[-1]}: see its own command {words}")
    wall = time.perf_counter() - started
    report = json.loads(done.stdout.strip().splitlines()[-1])
    points = []
    for i, mean_return in enumerate(report["returns"], start=1):
        if mean_return is not None:
            point = task.batch_size * i, round(wall * i / updates, 3), round(mean_return, 4)
            points.append(dict(zip(run.CURVE_COLUMNS, point, strict=True)))
    curve = f"curves/{suite_of(name)}__{BENCHMARL}__{seed}.csv"
    run.write_rows(args.results / curve, run.CURVE_COLUMNS, points)
    env_steps = task.batch_size * updates
    return {
        "label": BENCHMARL,
        "seed": seed,
        "env_id": task.theirs,
        "command": " ".join(["python", *words]),
        "commit": report["weights"],  # sizes and versions
        "python": sys.version.split()[0],
        "torch": version("torch"),
        "numpy": version("numpy"),
        "machine": run.describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
        "env_steps": env_steps,
        "wall_s": round(wall, 2),
        "cpu_s": round(env_steps / report["steps_per_cpu_second"], 2),
        "curve": curve,
    }


def benchmarl(args: BenchmarlArgs) -> int:
    if not args.benchmarl_python.is_file():
        raise UsageError(f"no interpreter {args.benchmarl_python}: make the venv as benchmark/benchmarl_mappo.py says")
    for task in args.tasks:
        if task not in TASKS:
            raise UsageError(f"unknown task {task}: one of {', '.join(TASKS)}")
    for task in args.tasks:
        for seed in args.seeds:
            row = benchmarl_row(args, task, seed)
            run.add_row(args.results, suite_of(task), row)
            print(f"done     {BENCHMARL} {task} {seed}: {row['cpu_s'] / 60:.1f} min of CPU", flush=True)
    return 0


def benchmarl_cli(argv: list[str]) -> int:
    return command_line(BenchmarlArgs, benchmarl, {}, argv)


# --------------------------------------------------------------------------------- what training paid


@dataclass
class CurvesArgs:
    suites: tyro.conf.Positional[tuple[str, ...]]
    """names of suites"""
    results: Path = run.RESULTS
    """folder of the rows and curves"""


def read_returns(results: Path, row: dict[str, str]) -> list[tuple[float, float]]:
    """(env steps, mean return of the episodes that ended in a stretch) along a run."""
    with open(results / row["curve"], newline="", encoding="utf-8") as file:
        return [(float(point["env_steps"]), float(point["return"])) for point in csv.DictReader(file)]


def end_and_area(points: list[tuple[float, float]], env_steps: float) -> tuple[float, float]:
    """Mean return over the last tenth of a run's env steps, and over all of them."""
    steps, returns = np.array(points).T
    late = steps > 0.9 * env_steps
    return float(returns[late].mean()), float(returns.mean())


def iqm_and_interval(values: tuple[float, ...]) -> str:
    """Interquartile mean and its bootstrap interval over the runs, as benchmark/plot.py has them."""
    middle, low, high = plot.iqm_interval(np.array(values))
    return f"{middle:.2f} ({low:.2f} ... {high:.2f})"


def curves(args: CurvesArgs) -> None:
    """Prints a markdown table with a line for each suite and label."""
    for suite in args.suites:
        if suite not in run.SUITES:
            raise UsageError(f"unknown suite {suite}: one of {', '.join(SUITES)}")
        if not run.read_rows(args.results, suite):
            raise UsageError(f"no rows of {suite} in {args.results}: run it first")
    print("| | | seeds | return, last tenth: IQM | mean over training: IQM | env-steps per CPU second |")
    print("|---|---|---:|---:|---:|---:|")
    for suite in args.suites:
        rows = run.read_rows(args.results, suite)
        for label in sorted({row["label"] for row in rows}):
            runs = [row for row in rows if row["label"] == label]
            env_steps = float(runs[0]["env_steps"])
            pairs = [end_and_area(read_returns(args.results, row), env_steps) for row in runs]
            ends, areas = zip(*pairs, strict=True)
            speeds = [float(row["env_steps"]) / float(row["cpu_s"]) for row in runs]
            cells = [runs[0]["env_id"], f"`{label}`", str(len(runs))]
            cells += [iqm_and_interval(ends), iqm_and_interval(areas), f"{np.mean(speeds):,.0f}"]
            print("| " + " | ".join(cells) + " |")


def curves_cli(argv: list[str]) -> int:
    return command_line(CurvesArgs, curves, {}, argv)


COMMANDS = {"run": run.cli, "plot": plot.cli, "benchmarl": benchmarl_cli, "curves": curves_cli}


def cli(argv: list[str] | None = None) -> int:
    """The command line: a command and its own arguments."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["nothing"]
    if name not in COMMANDS:
        print(f"error: expected one of {', '.join(COMMANDS)}, got {name}: see the file's first lines", file=sys.stderr)
        return 2
    run.SUITES.update(SUITES)
    return COMMANDS[name](rest)


if __name__ == "__main__":
    sys.exit(cli())
