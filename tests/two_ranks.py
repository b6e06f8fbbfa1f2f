"""Run by test_hyper_mappo.py, alone or under torchrun: training on an env whose copies differ but hold no chance.

python tests/two_ranks.py RUNS_DIR TOTAL_TIMESTEPS [RUN_DIR to resume]
"""

import sys
from pathlib import Path

import torch
from gymnasium.spaces import Discrete

sys.path.insert(0, str(Path(__file__).parents[1]))
import hyper_mappo
from envs import CheckedEnv, EnvStep, VecEnv

SEED, STEPS = 5, 8


class TableEnv(VecEnv):
    """Copy i reads its observations from row i of one table; the action picks the reward from it."""

    env_id, backend, agents = "table", "batched", ["a", "b"]
    obs_shape, obs_dtype, state_shape, state_dtype = (3,), torch.float32, (6,), torch.float32
    action_space = Discrete(3)

    def __init__(self, num_envs, device, seed):
        self.num_envs, self.device, self.t = num_envs, device, 0
        first = seed - SEED  # how many copies the ranks before this one have
        table = torch.randn(50, 8, 2, 3, generator=torch.Generator().manual_seed(0))
        self.table = table[:, first : first + num_envs]

    def env_step(self, rewards):
        obs, N, no = self.table[self.t], self.num_envs, torch.zeros(self.num_envs, 2, dtype=torch.bool)
        over = torch.full((N,), self.t % 5 == 0)
        lengths = torch.full((N,), 5)
        zeros = (no, over, over, obs, obs.flatten(1), rewards, lengths)
        return EnvStep(obs, obs.flatten(1), None, ~no, rewards, *zeros)

    def reset(self, seed):
        return self.env_step(torch.zeros(self.num_envs, 2))

    def step(self, actions):
        rewards = self.table[self.t].gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        self.t += 1
        return self.env_step(rewards)

    def state_dict(self):
        return {"t": self.t}

    def load_state_dict(self, state_dict):
        self.t = state_dict["t"]
        return self.env_step(torch.zeros(self.num_envs, 2))


def gloo_threads():
    """The names of this process' threads that belong to a process group; none where the system does not tell."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    runs_dir, total_timesteps, *resume = sys.argv[1:]
    hyper_mappo.check_env = lambda *_: CheckedEnv("table", "batched", {}, spec=None)
    hyper_mappo.make_vec_env = lambda checked, num_envs, device, seed, *_: TableEnv(num_envs, device, seed)
    hyper_mappo.sample_actions = lambda dist, *_: dist.argmax(-1)
    flags = ["--runs-dir", runs_dir, "--total-timesteps", total_timesteps, "--seed", str(SEED), "--num-envs", "8"]
    flags += ["--num-steps", "8", "--num-minibatches", "1", "--update-epochs", "2", "--no-anneal-lr", "--hidden-size"]
    flags += ["8", "--final-ent-coef", "None", "--eval-episodes", "0", "--save-every", "1", "--no-cuda"]
    flags += ["--learning-rate", "0.01"]
    exit_code = hyper_mappo.cli((["--resume", *resume] if resume else []) + flags)
    left = gloo_threads()  # they abort an interpreter that ends while they work
    sys.exit(f"threads that were not joined: {left}" if left else exit_code)
