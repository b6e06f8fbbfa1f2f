"""The samples that an opponent model is trained on: agents of a dataset, and how networks are fed with what they see.

A sample is an agent (seat) that is still in the game at a step (row). Maps of 0/1 with few cells set are fed as lists
of these cells, everything else as numbers.

Shapes: M samples, B in a minibatch, Q sequences (all samples of an agent in an episode), P places in a list of cells,
F numbers in an observation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import Dataset
from envs import ObsSpec, describe_obs

Spec = dict[str, Any]  # of `describe_input`
Move = tuple[int, int]  # a (row, column) step
MAX_CLASS_WEIGHT = 10.0
PREPARE_CHUNK = 16_384  # samples turned into network input at a time
FLIPS = ((), (0,), (1,), (0, 1))  # axes of a map that are mirrored


# ---------------------------------------------------------------- what networks see


def flat_obs_spec(meta: dict[str, Any]) -> ObsSpec:
    """What the env says of its observations; where it says nothing, one of any shape counts as flat."""
    size = math.prod(meta["obs_shape"])
    return describe_obs({**meta, "obs_shape": [size]})


def describe_input(dataset: Dataset, kind: str) -> Spec:
    """What the networks need to know of their input ("obs" or "state"); saved in the checkpoint.

    0/1 observations with few cells set are fed as lists of these cells, `max_cells` long (0: as numbers). Where plane
    0 holds exactly the agent itself, `centred`, each cell is also given relative to the agent.
    """
    meta = dataset.meta
    shape = meta[f"{kind}_shape"]
    source = dataset.observations if kind == "obs" else dataset.states
    largest, most_set = 0.0, 0
    for start in range(0, dataset.num_steps, PREPARE_CHUNK):
        part = source[start : start + PREPARE_CHUNK]
        if kind == "obs":
            part = part[dataset.active[start : start + PREPARE_CHUNK]]  # [B, *O]
        flat = part.reshape(len(part), -1)  # [B, F]
        num_set = np.count_nonzero(flat, axis=1)  # [B]
        largest = max(largest, float(np.abs(flat).max(initial=0)))
        most_set = max(most_set, int(num_set.max(initial=0)))
    binary = str(source.dtype) == "uint8" and largest == 1
    sparse = binary and most_set <= math.prod(shape) // 8
    own_plane = kind == "obs" and flat_obs_spec(meta).ego == "plane"
    return {
        "input": kind,
        "shape": list(shape),
        "env_id": meta["env_id"],
        "num_agents": meta["num_agents"],
        "num_actions": meta["num_actions"],
        "binary": binary,
        "max_cells": most_set if sparse else 0,
        "centred": sparse and own_plane,
        "scale": 1.0 / (largest or 1.0),
        "time_scale": 1.0 / int(dataset.episode_lengths.max()),
    }


def network_input(spec: Spec, obs: Tensor, seats: Tensor) -> Tensor:
    """Observations or states [B, *shape] of the modelled agents in `seats` [B] -> cells [B, P] int64 or numbers [B, F].

    Cells are numbered in the flattened observation, of F numbers; empty places of the list hold F. For a centred
    observation the same cells follow once more, counted from the agent's own; for a state, the seat (an observation is
    ego-first and needs none). ValueError: more cells set than in the data.
    """
    flat = obs.flatten(1)  # [B, F]
    size = flat.shape[1]
    is_state = spec["input"] == "state"
    if not spec["max_cells"]:
        numbers = flat.float() * spec["scale"]
        if not is_state:
            return numbers
        seat = F.one_hot(seats, spec["num_agents"]).float()  # [B, A]
        return torch.cat([numbers, seat], 1)
    check_cells(spec, flat)
    values, cells = flat.topk(spec["max_cells"], sorted=False)
    cells = cells.masked_fill(values == 0, size)  # [B, P]
    if is_state:
        seat = size + 1 + seats[:, None]  # [B, 1]
        return torch.cat([cells, seat], 1)
    if spec["centred"]:
        return torch.cat([cells, size + 1 + relative_cells(spec, cells)], 1)
    return cells


def check_cells(spec: Spec, flat: Tensor) -> None:
    """ValueError where an observation [B, F] has more cells set than the list holds. (On a GPU it would stall.)"""
    if flat.device.type != "cpu":
        return
    num_set = flat.count_nonzero(1)
    if (num_set > spec["max_cells"]).any():
        most = int(num_set.max())
        raise ValueError(f"expected at most {spec['max_cells']} cells set in {spec['input']}, got {most}; use its env")


def relative_cells(spec: Spec, cells: Tensor) -> Tensor:
    """The cells [B, P] counted from the agent's own, the one set in plane 0. Empty places hold the last number."""
    height, width, planes = spec["shape"]
    size = height * width * planes
    plane = cells % planes  # [B, P]
    place = cells // planes
    own = torch.where(plane == 0, cells, size).amin(1, keepdim=True)  # [B, 1]
    own_place = own // planes
    down = place // width - own_place // width + height - 1  # from 0
    right = place % width - own_place % width + width - 1
    relative_place = down * (2 * width - 1) + right
    relative = relative_place * planes + plane
    nowhere = (cells == size) | (own == size)
    return relative.masked_fill(nowhere, num_relative(spec))


