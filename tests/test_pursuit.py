"""The batched pursuit against the genuine one, which is the judge."""

import collections
import io
import os
import re
from unittest import mock

import numpy as np
import pytest
import torch
from pettingzoo.sisl import pursuit_v5
from pettingzoo.sisl.pursuit.pursuit_base import Pursuit
from torch.utils._python_dispatch import TorchDispatchMode

from envs.pursuit import PursuitVecEnv, place_in_genuine
from runs import UsageError


class Dictated:
    """An evader controller that plays the given actions; each evader that is left has its own."""

    def __init__(self):
        self.moves = None

    def set_moves(self, genuine, actions):
        self.genuine, self.actions, self.moves = genuine, actions, None

    def act(self, state):
        if self.moves is None:  # the first evader moves: now it is known who was caught in this step
            self.moves = iter(self.actions[~self.genuine.evaders_gone])
        return int(next(self.moves))


class Genuine:
    """One genuine parallel env that starts where it is told to."""

    def __init__(self, dictated: bool, **kwargs):
        self.controller = Dictated() if dictated else None
        with mock.patch.object(Pursuit, "reset"):  # draws a start, for ever where too little room is left
            self.env = pursuit_v5.parallel_env(**kwargs, evader_controller=self.controller)
        self.base = self.env.unwrapped.env
        self.base.reset = lambda: None

    def start(self, pursuers, evaders):
        self.env.reset()
        self.base.frames = 0
        place_in_genuine(self.base, pursuers.tolist(), evaders.tolist())

    def see(self):
        agents = self.env.possible_agents
        return np.stack([self.env.aec_env.observe(a) for a in agents]), self.env.state()

    def step(self, actions, evader_actions):
        if self.controller:
            self.controller.set_moves(self.base, evader_actions)
        agents = self.env.possible_agents
        obs, rewards, terminations, truncations, _ = self.env.step(dict(zip(agents, actions.tolist(), strict=True)))
        return tuple(np.array([x[a] for a in agents]) for x in (obs, rewards, terminations, truncations))


def random_arguments(rng: np.random.Generator) -> dict:
    """Any arguments that the twin accepts; most maps are small and crowded."""
    while True:
        large = rng.random() < 0.1
        kwargs = {
            "x_size": int(rng.integers(10, 18) if large else rng.integers(1, 11)),
            "y_size": int(rng.integers(10, 18) if large else rng.integers(1, 11)),
            "max_cycles": int(rng.choice([1, 2, 5, 12, 25])),
            "shared_reward": bool(rng.integers(2)),
            "n_evaders": int(rng.choice([1, 2, 3, 6]) * (5 if large else 1)),
            "n_pursuers": int(rng.choice([1, 2, 4, 5, 8])),
            "obs_range": int(rng.choice([1, 3, 5, 7, 9])),
            "n_catch": int(rng.integers(1, 4)),
            "freeze_evaders": bool(rng.integers(4) == 0),
            "tag_reward": float(rng.choice([0.01, 0.3, -1.0])),
            "catch_reward": float(rng.choice([5.0, 0.7])),
            "urgency_reward": float(rng.choice([-0.1, 0.0, 0.25])),
            "surround": bool(rng.integers(3)),
            "constraint_window": float(rng.choice([1.0, 0.8, 0.5])),
        }
        try:
            PursuitVecEnv(1, "cpu", 0, **kwargs)
        except ValueError:
            continue
        return kwargs


