"""Judges a world model on held-out data: obs MSE, PSNR, exact match, rewards, exits, physics, drift, floors.

    python test_obs_reward_model.py --checkpoint runs/<name> --data data/<name>
    python test_obs_reward_model.py --model package.module:factory --data data/<name>

The second form judges any other model: `factory(meta, device)` gets the dataset's meta and returns an object with
`step(obs, joint_action) -> next_obs, reward, done`, shapes as in world_model.WorldModel.step (agent i's view, joint
action ego first, -1 for agents that left). If it also has `predict` with "expected_obs", MSE and PSNR use that.

PSNR = 10 log10(range^2 / MSE), from the pooled MSE. How to read the printout: docs/world_model.md
"""

from __future__ import annotations

import startup  # noqa: F401

# isort: split

import csv
import difflib
import importlib
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import LARGE, SPLITS, Dataset, check_checksums, load_dataset, rotate_to_ego, same_data
from envs import EnvStep, ObsSpec, VecEnv, check_env, describe_obs, make_vec_env
from runs import (
    UsageError,
    best_or_latest,
    command_line,
    get_device,
    load_checkpoint,
    save_figure,
    whole_file,
    write_json,
)
from world_model import CHECKPOINT_FORMAT, Pairs, Samples, WorldModel, load_world_model

HORIZONS = (1, 2, 5, 10, 20, 35)
REWARD_TOLERANCE = 0.02  # a reward counts as right within this
REAL_TOLERANCE = 1e-3  # a real number nearer than this counts as met
MAX_PSNR = 100.0  # dB, what an error of exactly zero is given

Batch = dict[str, Tensor]  # fields of B samples, each [B, ...]
Numbers = dict[str, float]  # what is reported, by its name in the JSON


@dataclass
class Args:
    data: str = ""
    """dataset folder made by collect_data.py"""
    checkpoint: str | None = None
    """run folder (its best.pt) or .pt file of world_model.py; None: `--model` is judged"""
    model: str | None = None
    """package.module:factory of another model; None: `--checkpoint` is judged"""
    split: Literal["auto", "all", "heldout_episodes", "heldout_policies"] = "auto"
    """which episodes: auto takes what the checkpoint's training held out, or all of a dataset it was not trained on"""
    max_samples: int = 50_000
    """samples (one agent's view of one step) that are drawn for the one-step scores; 0: all"""
    drift_episodes: int = 500
    """episodes that are imagined open loop, from every seat; 0: all"""
    resimulate: int = 64
    """envs that can be put into any full state (pursuit): how often each transition is simulated again; 0: no oracle"""
    num_pictures: int = 8
    """triplets in triplets.png"""
    out: str | None = None
    """folder for the pictures; None: `judge` in the checkpoint's folder, none for `--model`"""
    json: str | None = None
    """file that receives all numbers as JSON; None: not written"""
    csv: str | None = None
    """file that receives all numbers as CSV (split, metric, value); None: not written"""
    fail_under: tuple[str, ...] = ()
    """e.g. exact_match=0.999: exit code 1 if that number of the JSON is below this in any judged split"""
    seed: int = 1
    """seed of the drawn samples and of the re-simulation"""
    cuda: bool = True
    """if set, a GPU is used where there is one"""


# What numbers must be.
LIMITS = {
    "at least 0": (lambda x: x >= 0, "max_samples drift_episodes resimulate"),
    "at least 1": (lambda x: x >= 1, "num_pictures"),
    "from 0 to 2147483647": (lambda x: 0 <= x < 2**31, "seed"),
}


