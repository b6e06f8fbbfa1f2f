"""How a run is kept: its folder, checkpoints, metrics, signals, limits of numbers, and the one command line.

Nothing here is an algorithm, and nothing here knows a script: arguments come as a dataclass of the caller's,
checkpoints as plain dicts. All scripts keep their runs through this file, so that a run of any of them is found,
stopped, resumed and read in the same way.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import errno
import functools
import io
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import sys
import threading
import time
import traceback
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

# Of malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD and what keep_freed_memory sets them to, in bytes
MALLOC_OPTIONS = {-3: 32 << 20, -1: 1 << 30, -2: 64 << 20}
MAX_NAME_BYTES = 200  # of what a user names; with what is added a file name stays below the 255 of most systems
# What the system says when there is no room or no permission: not the program's fault
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

MAY_BE_INFINITE = ("max_grad_norm", "target_kl", "huber_delta")  # infinity turns them off
# Arguments of an env that scripts give it themselves
ENV_FLAGS = {
    "seed": "use --seed",
    "num_envs": "use --num-envs",
    "num_env_procs": "use --num-env-procs",
    "backend": "use --backend",
    "device": "use --cuda or --no-cuda",
    "render_mode": "pictures are drawn with --capture-video",
}


class UsageError(ValueError):
    """Something the user can put right: ends the command line with this one line and exit code 2."""


class RunError(RuntimeError):
    """The run cannot go on, through no fault of the program (a full disk, a broken env): one line and exit code 1.

    The line ends with what is saved and how to go on. Raised `from` another error, that one's traceback goes to
    error.log in the run folder.
    """


class EnvError(RunError):
    """An env does what no env may do. traceback: its own, for error.log; empty where it raised nothing."""

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback


class Terminated(BaseException):
    """SIGTERM came where no StopSignal was listening."""


# ----------------------------------------------------------------------------------------- arguments


def check_limits(args: Any, limits: dict[str, tuple[Callable[[float], bool], str]]) -> None:
    """UsageError for a number that is not what `limits` asks for: {what it must be: (whether it is, names of flags)}.

    None, where a flag takes it, passes; NaN never does, infinity for MAY_BE_INFINITE only.
    """
    for limit, (holds, names) in limits.items():
        for name in names.split():
            value = getattr(args, name)
            if value is None:
                continue
            is_infinite = math.isinf(value) and name not in MAY_BE_INFINITE
            if is_infinite or not holds(value):
                finite = "a finite number, " if is_infinite and holds(value) else ""
                raise UsageError(f"{flag(name)} must be {finite}{limit}, got {value}")


def parse_env_kwargs(text: str) -> dict[str, Any]:
    """--env-kwargs. UsageError: no JSON object, or arguments that have flags of their own."""
    try:
        env_kwargs = json.loads(text)
    except json.JSONDecodeError:
        env_kwargs = None
    if not isinstance(env_kwargs, dict):
        raise UsageError(
            f"--env-kwargs must be arguments by name in JSON, like '{{\"max_cycles\": 100}}', got {text!r}"
        )
    for name in env_kwargs.keys() & ENV_FLAGS.keys():
        raise UsageError(f"--env-kwargs may not hold {name}: {ENV_FLAGS[name]}")
    return env_kwargs


def flag(name: str) -> str:
    """A field's name on the command line: num_envs -> --num-envs"""
    return "--" + name.replace("_", "-")


