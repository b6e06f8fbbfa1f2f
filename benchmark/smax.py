"""SMAX: plain MAPPO of ours beside JaxMARL's recurrent one, at equal env steps and of equal width.

    python benchmark/smax.py run --seeds 1 2 3                                           # ours
    python benchmark/smax.py run --jaxmarl-python jaxmarl-venv/bin/python --clone JaxMARL    # theirs
    python benchmark/smax.py table
    python benchmark/smax.py plot --output docs/img/smax.png

Rows: benchmark/results/simulators_smax.csv, a run each; benchmark/results/curves/ has what every rollout won.
benchmark/jaxmarl_mappo.py says how their side's virtual environment is made.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import run
from benchmark.plot import mean_and_interval
from benchmark.simulators import end_and_area
from runs import UsageError, command_line, read_metrics, safe_name

OURS, OURS_WITH_MEMORY, THEIRS = "ours", "ours, memory", "JaxMARL"
# JaxMARL's: 128 envs x 128 steps, networks of 128, 4 epochs of 4 minibatches, learning rate 2e-3 that falls to 0, no
# entropy bonus, gradients clipped at 0.25. Theirs has a memory, ours has none unless --memory asks for it.
RECIPE = (
    "--hyper none --num-envs 128 --num-steps 128 --update-epochs 4 --num-minibatches 4 "
    "--learning-rate 2e-3 --anneal-lr --ent-coef 0 --final-ent-coef 0 --max-grad-norm 0.25"
)
# A context of the agent's own observations makes a recurrent actor.
MEMORY = "--actor-context --hyper-context local --context-size 128 --chunk-length 32 --hyper-learning-rate 2e-3"
COLUMNS = (
    "scenario label seed command versions machine date env_steps cpu_s won_at_end won_over_training evaluated curve"
).split()
CURVE_COLUMNS = ["env_steps", "win_rate"]
TABLE = "simulators_smax"


@dataclass
class Args:
    jaxmarl_python: Path | None = None
    """interpreter of a virtual environment for benchmark/jaxmarl_mappo.py: runs their side; None: ours"""
    clone: Path | None = None
    """a clone of github.com/FLAIROx/JaxMARL, for their side"""
    memory: bool = False
    """give our actor a memory"""
    scenario: str = "3m"
    """a map of SMAX"""
    total_timesteps: int = 500_000
    """env steps of each run"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """a run each"""
    results: Path = run.RESULTS
    """folder of the rows and curves"""


@dataclass
class TableArgs:
    results: Path = run.RESULTS
    """folder of the rows and curves"""


@dataclass
class PlotArgs:
    output: Path
    """the picture"""
    results: Path = run.RESULTS
    """folder of the rows and curves"""


@dataclass
class Trained:
    """What a run of either side tells: (env steps, share of the episodes won) of every rollout, CPU seconds in all."""

    command: str
    versions: str
    points: list[tuple[float, float]]
    cpu_s: float
    evaluated: float | None = None


# --------------------------------------------------------------------------------------- the two sides


def watch(words: list[str | Path]) -> tuple[str, float]:
    """Runs a command to its end: -> what it printed, its CPU seconds. UsageError: it failed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        process = subprocess.Popen(words, cwd=run.ROOT, stdout=printed, stderr=subprocess.STDOUT)
        code, cpu_s = run.wait_for(process)
        printed.seek(0)
        text = printed.read().strip()
    if code != 0:
        last = (text.splitlines() or ["nothing"])[-1]
        raise UsageError(f"{words[1]} ended with exit code {code} and: {last}")
    return text, cpu_s


def train_ours(args: Args, seed: int) -> Trained:
    """hyper_mappo.py with RECIPE, evaluated on 256 episodes."""
    recipe = f"{RECIPE} {MEMORY}" if args.memory else RECIPE
    flags = (
        f"--env-id 'jaxmarl:SMAX?scenario={args.scenario}' {recipe} --total-timesteps {args.total_timesteps} "
        f"--eval-episodes 256 {run.ONE_THREAD} --seed {seed}"
    )
    with tempfile.TemporaryDirectory() as folder:
        _, cpu_s = watch([sys.executable, "hyper_mappo.py", *shlex.split(flags), "--runs-dir", folder])
        (report,) = Path(folder).glob("*/eval.json")
        points = []
        for row in read_metrics(report.parent):
            if row["charts/success_rate"]:
                points.append((float(row["global_step"]), float(row["charts/success_rate"])))
        evaluated = json.loads(report.read_text())["success_rate"]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "jaxmarl", "jax"))
    return Trained(f"python hyper_mappo.py {flags}", versions, points, cpu_s, evaluated)


def train_theirs(args: Args, seed: int) -> Trained:
    """JaxMARL's script as it is; it has no evaluation."""
    words = ["--scenario", args.scenario, "--total-timesteps", str(args.total_timesteps), "--seed", str(seed)]
    script = "benchmark/jaxmarl_mappo.py"
    printed, cpu_s = watch([args.jaxmarl_python, script, "--clone", args.clone, *words])
    report = json.loads(printed.splitlines()[-1])
    points = []
    for i, won in enumerate(report["win_rates"], start=1):
        if won is not None:
            points.append((float(i * report["batch_size"]), won))
    return Trained(" ".join(["python", script, "--clone JaxMARL", *words]), report["versions"], points, cpu_s)


