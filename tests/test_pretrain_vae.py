"""Samples, networks, losses and the training loop of pretrain_vae.py."""

import csv
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import collect_data
import opponent_samples
import opponent_scores
import pretrain_vae as pv
import runs
from dataset import load_dataset
from envs.grid_game import MOVES
from envs.stag_hunt import StagHuntVecEnv, action_probs, preset_options

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "history_size": 16, "latent_size": 4, "epochs": 1, "batch_size": 256, "cuda": False}


def collect(folder, **kwargs):
    defaults = {"env_id": "stag_hunt", "num_steps": 1500, "num_envs": 16, "cuda": False, "data_dir": str(folder)}
    return collect_data.main(collect_data.Args(**{**defaults, **kwargs}))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return collect(tmp_path_factory.mktemp("data"), policies=("nearest_stag", "nearest_hare", "random"), name="stag")


@pytest.fixture(scope="module")
def dataset(data_dir):
    return load_dataset(data_dir)


@pytest.fixture(scope="module")
def samples(dataset):
    return pv.Samples(dataset, pv.describe_input(dataset, "obs"), CPU, 1000)


def train(data, folder, **kwargs):
    return pv.main(pv.Args(**{**SMALL, "data": str(data), "runs_dir": str(folder), **kwargs}))


def new_model(spec, model="cvae", **kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "history_size": 16, "latent_size": 6, "codebook_size": 5}
    return pv.VAE({"model": model, "loss": "moa", "policy_input": "obs-z", "spec": spec, **sizes, **kwargs})


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """Pictures take longer than the small trainings here: only one test draws them."""
    if "test_every_kind_trains" not in request.node.name:
        for name in ("plot_curves", "plot_confusion", "plot_latents", "plot_probe", "plot_reconstructions"):
            monkeypatch.setattr(opponent_scores, name, lambda *args: None)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- data


def test_samples_are_the_active_seats_in_sequences(dataset, samples):
    assert len(samples) == dataset.active.sum()
    rows, seats = samples.rows.numpy(), samples.seats.numpy()
    assert dataset.active[rows, seats].all()
    for first, length in zip(samples.first[:50], samples.length[:50], strict=True):
        part = slice(first, first + length)
        assert len(set(dataset.episode_ids[rows[part]])) == 1 and len(set(seats[part])) == 1
        np.testing.assert_array_equal(samples.past[part], np.arange(length))
        np.testing.assert_array_equal(np.diff(rows[part]), 1)
        assert (samples.last[part] == first + length - 1).all()
    covered = np.sort(
        np.concatenate([b.index.numpy() for b in samples.batches(np.arange(len(samples.first)), 64, None)])
    )
    np.testing.assert_array_equal(covered, np.arange(len(samples)))


def test_cells_are_the_planes(dataset, samples):
    """Summed embeddings equal a linear layer on the planes and on the ego-centred planes."""
    spec = samples.spec
    assert spec["max_cells"] == 9 and spec["centred"]
    encoder = pv.ObsEncoder(spec, 8, views=1)
    index = torch.arange(0, len(samples), 37)
    obs = torch.from_numpy(dataset.observations[samples.rows[index], samples.seats[index]])  # [B, 4, 4, 7]
    planes = torch.zeros(len(index), pv.num_inputs(spec))
    for b, image in enumerate(obs):
        own = image[..., 0].nonzero()[0]
        for row, col, plane in image.nonzero().tolist():
            planes[b, (row * 4 + col) * 7 + plane] += 1
            down, right = row - own[0] + 3, col - own[1] + 3
            planes[b, 4 * 4 * 7 + 1 + (down * 7 + right) * 7 + plane] += 1
        planes[b, 4 * 4 * 7] = planes[b, -1] = 9 - (image > 0).sum()  # empty places of the list
    expected = F.relu(planes @ encoder.embed.weight + encoder.bias)
    torch.testing.assert_close(encoder(samples.input_of(index))[0], expected)


