"""Is it worth knowing the partners? The oracle gap of settings, from what responses return against each mix.

    python benchmark/adaptation.py                     # settings of this study: the table and its gap, 2 minutes
    python benchmark/adaptation.py --search            # many small stag hunts, the largest gaps first
    python benchmark/adaptation.py --solve             # small hunts, over all policies: 10 minutes
    python benchmark/adaptation.py --settings stag_hunt-4x4-4h1s --responses runs/POOL runs/KNOWS   # trained ones too

Who closes the gap: benchmark/adaptation_agents.py.

A setting is an env and the mixes of partners that learner 0 meets, each equally often.

    oracle    mean over mixes of the best response to that mix: who knows the partners
    unaware   best mean over mixes of one response: who cannot know them
    gap       their difference

Responses are scripted players, `watch` players (see Watcher: one observation, no memory) and run folders. Both numbers
are the best of the responses that were tried, and grow with better ones. --solve tries all policies without memory of
small hunts (SolvedHunt), and shows how much of such a gap is but the weakness of the responses.
"""

from __future__ import annotations

import csv
import itertools
import math
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import EnvStep, VecEnv, make_vec_env, stag_hunt
from envs.players import FixedPolicy, Partners, script_names
from hyper_mappo import make_policy
from plan import load_player
from runs import UsageError

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = "setting response mix episodes seed mean_return interval_95 machine date".split()
SOLVED_COLUMNS = "setting layouts seed oracle with_memory unaware unaware_no_clock machine date".split()


@dataclass(frozen=True)
class Setting:
    """An env, and who may fill the seats beside learner 0: entries of --partners for each mix."""

    name: str
    env_id: str
    env_kwargs: dict[str, Any]
    mixes: tuple[tuple[str, ...], ...]
    weights: tuple[int, ...] | None = None  # how often each mix is met, beside the others; None: all alike
    held_out: str | None = None  # a script that planners meet unrecorded, where that is asked for

    @property
    def scripts(self) -> list[str]:
        """Who is met."""
        names = [entry.rpartition(":")[0] for mix in self.mixes for entry in mix]
        return list(dict.fromkeys(names))

    @property
    def seats(self) -> int:
        """Beside learner 0."""
        return sum(int(entry.rpartition(":")[2]) for entry in self.mixes[0])

    @property
    def shares(self) -> Tensor:
        """How often each mix is met. [M]"""
        weights = torch.ones(len(self.mixes))
        if self.weights is not None:
            weights = torch.tensor(self.weights, dtype=torch.float32)
        return weights / weights.sum()

    @property
    def pool(self) -> tuple[str, ...]:
        """The entry of --partners that draws these mixes; UsageError where there is none."""
        if any(len(mix) > 1 for mix in self.mixes):
            raise UsageError(f"expected mixes of one script each, so that a pool can draw them, got {self.mixes}")
        members = []
        for m, (mix,) in enumerate(self.mixes):
            name, _, seats = mix.rpartition(":")
            often = "" if self.weights is None else f"*{self.weights[m]}"
            members.append(name + often)
        return (f"same={','.join(members)}:{seats}",)


def alike(seats: int, *names: str) -> tuple[tuple[str, ...], ...]:
    """One mix for each script: it has all the seats."""
    return tuple((f"{name}:{seats}",) for name in names)


def small_hunt(
    side: int,
    num_players: int,
    num_hares: int,
    max_cycles: int,
    partners: tuple[str, ...],
    view: int | None = None,
    weights: tuple[int, ...] | None = None,
) -> Setting:
    """A stag hunt in which a step is not to be lost."""
    env_kwargs = {
        "height": side,
        "width": side,
        "num_players": num_players,
        "num_hares": num_hares,
        "max_cycles": max_cycles,
    }
    if view is not None:
        env_kwargs["view"] = view
    window = "" if view is None else f"-view{view}"
    name = f"{side}x{side}-{num_players}p{num_hares}h-T{max_cycles}{window}"
    if weights is not None:
        name += "-" + "to".join(map(str, weights))
    return Setting(name, "stag_hunt", env_kwargs, alike(num_players - 1, *partners), weights)


