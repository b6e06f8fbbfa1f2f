"""How a run is kept: its folder, checkpoints, metrics, signals, limits of numbers, and the one command line.

Nothing here is an algorithm, and nothing here knows a script: arguments come as a dataclass of the caller's,
checkpoints as plain dicts. All scripts keep their runs through this file, so that a run of any of them is found,
stopped, resumed and read in the same way.
"""

from __future__ import annotations

import csv
import ctypes
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

# Of malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD and what keep_freed_memory sets them to, in bytes
MALLOC_OPTIONS = {-3: 32 << 20, -1: 1 << 30, -2: 64 << 20}


class UsageError(ValueError):
    """Something the user can put right: ends the command line with this one line and exit code 2."""


class Terminated(BaseException):
    """SIGTERM came where no StopSignal was listening."""


# ----------------------------------------------------------------------------------------- arguments


def check_limits(args: Any, limits: dict[str, tuple[Callable[[float], bool], str]]) -> None:
    """UsageError for a number that is not what `limits` asks for: {what it must be: (whether it is, names of flags)}.

    None, where a flag takes it, passes; NaN never does.
    """
    for limit, (holds, names) in limits.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise UsageError(f"{flag(name)} must be {limit}, got {value}")


def flag(name: str) -> str:
    """A field's name on the command line: num_envs -> --num-envs"""
    return "--" + name.replace("_", "-")


def restore_args(Args: type, saved: dict[str, Any], path: str | Path) -> Any:
    """The Args that a checkpoint or an args.json holds.

    Flags that no longer exist are dropped where they were unused (None, False, 0 or empty).
    UsageError: one of them was in use, or a flag without a default is missing.
    """
    known = {field.name: field for field in fields(Args)}
    gone = [name for name, value in saved.items() if name not in known and value]
    if gone:
        names = ", ".join(flag(name) for name in gone)
        raise UsageError(f"{path} was made with {names}, which no longer exists: train again, or use its version")
    needed = [name for name, field in known.items() if field.default is MISSING and name not in saved]
    if needed:
        raise UsageError(f"{path} does not say {', '.join(flag(name) for name in needed)}: give another run")
    return Args(**{name: value for name, value in saved.items() if name in known})


# ------------------------------------------------------------------------------------------- folders


def safe_name(text: str) -> str:
    """A part of a file name on every system: what is no letter, digit, dot, dash or underscore becomes a dash."""
    return re.sub(r"[^\w.-]+", "-", text)


def new_run_dir(runs_dir: str | Path, env_id: str, exp_name: str, seed: int) -> Path:
    """Makes runs/<env>__<script>__<seed>__<unix time>, a second later where another run has that name.

    UsageError: the folder cannot be written.
    """
    for stamp in itertools.count(int(time.time())):
        run_dir = Path(runs_dir) / f"{safe_name(env_id)}__{safe_name(exp_name)}__{seed}__{stamp}"
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except OSError as error:
            if run_dir.is_dir():
                continue  # another run was faster
            raise UsageError(
                f"cannot write the run folder {run_dir} ({error.strerror}): choose another --runs-dir"
            ) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes to a temporary file beside `path` and renames it: a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes to a temporary file beside `path` and renames it: a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, expected_format: str, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The checkpoint of a run folder (its latest.pt) or of a .pt file.

    UsageError: missing, unreadable, or of another script.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "latest.pt"
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}: give a run folder that holds latest.pt")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise UsageError(f"{path} is not a readable checkpoint ({type(error).__name__}): give another run") from error
    found = type(checkpoint).__name__
    if isinstance(checkpoint, dict):
        found = checkpoint.get("format")
    if found != expected_format:
        raise UsageError(f"{path} has format {found!r}, expected {expected_format!r}: give a run of this script")
    return checkpoint


def best_or_latest(path: str | Path) -> Path:
    """The best.pt of a run folder where there is one, else what was given."""
    best = Path(path) / "best.pt"
    return best if best.is_file() else Path(path)


# ------------------------------------------------------------------------------------------- metrics


class Metrics:
    """metrics.csv, a row per logged step, and the same numbers in TensorBoard.

    Names with a slash are TensorBoard tags, others are columns of the file only.
    """

    def __init__(
        self,
        run_dir: Path,
        step_name: str,
        columns: list[str] | None = None,
        args: dict[str, Any] | None = None,
        keep_until: int | None = None,
    ):
        """columns: None takes those of the first row; keep_until: the last step of a resumed run, later rows go."""
        self.path, self.step_name, self.columns = run_dir / "metrics.csv", step_name, columns
        self.file = None
        purge_step = None if keep_until is None else keep_until + 1
        self.writer = SummaryWriter(str(run_dir), purge_step=purge_step)
        if args is not None:
            table = "\n".join(f"|{name}|{value}|" for name, value in args.items())
            self.writer.add_text("args", f"|flag|value|\n|-|-|\n{table}")
        kept = []
        if keep_until is not None and self.path.exists():
            rows = read_metrics(run_dir)
            kept = [row for row in rows if int(row[step_name]) <= keep_until]
        if kept:
            self.columns = self.columns or list(kept[0])
        if self.columns:
            self.open(kept)

    def open(self, kept: list[dict[str, str]]) -> None:
        """Writes the header and the kept rows, and leaves the file open for more."""
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, self.columns)
            table.writeheader()
            table.writerows(kept)
        os.replace(temporary, self.path)
        self.file = open(self.path, "a", newline="", buffering=1, encoding="utf-8")
        self.table = csv.DictWriter(self.file, self.columns)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One row. What is not finite stands in the file, but not in TensorBoard."""
        row = {self.step_name: step, **values}
        if self.file is None:
            self.columns = list(row)
            self.open([])
        self.table.writerow(row)
        for tag, value in values.items():
            if "/" in tag and math.isfinite(value):
                self.writer.add_scalar(tag, value, step)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.writer.close()


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, as they are written: every value a string, empty where a row has none."""
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Panel(NamedTuple):
    """One plot of a learning curve."""

    title: str
    ylabel: str
    lines: dict[str, list[float]]  # label -> a value for every x; NaN leaves a gap
    log_scale: bool = False