def random_places(rng: np.random.Generator, env: PursuitVecEnv) -> tuple[torch.Tensor, torch.Tensor]:
    """Everyone anywhere; in most envs all on one cell and its neighbours. Some evaders are caught already."""
    free_y, free_x = np.nonzero(env.is_open.numpy())
    cells = np.stack([free_x, free_y], -1)  # [cells, 2]
    places = []
    for _ in range(env.num_envs):
        middle = cells[rng.integers(len(cells))]
        near = cells[np.abs(cells - middle).sum(-1) <= rng.choice([1, 1, 1, 100])]
        pursuers = near[rng.integers(len(near), size=env.num_agents)]
        if env.surround and rng.integers(2):  # everyone on another cell around the middle
            around = rng.permutation(cells[np.abs(cells - middle).sum(-1) == 1]) if len(near) > 1 else near
            pursuers = around[np.arange(env.num_agents) % len(around)]
        evaders = near[rng.integers(len(near), size=env.n_evaders)]
        evaders[rng.random(env.n_evaders) < 0.5] = middle
        evaders[1:][rng.random(env.n_evaders - 1) < rng.choice([0, 0.2, 1])] = -1
        places.append((pursuers, evaders))
    return tuple(torch.from_numpy(np.stack(team)) for team in zip(*places, strict=True))


def compare(kwargs: dict, rng: np.random.Generator, episodes: int, N: int = 4, no_sync: bool = False) -> dict:
    """Plays at least `episodes` episodes in both envs; everything must be equal. Returns what was met on the way."""
    env = PursuitVecEnv(N, "cpu", int(rng.integers(2**31)), **kwargs)
    env.no_sync = no_sync  # the path without branches on data, for accelerators
    dictated = not kwargs["freeze_evaders"]
    genuine = [Genuine(dictated, **kwargs) for _ in range(N)]
    met = collections.Counter()
    while met["episodes"] < episodes:
        # First episodes start where they are told to, the next ones where the twin's autoreset puts them.
        step = env.set_positions(*random_places(rng, env))
        for n, places in enumerate(zip(*env.positions(), strict=True)):
            genuine[n].start(*places)
        returns = np.zeros((N, env.num_agents))
        for _ in range(kwargs["max_cycles"] + 2):
            for n in range(N):
                obs, state = genuine[n].see()
                np.testing.assert_array_equal(step.obs[n], obs)
                np.testing.assert_array_equal(step.state[n], state)
            actions, moves = (torch.from_numpy(rng.integers(5, size=(N, k))) for k in (env.num_agents, env.n_evaders))
            actions[torch.from_numpy(rng.random(N) < 0.5)] = 4
            left = [g.base.evader_layer.n_agents() for g in genuine]
            step = env.step(actions, moves if dictated else None)
            restarts = list(zip(*env.positions(), strict=True))
            for n in range(N):
                obs, rewards, terminations, truncations = genuine[n].step(actions[n], moves[n].numpy())
                np.testing.assert_array_equal(step.final_obs[n], obs)
                np.testing.assert_array_equal(step.final_state[n], genuine[n].env.state())
                np.testing.assert_allclose(step.rewards[n], rewards, rtol=1e-6, atol=1e-6)
                np.testing.assert_array_equal(step.terminations[n], terminations)
                np.testing.assert_array_equal(step.truncations[n].expand(env.num_agents), truncations)
                returns[n] += rewards
                over = not genuine[n].env.agents
                assert step.episode_over[n] == over
                now_left = genuine[n].base.evader_layer.n_agents()
                met["steps"] += 1
                met["steps with overlaps"] += int((obs[..., 1:] > 1).any())
                met["evaders caught"] += left[n] - now_left
                if over:
                    met["episodes"] += 1
                    met["ended early"] += int(terminations.all())
                    met["last evader caught at the time limit"] += int(truncations.all() and left[n] and not now_left)
                    np.testing.assert_allclose(step.episode_returns[n], returns[n], rtol=1e-5, atol=1e-5)
                    assert step.episode_lengths[n] == genuine[n].base.frames
                    returns[n] = 0
                    genuine[n].start(*restarts[n])
    return met


def test_twin_equals_genuine_env_in_every_argument():
    rng = np.random.default_rng(1)
    met = collections.Counter()
    for index in range(int(os.environ.get("PARITY_SETS", 80))):
        met += compare(random_arguments(rng), rng, episodes=8, no_sync=index % 4 == 0)
    print(dict(met))
    assert met["episodes"] >= 300
    assert min(met.values()) >= 5, met


