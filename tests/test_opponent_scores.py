"""Ceilings and scores of opponent_scores.py."""

import math

import numpy as np
import pytest
import torch

import collect_data
import opponent_scores
from dataset import load_dataset
from envs.stag_hunt import action_probs
from opponent_samples import Samples, describe_input


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    args = collect_data.Args(
        env_id="stag_hunt",
        num_steps=1500,
        num_envs=16,
        cuda=False,
        data_dir=str(tmp_path_factory.mktemp("data")),
        policies=("nearest_stag", "nearest_hare", "random"),
    )
    return load_dataset(collect_data.main(args))


@pytest.fixture(scope="module")
def samples(dataset):
    return Samples(dataset, describe_input(dataset, "obs"), torch.device("cpu"), 1000)


def test_posterior_and_ceilings_by_a_slow_second_implementation(dataset, samples):
    everything = np.arange(len(samples.first))
    index = samples.index(everything)
    ceilings = opponent_scores.compute_ceilings(dataset, samples, index, index, history=True)
    names = dataset.meta["policies"]
    first = samples.policies[samples.past == 0]
    prior = [(first == k).float().mean().item() for k in range(3)]
    for start, length in zip(samples.first[:40], samples.length[:40], strict=True):
        belief = np.array(prior)
        for i in range(start, start + length):
            row, seat = samples.rows[i], samples.seats[i]
            obs, mask = (
                torch.from_numpy(dataset.observations[row, seat]),
                torch.from_numpy(dataset.action_masks[row, seat]),
            )
            probs = np.stack([action_probs(name, obs, mask).numpy() for name in names])  # [K, n]
            belief = belief / belief.sum()
            np.testing.assert_allclose(ceilings.posterior[i], belief, atol=1e-4)
            np.testing.assert_allclose(ceilings.seen[i], belief @ probs, atol=1e-4)
            np.testing.assert_allclose(ceilings.known[i], probs[dataset.policy_ids[row, seat]], atol=1e-6)
            belief = belief * probs[:, dataset.actions[row, seat]]


def test_no_guess_beats_knowing_the_policy(dataset, samples):
    index = samples.index(np.arange(len(samples.first)))
    known, seen, _ = opponent_scores.compute_ceilings(dataset, samples, index, index, history=False)
    _, by_history, _ = opponent_scores.compute_ceilings(dataset, samples, index, index, history=True)
    tops = [opponent_scores.top_hits(guess, known, 1).mean().item() for guess in (seen, by_history, known)]
    assert tops[0] < tops[1] < tops[2] < 1
    empirical = opponent_scores.top_hits(known, samples.actions, 1).mean().item()
    assert empirical == pytest.approx(tops[2], abs=4 * 0.5 / math.sqrt(len(samples)))


def test_policies_that_are_no_scripts_have_no_ceiling(dataset, samples):
    index = samples.index(np.arange(20))
    meta = {**dataset.meta, "policies": ["nearest_stag", "runs/learner", "random"]}
    other = load_dataset(dataset.path)
    other.meta = meta
    ceilings = opponent_scores.compute_ceilings(other, samples, index, index, history=True)
    mine = samples.policies[index]
    assert ceilings.known[mine == 1].isnan().all() and not ceilings.known[mine != 1].isnan().any()
    assert ceilings.seen.isnan().all()


