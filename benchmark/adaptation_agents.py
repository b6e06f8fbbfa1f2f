"""Who closes the oracle gap? Trains the agents of the adaptation benchmark, and plays them against each partner.

    python benchmark/adaptation_agents.py --settings 4x4-2p1h-T10-1to3 --seeds 1 2 3 4 5
    python benchmark/adaptation_agents.py --settings 4x4-2p1h-T10-1to3 --table        # of the rows that there are
    python benchmark/adaptation_agents.py --agents full --beside stay:1               # whom it was not trained with

For each setting of benchmark/adaptation.py and each seed: trained agents meet the pool of partners for --env-steps,
planners learn from recorded scripts and meet nobody. What is trained is not trained again, what has a row is not played
again, so the same command goes on where it was stopped.

    RUNS/SETTING/SEED/JOB/                 a run folder or dataset each, log.txt, spent.txt: seconds of CPU
    benchmark/results/adaptation_agents.csv    a row for each agent, seed and partner
    benchmark/results/adaptation_steps.csv     env steps until a policy that trains on has 90 % of the best response
"""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plan
from benchmark.adaptation import (
    RESULTS,
    SETTINGS,
    Response,
    Setting,
    beside_learner_0,
    default_responses,
    measure,
    play,
)
from benchmark.plot import Groups, draw_points, mean_and_interval
from benchmark.run import ONE_THREAD, ROOT, describe_machine, read_rows, wait_for
from envs import VecEnv, make_vec_env
from runs import UsageError, command_line, read_metrics, safe_name

COLUMNS = "setting agent env_steps training_seed mix episodes seed mean_return interval_95 machine date".split()
STEPS_COLUMNS = "setting mix training_seed env_steps target_return reached_return machine date".split()
ENOUGH = 0.9  # of what the best response returns
RECORDED = ("nearest_stag", "nearest_hare", "random")  # who sits in seat 0 while planners' data is recorded
MORE_KNOWN = (*RECORDED, "waits_at_stag")  # who is recorded beside it where a script is held out
PLANNED_STEPS = 40_000  # env steps that are recorded for world model and opponents


@dataclass(frozen=True)
class Job:
    """Something that is trained or recorded once for each setting and seed."""

    name: str
    script: str
    flags: str  # words in braces: see Place.command; {folder of NAME} is what the job NAME made
    needs: tuple[str, ...] = ()


def trained(name: str, flags: str, *needs: str) -> Job:
    """An agent that learns beside the pool. A rollout is as long as an episode at most."""
    common = (
        "{env} --partners {pool} --total-timesteps {steps} --num-envs 512 --num-steps {limit} --num-minibatches 16 "
        f"--learning-rate 0.002 --ent-coef 0.05 --no-bootstrap-time-limit --eval-episodes 0 {ONE_THREAD}"
    )
    return Job(name, "hyper_mappo.py", f"{common} {flags} --seed {{seed}}", needs)


def recorded(name: str, which: str) -> Job:
    """Scripts at play, of those that are met or those that are known where one is held out."""
    flags = f"{{env}} --num-steps {PLANNED_STEPS} --policies {{{which} in seat 0}} --partners {{{which} beside it}}"
    return Job(name, "collect_data.py", f"{flags} --seed {{seed}}")


def world_model(name: str, data: str) -> Job:
    flags = f"--data {{folder of {data}}} --hidden-size 16 --total-updates 1500 --seed {{seed}}"
    return Job(name, "world_model.py", flags, (data,))


def opponents(name: str, data: str) -> Job:
    flags = f"--data {{folder of {data}}} --model cvae --epochs 6 --seed {{seed}}"
    return Job(name, "pretrain_vae.py", flags, (data,))


