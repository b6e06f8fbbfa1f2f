"""What one agent's own spaces are in the numbers of the contract, and whether what an env returns fits them.

PettingZoo lets every agent have spaces of its own kind. Here each becomes an array: an observation of any fixed size,
and an action that is one index, several indices (parts), or several real numbers. D parts or dimensions, n options.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

MASK = "action_mask"  # the key of Dict observations and infos that holds the legal actions
MAX_OPTIONS = 65_536  # of one part of an action: more cannot be learnt as a categorical


class Unfit(ValueError):
    """A value is not what its space says: what was expected, and what was given."""

    def __init__(self, expected: str, given: str):
        super().__init__(f"expected {expected}, got {given}")


# ---------------------------------------------------------------- actions
@dataclass(frozen=True)
class OwnActions:
    """One agent's action space.

    kind     one: an index; parts: an index for each part; real: a number for each dimension
    options  [D] how many each part has, counted from 0; None for real actions
    start    [D] the env's own number of option 0; None for real actions
    """

    space: gym.Space
    kind: Literal["one", "parts", "real"]
    options: np.ndarray | None = None
    start: np.ndarray | None = None

    @property
    def num_parts(self) -> int:
        return int(np.prod(self.space.shape))

    @functools.cached_property
    def part_starts(self) -> np.ndarray:
        """[D] where the options of each part begin in a mask"""
        return np.cumsum(self.options) - self.options

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """[2, D] the lowest and the highest real action"""
        low, high = self.space.low.ravel(), self.space.high.ravel()
        return np.stack([low, high]).astype(np.float32)

    def to_env(self, action: Any) -> Any:
        """An index, or [D]; parts and dimensions that are padding are cut off"""
        if self.kind == "one":
            return action + self.start[0]
        own = action[: self.num_parts]
        if self.kind == "parts":
            own = own + self.start
        elif own.dtype != self.space.dtype:  # a bound may lie between two float32
            low, high = self.space.low.ravel(), self.space.high.ravel()
            own = own.astype(self.space.dtype).clip(low, high)
        return own.reshape(self.space.shape).astype(self.space.dtype, copy=False)

    def from_env(self, action: Any) -> np.ndarray:
        """An action as the env counts it -> [D] (for an index D is 1)"""
        own = np.ravel(action)
        if own.shape != (self.num_parts,):
            raise Unfit(f"{self.num_parts} numbers", f"{action!r}")
        if self.kind == "real":
            return own.astype(np.float32)
        own = own - self.start
        if ((own < 0) | (own >= self.options)).any():
            raise Unfit(f"one of {self.space}", f"{action!r}")
        return own.astype(np.int64)

    def mask(self, given: Any) -> np.ndarray:
        """[n of all parts] bool from an env's mask: an array of 0 and 1, or one such array for each part"""
        parts = given if isinstance(given, (tuple, list)) else (given,)
        mask = np.concatenate([np.ravel(part) for part in parts])
        num_options = int(self.options.sum())
        if mask.shape != (num_options,):
            raise Unfit(f"{num_options} numbers", f"{mask.size}")
        if mask.dtype != bool:
            strange = (mask != 0) & (mask != 1)
            if strange.any():
                raise Unfit("0 or 1", f"{mask[strange][0]}")
            mask = mask.astype(bool)
        if not np.logical_or.reduceat(mask, self.part_starts).all():
            raise Unfit("a legal action", "none" if self.kind == "one" else "a part without any")
        return mask


def own_actions(space: gym.Space) -> OwnActions | None:
    """None for a space that is no action of the contract. A Box of whole numbers is an index for each of them."""
    if isinstance(space, Discrete):
        options, start = [space.n], [space.start]
        kind = "one"
    elif isinstance(space, MultiDiscrete):
        options, start = space.nvec.ravel(), space.start.ravel()
        kind = "parts"
    elif isinstance(space, MultiBinary):
        num_parts = int(np.prod(space.shape))
        options, start = np.full(num_parts, 2), 0
        kind = "parts"
    elif isinstance(space, Box) and space.dtype.kind in "iub":
        low = space.low.ravel().astype(float)
        high = space.high.ravel().astype(float)
        if (high - low >= MAX_OPTIONS).any():
            return None
        options, start = high - low + 1, low
        kind = "parts"
    elif isinstance(space, Box):
        return OwnActions(space, "real")
    else:
        return None
    options = np.array(options, np.int64)
    if options.size == 0 or options.max() > MAX_OPTIONS:
        return None
    start = np.broadcast_to(np.array(start, np.int64), options.shape)
    return OwnActions(space, kind, options, start)


