"""Why a package cannot take what an adapter names, and what to do about each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from onnx_lora.adapters.problems import list_first

if TYPE_CHECKING:
    from onnx_lora.package import Package

__all__ = ["PROVE", "explain_doubts", "explain_modules", "explain_parameters"]

# What to do about points that are unproven.
PROVE = (
    "attach the graph as its exporter wrote it, give the checkpoint (`checkpoint=...`), or compare the package with it "
    "(`verify`); or take the risk with `allow_unproven=True`"
)

# What only a batch norm has among whole parameters.
_STATISTICS = ".running_mean"

_OF_BATCH_NORM = (
    "of a batch norm, which the package cannot replace: export the checkpoint again with `replaceable=` including "
    "{module}; a graph that somebody else exported may hold the norm inside the convolution before it, and then merge "
    "the adapter into the base with PEFT (merge_and_unload) and export that"
)

# Blocks by the names of the code that came with Flux, Stable Diffusion and its third version.
_OF_OWN_CODE = re.compile(r"(?:^|\.)(?:double_blocks|single_blocks|joint_blocks|input_blocks|output_blocks)\.\d+\.")

# Names in one message. Looking for close names is slow, and after a few the reader knows.
_MOST_NAMES = 3


def explain_doubts(names: Iterable[str], package: Package) -> list[str]:
    """What to say of modules and parameters that are unproven: one entry for each reason."""
    by_reason: dict[str, list[str]] = {}
    for name in names:
        if name in package.unproven:
            by_reason.setdefault(package.unproven[name], []).append(name)
    problems: list[str] = []
    for reason, touched in by_reason.items():
        problems.append(f"{list_first(touched, _MOST_NAMES)}: unproven, because {reason}")
    return problems


def explain_modules(modules: Sequence[str], package: Package) -> list[str]:
    """What to say of modules with a delta and no injection point: one entry a module, or one for a common cause."""
    untargeted: set[str] = set()
    for graph in package.manifest.graphs:
        untargeted.update(graph.untargeted)
    problems = _explain_missing_points([module for module in modules if module in untargeted])
    reasons = _reasons_by_module(package) | _reasons_of_left_out(modules, package)
    problems += _explain_unplaced([module for module in modules if module not in untargeted], reasons)
    missing = [module for module in modules if module not in untargeted and module not in reasons]
    known = sorted(untargeted | set(package.points))
    common = _explain_prefix(missing, known) or _explain_node_names(missing, known, package)
    if common is not None:
        return [*problems, common]
    return [*problems, *_explain_missing_modules(missing, known, package)]


def _explain_node_names(missing: Sequence[str], known: Sequence[str], package: Package) -> str | None:
    """What to say if the package's modules are called after the nodes of a file that was attached without a checkpoint,
    and no adapter's can be; None if they are called otherwise."""
    is_attached = package.manifest.source.get("made_by") == "attach"
    shared = set(map(_last_part, missing)) & set(map(_last_part, known))
    if not missing or not known or not is_attached or shared:
        return None
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return (
        f"{missing[0]}{more}: the package has no such module; its own are called {list_first(known, _MOST_NAMES)}, "
        "after the nodes of the graph; attach the file again with the checkpoint that it was exported from "
        "(`checkpoint=...`), whose names then count"
    )


def _explain_missing_points(modules: Sequence[str]) -> list[str]:
    """Modules of the graph that got no point, and what to type."""
    what = "the graph has this module, and the package was made without a point there"
    names = list(dict.fromkeys(_last_part(module) for module in modules))
    if len(names) > _MOST_NAMES:
        return [f'{module}: {what}; export again with `targets="all"`' for module in modules]
    typed = "".join(f', "{name}"' for name in names)
    problems: list[str] = []
    for module in modules:
        problems.append(
            f"{module}: {what}; export again with `targets=` including {_last_part(module)} (beside all linear "
            f'modules: `targets=["all-linear"{typed}]`)'
        )
    return problems


def _explain_missing_modules(modules: Sequence[str], known: Sequence[str], package: Package) -> list[str]:
    """Modules that the package does not name, the first of them with the names that are closest."""
    unplaced = sum(len(graph.unplaced) for graph in package.manifest.graphs)
    problems: list[str] = []
    for index, module in enumerate(modules):
        text = f"{module}: the package has no such module"
        closest = get_close_matches(module, known, n=3, cutoff=0.5) if index < _MOST_NAMES else []
        if closest:
            text += f"; the closest are {', '.join(closest)}"
        if unplaced:
            text += f"; {unplaced} weighted nodes of its graphs could not be placed, see `unplaced` in onnx_lora.json"
        problems.append(text)
    if any(_OF_OWN_CODE.search(module) for module in modules):
        problems.append(
            "the adapter has the names of its model's own code, and the package those of diffusers: load the file with "
            "diffusers (load_lora_weights), save it (save_lora_weights), and give that"
        )
    return problems


