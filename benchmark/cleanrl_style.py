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


def train(args: Args) -> dict:
    """-> env-steps per second over all updates but the first, and what was compared."""
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    device = torch.device(args.device)
    T, N = args.num_steps, args.num_envs
    env = pursuit_v5.parallel_env()
    A, n = len(env.possible_agents), env.action_space(env.possible_agents[0]).n
    envs = supersuit.pettingzoo_env_to_vec_env_v1(env)  # pursuers leave all at once: no black_death needed
    num_cpus = args.num_cpus if args.num_cpus > 1 else 0
    envs = supersuit.concat_vec_envs_v1(envs, N, num_cpus=num_cpus, base_class="gymnasium")
    F = int(np.prod(envs.observation_space.shape))
    agent = Agent(A, F, n, args.hidden_size).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=5e-4, eps=1e-5)
    gamma, gae_lambda, clip_coef, ent_coef, vf_coef, max_grad_norm = 0.99, 0.95, 0.2, 0.01, 0.5, 0.5

    obs = torch.zeros(T, N, A, F, device=device)
    actions, logprobs, rewards, dones, values = (torch.zeros(T, N, A, device=device) for _ in range(5))
    next_obs = torch.Tensor(envs.reset(seed=args.seed)[0]).to(device).view(N, A, F)  # [N*A, 7, 7, 3]
    next_done = torch.zeros(N, A, device=device)
    batch_size, times = T * N, []
    b_inds = np.arange(batch_size)
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        for update in range(args.updates):
            for t in range(T):
                obs[t], dones[t] = next_obs, next_done
                with torch.no_grad():
                    action, logprobs[t], _, values[t] = agent.get_action_and_value(next_obs)
                actions[t] = action
                next_obs, reward, terminations, truncations, _ = envs.step(action.flatten().cpu().numpy())
                rewards[t] = torch.Tensor(reward).to(device).view(N, A)
                next_done = torch.Tensor(np.logical_or(terminations, truncations)).to(device).view(N, A)
                next_obs = torch.Tensor(next_obs).to(device).view(N, A, F)

            with torch.no_grad():
                next_value, lastgaelam = agent.get_value(next_obs), 0.0
                advantages = torch.zeros_like(rewards)
                for t in reversed(range(T)):
                    nextnonterminal = 1.0 - (next_done if t == T - 1 else dones[t + 1])
                    nextvalues = next_value if t == T - 1 else values[t + 1]
                    delta = rewards[t] + gamma * nextvalues * nextnonterminal - values[t]
                    advantages[t] = lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
                returns = advantages + values

            b_obs = obs.reshape(-1, A, F)
            b_actions, b_logprobs, b_advantages, b_returns, b_values = (
                x.reshape(-1, A) for x in (actions, logprobs, advantages, returns, values)
            )
            clipfracs = []
            for _ in range(args.update_epochs):
                np.random.shuffle(b_inds)
                for mb_inds in np.array_split(b_inds, args.num_minibatches):
                    _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb_inds], b_actions[mb_inds])
                    logratio = newlogprob - b_logprobs[mb_inds]
                    ratio = logratio.exp()
                    with torch.no_grad():
                        approx_kl = ((ratio - 1) - logratio).mean()
                        clipfracs.append(((ratio - 1.0).abs() > clip_coef).float().mean().item())
                    mb_advantages = b_advantages[mb_inds]
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
                    pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * clipped).mean()
                    v_change = (newvalue - b_values[mb_inds]).clamp(-clip_coef, clip_coef)
                    v_error = (newvalue - b_returns[mb_inds]) ** 2
                    v_clipped = (b_values[mb_inds] + v_change - b_returns[mb_inds]) ** 2
                    v_loss = 0.5 * torch.max(v_error, v_clipped).mean()
                    loss = pg_loss - ent_coef * entropy.mean() + vf_coef * v_loss
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
                    optimizer.step()
            numbers = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy.mean(), "approx_kl": approx_kl}
            for name, x in numbers.items():
                writer.add_scalar(f"losses/{name}", x.item(), (update + 1) * batch_size)
            writer.add_scalar("losses/clipfrac", np.mean(clipfracs), (update + 1) * batch_size)
            times.append(time.perf_counter())
            writer.add_scalar("charts/SPS", len(times) * batch_size / (times[-1] - times[0] + 1e-9), update)
    envs.close()
    networks = {"actor": agent.actor, "critic": agent.critic}
    counts = [f"{name} {sum(p.numel() for p in net.parameters()):,}" for name, net in networks.items()]
    return {
        "sps": batch_size * (len(times) - 1) / (times[-1] - times[0]),
        "weights": ", ".join(counts),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print(json.dumps(train(tyro.cli(Args))))
