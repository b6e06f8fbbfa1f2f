"""Markov Snowdrift against its rules: positions by hand, and a slow env in plain Python, written from the rules.

What it shares with the stag hunt (maps, blocks, views, seeds, bad input) is tested in test_stag_hunt.py.
"""

from __future__ import annotations

import io
import random

import numpy as np
import pettingzoo
import pytest
import torch
from grid_games import play_beside_slow_envs
from pettingzoo.test import parallel_api_test, parallel_seed_test

from envs import describe_obs, make_vec_env, snowdrift
from envs.grid_game import ego_order, sample_actions
from envs.snowdrift import PRESETS, SCRIPTED, SnowdriftVecEnv, action_probs, parallel_env, preset_options
from runs import UsageError

UP, DOWN, LEFT, RIGHT, STAY, CLEAR = range(6)


def place(players, drifts, blocks=(), side=4, **options):
    """One env with bodies at (row, column); returns it and its first EnvStep."""
    env = SnowdriftVecEnv(
        1,
        "cpu",
        0,
        height=side,
        width=side,
        num_players=len(players),
        num_drifts=len(drifts),
        num_blocks=len(blocks),
        **options,
    )
    bodies = [*players, *blocks, *drifts]
    return env, env.set_positions(torch.tensor([[row * side + col for row, col in bodies]]))


def act(env, *actions):
    return env.step(torch.tensor([actions]))


def drifts_of(state):
    return {tuple(cell) for cell in state[0, ..., -1].nonzero().tolist()}


# The rules, one at a time


def test_one_clears_and_everyone_is_paid():
    env, _ = place([(1, 1), (0, 0), (3, 3)], [(1, 1), (2, 2)])
    step = act(env, CLEAR, STAY, UP)
    assert step.rewards.tolist() == [[2, 6, 6]]
    assert drifts_of(step.state) == {(2, 2)}
    assert step.active.all() and not step.terminations.any() and not step.episode_over.any()


def test_clearers_share_the_cost():
    env, _ = place([(1, 1), (1, 1), (1, 1), (0, 0)], [(1, 1), (2, 2)])
    step = act(env, CLEAR, CLEAR, STAY, STAY)
    assert step.rewards.tolist() == [[4, 4, 6, 6]]  # the bystander on the drift pays nothing
    env, _ = place([(1, 1), (1, 1), (1, 1), (1, 1)], [(1, 1), (2, 2)])
    assert act(env, CLEAR, CLEAR, CLEAR, CLEAR).rewards.tolist() == [[5, 5, 5, 5]]


def test_drifts_cleared_in_the_same_step_pay_each():
    env, _ = place([(1, 1), (2, 2), (2, 2), (0, 0)], [(1, 1), (2, 2), (3, 3)])
    step = act(env, CLEAR, CLEAR, CLEAR, DOWN)
    assert step.rewards.tolist() == [[8, 10, 10, 12]] and drifts_of(step.state) == {(3, 3)}


def test_clearing_nothing_is_executed_as_stay():
    env, step = place([(1, 1), (0, 0)], [(1, 1), (2, 2)])
    assert step.action_mask[0, :, CLEAR].tolist() == [True, False]
    step = act(env, STAY, CLEAR)
    assert step.executed_actions.tolist() == [[STAY, STAY]] and not step.rewards.any()
    act(env, CLEAR, RIGHT)
    step = act(env, CLEAR, STAY)  # that one is gone
    assert step.executed_actions[0, 0] == STAY and not step.rewards.any()


def test_a_mover_does_not_clear():
    env, _ = place([(1, 1), (1, 2)], [(1, 1), (3, 3)])
    step = act(env, STAY, LEFT)
    assert not step.rewards.any() and drifts_of(step.state) == {(1, 1), (3, 3)}
    assert act(env, CLEAR, CLEAR).rewards.tolist() == [[4, 4]]


def test_the_last_drift_ends_the_episode_for_all():
    env, _ = place([(1, 1), (0, 0)], [(1, 1)])
    step = act(env, CLEAR, DOWN)
    assert step.terminations.tolist() == [[True, True]] and step.episode_over.all() and not step.truncations.any()
    assert step.episode_returns.tolist() == [[2, 6]] and step.episode_lengths.tolist() == [1]
    assert drifts_of(step.final_state) == set() and step.final_obs[0, 1, 1, 0, 0] == 1
    assert step.active.all() and step.state[0, ..., -1].sum() == 1  # the next episode


