"""What gets points, as `export` and `attach` are asked for it. It checks the words of a request; what they name in a
graph, it does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from onnx_lora.boundary import public
from onnx_lora.errors import ModelError

__all__ = ["ALL", "ALL_LINEAR", "HEADS_ONLY", "Points", "Progress", "as_names"]

# PEFT's word for every linear module but the output layers.
ALL_LINEAR = "all-linear"

# Ours: every module that can have a point, embeddings, convolutions and output layers too.
ALL = "all"

# The value of `replaceable` that means: the heads of classification models, which PEFT always saves.
HEADS_ONLY = "heads"

# Called with what is being done, and how much of it is done: ("points", 12, 210).
Progress = Callable[[str, int, int], None]


@public
@dataclass(frozen=True)
class Points:
    """Which modules of a model get injection points, and which whole weights an adapter may replace.

    `targets`: as PEFT's `target_modules`: "all-linear" (every linear module but the output layers), a regular
        expression over whole module names, or names and suffixes, those of embeddings and convolutions too; "all"
        gives a point to every module that can have one.
    `replaceable`: as PEFT's `modules_to_save`: names of modules, or suffixes of parameters ("bias"). "heads": the
        heads of classification models, which PEFT always saves.
    `default_rank`: the rank of a point that is not fed: 0, or 1 for execution providers that cannot run rank 0
        (DirectML, CoreML).
    `dora`: whether points take DoRA's scale, at the cost of one product and one input more at each.

    Raises ModelError: `default_rank` is neither 0 nor 1, or a name is no text.
    """

    targets: str | Sequence[str] = ALL_LINEAR
    replaceable: str | Sequence[str] = HEADS_ONLY
    default_rank: int = 0
    dora: bool = False

    def __post_init__(self) -> None:
        if self.default_rank not in (0, 1):
            raise ModelError(f"default_rank must be 0 or 1, and is {self.default_rank!r}")
        object.__setattr__(self, "targets", as_names("targets", self.targets))
        object.__setattr__(self, "replaceable", as_names("replaceable", self.replaceable))
        object.__setattr__(self, "dora", bool(self.dora))


def as_names(argument: str, given: str | Iterable[str]) -> str | tuple[str, ...]:
    """Names as a tuple; a single text stays one. `argument` is what a message calls them.

    Raises ModelError: one of them is no text.
    """
    if isinstance(given, str):
        return given
    try:
        names = tuple(given)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{argument} must be names, and is a {type(given).__name__}: {error}") from error
    for name in names:
        if not isinstance(name, str):
            raise ModelError(f"{argument} must be names, and holds a {type(name).__name__}")
    return names
