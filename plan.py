"""Acts by planning: imagines what the others will do and what comes of it, with everything it needs learned offline.

A belief about every other agent (the encoder's z of what it sees and did) is kept through the episode. At each step
and for each legal action, K joint actions of the others are drawn from the model of other agents (MOA), the world
model moves on, others go on by the MOA and the own seat by a base policy, for H steps. Everything is one batch.

rollout: the best base policy, or a first action before it that is better, which in expectation is no worse (policy
switching, rollout; Chang, Givan & Chong 2004, doi 10.1023/B:DISC.0000028199.78776.c4); one-step: argmax
E[r + gamma V(o')]; mcts: PUCT (Silver et al. 2017, doi 10.1038/nature24270). The setting is that of HOP (Huang
et al. 2024, arXiv 2406.08002), which plans on the true simulator. See docs/plan.md.

    python plan.py --env-id stag_hunt-4x4-4h1s --world-model runs/WM --opponents runs/CVAE --partners nearest_hare:3
    python plan.py --env-id stag_hunt-4x4-4h1s --world true --opponents true --partners nearest_stag:3 # an upper bound
"""

from __future__ import annotations

import startup  # noqa: F401

# isort: split

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from sklearn.cluster import KMeans
from torch import Tensor, nn
from tqdm import tqdm

import hyper_mappo
import pretrain_vae
import runs
from dataset import ego_order, load_dataset
from envs import EnvStep, ObsSpec, VecEnv, check_env, describe_obs, make_vec_env
from envs.grid_game import GridVecEnv
from envs.players import Partners, parse_partners, same_rules, script_names, script_probs, scripted_game
from hyper_mappo import Policy, load_critic, make_policy
from opponent_samples import Samples, relative_cells
from pretrain_vae import VAE, load_vae
from runs import StopSignal, UsageError, get_device, restore_args, write_json
from world_model import CellLister, CellLists, Simulator, WorldModel, load_world_model

TRUE = "true"  # what --opponents is given for the real scripts
SAME_RETURN = 1e-3  # returns of so small a relative difference are the same: a learned world is no more exact
UNIFORM_SHARE = 0.25  # of the priors (mcts), as of the noise in AlphaZero's
NOWHERE = -1  # a situation that is none
FIXED_SHARE = 0.02  # of the weights of MOA and strangers, which goes back to the prior at each step
ONCE = 0.3  # how often strangers seem to have been in each situation already
NEW = 0.5  # how often they do anything that is legal in a new situation; else they are as expected
CENTRE_SEQUENCES = 4096  # training sequences whose z are clustered


@dataclass
class Args:
    env_id: str = "stag_hunt-4x4-4h1s"
    """environment to act in"""
    env_kwargs: str = "{}"
    """arguments of the env as JSON"""
    backend: Literal["auto", "pettingzoo", "batched"] = "pettingzoo"
    """what steps the envs: pettingzoo is the genuine env; auto takes the batched twin where there is one"""
    partners: tuple[str, ...] = ()
    """who fills the other seats, NAME:SEATS each: random, a scripted player, or a run folder of hyper_mappo.py;
    pool=NAME,NAME:SEATS draws them anew for each episode"""
    seat: int = 0
    """the seat that plans"""
    world_model: str | None = None
    """run folder of world_model.py (needed unless --world true)"""
    world: Literal["learned", "true"] = "learned"
    """true: the real simulator instead of the world model, an upper bound"""
    opponents: str | None = None
    """run folder of pretrain_vae.py; true: the partners' own scripts, an upper bound"""
    policy: str | None = None
    """run folder of hyper_mappo.py: a base policy, and its critic where observations are cut off"""
    scripts: tuple[str, ...] | None = None
    """scripted players as base policies; None: all that head for something, where there is neither --policy nor
    --subgoals"""
    subgoals: int = 0
    """so many base policies more: the MOA's own policy head under the centres of its latent space"""
    data: str | None = None
    """dataset of the centres; None: the one that --opponents was trained on"""
    values: str | None = None
    """dataset with values (collect_data.py --values-of) to fit a value head on, where --policy's critic cannot be
    asked; None: no value head"""
    method: Literal["one-step", "rollout", "mcts", "policy"] = "rollout"
    """policy: the first base policy as it is, without planning"""
    horizon: int = 35
    """steps that are imagined at most (H)"""
    samples: int = 8
    """futures of each first action (K); mcts: trees per decision"""
    base_samples: int = 32
    """futures of each base policy, by which the best of them is chosen (rollout, mcts)"""
    caution: float = 2.0
    """standard errors of the K futures by which a first action must be better than the best base policy's own (rollout)
    """
    simulations: int = 32
    """futures that build one tree (mcts)"""
    exploration: float = 1.25
    """weight of the prior against the values in PUCT (mcts)"""
    gamma: float = 0.99
    """discount of what is imagined"""
    surprise: float = 0.2
    """how likely a partner is unlike all that --opponents was trained on, before it is seen to act; 0: it is not"""
    episode_limit: int | None = None
    """env steps after which episodes are cut; None: the longest in the data of --opponents, or not known"""
    joint_obs: bool = False
    """plan on everyone's observations, where the own view does not show what the others see"""
    episodes: int = 200
    """episodes to play"""
    num_envs: int = 64
    """environments side by side, decided for in one batch"""
    seed: int = 1
    """seed of the envs, the partners and what is imagined"""
    exp_name: str = "plan"
    """name of this experiment, part of the run folder's name"""
    runs_dir: str = "runs"
    """folder that receives the run's folder"""
    cuda: bool = True
    """use the GPU if there is one"""
    num_threads: int | None = None
    """CPU threads of one PyTorch operation; None: PyTorch's choice"""


# What numbers must be.
LIMITS = {
    "at least 1": (
        lambda x: x >= 1,
        "horizon samples base_samples simulations episodes num_envs num_threads episode_limit",
    ),
    "at least 0": (lambda x: x >= 0, "subgoals exploration seat caution"),
    "from 0 to 1": (lambda x: 0 <= x <= 1, "gamma"),
    "at least 0 and less than 1": (lambda x: 0 <= x < 1, "surprise"),
    "from 0 to 2147483647": (lambda x: 0 <= x < 2**31, "seed"),
}


# What a world returns: views [B, V, *O] after a step, own reward [B], own exit [B] bool, who is still there [B, A] bool
Moved = tuple[Tensor, Tensor, Tensor, Tensor]


# ---------------------------------------------------------------- what is seen
# B futures (or roots), A agents in ego order: self, i+1, i+2 ... mod A; V views that are imagined: 1 or A.


class Eyes:
    """Everyone's view, of the own one where that shows the whole map, else of everyone's (`joint`)."""

    def __init__(self, spec: ObsSpec, num_agents: int, joint: bool):
        one_plane_each = len(spec.agent_planes) == num_agents
        self.whole_map = spec.certain and one_plane_each and spec.ego == "plane"
        self.joint = joint and not self.whole_map
        self.num_agents = num_agents
        self.planes = torch.empty(0)
        if self.whole_map:
            others = torch.arange(num_agents, len(spec.names)).expand(num_agents, -1)
            self.planes = torch.cat([ego_order(num_agents), others], 1)  # [A, P], row j: my planes as j counts them
        self.turned: Tensor | None = None
        self.lister: CellLister | None = None

    def everyone(self, views: Tensor) -> Tensor:
        """views [B, V, *O] -> [B, A, *O]"""
        if self.joint:
            return views
        own = views[:, 0]  # [B, H, W, P]
        turned = own[..., self.planes.to(own.device)]  # [B, H, W, A, P]
        return turned.movedim(-2, 1)

    def turned_numbers(self, views: Tensor) -> Tensor:
        """The number of each cell of a flattened view in the view of each agent, F for the empty place. [A, F + 1]"""
        if self.turned is None:
            A, P = self.planes.shape
            size = math.prod(views.shape[2:])  # F
            numbers = torch.arange(size)
            new_plane = self.planes.argsort(1)  # [A, P]
            turned = numbers // P * P + new_plane[:, numbers % P]  # [A, F]
            turned = F.pad(turned, (0, 1), value=size)
            self.turned = turned.int().contiguous().to(views.device)
        return self.turned

    def list_cells(self, own: Tensor) -> CellLists:
        """Views [B, *O] of the whole map as lists."""
        if self.lister is None:
            self.lister = CellLister(own.shape[1:], self.num_agents, own.device)
        return self.lister(own)

    def present(self, own: Tensor) -> Tensor:
        """Who is still there, in a view of the whole map: [B, *O] -> [B, A] bool"""
        return own[..., : self.num_agents].flatten(1, -2).amax(1) > 0

    def roots(self, obs: Tensor, seats: Tensor) -> Tensor:
        """What the planning seats see: obs [B, A, *O] by seat, seats [B] -> [B, V, *O]"""
        each = torch.arange(len(obs), device=obs.device)
        if not self.joint:
            return obs[each, seats][:, None]
        order = ego_order(self.num_agents).to(obs.device)[seats]  # [B, A]
        return obs[each[:, None], order]


