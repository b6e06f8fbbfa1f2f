"""The one on-disk format of collected data: a folder with `meta.json` and one `.npy` file per field.

One row is one env step with the *joint* action, so actions can not slip against observations. Rows of an episode lie
together in time order, and only whole episodes are stored. S rows, E episodes, A agents, *O observation, *S state:

    observations       [S, A, *O]  what each agent saw before the step; zero for agents that have left
    next_observations  [S, A, *O]  what it saw after the step (the true last one where the episode ended)
    states             [S, *S]     global state before the step
    actions            [S, A]      int64, as executed, -1 for agents that have left; of several parts (MultiDiscrete):
                                   [S, A, D]; continuous: float32 [S, A, D], 0
    rewards            [S, A]      float32
    terminations       [S, A]      bool, the rules ended this agent's episode in this step
    truncations        [S]         bool, the time limit was hit in this step
    active             [S, A]      bool, the agent took part in this step
    action_masks       [S, A, n]   bool, legal actions (only where the env has a mask); parts side by side
    timesteps          [S]         int64, 0 at the start of each episode
    episode_ids        [S]         int64, 0, 0, ..., 1, 1, ...
    policy_ids         [S, A]      int64, index into meta["policies"]: who sat in that seat
    values             [S, A]      float32, what a critic expects from the step on; 0 for agents that have left
                                   (only where one was asked, meta["values_of"])

`python -m dataset data/NAME` prints and validates a dataset.
"""

from __future__ import annotations

import startup  # noqa: F401

# isort: split

import contextlib
import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from torch import Tensor

from envs.grid_game import ego_order
from runs import RunError, UsageError, cannot_write, keep_folder, one_line_errors, sync_to_disk, write_json

FORMAT = "marl-dataset"
VERSION = 1
SPLITS = ("train", "heldout_episodes", "heldout_policies")
CHUNK_BYTES = 64 * 2**20  # how much of a large field is looked at in one go
COMMIT_SECONDS = 10.0  # how often finished episodes are committed
PACKAGES = ("numpy", "torch", "gymnasium", "pettingzoo")
# What of the meta a continued collection may change
GROWING = {"num_steps", "num_episodes", "versions", "segment", "checksums"}
LARGE = ("observations", "next_observations", "states")  # not read by load_dataset

Meta = dict[str, Any]
Rows = dict[str, np.ndarray]  # field -> [N, ...]


def make_meta(
    env_id: str,
    env_kwargs: dict,
    num_agents: int,
    obs_shape: tuple[int, ...],
    obs_dtype: str,
    state_shape: tuple[int, ...],
    state_dtype: str,
    num_actions: int | None,
    action_shape: tuple[int, ...],
    has_masks: bool,
    policies: list[str],
    seed: int,
    values_of: str | None = None,
    nvec: list[int] | None = None,
) -> Meta:
    """Everything that is known about a dataset before its first row.

    num_actions is None for continuous actions and for those of several parts, whose numbers of actions are nvec;
    values_of is the run whose critic fills `values`.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "env_id": env_id,
        "env_kwargs": env_kwargs,
        "num_agents": num_agents,
        "obs_shape": list(obs_shape),
        "obs_dtype": obs_dtype,
        "state_shape": list(state_shape),
        "state_dtype": state_dtype,
        "num_actions": num_actions,
        "nvec": nvec,
        "action_shape": list(action_shape),
        "has_masks": has_masks,
        "has_values": values_of is not None,
        "values_of": values_of,
        "policies": list(policies),
        "seed": seed,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "num_steps": 0,
        "num_episodes": 0,
        "checksums": {},
    }


class Field(NamedTuple):
    """Type and shape of one row of a field."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def row_fields(meta: Meta) -> dict[str, Field]:
    """Every field of a dataset by its name."""
    agents = (meta["num_agents"],)
    obs_shape = agents + tuple(meta["obs_shape"])
    action_shape = agents + tuple(meta["action_shape"])
    continuous = is_continuous(meta)
    fields = {
        "observations": (meta["obs_dtype"], obs_shape),
        "next_observations": (meta["obs_dtype"], obs_shape),
        "states": (meta["state_dtype"], tuple(meta["state_shape"])),
        "actions": ("float32" if continuous else "int64", action_shape),
        "rewards": ("float32", agents),
        "terminations": ("bool", agents),
        "truncations": ("bool", ()),
        "active": ("bool", agents),
        "timesteps": ("int64", ()),
        "episode_ids": ("int64", ()),
        "policy_ids": ("int64", agents),
    }
    if meta["has_masks"]:
        fields["action_masks"] = ("bool", agents + (sum(actions_of_parts(meta)),))
    if meta.get("has_values"):  # older datasets do not say
        fields["values"] = ("float32", agents)
    return {name: Field(np.dtype(dtype), shape) for name, (dtype, shape) in fields.items()}


