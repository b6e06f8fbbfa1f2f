"""JaxMARL's envs behind the env contract. Skipped where it is missing: pip install -r requirements-jaxmarl.txt"""

import io
import json
import math
import random

import numpy as np
import pytest
import torch

pytest.importorskip("jaxmarl", reason="pip install -r requirements-jaxmarl.txt")

import jax
import jax.numpy as jnp

import hyper_mappo
import runs
from envs import check_env, jaxmarl_vec, make_vec_env
from envs.jaxmarl_vec import STOP, JaxMarlVecEnv
from runs import UsageError

N = 6
FIELDS = (
    "obs state rewards terminations truncations final_obs final_state episode_returns episode_lengths action_mask"
).split()


def battle(num_envs=N, seed=1):
    """3 marines a side. One size and one set of arguments for all tests: it is compiled once."""
    return JaxMarlVecEnv("SMAX", num_envs, "cpu", seed, scenario="3m", max_steps=8)


def random_actions(env, steps, seed=0):
    """[T, N, A], also illegal ones"""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(env.action_sizes)
    return (torch.rand(steps, env.num_envs, env.num_agents, generator=generator) * sizes).long()


def set_units(env, **fields):
    """Replaces arrays of the battle's state."""
    state = env.states.state
    changed = {}
    for name, value in fields.items():
        array = np.asarray(value, getattr(state, name).dtype)
        changed[name] = jax.device_put(array, env.jax_device)  # as the env's own: anything else is compiled anew
    env.states = env.states.replace(state=state.replace(**changed))


def set_clocks(env, clocks):
    set_units(env, step=np.array(clocks))
    env.lengths = torch.tensor(clocks)


def health(env, allies, enemies):
    """[N, 6] with the given health in env 0, the rest as it is"""
    values = np.array(env.states.state.unit_health)
    values[0] = [*allies, *enemies]
    return values


def assert_same(one, other, rows=slice(None)):
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or torch.equal(a[rows], b[rows]), name


def test_contract_of_a_battle():
    env = battle()
    step = env.reset(seed=1)
    assert env.agents == ["ally_0", "ally_1", "ally_2"] and env.obs_shape == (75,) and env.state_shape == (72,)
    for actions in random_actions(env, 20):
        before = env.returns
        step = env.step(actions)
        assert step.obs.shape == (N, 3, 75) and step.obs.dtype == step.state.dtype == torch.float32
        assert step.action_mask.shape == (N, 3, 8) and step.action_mask.dtype == torch.bool
        assert step.action_mask[..., STOP].all() and step.active.all()
        assert step.rewards.shape == step.terminations.shape == (N, 3) and step.rewards.isfinite().all()
        assert step.success.shape == step.truncations.shape == (N,)
        assert torch.equal(step.episode_returns, before + step.rewards)
        assert (env.lengths[step.episode_over] == 0).all()
    assert torch.equal(env.reset(seed=3).obs, battle(seed=3).last["obs"])
    assert not torch.equal(env.reset(seed=4).obs, env.reset(seed=3).obs)


def test_the_time_limit_truncates_and_nobody_is_terminated():
    """JaxMARL's own flag says "done" for both. It looks at the clock before it counts the step: 9 steps."""
    env = battle()
    for t in range(9):
        step = env.step(torch.full((N, 3), STOP))
        assert torch.equal(step.truncations, torch.full((N,), t == 8))
    assert not step.terminations.any() and not step.success.any()
    assert (step.episode_lengths == 9).all() and (env.lengths == 0).all()


