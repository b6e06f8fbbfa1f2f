"""VMAS scenarios behind the env contract. Skipped where the package is missing: pip install -r requirements-vmas.txt"""

import io

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("vmas", reason="pip install -r requirements-vmas.txt")

import collect_data
import hyper_mappo
import runs
from dataset import load_dataset
from envs import check_env, make_vec_env, vmas_vec
from envs.vmas_vec import SCENARIOS, VmasVecEnv
from runs import UsageError

N = 6
FIELDS = ("obs", "state", "rewards", "terminations", "truncations", "final_obs", "episode_returns", "episode_lengths")


def make(name, num_envs=N, seed=1, **env_kwargs):
    """Also scenarios that `check` refuses."""
    scenario = vmas_vec._scenario_file(name).Scenario()
    return VmasVecEnv(scenario, f"vmas:{name}", num_envs, "cpu", seed, **env_kwargs)


def random_actions(env, steps, seed=0):
    """[T, N, A, D], beyond the bounds on either side, or [T, N, A] legal ones"""
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, env.num_envs, env.num_agents)
    if isinstance(env.action_space, gym.spaces.Box):
        return torch.rand(*shape, *env.action_space.shape, generator=generator) * 4 - 2
    sizes = torch.tensor(env.action_sizes)
    return (torch.rand(shape, generator=generator) * sizes).long()


def assert_same(one, other, rows=slice(None)):
    for name in FIELDS:
        a, b = getattr(one, name)[rows], getattr(other, name)[rows]
        assert torch.equal(a, b), name


def set_clocks(env, clocks):
    """How many steps each env's episode is old, as VMAS and the adapter count them."""
    env.env.steps = torch.tensor(clocks, dtype=torch.float32)
    env.lengths = torch.tensor(clocks)


@pytest.mark.parametrize("name", SCENARIOS)
def test_contract(name):
    env = make(name, max_steps=5)
    step = env.reset(seed=3)
    for actions in random_actions(env, 12):
        before = env.returns
        step = env.step(actions)
        assert step.obs.shape == (N, env.num_agents, *env.obs_shape) and step.obs.dtype == torch.float32
        assert step.state.shape == (N, *env.state_shape)
        assert step.rewards.shape == step.terminations.shape == step.active.shape == (N, env.num_agents)
        assert step.rewards.dtype == torch.float32 and step.rewards.isfinite().all() and step.obs.isfinite().all()
        assert step.truncations.shape == step.episode_over.shape == (N,)
        assert not (step.terminations.any(1) & step.truncations).any()
        assert torch.equal(step.episode_returns, before + step.rewards)
        over = step.episode_over
        assert (env.returns[over] == 0).all() and (env.lengths[over] == 0).all()
    assert torch.equal(env.reset(seed=3).obs, make(name, max_steps=5, seed=3).last["obs"])
    if name != "multi_give_way":  # which always starts alike
        assert not torch.equal(env.reset(seed=4).obs, env.reset(seed=3).obs)


@pytest.mark.parametrize("name", SCENARIOS)
def test_final_obs_differs_from_obs_exactly_where_an_episode_ended(name):
    env = make(name, max_steps=12)
    set_clocks(env, [0, 2, 4, 6, 8, 10])
    ended = torch.zeros(N, dtype=torch.int64)
    for actions in random_actions(env, 24):
        step = env.step(actions)
        differs = (step.obs != step.final_obs).flatten(1).any(1)
        assert torch.equal(differs, step.episode_over)
        assert (step.episode_lengths[step.truncations] == 12).all()
        ended += step.episode_over
    assert (ended >= 2).all()


@pytest.mark.parametrize("name", [*SCENARIOS, "joint_passage"])
def test_a_reset_leaves_the_other_envs_as_they_are(name):
    """joint_passage has joints, which VMAS recomputes for the whole batch when one env is reset."""
    env = make(name, max_steps=1000)
    never_reset = make(name, max_steps=1000)
    set_clocks(env, [0, 0, 0, 0, 0, 997])
    compared = torch.tensor(5 * [True] + [False])  # until the rules end an episode, where both are drawn anew
    ended = 0
    for actions in random_actions(env, 8):
        step = env.step(actions)
        reference = never_reset.step(actions)
        assert torch.equal(step.episode_over[compared], reference.episode_over[compared])
        compared &= ~step.episode_over
        assert_same(step, reference, compared)
        ended += bool(step.episode_over[5])
    assert ended and compared.sum() >= 2