def is_continuous(meta: Meta) -> bool:
    return meta["num_actions"] is None and not meta.get("nvec")


def actions_of_parts(meta: Meta) -> list[int]:
    """How many actions each part of an action has; one part for plain discrete actions."""
    return meta.get("nvec") or [meta["num_actions"]]


class DatasetWriter:
    """Streams rows to `<path>.partial`, which becomes `path` in one rename when `close` is called.

    What is held in memory are the episodes in flight. Files only grow, and `progress.json` says how much of them is
    whole, committed episodes, and where in the collection's random numbers they are (`segment`). A killed collection
    is continued from there with `resume=True`; where nothing was committed it begins, where all was it is done
    (`finished`). Until `close` or `release` no other process may write there.

    UsageError: `path` or an unfinished collection is in the way, the latter is a different one, or another process is
    writing. RunError: NaN or infinity in a row, or a full disk.
    """

    def __init__(
        self,
        path: str | Path,
        meta: Meta,
        num_envs: int,
        resume: bool = False,
        again: str = "python collect_data.py --resume",
    ):
        """again: the command that continues the collection"""
        self.path = Path(path)
        self.meta = dict(meta)
        self.fields = row_fields(meta)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.files: dict[str, BinaryIO] = {}
        self._make_folder(self.path.parent)
        self.kept = keep_folder(self.partial, again, self.path.with_name(self.path.name + ".lock"))
        try:
            self._open(resume)
        except (UsageError, RunError):
            self.release()
            raise
        self.steps: list[Rows] = []  # the latest joint steps of all envs, oldest first
        self.starts = np.zeros(num_envs, np.int64)  # where in `steps` each env's episode began
        self.to_skip = self.meta["num_episodes"] - self.segment["first_episode"]  # committed before a kill
        self.last_commit = time.monotonic()
        if not self.finished:
            self.flush()

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write the folder {folder} ({error.strerror}): choose another") from None

    def _open(self, resume: bool) -> None:
        """Finds out where to begin, and opens the files there."""
        self.finished = False
        self.meta["segment"] = {"number": 0, "first_episode": 0, "first_step": 0}
        if resume and self.path.exists():
            self._continue(self.path / "meta.json")
            self.finished = True
            return
        if self.path.exists():
            raise UsageError(f"expected a new dataset folder, but {self.path} exists; choose another name or delete it")
        if resume and (self.partial / "meta.json").exists():  # killed between the last two steps of close
            self._continue(self.partial / "meta.json")
            self._rename()
            self.finished = True
            return
        if resume and (self.partial / "progress.json").exists():
            self._continue(self.partial / "progress.json")
        elif not resume and self.partial.exists():
            raise UsageError(f"{self.partial} holds an unfinished collection; continue it with --resume or delete it")
        self._make_folder(self.partial)
        for name, field in self.fields.items():
            file_path = self.partial / f"{name}.npy"
            mode = "r+b" if file_path.exists() else "w+b"
            with self._full_disk_in_one_line():
                self.files[name] = open(file_path, mode)
            self._check_length(name, field)
            self._write_header(name)
            # Rows that were never committed go.
            header_bytes = self.files[name].tell()
            self.files[name].truncate(header_bytes + self.num_steps * field.row_bytes)
            self.files[name].seek(0, os.SEEK_END)

    def _check_length(self, name: str, field: Field) -> None:
        """UsageError: there are fewer rows than were committed."""
        size = os.fstat(self.files[name].fileno()).st_size
        if size < self.num_steps * field.row_bytes:
            raise UsageError(f"{self.partial / name}.npy is shorter than its {self.num_steps} rows; delete the folder")

    def _continue(self, file: Path) -> None:
        """Takes over the meta of what is there. UsageError: it is damaged, or of another collection."""
        old = read_meta_file(file)
        new = json.loads(json.dumps(self.meta))
        for key in new.keys() - GROWING:
            if old.get(key) != new[key]:
                raise UsageError(f"{file.parent} was begun with {key} {old.get(key)}, not {new[key]}; use the same")
        self.meta = {**self.meta, **old}
        self._say_what_is_saved()

    def _say_what_is_saved(self) -> None:
        self.kept.saved = f"{self.num_steps} steps in {self.meta['num_episodes']} episodes"

    def _write_header(self, name: str) -> None:
        # numpy pads the header so that the number of rows can be rewritten in place.
        field = self.fields[name]
        header = {
            "descr": field.dtype.str,
            "fortran_order": False,
            "shape": (self.num_steps, *field.shape),
        }
        self.files[name].seek(0)
        np.lib.format.write_array_header_1_0(self.files[name], header)

    @property
    def num_steps(self) -> int:
        return self.meta["num_steps"]

    @property
    def segment(self) -> dict[str, int]:
        """Where the random numbers of the episodes in flight begin: number, first_episode, first_step."""
        return self.meta["segment"]

    def next_segment(self) -> None:
        """Nothing is in flight, and from here on other random numbers are used: a killed run begins here."""
        self.meta["segment"] = {
            "number": self.segment["number"] + 1,
            "first_episode": self.meta["num_episodes"],
            "first_step": self.num_steps,
        }
        self.steps.clear()
        self.starts[:] = 0
        self.flush()

    def add(self, rows: Rows, episode_over: np.ndarray) -> None:
        """Takes one step of all envs and writes the episodes that ended in it.

        rows: every field but `timesteps` and `episode_ids`, each [N, ...]. episode_over: [N] bool; False for an env
        whose episodes are not to be stored.
        """
        self._refuse_non_finite(rows)
        self.steps.append(rows)
        for env in np.flatnonzero(episode_over):
            episode = self.steps[self.starts[env] :]
            self.starts[env] = len(self.steps)
            if self.to_skip:  # it was committed before the run was killed, and has now been played again
                self.to_skip -= 1
                continue
            fields = {}
            for name in rows:
                fields[name] = np.stack([step[name][env] for step in episode])  # [L, ...]
            self._write_episode(fields)
        oldest = self.starts.min()
        if oldest >= 64:  # forget what no episode in flight needs, now and then
            del self.steps[:oldest]
            self.starts -= oldest
        if time.monotonic() - self.last_commit > COMMIT_SECONDS:
            self.flush()

    def _refuse_non_finite(self, rows: Rows) -> None:
        """RunError, naming env, step and agent, where a number is none."""
        for name, field in self.fields.items():
            if field.dtype.kind != "f" or np.isfinite(rows[name]).all():
                continue
            env, *place = np.argwhere(~np.isfinite(rows[name]))[0]
            number = rows[name][(env, *place)]
            step = len(self.steps) - self.starts[env]
            whose = f" of agent {place[0]}" if name != "states" else ""
            raise RunError(f"{name}{whose} in env {env}, step {step} of its episode, is {number}: the env is broken")

    def _write_episode(self, fields: Rows) -> None:
        """fields: [L, ...] each. ValueError for a row of another shape than the meta says."""
        active = fields["active"]  # [L, A]
        length = len(active)
        fields["timesteps"] = np.arange(length)
        fields["episode_ids"] = np.full(length, self.meta["num_episodes"])
        fields["actions"][~active] = 0 if is_continuous(self.meta) else -1
        if "values" in fields:
            fields["values"][~active] = 0
        for name, field in self.fields.items():
            given = fields[name].shape[1:]
            if given != field.shape:
                raise ValueError(f"{name} of a row: expected shape {field.shape}, got {given}")
            rows = np.ascontiguousarray(fields[name], field.dtype)
            with self._full_disk_in_one_line():
                self.files[name].write(rows.tobytes())
        self.meta["num_steps"] += length
        self.meta["num_episodes"] += 1

    @contextlib.contextmanager
    def _full_disk_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.partial, error) from error

    def flush(self) -> None:
        """Commits the episodes written so far: from here a killed run goes on."""
        with self._full_disk_in_one_line():
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
        write_json(self.partial / "progress.json", self.meta)
        self._say_what_is_saved()
        self.last_commit = time.monotonic()

    def close(self) -> Path:
        """Finishes the dataset: from here on it can be read. Returns its path."""
        if self.finished:
            self.release(finished=False)
            return self.path
        if self.num_steps == 0:
            raise UsageError(f"no episode has ended, so {self.path} would be empty; collect more steps")
        with self._full_disk_in_one_line():
            for name in self.files:
                self._write_header(name)
        self.flush()
        self._close_files()
        self.meta["checksums"] = {name: checksum_of(self.partial / f"{name}.npy") for name in self.fields}
        write_json(self.partial / "meta.json", self.meta)
        self._rename()
        self.release(finished=False)
        return self.path

    def _rename(self) -> None:
        with self._full_disk_in_one_line():
            (self.partial / "progress.json").unlink(missing_ok=True)
            os.replace(self.partial, self.path)
            sync_to_disk(self.path.parent)
        self.kept.path = self.path

    def _close_files(self) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):  # what was written since the last commit is lost anyway
                file.close()

    def release(self, finished: bool = True) -> None:
        """Lets other processes write there. finished False: what is saved is said where the program ends."""
        self._close_files()
        self.kept.release(finished)