def num_relative(spec: Spec) -> int:
    """How many cells a map counted from the agent's own has."""
    height, width, planes = spec["shape"]
    return (2 * height - 1) * (2 * width - 1) * planes


def num_inputs(spec: Spec) -> int:
    """How many different cells there are, or how many numbers."""
    count = math.prod(spec["shape"])
    if spec["max_cells"]:
        count += 1  # the empty place
    if spec["input"] == "state":
        count += spec["num_agents"]
    if spec["centred"]:
        count += num_relative(spec) + 1
    return count


# ---------------------------------------------------------------- minibatches


class Place(NamedTuple):
    """Where the samples of a batch belong, for the GRU."""

    sequence: Tensor  # [B], of the batch
    position: Tensor  # [B], in its sequence
    num_sequences: int
    longest: int


class Batch(NamedTuple):
    """Samples [B]; place: None where they are not whole sequences."""

    index: Tensor
    place: Place | None


class Samples:
    """Every active (row, seat) of a dataset, M of them, ordered by sequence (episode, seat) and time.

    In memory, on the device, unless the observations need more than `memory_limit_mb`: then they stay on the disk.
    """

    def __init__(self, dataset: Dataset, spec: Spec, device: torch.device, memory_limit_mb: int):
        rows, seats = np.nonzero(dataset.active)
        order = np.lexsort((rows, seats, dataset.episode_ids[rows]))
        rows = rows[order]
        seats = seats[order]
        self.spec = spec
        self.device = device
        self.rows = torch.from_numpy(rows)  # [M]
        self.seats = torch.from_numpy(seats)  # [M]
        self.actions = self.put(dataset.actions[rows, seats])  # [M]
        self.policies = self.put(dataset.policy_ids[rows, seats])  # [M]
        self.timesteps = self.put(dataset.timesteps[rows])  # [M]
        self.masks = None
        if dataset.action_masks is not None:
            self.masks = self.put(dataset.action_masks[rows, seats])  # [M, n]

        episodes = dataset.episode_ids[rows]  # [M]
        sequence_ids = episodes * dataset.num_agents + seats
        self.first = np.flatnonzero(np.diff(sequence_ids, prepend=-1))  # [Q]
        self.length = np.diff(np.append(self.first, len(rows)))  # [Q]
        self.episodes = episodes[self.first]  # [Q]
        last = self.first + self.length - 1
        past = np.arange(len(rows)) - np.repeat(self.first, self.length)
        self.last = self.put(np.repeat(last, self.length))  # [M]
        self.past = self.put(past)  # [M]

        source = dataset.observations if spec["input"] == "obs" else dataset.states
        self.source = torch.from_numpy(source)
        self.inputs = None
        self.in_memory = self.fetch_inputs(memory_limit_mb * 2**20)

    def put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def fetch_inputs(self, limit: int) -> bool:
        """Puts the input on the device if it takes no more than `limit` bytes; returns whether it does."""
        if self.spec["max_cells"]:
            if len(self) * 2 * self.spec["max_cells"] * 4 > limit:
                return False
            chunks = torch.arange(len(self)).split(PREPARE_CHUNK)
            inputs = [self.input_of(chunk).int() for chunk in chunks]
            self.inputs = torch.cat(inputs)  # [M, P]
            return True
        if self.source.nbytes > limit:
            return False
        self.source = self.source.to(self.device)
        self.rows = self.rows.to(self.device)
        self.seats = self.seats.to(self.device)
        return True

    def __len__(self) -> int:
        return len(self.actions)

    def input_of(self, index: Tensor) -> Tensor:
        """Network input of samples [B], of the past or the future too. [B, P] or [B, F]"""
        if self.inputs is not None:
            return self.inputs.index_select(0, index).long()  # (on a CPU 6 times as fast as inputs[index])
        index = index.to(self.rows.device)
        rows = self.rows[index]
        seats = self.seats[index]
        where = (rows, seats) if self.spec["input"] == "obs" else rows
        seen = self.source[where].to(self.device)  # [B, *O] or [B, *S]
        return network_input(self.spec, seen, seats.to(self.device))

    def sequences(self, episodes: np.ndarray) -> np.ndarray:
        """The sequences of given episodes."""
        return np.flatnonzero(np.isin(self.episodes, episodes))

    def index(self, sequences: np.ndarray) -> np.ndarray:
        """The samples of given sequences, in their order."""
        length = self.length[sequences]
        begins = length.cumsum() - length  # where each sequence begins in what is returned
        offsets = self.first[sequences] - begins
        return np.repeat(offsets, length) + np.arange(length.sum())

    def batches(
        self,
        sequences: np.ndarray,
        batch_size: int,
        rng: np.random.Generator | None,
    ) -> Iterator[Batch]:
        """Whole sequences, about batch_size samples at a time; in random order if rng is given."""
        if rng is not None:
            sequences = rng.permutation(sequences)
        length = self.length[sequences]
        part = (length.cumsum() - length) // batch_size
        cuts = np.flatnonzero(np.diff(part)) + 1
        for some in np.split(sequences, cuts):
            length = self.length[some]
            index = self.put(self.index(some))
            sequence = self.put(np.repeat(np.arange(len(some)), length))
            longest = int(length.max())
            place = Place(sequence, self.past[index], len(some), longest)
            yield Batch(index, place)

    def single(
        self,
        sequences: np.ndarray,
        batch_size: int,
        rng: np.random.Generator,
    ) -> Iterator[Batch]:
        """The same samples one by one, in random order."""
        order = rng.permutation(self.index(sequences))
        index = self.put(order)
        for part in index.split(batch_size):
            yield Batch(part, None)


