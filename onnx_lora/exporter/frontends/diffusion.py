"""A diffusers pipeline, exported by Optimum network by network. It knows what a pipeline's folder holds; which of
its networks take adapters, it does not."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lora.errors import MissingDependencyError, ModelError
from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.exporter.frontends.calls import count_calls
from onnx_lora.exporter.frontends.huggingface import base_of, name_of, quiet, translated
from onnx_lora.exporter.frontends.newer import readable
from onnx_lora.exporter.frontends.optimum import reference_of
from onnx_lora.exporter.frontends.source import Loaded, Precision, Reference, companions_of
from onnx_lora.exporter.frontends.whole import LOADING, check_whole
from onnx_lora.exporter.graph_files import GraphFile
from onnx_lora.exporter.options import Progress
from onnx_lora.json_file import read_json

if TYPE_CHECKING:
    from torch import nn

__all__ = ["export_pipeline", "is_pipeline", "load_pipeline", "references"]

_INDEX = "model_index.json"

# What transformers may find when it looks for a hub id's index, and there is none to be had.
_NO_INDEX = ("gated_repo", "missing_entries", "connection_errors")

# What Optimum makes graphs of, by diffusers' names of a pipeline's parts, with a class that it knows.
_NETWORKS = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae")
_VAE = "AutoencoderKL"

# Parts that no graph holds: the caller's loop has them, or runs without. Any other would be missing from the graphs.
_OUTSIDE = frozenset(
    ["feature_extractor", "image_encoder", "safety_checker", "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"]
)
_COPIED = ("feature_extractor", "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")

# Who may bring the classes of a pipeline's parts. Others come as code in the pipeline's own folder.
_LIBRARIES = ("diffusers", "transformers")

_TASKS = ("text-to-image", "image-to-image", "inpainting")

# The longest side of the images, latent or not, that a graph is traced and tried with. Every size goes through
# the same nodes, and the usual ones take minutes.
_SIDE = 16


def is_pipeline(model: str | os.PathLike[str]) -> bool:
    """Whether a folder or a hub id is a pipeline: it has a `model_index.json`.

    Raises ModelError: it is a part of one, or has parts without the index.
    """
    folder = Path(model)
    if folder.exists():
        if not (folder / _INDEX).is_file():
            _refuse_parts(folder)
            return False
        return True
    try:
        from huggingface_hub.errors import HFValidationError
        from transformers.utils import cached_file
    except ImportError:
        return False  # the frontends say what is missing
    with quiet(), contextlib.suppress(HFValidationError, OSError):
        unless = {f"_raise_exceptions_for_{what}": False for what in _NO_INDEX}
        return cached_file(str(model), _INDEX, **unless) is not None
    return False


def _refuse_parts(folder: Path) -> None:
    own = read_json(folder / "config.json", ModelError) if (folder / "config.json").is_file() else None
    if isinstance(own, dict) and "_diffusers_version" in own:
        raise ModelError(
            f"is one network of a pipeline ({own.get('_class_name')}); give the folder of the whole pipeline, the one "
            f"with {_INDEX}",
            path=folder,
        )
    parts = [name for name in _NETWORKS if (folder / name / "config.json").is_file()]
    if parts and own is None:
        raise ModelError(
            f"holds {', '.join(parts)} and no {_INDEX}; a pipeline must have one, as save_pretrained writes it",
            path=folder,
        )


def export_pipeline(
    model: str | os.PathLike[str], folder: Path, *, task: str | None, precision: Precision, progress: Progress
) -> tuple[Loaded, nn.Module]:
    """Write Optimum's ONNX file of each network into `folder`: `unet.onnx`, `text_encoder.onnx`, ...

    The module has every network as a child of its name, and so the names that the package gives to modules.

    Raises ModelError: no such pipeline, or Optimum does not export it. ExportError: the exporter failed.
    MissingDependencyError: torch, optimum-onnx or diffusers is not installed.
    """
    networks, origin, root = _loaded(model, task, precision.name)
    with quiet(), translated(model, "exported by Optimum"):
        from optimum.exporters.onnx import export

        parts = _parts(networks)
        for index, (name, (part, config)) in enumerate(parts.items()):
            progress(f"export {name}", index, len(parts))
            export(part, config, folder / f"{name}.onnx")
    sources = []
    for reference in references(networks):
        name, network = reference.graph, _network(reference.graph)
        checkpoint = Checkpoint.of_module(networks[network], heads=frozenset())
        with translated(model, f"run ({network})"):
            calls = count_calls(networks[network], {name: reference.answer})
        sources.append(GraphFile(name, folder / f"{name}.onnx", f"{network}.", checkpoint, calls[name]))
    return Loaded(tuple(sources), origin, companions=_companions(root, folder / "files"), scratch=folder), networks


def load_pipeline(model: str | os.PathLike[str], *, task: str | None = None, precision: str = "fp32") -> nn.Module:
    """The networks of a pipeline in PyTorch, as children of one module.

    Raises ModelError: no such pipeline, or one that Optimum does not export. MissingDependencyError: torch or
    diffusers is not installed.
    """
    networks: nn.Module = _loaded(model, task, precision)[0]
    return networks


def _loaded(model: str | os.PathLike[str], task: str | None, precision: str) -> tuple[Any, dict[str, str], Path]:
    """The networks, where they come from, and the folder they were read from."""
    diffusers = _diffusers()
    with translated(model, "loaded by diffusers"), _quiet():
        import torch

        root = Path(model) if Path(model).is_dir() else Path(diffusers.DiffusionPipeline.download(str(model)))
        index = read_json(root / _INDEX, ModelError)
        _check(index, root)
        if task is not None and task not in _TASKS:
            raise ModelError(f"a pipeline is exported for {', '.join(_TASKS)}, and not for {task!r}", path=model)
        dtype = torch.float16 if precision == "fp16" else torch.float32
        unused = {name: None for name in ("safety_checker", "image_encoder") if name in index}
        with readable(root) as read:
            parts = {
                name: _part(name, index[name], model, Path(read), dtype) for name in _NETWORKS if _has(index, name)
            }
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                str(read), torch_dtype=dtype, local_files_only=True, **parts, **unused
            )
    networks = torch.nn.ModuleDict({name: getattr(pipeline, name) for name in _NETWORKS if _has(index, name)}).eval()
    # Not a part of the module: Optimum asks the pipeline what its parts are.
    networks.__dict__["pipeline"] = pipeline
    origin = {"made_by": "optimum", "from": name_of(model), "task": task or _task_of(pipeline), "precision": precision}
    return networks, origin | {"pipeline": type(pipeline).__name__} | base_of(model), root


def _part(name: str, entry: Sequence[str], model: str | os.PathLike[str], root: Path, dtype: Any) -> Any:
    """One network of a pipeline, checked to be whole."""
    library, kind = entry
    known = importlib.import_module(library)
    loaded, account = getattr(known, kind).from_pretrained(
        str(root / name), torch_dtype=dtype, local_files_only=True, **LOADING
    )
    check_whole(loaded, account, Path(model) / name, root / name)
    return loaded


def _diffusers() -> Any:
    """Imported where its notes on what else is installed reach nobody."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import diffusers
        import diffusers.pipelines
        import optimum.exporters.onnx  # noqa: F401 - looks for diffusers' version, and writes of it
    except ImportError as error:
        raise MissingDependencyError(
            f"exporting a pipeline needs {error.name or error}: pip install 'onnx-lora[export,diffusion,cpu]'"
        ) from error
    finally:
        logging.disable(before)
    return diffusers