def checksum_of(file: Path) -> str:
    """XXH3 of the content of a .npy file, behind its header, in hexadecimal."""
    digest = xxhash.xxh3_64()
    with open(file, "rb") as content:
        np.lib.format.read_magic(content)
        np.lib.format.read_array_header_1_0(content)
        while chunk := content.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass
class Dataset:
    """A dataset, memory-mapped (writing to the arrays does not reach the disk). Shapes: see the top of the file."""

    path: Path
    meta: dict
    observations: np.ndarray
    next_observations: np.ndarray
    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    active: np.ndarray
    timesteps: np.ndarray
    episode_ids: np.ndarray
    policy_ids: np.ndarray
    action_masks: np.ndarray | None = None
    values: np.ndarray | None = None

    def __post_init__(self):
        starts = np.flatnonzero(self.timesteps == 0)
        self.episode_starts = np.append(starts, self.num_steps)  # [E + 1]
        self.episode_lengths = np.diff(self.episode_starts)  # [E]

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def num_agents(self) -> int:
        return self.meta["num_agents"]

    def rows_of(self, episodes: np.ndarray) -> np.ndarray:
        """Row indices of the given episodes, episode after episode. [R] int64"""
        lengths = self.episode_lengths[episodes]
        rows_before = lengths.cumsum() - lengths  # of the result
        offset = self.episode_starts[episodes] - rows_before
        return np.repeat(offset, lengths) + np.arange(lengths.sum())

    def split_episodes(
        self,
        seed: int,
        heldout_fraction: float = 0.1,
        holdout_policies: tuple[str, ...] = (),
    ) -> dict[str, np.ndarray]:
        """Episode numbers of "train", "heldout_episodes" and "heldout_policies", which have no episode in common.

        An episode in which any seat is played by one of `holdout_policies` goes to "heldout_policies" (which is empty
        when none is named); of the others `heldout_fraction`, drawn with `seed`, to "heldout_episodes".
        UsageError: a fraction that is none, an unknown policy, or too few episodes.
        """
        if not 0 < heldout_fraction < 1:
            raise UsageError(f"heldout_fraction: expected a number between 0 and 1, got {heldout_fraction}")
        names = self.meta["policies"]
        for name in holdout_policies:
            if name not in names:
                raise UsageError(f"policy to hold out: expected one of {', '.join(names)}, got {name!r}")
        held_ids = [names.index(name) for name in holdout_policies]
        is_held = np.isin(self.seats(), held_ids).any(1)  # [E]
        rng = np.random.default_rng(seed)
        rest = rng.permutation(np.flatnonzero(~is_held))
        count = max(1, round(heldout_fraction * len(rest)))
        if len(rest) <= count:
            raise UsageError(f"{self.path}: {len(rest)} episodes are left to train on and test; collect more episodes")
        return {
            "train": np.sort(rest[count:]),
            "heldout_episodes": np.sort(rest[:count]),
            "heldout_policies": np.flatnonzero(is_held),
        }

    def seats(self) -> np.ndarray:
        """Who sat where, as indices into meta["policies"]. [E, A]"""
        return self.policy_ids[self.episode_starts[:-1]]

    def episode_returns(self) -> np.ndarray:
        """Undiscounted return of each seat. [E, A]"""
        starts = self.episode_starts[:-1]
        return np.add.reduceat(self.rewards, starts, axis=0)


