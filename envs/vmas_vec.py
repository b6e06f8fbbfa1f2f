"""VMAS: multi-robot and particle scenarios (Bettini et al., DARS 2022, arXiv 2207.03530) behind the env contract.

An adapter, not a port: the package vmas simulates N envs as one batch of tensors, this file gives it resets of single
envs, random numbers of its own and pictures without a display. docs/simulators.md says how to use it.

    env = make_vec_env("vmas:navigation?n_agents=8", 128, "cpu", seed=1, max_steps=100)

Shapes: N envs, A agents, D action dimensions or n actions, O the longest observation (shorter ones end in zeros).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from enum import Enum
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

with contextlib.redirect_stderr(None):  # gym, which VMAS imports, says that it is unmaintained
    import vmas
    from vmas.simulator.environment import Environment

from envs import EnvStep
from envs.simulator import SimulatorVecEnv, check_arguments, did_you_mean
from runs import UsageError

# tests/test_vmas.py compares each of these with a copy whose envs are never reset.
SCENARIOS = (
    "balance",
    "ball_passage",
    "discovery",
    "dispersion",
    "dropout",
    "flocking",
    "give_way",
    "multi_give_way",
    "navigation",
    "passage",
    "reverse_transport",
    "simple",
    "simple_crypto",
    "simple_spread",
    "simple_tag",
    "simple_world_comm",
    "transport",
    "wheel",
    "wind_flocking",
)
ONE_GOAL = ("simple_adversary", "simple_push", "simple_reference", "simple_speaker_listener")
DEFAULT_MAX_STEPS = 100  # as in BenchMARL's tasks; VMAS itself knows no limit
PICTURE_SIDE = 480  # pixels of the longer side


# ---------------------------------------------------------------- names and arguments
def check(name: str, env_kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The full id of a scenario and its arguments. Raises UsageError for what cannot be used."""
    if name not in SCENARIOS:
        raise UsageError(_why_not(name))
    check_arguments(f"vmas:{name}", env_kwargs, _argument_names(name))
    continuous = env_kwargs.get("continuous_actions", True)
    if not isinstance(continuous, bool):
        raise UsageError(f"vmas:{name}: expected continuous_actions true or false, got {continuous!r}: change it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # VMAS warns of arguments that it does not take
            make(name, num_envs=1, device="cpu", seed=0, **env_kwargs)
    except Exception as error:  # whatever a scenario raises about its arguments
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"vmas:{name} cannot be made with {env_kwargs}: {reason}") from error
    return f"vmas:{name}", env_kwargs


def _why_not(name: str) -> str:
    if name in ONE_GOAL:
        return f"vmas:{name} draws one goal for the whole batch, so single envs cannot begin anew: choose another"
    if name in (*vmas.scenarios, *vmas.debug_scenarios):
        return f"vmas:{name} was not checked for envs of the batch that begin anew singly: choose another"
    hint = did_you_mean(name, SCENARIOS, cutoff=0.5)
    return f"unknown VMAS scenario {name!r}: {hint}expected one of {', '.join(SCENARIOS)}"


def _argument_names(name: str) -> list[str]:
    """The arguments of a scenario, which takes them out of **kwargs one by one, and of every VMAS env."""
    source = inspect.getsource(_scenario_file(name).Scenario.make_world)
    own = re.findall(r"kwargs\.(?:pop|get)\(\s*[\"'](\w+)[\"']", source)
    return [*dict.fromkeys(own), "max_steps", "continuous_actions"]


def _scenario_file(name: str) -> ModuleType:
    files = importlib.import_module("vmas.scenarios")  # the attribute of that name is a list
    return files.load(f"{name}.py")


def make(
    name: str,
    num_envs: int,
    device: torch.device | str,
    seed: int,
    **env_kwargs: Any,
) -> VmasVecEnv:
    """N envs of a scenario that `check` knows, with the arguments it let pass."""
    scenario = _scenario_file(name).Scenario()
    return VmasVecEnv(scenario, f"vmas:{name}", num_envs, device, seed, **env_kwargs)


