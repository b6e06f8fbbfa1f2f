"""Hyper-MAPPO: MAPPO whose actor weights are made by a hypernetwork, on PettingZoo environments.

    theta_t = theta_base + delta_theta(context_t)

context_t comes from all agents' observations (attention) and their history (GRU), so the policy can
change as fast as the other agents do; a penalty keeps theta from jumping between steps of an episode.
`--hyper none` is plain MAPPO: same file, same loop.

Papers: MAPPO, Yu et al. 2022 (arXiv 2103.01955); PPO, Schulman et al. 2017 (arXiv 1707.06347);
hypernetwork initialisation, Beck et al. 2022 (arXiv 2210.11348).
How-to, metrics, deviations and results: docs/hyper_mappo.md

    python hyper_mappo.py --env-id pursuit --track
    python hyper_mappo.py --env-id stag_hunt --hyper none
"""

from __future__ import annotations

import copy
import csv
import ctypes
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Literal

# Before torch is imported: threads that spin while they wait for each other make small operations many times slower
# as soon as other programs use the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gymnasium as gym
import imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from scipy.stats import t as student_t
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import EnvStep, VecEnv, check_env, default_env_procs, make_vec_env, num_cpus, stag_hunt

CHECKPOINT_FORMAT = "hyper_mappo/3"
PROBE_ENVS = 16  # envs whose first rollout shows how the policy changes from update to update
GRADIENT_COSINE_EVERY = 10  # updates
# malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD and what keep_freed_memory sets them to, in bytes
MALLOPT = {-3: 32 << 20, -1: 1 << 30, -2: 64 << 20}
EVAL_SEED = 1_000_000  # keeps the seeds of evaluation apart from those of training


class UsageError(ValueError):
    """Something the user can put right: ends the command line with one line and exit code 2."""


@dataclass
class Args:
    exp_name: str = "hyper_mappo"
    """name of this experiment, part of the run's folder name"""
    seed: int = 1
    """seed of everything random: networks, envs, action sampling, minibatches"""
    torch_deterministic: bool = True
    """deterministic CUDA kernels"""
    cuda: bool = True
    """train on the GPU if there is one; without one the CPU is used and said so"""
    compile: bool = False
    """torch.compile the networks and the loss (with CUDA graphs on a GPU), where it works"""
    num_threads: int | None = 1
    """CPU threads of one PyTorch operation; None: PyTorch's choice. The operations are small: more seldom pays"""
    update_threads: int | None = None
    """CPU threads that share every minibatch, each computing the gradient of its part; None: 2 where there are as many
    cores; 1 on a GPU and under torchrun"""
    track: bool = False
    """mirror the TensorBoard log to Weights & Biases (offline, with a notice, when there is no login)"""
    wandb_project_name: str = "hyper-marl"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team; None: the login's default"""
    capture_video: bool = False
    """write video.gif of one evaluation episode into the run's folder"""
    runs_dir: str = "runs"
    """folder that receives the run's folder"""

    env_id: str = "pursuit"
    """alias (pursuit, stag_hunt, ...), PettingZoo id (sisl/pursuit_v5) or module (mpe2.simple_spread_v3)"""
    env_kwargs: str = "{}"
    """arguments of the env as JSON, e.g. '{"n_evaders": 10}'"""
    backend: Literal["auto", "pettingzoo", "batched"] = "auto"
    """what steps the training envs: auto takes the batched twin where there is one"""
    num_env_procs: int | None = None
    """worker processes of the pettingzoo backend; 0: none; None: one per CPU core (0 on Windows)"""

    total_timesteps: int = 3_000_000
    """env steps to train for, summed over envs (one step of one env moves all its agents)"""
    learning_rate: float = 5e-4
    """Adam's learning rate of actor and critic"""
    num_envs: int | None = None
    """environments stepped side by side; None: 128 batched, 8 genuine"""
    num_steps: int = 64
    """env steps of each env per rollout"""
    anneal_lr: bool = False
    """lower the learning rates linearly to 0"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int | None = None
    """minibatches per epoch; None: 8 batched, 4 genuine"""
    chunk_length: int = 1
    """with a context, training sequences are this many consecutive steps (truncated backpropagation through time); must
    divide num_steps. Longer ones learn longer memories, but their samples are alike: see the docs"""
    update_epochs: int = 4
    """passes over each rollout"""
    norm_adv: bool = True
    """normalise advantages over the rollout's active samples"""
    clip_coef: float = 0.2
    """PPO's clipping of the policy ratio"""
    clip_vloss: bool = True
    """clip the value's change by clip_coef too (in normalised units)"""
    huber_delta: float | None = 10.0
    """the value loss turns linear past this error (in normalised units); None: squared error"""
    value_norm: bool = True
    """the critic predicts returns normalised by their running mean and deviation"""
    ent_coef: float = 0.02
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient, actor and critic apart; inf: any"""
    target_kl: float | None = None
    """skip the update's remaining epochs once approx_kl passes this; None: never"""
    hidden_size: int = 128
    """width of the two hidden layers of actor and critic"""
    agent_id: bool = False
    """append a one-hot agent id to what the actor sees"""

    hyper: Literal["none", "delta", "full", "last-layer", "low-rank"] = "delta"
    """what the context makes of the actor's weights. none: nothing, plain MAPPO; delta: a sum of learned deltas is
    added to every layer; full: all weights, no base; last-layer: a delta of the last layer, earlier ones are scaled;
    low-rank: A(c) B(c) is added to every layer"""
    hyper_context: Literal["joint", "local", "agent-id"] = "joint"
    """what the context sees. joint: all agents' observations (centralised execution); local: the agent's own (can be
    executed decentrally); agent-id: a learned embedding of who the agent is"""
    actor_context: bool = False
    """control without a hypernetwork: a plain actor gets the context as an input (with --hyper none)"""
    share_delta: bool = False
    """all agents of an env get the same delta, made from the mean of their contexts"""
    history: Literal["none", "gru", "lstm"] = "gru"
    """what carries the context over time"""
    context_size: int = 16
    """width of the context"""
    context_heads: int = 2
    """attention heads over agents"""
    hyper_basis: int | None = None
    """how many learned deltas (full: weight sets) the context mixes; context_size: the plain linear head; None: 16,
    full and low-rank 4"""
    hyper_rank: int | None = None
    """rank of a layer's delta (delta: of each one in the mixture, 0: full); None: delta 1, low-rank 4"""
    hyper_critic: bool = False
    """extension: the critic's weights are made in the same way, from the state"""
    match_params: Literal["delta", "full", "last-layer", "low-rank"] | None = None
    """widen the plain actor (--hyper none) to the number of parameters that this form would have"""
    smooth_coef: float = 0.1
    """weight of the mean squared change of theta between consecutive steps of one episode"""
    align_coef: float = 0.05
    """weight of KL(target policy || new policy)"""
    target_sync_interval: int = 1
    """updates between refreshes of that target policy; 1: it is the policy that collected the data"""
    hyper_learning_rate: float | None = None
    """Adam's learning rate of context and hypernetwork; None: 5e-4, last-layer 1e-4"""

    partners: tuple[str, ...] = ()
    """fixed partners and their number of seats, e.g. nearest_stag:2 runs/RUN_DIR:1; they take the last seats"""
    init_from: str | None = None
    """run folder whose policy and critic the training starts from (adaptation)"""
    subgoals: str | None = None
    """run folder of pretrain_vae.py: its frozen encoder tells the context each agent's subgoal z"""

    eval_episodes: int = 10
    """episodes of the closing evaluation on the genuine PettingZoo env; 0: none"""
    eval_deterministic: bool = False
    """evaluate the most likely actions instead of sampled ones"""
    save_every: int = 10
    """updates between checkpoints"""
    resume: str | None = None
    """run folder to continue; flags given beside it must not change the architecture"""
    evaluate: str | None = None
    """run folder whose policy is only evaluated"""


# What numbers must be, so that nothing absurd is trained and nothing breaks after hours. (hyper_rank: see check_args)
LIMITS = {
    "at least 1": (
        lambda x: x >= 1,
        "num_threads update_threads num_envs num_steps num_minibatches chunk_length update_epochs hidden_size "
        "context_size context_heads hyper_basis target_sync_interval save_every total_timesteps",
    ),
    "at least 0": (
        lambda x: x >= 0,
        "num_env_procs eval_episodes learning_rate hyper_learning_rate ent_coef vf_coef smooth_coef align_coef",
    ),
    "more than 0": (lambda x: x > 0, "clip_coef huber_delta max_grad_norm target_kl"),
    "from 0 to 1": (lambda x: 0 <= x <= 1, "gamma gae_lambda"),
    "from 0 to 2147483647": (lambda x: 0 <= x < 2**31, "seed"),
}
# What a run's weights depend on: --resume and --init-from refuse to change these.
ARCHITECTURE = (
    "hidden_size agent_id value_norm hyper hyper_context actor_context share_delta history context_size context_heads "
    "hyper_basis hyper_rank hyper_critic match_params subgoals"
).split()
# What its episodes in flight depend on, too.
FIXED_BY_CHECKPOINT = [*"env_id env_kwargs backend seed num_envs num_steps partners".split(), *ARCHITECTURE]
# These do nothing without a context, or without a hypernetwork.
CONTEXT_ONLY = "hyper_context history context_size context_heads chunk_length subgoals".split()
HYPER_ONLY = (
    "share_delta hyper_basis hyper_rank hyper_critic smooth_coef align_coef target_sync_interval hyper_learning_rate"
).split()
# The numbers of ppo_loss, logged as means over all minibatches of an update.
LOSSES = (
    "losses/policy_loss losses/value_loss losses/entropy losses/old_approx_kl losses/approx_kl losses/clipfrac "
    "losses/smooth_loss losses/align_kl hyper/delta_norm hyper/step_change"
).split()
HYPER_TAGS = LOSSES[-4:]
COLUMNS = (
    "update global_step charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate "
    f"{' '.join(LOSSES)} losses/grad_norm losses/explained_variance "
    "nonstationarity/policy_kl nonstationarity/gradient_cosine"
).split()


# ------------------------------------------------------------------------------------------- networks