def test_truncation_at_max_cycles():
    env, _ = place([(1, 1), (0, 0)], [(1, 1), (2, 2)], max_cycles=2)
    assert not act(env, STAY, STAY).episode_over.any()
    step = act(env, CLEAR, STAY)
    assert step.truncations.all() and step.episode_over.all() and not step.terminations.any()
    assert step.episode_returns.tolist() == [[2, 6]]
    env, _ = place([(1, 1), (0, 0)], [(1, 1)], max_cycles=1)
    assert not act(env, CLEAR, STAY).truncations.any()  # ended by the rules in the last step


def test_players_see_themselves_first():
    env, step = place([(0, 0), (0, 1), (0, 2)], [(3, 0)], [(3, 2)])
    assert step.obs.shape == (1, 3, 4, 4, 5)
    for i in range(3):
        assert step.obs[0, i, 0, :, :3].argmax(0).tolist() == [(i + k) % 3 for k in range(3)]
        assert step.obs[0, i, 3, 2, 3] == step.obs[0, i, 3, 0, 4] == 1 and step.obs[0, i].sum() == 5
        assert torch.equal(step.state[0][..., ego_order(3)[i]], step.obs[0, i, ..., :3])
    spec = snowdrift.describe_obs(3, {})
    assert spec.names == ("self", "player i+1", "player i+2", "blocks", "drifts")
    assert spec.hunts == {"drifts": (CLEAR, 1)} and spec.certain and not spec.window
    assert snowdrift.describe_obs(3, {"view": 3}).window


# The whole game


class SlowSnowdrift:
    """One env, one rule a line; positions are (row, column)."""

    def __init__(self, options, cells):
        self.o = options
        spots = [divmod(cell, options["width"]) for cell in cells]
        a, b = options["num_players"], options["num_blocks"]
        self.players, self.blocks, self.drifts = spots[:a], set(spots[a : a + b]), set(spots[a + b :])
        self.t, self.returns = 0, [0.0] * a

    @staticmethod
    def next(at, action):
        row, col = at
        return [(row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)][action]

    def legal(self, i):
        legal = []
        for action in range(4):
            row, col = self.next(self.players[i], action)
            inside = 0 <= row < self.o["height"] and 0 <= col < self.o["width"]
            legal.append(inside and (row, col) not in self.blocks)
        return [*legal, True, self.players[i] in self.drifts]

    def step(self, actions):
        n = len(self.players)
        executed = [a if self.legal(i)[a] else STAY for i, a in enumerate(actions)]
        for i in range(n):
            if executed[i] < STAY:
                self.players[i] = self.next(self.players[i], executed[i])
        rewards = [0.0] * n
        for spot in sorted(self.drifts):
            clearers = [i for i in range(n) if executed[i] == CLEAR and self.players[i] == spot]
            if clearers:
                self.drifts.remove(spot)
                rewards = [reward + 6 for reward in rewards]
                for i in clearers:
                    rewards[i] -= 4 / len(clearers)
        self.t += 1
        self.returns = [total + reward for total, reward in zip(self.returns, rewards, strict=True)]
        ended = not self.drifts
        truncation = not ended and self.t >= self.o["max_cycles"]
        return executed, rewards, [ended] * n, truncation, ended or truncation

    def picture(self, first=0):
        n = len(self.players)
        out = np.zeros((self.o["height"], self.o["width"], n + 2), np.uint8)
        for k in range(n):
            out[(*self.players[(first + k) % n], k)] = 1
        for plane, spots in ((n, self.blocks), (n + 1, self.drifts)):
            for spot in spots:
                out[(*spot, plane)] = 1
        return out

    def observe(self, i):
        full, view = self.picture(i), self.o["view"]
        if view is None:
            return full
        edge, (row, col) = view // 2, self.players[i]
        padded = np.pad(full, ((edge, edge), (edge, edge), (0, 0)))
        padded[..., -2] = np.pad(full[..., -2], edge, constant_values=1)
        return padded[row : row + view, col : col + view]


GAMES = [
    PRESETS["snowdrift-4x4-6d"],
    PRESETS["snowdrift-6x6-6d"],
    {"height": 3, "width": 5, "num_players": 3, "num_drifts": 4, "num_blocks": 3, "max_cycles": 20},
    {"height": 5, "width": 3, "num_players": 5, "num_drifts": 3, "num_blocks": 2, "view": 3, "max_cycles": 9},
    {"height": 2, "width": 2, "num_players": 1, "num_drifts": 1, "view": 5, "max_cycles": 6},
]