# A context that remembers a whole episode; the joint one knows the partner's z, too.
MEMORY = "--chunk-length {limit} --context-size 64 --hyper-learning-rate 0.002"
LOCAL = f"--hyper-context local {MEMORY}"
JOINT = f"--hyper-context joint {MEMORY}"
JOINT_Z = f"{JOINT} --subgoals {{folder of opponents}}"
FREE = "--smooth-coef 0 --align-coef 0"  # who changes its mind changes its weights at once
JOBS = {
    job.name: job
    for job in (
        recorded("data", "met"),
        world_model("world model", "data"),
        opponents("opponents", "data"),
        recorded("data, held out", "known"),
        world_model("world model, held out", "data, held out"),
        opponents("opponents, held out", "data, held out"),
        trained("plain PPO", "--hyper none"),
        trained("actor-context", f"--hyper none --actor-context {LOCAL}"),
        trained("actor-context, size of full", f"--hyper none --actor-context --match-params full {LOCAL}"),
        trained("delta", f"--hyper delta {LOCAL} {FREE}"),
        trained("full", f"--hyper full {LOCAL} {FREE}"),
        trained("last-layer", f"--hyper last-layer {LOCAL} {FREE}"),
        trained("full, joint", f"--hyper full {JOINT} {FREE}"),
        trained("actor-context, z", f"--hyper none --actor-context {JOINT_Z}", "opponents"),
        trained("delta, z", f"--hyper delta {JOINT_Z} {FREE}", "opponents"),
        trained("full, z", f"--hyper full {JOINT_Z} {FREE}", "opponents"),
        trained("last-layer, z", f"--hyper last-layer {JOINT_Z} {FREE}", "opponents"),
        Job(
            "self-play",
            "hyper_mappo.py",
            f"{{env}} --total-timesteps 500000 --eval-episodes 0 --hyper none {ONE_THREAD} --seed {{seed}}",
        ),
    )
}


@dataclass(frozen=True)
class Planned:
    """A row of plan.py: arguments beside its defaults. The names of jobs in it stand for what they made."""

    options: dict[str, Any]
    models: dict[str, str] = field(default_factory=lambda: {"world_model": "world model", "opponents": "opponents"})
    cost: int = 1  # it plays so many times fewer episodes


WITHOUT_ONE = {"world_model": "world model, held out", "opponents": "opponents, held out"}
PLANNERS = {
    "rollout": Planned({}),
    "rollout, surprise 0": Planned({"surprise": 0.0}),
    "rollout, true world": Planned({"world": "true"}, {"opponents": "opponents"}),
    "rollout, true opponents": Planned({"opponents": "true"}, {"world_model": "world model"}),
    "rollout, 6 subgoals": Planned({"subgoals": 6}),
    "rollout, held out": Planned({}, WITHOUT_ONE),
    "rollout, held out, surprise 0": Planned({"surprise": 0.0}, WITHOUT_ONE),
    "one-step": Planned(
        {"method": "one-step"},
        {"world_model": "world model", "opponents": "opponents", "policy": "self-play"},
    ),
    "mcts": Planned({"method": "mcts", "samples": 4, "simulations": 24}, cost=3),
}
TRAINED = tuple(name for name, job in JOBS.items() if job.script == "hyper_mappo.py")
SCRIPTED = ("tries",)
AGENTS = (*SCRIPTED, *TRAINED, *PLANNERS)
TRAINS_ON = "self-play, trained on"  # against each partner by itself: a row of STEPS_COLUMNS


@dataclass
class Args:
    settings: tuple[str, ...] = ("4x4-2p1h-T10-1to3",)
    """settings of benchmark/adaptation.py"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds of everything: what is trained, and the episodes that are played"""
    agents: tuple[str, ...] = ()
    """only these agents; none: all"""
    beside: tuple[str, ...] = ()
    """play beside these, an entry of --partners for all other seats each, instead of those of the setting"""
    table: bool = False
    """only print the table of the rows that there are"""
    picture: Path | None = None
    """draw what each of --agents returns with each seed into this file; None: no picture"""
    dry_run: bool = False
    """only print the commands"""
    env_steps: int = 1_500_000
    """env steps that each trained agent has against the pool"""
    more_steps: int = 300_000
    """env steps at most that the self-play policy has against one partner"""
    episodes: int = 1000
    """episodes of trained agents against each partner"""
    plan_episodes: int = 300
    """episodes of planners against each partner; mcts: a third of them"""
    runs_dir: Path = Path("runs/adaptation")
    """folder of what is trained"""
    results: Path = RESULTS
    """folder of the rows"""