def later_samples(samples: Samples, index: Tensor, horizon: int) -> Tensor:
    """Where in the batch [B] of whole sequences the same agent is 0 to `horizon` steps later, at most at its last."""
    ahead = torch.randint(0, horizon + 1, index.shape, device=index.device)
    here = torch.arange(len(index), device=index.device)
    return here + torch.minimum(ahead, samples.last[index] - index)


def best_goal_steps(dataset: Dataset, samples: Samples, horizon: int) -> Tensor:
    """How many steps ahead [M] the observation of highest value for the agent is; 1 ... horizon."""
    # DEVIATION: the value is the modelled agent's own, of the dataset's critic.
    rows = samples.rows.cpu().numpy()
    seats = samples.seats.cpu().numpy()
    values = samples.put(dataset.values[rows, seats])  # [M]
    index = torch.arange(len(samples), device=samples.device)
    worth = []
    for ahead in range(1, horizon + 1):
        later = torch.minimum(index + ahead, samples.last)
        worth.append(values[later])
    return torch.stack(worth).argmax(0) + 1


def balanced_weights(samples: Samples, index: np.ndarray) -> Tensor:
    """The inverse of how often each action occurs among the samples `index` [B], with limits. [n]"""
    num_actions = samples.spec["num_actions"]
    counts = torch.bincount(samples.actions[index], minlength=num_actions).float()
    weights = counts.sum() / (counts.clamp(min=1) * num_actions)
    return weights.clamp(max=MAX_CLASS_WEIGHT)


