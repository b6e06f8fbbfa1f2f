"""Tables and pictures of the study, from the rows that benchmark/run.py keeps.

Per member of a suite: the interquartile mean (IQM) of its seeds' evaluations, and the probability that a run of it is
better than a run of the baseline, both with 95 % bootstrap intervals (Agarwal et al. 2021, arXiv 2108.13264; their
package rliable does not import beside the versions of requirements.txt, so its formulas stand here). One table per env
is printed as markdown, with the mean over training beside it: who learns sooner has the larger one. The picture has a
row per env: return against env steps, and against time on one core. `--picture steps` is the left half of it, for runs
of unlike machines, `--picture points` a point per run.

    python benchmark/plot.py pursuit --baseline none --output docs/img/pursuit_curves.png
    python benchmark/plot.py pursuit-parts stag_hunt-8x8-parts --picture points --output docs/img/parts.png
    python benchmark/plot.py pursuit-rewards stag_hunt-8x8-rewards --baseline "spirit 0, obs"
"""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro
from scipy.stats import t as student_t
from scipy.stats import trim_mean

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.run import CURVE_COLUMNS, RESULTS, SUITES, read_rows
from runs import UsageError, command_line

Array = np.ndarray
Rows = list[dict[str, str]]  # of a suite's file
Groups = dict[str, Rows]  # by label
Curve = dict[str, Array]

RESAMPLES = 2000
BOOTSTRAP_SEED = 0
GRID = 100  # points of a curve
X_LABELS = {"env_steps": "env steps (millions)", "minutes": "minutes on one core"}
X_SCALES = {"env_steps": 1e-6, "minutes": 1.0}


@dataclass
class Args:
    suites: tyro.conf.Positional[tuple[str, ...]]
    """names of suites, as for benchmark/run.py"""
    baseline: str | None = None
    """the label that the others are compared with; None: the suite's first"""
    labels: tuple[str, ...] = ()
    """only these members; none: all"""
    seeds: tuple[int, ...] = ()
    """only their runs of these seeds, such as those of one machine where time is compared; none: all"""
    results: Path = RESULTS
    """folder of the rows and curves"""
    output: Path | None = None
    """the picture; None: only the tables"""
    picture: Literal["curves", "steps", "points"] = "curves"
    """curves: of training; steps: over env steps alone; points: the closing evaluation of each run, for suites of many
    members and few seeds"""
    window: int = 100_000
    """a point of a curve is the mean over so many env steps before it"""


# ------------------------------------------------------------------------------------- statistics


def iqm(scores: Array, axis: int = -1) -> Array:
    """Mean without the lowest and the highest quarter of the runs: with fewer than four, of all."""
    return trim_mean(scores, 0.25, axis=axis)


def improvement(a: Array, b: Array) -> Array:
    """P(a run of a is better than one of b), draws counted half: [..., n], [..., m] -> [...]"""
    difference = a[..., :, None] - b[..., None, :]  # [..., n, m]
    wins = (difference > 0) + 0.5 * (difference == 0)
    return wins.mean((-2, -1))


def resample(scores: Array, rng: np.random.Generator) -> Array:
    """Bootstrap samples of runs (the first axis): [n, ...] -> [RESAMPLES, n, ...]"""
    chosen = rng.integers(len(scores), size=(RESAMPLES, len(scores)))
    return scores[chosen]


def interval(statistics: Array) -> tuple[Array, Array]:
    """The middle 95 % of bootstrapped statistics: [RESAMPLES, ...] -> two of [...]"""
    low, high = np.percentile(statistics, [2.5, 97.5], axis=0)
    return low, high


def iqm_interval(scores: Array) -> tuple[Array, Array, Array]:
    """IQM over runs and its interval: [n, ...] -> three of [...]"""
    samples = resample(scores, np.random.default_rng(BOOTSTRAP_SEED))
    low, high = interval(iqm(samples, axis=1))
    return iqm(scores, axis=0), low, high


def improvement_interval(a: Array, b: Array) -> tuple[float, float, float]:
    """P(a better than b) and its interval; both groups of runs are drawn anew."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    low, high = interval(improvement(resample(a, rng), resample(b, rng)))
    return float(improvement(a, b)), float(low), float(high)


def mean_and_interval(values: list[float]) -> str:
    """With Student's 95 % interval over the runs."""
    mean = np.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    quantile = student_t.ppf(0.975, len(values) - 1)
    error_of_mean = np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{mean:.2f} ± {quantile * error_of_mean:.2f}"