def _check(index: Any, root: Path) -> None:
    """Raises ModelError: what the index names is not what Optimum makes graphs of, or is code of the folder's own."""
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ModelError("must name a pipeline class of diffusers; classes of the folder's own are not run", path=root)
    from optimum.exporters.utils import _DIFFUSERS_CLASS_NAME_TO_SUBMODEL_TYPE as KNOWN

    problems: list[str] = []
    for name in index:
        if name.startswith("_") or not _has(index, name):
            continue
        library, kind = index[name]
        if name in _NETWORKS:
            if library not in _LIBRARIES or kind not in ((_VAE,) if name == "vae" else KNOWN):
                known = _VAE if name == "vae" else ", ".join(sorted(KNOWN))
                problems.append(f"{name} is a {library}.{kind}; known are {known}")
        elif name not in _OUTSIDE:
            problems.append(f"{name} ({library}.{kind}) would be left out of the graphs")
        elif name in _COPIED and library not in _LIBRARIES:
            problems.append(f"{name} is code of the folder's own ({library}.{kind}), which is not run")
    if not _has(index, "vae") or _has(index, "unet") == _has(index, "transformer"):
        problems.append("it must have a vae, and a unet or a transformer")
    if problems:
        raise ModelError(f"Optimum exports no {index['_class_name']} like this", path=root, problems=problems)