@pytest.mark.parametrize("num_envs", [2, 3, 4])
@pytest.mark.parametrize("name", ["balance", "navigation", "wheel"])
def test_sizes_that_other_dimensions_have_too(name, num_envs):
    """Positions have 2 numbers, agents are 3 or 4: rows must not be taken for envs."""
    env, never_reset = make(name, num_envs, max_steps=50), make(name, num_envs, max_steps=50)
    set_clocks(env, [0] * (num_envs - 1) + [48])
    for actions in random_actions(env, 5):
        assert_same(env.step(actions), never_reset.step(actions), slice(0, num_envs - 1))


@pytest.mark.parametrize("name", ["balance", "navigation", "dispersion", "simple_tag"])
def test_an_env_that_begins_anew_is_drawn_like_one_that_is_reset(name):
    """Mean and spread of first observations after a masked reset, against fresh envs."""
    env = make(name, 256, max_steps=3)
    set_clocks(env, [n % 2 for n in range(256)])
    for actions in random_actions(env, 2):
        step = env.step(actions)
    restarted = step.obs[step.truncations]  # [128, A, O]
    fresh = make(name, 256, seed=9).last["obs"]
    assert len(restarted) == 128
    spread = fresh.std(0) + 1e-3
    assert ((restarted.mean(0) - fresh.mean(0)).abs() < 0.6 * spread + 1e-3).all()
    assert torch.allclose(restarted.std(0), fresh.std(0), rtol=0.5, atol=0.05)


def test_global_random_numbers_are_left_alone():
    import random

    def drawn():
        return torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate()

    before = drawn()
    env = make("simple_tag", max_steps=2)
    env.reset(seed=5)
    for actions in random_actions(env, 5):
        env.step(actions)
    after = drawn()
    assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]


@pytest.mark.parametrize("name", ["balance", "discovery", "simple_world_comm"])
def test_two_envs_stepped_in_turn_equal_each_alone(name):
    def play(envs):
        actions = [random_actions(env, 10, seed=i) for i, env in enumerate(envs)]
        return [[env.step(a[t]) for env, a in zip(envs, actions, strict=True)] for t in range(10)]

    together = play([make(name, seed=1, max_steps=4), make(name, seed=2, max_steps=4)])
    for i, seed in enumerate((1, 2)):
        env = make(name, seed=seed, max_steps=4)
        for t, actions in enumerate(random_actions(env, 10, seed=i)):
            assert_same(together[t][i], env.step(actions))


@pytest.mark.parametrize("name", SCENARIOS)
def test_saved_episodes_go_on_bit_for_bit(name):
    env = make(name, max_steps=5)
    set_clocks(env, [0, 1, 2, 3, 4, 0])
    actions = random_actions(env, 12)
    for a in actions[:6]:
        last = env.step(a)
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    reference = [env.step(a) for a in actions[6:]]  # must not change what was saved
    file.seek(0)
    other = make(name, max_steps=5, seed=77)
    assert_same(other.load_state_dict(torch.load(file, weights_only=True)), last)
    for a, expected in zip(actions[6:], reference, strict=True):
        assert_same(other.step(a), expected)


def test_saved_before_the_first_step():
    """The actions do not exist then; a state may also be put into an env that has stepped."""
    env = make("balance", max_steps=5)
    saved = env.state_dict()
    actions = random_actions(env, 7)
    reference = [env.step(a) for a in actions]
    env.load_state_dict(saved)
    for a, expected in zip(actions, reference, strict=True):
        assert_same(env.step(a), expected)


