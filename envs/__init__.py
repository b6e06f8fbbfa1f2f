"""The environment contract that every script trains, evaluates and records through.

All tensors live on `device`. N envs, A agents in the order of `possible_agents`, `*O` one agent's
observation, `*S` the global state, n discrete actions (or D action dimensions).

Time convention, everywhere: index t of rewards, terminations and truncations belongs to the
transition t -> t+1. Resets happen in the same step: when an episode ends, `obs`, `state`,
`action_mask` and `active` of that EnvStep already open the next one, and `final_obs` and
`final_state` hold what the transition really led to.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import gymnasium as gym
import torch

from runs import RunError, UsageError

if TYPE_CHECKING:
    from envs.pettingzoo_vec import EnvSpec


class EnvStep:
    """What `reset` and `step` of a VecEnv return.

    obs             [N, A, *O]  obs_dtype, agent-centred; all zero for agents that are not active
    state           [N, *S]     state_dtype
    action_mask     [N, A, n]   bool, legal actions in `obs`, never a row without any; None: always all legal
    active          [N, A]      bool, agent takes part in the step to come (the one taken from `obs`)
    rewards         [N, A]      float32, zero for agents that were not active in this step
    terminations    [N, A]      bool, the rules ended this agent's episode at this transition
    truncations     [N]         bool, the time limit was hit at this transition (for agents it did not terminate)
    episode_over    [N]         bool, this env was reset at the end of this step
    final_obs       [N, A, *O]  the true next observation: before the reset where episode_over, and of an agent that
                                is truncated while others play on its last one; else `obs`
    final_state     [N, *S]     likewise for `state`
    episode_returns [N, A]      float32, undiscounted return; meaningful where episode_over
    episode_lengths [N]         int64, env steps; meaningful where episode_over
    executed_actions [N, A]     actions as the env carried them out ([N, A, D] where one has D parts); None: as given
    success         [N]         bool, the episode that ended was won; meaningful where episode_over. None: no such thing

    `final_obs` and `final_state` may be given as functions and are then computed when first read
    (only few callers need them). They must be read before the env steps again.
    """

    def __init__(
        self,
        obs: torch.Tensor,
        state: torch.Tensor,
        action_mask: torch.Tensor | None,
        active: torch.Tensor,
        rewards: torch.Tensor,
        terminations: torch.Tensor,
        truncations: torch.Tensor,
        episode_over: torch.Tensor,
        final_obs: torch.Tensor | Callable[[], torch.Tensor],
        final_state: torch.Tensor | Callable[[], torch.Tensor],
        episode_returns: torch.Tensor,
        episode_lengths: torch.Tensor,
        executed_actions: torch.Tensor | None = None,
        success: torch.Tensor | None = None,
    ):
        self.obs, self.state, self.action_mask, self.active = obs, state, action_mask, active
        self.rewards, self.terminations, self.truncations = rewards, terminations, truncations
        self.episode_over = episode_over
        self._final_obs, self._final_state = final_obs, final_state
        self.episode_returns, self.episode_lengths = episode_returns, episode_lengths
        self.executed_actions = executed_actions
        self.success = success

    @property
    def final_obs(self) -> torch.Tensor:
        if callable(self._final_obs):
            self._final_obs = self._final_obs()
        return self._final_obs

    @property
    def final_state(self) -> torch.Tensor:
        if callable(self._final_state):
            self._final_state = self._final_state()
        return self._final_state


class VecEnv:
    """N copies of a parallel multi-agent env. Subclasses set every attribute and write the methods."""

    env_id: str  # as resolved, e.g. "sisl/pursuit_v5"
    backend: str  # "pettingzoo" (the genuine env) or "batched" (tensors)
    num_envs: int
    agents: list[str]  # possible_agents, the order of every agent axis
    obs_shape: tuple[int, ...]
    obs_dtype: torch.dtype  # uint8 where observations are small counts, else float32
    state_shape: tuple[int, ...]
    state_dtype: torch.dtype
    obs_scale: float = 1.0  # what networks multiply observations by: 1/255 for bytes of a picture, else 1
    state_scale: float = 1.0
    action_space: gym.Space  # of one agent: Discrete(n) or Box [D]; padded to the largest where agents differ
    device: torch.device

    @property
    def num_agents(self) -> int:
        return len(self.agents)

    def reset(self, seed: int | None = None) -> EnvStep:
        """Starts N new episodes; the same seed gives the same ones. None goes on with the random numbers in use.

        Rewards and flags are zero.
        """
        raise NotImplementedError

    def step(self, actions: torch.Tensor) -> EnvStep:
        """Steps all envs. actions: [N, A] int64, or [N, A, D] float32; rows of inactive agents are ignored.

        Raises ValueError for a wrong shape or dtype, or (where it can be checked without stalling the
        device) an action out of range.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any] | None:
        """Everything needed to continue the episodes in flight (tensors, numbers, strings); None if it can't."""
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> EnvStep:
        """Continues the episodes in flight; returns the EnvStep that `reset` or `step` returned last."""
        raise NotImplementedError

    def render(self) -> Any:
        """The picture of env 0 as uint8 numpy [height, width, 3]."""
        raise NotImplementedError

    def close(self) -> None:
        pass