# ------------------------------------------------------------------------------------------------ rows


def keep(args: Args, label: str, seed: int, trained: Trained) -> dict:
    """Writes the curve and the row, in place of an earlier one of its scenario, length, label and seed."""
    env_steps = int(trained.points[-1][0])
    at_end, over_training = end_and_area(trained.points, env_steps)
    curve = f"curves/simulators_smax__{args.scenario}__{safe_name(label)}__{seed}__{env_steps}.csv"
    lines = [dict(zip(CURVE_COLUMNS, point, strict=True)) for point in trained.points]
    run.write_rows(args.results / curve, CURVE_COLUMNS, lines)
    row = {
        "scenario": args.scenario,
        "label": label,
        "seed": seed,
        "command": trained.command,
        "versions": trained.versions,
        "machine": run.describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
        "env_steps": env_steps,
        "cpu_s": round(trained.cpu_s, 1),
        "won_at_end": round(at_end, 4),
        "won_over_training": round(over_training, 4),
        "evaluated": "" if trained.evaluated is None else round(trained.evaluated, 4),
        "curve": curve,
    }
    key = args.scenario, str(env_steps), label, str(seed)
    kept = []
    for old in run.read_rows(args.results, TABLE):
        if (old["scenario"], old["env_steps"], old["label"], old["seed"]) != key:
            kept.append(old)
    run.write_rows(args.results / f"{TABLE}.csv", COLUMNS, [*kept, row])
    return row


def run_side(args: Args) -> int:
    label, train = OURS, train_ours
    if args.memory:
        label = OURS_WITH_MEMORY
    if args.jaxmarl_python is not None:
        label, train = THEIRS, train_theirs
        if args.clone is None:
            raise UsageError("--jaxmarl-python needs --clone: a clone of github.com/FLAIROx/JaxMARL")
        if not args.jaxmarl_python.is_file():
            raise UsageError(f"no interpreter {args.jaxmarl_python}: make it as benchmark/jaxmarl_mappo.py says")
        args.clone = args.clone.resolve()
    for seed in args.seeds:
        row = keep(args, label, seed, train(args, seed))
        print(f"done     {label} {seed}: won {row['won_at_end']} at the end, {row['cpu_s']} s of CPU", flush=True)
    return 0


def read_all(results: Path) -> list[dict[str, str]]:
    rows = run.read_rows(results, TABLE)
    if not rows:
        raise UsageError(f"no {TABLE}.csv in {results}: run it first")
    return rows


def table(args: TableArgs) -> None:
    """Prints a markdown table with a line for each scenario, length and side."""
    rows = read_all(args.results)
    print("| | | seeds | env steps | won, last tenth | mean over training | CPU time |")
    print("|---|---|---:|---:|---:|---:|---:|")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["scenario"], row["env_steps"], row["label"]), []).append(row)
    for (scenario, env_steps, label), runs in groups.items():
        at_end = mean_and_interval([float(row["won_at_end"]) for row in runs])
        over_training = mean_and_interval([float(row["won_over_training"]) for row in runs])
        seconds = np.mean([float(row["cpu_s"]) for row in runs])
        length = f"{int(env_steps) / 1e6:.2f} M"
        cells = [scenario, label, str(len(runs)), length, at_end, over_training, f"{seconds:.0f} s"]
        print("| " + " | ".join(cells) + " |")


def plot(args: PlotArgs) -> None:
    """A panel for each scenario: the share of episodes won over env steps, a line for each run."""
    rows = read_all(args.results)
    colours = {OURS: "tab:blue", OURS_WITH_MEMORY: "tab:green", THEIRS: "tab:orange"}
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    size = 6 * len(scenarios), 4.2
    figure, axes = plt.subplots(1, len(scenarios), figsize=size, squeeze=False, layout="constrained")
    for axis, scenario in zip(axes[0], scenarios, strict=True):
        named = set()
        for row in rows:
            if row["scenario"] != scenario:
                continue
            points = run.read_rows(args.results, row["curve"].removesuffix(".csv"))
            millions = [float(point["env_steps"]) / 1e6 for point in points]
            won = [float(point["win_rate"]) for point in points]
            label = row["label"]
            axis.plot(millions, won, color=colours[label], alpha=0.7, label=None if label in named else label)
            named.add(label)
        axis.set(title=scenario, xlabel="million env steps", ylabel="share of episodes won", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    plt.close(figure)


def cli(argv: list[str] | None = None) -> int:
    """The command line: a command and its own arguments."""
    commands = {"run": (Args, run_side), "table": (TableArgs, table), "plot": (PlotArgs, plot)}
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["nothing"]
    if name not in commands:
        print(f"error: expected run, table or plot, got {name}: see the file's first lines", file=sys.stderr)
        return 2
    return command_line(*commands[name], {}, rest)


if __name__ == "__main__":
    sys.exit(cli())
