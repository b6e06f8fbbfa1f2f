"""The adaptation benchmark: what knowing the partners is worth, and the responses it is measured with."""

import csv

import pytest
import torch

from benchmark.adaptation import (
    SETTINGS,
    Args,
    Gap,
    Setting,
    SolvedHunt,
    Watcher,
    alike,
    append_rows,
    as_table,
    main,
    measure,
    play,
    small_hunt,
    solve_layouts,
)
from envs.stag_hunt import HUNT_HARE, HUNT_STAG, StagHuntVecEnv
from runs import UsageError

HUNT = small_hunt(4, 2, 1, 8, ("nearest_stag", "nearest_hare"))


def gap_of(rows):
    return Gap(HUNT, [f"response {k}" for k in range(len(rows))], torch.tensor(rows), torch.zeros(len(rows), 2))


def test_the_gap_is_what_knowing_the_mix_is_worth():
    gap = gap_of([[5.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    assert gap.best.tolist() == [0, 2]
    assert gap.oracle == 4 and gap.unaware == 2.5 and gap.share == pytest.approx(0.375)
    assert gap_of([[2.0, 1.0], [1.0, 0.5]]).share == 0  # one response is best everywhere
    assert gap_of([[0.0, 0.0]]).share == 0
    assert "**5.00 ± 0.00** | 0.00 ± 0.00 | 2.50 |" in as_table(gap)
    assert "oracle 4.00, unaware 2.50, gap 38 %" in as_table(gap).replace("38%", "38 %")


def test_rows_are_kept_and_appended(tmp_path):
    path = tmp_path / "results" / "gap.csv"
    for _ in range(2):
        append_rows(gap_of([[5.0, 0.0]]), 100, 1, path)
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    assert len(rows) == 4 and rows[0]["mix"] == "nearest_stag:1" and float(rows[0]["mean_return"]) == 5


def test_a_watcher_goes_where_others_are():
    env = StagHuntVecEnv(1, "cpu", 0, num_players=3, num_hares=1)
    on_both = [5, 10]  # cells of the stag and of the hare
    for others, reach, hunts_stag in (
        ((5, 15), 0, True),  # one stands on it
        ((6, 15), 0, False),
        ((6, 15), 1, True),
        ((10, 15), 1, True),  # the corner
        ((7, 15), 1, False),
        ((7, 15), 2, True),
    ):
        for cell, hunt in ((5, HUNT_STAG), (10, HUNT_HARE)):
            step = env.set_positions(torch.tensor([[cell, *others, *on_both]]))
            action = Watcher(env, reach).choose(step)[0, 0].item()
            assert (action == hunt) == (hunts_stag == (hunt == HUNT_STAG))


def test_who_tries_finds_out():
    setting = small_hunt(4, 2, 1, 14, ("nearest_stag", "waits_at_stag"))
    assert play(setting, "tries", ("nearest_stag:1",), 200, 1).eq(5).all()
    assert play(setting, "tries", ("waits_at_stag:1",), 200, 1).eq(1).all()  # 14 steps are enough for both
    assert play(setting, "nearest_stag", ("waits_at_stag:1",), 50, 1).eq(0).all()
    gap = Gap(setting, ["tries", "nearest_hare"], torch.tensor([[5.0, 1.0], [1.0, 1.0]]), torch.zeros(2, 2))
    assert gap.oracle == 3 and gap.unaware == 1


def test_play_is_the_return_of_seat_0_against_the_mix():
    assert play(HUNT, "stay", ("nearest_hare:1",), 200, 1).eq(0).all()
    alone = play(HUNT, "nearest_hare", ("stay:1",), 200, 1)
    assert set(alone.tolist()) <= {0.0, 1.0} and alone.mean() > 0.9
    together = play(HUNT, "nearest_stag", ("nearest_stag:1",), 200, 1)
    assert together.eq(5).all()  # 8 steps are enough on this map
    assert torch.equal(together, play(HUNT, "nearest_stag", ("nearest_stag:1",), 200, 1))
    with pytest.raises(UsageError, match="all seats but the first"):
        play(SETTINGS["snowdrift-4x4-6d"], "stay", ("stay:1",), 2, 1)


def test_measured_gaps_of_known_motives():
    """Against those who clear it pays to rest, against those who do not to work: nobody who cannot know does both."""
    gap = measure(SETTINGS["snowdrift-6x6-6d"], ["nearest_drift", "stay"], 200, 1)
    assert gap.best.tolist() == [1, 0] and gap.means.shape == (2, 2)
    assert 0.1 < gap.share < 0.15


def test_mixes_may_be_met_more_or_less_often():
    setting = small_hunt(4, 2, 1, 8, ("nearest_stag", "waits_at_stag"), weights=(1, 3))
    assert setting.pool == ("same=nearest_stag*1,waits_at_stag*3:1",)
    gap = Gap(setting, ["stag", "hare"], torch.tensor([[5.0, 0.0], [1.0, 1.0]]), torch.zeros(2, 2))
    assert gap.oracle == 2.0 and gap.unaware == 1.25 and gap.share == 0.375
    # known by heart: with time enough the oracle takes the stag with one and the hare beside the other
    known, unaware = solve_layouts(setting, 1, 1).gap()
    assert known.tolist() == pytest.approx([5, 1]) and setting.shares @ unaware == pytest.approx(1.25, abs=0.05)


def test_a_pool_draws_the_mixes():
    assert HUNT.pool == ("same=nearest_stag,nearest_hare:1",)
    mixed = Setting("x", "stag_hunt", {}, (*alike(3, "stay"), ("stay:1", "random:2")))
    with pytest.raises(UsageError, match="one script each"):
        _ = mixed.pool


def test_unknown_settings_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="--settings: expected .*, got nowhere"):
        main(Args(settings=("nowhere",), out=str(tmp_path / "x.csv")))


def hunt_of_four_cells(max_cycles, view=None, other="stay"):
    """Two players, a stag and a hare on 2 x 2: everyone starts on a cell of its own. All 12 layouts."""
    setting = small_hunt(2, 2, 1, max_cycles, ("nearest_stag", other), view)
    layouts = [[stag, hare] for stag in range(4) for hare in range(4) if hare != stag]
    return SolvedHunt(setting, torch.tensor(layouts))


def test_a_solved_hunt_by_hand():
    """In two steps one can only go to a neighbouring cell and hunt there. By where the hare starts, a third each:

    opposite the stag: both players are beside both, so the learner takes 5 with a stag hunter, or 1.
    beside the stag, the learner opposite the stag: it is beside the hare and takes 1.
    beside the stag, the partner opposite the stag: the learner is beside the stag alone and has nothing.
    """
    solved = hunt_of_four_cells(2)
    known, unaware = solved.gap()
    assert known.tolist() == pytest.approx([(5 + 1 + 0) / 3, (1 + 1 + 0) / 3])
    assert unaware.tolist() == pytest.approx([(5 + 1 + 0) / 3, (0 + 1 + 0) / 3])
    without_clock = solved.solve_without_clock()
    assert without_clock.tolist() == pytest.approx(unaware.tolist(), abs=0.02)
    known, unaware = hunt_of_four_cells(8).gap()
    assert known.tolist() == unaware.tolist() == pytest.approx([5, 1])  # time enough to see who comes


def test_a_memory_is_worth_what_it_finds_out_in_time():
    """Beside a waiter, by where the hare starts: opposite the stag the learner sees in the second step that the partner
    does not hunt, and has the hare, two cells away, in the fifth; beside it, in the fourth at the latest."""
    for max_cycles, hunter, waiter in ((2, (5 + 1 + 0) / 3, 1 / 3), (4, 5, 2 / 3), (5, 5, 1)):
        returns = hunt_of_four_cells(max_cycles, other="waits_at_stag").with_memory()
        assert returns.tolist() == pytest.approx([hunter, waiter])
    assert hunt_of_four_cells(2, other="random").with_memory() is None  # it may do whatever others do


def test_a_window_hides_and_never_helps():
    small_window = hunt_of_four_cells(3, view=1)
    whole_map = hunt_of_four_cells(3)
    assert small_window.looks.unique().numel() < whole_map.looks.unique().numel() == len(whole_map.starts)
    for seen, all_seen in zip(small_window.gap(), whole_map.gap(), strict=True):
        assert seen.mean() < all_seen.mean() - 0.1


def test_solved_values_are_those_of_play():
    """The best answers to `stay` and to a stag hunter that scripts give are no better than the solution."""
    setting = small_hunt(3, 2, 1, 8, ("nearest_stag", "stay"))
    known, _ = solve_layouts(setting, 4, 1).gap()
    together = play(setting, "nearest_stag", ("nearest_stag:1",), 300, 1)
    alone = play(setting, "nearest_hare", ("stay:1",), 300, 1)
    assert known.tolist() == pytest.approx([together.mean().item(), alone.mean().item()], abs=0.01)


def test_a_solved_hunt_of_three_by_hand():
    """On 1 x 5 and in two steps: two hunters beside the learner share the stag with it or take it from it."""
    kwargs = {"height": 1, "width": 5, "num_players": 3, "num_hares": 1, "max_cycles": 2}
    setting = Setting("corridor", "stag_hunt", kwargs, alike(2, "nearest_stag", "stay"))
    solved = SolvedHunt(setting, torch.tensor([[2, 0]]))  # players on 1, 3 and 4 in some order, stag on 2, hare on 0
    known, unaware = solved.gap()
    # On 1 it is beside both: with one hunter on 3 it takes 5; from 3 with one on 1 likewise; from 4 it reaches nothing.
    assert known.tolist() == pytest.approx([(5 + 5 + 0) / 3, (1 + 0 + 0) / 3])
    assert unaware.tolist() == pytest.approx([(5 + 5 + 0) / 3, 0])
    with pytest.raises(UsageError, match="without blocks"):
        solve_layouts(Setting("blocks", "stag_hunt", {"num_blocks": 1}, alike(3, "stay")), 1, 1)
