"""Samples per second of pretrain_vae.py against the usual DataLoader loop over the same model, in one run.

    python benchmark/pretrain_speed.py --data data/DATASET

The usual loop: a Dataset whose __getitem__ returns one sample as float tensors, a shuffling DataLoader, losses logged
with .item(). Both loops train the same VAE (loss moa) with the same batch size, optimizer and threads.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pretrain_vae
from dataset import Dataset, load_dataset
from pretrain_vae import VAE, Samples, compute_losses, describe_input, gaussian_kl, network_input


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


def usual_loss(model: VAE, batch: dict[str, torch.Tensor], kl_coef: float) -> tuple[torch.Tensor, ...]:
    features, seen = model.look(network_input(model.spec, batch["obs"], batch["seats"]))
    mu, logvar = model.posterior(features, None)
    z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
    kl = gaussian_kl((mu, logvar), 0.0)
    moa = F.cross_entropy(model.action_logits(seen, batch["timesteps"], z, batch["masks"]), batch["actions"])
    return moa + kl_coef * kl, moa, kl


def samples_per_second(steps, seconds: float) -> float:
    """`steps` yields the number of samples of each minibatch once that is trained on."""
    for _ in range(10):
        next(steps)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += next(steps)
    return count / (time.perf_counter() - start)


def main(args: Args) -> None:
    dataset = load_dataset(args.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = describe_input(dataset, "obs")
    train_args = pretrain_vae.Args(data=args.data)
    torch.set_num_threads(train_args.num_threads)
    sizes = ("model", "loss", "policy_input", "latent_size", "hidden_size", "history_size", "codebook_size")
    config = {name: getattr(train_args, name) for name in sizes} | {"spec": spec}
    extras = {"symmetries": None, "class_weights": None, "goal_steps": None, "recon_kind": "bce"}
    extras["kl_coef"] = train_args.kl_coef

    def new_model() -> tuple[VAE, torch.optim.Optimizer]:
        model = VAE(config).to(device)
        return model, torch.optim.AdamW(model.parameters(), lr=train_args.learning_rate, fused=True)

    def usual(workers: int):
        model, optimizer = new_model()
        rows = Rows(dataset)
        loader = torch.utils.data.DataLoader(rows, args.batch_size, shuffle=True, num_workers=workers)
        while True:
            for batch in loader:
                batch = {name: x.to(device) for name, x in batch.items()}
                losses = usual_loss(model, batch, train_args.kl_coef)
                optimizer.zero_grad()
                losses[0].backward()
                optimizer.step()
                [loss.item() for loss in losses]  # as logged every step
                yield len(batch["actions"])

    def ours():
        model, optimizer = new_model()
        samples = Samples(dataset, spec, device, train_args.memory_limit_mb)
        rng = np.random.default_rng(0)
        while True:
            for batch in samples.single(np.arange(len(samples.first)), args.batch_size, rng):
                losses, _ = compute_losses(model, None, samples, batch, train_args, extras)
                optimizer.zero_grad()
                losses["loss"].backward()
                optimizer.step()
                yield len(batch.index)

    print(f"{device}, {torch.get_num_threads()} threads, {dataset.active.sum()} samples, batches of {args.batch_size}")
    loops = {"pretrain_vae.py": ours()} | {f"DataLoader, {n} workers": usual(n) for n in args.workers}
    speeds = np.array([[samples_per_second(loop, args.seconds) for loop in loops.values()] for _ in range(args.rounds)])
    for name, speed in zip(loops, speeds.T, strict=True):  # [rounds]
        ratio = np.median(speeds[:, 0] / speed)
        print(f"{name}: {np.median(speed):.0f} samples/s; pretrain_vae.py is {ratio:.1f} x as fast")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
