"""`target_parameters` of PEFT's LoRA: which of a file's pairs are of bare parameters.

The reference is PEFT 0.21: `BaseTuner._inject_parameters` and `ParamWrapper`. Pairs for several parameters of one
module lie in each other's `base_layer`, in the order in which the model's class made the parameters. No file says which
order that is; the shapes do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnx_lora.adapters.adapter import Change
from onnx_lora.adapters.formats.peft.rules import PeftConfig
from onnx_lora.adapters.formats.problem import shown
from onnx_lora.adapters.methods.endings import tails
from onnx_lora.points import Array

__all__ = ["ParameterPairs", "find_parameter_pairs"]

_BELOW = ".base_layer"


@dataclass
class ParameterPairs:
    """The pairs of bare parameters. `changes`: by module, where the parameter is its weight, or else by parameter;
    `taken`: the modules of the file that they took."""

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
        found.problems.append(f"target_parameters must be a list of names, and is {shown(targets)}")
        return found
    by_module: dict[str, list[str]] = {}
    for name in modules:
        by_module.setdefault(_without_layers(name), []).append(name)
    by_owner = _by_owner(targets)
    for module, names in by_module.items():
        parameters = _parameters(by_owner, module, len(names))
        is_target = names == [module] and config.targets.rejects(module) is None
        if not parameters or is_target:
            continue
        found.taken.update(names)
        pairs = _pairs({name: modules[name] for name in names})
        if pairs is None or len(pairs) != len(parameters):
            found.problems.append(_problem(module, parameters, {name: modules[name] for name in names}))
            continue
        for parameter in parameters:
            path = f"{module}.{parameter}"
            change = make_change(pairs, config.ranks.rank_of(path), config.ranks.scale_of(path))
            found.changes[module if parameter == "weight" else path] = change
    return found


def _pairs(layers: Mapping[str, Mapping[str, Array]]) -> tuple[tuple[Array, Array], ...] | None:
    """The pair of each of a module's layers, the outermost first; None where one has another thing than a pair."""
    pairs: list[tuple[Array, Array]] = []
    for name in sorted(layers, key=len):
        tensors = layers[name]
        if set(tensors) != {"lora_A", "lora_B"} or any(values.ndim != 2 for values in tensors.values()):
            return None
        pairs.append((tensors["lora_A"], tensors["lora_B"]))
    return tuple(pairs)


def _problem(module: str, parameters: Sequence[str], layers: Mapping[str, Mapping[str, Array]]) -> str:
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
