"""JaxMARL: SMAX, MPE and Overcooked in JAX (Rutherford et al., 2024, arXiv 2311.10090) behind the env contract.

An adapter, not a port: the package jaxmarl gives one env as pure functions, this file maps them over N envs, compiles
them once and hands their arrays to torch and back. docs/simulators.md says how to use it.

    env = make_vec_env("jaxmarl:SMAX?scenario=3m", 128, "cpu", seed=1)

Shapes: N envs, A agents, n actions, O the longest observation (shorter ones end in zeros).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes 3/4 of a GPU at once
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jax.numpy as jnp
from jax import Array

from envs import EnvStep, VecEnv
from runs import UsageError


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """JaxMARL prints which of its extras are missing, and replaces sys.stdout by sys.__stdout__, as it is imported."""
    streams = sys.stdout, sys.stderr, sys.__stdout__
    sys.stdout = sys.__stdout__ = io.StringIO()
    try:
        yield
    finally:
        sys.stdout, sys.stderr, sys.__stdout__ = streams


with _quietly():
    import jaxmarl
    from jaxmarl import environments
    from jaxmarl.environments import overcooked_layouts
    from jaxmarl.environments.smax import smax_env

SMAX = "SMAX"  # our team against JaxMARL's scripted one, as its own baselines train it
OVERCOOKED = "overcooked"
MPE = (
    "MPE_simple_v3",
    "MPE_simple_adversary_v3",
    "MPE_simple_crypto_v3",
    "MPE_simple_push_v3",
    "MPE_simple_reference_v3",
    "MPE_simple_speaker_listener_v4",
    "MPE_simple_spread_v3",
    "MPE_simple_tag_v3",
    "MPE_simple_world_comm_v3",
)
CLASSES = {  # whose arguments are an env's, and the one that is given by name
    SMAX: (("HeuristicEnemySMAX", "SMAX"), "scenario"),
    OVERCOOKED: (("Overcooked",), "layout"),
}
NAMES = (SMAX, OVERCOOKED, *MPE)
SIMPLE = (bool, int, float, str)  # arguments that can be written as JSON
STOP = 4  # SMAX: the only action of a dead unit, and what an illegal action is executed as
Arrays = dict[str, Array | None]
PICTURE_SIDE = 480  # pixels of the longer side


# ---------------------------------------------------------------- names and arguments
def check(name: str, env_kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The full id of an env and its arguments. Raises UsageError for what cannot be used. Nothing is compiled."""
    if name not in NAMES:
        raise UsageError(_why_not(name))
    valid = _argument_names(name)
    for argument in env_kwargs:
        if argument not in valid:
            raise UsageError(f"jaxmarl:{name} has no argument {argument!r}, only {', '.join(valid)}")
    _check_choice(name, env_kwargs, "scenario", smax_env.MAP_NAME_TO_SCENARIO)
    _check_choice(name, env_kwargs, "layout", overcooked_layouts)
    max_steps = env_kwargs.get("max_steps", 1)
    if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
        raise UsageError(f"jaxmarl:{name}: expected max_steps >= 1, got {max_steps!r}: change it")
    try:
        jax.eval_shape(_simulation(name, _frozen(env_kwargs)).reset, _keys(0, 1))
    except Exception as error:  # whatever an env raises about its arguments
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"jaxmarl:{name} cannot be made with {env_kwargs}: {reason}") from error
    return f"jaxmarl:{name}", env_kwargs


def _why_not(name: str) -> str:
    if name in jaxmarl.registered_envs:
        return f"jaxmarl:{name} was not checked with this adapter: choose one of {', '.join(NAMES)}"
    matches = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(matches)}? " if matches else ""
    return f"unknown JaxMARL env {name!r}: {hint}expected one of {', '.join(NAMES)}"


def _check_choice(name: str, env_kwargs: dict[str, Any], argument: str, known: dict[str, Any]) -> None:
    value = env_kwargs.get(argument)
    if value is None or value in known:
        return
    matches = difflib.get_close_matches(str(value), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(matches)}? " if matches else ""
    raise UsageError(f"jaxmarl:{name}: unknown {argument} {value!r}: {hint}expected one of {', '.join(known)}")


def _argument_names(name: str) -> list[str]:
    """Those that can be written as JSON and do not change what an action or observation is made of."""
    classes, more = CLASSES.get(name, ((_mpe_class_name(name),), "max_steps"))
    parameters = []
    for class_name in classes:
        env_class = getattr(environments, class_name)
        parameters += inspect.signature(env_class.__init__).parameters.values()
    simple = [p.name for p in parameters if isinstance(p.default, SIMPLE)]
    names = dict.fromkeys([more, *simple])
    return [argument for argument in names if argument != "action_type"]


