"""Opponent modelling on collected data: a latent z of what another agent is up to, and a model of its next action.

VAE (Kingma & Welling 2014, arXiv 1312.6114): its observation -> z. VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937):
z is one of a few learned codes. CVAE, after OMG (Yu et al., NeurIPS 2024): z also depends on what the agent saw and did
so far in the episode, and is drawn to the VAE's z of one of its next observations, the subgoal. A model of other agents
(MOA), a policy head on (obs, t, z), predicts its action.

    python pretrain_vae.py --data data/DATASET --model vae
    python pretrain_vae.py --data data/DATASET --model cvae

Metrics, deviations and results: docs/pretrain_vae.md
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dataset import Dataset, load_dataset
from envs.stag_hunt import HUNT_STAG, MOVES, SCRIPTED, action_probs

CHECKPOINT_FORMAT = "pretrain_vae/3"
PREPARE_CHUNK = 16_384  # samples turned into network input at a time
TINY = 1e-12
IMAGINED = 32  # policies that could have done what the agent did (cvae)
FLOOR = 0.01  # share of random actions in them, so that no single step rules one out
PROBE_SEQUENCES = 8192  # training sequences that the linear probe is fitted on
FIRST_LOGVAR = -5.0  # z starts with little noise: where noise drowns it, the decoder takes long to find it


@dataclass
class Args:
    data: str = ""
    """dataset folder made by collect_data.py (needed)"""
    exp_name: str = "pretrain_vae"
    """name of this experiment, part of the run's folder name"""
    seed: int = 1
    """seed of networks, split, minibatches and latent noise"""
    torch_deterministic: bool = True
    """deterministic CUDA kernels"""
    cuda: bool = True
    """train on the GPU if there is one"""
    num_threads: int | None = 1
    """CPU threads of one PyTorch operation; None: PyTorch's choice. The operations are small: more gains little and
    on busy cores costs much"""
    track: bool = False
    """mirror the TensorBoard log to Weights & Biases (offline, with a notice, when there is no login)"""
    wandb_project_name: str = "hyper-marl"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team; None: the login's default"""
    runs_dir: str = "runs"
    """folder that receives the run's folder"""

    model: Literal["vae", "cvae", "vqvae"] = "vae"
    """vae, vqvae: z from one observation; cvae: z from the observation and the agent's past in the episode"""
    loss: Literal["moa", "recon", "both"] = "moa"
    """what shapes z: the other agent's action, its observation (cvae: its subgoal observation), or both. With recon
    the policy head is trained all the same, on a z that it can not change"""
    policy_input: Literal["obs-z", "z"] = "obs-z"
    """what the policy head sees: obs, t and z, or z alone"""
    input: Literal["obs", "state"] = "obs"
    """what the networks see of the world: the modelled agent's observation, or the global state and its seat"""
    latent_size: int = 16
    """size of z"""
    hidden_size: int = 128
    """width of the layers"""
    history_size: int = 64
    """width of the GRU over the past (cvae)"""
    codebook_size: int = 32
    """number of codes (vqvae)"""
    horizon: int = 5
    """the subgoal is one of the agent's next `horizon` observations, and z predicts its actions that far (cvae)"""
    later_coef: float = 0.25
    """weight of predicting those later actions (cvae)"""
    subgoal: Literal["first", "random", "value"] = "random"
    """which of them: the next, one at random, or the one of highest value for that agent (needs --critic)"""
    critic: str | None = None
    """run folder of the hyper_mappo.py checkpoint whose critic rates subgoals"""
    teacher: str | None = None
    """run folder of a trained --model vae, of half the --latent-size, that encodes subgoals (cvae); None: a VAE is
    trained along with it"""

    epochs: int = 10
    """passes over the training episodes"""
    batch_size: int = 1024
    """samples per minibatch (cvae: about that many, in whole sequences)"""
    learning_rate: float = 1e-2
    """AdamW's learning rate; it falls linearly to 0"""
    weight_decay: float = 0.1
    """AdamW's decay of the weights, but for the layers next to z; keeps the table of cells from learning single
    episodes by heart"""
    kl_coef: float = 1e-4
    """weight of the KL divergence of z from its prior (a standard normal; half of a cvae's: the teacher's z of the
    subgoal)"""
    kl_warmup: float = 1.0
    """epochs in which kl_coef rises from 0"""
    free_bits: float = 0.0
    """KL in nats that each dimension of z may have for free"""
    recon_coef: float = 1e-2
    """weight of the reconstruction loss (summed over an observation's cells) with --loss both or recon"""
    recon_loss: Literal["auto", "bce", "mse"] = "auto"
    """per-cell cross-entropy or squared error; auto: bce for 0/1 observations"""
    class_balance: bool = False
    """weigh actions in the loss by the inverse of how often they occur (at most tenfold)"""
    augment: bool | None = None
    """show the 8 turns and reflections of the map, with moves turned alike; None: where that is known to be right"""
    heldout_fraction: float = 0.1
    """share of episodes that is never trained on"""
    holdout_policies: tuple[str, ...] = ()
    """policies of the dataset that are never trained on: episodes with them in any seat are scored apart"""
    memory_limit_mb: int = 4096
    """observations that need more than this are read from the disk, minibatch by minibatch"""
    resume: str | None = None
    """run folder to continue; flags given beside it must not change what is trained"""


# What numbers must be. (heldout_fraction: see the dataset's split)
LIMITS = {
    "at least 1": (
        lambda x: x >= 1,
        "num_threads latent_size hidden_size history_size codebook_size horizon epochs batch_size",
    ),
    "at least 0": (
        lambda x: x >= 0,
        "learning_rate weight_decay kl_coef kl_warmup free_bits recon_coef later_coef memory_limit_mb",
    ),
    "from 0 to 2147483647": (lambda x: 0 <= x < 2**31, "seed"),
}
FIXED_BY_CHECKPOINT = tuple(
    name
    for name in Args.__dataclass_fields__
    if name not in ("resume", "epochs", "cuda", "num_threads", "track", "memory_limit_mb")
)


# ---------------------------------------------------------------- data


def describe_input(dataset: Dataset, kind: str) -> dict[str, Any]:
    """What the networks need to know of their input; read off the active samples, saved in the checkpoint.

    0/1 observations with few cells set are fed as lists of these cells, `max_cells` long (0: as numbers). Where plane
    0 holds exactly the agent itself, `centred`, each cell is also given relative to the agent.
    """
    meta = dataset.meta
    shape = meta["obs_shape"] if kind == "obs" else meta["state_shape"]
    source = dataset.observations if kind == "obs" else dataset.states
    largest, most_set, centred = 0.0, 0, kind == "obs" and len(shape) == 3
    for start in range(0, dataset.num_steps, PREPARE_CHUNK):
        part = source[start : start + PREPARE_CHUNK]
        part = part[dataset.active[start : start + PREPARE_CHUNK]] if kind == "obs" else part  # [B, *O]
        largest = max(largest, float(np.abs(part).max(initial=0)))
        most_set = max(most_set, int(np.count_nonzero(part.reshape(len(part), -1), axis=1).max(initial=0)))
        centred = centred and bool((np.count_nonzero(part[..., 0], axis=(1, 2)) == 1).all())
    binary = str(source.dtype) == "uint8" and largest == 1
    sparse = binary and most_set <= math.prod(shape) // 8
    return {
        "input": kind,
        "shape": list(shape),
        "env_id": meta["env_id"],
        "num_agents": meta["num_agents"],
        "num_actions": meta["num_actions"],
        "binary": binary,
        "max_cells": most_set if sparse else 0,
        "centred": sparse and centred,
        "scale": 1.0 / largest if largest else 1.0,
        "time_scale": 1.0 / int(dataset.episode_lengths.max()),
    }


