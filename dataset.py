"""The one on-disk format of collected data: a folder with `meta.json` and one `.npy` file per field.

One row is one env step with the *joint* action, so actions can not slip against observations. Rows of an episode lie
together in time order, and only whole episodes are stored. S rows, E episodes, A agents, *O observation, *S state:

    observations       [S, A, *O]  what each agent saw before the step; zero for agents that have left
    next_observations  [S, A, *O]  what it saw after the step (the true last one where the episode ended)
    states             [S, *S]     global state before the step
    actions            [S, A]      int64, as executed, -1 for agents that have left; continuous: float32 [S, A, D], 0
    rewards            [S, A]      float32
    terminations       [S, A]      bool, the rules ended this agent's episode in this step
    truncations        [S]         bool, the time limit was hit in this step
    active             [S, A]      bool, the agent took part in this step
    action_masks       [S, A, n]   bool, legal actions (only where the env has a mask)
    timesteps          [S]         int64, 0 at the start of each episode
    episode_ids        [S]         int64, 0, 0, ..., 1, 1, ...
    policy_ids         [S, A]      int64, index into meta["policies"]: who sat in that seat

`python -m dataset data/NAME` prints and validates a dataset.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from envs.stag_hunt import ego_order

FORMAT = "marl-dataset"
VERSION = 1
SPLITS = ("train", "heldout_episodes", "heldout_policies")
CHUNK_BYTES = 64 * 2**20  # how much of a large field is looked at in one go


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
) -> dict:
    """Everything that is known about a dataset before its first row. `num_actions` is None for continuous actions."""
    packages = ("numpy", "torch", "gymnasium", "pettingzoo")
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
        "action_shape": list(action_shape),
        "has_masks": has_masks,
        "policies": list(policies),
        "seed": seed,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "num_steps": 0,
        "num_episodes": 0,
    }


def row_fields(meta: dict) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Type and shape of one row of every field."""
    agents, obs_shape = (meta["num_agents"],), tuple(meta["obs_shape"])
    action_dtype = "float32" if meta["num_actions"] is None else "int64"
    fields = {
        "observations": (meta["obs_dtype"], agents + obs_shape),
        "next_observations": (meta["obs_dtype"], agents + obs_shape),
        "states": (meta["state_dtype"], tuple(meta["state_shape"])),
        "actions": (action_dtype, agents + tuple(meta["action_shape"])),
        "rewards": ("float32", agents),
        "terminations": ("bool", agents),
        "truncations": ("bool", ()),
        "active": ("bool", agents),
        "timesteps": ("int64", ()),
        "episode_ids": ("int64", ()),
        "policy_ids": ("int64", agents),
    }
    if meta["has_masks"]:
        fields["action_masks"] = ("bool", agents + (meta["num_actions"],))
    return {name: (np.dtype(dtype), shape) for name, (dtype, shape) in fields.items()}


