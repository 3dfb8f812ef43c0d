"""A diffusers pipeline as a source of graphs, exported by Optimum network by network. It knows what a pipeline's folder
holds, and not which of its networks take adapters."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lora.companions import check_folder
from onnx_lora.errors import MissingDependencyError, ModelError
from onnx_lora.exporter.frontends.calls import count_calls
from onnx_lora.exporter.frontends.companion_files import companions_of
from onnx_lora.exporter.frontends.configs.hub import check_name, fetch_file
from onnx_lora.exporter.frontends.configs.names import base_of, name_of
from onnx_lora.exporter.frontends.configs.newer import open_readable
from onnx_lora.exporter.frontends.configs.whole import LOADING, check_whole
from onnx_lora.exporter.frontends.exporters.optimum_references import reference_of
from onnx_lora.exporter.frontends.failures import library_failures
from onnx_lora.exporter.frontends.optimum_python import optimum_python
from onnx_lora.exporter.frontends.quiet import quiet, quiet_diffusers, quiet_imports
from onnx_lora.exporter.frontends.source import Loaded, Original, Reference
from onnx_lora.exporter.frontends.versions import versions_of
from onnx_lora.exporter.precision import Precision
from onnx_lora.exporter.request import GraphFile
from onnx_lora.exporter.weights.torch_weights import read_module_weights
from onnx_lora.json_file import read_json

if TYPE_CHECKING:
    from torch import nn

    from onnx_lora.exporter.request import Progress
    from onnx_lora.package import Package

__all__ = ["Pipeline", "is_pipeline", "load_pipeline", "references"]

_INDEX = "model_index.json"


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


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline as `save_pretrained` writes it: a graph for each of its networks.

    `path`: its folder, or a hub id. `task`: "text-to-image", "image-to-image" or "inpainting" (None: what its class is
    for). `precision`: "fp32" or "fp16".

    Raises ModelError: there is no such precision.
    """

    path: str | os.PathLike[str]
    task: str | None = None
    precision: Precision | str = "fp32"

    def __post_init__(self) -> None:
        if isinstance(self.precision, str):
            object.__setattr__(self, "precision", Precision(self.precision))

    @property
    def _dtype(self) -> str:
        return self.precision if isinstance(self.precision, str) else self.precision.name

    @classmethod
    def of_record(cls, record: Mapping[str, str], checkpoint: str | os.PathLike[str]) -> Pipeline | None:
        """The pipeline at `checkpoint` that a manifest's `record` describes, or None."""
        if "pipeline" not in record:
            return None
        return cls(checkpoint, task=record.get("task"), precision=record.get("precision", "fp32"))

    def load(self, folder: Path, progress: Progress) -> Loaded:
        """Write Optimum's ONNX file of each network into `folder`: `unet.onnx`, `text_encoder.onnx`, ...

        The torch module has every network as a child of its name, and so the names that the package gives to modules.

        Raises ModelError: no such pipeline, or Optimum does not export it. ExportError: the exporter failed.
        MissingDependencyError: torch, optimum-onnx or diffusers is not installed.
        """
        networks, record, root = self._load()
        with quiet(), library_failures(self.path, "exported by Optimum"):
            from optimum.exporters.onnx import export

            parts = _parts(networks)
            for index, (name, (part, config)) in enumerate(parts.items()):
                progress(f"export {name}", index, len(parts))
                export(part, config, folder / f"{name}.onnx")
        graphs: list[GraphFile] = []
        for reference in references(networks):
            name, network = reference.graph, _network(reference.graph)
            weights = read_module_weights(networks[network], heads=frozenset())
            with library_failures(self.path, f"run ({network})"):
                calls = count_calls(networks[network], {name: reference.answer})
            graphs.append(GraphFile(name, folder / f"{name}.onnx", f"{network}.", weights, calls[name]))
        return Loaded(
            graphs=tuple(graphs),
            record=record,
            companions=_companions(root, folder / "files"),
            scratch=folder,
            original=Original(networks, partial(references, networks)),
            untrained=(),
        )

    def python(self, package: Package | None = None) -> str | None:  # noqa: ARG002 - Optimum makes and loads all
        """See `LoadedElsewhere`. Raises MissingDependencyError: no Python has Optimum."""
        Path(self.path)  # what is no path is told to the caller, and not in another process
        return optimum_python()

    def load_original(self, package: Package) -> Original:  # noqa: ARG002 - its own task and precision say it all
        """The networks in PyTorch. Raises ModelError, MissingDependencyError."""
        networks = self._load()[0]
        return Original(networks, partial(references, networks))

    def _load(self) -> tuple[Any, dict[str, str], Path]:
        """The networks, the manifest's record of them, and the folder they were read from."""
        if Path(self.path).is_dir():
            check_folder(Path(self.path), ModelError)
        if self._dtype not in ("fp32", "fp16"):
            raise ModelError("a pipeline is exported via Optimum, in fp32 or fp16", path=self.path)
        diffusers = _import_diffusers()
        with library_failures(self.path, "loaded by diffusers"), quiet_diffusers():
            import torch

            is_local = Path(self.path).is_dir()
            root = Path(self.path) if is_local else Path(diffusers.DiffusionPipeline.download(str(self.path)))
            index = read_json(root / _INDEX, ModelError)
            _check(index, root)
            if self.task is not None and self.task not in _TASKS:
                raise ModelError(
                    f"a pipeline is exported for {', '.join(_TASKS)}, and not for {self.task!r}", path=self.path
                )
            dtype = torch.float16 if self._dtype == "fp16" else torch.float32
            names = [name for name in _NETWORKS if _has(index, name)]
            unused = {name: None for name in ("safety_checker", "image_encoder") if name in index}
            with open_readable(root) as read:
                parts: dict[str, Any] = {}
                for name in names:
                    parts[name] = _load_part(name, index[name], self.path, Path(read), dtype)
                pipeline = diffusers.DiffusionPipeline.from_pretrained(
                    str(read), torch_dtype=dtype, local_files_only=True, **parts, **unused
                )
        networks = torch.nn.ModuleDict({name: getattr(pipeline, name) for name in names}).eval()
        # Not a part of the module: Optimum asks the pipeline what its parts are.
        networks.__dict__["pipeline"] = pipeline
        record = {
            "made_by": "optimum",
            "from": name_of(self.path),
            "task": self.task or _task_of(pipeline),
            "precision": self._dtype,
            "pipeline": type(pipeline).__name__,
        }
        return networks, record | base_of(self.path) | versions_of("diffusers", "transformers", "optimum-onnx"), root


