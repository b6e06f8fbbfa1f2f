"""Hyper-MAPPO: MAPPO whose actor weights are made by a hypernetwork, on PettingZoo environments.

    theta_t = theta_base + delta_theta(context_t)

context_t comes from all agents' observations (attention) and their history (GRU), so the policy can
change as fast as the other agents do; a penalty keeps theta from jumping between steps of an episode.
`--hyper none` is plain MAPPO: same file, same loop.

Papers: MAPPO, Yu et al. 2022 (arXiv 2103.01955); PPO, Schulman et al. 2017 (arXiv 1707.06347);
hypernetwork initialisation, Beck et al. 2022 (arXiv 2210.11348).
How-to, metrics, deviations and results: docs/hyper_mappo.md

    python hyper_mappo.py --env-id pursuit --agent-id --track
    python hyper_mappo.py --env-id stag_hunt --hyper none
"""

from __future__ import annotations

import startup  # noqa: F401

# isort: split

import copy
import functools
import importlib
import itertools
import math
import os
import random
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Tensor, distributed
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from envs import (
    ENV_TIMEOUT,
    EPISODE_LIMIT,
    CheckedEnv,
    EnvStep,
    VecEnv,
    check_env,
    check_picture,
    default_env_procs,
    individual_kwargs,
    make_eval_env,
    make_vec_env,
    num_cpus,
    stag_hunt,
)
from envs.players import FixedPolicy, Partners, parse_partners, scripted_player
from pretrain_vae import load_vae
from runs import (
    Metrics,
    Panel,
    RunError,
    StopSignal,
    UsageError,
    command,
    command_line,
    compile_works,
    count_multiply_adds,
    flag,
    get_device,
    keep_folder,
    keep_freed_memory,
    load_checkpoint,
    load_weights,
    new_run_dir,
    parse_env_kwargs,
    plot_learning_curve,
    read_metrics,
    restore_args,
    run_keeping,
    save_checkpoint,
    start_wandb,
    whole_file,
    write_json,
)

CHECKPOINT_FORMAT = "hyper_mappo/3"
PROBE_ENVS = 16  # envs whose first rollout shows how the policy changes from update to update
# What --team-spirit None stands for, by env id; elsewhere 0.
TEAM_SPIRIT = {
    stag_hunt.ENV_ID: 0.97,  # who hunts a hare leaves the others the stag
    r"mpe2\.simple_spread_v\d+": 1.0,  # all are paid for each landmark that anyone covers
}
GRADIENT_COSINE_EVERY = 10  # updates
EVAL_SEED = 1_000_000  # keeps the seeds of evaluation apart from those of training
EVAL_ENVS = {"pettingzoo": 8, "batched": 128}  # at most, whatever the machine: returns depend on it
Batch = dict[str, Tensor]


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
    env_timeout: float = ENV_TIMEOUT
    """seconds that a worker process has for a step or reset of its envs; 0: as long as it takes"""
    episode_limit: int = EPISODE_LIMIT
    """env steps after which an episode of a genuine env is truncated; 0: never"""

    total_timesteps: int = 4_000_000
    """env steps to train for, summed over envs (one step of one env moves all its agents)"""
    learning_rate: float = 5e-4
    """Adam's learning rate of actor and critic"""
    num_envs: int | None = None
    """environments stepped side by side; None: 128 batched, 8 genuine"""
    num_steps: int = 64
    """env steps of each env per rollout"""
    anneal_lr: bool = False
    """lower the learning rates linearly to 0"""
    team_spirit: float | None = None
    """t of 0 ... 1: what is trained on is (1 - t) x the own reward + t x the mean over learners; above 0 who left
    early still gets its share of what others are paid later. Below 1 the env pays every agent for itself, where it
    can. None: 0.97 on the stag hunts, 1 on mpe2.simple_spread, else 0"""
    gamma: float = 0.99
    """discount"""
    bootstrap_time_limit: bool = True
    """an episode that the time limit cuts would go on: the value of its last state counts. Without: the limit is a rule
    like any other, nothing comes after it (where it is part of the game, or where the critic, which has no memory,
    cannot know what the actor remembers)"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int | None = None
    """minibatches per epoch; None: 64 batched, 4 genuine, or what divides the rollout"""
    chunk_length: int = 1
    """with a context, training sequences are this many consecutive steps (truncated backpropagation through time); must
    divide num_steps. Longer ones learn longer memories, but their samples are alike: see the docs"""
    update_epochs: int | None = None
    """passes over each rollout; None: 1 batched, 4 genuine (where env steps are dear)"""
    norm_adv: bool = True
    """normalise advantages over the rollout's active samples"""
    norm_obs: bool = False
    """normalise observations and state by the running mean and deviation of each of their numbers"""
    clip_coef: float = 0.2
    """PPO's clipping of the policy ratio"""
    clip_vloss: bool = False
    """clip the value's change by clip_coef too (in normalised units)"""
    huber_delta: float | None = 10.0
    """the value loss turns linear past this error (in normalised units); None: squared error"""
    value_norm: bool = True
    """the critic predicts returns normalised by their running mean and deviation"""
    ent_coef: float = 0.02
    """weight of the entropy bonus, at the start of training"""
    final_ent_coef: float | None = 0.002
    """what it falls to, linearly over --total-timesteps; None, or more than --ent-coef: it stays as it is"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient, actor and critic apart; inf: any"""
    target_kl: float | None = None
    """skip the update's remaining epochs once approx_kl passes this; None: never"""
    hidden_size: int = 128
    """width of the actor's two hidden layers"""
    critic_hidden_size: int | None = None
    """width of the critic's two hidden layers; None: hidden_size"""
    agent_id: bool = False
    """append a one-hot agent id to what the actor sees, and the critic with --critic-obs: agents that see the same can
    then act differently without chance"""
    share_parameters: bool = True
    """one actor for all agents; without: every agent has its own (with --hyper none). The critic stays shared"""
    critic_obs: bool = True
    """the critic sees the state and the agent's own observation; without: the state alone, one output per agent"""

    hyper: Literal["none", "delta", "full", "last-layer"] = "delta"
    """what the context makes of the actor's weights. none: nothing, plain MAPPO; delta: a sum of learned deltas is
    added to every layer; full: all weights, no base; last-layer: a delta of the last layer, earlier ones are scaled"""
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
    full 4"""
    hyper_rank: int | None = None
    """--hyper delta: rank of each delta in the mixture, 0: full; None: 1"""
    hyper_critic: bool = False
    """extension: the critic's weights are made in the same way, from the state"""
    match_params: Literal["delta", "full", "last-layer"] | None = None
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
    """partners and their number of seats, e.g. nearest_stag:2 runs/RUN_DIR:1; they take the last seats. Drawn anew for
    every episode: pool=nearest_stag,random,runs/RUN_DIR:2 for each seat, same=nearest_stag,random:2 for all of them"""
    partner_switch: int | None = None
    """updates after which pools change whom they favour (non-stationarity with a known clock); None: uniform draws"""
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


# What numbers must be, so that nothing absurd is trained and nothing breaks after hours.
LIMITS = {
    "at least 1": (
        lambda x: x >= 1,
        "num_threads update_threads num_envs num_steps num_minibatches chunk_length update_epochs hidden_size "
        "critic_hidden_size context_size context_heads hyper_basis target_sync_interval save_every total_timesteps "
        "partner_switch",
    ),
    "at least 0": (
        lambda x: x >= 0,
        "hyper_rank num_env_procs env_timeout episode_limit eval_episodes learning_rate hyper_learning_rate ent_coef "
        "final_ent_coef vf_coef smooth_coef align_coef",
    ),
    "more than 0": (lambda x: x > 0, "clip_coef huber_delta max_grad_norm target_kl"),
    "from 0 to 1": (lambda x: 0 <= x <= 1, "gamma gae_lambda team_spirit"),
    "from 0 to 2147483647": (lambda x: 0 <= x < 2**31, "seed"),
}
# What a run's weights depend on: --resume and --init-from refuse to change these.
ARCHITECTURE = (
    "hidden_size critic_hidden_size agent_id share_parameters critic_obs norm_obs value_norm hyper hyper_context "
    "actor_context share_delta history context_size context_heads hyper_basis hyper_rank hyper_critic match_params "
    "subgoals"
).split()
# What its episodes in flight depend on, too.
EPISODES_IN_FLIGHT = "env_id env_kwargs backend team_spirit seed num_envs num_steps partners partner_switch".split()
FIXED_BY_CHECKPOINT = [*EPISODES_IN_FLIGHT, *ARCHITECTURE]
# These do nothing without a context, or without a hypernetwork.
CONTEXT_ONLY = "hyper_context history context_size context_heads chunk_length subgoals hyper_learning_rate".split()
HYPER_ONLY = "share_delta hyper_basis hyper_rank hyper_critic smooth_coef align_coef target_sync_interval".split()
# What a checkpoint holds, beside its format.
SAVED = "args spec update global_step workers probe target actor critic value_norm optimizer".split()
# The columns of metrics.csv; a row leaves out what its run or its update does not have.
COLUMNS = (
    "update global_step charts/episodic_return charts/episodic_length charts/success_rate charts/SPS "
    "charts/learning_rate charts/ent_coef "
    "losses/policy_loss losses/value_loss losses/entropy losses/old_approx_kl losses/approx_kl losses/clipfrac "
    "losses/smooth_loss losses/align_kl hyper/delta_norm hyper/step_change losses/grad_norm "
    "losses/explained_variance nonstationarity/policy_kl nonstationarity/gradient_cosine"
).split()


# ------------------------------------------------------------------------------------------- networks


