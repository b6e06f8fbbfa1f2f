"""Markov Stag Hunt against its rules: positions by hand, and a slow env in plain Python, written from the rules."""

from __future__ import annotations

import io
import random

import numpy as np
import pettingzoo
import pytest
import torch
from grid_games import play_beside_slow_envs
from pettingzoo.test import parallel_api_test, parallel_seed_test
from torch.utils._python_dispatch import TorchDispatchMode

from envs import stag_hunt
from envs.stag_hunt import PRESETS, SCRIPTED, StagHuntVecEnv, action_probs, ego_order, parallel_env, sample_actions
from runs import UsageError

UP, DOWN, LEFT, RIGHT, STAY, STAG, HARE = range(7)


def place(players, stags=(), hares=(), blocks=(), height=4, width=4, **options):
    """One env with bodies at (row, column); returns it and its first EnvStep."""
    env = StagHuntVecEnv(
        1,
        "cpu",
        0,
        height=height,
        width=width,
        num_players=len(players),
        num_stags=len(stags),
        num_hares=len(hares),
        num_blocks=len(blocks),
        **options,
    )
    bodies = [*players, *blocks, *stags, *hares]
    return env, env.set_positions(torch.tensor([[row * width + col for row, col in bodies]]))


def act(env, *actions):
    return env.step(torch.tensor([actions]))


def planes(step, channel, of="state"):
    """Cells (row, column) that are set in one plane of the state."""
    return {tuple(cell) for cell in getattr(step, of)[0, ..., channel].nonzero().tolist()}


# The rules, one at a time


def test_two_hunters_share_the_stag_and_leave():
    env, _ = place([(1, 1), (1, 1), (3, 3), (0, 0)], stags=[(1, 1)], hares=[(2, 2)])
    step = act(env, STAG, STAG, STAY, RIGHT)
    assert step.rewards.tolist() == [[5, 5, 0, 0]]
    assert step.terminations.tolist() == [[True, True, False, False]]
    assert step.active.tolist() == [[False, False, True, True]]
    assert not step.episode_over.any() and not step.truncations.any()
    assert planes(step, 5) == set() and planes(step, 6) == {(2, 2)}  # the stag is gone, the hare is not
    assert planes(step, 0) == planes(step, 1) == set()
    assert planes(step, 2) == {(3, 3)} and planes(step, 3) == {(0, 1)}


def test_three_hunters_share_the_stag():
    env, _ = place([(1, 1), (1, 1), (1, 1), (0, 0)], stags=[(1, 1)], hares=[(2, 2)])
    step = act(env, STAG, STAG, STAG, STAY)
    assert step.rewards[0].tolist() == pytest.approx([10 / 3, 10 / 3, 10 / 3, 0])
    assert step.active.tolist() == [[False, False, False, True]]


def test_one_stag_hunter_alone_is_legal_and_gets_nothing():
    env, step = place([(1, 1), (0, 0)], stags=[(1, 1)], hares=[(2, 2)])
    assert step.action_mask[0, 0, STAG]
    step = act(env, STAG, STAY)
    assert step.executed_actions.tolist() == [[STAG, STAY]]
    assert step.rewards.tolist() == [[0, 0]] and step.active.all() and not step.terminations.any()
    assert planes(step, 3) == {(1, 1)}


def test_a_bystander_on_the_stag_gets_nothing():
    env, _ = place([(1, 1), (1, 1), (1, 1)], stags=[(1, 1)], hares=[(2, 2)])
    step = act(env, STAG, STAY, STAG)
    assert step.rewards.tolist() == [[5, 0, 5]] and step.active.tolist() == [[False, True, False]]


def test_hares_are_caught_alone_and_shared_by_two():
    env, _ = place([(2, 2), (0, 3), (2, 2), (1, 1)], stags=[(3, 0)], hares=[(2, 2), (0, 3), (0, 0)])
    step = act(env, HARE, HARE, HARE, STAY)
    assert step.rewards.tolist() == [[0.5, 1, 0.5, 0]]
    assert step.terminations.tolist() == [[True, True, True, False]]
    assert planes(step, 6) == {(0, 0)} and planes(step, 5) == {(3, 0)}


def test_stag_and_hare_on_neighbouring_cells_do_not_mix():
    env, step = place([(1, 1), (1, 2), (1, 1)], stags=[(1, 1)], hares=[(1, 2), (3, 3)])
    assert step.action_mask[0, :, STAG].tolist() == [True, False, True]
    assert step.action_mask[0, :, HARE].tolist() == [False, True, False]
    step = act(env, STAG, STAG, STAY)  # the second hunts the stag from the hare's cell
    assert step.executed_actions.tolist() == [[STAG, STAY, STAY]] and not step.rewards.any()
    step = act(env, STAG, HARE, STAG)
    assert step.rewards.tolist() == [[5, 1, 5]]
    assert step.episode_over.all()  # nobody is left
    assert planes(step, 5, "final_state") == {(3, 3)}


