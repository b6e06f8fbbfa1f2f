"""The planner: what it sees, imagines and believes, against the real game and hand-made positions; bad input."""

import json
from dataclasses import replace

import pytest
import torch

import plan
import pretrain_vae
import world_model
from collect_data import Args as CollectArgs
from collect_data import main as collect_main
from dataset import ego_order
from envs import describe_obs, make_vec_env
from envs.snowdrift import SnowdriftVecEnv
from envs.stag_hunt import HUNT_HARE, HUNT_STAG, STAY, StagHuntVecEnv

LEFT, RIGHT = 2, 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dataset, a world model and a model of other agents of the 4x4 stag hunt, small."""
    folder = tmp_path_factory.mktemp("plan")
    policies = ("nearest_stag", "nearest_hare", "random")
    fields = {"env_id": "stag_hunt-4x4-4h1s", "num_steps": 2500, "policies": policies, "name": "hunt", "cuda": False}
    data = str(collect_main(CollectArgs(**fields, data_dir=str(folder))) or folder / "hunt")
    fields = {"data": str(folder / "hunt"), "runs_dir": str(folder), "cuda": False}
    model = world_model.main(world_model.Args(**fields, total_updates=200, hidden_size=16))
    sizes = {"hidden_size": 32, "history_size": 8, "latent_size": 8, "epochs": 1}
    opponents = pretrain_vae.main(pretrain_vae.Args(**fields, model="cvae", **sizes))
    return {"data": data, "world": str(model), "opponents": str(opponents)}


def make_env(num_envs=4, **options):
    return StagHuntVecEnv(num_envs, "cpu", 3, **{"height": 4, "width": 4, **options})


def make_args(folders=None, **fields):
    learned = {}
    if folders:
        learned = {"world_model": folders["world"], "opponents": folders["opponents"]}
    small = {"partners": ("nearest_hare:3",), "samples": 2, "horizon": 6, "cuda": False, "backend": "batched"}
    return plan.Args(**{**small, **learned, **fields})


def true_args(**fields):
    return make_args(world="true", opponents="true", **fields)


def make_planner(args, env, seats=(0,)):
    return plan.make_planner(args, env, getattr(env, "options", {}), seats)


def eyes_of(env):
    meta = {"env_id": env.env_id, "env_kwargs": {}, "num_agents": env.num_agents}
    return plan.Eyes(describe_obs(meta), env.num_agents, joint=False)


def play_random(env, num_steps, generator=None):
    """Some steps of random legal actions, in which agents leave: -> the last EnvStep"""
    step = env.reset(5)
    for _ in range(num_steps):
        legal = step.action_mask.float().flatten(0, 1)
        actions = torch.multinomial(legal, 1, generator=generator).view(step.active.shape)
        step = env.step(actions)
    return step


# ---------------------------------------------------------------- what is seen


@pytest.mark.parametrize("seat", [0, 2])
def test_everyones_views_are_made_from_the_own_one(seat):
    env = make_env(200)
    step = play_random(env, 9)
    assert not step.active.all()
    rows = step.active[:, seat].nonzero()[:, 0]
    eyes = eyes_of(env)
    views = eyes.roots(step.obs[rows], torch.full_like(rows, seat))
    everyone = eyes.everyone(views)
    order = ego_order(4)[seat]
    active = step.active[rows][:, order]
    assert torch.equal(eyes.present(views[:, 0]), active)
    assert torch.equal(everyone[active], step.obs[rows][:, order][active])
    back = plan.by_seat(everyone, torch.full_like(rows, seat))
    assert torch.equal(back[step.active[rows]], step.obs[rows][step.active[rows]])


def test_lists_of_cells_are_those_of_each_agents_view(folders):
    env = make_env(100)
    step = play_random(env, 6)
    planner = make_planner(make_args(folders), env)
    rows = step.active[:, 0].nonzero()[:, 0]
    seen = planner.world.look(step.obs[rows, :1])
    for j in range(4):
        each = torch.arange(len(rows))
        cells = seen.cells(each, torch.full_like(each, j))
        drawn = torch.zeros(len(rows), 4 * 4 * 7 + 1, dtype=torch.uint8)
        drawn.scatter_(1, cells.long(), 1)
        assert torch.equal(drawn[:, :-1], seen.everyone[:, j].flatten(1))


# ---------------------------------------------------------------- the world


def test_the_true_world_is_the_game():
    env = make_env(300, num_blocks=2)
    step = play_random(env, 8)
    seat = 1
    rows = step.active[:, seat].nonzero()[:, 0]
    order = ego_order(4)[seat]
    world = plan.TrueWorld(env, env.options, eyes_of(env))
    active = step.active[rows][:, order]
    seen = world.look(step.obs[rows, seat][:, None])
    assert torch.equal(world.masks(seen, active)[active], step.action_mask[rows][:, order][active])
    legal = step.action_mask.float().flatten(0, 1)
    actions = torch.multinomial(legal, 1).view(step.active.shape)
    after = env.step(actions)
    views, reward, done, still = world.step(seen, actions[rows][:, order], active)
    assert torch.equal(reward, after.rewards[rows, seat]) and reward.max() > 0
    assert torch.equal(done, after.terminations[rows, seat])
    stays = ~done
    assert torch.equal(views[stays, 0], after.final_obs[rows, seat][stays])
    left = after.terminations[rows][:, order]
    assert torch.equal(still[stays], (active & ~left)[stays])


def test_the_true_world_is_snowdrift_too():
    env = SnowdriftVecEnv(300, "cpu", 3)
    step = play_random(env, 8)
    order = ego_order(4)[2]
    world = plan.TrueWorld(env, {}, eyes_of(env))
    seen = world.look(step.obs[:, 2:3])
    everyone = torch.ones(300, 4, dtype=torch.bool)
    assert torch.equal(world.masks(seen, everyone), step.action_mask[:, order])
    legal = step.action_mask.float().flatten(0, 1)
    actions = torch.multinomial(legal, 1).view(300, 4)
    after = env.step(actions)
    views, reward, done, still = world.step(seen, actions[:, order], everyone)
    assert torch.equal(reward, after.rewards[:, 2]) and 0 < (reward != 0).float().mean() < 1
    assert torch.equal(done, after.terminations[:, 2]) and not done.all()
    assert torch.equal(views[:, 0], after.final_obs[:, 2]) and still.all()
    genuine = make_vec_env("snowdrift-4x4-6d", 2, "cpu", 1, "pettingzoo")
    assert plan.TrueWorld(genuine, {"max_cycles": 9}, eyes_of(genuine)).copies.options["max_cycles"] == 9


def test_the_learned_world_agrees_with_the_world_model(folders):
    env = make_env(64)
    step = play_random(env, 5)
    planner = make_planner(make_args(folders), env)
    rows = step.active[:, 0].nonzero()[:, 0]
    model, active = planner.world.model, step.active[rows]
    seen = planner.world.look(step.obs[rows, :1])
    actions = torch.randint(7, active.shape)
    views, reward, done, _ = planner.world.step(seen, actions, active)
    masks = planner.world.masks(seen, active)
    model.simulator = []  # from here on without tables
    expected = model.step(step.obs[rows, 0], actions.masked_fill(~active, -1))
    assert torch.equal(views[:, 0], expected[0]) and torch.equal(done, expected[2])
    torch.testing.assert_close(reward, expected[1])
    assert torch.equal(masks[active], model.legal(seen.everyone[active]))


# ---------------------------------------------------------------- the others


def test_folded_layers_say_what_the_model_says(folders):
    env = make_env(64)
    args = make_args(folders)
    planner = make_planner(args, env)
    vae = planner.opponents.model
    step, memory = env.reset(2), planner.initial_state(64)
    history = vae.initial_history(64, 4)
    for t in range(4):
        _, memory = planner.act(step, memory)
        root = planner.root(step, memory, 0, torch.arange(64))
        future = planner.begin(root, torch.arange(64), torch.zeros(64, dtype=torch.int64))
        seen = planner.world.look(future.views)
        rows = torch.arange(64).repeat_interleave(3)
        agents = torch.arange(1, 4).repeat(64)
        masks = step.action_mask[rows, agents]
        found = planner.opponents.logits(plan.Now(seen, future, root), rows, agents, masks)

        obs = step.obs[rows, agents]  # (agents in ego order of seat 0)
        z = vae.encode(obs, history[rows, agents])
        _, head = vae.look(plan.pretrain_vae.network_input(vae.spec, obs, torch.zeros(len(obs), dtype=torch.int64)))
        times = torch.full((len(obs),), t)
        expected = vae.action_logits(head, times, z, masks)
        torch.testing.assert_close(found[masks], expected[masks], atol=1e-4, rtol=1e-4)

        z = torch.randn(64, 8)
        own = torch.arange(64)
        found = planner.opponents.logits_of(z, seen, own, step.action_mask[:, 0], future.t)
        _, head = vae.look(vae_input(vae, step.obs[:, 0]))
        expected = vae.action_logits(head, future.t, z, step.action_mask[:, 0])
        legal = step.action_mask[:, 0]
        torch.testing.assert_close(found[legal], expected[legal], atol=1e-4, rtol=1e-4)

        actions = torch.full((64, 4), STAY)
        memory = planner.remember(step, actions, memory)
        history = vae.observe(history, step.obs, actions)
        torch.testing.assert_close(memory["history"][:, 0, 1:], history[:, 1:], atol=1e-5, rtol=1e-5)
        step = env.step(actions)


def vae_input(vae, obs):
    return pretrain_vae.network_input(vae.spec, obs, torch.zeros(len(obs), dtype=torch.int64))


def test_beliefs_and_time_begin_anew_with_each_episode(folders):
    env = make_env(64, max_cycles=5)
    planner = make_planner(make_args(folders, method="policy"), env)
    step, memory = env.reset(1), planner.initial_state(64)
    ended = 0
    for _ in range(12):
        _, memory = planner.act(step, memory)
        new = step.episode_over
        assert (memory["history"][new] == 0).all() and (memory["timesteps"][new] == 0).all()
        ended += int(new.sum())
        legal = step.action_mask.float().flatten(0, 1)
        actions = torch.multinomial(legal, 1).view(64, 4)
        memory = planner.remember(step, actions, memory)
        assert (memory["history"][step.active.all(1)][:, 0].abs().sum(-1) > 0).all()
        step = env.step(actions)
    assert ended > 0


def test_a_planner_sees_nothing_that_its_seat_does_not(folders):
    env = make_env(32)
    planner = make_planner(make_args(folders), env)
    step = play_random(env, 3)
    shown = []
    for hide in (False, True):
        if hide:
            step.obs = step.obs.clone()
            step.obs[:, 1:] = 0
            step._state = step.state = torch.zeros_like(step.state)
        torch.manual_seed(0)
        memory = planner.initial_state(32)
        actions, memory = planner.act(step, memory)
        memory = planner.remember(step, torch.full((32, 4), STAY), memory)
        shown.append((actions, memory["history"]))
    assert torch.equal(shown[0][0], shown[1][0]) and torch.equal(shown[0][1], shown[1][1])


# ---------------------------------------------------------------- decisions


def two_steps(mirrored):
    """Two steps to go: the stag is one step ahead, where a partner arrives too; a hare is one step behind.

    . = hare, self, stag, partner; only a step towards the stag pays 5, the hare 1, staying nothing.
    """
    options = {"height": 1, "width": 4, "num_players": 2, "num_stags": 1, "num_hares": 1, "max_cycles": 2}
    env = StagHuntVecEnv(1, "cpu", 0, **options)
    cells = torch.tensor([[1, 3, 2, 0]])
    step = env.set_positions(3 - cells if mirrored else cells)
    return env, step


def first_action(args, mirrored, change_world=None):
    env, step = two_steps(mirrored)
    planner = make_planner(replace(args, partners=("nearest_stag:1",)), env)
    if change_world:
        change_world(planner)
    actions, _ = planner.act(step, planner.initial_state(1))
    return int(actions[0, 0])


@pytest.mark.parametrize("method", ["rollout", "mcts"])
def test_the_only_right_action_of_two_steps_is_found(method):
    args = true_args(method=method, episode_limit=2, simulations=40)
    assert first_action(args, mirrored=False) == RIGHT
    assert first_action(args, mirrored=True) == LEFT


@pytest.mark.parametrize("method", ["rollout", "mcts"])
def test_base_policies_that_fail_are_left(method):
    """Beside a partner who stays away the stag hunter among the base policies, which is the first, gets nothing."""
    args = true_args(method=method, partners=("stay:1",), episode_limit=8, simulations=40, horizon=8)
    env, step = two_steps(mirrored=False)
    planner = make_planner(args, env)
    actions, _ = planner.act(step, planner.initial_state(1))
    assert int(actions[0, 0]) == LEFT


def lag(planner):
    """The world carries out what was decided one step ago."""
    right, before = planner.world.step, []

    def step(seen, actions, active):
        late = before[-1] if before and before[-1].shape == actions.shape else torch.full_like(actions, STAY)
        before.append(actions)
        return right(seen, late, active)

    planner.world.step = step


def shuffle(planner):
    """The world takes each agent's action for another's."""
    right = planner.world.step
    planner.world.step = lambda seen, actions, active: right(seen, actions.roll(1, 1), active)


@pytest.mark.parametrize("spoil", [lag, shuffle])
def test_a_world_model_that_is_late_or_mixes_up_seats_misses_it(spoil):
    args = true_args(episode_limit=2, scripts=("nearest_hare", "nearest_stag"))
    found = [first_action(args, mirrored, spoil) for mirrored in (False, True)]
    assert found != [RIGHT, LEFT]


def test_of_equal_actions_the_base_policys_own_is_taken():
    """The partner needs so long to the stag that a step away from it costs nothing."""
    env = StagHuntVecEnv(1, "cpu", 0, height=1, width=6, num_players=2, num_stags=1, num_hares=0, max_cycles=20)
    step = env.set_positions(torch.tensor([[1, 5, 2]]))
    planner = make_planner(true_args(partners=("nearest_stag:1",), horizon=10), env)
    _, memory = planner.act(step, planner.initial_state(1))
    root = planner.root(step, memory, 0, torch.tensor([0]))
    values = planner.first_action_returns(root, torch.tensor([0]))[0].amax(1)
    assert values[LEFT] == values[RIGHT] > 0
    actions, _ = planner.act(step, planner.initial_state(1))
    assert int(actions[0, 0]) == RIGHT


def test_who_waits_for_partners_waits_at_the_stag():
    """Random partners may come at any time, so that a step later seems as good as now, at every step anew."""
    env = make_env(32, num_hares=0)
    args = true_args(partners=("random:3",), samples=3, horizon=20, scripts=("nearest_stag",))
    planner = make_planner(args, env)
    partners = plan.seat_partners(args, env)
    torch.manual_seed(0)
    step, memory = env.reset(4), planner.initial_state(32)
    step.episode_over[:] = True
    there = torch.zeros(32, dtype=torch.bool)
    for _ in range(10):
        on_stag = (step.state[..., 0] * step.state[..., -2]).flatten(1) > 0
        there |= on_stag.any(1)
        actions, memory = planner.act(step, memory)
        actions = partners.play(step, actions)
        memory = planner.remember(step, actions, memory)
        step = env.step(actions)
    assert there.float().mean() > 0.9


@pytest.mark.parametrize(("world", "opponents"), [("true", "learned"), ("learned", "true")])
def test_learned_and_true_go_together(folders, world, opponents):
    args = make_args(folders, world=world, episode_limit=35)
    if opponents == "true":
        args = replace(args, opponents="true")
    env = make_env(16)
    planner = make_planner(args, env)
    step, memory = env.reset(1), planner.initial_state(16)
    actions, memory = planner.act(step, memory)
    assert step.action_mask[:, 0].gather(1, actions[:, :1]).all()
    root = planner.root(step, memory, 0, torch.arange(16))
    returns = planner.first_action_returns(root, planner.best_base(root))
    assert returns[step.action_mask[:, 0]].isfinite().all()


def test_one_step_looks_one_step_ahead_and_then_asks_for_values():
    args = true_args(method="one-step", values="unused", episode_limit=35)

    def like_the_stag(planner):
        planner.value = lambda everyone, seats: everyone[:, 0, ..., 0].flatten(1)[:, 2].float()  # V of standing on it

    env, step = two_steps(mirrored=False)
    plan_fit, plan.fit_values = plan.fit_values, lambda path, device: None
    try:
        assert first_action(args, False, like_the_stag) == RIGHT
    finally:
        plan.fit_values = plan_fit


def test_rewards_are_discounted_and_averaged_by_hand():
    env = StagHuntVecEnv(1, "cpu", 0, height=1, width=4, num_players=2, num_stags=0, num_hares=2, max_cycles=9)
    step = env.set_positions(torch.tensor([[1, 3, 0, 3]]))  # a hare one step to the left
    args = true_args(gamma=0.5, scripts=("nearest_hare", "stay"), partners=("stay:1",), samples=3)
    planner = make_planner(args, env)
    _, memory = planner.act(step, planner.initial_state(1))
    root = planner.root(step, memory, 0, torch.tensor([0]))
    of_each = [planner.first_action_returns(root, torch.tensor([base]))[0] for base in (0, 1)]  # [7, K] each
    values = torch.stack(of_each, 1).mean(2)  # [7, 2]
    assert values[LEFT].tolist() == [0.5, 0.0] and values[STAY].tolist() == [0.25, 0.0]
    assert values[RIGHT].tolist() == [0.25, 0.0]  # the other hare is nearer from there
    assert values[HUNT_HARE].tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("partner", ["nearest_hare", "nearest_stag"])
def test_rollout_is_no_worse_than_its_base_policies(partner):
    """Policy switching; a statistical test with fixed seeds."""
    means = {}
    for method, script in (("rollout", None), ("policy", "nearest_stag"), ("policy", "nearest_hare")):
        scripts = None if script is None else (script,)
        args = true_args(method=method, scripts=scripts, partners=(f"{partner}:3",), horizon=12, episodes=32)
        env = make_vec_env("stag_hunt-4x4-4h1s", 32, "cpu", 1, backend="batched")
        planner = make_planner(args, env)
        signal = type("Never", (), {"requested": False})
        returns = plan.play_episodes(planner, env, plan.seat_partners(args, env), args, signal)
        means[method, script] = sum(returns) / 32
    best = max(means["policy", "nearest_stag"], means["policy", "nearest_hare"])
    assert means["rollout", None] >= best


def test_puct_by_hand():
    trees = plan.Trees(1, 4, 3, torch.device("cpu"))
    zero = torch.zeros(1, dtype=torch.int64)
    prior = torch.tensor([[0.2, 0.5, 0.3]])
    legal = torch.tensor([[True, True, True]])
    assert trees.choose(zero, zero, prior, legal, 1.0).item() == 1  # nothing is known: the prior decides
    child, is_new = trees.descend(zero, zero, torch.tensor([1]))
    assert (child.item(), is_new.item()) == (1, True)
    path = [
        (zero, zero, torch.tensor([1]), torch.tensor([0.0]), torch.tensor([1.0])),
        (zero, child, torch.tensor([2]), torch.tensor([1.0]), torch.tensor([0.5])),
    ]
    trees.back_up(path, torch.tensor([3.0]))
    assert trees.visits[0, 0].tolist() == [0, 1, 0] and trees.sums[0, 0].tolist() == [0, 3, 0]
    assert trees.sums[0, 1].tolist() == [0, 0, 4]  # (3 - 1) / 0.5
    assert trees.descend(zero, zero, torch.tensor([1]))[1].item() is False
    # values: node 0 saw 3, node 1 saw 4: scaled 0 and 1; untried ones count as the mean of their node, 0
    scores = [0.2 * 2**0.5 / 1, 0.5 * 2**0.5 / 2, 0.3 * 2**0.5 / 1]
    assert trees.choose(zero, zero, prior, legal, 1.0).item() == scores.index(max(scores)) == 2


# ---------------------------------------------------------------- partners unlike all that were recorded


def beside_a_waiter(surprise):
    """A planner that takes its partner for a stag hunter, on the stag beside one who only stays; a hare two cells on.

    -> env, its first step, the planner
    """
    options = {"height": 1, "width": 4, "num_players": 2, "num_stags": 1, "num_hares": 1, "max_cycles": 12}
    env = StagHuntVecEnv(1, "cpu", 0, **options)
    step = env.set_positions(torch.tensor([[1, 1, 1, 3]]))
    step.episode_over[:] = True
    planner = make_planner(true_args(partners=("nearest_stag:1",), episode_limit=12, samples=8), env)
    if surprise:
        planner.strangers = plan.Strangers(surprise, planner.eyes)
    return env, step, planner


@pytest.mark.parametrize(("surprise", "found"), [(0.0, 0.0), (0.2, 1.0)])
def test_who_admits_surprise_leaves_a_partner_who_never_hunts(surprise, found):
    env, step, planner = beside_a_waiter(surprise)
    torch.manual_seed(0)
    memory = planner.initial_state(1)
    while True:
        actions, memory = planner.act(step, memory)
        actions[0, 1] = STAY
        memory = planner.remember(step, actions, memory)
        step = env.step(actions)
        if step.episode_over[0]:
            break
    assert step.episode_returns[0, 0] == found


def test_the_odds_of_a_stranger_follow_what_is_done():
    """A partner that is taken for a stag hunter does not hunt, then does, then the episode ends."""
    _, step, planner = beside_a_waiter(0.1)
    _, memory = planner.act(step, planner.initial_state(1))
    assert memory["strangers"]["strange"][0, 0].tolist() == pytest.approx([0.1, 0.1])

    def after(action, memory):
        return planner.remember(step, torch.tensor([[STAY, action]]), memory)

    share = plan.FIXED_SHARE
    memory = after(STAY, memory)  # the script never does that: it must be a stranger
    assert memory["strangers"]["strange"][0, 0, 1] == pytest.approx(1 - share + share * 0.1)
    strange = memory["strangers"]["strange"][0, 0, 1].item()
    memory = after(HUNT_STAG, memory)  # the script always does that, a stranger has done another thing here
    new = 1 - plan.NEW + plan.NEW / 4  # legal: left, right, stay, hunt stag
    habitual = plan.ONCE * new / (1 + plan.ONCE)
    expected = strange * habitual / (strange * habitual + 1 - strange)
    assert memory["strangers"]["strange"][0, 0, 1] == pytest.approx((1 - share) * expected + share * 0.1)
    assert memory["strangers"]["habits"][0, 0, 1].tolist() == [STAY, HUNT_STAG]
    memory = after(HUNT_HARE, memory)  # illegal, as far as the planner can tell: no evidence
    assert 0 < memory["strangers"]["strange"][0, 0, 1] < 1
    _, memory = planner.act(step, memory)  # an episode begins
    assert memory["strangers"]["strange"][0, 0].tolist() == pytest.approx([0.1, 0.1])
    assert (memory["strangers"]["situations"] == plan.NOWHERE).all()


def test_strangers_do_what_they_did_in_the_same_situation():
    env, step, planner = beside_a_waiter(0.1)
    _, memory = planner.act(step, planner.initial_state(1))
    memory = planner.remember(step, torch.tensor([[STAY, STAY]]), memory)
    memory = planner.remember(step, torch.tensor([[STAY, STAY]]), memory)

    def asked(step):
        root = planner.root(step, memory, 0, torch.tensor([0]))
        future = planner.begin(root, torch.tensor([0]), torch.tensor([0]))
        now = plan.Now(planner.world.look(root.views), future, root)
        who = (now, torch.tensor([0]), torch.tensor([1]))
        masks = step.action_mask[:, 1]
        expected = planner.opponents.logits(*who, masks).softmax(1)
        return planner.strangers.probs(planner.strangers.counts(*who, 7), expected, masks)[0]

    def by_action(stay, hunt, others):
        return pytest.approx([0, 0, others, others, stay, hunt, 0])

    half_known = 1 - plan.NEW + plan.NEW / 4  # the script hunts; legal: left, right, stay, hunt stag
    anything = plan.NEW / 4
    visits = 2 + plan.ONCE
    stays = (2 + plan.ONCE * anything) / visits
    others = plan.ONCE * anything / visits
    assert asked(step).tolist() == by_action(stays, plan.ONCE * half_known / visits, others)
    assert asked(step).sum() == pytest.approx(1)
    alone = env.set_positions(torch.tensor([[0, 1, 1, 3]]))  # on the same cell, without company: another situation
    assert asked(alone).tolist() == by_action(anything, half_known, anything)


def test_without_surprise_and_beside_nobody_strange_all_is_as_before(folders):
    """surprise 0 draws nothing and keeps nothing; and where all draws say "no stranger", actions are the MOA's."""
    env = make_env(16)
    step = play_random(env, 2)
    assert make_planner(make_args(folders, surprise=0.0), env).strangers is None
    assert make_planner(true_args(), env).strangers is None
    planner = make_planner(make_args(folders, surprise=0.3), env)
    rows = step.active[:, 0].nonzero()[:, 0]
    _, memory = planner.act(step, planner.initial_state(16))
    memory = planner.remember(step, torch.full((16, 4), STAY), memory)  # now all have a habit
    root = planner.root(step, memory, 0, rows)
    each = torch.arange(len(rows))
    future = planner.begin(root, each, torch.zeros_like(each))
    seen = planner.world.look(future.views)
    masks = planner.world.masks(seen, future.active)
    noise = plan.gumbel(masks.shape, masks.device)
    now = plan.Now(seen, future, root)
    strange = planner.strangers.draw(root, future, len(rows))
    assert strange.who.any() and not strange.who.all()
    without = planner.others_actions(now, masks, noise, None)
    nobody = strange._replace(who=torch.zeros_like(strange.who))
    assert torch.equal(planner.others_actions(now, masks, noise, nobody), without)
    drawn = planner.others_actions(now, masks, noise, strange)
    known = ~strange.who | ~future.active
    assert torch.equal(drawn[known], without[known]) and not torch.equal(drawn, without)
    assert masks.gather(2, drawn[..., None])[..., 0][future.active].all()


