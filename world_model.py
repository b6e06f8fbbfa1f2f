"""Trains a world model: agent i's next observation, reward and exit from its observation and everyone's actions.

    (o_i[t], a_i[t], a_-i[t])  ->  o_i[t+1], r_i[t], done_i[t]

encoder -> dynamics(z, own action, others' actions) -> decoder, with heads for reward, exit and (where the env has
one) the action mask. Everything is seen from agent i: planes and actions are ordered self, i+1, i+2 ... mod A.

Papers: twohot reward head, Hafner et al. 2023 (arXiv 2301.04104); latent consistency against a slowly moving target
encoder, Schwarzer et al. 2021 (SPR, arXiv 2007.05929) after Grill et al. 2020 (BYOL, arXiv 2006.07733); sums instead
of means over a set of agents, Zaheer et al. 2017 (Deep Sets, arXiv 1703.06114). See docs/world_model.md.

    python collect_data.py --env-id stag_hunt --num-steps 50000 --policies nearest_stag nearest_hare random stay
    python world_model.py --data data/<name>
"""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dataset import SPLITS, Dataset, load_dataset, rotate_to_ego

CHECKPOINT_FORMAT = "world_model/2"


@dataclass
class Args:
    data: str = ""
    """dataset folder made by collect_data.py"""
    exp_name: str = "world_model"
    """name of this experiment, part of the run folder's name"""
    seed: int = 1
    """seed of the weights, the minibatches and the episode split"""
    torch_deterministic: bool = True
    """if set, only deterministic kernels are used"""
    cuda: bool = True
    """if set, a GPU is used where there is one"""
    track: bool = False
    """if set, the run is mirrored to Weights & Biases"""
    wandb_project_name: str = "hyper-marl"
    """project name at Weights & Biases"""
    wandb_entity: str | None = None
    """team name at Weights & Biases; None: your own"""
    runs_dir: str = "runs"
    """folder that receives the run's folder"""
    resume: str | None = None
    """run folder to continue; None: a new run. Flags that shape model or data must not contradict it"""
    total_updates: int = 2000
    """gradient steps"""
    batch_size: int = 256
    """samples (one agent's view of one env step) per gradient step"""
    learning_rate: float = 4e-3
    """peak learning rate of Adam"""
    anneal_lr: bool = True
    """if set, the learning rate falls linearly to 0 after a warm-up of 100 updates"""
    max_grad_norm: float = 10.0
    """the gradient's norm is clipped to this; inf: never"""
    max_samples: int | None = None
    """use only about this many env steps of the training episodes (whole episodes); None: all"""
    heldout_fraction: float = 0.1
    """share of the episodes that is held out for judging"""
    holdout_policies: tuple[str, ...] = ()
    """episodes in which one of these behaviour policies sat in any seat are held out as well"""
    hidden_size: int = 32
    """width: channels per cell of a grid, units for a vector"""
    loss: Literal["obs", "latent", "recon"] = "obs"
    """obs: prediction loss on the next observation; latent: consistency with the encoded next observation, the decoder
    trained on encodings; recon: auto-encoding obs -> obs, the control that knows no dynamics"""
    obs_head: Literal["mse", "bce", "categorical"] | None = None
    """mse: one real number per cell; bce: sigmoids (counts: one per 'at least k'); categorical: per one-agent plane
    which cell or none, per cell of other planes which count. None: categorical, or mse for real-valued observations"""
    joint_action: Literal["onehot", "painted", "attention"] | None = None
    """onehot: all agents' one-hots at every cell; painted: each action at its agent's cell (where planes show agents
    without saying who is who: the others' mean action at all of them); attention: cells attend to the set of (agent,
    action), summed so that counts survive. None: painted where the observation shows agents, else onehot"""
    reward_head: Literal["mse", "twohot"] = "twohot"
    """mse: one number; twohot: a distribution over bins (the training rewards themselves where there are at most 64)"""
    reward_target: Literal["reward", "td"] = "reward"
    """reward: r; td: r + gamma V(s') with the critic of `--critic`"""
    critic: str | None = None
    """run folder of hyper_mappo.py whose critic gives V, for `--reward-target td`; None: not used"""
    gamma: float = 0.99
    """discount in the td target"""
    balance_rewards: float | None = None
    """share of a minibatch that is drawn evenly over who is paid what, so that rare rewards are seen often; in a random
    game that biases what is likely. None: 0.25 where view and actions determine everything, else 0"""
    rollout_steps: int = 1
    """steps of the self-fed loss: from the second on the model reads its own prediction"""
    latent_tau: float = 0.01
    """step of the target encoder towards the encoder per update, `--loss latent` only"""
    eval_interval: int = 500
    """updates between evaluations on held-out episodes (and saves)"""
    eval_samples: int | None = 20_000
    """held-out samples of each kind that an evaluation looks at, drawn once; None: all. The judge looks at more"""


# What numbers must be. (heldout_fraction: see the dataset's split)
LIMITS = {
    "at least 1": (
        lambda x: x >= 1,
        "total_updates batch_size hidden_size rollout_steps eval_interval max_samples eval_samples",
    ),
    "at least 0": (lambda x: x >= 0, "learning_rate"),
    "more than 0": (lambda x: x > 0, "max_grad_norm"),
    "from 0 to 1": (lambda x: 0 <= x <= 1, "gamma balance_rewards latent_tau"),
    "from 0 to 2147483647": (lambda x: 0 <= x < 2**31, "seed"),
}
# What --resume refuses to change: the network, what it learns, and the order in which it sees the data.
FIXED_BY_CHECKPOINT = ("data", "seed", "hidden_size", "loss", "obs_head", "joint_action", "reward_head",
                       "reward_target", "critic", "gamma", "balance_rewards", "rollout_steps", "batch_size",
                       "max_samples", "heldout_fraction", "holdout_policies")  # fmt: skip
EVAL_TAGS = {"heldout_episodes": "eval", "heldout_policies": "eval_policies"}
LOSSES = ("obs_loss", "latent_loss", "reward_loss", "done_loss", "mask_loss")


