"""Samples per second of pretrain_vae.py against the usual DataLoader loop over the same model, in one run.

    python benchmark/pretrain_speed.py --data data/DATASET

The usual loop: a Dataset whose __getitem__ returns one sample as float tensors, a shuffling DataLoader, losses logged
with .item(). Both loops train the same VAE (loss moa) with the same batch size, optimizer and threads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pretrain_vae
import runs
from dataset import Dataset, load_dataset
from opponent_samples import Samples, Spec, describe_input, network_input
from pretrain_vae import SIZES, VAE, Extras, Gaussian, compute_losses, gaussian_kl


@dataclass
class Args:
    data: str
    """dataset folder made by collect_data.py"""
    batch_size: int = 1024
    """samples per minibatch, in both loops"""
    rounds: int = 5
    """how often the loops take turns: other programs on the machine then slow all of them alike"""
    seconds: float = 3.0
    """how long each turn is timed, at least; after a warm-up of 10 minibatches, which may have been prefetched"""
    workers: tuple[int, ...] = (0, 2)
    """num_workers of the DataLoader, one run each"""


LIMITS = {
    "at least 1": (lambda x: x >= 1, "batch_size rounds"),
    "above 0": (lambda x: x > 0, "seconds"),
}


class Rows(torch.utils.data.Dataset):
    """One sample at a time, as tensors."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.rows, self.seats = np.nonzero(dataset.active)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row, seat = self.rows[i], self.seats[i]
        return {
            "obs": torch.tensor(self.dataset.observations[row, seat], dtype=torch.float32),
            "actions": torch.tensor(self.dataset.actions[row, seat]),
            "timesteps": torch.tensor(self.dataset.timesteps[row]),
            "masks": torch.tensor(self.dataset.action_masks[row, seat]),
            "seats": torch.tensor(seat),
        }


def usual_losses(model: VAE, batch: dict[str, torch.Tensor], kl_coef: float) -> dict[str, torch.Tensor]:
    """The same losses, written down for a batch of tensors."""
    x = network_input(model.spec, batch["obs"], batch["seats"])
    features, seen = model.look(x)
    q = Gaussian(**model.posterior(features, None))
    z = q.mu + torch.randn_like(q.mu) * (0.5 * q.logvar).exp()
    kl = gaussian_kl(q, 0.0)
    logits = model.action_logits(seen, batch["timesteps"], z, batch["masks"])
    moa = F.cross_entropy(logits, batch["actions"])
    return {"loss": moa + kl_coef * kl, "moa_loss": moa, "kl_loss": kl}


class Trained:
    """A new model and its optimizer."""

    def __init__(self, args: pretrain_vae.Args, spec: Spec, device: torch.device):
        self.args, self.device = args, device
        config = {name: getattr(args, name) for name in SIZES} | {"spec": spec}
        self.model = VAE(config).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.learning_rate, fused=True)

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def train_usual(
    trained: Trained,
    dataset: Dataset,
    batch_size: int,
    workers: int,
) -> Iterator[int]:
    """The usual loop; gives the size of each minibatch once that is trained on."""
    rows = Rows(dataset)
    loader = torch.utils.data.DataLoader(rows, batch_size, shuffle=True, num_workers=workers)
    while True:
        for batch in loader:
            batch = {name: x.to(trained.device) for name, x in batch.items()}
            losses = usual_losses(trained.model, batch, trained.args.kl_coef)
            trained.step(losses["loss"])
            for loss in losses.values():
                loss.item()  # as logged every step
            yield len(batch["actions"])


def train_ours(
    trained: Trained,
    dataset: Dataset,
    batch_size: int,
) -> Iterator[int]:
    """The loop of pretrain_vae.py, likewise."""
    args = trained.args
    samples = Samples(dataset, trained.model.spec, trained.device, args.memory_limit_mb)
    everything = np.arange(len(samples.first))
    rng = np.random.default_rng(0)
    extras = Extras("bce", kl_coef=args.kl_coef)
    while True:
        for batch in samples.single(everything, batch_size, rng):
            losses, _ = compute_losses(trained.model, None, samples, batch, args, extras)
            trained.step(losses["loss"])
            yield len(batch.index)


def samples_per_second(loop: Iterator[int], seconds: float) -> float:
    """Trains for some time."""
    for _ in range(10):
        next(loop)
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < seconds:
        count += next(loop)
    return count / (time.perf_counter() - start)


def main(args: Args) -> None:
    dataset = load_dataset(args.data)
    device = runs.get_device(True)
    spec = describe_input(dataset, "obs")
    train_args = pretrain_vae.Args(data=args.data)
    torch.set_num_threads(train_args.num_threads)

    def new() -> Trained:
        return Trained(train_args, spec, device)

    loops = {"pretrain_vae.py": train_ours(new(), dataset, args.batch_size)}
    for workers in args.workers:
        name = f"DataLoader, {workers} workers"
        loops[name] = train_usual(new(), dataset, args.batch_size, workers)
    num_samples = dataset.active.sum()
    print(f"{device}, {torch.get_num_threads()} threads, {num_samples} samples, batches of {args.batch_size}")
    speeds = {name: [] for name in loops}
    for _ in range(args.rounds):
        for name, loop in loops.items():
            speeds[name].append(samples_per_second(loop, args.seconds))
    ours = np.array(speeds["pretrain_vae.py"])  # [rounds]
    for name, speed in speeds.items():
        ratio = np.median(ours / speed)
        print(f"{name}: {np.median(speed):.0f} samples/s; pretrain_vae.py is {ratio:.1f} x as fast")


def cli(argv: list[str] | None = None) -> int:
    return runs.command_line(Args, main, LIMITS, argv)


if __name__ == "__main__":
    sys.exit(cli())
