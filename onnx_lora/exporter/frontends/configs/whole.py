"""Whether a model that was loaded is the checkpoint, and nothing invented: by the library's own account of loading.
It loads nothing."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from onnx_lora.errors import ModelError
from onnx_lora.exporter.frontends.configs.newer import is_newer

__all__ = ["LOADING", "check_whole"]

logger = logging.getLogger(__name__)

# Options of every `from_pretrained`: it gives its account of loading too, and lists wrong shapes there instead of
# raising.
LOADING: Mapping[str, bool] = {"output_loading_info": True, "ignore_mismatched_sizes": True}

# The ends of names of buffers that training fills, and no constructor can.
_TRAINED_STATE = ("running_mean", "running_var")

# A layer inside of what models of all tasks share, which some are saved without.
_POOLER = "pooler"

_NAMED = 5  # names of tensors in a message


def check_whole(
    model: Any, account: Mapping[str, Any], path: str | os.PathLike[str], read: str | os.PathLike[str]
) -> tuple[str, ...]:
    """Check `account`, which `from_pretrained` gave of loading `model`, which the user calls `path`, from `read`.

    Another class than the checkpoint's own may get new heads, which adapters bring: their parameters are given back,
    and logged.

    Raises ModelError: weights are missing, or of another shape; or the file is of a newer transformers, and holds
    weights that the installed one leaves out or ties.
    """
    class_name = type(model).__name__
    own = class_name in (getattr(model.config, "architectures", None) or [class_name])
    new: list[str] = []
    problems: list[str] = []
    for name in _missing(model, account):
        if not own and _is_of_another_task(name, model):
            new.append(name)
        else:
            problems.append(f"{name}: is missing")
    problems += _misshapen(model, account)
    problems += [str(error) for error in account.get("error_msgs", ())]
    unexpected = sorted(account["unexpected_keys"])
    if is_newer(str(getattr(model.config, "transformers_version", None) or "")):
        if own:
            problems += [f"{name}: the installed transformers does not use it" for name in unexpected]
        problems += _wrongly_tied(model, Path(read))
    elif unexpected and own:
        logger.warning("%s: %s does not use %s", path, class_name, _listed(unexpected))
    if problems:
        raise ModelError(f"lacks weights: {class_name} cannot be loaded whole", path=path, problems=problems)
    if new:
        logger.warning(
            "%s: it holds no %s, which are random numbers now; the package is right with adapters that bring them",
            path,
            _listed(new),
        )
    return tuple(new)


def _missing(model: Any, account: Mapping[str, Any]) -> list[str]:
    """The trained tensors of a model that its checkpoint does not hold."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing: list[str] = []
    for name in sorted(account["missing_keys"]):
        if name in parameters or name.endswith(_TRAINED_STATE):
            missing.append(name)
    return missing


def _misshapen(model: Any, account: Mapping[str, Any]) -> list[str]:
    """The tensors that the checkpoint holds in another shape, as problems."""
    names: list[str] = []
    for entry in account["mismatched_keys"]:
        # A name, or a name and two shapes, as versions and libraries differ.
        names.append(entry if isinstance(entry, str) else entry[0])
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return [f"{name}: must have shape {list(shapes[name])}, and has another" for name in sorted(names)]


def _is_of_another_task(name: str, model: Any) -> bool:
    """Whether a parameter lies outside of what models of all tasks share."""
    base = f"{model.base_model_prefix}."
    inside = name.startswith(base) or not hasattr(model, model.base_model_prefix)
    return not inside or name.removeprefix(base).startswith(f"{_POOLER}.")


def _wrongly_tied(model: Any, folder: Path) -> list[str]:
    """Weights that the file holds apart, with other values, and that are one in the model, as problems. The newer
    transformers that wrote the file keeps them apart, whatever the config says."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict().items():
        if tensor.numel():
            names[tensor.data_ptr()].append(name)
    stored: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            stored |= dict.fromkeys(opened.keys(), file)
    problems: list[str] = []
    for shared in names.values():
        apart = [name for name in shared if name in stored]
        for name in apart[1:]:
            if not _are_equal(stored, apart[0], name):
                problems.append(f"{name}: differs from {apart[0]}, and the installed transformers makes them one")
    return problems


def _are_equal(stored: Mapping[str, Path], first: str, second: str) -> bool:
    """Whether files hold the same numbers under two names."""
    tensors = []
    for name in (first, second):
        with safe_open(str(stored[name]), framework="pt") as opened:
            tensors.append(opened.get_tensor(name))
    one, other = tensors
    if one.shape != other.shape:
        return False
    return bool(np.all((one == other).numpy()))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