HUNTERS = ("nearest_stag", "nearest_hare")
ANYONE = ("nearest_stag", "nearest_hare", "random", "stay")
LOOK_ALIKE = ("nearest_stag", "waits_at_stag")  # only what the latter does not do tells them apart


def one_in_four(side: int, max_cycles: int, other: str = "waits_at_stag") -> Setting:
    """One other player; one in four hunts the stag, `other` are the rest."""
    setting = small_hunt(side, 2, 1, max_cycles, ("nearest_stag", other), weights=(1, 3))
    name = setting.name if other == "waits_at_stag" else f"{setting.name}-{other}"
    return replace(setting, name=name, held_out=other)


SOLVED = (
    small_hunt(3, 2, 1, 3, ANYONE),
    small_hunt(3, 2, 1, 3, ANYONE, view=3),
    small_hunt(3, 2, 1, 5, ANYONE),
    small_hunt(3, 2, 1, 8, ANYONE),
    small_hunt(4, 2, 1, 4, ANYONE),
    small_hunt(4, 2, 1, 5, ANYONE),
    small_hunt(4, 2, 1, 4, ANYONE, view=3),
    small_hunt(4, 2, 1, 5, ANYONE, view=3),
    small_hunt(4, 2, 1, 6, ANYONE, view=3),
    small_hunt(4, 2, 2, 4, ANYONE, view=3),
    small_hunt(4, 2, 4, 3, ANYONE, view=3),
    small_hunt(5, 2, 1, 5, ANYONE, view=3),
    small_hunt(5, 2, 1, 6, ANYONE, view=3),
    small_hunt(4, 2, 1, 10, LOOK_ALIKE),
    one_in_four(4, 6),
    one_in_four(4, 8),
    one_in_four(4, 10),
    one_in_four(5, 9),
    one_in_four(4, 10, "nearest_hare"),
    one_in_four(4, 10, "stay"),
    one_in_four(4, 10, "random"),
)


def mixed_hunt() -> Setting:
    """Four players on the plain map, partners of two kinds: mixes that planners meet unrecorded."""
    hunt = small_hunt(4, 4, 4, 35, HUNTERS)
    mixes = (
        ("nearest_stag:1", "nearest_hare:2"),
        ("nearest_stag:2", "nearest_hare:1"),
        ("nearest_stag:1", "random:2"),
        ("nearest_hare:1", "random:2"),
    )
    return replace(hunt, name="4x4-4p4h-mixed", mixes=mixes)


def plain(env_id: str, seats: int, *partners: str) -> Setting:
    """A preset as it is."""
    return Setting(env_id, env_id, {}, alike(seats, *partners))


SETTINGS = {
    setting.name: setting
    for setting in (
        one_in_four(4, 10),
        one_in_four(5, 9),
        one_in_four(4, 10, "nearest_hare"),
        one_in_four(4, 10, "stay"),
        mixed_hunt(),
        small_hunt(4, 3, 2, 5, ANYONE),
        small_hunt(5, 3, 2, 6, ANYONE),
        plain("stag_hunt-4x4-4h1s", 3, *HUNTERS, "random"),
        plain("snowdrift-4x4-6d", 3, "nearest_drift", "never_clears"),
        plain("snowdrift-6x6-6d", 3, "nearest_drift", "never_clears"),
    )
}


# ---------------------------------------------------------------------------------------- responses


class Watcher:
    """Goes for the stag while another player is within `reach` cells of it, else for the nearest hare. No memory."""

    def __init__(self, env: VecEnv, reach: int):
        self.stag = make_policy("nearest_stag", env)
        self.hare = make_policy("nearest_hare", env)
        self.reach = reach

    def choose(self, step: EnvStep) -> Tensor:
        A = step.active.shape[1]
        players = step.state[..., :A].float()  # [N, H, W, A]
        stags = step.state[..., A + 1].float()  # [N, H, W]
        near = stags
        for _ in range(self.reach):
            near = F.max_pool2d(near, 3, stride=1, padding=1)
        there = torch.einsum("nhwa,nhw->na", players, near) > 0  # [N, A]
        others = there.sum(1, keepdim=True) - there.long()  # [N, A]
        to_stag, _ = self.stag.act(step, None)
        to_hare, _ = self.hare.act(step, None)
        return torch.where(others > 0, to_stag, to_hare)


