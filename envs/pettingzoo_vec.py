"""Any PettingZoo parallel env as a VecEnv: SuperSuit pads, blacks out agents that left, and vectorises.

SuperSuit's vectoriser alone loses what the contract needs (docs/envs.md says what), so each genuine env
sits in a `_SubEnv`, which sends it along in the info of the first agent:

    genuine env -> _SubEnv -> black_death_v3 -> pettingzoo_env_to_vec_env_v1 -> ConcatVecEnv or Workers

What the env returns is checked there too: anything else than its spaces promise ends the run in one line (RunError).
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import supersuit
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from pettingzoo.utils.env import ParallelEnv
from supersuit.utils.action_transforms.homogenize_ops import (
    check_homogenize_spaces,
    homogenize_observations,
    homogenize_spaces,
)
from supersuit.vector import ConcatVecEnv, MarkovVectorEnv
from torch import Tensor

from envs import ENV_TIMEOUT, EPISODE_LIMIT, EnvStep, VecEnv, make_parallel_env, resolve_env_id
from envs.spaces import MASK, OwnActions, OwnObs, Unfit, own_actions, own_obs
from envs.workers import Workers
from runs import RunError, UsageError


def episode_seed(seed: int, env: int, episode: int, num_envs: int) -> int:
    """The seed of sub-env `env` for its episode number `episode` (from 0): no two within 2**31 episodes are equal."""
    start, *_ = np.random.SeedSequence(seed).generate_state(1)
    return (int(start) + episode * num_envs + env) % 2**31


# ---------------------------------------------------------------- spaces
@dataclass
class EnvSpec:
    """What a genuine env looks like once its agents are padded to one space; n actions, D parts or dimensions."""

    env_id: str
    agents: list[str]
    own_obs: list[OwnObs]
    own_actions: list[OwnActions]
    obs_space: Box
    action_space: Discrete | MultiDiscrete | Box
    action_sizes: np.ndarray | None  # [A, D] options of each part that are the agent's own (D = 1 for one index)
    own_slots: np.ndarray | None  # [A, n of all parts] bool, actions that are the agent's own: the mask of no mask
    action_bounds: np.ndarray | None  # [2, A, D] lowest and highest real action
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
    action_spaces = [env.action_space(agent) for agent in agents]
    actions = [own_actions(space) for space in action_spaces]
    if None in actions or len({own.kind for own in actions}) > 1:
        raise UsageError(
            f"{env_id}: expected actions Discrete, MultiDiscrete, MultiBinary or Box, of one kind for all agents and "
            f"with few enough options, got {action_spaces}: choose other spaces"
        )
    obs = [_own_obs(env, env_id, agent, own) for agent, own in zip(agents, actions, strict=True)]
    arrays = [own.array for own in obs]
    try:
        check_homogenize_spaces(arrays)
    except AssertionError as error:
        raise UsageError(f"{env_id}: the observations of its agents cannot be padded to one shape: {error}") from error

    infos, state = _first_look(env, env_id)
    action_space, sizes, slots, bounds = _padded_actions(actions)
    has_mask = any(own.has_mask for own in obs) or any(MASK in (infos.get(agent) or {}) for agent in agents)
    if has_mask and sizes is None:
        raise UsageError(f"{env_id}: expected no {MASK} where actions are real numbers, got one: leave it out")
    has_state = state is not None
    spec = EnvSpec(
        env_id=resolve_env_id(env_id),
        agents=agents,
        own_obs=obs,
        own_actions=actions,
        obs_space=homogenize_spaces(arrays),
        action_space=action_space,
        action_sizes=sizes,
        own_slots=slots,
        action_bounds=bounds,
        masked=has_mask or (slots is not None and not slots.all()),
        state_shape=state.shape if has_state else None,
        state_dtype=state.dtype if has_state else None,
        obs_scale=_byte_scale(arrays[0]),
        state_scale=_byte_scale(getattr(env, "state_space", None) if has_state else arrays[0]),
    )
    try:
        _SubEnv(spec, env).reset(options={"seed": 0})
    except RunError as error:
        raise UsageError(str(error)) from error
    env.close()
    return spec


def _own_obs(env: ParallelEnv, env_id: str, agent: str, actions: OwnActions) -> OwnObs:
    try:
        return own_obs(env.observation_space(agent), actions)
    except Unfit as error:
        raise UsageError(f"{env_id}, {agent}: {error}") from error


def _first_look(env: ParallelEnv, env_id: str) -> tuple[dict, np.ndarray | None]:
    """The infos of a reset, which may hold masks, and the state, where there is one."""
    try:
        _, infos = env.reset(seed=0)
    except Exception as error:  # anyone's env
        raise UsageError(f"{env_id}: its reset(seed=0) raised {_in_one_line(error)}: correct the env") from error
    return infos if isinstance(infos, dict) else {}, _own_state(env, env_id)


def _padded_actions(own: list[OwnActions]) -> tuple[gym.Space, np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """One action space for all agents: -> space, action_sizes, own_slots, action_bounds (as in EnvSpec)

    Parts that an agent does not have are one option, option 0.
    """
    num_parts = max(actions.num_parts for actions in own)
    if own[0].kind == "real":
        bounds = np.zeros((2, len(own), num_parts), np.float32)
        for i, actions in enumerate(own):
            bounds[:, i, : actions.num_parts] = actions.bounds
        flat = [gym.spaces.flatten_space(actions.space) for actions in own]
        return homogenize_spaces(flat), None, None, bounds
    sizes = np.ones((len(own), num_parts), np.int64)
    for i, actions in enumerate(own):
        sizes[i, : actions.num_parts] = actions.options
    nvec = sizes.max(0)  # [D]
    option = np.concatenate([np.arange(n) for n in nvec])  # [n of all parts]
    slots = option < np.repeat(sizes, nvec, axis=1)
    space = Discrete(int(nvec[0])) if own[0].kind == "one" else MultiDiscrete(nvec)
    return space, sizes, slots, None


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


def _in_one_line(error: BaseException) -> str:
    """ "ValueError: what it says" """
    return " ".join(f"{type(error).__name__}: {error}".split())


# ---------------------------------------------------------------- one env
class Record(NamedTuple):
    """What the contract asks for and SuperSuit drops."""

    active: np.ndarray  # [A] bool
    action_mask: np.ndarray | None  # [A, n of all parts] bool
    state: np.ndarray | None  # [*S]
    terminations: np.ndarray  # [A] bool
    truncation: bool
    last_obs: dict[int, np.ndarray]  # agent's index -> what it saw last, where it was truncated while others play on
    replaced_actions: dict[int, Any]  # agent's index -> action that the env took instead of the given one
    limited: bool  # cut off at the limit for episodes that do not end by themselves


class _SubEnv(ParallelEnv):
    """One genuine env as SuperSuit's vectoriser can take it, with what the contract asks for and SuperSuit drops.

    Seeds every episode itself, pads agents to one space, tells when the last agent has gone, and sends a Record in
    the info of the first agent, as "start" after a reset and as "end" after a step (both, where SuperSuit reset the
    env at the end of the step). Raises RunError where the env raises, or returns what its spaces do not allow.
    """

    # DEVIATION: not pad_observations_v0 and pad_action_space_v0, which turn a parallel env into an AEC env and back:
    # that is slow, and fails when an agent comes late. What they do with spaces and values is called directly.

    def __init__(
        self,
        spec: EnvSpec,
        env: ParallelEnv,
        index: int = 0,
        num_envs: int = 1,
        episode_limit: int = 0,
    ):
        self.spec, self.env = spec, env
        self.index, self.num_envs = index, num_envs
        self.episode_limit = episode_limit
        self.possible_agents = self.agents = spec.agents
        self.metadata = getattr(env, "metadata", {})
        self.render_mode = getattr(env, "render_mode", None)
        self.own_obs = dict(zip(spec.agents, spec.own_obs, strict=True))
        self.own_actions = dict(zip(spec.agents, spec.own_actions, strict=True))
        self.nothing = np.zeros(spec.obs_space.shape, spec.obs_space.dtype)  # what an agent sees that is not there
        self.seed = self.episode = self.steps = 0

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
        self.steps = 0
        self.showed_mask: set[str] = set()  # agents whose infos held one
        obs, infos = self._dicts("reset", 2, lambda: self.env.reset(seed=own_seed))
        self.alive = self._present()
        if not self.alive:
            raise self._wrong("agents", Unfit("someone in the list after reset", "an empty list"))
        seen = {agent: self._array(agent, obs) for agent in self.agents if agent in self.alive}
        record = self._record(obs, infos)
        # black_death_v3 fills in for agents that left, not for those that are still to come
        padded = {**dict.fromkeys(self.agents, self.nothing), **seen}
        return padded, {self.agents[0]: {"start": record}}

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        acting = [agent for agent in self.agents if agent in self.alive]
        own = {agent: self.own_actions[agent].to_env(actions[agent]) for agent in acting}
        self.steps += 1
        obs, rewards, terms, truncs, infos = self._dicts("step", 5, lambda: self.env.step(own))
        rewards = {agent: self._reward(agent, rewards) for agent in acting}
        terms = {agent: self._flag(agent, "terminations", terms) for agent in acting}
        truncs = {agent: self._flag(agent, "truncations", truncs) for agent in acting}
        limited = self._let_go(acting, terms, truncs)
        over = not self.alive
        seen = {agent: self._array(agent, obs) for agent in self.agents if agent in self.alive}
        last = {}  # what those see who leave
        for agent in acting:
            if agent in self.alive:
                continue
            # Who is truncated is bootstrapped from its last observation; who is terminated need not have one.
            bootstrapped = truncs[agent] and not terms[agent]
            if bootstrapped or (over and agent in obs):
                last[agent] = self._array(agent, obs)
        record = self._record(
            obs,
            infos,
            terms,
            truncs,
            last_obs={} if over else {self.agents.index(agent): array for agent, array in last.items()},
            limited=limited,
        )
        infos = {agent: {} for agent in self.agents}
        infos[self.agents[0]]["end"] = record
        flags = dict.fromkeys(self.agents, over)  # black_death_v3 ends an episode only when both flags are set
        # black_death_v3 blanks out who left, but the last observation of an episode is that of all who acted.
        return last if over else seen, rewards, flags, flags, infos

    def _let_go(self, acting: list[str], terms: dict[str, bool], truncs: dict[str, bool]) -> bool:
        """Who stays after this step: -> whether the episode was cut off here"""
        left = {agent for agent in acting if terms[agent] or truncs[agent]}
        self.alive = self._present() - left
        for agent in acting:
            if agent not in left and agent not in self.alive:
                raise self._wrong("flags", Unfit("a termination or truncation of an agent that leaves", "none"), agent)
        limited = bool(self.alive) and self.steps == self.episode_limit
        if limited:
            for agent in self.alive.intersection(acting):
                truncs[agent] = True
            self.alive = set()
        return limited

    # --- what the env returned, checked

    def _dicts(self, name: str, number: int, call: Callable[[], Any]) -> tuple[dict, ...]:
        try:
            result = call()
        except Exception as error:  # anyone's env
            raise RunError(f"{self._here()}: {name} raised {_in_one_line(error)}") from error
        if not isinstance(result, tuple) or [isinstance(part, dict) for part in result] != [True] * number:
            raise self._wrong(name, Unfit(f"{number} dicts by agent", _short(result)))
        return result

    def _present(self) -> set[str]:
        present = set(self.env.agents)
        strange = present.difference(self.agents)
        if strange:
            raise self._wrong("agents", Unfit("only possible_agents", ", ".join(map(str, strange))))
        return present

    def _array(self, agent: str, obs: dict) -> np.ndarray:
        """[*O], padded"""
        if agent not in obs:
            raise self._wrong("observation", Unfit("one", "none"), agent)
        try:
            array = self.own_obs[agent].to_array(obs[agent])
        except Unfit as error:
            raise self._wrong("observation", error, agent) from None
        except Exception as error:  # a number where a Dict should be, say
            given = f"{_short(obs[agent])} ({_in_one_line(error)})"
            raise self._wrong("observation", Unfit(f"one of {self.own_obs[agent].seen}", given), agent) from error
        return homogenize_observations(self.spec.obs_space, array)

    def _reward(self, agent: str, rewards: dict) -> float:
        try:
            reward = float(rewards[agent])
        except (KeyError, TypeError, ValueError):
            raise self._wrong("reward", Unfit("a number", _short(rewards.get(agent))), agent) from None
        if not math.isfinite(reward):
            raise self._wrong("reward", Unfit("a finite number", f"{reward}"), agent)
        return reward

    def _flag(self, agent: str, field: str, flags: dict) -> bool:
        flag = flags.get(agent)
        if flag is True or flag is False:
            return flag
        if np.ndim(flag) or flag not in (False, True):
            raise self._wrong(field, Unfit("True or False", _short(flag)), agent)
        return bool(flag)

    def _state(self, truncated: bool) -> np.ndarray | None:
        if self.spec.state_shape is None:
            return None
        try:
            state = np.array(self.env.state())  # a copy: the env may write its next state into the same memory
        except Exception as error:  # anyone's env
            if not self.alive and not truncated:
                return self.last_state  # multiwalker has none once everyone fell; nothing is bootstrapped from it
            raise RunError(f"{self._here()}: state raised {_in_one_line(error)}") from error
        if state.shape != self.spec.state_shape:
            raise self._wrong("state", Unfit(f"shape {self.spec.state_shape}", f"{state.shape}"))
        if state.dtype.kind not in "biuf" or not np.isfinite(state).all():
            raise self._wrong("state", Unfit("finite numbers", _short(state[~np.isfinite(state)])))
        self.last_state = state
        return state

    def _record(
        self,
        obs: dict,
        infos: dict,
        terms: dict[str, bool] | None = None,
        truncs: dict[str, bool] | None = None,
        last_obs: dict[int, np.ndarray] | None = None,
        limited: bool = False,
    ) -> Record:
        terms, truncs = terms or {}, truncs or {}
        return Record(
            active=np.array([agent in self.alive for agent in self.agents]),
            action_mask=self._action_mask(obs, infos),
            state=self._state(truncated=any(truncs.values())),
            terminations=np.array([terms.get(agent, False) for agent in self.agents]),
            truncation=any(truncs.values()),
            last_obs=last_obs or {},
            replaced_actions=self._replaced_actions(infos),
            limited=limited,
        )

    def _replaced_actions(self, infos: dict) -> dict[int, Any]:
        replaced = {}
        for i, agent in enumerate(self.agents):
            info = infos.get(agent)
            if not info or info.get("executed_action") is None:
                continue
            try:
                action = self.own_actions[agent].from_env(info["executed_action"])
            except Unfit as error:
                raise self._wrong("executed_action", error, agent) from None
            replaced[i] = action
        return replaced

    def _action_mask(self, obs: dict, infos: dict) -> np.ndarray | None:
        """[A, n of all parts]; an agent that is not there has all its own actions"""
        mask = self.spec.own_slots.copy() if self.spec.masked else None
        for i, agent in enumerate(self.agents):
            if agent not in self.alive:
                continue
            given = self._given_mask(agent, obs, infos)
            if given is None:
                continue
            if mask is None:
                raise self._wrong(MASK, Unfit("one from the first reset on, or none", "one that came later"), agent)
            try:
                own_mask = self.own_actions[agent].mask(given)
            except Unfit as error:
                raise self._wrong(MASK, error, agent) from None
            own_slots = np.flatnonzero(self.spec.own_slots[i])[: len(own_mask)]  # padding parts come last
            mask[i, own_slots] = own_mask
        return mask

    def _given_mask(self, agent: str, obs: dict, infos: dict) -> Any:
        if self.own_obs[agent].has_mask:
            return obs[agent][MASK]
        info = infos.get(agent)
        given = info.get(MASK) if info else None
        if given is not None:
            self.showed_mask.add(agent)
        elif agent in self.showed_mask:
            raise self._wrong(MASK, Unfit("one in every step, as before", "none"), agent)
        return given

    def _here(self) -> str:
        return f"{self.spec.env_id}, env {self.index}, step {self.steps}"

    def _wrong(self, field: str, what: Unfit, agent: str | None = None) -> RunError:
        who = "" if agent is None else f", {agent}"
        return RunError(f"{self._here()}{who}: {field}: {what}: correct the env")

    def render(self) -> Any:
        try:
            return self.env.render()
        except Exception as error:  # anyone's env
            raise RunError(f"{self._here()}: render raised {_in_one_line(error)}") from error

    def close(self) -> None:
        self.env.close()


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _make_sub_env(
    spec: EnvSpec,
    env_kwargs: dict[str, Any],
    index: int,
    num_envs: int,
    episode_limit: int,
) -> MarkovVectorEnv:
    genuine = make_parallel_env(spec.env_id, **env_kwargs)
    env = supersuit.black_death_v3(_SubEnv(spec, genuine, index, num_envs, episode_limit))
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
        env_kwargs: dict[str, Any],
        num_envs: int,
        device: torch.device | str,
        seed: int,
        num_env_procs: int = 0,
        env_timeout: float = ENV_TIMEOUT,
        episode_limit: int = EPISODE_LIMIT,
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
        self.episode_limit = episode_limit
        self._said_limited = False
        self._picture_shape = None
        self._can_render = env_kwargs.get("render_mode") == "rgb_array"
        # What concat_vec_envs_v1 does with copies of one env; here each is made where it runs, and knows its index.
        make_sub_envs = []
        for index in range(num_envs):
            make = functools.partial(_make_sub_env, spec, env_kwargs, index, num_envs, episode_limit)
            make_sub_envs.append(make)
        num_procs = min(num_env_procs, num_envs)
        if num_procs > 1:
            self._venv = Workers(spec, make_sub_envs, num_procs, env_timeout)
        else:
            self._venv = ConcatVecEnv(make_sub_envs)
        # SuperSuit's workers are not daemons: a program that fails before close() would wait for them for ever.
        self._close = weakref.finalize(self, self._venv.close)
        self.reset(seed)

    def reset(self, seed: int | None = None) -> EnvStep:
        """Starts N new episodes; the same seed gives the same ones. None goes on with the next seeds of each env."""
        options = None if seed is None else {"seed": seed}
        obs, infos = self._venv.reset(options=options)
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
        is_real = isinstance(self.action_space, Box)
        dtype = torch.float32 if is_real else torch.int64
        shape = (self.num_envs, self.num_agents, *self.action_space.shape)
        if actions.shape != shape or actions.dtype != dtype:
            raise ValueError(
                f"expected actions {list(shape)} {dtype}, got {list(actions.shape)} {actions.dtype}: reshape or convert"
            )
        actions = actions.detach().cpu().numpy()
        if is_real:
            if not np.isfinite(actions[self._active]).all():
                raise ValueError("expected finite actions, got NaN or infinity: look at the policy's outputs")
            low, high = self.spec.action_bounds
            return np.clip(actions, low, high)
        sizes = self.spec.action_sizes  # [A, D]
        parts = actions.reshape(self.num_envs, *sizes.shape)  # [N, A, D]
        wrong = (parts < 0) | (parts >= sizes)
        wrong &= self._active[..., None]
        if wrong.any():
            n, a, d = np.argwhere(wrong)[0]
            which = "action" if isinstance(self.action_space, Discrete) else f"action part {d}"
            raise ValueError(
                f"expected an {which} of {self.agents[a]} in 0 ... {sizes[a, d] - 1}, "
                f"got {parts[n, a, d]} in env {n}: use action_mask"
            )
        return actions

    def _executed(self, given: np.ndarray, infos: list[dict]) -> Tensor | None:
        """Actions as the envs carried them out, where that is not as given: [N, A] or [N, A, D]"""
        records = [info["end"] for info in infos[:: self.num_agents]]  # [N]
        replaced = any(record.replaced_actions for record in records)
        if not replaced and not isinstance(self.action_space, Box):
            return None
        executed = given.copy()
        for n, record in enumerate(records):
            for a, action in record.replaced_actions.items():
                if isinstance(self.action_space, Discrete):
                    executed[n, a] = action[0]
                else:
                    executed[n, a, : len(action)] = action
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
        self._say_limited(ends)
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
        final_obs = self._final_obs(obs, infos, over, ends)
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

    def _final_obs(self, obs: Tensor, infos: list[dict], over: np.ndarray, ends: list[Record]) -> Tensor:
        """obs [N, A, *O], infos [N * A], over [N] -> [N, A, *O]"""
        cut = [n for n, end in enumerate(ends) if end.last_obs]
        if not over.any() and not cut:
            return obs
        final_obs = obs.clone()
        for n in np.flatnonzero(over):
            first = n * self.num_agents
            of_env = infos[first : first + self.num_agents]
            last = [info["terminal_observation"] for info in of_env]
            final_obs[n] = self._stack(last, self.obs_dtype)
        for n in cut:
            for a, last_obs in ends[n].last_obs.items():
                final_obs[n, a] = self._tensor(last_obs, self.obs_dtype)
        return final_obs

    def _say_limited(self, ends: list[Record]) -> None:
        if self._said_limited or not any(end.limited for end in ends):
            return
        self._said_limited = True
        print(
            f"{self.env_id}: an episode did not end by itself in {self.episode_limit} steps and is truncated there "
            "(--episode-limit)",
            file=sys.stderr,
        )

    def _stack(self, arrays: list, dtype: torch.dtype) -> Tensor:
        return self._tensor(np.stack(arrays), dtype)

    def _tensor(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(self.device, dtype)

    def render(self) -> np.ndarray:
        if not self._can_render:
            raise ValueError("expected render_mode='rgb_array', got an env made without: give it to make_vec_env")
        picture = np.asarray(self._venv.render())
        is_picture = picture.ndim == 3 and picture.dtype.kind in "iu"
        if not is_picture:
            raise RunError(f"{self.env_id}: render: expected numbers [height, width, 3], got {_short(picture)}")
        if self._picture_shape not in (None, picture.shape):
            raise RunError(f"{self.env_id}: render: expected {self._picture_shape} as before, got {picture.shape}")
        self._picture_shape = picture.shape
        return picture.astype(np.uint8)

    def close(self) -> None:
        self._close()


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.uint8 if dtype == np.uint8 else torch.float32


def _joined(obs: Tensor) -> Tensor:
    """All agents' observations along the last axis: [N, A, *O] -> [N, *O[:-1], A * O[-1]]"""
    return obs.movedim(1, -2).flatten(-2)