class DatasetWriter:
    """Streams rows to `<path>.partial`, which becomes `path` in one rename when `close` is called.

    What is held in memory are the episodes in flight. Files only grow, and `progress.json` says how much of them is
    whole episodes; a killed run is continued from there with `resume=True`. Raises ValueError if `path` exists, if an
    unfinished collection is in the way (or, on resume, missing or different), and when the disk is full.
    """

    def __init__(self, path: str | Path, meta: dict, num_envs: int, resume: bool = False):
        self.path, self.meta = Path(path), dict(meta)
        self.partial = self.path.with_name(self.path.name + ".partial")
        if self.path.exists():
            raise ValueError(f"expected a new dataset folder, but {self.path} exists; choose another name or delete it")
        if resume:
            self._read_progress()
        elif self.partial.exists():
            raise ValueError(f"{self.partial} holds an unfinished collection; continue it with --resume or delete it")
        self.partial.mkdir(parents=True, exist_ok=True)
        self.files = {}
        for name, (dtype, shape) in row_fields(self.meta).items():
            file = self.partial / f"{name}.npy"
            self.files[name] = open(file, "r+b" if file.exists() else "w+b")
            self._write_header(name)
            row_bytes = dtype.itemsize * int(np.prod(shape))
            self.files[name].truncate(self.files[name].tell() + self.meta["num_steps"] * row_bytes)
            self.files[name].seek(0, os.SEEK_END)
        self.steps: list[dict[str, np.ndarray]] = []  # the latest joint steps of all envs, oldest first
        self.starts = np.zeros(num_envs, np.int64)  # where in `steps` each env's episode began
        self.flush()

    def _read_progress(self) -> None:
        file = self.partial / "progress.json"
        if not file.exists():
            raise ValueError(
                f"--resume expected an unfinished collection in {self.partial}; start one without --resume"
            )
        old = json.loads(file.read_text())
        for key in self.meta.keys() - {"num_steps", "num_episodes", "versions"}:
            if old[key] != json.loads(json.dumps(self.meta[key])):
                raise ValueError(f"{self.partial} was begun with {key} {old[key]}, not {self.meta[key]}; use the same")
        self.meta = old

    def _write_header(self, name: str) -> None:
        # numpy pads the header so that the number of rows can be rewritten in place.
        dtype, shape = row_fields(self.meta)[name]
        header = {"descr": dtype.str, "fortran_order": False, "shape": (self.meta["num_steps"],) + shape}
        self.files[name].seek(0)
        np.lib.format.write_array_header_1_0(self.files[name], header)

    @property
    def num_steps(self) -> int:
        return self.meta["num_steps"]

    def add(self, rows: dict[str, np.ndarray], episode_over: np.ndarray) -> None:
        """Takes one step of all envs and writes the episodes that ended in it.

        rows: every field but `timesteps` and `episode_ids`, each [N, ...]. episode_over: [N] bool; False for an env
        whose episodes are not to be stored.
        """
        self.steps.append(rows)
        for env in np.flatnonzero(episode_over):
            episode = self.steps[self.starts[env] :]
            length = len(episode)
            self.starts[env] = len(self.steps)
            fields = {name: np.stack([step[name][env] for step in episode]) for name in rows}  # [L, ...]
            fields["timesteps"] = np.arange(length)
            fields["episode_ids"] = np.full(length, self.meta["num_episodes"])
            gone = ~fields["active"]  # [L, A]
            fields["actions"][gone] = 0 if self.meta["num_actions"] is None else -1
            for name, (dtype, shape) in row_fields(self.meta).items():
                if fields[name].shape[1:] != shape:
                    raise ValueError(f"{name} of a row: expected shape {shape}, got {fields[name].shape[1:]}")
                self._write(self.files[name], np.ascontiguousarray(fields[name], dtype).tobytes())
            self.meta["num_steps"] += length
            self.meta["num_episodes"] += 1
        oldest = self.starts.min()
        if oldest >= 64:  # forget what no episode in flight needs, now and then
            del self.steps[:oldest]
            self.starts -= oldest
            self.flush()

    def _write(self, file, data: bytes | None) -> None:
        try:
            file.write(data) if data is not None else file.flush()
        except OSError as error:
            raise ValueError(
                f"could not write to {self.partial}: {error.strerror}; free some space, then continue with --resume"
            ) from error

    def flush(self) -> None:
        """Commits the episodes written so far: from here a killed run goes on."""
        for file in self.files.values():
            self._write(file, None)
        progress = self.partial / "progress.tmp"
        try:
            progress.write_text(json.dumps(self.meta, indent=1))
        except OSError as error:
            raise ValueError(f"could not write to {self.partial}: {error.strerror}; free some space") from error
        os.replace(progress, self.partial / "progress.json")

    def close(self) -> Path:
        """Finishes the dataset: from here on it can be read. Returns its path."""
        if self.num_steps == 0:
            raise ValueError(f"no episode has ended, so {self.path} would be empty; collect more steps")
        for name in self.files:
            self._write_header(name)
        self.flush()
        for file in self.files.values():
            os.fsync(file.fileno())
            file.close()
        os.replace(self.partial / "progress.json", self.partial / "meta.json")
        os.replace(self.partial, self.path)
        return self.path


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

    def __post_init__(self):
        self.episode_starts = np.append(np.flatnonzero(self.timesteps == 0), len(self.timesteps))  # [E + 1]
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
        first = np.repeat(self.episode_starts[episodes] - (lengths.cumsum() - lengths), lengths)
        return first + np.arange(lengths.sum())

    def split_episodes(
        self, seed: int, heldout_fraction: float = 0.1, holdout_policies: tuple[str, ...] = ()
    ) -> dict[str, np.ndarray]:
        """Episode numbers of "train", "heldout_episodes" and "heldout_policies", which have no episode in common.

        An episode in which any seat is played by one of `holdout_policies` goes to "heldout_policies" (which is empty
        when none is named); of the others `heldout_fraction`, drawn with `seed`, to "heldout_episodes".
        """
        if not 0 < heldout_fraction < 1:
            raise ValueError(f"heldout_fraction: expected a number between 0 and 1, got {heldout_fraction}")
        names = self.meta["policies"]
        for name in holdout_policies:
            if name not in names:
                raise ValueError(f"policy to hold out: expected one of {', '.join(names)}, got {name!r}")
        held_ids = [names.index(name) for name in holdout_policies]
        seats = self.policy_ids[self.episode_starts[:-1]]  # [E, A]
        held = np.isin(seats, held_ids).any(1)  # [E]
        rest = np.random.default_rng(seed).permutation(np.flatnonzero(~held))
        count = max(1, round(heldout_fraction * len(rest)))
        if len(rest) <= count:
            raise ValueError(f"{self.path}: {len(rest)} episodes are left to train on and test; collect more episodes")
        parts = (np.sort(rest[count:]), np.sort(rest[:count]), np.flatnonzero(held))
        return dict(zip(SPLITS, parts, strict=True))

    def episode_returns(self) -> np.ndarray:
        """Undiscounted return of each seat. [E, A]"""
        return np.add.reduceat(self.rewards, self.episode_starts[:-1], axis=0)


