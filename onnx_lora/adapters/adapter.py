"""What an adapter is before and after it was bound to a package. It knows no file and no format."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from onnx_lora.errors import BindError
from onnx_lora.kinds import LINEAR, Kind

if TYPE_CHECKING:
    from onnx_lora.manifest import GraphInfo
    from onnx_lora.points import Array

__all__ = [
    "NO_SCALE",
    "Adapter",
    "BoundAdapter",
    "Change",
    "Coverage",
    "Delta",
    "HasTensors",
    "MatrixDelta",
    "NeedsConfig",
    "OfTable",
    "Origin",
    "PortableAdapter",
    "Replacement",
    "refuse_fold_only",
]

# Why an adapter with a factor for each output can only be folded.
NO_SCALE = "the package takes no scale of its outputs: export again with `dora=True`"


@dataclass(frozen=True)
class Delta:
    """A pair of factors as PyTorch keeps them, of a module of a known kind: `W = W0 + scale · b · a`.

    kind        a                           b
    Linear      `[r, in]`                   `[out, r]`
    Embedding   `[r, rows of the table]`    `[out, r]`
    Conv        `[r, channels, *kernel]`    `[out, r / groups]`

    `magnitude` `[out]` is DoRA's m: the norm that the weights of each output get. None: they keep theirs.
    """

    a: Array
    b: Array
    scale: float
    kind: Kind = LINEAR
    magnitude: Array | None = None

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class MatrixDelta:
    """A pair of factors as matrices `a` `[r, in]` and `b` `[out, r]`, for a module of any kind: the axes of a kernel
    count as inputs, and the groups of a convolution are blocks on a diagonal of b.

    `magnitude`: as in `Delta`. `output_scale` `[out]`: the factor that gives the weights of each output that norm, for
    the base to which the adapter was bound already.
    """

    a: Array
    b: Array
    scale: float = 1.0
    magnitude: Array | None = None
    output_scale: Array | None = None

    @property
    def rank(self) -> int:
        return len(self.a)


class Change(Protocol):
    """A change that cannot be read as a pair of factors: it makes a new weight of the base's. One class a method.

    Weights are float32 (float64 for a base of that), in `InjectionPoint.torch_shape`: `[out, in]`,
    `[rows of the table, features]`, `[out, channels / groups, *kernel]`.

    A change may have the method of another Protocol too: of `HasTensors`, `NeedsConfig` or `OfTable`.
    """

    @property
    def method(self) -> str:
        """The method's name in messages: "IA3"."""

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        """Why a weight of this shape and kind cannot be changed, in a text with the shapes of both; None: it can."""

    def apply_to(self, weight: Array) -> Array:
        """The new weight, which is PEFT's merge but for rounding; `weight` stays as it is."""

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """The change of this weight as a pair of factors no larger than the weight. None: it can only be folded."""

    def output_scale(self) -> Array | None:
        """`[out]` where the change is a factor for each output and nothing else; None otherwise."""


@runtime_checkable
class HasTensors(Protocol):
    """A change that names the tensors it was made of, as its file does. `bind` checks that all of them are finite."""

    def tensors(self) -> Mapping[str, Array]:
        """By the name that messages use: "lora_E". Whole numbers (indices) may be among them."""


@runtime_checkable
class NeedsConfig(Protocol):
    """A change that is complete only with a number from the config of the model that it is for."""

    def with_config(self, config: Mapping[str, Any]) -> Delta | Change:
        """The change, completed by `config`, Hugging Face's `config.json`; itself where that says too little."""


@runtime_checkable
class OfTable(Protocol):
    """A change of a table of embeddings that an output head which is tied to the table gets too."""

    def of_kind(self, kind: Kind) -> Change:
        """The same change as one of a module of this kind: of the table itself, or of the tied head."""


@dataclass(frozen=True)
class Replacement:
    """A whole parameter.

    `in_graph_layout`: the value has the layout of its graph input already, the axis of rows included. `in_place`: PEFT
    writes the value over the base's own parameter, and so over every other parameter that shares its storage; a module
    of `modules_to_save` has storage of its own. `operation`: what is done to the base's own value with this one;
    "multiply" does nothing where the base has no such parameter (a bias).
    """

    value: Array
    in_graph_layout: bool = False
    in_place: bool = False
    operation: Literal["set", "add", "multiply"] = "set"


