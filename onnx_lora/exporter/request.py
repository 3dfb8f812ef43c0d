"""What an export is asked for: which graphs get points, which of their modules, and who hears of the progress. It holds
data, and reads no file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_lora.boundary import public
from onnx_lora.errors import ModelError
from onnx_lora.exporter.sites.targets import ALL_LINEAR, HEADS_ONLY

if TYPE_CHECKING:
    from onnx_lora.exporter.locating.calls import Calls
    from onnx_lora.exporter.weights.checkpoint_weights import CheckpointWeights

__all__ = ["GraphFile", "Points", "Progress", "as_names"]

# Called with what is being done, and how much of it is done: ("points", 12, 210).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class GraphFile:
    """One ONNX file to be given points, and its name in the package.

    `prefix` is put before the names of its modules ("unet."), where several models share a package; `weights` are
    then its own model's. `calls`: what torch does with each module, without the prefix; None where torch was not asked.
    """

    name: str
    file: Path
    prefix: str = ""
    weights: CheckpointWeights | None = None
    calls: Calls | None = None


@public
@dataclass(frozen=True)
class Points:
    """Which modules of a model get injection points, and which whole weights an adapter may replace.

    `targets`: as PEFT's `target_modules`: "all-linear" (every linear module but the output layers), a regular
        expression over whole module names, or names and suffixes, those of embeddings and convolutions too; "all"
        gives a point to every module that can have one.
    `replaceable`: as PEFT's `modules_to_save`: names of modules, or suffixes of parameters ("bias"). "heads": the
        heads of classification models, which PEFT always saves; alone or among others.
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
    """Names as a tuple, and one text as it is. Raises ModelError: one is no text; `argument` is what it is called."""
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
