import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gymnasium.spaces import MultiDiscrete

import hyper_mappo
import runs
from envs import check_env, make_parallel_env, stag_hunt
from envs.pursuit import PursuitVecEnv
from hyper_mappo import (
    COLUMNS,
    FORMS,
    Actor,
    Args,
    Critic,
    Policy,
    ValueNorm,
    backward_in_threads,
    cli,
    compute_gae,
    count_multiplications,
    entropy,
    evaluate,
    kl_divergence,
    load_critic,
    log_prob,
    mean_var,
    ppo_loss,
    sample_actions,
    smoothness,
)
from tests import tiny_envs

ROOT = Path(__file__).parent.parent
LOSSES = [tag for tag in COLUMNS if tag.startswith("losses/") and "grad_norm" not in tag and "explained" not in tag]
LOSSES += ["hyper/delta_norm", "hyper/step_change"]
TINY = dict(num_envs=4, num_steps=8, num_minibatches=2, hidden_size=16, context_size=8, context_heads=2, hyper_basis=2)
TINY["final_ent_coef"] = None  # runs in two pieces are compared with whole ones, whose schedule is another
SMALL_PURSUIT = json.dumps({"x_size": 8, "y_size": 8, "n_pursuers": 3, "n_evaders": 4, "max_cycles": 13})


def spec(discrete=True, num_agents=3):
    return {
        "env_id": "none",
        "num_agents": num_agents,
        "obs_shape": [5],
        "obs_scale": 1.0,
        "state_shape": [7],
        "state_scale": 1.0,
        "discrete": discrete,
        "num_actions": 4,
    }


def random_actor(discrete=True, **flags):
    """An actor whose hypernetwork is not at its zero initialisation."""
    torch.manual_seed(0)
    args = Args(**{**TINY, **flags})
    if args.hyper == "none":
        return Actor(spec(discrete), args), args
    actor = Actor(spec(discrete), args)
    for p in actor.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return actor, args


def random_inputs(T=6, N=4, A=3):
    """Observations, masks, who is active (agent 1 of env 0 leaves at step 3), episode starts (env 2 restarts at 4)."""
    torch.manual_seed(1)
    active = torch.ones(T, N, A, dtype=torch.bool)
    active[3:, 0, 1] = False
    starts = torch.zeros(T, N, dtype=torch.bool)
    starts[4, 2] = True
    mask = torch.rand(T, N, A, 4) > 0.3
    mask[..., 0] = True
    return torch.randn(T, N, A, 5), mask, active, starts


def random_minibatch(actor, args, discrete=True):
    obs, mask, active, starts = random_inputs()
    T, N, A = active.shape
    hidden = torch.randn(N, A, actor.hidden_size)
    with torch.no_grad():
        dists, _, _ = actor(obs, mask if discrete else None, active, starts, hidden)
    actions = sample_actions(dists, discrete)
    mb = {"obs": obs, "state": torch.randn(T, N, 7), "active": active, "starts": starts, "actions": actions}
    mb |= {
        "anchor_dists": dists,
        "learns": active,
        "valued": active,
        "logprobs": log_prob(dists, actions, discrete),
        "hidden": hidden.unsqueeze(0),
    }
    mb |= {"advantages": torch.randn(T, N, A), "returns": torch.randn(T, N, A), "values": torch.randn(T, N, A)}
    if discrete:
        mb["action_mask"] = mask
    return mb


def run(tmp_path, name="run", **flags):
    runs_dir = tmp_path / name
    defaults = dict(env_id="tests.tiny_envs:own_number", num_env_procs=0, total_timesteps=64, eval_episodes=0, **TINY)
    flags = {**defaults, "update_threads": 1, "runs_dir": str(runs_dir), **flags}
    if flags.get("hyper") == "none":
        unused = hyper_mappo.HYPER_ONLY + ([] if flags.get("actor_context") else hyper_mappo.CONTEXT_ONLY)
        flags = {name: x for name, x in flags.items() if name not in unused}
    return hyper_mappo.main(Args(**flags))


def load_checkpoint(run_dir):
    return runs.load_checkpoint(run_dir, hyper_mappo.CHECKPOINT_FORMAT)


def metrics(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------------ GAE and losses


def test_gae_matches_hand_made_table():
    # gamma 0.5, lambda 0.5; columns are three envs with one agent, rewards 1 and values 2 throughout.
    # env 0: nothing ends; last next value 4. env 1: terminates at t=1. env 2: truncated at t=1, final value 8.
    rewards, values = torch.ones(3, 3, 1), torch.full((3, 3, 1), 2.0)
    terminations = torch.zeros(3, 3, 1, dtype=torch.bool)
    ended = torch.zeros(3, 3, 1, dtype=torch.bool)
    next_values = torch.full((3, 3, 1), 2.0)
    next_values[2] = 4.0
    terminations[1, 1], ended[1, 1] = True, True
    next_values[1, 1] = 100.0  # must not be used
    ended[1, 2], next_values[1, 2] = True, 8.0
    advantages, returns = compute_gae(rewards, values, next_values, terminations, ended, 0.5, 0.5)
    # delta = 1 + 0.5 v' - 2; advantage = delta + 0.25 * next advantage, unless the episode ended in between
    expected = torch.tensor(
        [
            [0.0 + 0.25 * (0.0 + 0.25 * 1.0), 0.0 + 0.25 * -1.0, 0.0 + 0.25 * 3.0],
            [0.0 + 0.25 * 1.0, -1.0, 3.0],
            [1.0, 1.0, 1.0],
        ]
    )
    torch.testing.assert_close(advantages.squeeze(-1), expected)
    torch.testing.assert_close(returns, advantages + 2.0)


def test_gae_termination_wins_where_both_happen_and_one_agent_can_leave_alone():
    rewards, values, next_values = torch.ones(2, 1, 2), torch.zeros(2, 1, 2), torch.full((2, 1, 2), 10.0)
    terminations = torch.tensor([[[True, False]], [[False, True]]])
    ended = torch.tensor([[[True, False]], [[True, True]]])  # agent 1 terminates in the very step of the time limit
    advantages, _ = compute_gae(rewards, values, next_values, terminations, ended, 0.5, 1.0)
    torch.testing.assert_close(advantages[0, 0], torch.tensor([1.0, 1 + 5.0 + 0.5 * 1.0]))
    torch.testing.assert_close(advantages[1, 0, 1], torch.tensor(1.0))


@pytest.mark.parametrize("discrete", [True, False])
def test_distributions_match_torch_distributions(discrete):
    torch.manual_seed(0)
    old, new = torch.randn(2, 50, 8).unbind()
    if discrete:
        old, new = old.log_softmax(-1), new.log_softmax(-1)
        old_d, new_d = (torch.distributions.Categorical(logits=x) for x in (old, new))
    else:
        old_d, new_d = (
            torch.distributions.Independent(torch.distributions.Normal(x[..., :4], x[..., 4:].exp()), 1)
            for x in (old, new)
        )
    actions = old_d.sample()
    torch.testing.assert_close(log_prob(old, actions, discrete), old_d.log_prob(actions))
    torch.testing.assert_close(entropy(old, discrete), old_d.entropy())
    torch.testing.assert_close(
        kl_divergence(old, new, discrete), torch.distributions.kl_divergence(old_d, new_d), rtol=1e-4, atol=1e-5
    )
    samples = sample_actions(old[:1].expand(20_000, -1), discrete)
    if discrete:
        frequencies = torch.bincount(samples, minlength=8) / len(samples)
        torch.testing.assert_close(frequencies, old_d.probs[0], atol=0.015, rtol=0)
    else:
        torch.testing.assert_close(samples.mean(0), old_d.mean[0], atol=0.1, rtol=0)
        torch.testing.assert_close(samples.std(0), old_d.base_dist.stddev[0], atol=0.1, rtol=0.05)


def test_actions_of_parts_match_torch_distributions():
    torch.manual_seed(0)
    nvec, spec_of_parts = [3, 2, 4], {**spec(), "num_actions": 9, "nvec": [3, 2, 4]}
    actor = Actor(spec_of_parts, Args(**TINY))
    for p in actor.parameters():
        p.data += 0.5 * torch.randn_like(p)
    obs, _, active, starts = random_inputs()
    mask = torch.rand(*active.shape, 9) > 0.4
    mask[..., [0, 3, 5]] = True  # an option of every part
    hidden = torch.randn(4, 3, actor.hidden_size)
    dist, _, _ = actor(obs, mask, active, starts, hidden)
    other, _, _ = actor(obs + 0.5, mask, active, starts, hidden)
    categoricals = [torch.distributions.Categorical(logits=part) for part in dist.split(nvec, dim=-1)]
    others = [torch.distributions.Categorical(logits=part) for part in other.split(nvec, dim=-1)]
    for part in dist.split(nvec, dim=-1):
        torch.testing.assert_close(part.exp().sum(-1), torch.ones(active.shape))
    actions = sample_actions(dist, True, nvec=nvec)
    assert actions.shape == (*active.shape, 3)
    expected = sum(c.log_prob(a) for c, a in zip(categoricals, actions.unbind(-1), strict=True))
    torch.testing.assert_close(log_prob(dist, actions, True, nvec), expected)
    torch.testing.assert_close(entropy(dist, True), sum(c.entropy() for c in categoricals), rtol=1e-4, atol=1e-5)
    kl = sum(torch.distributions.kl_divergence(a, b) for a, b in zip(categoricals, others, strict=True))
    torch.testing.assert_close(kl_divergence(dist, other, True), kl, rtol=1e-4, atol=1e-5)
    offsets = torch.tensor([0, 3, 5])
    for _ in range(20):
        assert mask.gather(-1, sample_actions(dist, True, nvec=nvec) + offsets).all()
    best = sample_actions(dist, True, True, nvec)
    assert torch.equal(best, torch.stack([c.probs.argmax(-1) for c in categoricals], dim=-1))


class NumberInParts(tiny_envs.OwnNumber):
    """One's own number, 0 to 2, is asked for in two parts: whether it is 0, and the number itself."""

    metadata = {"name": "number_in_parts"}

    def action_space(self, agent):
        return MultiDiscrete([2, 3])

    def step(self, actions):
        right = {}
        for i, agent in enumerate(tiny_envs.AGENTS):
            is_zero, number = actions[agent]
            right[agent] = self.numbers[i] if is_zero == (number == 0) else -1
            right[agent] = number if right[agent] == self.numbers[i] else -1
        return super().step(right)


def test_actions_of_several_parts_are_learnt_and_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_envs, "number_in_parts", NumberInParts, raising=False)
    flags = dict(num_envs=16, num_steps=32, num_minibatches=4, hidden_size=32, total_timesteps=40_000, anneal_lr=True)
    flags |= dict(learning_rate=2e-3, ent_coef=0.01, eval_episodes=50, hyper="none")
    run_dir = run(tmp_path, env_id="tests.tiny_envs:number_in_parts", **flags)
    assert json.loads((run_dir / "eval.json").read_text())["mean_return"] >= 0.9 * 8
    assert load_checkpoint(run_dir)["spec"]["nvec"] == [2, 3]


def test_masked_actions_are_never_taken_and_give_finite_numbers():
    actor, _ = random_actor()
    obs, mask, active, starts = random_inputs()
    dist, _, _ = actor(obs, mask, active, starts, torch.zeros(4, 3, actor.hidden_size))
    for _ in range(20):
        assert mask.gather(-1, sample_actions(dist, True).unsqueeze(-1)).all()
    assert entropy(dist, True).isfinite().all() and kl_divergence(dist, dist.roll(1, 0), True).isfinite().all()


FLAGS = {  # every form, and every choice of the context
    **{form: {"hyper": form} for form in FORMS},
    "delta, 8 x full": {"hyper": "delta", "hyper_basis": 8, "hyper_rank": 0},
    "delta, 8 x rank 3": {"hyper": "delta", "hyper_basis": 8, "hyper_rank": 3},
    "local": {"hyper": "delta", "hyper_context": "local"},
    "agent-id": {"hyper": "delta", "hyper_context": "agent-id"},
    "shared": {"hyper": "delta", "share_delta": True},
    "actor context": {"hyper": "none", "actor_context": True},
}


def with_bias(layer):
    return torch.cat([layer.weight, layer.bias[:, None]], dim=1)


