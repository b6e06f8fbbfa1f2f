"""The judge: PSNR and physics on hand-made cases, a perfect model, the floors, the oracle, exit codes."""

import csv
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import test_obs_reward_model as judge
import world_model as wm
from collect_data import Args as CollectArgs
from collect_data import main as collect_main
from dataset import load_dataset
from envs import ObsSpec
from envs.stag_hunt import StagHuntVecEnv, preset_options

CPU = torch.device("cpu")
META = {"env_id": "stag_hunt", "env_kwargs": {}, "obs_shape": [3, 3, 5], "obs_dtype": "uint8", "num_agents": 2}
SPEC = wm.describe_obs(META)  # planes: self, player i+1, blocks, stags, hares
STAY, HUNT_STAG, HUNT_HARE = 4, 5, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for env_id, policies in (("stag_hunt", ("nearest_stag", "nearest_hare", "random")), ("pursuit", ("random",))):
        kwargs = "{}" if env_id == "stag_hunt" else '{"max_cycles": 20}'
        steps = 1500 if env_id == "stag_hunt" else 200
        collect_main(
            CollectArgs(
                env_id=env_id,
                env_kwargs=kwargs,
                num_steps=steps,
                num_envs=16,
                policies=policies,
                data_dir=str(folder),
                name=env_id,
            )
        )
    return folder


class EnvBehindStep:
    """The game itself as a model: puts agent i's view on the board as seat 0, steps, and looks."""

    def __init__(self, meta, device):
        self.options = preset_options(meta["env_id"]) | meta["env_kwargs"]

    def step(self, obs, joint_action):
        options, planes = self.options, obs.permute(0, 3, 1, 2).flatten(2)  # [B, P, H * W]
        A, prey = options["num_players"], (options["num_stags"], options["num_hares"])
        cells, alive = [], []
        for view in planes.tolist():
            free = [c for c in range(len(view[0])) if not any(plane[c] for plane in view[A:])]
            where, there = [], []
            for plane, most in zip(view, (*[1] * A, 0, *prey), strict=True):
                found = [c for c, x in enumerate(plane) if x]
                there += [True] * len(found) + [False] * (most - len(found))
                where += found + [free.pop() for _ in range(most - len(found))]
            cells.append(where)
            alive.append(there)
        env = StagHuntVecEnv(len(obs), "cpu", 0, **options)
        env.set_positions(torch.tensor(cells), torch.tensor(alive))
        after = env.step(torch.where(joint_action < 0, STAY, joint_action))
        return after.final_obs[:, 0], after.rewards[:, 0], after.terminations[:, 0]


def copy_last(meta, device):
    return judge.CopyLast()


def test_the_game_itself_scores_everything_and_breaks_no_law(data):
    dataset = load_dataset(data / "stag_hunt")
    episodes = np.arange(len(dataset.episode_lengths))
    result = judge.judge(EnvBehindStep(dataset.meta, CPU), dataset, episodes, judge.Args(drift_episodes=30), CPU)
    result = result.result
    ones = [k for k in result if k.startswith(("exact_match", "reward_accuracy", "exit_", "seat")) and "mse" not in k]
    ones += ["physics_ok", "whole_episode", "whole_episode_with_rewards_and_exits"]
    assert all(result[name] == 1.0 for name in ones) and len(ones) > 20
    assert result["obs_mse"] == result["reward_mse"] == result["physics/vanish"] == 0.0
    assert result["psnr"] == judge.MAX_PSNR


