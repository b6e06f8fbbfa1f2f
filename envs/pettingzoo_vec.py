"""Any PettingZoo parallel env as a VecEnv: SuperSuit pads, blacks out agents that left, and vectorises.

SuperSuit's vectoriser alone loses what the contract needs (docs/envs.md says what), so each genuine env
sits in a `_SubEnv`, which sends it along in the info of the first agent:

    genuine env -> _SubEnv -> black_death_v3 -> pettingzoo_env_to_vec_env_v1 -> ConcatVecEnv or ProcConcatVec
"""

from __future__ import annotations

import functools
import os
import signal
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import supersuit
import torch
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo.utils.env import ParallelEnv
from supersuit.utils.action_transforms.homogenize_ops import (
    check_homogenize_spaces,
    dehomogenize_actions,
    homogenize_observations,
    homogenize_spaces,
)
from supersuit.vector import MakeCPUAsyncConstructor, MarkovVectorEnv, ProcConcatVec
from supersuit.vector.multiproc_vec import decompress_info

from envs import EnvStep, VecEnv, make_parallel_env, resolve_env_id


def episode_seed(seed: int, env: int, episode: int, num_envs: int) -> int:
    """The seed of sub-env `env` for its episode number `episode` (from 0): no two within 2**31 episodes are equal."""
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return (start + episode * num_envs + env) % 2**31


# ---------------------------------------------------------------- spaces
@dataclass
class EnvSpec:
    """What a genuine env looks like once its agents are padded to one space; n actions or D dimensions."""

    env_id: str
    agents: list[str]
    obs_space: Box
    action_space: Discrete | Box
    action_sizes: np.ndarray  # [A] how many of the n actions (of the D dimensions) are the agent's own
    action_bounds: np.ndarray | None  # [2, A, D] lowest and highest continuous action
    masked: bool  # some action is not always legal
    state_shape: tuple[int, ...] | None  # of env.state(), None where there is none
    state_dtype: np.dtype | None
    obs_scale: float
    state_scale: float


def probe_env(env_id: str, env_kwargs: dict[str, Any]) -> EnvSpec:
    """Makes one env, resets it and says what it looks like. Raises ValueError where it cannot be used."""
    env = make_parallel_env(env_id, **env_kwargs)
    agents = list(getattr(env, "possible_agents", []))
    if not agents:
        raise ValueError(f"{env_id}: expected the names of all agents in possible_agents, found none: name them there")
    obs_spaces = [_flat_space(env.observation_space(agent)) for agent in agents]
    action_spaces = [env.action_space(agent) for agent in agents]
    discrete = all(isinstance(space, Discrete) and space.start == 0 for space in action_spaces)
    if not discrete and not all(isinstance(space, Box) and len(space.shape) == 1 for space in action_spaces):
        raise ValueError(f"{env_id}: expected actions Discrete(n) or Box [D] for all agents, got {action_spaces}")
    try:
        check_homogenize_spaces(obs_spaces)
    except AssertionError as error:
        raise ValueError(f"{env_id}: the observations of its agents cannot be padded to one shape: {error}") from error
    action_space, bounds = homogenize_spaces(action_spaces), None
    if discrete:
        sizes = np.array([space.n for space in action_spaces])
    else:
        sizes = np.array([space.shape[0] for space in action_spaces])
        bounds = np.zeros((2, len(agents), sizes.max()), dtype=np.float32)
        for i, space in enumerate(action_spaces):
            bounds[:, i, : sizes[i]] = space.low, space.high

    _, infos = env.reset(seed=0)
    has_mask = any(_has_mask(env.observation_space(agent)) or "action_mask" in infos.get(agent, {}) for agent in agents)
    try:
        state = np.asarray(env.state())
    except (NotImplementedError, AttributeError):
        state = None
    except Exception as error:  # anyone's env: go on without, and say so
        warnings.warn(f"{env_id}: state() failed ({error}); the critic gets all observations instead", stacklevel=2)
        state = None
    if state is not None and state.dtype.kind not in "biuf":  # None, or a structure: nothing a network could read
        state = None
    env.close()
    return EnvSpec(
        env_id=resolve_env_id(env_id),
        agents=agents,
        obs_space=homogenize_spaces(obs_spaces),
        action_space=action_space,
        action_sizes=sizes,
        action_bounds=bounds,
        masked=discrete and (has_mask or sizes.min() < sizes.max()),
        state_shape=None if state is None else state.shape,
        state_dtype=None if state is None else state.dtype,
        obs_scale=_byte_scale(obs_spaces[0]),
        state_scale=_byte_scale(obs_spaces[0] if state is None else getattr(env, "state_space", None)),
    )


