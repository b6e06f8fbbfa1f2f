"""The study: runs suites of trainings of hyper_mappo.py, and keeps one row for each run.

A suite is a list of (command, seeds). As many trainings as cores run at once, of one thread each; what has a row is
not run again. Ctrl-C lets the trainings save themselves; the same command goes on with them.

    benchmark/results/SUITE.csv                      a row per run, see COLUMNS
    benchmark/results/curves/SUITE__LABEL__SEED.csv  its learning curve, 200 points or fewer

    python benchmark/run.py pursuit stag_hunt-8x8      # on 2 cores: hours
    python benchmark/run.py pursuit --dry-run          # what is done, and what would be run
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import num_cpus
from runs import StopSignal, UsageError, command_line, read_metrics, safe_name, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark/results"
ONE_THREAD = "--num-threads 1 --update-threads 1 --num-env-procs 0"
COLUMNS = (
    "label seed env_id command commit python torch numpy machine date env_steps wall_s cpu_s episodes mean_return "
    "interval_95 mean_length return_per_seat curve"
).split()
CURVE_COLUMNS = ["env_steps", "wall_s", "return"]
CURVE_POINTS = 200


@dataclass(frozen=True)
class Member:
    """One line of a suite: what is compared, by its label."""

    label: str
    flags: str
    seeds: tuple[int, ...]

    def command(self, seed: int) -> str:
        return f"python hyper_mappo.py {self.flags} {ONE_THREAD} --seed {seed}"


def compare(base: str, members: dict[str, str], seeds: int) -> list[Member]:
    """The same base command with the flags of each member, seeds 1 ... seeds."""
    numbers = tuple(range(1, seeds + 1))
    compared = []
    for label, flags in members.items():
        compared.append(Member(label, f"{base} {flags}".strip(), numbers))
    return compared


PURSUIT = "--env-id pursuit --eval-episodes 20"
STAG_HUNT = "--env-id stag_hunt-8x8-4h1s --eval-episodes 200"
FORMS = {
    "none": "--hyper none",
    "delta": "--hyper delta",
    "context as input": "--hyper none --actor-context",
    "agent id": "--hyper none --agent-id",
    "as many parameters": "--hyper none --match-params delta",
    "last-layer": "--hyper last-layer",
}
WITH_ID = {
    "delta with id, 4 M": "--hyper delta --agent-id",
    "none with id, 4 M": "--hyper none --agent-id",
    "context as input with id, 4 M": "--hyper none --actor-context --agent-id",
}
NORMALISED = {
    "delta with id, normalised": "--hyper delta --agent-id --norm-obs",
    "none with id, normalised": "--hyper none --agent-id --norm-obs",
    "context as input with id, normalised": "--hyper none --actor-context --agent-id --norm-obs",
}
PARTS = {
    **FORMS,
    "delta, local": "--hyper delta --hyper-context local",
    "delta, agent id": "--hyper delta --hyper-context agent-id",
    "delta with id": "--hyper delta --agent-id",
    "delta, no history": "--hyper delta --history none",
    "delta, no smoothness": "--hyper delta --smooth-coef 0",
    "delta, no alignment": "--hyper delta --align-coef 0",
    "delta, one for all agents": "--hyper delta --share-delta",
    "delta, sequences of 8": "--hyper delta --chunk-length 8",
    "full": "--hyper full",
    "none, normalised": "--hyper none --norm-obs",
    "delta, normalised": "--hyper delta --norm-obs",
}
REWARDS = {
    "spirit 0, obs": "--hyper none --team-spirit 0",
    "spirit 1, state": "--hyper none --team-spirit 1 --no-critic-obs",
    "spirit 0, state": "--hyper none --team-spirit 0 --no-critic-obs",
    "spirit 1, obs": "--hyper none --team-spirit 1",
    "spirit 0.5, obs": "--hyper none --team-spirit 0.5",
    "spirit 0.5, state": "--hyper none --team-spirit 0.5 --no-critic-obs",
}
STAG_GOALS = "--eval-episodes 400"  # the program's own defaults
LARGE_MAP = """--env-kwargs '{"height": 16, "width": 16, "num_players": 8, "num_stags": 2, "num_hares": 8}'"""
SUITES: dict[str, list[Member]] = {
    "stag_hunt-goals": [
        *compare(f"--env-id stag_hunt-4x4-4h1s {STAG_GOALS}", {"4x4-4h1s": ""}, 5),
        *compare(f"--env-id stag_hunt-8x8-4h1s {STAG_GOALS}", {"8x8-4h1s": "", "8x8-4h1s, none": "--hyper none"}, 5),
        *compare(f"--env-id stag_hunt-8x8-4h2s {STAG_GOALS}", {"8x8-4h2s": ""}, 5),
        *compare(f"--env-id stag_hunt {LARGE_MAP} {STAG_GOALS}", {"16x16, 8 players": ""}, 2),
        *compare(f"--env-id stag_hunt {LARGE_MAP} {STAG_GOALS} --total-timesteps 1000000", {"16x16, 1 M": ""}, 2),
    ],
    "pursuit": [
        *compare(f"{PURSUIT} --total-timesteps 3000000", FORMS, 8),
        *compare(f"{PURSUIT} --total-timesteps 2000000", {"delta, 2 M": "--hyper delta"}, 8),
        *compare(f"{PURSUIT} --total-timesteps 4000000", {"delta, 4 M": "--hyper delta"}, 5),
        *compare(f"{PURSUIT} --total-timesteps 4000000", WITH_ID, 5),
    ],
    "pursuit-normalised": compare(f"{PURSUIT} --total-timesteps 2000000", NORMALISED, 5),
    "pursuit-normalised-long": compare(f"{PURSUIT} --total-timesteps 4000000", NORMALISED, 5),
    "pursuit-long": [
        *compare(f"{PURSUIT} --total-timesteps 6000000", {"none": "--hyper none"}, 5),
        *compare(f"{PURSUIT} --total-timesteps 6000000", {"none with id": "--hyper none --agent-id"}, 5),
        *compare(f"{PURSUIT} --total-timesteps 8000000", {"delta with id, 8 M": "--hyper delta --agent-id"}, 5),
    ],
    "stag_hunt-8x8": compare(f"{STAG_HUNT} --total-timesteps 1500000", FORMS, 8),
    "pursuit-parts": compare(f"{PURSUIT} --total-timesteps 1000000", PARTS, 4),
    "stag_hunt-8x8-parts": compare(f"{STAG_HUNT} --total-timesteps 1000000", PARTS, 4),
    "pursuit-rewards": compare(f"{PURSUIT} --total-timesteps 1000000", REWARDS, 4),
    "stag_hunt-8x8-rewards": compare(f"{STAG_HUNT} --total-timesteps 1000000", REWARDS, 4),
}


@dataclass
class Args:
    suites: tyro.conf.Positional[tuple[str, ...]]
    """names of suites, run in this order"""
    seeds: tuple[int, ...] = ()
    """only these seeds of them; none: all"""
    labels: tuple[str, ...] = ()
    """only these members of them; none: all"""
    jobs: int | None = None
    """trainings at once; None: as many as there are cores"""
    code: Path = ROOT
    """the copy of this repository whose hyper_mappo.py is run: one that stays as it is while the study lasts"""
    results: Path = RESULTS
    """folder of the rows and curves"""
    runs_dir: Path = Path("runs/study")
    """folder of the run folders"""
    dry_run: bool = False
    """only say what is done and what would be run"""


@dataclass
class Job:
    """One training: what to run, and where its traces are kept."""

    suite: str
    member: Member
    seed: int
    folder: Path  # holds the run folder, log.txt and spent.json
    process: subprocess.Popen | None = None
    started: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.suite}__{safe_name(self.member.label)}__{self.seed}"


# ------------------------------------------------------------------------------------------- rows


def read_rows(results: Path, suite: str) -> list[dict[str, str]]:
    path = results / f"{suite}.csv"
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Writes to a temporary file beside `path` and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
    os.replace(temporary, path)


def add_row(results: Path, suite: str, row: dict) -> None:
    """Appends a run's row, in place of an earlier one of its label and seed."""
    key = row["label"], str(row["seed"])
    kept = []
    for other in read_rows(results, suite):
        if (other["label"], other["seed"]) != key:
            kept.append(other)
    write_rows(results / f"{suite}.csv", COLUMNS, [*kept, row])


