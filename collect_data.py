"""Rolls out scripted policies and trained checkpoints, and records what everybody saw and did as a dataset.

    python collect_data.py --env-id stag_hunt-8x8-4h1s --num-steps 107010 --policies nearest_stag nearest_hare
    python collect_data.py --env-id pursuit --num-steps 50000 --num-envs 32 --policies random runs/RUN
    python collect_data.py --env-id stag_hunt --policies runs/RUN --values-of runs/RUN   # and what its critic expects

The format is in dataset.py and docs/data_format.md; how-to and limits are in docs/collect_data.md.
"""

from __future__ import annotations

import startup  # noqa: F401

# isort: split

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset import Dataset, DatasetWriter, describe, load_dataset, make_meta
from envs import EnvStep, VecEnv, check_env, make_vec_env
from envs.players import Partners, parse_partners
from hyper_mappo import CHECKPOINT_FORMAT, load_critic, make_policy
from runs import (
    StopSignal,
    Terminated,
    UsageError,
    check_limits,
    command,
    command_line,
    get_device,
    given_flags,
    load_checkpoint,
    parse_env_kwargs,
    run_keeping,
    safe_name,
    save_figure,
)

SEGMENT_STEPS = 20_000  # at least; a killed collection plays again what it has played of its segment

Critic = Callable[[Tensor, Tensor], Tensor]  # state [N, *S], obs [N, A, *O] -> values [N, A]


@dataclass
class Args:
    env_id: str = "stag_hunt-8x8-4h1s"
    """alias (pursuit, stag_hunt, ...), PettingZoo id (sisl/pursuit_v5) or module (mpe2.simple_spread_v3)"""
    env_kwargs: str = "{}"
    """arguments of the env as JSON, e.g. '{"n_evaders": 10}'"""
    backend: Literal["auto", "pettingzoo", "batched"] = "auto"
    """what steps the envs: auto takes the batched twin where there is one"""
    policies: tuple[str, ...] = ("random",)
    """who plays: random (any env), a scripted player of the env, the run folder of a hyper_mappo.py checkpoint, or
    plan:RUN for what plan.py decides, set up as in its run folder"""
    values_of: str | None = None
    """run folder of hyper_mappo.py whose critic says what it expects from each step on; None: no values"""
    partners: tuple[str, ...] = ()
    """who has the last seats, beside --policies in the others: NAME:SEATS, or pool=NAME,NAME:SEATS, drawn anew for each
    episode; policy_ids say who it was"""
    num_steps: int = 100_000
    """env steps to record at least; episodes in flight by then are played to the end and recorded too"""
    num_envs: int = 64
    """environments stepped side by side"""
    env_timeout: float = 60.0
    """seconds that a worker process of genuine envs has for a step or reset; 0: as long as it takes"""
    episode_limit: int = 20_000
    """env steps after which an episode of a genuine env is cut, as by a time limit; 0: never"""
    seed: int = 1
    """seed of envs, seating and action sampling"""
    cuda: bool = True
    """roll out on the GPU if there is one"""
    data_dir: str = "data"
    """folder that receives the dataset's folder"""
    name: str | None = None
    """name of the dataset's folder; None: <env>__<policies>__<seed>"""
    resume: bool = False
    """continue a collection that was stopped or killed, with the same arguments"""


# What numbers must be.
LIMITS = {
    "at least 1": (lambda x: x >= 1, "num_steps num_envs"),
    "at least 0": (lambda x: x >= 0, "env_timeout episode_limit"),
    "from 0 to 2147483647": (lambda x: 0 <= x < 2**31, "seed"),
}


# ------------------------------------------------------------------------------------------- policies


def make_mixes(num_policies: int, num_agents: int) -> np.ndarray:
    """All ways to fill the seats, whatever the order: from A x the first policy to A x the last. [M, A]"""
    policies = range(num_policies)
    mixes = itertools.combinations_with_replacement(policies, num_agents)
    return np.array(list(mixes))