def is_pipeline(model: str | os.PathLike[str]) -> bool:
    """Whether a folder or a hub id is a pipeline: it has a `model_index.json`."""
    folder = Path(model)
    if folder.exists():
        return (folder / _INDEX).is_file()
    try:
        check_name(model)
        return fetch_file(str(model), _INDEX) is not None
    except (ModelError, MissingDependencyError):
        return False  # the sources say what is missing


def load_pipeline(model: str | os.PathLike[str], *, task: str | None = None, precision: str = "fp32") -> nn.Module:
    """The networks of a pipeline in PyTorch, as children of one module.

    Raises ModelError: no such pipeline, or one that Optimum does not export. MissingDependencyError: torch or
    diffusers is not installed.
    """
    networks: nn.Module = Pipeline(model, task=task, precision=precision)._load()[0]
    return networks


def _load_part(name: str, entry: Sequence[str], model: str | os.PathLike[str], root: Path, dtype: Any) -> Any:
    """One network of a pipeline, checked to be whole."""
    library, kind = entry
    known = importlib.import_module(library)
    loaded, account = getattr(known, kind).from_pretrained(
        str(root / name), torch_dtype=dtype, local_files_only=True, **LOADING
    )
    check_whole(loaded, account, Path(model) / name, root / name)
    return loaded


def _import_diffusers() -> Any:
    """Imported where its notes on what else is installed reach nobody."""
    with quiet_imports():
        try:
            import diffusers
            import diffusers.pipelines
            import optimum.exporters.onnx  # noqa: F401 - looks for diffusers' version, and writes of it
        except ImportError as error:
            raise MissingDependencyError(
                f"exporting a pipeline needs {error.name or error}: pip install 'onnx-lora[diffusion,cpu]'"
            ) from error
    return diffusers


def _check(index: Any, root: Path) -> None:
    """Raises ModelError: what the index names is not what Optimum makes graphs of, or is code of the folder's own."""
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ModelError("must name a pipeline class of diffusers; classes of the folder's own are not run", path=root)
    from optimum.exporters.utils import _DIFFUSERS_CLASS_NAME_TO_SUBMODEL_TYPE as KNOWN

    problems: list[str] = []
    for name in index:
        if not name.startswith("_") and _has(index, name):
            problem = _problem_of(name, *index[name], known=KNOWN)
            if problem is not None:
                problems.append(problem)
    if not _has(index, "vae") or _has(index, "unet") == _has(index, "transformer"):
        problems.append("it must have a vae, and a unet or a transformer")
    if problems:
        raise ModelError(f"Optimum exports no {index['_class_name']} like this", path=root, problems=problems)


def _problem_of(name: str, library: str, kind: str, *, known: Collection[str]) -> str | None:
    """Why a part of a pipeline, a class of a library, cannot be exported or copied, or None. `known`: the classes of
    networks that Optimum makes graphs of."""
    if name in _NETWORKS:
        allowed = (_VAE,) if name == "vae" else sorted(known)
        if library not in _LIBRARIES or kind not in allowed:
            return f"{name} is a {library}.{kind}; known are {', '.join(allowed)}"
        return None
    if name not in _OUTSIDE:
        return f"{name} ({library}.{kind}) would be left out of the graphs"
    if name in _COPIED and library not in _LIBRARIES:
        return f"{name} is code of the folder's own ({library}.{kind}), which is not run"
    return None


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
    inputs = generate(**options)
    for name, value in inputs.items():
        if getattr(value, "ndim", 0) == 4:  # [rows, channels, height, width]
            inputs[name] = value[..., :_SIDE, :_SIDE]
    return inputs


def _network(graph: str) -> str:
    """The pipeline's part that a graph is made from."""
    return "vae" if graph.startswith("vae_") else graph


def references(networks: Any) -> list[Reference]:
    """For every graph of a pipeline: inputs, and what its network answers to them."""
    with quiet(), library_failures(type(networks.pipeline).__name__, "exported by Optimum"):
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
        found = companions_of(root / part)
        if found:
            (folder / part).mkdir()
        for file in found:
            shutil.copyfile(file, folder / part / file.name)
    return (*companions_of(root), *sorted(folder.iterdir()))
