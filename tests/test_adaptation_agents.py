"""The adaptation benchmark's agents: what is made before what, what is played once, the tables, the probe."""

import csv
from dataclasses import replace

import pytest
import torch

from benchmark import adaptation_agents, adaptation_probe
from benchmark.adaptation import SETTINGS, Setting, alike, play, small_hunt
from benchmark.adaptation_agents import (
    AGENTS,
    COLUMNS,
    JOBS,
    PLANNERS,
    Args,
    Place,
    append,
    as_played,
    as_table,
    check_args,
    first_with,
    is_played,
    jobs_of,
    main,
    needed,
)
from benchmark.adaptation_probe import Told, balanced_accuracy, on_the_stag_together, samples
from benchmark.plot import mean_and_interval
from envs.stag_hunt import HUNT_STAG, StagHuntVecEnv
from runs import UsageError

GAP = SETTINGS["4x4-2p1h-T10-1to3"]


def row(agent, seed, mix, mean, env_steps=0):
    values = [GAP.name, agent, env_steps, seed, mix, 100, seed, mean, 0.1, "a machine", "2026-01-01"]
    return {name: str(value) for name, value in zip(COLUMNS, values, strict=True)}


def test_what_is_needed_is_made_first_and_once():
    names = [job.name for job in needed([*jobs_of("last-layer, z"), *jobs_of("one-step")])]
    assert names == ["data", "opponents", "last-layer, z", "world model", "self-play"]
    assert jobs_of("tries") == [] and jobs_of("rollout, true world") == ["opponents"]
    for agent in AGENTS:
        assert all(name in JOBS for name in jobs_of(agent))
    assert len(set(AGENTS)) == len(AGENTS) and PLANNERS.keys() <= set(AGENTS)


def test_commands_are_those_of_the_setting(tmp_path):
    place = Place(Args(runs_dir=tmp_path, env_steps=1234), GAP, 7)
    words = place.command(JOBS["full"])
    flags = dict(zip(words, words[1:], strict=False))
    assert words[0] == "hyper_mappo.py" and flags["--seed"] == "7" and flags["--total-timesteps"] == "1234"
    assert flags["--chunk-length"] == flags["--num-steps"] == "10"  # an episode
    assert flags["--partners"] == "same=nearest_stag*1,waits_at_stag*3:1" and flags["--hyper"] == "full"
    assert flags["--env-kwargs"] == '{"height": 4, "width": 4, "num_players": 2, "num_hares": 1, "max_cycles": 10}'
    # What is held out is in no recording that those models learn from, what is known in all of them.
    for name, held_out in (("data", False), ("data, held out", True)):
        words = " ".join(place.command(JOBS[name]))
        assert ("waits_at_stag" in words) != held_out and "same=nearest_stag" in words
    hares = Place(Args(runs_dir=tmp_path), SETTINGS["4x4-2p1h-T10-1to3-nearest_hare"], 7)
    words = " ".join(hares.command(JOBS["data, held out"]))
    assert "--policies nearest_stag random --partners same=nearest_stag,random,waits_at_stag:1 --seed 7" in words
    assert "--partners same=nearest_stag,nearest_hare:1" in " ".join(hares.command(JOBS["data"]))
    mixed = Place(Args(runs_dir=tmp_path), SETTINGS["4x4-4p4h-mixed"], 7)
    assert "--partners same=nearest_stag,nearest_hare,random:3" in " ".join(mixed.command(JOBS["data"]))
    assert JOBS["opponents, held out"].needs == ("data, held out",)
    folder = place.folder("data")
    folder.mkdir(parents=True)
    (folder / "done.txt").write_text("/x/made here")
    assert "/x/made here" in place.command(JOBS["opponents"])


def test_tables_are_means_mean_and_interval():
    assert mean_and_interval([1.0]) == "1.00"
    assert mean_and_interval([1.0, 3.0]) == "2.00 ± 12.71"  # Student's t of one degree of freedom
    rows = [
        row("delta", 1, "nearest_stag:1", 5.0, 500),
        row("delta", 1, "waits_at_stag:1", 1.0, 500),
        row("delta", 2, "nearest_stag:1", 4.0, 500),
        row("delta", 2, "waits_at_stag:1", 1.0, 500),
        row("delta", 3, "nearest_stag:1", 0.0, 500),  # the other partner is still to come
        row("delta", 1, "nearest_stag:1", 3.0, 900),
        row("delta", 1, "waits_at_stag:1", 0.0, 900),
    ]
    lines = as_table(GAP, rows).splitlines()
    assert lines[2:] == [
        "| delta | 500 | 2 | 4.50 ± 6.35 | 1.00 ± 0.00 | 1.88 ± 1.59 |",
        "| delta | 900 | 1 | 3.00 | 0.00 | 0.75 |",
    ]