# ---------------------------------------------------------------- floors
class CopyLast:
    """Nothing ever changes, pays or ends."""

    def step(self, obs: Tensor, joint_action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rewards = torch.zeros(len(obs), device=obs.device)
        return obs, rewards, rewards.bool()


class AllZero(CopyLast):
    """The empty observation."""

    def step(self, obs: Tensor, joint_action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().step(torch.zeros_like(obs), joint_action)


# ---------------------------------------------------------------- metrics
def to_planes(obs: Tensor) -> Tensor:
    """[B, H, W, P] or [B, P] -> [B, P, H, W] float32 (a vector is a 1 x 1 grid)."""
    if obs.dim() == 4:
        return obs.float().permute(0, 3, 1, 2)
    return obs.float()[:, :, None, None]


def psnr(mse: Tensor, value_range: float) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most 100."""
    ratio = value_range**2 / mse.clamp(min=1e-30)
    return (10 * torch.log10(ratio)).clamp(max=MAX_PSNR)


def physics_violations(before: Tensor, joint_action: Tensor, after: Tensor, spec: ObsSpec) -> Batch:
    """What no rule allows, per prediction [B] bool: an entity jumps more than one cell, appears, vanishes without a
    successful hunt, or is doubled. before, after [B, P, H, W] of 0/1, joint_action [B, A], both ego first."""
    A = len(spec.agent_planes)
    agents = before[:, :A].flatten(2)  # [B, A, H * W]
    new_agents = after[:, :A].flatten(2)
    was = agents.sum(2) > 0  # [B, A]
    now = new_agents.sum(2)  # [B, A]
    here, there = agents.argmax(2), new_agents.argmax(2)
    distance = grid_distance(here, there, width=before.shape[3])
    came = ~was & (now > 0)
    went = was & (now == 0)
    appear = came.any(1)
    vanish = torch.zeros_like(appear)
    may_leave = torch.zeros_like(was)
    for p in range(A, len(spec.names)):
        things = before[:, p].flatten(1) > 0  # [B, H * W]
        new_things = after[:, p].flatten(1) > 0
        taken = torch.zeros_like(things)
        if spec.names[p] in spec.hunts:
            action, needed = spec.hunts[spec.names[p]]
            hunts = joint_action == action  # [B, A]
            hunters = agents * hunts[:, :, None]
            hunters = hunters.sum(1)  # [B, H * W]
            taken = things & (hunters >= needed)
            on_taken = agents * taken[:, None]
            may_leave |= hunts & on_taken.sum(2).bool()
        appear |= (new_things & ~things).any(1)
        vanish |= (things & ~new_things & ~taken).any(1)
    vanish |= (went & ~may_leave).any(1)
    stayed = was & (now == 1)
    jump = (stayed & (distance > 1)).any(1)
    double = (now > 1).any(1)
    double |= (after > 1).flatten(1).any(1)
    return {
        "jump": jump,
        "appear": appear,
        "vanish": vanish,
        "double": double,
        "any": jump | appear | vanish | double,
    }


def grid_distance(here: Tensor, there: Tensor, width: int) -> Tensor:
    """Steps between two cells, numbered row after row."""
    rows = here // width - there // width
    columns = here % width - there % width
    return rows.abs() + columns.abs()


@torch.no_grad()
def predict_all(model: Any, obs: Tensor, actions: Tensor) -> Batch:
    """Predictions of V samples in batches: pred_obs and expected_obs [V, *O], pred_rewards [V], pred_dones [V].

    UsageError: the model returns other shapes, or what is no number.
    """
    parts = []
    for start in range(0, len(obs), 512):
        batch = slice(start, start + 512)
        parts.append(predict_batch(model, obs[batch], actions[batch]))
    pred = {}
    for name in parts[0]:
        pred[name] = torch.cat([part[name] for part in parts])
    shapes = list(pred["pred_obs"].shape), list(pred["pred_rewards"].shape)
    if shapes != (list(obs.shape), [len(obs)]):
        raise UsageError(
            f"step expected to return next_obs {list(obs.shape)} and reward [{len(obs)}], got {shapes[0]} and "
            f"{shapes[1]}: see the top of this file"
        )
    for name in ("expected_obs", "pred_rewards"):
        if not pred[name].isfinite().all():
            raise UsageError("the model predicted NaN or infinity: it is broken, train it again")
    return pred


def predict_batch(model: Any, obs: Tensor, actions: Tensor) -> Batch:
    """As predict_all, of one batch. A model without `predict` expects what it predicts."""
    if hasattr(model, "predict"):
        out = model.predict(obs, actions)
        next_obs, reward, done = out["next_obs"], out["reward"], out["done"]
        expected_obs = out["expected_obs"]
    else:
        next_obs, reward, done = model.step(obs, actions)
        expected_obs = next_obs.float()
    return {
        "pred_obs": next_obs,
        "expected_obs": expected_obs,
        "pred_rewards": reward,
        "pred_dones": done,
    }


def score(
    batch: Batch,
    pred: Batch,
    spec: ObsSpec,
    value_range: float,
    physics: bool,
) -> Numbers:
    """All one-step numbers. Observations count where the agent stays (`dones` False), rewards and exits everywhere."""
    stays = ~batch["dones"]
    target = to_planes(batch["next_obs"][stays])  # [B, P, H, W]
    expected = to_planes(pred["expected_obs"][stays])
    snapped = to_planes(pred["pred_obs"][stays])
    error = (expected - target).square()
    per_sample = error.mean((1, 2, 3))  # [B]
    same = snapped == target
    if "real" in spec.kinds:
        same = (snapped - target).abs() < REAL_TOLERANCE
    right = same.flatten(2).all(2)  # [B, P]
    all_right = right.all(1)  # [B]
    obs_mse = per_sample.mean()
    sample_psnr = psnr(per_sample, value_range)
    result = {
        "obs_mse": obs_mse,
        "psnr": psnr(obs_mse, value_range),
        "psnr_mean_over_samples": sample_psnr.mean(),
    }
    for p, name in enumerate(spec.names):
        result[f"channel_mse/{name}"] = error[:, p].mean()
    result["exact_match"] = all_right.float().mean()
    for p, name in enumerate(spec.names):
        result[f"exact_match/{name}"] = right[:, p].float().mean()
    result |= score_rewards_and_exits(batch, pred)
    if physics:
        before = to_planes(batch["obs"][stays])
        broken = physics_violations(before, batch["actions"][stays], snapped, spec)
        result["physics_ok"] = 1 - broken.pop("any").float().mean()
        for name, x in broken.items():
            result[f"physics/{name}"] = x.float().mean()
    for group, kind in (("seat", "seats"), ("policy", "policies")):
        for k in batch[kind].unique().tolist():
            mine = batch[kind][stays] == k
            result[f"{group} {k}/exact_match"] = all_right[mine].float().mean()
            result[f"{group} {k}/obs_mse"] = per_sample[mine].mean()
    return {name: float(x) for name, x in result.items()}


def score_rewards_and_exits(batch: Batch, pred: Batch) -> Batch:
    """Rewards over all samples and by whether anything was paid, exits as precision and recall."""
    error = pred["pred_rewards"] - batch["rewards"]
    right = (error.abs() <= REWARD_TOLERANCE).float()
    zero = batch["rewards"] == 0
    result = {"reward_mse": error.square().mean(), "reward_accuracy": right.mean()}
    for name, where in (("zero", zero), ("nonzero", ~zero)):
        result[f"reward_accuracy/{name}"] = right[where].mean()
        result[f"reward_mse/{name}"] = error[where].square().mean()
    hits = (pred["pred_dones"] & batch["dones"]).sum()
    result["exit_precision"] = hits / pred["pred_dones"].sum()
    result["exit_recall"] = hits / batch["dones"].sum()
    return result


class DriftStep(NamedTuple):
    """How imagined rollouts stand after a number of steps."""

    exact_match: float
    obs_mse: float
    num_left: float  # rollouts whose agent is still there


@torch.no_grad()
def open_loop(model: Any, samples: Samples, starts: Tensor, real: bool) -> dict[str, Any]:
    """Imagines episodes from their first rows [E], from every seat, with the true actions until the agent's exit.

    Returns drift (a DriftStep per step) and the share of rollouts that are right at every step, without and with
    rewards (to 0.02) and exits. real: observations are real numbers, not counts.
    """
    A = samples.active.shape[1]
    rows = starts.repeat_interleave(A)
    seats = torch.arange(A, device=starts.device).repeat(len(starts))
    begins = samples.active[rows, seats]
    rows, seats = rows[begins], seats[begins]  # [R]
    obs = samples.obs[rows, seats]
    alive = torch.ones_like(rows, dtype=torch.bool)
    obs_right, all_right = alive.clone(), alive.clone()
    drift = []
    while alive.any():
        obs, rewards, dones = model.step(obs, samples.joint_action(rows, seats))
        target = samples.next_obs[rows, seats]
        true_dones = samples.terminations[rows, seats]
        error = (obs.float() - target.float()).flatten(1)  # [R, ...]
        same = error.abs().amax(1) < (REAL_TOLERANCE if real else 0.5)
        stays = alive & ~true_dones
        obs_right &= same | ~stays
        reward_error = rewards - samples.rewards[rows, seats]
        right = (same | true_dones) & (dones == true_dones)
        right &= reward_error.abs() <= REWARD_TOLERANCE
        all_right &= right | ~alive
        if stays.any():
            exact_match = same[stays].float().mean()
            obs_mse = error[stays].square().mean()
            numbers = (exact_match, obs_mse, stays.sum())
            drift.append(DriftStep(*map(float, numbers)))
        rows, goes_on = samples.after(rows, seats)
        alive = alive & goes_on
    return {
        "drift": drift,
        "whole_episode": float(obs_right.float().mean()),
        "whole_episode_with_rewards_and_exits": float(all_right.float().mean()),
    }


# ---------------------------------------------------------------- what could be known at all
VIEW_CHANNELS = ("walls", "pursuers", "evaders")
# The five actions as (y, x) steps of the view's axes
VIEW_MOVES = (
    (0, -1),
    (0, 1),
    (1, 0),
    (-1, 0),
    (0, 0),
)


def shift(x: Tensor, dy: int, dx: int, fill: float = 0.0) -> Tensor:
    """Moves the content of [B, H, W] by one cell at most; what comes in is `fill`."""
    H, W = x.shape[1:]
    padded = F.pad(x, (1, 1, 1, 1), value=fill)
    y, x = 1 - dy, 1 - dx
    return padded[:, y : y + H, x : x + W]


class ViewOracle:
    """Pursuit's rules written out for one agent's view: the best guess without the history, but for captures and for
    what enters from outside. Which visible team mate does which of the others' actions can not be known."""

    def predict(self, obs: Tensor, joint_action: Tensor) -> Batch:
        wall, team, evaders = obs.float().unbind(-1)  # [B, R, R] each
        centre = obs.shape[1] // 2
        own = torch.zeros_like(team)
        own[:, centre, centre] = 1.0
        acts = F.one_hot(joint_action, len(VIEW_MOVES)).float()  # [B, A, 5]
        anything = torch.full_like(acts[:, 0], 1 / len(VIEW_MOVES))
        others = acts[:, 1:].mean(1)  # [B, 5]
        team = self.move(team - own, others, wall)
        evaders = self.move(evaders, anything, wall)
        own = self.move(own, acts[:, 0], wall)
        planes = torch.stack([wall, team + own, evaders], 1)  # [B, 3, R, R], not yet moved along
        expected = torch.zeros_like(planes)
        for dy, dx in VIEW_MOVES:  # the view follows its agent
            went = own[:, centre + dy, centre + dx]  # [B]
            seen = shift(planes.flatten(0, 1), -dy, -dx).view_as(planes)
            expected += went.view(-1, 1, 1, 1) * seen
        return {"expected_obs": expected.permute(0, 2, 3, 1)}  # [B, R, R, 3]

    def move(self, x: Tensor, probs: Tensor, wall: Tensor) -> Tensor:
        """Where things are expected after one action each: x, wall [B, R, R], probs [B, 5] -> [B, R, R]."""
        total = torch.zeros_like(x)
        for a, (dy, dx) in enumerate(VIEW_MOVES):
            blocked = shift(wall, -dy, -dx, 1.0)  # the wall seen from where one comes from
            free = shift(x * (1 - blocked), dy, dx)
            moved = free + x * blocked
            total += probs[:, a, None, None] * moved
        return total


@torch.no_grad()
def oracle_floor(
    model: Any,
    meta: dict[str, Any],
    resamples: int,
    seed: int,
    device: torch.device,
) -> Numbers:
    """Fresh transitions, each simulated `resamples` times from the same full state and joint action.

    A dataset holds views, not who stands where, so the states come from the batched env, steered at random. The floor
    is the unbiased variance of the next observation: what a perfect predictor with the full state is left with. Given
    for all cells and for the interior (two or more cells from the border), whose content one view determines, and
    there beside the rules written out for one view (ViewOracle), where there are such.
    """
    N, A, num_actions = 64, meta["num_agents"], meta["num_actions"]
    spec = describe_obs(meta)
    checked = check_env(meta["env_id"], "batched", meta["env_kwargs"])
    env = make_vec_env(checked, N, device, seed)
    copies = make_vec_env(checked, N * resamples, device, seed + 1)
    generator = torch.Generator(device).manual_seed(seed)
    seats = torch.arange(A, device=device).repeat(N)
    step = env.reset(seed)
    parts = {}
    for t in range(100):
        actions = torch.randint(num_actions, (N, A), generator=generator, device=device)
        if t % 10 == 9:
            truth = resimulate(env, copies, actions, resamples)  # [N * A, M, H, W, P]
            obs = step.obs.flatten(0, 1)  # [N * A, H, W, P]
            joint_action = rotate_to_ego(actions.repeat_interleave(A, 0), seats, 1)  # [N * A, A]
            errors = floor_errors(model, obs, joint_action, truth, spec)
            for key, channels in errors.items():
                parts.setdefault(key, []).append(channels)
        step = env.step(actions)
    result = {}
    for (area, name), channels in parts.items():
        channels = torch.stack(channels).mean(0)  # [P]
        for channel, mse in zip(spec.names, channels.tolist(), strict=True):
            result[f"floor/{area}/{channel}/{name}"] = mse
        result[f"floor/{area}/mean/{name}"] = float(channels.mean())
    return result


def resimulate(env: VecEnv, copies: VecEnv, actions: Tensor, resamples: int) -> Tensor:
    """Steps M copies of every state of `env` [N] with its joint action [N, A]: next views [N * A, M, *O] float32."""
    positions = [x.repeat_interleave(resamples, 0) for x in env.positions()]
    copies.set_positions(*positions)
    after: EnvStep = copies.step(actions.repeat_interleave(resamples, 0))
    views = after.final_obs.unflatten(0, (-1, resamples))  # [N, M, A, *O]
    return views.transpose(1, 2).flatten(0, 1).float()


def floor_errors(
    model: Any,
    obs: Tensor,
    joint_action: Tensor,
    truth: Tensor,
    spec: ObsSpec,
) -> dict[tuple[str, str], Tensor]:
    """(area, who predicts) -> mean squared error of every channel [P], over B views [B, H, W, P].

    truth: M samples of what came next [B, M, H, W, P].
    """
    M = truth.shape[1]
    mean = truth.mean(1)
    floor = truth.var(1)
    spread = floor * (M - 1) / M
    ours = predict_all(model, obs, joint_action)["expected_obs"]
    errors = {"oracle": floor, "ours": spread + (ours - mean).square()}
    if spec.names == VIEW_CHANNELS:
        rules = ViewOracle().predict(obs, joint_action)["expected_obs"]
        errors["view rules"] = spread + (rules - mean).square()
    inner = slice(2, obs.shape[1] - 2)
    result = {}
    for name, error in errors.items():
        if name != "view rules":  # they know nothing of what enters from outside
            result["all", name] = error.mean((0, 1, 2))
        interior = error[:, inner, inner]
        result["interior", name] = interior.mean((0, 1, 2))
    return result


# ---------------------------------------------------------------- pictures
def draw_obs(
    axis: Any,
    planes: np.ndarray,
    spec: ObsSpec,
    other: np.ndarray | None = None,
) -> None:
    """One observation [P, H, W]: things as colours, agents as numbers (0: self); cells unlike `other` framed red."""
    import matplotlib.pyplot as plt

    P, H, W = planes.shape
    axis.set(xticks=[], yticks=[])
    if H * W == 1:
        axis.bar(range(P), planes[:, 0, 0], color="tab:blue")
        if other is not None:
            axis.plot(range(P), other[:, 0, 0], "r_")
        return
    colours = plt.get_cmap("Set2").colors
    picture = np.ones((H, W, 3))
    for p in range(P):
        if spec.kinds[p] != "agent":
            share = planes[p] / max(1, planes[p].max())  # [H, W]
            weight = 0.8 * np.clip(share, 0, 1)[..., None]
            colour = np.array(colours[p % 8])
            picture = picture * (1 - weight) + weight * colour
    axis.imshow(picture)
    for k, p in enumerate(spec.agent_planes):
        dx = 0.5 * (k % 2) - 0.25
        dy = 0.4 * (k // 2 % 2) - 0.2
        for y, x in np.argwhere(planes[p] > 0.5):
            axis.text(x + dx, y + dy, str(k), ha="center", va="center")
    if other is not None:
        for y, x in np.argwhere((planes != other).any(0)):
            corner = (x - 0.5, y - 0.5)
            frame = plt.Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2)
            axis.add_patch(frame)


def describe_actions(actions: Tensor) -> str:
    """A joint action [A(, n)] as the title of a narrow picture; empty where it has no room."""
    listed = actions.tolist()
    if actions.is_floating_point():
        listed = [[round(x, 2) for x in mine] for mine in listed]
    title = f"actions {listed}"
    return title if len(title) <= 60 else ""


def draw_triplets(
    path: Path,
    inds: list[int],
    batch: Batch,
    pred: Batch,
    spec: ObsSpec,
) -> None:
    """Rows of o_t, true o_t+1, predicted o_t+1 (red: where it differs), with joint action, rewards and exits."""
    import matplotlib.pyplot as plt

    size = (7.5, 2.6 * len(inds))
    figure, axes = plt.subplots(len(inds), 3, figsize=size, squeeze=False)
    for row, i in zip(axes, inds, strict=True):
        fields = (batch["obs"], batch["next_obs"], pred["pred_obs"])
        views = torch.stack([field[i] for field in fields])
        now, true, mine = to_planes(views).cpu().numpy()
        done = bool(batch["dones"][i])
        pred_done = bool(pred["pred_dones"][i])
        draw_obs(row[0], now, spec)
        row[0].set_title(describe_actions(batch["actions"][i]), fontsize=8)
        draw_obs(row[1], true, spec)
        row[1].set_title(f"true: reward {batch['rewards'][i]:.3f}{' exit' * done}", fontsize=8)
        # What an agent would see after its exit means nothing: it is neither drawn nor compared.
        draw_obs(row[2], mine * (not pred_done), spec, None if done else true)
        row[2].set_title(f"predicted: reward {pred['pred_rewards'][i]:.3f}{' exit' * pred_done}", fontsize=8)
    figure.tight_layout()
    save_figure(figure, path, dpi=80)


def draw_drift(path: Path, result: Numbers, drift: list[DriftStep], spec: ObsSpec) -> None:
    """Exact match and MSE over imagined steps, and the MSE of every channel."""
    import matplotlib.pyplot as plt

    figure, (drift_axis, channel_axis) = plt.subplots(1, 2, figsize=(10, 3.5))
    steps = range(1, len(drift) + 1)
    drift_axis.set(xlabel="imagined steps", title="open-loop drift, true actions")
    if "real" in spec.kinds:
        drift_axis.set_yticks([])
    else:
        drift_axis.plot(steps, [step.exact_match for step in drift], ".-")
        drift_axis.set(ylabel="exact match (blue)", ylim=(-0.02, 1.02))
    twin = drift_axis.twinx()
    errors = [max(step.obs_mse, 1e-9) for step in drift]
    twin.plot(steps, errors, "r.-", alpha=0.5)
    twin.set(ylabel="obs MSE (red)", yscale="log")
    channels = [max(result[f"channel_mse/{name}"], 1e-9) for name in spec.names]
    places = range(len(channels))
    channel_axis.bar(places, channels)
    channel_axis.set(yscale="log", title="MSE per channel")
    labels = spec.names if len(channels) <= 16 else [""] * len(channels)
    channel_axis.set_xticks(places, labels, rotation=60)
    figure.tight_layout()
    save_figure(figure, path, dpi=80)


def choose_triplets(batch: Batch, num: int) -> list[int]:
    """Half of what is shown is paid, from the highest to the lowest reward; the rest are the first samples."""
    paid = batch["rewards"].abs()
    num_paid = int((paid != 0).sum())
    paying = paid.argsort(descending=True)[:num_paid]
    last = max(0, num_paid - 1)
    spread = torch.linspace(0, last, num // 2).long()
    inds = paying[spread[:num_paid]].tolist()
    num_first = min(num - len(inds), len(paid))
    return inds + list(range(num_first))


def draw_all(out: Path, split: str, judged: Judged, num: int) -> None:
    """triplets, the worst twenty, drift curves and per-channel bars of one split, as PNG files in `out`."""
    import matplotlib

    matplotlib.use("Agg")
    batch, pred, spec = judged.batch, judged.pred, judged.spec
    difference = pred["expected_obs"] - batch["next_obs"].float()
    error = difference.square().flatten(1).mean(1)
    error = error.masked_fill(batch["dones"], 0.0)
    worst = error.argsort(descending=True)[:20].tolist()
    draw_triplets(out / f"{split}_triplets.png", choose_triplets(batch, num), batch, pred, spec)
    draw_triplets(out / f"{split}_worst.png", worst, batch, pred, spec)
    draw_drift(out / f"{split}_drift_and_channels.png", judged.result, judged.drift, spec)


# ---------------------------------------------------------------- the printout
def print_report(split: str, judged: Judged, policies: list[str]) -> None:
    result = judged.result
    print(f"\n=== Metrics === ({split}, {result['num_samples']:.0f} samples)")
    print_one_step(result, judged.spec)
    print_open_loop(result, judged.drift)
    print(f"{'Floors':36}{'obs MSE':>10}  {'PSNR':>7}  {'exact':>8}  {'rew MSE':>10}")
    rows = {**judged.floors, "this model": result}
    for name, x in rows.items():
        observed = f"{x['obs_mse']:10.3e}  {x['psnr']:7.2f}  {x['exact_match']:8.5f}"
        print(f"  {name:34}{observed}  {x['reward_mse']:10.3e}")
    if "floor/all/mean/oracle" in result:
        print_oracle(result, judged.spec)
    print(f"{'Per seat and policy':36}{'exact':>8}  {'obs MSE':>10}")
    for key in result:
        group, _, name = key.partition("/")
        if name == "exact_match" and group.startswith(("seat ", "policy ")):
            kind, k = group.split()
            label = policies[int(k)] if kind == "policy" else group
            print(f"  {label:34}{result[key]:8.5f}  {result[f'{group}/obs_mse']:10.3e}")


def print_numbers(label: str, result: Numbers, *keys: str) -> None:
    numbers = [f"{result[key]:.6g}" for key in keys]
    print(f"{label:36}" + "  ".join(numbers))


def print_one_step(result: Numbers, spec: ObsSpec) -> None:
    print_numbers("Obs  MSE (mean over B,C,H,W)", result, "obs_mse")
    print(
        f"{'Obs  PSNR':36}{result['psnr']:.2f} dB (pooled MSE, range {result['value_range']:g}; mean over samples "
        f"{result['psnr_mean_over_samples']:.2f} dB, a perfect one counts {MAX_PSNR:g})"
    )
    print_numbers("Rew  MSE", result, "reward_mse")
    names = spec.names if len(spec.names) <= 32 else ()
    print("Per-channel MSE")
    for name in names:
        print_numbers(f"  {name}", result, f"channel_mse/{name}")
    if "real" in spec.kinds:  # no real number is met exactly
        print_numbers(f"Right to {REAL_TOLERANCE}, whole observation", result, "exact_match")
    else:
        print_numbers("Exact match, whole observation", result, "exact_match")
        for name in names:
            print_numbers(f"  {name}", result, f"exact_match/{name}")
    print_numbers(f"Reward accuracy (within {REWARD_TOLERANCE})", result, "reward_accuracy")
    for name in ("zero", "nonzero"):
        label = f"  {name} rewards: accuracy, MSE"
        print_numbers(label, result, f"reward_accuracy/{name}", f"reward_mse/{name}")
    print_numbers("Exit precision, recall", result, "exit_precision", "exit_recall")
    if "physics_ok" not in result:
        print("Physics                             not defined for this environment")
        return
    print_numbers("Physics: predictions without fault", result, "physics_ok")
    words = {
        "jump": "jump",
        "appear": "appear",
        "vanish": "vanish",
        "double": "are doubled",
    }
    shares = []
    for kind, word in words.items():
        share = result[f"physics/{kind}"]
        shares.append(f"{word} {share:.6g}")
    print(f"{'  share where entities':36}" + "  ".join(shares))


def print_open_loop(result: Numbers, drift: list[DriftStep]) -> None:
    steps = [f"{h:>8}" for h in HORIZONS]
    print(f"{'Open loop, true actions':36}" + "  ".join(steps) + "  steps")
    rows = (
        ("  exact match", "exact_match", ".5f"),
        ("  obs MSE", "obs_mse", ".2e"),
        ("  rollouts still there", "num_left", ".0f"),
    )
    for label, name, form in rows:
        cells = []
        for h in HORIZONS:
            cell = "-"
            if h <= len(drift):
                cell = format(getattr(drift[h - 1], name), form)
            cells.append(f"{cell:>8}")
        print(f"{label:36}" + "  ".join(cells))
    print_numbers("  right over the whole episode", result, "whole_episode")
    print_numbers("  ... rewards and exits as well", result, "whole_episode_with_rewards_and_exits")


def print_oracle(result: Numbers, spec: ObsSpec) -> None:
    print("Oracle floor (re-simulated)         oracle MSE, ours, ours / oracle (full state)")
    for area in ("all", "interior"):
        for channel in (*spec.names, "mean"):
            key = f"floor/{area}/{channel}"
            oracle, ours = result[f"{key}/oracle"], result[f"{key}/ours"]
            ratio = f"{ours / oracle:.3f}" if oracle > 1e-9 else "-"
            line = f"  {area + ' cells, ' + channel:34}{oracle:.3e}  {ours:.3e}  {ratio}"
            if f"{key}/view rules" in result:
                line += f"  rules for one view {result[f'{key}/view rules']:.3e}"
            print(line)


# ---------------------------------------------------------------- judging
class Judged(NamedTuple):
    """Every number about one set of episodes, and what the pictures show."""

    result: Numbers
    floors: dict[str, Numbers]
    drift: list[DriftStep]
    batch: Batch
    pred: Batch
    spec: ObsSpec


def judge(model: Any, dataset: Dataset, episodes: np.ndarray, args: Args, device: torch.device) -> Judged:
    """Judges on some episodes of a dataset."""
    spec = describe_obs(dataset.meta)
    samples = Samples(dataset, device)
    pairs = draw_pairs(samples, dataset.rows_of(episodes), args)
    batch = make_batch(dataset, samples, pairs)
    seen = batch["next_obs"].float()
    value_range = float(seen.max() - seen.min()) or 1.0  # 1 where all is the same
    physics = bool(spec.agent_planes) and not spec.window  # a window may lose sight of an entity
    pred = predict_all(model, batch["obs"], batch["actions"])
    result = {"num_samples": float(len(pairs.rows)), "value_range": value_range}
    result |= score(batch, pred, spec, value_range, physics)
    floors = {}
    for name, floor in (("copy-last", CopyLast()), ("all-zero", AllZero())):
        floor_pred = predict_all(floor, batch["obs"], batch["actions"])
        floors[name] = score(batch, floor_pred, spec, value_range, physics)
        for key in ("obs_mse", "psnr", "exact_match", "reward_mse"):
            result[f"{name}/{key}"] = floors[name][key]
    drawn = episodes[: args.drift_episodes or None]
    starts = samples.load(dataset.episode_starts[drawn])
    imagined = open_loop(model, samples, starts, "real" in spec.kinds)
    drift = imagined.pop("drift")
    result |= imagined
    for h in HORIZONS:
        if h <= len(drift):
            result[f"exact_match_{h}"] = drift[h - 1].exact_match
            result[f"obs_mse_{h}"] = drift[h - 1].obs_mse
    if args.resimulate and spec.resimulates:
        result |= oracle_floor(model, dataset.meta, args.resimulate, args.seed, device)
    return Judged(result, floors, drift, batch, pred, spec)


def draw_pairs(samples: Samples, rows: np.ndarray, args: Args) -> Pairs:
    """As many samples of the rows as are to be judged, in an order of their own."""
    pairs = samples.pairs(rows)
    order = np.random.default_rng(args.seed).permutation(len(pairs.rows))
    return pairs.take(samples.load(order[: args.max_samples or None]))


def make_batch(dataset: Dataset, samples: Samples, pairs: Pairs) -> Batch:
    """What is known of B samples, ego first: obs, next_obs [B, *O], actions [B, A(, n)], the others [B]."""
    policies = samples.load(dataset.policy_ids)  # [S, A]
    return {
        "obs": samples.obs[pairs],
        "next_obs": samples.next_obs[pairs],
        "actions": samples.joint_action(*pairs),
        "rewards": samples.rewards[pairs],
        "dones": samples.terminations[pairs],
        "policies": policies[pairs],
        "seats": pairs.seats,
    }


# ---------------------------------------------------------------- main
def parse_fail_under(limits: tuple[str, ...]) -> Numbers:
    """("exact_match=0.999",) -> {"exact_match": 0.999}. UsageError where that is not its form."""
    parsed = {}
    for limit in limits:
        name, _, number = limit.partition("=")
        try:
            parsed[name] = float(number)
        except ValueError:
            parsed[name] = np.nan
        if np.isnan(parsed[name]):
            raise UsageError(f"--fail-under expected METRIC=NUMBER, got '{limit}': e.g. exact_match=0.999")
    return parsed


def refuse_unknown(limits: Numbers, dataset: Dataset, args: Args, device: torch.device) -> None:
    """UsageError, before anything is judged, for a name in --fail-under that no judged split will have.

    Which there are is found out by judging a model that needs no time on the longest episode.
    """
    if not limits:
        return
    longest = dataset.episode_lengths.argmax()
    quick = replace(args, max_samples=64, drift_episodes=1, resimulate=0)
    known = set(judge(CopyLast(), dataset, longest[None], quick, device).result)
    for name, number in (("seat", dataset.num_agents), ("policy", len(dataset.meta["policies"]))):
        for k in range(number):
            known |= {f"{name} {k}/exact_match", f"{name} {k}/obs_mse"}
    for name in limits:
        if name not in known and not (name.startswith("floor/") and args.resimulate):
            close = difflib.get_close_matches(name, known, n=3)
            hint = f", like {' or '.join(close)}" if close else ": e.g. exact_match=0.9"
            raise UsageError(f"--fail-under expected one of the JSON's numbers, got '{name}'{hint}")


def choose_episodes(args: Args, dataset: Dataset, checkpoint: dict[str, Any] | None) -> dict[str, np.ndarray]:
    """Split name -> episode numbers. UsageError where nothing is left."""
    everything = {"all": np.arange(len(dataset.episode_lengths))}
    trained_on_it = checkpoint is not None and same_data(checkpoint["data_meta"], dataset)
    if args.split == "all" or (args.split == "auto" and not trained_on_it):
        return everything
    if checkpoint is None:
        raise UsageError(f"--split {args.split} expected a checkpoint that held data out, got --model: use --split all")
    trained = checkpoint["args"]
    splits = dataset.split_episodes(trained["seed"], trained["heldout_fraction"], trained["holdout_policies"])
    wanted = SPLITS[1:] if args.split == "auto" else (args.split,)
    chosen = {name: splits[name] for name in wanted if len(splits[name])}
    if not chosen:
        raise UsageError(
            f"--split {args.split}: no held-out episodes left in {args.data}: train with --holdout-policies"
        )
    return chosen


def check_fit(model: WorldModel, meta: dict[str, Any]) -> None:
    """UsageError, naming both, where checkpoint and dataset are not of one game."""
    config = model.config
    for key in ("obs_shape", "num_agents", "env_id"):
        if config[key] != meta[key]:
            raise UsageError(
                f"the checkpoint expected {key} {config[key]}, the dataset has {meta[key]}: judge it on its own game"
            )
    discrete = meta["num_actions"] is not None
    if config["discrete"] != discrete or config["obs_dtype"] != meta["obs_dtype"]:
        raise UsageError(
            f"the checkpoint expected {config['obs_dtype']} observations and discrete={config['discrete']} actions, "
            f"the dataset has {meta['obs_dtype']} and {meta['num_actions']}: judge it on its own game"
        )


def load_checkpoint_model(path: str, meta: dict[str, Any], device: torch.device) -> WorldModel:
    """The model of a run folder or .pt file. UsageError: not one, or of another game."""
    model = load_world_model(path, device)
    check_fit(model, meta)
    print(f"Loaded model {path}: obs_shape={model.obs_shape}, action_dim={model.action_dim}")
    if model.config.get("reward_target") == "td":
        print("Note: this model's reward head predicts r + gamma V(s'); Rew MSE compares it with r")
    return model


def load_foreign_model(name: str, meta: dict[str, Any], device: torch.device) -> Any:
    """The model that package.module:factory makes. UsageError: there is no such factory."""
    module, _, factory = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty module name
        raise UsageError(f"--model expected package.module:factory, got '{name}' ({error})") from None
    model = make(meta, device)
    print(f"Loaded model {name}: obs_shape={tuple(meta['obs_shape'])}, action_dim={meta['num_actions']}")
    return model


def pictures_folder(args: Args) -> Path | None:
    """Where pictures go; None: nowhere."""
    if args.out:
        return Path(args.out)
    if args.checkpoint is None:
        return None
    path = Path(args.checkpoint)
    folder = path if path.is_dir() else path.parent
    return folder / "judge"


def write_numbers(args: Args, results: dict[str, Numbers]) -> None:
    """All numbers of all splits, as JSON and CSV where that is asked for."""
    if args.json:
        content = {"args": asdict(args)}
        for split, result in results.items():  # JSON knows no NaN
            content[split] = {name: x if np.isfinite(x) else None for name, x in result.items()}
        write_json(Path(args.json), content)
    if args.csv:
        with whole_file(Path(args.csv)) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("split", "metric", "value"))
            for split, result in results.items():
                for name, x in result.items():
                    table.writerow((split, name, x if np.isfinite(x) else None))


def make_folders(args: Args, out: Path | None) -> None:
    """UsageError, before anything is judged, where what comes out could not be written."""
    files = [Path(name) for name in (args.json, args.csv) if name]
    for folder in [path.parent for path in files] + [out] * (out is not None):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write the folder {folder} ({error.strerror}): choose another") from None
    for path in files:
        if path.is_dir():
            raise UsageError(f"expected a file to write, {path} is a folder: name a file in it")


def main(args: Args) -> int:
    """Judges; returns the exit code. UsageError: unusable arguments or data."""
    # ---- arguments
    if (args.checkpoint is None) == (args.model is None):
        raise UsageError("expected either --checkpoint RUN_DIR or --model package.module:factory: give exactly one")
    limits = parse_fail_under(args.fail_under)
    device = get_device(args.cuda)
    out = pictures_folder(args)

    # ---- data
    dataset = load_dataset(args.data)
    check_checksums(dataset, LARGE)
    meta = dataset.meta

    # ---- networks
    checkpoint = None
    if args.checkpoint:
        needs = ("args", "config", "data_meta", "model")
        checkpoint = load_checkpoint(best_or_latest(args.checkpoint), CHECKPOINT_FORMAT, needs=needs)
        model = load_checkpoint_model(args.checkpoint, meta, device)
    else:
        model = load_foreign_model(args.model, meta, device)
    num_samples = int(dataset.active.sum())
    print(
        f"Dataset {args.data}: {dataset.num_steps} env steps, {len(dataset.episode_lengths)} episodes, "
        f"{num_samples} samples, inferred n_agents={dataset.num_agents}"
    )

    # ---- loop
    splits = choose_episodes(args, dataset, checkpoint)
    refuse_unknown(limits, dataset, args, device)
    make_folders(args, out)
    results, failed = {}, []
    for split, episodes in splits.items():
        judged = judge(model, dataset, episodes, args, device)
        print_report(split, judged, meta["policies"])
        results[split] = judged.result
        for name, limit in limits.items():
            if name not in judged.result:
                raise UsageError(f"--fail-under expected one of the JSON's numbers, got '{name}': e.g. exact_match=0.9")
            number = judged.result[name]
            if not number >= limit:
                failed.append(f"{split}: {name} {number:.6g} < {limit:g}")
        if out is not None:
            draw_all(out, split, judged, args.num_pictures)

    # ---- close
    if out is not None:
        print(f"\npictures: {out}")
    write_numbers(args, results)
    for line in failed:
        print(f"failed   {line}")
    return 1 if failed else 0


def cli(argv: list[str] | None = None) -> int:
    """The command line: 0 judged, 1 below `--fail-under`, 2 unusable arguments or data."""
    return command_line(Args, main, LIMITS, argv)


if __name__ == "__main__":
    sys.exit(cli())