# ---------------------------------------------------------------- as a program and as a player


@pytest.mark.parametrize("method", ["rollout", "mcts", "policy"])
def test_a_run_plays_and_reports(folders, tmp_path, method, capsys):
    sizes = {"episodes": 5, "num_envs": 3, "samples": 1, "simulations": 3, "horizon": 4}
    args = make_args(folders, method=method, runs_dir=str(tmp_path), subgoals=2, backend="pettingzoo", **sizes)
    run_dir = plan.main(args)
    report = json.loads((run_dir / "plan.json").read_text())
    assert len(report["returns"]) == report["episodes"] == 5 and report["backend"] == "pettingzoo"
    assert report["mean_return"] == pytest.approx(sum(report["returns"]) / 5)
    assert report["method"] == method and report["ms_per_decision"] > 0
    assert report["sources"]["base_policies"] == ["subgoal 0", "subgoal 1"]
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("plan: seat 0 return") and "5 episodes" in last


def test_models_are_not_changed_by_planning(folders, tmp_path):
    args = make_args(folders, runs_dir=str(tmp_path), episodes=2, num_envs=2, seat=1)
    env = make_vec_env("stag_hunt-4x4-4h1s", 2, "cpu", 1, backend="batched")
    planner = make_planner(args, env, seats=(1,))
    models = (planner.world.model, planner.opponents.model)
    before = [{name: x.clone() for name, x in model.state_dict().items()} for model in models]
    signal = type("Never", (), {"requested": False})
    plan.play_episodes(planner, env, plan.seat_partners(args, env), args, signal)
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(x, old[name]) for name, x in model.state_dict().items())