def test_what_has_a_row_is_known(tmp_path):
    path = tmp_path / "results" / "rows.csv"
    append(path, COLUMNS, row("delta", 1, "nearest_stag:1", 5.0, 500))
    append(path, COLUMNS, row("tries", 1, "nearest_stag:1", 5.0))
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    place = Place(Args(env_steps=500), GAP, 1)
    mix = ("nearest_stag:1",)
    assert is_played(rows, "delta", place, mix) and is_played(rows, "tries", place, mix)
    assert not is_played(rows, "delta", place, ("waits_at_stag:1",))
    assert not is_played(rows, "delta", Place(Args(env_steps=900), GAP, 1), mix)  # trained for longer
    assert not is_played(rows, "delta", Place(Args(env_steps=500), GAP, 2), mix)
    assert is_played(rows, "tries", Place(Args(env_steps=900), GAP, 1), mix)  # it is not trained


def test_env_steps_until_the_target(tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("update,global_step,charts/return_seat_0\n1,100,0.5\n2,200,\n3,300,0.95\n4,400,0.2\n")
    assert first_with(tmp_path, 0.9) == (200, 0.95)  # what the third update's episodes show was learned before it
    assert first_with(tmp_path, 0.4) == (0, 0.5)
    assert first_with(tmp_path, 2.0) == (None, 0.2)


def test_an_agent_is_trained_and_played_once(tmp_path, capsys):
    args = Args(
        settings=("4x4-2p1h-T10-1to3",),
        seeds=(3,),
        agents=("tries", "actor-context"),
        env_steps=5120,
        episodes=20,
        runs_dir=tmp_path / "runs",
        results=tmp_path / "results",
    )
    main(args)
    first = capsys.readouterr().out
    assert "seed 3: actor-context, " in first and "played" in first
    rows = list(csv.DictReader((tmp_path / "results/adaptation_agents.csv").open(encoding="utf-8")))
    assert [(x["agent"], x["env_steps"], x["mix"]) for x in rows] == [
        ("tries", "0", "nearest_stag:1"),
        ("tries", "0", "waits_at_stag:1"),
        ("actor-context", "5120", "nearest_stag:1"),
        ("actor-context", "5120", "waits_at_stag:1"),
    ]
    assert float(rows[0]["mean_return"]) == 5.0 and 0 <= float(rows[2]["mean_return"]) <= 5
    main(args)
    second = capsys.readouterr().out
    assert "done" not in second and "played" not in second and "| actor-context | 5,120 | 1 |" in second
    # Of the rows a picture: a line with the seeds of each agent that was asked for.
    picture = tmp_path / "new" / "seeds.png"
    main(replace(args, table=True, picture=picture))
    assert picture.stat().st_size > 5000
    with pytest.raises(UsageError, match="no rows of full in 4x4-2p1h-T10-1to3"):
        main(replace(args, table=True, picture=picture, agents=("full",)))
    found = samples(str(Place(args, GAP, 3).made("actor-context")), GAP, 400, 1)
    count = len(found["env"])
    assert 0 < found["failed"].sum() < count and found["contexts"].shape == (count, 64)
    assert found["obs"].shape == (count, 80) and all(x.float().isfinite().all() for x in found.values())


def test_partners_that_an_agent_was_not_trained_with_are_met_at_play_only(tmp_path, capsys):
    args = Args(
        seeds=(3,),
        agents=("actor-context",),
        beside=("stay:1", "nearest_hare:1"),
        env_steps=5120,
        episodes=20,
        runs_dir=tmp_path / "runs",
        results=tmp_path / "results",
    )
    main(args)
    words = Place(args, GAP, 3).command(JOBS["actor-context"])
    assert "same=nearest_stag*1,waits_at_stag*3:1" in words
    rows = list(csv.DictReader((tmp_path / "results/adaptation_agents.csv").open(encoding="utf-8")))
    assert [x["mix"] for x in rows] == ["stay:1", "nearest_hare:1"]
    assert "| stay | nearest_hare | mean |" in capsys.readouterr().out
    assert as_played(GAP, args.beside).shares.tolist() == [0.5, 0.5]
    assert as_played(GAP, ()) is GAP


def test_unknown_partners_at_play_are_one_line_before_anything_runs(tmp_path):
    for beside, message in ((("nobody:1",), "nobody"), (("stay:2",), "fill 2 seats")):
        args = Args(agents=("full",), beside=beside, runs_dir=tmp_path / "runs", results=tmp_path / "results")
        with pytest.raises(UsageError, match=message):
            main(args)
    assert list(tmp_path.iterdir()) == []
    assert adaptation_agents.cli(["--agents", "full", "--beside", "nobody:1"]) == 2


def test_unknown_names_are_one_line():
    with pytest.raises(UsageError, match="--settings: expected .*, got nowhere"):
        check_args(Args(settings=("nowhere",)))
    with pytest.raises(UsageError, match="--agents: expected .*, got nobody"):
        check_args(Args(agents=("nobody",)))
    assert adaptation_agents.cli(["--agents", "nobody"]) == 2
    assert adaptation_probe.cli(["--setting", "nowhere"]) == 2


def test_a_response_may_be_made_for_the_env():
    """What is played may be anything that makes a player, told the mix."""
    hunt = small_hunt(4, 2, 1, 8, ("nearest_stag", "nearest_hare"))
    told = []

    def best_known(env, mix):
        told.append(mix)
        return adaptation_probe.make_policy("nearest_stag", env)

    assert play(hunt, best_known, ("nearest_stag:1",), 50, 1).eq(5).all()
    assert told == [("nearest_stag:1",)]


# ---------------------------------------------------------------- probe


def test_together_on_the_stag():
    env = StagHuntVecEnv(1, "cpu", 0, num_players=2, num_hares=1)
    for players, together in (((5, 5), True), ((5, 6), False), ((6, 5), False), ((6, 6), False)):
        step = env.set_positions(torch.tensor([[*players, 5, 10]]))
        assert on_the_stag_together(step).tolist() == [together]


def test_a_probe_finds_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 4, generator=generator)
    fits = torch.arange(2000) % 2 == 0
    rare = x[:, 0] + 2 * x[:, 1] > 2.0  # a fifth
    assert balanced_accuracy(x, rare, fits) > 0.95
    anything = torch.rand(2000, generator=generator) < 0.2
    assert 0.4 < balanced_accuracy(x, anything, fits) < 0.6