def test_a_state_of_another_env_is_refused():
    saved = make("balance").state_dict()
    with pytest.raises(ValueError, match="num_envs=5, got 6"):
        make("balance", 5).load_state_dict(saved)
    with pytest.raises(ValueError, match="env_id=vmas:wheel, got vmas:balance"):
        make("wheel").load_state_dict(saved)
    with pytest.raises(ValueError, match="saved with"):
        make("balance", n_agents=2).load_state_dict(saved)


def test_the_rules_terminate_and_the_limit_truncates():
    env = make("balance", max_steps=100)
    set_clocks(env, [0, 0, 0, 0, 0, 99])
    package = env.env.scenario.package
    package.set_pos(torch.tensor([0.0, -5.0]), batch_index=2)  # below the floor
    step = env.step(torch.zeros(N, 3, 2))
    assert step.terminations.all(1).tolist() == [False, False, True, False, False, False]
    assert step.truncations.tolist() == [False, False, False, False, False, True]


def test_wheel_pays_one_number_per_agent():
    env = make("wheel")
    assert env.step(torch.zeros(N, 4, 2)).rewards.shape == (N, 4)


def test_actions_out_of_range_are_clipped_and_reported():
    one, other = make("give_way"), make("give_way")
    actions = random_actions(one, 1)[0]
    clipped = actions.clamp(-0.5, 0.5)
    assert not torch.equal(actions, clipped)
    step = one.step(actions)
    assert torch.equal(step.executed_actions, clipped)
    assert_same(step, other.step(clipped))