def make_player(name: str, env: VecEnv, env_kwargs: dict[str, Any]) -> Any:
    """As make_policy, and plan:RUN for the planner of a run folder of plan.py."""
    kind, is_planner, run_dir = name.partition(":")
    if not is_planner or kind != "plan":
        return make_policy(name, env)
    from plan import load_player

    return load_player(run_dir, env, env_kwargs)


class Seating:
    """Who sits where: one mix of policies after the other, each shuffled over the seats that partners do not have."""

    def __init__(
        self,
        players: list[Any],
        env: VecEnv,
        first_mix: int,
        rng: np.random.Generator,
        partners: Partners | None = None,
        partner_ids: list[int] | None = None,
    ):
        """partner_ids: which of the recorded policies each member of the partners is"""
        self.players, self.partners = players, partners
        self.memories = [player.initial_state(env.num_envs) for player in players]
        self.free_seats = env.num_agents
        if partners is not None:
            self.free_seats = partners.first_seat
            self.partner_ids = torch.tensor(partner_ids, device=env.device)
        self.mixes = make_mixes(len(players), self.free_seats)
        self.next_mix = first_mix
        self.rng = rng
        self.policy_ids = np.zeros((env.num_envs, env.num_agents), np.int64)

    def draw(self, starting: np.ndarray) -> None:
        """New seats where an episode starts. [N] bool"""
        for i in np.flatnonzero(starting):
            mix = self.mixes[self.next_mix % len(self.mixes)]
            self.policy_ids[i, : self.free_seats] = self.rng.permutation(mix)
            self.next_mix += 1

    def act(self, step: EnvStep) -> Tensor:
        """Everyone's action in its seats: [N, A] or [N, A, D]"""
        seats = torch.from_numpy(self.policy_ids).to(step.obs.device)  # [N, A]
        actions = None
        for k, player in enumerate(self.players):
            chosen, self.memories[k] = player.act(step, self.memories[k])  # [N, A] or [N, A, D]
            if actions is None:
                actions = chosen
                continue
            mine = seats == k
            if chosen.ndim == 3:
                mine = mine[..., None]
            actions = torch.where(mine, chosen, actions)
        if self.partners is not None:
            actions = self.partners.play(step, actions)
            seated = self.partner_ids[self.partners.seated]  # [N, P]
            self.policy_ids[:, self.free_seats :] = seated.cpu().numpy()
        for k, player in enumerate(self.players):
            self.memories[k] = player.remember(step, actions, self.memories[k])
        return actions


def everyone(policies: tuple[str, ...], partners: tuple[str, ...]) -> list[str]:
    """All who may play, in the order of policy_ids: the policies, then partners who are none of them."""
    members = [name for entry in parse_partners(partners) for name in entry.members]
    return list(dict.fromkeys([*policies, *members]))


def load_values(run_dir: str, env: VecEnv) -> Critic:
    """The critic of a run folder. UsageError: it is of other shapes or another number of agents."""
    trained = load_checkpoint(run_dir, CHECKPOINT_FORMAT, needs=["spec"])["spec"]
    its_shapes = list(trained["state_shape"]), list(trained["obs_shape"])
    our_shapes = list(env.state_shape), list(env.obs_shape)
    its_agents, our_agents = trained["num_agents"], env.num_agents
    if its_shapes != our_shapes or its_agents != our_agents:
        raise UsageError(
            f"--values-of {run_dir} has a critic of states {its_shapes[0]}, observations {its_shapes[1]} and "
            f"{its_agents} agents, but {env.env_id} has {our_shapes[0]}, {our_shapes[1]} and {our_agents}; use a run "
            "on this env"
        )
    return load_critic(run_dir, env.device)


# ----------------------------------------------------------------------------------------- collecting


