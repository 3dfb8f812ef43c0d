"""Why a package cannot take what an adapter names, and what to do about each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from onnx_lora.package import Package

__all__ = ["PROVE", "explain_doubts", "explain_modules", "explain_parameters"]

# What to do about points that are unproven.
PROVE = (
    "attach the graph as its exporter wrote it, give the checkpoint (--checkpoint), or compare the package with it "
    "(`onnx-lora verify PACKAGE --reference CHECKPOINT`); or take the risk with allow_unproven=True (--allow-unproven)"
)

# What tells a batch norm among whole parameters.
_STATISTICS = ".running_mean"

_OF_BATCH_NORM = (
    "of a batch norm, which exporters multiply into the convolution before it: then no package can replace it; merge "
    "the adapter into the base with PEFT (merge_and_unload) and export that"
)

# Comparing names is slow, and after a few the reader knows.
_SUGGESTED = 3


def explain_doubts(names: Iterable[str], package: Package) -> list[str]:
    """What to say of modules and parameters that are unproven: one entry for each reason."""
    by_reason: dict[str, list[str]] = {}
    for name in names:
        if name in package.unproven:
            by_reason.setdefault(package.unproven[name], []).append(name)
    return [f"{_some(touched)}: unproven, because {reason}" for reason, touched in by_reason.items()]


def _some(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:_SUGGESTED]) + (f" and {len(names) - _SUGGESTED} more" if names[_SUGGESTED:] else "")


def explain_modules(modules: Sequence[str], package: Package) -> list[str]:
    """What to say of modules with a delta and no injection point."""
    graphs = package.manifest.graphs
    untargeted = {module for graph in graphs for module in graph.untargeted}
    unplaced = sum(len(graph.unplaced) for graph in graphs)
    problems = _without_points([module for module in modules if module in untargeted])
    missing = [module for module in modules if module not in untargeted]
    known = sorted(untargeted | set(package.points))
    if message := _one_prefix(missing, known):
        return [*problems, message]
    for index, module in enumerate(missing):
        text = f"{module}: the package has no such module"
        if index < _SUGGESTED:
            close = get_close_matches(module, known, n=3, cutoff=0.5)
            text += f"; the closest are {', '.join(close)}" if close else ""
        if unplaced:
            text += f"; {unplaced} weighted nodes of its graphs could not be placed, see `unplaced` in onnx_lora.json"
        problems.append(text)
    return problems


def explain_parameters(parameters: Sequence[str], package: Package) -> list[str]:
    """What to say of whole weights that the package cannot replace."""
    known = package.modules
    missing = [name for name in parameters if _module(name) not in known]
    problems = [f"{name}: {_irreplaceable(name, package)}" for name in parameters if _module(name) in known]
    norms = {_module(name) for name in parameters if name.endswith(_STATISTICS)}
    problems += [f"{name}: {_OF_BATCH_NORM}" for name in missing if _module(name) in norms]
    missing = [name for name in missing if _module(name) not in norms]
    if message := _one_prefix(sorted({_module(name) for name in missing}), sorted(known)):
        return [*problems, message]
    problems.extend(
        f"{name}: the package cannot replace it, and knows no module of that name; if the graph has it, "
        f"export again with --replaceable {_module(name) or name}"
        for name in missing
    )
    return problems


def _without_points(modules: Sequence[str]) -> list[str]:
    """Modules of the graph that got no point, and what to type."""
    what = "the graph has this module, and the package was made without a point there"
    names = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    if len(names) > _SUGGESTED:
        return [f"{module}: {what}; export again with --targets all" for module in modules]
    typed = "".join(f" --targets {name}" for name in names)
    return [
        f"{module}: {what}; export again with --targets including {module.rpartition('.')[2]} (beside all linear "
        f"modules: --targets all-linear{typed})"
        for module in modules
    ]


def _irreplaceable(parameter: str, package: Package) -> str:
    point = package.points.get(_module(parameter))
    if parameter.endswith(".bias") and point is not None and point.bias == "none":
        return "the module has no bias in this base, and nothing that could take one; train without it"
    if parameter.endswith(".bias") and f"{_module(parameter)}.weight" in package.replaceable:
        return (
            "the graph has no bias there: exporters leave out one that is zero; export the model with another value in "
            "it, or through another exporter (--via optimum)"
        )
    return f"the package cannot replace it; export again with --replaceable {_module(parameter)}"


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _one_prefix(missing: Sequence[str], known: Sequence[str]) -> str | None:
    """What to say if one leading prefix, more or less, makes every missing name a known one."""
    if not missing:
        return None
    first, names = missing[0], set(known)
    for name in known:
        if name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            if all(prefix + module in names for module in missing):
                return _prefix_message(missing, f"lacks the prefix {prefix!r} that it has in this package")
        if first.endswith(f".{name}"):
            prefix = first.removesuffix(name)
            if all(module.startswith(prefix) and module.removeprefix(prefix) in names for module in missing):
                return _prefix_message(missing, f"has a prefix {prefix!r} that it does not have in this package")
    return None


def _prefix_message(missing: Sequence[str], difference: str) -> str:
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return (
        f"{missing[0]}{more}: the name of every missing module {difference}; the adapter was "
        "trained on the model inside another class: export the class it was trained on (attach an ONNX file with "
        "--checkpoint, whose names then count), or rename its tensors"
    )