@pytest.mark.parametrize("can_branch", [True, False])
@pytest.mark.parametrize("options", GAMES)
def test_batch_agrees_with_a_slow_env(options, can_branch):
    """5 games x 30 envs x 40 steps, on the CPU's path and on the accelerators'."""
    rng = random.Random(1)
    env = SnowdriftVecEnv(30, "cpu", 3, **options)
    env._can_branch = can_branch

    def choose(legal):
        return CLEAR if legal[CLEAR] and rng.random() < 0.5 else rng.randrange(6)

    ended, truncated = play_beside_slow_envs(env, lambda cells: SlowSnowdrift(env.options, cells), choose, 40)
    assert ended > truncated > 0


def play(names, preset="snowdrift-4x4-6d", num_envs=1024, seed=1):
    """Mean return of each seat [A] over the first episode of each env, scripts by seat."""
    env = SnowdriftVecEnv(num_envs, "cpu", seed, **preset_options(preset))
    step, generator = env.reset(seed), torch.Generator().manual_seed(seed)
    first = torch.full((num_envs, 4), torch.nan)
    while first.isnan().any():
        probs = [action_probs(name, env.full_obs(), step.action_mask)[:, i] for i, name in enumerate(names)]
        step = env.step(sample_actions(torch.stack(probs, 1), generator))
        new = step.episode_over[:, None] & first.isnan()
        first = torch.where(new, step.episode_returns, first)
    return first.mean(0).tolist()


def test_what_the_motives_are_worth():
    """Together 30; 36 is what a free rider has of six drifts, and 12 who clears all of them alone."""
    together = play(["nearest_drift"] * 4)
    assert together == pytest.approx([30] * 4, abs=0.5)
    assert play(["stay", *["nearest_drift"] * 3])[0] == pytest.approx(36, abs=0.1)
    # On the small map 15 steps are often too few for one.
    assert play(["nearest_drift", *["never_clears"] * 3])[0] == pytest.approx(10.8, abs=0.3)
    assert play(["nearest_drift", *["never_clears"] * 3], "snowdrift-6x6-6d")[0] == pytest.approx(12, abs=0.2)
    assert play(["never_clears"] * 4) == [0] * 4


