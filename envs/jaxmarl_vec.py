"""JaxMARL: SMAX, MPE and Overcooked in JAX (Rutherford et al., 2024, arXiv 2311.10090) behind the env contract.

An adapter, not a port: the package jaxmarl gives one env as pure functions, this file maps them over N envs, compiles
them once and hands their arrays to torch and back. docs/simulators.md says how to use it.

    env = make_vec_env("jaxmarl:SMAX?scenario=3m", 128, "cpu", seed=1)

Shapes: N envs, A agents, n actions, O the longest observation (shorter ones end in zeros).
"""

from __future__ import annotations

import contextlib
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

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes 3/4 of a GPU at once
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jax.numpy as jnp
from jax import Array

from envs import EnvStep
from envs.simulator import SimulatorVecEnv, check_arguments, did_you_mean
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
    check_arguments(f"jaxmarl:{name}", env_kwargs, _argument_names(name))
    _check_choice(name, env_kwargs, "scenario", smax_env.MAP_NAME_TO_SCENARIO)
    _check_choice(name, env_kwargs, "layout", overcooked_layouts)
    try:
        simulation = _simulation(name, _frozen(env_kwargs))
        jax.eval_shape(simulation.reset, _keys(0, 1))
    except Exception as error:  # whatever an env raises about its arguments
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"jaxmarl:{name} cannot be made with {env_kwargs}: {reason}") from error
    return f"jaxmarl:{name}", env_kwargs


def _why_not(name: str) -> str:
    if name in jaxmarl.registered_envs:
        return f"jaxmarl:{name} was not checked with this adapter: choose one of {', '.join(NAMES)}"
    return f"unknown JaxMARL env {name!r}: {did_you_mean(name, NAMES)}expected one of {', '.join(NAMES)}"


def _check_choice(
    name: str,
    env_kwargs: dict[str, Any],
    argument: str,
    known: dict[str, Any],
) -> None:
    value = env_kwargs.get(argument)
    if value is None or value in known:
        return
    hint = did_you_mean(str(value), known)
    raise UsageError(f"jaxmarl:{name}: unknown {argument} {value!r}: {hint}expected one of {', '.join(known)}")


def _argument_names(name: str) -> list[str]:
    """Those that can be written as JSON and do not change what an action or observation is made of."""
    of_mpe = ((_mpe_class_name(name),), "max_steps")
    classes, more = CLASSES.get(name, of_mpe)
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
        spaces = [self.env.action_space(agent) for agent in self.agents]
        self.action_sizes = [int(space.n) for space in spaces]
        self.reset = jax.jit(self._reset_all)
        self.step = jax.jit(self._step_all)

    def _reset_all(self, keys: Array) -> tuple[Any, Arrays]:
        reset = jax.vmap(self._reset_one)
        return jax.tree.map(_strong, reset(keys))

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
            legal = self.env.get_avail_actions(state)
            mask = jnp.stack([legal[agent] for agent in self.agents])  # [A, n]
            world = observations["world_state"].astype(jnp.float32)
            return {"obs": obs, "state": world, "mask": mask.astype(bool)}
        joined = jnp.concatenate(list(obs), axis=-1)  # [*O[:-1], A * O[-1]]
        return {"obs": obs, "state": joined, "mask": None}

    def _step_one(
        self,
        key: Array,
        state: Any,
        actions: Array,
    ) -> tuple[Any, Arrays]:
        given = dict(zip(self.agents, actions, strict=True))
        stepped = self.env.step_env(key, state, given)
        observations, state, rewards, dones, _ = stepped
        paid = jnp.stack([rewards[agent] for agent in self.agents])
        terminated, success = self._decided(state)
        over = dones["__all__"] | terminated
        return state, {
            **self._seen(observations, state),
            "rewards": paid.astype(jnp.float32),
            "terminated": terminated,
            "truncated": over & ~terminated,
            "success": success,
        }

    def _decided(self, state: Any) -> tuple[Array, Array | None]:
        """(ended by the rules, won). JaxMARL's own flag includes the time limit, the only end outside SMAX."""
        if self.name != SMAX:
            return jnp.array(False), None
        alive = state.state.unit_alive
        allies = alive[: len(self.agents)].any()
        enemies = alive[len(self.agents) :].any()
        return ~(allies & enemies), allies & ~enemies

    def _step_all(
        self,
        keys: Array,
        states: Any,
        actions: Array,
    ) -> tuple[Array, Any, Arrays]:
        """Steps all envs and begins new episodes where one ended: -> keys, states, what is seen"""
        split = jax.vmap(functools.partial(jax.random.split, num=3))
        keys, step_keys, reset_keys = split(keys).swapaxes(0, 1)  # [N, 3, 2] -> [N, 2] each
        step_envs = jax.vmap(self._step_one)
        states, step = step_envs(step_keys, states, actions)
        over = step["terminated"] | step["truncated"]
        opens = {name: step[name] for name in ("obs", "state", "mask")}

        def begin_anew() -> tuple[Any, Arrays]:
            new = jax.vmap(self._reset_one)(reset_keys)
            choose = functools.partial(_where_rows, over)
            return jax.tree.map(choose, new, (states, opens))

        def go_on() -> tuple[Any, Arrays]:
            return states, opens

        next_states, next_opens = jax.lax.cond(over.any(), begin_anew, go_on)
        final = {"final_obs": step["obs"], "final_state": step["state"]}
        next_states = jax.tree.map(_strong, next_states)
        return keys, next_states, {**step, **final, **next_opens}


