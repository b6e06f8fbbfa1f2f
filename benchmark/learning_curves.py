"""One picture from many runs: the episodic return over env steps, a line per group, a band from worst to best seed.

python benchmark/learning_curves.py --runs runs/pursuit__* --output curves.png
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hyper_mappo
from runs import flag, read_metrics


@dataclass
class Args:
    runs: tuple[Path, ...]
    """run folders"""
    by: tuple[str, ...] = ("hyper", "hyper_context", "actor_context", "share_delta", "match_params")
    """flags (keys of args.json) whose values make the groups"""
    window: int = 200_000
    """a point of a curve is the mean of so many env steps before it"""
    output: Path = Path("curves.png")
    """the picture"""
    title: str = ""
    """its title"""
    max_steps: int | None = None
    """cut the curves there, for equal budgets; None: the shortest run's length"""


def describe(saved: dict, flags: tuple[str, ...]) -> str:
    """What a run's flags change of the defaults, as on the command line."""
    changed = [name for name in flags if saved[name] != getattr(hyper_mappo.Args, name)]
    given = [f"{flag(name)} {saved[name]}".removesuffix(" True") for name in changed]
    return " ".join(given) or "defaults"


def moving_mean(steps: np.ndarray, returns: np.ndarray, grid: np.ndarray, window: int) -> np.ndarray:
    """Mean of what was logged in the `window` steps before each point of the grid, at least the last one."""
    last = np.searchsorted(steps, grid, "right")
    first = np.minimum(np.searchsorted(steps, grid - window, "right"), last - 1)
    total = np.append(0.0, returns.cumsum())
    return (total[last] - total[first]) / (last - first)


def main(args: Args) -> None:
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for run_dir in args.runs:
        rows = [row for row in read_metrics(run_dir) if row["charts/episodic_return"]]
        steps = np.array([int(row["global_step"]) for row in rows])
        returns = np.array([float(row["charts/episodic_return"]) for row in rows])
        name = describe(json.loads((run_dir / "args.json").read_text()), args.by)
        groups.setdefault(name, []).append((steps, returns))
    every = [curve for curves in groups.values() for curve in curves]
    end = args.max_steps or min(int(steps[-1]) for steps, _ in every)
    grid = np.linspace(max(steps[0] for steps, _ in every), end, 200)
    figure, axes = plt.subplots(figsize=(8, 4.8))
    for name, curves in sorted(groups.items()):
        seeds = np.stack([moving_mean(*curve, grid, args.window) for curve in curves])  # [seeds, 200]
        label = f"{name} ({len(curves)} seeds)" if len(curves) > 1 else name
        (line,) = axes.plot(grid, seeds.mean(0), label=label, linewidth=2.5 if len(curves) > 1 else 1.2)
        axes.fill_between(grid, seeds.min(0), seeds.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        print(f"{name}: at {end:,} env steps " + ", ".join(f"{x:.2f}" for x in seeds[:, -1]))
    axes.set(xlabel="env steps", ylabel="episodic return (mean over agents)", title=args.title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Args))
