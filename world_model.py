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

import startup  # noqa: F401

# isort: split

import copy
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset import SPLITS, Dataset, load_dataset, rotate_to_ego, same_data
from envs import ObsSpec, describe_obs
from runs import (
    Metrics,
    Panel,
    StopSignal,
    UsageError,
    best_or_latest,
    command,
    command_line,
    get_device,
    keep_folder,
    load_checkpoint,
    load_weights,
    new_run_dir,
    plot_learning_curve,
    read_metrics,
    restore_args,
    run_keeping,
    save_checkpoint,
    start_wandb,
    write_json,
)

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
    obs_head: Literal["mse", "change", "bce", "categorical"] | None = None
    """mse: one real number per cell; change: by how much it changes, in units of its usual change (real numbers with
    --loss obs); bce: sigmoids (counts: one per 'at least k'); categorical: per one-agent plane which cell or none, per
    cell of other planes which count. None: categorical; change for real-valued observations, mse where it is none"""
    joint_action: Literal["onehot", "painted", "attention"] | None = None
    """onehot: all agents' one-hots at every cell; painted: each action at its agent's cell (where planes show agents
    without saying who is who: the others' mean action at all of them); attention: cells attend to the set of (agent,
    action), summed so that counts survive. None: painted where the observation shows agents, else onehot"""
    reward_head: Literal["mse", "twohot"] = "twohot"
    """mse: one number; twohot: a distribution over bins (the training rewards themselves where there are at most 64)"""
    reward_target: Literal["reward", "td"] = "reward"
    """reward: r; td: r + gamma V(s') with the values that collect_data.py --values-of put into the dataset"""
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
FIXED_BY_CHECKPOINT = (
    "seed hidden_size loss obs_head joint_action reward_head reward_target gamma balance_rewards rollout_steps "
    "batch_size max_samples heldout_fraction holdout_policies"
).split()
SAVED = "args config data_meta update best_score model optimizer target_encoder generator".split()  # in a checkpoint
EVAL_TAGS = {"heldout_episodes": "eval", "heldout_policies": "eval_policies"}
NUMBER_HEADS = ("mse", "change")  # obs heads with one output per cell
LOSSES = ("obs_loss", "latent_loss", "reward_loss", "done_loss", "mask_loss")
SCORES = ("obs_loss", "obs_mse", "exact_match", "reward_mse", "done_precision", "done_recall")


