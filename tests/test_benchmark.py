"""The study's programs: benchmark/run.py, plot.py and tune.py; what train_speed.py compares."""

import csv
import itertools
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import tyro

import hyper_mappo
from benchmark import plot, run, train_speed
from runs import UsageError, command_line

ROOT = Path(__file__).parent.parent

# Stands in for hyper_mappo.py: 12 updates, a checkpoint each, stopped by SIGTERM between them and resumable.
# It fails with seed 13, and sleeps --num-steps milliseconds an update.
FAKE = """
import argparse, csv, json, signal, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("--runs-dir", "--resume", "--env-id"):
    parser.add_argument(name)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--num-steps", type=int, default=0)
parser.add_argument("--learning-rate", type=float, default=0.0)
args, _ = parser.parse_known_args()
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
run_dir = Path(args.resume or Path(args.runs_dir) / "run")
run_dir.mkdir(exist_ok=True)
saved = run_dir / "latest.pt"
done = int(saved.read_text()) if saved.exists() else 0
if args.seed == 13:
    sys.exit("error: unlucky")
with open(run_dir / "metrics.csv", "a", newline="") as file:
    table = csv.writer(file)
    if done == 0:
        table.writerow(["update", "global_step", "charts/episodic_return", "charts/SPS"])
    for update in range(done + 1, 13):
        time.sleep(args.num_steps / 1000)
        value = update + args.seed if update % 2 == 0 else ""
        table.writerow([update, 100 * update, value, 50.0 if update > done + 1 else ""])
        saved.write_text(str(update))
        if stopped:
            sys.exit(0)
report = {"env_id": args.env_id or "fake", "episodes": 3, "mean_return": 10.0 + args.seed, "interval_95": 0.5}
report |= {"mean_return_per_agent": [9.0, 11.0], "mean_length": 25.0, "started_with": done}
(run_dir / "eval.json").write_text(json.dumps(report))
"""


@pytest.fixture
def fake_code(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "hyper_mappo.py").write_text(FAKE)
    return folder


@pytest.fixture
def places(tmp_path, fake_code):
    """Flags of run.py that keep everything in the test's folder."""
    folders = {"code": fake_code, "results": tmp_path / "results", "runs_dir": tmp_path / "runs"}
    return [word for name, path in folders.items() for word in (f"--{name.replace('_', '-')}", str(path))]


def rows_of(tmp_path, suite="tiny"):
    return run.read_rows(tmp_path / "results", suite)


def use_suite(monkeypatch, flags, seeds):
    monkeypatch.setitem(run.SUITES, "tiny", [run.Member(label, f, seeds) for label, f in flags.items()])


# ------------------------------------------------------------------------------------------------ suites


@pytest.fixture
def check_args(monkeypatch):
    """hyper_mappo.check_args, looking at each env once: that is nearly all of its time."""
    checked = {}

    def check_env_once(env_id, backend, env_kwargs):
        key = env_id, backend, json.dumps(env_kwargs)
        if key not in checked:
            checked[key] = check_env(env_id, backend, env_kwargs)
        return checked[key]

    check_env = hyper_mappo.check_env
    monkeypatch.setattr(hyper_mappo, "check_env", check_env_once)
    return lambda args: hyper_mappo.check_args(args, torch.device("cpu"))


@pytest.mark.parametrize("suite", run.SUITES)
def test_commands_of_a_suite_are_valid_and_differ(suite, check_args):
    """Flags that do nothing together are refused by check_args, so a comparison cannot be one in name only."""
    seen = set()
    for member in run.SUITES[suite]:
        words = shlex.split(member.command(member.seeds[0]))[2:]
        args = tyro.cli(hyper_mappo.Args, args=words)
        check_args(args)
        assert (args.num_threads, args.update_threads) == (1, 1)
        seen.add(repr(args))
    assert len(seen) == len(run.SUITES[suite])
    assert len({member.label for member in run.SUITES[suite]}) == len(seen)