# ---------------------------------------------------------------- observations
@dataclass(frozen=True)
class OwnObs:
    """One agent's observation space, of which a legal-action mask is no part.

    seen   what is left without the mask
    keys   the keys of the Dict that `seen` is made of; None: the observation is no Dict with a mask
    array  the Box that `seen` becomes
    """

    seen: gym.Space
    keys: tuple[str, ...] | None
    array: Box

    @property
    def has_mask(self) -> bool:
        return self.keys is not None

    def to_array(self, obs: Any) -> np.ndarray:
        """A copy: an env may write its next observation into the same memory, and be reset in this very step."""
        if self.keys is not None:
            missing = [key for key in (*self.keys, MASK) if key not in obs]
            if missing:
                raise Unfit(f"the keys {', '.join((*self.keys, MASK))}", f"none of name {missing[0]}")
            seen = {key: obs[key] for key in self.keys}
            obs = seen if len(seen) > 1 else seen[self.keys[0]]
        if self.seen is self.array:
            return fitting_array(self.array, obs)
        check_fits(self.seen, obs)
        return fitting_array(self.array, gym.spaces.flatten(self.seen, obs))


def own_obs(space: gym.Space, actions: OwnActions) -> OwnObs:
    """Raises Unfit for an observation of no fixed size, or with a mask that is not one of the agent's actions."""
    seen, keys = space, None
    if isinstance(space, Dict) and MASK in space.spaces:
        keys = tuple(key for key in space.spaces if key != MASK)
        num_options = None if actions.kind == "real" else int(actions.options.sum())
        if _size(space[MASK]) != num_options:
            raise Unfit(f"{MASK} to hold a number for each of {num_options or 'no'} actions", f"{space[MASK]}")
        if not keys:
            raise Unfit(f"an observation beside {MASK}", "none")
        parts = {key: space[key] for key in keys}
        seen = Dict(parts) if len(parts) > 1 else parts[keys[0]]
    if isinstance(seen, Box) and seen.shape:
        return OwnObs(seen, keys, seen)
    array = gym.spaces.flatten_space(seen)
    if not isinstance(array, Box):
        raise Unfit("observations of a fixed size", f"{seen}: choose another kind of observation")
    return OwnObs(seen, keys, array)


def _size(space: gym.Space) -> int | None:
    """How many numbers a mask's space holds."""
    if isinstance(space, Tuple):
        sizes = [_size(part) for part in space.spaces]
        return None if None in sizes else sum(sizes)
    return None if space.shape is None else int(np.prod(space.shape))


def fitting_array(space: Box, value: Any) -> np.ndarray:
    """`value` copied into the shape and dtype of `space`. Unfit: it has another shape, or would lose its meaning."""
    try:
        array = np.array(value)
    except ValueError as error:  # rows of different lengths
        raise Unfit(f"an array of shape {space.shape}", f"{type(value).__name__} ({error})") from error
    if array.shape != space.shape:
        raise Unfit(f"shape {space.shape}", f"{array.shape}")
    if array.dtype != space.dtype:
        array = _converted(space, array)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Unfit("finite numbers", f"{array[~np.isfinite(array)][0]}")
    return array


def _converted(space: Box, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise Unfit(f"numbers of {space.dtype}", f"{array.dtype}")
    with np.errstate(invalid="ignore", over="ignore"):
        converted = array.astype(space.dtype)
    if space.dtype.kind != "f":
        lost = converted != array  # 0.7 in a space of whole numbers, or -1 in one of bytes
        if lost.any():
            raise Unfit(f"{space.dtype} numbers ({_in_words(space)})", f"{array.dtype} {array[lost][0]}")
    return converted


def _in_words(space: Box) -> str:
    return f"Box {space.low.min()} ... {space.high.max()} of shape {space.shape}"


def check_fits(space: gym.Space, value: Any) -> None:
    """Unfit where `value` is not of `space`; a float32 Box also takes float64, and so on, where nothing is lost."""
    if isinstance(space, Box):
        fitting_array(space, value)
    elif isinstance(space, Dict):
        for key, part in space.spaces.items():
            if key not in value:
                raise Unfit(f"the key {key}", f"{list(value)}")
            check_fits(part, value[key])
    elif isinstance(space, Tuple):
        if len(value) != len(space.spaces):
            raise Unfit(f"{len(space.spaces)} parts", f"{len(value)}")
        for part, part_value in zip(space.spaces, value, strict=True):
            check_fits(part, part_value)
    elif not space.contains(value):
        raise Unfit(f"one of {space}", f"{value!r}")
