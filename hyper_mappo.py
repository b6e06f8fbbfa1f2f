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

import csv
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

# Before torch is imported: threads that spin while they wait for each other make small operations many times slower
# as soon as other programs use the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gymnasium as gym
import imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from scipy.stats import t as student_t
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import EnvStep, VecEnv, check_env, default_env_procs, make_vec_env

CHECKPOINT_FORMAT = "hyper_mappo/1"
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
    num_threads: int | None = 1
    """CPU threads of one PyTorch operation; None: PyTorch's choice. The operations are small: more seldom pays"""
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

    total_timesteps: int = 1_000_000
    """env steps to train for, summed over envs (one step of one env moves all its agents)"""
    learning_rate: float = 5e-4
    """Adam's learning rate of actor and critic"""
    num_envs: int | None = None
    """environments stepped side by side; None: 128 batched, 8 genuine"""
    num_steps: int = 32
    """env steps of each env per rollout"""
    anneal_lr: bool = True
    """lower the learning rates linearly to 0"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int | None = None
    """minibatches per epoch; with a hypernetwork each holds whole env sequences; None: 8 batched, 4 genuine"""
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
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient, actor and critic apart"""
    target_kl: float | None = None
    """skip the update's remaining epochs once approx_kl passes this; None: never"""
    hidden_size: int = 128
    """width of the two hidden layers of actor and critic"""
    agent_id: bool = False
    """append a one-hot agent id to what the actor sees"""

    hyper: Literal["none", "delta"] = "delta"
    """none: plain MAPPO; delta: every actor weight gets a context-made delta"""
    history: Literal["none", "gru", "lstm"] = "gru"
    """what carries the context over time"""
    context_size: int = 32
    """width of the context"""
    context_heads: int = 2
    """attention heads over agents"""
    hyper_basis: int = 16
    """the delta is a context-weighted sum of this many learned deltas; context_size: the plain linear head"""
    hyper_rank: int = 1
    """rank of each learned delta of a layer; 0: full"""
    smooth_coef: float = 0.1
    """weight of the mean squared change of theta between consecutive steps of one episode"""
    align_coef: float = 0.05
    """weight of KL(old policy || new policy)"""
    hyper_learning_rate: float = 5e-4
    """Adam's learning rate of the hypernetwork"""

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


# What a run's weights and episodes in flight depend on: --resume refuses to change these.
FIXED_BY_CHECKPOINT = (
    "env_id env_kwargs backend seed num_envs num_steps hidden_size agent_id value_norm hyper history context_size "
    "context_heads hyper_basis hyper_rank"
).split()
HYPER_ONLY = (
    "history context_size context_heads hyper_basis hyper_rank smooth_coef align_coef hyper_learning_rate".split()
)
# The numbers of ppo_loss, logged as means over all minibatches of an update.
LOSSES = (
    "losses/policy_loss losses/value_loss losses/entropy losses/old_approx_kl losses/approx_kl losses/clipfrac "
    "losses/smooth_loss losses/align_kl hyper/delta_norm hyper/step_change"
).split()
HYPER_TAGS = LOSSES[-4:]
COLUMNS = (
    "update global_step charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate "
    f"{' '.join(LOSSES)} losses/grad_norm losses/explained_variance"
).split()


# ------------------------------------------------------------------------------------------- networks