def _mpe_class_name(name: str) -> str:
    """MPE_simple_spread_v3 -> SimpleSpreadMPE"""
    words = name.split("_")[1:-1]
    return "".join(word.capitalize() for word in words) + "MPE"


def make(
    name: str,
    num_envs: int,
    device: torch.device | str,
    seed: int,
    **env_kwargs: Any,
) -> JaxMarlVecEnv:
    """N envs of a name that `check` knows, with the arguments it let pass."""
    return JaxMarlVecEnv(name, num_envs, device, seed, **env_kwargs)


# ---------------------------------------------------------------- in JAX
class _Simulation:
    """One JaxMARL env as two functions over N envs, each compiled once for every N.

    What they return are dicts of arrays: obs [N, A, *O], state [N, *S], mask [N, A, n] or None, and of a step also
    rewards [N, A], terminated, truncated and success [N], final_obs, final_state.
    """

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        self.name = name
        self.env = _jax_env(name, env_kwargs)
        self.agents = list(self.env.agents)
        sizes = [int(self.env.action_space(agent).n) for agent in self.agents]
        self.action_sizes = sizes
        self.reset = jax.jit(self._reset_all)
        self.step = jax.jit(self._step_all)

    def _reset_all(self, keys: Array) -> tuple[Any, Arrays]:
        return jax.tree.map(_strong, jax.vmap(self._reset_one)(keys))

    def _reset_one(self, key: Array) -> tuple[Any, Arrays]:
        observations, state = self.env.reset(key)
        return state, self._seen(observations, state)

    def _seen(self, observations: dict[str, Array], state: Any) -> Arrays:
        """What the contract calls obs, state and mask, of one env."""
        parts = [observations[agent] for agent in self.agents]
        longest = max(part.shape[-1] for part in parts)
        obs = jnp.stack([_padded(part, longest) for part in parts])  # [A, *O]
        if obs.dtype != jnp.uint8:
            obs = obs.astype(jnp.float32)
        if self.name == SMAX:
            masks = self.env.get_avail_actions(state)
            mask = jnp.stack([masks[agent] for agent in self.agents]).astype(bool)  # [A, n]
            return {"obs": obs, "state": observations["world_state"].astype(jnp.float32), "mask": mask}
        joined = jnp.concatenate(list(obs), axis=-1)  # [*O[:-1], A * O[-1]]
        return {"obs": obs, "state": joined, "mask": None}

    def _step_one(self, key: Array, state: Any, actions: Array) -> tuple[Any, Arrays]:
        given = {agent: actions[i] for i, agent in enumerate(self.agents)}
        observations, state, rewards, dones, _ = self.env.step_env(key, state, given)
        seen = self._seen(observations, state)
        paid = jnp.stack([rewards[agent] for agent in self.agents])
        terminated, success = self._decided(state)
        over = dones["__all__"] | terminated
        flags = {"terminated": terminated, "truncated": over & ~terminated, "success": success}
        return state, {**seen, **flags, "rewards": paid.astype(jnp.float32)}

    def _decided(self, state: Any) -> tuple[Array, Array]:
        """(ended by the rules, won). JaxMARL's own flag includes the time limit, the only end outside SMAX."""
        if self.name != SMAX:
            return jnp.array(False), jnp.array(False)
        alive = state.state.unit_alive
        allies = alive[: len(self.agents)].any()
        enemies = alive[len(self.agents) :].any()
        return ~(allies & enemies), allies & ~enemies

    def _step_all(self, keys: Array, states: Any, actions: Array) -> tuple[Array, Any, Arrays]:
        """Steps all envs and begins new episodes where one ended: -> keys, states, what is seen"""
        three = jax.vmap(lambda key: jax.random.split(key, 3))(keys)  # [N, 3, 2]
        states, step = jax.vmap(self._step_one)(three[:, 1], states, actions)
        over = step["terminated"] | step["truncated"]
        opens = {name: step[name] for name in ("obs", "state", "mask")}

        def begin_anew() -> tuple[Any, Arrays]:
            new = jax.vmap(self._reset_one)(three[:, 2])
            return jax.tree.map(functools.partial(_where_rows, over), new, (states, opens))

        next_states, next_opens = jax.lax.cond(over.any(), begin_anew, lambda: (states, opens))
        final = {"final_obs": step["obs"], "final_state": step["state"]}
        next_states = jax.tree.map(_strong, next_states)
        return three[:, 0], next_states, {**step, **final, **next_opens}