@pytest.mark.parametrize(
    ("allies", "enemies", "over", "won"),
    [
        ((45, 45, 45), (0, 0, 0), True, True),
        ((0, 0, 45), (0, 0, 0), True, True),
        ((0, 0, 0), (45, 0, 0), True, False),
        ((0, 0, 0), (0, 0, 0), True, False),
        ((0, 0, 45), (45, 45, 45), False, False),
    ],
)
def test_a_battle_is_decided_by_who_is_alive(allies, enemies, over, won):
    env = battle()
    set_clocks(env, [8, 0, 0, 0, 0, 0])  # the limit as well: the rules come first
    set_units(env, unit_health=health(env, allies, enemies))
    step = env.step(torch.full((N, 3), STOP))
    assert step.terminations[0].tolist() == 3 * [over] and bool(step.success[0]) == won
    assert bool(step.truncations[0]) == (not over)
    assert step.episode_over.tolist() == [True] + 5 * [False]


def test_dead_allies_stay_with_one_action_and_the_teams_reward():
    env = battle()
    set_units(env, unit_health=health(env, (0, 45, 45), (45, 45, 45)))
    step = env.step(torch.full((N, 3), STOP))
    assert not step.episode_over[0] and step.active[0].all()
    assert step.action_mask[0, 0].nonzero().flatten().tolist() == [STOP]
    assert step.action_mask[0, 1].sum() >= 5
    # The others stand before the enemy and shoot.
    places = np.array(env.states.state.unit_positions)
    places[0, 3:] = places[0, 1] + np.array([[2.0, 0], [2.0, 1.0], [2.0, -1.0]])
    set_units(env, unit_positions=places)
    env.step(torch.full((N, 3), STOP))
    step = env.step(torch.tensor([[STOP, 5, 5]] + 5 * [3 * [STOP]]))
    assert step.rewards[0, 0] > 0 and (step.rewards[0] == step.rewards[0, 0]).all()


def test_an_illegal_action_is_executed_as_stop_and_reported():
    one, other = battle(), battle()
    assert not one.last["mask"][..., 5:].any()  # nobody is in range yet
    attack = torch.full((N, 3), 6)
    attack[0, 0] = 2
    stop = torch.full((N, 3), STOP)
    stop[0, 0] = 2
    step = one.step(attack)
    assert torch.equal(step.executed_actions, stop)
    assert_same(step, other.step(stop))


def test_final_obs_differs_from_obs_exactly_where_an_episode_ended():
    env = battle()
    set_clocks(env, [0, 1, 3, 4, 6, 7])
    ended = torch.zeros(N, dtype=torch.int64)
    for actions in random_actions(env, 18):
        step = env.step(actions)
        for final, now in ((step.final_obs, step.obs), (step.final_state, step.state)):
            assert torch.equal((final != now).flatten(1).any(1), step.episode_over)
        ended += step.episode_over
    assert (ended >= 1).all()


def test_a_reset_leaves_the_other_envs_as_they_are():
    env, never_reset = battle(), battle()
    set_clocks(env, [0, 0, 0, 0, 0, 6])
    for actions in random_actions(env, 7):
        step = env.step(actions)
        assert_same(step, never_reset.step(actions), slice(0, 5))
    assert env.lengths.tolist() == [7, 7, 7, 7, 7, 4]


def test_global_random_numbers_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    env = battle()
    for actions in random_actions(env, 10):
        env.step(actions)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_two_envs_stepped_in_turn_equal_each_alone():
    one, other = battle(seed=1), battle(seed=2)
    alone = battle(seed=1)
    for actions in random_actions(one, 12):
        step = one.step(actions)
        other.step(actions)
        assert_same(step, alone.step(actions))


def test_saved_episodes_go_on_bit_for_bit():
    env = battle()
    set_clocks(env, [0, 1, 2, 3, 4, 5])
    actions = random_actions(env, 14)
    for a in actions[:5]:
        last = env.step(a)
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    reference = [env.step(a) for a in actions[5:]]
    file.seek(0)
    other = battle(seed=77)
    assert_same(other.load_state_dict(torch.load(file, weights_only=True)), last)
    for a, expected in zip(actions[5:], reference, strict=True):
        assert_same(other.step(a), expected)