def test_twin_equals_genuine_env_at_full_size():
    rng = np.random.default_rng(2)
    kwargs = PursuitVecEnv(1, "cpu", 1).env_kwargs | {"max_cycles": 15}
    assert compare(kwargs, rng, episodes=6, N=3)["evaders caught"] > 0


def test_crowds_of_more_than_127():
    """Counts are uint8, sums of them are not: in a corner the own cell is tagged twice."""
    kwargs = {"x_size": 30, "y_size": 30, "n_evaders": 200, "n_pursuers": 150, "shared_reward": False}
    env, genuine = PursuitVecEnv(1, "cpu", 1, **kwargs), Genuine(True, **kwargs)
    pursuers, evaders = torch.zeros(1, 150, 2, dtype=torch.int64), torch.zeros(1, 200, 2, dtype=torch.int64)
    env.set_positions(pursuers, evaders)
    genuine.start(pursuers[0], evaders[0])
    for _ in range(2):
        actions, moves = torch.full((1, 150), 4), torch.full((1, 200), 4)
        step = env.step(actions, moves)
        obs, rewards, _, _ = genuine.step(actions[0], moves[0].numpy())
        np.testing.assert_array_equal(step.obs[0], obs)
        np.testing.assert_allclose(step.rewards[0], rewards, atol=1e-6)
        assert rewards[0] > 3.8  # 400 tags of 0.01


def assert_same_law(ours: list, genuine: list) -> None:
    """Chi-square test that two samples of hashable outcomes are from one law; fails by chance once in 10^6."""
    ours, genuine = collections.Counter(ours), collections.Counter(genuine)
    outcomes = [o for o in ours | genuine if ours[o] + genuine[o] >= 20]
    a, b = (np.array([c[o] for o in outcomes] + [c.total() - sum(c[o] for o in outcomes)]) for c in (ours, genuine))
    expected_a, expected_b = ((a + b) * n / (a.sum() + b.sum()) for n in (a.sum(), b.sum()))
    chi2 = sum(((x - e) ** 2 / np.maximum(e, 1)).sum() for x, e in ((a, expected_a), (b, expected_b)))
    df = len(outcomes)
    assert len(outcomes) > 3 and chi2 < df + 5 * (2 * df) ** 0.5, (chi2, df)


@pytest.mark.parametrize("no_sync", [False, True])
def test_starts_follow_the_genuine_law(no_sync):
    kwargs = {"x_size": 6, "y_size": 6, "n_pursuers": 3, "n_evaders": 3, "constraint_window": 0.7, "max_cycles": 1}
    env = PursuitVecEnv(1000, "cpu", 1, **kwargs)
    env.no_sync = no_sync
    ours = []
    for _ in range(20):
        env.step(torch.full((1000, 3), 4))  # every step is an episode
        ours += torch.cat(env.positions(), 1).flatten(1).tolist()
    base = Pursuit(**kwargs)
    base._seed(1)
    genuine = []
    for _ in range(8000):
        base.reset()
        genuine.append([int(k) for agent in (*base.pursuers, *base.evaders) for k in agent.current_position()])
    assert len({tuple(row) for row in ours}) > 17_000  # of 20,000; starts are not used twice
    for i, j in ((0, 1), (0, 2), (1, 2), (3, 5), (0, 3)):  # first and second, ... pursuer; evaders; one of each
        pairs = ([(*row[2 * i : 2 * i + 2], *row[2 * j : 2 * j + 2]) for row in rows] for rows in (ours, genuine))
        assert_same_law(*pairs)


