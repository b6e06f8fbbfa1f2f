"""The env contract on genuine PettingZoo envs: each is stepped by hand beside the vectorised one."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pettingzoo
import pytest
import torch
from pettingzoo.utils.env import ParallelEnv

import envs
from envs import (
    EnvStep,
    VecEnv,
    check_env,
    default_env_procs,
    describe_obs,
    make_eval_env,
    make_parallel_env,
    make_vec_env,
    resolve_env_id,
)
from envs.pettingzoo_vec import PettingZooVecEnv, episode_seed
from runs import UsageError

SMALL_PURSUIT = dict(x_size=8, y_size=8, n_pursuers=3, n_evaders=3, obs_range=5)
ZOMBIES = dict(spawn_delay=1, max_zombies=40)  # agents die after about 100 steps
TOY, PLAIN = f"{__name__}:Toy", f"{__name__}:Plain"

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
            assert torch.equal(step.final_obs[~step.episode_over], step.obs[~step.episode_over])
            assert torch.equal(step.final_state[~step.episode_over], step.state[~step.episode_over])
            stays = ~step.episode_over[:, None]
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
    for _ in range(8):
        step = env.step(torch.tensor([[2, 0, 1]]))
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
    number = step.final_obs[0, 1, 1].item()
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
    ((PLAIN,), {"action": gym.spaces.MultiBinary(3)}, "Discrete"),
    ((PLAIN,), {"action": gym.spaces.Discrete(3, start=1)}, "Discrete"),
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
