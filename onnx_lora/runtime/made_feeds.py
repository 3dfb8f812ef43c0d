"""Inputs made from what a graph says of itself, for measurements: sizes that are usual, and numbers that mean nothing.
It knows names that exporters give to inputs, and runs no graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_lora.errors import FeedError
from onnx_lora.kinds import Embedding
from onnx_lora.package import Package
from onnx_lora.points import Array
from onnx_lora.runtime.generation.settings import MOST, read_object
from onnx_lora.runtime.signature import TYPES

__all__ = ["Sizes", "make_feeds"]

# Where no config says it.
_IMAGE = 224  # pixels of a side
_CHANNELS = 3

# No vocabulary is as small: ids that any embedding has.
_FEWEST_IDS = 2

_SEED = 1


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long free axes are made. `vocabulary`: how many ids there are."""

    tokens: int
    vocabulary: int = _FEWEST_IDS
    image: int = _IMAGE
    channels: int = _CHANNELS

    @staticmethod
    def of(package: Package, tokens: int) -> Sizes:
        """What the package's config says, and its embeddings. Raises PackageError: the config is damaged."""
        config = read_object(package.path / "config.json")
        text = config.get("text_config")
        places = [config, text] if isinstance(text, dict) else [config]
        embeddings = [point.in_features for point in package.points.values() if isinstance(point.kind, Embedding)]
        vocabulary = _find_size(places, ("vocab_size",)) or max(embeddings, default=_FEWEST_IDS)
        image = _find_size(places, ("image_size", "sample_size"))
        channels = _find_size(places, ("num_channels", "in_channels"))
        return Sizes(tokens, vocabulary, image or _IMAGE, channels or _CHANNELS)

    def axis(self, name: str, place: int, input_name: str) -> int:
        """The length of a free axis. `name`: its symbol, in small letters; `place`: which axis it is."""
        is_of_past = "past" in name and "+" not in name
        if is_of_past or (place > 0 and input_name.startswith("past")):
            return 0  # an empty cache
        if place == 0 or "batch" in name:
            return 1
        if "channel" in name:
            return self.channels
        if "height" in name or "width" in name:
            return self.image
        return self.tokens


def make_feeds(inputs: Sequence[Any], sizes: Sizes) -> dict[str, Array]:
    """Values for `inputs`, as a session describes them: ids in the vocabulary's range, masks of ones, an empty cache,
    random floats. The same every time.

    Raises FeedError: one is of a type that numpy has not.
    """
    random = np.random.default_rng(_SEED)
    feeds: dict[str, Array] = {}
    problems: list[str] = []
    for arg in inputs:
        if arg.type not in TYPES:
            problems.append(f"{arg.name} is {arg.type}")
            continue
        dtype = np.dtype(TYPES[arg.type][0])
        shape: list[int] = []
        for place, dim in enumerate(arg.shape or ()):
            shape.append(dim if isinstance(dim, int) else sizes.axis(str(dim or "").lower(), place, arg.name))
        feeds[arg.name] = _make_values(arg.name.lower(), dtype, shape, sizes, random)
    if problems:
        raise FeedError("no inputs can be made for this graph; give your own", problems=problems)
    return feeds


def _make_values(
    name: str, dtype: np.dtype[Any], shape: Sequence[int], sizes: Sizes, random: np.random.Generator
) -> Array:
    if "mask" in name or "timestep" in name:
        return np.ones(shape, dtype)
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    is_id = dtype.kind in "iu" and dtype.itemsize >= 4 and "type" not in name
    if is_id:
        return random.integers(0, sizes.vocabulary, shape).astype(dtype)
    return np.zeros(shape, dtype)


def _find_size(places: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int | None:
    """The first of `keys` that a config has as a size: a number, or the first of a list of numbers."""
    for place in places:
        for key in keys:
            found = place.get(key)
            if isinstance(found, list) and found:
                found = found[0]
            if isinstance(found, int) and not isinstance(found, bool) and 1 <= found <= MOST["vocabulary"]:
                return found
    return None
