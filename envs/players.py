"""Who plays in a seat: scripted and random players, and fixed partners beside those who learn.

A player has three methods, so that those with a memory and those without look alike:

    memory = player.initial_state(N)
    actions, memory = player.act(step, memory)              # [N, A] or [N, A, D], for all seats
    memory = player.remember(step, joint_actions, memory)   # once it is known what everyone did

hyper_mappo.Policy, a trained policy, is another such player.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from envs import EnvStep, VecEnv, stag_hunt
from runs import UsageError

Choose = Callable[[EnvStep], Tensor]  # step -> actions of all seats [N, A] or [N, A, D]


class FixedPolicy:
    """A player without memory."""

    def __init__(self, choose: Choose):
        self.choose = choose

    def initial_state(self, num_envs: int) -> None:
        return None

    def act(self, step: EnvStep, memory: None) -> tuple[Tensor, None]:
        return self.choose(step), None

    def remember(self, step: EnvStep, actions: Tensor, memory: None) -> None:
        return None


# ----------------------------------------------------------------------------------- scripted players


def script_names(env_id: str) -> tuple[str, ...]:
    """The scripted players that know an env, by its resolved id; "random" knows all."""
    if re.fullmatch(stag_hunt.ENV_ID, env_id):
        return stag_hunt.SCRIPTED
    return ("random",)


def scripted_player(name: str, env: VecEnv) -> FixedPolicy:
    """A scripted player in all seats of all envs. UsageError: unknown name, or an action space it cannot draw from."""
    names = script_names(env.env_id)
    if name not in names:
        raise UsageError(
            f"policy: expected {', '.join(names)} or a run folder with latest.pt, got {name!r}; name one of these"
        )
    if re.fullmatch(stag_hunt.ENV_ID, env.env_id):
        return FixedPolicy(_stag_hunt_script(name, env))
    if isinstance(env.action_space, gym.spaces.Discrete):
        return FixedPolicy(_random_legal(env))
    return FixedPolicy(_random_in_bounds(env))


def _stag_hunt_script(name: str, env: VecEnv) -> Choose:
    A = env.num_agents
    prey_and_blocks = torch.arange(A, A + 3).expand(A, 3)
    planes = torch.cat([stag_hunt.ego_order(A), prey_and_blocks], dim=1)  # [A, A + 3]
    planes = planes.to(env.device)

    def choose(step: EnvStep) -> Tensor:
        # Scripts see the whole map, also where the env shows its players a window of it.
        by_player = step.state[..., planes]  # [N, H, W, A, A + 3]
        whole_map = by_player.movedim(-2, 1)  # [N, A, H, W, A + 3]
        probs = stag_hunt.action_probs(name, whole_map, step.action_mask)  # [N, A, 7]
        return stag_hunt.sample_actions(probs)  # [N, A]

    return choose


def _random_legal(env: VecEnv) -> Choose:
    def choose(step: EnvStep) -> Tensor:
        if step.action_mask is None:
            shape = (*step.active.shape, env.action_space.n)
            legal = torch.ones(shape, device=env.device)  # [N, A, n]
        else:
            legal = step.action_mask.float()
        actions = torch.multinomial(legal.flatten(0, 1), 1)  # [N * A, 1]
        return actions.view(step.active.shape)

    return choose


def _random_in_bounds(env: VecEnv) -> Choose:
    low = torch.as_tensor(env.action_space.low, device=env.device)  # [D]
    high = torch.as_tensor(env.action_space.high, device=env.device)
    bounded = low.isfinite() & high.isfinite()
    if not bounded.all():
        raise UsageError(f"random expected a bounded action space, got {env.action_space}; use another policy")

    def choose(step: EnvStep) -> Tensor:
        shape = (*step.active.shape, *low.shape)
        share = torch.rand(shape, device=env.device)  # [N, A, D]
        return low + (high - low) * share

    return choose


def script_probs(
    name: str,
    env_id: str,
    env_kwargs: dict[str, Any],
    obs: Tensor,
    action_mask: Tensor,
) -> Tensor | None:
    """What a scripted player would do: obs [B, *O], action_mask [B, n] -> probabilities [B, n].

    None where that cannot be known: no script of this env, or one that sees more than the observation shows.
    """
    if name == "random":
        return action_mask / action_mask.sum(-1, keepdim=True)
    is_stag_hunt = re.fullmatch(stag_hunt.ENV_ID, env_id)
    sees_all = not env_kwargs.get("view")
    if is_stag_hunt and sees_all and name in stag_hunt.SCRIPTED:
        return stag_hunt.action_probs(name, obs, action_mask)
    return None


# ------------------------------------------------------------------------------------------- partners


def parse_partners(partners: tuple[str, ...]) -> list[tuple[str, int]]:
    """("nearest_stag:2", "random:1") -> [("nearest_stag", 2), ("random", 1)]. UsageError where that is not its form."""
    parsed = []
    for partner in partners:
        name, _, seats = partner.rpartition(":")
        if not name or not seats.isdecimal() or int(seats) < 1:
            raise UsageError(f"--partners expects NAME:SEATS with at least 1 seat, like random:1, got {partner!r}")
        parsed.append((name, int(seats)))
    return parsed


class Partners:
    """Fixed partners in the last seats of every env. UsageError: more than there are seats, or unusable ones."""

    def __init__(
        self,
        partners: tuple[str, ...],
        env: VecEnv,
        make_player: Callable[[str, VecEnv], Any],
    ):
        """partners: NAME:SEATS; make_player(name, env): a player for a name"""
        parsed = parse_partners(partners)
        num_partners = sum(seats for _, seats in parsed)
        self.first_seat = env.num_agents - num_partners  # the seats before it learn
        if self.first_seat < 1:
            raise UsageError(
                f"--partners fill {num_partners} seats of {env.env_id}, which has {env.num_agents}: "
                "leave at least 1 to learn"
            )
        self.players, self.memories = [], []
        self.first_seats = []
        seat = self.first_seat
        for name, seats in parsed:
            try:
                player = make_player(name, env)
            except UsageError as error:
                raise UsageError(f"--partners: {error}") from None
            self.players.append(player)
            self.memories.append(player.initial_state(env.num_envs))
            self.first_seats.append(seat)
            seat += seats

    @torch.no_grad()
    def play(self, step: EnvStep, actions: Tensor) -> Tensor:
        """The learners' actions [N, A] or [N, A, D] with the partners' own in their seats."""
        for i, player in enumerate(self.players):
            chosen, memory = player.act(step, self.memories[i])
            self.memories[i] = memory
            first_seat = self.first_seats[i]
            before = actions[:, :first_seat]
            from_there = chosen[:, first_seat:]
            actions = torch.cat([before, from_there], dim=1)
        for i, player in enumerate(self.players):
            memory = player.remember(step, actions, self.memories[i])
            self.memories[i] = memory
        return actions