def rotate_to_ego(x: Tensor, agent: int | Tensor, axis: int) -> Tensor:
    """Reorders the axis of length A of `x` from global order to ego order: self first, then i+1, i+2, ... mod A.

    The one place where this is done, for agent channels of observations and for joint actions alike, in the order in
    which the stag hunt draws its observations.
    agent: one number for all of `x`, or [B] for x [B, ...] (then `axis` is not 0).
    """
    orders = ego_order(x.shape[axis]).to(x.device)  # [A, A]
    order = orders[agent]  # [A] or [B, A]
    if order.ndim == 1:
        return x.index_select(axis, order)
    shape = [1] * x.ndim
    shape[0], shape[axis] = order.shape
    index = order.view(shape).expand_as(x)
    return x.gather(axis, index)


def load_dataset(path: str | Path, every_checksum: bool = False) -> Dataset:
    """Opens a dataset and checks it. Raises UsageError, one line, for anything that is not a whole, sound dataset.

    Checksums are compared for every field that is read here anyway; of the large ones (LARGE) with every_checksum,
    or in `check_checksums` by who reads them.
    """
    path = Path(path)
    meta = _read_meta(path)
    arrays = {}
    for name, field in row_fields(meta).items():
        arrays[name] = _open_field(path / f"{name}.npy", field, meta["num_steps"])
    dataset = Dataset(path, meta, **arrays)
    check_checksums(dataset, [name for name in arrays if name not in LARGE or every_checksum])
    _check_episodes(dataset)
    _check_actions(dataset)
    _check_numbers(dataset)
    return dataset