def test_reported_seeds_are_below_those_of_the_search():
    tune = pytest.importorskip("benchmark.tune", reason="pip install -r benchmark/requirements-study.txt")
    for members in run.SUITES.values():
        assert max(seed for member in members for seed in member.seeds) < tune.FIRST_SEED


def test_a_suite_is_run_once_seed_by_seed(tmp_path, places, monkeypatch, capsys):
    use_suite(monkeypatch, {"a": "--env-id fake", "b": "--env-id fake --num-steps 1"}, (1, 2))
    assert run.cli(["tiny", "--jobs", "1", *places]) == 0
    rows = rows_of(tmp_path)
    assert [(row["label"], row["seed"]) for row in rows] == [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]
    first = rows[0]
    assert float(first["mean_return"]) == 11 and float(first["interval_95"]) == 0.5
    assert first["env_steps"] == "1200" and first["return_per_seat"] == "9.0 11.0"
    assert 0 < float(first["cpu_s"]) and 0 < float(first["wall_s"])
    assert str(tmp_path) not in " ".join(first.values())
    capsys.readouterr()
    assert run.cli(["tiny", *places]) == 0
    assert "4 runs done, 0 to do" in capsys.readouterr().out
    assert rows_of(tmp_path) == rows


def test_a_changed_command_is_run_again_in_its_old_row(tmp_path, places, monkeypatch):
    use_suite(monkeypatch, {"a": "--env-id old"}, (1,))
    run.cli(["tiny", *places])
    use_suite(monkeypatch, {"a": "--env-id new"}, (1,))
    run.cli(["tiny", *places])
    assert [row["env_id"] for row in rows_of(tmp_path)] == ["new"]
    reports = [json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("eval.json")]
    assert sorted((report["env_id"], report["started_with"]) for report in reports) == [("new", 0), ("old", 0)]


def test_a_failed_training_is_reported_and_does_not_stop_others(tmp_path, places, monkeypatch, capsys):
    use_suite(monkeypatch, {"a": "--env-id fake"}, (13, 14))
    assert run.cli(["tiny", "--jobs", "1", *places]) == 1
    assert "failed   tiny__a__13 (exit code 1)" in capsys.readouterr().out
    assert [row["seed"] for row in rows_of(tmp_path)] == ["14"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM cannot be caught there")
def test_a_stopped_suite_goes_on_where_it_was(tmp_path, places):
    member = run.Member("a", "--env-id fake --num-steps 100", (1,))
    source = (
        f"import sys; from benchmark import run;run.SUITES['tiny'] = [run.{member}];sys.exit(run.cli(sys.argv[1:]))"
    )
    program = [sys.executable, "-c", source, "tiny", *places]
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    saved = run.job_folder(tmp_path / "runs", "tiny", member, 1) / "run/latest.pt"
    for _ in range(600):
        if saved.exists() and saved.read_text() not in ("", "0", "1"):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "stopped  tiny__a__1" in out and process.returncode == 0
    assert rows_of(tmp_path) == []
    done = int(saved.read_text())
    assert 2 <= done < 12
    spent = json.loads((saved.parents[1] / "spent.json").read_text())
    assert subprocess.run(program, cwd=ROOT, capture_output=True).returncode == 0
    (row,) = rows_of(tmp_path)
    assert json.loads((saved.parent / "eval.json").read_text())["started_with"] == done
    assert float(row["wall_s"]) > spent["wall_s"] and float(row["cpu_s"]) > spent["cpu_s"]


def test_a_real_training_gives_a_row_and_a_curve(tmp_path, monkeypatch):
    sizes = "--total-timesteps 1600 --num-envs 16 --num-steps 20 --num-minibatches 2 --update-epochs 1"
    flags = f"--env-id stag_hunt-4x4-4h1s --hyper none --eval-episodes 2 {sizes}"
    use_suite(monkeypatch, {"plain": flags}, (3,))
    folders = ["--results", str(tmp_path / "results"), "--runs-dir", str(tmp_path / "runs")]
    assert run.cli(["tiny", *folders]) == 0
    (row,) = rows_of(tmp_path)
    assert row["env_steps"] == "1600" and len(row["return_per_seat"].split()) == 4
    (report,) = (tmp_path / "runs").rglob("eval.json")
    returns = json.loads(report.read_text())["returns"]
    assert float(row["mean_return"]) == pytest.approx(np.mean(returns), abs=1e-4)
    curve = plot.read_curve(tmp_path / "results", row)
    assert curve["env_steps"][-1] == 1600 and np.all(np.diff(curve["minutes"]) > 0)
    assert curve["minutes"][-1] == pytest.approx(float(row["cpu_s"]) / 60)


def test_unusable_arguments_end_in_one_line(capsys, tmp_path):
    for words in (["no-such-suite"], [], ["pursuit", "--labels", "nobody"], ["pursuit", "--code", str(tmp_path)]):
        assert run.cli(words) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_curves_are_thinned_and_keep_means_and_time(tmp_path):
    """450 updates of 10 env steps at 5 a second: 2 s each; a third of them ended no episode."""
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["global_step", "charts/episodic_return", "charts/SPS"])
        for i in range(1, 451):
            table.writerow([10 * i, "" if i % 3 == 0 else i, "" if i == 1 else 5.0])
    curve = run.learning_curve(tmp_path, points=200)
    assert len(curve) <= 200
    assert curve[0] == {"env_steps": 30, "wall_s": 6.0, "return": 1.5}
    assert curve[-1] == {"env_steps": 4500, "wall_s": 900.0, "return": 448.5}