def given_flags(args: Any) -> list[str]:
    """The flags that give these arguments: those that are not as by default."""
    flags = []
    for field in fields(args):
        value = getattr(args, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            name = flag(field.name) if value else flag(f"no_{field.name}")
            flags.append(name)
        elif isinstance(value, (tuple, list)):
            flags += [flag(field.name), *map(str, value)]
        else:
            flags += [flag(field.name), str(value)]
    return flags


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
    """A part of a file name on every system: what is no letter (of any script), number, dot, dash or underscore
    becomes a dash.

    UsageError: longer than a file system takes.
    """
    kept = []
    for character in text:
        is_word = unicodedata.category(character)[0] in "LMN"  # letters, the marks that go with them, numbers
        ok = is_word or character in "._-"
        if ok or kept[-1:] != ["-"]:
            kept.append(character if ok else "-")
    name = "".join(kept)
    if not name.strip("-."):
        raise UsageError(f"the name {text!r} holds no letter or number: give another one")
    size = len(name.encode())
    if size > MAX_NAME_BYTES:
        raise UsageError(f"the name {name[:20]}... takes {size} bytes, at most {MAX_NAME_BYTES}: give a shorter one")
    return name


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
            if os.path.isdir(run_dir):
                continue  # another run was faster
            instead = "choose another --runs-dir"
            if error.errno == errno.ENAMETOOLONG:
                instead = "give a shorter --exp-name"
            raise UsageError(f"cannot write the run folder {run_dir} ({error.strerror}): {instead}") from None


@dataclass
class KeptFolder:
    """A folder that this process alone writes in, and what stands in the line that a run ends with before its time."""

    path: Path
    again: str
    """the command that goes on from what is saved"""
    lock_path: Path
    lock: io.FileIO | None
    saved: str = ""
    """what a crash leaves behind, "update 12 of 100" say; empty: nothing yet"""

    def release(self, finished: bool = True) -> None:
        """Lets others write. After `finished` False the folder still has its say in the line of command_line."""
        if self.lock is not None:
            with contextlib.suppress(OSError):
                if os.name == "nt":  # deletes no open file
                    self.lock.close()
                self.lock_path.unlink(missing_ok=True)
            self.lock.close()
            self.lock = None
        if finished and self in KEPT:
            KEPT.remove(self)

    def how_to_go_on(self) -> str:
        if self.saved:
            return f"{self.saved} saved in {self.path}; go on with: {self.again}"
        return f"nothing saved yet in {self.path}"


KEPT: list[KeptFolder] = []  # by this process: an interrupt finds here what to say


def keep_folder(folder: Path, again: str, lock_path: Path | None = None) -> KeptFolder:
    """Locks a folder until `release`, at the latest until the `run_keeping` main or the process ends, however it ends.

    again: the command that goes on with what is in it; lock_path: where the folder itself is to be renamed.
    UsageError: another process writes there, or nobody can.
    """
    lock_path = lock_path or folder / "run.lock"
    while True:
        try:
            lock = open(lock_path, "ab", buffering=0)
        except OSError as error:
            raise UsageError(f"cannot write in {folder} ({error.strerror}): make it writable") from None
        if not lock_file(lock):
            lock.close()
            raise UsageError(f"another process is writing in {folder}: wait until it is done, or stop it")
        # Whoever had the lock before may have deleted the file since it was opened.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock_path)):
                break
        lock.close()
    for old in KEPT[:]:
        if old.lock is None:
            KEPT.remove(old)
    remove_leftovers(folder)
    kept = KeptFolder(folder, again, lock_path, lock)
    KEPT.append(kept)
    return kept


def lock_file(file: io.FileIO) -> bool:
    """Whether the file is now locked by this process. Locks die with their process, and no child inherits them.

    True also on file systems that know no locks.
    """
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(1 << 30)  # (what is locked cannot be read: a place without content)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files of writers that were killed."""
    for path in folder.glob("*.tmp.*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 60:  # --evaluate writes without the lock, but not for that long
                path.unlink()


def run_keeping(main: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorator of a script's main: when it returns or raises, its folders are released, and signals are as before."""

    @functools.wraps(main)
    def wrapped(args: Any) -> Any:
        previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        finished = False
        try:
            result = main(args)
            finished = True
        finally:
            for kept in KEPT[:]:
                kept.release(finished)
            for number, handler in previous.items():
                signal.signal(number, handler)
        return result

    return wrapped


def command(script: str, *flags: str | Path) -> str:
    """A command line to type: python SCRIPT FLAGS. script: the script's __file__"""
    with contextlib.suppress(ValueError):  # on Windows: on another drive
        script = os.path.relpath(script)
    return " ".join(["python", *(shlex.quote(str(part)) for part in (script, *flags))])


# --------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; afterwards it is on the disk as `path`.

    Whatever happens in between, `path` is what it was or what it is to be. RunError: it cannot be written.
    """
    temporary = path.with_name(f"{path.stem[:80]}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        sync_to_disk(temporary)
        os.replace(temporary, path)
        sync_to_disk(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def cannot_write(path: str | Path, error: OSError) -> RunError:
    return RunError(f"could not write {path}: {(error.strerror or str(error)).lower()}")


def sync_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk: a power cut takes neither back."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # (Windows opens no folders)
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise  # (some network file systems sync no folders)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """As whole_file."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As whole_file."""
    text = json.dumps(content, indent=2)
    write_bytes(path, text.encode())


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Writes a matplotlib figure as whole_file does, and closes it."""
    import matplotlib.pyplot as plt

    try:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=dpi)
    finally:
        plt.close(figure)


# --------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """As whole_file."""
    buffer = io.BytesIO()  # (torch.save to a file hides why writing failed)
    torch.save(checkpoint, buffer)
    write_bytes(path, buffer.getbuffer())


def load_checkpoint(
    path: str | Path,
    expected_format: str,
    device: str | torch.device = "cpu",
    needs: Iterable[str] = (),
) -> dict[str, Any]:
    """The checkpoint of a run folder (its latest.pt) or of a .pt file.

    UsageError: missing, unreadable, damaged (its checksums are compared), of another script, or without one of `needs`.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "latest.pt"
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}: give a run folder that holds latest.pt")
    try:
        content = io.BytesIO(path.read_bytes())
        check_zip(content)
        checkpoint = torch.load(content, map_location=device, weights_only=True)
    except Exception as error:  # whatever a damaged file makes the reader raise
        reason = str(error) if isinstance(error, DamagedFile) else type(error).__name__
        raise UsageError(f"{path} is not a readable checkpoint ({reason}): give another run") from error
    found = type(checkpoint).__name__
    if isinstance(checkpoint, dict):
        found = checkpoint.get("format")
    if found != expected_format:
        raise UsageError(f"{path} has format {found!r}, expected {expected_format!r}: give a run of this script")
    missing = [name for name in needs if name not in checkpoint]
    if missing:
        raise UsageError(f"{path} holds no {', '.join(missing)}: it is damaged, give another run")
    return checkpoint


class DamagedFile(ValueError):
    """The content is not what was written."""


def check_zip(content: io.BytesIO) -> None:
    """Compares every part of a checkpoint, which is a zip file, with its checksum. DamagedFile: one differs."""
    with zipfile.ZipFile(content) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise DamagedFile(f"damaged: the checksum of its part {damaged} is wrong")
    content.seek(0)


def load_weights(part: Any, state: Any, path: str | Path) -> None:
    """part.load_state_dict(state), of a module or an optimizer.

    path: where the state is from. UsageError: other names or shapes than the part has, or numbers that are none.
    """
    name = type(part).__name__
    problem = None
    if not isinstance(state, dict):
        problem = f"is a {type(state).__name__}, expected weights by name"
    elif isinstance(part, torch.nn.Module):
        problem = compare_weights(part.state_dict(), state)
    if problem is None:
        bad = first_non_finite(state)
        problem = None if bad is None else f"is NaN or infinite at {bad}"
    if problem is None:
        try:
            part.load_state_dict(state)
            return
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
            problem = f"does not fit ({' '.join(str(error).split())[:200]})"
    raise UsageError(f"{path}: its {name} {problem}: give a run of the same sizes that is not damaged")


def compare_weights(expected: dict[str, Any], given: dict[str, Any]) -> str | None:
    """What is wrong with a module's weights; None: they have the names and shapes that are expected."""
    for name, tensor in expected.items():
        if name not in given:
            return f"lacks {name}"
        shape = list(getattr(given[name], "shape", []))
        if isinstance(tensor, torch.Tensor) and shape != list(tensor.shape):
            return f"has {name} of shape {shape}, expected {list(tensor.shape)}"
    unknown = [name for name in given if name not in expected]
    if unknown:
        return f"has {unknown[0]}, which is not known here"
    return None


def first_non_finite(tree: Any, place: str = "") -> str | None:
    """Where in nested dicts and lists a tensor is not finite; None: nowhere."""
    if isinstance(tree, torch.Tensor):
        bad = tree.is_floating_point() and not tree.isfinite().all()
        return (place or "its only value") if bad else None
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    for name, value in items:
        found = first_non_finite(value, f"{place}.{name}" if place else str(name))
        if found:
            return found
    return None


def best_or_latest(path: str | Path) -> Path:
    """The best.pt of a run folder where there is one (else says so), or the file that was given."""
    path = Path(path)
    best = path / "best.pt"
    if best.is_file():
        return best
    if (path / "latest.pt").is_file():
        print(f"{path} has no best.pt: its latest.pt is taken, which may be worse", file=sys.stderr)
    return path


# ------------------------------------------------------------------------------------------- metrics


class Metrics:
    """metrics.csv, a row per logged step, and the same numbers in TensorBoard.

    Names with a slash are TensorBoard tags, others are columns of the file only. RunError: it cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        step_name: str,
        columns: list[str] | None = None,
        args: dict[str, Any] | None = None,
        keep_until: int | None = None,
    ):
        """columns: None takes those of the first row; keep_until: the last step of a resumed run, later rows go.

        Rows that are damaged, or missing up to there, are left out and said.
        """
        self.path, self.step_name, self.columns = run_dir / "metrics.csv", step_name, columns
        self.file = None
        purge_step = None if keep_until is None else keep_until + 1
        kept = []
        if keep_until is not None:
            kept = self.keep_rows(keep_until)
        self.writer = SummaryWriter(str(run_dir), purge_step=purge_step)
        if args is not None:
            table = "\n".join(f"|{name}|{value}|" for name, value in args.items())
            self.writer.add_text("args", f"|flag|value|\n|-|-|\n{table}")
        if kept:
            self.columns = self.columns or list(kept[0])
        if self.columns:
            self.open(kept)

    def keep_rows(self, keep_until: int) -> list[dict[str, str]]:
        """The rows up to a step; says what is not as it should be."""
        rows, num_damaged = read_rows(self.path, self.step_name)
        if num_damaged:
            print(f"{self.path}: {num_damaged} damaged rows are left out", file=sys.stderr)
        kept = [row for row in rows if int(row[self.step_name]) <= keep_until]
        steps = [0, *(int(row[self.step_name]) for row in kept), keep_until]
        for first, last in gaps(steps):
            print(f"{self.path}: rows are missing between {self.step_name} {first} and {last}", file=sys.stderr)
        return kept

    def open(self, kept: list[dict[str, str]]) -> None:
        """Writes the header and the kept rows, and leaves the file open for more."""
        with whole_file(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, self.columns, extrasaction="ignore")
            table.writeheader()
            table.writerows(kept)
        try:
            self.file = open(self.path, "a", newline="", buffering=1, encoding="utf-8")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.table = csv.DictWriter(self.file, self.columns)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One row. What is not finite stands in the file, but not in TensorBoard."""
        row = {self.step_name: step, **values}
        if self.file is None:
            self.columns = list(row)
            self.open([])
        try:
            self.table.writerow(row)
            for tag, value in values.items():
                if "/" in tag and math.isfinite(value):
                    self.writer.add_scalar(tag, value, step)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def sync(self) -> None:
        """Before a checkpoint is written: its rows are on the disk."""
        if self.file is not None:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                raise cannot_write(self.path, error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what matters was synced with the last checkpoint
            if self.file is not None:
                self.file.close()
            self.writer.close()


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, as they are written: every value a string, empty where a row has none.

    Damaged rows are left out.
    """
    rows, _ = read_rows(run_dir / "metrics.csv")
    return rows


def read_rows(path: Path, step_name: str | None = None) -> tuple[list[dict[str, str]], int]:
    """The sound rows of a table of numbers, and how many others there are (without its step, or half written)."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return [], 0
    lines = text.split("\n")
    columns = next(csv.reader(lines[:1]), [])
    if step_name is not None and step_name not in columns:
        return [], sum(1 for line in lines if line)
    rows, num_damaged = [], 0
    is_whole = text.endswith("\n")  # the last line was written to its end
    last = len(lines) if is_whole else len(lines) - 1
    for i, line in enumerate(lines[1:], 1):
        values = next(csv.reader([line.rstrip("\r")]), [])
        row = dict(zip(columns, values, strict=False))
        if i < last and len(values) == len(columns) and is_row_of_numbers(row, step_name):
            rows.append(row)
        elif line:
            num_damaged += 1
    return rows, num_damaged


def is_row_of_numbers(row: dict[str, str], step_name: str | None) -> bool:
    """Whether every value is a number or empty, and the step a whole number."""
    try:
        for value in row.values():
            float(value or "nan")
        if step_name is not None:
            int(row[step_name])
    except ValueError:
        return False
    return True


def gaps(steps: list[int]) -> list[tuple[int, int]]:
    """Neighbours that are further apart than is usual in a list of steps."""
    pairs = list(itertools.pairwise(steps))
    usual = statistics.median([last - first for first, last in pairs[:-1]] or [0])
    if len(steps) == 2:
        return [(first, last) for first, last in pairs if last > first]
    return [(first, last) for first, last in pairs if last - first > 1.5 * usual]


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
    save_figure(figure, path, dpi=110)


def start_wandb(run_dir: Path, project: str, entity: str | None, config: dict[str, Any]) -> None:
    """Mirrors the TensorBoard log; without a login the run is logged offline instead of asking for a key.

    A resumed run goes on in its W&B run: wandb.json says which that is.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None and not wandb.login(prompt=False):
        mode = "offline"
        print(f"W&B: no login found, logging offline; upload with: wandb sync {run_dir / 'wandb' / 'offline-run-*'}")
    remembered = run_dir / "wandb.json"
    run_id = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        run_id = json.loads(remembered.read_text(encoding="utf-8"))["id"]
    if run_id is None:
        run_id = os.urandom(6).hex()
        write_json(remembered, {"id": run_id, "project": project, "entity": entity})
    wandb.init(
        project=project,
        entity=entity,
        name=run_dir.name,
        id=run_id,
        resume="allow",
        dir=run_dir,
        config=config,
        sync_tensorboard=True,
        mode=mode,
    )


# ------------------------------------------------------------------------------------------- signals


class StopSignal:
    """Ctrl-C and SIGTERM let the step under way finish, so that the run can be saved; a second one stops at once.

    unit: what is finished first, "update" say.
    """

    def __init__(self, unit: str = "update"):
        self.requested, self.unit = False, unit
        self.previous = {number: signal.signal(number, self.request) for number in STOP_SIGNALS}

    def request(self, number: int, frame: object) -> None:
        self.requested = True
        for other in STOP_SIGNALS:
            signal.signal(other, raise_stop)
        print(f"\nstopping after this {self.unit} (again: at once, losing it)", file=sys.stderr)

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def raise_stop(number: int, frame: object) -> None:
    """Ends whatever is under way, by an exception that command_line waits for; the next signal does not wait."""
    for other in STOP_SIGNALS:
        signal.signal(other, exit_at_once)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated


def exit_at_once(number: int, frame: object) -> None:
    """Nothing is cleaned up but the child processes."""
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)


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

    0 done, or stopped and saved as asked; 1 the run broke down; 2 unusable arguments; 130 and 143 interrupted by Ctrl-C
    and SIGTERM before it was done. All but 0 say in one line why, what is saved and how to go on. An int that main
    returns is the exit code. Any other error is the program's own, and keeps its traceback.

    saved_run(args) -> None, or for a run folder that the arguments name: its Args, which become the defaults, and the
    names of the flags that must not contradict them.
    """
    argv = sys.argv[1:] if argv is None else argv

    def parse_and_run() -> Any:
        args = tyro.cli(Args, args=argv)
        saved = saved_run(args) if saved_run else None
        if saved is not None:
            defaults, fixed = saved
            args = tyro.cli(Args, args=argv, default=defaults)
            refuse_contradictions(args, defaults, fixed)
        check_limits(args, limits)
        return main(args)

    return one_line_errors(parse_and_run)


def one_line_errors(program: Callable[[], Any]) -> int:
    """program() -> the exit code, as command_line has it; errors that are not the program's own are one line."""
    previous = {number: signal.signal(number, raise_stop) for number in STOP_SIGNALS}
    previous_hook = threading.excepthook
    threading.excepthook = without_full_disks
    show_what_the_terminal_can()
    KEPT.clear()
    try:
        result = program()
        print(end="", flush=True)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return nobody_reads()
    except (RunError, FloatingPointError) as error:
        return broke_down(str(error), traceback_of(error))
    except KeyboardInterrupt:
        print("; ".join(["interrupted", *how_to_go_on()]), file=sys.stderr)
        return 130
    except Terminated:
        print("; ".join(["terminated", *how_to_go_on()]), file=sys.stderr)
        return 143
    except (MemoryError, OSError, RuntimeError) as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            print(f"error: {str(error.filename)[:60]}...: file name too long", file=sys.stderr)
            return 2
        reason = fault_of_the_machine(error)
        if reason is None:
            raise
        return broke_down(reason)
    finally:
        KEPT.clear()
        threading.excepthook = previous_hook
        for number, handler in previous.items():
            signal.signal(number, handler)
    return result if isinstance(result, int) else 0


def nobody_reads() -> int:
    """The end of a program whose output goes into a pipe that was closed (`... | head`): -> the exit code."""
    # What is still in stdout's buffer would be written at the interpreter's end, and fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if KEPT:
        print("; ".join(["stopped, nobody reads the output", *how_to_go_on()]), file=sys.stderr)
    return 1


def how_to_go_on() -> list[str]:
    return [kept.how_to_go_on() for kept in KEPT]


def traceback_of(error: Exception) -> str:
    """What error.log should hold of an error of others; empty: nothing worth it."""
    if isinstance(error, EnvError) and error.traceback:
        return error.traceback
    cause = error.__cause__
    if cause is None or isinstance(cause, OSError):
        return ""
    return "".join(traceback.format_exception(cause))


def broke_down(reason: str, details: str = "") -> int:
    """One line, and the details in error.log, where there is a run folder: -> the exit code"""
    parts = [f"error: {reason}"]
    for kept in KEPT:
        if details:
            path = kept.path / "error.log"
            with contextlib.suppress(OSError):
                path.write_text(details, encoding="utf-8")
                parts.append(f"see {path}")
    print("; ".join([*parts, *how_to_go_on()]), file=sys.stderr)
    return 1


def fault_of_the_machine(error: Exception) -> str | None:
    """What to say of a full disk or memory; None: it is something else."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        if error.errno not in NO_ROOM:
            return None
        return str(cannot_write(error.filename or "a file", error))
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or "can't allocate memory" in text or "not enough memory" in text:
        return f"out of memory ({text[:120] or 'no room for an array'}): make the run smaller"
    return None


def without_full_disks(args: threading.ExceptHookArgs) -> None:
    """threading.excepthook without the tracebacks of background writers (TensorBoard's) on a full disk.

    The main thread says it in a line of its own.
    """
    if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in NO_ROOM):
        threading.__excepthook__(args)


def show_what_the_terminal_can() -> None:
    """A terminal without a character like ± gets a question mark instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def refuse_contradictions(args: Any, saved: Any, fixed: Iterable[str]) -> None:
    """UsageError where a flag was given another value than the run folder has."""
    for name in fixed:
        given, has = getattr(args, name), getattr(saved, name)
        if given != has:
            raise UsageError(
                f"{flag(name)} {given} contradicts the checkpoint's {has}: leave it out, or start a new run"
            )
