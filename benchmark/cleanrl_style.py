"""MAPPO as a single-file loop over SuperSuit's vector env: the usual way, for benchmark/train_speed.py to compare with.

Written for this comparison in the manner of CleanRL's PPO: observations cross from numpy to torch and actions back in
every step, storage is float32, minibatches are gathered from shuffled indices. One actor is shared by all agents; the
critic sees all agents' observations (SuperSuit does not hand out the state) and gives one value for each agent.
A minibatch holds whole env steps, so that the critic is evaluated once for all agents.

    python benchmark/cleanrl_style.py          # 2 cores, 2 minutes
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass

# Before torch is imported, as for all sides: waiting threads that spin take the cores from the env processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # no display needed

import numpy as np
import supersuit
import torch
import torch.nn as nn
import tyro
from pettingzoo.sisl import pursuit_v5
from torch.distributions.categorical import Categorical
from torch.utils.tensorboard import SummaryWriter

GAMMA, GAE_LAMBDA = 0.99, 0.95
CLIP_COEF, ENT_COEF, VF_COEF, MAX_GRAD_NORM = 0.2, 0.01, 0.5, 0.5


@dataclass
class Args:
    num_envs: int = 8
    """genuine envs"""
    num_cpus: int = 2
    """processes that step them; below 2: none, all in this process"""
    num_steps: int = 512
    """env steps of each env per update"""
    update_epochs: int = 4
    """passes over each rollout"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    hidden_size: int = 128
    """width of the two hidden layers of actor and critic"""
    updates: int = 3
    """updates; the first is start-up and not counted"""
    num_threads: int | None = None
    """CPU threads of one PyTorch operation; None: PyTorch's choice"""
    device: str = "cpu"
    """where actor and critic live"""
    seed: int = 1
    """of envs, networks and actions"""