def by_seat(x: Tensor, seats: Tensor) -> Tensor:
    """Ego order -> order of the seats: x [B, A, ...], seats [B] of those who count -> [B, A, ...]"""
    A = x.shape[1]
    agents = torch.arange(A, device=x.device)
    index = (agents - seats[:, None]) % A  # [B, A]
    each = torch.arange(len(x), device=x.device)
    return x[each[:, None], index]


class Seen:
    """What there is to see in B positions, in the forms in which it is asked for; each is made when first needed."""

    def __init__(self, views: Tensor, eyes: Eyes):
        self.views, self.eyes = views, eyes  # [B, V, *O]

    @functools.cached_property
    def lists(self) -> CellLists:
        """Of the own view of a whole map of 0/1 planes."""
        return self.eyes.list_cells(self.views[:, 0])

    @functools.cached_property
    def everyone(self) -> Tensor:
        """[B, A, *O]"""
        return self.eyes.everyone(self.views)

    def cells(self, rows: Tensor, agents: Tensor) -> Tensor:
        """What is set in the views of agents [Q] in positions rows [Q]: [Q, M] int32, as CellLists has them."""
        turned = self.eyes.turned_numbers(self.views)  # [A, F + 1]
        numbers = self.lists.cells[rows]  # [Q, M]
        first = agents.int() * turned.shape[1]
        return turned.view(-1)[numbers + first[:, None]]

    def places(self, rows: Tensor, agents: Tensor) -> Tensor:
        """Where agents [Q] are in positions rows [Q]. [Q]"""
        return self.lists.places[rows, agents]


def shown_to(active: Tensor, views: Tensor) -> Tensor:
    """views [B, A, *O], all zero for those who are not active [B, A]"""
    ones = [1] * (views.ndim - 2)
    return views * active.view(*active.shape, *ones)


class Root(NamedTuple):
    """Positions to decide in."""

    views: Tensor  # [B, V, *O]
    active: Tensor  # [B, A] bool
    masks: Tensor  # [B, n] bool, the own legal actions
    mind: Tensor  # [B, A, ...], the beliefs, as `opponents.mind` has them
    timesteps: Tensor  # [B]
    seats: Tensor  # [B]
    policy_memory: Tensor | None  # [B, A, M] by seat, of --policy
    strange: Tensor | None = None  # [B, A], how likely each is a stranger
    situations: Tensor | None = None  # [B, A, T], that each was in, in this episode
    habits: Tensor | None = None  # [B, A, T], what it did there

    def take(self, index: Tensor) -> Root:
        return Root(*(None if x is None else x[index] for x in self))


# ---------------------------------------------------------------- the world


class LearnedWorld:
    """The world model, of the own view or of everyone's."""

    def __init__(self, model: WorldModel, eyes: Eyes):
        self.model = model
        self.eyes = eyes
        self.has_masks = model.config["has_mask"]
        self.simulator: Simulator | None = None
        if model.simulator and eyes.whole_map:
            self.simulator = model.simulator[0]

    def look(self, views: Tensor) -> Seen:
        """views [B, V, *O]"""
        return Seen(views, self.eyes)

    def masks(self, seen: Seen, active: Tensor) -> Tensor:
        """Legal actions of those who are active [B, A]: [B, A, n] bool"""
        B, A = active.shape
        masks = active.new_ones(B, A, self.model.action_dim)
        if not self.has_masks:
            return masks
        rows, agents = active.nonzero(as_tuple=True)
        if self.simulator is None:
            legal = self.model.legal(seen.everyone[rows, agents])
        else:
            cells, places = seen.cells(rows, agents), seen.places(rows, agents)
            legal = self.simulator.legal_at(cells, places)
        nothing = ~legal.any(-1, keepdim=True)
        masks[rows, agents] = legal | nothing  # where the model sees no way out, all of them
        return masks

    def step(self, seen: Seen, actions: Tensor, active: Tensor) -> Moved:
        """One step on: actions [B, A], active [B, A]"""
        B, A = actions.shape
        views = seen.views
        actions = actions.masked_fill(~active, -1)
        if not self.eyes.joint:
            own = views[:, 0]
            if self.simulator is None:
                after, reward, done = self.model.step(own, actions)
            else:
                after, reward, done = self.simulator.step_lists(own, seen.lists, actions)
            return after[:, None], reward, done, self.eyes.present(after)
        joint = actions[:, ego_order(A).to(actions.device)]  # [B, A, A]
        each_view, each_joint = views.flatten(0, 1), joint.flatten(0, 1)
        after, rewards, dones = self.model.step(each_view, each_joint)
        rewards, dones = rewards.view(B, A), dones.view(B, A)
        stays = active & ~dones
        views = shown_to(stays, after.view_as(views))
        return views, rewards[:, 0], dones[:, 0], stays


