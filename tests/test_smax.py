"""benchmark/smax.py and benchmark/jaxmarl_mappo.py: both sides become rows, at equal sizes."""

import shlex
import stat
import sys
from pathlib import Path

import pytest
import torch
import tyro

import hyper_mappo
from benchmark import run, smax

# Stands in for the interpreter of JaxMARL's environment, that of its script, and fails with seed 13.
FAKE = """#!{python}
import json, sys
words = sys.argv[1:]
if words[-1] == "13":
    sys.exit("error: unlucky")
sum(i * i for i in range(3_000_000))  # so that there is CPU time
print("loading")
wins = [None] + [i / 20 for i in range(1, 20)]
print(json.dumps({{"win_rates": wins, "batch_size": 16384, "versions": "jaxmarl 0", "clone": words[2]}}))
"""


@pytest.fixture
def fake_python(tmp_path):
    path = tmp_path / "python"
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("memory", ["", smax.MEMORY], ids=["plain", "memory"])
def test_the_recipe_is_valid_and_has_their_sizes(memory):
    pytest.importorskip("jaxmarl", reason="pip install -r requirements-jaxmarl.txt")
    words = shlex.split(f"--env-id 'jaxmarl:SMAX?scenario=3m' {smax.RECIPE} {memory}")
    args = tyro.cli(hyper_mappo.Args, args=words)
    hyper_mappo.check_args(args, torch.device("cpu"))
    assert (args.num_envs, args.num_steps, args.hidden_size) == (128, 128, 128)
    assert args.hyper == "none"
    if memory:
        assert args.context_size == 128 and args.hyper_context == "local"  # decentral execution


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line")
def test_their_runs_become_rows_curves_and_a_table(tmp_path, fake_python, capsys):
    results = tmp_path / "results"
    flags = ["--jaxmarl-python", str(fake_python), "--clone", str(tmp_path), "--results", str(results)]
    assert smax.cli(["run", *flags, "--seeds", "1", "2"]) == 0
    assert smax.cli(["run", *flags, "--seeds", "2"]) == 0  # in place of the first one
    rows = run.read_rows(results, smax.TABLE)
    assert [(row["label"], row["seed"], row["env_steps"]) for row in rows] == [
        ("JaxMARL", "1", "327680"),
        ("JaxMARL", "2", "327680"),
    ]
    assert str(tmp_path) not in " ".join(rows[0].values())
    assert float(rows[0]["cpu_s"]) > 0
    # The last tenth of 20 rollouts are two, of which one is half-way in; 19 have a win rate.
    assert float(rows[0]["won_at_end"]) == pytest.approx(sum([18, 19]) / 2 / 20)
    assert float(rows[0]["won_over_training"]) == pytest.approx(0.5)
    capsys.readouterr()
    assert smax.cli(["table", "--results", str(results)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| 3m | JaxMARL | 2 | 0.33 M | 0.93 ± 0.00 | 0.50 ± 0.00 |")


def test_ours_becomes_a_row(tmp_path, monkeypatch, capsys):
    """A real training, of a rollout of two envs."""
    pytest.importorskip("jaxmarl", reason="pip install -r requirements-jaxmarl.txt")
    small = "--hyper none --num-envs 2 --num-steps 128 --num-minibatches 2 --no-cuda"
    monkeypatch.setattr(smax, "RECIPE", small)
    assert smax.cli(["run", "--total-timesteps", "256", "--seeds", "1", "--results", str(tmp_path)]) == 0
    (row,) = run.read_rows(tmp_path, smax.TABLE)
    assert (row["label"], row["env_steps"]) == ("ours", "256")
    assert 0 <= float(row["evaluated"]) <= 1
    assert (tmp_path / row["curve"]).is_file()
    # A longer run of the same seed is a row, a curve and a line of the table beside it.
    assert smax.cli(["run", "--total-timesteps", "512", "--seeds", "1", "--results", str(tmp_path)]) == 0
    rows = run.read_rows(tmp_path, smax.TABLE)
    assert [row["env_steps"] for row in rows] == ["256", "512"]
    assert rows[0]["curve"] != rows[1]["curve"]
    capsys.readouterr()
    assert smax.cli(["table", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("| 3m | ours | 1 |") == 2
    picture = tmp_path / "img" / "smax.png"
    assert smax.cli(["plot", "--output", str(picture), "--results", str(tmp_path)]) == 0
    assert picture.stat().st_size > 5000
    assert smax.cli(["plot", "--output", str(picture), "--results", str(tmp_path / "nowhere")]) == 2
    assert "run it first" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line")
def test_what_goes_wrong_is_one_line(tmp_path, fake_python, capsys):
    python = ["--jaxmarl-python", str(fake_python)]
    results = ["--results", str(tmp_path / "results")]
    for words, said in [
        (["run", *python, *results], "needs --clone"),
        (["run", "--jaxmarl-python", str(tmp_path / "nowhere"), "--clone", ".", *results], "no interpreter"),
        (["run", *python, "--clone", ".", "--seeds", "13", *results], "unlucky"),
        (["table", *results], "run it first"),
        (["fly"], "expected run, table or plot"),
        ([], "expected run, table or plot"),
    ]:
        assert smax.cli(words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "results").exists()


def test_the_report_of_their_script_is_what_is_read():
    """Its own packages are not those of the tests, so that only its text can be looked at here."""
    source = Path(run.ROOT / "benchmark/jaxmarl_mappo.py").read_text(encoding="utf-8")
    assert all(f'"{name}": ' in source for name in ("win_rates", "batch_size", "versions"))
    assert all(f"\n    {name}: " in source for name in ("clone", "scenario", "total_timesteps", "seed"))