class Trier:
    """Seat 0 hunts the stag until that has failed beside another player, then the nearest hare. It has a memory."""

    def __init__(self, env: VecEnv):
        self.stag = make_policy("nearest_stag", env)
        self.hare = make_policy("nearest_hare", env)

    def initial_state(self, num_envs: int) -> Tensor:
        return torch.zeros(num_envs, dtype=torch.bool)

    def act(
        self,
        step: EnvStep,
        has_failed: Tensor,
    ) -> tuple[Tensor, Tensor]:
        has_failed = has_failed & ~step.episode_over
        to_stag, _ = self.stag.act(step, None)
        to_hare, _ = self.hare.act(step, None)
        return torch.where(has_failed[:, None], to_hare, to_stag), has_failed

    def remember(
        self,
        step: EnvStep,
        actions: Tensor,
        has_failed: Tensor,
    ) -> Tensor:
        A = step.active.shape[1]
        players = step.state[..., :A].flatten(1, 2).float()  # [N, HW, A]
        mine = players[..., :1]
        beside = (players * mine).sum((1, 2)) > 1
        hunted = actions[:, 0] == stag_hunt.HUNT_STAG
        return has_failed | (hunted & beside)  # whoever caught it is gone


# A player by its name, or what makes one for an env and the mix that it may be told
Response = str | Callable[[VecEnv, tuple[str, ...]], Any]


def make_response(
    name: Response,
    env: VecEnv,
    setting: Setting,
    mix: tuple[str, ...],
) -> Any:
    """A player by its name: watch-REACH, tries, a script, a run folder, plan:RUN for one of plan.py's."""
    if callable(name):
        return name(env, mix)
    if name == "tries":
        return Trier(env)
    kind, _, reach = name.partition("-")
    if kind == "watch" and reach.isdecimal():
        return FixedPolicy(Watcher(env, int(reach)).choose)
    kind, _, run_dir = name.partition(":")
    if kind == "plan":
        return load_player(run_dir, env, setting.env_kwargs, seats=(0,), partners=mix)
    return make_policy(name, env)


def default_responses(env_id: str) -> list[str]:
    watchers = []
    if re.fullmatch(stag_hunt.ENV_ID, env_id):
        watchers = [*(f"watch-{reach}" for reach in range(4)), "tries"]
    return [*script_names(env_id), *watchers]


def beside_learner_0(mix: tuple[str, ...], env: VecEnv, seed: int) -> Partners:
    """Who fills all seats but the first. UsageError: another number of seats, unknown partners."""
    partners = Partners(mix, env, make_policy, seed)
    if partners.first_seat != 1:
        raise UsageError(f"expected a mix for all seats but the first, got {mix} in {env.env_id}: change its seats")
    return partners


@torch.no_grad()
def play(
    setting: Setting,
    response: Response,
    mix: tuple[str, ...],
    episodes: int,
    seed: int,
) -> Tensor:
    """What learner 0 returns in the first episode of each of so many envs. [episodes]"""
    torch.manual_seed(seed)
    env = make_vec_env(setting.env_id, episodes, "cpu", seed, **setting.env_kwargs)
    player = make_response(response, env, setting, mix)
    partners = beside_learner_0(mix, env, seed)
    memory = player.initial_state(episodes)
    step = env.reset(seed)
    returns = torch.full((episodes,), math.nan)
    while returns.isnan().any():
        actions, memory = player.act(step, memory)
        actions = partners.play(step, actions)
        memory = player.remember(step, actions, memory)
        step = env.step(actions)
        first = step.episode_over & returns.isnan()
        returns = torch.where(first, step.episode_returns[:, 0], returns)
    env.close()
    return returns


# ---------------------------------------------------------------------------------------------- gap


def has_no_memory(response: str) -> bool:
    """Of a script or watcher: sure; what a run folder holds is not looked into."""
    return response != "tries" and not response.startswith("plan:")