# -------------------------------------------------------------------------------------------- training


def as_played(setting: Setting, beside: tuple[str, ...]) -> Setting:
    """The setting with the partners that are met at play: its own, unless others are named, each equally often then."""
    if not beside:
        return setting
    return replace(setting, mixes=tuple((entry,) for entry in beside), weights=None)


@dataclass(frozen=True)
class Place:
    """Where the jobs of one setting and seed live."""

    args: Args
    setting: Setting
    seed: int

    def folder(self, job: str) -> Path:
        """An absolute path, because scripts run in the folder of the repository."""
        of_seed = self.args.runs_dir / self.setting.name / str(self.seed)
        return (of_seed / safe_name(job)).resolve()

    def made(self, job: str) -> Path | None:
        """The run folder or dataset of a finished job, None before that."""
        done = self.folder(job) / "done.txt"
        if not done.is_file():
            return None
        return Path(done.read_text(encoding="utf-8"))

    def command(self, job: Job, **more: str) -> list[str]:
        """What runs a job; more: what else stands in braces."""
        setting = self.setting
        known = [name for name in MORE_KNOWN if name != setting.held_out]
        env_kwargs = shlex.quote(json.dumps(setting.env_kwargs))
        words = {
            "env": f"--env-id {setting.env_id} --env-kwargs {env_kwargs}",
            "met in seat 0": " ".join(RECORDED),
            "met beside it": f"same={','.join(setting.scripts)}:{setting.seats}",
            "known in seat 0": " ".join(name for name in RECORDED if name in known),
            "known beside it": f"same={','.join(known)}:{setting.seats}",
            "limit": str(setting.env_kwargs["max_cycles"]),
            "seed": str(self.seed),
            "steps": str(self.args.env_steps),
            **more,
        }
        if "{pool}" in job.flags:
            words["pool"] = setting.pool[0]
        for name in job.needs:
            words[f"folder of {name}"] = shlex.quote(str(self.made(name) or f"<{name}>"))
        out = shlex.quote(str(self.folder(job.name)))
        where = f"--data-dir {out}" if job.script == "collect_data.py" else f"--runs-dir {out}"
        return [job.script, *shlex.split(f"{job.flags.format_map(words)} {where}")]


def needed(names: list[str]) -> list[Job]:
    """Jobs and what they need, in an order in which they can be done."""
    ordered: dict[str, Job] = {}
    for name in names:
        job = JOBS[name]
        for before in needed(list(job.needs)):
            ordered[before.name] = before
        ordered[name] = job
    return list(ordered.values())


def newest_output(folder: Path) -> Path:
    """The run folder or dataset that a script has made in there."""
    found = [path for path in folder.iterdir() if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime)


def do(job: Job, place: Place, **more: str) -> None:
    """Runs a job to its end. RuntimeError: it failed."""
    folder = place.folder(job.name)
    folder.mkdir(parents=True, exist_ok=True)
    words = place.command(job, **more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)
    code, seconds = wait_for(process)
    if code != 0:
        raise RuntimeError(f"{job.name} failed: see {folder / 'log.txt'}")
    (folder / "spent.txt").write_text(f"{seconds:.1f}\n", encoding="utf-8")
    (folder / "done.txt").write_text(str(newest_output(folder)), encoding="utf-8")
    print(f"done     {place.setting.name}, seed {place.seed}: {job.name}, {seconds:.0f} s of CPU", flush=True)