def test_other_names_of_the_same_rules_are_no_other_env(folders, tmp_path):
    fields = {"runs_dir": str(tmp_path), "episodes": 1, "num_envs": 1, "samples": 1, "horizon": 2}
    for env_kwargs in ("{}", '{"max_cycles": 9, "num_blocks": 0}'):
        args = make_args(folders, env_id="stag_hunt", env_kwargs=env_kwargs, **fields)
        assert plan.main(args).is_dir()


def test_a_picture_of_two_players(folders, tmp_path):
    from PIL import Image

    from benchmark import plan_gif

    args = make_args(folders, runs_dir=str(tmp_path), episodes=1, num_envs=1, samples=1, base_samples=2, horizon=2)
    out = tmp_path / "both.gif"
    plan_gif.main(plan_gif.Args(str(plan.main(args)), "nearest_hare", episodes=1, side=64, out=str(out)))
    with Image.open(out) as picture:
        assert picture.n_frames > 1 and picture.size == (138, 64 + plan_gif.HEADER)


def test_a_run_folder_is_a_player_for_all_seats(folders, tmp_path):
    args = make_args(folders, runs_dir=str(tmp_path), episodes=1, num_envs=1, samples=1, horizon=2)
    run_dir = plan.main(args)
    env = make_env(6)
    player = plan.load_player(run_dir, env)
    step, memory = env.reset(1), player.initial_state(6)
    for _ in range(3):
        actions, memory = player.act(step, memory)
        legal = step.action_mask.gather(2, actions[..., None])[..., 0]
        assert actions.shape == (6, 4) and legal[step.active].all()
        memory = player.remember(step, actions, memory)
        step = env.step(actions)