def test_copy_last_scores_exactly_the_printed_floor(data, tmp_path, capsys):
    flags = [
        "--model",
        f"{__name__}:copy_last",
        "--data",
        str(data / "stag_hunt"),
        "--json",
        str(tmp_path / "out.json"),
    ]
    flags += ["--csv", str(tmp_path / "out.csv")]
    assert judge.cli(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    floors = {line.split("  ")[1].strip(): line.split()[-4:] for line in lines if line.startswith(("  copy", "  this"))}
    assert floors["copy-last"] == floors["this model"] and len(floors) == 2
    result = json.loads((tmp_path / "out.json").read_text())["all"]
    dataset = load_dataset(data / "stag_hunt")
    stays = dataset.active & ~dataset.terminations
    same = (dataset.observations == dataset.next_observations).reshape(*stays.shape, -1).all(2)
    assert result["exact_match"] == result["copy-last/exact_match"] == pytest.approx(same[stays].mean(), abs=1e-6)
    assert result["reward_mse"] == pytest.approx(np.square(dataset.rewards[dataset.active]).mean(), rel=1e-5)
    assert result["exit_recall"] == 0.0 and result["exit_precision"] is None
    with open(tmp_path / "out.csv", newline="") as file:
        rows = {row["metric"]: row["value"] for row in csv.DictReader(file)}
    assert float(rows["obs_mse"]) == result["obs_mse"]
    order = ["Loaded model", "Dataset", "=== Metrics ===", "Obs  MSE (mean over B,C,H,W)", "Obs  PSNR", "Rew  MSE"]
    order += ["Per-channel MSE", "Exact match"]
    found = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert found == sorted(found) and "n_agents=4" in lines[found[1]]


def test_the_range_of_psnr_is_from_the_lowest_to_the_highest_value(data, monkeypatch):
    dataset = load_dataset(data / "stag_hunt")
    args = judge.Args(max_samples=200, drift_episodes=1)
    real = judge.make_batch

    def stretched(*args):  # from -5 to 5
        batch = real(*args)
        return batch | {"next_obs": 10 * batch["next_obs"].float() - 5}

    monkeypatch.setattr(judge, "make_batch", stretched)
    result = judge.judge(judge.CopyLast(), dataset, np.arange(4), args, CPU).result
    assert result["value_range"] == 10.0
    assert result["psnr"] == pytest.approx(10 * math.log10(100 / result["obs_mse"]), rel=1e-5)


def test_psnr_is_pooled_and_its_range_counts():
    assert judge.psnr(torch.tensor(0.01), 1.0).item() == pytest.approx(20.0)
    assert judge.psnr(torch.tensor(0.01), 10.0).item() == pytest.approx(40.0)
    assert judge.psnr(torch.tensor(0.0), 1.0).item() == judge.MAX_PSNR
    batch = make_batch(torch.zeros(2, 3, 3, 5), torch.zeros(2, 3, 3, 5))
    expected = torch.zeros(2, 3, 3, 5)
    expected[0] = 0.1  # one sample of MSE 0.01, one of 0
    pred = {"pred_obs": batch["next_obs"], "expected_obs": expected}
    pred |= {"pred_rewards": torch.tensor([0.0, -0.5]), "pred_dones": torch.tensor([True, False])}
    result = judge.score(batch, pred, SPEC, 1.0, True)
    assert result["obs_mse"] == pytest.approx(0.005)
    assert result["psnr"] == pytest.approx(10 * math.log10(1 / 0.005), rel=1e-5)
    assert result["psnr_mean_over_samples"] == pytest.approx((20 + judge.MAX_PSNR) / 2, rel=1e-5)
    assert result["reward_mse"] == pytest.approx(0.125) and result["reward_mse/zero"] == pytest.approx(0.125)
    assert result["reward_accuracy"] == 0.5 and result["exit_precision"] == 0.0


def make_batch(obs, next_obs):
    B = len(obs)
    zeros = torch.zeros(B, dtype=torch.int64)
    batch = {"obs": obs, "next_obs": next_obs, "actions": torch.full((B, 2), STAY), "rewards": torch.zeros(B)}
    return batch | {"dones": torch.zeros(B, dtype=torch.bool), "seats": zeros, "policies": zeros}


def test_exits_are_left_out_of_what_is_seen_but_not_of_rewards():
    batch = make_batch(torch.zeros(2, 3, 3, 5), torch.zeros(2, 3, 3, 5))
    batch["dones"][0], batch["rewards"][0] = True, 5.0
    pred = {"pred_obs": torch.ones(2, 3, 3, 5), "pred_rewards": torch.zeros(2), "pred_dones": batch["dones"]}
    pred["pred_obs"][1] = 0
    result = judge.score(batch, pred | {"expected_obs": pred["pred_obs"]}, SPEC, 1.0, True)
    assert result["exact_match"] == 1.0 and result["obs_mse"] == 0.0
    assert result["reward_mse"] == 12.5 and result["reward_mse/nonzero"] == 25.0
    assert result["exit_precision"] == result["exit_recall"] == 1.0


def board(**planes):
    """One observation [1, P, 3, 3] from cells by name: self, other, blocks, stags, hares."""
    x = torch.zeros(1, 5, 9)
    for name, cells in planes.items():
        x[0, ["me", "other", "blocks", "stags", "hares"].index(name), list(cells)] = 1
    return x.view(1, 5, 3, 3)


@pytest.mark.parametrize(
    "before, actions, after, broken",
    [
        # cells 0 1 2 / 3 4 5 / 6 7 8
        ({"me": [0], "other": [8]}, [1, 2], {"me": [3], "other": [7]}, set()),
        ({"me": [0], "other": [8]}, [1, 2], {"me": [6], "other": [7]}, {"jump"}),
        ({"me": [0]}, [3, -1], {"me": [4]}, {"jump"}),  # a diagonal is two cells
        ({"me": [2]}, [3, -1], {"me": [3]}, {"jump"}),  # the next row is no neighbour
        ({"me": [0]}, [4, -1], {"me": [0], "other": [4]}, {"appear"}),
        ({"me": [0], "other": [8]}, [4, 4], {"me": [0]}, {"vanish"}),
        ({"me": [0], "other": [8]}, [4, 4], {"me": [0], "other": [7, 8]}, {"double"}),
        ({"me": [0], "other": [4], "hares": [4]}, [4, HUNT_HARE], {"me": [0]}, set()),
        ({"me": [0], "other": [4], "hares": [5]}, [4, HUNT_HARE], {"me": [0]}, {"vanish"}),  # a hunt beside the hare
        ({"me": [4], "other": [4], "stags": [4]}, [HUNT_STAG, HUNT_STAG], {}, set()),
        ({"me": [0], "other": [4], "stags": [4]}, [4, HUNT_STAG], {"me": [0]}, {"vanish"}),  # alone
        ({"me": [4], "other": [4], "stags": [4]}, [HUNT_STAG, STAY], {"me": [4], "other": [4]}, {"vanish"}),
        ({"me": [0], "hares": [4, 5]}, [4, -1], {"me": [0], "hares": [4]}, {"vanish"}),
        ({"me": [0], "hares": [4]}, [4, -1], {"me": [0], "hares": [4, 5]}, {"appear"}),
        ({"me": [0], "blocks": [4]}, [4, -1], {"me": [0]}, {"vanish"}),
        ({"me": [0], "blocks": [4]}, [4, -1], {"me": [0], "blocks": [5]}, {"vanish", "appear"}),
    ],
)
def test_physics_on_hand_made_boards(before, actions, after, broken):
    found = judge.physics_violations(board(**before), torch.tensor([actions]), board(**after), SPEC)
    assert {name for name, x in found.items() if x.item() and name != "any"} == broken
    assert found["any"].item() == bool(broken)


def test_open_loop_drift_of_a_model_that_fails_at_one_step(data):
    """Perfect until each rollout's third step, then one cell is wrong for good."""
    dataset = load_dataset(data / "stag_hunt")

    class FailsAtThree(EnvBehindStep):
        calls = 0

        def step(self, obs, joint_action):
            self.calls += 1
            next_obs, rewards, dones = super().step(obs, joint_action)
            if self.calls >= 3:
                next_obs = next_obs.clone()
                next_obs[:, 0, 0, 4] = 1  # a block from nowhere, drawn after the step: nobody is stopped by it
            return next_obs, rewards, dones

    class Unblocked(FailsAtThree):
        def step(self, obs, joint_action):
            obs = obs.clone()
            obs[..., 4] = 0
            return super().step(obs, joint_action)

    samples = wm.Samples(dataset, CPU)
    starts = torch.from_numpy(dataset.episode_starts[:20])
    result = judge.open_loop(Unblocked(dataset.meta, CPU), samples, starts, False)
    assert [step[0] for step in result["drift"][:2]] == [1.0, 1.0]
    assert all(step[0] == 0.0 for step in result["drift"][2:])
    assert all(step[1] == pytest.approx(1 / 112) for step in result["drift"][2:])
    lengths = [
        next((t for t in range(s, e) if dataset.terminations[t, a]), e) - s
        for s, e in zip(dataset.episode_starts[:20], dataset.episode_starts[1:21], strict=True)
        for a in range(4)
    ]  # steps that end in an observation
    assert result["whole_episode"] == pytest.approx(np.mean([n < 3 for n in lengths]))
    assert [step[2] for step in result["drift"]] == [sum(n > t for n in lengths) for t in range(max(lengths))]


def test_oracle_floor_is_what_is_random_and_nothing_else(data):
    meta = load_dataset(data / "pursuit").meta
    frozen = dict(meta, env_kwargs={"freeze_evaders": True})
    result = judge.oracle_floor(judge.CopyLast(), frozen, 3, 0, CPU)
    assert all(x == 0 for name, x in result.items() if name.endswith("oracle"))
    result = judge.oracle_floor(judge.CopyLast(), meta, 16, 0, CPU)
    assert result["floor/all/walls/oracle"] == result["floor/all/pursuers/oracle"] == 0.0
    assert 0.05 < result["floor/all/evaders/oracle"] < result["floor/all/evaders/ours"]
    # The rules written out for one view: walls are certain, evaders as random as they really are.
    assert result["floor/interior/walls/view rules"] == pytest.approx(0, abs=1e-12)
    rules, oracle = (result[f"floor/interior/evaders/{name}"] for name in ("view rules", "oracle"))
    assert oracle * 0.97 < rules < oracle * 1.05


def test_what_is_resimulated_is_what_the_env_declares(data, monkeypatch):
    dataset, args = load_dataset(data / "pursuit"), judge.Args(resimulate=2, max_samples=50, drift_episodes=2)
    result = judge.judge(judge.CopyLast(), dataset, np.arange(4), args, CPU).result
    assert "floor/all/mean/oracle" in result and "floor/interior/mean/view rules" in result
    channels = ("channel 0", "channel 1", "channel 2")
    monkeypatch.setattr(judge, "describe_obs", lambda meta: replace(wm.describe_obs(meta), names=channels))
    result = judge.judge(judge.CopyLast(), dataset, np.arange(4), args, CPU).result
    assert "floor/all/channel 0/oracle" in result and not any(name.endswith("view rules") for name in result)
    monkeypatch.setattr(judge, "describe_obs", lambda meta: replace(wm.describe_obs(meta), resimulates=False))
    result = judge.judge(judge.CopyLast(), dataset, np.arange(4), args, CPU).result
    assert not any(name.startswith("floor/") for name in result)


def test_an_error_of_the_program_is_a_traceback(data, trained, monkeypatch):
    def wrong(*args):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr(judge, "score", wrong)
    with pytest.raises(ValueError, match="shapes do not fit"):
        judge.cli(["--checkpoint", str(trained), "--data", str(data / "stag_hunt")])


def test_view_rules_on_a_hand_made_view():
    obs = torch.zeros(1, 7, 7, 3)
    obs[0, 3, 3, 1] = 1  # self
    obs[0, 3, 5, 1] = 1  # a team mate two cells to the right (+x)
    obs[0, 4, 5, 0] = 1  # the wall below it (+y)
    # own action 1 = (+1, 0) in (x, y); the team mate's 2 = (0, +1) is blocked
    expected = judge.ViewOracle().predict(obs, torch.tensor([[1, 2]]))["expected_obs"][0]
    assert expected[3, 3, 1] == 1 and expected[3, 4, 1] == 1 and expected[..., 1].sum() == 2
    assert expected[4, 4, 0] == 1 and expected[..., 0].sum() == 1


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    args = wm.Args(data=str(data / "stag_hunt"), runs_dir=str(tmp_path_factory.mktemp("runs")), total_updates=30)
    return wm.main(args)


def test_checkpoint_is_judged_on_what_its_training_held_out(data, trained, tmp_path, capsys):
    flags = ["--checkpoint", str(trained), "--data", str(data / "stag_hunt"), "--json", str(tmp_path / "out.json")]
    assert judge.cli([*flags, "--fail-under", "exact_match=0.0", "obs_mse=0"]) == 0
    assert judge.cli([*flags, "--fail-under", "exact_match=1.0"]) == 1
    assert "failed   heldout_episodes: exact_match" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    splits = load_dataset(data / "stag_hunt").split_episodes(1, 0.1)
    active = load_dataset(data / "stag_hunt").active
    rows = load_dataset(data / "stag_hunt").rows_of(splits["heldout_episodes"])
    assert (
        report.keys() == {"args", "heldout_episodes"}
        and report["heldout_episodes"]["num_samples"] == active[rows].sum()
    )
    for name in ("triplets", "worst", "drift_and_channels"):
        assert (trained / "judge" / f"heldout_episodes_{name}.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "HUNT"], "exactly one"),
        (["--data", "HUNT", "--checkpoint", "RUN", "--num-pictures", "-1"], "--num-pictures must be at least 1"),
        (["--data", "PURSUIT", "--checkpoint", "RUN"], "[4, 4, 7], the dataset has [7, 7, 3]"),
        (["--data", "nowhere", "--checkpoint", "RUN"], "expected a dataset"),
        (["--data", "HUNT", "--checkpoint", "nowhere"], "no checkpoint"),
        (["--data", "HUNT", "--checkpoint", "RUN", "--split", "heldout_policies"], "no held-out episodes left"),
        (["--data", "HUNT", "--checkpoint", "RUN", "--fail-under", "exact_match"], "METRIC=NUMBER"),
        (["--data", "HUNT", "--checkpoint", "RUN", "--fail-under", "exact_match=nan"], "METRIC=NUMBER"),
        (["--data", "HUNT", "--checkpoint", "RUN", "--json", __file__ + "/a.json"], "cannot write the folder"),
        (["--data", "HUNT", "--checkpoint", "RUN", "--csv", str(Path(__file__).parent)], "is a folder: name a file"),
        (["--data", "HUNT", "--model", "no.such:thing"], "package.module:factory"),
        (["--data", "HUNT", "--model", f"{__name__}:broken"], "NaN"),
        (["--data", "HUNT", "--model", f"{__name__}:misshapen"], "expected to return next_obs"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(data, trained, capsys, flags, message):
    names = {"HUNT": str(data / "stag_hunt"), "PURSUIT": str(data / "pursuit"), "RUN": str(trained)}
    assert judge.cli([names.get(flag, flag) for flag in flags]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0 and error.startswith("error: ")


def test_an_unknown_number_is_found_before_anything_is_judged(data, trained, capsys, monkeypatch):
    monkeypatch.setattr(judge, "print_report", lambda *args: pytest.fail("was judged"))
    flags = ["--data", str(data / "stag_hunt"), "--checkpoint", str(trained), "--fail-under"]
    assert judge.cli([*flags, "exact_match=1", "exakt_match=1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: --fail-under expected one of the JSON's numbers, got 'exakt_match', like exact_match"
    )
    known = ["exact_match_10", "seat 3/obs_mse", "policy 2/exact_match", "channel_mse/stags", "copy-last/psnr"]
    dataset = load_dataset(data / "stag_hunt")
    judge.refuse_unknown(dict.fromkeys(known, 0.0), dataset, judge.Args(), CPU)


def test_what_is_written_gets_its_folders(data, tmp_path):
    out = tmp_path / "a" / "b"
    flags = ["--data", str(data / "stag_hunt"), "--model", f"{__name__}:copy_last", "--max-samples", "100"]
    flags += ["--json", str(out / "x.json"), "--csv", str(out / "c" / "x.csv"), "--out", str(out / "pictures")]
    assert judge.cli(flags) == 0
    assert json.loads((out / "x.json").read_text())["all"]["num_samples"] == 100
    assert (out / "c" / "x.csv").read_text().startswith("split,metric,value")
    assert (out / "pictures" / "all_triplets.png").stat().st_size > 1000


def broken(meta, device):
    class Broken(judge.CopyLast):
        def step(self, obs, joint_action):
            return obs.float() * math.nan, *super().step(obs, joint_action)[1:]

    return Broken()


def misshapen(meta, device):
    class Misshapen(judge.CopyLast):
        def step(self, obs, joint_action):
            return obs[:, :2], *super().step(obs, joint_action)[1:]

    return Misshapen()


def test_real_numbers_are_not_called_exact(capsys):
    result = defaultdict(float)
    judge.print_one_step(result, ObsSpec(names=("speed", "height"), kinds=("real", "real")))
    printed = capsys.readouterr().out
    assert "Right to 0.001" in printed and "Exact match" not in printed
    judge.print_one_step(result, SPEC)
    assert "Exact match" in capsys.readouterr().out