def test_free_evaders_move_as_in_the_genuine_env():
    kwargs = {"x_size": 8, "y_size": 8, "n_pursuers": 1, "n_evaders": 4}
    pursuers = torch.tensor([[6, 6]])
    evaders = torch.tensor([[0, 0], [2, 3], [0, 4], [1, 1]])  # in a corner, at the wall, at the edge, in the open
    env = PursuitVecEnv(20_000, "cpu", 1, **kwargs)
    env.set_positions(pursuers.expand(20_000, 1, 2), evaders.expand(20_000, 4, 2))
    env.step(torch.full((20_000, 1), 4))
    ours = env.positions()[1].flatten(1).tolist()
    genuine = Pursuit(**kwargs)
    genuine._seed(1)
    theirs = []
    for _ in range(3000):
        place_in_genuine(genuine, pursuers.tolist(), evaders.tolist())
        genuine.step(4, 0, True)
        theirs.append([int(k) for evader in genuine.evaders for k in evader.current_position()])
    for i, j in ((0, 1), (2, 3), (0, 3)):
        pairs = ([(*row[2 * i : 2 * i + 2], *row[2 * j : 2 * j + 2]) for row in rows] for rows in (ours, theirs))
        assert_same_law(*pairs)


@pytest.mark.parametrize("no_sync", [False, True])
def test_state_dict_continues_episodes_exactly(no_sync):
    def play(env, steps):
        generator = torch.Generator().manual_seed(3)
        return [env.step(torch.randint(5, (6, 8), generator=generator)) for _ in range(steps)]

    env, other = (PursuitVecEnv(6, "cpu", seed, max_cycles=20) for seed in (1, 2))
    env.no_sync = other.no_sync = no_sync
    last = play(env, 20)[-1]  # all have just been restarted
    buffer = io.BytesIO()
    torch.save(env.state_dict(), buffer)
    buffer.seek(0)
    loaded = other.load_state_dict(torch.load(buffer, weights_only=True))
    for ours, theirs in zip([last, *play(env, 25)], [loaded, *play(other, 25)], strict=True):
        for name in (
            "obs state rewards terminations truncations episode_over final_obs final_state episode_returns "
            "episode_lengths active"
        ).split():
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert last.episode_over.all() and not torch.equal(last.obs, last.final_obs)

    with pytest.raises(ValueError, match="max_cycles=11"):
        PursuitVecEnv(6, "cpu", 1, max_cycles=11).load_state_dict(env.state_dict())
    with pytest.raises(ValueError, match="num_envs=5"):
        PursuitVecEnv(5, "cpu", 1, max_cycles=20).load_state_dict(env.state_dict())


def test_seed_decides_everything():
    def play(seed):
        env = PursuitVecEnv(8, "cpu", 0, max_cycles=5)
        first = env.reset(seed).state
        return torch.stack([first, *(env.step(torch.zeros(8, 8, dtype=torch.int64)).state for _ in range(12))])

    assert torch.equal(play(1), play(1))
    assert not torch.equal(play(1)[0], play(2)[0])
    assert len(play(1)[0].unique(dim=0)) == 8  # envs differ from each other


def test_render_equals_the_genuine_picture():
    rng = np.random.default_rng(4)
    kwargs = {"x_size": 9, "y_size": 7, "n_evaders": 6, "n_pursuers": 4, "obs_range": 5}
    env, genuine = PursuitVecEnv(2, "cpu", 5, **kwargs), Genuine(True, **kwargs, render_mode="rgb_array")
    env.set_positions(*random_places(rng, env))
    genuine.start(*(places[0] for places in env.positions()))
    for _ in range(5):
        actions, moves = torch.from_numpy(rng.integers(5, size=(2, 4))), torch.from_numpy(rng.integers(5, size=(2, 6)))
        env.step(actions, moves)
        genuine.step(actions[0], moves[0].numpy())
        frame = env.render()
        assert frame.shape == (210, 270, 3) and frame.dtype == np.uint8
        np.testing.assert_array_equal(frame, genuine.env.render())
    env.close()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"obs_range": 6}, "expected an odd obs_range, got 6"),
        ({"obs_range": -1}, "expected obs_range >= 1, got -1"),
        ({"n_pursuers": 0}, "expected n_pursuers >= 1, got 0"),
        ({"n_evaders": 256}, "expected n_evaders <= 255"),
        ({"max_cycles": 0}, "expected max_cycles >= 1"),
        ({"num_envs": 0}, "expected num_envs >= 1"),
        ({"x_size": 16.0}, "expected x_size of type int, got 16.0"),
        ({"surround": "False"}, "expected surround of type bool, got 'False'"),
        ({"n_catch": True}, "expected n_catch of type int, got True"),
        ({"tag_reward": None}, "expected tag_reward of type float, got None"),
        ({"constraint_window": 0.0}, "expected constraint_window in (0, 1]"),
        ({"constraint_window": 0.3}, "expected room for 8 pursuers and 30 evaders"),
        ({"x_size": 7, "y_size": 7}, "expected room for 8 pursuers and 30 evaders"),
    ],
)
def test_bad_arguments_are_one_clear_line(kwargs, message):
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        PursuitVecEnv(**{"num_envs": 2, "device": "cpu", "seed": 1} | kwargs)
    assert "\n" not in str(error.value)


