"""Opponent modelling on collected data: a latent z of what another agent is up to, and a model of its next action.

VAE (Kingma & Welling 2014, arXiv 1312.6114): its observation -> z. VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937):
z is one of a few learned codes. CVAE, after OMG (Yu et al., NeurIPS 2024): z also depends on what the agent saw and did
so far in the episode, and is drawn to the VAE's z of one of its next observations, the subgoal. A model of other agents
(MOA), a policy head on (obs, t, z), predicts its action.

    python pretrain_vae.py --data data/DATASET --model vae
    python pretrain_vae.py --data data/DATASET --model cvae

Metrics and deviations: docs/pretrain_vae.md. What it reaches: docs/results/pretrain_vae.md
"""

from __future__ import annotations

import startup  # noqa: F401

# isort: split

import itertools
import math
import random
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import runs
from dataset import LARGE, Dataset, check_checksums, load_dataset, same_data
from opponent_samples import (
    Batch,
    Place,
    Samples,
    Shown,
    Spec,
    Symmetries,
    balanced_weights,
    best_goal_steps,
    describe_input,
    flat_obs_spec,
    later_samples,
    make_symmetries,
    network_input,
    num_inputs,
    show,
)
from opponent_scores import Heldout, compute_ceilings, draw_reconstructions, evaluate, report
from runs import UsageError

Tensors = dict[str, Tensor]
Numbers = dict[str, float]  # to be logged
Config = dict[str, Any]  # of a VAE
Progress = dict[str, Any]  # of an epoch, see new_progress

CHECKPOINT_FORMAT = "pretrain_vae/3"
TINY = 1e-12
IMAGINED = 32  # policies that could have done what the agent did (cvae)
FLOOR = 0.01  # share of random actions in them, so that no single step rules one out
PROBE_SEQUENCES = 8192  # training sequences that the linear probe is fitted on
FIRST_LOGVAR = -5.0  # z starts with little noise: where noise drowns it, the decoder takes long to find it
COMMITMENT = 0.25  # weight of drawing the encoder to its code, beside the code to the encoder (vqvae)


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
    """which of them: the next, one at random, or the one of highest value for that agent (needs values in the data:
    collect_data.py --values-of)"""
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
    """run folder to continue, or to finish where all epochs are done; flags beside it must not change what is trained.
    Data that has moved: its new place with --data"""


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
MAY_CHANGE = ("resume", "data", "epochs", "cuda", "num_threads", "track", "memory_limit_mb")  # in a resumed run
FIXED_BY_CHECKPOINT = tuple(field.name for field in fields(Args) if field.name not in MAY_CHANGE)
SIZES = ("model", "loss", "policy_input", "latent_size", "hidden_size", "history_size", "codebook_size")


# ---------------------------------------------------------------- networks


