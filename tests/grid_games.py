"""What the tests of the grid games share: a batch and as many slow envs in plain Python, step by step."""

import numpy as np
import pytest
import torch

from envs.grid_game import STAY


def play_beside_slow_envs(env, make_slow, choose, num_steps):
    """Asserts that both say the same in every step. -> how many episodes ended, how many of them by the time limit

    make_slow(cells): a slow env; its step(actions) gives executed actions, rewards, terminations, truncation, over.
    choose(legal): an action of a player with such legal ones.
    """
    agents = range(env.num_agents)
    step = env.reset(3)
    slow = [make_slow(cells) for cells in env.state_dict()["cells"].tolist()]
    ended = truncated = 0
    for _ in range(num_steps):
        actions = torch.full((env.num_envs, env.num_agents), STAY)
        for n, one in enumerate(slow):
            assert np.array_equal(step.state[n].numpy(), one.picture())
            for i in agents:
                legal = one.legal(i)
                assert np.array_equal(step.obs[n, i].numpy(), one.observe(i))
                assert step.action_mask[n, i].tolist() == legal
                assert bool(step.active[n, i]) == (one.players[i] is not None)
                actions[n, i] = choose(legal)
        step = env.step(actions)
        cells = env.state_dict()["cells"].tolist()
        final_mask = env.final_action_mask()
        for n, one in enumerate(slow):
            executed, rewards, terminations, truncation, over = one.step(actions[n].tolist())
            assert step.executed_actions[n].tolist() == executed
            assert step.rewards[n].tolist() == pytest.approx(rewards)
            assert step.terminations[n].tolist() == terminations
            assert bool(step.truncations[n]) == truncation
            assert bool(step.episode_over[n]) == over
            assert np.array_equal(step.final_state[n].numpy(), one.picture())
            for i in agents:
                assert np.array_equal(step.final_obs[n, i].numpy(), one.observe(i))
                assert final_mask[n, i].tolist() == one.legal(i)
            if over:
                assert step.episode_returns[n].tolist() == pytest.approx(one.returns)
                assert step.episode_lengths[n] == one.t
                slow[n] = make_slow(cells[n])
                ended += 1
                truncated += truncation
    return ended, truncated
