"""Heads that an adapter's task names and its file lacks: whether the base's own may stand there.

transformers' `load_adapter` leaves the base's own head there, and so does this. PEFT's `from_pretrained` loads no
such file. A head that was newly initialised at export is random numbers, and nobody's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx_lora.adapters.problems import list_first
from onnx_lora.points import matches

if TYPE_CHECKING:
    from onnx_lora.adapters.adapter import Adapter
    from onnx_lora.package import Package

__all__ = ["OwnHeads", "judge_own_heads"]

_MOST_NAMES = 5  # of modules, in a message


@dataclass(frozen=True)
class OwnHeads:
    """What became of the heads. `digests`: the SHA-256 of the weights of the base's own that stand there, by module or
    parameter: the adapter means no others."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    digests: Mapping[str, str]


def judge_own_heads(adapter: Adapter, package: Package) -> OwnHeads:
    """Which heads of the package the adapter lacks, and whether they were trained; what else of the package was not."""
    brought = {_module_of(name) for name in adapter.replacements}
    untrained = package.manifest.untrained
    random = {_module_of(name) for name in untrained or ()} - brought
    heads: list[str] = []
    for module in sorted(package.modules - brought):
        if matches(module, adapter.task_heads):
            heads.append(module)
    notes: list[str] = []
    others = sorted(random.intersection(package.modules).difference(heads))
    if others:
        notes.append(
            f"{list_first(others, _MOST_NAMES)}: random numbers, which the checkpoint lacked when it was exported, and "
            "the adapter does not bring: what is computed with them means nothing"
        )
    problem = _refuse(heads, random, is_known=untrained is not None)
    if problem is not None:
        return OwnHeads((problem,), tuple(notes), {})
    if heads:
        notes.append(
            f"{list_first(heads, _MOST_NAMES)}: the adapter's task has this head and its file does not; the base's own "
            "stays, as transformers' load_adapter leaves it"
        )
    return OwnHeads((), tuple(notes), _digests(heads, package))


def _refuse(heads: Sequence[str], random: set[str], *, is_known: bool) -> str | None:
    """Why the base's own heads must not stand there, or None."""
    lacking = "the adapter's task has this head, and its file holds no tensor of it"
    if heads and not is_known:
        return (
            f"{list_first(heads, _MOST_NAMES)}: {lacking}; this package does not say whether the base's own was "
            "trained: get the whole file, or make the package again from the checkpoint (export, or attach with "
            "`checkpoint=...`), which writes that down"
        )
    untrained = [head for head in heads if head in random]
    if untrained:
        return (
            f"{list_first(untrained, _MOST_NAMES)}: {lacking}; the base's own was newly initialised at export, random "
            "numbers: get the whole file, or export the checkpoint whose head the adapter was trained with"
        )
    return None


def _digests(heads: Sequence[str], package: Package) -> dict[str, str]:
    """Those that are known, and beyond doubt."""
    found: dict[str, str] = {}
    for name, sha256 in package.digests.items():
        is_of_head = name in heads or _module_of(name) in heads
        if is_of_head and name not in package.unproven:
            found[name] = sha256
    return found


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]
