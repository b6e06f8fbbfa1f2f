"""Who sits where: scripts, their exact distributions, and partners beside those who learn."""

import io

import gymnasium as gym
import pytest
import torch

from envs import make_vec_env, snowdrift
from envs.players import (
    FAVOURED_SHARE,
    FixedPolicy,
    Partners,
    PartnerSeats,
    parse_partners,
    script_names,
    script_probs,
    scripted_player,
)
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
    assert script_names("snowdrift-6x6-6d") == snowdrift.SCRIPTED
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


def test_random_is_uniform_in_each_part_of_an_action():
    env = make_vec_env("pursuit", 500, "cpu", 0)
    env.action_space = gym.spaces.MultiDiscrete([3, 2])
    player, step = scripted_player("random", env), env.reset(0)
    actions, _ = player.act(step, None)
    assert actions.shape == (500, 8, 2) and actions.dtype == torch.int64
    for part, size in enumerate((3, 2)):
        shares = torch.bincount(actions[..., part].flatten(), minlength=size) / 4000
        assert len(shares) == size and ((shares - 1 / size).abs() < 0.04).all()
    step.action_mask = torch.tensor([True, False, True, False, True]).expand(500, 8, 5)
    actions, _ = player.act(step, None)
    assert actions[..., 0].unique().tolist() == [0, 2] and actions[..., 1].unique().tolist() == [1]


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
    fixed = parse_partners(("nearest_stag:2", "runs/a:b:1", "runs/a=b:1"))
    assert fixed == [
        PartnerSeats(("nearest_stag",), 2),
        PartnerSeats(("runs/a:b",), 1),
        PartnerSeats(("runs/a=b",), 1),
    ]
    pools = parse_partners(("pool=random,runs/a:b:2", "same=stay,random:1"))
    assert pools == [PartnerSeats(("random", "runs/a:b"), 2), PartnerSeats(("stay", "random"), 1, same=True)]
    weighted = parse_partners(("same=random*2,runs/a*b:1",))
    assert weighted == [PartnerSeats(("random", "random", "runs/a*b"), 1, same=True)]
    for wrong in ("random", "random:", ":1", "random:0", "random:-1", "random:1.5", "random:²"):
        with pytest.raises(UsageError, match="NAME:SEATS"):
            parse_partners((wrong,))
    for wrong in ("pool=random,random:2", "pool=:1", "pool=random,,stay:1", "same=stay,:1", "pool=stay*0,random:1"):
        with pytest.raises(UsageError, match="different members"):
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


def test_snowdrift_has_scripts_too():
    env = snowdrift.SnowdriftVecEnv(100, "cpu", 1, num_blocks=2, view=3)
    for name in snowdrift.SCRIPTED:
        step = env.reset(2)
        for _ in range(6):
            actions, _ = scripted_player(name, env).act(step, None)
            probs = snowdrift.action_probs(name, env.full_obs(), step.action_mask)
            assert (probs.gather(2, actions[..., None]) > 0).all()
            step = env.step(actions)
        obs, mask = env.full_obs().flatten(0, 1), step.action_mask.flatten(0, 1)
        assert torch.equal(script_probs(name, "snowdrift", {}, obs, mask), snowdrift.action_probs(name, obs, mask))
    assert script_probs("never_clears", "snowdrift", {"view": 3}, obs, mask) is None
    with pytest.raises(UsageError, match="random, nearest_drift, never_clears.*'nearest_stag'"):
        scripted_player("nearest_stag", env)


# Pools


def drawn_members(partners, env, num_steps, first=None):
    """Who sits in the partner seats, after each of some steps of one-step episodes. [num_steps * N, P]"""
    step = first or env.reset(0)
    seen = []
    for _ in range(num_steps):
        actions = partners.play(step, torch.full(step.active.shape, STAY))
        told = actions[:, partners.seats]
        names = torch.tensor([int(name) for name in partners.names])
        assert torch.equal(told, names[partners.seated])  # they play as they are seated
        seen.append(partners.seated)
        step = env.step(actions)
    return torch.cat(seen)


def test_pools_are_drawn_uniformly_for_each_episode_and_seat():
    env = StagHuntVecEnv(500, "cpu", 0, max_cycles=1)
    seated = drawn_members(Partners(("pool=0,1,2:2", "3:1"), env, make_player, seed=4), env, 18)  # 9,000 episodes
    assert (seated[:, 2] == 3).all()
    joint = torch.bincount(seated[:, 0] * 3 + seated[:, 1], minlength=9).float()
    chi_square = ((joint - 1000) ** 2 / 1000).sum()
    assert len(joint) == 9 and chi_square < 32  # 8 degrees of freedom, 1e-4 beyond
    changed = seated[500:1000] != seated[:500]
    assert 0.5 < changed[:, 0].float().mean() < 0.8  # anew each time: 2 of 3 differ


def test_the_same_member_in_all_seats():
    env = StagHuntVecEnv(300, "cpu", 0, max_cycles=1)
    seated = drawn_members(Partners(("same=1,2:2", "pool=1,2:1"), env, make_player), env, 10)
    assert torch.equal(seated[:, 0], seated[:, 1]) and not torch.equal(seated[:, 0], seated[:, 2])
    assert seated[:, 0].float().mean() == pytest.approx(0.5, abs=0.05)


