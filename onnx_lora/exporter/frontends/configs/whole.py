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

# For every `from_pretrained`: it gives its account too, and puts wrong shapes there instead of raising.
LOADING: Mapping[str, bool] = {"output_loading_info": True, "ignore_mismatched_sizes": True}

# Of the state that is no parameter, what training makes and no constructor can.
_TRAINED_STATE = ("running_mean", "running_var")

# A layer that models of other tasks are saved without, inside of what they share.
_POOLER = "pooler"

_NAMED = 5  # names of tensors in a message


def check_whole(
    model: Any, account: Mapping[str, Any], path: str | os.PathLike[str], read: str | os.PathLike[str]
) -> None:
    """Check `account`, which `from_pretrained` gave of loading `model`, which the user calls `path`, from `read`.

    Another class than the checkpoint's own may get new heads, which adapters bring: that is logged.

    Raises ModelError: weights are missing, or of another shape; or the file is of a newer transformers, and holds
    weights that the installed one leaves out or ties.
    """
    own = type(model).__name__ in (getattr(model.config, "architectures", None) or [type(model).__name__])
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = [name for name in sorted(account["missing_keys"]) if name in trained or name.endswith(_TRAINED_STATE)]
    new = [name for name in missing if not own and _is_of_another_task(name, model)]
    problems = [f"{name}: is missing" for name in missing if name not in new]
    # Names, or tuples of a name and two shapes, as versions and libraries differ.
    misshapen = sorted(entry if isinstance(entry, str) else entry[0] for entry in account["mismatched_keys"])
    problems += [f"{name}: must have shape {list(shapes[name])}, and has another" for name in misshapen]
    problems += [str(error) for error in account.get("error_msgs", ())]
    unexpected = sorted(account["unexpected_keys"])
    if is_newer(str(getattr(model.config, "transformers_version", None) or "")):
        problems += [f"{name}: the installed transformers does not use it" for name in unexpected if own]
        problems += _wrongly_tied(model, Path(read))
    elif unexpected and own:
        logger.warning("%s: %s does not use %s", path, type(model).__name__, _listed(unexpected))
    if problems:
        raise ModelError(f"lacks weights: {type(model).__name__} cannot be loaded whole", path=path, problems=problems)
    if new:
        logger.warning(
            "%s: it holds no %s, which are random numbers now; the package is right with adapters that bring them",
            path,
            _listed(new),
        )


def _is_of_another_task(name: str, model: Any) -> bool:
    """Whether a parameter lies outside of what models of all tasks share."""
    base = f"{model.base_model_prefix}."
    inside = name.startswith(base) or not hasattr(model, model.base_model_prefix)
    return not inside or name.removeprefix(base).startswith(f"{_POOLER}.")


def _wrongly_tied(model: Any, folder: Path) -> list[str]:
    """Weights that the file holds apart, with other values, and that are one in the model: a newer transformers then
    keeps them apart, whatever the config says."""
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
    values = []
    for name in (first, second):
        with safe_open(str(stored[name]), framework="pt") as opened:
            values.append(opened.get_tensor(name))
    return values[0].shape == values[1].shape and bool(np.all((values[0] == values[1]).numpy()))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