@pytest.mark.parametrize("options", [{}, {"num_blocks": 2, "view": 3}])
def test_state_dict_continues_episodes_in_flight(options):
    def states(env, step, num_steps):
        generator = torch.Generator().manual_seed(9)
        for _ in range(num_steps):
            step = env.step(sample_actions(action_probs("random", env.full_obs(), step.action_mask), generator))
            yield step.obs, step.rewards, step.episode_returns

    env = SnowdriftVecEnv(32, "cpu", 1, **options)
    assert len(list(states(env, env.reset(1), 23))) == 23
    buffer = io.BytesIO()
    torch.save(env.state_dict(), buffer)
    buffer.seek(0)
    other = SnowdriftVecEnv(32, "cpu", 5, **options)
    saved = torch.load(buffer, weights_only=True)
    expected = states(env, env.load_state_dict(saved), 40)
    for want, got in zip(expected, states(other, other.load_state_dict(saved), 40), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


# Scripted partners


@pytest.mark.parametrize(
    ("policy", "player", "drifts", "blocks", "expected"),
    [
        ("random", (0, 0), [(3, 3)], [], {DOWN: 1 / 3, RIGHT: 1 / 3, STAY: 1 / 3}),
        ("random", (1, 1), [(1, 1)], [], {a: 1 / 6 for a in range(6)}),
        ("stay", (1, 1), [(1, 1)], [], {STAY: 1}),
        ("never_clears", (1, 1), [(1, 1)], [], {a: 1 / 5 for a in range(5)}),
        ("never_clears", (0, 0), [(0, 0)], [(0, 1)], {DOWN: 1 / 2, STAY: 1 / 2}),
        ("nearest_drift", (1, 1), [(1, 1), (1, 2)], [], {CLEAR: 1}),
        ("nearest_drift", (0, 0), [(2, 3)], [], {DOWN: 1 / 2, RIGHT: 1 / 2}),
        ("nearest_drift", (1, 1), [(0, 1), (1, 3)], [], {UP: 1}),
        ("nearest_drift", (1, 1), [(1, 3)], [(1, 2)], {UP: 1 / 3, DOWN: 1 / 3, LEFT: 1 / 3}),
    ],
)
def test_scripted_policies_in_cases_by_hand(policy, player, drifts, blocks, expected):
    env, step = place([player, (3, 2)], drifts, blocks)
    probs = action_probs(policy, env.full_obs(), step.action_mask)[0, 0].tolist()
    assert probs == pytest.approx([expected.get(a, 0) for a in range(6)])


def test_scripts_are_distributions_over_legal_actions():
    env = SnowdriftVecEnv(200, "cpu", 1, num_blocks=2)
    step = env.reset(1)
    for name in SCRIPTED:
        probs = action_probs(name, env.full_obs(), step.action_mask)
        assert torch.allclose(probs.sum(-1), torch.ones(())) and not (probs > 0)[~step.action_mask].any()
    with pytest.raises(UsageError, match="never_clears"):
        action_probs("nearest_stag", env.full_obs(), step.action_mask)


# PettingZoo


@pytest.mark.filterwarnings("error:Live agent", "error:Agent was given", "error:No agents present")
def test_pettingzoo_api_and_seeds():
    parallel_api_test(parallel_env())
    parallel_seed_test(lambda: parallel_env("snowdrift-6x6-6d", num_blocks=3, view=5))
    for name in PRESETS:
        env = pettingzoo.make("parallel", f"{name}-v0", max_cycles=9)
        assert env.observation_space("player_0").shape == (PRESETS[name]["height"], PRESETS[name]["width"], 6)
        assert env._env.options["max_cycles"] == 9


def test_pettingzoo_plays_the_same_game():
    """Drives the view and a batch of one through 20 episodes; the view must show ends, not the next start."""
    env, core = parallel_env(), SnowdriftVecEnv(1, "cpu", 0)
    rng, ended = np.random.default_rng(0), 0
    _, infos = env.reset(seed=11)
    step = core.reset(11)
    while ended < 20:
        actions = {a: int(rng.choice(np.flatnonzero(infos[a]["action_mask"]))) for a in env.agents}
        joint = torch.tensor([list(actions.values())])
        obs, rewards, terminations, truncations, infos = env.step(actions)
        step = core.step(joint)
        assert np.array_equal(env.state(), step.final_state[0].numpy())
        assert list(rewards.values()) == step.rewards[0].tolist()
        assert list(terminations.values()) == step.terminations[0].tolist()
        assert list(truncations.values()) == [step.truncations.item()] * 4
        for i, agent in enumerate(core.agents):
            assert np.array_equal(obs[agent], step.final_obs[0, i].numpy())
            assert np.array_equal(infos[agent]["action_mask"], core.final_action_mask()[0, i].numpy())
        if not env.agents:
            ended += 1
            _, infos = env.reset(seed=ended)
            step = core.reset(ended)


def test_it_is_registered():
    env = make_vec_env("snowdrift-6x6-6d", 3, "cpu", 0, num_blocks=1)
    assert env.backend == "batched" and env.obs_shape == (6, 6, 6) and env.env_id == "snowdrift-6x6-6d"
    genuine = make_vec_env("snowdrift", 1, "cpu", 0, backend="pettingzoo")
    assert genuine.obs_shape == (4, 4, 6) and genuine.env_id == "snowdrift"
    assert genuine.reset(0).action_mask.shape == (1, 4, 6)
    meta = {"env_id": "snowdrift-6x6-6d", "env_kwargs": {}, "num_agents": 4}
    assert describe_obs(meta).names[-1] == "drifts"


def test_render_tells_things_apart():
    env, _ = place([(0, 0), (1, 1), (1, 1)], [(1, 1), (2, 2)], [(3, 3)])
    frame = env.render()
    assert frame.shape == (320, 320, 3) and frame.dtype == np.uint8
    cells = frame.reshape(4, 80, 4, 80, 3).transpose(0, 2, 1, 3, 4)
    looks = [cells[at].astype(int) for at in ((0, 0), (1, 1), (2, 2), (3, 3), (0, 2))]
    for i, one in enumerate(looks):
        for other in looks[:i]:
            assert np.abs(one - other).mean() > 5


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 2, "width": 4}, "a cell for each of the 10"),
        ({"num_drifts": 0}, "at least one drift, got none; raise num_drifts"),
        ({"num_drifts": -1}, "num_drifts"),
        ({"view": 4}, "odd view"),
        ({"max_cycles": 0}, "max_cycles"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    for make in (lambda: SnowdriftVecEnv(2, "cpu", 0, **options), lambda: parallel_env(**options)):
        with pytest.raises(UsageError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


def test_bad_names_and_actions_are_clear_errors():
    with pytest.raises(UsageError, match="a snowdrift preset, one of snowdrift-4x4-6d"):
        preset_options("snowdrift-9x9")
    with pytest.raises(ValueError, match=r"0 to 5 \(up, down, left, right, stay, clear\), got 6"):
        act(place([(0, 0), (1, 1)], [(2, 2)])[0], STAY, 6)