# ---------------------------------------------------------------- what an observation means
@dataclass(frozen=True)
class ObsSpec:
    """What the channels of one agent's observation [H, W, C] or [D] mean. Declared by its env, never guessed from data.

    names        one per channel
    kinds        one per channel: agent (one cell or none), binary, count, real
    ego          where the agent stands in its own view: plane (in channel 0), centre, or none (not a grid)
    team         the channel that counts all agents where there is no plane for each; None: there is none
    window       the view is a window that moves with its agent
    hunts        prey channel -> (action that hunts it, hunters needed on its cell)
    moves        (row, column) steps of the first actions, where the game stays the same when its map is turned or
                 mirrored along with them; empty: not known
    certain      view and joint action determine what comes next
    resimulates  the batched env can be put into any full state (positions, set_positions) to step from it again
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    ego: Literal["plane", "centre", "none"] = "none"
    team: int | None = None
    window: bool = False
    hunts: dict[str, tuple[int, int]] = field(default_factory=dict)
    moves: tuple[tuple[int, int], ...] = ()
    certain: bool = False
    resimulates: bool = False

    @property
    def agent_planes(self) -> list[int]:
        return [p for p, kind in enumerate(self.kinds) if kind == "agent"]


def describe_obs(meta: dict[str, Any]) -> ObsSpec:
    """What is known of an env's observations.

    meta holds env_id (resolved), env_kwargs, num_agents, obs_shape and obs_dtype, as the meta of a dataset and the
    config of a model do. Raises UsageError for shapes other than [D] and [H, W, C].
    """
    for name in ("pursuit", *PRESET_GAMES):
        game = importlib.import_module(f"envs.{name}")
        if re.fullmatch(game.ENV_ID, meta["env_id"]):
            return game.describe_obs(meta["num_agents"], meta["env_kwargs"])
    shape = meta["obs_shape"]
    if len(shape) not in (1, 3):
        raise UsageError(f"expected observations [D] or [H, W, C], got shape {list(shape)}: flatten them first")
    axis = "channel" if len(shape) == 3 else "dim"
    names = tuple(f"{axis} {c}" for c in range(shape[-1]))
    kind = "count" if meta["obs_dtype"] == "uint8" else "real"
    return ObsSpec(names, (kind,) * shape[-1])


# ---------------------------------------------------------------- names
ALIASES = {"pursuit": "sisl/pursuit"}  # a registry id without version is its newest one
BACKENDS = ("auto", "pettingzoo", "batched")
ENV_TIMEOUT = 60.0  # seconds that a worker process has for a step or reset
EPISODE_LIMIT = 20_000  # env steps after which an episode is truncated that does not end by itself
RESERVED = ("num_envs", "device", "seed", "render_mode")  # not for env_kwargs: who makes the env decides

# Games with named presets: module of envs/ -> its batched class. The module has ENV_ID (a pattern), PRESETS,
# preset_options(name), describe_obs(num_agents, env_kwargs) and parallel_env(preset=name).
PRESET_GAMES = {"stag_hunt": "StagHuntVecEnv", "snowdrift": "SnowdriftVecEnv"}


class Simulator(NamedTuple):
    """Batched envs of another library, by ids like "vmas:navigation?n_agents=8". They have no PettingZoo form.

    The module has check(name, env_kwargs) -> (resolved id, env_kwargs), which raises UsageError, and
    make(name, num_envs, device, seed, **env_kwargs) -> VecEnv. It is imported only when such an id is used.
    """

    module: str
    package: str
    requirements: str


SIMULATORS = {
    "vmas": Simulator("envs.vmas_vec", "vmas", "requirements-vmas.txt"),
    "jaxmarl": Simulator("envs.jaxmarl_vec", "jaxmarl", "requirements-jaxmarl.txt"),
}


def resolve_env_id(env_id: str) -> str:
    """The full name of an env: "pursuit" -> "sisl/pursuit_v5". Raises UsageError for an unknown one."""
    if _is_simulated(env_id):
        return _check_simulated(env_id, {})[0]
    return _find_env(env_id)[0]


def _find_env(env_id: str) -> tuple[str, Callable[..., Any]]:
    """The full name of an env and the function that makes a genuine one."""
    name = ALIASES.get(env_id, env_id)
    preset = re.sub(r"[-_]v\d+$", "", name)
    game = _game_of_preset(preset)
    if game is not None:
        return preset, functools.partial(game.parallel_env, preset=preset)
    if _is_simulated(name):
        raise UsageError(f"expected an env with a PettingZoo form, got {name!r}, which has none: use --backend batched")
    if "/" in name:
        return _find_registered(name)
    if "." in name or ":" in name:
        return _find_in_module(name)
    raise _unknown(env_id, "no alias of that name")


def _game_of_preset(name: str) -> ModuleType | None:
    """The module of envs/ that knows a preset."""
    for module_name in PRESET_GAMES:
        game = importlib.import_module(f"envs.{module_name}")
        if name in game.PRESETS:
            return game
    return None


def _preset_names() -> list[str]:
    games = [importlib.import_module(f"envs.{module_name}") for module_name in PRESET_GAMES]
    return [name for game in games for name in game.PRESETS]


def _find_registered(name: str) -> tuple[str, Callable[..., Any]]:
    import pettingzoo

    if not hasattr(pettingzoo, "parallel_registry"):  # before 1.27: modules pettingzoo.<namespace>.<env>_v<N> only
        namespace, _, env_name = name.partition("/")
        try:
            package = importlib.import_module(f"pettingzoo.{namespace}")
        except ImportError as error:
            raise _unknown(name, f"no pettingzoo.{namespace}") from error
        modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
        modules = [m for m in modules if re.search(r"_v\d+$", m) and env_name in (m, m.rpartition("_v")[0])]
        if not modules:
            raise _unknown(name, f"not in pettingzoo.{namespace}")
        return _find_in_module(f"pettingzoo.{namespace}." + max(modules, key=lambda m: int(m.rpartition("_v")[2])))

    from pettingzoo.env_registry.exceptions import PettingZooRegistryError

    try:
        registry_id = pettingzoo.spec("parallel", name).id
    except PettingZooRegistryError as error:
        try:
            pettingzoo.spec("aec", name)
        except PettingZooRegistryError:
            raise _unknown(name, "not in PettingZoo's registry") from error
        raise _not_parallel(name) from error
    return _underscored(registry_id), functools.partial(pettingzoo.make, "parallel", registry_id)


def _find_in_module(name: str) -> tuple[str, Callable[..., Any]]:
    module_name, _, factory_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:  # ValueError: an empty or relative module name
        raise _unknown(name, f"cannot import {module_name!r}: {error}") from error
    factory = getattr(module, factory_name or "parallel_env", None)
    if not callable(factory):
        if not factory_name and hasattr(module, "env"):
            raise _not_parallel(name)
        raise UsageError(
            f"expected a function {factory_name or 'parallel_env'!r} that makes an env in module {module_name}, "
            "found none: give package.module:factory"
        )
    return name, factory


def _underscored(registry_id: str) -> str:
    return re.sub(r"-v(\d+)$", r"_v\1", registry_id)


def _not_parallel(name: str) -> UsageError:
    return UsageError(f"expected an env with a parallel API, got {name!r}, whose agents move in turn: choose another")


def _unknown(env_id: str, reason: str) -> UsageError:
    import pettingzoo

    short = [*ALIASES, *_preset_names()]
    registered = [_underscored(name) for name in getattr(pettingzoo, "parallel_registry", {}) if "/" in name]
    matches = difflib.get_close_matches(env_id, short + registered, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(matches)}? " if matches else ""
    return UsageError(
        f"unknown env id {env_id!r} ({reason}): {hint}expected {', '.join(short)}, an id of PettingZoo's registry, "
        f"package.module:factory, {':NAME, '.join(SIMULATORS)}:NAME"
    )


# ---------------------------------------------------------------- simulators of others
def _is_simulated(env_id: str) -> bool:
    return env_id.partition(":")[0] in SIMULATORS


def _simulator(env_id: str) -> ModuleType:
    """The module behind the prefix of an id; UsageError where its package is not installed."""
    prefix = env_id.partition(":")[0]
    simulator = SIMULATORS[prefix]
    try:
        return importlib.import_module(simulator.module)
    except ModuleNotFoundError as error:
        raise _not_installed(prefix, error) from error


def _not_installed(prefix: str, error: ImportError) -> UsageError:
    simulator = SIMULATORS[prefix]
    return UsageError(
        f"{prefix}: envs expected the package {simulator.package} ({error}): "
        f"pip install -r {simulator.requirements}, from the repository's folder"
    )


def _check_simulated(env_id: str, env_kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What the simulator's module says to an id and its arguments: -> resolved id, arguments"""
    prefix = env_id.partition(":")[0]
    name, in_id = _name_and_arguments(env_id)
    for argument in in_id.keys() & env_kwargs.keys():
        if in_id[argument] != env_kwargs[argument]:
            raise UsageError(
                f"{env_id}: expected {argument} once, got {in_id[argument]!r} in the id and "
                f"{env_kwargs[argument]!r} in --env-kwargs: leave one out"
            )
    arguments = {**in_id, **env_kwargs}
    refuse_reserved(arguments)
    module = _simulator(env_id)
    try:
        return module.check(name, arguments)
    except ModuleNotFoundError as error:
        raise _not_installed(prefix, error) from error