def test_moves_come_before_hunts_and_a_mover_does_not_hunt():
    env, _ = place([(1, 1), (1, 2)], stags=[(1, 1)], hares=[(3, 3)])
    step = act(env, STAG, LEFT)  # the second arrives while the first hunts
    assert not step.rewards.any() and planes(step, 1) == {(1, 1)}
    step = act(env, STAG, RIGHT)  # the second walks away while the first hunts
    assert not step.rewards.any() and planes(step, 1) == {(1, 2)}
    act(env, STAY, LEFT)
    assert act(env, STAG, STAG).rewards.tolist() == [[5, 5]]


def test_moves_go_where_they_say_and_cells_are_shared():
    env, step = place([(1, 1), (1, 2), (2, 1), (1, 0)], stags=[(3, 3)])
    step = act(env, RIGHT, LEFT, UP, UP)  # the first two pass through each other
    assert [planes(step, i) for i in range(4)] == [{(1, 2)}, {(1, 1)}, {(1, 1)}, {(0, 0)}]
    step = act(env, DOWN, DOWN, RIGHT, LEFT)  # the last would leave the map
    assert [planes(step, i) for i in range(4)] == [{(2, 2)}, {(2, 1)}, {(1, 2)}, {(0, 0)}]
    assert step.executed_actions.tolist() == [[DOWN, DOWN, RIGHT, STAY]]


def test_players_who_left_are_blind_invisible_and_still():
    env, _ = place([(2, 2), (2, 3), (0, 0)], stags=[(1, 1)], hares=[(2, 2), (3, 3)])
    step = act(env, HARE, STAY, STAY)
    assert not step.obs[0, 0].any() and step.action_mask[0, 0].tolist() == [False] * 4 + [True] + [False] * 2
    # Planes of player 1: itself, 2, 0; of player 2: itself, 0, 1. Player 0 is in none.
    assert not step.obs[0, 1, ..., 2].any() and not step.obs[0, 2, ..., 1].any()
    assert step.obs[0, 1, ..., 0].sum() == step.obs[0, 2, ..., 2].sum() == 1
    step = act(env, 99, LEFT, STAY)  # whatever a player who left does is ignored
    assert step.executed_actions.tolist() == [[STAY, LEFT, STAY]] and not step.terminations.any()
    assert not step.rewards.any() and step.active.tolist() == [[False, True, True]]
    step = act(env, DOWN, RIGHT, STAY)
    step = act(env, HARE, DOWN, STAY)
    step = act(env, HARE, HARE, STAY)
    assert step.rewards.tolist() == [[0, 1, 0]] and step.terminations.tolist() == [[False, True, False]]


def test_last_prey_taken_ends_the_episode_for_all():
    env, _ = place([(2, 2), (0, 0), (3, 3)], hares=[(2, 2)])
    step = act(env, HARE, RIGHT, STAY)
    assert step.terminations.tolist() == [[True, True, True]] and step.episode_over.tolist() == [True]
    assert step.truncations.tolist() == [False]
    assert step.rewards.tolist() == step.episode_returns.tolist() == [[1, 0, 0]]
    assert step.episode_lengths.tolist() == [1]
    # The end as it was: the hunter gone, the others in their places.
    assert not step.final_obs[0, 0].any() and step.final_obs[0, 1, 0, 1, 0] == 1
    assert [planes(step, i, "final_state") for i in range(6)] == [set(), {(0, 1)}, {(3, 3)}, set(), set(), set()]
    # The next episode has begun.
    assert step.active.all() and step.state[0].sum() == 4 and step.obs[0].any((1, 2, 3)).all()


def test_last_player_leaving_ends_the_episode():
    env, _ = place([(2, 2), (2, 2)], stags=[(2, 2)], hares=[(0, 0)])
    step = act(env, STAG, STAG)
    assert step.terminations.all() and step.episode_over.all() and not step.truncations.any()


def test_truncation_at_max_cycles():
    env, _ = place([(2, 2), (0, 0)], hares=[(2, 2), (3, 3)], max_cycles=3)
    for _ in range(2):
        assert not act(env, STAY, STAY).episode_over.any()
    step = act(env, HARE, DOWN)  # the first leaves in the last step, which truncates the second only
    assert step.truncations.tolist() == step.episode_over.tolist() == [True]
    assert step.terminations.tolist() == [[True, False]]
    assert step.episode_lengths.tolist() == [3] and step.episode_returns.tolist() == [[1, 0]]
    assert planes(step, 1, "final_state") == {(1, 0)} and step.final_obs[0, 1, 1, 0, 0] == 1
    assert not act(env, STAY, STAY).episode_over.any()  # the clock began anew


def test_an_end_by_the_rules_in_the_last_step_is_no_truncation():
    env, _ = place([(2, 2), (0, 0)], hares=[(2, 2)], max_cycles=1)
    step = act(env, HARE, STAY)
    assert step.terminations.all() and step.episode_over.all() and not step.truncations.any()