def _byte_scale(space: gym.Space | None) -> float:
    """1/255 for a picture's bytes, so that networks see 0 ... 1; small counts kept in bytes stay as they are."""
    return 1 / 255 if isinstance(space, Box) and space.dtype == np.uint8 and space.high.max() == 255 else 1.0


def _has_mask(space: gym.Space) -> bool:
    return isinstance(space, Dict) and set(space) == {"observation", "action_mask"}


def _is_plain(space: gym.Space) -> bool:
    return isinstance(space, Box) and len(space.shape) > 0


def _flat_space(space: gym.Space) -> Box:
    """An agent's observation as an array, without its mask: anything but arrays is flattened, numbers to one-hot."""
    space = space["observation"] if _has_mask(space) else space
    flat = space if _is_plain(space) else gym.spaces.flatten_space(space)
    if not isinstance(flat, Box):
        raise ValueError(f"expected observations of a fixed size, got {space}: choose another kind of observation")
    return flat


# ---------------------------------------------------------------- one env
class _SubEnv(ParallelEnv):
    """One genuine env as SuperSuit's vectoriser can take it, with what the contract asks for and SuperSuit drops.

    Seeds every episode itself, pads agents to one space, tells when the last agent has gone, and sends a record in
    the info of the first agent, as "start" after a reset and as "end" after a step (both, where SuperSuit reset the
    env at the end of the step): (active [A], action_mask [A, n] or None, state [*S] or None, terminations [A],
    truncation, {agent's index: action that the env took instead}).
    """

    # DEVIATION: not pad_observations_v0 and pad_action_space_v0, which turn a parallel env into an AEC env and back:
    # that is slow, and fails when an agent comes late. What they do with spaces and values is called directly.

    def __init__(self, spec: EnvSpec, env_kwargs: dict[str, Any], index: int, num_envs: int, trainer_pid: int):
        if os.getpid() != trainer_pid:
            # Ctrl-C and a job's SIGTERM reach all processes; the trainer, which saves first, then ends the workers.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.env = make_parallel_env(spec.env_id, **env_kwargs)
        self.spec, self.index, self.num_envs = spec, index, num_envs
        self.possible_agents = self.agents = spec.agents
        self.metadata = getattr(self.env, "metadata", {})
        self.render_mode = env_kwargs.get("render_mode")
        self.seed = self.episode = 0

    def observation_space(self, agent: str) -> Box:
        return self.spec.obs_space

    def action_space(self, agent: str) -> gym.Space:
        return self.spec.action_space

    @property
    def unwrapped(self) -> ParallelEnv:
        return self

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        # SuperSuit's seeds repeat between processes and are None after an episode; options reach all envs alike.
        self.seed, self.episode = (options["seed"], 0) if options else (self.seed, self.episode + 1)
        obs, infos = self.env.reset(seed=episode_seed(self.seed, self.index, self.episode, self.num_envs))
        self.alive = set(self.env.agents)
        record = self._record(obs, infos, {}, {})
        # black_death_v3 fills in for agents that left, not for those that are still to come
        nothing = np.zeros(self.spec.obs_space.shape, self.spec.obs_space.dtype)
        obs = {agent: self._array(agent, obs[agent]) if agent in self.alive else nothing for agent in self.agents}
        return obs, {self.agents[0]: {"start": record}}

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        acting = [agent for agent in self.agents if agent in self.alive]
        actions = {a: dehomogenize_actions(self.env.action_space(a), actions[a]) for a in acting}
        obs, rewards, terms, truncs, infos = self.env.step(actions)
        terms, truncs = ({a: bool(flags.get(a)) for a in acting} for flags in (terms, truncs))
        self.alive = {a for a in self.env.agents if not (terms.get(a) or truncs.get(a))}
        over = not self.alive
        record = self._record(obs, infos, terms, truncs)
        # Agents that left are zero, but the last observation of an episode is that of all who acted.
        obs = {a: self._array(a, obs[a]) for a in (acting if over else self.alive) if a in obs}
        rewards = {a: rewards.get(a, 0.0) for a in acting}
        infos = {agent: {} for agent in self.agents}
        infos[self.agents[0]]["end"] = record
        flags = dict.fromkeys(self.agents, over)  # black_death_v3 ends an episode only when both flags are set
        return obs, rewards, flags, flags, infos

    def _array(self, agent: str, obs: Any) -> np.ndarray:
        space = self.env.observation_space(agent)
        if _has_mask(space):
            space, obs = space["observation"], obs["observation"]
        if not _is_plain(space):
            obs = gym.spaces.flatten(space, obs)
        # A copy: the env may write its next observation into the same memory, and does when it is reset in this step.
        return homogenize_observations(self.spec.obs_space, np.array(obs, self.spec.obs_space.dtype))

    def _record(self, obs: dict, infos: dict, terms: dict, truncs: dict) -> tuple:
        active = np.array([agent in self.alive for agent in self.agents])  # [A]
        mask = None
        if self.spec.masked:
            mask = np.arange(self.spec.action_space.n) < self.spec.action_sizes[:, None]  # [A, n]
            for i, agent in enumerate(self.agents):
                if active[i]:
                    where = obs if _has_mask(self.env.observation_space(agent)) else infos
                    mask[i, : self.spec.action_sizes[i]] = where.get(agent, {}).get("action_mask", True)
        state = None if self.spec.state_shape is None else np.array(self.env.state())  # a copy, as in _array
        terminations = np.array([terms.get(agent, False) for agent in self.agents])  # [A]
        took = {i: infos.get(agent, {}).get("executed_action") for i, agent in enumerate(self.agents)}
        took = {i: action for i, action in took.items() if action is not None}
        return active, mask, state, terminations, any(truncs.values()), took

    def render(self) -> np.ndarray:
        return self.env.render()

    def close(self) -> None:
        self.env.close()