def train(names: list[str], place: Place) -> None:
    """What agents need, as far as it is not there."""
    for job in needed(names):
        if place.made(job.name) is None:
            do(job, place)


# --------------------------------------------------------------------------------------------- playing


def jobs_of(agent: str) -> list[str]:
    """What must be made before an agent can play."""
    if agent in PLANNERS:
        return list(PLANNERS[agent].models.values())
    return [agent] if agent in JOBS else []


def planner(agent: str, place: Place) -> Callable[[VecEnv, tuple[str, ...]], plan.Planner]:
    """What makes the planner for an env and the partners that it may be told."""
    planned = PLANNERS[agent]
    models = {option: str(place.made(job)) for option, job in planned.models.items()}
    setting = place.setting

    def make(env: VecEnv, mix: tuple[str, ...]) -> plan.Planner:
        args = plan.Args(
            env_id=setting.env_id,
            env_kwargs=json.dumps(setting.env_kwargs),
            partners=mix,
            episode_limit=setting.env_kwargs["max_cycles"],
            **{**models, **planned.options},
        )
        return plan.make_planner(args, env, setting.env_kwargs, (0,))

    return make


def responds(agent: str, place: Place) -> Response:
    """The agent as benchmark/adaptation.py plays it."""
    if agent in PLANNERS:
        return planner(agent, place)
    if agent in JOBS:
        return str(place.made(agent))
    return agent


def num_episodes(agent: str, args: Args) -> int:
    if agent in PLANNERS:
        return args.plan_episodes // PLANNERS[agent].cost
    return args.episodes


def steps_beside_partners(agent: str, args: Args) -> int:
    """Env steps that an agent learned from, beside the pool."""
    return args.env_steps if agent in TRAINED and agent != "self-play" else 0


def append(path: Path, columns: list[str], row: dict[str, Any]) -> None:
    is_new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        if is_new:
            table.writeheader()
        table.writerow(row)


def is_played(
    rows: list[dict[str, str]],
    agent: str,
    place: Place,
    mix: tuple[str, ...],
) -> bool:
    """Whether there is a row of that agent, trained with that seed for so many steps, against that mix."""
    wanted = {
        "setting": place.setting.name,
        "agent": agent,
        "env_steps": str(steps_beside_partners(agent, place.args)),
        "training_seed": str(place.seed),
        "mix": " ".join(mix),
    }
    return any(wanted.items() <= row.items() for row in rows)


def play_agent(agent: str, place: Place) -> None:
    """Adds the rows of an agent that are missing."""
    args, setting = place.args, as_played(place.setting, place.args.beside)
    path = args.results / "adaptation_agents.csv"
    rows = read_rows(args.results, "adaptation_agents")
    mixes = [mix for mix in setting.mixes if not is_played(rows, agent, place, mix)]
    if not mixes:
        return
    train(jobs_of(agent), place)
    for mix in mixes:
        start = time.process_time()
        returns = play(setting, responds(agent, place), mix, num_episodes(agent, args), place.seed)
        interval = plan.interval_95(returns.tolist())
        row = {
            "setting": setting.name,
            "agent": agent,
            "env_steps": steps_beside_partners(agent, args),
            "training_seed": place.seed,
            "mix": " ".join(mix),
            "episodes": len(returns),
            "seed": place.seed,
            "mean_return": f"{returns.mean().item():.4f}",
            "interval_95": "" if interval is None else f"{interval:.4f}",
            "machine": describe_machine(),
            "date": time.strftime("%Y-%m-%d"),
        }
        append(path, COLUMNS, row)
        seconds = time.process_time() - start
        result = f"{row['mean_return']} ± {row['interval_95']}"
        print(f"played   {setting.name}, seed {place.seed}: {agent} with {row['mix']}, {result}, {seconds:.0f} s")


