"""Small cooperative PettingZoo envs whose optimum is known."""

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

AGENTS = ["a_0", "a_1"]


class TellTheOther(ParallelEnv):
    """Each agent sees one of three numbers and is asked for the number of the *other* agent: both right pay 1 to both.

    Without communication only chance helps (1/9 a step); with everyone's observations the optimum is 1 a step.
    """

    metadata = {"name": "tell_the_other"}
    render_mode = None
    possible_agents = AGENTS
    length = 8

    def observation_space(self, agent):
        return Box(0, 1, (3,), np.float32)

    def action_space(self, agent):
        return Discrete(3)

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.agents, self.t = list(AGENTS), 0
        return self.observe(), {agent: {} for agent in AGENTS}

    def observe(self):
        self.numbers = self.rng.integers(3, size=2)
        return {agent: np.eye(3, dtype=np.float32)[self.numbers[i]] for i, agent in enumerate(AGENTS)}

    def asked(self):
        return self.numbers[::-1]

    def step(self, actions):
        reward = float(all(actions[agent] == number for agent, number in zip(AGENTS, self.asked(), strict=True)))
        self.t += 1
        over = self.t == self.length
        obs = self.observe()
        if over:
            self.agents = []
        flags = dict.fromkeys(AGENTS, False)
        return obs, dict.fromkeys(AGENTS, reward), flags, dict.fromkeys(AGENTS, over), {a: {} for a in AGENTS}

    def render(self):
        return None


class OwnNumber(TellTheOther):
    """The same, asked for one's own number: solvable without the hypernetwork."""

    metadata = {"name": "own_number"}

    def asked(self):
        return self.numbers


class Remember(TellTheOther):
    """The number is shown in the first step only and asked for in the last: needs the history. Optimum 1 an episode."""

    metadata = {"name": "remember"}
    length = 4

    def observe(self):
        if self.t == 0:
            return super().observe()
        return dict.fromkeys(AGENTS, np.zeros(3, dtype=np.float32))

    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, {agent: rewards[agent] * (self.t == self.length) for agent in AGENTS}, *rest

    def asked(self):
        return self.numbers


class TurnsNaN(OwnNumber):
    """Its observations are NaN after 20 steps of the process."""

    metadata = {"name": "turns_nan"}
    steps = 0

    def observe(self):
        TurnsNaN.steps += 1
        return {agent: x * (np.nan if TurnsNaN.steps > 60 else 1) for agent, x in super().observe().items()}


tell_the_other, own_number, remember, turns_nan = TellTheOther, OwnNumber, Remember, TurnsNaN