def test_members_stay_for_the_episode():
    env = StagHuntVecEnv(50, "cpu", 0, max_cycles=4)
    partners = Partners(("pool=0,1,2,3:3",), env, make_player)
    step, before = env.reset(0), partners.seated
    for t in range(12):
        actions = partners.play(step, torch.full((50, 4), STAY))
        assert torch.equal(partners.seated, before) == (t % 4 != 0 or t == 0)
        before, step = partners.seated, env.step(actions)


def test_draws_are_reproducible_and_go_on_exactly():
    def make(seed):
        return Partners(("pool=0,1,2:3",), env, make_player, seed=seed)

    env = StagHuntVecEnv(20, "cpu", 0, max_cycles=3)
    first, again, other = (drawn_members(make(seed), env, 9) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    partners = make(5)
    drawn_members(partners, env, 3)  # now an episode is over, and the next has not been drawn
    buffer = io.BytesIO()
    torch.save({"env": env.state_dict(), "partners": partners.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    continued = make(99)
    continued.load_state_dict(saved["partners"])
    other_env = StagHuntVecEnv(20, "cpu", 7, max_cycles=3)
    rest = drawn_members(continued, other_env, 6, other_env.load_state_dict(saved["env"]))
    assert torch.equal(rest, first[60:])


def test_memories_alone_can_be_loaded():
    env = StagHuntVecEnv(2, "cpu", 0)
    partners = Partners(("x:1",), env, lambda name, env: Remembers())
    seated = partners.seated
    partners.load_state_dict([[torch.zeros(2, 4)]])
    assert len(partners.memories[0]) == 1 and torch.equal(partners.seated, seated)


def test_a_switch_favours_one_member_after_the_other():
    env = StagHuntVecEnv(1000, "cpu", 0, max_cycles=1)
    partners = Partners(("pool=0,1,2:1", "3:1"), env, make_player, switch=2)
    favourites = []
    for update in range(1, 9):
        partners.start_update(update)
        step = env.step(torch.full((1000, 4), STAY))  # every episode is over: all are drawn anew
        partners.play(step, torch.full((1000, 4), STAY))
        shares = torch.bincount(partners.seated[:, 0], minlength=3) / 1000
        favourites.append(int(shares.argmax()))
        assert shares.max() == pytest.approx(FAVOURED_SHARE, abs=0.05)
        assert shares.min() == pytest.approx((1 - FAVOURED_SHARE) / 2, abs=0.04)
        assert (partners.seated[:, 1] == 3).all()
    assert favourites == [0, 0, 1, 1, 2, 2, 0, 0]
    with pytest.raises(UsageError, match="a pool to switch"):
        Partners(("1:2",), env, make_player, switch=2)


def test_returns_per_member():
    env = StagHuntVecEnv(3, "cpu", 0, num_stags=0, num_hares=4, max_cycles=1)
    partners = Partners(("pool=4,6:2",), env, make_player)
    partners.seated = torch.tensor([[0, 1], [0, 0], [1, 1]])  # 0 stays, 1 hunts hares
    on_hares = [8, 9, 10, 11]
    env.set_positions(torch.tensor([[*on_hares, *on_hares]] * 3))  # everyone stands on a hare of its own
    actions = torch.where(torch.tensor([True, False, False, False]), 6, STAY).expand(3, 4)
    step = env.step(torch.where(partners.learners, actions, 0))  # learner 0 hunts, learner 1 stays
    assert step.episode_returns[:, :2].mean(1).tolist() == [0.5] * 3
    step.episode_returns[:, 2:] = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 2.0]])
    sums = partners.member_sums(step)
    assert sums.tolist() == [[3, 0, 1.5], [3, 4, 1.5]]
    counted = partners.member_sums(step, torch.tensor([False, True, False]))
    assert counted.tolist() == [[2, 0, 1.0], [0, 0, 0]]
    metrics = partners.member_metrics(sums.tolist())
    assert metrics == {
        "partners/draws_4": 3,
        "partners/return_of_4": 0,
        "partners/return_with_4": 0.5,
        "partners/draws_6": 3,
        "partners/return_of_6": pytest.approx(4 / 3),
        "partners/return_with_6": 0.5,
    }
    assert list(metrics) == partners.columns()
    assert partners.member_metrics(counted.tolist())["partners/draws_6"] == 0
    assert "partners/return_of_6" not in partners.member_metrics(counted.tolist())


def test_partners_can_sit_anywhere():
    env = StagHuntVecEnv(2, "cpu", 0)
    partners = Partners(("1:2", "3:1"), env, make_player, seats=(3, 0, 1))
    actions = partners.play(env.reset(0), torch.full((2, 4), STAY))
    assert actions.tolist() == [[1, 3, STAY, 1]] * 2 and partners.learners.tolist() == [False, False, True, False]
    for seats in ((0, 1), (0, 0, 1), (1, 2, 4)):
        with pytest.raises(UsageError, match="fill 3 seats.*got the seats"):
            Partners(("1:2", "3:1"), env, make_player, seats=seats)


def test_an_unknown_member_of_a_pool_is_one_line():
    with pytest.raises(UsageError, match="^--partners: policy: expected random.*'nearest_dog'"):
        Partners(("pool=random,nearest_dog:2",), StagHuntVecEnv(1, "cpu", 0), make_player)