def test_too_many_cells_is_an_error(samples):
    with pytest.raises(ValueError, match="at most 9 cells"):
        pv.network_input(samples.spec, torch.ones(2, 4, 4, 7, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("name", ["nearest_stag", "nearest_hare"])
def test_scripts_play_alike_under_the_symmetries(samples, dataset, name):
    """The genuine scripts say whether cells and actions are turned alike."""
    cells, moves = pv.make_symmetries(samples.spec, MOVES, CPU)
    obs = torch.from_numpy(dataset.observations[samples.rows, samples.seats])[::5]  # [B, 4, 4, 7]
    masks = samples.masks[::5]
    probs = action_probs(name, obs, masks)
    assert len(cells.unique(dim=0)) == 8
    for cell, move in zip(cells, moves, strict=True):
        turned = torch.zeros_like(obs.flatten(1))
        turned[:, cell[: turned.shape[1]]] = obs.flatten(1)
        turned_masks = torch.zeros_like(masks)
        turned_masks[:, move] = masks
        turned_probs = torch.zeros_like(probs)
        turned_probs[:, move] = probs
        torch.testing.assert_close(action_probs(name, turned.view(obs.shape), turned_masks), turned_probs)
        # the ego-centred cells too are those of the turned observation
        x = pv.network_input(samples.spec, turned.view(obs.shape), samples.seats[::5])
        expected = cell[samples.input_of(torch.arange(len(samples))[::5])]
        torch.testing.assert_close(x.sort(1).values, expected.sort(1).values)


# --- networks and losses


def test_history_is_the_past_only_and_streams(samples):
    """`observe`, step by step, gives the z of whole sequences; an action changes z only afterwards."""
    model = new_model(samples.spec)
    sequences = np.flatnonzero(samples.length >= 6)[:4]
    logits, z = pv.predict(model, samples, sequences, 10_000)
    index = samples.index(sequences)
    rows, seats = samples.rows[index], samples.seats[index]
    obs = samples.source[rows, seats]
    history = None
    for i, start in enumerate(samples.past[index] == 0):
        history = model.initial_history(1) if start else history
        torch.testing.assert_close(model.encode(obs[i : i + 1], history)[0], z[i])
        history = model.observe(history, obs[i : i + 1], samples.actions[index[i : i + 1]])
    changed = index[2]  # the third action of the first sequence
    old = samples.actions[changed].clone()
    samples.actions[changed] = (old + 1) % 7
    after = pv.predict(model, samples, sequences, 10_000)[1]
    samples.actions[changed] = old
    length = samples.length[sequences[0]]
    torch.testing.assert_close(after[:3], z[:3])
    assert not torch.isclose(after[3:length], z[3:length]).all(1).any()
    torch.testing.assert_close(after[length:], z[length:])


def test_encode_shapes_and_errors(dataset, samples):
    model = new_model(samples.spec)
    assert model.encode(torch.zeros(2, 3, 4, 4, 7, dtype=torch.uint8)).shape == (2, 3, 6)
    with pytest.raises(ValueError, match=r"--input obs of shape \(4, 4, 7\).*shape \(3, 8, 8, 7\)"):
        model.encode(torch.zeros(3, 8, 8, 7, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"--input obs of shape \(4, 4, 7\).*state of shape \(4, 4, 7\)"):
        model.check_input("state", (4, 4, 7))
    state = new_model(pv.describe_input(dataset, "state"))
    z = state.encode(torch.from_numpy(dataset.states[:5]), state.initial_history(5, 4))
    assert z.shape == (5, 4, 6) and not torch.isclose(z[:, 0], z[:, 1]).all()  # the seat is told
    with pytest.raises(ValueError, match="obs of shape"):
        state.check_input("obs", (4, 4, 7))


def test_agents_that_left_are_encoded_without_harm(samples):
    model = new_model(samples.spec)
    history = model.observe(model.initial_history(2), torch.zeros(2, 4, 4, 7, dtype=torch.uint8), torch.tensor([-1, 3]))
    assert history.isfinite().all()


def test_gaussian_kl_is_the_kl():
    torch.manual_seed(0)
    mu, logvar, mu_p, logvar_p = torch.randn(4, 3, 5)
    q, p = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((mu, logvar), (mu_p, logvar_p)))
    expected = torch.distributions.kl_divergence(q, p).mean(0)  # [Z]
    prior = pv.Gaussian(mu_p, logvar_p)
    assert pv.gaussian_kl(pv.Gaussian(mu, logvar), 0.0, prior) == pytest.approx(expected.sum().item(), rel=1e-5)
    floor = expected.median().item()
    clamped = expected.clamp(min=floor).sum().item()
    assert pv.gaussian_kl(pv.Gaussian(mu, logvar), floor, prior) == pytest.approx(clamped, rel=1e-5)
    standard = torch.distributions.Normal(torch.zeros(3, 5), torch.ones(3, 5))
    expected = torch.distributions.kl_divergence(q, standard).mean(0).sum().item()
    assert pv.gaussian_kl(pv.Gaussian(mu, logvar), 0.0) == pytest.approx(expected, rel=1e-5)


def test_recon_loss_of_cells_is_that_of_planes(dataset, samples):
    index = torch.arange(0, len(samples), 11)
    planes = torch.from_numpy(dataset.observations[samples.rows[index], samples.seats[index]]).flatten(1).float()
    out = torch.randn(planes.shape, generator=torch.Generator().manual_seed(0))
    bce = F.binary_cross_entropy_with_logits(out, planes, reduction="none").sum(1).mean()
    mse = (out - planes).pow(2).sum(1).mean()
    torch.testing.assert_close(pv.recon_loss(samples.spec, "bce", out, samples.input_of(index)), bce)
    torch.testing.assert_close(pv.recon_loss(samples.spec, "mse", out, samples.input_of(index)), mse)


def losses_of(samples, net, teacher=None, **kwargs):
    args = pv.Args(**{**SMALL, **kwargs})
    batch = next(iter(samples.batches(np.arange(60), 10_000, None)))
    return pv.compute_losses(net, teacher, samples, batch, args, pv.Extras("bce", kl_coef=1e-3))[0]


def test_gradients_reach_what_they_should(samples):
    """moa reaches encoder, history and head, not the decoder; with recon the head can not change z."""
    model, teacher = new_model(samples.spec), new_model(samples.spec, "vae", policy_input="z", latent_size=3)
    losses_of(samples, model, teacher, model="cvae")["loss"].backward()
    for part in (
        model.encoder,
        model.gru,
        model.imagined,
        model.to_who,
        model.to_latent,
        model.policy,
        teacher.decoder,
    ):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert model.decoder[0].weight.grad is None
    model = new_model(samples.spec, "vae", loss="recon")
    losses_of(samples, model, model="vae", loss="recon")["moa_loss"].backward()
    assert model.policy[0].weight.grad.abs().sum() > 0 and model.to_latent.weight.grad is None
    half = model.encoder.embed.weight.grad.chunk(2, 1)
    assert half[0].abs().sum() == 0 and half[1].abs().sum() > 0


def test_sum_of_rows_is_an_embedding_bag():
    torch.manual_seed(0)
    bag, x = torch.nn.EmbeddingBag(9, 4, mode="sum"), torch.randint(0, 9, (20, 6))
    weights = torch.randn(20, 4)
    expected = torch.autograd.grad((bag(x) * weights).sum(), bag.weight)[0]
    out = pv.SumOfRows.apply(bag.weight, x)
    torch.testing.assert_close(out, bag(x))
    torch.testing.assert_close(torch.autograd.grad((out * weights).sum(), bag.weight)[0], expected)


@pytest.mark.parametrize("model", ["vae", "cvae"])
def test_z_starts_with_little_noise(samples, model):
    """With the noise of a standard normal at the start the decoder took three epochs to notice z at all."""
    net, index = new_model(samples.spec, model), torch.arange(20)
    history = torch.zeros(20, net.history_size) if net.history_size else None
    logvar = net.posterior(net.look(samples.input_of(index))[0], history)["logvar"]
    assert logvar.shape == (20, 6) and (logvar + 5).abs().max() < 1


def test_belief_and_mixture_loss_by_a_slow_second_implementation(samples):
    """The belief is Bayes' rule over the imagined policies, step by step; the loss is what it gave to what was done."""
    model = new_model(samples.spec)
    torch.nn.init.normal_(model.prior)
    batch = next(iter(samples.batches(np.flatnonzero(samples.length >= 4)[:3], 10_000, None)))
    with torch.no_grad():
        features, _ = model.look(samples.input_of(batch.index))
        steps = model.step_features(features, samples.actions[batch.index])
        log_belief = model.belief(model.histories(steps, batch.place))
        total, belief = 0.0, torch.zeros(pv.IMAGINED)
        for i, past in enumerate(samples.past[batch.index]):
            belief = model.prior.softmax(0) if past == 0 else belief * steps[i - 1].exp()
            belief = belief / belief.sum()
            torch.testing.assert_close(log_belief[i].exp(), belief)
            total -= (belief * steps[i].exp()).sum().log().item()
        probs = model.imagined(features).view(len(features), 7, -1).softmax(1)
        every = torch.stack([model.step_features(features, torch.full((len(features),), a)) for a in range(7)], 1)
        torch.testing.assert_close(every.exp(), 0.99 * probs + 0.01 / 7)  # a little of every action
        torch.testing.assert_close(every.exp().sum(1), torch.ones(len(features), pv.IMAGINED))
        args, teacher = pv.Args(model="cvae"), new_model(samples.spec, "vae", policy_input="z", latent_size=3)
        extras = pv.Extras("bce")
        losses, _ = pv.compute_losses(model, teacher, samples, batch, args, extras)
        assert losses["mixture_loss"].item() == pytest.approx(total / len(features), rel=1e-4)
        parts = sum(losses[name] for name in ("moa_loss", "mixture_loss", "teacher_loss"))
        parts = parts + args.later_coef * losses["later_moa_loss"]
        assert losses["loss"].item() == pytest.approx(parts.item(), rel=1e-5)
        # With recon nothing may tell z what was done.
        losses, _ = pv.compute_losses(model, teacher, samples, batch, pv.Args(model="cvae", loss="recon"), extras)
        assert "mixture_loss" not in losses


def test_z_alone_sees_neither_observation_nor_mask(samples):
    model = new_model(samples.spec, "vae", policy_input="z")
    features, seen = model.look(samples.input_of(torch.arange(5)))
    assert seen is None
    masks = torch.zeros(5, 7, dtype=torch.bool)
    logits = model.action_logits(seen, samples.timesteps[:5], torch.zeros(5, 6), masks)
    assert (logits == logits[0]).all() and logits.min() > -100


def test_illegal_actions_are_never_predicted(samples):
    logits, _ = pv.predict(new_model(samples.spec), samples, np.arange(100), 1000)
    probs = logits.softmax(1)
    assert (probs[~samples.masks[: len(logits)]] == 0).all()
    assert samples.masks[: len(logits)].gather(1, logits.argmax(1)[:, None]).all()


# --- training


@pytest.mark.parametrize(
    "kwargs",
    [
        {"model": "vae"},
        {"model": "vae", "loss": "recon", "policy_input": "z", "recon_loss": "mse"},
        {"model": "cvae", "loss": "both", "class_balance": True, "free_bits": 0.1},
        {"model": "cvae", "subgoal": "first", "loss": "recon", "augment": False},
        {"model": "vqvae", "loss": "both", "codebook_size": 8, "epochs": 2},
        {"model": "cvae", "input": "state", "policy_input": "z"},
    ],
)
def test_every_kind_trains(data_dir, tmp_path, kwargs):
    run_dir = train(data_dir, tmp_path, **kwargs)
    epochs = kwargs.get("epochs", 1)
    metrics = read_csv(run_dir / "metrics.csv")
    assert len(metrics) == epochs
    assert all(math.isfinite(float(value)) for value in metrics[-1].values())
    for name in ("learning_curve", "confusion", "latents", "probe"):
        assert (run_dir / f"{name}.png").stat().st_size > 0
    assert (run_dir / "reconstructions.png").exists() == (kwargs.get("loss", "moa") != "moa")
    arrays = np.load(run_dir / f"moa_eval_epoch{epochs}.npz")
    table = read_csv(run_dir / f"moa_eval_epoch{epochs}.csv")
    assert len(arrays["heldout_episodes_logits"]) == int(table[0]["samples"])
    assert float(table[0]["ceiling_top1"]) <= float(table[0]["ceiling_known_top1"])
    before = pv.VAE(pv.load_checkpoint(run_dir)["config"])
    after = pv.load_vae(run_dir)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    if kwargs["model"] == "vqvae":
        assert 1 <= float(metrics[-1]["vq/perplexity"]) <= float(metrics[-1]["vq/codes_used"]) <= 8


def test_it_learns_on_episodes_never_seen(tmp_path):
    data = collect(tmp_path, num_steps=8000, num_envs=64, policies=("nearest_stag", "nearest_hare"))
    run_dir = train(data, tmp_path, model="cvae", epochs=4, hidden_size=64)
    row = read_csv(run_dir / "moa_eval_epoch4.csv")[0]
    assert float(row["top1"]) > 0.95 * float(row["ceiling_top1"])
    assert float(row["top3"]) > 0.97 * float(row["ceiling_top3"])


def test_dead_codes_are_revived(data_dir, tmp_path, monkeypatch):
    init = pv.VAE.__init__

    def far_away(self, config):
        init(self, config)
        if config["model"] == "vqvae":
            self.codebook.data[1:] += 1e6

    monkeypatch.setattr(pv.VAE, "__init__", far_away)
    run_dir = train(data_dir, tmp_path, model="vqvae", codebook_size=8, epochs=2)
    used = [float(row["vq/codes_used"]) for row in read_csv(run_dir / "metrics.csv")]
    assert used[0] == 1 and used[1] > 1


def assert_same_run(a, b):
    """Weights, optimizer and every logged number but the speed."""
    first, second = pv.load_checkpoint(a), pv.load_checkpoint(b)
    for name in ("model", "teacher"):
        assert (first[name] is None) == (second[name] is None)
        for key, value in (first[name] or {}).items():
            assert torch.equal(value, second[name][key]), (name, key)
    assert first["best"] == second["best"]
    for key, state in first["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["optimizer"]["state"][key][name])
    rows = [read_csv(run_dir / "metrics.csv") for run_dir in (a, b)]
    for row in rows[0] + rows[1]:
        del row["charts/samples_per_second"]
    assert rows[0] == rows[1]


def stop_at(monkeypatch, call, number):
    """Raises a signal in the given minibatch, counted from 1."""
    real, calls = pv.compute_losses, []

    def counted(*args):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(number)
        return real(*args)

    monkeypatch.setattr(pv, "compute_losses", counted)


@pytest.mark.parametrize(
    "number, kwargs",
    [
        (signal.SIGINT, {"model": "vae"}),
        (signal.SIGTERM, {"model": "cvae", "loss": "both"}),
        (signal.SIGTERM, {"model": "vqvae", "codebook_size": 8}),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(data_dir, tmp_path, monkeypatch, capsys, number, kwargs):
    kwargs = {"epochs": 3, **kwargs}
    whole = train(data_dir, tmp_path / "a", **kwargs)
    batches = math.ceil(int(capsys.readouterr().out.split(" training samples")[0].rpartition(" ")[2]) / 256)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, number)
        stopped = train(data_dir, tmp_path / "b", **kwargs)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert f"go on with: python pretrain_vae.py --resume {stopped}" in capsys.readouterr().out
    saved = pv.load_checkpoint(stopped)
    assert saved["epoch"] == 0 and saved["progress"]["batches"] == 4
    assert pv.load_vae(stopped).model == kwargs["model"]  # usable before its first epoch has ended
    with monkeypatch.context() as patch:  # once more, in the first evaluation: the epoch is finished
        stop_at(patch, batches - 4 + 1, number)
        assert pv.cli(["--resume", str(stopped)]) == 0
    saved = pv.load_checkpoint(stopped)
    assert saved["epoch"] == 1 and saved["progress"] is None
    with monkeypatch.context() as patch:  # and in the last minibatch of an epoch
        stop_at(patch, batches, number)
        assert pv.cli(["--resume", str(stopped)]) == 0
    saved = pv.load_checkpoint(stopped)
    assert saved["epoch"] == 1 and saved["progress"]["batches"] == batches
    assert pv.cli(["--resume", str(stopped)]) == 0
    assert_same_run(whole, stopped)
    assert (stopped / "probe.csv").read_text() == (whole / "probe.csv").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="there terminate() asks nobody")
def test_sigterm_from_outside_saves_and_says_how_to_go_on(data_dir, tmp_path):
    command = [sys.executable, "-u", "pretrain_vae.py", "--data", str(data_dir), "--epochs", "10000", "--no-cuda"]
    command += ["--batch-size", "64", "--runs-dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if line.startswith("[MOA]"):
                break
        process.terminate()
        rest = process.stdout.read()
    assert process.returncode == 0 and "go on with: python pretrain_vae.py --resume" in rest
    assert pv.load_checkpoint(next(tmp_path.iterdir()))["epoch"] >= 0


def test_best_is_written_before_latest(data_dir, tmp_path, monkeypatch):
    real, written = runs.save_checkpoint, []

    def recorded(checkpoint, path):
        written.append(path.name)
        real(checkpoint, path)

    monkeypatch.setattr(runs, "save_checkpoint", recorded)
    train(data_dir, tmp_path)
    assert written == ["best.pt", "latest.pt"]


def test_args_json_alone_repeats_a_run(data_dir, tmp_path):
    first = train(data_dir, tmp_path, model="cvae", num_threads=None, loss="both")
    args = json.loads((first / "args.json").read_text())
    assert args["augment"] is True and args["recon_loss"] == "bce" and args["num_threads"] >= 1
    assert json.loads(json.dumps(pv.load_checkpoint(first)["args"])) == args
    second = pv.main(pv.Args(**args))
    assert second != first
    assert_same_run(first, second)


def test_two_starts_in_one_second_get_two_folders(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.time, "time", lambda: 1_700_000_000.0)
    assert train(data_dir, tmp_path) != train(data_dir, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_of_the_program_keeps_its_traceback(data_dir, tmp_path, monkeypatch):
    def broken(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(pv, "compute_losses", broken)
    with pytest.raises(ValueError, match="a bug"):
        pv.cli(["--data", str(data_dir), "--runs-dir", str(tmp_path), "--no-cuda"])


def test_checkpoints_of_earlier_versions_load_or_are_refused(data_dir, tmp_path, capsys):
    """Those without progress in an epoch, with a list of metrics and the flag --critic."""
    run_dir = train(data_dir, tmp_path / "old", model="cvae")
    whole = train(data_dir, tmp_path / "new", model="cvae", epochs=2)
    saved = pv.load_checkpoint(run_dir)
    del saved["progress"]
    saved["metrics"] = [{"epoch": 1}]
    saved["args"] |= {"critic": None, "augment": None, "recon_loss": "auto", "resume": None}
    for name in ("best.pt", "latest.pt"):
        torch.save(saved, run_dir / name)
    for a, b in zip(pv.load_vae(run_dir).parameters(), saved["model"].values(), strict=True):
        assert torch.equal(a, b)
    assert pv.cli(["--resume", str(run_dir), "--epochs", "2"]) == 0
    assert pv.load_checkpoint(run_dir)["epoch"] == 2
    rows, expected = read_csv(run_dir / "metrics.csv"), read_csv(whole / "metrics.csv")
    assert rows[0].keys() == expected[0].keys() and [row["epoch"] for row in rows] == ["1", "2"]
    saved["args"]["critic"] = "runs/critic"
    torch.save(saved, run_dir / "latest.pt")
    capsys.readouterr()
    assert pv.cli(["--resume", str(run_dir), "--epochs", "3"]) == 2
    error = capsys.readouterr().err
    assert "was made with --critic" in error and error.count("\n") == 1


def test_resume_refuses_a_contradiction(data_dir, tmp_path, capsys):
    run_dir = train(data_dir, tmp_path)
    assert pv.cli(["--resume", str(run_dir), "--epochs", "2", "--latent-size", "7"]) == 2
    assert "--latent-size 7 contradicts the checkpoint's 4" in capsys.readouterr().err


def test_a_finished_run_is_resumed_to_do_what_comes_after_training_again(data_dir, tmp_path, capsys):
    run_dir = train(data_dir, tmp_path, loss="both")
    before = (run_dir / "latest.pt").read_bytes(), (run_dir / "metrics.csv").read_bytes()
    closing = ("probe.csv", "best.pt")
    probe = (run_dir / "probe.csv").read_bytes()
    for name in closing:
        (run_dir / name).unlink()
    capsys.readouterr()
    assert pv.cli(["--resume", str(run_dir)]) == 0
    said = capsys.readouterr()
    assert "has no best.pt: its latest.pt is taken" in said.err and f"done: {run_dir}" in said.out
    assert (run_dir / "probe.csv").read_bytes() == probe  # of one epoch the latest is the best
    assert ((run_dir / "latest.pt").read_bytes(), (run_dir / "metrics.csv").read_bytes()) == before


def test_a_run_finds_its_data_where_it_has_moved(data_dir, tmp_path, capsys):
    here = tmp_path / "here"
    shutil.copytree(data_dir, here)
    run_dir = train(here, tmp_path)
    here.rename(tmp_path / "there")
    assert pv.cli(["--resume", str(run_dir), "--epochs", "2"]) == 2
    assert capsys.readouterr().err.startswith(f"error: expected a dataset in {here}")
    other = collect(tmp_path, policies=("nearest_stag", "nearest_hare", "random"), name="other", seed=2)
    assert pv.cli(["--resume", str(run_dir), "--epochs", "2", "--data", str(other)]) == 2
    assert "was trained on other data" in capsys.readouterr().err
    assert pv.cli(["--resume", str(run_dir), "--epochs", "2", "--data", str(tmp_path / "there")]) == 0
    saved = pv.load_checkpoint(run_dir)
    assert saved["epoch"] == 2 and saved["args"]["data"] == str(tmp_path / "there")


def test_a_run_that_another_process_writes_is_left_alone(data_dir, tmp_path, capsys):
    run_dir = train(data_dir, tmp_path)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    program = "import runs, sys, time; from pathlib import Path; runs.keep_folder(Path(sys.argv[1]), 'again'); "
    program += "print('kept', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", program, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "kept\n"
    assert pv.cli(["--resume", str(run_dir), "--epochs", "2"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"another process is writing in {run_dir}" in said
    pv.load_vae(run_dir)  # reading needs no lock
    other.kill()
    other.wait()
    (run_dir / "run.lock").unlink()
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def test_weights_that_are_none_are_refused_in_one_line(data_dir, tmp_path, capsys):
    run_dir = train(data_dir, tmp_path)
    saved = pv.load_checkpoint(run_dir)
    saved["model"]["policy.0.bias"][3] = float("nan")
    for name in ("latest.pt", "best.pt"):
        torch.save(saved, run_dir / name)
    with pytest.raises(ValueError, match="best.pt: its VAE is NaN or infinite at policy.0.bias"):
        pv.load_vae(run_dir)
    assert pv.cli(["--resume", str(run_dir), "--epochs", "2"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "its VAE is NaN or infinite at policy.0.bias" in said


def test_an_interrupt_after_training_says_what_is_saved(data_dir, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise runs.Terminated

    monkeypatch.setattr(pv, "report", interrupted)
    flags = ["--data", str(data_dir), "--runs-dir", str(tmp_path), "--no-cuda", "--epochs", "1", "--hidden-size", "8"]
    assert pv.cli(flags) == 143
    (run_dir,) = tmp_path.iterdir()
    again = f"python pretrain_vae.py --resume {run_dir}"
    assert capsys.readouterr().err == f"terminated; 1 of 1 epochs saved in {run_dir}; go on with: {again}\n"
    monkeypatch.undo()
    assert pv.cli(["--resume", str(run_dir)]) == 0
    assert (run_dir / "probe.csv").exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(data_dir, tmp_path, monkeypatch, capsys):
    whole = train(data_dir, tmp_path / "whole", epochs=2)
    real, calls = runs.write_bytes, []

    def full(path, content):
        calls.append(path.name)
        if len(calls) == 4:  # args.json, best.pt and latest.pt of the first epoch are written
            monkeypatch.setattr(runs.os, "fsync", no_space)
        real(path, content)

    def no_space(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    sync = os.fsync
    monkeypatch.setattr(runs, "write_bytes", full)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name not in ("cuda", "epochs")]
    flags += ["--no-cuda", "--epochs", "2", "--data", str(data_dir), "--runs-dir", str(tmp_path / "full")]
    assert pv.cli(flags) == 1
    said = capsys.readouterr().err
    (run_dir,) = (tmp_path / "full").iterdir()
    assert said.count("\n") == 1 and ": no space left on device; 1 of 2 epochs saved in " in said
    assert said.endswith(f"go on with: python pretrain_vae.py --resume {run_dir}\n")
    monkeypatch.setattr(runs.os, "fsync", sync)
    assert pv.cli(["--resume", str(run_dir)]) == 0
    assert_same_run(run_dir, whole)


def test_data_larger_than_memory_is_streamed(data_dir, tmp_path, capsys):
    in_memory = train(data_dir, tmp_path / "a")
    assert "in memory" in capsys.readouterr().out
    streamed = train(data_dir, tmp_path / "b", memory_limit_mb=0)
    assert "read from the disk" in capsys.readouterr().out
    for a, b in zip(pv.load_vae(in_memory).parameters(), pv.load_vae(streamed).parameters(), strict=True):
        assert torch.equal(a, b)


def test_held_out_policies_are_scored_apart(data_dir, tmp_path):
    run_dir = train(data_dir, tmp_path, model="cvae", holdout_policies=("random",))
    table = read_csv(run_dir / "moa_eval_epoch1.csv")
    seen = {(row["split"], row["name"]) for row in table if row["kind"] == "policy"}
    assert ("heldout_policies", "random") in seen and ("heldout_episodes", "random") not in seen
    assert any(key.startswith("eval_policies/") for key in read_csv(run_dir / "metrics.csv")[0])


def test_a_teacher_and_its_errors(data_dir, tmp_path):
    teacher = train(data_dir, tmp_path / "teacher", model="vae", loss="recon", latent_size=2)  # half the student's
    run_dir = train(data_dir, tmp_path / "student", model="cvae", teacher=str(teacher))
    saved = pv.load_checkpoint(run_dir)["teacher"]
    for name, value in pv.load_vae(teacher).state_dict().items():
        assert torch.equal(saved[name], value)  # frozen
    with pytest.raises(ValueError, match="'latent_size': 3"):
        train(data_dir, tmp_path, model="cvae", teacher=str(teacher), latent_size=5)
    with pytest.raises(ValueError, match=r"--input obs of shape \(4, 4, 7\).*state of shape"):
        train(data_dir, tmp_path, model="cvae", teacher=str(teacher), input="state")


def with_values(dataset):
    values = np.arange(dataset.num_steps * 4, dtype=np.float32).reshape(-1, 4)
    values[::2] = -values[::2]  # odd rows are worth more
    other = load_dataset(dataset.path)
    other.values = values
    return other


def test_subgoals_of_highest_value(dataset, samples):
    valued = with_values(dataset)
    steps = opponent_samples.best_goal_steps(valued, samples, 3)
    for i in range(0, 300, 7):
        ahead = [min(i + k, int(samples.last[i])) for k in (1, 2, 3)]
        worth = [valued.values[samples.rows[j], samples.seats[j]] for j in ahead]
        assert worth[steps[i] - 1] == max(worth)


def test_values_of_the_data_choose_the_subgoals(data_dir, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(pv, "load_dataset", lambda path: with_values(dataset))
    losses = []
    for subgoal in ("value", "random"):
        run_dir = train(data_dir, tmp_path, model="cvae", subgoal=subgoal)
        losses.append(float(read_csv(run_dir / "metrics.csv")[0]["losses/kl_loss"]))
    assert losses[0] != losses[1] and all(math.isfinite(loss) for loss in losses)


def test_observations_of_any_shape_are_flat(dataset):
    spec = opponent_samples.flat_obs_spec({**dataset.meta, "env_id": "other", "obs_shape": [3, 4]})
    assert len(spec.names) == 12 and spec.ego == "none" and not spec.moves


def test_pursuit_counts_are_fed_as_numbers(tmp_path):
    kwargs = {"env_kwargs": '{"max_cycles": 12}', "num_steps": 60, "num_envs": 2, "env_id": "pursuit"}
    data = collect(tmp_path / "data", **kwargs)
    run_dir = train(data, tmp_path / "runs", model="cvae", loss="both")
    model = pv.load_vae(run_dir)
    assert model.spec["max_cells"] == 0 and not model.spec["centred"]
    obs = torch.from_numpy(load_dataset(data).observations[:3])
    assert model.encode(obs).shape == (3, 8, 4)
    table = read_csv(run_dir / "moa_eval_epoch1.csv")[0]
    assert float(table["ceiling_known_top1"]) == pytest.approx(0.2)  # uniform over 5 actions


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"latent_size": 0}, "--latent-size must be at least 1, got 0"),
        ({"codebook_size": 0, "model": "vqvae"}, "--codebook-size"),
        ({"model": "cvae", "horizon": 35}, "longest episode, 35 steps"),
        ({"subgoal": "value", "model": "cvae"}, "collect_data.py --values-of"),
        ({"subgoal": "value"}, "only, got --model vae"),
        ({"resume": "nowhere"}, "--resume: expected a run folder, got nowhere"),
        ({"holdout_policies": ("nobody",)}, "one of nearest_stag"),
        ({"heldout_fraction": 0.0}, "between 0 and 1"),
        ({"teacher": "nowhere", "model": "cvae"}, "no checkpoint at"),
        ({"learning_rate": math.nan}, "--learning-rate must be at least 0, got nan"),
        ({"num_threads": 0}, "--num-threads must be at least 1, got 0"),
        ({"data": ""}, "--data: expected a dataset"),
        ({"data": "nowhere"}, "found none"),
    ],
)
def test_bad_arguments_are_one_line(data_dir, tmp_path, kwargs, message):
    kwargs = {"data": data_dir, **kwargs}
    with pytest.raises(runs.UsageError, match=message) as error:
        train(kwargs.pop("data"), tmp_path, **kwargs)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())  # no run folder for a run that never began


def test_a_foreign_checkpoint_is_one_line(tmp_path):
    torch.save({"format": "other"}, tmp_path / "latest.pt")
    with pytest.raises(runs.UsageError, match="'other', expected 'pretrain_vae/3'"):
        pv.load_vae(tmp_path)


def test_it_encodes_what_the_env_gives(data_dir, tmp_path):
    model = pv.load_vae(train(data_dir, tmp_path, model="cvae"))
    env = StagHuntVecEnv(3, "cpu", 0, **preset_options("stag_hunt"))
    step, history = env.reset(0), model.initial_history(3, 4)
    for _ in range(3):
        z = model.encode(step.obs, history)
        assert z.shape == (3, 4, 4) and z.isfinite().all()
        actions = torch.full((3, 4), 4)
        history = model.observe(history, step.obs, actions)
        step = env.step(actions)


def test_command_line_error_is_one_line():
    command = [sys.executable, "pretrain_vae.py", "--data", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
