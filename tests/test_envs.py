"""The env contract on genuine PettingZoo envs: each is stepped by hand beside the vectorised one."""

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import gymnasium as gym
import numpy as np
import pettingzoo
import pytest
import torch
from pettingzoo.utils.env import ParallelEnv

import envs
import hyper_mappo
from envs import (
    EnvStep,
    VecEnv,
    check_env,
    check_picture,
    default_env_procs,
    describe_obs,
    make_eval_env,
    make_parallel_env,
    make_vec_env,
    resolve_env_id,
    workers,
)
from envs.pettingzoo_vec import PettingZooVecEnv, episode_seed
from runs import RunError, UsageError, command_line

SMALL_PURSUIT = dict(x_size=8, y_size=8, n_pursuers=3, n_evaders=3, obs_range=5)
ZOMBIES = dict(spawn_delay=1, max_zombies=40)  # agents die after about 100 steps
TOY, PLAIN, SPACES = (f"{__name__}:{name}" for name in ("Toy", "Plain", "Spaces"))

# env id, arguments, steps to take: at least one episode ends in each, if not by itself then by max_cycles
ENVS = {
    "pursuit": ("sisl/pursuit_v5", dict(**SMALL_PURSUIT, max_cycles=20), 50),
    "zombies": ("butterfly/knights_archers_zombies_v11", ZOMBIES, 300),
    "pistonball": ("butterfly/pistonball_v6", dict(n_pistons=4, max_cycles=6), 14),
    "pistonball-discrete": ("butterfly/pistonball_v6", dict(n_pistons=4, max_cycles=6, continuous=False), 14),
    "spread": ("mpe2.simple_spread_v3", dict(N=2), 60),
    "speaker": ("mpe2.simple_speaker_listener_v4", {}, 60),
    "toy": (TOY, {}, 30),
    "toy-state": (TOY, dict(with_state=True), 30),
    "toy-masks": (TOY, dict(masks="dict"), 30),
}


class Toy(ParallelEnv):
    """Every awkward thing at once: sizes differ, agents leave at different steps, one comes late, memory is reused.

    a is there from step 0 to 4 and terminates; b until the time limit at 8; c comes after 2 steps and is truncated
    alone at 6. Observation: [t, a number of the episode, t, ...].
    Reward: 1 + action, so also in the step that an agent leaves in.
    """

    metadata = {"name": "toy"}
    possible_agents = ["a", "b", "c"]
    sizes = {"a": 2, "b": 4, "c": 3}  # of observations; b's, of the agent that stays to the end, is not padded

    def __init__(self, masks: str | None = None, with_state: bool = False):
        self.masks, self.with_state = masks, with_state
        self.memory = {a: np.zeros(self.sizes[a], np.float32) for a in self.possible_agents}
        self.memory_of_state = np.zeros(2)

    def observation_space(self, agent):
        box = gym.spaces.Box(0, np.inf, (self.sizes[agent],), np.float32)
        if self.masks != "dict":
            return box
        mask = gym.spaces.Box(0, 1, (self.action_space(agent).n,), np.int8)
        return gym.spaces.Dict({"observation": box, "action_mask": mask})

    def action_space(self, agent):
        return gym.spaces.Discrete(3 + self.possible_agents.index(agent))

    def reset(self, seed=None, options=None):
        self.number = float(np.random.default_rng(seed).integers(1, 1000))
        self.t, self.agents = 0, ["a", "b"]
        return self._obs(self.agents), self._infos(self.agents)

    def step(self, actions):
        assert set(actions) == set(self.agents)
        assert all(self.action_space(a).contains(action) for a, action in actions.items())
        acting = self.agents
        self.t += 1
        terminations = {a: a == "a" and self.t == 4 for a in acting}
        truncations = {a: (a == "c" and self.t == 6) or (a == "b" and self.t == 8) for a in acting}
        rewards = {a: 1.0 + actions[a] for a in acting}
        self.agents = [a for a in acting if not (terminations[a] or truncations[a])] + ["c"] * (self.t == 2)
        seen = sorted({*acting, *self.agents})
        return self._obs(seen), rewards, terminations, truncations, self._infos(seen)

    def _obs(self, agents):
        for o in self.memory.values():  # the same arrays again and again
            o[:], o[1] = self.t, self.number
        obs = {a: self.memory[a] for a in agents}
        if self.masks == "dict":
            return {a: {"observation": o, "action_mask": self._mask(a)} for a, o in obs.items()}
        return obs

    def _infos(self, agents):
        return {a: {"action_mask": self._mask(a)} if self.masks == "info" else {} for a in agents}

    def _mask(self, agent):
        mask = np.ones(self.action_space(agent).n, dtype=np.int8)
        mask[self.t % 3] = 0
        return mask

    def state(self):
        if not self.with_state:
            raise NotImplementedError
        self.memory_of_state[:] = self.t, self.number
        return self.memory_of_state


class Plain(ParallelEnv):
    """Two agents and an episode of one step, with spaces to choose. Action 0 is executed as 1."""

    metadata = {"name": "plain"}
    possible_agents = ["x", "y"]

    def __init__(self, observation=None, action=None, render_mode=None):
        self.spaces = observation or gym.spaces.Box(0, 1, (1,)), action or gym.spaces.Discrete(2)

    def observation_space(self, agent):
        return self.spaces[0]

    def action_space(self, agent):
        return self.spaces[1]

    def reset(self, seed=None, options=None):
        self.agents = list(self.possible_agents)
        return {a: self.spaces[0].sample() for a in self.agents}, {a: {} for a in self.agents}

    def step(self, actions):
        every, self.agents = self.agents, []
        obs = {a: self.spaces[0].sample() for a in every}
        infos = {a: {"executed_action": 1} if actions[a] == 0 else {} for a in every}
        return obs, dict.fromkeys(every, 1.0), dict.fromkeys(every, True), dict.fromkeys(every, False), infos


def random_actions(env, step: EnvStep, generator) -> torch.Tensor:
    """Uniform over legal actions; rows of inactive agents hold nonsense, which must be ignored."""
    shape = (env.num_envs, env.num_agents)
    if isinstance(env.action_space, gym.spaces.Box):
        actions = 2 * torch.randn(*shape, *env.action_space.shape, generator=generator)  # [N, A, D], some out of bounds
        actions[~step.active] = torch.nan
        return actions
    weights = torch.ones(*shape, env.action_space.n) if step.action_mask is None else step.action_mask.float()
    actions = torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(shape)  # [N, A]
    actions[~step.active] = -7
    return actions


def roll(env, seed: int, num_steps: int) -> list[tuple[torch.Tensor | None, EnvStep]]:
    """[(actions that led there, EnvStep)], the first from reset."""
    generator = torch.Generator().manual_seed(seed)
    steps = [(None, env.reset(seed))]
    for _ in range(num_steps):
        actions = random_actions(env, steps[-1][1], generator)
        steps.append((actions, env.step(actions)))
    return steps


FIELDS = (
    "obs state action_mask active rewards terminations truncations episode_over final_obs final_state "
    "episode_returns episode_lengths executed_actions"
).split()


def assert_equal_steps(one: EnvStep, other: EnvStep) -> None:
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("name", ENVS)
def test_contract(name):
    env_id, kwargs, num_steps = ENVS[name]
    env = make_vec_env(env_id, 2, "cpu", 0, backend="pettingzoo", **kwargs)
    assert env.backend == "pettingzoo" and env.agents == make_parallel_env(env_id, **kwargs).possible_agents
    assert env.obs_dtype == (torch.uint8 if "pistonball" in name else torch.float32)
    check_contract(env, num_steps, masked=name in ("speaker", "toy", "toy-state", "toy-masks"))
    env.close()


