"""Rolls out scripted policies and trained checkpoints, and records what everybody saw and did as a dataset.

    python collect_data.py --env-id stag_hunt-8x8-4h1s --num-steps 107010 --policies nearest_stag nearest_hare
    python collect_data.py --env-id pursuit --num-steps 50000 --num-envs 32 --policies random runs/RUN

The format is in dataset.py and docs/data_format.md; how-to and limits are in docs/collect_data.md.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from tqdm import tqdm

from dataset import Dataset, DatasetWriter, describe, load_dataset, make_meta
from envs import VecEnv, check_env, make_vec_env
from hyper_mappo import check_limits, make_policy


@dataclass
class Args:
    env_id: str = "stag_hunt-8x8-4h1s"
    """alias (pursuit, stag_hunt, ...), PettingZoo id (sisl/pursuit_v5) or module (mpe2.simple_spread_v3)"""
    env_kwargs: str = "{}"
    """arguments of the env as JSON, e.g. '{"n_evaders": 10}'"""
    backend: Literal["auto", "pettingzoo", "batched"] = "auto"
    """what steps the envs: auto takes the batched twin where there is one"""
    policies: tuple[str, ...] = ("random",)
    """who plays: random (any env), a scripted stag hunt partner, or the run folder of a hyper_mappo.py checkpoint"""
    num_steps: int = 100_000
    """env steps to record at least; episodes in flight by then are played to the end and recorded too"""
    num_envs: int = 64
    """environments stepped side by side"""
    seed: int = 1
    """seed of envs, seating and action sampling"""
    cuda: bool = True
    """roll out on the GPU if there is one"""
    data_dir: str = "data"
    """folder that receives the dataset's folder"""
    name: str | None = None
    """name of the dataset's folder; None: <env>__<policies>__<seed>"""
    resume: bool = False
    """continue a collection that was killed, with the same arguments"""


# What numbers must be.
LIMITS = {
    "at least 1": (lambda x: x >= 1, "num_steps num_envs"),
    "from 0 to 2147483647": (lambda x: 0 <= x < 2**31, "seed"),
}


# ---------------------------------------------------------------- policies


def make_mixes(num_policies: int, num_agents: int) -> np.ndarray:
    """All ways to fill the seats, whatever the order: from A x the first policy to A x the last. [M, A]"""
    return np.array(list(itertools.combinations_with_replacement(range(num_policies), num_agents)))


# ---------------------------------------------------------------- collecting