def _has(index: Mapping[str, Any], name: str) -> bool:
    """Whether an index names a class for a part: `[library, class]`, and `[null, null]` where there is none."""
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def _task_of(pipeline: Any) -> str:
    from optimum.exporters.tasks import TasksManager

    for task, classes in TasksManager._DIFFUSERS_TASKS_TO_MODEL_MAPPINGS.items():
        if type(pipeline).__name__ in classes.values():
            return str(task)
    return _TASKS[0]


def _parts(networks: Any) -> dict[str, tuple[Any, Any]]:
    """What Optimum exports, by the graph's name: a module, and Optimum's own config of it."""
    import optimum.exporters.onnx.model_configs  # noqa: F401 - registers the architectures
    from optimum.exporters.utils import get_diffusion_models_for_export

    precision = "fp16" if "float16" in str(networks.pipeline.dtype) else "fp32"
    parts: dict[str, tuple[Any, Any]] = get_diffusion_models_for_export(networks.pipeline, float_dtype=precision)
    for name, (part, config) in parts.items():
        config.generate_dummy_inputs = partial(_small_inputs, config.generate_dummy_inputs)
        if _network(name) == "vae":
            # Optimum copies the VAE, to give each half a forward of its own; the weights need not be copies.
            part._modules = networks["vae"]._modules
    return parts


def _small_inputs(generate: Callable[..., dict[str, Any]], **options: Any) -> dict[str, Any]:
    """Optimum's inputs, images no larger than they must be."""
    return {
        name: value[..., :_SIDE, :_SIDE] if getattr(value, "ndim", 0) == 4 else value
        for name, value in generate(**options).items()
    }


def _network(graph: str) -> str:
    """The pipeline's part that a graph is made from."""
    return "vae" if graph.startswith("vae_") else graph


def references(networks: Any) -> list[Reference]:
    """For every graph of a pipeline: inputs, and what its network answers to them."""
    with quiet(), translated(type(networks.pipeline).__name__, "exported by Optimum"):
        import torch

        # The same inputs every time, and the caller's random numbers left alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [reference_of(name, part, config) for name, (part, config) in _parts(networks).items()]


def _companions(root: Path, folder: Path) -> tuple[Path, ...]:
    """Copies in `folder` of what the caller's loop needs, where diffusers looks for it: the index, and a folder for
    each tokenizer, the scheduler, and each network's config."""
    folder.mkdir()
    for part in (*_COPIED, *_NETWORKS):
        if found := companions_of(root / part):
            (folder / part).mkdir()
            for file in found:
                shutil.copyfile(file, folder / part / file.name)
    own = [file for file in companions_of(root) if file.is_file()]
    return (*own, *sorted(folder.iterdir()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the notes and bars of diffusers out of the user's terminal, too."""
    from diffusers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