def network_input(spec: dict[str, Any], obs: torch.Tensor, seats: torch.Tensor) -> torch.Tensor:
    """Observations or states [B, *shape] of the modelled agents in `seats` [B] -> cells [B, P] int64 or numbers [B, F].

    Cells are numbered in the flattened observation, of F numbers; empty places of the list hold F. For a centred
    observation the same cells follow once more, counted from the agent's own; for a state, the seat (an observation is
    ego-first and needs none).
    """
    flat = obs.flatten(1)
    size = flat.shape[1]
    if not spec["max_cells"]:
        flat = flat.float() * spec["scale"]
        return flat if spec["input"] == "obs" else torch.cat([flat, F.one_hot(seats, spec["num_agents"]).float()], 1)
    if flat.device.type == "cpu" and (flat.count_nonzero(1) > spec["max_cells"]).any():
        most = int(flat.count_nonzero(1).max())
        raise ValueError(f"expected at most {spec['max_cells']} cells set in {spec['input']}, got {most}; use its env")
    values, cells = flat.topk(spec["max_cells"], sorted=False)
    cells = cells.masked_fill(values == 0, size)  # [B, P]
    if spec["input"] == "state":
        return torch.cat([cells, size + 1 + seats[:, None]], 1)
    if not spec["centred"]:
        return cells
    height, width, planes = spec["shape"]
    own = torch.where(cells % planes == 0, cells, size).amin(1, keepdim=True) // planes  # [B, 1], cell set in plane 0
    down = cells // planes // width - own // width + height - 1  # [B, P], from 0
    right = cells // planes % width - own % width + width - 1
    relative = (down * (2 * width - 1) + right) * planes + cells % planes
    relative = relative.masked_fill((cells == size) | (own == size // planes), num_inputs(spec) - size - 2)
    return torch.cat([cells, size + 1 + relative], 1)


def num_inputs(spec: dict[str, Any]) -> int:
    """How many different cells there are, or how many numbers."""
    size, seats = math.prod(spec["shape"]), spec["num_agents"] if spec["input"] == "state" else 0
    if not spec["centred"]:
        return size + seats + (1 if spec["max_cells"] else 0)
    height, width, planes = spec["shape"]
    return size + 1 + (2 * height - 1) * (2 * width - 1) * planes + 1


class Batch(NamedTuple):
    """Samples [B]. `place` tells the GRU where they belong: sequence [B], position [B], sequences, longest; or None."""

    index: torch.Tensor
    place: tuple[torch.Tensor, torch.Tensor, int, int] | None


class Samples:
    """Every active (row, seat) of a dataset, M of them, ordered by sequence (episode, seat) and time.

    In memory, on the device, unless the observations need more than `memory_limit_mb`: then they stay on the disk.
    """

    def __init__(self, dataset: Dataset, spec: dict[str, Any], device: torch.device, memory_limit_mb: int):
        rows, seats = np.nonzero(dataset.active)
        order = np.lexsort((rows, seats, dataset.episode_ids[rows]))
        rows, seats = rows[order], seats[order]
        self.spec, self.device = spec, device
        self.rows, self.seats = torch.from_numpy(rows), torch.from_numpy(seats)  # [M]

        def gather(field: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(field[rows, seats] if field.ndim > 1 else field[rows]).to(device)

        self.actions, self.policies = gather(dataset.actions), gather(dataset.policy_ids)  # [M], [M]
        self.timesteps = gather(dataset.timesteps)  # [M]
        self.masks = None if dataset.action_masks is None else gather(dataset.action_masks)  # [M, n]
        self.episodes = dataset.episode_ids[rows]  # [M]
        starts = np.flatnonzero(np.diff(self.episodes * dataset.num_agents + seats, prepend=-1))
        self.first, self.length = starts, np.diff(np.append(starts, len(rows)))  # [Q]
        self.last = torch.from_numpy(np.repeat(starts + self.length - 1, self.length)).to(device)  # [M]
        self.past = torch.from_numpy(np.arange(len(rows)) - np.repeat(starts, self.length)).to(device)  # [M]

        self.source = torch.from_numpy(dataset.observations if spec["input"] == "obs" else dataset.states)
        limit = memory_limit_mb * 2**20
        self.inputs, self.in_memory = None, True
        if spec["max_cells"] and len(rows) * 2 * spec["max_cells"] * 4 <= limit:
            chunks = torch.arange(len(rows)).split(PREPARE_CHUNK)
            self.inputs = torch.cat([self.input_of(chunk).int() for chunk in chunks])  # [M, P]
        elif not spec["max_cells"] and self.source.nbytes <= limit:
            self.source = self.source.to(device)
            self.rows, self.seats = self.rows.to(device), self.seats.to(device)
        else:
            self.in_memory = False

    def __len__(self) -> int:
        return len(self.actions)

    def input_of(self, index: torch.Tensor) -> torch.Tensor:
        """Network input of samples [B], of the past or the future too. [B, P] or [B, F]"""
        if self.inputs is not None:
            return self.inputs.index_select(0, index).long()  # (on a CPU 6 times as fast as inputs[index])
        index = index.to(self.rows.device)
        rows, seats = self.rows[index], self.seats[index]
        obs = self.source[rows, seats] if self.spec["input"] == "obs" else self.source[rows]
        return network_input(self.spec, obs.to(self.device), seats.to(self.device))

    def sequences(self, episodes: np.ndarray) -> np.ndarray:
        """The sequences of given episodes."""
        return np.flatnonzero(np.isin(self.episodes[self.first], episodes))

    def index(self, sequences: np.ndarray) -> np.ndarray:
        """The samples of given sequences, in their order."""
        length = self.length[sequences]
        return np.repeat(self.first[sequences] - (length.cumsum() - length), length) + np.arange(length.sum())

    def batches(self, sequences: np.ndarray, batch_size: int, rng: np.random.Generator | None) -> Iterator[Batch]:
        """Whole sequences, about batch_size samples at a time; in random order if rng is given."""
        sequences = sequences if rng is None else rng.permutation(sequences)
        length = self.length[sequences]
        part = (length.cumsum() - length) // batch_size
        for some in np.split(sequences, np.flatnonzero(np.diff(part)) + 1):
            length = self.length[some]
            index = torch.from_numpy(self.index(some)).to(self.device)
            sequence = torch.from_numpy(np.repeat(np.arange(len(some)), length)).to(self.device)
            yield Batch(index, (sequence, self.past[index], len(some), int(length.max())))

    def single(self, sequences: np.ndarray, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """The same samples one by one, in random order."""
        index = torch.from_numpy(rng.permutation(self.index(sequences))).to(self.device)
        return (Batch(part, None) for part in index.split(batch_size))


def turned_cells(height: int, width: int, planes: int, turned: bool, flips: tuple[int, ...]) -> torch.Tensor:
    """Where each cell of a square map goes when it is transposed (if `turned`) and flipped along axes. [HWC]"""
    cells = torch.arange(height * width * planes).view(height, width, planes)
    # image[r, q] is the cell that moves to (r, q); its inverse says where each cell goes.
    return (cells.transpose(0, 1) if turned else cells).flip(flips).flatten().argsort()


def make_symmetries(spec: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Where cells [8, num_inputs] and actions [8, n] go under the 8 symmetries of a square stag hunt map, or None."""
    height, width, planes = spec["shape"] if len(spec["shape"]) == 3 else (0, 1, 0)
    if height != width or not spec["max_cells"] or not spec["env_id"].startswith("stag_hunt"):
        return None
    size = height * width * planes
    all_cells, all_actions = [], []
    for turned, flips in itertools.product((False, True), ((), (0,), (1,), (0, 1))):
        cells = torch.arange(num_inputs(spec))  # empty places and seats stay
        cells[:size] = turned_cells(height, width, planes, turned, flips)
        if spec["centred"]:
            cells[size + 1 : -1] = size + 1 + turned_cells(2 * height - 1, 2 * width - 1, planes, turned, flips)
        steps = [step[::-1] if turned else step for step in MOVES]
        moved = [MOVES.index(tuple(-x if axis in flips else x for axis, x in enumerate(step))) for step in steps]
        all_cells.append(cells)
        all_actions.append(torch.tensor(moved + list(range(len(MOVES), spec["num_actions"]))))
    return torch.stack(all_cells), torch.stack(all_actions)


# ---------------------------------------------------------------- networks


class SumOfRows(torch.autograd.Function):
    """Sums the rows of a table [R, D] that x [B, P] lists. -> [B, D]

    As EmbeddingBag does, whose gradient takes four times as long on a CPU. Here it is an EmbeddingBag again: the
    gradient of row r is the sum of those of the samples that list r.
    """

    @staticmethod
    def forward(ctx, table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.num_rows = len(table)
        return F.embedding_bag(x, table, mode="sum")

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        rows = x.flatten().numpy().astype(np.min_scalar_type(ctx.num_rows))  # numpy sorts 16 bits ten times as fast
        samples = torch.from_numpy(rows.argsort(kind="stable")) // x.shape[1]  # [B * P], of row 0 first
        ends = torch.bincount(x.flatten(), minlength=ctx.num_rows).cumsum(0)  # [R]
        return F.embedding_bag(samples, grad, F.pad(ends, (1, 0)), mode="sum", include_last_offset=True), None


class ObsEncoder(nn.Module):
    """Network input [B, P] or [B, F] -> `views` separately trained first layers, [B, D] each.

    A list of cells goes through an embedding per cell, summed: the same as a linear layer on the planes, at a fraction
    of the cost, so that a second, ego-centred copy of the map is affordable. One table serves all views.
    """

    def __init__(self, spec: dict[str, Any], hidden_size: int, views: int):
        super().__init__()
        self.sparse = bool(spec["max_cells"])
        if self.sparse:
            self.embed = nn.EmbeddingBag(num_inputs(spec), views * hidden_size, mode="sum")
            nn.init.normal_(self.embed.weight, std=0.05)
            self.bias = nn.Parameter(torch.zeros(views * hidden_size))
        else:
            self.embed = nn.Linear(num_inputs(spec), views * hidden_size)
        self.views = views

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.sparse and x.device.type == "cpu":
            x = SumOfRows.apply(self.embed.weight, x)  # [B, views * D]
        else:
            x = self.embed(x)
        return F.relu(x + self.bias if self.sparse else x).chunk(self.views, 1)


def subgoal_size(latent_size: int) -> int:
    """How much of the CVAE's z, its last part, is the subgoal: the teacher's latent size."""
    return latent_size - latent_size // 2


class VAE(nn.Module):
    """VAE, CVAE or VQ-VAE with its policy head; `config` holds "model", sizes, "policy_input" and the input's "spec".

    For other programs: z = vae.encode(obs, history); history = vae.observe(history, obs, actions).
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config, self.spec = config, config["spec"]
        self.model, hidden, latent = config["model"], config["hidden_size"], config["latent_size"]
        self.num_actions = self.spec["num_actions"]
        # G: GRU state, and log-likelihood of the past under the imagined policies
        self.history_size = config["history_size"] + IMAGINED if self.model == "cvae" else 0
        self.sees_obs = config["policy_input"] == "obs-z"
        # One view of the input serves z and the policy head, unless the head must not shape z.
        views = 2 if self.sees_obs and config["loss"] == "recon" else 1
        self.encoder = ObsEncoder(self.spec, hidden, views)
        latent_here = latent
        if self.history_size:
            self.imagined = nn.Sequential(
                nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, self.num_actions * IMAGINED)
            )
            self.prior = nn.Parameter(torch.zeros(IMAGINED))
            self.gru = nn.GRU(IMAGINED, config["history_size"], batch_first=True)
            # DEVIATION: half of z, "who", comes from the history alone; the teacher's subgoal is for the other half.
            latent_here = subgoal_size(latent)
            self.to_who = nn.Linear(self.history_size, 2 * (latent - latent_here))
        self.to_latent = nn.Linear(
            hidden + self.history_size, latent_here if self.model == "vqvae" else 2 * latent_here
        )
        if self.model == "vqvae":
            self.codebook = nn.Parameter(torch.randn(config["codebook_size"], latent))
        seen = hidden + 1 + latent if self.sees_obs else latent
        self.policy = nn.Sequential(nn.Linear(seen, hidden), nn.ReLU(), nn.Linear(hidden, self.num_actions))
        size = math.prod(self.spec["shape"])
        self.decoder = nn.Sequential(nn.Linear(latent, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, size))
        if self.model != "vqvae":
            for layer in [self.to_latent] + ([self.to_who] if self.history_size else []):
                nn.init.constant_(layer.bias[layer.out_features // 2 :], FIRST_LOGVAR)

    def look(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Network input [B, ...] -> features for z and for the policy head (None with policy_input z). [B, D] each"""
        views = self.encoder(x)
        return views[0], views[-1] if self.sees_obs else None

    def step_features(self, features: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability of the actions under the imagined policies. [B, D], [B] -> [B, J]"""
        probs = self.imagined(features).view(len(features), self.num_actions, -1).softmax(1)  # [B, n, J]
        taken = probs[torch.arange(len(probs), device=probs.device), actions.clamp(min=0)]  # [B, J]
        return ((1 - FLOOR) * taken + FLOOR / self.num_actions).log()

    def histories(self, steps: torch.Tensor, place: tuple) -> torch.Tensor:
        """GRU state and log-likelihood before each sample, of the steps [B, J] before it in its sequence. -> [B, G]"""
        sequence, position, num_sequences, longest = place
        padded = steps.new_zeros(num_sequences, longest, IMAGINED).index_put((sequence, position), steps)
        after = torch.cat([self.gru(padded)[0], padded.cumsum(1)], 2)  # [Q, L, G], position t has seen step t
        before = F.pad(after, (0, 0, 1, -1))  # [Q, L, G], position t has seen steps up to t - 1
        return before[sequence, position]

    def belief(self, history: torch.Tensor) -> torch.Tensor:
        """Log of the Bayes posterior over the imagined policies. [B, G] -> [B, J]"""
        return (history[:, -IMAGINED:] + self.prior).log_softmax(1)

    def posterior(self, features: torch.Tensor, history: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of q(z), [B, Z] each; VQ-VAE: the encoder's output [B, Z] and the nearest code [B]."""
        if history is not None:
            history = torch.cat([history[:, :-IMAGINED], self.belief(history).exp()], 1)
            features = torch.cat([features, history], 1)
        out = self.to_latent(features)
        if self.model == "vqvae":
            distance = out.pow(2).sum(1, keepdim=True) - 2 * out @ self.codebook.T + self.codebook.pow(2).sum(1)
            return out, distance.argmin(1)
        mu, logvar = out.chunk(2, 1)
        if history is not None:
            mu, logvar = (
                torch.cat(pair, 1) for pair in zip(self.to_who(history).chunk(2, 1), (mu, logvar), strict=True)
            )
        return mu, logvar.clamp(-8, 4)

    def action_logits(
        self, seen: torch.Tensor | None, timesteps: torch.Tensor, z: torch.Tensor, masks: torch.Tensor | None
    ) -> torch.Tensor:
        """MOA. seen: the second part of `look` [B, D] or None; timesteps [B]; z [B, Z];
        masks [B, n] or None -> logits [B, n], hugely negative where illegal"""
        if seen is None:
            return self.policy(z)  # no mask either: it would tell something of the observation
        t = timesteps[:, None] * self.spec["time_scale"]  # [B, 1]
        logits = self.policy(torch.cat([seen, t, z], 1))
        return logits if masks is None else logits.masked_fill(~masks, torch.finfo(logits.dtype).min)

    # --- for other programs

    def initial_history(self, *batch: int, device: torch.device | str | None = None) -> torch.Tensor:
        """The history of agents that have not acted yet, zeros [*batch, G]; put it back to zero with each episode."""
        return torch.zeros(*batch, self.history_size, device=device or self.to_latent.weight.device)

    def check_input(self, kind: str, shape: tuple[int, ...]) -> None:
        """ValueError unless `kind` ("obs" or "state") of this shape is what the encoder was trained on."""
        if (kind, tuple(shape)) != (self.spec["input"], tuple(self.spec["shape"])):
            raise ValueError(
                f"this encoder was trained with --input {self.spec['input']} of shape {tuple(self.spec['shape'])}, but "
                f"was given {kind} of shape {tuple(shape)}; feed it that, or pretrain with --input {kind}"
            )

    def _features(self, obs: torch.Tensor) -> torch.Tensor:
        """obs [..., *O] -> [..., D]; a state [..., *S] -> [..., A, D]"""
        rank = len(self.spec["shape"])
        if obs.ndim < rank or tuple(obs.shape[obs.ndim - rank :]) != tuple(self.spec["shape"]):
            self.check_input("observation", tuple(obs.shape))
        if self.spec["input"] == "state":
            obs = obs.unsqueeze(-rank - 1).expand(*obs.shape[:-rank], self.spec["num_agents"], *self.spec["shape"])
        batch = obs.shape[:-rank]
        obs = obs.reshape(-1, *self.spec["shape"])
        seats = torch.arange(len(obs), device=obs.device) % self.spec["num_agents"]  # read for states only
        return self.look(network_input(self.spec, obs, seats))[0].view(*batch, -1)

    @torch.no_grad()
    def encode(self, obs: torch.Tensor, history: torch.Tensor | None = None) -> torch.Tensor:
        """Mean of z. obs [..., *O] as the dataset has it -> [..., Z]; with --input state: [..., *S] -> [..., A, Z].

        history [..., G] from `observe`, [..., A, G] with --input state; None: nothing has happened yet.
        Raises ValueError for an input of another shape.
        """
        features = self._features(obs)  # [..., D]
        batch = features.shape[:-1]
        if self.history_size and history is None:
            history = self.initial_history(*batch, device=features.device)
        flat = history.reshape(-1, self.history_size) if self.history_size else None
        mu, code = self.posterior(features.flatten(0, -2), flat)
        z = self.codebook[code] if self.model == "vqvae" else mu
        return z.view(*batch, -1)

    @torch.no_grad()
    def observe(self, history: torch.Tensor, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """The history after `actions` [...] were taken at `obs` [..., *O] (or a state). [..., G] -> [..., G]"""
        if not self.history_size:
            return history
        steps = self.step_features(self._features(obs).flatten(0, -2), actions.flatten())  # [B, J]
        before, likelihood = history.reshape(-1, self.history_size).tensor_split((-IMAGINED,), 1)
        _, after = self.gru(steps[:, None], before[None].contiguous())  # [1, B, G - J]
        return torch.cat([after[0], likelihood + steps], 1).view(history.shape)


# ---------------------------------------------------------------- losses


def sample(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    return mu + torch.randn_like(mu) * (0.5 * logvar).exp()


def gaussian_kl(q: tuple[torch.Tensor, torch.Tensor], free_bits: float, p: tuple | None = None) -> torch.Tensor:
    """KL(q || p), mean over the batch, at least `free_bits` per dimension, summed. -> scalar

    q, p: means and log-variances [B, Z]; p None: the standard normal.
    """
    mu, logvar = q
    mu_p, logvar_p = p or (torch.zeros_like(mu), torch.zeros_like(mu))
    kl = 0.5 * (logvar_p - logvar + (logvar.exp() + (mu - mu_p).pow(2)) / logvar_p.exp() - 1)  # [B, Z]
    return kl.mean(0).clamp(min=free_bits).sum()


def recon_loss(spec: dict[str, Any], kind: str, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Summed over cells, mean over samples. out: decoder output [B, F]; x: network input. -> scalar"""
    size = out.shape[1]
    if spec["max_cells"] and kind == "bce":
        # sum over cells of softplus(out) - out * target, where target is 1 at the listed cells only
        listed = F.pad(out, (0, 1)).gather(1, x[:, : spec["max_cells"]])  # [B, P], 0 for empty places
        return (F.softplus(out).sum() - listed.sum()) / len(out)
    target = x[:, :size]
    if spec["max_cells"]:
        target = torch.zeros(len(out), size + 1, device=out.device).scatter_(1, x[:, : spec["max_cells"]], 1)[:, :size]
    loss = F.binary_cross_entropy_with_logits if kind == "bce" else F.mse_loss
    return loss(out, target, reduction="sum") / len(out)


def compute_losses(
    model: VAE, teacher: VAE | None, samples: Samples, batch: Batch, args: Args, extras: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The losses of one minibatch, each a scalar, "loss" their weighted sum; and the VQ-VAE's codes (or z) [B].

    extras: "kl_coef" as warmed up, "class_weights" [n] or None, "symmetries" or None, "goal_steps" [M] or None.
    """
    index, place = batch
    x, actions = samples.input_of(index), samples.actions.index_select(0, index)
    masks = None if samples.masks is None else samples.masks.index_select(0, index)
    timesteps, turn = samples.timesteps.index_select(0, index), None
    if extras["symmetries"] is not None:
        cells, moves = extras["symmetries"]
        if place is None:
            turn = torch.randint(len(cells), index.shape, device=index.device)  # [B]
        else:  # a whole sequence is turned alike
            turn = torch.randint(len(cells), (place[2],), device=index.device)[place[0]]  # [B]
        x, actions = cells[turn[:, None], x], moves[turn, actions]
        if masks is not None:
            masks = torch.zeros_like(masks).scatter_(1, moves[turn], masks)

    features, seen = model.look(x)  # [B, D] each
    losses: dict[str, torch.Tensor] = {}
    history = None
    if model.history_size:
        steps = model.step_features(features, actions)  # [B, J]
        history = model.histories(steps, place)  # [B, G]
        if args.loss != "recon":
            # DEVIATION: the past is explained by a mixture of imagined policies, each action by the belief before it.
            losses["mixture_loss"] = -(model.belief(history) + steps).logsumexp(1).mean()
    mu, logvar = model.posterior(features, history)
    if model.model == "vqvae":
        code = logvar  # [B]
        nearest = model.codebook[code]  # [B, Z]
        losses["codebook_loss"] = F.mse_loss(nearest, mu.detach()) + 0.25 * F.mse_loss(mu, nearest.detach())
        z = mu + (nearest - mu).detach()  # straight-through: the code forwards, the identity backwards
        kl = torch.zeros((), device=mu.device)
    else:
        code = mu
        z = sample(mu, logvar)
    target = x
    if model.model == "cvae":
        if extras["goal_steps"] is not None:
            steps = extras["goal_steps"][index]
        elif args.subgoal == "first":
            steps = torch.ones_like(index)
        else:
            steps = torch.randint(1, args.horizon + 1, index.shape, device=index.device)
        goal = torch.minimum(index + steps, samples.last[index])  # the last observation is its own subgoal
        target = samples.input_of(goal)  # [B, ...]
        if turn is not None:
            target = extras["symmetries"][0][turn[:, None], target]
        mu_goal, logvar_goal = teacher.posterior(teacher.look(target)[0], None)
        who = mu.shape[1] - mu_goal.shape[1]  # the part of z from the history alone has no subgoal to meet
        kl = gaussian_kl((mu[:, :who], logvar[:, :who]), args.free_bits)
        kl = kl + gaussian_kl((mu[:, who:], logvar[:, who:]), args.free_bits, (mu_goal.detach(), logvar_goal.detach()))
        if args.teacher is None:
            out = teacher.decoder(sample(mu_goal, logvar_goal))
            losses["teacher_loss"] = args.recon_coef * recon_loss(model.spec, extras["recon_kind"], out, target)
            losses["teacher_loss"] += extras["kl_coef"] * gaussian_kl((mu_goal, logvar_goal), args.free_bits)
    elif model.model == "vae":
        kl = gaussian_kl((mu, logvar), args.free_bits)
    losses["kl_loss"] = kl

    used = z.detach() if args.loss == "recon" else z

    def moa_loss(at: torch.Tensor | slice) -> torch.Tensor:
        logits = model.action_logits(
            None if seen is None else seen[at], timesteps[at], used, None if masks is None else masks[at]
        )  # [B, n]
        return F.cross_entropy(logits, actions[at], weight=extras["class_weights"])

    losses["moa_loss"] = moa_loss(slice(None))
    if model.model == "cvae":
        # DEVIATION: z also has to explain what the agent does up to `horizon` steps later. Samples of a sequence are
        # neighbours in the batch.
        ahead = torch.randint(0, args.horizon + 1, index.shape, device=index.device)
        here = torch.arange(len(index), device=index.device)
        losses["later_moa_loss"] = moa_loss(here + torch.minimum(ahead, samples.last[index] - index))
    loss = losses["moa_loss"] + extras["kl_coef"] * kl
    if args.loss != "moa":
        losses["recon_loss"] = recon_loss(model.spec, extras["recon_kind"], model.decoder(z), target)
        loss = loss + args.recon_coef * losses["recon_loss"]
    loss = loss + args.later_coef * losses.get("later_moa_loss", 0.0)
    for name in ("codebook_loss", "teacher_loss", "mixture_loss"):
        loss = loss + losses.get(name, 0.0)
    return {"loss": loss, **losses}, code


# ---------------------------------------------------------------- ceilings, evaluation


class Ceilings(NamedTuple):
    """Action distributions [M, n] of two perfect predictors, NaN where they cannot be known, and the policy posterior.

    known: knows who plays. seen: knows what the model sees (one observation, or the history). posterior [M, K] of it.
    """

    known: torch.Tensor
    seen: torch.Tensor
    posterior: torch.Tensor


def script_probs(dataset: Dataset, rows: np.ndarray, seats: np.ndarray) -> torch.Tensor:
    """What each policy of the dataset would do at each sample. [M, K, n], NaN for policies that are no script"""
    meta = dataset.meta
    full_map = meta["env_id"].startswith("stag_hunt") and not meta["env_kwargs"].get("view")
    probs = torch.full((len(rows), len(meta["policies"]), meta["num_actions"]), torch.nan)
    for part in np.array_split(np.arange(len(rows)), 1 + len(rows) // PREPARE_CHUNK):
        if dataset.action_masks is None:
            masks = torch.ones(len(part), meta["num_actions"], dtype=torch.bool)
        else:
            masks = torch.from_numpy(dataset.action_masks[rows[part], seats[part]])
        for k, name in enumerate(meta["policies"]):
            if name == "random":
                probs[part, k] = masks / masks.sum(1, keepdim=True)
            elif name in SCRIPTED and full_map:
                obs = torch.from_numpy(dataset.observations[rows[part], seats[part]])
                probs[part, k] = action_probs(name, obs, masks)
    return probs


def glance(dataset: Dataset, rows: np.ndarray, seats: np.ndarray) -> np.ndarray:
    """What a single observation tells at a glance about who is playing, as one number. [M]

    Time step and, in the stag hunt, how many players, stags and hares are left and whether the agent stands on prey:
    at step 30 a nearest_hare has long left, and who stands on a stag mostly came for it.
    """
    parts = [dataset.timesteps[rows]]
    if dataset.meta["env_id"].startswith("stag_hunt"):
        sums = dataset.states.sum((1, 2), dtype=np.int64)[rows]  # [M, C]
        hunts = dataset.action_masks[rows, seats, HUNT_STAG:]  # [M, 2]
        parts += [sums[:, : dataset.num_agents].sum(1), sums[:, -2], sums[:, -1], hunts[:, 0], hunts[:, 1]]
    code = np.zeros(len(rows), np.int64)
    for part in parts:
        code = code * (int(part.max()) + 1) + part
    return code


def compute_ceilings(
    dataset: Dataset, samples: Samples, index: np.ndarray, train_index: np.ndarray, history: bool
) -> Ceilings:
    """The perfect predictors of the samples `index` [M'], whole sequences in time order.

    For a history the posterior over the dataset's policies is exact: the share of seats that each has, times the
    probabilities of what the agent did so far. For one observation it is the share that each policy has among the
    training samples with the same glance: a model may see a little more than that, and so beat this one.
    """
    rows, seats = samples.rows.cpu().numpy(), samples.seats.cpu().numpy()
    policies = samples.policies.cpu().numpy()
    num_policies = len(dataset.meta["policies"])
    probs = script_probs(dataset, rows[index], seats[index])  # [M', K, n]
    known = probs[torch.arange(len(index)), policies[index]]
    if history:
        first = train_index[samples.past.cpu().numpy()[train_index] == 0]
        prior = np.bincount(policies[first], minlength=num_policies) / len(first)  # [K]
        actions = samples.actions.cpu()[index]
        taken = probs.gather(2, actions[:, None, None].expand(-1, num_policies, 1))[..., 0]  # [M', K]
        total = taken.clamp(min=TINY).log().double().cumsum(0)
        before = F.pad(total, (0, 0, 1, -1))  # [M', K], samples before it, of earlier sequences too
        start = torch.arange(len(index)) - samples.past.cpu()[index]
        log_posterior = before - before[start] + torch.from_numpy(prior).clamp(min=TINY).log()
        posterior = log_posterior.softmax(1).float()
    else:
        code = glance(dataset, rows, seats)
        values, cell = np.unique(code, return_inverse=True)
        counts = np.zeros((len(values), num_policies))
        np.add.at(counts, (cell[train_index], policies[train_index]), 1)
        share = np.bincount(policies[train_index], minlength=num_policies) / len(train_index)
        counts += share  # one imaginary sample, for glances that training has not seen
        posterior = torch.from_numpy(counts / counts.sum(1, keepdims=True))[cell[index]].float()
    seen = (probs * posterior[..., None]).sum(1)
    return Ceilings(known, seen, posterior)


@torch.no_grad()
def predict(model: VAE, samples: Samples, sequences: np.ndarray, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [M', n] and mean z [M', Z] of all samples of some sequences, in their order."""
    logits, latents = [], []
    for index, place in samples.batches(sequences, batch_size, None):
        x = samples.input_of(index)
        features, seen = model.look(x)
        steps = model.step_features(features, samples.actions[index]) if model.history_size else None
        history = model.histories(steps, place) if model.history_size else None
        mu, code = model.posterior(features, history)
        z = model.codebook[code] if model.model == "vqvae" else mu
        masks = None if samples.masks is None else samples.masks[index]
        logits.append(model.action_logits(seen, samples.timesteps[index], z, masks))
        latents.append(z)
    return torch.cat(logits), torch.cat(latents)


def top_hits(probs: torch.Tensor, truth: torch.Tensor, k: int) -> torch.Tensor:
    """How often one of the k likeliest actions of probs [M, n] happens. truth: actions [M], or their probs [M, n]"""
    best = probs.topk(min(k, probs.shape[1]), 1).indices  # [M, k]
    hits = (best == truth[:, None]).any(1).float() if truth.ndim == 1 else truth.gather(1, best).sum(1)
    return torch.where(probs.isnan().any(1), torch.nan, hits)


def score(
    split: str,
    logits: torch.Tensor,
    samples: Samples,
    index: np.ndarray,
    ceilings: Ceilings,
    policies: list[str],
    probed: torch.Tensor | None = None,
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Rows of moa_eval_epoch*.csv: all samples, and by policy, action, and history length; and the confusion [n, n].

    top1 and top3 count what was done. "expected" and the ceilings are the scripts' own probability of the guess of the
    model and of the perfect predictors: without the luck of the draw, hence better to compare. With `probed`, the
    policies [M] that the linear probe takes the agents for, the same of the probe and the Bayes classifier.
    """
    logits, actions = logits.cpu(), samples.actions.cpu()[index]
    seated, past = samples.policies.cpu()[index], samples.past.cpu()[index]
    num_actions = logits.shape[1]
    numbers = {"top1": top_hits(logits, actions, 1), "top3": top_hits(logits, actions, 3)}
    numbers["cross_entropy"] = F.cross_entropy(logits, actions, reduction="none")
    for name, probs in (("expected", logits), ("ceiling_known", ceilings.known), ("ceiling", ceilings.seen)):
        numbers |= {f"{name}_top{k}": top_hits(probs, ceilings.known, k) for k in (1, 3)}
    if probed is not None:
        at_random = 1 / len(policies)  # where there was nothing to fit the probe on
        expected = ceilings.posterior.gather(1, probed.clamp(min=0)[:, None])[:, 0]
        numbers["probe"] = torch.where(probed < 0, at_random, (probed == seated).float())
        numbers["expected_probe"] = torch.where(probed < 0, at_random, expected)
        numbers["bayes"] = top_hits(ceilings.posterior, seated, 1)
        numbers["expected_bayes"] = ceilings.posterior.amax(1)
    perfect = top_hits(ceilings.seen, actions, 1)
    guess = logits.argmax(1)
    confusion = torch.bincount(actions * num_actions + guess, minlength=num_actions**2).view(num_actions, -1)
    groups = [("all", "all", torch.ones_like(actions, dtype=torch.bool))]
    groups += [("policy", name, seated == k) for k, name in enumerate(policies)]
    groups += [("action", str(a), actions == a) for a in range(num_actions)]
    groups += [("history", str(t), past == t) for t in range(int(past.max()) + 1)]
    rows = []
    for kind, name, mine in groups:
        if mine.any():
            row = {"split": split, "kind": kind, "name": name, "samples": int(mine.sum())}
            row |= {key: values[mine].mean().item() for key, values in numbers.items()}
            if kind == "action":
                hits = confusion[int(name), int(name)].item()
                guessed = confusion[:, int(name)].sum().item()
                row["precision"] = hits / guessed if guessed else 0.0
                row["recall"] = hits / int(mine.sum())
                row["ceiling_recall"] = perfect[mine].mean().item()
                row["f1"] = 2 * hits / (guessed + int(mine.sum()))
            rows.append(row)
    return rows, confusion


def linear_probe(z: np.ndarray, past: np.ndarray, fitted: tuple[np.ndarray, ...]) -> np.ndarray:
    """The policy that a linear probe reads off z. [M]; one probe for each history length.

    fitted: z, policies and history lengths of the training samples that it is fitted on; -1 where there are none.
    """
    from sklearn.linear_model import LogisticRegression

    guess = np.full(len(z), -1)
    for length in np.unique(past):
        mine, seen = past == length, fitted[2] == length
        labels = np.unique(fitted[1][seen])
        if len(labels) == 1:  # only one policy lasts so long
            guess[mine] = labels[0]
        elif len(labels):
            guess[mine] = LogisticRegression(max_iter=300).fit(fitted[0][seen], fitted[1][seen]).predict(z[mine])
    return guess


# ---------------------------------------------------------------- pictures


@contextlib.contextmanager
def picture(path: Path, rows: int, columns: int, width: float, height: float):
    """Gives axes [rows, columns] to draw on; writes the file at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    yield axes
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_curves(metrics: list[dict[str, float]], path: Path) -> None:
    """Losses, training and held-out, on a log scale; top-1 and top-3 with their ceilings."""
    epochs = [row["epoch"] for row in metrics]
    names = [name for name in metrics[0] if name.startswith("losses/")]
    with picture(path, 1, 2, 11, 4) as axes:
        for i, name in enumerate(names):
            for prefix, style in (("", "-"), ("heldout_", "--")):
                values = [max(row[prefix + name], 1e-6) for row in metrics]
                axes[0, 0].plot(epochs, values, style, color=f"C{i}", label=None if prefix else name[7:])
        axes[0, 0].set(yscale="log", xlabel="epoch", ylabel="loss", title="losses (dashed: held-out episodes)")
        for i, k in enumerate(("top1", "top3")):
            for key, style in ((k, "-"), (f"ceiling_{k}", "--")):
                values = [row[f"eval/{key}"] for row in metrics]
                axes[0, 1].plot(epochs, values, style, color=f"C{i}", label=key.replace("_", " "))
        axes[0, 1].set(xlabel="epoch", ylabel="accuracy", title="held-out episodes")
        for axis in axes.flat:
            axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # below the plot
            axis.grid(alpha=0.3)


def plot_confusion(confusion: torch.Tensor, path: Path) -> None:
    """Rows: what was done, in shares of the row; columns: what was predicted."""
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
    with picture(path, 1, 1, 5.5, 5) as axes:
        axes[0, 0].imshow(shares, vmin=0, vmax=1, cmap="Blues")
        for (i, j), share in np.ndenumerate(shares):
            axes[0, 0].text(j, i, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.5 else "black")
        axes[0, 0].set(xlabel="predicted action", ylabel="action", title="held-out episodes, shares of each row")
        axes[0, 0].set(xticks=range(len(shares)), yticks=range(len(shares)))


def plot_latents(z: np.ndarray, policies: np.ndarray, names: list[str], path: Path) -> None:
    """PCA and t-SNE of at most 1500 latents [M, Z], coloured by behaviour policy."""
    from sklearn.manifold import TSNE

    pick = np.random.default_rng(0).permutation(len(z))[:1500]
    z, policies = z[pick] - z[pick].mean(0), policies[pick]
    maps = {"PCA": z @ np.linalg.svd(z, full_matrices=False)[2][:2].T if z.shape[1] > 1 else np.repeat(z, 2, 1)}
    if len(z) > 50:
        maps["t-SNE"] = TSNE(perplexity=30, random_state=0, init="random").fit_transform(z)
    with picture(path, 1, len(maps), 5.5 * len(maps), 5) as axes:
        for axis, (title, points) in zip(axes.flat, maps.items(), strict=True):
            for k, name in enumerate(names):
                axis.scatter(*points[policies == k].T, s=5, label=Path(name).name)
            axis.set(title=f"{title} of z")
            axis.legend(fontsize=7)


def plot_probe(rows: list[dict[str, Any]], path: Path) -> None:
    lengths = [int(row["name"]) for row in rows]
    with picture(path, 1, 1, 6.5, 4) as axes:
        for name, label, colour in (("bayes", "Bayes classifier", "C0"), ("probe", "linear probe of z", "C1")):
            axes[0, 0].plot(lengths, [row[f"expected_{name}"] for row in rows], color=colour, label=label)
            axes[0, 0].plot(lengths, [row[name] for row in rows], ".", color=colour, label=f"{label}, counted")
        axes[0, 0].set(xlabel="steps of the agent seen before", ylabel="accuracy", title="which policy? (held-out)")
        axes[0, 0].grid(alpha=0.3)
        axes[0, 0].legend()


def plot_reconstructions(truth: np.ndarray, recon: np.ndarray, path: Path) -> None:
    """Pairs of observations [n, *O]: maps as one picture, a colour for each plane; others as lines."""
    from matplotlib import colormaps

    colours = np.array([colormaps["tab10"](i % 10)[:3] for i in range(truth.shape[-1])])  # [C, 3]
    with picture(path, 2, len(truth), 1.8 * len(truth), 3.8) as axes:
        for (row, column), axis in np.ndenumerate(axes):
            image = (truth, recon)[row][column]
            if image.ndim == 3:
                axis.imshow(np.clip(1 - np.clip(image, 0, 1) @ (1 - colours), 0, 1))
            else:
                axis.plot(image.ravel(), linewidth=0.5)
            axis.set(xticks=[], yticks=[], title=("true", "decoded")[row])


# ---------------------------------------------------------------- checkpoints


# --- same in: hyper_mappo.py, world_model.py [checkpoint files] ---
def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Writes to a temporary file beside `path` and renames it: a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(run_dir: str | Path, device: str | torch.device = "cpu") -> dict:
    """The checkpoint dict of a run folder (or of a .pt file). ValueError: missing, unreadable or another script's."""
    path = Path(run_dir)
    path = path / "latest.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: give a run folder that holds latest.pt")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}): give another run") from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if found != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} has format {found!r}, expected {CHECKPOINT_FORMAT!r}: give a run of this script")
    return checkpoint


# --- end [checkpoint files] ---


def start_wandb(args: Args, run_dir: Path) -> None:
    """Mirrors the TensorBoard log; without a login the run is logged offline instead of asking for a key."""
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None and wandb.api.api_key is None:
        mode = "offline"
        print(f"W&B: no login found, logging offline; upload with: wandb sync {run_dir / 'wandb' / 'offline-run-*'}")
    names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_dir.name}
    wandb.init(**names, dir=run_dir, config=asdict(args), sync_tensorboard=True, mode=mode)


def load_vae(path: str | Path, device: torch.device | str = "cpu") -> VAE:
    """The model of a run folder (its best.pt) or of a checkpoint file, frozen. ValueError as load_checkpoint."""
    path = Path(path)
    checkpoint = load_checkpoint(path / "best.pt" if (path / "best.pt").exists() else path, device)
    model = VAE(checkpoint["config"]).to(device)
    model.load_state_dict(checkpoint["model"])
    return model.requires_grad_(False).eval()


# --- same in: hyper_mappo.py, world_model.py [limits] ---
def check_limits(args: object, limits: dict[str, tuple[Callable, str]]) -> None:
    """ValueError for a number that is not what `limits` asks for: {what it must be: (whether it is, names of flags)}.
    None, where a flag takes it, passes; NaN never does."""
    for limit, (holds, names) in limits.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise ValueError(f"--{name.replace('_', '-')} must be {limit}, got {value}")


# --- end [limits] ---


def check_args(args: Args) -> None:
    """Everything that can be wrong before the data is read: ValueError in one line."""
    if not args.data:
        raise ValueError("--data: expected a dataset folder, got none; make one with collect_data.py")
    check_limits(args, LIMITS)
    if (args.subgoal == "value") != (args.critic is not None):
        raise ValueError("--subgoal value and --critic RUN_DIR: expected both or none, got one; add or drop the other")
    if args.model != "cvae" and (args.teacher or args.critic):
        raise ValueError(
            f"--teacher and --critic: expected with --model cvae only, got --model {args.model}; drop them"
        )


def load_teacher(args: Args, spec: dict[str, Any], config: dict[str, Any], device: torch.device) -> VAE | None:
    """The VAE that encodes subgoals: the frozen one of --teacher, or a new one to be trained along; None if no CVAE."""
    if args.model != "cvae":
        return None
    if args.teacher is None:
        sizes = {"model": "vae", "policy_input": "z", "latent_size": subgoal_size(args.latent_size)}
        return VAE({**config, **sizes}).to(device)
    teacher = load_vae(args.teacher, device)
    teacher.check_input(spec["input"], spec["shape"])
    given = {"model": teacher.model, "latent_size": teacher.config["latent_size"], "cells": teacher.spec["max_cells"]}
    expected = {"model": "vae", "latent_size": subgoal_size(args.latent_size), "cells": spec["max_cells"]}
    if given != expected:
        raise ValueError(f"--teacher: expected {expected}, got {given}; pretrain one on this data with --model vae")
    return teacher


def best_goal_steps(dataset: Dataset, samples: Samples, args: Args) -> torch.Tensor:
    """How many steps ahead [M] the observation of highest value for the agent is, by --critic; 1 ... horizon."""
    from hyper_mappo import load_critic  # only here: the other choices need no policy code

    critic = load_critic(args.critic, samples.device)
    try:
        states = torch.from_numpy(dataset.states)
        values = torch.cat([critic(part.to(samples.device)) for part in states.split(4096)])  # [S, A]
    except RuntimeError as error:
        shape = tuple(dataset.meta["state_shape"])
        raise ValueError(f"--critic: expected one for states of shape {shape}; train it on this env") from error
    values = values[samples.rows.to(values.device), samples.seats.to(values.device)]  # [M]
    index = torch.arange(len(samples), device=samples.device)
    ahead = [values[torch.minimum(index + k, samples.last)] for k in range(1, args.horizon + 1)]
    return torch.stack(ahead).argmax(0) + 1


# ---------------------------------------------------------------- main


def main(args: Args) -> Path:
    """Trains (or resumes); returns the run folder. Raises ValueError, one line, for what the user can put right."""
    # ---- arguments
    check_args(args)
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    first_epoch = checkpoint["epoch"] if checkpoint else 0
    if first_epoch >= args.epochs:
        raise ValueError(f"{args.resume} has already done {first_epoch} epochs; raise --epochs")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)

    # ---- data
    dataset = load_dataset(args.data)
    meta, longest = dataset.meta, int(dataset.episode_lengths.max())
    if meta["num_actions"] is None:
        raise ValueError(f"{args.data}: expected discrete actions, got continuous ones; use another env")
    if args.model == "cvae" and args.horizon >= longest:
        raise ValueError(f"--horizon: expected less than the longest episode, {longest} steps, got {args.horizon}")
    split = dataset.split_episodes(args.seed, args.heldout_fraction, args.holdout_policies)
    spec = describe_input(dataset, args.input)
    samples = Samples(dataset, spec, device, args.memory_limit_mb)
    parts = {name: samples.sequences(episodes) for name, episodes in split.items()}
    train = parts.pop("train")
    policies = samples.policies.cpu()
    for name in args.holdout_policies:
        if meta["policies"].index(name) not in policies[samples.index(parts["heldout_policies"])]:
            raise ValueError(f"--holdout-policies: expected active samples of {name}, got none; collect some")
    train_index = samples.index(train)
    heldout = {}  # sequences, samples, ceilings of each part
    for name, some in parts.items():
        if len(some):
            index = samples.index(some)
            heldout[name] = some, index, compute_ceilings(dataset, samples, index, train_index, args.model == "cvae")
    symmetries = make_symmetries(spec) if args.augment is not False else None
    if args.augment and symmetries is None:
        raise ValueError("--augment: expected 0/1 maps of a square stag hunt, got others; leave it out")
    recon_kind = args.recon_loss if args.recon_loss != "auto" else ("bce" if spec["binary"] else "mse")
    if recon_kind == "bce" and not spec["binary"]:
        raise ValueError("--recon-loss bce: expected 0/1 observations, got others; use mse")
    class_weights = None
    if args.class_balance:
        counts = torch.bincount(samples.actions[train_index], minlength=meta["num_actions"]).float()
        class_weights = (counts.sum() / (counts.clamp(min=1) * len(counts))).clamp(max=10.0)

    # ---- seeding
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic

    # ---- networks
    sizes = ("model", "loss", "policy_input", "latent_size", "hidden_size", "history_size", "codebook_size")
    config = {name: getattr(args, name) for name in sizes} | {"spec": spec}
    model = VAE(config).to(device)
    teacher = load_teacher(args, spec, config, device)
    trained = nn.ModuleList([model, teacher] if teacher and not args.teacher else [model])
    decays, free = [], []  # what makes z and what reads it needs large weights to tell one cell from the next
    for name, parameter in trained.named_parameters():
        (free if re.search(r"\.(to_latent|to_who|decoder)\.", name) else decays).append(parameter)
    groups = [{"params": decays}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    extras = {
        "symmetries": None if symmetries is None else tuple(table.to(device) for table in symmetries),
        "class_weights": None if class_weights is None else class_weights.to(device),
        "goal_steps": best_goal_steps(dataset, samples, args) if args.subgoal == "value" else None,
        "recon_kind": recon_kind,
    }

    # ---- logging
    env_name = re.sub(r"[^A-Za-z0-9.-]+", "-", meta["env_id"])
    run_name = f"{env_name}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume) if args.resume else Path(args.runs_dir) / run_name
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
    if args.track:
        start_wandb(args, run_dir)
    writer = SummaryWriter(str(run_dir), purge_step=first_epoch + 1 if checkpoint else None)
    stored = "in memory" if samples.in_memory else "read from the disk"
    print(f"{run_dir}: {args.model}, {len(train_index)} training samples of {len(samples)}, {stored}, on {device}")

    # ---- resume
    metrics: list[dict[str, float]] = []
    best = math.inf
    if checkpoint:
        if checkpoint["config"] != config:
            raise ValueError(f"{args.resume} was trained on other data than {args.data} is now; give the same dataset")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if teacher:
            teacher.load_state_dict(checkpoint["teacher"])
        metrics, best = checkpoint["metrics"], checkpoint["best"]

    # ---- loop
    for epoch in range(first_epoch, args.epochs):
        # Every epoch has random numbers of its own, so that a resumed run goes on exactly as if it had not stopped.
        torch.manual_seed(1_000_003 * args.seed + epoch)
        rng = np.random.default_rng([args.seed, epoch])
        make_batches = samples.batches if args.model == "cvae" else samples.single
        num_batches = math.ceil(len(train_index) / args.batch_size)
        sums: dict[str, torch.Tensor] = {}
        used = torch.zeros(args.codebook_size, device=device)
        start, count = time.perf_counter(), 0
        progress = tqdm(make_batches(train, args.batch_size, rng), total=num_batches, leave=False, disable=None)
        for i, batch in enumerate(progress):
            done = epoch + min(1.0, i / num_batches)  # epochs
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * (1 - done / args.epochs)
            extras["kl_coef"] = args.kl_coef * (min(1.0, done / args.kl_warmup) if args.kl_warmup else 1.0)
            losses, code = compute_losses(model, teacher, samples, batch, args, extras)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            with torch.no_grad():
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value.detach() * len(batch.index)
                if args.model == "vqvae":
                    used.scatter_add_(0, code, torch.ones_like(code, dtype=used.dtype))
            count += len(batch.index)
        row: dict[str, float] = {"epoch": epoch + 1}
        row |= {f"losses/{name}": value.item() / count for name, value in sums.items()}
        row["charts/samples_per_second"] = count / (time.perf_counter() - start)
        if not math.isfinite(row["losses/loss"]):
            raise FloatingPointError(f"the loss is {row['losses/loss']} in epoch {epoch + 1}: lower --learning-rate")
        if args.model == "vqvae":
            share = used / used.sum()
            row["vq/perplexity"] = math.exp(-(share * (share + TINY).log()).sum().item())
            row["vq/codes_used"] = int((used > 0).sum())
            dead = (used == 0).nonzero()[:, 0]
            if len(dead) and epoch + 1 < args.epochs:  # reborn where the encoder is
                with torch.no_grad():
                    some = torch.from_numpy(rng.choice(train_index, len(dead))).to(device)
                    model.codebook[dead] = model.posterior(model.look(samples.input_of(some))[0], None)[0]

        # ---- evaluation
        model.eval()
        with torch.no_grad():
            totals: dict[str, float] = {}
            quiet = {**extras, "symmetries": None}
            for batch in samples.batches(heldout["heldout_episodes"][0], args.batch_size, None):
                for name, value in compute_losses(model, teacher, samples, batch, args, quiet)[0].items():
                    totals[name] = totals.get(name, 0.0) + value.item() * len(batch.index)
        num_heldout = len(heldout["heldout_episodes"][1])
        row |= {f"heldout_losses/{name}": total / num_heldout for name, total in totals.items()}
        table, arrays = [], {}
        for name, (sequences, index, ceilings) in heldout.items():
            logits, z = predict(model, samples, sequences, args.batch_size)
            rows, confusion = score(name, logits, samples, index, ceilings, meta["policies"])
            table += rows
            found = {"logits": logits, "z": z, "confusion": confusion, "actions": samples.actions[index]}
            found |= {"policy_ids": samples.policies[index], "history": samples.past[index]}
            arrays |= {f"{name}_{key}": value.cpu().numpy() for key, value in found.items()}
            prefix = "eval" if name == "heldout_episodes" else "eval_policies"
            numbers = {key: value for key, value in rows[0].items() if isinstance(value, float)}
            row |= {f"{prefix}/{key}": value for key, value in numbers.items()}
            print(
                f"[MOA] epoch {epoch + 1}: top1={numbers['top1']:.4f}, top3={numbers['top3']:.4f}, "
                f"cross-entropy={numbers['cross_entropy']:.4f} on {name}; expected {numbers['expected_top1']:.4f} and "
                f"{numbers['expected_top3']:.4f} of {numbers['ceiling_top1']:.4f} and {numbers['ceiling_top3']:.4f}; "
                f"{row['charts/samples_per_second']:.0f} samples/s"
            )
        columns = list(dict.fromkeys(key for line in table for key in line))
        write_csv(run_dir / f"moa_eval_epoch{epoch + 1}.csv", columns, table)
        np.savez(run_dir / f"moa_eval_epoch{epoch + 1}.npz", **arrays)
        for name, value in row.items():
            if name != "epoch" and math.isfinite(value):
                writer.add_scalar(name, value, epoch + 1)
        metrics.append(row)
        write_csv(run_dir / "metrics.csv", list(row), metrics)
        criterion = row["heldout_losses/recon_loss" if args.loss == "recon" else "eval/cross_entropy"]
        is_best, best = criterion < best, min(best, criterion)
        saved = {
            "format": CHECKPOINT_FORMAT,
            "args": asdict(args),
            "config": config,
            "epoch": epoch + 1,
            "best": best,
            "metrics": metrics,
            "model": model.state_dict(),
            "teacher": teacher.state_dict() if teacher else None,
            "optimizer": optimizer.state_dict(),
        }
        save_checkpoint(saved, run_dir / "latest.pt")
        if is_best:
            save_checkpoint(saved, run_dir / "best.pt")
        model.train()

    # ---- probe and pictures, of the best model
    model = load_vae(run_dir, device)
    sequences, index, ceilings = heldout["heldout_episodes"]
    logits, z = predict(model, samples, sequences, args.batch_size)
    policies, past = samples.policies.cpu().numpy(), samples.past.cpu().numpy()
    plot_curves(metrics, run_dir / "learning_curve.png")
    plot_latents(z.cpu().numpy(), policies[index], meta["policies"], run_dir / "latents.png")
    some = train[:PROBE_SEQUENCES]
    fitted = samples.index(some)
    fitted = predict(model, samples, some, args.batch_size)[1].cpu().numpy(), policies[fitted], past[fitted]
    guess = torch.from_numpy(linear_probe(z.cpu().numpy(), past[index], fitted))
    rows, confusion = score("heldout_episodes", logits, samples, index, ceilings, meta["policies"], guess)
    plot_confusion(confusion, run_dir / "confusion.png")
    probe = [row for row in rows if row["kind"] in ("all", "history")]
    write_csv(run_dir / "probe.csv", list(probe[0]), probe)
    plot_probe(probe[1:], run_dir / "probe.png")
    for row in (probe[0], min(probe[1:], key=lambda row: row["expected_probe"] / row["expected_bayes"])):
        print(
            f"[probe] z -> policy, history {row['name']}: {row['probe']:.4f}, Bayes {row['bayes']:.4f}; "
            f"expected {row['expected_probe']:.4f} of {row['expected_bayes']:.4f}"
        )
    if args.loss != "moa":
        every = max(1, len(index) // 6)
        some = torch.from_numpy(index[::every][:6]).to(device)
        goal = torch.minimum(some + args.horizon, samples.last[some]) if args.model == "cvae" else some
        rows, seats = samples.rows[goal.cpu()].numpy(), samples.seats[goal.cpu()].numpy()
        truth = dataset.observations[rows, seats] if args.input == "obs" else dataset.states[rows]
        truth = truth * (1.0 if spec["max_cells"] else spec["scale"])
        decoded = model.decoder(z[::every][:6]).view(truth.shape)
        decoded = decoded.sigmoid() if recon_kind == "bce" else decoded
        plot_reconstructions(truth, decoded.cpu().numpy(), run_dir / "reconstructions.png")

    # ---- close
    writer.close()
    print(f"done: {run_dir}")
    return run_dir


def write_csv(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


def cli(argv: list[str] | None = None) -> int:
    """The command line: 0 done, 1 the run broke down, 2 unusable arguments."""
    argv = sys.argv[1:] if argv is None else argv
    args = tyro.cli(Args, args=argv)
    try:
        if args.resume:  # the run's own arguments are the defaults, flags given beside it come on top
            saved = Args(**load_checkpoint(args.resume)["args"])
            args = tyro.cli(Args, args=argv, default=saved)
            for name in FIXED_BY_CHECKPOINT:
                if getattr(args, name) != getattr(saved, name):
                    raise ValueError(
                        f"--{name.replace('_', '-')} {getattr(args, name)} contradicts the checkpoint's "
                        f"{getattr(saved, name)}; leave it out, or start a new run"
                    )
        main(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; continue with --resume {args.resume or 'RUN_DIR'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