def is_done(rows: list[dict[str, str]], member: Member, seed: int) -> bool:
    """Whether there is a row of this very command."""
    return any(row["command"] == member.command(seed) for row in rows)


def learning_curve(run_dir: Path, points: int = CURVE_POINTS) -> list[dict]:
    """Env steps, wall time since the start and mean return of at most `points` stretches of the run.

    The time is that of the updates, from the speed that each one logged: what a stop between them took is not in it.
    """
    rows = read_metrics(run_dir)
    steps = [int(row["global_step"]) for row in rows]
    speeds = [float(row["charts/SPS"] or "nan") for row in rows]
    known = [speed for speed in speeds if math.isfinite(speed)]
    wall, previous_step = 0.0, 0
    stretch = math.ceil(len(rows) / points)
    curve, returns = [], []
    for i, row in enumerate(rows):
        speed = speeds[i]
        if not math.isfinite(speed):  # the first update after a start has no speed yet
            speed = known[0] if known else math.nan
        wall += (steps[i] - previous_step) / speed
        previous_step = steps[i]
        if row["charts/episodic_return"]:
            returns.append(float(row["charts/episodic_return"]))
        if (i + 1) % stretch == 0 or i + 1 == len(rows):
            if returns:
                mean = sum(returns) / len(returns)
                point = steps[i], round(wall, 3), round(mean, 4)
                curve.append(dict(zip(CURVE_COLUMNS, point, strict=True)))
            returns = []
    return curve


