"""Which base an adapter was made for: by the name it gives, and by the number that an `.onnx_adapter` has room for. It
knows names and digests, and no tensor."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx_lora.manifest import GraphInfo
    from onnx_lora.package import Package

__all__ = ["base_number", "base_problem", "is_base_number"]

# Words of names that tools and people give to any model, beside numbers and hashes: they say nothing of which it is.
_WORDS = """
base best checkpoint checkpoints ckpt dir epoch export exported final folder hf last latest local merged model onnx
output outputs package pretrained result results run saved snapshot snapshots step tmp weights
"""
_ANYBODYS = frozenset(_WORDS.split())
_HASH = re.compile(r"(?=.*\d)[0-9a-f]{7,64}")

# What is put behind a model's name where its weights are the same, in fewer bits or in another file.
_ROUNDED = re.compile(r"(?:[-_](?:unsloth|bnb|gptq|gguf|mlx|hf|int[48]|[48]bits?|bf16|fp16|fp32)){1,4}$")

_HUB_CACHE = re.compile(r"models--(.{1,200}?)/snapshots/")

# A longer name is compared, and shown, by its end.
_LONGEST = 300  # characters

# Numbers from here on are ours: others write small ones, counted up.
_OURS = 2**30


def base_problem(base_model: str, package: Package) -> str | None:
    """Why an adapter that names `base_model` may be another base's than the package's, or None: the last components of
    both names are known, and differ."""
    own = _model_in(base_model)
    of_package = {name: _model_in(name) for name in package.base_names}
    telling = [name for name, model in of_package.items() if model is not None]
    if own is None or not telling or own in of_package.values():
        return None
    return (
        f"it says that it was trained on {base_model[-_LONGEST:]!r}, and the package was made from {telling[0]!r}; "
        "where shapes agree it runs, and on another base its answers mean nothing"
    )


def _model_in(name: str) -> str | None:
    """Which model a name or path means, by its last component, in small letters; None where that could be any."""
    path = name[-_LONGEST:].replace("\\", "/").rstrip("/ ").lower()
    cached = _HUB_CACHE.search(f"{path}/")
    last = cached[1].rpartition("--")[2] if cached else path.rpartition("/")[2].partition("@")[0]
    last = _ROUNDED.sub("", last)
    words = re.split(r"[-_. ]", last)
    return None if all(_is_anybodys(word) for word in words) else last


def _is_anybodys(word: str) -> bool:
    """Whether a word says nothing of which model it is."""
    plain = word.rstrip("0123456789")
    return not plain or plain in _ANYBODYS or _HASH.fullmatch(word) is not None


def base_number(names: Collection[str], graphs: Collection[GraphInfo]) -> int:
    """A number for the base weights beside the branches, modules, parameters or graph inputs `names`: equal for equal
    bases, in whatever precision, and else another by all likelihood."""
    lines = set[str]()
    for graph in graphs:
        lines.update(_lines(frozenset(names), graph))
    mark = sha256("".join(sorted(lines)).encode()).digest()
    return _OURS + int.from_bytes(mark[:4], "big") % _OURS


def is_base_number(number: int) -> bool:
    """Whether `base_number` may have given it."""
    return _OURS <= number < 2 * _OURS


def _lines(names: frozenset[str], graph: GraphInfo) -> Iterator[str]:
    """A line for each base weight that something of `names` stands beside: its module or parameter, and its digest."""
    points = {point.module: point for point in graph.points}
    for branch in graph.branches:
        if names & {branch.name, *branch.names}:
            yield from (f"{module} {points[module].sha256}\n" for module in branch.modules)
    # A packed branch takes, too, what was written module by module for another package.
    yield from (f"{module} {point.sha256}\n" for module, point in points.items() if module in names)
    yield from (f"{weight.name} {weight.sha256}\n" for weight in graph.replaceable if weight.name in names)