def collect(
    env: VecEnv,
    policies: tuple[str, ...],
    writer: DatasetWriter,
    num_steps: int,
    seed: int,
    critic: Critic | None = None,
    stop: StopSignal | None = None,
    partners: tuple[str, ...] = (),
) -> bool:
    """Records whole episodes until `writer` holds at least num_steps. -> False: it was stopped before that

    In segments: each begins with new episodes in all envs, from a seed of its own, and ends when all that it has begun
    are over. A killed collection plays its segment again; `writer` skips the episodes that it already has. (To begin
    new ones in their place would lose those that were in flight, which are mostly the long ones.)
    """
    names = everyone(policies, partners)
    players = {name: make_player(name, env, writer.meta["env_kwargs"]) for name in names}

    def take_seats(first_mix: int, seed: int) -> Seating:
        rng = np.random.default_rng(seed)
        mixed = [players[name] for name in policies]
        if not partners:
            return Seating(mixed, env, first_mix, rng)
        beside = Partners(partners, env, lambda name, env: players[name], seed)
        partner_ids = [names.index(name) for name in beside.names]
        return Seating(mixed, env, first_mix, rng, beside, partner_ids)

    progress = tqdm(
        total=num_steps,
        initial=min(writer.num_steps, num_steps),
        unit="step",
        disable=not sys.stderr.isatty(),
    )
    while writer.segment["first_step"] < num_steps:
        is_over = collect_segment(env, take_seats, writer, num_steps, seed, critic, stop, progress)
        if not is_over:
            writer.flush()
            break
        writer.next_segment()
    progress.close()
    return writer.segment["first_step"] >= num_steps


def collect_segment(
    env: VecEnv,
    take_seats: Callable[[int, int], Seating],
    writer: DatasetWriter,
    num_steps: int,
    seed: int,
    critic: Critic | None,
    stop: StopSignal | None,
    progress: tqdm,
) -> bool:
    """One segment of `collect`. -> False: it was stopped

    Every env step counts from the moment it is played; once enough are under way no new episode is recorded, but all
    begun ones are played to the end. Dropping those instead would leave out long episodes more often than short ones.
    """
    played = first_step = writer.segment["first_step"]
    entropy = np.random.SeedSequence([seed, first_step])
    seed = int(entropy.generate_state(1)[0] >> 1)
    torch.manual_seed(seed)
    seating = take_seats(writer.segment["first_episode"], seed)
    starting = recording = np.ones(env.num_envs, bool)
    ages = np.zeros(env.num_envs, np.int64)  # of the episodes in flight
    longest, enough = 0, False
    step = env.reset(seed)
    while recording.any():
        if stop is not None and stop.requested:
            return False
        seating.draw(starting)
        actions = seating.act(step)
        after = env.step(actions)
        rows = make_rows(step, actions, after, critic)
        rows["policy_ids"] = seating.policy_ids.copy()
        ages = np.where(starting, 1, ages + 1)
        longest = max(longest, int(ages.max()))
        starting = after.episode_over.cpu().numpy()
        writer.add(rows, starting & recording)
        played += env.num_envs
        # Waiting for the last episodes costs less than a tenth of a segment.
        length = max(SEGMENT_STEPS, 10 * env.num_envs * longest)
        enough = enough or played >= min(num_steps, first_step + length)
        if enough:
            recording = recording & ~starting
        progress.update(min(played, num_steps) - progress.n)
        step = after
    return True


def make_rows(
    step: EnvStep,
    actions: Tensor,
    after: EnvStep,
    critic: Critic | None,
) -> dict[str, np.ndarray]:
    """What happened in all envs between `step` and `after`: every field of a row that the env knows, [N, ...]"""
    executed = actions
    if after.executed_actions is not None:
        executed = after.executed_actions
    tensors = {
        "observations": step.obs,
        "next_observations": after.final_obs,
        "states": step.state,
        "actions": executed,
        "rewards": after.rewards,
        "terminations": after.terminations,
        "truncations": after.truncations,
        "active": step.active,
    }
    if step.action_mask is not None:
        tensors["action_masks"] = step.action_mask
    if critic is not None:
        tensors["values"] = critic(step.state, step.obs)
    rows = {}
    for name, tensor in tensors.items():
        rows[name] = tensor.cpu().numpy().copy()  # a copy: an env may reuse its own
    return rows