def test_masks_and_blocks():
    #   0 1 2
    # 0 p B .     p: player 0 and 2, B: block, S: stag, H: hare
    # 1 H . S
    # 2 B . p
    env, step = place([(0, 0), (1, 0), (2, 2)], [(1, 2)], [(1, 0)], [(0, 1), (2, 0)], height=3, width=3)
    expected = [
        [False, True, False, False, True, False, False],
        [True, False, False, True, True, False, True],
        [True, False, True, False, True, False, False],
    ]
    assert step.action_mask[0].tolist() == expected
    assert planes(step, 3) == {(0, 1), (2, 0)}
    step = act(env, RIGHT, DOWN, UP)
    assert step.executed_actions.tolist() == [[STAY, STAY, UP]]
    assert [planes(step, i) for i in range(3)] == [{(0, 0)}, {(1, 0)}, {(1, 2)}]
    assert step.action_mask[0, 2].tolist() == [True, True, True, False, True, True, False]


def test_a_hunt_without_its_prey_is_executed_as_stay():
    env, _ = place([(2, 2), (1, 1), (1, 1)], stags=[(1, 1)], hares=[(2, 2), (0, 0)])
    step = act(env, STAG, HARE, STAY)
    assert step.executed_actions.tolist() == [[STAY, STAY, STAY]] and not step.rewards.any()
    env, _ = place([(2, 2), (2, 2)], hares=[(2, 2), (0, 0)])
    act(env, HARE, STAY)
    assert act(env, STAY, HARE).executed_actions.tolist() == [[STAY, STAY]]  # that hare is gone


def test_players_see_themselves_first():
    env, step = place([(0, 0), (0, 1), (0, 2), (0, 3)], stags=[(3, 0)], hares=[(3, 1)], blocks=[(3, 2)])
    assert ego_order(4).tolist() == [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]]
    assert step.obs.dtype == step.state.dtype == torch.uint8 and step.obs.shape == (1, 4, 4, 4, 7)
    for i in range(4):
        columns = step.obs[0, i, 0, :, :4].argmax(0).tolist()  # column of the one in each player plane
        assert columns == [(i + k) % 4 for k in range(4)]
        assert step.obs[0, i, 3, 2, 4] == step.obs[0, i, 3, 0, 5] == step.obs[0, i, 3, 1, 6] == 1
        assert step.obs[0, i].sum() == 7
        # The same function puts joint actions in the order of the planes.
        assert torch.equal(step.state[0][..., ego_order(4)[i]], step.obs[0, i, ..., :4])


def test_a_view_is_a_window_and_outside_is_block():
    env, step = place([(0, 0), (2, 1)], stags=[(1, 1)], hares=[(3, 3)], blocks=[(0, 1)], view=3)
    assert step.obs.shape == (1, 2, 3, 3, 5) and step.state.shape == (1, 4, 4, 5)
    self_plane, other, block, stag, hare = step.obs[0, 0].permute(2, 0, 1).tolist()
    assert self_plane == [[0, 0, 0], [0, 1, 0], [0, 0, 0]] and not np.any(other) and not np.any(hare)
    assert block == [[1, 1, 1], [1, 0, 1], [1, 0, 0]] and stag == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert step.obs[0, 1, ..., 2].tolist() == [[0, 0, 0]] * 3 and step.obs[0, 1, 0, 1, 3] == 1
    assert env.full_obs().shape == (1, 2, 4, 4, 5) and env.full_obs()[0, 0, 2, 1, 1] == 1
    env, step = place([(0, 0), (3, 3)], hares=[(0, 0), (1, 1)], view=3)
    step = act(env, HARE, STAY)
    assert not step.obs[0, 0].any() and not env.full_obs()[0, 0].any()


# The whole game