def check_contract(env: VecEnv, num_steps: int, masked: bool) -> None:
    N, A = env.num_envs, env.num_agents
    shapes = dict(
        obs=((N, A, *env.obs_shape), env.obs_dtype),
        final_obs=((N, A, *env.obs_shape), env.obs_dtype),
        state=((N, *env.state_shape), env.state_dtype),
        final_state=((N, *env.state_shape), env.state_dtype),
        active=((N, A), torch.bool),
        rewards=((N, A), torch.float32),
        terminations=((N, A), torch.bool),
        truncations=((N,), torch.bool),
        episode_over=((N,), torch.bool),
        episode_returns=((N, A), torch.float32),
        episode_lengths=((N,), torch.int64),
    )
    was_active, num_over = None, 0
    for t, (_, step) in enumerate(roll(env, 1, num_steps)):
        for field, (shape, dtype) in shapes.items():
            tensor = getattr(step, field)
            assert tensor.shape == shape and tensor.dtype == dtype and tensor.device == env.device, field
        if masked:
            assert step.action_mask.shape == (N, A, env.action_space.n) and step.action_mask.dtype == torch.bool
            assert step.action_mask.any(-1).all()
        else:
            assert step.action_mask is None
        assert not step.obs[~step.active].any()
        if t > 0:
            assert not step.rewards[~was_active].any()
            assert not step.terminations[~was_active].any()
            stays = ~step.episode_over[:, None]
            truncated_alone = was_active & ~step.active & ~step.terminations & stays
            same = stays & ~truncated_alone
            assert torch.equal(step.final_obs[same], step.obs[same])
            assert step.final_obs[truncated_alone].flatten(1).any(1).all()
            same_state = ~step.episode_over & ~truncated_alone.any(1)
            assert torch.equal(step.final_state[same_state], step.state[same_state])
            assert not (step.active & step.terminations & stays).any()
        was_active, num_over = step.active, num_over + step.episode_over.sum()
    assert num_over > 0


