"""Who plays in a seat: scripted and random players, and partners beside those who learn, fixed or from a pool.

A player has three methods, so that those with a memory and those without look alike:

    memory = player.initial_state(N)
    actions, memory = player.act(step, memory)              # [N, A] or [N, A, D], for all seats
    memory = player.remember(step, joint_actions, memory)   # once it is known what everyone did

hyper_mappo.Policy, a trained policy, is another such player.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from envs import EnvStep, VecEnv, snowdrift, stag_hunt
from envs.grid_game import ego_order, sample_actions
from runs import UsageError, safe_name

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

SCRIPTED_GAMES = (stag_hunt, snowdrift)


def scripted_game(env_id: str) -> ModuleType | None:
    """The module with the scripts that know an env, by its resolved id; None: there are none."""
    for game in SCRIPTED_GAMES:
        if re.fullmatch(game.ENV_ID, env_id):
            return game
    return None


def script_names(env_id: str) -> tuple[str, ...]:
    """The scripted players that know an env, by its resolved id; "random" knows all."""
    game = scripted_game(env_id)
    return ("random",) if game is None else game.SCRIPTED


def same_rules(env_id: str, env_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What two envs have in common that follow the same rules: a preset's options, else the resolved id.

    The time limit is none of them: it cuts episodes, and no step is another for it.
    """
    game = scripted_game(env_id)
    if game is None or env_id not in game.PRESETS:
        return {"env_id": env_id}
    rules = {"game": game.__name__.rpartition(".")[2], "num_blocks": 0, "view": None}
    rules |= game.preset_options(env_id) | env_kwargs
    rules.pop("max_cycles", None)
    return rules