def layer_init(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def make_layers(sizes: list[int], gains: list[float], copies: int | None = None) -> nn.ModuleList:
    """Linear layers from size to size, each initialised with its gain; copies: how many agents have their own."""
    layers = nn.ModuleList()
    for (size_in, size_out), gain in zip(itertools.pairwise(sizes), gains, strict=True):
        if copies is None:
            layers.append(layer_init(nn.Linear(size_in, size_out), gain))
        else:
            layers.append(AgentLayer(copies, size_in, size_out, gain))
    return layers


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class AgentLayer(nn.Module):
    """A linear layer of its own for every agent, all of them in one batched product."""

    def __init__(self, num_agents: int, size_in: int, size_out: int, gain: float):
        super().__init__()
        weights = torch.empty(num_agents, size_out, size_in)
        for weight in weights:
            nn.init.orthogonal_(weight, gain)
        self.weight = nn.Parameter(weights)
        self.bias = nn.Parameter(torch.zeros(num_agents, 1, size_out))

    def forward(self, x: Tensor) -> Tensor:
        """x [A, B, in] -> [A, B, out]"""
        return torch.baddbmm(self.bias, x, self.weight.transpose(1, 2))


class ObsNorm(nn.Module):
    """Subtracts the mean of each number of an observation and divides by its deviation, over all that was seen.

    Nothing further than CLIP deviations from the mean is told apart; numbers that hardly change are not blown up.
    """

    CLIP = 10.0
    MIN_STD = 0.01

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, x: Tensor, counts: Tensor) -> None:
        """Adds samples x [B, F] where counts [B] is True, of all processes (Chan et al. 1979: merged moments)."""
        weights = counts.float().unsqueeze(-1)
        num = all_sum(weights.sum()).clamp(min=1.0)
        mean = all_sum((weights * x).sum(0)) / num
        var = all_sum((weights * (x - mean) ** 2).sum(0)) / num
        total = self.count + num
        share = num / total
        change = mean - self.mean
        self.mean += share * change
        self.var += share * (var - self.var + (1 - share) * change**2)
        self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., F] -> [..., F]"""
        std = self.var.sqrt().clamp(min=self.MIN_STD)
        return ((x - self.mean) / std).clamp(-self.CLIP, self.CLIP)


class Trunk(nn.Module):
    """Turns observations or states into flat features: [..., *shape] -> [..., num_features] float32.

    Grids of up to 1,024 numbers are flattened, larger pictures [height, width, channels] pass a small CNN
    of stride-2 convolutions. `scale` multiplies the raw numbers (1/255 for bytes of a picture).
    With `copies` A each of the agents in [..., A, *shape] has a CNN of its own.
    """

    def __init__(self, shape: list[int], scale: float, norm: bool, copies: int = 1):
        super().__init__()
        self.shape, self.scale, self.copies = shape, scale, copies
        self.convs = None
        self.num_features = math.prod(shape)
        self.norm = ObsNorm(self.num_features) if norm else None
        if len(shape) == 3 and self.num_features > 1024:
            height, width, channels = shape
            out_channels = 16
            convs = []
            while max(height, width) > 8:
                sizes = copies * channels, copies * out_channels
                conv = nn.Conv2d(*sizes, 3, stride=2, padding=1, groups=copies)
                nn.init.zeros_(conv.bias)
                for weight in conv.weight.data.split(out_channels):
                    nn.init.orthogonal_(weight, math.sqrt(2))
                convs += [conv, nn.ReLU()]
                height = (height + 1) // 2
                width = (width + 1) // 2
                channels, out_channels = out_channels, 32
            self.convs = nn.Sequential(*convs)
            self.num_features = channels * height * width

    def flat(self, x: Tensor) -> Tensor:
        """[..., *shape] -> [..., prod(shape)] float32, scaled"""
        lead = x.shape[: x.dim() - len(self.shape)]
        x = x.float()
        if self.scale != 1.0:
            x = x * self.scale
        return x.reshape(*lead, math.prod(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[: x.dim() - len(self.shape)]
        x = self.flat(x)
        if self.norm:
            x = self.norm(x)
        if self.convs is None:
            return x
        height, width, _ = self.shape
        x = x.reshape(-1, *self.shape).permute(0, 3, 1, 2)  # [B, h, w, c] -> [B, c, h, w]
        if self.copies > 1:
            x = x.reshape(-1, self.copies * x.shape[1], height, width)  # -> [B / A, A * c, h, w]
        return self.convs(x).reshape(*lead, self.num_features)


class Context(nn.Module):
    """context_t of each agent, what a hypernetwork makes weights from: [T, N, A, context_size].

    joint:    an encoding of each agent's observation, attention over agents, then a GRU or LSTM over time
    local:    the same without attention: nothing of the other agents
    agent-id: a learned vector of the seat (HyperMARL, arXiv 2412.04233), no history

    With --agent-id the vector of the seat is added to a joint or local context, too. The vectors start orthogonal: what
    one agent learns through its own then moves nobody else's weights, so that agents can become unlike.
    """

    SEAT_NORM = 3.0  # of a seat's vector at the start: as much of what is learned as there is of a joint context

    def __init__(self, num_features: int, num_agents: int, num_subgoals: int, args: Args):
        super().__init__()
        C = args.context_size
        self.size, self.heads = C, args.context_heads
        self.kind, self.shared = args.hyper_context, args.share_delta
        self.history = args.history
        num_inputs = num_features + num_subgoals
        if self.kind == "agent-id":
            self.history = "none"
            num_inputs = num_subgoals
        self.encoder = layer_init(nn.Linear(num_inputs, C)) if num_inputs else None
        self.seats = None
        if self.kind == "agent-id" or (args.agent_id and not args.share_delta):
            seats = nn.init.orthogonal_(torch.empty(num_agents, C), self.SEAT_NORM)
            self.seats = nn.Parameter(seats)
        if self.kind == "joint":
            self.qkv = layer_init(nn.Linear(C, 3 * C), 1.0)
            self.attention_out = layer_init(nn.Linear(C, C), 1.0)
        if self.history != "none":
            cells = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}
            self.rnn = cells[self.history](C, C)
            for name, param in self.rnn.named_parameters():
                if "bias" in name:
                    nn.init.zeros_(param)
                else:
                    nn.init.orthogonal_(param)

    @property
    def hidden_size(self) -> int:
        """Numbers carried from step to step per agent: the context before; with an LSTM its cell, too."""
        return 2 * self.size if self.history == "lstm" else self.size

    def previous(self, hidden: Tensor, active: Tensor) -> Tensor:
        """The context before: hidden [N, A, hidden_size], active [N, A] -> [N, A, C]; a shared one without who left"""
        return self.finish(hidden[..., : self.size], active)

    def finish(self, x: Tensor, active: Tensor) -> Tensor:
        """What was read off observations becomes the context, shared or of a seat: [..., A, C] -> [..., A, C]"""
        x = self.share(x, active)
        return x if self.seats is None else x + self.seats

    def share(self, x: Tensor, active: Tensor) -> Tensor:
        """With --share-delta every agent gets the mean over the active ones: [..., A, C] -> [..., A, C]"""
        if not self.shared:
            return x
        weights = active.unsqueeze(-1).float()
        total = (x * weights).sum(-2, keepdim=True)
        count = weights.sum(-2, keepdim=True)
        mean = total / count.clamp(min=1.0)
        return mean.expand_as(x)

    def forward(
        self,
        features: Tensor,
        z: Tensor | None,
        active: Tensor,
        starts: Tensor,
        hidden: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """features [T, N, A, F], z [T, N, A, Z] or None: each agent's subgoal, active [T, N, A], starts [T, N] (an
        episode opens here), hidden [N, A, hidden_size] -> context [T, N, A, C], hidden after step T
        """
        T, N, A = active.shape
        seen = features
        if self.kind == "agent-id":
            seen = z
        elif z is not None:
            seen = torch.cat([features, z], dim=-1)
        if seen is None:
            x = torch.zeros(T, N, A, self.size, device=active.device)
        else:
            x = self.encoder(seen).relu_()  # [T, N, A, C]
        if self.kind == "joint":
            x = x + self.attend(x, active)
        if self.history == "none":
            hidden = x[-1]
        else:
            x, hidden = self.run_history(x, starts, hidden)
        return self.finish(x, active), hidden

    def attend(self, x: Tensor, active: Tensor) -> Tensor:
        """Scaled dot-product attention over agents: [T, N, A, C] -> [T, N, A, C]

        By hand, a head at a time and with the softmax along a middle dimension: for rows of a few agents twice as fast
        as PyTorch's own function on a CPU.
        """
        T, N, A, C = x.shape
        size = C // self.heads
        # Agents that left are nobody's key; an agent always sees itself, so that no row is empty.
        itself = torch.eye(A, dtype=torch.bool, device=active.device)
        keys = active.reshape(T * N, A, 1) | itself  # [B, key, query]
        bias = torch.where(keys, 0.0, -torch.inf)
        qkv = self.qkv(x).view(T * N, A, 3 * C)
        parts = qkv.split(size, dim=-1)  # q of every head, then k, then v: [B, A, C / heads]
        mixed = []
        for head in range(self.heads):
            q, k, v = parts[head :: self.heads]
            scores = torch.baddbmm(bias, k, q.transpose(1, 2), alpha=size**-0.5)  # [B, key, query]
            attention = scores.softmax(dim=1).transpose(1, 2)
            mixed.append(attention @ v)
        heads = torch.cat(mixed, dim=-1)  # [B, A, C]
        return self.attention_out(heads).view(T, N, A, C)

    def run_history(self, x: Tensor, starts: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The GRU or LSTM over time: x [T, N, A, C] -> [T, N, A, C], hidden after step T"""
        T, N, A, C = x.shape
        keep = (~starts).float().repeat_interleave(A, dim=1).unsqueeze(-1)  # [T, N] -> [T, N*A, 1]
        hidden = hidden.reshape(N * A, self.hidden_size)
        # The inputs' share of all gates at once: only the hidden state's share has to go step by step.
        x = x.reshape(T, N * A, C)
        inputs = F.linear(x, self.rnn.weight_ih, self.rnn.bias_ih)  # [T, N*A, gates * C]
        contexts = []
        # (unbind and split rather than indexing: their gradients are one copy instead of a zero tensor per step)
        for inputs_t, keep_t in zip(inputs.unbind(), keep.unbind(), strict=True):
            hidden = self.rnn_step(inputs_t, hidden * keep_t)
            contexts.append(hidden[:, :C] if self.history == "lstm" else hidden)
        context = torch.stack(contexts).reshape(T, N, A, C)
        return context, hidden.reshape(N, A, self.hidden_size)

    def rnn_step(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """nn.GRUCell (or nn.LSTMCell, h and c side by side) after W_ih x + b_ih: [B, gates * C] -> [B, hidden_size]"""
        C = self.size
        if self.history == "gru":
            recurrent = F.linear(hidden, self.rnn.weight_hh, self.rnn.bias_hh)
            gates, new = inputs.split([2 * C, C], dim=-1)
            recurrent_gates, recurrent_new = recurrent.split([2 * C, C], dim=-1)
            gates = (gates + recurrent_gates).sigmoid()
            reset, update = gates.chunk(2, dim=-1)
            new = torch.addcmul(new, reset, recurrent_new).tanh()
            return torch.lerp(new, hidden, update)
        h, cell = hidden.chunk(2, dim=-1)
        gates = inputs + F.linear(h, self.rnn.weight_hh, self.rnn.bias_hh)
        i, f, g, o = gates.chunk(4, dim=-1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        h = o.sigmoid() * cell.tanh()
        return torch.cat([h, cell], dim=-1)


# ------------------------------------------------------------------------------------- hypernetworks


class HyperNetwork(nn.Module):
    """Weights of a multilayer perceptron made from a context, without ever building a weight tensor per sample.

    Each form is a subclass, named in FORMS; docs/hyper_mappo.md shows how to add one. `build` makes its parameters; it
    has these four, and `mix` where several layers need the same numbers:

        code(context)                         what the weights are a function of: [..., C] -> [..., P]
        apply_layer(i, layer, x, mixture)     layer i with generated weights: x [B, in] -> [B, out]
        squared_norms(layers, code, previous) exact ||delta_theta||^2 and ||its change||^2: [..., P] -> [...] twice
        num_generated                         how many weights that is
    """

    default_basis = 16  # K, what --hyper-basis None stands for
    default_rank: int | None = None  # r, what --hyper-rank None stands for; None: the form has no rank
    learning_rate = 5e-4  # what --hyper-learning-rate None stands for
    has_base = True  # False: everything is generated, there are no base layers

    def __init__(
        self,
        layers: nn.ModuleList,
        gains: list[float],
        context_size: int,
        basis: int,
        rank: int,
    ):
        """layers: the base layers; gains: of their initialisation; basis: K; rank: r, 0 without one"""
        super().__init__()
        self.basis, self.rank = basis, rank
        self.num_generated = num_parameters(layers)
        self.alpha = nn.Identity()
        if basis != context_size:
            self.alpha = layer_init(nn.Linear(context_size, basis), 1.0)
        self.build(layers, gains, context_size)

    def build(self, layers: nn.ModuleList, gains: list[float], context_size: int) -> None:
        """Makes the parameters of the form, for layers that are initialised with these gains."""
        raise NotImplementedError

    def code(self, context: Tensor) -> Tensor:
        """The coefficients a(c) of the basis: [..., C] -> [..., K]"""
        return self.alpha(context)

    def mix(self, code: Tensor) -> Any:
        """What apply_layer needs of a code [B, P], computed once for all layers."""
        return code

    def apply_layer(
        self,
        i: int,
        layer: nn.Linear | None,
        x: Tensor,
        mixture: Any,
    ) -> Tensor:
        """Layer i with generated weights. layer: its base (None without one), x [B, in] -> [B, out]"""
        raise NotImplementedError

    def squared_norms(
        self,
        layers: nn.ModuleList,
        code: Tensor,
        previous: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Exact squared norms over all weights and biases, from Gram matrices of the basis instead of the weights.

        code [..., P], previous [..., P]: of the step before -> ||delta_theta||^2 (without gradient), ||its change||^2
        """
        raise NotImplementedError


class Delta(HyperNetwork):
    """W + sum_k a_k(c) B_k, B_k = U_k V_k of rank r:   x W + (a * (x V)) U;   r = 0: B_k is full.

    Starts at exactly the base actor, because U or B is zero (Bias-HyperInit, Beck et al. 2022).
    """

    # DEVIATION: a plain linear hypernetwork makes every weight by itself; here deltas lie in a family of K matrices
    # of rank r. (r = 0 with K = context_size is the plain one.)
    default_rank = 1

    def build(self, layers, gains, context_size):
        K, r = self.basis, self.rank
        self.down, self.up = nn.ModuleList(), nn.ParameterList()
        for layer in layers:
            if r:
                self.down.append(make_basis(layer, K * r))  # V [K*r, in + 1]
                self.up.append(torch.zeros(layer.out_features, K * r))  # U [out, K*r]
            else:
                self.down.append(zero_basis(layer, K))

    def mix(self, code):
        """Each a_k r times: [B, K] -> [B, K*r]"""
        return code.repeat_interleave(self.rank, dim=-1) if self.rank > 1 else code

    def apply_layer(self, i, layer, x, mixture):
        y = layer(x)
        if not self.rank:
            return y + mixed_output(self.down[i], x, mixture)
        return y.addmm_(self.down[i](x) * mixture, self.up[i].T)  # in place: y is ours alone

    def squared_norms(self, layers, code, previous):
        if not self.rank:
            return norm_and_change(code, previous, basis_gram(self.down, self.basis))
        return norm_and_change(code, previous, product_gram(self.up, self.down, self.basis))


class Full(HyperNetwork):
    """sum_k a_k(c) B_k with ||a|| = 1, no base:   sum_k a_k (x B_k).

    Every B_k starts like a standard layer and a has norm 1: by hyperfan-in (Chang et al. 2020, "Principled weight
    initialization for hypernetworks") activations then have a standard actor's variance, for any context.
    """

    default_basis = 4
    has_base = False

    def build(self, layers, gains, context_size):
        self.down = nn.ModuleList()
        for layer, gain in zip(layers, gains, strict=True):
            self.down.append(make_basis(layer, self.basis * layer.out_features))
            for block in self.down[-1].weight.data.split(layer.out_features):
                nn.init.orthogonal_(block, gain)

    def code(self, context):
        return F.normalize(self.alpha(context), dim=-1)

    def apply_layer(self, i, layer, x, mixture):
        return mixed_output(self.down[i], x, mixture)

    def squared_norms(self, layers, code, previous):
        return norm_and_change(code, previous, basis_gram(self.down, self.basis))


class LastLayer(HyperNetwork):
    """Last layer: W + sum_k a_k(c) B_k; earlier ones: s(c) * (W x + b).

    The code is the context itself. Starts at exactly the base actor: B is zero and s one.
    """

    learning_rate = 1e-4  # K full deltas of the last layer move the logits together, K times as far

    def build(self, layers, gains, context_size):
        self.scales = nn.ModuleList()
        for layer in layers[:-1]:
            scale = nn.Linear(context_size, layer.out_features)
            nn.init.zeros_(scale.weight)
            nn.init.ones_(scale.bias)
            self.scales.append(scale)
        self.down = nn.ModuleList([zero_basis(layers[-1], self.basis)])

    def code(self, context):
        return context

    def mix(self, code):
        """a of the last layer, then s of each earlier one."""
        return [self.alpha(code), *(scale(code) for scale in self.scales)]

    def apply_layer(self, i, layer, x, mixture):
        alpha, *scales = mixture
        if i < len(scales):
            return layer(x) * scales[i]
        return layer(x) + mixed_output(self.down[0], x, alpha)

    def squared_norms(self, layers, code, previous):
        # Everything is linear in [context, 1]: a Gram matrix [C + 1, C + 1] over that.
        C = code.shape[-1]
        if isinstance(self.alpha, nn.Identity):
            alpha = torch.eye(C, C + 1, device=code.device)
        else:
            alpha = with_bias(self.alpha)
        gram = alpha.T @ basis_gram(self.down, self.basis) @ alpha
        for layer, scale in zip(layers[:-1], self.scales, strict=True):
            rows = with_bias(layer).square().sum(-1, keepdim=True)  # s_i changes row i by s_i - 1 times that row
            scale_change = scale.bias.unsqueeze(-1) - 1
            change = torch.cat([scale.weight, scale_change], dim=-1)
            gram = gram + change.T @ (rows * change)
        with_one = F.pad(code, (0, 1), value=1.0)  # [..., C + 1]
        previous_with_one = F.pad(previous, (0, 1), value=1.0)
        return norm_and_change(with_one, previous_with_one, gram)


FORMS: dict[str, type[HyperNetwork]] = {  # the choices of --hyper and --match-params
    "delta": Delta,
    "full": Full,
    "last-layer": LastLayer,
}


def make_basis(layer: nn.Linear, size: int) -> nn.Linear:
    """Rows [size, in + 1] (weight and bias side by side) that read what `layer` reads."""
    return layer_init(nn.Linear(layer.in_features, size), 1.0)


def zero_basis(layer: nn.Linear, K: int) -> nn.Linear:
    """K weight matrices shaped like the layer's, all zero: [K*out, in + 1]"""
    basis = make_basis(layer, K * layer.out_features)
    nn.init.zeros_(basis.weight)
    return basis


def mixed_output(basis: nn.Linear, x: Tensor, alpha: Tensor) -> Tensor:
    """sum_k a_k (x B_k): x [B, in], alpha [B, K] -> [B, out]"""
    K = alpha.shape[-1]
    outputs = basis(x).unflatten(-1, (K, -1))  # [B, K, out]
    return (outputs * alpha.unsqueeze(-1)).sum(1)


def with_bias(layer: nn.Linear) -> Tensor:
    """Weight and bias side by side: [out, in + 1]"""
    return torch.cat([layer.weight, layer.bias.unsqueeze(-1)], dim=-1)


def basis_gram(bases: Iterable[nn.Linear], K: int) -> Tensor:
    """<B_k, B_l> over weights and biases of all layers: [K, K]"""
    grams = []
    for basis in bases:
        rows = with_bias(basis).view(K, -1)
        grams.append(rows @ rows.T)
    return sum(grams)


def product_gram(up: Iterable[Tensor], down: Iterable[nn.Linear], K: int) -> Tensor:
    """<U_k V_k, U_l V_l> = sum_ij (u_ki . u_lj) (v_ki . v_lj) over all layers, i and j over the ranks: [K, K]"""
    down_rows = [with_bias(layer) for layer in down]
    down_grams = torch.stack([rows @ rows.T for rows in down_rows])
    up_grams = torch.stack([columns.T @ columns for columns in up])
    products = up_grams * down_grams  # [layers, K*r, K*r]
    r = products.shape[-1] // K
    return products.view(-1, K, r, K, r).sum((0, 2, 4))


def quadratic_form(alpha: Tensor, gram: Tensor) -> Tensor:
    """alpha^T gram alpha, never below 0 by rounding: [..., K] -> [...]"""
    return ((alpha @ gram) * alpha).sum(-1).clamp(min=0)


def norm_and_change(code: Tensor, previous: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of sum_k code_k B_k (without gradient) and of its change: [..., P] -> [...] twice"""
    norms = quadratic_form(code.detach(), gram.detach())
    return norms, quadratic_form(code - previous, gram)


def hyper_sizes(args: Args, form: str) -> tuple[int, int | None]:
    """K and r of a form: --hyper-basis and --hyper-rank, or what None stands for; r None: the form has none."""
    basis, rank = args.hyper_basis, args.hyper_rank
    if basis is None:
        basis = FORMS[form].default_basis
    if rank is None:
        rank = FORMS[form].default_rank
    return basis, rank


def make_hypernetwork(layers: nn.ModuleList, gains: list[float], args: Args) -> HyperNetwork:
    basis, rank = hyper_sizes(args, args.hyper)
    return FORMS[args.hyper](layers, gains, args.context_size, basis, rank or 0)


def generated_mlp(
    x: Tensor,
    layers: Sequence[nn.Module | None],
    hyper: HyperNetwork | None,
    code: Tensor | None,
) -> Tensor:
    """Linear layers with ReLU between them, as they are or as `hyper` makes them: x [B, in], code [B, P] -> [B, out]

    Of an AgentLayer each they take and give [A, B, ...].
    """
    mixture = hyper.mix(code) if hyper else None
    for i, layer in enumerate(layers):
        if hyper:
            x = hyper.apply_layer(i, layer, x, mixture)
        else:
            x = layer(x)
        if i + 1 < len(layers):
            x = x.relu_()
    return x


# ---------------------------------------------------------------------------------- actor and critic


class Actor(nn.Module):
    """Shared by all agents, or with weights of its own for each (--no-share-parameters).

    Its output `dist` [..., n] holds log-probabilities (Discrete; MultiDiscrete: of all parts side by side, which are
    independent), or [..., 2 D] mean and log standard deviation of a diagonal Gaussian (Box).
    """

    # DEVIATION: ReLU, no layer normalisation, observations as they are unless --norm-obs; without a context no
    # recurrent network (history belongs to the context).

    def __init__(self, spec: dict, args: Args):
        super().__init__()
        self.discrete, self.nvec = spec["discrete"], spec.get("nvec")
        self.shared, A = args.share_parameters, spec["num_agents"]
        self.trunk = Trunk(spec["obs_shape"], spec["obs_scale"], args.norm_obs, copies=1 if self.shared else A)
        self.num_ids = A if args.agent_id else 0
        # A list, so that the frozen encoder is no part of this module: it has a checkpoint of its own.
        self.subgoals = []
        self.num_subgoals = history_size = 0
        if args.subgoals:
            self.subgoals = [load_subgoals(args.subgoals, spec)]
            self.num_subgoals = self.subgoals[0].config["latent_size"]
            history_size = self.subgoals[0].history_size
        self.context = self.hyper = None
        self.hidden_size = 0
        if args.hyper != "none" or args.actor_context:
            self.context = Context(self.trunk.num_features, A, self.num_subgoals, args)
            self.hidden_size = self.context.hidden_size
        self.memory_size = self.hidden_size + history_size

        inputs = self.trunk.num_features + self.num_ids
        if args.actor_context:
            inputs += args.context_size
        H = args.hidden_size
        if args.match_params is not None:
            H = matching_width(inputs, spec, args)
        gains = [math.sqrt(2), math.sqrt(2), 0.01]
        sizes = [inputs, H, H, spec["num_actions"]]
        self.layers = make_layers(sizes, gains, copies=None if self.shared else A)
        if not self.discrete:
            lead = [] if self.shared else [A]
            self.logstd = nn.Parameter(torch.zeros(*lead, spec["num_actions"]))
        if args.hyper != "none":
            self.hyper = make_hypernetwork(self.layers, gains, args)
            if not self.hyper.has_base:
                self.layers = nn.ModuleList(3 * [None])

    def to(self, device: str | torch.device) -> Actor:
        """Takes the frozen encoder along."""
        for encoder in self.subgoals:
            encoder.to(device)
        return super().to(device)

    @property
    def sequential(self) -> bool:
        """Whether its update needs consecutive steps: for the history, or for the smoothness of what changes."""
        return self.context is not None and (self.context.kind != "agent-id" or bool(self.subgoals))

    def forward(
        self,
        obs: Tensor,
        action_mask: Tensor | None,
        active: Tensor,
        starts: Tensor,
        hidden: Tensor,
        z: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The one forward of acting (T = 1), updating and evaluating.

        obs [T, N, A, *O], action_mask [T, N, A, n] or None, active [T, N, A], starts [T, N], z [T, N, A, Z] subgoals
        or None, hidden [N, A, hidden_size] before step 0
        -> dist [T, N, A, n], the hypernetwork's code [T, N, A, P] or None, hidden after T.
        """
        x = self.trunk(obs)  # [T, N, A, F]
        code = flat_code = None
        if self.context:
            context, hidden = self.context(x, z, active, starts, hidden)
            if self.hyper:
                code = self.hyper.code(context)
                flat_code = code.flatten(0, 2)  # [T, N, A, P] -> [T*N*A, P]
            else:
                x = torch.cat([x, context], dim=-1)
        if self.num_ids:
            ids = torch.eye(self.num_ids, device=x.device)
            ids = ids.expand(*x.shape[:-1], self.num_ids)
            x = torch.cat([x, ids], dim=-1)
        x = self.mlp(x, flat_code)  # [T, N, A, n]
        if not self.discrete:
            dist = torch.cat([x, self.logstd.expand_as(x)], dim=-1)
            return dist, code, hidden
        if action_mask is not None:
            x = x.masked_fill(~action_mask, -1e9)  # finite: 0 * log 0 must be 0 in entropy and KL
        parts = [part.log_softmax(dim=-1) for part in x.split(self.nvec or x.shape[-1], dim=-1)]
        return torch.cat(parts, dim=-1), code, hidden

    def mlp(self, x: Tensor, flat_code: Tensor | None) -> Tensor:
        """x [T, N, A, F], flat_code [T*N*A, P] or None -> [T, N, A, n]"""
        lead = x.shape[:-1]
        if self.shared:
            x = generated_mlp(x.flatten(0, 2), self.layers, self.hyper, flat_code)  # [T*N*A, n]
            return x.view(*lead, -1)
        x = x.flatten(0, 1).transpose(0, 1)  # [T, N, A, F] -> [A, T*N, F]
        x = generated_mlp(x, self.layers, None, None)
        return x.transpose(0, 1).reshape(*lead, -1)  # [A, T*N, n] -> [T, N, A, n]


def actor_inputs(batch: Batch) -> dict[str, Tensor | None]:
    """What Actor.forward takes, from a batch of steps [T, N, ...] whose `hidden` [_, N, ...] opens with step 0's."""
    inputs = {name: batch.get(name) for name in ("obs", "action_mask", "active", "starts", "z")}
    return {**inputs, "hidden": batch["hidden"][0]}


def matching_width(num_inputs: int, spec: dict, args: Args) -> int:
    """The hidden width at which a plain actor has as many parameters as the hyper actor of --match-params."""
    hyper_args = replace(args, hyper=args.match_params, actor_context=False, match_params=None)
    with torch.random.fork_rng(devices=[]):
        hyper_actor = Actor(spec, hyper_args)
        context = Actor(spec, replace(args, match_params=None)).context
    target = num_parameters(hyper_actor) - num_parameters(hyper_actor.trunk)
    if context:
        target -= num_parameters(context)
    num_actions = spec["num_actions"]

    def distance(width: int) -> int:
        count = (num_inputs + 1) * width
        count += (width + 1) * width
        count += (width + 1) * num_actions
        if not spec["discrete"]:
            count += num_actions
        return abs(count - target)

    return min(range(1, 65_536), key=distance)


def load_subgoals(run_dir: str, spec: dict) -> nn.Module:
    """The frozen encoder of a pretrain_vae.py run. UsageError: unreadable, or trained on other observations."""
    try:
        encoder = load_vae(run_dir)
        encoder.check_input("obs", spec["obs_shape"])
    except UsageError as error:
        raise UsageError(f"--subgoals: {error}") from None
    return encoder


class Critic(nn.Module):
    """Centralised: the global state and an agent's own observation -> that agent's value, in normalised units.

    The first layer is W_s state + W_o obs: its state part is computed once per env. Without --critic-obs the state
    alone -> one output per agent. With --hyper-critic its weights are made from a context, too: an encoding of the
    state, without history, so that the value of an episode's last state needs nothing else.
    """

    def __init__(self, spec: dict, args: Args):
        super().__init__()
        self.trunk = Trunk(spec["state_shape"], spec["state_scale"], args.norm_obs)
        inputs, outputs = self.trunk.num_features, spec["num_agents"]
        self.obs_trunk = None
        self.num_ids = 0
        if args.critic_obs:
            self.obs_trunk = Trunk(spec["obs_shape"], spec["obs_scale"], args.norm_obs)
            self.num_ids = spec["num_agents"] if args.agent_id else 0
            inputs += self.obs_trunk.num_features + self.num_ids
            outputs = 1
        H = args.critic_hidden_size or args.hidden_size
        gains = [math.sqrt(2), math.sqrt(2), 1.0]
        self.layers = make_layers([inputs, H, H, outputs], gains)
        self.hyper = None
        if args.hyper_critic:
            self.encoder = layer_init(nn.Linear(self.trunk.num_features, args.context_size))
            self.hyper = make_hypernetwork(self.layers, gains, args)
            if not self.hyper.has_base:
                self.layers = nn.ModuleList(3 * [None])

    def forward(self, state: Tensor, obs: Tensor) -> Tensor:
        """state [..., *S], obs [..., A, *O] -> values [..., A]"""
        features = self.trunk(state)  # [..., F]
        lead = features.shape[:-1]
        features = features.flatten(0, -2)  # [..., F] -> [B, F]
        code = None
        if self.hyper:
            code = self.hyper.code(self.encoder(features).relu_())  # [B, P]
        if self.obs_trunk is None:
            values = generated_mlp(features, self.layers, self.hyper, code)  # [B, A]
            return values.view(*lead, -1)
        own = self.own_features(obs).flatten(0, -3)  # [..., A, F_o] -> [B, A, F_o]
        B, A, _ = own.shape
        if self.hyper:
            of_all = features.unsqueeze(1).expand(B, A, -1)  # [B, F] -> [B, A, F]
            x = torch.cat([of_all, own], dim=-1).flatten(0, 1)  # [B * A, F + F_o]
            code = code.repeat_interleave(A, dim=0)  # [B * A, P]
            return generated_mlp(x, self.layers, self.hyper, code).view(*lead, A)
        first, *later = self.layers
        state_weight, own_weight = first.weight.split([features.shape[-1], own.shape[-1]], dim=1)
        from_state = F.linear(features, state_weight, first.bias)  # [B, H]
        x = F.linear(own, own_weight) + from_state.unsqueeze(1)  # [B, A, H]
        x = x.relu_().flatten(0, 1)  # (relu_ before flatten: in place on a view it would cost three copies)
        return generated_mlp(x, later, None, None).view(*lead, A)

    def own_features(self, obs: Tensor) -> Tensor:
        """What the critic sees of each agent itself: [..., A, *O] -> [..., A, F_o]"""
        own = self.obs_trunk(obs)
        if not self.num_ids:
            return own
        ids = torch.eye(self.num_ids, device=own.device)
        ids = ids.expand(*own.shape[:-1], self.num_ids)
        return torch.cat([own, ids], dim=-1)


class ValueNorm(nn.Module):
    """Running mean and deviation of the returns (Yu et al. 2022, "value normalization"), debiased like Adam's."""

    def __init__(self, enabled: bool, decay: float = 0.99):
        super().__init__()
        self.enabled, self.decay = enabled, decay
        self.register_buffer("moments", torch.zeros(3))  # decayed sums of x, x^2, 1

    def update(self, returns_mean: Tensor, returns_var: Tensor) -> None:
        second_moment = returns_var + returns_mean**2
        batch = torch.stack([returns_mean, second_moment, torch.ones_like(returns_mean)])
        self.moments.lerp_(batch, 1 - self.decay)

    def mean_std(self) -> tuple[Tensor, Tensor]:
        weight = self.moments[2].clamp(min=1e-8)
        mean = self.moments[0] / weight
        var = self.moments[1] / weight - mean**2
        std = var.clamp(min=1e-4).sqrt()
        seen = (self.moments[2] > 0) & self.enabled
        return torch.where(seen, mean, 0.0), torch.where(seen, std, 1.0)

    def normalize(self, returns: Tensor) -> Tensor:
        mean, std = self.mean_std()
        return (returns - mean) / std

    def denormalize(self, values: Tensor) -> Tensor:
        mean, std = self.mean_std()
        return values * std + mean


# ----------------------------------------------------------------------------- distributions, GAE, losses


def sample_actions(
    dist: Tensor,
    discrete: bool,
    deterministic: bool = False,
    nvec: list[int] | None = None,
) -> Tensor:
    """dist [..., n] -> actions [...] int64, with nvec [D] of parts: [..., D]; dist [..., 2 D] -> [..., D] float32"""
    if nvec is not None:
        parts = [sample_actions(part, True, deterministic) for part in dist.split(nvec, dim=-1)]
        return torch.stack(parts, dim=-1)
    if discrete:
        if deterministic:
            return dist.argmax(-1)
        noise = torch.empty_like(dist).exponential_().log()
        return (dist - noise).argmax(-1)  # Gumbel-max trick
    mean, logstd = dist.chunk(2, dim=-1)
    if deterministic:
        return mean
    return mean + logstd.exp() * torch.randn_like(mean)


def log_prob(
    dist: Tensor,
    actions: Tensor,
    discrete: bool,
    nvec: list[int] | None = None,
) -> Tensor:
    """log pi(actions): [...]"""
    if nvec is not None:
        parts = zip(dist.split(nvec, dim=-1), actions.unbind(-1), strict=True)
        return sum(log_prob(part, action, True) for part, action in parts)
    if discrete:
        return dist.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    mean, logstd = dist.chunk(2, dim=-1)
    distance = (actions - mean) / logstd.exp()
    log_density = -0.5 * distance**2 - logstd - 0.5 * math.log(2 * math.pi)  # [..., D]
    return log_density.sum(-1)


def entropy(dist: Tensor, discrete: bool) -> Tensor:
    """[...], in nats; of several parts their sum"""
    if discrete:
        return -(dist.exp() * dist).sum(-1)
    _, logstd = dist.chunk(2, dim=-1)
    return (logstd + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def kl_divergence(old: Tensor, new: Tensor, discrete: bool) -> Tensor:
    """KL(old || new): [...], in nats"""
    if discrete:
        return (old.exp() * (old - new)).sum(-1)
    old_mean, old_logstd = old.chunk(2, dim=-1)
    new_mean, new_logstd = new.chunk(2, dim=-1)
    log_ratio = old_logstd - new_logstd
    var_ratio = (2 * log_ratio).exp()
    distance = (old_mean - new_mean) / new_logstd.exp()
    return (0.5 * (var_ratio + distance**2 - 1) - log_ratio).sum(-1)


def masked_mean(x: Tensor, weights: Tensor) -> Tensor:
    return (x * weights).sum() / weights.sum().clamp(min=1.0)


def mean_var(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the samples of weight 1, those of all processes together."""
    sums = torch.stack([weights.sum(), (x * weights).sum()])
    count, x_sum = all_sum(sums)
    count = count.clamp(min=1.0)
    mean = x_sum / count
    squares = ((x - mean) ** 2 * weights).sum()
    return mean, all_sum(squares) / count


def regression_loss(error: Tensor, huber_delta: float | None) -> Tensor:
    """Half the squared error, linear past huber_delta; elementwise."""
    if huber_delta is None:
        return 0.5 * error**2
    return F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=huber_delta)


def shared_rewards(rewards: Tensor, learners: Tensor, team_spirit: float) -> Tensor:
    """(1 - t) own + t x the mean over those who learn (OpenAI et al. 2019, arXiv 1912.06680, "team spirit").

    rewards [..., A], 0 for those who have left, learners [A] -> [..., A], own rewards for everyone else
    """
    if team_spirit == 0:
        return rewards
    weights = learners.float()
    team = (rewards @ weights / weights.sum()).unsqueeze(-1)
    return torch.lerp(rewards, team, team_spirit * weights)


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    ended: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
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


def learning_targets(
    rollout: Batch,
    last_values: Tensor,
    learners: Tensor,
    args: Args,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """What actor and critic learn from a rollout whose last step is followed by states of last_values [N, A].

    learners [A]: the seats that learn; `learns` [T, N, A] those of them that are active, `valued` those that the critic
    learns from -> advantages [T, N, A] (normalised with --norm-adv), returns [T, N, A], their mean and variance, the
    critic's explained variance. Means are over all processes.
    """
    values = rollout["values"]
    next_values = torch.cat([values[1:], last_values.unsqueeze(0)])  # [T, N, A]
    over = rollout["episode_over"].unsqueeze(-1)  # [T, N, 1]
    next_values = torch.where(over, rollout["cut_values"], next_values)
    rewards = shared_rewards(rollout["rewards"], learners, args.team_spirit)
    terminations, ended = rollout["terminations"], rollout["ended"]
    if args.team_spirit > 0:  # who has left is paid until the episode is over
        by_the_rules = over & ~rollout["truncations"].unsqueeze(-1)
        terminations, ended = by_the_rules.expand_as(values), over.expand_as(values)
    transitions = rewards, values, next_values, terminations, ended
    advantages, returns = compute_gae(*transitions, args.gamma, args.gae_lambda)
    valued = rollout["valued"].float()
    returns_mean, returns_var = mean_var(returns, valued)
    _, error_var = mean_var(returns - values, valued)
    explained_var = 1 - error_var / returns_var.clamp(min=1e-8)
    if args.norm_adv:
        advantages_mean, advantages_var = mean_var(advantages, rollout["learns"].float())
        advantages = (advantages - advantages_mean) / (advantages_var.sqrt() + 1e-8)
    return advantages, returns, (returns_mean, returns_var), explained_var


def who_learns(active: Tensor, learners: Tensor, team_spirit: float) -> tuple[Tensor, Tensor]:
    """active [T, N, A], learners [A] -> whose samples the actor, and whose the critic learns from: [T, N, A] twice.

    With a team spirit the value of those who have left is learnt, too.
    """
    learns = active & learners
    return learns, learners.expand_as(active) if team_spirit > 0 else learns


def smoothness(
    actor: Actor,
    code: Tensor,
    before: Tensor,
    active: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """How much theta changes between consecutive steps of one episode: mean ||change||^2, and without gradient
    mean ||change||, mean ||delta_theta||.

    code [T, N, A, P], before [N, A, P]: that of the step before step 0, active [T, N, A]: whose change counts,
    starts [T, N] -> three scalars. A step that opens an episode has no predecessor.
    """
    previous = torch.stack([before, *code.unbind()[:-1]])  # (slices of code would have zero-filled gradients)
    norms, changes = actor.hyper.squared_norms(actor.layers, code, previous)  # [T, N, A] both
    was_active = torch.cat([active[:1], active[:-1]])
    pairs = active & was_active & ~starts.unsqueeze(-1)  # [T, N, A]
    pairs = pairs.float()
    step_change = masked_mean(changes.detach().sqrt(), pairs)
    delta_norm = masked_mean(norms.sqrt(), active.float())
    return masked_mean(changes, pairs), step_change, delta_norm


def clipped_policy_loss(
    newlogprob: Tensor, mb: Batch, weights: Tensor, clip_coef: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7): -> loss, log ratio, ratio"""
    logratio = (newlogprob - mb["logprobs"]) * weights
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    pg_loss = torch.max(-mb["advantages"] * ratio, -mb["advantages"] * clipped)  # [L, S, A]
    return masked_mean(pg_loss, weights), logratio, ratio


def value_loss(newvalue: Tensor, mb: Batch, weights: Tensor, args: Args) -> Tensor:
    """Huber loss of the values [L, S, A]; with --clip-vloss the larger of the plain and the clipped one."""
    error = regression_loss(newvalue - mb["returns"], args.huber_delta)
    if args.clip_vloss:  # DEVIATION: MAPPO clips, by default this does not
        change = (newvalue - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
        v_clipped = mb["values"] + change
        error = torch.max(error, regression_loss(v_clipped - mb["returns"], args.huber_delta))
    return masked_mean(error, weights)


def ppo_loss(
    actor: Actor,
    critic: Critic,
    mb: Batch,
    args: Args,
    ent_coef: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss with the hypernetwork's two penalties: -> scalar loss, what is logged of it (no gradient).

    ent_coef: weight of the entropy bonus; None: that of `args`, as at the start of training.

    mb holds sequences [L, S, ...]: obs state action_mask active learns (whose samples count) valued (the same for the
    critic) starts actions anchor_dists logprobs advantages returns values (the last two normalised), z (subgoals), and
    hidden [1, S, A, hidden] from before their first step.
    """
    weights = mb["learns"].float()  # every mean is over agents that are active and learn
    mb = {**mb, "obs": mb["obs"].float()}  # bytes become numbers once, for actor and critic
    dists, code, _ = actor(**actor_inputs(mb))
    newlogprob = log_prob(dists, mb["actions"], actor.discrete, actor.nvec)
    pg_loss, logratio, ratio = clipped_policy_loss(newlogprob, mb, weights, args.clip_coef)
    entropy_bonus = masked_mean(entropy(dists, actor.discrete), weights)
    v_loss = value_loss(critic(mb["state"], mb["obs"]), mb, mb["valued"].float(), args)
    # DEVIATION: the losses of actor and critic are summed and stepped by one Adam.
    if ent_coef is None:
        ent_coef = args.ent_coef
    loss = pg_loss - ent_coef * entropy_bonus + args.vf_coef * v_loss

    was_clipped = (ratio - 1).abs() > args.clip_coef
    numbers = {
        "losses/policy_loss": pg_loss,
        "losses/value_loss": v_loss,
        "losses/entropy": entropy_bonus,
        # two estimates of KL(old || new): http://joschu.net/blog/kl-approx.html
        "losses/old_approx_kl": masked_mean(-logratio, weights),
        "losses/approx_kl": masked_mean((ratio - 1) - logratio, weights),
        "losses/clipfrac": masked_mean(was_clipped.float(), weights),
    }
    if actor.hyper:
        context_before = actor.context.previous(mb["hidden"][0], mb["active"][0])
        before = actor.hyper.code(context_before)  # [S, A, P]
        change, step_change, delta_norm = smoothness(actor, code, before, mb["learns"], mb["starts"])
        smooth_loss = change / actor.hyper.num_generated
        align_kl = masked_mean(kl_divergence(mb["anchor_dists"], dists, actor.discrete), weights)
        loss = loss + args.smooth_coef * smooth_loss + args.align_coef * align_kl
        numbers["losses/smooth_loss"] = smooth_loss
        numbers["losses/align_kl"] = align_kl
        numbers["hyper/delta_norm"] = delta_norm
        numbers["hyper/step_change"] = step_change
    return loss, {name: x.detach() for name, x in numbers.items()}


def gradient_cosine(actor: Actor, mb: Batch, args: Args) -> Tensor:
    """Mean cosine between the agents' policy gradients: 1 all pull the same way, 0 unrelated. Scalar."""
    dists, _, _ = actor(**actor_inputs(mb))
    newlogprob = log_prob(dists, mb["actions"], actor.discrete, actor.nvec)
    params = [p for p in actor.parameters() if p.requires_grad]
    learners = mb["learns"].flatten(0, 1).any(0)  # [A]
    gradients = []
    for i in range(len(learners)):
        weights = torch.zeros_like(newlogprob)
        weights[..., i] = mb["learns"][..., i].float()
        loss, _, _ = clipped_policy_loss(newlogprob, mb, weights, args.clip_coef)
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        flat = [grad.flatten() for grad in grads if grad is not None]
        gradients.append(torch.cat(flat))
    directions = F.normalize(torch.stack(gradients), dim=-1)  # [A, parameters]
    pairs = (learners.unsqueeze(-1) & learners).float().triu(1)  # [A, A]
    return masked_mean(directions @ directions.T, pairs)


# ------------------------------------------------------------------------------------------- update


def to_sequences(batch: Batch, L: int) -> Batch:
    """Steps as training sequences: [T, N, ...] -> [L, S, ...] with S = T*N / L; hidden [T/L, N, ...] -> [1, S, ...]."""
    sequences = {}
    for name, x in batch.items():
        length = 1 if name == "hidden" else L
        x = x.unflatten(0, (-1, length)).transpose(0, 1)  # [T, N, ...] -> [L, T/L, N, ...]
        sequences[name] = x.flatten(1, 2)  # -> [L, S, ...]
    return sequences


def take_sequences(batch: Batch, inds: Tensor) -> Batch:
    """The minibatch [L, len(inds), ...]. (index_select: on a CPU 8 times as fast as x[:, inds])"""
    return {name: x.index_select(1, inds) for name, x in batch.items()}


def backward_in_threads(
    loss_function: Callable,
    actor: Actor,
    critic: Critic,
    batch: Batch,
    parts: tuple[Tensor, ...],
    args: Args,
    threads: ThreadPoolExecutor,
) -> dict[str, Tensor]:
    """loss.backward() of a minibatch, a part of it in each thread: fills every .grad, -> the numbers of the loss.

    parts: indices of the minibatch's sequences in the batch, cut into one part per thread.
    Parts count by their samples that learn, so that PPO's means are those of the whole minibatch. The penalty on
    changes of theta, whose mean is over pairs of steps, differs a little where more episodes start in one part, and so
    does the value loss where a team spirit has it look at those who have left.
    """
    params = [*actor.parameters(), *critic.parameters()]
    learns = batch["learns"][:, torch.cat(parts)]
    num_samples = learns.sum().clamp(min=1)

    def backward_part(inds: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        mb = take_sequences(batch, inds)
        share = mb["learns"].sum() / num_samples
        loss, numbers = loss_function(actor, critic, mb, args)
        # (rather than backward(): threads that add to one .grad would do so in an order of chance)
        grads = torch.autograd.grad(share * loss, params, materialize_grads=True)
        return grads, {name: share * x for name, x in numbers.items()}

    results = list(threads.map(backward_part, parts))
    grads_of_parts = [grads for grads, _ in results]
    for param, *grads in zip(params, *grads_of_parts, strict=True):
        param.grad = sum(grads)
    numbers_of_parts = [numbers for _, numbers in results]
    totals = {}
    for name in numbers_of_parts[0]:
        totals[name] = sum(numbers[name] for numbers in numbers_of_parts)
    return totals


def all_sum(x: Tensor) -> Tensor:
    """The sum over all processes of torchrun; x itself without it."""
    if distributed.is_initialized():
        x = x.clone()
        distributed.all_reduce(x)
    return x


def mean_of_all(x: Tensor) -> Tensor:
    """The mean over all processes."""
    return all_sum(x) / distributed.get_world_size() if distributed.is_initialized() else x


def average_gradients(params: list[nn.Parameter]) -> None:
    """Every process goes on with the mean gradient of all: one exchange of all of them side by side."""
    if not distributed.is_initialized():
        return
    grads = [param.grad for param in params if param.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    mean = all_sum(flat) / distributed.get_world_size()
    means = mean.split([grad.numel() for grad in grads])
    for grad, part in zip(grads, means, strict=True):
        grad.copy_(part.view_as(grad))


def update_obs_norms(actor: Actor, critic: Critic, rollout: Batch) -> None:
    """What a rollout saw joins the moments of observations (of active agents) and states. Observations have one set."""
    for obs, state, active in zip(rollout["obs"], rollout["state"], rollout["active"], strict=True):
        x = actor.trunk.flat(obs)  # [N, A, F]
        actor.trunk.norm.update(x.flatten(0, 1), active.flatten())
        x = critic.trunk.flat(state)  # [N, F]
        critic.trunk.norm.update(x, torch.ones(len(x), device=x.device))
    if critic.obs_trunk is not None:
        critic.obs_trunk.norm.load_state_dict(actor.trunk.norm.state_dict())


# --------------------------------------------------------------------------------- acting, evaluation


def split_memory(actor: Actor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """memory [N, A, memory_size] -> the context's hidden state, the subgoal encoder's history"""
    return memory.split([actor.hidden_size, actor.memory_size - actor.hidden_size], dim=-1)


@torch.no_grad()
def state_values(
    critic: Critic,
    value_norm: ValueNorm,
    state: Tensor,
    obs: Tensor,
) -> Tensor:
    """V in units of return: state [..., *S], obs [..., A, *O] -> [..., A]"""
    return value_norm.denormalize(critic(state, obs))


@torch.no_grad()
def act(
    actor: Actor,
    step: EnvStep,
    starts: Tensor,
    memory: Tensor,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """One env step: actions [N, A] or [N, A, D], dist [N, A, n], subgoals z [N, A, Z] or None, memory to carry on."""
    hidden, history = split_memory(actor, memory)
    z = None
    if actor.subgoals:
        history = history * (~starts).float().view(-1, 1, 1)
        z = actor.subgoals[0].encode(step.obs, history)
    inputs = {
        "obs": step.obs,
        "action_mask": step.action_mask,
        "active": step.active,
        "starts": starts,
        "hidden": hidden,
        "z": z,
    }
    one_step = {}
    for name, x in inputs.items():
        if x is not None:
            one_step[name] = x.unsqueeze(0)  # [N, ...] -> [1, N, ...]
    dists, _, hidden = actor(**actor_inputs(one_step))
    actions = sample_actions(dists[0], actor.discrete, deterministic, actor.nvec)
    memory = torch.cat([hidden, history], dim=-1)
    return actions, dists[0], z, memory


def remember(actor: Actor, step: EnvStep, actions: Tensor, memory: Tensor) -> Tensor:
    """The memory after all seats' `actions` at `step` are known: who did what is the subgoal encoder's history."""
    if not actor.subgoals:
        return memory
    hidden, history = split_memory(actor, memory)
    history = actor.subgoals[0].observe(history, step.obs, actions)
    return torch.cat([hidden, history], dim=-1)


class Policy:
    """A run folder's policy for other programs: a player as envs/players.py describes them.

    UsageError: no run folder of this script.
    """

    def __init__(self, run_dir: str | Path, device: str | torch.device = "cpu"):
        checkpoint = load_checkpoint(run_dir, CHECKPOINT_FORMAT, device)
        self.args = saved_args(checkpoint, run_dir)
        self.spec, self.device = checkpoint["spec"], torch.device(device)
        self.actor = Actor(self.spec, self.args).to(device).requires_grad_(False)
        load_weights(self.actor, checkpoint["actor"], run_dir)

    def initial_state(self, num_envs: int) -> Tensor:
        return torch.zeros(num_envs, self.spec["num_agents"], self.actor.memory_size, device=self.device)

    def act(self, step: EnvStep, memory: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """-> actions [N, A] or [N, A, D], memory. Where the last `step` ended an episode, memory starts afresh."""
        actions, _, _, memory = act(self.actor, step, step.episode_over, memory, deterministic)
        return actions, memory

    def remember(self, step: EnvStep, actions: Tensor, memory: Tensor) -> Tensor:
        return remember(self.actor, step, actions, memory)


def make_policy(name: str, env: VecEnv) -> Policy | FixedPolicy:
    """A policy that acts in all seats of all envs. UsageError for an unknown name or a policy of another env.

    name: "random" (any env), a scripted player of the env, a run folder or its checkpoint (.pt).
    """
    is_checkpoint = name.endswith(".pt") or (Path(name) / "latest.pt").exists()
    if not is_checkpoint:
        return scripted_player(name, env)
    policy = Policy(name, env.device)
    described = env_spec(env)
    shapes = {key: described.get(key) for key in "obs_shape num_agents discrete num_actions nvec".split()}
    trained = {key: policy.spec.get(key) for key in shapes}
    if trained != shapes:
        raise UsageError(f"{name} was trained with {trained}, but {env.env_id} has {shapes}; use its env")
    return policy


def load_critic(run_dir: str | Path, device: str | torch.device = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """V of a run folder, in units of return: state [..., *S], obs [..., A, *O] -> values [..., A].

    UsageError as load_checkpoint.
    """
    checkpoint = load_checkpoint(run_dir, CHECKPOINT_FORMAT, device)
    args = saved_args(checkpoint, run_dir)
    critic = Critic(checkpoint["spec"], args).to(device)
    load_weights(critic, checkpoint["critic"], run_dir)
    value_norm = ValueNorm(args.value_norm).to(device)
    load_weights(value_norm, checkpoint["value_norm"], run_dir)
    return functools.partial(state_values, critic, value_norm)


def evaluate(
    actor: Actor,
    env: VecEnv,
    num_episodes: int,
    seed: int,
    deterministic: bool = False,
    frames: list | None = None,
    partners: Partners | None = None,
) -> Batch:
    """Plays episodes with the forward of training: {"returns": [num_episodes, A], "lengths": [num_episodes]}, and
    "success" [num_episodes] where episodes can be won, "members" [M, 3] with partners (Partners.member_sums).

    Every env plays a fixed share of the episodes, so that short ones are not over-represented.
    `frames` collects the pictures of env 0; `partners` play their seats.
    """
    torch.manual_seed(seed)
    N = env.num_envs
    shares = [num_episodes // N + (i < num_episodes % N) for i in range(N)]
    shares = torch.tensor(shares, device=env.device)  # [N] episodes that are still to be played
    returns, lengths, successes, members = [], [], [], []
    step = env.reset(seed)
    starts = torch.ones(N, dtype=torch.bool, device=env.device)
    memory = torch.zeros(N, env.num_agents, actor.memory_size, device=env.device)
    bar = tqdm(total=num_episodes, desc="evaluation", unit="episode", disable=None)
    while shares.any():
        if frames is not None:
            frames.append(env.render())
        actions, _, _, memory = act(actor, step, starts, memory, deterministic)
        if partners:
            actions = partners.play(step, actions)
        memory = remember(actor, step, actions, memory)
        step = env.step(actions)
        starts = step.episode_over
        counted = starts & (shares > 0)
        if not counted.any():
            continue
        shares -= counted.long()
        returns.append(step.episode_returns[counted])
        lengths.append(step.episode_lengths[counted])
        if step.success is not None:
            successes.append(step.success[counted])
        if partners:
            members.append(partners.member_sums(step, counted))
        bar.update(int(counted.sum()))
    bar.close()
    played = {"returns": torch.cat(returns), "lengths": torch.cat(lengths)}
    if successes:
        played["success"] = torch.cat(successes)
    if members:
        played["members"] = sum(members)
    return {name: x.cpu() for name, x in played.items()}


def evaluate_run(
    actor: Actor,
    args: Args,
    checked: CheckedEnv,
    run_dir: Path,
    device: torch.device,
) -> None:
    """The closing evaluation, on the genuine env (where there is one): prints, eval.json, video.gif."""
    seed = args.seed + EVAL_SEED
    limits = {"env_timeout": args.env_timeout, "episode_limit": args.episode_limit}
    if args.eval_episodes:
        # As many envs whatever the number of processes, so that it changes nothing.
        most = EVAL_ENVS["pettingzoo" if checked.genuine else "batched"]
        rounds = math.ceil(args.eval_episodes / most)
        num_envs = math.ceil(args.eval_episodes / rounds)
        num_procs = min(env_procs(args), num_envs)
        env = make_eval_env(checked, num_envs, device, seed, num_procs, **limits)
        partners = Partners(args.partners, env, make_policy, seed)
        played = evaluate(actor, env, args.eval_episodes, seed, args.eval_deterministic, partners=partners)
        env.close()
        report = evaluation_report(played, partners)
        described = {"env_id": env.env_id, "backend": env.backend, "seed": seed}
        described["deterministic"] = args.eval_deterministic
        write_json(run_dir / "eval.json", {**described, **report})
        kind = "genuine" if checked.genuine else "batched"
        print(f"evaluation on {kind} {env.env_id}: {evaluation_line(report)}")
    if args.capture_video:
        env = make_eval_env(checked, 1, device, seed, render=True, **limits)
        partners = Partners(args.partners, env, make_policy, seed)
        frames: list[np.ndarray] = []
        evaluate(actor, env, 1, seed, args.eval_deterministic, frames, partners)
        env.close()
        with whole_file(run_dir / "video.gif") as path:
            imageio.mimsave(path, frames, duration=60, loop=0)
        print(f"video    {run_dir / 'video.gif'} ({len(frames)} frames)")


def evaluation_report(played: Batch, partners: Partners) -> dict:
    """What `evaluate` returned, in numbers; the return is that of the seats that learn."""
    returns = played["returns"]  # [episodes, A]
    team = returns[:, partners.learners.cpu()].mean(dim=1)  # [episodes, A] -> [episodes]
    num_episodes = len(team)
    interval = None
    if num_episodes > 1:
        interval = float(team.std() * student_t.ppf(0.975, num_episodes - 1) / math.sqrt(num_episodes))
    report = {
        "episodes": num_episodes,
        "mean_return": float(team.mean()),
        "interval_95": interval,
        "returns": team.tolist(),
        "mean_return_per_agent": returns.mean(dim=0).tolist(),
        "mean_length": float(played["lengths"].float().mean()),
    }
    if "success" in played:
        report["success_rate"] = float(played["success"].float().mean())
    if "members" in played and partners.has_pool:
        report["partners"] = partners.member_metrics(played["members"].tolist())
    return report


def evaluation_line(report: dict) -> str:
    line = f"return per agent {report['mean_return']:.2f}"
    if report["interval_95"] is not None:
        line += f" ± {report['interval_95']:.2f} (95 % interval)"
    if "success_rate" in report:
        line += f", {report['success_rate']:.1%} won"
    return line + f", {report['episodes']} episodes of mean length {report['mean_length']:.0f}"


def evaluate_only(args: Args) -> Path:
    """--evaluate: nothing is trained, the run folder gets a new eval.json."""
    if not args.eval_episodes and not args.capture_video:
        raise UsageError("--evaluate would do nothing: the run was made with --eval-episodes 0, give another number")
    run_dir = run_folder("evaluate", args.evaluate)
    checked = check_env_args(args)
    if args.capture_video:
        check_picture(checked)
    device = get_device(args.cuda)
    policy = Policy(run_dir, device)
    evaluate_run(policy.actor, args, checked, run_dir, device)
    return run_dir


# ---------------------------------------------------------------------------------------- arguments


def check_args(args: Args, device: torch.device, world_size: int = 1) -> tuple[Args, CheckedEnv]:
    """What can be wrong before an env is made, beside single numbers (LIMITS): UsageError in one line.

    -> the arguments with what None stood for (num_envs: of all processes together), and the env
    """
    refuse_useless_flags(args)
    check_form(args)
    has_pool = any(len(entry.members) > 1 for entry in parse_partners(args.partners))
    if args.partner_switch is not None and not has_pool:
        raise UsageError("--partner-switch would do nothing without a pool like --partners pool=random,stay:2: add one")
    checked = check_env_args(args)
    if args.capture_video:
        check_picture(checked)
    resolved = resolve(args, checked, device, world_size)
    check_sizes(resolved, world_size)
    return resolved, checked


def refuse_useless_flags(args: Args) -> None:
    """UsageError for flags that would do nothing: whoever gives one expects otherwise."""

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
    if args.hyper_context == "agent-id":
        constant = ["history", "share_delta"]
        if not args.subgoals:
            constant += ["chunk_length", "smooth_coef"]
        refuse(constant, "with --hyper-context agent-id, which never changes")
    if args.hyper_context == "local":
        refuse(["share_delta"], "with --hyper-context local: it needs all agents' contexts")
    if not args.share_parameters and (generating_form(args) or args.actor_context):
        raise UsageError(
            "--no-share-parameters is the control with plain actors: give it --hyper none, "
            "without --actor-context or --match-params"
        )


def generating_form(args: Args) -> str | None:
    """The form whose sizes count: that of --hyper, or the one that --match-params is sized after."""
    form = args.match_params or args.hyper
    return None if form == "none" else form


def check_form(args: Args) -> None:
    """UsageError for a size that the form cannot have."""
    form = generating_form(args)
    if form is not None and args.hyper_rank is not None and FORMS[form].default_rank is None:
        raise UsageError(f"--hyper-rank would do nothing with --hyper {form}: only delta has one")
    if args.context_size % args.context_heads:
        raise UsageError(f"--context-size {args.context_size} is no multiple of --context-heads {args.context_heads}")


def check_env_args(args: Args) -> CheckedEnv:
    return check_env(args.env_id, args.backend, parse_env_kwargs(args.env_kwargs))


def env_procs(args: Args) -> int:
    """Worker processes of genuine envs."""
    if args.num_env_procs is None:
        return default_env_procs(args.num_envs or 8)
    return args.num_env_procs


def resolve(args: Args, checked: CheckedEnv, device: torch.device, world_size: int) -> Args:
    """The arguments with what None and "auto" stand for, so that they alone repeat the run: see args.json."""
    batched = checked.backend == "batched"
    num_envs, num_minibatches, update_epochs = args.num_envs, args.num_minibatches, args.update_epochs
    if num_envs is None:
        num_envs = 128 if batched else 8
    if num_minibatches is None:
        sequences, _ = sequences_of_a_process(args, num_envs, world_size)
        num_minibatches = math.gcd(64 if batched else 4, sequences)
    if update_epochs is None:
        update_epochs = 1 if batched else 4
    update_threads = args.update_threads
    if update_threads is None:
        alone_on_cpu = device.type == "cpu" and world_size == 1
        update_threads = min(2, num_cpus()) if alone_on_cpu else 1
    num_threads = args.num_threads
    if num_threads is None:
        num_threads = torch.get_num_threads()
    team_spirit = args.team_spirit
    if team_spirit is None:
        team_spirit = default_team_spirit(checked.env_id)
    resolved = replace(
        with_form_sizes(args),
        backend=checked.backend,
        num_envs=num_envs,
        num_minibatches=num_minibatches,
        update_epochs=update_epochs,
        team_spirit=team_spirit,
        num_env_procs=env_procs(args),
        num_threads=num_threads,
        update_threads=update_threads,
        resume=None,
    )
    if args.hyper_learning_rate is None and (args.hyper != "none" or args.actor_context):
        form = FORMS.get(args.hyper, HyperNetwork)  # --actor-context is a context without a hypernetwork
        return replace(resolved, hyper_learning_rate=form.learning_rate)
    return resolved


def default_team_spirit(env_id: str) -> float:
    for pattern, team_spirit in TEAM_SPIRIT.items():
        if re.fullmatch(pattern, env_id):
            return team_spirit
    return 0.0


def with_form_sizes(args: Args) -> Args:
    """The arguments with the sizes that --hyper-basis None and --hyper-rank None stand for."""
    form = generating_form(args)
    if form is None:
        return args
    basis, rank = hyper_sizes(args, form)
    return replace(args, hyper_basis=basis, hyper_rank=rank)


def sequences_of_a_process(args: Args, num_envs: int, world_size: int) -> tuple[int, str]:
    """How many training sequences a process' rollout has, and what they are."""
    env_steps = num_envs * args.num_steps // world_size
    has_context = args.hyper != "none" or args.actor_context
    if has_context and (args.hyper_context != "agent-id" or args.subgoals):
        return env_steps // args.chunk_length, f"sequences of {args.chunk_length} steps"
    return env_steps, "env steps of a rollout"


def check_sizes(args: Args, world_size: int) -> None:
    """UsageError where envs, steps and minibatches do not fit each other."""
    num_envs, num_steps = args.num_envs, args.num_steps
    if num_envs % world_size:
        raise UsageError(f"--num-envs {num_envs} cannot be shared by {world_size} processes: choose a multiple")
    batch_size = num_envs * num_steps
    if args.total_timesteps < batch_size:
        raise UsageError(
            f"--total-timesteps {args.total_timesteps} gives no update: one rollout takes {batch_size} env steps "
            f"({num_envs} envs x {num_steps} steps); raise it, or lower --num-envs or --num-steps"
        )
    if num_steps % args.chunk_length:
        raise UsageError(f"--chunk-length {args.chunk_length} does not divide --num-steps {num_steps}")
    sequences, what = sequences_of_a_process(args, num_envs, world_size)
    if sequences % args.num_minibatches:
        given = f"--num-minibatches {args.num_minibatches}"
        raise UsageError(f"{given} does not divide the {sequences} {what} of a process")


def saved_args(checkpoint: dict, run_dir: str | Path) -> Args:
    """The Args of a checkpoint. A flag that is younger than it stands as it was before there was a choice.

    UsageError: the run has a form of generated weights that this version no longer has.
    """
    form = checkpoint["args"]["hyper"]
    if form not in ("none", *FORMS):
        raise UsageError(
            f"{run_dir}: this version has no --hyper {form}, which it was trained with: "
            f"take the version that made it, or train anew with one of {', '.join(FORMS)}"
        )
    as_before = {"critic_obs": False, "team_spirit": 0.0, "update_epochs": 4, "final_ent_coef": None}
    if individual_kwargs(checkpoint["spec"]["env_id"]):
        as_before["team_spirit"] = 1.0  # the env paid everyone the mean
    return restore_args(Args, {**as_before, **checkpoint["args"]}, run_dir)


def run_folder(name: str, path: str) -> Path:
    """The folder of a run that --name gives as it is or by its latest.pt. UsageError: another file."""
    folder = Path(path)
    if folder.name == "latest.pt" and folder.is_file():
        return folder.parent
    if folder.is_file():
        raise UsageError(f"{flag(name)} expects a run folder (or the latest.pt in it), got the file {path}: give one")
    return folder


def saved_run(args: Args) -> tuple[Args, list[str]] | None:
    """Of the run folder that the flags name: its Args, the defaults of all others, and what they must not change."""
    if args.evaluate and (args.resume or args.init_from):
        raise UsageError("--evaluate trains nothing, --resume and --init-from do: give one of them")
    run_dir = args.resume or args.evaluate or args.init_from
    if not run_dir:
        return None
    checkpoint = load_checkpoint(run_dir, CHECKPOINT_FORMAT)
    saved = saved_args(checkpoint, run_dir)
    if args.resume:
        return saved, FIXED_BY_CHECKPOINT
    if args.evaluate:
        return saved, [name for name in FIXED_BY_CHECKPOINT if name != "partners"]
    architecture = {name: getattr(saved, name) for name in ARCHITECTURE}
    return replace(Args(), **architecture), ARCHITECTURE


# -------------------------------------------------------------------------------- parts of a training run


def seed_everything(args: Args) -> None:
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic


def env_spec(env: VecEnv) -> dict:
    """What the networks need to know of an env; saved in the checkpoint. UsageError: other kinds of actions."""
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    if isinstance(env.action_space, gym.spaces.MultiDiscrete):
        nvec = env.action_space.nvec.tolist()
        parts, discrete, num_actions = {"nvec": nvec}, True, sum(nvec)
    elif isinstance(env.action_space, gym.spaces.Box):
        parts, num_actions = {}, env.action_space.shape[0]
    elif discrete:
        parts, num_actions = {}, env.action_space.n
    else:
        raise UsageError(f"expected actions Discrete, MultiDiscrete or Box, got {env.action_space}: wrap {env.env_id}")
    return {
        "env_id": env.env_id,
        "num_agents": env.num_agents,
        "obs_shape": list(env.obs_shape),
        "obs_scale": env.obs_scale,
        "state_shape": list(env.state_shape),
        "state_scale": env.state_scale,
        "discrete": discrete,
        "num_actions": int(num_actions),
        **parts,  # nvec: how many options each part of an action has
    }


def training_env(checked: CheckedEnv, args: Args) -> CheckedEnv:
    """The env that is trained on: below a team spirit of 1 one that pays every agent for itself, where it can.

    Whoever names the argument in --env-kwargs decides.
    """
    individual = checked.individual_kwargs or {}
    decided = individual.keys() & checked.env_kwargs.keys()
    if args.team_spirit == 1 or decided:
        return checked
    return replace(checked, env_kwargs={**checked.env_kwargs, **individual})


def count_multiplications(spec: dict, args: Args) -> int:
    """Multiply-adds of all matrix products in one forward of actor and critic, per agent and env step."""
    T, A = 8, spec["num_agents"]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        actor, critic = Actor(spec, args), Critic(spec, args)
        inputs = {
            "obs": torch.zeros(T, 1, A, *spec["obs_shape"]),
            "active": torch.ones(T, 1, A, dtype=torch.bool),
            "starts": torch.zeros(T, 1, dtype=torch.bool),
            "hidden": torch.zeros(1, 1, A, actor.hidden_size),
        }
        if actor.subgoals:
            inputs["z"] = torch.zeros(T, 1, A, actor.num_subgoals)
        state = torch.zeros(T, 1, *spec["state_shape"])
        total = count_multiply_adds(lambda: actor(**actor_inputs(inputs)))
        total += count_multiply_adds(lambda: critic(state, inputs["obs"]))
    return total // (T * A)


def torchrun_place() -> tuple[int, int]:
    """This process' number, and how many there are: 0 and 1 without torchrun."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    return rank, world_size


def join_processes(device: torch.device) -> torch.device:
    """Meets the other processes of torchrun: -> this one's device"""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Its functions take the group that there is at import as a default argument. Imported later, as Adam does, they
    # would keep it, and with it its threads, beyond destroy_process_group: a rank that ends then can abort.
    importlib.import_module("torch.distributed.nn")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def split_parameters(actor: Actor) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The actor's own parameters, and those of context and hypernetwork."""
    base_params, hyper_params = [], []
    for name, param in actor.named_parameters():
        generates = name.startswith(("context.", "hyper."))
        (hyper_params if generates else base_params).append(param)
    return base_params, hyper_params


def make_optimizer(actor: Actor, critic: Critic, args: Args) -> torch.optim.Optimizer:
    """Adam over everything; context and hypernetwork have a learning rate of their own."""
    base_params, hyper_params = split_parameters(actor)
    groups = [{"params": [*base_params, *critic.parameters()], "initial_lr": args.learning_rate}]
    if hyper_params:
        groups.append({"params": hyper_params, "initial_lr": args.hyper_learning_rate})
    return torch.optim.Adam(groups, lr=args.learning_rate, eps=1e-5, fused=True)


def follow_schedules(
    optimizer: torch.optim.Optimizer,
    ent_coef: Tensor,
    args: Args,
    update: int,
    num_updates: int,
) -> None:
    """Sets learning rates and the weight of the entropy bonus for an update; both fall linearly, if at all."""
    left = 1 - (update - 1) / num_updates
    for group in optimizer.param_groups:
        group["lr"] = (left if args.anneal_lr else 1.0) * group["initial_lr"]
    # DEVIATION: MAPPO's entropy bonus is constant.
    if args.final_ent_coef is not None and args.final_ent_coef < args.ent_coef:
        ent_coef.fill_(args.final_ent_coef + left * (args.ent_coef - args.final_ent_coef))


def make_loss_function(
    actor: Actor,
    critic: Critic,
    ent_coef: Tensor,
    args: Args,
) -> Callable:
    """ppo_loss with the weight of the entropy bonus as a tensor, whose changes need no compilation."""
    function = compile_networks(actor, critic, ent_coef.device) if args.compile else ppo_loss
    return functools.partial(function, ent_coef=ent_coef)


def compile_networks(actor: Actor, critic: Critic, device: torch.device) -> Callable:
    """torch.compile for acting and updating, with CUDA graphs on a GPU: -> ppo_loss, compiled where that works"""
    if not compile_works(device):
        return ppo_loss
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    actor.compile(mode=mode)
    critic.compile(mode=mode)
    return torch.compile(ppo_loss, mode=mode)


def start_from(
    args: Args,
    spec: dict,
    actor: Actor,
    critic: Critic,
    value_norm: ValueNorm,
) -> None:
    """--init-from: takes over weights and value statistics. UsageError: of another env or architecture."""
    checkpoint = load_checkpoint(args.init_from, CHECKPOINT_FORMAT)
    if checkpoint["spec"] != spec:
        raise UsageError(f"--init-from {args.init_from} is of env {checkpoint['spec']}, here it is {spec}")
    saved = with_form_sizes(saved_args(checkpoint, args.init_from))
    differ = [name for name in ARCHITECTURE if getattr(saved, name) != getattr(args, name)]
    if differ:
        given = ", ".join(f"{name} {getattr(args, name)} (it has {getattr(saved, name)})" for name in differ)
        raise UsageError(f"--init-from {args.init_from} contradicts {given}: use the same")
    load_weights(actor, checkpoint["actor"], args.init_from)
    load_weights(critic, checkpoint["critic"], args.init_from)
    load_weights(value_norm, checkpoint["value_norm"], args.init_from)


def free_memory(device: torch.device) -> float:
    """Bytes that a program could still get; infinite where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        return 1024 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return math.inf


def check_memory(args: Args, envs: VecEnv, actor: Actor) -> None:
    """UsageError: the rollout of this process would not fit into memory."""
    A = envs.num_agents
    numbers = actor.hidden_size / args.chunk_length + actor.num_subgoals
    numbers += 2 * env_spec(envs)["num_actions"] + 2 * math.prod(envs.action_space.shape)
    per_agent = math.prod(envs.obs_shape) * envs.obs_dtype.itemsize + 4 * numbers + 40  # what record() and GAE keep
    per_env = A * per_agent + math.prod(envs.state_shape) * envs.state_dtype.itemsize
    size = args.num_steps * envs.num_envs * per_env
    if args.chunk_length > 1:
        size *= 2  # reordered as sequences it is a copy
    free = free_memory(envs.device)
    if size > free:
        raise UsageError(
            f"a rollout would take {size / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free: "
            f"lower --num-envs {args.num_envs} or --num-steps {args.num_steps}"
        )


def process_state(envs: VecEnv, in_flight: list[Tensor], partners: Partners) -> dict:
    """What a process has for itself, on the CPU: its envs, the episodes in flight, random numbers.

    in_flight: memory, target_hidden, starts
    """
    on_gpu = envs.device.type == "cuda"
    cuda_rng = torch.cuda.get_rng_state() if on_gpu else None
    state = {
        "env_state": envs.state_dict(),
        "episodes": in_flight,
        "partner_memories": partners.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": cuda_rng,
    }
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, state)


def to_device(x: Any, device: torch.device) -> Any:
    """Lists and dicts of tensors, moved there."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), x)


def save_run(content: dict, parts: dict, run_dir: Path) -> None:
    """latest.pt: the content, and networks, statistics and optimizer."""
    parameters = {name: part.state_dict() for name, part in parts.items()}
    save_checkpoint({"format": CHECKPOINT_FORMAT, **content, "target": None, **parameters}, run_dir / "latest.pt")


def restore_parts(
    checkpoint: dict,
    parts: dict,
    spec: dict,
    run_dir: str,
) -> None:
    """Networks, statistics and optimizer as they were saved. UsageError: of another env."""
    if checkpoint["spec"] != spec:
        raise UsageError(f"{run_dir} is of env {checkpoint['spec']}, here it is {spec}: install its version")
    for name, part in parts.items():
        saved = checkpoint[name] or checkpoint["actor"]  # (a run without a target may go on with one)
        load_weights(part, saved, run_dir)


def state_of_rank(states: list[dict], rank: int, world_size: int) -> dict | None:
    """What this process saved; None where there were more or fewer of them."""
    return states[rank] if len(states) == world_size else None


def restore_rng(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch_rng"].cpu())
    if device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"].cpu())


def any_process(wanted: bool, device: torch.device) -> bool:
    """Whether one of the processes wants it."""
    if not distributed.is_initialized():
        return wanted
    return bool(all_sum(torch.tensor(float(wanted), device=device)))


def of_all_processes(x: Any, world_size: int) -> list[Any]:
    """x of every process, in the order of ranks."""
    if world_size == 1:
        return [x]
    gathered = [None] * world_size
    distributed.all_gather_object(gathered, x)
    return gathered


def print_start(
    run_dir: Path,
    args: Args,
    envs: VecEnv,
    actor: Actor,
    critic: Critic,
    world_size: int,
) -> None:
    where = f"on {envs.device}"
    if world_size > 1:
        where += f" of {world_size} processes"
    if args.cuda and envs.device.type == "cpu":
        where += " (no CUDA device found)"
    base_params, hyper_params = split_parameters(actor)
    base = sum(p.numel() for p in base_params)
    hyper = sum(p.numel() for p in hyper_params)
    print(f"run      {run_dir}")
    print(f"env      {envs.env_id}, {envs.backend} backend, {args.num_envs} envs x {envs.num_agents} agents, {where}")
    print(f"weights  actor {base:,}, context and hypernetwork {hyper:,}, critic {num_parameters(critic):,}")
    cost = count_multiplications(env_spec(envs), args)
    print(f"cost     {cost:,} multiply-adds per agent and step, forward", flush=True)


def open_run(
    run_dir: Path,
    args: Args,
    columns: list[str],
    global_step: int,
) -> Metrics:
    """args.json, W&B where it is wanted, and metrics.csv. global_step: the last one of a resumed run, else 0."""
    write_json(run_dir / "args.json", asdict(args))
    if args.track:
        start_wandb(run_dir, args.wandb_project_name, args.wandb_entity, asdict(args))
    return Metrics(run_dir, "global_step", columns, asdict(args), global_step or None)


def record(rollout: Batch, t: int, num_steps: int, **tensors: Tensor | None) -> None:
    """rollout[name][t] = tensor, allocating [num_steps, *tensor.shape] the first time; None is left out."""
    for name, x in tensors.items():
        if x is None:
            continue
        if name not in rollout:
            rollout[name] = x.new_empty(num_steps, *x.shape)
        rollout[name][t] = x


def finished_episodes(step: EnvStep) -> Tensor:
    """How many episodes ended at this step and were won (NaN: nobody can win), sums of their lengths and of each seat's
    returns: [3 + A]"""
    over = step.episode_over.float()
    won = torch.full_like(over, math.nan) if step.success is None else step.success.float()
    sums = torch.stack([over.sum(), (over * won).sum(), (over * step.episode_lengths).sum()])
    return torch.cat([sums, over @ step.episode_returns])


def episode_metrics(sums: list[float], first_seat: int, seat_columns: list[str]) -> dict[str, float]:
    """Means over the episodes that ended in a rollout, from finished_episodes' sums; nothing where none did.

    first_seat: the seats before it learn; seat_columns: a tag for every seat, or none
    """
    num_ended, num_won, length_sum, *return_sums = sums
    if not num_ended:
        return {}
    learners_mean = sum(return_sums[:first_seat]) / first_seat
    metrics = {
        "charts/episodic_return": learners_mean / num_ended,
        "charts/episodic_length": length_sum / num_ended,
    }
    if not math.isnan(num_won):
        metrics["charts/success_rate"] = num_won / num_ended
    for tag, return_sum in zip(seat_columns, return_sums, strict=False):
        metrics[tag] = return_sum / num_ended
    return metrics


def make_batch(
    rollout: Batch,
    advantages: Tensor,
    returns: Tensor,
    value_norm: ValueNorm,
    actor: Actor,
) -> Batch:
    """What ppo_loss reads, of all steps: [T, N, ...], hidden [T/L, N, ...] before each sequence."""
    batch = select(rollout, "obs state action_mask active learns valued starts actions z hidden")
    batch["logprobs"] = log_prob(rollout["dists"], rollout["actions"], actor.discrete, actor.nvec)
    batch["advantages"] = advantages
    batch["returns"] = value_norm.normalize(returns)
    batch["values"] = value_norm.normalize(rollout["values"])
    batch["anchor_dists"] = rollout["dists"]
    return batch


def select(rollout: Batch, names: str) -> Batch:
    """Those of the named tensors that the rollout has."""
    return {name: rollout[name] for name in names.split() if name in rollout}


def first_envs(batch: Batch) -> Batch:
    """A few envs of a batch [T, N, ...], as copies."""
    few = {}
    for name, x in batch.items():
        few[name] = x[:, :PROBE_ENVS].clone()
    return few


def policy_change(actor: Actor, probe: Batch, learners: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL(before || now) of the learners in the probe's steps, and the distributions of now."""
    with torch.no_grad():
        dists, _, _ = actor(**actor_inputs(probe))
    changes = kl_divergence(probe["dists"], dists, actor.discrete)
    return masked_mean(changes, probe["active"] & learners), dists


def steps_per_second(clock: deque[tuple[float, int]]) -> dict[str, float]:
    """clock: (time, global_step) after each of the last updates; nothing yet after the first one"""
    if len(clock) < 2:
        return {}
    first_time, first_step = clock[0]
    last_time, last_step = clock[-1]
    return {"charts/SPS": (last_step - first_step) / (last_time - first_time)}


def to_floats(metrics: Batch) -> dict[str, float]:
    """Scalars as numbers, with one look at the device."""
    values = torch.stack(list(metrics.values())).tolist()
    return dict(zip(metrics, values, strict=True))


def refuse_non_finite(
    metrics: dict[str, float],
    rollout: Batch,
    agents: list[str],
    update: int,
) -> None:
    """FloatingPointError where training broke down, that names the reward or observation where it was one."""
    bad = [f"{name} is {x}" for name, x in metrics.items() if not math.isfinite(x)]
    if not bad:
        return
    for name, what in (("rewards", "reward"), ("obs", "observation")):
        x = rollout[name]
        if x.is_floating_point() and not x.isfinite().all():
            finite = x.flatten(2).unflatten(-1, (len(agents), -1)).isfinite().all(-1)  # [T, N, A]
            t, n, i = (~finite).nonzero()[0].tolist()
            bad = [f"the {what} of {agents[i]} is NaN or infinite (env {n}, step {t} of the rollout): correct the env"]
            break
    raise FloatingPointError(f"update {update}: {', '.join(bad)}")


def progress_bar(total: int, initial: int, logs: bool) -> tqdm:
    no_bar = None if logs else True  # None: none where there is no terminal
    return tqdm(total=total, initial=initial, unit="step", unit_scale=True, disable=no_bar)


def show_progress(progress: tqdm, num_steps: int, row: dict[str, float]) -> None:
    if "charts/episodic_return" in row:
        progress.set_postfix_str(f"return {row['charts/episodic_return']:.2f}")
    progress.update(num_steps)


def plot_returns(run_dir: Path) -> None:
    """learning_curve.png from metrics.csv: the episodic return over env steps."""
    rows = [row for row in read_metrics(run_dir) if row["charts/episodic_return"]]
    steps = [int(row["global_step"]) for row in rows]
    returns = [float(row["charts/episodic_return"]) for row in rows]
    panel = Panel(run_dir.name, "episodic return (mean over agents)", {"return": returns})
    plot_learning_curve(run_dir / "learning_curve.png", steps, "env steps", [panel])


# --------------------------------------------------------------------------------------------------- main


@run_keeping
def main(args: Args) -> Path:
    """Trains, resumes or only evaluates, as one process or as torchrun's many: -> the run folder. Raises UsageError."""
    # ---- arguments
    if args.evaluate:
        return evaluate_only(args)
    rank, world_size = torchrun_place()
    device = get_device(args.cuda)
    resolved, checked = check_args(args, device, world_size)
    T, N = resolved.num_steps, resolved.num_envs // world_size
    batch_size = T * resolved.num_envs  # env steps of one rollout, of all processes
    num_updates = resolved.total_timesteps // batch_size

    # ---- logging: by the first process only; its folder is made when nothing can be refused any more
    logs = rank == 0
    run_dir, checkpoint, kept = Path("."), None, None
    if args.resume:
        run_dir = run_folder("resume", args.resume)
        if logs:
            kept = keep_folder(run_dir, command(__file__, "--resume", run_dir))
        checkpoint = load_checkpoint(run_dir, CHECKPOINT_FORMAT, needs=SAVED)
    clock: deque[tuple[float, int]] = deque(maxlen=11)  # (time, global_step) after the last updates: windowed SPS

    # ---- seeding
    seed_everything(resolved)
    keep_freed_memory()
    torch.set_num_threads(resolved.num_threads)
    num_parts, num_threads = resolved.update_threads, [resolved.num_threads]
    threads = ThreadPoolExecutor(num_parts, initializer=torch.set_num_threads, initargs=num_threads)
    if world_size > 1:
        device = join_processes(device)

    # ---- envs
    env_seed = resolved.seed + rank * N
    how = resolved.backend, resolved.num_env_procs, resolved.env_timeout, resolved.episode_limit
    envs = make_vec_env(training_env(checked, resolved), N, device, env_seed, *how)
    spec, A = env_spec(envs), envs.num_agents
    partners = Partners(resolved.partners, envs, make_policy, env_seed, resolved.partner_switch)
    learners = partners.learners  # [A]

    # ---- networks
    actor = Actor(spec, resolved).to(device)
    critic = Critic(spec, resolved).to(device)
    value_norm = ValueNorm(resolved.value_norm).to(device)
    L = resolved.chunk_length if actor.sequential else 1  # steps of a training sequence
    optimizer = make_optimizer(actor, critic, resolved)
    if resolved.init_from and checkpoint is None:
        start_from(resolved, spec, actor, critic, value_norm)
    # What the KL penalty pulls towards; with an interval of 1 it is the policy that acted, whose output is at hand.
    target = None
    saved_parts = {"actor": actor, "critic": critic, "value_norm": value_norm, "optimizer": optimizer}
    if resolved.target_sync_interval > 1:
        target = saved_parts["target"] = copy.deepcopy(actor).requires_grad_(False)
    ent_coef = torch.tensor(resolved.ent_coef, device=device)
    loss_function = make_loss_function(actor, critic, ent_coef, resolved)

    # ---- storage
    check_memory(resolved, envs, actor)
    rollout: Batch = {}  # name -> [T, N, ...], allocated by the first step
    global_step, first_update = 0, 1
    memory = torch.zeros(N, A, actor.memory_size, device=device)  # the context's hidden state, the subgoals' history
    target_hidden = torch.zeros(N, A, actor.hidden_size, device=device)
    starts = torch.ones(N, dtype=torch.bool, device=device)  # step.obs opens an episode
    probe: Batch = {}  # a few envs of the first rollout, to see how the policy changes

    # ---- resume
    if world_size > 1:
        torch.manual_seed(resolved.seed + 1_000_003 * rank)  # equal weights so far, different actions from now on
    own_state = None
    if checkpoint is not None:
        restore_parts(checkpoint, saved_parts, spec, run_dir)
        probe = to_device(checkpoint["probe"], device)
        global_step, first_update = checkpoint["global_step"], checkpoint["update"] + 1
        own_state = state_of_rank(checkpoint["workers"], rank, world_size)
    if own_state is not None and own_state["env_state"] is not None:
        step = envs.load_state_dict(own_state["env_state"])
        memory, target_hidden, starts = to_device(own_state["episodes"], device)
        partners.load_state_dict(to_device(own_state["partner_memories"], device))
    else:
        if checkpoint is not None and logs:
            print("the episodes in flight cannot be restored: new ones start, from a seed of their own")
        step = envs.reset(env_seed + global_step)
    if own_state is not None:
        restore_rng(own_state, device)
    seat_columns = [f"charts/return_seat_{i}" for i in range(A)] if resolved.partners else []
    if logs:
        if not args.resume:
            run_dir = new_run_dir(resolved.runs_dir, resolved.env_id, resolved.exp_name, resolved.seed)
            kept = keep_folder(run_dir, command(__file__, "--resume", run_dir))
        elif first_update > 1:
            kept.saved = f"update {first_update - 1} of {num_updates}"
        table = open_run(run_dir, resolved, COLUMNS + seat_columns + partners.columns(), global_step)
        print_start(run_dir, resolved, envs, actor, critic, world_size)
    stop = StopSignal()
    parent = os.getppid()  # torchrun's agent, without which nobody shall train on
    progress = progress_bar(num_updates * batch_size, global_step, logs)

    def save(update: int) -> None:
        """latest.pt after that update; all processes call it together."""
        own_state = process_state(envs, [memory, target_hidden, starts], partners)
        states = of_all_processes(own_state, world_size)
        if logs:
            table.sync()
            counters = {"update": update, "global_step": global_step}
            content = {"args": asdict(resolved), "spec": spec, **counters, "workers": states, "probe": probe}
            save_run(content, saved_parts, run_dir)
            kept.saved = f"update {update} of {num_updates}"

    # ---- loop (of a finished run that is resumed only the closing part is left)
    update, stopping = first_update - 1, False
    for update in range(first_update, num_updates + 1):
        follow_schedules(optimizer, ent_coef, resolved, update, num_updates)
        if target and (update - 1) % resolved.target_sync_interval == 0:
            target.load_state_dict(actor.state_dict())
            target_hidden = memory[..., : actor.hidden_size]

        # -- rollout: T steps of N envs
        partners.start_update(update)
        episode_sums = torch.zeros(3 + A, device=device)  # see finished_episodes
        member_sums = torch.zeros(len(partners.names), 3, device=device)
        try:
            for t in range(T):
                actions, dists, z, next_memory = act(actor, step, starts, memory)
                values = state_values(critic, value_norm, step.state, step.obs)
                actions = partners.play(step, actions)
                record(rollout, t, T, obs=step.obs, state=step.state)
                record(rollout, t, T, action_mask=step.action_mask, active=step.active, starts=starts)
                record(rollout, t, T, actions=actions, dists=dists, values=values, z=z)
                if t % L == 0:
                    record(rollout, t // L, T // L, hidden=memory[..., : actor.hidden_size])
                memory = remember(actor, step, actions, next_memory)
                step = envs.step(actions)
                starts = step.episode_over
                # An episode cut by the time limit still has a value: that of its true last state, not of the next
                # episode's first. (Asking whether there is one is free on a CPU and would stall an accelerator.)
                cut_values = torch.zeros_like(values)
                if resolved.bootstrap_time_limit and (device.type != "cpu" or step.truncations.any()):
                    cut_values = state_values(critic, value_norm, step.final_state, step.final_obs)
                ended = step.terminations | ~step.active | step.episode_over.unsqueeze(-1)  # [N, A]
                record(rollout, t, T, rewards=step.rewards, terminations=step.terminations, ended=ended)
                record(rollout, t, T, episode_over=starts, truncations=step.truncations, cut_values=cut_values)
                episode_sums += finished_episodes(step)
                if resolved.partners:
                    member_sums += partners.member_sums(step)
        except RunError:  # the env broke down, but the last update is whole
            if world_size == 1 and update > first_update:
                save(update - 1)
            raise
        global_step += batch_size

        # -- advantages
        rollout["learns"], rollout["valued"] = who_learns(rollout["active"], learners, resolved.team_spirit)
        last_values = state_values(critic, value_norm, step.state, step.obs)  # [N, A]
        advantages, returns, moments, explained_var = learning_targets(rollout, last_values, learners, resolved)
        value_norm.update(*moments)  # DEVIATION: once per rollout, before its epochs, not once per minibatch

        # -- the batch [T, N, ...], and what it tells of the others' learning
        batch = make_batch(rollout, advantages, returns, value_norm, actor)
        if target:
            with torch.no_grad():
                batch["anchor_dists"], _, target_hidden = target(**{**actor_inputs(batch), "hidden": target_hidden})
        if not probe:
            probe = first_envs(select(rollout, "obs action_mask active starts hidden z dists"))
        metrics: Batch = {}
        if update % GRADIENT_COSINE_EVERY == 0:
            with torch.compiler.set_stance("force_eager"):  # compiled functions allow one backward pass only
                metrics["nonstationarity/gradient_cosine"] = gradient_cosine(actor, first_envs(batch), resolved)

        # -- update: minibatches of sequences [L, S]; where no context needs the order, a sequence is a single step
        sequences = to_sequences(batch, L)
        sums, num_done = 0.0, 0
        for _ in range(resolved.update_epochs):
            for mb_inds in torch.randperm(T * N // L, device=device).chunk(resolved.num_minibatches):
                optimizer.zero_grad()
                if num_parts == 1:
                    loss, numbers = loss_function(actor, critic, take_sequences(sequences, mb_inds), resolved)
                    loss.backward()
                else:
                    parts = mb_inds.chunk(num_parts)
                    numbers = backward_in_threads(loss_function, actor, critic, sequences, parts, resolved, threads)
                average_gradients([*actor.parameters(), *critic.parameters()])
                # DEVIATION: one Adam for both, but gradients are clipped apart.
                grad_norm = nn.utils.clip_grad_norm_(actor.parameters(), resolved.max_grad_norm)
                nn.utils.clip_grad_norm_(critic.parameters(), resolved.max_grad_norm)
                optimizer.step()
                numbers["losses/grad_norm"] = grad_norm
                sums = sums + torch.stack(list(numbers.values()))
                num_done += 1
            if resolved.target_kl is not None and mean_of_all(numbers["losses/approx_kl"]) > resolved.target_kl:
                break
        if resolved.norm_obs:  # now, so that what was updated is the policy that acted
            update_obs_norms(actor, critic, rollout)
        metrics["nonstationarity/policy_kl"], probe["dists"] = policy_change(actor, probe, learners)

        # -- logging: the update's only look at the device
        metrics |= dict(zip(numbers, mean_of_all(sums) / num_done, strict=True))
        metrics["losses/explained_variance"] = explained_var
        metrics["charts/ent_coef"] = ent_coef
        row = to_floats(metrics)
        refuse_non_finite(row, rollout, envs.agents, update)
        row |= episode_metrics(all_sum(episode_sums).tolist(), partners.first_seat, seat_columns)
        if resolved.partners:
            row |= partners.member_metrics(all_sum(member_sums).tolist())
        row["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        clock.append((time.perf_counter(), global_step))
        row |= steps_per_second(clock)
        if logs:
            table.log(global_step, {"update": update, **row})
        show_progress(progress, batch_size, row)

        # -- checkpoint
        orphaned = world_size > 1 and os.getppid() != parent
        stopping = any_process(stop.requested or orphaned, device)  # all stop after the same update
        if update % resolved.save_every == 0 or update == num_updates or stopping:
            save(update)
        if stopping:
            break

    # ---- close
    stop.restore()
    progress.close()
    envs.close()
    threads.shutdown()
    if world_size > 1:
        distributed.destroy_process_group()
    if logs:
        table.close()
        plot_returns(run_dir)
    if logs and not stopping:
        evaluate_run(actor, resolved, checked, run_dir, device)
    elif logs:
        print(f"stopped after update {update} of {num_updates}; go on with: {kept.again}")
    return run_dir


def cli(argv: list[str] | None = None) -> int:
    """The command line: 0 done (or stopped and saved), 1 the run broke down, 2 unusable arguments."""
    return command_line(Args, main, LIMITS, argv, saved_run)


if __name__ == "__main__":
    sys.exit(cli())