def test_a_state_of_another_env_is_refused():
    saved = battle().state_dict()
    with pytest.raises(ValueError, match="num_envs=6, got 7"):
        battle().load_state_dict({**saved, "num_envs": 7})
    with pytest.raises(ValueError, match="env_id=jaxmarl:SMAX, got jaxmarl:overcooked"):
        battle().load_state_dict({**saved, "env_id": "jaxmarl:overcooked"})
    arrays = {name: array[:, :1] if array.dim() > 1 else array for name, array in saved["arrays"].items()}
    with pytest.raises(ValueError, match="saved with this env's arguments"):
        battle().load_state_dict({**saved, "arrays": arrays})


def test_wrong_actions_are_an_error():
    env = battle()
    with pytest.raises(ValueError, match=r"\[6, 3\] torch.int64"):
        env.step(torch.zeros(N, 3))
    with pytest.raises(ValueError, match="ally_1 in 0 ... 7, got 8 in env 2"):
        env.step(torch.tensor([[0, 0, 0], [0, 0, 0], [0, 8, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]))


def test_mpe_is_jaxmarls_own_env_by_env():
    """Every env stepped by itself with JaxMARL's functions and the same keys."""
    env = JaxMarlVecEnv("MPE_simple_spread_v3", 3, "cpu", 5, max_steps=4)
    genuine = env.simulation.env
    step = env.reset(seed=5)
    keys, states = [], []
    for n, key in enumerate(jax.random.split(jax.random.PRNGKey(5), 3)):
        key, reset_key = jax.random.split(key)
        obs, state = genuine.reset(reset_key)
        expected = np.stack([obs[agent] for agent in env.agents])
        np.testing.assert_allclose(step.obs[n].numpy(), expected, rtol=1e-5, atol=1e-6)
        keys.append(key)
        states.append(state)
    assert step.state.shape == (3, 54) and step.action_mask is None and step.success is None
    for t, actions in enumerate(random_actions(env, 6)):
        step = env.step(actions)
        for n in range(3):
            keys[n], step_key, reset_key = jax.random.split(keys[n], 3)
            given = {agent: jnp.asarray(int(actions[n, i])) for i, agent in enumerate(env.agents)}
            obs, states[n], rewards, dones, _ = genuine.step_env(step_key, states[n], given)
            final = np.stack([obs[agent] for agent in env.agents])
            paid = [float(rewards[agent]) for agent in env.agents]
            np.testing.assert_allclose(step.final_obs[n].numpy(), final, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(step.rewards[n].numpy(), paid, rtol=1e-4, atol=1e-5)
            assert bool(step.truncations[n]) == bool(dones["__all__"]) == (t == 4)
            if dones["__all__"]:
                obs, states[n] = genuine.reset(reset_key)
                final = np.stack([obs[agent] for agent in env.agents])
            np.testing.assert_allclose(step.obs[n].numpy(), final, rtol=1e-4, atol=1e-5)
        assert not step.terminations.any()


def test_unlike_agents_are_padded_and_masked():
    env = JaxMarlVecEnv("MPE_simple_speaker_listener_v4", 2, "cpu", 1)
    step = env.reset()
    assert env.action_sizes == [3, 5] and step.action_mask[0].sum(1).tolist() == [3, 5]
    assert env.obs_shape == (11,) and (step.obs[:, 0, 3:] == 0).all()
    with pytest.raises(ValueError, match="0 ... 2, got 4 in env 1"):
        env.step(torch.tensor([[0, 4], [4, 0]]))


def test_overcooked_and_its_picture():
    env = JaxMarlVecEnv("overcooked", 2, "cpu", 1, layout="cramped_room", max_steps=3)
    assert env.obs_dtype == env.state_dtype == torch.uint8
    assert env.obs_shape == (4, 5, 26) and env.state_shape == (4, 5, 52)
    for actions in random_actions(env, 3):
        step = env.step(actions)
    assert step.truncations.all() and not step.terminations.any()
    assert torch.equal(step.final_state, step.final_obs.movedim(1, -2).flatten(-2))
    picture = env.render()
    assert picture.dtype == np.uint8 and picture.shape == (6 * 32, 7 * 32, 3) and len(np.unique(picture)) > 5


def test_pictures_need_no_display(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    env = battle()
    first = env.render()
    assert first.shape == (480, 480, 3) and first.dtype == np.uint8
    for actions in random_actions(env, 4):
        env.step(actions)
    assert (env.render() != first).any()


def test_check_compiles_nothing_and_names_go_through_make_vec_env():
    checked = check_env("jaxmarl:SMAX?scenario=2s3z", env_kwargs={"max_steps": 9})
    assert checked.env_id == "jaxmarl:SMAX" and checked.env_kwargs == {"scenario": "2s3z", "max_steps": 9}
    assert not checked.genuine
    simulation = jaxmarl_vec._simulation("SMAX", jaxmarl_vec._frozen(checked.env_kwargs))
    assert simulation.step._cache_size() == simulation.reset._cache_size() == 0
    env = make_vec_env("jaxmarl:SMAX?scenario=3m&max_steps=8", num_envs=N, device="cpu", seed=1)
    assert_same(env.reset(seed=1), battle().reset(seed=1))
    env.step(torch.full((N, 3), STOP))
    env.step(torch.full((N, 3), STOP))
    assert env.simulation.step._cache_size() == 1  # not once for the types of a reset, and once for those of a step
    with pytest.raises(UsageError, match="use --backend batched"):
        check_env("jaxmarl:SMAX", backend="pettingzoo")


def test_importing_leaves_the_standard_output_alone(capsys):
    print("still here")
    assert capsys.readouterr().out == "still here\n"


@pytest.mark.parametrize(
    ("name", "env_kwargs", "message"),
    [
        ("SMACS", {}, "unknown JaxMARL env 'SMACS': did you mean SMAX"),
        ("hanabi", {}, "was not checked"),
        ("SMAX", {"scenario": "3n"}, "unknown scenario '3n': did you mean 3m"),
        ("overcooked", {"layout": "crampd_room"}, "unknown layout 'crampd_room': did you mean cramped_room"),
        ("SMAX", {"map": "3m"}, "has no argument 'map', only scenario"),
        ("MPE_simple_spread_v3", {"action_type": "Continuous"}, "has no argument 'action_type'"),
        ("SMAX", {"observation_type": "round"}, "cannot be made with"),
        ("SMAX", {"max_steps": 0}, "max_steps >= 1, got 0"),
    ],
)
def test_bad_input_is_one_line(name, env_kwargs, message):
    with pytest.raises(UsageError, match=message) as error:
        jaxmarl_vec.check(name, env_kwargs)
    assert "\n" not in str(error.value)


def test_compilations_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert jaxmarl_vec.cache_folder() == tmp_path / "hyper-marl" / "jax"
    assert jax.config.jax_compilation_cache_dir is not None


def test_training_logs_won_battles(tmp_path):
    flags = dict(env_id="jaxmarl:SMAX?scenario=3m&max_steps=8", num_envs=N, num_steps=10, num_minibatches=2)
    flags |= dict(hyper="none", hidden_size=16, total_timesteps=3 * 60, eval_episodes=N, update_threads=1)
    run_dir = hyper_mappo.main(hyper_mappo.Args(**flags, runs_dir=str(tmp_path)))
    rows = runs.read_metrics(run_dir)
    assert len(rows) == 3 and 0 <= float(rows[-1]["charts/success_rate"]) <= 1
    assert all(math.isfinite(float(row["losses/policy_loss"])) for row in rows)
    report = json.loads((run_dir / "eval.json").read_text())
    assert 0 <= report["success_rate"] <= 1