def padded(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    result = np.zeros(shape, np.asarray(value).dtype)
    result[tuple(slice(n) for n in np.shape(value))] = value
    return result


def one_episode(env_id, kwargs, seed, joint_actions, obs_shape, action_space):
    """The genuine env stepped by hand with actions [T, A(, D)]: yields what the contract says about each step."""
    env = make_parallel_env(env_id, **kwargs)
    agents = env.possible_agents

    def rows(obs, infos, alive):
        plain = {a: o["observation"] if isinstance(o, dict) else o for a, o in obs.items()}
        rows = np.stack([padded(plain[a], obs_shape) if a in alive else np.zeros(obs_shape) for a in agents])
        masks = None
        if isinstance(action_space, gym.spaces.Discrete):
            masks = np.zeros((len(agents), action_space.n), dtype=bool)
            for i, a in enumerate(agents):
                masks[i, : env.action_space(a).n] = True
                if a in alive and isinstance(obs[a], dict):
                    masks[i, : env.action_space(a).n] = obs[a]["action_mask"]
        try:
            state = env.state()
        except NotImplementedError:
            state = np.concatenate(list(rows), axis=-1)
        return rows, masks, state

    obs, infos = env.reset(seed=seed)
    alive = list(env.agents)
    yield (*rows(obs, infos, alive), alive, None, None, None, False)
    for joint in joint_actions:
        acting, actions = alive, {}
        for i, a in enumerate(agents):
            space = env.action_space(a)
            if isinstance(space, gym.spaces.Box):
                actions[a] = np.clip(joint[i][: space.shape[0]], space.low, space.high)
            else:
                actions[a] = joint[i]
        obs, rewards, terms, truncs, infos = env.step({a: actions[a] for a in acting})
        alive = list(env.agents)
        reward = [rewards[a] if a in acting else 0.0 for a in agents]
        term = [a in acting and bool(terms[a]) for a in agents]
        trunc = any(truncs[a] for a in acting)
        yield (*rows(obs, infos, alive or acting), alive, reward, term, trunc, not alive)
        if not alive:
            return


@pytest.mark.parametrize("name", ENVS)
def test_same_numbers_as_the_genuine_env(name):
    env_id, kwargs, num_steps = ENVS[name]
    env = make_vec_env(env_id, 2, "cpu", 0, backend="pettingzoo", **kwargs)
    steps = roll(env, 5, num_steps)
    for n in range(2):
        t, episode = 0, 0
        while t < num_steps:
            joint = [actions[n].numpy() for actions, _ in steps[t + 1 :]]
            seed = episode_seed(5, n, episode, 2)
            genuine = one_episode(env_id, kwargs, seed, joint, env.obs_shape, env.action_space)
            total, start = np.zeros(env.num_agents), t
            for obs, mask, state, alive, reward, term, trunc, over in genuine:
                step = steps[t][1]
                if reward is not None:
                    np.testing.assert_allclose(step.rewards[n], reward, rtol=1e-6)
                    assert step.terminations[n].tolist() == term
                    assert step.truncations[n] == trunc
                    assert step.episode_over[n] == over
                    total += reward
                # At the end of an episode the genuine env shows the end, and the vector the next start as well.
                shown_obs, shown_state = (step.final_obs, step.final_state) if over else (step.obs, step.state)
                np.testing.assert_allclose(shown_obs[n], obs, rtol=1e-6)
                np.testing.assert_allclose(shown_state[n], state, rtol=1e-6)
                if over:
                    np.testing.assert_allclose(step.episode_returns[n], total, rtol=1e-5, atol=1e-5)
                    assert step.episode_lengths[n] == t - start
                    break
                assert step.active[n].tolist() == [a in alive for a in env.agents]
                if step.action_mask is not None:
                    assert step.action_mask[n].tolist() == mask.tolist()
                t += 1
            episode += 1
        assert episode > 1
    env.close()


@pytest.mark.parametrize("name", ["pursuit", "zombies", "pistonball", "speaker", "toy-masks"])
def test_processes_do_not_change_the_numbers(name):
    env_id, kwargs, num_steps = ENVS[name]
    alone = make_vec_env(env_id, 3, "cpu", 0, backend="pettingzoo", **kwargs)
    spread = make_vec_env(env_id, 3, "cpu", 0, backend="pettingzoo", num_env_procs=2, **kwargs)
    for (_, one), (_, other) in zip(roll(alone, 3, num_steps), roll(spread, 3, num_steps), strict=True):
        assert_equal_steps(one, other)
    alone.close()
    spread.close()


@pytest.mark.parametrize("num_env_procs", [0, 2])
def test_sub_envs_and_episodes_differ(num_env_procs):
    # SuperSuit's own seeds make sub-envs 1 and 2 of 4 in 2 processes alike.
    kwargs = dict(**SMALL_PURSUIT, max_cycles=2)
    env = make_vec_env("pursuit", 4, "cpu", 0, backend="pettingzoo", num_env_procs=num_env_procs, **kwargs)
    starts = [step.state[n] for _, step in roll(env, 1, 6)[::2] for n in range(4)]  # 4 episodes of 4 envs
    assert len({tuple(s.flatten().tolist()) for s in starts}) == 16
    env.close()


def example_of_the_docs(section: str) -> str:
    """The first python block of a section of docs/envs.md."""
    docs = (Path(__file__).parents[1] / "docs" / "envs.md").read_text(encoding="utf-8")
    return docs.split(f"## {section}\n")[1].split("```python\n")[1].split("```")[0]


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    (tmp_path / "my_env.py").write_text(example_of_the_docs("Your own env"))
    monkeypatch.syspath_prepend(tmp_path)
    env = make_vec_env("my_env:Meeting", 3, "cpu", 0, size=4)
    steps = [step for _, step in roll(env, 0, 200)]
    assert any(step.terminations.any() for step in steps) and any(step.truncations.any() for step in steps)
    met = torch.stack([step.rewards.min(1).values > 0 for step in steps])
    assert torch.equal(met, torch.stack([step.terminations.all(1) for step in steps]))


class Duel(gym.Env):
    """A tuple env: two agents count up together, and the game is over at 5. It calls its time limit done."""

    def __init__(self, max_steps):
        self.max_steps = max_steps
        self.observation_space = gym.spaces.Tuple([gym.spaces.Box(0, 99, (1,), np.float32)] * 2)
        self.action_space = gym.spaces.Tuple([gym.spaces.Discrete(2)] * 2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.count = 0, int(self.np_random.integers(2))
        return self.observe(), {}

    def observe(self):
        return tuple(np.array([self.count], np.float32) for _ in range(2))

    def step(self, actions):
        self.t += 1
        self.count += sum(actions)
        return self.observe(), list(actions), self.count >= 5 or self.t >= self.max_steps, False, {}


@pytest.fixture
def tuple_env(tmp_path, monkeypatch):
    (tmp_path / "tuple_env.py").write_text(example_of_the_docs("Tuple envs"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tuple_env", raising=False)
    return importlib.import_module("tuple_env")


def test_the_tuple_example_of_the_docs(tuple_env):
    """The game's end is a termination, its time limit a truncation, and both at once a termination."""
    gym.register("Duel-v0", entry_point=f"{__name__}:Duel", kwargs={"max_steps": 3})
    kwargs = dict(package=__name__, game="Duel-v0", limit_name="max_steps", limit=6)
    env = make_vec_env("tuple_env:TupleEnv", 2, "cpu", 0, **kwargs)
    ways = {  # actions -> in how many steps the game ends from 1, from 0; 0: at the time limit
        (1, 1): (2, 3),
        (1, 0): (4, 5),
        (0, 0): (0, 0),
    }
    for actions, lengths in ways.items():
        for start, length in zip((1, 0), lengths, strict=True):
            step = env.reset(next(s for s in range(99) if env.reset(s).obs[0, 0, 0] == start))
            assert step.obs[0].flatten().tolist() == [start, start]
            for t in range(length or 6):
                step = env.step(torch.tensor([actions] * 2))
                assert step.rewards[0].tolist() == list(actions)
                assert step.episode_over[0] == (t + 1 == (length or 6))
            assert step.terminations[0].tolist() == [length > 0] * 2 and step.truncations[0] == (length == 0)
            assert step.final_obs[0, 0, 0] == start + sum(actions) * (length or 6)
    env = make_vec_env("tuple_env:TupleEnv", 1, "cpu", 0, **{**kwargs, "limit": 5})
    env.reset(next(s for s in range(99) if env.reset(s).obs[0, 0, 0] == 0))
    steps = [env.step(torch.tensor([[1, 0]])) for _ in range(5)]  # at 5 in the last step that there is time for
    assert steps[-1].terminations.all() and not steps[-1].truncations.any() and not steps[-2].episode_over.any()


@pytest.mark.parametrize("package, factory, limit", [("lbforaging", "foraging", 50), ("rware", "warehouse", 500)])
def test_tuple_envs_of_others(tuple_env, package, factory, limit):
    pytest.importorskip(package)
    env = make_vec_env(f"tuple_env:{factory}", 2, "cpu", 0)
    step = env.reset(1)
    for _ in range(limit):
        assert not step.episode_over.any()
        step = env.step(torch.zeros(2, 2, dtype=torch.int64))  # nobody does anything
    assert step.truncations.all() and not step.terminations.any() and step.episode_lengths.tolist() == [limit] * 2
    again = make_vec_env(f"tuple_env:{factory}", 2, "cpu", 1)
    assert torch.equal(make_vec_env(f"tuple_env:{factory}", 2, "cpu", 1).reset().obs, again.reset().obs)


def line_walk(num_envs: int, **kwargs) -> VecEnv:
    """The batched env that docs/envs.md shows how to write."""
    names = {}
    exec(example_of_the_docs("Add a batched env"), names)
    return names["LineWalk"](num_envs, "cpu", 0, **kwargs)


def test_the_batched_example_of_the_docs_keeps_the_contract():
    check_contract(line_walk(5), 60, masked=False)
    env = line_walk(3, max_cycles=3)
    first, again, other = roll(env, 1, 12), roll(env, 1, 12), roll(env, 2, 12)
    for (_, a), (_, b) in zip(first, again, strict=True):
        assert_equal_steps(a, b)
    assert not torch.equal(first[0][1].state, other[0][1].state)
    with pytest.raises(ValueError, match=r"\[3, 2\] int64"):
        env.step(torch.zeros(3, 1, dtype=torch.int64))


def test_the_batched_example_of_the_docs_plays_its_game():
    """Walkers that go towards each other meet; those who stay run into the time limit."""
    env = line_walk(4, size=8, max_cycles=6)
    step = env.reset(3)
    cells = step.obs[:, 0].clone()  # [N, 2] left's cell, right's
    assert torch.equal(step.obs[:, 1], cells.flip(1)) and (cells[:, 0] < 4).all() and (cells[:, 1] >= 4).all()
    walked = env.step(torch.tensor([[2, 0]] * 4))
    gap = cells[:, 1] - cells[:, 0]
    assert torch.equal(walked.terminations.all(1), gap <= 2)
    assert torch.equal(walked.final_obs[:, 0], cells + torch.tensor([1, -1]))
    assert torch.equal(walked.rewards, (gap <= 2).float()[:, None].repeat(1, 2))
    env.reset(3)
    stayed = [env.step(torch.ones(4, 2, dtype=torch.int64)) for _ in range(6)]
    assert stayed[-1].truncations.all() and not stayed[-1].terminations.any()
    assert stayed[-1].episode_lengths.tolist() == [6] * 4 and not stayed[-2].episode_over.any()
    assert torch.equal(stayed[-1].final_obs[:, 0], cells)


def test_the_batched_example_of_the_docs_is_trained_on_once_it_is_registered(monkeypatch):
    """As the page says: the twin of a genuine env of that name is what "auto" takes."""
    names = {}
    exec(example_of_the_docs("Add a batched env"), names)
    real = envs._batched_twin
    monkeypatch.setattr(envs, "_batched_twin", lambda name: names["LineWalk"] if name == PLAIN else real(name))
    env = make_vec_env(PLAIN, 2, "cpu", 0)
    assert env.backend == "batched" and env.env_id == PLAIN and isinstance(env, names["LineWalk"])
    assert isinstance(make_vec_env(PLAIN, 2, "cpu", 0, backend="pettingzoo"), PettingZooVecEnv)


@pytest.mark.parametrize("env_id, backend", [("pursuit", "batched"), ("stag_hunt", "batched"), (TOY, "pettingzoo")])
def test_reset_without_a_seed_goes_on(env_id, backend):
    env = make_vec_env(env_id, 4, "cpu", 0)
    assert env.backend == backend
    first, second, third = env.reset(5).obs.clone(), env.reset().obs.clone(), env.reset(None).obs.clone()
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert torch.equal(env.reset(5).obs, first) and torch.equal(env.reset().obs, second)


def test_a_checked_env_is_not_built_again(monkeypatch):
    made = []
    real = envs.make_parallel_env
    monkeypatch.setattr(
        "envs.pettingzoo_vec.make_parallel_env", lambda *args, **kw: made.append(args) or real(*args, **kw)
    )
    checked = check_env("pursuit", "pettingzoo", SMALL_PURSUIT)
    assert len(made) == 1
    env = make_vec_env(checked, 3, "cpu", 0, max_cycles=4)
    assert len(made) == 1 + 3 and env.num_agents == 3
    steps = [step for _, step in roll(env, 0, 4)]
    assert steps[-1].episode_lengths.tolist() == [4] * 3  # arguments on top of those checked
    twin = make_vec_env(check_env("pursuit", "auto", SMALL_PURSUIT), 2, "cpu", 0)
    assert len(made) == 5 and twin.backend == "batched" and twin.env_id == "sisl/pursuit_v5"


def test_what_observations_mean_is_declared_by_the_env():
    meta = dict(env_id="stag_hunt-8x8-4h1s", env_kwargs={}, num_agents=4, obs_shape=[8, 8, 7], obs_dtype="uint8")
    spec = describe_obs(meta)
    assert len(spec.names) == len(spec.kinds) == 7 and spec.agent_planes == [0, 1, 2, 3] and spec.certain
    assert describe_obs(meta | {"env_kwargs": {"view": 3}}).window
    spec = describe_obs(meta | dict(env_id="sisl/pursuit_v5", num_agents=8, obs_shape=[7, 7, 3]))
    assert spec.ego == "centre" and spec.kinds[spec.team] == "count" and spec.resimulates
    spec = describe_obs(meta | dict(env_id="mpe2.simple_spread_v3", obs_shape=[18], obs_dtype="float32"))
    assert spec.kinds == ("real",) * 18 and not spec.agent_planes and spec.ego == "none"
    with pytest.raises(UsageError, match="flatten"):
        describe_obs(meta | dict(env_id=TOY, obs_shape=[3, 4]))


def test_seeds():
    env = make_vec_env("pursuit", 2, "cpu", 1, backend="pettingzoo", **SMALL_PURSUIT, max_cycles=3)
    first, again, other = roll(env, 1, 8), roll(env, 1, 8), roll(env, 2, 8)
    for (_, a), (_, b) in zip(first, again, strict=True):
        assert_equal_steps(a, b)
    assert not torch.equal(first[0][1].state, other[0][1].state)
    seeds = {episode_seed(7, n, episode, 5) for n in range(5) for episode in range(100)}
    assert len(seeds) == 500


def test_time_limit_is_truncation_and_the_end_of_the_game_is_termination():
    env = make_vec_env("pursuit", 1, "cpu", 0, backend="pettingzoo", **SMALL_PURSUIT, max_cycles=3)
    *_, (_, step) = roll(env, 0, 3)
    assert step.truncations.all() and step.episode_over.all() and not step.terminations.any()
    assert step.active.all() and step.episode_lengths.tolist() == [3]
    assert not torch.equal(step.final_state, step.state)

    env = make_vec_env("butterfly/pistonball_v6", 1, "cpu", 0, n_pistons=3)  # the ball starts next to its goal
    step = next(step for _, step in roll(env, 0, 40) if step.episode_over)
    assert step.terminations.all() and step.episode_over.all() and not step.truncations.any()


def test_agents_that_die_stay_out_until_the_episode_ends():
    env = make_vec_env("butterfly/knights_archers_zombies_v11", 2, "cpu", 0, **ZOMBIES)
    steps = [step for _, step in roll(env, 0, 300)]
    num_deaths = 0
    for before, after in zip(steps[:-1], steps[1:], strict=True):
        goes_on = ~after.episode_over[:, None]  # [N, 1]
        dead = ~before.active & goes_on
        num_deaths += int(((before.active & ~after.active) & goes_on).sum())
        assert not after.active[dead].any() and not after.rewards[dead].any() and not after.terminations[dead].any()
        assert not after.obs[dead].any() and not after.final_obs[dead].any()
        assert torch.equal(before.active & ~after.active & goes_on, after.terminations & goes_on)
        assert after.active[after.episode_over].all()
    assert num_deaths >= 4 and sum(step.episode_over.sum() for step in steps) >= 2


def test_leaving_arriving_and_being_truncated_alone():
    env = make_vec_env(TOY, 1, "cpu", 0)
    step, table = env.reset(0), []
    number = step.obs[0, 0, 1].item()
    for t in range(8):
        step = env.step(torch.tensor([[2, 0, 1]]))
        if t == 5:  # c's next observation is the last it saw, though it has gone
            assert step.final_obs[0].tolist() == [[0] * 4, [6, number, 6, 6], [6, number, 6, 0]]
            assert step.final_state[0].tolist() == step.final_obs[0].flatten().tolist()
            assert step.obs[0].tolist() == [[0] * 4, [6, number, 6, 6], [0] * 4]
        flags = step.active, step.rewards, step.terminations, step.truncations, step.episode_over
        table.append([value[0].tolist() for value in flags])
    T, F = True, False
    assert table == [  # active from then on, rewards, terminations, truncations, over
        [[T, T, F], [3, 1, 0], [F, F, F], F, F],
        [[T, T, T], [3, 1, 0], [F, F, F], F, F],  # c comes
        [[T, T, T], [3, 1, 2], [F, F, F], F, F],
        [[F, T, T], [3, 1, 2], [T, F, F], F, F],  # a leaves, and is paid for the step
        [[F, T, T], [0, 1, 2], [F, F, F], F, F],
        [[F, T, F], [0, 1, 2], [F, F, F], T, F],  # c's own time limit
        [[F, T, F], [0, 1, 0], [F, F, F], F, F],
        [[T, T, F], [0, 1, 0], [F, F, F], T, T],  # b's time limit ends the episode; the next has begun
    ]
    assert step.final_obs[0].tolist() == [[0] * 4, [8, number, 8, 8], [0] * 4]
    assert step.final_state[0].tolist() == [0] * 4 + [8, number, 8, 8] + [0] * 4
    assert step.episode_returns.tolist() == [[12, 8, 8]] and step.episode_lengths.tolist() == [8]
    assert step.obs[0, 0, 0] == 0 and step.obs[0, 0, 1] != number


@pytest.mark.parametrize("masks", ["dict", "info"])
def test_action_masks_follow_the_env_and_exclude_padding(masks):
    env = make_vec_env(TOY, 1, "cpu", 0, masks=masks)
    T, F = True, False
    assert env.reset(0).action_mask[0].tolist() == [[F, T, T, F, F], [F, T, T, T, F], [T, T, T, T, T]]
    assert env.step(torch.tensor([[1, 1, 0]])).action_mask[0].tolist() == [
        [T, F, T, F, F],
        [T, F, T, T, F],
        [T, T, T, T, T],  # not there yet: any row that a policy can take a softmax of
    ]


def test_state_is_the_envs_own_or_all_observations():
    own = make_vec_env(TOY, 2, "cpu", 0, with_state=True)
    step = own.reset(0)
    assert own.state_shape == (2,) and torch.equal(step.state[:, 1], step.obs[:, 0, 1])
    joined = make_vec_env(TOY, 2, "cpu", 0)
    step = joined.reset(0)
    assert joined.state_shape == (12,) and torch.equal(step.state, step.obs.flatten(1))


def test_images_are_joined_along_their_channels():
    kwargs = dict(observation=gym.spaces.Box(0, 255, (4, 5, 3), np.uint8))
    env = make_vec_env(PLAIN, 2, "cpu", 0, **kwargs)
    step = env.reset(0)
    assert env.state_shape == (4, 5, 6) and step.state.dtype == torch.uint8
    assert torch.equal(step.state[..., 3:], step.obs[:, 1])


def test_observations_that_are_not_arrays_become_arrays():
    env = make_vec_env(PLAIN, 2, "cpu", 0, observation=gym.spaces.Discrete(4))
    step = env.reset(0)
    assert env.obs_shape == (4,) and torch.equal(step.obs.sum(-1), torch.ones(2, 2))  # one-hot


def test_continuous_actions_are_clipped():
    env = make_vec_env("butterfly/pistonball_v6", 1, "cpu", 0, n_pistons=4)
    step = env.step(torch.tensor([[[-3.0], [0.5], [3.0], [1.0]]]))
    assert step.executed_actions[0, :, 0].tolist() == [-1.0, 0.5, 1.0, 1.0]


def test_replaced_actions_are_reported():
    env = make_vec_env(PLAIN, 2, "cpu", 0)
    assert env.step(torch.ones(2, 2, dtype=torch.int64)).executed_actions is None
    assert env.step(torch.tensor([[0, 1], [1, 1]])).executed_actions.tolist() == [[1, 1], [1, 1]]


def test_render():
    with pytest.raises(ValueError, match="render_mode"):
        make_vec_env("pursuit", 1, "cpu", 0, backend="pettingzoo").render()
    for num_env_procs in (0, 2):
        env = make_vec_env(
            "pursuit", 2, "cpu", 0, backend="pettingzoo", num_env_procs=num_env_procs, render_mode="rgb_array"
        )
        frame = env.render()
        assert frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8 and frame.std() > 0
        env.close()


class Pictures(Plain):
    """Its pictures are what `shapes` says, one after the other; None is no picture at all."""

    def __init__(self, shapes, render_mode=None):
        super().__init__()
        self.shapes, self.render_mode = list(shapes), render_mode

    def render(self):
        shape = self.shapes.pop(0)
        if shape == "raises":
            raise OSError("no display")
        return None if shape is None else np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    "env_id, env_kwargs, message",
    [
        (SPACES, {"x": gym.spaces.Discrete(2)}, "it has no argument 'render_mode'"),
        (f"{__name__}:Pictures", {"shapes": [None]}, r"render: expected numbers \[height, width, 3\], got array\(None"),
        (f"{__name__}:Pictures", {"shapes": ["raises"]}, "render raised OSError: no display"),
    ],
)
def test_envs_without_pictures_are_found_before_training(env_id, env_kwargs, message):
    checked = check_env(env_id, env_kwargs=env_kwargs)
    with pytest.raises(UsageError, match=f"gives no pictures .*{message}.*leave out --capture-video"):
        check_picture(checked)
    check_picture(check_env("stag_hunt"))


def test_pictures_of_changing_size_are_one_line():
    env = make_vec_env(
        f"{__name__}:Pictures", 1, "cpu", 0, shapes=[(4, 4, 3), (4, 4, 3), (5, 4, 3)], render_mode="rgb_array"
    )
    assert env.render().shape == env.render().shape == (4, 4, 3)
    with pytest.raises(RunError, match=r"expected \(4, 4, 3\) as before, got \(5, 4, 3\)"):
        env.render()


def test_names():
    assert resolve_env_id("pursuit") == resolve_env_id("sisl/pursuit-v5") == "sisl/pursuit_v5"
    assert resolve_env_id("butterfly/pistonball") == "butterfly/pistonball_v6"
    assert resolve_env_id("mpe2.simple_spread_v3") == "mpe2.simple_spread_v3"
    assert resolve_env_id("stag_hunt") == "stag_hunt"


def test_names_before_the_registry(monkeypatch):
    monkeypatch.delattr(pettingzoo, "parallel_registry")  # as in PettingZoo < 1.27
    assert resolve_env_id("pursuit") == "pettingzoo.sisl.pursuit_v5"
    assert resolve_env_id("sisl/pursuit_v5") == "pettingzoo.sisl.pursuit_v5"
    assert check_env("pursuit", "auto").backend == "batched"
    with pytest.raises(ValueError, match="unknown env id"):
        resolve_env_id("sisl/pursuit_v4")


def test_backends():
    for env_id in ("pursuit", "sisl/pursuit_v5", "stag_hunt-8x8-4h2s"):
        assert check_env(env_id).backend == "batched"
    assert check_env("pursuit", "pettingzoo").backend == check_env("mpe2.simple_spread_v3").backend == "pettingzoo"
    assert check_env("pursuit").env_id == "sisl/pursuit_v5"
    env = make_vec_env("pursuit", 2, "cpu", 0, **SMALL_PURSUIT)
    assert env.backend == "batched" and env.env_id == "sisl/pursuit_v5" and env.num_agents == 3
    genuine = make_vec_env("pursuit", 2, "cpu", 0, backend="pettingzoo", **SMALL_PURSUIT)
    assert isinstance(genuine, PettingZooVecEnv)
    assert genuine.obs_shape == env.obs_shape and genuine.state_shape == env.state_shape
    stag_hunt = make_vec_env("stag_hunt-8x8-4h1s", 2, "cpu", 0, num_blocks=2)
    assert stag_hunt.backend == "batched" and stag_hunt.state_shape[:2] == (8, 8)


BAD = [
    (("pursiut",), {}, "did you mean pursuit or sisl/pursuit_v5"),
    (("sisl/pursuit_v4",), {}, "sisl/pursuit_v5"),
    (("pistonball",), {}, "butterfly/pistonball_v6"),
    (("stag_hunt-9x9-4h1s",), {}, "stag_hunt-8x8-4h1s"),
    (("no_module.at_all",), {}, "cannot import"),
    (("",), {}, "package.module:factory"),
    ((f"{__name__}:nothing",), {}, "package.module:factory"),
    (("classic/chess_v6",), {}, "parallel API"),
    (("pettingzoo.classic.tictactoe_v3",), {}, "parallel API"),
    ((f"{__name__}:padded",), {"value": np.zeros(1), "shape": (1,)}, "parallel API"),
    (("mpe2.simple_spread_v3", "batched"), {}, "--backend pettingzoo"),
    (("pursuit", "fast"), {}, "auto, pettingzoo, batched"),
    (("pursuit", "pettingzoo"), {"n_evader": 3}, "n_evaders, n_pursuers"),
    (("pursuit", "auto"), {"n_evader": 3}, "n_evaders, n_pursuers"),
    (("stag_hunt", "auto"), {"hight": 3}, "height"),
    (("pursuit",), {"seed": 3, "device": "cpu"}, "got device, seed: leave it out"),
    (("mpe2.simple_spread_v3",), {"render_mode": "rgb_array"}, "got render_mode"),
    (("pursuit",), [1], "in JSON an object"),
    (("vmas:navigation?n_agents",), {}, "name=value"),
    (("vmas:navigation?n_agents=3",), {"n_agents": 4}, "expected n_agents once"),
    (("vmas:navigation?seed=3",), {}, "got seed"),
    (("vmas:navigation", "pettingzoo"), {}, "--backend batched"),
    (("mpe2.simple_spread_v3",), {"agents": 3}, "N, local_ratio"),
    (("butterfly/pistonball_v6",), {"pistons": 3}, "n_pistons"),
    (("butterfly/knights_archers_zombies_v11",), {"obs_method": "vector-sequence"}, "fixed size"),
    (("butterfly/knights_archers_zombies_v11",), {"obs_method": "pixels"}, "pixels"),
    ((PLAIN,), {"action": gym.spaces.Text(3)}, "Discrete"),
]


@pytest.mark.parametrize("args, env_kwargs, message", BAD)
def test_bad_input_is_one_clear_line(args, env_kwargs, message):
    with pytest.raises(UsageError) as error:
        check_env(*args, env_kwargs=env_kwargs)
    assert message in str(error.value) and "\n" not in str(error.value)


class LineSimulator:
    """A module as SIMULATORS names one: the docs' batched env, by "vmas:line"."""

    @staticmethod
    def check(name, env_kwargs):
        if name != "line":
            raise UsageError(f"expected line, got {name}")
        return "vmas:line", env_kwargs

    @staticmethod
    def make(name, num_envs, device, seed, **env_kwargs):
        assert name == "line"
        return line_walk(num_envs, **env_kwargs)


def test_simulators_without_a_genuine_form(monkeypatch):
    monkeypatch.setitem(sys.modules, "envs.vmas_vec", LineSimulator)
    checked = check_env("vmas:line?max_cycles=4", env_kwargs={"size": 10})
    assert (checked.env_id, checked.backend, checked.genuine) == ("vmas:line", "batched", False)
    assert checked.env_kwargs == {"max_cycles": 4, "size": 10} and checked.spec is None
    assert resolve_env_id("vmas:line?size=10") == "vmas:line"
    env = make_vec_env(checked, 3, "cpu", 0)
    assert env.env_id == "vmas:line" and env.max_cycles == 4 and env.size == 10
    seen = make_eval_env(checked, 2, "cpu", 0, num_env_procs=2, render=True)
    assert seen.backend == "batched" and seen.num_envs == 2
    for make in (lambda: make_parallel_env("vmas:line"), lambda: make_vec_env(checked, 1, "cpu", 0, "pettingzoo")):
        with pytest.raises(UsageError, match="--backend batched"):
            make()
    with pytest.raises(UsageError, match="expected line"):
        check_env("vmas:circle")


def test_a_simulator_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "envs.jaxmarl_vec", None)  # as if it were not there
    with pytest.raises(UsageError, match="pip install -r requirements-jaxmarl.txt") as error:
        check_env("jaxmarl:SMAX?scenario=3m")
    assert "\n" not in str(error.value)


def test_evaluation_is_on_the_genuine_env_where_there_is_one():
    checked = check_env("pursuit", "auto", SMALL_PURSUIT)
    assert checked.genuine and checked.backend == "batched"
    env = make_eval_env(checked, 1, "cpu", 0, render=True, max_cycles=4)
    assert env.backend == "pettingzoo" and env.render().ndim == 3
    steps = [step for _, step in roll(env, 0, 4)]
    assert steps[-1].episode_lengths.tolist() == [4]


def test_won_or_lost_is_a_field_of_its_own():
    step = line_walk(2).reset(0)
    assert step.success is None
    fields = {name: getattr(step, name) for name in FIELDS}
    assert EnvStep(**fields, success=step.truncations).success is step.truncations


@pytest.mark.parametrize("env_id", ["my_pursuit:Env", "drone_pursuit:Env", "my.stag_hunt:Env", "stag_hunt_2:Env"])
def test_a_name_that_contains_a_known_one_is_not_that_env(env_id):
    meta = dict(env_id=env_id, env_kwargs={}, num_agents=4, obs_shape=[7, 7, 3], obs_dtype="uint8")
    spec = describe_obs(meta)
    assert spec.names == ("channel 0", "channel 1", "channel 2") and spec.ego == "none" and not spec.resimulates


def test_bad_counts():
    with pytest.raises(UsageError, match="num_envs >= 1"):
        make_vec_env("pursuit", 0, "cpu", 0)
    with pytest.raises(UsageError, match="num_env_procs >= 0"):
        make_vec_env("mpe2.simple_spread_v3", 1, "cpu", 0, num_env_procs=-1)
    assert 1 <= default_env_procs(2) <= 2 or sys.platform == "win32"


def test_bad_actions():
    env = make_vec_env("mpe2.simple_speaker_listener_v4", 1, "cpu", 0)
    for actions, message in [
        (torch.zeros(1, 3, dtype=torch.int64), r"\[1, 2\]"),
        (torch.zeros(1, 2), "int64"),
        (torch.tensor([[0, 5]]), "listener_0 in 0 ... 4, got 5"),
        (torch.tensor([[3, 0]]), "speaker_0 in 0 ... 2, got 3"),  # one of the padded actions
        (torch.tensor([[-1, 0]]), "got -1"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            env.step(actions)
        assert not isinstance(error.value, UsageError)  # whoever calls step is wrong, not who gave the arguments
    env = make_vec_env("butterfly/pistonball_v6", 1, "cpu", 0, n_pistons=4)
    with pytest.raises(ValueError, match="NaN"):
        env.step(torch.full((1, 4, 1), torch.nan))


SPAWN = """
import multiprocessing, sys, torch
from envs import make_vec_env
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")  # as on Windows
    env = make_vec_env("mpe2.simple_spread_v3", 3, "cpu", 0, num_env_procs=2)
    env.reset(4)
    print(repr(env.step(torch.ones(3, 3, dtype=torch.int64)).obs.sum().item()))
    raise SystemExit(3)  # and without close(): the workers must not keep the program from ending
"""


def test_spawned_processes_and_an_end_without_close(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    root = Path(__file__).parents[1]
    code = f"import runpy, sys; sys.path.insert(0, {str(root)!r}); runpy.run_path({str(script)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=root)
    assert result.returncode == 3, result.stderr
    env = make_vec_env("mpe2.simple_spread_v3", 3, "cpu", 0)
    env.reset(4)
    assert float(result.stdout.split()[-1]) == env.step(torch.ones(3, 3, dtype=torch.int64)).obs.sum().item()


# ---------------------------------------------------------------- spaces
MULTI = gym.spaces.MultiDiscrete([2, 3], start=[0, 5])
INTEGERS = gym.spaces.Box(np.array([-1, 2]), np.array([1, 3]), dtype=np.int64)


class Spaces(ParallelEnv):
    """Two agents, whose action spaces may differ, and episodes of two steps. Keeps the actions that it was given."""

    metadata = {"name": "spaces"}
    possible_agents = ["x", "y"]
    given: list = []

    def __init__(self, x, y=None, obs=None, infos=None):
        self.spaces = {"x": x, "y": y or x}
        self.obs_space, self.infos = obs or gym.spaces.Box(-9, 9, (2,), np.float32), infos or {}

    def observation_space(self, agent):
        return self.obs_space

    def action_space(self, agent):
        return self.spaces[agent]

    def reset(self, seed=None, options=None):
        self.agents, self.t = list(self.possible_agents), 0
        return dict.fromkeys(self.agents, self.observe()), dict.fromkeys(self.agents, self.infos)

    def observe(self):
        return self.obs_space.sample()

    def step(self, actions):
        every = self.agents
        assert all(self.spaces[agent].contains(actions[agent]) for agent in every), actions
        Spaces.given.append(actions)
        self.t += 1
        over = dict.fromkeys(every, self.t == 2)
        if self.t == 2:
            self.agents = []
        obs = dict.fromkeys(every, self.observe())
        return obs, dict.fromkeys(every, 0.0), dict.fromkeys(every, False), over, dict.fromkeys(every, self.infos)


# spaces of x and y, the space of the contract, actions of x and y in it, and what their env gets
ACTIONS = {
    "offset": (gym.spaces.Discrete(3, start=1), None, gym.spaces.Discrete(3), [0, 2], [1, 3]),
    "offsets": (
        gym.spaces.Discrete(3, start=-1),
        gym.spaces.Discrete(2),
        gym.spaces.Discrete(3),
        [2, 1],
        [1, 1],
    ),
    "parts": (MULTI, None, gym.spaces.MultiDiscrete([2, 3]), [[1, 0], [0, 2]], [[1, 5], [0, 7]]),
    "unlike parts": (
        MULTI,
        gym.spaces.MultiDiscrete([4]),
        gym.spaces.MultiDiscrete([4, 3]),
        [[1, 2], [3, 0]],
        [[1, 7], [3]],
    ),
    "parts in rows": (
        gym.spaces.MultiDiscrete([[2, 3], [4, 5]]),
        None,
        gym.spaces.MultiDiscrete([2, 3, 4, 5]),
        [[1, 2, 3, 4], [0, 0, 0, 0]],
        [[[1, 2], [3, 4]], [[0, 0], [0, 0]]],
    ),
    "bits": (gym.spaces.MultiBinary(2), None, gym.spaces.MultiDiscrete([2, 2]), [[1, 0], [1, 1]], [[1, 0], [1, 1]]),
    "integers": (INTEGERS, None, gym.spaces.MultiDiscrete([3, 2]), [[0, 0], [2, 1]], [[-1, 2], [1, 3]]),
}


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("num_env_procs", [0, 2])
def test_actions_of_every_kind(name, num_env_procs):
    if num_env_procs and name not in ("offset", "unlike parts"):
        pytest.skip("processes are started for a few of them only")
    x, y, space, actions, given = ACTIONS[name]
    env = make_vec_env(SPACES, 2, "cpu", 0, num_env_procs=num_env_procs, x=x, y=y)
    assert env.action_space == space
    actions = torch.tensor([actions] * 2)
    assert actions.shape == (2, 2, *space.shape)
    Spaces.given.clear()
    step = env.step(actions)
    assert not step.episode_over.any() and env.step(actions).episode_over.all()
    if not num_env_procs:  # else they are given in another process, where the env asserts that they are of its space
        for got in Spaces.given:
            assert [np.asarray(got[agent]).tolist() for agent in "xy"] == given
        assert len(Spaces.given) == 4
    env.close()


def test_parts_that_an_agent_does_not_have_are_masked_out():
    env = make_vec_env(SPACES, 1, "cpu", 0, x=MULTI, y=gym.spaces.MultiDiscrete([4]))
    mask = env.reset(0).action_mask[0]  # [A, 4 + 3]: y has no second part, which is option 0 then
    assert mask.int().tolist() == [[1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]
    for actions, message in [
        ([[[2, 0], [0, 0]]], "action part 0 of x in 0 ... 1, got 2"),
        ([[[0, 0], [0, 1]]], "action part 1 of y in 0 ... 0, got 1"),
        ([[0, 0]], r"\[1, 2, 2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            env.step(torch.tensor(actions))
    same = make_vec_env(SPACES, 1, "cpu", 0, x=MULTI)
    assert same.reset(0).action_mask is None


@pytest.mark.parametrize("mask", [[0, 1, 1, 0, 1], (np.array([0, 1]), np.array([1, 0, 1]))])
def test_masks_of_parts(mask):
    env = make_vec_env(SPACES, 1, "cpu", 0, x=MULTI, infos={"action_mask": mask})
    assert env.reset(0).action_mask[0].int().tolist() == [[0, 1, 1, 0, 1]] * 2


def test_executed_parts_are_reported_as_the_contract_counts_them():
    env = make_vec_env(SPACES, 1, "cpu", 0, x=MULTI, infos={"executed_action": np.array([1, 7])})
    step = env.step(torch.zeros(1, 2, 2, dtype=torch.int64))
    assert step.executed_actions.tolist() == [[[1, 2], [1, 2]]]
    env = make_vec_env(SPACES, 1, "cpu", 0, x=gym.spaces.Discrete(3, start=4), infos={"executed_action": 6})
    assert env.step(torch.zeros(1, 2, dtype=torch.int64)).executed_actions.tolist() == [[2, 2]]


def masked_dict(**parts):
    return gym.spaces.Dict({**parts, "action_mask": gym.spaces.Box(0, 1, (3,), np.int8)})


class ThirdIsIllegal(Spaces):
    """Its Dict observation says that action 2 is illegal."""

    def observe(self):
        return {**self.obs_space.sample(), "action_mask": np.array([1, 1, 0], np.int8)}


@pytest.mark.parametrize(
    "parts, size",
    [
        (dict(observation=gym.spaces.Box(0, 1, (4,), np.float32)), 4),
        (dict(observations=gym.spaces.Box(0, 1, (4,), np.float32)), 4),
        (dict(board=gym.spaces.Box(0, 1, (2, 2), np.float32), phase=gym.spaces.Discrete(3)), 7),
    ],
)
def test_the_mask_of_any_dict_is_applied_and_is_no_observation(parts, size):
    env_id = f"{__name__}:ThirdIsIllegal"
    env = make_vec_env(env_id, 2, "cpu", 0, x=gym.spaces.Discrete(3), obs=masked_dict(**parts))
    for step in (env.reset(0), env.step(torch.ones(2, 2, dtype=torch.int64))):
        assert env.obs_shape == (size,) and step.obs.shape == (2, 2, size)
        assert step.action_mask.int().tolist() == [[[1, 1, 0]] * 2] * 2


BAD_SPACES = [
    (dict(x=gym.spaces.Discrete(4), obs=masked_dict(seen=gym.spaces.Discrete(2))), "each of 4 actions"),
    (dict(x=gym.spaces.Box(0, 1, (3,)), obs=masked_dict(seen=gym.spaces.Discrete(2))), "each of no actions"),
    (dict(x=gym.spaces.Discrete(3), obs=masked_dict()), "beside action_mask"),
    (dict(x=gym.spaces.Box(0, 1, (3,)), infos={"action_mask": [1, 1, 1]}), "no action_mask where actions are real"),
    (dict(x=gym.spaces.Discrete(3), infos={"action_mask": [0, 0, 0]}), "x: action_mask: expected a legal action"),
    (dict(x=gym.spaces.Discrete(3), infos={"action_mask": [1, 1]}), "expected 3 numbers, got 2"),
    (dict(x=gym.spaces.Discrete(2), infos={"action_mask": [1, 7]}), "expected 0 or 1, got 7"),
    (dict(x=MULTI, infos={"action_mask": [1, 1, 0, 0, 0]}), "a part without any"),
    (dict(x=gym.spaces.Box(-(2**62), 2**62, (1,), np.int64)), "few enough options"),
    (dict(x=gym.spaces.Discrete(10**7)), "few enough options"),
    (dict(x=gym.spaces.Discrete(2), y=gym.spaces.MultiBinary(1)), "of one kind for all agents"),
    (dict(x=gym.spaces.Text(3)), "MultiDiscrete"),
]


@pytest.mark.parametrize("env_kwargs, message", BAD_SPACES)
def test_spaces_that_cannot_be_used_are_one_line(env_kwargs, message):
    with pytest.raises(UsageError) as error:
        check_env(SPACES, env_kwargs=env_kwargs)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- envs that misbehave
class Faulty(Spaces):
    """Two agents, endless episodes. In its fifth step it does what `fault` says, to agent y alone where it can."""

    def __init__(self, fault=None, obs=None, masks=False, action=None):
        super().__init__(action or gym.spaces.Discrete(2), obs=obs)
        self.fault, self.infos = fault, {"action_mask": np.ones(2)} if masks else {}

    def reset(self, seed=None, options=None):
        self.count = 0
        return super().reset(seed)

    def observe(self):
        return np.zeros(self.obs_space.shape, self.obs_space.dtype)

    def state(self):
        if self.count == 5 and self.fault == "state raises":
            raise KeyError("nothing")
        return np.full(3, np.inf if self.count == 5 and self.fault == "state infinite" else 0.0)

    def step(self, actions):
        self.count += 1
        every = self.possible_agents
        flags = [dict.fromkeys(every, False) for _ in range(2)]
        result = [
            dict.fromkeys(every, self.observe()),
            dict.fromkeys(every, 1.0),
            *flags,
            dict.fromkeys(every, self.infos),
        ]
        if self.count == 5 and self.fault in FAULTS:
            return FAULTS[self.fault][0](self, result) or tuple(result)
        return tuple(result)


def change(part, value):
    """What y gets instead; the parts of a step: 0 observation, 1 reward, 2 and 3 flags, 4 info."""
    return lambda env, result: result[part].update(y=value)


def leave_out(part):
    return lambda env, result: result[part].pop("y") is None


def fail(error):
    def raise_it(env, result):
        raise error

    return raise_it


def sleep(env, result):
    time.sleep(60)


def die(env, result):
    os.kill(os.getpid(), signal.SIGKILL)


def stop(env, result):
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = {  # what it does -> (how, what the line says)
    "short obs": (change(0, np.zeros(1, np.float32)), r"y: observation: expected shape \(2,\), got \(1,\)"),
    "no obs": (leave_out(0), "y: observation: expected one, got none"),
    "nan obs": (change(0, np.array([0, np.nan], np.float32)), "y: observation: expected finite numbers, got nan"),
    "text obs": (change(0, np.array(["a", "b"])), "y: observation: expected numbers of float32, got <U1"),
    "ragged obs": (change(0, [[1], [2, 3]]), r"y: observation: expected an array of shape \(2,\)"),
    "no reward": (leave_out(1), "y: reward: expected a number, got None"),
    "nan reward": (change(1, float("nan")), "y: reward: expected a finite number, got nan"),
    "two rewards": (change(1, [1.0, 2.0]), "y: reward: expected a number"),
    "no termination": (leave_out(2), "y: terminations: expected True or False, got None"),
    "no truncation": (leave_out(3), "y: truncations: expected True or False, got None"),
    "flag of 2": (change(3, 2), "y: truncations: expected True or False, got 2"),
    "leaves": (lambda env, result: env.agents.remove("y"), "y: flags: expected a termination or truncation"),
    "stranger": (lambda env, result: env.agents.append("z"), "agents: expected only possible_agents, got z"),
    "four parts": (lambda env, result: tuple(result[:4]), "step: expected 5 dicts by agent"),
    "cut, unseen": (
        lambda env, result: [result[3].update(y=True), result[0].pop("y")] and None,
        "y: observation: expected one, got none",
    ),
    "mask": (change(4, {"action_mask": [0, 0]}), "y: action_mask: expected a legal action, got none"),
    "mask gone": (change(4, {}), "y: action_mask: expected one in every step"),
    "executed": (change(4, {"executed_action": 7}), "y: executed_action: expected one of Discrete"),
    "raises": (fail(ZeroDivisionError("by\nnothing")), "step raised ZeroDivisionError: by nothing"),
    "raises its own": (fail(type("Own", (Exception,), {})("what it says")), "step raised Own: what it says"),
    "hangs": (sleep, r"its worker process gave no answer within 1 seconds: .*--env-timeout"),
    "is stopped": (stop, r"its worker process gave no answer within 1 seconds"),
    "dies": (die, r"env 0: its worker process died \(signal 9"),
}
FAULTY = f"{__name__}:Faulty"


def run_into_fault(num_env_procs=0, **env_kwargs) -> RunError:
    env = make_vec_env(FAULTY, 2, "cpu", 0, num_env_procs=num_env_procs, env_timeout=1.0, **env_kwargs)
    procs = list(getattr(env._venv, "procs", []))
    with pytest.raises(RunError) as error:
        for _ in range(5):
            env.step(torch.zeros(2, 2, dtype=torch.int64))
    assert env._lengths.tolist() == [4, 4]  # not before the fifth step
    start = time.monotonic()
    env.close()
    assert time.monotonic() - start < workers.GRACE + 5
    assert not any(proc.is_alive() for proc in procs)
    return error.value


@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in ("hangs", "is stopped", "dies")])
def test_what_an_env_returns_is_checked(fault):
    error = run_into_fault(fault=fault, masks=fault.startswith("mask"))
    assert re.search(FAULTS[fault][1], str(error)) and "\n" not in str(error)
    assert str(error).startswith(f"{FAULTY}, env 0, step 5")


def test_an_env_that_does_nothing_wrong_goes_on():
    for masks in (False, True):
        env = make_vec_env(FAULTY, 2, "cpu", 0, masks=masks)
        steps = [env.step(torch.zeros(2, 2, dtype=torch.int64)) for _ in range(7)]
        assert steps[-1].episode_returns.tolist() == [[7, 7]] * 2


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are not stopped by signals here")
@pytest.mark.parametrize("fault", ["hangs", "is stopped", "dies", "raises its own", "nan obs"])
def test_a_worker_in_trouble_ends_the_run_in_one_line_and_is_gone(fault):
    error = run_into_fault(num_env_procs=2, fault=fault)
    assert re.search(FAULTS[fault][1], str(error)) and "\n" not in str(error)


def test_the_traceback_of_the_env_is_kept_for_the_log():
    for num_env_procs in (0, 2):
        cause = run_into_fault(num_env_procs, fault="raises").__cause__
        text = "".join(traceback.format_exception(cause))
        assert "raise_it" in text and "ZeroDivisionError: by" in text


class NoStateAtTheEnd(Faulty):
    """As multiwalker, whose bodies are gone when the game is over."""

    def state(self):
        if not self.agents:
            raise AttributeError("no bodies")
        return np.full(3, float(self.count))

    def step(self, actions):
        obs, rewards, terms, truncs, infos = super().step(actions)
        if self.count == 4:
            self.agents = []
        over = dict.fromkeys(terms, self.count == 4)
        return (obs, rewards, truncs, over, infos) if self.fault == "cut" else (obs, rewards, over, truncs, infos)


def test_a_state_that_nothing_is_bootstrapped_from_may_be_missing():
    env_id = f"{__name__}:NoStateAtTheEnd"
    env = make_vec_env(env_id, 1, "cpu", 0)
    steps = [env.step(torch.zeros(1, 2, dtype=torch.int64)) for _ in range(4)]
    assert steps[-1].terminations.all() and steps[-1].final_state.tolist() == [[3, 3, 3]]
    env = make_vec_env(env_id, 1, "cpu", 0, fault="cut")
    with pytest.raises(RunError, match="step 4: state raised AttributeError: no bodies"):
        for _ in range(4):
            env.step(torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("fault, message", [("state raises", "state raised KeyError"), ("state infinite", "got array")])
def test_the_state_is_checked(fault, message):
    assert message in str(run_into_fault(fault=fault))


@pytest.mark.parametrize(
    "dtype, value, message",
    [
        (np.uint8, [0.7, 0], "uint8 numbers .* got float64 0.7"),
        (np.uint8, [-1, 0], "uint8 numbers .* got int64 -1"),
        (np.int8, [300, 0], "got int64 300"),
        (np.int32, [float("nan"), 0], "got float64 nan"),
        (np.float32, [1e300, 0], "finite numbers, got inf"),
    ],
)
def test_numbers_that_would_be_cut_to_fit_their_space_are_refused(monkeypatch, dtype, value, message):
    monkeypatch.setitem(FAULTS, "cut", (change(0, np.array(value)), ""))
    space = gym.spaces.Box(0, 9, (2,), dtype)
    error = str(run_into_fault(fault="cut", obs=space))
    assert re.search(f"y: observation: expected .*{message}", error)


def test_whole_numbers_may_come_as_floats(monkeypatch):
    monkeypatch.setitem(FAULTS, "floats", (change(0, np.array([3.0, 255.0])), ""))
    env = make_vec_env(FAULTY, 1, "cpu", 0, fault="floats", obs=gym.spaces.Box(0, 255, (2,), np.uint8))
    steps = [env.step(torch.zeros(1, 2, dtype=torch.int64)) for _ in range(5)]
    assert steps[-1].obs[0, 1].tolist() == [3, 255]


def test_an_env_that_fails_at_once_is_a_usage_error():
    with pytest.raises(UsageError, match=r"reset\(seed=0\) raised RuntimeError: not today"):
        check_env(f"{__name__}:FailsAtOnce", env_kwargs={"x": gym.spaces.Discrete(2)})


class FailsAtOnce(Spaces):
    def reset(self, seed=None, options=None):
        raise RuntimeError("not today")


@pytest.mark.parametrize("num_env_procs", [0, 2])
def test_an_episode_that_never_ends_is_truncated_and_said(num_env_procs, capsys):
    env = make_vec_env(FAULTY, 2, "cpu", 0, num_env_procs=num_env_procs, episode_limit=3)
    steps = [env.step(torch.zeros(2, 2, dtype=torch.int64)) for _ in range(6)]
    over = [step.episode_over.tolist() for step in steps]
    assert over == [[False] * 2, [False] * 2, [True] * 2] * 2
    last = steps[-1]
    assert last.truncations.all() and not last.terminations.any() and last.active.all()
    assert last.episode_lengths.tolist() == [3, 3] and last.episode_returns.tolist() == [[3, 3]] * 2
    said = capsys.readouterr().err
    assert said.count("did not end by itself in 3 steps") == 1 and "--episode-limit" in said
    env.close()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_an_interrupt_while_a_worker_hangs_ends_at_once(monkeypatch):
    """As a second Ctrl-C or SIGTERM raises while the trainer waits: nobody is asked to close first."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    env = make_vec_env(FAULTY, 2, "cpu", 0, num_env_procs=2, env_timeout=0, fault="hangs")
    procs = list(env._venv.procs)
    for _ in range(4):
        env.step(torch.zeros(2, 2, dtype=torch.int64))
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            env.step(torch.zeros(2, 2, dtype=torch.int64))
    finally:
        signal.signal(signal.SIGALRM, previous)
    monkeypatch.setattr(workers, "GRACE", 600.0)
    start = time.monotonic()
    env.close()
    assert time.monotonic() - start < 60 and not any(proc.is_alive() for proc in procs)


ORPHANS = """
import os, signal, sys, threading, torch
from envs import make_vec_env
made = []
make = lambda: made.append(make_vec_env("test_envs:Faulty", 2, "cpu", 0, num_env_procs=2, fault="hangs"))
if sys.argv[1] == "thread":  # that ends: the workers must not end with it
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
else:
    make()
(env,) = made
print(*[proc.pid for proc in env._venv.procs], flush=True)
for _ in range(4):
    env.step(torch.zeros(2, 2, dtype=torch.int64))
env._venv._send(0, ("step", torch.zeros(2, dtype=torch.int64).numpy()))  # one hangs, one waits
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("made_in", ["main", "thread"])
def test_no_worker_survives_a_killed_trainer(made_in):
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here)])
    result = subprocess.run(
        [sys.executable, "-c", ORPHANS, made_in],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.05)


THREADED = """
import torch
from envs import make_vec_env
torch.set_num_threads(2)
if __name__ == "__main__":  # (where processes are spawned they import this, too)
    torch.rand(2_000_000).exp().sum()  # starts the threads that a fork leaves behind
    env = make_vec_env("stag_hunt", 2, "cpu", 0, "pettingzoo", 2)
    env.step(torch.zeros(2, 4, dtype=torch.int64))
    env.close()
"""


def test_workers_of_a_program_with_threads_do_not_hang(tmp_path):
    script = tmp_path / "threaded.py"
    script.write_text(THREADED)
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, str(script)], check=True, timeout=60, env=paths)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # a zombie has ended


@pytest.mark.parametrize("env_id", ["pursuit", "stag_hunt", "snowdrift", TOY])
def test_reset_takes_no_seed_everywhere(env_id):
    parameter = inspect.signature(make_vec_env(env_id, 1, "cpu", 0).reset).parameters["seed"]
    assert parameter.default is None and parameter.annotation == "int | None"


TRAINING = "--env-id {} --num-envs 2 --num-steps 4 --total-timesteps 32 --num-minibatches 1 --hyper none --save-every 1"


def train(tmp_path, env_id: str, *flags: str) -> tuple[int, Path]:
    argv = [*TRAINING.format(env_id).split(), *flags, "--runs-dir", str(tmp_path), "--no-cuda", "--eval-episodes", "2"]
    code = command_line(hyper_mappo.Args, hyper_mappo.main, hyper_mappo.LIMITS, argv)
    (run_dir,) = tmp_path.iterdir()
    return code, run_dir


def test_training_on_an_env_that_raises_is_saved_and_logged(tmp_path, capsys):
    code, run_dir = train(tmp_path, f"{__name__}:RaisesLater")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert code == 1 and "env 0, step 5: step raised ZeroDivisionError: later" in line
    assert f"--resume {run_dir}" in line and str(run_dir / "error.log") in line
    assert (run_dir / "latest.pt").is_file()
    log = (run_dir / "error.log").read_text()
    assert "in step" in log and "ZeroDivisionError: later" in log


class RaisesLater(Faulty):
    def __init__(self):
        super().__init__()

    def step(self, actions):
        if self.count == 4:
            raise ZeroDivisionError("later")
        return super().step(actions)


def test_training_and_evaluation_on_an_env_that_never_ends(tmp_path, capsys):
    code, run_dir = train(tmp_path, FAULTY, "--episode-limit", "6")
    assert code == 0
    report = json.loads((run_dir / "eval.json").read_text())
    assert report["mean_length"] == 6 and report["mean_return"] == 6
    assert "did not end by itself in 6 steps" in capsys.readouterr().err