def test_a_policy_without_a_context_is_refused():
    with pytest.raises(UsageError, match="expected a policy with a context, got nearest_stag"):
        samples("nearest_stag", GAP, 4, 1)


def test_who_is_told_sees_its_partner_in_a_plane_that_is_empty_otherwise():
    env = Told(GAP, 400, "cpu", 1)
    step = env.reset(1)
    for _ in range(25):
        shown = step.obs[..., 2]
        assert torch.equal(shown, shown[:, :1, :1, :1].expand_as(shown))
        mix = shown[:, 0, 0, 0].long()
        assert torch.equal(mix, env.seated) and 0.65 < mix.float().mean() < 0.85  # three in four wait
        assert not step.state[..., 2].any()
        # Seat 0 hunts the stag wherever it can: then nobody waits who is shown as a hunter, and nobody else hunts.
        can_hunt = step.action_mask[..., HUNT_STAG]
        actions = torch.where(can_hunt, HUNT_STAG, torch.randint(0, 4, can_hunt.shape))
        step = env.step(actions)
        chosen = step.executed_actions[:, 1]
        assert (chosen[can_hunt[:, 1] & (mix == 0)] == HUNT_STAG).all()
        assert (chosen[mix == 1] != HUNT_STAG).all()


def test_settings_are_refused_that_are_no_small_hunts_with_a_pool(monkeypatch):
    mixed = Setting("mixed", "stag_hunt", {}, (*alike(3, "stay"), ("stay:1", "random:2")))
    monkeypatch.setitem(SETTINGS, "mixed", mixed)
    with pytest.raises(UsageError, match="one script each"):
        check_args(Args(settings=("mixed",)))
    with pytest.raises(UsageError, match="expected one that says its max_cycles, got snowdrift-4x4-6d"):
        check_args(Args(settings=("snowdrift-4x4-6d",)))