def layer_init(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


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


class HyperNetwork(nn.Module):
    """context_t from everyone's observations and history, and the actor's weight deltas made from it.

    delta_theta(c) = sum_k alpha_k(c) B_k with learned B_k, which start at zero: training starts at exactly the base
    actor (Bias-HyperInit, Beck et al. 2022). alpha is a linear function of the context; with hyper_basis =
    context_size it is the context itself. No weight tensor per sample is ever built:
      full B_k (hyper_rank 0):    x delta_W = sum_k alpha_k (x B_k)
      B_k = U_k V_k of rank r:    x delta_W = (alpha * (x V)) U, a fraction of the layer's own multiplications.
    """

    def __init__(self, num_features: int, layer_sizes: list[tuple[int, int]], args: Args):
        super().__init__()
        C, K, r = args.context_size, args.hyper_basis, args.hyper_rank
        self.context_size, self.heads, self.history = C, args.context_heads, args.history
        self.encoder = layer_init(nn.Linear(num_features, C))
        self.qkv = layer_init(nn.Linear(C, 3 * C), 1.0)
        self.attention_out = layer_init(nn.Linear(C, C), 1.0)
        if self.history != "none":
            self.rnn = nn.GRUCell(C, C) if self.history == "gru" else nn.LSTMCell(C, C)
            for name, param in self.rnn.named_parameters():
                nn.init.zeros_(param) if "bias" in name else nn.init.orthogonal_(param)
        self.alpha = layer_init(nn.Linear(C, K), 1.0) if K != C else nn.Identity()
        self.basis, self.rank = K, r
        self.down, self.up = nn.ModuleList(), nn.ParameterList()
        for size_in, size_out in layer_sizes:  # B_k covers weight and bias of its layer: [out, in + 1]
            self.down.append(layer_init(nn.Linear(size_in, K * r if r else K * size_out), 1.0))  # V, or B itself
            if r:
                self.up.append(nn.Parameter(torch.zeros(size_out, K * r)))  # U
            else:
                nn.init.zeros_(self.down[-1].weight)
        self.num_generated = sum(i * o + o for i, o in layer_sizes)

    @property
    def hidden_size(self) -> int:
        """Numbers that the history carries per agent: 0 without history, both halves of an LSTM's state."""
        return {"none": 0, "gru": 1, "lstm": 2}[self.history] * self.context_size

    def context(
        self, features: torch.Tensor, active: torch.Tensor, starts: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """features [T, N, A, F], active [T, N, A], starts [T, N] (an episode opens here), hidden [N, A, hidden_size]

        -> context [T, N, A, C], hidden after step T. Reads *all* agents' observations: centralised execution.
        """
        T, N, A = active.shape
        C = self.context_size
        x = self.encoder(features).relu_()  # [T, N, A, C]
        q, k, v = self.qkv(x).reshape(T * N, A, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        # Agents that left are nobody's key; an agent always sees itself, so that no row is empty.
        keys = active.reshape(T * N, 1, 1, A) | torch.eye(A, dtype=torch.bool, device=active.device)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)  # [T*N, heads, A, C / heads]
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(T, N, A, C))
        if self.history == "none":
            return x, hidden
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
        C = self.context_size
        if self.history == "gru":
            recurrent = F.linear(hidden, self.rnn.weight_hh, self.rnn.bias_hh)
            (gates, new), (recurrent_gates, recurrent_new) = (x.split([2 * C, C], dim=-1) for x in (inputs, recurrent))
            reset, update = (gates + recurrent_gates).sigmoid().chunk(2, dim=-1)
            return torch.lerp(torch.addcmul(new, reset, recurrent_new).tanh(), hidden, update)
        h, cell = hidden.chunk(2, dim=-1)
        i, f, g, o = (inputs + F.linear(h, self.rnn.weight_hh, self.rnn.bias_hh)).chunk(4, dim=-1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        return torch.cat([o.sigmoid() * cell.tanh(), cell], dim=-1)

    def add_delta(self, layer: int, y: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """y + x delta_W + delta_b of one actor layer: y [..., out], x [..., in], alpha [..., K] -> [..., out]"""
        z = self.down[layer](x).unflatten(-1, (self.basis, -1)) * alpha.unsqueeze(-1)  # [..., K, r or out]
        if not self.rank:
            return y + z.sum(-2)
        return torch.addmm(y.flatten(0, -2), z.reshape(-1, self.basis * self.rank), self.up[layer].T).view_as(y)

    def gram(self) -> torch.Tensor:
        """<B_k, B_l> over all weights and biases: [K, K]. ||sum_k alpha_k B_k||^2 = alpha^T gram alpha, exactly."""
        total = 0.0
        for i, down in enumerate(self.down):
            rows = torch.cat([down.weight, down.bias.unsqueeze(-1)], dim=-1)  # [K*r or K*out, in + 1]
            if self.rank:  # <U_k V_k, U_l V_l> = sum over the ranks i, j of (u_ki . u_lj) (v_ki . v_lj)
                pairs = (self.up[i].T @ self.up[i]) * (rows @ rows.T)  # [K*r, K*r]
                total = total + pairs.unflatten(0, (-1, self.rank)).unflatten(-1, (-1, self.rank)).sum((1, 3))
            else:
                rows = rows.view(self.basis, -1)
                total = total + rows @ rows.T
        return total


class Actor(nn.Module):
    """Shared by all agents. Its output `dist` [..., n] holds log-probabilities (Discrete), or [..., 2 D] mean and
    log standard deviation of a diagonal Gaussian (Box)."""

    def __init__(self, spec: dict, args: Args):
        super().__init__()
        self.discrete = spec["discrete"]
        self.trunk = Trunk(spec["obs_shape"], spec["obs_scale"])
        self.num_ids = spec["num_agents"] if args.agent_id else 0
        sizes = [self.trunk.num_features + self.num_ids, args.hidden_size, args.hidden_size, spec["num_actions"]]
        layer_sizes = list(itertools.pairwise(sizes))
        self.layers = nn.ModuleList(layer_init(nn.Linear(*size)) for size in layer_sizes)
        layer_init(self.layers[-1], 0.01)
        if not self.discrete:
            self.logstd = nn.Parameter(torch.zeros(spec["num_actions"]))
        self.hyper = HyperNetwork(self.trunk.num_features, layer_sizes, args) if args.hyper != "none" else None
        self.hidden_size = self.hyper.hidden_size if self.hyper else 0

    def forward(
        self,
        obs: torch.Tensor,
        action_mask: torch.Tensor | None,
        active: torch.Tensor,
        starts: torch.Tensor,
        hidden: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The one forward of acting (T = 1), updating and evaluating.

        obs [T, N, A, *O], action_mask [T, N, A, n] or None, active [T, N, A], starts [T, N],
        hidden [N, A, hidden_size] before step 0 -> dist [T, N, A, n], alpha [T, N, A, K] or None, hidden after T.
        """
        x = self.trunk(obs)  # [T, N, A, F]
        alpha = None
        if self.hyper:
            context, hidden = self.hyper.context(x, active, starts, hidden)
            alpha = self.hyper.alpha(context)
        if self.num_ids:
            ids = torch.eye(self.num_ids, device=x.device).expand(*x.shape[:-1], self.num_ids)
            x = torch.cat([x, ids], dim=-1)
        for i, layer in enumerate(self.layers):
            y = layer(x)
            if alpha is not None:
                y = self.hyper.add_delta(i, y, x, alpha)
            x = y.relu_() if i + 1 < len(self.layers) else y
        if not self.discrete:
            return torch.cat([x, self.logstd.expand_as(x)], dim=-1), alpha, hidden
        if action_mask is not None:
            x = x.masked_fill(~action_mask, -1e9)  # finite: 0 * log 0 must be 0 in entropy and KL
        return x.log_softmax(dim=-1), alpha, hidden


class Critic(nn.Module):
    """Centralised: the global state -> one value for each agent, in normalised units: [..., *S] -> [..., A]."""

    def __init__(self, spec: dict, args: Args):
        super().__init__()
        self.trunk = Trunk(spec["state_shape"], spec["state_scale"])
        H = args.hidden_size
        self.layers = nn.Sequential(
            layer_init(nn.Linear(self.trunk.num_features, H)),
            nn.ReLU(inplace=True),
            layer_init(nn.Linear(H, H)),
            nn.ReLU(inplace=True),
            layer_init(nn.Linear(H, spec["num_agents"]), 1.0),
        )

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.layers(self.trunk(state))


class ValueNorm(nn.Module):
    """Running mean and deviation of the returns (Yu et al. 2022, "value normalization"), debiased like Adam's."""

    def __init__(self, enabled: bool, decay: float = 0.99):
        super().__init__()
        self.enabled, self.decay = enabled, decay
        self.register_buffer("moments", torch.zeros(3))  # decayed sums of x, x^2, 1

    @torch.no_grad()
    def update(self, returns: torch.Tensor, weights: torch.Tensor) -> None:
        """returns, weights (1 where active, else 0): [...]"""
        total = weights.sum().clamp(min=1.0)
        batch = torch.stack([(returns * weights).sum() / total, (returns**2 * weights).sum() / total, total / total])
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


def masked_var(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return masked_mean((x - masked_mean(x, weights)) ** 2, weights)


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
    alpha: torch.Tensor, gram: torch.Tensor, active: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much theta changes between consecutive steps of one episode: mean ||change||^2, mean ||change|| (no grad).

    alpha [T, N, A, K], gram [K, K], active [T, N, A], starts [T, N] -> two scalars. A step that opens an episode has
    no predecessor, an agent that left has no successor.
    """
    pairs = (active[1:] & active[:-1] & ~starts[1:].unsqueeze(-1)).float()  # [T-1, N, A]
    change = quadratic_form(alpha[1:] - alpha[:-1], gram)
    return masked_mean(change, pairs), masked_mean(change.detach().sqrt(), pairs)


def quadratic_form(alpha: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """alpha^T gram alpha, never below 0 by rounding: [..., K] -> [...]"""
    return ((alpha @ gram) * alpha).sum(-1).clamp(min=0)


def ppo_loss(
    actor: Actor, critic: Critic, mb: dict[str, torch.Tensor], args: Args
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped loss with the hypernetwork's two penalties: -> scalar loss, the numbers named in LOSSES (no grad).

    mb holds sequences [L, S, ...]: obs state action_mask active starts actions dists logprobs advantages
    returns values (the last two normalised), and hidden [1, S, A, hidden] from before their first step.
    """
    weights = mb["active"].float()  # every mean is over active agents only
    dist, alpha, _ = actor(mb["obs"], mb.get("action_mask"), mb["active"], mb["starts"], mb["hidden"][0])

    newlogprob = log_prob(dist, mb["actions"], actor.discrete)
    logratio = (newlogprob - mb["logprobs"]) * weights
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = masked_mean(torch.max(-mb["advantages"] * ratio, -mb["advantages"] * clipped), weights)
    entropy_bonus = masked_mean(entropy(dist, actor.discrete), weights)

    newvalue = critic(mb["state"])  # [L, S, A]
    value_error = regression_loss(newvalue - mb["returns"], args.huber_delta)
    if args.clip_vloss:
        v_clipped = mb["values"] + (newvalue - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
        value_error = torch.max(value_error, regression_loss(v_clipped - mb["returns"], args.huber_delta))
    v_loss = masked_mean(value_error, weights)

    loss = pg_loss - args.ent_coef * entropy_bonus + args.vf_coef * v_loss
    smooth_loss = align_kl = delta_norm = step_change = torch.zeros_like(loss)
    if actor.hyper:
        gram = actor.hyper.gram()
        change, step_change = smoothness(alpha, gram, mb["active"], mb["starts"])
        smooth_loss = change / actor.hyper.num_generated
        align_kl = masked_mean(kl_divergence(mb["dists"], dist, actor.discrete), weights)
        loss = loss + args.smooth_coef * smooth_loss + args.align_coef * align_kl
        delta_norm = masked_mean(quadratic_form(alpha.detach(), gram.detach()).sqrt(), weights)

    # The two estimates of KL(old || new): http://joschu.net/blog/kl-approx.html
    old_approx_kl, approx_kl = masked_mean(-logratio, weights), masked_mean((ratio - 1) - logratio, weights)
    clipfrac = masked_mean(((ratio - 1).abs() > args.clip_coef).float(), weights)
    numbers = (pg_loss, v_loss, entropy_bonus, old_approx_kl, approx_kl, clipfrac)
    return loss, torch.stack([*numbers, smooth_loss, align_kl, delta_norm, step_change]).detach()


# ------------------------------------------------------------------------------- evaluation, checkpoints


@torch.no_grad()
def act(
    actor: Actor, step: EnvStep, starts: torch.Tensor, hidden: torch.Tensor, deterministic: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One env step's actions [N, A] or [N, A, D], dist [N, A, n] and the hidden state to carry on."""
    action_mask = None if step.action_mask is None else step.action_mask.unsqueeze(0)
    dist, _, hidden = actor(step.obs.unsqueeze(0), action_mask, step.active.unsqueeze(0), starts.unsqueeze(0), hidden)
    return sample_actions(dist[0], actor.discrete, deterministic), dist[0], hidden


def evaluate(
    actor: Actor, env: VecEnv, num_episodes: int, seed: int, deterministic: bool = False, frames: list | None = None
) -> dict[str, torch.Tensor]:
    """Plays episodes with the forward of training: {"returns": [num_episodes, A], "lengths": [num_episodes]}.

    Every env plays a fixed share of the episodes, so that short ones are not over-represented.
    `frames` collects the pictures of env 0.
    """
    torch.manual_seed(seed)
    N = env.num_envs
    shares = [num_episodes // N + (i < num_episodes % N) for i in range(N)]
    returns, lengths = [], []
    step = env.reset(seed)
    starts = torch.ones(N, dtype=torch.bool, device=env.device)
    hidden = torch.zeros(N, env.num_agents, actor.hidden_size, device=env.device)
    with tqdm(total=num_episodes, desc="evaluation", unit="episode", disable=None) as bar:
        while len(returns) < num_episodes:
            if frames is not None:
                frames.append(env.render())
            actions, _, hidden = act(actor, step, starts, hidden, deterministic)
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
        played = evaluate(actor, env, args.eval_episodes, seed, args.eval_deterministic)
        env.close()
        team = played["returns"].mean(dim=1)  # [episodes, A] -> [episodes]
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
        evaluate(actor, env, 1, seed, args.eval_deterministic, frames)
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
    """A run folder's policy for other programs: hidden = initial_state(N), then actions, hidden = act(step, hidden)."""

    def __init__(self, run_dir: str | Path, device: str | torch.device = "cpu"):
        checkpoint = load_checkpoint(run_dir, device)
        self.args, self.spec, self.device = Args(**checkpoint["args"]), checkpoint["spec"], torch.device(device)
        self.actor = Actor(self.spec, self.args).to(device).requires_grad_(False)
        self.actor.load_state_dict(checkpoint["actor"])

    def initial_state(self, num_envs: int) -> torch.Tensor:
        return torch.zeros(num_envs, self.spec["num_agents"], self.actor.hidden_size, device=self.device)

    def act(self, step: EnvStep, hidden: torch.Tensor, deterministic: bool = False) -> tuple[torch.Tensor, ...]:
        """-> actions [N, A] or [N, A, D], hidden. Where the last `step` ended an episode, hidden starts afresh."""
        actions, _, hidden = act(self.actor, step, step.episode_over, hidden, deterministic)
        return actions, hidden


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


def check_args(args: Args) -> tuple[str, int, int]:
    """Everything that can be wrong before an env is made: UsageError in one line.

    -> backend, num_envs, num_minibatches
    """

    def flag(name: str) -> str:
        return "--" + name.replace("_", "-")

    for name in (
        "num_envs",
        "num_steps",
        "num_minibatches",
        "update_epochs",
        "hidden_size",
        "save_every",
        "hyper_basis",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag(name)} must be at least 1, got {value}")
    if args.hyper == "none":
        given = [flag(name) for name in HYPER_ONLY if getattr(args, name) != getattr(Args, name)]
        if given:
            raise UsageError(
                f"{', '.join(given)} would do nothing with --hyper none: leave out, or choose --hyper delta"
            )
    if args.context_size % args.context_heads:
        raise UsageError(f"--context-size {args.context_size} is no multiple of --context-heads {args.context_heads}")
    try:
        env_kwargs = json.loads(args.env_kwargs)
        backend = check_env(args.env_id, args.backend, env_kwargs)
    except json.JSONDecodeError:
        raise UsageError(f"--env-kwargs must be JSON like '{{\"max_cycles\": 100}}', got {args.env_kwargs!r}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    num_envs = args.num_envs or (128 if backend == "batched" else 8)
    batch = num_envs * args.num_steps
    if args.total_timesteps < batch:
        raise UsageError(
            f"--total-timesteps {args.total_timesteps} gives no update: one rollout takes {batch} env steps "
            f"({num_envs} envs x {args.num_steps} steps); raise it, or lower --num-envs or --num-steps"
        )
    sequences = batch if args.hyper == "none" else num_envs  # a hypernetwork's minibatches keep whole env sequences
    num_minibatches = args.num_minibatches or (8 if backend == "batched" else 4)
    if sequences % num_minibatches:
        what = "env steps of a rollout" if args.hyper == "none" else "envs"
        raise UsageError(f"--num-minibatches {num_minibatches} does not divide the {sequences} {what}")
    return backend, num_envs, num_minibatches


def record(rollout: dict[str, torch.Tensor], t: int, num_steps: int, **tensors: torch.Tensor | None) -> None:
    """rollout[name][t] = tensor, allocating [num_steps, *tensor.shape] the first time; None is left out."""
    for name, x in tensors.items():
        if x is not None:
            if name not in rollout:
                rollout[name] = torch.empty(num_steps, *x.shape, dtype=x.dtype, device=x.device)
            rollout[name][t] = x


def open_metrics(path: Path, keep_until: int) -> IO[str]:
    """metrics.csv, a row per update, opened to append; rows past global_step `keep_until` are dropped (resume)."""
    kept = []
    if path.exists():
        with open(path, newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["global_step"]) <= keep_until]
    file = open(path, "w", newline="", buffering=1)
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    writer.writerows(kept)
    return file


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
    """Trains (or resumes, or only evaluates); returns the run folder. UsageError: unusable arguments."""
    # ---- arguments
    backend, num_envs, num_minibatches = check_args(args)
    T, N = args.num_steps, num_envs
    batch_size = T * N
    num_updates = args.total_timesteps // batch_size
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    if checkpoint and checkpoint["update"] >= num_updates:
        done = f"{checkpoint['update']} of {num_updates} updates"
        raise UsageError(f"{args.resume} has already done {done}: raise --total-timesteps")

    # ---- logging
    run_dir = Path(args.resume) if args.resume else new_run_dir(args)
    (run_dir / "args.json").write_text(json.dumps({**asdict(args), "resolved_backend": backend}, indent=2))
    if args.track:
        start_wandb(args, run_dir)
    writer = SummaryWriter(str(run_dir), purge_step=checkpoint["global_step"] + 1 if checkpoint else None)
    writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items()))

    # ---- seeding
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    last_good = f"last good checkpoint: {run_dir / 'latest.pt'}"

    # ---- envs
    envs = make_vec_env(
        args.env_id, N, device, args.seed, backend, env_procs(args, backend), **json.loads(args.env_kwargs)
    )
    spec = env_spec(envs)

    # ---- networks
    actor, critic = Actor(spec, args).to(device), Critic(spec, args).to(device)
    value_norm = ValueNorm(args.value_norm).to(device)
    hyper_params = list(actor.hyper.parameters()) if actor.hyper else []
    base_params = [p for name, p in actor.named_parameters() if not name.startswith("hyper.")]
    groups = [{"params": base_params + list(critic.parameters()), "initial_lr": args.learning_rate}]
    if actor.hyper:
        groups.append({"params": hyper_params, "initial_lr": args.hyper_learning_rate})
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, eps=1e-5)
    counts = [sum(p.numel() for p in params) for params in (base_params, hyper_params, critic.parameters())]
    no_gpu = " (no CUDA device found)" if args.cuda and device.type == "cpu" else ""
    print(f"run      {run_dir}")
    print(f"env      {envs.env_id}, {backend} backend, {N} envs x {envs.num_agents} agents, on {device}{no_gpu}")
    print("weights  actor {:,}, hypernetwork {:,}, critic {:,}".format(*counts))

    # ---- storage
    rollout: dict[str, torch.Tensor] = {}  # name -> [T, N, ...], allocated by the first step
    global_step, first_update = 0, 1
    hidden = torch.zeros(N, envs.num_agents, actor.hidden_size, device=device)
    starts = torch.ones(N, dtype=torch.bool, device=device)  # step.obs opens an episode
    whole = torch.zeros(N, dtype=torch.bool, device=device)  # the episode has its full time limit

    # ---- resume
    if checkpoint is None:
        step = envs.reset(args.seed)
        envs.spread_time_limits()  # so that a rollout holds all phases of an episode
    else:
        if checkpoint["spec"] != spec:
            raise UsageError(f"{args.resume} is of env {checkpoint['spec']}, here it is {spec}: install its version")
        actor.load_state_dict(checkpoint["actor"])
        critic.load_state_dict(checkpoint["critic"])
        value_norm.load_state_dict(checkpoint["value_norm"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        global_step, first_update = checkpoint["global_step"], checkpoint["update"] + 1
        if checkpoint["env_state"] is None:
            print("this env cannot restore episodes in flight: new ones start, from a seed of their own")
            step = envs.reset(args.seed + global_step)
            envs.spread_time_limits()
        else:
            step = envs.load_state_dict(checkpoint["env_state"])
            hidden, starts, whole = (checkpoint[name].to(device) for name in ("hidden", "starts", "whole"))
        torch.set_rng_state(checkpoint["torch_rng"].cpu())
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"].cpu())
    metrics_file = open_metrics(run_dir / "metrics.csv", keep_until=global_step)
    stop = StopSignal()
    progress = tqdm(total=num_updates * batch_size, initial=global_step, unit="step", unit_scale=True, disable=None)
    clock: deque[tuple[float, int]] = deque(maxlen=11)  # (time, global_step) after the last updates: windowed SPS

    # ---- loop
    for update in range(first_update, num_updates + 1):
        remaining = 1 - (update - 1) / num_updates if args.anneal_lr else 1.0
        for group in optimizer.param_groups:
            group["lr"] = remaining * group["initial_lr"]

        # -- rollout: T steps of N envs
        first_hidden = hidden  # [N, A, hidden]
        episodes = torch.zeros(3, device=device)  # how many ended, sum of their team returns, sum of their lengths
        for t in range(T):
            with torch.no_grad():
                actions, dist, next_hidden = act(actor, step, starts, hidden)
                values = value_norm.denormalize(critic(step.state))
            record(rollout, t, T, obs=step.obs, state=step.state, action_mask=step.action_mask, active=step.active)
            record(rollout, t, T, starts=starts, actions=actions, dists=dist, values=values)
            step = envs.step(actions)
            hidden, starts = next_hidden, step.episode_over
            # An episode cut by the time limit still has a value: that of its true last state, not of the next
            # episode's first. (Asking whether there is one is free on a CPU and would stall an accelerator.)
            cut_values = torch.zeros_like(values)
            if device.type != "cpu" or step.truncations.any():
                with torch.no_grad():
                    cut_values = value_norm.denormalize(critic(step.final_state))
            ended = step.terminations | ~step.active | step.episode_over.unsqueeze(-1)  # [N, A]
            record(rollout, t, T, rewards=step.rewards, terminations=step.terminations, ended=ended)
            record(rollout, t, T, episode_over=step.episode_over, cut_values=cut_values)
            over = (step.episode_over & whole).float()  # first episodes may be cut short: not reported
            whole = whole | step.episode_over
            sums = [over, over * step.episode_returns.mean(dim=1), over * step.episode_lengths]
            episodes += torch.stack(sums).sum(dim=1)
        global_step += batch_size
        if rollout["obs"].is_floating_point() and not rollout["obs"].isfinite().all():
            raise FloatingPointError(f"update {update}: an observation is NaN or infinite; {last_good}")

        # -- advantages
        with torch.no_grad():
            weights = rollout["active"].float()
            last_values = value_norm.denormalize(critic(step.state))
            next_values = torch.cat([rollout["values"][1:], last_values.unsqueeze(0)])  # [T, N, A]
            next_values = torch.where(rollout["episode_over"].unsqueeze(-1), rollout["cut_values"], next_values)
            advantages, returns = compute_gae(
                *(rollout["rewards"], rollout["values"], next_values, rollout["terminations"], rollout["ended"]),
                args.gamma,
                args.gae_lambda,
            )
            explained_var = 1 - masked_var(returns - rollout["values"], weights) / masked_var(returns, weights).clamp(
                min=1e-8
            )
            if args.norm_adv:
                advantages = advantages - masked_mean(advantages, weights)
                advantages = advantages / (masked_var(advantages, weights).sqrt() + 1e-8)
            value_norm.update(returns, weights)

        # -- update: minibatches of sequences [L, S]; without a hypernetwork a sequence is a single step
        batch = {name: rollout[name] for name in ("obs", "state", "active", "starts", "actions", "dists")}
        if "action_mask" in rollout:
            batch["action_mask"] = rollout["action_mask"]
        batch["logprobs"] = log_prob(rollout["dists"], rollout["actions"], actor.discrete)
        batch["advantages"], batch["returns"] = advantages, value_norm.normalize(returns)
        batch["values"] = value_norm.normalize(rollout["values"])
        L = T if actor.hyper else 1
        S = batch_size // L
        batch = {name: x.reshape(L, S, *x.shape[2:]) for name, x in batch.items()}  # [T, N, ...] -> [L, S, ...]
        batch["hidden"] = (first_hidden if actor.hyper else hidden.new_zeros(S, envs.num_agents, 0)).unsqueeze(0)
        sums, num_done = torch.zeros(len(LOSSES) + 1, device=device), 0
        for _ in range(args.update_epochs):
            for mb_inds in torch.randperm(S, device=device).chunk(num_minibatches):
                mb = {name: x[:, mb_inds] for name, x in batch.items()}
                loss, numbers = ppo_loss(actor, critic, mb, args)
                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
                nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
                optimizer.step()
                sums += torch.cat([numbers, grad_norm.unsqueeze(0)])
                num_done += 1
            if args.target_kl is not None and numbers[LOSSES.index("losses/approx_kl")] > args.target_kl:
                break

        # -- logging: the update's only look at the device
        names = [*LOSSES, "losses/grad_norm", "losses/explained_variance"]
        metrics = dict(zip(names, [*(sums / num_done).tolist(), explained_var.item()], strict=True))
        bad = [f"{name} is {x}" for name, x in metrics.items() if not math.isfinite(x)]
        if bad:
            raise FloatingPointError(f"update {update}: {', '.join(bad)}; {last_good}")
        metrics = {name: x for name, x in metrics.items() if actor.hyper or name not in HYPER_TAGS}
        clock.append((time.perf_counter(), global_step))
        if len(clock) > 1:
            metrics["charts/SPS"] = (clock[-1][1] - clock[0][1]) / (clock[-1][0] - clock[0][0])
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        num_ended, return_sum, length_sum = episodes.tolist()
        if num_ended:
            metrics["charts/episodic_return"] = return_sum / num_ended
            metrics["charts/episodic_length"] = length_sum / num_ended
            progress.set_postfix_str(f"return {return_sum / num_ended:.2f}")
        for tag, x in metrics.items():
            writer.add_scalar(tag, x, global_step)
        csv.DictWriter(metrics_file, COLUMNS).writerow({"update": update, "global_step": global_step, **metrics})
        progress.update(batch_size)

        # -- checkpoint
        if update % args.save_every == 0 or update == num_updates or stop.requested:
            checkpoint = {"format": CHECKPOINT_FORMAT, "args": asdict(args), "spec": spec}
            checkpoint |= {"update": update, "global_step": global_step}
            checkpoint |= {"actor": actor.state_dict(), "critic": critic.state_dict()}
            checkpoint |= {"value_norm": value_norm.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint |= {"env_state": envs.state_dict(), "hidden": hidden, "starts": starts, "whole": whole}
            checkpoint |= {"torch_rng": torch.get_rng_state()}
            checkpoint |= {"cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None}
            save_checkpoint(checkpoint, run_dir / "latest.pt")
        if stop.requested:
            break

    # ---- close
    stop.restore()
    progress.close()
    metrics_file.close()
    envs.close()
    plot_learning_curve(run_dir)
    if stop.requested:
        print(f"stopped after update {update} of {num_updates}; go on with: python hyper_mappo.py --resume {run_dir}")
    else:
        evaluate_run(actor, args, run_dir, device)
    writer.close()
    return run_dir


def cli(argv: list[str] | None = None) -> int:
    """The command line: 0 done (or stopped and saved), 1 the run broke down, 2 unusable arguments."""
    argv = sys.argv[1:] if argv is None else argv
    args = tyro.cli(Args, args=argv)
    try:
        run_dir = args.resume or args.evaluate
        if run_dir:  # the run's own arguments are the defaults, flags given beside them come on top
            try:
                saved = Args(**load_checkpoint(run_dir)["args"])
            except ValueError as error:
                raise UsageError(str(error)) from None
            args = tyro.cli(Args, args=argv, default=saved)
            for name in FIXED_BY_CHECKPOINT:
                if getattr(args, name) != getattr(saved, name):
                    raise UsageError(
                        f"--{name.replace('_', '-')} {getattr(args, name)} contradicts the checkpoint's "
                        f"{getattr(saved, name)}: leave it out, or start a new run"
                    )
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
