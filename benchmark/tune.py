"""Searches hyper_mappo.py's hyperparameters with Optuna, on seeds that no result is reported on (100 and up).

A trial trains every env with the same settings, one run per seed. Its score is the mean over runs of the return per
agent in the last tenth of the run, as a share of --scales. Trials stand in a journal, so that the same command goes on
with a search that was stopped; each is a row of benchmark/results/tune-NAME.csv.

    pip install -r benchmark/requirements-study.txt
    python benchmark/tune.py plain --trials 30 --minutes 120
    python benchmark/tune.py plain --trials 4 --first '{}' '{"update_epochs": 2, "num_minibatches": 16}'
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import tyro
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.run import ONE_THREAD, RESULTS, ROOT, describe_commit, describe_machine, poll, write_rows
from envs import num_cpus
from runs import StopSignal, UsageError, command_line, flag, read_metrics, safe_name

FIRST_SEED = 100  # results are of seeds below
SCORED_SHARE = 0.1  # of the run: its end
# What is searched. rollout: num_envs x num_steps.
SPACE = {
    "gamma": CategoricalDistribution([0.98, 0.99, 0.995]),
    "gae_lambda": CategoricalDistribution([0.9, 0.95, 0.98]),
    "learning_rate": FloatDistribution(2e-4, 2e-3, log=True),
    "ent_coef": FloatDistribution(0.003, 0.05, log=True),
    "rollout": CategoricalDistribution(["64x64", "128x32", "128x64", "128x128", "256x32", "256x64", "512x35"]),
    "num_minibatches": CategoricalDistribution([8, 16, 32, 64]),
    "update_epochs": IntDistribution(1, 5),
    "hidden_size": CategoricalDistribution([64, 128, 256]),
    "norm_obs": CategoricalDistribution([False, True]),
    "team_spirit": CategoricalDistribution([0.0, 0.25, 0.5, 1.0]),
}
START = {
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "learning_rate": 5e-4,
    "ent_coef": 0.02,
    "rollout": "128x64",
    "num_minibatches": 64,
    "update_epochs": 1,
    "hidden_size": 128,
    "norm_obs": False,
    "team_spirit": 0.0,
}


@dataclass
class Args:
    name: tyro.conf.Positional[str]
    """the search's name: of its journal and its rows"""
    env_ids: tuple[str, ...] = ("pursuit", "stag_hunt-8x8-4h1s")
    """envs that every trial trains"""
    scales: tuple[float, ...] = (100.0, 3.0)
    """a good return on each of them, which scores 1"""
    flags: str = "--hyper none"
    """more flags of every run"""
    total_timesteps: int = 800_000
    """env steps of a run"""
    seeds: tuple[int, ...] = (101,)
    """seeds of a trial's runs, 100 and up"""
    trials: int = 20
    """trials to start, those of earlier calls not counted"""
    minutes: float | None = None
    """no trial starts after so many minutes; None: only --trials ends the search"""
    first: tuple[str, ...] = ("{}",)
    """what to try before the sampler chooses, as JSON: what differs from START"""
    jobs: int | None = None
    """trials at once, of one thread each; None: as many as there are cores"""
    code: Path = ROOT
    """the copy of this repository whose hyper_mappo.py is run"""
    results: Path = RESULTS
    """folder of the rows"""
    runs_dir: Path = Path("runs/tune")
    """folder of the journal and the run folders"""


@dataclass
class Job:
    """A trial under way: its runs follow each other."""

    trial: optuna.trial.Trial
    runs: Iterator[tuple[str, int]]
    env_id: str = ""
    seed: int = 0
    process: subprocess.Popen | None = None
    returns: dict[str, float] = field(default_factory=dict)
    cpu_s: float = 0.0


def run_flags(params: dict) -> list[str]:
    """A trial's settings as flags of hyper_mappo.py."""
    words = []
    for name, value in params.items():
        if name == "rollout":
            num_envs, num_steps = value.split("x")
            words += ["--num-envs", num_envs, "--num-steps", num_steps]
        elif name == "norm_obs":
            words.append("--norm-obs" if value else "--no-norm-obs")
        else:
            words += [flag(name), str(value)]
    return words


def final_return(run_dir: Path) -> float:
    """Mean return per agent of the episodes in the last tenth of a run; NaN where none ended."""
    rows = [row for row in read_metrics(run_dir) if row["charts/episodic_return"]]
    if not rows:
        return math.nan
    start = (1 - SCORED_SHARE) * int(rows[-1]["global_step"])
    returns = [float(row["charts/episodic_return"]) for row in rows if int(row["global_step"]) >= start]
    return sum(returns) / len(returns)


def run_folder(args: Args, job: Job) -> Path:
    return args.runs_dir.resolve() / safe_name(args.name) / f"{job.trial.number}__{safe_name(job.env_id)}__{job.seed}"


def start_next(job: Job, args: Args) -> bool:
    """Starts the trial's next run: -> whether there was one."""
    following = next(job.runs, None)
    if following is None:
        return False
    job.env_id, job.seed = following
    folder = run_folder(args, job)
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "hyper_mappo.py", "--env-id", job.env_id, "--seed", str(job.seed)]
    words += ["--total-timesteps", str(args.total_timesteps), "--eval-episodes", "0", "--runs-dir", str(folder)]
    words += [*ONE_THREAD.split(), *args.flags.split(), *run_flags(job.trial.params)]
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        job.process = subprocess.Popen(words, cwd=args.code.resolve(), stdout=log, stderr=log)
    return True


