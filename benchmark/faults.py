"""Kills the writing scripts, resumes them, and compares with a run that was never killed.

    python benchmark/faults.py --minutes 10

Every trial is a tiny run in a process of its own that is killed with SIGKILL: either just before its k-th file
operation (opening to write, renaming, deleting, making a folder), for every k, or at a random moment. Then it is
resumed, or begun again where it had saved nothing, and must end with the same weights, metrics or rows as the run that
was never killed. "lost" counts the trials where it did not. Needs os.fork.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))

SLOW_IMPORTS = ("torch._dynamo", "sklearn.linear_model", "sklearn.manifold")  # what Adam and the plots import
NOT_COMPARED = ("charts/SPS", "charts/samples_per_second")  # speeds
WRITING = os.O_WRONLY | os.O_RDWR


@dataclass
class Args:
    minutes: float = 10.0
    """how long all trials may take together"""
    scripts: tuple[str, ...] = ("collect_data", "pretrain_vae", "world_model", "hyper_mappo")
    """which scripts"""
    kinds: tuple[Literal["operations", "random"], ...] = ("operations", "random")
    """kills before every file operation, and at random moments while there is time left"""
    seed: int = 1
    """seed of the random moments"""
    keep: bool = False
    """leave the folders of lost trials where they are"""


class Script(NamedTuple):
    """A tiny run of a script, and what is left of it."""

    flags: list[str]
    folder_flag: str
    result: Callable[[Path], Any]  # folder -> what must be equal


def scripts(data: Path) -> dict[str, Script]:
    collect = "--env-id stag_hunt --num-steps 800 --num-envs 8 --policies nearest_stag random --no-cuda --name toy"
    vae = f"--data {data} --epochs 3 --hidden-size 16 --history-size 8 --latent-size 4 --batch-size 256 --no-cuda"
    world = f"--data {data} --total-updates 30 --eval-interval 10 --hidden-size 8 --batch-size 32 --no-cuda"
    mappo = "--env-id stag_hunt --total-timesteps 1024 --num-envs 8 --num-steps 32 --num-minibatches 2 --save-every 1"
    mappo += " --hidden-size 16 --eval-episodes 2 --num-env-procs 0 --no-cuda --num-threads 1 --update-threads 1"
    return {
        "collect_data": Script(collect.split(), "--data-dir", dataset_rows),
        "pretrain_vae": Script(vae.split(), "--runs-dir", weights_and_metrics),
        "world_model": Script(world.split(), "--runs-dir", weights_and_metrics),
        "hyper_mappo": Script(mappo.split(), "--runs-dir", weights_and_metrics),
    }


# ---------------------------------------------------------------- what must be equal
def dataset_rows(folder: Path) -> dict[str, np.ndarray]:
    from dataset import load_dataset, row_fields

    data = load_dataset(folder / "toy", every_checksum=True)
    return {name: np.array(getattr(data, name)) for name in row_fields(data.meta)}


def weights_and_metrics(folder: Path) -> dict[str, Any]:
    """Every tensor of the checkpoints but those of random numbers, and every logged number but speeds."""
    (run_dir,) = (path for path in folder.iterdir() if (path / "latest.pt").exists())
    result: dict[str, Any] = {}
    for name in ("latest.pt", "best.pt"):
        if (run_dir / name).exists():
            checkpoint = torch.load(run_dir / name, weights_only=True)
            parts = {key: value for key, value in checkpoint.items() if key not in ("args", "data_meta")}
            tensors = [leaf for leaf in tree_leaves(parts) if isinstance(leaf, torch.Tensor)]
            result |= {f"{name} {i}": tensor.numpy() for i, tensor in enumerate(tensors)}
    with open(run_dir / "metrics.csv", newline="") as file:
        for i, row in enumerate(csv.DictReader(file)):
            for name, value in row.items():
                if name not in NOT_COMPARED:
                    result[f"row {i} {name}"] = np.array(value)
    # (the temporary file of a killed writer stays for a minute, then the next writer of the folder deletes it)
    pictures = [path.name for path in run_dir.glob("*.png") if ".tmp." not in path.name]
    result["pictures"] = np.array(sorted(pictures))
    return result


def difference(expected: dict[str, Any], given: dict[str, Any]) -> str | None:
    """The first thing that differs; None: nothing does."""
    if expected.keys() != given.keys():
        return f"other parts: {sorted(expected.keys() ^ given.keys())[:3]}"
    for name, value in expected.items():
        if not np.array_equal(value, given[name], equal_nan=value.dtype.kind == "f"):
            return f"another {name}"
    return None


# ---------------------------------------------------------------- processes
def run_in_child(name: str, argv: list[str], log: Path, watch: Path, kill_at: int = 0, seconds: float = 0.0) -> int:
    """cli(argv) of a script in a forked process: -> its exit code, negative where a signal ended it.

    kill_at: before which file operation under `watch` it is killed, seconds: after how much time; 0: not at all
    """
    pid = os.fork()
    if pid:
        if seconds:
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)
    code = 99
    try:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        count_operations(watch, kill_at, log)
        Figure.savefig = write_placeholder
        code = importlib.import_module(name).cli(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def write_placeholder(figure: Figure, path: Path, **options: Any) -> None:
    """In place of Figure.savefig: the same file operations, without the drawing, which would take most of the time."""
    path.write_bytes(b"a picture")


def count_operations(watch: Path, kill_at: int, log: Path) -> None:
    """Watches this process' file operations under a folder: kills it before one, or writes down how many there are."""
    counter = itertools.count(1)
    count_file = os.open(log.with_suffix(".count"), os.O_CREAT | os.O_WRONLY)

    def hook(event: str, details: tuple) -> None:
        if event == "open":
            path, _, flags = details
            if not isinstance(flags, int) or not flags & WRITING:
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.truncate"):
            path = details[0]
        else:
            return
        if not str(path).startswith(str(watch)):
            return
        number = next(counter)
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.pwrite(count_file, str(number).encode(), 0)

    sys.addaudithook(hook)