def materialised_weights(actor, code):
    """All actor layers of every sample, written out: a list of [..., out, in + 1], the bias in the last column."""
    hyper, layers = actor.hyper, []
    K, r, form = hyper.basis, hyper.rank, type(hyper)
    scales = hyper.scales if form is hyper_mappo.LastLayer else []
    alpha = hyper.alpha(code) if form is hyper_mappo.LastLayer else code
    for i, layer in enumerate(actor.layers):
        if i < len(scales):
            layers.append(scales[i](code)[..., None] * with_bias(layer))
            continue
        part = i - len(scales)
        rows = with_bias(hyper.down[part])
        basis = rows.view(K, -1, rows.shape[1])
        if r:
            ups = hyper.up[part].unflatten(1, (K, r))
            basis = torch.stack([ups[:, k] @ basis[k] for k in range(K)])
        delta = torch.einsum("...k,koi->...oi", alpha, basis)
        layers.append(delta if layer is None else with_bias(layer) + delta)
    return layers


@pytest.mark.parametrize("flags", [FLAGS[name] for name in FLAGS if name != "actor context"], ids=str)
def test_generated_layers_equal_materialised_weights(flags):
    actor, args = random_actor(**flags)
    obs, _, active, starts = random_inputs()
    inputs = (obs, None, active, starts, torch.zeros(4, 3, actor.hidden_size))
    dist, _, _ = actor(*inputs)
    target = torch.randn_like(dist)
    (dist * target).sum().backward()
    fast = {name: p.grad.clone() for name, p in actor.named_parameters()}
    actor.zero_grad()
    _, code, _ = actor(*inputs)
    x = obs
    for i, weight in enumerate(materialised_weights(actor, code)):
        x = torch.einsum("...oi,...i->...o", weight, torch.cat([x, torch.ones_like(x[..., :1])], dim=-1))
        x = x.relu() if i < 2 else x.log_softmax(-1)
    torch.testing.assert_close(dist, x, rtol=1e-5, atol=1e-5)
    (x * target).sum().backward()
    for name, p in actor.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("flags", [FLAGS[name] for name in FLAGS if name != "actor context"], ids=str)
