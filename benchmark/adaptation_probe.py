"""Does the context of a trained agent know what the agent has seen? A linear probe, on a setting with a gap.

    python benchmark/adaptation_probe.py --setting 4x4-2p1h-T10-1to3 --runs runs/DELTA runs/ACTOR_CONTEXT

Asked at the steps at which seat 0 stands on the stag beside its partner: has it hunted there before, without success?
If so the partner will never hunt. The observation looks the same either way, so only a memory tells. Of each policy:

    context        balanced accuracy of a linear probe on the context that the actor gets, in episodes it has not seen
    observation    the same probe on the observation: what can be known without a memory
    leaves         how often the policy's action goes away from the stag, where it has failed before and where not
    value          what the critic expects there, where it has failed before

    python benchmark/adaptation_probe.py --setting 4x4-2p1h-T10-1to3 --told-steps 300000

trains plain PPO that is told who its partner is, from the first step of an episode on: what is lost without a belief.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hyper_mappo
from benchmark.adaptation import SETTINGS, Setting, Trier
from envs import EnvStep, VecEnv, make_vec_env, stag_hunt
from envs.players import Partners
from hyper_mappo import Policy, load_critic, make_policy
from runs import UsageError, command_line, read_metrics

Samples = dict[str, Tensor]


@dataclass
class Args:
    runs: tuple[str, ...] = ()
    """run folders of hyper_mappo.py with a context, trained on the setting"""
    setting: str = "4x4-2p1h-T10-1to3"
    """a setting of benchmark/adaptation.py with one partner"""
    told_steps: int = 0
    """env steps of a plain PPO that is told who the partner is; 0: it is not trained"""
    runs_dir: str = "runs"
    """folder that receives its run folder"""
    episodes: int = 4000
    """episodes of each policy against the pool, half of them to fit the probe"""
    seed: int = 1
    """of envs, partners, actions"""


def on_the_stag_together(step: EnvStep) -> Tensor:
    """Where seat 0 is still there and stands on the stag with another player: [N] bool"""
    A = step.active.shape[1]
    players = step.state[..., :A].flatten(1, 2).float()  # [N, HW, A]
    stags = step.state[..., A + 1].flatten(1).float()  # [N, HW]
    there = torch.einsum("nca,nc->na", players, stags) > 0  # [N, A]
    return step.active[:, 0] & there[:, 0] & there[:, 1:].any(1)


@torch.no_grad()
def samples(
    run_dir: str,
    setting: Setting,
    episodes: int,
    seed: int,
) -> Samples:
    """What is known at the steps that are asked about, of the first episode of each env.

    contexts [B, C], obs [B, F], failed [B] bool, leaves [B] bool, values [B], env [B]. UsageError: a policy without a
    context.
    """
    torch.manual_seed(seed)
    env = make_vec_env(setting.env_id, episodes, "cpu", seed, **setting.env_kwargs)
    policy = make_policy(run_dir, env)
    if not isinstance(policy, Policy) or policy.actor.context is None:
        raise UsageError(f"--runs: expected a policy with a context, got {run_dir}: train with --hyper delta, say")
    C = policy.actor.context.size
    critic = load_critic(run_dir)
    partners = Partners(setting.pool, env, make_policy, seed)
    trier = Trier(env)
    memory, failed = policy.initial_state(episodes), trier.initial_state(episodes)
    step = env.reset(seed)
    goes_on = torch.ones(episodes, dtype=torch.bool)
    kept: dict[str, list[Tensor]] = {}
    while goes_on.any():
        actions, memory = policy.act(step, memory)
        asked = (goes_on & on_the_stag_together(step)).nonzero()[:, 0]
        found = {
            "contexts": memory[asked, 0, :C],
            "obs": step.obs[asked, 0].flatten(1).float(),
            "failed": failed[asked],
            "leaves": actions[asked, 0] < stag_hunt.STAY,  # one of the four moves
            "values": critic(step.state, step.obs)[asked, 0],
            "env": asked,
        }
        for name, x in found.items():
            kept.setdefault(name, []).append(x)
        actions = partners.play(step, actions)
        memory = policy.remember(step, actions, memory)
        failed = trier.remember(step, actions, failed)
        step = env.step(actions)
        goes_on = goes_on & ~step.episode_over
    env.close()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def balanced_accuracy(
    x: Tensor,
    is_true: Tensor,
    fits: Tensor,
) -> float:
    """Of a logistic regression, fitted where `fits` [B] and judged elsewhere: x [B, D], is_true [B] bool."""
    x = x - x[fits].mean(0)
    x = x / x[fits].std(0).clamp(min=1e-6)
    weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
    y = is_true.float()
    share = y[fits].mean().clamp(1e-3, 1 - 1e-3)
    balance = torch.where(is_true, 0.5 / share, 0.5 / (1 - share))
    optimizer = torch.optim.LBFGS([weights], max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = x[fits] @ weights[:-1] + weights[-1]
        wrong = F.binary_cross_entropy_with_logits(logits, y[fits], balance[fits])
        total = wrong + 1e-4 * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        says = x[~fits] @ weights[:-1] + weights[-1] > 0
    truth = is_true[~fits]
    right = [(says[truth == answer] == answer).float().mean() for answer in (False, True)]
    return (sum(right) / 2).item()


def report(run_dir: str, args: Args) -> str:
    """A line of the table."""
    found = samples(run_dir, SETTINGS[args.setting], args.episodes, args.seed)
    failed = found["failed"]
    fits = found["env"] < args.episodes // 2
    cells = [f"{balanced_accuracy(found[name], failed, fits):.1%}" for name in ("contexts", "obs")]
    leaves = found["leaves"].float()
    cells += [f"{leaves[failed].mean():.1%}", f"{leaves[~failed].mean():.1%}"]
    cells.append(f"{found['values'][failed].mean():.2f}")
    return f"| {Path(run_dir).name} | {len(failed):,} | {' | '.join(cells)} |"


# ---------------------------------------------------------------------------------------------- told


class Told(VecEnv):
    """A setting whose other players are part of the env, and whose plane of blocks shows which mix they are.

    The plane is all zero otherwise: here it is 0, 1, ... for the setting's mixes. Actions of seats after 0 do nothing.
    """

    def __init__(
        self,
        setting: Setting,
        num_envs: int,
        device: torch.device,
        seed: int,
    ):
        self.env = make_vec_env(setting.env_id, num_envs, device, seed, **setting.env_kwargs)
        self.players = [make_policy(mix[0].rpartition(":")[0], self.env) for mix in setting.mixes]
        self.shares = setting.shares
        self.generator = torch.Generator().manual_seed(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)  # shapes and the like

    def reset(self, seed: int | None = None) -> EnvStep:
        self.seated = self.draw()
        self.last = self.env.reset(seed)
        return self.show(self.last)

    def step(self, actions: Tensor) -> EnvStep:
        actions = actions.clone()
        for m, player in enumerate(self.players):
            chosen, _ = player.act(self.last, None)
            mine = self.seated == m
            actions[mine, 1:] = chosen[mine, 1:]
        self.last = self.env.step(actions)
        self.seated = torch.where(self.last.episode_over, self.draw(), self.seated)
        return self.show(self.last)

    def draw(self) -> Tensor:
        """Who plays in each env. [N]"""
        return torch.multinomial(self.shares, self.env.num_envs, True, generator=self.generator)

    def show(self, step: EnvStep) -> EnvStep:
        """The step with that plane written; the state is as it was, so that scripts see blocks where there are some."""
        obs = step.obs.clone()
        obs[..., self.env.num_agents] = self.seated[:, None, None, None].to(obs.dtype)
        shown = copy.copy(step)
        shown.obs = obs
        return shown


def train_told(args: Args) -> float:
    """What the told policy returns over the last tenth of its updates, while it still explores."""
    setting = SETTINGS[args.setting]

    def told_env(checked: Any, num_envs: int, device: torch.device, seed: int, *how: Any) -> Told:
        return Told(setting, num_envs, device, seed)

    hyper_mappo.make_vec_env = told_env
    run_dir = hyper_mappo.main(
        hyper_mappo.Args(
            env_id=setting.env_id,
            env_kwargs=json.dumps(setting.env_kwargs),
            partners=(f"stay:{setting.mixes[0][0].rpartition(':')[2]}",),
            hyper="none",
            total_timesteps=args.told_steps,
            bootstrap_time_limit=False,  # final observations are not told
            seed=args.seed,
            num_threads=1,
            update_threads=1,
            eval_episodes=0,
            runs_dir=args.runs_dir,
        )
    )
    returns = [float(row["charts/return_seat_0"]) for row in read_metrics(run_dir)]
    last = returns[-max(1, len(returns) // 10) :]
    return sum(last) / len(last)


def main(args: Args) -> None:
    if args.setting not in SETTINGS:
        raise UsageError(f"--setting: expected {', '.join(SETTINGS)}, got {args.setting}: name one of these")
    torch.set_num_threads(1)
    if args.told_steps:
        print(f"plain PPO that is told its partner returns {train_told(args):.3f}", flush=True)
    if not args.runs:
        return
    print("| run | steps | context | observation | leaves, has failed | leaves, has not | value |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for run_dir in args.runs:
        print(report(run_dir, args), flush=True)


LIMITS = {"at least 2": (lambda x: x >= 2, "episodes")}


def cli(argv: list[str] | None = None) -> int:
    """The command line: 0 done, 2 unusable arguments."""
    return command_line(Args, main, LIMITS, argv)


if __name__ == "__main__":
    sys.exit(cli())