def _strong(array: Array) -> Array:
    """Without JAX's "weak" mark on types, which a reset sets and a step does not: `step` would be compiled twice."""
    return jax.lax.convert_element_type(array, array.dtype)


def _padded(array: Array, length: int) -> Array:
    """With zeros to a longer last axis"""
    missing = length - array.shape[-1]
    widths = [(0, 0)] * array.ndim
    widths[-1] = (0, missing)
    return jnp.pad(array, widths)


def _where_rows(over: Array, new: Array, old: Array) -> Array:
    """[N] chooses between rows of two [N, ...]"""
    other_axes = tuple(range(1, old.ndim))
    rows = jnp.expand_dims(over, other_axes)
    return jnp.where(rows, new, old)


def _jax_env(name: str, env_kwargs: dict[str, Any]) -> Any:
    if name == SMAX:
        scenario = env_kwargs.get("scenario")
        units = None if scenario is None else smax_env.map_name_to_scenario(scenario)
        arguments = {**env_kwargs, "scenario": units}
        return jaxmarl.make("HeuristicEnemySMAX", **arguments)
    if name == OVERCOOKED:
        layout = env_kwargs.get("layout", "cramped_room")
        arguments = {**env_kwargs, "layout": overcooked_layouts[layout]}
        with warnings.catch_warnings():  # that there is a second version
            warnings.simplefilter("ignore", DeprecationWarning)
            return jaxmarl.make(name, **arguments)
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
    key = jax.random.PRNGKey(seed)
    return jax.random.split(key, num_envs)


# ---------------------------------------------------------------- the env
class JaxMarlVecEnv(SimulatorVecEnv):
    """A JaxMARL env as N envs. Discrete actions only.

    Nobody leaves early: in SMAX dead allies stay, with one legal action, and share the team's reward until the battle
    is decided. There an illegal action is executed as stopping, and reported so.
    """

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
        self._set_choices(self.simulation.action_sizes)
        _, seen = jax.eval_shape(self.simulation.reset, _keys(seed, num_envs))
        self.obs_shape = seen["obs"].shape[2:]
        self.state_shape = seen["state"].shape[1:]
        self.obs_dtype = _torch_dtype(seen["obs"])
        self.state_dtype = _torch_dtype(seen["state"])
        self.reset(seed)

    def reset(self, seed: int | None = None) -> EnvStep:
        """Starts N new episodes; the same seed gives the same ones. None goes on with the random numbers in use."""
        if seed is not None:
            keys = _keys(seed, self.num_envs)
            self.keys = jax.device_put(keys, self.jax_device)
        pairs = jax.vmap(jax.random.split)(self.keys)  # [N, 2, 2]
        self.keys = pairs[:, 0]
        self.states, seen = self.simulation.reset(pairs[:, 1])
        last = self._to_torch(seen)
        self.last = {
            **last,
            "final_obs": last["obs"],
            "final_state": last["state"],
            **self._begin(),
        }
        if self.name == SMAX:
            self.last["success"] = self.last["terminated"]  # nobody has won yet
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
        self.last = {**last, **self._count(last["rewards"], over)}
        return self._env_step(executed if self.name == SMAX else None)

    def _checked(self, actions: Tensor) -> Tensor:
        """Actions as they are executed: [N, A]"""
        actions = self._choices(actions)
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
                tensor = torch.from_dlpack(array)
                tensors[name] = tensor.to(self.device)
        return tensors

    # --- saving

    def state_dict(self) -> dict[str, Any]:
        """JAX's arrays by where they are, what the last step returned, and the keys."""
        held = (self.keys, self.states)
        saved = {}
        for path, array in jax.tree_util.tree_leaves_with_path(held):
            saved[jax.tree_util.keystr(path)] = _saved(array)
        return {**self._saved_step(), "arrays": saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> EnvStep:
        """Continues the episodes of another JaxMarlVecEnv of the same env, arguments and num_envs, else ValueError."""
        self._check_saved(state_dict)
        held = (self.keys, self.states)
        arrays, tree = jax.tree_util.tree_flatten_with_path(held)
        saved = state_dict["arrays"]
        restored = []
        for path, array in arrays:
            name = jax.tree_util.keystr(path)
            if name not in saved or saved[name].shape != array.shape:
                raise ValueError(f"expected a state saved with this env's arguments, got another {name}: use the same")
            as_numpy = saved[name].cpu().numpy()
            as_numpy = as_numpy.astype(array.dtype)  # unsigned numbers are saved as int64
            restored.append(jax.device_put(as_numpy, self.jax_device))
        self.keys, self.states = jax.tree_util.tree_unflatten(tree, restored)
        return self._restore_step(state_dict)

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


def _torch_dtype(described: Any) -> torch.dtype:
    return torch.uint8 if described.dtype == jnp.uint8 else torch.float32


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


def _disc(
    x: float,
    y: float,
    radius: float,
) -> tuple[float, float, float, float]:
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
        end = 360 * health - 90
        draw.arc(box, -90, end, fill="black", width=3)
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
        radius = max(2.0, radii[i] * scale)
        box = _disc(x, y, radius)
        colour = np.asarray(env.colour[i]).tolist()[:3]
        draw.ellipse(box, fill=tuple(colour), outline="black")
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