def check_checksums(dataset: Dataset, names: Iterable[str]) -> None:
    """UsageError: a field is not what was written. (Older datasets have no checksums.)"""
    checksums = dataset.meta["checksums"]
    for name in names:
        if name in checksums:
            found = xxhash.xxh3_64_hexdigest(getattr(dataset, name))
            _require(dataset, found == checksums[name], name, "the checksum of meta.json: it is damaged")


def same_data(saved_meta: Meta, dataset: Dataset) -> bool:
    """Whether a dataset is the one whose meta was saved, wherever it lies now.

    By its checksums; one of both from before there were checksums is known by the rest of its meta.
    """
    saved = _with_defaults(saved_meta)
    if saved["checksums"] and dataset.meta["checksums"]:
        return saved["checksums"] == dataset.meta["checksums"]
    ours = dataset.meta
    return all(saved.get(key) == ours[key] for key in ours.keys() - {"checksums", "segment"})


def _read_meta(path: Path) -> Meta:
    file = path / "meta.json"
    if not file.exists():
        partial = path.with_name(path.name + ".partial")
        found = "an unfinished collection" if partial.exists() else "none"
        hint = "make one with collect_data.py, or give its place with --data"
        raise UsageError(f"expected a dataset in {path}, found {found}; {hint}")
    meta = read_meta_file(file)
    if meta["num_steps"] < 1 or meta["num_episodes"] < 1:
        raise UsageError(f"{file}: expected {FORMAT} version {VERSION} with rows; collect the data again")
    return meta