# --------------------------------------------------------------------------------------- one training


def describe_machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE)
        cpu = found[1] if found else cpu
    return f"{num_cpus()} cores of {cpu}, {platform.system()}"


def describe_commit(code: Path) -> str:
    """The commit that is checked out in `code`, marked where files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(code), *words], capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "envs")
    return f"{commit}, changed" if changed else commit


def run_folder(job: Job) -> Path | None:
    """The newest run folder of a job with a checkpoint."""
    found = sorted(path.parent for path in job.folder.glob("*/latest.pt"))
    return found[-1] if found else None


def start(job: Job, code: Path) -> None:
    """Starts the training, or goes on with one that was stopped."""
    job.folder.mkdir(parents=True, exist_ok=True)
    words = shlex.split(job.member.command(job.seed))[1:]
    begun = run_folder(job)
    words += ["--resume", str(begun)] if begun else ["--runs-dir", str(job.folder)]
    log = open(job.folder / "log.txt", "a", encoding="utf-8")
    packages = {name: version(name) for name in ("torch", "numpy")}
    job.versions = {"commit": describe_commit(code), "python": platform.python_version(), **packages}
    job.started = time.time()
    job.process = subprocess.Popen([sys.executable, *words], cwd=code, stdout=log, stderr=log)
    log.close()


def poll(process: subprocess.Popen) -> tuple[int | None, float]:
    """The exit code, None while it runs, and the seconds of CPU it took: NaN where the system does not say."""
    if not hasattr(os, "wait4"):
        return process.poll(), math.nan
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid == 0:
        return None, 0.0
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def wait_for(process: subprocess.Popen) -> tuple[int, float]:
    """Its exit code and CPU seconds, as poll has them, when it has ended."""
    while True:
        code, cpu_s = poll(process)
        if code is not None:
            return code, cpu_s
        time.sleep(0.2)


def add_spent(job: Job, cpu_s: float) -> dict[str, float]:
    """Wall and CPU time of all the starts of a job together."""
    path = job.folder / "spent.json"
    spent = {"wall_s": 0.0, "cpu_s": 0.0}
    if path.is_file():
        spent = json.loads(path.read_text())
    spent["wall_s"] += time.time() - job.started
    spent["cpu_s"] += cpu_s
    write_json(path, spent)
    return spent


def make_row(job: Job, run_dir: Path, spent: dict[str, float], results: Path) -> dict:
    """The row of a finished run; writes its curve."""
    report = json.loads((run_dir / "eval.json").read_text())
    steps = read_metrics(run_dir)[-1]["global_step"]
    curve = f"curves/{job.name}.csv"
    write_rows(results / curve, CURVE_COLUMNS, learning_curve(run_dir))
    seats = [round(x, 3) for x in report["mean_return_per_agent"]]
    interval = report["interval_95"]  # None with a single episode
    return {
        "label": job.member.label,
        "seed": job.seed,
        "env_id": report["env_id"],
        "command": job.member.command(job.seed),
        **job.versions,
        "machine": describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
        "env_steps": steps,
        "wall_s": round(spent["wall_s"], 2),
        "cpu_s": round(spent["cpu_s"], 2),
        "episodes": report["episodes"],
        "mean_return": round(report["mean_return"], 4),
        "interval_95": "" if interval is None else round(interval, 4),
        "mean_length": round(report["mean_length"], 2),
        "return_per_seat": " ".join(str(x) for x in seats),
        "curve": curve,
    }


def finish(job: Job, code: int, cpu_s: float, results: Path) -> bool:
    """Keeps what an ended training gave: -> whether it was a whole one."""
    spent = add_spent(job, cpu_s)
    run_dir = run_folder(job)
    if code != 0 or run_dir is None:
        print(f"failed   {job.name} (exit code {code}): see {job.folder / 'log.txt'}", flush=True)
        return False
    if not (run_dir / "eval.json").is_file():
        print(f"stopped  {job.name}: the same command goes on with it", flush=True)
        return False
    row = make_row(job, run_dir, spent, results)
    add_row(results, job.suite, row)
    took = f"{row['cpu_s'] / 60:.1f} min of CPU"
    print(f"done     {job.name}: {row['mean_return']} ± {row['interval_95']}, {took}", flush=True)
    return True


# -------------------------------------------------------------------------------------------- a suite


def job_folder(runs_dir: Path, suite: str, member: Member, seed: int) -> Path:
    """Of its own for every command, so that a member whose flags were changed does not go on with its old run."""
    number = zlib.crc32(member.command(seed).encode())
    return runs_dir.resolve() / suite / f"{safe_name(member.label)}__{seed}__{number:08x}"


def open_jobs(args: Args) -> tuple[list[Job], int]:
    """What is to be run, seed by seed so that every prefix compares like with like; and how many are done."""
    jobs, num_done = [], 0
    for suite in args.suites:
        rows = read_rows(args.results, suite)
        members = SUITES[suite]
        if args.labels:
            members = [member for member in members if member.label in args.labels]
        seeds = sorted({seed for member in members for seed in member.seeds})
        for seed in seeds:
            for member in members:
                if seed not in member.seeds or (args.seeds and seed not in args.seeds):
                    continue
                if is_done(rows, member, seed):
                    num_done += 1
                    continue
                jobs.append(Job(suite, member, seed, job_folder(args.runs_dir, suite, member, seed)))
    return jobs, num_done


def check_args(args: Args) -> None:
    unknown = [suite for suite in args.suites if suite not in SUITES]
    if unknown or not args.suites:
        raise UsageError(f"unknown suite {', '.join(unknown) or '(none given)'}: one of {', '.join(SUITES)}")
    labels = {member.label for suite in args.suites for member in SUITES[suite]}
    for label in args.labels:
        if label not in labels:
            raise UsageError(f"no member {label!r} in {', '.join(args.suites)}: it has {', '.join(sorted(labels))}")
    if not (args.code / "hyper_mappo.py").is_file():
        raise UsageError(f"no hyper_mappo.py in --code {args.code}: give a copy of this repository")


def main(args: Args) -> int:
    check_args(args)
    waiting, num_done = open_jobs(args)
    print(f"{num_done} runs done, {len(waiting)} to do", flush=True)
    if args.dry_run:
        for job in waiting:
            print(f"{job.name}: {job.member.command(job.seed)}")
        return 0
    running: list[Job] = []
    num_failed, told = 0, False
    max_running = args.jobs or num_cpus()
    stop = StopSignal()
    while running or (waiting and not stop.requested):
        while waiting and len(running) < max_running and not stop.requested:
            job = waiting.pop(0)
            start(job, args.code.resolve())
            running.append(job)
            print(f"started  {job.name}", flush=True)
        if stop.requested and not told:
            told = True
            for job in running:
                job.process.terminate()
        time.sleep(0.2)
        for job in list(running):
            code, cpu_s = poll(job.process)
            if code is not None:
                running.remove(job)
                whole = finish(job, code, cpu_s, args.results)
                num_failed += not whole and not stop.requested
    stop.restore()
    return 1 if num_failed else 0


LIMITS = {"at least 1": (lambda x: x >= 1, "jobs")}


def cli(argv: list[str] | None = None) -> int:
    """The command line: 0 all done (or stopped and saved), 1 a training failed, 2 unusable arguments."""
    return command_line(Args, main, LIMITS, argv)


if __name__ == "__main__":
    sys.exit(cli())