@dataclass
class Gap:
    """What responses [K] return against mixes [M], and what knowing the mix is worth."""

    setting: Setting
    responses: list[str]
    means: Tensor  # [K, M]
    intervals: Tensor  # [K, M], half of a 95 % interval

    @property
    def best(self) -> Tensor:
        """Which response is best against each mix. [M]"""
        return self.means.argmax(0)

    @property
    def mixed(self) -> Tensor:
        """What each response returns on average. [K]"""
        return self.means @ self.setting.shares

    @property
    def oracle(self) -> float:
        return (self.means.amax(0) @ self.setting.shares).item()

    @property
    def unaware(self) -> float:
        """Of those without a memory; nan if there is none."""
        no_memory = [k for k, name in enumerate(self.responses) if has_no_memory(name)]
        return max(self.mixed[no_memory].tolist(), default=math.nan)

    @property
    def share(self) -> float:
        """The gap as a share of what the oracle returns; 0 where that is nothing."""
        if self.oracle <= 0:
            return 0.0
        return (self.oracle - self.unaware) / self.oracle


def measure(
    setting: Setting,
    responses: list[str],
    episodes: int,
    seed: int,
) -> Gap:
    means, intervals = [], []
    for response in responses:
        returns = [play(setting, response, mix, episodes, seed) for mix in setting.mixes]
        returns = torch.stack(returns)  # [M, episodes]
        means.append(returns.mean(1))
        intervals.append(1.96 * returns.std(1) / math.sqrt(episodes))
    return Gap(setting, responses, torch.stack(means), torch.stack(intervals))


def as_table(gap: Gap) -> str:
    """Markdown: a row for each response, a column for each mix; the best of a column is bold."""
    mixes = [" ".join(mix) for mix in gap.setting.mixes]
    lines = [f"| {gap.setting.name} | {' | '.join(mixes)} | mean |", "|---|" + "---:|" * (len(mixes) + 1)]
    for k, response in enumerate(gap.responses):
        cells = []
        for m in range(len(mixes)):
            text = f"{gap.means[k, m]:.2f} ± {gap.intervals[k, m]:.2f}"
            cells.append(f"**{text}**" if gap.best[m] == k else text)
        lines.append(f"| `{Path(response).name}` | {' | '.join(cells)} | {gap.mixed[k]:.2f} |")
    numbers = f"oracle {gap.oracle:.2f}"
    if not math.isnan(gap.unaware):
        numbers += f", unaware {gap.unaware:.2f}, gap {gap.share:.0%} of the oracle's return"
    lines.append(f"\n{numbers}")
    return "\n".join(lines)


def append_rows(
    gap: Gap,
    episodes: int,
    seed: int,
    path: Path,
) -> None:
    """Keeps what was measured, a row for each response and mix."""
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for k, response in enumerate(gap.responses):
            for m, mix in enumerate(gap.setting.mixes):
                row = [gap.setting.name, Path(response).name, " ".join(mix)]
                row += [episodes, seed]
                row.append(f"{gap.means[k, m]:.4f}")
                row.append(f"{gap.intervals[k, m]:.4f}")
                row.append(platform.processor() or platform.machine())
                row.append(time.strftime("%Y-%m-%d"))
                writer.writerow(row)


# --------------------------------------------------------------------------------------- solved games