def read_meta_file(file: Path) -> Meta:
    """meta.json or progress.json. UsageError: not readable, or not what this version writes."""
    problem = "another format"
    try:
        if not file.is_file():
            raise ValueError("no plain file")
        meta = _with_defaults(json.loads(file.read_text(encoding="utf-8")))
        if meta["format"] == FORMAT and meta["version"] == VERSION:
            _check_meta(meta)
            return meta
    except KeyError as error:
        problem = f"no {error}"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        problem = " ".join(str(getattr(error, "strerror", None) or error).split())[:150]
    raise UsageError(f"{file}: expected {FORMAT} version {VERSION}, got {problem}; collect the data again")


def _check_meta(meta: Meta) -> None:
    """ValueError, TypeError or KeyError for values that no collection writes."""

    def require(ok: bool, name: str) -> None:
        if not ok:
            raise ValueError(f"{name} {meta[name]!r}")

    for name in ("num_steps", "num_episodes", "num_agents"):
        require(type(meta[name]) is int and meta[name] >= 0, name)
    for name in ("obs_shape", "state_shape", "action_shape"):
        is_shape = isinstance(meta[name], list) and all(type(size) is int and size >= 0 for size in meta[name])
        require(is_shape, name)
    for name in ("obs_dtype", "state_dtype"):
        require(isinstance(meta[name], str) and np.dtype(meta[name]).kind in "fiub", name)
    require(
        meta["num_actions"] is None or (type(meta["num_actions"]) is int and meta["num_actions"] > 0), "num_actions"
    )
    nvec = meta["nvec"]
    require(nvec is None or (isinstance(nvec, list) and all(type(n) is int and n > 0 for n in nvec)), "nvec")
    for name in ("env_kwargs", "checksums", "segment"):
        require(isinstance(meta[name], dict), name)
    require(isinstance(meta["env_id"], str), "env_id")
    policies = meta["policies"]
    require(isinstance(policies, list) and all(isinstance(name, str) for name in policies), "policies")
    for name in ("number", "first_episode", "first_step"):
        require(type(meta["segment"][name]) is int and meta["segment"][name] >= 0, "segment")
    row_fields(meta)


def _with_defaults(meta: Meta) -> Meta:
    """What datasets from before there were values, segments and checksums do not say."""
    segment = {"number": 0, "first_episode": 0, "first_step": 0}
    if "segment" not in meta:  # a collection that was begun before: what it has is a segment of its own
        segment = {"number": 1, "first_episode": meta["num_episodes"], "first_step": meta["num_steps"]}
    return {"has_values": False, "values_of": None, "nvec": None, "checksums": {}, "segment": segment, **meta}


def _open_field(file: Path, field: Field, num_steps: int) -> np.ndarray:
    shape = (num_steps, *field.shape)
    expected = f"{file}: expected {field.dtype} {shape}"
    if not file.exists():
        raise UsageError(f"{expected}, but it is missing; collect the data again")
    if not file.is_file():  # (opening a FIFO would wait for ever)
        raise UsageError(f"{expected}, but it is no plain file; collect the data again")
    try:
        array = np.load(file, mmap_mode="c", allow_pickle=False)
    except PermissionError as error:
        raise UsageError(f"{expected}, but it may not be read; change its permissions") from error
    except Exception as error:  # whatever a damaged header makes the reader raise
        reason = "truncated, or not an array of plain numbers"
        raise UsageError(f"{expected}, but it is {reason}; collect the data again") from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{expected}, but it is an archive; collect the data again")
    if array.dtype != field.dtype or array.shape != shape:
        raise UsageError(f"{expected}, got {array.dtype} {array.shape}; collect the data again")
    return array