class SumOfRows(torch.autograd.Function):
    """Sums the rows of a table [R, D] that x [B, P] lists. -> [B, D]

    As EmbeddingBag does, whose gradient takes four times as long on a CPU. Here it is an EmbeddingBag again: the
    gradient of row r is the sum of those of the samples that list r.
    """

    @staticmethod
    def forward(ctx, table: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.num_rows = len(table)
        return F.embedding_bag(x, table, mode="sum")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        listed = x.flatten()  # [B * P]
        rows = listed.numpy().astype(np.min_scalar_type(ctx.num_rows))  # numpy sorts 16 bits ten times as fast
        order = torch.from_numpy(rows.argsort(kind="stable"))  # [B * P], of row 0 first
        samples = order // x.shape[1]
        ends = torch.bincount(listed, minlength=ctx.num_rows).cumsum(0)  # [R]
        offsets = F.pad(ends, (1, 0))
        return F.embedding_bag(samples, grad, offsets, mode="sum", include_last_offset=True), None


class ObsEncoder(nn.Module):
    """Network input [B, P] or [B, F] -> `views` separately trained first layers, [B, D] each.

    A list of cells goes through an embedding per cell, summed: the same as a linear layer on the planes, at a fraction
    of the cost, so that a second, ego-centred copy of the map is affordable. One table serves all views.
    """

    def __init__(self, spec: Spec, hidden_size: int, views: int):
        super().__init__()
        self.sparse, self.views = bool(spec["max_cells"]), views
        width = views * hidden_size
        if self.sparse:
            self.embed = nn.EmbeddingBag(num_inputs(spec), width, mode="sum")
            nn.init.normal_(self.embed.weight, std=0.05)
            self.bias = nn.Parameter(torch.zeros(width))
        else:
            self.embed = nn.Linear(num_inputs(spec), width)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.sparse:
            out = self.embed(x)  # [B, views * D]
        elif x.device.type == "cpu":
            out = SumOfRows.apply(self.embed.weight, x) + self.bias
        else:
            out = self.embed(x) + self.bias
        return F.relu(out).chunk(self.views, 1)


def subgoal_size(latent_size: int) -> int:
    """How much of the CVAE's z, its last part, is the subgoal: the teacher's latent size."""
    return latent_size - latent_size // 2


def mlp(size_in: int, hidden_size: int, size_out: int) -> nn.Sequential:
    """One hidden layer."""
    first = nn.Linear(size_in, hidden_size)
    last = nn.Linear(hidden_size, size_out)
    return nn.Sequential(first, nn.ReLU(), last)


class VAE(nn.Module):
    """VAE, CVAE or VQ-VAE with its policy head; `config` holds "model", sizes, "policy_input" and the input's "spec".

    For other programs: z = vae.encode(obs, history); history = vae.observe(history, obs, actions).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.spec = config, config["spec"]
        self.model, hidden, latent = config["model"], config["hidden_size"], config["latent_size"]
        self.num_actions = self.spec["num_actions"]
        self.sees_obs = config["policy_input"] == "obs-z"
        # One view of the input serves z and the policy head, unless the head must not shape z.
        views = 2 if self.sees_obs and config["loss"] == "recon" else 1
        self.encoder = ObsEncoder(self.spec, hidden, views)
        self.history_size = 0
        latent_here = latent  # what the observation has a say in
        if self.model == "cvae":
            # G: GRU state, and log-likelihood of the past under the imagined policies
            self.history_size = config["history_size"] + IMAGINED
            self.imagined = mlp(hidden, hidden, self.num_actions * IMAGINED)
            self.prior = nn.Parameter(torch.zeros(IMAGINED))
            self.gru = nn.GRU(IMAGINED, config["history_size"], batch_first=True)
            # DEVIATION: half of z, "who", comes from the history alone; the teacher's subgoal is for the other half.
            latent_here = subgoal_size(latent)
            self.to_who = nn.Linear(self.history_size, 2 * (latent - latent_here))
        size_out = latent_here if self.model == "vqvae" else 2 * latent_here
        self.to_latent = nn.Linear(hidden + self.history_size, size_out)
        if self.model == "vqvae":
            self.codebook = nn.Parameter(torch.randn(config["codebook_size"], latent))
        seen = hidden + 1 + latent if self.sees_obs else latent
        self.policy = mlp(seen, hidden, self.num_actions)
        self.decoder = mlp(latent, 2 * hidden, math.prod(self.spec["shape"]))
        if self.model != "vqvae":
            start_quiet(self.to_latent)
        if self.model == "cvae":
            start_quiet(self.to_who)

    def look(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Network input [B, ...] -> features for z and for the policy head (None with policy_input z). [B, D] each"""
        views = self.encoder(x)
        return views[0], views[-1] if self.sees_obs else None

    def step_features(self, features: Tensor, actions: Tensor) -> Tensor:
        """Log-probability of the actions under the imagined policies. [B, D], [B] -> [B, J]"""
        scores = self.imagined(features).view(len(features), self.num_actions, -1)
        probs = scores.softmax(1)  # [B, n, J]
        every = torch.arange(len(probs), device=probs.device)
        taken = probs[every, actions.clamp(min=0)]  # [B, J]
        return ((1 - FLOOR) * taken + FLOOR / self.num_actions).log()

    def histories(self, steps: Tensor, place: Place) -> Tensor:
        """GRU state and log-likelihood before each sample, of the steps [B, J] before it in its sequence. -> [B, G]"""
        where = (place.sequence, place.position)
        padded = steps.new_zeros(place.num_sequences, place.longest, IMAGINED)  # [Q, L, J]
        padded = padded.index_put(where, steps)
        memory, _ = self.gru(padded)
        after = torch.cat([memory, padded.cumsum(1)], 2)  # [Q, L, G], position t has seen step t
        before = F.pad(after, (0, 0, 1, -1))  # [Q, L, G], position t has seen steps up to t - 1
        return before[where]

    def belief(self, history: Tensor) -> Tensor:
        """Log of the Bayes posterior over the imagined policies. [B, G] -> [B, J]"""
        likelihood = history[:, -IMAGINED:]
        return (likelihood + self.prior).log_softmax(1)

    def posterior(self, features: Tensor, history: Tensor | None) -> Tensors:
        """q(z): "mu" and "logvar" [B, Z]; VQ-VAE: "out", the encoder's output [B, Z], and the nearest "code" [B]."""
        if self.model == "vqvae":
            out = self.to_latent(features)
            own = out.pow(2).sum(1, keepdim=True)  # [B, 1]
            codes = self.codebook.pow(2).sum(1)
            distance = own - 2 * out @ self.codebook.T + codes  # [B, codes]
            return {"out": out, "code": distance.argmin(1)}
        if history is None:
            mu, logvar = self.to_latent(features).chunk(2, 1)
        else:
            memory = history[:, :-IMAGINED]
            belief = self.belief(history).exp()
            past = torch.cat([memory, belief], 1)  # [B, G]
            seen_and_past = torch.cat([features, past], 1)
            subgoal_mu, subgoal_logvar = self.to_latent(seen_and_past).chunk(2, 1)
            who_mu, who_logvar = self.to_who(past).chunk(2, 1)
            mu = torch.cat([who_mu, subgoal_mu], 1)
            logvar = torch.cat([who_logvar, subgoal_logvar], 1)
        return {"mu": mu, "logvar": logvar.clamp(-8, 4)}

    def mean_z(self, q: Tensors) -> Tensor:
        """z without noise, of a `posterior`. [B, Z]"""
        return self.codebook[q["code"]] if self.model == "vqvae" else q["mu"]

    def action_logits(
        self,
        seen: Tensor | None,
        timesteps: Tensor,
        z: Tensor,
        masks: Tensor | None,
    ) -> Tensor:
        """MOA. seen: the second part of `look` [B, D] or None; timesteps [B]; z [B, Z];
        masks [B, n] or None -> logits [B, n], hugely negative where illegal"""
        if seen is None:
            return self.policy(z)  # no mask either: it would tell something of the observation
        t = timesteps[:, None] * self.spec["time_scale"]  # [B, 1]
        logits = self.policy(torch.cat([seen, t, z], 1))
        if masks is None:
            return logits
        return logits.masked_fill(~masks, torch.finfo(logits.dtype).min)

    # --- for other programs

    def initial_history(self, *batch: int, device: torch.device | str | None = None) -> Tensor:
        """The history of agents that have not acted yet, zeros [*batch, G]; put it back to zero with each episode."""
        device = device or self.to_latent.weight.device
        return torch.zeros(*batch, self.history_size, device=device)

    def check_input(self, kind: str, shape: tuple[int, ...]) -> None:
        """UsageError unless `kind` ("obs" or "state") of this shape is what the encoder was trained on."""
        trained, trained_shape = self.spec["input"], tuple(self.spec["shape"])
        if (kind, tuple(shape)) != (trained, trained_shape):
            raise UsageError(
                f"this encoder was trained with --input {trained} of shape {trained_shape}, but "
                f"was given {kind} of shape {tuple(shape)}; feed it that, or pretrain with --input {kind}"
            )

    def _features(self, obs: Tensor) -> Tensor:
        """obs [..., *O] -> [..., D]; a state [..., *S] -> [..., A, D]"""
        shape, num_agents = tuple(self.spec["shape"]), self.spec["num_agents"]
        rank = len(shape)
        batch, given = obs.shape[:-rank], tuple(obs.shape[-rank:])
        if given != shape:
            self.check_input("observation", tuple(obs.shape))
        if self.spec["input"] == "state":
            batch = (*batch, num_agents)
            obs = obs.unsqueeze(-rank - 1).expand(*batch, *shape)
        obs = obs.reshape(-1, *shape)  # [B, *O]
        seats = torch.arange(len(obs), device=obs.device) % num_agents  # read for states only
        features, _ = self.look(network_input(self.spec, obs, seats))
        return features.view(*batch, -1)

    @torch.no_grad()
    def encode(self, obs: Tensor, history: Tensor | None = None) -> Tensor:
        """Mean of z. obs [..., *O] as the dataset has it -> [..., Z]; with --input state: [..., *S] -> [..., A, Z].

        history [..., G] from `observe`, [..., A, G] with --input state; None: nothing has happened yet.
        Raises ValueError for an input of another shape.
        """
        features = self._features(obs)  # [..., D]
        batch = features.shape[:-1]
        past = None
        if self.history_size:
            if history is None:
                history = self.initial_history(*batch, device=features.device)
            past = history.reshape(-1, self.history_size)  # [B, G]
        q = self.posterior(features.flatten(0, -2), past)
        return self.mean_z(q).view(*batch, -1)

    @torch.no_grad()
    def observe(self, history: Tensor, obs: Tensor, actions: Tensor) -> Tensor:
        """The history after `actions` [...] were taken at `obs` [..., *O] (or a state). [..., G] -> [..., G]"""
        if not self.history_size:
            return history
        features = self._features(obs).flatten(0, -2)  # [B, D]
        steps = self.step_features(features, actions.flatten())  # [B, J]
        before = history.reshape(-1, self.history_size)  # [B, G]
        memory, likelihood = before.tensor_split((-IMAGINED,), 1)
        _, memory = self.gru(steps[:, None], memory[None].contiguous())  # [1, B, G - J]
        after = torch.cat([memory[0], likelihood + steps], 1)
        return after.view(history.shape)


def start_quiet(layer: nn.Linear) -> None:
    """Lets the second half of a layer's output, the log-variance of z, start low."""
    nn.init.constant_(layer.bias[layer.out_features // 2 :], FIRST_LOGVAR)


# ---------------------------------------------------------------- losses


class Gaussian(NamedTuple):
    """Independent normal distributions."""

    mu: Tensor  # [B, Z]
    logvar: Tensor  # [B, Z]


def sample(q: Gaussian) -> Tensor:
    """The reparametrisation trick. [B, Z]"""
    noise = torch.randn_like(q.mu)
    return q.mu + noise * (0.5 * q.logvar).exp()


def gaussian_kl(q: Gaussian, free_bits: float, p: Gaussian | None = None) -> Tensor:
    """KL(q || p), mean over the batch, at least `free_bits` per dimension, summed. -> scalar

    p None: the standard normal.
    """
    mu, logvar = q
    zeros = torch.zeros_like(mu)
    mu_p, logvar_p = p or (zeros, zeros)
    squares = logvar.exp() + (mu - mu_p).pow(2)
    kl = 0.5 * (logvar_p - logvar + squares / logvar_p.exp() - 1)  # [B, Z]
    return kl.mean(0).clamp(min=free_bits).sum()


def recon_loss(spec: Spec, kind: str, out: Tensor, x: Tensor) -> Tensor:
    """Summed over cells, mean over samples. out: decoder output [B, F]; x: network input. -> scalar"""
    size = out.shape[1]
    max_cells = spec["max_cells"]
    if max_cells and kind == "bce":
        # sum over cells of softplus(out) - out * target, where target is 1 at the listed cells only
        padded = F.pad(out, (0, 1))  # 0 for empty places
        listed = padded.gather(1, x[:, :max_cells])  # [B, P]
        return (F.softplus(out).sum() - listed.sum()) / len(out)
    target = x[:, :size]
    if max_cells:
        planes = torch.zeros(len(out), size + 1, device=out.device)
        target = planes.scatter_(1, x[:, :max_cells], 1)[:, :size]
    loss = F.binary_cross_entropy_with_logits if kind == "bce" else F.mse_loss
    return loss(out, target, reduction="sum") / len(out)


class Extras(NamedTuple):
    """What the losses need beside models, samples and arguments."""

    recon_kind: str  # bce or mse
    kl_coef: float = 0.0  # as warmed up
    symmetries: Symmetries | None = None
    class_weights: Tensor | None = None  # [n]
    goal_steps: Tensor | None = None  # [M], how far ahead the subgoal of each sample is


def subgoals(samples: Samples, index: Tensor, turn: Tensor | None, args: Args, extras: Extras) -> Tensor:
    """Network input [B, ...] of the later observation that each sample [B] is drawn to, turned like the sample."""
    if extras.goal_steps is not None:
        steps = extras.goal_steps[index]
    elif args.subgoal == "first":
        steps = torch.ones_like(index)
    else:
        steps = torch.randint(1, args.horizon + 1, index.shape, device=index.device)
    # DEVIATION: the last observation is its own subgoal.
    goal = torch.minimum(index + steps, samples.last[index])
    target = samples.input_of(goal)
    if turn is not None:
        target = extras.symmetries.cells[turn[:, None], target]
    return target


def subgoal_losses(teacher: VAE, q: Gaussian, target: Tensor, args: Args, extras: Extras) -> Tensors:
    """How far z is from the teacher's z of the subgoal, and what the teacher learns, unless it is frozen."""
    losses = {}
    features, _ = teacher.look(target)
    goal = Gaussian(**teacher.posterior(features, None))
    if args.teacher is None:
        out = teacher.decoder(sample(goal))
        teacher_recon = recon_loss(teacher.spec, extras.recon_kind, out, target)
        teacher_kl = gaussian_kl(goal, args.free_bits)
        losses["teacher_loss"] = args.recon_coef * teacher_recon + extras.kl_coef * teacher_kl
    num_who = q.mu.shape[1] - goal.mu.shape[1]  # the part of z from the history alone has no subgoal to meet
    who = Gaussian(q.mu[:, :num_who], q.logvar[:, :num_who])
    subgoal = Gaussian(q.mu[:, num_who:], q.logvar[:, num_who:])
    prior = Gaussian(goal.mu.detach(), goal.logvar.detach())
    who_kl = gaussian_kl(who, args.free_bits)
    subgoal_kl = gaussian_kl(subgoal, args.free_bits, prior)
    losses["kl_loss"] = who_kl + subgoal_kl
    return losses


def codebook_losses(model: VAE, q: Tensors) -> tuple[Tensor, Tensor]:
    """Codes and encoder are drawn to each other; and z [B, Z], the code forwards, the identity backwards."""
    out = q["out"]
    nearest = model.codebook[q["code"]]  # [B, Z]
    to_encoder = F.mse_loss(nearest, out.detach())
    to_code = F.mse_loss(out, nearest.detach())
    z = out + (nearest - out).detach()  # straight-through
    return to_encoder + COMMITMENT * to_code, z


def moa_loss(model: VAE, shown: Shown, seen: Tensor | None, z: Tensor, class_weights: Tensor | None) -> Tensor:
    """Cross-entropy of the actions that were taken. seen: for the policy head, [B, D] or None; z [B, Z]"""
    logits = model.action_logits(seen, shown.timesteps, z, shown.masks)  # [B, n]
    return F.cross_entropy(logits, shown.actions, weight=class_weights)


def compute_losses(
    model: VAE,
    teacher: VAE | None,
    samples: Samples,
    batch: Batch,
    args: Args,
    extras: Extras,
) -> tuple[Tensors, Tensors]:
    """The losses of one minibatch, each a scalar, "loss" their weighted sum; and the posterior of z."""
    index = batch.index
    shown = show(samples, batch, extras.symmetries)
    features, seen = model.look(shown.x)  # [B, D] each
    losses: Tensors = {}
    history = None
    if model.history_size:
        steps = model.step_features(features, shown.actions)  # [B, J]
        history = model.histories(steps, batch.place)  # [B, G]
        if args.loss != "recon":
            # DEVIATION: the past is explained by a mixture of imagined policies, each action by the belief before it.
            joint = model.belief(history) + steps  # [B, J]
            losses["mixture_loss"] = -joint.logsumexp(1).mean()

    q = model.posterior(features, history)
    target = shown.x
    if model.model == "vqvae":
        losses["codebook_loss"], z = codebook_losses(model, q)
        losses["kl_loss"] = torch.zeros((), device=z.device)
    else:
        z = sample(Gaussian(**q))  # [B, Z]
    if model.model == "vae":
        losses["kl_loss"] = gaussian_kl(Gaussian(**q), args.free_bits)
    if model.model == "cvae":
        target = subgoals(samples, index, shown.turn, args, extras)  # [B, ...]
        losses |= subgoal_losses(teacher, Gaussian(**q), target, args, extras)

    head_z = z.detach() if args.loss == "recon" else z
    losses["moa_loss"] = moa_loss(model, shown, seen, head_z, extras.class_weights)
    if model.model == "cvae":
        # DEVIATION: z also has to explain what the agent does up to `horizon` steps later.
        at = later_samples(samples, index, args.horizon)  # [B]
        later_seen = None if seen is None else seen[at]
        losses["later_moa_loss"] = moa_loss(model, shown.rows(at), later_seen, head_z, extras.class_weights)
    if args.loss != "moa":
        losses["recon_loss"] = recon_loss(model.spec, extras.recon_kind, model.decoder(z), target)

    weights = {
        "moa_loss": 1.0,
        "kl_loss": extras.kl_coef,
        "recon_loss": args.recon_coef,
        "later_moa_loss": args.later_coef,
        "codebook_loss": 1.0,
        "teacher_loss": 1.0,
        "mixture_loss": 1.0,
    }
    weighted = [weight * losses[name] for name, weight in weights.items() if name in losses]
    return {"loss": sum(weighted), **losses}, q


# ---------------------------------------------------------------- evaluation


class Models(NamedTuple):
    """What is trained, and by what."""

    model: VAE
    teacher: VAE | None  # of a cvae
    optimizer: torch.optim.Optimizer


@torch.no_grad()
def predict(model: VAE, samples: Samples, sequences: np.ndarray, batch_size: int) -> tuple[Tensor, Tensor]:
    """Logits [M', n] and mean z [M', Z] of all samples of some sequences, in their order."""
    logits, latents = [], []
    for batch in samples.batches(sequences, batch_size, None):
        shown = show(samples, batch, None)
        features, seen = model.look(shown.x)
        history = None
        if model.history_size:
            steps = model.step_features(features, shown.actions)
            history = model.histories(steps, batch.place)
        z = model.mean_z(model.posterior(features, history))
        logits.append(model.action_logits(seen, shown.timesteps, z, shown.masks))
        latents.append(z)
    return torch.cat(logits), torch.cat(latents)


@torch.no_grad()
def evaluate_losses(models: Models, samples: Samples, sequences: np.ndarray, args: Args, extras: Extras) -> Numbers:
    """The losses of some sequences as they are, mean over their samples."""
    totals: Numbers = {}
    count = 0
    quiet = extras._replace(symmetries=None)
    for batch in samples.batches(sequences, args.batch_size, None):
        losses, _ = compute_losses(models.model, models.teacher, samples, batch, args, quiet)
        for name, value in losses.items():
            total = value.item() * len(batch.index)
            totals[name] = totals.get(name, 0.0) + total
        count += len(batch.index)
    return {f"heldout_losses/{name}": total / count for name, total in totals.items()}


# ---------------------------------------------------------------- checkpoints


def save_run(
    kept: runs.KeptFolder,
    args: Args,
    data_meta: dict[str, Any],
    epoch: int,
    best: float,
    models: Models,
    progress: Progress | None,
    is_best: bool,
) -> None:
    """Writes latest.pt, and before it best.pt if this is the best epoch yet: a crash in between loses no best one.

    epoch: how many are done; progress: of the epoch under way, None between epochs.
    """
    model, teacher, optimizer = models
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "args": asdict(args),
        "data_meta": data_meta,
        "config": model.config,
        "epoch": epoch,
        "best": best,
        "model": model.state_dict(),
        "teacher": None if teacher is None else teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": progress,
    }
    if is_best:
        runs.save_checkpoint(checkpoint, kept.path / "best.pt")
    runs.save_checkpoint(checkpoint, kept.path / "latest.pt")
    kept.saved = epochs_saved(checkpoint)


def epochs_saved(checkpoint: dict[str, Any]) -> str:
    """What a checkpoint holds, in words."""
    more = f" and {checkpoint['progress']['batches']} minibatches" if checkpoint.get("progress") else ""
    return f"{checkpoint['epoch']} of {checkpoint['args']['epochs']} epochs{more}"


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """The checkpoint of a run folder (its latest.pt) or of a .pt file. UsageError: missing, unreadable, another's."""
    needs = ("args", "config", "epoch", "best", "model", "teacher", "optimizer")
    return runs.load_checkpoint(path, CHECKPOINT_FORMAT, device, needs)


def load_vae(path: str | Path, device: torch.device | str = "cpu") -> VAE:
    """The model of a run folder (its best.pt) or of a checkpoint file, frozen. UsageError as load_checkpoint."""
    path = runs.best_or_latest(path)
    checkpoint = load_checkpoint(path, device)
    model = VAE(checkpoint["config"]).to(device)
    runs.load_weights(model, checkpoint["model"], path)
    return model.requires_grad_(False).eval()


# ---------------------------------------------------------------- set-up


def check_args(args: Args) -> None:
    """Everything that can be wrong before the data is read: UsageError in one line."""
    if not args.data:
        raise UsageError("--data: expected a dataset folder, got none; make one with collect_data.py")
    runs.check_limits(args, LIMITS)
    if args.model != "cvae" and (args.teacher or args.subgoal == "value"):
        raise UsageError(
            f"--teacher and --subgoal value: expected with --model cvae only, got --model {args.model}; drop them"
        )
    if args.resume and not Path(args.resume).is_dir():
        raise UsageError(f"--resume: expected a run folder, got {args.resume}; name the folder of the run")


def check_data(args: Args, dataset: Dataset) -> None:
    """UsageError where the data is not what the arguments need."""
    meta = dataset.meta
    longest = int(dataset.episode_lengths.max())
    if meta["num_actions"] is None:
        raise UsageError(f"{args.data}: expected discrete actions, got continuous ones; use another env")
    if args.model == "cvae" and args.horizon >= longest:
        raise UsageError(f"--horizon: expected less than the longest episode, {longest} steps, got {args.horizon}")
    if args.subgoal == "value" and dataset.values is None:
        raise UsageError(
            f"--subgoal value: expected values in {args.data}, found none; collect it with collect_data.py --values-of"
        )
    for name in args.holdout_policies:
        mine = dataset.policy_ids == meta["policies"].index(name)  # [S, A]
        if not (mine & dataset.active).any():
            raise UsageError(f"--holdout-policies: expected active samples of {name}, got none; collect some")


def resolve_args(args: Args, spec: Spec, symmetries: Symmetries | None) -> Args:
    """The arguments with what "auto" and None stand for. UsageError: they ask for what the data is not."""
    if args.augment and symmetries is None:
        raise UsageError("--augment: expected 0/1 maps of a square game with moves to turn, got others; leave it out")
    if args.recon_loss == "bce" and not spec["binary"]:
        raise UsageError("--recon-loss bce: expected 0/1 observations, got others; use mse")
    recon_loss = args.recon_loss
    if recon_loss == "auto":
        recon_loss = "bce" if spec["binary"] else "mse"
    augment = args.augment is not False and symmetries is not None
    threads = args.num_threads or torch.get_num_threads()
    return replace(args, recon_loss=recon_loss, augment=augment, num_threads=threads, resume=None)


def load_teacher(args: Args, spec: Spec, device: torch.device) -> VAE | None:
    """The frozen VAE of --teacher; None where there is none. UsageError: it does not fit."""
    if args.teacher is None:
        return None
    teacher = load_vae(args.teacher, device)
    teacher.check_input(spec["input"], spec["shape"])
    found = {
        "model": teacher.model,
        "latent_size": teacher.config["latent_size"],
        "cells": teacher.spec["max_cells"],
    }
    expected = {
        "model": "vae",
        "latent_size": subgoal_size(args.latent_size),
        "cells": spec["max_cells"],
    }
    if found != expected:
        raise UsageError(f"--teacher: expected {expected}, got {found}; pretrain one on this data with --model vae")
    return teacher


def make_models(args: Args, config: Config, teacher: VAE | None, device: torch.device) -> Models:
    """New networks, beside the frozen teacher where there is one, and their optimizer."""
    model = VAE(config).to(device)
    trained = [model]
    if args.model == "cvae" and teacher is None:
        # DEVIATION: the VAE that encodes subgoals is trained along with the CVAE instead of before it.
        sizes = {"model": "vae", "policy_input": "z", "latent_size": subgoal_size(args.latent_size)}
        teacher = VAE({**config, **sizes}).to(device)
        trained.append(teacher)
    decays, free = [], []  # what makes z and what reads it needs large weights to tell one cell from the next
    for name, parameter in nn.ModuleList(trained).named_parameters():
        next_to_z = re.search(r"\.(to_latent|to_who|decoder)\.", name)
        (free if next_to_z else decays).append(parameter)
    groups = [{"params": decays}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    return Models(model, teacher, optimizer)


def new_progress(args: Args, device: torch.device) -> Progress:
    """What is counted within an epoch."""
    return {
        "batches": 0,
        "samples": 0,
        "seconds": 0.0,
        "kl_coef": 0.0,
        "sums": {},  # of each loss times samples
        "codes_used": torch.zeros(args.codebook_size, device=device),
    }


def stopped_progress(progress: Progress, device: torch.device) -> Progress:
    """What a checkpoint in the middle of an epoch holds: the counts, and where the random numbers stand."""
    rng_states = [torch.get_rng_state()]
    if device.type == "cuda":
        rng_states.append(torch.cuda.get_rng_state(device))
    return {**progress, "rng_states": rng_states}


def continued_progress(saved: Progress, device: torch.device) -> Progress:
    """The counts of such a checkpoint, on the device; puts the random numbers back to where they stood."""
    of_cpu, *of_cuda = saved["rng_states"]
    torch.set_rng_state(of_cpu)
    if device.type == "cuda" and of_cuda:
        torch.cuda.set_rng_state(of_cuda[0], device)
    sums = {name: total.to(device) for name, total in saved["sums"].items()}
    return {**saved, "sums": sums, "codes_used": saved["codes_used"].to(device)}


@torch.no_grad()
def count_batch(progress: Progress, losses: Tensors, q: Tensors, size: int) -> None:
    """Adds a minibatch of `size` samples to the counts."""
    sums = progress["sums"]
    for name, value in losses.items():
        sums[name] = sums.get(name, 0.0) + value.detach() * size
    if "code" in q:
        used = progress["codes_used"]
        once = torch.ones_like(q["code"], dtype=used.dtype)
        used.scatter_add_(0, q["code"], once)
    progress["batches"] += 1
    progress["samples"] += size


def epoch_metrics(progress: Progress, seconds: float, has_codes: bool) -> Numbers:
    """What an epoch of training logs."""
    count = progress["samples"]
    row = {}
    for name, total in progress["sums"].items():
        row[f"losses/{name}"] = total.item() / count
    row["charts/samples_per_second"] = count / seconds
    if has_codes:
        used = progress["codes_used"]
        share = used / used.sum()
        information = share * (share + TINY).log()
        row["vq/perplexity"] = math.exp(-information.sum().item())
        row["vq/codes_used"] = int((used > 0).sum())
    return row


@torch.no_grad()
def revive_codes(
    model: VAE,
    samples: Samples,
    used: Tensor,
    train_index: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Codes that nothing used [codebook_size] are reborn where the encoder puts some training samples."""
    dead = (used == 0).nonzero()[:, 0]
    if not len(dead):
        return
    some = samples.put(rng.choice(train_index, len(dead)))
    features, _ = model.look(samples.input_of(some))
    model.codebook[dead] = model.posterior(features, None)["out"]


def resume_run(args: Args) -> tuple[runs.KeptFolder, dict[str, Any]]:
    """--resume: the run's folder, which no other process writes in from here on, and its checkpoint."""
    run_dir = Path(args.resume)
    kept = runs.keep_folder(run_dir, runs.command(__file__, "--resume", run_dir))
    checkpoint = load_checkpoint(run_dir)
    kept.saved = epochs_saved(checkpoint)
    return kept, checkpoint


# ---------------------------------------------------------------- main


@runs.run_keeping
def main(args: Args) -> Path:
    """Trains (or resumes); returns the run folder. UsageError, one line, for what the user can put right."""
    # ---- arguments
    check_args(args)
    kept, checkpoint = resume_run(args) if args.resume else (None, None)
    epochs_done = checkpoint["epoch"] if checkpoint else 0
    device = runs.get_device(args.cuda)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    dataset = load_dataset(args.data)
    meta = dataset.meta
    split = dataset.split_episodes(args.seed, args.heldout_fraction, args.holdout_policies)
    check_data(args, dataset)
    spec = describe_input(dataset, args.input)
    symmetries = make_symmetries(spec, flat_obs_spec(meta).moves, device)
    resolved = resolve_args(args, spec, symmetries)
    teacher = load_teacher(args, spec, device)
    config = {name: getattr(args, name) for name in SIZES} | {"spec": spec}
    if checkpoint:
        data_meta = checkpoint.get("data_meta")  # older runs do not say
        if checkpoint["config"] != config or (data_meta and not same_data(data_meta, dataset)):
            raise UsageError(f"{args.resume} was trained on other data than {args.data}; give the place of its data")

    # ---- logging
    if kept is None:
        run_dir = runs.new_run_dir(args.runs_dir, meta["env_id"], args.exp_name, args.seed)
        kept = runs.keep_folder(run_dir, runs.command(__file__, "--resume", run_dir))
    run_dir = kept.path
    runs.write_json(run_dir / "args.json", asdict(resolved))
    if args.track:
        runs.start_wandb(run_dir, args.wandb_project_name, args.wandb_entity, asdict(resolved))
    keep_until = epochs_done if checkpoint else None
    metrics = runs.Metrics(run_dir, "epoch", args=asdict(resolved), keep_until=keep_until)

    # ---- seeding
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic

    # ---- data
    samples = Samples(dataset, spec, device, args.memory_limit_mb)
    if samples.in_memory:  # all was read anyway
        check_checksums(dataset, LARGE)
    train = samples.sequences(split["train"])
    train_index = samples.index(train)
    parts = []
    for name in ("heldout_episodes", "heldout_policies"):
        sequences = samples.sequences(split[name])
        if len(sequences):
            index = samples.index(sequences)
            ceilings = compute_ceilings(dataset, samples, index, train_index, args.model == "cvae")
            parts.append(Heldout(name, sequences, index, ceilings))
    extras = Extras(resolved.recon_loss)
    if resolved.augment:
        extras = extras._replace(symmetries=symmetries)
    if args.class_balance:
        extras = extras._replace(class_weights=balanced_weights(samples, train_index))
    if args.subgoal == "value":
        extras = extras._replace(goal_steps=best_goal_steps(dataset, samples, args.horizon))
    stored = "in memory" if samples.in_memory else "read from the disk"
    print(f"{run_dir}: {args.model}, {len(train_index)} training samples of {len(samples)}, {stored}, on {device}")

    # ---- networks
    models = make_models(args, config, teacher, device)
    model, teacher, optimizer = models

    # ---- resume
    best, unfinished = math.inf, None
    if checkpoint:
        runs.load_weights(model, checkpoint["model"], args.resume)
        runs.load_weights(optimizer, checkpoint["optimizer"], args.resume)
        if teacher is not None:
            runs.load_weights(teacher, checkpoint["teacher"], args.resume)
        best = checkpoint["best"]
        unfinished = checkpoint.get("progress")  # of the epoch that was stopped in its middle

    # ---- loop
    make_batches = samples.batches if args.model == "cvae" else samples.single
    num_batches = math.ceil(len(train_index) / args.batch_size)
    criterion_name = "heldout_losses/recon_loss" if args.loss == "recon" else "eval/cross_entropy"
    stop = runs.StopSignal("minibatch")
    for epoch in range(epochs_done, args.epochs):
        # Every epoch has random numbers of its own, so that a resumed run goes on exactly as if it had not stopped.
        torch.manual_seed(1_000_003 * args.seed + epoch)
        rng = np.random.default_rng([args.seed, epoch])
        batches: Iterable[Batch] = make_batches(train, args.batch_size, rng)
        progress = new_progress(args, device)
        if unfinished:
            progress = continued_progress(unfinished, device)
            extras = extras._replace(kl_coef=progress["kl_coef"])
            batches = itertools.islice(batches, progress["batches"], None)  # skips those that were trained on
            unfinished = None
        start = time.perf_counter() - progress["seconds"]
        bar = tqdm(batches, total=num_batches, initial=progress["batches"], leave=False, disable=None)
        for batch in bar:
            done = epoch + min(1.0, progress["batches"] / num_batches)  # epochs
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * (1 - done / args.epochs)
            warm = min(1.0, done / args.kl_warmup) if args.kl_warmup else 1.0
            progress["kl_coef"] = args.kl_coef * warm
            extras = extras._replace(kl_coef=progress["kl_coef"])
            losses, q = compute_losses(model, teacher, samples, batch, args, extras)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            count_batch(progress, losses, q, len(batch.index))
            if stop.requested:
                break
        bar.close()
        progress["seconds"] = time.perf_counter() - start
        if stop.requested:
            stopped = stopped_progress(progress, device)
            save_run(kept, resolved, meta, epoch, best, models, stopped, is_best=False)
            break
        row = epoch_metrics(progress, progress["seconds"], args.model == "vqvae")
        if not math.isfinite(row["losses/loss"]):
            raise FloatingPointError(f"the loss is {row['losses/loss']} in epoch {epoch + 1}: lower --learning-rate")
        if args.model == "vqvae" and epoch + 1 < args.epochs:
            revive_codes(model, samples, progress["codes_used"], train_index, rng)

        row |= evaluate_losses(models, samples, parts[0].sequences, args, extras)
        predictions = [predict(model, samples, part.sequences, args.batch_size) for part in parts]
        row |= evaluate(samples, parts, predictions, meta["policies"], run_dir, epoch + 1)
        print(f"epoch {epoch + 1}: {row['charts/samples_per_second']:.0f} samples/s")
        metrics.log(epoch + 1, row)
        criterion = row[criterion_name]
        is_best = criterion < best
        best = min(best, criterion)
        metrics.sync()
        save_run(kept, resolved, meta, epoch + 1, best, models, None, is_best)
        epochs_done = epoch + 1
        if stop.requested:
            break

    # ---- close
    stop.restore()
    metrics.close()
    if epochs_done < args.epochs:
        print(f"stopped in epoch {epochs_done + 1}; {kept.how_to_go_on()}")
    else:
        model = load_vae(run_dir, device)
        heldout = parts[0]
        probed = train[:PROBE_SEQUENCES]
        logits, z = predict(model, samples, heldout.sequences, args.batch_size)
        _, train_z = predict(model, samples, probed, args.batch_size)
        report(run_dir, samples, meta["policies"], heldout, logits, z, samples.index(probed), train_z)
        if args.loss != "moa":
            ahead = args.horizon if args.model == "cvae" else 0
            path = run_dir / "reconstructions.png"
            draw_reconstructions(dataset, samples, heldout.index, ahead, z, model.decoder, resolved.recon_loss, path)
        print(f"done: {run_dir}")
    return run_dir


def saved_run(args: Args) -> tuple[Args, Iterable[str]] | None:
    """The arguments of the run to resume, and those that flags beside --resume must not change."""
    if not args.resume:
        return None
    checkpoint = load_checkpoint(args.resume)
    return runs.restore_args(Args, checkpoint["args"], args.resume), FIXED_BY_CHECKPOINT


def cli(argv: list[str] | None = None) -> int:
    """The command line: see `command_line`."""
    return runs.command_line(Args, main, LIMITS, argv, saved_run)


if __name__ == "__main__":
    sys.exit(cli())