def layer_init(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def with_bias(layer: nn.Linear) -> torch.Tensor:
    """Weight and bias side by side: [out, in + 1]"""
    return torch.cat([layer.weight, layer.bias.unsqueeze(-1)], dim=-1)


class Trunk(nn.Module):
    """Turns observations or states into flat features: [..., *shape] -> [..., num_features] float32.

    Grids of up to 1,024 numbers are flattened, larger pictures [height, width, channels] pass a small CNN
    of stride-2 convolutions. `scale` multiplies the raw numbers (1/255 for bytes of a picture).
    """

    def __init__(self, shape: list[int], scale: float):
        super().__init__()
        self.shape, self.scale = shape, scale
        self.convs = None
        self.num_features = math.prod(shape)
        if len(shape) == 3 and self.num_features > 1024:
            height, width, channels = shape
            convs, out_channels = [], 16
            while max(height, width) > 8:
                convs += [layer_init(nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)), nn.ReLU()]
                height, width, channels, out_channels = (height + 1) // 2, (width + 1) // 2, out_channels, 32
            self.convs = nn.Sequential(*convs)
            self.num_features = channels * height * width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lead = x.shape[: x.dim() - len(self.shape)]
        x = x.float()
        if self.scale != 1.0:
            x = x * self.scale
        if self.convs is None:
            return x.reshape(*lead, self.num_features)
        x = x.reshape(-1, *self.shape).permute(0, 3, 1, 2)  # [B, h, w, c] -> [B, c, h, w]
        return self.convs(x).reshape(*lead, self.num_features)