def _name_and_arguments(env_id: str) -> tuple[str, dict[str, Any]]:
    """ "vmas:navigation?n_agents=8" -> "navigation", {"n_agents": 8}; a value that is no JSON is a string"""
    name, _, query = env_id.partition(":")[2].partition("?")
    arguments = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UsageError(f"{env_id}: expected arguments like ?n_agents=8&max_steps=100, got {pair!r}: name=value")
        try:
            arguments[key] = json.loads(value)
        except json.JSONDecodeError:
            arguments[key] = value
    return name, arguments


def refuse_reserved(env_kwargs: dict[str, Any]) -> None:
    """UsageError for arguments that are not the env's own."""
    reserved = [name for name in RESERVED if name in env_kwargs]
    if reserved:
        raise UsageError(
            f"expected arguments of the env, got {', '.join(reserved)}: leave it out, other flags decide about it"
        )


# ---------------------------------------------------------------- making
def make_parallel_env(env_id: str, render_mode: str | None = None, **env_kwargs: Any) -> Any:
    """The genuine PettingZoo ParallelEnv, for evaluation and pictures.

    Raises UsageError for an unknown id, an env without parallel API, and arguments that the env does not take.
    """
    if render_mode != "human":
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame then needs no display
    from pettingzoo.utils.env import ParallelEnv

    name, factory = _find_env(env_id)
    kwargs = env_kwargs if render_mode is None else {**env_kwargs, "render_mode": render_mode}
    try:
        env = factory(**kwargs)
    except Exception as error:  # whatever anyone's env raises about its arguments
        raise UsageError(f"{name} cannot be made: {_why(error)}") from error
    if not isinstance(env, ParallelEnv):
        raise _not_parallel(f"{name} (a {type(env).__name__})")
    return env


