import ast
import json
import math
import os
import signal
from dataclasses import dataclass, fields
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch

import collect_data
import hyper_mappo
import pretrain_vae
import runs
import test_obs_reward_model
import world_model

ROOT = Path(__file__).parent.parent
SCRIPTS = [collect_data, hyper_mappo, pretrain_vae, test_obs_reward_model, world_model]

# Imports run one way: a file may import only what stands on an earlier line (DESIGN.md's order).
ORDER = [
    ["runs"],
    ["envs"],
    ["dataset"],
    ["opponent_samples"],
    ["opponent_scores"],
    ["pretrain_vae", "world_model"],
    ["hyper_mappo"],
    ["collect_data", "plan", "test_obs_reward_model"],
    ["benchmark"],
]


def imported_modules(path: Path) -> set[str]:
    """The top-level names that a file imports, also inside functions; not those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides from this test"
            names.add(node.module.split(".")[0])
    return names


def upward_imports(root: Path) -> list[str]:
    level = {name: i for i, names in enumerate(ORDER) for name in names}
    found = []
    for path in sorted([*root.glob("*.py"), *root.glob("envs/*.py"), *root.glob("benchmark/*.py")]):
        name = path.stem if path.parent == root else path.parent.name
        assert name in level, f"{path.name} has no place in the order"
        for other in imported_modules(path) & level.keys():
            if other != name and level[other] >= level[name]:
                found.append(f"{path.name} imports {other}")
    return found


def test_imports_run_one_way():
    assert upward_imports(ROOT) == []


def test_the_walk_of_imports_finds_one_that_runs_upward(tmp_path):
    (tmp_path / "runs.py").write_text("import math\n")
    (tmp_path / "dataset.py").write_text("def f():\n    from hyper_mappo import Actor\n")
    assert upward_imports(tmp_path) == ["dataset.py imports hyper_mappo"]


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_its_limits(script):
    """A flag that is added without limits would pass -1 or NaN to whatever reads it."""
    checked_elsewhere = {"hyper_rank", "heldout_fraction"}  # its limit depends on the form; dataset.split_episodes
    numbers = {f.name for f in fields(script.Args) if f.type.split(" | ")[0] in ("int", "float")} - checked_elsewhere
    limited = [name for _, names in script.LIMITS.values() for name in names.split()]
    assert sorted(limited) == sorted(numbers)
    for limit, (holds, names) in script.LIMITS.items():
        assert not holds(math.nan) and not holds(-1), limit
        for name in names.split():
            with pytest.raises(runs.UsageError, match=f"{runs.flag(name)} must be {limit}, got -1"):
                runs.check_limits(script.Args(**{name: -1}), script.LIMITS)
    runs.check_limits(script.Args(), script.LIMITS)
    if "max_grad_norm" in numbers:  # infinity means no clipping
        runs.check_limits(script.Args(max_grad_norm=math.inf), script.LIMITS)


# ------------------------------------------------------------------------------------------- folders


def test_simultaneous_starts_get_different_folders(tmp_path):
    with ThreadPool(8) as pool:
        made = pool.map(lambda _: runs.new_run_dir(tmp_path / "runs", "sisl/pursuit_v5", "test", 1), range(32))
    assert len(set(made)) == 32
    assert all(path.is_dir() and path.name.startswith("sisl-pursuit_v5__test__1__") for path in made)


def test_a_runs_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(runs.UsageError, match="cannot write the run folder .*: choose another --runs-dir"):
        runs.new_run_dir(tmp_path / "file", "pursuit", "test", 1)


# --------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_are_read_back_and_bad_ones_are_one_line(tmp_path):
    path = tmp_path / "latest.pt"
    runs.save_checkpoint({"format": "test/1", "x": torch.arange(3)}, path)
    assert runs.load_checkpoint(tmp_path, "test/1")["x"].tolist() == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["latest.pt"]
    with pytest.raises(runs.UsageError, match="has format 'test/1', expected 'test/2'"):
        runs.load_checkpoint(path, "test/2")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(runs.UsageError, match="not a readable checkpoint"):
        runs.load_checkpoint(path, "test/1")
    with pytest.raises(runs.UsageError, match="no checkpoint at"):
        runs.load_checkpoint(tmp_path / "other", "test/1")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "latest.pt"
    runs.save_checkpoint({"format": "test/1", "x": 1}, path)

    def broken_save(checkpoint, file):
        file.write(b"half a checkp")
        raise OSError("no space left on device")

    monkeypatch.setattr(runs.torch, "save", broken_save)
    with pytest.raises(OSError):
        runs.save_checkpoint({"format": "test/1", "x": 2}, path)
    monkeypatch.undo()
    assert runs.load_checkpoint(tmp_path, "test/1")["x"] == 1


def test_the_best_checkpoint_is_taken_where_there_is_one(tmp_path):
    assert runs.best_or_latest(tmp_path) == tmp_path
    (tmp_path / "best.pt").write_bytes(b"")
    assert runs.best_or_latest(tmp_path) == tmp_path / "best.pt"


@dataclass
class OneFlag:
    size: int = 3
    """a number"""


def test_flags_that_no_longer_exist_are_dropped_or_named():
    assert runs.restore_args(OneFlag, {"size": 5, "critic": None}, "runs/a") == OneFlag(5)
    with pytest.raises(runs.UsageError, match="runs/a was made with --critic, which no longer exists"):
        runs.restore_args(OneFlag, {"size": 5, "critic": "runs/b"}, "runs/a")


# ------------------------------------------------------------------------------------------- metrics


def test_metrics_stand_in_the_file_and_those_with_a_slash_in_tensorboard(tmp_path):
    metrics = runs.Metrics(tmp_path, "step", ["step", "update", "losses/a"])
    tags = []
    metrics.writer.add_scalar = lambda tag, value, step: tags.append((tag, value, step))
    metrics.log(10, {"update": 1, "losses/a": 0.5})
    metrics.log(20, {"update": 2, "losses/a": math.nan})
    metrics.close()
    assert tags == [("losses/a", 0.5, 10)]
    rows = runs.read_metrics(tmp_path)
    assert [(row["step"], row["update"], row["losses/a"]) for row in rows] == [("10", "1", "0.5"), ("20", "2", "nan")]


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path):
    metrics = runs.Metrics(tmp_path, "step")
    for step in (1, 2, 3):
        metrics.log(step, {"losses/a": step / 2})
    metrics.close()
    metrics = runs.Metrics(tmp_path, "step", keep_until=2)
    metrics.log(3, {"losses/a": 9.0})
    metrics.close()
    assert [row["losses/a"] for row in runs.read_metrics(tmp_path)] == ["0.5", "1.0", "9.0"]


def test_a_column_that_nobody_announced_is_an_error(tmp_path):
    metrics = runs.Metrics(tmp_path, "step", ["step", "losses/a"])
    with pytest.raises(ValueError, match="losses/b"):
        metrics.log(1, {"losses/b": 1.0})
    metrics.close()


def test_a_learning_curve_is_drawn_also_with_gaps(tmp_path):
    lines = {"return": [1.0, math.nan, 3.0], "loss": [0.1, 0.01, 0.001]}
    panels = [runs.Panel("one", "return", lines), runs.Panel("two", "loss", lines, log_scale=True)]
    runs.plot_learning_curve(tmp_path / "curve.png", [1, 2, 3], "step", panels)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# -------------------------------------------------------------------------------------- command line


def run_command(main, argv=(), limits=None, saved_run=None) -> int:
    return runs.command_line(OneFlag, main, limits or {}, list(argv), saved_run)


def test_exit_codes_of_the_command_line(capsys):
    def raising(error):
        def main(args):
            raise error

        return main

    assert run_command(lambda args: Path("runs/a")) == 0
    assert run_command(lambda args: 1) == 1
    assert run_command(raising(runs.UsageError("the map is too small: enlarge it"))) == 2
    assert capsys.readouterr().err == "error: the map is too small: enlarge it\n"
    assert run_command(raising(FloatingPointError("the loss is nan"))) == 1
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert run_command(lambda args: None, ["--size", "-1"], {"at least 0": (lambda x: x >= 0, "size")}) == 2
    with pytest.raises(ValueError, match="a bug"):  # the program's own error keeps its traceback
        run_command(raising(ValueError("a bug")))


def test_sigterm_where_nothing_listens_ends_with_143_and_gives_the_signal_back(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert run_command(lambda args: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_saved_run_gives_the_defaults_and_refuses_contradictions(capsys):
    seen = []

    def saved_run(args):
        return OneFlag(size=7), ["size"]

    assert run_command(lambda args: seen.append(args.size), [], saved_run=saved_run) == 0
    assert seen == [7]
    assert run_command(lambda args: None, ["--size", "8"], saved_run=saved_run) == 2
    assert "--size 8 contradicts the checkpoint's 7" in capsys.readouterr().err


def test_a_stop_signal_listens_until_it_is_restored(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = runs.StopSignal("epoch")
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    assert "stopping after this epoch" in capsys.readouterr().err
    stop.restore()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_json_is_written_whole(tmp_path):
    runs.write_json(tmp_path / "args.json", {"seed": 1})
    assert json.loads((tmp_path / "args.json").read_text()) == {"seed": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["args.json"]


def test_multiply_adds_are_counted():
    a, b, c = torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(2, 5)
    assert runs.count_multiply_adds(lambda: a @ b) == 2 * 3 * 5
    assert runs.count_multiply_adds(lambda: c.addmm_(a, b)) == 2 * 3 * 5