class Context(nn.Module):
    """context_t of each agent, what a hypernetwork makes weights from: [T, N, A, context_size].

    joint:    an encoding of each agent's observation, attention over agents, then a GRU or LSTM over time
    local:    the same without attention: nothing of the other agents
    agent-id: a learned embedding of the seat (HyperMARL, arXiv 2412.04233), no history
    """

    def __init__(self, num_features: int, num_agents: int, num_subgoals: int, args: Args):
        super().__init__()
        C = args.context_size
        self.kind, self.size, self.heads, self.shared = args.hyper_context, C, args.context_heads, args.share_delta
        self.history = "none" if self.kind == "agent-id" else args.history
        num_inputs = num_agents if self.kind == "agent-id" else num_features
        self.encoder = layer_init(nn.Linear(num_inputs + num_subgoals, C))
        if self.kind == "joint":
            self.qkv = layer_init(nn.Linear(C, 3 * C), 1.0)
            self.attention_out = layer_init(nn.Linear(C, C), 1.0)
        if self.history != "none":
            self.rnn = nn.GRUCell(C, C) if self.history == "gru" else nn.LSTMCell(C, C)
            for name, param in self.rnn.named_parameters():
                nn.init.zeros_(param) if "bias" in name else nn.init.orthogonal_(param)

    @property
    def hidden_size(self) -> int:
        """Numbers carried from step to step per agent: the context before; with an LSTM its cell, too."""
        return (2 if self.history == "lstm" else 1) * self.size

    def previous(self, hidden: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """The context before: hidden [N, A, hidden_size], active [N, A] -> [N, A, C]; a shared one without who left"""
        x = hidden[..., : self.size]
        return self.share(x, active) if self.shared else x

    @staticmethod
    def share(x: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Every agent gets the mean over the active ones: [..., A, C] -> [..., A, C]"""
        weights = active.unsqueeze(-1).float()
        mean = (x * weights).sum(-2, keepdim=True) / weights.sum(-2, keepdim=True).clamp(min=1.0)
        return mean.expand_as(x)

    def forward(
        self,
        features: torch.Tensor,
        z: torch.Tensor | None,
        active: torch.Tensor,
        starts: torch.Tensor,
        hidden: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """features [T, N, A, F], z [T, N, A, Z] or None: each agent's subgoal, active [T, N, A], starts [T, N] (an
        episode opens here), hidden [N, A, hidden_size] -> context [T, N, A, C], hidden after step T
        """
        T, N, A = active.shape
        if self.kind == "agent-id":
            features = torch.eye(A, device=active.device).expand(T, N, A, A)
        x = self.encoder(features if z is None else torch.cat([features, z], dim=-1)).relu_()  # [T, N, A, C]
        if self.kind == "joint":
            x = x + self.attend(x, active)
        x, hidden = (x, x[-1]) if self.history == "none" else self.remember(x, starts, hidden)
        return (self.share(x, active) if self.shared else x), hidden

    def attend(self, x: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Scaled dot-product attention over agents: [T, N, A, C] -> [T, N, A, C]

        By hand, a head at a time and with the softmax along a middle dimension: for rows of a few agents twice as fast
        as PyTorch's own function on a CPU.
        """
        T, N, A, C = x.shape
        size = C // self.heads
        # Agents that left are nobody's key; an agent always sees itself, so that no row is empty.
        keys = active.reshape(T * N, A, 1) | torch.eye(A, dtype=torch.bool, device=active.device)  # [B, key, query]
        bias = torch.where(keys, 0.0, -torch.inf)
        parts, h = self.qkv(x).view(T * N, A, 3 * C).split(size, dim=-1), self.heads
        mixed = []
        for q, k, v in zip(parts[:h], parts[h : 2 * h], parts[2 * h :], strict=True):  # [B, A, C / heads]
            scores = torch.baddbmm(bias, k, q.transpose(1, 2), alpha=size**-0.5)  # [B, key, query]
            mixed.append(scores.softmax(dim=1).transpose(1, 2) @ v)
        return self.attention_out(torch.cat(mixed, dim=-1)).view(T, N, A, C)

    def remember(
        self, x: torch.Tensor, starts: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The GRU or LSTM over time: x [T, N, A, C] -> [T, N, A, C], hidden after step T"""
        T, N, A, C = x.shape
        keep = (~starts).float().repeat_interleave(A, dim=1).unsqueeze(-1)  # [T, N] -> [T, N*A, 1]
        hidden = hidden.reshape(N * A, self.hidden_size)
        # The inputs' share of all gates at once: only the hidden state's share has to go step by step.
        inputs = F.linear(x.reshape(T, N * A, C), self.rnn.weight_ih, self.rnn.bias_ih)  # [T, N*A, gates * C]
        contexts = []
        # (unbind and split rather than indexing: their gradients are one copy instead of a zero tensor per step)
        for inputs_t, keep_t in zip(inputs.unbind(), keep.unbind(), strict=True):
            hidden = self.rnn_step(inputs_t, hidden * keep_t)
            contexts.append(hidden[:, :C] if self.history == "lstm" else hidden)
        return torch.stack(contexts).reshape(T, N, A, C), hidden.reshape(N, A, self.hidden_size)

    def rnn_step(self, inputs: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """nn.GRUCell (or nn.LSTMCell, h and c side by side) after W_ih x + b_ih: [B, gates * C] -> [B, hidden_size]"""
        C = self.size
        if self.history == "gru":
            recurrent = F.linear(hidden, self.rnn.weight_hh, self.rnn.bias_hh)
            (gates, new), (recurrent_gates, recurrent_new) = (x.split([2 * C, C], dim=-1) for x in (inputs, recurrent))
            reset, update = (gates + recurrent_gates).sigmoid().chunk(2, dim=-1)
            return torch.lerp(torch.addcmul(new, reset, recurrent_new).tanh(), hidden, update)
        h, cell = hidden.chunk(2, dim=-1)
        i, f, g, o = (inputs + F.linear(h, self.rnn.weight_hh, self.rnn.bias_hh)).chunk(4, dim=-1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        return torch.cat([o.sigmoid() * cell.tanh(), cell], dim=-1)


def hyper_sizes(args: Args) -> tuple[int, int]:
    """K and r of a form: --hyper-basis and --hyper-rank, or what None stands for."""
    basis = (4 if args.hyper in ("full", "low-rank") else 16) if args.hyper_basis is None else args.hyper_basis
    rank = {"delta": 1, "low-rank": 4}.get(args.hyper, 0) if args.hyper_rank is None else args.hyper_rank
    return basis, rank


class HyperNetwork(nn.Module):
    """Weights of a multilayer perceptron made from a context, without ever building a weight tensor per sample.

    delta       W + sum_k a_k(c) B_k, B_k = U_k V_k of rank r:   x W + (a * (x V)) U;   r = 0: B_k is full
    full        sum_k a_k(c) B_k with ||a|| = 1:                 sum_k a_k (x B_k)
    last-layer  last layer: W + sum_k a_k(c) B_k; earlier ones: s(c) * (W x + b)
    low-rank    W + A(c) B(c), A = sum_k a_k U_k, B = sum_k b_k V_k
    The coefficients a, b, s are linear functions of the context; `code` [..., P] is what they are made from.

    All but `full` start at exactly the base actor, because U or B is zero and s one (Bias-HyperInit, Beck et al. 2022).
    In `full` every B_k starts like a standard layer and a has norm 1: by hyperfan-in (Chang et al. 2020, "Principled
    weight initialization for hypernetworks") activations then have a standard actor's variance, for any context.
    """

    def __init__(self, layers: nn.ModuleList, gains: list[float], context_size: int, args: Args):
        """layers: the base layers; gains: of their initialisation"""
        super().__init__()
        self.form = args.hyper
        self.basis, self.rank = K, r = hyper_sizes(args)
        sizes = [(layer.in_features, layer.out_features) for layer in layers]
        self.num_generated = sum(i * o + o for i, o in sizes)
        self.alpha = layer_init(nn.Linear(context_size, K), 1.0) if K != context_size else nn.Identity()
        if self.form == "low-rank":
            self.beta = layer_init(nn.Linear(context_size, K), 1.0)
            # Sums and copies over K as products with constants, they are faster so:
            eye_k, eye_r = torch.eye(K), torch.eye(r)
            spread = torch.block_diag(eye_k, eye_k).repeat_interleave(r, dim=1)  # [2K, 2K*r]
            self.register_buffer("spread", spread, persistent=False)
            self.register_buffer("sum_and_spread", eye_r.repeat(K, K), persistent=False)  # [K*r, K*r]
            each_a, each_b = eye_k.repeat_interleave(K, dim=1), eye_k.repeat(1, K)  # [K, K*K]
            self.register_buffer("pairs", torch.block_diag(each_a, each_b), persistent=False)  # [2K, 2K*K]
        if self.form == "last-layer":
            self.scales = nn.ModuleList(nn.Linear(context_size, o) for _, o in sizes[:-1])
            for layer in self.scales:
                nn.init.zeros_(layer.weight)
                nn.init.ones_(layer.bias)
        self.first = len(sizes) - 1 if self.form == "last-layer" else 0  # the first layer that has a sum of its own
        self.down, self.up = nn.ModuleList(), nn.ParameterList()
        for (size_in, size_out), gain in list(zip(sizes, gains, strict=True))[self.first :]:
            # Weight and bias of a layer side by side, [out, in + 1]: V [K*r, in + 1], or B itself [K*out, in + 1]
            self.down.append(layer_init(nn.Linear(size_in, K * r if r else K * size_out), 1.0))
            if r:
                self.up.append(nn.Parameter(torch.zeros(size_out, K * r)))  # U
            elif self.form == "full":
                for block in self.down[-1].weight.data.split(size_out):
                    nn.init.orthogonal_(block, gain)
            else:
                nn.init.zeros_(self.down[-1].weight)

    def code(self, context: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., P]"""
        if self.form == "full":
            return F.normalize(self.alpha(context), dim=-1)
        if self.form == "low-rank":
            return torch.cat([self.alpha(context), self.beta(context)], dim=-1)
        return self.alpha(context) if self.form == "delta" else context

    def coefficients(self, code: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A code [..., P] as a; with low-rank a, b; with last-layer (whose code is the context) a, s of each layer.
        For rank r a and b have each number r times: [..., K*r]"""
        if self.form == "last-layer":
            return self.alpha(code), *(layer(code) for layer in self.scales)
        if self.form == "low-rank":
            return (code @ self.spread).chunk(2, dim=-1)
        return (code.repeat_interleave(self.rank, dim=-1) if self.rank > 1 else code,)

    def apply_layer(
        self, i: int, layer: nn.Linear | None, x: torch.Tensor, parts: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Layer i with generated weights. layer: its base (None in `full`), x [B, in], parts of the code -> [B, out]"""
        y = layer(x) if layer is not None else 0.0
        if i < self.first:
            return y * parts[1 + i]
        i -= self.first
        z = self.down[i](x)  # [B, K * (r or out)]
        if not self.rank:
            return y + (z.unflatten(-1, (self.basis, -1)) * parts[0].unsqueeze(-1)).sum(1)
        if self.form == "low-rank":
            z = (z * parts[1]) @ self.sum_and_spread  # B(c) x, K times side by side
        return y.addmm_(z * parts[0], self.up[i].T)  # in place: y is ours alone

    def squared_norms(
        self, layers: nn.ModuleList, code: torch.Tensor, previous: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact squared norms over all weights and biases, from Gram matrices of the B_k instead of the weights.

        code [..., P], previous [..., P]: of the step before -> ||delta_theta||^2 (without gradient), ||its change||^2
        """
        gram = self.gram()
        if self.form == "low-rank":  # A(c) B(c) = sum_kl a_k b_l U_k V_l is linear in the products a_k b_l
            a, b = (torch.stack([code, previous]) @ self.pairs).chunk(2, dim=-1)
            code, previous = (a * b).unbind()  # [..., K*K]
        elif self.form == "last-layer":  # everything is linear in [context, 1]: a Gram matrix [C + 1, C + 1] over that
            C = code.shape[-1]
            identity = isinstance(self.alpha, nn.Identity)
            alpha = torch.eye(C, C + 1, device=code.device) if identity else with_bias(self.alpha)
            gram = alpha.T @ gram @ alpha
            for layer, scale in zip(layers[: self.first], self.scales, strict=True):
                rows = with_bias(layer).square().sum(-1, keepdim=True)  # s_i changes row i by s_i - 1 times that row
                change = torch.cat([scale.weight, scale.bias.unsqueeze(-1) - 1], dim=-1)
                gram = gram + change.T @ (rows * change)
            code, previous = (F.pad(x, (0, 1), value=1.0) for x in (code, previous))
        return quadratic_form(code.detach(), gram.detach()), quadratic_form(code - previous, gram)

    def gram(self) -> torch.Tensor:
        """<B_k, B_l> over all weights and biases: [K, K]; with low-rank <U_k V_l, U_m V_n>: [K*K, K*K]"""
        K, r = self.basis, self.rank
        rows = [with_bias(down) for down in self.down]  # of each layer: [K*r or K*out, in + 1]
        if not r:
            return sum(x.view(K, -1) @ x.view(K, -1).T for x in rows)
        # <U_k V_l, U_m V_n> = sum over the ranks i, j of (u_ki . u_mj) (v_li . v_nj), and over the layers x
        down = torch.stack([x @ x.T for x in rows]).view(-1, K, r, K, r)
        up = torch.stack([x.T @ x for x in self.up]).view(-1, K, r, K, r)
        if self.form == "delta":
            return (up * down).sum((0, 2, 4))
        return torch.einsum("xkimj,xlinj->klmn", up, down).reshape(K * K, K * K)


def generated_mlp(
    x: torch.Tensor, layers: nn.ModuleList, hyper: HyperNetwork | None, code: torch.Tensor | None
) -> torch.Tensor:
    """Linear layers with ReLU between them, as they are or as `hyper` makes them: x [B, in], code [B, P] -> [B, out]"""
    parts = hyper.coefficients(code) if hyper else ()
    for i, layer in enumerate(layers):
        x = hyper.apply_layer(i, layer, x, parts) if hyper else layer(x)
        x = x.relu_() if i + 1 < len(layers) else x
    return x


class Actor(nn.Module):
    """Shared by all agents. Its output `dist` [..., n] holds log-probabilities (Discrete), or [..., 2 D] mean and
    log standard deviation of a diagonal Gaussian (Box)."""

    def __init__(self, spec: dict, args: Args):
        super().__init__()
        self.discrete = spec["discrete"]
        self.trunk = Trunk(spec["obs_shape"], spec["obs_scale"])
        self.num_ids = spec["num_agents"] if args.agent_id else 0
        # A list, so that the frozen encoder is no part of this module: it has a checkpoint of its own.
        self.subgoals = [load_subgoals(args.subgoals, spec)] if args.subgoals else []
        self.num_subgoals = self.subgoals[0].config["latent_size"] if self.subgoals else 0
        self.context = self.hyper = None
        if args.hyper != "none" or args.actor_context:
            self.context = Context(self.trunk.num_features, spec["num_agents"], self.num_subgoals, args)
        context_size = args.context_size if self.context else 0
        inputs = self.trunk.num_features + self.num_ids + (context_size if args.actor_context else 0)
        H = args.hidden_size if args.match_params is None else matching_width(inputs, spec, args)
        sizes, gains = [inputs, H, H, spec["num_actions"]], [math.sqrt(2), math.sqrt(2), 0.01]
        self.layers = nn.ModuleList(
            layer_init(nn.Linear(*size), gain) for size, gain in zip(itertools.pairwise(sizes), gains, strict=True)
        )
        if not self.discrete:
            self.logstd = nn.Parameter(torch.zeros(spec["num_actions"]))
        if args.hyper != "none":
            self.hyper = HyperNetwork(self.layers, gains, context_size, args)
            if args.hyper == "full":
                self.layers = nn.ModuleList(3 * [None])  # no base weights
        self.hidden_size = self.context.hidden_size if self.context else 0
        self.memory_size = self.hidden_size + (self.subgoals[0].history_size if self.subgoals else 0)

    @property
    def sequential(self) -> bool:
        """Whether its update needs consecutive steps: for the history, or for the smoothness of what changes."""
        return self.context is not None and (self.context.kind != "agent-id" or bool(self.subgoals))

    def forward(
        self,
        obs: torch.Tensor,
        action_mask: torch.Tensor | None,
        active: torch.Tensor,
        starts: torch.Tensor,
        hidden: torch.Tensor,
        z: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The one forward of acting (T = 1), updating and evaluating.

        obs [T, N, A, *O], action_mask [T, N, A, n] or None, active [T, N, A], starts [T, N], z [T, N, A, Z] subgoals
        or None, hidden [N, A, hidden_size] before step 0
        -> dist [T, N, A, n], the hypernetwork's code [T, N, A, P] or None, hidden after T.
        """
        x = self.trunk(obs)  # [T, N, A, F]
        code = None
        if self.context:
            context, hidden = self.context(x, z, active, starts, hidden)
            if self.hyper:
                code = self.hyper.code(context)
            else:
                x = torch.cat([x, context], dim=-1)
        if self.num_ids:
            ids = torch.eye(self.num_ids, device=x.device).expand(*x.shape[:-1], self.num_ids)
            x = torch.cat([x, ids], dim=-1)
        x = generated_mlp(x.flatten(0, 2), self.layers, self.hyper, None if code is None else code.flatten(0, 2))
        x = x.view(*active.shape, -1)  # [T*N*A, n] -> [T, N, A, n]
        if not self.discrete:
            return torch.cat([x, self.logstd.expand_as(x)], dim=-1), code, hidden
        if action_mask is not None:
            x = x.masked_fill(~action_mask, -1e9)  # finite: 0 * log 0 must be 0 in entropy and KL
        return x.log_softmax(dim=-1), code, hidden


def matching_width(num_inputs: int, spec: dict, args: Args) -> int:
    """The hidden width at which a plain actor has as many parameters as the hyper actor of --match-params."""
    with torch.random.fork_rng(devices=[]):
        hyper_actor = Actor(spec, replace(args, hyper=args.match_params, actor_context=False, match_params=None))
        context = Actor(spec, replace(args, match_params=None)).context
    target = sum(p.numel() for p in hyper_actor.parameters()) - sum(p.numel() for p in hyper_actor.trunk.parameters())
    target -= sum(p.numel() for p in context.parameters()) if context else 0
    n = spec["num_actions"]

    def count(width: int) -> int:
        return (num_inputs + 1) * width + (width + 1) * width + (width + 1) * n + (0 if spec["discrete"] else n)

    return min(range(1, 65_536), key=lambda width: abs(count(width) - target))


def load_subgoals(run_dir: str, spec: dict) -> nn.Module:
    """The frozen encoder of a pretrain_vae.py run. UsageError: unreadable, or trained on other observations."""
    from pretrain_vae import load_vae

    try:
        encoder = load_vae(run_dir)
        encoder.check_input("obs", spec["obs_shape"])
    except ValueError as error:
        raise UsageError(f"--subgoals: {error}") from None
    return encoder


def start_from(args: Args, spec: dict, actor: Actor, critic: Critic, value_norm: ValueNorm) -> None:
    """--init-from: takes over weights and value statistics. UsageError: of another env or architecture."""
    checkpoint = load_checkpoint(args.init_from)
    saved = Args(**checkpoint["args"])
    differ = [name for name in ARCHITECTURE if getattr(saved, name) != getattr(args, name)]
    if checkpoint["spec"] != spec:
        raise UsageError(f"--init-from {args.init_from} is of env {checkpoint['spec']}, here it is {spec}")
    if differ:
        given = ", ".join(f"{name} {getattr(args, name)} (it has {getattr(saved, name)})" for name in differ)
        raise UsageError(f"--init-from {args.init_from} contradicts {given}: use the same")
    for module, name in ((actor, "actor"), (critic, "critic"), (value_norm, "value_norm")):
        module.load_state_dict(checkpoint[name])


class Critic(nn.Module):
    """Centralised: the global state -> one value for each agent, in normalised units: [..., *S] -> [..., A].

    With --hyper-critic its weights are made from a context, too: an encoding of the state, without history, so that
    the value of an episode's last state needs nothing else.
    """

    def __init__(self, spec: dict, args: Args):
        super().__init__()
        self.trunk = Trunk(spec["state_shape"], spec["state_scale"])
        H, gains = args.hidden_size, [math.sqrt(2), math.sqrt(2), 1.0]
        sizes = itertools.pairwise([self.trunk.num_features, H, H, spec["num_agents"]])
        self.layers = nn.ModuleList(layer_init(nn.Linear(*size), gain) for size, gain in zip(sizes, gains, strict=True))
        self.hyper = None
        if args.hyper_critic:
            self.encoder = layer_init(nn.Linear(self.trunk.num_features, args.context_size))
            self.hyper = HyperNetwork(self.layers, gains, args.context_size, args)
            if args.hyper == "full":
                self.layers = nn.ModuleList(3 * [None])

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        features = self.trunk(state)
        x = features.flatten(0, -2)  # [..., F] -> [B, F]
        code = self.hyper.code(self.encoder(x).relu_()) if self.hyper else None
        return generated_mlp(x, self.layers, self.hyper, code).view(*features.shape[:-1], -1)


class ValueNorm(nn.Module):
    """Running mean and deviation of the returns (Yu et al. 2022, "value normalization"), debiased like Adam's."""

    def __init__(self, enabled: bool, decay: float = 0.99):
        super().__init__()
        self.enabled, self.decay = enabled, decay
        self.register_buffer("moments", torch.zeros(3))  # decayed sums of x, x^2, 1

    def update(self, returns_mean: torch.Tensor, returns_var: torch.Tensor) -> None:
        batch = torch.stack([returns_mean, returns_var + returns_mean**2, torch.ones_like(returns_mean)])
        self.moments.lerp_(batch, 1 - self.decay)

    def mean_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.moments[2].clamp(min=1e-8)
        mean = self.moments[0] / weight
        std = (self.moments[1] / weight - mean**2).clamp(min=1e-4).sqrt()
        seen = (self.moments[2] > 0) & self.enabled
        return torch.where(seen, mean, 0.0), torch.where(seen, std, 1.0)

    def normalize(self, returns: torch.Tensor) -> torch.Tensor:
        mean, std = self.mean_std()
        return (returns - mean) / std

    def denormalize(self, values: torch.Tensor) -> torch.Tensor:
        mean, std = self.mean_std()
        return values * std + mean


# ----------------------------------------------------------------------------- distributions, GAE, losses


def sample_actions(dist: torch.Tensor, discrete: bool, deterministic: bool = False) -> torch.Tensor:
    """dist [..., n] -> actions [...] int64; dist [..., 2 D] -> actions [..., D] float32"""
    if discrete:
        if deterministic:
            return dist.argmax(-1)
        return (dist - torch.empty_like(dist).exponential_().log()).argmax(-1)  # Gumbel-max trick
    mean, logstd = dist.chunk(2, dim=-1)
    return mean if deterministic else mean + logstd.exp() * torch.randn_like(mean)


def log_prob(dist: torch.Tensor, actions: torch.Tensor, discrete: bool) -> torch.Tensor:
    """log pi(actions): [...]"""
    if discrete:
        return dist.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    mean, logstd = dist.chunk(2, dim=-1)
    return (-0.5 * ((actions - mean) / logstd.exp()) ** 2 - logstd - 0.5 * math.log(2 * math.pi)).sum(-1)


def entropy(dist: torch.Tensor, discrete: bool) -> torch.Tensor:
    """[...], in nats"""
    if discrete:
        return -(dist.exp() * dist).sum(-1)
    return (dist.chunk(2, dim=-1)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def kl_divergence(old: torch.Tensor, new: torch.Tensor, discrete: bool) -> torch.Tensor:
    """KL(old || new): [...], in nats"""
    if discrete:
        return (old.exp() * (old - new)).sum(-1)
    (mean0, logstd0), (mean1, logstd1) = old.chunk(2, dim=-1), new.chunk(2, dim=-1)
    var_ratio = (2 * (logstd0 - logstd1)).exp()
    return (0.5 * (var_ratio + ((mean0 - mean1) / logstd1.exp()) ** 2 - 1) - (logstd0 - logstd1)).sum(-1)


def masked_mean(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (x * weights).sum() / weights.sum().clamp(min=1.0)


def mean_var(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over the samples of weight 1, those of all processes together."""
    total, x_sum = all_sum(torch.stack([weights.sum(), (x * weights).sum()]))
    mean = x_sum / total.clamp(min=1.0)
    return mean, all_sum(((x - mean) ** 2 * weights).sum()) / total.clamp(min=1.0)


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of torchrun; x itself without it."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def average_gradients(params: list[nn.Parameter]) -> None:
    """Every process goes on with the mean gradient of all: one exchange of all of them side by side."""
    if dist.is_initialized():
        grads = [p.grad for p in params if p.grad is not None]
        flat = all_sum(torch.cat([g.flatten() for g in grads])) / dist.get_world_size()
        for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(mean.view_as(g))


def regression_loss(error: torch.Tensor, huber_delta: float | None) -> torch.Tensor:
    """Half the squared error, linear past huber_delta; elementwise."""
    if huber_delta is None:
        return 0.5 * error**2
    return F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=huber_delta)


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminations: torch.Tensor,
    ended: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438): -> advantages, returns [T, N, A].

    All [T, N, A]. next_values is the value of what the transition t -> t+1 really led to: after a truncation the
    final state's, never the next episode's. A termination zeroes this bootstrap; `ended` (the agent's episode goes
    on no further, for whatever reason) only stops the recursion.
    """
    deltas = rewards + gamma * next_values * (~terminations) - values
    carry = gamma * gae_lambda * (~ended).float()
    advantages = torch.empty_like(rewards)
    lastgaelam = torch.zeros_like(rewards[0])
    for t in reversed(range(rewards.shape[0])):
        lastgaelam = deltas[t] + carry[t] * lastgaelam
        advantages[t] = lastgaelam
    return advantages, advantages + values


def smoothness(
    actor: Actor, code: torch.Tensor, before: torch.Tensor, active: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How much theta changes between consecutive steps of one episode: mean ||change||^2, and without gradient
    mean ||change||, mean ||delta_theta||.

    code [T, N, A, P], before [N, A, P]: that of the step before step 0, active [T, N, A]: whose change counts,
    starts [T, N] -> three scalars. A step that opens an episode has no predecessor.
    """
    previous = torch.stack([before, *code.unbind()[:-1]])  # (slices of code would have zero-filled gradients)
    norms, changes = actor.hyper.squared_norms(actor.layers, code, previous)
    was_active = torch.cat([active[:1], active[:-1]])
    pairs = (active & was_active & ~starts.unsqueeze(-1)).float()  # [T, N, A]
    step_change = masked_mean(changes.detach().sqrt(), pairs)
    return masked_mean(changes, pairs), step_change, masked_mean(norms.sqrt(), active.float())


def quadratic_form(alpha: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """alpha^T gram alpha, never below 0 by rounding: [..., K] -> [...]"""
    return ((alpha @ gram) * alpha).sum(-1).clamp(min=0)


def clipped_policy_loss(
    newlogprob: torch.Tensor, mb: dict[str, torch.Tensor], weights: torch.Tensor, clip_coef: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7): -> loss, log ratio, ratio"""
    logratio = (newlogprob - mb["logprobs"]) * weights
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return masked_mean(torch.max(-mb["advantages"] * ratio, -mb["advantages"] * clipped), weights), logratio, ratio


def ppo_loss(
    actor: Actor, critic: Critic, mb: dict[str, torch.Tensor], args: Args
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped loss with the hypernetwork's two penalties: -> scalar loss, the numbers named in LOSSES (no grad).

    mb holds sequences [L, S, ...]: obs state action_mask active learns (whose samples count) starts actions dists
    anchor_dists logprobs advantages returns values (the last two normalised), z (subgoals), and hidden
    [1, S, A, hidden] from before their first step.
    """
    weights = mb["learns"].float()  # every mean is over agents that are active and learn
    inputs = (mb["obs"], mb.get("action_mask"), mb["active"], mb["starts"], mb["hidden"][0], mb.get("z"))
    dists, code, _ = actor(*inputs)

    newlogprob = log_prob(dists, mb["actions"], actor.discrete)
    pg_loss, logratio, ratio = clipped_policy_loss(newlogprob, mb, weights, args.clip_coef)
    entropy_bonus = masked_mean(entropy(dists, actor.discrete), weights)

    newvalue = critic(mb["state"])  # [L, S, A]
    value_error = regression_loss(newvalue - mb["returns"], args.huber_delta)
    if args.clip_vloss:
        v_clipped = mb["values"] + (newvalue - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
        value_error = torch.max(value_error, regression_loss(v_clipped - mb["returns"], args.huber_delta))
    v_loss = masked_mean(value_error, weights)

    loss = pg_loss - args.ent_coef * entropy_bonus + args.vf_coef * v_loss
    smooth_loss = align_kl = delta_norm = step_change = torch.zeros_like(loss)
    if actor.hyper:
        before = actor.hyper.code(actor.context.previous(mb["hidden"][0], mb["active"][0]))
        change, step_change, delta_norm = smoothness(actor, code, before, mb["learns"], mb["starts"])
        smooth_loss = change / actor.hyper.num_generated
        align_kl = masked_mean(kl_divergence(mb["anchor_dists"], dists, actor.discrete), weights)
        loss = loss + args.smooth_coef * smooth_loss + args.align_coef * align_kl

    # The two estimates of KL(old || new): http://joschu.net/blog/kl-approx.html
    old_approx_kl, approx_kl = masked_mean(-logratio, weights), masked_mean((ratio - 1) - logratio, weights)
    clipfrac = masked_mean(((ratio - 1).abs() > args.clip_coef).float(), weights)
    numbers = (pg_loss, v_loss, entropy_bonus, old_approx_kl, approx_kl, clipfrac)
    return loss, torch.stack([*numbers, smooth_loss, align_kl, delta_norm, step_change]).detach()


def set_gradients(
    loss_function: Callable,
    actor: Actor,
    critic: Critic,
    batch: dict[str, torch.Tensor],
    parts: tuple[torch.Tensor, ...],
    args: Args,
    parallel_map: Callable,
) -> torch.Tensor:
    """Every parameter's .grad becomes that of the loss over the minibatch: -> numbers of LOSSES.

    parts: indices of the minibatch's sequences in the batch, cut into one part per thread; parallel_map: the threads'.
    Parts count by their samples that learn, so that PPO's means are those of the whole minibatch; the penalty on
    changes of theta, whose mean is over pairs of steps, differs a little where more episodes start in one part.
    """
    params = [*actor.parameters(), *critic.parameters()]
    num_samples = batch["learns"][:, torch.cat(parts)].sum().clamp(min=1)

    def gradients(inds: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        mb = {name: x.index_select(1, inds) for name, x in batch.items()}  # (on a CPU 8 times as fast as x[:, inds])
        share = mb["learns"].sum() / num_samples
        loss, numbers = loss_function(actor, critic, mb, args)
        return torch.autograd.grad(share * loss, params, materialize_grads=True), share * numbers

    grads, numbers = zip(*parallel_map(gradients, parts), strict=True)
    for param, *of_parts in zip(params, *grads, strict=True):
        param.grad = sum(of_parts)
    return sum(numbers)


def gradient_cosine(actor: Actor, mb: dict[str, torch.Tensor], args: Args) -> torch.Tensor:
    """Mean cosine between the agents' policy gradients: 1 all pull the same way, 0 unrelated. Scalar."""
    inputs = (mb["obs"], mb.get("action_mask"), mb["active"], mb["starts"], mb["hidden"][0], mb.get("z"))
    newlogprob = log_prob(actor(*inputs)[0], mb["actions"], actor.discrete)
    params, gradients = [p for p in actor.parameters() if p.requires_grad], []
    learners = mb["learns"].flatten(0, 1).any(0)  # [A]
    for i in range(len(learners)):
        weights = torch.zeros_like(newlogprob)
        weights[..., i] = mb["learns"][..., i].float()
        loss, _, _ = clipped_policy_loss(newlogprob, mb, weights, args.clip_coef)
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in grads if g is not None]))
    gradients = F.normalize(torch.stack(gradients), dim=-1)
    pairs = (learners.unsqueeze(-1) & learners).float().triu(1)
    return masked_mean(gradients @ gradients.T, pairs)


# ------------------------------------------------------------------------------- evaluation, checkpoints


@torch.no_grad()
def act(
    actor: Actor, step: EnvStep, starts: torch.Tensor, memory: torch.Tensor, deterministic: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """One env step: actions [N, A] or [N, A, D], dist [N, A, n], subgoals z [N, A, Z] or None, memory to carry on.

    memory [N, A, memory_size]: the context's hidden state, then the subgoal encoder's history.
    """
    hidden, history = memory.split([actor.hidden_size, actor.memory_size - actor.hidden_size], dim=-1)
    z = None
    if actor.subgoals:
        history = history * (~starts).float().view(-1, 1, 1)
        z = actor.subgoals[0].encode(step.obs, history)
    action_mask = None if step.action_mask is None else step.action_mask.unsqueeze(0)
    inputs = (step.obs.unsqueeze(0), action_mask, step.active.unsqueeze(0), starts.unsqueeze(0), hidden)
    dists, _, hidden = actor(*inputs, None if z is None else z.unsqueeze(0))
    actions = sample_actions(dists[0], actor.discrete, deterministic)
    return actions, dists[0], z, torch.cat([hidden, history], dim=-1)


def remember(actor: Actor, step: EnvStep, actions: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """The memory after all seats' `actions` at `step` are known: who did what is the subgoal encoder's history."""
    if not actor.subgoals:
        return memory
    hidden, history = memory.split([actor.hidden_size, actor.memory_size - actor.hidden_size], dim=-1)
    return torch.cat([hidden, actor.subgoals[0].observe(history, step.obs, actions)], dim=-1)


def evaluate(
    actor: Actor,
    env: VecEnv,
    num_episodes: int,
    seed: int,
    deterministic: bool = False,
    frames: list | None = None,
    partners: Partners | None = None,
) -> dict[str, torch.Tensor]:
    """Plays episodes with the forward of training: {"returns": [num_episodes, A], "lengths": [num_episodes]}.

    Every env plays a fixed share of the episodes, so that short ones are not over-represented.
    `frames` collects the pictures of env 0; `partners` play their seats.
    """
    torch.manual_seed(seed)
    N = env.num_envs
    shares = [num_episodes // N + (i < num_episodes % N) for i in range(N)]
    returns, lengths = [], []
    step = env.reset(seed)
    starts = torch.ones(N, dtype=torch.bool, device=env.device)
    memory = torch.zeros(N, env.num_agents, actor.memory_size, device=env.device)
    with tqdm(total=num_episodes, desc="evaluation", unit="episode", disable=None) as bar:
        while len(returns) < num_episodes:
            if frames is not None:
                frames.append(env.render())
            actions, _, _, memory = act(actor, step, starts, memory, deterministic)
            actions = partners.play(step, actions) if partners else actions
            memory = remember(actor, step, actions, memory)
            step = env.step(actions)
            starts = step.episode_over
            for i in starts.nonzero().flatten().tolist():
                if shares[i] > 0:
                    shares[i] -= 1
                    returns.append(step.episode_returns[i].cpu())
                    lengths.append(step.episode_lengths[i].cpu())
                    bar.update()
    return {"returns": torch.stack(returns), "lengths": torch.stack(lengths)}


def evaluate_run(actor: Actor, args: Args, run_dir: Path, device: torch.device) -> None:
    """The closing evaluation, always on the genuine env with seeds of its own: prints, eval.json, video.gif."""
    env_kwargs, seed = json.loads(args.env_kwargs), args.seed + EVAL_SEED
    if args.eval_episodes:
        num_procs = min(env_procs(args, "pettingzoo"), args.eval_episodes)
        env = make_vec_env(args.env_id, max(1, num_procs), device, seed, "pettingzoo", num_procs, **env_kwargs)
        partners = Partners(args.partners, env)
        played = evaluate(actor, env, args.eval_episodes, seed, args.eval_deterministic, partners=partners)
        env.close()
        team = played["returns"][:, : partners.first_seat].mean(dim=1)  # [episodes, A] -> [episodes]: who learns
        n = len(team)
        half = float(team.std() * student_t.ppf(0.975, n - 1) / math.sqrt(n)) if n > 1 else math.nan
        report = {"env_id": env.env_id, "backend": env.backend, "episodes": n, "seed": seed}
        report |= {"deterministic": args.eval_deterministic, "mean_return": float(team.mean())}
        report |= {"interval_95": half if n > 1 else None, "returns": team.tolist()}
        report |= {"mean_return_per_agent": played["returns"].mean(dim=0).tolist()}
        report |= {"mean_length": float(played["lengths"].float().mean())}
        (run_dir / "eval.json").write_text(json.dumps(report, indent=2))
        result = f"return per agent {team.mean():.2f} ± {half:.2f} (95 % interval, {n} episodes)"
        print(f"evaluation on genuine {env.env_id}: {result}, length {report['mean_length']:.0f}")
    if args.capture_video:
        env = make_vec_env(args.env_id, 1, device, seed, "pettingzoo", render_mode="rgb_array", **env_kwargs)
        frames: list[np.ndarray] = []
        evaluate(actor, env, 1, seed, args.eval_deterministic, frames, Partners(args.partners, env))
        env.close()
        imageio.mimsave(run_dir / "video.gif", frames, duration=60, loop=0)
        print(f"video    {run_dir / 'video.gif'} ({len(frames)} frames)")


# --- same in: pretrain_vae.py, world_model.py [checkpoint files] ---
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


class Policy:
    """A run folder's policy for other programs.

    memory = initial_state(N), then for each step: actions, memory = act(step, memory), and once the joint action is
    known, of which its own may be a part: memory = remember(step, joint_actions, memory)
    """

    def __init__(self, run_dir: str | Path, device: str | torch.device = "cpu"):
        checkpoint = load_checkpoint(run_dir, device)
        self.args, self.spec, self.device = Args(**checkpoint["args"]), checkpoint["spec"], torch.device(device)
        self.actor = Actor(self.spec, self.args).to(device).requires_grad_(False)
        self.actor.load_state_dict(checkpoint["actor"])

    def initial_state(self, num_envs: int) -> torch.Tensor:
        return torch.zeros(num_envs, self.spec["num_agents"], self.actor.memory_size, device=self.device)

    def act(self, step: EnvStep, memory: torch.Tensor, deterministic: bool = False) -> tuple[torch.Tensor, ...]:
        """-> actions [N, A] or [N, A, D], memory. Where the last `step` ended an episode, memory starts afresh."""
        actions, _, _, memory = act(self.actor, step, step.episode_over, memory, deterministic)
        return actions, memory

    def remember(self, step: EnvStep, actions: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return remember(self.actor, step, actions, memory)


load_policy = Policy


def load_critic(run_dir: str | Path, device: str | torch.device = "cpu") -> Callable[[torch.Tensor], torch.Tensor]:
    """V of a run folder, in units of return: state [..., *S] -> values [..., A]. ValueError as load_checkpoint."""
    checkpoint = load_checkpoint(run_dir, device)
    args = Args(**checkpoint["args"])
    critic = Critic(checkpoint["spec"], args).to(device)
    critic.load_state_dict(checkpoint["critic"])
    value_norm = ValueNorm(args.value_norm).to(device)
    value_norm.load_state_dict(checkpoint["value_norm"])
    return torch.no_grad()(lambda state: value_norm.denormalize(critic(state)))


# ----------------------------------------------------------------------------------------------- partners


class FixedPolicy:
    """A policy without memory, with the methods of Policy. `choose`: step -> actions [N, A] or [N, A, D]"""

    def __init__(self, choose: Callable[[EnvStep], torch.Tensor]):
        self.choose = choose

    def initial_state(self, num_envs: int) -> None:
        return None

    def act(self, step: EnvStep, memory: None) -> tuple[torch.Tensor, None]:
        return self.choose(step), None

    def remember(self, step: EnvStep, actions: torch.Tensor, memory: None) -> None:
        return None


def make_policy(name: str, env: VecEnv) -> Policy | FixedPolicy:
    """A policy that acts in all seats of all envs. ValueError for an unknown name or a policy of another env.

    name: "random" (any env), a scripted player of the stag hunt, or a run folder.
    """
    if (Path(name) / "latest.pt").exists():
        policy = load_policy(name, env.device)
        shapes = {"obs_shape": list(env.obs_shape), "num_agents": env.num_agents}
        trained = {key: policy.spec[key] for key in shapes}
        if trained != shapes:
            raise ValueError(f"{name} was trained with {trained}, but {env.env_id} has {shapes}; use its env")
        return policy
    is_stag_hunt = env.env_id in stag_hunt.PRESETS
    scripted = stag_hunt.SCRIPTED if is_stag_hunt else ("random",)
    if name not in scripted:
        raise ValueError(
            f"policy: expected {', '.join(scripted)} or a run folder with latest.pt, got {name!r}; name one of these"
        )
    if is_stag_hunt:
        A = env.num_agents
        planes = torch.cat([stag_hunt.ego_order(A), torch.arange(A, A + 3).expand(A, 3)], dim=1).to(env.device)

        def choose(step: EnvStep) -> torch.Tensor:
            whole_map = step.state[..., planes].movedim(-2, 1)  # [N, H, W, A+3] -> [N, A, H, W, A+3]: as seats count
            return stag_hunt.sample_actions(stag_hunt.action_probs(name, whole_map, step.action_mask))  # [N, A]

    elif isinstance(env.action_space, gym.spaces.Discrete):

        def choose(step: EnvStep) -> torch.Tensor:
            legal = torch.ones(*step.active.shape, env.action_space.n, device=env.device)  # [N, A, n]
            legal = legal if step.action_mask is None else step.action_mask.float()
            return torch.multinomial(legal.flatten(0, 1), 1).view(step.active.shape)

    else:
        low, high = (torch.as_tensor(x, device=env.device) for x in (env.action_space.low, env.action_space.high))
        if not (low.isfinite() & high.isfinite()).all():
            raise ValueError(f"random expected a bounded action space, got {env.action_space}; use another policy")

        def choose(step: EnvStep) -> torch.Tensor:
            return low + (high - low) * torch.rand(*step.active.shape, *low.shape, device=env.device)

    return FixedPolicy(choose)


def parse_partners(partners: tuple[str, ...]) -> list[tuple[str, int]]:
    """("nearest_stag:2", "random:1") -> [("nearest_stag", 2), ("random", 1)]. UsageError where that is not its form."""
    parsed = []
    for partner in partners:
        name, _, seats = partner.rpartition(":")
        if not name or not seats.isdigit() or int(seats) < 1:
            raise UsageError(f"--partners expects NAME:SEATS with at least 1 seat, like random:1, got {partner!r}")
        parsed.append((name, int(seats)))
    return parsed


class Partners:
    """Fixed partners in the last seats of every env. UsageError: more than there are seats, or unusable ones."""

    def __init__(self, partners: tuple[str, ...], env: VecEnv):
        parsed = parse_partners(partners)
        self.first_seat = seat = env.num_agents - sum(seats for _, seats in parsed)  # the seats before it learn
        if seat < 1:
            raise UsageError(
                f"--partners fill {env.num_agents - seat} seats of {env.env_id}, which has {env.num_agents}: "
                "leave at least 1 to learn"
            )
        self.policies, self.memories, self.first_seats = [], [], []
        for name, seats in parsed:
            try:
                self.policies.append(make_policy(name, env))
            except ValueError as error:
                raise UsageError(f"--partners: {error}") from None
            self.memories.append(self.policies[-1].initial_state(env.num_envs))
            self.first_seats.append(seat)
            seat += seats

    @torch.no_grad()
    def play(self, step: EnvStep, actions: torch.Tensor) -> torch.Tensor:
        """The learners' actions [N, A] or [N, A, D] with the partners' own in their seats."""
        for i, (policy, first_seat) in enumerate(zip(self.policies, self.first_seats, strict=True)):
            chosen, self.memories[i] = policy.act(step, self.memories[i])
            actions = torch.cat([actions[:, :first_seat], chosen[:, first_seat:]], dim=1)
        for i, policy in enumerate(self.policies):
            self.memories[i] = policy.remember(step, actions, self.memories[i])
        return actions


# -------------------------------------------------------------------------------------------- small parts


def env_spec(env: VecEnv) -> dict:
    """What the networks need to know of an env; saved in the checkpoint."""
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    return {
        "env_id": env.env_id,
        "num_agents": env.num_agents,
        "obs_shape": list(env.obs_shape),
        "obs_scale": env.obs_scale,
        "state_shape": list(env.state_shape),
        "state_scale": env.state_scale,
        "discrete": discrete,
        "num_actions": int(env.action_space.n) if discrete else int(env.action_space.shape[0]),
    }


def env_procs(args: Args, backend: str) -> int:
    if backend == "batched":
        return 0
    return default_env_procs(args.num_envs or 8) if args.num_env_procs is None else args.num_env_procs


# --- same in: pretrain_vae.py, world_model.py [limits] ---
def check_limits(args: object, limits: dict[str, tuple[Callable, str]]) -> None:
    """ValueError for a number that is not what `limits` asks for: {what it must be: (whether it is, names of flags)}.
    None, where a flag takes it, passes; NaN never does."""
    for limit, (holds, names) in limits.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise ValueError(f"--{name.replace('_', '-')} must be {limit}, got {value}")


# --- end [limits] ---


def check_args(args: Args, world_size: int = 1) -> tuple[str, int, int]:
    """What can be wrong before an env is made, beside single numbers (check_limits): UsageError in one line.

    -> backend, num_envs (of all processes together), num_minibatches
    """

    def flag(name: str) -> str:
        return "--" + name.replace("_", "-")

    def refuse(names: list[str], why: str) -> None:
        given = [flag(name) for name in names if getattr(args, name) != getattr(Args, name)]
        if given:
            raise UsageError(f"{', '.join(given)} would do nothing {why}: leave out, or change the other")

    if args.hyper == "none" and args.match_params is None:
        refuse(HYPER_ONLY, "with --hyper none")
        if not args.actor_context:
            refuse(CONTEXT_ONLY, "with --hyper none, unless --actor-context is set")
    if args.hyper != "none":
        refuse(["actor_context"], f"with --hyper {args.hyper}: it is the control for --hyper none")
        refuse(["match_params"], f"with --hyper {args.hyper}: it sizes the plain actor of --hyper none")
    form = args.match_params or args.hyper
    if form not in ("delta", "low-rank"):
        refuse(["hyper_rank"], f"with --hyper {form}: only delta and low-rank have one")
    if args.hyper_rank is not None and args.hyper_rank < (form == "low-rank"):
        raise UsageError(f"--hyper-rank must be at least {int(form == 'low-rank')} with {form}, got {args.hyper_rank}")
    if args.hyper_context == "agent-id":
        constant = [] if args.subgoals else ["chunk_length", "smooth_coef"]
        refuse(["history", "share_delta", *constant], "with --hyper-context agent-id, which never changes")
    if args.hyper_context == "local":
        refuse(["share_delta"], "with --hyper-context local: it needs all agents' contexts")
    if args.context_size % args.context_heads:
        raise UsageError(f"--context-size {args.context_size} is no multiple of --context-heads {args.context_heads}")
    parse_partners(args.partners)
    try:
        env_kwargs = json.loads(args.env_kwargs)
        backend = check_env(args.env_id, args.backend, env_kwargs)
    except json.JSONDecodeError:
        raise UsageError(f"--env-kwargs must be JSON like '{{\"max_cycles\": 100}}', got {args.env_kwargs!r}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    num_envs = args.num_envs or (128 if backend == "batched" else 8)
    if num_envs % world_size:
        raise UsageError(f"--num-envs {num_envs} cannot be shared by {world_size} processes: choose a multiple")
    batch = num_envs * args.num_steps
    if args.total_timesteps < batch:
        raise UsageError(
            f"--total-timesteps {args.total_timesteps} gives no update: one rollout takes {batch} env steps "
            f"({num_envs} envs x {args.num_steps} steps); raise it, or lower --num-envs or --num-steps"
        )
    sequential = (args.hyper != "none" or args.actor_context) and (args.hyper_context != "agent-id" or args.subgoals)
    if args.num_steps % args.chunk_length:
        raise UsageError(f"--chunk-length {args.chunk_length} does not divide --num-steps {args.num_steps}")
    sequences = batch // (args.chunk_length if sequential else 1) // world_size
    num_minibatches = args.num_minibatches or (8 if backend == "batched" else 4)
    if sequences % num_minibatches:
        what = f"sequences of {args.chunk_length} steps" if sequential else "env steps of a rollout"
        raise UsageError(f"--num-minibatches {num_minibatches} does not divide the {sequences} {what} of a process")
    return backend, num_envs, num_minibatches


def record(rollout: dict[str, torch.Tensor], t: int, num_steps: int, **tensors: torch.Tensor | None) -> None:
    """rollout[name][t] = tensor, allocating [num_steps, *tensor.shape] the first time; None is left out."""
    for name, x in tensors.items():
        if x is not None:
            if name not in rollout:
                rollout[name] = torch.empty(num_steps, *x.shape, dtype=x.dtype, device=x.device)
            rollout[name][t] = x


def open_metrics(path: Path, columns: list[str], keep_until: int) -> IO[str]:
    """metrics.csv, a row per update, opened to append; rows past global_step `keep_until` are dropped (resume)."""
    kept = []
    if path.exists():
        with open(path, newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["global_step"]) <= keep_until]
    file = open(path, "w", newline="", buffering=1)
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(kept)
    return file


def compile_works(device: torch.device) -> bool:
    """Tries torch.compile on one small function; where it fails (no C++ compiler, say) prints why in one line."""
    try:
        torch.compile(lambda x: (x * 2).sin())(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing: training goes on without it
        print(f"--compile does not work here ({type(error).__name__}), going on without")
        return False
    return True


def count_multiplications(spec: dict, args: Args) -> int:
    """Multiply-adds of all matrix products in one forward of actor and critic, per agent and env step."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        actor, critic, T, A = Actor(spec, args), Critic(spec, args), 8, spec["num_agents"]
        flags, starts = torch.ones(T, 1, A, dtype=torch.bool), torch.zeros(T, 1, dtype=torch.bool)
        z = torch.zeros(T, 1, A, actor.num_subgoals) if actor.subgoals else None
        missing = {  # what PyTorch's own table of operations leaves out
            torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]
        }
        with FlopCounterMode(display=False, custom_mapping=missing) as counter:
            hidden = torch.zeros(1, A, actor.hidden_size)
            actor(torch.zeros(T, 1, A, *spec["obs_shape"]), None, flags, starts, hidden, z)
            critic(torch.zeros(T, 1, *spec["state_shape"]))
    return counter.get_total_flops() // (2 * T * A)


def keep_freed_memory() -> None:
    """Tells glibc to hand freed memory to the next tensor instead of to the system, which gives it back page by page
    and zeroed: that took a fifth of an update's time on a CPU. Elsewhere does nothing."""
    try:
        libc = ctypes.CDLL(None)
        for option, size in MALLOPT.items():
            libc.mallopt(option, size)
    except (AttributeError, OSError, TypeError):
        pass


class StopSignal:
    """Ctrl-C and SIGTERM let the update finish, so that the run can be saved; a second Ctrl-C stops at once."""

    def __init__(self):
        self.requested = False
        self.previous = {number: signal.signal(number, self.request) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this update (Ctrl-C again: at once, losing it)", file=sys.stderr)

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def new_run_dir(args: Args) -> Path:
    """Makes runs/<env>__<script>__<seed>__<unix time>, a second later where another run has that name."""
    env_name = re.sub(r"[^\w.-]+", "-", args.env_id)
    for stamp in itertools.count(int(time.time())):
        run_dir = Path(args.runs_dir) / f"{env_name}__{args.exp_name}__{args.seed}__{stamp}"
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except OSError as error:
            if not run_dir.is_dir():
                raise UsageError(
                    f"cannot write the run folder {run_dir} ({error.strerror}): choose another --runs-dir"
                ) from None


def start_wandb(args: Args, run_dir: Path) -> None:
    """Mirrors the TensorBoard log; without a login the run is logged offline instead of asking for a key."""
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None and not wandb.login(prompt=False):
        mode = "offline"
        print(f"W&B: no login found, logging offline; upload with: wandb sync {run_dir / 'wandb' / 'offline-run-*'}")
    names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_dir.name}
    wandb.init(**names, dir=run_dir, config=asdict(args), sync_tensorboard=True, mode=mode)


def plot_learning_curve(run_dir: Path) -> None:
    """learning_curve.png from metrics.csv: the episodic return over env steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(run_dir / "metrics.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["charts/episodic_return"]]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([int(r["global_step"]) for r in rows], [float(r["charts/episodic_return"]) for r in rows])
    axes.set(xlabel="env steps", ylabel="episodic return (mean over agents)", title=run_dir.name)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(run_dir / "learning_curve.png", dpi=120)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------- main


def main(args: Args) -> Path:
    """Trains (or resumes); returns the run folder. UsageError: unusable arguments.

    Under torchrun each process steps its share of the envs, and all go on with the same weights.
    """
    # ---- arguments
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    backend, num_envs, num_minibatches = check_args(args, world_size)
    T, N = args.num_steps, num_envs // world_size
    batch_size = T * num_envs  # env steps of one rollout, of all processes
    num_updates = args.total_timesteps // batch_size
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    if checkpoint and checkpoint["update"] >= num_updates:
        done = f"{checkpoint['update']} of {num_updates} updates"
        raise UsageError(f"{args.resume} has already done {done}: raise --total-timesteps")

    # ---- seeding
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    num_parts = args.update_threads or (min(2, num_cpus()) if device.type == "cpu" and world_size == 1 else 1)
    threads = ThreadPoolExecutor(num_parts, initializer=torch.set_num_threads, initargs=[torch.get_num_threads()])
    parallel_map = threads.map if num_parts > 1 else map
    if world_size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # ---- envs
    env_seed = args.seed + rank * N
    envs = make_vec_env(
        args.env_id, N, device, env_seed, backend, env_procs(args, backend), **json.loads(args.env_kwargs)
    )
    spec, A = env_spec(envs), envs.num_agents
    partners = Partners(args.partners, envs)
    learners = torch.arange(A, device=device) < partners.first_seat  # [A]

    # ---- networks
    actor, critic = Actor(spec, args).to(device), Critic(spec, args).to(device)
    for encoder in actor.subgoals:
        encoder.to(device)
    value_norm = ValueNorm(args.value_norm).to(device)
    L = args.chunk_length if actor.sequential else 1  # steps of a training sequence
    hyper_params = [p for name, p in actor.named_parameters() if name.startswith(("context.", "hyper."))]
    base_params = [p for name, p in actor.named_parameters() if not name.startswith(("context.", "hyper."))]
    groups = [{"params": base_params + list(critic.parameters()), "initial_lr": args.learning_rate}]
    if hyper_params:
        hyper_rate = args.hyper_learning_rate
        if hyper_rate is None:  # (K full deltas of the last layer move the logits together, K times as far)
            hyper_rate = 1e-4 if args.hyper == "last-layer" else 5e-4
        groups.append({"params": hyper_params, "initial_lr": hyper_rate})
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, eps=1e-5, fused=True)
    if args.init_from and checkpoint is None:
        start_from(args, spec, actor, critic, value_norm)
    # What the KL penalty pulls towards; with an interval of 1 it is the policy that acted, whose output is at hand.
    target = copy.deepcopy(actor).requires_grad_(False) if args.target_sync_interval > 1 else None
    loss_function = ppo_loss
    if args.compile and compile_works(device):
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        loss_function = torch.compile(ppo_loss, mode=mode)
        actor.compile(mode=mode)
        critic.compile(mode=mode)

    # ---- logging: by the first process only
    run_dir = Path(args.resume or ".")
    if rank == 0:
        run_dir = run_dir if args.resume else new_run_dir(args)
        (run_dir / "args.json").write_text(json.dumps({**asdict(args), "resolved_backend": backend}, indent=2))
        if args.track:
            start_wandb(args, run_dir)
        writer = SummaryWriter(str(run_dir), purge_step=checkpoint["global_step"] + 1 if checkpoint else None)
        writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items()))
        where = f"on {device}" + (f" of {world_size} processes" if world_size > 1 else "")
        where += " (no CUDA device found)" if args.cuda and device.type == "cpu" else ""
        counts = [sum(p.numel() for p in params) for params in (base_params, hyper_params, critic.parameters())]
        print(f"run      {run_dir}")
        print(f"env      {envs.env_id}, {backend} backend, {num_envs} envs x {A} agents, {where}")
        print("weights  actor {:,}, context and hypernetwork {:,}, critic {:,}".format(*counts))
        print(f"cost     {count_multiplications(spec, args):,} multiply-adds per agent and step, forward")
    last_good = f"last good checkpoint: {run_dir / 'latest.pt'}"

    # ---- storage
    rollout: dict[str, torch.Tensor] = {}  # name -> [T, N, ...], allocated by the first step
    global_step, first_update = 0, 1
    memory = torch.zeros(N, A, actor.memory_size, device=device)
    target_hidden = torch.zeros(N, A, actor.hidden_size, device=device)
    starts = torch.ones(N, dtype=torch.bool, device=device)  # step.obs opens an episode
    probe: dict[str, torch.Tensor] = {}  # a few envs of the first rollout, to see how the policy changes

    # ---- resume
    if world_size > 1:
        torch.manual_seed(args.seed + 1_000_003 * rank)  # equal weights so far, different actions from now on
    worker = None
    if checkpoint is not None:
        if checkpoint["spec"] != spec:
            raise UsageError(f"{args.resume} is of env {checkpoint['spec']}, here it is {spec}: install its version")
        actor.load_state_dict(checkpoint["actor"])
        critic.load_state_dict(checkpoint["critic"])
        value_norm.load_state_dict(checkpoint["value_norm"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if target:
            target.load_state_dict(checkpoint["target"])
        probe = {name: x.to(device) for name, x in checkpoint["probe"].items()}
        global_step, first_update = checkpoint["global_step"], checkpoint["update"] + 1
        if len(checkpoint["workers"]) == world_size:
            worker = checkpoint["workers"][rank]
    if worker is None or worker["env_state"] is None:
        if checkpoint is not None and rank == 0:
            print("the episodes in flight cannot be restored: new ones start, from a seed of their own")
        step = envs.reset(env_seed + global_step)
    else:
        step = envs.load_state_dict(worker["env_state"])
        memory, target_hidden, starts = (x.to(device) for x in worker["episodes"])
        partners.memories = [None if x is None else x.to(device) for x in worker["partner_memories"]]
    if worker is not None:
        torch.set_rng_state(worker["torch_rng"].cpu())
        if device.type == "cuda" and worker["cuda_rng"] is not None:
            torch.cuda.set_rng_state(worker["cuda_rng"].cpu())
    seat_columns = [f"charts/return_seat_{i}" for i in range(A)] if args.partners else []
    if rank == 0:
        metrics_file = open_metrics(run_dir / "metrics.csv", COLUMNS + seat_columns, keep_until=global_step)
    stop = StopSignal()
    bar = {"unit": "step", "unit_scale": True, "disable": None if rank == 0 else True}
    progress = tqdm(total=num_updates * batch_size, initial=global_step, **bar)
    clock: deque[tuple[float, int]] = deque(maxlen=11)  # (time, global_step) after the last updates: windowed SPS

    # ---- loop
    for update in range(first_update, num_updates + 1):
        remaining = 1 - (update - 1) / num_updates if args.anneal_lr else 1.0
        for group in optimizer.param_groups:
            group["lr"] = remaining * group["initial_lr"]
        if target and (update - 1) % args.target_sync_interval == 0:
            target.load_state_dict(actor.state_dict())
            target_hidden = memory[..., : actor.hidden_size]

        # -- rollout: T steps of N envs
        episodes = torch.zeros(2 + A, device=device)  # how many ended, sums of their lengths and of each seat's returns
        for t in range(T):
            with torch.no_grad():
                actions, dists, z, next_memory = act(actor, step, starts, memory)
                values = value_norm.denormalize(critic(step.state))
            actions = partners.play(step, actions)
            record(rollout, t, T, obs=step.obs, state=step.state, action_mask=step.action_mask, active=step.active)
            record(rollout, t, T, starts=starts, actions=actions, dists=dists, values=values, z=z)
            if t % L == 0:
                record(rollout, t // L, T // L, hidden=memory[..., : actor.hidden_size])
            memory = remember(actor, step, actions, next_memory)
            step = envs.step(actions)
            starts = step.episode_over
            # An episode cut by the time limit still has a value: that of its true last state, not of the next
            # episode's first. (Asking whether there is one is free on a CPU and would stall an accelerator.)
            cut_values = torch.zeros_like(values)
            if device.type != "cpu" or step.truncations.any():
                with torch.no_grad():
                    cut_values = value_norm.denormalize(critic(step.final_state))
            ended = step.terminations | ~step.active | step.episode_over.unsqueeze(-1)  # [N, A]
            record(rollout, t, T, rewards=step.rewards, terminations=step.terminations, ended=ended)
            record(rollout, t, T, episode_over=step.episode_over, cut_values=cut_values)
            over = step.episode_over.float()
            sums = [over.sum().view(1), (over * step.episode_lengths).sum().view(1), over @ step.episode_returns]
            episodes += torch.cat(sums)
        global_step += batch_size

        # -- advantages
        with torch.no_grad():
            rollout["learns"] = rollout["active"] & learners
            weights = rollout["learns"].float()
            last_values = value_norm.denormalize(critic(step.state))
            next_values = torch.cat([rollout["values"][1:], last_values.unsqueeze(0)])  # [T, N, A]
            next_values = torch.where(rollout["episode_over"].unsqueeze(-1), rollout["cut_values"], next_values)
            advantages, returns = compute_gae(
                *(rollout["rewards"], rollout["values"], next_values, rollout["terminations"], rollout["ended"]),
                args.gamma,
                args.gae_lambda,
            )
            returns_mean, returns_var = mean_var(returns, weights)
            explained_var = 1 - mean_var(returns - rollout["values"], weights)[1] / returns_var.clamp(min=1e-8)
            if args.norm_adv:
                advantages_mean, advantages_var = mean_var(advantages, weights)
                advantages = (advantages - advantages_mean) / (advantages_var.sqrt() + 1e-8)
            value_norm.update(returns_mean, returns_var)

        # -- the batch [T, N, ...]; hidden [T/L, N, ...], before each sequence
        names = "obs state action_mask active learns starts actions z hidden".split()
        batch = {name: rollout[name] for name in names if name in rollout}
        batch["logprobs"] = log_prob(rollout["dists"], rollout["actions"], actor.discrete)
        batch["advantages"], batch["returns"] = advantages, value_norm.normalize(returns)
        batch["values"] = value_norm.normalize(rollout["values"])
        batch["anchor_dists"] = rollout["dists"]
        if target:
            inputs = [batch.get(name) for name in ("obs", "action_mask", "active", "starts")]
            with torch.no_grad():
                batch["anchor_dists"], _, target_hidden = target(*inputs, target_hidden, batch.get("z"))
        if not probe:
            names = "obs action_mask active starts hidden z".split()
            probe = {name: batch[name][:, :PROBE_ENVS].clone() for name in names if name in batch}
            probe["dists"] = rollout["dists"][:, :PROBE_ENVS].clone()
        metrics: dict[str, float] = {}
        if update % GRADIENT_COSINE_EVERY == 0:
            first_envs = {name: x[:, :PROBE_ENVS] for name, x in batch.items()}
            with torch.compiler.set_stance("force_eager"):  # compiled functions allow one backward pass only
                metrics["nonstationarity/gradient_cosine"] = gradient_cosine(actor, first_envs, args)

        # -- update: minibatches of sequences [L, S]; where no context needs the order, a sequence is a single step
        S = T * N // L
        batch["hidden"] = batch["hidden"].unsqueeze(0)  # [1, T/L, N, ...]
        for name, x in batch.items():
            if name != "hidden":
                x = x.unflatten(0, (T // L, L)).transpose(0, 1)  # [T, N, ...] -> [L, T/L, N, ...]
            batch[name] = x.reshape(x.shape[0], S, *x.shape[3:])  # -> [L, S, ...]
        sums, num_done = torch.zeros(len(LOSSES) + 1, device=device), 0
        for _ in range(args.update_epochs):
            for mb_inds in torch.randperm(S, device=device).chunk(num_minibatches):
                parts = mb_inds.chunk(num_parts)
                numbers = set_gradients(loss_function, actor, critic, batch, parts, args, parallel_map)
                average_gradients([*actor.parameters(), *critic.parameters()])
                grad_norm = nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
                nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
                optimizer.step()
                sums += torch.cat([numbers, grad_norm.unsqueeze(0)])
                num_done += 1
            if args.target_kl is not None:
                if all_sum(numbers)[LOSSES.index("losses/approx_kl")] / world_size > args.target_kl:
                    break
        with torch.no_grad():
            inputs = [probe.get(name) for name in ("obs", "action_mask", "active", "starts")]
            dists = actor(*inputs, probe["hidden"][0], probe.get("z"))[0]
            changes = kl_divergence(probe["dists"], dists, actor.discrete)
            metrics["nonstationarity/policy_kl"] = masked_mean(changes, probe["active"] & learners)
            probe["dists"] = dists

        # -- logging: the update's only look at the device
        sums, episodes = all_sum(sums) / (num_done * world_size), all_sum(episodes).tolist()
        names = [*LOSSES, "losses/grad_norm"]
        metrics |= dict(zip(names, sums, strict=True)) | {"losses/explained_variance": explained_var}
        metrics = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
        bad = [f"{name} is {x}" for name, x in metrics.items() if not math.isfinite(x)]
        if bad and rollout["obs"].is_floating_point() and not rollout["obs"].isfinite().all():
            bad = ["an observation is NaN or infinite"]
        if bad:
            raise FloatingPointError(f"update {update}: {', '.join(bad)}; {last_good}")
        metrics = {name: x for name, x in metrics.items() if actor.hyper or name not in HYPER_TAGS}
        clock.append((time.perf_counter(), global_step))
        if len(clock) > 1:
            metrics["charts/SPS"] = (clock[-1][1] - clock[0][1]) / (clock[-1][0] - clock[0][0])
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        num_ended, length_sum, *return_sums = episodes
        if num_ended:
            learners_sum = sum(return_sums[: partners.first_seat]) / partners.first_seat
            metrics["charts/episodic_return"] = learners_sum / num_ended
            metrics["charts/episodic_length"] = length_sum / num_ended
            metrics |= {tag: x / num_ended for tag, x in zip(seat_columns, return_sums, strict=False)}
            progress.set_postfix_str(f"return {metrics['charts/episodic_return']:.2f}")
        if rank == 0:
            for tag, x in metrics.items():
                writer.add_scalar(tag, x, global_step)
            row = {"update": update, "global_step": global_step, **metrics}
            csv.DictWriter(metrics_file, COLUMNS + seat_columns).writerow(row)
        progress.update(batch_size)

        # -- checkpoint
        stopping = stop.requested
        if world_size > 1:  # all processes stop after the same update
            stopping = bool(all_sum(torch.tensor(float(stopping), device=device)))
        if update % args.save_every == 0 or update == num_updates or stopping:
            worker = {"env_state": envs.state_dict(), "episodes": [memory, target_hidden, starts]}
            worker |= {"partner_memories": partners.memories, "torch_rng": torch.get_rng_state()}
            worker |= {"cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None}
            worker = tree_map_only(torch.Tensor, torch.Tensor.cpu, worker)
            workers = [worker]
            if world_size > 1:
                workers = [None] * world_size
                dist.all_gather_object(workers, worker)
            checkpoint = {"format": CHECKPOINT_FORMAT, "args": asdict(args), "spec": spec, "workers": workers}
            checkpoint |= {"update": update, "global_step": global_step, "probe": probe}
            checkpoint |= {"actor": actor.state_dict(), "critic": critic.state_dict()}
            checkpoint |= {"target": target.state_dict() if target else None}
            checkpoint |= {"value_norm": value_norm.state_dict(), "optimizer": optimizer.state_dict()}
            if rank == 0:
                save_checkpoint(checkpoint, run_dir / "latest.pt")
        if stopping:
            break

    # ---- close
    stop.restore()
    progress.close()
    envs.close()
    if world_size > 1:
        dist.destroy_process_group()
    if rank == 0:
        metrics_file.close()
        plot_learning_curve(run_dir)
        if stopping:
            go_on = f"go on with: python hyper_mappo.py --resume {run_dir}"
            print(f"stopped after update {update} of {num_updates}; {go_on}")
        else:
            evaluate_run(actor, args, run_dir, device)
        writer.close()
    return run_dir


def cli(argv: list[str] | None = None) -> int:
    """The command line: 0 done (or stopped and saved), 1 the run broke down, 2 unusable arguments."""
    argv = sys.argv[1:] if argv is None else argv
    args = tyro.cli(Args, args=argv)
    try:
        run_dir = args.resume or args.evaluate or args.init_from
        if run_dir:  # the run's own arguments are the defaults, flags given beside them come on top
            try:
                saved = Args(**load_checkpoint(run_dir)["args"])
            except ValueError as error:
                raise UsageError(str(error)) from None
            fixed = ARCHITECTURE if run_dir == args.init_from else FIXED_BY_CHECKPOINT
            defaults = replace(Args(), **{name: getattr(saved, name) for name in ARCHITECTURE})
            args = tyro.cli(Args, args=argv, default=defaults if run_dir == args.init_from else saved)
            for name in fixed:
                if getattr(args, name) != getattr(saved, name) and not (args.evaluate and name == "partners"):
                    raise UsageError(
                        f"--{name.replace('_', '-')} {getattr(args, name)} contradicts the checkpoint's "
                        f"{getattr(saved, name)}: leave it out, or start a new run"
                    )
        try:
            check_limits(args, LIMITS)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if args.evaluate:
            device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
            evaluate_run(load_policy(args.evaluate, device).actor, args, Path(args.evaluate), device)
        else:
            main(args)
    except (UsageError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