def _make_sub_env(*args: Any) -> MarkovVectorEnv:
    return supersuit.pettingzoo_env_to_vec_env_v1(supersuit.black_death_v3(_SubEnv(*args)))


# ---------------------------------------------------------------- N envs
class PettingZooVecEnv(VecEnv):
    """N genuine envs, in this process (num_env_procs 0 or 1) or spread over `num_env_procs` others.

    Seeds, and so all numbers, are the same whatever num_env_procs is. `state_dict` is None: the episodes in flight
    of a genuine env cannot be saved in general. Continuous actions are clipped to the bounds of their space.
    """

    backend = "pettingzoo"

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        device: torch.device | str,
        seed: int,
        num_env_procs: int = 0,
        **env_kwargs: Any,
    ):
        self.spec = spec = probe_env(env_id, env_kwargs)
        self.env_id, self.num_envs, self.agents, self.device = spec.env_id, num_envs, spec.agents, torch.device(device)
        self.action_space = spec.action_space
        self.obs_scale, self.state_scale = spec.obs_scale, spec.state_scale
        self.obs_shape, self.obs_dtype = spec.obs_space.shape, _torch_dtype(spec.obs_space.dtype)
        if spec.state_shape is None:
            self.state_shape = (*self.obs_shape[:-1], self.num_agents * self.obs_shape[-1])
            self.state_dtype = self.obs_dtype
        else:
            self.state_shape, self.state_dtype = spec.state_shape, _torch_dtype(spec.state_dtype)
        self._can_render = env_kwargs.get("render_mode") == "rgb_array"
        make = [functools.partial(_make_sub_env, spec, env_kwargs, i, num_envs, os.getpid()) for i in range(num_envs)]
        # What concat_vec_envs_v1 does with copies of one env; here each is made where it runs, and knows its index.
        self._venv = MakeCPUAsyncConstructor(min(num_env_procs, num_envs))(make, spec.obs_space, spec.action_space)
        # SuperSuit's workers are not daemons: a program that fails before close() would wait for them for ever.
        self._close = weakref.finalize(self, self._venv.close)
        self.reset(seed)

    def reset(self, seed: int) -> EnvStep:
        obs, infos = self._venv.reset(options={"seed": seed})
        if isinstance(self._venv, ProcConcatVec):
            infos = decompress_info(self._venv.num_envs, self._venv.idx_starts, infos)
        self._returns = torch.zeros(self.num_envs, self.num_agents)
        self._lengths = torch.zeros(self.num_envs, dtype=torch.int64)
        no_rewards = np.zeros((self.num_envs, self.num_agents), dtype=np.float32)
        return self._env_step(obs, infos, no_rewards, np.zeros(self.num_envs, dtype=bool))

    def step(self, actions: torch.Tensor) -> EnvStep:
        given = self._checked(actions)  # [N, A] or [N, A, D]
        obs, rewards, over, _, infos = self._venv.step(given.reshape(-1, *given.shape[2:]))
        self._lengths += 1
        rewards = rewards.reshape(self.num_envs, self.num_agents)
        over = over.reshape(self.num_envs, self.num_agents)[:, 0].astype(bool)  # alike for all agents of an env
        env_step = self._env_step(obs, infos, rewards, over)
        env_step.executed_actions = self._executed(given, infos)
        return env_step

    def _checked(self, actions: torch.Tensor) -> np.ndarray:
        """Actions as the envs can take them: indices in range, or finite numbers clipped to their bounds."""
        dtype = torch.int64 if isinstance(self.action_space, Discrete) else torch.float32
        shape = (self.num_envs, self.num_agents, *self.action_space.shape)
        if actions.shape != shape or actions.dtype != dtype:
            raise ValueError(
                f"expected actions {list(shape)} {dtype}, got {list(actions.shape)} {actions.dtype}: reshape or convert"
            )
        actions = actions.detach().cpu().numpy()
        if isinstance(self.action_space, Box):
            if not np.isfinite(actions[self._active]).all():
                raise ValueError("expected finite actions, got NaN or infinity: look at the policy's outputs")
            return np.clip(actions, *self.spec.action_bounds)
        wrong = ((actions < 0) | (actions >= self.spec.action_sizes)) & self._active  # [N, A]
        if wrong.any():
            n, a = np.argwhere(wrong)[0]
            raise ValueError(
                f"expected an action of {self.agents[a]} in 0 ... {self.spec.action_sizes[a] - 1}, "
                f"got {actions[n, a]} in env {n}: use action_mask"
            )
        return actions

    def _executed(self, given: np.ndarray, infos: list[dict]) -> torch.Tensor | None:
        if isinstance(self.action_space, Box):
            return torch.from_numpy(given).to(self.device)
        replaced = [info["end"][-1] for info in infos[:: self.num_agents]]  # [N]
        if not any(replaced):
            return None
        executed = given.copy()
        for n, actions in enumerate(replaced):
            for a, action in actions.items():
                executed[n, a] = action
        return torch.from_numpy(executed).to(self.device)

    def _env_step(self, obs: np.ndarray, infos: list[dict], rewards: np.ndarray, over: np.ndarray) -> EnvStep:
        """obs [N * A, *O], infos [N * A], rewards [N, A], over [N]"""
        num_agents = self.num_agents
        records = infos[::num_agents]  # [N * A] -> [N]: what the _SubEnvs sent
        starts = [record["start"] if "start" in record else record["end"] for record in records]
        ends = [record["end"] if "end" in record else record["start"] for record in records]
        active, masks, states, *_ = zip(*starts, strict=True)
        _, _, final_states, terminations, truncations, _ = zip(*ends, strict=True)
        self._active = np.stack(active)  # [N, A]

        episode_over, rewards = torch.from_numpy(over), torch.from_numpy(rewards)
        episode_returns, episode_lengths = self._returns + rewards, self._lengths.clone()
        self._returns = episode_returns * ~episode_over[:, None]
        self._lengths *= ~episode_over

        obs = self._tensor(obs, self.obs_dtype).reshape(self.num_envs, num_agents, *self.obs_shape)
        final_obs = obs
        if over.any():
            final_obs = obs.clone()
            for n in np.flatnonzero(over):
                last = [info["terminal_observation"] for info in infos[n * num_agents : (n + 1) * num_agents]]
                final_obs[n] = self._tensor(np.stack(last), self.obs_dtype)
        if self.spec.state_shape is None:
            state, final_state = _joined(obs), _joined(final_obs)
        else:
            state = self._tensor(np.stack(states), self.state_dtype)
            final_state = self._tensor(np.stack(final_states), self.state_dtype) if over.any() else state
        return EnvStep(
            obs=obs,
            state=state,
            action_mask=self._tensor(np.stack(masks), torch.bool) if self.spec.masked else None,
            active=self._tensor(self._active, torch.bool),
            rewards=rewards.to(self.device),
            terminations=self._tensor(np.stack(terminations), torch.bool),
            truncations=self._tensor(np.array(truncations, dtype=bool), torch.bool),
            episode_over=episode_over.to(self.device),
            final_obs=final_obs,
            final_state=final_state,
            episode_returns=episode_returns.to(self.device),
            episode_lengths=episode_lengths.to(self.device),
        )

    def _tensor(self, array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, dtype)

    def render(self) -> np.ndarray:
        if not self._can_render:
            raise ValueError("expected render_mode='rgb_array', got an env made without: give it to make_vec_env")
        return np.asarray(self._venv.render(), dtype=np.uint8)

    def close(self) -> None:
        self._close()


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.uint8 if dtype == np.uint8 else torch.float32


def _joined(obs: torch.Tensor) -> torch.Tensor:
    """All agents' observations along the last axis: [N, A, *O] -> [N, *O[:-1], A * O[-1]]"""
    return obs.movedim(1, -2).flatten(-2)