def scripted_player(name: str, env: VecEnv) -> FixedPolicy:
    """A scripted player in all seats of all envs. UsageError: unknown name, or an action space it cannot draw from."""
    names = script_names(env.env_id)
    if name not in names:
        raise UsageError(
            f"policy: expected {', '.join(names)} or a run folder with latest.pt, got {name!r}; name one of these"
        )
    game = scripted_game(env.env_id)
    if game is not None:
        return FixedPolicy(_grid_script(game, name, env))
    if isinstance(env.action_space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        return FixedPolicy(_random_legal(env))
    return FixedPolicy(_random_in_bounds(env))


def _grid_script(game: ModuleType, name: str, env: VecEnv) -> Choose:
    A, num_planes = env.num_agents, env.state_shape[-1]
    fixed_planes = torch.arange(A, num_planes).expand(A, -1)  # blocks and items
    planes = torch.cat([ego_order(A), fixed_planes], dim=1)  # [A, C]
    planes = planes.to(env.device)

    def choose(step: EnvStep) -> Tensor:
        # Scripts see the whole map, also where the env shows its players a window of it.
        by_player = step.state[..., planes]  # [N, H, W, A, C]
        whole_map = by_player.movedim(-2, 1)  # [N, A, H, W, C]
        probs = game.action_probs(name, whole_map, step.action_mask)  # [N, A, n]
        return sample_actions(probs)  # [N, A]

    return choose


def _random_legal(env: VecEnv) -> Choose:
    """Uniform over legal actions, in each part of those that have parts (MultiDiscrete)."""
    in_parts = isinstance(env.action_space, gym.spaces.MultiDiscrete)
    sizes = env.action_space.nvec.tolist() if in_parts else [int(env.action_space.n)]

    def choose(step: EnvStep) -> Tensor:
        if step.action_mask is None:
            shape = (*step.active.shape, sum(sizes))
            legal = torch.ones(shape, device=env.device)  # [N, A, sum of sizes]
        else:
            legal = step.action_mask.float()
        drawn = []
        for part in legal.split(sizes, dim=-1):
            flat = part.flatten(0, 1)  # [N * A, size]
            drawn.append(torch.multinomial(flat, 1))  # [N * A, 1]
        actions = torch.cat(drawn, dim=1)  # [N * A, D]
        if in_parts:
            return actions.view(*step.active.shape, len(sizes))
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
    game = scripted_game(env_id)
    sees_all = not env_kwargs.get("view")
    if game is not None and sees_all and name in game.SCRIPTED:
        return game.action_probs(name, obs, action_mask)
    return None


# ------------------------------------------------------------------------------------------- partners

FAVOURED_SHARE = 0.8  # how often the member in favour is drawn while a pool drifts


@dataclass(frozen=True)
class PartnerSeats:
    """What one --partners entry asks for: the members of a pool, a single one where there is nothing to draw.

    A member that is drawn more often stands there more often.
    """

    members: tuple[str, ...]
    seats: int
    same: bool = False  # one draw for all its seats


def parse_partners(partners: tuple[str, ...]) -> list[PartnerSeats]:
    """("nearest_stag:2", "pool=random,runs/A:1") -> who may sit there, and in how many seats.

    pool=: each seat draws its member; same=: one draw for all its seats; NAME*3: three times as often as others.
    UsageError where that is not its form.
    """
    parsed = []
    for partner in partners:
        who, _, seats = partner.rpartition(":")
        is_number = seats.isascii() and seats.isdecimal()
        if not who or not is_number or int(seats) < 1:
            raise UsageError(f"--partners expects NAME:SEATS with at least 1 seat, like random:1, got {partner!r}")
        kind, is_pool, names = who.partition("=")
        if not is_pool or kind not in ("pool", "same"):
            parsed.append(PartnerSeats((who,), int(seats)))
            continue
        listed = names.split(",")
        weights = dict(map(_name_and_weight, listed))
        are_different = len(weights) == len(listed)
        if not are_different or "" in weights or 0 in weights.values():
            raise UsageError(f"--partners expects different members, like pool=random,stay*3:2, got {partner!r}")
        members = []
        for name, weight in weights.items():
            members += weight * [name]
        parsed.append(PartnerSeats(tuple(members), int(seats), kind == "same"))
    return parsed


def _name_and_weight(member: str) -> tuple[str, int]:
    name, star, weight = member.rpartition("*")
    if star and weight.isascii() and weight.isdecimal():
        return name, int(weight)
    return member, 1


class Partners:
    """Partners beside those who learn, in every env: fixed, or drawn anew from a pool for each episode.

    names [M]: all members. seated [N, P] int64: who of them sits in each of the P partner seats, in the episode of the
    step that `play` saw last; `play` draws where that episode is over. Members never learn. UsageError: more partners
    than there are seats, unusable ones, or a switch without a pool.
    """

    def __init__(
        self,
        partners: tuple[str, ...],
        env: VecEnv,
        make_player: Callable[[str, VecEnv], Any],
        seed: int = 0,
        switch: int | None = None,
        seats: tuple[int, ...] | None = None,
    ):
        """partners: NAME:SEATS or pool=NAME,NAME:SEATS; make_player(name, env): a player for a name.

        seed: of the draws. switch: in how many updates the pools change whom they favour; None: never, members are
        drawn uniformly. seats: those that partners take, in this order; None: the last ones.
        """
        parsed = parse_partners(partners)
        num_partners = sum(entry.seats for entry in parsed)
        self.first_seat = env.num_agents - num_partners  # the seats before it learn
        if self.first_seat < 1:
            raise UsageError(
                f"--partners fill {num_partners} seats of {env.env_id}, which has {env.num_agents}: "
                "leave at least 1 to learn"
            )
        if seats is None:
            seats = tuple(range(self.first_seat, env.num_agents))
        different = set(seats)
        if len(different) != num_partners or not different <= set(range(env.num_agents)):
            raise UsageError(
                f"--partners fill {num_partners} seats of {env.env_id}, got the seats {list(seats)} for them"
            )
        self.seats = torch.tensor(seats, dtype=torch.int64, device=env.device)  # [P]
        self.learners = torch.ones(env.num_agents, dtype=torch.bool, device=env.device)  # [A]
        self.learners[self.seats] = False
        self.has_pool = any(len(entry.members) > 1 for entry in parsed)
        if switch is not None and not self.has_pool:
            raise UsageError("--partner-switch expects a pool to switch, like --partners pool=random,stay:2, got none")
        all_members = [name for entry in parsed for name in entry.members]
        self.names = list(dict.fromkeys(all_members))
        self.players = [self._make(name, env, make_player) for name in self.names]
        self.memories = [player.initial_state(env.num_envs) for player in self.players]
        self.switch = switch
        self.phase = 0
        self._make_seats(parsed, env)
        self._generator = torch.Generator(env.device).manual_seed(seed)
        self.seated = self._draw()

    @staticmethod
    def _make(
        name: str,
        env: VecEnv,
        make_player: Callable[[str, VecEnv], Any],
    ) -> Any:
        try:
            return make_player(name, env)
        except UsageError as error:
            raise UsageError(f"--partners: {error}") from None

    def _make_seats(self, parsed: list[PartnerSeats], env: VecEnv) -> None:
        """Which draw decides a seat, and whom it may put there."""
        seat_draws, seat_members = [], []
        num_draws = 0
        for entry in parsed:
            for seat in range(entry.seats):
                if seat == 0 or not entry.same:
                    num_draws += 1
                seat_draws.append(num_draws - 1)
                seat_members.append([self.names.index(name) for name in entry.members])
        longest = max(map(len, seat_members), default=1)
        table = [members + members[:1] * (longest - len(members)) for members in seat_members]
        sizes = [len(members) for members in seat_members]
        tensor = functools.partial(torch.tensor, dtype=torch.int64, device=env.device)
        self._num_draws = (env.num_envs, num_draws)
        self._seat_draw = tensor(seat_draws)  # [P]
        self._members = tensor(table).view(len(table), longest)  # [P, longest], padded with the first
        self._pool_size = tensor(sizes)  # [P]

    # -- who sits where

    def start_update(self, update: int) -> None:
        """Tells the time, in updates from 1 on: with a switch the favourite changes every so many of them."""
        if self.switch is not None:
            self.phase = (update - 1) // self.switch

    def _draw(self) -> Tensor:
        """Members for all seats of all envs. [N, P] int64"""
        draws = torch.rand(self._num_draws, generator=self._generator, device=self._members.device)
        draws = draws[:, self._seat_draw]  # [N, P]
        sizes = self._pool_size
        if self.switch is None:
            place = draws * sizes
        else:
            # Below the favourite's share it is that one, above the others follow evenly in the order of the pool.
            rest = (draws - FAVOURED_SHARE) / (1 - FAVOURED_SHARE)
            behind = 1 + rest * (sizes - 1)
            place = torch.where(rest < 0, 0.0, behind) + self.phase % sizes
        place = place.long() % sizes
        index = place[..., None]  # [N, P, 1]
        by_env = self._members.expand(len(draws), -1, -1)  # [N, P, longest]
        return by_env.gather(2, index)[..., 0]

    @torch.no_grad()
    def play(self, step: EnvStep, actions: Tensor) -> Tensor:
        """The learners' actions [N, A] or [N, A, D] with the partners' own in their seats."""
        if self.has_pool:
            anew = step.episode_over[:, None]
            self.seated = torch.where(anew, self._draw(), self.seated)
        for k, player in enumerate(self.players):
            chosen, memory = player.act(step, self.memories[k])
            self.memories[k] = memory
            actions = torch.where(self._seats_of(k, chosen), chosen, actions)
        for k, player in enumerate(self.players):
            self.memories[k] = player.remember(step, actions, self.memories[k])
        return actions

    def _seats_of(self, k: int, actions: Tensor) -> Tensor:
        """Which seats member k has: [N, A] bool, [N, A, 1] for actions [N, A, D]"""
        mine = torch.zeros(actions.shape[:2], dtype=torch.bool, device=actions.device)
        mine[:, self.seats] = self.seated == k
        return mine if actions.ndim == 2 else mine[..., None]

    # -- what comes of it

    def member_sums(self, step: EnvStep, counted: Tensor | None = None) -> Tensor:
        """Of the episodes that `step` ended (and counted [N] bool), before the next `play`: [M, 3]

        For each member the seats it had, the sum of its own returns in them, the sum of the learners' mean returns.
        """
        over = step.episode_over if counted is None else step.episode_over & counted
        own = step.episode_returns[:, self.seats]  # [N, P]
        learners = step.episode_returns @ (self.learners / self.learners.sum())  # [N]
        learners = learners[:, None]
        counts = torch.ones_like(own)
        beside = learners.expand_as(own)
        values = torch.stack([counts, own, beside], dim=-1)  # [N, P, 3]
        members = torch.arange(len(self.names), device=own.device)
        had = (self.seated[..., None] == members) & over[:, None, None]  # [N, P, M]
        return torch.einsum("npm,npv->mv", had.float(), values)

    def columns(self) -> list[str]:
        """The names of what `member_metrics` returns."""
        labels = [safe_name(name) for name in self.names]
        kinds = "draws return_of return_with".split()
        return [f"partners/{kind}_{label}" for label in labels for kind in kinds]

    def member_metrics(self, sums: list[list[float]]) -> dict[str, float]:
        """Sums [M, 3] of `member_sums` -> how often each was seated, its mean return, the learners' beside it."""
        columns = iter(self.columns())
        metrics = {}
        for seats, own, learners in sums:
            metrics[next(columns)] = seats
            means = {next(columns): own, next(columns): learners}
            if seats:
                metrics |= {name: total / seats for name, total in means.items()}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on with the episodes in flight."""
        return {
            "memories": self.memories,
            "seated": self.seated,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any] | list[Any]) -> None:
        """Goes on where `state_dict` was taken. A list: memories alone, which is what runs without pools once saved."""
        if isinstance(state, list):
            state = {**self.state_dict(), "memories": state}
        self.memories = state["memories"]
        self.seated = state["seated"].to(self.seated.device)
        self._generator.set_state(state["generator"].cpu())
