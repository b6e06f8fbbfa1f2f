"""The dataset format: what is written is what is read, and what is not whole is not read."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from dataset import (
    DatasetWriter,
    check_alignment,
    cli,
    describe,
    ego_order,
    load_dataset,
    make_meta,
    rotate_to_ego,
    row_fields,
    same_data,
)
from runs import RunError, UsageError

A, OBS_SHAPE, LENGTHS = 3, (2, 2), (3, 5, 2)  # agents, observation shape, episode length of each of the three envs


def tiny_meta(obs_dtype="uint8", **kwargs):
    policies = ["left", "right"]
    return make_meta(
        "toy", {"size": 2}, A, OBS_SHAPE, obs_dtype, (4,), "float32", 4, (), True, policies, seed=0, **kwargs
    )


def feed(writer, num_steps, first_step=0, break_field=None):
    """Three envs with episodes of LENGTHS steps; every number tells its env, step and seat."""
    for step in range(first_step, first_step + num_steps):
        t = np.array([step % length for length in LENGTHS])
        episode = np.array([step // length for length in LENGTHS])
        over = t == np.array(LENGTHS) - 1
        active = np.ones((3, A), bool)
        active[:, 2] = t < 1  # seat 2 leaves after its first step
        seat_code = 10 * np.arange(3)[:, None] + np.arange(A)  # [N, A]
        obs = np.broadcast_to(
            (seat_code + 40 * (episode[:, None] % 2))[..., None, None] + t[:, None, None, None], (3, A, 2, 2)
        )
        rows = {
            "observations": obs.astype(np.float32),
            "next_observations": obs.astype(np.float32) + 1,
            "states": np.broadcast_to(t[:, None], (3, 4)).astype(np.float32),
            "actions": (seat_code + t[:, None]) % 4,
            "rewards": np.where(active, 1.0, 0.0) * (1 + np.arange(A)),
            "terminations": np.stack([np.zeros(3, bool), np.zeros(3, bool), t == 0], 1),
            "truncations": over,
            "active": active,
            "action_masks": np.ones((3, A, 4), bool),
            "policy_ids": np.stack([np.arange(3) % 2, np.ones(3), np.zeros(3)], 1).astype(np.int64),
        }
        if break_field:
            break_field(rows)
        writer.add(rows, over)


def tiny_dataset(tmp_path, num_steps=30, **kwargs):
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3)
    feed(writer, num_steps, **kwargs)
    return writer.close()


def test_rows_come_back_by_episode_in_time_order(tmp_path):
    data = load_dataset(tiny_dataset(tmp_path))
    assert data.num_steps == 90 and len(data.episode_lengths) == 10 + 6 + 15
    assert isinstance(data.observations, np.memmap) and data.observations.dtype == np.uint8
    for start, stop in zip(data.episode_starts[:-1], data.episode_starts[1:], strict=True):
        length = stop - start
        env = LENGTHS.index(length)
        np.testing.assert_array_equal(data.timesteps[start:stop], np.arange(length))
        np.testing.assert_array_equal(data.observations[start:stop, :, 0, 0] % 40 // 10, np.full((length, A), env))
        np.testing.assert_array_equal(data.observations[start:stop, 1, 0, 0] % 10, 1 + np.arange(length))
        np.testing.assert_array_equal(data.actions[start:stop, 1], (10 * env + 1 + np.arange(length)) % 4)
    check_alignment(data)


def test_seats_that_left_have_no_action(tmp_path):
    data = load_dataset(tiny_dataset(tmp_path))
    assert (data.actions[~data.active] == -1).all() and (data.actions[data.active] >= 0).all()
    np.testing.assert_allclose(data.episode_returns()[:, 2], 3.0)  # one step of 3
    np.testing.assert_allclose(data.episode_returns()[:, 1], 2.0 * data.episode_lengths)
    assert "2 seats" not in describe(data) and "inactive" in describe(data)


def test_an_unfinished_collection_is_no_dataset_and_can_be_continued(tmp_path):
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3)
    feed(writer, 12)
    writer.flush()
    committed = writer.num_steps
    feed(writer, 11, first_step=12)  # written but never committed: lost
    for file in writer.files.values():
        file.flush()  # the process dies here
    with pytest.raises(UsageError, match="unfinished"):
        load_dataset(tmp_path / "toy")
    with pytest.raises(UsageError, match="--resume"):
        DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3)
    other = tiny_meta() | {"seed": 5}
    with pytest.raises(UsageError, match="seed 0, not 5"):
        DatasetWriter(tmp_path / "toy", other, num_envs=3, resume=True)
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3, resume=True)
    assert writer.num_steps == committed
    feed(writer, 30)  # the same again: what was committed is not written twice
    data = load_dataset(writer.close())
    assert data.num_steps == 90
    check_alignment(data)
    with pytest.raises(UsageError, match="exists"):
        DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3)


def test_memory_holds_only_episodes_in_flight(tmp_path):
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3)
    feed(writer, 1000)
    assert len(writer.steps) < 64 + max(LENGTHS) + 1


def test_a_full_disk_is_one_line_and_leaves_no_dataset(tmp_path):
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3)
    feed(writer, 20)
    writer.flush()

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    committed, real = writer.num_steps, writer.files["rewards"]
    writer.files["rewards"] = FullDisk(real)
    with pytest.raises(RunError, match="could not write .*toy.partial: no space left on device") as error:
        feed(writer, 10, first_step=20)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="unfinished"):
        load_dataset(tmp_path / "toy")
    for file in (*writer.files.values(), real):
        file.close()
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3, resume=True)
    assert writer.num_steps == committed
    feed(writer, 30)
    data = load_dataset(writer.close())
    assert data.num_steps == 90
    check_alignment(data)


def rewrite(path, name, change):
    """Changes a field as whoever writes a wrong one would: with the right checksum, or none."""
    meta = json.loads((path / "meta.json").read_text())
    meta["checksums"].pop(name, None)
    (path / "meta.json").write_text(json.dumps(meta))
    array = np.array(np.load(path / f"{name}.npy"))
    np.save(path / f"{name}.npy", change(array))


def set_first(value):
    def change(array):
        array.reshape(-1)[0] = value
        return array

    return change


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("rewards", lambda x: x.astype(np.float64), "expected float32"),
        ("rewards", lambda x: x[:-1], r"expected float32 \(90, 3\), got float32 \(89, 3\)"),
        ("observations", lambda x: x[..., :1], r"\(90, 3, 2, 2\)"),
        ("actions", set_first(4), r"0 \.\.\. 3"),
        ("actions", set_first(-1), r"0 \.\.\. 3"),
        ("rewards", set_first(np.nan), "NaN"),
        ("states", set_first(np.inf), "NaN or inf"),
        ("policy_ids", set_first(7), r"0 \.\.\. 1"),
        ("timesteps", set_first(1), "in every episode"),
        ("truncations", lambda x: x & False, "whole episodes"),
        ("action_masks", lambda x: x & False, "legal actions"),
    ],
)
def test_a_wrong_field_is_one_line(tmp_path, name, change, message):
    path = tiny_dataset(tmp_path)
    rewrite(path, name, change)
    with pytest.raises(UsageError, match=message) as error:
        load_dataset(path)
    assert "\n" not in str(error.value)


def test_missing_truncated_and_foreign_files(tmp_path):
    with pytest.raises(UsageError, match="found none"):
        load_dataset(tmp_path / "nowhere")
    path = tiny_dataset(tmp_path)
    file = path / "rewards.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(UsageError, match="truncated"):
        load_dataset(path)
    file.unlink()
    with pytest.raises(UsageError, match="missing"):
        load_dataset(path)
    np.save(file, np.array([{"a": "pickle in disguise"}]), allow_pickle=True)
    with pytest.raises(UsageError, match="plain numbers"):
        load_dataset(path)
    file.write_bytes(whole)
    load_dataset(path)
    meta = json.loads((path / "meta.json").read_text())
    for broken in ({"format": "hdf5"}, [], {**meta, "version": 99}, {**meta, "num_steps": 0}):
        (path / "meta.json").write_text(json.dumps(broken))
        with pytest.raises(UsageError, match="marl-dataset version 1"):
            load_dataset(path)


def test_nan_observations_are_found(tmp_path):
    writer = DatasetWriter(tmp_path / "toy", tiny_meta("float32"), num_envs=3)
    feed(writer, 30)
    path = writer.close()
    load_dataset(path)
    rewrite(path, "observations", set_first(np.nan))
    with pytest.raises(UsageError, match="observations.npy: expected finite numbers"):
        load_dataset(path)


def flip_a_bit(file, rng):
    content = bytearray(file.read_bytes())
    header = 10 + int.from_bytes(content[8:10], "little")
    position = rng.integers(8 * header, 8 * len(content))
    content[position // 8] ^= 1 << position % 8
    file.write_bytes(content)


def test_a_flipped_bit_of_any_field_is_found(tmp_path, capsys):
    path = dataset_with_values(tmp_path)
    rng = np.random.default_rng(1)
    fields = row_fields(load_dataset(path).meta)
    assert len(fields) == 13 and cli([str(path)]) == 0
    for name in fields:
        file = path / f"{name}.npy"
        sound = file.read_bytes()
        for _ in range(5):
            flip_a_bit(file, rng)
            assert cli([str(path)]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and f"{name}.npy" in said
            if name not in ("observations", "next_observations", "states"):  # these take long: python -m dataset
                with pytest.raises(UsageError, match=f"{name}.npy"):
                    load_dataset(path)
            file.write_bytes(sound)
    load_dataset(path, every_checksum=True)


def test_a_dataset_from_before_there_were_checksums_still_loads(tmp_path):
    path = tiny_dataset(tmp_path)
    meta = json.loads((path / "meta.json").read_text())
    assert sorted(meta.pop("checksums")) == sorted(row_fields(meta)) and meta.pop("segment")
    (path / "meta.json").write_text(json.dumps(meta))
    data = load_dataset(path, every_checksum=True)
    assert data.meta["checksums"] == {}
    assert same_data(meta, data) and not same_data({**meta, "seed": 5}, data)


def test_actions_of_several_parts(tmp_path):
    meta = make_meta(
        "toy", {}, A, OBS_SHAPE, "uint8", (4,), "float32", None, (2,), True, ["left", "right"], seed=0, nvec=[4, 3]
    )

    def in_parts(rows):
        rows["actions"] = np.stack([rows["actions"], rows["actions"] % 3], 2)  # [N, A, 2]
        rows["action_masks"] = np.zeros((3, A, 7), bool)
        for part, first in ((0, 0), (1, 4)):
            np.put_along_axis(rows["action_masks"], first + rows["actions"][..., part, None], True, 2)

    writer = DatasetWriter(tmp_path / "toy", meta, num_envs=3)
    feed(writer, 30, break_field=in_parts)
    path = writer.close()
    data = load_dataset(path)
    assert data.actions.shape == (90, A, 2) and data.actions.dtype == np.int64
    assert (data.actions[~data.active] == -1).all() and (data.actions[data.active].max(0) == [3, 2]).all()
    actions = np.array(data.actions)
    for wrong in ([0, 3], [4, 0], [0, -1]):
        rewrite(path, "actions", lambda x, wrong=wrong: np.where(np.arange(90)[:, None, None] == 0, wrong, actions))
        with pytest.raises(UsageError, match=r"0 \.\.\. 3 and 0 \.\.\. 2, and -1"):
            load_dataset(path)
    rewrite(path, "actions", lambda x: np.where(data.active[..., None], (actions + 1) % [4, 3], -1))
    with pytest.raises(UsageError, match="legal actions"):
        load_dataset(path)


def test_data_is_known_by_its_content_wherever_it_lies(tmp_path):
    path = tiny_dataset(tmp_path)
    saved = load_dataset(path).meta
    shutil.move(path, tmp_path / "elsewhere")
    moved = load_dataset(tmp_path / "elsewhere")
    assert same_data(saved, moved)
    other = load_dataset(tiny_dataset(tmp_path / "other", break_field=lambda rows: rows["rewards"].fill(2.0)))
    assert other.meta["num_steps"] == saved["num_steps"] and not same_data(saved, other)


@pytest.mark.parametrize(
    "change",
    [
        {"num_agents": "3"},
        {"num_agents": -1},
        {"num_steps": 1e400},
        {"num_steps": True},
        {"obs_shape": 5},
        {"obs_shape": [2, "2"]},
        {"obs_dtype": "object"},
        {"obs_dtype": "no_type"},
        {"num_actions": [4]},
        {"policies": 3},
        {"policies": [1, 2]},
        {"env_kwargs": "{}"},
        {"env_id": None},
        {"checksums": [1]},
        {"segment": {}},
    ],
)
def test_a_malformed_meta_is_one_line(tmp_path, change):
    path = tiny_dataset(tmp_path)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(UsageError, match="meta.json: expected marl-dataset version 1") as error:
        load_dataset(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"x"', "3", "\x00"])
def test_a_meta_that_is_no_json_object_is_one_line(tmp_path, text):
    path = tiny_dataset(tmp_path)
    (path / "meta.json").write_text(text)
    with pytest.raises(UsageError, match="meta.json: expected marl-dataset version 1") as error:
        load_dataset(path)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
@pytest.mark.parametrize("name", ["meta.json", "rewards.npy"])
def test_folders_and_pipes_in_place_of_files_are_one_line(tmp_path, name):
    path = tiny_dataset(tmp_path)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(UsageError, match="no plain file"):
        load_dataset(path)
    (path / name).unlink()
    (path / name).mkdir()
    with pytest.raises(UsageError, match="no plain file"):
        load_dataset(path)


@pytest.mark.parametrize("header", [b"\xff" * 118, b"{'descr': '<f4', " + b" " * 101, b"(" * 118])
def test_a_malformed_header_is_one_line(tmp_path, header):
    path = tiny_dataset(tmp_path)
    file = path / "rewards.npy"
    content = file.read_bytes()
    file.write_bytes(content[:10] + header + content[128:])
    with pytest.raises(UsageError, match="rewards.npy: expected float32 .*plain numbers") as error:
        load_dataset(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, place, message",
    [
        ("rewards", (1, 2), "rewards of agent 2 in env 1, step 4 of its episode, is nan"),
        ("observations", (2, 0, 1, 1), "observations of agent 0 in env 2, step 0 of its episode, is nan"),
        ("next_observations", (0, 1, 0, 0), "next_observations of agent 1 in env 0, step 1 of its episode, is nan"),
        ("states", (0, 3), "states in env 0, step 1 of its episode, is nan"),
    ],
)
def test_nan_is_refused_when_it_is_written(tmp_path, name, place, message):
    writer = DatasetWriter(tmp_path / "toy", tiny_meta("float32"), num_envs=3)
    feed(writer, 4)

    def break_field(rows):
        rows[name] = np.array(rows[name], np.float32)
        rows[name][place] = np.nan

    with pytest.raises(RunError, match=message):
        feed(writer, 1, first_step=4, break_field=break_field)
    writer.release()
    assert not (tmp_path / "toy").exists()


def test_a_collection_that_committed_nothing_begins_when_it_is_resumed(tmp_path):
    (tmp_path / "toy.partial").mkdir()
    with pytest.raises(UsageError, match="continue it with --resume or delete it"):
        DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3)
    for _ in range(2):
        writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3, resume=True)
        assert writer.num_steps == 0
        writer.release()
        (tmp_path / "toy.partial" / "progress.json").unlink()  # killed before it was there
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3, resume=True)
    feed(writer, 30)
    assert load_dataset(writer.close()).num_steps == 90
    other = DatasetWriter(tmp_path / "new", tiny_meta(), num_envs=3, resume=True)  # not even the folder was made
    assert other.num_steps == 0 and not other.finished


@pytest.mark.parametrize("moment", ["unlink", "replace"])
def test_a_collection_that_was_killed_while_it_got_its_name_is_whole(tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        if str(args[0]).endswith((".partial", "progress.json")):
            raise Killed
        return real(*args, **kwargs)

    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3)
    feed(writer, 30)
    where = type(tmp_path) if moment == "unlink" else os
    real = getattr(where, moment)
    monkeypatch.setattr(where, moment, killed)
    with pytest.raises(Killed):
        writer.close()
    monkeypatch.undo()
    assert (tmp_path / "toy.partial").exists() and not (tmp_path / "toy").exists()
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3, resume=True)
    assert writer.finished
    assert load_dataset(writer.close(), every_checksum=True).num_steps == 90
    assert DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3, resume=True).finished  # also once it has its name


def test_two_collections_do_not_write_in_one_folder(tmp_path):
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3)
    program = "import sys; sys.path.insert(0, 'tests'); from test_dataset import *; "
    program += "DatasetWriter(sys.argv[1], tiny_meta(), num_envs=3, resume=True)"
    command = [sys.executable, "-c", program, str(tmp_path / "toy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "another process is writing in" in done.stderr
    feed(writer, 30)
    assert load_dataset(writer.close(), every_checksum=True).num_steps == 90
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_misaligned_observations_are_found(tmp_path):
    path = tiny_dataset(tmp_path)
    rewrite(path, "next_observations", lambda x: np.roll(x, 1, axis=0))
    with pytest.raises(UsageError, match="next row"):
        check_alignment(load_dataset(path))


def test_a_row_of_wrong_shape_is_refused_by_the_writer(tmp_path):
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3)
    with pytest.raises(ValueError, match="rewards of a row") as error:
        feed(writer, 5, break_field=lambda rows: rows.update(rewards=np.zeros((3, 2))))
    assert not isinstance(error.value, UsageError)  # a mistake of the program that calls it


def dataset_with_values(tmp_path):
    """The value of a seat is 10 times its number, also where the agent has left."""
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(values_of="run"), num_envs=3)
    value = np.broadcast_to(10.0 * (1 + np.arange(A)), (3, A)).copy()
    feed(writer, 30, break_field=lambda rows: rows.update(values=value))
    return writer.close()


def test_values_travel_in_the_data_and_are_zero_for_agents_that_left(tmp_path):
    path = dataset_with_values(tmp_path)
    data = load_dataset(path)
    assert data.values.shape == (90, A) and data.values.dtype == np.float32
    assert data.meta["has_values"] is True and data.meta["values_of"] == "run"
    np.testing.assert_array_equal(data.values, data.active * 10.0 * (1 + np.arange(A)))
    expected = (10 * 90 + 20 * 90 + 30 * 31) / (90 + 90 + 31)  # seat 2 is there in the first step of each episode
    assert f"values of run: mean {expected:.3f}, 10.000 ... 30.000" in describe(data)
    rewrite(path, "values", lambda x: x + 1)
    with pytest.raises(UsageError, match="values.npy: expected 0 for agents that have left"):
        load_dataset(path)
    rewrite(path, "values", lambda x: np.where(x == 1, 0, np.nan).astype(np.float32))
    with pytest.raises(UsageError, match="values.npy: expected finite numbers"):
        load_dataset(path)
    (path / "values.npy").unlink()
    with pytest.raises(UsageError, match="values.npy.*missing"):
        load_dataset(path)


def test_a_dataset_from_before_there_were_values_still_loads(tmp_path):
    path = tiny_dataset(tmp_path)
    meta = json.loads((path / "meta.json").read_text())
    assert meta.pop("has_values") is False and meta.pop("values_of") is None
    (path / "meta.json").write_text(json.dumps(meta))
    data = load_dataset(path)
    assert data.values is None and data.meta["has_values"] is False and "values" not in describe(data)


def test_a_collection_from_before_there_were_values_is_continued_without(tmp_path):
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3)
    feed(writer, 12)
    writer.flush()
    file = writer.partial / "progress.json"
    old = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("has_values", "values_of")}
    file.write_text(json.dumps(old))
    with pytest.raises(UsageError, match="has_values|values_of"):
        DatasetWriter(tmp_path / "toy", tiny_meta(values_of="run"), num_envs=3, resume=True)
    writer = DatasetWriter(tmp_path / "toy", tiny_meta(), num_envs=3, resume=True)
    feed(writer, 30)
    assert load_dataset(writer.close()).values is None


def test_an_empty_collection_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="no episode has ended"):
        tiny_dataset(tmp_path, num_steps=1)


def test_split_is_by_episode_and_holds_out_policies(tmp_path):
    data = load_dataset(tiny_dataset(tmp_path))
    split = data.split_episodes(seed=1, heldout_fraction=0.25)
    assert len(split["heldout_policies"]) == 0
    assert sorted(np.concatenate(list(split.values()))) == list(range(31))
    assert len(split["heldout_episodes"]) == 8
    again, other = data.split_episodes(1, 0.25), data.split_episodes(2, 0.25)
    np.testing.assert_array_equal(split["train"], again["train"])
    assert not np.array_equal(split["train"], other["train"])
    rows = {name: set(data.rows_of(episodes)) for name, episodes in split.items()}
    assert sum(map(len, rows.values())) == 90 and not rows["train"] & rows["heldout_episodes"]
    for name, part in rows.items():
        assert set(data.episode_ids[sorted(part)]) == set(split[name])


def test_held_out_policies_sit_in_no_training_episode(tmp_path):
    def mixed(rows):
        rows["policy_ids"] = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])

    data = load_dataset(tiny_dataset(tmp_path, break_field=mixed))
    split = data.split_episodes(seed=0, holdout_policies=("right",))
    seats = data.policy_ids[data.episode_starts[:-1]]
    assert (seats[split["heldout_policies"]] == 1).any(1).all() and len(split["heldout_policies"]) == 6
    assert (seats[split["train"]] == 0).all() and (seats[split["heldout_episodes"]] == 0).all()
    with pytest.raises(UsageError, match="one of left, right, got 'centre'"):
        data.split_episodes(0, holdout_policies=("centre",))
    with pytest.raises(UsageError, match="between 0 and 1"):
        data.split_episodes(0, heldout_fraction=1.0)
    with pytest.raises(UsageError, match="collect more"):
        data.split_episodes(0, holdout_policies=("left",))


def test_ego_order_by_hand():
    assert ego_order(4).tolist() == [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]]
    actions = torch.tensor([[10, 11, 12], [20, 21, 22]])
    assert rotate_to_ego(actions, 1, axis=1).tolist() == [[11, 12, 10], [21, 22, 20]]
    assert rotate_to_ego(actions, torch.tensor([2, 1]), axis=1).tolist() == [[12, 10, 11], [21, 22, 20]]
    planes = torch.arange(2 * 5 * 3).view(2, 5, 3)
    ego = rotate_to_ego(planes, torch.tensor([0, 2]), axis=-1)
    assert torch.equal(ego[0], planes[0]) and torch.equal(ego[1], planes[1][:, [2, 0, 1]])


def test_command_line(tmp_path):
    path = tiny_dataset(tmp_path)
    done = subprocess.run([sys.executable, "-m", "dataset", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "90 steps in 31 episodes" in done.stdout and "valid" in done.stdout
    done = subprocess.run([sys.executable, "-m", "dataset", "nowhere"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_command_line_without_a_dataset_says_how(capsys):
    assert cli([]) == 2
    assert capsys.readouterr().err == "usage: python -m dataset data/NAME\n"


def test_an_error_of_the_program_is_no_user_error(tmp_path, monkeypatch):
    def broken(dataset):
        raise ValueError("a shape of ours")

    monkeypatch.setattr("dataset.describe", broken)
    with pytest.raises(ValueError, match="a shape of ours"):
        cli([str(tiny_dataset(tmp_path))])