def _strong(array: Array) -> Array:
    """Without JAX's "weak" mark on types, which a reset sets and a step does not: `step` would be compiled twice."""
    return jax.lax.convert_element_type(array, array.dtype)


def _padded(array: Array, length: int) -> Array:
    """With zeros to a longer last axis"""
    missing = length - array.shape[-1]
    return jnp.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, missing)])


def _where_rows(over: Array, new: Array, old: Array) -> Array:
    """[N] chooses between rows of two [N, ...]"""
    rows = jnp.expand_dims(over, tuple(range(1, old.ndim)))
    return jnp.where(rows, new, old)


def _jax_env(name: str, env_kwargs: dict[str, Any]) -> Any:
    if name == SMAX:
        scenario = env_kwargs.get("scenario")
        units = None if scenario is None else smax_env.map_name_to_scenario(scenario)
        return jaxmarl.make("HeuristicEnemySMAX", **{**env_kwargs, "scenario": units})
    if name == OVERCOOKED:
        layout = env_kwargs.get("layout", "cramped_room")
        with warnings.catch_warnings():  # that there is a second version
            warnings.simplefilter("ignore", DeprecationWarning)
            return jaxmarl.make(name, **{**env_kwargs, "layout": overcooked_layouts[layout]})
    return jaxmarl.make(name, **env_kwargs, action_type="Discrete")


@functools.lru_cache(maxsize=8)
def _simulation(name: str, frozen_kwargs: str) -> _Simulation:
    """Training and evaluation of one env share what is compiled."""
    _use_compilation_cache()
    return _Simulation(name, json.loads(frozen_kwargs))


def _frozen(env_kwargs: dict[str, Any]) -> str:
    return json.dumps(env_kwargs, sort_keys=True)


