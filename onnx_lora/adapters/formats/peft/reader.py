"""A PEFT folder as an adapter: `adapter_config.json` and one weight file. Tensors and fields that PEFT would load are
read; those that it would ignore or read otherwise are refused by name. It knows no package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lora.adapters.adapter import Adapter, Origin
from onnx_lora.adapters.formats.files.memory import MEMORY, as_json, as_tensor_file
from onnx_lora.adapters.formats.files.reading import TensorFile, open_reading
from onnx_lora.adapters.formats.files.safetensors_file import read_header, read_safetensors
from onnx_lora.adapters.formats.files.torch_pickle import read_torch_pickle
from onnx_lora.adapters.formats.peft.building import build_adapter
from onnx_lora.adapters.formats.peft.config import CONFIG, parse_config, read_config
from onnx_lora.adapters.formats.peft.initial import without_initial
from onnx_lora.adapters.formats.peft.keys import Names
from onnx_lora.adapters.formats.peft.rules import PeftConfig
from onnx_lora.adapters.formats.peft.several import AdapterFolder, choose_folder, choose_tensors, names_of
from onnx_lora.adapters.methods.registry import METHODS
from onnx_lora.errors import AdapterFileError
from onnx_lora.points import Array
from onnx_lora.whatis import Thing, explain

__all__ = ["list_names", "read_memory", "read_peft"]

_SAFETENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"

_MOST_FILES = 12  # of a folder, in a message


def read_peft(folder: Path, name: str | None = None, initial: Path | None = None) -> Adapter:
    """Read a PEFT folder. `name`: of one of several adapters; of a single one, what it is to be called.

    `initial`: the folder of the same adapter before its training, saved with `init_lora_weights=True`. It says what
    PiSSA, OLoRA, CorDA and LoRA-GA took out of the base's weights before training.

    Raises AdapterFileError: a file is missing or damaged, its tensors and its config disagree, or the two adapters do;
    there are several, and `name` chooses none. UnsupportedAdapterError: a method, or a tensor of one, that is refused.
    """
    chosen = choose_folder(folder, name, initial)
    trained = _read_folder(chosen, name, with_initial=initial is not None)
    return trained if initial is None else without_initial(trained, _read_initial(initial))


def list_names(folder: Path) -> tuple[str | None, ...]:
    """The names of the adapters in a PEFT folder, by which `read_peft` chooses; None is the one that needs no name.

    Raises as `read_peft`.
    """
    chosen = choose_folder(folder, None)
    config = _read_config(chosen.path, with_initial=True)
    files = _WeightFiles.find(chosen.path)
    inside = Names(config.method, METHODS).adapters(files.keys())
    return names_of(inside, chosen)


def read_memory(
    tensors: Mapping[str, Any], config: Mapping[str, Any] | Path, name: str | None, initial: Path | None = None
) -> Adapter:
    """An adapter of PEFT's tensors, by the keys that PEFT writes: numpy arrays, or tensors of torch, which are copied.
    `config`: the fields of PEFT's config, `adapter_config.json`, or the folder that holds it. `initial`: as for
    `read_peft`, which this raises the same errors as."""
    content = as_tensor_file(tensors)
    path = Path(MEMORY)
    with_initial = initial is not None
    if isinstance(config, Path):
        rules = read_config(config / CONFIG if config.is_dir() else config, with_initial=with_initial)
    else:
        rules = parse_config(as_json(config), path, with_initial=with_initial)
    own = choose_tensors(content.tensors, Names(rules.method, METHODS), AdapterFolder(path), name)
    origin = Origin(MEMORY, content.sha256, "peft", rules.method_name, rules.base_model)
    trained = _make_adapter(name or MEMORY, own, rules, origin, path)
    return trained if initial is None else without_initial(trained, _read_initial(initial))


def _read_initial(folder: Path) -> Adapter:
    return _read_folder(choose_folder(folder, None), None, with_initial=True)


def _read_folder(chosen: AdapterFolder, name: str | None, *, with_initial: bool) -> Adapter:
    folder = chosen.path
    config = _read_config(folder, with_initial=with_initial)
    files = _WeightFiles.find(folder)
    content = files.read()
    notes = [*chosen.notes, *files.notes]
    tensors = choose_tensors(content.tensors, Names(config.method, METHODS), chosen, name)
    origin = Origin(str(folder), content.sha256, "peft", config.method_name, config.base_model)
    return _make_adapter(name or folder.resolve().name, tensors, config, origin, files.weights, notes)


def _read_config(folder: Path, *, with_initial: bool) -> PeftConfig:
    """The config of a folder, which is looked at before its weights: a method that is refused says more than a missing
    file. Raises AdapterFileError: there is none, or it is damaged. UnsupportedAdapterError: a method that is refused.
    """
    present = _list_files(folder)
    if CONFIG not in present:
        other = explain(folder, Thing.ADAPTER)
        if other is not None:
            raise AdapterFileError(f"must be an adapter, and {other}", path=folder)
        found = _explain_missing_config(present)
        raise AdapterFileError(f"must hold {CONFIG} and does not; found {found}", path=folder)
    return read_config(folder / CONFIG, with_initial=with_initial)


@dataclass(frozen=True)
class _WeightFiles:
    """The files of weights in a PEFT folder. `weights`: the one that is read; `notes`: what a user should know of the
    others."""

    weights: Path
    notes: tuple[str, ...] = ()

    @classmethod
    def find(cls, folder: Path) -> _WeightFiles:
        """Raises AdapterFileError: there are none, or the folder cannot be read."""
        present = _list_files(folder)
        if _SAFETENSORS in present and _PICKLE in present:
            note = f"both {_SAFETENSORS} and {_PICKLE} are there; as in PEFT, the first was read"
            return cls(folder / _SAFETENSORS, (note,))
        for name in (_SAFETENSORS, _PICKLE):
            if name in present:
                return cls(folder / name)
        found = _explain_missing_weights(present)
        raise AdapterFileError(f"must hold {_SAFETENSORS} (or {_PICKLE}); found {found}", path=folder)

    def read(self) -> TensorFile:
        with open_reading(self.weights) as file:
            return read_safetensors(file) if self.weights.name == _SAFETENSORS else read_torch_pickle(file)

    def keys(self) -> Iterable[str]:
        """The names of the tensors, whose numbers are left alone where they can be."""
        if self.weights.name != _SAFETENSORS:
            return self.read().tensors
        with open_reading(self.weights) as file:
            return read_header(file).names


def _make_adapter(
    name: str, tensors: Mapping[str, Array], config: PeftConfig, origin: Origin, path: Path, notes: Sequence[str] = ()
) -> Adapter:
    """The adapter of these tensors. `path`: of what errors are about.

    Raises AdapterFileError: the tensors and the config disagree. UnsupportedAdapterError: a tensor that is refused.
    """
    builder = build_adapter(tensors, config)
    builder.notes[:0] = notes
    builder.refuse(
        path,
        unsupported="holds what cannot be applied exactly",
        damaged=f"its tensors must be what {CONFIG} says, and are not",
    )
    # PEFT loads no file without the modules that the config names; a head that only the task names may be the base's.
    saved_modules = config.targets.saved_names
    task_heads = tuple(head for head in config.task_heads if head not in saved_modules)
    return builder.adapter(name, origin, saved_modules=saved_modules, task_heads=task_heads)


def _list_files(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise AdapterFileError(f"cannot be read: {error}", path=folder) from error


def _explain_missing_config(present: list[str]) -> str:
    """What there is instead of a config, and what to do."""
    found = ", ".join(present[:_MOST_FILES]) or "nothing"
    if _SAFETENSORS in present or _PICKLE in present:
        return f"{found}; without the config the scale is unknown: get it from where the adapter was trained"
    return f"{found}; give the folder that PEFT's save_pretrained wrote"


def _explain_missing_weights(present: list[str]) -> str:
    """What there is instead of weights, and what to do."""
    found = ", ".join(present[:_MOST_FILES])
    likely = [name for name in present if name.endswith((".safetensors", ".bin"))]
    if len(likely) == 1:
        return f"{found}; if {likely[0]!r} holds the adapter, rename it to {_SAFETENSORS}"
    return f"{found}; get the whole folder"