# ------------------------------------------------------------------------------------------- tables


def column(rows: Rows, name: str) -> Array:
    return np.array([float(row[name]) for row in rows])


def mean_over_training(results: Path, row: dict[str, str]) -> float:
    """The area under the training's curve over env steps, divided by its length."""
    curve = read_curve(results, row)
    steps = curve["env_steps"]
    length = steps[-1] - steps[0]
    return np.trapezoid(curve["return"], steps) / length


def by_label(rows: Rows, order: list[str]) -> Groups:
    """Rows of each label, in the suite's order; labels without rows are left out."""
    groups = {}
    for label in order:
        members = [row for row in rows if row["label"] == label]
        if members:
            groups[label] = members
    return groups


def evaluated(groups: Groups) -> Groups:
    """Without the labels whose runs have no closing evaluation, such as those of other libraries."""
    return {label: rows for label, rows in groups.items() if all(row["mean_return"] for row in rows)}


def table_lines(groups: Groups, baseline: str, results: Path) -> list[str]:
    """A markdown table, a line per label."""
    lines = [
        "| | seeds | env steps | return: IQM | 95 % interval | worst ... best seed | better than "
        f"`{baseline}` | mean over training: IQM | CPU time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    reference = column(groups[baseline], "mean_return") if baseline in groups else None
    for label, rows in groups.items():
        scores = column(rows, "mean_return")
        mean, low, high = iqm_interval(scores)
        better = ""
        if reference is not None and label != baseline:
            chance, chance_low, chance_high = improvement_interval(scores, reference)
            better = f"{chance:.2f} ({chance_low:.2f} ... {chance_high:.2f})"
        spread = f"{scores.min():.2f} ... {scores.max():.2f}"
        steps = f"{column(rows, 'env_steps').mean() / 1e6:.2f} M"
        minutes = f"{column(rows, 'cpu_s').mean() / 60:.1f} min"
        areas = [mean_over_training(results, row) for row in rows]
        cells = [
            f"`{label}`",
            str(len(rows)),
            steps,
            f"**{mean:.2f}**",
            f"{low:.2f} ... {high:.2f}",
            spread,
            better,
            f"{iqm(np.array(areas)):.2f}",
            minutes,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# ------------------------------------------------------------------------------------------- curves


def read_curve(results: Path, row: dict[str, str]) -> Curve:
    """env_steps, return and minutes on one core: the run's CPU time, spread as its updates' wall time.

    (The start and the closing evaluation are in it, too: nobody counted the CPU time of the training alone.)
    """
    with open(results / row["curve"], newline="", encoding="utf-8") as file:
        points = list(csv.DictReader(file))
    curve = {name: column(points, name) for name in CURVE_COLUMNS}
    share = curve["wall_s"] / curve["wall_s"][-1]
    curve["minutes"] = share * float(row["cpu_s"]) / 60
    return curve


def moving_mean(steps: Array, returns: Array, window: int) -> Array:
    """At each point the mean of the points in the `window` steps up to it."""
    last = np.arange(1, len(steps) + 1)
    first = np.searchsorted(steps, steps - window, "right")
    total = np.append(0.0, returns.cumsum())
    return (total[last] - total[first]) / (last - first)


def common_curve(
    curves: list[Curve],
    x: str,
    window: int,
) -> tuple[Array, Array]:
    """The runs' moving means on a grid where all of them have values: -> grid [GRID], returns [runs, GRID]"""
    first = max(curve[x][0] for curve in curves)
    last = min(curve[x][-1] for curve in curves)
    grid = np.linspace(first, last, GRID)
    lines = []
    for curve in curves:
        smooth = moving_mean(curve["env_steps"], curve["return"], window)
        lines.append(np.interp(grid, curve[x], smooth))
    return grid, np.stack(lines)


def draw_curves(
    axis: plt.Axes,
    groups: Groups,
    env_id: str,
    x: str,
    args: Args,
) -> None:
    """A line per label: IQM of its runs with the interval, over x, which is env_steps or minutes."""
    for label, rows in groups.items():
        curves = [read_curve(args.results, row) for row in rows]
        grid, returns = common_curve(curves, x, args.window)
        mean, low, high = iqm_interval(returns)
        axis.plot(grid * X_SCALES[x], mean, label=f"{label} ({len(rows)})")
        axis.fill_between(grid * X_SCALES[x], low, high, alpha=0.15)
    axis.set(xlabel=X_LABELS[x], ylabel="return per agent, in training", title=env_id)
    axis.grid(alpha=0.3)
    if x == "env_steps":
        axis.legend(fontsize=7, title="(seeds)", title_fontsize=7)


def draw_points(axis: plt.Axes, groups: Groups, title: str, xlabel: str) -> None:
    """A line per label: its runs as points, their IQM as a bar."""
    labels = list(groups)
    for height, label in enumerate(labels):
        scores = column(groups[label], "mean_return")
        heights = np.full(len(scores), height)
        axis.plot(scores, heights, "o", color="tab:blue", alpha=0.6)
        axis.plot(iqm(scores), height, "|", color="black", markersize=14)
    names = [f"{label} ({len(groups[label])})" for label in labels]
    axis.set_yticks(range(len(labels)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel=xlabel, title=f"{title} (seeds)")
    axis.grid(alpha=0.3)


# --------------------------------------------------------------------------------------------- main


def read_groups(args: Args) -> dict[str, Groups]:
    """Rows by env and label. UsageError: there are none."""
    rows, order = [], []
    for suite in args.suites:
        if suite not in SUITES:
            raise UsageError(f"unknown suite {suite}: one of {', '.join(SUITES)}")
        for row in read_rows(args.results, suite):
            if not args.seeds or int(row["seed"]) in args.seeds:
                rows.append(row)
        order += [member.label for member in SUITES[suite] if member.label not in order]
    # Rows of members that the suite no longer has are shown as well, behind the others.
    order += [row["label"] for row in rows if row["label"] not in order]
    order = list(dict.fromkeys(order))
    if args.labels:
        order = [label for label in order if label in args.labels]
    groups = {}
    for env_id in dict.fromkeys(row["env_id"] for row in rows):
        rows_of_env = [row for row in rows if row["env_id"] == env_id]
        of_env = by_label(rows_of_env, order)
        if of_env:
            groups[env_id] = of_env
    if not groups:
        raise UsageError(f"no rows of {', '.join(args.suites)} in {args.results}: run benchmark/run.py first")
    return groups


def main(args: Args) -> None:
    groups = read_groups(args)
    for env_id, of_env in groups.items():
        baseline = args.baseline or next(iter(of_env))
        print(f"\n{env_id}\n")
        in_table = evaluated(of_env)
        print("\n".join(table_lines(in_table, baseline, args.results)))
        for label in of_env:
            if label not in in_table:
                print(f"\n`{label}` has no closing evaluation: it is in pictures of training alone")
    if args.output is not None:
        save_picture(groups, args)


def save_picture(groups: dict[str, Groups], args: Args) -> None:
    if args.picture == "points":
        groups = {env_id: evaluated(of_env) for env_id, of_env in groups.items()}
        most_labels = max(len(of_env) for of_env in groups.values())
        shape = 1, len(groups)
        size = 6 * len(groups), 1.2 + 0.3 * most_labels
    elif args.picture == "steps":
        shape = 1, len(groups)
        size = 6 * len(groups), 4.2
    else:
        shape = len(groups), 2
        size = 12, 4.2 * len(groups)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    if args.picture == "steps":
        axes = axes.T  # [1, envs] -> [envs, 1]
    for i, env_id in enumerate(groups):
        if args.picture == "points":
            draw_points(axes[0, i], groups[env_id], env_id, "return per agent, closing evaluation")
            continue
        for axis, x in zip(axes[i], X_LABELS, strict=False):  # of "steps" there is the first alone
            draw_curves(axis, groups[env_id], env_id, x, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    plt.close(figure)


LIMITS = {"at least 1": (lambda x: x >= 1, "window")}


def cli(argv: list[str] | None = None) -> int:
    """The command line: 0 done, 2 unusable arguments."""
    return command_line(Args, main, LIMITS, argv)


if __name__ == "__main__":
    sys.exit(cli())