def _why(error: Exception) -> str:
    """The error in one line; for an unknown argument, with the names of those that exist."""
    reason = " ".join(str(error).split()) or type(error).__name__
    match = re.search(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", reason)
    if match is None:
        return reason
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    # It went through any number of **kwargs: who called the function that refused it, or someone before, knows it.
    known = [f for frame in reversed(frames) for f in (*frame.f_globals.values(), *frame.f_locals.values())]
    called = [f for f in known if callable(f) and getattr(f, "__name__", None) == match[1]]
    valid = [p for f in called[:1] for p in inspect.signature(f).parameters if p != "self"]
    return f"it has no argument {match[2]!r}" + (f", only {', '.join(valid)}" if valid else "")


def _batched_twin(env_id: str) -> Callable[..., VecEnv] | None:
    """What makes the batched form of an env; None where there is none."""
    from envs import pursuit

    name = resolve_env_id(env_id)
    if re.fullmatch(pursuit.ENV_ID, name):
        return pursuit.PursuitVecEnv
    game = _game_of_preset(name)
    if game is None:
        return None
    make = getattr(game, PRESET_GAMES[game.__name__.rpartition(".")[2]])
    return functools.partial(make, **game.preset_options(name))


def individual_kwargs(env_id: str) -> dict[str, Any] | None:
    """Arguments with which an env (a resolved id) pays every agent for itself; None: it knows no other way."""
    from envs import pursuit

    if re.fullmatch(pursuit.ENV_ID, env_id):
        return pursuit.INDIVIDUAL_KWARGS
    return None


@dataclass(frozen=True)
class CheckedEnv:
    """What `check_env` found out, for `make_vec_env`: no env has to be made again to know it."""

    env_id: str  # resolved
    backend: str  # "pettingzoo" or "batched"
    env_kwargs: dict[str, Any]
    spec: EnvSpec | None  # of the genuine env; None where there is none
    individual_kwargs: dict[str, Any] | None = None  # see individual_kwargs(env_id)

    @property
    def genuine(self) -> bool:
        """There is a genuine PettingZoo form, on which evaluation, videos and reported returns run."""
        return self.spec is not None


def check_env(env_id: str, backend: str = "auto", env_kwargs: dict[str, Any] | None = None) -> CheckedEnv:
    """What `make_vec_env` will make, and on which backend: "auto" is the batched form where there is one.

    Raises UsageError for an unknown env or backend, an env that is not parallel or whose spaces cannot be used, and
    wrong arguments. To find that out it makes one genuine env, and one batched env where that is to be used.
    """
    if backend not in BACKENDS:
        raise UsageError(f"expected a backend of {', '.join(BACKENDS)}, got {backend!r}: choose one of them")
    env_kwargs = {} if env_kwargs is None else env_kwargs
    if not isinstance(env_kwargs, dict):
        raise UsageError(f"expected the env's arguments by name (in JSON an object), got {env_kwargs!r}: name them")
    refuse_reserved(env_kwargs)
    if _is_simulated(env_id):
        if backend == "pettingzoo":
            raise UsageError(f"expected an env with a PettingZoo form, got {env_id!r}: use --backend batched")
        env_id, env_kwargs = _check_simulated(env_id, env_kwargs)
        return CheckedEnv(env_id, "batched", env_kwargs, None)
    return _check_genuine(env_id, backend, env_kwargs)


def _check_genuine(env_id: str, backend: str, env_kwargs: dict[str, Any]) -> CheckedEnv:
    """`check_env` for an env that has a genuine form."""
    from envs.pettingzoo_vec import probe_env

    twin = _batched_twin(env_id)
    if twin is None and backend == "batched":
        raise UsageError(f"expected an env that has a batched form, got {env_id!r}: use --backend pettingzoo")
    spec = probe_env(env_id, env_kwargs)  # also where the twin trains: evaluation runs on the genuine env
    individual = individual_kwargs(spec.env_id)
    if twin is None or backend == "pettingzoo":
        return CheckedEnv(spec.env_id, "pettingzoo", env_kwargs, spec, individual)
    try:
        twin(num_envs=1, device="cpu", seed=0, **env_kwargs)
    except TypeError as error:
        raise UsageError(f"batched {env_id} cannot be made: {_why(error)}; or use --backend pettingzoo") from error
    return CheckedEnv(spec.env_id, "batched", env_kwargs, spec, individual)


def make_vec_env(
    env: str | CheckedEnv,
    num_envs: int,
    device: torch.device | str,
    seed: int,
    backend: str = "auto",
    num_env_procs: int = 0,
    env_timeout: float = ENV_TIMEOUT,
    episode_limit: int = EPISODE_LIMIT,
    **env_kwargs: Any,
) -> VecEnv:
    """N copies of an env, reset with `seed`: its batched twin, or the genuine one through SuperSuit.

    env: an id, which is checked, or what `check_env` returned for it: then backend "auto" is the one found out, and
    env_kwargs come on top of those checked (render_mode, say). num_env_procs: worker processes for genuine envs; 0 or
    1 steps them in this process. env_timeout: seconds that a worker has for a step or reset, 0: as long as it takes.
    episode_limit: env steps after which an episode of a genuine env is truncated, 0: never.

    Raises UsageError, before any env of the N is made, for num_envs < 1, num_env_procs < 0 and what `check_env`
    refuses. Later, genuine envs raise RunError: an env that raises, that returns what its spaces do not allow, or
    whose process hangs or dies.
    """
    if num_envs < 1 or num_env_procs < 0:
        raise UsageError(
            f"expected num_envs >= 1 and num_env_procs >= 0, got {num_envs} and {num_env_procs}: change them"
        )
    if not (env_timeout >= 0 and episode_limit >= 0):
        raise UsageError(
            f"expected env_timeout >= 0 and episode_limit >= 0, got {env_timeout} and {episode_limit}: change them"
        )
    checked = env
    if not isinstance(env, CheckedEnv):
        own_kwargs = {name: value for name, value in env_kwargs.items() if name != "render_mode"}
        checked = check_env(env, backend, own_kwargs)
    backend = checked.backend if backend == "auto" else backend
    env_kwargs = {**checked.env_kwargs, **env_kwargs}
    device = torch.device(device)
    if backend == "batched":
        make = _batched_form(checked)
        envs = make(num_envs=num_envs, device=device, seed=seed, **env_kwargs)
        envs.env_id = checked.env_id
        return envs
    from envs.pettingzoo_vec import PettingZooVecEnv

    if not checked.genuine:
        raise UsageError(f"expected an env with a PettingZoo form, got {checked.env_id!r}: use --backend batched")
    return PettingZooVecEnv(
        checked.spec,
        env_kwargs,
        num_envs,
        device,
        seed,
        num_env_procs,
        env_timeout,
        episode_limit,
    )


def _batched_form(checked: CheckedEnv) -> Callable[..., VecEnv]:
    if checked.genuine:
        return _batched_twin(checked.env_id)
    name, _ = _name_and_arguments(checked.env_id)
    return functools.partial(_simulator(checked.env_id).make, name)


def make_eval_env(
    checked: CheckedEnv,
    num_envs: int,
    device: torch.device | str,
    seed: int,
    num_env_procs: int = 0,
    render: bool = False,
    **options: Any,
) -> VecEnv:
    """What evaluation and videos run on: the genuine env, or the batched one where that is all there is.

    render: `render()` will be called. options: what else `make_vec_env` takes.
    """
    if not checked.genuine:
        return make_vec_env(checked, num_envs, device, seed, "batched", **options)
    if render:
        options["render_mode"] = "rgb_array"
    return make_vec_env(checked, num_envs, device, seed, "pettingzoo", num_env_procs, **options)


def check_picture(checked: CheckedEnv) -> None:
    """UsageError where the env that evaluation runs on gives no picture: found out by making one and looking."""
    env = None
    try:
        env = make_eval_env(checked, 1, "cpu", 0, render=True)
        env.render()
    except (UsageError, RunError, NotImplementedError) as error:
        raise UsageError(f"{checked.env_id} gives no pictures ({error}): leave out --capture-video") from error
    finally:
        if env is not None:
            env.close()


def num_cpus() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_env_procs(num_envs: int) -> int:
    """Worker processes for genuine envs: none on Windows, where each imports torch again, else one per CPU."""
    if sys.platform == "win32":
        return 0
    return min(num_cpus(), num_envs)
