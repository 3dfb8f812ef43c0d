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
_OF_ANY_MODEL = frozenset(_WORDS.split())
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
    trained_on = _find_model(base_model)
    made_from = {name: _find_model(name) for name in package.base_names}
    known = [name for name, model in made_from.items() if model is not None]
    if trained_on is None or not known or trained_on in made_from.values():
        return None
    return (
        f"it says that it was trained on {base_model[-_LONGEST:]!r}, and the package was made from {known[0]!r}; "
        "where shapes agree it runs, and on another base its answers mean nothing"
    )


def _find_model(name: str) -> str | None:
    """Which model a name or path means, by its last component, in small letters; None where that could be any."""
    path = name[-_LONGEST:].replace("\\", "/").rstrip("/ ").lower()
    cached = _HUB_CACHE.search(f"{path}/")
    if cached:
        last = cached[1].rpartition("--")[2]
    else:
        last = path.rpartition("/")[2].partition("@")[0]
    model = _ROUNDED.sub("", last)
    words = re.split(r"[-_. ]", model)
    return None if all(_may_be_any(word) for word in words) else model


def _may_be_any(word: str) -> bool:
    """Whether a word of a model's name says nothing of which model it is."""
    letters = word.rstrip("0123456789")
    return not letters or letters in _OF_ANY_MODEL or _HASH.fullmatch(word) is not None


def base_number(names: Collection[str], graphs: Collection[GraphInfo]) -> int:
    """A number for the base weights that an adapter changes, in whatever precision the package keeps them: bases that
    differ in one of these weights have different numbers, by all likelihood.

    `names`: of the branches, modules, parameters or graph inputs that the adapter has something for.
    """
    lines = set[str]()
    for graph in graphs:
        lines.update(_lines(frozenset(names), graph))
    mark = sha256("".join(sorted(lines)).encode()).digest()
    return _OURS + int.from_bytes(mark[:4], "big") % _OURS


def is_base_number(number: int) -> bool:
    """Whether `base_number` may have given it."""
    return _OURS <= number < 2 * _OURS


def _lines(names: frozenset[str], graph: GraphInfo) -> Iterator[str]:
    """A line for each base weight that one of `names` changes: its module or parameter, and its digest."""
    digests = {point.module: point.sha256 for point in graph.points}
    for branch in graph.branches:
        if names.isdisjoint([branch.name, *branch.names]):
            continue
        for module in branch.modules:
            yield f"{module} {digests[module]}\n"
    # A packed branch takes, too, what was written module by module for another package.
    for module, digest in digests.items():
        if module in names:
            yield f"{module} {digest}\n"
    for weight in graph.replaceable:
        if weight.name in names:
            yield f"{weight.name} {weight.sha256}\n"