def plot_learning_curve(path: Path, x: list[float], xlabel: str, panels: list[Panel]) -> None:
    """Writes a picture with the panels side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (7 * len(panels), 4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=True):
        for label, y in panel.lines.items():
            axis.plot(x, y, label=label)
        axis.set(title=panel.title, xlabel=xlabel, ylabel=panel.ylabel)
        axis.grid(alpha=0.3)
        if panel.log_scale:
            axis.set_yscale("log")
        if len(panel.lines) > 1:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def start_wandb(run_dir: Path, project: str, entity: str | None, config: dict[str, Any]) -> None:
    """Mirrors the TensorBoard log; without a login the run is logged offline instead of asking for a key."""
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None and not wandb.login(prompt=False):
        mode = "offline"
        print(f"W&B: no login found, logging offline; upload with: wandb sync {run_dir / 'wandb' / 'offline-run-*'}")
    wandb.init(
        project=project,
        entity=entity,
        name=run_dir.name,
        dir=run_dir,
        config=config,
        sync_tensorboard=True,
        mode=mode,
    )


# ------------------------------------------------------------------------------------------- signals


class StopSignal:
    """Ctrl-C and SIGTERM let the step under way finish, so that the run can be saved; a second Ctrl-C stops at once.

    unit: what is finished first, "update" say.
    """

    def __init__(self, unit: str = "update"):
        self.requested, self.unit = False, unit
        self.previous = {number: signal.signal(number, self.request) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"\nstopping after this {self.unit} (Ctrl-C again: at once, losing it)", file=sys.stderr)

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------- machine


def get_device(cuda: bool) -> torch.device:
    """The GPU if it is wanted and there is one, else the CPU."""
    return torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Tells glibc to hand freed memory to the next tensor instead of to the system; elsewhere does nothing.

    The system gives memory back page by page and zeroed, which took a fifth of an update's time on a CPU.
    """
    try:
        libc = ctypes.CDLL(None)
        for option, size in MALLOC_OPTIONS.items():
            libc.mallopt(option, size)
    except (AttributeError, OSError, TypeError):
        pass


def compile_works(device: torch.device) -> bool:
    """Tries torch.compile on one small function; where it fails (no C++ compiler, say) prints why in one line."""
    try:
        torch.compile(lambda x: (x * 2).sin())(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing: training goes on without it
        print(f"--compile does not work here ({type(error).__name__}), going on without")
        return False
    return True


def count_multiply_adds(function: Callable[[], Any]) -> int:
    """Multiply-adds of all matrix products in one call."""
    missing = {  # what PyTorch's own table of operations leaves out
        torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]
    }
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        function()
    return counter.get_total_flops() // 2


# -------------------------------------------------------------------------------------- command line


def command_line(
    Args: type,
    main: Callable[[Any], Any],
    limits: dict[str, tuple[Callable[[float], bool], str]],
    argv: list[str] | None = None,
    saved_run: Callable[[Any], tuple[Any, Iterable[str]] | None] | None = None,
) -> int:
    """Parses the arguments and calls main(args): -> the exit code.

    0 done, or stopped and saved; 1 the run broke down; 2 unusable arguments (one line); 130 and 143 interrupted where
    nothing was listening. An int that main returns is the exit code. Any other error is the program's own, and keeps
    its traceback.

    saved_run(args) -> None, or for a run folder that the arguments name: its Args, which become the defaults, and the
    names of the flags that must not contradict them.
    """
    argv = sys.argv[1:] if argv is None else argv
    previous = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        args = tyro.cli(Args, args=argv)
        saved = saved_run(args) if saved_run else None
        if saved is not None:
            defaults, fixed = saved
            args = tyro.cli(Args, args=argv, default=defaults)
            refuse_contradictions(args, defaults, fixed)
        check_limits(args, limits)
        result = main(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("terminated", file=sys.stderr)
        return 143
    finally:
        signal.signal(signal.SIGTERM, previous)
    return result if isinstance(result, int) else 0


def raise_terminated(number: int, frame: object) -> None:
    raise Terminated


def refuse_contradictions(args: Any, saved: Any, fixed: Iterable[str]) -> None:
    """UsageError where a flag was given another value than the run folder has."""
    for name in fixed:
        given, has = getattr(args, name), getattr(saved, name)
        if given != has:
            raise UsageError(
                f"{flag(name)} {given} contradicts the checkpoint's {has}: leave it out, or start a new run"
            )
