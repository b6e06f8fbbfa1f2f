"""Collected data tells what really happened: it is replayed in the genuine game, and who sat where is recorded."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

import collect_data
from collect_data import Args, make_mixes
from dataset import check_alignment, load_dataset, row_fields
from envs.stag_hunt import action_probs
from runs import UsageError


def collect(tmp_path, **kwargs):
    defaults = {"env_id": "stag_hunt", "num_steps": 600, "num_envs": 8, "cuda": False, "data_dir": str(tmp_path)}
    return load_dataset(collect_data.main(Args(**{**defaults, **kwargs})))


@pytest.fixture(scope="module")
def stag_data(tmp_path_factory):
    return collect(tmp_path_factory.mktemp("data"), policies=("nearest_stag", "nearest_hare", "random"))


def test_all_mixes_of_seats_by_hand():
    assert make_mixes(2, 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert len(make_mixes(3, 4)) == 15 and make_mixes(1, 2).tolist() == [[0, 0]]


def test_every_mix_is_played_in_turn(stag_data):
    seats = np.sort(stag_data.policy_ids[stag_data.episode_starts[:-1]], axis=1)
    played = {tuple(row) for row in seats.tolist()}
    assert played == set(itertools.combinations_with_replacement(range(3), 4))
    lopsided = stag_data.policy_ids[stag_data.episode_starts[:-1]]
    assert len({tuple(row) for row in lopsided.tolist()}) > 15  # the same mix in different seats too


def test_rows_are_whole_episodes_and_aligned(stag_data):
    check_alignment(stag_data)
    assert 600 <= stag_data.num_steps < 600 + 8 * 35
    ends = stag_data.episode_starts[1:] - 1
    left = stag_data.active[ends] & ~stag_data.terminations[ends]
    assert (stag_data.truncations[ends] | ~left.any(1)).all()
    assert (stag_data.episode_lengths[stag_data.truncations[ends]] == 35).all()


def test_actions_move_the_agents_as_recorded(stag_data):
    """A second implementation of moving: the agent's own plane before and after, by the recorded action."""
    steps = {0: (-1, 0), 1: (1, 0), 2: (0, -1), 3: (0, 1)}
    goes_on = stag_data.active & ~stag_data.terminations
    for row, seat in np.argwhere(goes_on)[:400]:
        before = np.argwhere(stag_data.observations[row, seat, ..., 0])[0]
        after = np.argwhere(stag_data.next_observations[row, seat, ..., 0])[0]
        np.testing.assert_array_equal(after - before, steps.get(int(stag_data.actions[row, seat]), (0, 0)))


def test_recorded_actions_fit_the_recorded_policy(stag_data):
    """Under the script of another seat some recorded actions would be impossible; under its own none is."""
    rows, seats = np.nonzero(stag_data.active)
    obs, masks = (torch.from_numpy(x[rows, seats]) for x in (stag_data.observations, stag_data.action_masks))
    actions = torch.from_numpy(stag_data.actions[rows, seats])[:, None]
    policies = torch.from_numpy(stag_data.policy_ids[rows, seats])
    probs = torch.stack([action_probs(name, obs, masks) for name in stag_data.meta["policies"]], 1)  # [M, K, n]
    own = probs[torch.arange(len(rows)), policies].gather(1, actions)
    assert (own > 0).all()
    other = probs[torch.arange(len(rows)), 1 - policies.clamp(max=1)][policies < 2].gather(1, actions[policies < 2])
    assert (other == 0).float().mean() > 0.2


