"""Several adapters in one PEFT folder or in one of its files, and which of them is meant. It opens no file.

PEFT's `save_pretrained` puts the adapter "default" into the folder itself and every other one into a folder of its name
below. Other programs keep the adapters' names in the keys of one file, as `nn.ModuleDict` has them (Jina's)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from onnx_lora.adapters.formats.peft.config import CONFIG
from onnx_lora.adapters.formats.peft.keys import Names
from onnx_lora.adapters.problems import abbreviate, list_first
from onnx_lora.errors import AdapterFileError, SeveralAdaptersError
from onnx_lora.points import Array

__all__ = ["AdapterFolder", "choose_folder", "choose_tensors", "folders_below", "names_of"]

# The name of the adapter that PEFT saves into the folder itself.
_AT_THE_TOP = "default"

# An older state of the one adapter, as transformers' Trainer keeps it: no other adapter.
_OLDER_STATE = re.compile(r"checkpoint-\d+")

_MOST_NAMES = 20  # in a message


@dataclass(frozen=True)
class AdapterFolder:
    """The folder that is read. `beside`: other adapters, in folders below it."""

    path: Path
    beside: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What a user should know who named none of several."""
        if not self.beside:
            return []
        others = list_first(self.beside, _MOST_NAMES)
        return [f"other adapters lie in folders below this one, and were not read: {others}; a name chooses one"]


def folders_below(folder: Path) -> list[str]:
    """The folders in `folder` that hold a config of an adapter. Raises OSError."""
    return sorted(entry.name for entry in folder.iterdir() if (entry / CONFIG).is_file())


def choose_folder(folder: Path, name: str | None, initial: Path | None = None) -> AdapterFolder:
    """The folder of the adapter `name`: `folder` itself, or one below it. `initial`: that of the adapter before its
    training, which is no other adapter.

    Raises AdapterFileError: it is none of several, or which is meant must be said; `folder` cannot be read.
    """
    try:
        below = folders_below(folder)
        has_own = (folder / CONFIG).is_file()
    except OSError as error:
        raise AdapterFileError(f"cannot be read: {error}", path=folder) from error
    if name in below:
        return AdapterFolder(folder / str(name))
    if below and not has_own:
        raise _must_choose(below, name, folder, "in folders below")
    others: list[str] = []
    for entry in below:
        is_initial = initial is not None and (folder / entry).resolve() == initial.resolve()
        if not is_initial and not _OLDER_STATE.fullmatch(entry):
            others.append(entry)
    return AdapterFolder(folder, tuple(others))


def names_of(inside: Collection[str], folder: AdapterFolder) -> tuple[str | None, ...]:
    """What chooses each adapter of a folder with a config. `inside`: the names in the keys of its file."""
    own: tuple[str | None, ...] = tuple(sorted(inside)) if len(inside) > 1 else (None,)
    return (*own, *folder.beside)


def choose_tensors(
    tensors: Mapping[str, Array], names: Names, folder: AdapterFolder, name: str | None
) -> Mapping[str, Array]:
    """The tensors of the adapter `name`: all, or those in whose keys it stands.

    Raises AdapterFileError: it is none of several, or which is meant must be said; tensors of a file of several that
    are nobody's.
    """
    inside = names.adapters(tensors)
    if len(inside) > 1:
        if name not in inside:
            raise _must_choose(inside.union(folder.beside), name, folder.path, "in one file")
        return _tensors_of(str(name), tensors, names, inside, folder.path)
    if folder.beside and name is not None and name not in (_AT_THE_TOP, *inside):
        raise _must_choose([_AT_THE_TOP, *inside, *folder.beside], name, folder.path, "in it and in folders below")
    return tensors


def _tensors_of(
    name: str, tensors: Mapping[str, Array], names: Names, adapters: frozenset[str], path: Path
) -> Mapping[str, Array]:
    """The tensors of one of `adapters`. Raises AdapterFileError: a tensor is of none of them."""
    own: dict[str, Array] = {}
    problems: list[str] = []
    for key, values in tensors.items():
        parsed = names.parse(key, adapters)
        is_applied = parsed.kind in ("module", "shared", "parameter")
        if is_applied and not parsed.adapter:
            problems.append(f"{key}: says of none of the adapters that it is theirs")
        elif not is_applied or parsed.adapter == name:
            own[key] = values
    if problems:
        raise AdapterFileError(
            f"holds several adapters ({', '.join(sorted(adapters))}), and every tensor must be one's; save each of "
            "them in a folder of its own",
            path=path,
            problems=problems,
        )
    return own


def _must_choose(adapters: Collection[str], name: str | None, path: Path, where: str) -> SeveralAdaptersError:
    """The error where one of several must be chosen, and was not."""
    ordered = _closest_first(adapters, name)
    listed = list_first(ordered, _MOST_NAMES)
    what = f"holds {'several adapters' if len(ordered) > 1 else 'an adapter'} {where}"
    found = "and none was chosen" if name is None else f"and none of them is {abbreviate(name)}"
    cure = f'choose one: `name="{ordered[0]}"`'
    return SeveralAdaptersError(f"{what}, {found}: {listed}; {cure}", names=sorted(adapters), path=path)


def _closest_first(adapters: Iterable[str], name: str | None) -> list[str]:
    """The names in the order of the alphabet, or by how close they are to `name`."""
    ordered = sorted(adapters)
    if name is not None:
        matcher = SequenceMatcher(b=name)
        closeness: dict[str, float] = {}
        for adapter in ordered:
            matcher.set_seq1(adapter)
            closeness[adapter] = matcher.ratio()
        ordered.sort(key=lambda adapter: -closeness[adapter])
    return ordered