def _require(dataset: Dataset, ok: bool, field: str, expected: str) -> None:
    if not ok:
        raise UsageError(f"{dataset.path / field}.npy: expected {expected}; collect the data again")


def _check_episodes(dataset: Dataset) -> None:
    """Whole episodes, numbered and timed in order, with one policy per seat."""
    starts = dataset.episode_starts
    number = np.cumsum(dataset.timesteps == 0) - 1  # [S]
    first = starts[np.maximum(number, 0)]
    expected_t = np.arange(dataset.num_steps) - first
    in_order = (dataset.timesteps == expected_t).all()
    _require(dataset, in_order, "timesteps", "0, 1, 2, ... in every episode")
    numbered = (dataset.episode_ids == number).all()
    _require(dataset, numbered, "episode_ids", "0, 1, 2, ... with each new episode")
    num_episodes = dataset.meta["num_episodes"]
    _require(dataset, len(starts) - 1 == num_episodes, "episode_ids", f"{num_episodes} episodes")

    policy_ids, last_id = dataset.policy_ids, len(dataset.meta["policies"]) - 1
    known = (policy_ids >= 0) & (policy_ids <= last_id)
    _require(dataset, known.all(), "policy_ids", f"0 ... {last_id}")
    same_seats = (policy_ids == policy_ids[first]).all()
    _require(dataset, same_seats, "policy_ids", "one policy per seat and episode")

    ended_after_leaving = dataset.terminations & ~dataset.active
    _require(dataset, not ended_after_leaving.any(), "terminations", "False for agents that have left")
    goes_on = dataset.active & ~dataset.terminations  # [S, A]
    over = dataset.truncations | ~goes_on.any(1)  # [S]
    last_rows = starts[1:] - 1
    _require(dataset, over[last_rows].all(), "truncations", "an end of every episode (whole episodes)")


def _check_actions(dataset: Dataset) -> None:
    if is_continuous(dataset.meta):
        return
    sizes = np.array(actions_of_parts(dataset.meta))  # [D]
    actions = dataset.actions.reshape(*dataset.active.shape, len(sizes))  # [S, A, D]
    in_range = ((actions >= 0) & (actions < sizes)).all(2)
    right = np.where(dataset.active, in_range, (actions == -1).all(2))
    numbers = " and ".join(f"0 ... {size - 1}" for size in sizes)
    _require(dataset, right.all(), "actions", f"{numbers}, and -1 for agents that have left")
    if dataset.action_masks is not None:
        first = sizes.cumsum() - sizes  # where in the mask each part begins
        index = first + np.maximum(actions, 0)
        legal = np.take_along_axis(dataset.action_masks, index, axis=2).all(2)
        legal_or_left = legal | ~dataset.active
        _require(dataset, legal_or_left.all(), "actions", "legal actions according to action_masks")


def _check_numbers(dataset: Dataset) -> None:
    if dataset.values is not None:
        of_the_gone = dataset.values[~dataset.active]
        _require(dataset, not of_the_gone.any(), "values", "0 for agents that have left")
    for name, field in row_fields(dataset.meta).items():
        if field.dtype.kind == "f":
            array = getattr(dataset, name)
            finite = all(np.isfinite(array[rows]).all() for rows in _chunks(array))
            _require(dataset, finite, name, "finite numbers, got NaN or inf")


