"""benchmark/simulators.py: its suites are valid, BenchMARL's side becomes rows like ours."""

import shlex
import stat
import sys
from dataclasses import replace

import pytest
import torch
import tyro

import hyper_mappo
from benchmark import run, simulators

# Stands in for the interpreter of BenchMARL's environment: says what it was called with, fails with seed 13.
FAKE = """#!{python}
import json, sys
words = sys.argv[1:]
if words[-1] == "13":
    sys.exit("error: unlucky")
flags = dict(zip(words[1::2], words[2::2]))
returns = [None] + [float(i) for i in range(1, int(flags["--updates"]))]
print("loading")
print(json.dumps({{"returns": returns, "steps_per_cpu_second": 8192.0, "weights": "actor 1", "task": flags["--task"]}}))
"""


@pytest.fixture
def fake_python(tmp_path):
    path = tmp_path / "python"
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("suite", simulators.SUITES)
def test_commands_of_a_suite_are_valid_and_differ(suite):
    pytest.importorskip("vmas", reason="pip install -r requirements-vmas.txt")
    seen = set()
    for member in simulators.SUITES[suite]:
        words = shlex.split(member.command(member.seeds[0]))[2:]
        args = tyro.cli(hyper_mappo.Args, args=words)
        hyper_mappo.check_args(args, torch.device("cpu"))
        seen.add(repr(args))
    assert len(seen) == len({member.label for member in simulators.SUITES[suite]})


def test_members_of_a_comparison_differ_in_the_actor_alone():
    for suite in ("simulators-dispersion", "simulators-navigation"):
        for member in simulators.SUITES[suite]:
            args = tyro.cli(hyper_mappo.Args, args=shlex.split(member.command(1))[2:])
            assert args.agent_id and args.critic_obs and args.num_envs * args.num_steps == 8192


@pytest.mark.parametrize("task", simulators.TASKS)
def test_both_sides_train_alike(task):
    """As many envs, env steps and gradient steps, of rollouts cut alike; what else BenchMARL does is in its script."""
    sides = []
    for member in simulators.SUITES[simulators.suite_of(task)]:
        sides.append(tyro.cli(hyper_mappo.Args, args=shlex.split(member.command(1))[2:]))
    args, normalised, fewer_steps = sides
    assert normalised == replace(args, norm_obs=True)
    assert fewer_steps == replace(normalised, update_epochs=1)
    compared = simulators.TASKS[task]
    words = simulators.benchmarl_command(compared, compared.updates, 1)
    theirs = dict(zip(words[1::2], words[2::2], strict=True))
    assert theirs["--task"] == args.env_id.split("?")[0]
    assert (int(theirs["--num-envs"]), int(theirs["--num-steps"])) == (args.num_envs, args.num_steps)
    assert args.total_timesteps == args.num_envs * args.num_steps * int(theirs["--updates"])
    source = (run.ROOT / "benchmark/benchmarl_mappo.py").read_text(encoding="utf-8")
    assert f"update_epochs: int = {args.update_epochs}\n" in source
    assert f"num_minibatches: int = {args.num_minibatches}\n" in source


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line")
def test_benchmarls_runs_become_rows_and_curves(tmp_path, fake_python, capsys):
    suite = "simulators-benchmarl-transport"
    flags = ["--benchmarl-python", str(fake_python), "--updates", "12", "--results", str(tmp_path / "results")]
    assert simulators.cli(["benchmarl", *flags, "--tasks", "transport", "discovery", "--seeds", "1", "2"]) == 0
    assert len(run.read_rows(tmp_path / "results", "simulators-benchmarl-discovery")) == 2
    rows = run.read_rows(tmp_path / "results", suite)
    assert [(row["label"], row["seed"], row["env_steps"]) for row in rows] == [
        ("BenchMARL", "1", "98304"),
        ("BenchMARL", "2", "98304"),
    ]
    assert float(rows[0]["cpu_s"]) == 12
    assert str(tmp_path) not in " ".join(rows[0].values())
    points = simulators.read_returns(tmp_path / "results", rows[0])
    assert points == [(8192.0 * (i + 1), float(i)) for i in range(1, 12)]

    # Ours, with a return 2 higher all along.
    for seed in (1, 2):
        curve = [dict(env_steps=steps, wall_s=0, **{"return": x + 2}) for steps, x in points]
        run.write_rows(tmp_path / f"results/ours{seed}.csv", run.CURVE_COLUMNS, curve)
        row = {**rows[0], "label": "ours", "seed": seed, "curve": f"ours{seed}.csv"}
        run.add_row(tmp_path / "results", suite, row)
    capsys.readouterr()
    assert simulators.cli(["curves", suite, "--results", str(tmp_path / "results")]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:3] for line in lines] == [
        ["| vmas:transport", "`BenchMARL`", "2"],
        ["| vmas:transport", "`ours`", "2"],
    ]
    # The last tenth of 98,304 env steps holds the last two rollouts; the mean over all eleven is 6.
    assert [line[3] for line in lines] == ["10.50 (10.50 ... 10.50)", "12.50 (12.50 ... 12.50)"]
    assert [line[4] for line in lines] == ["6.00 (6.00 ... 6.00)", "8.00 (8.00 ... 8.00)"]


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line")
def test_what_goes_wrong_is_one_line(tmp_path, fake_python, capsys):
    results = ["--results", str(tmp_path / "results")]
    for words, said in [
        (["benchmarl", "--benchmarl-python", str(tmp_path / "nowhere"), *results], "no interpreter"),
        (["benchmarl", "--benchmarl-python", str(fake_python), "--seeds", "13", *results], "unlucky"),
        (["benchmarl", "--benchmarl-python", str(fake_python), "--tasks", "poker", *results], "unknown task"),
        (["curves", "simulators-dispersion", *results], "no rows"),
        (["curves", "simulators-poker", *results], "unknown suite"),
        (["fly"], "expected one of run, plot, benchmarl, curves"),
        ([], "expected one of"),
    ]:
        assert simulators.cli(words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "results").exists()


def test_the_report_of_benchmarls_script_is_what_is_read():
    """Its own packages are not those of the tests, so that only its text can be looked at here."""
    source = (run.ROOT / "benchmark/benchmarl_mappo.py").read_text(encoding="utf-8")
    words = simulators.benchmarl_command(simulators.TASKS["balance"], 25, 1)
    fields = [word[2:].replace("-", "_") for word in words if word.startswith("--")]
    assert fields == ["task", "num_envs", "num_steps", "updates", "num_threads", "seed"]
    assert all(f"\n    {name}: " in source for name in fields)
    assert all(f'"{name}": ' in source for name in ("returns", "steps_per_cpu_second", "weights"))
