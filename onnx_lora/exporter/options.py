"""What gets points, as `export` and `attach` are asked for it. It checks the words of a request; what they name in a
graph, it does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from onnx_lora.errors import ModelError

__all__ = ["ALL", "ALL_LINEAR", "HEADS_ONLY", "Options", "Progress"]

# PEFT's word for every linear module but the output layers.
ALL_LINEAR = "all-linear"

# Ours: every module that can have a point, embeddings, convolutions and output layers too.
ALL = "all"

# The value of `replaceable` that means: the heads of classification models, which PEFT always saves.
HEADS_ONLY = "heads"

# Called with what is being done, and how much of it is done: ("points", 12, 210).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What gets points, and what may be replaced whole.

    `default_rank`: 1 where an execution provider cannot run rank 0. `dora`: whether points take DoRA's scale.
    """

    targets: str | tuple[str, ...] = ALL_LINEAR
    replaceable: str | tuple[str, ...] = HEADS_ONLY
    default_rank: int = 0
    dora: bool = False

    @staticmethod
    def of(
        targets: str | Iterable[str], replaceable: str | Iterable[str], default_rank: int, *, dora: bool = False
    ) -> Options:
        """Options out of a caller's arguments, whose names may be any iterable.

        Raises ModelError: `default_rank` is neither 0 nor 1, or a name is no text.
        """
        return Options(
            targets=_names("targets", targets),
            replaceable=_names("replaceable", replaceable),
            default_rank=default_rank,
            dora=bool(dora),
        )

    def __post_init__(self) -> None:
        if self.default_rank not in (0, 1):
            raise ModelError(f"default_rank must be 0 or 1, and is {self.default_rank!r}")


def _names(argument: str, given: str | Iterable[str]) -> str | tuple[str, ...]:
    """Names as a tuple; a single text stays one. `argument` is what a message calls them."""
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