def test_seats_are_alike(tmp_path):
    data = collect(tmp_path, num_steps=4000, num_envs=64, policies=("nearest_hare",))
    returns = data.episode_returns()
    error = returns.std(0) / np.sqrt(len(returns))
    assert (np.abs(returns.mean(0) - returns.mean()) < 4 * error + 1e-6).all()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A trained run on the stag hunt."""
    import hyper_mappo

    args = {"env_id": "stag_hunt", "total_timesteps": 256, "num_envs": 8, "num_steps": 32, "num_minibatches": 2}
    args |= {"eval_episodes": 0, "cuda": False, "runs_dir": str(tmp_path_factory.mktemp("runs"))}
    return str(hyper_mappo.main(hyper_mappo.Args(**args)))


def test_a_checkpoint_takes_its_seats(tmp_path, run_dir):
    """Its actions are recorded in its seats only, and its memory starts afresh with each episode."""
    import hyper_mappo

    policy = hyper_mappo.Policy(run_dir)
    assert policy.act.__self__ is policy  # the seam that collect_data.py relies on
    data = collect(tmp_path / "data", policies=(run_dir, "stay"))
    assert data.meta["policies"] == [run_dir, "stay"]
    stays = data.active & (data.policy_ids == 1)
    assert (data.actions[stays] == 4).all()
    assert (data.actions[data.active & (data.policy_ids == 0)] != 4).mean() > 0.3
    with pytest.raises(ValueError, match="has .*'obs_shape': .8, 8, 7.*; use its env"):
        collect(tmp_path / "other", env_id="stag_hunt-8x8-4h1s", policies=(run_dir,))


def test_a_planner_takes_its_seats(tmp_path, monkeypatch):
    import plan

    asked = []

    def load_player(run_dir, env, env_kwargs):
        asked.append((run_dir, env_kwargs))
        return collect_data.make_policy("stay", env)

    monkeypatch.setattr(plan, "load_player", load_player)
    data = collect(tmp_path, policies=("plan:runs/a", "random"), num_steps=100, env_kwargs='{"max_cycles": 9}')
    assert asked == [("runs/a", {"max_cycles": 9})] * 2  # checked before anything is written, then played with
    assert (data.actions[data.active & (data.policy_ids == 0)] == 4).all()
    monkeypatch.undo()
    with pytest.raises(UsageError, match="no_run") as error:
        collect(tmp_path / "other", policies=("plan:no_run",))
    assert "\n" not in str(error.value)


def test_partners_are_drawn_from_their_pool_for_each_episode(tmp_path):
    fields = {"policies": ("random", "stay"), "partners": ("same=nearest_stag,stay,nearest_hare:2", "nearest_hare:1")}
    found = collect(tmp_path, **fields, num_envs=32, num_steps=1500)
    assert found.meta["policies"] == ["random", "stay", "nearest_stag", "nearest_hare"]
    starts = found.episode_starts[:-1]
    seated = found.policy_ids[starts]  # [E, A]
    assert set(seated[:, 0]) == {0, 1} and set(seated[:, 3]) == {3}
    assert (seated[:, 1] == seated[:, 2]).all()
    counts = np.bincount(seated[:, 1], minlength=4)
    assert counts[0] == 0 and (counts[1:] > 0.15 * len(starts)).all()
    for first, last in itertools.pairwise(found.episode_starts):
        assert (found.policy_ids[first:last] == found.policy_ids[first]).all()
    # and it was they who acted
    policies = {1: "stay", 2: "nearest_stag", 3: "nearest_hare"}
    for k, name in policies.items():
        rows, seats = np.nonzero(found.active & (found.policy_ids == k))
        obs, masks = (
            torch.from_numpy(found.observations[rows, seats]),
            torch.from_numpy(found.action_masks[rows, seats]),
        )
        probs = action_probs(name, obs, masks)
        assert (probs[torch.arange(len(rows)), found.actions[rows, seats]] > 0).all()
    again = collect(tmp_path / "again", **fields, num_envs=32, num_steps=1500)
    assert (again.policy_ids == found.policy_ids).all() and (again.actions == found.actions).all()


def test_values_are_the_critics_and_change_nothing_else(tmp_path, run_dir):
    import hyper_mappo

    policies = ("nearest_stag", run_dir, "random")
    plain = collect(tmp_path / "plain", num_steps=300, policies=policies)
    data = collect(tmp_path / "values", num_steps=300, policies=policies, values_of=run_dir)
    assert plain.values is None and plain.meta["values_of"] is None and plain.meta["has_values"] is False
    assert data.meta["values_of"] == Path(run_dir).name and data.meta["has_values"] is True
    for name in row_fields(plain.meta):
        np.testing.assert_array_equal(getattr(data, name), getattr(plain, name))
    critic = hyper_mappo.load_critic(run_dir)
    states, observations = (torch.from_numpy(np.array(x)) for x in (data.states, data.observations))
    expected = critic(states, observations).numpy()
    assert data.values.dtype == np.float32 and data.values.shape == expected.shape
    np.testing.assert_allclose(data.values[data.active], expected[data.active], rtol=1e-4, atol=1e-5)
    assert not data.values[~data.active].any() and data.values[data.active].std() > 0


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"env_id": "stag_hunt-8x8-4h1s"}, r"states \[4, 4, 7\], .* and 4 agents, but .* \[8, 8, 7\], .* and 4"),
        ({"env_id": "pursuit"}, r"states \[4, 4, 7\], .* and 4 agents, but .* \[16, 16, 3\], .* and 8"),
        ({"env_id": "stag_hunt", "env_kwargs": '{"num_players": 3}'}, r"and 4 agents, but .* \[4, 4, 6\], .* and 3"),
        ({"env_id": "stag_hunt", "env_kwargs": '{"view": 1}'}, r"observations \[4, 4, 7\] .* but .* \[1, 1, 7\] and 4"),
        ({"values_of": "no_such_run"}, "no checkpoint at"),
    ],
)
def test_a_critic_of_another_env_is_refused_in_one_line(tmp_path, run_dir, kwargs, message):
    with pytest.raises(UsageError, match=message) as error:
        collect(tmp_path, **{"policies": ("random",), "values_of": run_dir, **kwargs})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_program_is_no_user_error(tmp_path, monkeypatch):
    def broken(*args):
        raise ValueError("a shape of ours")

    monkeypatch.setattr(collect_data, "make_rows", broken)
    with pytest.raises(ValueError, match="a shape of ours"):
        collect_data.cli(["--env-id", "stag_hunt", "--no-cuda", "--data-dir", str(tmp_path)])


def test_a_stopped_collection_keeps_the_episodes_that_ended(tmp_path, monkeypatch, capsys):
    real, calls = collect_data.DatasetWriter.add, []

    def stopped(self, rows, episode_over):
        real(self, rows, episode_over)
        calls.append(self.num_steps)
        if len(calls) == 45:  # before the writer commits by itself
            raise KeyboardInterrupt

    monkeypatch.setattr(collect_data.DatasetWriter, "add", stopped)
    command = ["--env-id", "stag_hunt", "--no-cuda", "--num-envs", "8", "--num-steps", "600", "--name", "toy"]
    command += ["--data-dir", str(tmp_path)]
    assert collect_data.cli(command) == 130
    assert "--resume" in capsys.readouterr().err
    committed = json.loads((tmp_path / "toy.partial" / "progress.json").read_text())["num_steps"]
    assert committed == calls[-1] > 0
    monkeypatch.setattr(collect_data.DatasetWriter, "add", real)
    assert collect_data.cli([*command, "--resume"]) == 0
    check_alignment(load_dataset(tmp_path / "toy"))


def test_same_seed_same_data_other_seed_other_data(tmp_path):
    first, again = (collect(tmp_path / name, num_steps=200) for name in "ab")
    other = collect(tmp_path / "c", num_steps=200, seed=2)
    np.testing.assert_array_equal(first.actions, again.actions)
    assert first.actions.shape != other.actions.shape or (first.actions != other.actions).any()


class TwoOrSixty(ParallelEnv):
    """Episodes of 2 or 60 steps, by chance."""

    metadata = {"name": "two_or_sixty"}
    render_mode = None
    possible_agents = ["a_0", "a_1"]

    def observation_space(self, agent):
        return Box(0, 1, (2,), np.float32)

    def action_space(self, agent):
        return Discrete(3)

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.agents, self.t = list(self.possible_agents), 0
        self.length = self.rng.choice([2, 60])
        return self.observe(), {agent: {} for agent in self.agents}

    def observe(self):
        return {agent: self.rng.random(2, dtype=np.float32) for agent in self.possible_agents}

    def step(self, actions):
        self.t += 1
        over = self.t == self.length
        rewards = {agent: float(self.rng.random()) for agent in self.agents}
        flags = dict.fromkeys(self.agents, False), dict.fromkeys(self.agents, bool(over))
        infos = {agent: {} for agent in self.agents}
        if over:
            self.agents = []
        return self.observe(), rewards, *flags, infos


class Killed(BaseException):
    """As by kill -9: nothing is committed any more."""


@pytest.mark.parametrize("segment_steps", [2000, 20_000])
def test_kills_change_nothing_of_what_is_collected(tmp_path, monkeypatch, segment_steps):
    """Were the episodes in flight lost at each kill, those of 60 steps would be rarer than those of 2."""
    args = {"env_id": "tests.test_collect_data:TwoOrSixty", "num_envs": 8, "num_steps": 6000}
    monkeypatch.setattr(collect_data, "SEGMENT_STEPS", segment_steps)
    monkeypatch.setattr("dataset.COMMIT_SECONDS", 0.0)
    whole = collect(tmp_path / "whole", **args)
    share_long = (whole.episode_lengths == 60).mean()
    assert 0.3 < share_long < 0.7 and set(whole.episode_lengths) == {2, 60}

    real, rng, num_kills = collect_data.DatasetWriter.add, np.random.default_rng(1), 0
    for _ in range(10):
        left = [int(rng.integers(20, 200))]

        def killed(self, rows, episode_over, left=left):
            real(self, rows, episode_over)
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        monkeypatch.setattr(collect_data.DatasetWriter, "add", killed)
        try:
            collect(tmp_path / "killed", **args, resume=True)
        except Killed:
            num_kills += 1
    assert num_kills == 10
    monkeypatch.setattr(collect_data.DatasetWriter, "add", real)
    data = collect(tmp_path / "killed", **args, resume=True)
    for name in row_fields(whole.meta):
        np.testing.assert_array_equal(getattr(data, name), getattr(whole, name))
    check_alignment(data)


def test_a_killed_collection_is_continued_only_when_asked(tmp_path, monkeypatch):
    def killed(self, rows, episode_over):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(collect_data.DatasetWriter, "add", killed)
        with pytest.raises(Killed):
            collect(tmp_path, name="toy")
    with pytest.raises(UsageError, match="--resume"):
        collect(tmp_path, name="toy")
    data = collect(tmp_path, name="toy", resume=True)
    picture = data.path / "summary.png"
    picture.unlink()
    again = collect(tmp_path, name="toy", resume=True)  # done: only what comes after it is done again
    assert picture.stat().st_size > 0 and again.meta == data.meta


def test_sigterm_lets_a_collection_save_and_say_how_to_go_on(tmp_path):
    flags = ["--env-id", "stag_hunt", "--no-cuda", "--num-envs", "4", "--num-steps", "100000000", "--name", "toy"]
    command = [sys.executable, "collect_data.py", *flags, "--data-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("collecting")
    while not json.loads((tmp_path / "toy.partial" / "progress.json").read_text())["num_steps"]:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    progress = json.loads((tmp_path / "toy.partial" / "progress.json").read_text())
    again = (
        f"python collect_data.py --env-id stag_hunt --num-steps 100000000 --num-envs 4 --no-cuda --data-dir {tmp_path}"
    )
    saved = f"{progress['num_steps']} steps in {progress['num_episodes']} episodes saved in {tmp_path / 'toy.partial'}"
    assert said.splitlines()[-1] == f"stopped; {saved}; go on with: {again} --name toy --resume"
    assert list(tmp_path.iterdir()) == [tmp_path / "toy.partial"]  # no lock stays


def test_pursuit_and_the_genuine_env(tmp_path):
    kwargs = {"env_kwargs": '{"max_cycles": 10}', "num_steps": 40, "num_envs": 2}
    data = collect(tmp_path / "twin", env_id="pursuit", **kwargs)
    genuine = collect(tmp_path / "genuine", env_id="pursuit", backend="pettingzoo", **kwargs)
    for d in (data, genuine):
        check_alignment(d)
        assert d.meta["obs_shape"] == [7, 7, 3] and d.num_agents == 8 and d.truncations.sum() == len(d.episode_lengths)
        assert set(np.unique(d.actions)) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"policies": ("nearest_dog",)}, "nearest_stag.*'nearest_dog'"),
        ({"env_id": "pursuit", "policies": ("nearest_stag",)}, "expected random or a run folder"),
        ({"policies": ()}, "at least one"),
        ({"policies": ("random", "random")}, "different names"),
        ({"num_steps": 0}, "at least 1"),
        ({"num_envs": 0}, "--num-envs must be at least 1"),
        ({"env_kwargs": "{max_cycles: 5}"}, "JSON"),
        ({"env_kwargs": "[5]"}, "by name"),
        ({"env_kwargs": "null"}, "by name"),
        ({"env_kwargs": '{"seed": 1}'}, "may not hold seed: use --seed"),
        ({"env_kwargs": '{"num_envs": 1}'}, "may not hold num_envs: use --num-envs"),
        ({"name": 300 * "a"}, "takes 300 bytes"),
        ({"name": ".."}, "holds no letter or number"),
        ({"seed": -1}, "--seed must be from 0 to 2147483647, got -1"),
        ({"env_id": "stag_haunt"}, "stag_hunt"),
        ({"partners": ("pool=random,nearest_dog:3",)}, "nearest_stag.*'nearest_dog'"),
        ({"partners": ("stay:4",)}, "leave at least 1"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, kwargs, message):
    with pytest.raises(UsageError, match=message) as error:
        collect(tmp_path, **kwargs)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    command = [sys.executable, "collect_data.py", "--env-id", "stag_hunt", "--num-steps", "100", "--num-envs", "4"]
    command += ["--policies", "nearest_stag", "stay", "--data-dir", str(tmp_path), "--name", "a:b/c", "--no-cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "nearest_stag: return" in done.stdout and (tmp_path / "a-b-c" / "summary.png").stat().st_size > 0
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "exists" in done.stderr