# ---------------------------------------------------------------- the env
class VmasVecEnv(SimulatorVecEnv):
    """A VMAS scenario as N envs.

    max_steps           env steps until an episode is truncated
    continuous_actions  forces as they are, else each agent chooses among their grid (and words, where it has any)
    scenario_kwargs     the scenario's own

    Actions out of range are executed as the nearest one in range; NaN and infinity raise ValueError. Episodes end for
    all agents of an env at once. Where agents differ, observations and actions are padded with zeros and masked out.
    """

    obs_dtype = state_dtype = torch.float32

    def __init__(
        self,
        scenario: Any,
        env_id: str,
        num_envs: int,
        device: torch.device | str,
        seed: int,
        *,
        max_steps: int = DEFAULT_MAX_STEPS,
        continuous_actions: bool = True,
        **scenario_kwargs: Any,
    ):
        self.env_id, self.num_envs, self.device = env_id, num_envs, torch.device(device)
        self.continuous = continuous_actions
        self.random_state = _random_state(seed, self.device)
        with self._random_numbers():
            self.env = Environment(
                scenario,
                num_envs=num_envs,
                device=self.device,
                max_steps=max_steps,
                continuous_actions=continuous_actions,
                terminated_truncated=True,
                **scenario_kwargs,
            )
        scenario.info = lambda agent: {}  # nobody reads it
        self.agents = [agent.name for agent in self.env.agents]
        self.obs_size = max(space.shape[0] for space in self.env.observation_space)
        self.obs_shape = (self.obs_size,)
        self.state_shape = (self.num_agents * self.obs_size,)
        if self.continuous:
            self._set_forces()
        else:
            self._set_choices([int(space.n) for space in self.env.action_space])
        self.reset(seed)

    def _set_forces(self) -> None:
        """Continuous actions: how many numbers each agent has, and their bounds."""
        spaces = self.env.action_space
        self.action_sizes = [space.shape[0] for space in spaces]
        bounds = np.zeros((2, self.num_agents, max(self.action_sizes)), dtype=np.float32)
        for i, space in enumerate(spaces):
            bounds[:, i, : self.action_sizes[i]] = space.low, space.high
        self.action_space = gym.spaces.Box(bounds[0].min(0), bounds[1].max(0))
        self.lowest, self.highest = torch.from_numpy(bounds).to(self.device)  # [A, D] each

    def reset(self, seed: int | None = None) -> EnvStep:
        """Starts N new episodes; the same seed gives the same ones. None goes on with the random numbers in use."""
        if seed is not None:
            self.random_state = _random_state(seed, self.device)
        with self._random_numbers():
            observations = self.env.reset()
        obs = self._padded(observations)
        self.last = {"obs": obs, "final_obs": obs, **self._begin()}
        return self._env_step()

    def step(self, actions: Tensor) -> EnvStep:
        """Steps all envs. actions: [N, A, D] float32, or [N, A] int64 where they are discrete.

        Raises ValueError for a wrong shape or dtype, NaN and infinity, and a discrete action out of range.
        """
        executed = self._checked(actions)
        with self._random_numbers():
            given = [executed[:, i, :size] for i, size in self._action_parts()]
            observations, rewards, terminated, truncated, _ = self.env.step(given)
            final_obs = obs = self._padded(observations)
            over = terminated | truncated
            if over.any():
                obs = self._restart(over, final_obs)
        rewards = [reward.reshape(self.num_envs) for reward in rewards]  # some scenarios pay [N, 1]
        rewards = torch.stack(rewards, dim=1).float()  # [N, A]
        self.last = {
            "obs": obs,
            "final_obs": final_obs,
            "rewards": rewards,
            "terminated": terminated,
            "truncated": truncated & ~terminated,
            **self._count(rewards, over),
        }
        executed_actions = executed if self.continuous else None
        return self._env_step(executed_actions)

    def _action_parts(self) -> list[tuple[int, int]]:
        """(agent, how many numbers its action has)"""
        sizes = self.action_sizes if self.continuous else [1] * self.num_agents
        return list(enumerate(sizes))

    def _checked(self, actions: Tensor) -> Tensor:
        """Actions as VMAS can take them: [N, A, D] within the bounds, or [N, A, 1] numbers of actions"""
        if not self.continuous:
            return self._choices(actions)[..., None]
        actions = self._typed(actions, torch.float32)
        if not actions.isfinite().all():
            raise ValueError("expected finite actions, got NaN or infinity: look at the policy's outputs")
        return actions.clamp(self.lowest, self.highest)

    def _padded(self, observations: list[Tensor]) -> Tensor:
        """One [N, size] for each agent -> [N, A, O]"""
        obs = torch.zeros(self.num_envs, self.num_agents, self.obs_size, device=self.device)
        for i, observation in enumerate(observations):
            obs[:, i, : observation.shape[1]] = observation
        return obs

    # --- single envs begin anew

    def _restart(self, over: Tensor, final_obs: Tensor) -> Tensor:
        """Begins new episodes where `over` [N]; -> obs [N, A, O] that open the next step.

        VMAS resets the whole batch or one env at a time, which takes a call for each and is wrong where a reset
        recomputes something for all (joints). So the whole batch is reset, and everything that has a row for each env
        is put back where no episode is over.
        """
        before = {path: tensor.clone() for path, tensor in self._tensors().items()}
        observations = self.env.reset()
        for path, (container, key) in _slots(self.env).items():
            new = container[key]
            old = before.get(path)
            if old is None or new is None or new.shape != old.shape or new.shape[:1] != over.shape:
                continue
            rows = over.reshape(-1, *[1] * (new.dim() - 1))
            container[key] = torch.where(rows, new, old)
        obs = self._padded(observations)
        return torch.where(over[:, None, None], obs, final_obs)

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that changes in VMAS, by where it is."""
        slots = _slots(self.env).items()
        held = {path: container[key] for path, (container, key) in slots}
        return {path: value for path, value in held.items() if value is not None}

    # --- random numbers

    @contextlib.contextmanager
    def _random_numbers(self) -> Iterator[None]:
        """VMAS draws this env's numbers inside, and nobody else's are touched.

        It keeps one state for all envs of the process, in a list, and knows none for CUDA.
        """
        shared = Environment.vmas_random_state
        shared_before = list(shared)
        shared[:] = self.random_state["torch"], self.random_state["numpy"], self.random_state["python"]
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            cuda_before = torch.cuda.get_rng_state(self.device)
            torch.cuda.set_rng_state(self.random_state["cuda"], self.device)
        try:
            yield
        finally:
            names = ("torch", "numpy", "python")
            self.random_state.update(zip(names, shared, strict=True))
            shared[:] = shared_before
            if on_cuda:
                self.random_state["cuda"] = torch.cuda.get_rng_state(self.device)
                torch.cuda.set_rng_state(cuda_before, self.device)

    # --- saving

    def state_dict(self) -> dict[str, Any]:
        """Every tensor of the simulation by where it is, what the last step returned, and the random numbers."""
        _, keys, position, has_gauss, cached = self.random_state["numpy"]
        version, python_keys, gauss = self.random_state["python"]
        saved_random = {
            "torch": self.random_state["torch"],
            "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
            "python": [version, list(python_keys), gauss],
        }
        if "cuda" in self.random_state:
            saved_random["cuda"] = self.random_state["cuda"]
        tensors = {path: tensor.clone() for path, tensor in self._tensors().items()}
        return {**self._saved_step(), "tensors": tensors, "random_state": saved_random}

    def load_state_dict(self, state_dict: dict[str, Any]) -> EnvStep:
        """Continues the episodes of another VmasVecEnv of the same scenario, arguments and num_envs, else ValueError.

        Random numbers continue as well, unless the state comes from another type of device.
        """
        self._check_saved(state_dict)
        shape = (self.num_envs, self.num_agents, *self.action_space.shape)
        nothing = torch.zeros(shape, dtype=torch.float32 if self.continuous else torch.int64, device=self.device)
        self.step(nothing)
        saved = {path: tensor.to(self.device, copy=True) for path, tensor in state_dict["tensors"].items()}
        self._put_back(saved)
        random_state = state_dict["random_state"]
        if ("cuda" in random_state) == (self.device.type == "cuda"):
            keys, position, has_gauss, cached = random_state["numpy"]
            keys = keys.cpu().numpy().astype(np.uint32)
            version, python_keys, gauss = random_state["python"]
            self.random_state = {
                "torch": random_state["torch"].cpu(),
                "numpy": ("MT19937", keys, position, has_gauss, cached),
                "python": (version, tuple(python_keys), gauss),
            }
            if "cuda" in random_state:
                self.random_state["cuda"] = random_state["cuda"].cpu()
        return self._restore_step(state_dict)

    def _put_back(self, saved: dict[str, Tensor]) -> None:
        """Some places are made by the first step only: it has been taken."""
        slots = _slots(self.env)
        for path, tensor in saved.items():
            container, key = slots.get(path, ({}, None))
            current = container.get(key) if isinstance(container, dict) else container[key]
            if path not in slots or (current is not None and current.shape != tensor.shape):
                raise ValueError(f"expected a state saved with this env's arguments, got another {path}: use the same")
            container[key] = tensor
        for path in slots.keys() - saved.keys():
            container, key = slots[path]
            container[key] = None

    # --- pictures

    def render(self) -> np.ndarray:
        """Env 0 as uint8 [height, width, 3]: shapes at their places. VMAS itself needs a display or a GPU for it."""
        scenario = self.env.scenario
        width, height = scenario.viewer_size
        pixels = PICTURE_SIDE / max(width, height)
        size = (round(width * pixels), round(height * pixels))
        picture = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(picture)
        centre, half = self._camera()
        scale = size[0] / (2 * half[0])

        def place(points: np.ndarray) -> list[tuple[float, float]]:
            """Metres, y upwards -> pixels, y downwards"""
            xy = (points - centre + half) * scale
            return [(x, size[1] - y) for x, y in xy.tolist()]

        for entity in self.env.world.entities:
            if entity.is_rendering[0]:
                _draw_entity(draw, entity, place, scale)
        return np.asarray(picture)

    def _camera(self) -> tuple[np.ndarray, np.ndarray]:
        """Centre and half the size of what is seen, in metres: as VMAS does, everyone is in the picture."""
        scenario = self.env.scenario
        width, height = scenario.viewer_size
        zoom = scenario.viewer_zoom
        seen = zoom * np.array([max(1.0, width / height), max(1.0, height / width)])
        centre = np.array([float(c) for c in scenario.render_origin])
        agents = self.env.world.agents
        places = np.stack([agent.state.pos[0].cpu().numpy() for agent in agents])
        margin = 2 * max(agent.shape.circumscribed_radius() for agent in agents)
        needed = np.abs(places - centre).max(0) + margin
        return centre, seen * max(zoom, *(needed / seen))


def _draw_entity(
    draw: ImageDraw.ImageDraw,
    entity: Any,
    place: Callable[[np.ndarray], list[tuple[float, float]]],
    scale: float,
) -> None:
    """Spheres as discs with a line in the direction they look, boxes and lines turned by their rotation."""
    colour = entity.color
    if isinstance(colour, Tensor):
        colour = colour[0] if colour.dim() > 1 else colour
    colour = tuple(round(255 * min(1.0, max(0.0, float(c)))) for c in colour[:3])
    position = entity.state.pos[0].cpu().numpy()
    angle = entity.state.rot[0].item()
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    shape = entity.shape
    kind = type(shape).__name__
    if kind == "Sphere":
        ((x, y),) = place(position[None])
        radius = max(2.0, shape.radius * scale)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="black")
        return
    half_length = along * shape.length / 2
    if kind == "Line":
        ends = np.stack([position - half_length, position + half_length])
        draw.line(place(ends), fill=colour, width=3)
        return
    half_width = across * shape.width / 2
    corners = [
        position - half_length - half_width,
        position + half_length - half_width,
        position + half_length + half_width,
        position - half_length + half_width,
    ]
    draw.polygon(place(np.stack(corners)), fill=colour, outline="black")


# ---------------------------------------------------------------- where VMAS keeps its tensors
def _random_state(seed: int, device: torch.device) -> dict[str, Any]:
    """Of all generators that VMAS draws from, without touching the global ones."""
    states = {
        "torch": torch.Generator().manual_seed(seed).get_state(),
        "numpy": np.random.RandomState(seed % 2**32).get_state(),
        "python": random.Random(seed).getstate(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.Generator(device).manual_seed(seed).get_state()
    return states


def _slots(env: Environment) -> dict[str, tuple[dict | list, Any]]:
    """Every place below an env that holds a tensor or nothing: path -> (container, key in it).

    By path and not by object: a step replaces tensors, and the actions do not exist before the first one.
    """
    slots = {}
    for owner, container in _containers(env).items():
        for name, key, value in _entries(container):
            if value is None or isinstance(value, Tensor):
                slots[f"{owner}/{name}"] = (container, key)
    return slots


def _containers(env: Environment) -> dict[str, dict | list]:
    """All objects' attributes, dicts and lists below an env, each once, by the first path to it."""
    found = {}
    seen = set()
    to_visit = [("env", env)]
    while to_visit:
        path, value = to_visit.pop()
        if isinstance(value, (Tensor, Enum, type, ModuleType)) or callable(value) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, tuple):
            to_visit += [(f"{path}/{i}", item) for i, item in enumerate(value)]
            continue
        container = value if isinstance(value, (dict, list)) else getattr(value, "__dict__", None)
        if container is not None:
            found[path] = container
            to_visit += [(f"{path}/{name}", item) for name, _, item in _entries(container)]
    return found


def _entries(container: dict | list) -> list[tuple[str, Any, Any]]:
    """(name in a path, key, value) of each entry; keys that are objects are named by their position."""
    pairs = container.items() if isinstance(container, dict) else enumerate(container)
    return [(key if isinstance(key, str) else f"#{i}", key, value) for i, (key, value) in enumerate(pairs)]