def test_smoothness_equals_a_loop_written_out(flags):
    actor, _ = random_actor(**flags)
    obs, _, active, starts = random_inputs()
    if flags.get("share_delta"):
        active[:] = True  # with it, who left no longer counts in the mean of the step before
    hidden, codes, hiddens = torch.zeros(4, 3, actor.hidden_size), [], []
    for t in range(6):
        hiddens.append(hidden)
        _, code, hidden = actor(obs[t : t + 1], None, active[t : t + 1], starts[t : t + 1], hidden)
        codes.append(code[0])
    code = torch.stack(codes)
    # The first two agents learn, the third is a partner: its changes do not count, but it is part of a shared context.
    learns = active & (torch.arange(3) < 2)
    theta = torch.cat([w.flatten(-2) for w in materialised_weights(actor, code)], dim=-1)  # [T, N, A, P]
    squares, norms = [], []
    for t in range(1, 6):
        for n in range(4):
            for a in range(3):
                if starts[t, n] or not learns[t, n, a] or not learns[t - 1, n, a]:
                    continue
                change = theta[t, n, a] - theta[t - 1, n, a]
                squares.append((change**2).sum())
                norms.append(change.norm())
    # but for the restart of env 2, and agent 1 of env 0 after it left
    assert len(squares) == 5 * 4 * 2 - 2 - (0 if flags.get("share_delta") else 3)
    assert theta.shape[-1] == actor.hyper.num_generated
    base = 0.0 if actor.layers[0] is None else torch.cat([with_bias(layer).flatten() for layer in actor.layers])
    sequence = [x[1:] for x in (code, active, learns, starts)]
    single_steps = [x.flatten(0, 1).unsqueeze(0) for x in sequence]
    # one sequence of five steps, or five of one
    for inputs, first in ((sequence, hiddens[1]), (single_steps, torch.cat(hiddens[1:]))):
        codes, present, counted, opened = inputs
        before = actor.hyper.code(actor.context.previous(first, present[0]))
        smooth, step_change, delta_norm = smoothness(actor, codes, before, counted, opened)
        torch.testing.assert_close(smooth, torch.stack(squares).mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(step_change, torch.stack(norms).mean(), rtol=1e-4, atol=1e-6)
        norms_of_delta = (theta - base).norm(dim=-1)[1:][learns[1:]]
        torch.testing.assert_close(delta_norm, norms_of_delta.mean(), rtol=1e-4, atol=1e-5)


def test_a_partner_is_part_of_the_shared_context_of_the_step_before():
    actor, args = random_actor(share_delta=True, history="none")
    mb = {name: x[:1] for name, x in random_minibatch(actor, args).items()}
    mb["active"], mb["learns"] = torch.ones(1, 4, 3, dtype=torch.bool), (torch.arange(3) < 2).expand(1, 4, 3)
    mb["starts"] = torch.zeros(1, 4, dtype=torch.bool)
    _, _, hidden = actor(mb["obs"], mb["action_mask"], mb["active"], mb["starts"], mb["hidden"][0])
    mb["hidden"] = hidden.detach().unsqueeze(0)  # the step before saw the same: theta does not change
    _, numbers = ppo_loss(actor, Critic(spec(), args), mb, args)
    assert numbers["hyper/step_change"] < 1e-3 < numbers["hyper/delta_norm"]


# ------------------------------------------------------------------------------------------ hypernetwork


@pytest.mark.parametrize("history", ["none", "gru", "lstm"])
@pytest.mark.parametrize("form", ["delta", "last-layer"])
def test_hypernetwork_starts_at_the_base_actor_and_then_matters(form, history):
    torch.manual_seed(0)
    actor = Actor(spec(), Args(**TINY, hyper=form, history=history))
    obs, _, active, starts = random_inputs()
    hidden = torch.zeros(4, 3, actor.hidden_size)
    with_hyper = actor(obs, None, active, starts, hidden)[0]
    x = obs
    for i, layer in enumerate(actor.layers):
        x = layer(x).relu() if i < 2 else layer(x)
    assert torch.equal(with_hyper, x.log_softmax(-1))
    for p in actor.hyper.parameters():
        p.data += 1.0
    assert (actor(obs, None, active, starts, hidden)[0] - with_hyper).abs().max() > 1e-3


@pytest.mark.parametrize("context", ["joint", "local", "agent-id"])
@torch.no_grad()
def test_full_form_starts_with_a_standard_actors_activation_variance(context):
    torch.manual_seed(0)
    wide = {**spec(num_agents=8), "obs_shape": [100]}
    obs, T = torch.randn(10, 20, 8, 100), 10
    active, starts = torch.ones(T, 20, 8, dtype=torch.bool), torch.zeros(T, 20, dtype=torch.bool)
    ratios = []
    for seed in range(8):  # the mean over initialisations is what the source promises
        torch.manual_seed(seed)
        variances = []
        for form in ("full", "none"):
            flags = {"hyper_context": context} if form == "full" else {}
            actor = Actor(wide, Args(hyper=form, hidden_size=256, **flags))
            x = obs
            if form == "full":
                hidden = torch.zeros(20, 8, actor.hidden_size)
                code = actor.hyper.code(actor.context(obs, None, active, starts, hidden)[0])
            for i in range(2):
                layer = actor.layers[i]
                x = x.flatten(0, -2)
                x = (
                    layer(x)
                    if form == "none"
                    else actor.hyper.apply_layer(i, None, x, actor.hyper.mix(code.flatten(0, 2)))
                )
                variances.append(x.var())
                x = x.relu()
        ratios.append(torch.stack([variances[0] / variances[2], variances[1] / variances[3]]))
    assert ((torch.stack(ratios).mean(0) - 1).abs() < 0.1).all()


@pytest.mark.parametrize("flags", [*FLAGS.values(), {"agent_id": True}, {"hyper": "none"}], ids=str)
@pytest.mark.parametrize("kind", ["gru", "lstm", "continuous"])
def test_gradients_reach_every_parameter(flags, kind):
    if kind != "continuous" and flags.get("hyper_context") != "agent-id" and flags != {"hyper": "none"}:
        flags = {**flags, "history": kind}
    actor, args = random_actor(kind != "continuous", **flags)
    critic = Critic(spec(kind != "continuous"), args)
    loss, numbers = ppo_loss(actor, critic, random_minibatch(actor, args, kind != "continuous"), args)
    loss.backward()
    for name, p in [*actor.named_parameters(), *critic.named_parameters()]:
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert all(x.isfinite() for x in numbers.values()) and set(numbers) <= set(COLUMNS)


@pytest.mark.parametrize("critic_obs", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_hyper_critic_makes_its_weights_from_the_state(form, critic_obs):
    torch.manual_seed(0)
    critic = Critic(spec(), Args(**{**TINY, "hyper": form, "hyper_critic": True, "critic_obs": critic_obs}))
    state, obs = torch.randn(6, 7), torch.randn(6, 3, 5)
    inputs = state
    if critic_obs:
        inputs = torch.cat([state.unsqueeze(1).expand(-1, 3, -1), obs], dim=-1)  # [6, 3, 7 + 5]
    if form != "full":
        x = inputs
        for i, layer in enumerate(critic.layers):
            x = layer(x).relu() if i < 2 else layer(x)
        assert torch.equal(critic(state, obs), x.view(6, 3))
    for p in critic.parameters():
        p.data += 0.3 * torch.randn_like(p)
    weights = materialised_weights(critic, critic.hyper.code(critic.encoder(state).relu()))
    x = inputs
    for i, weight in enumerate(weights):
        if critic_obs:
            weight = weight.unsqueeze(1)  # one for all agents of an env
        x = torch.einsum("...oi,...i->...o", weight, torch.cat([x, torch.ones_like(x[..., :1])], dim=-1))
        x = x.relu() if i < 2 else x
    torch.testing.assert_close(critic(state, obs), x.view(6, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("agent_id", [False, True])
def test_critic_is_one_network_of_state_and_own_observation(agent_id):
    torch.manual_seed(0)
    critic = Critic(spec(), Args(**TINY, agent_id=agent_id))
    state, obs = torch.randn(2, 6, 7), torch.randn(2, 6, 3, 5)
    x = torch.cat([state.unsqueeze(2).expand(-1, -1, 3, -1), obs], dim=-1)  # [2, 6, 3, 7 + 5]
    if agent_id:
        x = torch.cat([x, torch.eye(3).expand(2, 6, 3, 3)], dim=-1)
    for i, layer in enumerate(critic.layers):
        x = layer(x).relu() if i < 2 else layer(x)
    values = critic(state, obs)
    torch.testing.assert_close(values, x.squeeze(-1), rtol=1e-5, atol=1e-6)
    changed = obs.clone()
    changed[..., 1, :] += 1.0
    moved = (critic(state, changed) - values).abs().amax((0, 1)) > 1e-4
    assert moved.tolist() == [False, True, False]
    without = Critic(spec(), Args(**TINY, critic_obs=False))
    assert torch.equal(without(state, obs), without(state, changed)) and without(state, obs).shape == (2, 6, 3)


@pytest.mark.parametrize("history", ["none", "gru", "lstm"])
@pytest.mark.parametrize("flags", [{}, {"hyper_context": "local"}, {"hyper": "none", "actor_context": True}], ids=str)
def test_acting_step_by_step_equals_the_update_over_the_sequence(flags, history):
    actor, _ = random_actor(history=history, **flags)
    obs, mask, active, starts = random_inputs()
    hidden0 = torch.randn(4, 3, actor.hidden_size)
    sequence, _, last = actor(obs, mask, active, starts, hidden0)
    hidden = hidden0
    for t in range(len(obs)):
        one = (x[t : t + 1] for x in (obs, mask, active, starts))
        dist, _, hidden = actor(*one, hidden)
        torch.testing.assert_close(dist[0], sequence[t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden, last, rtol=1e-4, atol=1e-5)


def test_local_context_sees_nobody_else_and_agent_id_nothing_at_all():
    for context in ("local", "agent-id", "joint"):
        actor, _ = random_actor(hyper_context=context)
        obs, _, active, starts = random_inputs()
        inputs = (active, starts, torch.zeros(4, 3, actor.hidden_size))
        code = actor(obs, None, *inputs)[1]
        changed = obs.clone()
        changed[:, :, 2] += 1.0
        differs = (actor(changed, None, *inputs)[1] - code).abs().amax((0, 1, 3)) > 1e-6  # [A]
        assert differs.tolist() == {"local": [0, 0, 1], "agent-id": [0, 0, 0], "joint": [1, 1, 1]}[context]
        assert (code[:, :, 0] - code[:, :, 1]).abs().max() > 1e-3


def test_shared_delta_is_one_for_all_agents_of_an_env_without_those_who_left():
    actor, _ = random_actor(share_delta=True)
    obs, _, active, starts = random_inputs()
    hidden = torch.zeros(4, 3, actor.hidden_size)
    code = actor(obs, None, active, starts, hidden)[1]
    torch.testing.assert_close(code, code[:, :, :1].expand_as(code))
    assert (code[:, 0] - code[:, 1]).abs().max() > 1e-3
    changed = obs.clone()
    changed[3:, 0, 1] = 9.0  # agent 1 of env 0 has left by then
    torch.testing.assert_close(actor(changed, None, active, starts, hidden)[1], code)


@pytest.mark.parametrize("form", FORMS)
def test_plain_actor_is_matched_to_a_forms_parameters(form):
    def count(**flags):
        return sum(p.numel() for p in Actor(spec(), Args(**{**TINY, "hidden_size": 64, **flags})).parameters())

    target = count(hyper=form)
    for extra in ({}, {"actor_context": True}):
        assert abs(count(hyper="none", match_params=form, **extra) / target - 1) < 0.02
    assert abs(count(hyper="none") / target - 1) > 0.05


def test_counted_multiplications_of_a_plain_actor_by_hand():
    args = Args(**{**TINY, "hyper": "none"})
    actor, own = 5 * 16 + 16 * 16 + 16 * 4, 5 * 16 + 16 * 16 + 16
    assert count_multiplications(spec(), args) == int(actor + own + 7 * 16 / 3)  # the state's part once for 3 agents
    narrow = 5 * 8 + 8 * 8 + 8
    assert count_multiplications(spec(), replace(args, critic_hidden_size=8)) == int(actor + narrow + 7 * 8 / 3)
    critic = 7 * 16 + 16 * 16 + 16 * 3  # all of it once
    assert count_multiplications(spec(), replace(args, critic_obs=False)) == int(actor + critic / 3)
    assert count_multiplications(spec(), replace(args, hyper="delta")) > 1.5 * actor


@pytest.mark.parametrize("history, cell", [("gru", torch.nn.GRUCell), ("lstm", torch.nn.LSTMCell)])
def test_rnn_step_equals_torch(history, cell):
    actor, _ = random_actor(history=history)
    rnn, x, hidden = actor.context.rnn, torch.randn(10, 8), torch.randn(10, actor.hidden_size)
    assert type(rnn) is cell
    expected = rnn(x, hidden) if history == "gru" else torch.cat(rnn(x, hidden.chunk(2, dim=-1)), dim=-1)
    inputs = torch.nn.functional.linear(x, rnn.weight_ih, rnn.bias_ih)
    torch.testing.assert_close(actor.context.rnn_step(inputs, hidden), expected)


def test_history_is_forgotten_at_an_episode_start_only():
    actor, _ = random_actor()
    obs, _, active, starts = random_inputs()
    hidden = torch.zeros(4, 3, actor.hidden_size)
    before = actor(obs, None, active, starts, hidden)[0]
    changed = obs.clone()
    changed[0] += 1.0
    after = actor(changed, None, active, starts, hidden)[0]
    differs = (before - after).abs().amax(dim=(-1, -2)) > 1e-7  # [T, N]
    assert differs[5, 0] and differs[3, 2]  # remembered ...
    assert not differs[4:, 2].any()  # ... until env 2 restarts at step 4


def test_permuting_agents_permutes_outputs_and_those_who_left_are_not_seen():
    actor, _ = random_actor()
    obs, mask, active, starts = random_inputs()
    hidden = torch.randn(4, 3, actor.hidden_size)
    order = torch.tensor([2, 0, 1])
    dist, _, _ = actor(obs, mask, active, starts, hidden)
    permuted, _, _ = actor(obs[:, :, order], mask[:, :, order], active[:, :, order], starts, hidden[:, order])
    torch.testing.assert_close(permuted, dist[:, :, order], rtol=1e-4, atol=1e-5)
    changed = obs.clone()
    changed[3:, 0, 1] = 9.0  # agent 1 of env 0 has left by then
    other = actor(changed, mask, active, starts, hidden)[0]
    torch.testing.assert_close(other[:, 0, [0, 2]], dist[:, 0, [0, 2]])
    changed[2, 0, 1] = 9.0  # while it is there, the others see it
    assert (actor(changed, mask, active, starts, hidden)[0][2, 0, 0] - dist[2, 0, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("critic_obs", [True, False])
@pytest.mark.parametrize("hyper", ["none", "delta"])
def test_inactive_agents_enter_no_mean(hyper, critic_obs):
    actor, args = random_actor(hyper=hyper, critic_obs=critic_obs)
    critic = Critic(spec(), args)
    mb = random_minibatch(actor, args)
    loss, numbers = ppo_loss(actor, critic, mb, args)
    gone = ~mb["active"]
    assert gone.any()
    for name in ("advantages", "returns", "values", "logprobs", "anchor_dists"):
        mb[name] = mb[name].clone()
        mb[name][gone] = 50.0
    again, numbers_again = ppo_loss(actor, critic, mb, args)
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(numbers, numbers_again)


@pytest.mark.parametrize("hyper", ["none", "delta"])
def test_threads_together_compute_the_gradient_of_the_whole_minibatch(hyper):
    """Parts of different size with different numbers of learners: the penalty on changes alone may differ a little."""
    actor, args = random_actor(hyper=hyper, smooth_coef=0.0)
    critic, mb = Critic(spec(), args), random_minibatch(actor, args)
    mb["learns"] = mb["active"].clone()
    mb["learns"][1:, :2] = False
    mb["valued"] = mb["learns"]
    loss, numbers = ppo_loss(actor, critic, mb, args)
    params = [*actor.parameters(), *critic.parameters()]
    expected = torch.autograd.grad(loss, params)
    shuffled = torch.randperm(4)
    with ThreadPoolExecutor(3) as threads:
        for parts in ((shuffled,), shuffled.split([1, 2, 1])):
            of_parts = backward_in_threads(ppo_loss, actor, critic, mb, parts, args, threads)
            for param, grad in zip(params, expected, strict=True):
                torch.testing.assert_close(param.grad, grad, rtol=1e-4, atol=1e-7)
            assert list(of_parts) == list(numbers)
            for name in LOSSES[:6]:
                torch.testing.assert_close(of_parts[name], numbers[name], rtol=1e-4, atol=1e-6)


def test_value_norm_follows_active_returns():
    torch.manual_seed(0)
    norm = ValueNorm(True, decay=0.9)
    x, weights = 3.0 + 2.0 * torch.randn(100_000), (torch.rand(100_000) > 0.5).float()
    torch.testing.assert_close(norm.normalize(x), x)  # nothing seen yet
    norm.update(*mean_var(torch.where(weights > 0, x, 1e6), weights))
    mean, std = norm.mean_std()
    assert abs(mean - 3.0) < 0.05 and abs(std - 2.0) < 0.05
    torch.testing.assert_close(norm.denormalize(norm.normalize(x)), x, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("hyper", ["none", "delta"])
def test_a_run_updates_everything_and_logs_finite_numbers(tmp_path, hyper):
    run_dir = run(tmp_path, hyper=hyper, total_timesteps=128)
    rows = metrics(run_dir)
    assert len(rows) == 4
    for row in rows:
        logged = {k: float(v) for k, v in row.items() if v != ""}
        assert all(math.isfinite(x) for x in logged.values())
        assert ("losses/smooth_loss" in logged) == (hyper == "delta")
    checkpoint = load_checkpoint(run_dir)
    torch.manual_seed(1)  # main seeds with 1 and builds the actor first
    fresh = Actor(checkpoint["spec"], Args(**checkpoint["args"])).state_dict()
    unmoved = [name for name, x in checkpoint["actor"].items() if torch.equal(x, fresh[name])]
    assert not unmoved
    assert (run_dir / "learning_curve.png").stat().st_size > 1000
    assert json.loads((run_dir / "args.json").read_text())["hyper"] == hyper


def test_same_seed_same_numbers_other_seed_other_numbers(tmp_path):
    a, b, c = (metrics(run(tmp_path, name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    "form",
    [{"hyper": "none"}, {"hyper": "delta", "norm_obs": True}, {"hyper": "none", "share_parameters": False}],
    ids=str,
)
def test_resume_gives_the_numbers_of_an_uninterrupted_run(tmp_path, form, monkeypatch):
    halfway = tmp_path / "halfway"

    def copy_third(checkpoint, path, save=hyper_mappo.save_checkpoint):
        save(checkpoint, path)
        if checkpoint["update"] == 3:
            shutil.copytree(path.parent, halfway)

    monkeypatch.setattr(hyper_mappo, "save_checkpoint", copy_third)
    flags = dict(env_id="pursuit", env_kwargs=SMALL_PURSUIT, total_timesteps=6 * 32, save_every=3, **form)
    whole = run(tmp_path, "whole", update_threads=2, **flags)
    assert cli(["--resume", str(halfway)]) == 0
    assert metrics(halfway) == metrics(whole)
    assert len(metrics(whole)) == 6
    for name, x in load_checkpoint(whole)["actor"].items():
        assert torch.equal(x, load_checkpoint(halfway)["actor"][name]), name


def test_obs_norm_has_the_moments_of_all_active_samples():
    torch.manual_seed(1)
    x = torch.randn(60, 5) * torch.tensor([1.0, 30.0, 0.1, 2.0, 0.0]) + torch.tensor([0.0, 100.0, -3.0, 1.0, 7.0])
    active = torch.rand(60) < 0.7
    norm = hyper_mappo.ObsNorm(5)
    assert torch.equal(norm(x[:, [0] * 5]), x[:, [0] * 5])  # nothing seen, nothing changed
    for part, counts in zip(x.split(13), active.split(13), strict=True):
        norm.update(part, counts)
    seen = x[active].double()
    assert norm.count == len(seen)
    torch.testing.assert_close(norm.mean, seen.mean(0).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.var, seen.var(0, correction=0).float(), rtol=1e-4, atol=1e-5)
    normal = norm(x[active])
    torch.testing.assert_close(normal.mean(0), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(normal[:, :4].std(0, correction=0), torch.ones(4), rtol=0, atol=1e-4)
    assert normal[:, 4].abs().max() < 1e-4  # what never changes is 0
    assert norm(1e6 * torch.ones(5)).max() == norm.CLIP


def test_observations_are_normalised_in_actor_and_critic_by_what_active_agents_saw(tmp_path, monkeypatch):
    seen = []

    def spy(actor, critic, rollout, update=hyper_mappo.update_obs_norms):
        seen.append({name: rollout[name].clone() for name in ("obs", "state", "active")})
        update(actor, critic, rollout)

    monkeypatch.setattr(hyper_mappo, "update_obs_norms", spy)
    run_dir = run(tmp_path, env_id=STAG_HUNT["env_id"], num_steps=40, total_timesteps=2 * 160, norm_obs=True)
    checkpoint = load_checkpoint(run_dir)
    active = torch.stack([x["active"] for x in seen])
    assert not active.all()  # some have left
    obs = torch.stack([x["obs"] for x in seen])[active].flatten(1).float()
    state = torch.stack([x["state"] for x in seen]).flatten(0, 2).flatten(1).float()
    for part, trunk, x in (("actor", "trunk", obs), ("critic", "obs_trunk", obs), ("critic", "trunk", state)):
        torch.testing.assert_close(checkpoint[part][f"{trunk}.norm.mean"], x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(checkpoint[part][f"{trunk}.norm.var"], x.var(0, correction=0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm_obs", [False, True])
def test_first_minibatch_sees_the_policy_that_acted(tmp_path, norm_obs):
    # With one epoch of one minibatch the ratio is 1: acting and updating share weights, masks and hidden states,
    # across the episode ends (max_cycles 13) that fall into the rollouts.
    flags = dict(env_id="pursuit", env_kwargs=SMALL_PURSUIT, num_steps=16, update_epochs=1, num_minibatches=1)
    flags |= dict(norm_obs=norm_obs)
    flags |= dict(chunk_length=4)  # four training sequences a rollout, each with its own first hidden state
    for row in metrics(run(tmp_path, total_timesteps=5 * 64, **flags)):
        assert abs(float(row["losses/approx_kl"])) < 1e-6
        assert float(row["losses/clipfrac"]) == 0.0


@pytest.mark.parametrize("critic_obs", [True, False])
def test_truncated_episodes_bootstrap_from_what_they_came_to(tmp_path, monkeypatch, critic_obs):
    seen, asked, steps = {}, [], []

    def spy_values(critic, value_norm, state, obs, values=hyper_mappo.state_values):
        asked.append((state, obs))
        return values(critic, value_norm, state, obs)

    def spy_step(self, actions, step=PursuitVecEnv.step):
        steps.append(step(self, actions))
        return steps[-1]

    def spy(rewards, values, next_values, terminations, ended, *rest, gae=compute_gae):
        seen.update(values=values, next_values=next_values, over=ended.all(-1))
        return gae(rewards, values, next_values, terminations, ended, *rest)

    monkeypatch.setattr(hyper_mappo, "state_values", spy_values)
    monkeypatch.setattr(PursuitVecEnv, "step", spy_step)
    monkeypatch.setattr(hyper_mappo, "compute_gae", spy)
    flags = dict(num_steps=16, total_timesteps=64, num_minibatches=1, critic_obs=critic_obs)
    run(tmp_path, env_id="pursuit", env_kwargs=SMALL_PURSUIT, **flags)
    # After the 13th step, the time limit, the critic is asked once more: about what that step really led to.
    state, obs = asked[13]
    assert torch.equal(state, steps[12].final_state) and torch.equal(obs, steps[12].final_obs)
    assert not torch.equal(state, steps[12].state) and not torch.equal(obs, steps[12].obs)
    over = seen["over"][:-1]
    assert over.any()
    assert torch.equal(seen["next_values"][:-1][~over], seen["values"][1:][~over])
    assert not torch.isclose(seen["next_values"][:-1][over], seen["values"][1:][over]).any()
    assert (seen["next_values"][:-1][over] != 0).all()


# ------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize("team_spirit", [0.0, 0.25, 1.0])
def test_team_spirit_of_a_hand_made_step(team_spirit):
    rewards = torch.tensor([[4.0, 1.0, 0.0, 7.0]])
    learners = torch.tensor([True, True, True, False])  # the third has left, the fourth is a partner
    t, mean = team_spirit, 5.0 / 3
    expected = torch.tensor([[4.0 * (1 - t) + mean * t, 1.0 * (1 - t) + mean * t, mean * t, 7.0]])
    torch.testing.assert_close(hyper_mappo.shared_rewards(rewards, learners, t), expected)


@pytest.mark.parametrize("team_spirit", [0.0, 0.5])
def test_with_team_spirit_who_left_is_still_paid(team_spirit):
    # One env, two agents, three steps: agent 0 is paid 2 and leaves at step 0; agent 1 is paid 4 at step 2, the end.
    active = torch.tensor([[True, True], [False, True], [False, True]]).unsqueeze(1)  # [T, N, A]
    rollout = {"active": active, "values": torch.zeros(3, 1, 2), "cut_values": torch.full((3, 1, 2), 9.0)}
    rollout["rewards"] = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 4.0]]).unsqueeze(1)
    rollout["terminations"] = torch.tensor([[True, False], [False, False], [False, True]]).unsqueeze(1)
    rollout["ended"] = torch.tensor([[True, False], [True, False], [True, True]]).unsqueeze(1)
    rollout["episode_over"] = torch.tensor([[False], [False], [True]])
    rollout["truncations"] = torch.zeros(3, 1, dtype=torch.bool)
    learners = torch.ones(2, dtype=torch.bool)
    learns, valued = hyper_mappo.who_learns(active, learners, team_spirit)
    assert torch.equal(learns, active) and torch.equal(valued, active if team_spirit == 0 else torch.ones_like(active))
    rollout |= {"learns": learns, "valued": valued}
    args = Args(team_spirit=team_spirit, gamma=0.5, gae_lambda=1.0, norm_adv=False)
    last_values = torch.full((1, 2), 9.0)  # of the next episode: must not be used
    _, returns, _, _ = hyper_mappo.learning_targets(rollout, last_values, learners, args)
    if team_spirit == 0:
        assert returns[0, 0].tolist() == [2.0, 0.25 * 4.0]
    else:  # half of the own reward and half of the mean: 1 + 0.5 now, and 0.5 x 2 two steps later for agent 0
        assert returns[0, 0].tolist() == [1.5 + 0.25 * 1.0, 0.5 + 0.25 * 3.0]
        assert returns[1, 0].tolist() == [0.5 * 1.0, 0.5 * 3.0]
    rollout["truncations"][2] = True  # by the time limit: the final state's value counts, for those who are still there
    rollout["terminations"][2] = False
    _, returns, _, _ = hyper_mappo.learning_targets(rollout, last_values, learners, args)
    assert returns[2, 0, 1] == 4.0 * (1 - team_spirit / 2) + 0.5 * 9.0


def test_team_spirit_hangs_on_the_env():
    cpu = torch.device("cpu")
    spirits = {"stag_hunt-8x8-4h1s": 0.97, "stag_hunt": 0.97, "mpe2.simple_spread_v3": 1.0, "pursuit": 0.0}
    for env_id, expected in spirits.items():
        assert hyper_mappo.check_args(Args(env_id=env_id), cpu)[0].team_spirit == expected
    assert hyper_mappo.check_args(Args(env_id="stag_hunt", team_spirit=0.0), cpu)[0].team_spirit == 0.0


def test_individual_rewards_of_pursuit_have_the_mean_of_shared_ones():
    """So that what is reported means the same, whatever is trained on: batched and genuine, same actions."""
    kwargs = {**json.loads(SMALL_PURSUIT), "max_cycles": 60}
    for seed in range(3):
        shared = hyper_mappo.make_vec_env("pursuit", 20, "cpu", seed, **kwargs)
        checked = check_env("pursuit", "auto", kwargs)
        individual = hyper_mappo.make_vec_env(hyper_mappo.training_env(checked, Args()), 20, "cpu", seed)
        assert shared.shared_reward and not individual.shared_reward
        generator = torch.Generator().manual_seed(seed)
        differ = False
        for _ in range(60):
            actions = torch.randint(5, (20, 3), generator=generator)
            a, b = shared.step(actions), individual.step(actions)
            torch.testing.assert_close(b.rewards.mean(1), a.rewards.mean(1), rtol=0, atol=1e-6)
            differ |= not torch.equal(a.rewards, b.rewards)
        assert differ
        torch.testing.assert_close(b.episode_returns.mean(1), a.episode_returns.mean(1), rtol=0, atol=1e-5)
        shared, individual = (make_parallel_env("pursuit", **kwargs, shared_reward=on) for on in (True, False))
        for env in (shared, individual):
            env.reset(seed=seed)
        differ = False
        for _ in range(60):
            actions = {agent: int(torch.randint(5, (), generator=generator)) for agent in shared.agents}
            (_, a, *_), (_, b, *_) = shared.step(actions), individual.step(actions)
            assert sum(a.values()) / 3 == pytest.approx(sum(b.values()) / 3, abs=1e-6)
            differ |= a != b
            if not shared.agents:
                break
        assert differ


@pytest.mark.parametrize("backend", ["batched", "pettingzoo"])
def test_training_pays_individually_and_evaluation_as_the_env_does(tmp_path, monkeypatch, backend):
    made = []

    def spy_on(make):
        def spy(checked, *args, **kwargs):
            made.append((checked.env_kwargs, make(checked, *args, **kwargs)))
            return made[-1][1]

        return spy

    for name in ("make_vec_env", "make_eval_env"):
        monkeypatch.setattr(hyper_mappo, name, spy_on(getattr(hyper_mappo, name)))
    flags = dict(env_id="pursuit", backend=backend, total_timesteps=32, eval_episodes=1)
    asked = json.dumps({**json.loads(SMALL_PURSUIT), "shared_reward": True})
    cases = [
        ({}, False),
        ({"team_spirit": 0.5}, False),
        ({"team_spirit": 1.0}, None),
        ({"env_kwargs": asked}, True),
    ]
    for case, shared in cases:
        run_dir = run(tmp_path, **{"env_kwargs": SMALL_PURSUIT, **flags, **case})
        (training, env), (evaluation, genuine) = made[-2:]
        assert (env.backend, genuine.backend) == (backend, "pettingzoo")
        assert training.get("shared_reward") is shared
        assert evaluation.get("shared_reward") in (None, shared or None)
        assert json.loads((run_dir / "args.json").read_text())["team_spirit"] == case.get("team_spirit", 0.0)


def test_a_run_from_before_team_spirit_and_critic_obs_goes_on_as_it_was(tmp_path):
    flags = dict(env_id="pursuit", env_kwargs=SMALL_PURSUIT, critic_obs=False, team_spirit=1.0)
    whole = run(tmp_path, "whole", total_timesteps=4 * 32, **flags)
    old = run(tmp_path, "old", total_timesteps=2 * 32, **flags)
    checkpoint = load_checkpoint(old)
    for name in ("critic_obs", "team_spirit"):
        del checkpoint["args"][name]
    runs.save_checkpoint(checkpoint, old / "latest.pt")
    assert cli(["--resume", str(old), "--total-timesteps", str(4 * 32)]) == 0
    assert metrics(old) == metrics(whole)
    state, obs = torch.rand(2, 8, 8, 3), torch.rand(2, 3, 7, 7, 3)
    assert load_critic(old)(state, obs).shape == (2, 3)


def test_a_run_of_a_form_that_is_gone_is_refused_in_one_line(tmp_path, capsys):
    run_dir = run(tmp_path, env_id="pursuit", env_kwargs=SMALL_PURSUIT, total_timesteps=32)
    checkpoint = load_checkpoint(run_dir)
    checkpoint["args"]["hyper"] = "low-rank"
    runs.save_checkpoint(checkpoint, run_dir / "latest.pt")
    for name in ("--resume", "--evaluate", "--init-from"):
        assert cli([name, str(run_dir)]) == 2
        error = capsys.readouterr().err
        assert "has no --hyper low-rank" in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------ envs


ENVS = [
    ("sisl/pursuit_v5", {"max_cycles": 6, "n_evaders": 5}),
    ("butterfly/knights_archers_zombies_v11", {"max_cycles": 12}),
    ("butterfly/pistonball_v6", {"max_cycles": 4, "n_pistons": 4, "continuous": True}),
    ("butterfly/pistonball_v6", {"max_cycles": 4, "n_pistons": 4, "continuous": False}),
    ("mpe2.simple_spread_v3", {"max_cycles": 5}),
    ("mpe2.simple_speaker_listener_v4", {"max_cycles": 5}),
]


@pytest.mark.parametrize("env_id, env_kwargs", ENVS)
@pytest.mark.parametrize("hyper", ["none", "delta"])
def test_two_updates_on_genuine_envs(tmp_path, env_id, env_kwargs, hyper):
    flags = dict(num_envs=2, num_steps=6, total_timesteps=24, backend="pettingzoo", update_epochs=1)
    rows = metrics(run(tmp_path, env_id=env_id, env_kwargs=json.dumps(env_kwargs), hyper=hyper, **flags))
    assert [row["update"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(row[name])) for row in rows for name in LOSSES[:6])


@pytest.mark.parametrize("env_id", ["pursuit", "stag_hunt", "stag_hunt-8x8-4h2s"])
def test_two_updates_on_batched_envs(tmp_path, env_id):
    run_dir = run(tmp_path, env_id=env_id)
    assert len(metrics(run_dir)) == 2
    assert json.loads((run_dir / "args.json").read_text())["backend"] == "batched"


@pytest.mark.parametrize(
    "env, hyper, optimum", [("own_number", "none", 8.0), ("tell_the_other", "delta", 8.0), ("remember", "delta", 1.0)]
)
def test_tiny_cooperative_envs_are_learnt(tmp_path, env, hyper, optimum):
    # own_number needs no hypernetwork, tell_the_other the attention over agents, remember the history.
    flags = dict(num_envs=16, num_steps=32, num_minibatches=4, hidden_size=32, context_size=32, hyper_basis=4)
    flags |= dict(total_timesteps=20_000, learning_rate=2e-3, hyper_learning_rate=3e-3, eval_episodes=50)
    flags |= dict(chunk_length=16, anneal_lr=True, ent_coef=0.01)
    run_dir = run(tmp_path, env_id=f"tests.tiny_envs:{env}", hyper=hyper, **flags)
    assert json.loads((run_dir / "eval.json").read_text())["mean_return"] >= 0.95 * optimum


@pytest.mark.parametrize(
    "env_id, kwargs", [("pursuit", {**json.loads(SMALL_PURSUIT), "max_cycles": 40}), ("stag_hunt", {})]
)
def test_a_trained_policy_scores_the_same_on_twin_and_genuine_env(tmp_path, env_id, kwargs):
    flags = dict(num_envs=64, num_steps=16, total_timesteps=40_960, hidden_size=32, context_size=16)
    run_dir = run(tmp_path, env_id=env_id, env_kwargs=json.dumps(kwargs), learning_rate=2e-3, **flags)
    actor, returns, episodes = Policy(run_dir).actor, {}, 100
    for backend, num_envs in (("batched", 100), ("pettingzoo", 2)):
        env = hyper_mappo.make_vec_env(env_id, num_envs, "cpu", 0, backend=backend, **kwargs)
        returns[backend] = evaluate(actor, env, episodes, seed=5)["returns"].mean(dim=1)  # [episodes, A] -> [episodes]
        env.close()
    twin, genuine = returns["batched"], returns["pettingzoo"]
    interval = 1.96 * ((twin.var() + genuine.var()) / episodes).sqrt()
    assert abs(twin.mean() - genuine.mean()) < 1.5 * interval
    env = hyper_mappo.make_vec_env(env_id, 100, "cpu", 0, **kwargs)
    untrained = evaluate(Actor(load_checkpoint(run_dir)["spec"], Args(hyper="none")), env, episodes, seed=5)
    assert twin.mean() > untrained["returns"].mean() + interval  # it did learn something


# ------------------------------------------------------------------------------------------ files, signals, errors


def test_checkpoint_serves_other_programs(tmp_path):
    flags = dict(env_id="pursuit", env_kwargs=SMALL_PURSUIT)
    run_dir = run(tmp_path, **flags)
    env = hyper_mappo.make_vec_env("pursuit", 2, "cpu", 0, **json.loads(SMALL_PURSUIT))
    policy, critic = Policy(run_dir), load_critic(run_dir)
    step, hidden = env.reset(3), policy.initial_state(2)
    for _ in range(15):
        actions, hidden = policy.act(step, hidden)
        step = env.step(actions)
    assert critic(step.state, step.obs).shape == (2, 3) and actions.shape == (2, 3)


def test_evaluation_is_reproducible_and_only_evaluates(tmp_path, capsys):
    run_dir = run(tmp_path, env_id="pursuit", env_kwargs=SMALL_PURSUIT)
    before = (run_dir / "metrics.csv").read_text()
    reports = []
    for _ in range(2):
        assert cli(["--evaluate", str(run_dir), "--eval-episodes", "3", "--capture-video"]) == 0
        reports.append(json.loads((run_dir / "eval.json").read_text()))
    assert reports[0] == reports[1] and len(reports[0]["returns"]) == 3
    assert reports[0]["backend"] == "pettingzoo"
    assert (run_dir / "video.gif").stat().st_size > 1000
    assert (run_dir / "metrics.csv").read_text() == before
    assert "return per agent" in capsys.readouterr().out


def test_sigterm_saves_and_the_run_can_go_on(tmp_path):
    command = [sys.executable, "hyper_mappo.py", "--env-id", "pursuit", "--env-kwargs", SMALL_PURSUIT]
    command += ["--num-envs", "4", "--num-steps", "8", "--num-minibatches", "2", "--total-timesteps", "3200000"]
    command += ["--runs-dir", str(tmp_path), "--eval-episodes", "0", "--save-every", "100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 300
    while time.time() < deadline and not any(len(metrics(p.parent)) > 2 for p in tmp_path.glob("*/metrics.csv")):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (run_dir,) = tmp_path.iterdir()
    update = load_checkpoint(run_dir)["update"]
    assert f"stopped after update {update}" in out and str(len(metrics(run_dir))) == str(update)
    steps = str((update + 2) * 32)
    assert cli(["--resume", str(run_dir), "--total-timesteps", steps]) == 0
    assert len(metrics(run_dir)) == update + 2


def test_ranks_whose_torchrun_agent_was_killed_save_and_stop(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "hyper_mappo.py"]
    command += ["--env-id", "pursuit", "--env-kwargs", SMALL_PURSUIT, "--num-envs", "4", "--num-steps", "8"]
    command += ["--num-minibatches", "2", "--total-timesteps", "3200000", "--runs-dir", str(tmp_path)]
    command += ["--eval-episodes", "0", "--save-every", "100000"]
    agent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while time.time() < deadline and not any(len(metrics(p.parent)) > 2 for p in tmp_path.glob("*/metrics.csv")):
        time.sleep(0.2)
    agent.kill()
    agent.wait()
    (run_dir,) = tmp_path.iterdir()
    while time.time() < deadline and not (run_dir / "latest.pt").exists():
        time.sleep(0.2)
    time.sleep(2)  # what trained on would log more
    assert len(metrics(run_dir)) == load_checkpoint(run_dir)["update"]


def test_nan_observation_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, capsys):
    flags = ["--env-id", "tests.tiny_envs:turns_nan", "--num-env-procs", "0", "--num-envs", "2", "--num-steps", "8"]
    flags += ["--num-minibatches", "1", "--total-timesteps", "1600", "--save-every", "1", "--runs-dir", str(tmp_path)]
    assert cli(flags) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    (run_dir,) = tmp_path.iterdir()
    last = load_checkpoint(run_dir)
    assert "turns_nan, env 0" in error and re.search("a_[01]: observation: expected finite numbers, got nan", error)
    assert all(x.isfinite().all() for x in last["actor"].values())


def test_nan_loss_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(hyper_mappo, "entropy", lambda dist, discrete: dist.sum(-1) * float("nan"))
    with pytest.raises(FloatingPointError, match="update 1: .*losses/entropy is nan"):
        run(tmp_path)


BAD_ARGUMENTS = {
    "unknown env, near match": (["--env-id", "sisl/pursiut_v5"], "did you mean sisl/pursuit_v5"),
    "no parallel API": (["--env-id", "classic/chess_v6"], "parallel"),
    "env argument": (["--env-id", "pursuit", "--env-kwargs", '{"evaders": 3}'], "n_evaders"),
    "env kwargs no JSON": (["--env-kwargs", "n_evaders=3"], "JSON"),
    "minibatches": (["--num-envs", "8", "--num-minibatches", "3"], "does not divide"),
    "zero updates": (["--total-timesteps", "100"], "no update"),
    "env kwargs no object": (["--env-kwargs", "[3]"], "by name"),
    "num_envs": (["--num-envs", "0"], "at least 1"),
    "eval episodes": (["--eval-episodes", "-1"], "--eval-episodes must be at least 0, got -1"),
    "seed": (["--seed", "-5"], "--seed must be from 0 to 2147483647, got -5"),
    "learning rate": (["--learning-rate", "nan"], "--learning-rate must be at least 0, got nan"),
    "max grad norm": (["--max-grad-norm", "0"], "--max-grad-norm must be more than 0, got 0.0"),
    "gamma": (["--gamma", "1.5"], "--gamma must be from 0 to 1, got 1.5"),
    "no heads": (["--context-heads", "0"], "--context-heads must be at least 1, got 0"),
    "hyper flag without hypernetwork": (["--hyper", "none", "--hyper-basis", "2"], "--hyper-basis would do nothing"),
    "heads": (["--context-size", "31"], "multiple"),
    "missing run": (["--resume", "no/such/run"], "no checkpoint"),
    "env kwargs null": (["--env-kwargs", "null"], "--env-kwargs"),
    "switch without pool": (["--partner-switch", "3"], "--partner-switch would do nothing"),
    "env timeout": (["--env-timeout", "-1"], "--env-timeout must be at least 0"),
    "batched without twin": (["--env-id", "mpe2.simple_spread_v3", "--backend", "batched"], "batched"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_end_in_one_line(tmp_path, capsys, monkeypatch, name):
    flags, message = BAD_ARGUMENTS[name]
    monkeypatch.setattr(hyper_mappo, "make_vec_env", lambda *a, **k: pytest.fail("an env was made"))
    assert cli([*flags, "--runs-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "runs").exists()


def test_bad_checkpoints_end_in_one_line(tmp_path, capsys):
    run_dir = run(tmp_path)
    foreign, cut = tmp_path / "foreign", tmp_path / "cut"
    for folder in (foreign, cut):
        folder.mkdir()
    torch.save({"format": "somebody/1"}, foreign / "latest.pt")
    whole = (run_dir / "latest.pt").read_bytes()
    (cut / "latest.pt").write_bytes(whole[: len(whole) // 2])
    shutil.copy(run_dir / "latest.pt", cut / "other.pt")
    finished = ["--resume", str(run_dir)]
    for flags, message in [
        (["--resume", str(foreign)], "has format 'somebody/1'"),
        (["--resume", str(cut)], "not a readable checkpoint"),
        ([*finished, "--hidden-size", "32"], "--hidden-size 32 contradicts"),
        ([*finished, "--evaluate", str(run_dir)], "--evaluate trains nothing"),
        (["--evaluate", str(run_dir)], "--evaluate would do nothing"),
        (["--resume", str(cut / "other.pt")], "expects a run folder"),
        (["--evaluate", str(run_dir), "--eval-episodes", "-1"], "--eval-episodes must be at least 0"),
    ]:
        assert cli(flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_weights_that_are_damaged_are_refused_in_one_line(tmp_path, capsys):
    run_dir = run(tmp_path, env_id="pursuit", env_kwargs=SMALL_PURSUIT)
    checkpoint = load_checkpoint(run_dir)
    checkpoint["actor"]["layers.0.weight"][0, 0] = float("nan")
    runs.save_checkpoint(checkpoint, run_dir / "latest.pt")
    for name in ("--resume", "--evaluate"):
        assert cli([name, str(run_dir), "--total-timesteps", "96", "--eval-episodes", "1"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and "Actor is NaN or infinite at layers.0.weight" in error


def test_a_finished_run_that_is_resumed_does_its_closing_part_again(tmp_path, capsys):
    flags = dict(env_id="pursuit", env_kwargs=SMALL_PURSUIT, eval_episodes=2)
    run_dir = run(tmp_path, **flags)
    kept = metrics(run_dir)
    before, report = (run_dir / "latest.pt").read_bytes(), (run_dir / "eval.json").read_text()
    for name in ("eval.json", "learning_curve.png"):
        (run_dir / name).unlink()
    for path in (run_dir, run_dir / "latest.pt"):
        assert cli(["--resume", str(path)]) == 0
        assert (run_dir / "eval.json").read_text() == report and (run_dir / "learning_curve.png").exists()
        assert metrics(run_dir) == kept and (run_dir / "latest.pt").read_bytes() == before


def test_a_second_process_may_not_write_in_a_runs_folder(tmp_path):
    run_dir = run(tmp_path)
    holder = "import sys, runs, pathlib; runs.keep_folder(pathlib.Path(sys.argv[1]), 'x'); print('held', flush=True)"
    holder += "; input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(run_dir)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline().strip() == b"held"
        with pytest.raises(runs.UsageError, match="another process is writing"):
            hyper_mappo.main(replace(Args(**json.loads((run_dir / "args.json").read_text())), resume=str(run_dir)))
        other.stdin.close()
    assert cli(["--resume", str(run_dir)]) == 0


def test_returns_of_the_evaluation_do_not_depend_on_the_number_of_processes(tmp_path):
    run_dir = run(tmp_path, env_id="pursuit", env_kwargs=SMALL_PURSUIT)
    reports = []
    for num_procs in ("0", "1", "3"):
        assert cli(["--evaluate", str(run_dir), "--eval-episodes", "5", "--num-env-procs", num_procs]) == 0
        reports.append((run_dir / "eval.json").read_text())
    assert reports[0] == reports[1] == reports[2]


class WonWhenAllAgree(PursuitVecEnv):
    """Pursuit of one step, won where all pursuers take the same action."""

    def step(self, actions):
        step = super().step(actions)
        step.success = (actions == actions[:, :1]).all(1)
        return step


def test_share_of_won_episodes_is_logged_and_evaluated(tmp_path, monkeypatch):
    flags = dict(env_id="pursuit", env_kwargs=json.dumps({**json.loads(SMALL_PURSUIT), "max_cycles": 1}))
    assert not any(row["charts/success_rate"] for row in metrics(run(tmp_path, "none", **flags)))
    kwargs = {**json.loads(flags["env_kwargs"])}

    def made(checked, num_envs, device, seed, *rest, **more):
        return WonWhenAllAgree(num_envs, device, seed, **kwargs)

    monkeypatch.setattr(hyper_mappo, "make_vec_env", made)
    monkeypatch.setattr(hyper_mappo, "make_eval_env", made)
    wins = []
    monkeypatch.setattr(hyper_mappo, "finished_episodes", spy_on_wins(wins, hyper_mappo.finished_episodes))
    run_dir = run(tmp_path, "won", **flags, num_envs=16, total_timesteps=128, eval_episodes=50)
    (row,) = metrics(run_dir)
    assert float(row["charts/success_rate"]) == pytest.approx(sum(wins) / len(wins))
    assert 0 < sum(wins) < len(wins)
    assert 0 < json.loads((run_dir / "eval.json").read_text())["success_rate"] < 1


def spy_on_wins(wins, function):
    def spy(step):
        wins.extend(step.success[step.episode_over].float().tolist())
        return function(step)

    return spy


def test_pools_of_partners_are_drawn_logged_and_resumed(tmp_path):
    pool = dict(partners=("pool=nearest_stag,nearest_hare:2",), partner_switch=2)
    flags = {**STAG_HUNT, "num_steps": 16, "num_envs": 32, "update_epochs": 1, **pool}
    whole = run(tmp_path, "whole", **{**flags, "total_timesteps": 4 * 512, "eval_episodes": 4})
    part = run(tmp_path, "part", **{**flags, "total_timesteps": 2 * 512})
    assert cli(["--resume", str(part), "--total-timesteps", str(4 * 512), "--eval-episodes", "4"]) == 0
    assert metrics(part) == metrics(whole)
    draws = {name: 0.0 for name in ("nearest_stag", "nearest_hare")}
    for row in metrics(whole):
        for name in draws:
            draws[name] += float(row[f"partners/draws_{name}"])
    assert min(draws.values()) > 0
    report = json.loads((whole / "eval.json").read_text())
    drawn = [x for name, x in report["partners"].items() if "draws" in name]
    assert sum(drawn) == 4 * 2


def test_rollouts_that_do_not_fit_into_memory_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hyper_mappo, "free_memory", lambda device: 1e5)
    flags = ["--env-id", "pursuit", "--num-envs", "8", "--num-steps", "64", "--total-timesteps", "512"]
    assert cli([*flags, "--runs-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert "lower --num-envs 8 or --num-steps 64" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_estimated_size_of_a_rollout_is_what_is_recorded(tmp_path, monkeypatch):
    recorded, estimates = {}, []

    def spy_targets(rollout, *rest, targets=hyper_mappo.learning_targets):
        recorded.update(rollout)
        return targets(rollout, *rest)

    def spy_memory(args, envs, actor, check=hyper_mappo.check_memory):
        monkeypatch.setattr(hyper_mappo, "free_memory", lambda device: 0.0)
        with pytest.raises(runs.UsageError) as error:
            check(args, envs, actor)
        estimates.append(float(re.search("take ([0-9.]+) GB", str(error.value))[1]) * 1e9)

    monkeypatch.setattr(hyper_mappo, "learning_targets", spy_targets)
    monkeypatch.setattr(hyper_mappo, "check_memory", spy_memory)
    run(tmp_path, env_id="pursuit", num_envs=128, num_steps=200, total_timesteps=25_600, update_epochs=1)
    size = sum(x.numel() * x.element_size() for x in recorded.values())
    assert size > 2e7 and 0.7 * size < estimates[0] + 0.05e9 and estimates[0] < 1.5 * size + 0.05e9


def test_a_bad_reward_is_named_with_its_agent():
    rollout = {"rewards": torch.zeros(3, 2, 2), "obs": torch.zeros(3, 2, 2, 5)}
    hyper_mappo.refuse_non_finite({"losses/value_loss": 1.0}, rollout, ["a", "b"], 4)
    with pytest.raises(FloatingPointError, match="update 4: losses/value_loss is nan"):
        hyper_mappo.refuse_non_finite({"losses/value_loss": math.nan}, rollout, ["a", "b"], 4)
    rollout["obs"][1, 0, 1, 3] = math.inf
    with pytest.raises(FloatingPointError, match="the observation of b is NaN or infinite .env 0, step 1"):
        hyper_mappo.refuse_non_finite({"losses/value_loss": math.nan}, rollout, ["a", "b"], 4)
    rollout["rewards"][2, 1, 0] = math.nan
    with pytest.raises(FloatingPointError, match="the reward of a is NaN or infinite .env 1, step 2"):
        hyper_mappo.refuse_non_finite({"losses/value_loss": math.nan}, rollout, ["a", "b"], 4)


def test_unwritable_run_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert cli(["--env-id", "tests.tiny_envs:own_number", "--runs-dir", str(tmp_path / "file")]) == 2
    assert "cannot write the run folder" in capsys.readouterr().err


def test_runs_started_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.time, "time", lambda: 1000.5)
    flags = dict(env_id="tests.tiny_envs:own_number", total_timesteps=32)
    folders = [run(tmp_path, **flags).name for _ in range(2)]
    assert folders == [f"tests.tiny_envs-own_number__hyper_mappo__1__{stamp}" for stamp in (1000, 1001)]


def test_boolean_flags_mean_what_they_say(monkeypatch):
    seen = {}
    monkeypatch.setattr(hyper_mappo, "main", lambda args: seen.update(args=args))
    assert cli(["--anneal-lr", "--no-cuda", "--norm-adv"]) == 0
    assert seen["args"] == replace(Args(), anneal_lr=True, cuda=False)
    with pytest.raises(SystemExit):
        cli(["--anneal-lr", "False"])


def test_track_without_login_logs_offline(tmp_path, monkeypatch, capsys):
    import wandb

    given = {}
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda prompt: prompt)  # False: there is no login, and it did not ask
    monkeypatch.setattr(wandb, "init", lambda **kwargs: given.update(kwargs))
    run_dir = run(tmp_path, total_timesteps=32, track=True)
    assert given["dir"] == run_dir and given["config"]["num_minibatches"] == 2
    assert given["mode"] == "offline" and given["sync_tensorboard"]
    assert "wandb sync" in capsys.readouterr().out


def test_every_tag_is_explained_once():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.split("\n## hyper_mappo.py\n")[1].split("\n## ")[0]
    for tag in COLUMNS[2:]:
        assert len(re.findall(rf"^\| `{re.escape(tag)}` ", section, flags=re.M)) == 1, tag


# ------------------------------------------------------------------------------------------ several processes


def table_run(tmp_path, name, total_timesteps, num_ranks, *resume):
    """tests/two_ranks.py in `num_ranks` processes: -> its run folder"""
    script = [str(ROOT / "tests" / "two_ranks.py"), str(tmp_path / name), str(total_timesteps), *map(str, resume)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *(torchrun if num_ranks > 1 else []), *script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return resume[0] if resume else next((tmp_path / name).iterdir())


def test_the_entropy_bonus_falls_linearly(tmp_path):
    flags = dict(num_minibatches=1, update_epochs=1, ent_coef=0.5)
    coefs = {}
    for final in (None, 0.1):
        run_dir = run(tmp_path / str(final), total_timesteps=4 * 32, final_ent_coef=final, **flags)
        coefs[final] = [float(row["charts/ent_coef"]) for row in metrics(run_dir)]
    assert coefs == {None: [0.5] * 4, 0.1: pytest.approx([0.5, 0.4, 0.3, 0.2])}
    without = run(tmp_path / "without", total_timesteps=64, **{**flags, "ent_coef": 0.0, "final_ent_coef": 0.1})
    assert [float(row["charts/ent_coef"]) for row in metrics(without)] == [0.0, 0.0]  # it never rises
    resumed = run(tmp_path / "more", total_timesteps=2 * 32, final_ent_coef=0.1, **flags)
    run(tmp_path / "more", total_timesteps=4 * 32, final_ent_coef=0.1, resume=str(resumed), **flags)
    assert float(metrics(resumed)[-1]["charts/ent_coef"]) == pytest.approx(0.2)


def test_the_loss_takes_the_entropy_bonus_of_its_schedule():
    args = Args(**{**TINY, "hyper": "none", "ent_coef": 0.3})
    actor, critic = Actor(spec(), args), Critic(spec(), args)
    mb = random_minibatch(actor, args)
    loss, numbers = ppo_loss(actor, critic, mb, args)
    without, _ = ppo_loss(actor, critic, mb, args, ent_coef=torch.tensor(0.0))
    assert (without - loss).item() == pytest.approx(0.3 * numbers["losses/entropy"].item(), rel=1e-4)


def test_two_ranks_with_half_the_envs_each_update_like_one_process_and_resume(tmp_path):
    alone = load_checkpoint(table_run(tmp_path, "alone", 4 * 64, 1))
    two_dir = table_run(tmp_path, "two", 2 * 64, 2)
    assert len(list((tmp_path / "two").iterdir())) == 1 and len(metrics(two_dir)) == 2  # only one of them logs
    two = load_checkpoint(table_run(tmp_path, "two", 4 * 64, 2, two_dir))
    assert [len(x["workers"]) for x in (alone, two)] == [1, 2] and two["update"] == 4
    for part in ("actor", "critic", "value_norm"):
        for name, x in alone[part].items():
            torch.testing.assert_close(two[part][name], x, rtol=1e-4, atol=1e-5, msg=f"{part} {name}")
    assert [worker["env_state"]["t"] for worker in two["workers"]] == [32, 32]


# ------------------------------------------------------------------------------------------ partners, targets, seams


STAG_HUNT = dict(env_id="stag_hunt-4x4-4h1s", num_envs=8, num_steps=8, total_timesteps=3 * 64, num_minibatches=2)


def test_partners_play_their_seats_and_enter_no_loss(tmp_path, monkeypatch):
    partner = run(tmp_path, "partner", **STAG_HUNT, hyper="none")
    weights = {name: x.clone() for name, x in load_checkpoint(partner)["actor"].items()}
    made, batches = [], []

    def spy_play(self, step, actions, play=hyper_mappo.Partners.play):
        joint = play(self, step, actions)
        assert torch.equal(joint[:, :1], actions[:, :1])
        made.append((self, step, joint))
        return joint

    def spy_loss(actor, critic, mb, args, **schedule):
        batches.append(mb)
        return ppo_loss(actor, critic, mb, args, **schedule)

    monkeypatch.setattr(hyper_mappo.Partners, "play", spy_play)
    monkeypatch.setattr(hyper_mappo, "ppo_loss", spy_loss)
    seats = ("nearest_hare:1", "stay:1", f"{partner}:1")
    run_dir = run(tmp_path, "learner", **STAG_HUNT, partners=seats, eval_episodes=4)
    for partners, _, joint in made:
        assert partners.first_seat == 1 and (joint[:, 2] == stag_hunt.STAY).all()
        for name, x in partners.players[2].actor.state_dict().items():
            assert torch.equal(x, weights[name]), name
        assert not any(p.requires_grad for p in partners.players[2].actor.parameters())
    taken = []
    for _, step, joint in made:
        probs = stag_hunt.action_probs("nearest_hare", step.obs, step.action_mask)[:, 1]  # [N, n]
        taken.append(probs.gather(1, joint[:, 1:2]))
    assert (torch.cat([x.flatten() for x in taken]) > 0).float().mean() > 0.95  # all but those who left
    assert batches and not any(mb["learns"][..., 1:].any() for mb in batches)
    # Whatever stands in the partners' samples, the loss is the same.
    mb, args = dict(batches[0]), Args(**{**TINY, "env_id": "stag_hunt-4x4-4h1s"})
    torch.manual_seed(0)
    policy = Policy(run_dir)
    critic = Critic(policy.spec, policy.args)
    loss, _ = ppo_loss(policy.actor, critic, mb, args)
    for name in ("advantages", "returns", "values", "logprobs"):
        mb[name] = mb[name].clone()
        mb[name][..., 1:] = 7.0
    torch.testing.assert_close(ppo_loss(policy.actor, critic, mb, args)[0], loss)
    # Logged by seat; evaluation plays with the same partners, or with others where asked to.
    assert {f"charts/return_seat_{i}" for i in range(4)} <= set(metrics(run_dir)[0])
    report = json.loads((run_dir / "eval.json").read_text())
    assert report["mean_return"] == pytest.approx(report["mean_return_per_agent"][0])
    assert cli(["--evaluate", str(run_dir), "--eval-episodes", "2", "--partners", "random:3"]) == 0
    assert cli(["--resume", str(run_dir), "--total-timesteps", "256", "--eval-episodes", "0"]) == 0
    assert len(metrics(run_dir)) == 4


def test_init_from_starts_at_the_saved_policy(tmp_path, capsys):
    first = run(tmp_path, "first", **STAG_HUNT)
    saved = load_checkpoint(first)
    tiny = ["--num-envs", "8", "--num-steps", "8", "--num-minibatches", "2", "--eval-episodes", "0"]
    flags = [*tiny, "--env-id", STAG_HUNT["env_id"], "--runs-dir", str(tmp_path / "second"), "--seed", "2"]
    flags += ["--init-from", str(first), "--total-timesteps", "64", "--partners", "random:2"]
    assert cli([*flags, "--learning-rate", "0", "--hyper-learning-rate", "0"]) == 0
    second = load_checkpoint(next((tmp_path / "second").iterdir()))
    assert all(torch.equal(x, second["actor"][name]) for name, x in saved["actor"].items())
    assert all(torch.equal(x, second["critic"][name]) for name, x in saved["critic"].items())
    capsys.readouterr()
    assert cli([*flags, "--hidden-size", "8"]) == 2
    assert "contradicts" in capsys.readouterr().err
    assert cli([*flags, "--env-id", "stag_hunt-8x8-4h1s"]) == 2
    assert "is of env" in capsys.readouterr().err


@pytest.mark.parametrize(
    "form, given, rate",
    [
        ({"hyper": "delta"}, None, 5e-4),
        ({"hyper": "last-layer"}, None, 1e-4),
        ({"hyper": "delta"}, 3e-4, 3e-4),
        ({"hyper": "none", "actor_context": True}, None, 5e-4),
        ({"hyper": "none", "actor_context": True}, 3e-4, 3e-4),
    ],
    ids=str,
)
def test_context_and_hypernetwork_have_a_learning_rate_of_their_own(tmp_path, form, given, rate):
    run_dir = run(tmp_path, **form, hyper_learning_rate=given)
    base, generated = load_checkpoint(run_dir)["optimizer"]["param_groups"]
    assert base["lr"] == Args.learning_rate and generated["lr"] == rate
    assert json.loads((run_dir / "args.json").read_text())["hyper_learning_rate"] == rate


@pytest.mark.parametrize("bootstrap", [True, False])
def test_without_bootstrap_nothing_comes_after_the_time_limit(tmp_path, monkeypatch, bootstrap):
    rollouts = []
    real = hyper_mappo.learning_targets

    def learning_targets(rollout, *args):
        rollouts.append({name: x.clone() for name, x in rollout.items()})
        return real(rollout, *args)

    monkeypatch.setattr(hyper_mappo, "learning_targets", learning_targets)
    run(tmp_path, env_id="pursuit", env_kwargs=SMALL_PURSUIT, bootstrap_time_limit=bootstrap)
    cut = torch.cat([rollout["truncations"].any(-1) for rollout in rollouts])
    values = torch.cat([rollout["cut_values"] for rollout in rollouts])
    assert cut.any() and bool((values[cut] != 0).any()) == bootstrap


@pytest.mark.parametrize("interval", [1, 3])
def test_target_is_refreshed_every_k_updates_exactly(tmp_path, monkeypatch, interval):
    anchors, acted = [], []

    def spy_loss(actor, critic, mb, args, **schedule):
        anchors.append(mb["anchor_dists"].clone())
        with torch.no_grad():
            inputs = (mb["obs"], mb.get("action_mask"), mb["active"], mb["starts"], mb["hidden"][0])
            acted.append(actor(*inputs)[0])
        return ppo_loss(actor, critic, mb, args, **schedule)

    monkeypatch.setattr(hyper_mappo, "ppo_loss", spy_loss)
    flags = dict(env_id="pursuit", env_kwargs=SMALL_PURSUIT, num_minibatches=1, update_epochs=1)
    run(tmp_path, total_timesteps=6 * 32, target_sync_interval=interval, learning_rate=0.01, **flags)
    # With one minibatch an update, the policy seen in the loss is the one that acted.
    same = [torch.allclose(anchor, dist, atol=1e-5) for anchor, dist in zip(anchors, acted, strict=True)]
    assert same == [update % interval == 0 for update in range(6)]


def test_resume_keeps_the_target(tmp_path, monkeypatch):
    flags = dict(env_id="pursuit", env_kwargs=SMALL_PURSUIT, save_every=2, target_sync_interval=4)
    whole = run(tmp_path, "whole", total_timesteps=6 * 32, **flags)
    part = run(tmp_path, "part", total_timesteps=2 * 32, **flags)
    assert cli(["--resume", str(part), "--total-timesteps", str(6 * 32)]) == 0
    assert metrics(part) == metrics(whole)


class StandInEncoder(torch.nn.Module):
    """Offers what load_vae gives: z is the observation's first two numbers and how often the agent acted."""

    config, history_size = {"latent_size": 3}, 1

    def check_input(self, kind, shape):
        assert kind == "obs"

    def encode(self, obs, history=None):
        return torch.cat([obs.float()[..., :2], history], dim=-1)

    def observe(self, history, obs, actions):
        assert actions.shape == obs.shape[:2]
        return history + 1


def test_subgoals_join_the_context_and_their_history_follows_episodes(tmp_path, monkeypatch):
    monkeypatch.setattr(hyper_mappo, "load_subgoals", lambda run_dir, spec: StandInEncoder())
    seen = []

    def spy_loss(actor, critic, mb, args, **schedule):
        seen.append((mb["z"].clone(), mb["obs"].clone()))
        return ppo_loss(actor, critic, mb, args, **schedule)

    monkeypatch.setattr(hyper_mappo, "ppo_loss", spy_loss)
    flags = dict(
        num_steps=8, chunk_length=8, num_minibatches=1, update_epochs=1, total_timesteps=64, subgoals="anywhere"
    )
    run_dir = run(tmp_path, **flags)  # own_number: episodes of 8 steps, like the rollout
    for z, obs in seen:
        torch.testing.assert_close(z[..., :2], obs[..., :2])
        assert (z[..., 2].mean(dim=(1, 2)) == torch.arange(8)).all()
    policy = Policy(run_dir)
    assert policy.actor.context.encoder.in_features == 3 + 3
    obs, active, starts = torch.randn(1, 2, 2, 3), torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2).bool()
    hidden, z = torch.zeros(2, 2, policy.actor.hidden_size), torch.zeros(1, 2, 2, 3)
    context = policy.actor.context(obs, z, active, starts, hidden)[0]
    assert not torch.equal(policy.actor.context(obs, z + 1, active, starts, hidden)[0], context)


def test_subgoals_of_a_real_pretraining_run(tmp_path, capsys):
    import collect_data
    import pretrain_vae

    policies = ("nearest_stag", "nearest_hare")
    recorded = dict(env_id=STAG_HUNT["env_id"], num_steps=600, num_envs=16, policies=policies, data_dir=str(tmp_path))
    data = collect_data.main(collect_data.Args(**recorded))
    pretraining = dict(data=str(data), model="cvae", epochs=1, latent_size=4, runs_dir=str(tmp_path / "vae"))
    vae_dir = str(pretrain_vae.main(pretrain_vae.Args(**pretraining)))
    run_dir = run(tmp_path, **STAG_HUNT, subgoals=vae_dir, partners=("nearest_stag:1",), eval_episodes=2)
    assert len(metrics(run_dir)) == 3
    policy = Policy(run_dir)
    assert policy.actor.num_subgoals == 4 and policy.actor.memory_size > policy.actor.hidden_size
    assert not any(name.startswith("subgoals") for name in policy.actor.state_dict())  # frozen, and kept in one place
    capsys.readouterr()
    assert cli(["--subgoals", vae_dir, "--env-id", "stag_hunt-8x8-4h1s"]) == 2
    error = capsys.readouterr().err
    assert "(4, 4, 7)" in error and "8, 8, 7" in error and error.count("\n") == 1


@pytest.mark.parametrize("hyper", ["none", "delta"])
def test_compiled_numbers_are_those_of_eager(tmp_path, monkeypatch, hyper):
    if not runs.compile_works(torch.device("cpu")):
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr(hyper_mappo, "GRADIENT_COSINE_EVERY", 1)  # whose repeated backward passes stay eager
    flags = dict(env_id="pursuit", env_kwargs=SMALL_PURSUIT, num_steps=4, total_timesteps=32, hyper=hyper)
    eager, compiled = (metrics(run(tmp_path, str(on), compile=on, **flags)) for on in (False, True))
    for row, other in zip(eager, compiled, strict=True):
        for name in [*LOSSES, "nonstationarity/gradient_cosine"]:
            if row[name]:
                assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-5), name


def test_compile_that_fails_is_said_and_left_out(tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    assert len(metrics(run(tmp_path, compile=True))) == 2
    assert "going on without" in capsys.readouterr().out


@pytest.mark.parametrize("flags", FLAGS.values(), ids=str)
def test_every_form_trains_on_masked_envs_whose_agents_leave(tmp_path, flags):
    rows = metrics(run(tmp_path, **{**STAG_HUNT, "total_timesteps": 64}, **flags))
    assert len(rows) == 1 and all(math.isfinite(float(x)) for x in rows[0].values() if x)


def test_gradient_cosine_of_hand_made_gradients():
    actor, args = random_actor(hyper="none")
    mb = random_minibatch(actor, args)
    for name, x in mb.items():
        if name not in ("state", "starts", "hidden"):
            x[:, :, 1] = x[:, :, 0]
            x[:, :, 2] = x[:, :, 0]
    mb["learns"] = torch.ones_like(mb["active"])
    assert hyper_mappo.gradient_cosine(actor, mb, args) == pytest.approx(1.0, abs=1e-4)
    mb["advantages"][:, :, 2] *= -1
    mb["learns"][:, :, 1] = False
    assert hyper_mappo.gradient_cosine(actor, mb, args) == pytest.approx(-1.0, abs=1e-4)


def test_new_bad_arguments_end_in_one_line(tmp_path, capsys):
    stag_hunt = ["--env-id", "stag_hunt"]
    other = run(tmp_path, "other", **STAG_HUNT)
    for flags, message in [
        (["--hyper", "full", "--hyper-rank", "2"], "--hyper-rank would do nothing with --hyper full"),
        (["--no-share-parameters"], "give it --hyper none"),
        (["--no-share-parameters", "--hyper", "none", "--match-params", "delta"], "without --actor-context"),
        (["--hyper", "none", "--share-delta"], "--share-delta would do nothing"),
        (["--hyper", "none", "--context-size", "8"], "unless --actor-context"),
        (["--hyper", "delta", "--actor-context"], "--actor-context would do nothing with --hyper delta"),
        (["--hyper", "delta", "--match-params", "full"], "--match-params would do nothing"),
        (["--hyper-context", "local", "--share-delta"], "--share-delta would do nothing"),
        (["--hyper-context", "agent-id", "--history", "lstm"], "--history would do nothing"),
        (["--hyper-context", "agent-id", "--chunk-length", "4"], "--chunk-length would do nothing"),
        (["--target-sync-interval", "0"], "--target-sync-interval must be at least 1"),
        (["--num-steps", "64", "--chunk-length", "5"], "--chunk-length 5 does not divide"),
        ([*stag_hunt, "--partners", "nearest_stag"], "NAME:SEATS"),
        ([*stag_hunt, "--partners", "nearest_stag:4"], "leave at least 1"),
        ([*stag_hunt, "--partners", "nearest_cat:1"], "nearest_cat"),
        (["--env-id", "stag_hunt-8x8-4h1s", "--partners", f"{other}:1"], "was trained with"),
        (["--subgoals", str(other)], "--subgoals: "),
        (["--init-from", str(tmp_path / "nowhere")], "no checkpoint"),
    ]:
        assert cli([*flags, "--runs-dir", str(tmp_path / "none")]) == 2, flags
        said = capsys.readouterr().err.splitlines(keepends=True)
        error = "".join(line for line in said if "has no best.pt" not in line)  # which is said of the other run
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error


# --------------------------------------------------------------------------------------------- an actor for each agent

OWN_ACTORS = {"hyper": "none", "share_parameters": False}


def own_actor(actor, i, obs_shape, discrete=True):
    """A shared actor that has agent i's weights: with them alone it must say the same."""
    one = Actor({**spec(discrete), "obs_shape": obs_shape}, Args(**{**TINY, "hyper": "none"}))
    weights = {}
    for name, x in actor.state_dict().items():
        if name.startswith("trunk."):
            x = x.chunk(3)[i]
        else:
            x = x[i].squeeze(0) if name.endswith("bias") else x[i]
        weights[name] = x
    one.load_state_dict(weights)
    return one


@pytest.mark.parametrize("obs_shape", [[5], [20, 18, 3]], ids=["vector", "picture"])
@pytest.mark.parametrize("discrete", [True, False])
def test_actors_of_their_own_equal_as_many_separate_networks(discrete, obs_shape):
    torch.manual_seed(0)
    actor = Actor({**spec(discrete), "obs_shape": obs_shape}, Args(**{**TINY, **OWN_ACTORS}))
    for p in actor.parameters():
        p.data += 0.1 * torch.randn_like(p)
    _, mask, active, starts = random_inputs()
    obs = torch.randn(*active.shape, *obs_shape)
    inputs = [mask if discrete else None, active, starts, torch.zeros(4, 3, 0)]
    dist, _, _ = actor(obs, *inputs)
    for i in range(3):
        expected, _, _ = own_actor(actor, i, obs_shape, discrete)(obs, *inputs)
        torch.testing.assert_close(dist[:, :, i], expected[:, :, i])
        assert not torch.allclose(dist[:, :, i - 1], expected[:, :, i - 1])


def test_actors_of_their_own_start_as_different_standard_actors():
    torch.manual_seed(0)
    picture = {**spec(), "obs_shape": [20, 18, 3]}
    actor = Actor(picture, Args(**{**TINY, **OWN_ACTORS}))
    gains = [2**0.5, 2**0.5, 0.01]
    matrices = [(layer.weight, gain) for layer, gain in zip(actor.layers, gains, strict=True)]
    convs = [layer for layer in actor.trunk.convs if isinstance(layer, torch.nn.Conv2d)]
    matrices += [(conv.weight.unflatten(0, (3, -1)).flatten(2), 2**0.5) for conv in convs]
    assert len(matrices) == 5
    for weights, gain in matrices:
        for weight in weights:  # orthogonal rows or columns: all singular values are the gain
            singular = torch.linalg.svdvals(weight.detach())
            torch.testing.assert_close(singular, torch.full_like(singular, gain), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(weights[0], weights[1], atol=1e-4)


def test_an_agents_samples_reach_its_own_weights_only():
    torch.manual_seed(0)
    args = Args(**{**TINY, **OWN_ACTORS})
    actor, critic = Actor(spec(discrete=False), args), Critic(spec(discrete=False), args)
    mb = random_minibatch(actor, args, discrete=False)
    mb["learns"] = torch.zeros_like(mb["active"])
    mb["learns"][..., 1] = mb["active"][..., 1]
    loss, _ = ppo_loss(actor, critic, mb, args)
    loss.backward()
    for name, p in actor.named_parameters():
        assert p.shape[0] == 3, name
        assert (p.grad[[0, 2]] == 0).all() and p.grad[1].abs().sum() > 0, name


def test_multiplications_of_actors_of_their_own_are_those_of_a_shared_one():
    args = Args(**{**TINY, **OWN_ACTORS})
    picture = {**spec(), "obs_shape": [20, 18, 3]}
    for kind in (spec(), picture):
        assert count_multiplications(kind, args) == count_multiplications(kind, replace(args, share_parameters=True))


def test_actors_of_their_own_are_learnt_saved_evaluated_and_sit_as_partners(tmp_path, capsys):
    first = run(tmp_path, "first", **STAG_HUNT, **OWN_ACTORS)
    saved = load_checkpoint(first)["actor"]
    assert all(x.shape[0] == 4 for x in saved.values())
    assert not torch.equal(saved["layers.0.weight"][0], saved["layers.0.weight"][1])
    assert cli(["--evaluate", str(first), "--eval-episodes", "2", "--num-env-procs", "0"]) == 0
    assert json.loads((first / "eval.json").read_text())["episodes"] == 2

    tiny = ["--num-envs", "8", "--num-steps", "8", "--num-minibatches", "2", "--eval-episodes", "0"]
    flags = [*tiny, "--env-id", STAG_HUNT["env_id"], "--total-timesteps", "64", "--learning-rate", "0"]
    flags += ["--init-from", str(first), "--partners", f"{first}:1", "--runs-dir"]
    assert cli([*flags, str(tmp_path / "second")]) == 0
    second = load_checkpoint(next((tmp_path / "second").iterdir()))["actor"]
    assert all(torch.equal(x, second[name]) for name, x in saved.items())
    capsys.readouterr()
    assert cli([*flags, str(tmp_path / "third"), "--share-parameters"]) == 2
    assert "--share-parameters True contradicts" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ runs repeated, forms added


def test_choices_of_the_flags_are_the_table_of_forms():
    hints = typing.get_type_hints(Args)
    literal, _ = typing.get_args(hints["match_params"])  # ... | None
    assert typing.get_args(literal) == tuple(FORMS)
    assert typing.get_args(hints["hyper"]) == ("none", *FORMS)


@pytest.mark.parametrize(
    "flags",
    [{}, {"hyper": "full"}, {"hyper": "last-layer", "partners": ("stay:1",)}, {"hyper": "none"}],
    ids=str,
)
def test_args_json_alone_repeats_the_run(tmp_path, monkeypatch, flags):
    small = dict(env_id=STAG_HUNT["env_id"], num_steps=4, total_timesteps=2 * 512, eval_episodes=0)
    first = hyper_mappo.main(Args(**small, **flags, runs_dir=str(tmp_path / "first")))
    saved = json.loads((first / "args.json").read_text())
    assert saved["update_epochs"] == 1
    assert saved["backend"] == "batched" and (saved["num_envs"], saved["num_minibatches"]) == (128, 64)
    if flags != {"hyper": "none"}:
        rates = {"last-layer": 1e-4}
        assert saved["hyper_learning_rate"] == rates.get(saved["hyper"], 5e-4)
        assert saved["hyper_basis"] == FORMS[saved["hyper"]].default_basis
        assert saved["hyper_rank"] == FORMS[saved["hyper"]].default_rank
    assert saved["update_threads"] >= 1 and saved["num_env_procs"] is not None
    monkeypatch.setattr(hyper_mappo, "num_cpus", lambda: 1)  # another machine
    again = hyper_mappo.main(Args(**{**saved, "runs_dir": str(tmp_path / "again")}))
    assert len(metrics(first)) == 2 and metrics(again) == metrics(first)


def test_args_json_of_a_resumed_run_repeats_it_from_its_start(tmp_path):
    flags = dict(env_id="pursuit", env_kwargs=SMALL_PURSUIT)
    part = run(tmp_path, total_timesteps=2 * 32, **flags)
    assert cli(["--resume", str(part), "--total-timesteps", str(4 * 32)]) == 0
    saved = json.loads((part / "args.json").read_text())
    again = hyper_mappo.main(Args(**{**saved, "runs_dir": str(tmp_path / "again")}))
    assert len(metrics(again)) == 4 and metrics(again) == metrics(part)


def test_a_checkpoint_with_unresolved_args_loads_resumes_and_is_started_from(tmp_path, capsys):
    flags = dict(env_id=STAG_HUNT["env_id"], num_envs=8, num_steps=8, num_minibatches=2, total_timesteps=2 * 64)
    run_dir = hyper_mappo.main(Args(**flags, runs_dir=str(tmp_path), eval_episodes=0))
    checkpoint = load_checkpoint(run_dir)
    resolved = "backend hyper_basis hyper_rank hyper_learning_rate num_env_procs update_threads".split()
    checkpoint["args"] |= dict.fromkeys(resolved) | {"backend": "auto"}
    for name in ("agent_id", "team_spirit"):  # flags that came later
        del checkpoint["args"][name]
    checkpoint["args"]["long_gone"] = None  # and one that went, unused
    runs.save_checkpoint(checkpoint, run_dir / "latest.pt")
    assert Policy(run_dir).actor.hyper.basis == 16
    load_critic(run_dir)
    started = ["--init-from", str(run_dir), "--env-id", STAG_HUNT["env_id"], "--num-envs", "8", "--num-steps", "8"]
    started += ["--num-minibatches", "2", "--runs-dir", str(tmp_path / "started"), "--eval-episodes", "0"]
    assert cli([*started, "--total-timesteps", "64"]) == 0
    assert cli(["--evaluate", str(run_dir), "--eval-episodes", "1"]) == 0
    assert cli(["--resume", str(run_dir), "--total-timesteps", str(3 * 64)]) == 0
    assert len(metrics(run_dir)) == 3
    checkpoint["args"]["long_gone"] = 3
    runs.save_checkpoint(checkpoint, run_dir / "latest.pt")
    capsys.readouterr()
    assert cli(["--resume", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert "--long-gone" in error and error.count("\n") == 1


@pytest.mark.parametrize("context", ["joint", "local", "agent-id"])
def test_agents_with_seats_of_their_own_do_not_move_each_others_deltas(context):
    """By --agent-id codes are nearly orthogonal: a step on agent 0's loss moves agent 0's delta, not agent 1's."""

    def moved(agent_id):
        torch.manual_seed(0)
        flags = dict(hyper_context=context, agent_id=agent_id, context_size=8, hyper_basis=8, hyper_rank=0)
        actor = Actor(spec(), Args(hyper="delta", history="none", hidden_size=32, **flags))
        obs = torch.randn(1, 6, 1, 5).expand(1, 6, 3, 5)  # all agents see the same
        active, starts = torch.ones(1, 6, 3, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.bool)
        inputs = (obs, None, active, starts, torch.zeros(6, 3, actor.hidden_size))
        before = actor(*inputs)[0]
        before[:, :, 0, 0].sum().backward()
        for basis in actor.hyper.down:
            basis.weight.data += 1e-3 * basis.weight.grad
            basis.bias.data += 1e-3 * basis.bias.grad
        with torch.no_grad():
            return (actor(*inputs)[0] - before).square().sum((0, 1, 3)).sqrt()  # [A]

    own, other, _ = moved(agent_id=True)
    assert own > 0
    assert other < 0.35 * own
    if context != "agent-id":
        own, other, _ = moved(agent_id=False)
        torch.testing.assert_close(own, other)  # who sees the same has the same code


@pytest.mark.parametrize("broken", ["act", "check_args", "ppo_loss"])
def test_an_error_of_the_program_is_a_traceback_not_a_users_mistake(tmp_path, monkeypatch, broken):
    def breaks(*args, **kwargs):
        raise ValueError("of the program")

    monkeypatch.setattr(hyper_mappo, broken, breaks)
    flags = ["--env-id", STAG_HUNT["env_id"], "--num-envs", "8", "--num-steps", "8", "--total-timesteps", "64"]
    with pytest.raises(ValueError, match="of the program"):
        cli([*flags, "--runs-dir", str(tmp_path)])


def test_the_form_that_the_docs_add_trains(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "hyper_mappo.md").read_text(encoding="utf-8")
    section = page.split("\n## Add a form\n")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, flags=re.S)[1]
    monkeypatch.setattr(hyper_mappo, "FORMS", dict(FORMS))  # what the page adds goes with this test
    exec(compile(code, "docs/hyper_mappo.md", "exec"), {})
    (name,) = set(hyper_mappo.FORMS) - set(FORMS)
    torch.manual_seed(0)
    actor = Actor(spec(), Args(**TINY, hyper=name))
    obs, _, active, starts = random_inputs()
    inputs = (obs, None, active, starts, torch.zeros(4, 3, actor.hidden_size))
    base = obs
    for i, layer in enumerate(actor.layers):
        base = layer(base).relu() if i < 2 else layer(base)
    torch.testing.assert_close(actor(*inputs)[0], base.log_softmax(-1))
    for p in actor.parameters():
        p.data += 0.3 * torch.randn_like(p)
    # The norms are those of the weights that its layers apply, found by feeding it unit vectors.
    _, code, _ = actor(*inputs)
    code, previous = code[1:].flatten(0, 2), code[:-1].flatten(0, 2)
    norms, changes = actor.hyper.squared_norms(actor.layers, code, previous)
    thetas, bases = [], []
    for c in (code, previous):
        theta = []
        for i, layer in enumerate(actor.layers):
            units = torch.eye(layer.in_features + 1)[:, :-1]  # the last one is zero: the bias alone
            outputs = []
            for unit in units:
                x = unit.expand(len(c), -1)
                outputs.append(actor.hyper.apply_layer(i, layer, x, actor.hyper.mix(c)))
            bias = outputs.pop()
            theta += [bias, *(out - bias for out in outputs)]
        thetas.append(torch.cat(theta, dim=-1))
    for layer in actor.layers:
        bases += [layer.bias, *layer.weight.T]
    expected = (thetas[0] - torch.cat(bases)).square().sum(-1)
    torch.testing.assert_close(norms, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(changes, (thetas[0] - thetas[1]).square().sum(-1), rtol=1e-3, atol=1e-4)
    run_dir = run(tmp_path, total_timesteps=32, hyper=name)
    (row,) = metrics(run_dir)
    assert float(row["hyper/delta_norm"]) >= 0 and all(math.isfinite(float(x)) for x in row.values() if x)
    fresh = Policy(run_dir)
    torch.manual_seed(1)
    untrained = Actor(fresh.spec, fresh.args).state_dict()
    moved = [key for key, x in fresh.actor.state_dict().items() if not torch.equal(x, untrained[key])]
    assert any(key.startswith("hyper.") for key in moved)