class SlowStagHunt:
    """One env, one rule a line; positions are (row, column), None for who is gone."""

    def __init__(self, options, cells):
        self.o = options
        spots = [divmod(cell, options["width"]) for cell in cells]
        a, b, s = options["num_players"], options["num_blocks"], options["num_stags"]
        self.players, self.blocks = spots[:a], set(spots[a : a + b])
        self.stags, self.hares = set(spots[a + b : a + b + s]), set(spots[a + b + s :])
        self.t, self.returns = 0, [0.0] * a

    def legal(self, i):
        at = self.players[i]
        legal = [False] * 7
        legal[STAY] = True
        if at is None:
            return legal
        for action in (UP, DOWN, LEFT, RIGHT):
            row, col = self.next(at, action)
            inside = 0 <= row < self.o["height"] and 0 <= col < self.o["width"]
            legal[action] = inside and (row, col) not in self.blocks
        legal[STAG], legal[HARE] = at in self.stags, at in self.hares
        return legal

    @staticmethod
    def next(at, action):
        return {UP: (at[0] - 1, at[1]), DOWN: (at[0] + 1, at[1]), LEFT: (at[0], at[1] - 1), RIGHT: (at[0], at[1] + 1)}[
            action
        ]

    def step(self, actions):
        n = len(self.players)
        was_active = [p is not None for p in self.players]
        executed = [a if was_active[i] and self.legal(i)[a] else STAY for i, a in enumerate(actions)]
        for i in range(n):
            if executed[i] < STAY:
                self.players[i] = self.next(self.players[i], executed[i])
        rewards = [0.0] * n
        for prey, action, needed, value in ((self.stags, STAG, 2, 10.0), (self.hares, HARE, 1, 1.0)):
            for spot in sorted(prey):
                hunters = [i for i in range(n) if executed[i] == action and self.players[i] == spot]
                if len(hunters) >= needed:
                    prey.remove(spot)
                    for i in hunters:
                        rewards[i] = value / len(hunters)
                        self.players[i] = None
        self.t += 1
        self.returns = [total + reward for total, reward in zip(self.returns, rewards, strict=True)]
        ended = all(p is None for p in self.players) or not (self.stags or self.hares)
        terminations = [was_active[i] and (ended or self.players[i] is None) for i in range(n)]
        truncation = not ended and self.t >= self.o["max_cycles"]
        return executed, rewards, terminations, truncation, ended or truncation

    def picture(self, first=0):
        """All planes as player `first` counts them; the state for 0."""
        n = len(self.players)
        out = np.zeros((self.o["height"], self.o["width"], n + 3), np.uint8)
        for k in range(n):
            if self.players[(first + k) % n] is not None:
                out[(*self.players[(first + k) % n], k)] = 1
        for plane, spots in ((n, self.blocks), (n + 1, self.stags), (n + 2, self.hares)):
            for spot in spots:
                out[(*spot, plane)] = 1
        return out

    def observe(self, i):
        view, at = self.o["view"], self.players[i]
        full = self.picture(i)
        if at is None:
            return np.zeros((view, view, full.shape[2]) if view else full.shape, np.uint8)
        if view is None:
            return full
        edge = view // 2
        padded = np.pad(full, ((edge, edge), (edge, edge), (0, 0)))
        padded[..., len(self.players)] = np.pad(full[..., len(self.players)], edge, constant_values=1)
        return padded[at[0] : at[0] + view, at[1] : at[1] + view]


GAMES = [
    PRESETS["stag_hunt-4x4-4h1s"],
    PRESETS["stag_hunt-8x8-4h2s"],
    {"height": 3, "width": 5, "num_players": 3, "num_stags": 2, "num_hares": 2, "num_blocks": 3, "max_cycles": 20},
    {"height": 2, "width": 2, "num_players": 2, "num_stags": 1, "num_hares": 1, "max_cycles": 7},
    {"height": 5, "width": 3, "num_players": 5, "num_stags": 1, "num_hares": 3, "num_blocks": 2, "view": 3},
    {"height": 4, "width": 4, "num_players": 1, "num_stags": 0, "num_hares": 2, "view": 7, "max_cycles": 12},
]


@pytest.mark.parametrize("can_branch", [True, False])
@pytest.mark.parametrize("options", GAMES)
def test_batch_agrees_with_a_slow_env(options, can_branch):
    """6 games x 34 envs x 50 steps = 10,200 random steps, on the CPU's path and on the accelerators'."""
    rng = random.Random(1)
    env = StagHuntVecEnv(34, "cpu", 3, **options)
    env._can_branch = can_branch

    def choose(legal):
        hunts = [a for a in (STAG, HARE) if legal[a]]
        return rng.choice(hunts) if hunts and rng.random() < 0.5 else rng.randrange(7)

    ended, _ = play_beside_slow_envs(env, lambda cells: SlowStagHunt(env.options, cells), choose, 50)
    assert ended >= 34


@pytest.mark.parametrize("can_branch", [True, False])
def test_starts_are_distinct_free_connected_and_uniform(can_branch):
    env = StagHuntVecEnv(20_000, "cpu", 0, height=3, width=4, num_players=2, num_stags=1, num_hares=1, num_blocks=3)
    env._can_branch = can_branch
    env.reset(5)
    cells = env.state_dict()["cells"]  # [20,000, 7]
    assert (cells.sort(1).values.diff(dim=1) > 0).all()  # all seven on cells of their own
    for spots in cells[:2000, 2:5].tolist():
        free = set(range(12)) - set(spots)
        reached, edge = set(), {min(free)}
        while edge:
            reached |= edge
            near = {n for c in edge for n in (c - 4, c + 4, c - (c % 4 > 0), c + (c % 4 < 3))}
            edge = (near & free) - reached
        assert reached == free
    # Given symmetry, a body is as often in a cell as in that cell's mirror images.
    counts = torch.stack([torch.bincount(column, minlength=12) for column in cells.unbind(1)])  # [7, 12]
    mirrored = (counts.view(7, 3, 4) + counts.view(7, 3, 4).flip(1, 2)) / 2
    assert (counts.view(7, 3, 4) - mirrored).abs().max() < 150  # five standard deviations
    free_of_blocks = StagHuntVecEnv(20_000, "cpu", 0).state_dict()["cells"]  # [20,000, 9]
    for column in free_of_blocks.unbind(1):
        chi_square = ((torch.bincount(column, minlength=16) - 1250.0) ** 2 / 1250).sum()
        assert chi_square < 44  # 15 degrees of freedom, 1e-4 beyond