def _reasons_by_module(package: Package) -> dict[str, str]:
    """Why nodes that may be a module's got no point, by the module."""
    reasons: dict[str, str] = {}
    for graph in package.manifest.graphs:
        for node in graph.unplaced:
            reasons |= dict.fromkeys(node.modules, node.reason)
    return reasons


def _reasons_of_left_out(modules: Sequence[str], package: Package) -> dict[str, str]:
    """Why modules of a model's parts that its export left out have no point."""
    reasons: dict[str, str] = {}
    for part in package.manifest.source.get("left_out", "").split(", "):
        for module in modules:
            if part and (module == part or module.startswith(f"{part}.")):
                reasons[module] = (
                    f"the package holds the language model alone, for text, and leaves out {part}; train the adapter "
                    "without it (target_modules, exclude_modules)"
                )
    return reasons


def _explain_unplaced(modules: Sequence[str], reasons: Mapping[str, str]) -> list[str]:
    """Modules whose nodes got no point: one entry for each reason."""
    by_reason: dict[str, list[str]] = {}
    for module in modules:
        if module in reasons:
            by_reason.setdefault(reasons[module], []).append(module)
    problems: list[str] = []
    for reason, names in by_reason.items():
        problems.append(f"{list_first(names, _MOST_NAMES)}: the package has no point there: {reason}")
    return problems


def explain_parameters(parameters: Sequence[str], package: Package) -> list[str]:
    """What to say of whole weights that the package cannot replace: one entry a weight, or one for a common cause."""
    batch_norms = {_module_of(name) for name in parameters if name.endswith(_STATISTICS)}
    of_known: list[str] = []
    of_batch_norms: list[str] = []
    missing: list[str] = []
    for name in parameters:
        module = _module_of(name)
        if module in package.modules:
            of_known.append(f"{name}: {_explain_irreplaceable(name, package)}")
        elif module in batch_norms:
            of_batch_norms.append(f"{name}: {_OF_BATCH_NORM.format(module=module)}")
        else:
            missing.append(name)
    problems = [*of_known, *of_batch_norms]
    modules = sorted({_module_of(name) for name in missing})
    difference = _explain_prefix(modules, sorted(package.modules))
    if difference is not None:
        return [*problems, difference]
    for name in missing:
        problems.append(
            f"{name}: the package cannot replace it, and knows no module of that name; if the graph has it, "
            f"export again with `replaceable=` including {_module_of(name) or name}"
        )
    return problems


def _explain_irreplaceable(parameter: str, package: Package) -> str:
    """Why a parameter of a module that the package knows cannot be replaced."""
    module = _module_of(parameter)
    point = package.points.get(module)
    is_bias = parameter.endswith(".bias")
    if is_bias and point is not None and point.bias == "none":
        return "the module has no bias in this base, and nothing that could take one; train without it"
    if is_bias and f"{module}.weight" in package.replaceable:
        return (
            "the graph has no bias there: exporters leave out one that is zero; export the model with another value in "
            'it, or through another exporter (`via="transformers"`)'
        )
    return f"the package cannot replace it; export again with `replaceable=` including {module}"


def _explain_prefix(missing: Sequence[str], known: Sequence[str]) -> str | None:
    """What to say if one leading prefix, more or less, makes every missing name a known one; None if none does."""
    if not missing:
        return None
    prefix = _lacking_prefix(missing, known)
    if prefix is not None:
        difference = f"lacks the prefix {prefix!r} that it has in this package"
    else:
        prefix = _needless_prefix(missing, known)
        if prefix is None:
            return None
        difference = f"has a prefix {prefix!r} that it does not have in this package"
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return (
        f"{missing[0]}{more}: the name of every missing module {difference}; the adapter was "
        "trained on the model inside another class: export the class it was trained on (attach an ONNX file with "
        "`checkpoint=...`, whose names then count), or rename its tensors, and the config's expressions with them"
    )


def _lacking_prefix(missing: Sequence[str], known: Sequence[str]) -> str | None:
    """The prefix that all missing names need to be known ones."""
    first, names = missing[0], set(known)
    for name in known:
        if name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            if all(prefix + module in names for module in missing):
                return prefix
    return None


def _needless_prefix(missing: Sequence[str], known: Sequence[str]) -> str | None:
    """The prefix without which all missing names are known ones."""
    first, names = missing[0], set(known)
    for name in known:
        if first.endswith(f".{name}"):
            prefix = first.removesuffix(name)
            if _all_behind(prefix, missing, names):
                return prefix
    return None


def _all_behind(prefix: str, modules: Sequence[str], known: Collection[str]) -> bool:
    """Whether every module is a known one behind the prefix."""
    return all(module.startswith(prefix) and module.removeprefix(prefix) in known for module in modules)


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _last_part(module: str) -> str:
    return module.rpartition(".")[2]