# ---------------------------------------------------------------- what an observation's channels mean
@dataclass(frozen=True)
class ObsSpec:
    """Declared per environment, never guessed from data.

    names    one per channel
    kinds    one per channel: agent (one cell or none), binary, count, real
    ego      where agent i stands in its own view: plane (in channel 0), centre, or none (not a grid)
    team     the channel that counts all agents where there is no plane for each; None: there is none
    window   the view is a window that moves with its agent
    hunts    prey channel -> (action that hunts it, hunters needed on its cell)
    certain  view and joint action determine what comes next
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    ego: Literal["plane", "centre", "none"] = "none"
    team: int | None = None
    window: bool = False
    hunts: dict[str, tuple[int, int]] = field(default_factory=dict)
    certain: bool = False

    @property
    def agent_planes(self) -> list[int]:
        return [p for p, kind in enumerate(self.kinds) if kind == "agent"]


def describe_obs(meta: dict[str, Any]) -> ObsSpec:
    """The channels of one agent's observation [H, W, C] or [D], from a dataset's meta or a model's config.

    Raises ValueError for other shapes.
    """
    shape, players = meta["obs_shape"], range(1, meta["num_agents"])
    if "stag_hunt" in meta["env_id"]:
        names = ("self", *(f"player i+{k}" for k in players), "blocks", "stags", "hares")
        kinds = ("agent",) * meta["num_agents"] + ("binary",) * 3
        window = bool(meta["env_kwargs"].get("view"))
        hunts = {"stags": (5, 2), "hares": (6, 1)}
        return ObsSpec(names, kinds, "plane", window=window, hunts=hunts, certain=not window)
    if "pursuit" in meta["env_id"]:
        return ObsSpec(("walls", "pursuers", "evaders"), ("binary", "count", "count"), "centre", team=1, window=True)
    if len(shape) not in (1, 3):
        raise ValueError(f"expected observations [D] or [H, W, C], got shape {list(shape)}: flatten them first")
    names = tuple(f"{'channel' if len(shape) == 3 else 'dim'} {c}" for c in range(shape[-1]))
    return ObsSpec(names, ("count" if meta["obs_dtype"] == "uint8" else "real",) * shape[-1])


# ---------------------------------------------------------------- network
class WorldModel(nn.Module):
    """Agent i's world. `config` holds plain numbers and strings and is stored in the checkpoint.

    Grids [H, W, C] are worked on by convolutions, so that a rule learnt in one cell holds in all; a vector [D] is a
    1 x 1 grid of D channels. P planes, D hidden channels, n action dimensions, K levels (largest count) per cell.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        self.obs_shape, self.num_agents = tuple(config["obs_shape"]), config["num_agents"]
        self.action_dim, self.obs_head, self.loss = config["action_dim"], config["obs_head"], config["loss"]
        self.spec = describe_obs(config)
        self.obs_dtype = getattr(torch, config["obs_dtype"])
        grid = len(self.obs_shape) == 3
        self.height, self.width = self.obs_shape[:2] if grid else (1, 1)
        planes, hidden, kernel = self.obs_shape[-1], config["hidden_size"], 3 if grid else 1
        self.levels = 1 if self.obs_head == "mse" else config["levels"]
        joint = self.num_agents * self.action_dim  # channels that carry the joint action
        if config["joint_action"] == "painted" and not self.spec.agent_planes:
            joint = 2 * self.action_dim
        if config["joint_action"] == "attention":
            self.query = nn.Conv2d(hidden, hidden, 1)
            self.token = nn.Sequential(nn.Linear(self.num_agents + self.action_dim, 2 * hidden), nn.ReLU())
            self.key = nn.Linear(2 * hidden, hidden)
            self.value = nn.Linear(2 * hidden, hidden)
            joint = hidden
        self.encoder = nn.Sequential(  # the extra plane of ones lets the zero padding mark the border
            nn.Conv2d(planes + 1, hidden, kernel, padding=kernel // 2), nn.ReLU(), nn.Conv2d(hidden, hidden, 1)
        )
        self.mix = nn.Conv2d(hidden + joint, hidden, 1)
        self.ego = nn.Linear(hidden, hidden)
        self.move = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2)
        self.next_latent = nn.Conv2d(hidden, hidden, 1)
        self.shift = nn.Conv2d(planes + joint, hidden, kernel, padding=kernel // 2)
        if self.spec.window:
            self.follow = nn.Linear(hidden, kernel**2)
            cells = self.height * self.width
            self.enter = nn.Sequential(
                nn.Linear(planes * cells + kernel**2, 128), nn.ReLU(), nn.Linear(128, hidden * cells)
            )
        self.decoder = nn.Sequential(nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU())
        self.decoder.append(nn.Conv2d(hidden, planes * self.levels, 1))
        self.num_bins = len(config["reward_bins"]) if config["reward_head"] == "twohot" else 1
        choices = self.action_dim if config["discrete"] else 1  # one output for each own action
        summary = 3 * hidden + planes + joint
        self.reward_head = nn.Sequential(nn.Linear(summary, 2 * hidden), nn.ReLU())
        self.reward_head.append(nn.Linear(2 * hidden, choices * self.num_bins))
        self.done_head = nn.Sequential(nn.Linear(summary, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        if config["has_mask"]:  # legality is a function of the observation: read from it, not from the transition
            self.mask_head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, self.action_dim))
        self.register_buffer("reward_bins", torch.tensor(config["reward_bins"], dtype=torch.float32))
        self.register_buffer("obs_mean", torch.tensor(config["obs_mean"]).view(1, -1, 1, 1))
        self.register_buffer("obs_std", torch.tensor(config["obs_std"]).view(1, -1, 1, 1))

    def to_planes(self, obs: torch.Tensor) -> torch.Tensor:
        """[B, *O] -> [B, P, H, W] float32."""
        return obs.float().view(len(obs), self.height, self.width, -1).permute(0, 3, 1, 2)

    def from_planes(self, planes: torch.Tensor) -> torch.Tensor:
        """[B, P, H, W] -> [B, *O] float32."""
        return planes.permute(0, 2, 3, 1).reshape(len(planes), *self.obs_shape)

    def normalise(self, planes: torch.Tensor) -> torch.Tensor:
        return (planes - self.obs_mean) / self.obs_std

    def encode(self, planes: torch.Tensor, encoder: nn.Module | None = None) -> torch.Tensor:
        """[B, P, H, W] -> z [B, D, H, W], by another encoder if one is given (the target of `--loss latent`)."""
        x = self.normalise(planes)
        return (encoder or self.encoder)(torch.cat([x, torch.ones_like(x[:, :1])], 1))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """z [B, D, H, W] -> logits (mse: normalised values) [B, P, K, H, W]."""
        if self.loss == "latent":  # the consistency loss compares directions only, so only they may be read
            z = F.normalize(z, dim=1) * z.shape[1] ** 0.5
        return self.decoder(z).view(len(z), -1, self.levels, self.height, self.width)

    def at_ego(self, x: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
        """Features of the cell agent i stands on: x [B, D, H, W] -> [B, D]; the mean where there is no such cell."""
        if self.spec.ego == "plane":
            return (x * planes[:, :1]).sum((2, 3))
        if self.spec.ego == "centre":
            return x[:, :, self.height // 2, self.width // 2]
        return x.mean((2, 3))

    def joint_features(self, z: torch.Tensor, planes: torch.Tensor, joint_action: torch.Tensor) -> torch.Tensor:
        """The joint action (ego first) as planes [B, J, H, W]."""
        B, A, n = len(z), self.num_agents, self.action_dim
        acts = joint_action  # [B, A, n], or [B, A] with -1 for agents that have left
        if self.config["discrete"]:
            acts = F.one_hot(acts.clamp(min=0), n).float() * (acts >= 0).unsqueeze(2)
        if self.config["joint_action"] == "painted":
            if self.spec.agent_planes:
                agents = planes[:, self.spec.agent_planes]  # [B, A, H, W]
            else:  # who of the team stands where is unknown: everyone seen gets the mean of the others' actions
                own = torch.zeros_like(planes[:, :1])
                own[:, 0, self.height // 2, self.width // 2] = 1.0
                agents = torch.cat([own, planes[:, self.spec.team, None] - own], 1)  # [B, 2, H, W]
                acts = torch.stack([acts[:, 0], acts[:, 1:].mean(1)], 1)  # [B, 2, n]
            return torch.einsum("ban,bahw->banhw", acts, agents).flatten(1, 2)  # [B, A * n, H, W]
        if self.config["joint_action"] == "onehot":
            return acts.view(B, A * n, 1, 1).expand(-1, -1, self.height, self.width)
        tokens = self.token(torch.cat([torch.eye(A, device=z.device).expand(B, A, A), acts], 2))  # [B, A, 2 * D]
        query = self.query(z).flatten(2)  # [B, D, H * W]
        # DEVIATION: sigmoid gates and a sum where attention has a softmax: two hunters must not look like one.
        gates = torch.sigmoid(self.key(tokens) @ query / query.shape[1] ** 0.5)  # [B, A, H * W]
        if self.config["discrete"]:
            gates = gates * acts.sum(2, keepdim=True)  # who has left adds nothing
        return (self.value(tokens).transpose(1, 2) @ gates).view(B, -1, self.height, self.width)  # [B, D, H, W]

    def forward(self, planes: torch.Tensor, joint_action: torch.Tensor) -> dict[str, torch.Tensor]:
        """planes [B, P, H, W], joint_action [B, A] int64 or [B, A, n] float, ego first -> raw outputs of all heads."""
        z = self.encode(planes)  # [B, D, H, W]
        joint = self.joint_features(z, planes, joint_action)  # [B, J, H, W]
        x = self.mix(torch.cat([z, joint], 1))
        x = F.relu(x + self.ego(F.relu(self.at_ego(x, planes)))[:, :, None, None])  # every cell hears of agent i
        x = F.relu(self.move(x))  # [B, D, H, W]
        # Moving is linear in painted actions; the direct path learns it within a few hundred updates, and leaves
        # blocking, hunting and leaving to the layers above.
        shown = torch.cat([self.normalise(planes), joint], 1)  # [B, P + J, H, W]
        next_z = self.next_latent(x) + self.shift(shown)
        if self.spec.window:
            # Agent i's own step moves the whole view: one 3 x 3 kernel per sample, the same for all channels. What
            # comes in at the border is guessed from the whole view (the map's shape tells much of it).
            kernel = F.softmax(self.follow(self.at_ego(x, planes)), 1)  # [B, 9]
            patches = F.unfold(next_z, 3, padding=1).unflatten(1, (-1, 9))  # [B, D, 9, H * W]
            enters = self.enter(torch.cat([self.normalise(planes).flatten(1), kernel], 1))
            next_z = torch.einsum("bdkc,bk->bdc", patches, kernel).view_as(next_z) + enters.view_as(next_z)
        # What agent i is paid is decided on its cell: who does what there, as it is.
        summary = [self.at_ego(x, planes), x.mean((2, 3)), x.amax((2, 3)), self.at_ego(shown, planes)]
        summary = torch.cat(summary, 1)  # [B, 3 * D + P + J]
        rewards = self.reward_head(summary).view(len(z), -1, self.num_bins)  # [B, n or 1, bins]
        if self.config["discrete"]:  # what hunting pays must not rub off on moving
            own = joint_action[:, :1, None].clamp(min=0).expand(-1, -1, self.num_bins)
            rewards = rewards.gather(1, own)  # [B, 1, bins]
        out = {"z": z, "next_z": next_z, "reward": rewards[:, 0], "done": self.done_head(summary)[:, 0]}
        out["obs"] = self.decode(z if self.loss == "recon" else next_z)  # [B, P, K, H, W]
        if self.config["has_mask"]:
            out["mask"] = self.mask_head(self.at_ego(F.relu(z), planes))  # [B, n]
        return out

    def expected_planes(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, P, K, H, W] -> expected value of every cell [B, P, H, W]."""
        if self.obs_head == "mse":
            return logits[:, :, 0] * self.obs_std + self.obs_mean
        if self.obs_head == "bce":  # sum of P(count >= k)
            return torch.sigmoid(logits).sum(2)
        counts = torch.arange(1, self.levels + 1, device=logits.device).view(1, 1, -1, 1, 1)
        expected = (F.softmax(F.pad(logits, (0, 0, 0, 0, 1, 0)), 2)[:, :, 1:] * counts).sum(2)
        agents = self.spec.agent_planes
        if agents:
            cells = F.pad(logits[:, agents, 0].flatten(2), (0, 1))  # [B, A, H * W + 1], the last is "none": logit 0
            expected[:, agents] = F.softmax(cells, 2)[..., :-1].unflatten(2, (self.height, self.width))
        return expected

    def snap(self, planes: torch.Tensor) -> torch.Tensor:
        """Expected values -> a possible observation [B, P, H, W]: counts rounded; an agent that is present with
        probability over one half stands on its likeliest cell (a threshold per cell would make it vanish)."""
        if "real" in self.spec.kinds:
            return planes
        snapped = planes.round().clamp(0, 255)
        agents = self.spec.agent_planes
        if agents:
            cells = planes[:, agents].flatten(2)  # [B, A, H * W]
            where = F.one_hot(cells.argmax(2), cells.shape[2]) * (cells.sum(2, keepdim=True) > 0.5)
            snapped[:, agents] = where.unflatten(2, (self.height, self.width)).float()
        return snapped

    def reward_value(self, out: torch.Tensor) -> torch.Tensor:
        """Output of the reward head [B, bins] -> [B]."""
        return out[:, 0] if self.config["reward_head"] == "mse" else F.softmax(out, 1) @ self.reward_bins

    def check_inputs(self, obs: torch.Tensor, actions: torch.Tensor, dims: int) -> None:
        """Raises ValueError where obs is not [B, *O] or the actions are not [B, (H,) A(, n)]; dims counts B and H."""
        expected = (self.num_agents,) if self.config["discrete"] else (self.num_agents, self.action_dim)
        if tuple(obs.shape[1:]) != self.obs_shape or tuple(actions.shape[dims:]) != expected:
            raise ValueError(
                f"expected obs [B, {', '.join(map(str, self.obs_shape))}] and actions with last axes {list(expected)}, "
                f"got {list(obs.shape)} and {list(actions.shape)}: pass agent i's view and the joint action, ego first"
            )

    @torch.no_grad()
    def predict(self, obs: torch.Tensor, joint_action: torch.Tensor, with_mask: bool = True) -> dict[str, torch.Tensor]:
        """All there is to know: next_obs and expected_obs [B, *O], reward [B], done [B] bool, done_prob [B], and
        action_mask [B, n] bool (legal in next_obs) where the env has masks. Inputs as in `step`."""
        self.check_inputs(obs, joint_action, 1)
        out = self(self.to_planes(obs), joint_action)
        expected = self.expected_planes(out["obs"])
        snapped = self.snap(expected)
        result = {
            "next_obs": self.from_planes(snapped).to(self.obs_dtype),
            "expected_obs": self.from_planes(expected),
            "reward": self.reward_value(out["reward"]),
            "done": out["done"] > 0,
            "done_prob": torch.sigmoid(out["done"]),
        }
        if self.config["has_mask"] and with_mask:
            result["action_mask"] = self.mask_head(self.at_ego(F.relu(self.encode(snapped)), snapped)) > 0
        return result

    def step(self, obs: torch.Tensor, joint_action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """obs [B, *O], joint_action [B, A] int64 (or [B, A, n] float), agent i first -> next_obs [B, *O] (snapped,
        in the observation's dtype), reward [B], done [B] bool: agent i's exit; next_obs means nothing where done."""
        out = self.predict(obs, joint_action, with_mask=False)
        return out["next_obs"], out["reward"], out["done"]

    def rollout(self, obs: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Imagines H steps open loop: obs [B, *O], actions [B, H, A(, n)] -> obs [B, H, *O], rewards [B, H],
        dones [B, H]. After its exit an agent sees zeros, is paid zero and stays done."""
        self.check_inputs(obs, actions, 2)
        over = torch.zeros(len(obs), dtype=torch.bool, device=obs.device)
        steps = []
        for t in range(actions.shape[1]):
            obs, reward, done = self.step(obs, actions[:, t])
            reward = reward * ~over
            over = over | done
            obs = obs * ~over.view(-1, *[1] * len(self.obs_shape))
            steps.append((obs, reward, over))
        return tuple(torch.stack(x, 1) for x in zip(*steps, strict=True))


# ---------------------------------------------------------------- losses
def obs_loss(model: WorldModel, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Loss of every sample, summed over planes and cells: logits [B, P, K, H, W], target [B, P, H, W] -> [B]."""
    if model.obs_head == "mse":
        return (logits[:, :, 0] - model.normalise(target)).square().sum((1, 2, 3))
    if model.obs_head == "bce":
        levels = torch.arange(1, model.levels + 1, device=target.device).view(1, 1, -1, 1, 1)
        at_least = (target.unsqueeze(2) >= levels).float()  # [B, P, K, H, W]
        return F.binary_cross_entropy_with_logits(logits, at_least, reduction="none").sum((1, 2, 3, 4))
    agents = model.spec.agent_planes
    others = [p for p in range(target.shape[1]) if p not in agents]
    classes = F.pad(logits[:, others], (0, 0, 0, 0, 1, 0)).transpose(1, 2)  # [B, K + 1, P', H, W]
    loss = F.cross_entropy(classes, target[:, others].long().clamp(max=model.levels), reduction="none").sum((1, 2, 3))
    if agents:
        cells = F.pad(logits[:, agents, 0].flatten(2), (0, 1))  # [B, A, H * W + 1]
        where = target[:, agents].flatten(2)  # [B, A, H * W]
        where = torch.cat([where, 1 - where.sum(2, keepdim=True)], 2).argmax(2)  # [B, A]
        loss = loss + F.cross_entropy(cells.transpose(1, 2), where, reduction="none").sum(1)
    return loss


def reward_loss(model: WorldModel, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """out [B, bins], target [B] -> [B]; twohot: cross-entropy with the two bins around the target (Hafner 2023)."""
    if model.config["reward_head"] == "mse":
        return (out[:, 0] - target).square()
    bins = model.reward_bins
    target = target.clamp(bins[0], bins[-1])
    above = torch.searchsorted(bins, target.contiguous()).clamp(1, len(bins) - 1)
    weight = ((target - bins[above - 1]) / (bins[above] - bins[above - 1]))[:, None]  # of the upper bin, [B, 1]
    logprobs = F.log_softmax(out, 1)
    upper, lower = logprobs.gather(1, above[:, None]), logprobs.gather(1, above[:, None] - 1)
    return -(weight * upper + (1 - weight) * lower)[:, 0]


def make_reward_bins(rewards: torch.Tensor) -> list[float]:
    """The distinct rewards themselves where there are at most 64 (a deterministic game: no rounding at all), else 63
    bins between the extremes, evenly spaced in symlog."""
    bins = rewards.unique()
    if len(bins) > 64:
        symlog = bins[[0, -1]].sign() * bins[[0, -1]].abs().log1p()
        bins = torch.linspace(symlog[0].item(), symlog[1].item(), 63)
        bins = bins.sign() * bins.abs().expm1()
    if len(bins) == 1:
        bins = torch.cat([bins, bins + 1])
    return bins.tolist()


# ---------------------------------------------------------------- data
class Samples:
    """A dataset on the device. A sample is a pair (row, seat) whose agent was active."""

    def __init__(self, dataset: Dataset, device: torch.device):
        def load(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.obs, self.next_obs = load(dataset.observations), load(dataset.next_observations)  # [S, A, *O]
        self.actions, self.rewards = load(dataset.actions), load(dataset.rewards)  # [S, A], [S, A]
        self.terminations, self.active = load(dataset.terminations), load(dataset.active)  # [S, A]
        self.masks = None if dataset.action_masks is None else load(dataset.action_masks)  # [S, A, n]
        self.goes_on = load(np.append(dataset.timesteps[1:] != 0, False))  # [S], row + 1 is the same episode's next

    def pairs(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Every sample of the given rows: row indices [V] and seats [V]."""
        rows = torch.from_numpy(rows).to(self.active.device)
        which, seats = self.active[rows].nonzero(as_tuple=True)
        return rows[which], seats

    def joint_action(self, rows: torch.Tensor, seats: torch.Tensor) -> torch.Tensor:
        """[B], [B] -> the joint action of the row from that seat, ego first [B, A(, n)]."""
        return rotate_to_ego(self.actions[rows], seats, 1)

    def after(self, rows: torch.Tensor, seats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows one step later [B], and whether they are the same episode with the agent still in it [B] bool."""
        goes_on = self.goes_on[rows] & ~self.terminations[rows, seats]
        return torch.where(goes_on, rows + 1, rows), goes_on


class Minibatches:
    """Draws samples uniformly, but the share `balanced` evenly over pairs (what the agent is paid, the most that any
    agent is paid in that step): to see a hunt is as rare as to take part in one, and must not be taken for it."""

    def __init__(self, rewards: torch.Tensor, pairs: tuple, bins: list[float], balanced: float, size: int, seed: int):
        """rewards [S, A], pairs (rows [V], seats [V]), size B of a minibatch."""
        bins = torch.tensor(bins, device=rewards.device)
        nearest = torch.bucketize(rewards, (bins[1:] + bins[:-1]) / 2)  # [S, A]
        groups = nearest[pairs] * len(bins) + nearest.amax(1)[pairs[0]]  # [V]
        self.counts = groups.unique(return_counts=True)[1]  # [groups that occur]
        self.by_group = groups.argsort()  # [V], group after group
        self.num_balanced = round(balanced * size)
        self.num_uniform = size - self.num_balanced
        self.generator = torch.Generator(rewards.device).manual_seed(seed)

    def draw(self) -> torch.Tensor:
        """Indices [B] into the V samples."""
        options = {"generator": self.generator, "device": self.by_group.device}
        uniform = torch.randint(len(self.by_group), (self.num_uniform,), **options)
        group = torch.randint(len(self.counts), (self.num_balanced,), **options)
        inside = (torch.rand(self.num_balanced, **options) * self.counts[group]).long()
        return torch.cat([uniform, self.by_group[(self.counts.cumsum(0) - self.counts)[group] + inside]])


def data_config(dataset: Dataset, train_rows: np.ndarray, args: Args) -> dict[str, Any]:
    """The model's config for this dataset; what is measured in it is measured on the training rows only."""
    meta = dataset.meta
    obs_shape, num_agents = tuple(meta["obs_shape"]), meta["num_agents"]
    spec = describe_obs(meta)
    seen = dataset.observations[train_rows][dataset.active[train_rows]]  # [V, *O]
    seen = seen.reshape(-1, obs_shape[-1])  # [V * H * W, P]
    levels, real = max(1, int(seen.max())), "real" in spec.kinds
    obs_head = args.obs_head or ("mse" if real or levels > 15 else "categorical")
    can_paint = bool(spec.agent_planes) or spec.team is not None
    joint_action = args.joint_action or ("painted" if can_paint else "onehot")
    discrete = meta["num_actions"] is not None
    if obs_head != "mse" and (real or levels > 15):
        what = "real numbers" if real else f"counts up to {levels}"
        raise ValueError(f"--obs-head {obs_head} expected 0/1 planes or counts up to 15, got {what}: use mse")
    if joint_action == "painted" and not can_paint:
        raise ValueError(
            f"--joint-action painted expected planes that show agents, got channels {', '.join(spec.names[:8])} of "
            f"{meta['env_id']}: use onehot or attention"
        )
    scale = real or levels > 15  # 0/1 planes and small counts are fed as they are
    mean, std = seen.mean(0, dtype=np.float64), seen.std(0, dtype=np.float64)
    return {
        "env_id": meta["env_id"],
        "env_kwargs": meta["env_kwargs"],
        "obs_shape": list(obs_shape),
        "obs_dtype": meta["obs_dtype"],
        "num_agents": num_agents,
        "action_dim": meta["num_actions"] if discrete else int(np.prod(meta["action_shape"])),
        "discrete": discrete,
        "has_mask": meta["has_masks"],
        "levels": levels,
        "obs_mean": mean.tolist() if scale else [0.0] * len(mean),
        "obs_std": np.where(std > 1e-6, std, 1.0).tolist() if scale else [1.0] * len(std),
        "hidden_size": args.hidden_size,
        "loss": args.loss,
        "obs_head": obs_head,
        "joint_action": joint_action,
        "reward_head": args.reward_head,
        "reward_target": args.reward_target,
    }


def td_targets(dataset: Dataset, samples: Samples, run_dir: str, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """r + gamma V(s') of every row and seat [S, A], and where it is known [S, A] bool: not after a truncation, whose
    last state is in no dataset. Raises ValueError where critic and dataset do not fit."""
    import hyper_mappo  # only here: a world model needs no policy code

    spec, meta = hyper_mappo.load_checkpoint(run_dir)["spec"], dataset.meta
    if (list(spec["state_shape"]), spec["num_agents"]) != (meta["state_shape"], meta["num_agents"]):
        raise ValueError(
            f"the critic in {run_dir} expected states {list(spec['state_shape'])} of {spec['num_agents']} agents, the "
            f"dataset has {meta['state_shape']} of {meta['num_agents']}: give a critic of the same game"
        )
    device = samples.rewards.device
    critic = hyper_mappo.load_critic(run_dir, device)
    states = torch.from_numpy(np.ascontiguousarray(dataset.states)).to(device)
    with torch.no_grad():
        values = torch.cat([critic(part) for part in states.split(4096)])  # [S, A]
    next_values = torch.cat([values[1:], values[:1]])
    ends = samples.terminations
    return samples.rewards + gamma * next_values * ~ends, ends | samples.goes_on[:, None]


def losses_of_batch(
    model: WorldModel, target_encoder: nn.Module | None, samples: Samples, targets: tuple, pairs: tuple, steps: int
) -> dict[str, torch.Tensor]:
    """Means over all valid steps of a self-fed rollout of `steps` from the given (row, seat) pairs.

    targets: what the reward head learns [S, A] and where it is known [S, A] bool. An agent's own exit ends its
    rollout, and what it would have seen after it is nobody's target.
    """
    rows, seats = pairs
    planes = model.to_planes(samples.obs[rows, seats])
    valid = torch.ones_like(rows, dtype=torch.bool)
    sums = {}
    for t in range(steps):
        out = model(planes, samples.joint_action(rows, seats))
        done = samples.terminations[rows, seats]
        target = model.to_planes(samples.next_obs[rows, seats])
        parts = {}
        if model.loss == "obs":
            parts["obs_loss"] = obs_loss(model, out["obs"], target), valid & ~done
        else:  # the decoder learns to decode encodings
            parts["obs_loss"] = obs_loss(model, model.decode(out["z"]), planes.detach()), valid
        if model.loss == "latent":
            # What keeps z from collapsing: the target is a slowly moving copy without gradient (BYOL, SPR), and the
            # decoder above must be able to read z. Cosine distance per cell.
            with torch.no_grad():
                target_z = model.encode(target, target_encoder)
            distance = 1 - F.cosine_similarity(out["next_z"], target_z, dim=1)  # [B, H, W]
            parts["latent_loss"] = distance.sum((1, 2)), valid & ~done
        parts["reward_loss"] = (
            reward_loss(model, out["reward"], targets[0][rows, seats]),
            valid & targets[1][rows, seats],
        )
        parts["done_loss"] = F.binary_cross_entropy_with_logits(out["done"], done.float(), reduction="none"), valid
        if samples.masks is not None and t == 0:
            mask = samples.masks[rows, seats].float()
            parts["mask_loss"] = F.binary_cross_entropy_with_logits(out["mask"], mask, reduction="none").sum(1), valid
        for name, (loss, where) in parts.items():
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = total + (loss * where).sum(), count + where.sum()
        if t + 1 < steps:
            expected = model.expected_planes(out["obs"])
            planes = expected + (model.snap(expected) - expected).detach()  # straight-through: reads what it will read
            rows, goes_on = samples.after(rows, seats)
            valid = valid & goes_on
    return {name: total / count.clamp(min=1) for name, (total, count) in sums.items()}


# ---------------------------------------------------------------- evaluation, checkpoints
@torch.no_grad()
def evaluate(
    model: WorldModel, samples: Samples, targets: tuple, pairs: tuple, batch_size: int = 512
) -> dict[str, float]:
    """One-step scores on (row, seat) pairs; observations are scored where the agent stays. The judge tells more."""
    sums = torch.zeros(9, dtype=torch.float64, device=pairs[0].device)
    for rows, seats in zip(pairs[0].split(batch_size), pairs[1].split(batch_size), strict=True):
        planes, target = model.to_planes(samples.obs[rows, seats]), model.to_planes(samples.next_obs[rows, seats])
        out = model(planes, samples.joint_action(rows, seats))
        expected, done = model.expected_planes(out["obs"]), samples.terminations[rows, seats]
        error = (expected - target).square().mean((1, 2, 3))
        exact = (model.snap(expected) == target).flatten(1).all(1)
        known = targets[1][rows, seats]
        reward_error = (model.reward_value(out["reward"]) - targets[0][rows, seats]).square() * known
        pred_done = out["done"] > 0
        parts = (obs_loss(model, out["obs"], target) * ~done, error * ~done, exact & ~done, ~done)
        parts += (reward_error, known, pred_done & done, pred_done, done)
        sums += torch.stack([x.double().sum() for x in parts])
    loss, mse, exact, stays, reward, known, hits, pred, true = sums.tolist()
    return {
        "obs_loss": loss / max(stays, 1),
        "obs_mse": mse / max(stays, 1),
        "exact_match": exact / max(stays, 1),
        "reward_mse": reward / max(known, 1),
        "done_precision": hits / max(pred, 1),
        "done_recall": hits / max(true, 1),
    }


# --- same in: hyper_mappo.py, pretrain_vae.py [checkpoint files] ---
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


def load_world_model(path: str | Path, device: torch.device | str = "cpu") -> WorldModel:
    """The best model of a run folder, or that of a .pt file, ready for `step` and `rollout`.

    Raises ValueError for anything but such a checkpoint.
    """
    best = Path(path) / "best.pt"
    checkpoint = load_checkpoint(best if best.is_file() else path, device)
    model = WorldModel(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval()


def plot_curves(run_dir: Path) -> None:
    """learning_curve.png from metrics.csv: training losses and held-out errors over updates, log scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    updates = [int(row["update"]) for row in rows]
    for name in [column for column in rows[0] if column.startswith(("losses/", "eval"))]:
        values = [float(row[name] or "nan") for row in rows]
        if name.startswith("losses/"):
            axes[0].plot(updates, values, label=name)
        else:  # what is to become 1 is drawn as its distance from 1
            share = name.endswith(("match", "precision", "recall"))
            values = [1 - x for x in values] if share else values
            axes[1].plot(updates, [max(x, 1e-7) for x in values], label=f"1 - {name}" if share else name)
    for axis, title in zip(axes, ("training", "held out"), strict=True):
        axis.set(yscale="log", xlabel="update", title=title)
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(run_dir / "learning_curve.png", dpi=100)
    plt.close(figure)


# ---------------------------------------------------------------- small parts
# --- same in: hyper_mappo.py, pretrain_vae.py [limits] ---
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
    """What can be wrong before the data is read: ValueError in one line."""
    if not args.data:
        raise ValueError("--data expected a dataset folder, got none: make one with collect_data.py")
    check_limits(args, LIMITS)
    if (args.reward_target == "td") != (args.critic is not None):
        raise ValueError("--reward-target td and --critic RUN_DIR belong together: give both or neither")
    if args.loss == "recon" and args.rollout_steps > 1:
        raise ValueError("--loss recon learns no dynamics to roll out: leave --rollout-steps at 1")


class StopSignal:
    """Ctrl-C and SIGTERM let the update finish, so that the run can be saved; a second Ctrl-C stops at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this update (Ctrl-C again: at once, losing it)", file=sys.stderr)


def start_wandb(args: Args, run_dir: Path) -> None:
    """Mirrors the TensorBoard log; without a login the run is logged offline instead of asking for a key."""
    import wandb

    if wandb.api.api_key is None and "WANDB_MODE" not in os.environ:
        print(f"W&B: no login found, logging offline; upload later with: wandb sync {run_dir / 'wandb'}/offline-run-*")
        os.environ["WANDB_MODE"] = "offline"
    wandb.init(
        project=args.wandb_project_name,
        entity=args.wandb_entity,
        name=run_dir.name,
        dir=run_dir,
        config=asdict(args),
        sync_tensorboard=True,
    )


# ---------------------------------------------------------------- main
def main(args: Args) -> Path:
    """Trains (or resumes); returns the run folder. ValueError: unusable arguments or data."""
    # ---- arguments
    check_args(args)
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    if checkpoint and checkpoint["update"] >= args.total_updates:
        raise ValueError(
            f"{args.resume} has already done {checkpoint['update']} of {args.total_updates} updates: "
            "raise --total-updates"
        )

    # ---- data
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    dataset = load_dataset(args.data)
    splits = dataset.split_episodes(args.seed, args.heldout_fraction, args.holdout_policies)
    episodes = np.random.default_rng(args.seed).permutation(splits["train"])
    if args.max_samples is not None:
        episodes = episodes[: np.searchsorted(dataset.episode_lengths[episodes].cumsum(), args.max_samples) + 1]
    train_rows = dataset.rows_of(episodes)
    config = data_config(dataset, train_rows, args)
    samples = Samples(dataset, device)
    targets = (samples.rewards, torch.ones_like(samples.active))  # what the reward head learns, and where it is known
    if args.reward_target == "td":
        targets = td_targets(dataset, samples, args.critic, args.gamma)
    train_pairs = samples.pairs(train_rows)  # rows [V], seats [V]
    heldout = {}
    for name in SPLITS[1:]:
        rows, seats = samples.pairs(dataset.rows_of(splits[name]))  # [V], [V]
        if len(rows):
            drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))[: args.eval_samples]
            heldout[name] = rows[drawn], seats[drawn]
    known = targets[1][train_pairs]
    config["reward_bins"] = make_reward_bins(targets[0][train_pairs][known].cpu())
    if checkpoint and (checkpoint["config"] != config or checkpoint["data_meta"] != dataset.meta):
        raise ValueError(f"{args.data} is not the data that {args.resume} was trained on: give that, or start anew")

    # ---- logging
    env_name = re.sub(r"[^A-Za-z0-9.-]+", "-", config["env_id"])
    run_name = f"{env_name}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume) if args.resume else Path(args.runs_dir) / run_name
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
    except OSError as error:
        raise ValueError(
            f"cannot write the run folder {run_dir} ({error.strerror}): choose another --runs-dir"
        ) from None
    if args.track:
        start_wandb(args, run_dir)
    writer = SummaryWriter(str(run_dir), purge_step=checkpoint["update"] + 1 if checkpoint else None)
    writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items()))

    # ---- seeding
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    balanced = args.balance_rewards
    if balanced is None:
        balanced = 0.25 if describe_obs(dataset.meta).certain and args.reward_target == "reward" else 0.0
    bins = config["reward_bins"]
    minibatches = Minibatches(targets[0], train_pairs, bins, balanced, args.batch_size, args.seed)

    # ---- networks
    model = WorldModel(config).to(device)
    target_encoder = copy.deepcopy(model.encoder).requires_grad_(False) if args.loss == "latent" else None
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    no_gpu = " (no CUDA device found)" if args.cuda and device.type == "cpu" else ""
    counts = ", ".join(f"{name} {len(pairs[0]):,}" for name, pairs in heldout.items())
    print(f"run      {run_dir}")
    print(f"data     {args.data}: {config['env_id']}, {len(train_rows):,} env steps, {len(train_pairs[0]):,} samples; "
          f"evaluated on {counts}, on {device}{no_gpu}")  # fmt: skip
    print(f"model    {sum(p.numel() for p in model.parameters()):,} weights, obs head {config['obs_head']}, "
          f"joint action {config['joint_action']}, reward head {config['reward_head']}, loss {args.loss}")  # fmt: skip

    # ---- resume
    first_update, best_score = 1, math.inf
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if target_encoder:
            target_encoder.load_state_dict(checkpoint["target_encoder"])
        minibatches.generator.set_state(checkpoint["generator"])
        first_update, best_score = checkpoint["update"] + 1, checkpoint["best_score"]
    kept = []
    if checkpoint and (run_dir / "metrics.csv").exists():
        with open(run_dir / "metrics.csv", newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["update"]) < first_update]
    columns = ["update", "charts/SPS", "charts/learning_rate", *(f"losses/{name}" for name in LOSSES)]
    scores = ("obs_loss", "obs_mse", "exact_match", "reward_mse", "done_precision", "done_recall")
    columns += [f"{tag}/{name}" for tag in EVAL_TAGS.values() for name in scores]
    metrics_file = open(run_dir / "metrics.csv", "w", newline="", buffering=1)
    table = csv.DictWriter(metrics_file, columns)
    table.writeheader()
    table.writerows(kept)
    stop = StopSignal()
    progress = tqdm(total=args.total_updates, initial=first_update - 1, unit="update", disable=None)
    sums, started, since = {}, time.perf_counter(), first_update - 1

    # ---- loop
    for update in range(first_update, args.total_updates + 1):
        remaining = 1 - (update - 1) / args.total_updates if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = args.learning_rate * remaining * min(1.0, update / 100)
        mb_inds = minibatches.draw()
        pairs = (train_pairs[0][mb_inds], train_pairs[1][mb_inds])
        losses = losses_of_batch(model, target_encoder, samples, targets, pairs, args.rollout_steps)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        if target_encoder:
            with torch.no_grad():
                for slow, fast in zip(target_encoder.parameters(), model.encoder.parameters(), strict=True):
                    slow.lerp_(fast, args.latent_tau)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.detach()
        progress.update()

        # -- evaluation, logging, checkpoint: the only looks at the device
        if update % args.eval_interval and update < args.total_updates and not stop.requested:
            continue
        metrics = {f"losses/{name}": (total / (update - since)).item() for name, total in sums.items()}
        bad = [f"{name} is {x}" for name, x in metrics.items() if not math.isfinite(x)]
        if bad:
            raise FloatingPointError(
                f"update {update}: {', '.join(bad)}; last good checkpoint: {run_dir / 'latest.pt'}; "
                "try a lower --learning-rate"
            )
        metrics["charts/SPS"] = (update - since) * args.batch_size / (time.perf_counter() - started)
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        for name, pairs in heldout.items():
            evaluated = evaluate(model, samples, targets, pairs)
            metrics |= {f"{EVAL_TAGS[name]}/{key}": x for key, x in evaluated.items()}
        for tag, x in metrics.items():
            writer.add_scalar(tag, x, update)
        table.writerow({"update": update, **metrics})
        progress.set_postfix_str(f"exact match {metrics['eval/exact_match']:.4f}")
        score = metrics["eval/obs_loss"] + metrics["eval/reward_mse"]
        is_best, best_score = score < best_score, min(score, best_score)
        checkpoint = {"format": CHECKPOINT_FORMAT, "args": asdict(args), "config": config, "update": update}
        checkpoint |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "best_score": best_score}
        checkpoint |= {"target_encoder": target_encoder.state_dict() if target_encoder else None}
        checkpoint |= {"generator": minibatches.generator.get_state(), "data_meta": dataset.meta}
        save_checkpoint(checkpoint, run_dir / "latest.pt")
        if is_best:
            save_checkpoint(checkpoint, run_dir / "best.pt")
        if stop.requested:
            break
        sums, started, since = {}, time.perf_counter(), update

    # ---- close
    progress.close()
    metrics_file.close()
    writer.close()
    plot_curves(run_dir)
    for name in heldout:
        print(f"{name:17}" + "  ".join(f"{key} {metrics[f'{EVAL_TAGS[name]}/{key}']:.6g}" for key in scores))
    if stop.requested:
        print(f"stopped after update {update} of {args.total_updates}; go on with: python world_model.py "
              f"--resume {run_dir}")  # fmt: skip
    else:
        print(f"judge it with: python test_obs_reward_model.py --checkpoint {run_dir} --data {args.data}")
    return run_dir


def cli(argv: list[str] | None = None) -> int:
    """The command line: 0 done (or stopped and saved), 1 the run broke down, 2 unusable arguments or data."""
    argv = sys.argv[1:] if argv is None else argv
    args = tyro.cli(Args, args=argv)
    try:
        if args.resume:  # the run's own arguments are the defaults, flags given beside them come on top
            saved = Args(**load_checkpoint(args.resume)["args"])
            args = tyro.cli(Args, args=argv, default=saved)
            for name in FIXED_BY_CHECKPOINT:
                if getattr(args, name) != getattr(saved, name):
                    raise ValueError(
                        f"--{name.replace('_', '-')} {getattr(args, name)} contradicts the checkpoint's "
                        f"{getattr(saved, name)}: leave it out, or start a new run"
                    )
        main(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(cli())
