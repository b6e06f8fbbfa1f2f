"""Who sits where: scripts, their exact distributions, and partners beside those who learn."""

import gymnasium as gym
import pytest
import torch

from envs import make_vec_env
from envs.players import FixedPolicy, Partners, parse_partners, script_names, script_probs, scripted_player
from envs.stag_hunt import SCRIPTED, STAY, StagHuntVecEnv, action_probs
from runs import UsageError


def always(action: int) -> FixedPolicy:
    return FixedPolicy(lambda step: torch.full(step.active.shape, action))


def make_player(name: str, env):
    """ "3" always plays action 3; anything else is a script."""
    return always(int(name)) if name.isdecimal() else scripted_player(name, env)


class Remembers:
    """Remembers all joint actions of its episode."""

    def initial_state(self, num_envs):
        return []

    def act(self, step, memory):
        return torch.full(step.active.shape, len(memory)), memory

    def remember(self, step, actions, memory):
        return [*memory, actions.clone()]


def test_who_knows_an_env():
    assert script_names("stag_hunt-8x8-4h1s") == script_names("stag_hunt") == SCRIPTED
    assert script_names("sisl/pursuit_v5") == script_names("my_env:Meeting") == ("random",)


@pytest.mark.parametrize("name", SCRIPTED)
@pytest.mark.parametrize("options", [{}, {"view": 3, "num_blocks": 2}])
def test_scripts_play_legally_from_the_whole_map(name, options):
    """With a view as without: a step is drawn from the distribution that the script has on the whole map."""
    env = StagHuntVecEnv(200, "cpu", 1, **options)
    player, step = scripted_player(name, env), env.reset(2)
    for _ in range(12):
        probs = action_probs(name, env.full_obs(), step.action_mask)
        actions, memory = player.act(step, player.initial_state(200))
        chances = probs.gather(2, actions[..., None])[..., 0]
        assert memory is None and actions.shape == (200, 4) and actions.dtype == torch.int64
        assert (chances > 0)[step.active].all()
        step = env.step(actions)
        assert player.remember(step, actions, memory) is None


def test_random_is_uniform_over_legal_actions():
    env = make_vec_env("mpe2.simple_speaker_listener_v4", 1, "cpu", 0)  # 3 actions and 5, padded to 5
    player, step = scripted_player("random", env), env.reset(0)
    torch.manual_seed(0)
    drawn = torch.stack([player.act(step, None)[0][0] for _ in range(3000)])  # [3000, A]
    for agent, size in enumerate((3, 5)):
        counts = torch.bincount(drawn[:, agent], minlength=5).float()
        assert not counts[size:].any()
        assert ((counts[:size] / 3000 - 1 / size).abs() < 0.04).all()
    pursuit = make_vec_env("pursuit", 50, "cpu", 0)
    actions, _ = scripted_player("random", pursuit).act(pursuit.reset(0), None)
    assert actions.unique().tolist() == [0, 1, 2, 3, 4]


def test_random_stays_in_the_bounds_of_continuous_actions():
    env = make_vec_env("butterfly/pistonball_v6", 1, "cpu", 0, n_pistons=4)
    env.action_space = gym.spaces.Box(-2.0, 6.0, (1,))
    player, step = scripted_player("random", env), env.reset(0)
    drawn = torch.stack([player.act(step, None)[0] for _ in range(500)])  # [500, N, A, D]
    assert drawn.shape == (500, 1, 4, 1) and -2 <= drawn.min() < -1.8 and 5.8 < drawn.max() <= 6
    assert abs(drawn.mean() - 2) < 0.2
    env.action_space = gym.spaces.Box(-float("inf"), 1.0, (1,))
    with pytest.raises(UsageError, match="bounded"):
        scripted_player("random", env)


def test_unknown_scripts_are_one_line_with_those_that_exist():
    with pytest.raises(UsageError, match="random, nearest_stag.*, got 'nearest_dog'"):
        scripted_player("nearest_dog", StagHuntVecEnv(1, "cpu", 0))
    with pytest.raises(UsageError, match="expected random or a run folder"):
        scripted_player("nearest_stag", make_vec_env("pursuit", 1, "cpu", 0))


def test_script_probs_are_known_where_the_script_sees_what_the_row_shows():
    env = StagHuntVecEnv(30, "cpu", 3)
    step = env.reset(1)
    obs, mask = step.obs.flatten(0, 1), step.action_mask.flatten(0, 1)
    for name in SCRIPTED:
        probs = script_probs(name, "stag_hunt-4x4-4h1s", {}, obs, mask)
        assert torch.equal(probs, action_probs(name, obs, mask))
    assert script_probs("nearest_stag", "stag_hunt", {"view": 3}, obs, mask) is None
    assert script_probs("nearest_stag", "sisl/pursuit_v5", {}, obs, mask) is None
    assert script_probs("runs/RUN", "stag_hunt", {}, obs, mask) is None
    uniform = script_probs("random", "sisl/pursuit_v5", {}, obs, torch.tensor([[True, False, True, True]]))
    torch.testing.assert_close(uniform, torch.tensor([[1 / 3, 0, 1 / 3, 1 / 3]]))


def test_partners_are_parsed():
    assert parse_partners(("nearest_stag:2", "runs/a:b:1")) == [("nearest_stag", 2), ("runs/a:b", 1)]
    for wrong in ("random", "random:", ":1", "random:0", "random:-1", "random:1.5"):
        with pytest.raises(UsageError, match="NAME:SEATS"):
            parse_partners((wrong,))


def test_partners_sit_in_the_last_seats_and_learners_keep_theirs():
    env = StagHuntVecEnv(3, "cpu", 0)
    partners = Partners(("1:2", "3:1"), env, make_player)
    assert partners.first_seat == 1 and len(partners.players) == 2
    actions = partners.play(env.reset(0), torch.full((3, 4), STAY))
    assert actions.tolist() == [[STAY, 1, 1, 3]] * 3
    nobody = Partners((), env, make_player)
    learners = torch.arange(12).view(3, 4) % 5
    assert nobody.first_seat == 4 and torch.equal(nobody.play(env.reset(0), learners), learners)


def test_partners_remember_what_everyone_did():
    env = StagHuntVecEnv(2, "cpu", 0)
    partners = Partners(("x:1", "2:1"), env, lambda name, env: Remembers() if name == "x" else make_player(name, env))
    first = partners.play(env.reset(0), torch.full((2, 4), STAY))
    second = partners.play(env.step(first), torch.full((2, 4), STAY))
    assert first.tolist() == [[STAY, STAY, 0, 2]] * 2 and second.tolist() == [[STAY, STAY, 1, 2]] * 2
    assert [memory.tolist() for memory in partners.memories[0]] == [first.tolist(), second.tolist()]


def test_partners_take_continuous_actions_too():
    env = make_vec_env("butterfly/pistonball_v6", 1, "cpu", 0, n_pistons=3)
    half = FixedPolicy(lambda step: torch.full((*step.active.shape, 1), 0.5))
    actions = Partners(("half:1",), env, lambda name, env: half).play(env.reset(0), torch.zeros(1, 3, 1))
    assert actions[0, :, 0].tolist() == [0, 0, 0.5]


def test_bad_partners_are_one_line():
    env = StagHuntVecEnv(1, "cpu", 0)
    with pytest.raises(UsageError, match="fill 4 seats of stag_hunt.*, which has 4: leave at least 1"):
        Partners(("random:2", "stay:2"), env, make_player)
    with pytest.raises(UsageError, match="^--partners: policy: expected random.*'nearest_dog'"):
        Partners(("nearest_dog:1",), env, make_player)
