import ast
import json
import math
import os
import signal
import subprocess
import sys
import time
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
PROGRAMS = [
    path.stem for path in sorted(ROOT.glob("*.py")) if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]

# Imports run one way: a file may import only what stands on an earlier line (DESIGN.md's order).
ORDER = [
    ["startup"],
    ["runs"],
    ["envs"],
    ["dataset"],
    ["opponent_samples"],
    ["opponent_scores"],
    ["pretrain_vae", "world_model"],
    ["hyper_mappo"],
    ["plan"],
    ["collect_data", "test_obs_reward_model"],
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
    checked_elsewhere = {"heldout_fraction"}  # dataset.split_episodes
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


def test_names_keep_the_letters_of_every_script():
    assert runs.safe_name("a:b/c d") == "a-b-c-d"
    for name in ("追跡_1", "हिन्दी", "Größe", "Gro\u0308ße"):
        assert runs.safe_name(name) == name
    with pytest.raises(runs.UsageError, match="takes 300 bytes, at most 200: give a shorter one"):
        runs.safe_name(300 * "a")
    for name in ("", ".", "..", "-"):
        with pytest.raises(runs.UsageError, match="holds no letter or number"):
            runs.safe_name(name)


def test_a_name_that_is_too_long_for_the_disk_says_so(tmp_path):
    with pytest.raises(runs.UsageError, match="cannot write the run folder .*: give a shorter --exp-name"):
        runs.new_run_dir(tmp_path, 100 * "a", 150 * "b", 1)


@pytest.mark.parametrize(
    "script, name",
    [
        (pretrain_vae, "data"),
        (pretrain_vae, "resume"),
        (hyper_mappo, "evaluate"),
        (collect_data, "policies"),
        (collect_data, "name"),
        (test_obs_reward_model, "checkpoint"),
        (test_obs_reward_model, "data"),
    ],
)
def test_names_of_300_letters_are_one_line(script, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.cli([runs.flag(name), 300 * "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- locks

KEEPER = """
import sys, time
from pathlib import Path
import runs
try:
    runs.keep_folder(Path(sys.argv[1]), "again")
except runs.UsageError as error:
    print(error)
    sys.exit(2)
print("kept", flush=True)
time.sleep(float(sys.argv[2]))
"""


def keeper(folder: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", KEEPER, folder, str(seconds)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_only_one_process_writes_in_a_folder(tmp_path):
    first = keeper(tmp_path, 60)
    assert first.stdout.readline() == "kept\n"
    with pytest.raises(runs.UsageError, match="another process is writing in .*: wait until it is done, or stop it"):
        runs.keep_folder(tmp_path, "again")
    first.kill()  # a lock dies with its process
    first.wait()
    kept = runs.keep_folder(tmp_path, "again")
    second = keeper(tmp_path, 0)
    assert "another process is writing" in second.communicate()[0] and second.returncode == 2
    kept.release()
    assert list(tmp_path.iterdir()) == []
    third = keeper(tmp_path, 0)
    assert third.communicate()[0] == "kept\n" and third.returncode == 0


def test_a_main_that_keeps_a_folder_gives_it_back_also_when_it_fails(tmp_path):
    @runs.run_keeping
    def main(fails):
        runs.keep_folder(tmp_path, "again")
        if fails:
            raise ValueError("a bug")

    for fails in (True, False, True):
        try:
            main(fails)
        except ValueError:
            pass
        other = keeper(tmp_path, 0)
        assert other.communicate()[0] == "kept\n"


def test_leftovers_of_killed_writers_go(tmp_path):
    old, new = tmp_path / "latest.12.tmp.pt", tmp_path / "eval.13.tmp.json"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (time.time() - 1000,) * 2)
    runs.keep_folder(tmp_path, "again").release()
    assert list(tmp_path.iterdir()) == [new]


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


@pytest.fixture
def full_disk():
    """Files of this process can not grow beyond 50 kB."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "latest.pt"
    runs.save_checkpoint({"format": "test/1", "x": 1}, path)
    with pytest.raises(runs.RunError, match="could not write .*latest.pt: file too large") as error:
        runs.save_checkpoint({"format": "test/1", "x": torch.zeros(100_000)}, path)
    assert "\n" not in str(error.value)
    assert runs.load_checkpoint(tmp_path, "test/1")["x"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["latest.pt"]  # no half file stays


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, full_disk):
    panel = runs.Panel("one", "return", {"return": [1.0, 2.0]})
    runs.plot_learning_curve(tmp_path / "curve.png", [1, 2], "step", [panel])
    before = (tmp_path / "curve.png").read_bytes()
    noise = {str(i): torch.rand(500).tolist() for i in range(40)}
    with pytest.raises(runs.RunError, match="could not write .*curve.png"):
        runs.plot_learning_curve(tmp_path / "curve.png", list(range(500)), "step", [runs.Panel("two", "x", noise)])
    assert (tmp_path / "curve.png").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]


def test_every_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(runs.os, "fsync", lambda handle: (calls.append("sync"), real_sync(handle)))
    monkeypatch.setattr(runs.os, "replace", lambda *paths: (calls.append("rename"), real_replace(*paths)))
    runs.write_json(tmp_path / "args.json", {"seed": 1})
    runs.save_checkpoint({"format": "test/1"}, tmp_path / "latest.pt")
    assert calls == ["sync", "rename", "sync"] * 2  # the file, its name, the folder


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    path = tmp_path / "latest.pt"
    x = torch.rand(2000, generator=torch.Generator().manual_seed(1))
    runs.save_checkpoint({"format": "test/1", "x": x}, path)
    sound = path.read_bytes()
    positions = torch.randint(8 * len(sound), (150,), generator=torch.Generator().manual_seed(2))
    num_refused = 0
    for position in positions.tolist():
        damaged = bytearray(sound)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded = runs.load_checkpoint(path, "test/1")
        except runs.UsageError as error:
            num_refused += 1
            assert "\n" not in str(error)
        else:  # the zip's padding
            assert torch.equal(loaded["x"], x) and loaded.keys() == {"format", "x"}
    assert num_refused > 100


def test_a_checkpoint_without_what_is_needed_is_one_line(tmp_path):
    runs.save_checkpoint({"format": "test/1", "args": {}}, tmp_path / "latest.pt")
    assert runs.load_checkpoint(tmp_path, "test/1", needs=["args"])["args"] == {}
    with pytest.raises(runs.UsageError, match="latest.pt holds no update, model: it is damaged"):
        runs.load_checkpoint(tmp_path, "test/1", needs=["args", "update", "model"])


def test_only_weights_that_fit_and_are_numbers_are_loaded():
    def changed(**tensors):
        return {**torch.nn.Linear(2, 3).state_dict(), **tensors}

    layer = torch.nn.Linear(2, 3)
    before = layer.weight.clone()
    lacking = changed()
    del lacking["bias"]
    cases = [
        (changed(bias=torch.zeros(4)), r"its Linear has bias of shape \[4\], expected \[3\]"),
        (changed(bias=3), r"bias of shape \[\], expected \[3\]"),
        (changed(other=torch.zeros(1)), "has other, which is not known here"),
        (changed(bias=torch.tensor([0.0, math.nan, 1.0])), "is NaN or infinite at bias"),
        (lacking, "lacks bias"),
        ([1, 2], "is a list, expected weights by name"),
    ]
    for state, message in cases:
        with pytest.raises(runs.UsageError, match=f"runs/a: its Linear .*{message}|runs/a: {message}") as error:
            runs.load_weights(layer, state, "runs/a")
        assert "\n" not in str(error.value) and torch.equal(layer.weight, before)
    good = changed()
    runs.load_weights(layer, good, "runs/a")
    assert torch.equal(layer.weight, good["weight"])


def test_only_an_optimizer_state_that_fits_is_loaded():
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    runs.load_weights(optimizer, state, "runs/a")
    state["state"][0]["exp_avg"][0, 0] = math.inf
    with pytest.raises(runs.UsageError, match="runs/a: its Adam is NaN or infinite at state.0.exp_avg"):
        runs.load_weights(optimizer, state, "runs/a")
    with pytest.raises(runs.UsageError, match="runs/a: its Adam does not fit"):
        runs.load_weights(
            torch.optim.Adam(torch.nn.Linear(2, 3, bias=False).parameters()), state | {"state": {}}, "runs/a"
        )


def test_the_best_checkpoint_is_taken_where_there_is_one(tmp_path, capsys):
    assert runs.best_or_latest(tmp_path) == tmp_path
    assert capsys.readouterr().err == ""
    (tmp_path / "latest.pt").write_bytes(b"")
    assert runs.best_or_latest(tmp_path) == tmp_path
    assert "has no best.pt: its latest.pt is taken" in capsys.readouterr().err
    (tmp_path / "best.pt").write_bytes(b"")
    assert runs.best_or_latest(tmp_path) == tmp_path / "best.pt"
    assert capsys.readouterr().err == ""


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


def test_damaged_and_missing_rows_are_left_out_and_said(tmp_path, capsys):
    metrics = runs.Metrics(tmp_path, "step", ["step", "losses/a"])
    for step in range(10, 110, 10):
        metrics.log(step, {"losses/a": step / 2})
    metrics.close()
    path = tmp_path / "metrics.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = b"3\xff0,1\r\n"  # step 30
    del lines[6]  # step 60
    lines[-1] = b"100,5"  # half of 50.0: reads like a number, but the line has no end
    path.write_bytes(b"".join(lines))
    assert [row["step"] for row in runs.read_metrics(tmp_path)] == ["10", "20", "40", "50", "70", "80", "90"]
    metrics = runs.Metrics(tmp_path, "step", ["step", "losses/a"], keep_until=100)
    metrics.log(110, {"losses/a": 55.0})
    metrics.close()
    said = capsys.readouterr().err
    assert "metrics.csv: 2 damaged rows are left out" in said
    for first, last in ((20, 40), (50, 70)):
        assert f"rows are missing between step {first} and {last}" in said
    assert [row["step"] for row in runs.read_metrics(tmp_path)] == ["10", "20", "40", "50", "70", "80", "90", "110"]


def test_rows_that_a_power_cut_took_are_said(tmp_path, capsys):
    metrics = runs.Metrics(tmp_path, "step", ["step", "losses/a"])
    for step in (10, 20, 30):
        metrics.log(step, {"losses/a": 1.0})
    metrics.close()
    runs.Metrics(tmp_path, "step", keep_until=30).close()
    assert capsys.readouterr().err == ""
    runs.Metrics(tmp_path, "step", keep_until=60).close()
    assert "rows are missing between step 30 and 60" in capsys.readouterr().err
    (tmp_path / "metrics.csv").unlink()
    runs.Metrics(tmp_path, "step", keep_until=30).close()
    assert "rows are missing between step 0 and 30" in capsys.readouterr().err


def test_metrics_that_cannot_be_opened_are_one_line(tmp_path, monkeypatch):
    really_open = open

    def no_appending(path, mode="r", *args, **kwargs):
        if mode == "a":
            raise PermissionError(13, "Permission denied")
        return really_open(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", no_appending)
    with pytest.raises(runs.RunError, match="could not write .*metrics.csv: permission denied"):
        runs.Metrics(tmp_path, "step", ["step", "losses/a"])


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


def keep_and_raise(folder, error, saved="update 3 of 9"):
    @runs.run_keeping
    def main(args):
        kept = runs.keep_folder(folder, "python train.py --resume RUN")
        kept.saved = saved
        raise error

    return main


def test_whatever_ends_a_run_says_in_one_line_what_is_saved_and_how_to_go_on(tmp_path, capsys):
    cases = [
        (KeyboardInterrupt(), 130, "interrupted"),
        (runs.Terminated(), 143, "terminated"),
        (runs.RunError("env 3: it is broken"), 1, "error: env 3: it is broken"),
        (FloatingPointError("the loss is nan"), 1, "error: the loss is nan"),
        (MemoryError(), 1, "error: out of memory (no room for an array): make the run smaller"),
        (OSError(28, "No space left on device", "a.csv"), 1, "error: could not write a.csv: no space left on device"),
        (
            RuntimeError("[enforce fail at alloc_cpu] DefaultCPUAllocator: can't allocate memory: you"),
            1,
            "out of memory",
        ),
    ]
    for error, code, reason in cases:
        assert run_command(keep_and_raise(tmp_path, error)) == code
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and reason in said
        assert said.endswith(f"; update 3 of 9 saved in {tmp_path}; go on with: python train.py --resume RUN\n")
    assert run_command(keep_and_raise(tmp_path, KeyboardInterrupt(), saved="")) == 130
    assert capsys.readouterr().err == f"interrupted; nothing saved yet in {tmp_path}\n"
    with pytest.raises(FileNotFoundError):  # a missing file is the program's own error
        run_command(keep_and_raise(tmp_path, FileNotFoundError(2, "No such file")))


def test_the_traceback_of_what_others_did_wrong_goes_to_a_file(tmp_path, capsys):
    def main(args):
        try:
            raise KeyError("agent_3")
        except KeyError as error:
            raise runs.RunError("env: its step raised KeyError: agent_3") from error

    def keeps(args):
        runs.keep_folder(tmp_path, "again")
        main(args)

    assert run_command(runs.run_keeping(keeps)) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"see {tmp_path / 'error.log'}" in said
    log = (tmp_path / "error.log").read_text()
    assert "Traceback" in log and "KeyError: 'agent_3'" in log


def test_a_command_can_be_typed(tmp_path):
    words = runs.command(str(ROOT / "runs.py"), "--resume", tmp_path / "a b")
    assert words.startswith("python ") and words.endswith(f" --resume '{tmp_path / 'a b'}'")


def test_infinity_is_no_number_but_where_it_turns_something_off(capsys):
    limits = {"at least 0": (lambda x: x >= 0, "size")}
    with pytest.raises(runs.UsageError, match="--size must be a finite number, at least 0, got inf"):
        runs.check_limits(OneFlag(math.inf), limits)


@pytest.mark.parametrize("text", ["null", "[1]", "3", "{max_cycles: 3}", '"x"'])
def test_env_kwargs_are_arguments_by_name(text):
    with pytest.raises(runs.UsageError, match="--env-kwargs must be arguments by name in JSON"):
        runs.parse_env_kwargs(text)


@pytest.mark.parametrize("name", ["seed", "num_envs", "device", "render_mode", "backend"])
def test_env_kwargs_hold_nothing_that_has_a_flag(name):
    assert runs.parse_env_kwargs('{"max_cycles": 3}') == {"max_cycles": 3}
    with pytest.raises(runs.UsageError, match=f"--env-kwargs may not hold {name}"):
        runs.parse_env_kwargs(json.dumps({name: 1}))


def test_an_ascii_terminal_gets_no_error():
    program = "import runs; from tests.test_runs import OneFlag; "
    program += "runs.command_line(OneFlag, lambda args: print('1 \u00b1 2'), {}, [])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout) == (0, b"1 ? 2\n"), done.stderr


@pytest.mark.parametrize("flushed", [True, False])
def test_a_closed_pipe_ends_a_program_quietly(flushed):
    program = "import sys, runs; from tests.test_runs import OneFlag\n"
    program += "def main(args):\n"
    program += "    sys.stdin.read()\n"  # until the reader has closed its end
    program += f"    print('nobody reads this', flush={flushed})\n"
    program += "sys.exit(runs.command_line(OneFlag, main, {}, []))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 1)


def test_a_saved_run_gives_the_defaults_and_refuses_contradictions(capsys):
    seen = []

    def saved_run(args):
        return OneFlag(size=7), ["size"]

    assert run_command(lambda args: seen.append(args.size), [], saved_run=saved_run) == 0
    assert seen == [7]
    assert run_command(lambda args: None, ["--size", "8"], saved_run=saved_run) == 2
    assert "--size 8 contradicts the checkpoint's 7" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="there terminate() asks nobody")
@pytest.mark.parametrize(
    "number, code, word", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("script", ["collect_data", "pretrain_vae", "test_obs_reward_model", "dataset"])
def test_a_signal_while_a_script_imports_is_one_line(script, number, code, word):
    command = [sys.executable, "-X", "importtime", "-m", script]  # it says what has been imported
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stderr:
        if line.endswith(" startup\n"):
            break
    process.send_signal(number)
    said = [line for line in process.stderr if not line.startswith("import time:")]
    process.wait()
    assert (process.returncode, said) == (code, [f"{word} while starting or ending: nothing was changed\n"])


STOP_AT_TORCH = """
import os, sys

class Finder:
    def find_spec(name, path, target=None):
        if name == "torch":
            print(os.environ["OMP_WAIT_POLICY"])
            sys.exit()

sys.meta_path.insert(0, Finder)
import {script}
"""


@pytest.mark.parametrize("script", PROGRAMS)
def test_threads_are_told_to_wait_asleep_before_torch_is_imported(script):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", STOP_AT_TORCH.format(script=script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "PASSIVE\n", done.stderr


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path, monkeypatch, capsys):
    import wandb

    given = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda prompt: prompt)  # False: there is no login, and it did not ask
    monkeypatch.setattr(wandb, "init", lambda **kwargs: given.append(kwargs))
    for _ in range(2):
        runs.start_wandb(tmp_path, "project", None, {"seed": 1})
    (tmp_path / "other").mkdir()
    runs.start_wandb(tmp_path / "other", "project", None, {"seed": 1})
    assert "wandb sync" in capsys.readouterr().out
    first, again, other = (kwargs["id"] for kwargs in given)
    assert first == again != other
    assert all(kwargs["resume"] == "allow" and kwargs["mode"] == "offline" for kwargs in given)


def test_a_stop_signal_listens_until_it_is_restored(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = runs.StopSignal("epoch")
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    assert "stopping after this epoch" in capsys.readouterr().err
    with pytest.raises(runs.Terminated):  # the second one waits for nothing
        os.kill(os.getpid(), signal.SIGTERM)
    stop.restore()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_main_that_breaks_down_gives_the_signals_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    @runs.run_keeping
    def breaks(args):
        runs.StopSignal()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks(None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_json_is_written_whole(tmp_path):
    runs.write_json(tmp_path / "args.json", {"seed": 1})
    assert json.loads((tmp_path / "args.json").read_text()) == {"seed": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["args.json"]


def test_multiply_adds_are_counted():
    a, b, c = torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(2, 5)
    assert runs.count_multiply_adds(lambda: a @ b) == 2 * 3 * 5
    assert runs.count_multiply_adds(lambda: c.addmm_(a, b)) == 2 * 3 * 5