# ---------------------------------------------------------------- symmetries


class Symmetries(NamedTuple):
    """The 8 turns and reflections of a square map, as tables."""

    cells: Tensor  # [8, num_inputs], where each cell goes
    actions: Tensor  # [8, n], what each action becomes


def turned_cells(
    side: int,
    planes: int,
    turned: bool,
    flips: tuple[int, ...],
) -> Tensor:
    """Where each cell of a square map goes when it is transposed (if `turned`) and flipped along axes. [HWC]"""
    cells = torch.arange(side * side * planes).view(side, side, planes)
    if turned:
        cells = cells.transpose(0, 1)
    # image[r, q] is the cell that moves to (r, q); its inverse says where each cell goes.
    image = cells.flip(flips)
    return image.flatten().argsort()


def turned_move(step: Move, turned: bool, flips: tuple[int, ...]) -> Move:
    """A step under the same symmetry."""
    row, column = step
    if turned:
        row, column = column, row
    if 0 in flips:
        row = -row
    if 1 in flips:
        column = -column
    return row, column


def make_symmetries(
    spec: Spec,
    moves: tuple[Move, ...],
    device: torch.device,
) -> Symmetries | None:
    """The symmetries of a game on a square map. None: not square, not fed as cells, or no moves to turn.

    moves: the steps of the first actions, as an ObsSpec has them.
    """
    if not moves or not spec["max_cells"] or len(spec["shape"]) != 3:
        return None
    side, width, planes = spec["shape"]
    if side != width:
        return None
    size = side * side * planes
    others = range(len(moves), spec["num_actions"])  # actions that look alike from all sides
    all_cells, all_actions = [], []
    for turned, flips in itertools.product((False, True), FLIPS):
        cells = torch.arange(num_inputs(spec))  # empty places and seats stay
        cells[:size] = turned_cells(side, planes, turned, flips)
        if spec["centred"]:
            relative = turned_cells(2 * side - 1, planes, turned, flips)
            cells[size + 1 : -1] = size + 1 + relative
        all_cells.append(cells)
        steps = [turned_move(step, turned, flips) for step in moves]
        actions = [moves.index(step) for step in steps]
        all_actions.append(torch.tensor([*actions, *others]))
    cell_table = torch.stack(all_cells).to(device)
    action_table = torch.stack(all_actions).to(device)
    return Symmetries(cell_table, action_table)


class Shown(NamedTuple):
    """A minibatch as the networks see it: turned, where symmetries are shown."""

    x: Tensor  # [B, ...], network input
    actions: Tensor  # [B]
    masks: Tensor | None  # [B, n]
    timesteps: Tensor  # [B]
    turn: Tensor | None = None  # [B], which symmetry

    def rows(self, at: Tensor) -> Shown:
        """What the policy head needs of other rows of the same minibatch."""
        masks = None if self.masks is None else self.masks[at]
        return Shown(self.x, self.actions[at], masks, self.timesteps[at])


def show(samples: Samples, batch: Batch, symmetries: Symmetries | None) -> Shown:
    """The samples of a minibatch, each in a random one of the symmetries, if any."""
    index, place = batch
    x = samples.input_of(index)
    actions = samples.actions.index_select(0, index)
    timesteps = samples.timesteps.index_select(0, index)
    masks = None
    if samples.masks is not None:
        masks = samples.masks.index_select(0, index)
    if symmetries is None:
        return Shown(x, actions, masks, timesteps)
    num_symmetries = len(symmetries.cells)
    if place is None:
        turn = torch.randint(num_symmetries, index.shape, device=index.device)  # [B]
    else:  # a whole sequence is turned alike
        turns = torch.randint(num_symmetries, (place.num_sequences,), device=index.device)
        turn = turns[place.sequence]  # [B]
    x = symmetries.cells[turn[:, None], x]
    actions = symmetries.actions[turn, actions]
    if masks is not None:
        moved = symmetries.actions[turn]  # [B, n]
        masks = torch.zeros_like(masks).scatter_(1, moved, masks)
    return Shown(x, actions, masks, timesteps, turn)
