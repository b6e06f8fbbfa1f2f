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
from typing import Any, NamedTuple

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
from torch import Tensor

from envs import EnvStep, VecEnv, make_parallel_env, resolve_env_id
from runs import UsageError


def episode_seed(seed: int, env: int, episode: int, num_envs: int) -> int:
    """The seed of sub-env `env` for its episode number `episode` (from 0): no two within 2**31 episodes are equal."""
    start, *_ = np.random.SeedSequence(seed).generate_state(1)
    return (int(start) + episode * num_envs + env) % 2**31


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
    """Makes one env, resets it and says what it looks like. Raises UsageError where it cannot be used."""
    env = make_parallel_env(env_id, **env_kwargs)
    agents = list(getattr(env, "possible_agents", []))
    if not agents:
        raise UsageError(f"{env_id}: expected the names of all agents in possible_agents, found none: name them there")
    obs_spaces = [_flat_space(env.observation_space(agent)) for agent in agents]
    try:
        check_homogenize_spaces(obs_spaces)
    except AssertionError as error:
        raise UsageError(f"{env_id}: the observations of its agents cannot be padded to one shape: {error}") from error
    action_spaces = [env.action_space(agent) for agent in agents]
    if all(_is_discrete(space) for space in action_spaces):
        sizes = np.array([space.n for space in action_spaces])
        bounds = None
    elif all(_is_continuous(space) for space in action_spaces):
        sizes = np.array([space.shape[0] for space in action_spaces])
        bounds = _action_bounds(action_spaces)
    else:
        raise UsageError(f"{env_id}: expected actions Discrete(n) or Box [D] for all agents, got {action_spaces}")

    _, infos = env.reset(seed=0)
    has_mask = any(_offers_mask(env, agent, infos) for agent in agents)
    state = _own_state(env, env_id)
    if state is None:
        state_shape, state_dtype = None, None
        state_scale = _byte_scale(obs_spaces[0])
    else:
        state_shape, state_dtype = state.shape, state.dtype
        state_scale = _byte_scale(getattr(env, "state_space", None))
    env.close()
    has_padded_actions = sizes.min() < sizes.max()
    return EnvSpec(
        env_id=resolve_env_id(env_id),
        agents=agents,
        obs_space=homogenize_spaces(obs_spaces),
        action_space=homogenize_spaces(action_spaces),
        action_sizes=sizes,
        action_bounds=bounds,
        masked=bounds is None and (has_mask or has_padded_actions),
        state_shape=state_shape,
        state_dtype=state_dtype,
        obs_scale=_byte_scale(obs_spaces[0]),
        state_scale=state_scale,
    )


def _is_discrete(space: gym.Space) -> bool:
    return isinstance(space, Discrete) and space.start == 0


def _is_continuous(space: gym.Space) -> bool:
    return isinstance(space, Box) and len(space.shape) == 1


def _action_bounds(spaces: list[Box]) -> np.ndarray:
    """[2, A, D] the lowest and the highest action; padded dimensions are 0"""
    num_dims = max(space.shape[0] for space in spaces)
    bounds = np.zeros((2, len(spaces), num_dims), dtype=np.float32)
    for i, space in enumerate(spaces):
        own = slice(space.shape[0])
        bounds[0, i, own] = space.low
        bounds[1, i, own] = space.high
    return bounds


def _offers_mask(env: ParallelEnv, agent: str, infos: dict) -> bool:
    in_obs = _has_mask(env.observation_space(agent))
    in_infos = "action_mask" in infos.get(agent, {})
    return in_obs or in_infos


def _own_state(env: ParallelEnv, env_id: str) -> np.ndarray | None:
    """env.state(), or None where there is none that a network could read."""
    try:
        state = np.asarray(env.state())
    except (NotImplementedError, AttributeError):
        return None
    except Exception as error:  # anyone's env: go on without, and say so
        warnings.warn(f"{env_id}: state() failed ({error}); the critic gets all observations instead", stacklevel=3)
        return None
    is_numbers = state.dtype.kind in "biuf"  # not None, and no structure
    return state if is_numbers else None


def _byte_scale(space: gym.Space | None) -> float:
    """1/255 for a picture's bytes, so that networks see 0 ... 1; small counts kept in bytes stay as they are."""
    is_bytes = isinstance(space, Box) and space.dtype == np.uint8
    if is_bytes and space.high.max() == 255:
        return 1 / 255
    return 1.0


def _has_mask(space: gym.Space) -> bool:
    return isinstance(space, Dict) and set(space) == {"observation", "action_mask"}


def _is_plain(space: gym.Space) -> bool:
    return isinstance(space, Box) and len(space.shape) > 0