# -------------------------------------------------------------------------------------------- statistics


def test_iqm_leaves_out_a_quarter_on_both_sides():
    assert plot.iqm(np.array([100.0, 1.0, 2.0, 4.0, -50.0, 3.0, 0.0, 5.0])) == (1 + 2 + 3 + 4) / 4
    assert plot.iqm(np.array([1.0, 2.0, 9.0])) == 4.0


def test_improvement_counts_pairs():
    assert plot.improvement(np.array([1.0, 3.0, 2.0]), np.array([2.0, 0.0])) == (0 + 1 + 1 + 1 + 0.5 + 1) / 6
    mann_whitney = scipy.stats.mannwhitneyu([5.0, 7.0, 1.0, 4.0], [2.0, 6.0, 4.0]).statistic / 12
    assert plot.improvement(np.array([5.0, 7.0, 1.0, 4.0]), np.array([2.0, 6.0, 4.0])) == pytest.approx(mann_whitney)


def test_bootstrap_interval_is_that_of_scipy():
    scores = np.random.default_rng(4).normal(10.0, 3.0, 12)
    mean, low, high = plot.iqm_interval(scores)
    theirs = scipy.stats.bootstrap([scores], plot.iqm, n_resamples=20000, method="percentile", rng=1)
    expected = theirs.confidence_interval
    assert mean == plot.iqm(scores)
    assert low == pytest.approx(expected.low, abs=0.15) and high == pytest.approx(expected.high, abs=0.15)


def test_improvement_interval_draws_both_groups():
    same = np.arange(6.0)
    chance, low, high = plot.improvement_interval(same, same)
    assert chance == 0.5 and low < 0.3 and high > 0.7
    assert plot.improvement_interval(same + 10, same) == (1.0, 1.0, 1.0)


def test_improvement_interval_covers_all_resamples_of_small_groups():
    """Two runs against one: all four resamples are equally likely; two thirds of the scores lie above."""
    a, b = np.array([0.0, 2.0]), np.array([1.0])
    values = [np.mean([x > b[0] for x in pair]) for pair in itertools.product(a, a)]
    low, high = np.percentile(values * 500, [2.5, 97.5])
    assert plot.improvement_interval(a, b) == (0.5, low, high)