def _chunks(array: np.ndarray) -> Iterator[slice]:
    """Slices of rows that are CHUNK_BYTES large; none of an array without rows."""
    row_bytes = max(1, array[:1].nbytes)
    num_rows = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, len(array), num_rows):
        yield slice(start, start + num_rows)


def check_alignment(dataset: Dataset) -> None:
    """Reads all observations: within an episode, the next observation must be the observation of the next row."""
    goes_on = dataset.timesteps[1:] != 0  # [S - 1], the row after is of the same episode
    seen = dataset.active[1:] & goes_on[:, None]  # [S - 1, A]
    obs, next_obs = dataset.observations, dataset.next_observations
    for rows in _chunks(next_obs[:-1]):
        rows_after = slice(rows.start + 1, rows.stop + 1)
        differs = next_obs[:-1][rows] != obs[rows_after]  # [R, A, *O]
        num_rows, num_agents = differs.shape[:2]
        differs = differs.reshape(num_rows, num_agents, -1).any(2)  # [R, A]
        if differs[seen[rows]].any():
            raise UsageError(
                f"{dataset.path}: expected next_observations to be the next row's observations; collect the data again"
            )


def describe(dataset: Dataset) -> str:
    """A summary in a few lines: counts, values, returns per policy and seat, action histogram, inactive rows, size."""
    meta, active = dataset.meta, dataset.active
    size = sum(file.stat().st_size for file in dataset.path.glob("*.npy"))
    lengths = dataset.episode_lengths
    lines = [
        f"{dataset.path}: {meta['env_id']} {meta['env_kwargs']}, {dataset.num_agents} agents, seed {meta['seed']}",
        f"  {dataset.num_steps} steps in {len(lengths)} episodes of {lengths.min()} ... {lengths.max()} steps, "
        f"{active.sum()} samples, {1 - active.mean():.1%} of seat-steps inactive, {size / 1e6:.1f} MB on disk",
        f"  observations {meta['obs_dtype']} {tuple(meta['obs_shape'])}, "
        f"states {meta['state_dtype']} {tuple(meta['state_shape'])}",
    ]
    if dataset.values is not None:
        values = dataset.values[active]
        lines.append(
            f"  values of {meta['values_of']}: mean {values.mean():.3f}, {values.min():.3f} ... {values.max():.3f}"
        )
    for policy_id, name in enumerate(meta["policies"]):
        lines.append(_describe_returns(dataset, policy_id, name))
        if meta["num_actions"] is not None:
            lines.append(_describe_actions(dataset, policy_id))
    return "\n".join(lines)


def _describe_returns(dataset: Dataset, policy_id: int, name: str) -> str:
    returns = dataset.episode_returns()  # [E, A]
    mine = dataset.seats() == policy_id  # [E, A]
    by_seat = []
    for agent in range(dataset.num_agents):
        in_seat = returns[mine[:, agent], agent]
        by_seat.append(f"{in_seat.mean():.2f}" if len(in_seat) else "-")
    mean = f"{returns[mine].mean():.3f}" if mine.any() else "-"
    return f"  {name}: return {mean} in {mine.sum()} seats (by seat: {' '.join(by_seat)})"


def _describe_actions(dataset: Dataset, policy_id: int) -> str:
    mine = dataset.active & (dataset.policy_ids == policy_id)  # [S, A]
    counts = np.bincount(dataset.actions[mine], minlength=dataset.meta["num_actions"])
    shares = counts / max(1, mine.sum())
    listed = [f"{action}: {100 * share:.1f} %" for action, share in enumerate(shares)]
    return "    actions " + "  ".join(listed)


def cli(argv: list[str] | None = None) -> int:
    """Prints and validates a dataset: -> the exit code, 2 for wrong usage and unsound data."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        print("usage: python -m dataset data/NAME", file=sys.stderr)
        return 2

    def validate() -> None:
        dataset = load_dataset(argv[0], every_checksum=True)
        print(describe(dataset))
        check_alignment(dataset)
        print("valid")

    return one_line_errors(validate)


if __name__ == "__main__":
    sys.exit(cli())
