"""Judges a world model on held-out data: obs MSE, PSNR, exact match, rewards, exits, physics, drift, floors.

    python test_obs_reward_model.py --checkpoint runs/<name> --data data/<name>
    python test_obs_reward_model.py --model package.module:factory --data data/<name>

The second form judges any other model: `factory(meta, device)` gets the dataset's meta and returns an object with
`step(obs, joint_action) -> next_obs, reward, done`, shapes as in world_model.WorldModel.step (agent i's view, joint
action ego first, -1 for agents that left). If it also has `predict` with "expected_obs", MSE and PSNR use that.

PSNR = 10 log10(range^2 / MSE), from the pooled MSE. How to read the printout: docs/world_model.md
"""

from __future__ import annotations

import csv
import importlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from dataset import SPLITS, Dataset, load_dataset, rotate_to_ego
from world_model import ObsSpec, Samples, WorldModel, check_limits, describe_obs, load_checkpoint, load_world_model

HORIZONS = (1, 2, 5, 10, 20, 35)
REWARD_TOLERANCE = 0.02  # a reward counts as right within this
MAX_PSNR = 100.0  # dB, what an error of exactly zero is given


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
    """stochastic envs with a batched twin (pursuit): how often each transition is simulated again; 0: no oracle"""
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

    def step(self, obs: torch.Tensor, joint_action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return obs, torch.zeros(len(obs), device=obs.device), torch.zeros(len(obs), dtype=torch.bool, device=obs.device)


class AllZero(CopyLast):
    """The empty observation."""

    def step(self, obs: torch.Tensor, joint_action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return super().step(torch.zeros_like(obs), joint_action)


# ---------------------------------------------------------------- metrics
def to_planes(obs: torch.Tensor) -> torch.Tensor:
    """[B, H, W, P] or [B, P] -> [B, P, H, W] float32 (a vector is a 1 x 1 grid)."""
    return obs.float().permute(0, 3, 1, 2) if obs.dim() == 4 else obs.float()[:, :, None, None]


def psnr(mse: torch.Tensor, value_range: float) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, at most 100."""
    return (10 * torch.log10(value_range**2 / mse.clamp(min=1e-30))).clamp(max=MAX_PSNR)


def physics_violations(
    before: torch.Tensor, joint_action: torch.Tensor, after: torch.Tensor, spec: ObsSpec
) -> dict[str, torch.Tensor]:
    """What no rule allows, per prediction [B] bool: an entity jumps more than one cell, appears, vanishes without a
    successful hunt, or is doubled. before, after [B, P, H, W] of 0/1, joint_action [B, A], both ego first."""
    B, A, width = len(before), len(spec.agent_planes), before.shape[3]
    agents, new = before[:, :A].flatten(2), after[:, :A].flatten(2)  # [B, A, H * W]
    was, now = agents.sum(2) > 0, new.sum(2)  # [B, A]
    here, there = agents.argmax(2), new.argmax(2)  # [B, A]
    distance = (here // width - there // width).abs() + (here % width - there % width).abs()
    jump = (was & (now == 1) & (distance > 1)).any(1)
    appear = (~was & (now > 0)).any(1)
    double = (now > 1).any(1) | (after > 1).flatten(1).any(1)
    left = torch.zeros(B, A, dtype=torch.bool, device=before.device)  # agents that may leave
    vanish = torch.zeros(B, dtype=torch.bool, device=before.device)
    for p, name in list(enumerate(spec.names))[A:]:
        things, after_things = before[:, p].flatten(1) > 0, after[:, p].flatten(1) > 0  # [B, H * W]
        taken = torch.zeros_like(things)
        if name in spec.hunts:
            action, needed = spec.hunts[name]
            hunts = joint_action == action  # [B, A]
            taken = things & ((agents * hunts[:, :, None]).sum(1) >= needed)
            left |= hunts & (agents * taken[:, None]).sum(2).bool()
        appear |= (after_things & ~things).any(1)
        vanish |= (things & ~after_things & ~taken).any(1)
    vanish |= (was & (now == 0) & ~left).any(1)
    any_of_them = jump | appear | vanish | double
    return {"jump": jump, "appear": appear, "vanish": vanish, "double": double, "any": any_of_them}


@torch.no_grad()
def predict_all(model: Any, obs: torch.Tensor, actions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Predictions of V samples in batches: pred_obs and expected_obs [V, *O], pred_rewards [V], pred_dones [V]."""
    parts = []
    for obs_part, actions_part in zip(obs.split(512), actions.split(512), strict=True):
        if hasattr(model, "predict"):
            out = model.predict(obs_part, actions_part)
            parts.append((out["next_obs"], out["expected_obs"], out["reward"], out["done"]))
        else:
            next_obs, reward, done = model.step(obs_part, actions_part)
            parts.append((next_obs, next_obs.float(), reward, done))
    names = ("pred_obs", "expected_obs", "pred_rewards", "pred_dones")
    result = dict(zip(names, (torch.cat(x) for x in zip(*parts, strict=True)), strict=True))
    if result["pred_obs"].shape != obs.shape or result["pred_rewards"].shape != (len(obs),):
        raise ValueError(
            f"step expected to return next_obs {list(obs.shape)} and reward [{len(obs)}], got "
            f"{list(result['pred_obs'].shape)} and {list(result['pred_rewards'].shape)}: see the top of this file"
        )
    if not (result["expected_obs"].isfinite().all() and result["pred_rewards"].isfinite().all()):
        raise ValueError("the model predicted NaN or infinity: it is broken, train it again")
    return result


def score(
    batch: dict[str, torch.Tensor], pred: dict[str, torch.Tensor], spec: ObsSpec, value_range: float, physics: bool
) -> dict[str, float]:
    """All one-step numbers. Observations count where the agent stays (`dones` False), rewards and exits everywhere."""
    stays = ~batch["dones"]
    target, expected = to_planes(batch["next_obs"][stays]), to_planes(pred["expected_obs"][stays])  # [B, P, H, W]
    snapped = to_planes(pred["pred_obs"][stays])
    error = (expected - target).square()
    per_sample = error.mean((1, 2, 3))
    same = snapped == target if "real" not in spec.kinds else (snapped - target).abs() < 1e-3
    right = same.flatten(2).all(2)  # [B, P]
    result = {
        "obs_mse": per_sample.mean(),
        "psnr": psnr(per_sample.mean(), value_range),
        "psnr_mean_over_samples": psnr(per_sample, value_range).mean(),
    }
    reward_error = pred["pred_rewards"] - batch["rewards"]
    zero = batch["rewards"] == 0
    result["reward_mse"] = reward_error.square().mean()
    result |= {f"channel_mse/{name}": error[:, p].mean() for p, name in enumerate(spec.names)}
    result["exact_match"] = right.all(1).float().mean()
    result |= {f"exact_match/{name}": right[:, p].float().mean() for p, name in enumerate(spec.names)}
    result["reward_accuracy"] = (reward_error.abs() <= REWARD_TOLERANCE).float().mean()
    for name, where in (("zero", zero), ("nonzero", ~zero)):
        result[f"reward_accuracy/{name}"] = (reward_error[where].abs() <= REWARD_TOLERANCE).float().mean()
        result[f"reward_mse/{name}"] = reward_error[where].square().mean()
    hits = (pred["pred_dones"] & batch["dones"]).sum()
    result["exit_precision"] = hits / pred["pred_dones"].sum()
    result["exit_recall"] = hits / batch["dones"].sum()
    if physics:
        broken = physics_violations(to_planes(batch["obs"][stays]), batch["actions"][stays], snapped, spec)
        result |= {f"physics/{name}": x.float().mean() for name, x in broken.items()}
        result["physics_ok"] = 1 - result.pop("physics/any")
    seats, policies = batch["seats"][stays], batch["policies"][stays]
    for seat in range(int(batch["seats"].max()) + 1):
        result[f"seat {seat}/exact_match"] = right[seats == seat].all(1).float().mean()
        result[f"seat {seat}/obs_mse"] = per_sample[seats == seat].mean()
    for k in batch["policies"].unique().tolist():
        result[f"policy {k}/exact_match"] = right[policies == k].all(1).float().mean()
        result[f"policy {k}/obs_mse"] = per_sample[policies == k].mean()
    return {name: float(x) for name, x in result.items()}


@torch.no_grad()
def open_loop(model: Any, samples: Samples, starts: torch.Tensor, real: bool) -> dict[str, Any]:
    """Imagines episodes from their first rows [E], from every seat, with the true actions until the agent's exit.

    Returns drift (per step: exact match, obs MSE, number of rollouts whose agent is still there) and the share of
    rollouts that are right at every step, without and with rewards (to 0.02) and exits.
    """
    A = samples.active.shape[1]
    rows, seats = starts.repeat_interleave(A), torch.arange(A, device=starts.device).repeat(len(starts))
    alive = samples.active[rows, seats]
    rows, seats = rows[alive], seats[alive]
    obs = samples.obs[rows, seats]
    obs_right, all_right = (torch.ones(len(rows), dtype=torch.bool, device=rows.device) for _ in range(2))
    alive = obs_right.clone()
    curve = []
    while alive.any():
        obs, rewards, dones = model.step(obs, samples.joint_action(rows, seats))
        done, target = samples.terminations[rows, seats], samples.next_obs[rows, seats]
        error = (obs.float() - target.float()).flatten(1)  # [R, ...]
        same = error.abs().amax(1) < (1e-3 if real else 0.5)
        stays = alive & ~done
        obs_right &= same | ~stays
        right = (same | done) & ((rewards - samples.rewards[rows, seats]).abs() <= REWARD_TOLERANCE) & (dones == done)
        all_right &= right | ~alive
        if stays.any():
            curve.append((same[stays].float().mean(), error[stays].square().mean(), stays.sum()))
        rows, goes_on = samples.after(rows, seats)
        alive = alive & goes_on
    numbers = [[float(x) for x in step] for step in curve]
    return {
        "drift": numbers,
        "whole_episode": float(obs_right.float().mean()),
        "whole_episode_with_rewards_and_exits": float(all_right.float().mean()),
    }


# ---------------------------------------------------------------- pursuit: what could be known at all
MOVES = ((0, -1), (0, 1), (1, 0), (-1, 0), (0, 0))  # pursuit's actions as (y, x) steps of the observation's axes


def shift(x: torch.Tensor, dy: int, dx: int, fill: float = 0.0) -> torch.Tensor:
    """Moves the content of [B, H, W] by one cell at most; what comes in is `fill`."""
    padded = F.pad(x, (1, 1, 1, 1), value=fill)
    return padded[:, 1 - dy : 1 - dy + x.shape[1], 1 - dx : 1 - dx + x.shape[2]]


class ViewOracle:
    """Pursuit's rules written out for one agent's view: the best guess without the history, but for captures and for
    what enters from outside. Which visible team mate does which of the others' actions can not be known."""

    def predict(self, obs: torch.Tensor, joint_action: torch.Tensor) -> dict[str, torch.Tensor]:
        wall, team, evaders = obs.float().unbind(-1)  # [B, R, R] each
        centre = obs.shape[1] // 2
        own = torch.zeros_like(team)
        own[:, centre, centre] = 1.0
        acts = F.one_hot(joint_action, 5).float()  # [B, A, 5]
        guess = [acts[:, 1:].mean(1), acts.new_full((len(obs), 5), 0.2), acts[:, 0]]  # team mates, evaders, self
        moved = []
        for x, probs in zip((team - own, evaders, own), guess, strict=True):
            total = torch.zeros_like(x)
            for a, (dy, dx) in enumerate(MOVES):
                blocked = shift(wall, -dy, -dx, 1.0)  # the wall seen from where one comes from
                total += probs[:, a, None, None] * (shift(x * (1 - blocked), dy, dx) + x * blocked)
            moved.append(total)
        planes = torch.stack([wall, moved[0] + moved[2], moved[1]], -1)  # [B, R, R, 3], not yet moved along
        expected = torch.zeros_like(planes)
        for dy, dx in MOVES[:4]:  # the view follows its agent
            went = moved[2][:, centre + dy, centre + dx].view(-1, 1, 1, 1)
            expected += went * torch.stack([shift(x, -dy, -dx) for x in planes.unbind(-1)], -1)
        expected += moved[2][:, centre, centre].view(-1, 1, 1, 1) * planes
        return {"expected_obs": expected}


@torch.no_grad()
def oracle_floor(model: Any, meta: dict, resamples: int, seed: int, device: torch.device) -> dict[str, float]:
    """Fresh transitions of pursuit, each simulated `resamples` times from the same full state and joint action.

    A dataset holds views, not who stands where, so the states come from the batched twin, steered at random. The floor
    is the unbiased variance of the next observation: what a perfect predictor with the full state is left with. Given
    for all cells and for the interior (two or more cells from the border), whose content one view determines, and
    there beside the rules written out for one view (ViewOracle).
    """
    from envs.pursuit import PursuitVecEnv

    N, A = 64, meta["num_agents"]
    env = PursuitVecEnv(N, device, seed, **meta["env_kwargs"])
    again = PursuitVecEnv(N * resamples, device, seed + 1, **meta["env_kwargs"])
    generator = torch.Generator(device).manual_seed(seed)
    step, sums = env.reset(seed), {}
    for t in range(100):
        actions = torch.randint(5, (N, A), generator=generator, device=device)
        if t % 10 == 9:
            pursuers, evaders = (x.repeat_interleave(resamples, 0) for x in env.positions())
            again.set_positions(pursuers, evaders)
            truth = again.step(actions.repeat_interleave(resamples, 0)).final_obs  # [N * M, A, R, R, 3]
            truth = truth.view(N, resamples, A, *truth.shape[2:]).transpose(1, 2).flatten(0, 1).float()  # [N*A, M, ...]
            obs = step.obs.flatten(0, 1)  # [N * A, R, R, 3]
            seats = torch.arange(A, device=device).repeat(N)
            joint = rotate_to_ego(actions.repeat_interleave(A, 0), seats, 1)  # [N * A, A]
            mean, floor = truth.mean(1), truth.var(1)  # [N * A, R, R, 3]
            ours = (
                floor * (resamples - 1) / resamples + (predict_all(model, obs, joint)["expected_obs"] - mean).square()
            )
            view = ViewOracle().predict(obs, joint)["expected_obs"]
            view = floor * (resamples - 1) / resamples + (view - mean).square()
            inner = slice(2, obs.shape[1] - 2)
            for name, error in (("oracle", floor), ("ours", ours), ("view rules", view)):
                for area, cells in (("all", error), ("interior", error[:, inner, inner])):
                    if (name, area) != ("view rules", "all"):
                        sums.setdefault((area, name), []).append(cells.mean((0, 1, 2)))
        step = env.step(actions)
    result = {}
    for (area, name), parts in sums.items():
        channels = torch.stack(parts).mean(0)  # [3]
        for channel, x in zip(("walls", "pursuers", "evaders"), channels.tolist(), strict=True):
            result[f"floor/{area}/{channel}/{name}"] = x
        result[f"floor/{area}/mean/{name}"] = float(channels.mean())
    return result


# ---------------------------------------------------------------- pictures
def draw_obs(axis: Any, planes: np.ndarray, spec: ObsSpec, other: np.ndarray | None = None) -> None:
    """One observation [P, H, W]: things as colours, agents as numbers (0: self); cells unlike `other` framed red."""
    import matplotlib.pyplot as plt

    P, H, W = planes.shape
    axis.set(xticks=[], yticks=[])
    if H * W == 1:
        axis.bar(range(P), planes[:, 0, 0], color="tab:blue")
        if other is not None:
            axis.plot(range(P), other[:, 0, 0], "r_")
        return
    picture = np.ones((H, W, 3))
    colours = [plt.get_cmap("Set2")(p % 8)[:3] for p in range(P)]
    for p in range(P):
        if spec.kinds[p] != "agent":
            weight = np.clip(planes[p] / max(1, planes[p].max()), 0, 1)[..., None] * 0.8
            picture = picture * (1 - weight) + weight * np.array(colours[p])
    axis.imshow(picture)
    for k, p in enumerate(spec.agent_planes):
        for y, x in np.argwhere(planes[p] > 0.5):
            axis.text(x - 0.25 + 0.5 * (k % 2), y - 0.2 + 0.4 * (k // 2 % 2), str(k), ha="center", va="center")
    if other is not None:
        for y, x in np.argwhere((planes != other).any(0)):
            axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))


def draw_triplets(path: Path, inds: list[int], batch: dict, pred: dict, spec: ObsSpec) -> None:
    """Rows of o_t, true o_t+1, predicted o_t+1 (red: where it differs), with joint action, rewards and exits."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(inds), 3, figsize=(7.5, 2.6 * len(inds)), squeeze=False)
    for row, i in zip(axes, inds, strict=True):
        now, true, mine = (to_planes(x[i : i + 1])[0].cpu().numpy() for x in
                           (batch["obs"], batch["next_obs"], pred["pred_obs"]))  # fmt: skip
        exit_true, exit_mine = (" exit" if x[i] else "" for x in (batch["dones"], pred["pred_dones"]))
        mine = mine * float(not pred["pred_dones"][i])  # what an agent would see after its exit means nothing
        draw_obs(row[0], now, spec)
        row[0].set_title(f"actions {batch['actions'][i].tolist()}", fontsize=8)
        draw_obs(row[1], true, spec)
        row[1].set_title(f"true: reward {batch['rewards'][i]:.3f}{exit_true}", fontsize=8)
        draw_obs(row[2], mine, spec, None if batch["dones"][i] else true)
        row[2].set_title(f"predicted: reward {pred['pred_rewards'][i]:.3f}{exit_mine}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_all(
    out: Path, split: str, batch: dict, pred: dict, result: dict, drift: list, spec: ObsSpec, num: int
) -> None:
    """triplets, the worst twenty, drift curves and per-channel bars of one split, as PNG files in `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    error = (pred["expected_obs"] - batch["next_obs"].float()).square().flatten(1).mean(1)
    error = torch.where(batch["dones"], torch.zeros_like(error), error)
    paying = batch["rewards"].abs().argsort(descending=True)[: int((batch["rewards"] != 0).sum())]
    spread = torch.linspace(0, max(0, len(paying) - 1), num // 2).long()  # half of the triplets show where it pays
    inds = paying[spread[: len(paying)]].tolist()
    inds += list(range(min(num - len(inds), len(error))))
    draw_triplets(out / f"{split}_triplets.png", inds, batch, pred, spec)
    draw_triplets(out / f"{split}_worst.png", error.argsort(descending=True)[:20].tolist(), batch, pred, spec)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
    steps = range(1, len(drift) + 1)
    axes[0].plot(steps, [step[0] for step in drift], ".-")
    axes[0].set(xlabel="imagined steps", ylabel="exact match (blue)", ylim=(-0.02, 1.02))
    axes[0].set_title("open-loop drift, true actions")
    twin = axes[0].twinx()
    twin.plot(steps, [max(step[1], 1e-9) for step in drift], "r.-", alpha=0.5)
    twin.set(ylabel="obs MSE (red)", yscale="log")
    values = [max(result[f"channel_mse/{name}"], 1e-9) for name in spec.names]
    axes[1].bar(range(len(values)), values)
    axes[1].set(yscale="log", title="MSE per channel")
    axes[1].set_xticks(range(len(values)), spec.names if len(values) <= 16 else [""] * len(values), rotation=60)
    figure.tight_layout()
    figure.savefig(out / f"{split}_drift_and_channels.png", dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------- the printout
def print_report(split: str, result: dict, floors: dict, drift: list, spec: ObsSpec, policies: list[str]) -> None:
    def show(label: str, *keys: str) -> None:
        print(f"{label:36}" + "  ".join(f"{result[key]:.6g}" for key in keys))

    print(f"\n=== Metrics === ({split}, {result['num_samples']:.0f} samples)")
    show("Obs  MSE (mean over B,C,H,W)", "obs_mse")
    print(f"{'Obs  PSNR':36}{result['psnr']:.2f} dB (pooled MSE, range {result['value_range']:g}; mean over samples "
          f"{result['psnr_mean_over_samples']:.2f} dB, a perfect one counts {MAX_PSNR:g})")  # fmt: skip
    show("Rew  MSE", "reward_mse")
    names = spec.names if len(spec.names) <= 32 else ()
    print("Per-channel MSE")
    for name in names:
        show(f"  {name}", f"channel_mse/{name}")
    show("Exact match, whole observation", "exact_match")
    for name in names:
        show(f"  {name}", f"exact_match/{name}")
    show(f"Reward accuracy (within {REWARD_TOLERANCE})", "reward_accuracy")
    for name in ("zero", "nonzero"):
        show(f"  {name} rewards: accuracy, MSE", f"reward_accuracy/{name}", f"reward_mse/{name}")
    show("Exit precision, recall", "exit_precision", "exit_recall")
    if "physics_ok" in result:
        show("Physics: predictions without fault", "physics_ok")
        kinds = {"jump": "jump", "appear": "appear", "vanish": "vanish", "double": "are doubled"}
        print(
            f"{'  share where entities':36}"
            + "  ".join(f"{word} {result[f'physics/{kind}']:.6g}" for kind, word in kinds.items())
        )
    else:
        print("Physics                             not defined for this environment")
    print("Open loop, true actions             " + "  ".join(f"{h:>8}" for h in HORIZONS) + "  steps")
    for label, k, form in (("  exact match", 0, ".5f"), ("  obs MSE", 1, ".2e"), ("  rollouts still there", 2, ".0f")):
        cells = [format(drift[h - 1][k], form) if h <= len(drift) else "-" for h in HORIZONS]
        print(f"{label:36}" + "  ".join(f"{cell:>8}" for cell in cells))
    show("  right over the whole episode", "whole_episode")
    show("  ... rewards and exits as well", "whole_episode_with_rewards_and_exits")
    print(f"{'Floors':36}{'obs MSE':>10}  {'PSNR':>7}  {'exact':>8}  {'rew MSE':>10}")
    for name, x in {**floors, "this model": result}.items():
        print(f"  {name:34}{x['obs_mse']:10.3e}  {x['psnr']:7.2f}  {x['exact_match']:8.5f}  {x['reward_mse']:10.3e}")
    if "floor/all/mean/oracle" in result:
        print("Oracle floor (re-simulated)         oracle MSE, ours, ours / oracle (full state)")
        for area in ("all", "interior"):
            for channel in (*spec.names, "mean"):
                oracle, ours = (result[f"floor/{area}/{channel}/{name}"] for name in ("oracle", "ours"))
                rules = result.get(f"floor/{area}/{channel}/view rules")
                ratio = f"{ours / oracle:.3f}" if oracle > 1e-9 else "-"
                more = "" if rules is None else f"  rules for one view {rules:.3e}"
                print(f"  {area + ' cells, ' + channel:34}{oracle:.3e}  {ours:.3e}  {ratio}{more}")
    print(f"{'Per seat and policy':36}{'exact':>8}  {'obs MSE':>10}")
    groups = [key.removesuffix("/exact_match") for key in result if key.startswith(("seat", "policy"))]
    for group in dict.fromkeys(key.removesuffix("/obs_mse") for key in groups):
        label = policies[int(group.split()[1])] if group.startswith("policy") else group
        print(f"  {label:34}{result[f'{group}/exact_match']:8.5f}  {result[f'{group}/obs_mse']:10.3e}")


# ---------------------------------------------------------------- main
def choose_episodes(args: Args, dataset: Dataset, checkpoint: dict | None) -> dict[str, np.ndarray]:
    """Split name -> episode numbers. Raises ValueError where nothing is left."""
    everything = {"all": np.arange(len(dataset.episode_lengths))}
    if args.split == "all" or (args.split == "auto" and (not checkpoint or checkpoint["data_meta"] != dataset.meta)):
        return everything
    if not checkpoint:
        raise ValueError(f"--split {args.split} expected a checkpoint that held data out, got --model: use --split all")
    trained = checkpoint["args"]
    splits = dataset.split_episodes(trained["seed"], trained["heldout_fraction"], trained["holdout_policies"])
    wanted = SPLITS[1:] if args.split == "auto" else (args.split,)
    chosen = {name: splits[name] for name in wanted if len(splits[name])}
    if not chosen:
        raise ValueError(
            f"--split {args.split}: no held-out episodes left in {args.data}: train with --holdout-policies"
        )
    return chosen


def check_fit(model: WorldModel, meta: dict) -> None:
    """Raises ValueError, naming both, where checkpoint and dataset are not of one game."""
    config = model.config
    for key in ("obs_shape", "num_agents", "env_id"):
        if config[key] != meta[key]:
            raise ValueError(
                f"the checkpoint expected {key} {config[key]}, the dataset has {meta[key]}: judge it on its own game"
            )
    if config["discrete"] != (meta["num_actions"] is not None) or config["obs_dtype"] != meta["obs_dtype"]:
        raise ValueError(
            f"the checkpoint expected {config['obs_dtype']} observations and discrete={config['discrete']} actions, "
            f"the dataset has {meta['obs_dtype']} and {meta['num_actions']}: judge it on its own game"
        )


def judge(model: Any, dataset: Dataset, episodes: np.ndarray, args: Args, device: torch.device) -> dict[str, Any]:
    """Every number about one set of episodes, with what the pictures need: result, floors, drift, batch, pred."""
    meta = dataset.meta
    spec = describe_obs(meta)
    samples = Samples(dataset, device)
    rows, seats = samples.pairs(dataset.rows_of(episodes))
    chosen = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(rows))).to(device)
    chosen = chosen[: args.max_samples or None]
    rows, seats = rows[chosen], seats[chosen]
    policy_ids = torch.from_numpy(np.array(dataset.policy_ids)).to(device)
    batch = {
        "obs": samples.obs[rows, seats],
        "next_obs": samples.next_obs[rows, seats],
        "actions": samples.joint_action(rows, seats),
        "rewards": samples.rewards[rows, seats],
        "dones": samples.terminations[rows, seats],
        "policies": policy_ids[rows, seats],
        "seats": seats,
    }
    value_range = max(1.0, float(batch["next_obs"].float().abs().max()))
    physics = bool(spec.agent_planes) and not spec.window  # a window may lose sight of an entity
    pred = predict_all(model, batch["obs"], batch["actions"])
    result = {"num_samples": float(len(rows)), "value_range": value_range}
    result |= score(batch, pred, spec, value_range, physics)
    floors = {}
    for name, floor in (("copy-last", CopyLast()), ("all-zero", AllZero())):
        floor_pred = predict_all(floor, batch["obs"], batch["actions"])
        floors[name] = score(batch, floor_pred, spec, value_range, physics)
    starts = dataset.episode_starts[episodes[: args.drift_episodes or None]]
    imagined = open_loop(model, samples, torch.from_numpy(starts).to(device), "real" in spec.kinds)
    drift = imagined.pop("drift")
    result |= imagined
    for h in HORIZONS:
        if h <= len(drift):
            result[f"exact_match_{h}"], result[f"obs_mse_{h}"] = drift[h - 1][:2]
    if args.resimulate and "pursuit" in meta["env_id"]:
        result |= oracle_floor(model, meta, args.resimulate, args.seed, device)
    for name, floor in floors.items():
        result |= {f"{name}/{key}": floor[key] for key in ("obs_mse", "psnr", "exact_match", "reward_mse")}
    return {"result": result, "floors": floors, "drift": drift, "batch": batch, "pred": pred, "spec": spec}


def main(args: Args) -> int:
    """Judges; returns the exit code. ValueError: unusable arguments or data."""
    # ---- arguments
    check_limits(args, LIMITS)
    if (args.checkpoint is None) == (args.model is None):
        raise ValueError("expected either --checkpoint RUN_DIR or --model package.module:factory: give exactly one")
    limits = {}
    for limit in args.fail_under:
        name, _, value = limit.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            raise ValueError(f"--fail-under expected METRIC=NUMBER, got '{limit}': e.g. exact_match=0.999") from None

    # ---- model and data
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    dataset = load_dataset(args.data)
    meta, checkpoint, out = dataset.meta, None, args.out
    if args.checkpoint:
        checkpoint = load_checkpoint(args.checkpoint)
        model = load_world_model(args.checkpoint, device)
        check_fit(model, meta)
        print(f"Loaded model {args.checkpoint}: obs_shape={model.obs_shape}, action_dim={model.action_dim}")
        folder = Path(args.checkpoint)
        out = args.out or str((folder if folder.is_dir() else folder.parent) / "judge")
        if model.config.get("reward_target") == "td":
            print("Note: this model's reward head predicts r + gamma V(s'); Rew MSE compares it with r")
    else:
        module, _, factory = args.model.partition(":")
        try:
            model = getattr(importlib.import_module(module), factory)(meta, device)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--model expected package.module:factory, got '{args.model}' ({error})") from None
        print(f"Loaded model {args.model}: obs_shape={tuple(meta['obs_shape'])}, action_dim={meta['num_actions']}")
    print(f"Dataset {args.data}: {dataset.num_steps} env steps, {len(dataset.episode_lengths)} episodes, "
          f"{int(dataset.active.sum())} samples, inferred n_agents={dataset.num_agents}")  # fmt: skip

    # ---- judge
    results, failed = {}, []
    for split, episodes in choose_episodes(args, dataset, checkpoint).items():
        judged = judge(model, dataset, episodes, args, device)
        result, spec = judged["result"], judged["spec"]
        print_report(split, result, judged["floors"], judged["drift"], spec, meta["policies"])
        results[split] = {name: x if np.isfinite(x) else None for name, x in result.items()}
        for name, limit in limits.items():
            if name not in result:
                raise ValueError(f"--fail-under expected one of the JSON's numbers, got '{name}': e.g. exact_match=0.9")
            if not result[name] >= limit:
                failed.append(f"{split}: {name} {result[name]:.6g} < {limit:g}")
        if out:
            draw_all(
                Path(out), split, judged["batch"], judged["pred"], result, judged["drift"], spec, args.num_pictures
            )

    # ---- close
    if out:
        print(f"\npictures: {out}")
    if args.json:
        Path(args.json).write_text(json.dumps({"args": asdict(args), **results}, indent=1))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("split", "metric", "value"))
            table.writerows((split, name, x) for split, result in results.items() for name, x in result.items())
    for line in failed:
        print(f"failed   {line}")
    return 1 if failed else 0


def cli(argv: list[str] | None = None) -> int:
    """The command line: 0 judged, 1 below `--fail-under`, 2 unusable arguments or data."""
    args = tyro.cli(Args, args=argv)
    try:
        return main(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli())