class TrueWorld:
    """A grid game itself, put into the position that a view shows. (Others can offer the same two methods.)"""

    def __init__(
        self,
        env: VecEnv,
        env_kwargs: dict[str, Any],
        eyes: Eyes,
    ):
        self.eyes = eyes
        game = scripted_game(env.env_id)
        is_batched = isinstance(env, GridVecEnv)
        is_preset = game is not None and env.env_id in game.PRESETS
        if not eyes.whole_map or not (is_batched or is_preset):
            raise UsageError(
                f"--world true expected a stag hunt or snowdrift without view, got {env.env_id}: use --world learned"
            )
        if is_batched:
            self.make = lambda size: type(env)(size, env.device, 0, **env.options)
        else:
            self.make = lambda size: make_vec_env(env.env_id, size, env.device, 0, "batched", **env_kwargs)
        self.copies = self.make(1)

    def positions(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Own views [B, H, W, P] -> cells [B, K] and alive [B, K] of all bodies, as set_positions takes them.

        Items that are gone are put on cells of their own: where they were no longer matters.
        """
        options, A = self.copies.options, self.eyes.num_agents
        flat = views.flatten(1, 2).long()  # [B, HW, P]
        agents = flat[..., :A]
        there = agents.any(1)  # [B, A]
        place = agents.argmax(1)
        cells = [torch.where(there, place, place[:, :1])]  # who left must not stand in a block
        alive = [there]
        kinds = ("block", *self.copies.items)
        numbers = [options[f"num_{kind}s"] for kind in kinds]
        taken = flat[..., A:].any(-1).long()  # [B, HW]
        for plane, number in enumerate(numbers, A):
            seen = flat[..., plane]  # [B, HW]
            # those that are there come first, then free cells, each of which is taken at most once
            preferred = 2 * seen + 1 - taken
            order = preferred.argsort(dim=1, descending=True, stable=True)
            mine = order[:, :number]
            cells.append(mine)
            alive.append(seen.gather(1, mine).bool())
            taken = taken.scatter(1, mine, 1)
        return torch.cat(cells, 1), torch.cat(alive, 1)

    def place(self, views: Tensor) -> EnvStep:
        """Copies in the positions of own views [B, H, W, P], and perhaps more copies."""
        B = len(views)
        if self.copies.num_envs < B:
            self.copies = self.make(B)
        surplus = self.copies.num_envs - B
        others = views[:1].expand(surplus, *views.shape[1:])
        padded = torch.cat([views, others])
        return self.copies.set_positions(*self.positions(padded))

    def look(self, views: Tensor) -> Seen:
        """views [B, 1, H, W, P]"""
        return Seen(views, self.eyes)

    def masks(self, seen: Seen, active: Tensor) -> Tensor:
        """As LearnedWorld.masks."""
        return self.place(seen.views[:, 0]).action_mask[: len(active)].clone()

    def step(self, seen: Seen, actions: Tensor, active: Tensor) -> Moved:
        """As LearnedWorld.step. Ego order is as good as that of the seats: the rules do not know who is who."""
        B = len(actions)
        self.place(seen.views[:, 0])
        surplus = self.copies.num_envs - B
        step = self.copies.step(F.pad(actions, (0, 0, 0, surplus)))
        own = step.final_obs[:B, 0]
        reward, done = step.rewards[:B, 0], step.terminations[:B, 0]
        return own[:, None], reward, done, self.eyes.present(own)


# ---------------------------------------------------------------- the others


class LearnedOpponents:
    """The model of other agents: a belief from what each saw and did, and from it what each does next.

    In imagination z is read anew from what an agent sees, with the history it has in the root.
    """

    def __init__(self, model: VAE, eyes: Eyes):
        self.model, self.eyes = model, eyes
        one_view = model.sees_obs and model.encoder.views == 1
        self.is_folded = one_view and model.model != "vqvae" and model.encoder.sparse and eyes.whole_map
        if self.is_folded:
            self.fold_layers()

    def fold_layers(self) -> None:
        """z is linear in the features, and the policy head's first layer in both: one matrix does for the two."""
        model = self.model
        to_latent, first = model.to_latent, model.policy[0]
        size, hidden = to_latent.out_features // 2, model.config["hidden_size"]
        from_z = first.weight[:, hidden + 1 :]  # [D, Z]
        self.from_z = from_z
        self.from_who = from_z[:, :-size]
        self.from_subgoal = from_z[:, -size:]
        self.from_time = first.weight[:, hidden] * model.spec["time_scale"]  # [D]
        self.from_features = first.weight[:, :hidden]
        features_to_z = to_latent.weight[:size, :hidden]
        self.folded = self.from_features + self.from_subgoal @ features_to_z
        self.past_to_z = to_latent.weight[:size, hidden:]
        self.z_bias = to_latent.bias[:size]
        if model.spec["centred"]:
            self.centred = self.centred_numbers().to(from_z.device)

    def centred_numbers(self) -> Tensor:
        """The number of each cell, counted from each place: [C, F + 1] int32"""
        spec = self.model.spec
        height, width, planes = spec["shape"]
        size = height * width * planes  # F
        places = torch.arange(height * width)
        own = places[:, None] * planes
        numbers = torch.arange(size + 1).expand(len(places), -1)
        pairs = torch.stack([own.expand_as(numbers), numbers], -1)  # [C, F + 1, 2]
        centred = relative_cells(spec, pairs.flatten(0, 1))[:, 1].view_as(numbers)
        return (size + 1 + centred).int().contiguous()

    def initial_history(self, *batch: int) -> Tensor:
        return self.model.initial_history(*batch)

    def observe(self, history: Tensor, views: Tensor, actions: Tensor) -> Tensor:
        """history [Q, G] after `actions` [Q] at views [Q, *O]"""
        return self.model.observe(history, views, actions)

    def mind(self, history: Tensor) -> Tensor:
        """What `logits` wants to know of the histories [R, A, G]: what they add to the policy head's first layer
        [R, A, D], or themselves."""
        if not self.is_folded:
            return history
        model = self.model
        z = self.z_bias.expand(*history.shape[:2], -1)
        from_who = 0.0
        if model.history_size:
            flat = history.flatten(0, 1)
            memory = flat[:, : -pretrain_vae.IMAGINED]
            past = torch.cat([memory, model.belief(flat).exp()], 1)  # [R * A, G]
            past = past.view(*history.shape)
            z = z + past @ self.past_to_z.T
            who = model.to_who(past).chunk(2, -1)[0]
            from_who = who @ self.from_who.T
        return z @ self.from_subgoal.T + from_who + model.policy[0].bias

    def features(self, seen: Seen, rows: Tensor, agents: Tensor) -> Tensor:
        """What the encoder makes of the views of agents [Q] in positions rows [Q], where layers are folded. [Q, D]"""
        cells = seen.cells(rows, agents)  # [Q, M]
        spec = self.model.spec
        if spec["centred"]:
            first = seen.places(rows, agents).int() * self.centred.shape[1]
            centred = self.centred.view(-1)[cells + first[:, None]]
            cells = torch.cat([cells, centred], 1)
        encoder = self.model.encoder
        summed = F.embedding_bag(cells, encoder.embed.weight, mode="sum")
        return F.relu_(summed + encoder.bias)

    def logits(
        self,
        now: Now,
        rows: Tensor,
        agents: Tensor,
        masks: Tensor,
    ) -> Tensor:
        """What agents [Q] (ego order) do in positions rows [Q] of futures; masks [Q, n] -> [Q, n]"""
        seen, which, t = now.seen, now.future.root[rows], now.future.t[rows]
        mind = now.root.mind[which, agents]  # [Q, D] or [Q, G]
        if self.is_folded:
            features = self.features(seen, rows, agents)
            before = torch.addmm(mind, features, self.folded.T)
            return self.head(before, t, masks)
        model = self.model
        features, head_features = model.look(self.network_input(seen.everyone[rows, agents]))
        past = mind if model.history_size else None
        z = model.mean_z(model.posterior(features, past))
        logits = model.action_logits(head_features, t, z, masks)
        return logits.masked_fill(~masks, -torch.inf)

    def head(self, before: Tensor, t: Tensor, masks: Tensor) -> Tensor:
        """The policy head from its first layer on, to which time is still to be added: before [Q, D] -> [Q, n]"""
        before = before.addcmul_(t[:, None].float(), self.from_time)
        logits = self.model.policy[2](F.relu_(before))
        return logits.masked_fill(~masks, -torch.inf)

    def logits_of(
        self,
        z: Tensor,
        seen: Seen,
        rows: Tensor,
        masks: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Of the own seat in positions rows [Q], were this its z [Q, Z]: the MOA as a policy. -> [Q, n]"""
        if self.is_folded:
            features = self.features(seen, rows, torch.zeros_like(rows))
            from_z = F.linear(z, self.from_z, self.model.policy[0].bias)
            before = from_z + features @ self.from_features.T
            return self.head(before, t, masks)
        _, head_features = self.model.look(self.network_input(seen.views[rows, 0]))
        logits = self.model.action_logits(head_features, t, z, masks)
        return logits.masked_fill(~masks, -torch.inf)

    def network_input(self, views: Tensor) -> Tensor:
        """[Q, *O] -> what the encoder reads. What the world model dreamt up beyond the encoder's list is left out."""
        spec = self.model.spec
        if spec["max_cells"]:
            flat = views.flatten(1)
            surplus = (flat != 0).cumsum(1) > spec["max_cells"]
            views = flat.masked_fill(surplus, 0).view_as(views)
        seats = torch.zeros(len(views), dtype=torch.int64, device=views.device)  # read for states only
        return pretrain_vae.network_input(spec, views, seats)


class Strange(NamedTuple):
    """Who is imagined as a stranger, drawn once for each of so many luckily equal futures (see Future.noise)."""

    who: Tensor  # [_, A] bool
    taste: Tensor  # [_, A, n], noise that does not change: it goes on doing what it does


class Strangers:
    """Partners unlike all recorded ones: how likely each other agent is one, and what such a one is used to do.

    Two experts predict each agent: the MOA, and a stranger, who does what it did before in the same situation and may
    do anything in a new one. Their weights follow Bayes' rule; a fixed share goes back to the prior at each step, so
    that both can return (Herbster & Warmuth 1998). In imagined futures new situations are left to the MOA.
    """

    def __init__(self, prior: float, eyes: Eyes):
        self.prior, self.eyes = prior, eyes
        self.factors: Tensor | None = None

    def initial_memory(self, *batch: int, device: torch.device) -> dict[str, Tensor]:
        shape = (*batch, 0)
        return {
            "strange": torch.full(batch, self.prior, device=device),
            "situations": torch.zeros(shape, dtype=torch.int64, device=device),
            "habits": torch.zeros(shape, dtype=torch.int64, device=device),
        }

    @staticmethod
    def with_room(memory: dict[str, Tensor], timesteps: Tensor) -> dict[str, Tensor]:
        """A copy that has a place for each of timesteps [N]."""
        longest = int(timesteps.max()) + 1
        room = (0, max(0, longest - memory["situations"].shape[-1]))
        situations = F.pad(memory["situations"], room, value=NOWHERE)
        habits = F.pad(memory["habits"], room)
        return {
            "strange": memory["strange"].clone(),
            "situations": situations.clone(),
            "habits": habits.clone(),
        }

    def forget(self, memory: dict[str, Tensor], goes_on: Tensor) -> dict[str, Tensor]:
        """Begins anew in envs of which goes_on [N] is False."""
        ended = ~goes_on
        strange, situations = memory["strange"].clone(), memory["situations"].clone()
        strange[ended] = self.prior
        situations[ended] = NOWHERE
        return {**memory, "strange": strange, "situations": situations}

    def situations(self, seen: Seen, rows: Tensor, agents: Tensor) -> Tensor:
        """A number for what agents [Q] in positions rows [Q] stand in. [Q] int64

        On a whole map the cell, what lies there and whether somebody else is there, else the whole view.
        """
        if self.eyes.whole_map:
            place = seen.places(rows, agents)
            flat = seen.views[:, 0].flatten(1, -2)  # [B, C, P]
            here = flat[rows, place].long()  # [Q, P]
            A = self.eyes.num_agents
            company = here[:, :A].sum(1) > 1
            bits = torch.cat([company[:, None].long(), here[:, A:]], 1)
            powers = 2 ** torch.arange(bits.shape[1], device=bits.device)
            return (place << bits.shape[1]) + (bits * powers).sum(1)
        views = seen.everyone[rows, agents].flatten(1)
        if self.factors is None:
            generator = torch.Generator().manual_seed(0)
            factors = torch.randint(2**31, views.shape[1:], generator=generator)
            self.factors = factors.to(views.device)
        numbers = (views.double() * 255).round().long()
        return (numbers * self.factors).sum(1).abs()

    def counts(
        self,
        now: Now,
        rows: Tensor,
        agents: Tensor,
        num_actions: int,
    ) -> Tensor:
        """How often agents [Q] did what in the situations that they are in, in positions rows [Q]. [Q, n]"""
        root = now.root
        which = now.future.root[rows]
        here = self.situations(now.seen, rows, agents)  # [Q]
        same = root.situations[which, agents] == here[:, None]  # [Q, T]
        never = torch.zeros(len(rows), num_actions, device=here.device)
        return never.scatter_add(1, root.habits[which, agents], same.float())

    @staticmethod
    def probs(counts: Tensor, expected: Tensor, masks: Tensor) -> Tensor:
        """What strangers do that did so often what there, where the MOA expects that of them; all [Q, n]"""
        anything = masks / masks.sum(1, keepdim=True)
        new = torch.lerp(expected, anything, NEW)
        return (counts + ONCE * new) / (counts.sum(1, keepdim=True) + ONCE)

    def draw(
        self,
        root: Root,
        future: Future,
        num_noises: int,
    ) -> Strange:
        """Who is one, in each of so many futures."""
        n = root.masks.shape[1]
        owner = torch.zeros(num_noises, dtype=torch.int64, device=root.seats.device)
        owner[future.noise] = future.root
        how_likely = root.strange[owner]  # [_, A]
        who = torch.rand_like(how_likely) < how_likely
        return Strange(who, gumbel((*who.shape, n), who.device))

    def update(
        self,
        before: Tensor,
        habitual: Tensor,
        expected: Tensor,
    ) -> Tensor:
        """How likely each of [Q] is a stranger, after something to which habits and the MOA gave these probabilities.
        before, habitual, expected [Q] -> [Q]"""
        strange = before * habitual
        known = (1 - before) * expected
        possible = strange + known > 0  # else the world model took what was done for illegal
        after = torch.where(possible, strange / (strange + known), before)
        return torch.lerp(after, torch.full_like(after, self.prior), FIXED_SHARE)


class TrueOpponents:
    """The scripts that sit in the other seats."""

    def __init__(
        self,
        scripts: list[str | None],
        env: VecEnv,
        env_kwargs: dict[str, Any],
    ):
        """scripts: by seat, None for the planner's"""
        self.scripts, self.env_id, self.env_kwargs = scripts, env.env_id, env_kwargs
        self.device = env.device

    def initial_history(self, *batch: int) -> Tensor:
        return torch.zeros(*batch, 0, device=self.device)

    def observe(self, history: Tensor, views: Tensor, actions: Tensor) -> Tensor:
        return history

    def mind(self, history: Tensor) -> Tensor:
        return history

    def logits(
        self,
        now: Now,
        rows: Tensor,
        agents: Tensor,
        masks: Tensor,
    ) -> Tensor:
        """As LearnedOpponents.logits."""
        own_seats = now.root.seats[now.future.root[rows]]
        seats = (own_seats + agents) % len(self.scripts)  # [Q]
        views = now.seen.everyone[rows, agents]
        probs = masks.float()
        for name in set(self.scripts) - {None}:
            of_script = torch.tensor([script == name for script in self.scripts], device=views.device)
            mine = of_script[seats].nonzero()[:, 0]
            probs[mine] = script_probs(name, self.env_id, self.env_kwargs, views[mine], masks[mine])
        return probs.log()


# ---------------------------------------------------------------- base policies: what the own seat goes on with


class Future(NamedTuple):
    """Where imagined futures are now."""

    views: Tensor  # [B, V, *O]
    active: Tensor  # [B, A] bool
    t: Tensor  # [B], the env's time step
    root: Tensor  # [B], the root each began in
    base: Tensor  # [B], the base policy of the own seat
    noise: Tensor  # [B], which of the drawn random numbers: shared by all futures that are compared
    out: Tensor  # [B], where its return is added to
    memory: Tensor | None  # [B, A, M] by seat, of --policy

    def take(self, index: Tensor) -> Future:
        return Future(*(None if x is None else x[index] for x in self))


class Now(NamedTuple):
    """Futures that are moved on by one step, for those who are asked what they do in some of them."""

    seen: Seen
    future: Future
    root: Root


class Scripted:
    """A scripted player as a base policy."""

    count = 1  # base policies that this stands for

    def __init__(
        self,
        name: str,
        env: VecEnv,
        env_kwargs: dict[str, Any],
    ):
        self.names = [name]
        self.env_id, self.env_kwargs = env.env_id, env_kwargs

    def logits(
        self,
        now: Now,
        rows: Tensor,
        masks: Tensor,
        which: Tensor,
    ) -> Tensor:
        """Of the own seat in positions rows [Q]; masks [Q, A, n]; which [Q]: of the `count` policies. -> [Q, n]"""
        own = now.seen.views[rows, 0]
        probs = script_probs(self.names[0], self.env_id, self.env_kwargs, own, masks[:, 0])
        return probs.log()


class Subgoals:
    """The MOA's own policy head under chosen z, one base policy each."""

    def __init__(self, opponents: LearnedOpponents, centres: Tensor):
        self.opponents, self.centres = opponents, centres  # [C, Z]
        self.count = len(centres)
        self.names = [f"subgoal {c}" for c in range(self.count)]

    def logits(
        self,
        now: Now,
        rows: Tensor,
        masks: Tensor,
        which: Tensor,
    ) -> Tensor:
        """As Scripted.logits."""
        z = self.centres[which]
        return self.opponents.logits_of(z, now.seen, rows, masks[:, 0], now.future.t[rows])


class Trained:
    """A run folder's policy as a base policy. It sees what its actor saw in training: everyone's view, perhaps."""

    count = 1

    def __init__(self, policy: Policy, name: str):
        self.policy, self.names = policy, [name]

    def logits(
        self,
        now: Now,
        rows: Tensor,
        masks: Tensor,
        which: Tensor,
    ) -> Tensor:
        """As Scripted.logits; moves the memories on."""
        future_here = now.future.take(rows)
        seats = now.root.seats[future_here.root]  # [Q]
        step = seen_by_seat(future_here, now.seen.everyone[rows], masks, seats)
        actor = self.policy.actor
        _, dist, _, memory = hyper_mappo.act(actor, step, step.episode_over, future_here.memory)
        now.future.memory[rows] = memory
        each = torch.arange(len(seats), device=seats.device)
        return dist[each, seats]


def seen_by_seat(future: Future, everyone: Tensor, masks: Tensor, seats: Tensor) -> EnvStep:
    """Imagined positions as an EnvStep, for what was made for envs; without a state."""
    obs = by_seat(everyone, seats)  # [B, A, *O]
    active = by_seat(future.active, seats)
    obs = shown_to(active, obs)
    zeros = torch.zeros(active.shape, device=obs.device)
    never = torch.zeros(len(obs), dtype=torch.bool, device=obs.device)
    return EnvStep(
        obs=obs,
        state=obs,
        action_mask=by_seat(masks, seats),
        active=active,
        rewards=zeros,
        terminations=zeros.bool(),
        truncations=never,
        episode_over=never,
        final_obs=obs,
        final_state=obs,
        episode_returns=zeros,
        episode_lengths=future.t,
    )


# ---------------------------------------------------------------- what a cut-off future is still worth


class CriticValues:
    """The critic of --policy, asked about the state that a view of the whole map shows."""

    def __init__(self, run_dir: str, eyes: Eyes, device: torch.device):
        self.critic = load_critic(run_dir, device)
        self.eyes = eyes

    def __call__(self, everyone: Tensor, seats: Tensor) -> Tensor:
        """Views of everyone [B, A, *O] -> V of the own seat [B]"""
        own = everyone[:, 0]
        A = self.eyes.num_agents
        planes = own[..., :A].movedim(-1, 1)  # [B, A, H, W]
        agents = by_seat(planes, seats).movedim(1, -1)
        state = torch.cat([agents, own[..., A:]], -1)  # [B, *S]
        obs = by_seat(everyone, seats)  # [B, A, *O]
        each = torch.arange(len(own), device=own.device)
        return self.critic(state, obs)[each, seats]


class ValueHead(nn.Module):
    """V of an observation, fitted on the values of a dataset."""

    def __init__(self, obs_shape: tuple[int, ...], hidden_size: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(obs_shape), hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, 1),
        )

    @torch.no_grad()
    def __call__(self, everyone: Tensor, seats: Tensor) -> Tensor:
        """As CriticValues.__call__."""
        return self.layers(everyone[:, 0].float())[:, 0]


def fit_values(
    path: str,
    device: torch.device,
    updates: int = 2000,
    batch_size: int = 512,
) -> ValueHead:
    """A value head on the values of a dataset; prints its error on held-out episodes. UsageError: it has none."""
    dataset = load_dataset(path)
    if dataset.values is None:
        raise UsageError(
            f"--values: expected values in {path}, found none; collect it with collect_data.py --values-of"
        )
    splits = dataset.split_episodes(0, 0.1, ())
    tensors = {}
    for name in ("train", "heldout_episodes"):
        rows = dataset.rows_of(splits[name])
        active = dataset.active[rows]
        obs = torch.from_numpy(dataset.observations[rows][active])  # [V, *O]
        values = torch.from_numpy(dataset.values[rows][active])  # [V]
        tensors[name] = (obs.to(device), values.to(device).float())
    head = ValueHead(tuple(dataset.meta["obs_shape"])).to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    obs, values = tensors["train"]
    for _ in tqdm(range(updates), desc="value head", leave=False, disable=None):
        batch = torch.randint(len(obs), (batch_size,), device=device)
        predicted = head.layers(obs[batch].float())[:, 0]
        loss = F.mse_loss(predicted, values[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    obs, values = tensors["heldout_episodes"]
    with torch.no_grad():
        error = F.mse_loss(head.layers(obs.float())[:, 0], values)
    explained = 1 - error / values.var()
    print(f"values   {path}: value head explains {explained:.3f} of the variance of held-out episodes")
    return head.requires_grad_(False).eval()


# ---------------------------------------------------------------- planning


class Planner:
    """A player (see envs/players.py) that plans for some seats; in others it does nothing of use."""

    def __init__(
        self,
        eyes: Eyes,
        world: LearnedWorld | TrueWorld,
        opponents: LearnedOpponents | TrueOpponents,
        bases: list[Scripted | Subgoals | Trained],
        value: Callable[[Tensor, Tensor], Tensor] | None,
        args: Args,
        seats: tuple[int, ...],
        episode_limit: int | None,
        strangers: Strangers | None = None,
    ):
        """value(everyone [B, A, *O], seats [B]) -> V [B], None: nothing; episode_limit: None where it is not known;
        strangers: None: all partners are like those that were recorded"""
        self.eyes, self.world, self.opponents = eyes, world, opponents
        self.bases, self.value, self.args = bases, value, args
        self.seats = seats
        self.num_bases = sum(base.count for base in bases)
        self.episode_limit = episode_limit
        self.strangers = strangers
        self.seconds, self.decisions = 0.0, 0

    # -- as a player

    def initial_state(self, num_envs: int) -> dict[str, Any]:
        A = self.eyes.num_agents
        policy = self.trained_policy()
        history = self.opponents.initial_history(num_envs, len(self.seats), A)
        strangers = None
        if self.strangers is not None:
            strangers = self.strangers.initial_memory(num_envs, len(self.seats), A, device=history.device)
        return {
            "history": history,  # [N, seats, A, G], ego order
            "timesteps": None,  # [N]
            "strangers": strangers,
            "policy": None if policy is None else policy.initial_state(num_envs),
        }

    def trained_policy(self) -> Policy | None:
        for base in self.bases:
            if isinstance(base, Trained):
                return base.policy
        return None

    @torch.no_grad()
    def act(
        self,
        step: EnvStep,
        memory: dict[str, Any],
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Actions of all seats [N, A], 0 where nothing is planned. wanted [N] bool: envs that count; None: all."""
        start = time.perf_counter()
        N = len(step.obs)
        memory = dict(memory)
        if memory["timesteps"] is None:
            memory["timesteps"] = torch.zeros(N, dtype=torch.int64, device=step.obs.device)
        # Beliefs begin anew with each episode.
        goes_on = ~step.episode_over
        memory["timesteps"] = memory["timesteps"] * goes_on
        memory["history"] = memory["history"] * goes_on.view(N, 1, 1, 1)
        if self.strangers is not None:
            memory["strangers"] = self.strangers.forget(memory["strangers"], goes_on)
        actions = torch.zeros(step.active.shape, dtype=torch.int64, device=step.obs.device)
        for s, seat in enumerate(self.seats):
            plans = step.active[:, seat]
            if wanted is not None:
                plans = plans & wanted
            rows = plans.nonzero()[:, 0]
            if len(rows):
                root = self.root(step, memory, s, rows)
                actions[rows, seat] = self.decide(root)
                self.decisions += len(rows)
        policy = self.trained_policy()
        if policy is not None:
            _, memory["policy"] = policy.act(step, memory["policy"])
        self.wait(step.obs.device)
        self.seconds += time.perf_counter() - start
        return actions, memory

    @torch.no_grad()
    def remember(
        self,
        step: EnvStep,
        actions: Tensor,
        memory: dict[str, Any],
    ) -> dict[str, Any]:
        """What everyone did becomes part of the beliefs, of those who are still there."""
        start = time.perf_counter()
        N, A = step.active.shape
        if self.strangers is not None:
            memory = {**memory, "strangers": self.judge(step, actions, memory)}
        history = memory["history"].clone()
        for s, seat in enumerate(self.seats):
            seats = torch.full((N,), seat, device=step.obs.device)
            order = ego_order(A)[seat].to(step.obs.device)
            everyone = self.eyes.everyone(self.eyes.roots(step.obs, seats))  # [N, A, *O]
            sees = step.active[:, seat, None] & step.active[:, order]  # [N, A]
            env, agent = sees.nonzero(as_tuple=True)
            if not len(env):
                continue
            done = actions[:, order][env, agent]
            before = history[env, s, agent]
            history[env, s, agent] = self.opponents.observe(before, everyone[env, agent], done)
        memory = {**memory, "history": history, "timesteps": memory["timesteps"] + 1}
        policy = self.trained_policy()
        if policy is not None:
            memory["policy"] = policy.remember(step, actions, memory["policy"])
        self.wait(step.obs.device)
        self.seconds += time.perf_counter() - start
        return memory

    def judge(
        self,
        step: EnvStep,
        actions: Tensor,
        memory: dict[str, Any],
    ) -> dict[str, Tensor]:
        """What is known of strangers after `actions`: how likely each other agent is one, and what it did where."""
        N, A = step.active.shape
        known = self.strangers.with_room(memory["strangers"], memory["timesteps"])
        for s, seat in enumerate(self.seats):
            order = ego_order(A)[seat].to(actions.device)
            envs = step.active[:, seat].nonzero()[:, 0]
            root = self.root(step, {**memory, "strangers": known}, s, envs)
            each = torch.arange(len(envs), device=envs.device)
            future = self.begin(root, each, torch.zeros_like(each))
            now = Now(self.world.look(root.views), future, root)
            rows, others = root.active[:, 1:].nonzero(as_tuple=True)
            if not len(rows):
                continue
            agents = others + 1
            masks = self.world.masks(now.seen, root.active)[rows, agents]
            done = actions[envs][:, order][rows, agents]  # [Q]
            expected = self.opponents.logits(now, rows, agents, masks).softmax(1)
            counts = self.strangers.counts(now, rows, agents, masks.shape[1])
            habitual = self.strangers.probs(counts, expected, masks)
            each = torch.arange(len(done), device=done.device)
            where = (envs[rows], torch.full_like(rows, s), agents)
            known["strange"][where] = self.strangers.update(
                known["strange"][where],
                habitual[each, done],
                expected[each, done],
            )
            now_at = (*where, memory["timesteps"][envs[rows]])
            known["situations"][now_at] = self.strangers.situations(now.seen, rows, agents)
            known["habits"][now_at] = done
        return known

    def ms_per_decision(self) -> float:
        """Thinking and remembering, of one seat in one env."""
        return 1000 * self.seconds / max(1, self.decisions)

    def wait(self, device: torch.device) -> None:
        """Lets the clock see what a GPU still has to do."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def root(
        self,
        step: EnvStep,
        memory: dict[str, Any],
        s: int,
        rows: Tensor,
    ) -> Root:
        """The positions of the s-th planning seat in envs `rows` [R]."""
        seat = self.seats[s]
        seats = torch.full_like(rows, seat)
        order = ego_order(self.eyes.num_agents)[seat].to(rows.device)
        views = self.eyes.roots(step.obs[rows], seats)
        active = step.active[rows][:, order]
        if step.action_mask is None:
            seen = self.world.look(views)
            masks = self.world.masks(seen, active)[:, 0]
        else:
            masks = step.action_mask[rows, seat]
        known = {}
        if self.strangers is not None:
            known = {name: x[rows, s] for name, x in memory["strangers"].items()}
        return Root(
            views=views,
            active=active,
            masks=masks,
            mind=self.opponents.mind(memory["history"][rows, s]),
            timesteps=memory["timesteps"][rows],
            seats=seats,
            policy_memory=None if memory["policy"] is None else memory["policy"][rows],
            **known,
        )

    # -- decisions

    def decide(self, root: Root) -> Tensor:
        """The action in each of R positions. [R]"""
        first_base = torch.zeros_like(root.seats)
        if self.args.method == "policy":
            return self.follow(self.base_probs(root, first_base))
        if self.args.method == "mcts":
            return self.search(root)
        if self.args.method == "one-step":
            return self.improve(root, first_base, caution=0.0)
        return self.improve(root, self.best_base(root), self.args.caution)

    def best_base(self, root: Root) -> Tensor:
        """The base policy that returns most on average. -> [R]

        Of more futures than first actions get: who takes a sure hare instead of the stag on a few unlucky ones cannot
        come back, and may do so at every step anew.
        """
        if self.num_bases == 1:
            return torch.zeros_like(root.seats)
        K = self.args.base_samples
        R = len(root.seats)
        repeats = self.num_bases * K
        which = torch.arange(R, device=root.seats.device).repeat_interleave(repeats)
        within = torch.arange(repeats, device=which.device).repeat(R)
        future = self.begin(root, which, base=within // K)
        future = future._replace(noise=which * K + within % K)
        returns = self.play(future, root, None, self.args.horizon, R * K, R * repeats)
        return returns.view(R, self.num_bases, K).mean(2).argmax(1)

    def improve(self, root: Root, base: Tensor, caution: float) -> Tensor:
        """What the base policies [R] would do, unless futures say that another first action is better. -> [R]

        Actions that lead to the same are common: whoever waits for partners is no worse off a step later, as far as
        the imagined futures go. Were the first of them taken, it could wait for ever.
        """
        returns = self.first_action_returns(root, base)  # [R, n, K]
        probs = self.base_probs(root, base)  # [R, n]
        legal = root.masks[..., None]  # [R, n, 1]
        kept = (returns.masked_fill(~legal, 0.0) * probs[..., None]).sum(1)  # [R, K]
        gain = returns - kept[:, None]  # [R, n, K]
        doubt = gain.std(2, correction=0) / math.sqrt(gain.shape[2])
        sure = gain.mean(2) - caution * doubt  # [R, n]
        surest, action = sure.masked_fill(~root.masks, -torch.inf).max(1)
        same = SAME_RETURN * kept.abs().amax(1)
        return torch.where(surest > same, action, self.follow(probs))

    def follow(self, probs: Tensor) -> Tensor:
        """An action of each distribution [R, n]. -> [R]"""
        return draw(probs.log(), gumbel(probs.shape, probs.device))

    def base_probs(self, root: Root, base: Tensor) -> Tensor:
        """What base policies [R] would do now. [R, n]"""
        each = torch.arange(len(base), device=base.device)
        future = self.begin(root, each, base)
        seen = self.world.look(future.views)
        masks = self.world.masks(seen, future.active)
        masks[:, 0] = root.masks
        return self.own_logits(Now(seen, future, root), masks).softmax(1)

    def begin(self, root: Root, which: Tensor, base: Tensor) -> Future:
        """Futures of the roots `which` [B], which go on with base policies [B]; noise and out are those of each."""
        each = torch.arange(len(which), device=which.device)
        return Future(
            views=root.views[which],
            active=root.active[which],
            t=root.timesteps[which],
            root=which,
            base=base,
            noise=each,
            out=each,
            memory=None if root.policy_memory is None else root.policy_memory[which],
        )

    def first_action_returns(self, root: Root, base: Tensor) -> Tensor:
        """What K futures of each legal first action return, continued by base [R]. -> [R, n, K], -inf if illegal"""
        R, n = root.masks.shape
        K = self.args.samples
        r, first = root.masks.nonzero(as_tuple=True)  # [P], pairs of root and first action
        pair = torch.arange(len(r), device=r.device).repeat_interleave(K)
        k = torch.arange(K, device=r.device).repeat(len(r))
        which, actions = r[pair], first[pair]  # [B]
        future = self.begin(root, which, base[which])
        future = future._replace(noise=which * K + k, out=(which * n + actions) * K + k)
        horizon = 1 if self.args.method == "one-step" else self.args.horizon
        returns = self.play(future, root, actions, horizon, R * K, R * n * K)
        returns = returns.view(R, n, K)
        return returns.masked_fill(~root.masks[..., None], -torch.inf)

    def play(
        self,
        future: Future,
        root: Root,
        first: Tensor | None,
        horizon: int,
        num_noises: int,
        num_out: int,
        strange: Strange | None = None,
    ) -> Tensor:
        """Plays futures to their end or the horizon; sums discounted returns by `out`. -> [num_out]

        first [B]: the own first actions; None: the base policy's. Futures that are over are dropped on the way.
        strange: None: strangers are drawn.
        """
        if strange is None and self.strangers is not None:
            strange = self.strangers.draw(root, future, num_noises)
        returns = torch.zeros(num_out, device=future.views.device)
        discount = 1.0
        for h in range(horizon):
            seen = self.world.look(future.views)
            masks = self.world.masks(seen, future.active)
            noise = gumbel((num_noises, *masks.shape[1:]), returns.device)
            actions = self.others_actions(Now(seen, future, root), masks, noise, strange)
            if h == 0 and first is not None:
                actions[:, 0] = first
            else:
                own = self.own_logits(Now(seen, future, root), masks)
                actions[:, 0] = draw(own, noise[future.noise, 0])
            future, reward, goes_on = self.move(seen, future, actions)
            returns.index_add_(0, future.out, discount * reward)
            discount *= self.args.gamma
            future = future.take(goes_on.nonzero()[:, 0])
            if not len(future.t):
                return returns
        if self.value is not None:
            everyone = self.eyes.everyone(future.views)
            later = self.value(everyone, root.seats[future.root])
            returns.index_add_(0, future.out, discount * later)
        return returns

    def move(
        self,
        seen: Seen,
        future: Future,
        actions: Tensor,
    ) -> tuple[Future, Tensor, Tensor]:
        """One step of the world: the futures after it, the own reward [B], which of them go on [B] bool."""
        views, reward, done, active = self.world.step(seen, actions, future.active)
        t = future.t + 1
        goes_on = ~done & active[:, 0]
        if self.episode_limit is not None:
            goes_on = goes_on & (t < self.episode_limit)
        return future._replace(views=views, active=active, t=t), reward, goes_on

    def others_actions(
        self,
        now: Now,
        masks: Tensor,
        noise: Tensor,
        strange: Strange | None,
    ) -> Tensor:
        """Sampled actions [B, A] of the others, 0 of those who left and of the own seat.

        noise [_, A, n]: futures with the same of it share their luck. strange: None: nobody is a stranger.
        """
        future = now.future
        actions = torch.zeros(future.active.shape, dtype=torch.int64, device=masks.device)
        rows, others = future.active[:, 1:].nonzero(as_tuple=True)
        if not len(rows):
            return actions
        agents = others + 1
        logits = self.opponents.logits(now, rows, agents, masks[rows, agents])
        actions[rows, agents] = draw(logits, noise[future.noise[rows], agents])
        if strange is not None:
            theirs = strange.who[future.noise[rows], agents].nonzero()[:, 0]
            rows, agents = rows[theirs], agents[theirs]
            counts = self.strangers.counts(now, rows, agents, masks.shape[2])
            used_to = counts.any(1)
            rows, agents = rows[used_to], agents[used_to]
            expected = logits[theirs[used_to]].softmax(1)
            probs = self.strangers.probs(counts[used_to], expected, masks[rows, agents])
            actions[rows, agents] = draw(probs.log(), strange.taste[future.noise[rows], agents])
        return actions

    def own_logits(
        self,
        now: Now,
        masks: Tensor,
    ) -> Tensor:
        """Of the base policy that each future goes on with. [B, n]"""
        logits = torch.empty(masks[:, 0].shape, device=masks.device)
        first = 0
        for base in self.bases:
            which = now.future.base - first
            mine = (which >= 0) & (which < base.count)
            rows = mine.nonzero()[:, 0]
            if len(rows):
                logits[rows] = base.logits(now, rows, masks[rows], which[rows])
            first += base.count
        return logits

    # -- tree search

    def search(self, root: Root) -> Tensor:
        """PUCT: K trees for each of R positions, grown side by side; the action most visited in all of them. -> [R]

        A node is a sequence of own actions: what the others do is drawn anew in each future that passes it.
        """
        K = self.args.samples
        R, n = root.masks.shape
        each = torch.arange(R, device=root.masks.device)
        roots = root.take(each.repeat_interleave(K))
        base = self.best_base(root).repeat_interleave(K)
        trees = Trees(R * K, self.args.simulations, n, each.device)
        for _ in range(self.args.simulations):
            self.grow(trees, roots, base)
        visits, sums = trees.visits[:, 0], trees.sums[:, 0]  # [R * K, n]
        visits = visits.view(R, K, n).sum(1)
        worth = sums.view(R, K, n).sum(1) / visits.clamp(min=1)
        ties = worth.sigmoid() / 2  # less than one visit
        score = (visits + ties).masked_fill(~root.masks, -torch.inf)
        return score.argmax(1)

    def grow(self, trees: Trees, root: Root, base: Tensor) -> None:
        """One future of each tree [T]: down to a node that is new, and what that is worth back up.

        base [T]: the policy of the priors, mixed with a uniform one (a script's would rule out all else), and playouts.
        """
        T = len(root.views)
        each = torch.arange(T, device=root.seats.device)
        future = self.begin(root, each, base)
        node = torch.zeros_like(future.out)  # [B]
        returns = torch.zeros(T, device=node.device)
        discount = torch.ones(T, device=node.device)
        path, leaves = [], []
        strange = None
        if self.strangers is not None:
            strange = self.strangers.draw(root, future, T)
        for depth in range(self.args.horizon):
            seen = self.world.look(future.views)
            masks = self.world.masks(seen, future.active)
            if depth == 0:
                masks[:, 0] = root.masks
            prior = self.own_logits(Now(seen, future, root), masks).softmax(1)
            uniform = masks[:, 0] / masks[:, 0].sum(1, keepdim=True)
            prior = torch.lerp(prior, uniform, UNIFORM_SHARE)
            noise = gumbel((T, *masks.shape[1:]), node.device)
            actions = self.others_actions(Now(seen, future, root), masks, noise, strange)
            tree = future.out
            chosen = trees.choose(tree, node, prior, masks[:, 0], self.args.exploration)
            actions[:, 0] = chosen
            path.append((tree, node, chosen, returns[tree], discount[tree]))
            node, is_new = trees.descend(tree, node, chosen)
            future, reward, goes_on = self.move(seen, future, actions)
            returns[tree] += discount[tree] * reward
            discount[tree] *= self.args.gamma
            leaves.append(future.take((goes_on & is_new).nonzero()[:, 0]))
            on = (goes_on & ~is_new).nonzero()[:, 0]
            future, node = future.take(on), node[on]
            if not len(on):
                break
        leaf = join([*leaves, future])
        returns += discount * self.worth(leaf, root, T, strange)
        trees.back_up(path, returns)

    def worth(
        self,
        leaf: Future,
        root: Root,
        num_trees: int,
        strange: Strange | None,
    ) -> Tensor:
        """V of new positions, or what the base policy gets from there. By `out`: [T]"""
        if not len(leaf.t):
            return torch.zeros(num_trees, device=leaf.t.device)
        if self.value is None:
            return self.play(leaf, root, None, self.args.horizon, num_trees, num_trees, strange)
        later = self.value(self.eyes.everyone(leaf.views), root.seats[leaf.root])
        return torch.zeros(num_trees, device=later.device).index_add(0, leaf.out, later)


def join(futures: list[Future]) -> Future:
    """All in one batch."""
    columns = zip(*futures, strict=True)
    return Future(*(None if column[0] is None else torch.cat(column) for column in columns))


class Trees:
    """T search trees that grow by one node a simulation. Node 0 is the root of each."""

    def __init__(
        self,
        num_trees: int,
        simulations: int,
        num_actions: int,
        device: torch.device,
    ):
        shape = (num_trees, simulations + 1, num_actions)
        self.visits = torch.zeros(shape, device=device)  # [T, nodes, n]
        self.sums = torch.zeros(shape, device=device)  # of the returns that followed
        self.children = torch.zeros(shape, dtype=torch.int64, device=device)  # 0: none yet
        self.size = torch.ones(num_trees, dtype=torch.int64, device=device)  # [T], nodes so far

    def choose(
        self,
        tree: Tensor,
        node: Tensor,
        prior: Tensor,
        legal: Tensor,
        exploration: float,
    ) -> Tensor:
        """PUCT in nodes [B] of trees [B]; prior [B, n], legal [B, n] bool -> actions [B]

        Values are scaled to what the tree has seen, 0 to 1 (Schrittwieser et al. 2020, appendix B); an action that was
        never tried counts as much as the node's mean.
        """
        visits = self.visits[tree, node]  # [B, n]
        sums = self.sums[tree, node]
        total = visits.sum(1, keepdim=True)  # [B, 1]
        mean = sums.sum(1, keepdim=True) / total.clamp(min=1)
        values = torch.where(visits > 0, sums / visits.clamp(min=1), mean)
        low, high = self.range()
        values = (values - low[tree]) / (high - low)[tree]
        bonus = prior * (total + 1).sqrt() / (1 + visits)
        score = values + exploration * bonus
        return score.masked_fill(~legal, -torch.inf).argmax(1)

    def range(self) -> tuple[Tensor, Tensor]:
        """The least and the most that an action was worth in each tree. [T, 1] each"""
        tried = self.visits > 0
        values = self.sums / self.visits.clamp(min=1)
        low = values.masked_fill(~tried, torch.inf).amin((1, 2))[:, None]
        high = values.masked_fill(~tried, -torch.inf).amax((1, 2))[:, None]
        known = high > low
        return torch.where(known, low, 0.0), torch.where(known, high, 1.0)

    def descend(
        self,
        tree: Tensor,
        node: Tensor,
        action: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The nodes [B] that actions [B] lead to, and which of them are new [B] bool. A tree is in `tree` once."""
        child = self.children[tree, node, action]
        is_new = child == 0
        child = torch.where(is_new, self.size[tree], child)
        self.children[tree, node, action] = child
        self.size[tree] += is_new
        return child, is_new

    def back_up(
        self,
        path: list[tuple[Tensor, ...]],
        returns: Tensor,
    ) -> None:
        """path: at each depth trees, nodes, actions, the return before them and its discount, all [B]; returns [T]"""
        for tree, node, action, before, discount in path:
            self.visits[tree, node, action] += 1
            self.sums[tree, node, action] += (returns[tree] - before) / discount


def gumbel(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Noise that makes the largest of noisy logits a sample of their softmax."""
    exponential = torch.empty(shape, device=device).exponential_()
    return -exponential.log()


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """One action from each distribution: logits [B, n], noise [B, n] -> [B]"""
    return (logits + noise).argmax(1)


# ---------------------------------------------------------------- set-up


def check_fits(
    what: str,
    found: dict[str, Any],
    env: VecEnv,
    env_kwargs: dict[str, Any],
) -> None:
    """UsageError unless a model was made for the rules of this env, whatever name they go by.

    found: env_id, env_kwargs, obs_shape, num_agents, num_actions.
    """
    its_rules = same_rules(found.pop("env_id"), found.pop("env_kwargs"))
    found = {**its_rules, **found}
    expected = {
        **same_rules(env.env_id, env_kwargs),
        "obs_shape": list(env.obs_shape),
        "num_agents": env.num_agents,
        "num_actions": int(env.action_space.n),
    }
    if found != expected:
        names = [*found, *(name for name in expected if name not in found)]
        differs = [name for name in names if found.get(name) != expected.get(name)]
        its = ", ".join(f"{name} {found.get(name)}" for name in differs)
        ours = ", ".join(f"{name} {expected.get(name)}" for name in differs)
        raise UsageError(f"{what} was trained with {its}, but {env.env_id} has {ours}: use one trained on this env")


def read_world_model(
    path: str,
    env: VecEnv,
    env_kwargs: dict[str, Any],
) -> WorldModel:
    """UsageError: no world model, or of another env."""
    model = load_world_model(path, env.device)
    config = model.config
    if not config["discrete"]:
        raise UsageError(f"--world-model {path} expected discrete actions, got continuous ones: use another")
    if config["reward_target"] != "reward":
        raise UsageError(f"--world-model {path} predicts values, not rewards: train it with --reward-target reward")
    found = {
        "env_id": config["env_id"],
        "env_kwargs": config["env_kwargs"],
        "obs_shape": list(config["obs_shape"]),
        "num_agents": config["num_agents"],
        "num_actions": config["action_dim"],
    }
    check_fits(f"--world-model {path}", found, env, env_kwargs)
    return model.requires_grad_(False)


def read_opponents(path: str, env: VecEnv) -> VAE:
    """UsageError: no model of other agents, or of another env."""
    model = load_vae(path, env.device)
    spec = model.spec
    if spec["input"] != "obs":
        raise UsageError(f"--opponents {path} reads the state, which no seat sees: pretrain it with --input obs")
    found = {
        "env_id": spec["env_id"],
        "env_kwargs": {},  # its checkpoint does not say
        "obs_shape": list(spec["shape"]),
        "num_agents": spec["num_agents"],
        "num_actions": spec["num_actions"],
    }
    check_fits(f"--opponents {path}", found, env, {})
    return model


def find_centres(args: Args, model: VAE, device: torch.device) -> Tensor:
    """Centres of z over the opponents' training data (k-means). [C, Z]"""
    trained = pretrain_vae.load_checkpoint(args.opponents)["args"]
    path = args.data or trained["data"]
    try:
        dataset = load_dataset(path)
    except UsageError as error:
        raise UsageError(
            f"--subgoals needs the data that --opponents was trained on ({error}): name it by --data"
        ) from None
    train = dataset.split_episodes(trained["seed"], trained["heldout_fraction"], tuple(trained["holdout_policies"]))
    samples = Samples(dataset, model.spec, device, trained["memory_limit_mb"])
    sequences = samples.sequences(train["train"])[:CENTRE_SEQUENCES]
    _, z = pretrain_vae.predict(model, samples, sequences, 4096)
    found = KMeans(args.subgoals, n_init=3, random_state=args.seed)
    found.fit(z.cpu().numpy())
    return torch.from_numpy(found.cluster_centers_).float().to(device)


def check_args(args: Args) -> None:
    """What can be wrong before an env is made: UsageError."""
    if not args.partners:
        raise UsageError("--partners expected who fills the other seats, like nearest_hare:3, got nobody")
    if args.world == "learned" and args.world_model is None:
        raise UsageError(
            "--world-model expected a run folder of world_model.py, got none: train one, or use --world true"
        )
    if args.opponents is None:
        raise UsageError("--opponents expected a run folder of pretrain_vae.py or true, got none: pretrain one")
    if args.subgoals and args.opponents == TRUE:
        raise UsageError("--subgoals are the MOA's: --opponents true has none, give a run folder of pretrain_vae.py")


def check_env_fits(args: Args, env: VecEnv, spec: ObsSpec, eyes: Eyes) -> None:
    """What can be wrong with the env and the seats: UsageError."""
    if not isinstance(env.action_space, gym.spaces.Discrete):
        raise UsageError(f"planning expected discrete actions, got {env.action_space} of {env.env_id}: use another env")
    if args.seat >= env.num_agents:
        raise UsageError(f"--seat expected 0 to {env.num_agents - 1}, got {args.seat}: {env.env_id} has no other")
    seats = sum(entry.seats for entry in parse_partners(args.partners))
    if seats != env.num_agents - 1:
        raise UsageError(
            f"--partners expected to fill {env.num_agents - 1} seats of {env.env_id}, got {seats}: "
            "every seat but the planner's"
        )
    if not eyes.whole_map and not args.joint_obs:
        raise UsageError(
            f"a view of {env.env_id} does not show what the others see: add --joint-obs to plan on everyone's views"
        )
    if args.method == "one-step" and args.policy is None and args.values is None:
        raise UsageError("--method one-step expected values, got none: give --policy RUN (its critic) or --values DATA")


def make_bases(
    args: Args,
    env: VecEnv,
    env_kwargs: dict[str, Any],
    opponents: LearnedOpponents | TrueOpponents,
) -> list[Scripted | Subgoals | Trained]:
    """The base policies, --policy first. UsageError: unusable ones, or none."""
    bases: list[Scripted | Subgoals | Trained] = []
    if args.policy is not None:
        policy = make_policy(args.policy, env)
        if not isinstance(policy, Policy):
            raise UsageError(
                f"--policy expected a run folder of hyper_mappo.py, got {args.policy}: scripts are --scripts"
            )
        bases.append(Trained(policy, args.policy))
    scripts = args.scripts
    known = script_names(env.env_id)
    if scripts is None:
        scripts = ()
        if args.policy is None and not args.subgoals:
            scripts = [name for name in known if name.startswith("nearest")]
    for name in scripts:
        if name not in known:
            raise UsageError(f"--scripts expected scripted players of {env.env_id}: {', '.join(known)}, got {name!r}")
        bases.append(Scripted(name, env, env_kwargs))
    if args.subgoals:
        centres = find_centres(args, opponents.model, env.device)
        bases.append(Subgoals(opponents, centres))
    if not bases:
        raise UsageError("expected a base policy, got none: give --policy, --scripts or --subgoals")
    return bases


def make_planner(
    args: Args,
    env: VecEnv,
    env_kwargs: dict[str, Any],
    seats: tuple[int, ...],
) -> Planner:
    """A planner for some seats of an env. UsageError: something does not fit."""
    spec = describe_obs(
        {
            "env_id": env.env_id,
            "env_kwargs": env_kwargs,
            "num_agents": env.num_agents,
            "obs_shape": list(env.obs_shape),
            "obs_dtype": str(env.obs_dtype).removeprefix("torch."),
        }
    )
    eyes = Eyes(spec, env.num_agents, args.joint_obs)
    check_env_fits(args, env, spec, eyes)
    limit = args.episode_limit
    if args.opponents == TRUE:
        opponents = TrueOpponents(true_scripts(args, env), env, env_kwargs)
    else:
        model = read_opponents(args.opponents, env)
        opponents = LearnedOpponents(model, eyes)
        limit = limit or round(1 / model.spec["time_scale"])
    if args.world == "true":
        world = TrueWorld(env, env_kwargs, eyes)
    else:
        world = LearnedWorld(read_world_model(args.world_model, env, env_kwargs), eyes)
    strangers = None
    if args.surprise and args.opponents != TRUE:
        strangers = Strangers(args.surprise, eyes)
    bases = make_bases(args, env, env_kwargs, opponents)
    value = None
    if args.policy is not None and eyes.whole_map:
        value = CriticValues(args.policy, eyes, env.device)
    elif args.values is not None:
        value = fit_values(args.values, env.device)
    return Planner(eyes, world, opponents, bases, value, args, seats, limit, strangers)


def true_scripts(args: Args, env: VecEnv) -> list[str | None]:
    """Who sits where, by seat. UsageError: not scripts."""
    names = []
    known = script_names(env.env_id)
    for entry in parse_partners(args.partners):
        name = entry.members[0]
        if len(entry.members) > 1 or name not in known:
            who = ", ".join(entry.members)
            raise UsageError(f"--opponents true expected one script a seat as --partners, got {who}: use learned ones")
        names += entry.seats * [name]
    names.insert(args.seat, None)
    return names


def seat_partners(args: Args, env: VecEnv) -> Partners:
    """Partners in all seats but the planner's. UsageError: unusable ones."""
    others = tuple(seat for seat in range(env.num_agents) if seat != args.seat)
    return Partners(args.partners, env, make_policy, seed=args.seed, seats=others)


# ---------------------------------------------------------------- playing


def play_episodes(
    planner: Planner,
    env: VecEnv,
    partners: Partners,
    args: Args,
    stop: StopSignal,
) -> list[float]:
    """Returns of the planning seat, in the order in which episodes ended; fewer where it was stopped.

    Every env plays a fixed share of the episodes, so that short ones are not over-represented.
    """
    torch.manual_seed(args.seed)
    N = env.num_envs
    each = torch.arange(N, device=env.device)
    shares = args.episodes // N + (each < args.episodes % N)
    returns: list[float] = []
    step = env.reset(args.seed)
    step.episode_over = torch.ones_like(step.episode_over)  # beliefs begin
    memory = planner.initial_state(N)
    bar = tqdm(total=args.episodes, unit="episode", disable=None)
    while len(returns) < args.episodes and not stop.requested:
        actions, memory = planner.act(step, memory, shares > 0)
        actions = partners.play(step, actions)
        memory = planner.remember(step, actions, memory)
        step = env.step(actions)
        ended = (step.episode_over & (shares > 0)).nonzero()[:, 0]
        shares[ended] -= 1
        returns += step.episode_returns[ended, args.seat].tolist()
        bar.update(len(ended))
        if returns:
            bar.set_postfix_str(f"return {np.mean(returns):.3f}, {planner.ms_per_decision():.1f} ms per decision")
    bar.close()
    return returns


def interval_95(returns: list[float]) -> float | None:
    """Half the width of the 95 % interval of the mean (Student); None for fewer than two."""
    count = len(returns)
    if count < 2:
        return None
    error = np.std(returns, ddof=1) / math.sqrt(count)
    return float(error * student_t.ppf(0.975, count - 1))


def main(args: Args) -> Path:
    """Plays and reports; returns the run folder. UsageError: unusable arguments or models."""
    # ---- arguments
    check_args(args)
    env_kwargs = runs.parse_env_kwargs(args.env_kwargs)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    device = get_device(args.cuda)
    checked = check_env(args.env_id, args.backend, env_kwargs)

    # ---- seeding
    torch.manual_seed(args.seed)

    # ---- env, models
    num_envs = min(args.num_envs, args.episodes)
    env = make_vec_env(checked, num_envs, device, args.seed)
    planner = make_planner(args, env, checked.env_kwargs, (args.seat,))
    partners = seat_partners(args, env)

    # ---- logging
    run_dir = runs.new_run_dir(args.runs_dir, env.env_id, args.exp_name, args.seed)
    write_json(run_dir / "args.json", asdict(args))
    names = [name for base in planner.bases for name in base.names]
    print(f"run      {run_dir}")
    print(f"plan     {args.method}, {args.world} world, base policies {', '.join(names)}, on {device}")

    # ---- loop
    stop = StopSignal("step")
    try:
        returns = play_episodes(planner, env, partners, args, stop)
    finally:
        stop.restore()
        env.close()

    # ---- close
    report = {
        "mean_return": float(np.mean(returns)) if returns else None,
        "interval_95": interval_95(returns),
        "episodes": len(returns),
        "returns": returns,
        "ms_per_decision": planner.ms_per_decision(),
        "method": args.method,
        "seat": args.seat,
        "sources": {
            "world": args.world_model if args.world == "learned" else TRUE,
            "opponents": args.opponents,
            "base_policies": names,
            "values": None if planner.value is None else args.policy or args.values,
        },
        "env_id": env.env_id,
        "backend": env.backend,
        "partners": list(args.partners),
        "seed": args.seed,
    }
    write_json(run_dir / "plan.json", report)
    print(summary(report))
    return run_dir


def summary(report: dict[str, Any]) -> str:
    """The last line."""
    if report["mean_return"] is None:
        return "plan: stopped before an episode ended"
    result = f"return {report['mean_return']:.3f}"
    if report["interval_95"] is not None:
        result += f" ± {report['interval_95']:.3f}"
    return (
        f"plan: seat {report['seat']} {result} (95 % interval, {report['episodes']} episodes), "
        f"{report['ms_per_decision']:.1f} ms per decision"
    )


def load_player(
    run_dir: str | Path,
    env: VecEnv,
    env_kwargs: dict[str, Any] | None = None,
    seats: tuple[int, ...] | None = None,
    partners: tuple[str, ...] | None = None,
) -> Planner:
    """The planner of a run folder as a player, for collect_data.py. UsageError: none there.

    seats: those that it plans for; None: all. partners: who they are instead of those of the run, where the planner is
    told (--opponents true).
    """
    path = Path(run_dir) / "args.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{run_dir}: expected a run folder of plan.py, found no readable args.json ({error})"
        ) from None
    args = restore_args(Args, {**saved, "partners": partners or tuple(saved["partners"])}, run_dir)
    if args.scripts is not None:
        args = replace(args, scripts=tuple(args.scripts))
    if seats is None:
        seats = tuple(range(env.num_agents))
    return make_planner(args, env, env_kwargs or {}, seats)


def cli(argv: list[str] | None = None) -> int:
    """The command line. Exit codes: see command_line."""
    return runs.command_line(Args, main, LIMITS, argv)


if __name__ == "__main__":
    sys.exit(cli())
