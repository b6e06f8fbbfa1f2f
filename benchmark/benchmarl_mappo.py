"""BenchMARL's MAPPO on genuine pursuit and simple_spread, and on VMAS: needs a virtual environment of its own.

Everything is BenchMARL's: its collector (of genuine envs with one process for each), its loss, its training loop, its
csv log. Only the genuine envs are added (it comes without ours), as its documentation says new tasks are. The last
line printed is JSON. benchmark/train_speed.py and benchmark/simulators.py call it.

    python -m venv benchmarl-venv
    benchmarl-venv/bin/pip install -r benchmark/requirements-benchmarl.txt
    benchmarl-venv/bin/python benchmark/benchmarl_mappo.py     # 2 cores, 2 minutes
    benchmarl-venv/bin/python benchmark/benchmarl_mappo.py --task vmas:balance --num-envs 128 --num-steps 64
    benchmarl-venv/bin/python benchmark/benchmarl_mappo.py --task mpe2.simple_spread_v3
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# Before torch is imported, as for all sides: waiting threads that spin take the cores from the env processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # no display needed

import torch
import tyro
from benchmarl.algorithms import MappoConfig
from benchmarl.environments import Task, VmasTask
from benchmarl.environments.pettingzoo.common import PettingZooClass
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, PettingZooWrapper

GENUINE = {
    "pursuit": {"module": "pettingzoo.sisl.pursuit_v5", "max_cycles": 500},
    "mpe2.simple_spread_v3": {"module": "mpe2.simple_spread_v3", "N": 3, "max_cycles": 25},
}


@dataclass
class Args:
    task: str = "pursuit"
    """pursuit, mpe2.simple_spread_v3, or vmas:NAME with the arguments that BenchMARL gives that scenario"""
    num_envs: int = 8
    """envs: genuine ones, each in a process of its own; a batch of VMAS"""
    num_steps: int = 512
    """env steps of each env per update"""
    update_epochs: int = 4
    """passes over each rollout"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    hidden_size: int = 128
    """width of the two hidden layers of actor and critic"""
    entropy_coef: float = 0.01
    """weight of the entropy bonus; BenchMARL's own is 0"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation; BenchMARL's own is 0.9"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient; BenchMARL's own is 5"""
    updates: int = 3
    """updates; the first is start-up and not counted"""
    num_threads: int | None = None
    """CPU threads of one PyTorch operation in the training process; None: what BenchMARL makes of it"""
    device: str = "cpu"
    """where actor and critic are trained; rollouts run on the CPU, beside the envs"""
    seed: int = 1
    """of envs, networks and actions"""


class Genuine(PettingZooClass):
    """A genuine env with its state, so that the critic sees what ours sees: of pursuit [16, 16, 3]."""

    def get_env_fun(
        self, num_envs: int, continuous_actions: bool, seed: int | None, device: str
    ) -> Callable[[], EnvBase]:
        arguments = dict(self.config)
        module = importlib.import_module(arguments.pop("module"))
        return lambda: PettingZooWrapper(
            module.parallel_env(**arguments),
            categorical_actions=True,
            device=device,
            seed=seed,
            return_state=True,
        )

    def supports_discrete_actions(self) -> bool:
        return True

    def has_state(self) -> bool:
        return True


class Clock(Callback):
    """Time and CPU time after each update (from one to the next lie rollout, update and logging), and what the
    episodes that ended in its rollout were paid: the mean over agents and episodes, None where none ended."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.cpu_times: list[float] = []
        self.returns: list[float | None] = []

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        (group,) = self.experiment.group_map
        over = batch["next", "done"].squeeze(-1)  # [N, T]
        returns = batch["next", group, "episode_reward"][over]
        self.returns.append(returns.mean().item() if len(returns) else None)

    def on_train_end(self, training_td: object, group: str) -> None:
        self.times.append(time.perf_counter())
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.cpu_times.append(used.ru_utime + used.ru_stime)


def make_task(name: str) -> Task:
    """A genuine env, or one of BenchMARL's own tasks on VMAS."""
    if name in GENUINE:
        return Genuine(name.upper(), GENUINE[name])
    scenario = name.removeprefix("vmas:")
    return VmasTask[scenario.upper()].get_from_yaml()


def train(args: Args) -> dict:
    """-> env-steps per second over all updates but the first, the returns, and what was compared."""
    batch_size = args.num_envs * args.num_steps
    config = ExperimentConfig.get_from_yaml()
    config.sampling_device, config.train_device, config.buffer_device = "cpu", args.device, args.device
    config.parallel_collection, config.share_policy_params = args.task in GENUINE, True
    config.on_policy_n_envs_per_worker = args.num_envs
    config.on_policy_collected_frames_per_batch = batch_size
    config.on_policy_n_minibatch_iters = args.update_epochs
    config.on_policy_minibatch_size = batch_size // args.num_minibatches
    config.max_n_iters, config.max_n_frames = args.updates, None
    config.lr, config.clip_grad_val = 5e-4, args.max_grad_norm
    config.evaluation, config.render, config.loggers, config.create_json = False, False, ["csv"], False
    algorithm = MappoConfig.get_from_yaml()
    algorithm.entropy_coef, algorithm.lmbda = args.entropy_coef, args.gae_lambda
    sizes = [args.hidden_size, args.hidden_size]
    model = MlpConfig(num_cells=sizes, layer_class=torch.nn.Linear, activation_class=torch.nn.ReLU)
    if args.task == "pursuit":
        model.num_feature_dims = 3  # observations [7, 7, 3] and states [16, 16, 3] are flattened
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config.save_folder = folder
        experiment = Experiment(
            task=make_task(args.task),
            algorithm_config=algorithm,
            model_config=model,
            seed=args.seed,
            config=config,
            callbacks=[clock],
        )
        if args.num_threads is not None:
            torch.set_num_threads(args.num_threads)
        experiment.run()
    (group,) = experiment.losses  # all agents are one group
    loss = experiment.losses[group]
    networks = {"actor": loss.actor_network_params, "critic": loss.critic_network_params}
    counts = [f"{name} {sum(p.numel() for p in params.values(True, True)):,}" for name, params in networks.items()]
    versions = [f"{name} {version(name)}" for name in ("benchmarl", "torchrl", "torch", "pettingzoo")]
    status = Path("/proc/self/status")
    peak = 1024.0 * int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists() else float("nan")
    counted = batch_size * (len(clock.times) - 1)
    return {
        "sps": counted / (clock.times[-1] - clock.times[0]),
        "steps_per_cpu_second": counted / (clock.cpu_times[-1] - clock.cpu_times[0]),  # of this process
        "returns": clock.returns,  # of every rollout
        "weights": ", ".join([*counts, *versions]),
        "peak": peak,  # of this process, in bytes
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print(json.dumps(train(tyro.cli(Args))))