def test_moving_mean_is_over_the_window_before():
    steps = np.array([10.0, 20.0, 30.0, 60.0, 70.0])
    returns = np.array([1.0, 3.0, 5.0, 7.0, 10.0])
    assert plot.moving_mean(steps, returns, 20).tolist() == [1.0, 2.0, 4.0, 7.0, 8.5]


def test_tables_and_picture(tmp_path, places, monkeypatch, capsys):
    """Seeds 1 ... 4 score 11 ... 14; b has seeds 3 and 4 only, so that it wins 7 of 8 pairs with draws halved."""
    members = [run.Member("a", "--env-id fake", (1, 2, 3, 4)), run.Member("b", "--env-id fake --num-steps 1", (3, 4))]
    monkeypatch.setitem(run.SUITES, "tiny", members)
    assert run.cli(["tiny", *places]) == 0
    picture = tmp_path / "curves.png"
    capsys.readouterr()
    assert plot.cli(["tiny", "--results", str(tmp_path / "results"), "--output", str(picture)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert "| 4 | 0.00 M | **12.50** |" in lines[0] and "11.00 ... 14.00" in lines[0]
    wins = (1 + 1 + 0.5 + 0 + 1 + 1 + 1 + 0.5) / 8
    assert f"{wins:.2f} (" in lines[1] and "| 2 | 0.00 M | **13.50** |" in lines[1]
    # Training rises in a straight line from 2 to 12, plus the seed: 7 on average.
    assert "| 9.50 | 0.0 min |" in lines[0] and "| 10.50 | 0.0 min |" in lines[1]
    assert picture.stat().st_size > 10_000


def test_rows_of_a_member_that_was_taken_out_are_still_shown(tmp_path, places, monkeypatch, capsys):
    use_suite(monkeypatch, {"kept": "--env-id fake", "cut": "--env-id fake --num-steps 1"}, (1, 2))
    assert run.cli(["tiny", *places]) == 0
    use_suite(monkeypatch, {"kept": "--env-id fake"}, (1, 2))
    picture = tmp_path / "points.png"
    capsys.readouterr()
    flags = ["--results", str(tmp_path / "results"), "--picture", "points", "--output", str(picture)]
    assert plot.cli(["tiny", *flags]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["kept", "cut"]
    assert picture.stat().st_size > 5_000


def test_only_the_named_seeds_are_shown(tmp_path, places, monkeypatch, capsys):
    use_suite(monkeypatch, {"one": "--env-id fake", "other": "--env-id fake --num-steps 1"}, (1, 2))
    assert run.cli(["tiny", *places]) == 0
    results = ["--results", str(tmp_path / "results")]
    for seeds, number in [((), 2), (("--seeds", "2"), 1)]:
        capsys.readouterr()
        assert plot.cli(["tiny", *results, *seeds]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
        assert [line.split(" | ")[1] for line in lines] == [str(number)] * 2
    assert plot.cli(["tiny", *results, "--seeds", "3"]) == 2
    assert "no rows of tiny" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["curves", "steps", "points"])
def test_runs_without_a_closing_evaluation_are_drawn_and_not_scored(tmp_path, places, monkeypatch, capsys, kind):
    use_suite(monkeypatch, {"ours": "--env-id fake", "theirs": "--env-id fake --num-steps 1"}, (1, 2))
    assert run.cli(["tiny", *places]) == 0
    results = tmp_path / "results"
    rows = run.read_rows(results, "tiny")
    for row in rows:
        if row["label"] == "theirs":
            row["mean_return"] = ""
    run.write_rows(results / "tiny.csv", run.COLUMNS, rows)
    drawn = []
    monkeypatch.setattr(plot.plt.Axes, "plot", lambda axis, *x, label=None, **style: drawn.append(label))
    capsys.readouterr()
    flags = ["--results", str(results), "--picture", kind, "--output", str(tmp_path / "picture.png")]
    assert plot.cli(["tiny", *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| `ours` |") == 1 and "| `theirs` |" not in printed
    assert "`theirs` has no closing evaluation" in printed
    expected = {"curves": 2 * ["ours (2)", "theirs (2)"], "steps": ["ours (2)", "theirs (2)"], "points": [None, None]}
    assert drawn == expected[kind]


def test_plot_without_rows_is_a_usage_error(tmp_path, capsys):
    assert plot.cli(["pursuit", "--results", str(tmp_path)]) == 2
    assert "no rows of pursuit" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- search


@pytest.fixture
def tune():
    return pytest.importorskip("benchmark.tune", reason="pip install -r benchmark/requirements-study.txt")


def test_every_corner_of_the_space_is_a_valid_command(tune, check_args):
    choices = []
    for distribution in tune.SPACE.values():
        if hasattr(distribution, "choices"):
            choices.append(list(distribution.choices))
        else:
            choices.append([distribution.low, distribution.high])
    for env_id in tune.Args.env_ids:
        for corner in itertools.islice(itertools.product(*choices), 0, None, 397):
            params = dict(zip(tune.SPACE, corner, strict=True))
            words = ["--env-id", env_id, "--hyper", "none", *tune.run_flags(params)]
            check_args(tyro.cli(hyper_mappo.Args, args=words))


def test_a_search_starts_with_what_is_given_and_goes_on(tmp_path, places, tune):
    words = ["tiny", "--env-ids", "fake", "--scales", "10", "--seeds", "101", "102", "--jobs", "1", *places]
    assert tune.cli([*words, "--trials", "1", "--first", '{"update_epochs": 2}']) == 0
    rows = run.read_rows(tmp_path / "results", "tune-tiny")
    assert [(row["trial"], row["update_epochs"], row["rollout"]) for row in rows] == [("0", "2", "128x64")]
    # the last tenth of 12 updates is 11 and 12, and only the even ones ended episodes: 12 + seed
    assert float(rows[0]["fake seed 101"]) == 113 and float(rows[0]["score"]) == pytest.approx(11.35)
    assert tune.cli([*words, "--trials", "2"]) == 0
    assert sorted(row["trial"] for row in run.read_rows(tmp_path / "results", "tune-tiny")) == ["0", "1", "2"]


def test_the_search_refuses_reported_seeds_and_unknown_settings(tune, tmp_path):
    with pytest.raises(UsageError, match="must be 100 or more"):
        tune.check_args(tune.Args("x", seeds=(1,)))
    with pytest.raises(UsageError, match="not searched"):
        tune.check_args(tune.Args("x", first=('{"clip_coef": 0.1}',)))
    with pytest.raises(UsageError, match="outside"):
        tune.check_args(tune.Args("x", first=('{"update_epochs": 9}',)))
    with pytest.raises(UsageError, match="one number per env"):
        tune.check_args(tune.Args("x", scales=(1.0,)))


# --------------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize("flags", ["--task balanced", "--task balance --sides none cleanrl-style"])
def test_speed_refuses_what_cannot_be_compared(flags, capsys):
    assert command_line(train_speed.Args, train_speed.main, {}, flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_speed_on_vmas_gives_both_sides_the_same_batch(monkeypatch):
    given = {}
    monkeypatch.setattr(train_speed, "train_benchmarl", lambda python, fields: given.update(theirs=fields))
    monkeypatch.setattr(train_speed, "in_new_process", lambda side, fields: given.update(ours=fields))
    args = train_speed.Args(task="balance", num_envs=64, num_steps=16)
    train_speed.measure("benchmarl", args)
    train_speed.measure("none", args)
    assert given["theirs"]["task"] == "vmas:balance" and given["ours"]["env_id"].startswith("vmas:balance?")
    for name in ("num_envs", "num_steps", "update_epochs", "num_minibatches", "hidden_size"):
        assert given["theirs"][name] == given["ours"][name], name