@pytest.mark.parametrize("policy", ["random", "nearest_stag"])
def test_seats_are_symmetric(policy):
    env = StagHuntVecEnv(4096, "cpu", 1)
    step, generator, returns = env.reset(1), torch.Generator().manual_seed(2), []
    for _ in range(35):
        step = env.step(sample_actions(action_probs(policy, env.full_obs(), step.action_mask), generator))
        returns.append(step.episode_returns[step.episode_over])
    returns = torch.cat(returns)  # [episodes, A]
    assert len(returns) >= 4096
    half_width = 1.96 * returns.std(0) / len(returns) ** 0.5
    assert (returns.mean(0) - half_width).max() < (returns.mean(0) + half_width).min()
    assert returns.mean() > 0.5


def test_known_best_returns():
    """Two players on the stag and two on hares: 3.0 a player; all on the stag 2.5; hares only 1.0."""
    stag, hares = (0, 0), [(1, 0), (1, 1), (2, 0), (2, 1)]
    for seats, actions, best in (
        ([stag, stag, hares[0], hares[1]], [STAG, STAG, HARE, HARE], 3.0),
        ([stag] * 4, [STAG] * 4, 2.5),
        (hares, [HARE] * 4, 1.0),
    ):
        env, _ = place(seats, [stag], hares)
        step = act(env, *actions)
        assert step.episode_over.all() and step.episode_returns.mean() == pytest.approx(best)


# Seeds, saving, other devices


def episodes(env, step, num_steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(num_steps):
        step = env.step(sample_actions(action_probs("nearest_hare", env.full_obs(), step.action_mask), generator))
        out.append(step)
    return out


def same(a, b):
    fields = [*(f for f in vars(a) if not f.startswith("_")), "final_obs", "final_state"]
    assert "obs" in fields and "executed_actions" in fields
    fields.remove("success")
    assert a.success is None and b.success is None  # it cannot be won or lost
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)


def test_seeds():
    env, other = StagHuntVecEnv(64, "cpu", 1), StagHuntVecEnv(64, "cpu", 2)
    assert not torch.equal(env.reset(7).state, env.reset(8).state)
    first, second = episodes(env, env.reset(7), 60), episodes(other, other.reset(7), 60)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert len(env.reset(7).state.flatten(1).unique(dim=0)) == 64  # no two envs alike


@pytest.mark.parametrize("options", [{}, {"num_blocks": 2, "view": 3}])
def test_state_dict_continues_episodes_in_flight(options):
    env = StagHuntVecEnv(32, "cpu", 1, **options)
    last = episodes(env, env.reset(1), 23)[-1]
    buffer = io.BytesIO()
    torch.save(env.state_dict(), buffer)
    buffer.seek(0)
    expected = episodes(env, last, 40, seed=9)
    other = StagHuntVecEnv(32, "cpu", 5, **options)
    restored = other.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(restored, last)
    assert all(same(a, b) for a, b in zip(expected, episodes(other, restored, 40, seed=9), strict=True))


def test_steps_do_not_change_what_was_returned():
    env = StagHuntVecEnv(64, "cpu", 1, max_cycles=2)
    steps = [env.reset(1), *episodes(env, env.reset(1), 4)]
    kept = [(s.obs.clone(), s.state.clone(), s.rewards.clone(), s.active.clone()) for s in steps]
    episodes(env, steps[-1], 4)
    for step, (obs, state, rewards, active) in zip(steps, kept, strict=True):
        assert torch.equal(step.obs, obs) and torch.equal(step.state, state)
        assert torch.equal(step.rewards, rewards) and torch.equal(step.active, active)
    cells = env.state_dict()["cells"]
    given = cells.clone()
    episodes(env, env.set_positions(given), 4)
    assert torch.equal(given, cells)


