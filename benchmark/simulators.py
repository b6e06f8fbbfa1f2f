"""Comparisons on VMAS and JaxMARL: suites for benchmark/run.py and benchmark/plot.py, and BenchMARL's side of one.

    python benchmark/simulators.py run simulators-dispersion --jobs 1
    python benchmark/simulators.py plot simulators-dispersion --baseline "shared, id"
    python benchmark/simulators.py benchmarl --benchmarl-python benchmarl-venv/bin/python    # joins simulators-balance
    python benchmark/simulators.py curves simulators-balance      # what the runs were paid while they trained

`run` and `plot` take what those two scripts take. Rows: benchmark/results/SUITE.csv.
"""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import t as student_t

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import plot, run
from runs import UsageError, command_line

# Where agents must specialise. All know who they are, and all have the same critic.
SPECIALISE = {
    "shared, id": "--hyper none --agent-id",
    "own actors": "--hyper none --agent-id --no-share-parameters",
    "full by id": "--hyper full --agent-id --hyper-context agent-id",
    "delta by id": "--hyper delta --agent-id --hyper-context agent-id",
    "delta by all": "--hyper delta --agent-id --hyper-context joint",
}
BATCH = "--num-envs 256 --num-steps 32 --eval-episodes 256 --ent-coef 0.005"
# Food of VMAS's own radius, 0.05, is found too seldom for anything to be learnt in so few env steps.
DISPERSION = "vmas:dispersion?food_radius=0.15"
# BenchMARL's arguments of the scenario, and the rollouts that its side has too.
BALANCE = "vmas:balance?n_agents=4&package_mass=5&random_package_pos_on_line=true"
BALANCE_ENVS, BALANCE_STEPS, BALANCE_UPDATES = 128, 64, 25
BALANCE_FLAGS = (
    f"--env-id '{BALANCE}' --num-envs {BALANCE_ENVS} --num-steps {BALANCE_STEPS} "
    f"--total-timesteps {BALANCE_ENVS * BALANCE_STEPS * BALANCE_UPDATES} --eval-episodes 256"
)
BENCHMARL = "BenchMARL"
SUITES = {
    "simulators-dispersion": run.compare(
        f"--env-id '{DISPERSION}' {BATCH} --total-timesteps 245760",
        SPECIALISE,
        3,
    ),
    "simulators-navigation": run.compare(
        f"--env-id 'vmas:navigation?n_agents=4' {BATCH} --total-timesteps 245760",
        SPECIALISE,
        3,
    ),
    "simulators-balance": run.compare(
        BALANCE_FLAGS,
        {"ours": "--hyper none"},
        3,
    ),
}


@dataclass
class BenchmarlArgs:
    benchmarl_python: Path
    """interpreter of a virtual environment with benchmark/requirements-benchmarl.txt"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of its runs"""
    updates: int = BALANCE_UPDATES
    """rollouts of each run"""
    results: Path = run.RESULTS
    """folder of the rows and curves"""


def benchmarl_command(args: BenchmarlArgs, seed: int) -> list[str]:
    """BenchMARL's MAPPO on balance: as many env steps, gradient steps and weights as ours."""
    return [
        "benchmark/benchmarl_mappo.py",
        "--task",
        "vmas:balance",
        "--num-envs",
        str(BALANCE_ENVS),
        "--num-steps",
        str(BALANCE_STEPS),
        "--updates",
        str(args.updates),
        "--num-threads",
        "1",
        "--seed",
        str(seed),
    ]


def benchmarl_row(args: BenchmarlArgs, seed: int) -> dict:
    """Trains, writes the curve of training returns, and gives the row; there is no evaluation."""
    words = benchmarl_command(args, seed)
    started = time.perf_counter()
    done = subprocess.run([args.benchmarl_python, *words], cwd=run.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"BenchMARL ended with: {done.stderr.strip().splitlines()[-1]}: see its own command {words}")
    wall = time.perf_counter() - started
    report = json.loads(done.stdout.strip().splitlines()[-1])
    batch_size = BALANCE_ENVS * BALANCE_STEPS
    curve = []
    for i, mean_return in enumerate(report["returns"], start=1):
        if mean_return is not None:
            point = batch_size * i, round(wall * i / args.updates, 3), round(mean_return, 4)
            curve.append(dict(zip(run.CURVE_COLUMNS, point, strict=True)))
    name = f"curves/simulators-balance__{BENCHMARL}__{seed}.csv"
    run.write_rows(args.results / name, run.CURVE_COLUMNS, curve)
    env_steps = batch_size * args.updates
    return {
        "label": BENCHMARL,
        "seed": seed,
        "env_id": "vmas:balance",
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
        "curve": name,
    }


def benchmarl(args: BenchmarlArgs) -> int:
    if not args.benchmarl_python.is_file():
        raise UsageError(f"no interpreter {args.benchmarl_python}: make the venv as benchmark/benchmarl_mappo.py says")
    for seed in args.seeds:
        row = benchmarl_row(args, seed)
        run.add_row(args.results, "simulators-balance", row)
        print(f"done     {BENCHMARL} {seed}: {row['cpu_s'] / 60:.1f} min of CPU", flush=True)
    return 0


def benchmarl_cli(argv: list[str]) -> int:
    return command_line(BenchmarlArgs, benchmarl, {}, argv)


# --------------------------------------------------------------------------------- what training paid


@dataclass
class CurvesArgs:
    suite: tyro.conf.Positional[str]
    """name of a suite"""
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


def mean_and_interval(values: list[float]) -> str:
    """With Student's 95 % interval over the runs."""
    mean = np.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    half = student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{mean:.2f} ± {half:.2f}"


def curves(args: CurvesArgs) -> None:
    """Prints a markdown table with a line for each label."""
    if args.suite not in run.SUITES:
        raise UsageError(f"unknown suite {args.suite}: one of {', '.join(SUITES)}")
    rows = run.read_rows(args.results, args.suite)
    if not rows:
        raise UsageError(f"no rows of {args.suite} in {args.results}: run it first")
    print("| | seeds | env steps | return at the end | mean over training | env-steps per CPU second |")
    print("|---|---:|---:|---:|---:|---:|")
    for label in dict.fromkeys(row["label"] for row in rows):
        runs = [row for row in rows if row["label"] == label]
        env_steps = float(runs[0]["env_steps"])
        pairs = [end_and_area(read_returns(args.results, row), env_steps) for row in runs]
        ends, areas = zip(*pairs, strict=True)
        speeds = [float(row["env_steps"]) / float(row["cpu_s"]) for row in runs]
        cells = [f"`{label}`", str(len(runs)), f"{env_steps / 1e6:.2f} M"]
        cells += [mean_and_interval(ends), mean_and_interval(areas), f"{np.mean(speeds):,.0f}"]
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
