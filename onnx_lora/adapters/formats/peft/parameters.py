"""`target_parameters` of PEFT's LoRA: which of a file's pairs of factors are of bare parameters.

The reference is PEFT 0.21: `BaseTuner._inject_parameters` and `ParamWrapper`. Pairs for several parameters of one
module lie in each other's `base_layer`, in the order in which the model's class made the parameters. No file says which
order that is; the shapes do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnx_lora.adapters.adapter import Change
from onnx_lora.adapters.formats.peft.rules import PeftConfig
from onnx_lora.adapters.methods.endings import tails
from onnx_lora.adapters.problems import abbreviate
from onnx_lora.points import Array

__all__ = ["ParameterPairs", "find_parameter_pairs"]

_BELOW = ".base_layer"


@dataclass
class ParameterPairs:
    """The changes of bare parameters. `changes`: by module where the parameter is the module's weight, and else by
    parameter. `taken`: the modules of the file whose tensors went into them."""

    changes: dict[str, Change] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def find_parameter_pairs(modules: Mapping[str, Mapping[str, Array]], config: PeftConfig) -> ParameterPairs:
    """Those of a file's modules that are pairs of bare parameters. Raises ExpressionError: too much work."""
    found = ParameterPairs()
    targets = config.fields.get("target_parameters")
    make_change = config.method.of_parameters
    if targets is None or make_change is None:
        return found
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        found.problems.append(f"target_parameters must be a list of names, and is {abbreviate(targets)}")
        return found
    by_owner = _by_owner(targets)
    for module, layers in _layers_by_module(modules).items():
        parameters = _parameters(by_owner, module, len(layers))
        is_plain = list(layers) == [module] and config.targets.rejects(module) is None
        if not parameters or is_plain:
            continue
        found.taken.update(layers)
        pairs = _pairs(layers)
        if pairs is None or len(pairs) != len(parameters):
            found.problems.append(_problem(module, parameters, layers))
            continue
        for parameter in parameters:
            name = f"{module}.{parameter}"
            rank = config.ranks.rank_of(name)
            scale = config.ranks.scale_of(name)
            changed = module if parameter == "weight" else name
            found.changes[changed] = make_change(pairs, rank, scale)
    return found


def _layers_by_module(modules: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Mapping[str, Array]]]:
    """The file's modules by the model's module that they are layers of, which may be themselves."""
    found: dict[str, dict[str, Mapping[str, Array]]] = {}
    for name, tensors in modules.items():
        found.setdefault(_without_layers(name), {})[name] = tensors
    return found


def _pairs(layers: Mapping[str, Mapping[str, Array]]) -> tuple[tuple[Array, Array], ...] | None:
    """The pair of each of a module's layers, the outermost first; None where one has another thing than a pair."""
    pairs: list[tuple[Array, Array]] = []
    for name in sorted(layers, key=len):
        tensors = layers[name]
        if set(tensors) != {"lora_A", "lora_B"}:
            return None
        a, b = tensors["lora_A"], tensors["lora_B"]
        if a.ndim != 2 or b.ndim != 2:
            return None
        pairs.append((a, b))
    return tuple(pairs)


def _problem(module: str, parameters: Sequence[str], layers: Mapping[str, Mapping[str, Array]]) -> str:
    """What a module's layers should hold, and what they hold."""
    found: list[str] = []
    for name, tensors in layers.items():
        found += [f"{name}.{tensor}" for tensor in tensors]
    return (
        f"{module}: must have lora_A and lora_B for each of its parameters {', '.join(parameters)}, and has "
        f"{', '.join(found)}; get the whole file"
    )


def _without_layers(name: str) -> str:
    while name.endswith(_BELOW):
        name = name.removesuffix(_BELOW)
    return name


def _by_owner(targets: Sequence[str]) -> dict[str, list[str]]:
    """The parameters that targets name, by the end of their module's name; "" where they name no module."""
    found: dict[str, list[str]] = {}
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        found.setdefault(owner, []).append(parameter)
    return found


def _parameters(by_owner: Mapping[str, Sequence[str]], module: str, count: int) -> list[str]:
    """The parameters of `module` that targets name. One without a module's name may be another module's: it counts
    where there are more pairs than the others explain."""
    named: dict[str, None] = {}
    for tail in tails(module):
        if tail:
            named.update(dict.fromkeys(by_owner.get(tail, ())))
    if len(named) == count:
        return list(named)
    return list(named | dict.fromkeys(by_owner.get("", ())))
