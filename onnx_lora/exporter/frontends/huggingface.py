"""What every frontend that reads a Hugging Face checkpoint shares: its config, its heads, quiet libraries, and
their exceptions in our words."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from onnx_lora.errors import ExportError, MissingDependencyError, ModelError, OnnxLoraError
from onnx_lora.heads import TASK_HEADS
from onnx_lora.onnxruntime_errors import native_failures

__all__ = ["base_of", "config_of", "heads_of", "name_of", "quiet", "short_name", "translated", "without_bars"]


# Where the hub's client keeps a repository: models--ORG--NAME/snapshots/HASH.
_HUB_CACHE = re.compile(r"/models--([^/]+)/snapshots/")


def config_of(model: str | os.PathLike[str]) -> dict[str, Any]:
    """`config.json` of a local folder or a hub id, of any architecture.

    Raises ModelError: there is none. MissingDependencyError: transformers is not installed.
    """
    with quiet(), translated(model, "read"):
        import transformers

        config, _ = transformers.PretrainedConfig.get_config_dict(str(model), local_files_only=Path(model).is_dir())
    if not config:
        raise ModelError("must hold a config.json, and has none", path=model)
    return dict(config)


def name_of(model: str | os.PathLike[str]) -> str:
    """What the manifest calls a checkpoint: a folder's own name or a hub id, never a path."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def base_of(model: str | os.PathLike[str]) -> dict[str, str]:
    """`base`, for the manifest: a local folder's model by the name that its config or the hub's cache gives it; nothing
    for a hub id, which is the name already."""
    folder = Path(model)
    if not folder.is_dir():
        return {}
    if cached := _HUB_CACHE.search(folder.resolve().as_posix()):
        return {"base": cached[1].replace("--", "/")}
    for name in ("config.json", "model_index.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            config = json.loads((folder / name).read_text("utf-8"))
            named = config.get("_name_or_path") if isinstance(config, dict) else None
            if isinstance(named, str) and named:
                return {"base": short_name(named)}
    return {}


def short_name(named: str) -> str:
    """A hub id as it is, and of a path the last component: nothing of the machine that made it."""
    path = PurePosixPath(named.replace("\\", "/"))
    is_id = len(path.parts) <= 2 and not path.is_absolute() and path.parts[0] not in (".", "..", "~")
    return str(path) if is_id else path.name


def heads_of(model: Any) -> frozenset[str]:
    """The output layers that PEFT leaves out of "all-linear"."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        return frozenset(name for name, module in model.named_modules() if module is output)
    return frozenset(name for name in TASK_HEADS["SEQ_CLS"] if hasattr(model, name))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' warnings and printed notes out of the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("optimum", "transformers", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing bars for the shards it loads; imports transformers."""
    from transformers.utils import logging as theirs

    were_on = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            theirs.enable_progress_bar()


@contextlib.contextmanager
def translated(model: str | os.PathLike[str], done: str) -> Iterator[None]:
    """Foreign exceptions as ours, around the calls of Optimum and transformers; `done` is what could not be."""
    failures: tuple[type[Exception], ...] = (RuntimeError, *native_failures())
    try:
        yield
    except OnnxLoraError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"exporting a checkpoint needs {error.name or error}: pip install 'onnx-lora[export,cpu]'"
        ) from error
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # the disk, not the model
        if not Path(model).exists():
            message = str(error).strip().split("\n")[0]
            raise ModelError(
                f"there is no such folder, and no model of this name could be had from the hub: {message}", path=model
            ) from error
        raise ModelError(f"cannot be {done}: {error}", path=model) from error
    except failures as error:
        raise ExportError(
            f"torch.onnx failed, or wrote what ONNX Runtime refuses (in fp16 often: try fp32): {error}", path=model
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        if _misses_preprocessor(error, model):
            raise ExportError(
                "Optimum takes the size of images from the image processor, and there is none: copy the model's "
                "preprocessor_config.json into the folder",
                path=model,
            ) from error
        said = f"{type(error).__name__}: {error}"
        raise ExportError(f"cannot be {done}: a library failed without saying why ({said})", path=model) from error


def _misses_preprocessor(error: Exception, model: str | os.PathLike[str]) -> bool:
    """Whether Optimum failed because it looks for the last of the folder's preprocessors, and there is none."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    looking = Path(innermost.f_code.co_filename).name == "input_generators.py"
    return looking and isinstance(error, IndexError) and not (Path(model) / "preprocessor_config.json").is_file()
