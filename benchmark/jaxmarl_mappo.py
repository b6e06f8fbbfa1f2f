"""JaxMARL's recurrent MAPPO on SMAX: their script, unchanged, from a clone that the user names.

Everything is theirs: networks, loss, the training loop as one compiled JAX program, and the hyperparameters of their
config/mappo_homogenous_rnn_smax.yaml. Only what the script would send to Weights & Biases after every update is kept
here instead, with the CPU time it came at. The last line printed is JSON. benchmark/smax.py calls it.

    git clone https://github.com/FLAIROx/JaxMARL
    python -m venv jaxmarl-venv
    jaxmarl-venv/bin/pip install -r benchmark/requirements-jaxmarl-mappo.txt
    jaxmarl-venv/bin/python benchmark/jaxmarl_mappo.py --clone JaxMARL --total-timesteps 1000000    # 1 core, 7 minutes
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before JAX is imported: one core, as for all sides.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import tyro
import wandb
import yaml

SCRIPT = "mappo_rnn_smax"
CONFIG = "config/mappo_homogenous_rnn_smax.yaml"


@dataclass
class Args:
    clone: Path
    """a clone of github.com/FLAIROx/JaxMARL"""
    scenario: str = "3m"
    """3m, 2s3z, 3s5z or another map of SMAX"""
    total_timesteps: int = 1_000_000
    """env steps, rounded down to whole rollouts; the learning rate falls to 0 over them"""
    seed: int = 1
    """of envs, networks and actions"""


class Clock:
    """What each update reported, and the CPU time until then: stands in for the module wandb's `log`."""

    def __init__(self) -> None:
        self.cpu_times: list[float] = []
        self.returns: list[float | None] = []
        self.win_rates: list[float | None] = []

    def log(self, report: dict[str, Any]) -> None:
        """returns and win_rate: means over the episodes that ended in the rollout; None where none did."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.cpu_times.append(used.ru_utime + used.ru_stime)
        self.returns.append(finite(report["returns"]))
        self.win_rates.append(finite(report["win_rate"]))


def finite(x: Any) -> float | None:
    """None for NaN, the mean of nothing."""
    return float(x) if math.isfinite(x) else None


def read_config(baselines: Path, args: Args) -> dict[str, Any]:
    """Their hyperparameters, with our scenario, budget and seed."""
    config = yaml.safe_load((baselines / CONFIG).read_text(encoding="utf-8"))
    config["MAP_NAME"] = args.scenario
    config["TOTAL_TIMESTEPS"] = args.total_timesteps
    config["SEED"] = args.seed
    return config


def train(args: Args) -> dict[str, Any]:
    """-> win rate and return of every rollout, env-steps per CPU second without start and compilation."""
    baselines = args.clone / "baselines/MAPPO"
    if not (baselines / f"{SCRIPT}.py").is_file():
        sys.exit(f"error: no {SCRIPT}.py in {baselines}: give a clone of github.com/FLAIROx/JaxMARL")
    sys.path.insert(0, str(baselines))
    theirs = __import__(SCRIPT)
    clock = Clock()
    wandb.log = clock.log
    config = read_config(baselines, args)
    program = jax.jit(theirs.make_train(config))
    jax.block_until_ready(program(jax.random.PRNGKey(args.seed)))
    jax.effects_barrier()  # the last report has come
    batch_size = config["NUM_ENVS"] * config["NUM_STEPS"]
    counted = batch_size * (len(clock.cpu_times) - 1)
    packages = ("jaxmarl", "jax", "flax", "distrax", "optax")
    return {
        "env_steps": batch_size * len(clock.cpu_times),
        "batch_size": batch_size,
        "steps_per_cpu_second": counted / (clock.cpu_times[-1] - clock.cpu_times[0]),
        "first_update_cpu_s": clock.cpu_times[0],  # imports, compilation and one update
        "win_rates": clock.win_rates,
        "returns": clock.returns,
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


if __name__ == "__main__":
    print(json.dumps(train(tyro.cli(Args))))