def mlp(size_in: int, hidden_size: int, size_out: int, gain: float) -> nn.Sequential:
    layers = [nn.Linear(size_in, hidden_size), nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, size_out)]
    for layer, scale in zip(layers, (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


class Agent(nn.Module):
    def __init__(self, num_agents: int, num_features: int, num_actions: int, hidden_size: int):
        super().__init__()
        self.actor = mlp(num_features, hidden_size, num_actions, 0.01)
        self.critic = mlp(num_agents * num_features, hidden_size, num_agents, 1.0)

    def get_value(self, obs: torch.Tensor) -> torch.Tensor:
        return self.critic(obs.flatten(1))  # [B, A, F] -> [B, A]

    def get_action_and_value(self, obs: torch.Tensor, action: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        probs = Categorical(logits=self.actor(obs))  # [B, A, F] -> [B, A, n]
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action), probs.entropy(), self.get_value(obs)


class Rollouts:
    """Steps genuine pursuits; what happened stands in tensors [T, N, A(, F)]."""

    def __init__(self, args: Args, device: torch.device):
        env = pursuit_v5.parallel_env()
        self.num_agents = len(env.possible_agents)
        self.num_actions = env.action_space(env.possible_agents[0]).n
        envs = supersuit.pettingzoo_env_to_vec_env_v1(env)  # pursuers leave all at once: no black_death needed
        num_cpus = args.num_cpus if args.num_cpus > 1 else 0
        self.envs = supersuit.concat_vec_envs_v1(envs, args.num_envs, num_cpus=num_cpus, base_class="gymnasium")
        self.num_features = int(np.prod(self.envs.observation_space.shape))
        self.device = device
        shape = (args.num_steps, args.num_envs, self.num_agents)
        self.obs = torch.zeros(*shape, self.num_features, device=device)
        self.actions = torch.zeros(shape, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.rewards = torch.zeros(shape, device=device)
        self.dones = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.next_obs = self.to_obs(self.envs.reset(seed=args.seed)[0])
        self.next_done = torch.zeros(shape[1:], device=device)

    def to_obs(self, obs: np.ndarray) -> torch.Tensor:
        """[N*A, 7, 7, 3] -> [N, A, F]"""
        return torch.Tensor(obs).to(self.device).view(-1, self.num_agents, self.num_features)

    def to_agents(self, x: np.ndarray) -> torch.Tensor:
        """[N*A] -> [N, A]"""
        return torch.Tensor(x).to(self.device).view(-1, self.num_agents)

    def collect(self, agent: Agent) -> None:
        for t in range(len(self.obs)):
            self.obs[t] = self.next_obs
            self.dones[t] = self.next_done
            with torch.no_grad():
                action, self.logprobs[t], _, self.values[t] = agent.get_action_and_value(self.next_obs)
            self.actions[t] = action
            next_obs, reward, terminations, truncations, _ = self.envs.step(action.flatten().cpu().numpy())
            self.rewards[t] = self.to_agents(reward)
            self.next_done = self.to_agents(np.logical_or(terminations, truncations))
            self.next_obs = self.to_obs(next_obs)

    @torch.no_grad()
    def estimate_advantages(self, agent: Agent) -> torch.Tensor:
        """GAE. [T, N, A]"""
        advantages = torch.zeros_like(self.rewards)
        nextvalues = agent.get_value(self.next_obs)
        nextdone = self.next_done
        lastgaelam = 0.0
        for t in reversed(range(len(self.obs))):
            nextnonterminal = 1.0 - nextdone
            delta = self.rewards[t] + GAMMA * nextvalues * nextnonterminal - self.values[t]
            lastgaelam = delta + GAMMA * GAE_LAMBDA * nextnonterminal * lastgaelam
            advantages[t] = lastgaelam
            nextvalues = self.values[t]
            nextdone = self.dones[t]
        return advantages


def ppo_loss(agent: Agent, mb: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-> the loss of a minibatch, and what is logged of it"""
    _, newlogprob, entropy, newvalue = agent.get_action_and_value(mb["obs"], mb["actions"])
    logratio = newlogprob - mb["logprobs"]
    ratio = logratio.exp()
    with torch.no_grad():
        approx_kl = ((ratio - 1) - logratio).mean()
        clipfrac = ((ratio - 1.0).abs() > CLIP_COEF).float().mean()
    advantages = mb["advantages"]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = ratio.clamp(1 - CLIP_COEF, 1 + CLIP_COEF)
    pg_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
    v_change = (newvalue - mb["values"]).clamp(-CLIP_COEF, CLIP_COEF)
    v_error = (newvalue - mb["returns"]) ** 2
    v_clipped = (mb["values"] + v_change - mb["returns"]) ** 2
    v_loss = 0.5 * torch.max(v_error, v_clipped).mean()
    loss = pg_loss - ENT_COEF * entropy.mean() + VF_COEF * v_loss
    numbers = {
        "policy_loss": pg_loss,
        "value_loss": v_loss,
        "entropy": entropy.mean(),
        "approx_kl": approx_kl,
        "clipfrac": clipfrac,
    }
    return loss, numbers


def train(args: Args) -> dict:
    """-> env-steps per second over all updates but the first, and what was compared."""
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    device = torch.device(args.device)
    rollouts = Rollouts(args, device)
    A, F = rollouts.num_agents, rollouts.num_features
    agent = Agent(A, F, rollouts.num_actions, args.hidden_size).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=5e-4, eps=1e-5)
    batch_size = args.num_steps * args.num_envs
    b_inds = np.arange(batch_size)
    times = []
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        for update in range(1, args.updates + 1):
            rollouts.collect(agent)
            advantages = rollouts.estimate_advantages(agent)
            batch = {
                "obs": rollouts.obs.reshape(-1, A, F),
                "actions": rollouts.actions.reshape(-1, A),
                "logprobs": rollouts.logprobs.reshape(-1, A),
                "values": rollouts.values.reshape(-1, A),
                "advantages": advantages.reshape(-1, A),
                "returns": (advantages + rollouts.values).reshape(-1, A),
            }
            for _ in range(args.update_epochs):
                np.random.shuffle(b_inds)
                for mb_inds in np.array_split(b_inds, args.num_minibatches):
                    loss, numbers = ppo_loss(agent, {name: x[mb_inds] for name, x in batch.items()})
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRAD_NORM)
                    optimizer.step()
            for name, x in numbers.items():
                writer.add_scalar(f"losses/{name}", x.item(), update * batch_size)
            times.append(time.perf_counter())
    rollouts.envs.close()
    counts = []
    for name, network in (("actor", agent.actor), ("critic", agent.critic)):
        counts.append(f"{name} {sum(p.numel() for p in network.parameters()):,}")
    return {
        "sps": batch_size * (len(times) - 1) / (times[-1] - times[0]),
        "weights": ", ".join(counts),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print(json.dumps(train(tyro.cli(Args))))