def end_run(job: Job, args: Args) -> None:
    """Keeps the return of the run that ended."""
    folder = run_folder(args, job)
    found = sorted(path.parent for path in folder.glob("*/metrics.csv"))
    key = f"{job.env_id} seed {job.seed}"
    job.returns[key] = final_return(found[-1]) if found else math.nan


def score(job: Job, args: Args) -> float:
    """Mean over runs of return / scale."""
    shares = []
    for env_id, scale in zip(args.env_ids, args.scales, strict=True):
        for seed in args.seeds:
            shares.append(job.returns[f"{env_id} seed {seed}"] / scale)
    return sum(shares) / len(shares)


def write_trials(study: optuna.Study, args: Args) -> None:
    """A row for every finished trial, best first."""
    finished = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    rows = []
    for trial in sorted(finished, key=lambda trial: -trial.value):
        rows.append({"trial": trial.number, "score": round(trial.value, 4), **trial.user_attrs, **trial.params})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_rows(args.results / f"tune-{safe_name(args.name)}.csv", columns, rows)


def check_args(args: Args) -> None:
    if min(args.seeds, default=0) < FIRST_SEED:
        raise UsageError(f"--seeds must be {FIRST_SEED} or more, got {args.seeds}: those below are reported")
    if len(args.scales) != len(args.env_ids):
        raise UsageError(f"--scales must be one number per env, got {args.scales} for {', '.join(args.env_ids)}")
    for text in args.first:
        for name, value in parse_first(text).items():
            if name not in SPACE:
                raise UsageError(f"--first names {name}, which is not searched: one of {', '.join(SPACE)}")
            if not SPACE[name]._contains(SPACE[name].to_internal_repr(value)):
                raise UsageError(f"--first {name} {value} is outside of {SPACE[name]}")


def parse_first(text: str) -> dict:
    try:
        return dict(json.loads(text))
    except (json.JSONDecodeError, TypeError, ValueError):
        raise UsageError(f"--first takes JSON objects like '{{\"update_epochs\": 2}}', got {text!r}") from None


def open_study(args: Args) -> optuna.Study:
    """The journal's study, with what is to be tried first where it is new."""
    folder = args.runs_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(folder / f"{safe_name(args.name)}.journal"))
    sampler = optuna.samplers.TPESampler(seed=FIRST_SEED, n_startup_trials=8, constant_liar=True)
    study = optuna.create_study(
        study_name=args.name,
        storage=JournalStorage(backend),
        sampler=sampler,
        direction="maximize",
        load_if_exists=True,
    )
    for text in args.first:
        study.enqueue_trial({**START, **parse_first(text)}, skip_if_exists=True)
    return study


def main(args: Args) -> int:
    check_args(args)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = open_study(args)
    described = {"commit": describe_commit(args.code), "machine": describe_machine(), "env_steps": args.total_timesteps}
    runs = [(env_id, seed) for env_id in args.env_ids for seed in args.seeds]
    running: list[Job] = []
    num_started, told = 0, False
    started_at = time.time()
    stop = StopSignal()
    while True:
        late = args.minutes is not None and time.time() - started_at > 60 * args.minutes
        more = num_started < args.trials and not late and not stop.requested
        if more and len(running) < (args.jobs or num_cpus()):
            job = Job(study.ask(SPACE), iter(runs))
            num_started += 1
            start_next(job, args)
            running.append(job)
            print(f"trial {job.trial.number} started: {job.trial.params}", flush=True)
            continue
        if not running and not more:
            break
        if stop.requested and not told:
            told = True
            print("the trials under way are lost", flush=True)
            for job in running:
                job.process.terminate()
        time.sleep(0.2)
        for job in list(running):
            code, cpu_s = poll(job.process)
            if code is None:
                continue
            job.cpu_s += cpu_s
            end_run(job, args)
            if code == 0 and not stop.requested and start_next(job, args):
                continue
            running.remove(job)
            failed = code != 0 or stop.requested or not math.isfinite(score(job, args))
            if failed:
                study.tell(job.trial, state=optuna.trial.TrialState.FAIL)
                print(f"trial {job.trial.number} failed: see {run_folder(args, job) / 'log.txt'}", flush=True)
                continue
            attributes = {**job.returns, "cpu_s": round(job.cpu_s, 1), **described}
            for name, value in attributes.items():
                job.trial.set_user_attr(name, value)
            study.tell(job.trial, score(job, args))
            write_trials(study, args)
            print(f"trial {job.trial.number}: {score(job, args):.3f}, {job.returns}", flush=True)
    stop.restore()
    return 0


LIMITS = {
    "at least 1": (lambda x: x >= 1, "trials jobs total_timesteps"),
    "more than 0": (lambda x: x > 0, "minutes"),
}


def cli(argv: list[str] | None = None) -> int:
    """The command line: 0 done or stopped, 2 unusable arguments."""
    return command_line(Args, main, LIMITS, argv)


if __name__ == "__main__":
    sys.exit(cli())