# ---------------------------------------------------------------- network
class WorldModel(nn.Module):
    """Agent i's world. `config` holds plain numbers and strings and is stored in the checkpoint.

    Grids [H, W, C] are worked on by convolutions, so that a rule learnt in one cell holds in all; a vector [D] is a
    1 x 1 grid of D channels. P planes, D hidden channels, n action dimensions, K levels (largest count) per cell.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        self.spec = describe_obs(config)
        self.obs_shape = tuple(config["obs_shape"])
        self.obs_dtype = getattr(torch, config["obs_dtype"])
        self.num_agents = config["num_agents"]
        self.action_dim = config["action_dim"]
        self.obs_head = config["obs_head"]
        self.loss = config["loss"]
        is_map = len(self.obs_shape) == 3
        self.grid = self.obs_shape[:2] if is_map else (1, 1)  # H, W
        self.levels = 1 if self.obs_head in NUMBER_HEADS else config["levels"]
        planes = self.obs_shape[-1]
        hidden = config["hidden_size"]
        kernel = 3 if is_map else 1
        padding = kernel // 2
        joint = self.make_action_layers(hidden)  # channels that carry the joint action
        self.encoder = nn.Sequential(
            # the plane of ones lets the zero padding mark the border
            nn.Conv2d(planes + 1, hidden, kernel, padding=padding),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
        )
        self.mix = nn.Conv2d(hidden + joint, hidden, 1)
        self.ego = nn.Linear(hidden, hidden)
        self.move = nn.Conv2d(hidden, hidden, kernel, padding=padding)
        self.next_latent = nn.Conv2d(hidden, hidden, 1)
        self.shift = nn.Conv2d(planes + joint, hidden, kernel, padding=padding)
        if self.spec.window:
            cells = math.prod(self.grid)
            self.follow = nn.Linear(hidden, kernel**2)
            self.enter = nn.Sequential(
                nn.Linear(planes * cells + kernel**2, 128),
                nn.ReLU(),
                nn.Linear(128, hidden * cells),
            )
        self.decoder = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, planes * self.levels, 1),
        )
        self.make_heads(hidden, summary=3 * hidden + planes + joint)
        reward_bins = torch.tensor(config["reward_bins"], dtype=torch.float32)
        self.register_buffer("reward_bins", reward_bins)
        for name in ("obs_mean", "obs_std"):
            per_plane = torch.tensor(config[name]).view(1, -1, 1, 1)
            self.register_buffer(name, per_plane)
        if self.obs_head == "change":
            change = torch.tensor(config["obs_change"]).view(1, -1, 1, 1)
            self.register_buffer("obs_change", change / self.obs_std)  # of normalised values
            last = self.decoder[-1]
            nn.init.zeros_(last.weight)  # begins with no change
            nn.init.zeros_(last.bias)
        self.simulator = []  # what steps faster with the same weights, once they are final: see load_world_model

    def make_action_layers(self, hidden: int) -> int:
        """What turns the joint action into planes; returns how many planes J there will be."""
        form = self.config["joint_action"]
        if form == "attention":
            self.query = nn.Conv2d(hidden, hidden, 1)
            self.token = nn.Sequential(
                nn.Linear(self.num_agents + self.action_dim, 2 * hidden),
                nn.ReLU(),
            )
            self.key = nn.Linear(2 * hidden, hidden)
            self.value = nn.Linear(2 * hidden, hidden)
            return hidden
        if form == "painted" and not self.spec.agent_planes:
            return 2 * self.action_dim  # own action, mean of the others' actions
        return self.num_agents * self.action_dim

    def make_heads(self, hidden: int, summary: int) -> None:
        """Reward, exit and action mask; summary: the number of features that the first two read."""
        self.num_bins = 1
        if self.config["reward_head"] == "twohot":
            self.num_bins = len(self.config["reward_bins"])
        choices = self.action_dim if self.config["discrete"] else 1  # one output for each own action
        self.reward_head = nn.Sequential(
            nn.Linear(summary, 2 * hidden),
            nn.ReLU(),
            nn.Linear(2 * hidden, choices * self.num_bins),
        )
        self.done_head = nn.Sequential(
            nn.Linear(summary, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )
        if self.config["has_mask"]:  # legality is a function of the observation: read from it, not from the transition
            self.mask_head = nn.Sequential(
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, self.action_dim),
            )

    # -- observations as planes

    def to_planes(self, obs: Tensor) -> Tensor:
        """[B, *O] -> [B, P, H, W] float32."""
        cells = obs.float().view(len(obs), *self.grid, -1)  # [B, H, W, P]
        return cells.permute(0, 3, 1, 2)

    def from_planes(self, planes: Tensor) -> Tensor:
        """[B, P, H, W] -> [B, *O] float32."""
        cells = planes.permute(0, 2, 3, 1)  # [B, H, W, P]
        return cells.reshape(len(planes), *self.obs_shape)

    def normalise(self, planes: Tensor) -> Tensor:
        return (planes - self.obs_mean) / self.obs_std

    def at_ego(self, x: Tensor, planes: Tensor) -> Tensor:
        """Features of the cell agent i stands on: x [B, D, H, W] -> [B, D]; the mean where there is no such cell."""
        if self.spec.ego == "plane":
            own = planes[:, :1]  # [B, 1, H, W]
            return (x * own).sum((2, 3))
        if self.spec.ego == "centre":
            row, column = self.centre()
            return x[:, :, row, column]
        return x.mean((2, 3))

    def centre(self) -> tuple[int, int]:
        height, width = self.grid
        return height // 2, width // 2

    # -- encoder, dynamics, decoder

    def encode(self, planes: Tensor, encoder: nn.Module | None = None) -> Tensor:
        """[B, P, H, W] -> z [B, D, H, W], by another encoder if one is given (the target of `--loss latent`)."""
        x = self.normalise(planes)
        ones = torch.ones_like(x[:, :1])
        x = torch.cat([x, ones], 1)  # [B, P + 1, H, W]
        return self.encoder(x) if encoder is None else encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """z [B, D, H, W] -> logits (mse: normalised values) [B, P, K, H, W]."""
        if self.loss == "latent":
            # DEVIATION: SPR decodes nothing. The consistency loss compares directions only, so only they may be read.
            direction = F.normalize(z, dim=1)
            z = direction * z.shape[1] ** 0.5
        logits = self.decoder(z)  # [B, P * K, H, W]
        return logits.unflatten(1, (-1, self.levels))

    def joint_features(self, z: Tensor, planes: Tensor, joint_action: Tensor) -> Tensor:
        """The joint action (ego first) as planes [B, J, H, W]."""
        acts = joint_action  # [B, A, n], or [B, A] with -1 for agents that have left
        if self.config["discrete"]:
            present = (acts >= 0).unsqueeze(2)  # [B, A, 1]
            one_hot = F.one_hot(acts.clamp(min=0), self.action_dim)
            acts = one_hot.float() * present  # [B, A, n]
        if self.config["joint_action"] == "painted":
            return self.paint(planes, acts)
        if self.config["joint_action"] == "attention":
            return self.attend(z, acts)
        flat = acts.view(len(acts), -1, 1, 1)  # [B, A, n] -> [B, A * n, 1, 1]
        return flat.expand(-1, -1, *self.grid)

    def paint(self, planes: Tensor, acts: Tensor) -> Tensor:
        """Each action at its agent's cell: acts [B, A, n] -> [B, A * n, H, W].

        Where it is unknown who of the team stands where, everyone seen gets the mean of the others' actions:
        -> [B, 2 * n, H, W].
        """
        if self.spec.agent_planes:
            agents = planes[:, self.spec.agent_planes]  # [B, A, H, W]
        else:
            own = torch.zeros_like(planes[:, :1])
            row, column = self.centre()
            own[:, 0, row, column] = 1.0
            team = planes[:, self.spec.team, None]  # [B, 1, H, W]
            agents = torch.cat([own, team - own], 1)  # [B, 2, H, W]
            others = acts[:, 1:].mean(1)  # [B, n]
            acts = torch.stack([acts[:, 0], others], 1)  # [B, 2, n]
        painted = torch.einsum("ban,bahw->banhw", acts, agents)
        return painted.flatten(1, 2)

    def attend(self, z: Tensor, acts: Tensor) -> Tensor:
        """Each cell attends to the set of (agent, action): z [B, D, H, W], acts [B, A, n] -> [B, D, H, W]."""
        names = torch.eye(self.num_agents, device=z.device)
        names = names.expand(len(acts), -1, -1)  # [B, A, A]
        tokens = self.token(torch.cat([names, acts], 2))  # [B, A, 2 * D]
        key = self.key(tokens)  # [B, A, D]
        query = self.query(z).flatten(2)  # [B, D, H * W]
        # DEVIATION: sigmoid gates and a sum where attention has a softmax: two hunters must not look like one.
        gates = torch.sigmoid(key @ query / query.shape[1] ** 0.5)  # [B, A, H * W]
        if self.config["discrete"]:
            gates = gates * acts.sum(2, keepdim=True)  # who has left adds nothing
        values = self.value(tokens).transpose(1, 2)  # [B, D, A]
        return (values @ gates).view_as(z)

    def follow_window(self, next_z: Tensor, x: Tensor, planes: Tensor) -> Tensor:
        """Agent i's own step moves the whole view: one 3 x 3 kernel per sample, the same for all channels.

        What comes in at the border is guessed from the whole view (the map's shape tells much of it).
        next_z, x [B, D, H, W], planes [B, P, H, W] -> [B, D, H, W].
        """
        ego = self.at_ego(x, planes)  # [B, D]
        kernel = F.softmax(self.follow(ego), 1)  # [B, 9]
        patches = F.unfold(next_z, 3, padding=1)  # [B, D * 9, H * W]
        patches = patches.unflatten(1, (-1, 9))  # [B, D, 9, H * W]
        moved = torch.einsum("bdkc,bk->bdc", patches, kernel)  # [B, D, H * W]
        view = self.normalise(planes).flatten(1)  # [B, P * H * W]
        enters = self.enter(torch.cat([view, kernel], 1))  # [B, D * H * W]
        return moved.view_as(next_z) + enters.view_as(next_z)

    def forward(self, planes: Tensor, joint_action: Tensor) -> dict[str, Tensor]:
        """planes [B, P, H, W], joint_action [B, A] int64 or [B, A, n] float, ego first -> raw outputs of all heads."""
        z = self.encode(planes)  # [B, D, H, W]
        joint = self.joint_features(z, planes, joint_action)  # [B, J, H, W]
        x = self.mix(torch.cat([z, joint], 1))
        ego = F.relu(self.at_ego(x, planes))
        ego = self.ego(ego)  # [B, D]
        x = F.relu(x + ego[:, :, None, None])  # every cell hears of agent i
        x = F.relu(self.move(x))  # [B, D, H, W]
        # Moving is linear in painted actions; the direct path learns it within a few hundred updates, and leaves
        # blocking, hunting and leaving to the layers above.
        shown = torch.cat([self.normalise(planes), joint], 1)  # [B, P + J, H, W]
        next_z = self.next_latent(x) + self.shift(shown)
        if self.spec.window:
            next_z = self.follow_window(next_z, x, planes)
        # What agent i is paid is decided on its cell: who does what there, as it is.
        features = [
            self.at_ego(x, planes),
            x.mean((2, 3)),
            x.amax((2, 3)),
            self.at_ego(shown, planes),
        ]
        summary = torch.cat(features, 1)  # [B, 3 * D + P + J]
        obs = self.decode(z if self.loss == "recon" else next_z)  # [B, P, K, H, W]
        if self.obs_head == "change":
            change = obs[:, :, 0] * self.obs_change
            obs = (self.normalise(planes) + change).unsqueeze(2)
        out = {
            "z": z,
            "next_z": next_z,
            "obs": obs,
            "reward": self.read_reward(summary, joint_action),  # [B, bins]
            "done": self.done_head(summary)[:, 0],  # [B]
        }
        if self.config["has_mask"]:
            out["mask"] = self.read_mask(z, planes)  # [B, n]
        return out

    def read_reward(self, summary: Tensor, joint_action: Tensor) -> Tensor:
        """The reward head's output for the own action [B, bins]: what hunting pays must not rub off on moving."""
        rewards = self.reward_head(summary)
        rewards = rewards.unflatten(1, (-1, self.num_bins))  # [B, n or 1, bins]
        if not self.config["discrete"]:
            return rewards[:, 0]
        own = joint_action[:, :1, None].clamp(min=0)  # [B, 1, 1]
        own = own.expand(-1, -1, self.num_bins)
        return rewards.gather(1, own)[:, 0]  # [B, 1, bins] -> [B, bins]

    def read_mask(self, z: Tensor, planes: Tensor) -> Tensor:
        """Logits of what is legal in an observation: its encoding [B, D, H, W], its planes -> [B, n]."""
        ego = self.at_ego(F.relu(z), planes)
        return self.mask_head(ego)

    # -- what the outputs mean

    def expected_planes(self, logits: Tensor) -> Tensor:
        """[B, P, K, H, W] -> expected value of every cell [B, P, H, W]."""
        if self.obs_head in NUMBER_HEADS:
            return logits[:, :, 0] * self.obs_std + self.obs_mean
        if self.obs_head == "bce":  # sum of P(count >= k)
            return torch.sigmoid(logits).sum(2)
        probs = F.softmax(count_logits(logits), 2)
        probs = probs[:, :, 1:]  # [B, P, K, H, W], without count 0
        expected = (probs * self.counts(logits.device)).sum(2)
        agents = self.spec.agent_planes
        if agents:
            cells = cell_logits(logits[:, agents])
            probs = F.softmax(cells, 2)[..., :-1]  # [B, A, H * W], without "none"
            expected[:, agents] = probs.unflatten(2, self.grid)
        return expected

    def counts(self, device: torch.device) -> Tensor:
        """1 ... K, to be compared with every cell: [1, 1, K, 1, 1]."""
        counts = torch.arange(1, self.levels + 1, device=device)
        return counts.view(1, 1, -1, 1, 1)

    def snap(self, planes: Tensor) -> Tensor:
        """Expected values -> a possible observation [B, P, H, W].

        Counts are rounded; an agent that is present with probability over one half stands on its likeliest cell
        (a threshold per cell would make it vanish).
        """
        if "real" in self.spec.kinds:
            return planes
        snapped = planes.round().clamp(0, 255)
        agents = self.spec.agent_planes
        if agents:
            cells = planes[:, agents].flatten(2)  # [B, A, H * W]
            present = cells.sum(2, keepdim=True) > 0.5  # [B, A, 1]
            likeliest = cells.argmax(2)  # [B, A]
            where = F.one_hot(likeliest, cells.shape[2]) * present
            snapped[:, agents] = where.unflatten(2, self.grid).float()
        return snapped

    def reward_value(self, out: Tensor) -> Tensor:
        """Output of the reward head [B, bins] -> [B]."""
        if self.config["reward_head"] == "mse":
            return out[:, 0]
        return F.softmax(out, 1) @ self.reward_bins

    # -- as a simulator

    def check_inputs(self, obs: Tensor, actions: Tensor, dims: int) -> None:
        """Raises ValueError where obs is not [B, *O] or the actions are not [B, (H,) A(, n)]; dims counts B and H."""
        expected = [self.num_agents]
        if not self.config["discrete"]:
            expected.append(self.action_dim)
        right_obs = tuple(obs.shape[1:]) == self.obs_shape
        right_actions = list(actions.shape[dims:]) == expected
        if not (right_obs and right_actions):
            axes = ", ".join(str(size) for size in self.obs_shape)
            raise ValueError(
                f"expected obs [B, {axes}] and actions with last axes {expected}, got {list(obs.shape)} and "
                f"{list(actions.shape)}: pass agent i's view and the joint action, ego first"
            )

    @torch.no_grad()
    def predict(
        self,
        obs: Tensor,
        joint_action: Tensor,
        with_mask: bool = True,
    ) -> dict[str, Tensor]:
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
            z = self.encode(snapped)
            result["action_mask"] = self.read_mask(z, snapped) > 0
        return result

    @torch.no_grad()
    def legal(self, obs: Tensor) -> Tensor:
        """Legal actions in observations [B, *O] -> [B, n] bool, for envs that have masks."""
        if self.simulator:
            return self.simulator[0].legal(obs)
        planes = self.to_planes(obs)
        z = self.encode(planes)
        return self.read_mask(z, planes) > 0

    def step(
        self,
        obs: Tensor,
        joint_action: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """obs [B, *O], joint_action [B, A] int64 (or [B, A, n] float), agent i first -> next_obs [B, *O] (snapped,
        in the observation's dtype), reward [B], done [B] bool: agent i's exit; next_obs means nothing where done."""
        if self.simulator:
            self.check_inputs(obs, joint_action, 1)
            return self.simulator[0].step(obs, joint_action)
        out = self.predict(obs, joint_action, with_mask=False)
        return out["next_obs"], out["reward"], out["done"]

    def rollout(
        self,
        obs: Tensor,
        actions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Imagines H steps open loop: obs [B, *O], actions [B, H, A(, n)] -> obs [B, H, *O], rewards [B, H],
        dones [B, H]. After its exit an agent sees zeros, is paid zero and stays done."""
        self.check_inputs(obs, actions, 2)
        over = torch.zeros(len(obs), dtype=torch.bool, device=obs.device)
        ones = [1] * len(self.obs_shape)
        imagined = []
        for t in range(actions.shape[1]):
            obs, reward, done = self.step(obs, actions[:, t])
            reward = reward * ~over
            over = over | done
            obs = obs * ~over.view(-1, *ones)
            imagined.append((obs, reward, over))
        obs, rewards, dones = zip(*imagined, strict=True)
        return torch.stack(obs, 1), torch.stack(rewards, 1), torch.stack(dones, 1)


# ---------------------------------------------------------------- the same in fewer operations
class CellLists(NamedTuple):
    """Views of 0/1 planes as lists. F numbers in a flattened view; place: row * width + column."""

    cells: Tensor  # [B, M] int32, what is set, then F in empty places
    places: Tensor  # [B, A], where each agent is; 0 if it is not
    present: Tensor  # [B, A] bool


class CellLister:
    """Makes such lists of views whose first planes are the agents'."""

    def __init__(
        self,
        obs_shape: tuple[int, ...],
        num_agents: int,
        device: torch.device,
    ):
        """obs_shape: height, width, planes"""
        height, width, num_planes = obs_shape
        num_cells = height * width
        self.num_numbers = num_cells * num_planes  # F
        self.num_agents = num_agents
        # view [B, F] @ places: the place of each agent, and whether it is there
        places = torch.zeros(num_cells, num_planes, 2, num_agents, device=device)
        agents = torch.arange(num_agents)
        cells = torch.arange(num_cells, dtype=torch.float32, device=device)
        places[:, agents, 0, agents] = cells[:, None]
        places[:, agents, 1, agents] = 1.0
        self.places = places.view(self.num_numbers, 2 * num_agents)

    def __call__(self, obs: Tensor) -> CellLists:
        """obs [B, *O] -> what is set in it, and who is where."""
        flat = obs.flatten(1)  # [B, F]
        A = self.num_agents
        found = flat.float() @ self.places  # [B, 2 * A]
        places, present = found[:, :A].long(), found[:, A:] > 0
        rows, numbers = flat.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(flat))
        most = int(counts.max()) if len(rows) else 1
        first = counts.cumsum(0) - counts
        position = torch.arange(len(rows), device=rows.device) - first[rows]
        cells = torch.full((len(flat), most), self.num_numbers, dtype=torch.int32, device=rows.device)
        cells[rows, position] = numbers.int()
        return CellLists(cells, places, present)


class Simulator:
    """WorldModel.step and .legal of a trained model of 0/1 planes that show the whole map, many times as fast.

    A layer on a map that is nearly empty is a sum of few rows of a table (what each set cell and each painted action
    adds to all cells); linear layers that follow each other are one; what `step` does not return is not computed.
    """

    MOST_NUMBERS = 1024  # cells x hidden channels, up to which tables are faster than convolutions

    def __init__(self, model: WorldModel):
        self.model = model
        height, width = model.grid
        self.num_cells = height * width  # C
        self.hidden = model.config["hidden_size"]  # D
        self.num_planes = model.obs_shape[-1]  # P
        self.num_agents, self.num_actions = model.num_agents, model.action_dim
        self.num_numbers = self.num_cells * self.num_planes  # F
        self.list_cells = CellLister(model.obs_shape, self.num_agents, model.reward_bins.device)
        with torch.no_grad():
            self.make_view_tables()
            self.make_action_tables()
            self.fold_layers()

    @classmethod
    def fits(cls, model: WorldModel) -> bool:
        """Whether it knows how to step this model."""
        config, spec = model.config, model.spec
        all_agents_shown = len(spec.agent_planes) == model.num_agents
        known_layers = config["joint_action"] == "painted" and config["loss"] == "obs"
        known_layers = known_layers and config["obs_head"] == "categorical" and config["discrete"]
        zero_one = config["levels"] == 1 and config["obs_dtype"] == "uint8" and "real" not in spec.kinds
        small = math.prod(model.grid) * config["hidden_size"] <= cls.MOST_NUMBERS
        whole_map = spec.ego == "plane" and not spec.window and spec.agent_planes == list(range(model.num_agents))
        return all_agents_shown and known_layers and zero_one and small and whole_map

    # -- tables

    def make_view_tables(self) -> None:
        """What each set cell of the view adds to the encoder's first layer and to the direct path."""
        model, F_ = self.model, self.num_numbers
        device = model.reward_bins.device
        one_each = torch.eye(F_, device=device).view(F_, *model.obs_shape)
        nothing = torch.zeros(1, *model.obs_shape, device=device)
        views = torch.cat([one_each, nothing])  # [F + 1, *O]
        planes = model.normalise(model.to_planes(views))
        ones = torch.ones_like(planes[:, :1])
        first = model.encoder[0](torch.cat([planes, ones], 1))  # [F + 1, D, H, W]
        no_action = planes.new_zeros(F_ + 1, model.shift.in_channels - self.num_planes, *model.grid)
        direct = model.shift(torch.cat([planes, no_action], 1))
        both = torch.stack([first, direct], 1)  # [F + 1, 2, D, H, W]
        both = both.permute(0, 1, 3, 4, 2).flatten(2)  # [F + 1, 2, C * D]
        self.view_bias = both[-1].clone()  # [2, C * D]
        table = both - self.view_bias  # the last row is zero: the empty place
        self.view_table = table.flatten(1).contiguous()  # [F + 1, 2 * C * D]
        at_place = table[:, 0].reshape(-1, self.hidden)
        self.place_table = at_place.contiguous()  # [(F + 1) * C, D], of the first layer
        self.place_bias = self.view_bias[0].view(self.num_cells, self.hidden)

    def make_action_tables(self) -> None:
        """What each action, painted at a place, adds to the direct path, and to `mix` at that place."""
        model, n = self.model, self.num_actions
        joint = self.num_agents * n  # J
        device = model.reward_bins.device
        painted = torch.eye(joint * self.num_cells, device=device)
        painted = painted.view(-1, joint, *model.grid)  # [J * C, J, H, W]
        weight = model.shift.weight[:, self.num_planes :]
        direct = F.conv2d(painted, weight, padding=model.shift.padding)  # [J * C, D, H, W]
        table = direct.permute(0, 2, 3, 1).flatten(1)  # [J * C, C * D]
        self.action_table = F.pad(table, (0, 0, 0, 1)).contiguous()  # the last row is zero: no action
        mixed = model.mix.weight[:, self.hidden :, 0, 0].T  # [J, D]
        self.mix_table = F.pad(mixed, (0, 0, 0, 1)).contiguous()
        agents = torch.arange(self.num_agents, device=device)
        self.first_action = agents * n  # [A]
        self.first_row = torch.arange(self.num_agents + 1, device=device)

    def fold_layers(self) -> None:
        """Encoder's second layer and the part of `mix` that reads it; the others as matrices."""
        model, D = self.model, self.hidden
        second = model.encoder[2]
        mix = model.mix.weight[:, :D, 0, 0]  # [D, D]
        self.mix_weight = (mix @ second.weight[:, :, 0, 0]).T.contiguous()
        self.mix_bias = mix @ second.bias + model.mix.bias
        self.next_weight = model.next_latent.weight[:, :, 0, 0].T.contiguous()
        direct_bias = self.view_bias[1].view(self.num_cells, D)
        self.next_bias = direct_bias + model.next_latent.bias  # [C, D]
        self.move_weight = model.move.weight.contiguous(memory_format=torch.channels_last)
        self.decoder = []
        for layer in (model.decoder[1], model.decoder[3]):
            self.decoder.append((layer.bias, layer.weight[:, :, 0, 0].T.contiguous()))

    # -- views

    @torch.no_grad()
    def legal(self, obs: Tensor) -> Tensor:
        """As WorldModel.legal."""
        lists = self.list_cells(obs)
        return self.legal_at(lists.cells, lists.places[:, 0], lists.present[:, 0])

    @torch.no_grad()
    def legal_at(
        self,
        cells: Tensor,
        place: Tensor,
        there: Tensor | None = None,
    ) -> Tensor:
        """Cells [B, M] int32 that are set in views whose agent is at place [B], if `there` [B] bool -> [B, n] bool"""
        index = cells * self.num_cells + place[:, None].int()
        first = F.embedding_bag(index, self.place_table, mode="sum")  # [B, D]
        first = F.relu(first + self.place_bias[place])
        second = self.model.encoder[2]
        z = F.linear(first, second.weight[:, :, 0, 0], second.bias)
        z = F.relu(z)
        if there is not None:
            z = z * there[:, None]
        return self.model.mask_head(z) > 0

    # -- the step

    def step(
        self,
        obs: Tensor,
        joint_action: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As WorldModel.step."""
        return self.step_lists(obs, self.list_cells(obs), joint_action)

    @torch.no_grad()
    def step_lists(
        self,
        obs: Tensor,
        lists: CellLists,
        joint_action: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same where the lists are at hand."""
        B, C, D = len(obs), self.num_cells, self.hidden
        cells, places, present = lists
        acts = present & (joint_action >= 0)  # [B, A]
        action = self.first_action + joint_action
        action = torch.where(acts, action, self.num_agents * self.num_actions)  # [B, A]
        painted = action * C + places * acts

        from_view = F.embedding_bag(cells, self.view_table, mode="sum").view(B, 2, -1)
        first = from_view[:, 0] + self.view_bias[0]
        x = F.relu(first).view(B * C, D)
        x = torch.addmm(self.mix_bias, x, self.mix_weight)
        start = torch.arange(0, B * C, C, device=obs.device)[:, None]
        here = start + places  # [B, A], rows of x
        x.index_add_(0, here.flatten(), self.mix_table[action.flatten()])
        own, there = here[:, 0], present[:, :1]
        ego = self.model.ego(F.relu(x[own] * there))  # [B, D]
        x = F.relu_(x.view(B, C, D) + ego[:, None])
        x = x.view(B, *self.model.grid, D).permute(0, 3, 1, 2)  # channels last in memory
        x = F.relu_(F.conv2d(x, self.move_weight, self.model.move.bias, padding=self.model.move.padding))
        x = x.permute(0, 2, 3, 1).reshape(B * C, D)

        direct = F.embedding_bag(painted.int(), self.action_table, mode="sum")
        direct = direct + from_view[:, 1]
        next_z = (direct.view(B, C, D) + self.next_bias).view(B * C, D)
        next_z.addmm_(x, self.next_weight)
        for bias, weight in self.decoder:
            next_z = torch.addmm(bias, F.relu_(next_z), weight)
        next_obs = self.snap(next_z.view(B, C, self.num_planes))
        summary = self.summarise(x.view(B, C, D), obs, lists, action)
        reward = self.model.read_reward(summary, joint_action)
        done = self.model.done_head(summary)[:, 0] > 0
        return next_obs.view_as(obs), self.model.reward_value(reward), done

    def summarise(
        self,
        x: Tensor,
        obs: Tensor,
        lists: CellLists,
        action: Tensor,
    ) -> Tensor:
        """What the reward and exit heads read: x [B, C, D], action [B, A], rows of `mix_table` -> [B, 3D + P + J]"""
        each = torch.arange(len(obs), device=obs.device)
        own = lists.places[:, 0]
        there = lists.present[:, :1]
        planes = obs.flatten(1, 2)[each, own].float()  # [B, P]
        planes = (planes - self.model.obs_mean[0, :, 0, 0]) / self.model.obs_std[0, :, 0, 0]
        together = lists.places == own[:, None]
        no_action = self.num_agents * self.num_actions  # J
        seen = torch.where(together, action, no_action)
        painted = torch.zeros(len(obs), no_action + 1, device=obs.device)
        painted.scatter_(1, seen, 1.0)
        at_ego = torch.cat([planes, painted[:, :-1]], 1) * there
        features = [
            x[each, own] * there,
            x.mean(1),
            x.amax(1),
            at_ego,
        ]
        return torch.cat(features, 1)

    def snap(self, logits: Tensor) -> Tensor:
        """[B, C, P] -> the observation [B, C, P]: as WorldModel.snap of the expected planes."""
        A = self.num_agents
        snapped = (logits > 0).to(self.model.obs_dtype)
        agents = logits[..., :A].transpose(1, 2).contiguous()  # [B, A, C]
        present = agents.logsumexp(2) > 0  # likelier than "none", whose logit is 0
        likeliest = agents.argmax(2)  # [B, A]
        snapped[..., :A] = 0
        numbers = likeliest * self.num_planes + torch.arange(A, device=logits.device)
        snapped.flatten(1).scatter_(1, numbers, present.to(snapped.dtype))
        return snapped


# ---------------------------------------------------------------- losses
def count_logits(logits: Tensor) -> Tensor:
    """Logits of the counts 1 ... K of every cell -> of 0 ... K: [B, P, K, H, W] -> [B, P, K + 1, H, W]."""
    return F.pad(logits, (0, 0, 0, 0, 1, 0))  # count 0 has logit 0


def cell_logits(logits: Tensor) -> Tensor:
    """Logits of the cells an agent may stand on, and of none: [B, A, K, H, W] -> [B, A, H * W + 1]."""
    cells = logits[:, :, 0].flatten(2)  # [B, A, H * W]
    return F.pad(cells, (0, 1))  # "none" comes last and has logit 0


def obs_loss(model: WorldModel, logits: Tensor, target: Tensor) -> Tensor:
    """Loss of every sample, summed over planes and cells: logits [B, P, K, H, W], target [B, P, H, W] -> [B]."""
    if model.obs_head in NUMBER_HEADS:
        error = logits[:, :, 0] - model.normalise(target)
        if model.obs_head == "change":
            error = error / model.obs_change
        return error.square().sum((1, 2, 3))
    if model.obs_head == "bce":
        at_least = target.unsqueeze(2) >= model.counts(target.device)  # [B, P, K, H, W]
        loss = F.binary_cross_entropy_with_logits(logits, at_least.float(), reduction="none")
        return loss.sum((1, 2, 3, 4))
    agents = model.spec.agent_planes
    others = [p for p in range(target.shape[1]) if p not in agents]
    classes = count_logits(logits[:, others]).transpose(1, 2)  # [B, K + 1, P', H, W]
    counts = target[:, others].long()  # [B, P', H, W]
    counts = counts.clamp(max=model.levels)
    loss = F.cross_entropy(classes, counts, reduction="none")  # [B, P', H, W]
    loss = loss.sum((1, 2, 3))
    if agents:
        cells = cell_logits(logits[:, agents]).transpose(1, 2)  # [B, H * W + 1, A]
        seen = target[:, agents].flatten(2)  # [B, A, H * W]
        absent = 1 - seen.sum(2, keepdim=True)  # [B, A, 1]
        where = torch.cat([seen, absent], 2).argmax(2)  # [B, A]
        agent_loss = F.cross_entropy(cells, where, reduction="none")  # [B, A]
        loss = loss + agent_loss.sum(1)
    return loss


def reward_loss(model: WorldModel, out: Tensor, target: Tensor) -> Tensor:
    """out [B, bins], target [B] -> [B]; twohot: cross-entropy with the two bins around the target (Hafner 2023)."""
    if model.config["reward_head"] == "mse":
        return (out[:, 0] - target).square()
    bins = model.reward_bins
    target = target.clamp(bins[0], bins[-1])
    above = torch.searchsorted(bins, target.contiguous())
    above = above.clamp(1, len(bins) - 1)  # [B]
    lower, upper = bins[above - 1], bins[above]
    weight = (target - lower) / (upper - lower)  # of the upper bin, [B]
    logprobs = F.log_softmax(out, 1)
    above = above.unsqueeze(1)
    upper_logprob = logprobs.gather(1, above)[:, 0]
    lower_logprob = logprobs.gather(1, above - 1)[:, 0]
    return -(weight * upper_logprob + (1 - weight) * lower_logprob)


def make_reward_bins(rewards: Tensor) -> list[float]:
    """The distinct rewards themselves where there are at most 64 (a deterministic game: no rounding at all), else 63
    bins between the extremes, evenly spaced in symlog."""
    bins = rewards.unique()
    # DEVIATION: DreamerV3 has a fixed grid; here the bins lie where rewards are.
    if len(bins) > 64:
        ends = bins[[0, -1]]
        symlog = ends.sign() * ends.abs().log1p()
        low, high = symlog.tolist()
        bins = torch.linspace(low, high, 63)
        bins = bins.sign() * bins.abs().expm1()
    if len(bins) == 1:
        bins = torch.cat([bins, bins + 1])
    return bins.tolist()


# ---------------------------------------------------------------- data
class Pairs(NamedTuple):
    """Samples of a dataset: one agent's view of one env step each."""

    rows: Tensor  # [V] int64
    seats: Tensor  # [V] int64

    def take(self, inds: Tensor | slice) -> Pairs:
        return Pairs(self.rows[inds], self.seats[inds])


class Targets(NamedTuple):
    """What the reward head learns, of every row and seat."""

    values: Tensor  # [S, A] float32
    known: Tensor  # [S, A] bool


class TrainingData(NamedTuple):
    """All that a training reads."""

    dataset: Dataset
    config: dict[str, Any]  # of the model
    samples: Samples
    targets: Targets
    num_rows: int  # env steps to train on
    train: Pairs
    heldout: dict[str, Pairs]  # by name of the split, what an evaluation looks at


class Samples:
    """A dataset on the device. A sample is a pair (row, seat) whose agent was active."""

    def __init__(self, dataset: Dataset, device: torch.device):
        self.device = device
        self.obs = self.load(dataset.observations)  # [S, A, *O]
        self.next_obs = self.load(dataset.next_observations)  # [S, A, *O]
        self.actions = self.load(dataset.actions)  # [S, A(, n)]
        self.rewards = self.load(dataset.rewards)  # [S, A]
        self.terminations = self.load(dataset.terminations)  # [S, A]
        self.active = self.load(dataset.active)  # [S, A]
        self.masks = None
        if dataset.action_masks is not None:
            self.masks = self.load(dataset.action_masks)  # [S, A, n]
        same_episode = np.append(dataset.timesteps[1:] != 0, False)
        self.goes_on = self.load(same_episode)  # [S], row + 1 is the same episode's next

    def load(self, array: np.ndarray) -> Tensor:
        array = np.ascontiguousarray(array)
        return torch.from_numpy(array).to(self.device)

    def pairs(self, rows: np.ndarray) -> Pairs:
        """Every sample of the given rows."""
        rows = self.load(rows)
        which, seats = self.active[rows].nonzero(as_tuple=True)
        return Pairs(rows[which], seats)

    def joint_action(self, rows: Tensor, seats: Tensor) -> Tensor:
        """[B], [B] -> the joint action of the row from that seat, ego first [B, A(, n)]."""
        return rotate_to_ego(self.actions[rows], seats, 1)

    def after(self, rows: Tensor, seats: Tensor) -> tuple[Tensor, Tensor]:
        """The rows one step later [B], and whether they are the same episode with the agent still in it [B] bool."""
        goes_on = self.goes_on[rows] & ~self.terminations[rows, seats]
        return torch.where(goes_on, rows + 1, rows), goes_on


class Minibatches:
    """Draws samples uniformly, but the share `balanced` evenly over groups (what the agent is paid, the most that any
    agent is paid in that step): to see a hunt is as rare as to take part in one, and must not be taken for it."""

    def __init__(
        self,
        rewards: Tensor,
        pairs: Pairs,
        bins: list[float],
        balanced: float,
        batch_size: int,
        seed: int,
    ):
        """rewards [S, A]; pairs: the V samples to draw from; bins: rewards that are told apart."""
        centres = torch.tensor(bins, device=rewards.device)
        edges = (centres[1:] + centres[:-1]) / 2
        nearest = torch.bucketize(rewards, edges)  # [S, A]
        own = nearest[pairs.rows, pairs.seats]  # [V]
        most = nearest.amax(1)[pairs.rows]  # [V]
        groups = own * len(bins) + most
        self.counts = groups.unique(return_counts=True)[1]  # [groups that occur]
        self.first = self.counts.cumsum(0) - self.counts  # where in by_group each begins
        self.by_group = groups.argsort()  # [V], group after group
        self.num_balanced = round(balanced * batch_size)
        self.num_uniform = batch_size - self.num_balanced
        self.generator = torch.Generator(rewards.device).manual_seed(seed)

    def draw(self) -> Tensor:
        """Indices [B] into the V samples."""
        options = {"generator": self.generator, "device": self.by_group.device}
        uniform = torch.randint(len(self.by_group), (self.num_uniform,), **options)
        group = torch.randint(len(self.counts), (self.num_balanced,), **options)
        inside = torch.rand(self.num_balanced, **options) * self.counts[group]
        balanced = self.by_group[self.first[group] + inside.long()]
        return torch.cat([uniform, balanced])


def read_data(args: Args, device: torch.device) -> TrainingData:
    """Reads, splits and measures the dataset. UsageError: it is unsound, or not one that these arguments fit."""
    dataset = load_dataset(args.data)
    if dataset.meta.get("nvec"):
        parts = dataset.meta["nvec"]
        raise UsageError(
            f"{args.data}: expected discrete or continuous actions, got {parts} of several parts: use others"
        )
    splits = dataset.split_episodes(args.seed, args.heldout_fraction, args.holdout_policies)
    episodes = np.random.default_rng(args.seed).permutation(splits["train"])
    if args.max_samples is not None:
        ends = dataset.episode_lengths[episodes].cumsum()
        episodes = episodes[: np.searchsorted(ends, args.max_samples) + 1]
    train_rows = dataset.rows_of(episodes)
    config = data_config(dataset, train_rows, args)
    samples = Samples(dataset, device)
    targets = Targets(samples.rewards, torch.ones_like(samples.active))
    if args.reward_target == "td":
        targets = td_targets(dataset, samples, args.gamma)
    train = samples.pairs(train_rows)
    known = targets.known[train]  # [V]
    learnt = targets.values[train][known]
    config["reward_bins"] = make_reward_bins(learnt.cpu())
    heldout = {}
    for name in SPLITS[1:]:
        pairs = samples.pairs(dataset.rows_of(splits[name]))
        if len(pairs.rows):
            generator = torch.Generator().manual_seed(args.seed)
            order = torch.randperm(len(pairs.rows), generator=generator)
            heldout[name] = pairs.take(order[: args.eval_samples])
    return TrainingData(
        dataset=dataset,
        config=config,
        samples=samples,
        targets=targets,
        num_rows=len(train_rows),
        train=train,
        heldout=heldout,
    )


def data_config(
    dataset: Dataset,
    train_rows: np.ndarray,
    args: Args,
) -> dict[str, Any]:
    """The model's config for this dataset; what is measured in it is measured on the training rows only."""
    meta = dataset.meta
    spec = describe_obs(meta)
    active = dataset.active[train_rows]
    seen = dataset.observations[train_rows][active]  # [V, *O]
    seen = seen.reshape(-1, meta["obs_shape"][-1])  # [V * H * W, P]
    levels = max(1, int(seen.max()))
    numbers = "real" in spec.kinds or levels > 15  # 0/1 planes and small counts are fed as they are
    mean = np.zeros(seen.shape[1])
    std = np.ones(seen.shape[1])
    if numbers:
        mean = seen.mean(0, dtype=np.float64)
        std = seen.std(0, dtype=np.float64)
        std = np.where(std > 1e-6, std, 1.0)
    discrete = meta["num_actions"] is not None
    action_dim = meta["num_actions"] or math.prod(meta["action_shape"])
    config = {
        "env_id": meta["env_id"],
        "env_kwargs": meta["env_kwargs"],
        "obs_shape": list(meta["obs_shape"]),
        "obs_dtype": meta["obs_dtype"],
        "num_agents": meta["num_agents"],
        "action_dim": action_dim,
        "discrete": discrete,
        "has_mask": meta["has_masks"],
        "levels": levels,
        "obs_mean": mean.tolist(),
        "obs_std": std.tolist(),
        "hidden_size": args.hidden_size,
        "loss": args.loss,
        "obs_head": choose_obs_head(args.obs_head, args.loss, spec, levels),
        "joint_action": choose_joint_action(args.joint_action, spec, meta["env_id"]),
        "reward_head": args.reward_head,
        "reward_target": args.reward_target,
    }
    if config["obs_head"] == "change":
        config["obs_change"] = usual_change(dataset, train_rows, config["obs_std"])
    return config


def usual_change(dataset: Dataset, rows: np.ndarray, obs_std: list[float]) -> list[float]:
    """Root mean square of o[t+1] - o[t] of every channel [P], where the agent stays; at least 0.1 % of `obs_std`."""
    stays = dataset.active[rows] & ~dataset.terminations[rows]
    before = dataset.observations[rows][stays].astype(np.float64)
    after = dataset.next_observations[rows][stays]
    change = (after - before).reshape(-1, before.shape[-1])  # [V, (H, W,) P] -> [V', P]
    size = np.sqrt(np.square(change).mean(0))
    return np.maximum(size, 1e-3 * np.array(obs_std)).tolist()


def choose_obs_head(wanted: str | None, loss: str, spec: ObsSpec, levels: int) -> str:
    """UsageError: a head was wanted that does not fit the numbers or the loss. levels: the largest number seen"""
    real = "real" in spec.kinds
    if wanted == "change" and not (real and loss == "obs"):
        raise UsageError("--obs-head change expected real-valued observations and --loss obs: use another head")
    if not real and levels <= 15:
        return wanted or "categorical"
    if wanted is None:
        return "change" if real and loss == "obs" else "mse"
    if wanted in NUMBER_HEADS:
        return wanted
    found = "real numbers" if real else f"counts up to {levels}"
    raise UsageError(f"--obs-head {wanted} expected 0/1 planes or counts up to 15, got {found}: use mse")


def choose_joint_action(wanted: str | None, spec: ObsSpec, env_id: str) -> str:
    """UsageError: actions were to be painted where no plane shows agents."""
    can_paint = bool(spec.agent_planes) or spec.team is not None
    if wanted == "painted" and not can_paint:
        channels = ", ".join(spec.names[:8])
        raise UsageError(
            f"--joint-action painted expected planes that show agents, got channels {channels} of {env_id}: "
            "use onehot or attention"
        )
    return wanted or ("painted" if can_paint else "onehot")


def td_targets(dataset: Dataset, samples: Samples, gamma: float) -> Targets:
    """r + gamma V(s'), known but after a truncation, whose last state is in no dataset.

    UsageError: the dataset has no values.
    """
    if dataset.values is None:
        raise UsageError(
            f"--reward-target td expected values in {dataset.path}, found none: collect it with --values-of RUN_DIR"
        )
    values = samples.load(dataset.values)  # [S, A]
    next_values = values.roll(-1, 0)  # of the next row
    ends = samples.terminations
    targets = samples.rewards + gamma * next_values * ~ends
    return Targets(targets, ends | samples.goes_on[:, None])


class LossPart(NamedTuple):
    """A loss of every sample, and which of them count."""

    loss: Tensor  # [B]
    counts: Tensor  # [B] bool


def losses_of_batch(
    model: WorldModel,
    target_encoder: nn.Module | None,
    samples: Samples,
    targets: Targets,
    pairs: Pairs,
    steps: int,
) -> dict[str, Tensor]:
    """Means over all valid steps of a self-fed rollout of `steps` from the given samples.

    An agent's own exit ends its rollout, and what it would have seen after it is nobody's target.
    """
    rows, seats = pairs
    planes = model.to_planes(samples.obs[rows, seats])
    valid = torch.ones_like(rows, dtype=torch.bool)
    totals, counts = {}, {}
    for t in range(steps):
        out = model(planes, samples.joint_action(rows, seats))
        now = Pairs(rows, seats)
        parts = losses_of_step(model, target_encoder, samples, targets, now, planes, out, valid)
        if samples.masks is not None and t == 0:  # later observations are imagined: no mask belongs to them
            mask = samples.masks[rows, seats].float()  # [B, n]
            legal = F.binary_cross_entropy_with_logits(out["mask"], mask, reduction="none")
            parts["mask_loss"] = LossPart(legal.sum(1), valid)
        for name, part in parts.items():
            total = (part.loss * part.counts).sum()
            totals[name] = totals.get(name, 0.0) + total
            counts[name] = counts.get(name, 0.0) + part.counts.sum()
        if t + 1 < steps:
            expected = model.expected_planes(out["obs"])
            snapped = model.snap(expected)
            planes = expected + (snapped - expected).detach()  # straight-through: reads what it will read
            rows, goes_on = samples.after(rows, seats)
            valid = valid & goes_on
    return {name: total / counts[name].clamp(min=1) for name, total in totals.items()}


def losses_of_step(
    model: WorldModel,
    target_encoder: nn.Module | None,
    samples: Samples,
    targets: Targets,
    pairs: Pairs,
    planes: Tensor,
    out: dict[str, Tensor],
    valid: Tensor,
) -> dict[str, LossPart]:
    """The losses of one step. planes [B, P, H, W]: what the model read; valid [B] bool: the agent is still there."""
    done = samples.terminations[pairs]  # [B]
    stays = valid & ~done
    target = model.to_planes(samples.next_obs[pairs])
    parts = {}
    if model.loss == "obs":
        seen = obs_loss(model, out["obs"], target)
        parts["obs_loss"] = LossPart(seen, stays)
    else:  # the decoder learns to decode encodings
        decoded = model.decode(out["z"])
        seen = obs_loss(model, decoded, planes.detach())
        parts["obs_loss"] = LossPart(seen, valid)
    if model.loss == "latent":
        # What keeps z from collapsing: the target is a slowly moving copy without gradient (BYOL, SPR), and the
        # decoder above must be able to read z. Cosine distance per cell.
        # DEVIATION: SPR rolls the latent on; from the second step on it is decoded and encoded again here.
        with torch.no_grad():
            target_z = model.encode(target, target_encoder)
        distance = 1 - F.cosine_similarity(out["next_z"], target_z, dim=1)  # [B, H, W]
        parts["latent_loss"] = LossPart(distance.sum((1, 2)), stays)
    paid = reward_loss(model, out["reward"], targets.values[pairs])
    parts["reward_loss"] = LossPart(paid, valid & targets.known[pairs])
    left = F.binary_cross_entropy_with_logits(out["done"], done.float(), reduction="none")
    parts["done_loss"] = LossPart(left, valid)
    return parts


# ---------------------------------------------------------------- evaluation, checkpoints
@torch.no_grad()
def evaluate(
    model: WorldModel,
    samples: Samples,
    targets: Targets,
    pairs: Pairs,
    batch_size: int = 512,
) -> dict[str, float]:
    """One-step scores on samples; observations are scored where the agent stays. The judge tells more."""
    sums = {}
    for start in range(0, len(pairs.rows), batch_size):
        batch = pairs.take(slice(start, start + batch_size))
        numbers = score_batch(model, samples, targets, batch)
        for name, values in numbers.items():
            sums[name] = sums.get(name, 0.0) + values.double().sum()
    total = {name: value.item() for name, value in sums.items()}
    stays = max(total["stays"], 1)
    return {
        "obs_loss": total["obs_loss"] / stays,
        "obs_mse": total["error"] / stays,
        "exact_match": total["exact"] / stays,
        "reward_mse": total["reward_error"] / max(total["known"], 1),
        "done_precision": total["hits"] / max(total["pred_dones"], 1),
        "done_recall": total["hits"] / max(total["dones"], 1),
    }


def score_batch(
    model: WorldModel,
    samples: Samples,
    targets: Targets,
    pairs: Pairs,
) -> dict[str, Tensor]:
    """What `evaluate` sums up: a number of every sample, each [B]."""
    target = model.to_planes(samples.next_obs[pairs])
    dones = samples.terminations[pairs]
    known = targets.known[pairs]
    planes = model.to_planes(samples.obs[pairs])
    out = model(planes, samples.joint_action(*pairs))
    expected = model.expected_planes(out["obs"])
    error = (expected - target).square()  # [B, P, H, W]
    right = model.snap(expected) == target
    right = right.flatten(1).all(1)
    reward_error = model.reward_value(out["reward"]) - targets.values[pairs]
    pred_dones = out["done"] > 0
    return {
        "obs_loss": obs_loss(model, out["obs"], target) * ~dones,
        "error": error.mean((1, 2, 3)) * ~dones,
        "exact": right & ~dones,
        "stays": ~dones,
        "reward_error": reward_error.square() * known,
        "known": known,
        "hits": pred_dones & dones,
        "pred_dones": pred_dones,
        "dones": dones,
    }


def load_world_model(path: str | Path, device: torch.device | str = "cpu") -> WorldModel:
    """The best model of a run folder, or that of a .pt file, ready for `step` and `rollout`.

    Raises UsageError for anything but such a checkpoint.
    """
    checkpoint = load_checkpoint(best_or_latest(path), CHECKPOINT_FORMAT, device)
    model = WorldModel(checkpoint["config"])
    load_weights(model, checkpoint["model"], path)
    model = model.to(device).eval()
    if Simulator.fits(model):
        model.simulator = [Simulator(model)]
    return model


def load_resumed(args: Args) -> dict[str, Any] | None:
    """The checkpoint to continue; None: a new run. UsageError: there is none."""
    if not args.resume:
        return None
    return load_checkpoint(args.resume, CHECKPOINT_FORMAT, needs=SAVED)


def check_same_data(
    args: Args,
    checkpoint: dict[str, Any],
    data: TrainingData,
) -> None:
    """UsageError unless this is the data that the run was trained on; where it lies does not matter."""
    if checkpoint["config"] != data.config or not same_data(checkpoint["data_meta"], data.dataset):
        raise UsageError(f"{args.data} is not the data that {args.resume} was trained on: give that, or start anew")


def plot_curves(run_dir: Path) -> None:
    """learning_curve.png from metrics.csv: training losses and held-out errors over updates, log scale."""
    rows = read_metrics(run_dir)
    training, heldout = {}, {}
    for column in rows[0]:
        values = [float(row[column] or "nan") for row in rows]
        if column.startswith("losses/"):
            training[column] = values
        elif column.endswith(("match", "precision", "recall")):  # what is to become 1: its distance from 1
            heldout[f"1 - {column}"] = [max(1 - x, 1e-7) for x in values]
        elif column.startswith("eval"):
            heldout[column] = [max(x, 1e-7) for x in values]
    updates = [int(row["update"]) for row in rows]
    panels = [
        Panel("training", "loss", training, log_scale=True),
        Panel("held out", "error", heldout, log_scale=True),
    ]
    plot_learning_curve(run_dir / "learning_curve.png", updates, "update", panels)


# ---------------------------------------------------------------- main
def check_args(args: Args) -> None:
    """What can be wrong before the data is read: UsageError."""
    if not args.data:
        raise UsageError("--data expected a dataset folder, got none: make one with collect_data.py")
    if args.resume and not Path(args.resume).is_dir():
        raise UsageError(f"--resume expected a run folder, got the file {args.resume}: give its folder")
    if args.loss == "recon" and args.rollout_steps > 1:
        raise UsageError("--loss recon learns no dynamics to roll out: leave --rollout-steps at 1")


def resolve(args: Args, data: TrainingData) -> Args:
    """The arguments with what None stood for: main repeats the run from these alone."""
    balance_rewards = args.balance_rewards
    if balance_rewards is None:
        certain = describe_obs(data.dataset.meta).certain and args.reward_target == "reward"
        balance_rewards = 0.25 if certain else 0.0
    return replace(
        args,
        resume=None,
        holdout_policies=tuple(args.holdout_policies),
        obs_head=data.config["obs_head"],
        joint_action=data.config["joint_action"],
        balance_rewards=balance_rewards,
    )


def describe_run(
    data: TrainingData,
    model: WorldModel,
    args: Args,
    device: torch.device,
) -> str:
    """Two lines on what is trained on what."""
    config = data.config
    no_gpu = " (no CUDA device found)" if args.cuda and device.type == "cpu" else ""
    evaluated = ", ".join(f"{name} {len(pairs.rows):,}" for name, pairs in data.heldout.items())
    num_weights = sum(p.numel() for p in model.parameters())
    return (
        f"data     {args.data}: {config['env_id']}, {data.num_rows:,} env steps, {len(data.train.rows):,} samples; "
        f"evaluated on {evaluated}, on {device}{no_gpu}\n"
        f"model    {num_weights:,} weights, obs head {config['obs_head']}, joint action {config['joint_action']}, "
        f"reward head {config['reward_head']}, loss {args.loss}"
    )


def print_scores(row: dict[str, str], data: TrainingData) -> None:
    """The scores of the last evaluation, a line for each kind of held-out episodes."""
    for name in data.heldout:
        tag = EVAL_TAGS[name]
        values = {key: float(row[f"{tag}/{key}"]) for key in SCORES}
        scores = [f"{key} {value:.6g}" for key, value in values.items()]
        print(f"{name:17}" + "  ".join(scores))


def learning_rate_at(update: int, args: Args) -> float:
    """A warm-up of 100 updates, and on request a linear fall to 0."""
    remaining = 1.0
    if args.anneal_lr:
        remaining = 1 - (update - 1) / args.total_updates
    return args.learning_rate * remaining * min(1.0, update / 100)


@torch.no_grad()
def follow_slowly(target_encoder: nn.Module, encoder: nn.Module, tau: float) -> None:
    """Moves the target encoder by the share tau towards the encoder."""
    pairs = zip(target_encoder.parameters(), encoder.parameters(), strict=True)
    for slow, fast in pairs:
        slow.lerp_(fast, tau)


def check_finite(
    losses: dict[str, float],
    update: int,
    run_dir: Path,
) -> None:
    """FloatingPointError where a loss is no number any more."""
    bad = [f"{name} is {x}" for name, x in losses.items() if not math.isfinite(x)]
    if bad:
        raise FloatingPointError(
            f"update {update}: {', '.join(bad)}; last good checkpoint: {run_dir / 'latest.pt'}; "
            "try a lower --learning-rate"
        )


@run_keeping
def main(args: Args) -> Path:
    """Trains (or resumes); returns the run folder. UsageError: unusable arguments or data."""
    # ---- arguments
    check_args(args)
    device = get_device(args.cuda)
    kept = None
    if args.resume:
        kept = keep_folder(Path(args.resume), command(__file__, "--resume", args.resume))
    checkpoint = load_resumed(args)
    data = read_data(args, device)  # before there is a run folder: what cannot be used leaves none
    resolved = resolve(args, data)
    first_update, best_score = 1, math.inf
    if checkpoint is not None:
        check_same_data(args, checkpoint, data)
        first_update, best_score = checkpoint["update"] + 1, checkpoint["best_score"]

    # ---- logging
    if args.resume:
        run_dir = Path(args.resume)
    else:
        env_id = data.config["env_id"]
        run_dir = new_run_dir(args.runs_dir, env_id, args.exp_name, args.seed)
        kept = keep_folder(run_dir, command(__file__, "--resume", run_dir))
    write_json(run_dir / "args.json", asdict(resolved))
    if args.track:
        start_wandb(run_dir, args.wandb_project_name, args.wandb_entity, asdict(resolved))
    columns = ["update", "charts/SPS", "charts/learning_rate"]
    columns += [f"losses/{name}" for name in LOSSES]
    for tag in EVAL_TAGS.values():
        columns += [f"{tag}/{name}" for name in SCORES]
    keep_until = first_update - 1 if args.resume else None
    metrics = Metrics(run_dir, "update", columns, asdict(resolved), keep_until)

    # ---- seeding
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic

    # ---- data
    minibatches = Minibatches(
        data.targets.values,
        data.train,
        data.config["reward_bins"],
        resolved.balance_rewards,
        args.batch_size,
        args.seed,
    )

    # ---- networks
    model = WorldModel(data.config).to(device)
    target_encoder = None
    if args.loss == "latent":
        target_encoder = copy.deepcopy(model.encoder).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    print(f"run      {run_dir}")
    print(describe_run(data, model, args, device))

    # ---- resume
    if checkpoint is not None:
        load_weights(model, checkpoint["model"], args.resume)
        load_weights(optimizer, checkpoint["optimizer"], args.resume)
        if target_encoder is not None:
            load_weights(target_encoder, checkpoint["target_encoder"], args.resume)
        minibatches.generator.set_state(checkpoint["generator"])
        kept.saved = f"update {first_update - 1} of {args.total_updates}"

    # ---- loop
    stop = StopSignal("update")
    progress = tqdm(total=args.total_updates, initial=first_update - 1, unit="update", disable=None)
    sums, since = {}, first_update - 1
    update = since  # a finished run that is resumed does the closing part again
    started = time.perf_counter()
    try:
        for update in range(first_update, args.total_updates + 1):
            optimizer.param_groups[0]["lr"] = learning_rate_at(update, args)
            mb_pairs = data.train.take(minibatches.draw())
            losses = losses_of_batch(model, target_encoder, data.samples, data.targets, mb_pairs, args.rollout_steps)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            if target_encoder is not None:
                follow_slowly(target_encoder, model.encoder, args.latent_tau)
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach()
            progress.update()

            # -- evaluation, logging, checkpoint: the only looks at the device
            if update % args.eval_interval and update < args.total_updates and not stop.requested:
                continue
            num_updates = update - since
            row = {f"losses/{name}": (total / num_updates).item() for name, total in sums.items()}
            check_finite(row, update, run_dir)
            seconds = time.perf_counter() - started
            row["charts/SPS"] = num_updates * args.batch_size / seconds
            row["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            for name, pairs in data.heldout.items():
                scores = evaluate(model, data.samples, data.targets, pairs)
                row |= {f"{EVAL_TAGS[name]}/{key}": x for key, x in scores.items()}
            metrics.log(update, row)
            progress.set_postfix_str(f"exact match {row['eval/exact_match']:.4f}")
            score = row["eval/obs_loss"] + row["eval/reward_mse"]
            is_best = score < best_score
            best_score = min(score, best_score)
            checkpoint = {
                "format": CHECKPOINT_FORMAT,
                "args": asdict(resolved),
                "config": data.config,
                "data_meta": data.dataset.meta,
                "update": update,
                "best_score": best_score,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "target_encoder": None if target_encoder is None else target_encoder.state_dict(),
                "generator": minibatches.generator.get_state(),
            }
            metrics.sync()
            if is_best:  # first: a crash between the two must not leave a best score without its weights
                save_checkpoint(checkpoint, run_dir / "best.pt")
            save_checkpoint(checkpoint, run_dir / "latest.pt")
            kept.saved = f"update {update} of {args.total_updates}"
            if stop.requested:
                break
            sums, since = {}, update
            started = time.perf_counter()
    finally:
        stop.restore()
        progress.close()
        metrics.close()

    # ---- close
    rows = read_metrics(run_dir)
    if rows:
        plot_curves(run_dir)
        print_scores(rows[-1], data)
    if update < args.total_updates:
        print(f"stopped after update {update} of {args.total_updates}; go on with: {kept.again}")
    else:
        print(f"judge it with: python test_obs_reward_model.py --checkpoint {run_dir} --data {args.data}")
    return run_dir


def saved_run(args: Args) -> tuple[Args, list[str]] | None:
    """For --resume: the run's own arguments, and the flags that must not contradict them."""
    if not args.resume:
        return None
    checkpoint = load_checkpoint(args.resume, CHECKPOINT_FORMAT)
    return restore_args(Args, checkpoint["args"], args.resume), FIXED_BY_CHECKPOINT


def cli(argv: list[str] | None = None) -> int:
    """The command line. Exit codes: see command_line."""
    return command_line(Args, main, LIMITS, argv, saved_run)


if __name__ == "__main__":
    sys.exit(cli())