def collect(env: VecEnv, policies: tuple[str, ...], writer: DatasetWriter, num_steps: int, seed: int) -> None:
    """Records whole episodes until `writer` holds at least num_steps.

    Every env step counts from the moment it is played; once enough are under way no new episode is recorded, but all
    begun ones are played to the end. Dropping those instead would leave out long episodes more often than short ones.
    """
    # A continued collection goes on with other random numbers than the rows that it already has.
    seed = int(np.random.SeedSequence([seed, writer.num_steps]).generate_state(1)[0] >> 1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    players = [make_policy(name, env) for name in policies]
    memories = [player.initial_state(env.num_envs) for player in players]
    mixes = make_mixes(len(policies), env.num_agents)
    next_mix = writer.meta["num_episodes"]
    policy_ids = np.zeros((env.num_envs, env.num_agents), np.int64)
    starting = recording = np.ones(env.num_envs, bool)
    step, played = env.reset(seed), writer.num_steps
    progress = tqdm(total=num_steps, initial=played, unit="step", disable=not sys.stderr.isatty())
    while recording.any():
        for i in np.flatnonzero(starting):
            policy_ids[i] = rng.permutation(mixes[next_mix % len(mixes)])
            next_mix += 1
        seats = torch.from_numpy(policy_ids).to(env.device)  # [N, A]
        actions = None
        for k, player in enumerate(players):
            chosen, memories[k] = player.act(step, memories[k])  # [N, A] or [N, A, D]
            mine = (seats == k).view(*seats.shape, *[1] * (chosen.ndim - 2))
            actions = chosen if actions is None else torch.where(mine, chosen, actions)
        memories = [player.remember(step, actions, memory) for player, memory in zip(players, memories, strict=True)]
        after = env.step(actions)
        executed = actions if after.executed_actions is None else after.executed_actions
        rows = {
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
            rows["action_masks"] = step.action_mask
        rows = {name: tensor.cpu().numpy().copy() for name, tensor in rows.items()}  # copies: an env may reuse its own
        rows["policy_ids"] = policy_ids.copy()
        starting = after.episode_over.cpu().numpy()
        writer.add(rows, starting & recording)
        played += env.num_envs
        if played >= num_steps:
            recording = recording & ~starting
        progress.update(min(played, num_steps) - progress.n)
        step = after
    progress.close()


def plot_summary(dataset: Dataset, path: Path) -> None:
    """Returns per policy, action shares per policy, episode lengths and who is left at each time step, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    meta, names = dataset.meta, [Path(name).name for name in dataset.meta["policies"]]
    returns, active = dataset.episode_returns(), np.asarray(dataset.active)  # [E, A], [S, A]
    seats = dataset.policy_ids[dataset.episode_starts[:-1]]  # [E, A]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7))
    ids, agents = np.arange(len(names)), range(dataset.num_agents)
    for a in agents:
        means = [returns[seats[:, a] == k, a].mean() if (seats[:, a] == k).any() else 0 for k in ids]
        axes[0, 0].bar(
            ids + 0.8 * (a - (len(agents) - 1) / 2) / len(agents), means, 0.7 / len(agents), label=f"seat {a}"
        )
    axes[0, 0].set(title="mean return", xticks=ids)
    axes[0, 0].set_xticklabels(names)
    axes[0, 0].legend(fontsize=7, ncols=2)
    for k, name in enumerate(names):
        mine = active & (dataset.policy_ids == k)  # [S, A]
        at = np.bincount(np.repeat(dataset.timesteps, dataset.num_agents)[mine.ravel()])
        axes[1, 1].plot(at, label=name)
        if meta["num_actions"] is not None:
            shares = np.bincount(dataset.actions[mine], minlength=meta["num_actions"]) / max(1, mine.sum())
            axes[0, 1].bar(
                np.arange(len(shares)) + 0.8 * (k + 0.5) / len(names) - 0.4, shares, 0.7 / len(names), label=name
            )
    axes[0, 1].set(title="share of actions (active agents)", xlabel="action")
    axes[1, 0].hist(dataset.episode_lengths, bins=min(50, int(dataset.episode_lengths.max())))
    axes[1, 0].set(title="episode length", xlabel="env steps", ylabel="episodes")
    axes[1, 1].set(title="active agents at each time step", xlabel="time step", yscale="log")
    axes[1, 1].legend(fontsize=7)
    figure.suptitle(f"{dataset.path.name}: {dataset.num_steps} steps of {meta['env_id']}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(args: Args) -> Path:
    """Collects; returns the dataset's folder. Raises ValueError, one line, for what the user can put right."""
    # ---- arguments
    check_limits(args, LIMITS)
    if not args.policies or len(set(args.policies)) < len(args.policies):
        raise ValueError(f"--policies: expected different names, at least one, got {' '.join(args.policies) or 'none'}")
    try:
        env_kwargs = json.loads(args.env_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"--env-kwargs: expected JSON like '{{\"max_cycles\": 50}}', got {args.env_kwargs}") from error
    backend = check_env(args.env_id, args.backend, env_kwargs)
    short = "-".join(Path(name).name for name in args.policies)
    name = args.name or f"{args.env_id}__{short}__{args.seed}"
    path = Path(args.data_dir) / re.sub(r"[^A-Za-z0-9_.-]+", "-", name)

    # ---- envs, policies, writer
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    env = make_vec_env(args.env_id, args.num_envs, device, args.seed, backend=backend, **env_kwargs)
    for policy in args.policies:
        make_policy(policy, env)
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
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
        policies=list(args.policies),
        seed=args.seed,
    )
    writer = DatasetWriter(path, meta, args.num_envs, args.resume)
    print(f"collecting {args.num_steps} steps of {env.env_id} ({env.backend} backend, {device}) into {path}")

    # ---- loop, close
    collect(env, args.policies, writer, args.num_steps, args.seed)
    env.close()
    dataset = load_dataset(writer.close())
    print(describe(dataset))
    plot_summary(dataset, path / "summary.png")
    return path


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        sys.exit(130)
