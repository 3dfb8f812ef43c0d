"""A PEFT folder as an adapter: `adapter_config.json` and one weight file. Tensors and fields that PEFT would load are
read; those that it would ignore or read otherwise are refused by name. It knows no package."""

from __future__ import annotations

from pathlib import Path

from onnx_lora.adapters.adapter import Adapter, Origin
from onnx_lora.adapters.formats.files.reading import open_reading
from onnx_lora.adapters.formats.files.safetensors_file import read_safetensors
from onnx_lora.adapters.formats.files.torch_pickle import read_torch_pickle
from onnx_lora.adapters.formats.peft.building import build_adapter
from onnx_lora.adapters.formats.peft.config import CONFIG, read_config
from onnx_lora.adapters.formats.peft.initial import without_initial
from onnx_lora.adapters.methods.method import MERGE
from onnx_lora.errors import AdapterFileError

__all__ = ["read_peft"]

_SAFETENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"

_MOST_FILES = 12  # of a folder, in a message


def read_peft(folder: Path, name: str, initial: Path | None = None) -> Adapter:
    """Read a PEFT folder.

    `initial`: the folder of the same adapter before its training, saved with `init_lora_weights=True`. It says what
    PiSSA, OLoRA, CorDA and LoRA-GA took out of the base's weights before training.

    Raises AdapterFileError: a file is missing or damaged, its tensors and its config disagree, or the two adapters do.
    UnsupportedAdapterError: a method, or a tensor of one, that is refused.
    """
    trained = _read_folder(folder, name, with_initial=initial is not None)
    if initial is None:
        return trained
    before = _read_folder(initial, initial.name, with_initial=True)
    return without_initial(trained, before)


def _read_folder(folder: Path, name: str, *, with_initial: bool) -> Adapter:
    present = _list_files(folder)
    if CONFIG not in present:
        found = _explain_missing_config(folder, present)
        raise AdapterFileError(f"must hold {CONFIG} and does not; found {found}", path=folder)
    config = read_config(folder / CONFIG, with_initial=with_initial)
    weights = [folder / name for name in (_SAFETENSORS, _PICKLE) if name in present]
    if not weights:
        found = _explain_missing_weights(present)
        raise AdapterFileError(f"must hold {_SAFETENSORS} (or {_PICKLE}); found {found}", path=folder)
    with open_reading(weights[0]) as file:
        content = read_safetensors(file) if _SAFETENSORS in present else read_torch_pickle(file)
    builder = build_adapter(content.tensors, config)
    if len(weights) > 1:
        builder.notes.insert(0, f"both {_SAFETENSORS} and {_PICKLE} are there; as in PEFT, the first was read")
    builder.refuse(
        weights[0],
        unsupported=f"holds what cannot be applied exactly; {MERGE}",
        damaged=f"its tensors must be what {CONFIG} says, and are not",
    )
    origin = Origin(str(folder), content.sha256, "peft", config.method_name, config.base_model)
    saved_modules = (*config.targets.saved_names, *config.task_heads)
    return builder.adapter(name, origin, saved_modules=saved_modules)


def _list_files(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise AdapterFileError(f"cannot be read: {error}", path=folder) from error


def _explain_missing_config(folder: Path, present: list[str]) -> str:
    """What there is instead of a config, and what to do."""
    found = ", ".join(present[:_MOST_FILES]) or "nothing"
    below = [entry for entry in present if (folder / entry / CONFIG).is_file()]
    if below:
        return f"{found}; {', '.join(below[:5])} has one: give that folder"
    if "onnx_lora.json" in present:
        return f"{found}: it is a package of onnx-lora, not an adapter"
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
