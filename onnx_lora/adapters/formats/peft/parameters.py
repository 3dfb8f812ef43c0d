"""`target_parameters` of PEFT's LoRA: which of a file's pairs are of bare parameters.

The reference is PEFT 0.21: `BaseTuner._inject_parameters` and `ParamWrapper`. Pairs for several parameters of one
module lie in each other's `base_layer`, in the order in which the model's class made the parameters, which no file
tells; the shapes do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from onnx_lora.adapters.adapter import Change
from onnx_lora.adapters.formats.files.reading import shown
from onnx_lora.adapters.formats.peft.patterns import tails
from onnx_lora.adapters.formats.peft.rules import PeftConfig
from onnx_lora.adapters.methods.parameters import ParameterLora
from onnx_lora.points import Array

__all__ = ["parameter_changes"]

_BELOW = ".base_layer"


def parameter_changes(
    modules: Mapping[str, Mapping[str, Array]], config: PeftConfig
) -> tuple[dict[str, Change], set[str], list[str]]:
    """Changes by module, where the parameter is its weight, or by parameter; the names in `modules` that they took;
    problems."""
    targets = config.fields.get("target_parameters")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        return {}, set(), [f"target_parameters must be a list of names, and is {shown(targets)}"]
    changes: dict[str, Change] = {}
    taken: set[str] = set()
    problems: list[str] = []
    by_module: dict[str, list[str]] = {}
    for name in modules:
        by_module.setdefault(_without_layers(name), []).append(name)
    by_owner = _by_owner(targets or ())
    for module, names in by_module.items():
        parameters = _parameters(by_owner, module, len(names))
        if not parameters or (names == [module] and config.targets.rejects(module) is None):
            continue
        taken.update(names)
        found = [_pair(modules[name]) for name in sorted(names, key=len)]
        pairs = [pair for pair in found if pair is not None]
        if len(pairs) != len(found) or len(pairs) != len(parameters):
            problems.append(
                f"{module}: must have lora_A and lora_B for each of its parameters {', '.join(parameters)}, and has "
                f"{', '.join(f'{name}.{tensor}' for name in names for tensor in modules[name])}; get the whole file"
            )
            continue
        for parameter in parameters:
            path = f"{module}.{parameter}"
            ranks = config.ranks.rank_of(path), config.ranks.scale_of(path)
            changes[module if parameter == "weight" else path] = ParameterLora(tuple(pairs), *ranks)
    return changes, taken, problems


def _without_layers(name: str) -> str:
    while name.endswith(_BELOW):
        name = name.removesuffix(_BELOW)
    return name


def _by_owner(targets: Sequence[str]) -> dict[str, list[str]]:
    """The parameters that targets name, by the end of their module's name; nothing, where they name none."""
    found: dict[str, list[str]] = {}
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        found.setdefault(owner, []).append(parameter)
    return found


def _parameters(by_owner: Mapping[str, Sequence[str]], module: str, count: int) -> list[str]:
    """The parameters of `module` that targets name. One without a module's name may be another module's: it counts
    where there are more pairs than the others explain."""
    named = [by_owner.get(tail, ()) for tail in tails(module) if tail]
    with_module = list(dict.fromkeys(chain.from_iterable(named)))
    return with_module if len(with_module) == count else list(dict.fromkeys([*with_module, *by_owner.get("", ())]))


def _pair(tensors: Mapping[str, Array]) -> tuple[Array, Array] | None:
    if set(tensors) != {"lora_A", "lora_B"} or any(values.ndim != 2 for values in tensors.values()):
        return None
    return tensors["lora_A"], tensors["lora_B"]