class SolvedHunt:
    """A small stag hunt, on some layouts of prey, as tables over all states: what follows each joint action.

    A state is a layout, everybody's cell, which partners and which prey are there; S of them in all. n actions of the
    learner, B joint ones of its partners, M scripts: all partners play the same. A policy [T, S] knows the time step
    and what the learner sees, so it is the same in states that look the same, and has no memory.
    """

    def __init__(self, setting: Setting, layouts: Tensor):
        """layouts [L, I] int64: cells of stag and hares"""
        self.names = [mix[0].rpartition(":")[0] for mix in setting.mixes]
        self.shares = setting.shares  # [M]
        options = {**stag_hunt.preset_options(setting.env_id), **setting.env_kwargs}
        self.num_cells = options["height"] * options["width"]
        self.num_players = options["num_players"]
        self.max_cycles = options["max_cycles"]
        parts = [self._tables(options, prey) for prey in layouts]
        sizes = [len(part["starts"]) for part in parts]
        for k, part in enumerate(parts):
            part["follows"] += sum(sizes[:k])
        self.starts = torch.cat([part["starts"] for part in parts])  # [S] bool, all equally often
        self.partner = torch.cat([part["partner"] for part in parts], 1)  # [M, S, B]
        self.follows = torch.cat([part["follows"] for part in parts])  # [S, n, B] states
        self.rewards = torch.cat([part["rewards"] for part in parts])  # [S, n, B] of the learner
        self.goes_on = torch.cat([part["goes_on"] for part in parts])  # [S, n, B] bool
        self.looks = torch.arange(len(self.starts))  # [S], equal where states look the same
        if options.get("view"):
            obs = torch.cat([part["obs"] for part in parts])
            self.looks = obs.flatten(1).unique(dim=0, return_inverse=True)[1]

    def _tables(
        self,
        options: dict[str, Any],
        prey: Tensor,
    ) -> dict[str, Tensor]:
        """One layout, its states from 0 on."""
        cells, alive = self._all_states(prey)
        env = stag_hunt.StagHuntVecEnv(len(cells), "cpu", 0, **options)
        step = env.set_positions(cells, alive)
        partner = []
        for name in self.names:
            probs = stag_hunt.action_probs(name, env.full_obs(), step.action_mask)  # [S, A, n]
            joint = torch.ones(len(cells), 1)
            for others in probs[:, 1:].unbind(1):
                joint = (joint[..., None] * others[:, None]).flatten(1)
            partner.append(joint)  # [S, B]
        ordered = cells.sort(1).values
        apart = (ordered.diff(dim=1) != 0).all(1)
        actions = range(stag_hunt.NUM_ACTIONS)
        after = [self._after(options, cells, alive, own) for own in actions]
        columns = zip(*after, strict=True)
        follows, rewards, goes_on = (torch.stack(column, 1) for column in columns)
        return {
            "obs": step.obs[:, 0],
            "starts": apart & alive.all(1),
            "partner": torch.stack(partner),
            "follows": follows,
            "rewards": rewards,
            "goes_on": goes_on,
        }

    def _after(
        self,
        options: dict[str, Any],
        cells: Tensor,
        alive: Tensor,
        own: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What follows an action of the learner and all of its partners: state, reward, whether it goes on. [S, B]"""
        action = torch.arange(stag_hunt.NUM_ACTIONS)
        partners = [action] * (self.num_players - 1)
        joint = torch.cartesian_prod(torch.tensor([own]), *partners)  # [B, A]
        B = len(joint)
        all_seen = {**options, "view": None}
        env = stag_hunt.StagHuntVecEnv(len(cells) * B, "cpu", 0, **all_seen)
        cells = cells.repeat_interleave(B, 0)
        alive = alive.repeat_interleave(B, 0)
        env.set_positions(cells, alive)
        step = env.step(joint.repeat(len(cells) // B, 1))
        last = env.state_dict()["last"]
        follows = self._index(last["final_cells"], last["final_alive"])
        rewards = step.rewards[:, 0]
        goes_on = ~step.terminations[:, 0]
        return follows.view(-1, B), rewards.view(-1, B), goes_on.view(-1, B)

    def _all_states(self, prey: Tensor) -> tuple[Tensor, Tensor]:
        """cells [S, K], alive [S, K] in the order of `_index`"""
        cell, flag = torch.arange(self.num_cells), torch.arange(2)
        num_flags = self.num_players - 1 + len(prey)
        rows = torch.cartesian_prod(*[cell] * self.num_players, *[flag] * num_flags)
        players = rows[:, : self.num_players]
        learner_is_there = torch.ones(len(rows), 1, dtype=torch.bool)
        others_there = rows[:, self.num_players :].bool()
        alive = torch.cat([learner_is_there, others_there], 1)
        cells = torch.cat([players, prey.expand(len(rows), -1)], 1)
        return cells, alive

    def _index(
        self,
        cells: Tensor,
        alive: Tensor,
    ) -> Tensor:
        """Which state of a layout it is. cells, alive [B, K] -> [B]"""
        at = torch.zeros(len(cells), dtype=torch.int64)
        for cell in cells[:, : self.num_players].unbind(1):
            at = at * self.num_cells + cell
        for flag in alive[:, 1:].unbind(1):
            at = at * 2 + flag
        return at

    def action_values(self, values: Tensor) -> Tensor:
        """Against each script, from what comes after. values [M, S] -> [M, S, n]"""
        by_script = []
        for after, partner in zip(values, self.partner, strict=True):
            outcome = self.rewards + after[self.follows] * self.goes_on  # [S, n, B]
            by_script.append((outcome * partner[:, None]).sum(-1))
        return torch.stack(by_script)

    def visits(self, policy: Tensor) -> Tensor:
        """How often each state is met at each step, against each script. policy [T, S] -> [T, M, S]"""
        start = self.starts.float()
        mass = (start / start.sum()).expand(len(self.names), -1)
        visits = []
        for actions in policy:
            visits.append(mass)
            pick = actions[:, None, None].expand(-1, 1, self.follows.shape[2])
            follows = self.follows.gather(1, pick)[:, 0]  # [S, B]
            goes_on = self.goes_on.gather(1, pick)[:, 0]
            moved = mass[..., None] * self.partner * goes_on  # [M, S, B]
            mass = torch.zeros_like(mass).index_add(1, follows.flatten(), moved.flatten(1))
        return torch.stack(visits)

    def improve(
        self,
        visits: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """From the last step back, the action that is best where `visits` [T, M, S] come, scripts weighted by [M].

        Returns policy [T, S] and what it returns against each script [M]. It is never worse than the policy of the
        visits: each change is made with the steps before it as they were and those after it improved.
        """
        values = torch.zeros(len(self.names), len(self.starts))
        policy = []
        for met in reversed(visits.unbind(0)):
            action_values = self.action_values(values)  # [M, S, n]
            # A little of everything decides where nobody comes.
            share = weights[:, None] * (met + 1e-9)  # [M, S]
            mean = (action_values * share[..., None]).sum(0)  # [S, n]
            by_look = torch.zeros_like(mean).index_add(0, self.looks, mean)
            actions = by_look.argmax(-1)[self.looks]
            pick = actions[None, :, None].expand(len(self.names), -1, 1)
            values = action_values.gather(2, pick)[..., 0]
            policy.append(actions)
        returns = values[:, self.starts].mean(1)
        return torch.stack(policy[::-1]), returns

    def solve(
        self,
        weights: Tensor,
        visits: Tensor,
        rounds: int = 12,
    ) -> tuple[Tensor, Tensor]:
        """Improves until nothing changes: a policy [T, S], and what it returns [M]. visits [T, M, S]: of the first."""
        returns = torch.full((len(self.names),), -math.inf)
        policy = torch.zeros(0)
        for _ in range(rounds):
            new_policy, better = self.improve(visits, weights)
            if weights @ better <= weights @ returns + 1e-5:
                break
            policy, returns = new_policy, better
            visits = self.visits(policy)
        return policy, returns

    def best_switch(self, policies: list[Tensor]) -> Tensor:
        """The best policy that follows one of these [T, S] at first and another from some step on."""
        best, most = policies[0], -math.inf
        for first, then in itertools.permutations(policies, 2):
            for t in range(1, self.max_cycles):
                policy = torch.cat([first[:t], then[t:]])
                _, returns = self.improve(self.visits(policy), self.shares)
                mean = (self.shares @ returns).item()
                if mean > most:
                    best, most = policy, mean
        return best

    def solve_without_clock(
        self,
        rounds: int = 60,
        step_size: float = 2.0,
    ) -> Tensor:
        """The best policy found that sees no clock either, by natural policy gradient from uniform on: returns [M].

        It may mix its actions: probabilities [looks, n], multiplied by exp(step_size x mean advantage) in each round.
        """
        num_looks, n = int(self.looks.max()) + 1, stag_hunt.NUM_ACTIONS
        logits = torch.zeros(num_looks, n)
        best = torch.zeros(len(self.names))
        for _ in range(rounds):
            probs = logits.softmax(1)[self.looks]  # [S, n]
            visits = self._mixed_visits(probs)
            values = torch.zeros(len(self.names), len(self.starts))
            gain = torch.zeros(len(self.starts), n)
            for met in reversed(visits):
                action_values = self.action_values(values)  # [M, S, n]
                values = (action_values * probs).sum(-1)
                advantage = action_values - values[..., None]
                gain += torch.einsum("m,ms,msn->sn", self.shares, met, advantage)
            returns = values[:, self.starts].mean(1)
            if self.shares @ returns > self.shares @ best:
                best = returns
            often = sum(self.shares @ met for met in visits)  # [S]
            often = torch.zeros(num_looks).index_add(0, self.looks, often)
            gain = torch.zeros(num_looks, n).index_add(0, self.looks, gain)
            logits = logits + step_size * gain / often.clamp(min=1e-12)[:, None]
        return best

    def _mixed_visits(self, probs: Tensor) -> list[Tensor]:
        """How often each state is met at each step, T times [M, S], by a policy that mixes actions. probs [S, n]"""
        start = self.starts.float()
        mass = (start / start.sum()).expand(len(self.names), -1)
        follows = self.follows.flatten()  # [S * n * B]
        visits = []
        for _ in range(self.max_cycles):
            visits.append(mass)
            after = []
            for here, partner in zip(mass, self.partner, strict=True):
                joint = probs[:, :, None] * partner[:, None]  # [S, n, B]
                moved = here[:, None, None] * joint * self.goes_on
                after.append(torch.zeros_like(here).index_add(0, follows, moved.flatten()))
            mass = torch.stack(after)
        return visits

    def with_memory(self) -> Tensor | None:
        """What the best policy returns that sees what partners do and forgets nothing (Bayes-optimal): [M].

        None but for two scripts that act alike until one does what the other never does: then it knows all or nothing.
        """
        if len(self.names) != 2:
            return None
        one, other = self.partner
        alike = torch.isclose(one, other)  # [S, B]
        if not (alike | (one * other == 0)).all():
            return None
        known = torch.zeros(2, len(self.starts))
        unknown = torch.zeros(2, len(self.starts))
        for _ in range(self.max_cycles):
            by_script = []
            for after_known, after_unknown, partner in zip(known, unknown, self.partner, strict=True):
                still_unknown = alike[:, None].expand_as(self.rewards)  # [S, n, B]
                after = torch.where(still_unknown, after_unknown[self.follows], after_known[self.follows])
                outcome = self.rewards + after * self.goes_on
                by_script.append((outcome * partner[:, None]).sum(-1))
            action_values = torch.stack(by_script)  # [M, S, n]
            actions = torch.einsum("m,msn->sn", self.shares, action_values).argmax(1)
            pick = actions[None, :, None].expand(2, -1, 1)
            unknown = action_values.gather(2, pick)[..., 0]
            known = self.action_values(known).amax(2)
        return unknown[:, self.starts].mean(1)

    def gap(self) -> tuple[Tensor, Tensor]:
        """What the best policy for each script returns, and the best found for all of them: [M] each."""
        M = len(self.names)
        S = len(self.starts)
        everywhere = torch.full((self.max_cycles, M, S), 1 / S)
        of_each = [self.solve(weights, everywhere) for weights in torch.eye(M)]
        known = torch.stack([returns for _, returns in of_each]).diagonal()
        unaware = torch.zeros(M)
        policies = [policy for policy, _ in of_each]
        begun = [*policies, self.best_switch(policies)]
        for visits in [everywhere, *map(self.visits, begun)]:
            _, returns = self.solve(self.shares, visits)
            if self.shares @ returns > self.shares @ unaware:
                unaware = returns
        # Whoever is best for all is also one way to answer each.
        return torch.maximum(known, unaware), unaware


def solve_layouts(
    setting: Setting,
    num_layouts: int,
    seed: int,
) -> SolvedHunt:
    """So many layouts, drawn as the env draws them. UsageError: there are blocks."""
    options = {**stag_hunt.preset_options(setting.env_id), **setting.env_kwargs}
    if options.get("num_blocks"):
        raise UsageError(f"expected a hunt without blocks to solve, got {setting.name}: leave out num_blocks")
    generator = torch.Generator().manual_seed(seed)
    num_prey = options["num_stags"] + options["num_hares"]
    num_cells = options["height"] * options["width"]
    layouts = [torch.randperm(num_cells, generator=generator)[:num_prey] for _ in range(num_layouts)]
    return SolvedHunt(setting, torch.stack(layouts))


# --------------------------------------------------------------------------------------------- search


def searched_settings() -> list[Setting]:
    """Small hunts, from ample to scarce: time, hares, partners who are of use."""
    sides, players, hares = (4, 6), (2, 3), (1, 2)
    max_cycles, pools = (5, 8, 12), (HUNTERS, ANYONE)
    grid = itertools.product(sides, players, hares, max_cycles, pools)
    settings = []
    for side, num_players, num_hares, max_cycles, partners in grid:
        settings.append(small_hunt(side, num_players, num_hares, max_cycles, partners))
    return settings


# --------------------------------------------------------------------------------------------- main


@dataclass
class Args:
    settings: tuple[str, ...] = ()
    """settings to measure or solve, by name; none: all of them"""
    responses: tuple[str, ...] = ()
    """run folders to try beside the scripts and watchers, plan:RUN for plan.py's"""
    scripts: bool = True
    """whether scripts and watchers are tried at all"""
    search: bool = False
    """go through many small stag hunts instead, and print the largest gaps"""
    solve: bool = False
    """solve small hunts instead"""
    layouts: int = 4
    """how many layouts of prey are solved"""
    top: int = 20
    """how many of them to print"""
    episodes: int = 2000
    """episodes of each response against each mix"""
    seed: int = 1
    """of envs, partners and actions"""
    num_threads: int | None = 1
    """CPU threads of torch; None: torch's default"""
    out: str = field(default=str(RESULTS / "adaptation_gap.csv"))
    """where rows are appended (not those of a search)"""
    solved_out: str = str(RESULTS / "adaptation_solved.csv")
    """where rows of solved hunts are appended"""


def search(args: Args, measured: Callable[[Setting], Gap]) -> None:
    found = [measured(setting) for setting in searched_settings()]
    found.sort(key=lambda gap: gap.share, reverse=True)
    print("| setting | partners | oracle | unaware, by | gap |\n|---|---|---:|---|---:|")
    for gap in found[: args.top]:
        unaware = gap.responses[int(gap.mixed.argmax())]
        partners = ", ".join(mix[0] for mix in gap.setting.mixes)
        numbers = f"{gap.oracle:.2f} | {gap.unaware:.2f}, `{unaware}` | {gap.share:.0%}"
        print(f"| {gap.setting.name} | {partners} | {numbers} |")


def solve(args: Args) -> None:
    print("| setting | oracle | with a memory | unaware | and without a clock | gap | and without a clock |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for setting in SOLVED:
        if args.settings and setting.name not in args.settings:
            continue
        solved = solve_layouts(setting, args.layouts, args.seed)
        oracle, unaware = solved.gap()
        without_clock = solved.solve_without_clock()
        means = [(setting.shares @ returns).item() for returns in (oracle, unaware, without_clock)]
        shares = [f"{1 - mean / means[0]:.0%}" for mean in means[1:]]
        texts = [f"{mean:.3f}" for mean in means]
        remembers = solved.with_memory()
        texts.insert(1, "" if remembers is None else f"{setting.shares @ remembers:.3f}")
        print(f"| {setting.name} | {' | '.join(texts + shares)} |", flush=True)
        keep_solved([setting.name, args.layouts, args.seed, *texts], Path(args.solved_out))


def keep_solved(row: list[Any], path: Path) -> None:
    is_new = not path.exists()
    machine = platform.processor() or platform.machine()
    row += [machine, time.strftime("%Y-%m-%d")]
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(SOLVED_COLUMNS)
        writer.writerow(row)


def main(args: Args) -> None:
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)

    def measured(setting: Setting) -> Gap:
        scripts = default_responses(setting.env_id) if args.scripts else []
        responses = [*scripts, *args.responses]
        return measure(setting, responses, args.episodes, args.seed)

    known = [setting.name for setting in SOLVED] if args.solve else list(SETTINGS)
    unknown = [name for name in args.settings if name not in known]
    if unknown:
        raise UsageError(f"--settings: expected {', '.join(known)}, got {', '.join(unknown)}: name one of these")
    if args.search:
        search(args, measured)
        return
    if args.solve:
        solve(args)
        return
    for name in args.settings or SETTINGS:
        gap = measured(SETTINGS[name])
        print(as_table(gap), flush=True)
        append_rows(gap, args.episodes, args.seed, Path(args.out))


if __name__ == "__main__":
    main(tyro.cli(Args))
