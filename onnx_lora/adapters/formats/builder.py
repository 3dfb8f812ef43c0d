"""One adapter, built of the tensors of a foreign file: what they come to, and what is wrong with them. It knows no
format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from onnx_lora.adapters.adapter import Adapter, Change, Delta, MatrixDelta, Origin, Replacement
from onnx_lora.adapters.problems import TensorError, finite_problem, type_problem
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.kinds import Conv
from onnx_lora.points import Array

__all__ = ["AdapterBuilder", "alpha_of", "as_matrix", "two_factors"]


@dataclass
class AdapterBuilder:
    """Collects an adapter's parts, and every problem, so that one error can tell all of them.

    `problems`: what is damaged. `unsupported`: what is known, and refused. Both name the tensor or the module first.
    `notes`: what a reader should know and cannot see in the tensors. `methods`: the names of what was put in.
    `at_base`: modules whose tensors leave them as they are.
    """

    deltas: dict[str, Delta | MatrixDelta] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    replacements: dict[str, Replacement] = field(default_factory=dict)
    methods: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    with_tied_heads: set[str] = field(default_factory=set)
    at_base: set[str] = field(default_factory=set)

    # --- what was found --------------------------------------------------------------------------

    def put_delta(self, module: str, delta: Delta | MatrixDelta) -> None:
        """A pair of factors of a module. `bind` checks its values: it holds all of them."""
        self.deltas[module] = delta
        self.methods.add("LoRA" if delta.magnitude is None else "DoRA")

    def put_change(self, module: str, change: Change, tensors: Mapping[str, Array]) -> None:
        """Another change of a module. `tensors`: those of the file that it was made of, by name.

        Their values are checked here, although `bind` checks the change's own: a method may leave numbers out (the
        vectors of a bank that no module chooses), and those `bind` never sees.
        """
        self.changes[module] = change
        self.methods.add(change.method)
        for name, values in tensors.items():
            self.check_finite(f"{module}.{name}", values)

    def put_replacement(self, parameter: str, replacement: Replacement) -> None:
        """A whole parameter, or what is added to one or multiplied with it."""
        self.replacements[parameter] = replacement

    def absorb(self, other: AdapterBuilder, prefix: str = "") -> None:
        """Take what another builder collected; `prefix` goes before its modules and parameters."""
        self.deltas |= {prefix + module: delta for module, delta in other.deltas.items()}
        self.changes |= {prefix + module: change for module, change in other.changes.items()}
        self.replacements |= {prefix + name: replacement for name, replacement in other.replacements.items()}
        self.with_tied_heads |= {prefix + module for module in other.with_tied_heads}
        self.at_base |= {prefix + module for module in other.at_base}
        self.methods |= other.methods
        self.problems += other.problems
        self.unsupported += other.unsupported
        self.notes += other.notes

    # --- what is wrong ---------------------------------------------------------------------------

    @contextmanager
    def reading(self, where: str) -> Iterator[None]:
        """A TensorError that is raised inside becomes a problem of `where`, a tensor or a module."""
        try:
            yield
        except TensorError as error:
            self.problems.append(f"{where}: {error}")

    def check_finite(self, name: str, values: Array) -> None:
        """Add a problem where the tensor `name` holds NaN or infinity. Whole numbers are always finite."""
        problem = finite_problem(name, values)
        if problem is not None:
            self.problems.append(problem)

    def floats(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors that are floating point; each of the others becomes a problem."""
        floating: dict[str, Array] = {}
        for name, values in tensors.items():
            problem = type_problem(name, values)
            if problem is None:
                floating[name] = values
            else:
                self.problems.append(problem)
        return floating

    def refuse(self, path: Path, *, unsupported: str, damaged: str) -> None:
        """End the reading of the file at `path` where anything is wrong.

        `unsupported` heads the message where something is known and refused, `damaged` where nothing is.

        Raises UnsupportedAdapterError, AdapterFileError: all problems of the file at once.
        """
        if self.unsupported:
            raise UnsupportedAdapterError(unsupported, path=path, problems=[*self.unsupported, *self.problems])
        if self.problems:
            raise AdapterFileError(damaged, path=path, problems=self.problems)

    # --- the adapter -----------------------------------------------------------------------------

    def adapter(
        self,
        name: str,
        origin: Origin,
        *,
        saved_modules: tuple[str, ...] = (),
        task_heads: tuple[str, ...] = (),
        flat_names: bool = False,
    ) -> Adapter:
        """What was collected. Where `origin.method` is empty, it becomes the names of the methods that were put in.

        Raises UnsupportedAdapterError, AdapterFileError: what is wrong, all of it; or there is nothing.
        """
        holds_something = self.deltas or self.changes or self.replacements or self.at_base
        is_wrong = self.problems or self.unsupported
        if not holds_something and not is_wrong:
            self.problems.append("holds no tensor of an adapter")
        self.refuse(
            Path(origin.path),
            unsupported="holds what cannot be applied exactly",
            damaged=f"is no adapter of {origin.format} that can be read",
        )
        method = origin.method or ", ".join(sorted(self.methods)) or "whole weights"
        return Adapter(
            name=name,
            deltas=self.deltas,
            replacements=self.replacements,
            origin=replace(origin, method=method),
            saved_modules=saved_modules,
            task_heads=task_heads,
            notes=tuple(dict.fromkeys(self.notes)),
            changes=self.changes,
            flat_names=flat_names,
            with_tied_heads=frozenset(self.with_tied_heads),
        )


def alpha_of(values: Array) -> float:
    """The number that an alpha tensor holds.

    Raises TensorError: no number, not finite, or zero, which some readers take for 0 and others for no alpha.
    """
    if values.size != 1 or values.dtype.kind not in "fiu":
        raise TensorError(f"alpha must be one number, and is {values.dtype} of shape {values.shape}")
    alpha = float(values.reshape(()))
    if not math.isfinite(alpha) or alpha == 0:
        raise TensorError(f"alpha must be a finite number other than 0, and is {alpha}")
    return alpha


def as_matrix(values: Array) -> Array | None:
    """The tensor as a matrix `[n, m]`: its axes behind the second must have size 1. None: they have not, or there is no
    second."""
    if values.ndim < 2 or math.prod(values.shape[2:]) != 1:
        return None
    return values.reshape(values.shape[:2])


def two_factors(down: Array, up: Array, scale: float) -> Delta | MatrixDelta:
    """A pair of factors: `down` `[r, in]` or `[r, channels, *kernel]`, `up` `[out, r]` with axes of size 1 behind.

    Without a kernel it fits a linear module as well as a convolution, whichever the package has.

    Raises TensorError: other shapes, or two ranks.
    """
    b = as_matrix(up)
    are_factors = b is not None and down.ndim >= 2 and down.size > 0 and b.size > 0
    if b is None or not are_factors or len(down) != b.shape[1]:
        raise TensorError(
            "the factors must be [rank, in] (with a kernel behind) and [out, rank] of one rank, and have shapes "
            f"{down.shape} and {up.shape}"
        )
    a = as_matrix(down)
    if a is None:
        return Delta(down, b, scale, Conv(down.shape[2:]))
    return MatrixDelta(a, b, scale)