@dataclass(frozen=True)
class Origin:
    """Where an adapter came from."""

    path: str
    sha256: str  # of the weight file
    format: str  # "peft", "safetensors" or "onnx_adapter", or a foreign format's name
    method: str  # "LoRA", "rsLoRA", ...
    base_model: str


@dataclass(frozen=True)
class Adapter:
    """What was trained, tied to no graph: deltas and other changes by module, whole weights by torch parameter name.

    `base_digests`: the SHA-256 of the base weights to which the adapter was bound already, by module or parameter;
    empty where that is unknown. `base_number`: the number that an `.onnx_adapter` has for these weights, see
    `bases.py`. `made_of`: `Package.mark` of the base's weights from which a module's tensors were computed, by module.

    `saved_modules`: modules whose whole weights the file must hold, because PEFT cannot load it otherwise.
    `task_heads`: heads that the adapter's task names; where the file lacks one, the base's own stays.
    `with_tied_heads`: embeddings whose change the adapter's tool applies to an output head that is tied to the table as
    well. `flat_names`: the names of modules have `_` for `.`, and only a package tells which modules they mean.
    `notes`: what a user should know, and cannot see in the tensors.
    """

    name: str
    deltas: Mapping[str, Delta | MatrixDelta]
    replacements: Mapping[str, Replacement]
    origin: Origin
    base_digests: Mapping[str, str] = field(default_factory=dict)
    saved_modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    changes: Mapping[str, Change] = field(default_factory=dict)
    flat_names: bool = False
    with_tied_heads: frozenset[str] = frozenset()
    made_of: Mapping[str, str] = field(default_factory=dict)
    base_number: int | None = None
    task_heads: tuple[str, ...] = ()


@dataclass(frozen=True)
class PortableAdapter:
    """An adapter as foreign formats can hold one: pairs of factors as PyTorch keeps them, and whole weights."""

    name: str
    deltas: Mapping[str, Delta]
    replacements: Mapping[str, Replacement]
    origin: Origin


@dataclass(frozen=True)
class Coverage:
    """What a bound adapter does to a package, module by module."""

    applied: tuple[str, ...]  # modules
    replaced: tuple[str, ...]  # parameters
    at_base: tuple[str, ...]  # modules with a point that the adapter does not touch
    silent: tuple[str, ...]  # applied, and without effect: every B is zero
    ranks: Mapping[str, int]
    notes: tuple[str, ...] = ()
    fold_only: Mapping[str, str] = field(default_factory=dict)  # modules, and why they cannot run unfolded


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter that was checked against one package, laid out by point and parameter: nothing is left to check.

    `tensors`: `M.lora_A.weight` `[1, in, r]`, `M.lora_B.weight` `[1, r, out]` with the scale in it, `M.dora_scale`
    `[1, 1, out]`, and replaced weights as their inputs take them; all of them C-contiguous and read-only. `changes`: by
    module, those that only folding can apply. `magnitudes`: DoRA's m by module, from which each package computes its
    own scale. `base_digests`: as in `Adapter`, of the weights that the adapter changes. `made_of`: as in `Adapter`.
    `graphs` and `base_names`: the package's; the second are names of the model that the package was made from.
    """

    name: str
    tensors: Mapping[str, Array]
    coverage: Coverage
    origin: Origin
    base_digests: Mapping[str, str]
    graphs: tuple[GraphInfo, ...] = ()
    changes: Mapping[str, Change] = field(default_factory=dict)
    magnitudes: Mapping[str, Array] = field(default_factory=dict)
    made_of: Mapping[str, str] = field(default_factory=dict)
    base_names: tuple[str, ...] = ()

    @property
    def graph_inputs(self) -> dict[str, Array]:
        """The inputs of the package's graphs: `tensors`, with the modules of each packed projection in one input."""
        if not self.graphs:
            return dict(self.tensors)
        inputs: dict[str, Array] = {}
        for graph in self.graphs:
            inputs.update(graph.inputs(self.tensors))
        return inputs


def refuse_fold_only(bound: BoundAdapter, modules: Collection[str]) -> None:
    """Raises BindError: there are `modules` that only folding can change."""
    if modules:
        raise BindError(
            f"adapter {bound.name!r} can be folded into this package, and not run or written apart from it: "
            "use fold or fold_to (`onnx-lora fold`)",
            path=bound.origin.path,
            problems=[f"{module}: {bound.coverage.fold_only[module]}" for module in modules],
        )