# ------------------------------------------------------------------------------------------ training on


def first_with(run_dir: Path, target: float) -> tuple[int | None, float]:
    """Env steps before the first update whose episodes return the target on average, and the last update's return."""
    before, reached = 0, math.nan
    for row in read_metrics(run_dir):
        if row["charts/return_seat_0"]:
            reached = float(row["charts/return_seat_0"])
            if reached >= target:
                return before, reached
        before = int(row["global_step"])
    return None, reached


def train_on(place: Place) -> None:
    """The self-play policy, trained on against each partner by itself: env steps to ENOUGH of the best response."""
    args, setting = place.args, as_played(place.setting, place.args.beside)
    path = args.results / "adaptation_steps.csv"
    gap = measure(setting, default_responses(setting.env_id), args.episodes, place.seed)
    best = gap.means.amax(0)  # [M]
    for mix, most in zip(setting.mixes, best.tolist(), strict=True):
        wanted = {"setting": setting.name, "mix": " ".join(mix), "training_seed": str(place.seed)}
        if any(wanted.items() <= row.items() for row in read_rows(args.results, "adaptation_steps")):
            continue
        train(["self-play"], place)
        flags = "{env} --partners {mix} --init-from {start} --total-timesteps {more} --eval-episodes 0"
        job = Job(f"{TRAINS_ON} {mix[0]}", "hyper_mappo.py", f"{flags} --num-steps 16 {ONE_THREAD} --seed {{seed}}")
        start = shlex.quote(str(place.made("self-play")))
        if place.made(job.name) is None:
            do(job, place, mix=mix[0], start=start, more=str(args.more_steps))
        steps, reached = first_with(place.made(job.name), ENOUGH * most)
        row = {
            **wanted,
            "env_steps": "" if steps is None else steps,
            "target_return": f"{ENOUGH * most:.4f}",
            "reached_return": f"{reached:.4f}",
            "machine": describe_machine(),
            "date": time.strftime("%Y-%m-%d"),
        }
        append(path, STEPS_COLUMNS, row)


# ----------------------------------------------------------------------------------------------- table


def means_by_seed(rows: list[dict[str, str]], setting: Setting) -> list[list[float]]:
    """What an agent returns against each mix, for the seeds with a row for all of them. [seeds][M]"""
    by_seed: dict[str, dict[str, float]] = {}
    for row in rows:
        by_seed.setdefault(row["training_seed"], {})[row["mix"]] = float(row["mean_return"])
    mixes = [" ".join(mix) for mix in setting.mixes]
    whole = [means for means in by_seed.values() if set(mixes) <= means.keys()]
    return [[means[mix] for mix in mixes] for means in whole]


def by_agent(setting: Setting, rows: list[dict[str, str]]) -> dict[tuple[str, int], Tensor]:
    """(agent, env steps beside the pool) -> what each of its seeds returns against each mix, [seeds, M]."""
    by_kind: dict[tuple[str, int], list[dict[str, str]]] = {}
    for row in rows:
        if row["setting"] == setting.name:
            kind = row["agent"], int(row["env_steps"])
            by_kind.setdefault(kind, []).append(row)
    means = {}
    for kind, mine in by_kind.items():
        seeds = means_by_seed(mine, setting)
        if seeds:
            means[kind] = torch.tensor(seeds, dtype=torch.float64)
    return means


def as_table(setting: Setting, rows: list[dict[str, str]]) -> str:
    """Markdown: a row for each agent and number of env steps, means over seeds ± 95 % over seeds."""
    mixes = " | ".join(" ".join(mix).removesuffix(":1") for mix in setting.mixes)
    lines = [
        f"| {setting.name} | env steps | seeds | {mixes} | mean |",
        "|---|---:|---:|" + "---:|" * (len(setting.mixes) + 1),
    ]
    for (agent, steps), means in by_agent(setting, rows).items():
        cells = [mean_and_interval(column.tolist()) for column in means.T]
        mean = mean_and_interval((means @ setting.shares.double()).tolist())
        line = " | ".join([agent, f"{steps:,}", str(len(means)), *cells, mean])
        lines.append(f"| {line} |")
    return "\n".join(lines)