def _use_compilation_cache() -> None:
    """Compiling takes up to a minute for each env and num_envs: later runs find it in the user's cache folder.

    JAX_COMPILATION_CACHE_DIR, where it is set, decides about the folder.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = cache_folder()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def cache_folder() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hyper-marl" / "jax"


def _keys(seed: int, num_envs: int) -> Array:
    """[N, 2] uint32, a key for each env"""
    return jax.random.split(jax.random.PRNGKey(seed), num_envs)


# ---------------------------------------------------------------- the env
class JaxMarlVecEnv(VecEnv):
    """A JaxMARL env as N envs. Discrete actions only.

    Nobody leaves early: in SMAX dead allies stay, with one legal action, and share the team's reward until the battle
    is decided. There an illegal action is executed as stopping, and reported so.
    """

    backend = "batched"

    def __init__(
        self,
        name: str,
        num_envs: int,
        device: torch.device | str,
        seed: int,
        **env_kwargs: Any,
    ):
        self.name, self.env_id = name, f"jaxmarl:{name}"
        self.num_envs, self.device = num_envs, torch.device(device)
        self.jax_device = _jax_device(self.device)
        self.simulation = _simulation(name, _frozen(env_kwargs))
        self.agents = self.simulation.agents
        self.action_sizes = self.simulation.action_sizes
        self.action_space = gym.spaces.Discrete(max(self.action_sizes))
        _, seen = jax.eval_shape(self.simulation.reset, _keys(seed, num_envs))
        self.obs_shape = seen["obs"].shape[2:]
        self.state_shape = seen["state"].shape[1:]
        self.obs_dtype = torch.uint8 if seen["obs"].dtype == jnp.uint8 else torch.float32
        self.state_dtype = torch.uint8 if seen["state"].dtype == jnp.uint8 else torch.float32
        sizes = torch.tensor(self.action_sizes, device=self.device)
        self.last_action = sizes - 1  # [A]
        numbers = torch.arange(self.action_space.n, device=self.device)
        legal = numbers < sizes[:, None]  # [A, n]
        self.fixed_mask = None
        if not legal.all():
            self.fixed_mask = legal.repeat(num_envs, 1, 1)  # [N, A, n]
        shape = (num_envs, self.num_agents)
        self.active = torch.ones(shape, dtype=torch.bool, device=self.device)
        self.reset(seed)

    def reset(self, seed: int | None = None) -> EnvStep:
        """Starts N new episodes; the same seed gives the same ones. None goes on with the random numbers in use."""
        if seed is not None:
            self.keys = jax.device_put(_keys(seed, self.num_envs), self.jax_device)
        pairs = jax.vmap(jax.random.split)(self.keys)  # [N, 2, 2]
        self.keys = pairs[:, 0]
        self.states, seen = self.simulation.reset(pairs[:, 1])
        last = self._to_torch(seen)
        nowhere = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self.returns = torch.zeros(self.num_envs, self.num_agents, device=self.device)
        self.lengths = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self.last = {
            **last,
            "final_obs": last["obs"],
            "final_state": last["state"],
            "rewards": self.returns,
            "terminated": nowhere,
            "truncated": nowhere,
            "success": nowhere,
            "episode_returns": self.returns,
            "episode_lengths": self.lengths,
        }
        return self._env_step()

    def step(self, actions: Tensor) -> EnvStep:
        """Steps all envs. actions: [N, A] int64.

        Raises ValueError for a wrong shape or dtype, or an action out of range.
        """
        executed = self._checked(actions)
        on_host = executed.to("cpu", torch.int32).numpy()
        in_jax = jax.device_put(on_host, self.jax_device)
        stepped = self.simulation.step(self.keys, self.states, in_jax)
        self.keys, self.states, seen = stepped
        last = self._to_torch(seen)
        over = last["terminated"] | last["truncated"]
        last["episode_returns"] = self.returns + last["rewards"]
        last["episode_lengths"] = self.lengths + 1
        self.returns = last["episode_returns"].masked_fill(over[:, None], 0.0)
        self.lengths = last["episode_lengths"].masked_fill(over, 0)
        self.last = last
        return self._env_step(executed if self.name == SMAX else None)

    def _checked(self, actions: Tensor) -> Tensor:
        """Actions as they are executed: [N, A]"""
        shape = (self.num_envs, self.num_agents)
        if actions.shape != shape or actions.dtype != torch.int64:
            raise ValueError(
                f"expected actions {list(shape)} torch.int64, got {list(actions.shape)} {actions.dtype}: "
                "reshape or convert"
            )
        actions = actions.to(self.device)
        wrong = (actions < 0) | (actions > self.last_action)  # [N, A]
        if wrong.any():
            n, a = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"expected an action of {self.agents[a]} in 0 ... {self.action_sizes[a] - 1}, "
                f"got {actions[n, a].item()} in env {n}: use action_mask"
            )
        if self.name != SMAX:
            return actions
        legal = self.last["mask"].gather(2, actions[..., None])  # [N, A, 1]
        return actions.masked_fill(~legal[..., 0], STOP)

    def _to_torch(self, arrays: Arrays) -> dict[str, Tensor]:
        """The same memory where both are on one device. JAX never writes into it again, nor must anyone here."""
        jax.block_until_ready(arrays)
        tensors = {}
        for name, array in arrays.items():
            if array is not None:
                tensors[name] = torch.from_dlpack(array).to(self.device)
        return tensors

    def _env_step(self, executed_actions: Tensor | None = None) -> EnvStep:
        last = self.last
        return EnvStep(
            obs=last["obs"],
            state=last["state"],
            action_mask=last.get("mask", self.fixed_mask),
            active=self.active,
            rewards=last["rewards"],
            terminations=last["terminated"][:, None].repeat(1, self.num_agents),
            truncations=last["truncated"],
            episode_over=last["terminated"] | last["truncated"],
            final_obs=last["final_obs"],
            final_state=last["final_state"],
            episode_returns=last["episode_returns"],
            episode_lengths=last["episode_lengths"],
            executed_actions=executed_actions,
            success=last["success"] if self.name == SMAX else None,
        )

    # --- saving

    def state_dict(self) -> dict[str, Any]:
        """JAX's arrays by where they are, what the last step returned, and the keys."""
        arrays = jax.tree_util.tree_flatten_with_path((self.keys, self.states))[0]
        return {
            "env_id": self.env_id,
            "num_envs": self.num_envs,
            "arrays": {jax.tree_util.keystr(path): _saved(array) for path, array in arrays},
            "last": {name: tensor.clone() for name, tensor in self.last.items()},
            "returns": self.returns,
            "lengths": self.lengths,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> EnvStep:
        """Continues the episodes of another JaxMarlVecEnv of the same env, arguments and num_envs, else ValueError."""
        for name in ("env_id", "num_envs"):
            ours, theirs = getattr(self, name), state_dict[name]
            if ours != theirs:
                raise ValueError(f"expected a state with {name}={ours}, got {theirs}; make the env with that value")
        arrays, tree = jax.tree_util.tree_flatten_with_path((self.keys, self.states))
        saved = state_dict["arrays"]
        restored = []
        for path, array in arrays:
            name = jax.tree_util.keystr(path)
            if name not in saved or saved[name].shape != array.shape:
                raise ValueError(f"expected a state saved with this env's arguments, got another {name}: use the same")
            as_numpy = saved[name].cpu().numpy().astype(array.dtype)
            restored.append(jax.device_put(as_numpy, self.jax_device))
        self.keys, self.states = jax.tree_util.tree_unflatten(tree, restored)
        self.last = {name: tensor.to(self.device) for name, tensor in state_dict["last"].items()}
        self.returns = state_dict["returns"].to(self.device)
        self.lengths = state_dict["lengths"].to(self.device)
        return self._env_step()

    # --- pictures

    def render(self) -> np.ndarray:
        """Env 0 as uint8 [height, width, 3]; needs no display."""
        first = jax.tree.map(lambda array: array[0], self.states)
        state = jax.tree.map(np.asarray, first)
        if self.name == SMAX:
            return _draw_battle(self.simulation.env, state.state)
        if self.name == OVERCOOKED:
            return _draw_kitchen(self.simulation.env, state)
        return _draw_particles(self.simulation.env, state)


def _jax_device(device: torch.device) -> Any:
    """The GPU for a GPU, where JAX has one; else the CPU."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            return jax.devices("cuda")[device.index or 0]
    return jax.devices("cpu")[0]


def _saved(array: Array) -> Tensor:
    """A copy in a type that torch saves and loads: unsigned ones become int64."""
    as_numpy = np.array(array)
    if as_numpy.dtype.kind == "u":
        as_numpy = as_numpy.astype(np.int64)
    return torch.from_numpy(as_numpy)


# ---------------------------------------------------------------- pictures
def _canvas(width: float, height: float) -> tuple[Image.Image, float]:
    """A white picture of a world of that size, and its pixels per unit."""
    scale = PICTURE_SIDE / max(width, height)
    size = (round(width * scale), round(height * scale))
    return Image.new("RGB", size, "white"), scale


def _disc(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    """The box around it"""
    return (x - radius, y - radius, x + radius, y + radius)


def _draw_battle(env: Any, state: Any) -> np.ndarray:
    """SMAX: allies blue, enemies red, with the share of their health as an arc; the dead as grey rings."""
    picture, scale = _canvas(env.map_width, env.map_height)
    draw = ImageDraw.Draw(picture)
    full_health = np.asarray(env.unit_type_health)[state.unit_types]
    radii = np.asarray(env.unit_type_radiuses)[state.unit_types]
    for i, (x, y) in enumerate(state.unit_positions * scale):
        y = picture.height - y
        box = _disc(x, y, 1.5 * radii[i] * scale)
        if not state.unit_alive[i]:
            draw.ellipse(box, outline="lightgray", width=2)
            continue
        colour = "royalblue" if i < env.num_allies else "firebrick"
        draw.ellipse(box, fill=colour)
        health = float(state.unit_health[i] / full_health[i])
        draw.arc(box, -90, 360 * health - 90, fill="black", width=3)
        letter = env.unit_type_shorthands[state.unit_types[i]]
        draw.text((x, y), letter, fill="white", anchor="mm")
    return np.asarray(picture)


def _draw_particles(env: Any, state: Any) -> np.ndarray:
    """MPE: everyone as a disc; the picture grows with how far the farthest is from the centre."""
    radii = np.asarray(env.rad)
    farthest = np.abs(state.p_pos).max(1) + radii
    reach = max(1.0, float(farthest.max()))
    picture, scale = _canvas(2 * reach, 2 * reach)
    draw = ImageDraw.Draw(picture)
    # Landmarks first, so that they do not cover anyone.
    for i in reversed(range(len(state.p_pos))):
        x, y = (state.p_pos[i] + reach) * scale
        y = picture.height - y
        box = _disc(x, y, max(2.0, radii[i] * scale))
        colour = np.asarray(env.colour[i]).tolist()
        draw.ellipse(box, fill=tuple(colour[:3]), outline="black")
    return np.asarray(picture)


def _draw_kitchen(env: Any, state: Any) -> np.ndarray:
    """Overcooked, as JaxMARL draws it."""
    from jaxmarl.viz.overcooked_visualizer import TILE_PIXELS, OvercookedVisualizer

    border = env.agent_view_size - 2
    grid = state.maze_map[border:-border, border:-border]
    picture = OvercookedVisualizer._render_grid(
        grid,
        tile_size=TILE_PIXELS,
        highlight_mask=None,
        agent_dir_idx=state.agent_dir_idx,
        agent_inv=state.agent_inv,
    )
    return np.asarray(picture, dtype=np.uint8)