def rotate_to_ego(x: torch.Tensor, agent: int | torch.Tensor, axis: int) -> torch.Tensor:
    """Reorders the axis of length A of `x` from global order to ego order: self first, then i+1, i+2, ... mod A.

    The one place where this is done, for agent channels of observations and for joint actions alike, in the order in
    which the stag hunt draws its observations.
    agent: one number for all of `x`, or [B] for x [B, ...] (then `axis` is not 0).
    """
    order = ego_order(x.shape[axis]).to(x.device)[agent]  # [A] or [B, A]
    if order.ndim == 1:
        return x.index_select(axis, order)
    shape = [1] * x.ndim
    shape[0], shape[axis] = order.shape
    return x.gather(axis, order.view(shape).expand_as(x))


def load_dataset(path: str | Path) -> Dataset:
    """Opens a dataset and checks it. Raises ValueError, one line, for anything that is not a whole, sound dataset."""
    path = Path(path)
    if not (path / "meta.json").exists():
        found = "an unfinished collection" if path.with_name(path.name + ".partial").exists() else "none"
        raise ValueError(f"expected a dataset in {path}, found {found}; make one with collect_data.py")
    try:
        meta = json.loads((path / "meta.json").read_text())
        fields = row_fields(meta)
        sound = (meta["format"], meta["version"]) == (FORMAT, VERSION) and meta["num_steps"] > 0
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{path / 'meta.json'}: expected {FORMAT} version {VERSION} with rows; collect the data again")
    arrays = {}
    for name, (dtype, shape) in fields.items():
        file, shape = path / f"{name}.npy", (meta["num_steps"],) + shape
        try:
            arrays[name] = np.load(file, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = "missing" if not file.exists() else "truncated, or not an array of plain numbers"
            raise ValueError(f"{file}: expected {dtype} {shape}, but it is {reason}; collect the data again") from error
        if arrays[name].dtype != dtype or arrays[name].shape != shape:
            given = f"{arrays[name].dtype} {arrays[name].shape}"
            raise ValueError(f"{file}: expected {dtype} {shape}, got {given}; collect the data again")
    dataset = Dataset(path, meta, **arrays)
    _check_values(dataset)
    return dataset


def _chunks(array: np.ndarray):
    rows = max(1, CHUNK_BYTES // max(1, array[0].nbytes))
    return (slice(start, start + rows) for start in range(0, len(array), rows))


def _check_values(dataset: Dataset) -> None:
    """What can be checked without reading the observations, and that no number is NaN."""

    def require(ok: bool, field: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"{dataset.path / field}.npy: expected {expected}; collect the data again")

    d, starts = dataset, dataset.episode_starts
    number = np.cumsum(d.timesteps == 0) - 1  # [S]
    first = starts[np.maximum(number, 0)]
    require((d.timesteps == np.arange(d.num_steps) - first).all(), "timesteps", "0, 1, 2, ... in every episode")
    require((d.episode_ids == number).all(), "episode_ids", "0, 1, 2, ... with each new episode")
    require(len(starts) - 1 == d.meta["num_episodes"], "episode_ids", f"{d.meta['num_episodes']} episodes")
    require(
        ((d.policy_ids >= 0) & (d.policy_ids < len(d.meta["policies"]))).all(),
        "policy_ids",
        f"0 ... {len(d.meta['policies']) - 1}",
    )
    require((d.policy_ids == d.policy_ids[first]).all(), "policy_ids", "one policy per seat and episode")
    require(not (d.terminations & ~d.active).any(), "terminations", "False for agents that have left")
    over = d.truncations | ~(d.active & ~d.terminations).any(1)  # [S]
    require((over[starts[1:] - 1]).all(), "truncations", "an end of every episode (whole episodes)")
    if d.meta["num_actions"] is not None:
        legal = np.where(d.active, (d.actions >= 0) & (d.actions < d.meta["num_actions"]), d.actions == -1)
        require(legal.all(), "actions", f"0 ... {d.meta['num_actions'] - 1}, and -1 for agents that have left")
    if d.action_masks is not None:
        legal = np.take_along_axis(d.action_masks, np.maximum(d.actions, 0)[..., None], 2)[..., 0]
        require((legal | ~d.active).all(), "actions", "legal actions according to action_masks")
    for name in row_fields(d.meta):
        array = getattr(d, name)
        if array.dtype.kind == "f":
            require(
                all(np.isfinite(array[part]).all() for part in _chunks(array)), name, "finite numbers, got NaN or inf"
            )


def check_alignment(dataset: Dataset) -> None:
    """Reads all observations: within an episode, the next observation must be the observation of the next row."""
    inner = dataset.timesteps[1:] != 0  # [S - 1]
    seen = dataset.active[1:] & inner[:, None]  # [S - 1, A]
    for part in _chunks(dataset.observations[:-1]) if dataset.num_steps > 1 else ():
        after = np.arange(part.start + 1, min(part.stop + 1, dataset.num_steps))
        same = dataset.next_observations[after - 1] == dataset.observations[after]
        if not same.reshape(*same.shape[:2], -1).all(2)[seen[after - 1]].all():
            raise ValueError(
                f"{dataset.path}: expected next_observations to be the next row's observations; collect the data again"
            )


def describe(dataset: Dataset) -> str:
    """A summary in a few lines: counts, returns per policy and seat, action histogram, inactive rows, size."""
    meta, active = dataset.meta, np.asarray(dataset.active)
    returns = dataset.episode_returns()  # [E, A]
    seats = dataset.policy_ids[dataset.episode_starts[:-1]]  # [E, A]
    size = sum(file.stat().st_size for file in dataset.path.glob("*.npy"))
    lengths = dataset.episode_lengths
    lines = [
        f"{dataset.path}: {meta['env_id']} {meta['env_kwargs']}, {dataset.num_agents} agents, seed {meta['seed']}",
        f"  {dataset.num_steps} steps in {len(lengths)} episodes of {lengths.min()} ... {lengths.max()} steps, "
        f"{active.sum()} samples, {1 - active.mean():.1%} of seat-steps inactive, {size / 1e6:.1f} MB on disk",
        f"  observations {meta['obs_dtype']} {tuple(meta['obs_shape'])}, "
        f"states {meta['state_dtype']} {tuple(meta['state_shape'])}",
    ]
    for k, name in enumerate(meta["policies"]):
        per_seat = [returns[seats[:, a] == k, a] for a in range(dataset.num_agents)]
        means = " ".join(f"{x.mean():.2f}" if len(x) else "-" for x in per_seat)
        all_seats = np.concatenate(per_seat)
        mean = f"{all_seats.mean():.3f}" if len(all_seats) else "-"
        lines.append(f"  {name}: return {mean} in {len(all_seats)} seats (by seat: {means})")
        if meta["num_actions"] is not None:
            mine = dataset.actions[active & (dataset.policy_ids == k)]
            shares = np.bincount(mine, minlength=meta["num_actions"]) / max(1, len(mine))
            lines.append("    actions " + "  ".join(f"{a}: {100 * share:.1f} %" for a, share in enumerate(shares)))
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dataset data/NAME")
    try:
        data = load_dataset(sys.argv[1])
        print(describe(data))
        check_alignment(data)
        print("valid")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