def save_picture(args: Args, rows: list[dict[str, str]]) -> None:
    """A panel for each setting: for each agent a point per seed, and the IQM. UsageError: nobody has a row."""
    agents = args.agents or AGENTS
    panels: dict[str, Groups] = {}
    for name in args.settings:
        setting = as_played(SETTINGS[name], args.beside)
        means = by_agent(setting, rows)
        panels[name] = {}
        for agent in agents:
            of_agent = means.get((agent, steps_beside_partners(agent, args)))
            if of_agent is not None:
                mixed = of_agent @ setting.shares.double()  # [seeds]
                panels[name][agent] = [{"mean_return": str(x)} for x in mixed.tolist()]
        if not panels[name]:
            raise UsageError(f"--picture: no rows of {', '.join(agents)} in {name}: run them first")
    size = 6 * len(panels), 1.2 + 0.3 * len(agents)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], panels, strict=True):
        draw_points(axis, panels[name], name, "mean return of a seed")
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ main


def check_args(args: Args) -> None:
    unknown = [name for name in args.settings if name not in SETTINGS]
    if unknown:
        raise UsageError(f"--settings: expected {', '.join(SETTINGS)}, got {', '.join(unknown)}: name one of these")
    known = (*AGENTS, TRAINS_ON)
    unknown = [name for name in args.agents if name not in known]
    if unknown:
        raise UsageError(f"--agents: expected {'; '.join(known)}, got {'; '.join(unknown)}: name one of these")
    for name in args.settings:
        setting = SETTINGS[name]
        if needs_pool(args.agents):
            _ = setting.pool  # UsageError where a pool cannot draw its mixes
        if args.beside:
            env = make_vec_env(setting.env_id, 1, "cpu", 0, **setting.env_kwargs)
            for entry in args.beside:
                beside_learner_0((entry,), env, seed=0)
        if "max_cycles" not in setting.env_kwargs:
            raise UsageError(f"--settings: expected one that says its max_cycles, got {name}: take a small hunt")
        if setting.held_out is None and any("held out" in agent for agent in args.agents):
            raise UsageError(f"--agents: nobody is held out in {name}, leave out those that ask for it")


def needs_pool(agents: tuple[str, ...]) -> bool:
    """Whether one of them (none: all) is trained beside the pool."""
    return not agents or any(agent in TRAINED or agent == TRAINS_ON for agent in agents)


def main(args: Args) -> None:
    """Trains, plays and prints. UsageError: unknown names."""
    check_args(args)
    torch.set_num_threads(1)
    wanted = args.agents or (*AGENTS, TRAINS_ON)
    for seed in args.seeds:
        for name in args.settings:
            place = Place(args, SETTINGS[name], seed)
            if args.dry_run:
                for job in needed([job for agent in wanted for job in jobs_of(agent)]):
                    print(shlex.join(["python", *place.command(job)]))
            elif not args.table:
                for agent in wanted:
                    if agent == TRAINS_ON:
                        train_on(place)
                    else:
                        play_agent(agent, place)
    if not args.dry_run:
        rows = read_rows(args.results, "adaptation_agents")
        for name in args.settings:
            print(as_table(as_played(SETTINGS[name], args.beside), rows), flush=True)
        if args.picture is not None:
            save_picture(args, rows)


LIMITS = {"at least 1": (lambda x: x >= 1, "env_steps more_steps episodes plan_episodes")}


def cli(argv: list[str] | None = None) -> int:
    """The command line: 0 all done, 2 unusable arguments."""
    return command_line(Args, main, LIMITS, argv)


if __name__ == "__main__":
    sys.exit(cli())