# -------------------------------------------------------------------------------------------- picture


def plot_summary(dataset: Dataset, path: Path) -> None:
    """Returns per policy, action shares per policy, episode lengths and who is left at each time step, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7))
    (returns, actions), (lengths, activity) = axes
    names = [Path(name).name for name in dataset.meta["policies"]]
    plot_returns(returns, dataset, names)
    plot = plot_actions if dataset.meta["num_actions"] is not None else plot_action_numbers
    plot(actions, dataset, names)
    plot_activity(activity, dataset, names)
    num_bins = min(50, int(dataset.episode_lengths.max()))
    lengths.hist(dataset.episode_lengths, bins=num_bins)
    lengths.set(
        title="episode length",
        xlabel="env steps",
        ylabel="episodes",
    )
    figure.suptitle(f"{dataset.path.name}: {dataset.num_steps} steps of {dataset.meta['env_id']}")
    figure.tight_layout()
    save_figure(figure, path, dpi=100)


def plot_bars(axis: Any, heights: list[np.ndarray], labels: list[str]) -> None:
    """Groups of bars side by side: heights[i] are those of labels[i], one in each group."""
    width = 0.8 / len(heights)
    for i, label in enumerate(labels):
        groups = np.arange(len(heights[i]))
        offset = (i - (len(heights) - 1) / 2) * width
        axis.bar(groups + offset, heights[i], 0.9 * width, label=label)


def plot_returns(axis: Any, dataset: Dataset, names: list[str]) -> None:
    returns, seats = dataset.episode_returns(), dataset.seats()  # [E, A]
    labels = [f"seat {agent}" for agent in range(dataset.num_agents)]
    means = np.zeros((dataset.num_agents, len(names)))
    for agent in range(dataset.num_agents):
        for k in range(len(names)):
            mine = seats[:, agent] == k
            if mine.any():
                means[agent, k] = returns[mine, agent].mean()
    plot_bars(axis, list(means), labels)
    axis.set(title="mean return", xticks=range(len(names)))
    axis.set_xticklabels(names)
    axis.legend(fontsize=7, ncols=2)


def plot_actions(axis: Any, dataset: Dataset, names: list[str]) -> None:
    num_actions = dataset.meta["num_actions"]
    axis.set(title="share of actions (active agents)", xlabel="action")
    shares = []
    for k in range(len(names)):
        mine = dataset.active & (dataset.policy_ids == k)  # [S, A]
        counts = np.bincount(dataset.actions[mine], minlength=num_actions)
        shares.append(counts / max(1, mine.sum()))
    plot_bars(axis, shares, names)


def plot_action_numbers(axis: Any, dataset: Dataset, names: list[str]) -> None:
    """Of actions [S, A, n] that are no choice among a few: a curve for each of the n numbers."""
    axis.set(title="density of each number of the actions", xlabel="value")
    for k, name in enumerate(names):
        actions = dataset.actions[dataset.active & (dataset.policy_ids == k)]  # [V, n]
        for i, numbers in enumerate(actions.T):
            axis.hist(numbers, bins=40, density=True, histtype="step", label=f"{name}, {i}")
    axis.legend(fontsize=7)


def plot_activity(axis: Any, dataset: Dataset, names: list[str]) -> None:
    timesteps = np.repeat(dataset.timesteps, dataset.num_agents)  # [S * A]
    for k, name in enumerate(names):
        mine = dataset.active & (dataset.policy_ids == k)  # [S, A]
        num_active = np.bincount(timesteps[mine.ravel()])
        axis.plot(num_active, label=name)
    axis.set(
        title="active agents at each time step",
        xlabel="time step",
        yscale="log",
    )
    axis.legend(fontsize=7)


# ----------------------------------------------------------------------------------------------- main


def dataset_path(args: Args) -> Path:
    """data/<env>__<policies>__<seed>, or the name that was asked for"""
    policies = "-".join(Path(name).name for name in everyone(args.policies, args.partners))
    name = args.name or f"{args.env_id}__{policies}__{args.seed}"
    return Path(args.data_dir) / safe_name(name)


def check_players(args: Args, env: VecEnv, env_kwargs: dict[str, Any]) -> None:
    """Refuses who cannot play, before anything is written: UsageError."""
    for policy in args.policies:
        make_player(policy, env, env_kwargs)
    if args.partners:
        Partners(args.partners, env, lambda name, env: make_player(name, env, env_kwargs))


def describe_data(
    args: Args,
    env: VecEnv,
    env_kwargs: dict[str, Any],
    values_of: str | None,
) -> dict[str, Any]:
    """The dataset's meta."""
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    in_parts = isinstance(env.action_space, gym.spaces.MultiDiscrete)
    meta = make_meta(
        env_id=env.env_id,
        env_kwargs=env_kwargs,
        num_agents=env.num_agents,
        obs_shape=env.obs_shape,
        obs_dtype=str(env.obs_dtype).removeprefix("torch."),
        state_shape=env.state_shape,
        state_dtype=str(env.state_dtype).removeprefix("torch."),
        num_actions=int(env.action_space.n) if discrete else None,
        action_shape=env.action_space.shape,
        has_masks=env.reset(args.seed).action_mask is not None,
        policies=everyone(args.policies, args.partners),
        nvec=env.action_space.nvec.tolist() if in_parts else None,
        seed=args.seed,
        values_of=values_of,
    )
    if args.partners:
        meta["partners"] = list(args.partners)
    return meta