def test_scores_by_hand(samples):
    logits = torch.tensor([[5.0, 4, 3, 2], [0, 9, 8, 7], [9, 0, 1, 8], [1, 2, 3, 4]])
    fake = type("Fake", (), {})()
    fake.actions, fake.policies = torch.tensor([0, 3, 3, 3]), torch.tensor([0, 0, 1, 1])
    fake.past = torch.tensor([0, 1, 0, 1])
    nan = torch.full((4, 4), torch.nan)
    seen = torch.eye(4)[[0, 3, 1, 3]]
    rows, confusion = opponent_scores.score(
        "test", logits, fake, np.arange(4), opponent_scores.Ceilings(nan, seen, nan), ["a", "b"]
    )
    table = {(row["kind"], row["name"]): row for row in rows}
    assert table["all", "all"]["top1"] == 0.5 and table["all", "all"]["top3"] == 1.0
    assert table["policy", "a"]["top1"] == 0.5 and table["history", "0"]["top1"] == 0.5
    three = table["action", "3"]
    assert (three["precision"], three["recall"], three["f1"]) == (1.0, pytest.approx(1 / 3), pytest.approx(0.5))
    assert table["action", "0"]["precision"] == 0.5
    assert table["action", "0"]["ceiling_recall"] == 1.0 and three["ceiling_recall"] == pytest.approx(2 / 3)
    assert confusion.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]]
    assert table["all", "all"]["cross_entropy"] == pytest.approx(
        -torch.stack([logits[i].log_softmax(0)[a] for i, a in enumerate((0, 3, 3, 3))]).mean().item()
    )


def test_probe_by_hand():
    rng = np.random.default_rng(0)
    past, policies = np.repeat([0, 1, 2, 3], 50), np.tile([0, 1], 100)
    z = rng.normal(size=(200, 3))
    z[past == 1, 0] += 10 * policies[past == 1]  # only here z tells the policy
    policies[past == 2] = 1  # only this one lasts so long
    some = past < 3
    guess = opponent_scores.linear_probe(z, past, z[some], policies[some], past[some])
    assert (guess[past == 1] == policies[past == 1]).all() and (guess[past == 2] == 1).all()
    assert (guess[past == 3] == -1).all()  # nothing to fit it on


def test_scores_of_the_probe_by_hand():
    fake = type("Fake", (), {})()
    fake.actions = torch.zeros(4, dtype=torch.long)
    fake.policies, fake.past = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    nan, probed = torch.full((4, 2), torch.nan), torch.tensor([0, 0, 1, -1])

    def numbers(posterior, key):
        rows, _ = opponent_scores.score(
            "x", torch.zeros(4, 2), fake, np.arange(4), opponent_scores.Ceilings(nan, nan, posterior), "ab", probed
        )
        return [row[key] for row in rows if row["kind"] in ("all", "history")]

    posterior = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.45, 0.55], [0.8, 0.2]])
    assert numbers(posterior, "probe") == [0.625, 0.5, 0.75]  # -1: nothing to fit it on, a coin
    assert numbers(posterior, "bayes") == [0.75, 1.0, 0.5]
    assert numbers(posterior, "expected_probe") == pytest.approx([0.5875, 0.65, 0.525])
    assert numbers(posterior, "expected_bayes") == pytest.approx([0.7125, 0.75, 0.675])
    assert numbers(nan, "probe")[0] == 0.625 and np.isnan(numbers(nan, "bayes")).all()


def test_a_glance_tells_what_is_left_and_what_is_underfoot(dataset, samples):
    """Two samples look alike exactly when a slow second implementation says so."""
    rows, seats = samples.rows.numpy()[:400], samples.seats.numpy()[:400]
    numbers = opponent_scores.glance(dataset, rows, seats)
    looks = []
    for row, seat in zip(rows, seats, strict=True):
        state = dataset.states[row]  # [4, 4, 7]
        left = (state[..., :4].sum(), state[..., 5].sum(), state[..., 6].sum())
        mask = dataset.action_masks[row, seat]
        looks.append((int(dataset.timesteps[row]), *map(int, left), bool(mask[5]), bool(mask[6])))
    assert len(set(zip(numbers, looks, strict=True))) == len(set(numbers)) == len(set(looks)) > 10


def test_the_env_is_asked_what_channels_mean(dataset, samples):
    """Where an env declares nothing that is hunted, only the time step tells."""
    other = load_dataset(dataset.path)
    other.meta = {**dataset.meta, "env_id": "other"}
    numbers = opponent_scores.glance(other, samples.rows.numpy(), samples.seats.numpy())
    np.testing.assert_array_equal(numbers, samples.timesteps)