def _flat_space(space: gym.Space) -> Box:
    """An agent's observation as an array, without its mask: anything but arrays is flattened, numbers to one-hot."""
    if _has_mask(space):
        space = space["observation"]
    if _is_plain(space):
        return space
    flat = gym.spaces.flatten_space(space)
    if not isinstance(flat, Box):
        raise UsageError(f"expected observations of a fixed size, got {space}: choose another kind of observation")
    return flat


# ---------------------------------------------------------------- one env
class Record(NamedTuple):
    """What the contract asks for and SuperSuit drops."""

    active: np.ndarray  # [A] bool
    action_mask: np.ndarray | None  # [A, n] bool
    state: np.ndarray | None  # [*S]
    terminations: np.ndarray  # [A] bool
    truncation: bool
    replaced_actions: dict[int, Any]  # agent's index -> action that the env took instead of the given one


class _SubEnv(ParallelEnv):
    """One genuine env as SuperSuit's vectoriser can take it, with what the contract asks for and SuperSuit drops.

    Seeds every episode itself, pads agents to one space, tells when the last agent has gone, and sends a Record in
    the info of the first agent, as "start" after a reset and as "end" after a step (both, where SuperSuit reset the
    env at the end of the step).
    """

    # DEVIATION: not pad_observations_v0 and pad_action_space_v0, which turn a parallel env into an AEC env and back:
    # that is slow, and fails when an agent comes late. What they do with spaces and values is called directly.

    def __init__(
        self,
        spec: EnvSpec,
        env_kwargs: dict[str, Any],
        index: int,
        num_envs: int,
        trainer_pid: int,
    ):
        if os.getpid() != trainer_pid:
            # Ctrl-C and a job's SIGTERM reach all processes; the trainer, which saves first, then ends the workers.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.env = make_parallel_env(spec.env_id, **env_kwargs)
        self.spec = spec
        self.index, self.num_envs = index, num_envs
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

    def reset(
        self,
        seed: int | None = None,
        options: dict | None = None,
    ) -> tuple[dict, dict]:
        # SuperSuit's seeds repeat between processes and are None after an episode; options reach all envs alike.
        if options:
            self.seed = options["seed"]
            self.episode = 0
        else:
            self.episode += 1
        own_seed = episode_seed(self.seed, self.index, self.episode, self.num_envs)
        obs, infos = self.env.reset(seed=own_seed)
        self.alive = set(self.env.agents)
        record = self._record(obs, infos, {}, {})
        # black_death_v3 fills in for agents that left, not for those that are still to come
        padded = dict.fromkeys(self.agents, self._nothing())
        for agent in self.alive:
            padded[agent] = self._array(agent, obs[agent])
        return padded, {self.agents[0]: {"start": record}}

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        acting = [agent for agent in self.agents if agent in self.alive]
        own_actions = {}
        for agent in acting:
            space = self.env.action_space(agent)
            own_actions[agent] = dehomogenize_actions(space, actions[agent])
        obs, rewards, terms, truncs, infos = self.env.step(own_actions)
        terms = {agent: bool(terms.get(agent)) for agent in acting}
        truncs = {agent: bool(truncs.get(agent)) for agent in acting}
        left = {agent for agent in acting if terms[agent] or truncs[agent]}
        self.alive = set(self.env.agents) - left
        over = not self.alive
        record = self._record(obs, infos, terms, truncs)
        # Agents that left are zero, but the last observation of an episode is that of all who acted.
        seeing = acting if over else self.alive
        obs = {agent: self._array(agent, obs[agent]) for agent in seeing if agent in obs}
        rewards = {agent: rewards.get(agent, 0.0) for agent in acting}
        infos = {agent: {} for agent in self.agents}
        infos[self.agents[0]]["end"] = record
        flags = dict.fromkeys(self.agents, over)  # black_death_v3 ends an episode only when both flags are set
        return obs, rewards, flags, flags, infos

    def _nothing(self) -> np.ndarray:
        """What an agent sees that is not there."""
        space = self.spec.obs_space
        return np.zeros(space.shape, space.dtype)

    def _array(self, agent: str, obs: Any) -> np.ndarray:
        space = self.env.observation_space(agent)
        if _has_mask(space):
            space = space["observation"]
            obs = obs["observation"]
        if not _is_plain(space):
            obs = gym.spaces.flatten(space, obs)
        # A copy: the env may write its next observation into the same memory, and does when it is reset in this step.
        obs = np.array(obs, self.spec.obs_space.dtype)
        return homogenize_observations(self.spec.obs_space, obs)

    def _record(self, obs: dict, infos: dict, terms: dict, truncs: dict) -> Record:
        state = None
        if self.spec.state_shape is not None:
            state = np.array(self.env.state())  # a copy, as in _array
        replaced = {}
        for i, agent in enumerate(self.agents):
            action = infos.get(agent, {}).get("executed_action")
            if action is not None:
                replaced[i] = action
        return Record(
            active=np.array([agent in self.alive for agent in self.agents]),
            action_mask=self._action_mask(obs, infos),
            state=state,
            terminations=np.array([terms.get(agent, False) for agent in self.agents]),
            truncation=any(truncs.values()),
            replaced_actions=replaced,
        )

    def _action_mask(self, obs: dict, infos: dict) -> np.ndarray | None:
        """[A, n]; an agent that is not there has all its own actions"""
        if not self.spec.masked:
            return None
        sizes = self.spec.action_sizes
        mask = np.arange(self.spec.action_space.n) < sizes[:, None]  # [A, n]
        for i, agent in enumerate(self.agents):
            if agent in self.alive:
                in_obs = _has_mask(self.env.observation_space(agent))
                source = obs if in_obs else infos
                own_mask = source.get(agent, {}).get("action_mask", True)
                mask[i, : sizes[i]] = own_mask
        return mask

    def render(self) -> np.ndarray:
        return self.env.render()

    def close(self) -> None:
        self.env.close()