@run_keeping
def main(args: Args) -> Path:
    """Collects; returns the dataset's folder. Raises UsageError, one line, for what the user can put right."""
    # ---- arguments
    check_limits(args, LIMITS)
    if not args.policies or len(set(args.policies)) < len(args.policies):
        raise UsageError(f"--policies: expected different names, at least one, got {' '.join(args.policies) or 'none'}")
    checked_env = check_env(args.env_id, args.backend, parse_env_kwargs(args.env_kwargs))
    env_kwargs = checked_env.env_kwargs  # with those that stood in the id
    path = dataset_path(args)

    # ---- envs
    device = get_device(args.cuda)
    limits = {"env_timeout": args.env_timeout, "episode_limit": args.episode_limit}
    env = make_vec_env(checked_env, args.num_envs, device, args.seed, **limits)

    # ---- networks
    check_players(args, env, env_kwargs)
    critic, values_of = None, None
    if args.values_of is not None:
        critic = load_values(args.values_of, env)
        values_of = Path(args.values_of).name

    # ---- storage
    meta = describe_data(args, env, env_kwargs, values_of)
    again = command(__file__, *given_flags(replace(args, resume=True)))
    writer = DatasetWriter(path, meta, args.num_envs, args.resume, again)
    print(f"collecting {args.num_steps} steps of {env.env_id} ({env.backend} backend, {device}) into {path}")

    # ---- loop
    if not writer.finished:
        stop = StopSignal("step")
        try:
            done = collect(env, args.policies, writer, args.num_steps, args.seed, critic, stop, args.partners)
        except (KeyboardInterrupt, Terminated):
            writer.flush()
            raise
        finally:
            stop.restore()
        if not done:
            writer.release()
            print(f"stopped; {writer.kept.how_to_go_on()}", file=sys.stderr)
            return writer.partial

    # ---- close
    env.close()
    dataset = load_dataset(writer.close())
    print(describe(dataset))
    plot_summary(dataset, path / "summary.png")
    return path


def cli(argv: list[str] | None = None) -> int:
    return command_line(Args, main, LIMITS, argv)


if __name__ == "__main__":
    sys.exit(cli())
