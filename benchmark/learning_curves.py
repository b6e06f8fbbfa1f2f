"""One picture from many runs: the episodic return over env steps, a line per group, a band from worst to best seed.

python benchmark/learning_curves.py --by hyper --runs runs/pursuit__* --output docs/img/curves.png
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Args:
    runs: tuple[Path, ...]
    """run folders"""
    by: str = "hyper"
    """flag (a key of args.json) whose values make the groups"""
    output: Path = Path("curves.png")
    """the picture"""
    title: str = ""
    """its title"""
    max_steps: int | None = None
    """cut the curves there, for equal budgets; None: the shortest run's length"""


def main(args: Args) -> None:
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for run_dir in args.runs:
        with open(run_dir / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["charts/episodic_return"]]
        curve = [(int(row["global_step"]), float(row["charts/episodic_return"])) for row in rows]
        name = str(json.loads((run_dir / "args.json").read_text())[args.by])
        groups.setdefault(name, []).append(tuple(np.array(curve).T))
    end = args.max_steps or min(steps[-1] for curves in groups.values() for steps, _ in curves)
    grid = np.linspace(max(steps[0] for curves in groups.values() for steps, _ in curves), end, 200)
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, curves in sorted(groups.items()):
        seeds = np.stack([np.interp(grid, steps, returns) for steps, returns in curves])  # [seeds, 200]
        (line,) = axes.plot(grid, seeds.mean(0), label=f"--{args.by} {name} ({len(curves)} seeds)", linewidth=2)
        axes.fill_between(grid, seeds.min(0), seeds.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        last = [float(returns[steps <= end][-3:].mean()) for steps, returns in curves]
        print(f"--{args.by} {name}: mean of the last 3 points of each seed " + ", ".join(f"{x:.1f}" for x in last))
    axes.set(xlabel="env steps", ylabel="episodic return (mean over agents)", title=args.title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Args))
