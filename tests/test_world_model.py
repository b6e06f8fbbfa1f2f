"""The world model: alignment, ego order, exits, heads and losses against hand-made numbers, resume, bad input."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import world_model as wm
from collect_data import Args as CollectArgs
from collect_data import main as collect_main
from dataset import DatasetWriter, load_dataset, make_meta
from envs import stag_hunt
from runs import UsageError, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hunt(tmp_path_factory):
    """A small 4x4 stag hunt dataset, in which prey is shot often enough to be learnt."""
    folder = tmp_path_factory.mktemp("data")
    policies = ("nearest_stag", "nearest_hare", "random")
    collect_main(CollectArgs(env_id="stag_hunt", num_steps=4000, policies=policies, data_dir=str(folder), name="hunt"))
    return folder / "hunt"


@pytest.fixture(scope="module")
def trained(hunt, tmp_path_factory):
    args = wm.Args(data=str(hunt), runs_dir=str(tmp_path_factory.mktemp("runs")), total_updates=350, batch_size=256)
    return wm.main(args)


def write_vectors(path, next_obs_of, num_agents=2, num_actions=4, dtype="uint8", episodes=60, length=10):
    """A hand-made world of vectors [3]: next_obs_of(obs [A, 3], actions [A]) -> [A, 3]; rewards a_i - a_i+1."""
    meta = make_meta("hand.made", {}, num_agents, (3,), dtype, (1,), "float32", num_actions, (), False, ["random"], 0)
    writer, rng = DatasetWriter(path, meta, num_envs=1), np.random.default_rng(0)
    for _ in range(episodes):
        obs = rng.integers(0, 4, (num_agents, 3))
        for t in range(length):
            actions = rng.integers(0, num_actions, num_agents)
            after = next_obs_of(obs, actions)
            rows = {
                "observations": obs[None],
                "next_observations": after[None],
                "states": np.zeros((1, 1)),
                "actions": actions[None],
                "rewards": (actions - np.roll(actions, -1))[None],
                "terminations": np.zeros((1, num_agents), bool),
                "truncations": np.array([t == length - 1]),
                "active": np.ones((1, num_agents), bool),
                "policy_ids": np.zeros((1, num_agents), np.int64),
            }
            writer.add(rows, rows["truncations"])
            obs = after
    return writer.close()


def load_run(run_dir):
    return load_checkpoint(run_dir, wm.CHECKPOINT_FORMAT)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def heldout(run_dir, data_path):
    dataset = load_dataset(data_path)
    args = json.loads((run_dir / "args.json").read_text())
    splits = dataset.split_episodes(args["seed"], args["heldout_fraction"], tuple(args["holdout_policies"]))
    samples = wm.Samples(dataset, CPU)
    return samples, samples.pairs(dataset.rows_of(splits["heldout_episodes"]))


def exact_match(model, samples, pairs, actions):
    next_obs, _, _ = model.step(samples.obs[pairs], actions)
    stays = ~samples.terminations[pairs]
    return (next_obs == samples.next_obs[pairs]).flatten(1).all(1)[stays].float().mean().item()


def test_shuffled_seats_and_lagged_actions_score_at_least_30_points_worse(hunt, trained):
    model = wm.load_world_model(trained)
    samples, (rows, seats) = heldout(trained, hunt)
    inner = torch.from_numpy(np.array(load_dataset(hunt).timesteps))[rows] > 0
    rows, seats = rows[inner], seats[inner]
    actions = samples.joint_action(rows, seats)
    right = exact_match(model, samples, (rows, seats), actions)
    assert right > 0.9
    assert exact_match(model, samples, (rows, seats), actions.roll(1, 1)) < right - 0.3
    assert exact_match(model, samples, (rows, seats), samples.joint_action(rows - 1, seats)) < right - 0.3


@pytest.mark.parametrize("obs_head, joint_action, learning_rate", [("mse", "onehot", 1e-2), ("bce", "attention", 3e-3)])
def test_hand_made_linear_world_is_recovered_exactly(tmp_path, obs_head, joint_action, learning_rate):
    # o_i[t+1] = (o_i[t] shifted by one, own action, the next agent's action): any misalignment shows
    def next_obs_of(obs, actions):
        return np.stack([obs[:, 1], actions, np.roll(actions, -1)], 1)

    path = write_vectors(tmp_path / "linear", next_obs_of, episodes=200)
    args = wm.Args(data=str(path), runs_dir=str(tmp_path), total_updates=500, learning_rate=learning_rate)
    run_dir = wm.main(replace(args, obs_head=obs_head, joint_action=joint_action))
    samples, (rows, seats) = heldout(run_dir, path)
    model = wm.load_world_model(run_dir)
    actions = samples.joint_action(rows, seats)
    next_obs, reward, _ = model.step(samples.obs[rows, seats], actions)
    assert (next_obs == samples.next_obs[rows, seats]).all()
    assert (reward - (actions[:, 0] - actions[:, 1])).abs().max() < 0.4  # the next value is 1 away


def test_real_numbers_are_predicted_by_their_change(tmp_path):
    def next_obs_of(obs, actions):  # channels that change little, less, and never
        changes = [0.01 * (actions - 1.5), 0.001 * (np.roll(actions, -1) - 1.5), np.zeros(2)]
        return obs + np.stack(changes, 1)

    path = write_vectors(tmp_path / "drift", next_obs_of, dtype="float32", episodes=200)
    args = wm.Args(data=str(path), runs_dir=str(tmp_path), total_updates=400, learning_rate=1e-2)
    run_dir = wm.main(args)
    config = load_run(run_dir)["config"]
    assert config["obs_head"] == "change"
    rms = 0.01 * np.sqrt(np.mean((np.arange(4) - 1.5) ** 2))  # four actions, equally often
    never = 1e-3 * config["obs_std"][2]
    assert config["obs_change"] == pytest.approx([rms, rms / 10, never], rel=0.05)
    samples, (rows, seats) = heldout(run_dir, path)
    obs, actions, target = samples.obs[rows, seats], samples.joint_action(rows, seats), samples.next_obs[rows, seats]
    untrained = wm.WorldModel(config)
    torch.testing.assert_close(untrained.step(obs, actions)[0], obs)
    error = (wm.load_world_model(run_dir).step(obs, actions)[0] - target).square().mean(0)
    unchanged = (obs - target).square().mean(0)
    assert (error[:2] < 0.05 * unchanged[:2]).all() and error[2] < 1e-6


def test_joint_action_is_ego_first_from_every_seat(hunt):
    samples = wm.Samples(load_dataset(hunt), CPU)
    rows = torch.arange(40).repeat_interleave(4)
    seats = torch.arange(4).repeat(40)
    joint = samples.joint_action(rows, seats)
    for b in range(160):
        for k in range(4):
            assert joint[b, k] == samples.actions[rows[b], (seats[b] + k) % 4]


def test_declared_channels_agree_with_the_environment(hunt):
    spec = wm.describe_obs(load_dataset(hunt).meta)
    assert spec.names == ("self", "player i+1", "player i+2", "player i+3", "blocks", "stags", "hares")
    assert spec.agent_planes == [0, 1, 2, 3]
    assert spec.hunts == {"stags": (stag_hunt.HUNT_STAG, stag_hunt.STAG_HUNTERS), "hares": (stag_hunt.HUNT_HARE, 1)}


def test_nothing_after_an_exit_or_of_an_absent_agent_reaches_a_loss(hunt, trained):
    dataset = load_dataset(hunt)
    model = wm.load_world_model(trained)
    samples = wm.Samples(dataset, CPU)
    pairs = samples.pairs(np.arange(dataset.num_steps))
    assert samples.active[pairs].all() and len(pairs[0]) == dataset.active.sum()
    pairs = (pairs[0][::5], pairs[1][::5])
    targets = wm.Targets(samples.rewards, torch.ones_like(samples.active))
    before = wm.losses_of_batch(model, None, samples, targets, pairs, 3)
    samples.next_obs[samples.terminations] = 1  # what an agent would see after its exit
    for tensor in (samples.obs, samples.next_obs, samples.rewards):
        tensor[~samples.active] = 7
    samples.terminations[~samples.active] = True
    after = wm.losses_of_batch(model, None, samples, targets, pairs, 3)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_rollout_loss_equals_a_loop_written_out(hunt, trained):
    dataset, model = load_dataset(hunt), wm.load_world_model(trained)
    samples = wm.Samples(dataset, CPU)
    rows, seats = (x[::97] for x in samples.pairs(np.arange(dataset.num_steps)))
    targets = wm.Targets(samples.rewards, torch.ones_like(samples.active))
    losses = wm.losses_of_batch(model, None, samples, targets, (rows, seats), 3)
    obs_total, obs_count, done_total, done_count = 0.0, 0, 0.0, 0
    for row, seat in zip(rows.tolist(), seats.tolist(), strict=True):
        obs = samples.obs[row, seat][None]
        for _ in range(3):
            joint = samples.actions[row][(torch.arange(4) + seat) % 4][None]
            out = model(model.to_planes(obs), joint)
            done = bool(samples.terminations[row, seat])
            p = torch.sigmoid(out["done"][0])
            done_total, done_count = done_total - (p if done else 1 - p).clamp(min=1e-12).log().item(), done_count + 1
            if not done:
                target = model.to_planes(samples.next_obs[row, seat][None])
                obs_total, obs_count = obs_total + wm.obs_loss(model, out["obs"], target).item(), obs_count + 1
            obs = model.step(obs, joint)[0]
            if done or row + 1 == dataset.num_steps or dataset.timesteps[row + 1] == 0:
                break
            row += 1
    assert losses["obs_loss"].item() == pytest.approx(obs_total / obs_count, rel=1e-4)
    assert losses["done_loss"].item() == pytest.approx(done_total / done_count, rel=1e-3, abs=1e-6)


def make_model(obs_head="categorical", **changes):
    config = {
        "env_id": "stag_hunt", "env_kwargs": {}, "obs_shape": [2, 2, 5], "obs_dtype": "uint8", "num_agents": 2,
        "action_dim": 7, "discrete": True, "has_mask": False, "levels": 1, "obs_mean": [0.0] * 5, "obs_std": [1.0] * 5,
        "hidden_size": 8, "loss": "obs", "obs_head": obs_head, "joint_action": "painted", "reward_head": "twohot",
        "reward_bins": [0.0, 1.0, 5.0],
    }  # fmt: skip
    return wm.WorldModel(config | changes)


def test_categorical_head_is_a_softmax_over_cells_and_none():
    model = make_model()
    logits = torch.zeros(1, 5, 1, 2, 2)
    logits[0, 0, 0, 1, 0] = np.log(6.0)  # cells 1, 1, 6, 1 and none 1: the third has 6 / 10
    expected = model.expected_planes(logits)
    assert expected[0, 0].flatten().tolist() == pytest.approx([0.1, 0.1, 0.6, 0.1])
    assert expected[0, 2:].flatten().tolist() == pytest.approx([0.5] * 12)
    target = torch.zeros(1, 5, 2, 2)
    target[0, 0, 1, 0] = 1  # the second agent has left: none
    loss = wm.obs_loss(model, logits, target)
    assert loss.item() == pytest.approx(-np.log(0.6) + np.log(5) + 12 * np.log(2), rel=1e-5)


def test_count_heads_against_hand_made_numbers():
    logits = torch.tensor([0.0, np.log(3.0)]).view(1, 1, 2, 1, 1)
    target = torch.full((1, 1, 1, 1), 1.0)
    changes = {"env_id": "other", "obs_shape": [1], "joint_action": "onehot", "levels": 2}
    changes |= {"obs_mean": [0.0], "obs_std": [1.0]}
    categorical, bce = make_model(**changes), make_model("bce", **changes)
    # classes 0, 1, 2 with weights 1, 1, 3
    assert categorical.expected_planes(logits).item() == pytest.approx(7 / 5)
    assert wm.obs_loss(categorical, logits, target).item() == pytest.approx(np.log(5))
    # P(at least 1) = 1/2, P(at least 2) = 3/4
    assert bce.expected_planes(logits).item() == pytest.approx(1.25)
    assert wm.obs_loss(bce, logits, target).item() == pytest.approx(np.log(2) + np.log(4))


def test_snap_keeps_an_agent_whose_every_cell_is_below_one_half():
    planes = torch.zeros(1, 5, 2, 2)
    planes[0, 0] = torch.tensor([[0.4, 0.3], [0.1, 0.1]])
    planes[0, 1] = torch.tensor([[0.2, 0.2], [0.0, 0.0]])  # more likely gone
    planes[0, 3] = torch.tensor([[0.6, 0.4], [0.0, 1.0]])
    snapped = make_model().snap(planes)
    assert snapped[0, 0].tolist() == [[1, 0], [0, 0]] and snapped[0, 1].sum() == 0
    assert snapped[0, 3].tolist() == [[1, 0], [0, 1]]


def test_two_hot_reward_loss_and_bins():
    model = make_model()  # bins 0, 1, 5
    out = torch.log(torch.tensor([[1.0, 2.0, 5.0]]))  # probabilities 1/8, 2/8, 5/8
    assert model.reward_value(out).item() == pytest.approx(0.25 + 25 / 8)
    # a target of 2 lies at a quarter of the way from 1 to 5
    loss = wm.reward_loss(model, out, torch.tensor([2.0])).item()
    assert loss == pytest.approx(-(0.75 * np.log(2 / 8) + 0.25 * np.log(5 / 8)), rel=1e-5)
    assert wm.make_reward_bins(torch.tensor([5.0, 0.0, 0.0, 1.0])) == [0.0, 1.0, 5.0]
    assert wm.make_reward_bins(torch.zeros(9)) == [0.0, 1.0]
    many = wm.make_reward_bins(torch.linspace(-3, 20, 500))
    assert len(many) == 63 and many[0] == pytest.approx(-3) and many[-1] == pytest.approx(20, rel=1e-5)
    assert sorted(many) == many


@pytest.mark.parametrize("joint_action", ["painted", "onehot", "attention"])
def test_two_hunters_do_not_look_like_one(joint_action):
    torch.manual_seed(0)
    model = make_model(joint_action=joint_action)
    planes = torch.zeros(1, 5, 2, 2)
    planes[0, :2, 0, 0] = 1
    z = model.encode(planes)
    both, one, left = (model.joint_features(z, planes, torch.tensor([a])) for a in ([5, 5], [5, 4], [5, -1]))
    assert not torch.allclose(both, one) and not torch.allclose(both, left)


def test_rollout_is_repeated_steps_and_silent_after_the_exit(hunt, trained):
    model = wm.load_world_model(trained)
    samples, pairs = heldout(trained, hunt)
    obs, horizon = samples.obs[pairs][:200], 6
    actions = samples.joint_action(*pairs)[:200, None].expand(-1, horizon, -1).clone()
    actions[::2, 2:] = 6  # hunting hares: some will have left
    imagined, rewards, dones = model.rollout(obs, actions)
    assert imagined.shape == (200, horizon, 4, 4, 7) and imagined.dtype == torch.uint8
    over = torch.zeros(200, dtype=torch.bool)
    for t in range(horizon):
        obs, reward, done = model.step(obs, actions[:, t])
        assert torch.equal(rewards[:, t], reward * ~over)
        over |= done
        obs = obs * ~over[:, None, None, None]
        assert torch.equal(imagined[:, t], obs) and torch.equal(dones[:, t], over)
    assert over.any() and not over.all() and (imagined[:, -1][over] == 0).all()


def test_action_mask_head_predicts_the_next_mask(hunt, trained):
    model, dataset = wm.load_world_model(trained), load_dataset(hunt)
    samples, (rows, seats) = heldout(trained, hunt)
    after, goes_on = samples.after(rows, seats)
    out = model.predict(samples.obs[rows, seats][goes_on], samples.joint_action(rows, seats)[goes_on])
    truth = torch.from_numpy(np.array(dataset.action_masks))[after, seats][goes_on]
    assert (out["action_mask"] == truth).float().mean() > 0.95 > (~truth).float().mean()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"obs_head": "mse", "joint_action": "onehot", "reward_head": "mse"},
        {"obs_head": "bce", "joint_action": "attention", "rollout_steps": 3},
        {"loss": "latent"},
        {"loss": "latent", "rollout_steps": 2, "obs_head": "bce"},
        {"loss": "recon", "holdout_policies": ("random",)},
    ],
)
def test_every_variant_trains(hunt, tmp_path, changes):
    args = wm.Args(data=str(hunt), runs_dir=str(tmp_path), batch_size=64, total_updates=20, eval_interval=10)
    run_dir = wm.main(replace(args, **changes))
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["update"] for row in rows] == ["10", "20"]
    assert all(np.isfinite(float(x)) for row in rows for x in row.values() if x)
    assert ("eval_policies/exact_match" in rows[0] and rows[0]["eval_policies/exact_match"] != "") == bool(
        changes.get("holdout_policies")
    )
    for name in ("best.pt", "latest.pt", "args.json", "learning_curve.png"):
        assert (run_dir / name).stat().st_size > 0
    checkpoint = load_run(run_dir)
    torch.manual_seed(args.seed)
    fresh = wm.WorldModel(checkpoint["config"]).state_dict()
    still = {name for name, x in fresh.items() if torch.equal(x, checkpoint["model"][name])}
    used = {"reward_bins", "obs_mean", "obs_std"}
    if changes.get("loss") == "recon":  # the control learns no dynamics, only what the reward and exit heads need
        used |= {"shift.weight", "shift.bias", "next_latent.weight", "next_latent.bias"}
    assert still == used


@pytest.mark.parametrize("env_id, env_kwargs", [("stag_hunt", '{"view": 3}'), ("pursuit", '{"max_cycles": 15}')])
def test_windows_that_move_with_their_agent_train(tmp_path, env_id, env_kwargs):
    args = CollectArgs(
        env_id=env_id, env_kwargs=env_kwargs, num_steps=200, num_envs=8, data_dir=str(tmp_path), name="data"
    )
    collect_main(args)
    run_dir = wm.main(
        wm.Args(data=str(tmp_path / "data"), runs_dir=str(tmp_path), batch_size=64, total_updates=150, eval_interval=50)
    )
    model = wm.load_world_model(run_dir)
    assert model.spec.window and model.config["joint_action"] == "painted"
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["eval/obs_loss"]) < 0.9 * float(rows[0]["eval/obs_loss"])


def test_actions_of_unnamed_team_mates_are_painted_as_their_mean():
    changes = {"env_id": "pursuit", "obs_shape": [3, 3, 3], "num_agents": 3, "action_dim": 5}
    model = make_model(**changes, obs_mean=[0.0] * 3, obs_std=[1.0] * 3)
    planes = torch.zeros(1, 3, 3, 3)
    planes[0, 1, 1, 1], planes[0, 1, 0, 2] = 2, 1  # self and one more in the centre, one in a corner
    painted = model.joint_features(model.encode(planes), planes, torch.tensor([[0, 2, 4]]))[0]  # [2 * 5, 3, 3]
    assert painted[:5, 1, 1].tolist() == [1, 0, 0, 0, 0] and painted[:5].sum() == 1
    for y, x in ((1, 1), (0, 2)):
        assert painted[5:, y, x].tolist() == [0, 0, 0.5, 0, 0.5]
    assert painted[5:].sum() == 2


def test_recon_control_knows_only_the_present(hunt, tmp_path):
    args = wm.Args(data=str(hunt), runs_dir=str(tmp_path), total_updates=60, batch_size=128, loss="recon")
    run_dir = wm.main(replace(args, eval_interval=10))
    model = wm.load_world_model(run_dir)
    samples, pairs = heldout(run_dir, hunt)
    obs, actions = samples.obs[pairs], samples.joint_action(*pairs)
    assert torch.equal(model.step(obs, actions)[0], model.step(obs, actions.roll(1, 0))[0])
    with open(run_dir / "metrics.csv", newline="") as file:
        losses = [float(row["losses/obs_loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0]


def with_values(dataset):
    """Values as collect_data.py --values-of would write them, each a number of its own."""
    return replace(dataset, values=np.arange(dataset.active.size, dtype=np.float32).reshape(dataset.active.shape))


def test_td_targets_bootstrap_inside_an_episode_and_stop_at_its_ends(hunt):
    dataset = with_values(load_dataset(hunt))
    targets, known = wm.td_targets(dataset, wm.Samples(dataset, CPU), 0.5)
    for row in range(0, 300):
        last = row + 1 == dataset.num_steps or dataset.timesteps[row + 1] == 0
        for seat in range(4):
            reward, ends = float(dataset.rewards[row, seat]), bool(dataset.terminations[row, seat])
            assert known[row, seat] == (ends or not last)
            if known[row, seat]:
                bootstrap = 0.0 if ends else 0.5 * (4 * (row + 1) + seat)
                assert targets[row, seat].item() == pytest.approx(reward + bootstrap)


def test_td_rewards_are_learnt_from_the_values_of_the_dataset(hunt, tmp_path, monkeypatch):
    monkeypatch.setattr(wm, "load_dataset", lambda path: with_values(load_dataset(path)))
    args = wm.Args(data=str(hunt), runs_dir=str(tmp_path), reward_target="td", batch_size=64, total_updates=5)
    run_dir = wm.main(args)
    config = load_run(run_dir)["config"]
    assert config["reward_target"] == "td" and max(config["reward_bins"]) > 1000
    assert json.loads((run_dir / "args.json").read_text())["balance_rewards"] == 0.0


def test_resume_equals_uninterrupted(hunt, tmp_path):
    args = wm.Args(data=str(hunt), runs_dir=str(tmp_path / "a"), batch_size=64, anneal_lr=False, eval_interval=10)
    args = replace(args, loss="latent", total_updates=20)
    whole = load_run(wm.main(args))
    first = wm.main(replace(args, runs_dir=str(tmp_path / "b"), total_updates=10))
    assert wm.cli(["--resume", str(first), "--total-updates", "20"]) == 0
    resumed = load_run(first)
    assert resumed["update"] == whole["update"] == 20
    for part in ("model", "target_encoder"):
        assert all(torch.equal(x, resumed[part][name]) for name, x in whole[part].items())
    with open(first / "metrics.csv", newline="") as file:
        assert [row["update"] for row in csv.DictReader(file)] == ["10", "20"]


def test_args_json_alone_repeats_a_run(hunt, tmp_path):
    args = wm.Args(data=str(hunt), runs_dir=str(tmp_path), batch_size=64, total_updates=20, eval_interval=10)
    first = wm.main(replace(args, holdout_policies=("random",)))
    content = json.loads((first / "args.json").read_text())
    assert (content["obs_head"], content["joint_action"], content["balance_rewards"]) == (
        "categorical",
        "painted",
        0.25,
    )
    second = wm.main(wm.Args(**content))
    assert second != first and json.loads((second / "args.json").read_text()) == content
    assert same_weights(load_run(first)["model"], load_run(second)["model"])
    assert load_run(first)["args"] == load_run(second)["args"]
    assert wm.cli(["--resume", str(second), "--total-updates", "21"]) == 0  # a list from JSON is no contradiction


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_resumed_run_equals_the_uninterrupted(hunt, tmp_path, monkeypatch, number):
    args = wm.Args(data=str(hunt), batch_size=64, total_updates=15, eval_interval=10)
    whole = load_run(wm.main(replace(args, runs_dir=str(tmp_path / "whole"))))
    learning_rate_at, handlers = wm.learning_rate_at, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(update, args):
        if update == 7:
            os.kill(os.getpid(), number)
        return learning_rate_at(update, args)

    monkeypatch.setattr(wm, "learning_rate_at", interrupted)
    run_dir = wm.main(replace(args, runs_dir=str(tmp_path / "stopped")))
    assert load_run(run_dir)["update"] == 7
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.undo()
    assert wm.cli(["--resume", str(run_dir)]) == 0
    resumed = load_run(run_dir)
    assert resumed["update"] == 15 and same_weights(whole["model"], resumed["model"])
    with open(run_dir / "metrics.csv", newline="") as file:
        assert [row["update"] for row in csv.DictReader(file)] == ["7", "10", "15"]


def test_best_is_written_before_latest(hunt, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(wm, "save_checkpoint", lambda checkpoint, path: written.append((path.name, checkpoint)))
    wm.main(wm.Args(data=str(hunt), runs_dir=str(tmp_path), batch_size=32, total_updates=1))
    assert [name for name, _ in written] == ["best.pt", "latest.pt"]


def test_two_starts_in_the_same_second_get_folders_of_their_own(hunt, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1e9)
    args = wm.Args(data=str(hunt), runs_dir=str(tmp_path), batch_size=32, total_updates=1)
    assert wm.main(args) != wm.main(args)
    assert len(list(tmp_path.glob("*/latest.pt"))) == 2


def test_checkpoints_of_before_resume_unless_a_critic_was_in_use(hunt, tmp_path, capsys):
    args = wm.Args(data=str(hunt), runs_dir=str(tmp_path), batch_size=64, total_updates=20, anneal_lr=False)
    whole = load_run(wm.main(args))
    run_dir = wm.main(replace(args, total_updates=10))
    checkpoint = load_run(run_dir)
    checkpoint["args"] |= {"critic": None, "obs_head": None, "joint_action": None, "balance_rewards": None}
    save_checkpoint(checkpoint, run_dir / "latest.pt")
    assert wm.cli(["--resume", str(run_dir), "--total-updates", "20"]) == 0
    assert same_weights(whole["model"], load_run(run_dir)["model"])
    checkpoint["args"] |= {"critic": "runs/critic", "reward_target": "td"}
    save_checkpoint(checkpoint, run_dir / "latest.pt")
    capsys.readouterr()
    assert wm.cli(["--resume", str(run_dir), "--total-updates", "30"]) == 2
    error = capsys.readouterr().err.strip()
    assert "--critic" in error and error.count("\n") == 0


def write_other(tmp_path):
    """Another dataset of the same game."""
    collect_main(CollectArgs(env_id="stag_hunt", num_steps=300, data_dir=str(tmp_path), name="other", cuda=False))
    return tmp_path / "other"


def test_actions_of_several_parts_are_refused(hunt, tmp_path, capsys, monkeypatch):
    def with_parts(path):
        dataset = load_dataset(path)
        return replace(dataset, meta={**dataset.meta, "nvec": [3, 2]})

    monkeypatch.setattr(wm, "load_dataset", with_parts)
    assert wm.cli(["--data", str(hunt), "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "[3, 2] of several parts" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_finished_run_does_its_closing_part_again(trained, tmp_path, capsys):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    (run_dir / "learning_curve.png").unlink()
    assert wm.cli(["--resume", str(run_dir)]) == 0
    assert "exact_match" in capsys.readouterr().out and (run_dir / "learning_curve.png").stat().st_size > 0
    assert same_weights(load_run(run_dir)["model"], load_run(trained)["model"])


def test_data_may_have_moved(hunt, tmp_path):
    args = wm.Args(data=str(hunt), runs_dir=str(tmp_path), batch_size=32, total_updates=2)
    run_dir = wm.main(args)
    moved = shutil.copytree(hunt, tmp_path / "elsewhere")
    assert wm.cli(["--resume", str(run_dir), "--data", str(moved), "--total-updates", "4"]) == 0
    assert load_run(run_dir)["update"] == 4 and load_run(run_dir)["args"]["data"] == str(moved)


def test_a_second_writer_is_refused(trained, tmp_path, capsys):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    program = (
        "import sys, runs, pathlib; runs.keep_folder(pathlib.Path(sys.argv[1]), ''); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(run_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        other.stdout.readline()
        assert wm.cli(["--resume", str(run_dir), "--total-updates", "900"]) == 2
        other.communicate(b"\n")
    assert "another process is writing" in capsys.readouterr().err


# ---------------------------------------------------------------- the same in fewer operations


def test_tables_step_as_the_layers_do(trained, hunt):
    fast = wm.load_world_model(trained)
    assert fast.simulator
    slow = wm.WorldModel(fast.config)
    slow.load_state_dict(fast.state_dict())
    slow.eval()
    samples = wm.Samples(load_dataset(hunt), CPU)
    rows, seats = samples.pairs(np.arange(2000))
    obs, actions = samples.obs[rows, seats], samples.joint_action(rows, seats)
    actions[::7, 1] = -1
    nothing = torch.zeros_like(obs[:1])  # as after an exit
    obs, actions = torch.cat([obs, nothing]), torch.cat([actions, actions[:1]])
    expected = slow.step(obs, actions)
    found = fast.step(obs, actions)
    assert (actions == -1).any() and expected[2].any()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-4)
    assert torch.equal(fast.legal(obs), slow.legal(obs))
    with pytest.raises(ValueError, match="expected obs"):
        fast.step(obs[:, :2], actions)


def test_only_models_that_tables_know_are_stepped_by_them(trained):
    model = wm.load_world_model(trained)
    assert wm.Simulator.fits(model)
    for change in ({"joint_action": "onehot"}, {"loss": "latent"}, {"obs_head": "bce"}, {"hidden_size": 65}):
        assert not wm.Simulator.fits(wm.WorldModel({**model.config, **change}))
    with_view = {**model.config, "env_kwargs": {"view": 3}, "obs_shape": [3, 3, 7]}
    assert not wm.Simulator.fits(wm.WorldModel(with_view))


def test_an_error_of_the_program_is_a_traceback(hunt, tmp_path, monkeypatch):
    def broken(*args):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr(wm, "obs_loss", broken)
    with pytest.raises(ValueError, match="shapes do not fit"):
        wm.cli(["--data", str(hunt), "--runs-dir", str(tmp_path), "--total-updates", "1"])


def test_same_seed_same_weights_other_seed_others(hunt, tmp_path):
    args = wm.Args(data=str(hunt), batch_size=64, total_updates=5)
    runs = [
        wm.main(replace(args, runs_dir=str(tmp_path / name), seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = (load_run(run)["model"] for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["move.weight"], c["move.weight"])


def test_minibatches_draw_rare_rewards_as_often_as_common_ones():
    rewards = torch.zeros(1000, 2)
    rewards[0] = torch.tensor([5.0, 0.0])  # one step in 1,000 pays 5, and nine pay 1, to the first agent
    rewards[1:10, 0] = 1
    rows, seats = torch.arange(1000).repeat_interleave(2), torch.arange(2).repeat(1000)
    names = {(5.0, 5.0): 0, (0.0, 5.0): 1, (1.0, 1.0): 2, (0.0, 1.0): 3, (0.0, 0.0): 4}  # own, the most anybody gets
    for balanced, expected in ((1.0, [0.2] * 5), (0.5, [0.1, 0.1, 0.1, 0.1, 0.6]), (0.0, [0, 0, 0, 0, 1.0])):
        pairs = wm.Pairs(rows, seats)
        minibatches = wm.Minibatches(rewards, pairs, [0.0, 1.0, 5.0], balanced, 20_000, seed=0)
        drawn = minibatches.draw()
        own, most = rewards[rows[drawn], seats[drawn]], rewards[rows[drawn]].amax(1)
        groups = torch.tensor([names[pair] for pair in zip(own.tolist(), most.tolist(), strict=True)])
        shares = groups.bincount(minlength=5) / len(drawn)
        assert len(drawn) == 20_000 and shares.tolist() == pytest.approx(expected, abs=0.015)
        zero_steps = rows[drawn][groups == 4]
        assert len(zero_steps.unique()) > 900  # inside a group all samples are drawn


def test_what_agent_i_is_paid_is_read_on_its_own_cell():
    torch.manual_seed(0)
    model = make_model()
    planes = torch.zeros(1, 5, 2, 2)
    planes[0, 0, 0, 0] = planes[0, 1, 1, 1] = planes[0, 3, 0, 0] = 1  # self on a stag, the other one elsewhere
    shown = []
    model.reward_head[0].register_forward_hook(lambda layer, inputs, out: shown.append(inputs[0][0, -19:]))
    model(planes, torch.tensor([[5, 5]]))
    planes[0, 1] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    model(planes, torch.tensor([[5, 5]]))
    hunt, rest = [0.0] * 5 + [1.0, 0.0], [0.0] * 7
    assert shown[0].tolist() == [1, 0, 0, 1, 0] + hunt + rest  # planes, own action, the other's
    assert shown[1].tolist() == [1, 1, 0, 1, 0] + hunt + hunt


def test_an_evaluation_looks_at_no_more_than_eval_samples(hunt, tmp_path, capsys):
    wm.main(wm.Args(data=str(hunt), runs_dir=str(tmp_path), batch_size=32, total_updates=1, eval_samples=50))
    assert "evaluated on heldout_episodes 50," in capsys.readouterr().out


def test_max_samples_takes_whole_episodes_of_the_training_split(hunt, tmp_path, capsys):
    wm.main(wm.Args(data=str(hunt), runs_dir=str(tmp_path), batch_size=32, total_updates=1, max_samples=500))
    printed = capsys.readouterr().out
    taken = int(printed.split("env steps")[0].split()[-1].replace(",", ""))
    assert 500 <= taken < 535


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--data expected a dataset folder"),
        (["--data", "nowhere"], "expected a dataset"),
        (["--data", "DATA", "--holdout-policies", "nobody"], "'nobody'"),
        (["--data", "DATA", "--holdout-policies", "random", "nearest_stag", "nearest_hare"], "episodes are left"),
        (["--data", "DATA", "--total-updates", "0"], "--total-updates must be at least 1"),
        (["--data", "DATA", "--eval-samples", "0"], "--eval-samples must be at least 1"),
        (["--data", "DATA", "--balance-rewards", "1.5"], "from 0 to 1, got 1.5"),
        (["--data", "DATA", "--max-grad-norm", "0"], "--max-grad-norm must be more than 0"),
        (["--data", "DATA", "--reward-target", "td"], "--values-of"),
        (["--data", "DATA", "--loss", "recon", "--rollout-steps", "2"], "no dynamics"),
        (["--data", "CUT"], "truncated"),
        (["--resume", "nowhere"], "no checkpoint"),
        (["--resume", "RUN", "--hidden-size", "64"], "contradicts"),
        (["--resume", "FILE", "--total-updates", "900"], "expected a run folder"),
        (["--resume", "RUN", "--total-updates", "900", "--data", "OTHER"], "is not the data that"),
        (["--resume", "RUN", "--total-updates", "900", "--data", "nowhere"], "expected a dataset"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(hunt, trained, tmp_path, capsys, flags, message):
    shutil.copytree(hunt, tmp_path / "cut")
    file = tmp_path / "cut" / "observations.npy"
    file.write_bytes(file.read_bytes()[:-100])
    names = {"DATA": str(hunt), "RUN": str(trained), "CUT": str(tmp_path / "cut")}
    names["OTHER"] = str(write_other(tmp_path) if "OTHER" in flags else "")
    names["FILE"] = str(trained / "latest.pt")
    args_before = (trained / "args.json").read_text()
    assert wm.cli([names.get(flag, flag) for flag in flags] + ["--runs-dir", str(tmp_path / "runs")]) == 2
    assert not (tmp_path / "runs").exists() and (trained / "args.json").read_text() == args_before
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0 and error.startswith("error: ")


def test_painted_actions_need_agent_planes_and_classes_need_small_counts(tmp_path, capsys):
    path = write_vectors(tmp_path / "data", lambda obs, actions: obs, dtype="float32", episodes=5)
    for flags, message in (
        (["--joint-action", "painted"], "planes that show agents"),
        (["--obs-head", "categorical"], "real numbers"),
        (["--obs-head", "change", "--loss", "latent"], "expected real-valued observations and --loss obs"),
    ):
        assert wm.cli(["--data", str(path), "--runs-dir", str(tmp_path), *flags]) == 2
        assert message in capsys.readouterr().err


def test_step_names_both_shapes_for_a_foreign_observation(trained):
    model = wm.load_world_model(trained)
    with pytest.raises(UsageError, match="no checkpoint"):
        wm.load_world_model("nowhere")
    with pytest.raises(ValueError, match=r"4, 4, 7.*\[3, 8, 8, 7\]"):
        model.step(torch.zeros(3, 8, 8, 7, dtype=torch.uint8), torch.zeros(3, 4, dtype=torch.int64))


def test_a_loss_that_blows_up_stops_the_run(hunt, tmp_path, capsys):
    flags = ["--data", str(hunt), "--runs-dir", str(tmp_path), "--learning-rate", "1e30", "--batch-size", "32"]
    assert wm.cli([*flags, "--total-updates", "30", "--eval-interval", "5"]) == 1
    assert "last good checkpoint" in capsys.readouterr().err
