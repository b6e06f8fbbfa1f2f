"""Steps per second of WorldModel.step and .rollout, beside the batched env and the genuine env, in one run.

    python benchmark/world_model_speed.py --env-id stag_hunt-8x8-4h1s pursuit
    python benchmark/world_model_speed.py --env-id stag_hunt-4x4-4h1s --hidden-size 32 16 --num-threads 2

One step is one agent's view one step on; an env step moves all agents, so it is worth as many views as there are
agents, and "env steps" divides by that. Weights are random, views are the env's. "tables": the same layers as sums of
table rows, where the model can be stepped so (Simulator), as load_world_model does; "channels last": convolutions with
that memory format. Speeds are by the clock and by CPU time of all threads, which other jobs change less.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from envs import VecEnv, describe_obs, make_vec_env  # noqa: E402
from runs import get_device  # noqa: E402
from world_model import Args as ModelArgs  # noqa: E402
from world_model import Simulator, WorldModel  # noqa: E402


@dataclass
class Args:
    env_id: tuple[str, ...] = ("stag_hunt-4x4-4h1s", "stag_hunt-8x8-4h1s", "pursuit")
    """environments to measure"""
    batch_sizes: tuple[int, ...] = (64, 1024, 4096)
    """agents' views imagined side by side"""
    hidden_size: tuple[int, ...] = (ModelArgs().hidden_size,)
    """widths of the world model"""
    horizon: int = 10
    """imagined steps per rollout"""
    seconds: float = 3.0
    """time spent on each number"""
    num_threads: int | None = None
    """CPU threads of torch; None: torch's default"""
    cuda: bool = True
    """if set, a GPU is used where there is one"""


def steps_per_second(run: Callable[[], int], seconds: float, device: torch.device) -> tuple[float, float]:
    """Calls `run`, which returns how many steps it made, for about `seconds` after one warm-up call.

    -> steps per second by the clock, and per second of CPU time
    """
    run()
    start, steps = wait_for(device), 0
    cpu = time.process_time()
    now = start
    while now - start < seconds:
        steps += run()
        now = wait_for(device)
    return steps / (now - start), steps / (time.process_time() - cpu)


def wait_for(device: torch.device) -> float:
    """The time once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_model(env_id: str, hidden_size: int, device: torch.device) -> WorldModel:
    """A model for this env."""
    env = make_vec_env(env_id, 1, device, 0, backend="batched")
    channels = env.obs_shape[-1]
    config = {
        "env_id": env.env_id,
        "env_kwargs": {},
        "obs_shape": list(env.obs_shape),
        "obs_dtype": "uint8",
        "num_agents": env.num_agents,
        "action_dim": int(env.action_space.n),
        "discrete": True,
        "has_mask": env.reset(0).action_mask is not None,
        "levels": 1,
        "obs_mean": [0.0] * channels,
        "obs_std": [1.0] * channels,
        "hidden_size": hidden_size,
        "loss": "obs",
        "obs_head": "categorical",
        "joint_action": "painted",
        "reward_head": "twohot",
        "reward_bins": [float(x) for x in range(16)],
    }
    if "count" in describe_obs(config).kinds:
        config["levels"] = 4
    return WorldModel(config).to(device).eval()


def imagine(model: WorldModel, obs: torch.Tensor, actions: torch.Tensor) -> int:
    """obs [B, *O], actions [B, H, A] -> imagined steps."""
    model.rollout(obs, actions)
    return actions.shape[0] * actions.shape[1]


def step_model(model: WorldModel, obs: torch.Tensor, actions: torch.Tensor) -> int:
    """obs [B, *O], actions [B, A] -> steps."""
    model.step(obs, actions)
    return len(obs)


def add_models(rows: dict, env_id: str, B: int, obs: torch.Tensor, args: Args) -> None:
    """What is to be timed of the world model on views obs [B, *O]."""
    for hidden_size in args.hidden_size:
        model = random_model(env_id, hidden_size, obs.device)
        actions = torch.randint(model.action_dim, (len(obs), args.horizon, model.num_agents), device=obs.device)
        rows[f"world model {hidden_size}, rollout", B] = partial(imagine, model, obs, actions)
        rows[f"world model {hidden_size}, step", B] = partial(step_model, model, obs, actions[:, 0])
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        rows[f"world model {hidden_size}, step, channels last", B] = partial(step_model, last, obs, actions[:, 0])
        if Simulator.fits(model):
            tables = copy.deepcopy(model)
            tables.simulator = [Simulator(tables)]
            rows[f"world model {hidden_size}, step, tables", B] = partial(step_model, tables, obs, actions[:, 0])


def step_env(env: VecEnv) -> int:
    """One step of all envs with random actions -> agent steps."""
    shape = (env.num_envs, env.num_agents)
    env.step(torch.randint(int(env.action_space.n), shape, device=env.device))
    return env.num_envs * env.num_agents


def measure(env_id: str, args: Args, device: torch.device) -> None:
    """Prints a line for each thing and batch size."""
    rows = {}
    for B in args.batch_sizes:
        A = make_vec_env(env_id, 1, device, 0, backend="batched").num_agents
        env = make_vec_env(env_id, max(1, B // A), device, 0, backend="batched")
        obs = env.reset(0).obs.flatten(0, 1)  # [N, A, *O] -> [N * A, *O]
        add_models(rows, env_id, B, obs, args)
        rows["batched env, step", B] = partial(step_env, env)
    genuine = make_vec_env(env_id, 1, torch.device("cpu"), 0, backend="pettingzoo")
    genuine.reset(0)
    rows["genuine env, step", A] = partial(step_env, genuine)
    print(env_id)
    for name, size in sorted(rows, reverse=True):
        speed, of_cpu = steps_per_second(rows[name, size], args.seconds, device)
        print(f"  {name:36}{size:12,}  {speed:14,.0f}  {of_cpu:14,.0f}  {speed / A:12,.0f}")


def main(args: Args) -> None:
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    device = get_device(args.cuda)
    print(f"{device}, {torch.get_num_threads()} CPU threads, horizon {args.horizon}")
    print(f"{'':38}{'views':>12}  {'agent steps/s':>14}  {'per CPU second':>14}  {'env steps/s':>12}")
    for env_id in args.env_id:
        measure(env_id, args, device)


if __name__ == "__main__":
    main(tyro.cli(Args))