class NoSync(TorchDispatchMode):
    """Fails on operators that would make the host wait for an accelerator."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal.default", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(op in name for op in self.WAITING), f"{name} waits for the device"
        if "index" in name and isinstance(args[1], (list, tuple)):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a bool index waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"num_blocks": 2, "view": 3}])
def test_stepping_never_waits_for_an_accelerator(options):
    env = StagHuntVecEnv(16, "cpu", 1, max_cycles=3, **options)
    env._can_branch = False
    step = env.reset(1)
    with NoSync():
        for policy in SCRIPTED:
            step = env.step(sample_actions(action_probs(policy, env.full_obs(), step.action_mask)))
            assert step.final_obs.shape == step.obs.shape and step.final_state.shape == step.state.shape
    with pytest.raises(AssertionError, match="waits"), NoSync():
        env._can_branch = True
        env.step(torch.full((16, 4), STAY))


def test_accelerators_execute_actions_out_of_range_as_stay():
    env, _ = place([(1, 1), (2, 2)], stags=[(1, 1)])
    env._can_branch = False
    step = act(env, 7, -(2**60))
    assert step.executed_actions.tolist() == [[STAY, STAY]]
    assert planes(step, 0) == {(1, 1)} and planes(step, 1) == {(2, 2)}


# Scripted partners


def hand_probs(policy, i, *args, **options):
    env, step = place(*args, **options)
    return action_probs(policy, env.full_obs(), step.action_mask)[0, i].tolist()


@pytest.mark.parametrize(
    ("policy", "player", "stags", "hares", "blocks", "expected"),
    [
        ("random", (0, 0), [(3, 3)], [], [], {DOWN: 1 / 3, RIGHT: 1 / 3, STAY: 1 / 3}),
        ("random", (1, 1), [(1, 1)], [], [], {a: 1 / 6 for a in (UP, DOWN, LEFT, RIGHT, STAY, STAG)}),
        ("stay", (1, 1), [(1, 1)], [], [], {STAY: 1}),
        ("nearest_stag", (1, 1), [(1, 1), (1, 2)], [], [], {STAG: 1}),
        ("nearest_hare", (1, 1), [(0, 0)], [(1, 1)], [], {HARE: 1}),
        ("nearest_stag", (0, 0), [(2, 3)], [(0, 1)], [], {DOWN: 1 / 2, RIGHT: 1 / 2}),
        ("nearest_stag", (0, 0), [(3, 0)], [], [], {DOWN: 1}),
        ("nearest_hare", (1, 1), [], [(0, 1), (1, 3)], [], {UP: 1}),  # the nearer one only
        ("nearest_hare", (1, 1), [], [(0, 1), (1, 2), (3, 3)], [], {UP: 1 / 2, RIGHT: 1 / 2}),
        ("nearest_hare", (1, 1), [], [(0, 2), (2, 2)], [], {UP: 1 / 3, DOWN: 1 / 3, RIGHT: 1 / 3}),
        ("nearest_hare", (1, 1), [(1, 1)], [(1, 2)], [], {RIGHT: 1}),  # on the other kind of prey
        ("nearest_stag", (1, 1), [(3, 3)], [], [(1, 2)], {DOWN: 1}),  # the other way is blocked
        ("nearest_stag", (1, 1), [(1, 3)], [], [(1, 2)], {UP: 1 / 3, DOWN: 1 / 3, LEFT: 1 / 3}),  # a detour
        ("nearest_stag", (1, 1), [], [(1, 1)], [], {STAY: 1}),  # no target left
    ],
)
def test_scripted_policies_in_cases_by_hand(policy, player, stags, hares, blocks, expected):
    probs = hand_probs(policy, 0, [player, (3, 2)], stags, hares, blocks)
    assert probs == pytest.approx([expected.get(a, 0) for a in range(7)])


def test_a_walled_in_script_stays():
    """Free cells are connected in drawn maps; a walled-in player is only possible by hand."""
    assert hand_probs("nearest_stag", 0, [(0, 0)], [(2, 2)], [], [(0, 1), (1, 0)]) == [0, 0, 0, 0, 1, 0, 0]


def slow_probs(policy, one, i):
    legal, at = one.legal(i), one.players[i]
    targets = one.hares if policy == "nearest_hare" else one.stags
    hunt = {"nearest_stag": STAG, "nearest_hare": HARE, "waits_at_stag": STAY}.get(policy)

    def far(a, b):
        return abs(a[0] - b[0]) + abs(a[1] - b[1])

    if at is None or policy == "stay":
        choice = [STAY]
    elif policy == "random":
        choice = [a for a in range(7) if legal[a]]
    elif not targets:
        choice = [STAY]
    elif at in targets:
        choice = [hunt]
    else:
        nearest = min(far(at, t) for t in targets)
        moves = [a for a in range(4) if legal[a]]
        closer = [t for t in targets if far(at, t) == nearest]
        choice = [a for a in moves if any(far(one.next(at, a), t) < nearest for t in closer)] or moves or [STAY]
    return [1 / len(choice) if a in choice else 0.0 for a in range(7)]


@pytest.mark.parametrize("policy", SCRIPTED)
@pytest.mark.parametrize("options", [o for o in GAMES if "view" not in o])
def test_scripted_policies_agree_with_slow_ones(policy, options):
    env = StagHuntVecEnv(40, "cpu", 4, **options)
    step = env.reset(4)
    for _ in range(6):
        probs = action_probs(policy, env.full_obs(), step.action_mask)
        assert probs.dtype == torch.float32 and torch.allclose(probs.sum(-1), torch.ones(()))
        assert not (probs > 0)[~step.action_mask].any()
        now = env.state_dict()
        for n in range(40):
            one = SlowStagHunt(env.options, now["cells"][n].tolist())
            num_agents, alive = env.num_agents, now["alive"][n].tolist()
            one.players = [p if alive[i] else None for i, p in enumerate(one.players)]
            state = step.state[n].numpy()
            one.stags, one.hares = ({*map(tuple, np.argwhere(state[..., num_agents + k]))} for k in (1, 2))
            for i in range(num_agents):
                assert probs[n, i].tolist() == pytest.approx(slow_probs(policy, one, i))
        step = episodes(env, step, 3)[-1]


def test_samples_follow_the_probabilities():
    probs = torch.tensor([0.5, 0, 0.2, 0.3, 0, 0, 0]).expand(20, 1000, 7)
    samples = sample_actions(probs, torch.Generator().manual_seed(0))
    assert samples.shape == (20, 1000) and samples.dtype == torch.int64
    assert (torch.bincount(samples.flatten(), minlength=7) / 20_000).tolist() == pytest.approx(
        probs[0, 0].tolist(), abs=0.02
    )


# PettingZoo


@pytest.mark.parametrize("options", [{}, {"preset": "stag_hunt-8x8-4h2s", "num_blocks": 5, "view": 5}])
@pytest.mark.filterwarnings("error:Live agent", "error:Agent was given", "error:No agents present")
def test_pettingzoo_api_and_seeds(options):
    parallel_api_test(parallel_env(**options))
    parallel_seed_test(lambda: parallel_env(**options))


def test_pettingzoo_registry():
    for name in PRESETS:
        env = pettingzoo.make("parallel", f"{name}-v0", max_cycles=9)
        assert env.observation_space("player_0").shape == (PRESETS[name]["height"], PRESETS[name]["width"], 7)
        assert env._env.options["max_cycles"] == 9
    assert pettingzoo.make("parallel", "stag_hunt-8x8-4h2s").unwrapped._env.options["num_stags"] == 2


def test_pettingzoo_plays_the_same_game():
    """Drives the view and a batch of one through 20 episodes; the view must show ends, not the next start."""
    env, core = parallel_env(num_blocks=1, view=3), StagHuntVecEnv(1, "cpu", 0, num_blocks=1, view=3)
    rng, space = np.random.default_rng(0), env.state_space
    obs, infos = env.reset(seed=11)
    step, ended = core.reset(11), 0
    while ended < 20:
        assert set(env.agents) == {a for a, on in zip(core.agents, step.active[0], strict=True) if on}
        for i, agent in enumerate(core.agents):
            if agent in env.agents:
                assert np.array_equal(infos[agent]["action_mask"], step.action_mask[0, i].numpy())
        actions = {a: rng.choice(np.flatnonzero(infos[a]["action_mask"])) for a in env.agents}
        actions[env.agents[-1]] = rng.integers(7)  # legal or not
        joint = [int(actions.get(a, STAY)) for a in core.agents]
        played = list(env.agents)
        obs, rewards, terminations, truncations, infos = env.step(actions)
        step = core.step(torch.tensor([joint]))
        assert set(obs) == set(rewards) == set(terminations) == set(truncations) == set(infos) == set(played)
        assert env.state().dtype == np.uint8 and np.array_equal(env.state(), step.final_state[0].numpy())
        assert space.contains(env.state())
        for i, agent in enumerate(core.agents):
            if agent in played:
                assert np.array_equal(obs[agent], step.final_obs[0, i].numpy())
                assert rewards[agent] == step.rewards[0, i] and isinstance(rewards[agent], float)
                assert terminations[agent] == bool(step.terminations[0, i])
                assert truncations[agent] == bool(step.truncations[0] and not step.terminations[0, i])
                assert infos[agent]["executed_action"] == step.executed_actions[0, i]
                assert np.array_equal(infos[agent]["action_mask"], core.final_action_mask()[0, i].numpy())
                assert env.observation_space(agent).contains(obs[agent])
        if not env.agents:
            ended += 1
            assert step.episode_over.all() and env.step({}) == ({}, {}, {}, {}, {})
            obs, infos = env.reset(seed=ended)
            step = core.reset(ended)


def test_pettingzoo_truncates_only_those_who_did_not_terminate():
    env = parallel_env(num_players=2, num_stags=0, num_hares=2, max_cycles=1)
    env.reset(seed=0)
    env._env.set_positions(torch.tensor([[0, 5, 0, 9]]))  # two players, two hares; the first is on a hare
    _, rewards, terminations, truncations, _ = env.step({"player_0": HARE, "player_1": STAY})
    assert rewards == {"player_0": 1.0, "player_1": 0.0} and env.agents == []
    assert terminations == {"player_0": True, "player_1": False}
    assert truncations == {"player_0": False, "player_1": True}


def test_pettingzoo_resets_without_a_seed_differ():
    first, second = parallel_env("stag_hunt-8x8-4h1s"), parallel_env("stag_hunt-8x8-4h1s")
    states = []
    for env in (first, first, second):
        env.reset()
        states.append(env.state().tobytes())
    assert len(set(states)) == 3


def test_render_tells_things_apart():
    env, _ = place([(0, 0), (1, 1), (1, 1)], stags=[(1, 1)], hares=[(2, 2)], blocks=[(3, 3)])
    frame = env.render()
    assert frame.shape == (320, 320, 3) and frame.dtype == np.uint8
    cells = frame.reshape(4, 80, 4, 80, 3).transpose(0, 2, 1, 3, 4)
    looks = [cells[at] for at in ((0, 0), (1, 1), (2, 2), (3, 3), (0, 2))]
    for i, one in enumerate(looks):
        for other in looks[:i]:
            assert np.abs(one.astype(int) - other).mean() > 5
    assert len(np.unique(cells[0, 2].reshape(-1, 3), axis=0)) == 1  # an empty cell is plain
    view = parallel_env(render_mode="rgb_array")
    view.reset(seed=0)
    assert view.render().shape == (320, 320, 3)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 2, "width": 4}, "a cell for each of the 9"),
        ({"num_blocks": 8}, "a cell for each of the 17"),
        ({"num_players": 0}, "num_players"),
        ({"num_stags": -1}, "num_stags"),
        ({"num_stags": 0, "num_hares": 0}, "at least one stag or hare"),
        ({"max_cycles": 0}, "max_cycles"),
        ({"max_cycles": 2.5}, "max_cycles"),
        ({"view": 4}, "odd view"),
        ({"view": 0}, "view"),
        ({"height": 8, "width": 8, "num_blocks": 40}, "use fewer blocks"),
        ({"num_players": "four"}, "num_players"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    for make in (lambda: StagHuntVecEnv(2, "cpu", 0, **options), lambda: parallel_env(**options)):
        with pytest.raises(UsageError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


def test_bad_names_are_clear_errors():
    with pytest.raises(UsageError, match="stag_hunt-8x8-4h2s"):
        stag_hunt.preset_options("stag_hunt-9x9")
    with pytest.raises(UsageError, match="stag_hunt-8x8-4h2s"):
        parallel_env("stag_hunt-9x9")
    env = StagHuntVecEnv(2, "cpu", 0)
    with pytest.raises(UsageError, match="nearest_stag"):
        action_probs("nearest_bear", env.full_obs(), env.reset(0).action_mask)
    with pytest.raises(UsageError, match="rgb_array"):
        parallel_env(render_mode="human")
    with pytest.raises(UsageError, match="num_envs"):
        StagHuntVecEnv(0, "cpu", 0)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"\[2, 4\]"),
        (torch.zeros(4, dtype=torch.int64), r"\[2, 4\]"),
        (torch.zeros(2, 4), "int64"),
        (torch.zeros(2, 4, dtype=torch.bool), "int64"),
        (np.zeros((2, 4), np.int64), "int64"),
        (torch.full((2, 4), 7), "0 to 6"),
        (torch.full((2, 4), -1), "0 to 6"),
        (torch.zeros(2, 4, dtype=torch.int64, device="meta"), "meta"),
    ],
)
def test_bad_actions_are_clear_errors(actions, message):
    env = StagHuntVecEnv(2, "cpu", 0)
    before = env.state_dict()["cells"]
    with pytest.raises(ValueError, match=message) as error:
        env.step(actions)
    assert not isinstance(error.value, UsageError)
    assert torch.equal(env.state_dict()["cells"], before)


def test_bad_positions_and_states_are_clear_errors():
    env = StagHuntVecEnv(1, "cpu", 0, num_players=1, num_hares=1, num_blocks=1)  # player, block, stag, hare
    for cells, message in (
        ([[0, 1, 2]], r"\[1, 4\]"),
        ([[0, 1, 2, 16]], "0 to 15"),
        ([[0, 1, 1, 3]], "distinct"),
        ([[1, 1, 2, 3]], "in a block"),
    ):
        with pytest.raises(ValueError, match=message):
            env.set_positions(torch.tensor(cells))
    with pytest.raises(ValueError, match="every block"):
        env.set_positions(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[True, False, True, True]]))
    with pytest.raises(ValueError, match="options"):
        env.load_state_dict(StagHuntVecEnv(1, "cpu", 0).state_dict())
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        env.load_state_dict(StagHuntVecEnv(2, "cpu", 0, num_players=1, num_hares=1, num_blocks=1).state_dict())


def test_pettingzoo_misuse_is_a_clear_error():
    env = parallel_env()
    for misuse in (lambda: env.step({}), env.state, parallel_env(render_mode="rgb_array").render):
        with pytest.raises(ValueError, match="a reset first"):
            misuse()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="player_3"):
        env.step({f"player_{i}": 4 for i in range(3)})
    with pytest.raises(ValueError, match="0 to 6"):
        env.step({f"player_{i}": 7 for i in range(4)})