def test_trained_policies_and_critics_serve_too(folders, tmp_path):
    import hyper_mappo

    sizes = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 64, "hidden_size": 8}
    fields = {
        "env_id": "stag_hunt-4x4-4h1s",
        "eval_episodes": 0,
        "cuda": False,
        "runs_dir": str(tmp_path),
        "hyper": "none",
    }
    policy = hyper_mappo.main(hyper_mappo.Args(**sizes, **fields))
    env = make_env(4)
    for method in ("one-step", "rollout", "mcts"):
        args = make_args(folders, policy=str(policy), method=method, simulations=3)
        planner = make_planner(args, env)
        step, memory = env.reset(1), planner.initial_state(4)
        actions, memory = planner.act(step, memory)
        assert step.action_mask[:, 0].gather(1, actions[:, :1]).all()
        everyone = planner.eyes.everyone(step.obs[:, :1])
        expected = planner.value.critic(step.state, step.obs)[:, 0]
        torch.testing.assert_close(planner.value(everyone, torch.zeros(4, dtype=torch.int64)), expected)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "0"], "--samples must be"),
        (["--horizon", "0"], "--horizon must be"),
        (["--partners"], "--partners expected who fills"),
        (["--partners", "nearest_hare:2"], "--partners expected to fill 3 seats"),
        (["--partners", "nearest_dog:3"], "got 'nearest_dog'"),
        (["--seat", "4"], "--seat expected 0 to 3, got 4"),
        (["--world-model", "nowhere"], "no checkpoint at nowhere"),
        (["--opponents", "nowhere"], "no checkpoint at nowhere"),
        (["--env-id", "stag_hunt-8x8-4h1s"], r"obs_shape \[4, 4, 7\], but stag_hunt-8x8-4h1s has"),
        (["--env-kwargs", '{"view": 3}'], "--joint-obs"),
        (["--env-kwargs", '{"num_blocks": 2}'], "trained with num_blocks 0, but .* has num_blocks 2"),
        (["--env-kwargs", '{"num_hares": 2}'], "trained with num_hares 4, but .* has num_hares 2"),
        (["--env-kwargs", "null"], "--env-kwargs"),
        (["--env-kwargs", '{"view": 3}', "--joint-obs", "--world", "true", "--opponents", "true"], "without view"),
        (["--method", "one-step"], "--method one-step expected values"),
        (["--scripts", "nearest_dog"], "--scripts expected"),
        (["--opponents", "true", "--subgoals", "2"], "--subgoals are the MOA's"),
        (["--env-id", "butterfly/pistonball_v6", "--method", "mcts"], "expected discrete actions"),
        (["--values", "DATA"], "found none"),
    ],
)
def test_bad_input_is_one_line(folders, tmp_path, capsys, flags, message):
    import re

    known = ["--world-model", folders["world"], "--opponents", folders["opponents"], "--partners", "nearest_hare:3"]
    flags = [folders["data"] if flag == "DATA" else flag for flag in flags]
    assert plan.cli([*known, "--runs-dir", str(tmp_path / "runs"), "--no-cuda", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and re.search(message, error[0]), error
    assert not (tmp_path / "runs").exists()


def test_windows_are_planned_for_on_everyones_views(tmp_path):
    """Where a view is no map, all views are imagined (--joint-obs); models hardly trained, it only has to run."""
    options = '{"view": 3}'
    fields = {"env_id": "stag_hunt-4x4-4h1s", "env_kwargs": options, "num_steps": 400, "policies": ("random",)}
    collect_main(CollectArgs(**fields, data_dir=str(tmp_path), name="windows", cuda=False))
    fields = {"data": str(tmp_path / "windows"), "runs_dir": str(tmp_path), "cuda": False}
    model = world_model.main(world_model.Args(**fields, total_updates=2, hidden_size=8))
    sizes = {"hidden_size": 16, "latent_size": 4, "epochs": 1}
    opponents = pretrain_vae.main(pretrain_vae.Args(**fields, **sizes))
    learned = {"world": str(model), "opponents": str(opponents)}
    args = make_args(learned, env_kwargs=options, joint_obs=True, subgoals=2, episodes=2, num_envs=2, seat=3)
    report = json.loads((plan.main(replace(args, runs_dir=str(tmp_path))) / "plan.json").read_text())
    assert report["episodes"] == 2 and report["seat"] == 3
    env = make_env(2, view=3)
    planner = make_planner(args, env, seats=(3,))
    step = env.reset(1)
    root = planner.root(step, planner.act(step, planner.initial_state(2))[1], 0, torch.arange(2))
    assert torch.equal(root.views, step.obs[:, [3, 0, 1, 2]])
    seen = planner.world.look(root.views)
    actions = torch.tensor([[0, 1, 2, 3], [4, 4, 4, 4]])
    views, reward, _, active = planner.world.step(seen, actions, root.active)
    # the second agent in ego order is seat 0, and counts the actions from itself
    alone = planner.world.model.step(step.obs[:, 0], actions[:, [1, 2, 3, 0]])
    assert torch.equal(views[:, 1][active[:, 1]], alone[0][active[:, 1]])
    torch.testing.assert_close(reward, planner.world.model.step(step.obs[:, 3], actions)[1])
