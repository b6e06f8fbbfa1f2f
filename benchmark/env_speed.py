"""How fast environments step: genuine, through SuperSuit, and as batches of tensors.

In one run, in turn and several times over, so that a noisy machine slows everyone: the genuine env in one
process, SuperSuit at several settings, the batched env at several sizes. Random actions; observations and state
included. Prints medians, ratios to the best SuperSuit setting, and what the batched env spends its time on.

    python benchmark/env_speed.py                                # 2 cores, 5 minutes
    python benchmark/env_speed.py --env-ids pursuit --device cuda
    python benchmark/env_speed.py --env-ids mpe2.simple_spread_v3 vmas:simple_spread --num-envs 16 128

Envs that have one form only (mpe2's, or a simulator's) get a table of their own: env-steps per second and per CPU
second, and the share of the time that the adapter takes around the simulator's own step.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported: threads that spin while they wait for each other make small operations up to 30 times
# slower as soon as other programs use the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gymnasium as gym
import matplotlib
import numpy as np
import supersuit
import torch
import tyro
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from anywhere
from envs import VecEnv, check_env, make_parallel_env, make_vec_env


@dataclass
class Args:
    env_ids: tuple[str, ...] = ("pursuit", "stag_hunt")
    """environments: those with a batched form are compared with SuperSuit, others are measured as they are"""
    device: str = "cpu"
    """where the batched env lives; genuine envs are always on the CPU"""
    num_envs: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096, 16384)
    """sizes of the batched env"""
    supersuit: tuple[tuple[int, int], ...] = ((8, 1), (2, 2), (4, 2), (8, 2), (16, 2))
    """SuperSuit settings: number of envs, number of worker processes (1: none, all in this process)"""
    seconds: float = 1.0
    """time for each measurement"""
    rounds: int = 5
    """how often everything is measured; medians are reported"""
    seed: int = 1
    """of envs and actions"""
    resets: bool = False
    """VMAS: also what it costs to begin new episodes in some of the envs, masked and one by one"""
    plot: Path = Path("docs/img/env_speed.png")
    """where the picture goes"""


GENUINE = "genuine, one process"


def batched(num_envs: int) -> str:
    """How the table calls a size of the batched env."""
    return f"batched, {num_envs} envs"


def steps_per_second(
    step: Callable[[], object],
    num_envs: int,
    seconds: float,
    device: torch.device,
) -> float:
    """Env-steps per second of a function that steps `num_envs` envs; a tenth of the time is warm-up."""
    start, count, end = time.perf_counter(), 0, seconds / 10
    for timed in (False, True):
        while time.perf_counter() - start < end:
            step()
            count += timed
        if device.type == "cuda":
            torch.cuda.synchronize()
        if not timed:
            start, end = time.perf_counter(), seconds
    return count * num_envs / (time.perf_counter() - start)


def genuine_step(env_id: str, seed: int) -> Callable[[], object]:
    env = make_parallel_env(env_id)
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    num_actions = env.action_space(env.possible_agents[0]).n

    def step() -> None:
        if not env.agents:
            env.reset()
        env.step({agent: int(rng.integers(num_actions)) for agent in env.agents})
        env.state()

    return step


def supersuit_step(
    env_id: str,
    num_envs: int,
    num_cpus: int,
    seed: int,
) -> tuple[Callable[[], object], Callable[[], None]]:
    """A function that steps, and one that ends the worker processes."""
    env = supersuit.pettingzoo_env_to_vec_env_v1(supersuit.black_death_v3(make_parallel_env(env_id)))
    envs = supersuit.concat_vec_envs_v1(env, num_envs, num_cpus=num_cpus, base_class="gymnasium")
    envs.reset(seed=seed)
    rng = np.random.default_rng(seed)
    actions = rng.integers(envs.action_space.n, size=(8, envs.num_envs))
    turn = iter(range(sys.maxsize))

    def step() -> None:
        envs.step(actions[next(turn) % 8])

    return step, envs.close


def batched_step(env: VecEnv, seed: int) -> Callable[[], object]:
    state = env.state_dict()
    if "lengths" in state:  # pursuit: as in a long run, episodes are of all ages and some end in every step
        state["lengths"] = torch.randint(env.max_cycles, (env.num_envs,), device=env.device)
        env.load_state_dict(state)
    generator = torch.Generator().manual_seed(seed)
    shape = (8, env.num_envs, env.num_agents)
    actions = torch.randint(env.action_space.n, shape, generator=generator)
    actions = actions.to(env.device)
    turn = iter(range(sys.maxsize))
    return lambda: env.step(actions[next(turn) % 8])


def memory_per_env(env: VecEnv, step: object) -> float:
    """Bytes of all tensors that an env holds and that its last step returned."""
    storages = {}
    for value in (*vars(env).values(), *vars(step).values()):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / env.num_envs


def profile_steps(
    env: VecEnv,
    step: Callable[[], object],
    num_steps: int = 20,
) -> tuple[float, list]:
    """Operations (kernels, on a GPU) per step, and (share of the time, kind of work), the largest first."""
    cuda = env.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    for _ in range(3):
        step()
    with profile(activities=activities, record_shapes=True) as prof:
        for _ in range(num_steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    kinds, launches = {}, 0
    for event in prof.key_averages(group_by_input_shape=True):
        name = event.key.removeprefix("aten::")
        is_launch = name == "cudaLaunchKernel" if cuda else name in WORK
        launches += event.count * is_launch
        if name == event.key:  # a kernel or a call of the driver: its time is in the operation that made it
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = kind_of_work(name, event.input_shapes, env.num_envs)
        kinds[kind] = kinds.get(kind, 0) + spent
    total = sum(kinds.values())
    shares = [(spent / total, kind) for kind, spent in kinds.items()]
    return launches / num_steps, sorted(shares, reverse=True)


def kind_of_work(name: str, input_shapes: list, num_envs: int) -> str:
    # Observations are rows selected from all maps; other selections are from a small table.
    first = input_shapes[0] if input_shapes else []
    if name == "index_select" and len(first) == 2 and first[0] > 100 * num_envs:
        return "building observations"
    return WORK.get(name, "everything else (branches, views, allocation)")


# kind of work -> torch operations
KINDS = {
    "computing indices, rewards and flags": (
        "add add_ sub mul mul_ eq ne ge gt lt le any all sum amin mean where aminmax max min "
        "bitwise_and bitwise_or bitwise_not neg clamp maximum masked_fill_ cumsum div topk sort"
    ),
    "counting on the maps": "gather scatter_add_ scatter_ scatter",
    "looking up tables": "index_select index take index_put_ _index_put_impl_ index_copy_",
    "copying and converting": "copy_ cat clone repeat fill_ zero_",
    "random numbers": "random_ uniform_ multinomial",
}
WORK = {operation: kind for kind, operations in KINDS.items() for operation in operations.split()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of 64 MB writes."""
    source = torch.zeros(64 * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 64 * 2**20 * steps_per_second(lambda: target.copy_(source), 1, 1.0, device)


def measure(env_id: str, args: Args) -> dict[str, list[float]]:
    """Prints the table of one env; returns env-steps per second by name, one number per round."""
    device = torch.device(args.device)
    cpu = torch.device("cpu")
    steps = {(GENUINE, 1, cpu): genuine_step(env_id, args.seed)}
    closers = []
    for num_envs, num_cpus in args.supersuit:
        processes = "processes" if num_cpus > 1 else "process"
        key = (f"SuperSuit, {num_envs} envs, {num_cpus} {processes}", num_envs, cpu)
        steps[key], close = supersuit_step(env_id, num_envs, num_cpus, args.seed)
        closers.append(close)
    envs = [make_vec_env(env_id, n, device, args.seed, backend="batched") for n in args.num_envs]
    for env in envs:
        key = (batched(env.num_envs), env.num_envs, device)
        steps[key] = batched_step(env, args.seed)

    speeds = {name: [] for name, _, _ in steps}
    for _ in range(args.rounds):
        for (name, num_envs, where), step in steps.items():
            speed = steps_per_second(step, num_envs, args.seconds, where)
            speeds[name].append(speed)
    for close in closers:
        close()
    print(f"\n{env_id}: env-steps per second, median of {args.rounds} rounds (lowest ... highest)")
    print_table(speeds)
    fastest = max(envs, key=lambda env: statistics.median(speeds[batched(env.num_envs)]))
    print_bounds(fastest, speeds, args.seed)
    return speeds


# ---------------------------------------------------------------- envs of one form
class Stopwatch:
    """Stands in for a function and adds up the time that its calls take, and what they return is waited for."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*args)
        if "jax" in sys.modules:
            sys.modules["jax"].block_until_ready(result)
        self.seconds += time.perf_counter() - start
        return result


def watch_simulator(env: VecEnv) -> Stopwatch:
    """Puts a stopwatch in the place of the simulator's own step."""
    if env.env_id.startswith("jaxmarl:"):
        env.simulation = copy.copy(env.simulation)  # it is shared by envs of the same arguments
        env.simulation.step = Stopwatch(env.simulation.step)
        return env.simulation.step
    env.env.step = Stopwatch(env.env.step)
    return env.env.step


def simulator_step(env: VecEnv, seed: int) -> Callable[[], object]:
    """Random legal actions; episodes are of all ages only after a while, as in training."""
    generator = torch.Generator().manual_seed(seed)
    shape = (8, env.num_envs, env.num_agents)
    if isinstance(env.action_space, gym.spaces.Box):
        actions = 2 * torch.rand(*shape, *env.action_space.shape, generator=generator) - 1
    else:
        sizes = torch.tensor(env.action_sizes)
        actions = (torch.rand(shape, generator=generator) * sizes).long()
    actions = actions.to(env.device)
    turn = iter(range(sys.maxsize))
    return lambda: env.step(actions[next(turn) % 8])


def measure_one_form(env_id: str, args: Args) -> None:
    print(f"\n{env_id}: env-steps per second, median of {args.rounds} rounds")
    print(f"{'':24}{'env-steps/s':>14}{'per CPU second':>16}{'adapter':>10}{'first step':>12}")
    if check_env(env_id).genuine:
        step = genuine_step(env_id, args.seed)
        print_speeds("genuine, one process", time_rounds(step, 1, None, args), None)
        return
    for num_envs in args.num_envs:
        env = make_vec_env(env_id, num_envs, args.device, args.seed)
        step = simulator_step(env, args.seed)
        start = time.perf_counter()
        step()  # where JAX compiles
        first = time.perf_counter() - start
        watch = watch_simulator(env)
        print_speeds(f"{num_envs} envs", time_rounds(step, num_envs, watch, args), first)
        if args.resets and env_id.startswith("vmas:"):
            print_resets(env)
        env.close()


def time_rounds(
    step: Callable[[], object],
    num_envs: int,
    watch: Stopwatch | None,
    args: Args,
) -> list[tuple[float, float, float]]:
    """(env-steps per second, per CPU second, share of the adapter) of each round"""
    rounds = []
    for _ in range(3):
        step()
    for _ in range(args.rounds):
        inside = watch.seconds if watch else 0.0
        cpu, start, count = time.process_time(), time.perf_counter(), 0
        while time.perf_counter() - start < args.seconds:
            step()
            count += num_envs
        wall = time.perf_counter() - start
        cpu = time.process_time() - cpu
        share = 1 - (watch.seconds - inside) / wall if watch else 0.0
        rounds.append((count / wall, count / cpu, share))
    return rounds


def print_resets(env: VecEnv, repeats: int = 10) -> None:
    """CPU milliseconds to begin new episodes in 1, 8 and 32 envs: as the adapter does, and by VMAS's reset_at."""
    obs = env.last["obs"]
    observe = {"get_observations": True, "get_rewards": False, "get_infos": False, "get_dones": False}
    for num_over in (1, 8, 32):
        over = torch.arange(env.num_envs, device=env.device) < num_over

        def masked(over: torch.Tensor = over) -> None:
            with env._random_numbers():
                env._restart(over, obs)

        def one_by_one(num_over: int = num_over) -> None:
            with env._random_numbers():
                for n in range(num_over):
                    env.env.reset_at(n, return_observations=False)
                env.env.get_from_scenario(**observe)

        spent = []
        for reset in (masked, one_by_one):
            reset()
            start = time.process_time()
            for _ in range(repeats):
                reset()
            spent.append((time.process_time() - start) / repeats * 1000)
        print(f"  {num_over} of {env.num_envs} begin anew: {spent[0]:.1f} ms masked, {spent[1]:.1f} ms one by one")


def print_speeds(name: str, rounds: list[tuple[float, float, float]], first: float | None) -> None:
    speed, per_cpu, share = (statistics.median(values) for values in zip(*rounds, strict=True))
    compiled = "" if first is None else f"{first:10.1f} s"
    print(f"{name:24}{speed:14,.0f}{per_cpu:16,.0f}{share:10.0%}{compiled:>12}")


# ---------------------------------------------------------------- tables and pictures
def best_supersuit(speeds: dict[str, list[float]]) -> str:
    names = [name for name in speeds if name.startswith("SuperSuit")]
    return max(names, key=lambda name: statistics.median(speeds[name]))


def print_table(speeds: dict[str, list[float]]) -> None:
    best = best_supersuit(speeds)
    print(f"{'':34}{'median':>12}   {'':26}{'x genuine':>11}{'x SuperSuit':>13}")
    for name, values in speeds.items():
        median = statistics.median(values)
        spread = f"({min(values):,.0f} ... {max(values):,.0f})"
        row = f"{name:34}{median:12,.0f}   {spread:26}"
        for reference in (GENUINE, best):
            # ratios within a round, where both met the same machine
            ratios = [v / r for v, r in zip(values, speeds[reference], strict=True)]
            row += f"{statistics.median(ratios):12,.1f}"
        print(row)


def print_bounds(env: VecEnv, speeds: dict[str, list[float]], seed: int) -> None:
    """What a step of this env spends its memory and time on."""
    step = batched_step(env, seed)
    last = step()
    out = (last.obs.nbytes + last.state.nbytes) / env.num_envs
    speed = statistics.median(speeds[batched(env.num_envs)])
    bandwidth = copy_bandwidth(env.device)
    launches, kinds = profile_steps(env, step)
    alone = float("nan")  # seconds that a step of one env takes
    if batched(1) in speeds:
        alone = 1 / statistics.median(speeds[batched(1)])
    print(f"What bounds it, at {env.num_envs} envs:")
    print(f"  memory {memory_per_env(env, last):,.0f} bytes per env, results of the last step included")
    print(
        f"  bytes: {out:,.0f} of observations and state per env-step, {out * speed / 1e9:.2f} GB/s, "
        f"{out * speed / bandwidth:.0%} of what a plain copy writes ({bandwidth / 1e9:.1f} GB/s)"
    )
    print(
        f"  launches: {launches:.0f} operations per step; a step of 1 env takes {alone * 1e6:.0f} us, "
        f"{alone * speed / env.num_envs:.1%} of a step of {env.num_envs}"
    )
    for share, kind in kinds:
        print(f"  {share:4.0%} {kind}")


def draw(results: dict[str, dict[str, list[float]]], args: Args) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for i, (env_id, speeds) in enumerate(results.items()):
        colour = f"C{i}"
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        by_size = [medians[batched(n)] for n in args.num_envs]
        axes.plot(args.num_envs, by_size, "o-", color=colour, label=f"{env_id}, batched")
        best = medians[best_supersuit(speeds)]
        axes.axhline(best, ls="--", color=colour, label=f"{env_id}, SuperSuit at its best")
        axes.axhline(medians[GENUINE], ls=":", color=colour, label=f"{env_id}, genuine, one process")
    axes.set(xscale="log", yscale="log", xlabel="envs in the batch", ylabel="env-steps per second")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=120, bbox_inches="tight")
    print(f"\nplot: {args.plot}")


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    compared = {}
    for env_id in args.env_ids:
        checked = check_env(env_id)
        if checked.genuine and checked.backend == "batched":
            compared[env_id] = measure(env_id, args)
        else:
            measure_one_form(env_id, args)
    if compared:
        draw(compared, args)


if __name__ == "__main__":
    main(tyro.cli(Args))
