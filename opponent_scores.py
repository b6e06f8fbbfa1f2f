"""What only looks at opponent models: what can be predicted at all, what was predicted, and pictures of both.

pretrain_vae.py hands in samples and predictions as tensors; nothing here knows its networks. `samples` is anything
with rows, seats, actions, policies and past, [M] each: a sample is an agent (seat) still in the game at a step (row),
`past` the number of steps it was seen before. docs/pretrain_vae.md explains the scores.

Shapes: M samples, M' of them in `index`, K policies of the dataset, n actions, Z latent size.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

from dataset import Dataset
from envs.players import script_probs
from opponent_samples import PREPARE_CHUNK, flat_obs_spec
from runs import read_metrics, save_figure, whole_file

TINY = 1e-12
MAX_POINTS = 1500  # latents in a picture
NUM_RECONSTRUCTIONS = 6  # in a picture
TAGS = {"heldout_episodes": "eval", "heldout_policies": "eval_policies"}  # of the parts of the data, in TensorBoard


# ---------------------------------------------------------------- ceilings


class Ceilings(NamedTuple):
    """Action distributions of two perfect predictors, NaN where they cannot be known, and the policy posterior."""

    known: Tensor  # [M', n], knows who plays
    seen: Tensor  # [M', n], knows what the model sees: one observation, or the history
    posterior: Tensor  # [M', K], who plays, given what the model sees


class Heldout(NamedTuple):
    """A part of the data that is never trained on."""

    name: str  # heldout_episodes or heldout_policies
    sequences: ndarray  # [Q']
    index: ndarray  # [M'], the samples of these sequences
    ceilings: Ceilings


def policy_probs(dataset: Dataset, rows: ndarray, seats: ndarray) -> Tensor:
    """What each policy of the dataset would do at each sample. [M', K, n], NaN where that cannot be known"""
    meta = dataset.meta
    policies = meta["policies"]
    num_actions = meta["num_actions"]
    shape = (len(rows), len(policies), num_actions)
    probs = torch.full(shape, torch.nan)
    for start in range(0, len(rows), PREPARE_CHUNK):
        part = slice(start, start + PREPARE_CHUNK)
        where = (rows[part], seats[part])
        obs = torch.from_numpy(dataset.observations[where])  # [B, *O]
        masks = torch.ones(len(obs), num_actions, dtype=torch.bool)
        if dataset.action_masks is not None:
            masks = torch.from_numpy(dataset.action_masks[where])  # [B, n]
        for k, name in enumerate(policies):
            known = script_probs(name, meta["env_id"], meta["env_kwargs"], obs, masks)
            if known is not None:
                probs[part, k] = known
    return probs


def glance(dataset: Dataset, rows: ndarray, seats: ndarray) -> ndarray:
    """What a single observation tells at a glance about who is playing, as one number. [M]

    The time step and, where players hunt, how many players and how much prey of each kind are left and whether the
    agent stands on prey: at step 30 a nearest_hare has long left, and who stands on a stag mostly came for it.
    """
    spec = flat_obs_spec(dataset.meta)
    parts = [dataset.timesteps[rows]]
    if spec.hunts:  # the state then has the channels of the observation
        on_map = dataset.states.sum((1, 2), dtype=np.int64)[rows]  # [M, C]
        parts.append(on_map[:, spec.agent_planes].sum(1))
        for prey, (hunt, _) in spec.hunts.items():
            parts.append(on_map[:, spec.names.index(prey)])
            parts.append(dataset.action_masks[rows, seats, hunt])
    number = np.zeros(len(rows), np.int64)
    for part in parts:
        number = number * (int(part.max()) + 1) + part
    return number


def posterior_of_history(
    samples: Any,
    index: ndarray,
    train_index: ndarray,
    probs: Tensor,
) -> Tensor:
    """Bayes posterior over the policies before each sample of `index`, whole sequences in time order. [M', K]

    probs [M', K, n] of `policy_probs`. The prior is the share of seats that each policy has in the training samples.
    """
    num_policies = probs.shape[1]
    past = samples.past.cpu()  # [M]
    first = train_index[past.numpy()[train_index] == 0]
    policies = samples.policies.cpu().numpy()
    seats = np.bincount(policies[first], minlength=num_policies)  # [K]
    prior = torch.from_numpy(seats / len(first))
    actions = samples.actions.cpu()[index]
    taken = actions[:, None, None].expand(-1, num_policies, 1)  # [M', K, 1]
    likelihood = probs.gather(2, taken)[..., 0]  # [M', K]
    total = likelihood.clamp(min=TINY).log().double().cumsum(0)
    before = F.pad(total, (0, 0, 1, -1))  # [M', K], samples before it, of earlier sequences too
    start = torch.arange(len(index)) - past[index]
    log_posterior = before - before[start] + prior.clamp(min=TINY).log()
    return log_posterior.softmax(1).float()


def posterior_of_glance(
    dataset: Dataset,
    samples: Any,
    index: ndarray,
    train_index: ndarray,
) -> Tensor:
    """The share that each policy has among the training samples with the same glance. [M', K]"""
    num_policies = len(dataset.meta["policies"])
    policies = samples.policies.cpu().numpy()
    rows = samples.rows.cpu().numpy()
    seats = samples.seats.cpu().numpy()
    number = glance(dataset, rows, seats)  # [M]
    values, cell = np.unique(number, return_inverse=True)
    counts = np.zeros((len(values), num_policies))
    np.add.at(counts, (cell[train_index], policies[train_index]), 1)
    share = np.bincount(policies[train_index], minlength=num_policies) / len(train_index)
    counts += share  # one imaginary sample, for glances that training has not seen
    shares = counts / counts.sum(1, keepdims=True)
    return torch.from_numpy(shares)[cell[index]].float()


def compute_ceilings(
    dataset: Dataset,
    samples: Any,
    index: ndarray,
    train_index: ndarray,
    history: bool,
) -> Ceilings:
    """The perfect predictors of the samples `index` [M'], whole sequences in time order.

    For a history the posterior over the dataset's policies is exact, as far as one seat tells. For one observation a
    model may see a little more than a glance, and so beat this one.
    """
    rows = samples.rows.cpu().numpy()[index]
    seats = samples.seats.cpu().numpy()[index]
    probs = policy_probs(dataset, rows, seats)  # [M', K, n]
    seated = samples.policies.cpu()[index]  # [M']
    known = probs[torch.arange(len(index)), seated]
    if history:
        posterior = posterior_of_history(samples, index, train_index, probs)
    else:
        posterior = posterior_of_glance(dataset, samples, index, train_index)
    seen = (probs * posterior[..., None]).sum(1)
    return Ceilings(known, seen, posterior)


# ---------------------------------------------------------------- scores


def top_hits(probs: Tensor, truth: Tensor, k: int) -> Tensor:
    """How often one of the k likeliest actions of probs [M, n] happens. truth: actions [M], or their probs [M, n]"""
    best = probs.topk(min(k, probs.shape[1]), 1).indices  # [M, k]
    if truth.ndim == 1:
        hits = (best == truth[:, None]).any(1).float()
    else:
        hits = truth.gather(1, best).sum(1)
    return torch.where(probs.isnan().any(1), torch.nan, hits)


def action_scores(logits: Tensor, actions: Tensor, ceilings: Ceilings) -> dict[str, Tensor]:
    """Numbers of each sample, [M'] each; logits [M', n], actions [M']

    top1 and top3 count what was done. "expected" and the ceilings are the scripts' own probability of the guess of the
    model and of the perfect predictors: without the luck of the draw, hence better to compare.
    """
    numbers = {
        "top1": top_hits(logits, actions, 1),
        "top3": top_hits(logits, actions, 3),
        "cross_entropy": F.cross_entropy(logits, actions, reduction="none"),
    }
    guesses = {"expected": logits, "ceiling_known": ceilings.known, "ceiling": ceilings.seen}
    for name, probs in guesses.items():
        numbers[f"{name}_top1"] = top_hits(probs, ceilings.known, 1)
        numbers[f"{name}_top3"] = top_hits(probs, ceilings.known, 3)
    return numbers


def probe_scores(probed: Tensor, seated: Tensor, posterior: Tensor) -> dict[str, Tensor]:
    """The linear probe and the Bayes classifier, counted and expected, [M'] each.

    probed: the policies [M'] that the probe takes the agents for, -1 for no guess; seated: who they are [M'].
    """
    at_random = 1 / posterior.shape[1]  # where there was nothing to fit the probe on
    no_guess = probed < 0
    guess = probed.clamp(min=0)[:, None]  # [M', 1]
    expected = posterior.gather(1, guess)[:, 0]
    return {
        "probe": torch.where(no_guess, at_random, (probed == seated).float()),
        "expected_probe": torch.where(no_guess, at_random, expected),
        "bayes": top_hits(posterior, seated, 1),
        "expected_bayes": posterior.amax(1),
    }


def score(
    split: str,
    logits: Tensor,
    samples: Any,
    index: ndarray,
    ceilings: Ceilings,
    policies: list[str],
    probed: Tensor | None = None,
) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows of moa_eval_epoch*.csv: all samples, and by policy, action, and history length; and the confusion [n, n].

    probed [M']: see `probe_scores`; None leaves its columns out.
    """
    logits = logits.cpu()
    actions = samples.actions.cpu()[index]
    seated = samples.policies.cpu()[index]
    past = samples.past.cpu()[index]
    num_actions = logits.shape[1]
    numbers = action_scores(logits, actions, ceilings)
    if probed is not None:
        numbers |= probe_scores(probed, seated, ceilings.posterior)
    pairs = actions * num_actions + logits.argmax(1)
    confusion = torch.bincount(pairs, minlength=num_actions**2).view(num_actions, -1)

    everything = torch.ones_like(actions, dtype=torch.bool)
    longest = int(past.max())
    groups = [("all", "all", everything)]
    groups += [("policy", name, seated == k) for k, name in enumerate(policies)]
    groups += [("action", str(a), actions == a) for a in range(num_actions)]
    groups += [("history", str(t), past == t) for t in range(longest + 1)]
    perfect = top_hits(ceilings.seen, actions, 1)
    rows = []
    for kind, name, mine in groups:
        if not mine.any():
            continue
        row = {
            "split": split,
            "kind": kind,
            "name": name,
            "samples": int(mine.sum()),
        }
        for key, values in numbers.items():
            row[key] = values[mine].mean().item()
        if kind == "action":
            row |= action_columns(confusion, int(name))
            row["ceiling_recall"] = perfect[mine].mean().item()
        rows.append(row)
    return rows, confusion


def action_columns(confusion: Tensor, action: int) -> dict[str, float]:
    """Precision, recall and F1 of one action that was done at least once; confusion [n, n]"""
    hits = confusion[action, action].item()
    guessed = confusion[:, action].sum().item()
    done = confusion[action].sum().item()
    return {
        "precision": hits / max(guessed, 1),
        "recall": hits / done,
        "f1": 2 * hits / (guessed + done),
    }


def evaluate(
    samples: Any,
    parts: list[Heldout],
    predictions: list[tuple[Tensor, Tensor]],
    policies: list[str],
    run_dir: Path,
    epoch: int,
) -> dict[str, float]:
    """Scores of the held-out parts, to be logged; all of them go to moa_eval_epoch*.csv and *.npz of the run folder.

    predictions: logits [M', n] and z [M', Z] of each part.
    """
    table, arrays, logged = [], {}, {}
    for part, (logits, z) in zip(parts, predictions, strict=True):
        rows, confusion = score(part.name, logits, samples, part.index, part.ceilings, policies)
        table += rows
        for key, values in score_arrays(logits, z, confusion, samples, part.index).items():
            arrays[f"{part.name}_{key}"] = values
        prefix = TAGS[part.name]
        overall = rows[0]
        for key, value in overall.items():
            if isinstance(value, float):
                logged[f"{prefix}/{key}"] = value
        print(
            f"[MOA] epoch {epoch}: top1={overall['top1']:.4f}, top3={overall['top3']:.4f}, "
            f"cross-entropy={overall['cross_entropy']:.4f} on {part.name}; "
            f"expected {overall['expected_top1']:.4f} and {overall['expected_top3']:.4f} "
            f"of {overall['ceiling_top1']:.4f} and {overall['ceiling_top3']:.4f}"
        )
    write_csv(run_dir / f"moa_eval_epoch{epoch}.csv", table)
    with whole_file(run_dir / f"moa_eval_epoch{epoch}.npz") as temporary:
        np.savez(temporary, **arrays)
    return logged


def score_arrays(
    logits: Tensor,
    z: Tensor,
    confusion: Tensor,
    samples: Any,
    index: ndarray,
) -> dict[str, ndarray]:
    """What moa_eval_epoch*.npz keeps of a part of the data."""
    kept = {
        "logits": logits,
        "z": z,
        "confusion": confusion,
        "actions": samples.actions[index],
        "policy_ids": samples.policies[index],
        "history": samples.past[index],
    }
    return {name: values.cpu().numpy() for name, values in kept.items()}


def linear_probe(
    z: ndarray,
    past: ndarray,
    train_z: ndarray,
    train_policies: ndarray,
    train_past: ndarray,
) -> ndarray:
    """The policy that a linear probe reads off z [M', Z]. [M']; one probe for each history length `past`

    It is fitted on latents, policies and history lengths of training samples; -1 where there are none.
    """
    from sklearn.linear_model import LogisticRegression

    guess = np.full(len(z), -1)
    for length in np.unique(past):
        mine = past == length
        seen = train_past == length
        labels = np.unique(train_policies[seen])
        if len(labels) == 1:  # only one policy lasts so long
            guess[mine] = labels[0]
        elif len(labels):
            fitted = LogisticRegression(max_iter=300).fit(train_z[seen], train_policies[seen])
            guess[mine] = fitted.predict(z[mine])
    return guess


def report(
    run_dir: Path,
    samples: Any,
    policies: list[str],
    heldout: Heldout,
    logits: Tensor,
    z: Tensor,
    train_index: ndarray,
    train_z: Tensor,
) -> None:
    """Probe and pictures of a trained model, into its run folder; prints what the probe found.

    logits [M', n] and z [M', Z] of the held-out samples; train_z: those of the training samples that the probe is
    fitted on.
    """
    latents = z.cpu().numpy()
    seated = samples.policies.cpu().numpy()  # [M]
    past = samples.past.cpu().numpy()
    index = heldout.index
    plot_curves(read_metrics(run_dir), run_dir / "learning_curve.png")
    plot_latents(latents, seated[index], policies, run_dir / "latents.png")
    guess = linear_probe(
        latents,
        past[index],
        train_z.cpu().numpy(),
        seated[train_index],
        past[train_index],
    )
    probed = torch.from_numpy(guess)
    rows, confusion = score(heldout.name, logits, samples, index, heldout.ceilings, policies, probed)
    plot_confusion(confusion, run_dir / "confusion.png")
    table = [row for row in rows if row["kind"] in ("all", "history")]
    write_csv(run_dir / "probe.csv", table)
    overall, *by_length = table
    plot_probe(by_length, run_dir / "probe.png")
    worst = min(by_length, key=lambda row: row["expected_probe"] / row["expected_bayes"])
    for row in (overall, worst):
        print(
            f"[probe] z -> policy, history {row['name']}: {row['probe']:.4f}, Bayes {row['bayes']:.4f}; "
            f"expected {row['expected_probe']:.4f} of {row['expected_bayes']:.4f}"
        )


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line for each row; a row need not have every column."""
    columns = {key: None for row in rows for key in row}
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(columns))
        table.writeheader()
        table.writerows(rows)


# ---------------------------------------------------------------- pictures


@contextlib.contextmanager
def picture(
    path: Path,
    rows: int,
    columns: int,
    width: float,
    height: float,
) -> Iterator[ndarray]:
    """Gives axes [rows, columns] to draw on; writes the file at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (width, height)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    yield axes
    save_figure(figure, path, dpi=110)


def plot_curves(metrics: list[dict[str, str]], path: Path) -> None:
    """Losses, training and held-out, on a log scale; top-1 and top-3 with their ceilings. metrics: of metrics.csv"""
    epochs = [int(row["epoch"]) for row in metrics]
    names = [name for name in metrics[0] if name.startswith("losses/")]

    def column(name: str) -> ndarray:
        return np.array([float(row[name]) for row in metrics])

    with picture(path, 1, 2, 11, 4) as axes:
        losses, scores = axes[0]
        for i, name in enumerate(names):
            colour = f"C{i}"
            trained = column(name).clip(min=1e-6)
            heldout = column(f"heldout_{name}").clip(min=1e-6)
            losses.plot(epochs, trained, color=colour, label=name.removeprefix("losses/"))
            losses.plot(epochs, heldout, "--", color=colour)
        losses.set(yscale="log", xlabel="epoch", ylabel="loss", title="losses (dashed: held-out episodes)")
        for i, top in enumerate(("top1", "top3")):
            colour = f"C{i}"
            reached = column(f"eval/{top}")
            ceiling = column(f"eval/ceiling_{top}")
            scores.plot(epochs, reached, color=colour, label=top)
            scores.plot(epochs, ceiling, "--", color=colour, label=f"ceiling {top}")
        scores.set(xlabel="epoch", ylabel="accuracy", title="held-out episodes")
        for axis in axes.flat:
            below = (0.5, -0.15)
            axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=below)
            axis.grid(alpha=0.3)


def plot_confusion(confusion: Tensor, path: Path) -> None:
    """Rows: what was done, in shares of the row; columns: what was predicted."""
    totals = confusion.sum(1, keepdim=True).clamp(min=1)
    shares = (confusion / totals).numpy()
    colours = np.where(shares > 0.5, "white", "black")
    ticks = range(len(shares))
    with picture(path, 1, 1, 5.5, 5) as axes:
        axis = axes[0, 0]
        axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        for (i, j), share in np.ndenumerate(shares):
            colour = colours[i, j]
            axis.text(j, i, f"{share:.2f}", ha="center", va="center", color=colour)
        axis.set(xlabel="predicted action", ylabel="action", title="held-out episodes, shares of each row")
        axis.set(xticks=ticks, yticks=ticks)


def plot_latents(
    z: ndarray,
    policies: ndarray,
    names: list[str],
    path: Path,
) -> None:
    """PCA and t-SNE of some latents [M, Z], coloured by behaviour policy."""
    from sklearn.manifold import TSNE

    pick = np.random.default_rng(0).permutation(len(z))[:MAX_POINTS]
    policies = policies[pick]
    z = z[pick] - z[pick].mean(0)
    maps = {"PCA": np.repeat(z, 2, 1)}  # a single number, against itself
    if z.shape[1] > 1:
        directions = np.linalg.svd(z, full_matrices=False)[2]  # [Z, Z]
        maps["PCA"] = z @ directions[:2].T
    if len(z) > 50:
        maps["t-SNE"] = TSNE(perplexity=30, random_state=0, init="random").fit_transform(z)
    with picture(path, 1, len(maps), 5.5 * len(maps), 5) as axes:
        for axis, title in zip(axes.flat, maps, strict=True):
            for k, name in enumerate(names):
                points = maps[title][policies == k]  # [m, 2]
                x, y = points.T
                axis.scatter(x, y, s=5, label=Path(name).name)
            axis.set(title=f"{title} of z")
            axis.legend(fontsize=7)


def plot_probe(rows: list[dict[str, Any]], path: Path) -> None:
    """Linear probe and Bayes classifier over the history length; lines: expected, dots: counted."""
    lengths = [int(row["name"]) for row in rows]
    labels = {"bayes": "Bayes classifier", "probe": "linear probe of z"}
    with picture(path, 1, 1, 6.5, 4) as axes:
        axis = axes[0, 0]
        for i, (name, label) in enumerate(labels.items()):
            expected = [row[f"expected_{name}"] for row in rows]
            counted = [row[name] for row in rows]
            axis.plot(lengths, expected, color=f"C{i}", label=label)
            axis.plot(lengths, counted, ".", color=f"C{i}", label=f"{label}, counted")
        axis.set(xlabel="steps of the agent seen before", ylabel="accuracy", title="which policy? (held-out)")
        axis.grid(alpha=0.3)
        axis.legend()


@torch.no_grad()
def draw_reconstructions(
    dataset: Dataset,
    samples: Any,
    index: ndarray,
    ahead: int,
    z: Tensor,
    decoder: Callable[[Tensor], Tensor],
    kind: str,
    path: Path,
) -> None:
    """A few observations, as networks are fed with them, beside what the decoder makes of z.

    index [M'] of samples whose z [M', Z] decode to what they see `ahead` steps later; kind: bce where logits come out.
    """
    spec = samples.spec
    every = max(1, len(index) // NUM_RECONSTRUCTIONS)
    pick = slice(0, every * NUM_RECONSTRUCTIONS, every)
    at = torch.from_numpy(index[pick])
    at = torch.minimum(at + ahead, samples.last.cpu()[at])
    rows = samples.rows.cpu()[at].numpy()
    if spec["input"] == "obs":
        seats = samples.seats.cpu()[at].numpy()
        truth = dataset.observations[rows, seats]
    else:
        truth = dataset.states[rows]
    if not spec["max_cells"]:
        truth = truth * spec["scale"]
    decoded = decoder(z[pick])
    if kind == "bce":
        decoded = decoded.sigmoid()
    plot_reconstructions(truth, decoded.view(truth.shape).cpu().numpy(), path)


def plot_reconstructions(truth: ndarray, recon: ndarray, path: Path) -> None:
    """Pairs of observations [n, *O]: maps as one picture, a colour for each plane; others as lines."""
    from matplotlib import colormaps

    channels = np.arange(truth.shape[-1])
    colours = colormaps["tab10"](channels % 10)  # [C, 4]
    ink = 1 - colours[:, :3]  # what each plane takes from white
    titles = ("true", "decoded")
    with picture(path, 2, len(truth), 1.8 * len(truth), 3.8) as axes:
        for row, images in enumerate((truth, recon)):
            for column, image in enumerate(images):
                axis = axes[row, column]
                if image.ndim == 3:
                    drawn = 1 - image.clip(0, 1) @ ink  # [H, W, 3]
                    axis.imshow(drawn.clip(0, 1))
                else:
                    axis.plot(image.ravel(), linewidth=0.5)
                axis.set(xticks=[], yticks=[], title=titles[row])