def test_bad_actions_and_positions_are_one_clear_line():
    env = PursuitVecEnv(2, "cpu", 1)
    fine, moves = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 30, dtype=torch.int64)
    before = env.step(fine).obs
    for actions, message in (
        ((fine[:1],), "expected actions of shape (2, 8) and dtype torch.int64, got (1, 8)"),
        ((fine.int(),), "got (2, 8) and torch.int32"),
        ((fine - 1,), "expected actions in 0 ... 4, got -1 ... -1"),
        ((fine + 5,), "expected actions in 0 ... 4, got 5 ... 5"),
        ((fine, moves + 5), "expected evader_actions in 0 ... 4"),
        ((fine, moves[:, 1:]), "expected evader_actions of shape (2, 30)"),
        ((fine.to("meta"),), "expected actions on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            env.step(*actions)
        assert not isinstance(error.value, UsageError)
    pursuers, evaders = env.positions()
    for places, message in (
        ((pursuers[:1], evaders), "expected pursuers of shape (2, 8, 2)"),
        ((pursuers, torch.full_like(evaders, 16)), "expected evaders on free cells"),
        ((torch.full_like(pursuers, 8), evaders), "expected pursuers on free cells"),
        ((torch.full_like(pursuers, -1), evaders), "expected pursuers on free cells"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            env.set_positions(*places)
    assert torch.equal(env.load_state_dict(env.state_dict()).obs, before)  # nothing has changed


def test_a_step_for_an_accelerator_never_waits_for_it():
    class Forbid(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # Reading a value, a shape that depends on data, a tensor made of Python numbers (a copy to the device)
            name = func.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")
            assert name != "index" or all(i is None or i.dtype != torch.bool for i in args[1])
            return func(*args, **kwargs or {})

    env = PursuitVecEnv(4, "cpu", 1, max_cycles=3)
    actions = torch.zeros(4, 8, dtype=torch.int64)
    with Forbid():
        with pytest.raises(AssertionError):
            env.step(actions)  # on a CPU it branches
        env.no_sync = True
        for _ in range(8):
            env.step(actions).final_obs  # noqa: B018


def test_wrong_actions_do_no_harm_without_a_check():
    """On an accelerator a check would stall the device: there actions are clamped."""
    env, other = PursuitVecEnv(2, "cpu", 1), PursuitVecEnv(2, "cpu", 1)
    env.no_sync = other.no_sync = True
    wild, tame = torch.tensor([[-(2**60), 2**60] * 4] * 2), torch.tensor([[0, 4] * 4] * 2)
    assert torch.equal(env.step(wild).obs, other.step(tame).obs)


def test_speed_benchmark_measures_every_env(tmp_path, capsys):
    from benchmark import env_speed

    plot = tmp_path / "speed.png"
    env_speed.main(
        env_speed.Args(
            env_ids=("pursuit", "stag_hunt"), num_envs=(1, 4), supersuit=((2, 1),), seconds=0.05, rounds=1, plot=plot
        )
    )
    printed = capsys.readouterr().out
    for line in (
        "pursuit: ",
        "stag_hunt: ",
        "genuine, one process",
        "SuperSuit, 2 envs",
        "batched, 4 envs",
        "launches: ",
    ):
        assert line in printed
    assert plot.stat().st_size > 1000