# ---------------------------------------------------------------- trials
class Trials(NamedTuple):
    """What came of the trials of one script."""

    kind: str
    tried: int
    killed: int
    lost: list[str]


class Bench:
    """The trials of one script."""

    def __init__(self, name: str, script: Script, folder: Path, keep: bool):
        self.name, self.script, self.folder, self.keep = name, script, folder, keep
        self.number = 0
        whole = folder / f"{name}-whole"
        whole.mkdir()
        started = time.perf_counter()
        code = run_in_child(name, self.command(whole), folder / f"{name}.log", whole)
        self.seconds = time.perf_counter() - started
        if code:
            raise SystemExit(f"{name} does not run: {(folder / f'{name}.log').read_text()}")
        self.num_operations = int((folder / f"{name}.count").read_text())
        self.expected = script.result(whole)

    def command(self, folder: Path) -> list[str]:
        return [*self.script.flags, self.script.folder_flag, str(folder)]

    def trial(self, kill_at: int = 0, seconds: float = 0.0) -> tuple[bool, str | None]:
        """-> whether it was killed, and what was lost (None: nothing)"""
        self.number += 1
        folder = self.folder / f"{self.name}-{self.number}"
        folder.mkdir()
        log = folder.with_suffix(".log")
        code = run_in_child(self.name, self.command(folder), log, folder, kill_at, seconds)
        killed = code == -signal.SIGKILL
        lost = None if killed or not code else f"exit code {code} before it was killed"
        if killed:
            lost = self.go_on(folder, log)
        if lost is None:
            try:
                lost = difference(self.expected, self.script.result(folder))
            except Exception as error:
                lost = f"{type(error).__name__}: {error}"
        if lost is None or not self.keep:
            shutil.rmtree(folder)
        return killed, lost

    def go_on(self, folder: Path, log: Path) -> str | None:
        """Resumes, or begins again where nothing was saved: -> what went wrong"""
        command = self.command(folder)
        saved = [path.parent for path in folder.glob("*/latest.pt")]
        if self.name == "collect_data":
            command.append("--resume")
        elif saved:
            command = ["--resume", str(saved[0]), "--no-cuda"]
        code = run_in_child(self.name, command, log, folder)
        return f"--resume: exit code {code}: {log.read_text()[-300:]}" if code else None