def _make_sub_env(*args: Any) -> MarkovVectorEnv:
    env = supersuit.black_death_v3(_SubEnv(*args))
    return supersuit.pettingzoo_env_to_vec_env_v1(env)


# ---------------------------------------------------------------- N envs
class PettingZooVecEnv(VecEnv):
    """N genuine envs, in this process (num_env_procs 0 or 1) or spread over `num_env_procs` others.

    Seeds, and so all numbers, are the same whatever num_env_procs is. `state_dict` is None: the episodes in flight
    of a genuine env cannot be saved in general. Continuous actions are clipped to the bounds of their space.
    """

    backend = "pettingzoo"

    def __init__(
        self,
        spec: EnvSpec,
        num_envs: int,
        device: torch.device | str,
        seed: int,
        num_env_procs: int = 0,
        **env_kwargs: Any,
    ):
        """spec: from probe_env(env_id, env_kwargs)"""
        self.spec = spec
        self.env_id = spec.env_id
        self.num_envs = num_envs
        self.agents = spec.agents
        self.device = torch.device(device)
        self.action_space = spec.action_space
        self.obs_scale = spec.obs_scale
        self.state_scale = spec.state_scale
        self.obs_shape = spec.obs_space.shape
        self.obs_dtype = _torch_dtype(spec.obs_space.dtype)
        if spec.state_shape is None:
            *grid, num_channels = self.obs_shape
            self.state_shape = (*grid, self.num_agents * num_channels)
            self.state_dtype = self.obs_dtype
        else:
            self.state_shape = spec.state_shape
            self.state_dtype = _torch_dtype(spec.state_dtype)
        self._can_render = env_kwargs.get("render_mode") == "rgb_array"
        # What concat_vec_envs_v1 does with copies of one env; here each is made where it runs, and knows its index.
        make_sub_envs = []
        for index in range(num_envs):
            make = functools.partial(_make_sub_env, spec, env_kwargs, index, num_envs, os.getpid())
            make_sub_envs.append(make)
        make_venv = MakeCPUAsyncConstructor(min(num_env_procs, num_envs))
        self._venv = make_venv(make_sub_envs, spec.obs_space, spec.action_space)
        # SuperSuit's workers are not daemons: a program that fails before close() would wait for them for ever.
        self._close = weakref.finalize(self, self._venv.close)
        self.reset(seed)

    def reset(self, seed: int | None = None) -> EnvStep:
        """Starts N new episodes; the same seed gives the same ones. None goes on with the next seeds of each env."""
        options = None if seed is None else {"seed": seed}
        obs, infos = self._venv.reset(options=options)
        if isinstance(self._venv, ProcConcatVec):
            infos = decompress_info(self._venv.num_envs, self._venv.idx_starts, infos)
        self._returns = torch.zeros(self.num_envs, self.num_agents)
        self._lengths = torch.zeros(self.num_envs, dtype=torch.int64)
        no_rewards = np.zeros((self.num_envs, self.num_agents), np.float32)
        nowhere = np.zeros(self.num_envs, bool)
        return self._env_step(obs, infos, no_rewards, nowhere)

    def step(self, actions: Tensor) -> EnvStep:
        given = self._checked(actions)  # [N, A] or [N, A, D]
        flat = given.reshape(-1, *self.action_space.shape)  # [N * A] or [N * A, D]
        obs, rewards, over, _, infos = self._venv.step(flat)
        self._lengths += 1
        rewards = rewards.reshape(self.num_envs, self.num_agents)
        over = over.reshape(self.num_envs, self.num_agents)
        over = over[:, 0].astype(bool)  # [N], alike for all agents of an env
        env_step = self._env_step(obs, infos, rewards, over)
        env_step.executed_actions = self._executed(given, infos)
        return env_step

    def _checked(self, actions: Tensor) -> np.ndarray:
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
            low, high = self.spec.action_bounds
            return np.clip(actions, low, high)
        wrong = (actions < 0) | (actions >= self.spec.action_sizes)  # [N, A]
        wrong &= self._active
        if wrong.any():
            n, a = np.argwhere(wrong)[0]
            raise ValueError(
                f"expected an action of {self.agents[a]} in 0 ... {self.spec.action_sizes[a] - 1}, "
                f"got {actions[n, a]} in env {n}: use action_mask"
            )
        return actions

    def _executed(self, given: np.ndarray, infos: list[dict]) -> Tensor | None:
        """Actions as the envs carried them out, where that is not as given: [N, A] or [N, A, D]"""
        if isinstance(self.action_space, Box):
            return torch.from_numpy(given).to(self.device)
        records = [info["end"] for info in infos[:: self.num_agents]]  # [N]
        if not any(record.replaced_actions for record in records):
            return None
        executed = given.copy()
        for n, record in enumerate(records):
            for a, action in record.replaced_actions.items():
                executed[n, a] = action
        return torch.from_numpy(executed).to(self.device)

    def _env_step(
        self,
        obs: np.ndarray,
        infos: list[dict],
        rewards: np.ndarray,
        over: np.ndarray,
    ) -> EnvStep:
        """obs [N * A, *O], infos [N * A], rewards [N, A], over [N]"""
        sent = infos[:: self.num_agents]  # [N * A] -> [N]: what the _SubEnvs sent
        starts = [info.get("start", info.get("end")) for info in sent]
        ends = [info.get("end", info.get("start")) for info in sent]
        self._active = np.stack([start.active for start in starts])  # [N, A]
        action_mask = None
        if self.spec.masked:
            action_mask = self._stack([start.action_mask for start in starts], torch.bool)

        episode_over = torch.from_numpy(over)
        rewards = torch.from_numpy(rewards)
        episode_returns = self._returns + rewards
        episode_lengths = self._lengths.clone()
        self._returns = episode_returns * ~episode_over[:, None]
        self._lengths *= ~episode_over

        obs = self._tensor(obs, self.obs_dtype)
        obs = obs.reshape(self.num_envs, self.num_agents, *self.obs_shape)
        final_obs = self._final_obs(obs, infos, over)
        if self.spec.state_shape is None:
            state = _joined(obs)
            final_state = _joined(final_obs)
        else:
            state = self._stack([start.state for start in starts], self.state_dtype)
            final_state = state
            if over.any():
                final_state = self._stack([end.state for end in ends], self.state_dtype)
        return EnvStep(
            obs=obs,
            state=state,
            action_mask=action_mask,
            active=self._tensor(self._active, torch.bool),
            rewards=rewards.to(self.device),
            terminations=self._stack([end.terminations for end in ends], torch.bool),
            truncations=self._stack([end.truncation for end in ends], torch.bool),
            episode_over=episode_over.to(self.device),
            final_obs=final_obs,
            final_state=final_state,
            episode_returns=episode_returns.to(self.device),
            episode_lengths=episode_lengths.to(self.device),
        )

    def _final_obs(self, obs: Tensor, infos: list[dict], over: np.ndarray) -> Tensor:
        """obs [N, A, *O], infos [N * A], over [N] -> [N, A, *O]"""
        if not over.any():
            return obs
        final_obs = obs.clone()
        for n in np.flatnonzero(over):
            first = n * self.num_agents
            of_env = infos[first : first + self.num_agents]
            last = [info["terminal_observation"] for info in of_env]
            final_obs[n] = self._stack(last, self.obs_dtype)
        return final_obs

    def _stack(self, arrays: list, dtype: torch.dtype) -> Tensor:
        return self._tensor(np.stack(arrays), dtype)

    def _tensor(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(self.device, dtype)

    def render(self) -> np.ndarray:
        if not self._can_render:
            raise ValueError("expected render_mode='rgb_array', got an env made without: give it to make_vec_env")
        picture = self._venv.render()
        return np.asarray(picture, dtype=np.uint8)

    def close(self) -> None:
        self._close()


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.uint8 if dtype == np.uint8 else torch.float32


def _joined(obs: Tensor) -> Tensor:
    """All agents' observations along the last axis: [N, A, *O] -> [N, *O[:-1], A * O[-1]]"""
    return obs.movedim(1, -2).flatten(-2)