def test_padded_dimensions_of_an_action_do_nothing():
    env, other = make("simple_world_comm"), make("simple_world_comm")
    assert env.action_sizes == [6, 2, 2, 2, 2, 2]  # the leader speaks
    actions = random_actions(env, 1)[0]
    changed = actions.clone()
    changed[:, 1:, 2:] += 0.3
    step = env.step(actions)
    assert_same(step, other.step(changed))
    assert (step.executed_actions[:, 1:, 2:] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_actions_that_are_no_numbers_are_an_error(value):
    env = make("balance")
    actions = torch.zeros(N, 3, 2)
    actions[2, 1, 0] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        env.step(actions)


def test_wrong_actions_are_an_error():
    env = make("balance")
    with pytest.raises(ValueError, match=r"\[6, 3, 2\] torch.float32"):
        env.step(torch.zeros(N, 3))
    discrete = make("balance", continuous_actions=False)
    with pytest.raises(ValueError, match="torch.int64"):
        discrete.step(torch.zeros(N, 3, 2))
    with pytest.raises(ValueError, match="in 0 ... 8, got 9 in env 4"):
        discrete.step(torch.tensor([0, 0, 0, 0, 9, 0])[:, None].repeat(1, 3))


@pytest.mark.parametrize("name", ["balance", "simple_crypto", "navigation"])
def test_discrete_actions_are_forces_on_a_grid(name):
    env = make(name, continuous_actions=False, max_steps=4)
    for actions in random_actions(env, 6):
        step = env.step(actions)
    assert step.executed_actions is None
    action = env.env.agents[0].action
    force = action.u / action.u_multiplier_tensor
    assert set(force.flatten().tolist()) <= {-1.0, 0.0, 1.0}


def test_discrete_actions_of_unlike_agents_are_masked():
    env = make("simple_world_comm", continuous_actions=False)
    assert env.action_sizes == [36, 9, 9, 9, 9, 9]
    assert env.last["obs"].shape[1] == 6
    mask = env.reset().action_mask
    assert mask.shape == (N, 6, 36) and mask.sum(2)[0].tolist() == env.action_sizes


def test_one_env_and_arguments():
    resolved, env_kwargs = vmas_vec.check("navigation", {"n_agents": 8, "max_steps": 7})
    env = vmas_vec.make("navigation", 1, "cpu", 1, **env_kwargs)
    assert resolved == env.env_id == "vmas:navigation" and env.num_agents == 8
    lengths = [int(env.step(a).episode_lengths) for a in random_actions(env, 14)]
    assert lengths == [*range(1, 8), *range(1, 8)]


@pytest.mark.parametrize(
    ("name", "env_kwargs", "message"),
    [
        ("balanse", {}, "unknown VMAS scenario 'balanse': did you mean balance"),
        ("simple_push", {}, "one goal for the whole batch"),
        ("simple_reference", {}, "one goal for the whole batch"),
        ("football", {}, "was not checked"),
        ("balance", {"n_agent": 4}, "has no argument 'n_agent', only n_agents"),
        ("balance", {"n_agents": "four"}, "cannot be made with"),
        ("navigation", {"n_agents": 0}, "cannot be made with"),
        ("balance", {"max_steps": 0}, "max_steps >= 1, got 0"),
        ("balance", {"max_steps": True}, "max_steps >= 1, got True"),
        ("balance", {"continuous_actions": 1}, "continuous_actions true or false, got 1"),
    ],
)
def test_bad_input_is_one_line(name, env_kwargs, message):
    with pytest.raises(UsageError, match=message) as error:
        vmas_vec.check(name, env_kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SCENARIOS)
def test_render_needs_no_display(name, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    env = make(name)
    first = env.render()
    assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3 and max(first.shape) == 480
    assert len(np.unique(first.reshape(-1, 3), axis=0)) >= 3  # the ground and two kinds of things
    for actions in random_actions(env, 20):
        env.step(actions)
    if name != "simple_crypto":  # where nobody moves
        assert (env.render() != first).any()


def test_through_make_vec_env():
    checked = check_env("vmas:balance?n_agents=4", env_kwargs={"max_steps": 3})
    assert checked.env_id == "vmas:balance" and not checked.genuine
    env = make_vec_env(checked, num_envs=2, device="cpu", seed=1)
    assert env.env_id == "vmas:balance" and env.num_agents == 4 and env.reset().obs.shape == (2, 4, *env.obs_shape)
    with pytest.raises(UsageError, match="use --backend batched"):
        check_env("vmas:balance", backend="pettingzoo")


@pytest.mark.parametrize("name", ["navigation", "multi_give_way"])
def test_rewards_of_the_team_or_of_each_agent(name):
    team, own = make(name), make(name, shared_rew=False)
    for actions in random_actions(team, 3):
        shared, individual = team.step(actions).rewards, own.step(actions).rewards
        assert (shared == shared[:, :1]).all() and (individual != individual[:, :1]).any()
        assert torch.allclose(shared[:, 0], individual.sum(1), atol=1e-5)


def test_three_and_three_updates_equal_six(tmp_path):
    """Training and --resume: rows of metrics.csv but for speeds, and weights, bit for bit; and the closing part."""
    flags = dict(env_id="vmas:balance?max_steps=7", num_envs=6, num_steps=8, num_minibatches=2, hidden_size=16)
    flags |= dict(hyper="none", anneal_lr=False, final_ent_coef=None)  # else they know how many updates are to come
    flags |= dict(capture_video=True, eval_episodes=2, update_threads=1, num_threads=1)

    def train(name, updates, **more):
        args = hyper_mappo.Args(**flags, total_timesteps=updates * 48, runs_dir=str(tmp_path / name), **more)
        return hyper_mappo.main(args)

    def numbers(run_dir):
        return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in runs.read_metrics(run_dir)]

    whole, part = train("whole", 6), train("part", 3)
    train("part", 6, resume=str(part))
    assert len(numbers(whole)) == 6 and numbers(whole) == numbers(part)
    weights = [torch.load(d / "latest.pt", weights_only=True)["actor"] for d in (whole, part)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (whole / "video.gif").exists() and (whole / "eval.json").exists()


def test_a_dataset_tells_the_arguments_of_the_id(tmp_path):
    flags = dict(num_steps=40, num_envs=4, policies=("random",), data_dir=str(tmp_path), name="toy", cuda=False)
    path = collect_data.main(collect_data.Args(env_id="vmas:navigation?n_agents=3", **flags))
    meta = load_dataset(path).meta
    assert (meta["env_id"], meta["env_kwargs"], meta["num_agents"]) == ("vmas:navigation", {"n_agents": 3}, 3)
    assert (path / "summary.png").stat().st_size > 0