def share_of_operations(benches: list[Bench], seconds: float) -> float:
    """The share of all file operations for which there is time: 1 if for all."""
    # A trial: up to a whole run, and what was left of it.
    needed = sum(bench.num_operations * 1.5 * bench.seconds for bench in benches)
    return min(1.0, seconds / needed)


def kill_at_operations(bench: Bench, share: float, until: float) -> Trials:
    """Kills before file operations, all of them or evenly spread ones, while there is time."""
    num_places = max(1, round(bench.num_operations * share))
    places = np.linspace(1, bench.num_operations, num_places).round().astype(int).tolist()
    in_time = itertools.takewhile(lambda _: time.perf_counter() < until, places)
    return collect_trials(f"file operations (of {bench.num_operations})", bench, in_time, "kill_at")


def kill_at_random(bench: Bench, seed: int, until: float) -> Trials:
    """Kills at random moments while there is time."""
    rng = random.Random(seed)
    moments = (rng.uniform(0, bench.seconds) for _ in itertools.count())
    in_time = itertools.takewhile(lambda _: time.perf_counter() < until, moments)
    return collect_trials("random moments", bench, in_time, "seconds")


def kill_all_at_random(benches: list[Bench], seed: int, end: float) -> int:
    """The time until `end` is shared between the scripts: -> how many trials were lost"""
    left = end - time.perf_counter()
    num_lost = 0
    for i, bench in enumerate(benches, 1):
        until = end - left * (len(benches) - i) / len(benches)
        num_lost += show(bench.name, kill_at_random(bench, seed, until))
    return num_lost


def collect_trials(kind: str, bench: Bench, values: Any, argument: str) -> Trials:
    tried, num_killed, lost = 0, 0, []
    for value in values:
        killed, what = bench.trial(**{argument: value})
        tried += 1
        num_killed += killed
        if what is not None:
            lost.append(f"{bench.name} {argument}={value}: {what}")
            print(f"LOST {lost[-1]}", file=sys.stderr)
    return Trials(kind, tried, num_killed, lost)


def show(name: str, trials: Trials) -> int:
    """Prints a row of the table: -> how many were lost"""
    lost = len(trials.lost)
    survived = trials.tried - lost
    print(f"| {name} | {trials.kind} | {trials.tried} | {trials.killed} | {survived} | {lost} |", flush=True)
    return lost


def main(args: Args) -> int:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    for name in (*args.scripts, *SLOW_IMPORTS):
        importlib.import_module(name)  # once: the children are forks
    data_folder = folder / "data"
    data_folder.mkdir()
    table = scripts(data_folder / "toy")
    flags = [*table["collect_data"].flags, "--data-dir", str(data_folder)]
    if run_in_child("collect_data", flags, folder / "data.log", data_folder):
        raise SystemExit((folder / "data.log").read_text())
    benches = [Bench(name, table[name], folder, args.keep) for name in args.scripts]
    end = time.perf_counter() + 60 * args.minutes
    print("| script | killed at | trials | killed | survived | lost |\n|---|---|---|---|---|---|")
    num_lost = 0
    if "operations" in args.kinds:
        share = share_of_operations(benches, 0.7 * 60 * args.minutes)
        for bench in benches:
            num_lost += show(bench.name, kill_at_operations(bench, share, end))
    if "random" in args.kinds:
        num_lost += kill_all_at_random(benches, args.seed, end)
    if not (num_lost and args.keep):
        shutil.rmtree(folder)
    return 1 if num_lost else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
