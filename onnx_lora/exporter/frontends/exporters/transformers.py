"""A Hugging Face checkpoint, exported by transformers 5 itself (`transformers.exporters`), for any task that it has
classes for."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lora.errors import ModelError
from onnx_lora.exporter.foreign_libraries import attempt
from onnx_lora.exporter.frontends.calls import count_calls
from onnx_lora.exporter.frontends.companion_files import companions_of
from onnx_lora.exporter.frontends.configs.model_config import ModelConfig
from onnx_lora.exporter.frontends.configs.whole import LOADING, check_whole
from onnx_lora.exporter.frontends.exporters.registry import ExportRequest, Refusal
from onnx_lora.exporter.frontends.exporters.transformers_inputs import BATCH, OWN, Part, leaves_of, parts_of
from onnx_lora.exporter.frontends.failures import library_failures
from onnx_lora.exporter.frontends.huggingface import heads_of
from onnx_lora.exporter.frontends.language_part import others_than
from onnx_lora.exporter.frontends.quiet import quiet, without_bars
from onnx_lora.exporter.frontends.source import Loaded, Original, Reference
from onnx_lora.exporter.frontends.unfused import without_norm_fusion
from onnx_lora.exporter.frontends.uniform_vectors import with_uniform_vectors
from onnx_lora.exporter.frontends.versions import versions_of
from onnx_lora.exporter.locating.calls import Calls
from onnx_lora.exporter.ort_check import takes_cache
from onnx_lora.exporter.request import GraphFile
from onnx_lora.exporter.weights.torch_weights import read_module_weights

if TYPE_CHECKING:
    from torch import nn

    from onnx_lora.exporter.request import Progress
    from onnx_lora.package import Package

__all__ = ["EXPORTER", "TransformersExporter", "load_model", "references"]

logger = logging.getLogger(__name__)

# The first version whose exporter is tested here.
_OLDEST = (5, 24)

# What it needs beside itself; torch with its hundreds of modules is only looked for.
_LIBRARIES = ("torch", "onnxscript")

_WITH_PAST = "-with-past"

# By Optimum's names of tasks, the classes that transformers loads for them. Of several tasks that know a model's class
# the first is its own.
_CLASSES: Mapping[str, Sequence[str]] = {
    "text-generation": ["AutoModelForCausalLM"],
    "text2text-generation": ["AutoModelForSeq2SeqLM"],
    "automatic-speech-recognition": ["AutoModelForSpeechSeq2Seq", "AutoModelForCTC"],
    "text-classification": ["AutoModelForSequenceClassification"],
    "token-classification": ["AutoModelForTokenClassification"],
    "question-answering": ["AutoModelForQuestionAnswering"],
    "fill-mask": ["AutoModelForMaskedLM"],
    "image-classification": ["AutoModelForImageClassification"],
    "semantic-segmentation": ["AutoModelForSemanticSegmentation"],
    "depth-estimation": ["AutoModelForDepthEstimation"],
    "zero-shot-image-classification": ["AutoModelForZeroShotImageClassification"],
    "masked-im": ["AutoModelForMaskedImageModeling"],
    "audio-classification": ["AutoModelForAudioClassification"],
    "audio-frame-classification": ["AutoModelForAudioFrameClassification"],
    "audio-xvector": ["AutoModelForAudioXVector"],
    "feature-extraction": ["AutoModel"],
}

# Those whose graphs can have a cache.
_GENERATING = ("text-generation", "text2text-generation", "automatic-speech-recognition")

_TASKS = frozenset(_CLASSES) | {f"{task}{_WITH_PAST}" for task in _GENERATING}


class TransformersExporter:
    """The ONNX export of transformers 5."""

    name = "transformers"

    def accepts(self, request: ExportRequest) -> Refusal | None:
        """It takes every checkpoint in floats; what it cannot export, it says when it loads it."""
        if request.precision.quantized:
            return Refusal(
                f"transformers writes no {request.precision.name}: the GenAI builder does; or `quantize` the package"
            )
        if _version() < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            return Refusal(
                f"transformers exports ONNX from {oldest} on, and {metadata.version('transformers')} is installed"
            )
        if request.task is not None and request.task not in _TASKS:
            return Refusal(f"there is no task {request.task!r}; transformers' are {', '.join(sorted(_TASKS))}")
        for library in _LIBRARIES:
            if find_spec(library) is None:
                return Refusal(f"exporting by transformers needs {library}", install=f"pip install {library}")
        return None

    def python(self) -> str | None:
        return None

    def load(self, request: ExportRequest, folder: Path, progress: Progress) -> Loaded:
        """Write transformers' ONNX files into `folder`.

        Raises ModelError: no such checkpoint, or transformers has no class for it and this task. ExportError: the
        exporter failed. MissingDependencyError: torch or onnxscript is not installed.
        """
        config = request.config
        loaded = _load(config, request.task, request.precision.name)
        with library_failures(config.model, f"run for task {loaded.task!r}"):
            parts = parts_of(loaded.model, has_cache=loaded.has_cache)
            calls = count_calls(loaded.model, {part.name: part.reference().answer for part in parts})
        graphs: list[GraphFile] = []
        for number, part in enumerate(parts):
            progress("export graphs", number, len(parts))
            file = folder / f"{part.name}.onnx"
            with library_failures(config.model, f"exported by transformers for task {loaded.task!r}"):
                _write(part, file)
            graphs.append(GraphFile(part.name, file, calls=calls[part.name]))
        record = {
            "made_by": self.name,
            "from": config.name,
            "task": loaded.task,
            "precision": request.precision.name,
        } | versions_of("transformers", "torch")
        left_out = _left_out(loaded.model, calls)
        if left_out:
            logger.warning("%s: exported for text alone; the package leaves out %s", config.name, left_out)
            record["left_out"] = left_out
        if not config.is_local:
            _save_companions(loaded.model, config, folder)
        return Loaded(
            graphs=tuple(graphs),
            record=record | config.base,
            weights=read_module_weights(loaded.model, heads=heads_of(loaded.model)),
            companions=companions_of(Path(config.model) if config.is_local else folder),
            scratch=folder,
            original=loaded.original(),
            untrained=loaded.untrained,
        )

    def load_original(self, request: ExportRequest, package: Package) -> Original:
        """The torch model that transformers would export. Where no task is told, a decoder has its cache if the
        package's graphs have one. Raises ModelError, MissingDependencyError."""
        loaded = _load(request.config, request.task, request.precision.name)
        if request.task is None and loaded.has_cache and not takes_cache(package):
            loaded = loaded.without_cache()
        return loaded.original()


EXPORTER = TransformersExporter()


def _version() -> tuple[int, ...]:
    """Of the installed transformers; where none is, what the first use of it says is told."""
    try:
        text = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return _OLDEST
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _left_out(model: Any, calls: Mapping[str, Calls]) -> str:
    """The parts of a language model that no graph of it computes: those for pictures and speech."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        return ""
    called = {name for graph in calls.values() for name in graph.counts}
    kept = {name for name, module in model.named_modules() if name in called and module._parameters}
    return ", ".join(others_than(model, kept))


def load_model(model: str | os.PathLike[str], *, task: str | None, precision: str = "fp32") -> tuple[nn.Module, str]:
    """The torch model that transformers would export, and the task it would export it for. Decoders get their cache
    ("-with-past") unless `task` says otherwise.

    Raises ModelError: no such checkpoint, or no class for this task. MissingDependencyError.
    """
    loaded = _load(ModelConfig.read(model), task, precision)
    return loaded.model, loaded.task


def references(model: Any, task: str) -> list[Reference]:
    """For every graph that is made of `model`: inputs, and what the model answers to them."""
    return [part.reference() for part in parts_of(model, has_cache=task.endswith(_WITH_PAST))]


@dataclass(frozen=True, slots=True)
class _Model:
    """A model in PyTorch, the task that it is exported for, and its parameters that the checkpoint lacks."""

    model: Any
    task: str
    untrained: tuple[str, ...]

    @property
    def has_cache(self) -> bool:
        return self.task.endswith(_WITH_PAST)

    def without_cache(self) -> _Model:
        task = self.task.removesuffix(_WITH_PAST)
        _tell_cache(self.model, task)
        return replace(self, task=task)

    def original(self) -> Original:
        return Original(self.model, partial(references, self.model, self.task))


def _load(config: ModelConfig, task: str | None, precision: str) -> _Model:
    with quiet(), library_failures(config.model, _export_for(task)), without_bars(), config.open_readable() as read:
        import torch
        import transformers

        is_local = Path(read).is_dir()
        theirs = transformers.AutoConfig.from_pretrained(str(read), local_files_only=is_local, trust_remote_code=False)
        chosen, kind = _choose_class(theirs, task, config)
        loaded, account = kind.from_pretrained(
            str(read),
            dtype=torch.float16 if precision == "fp16" else torch.float32,
            local_files_only=is_local,
            trust_remote_code=False,
            **LOADING,
        )
        untrained = check_whole(loaded, account, config.model, read)
    if task is None and loaded.can_generate() and chosen in _GENERATING:
        chosen += _WITH_PAST
    _tell_cache(loaded, chosen)
    return _Model(loaded.eval(), chosen, untrained)


def _tell_cache(model: Any, task: str) -> None:
    """Tell a model, and the language model within, whether to give its cache."""
    for told in (model.config, model.config.get_text_config(decoder=True)):
        told.use_cache = task.endswith(_WITH_PAST)


def _choose_class(theirs: Any, task: str | None, config: ModelConfig) -> tuple[str, Any]:
    """A task, and the class that a checkpoint is loaded with for it. Raises ModelError: there is none."""
    import transformers

    if task is not None:
        kinds = [getattr(transformers, name) for name in _CLASSES[task.removesuffix(_WITH_PAST)]]
        # The last one says what it knows, where none has this type of model.
        return task, next((kind for kind in kinds if type(theirs) in kind._model_mapping), kinds[-1])
    for name in theirs.architectures or ():
        kind = getattr(transformers, name, None)
        if kind is not None:
            found = _task_of(name)
            # transformers counts models of speech and text among these, which are decoders.
            is_decoder = found == "text2text-generation" and not theirs.is_encoder_decoder
            return ("text-generation" if is_decoder else found), kind
    raise ModelError("its config.json names no class of transformers, so the task must be given", path=config.model)


def _task_of(class_name: str) -> str:
    """The first task whose classes have this one among them; what has none gives its features."""
    import transformers

    for task, names in _CLASSES.items():
        for name in names:
            for known in getattr(transformers, name)._model_mapping._model_mapping.values():
                if class_name in ([known] if isinstance(known, str) else known):
                    return task
    return "text-generation" if class_name.endswith("ForConditionalGeneration") else "feature-extraction"


def _write(part: Part, file: Path) -> None:
    """Trace a part, and write its graph as graphs look here."""
    import onnx_ir as ir
    import torch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic_shapes=_shapes_of(part, torch))

    def export() -> Any:
        inputs = copy.deepcopy(dict(part.inputs))
        return OnnxExporter().export(part.module, inputs, config).program

    with quiet(), without_norm_fusion():
        model = with_uniform_vectors(part.module, export)
    _name_values(model.graph, part)
    ir.save(model, file, external_data=f"{file.name}.data")


def _shapes_of(part: Part, torch: Any) -> dict[str, Any]:
    """The free axes as torch.export takes them: of a cache a list, in the order of its tensors."""
    batch: dict[str, Any] = {}

    def shape_of(path: str) -> dict[int, Any]:
        shape: dict[int, Any] = {}
        for axis, name in part.axes.get(path, {}).items():
            # Sizes that must be equal torch finds out; of rows it would find none where a mask has its own.
            is_batch = name.endswith(BATCH)
            shape[axis] = batch.setdefault(name, torch.export.Dim(name)) if is_batch else torch.export.Dim.AUTO
        return shape

    shapes: dict[str, Any] = {}
    for name, value in part.inputs.items():
        if isinstance(value, torch.Tensor):
            shapes[name] = shape_of(name)
        else:
            shapes[name] = [shape_of(path) for path in leaves_of({name: value})]
    return shapes


def _name_values(graph: Any, part: Part) -> None:
    """Give inputs, outputs and sizes the names that all graphs have, and sizes that are known their numbers."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value in graph.inputs:
        path = value.name.removeprefix("input.")
        axes = part.axes.get(path, {})
        for axis, name in axes.items():
            dim = value.shape[axis] if value.shape is not None else None
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                own = f"{part.graph_name(path)}_{axis}" if name == OWN else name
                names.setdefault(dim.value, own)
        value.name = part.graph_name(path)
    kept: list[Any] = []
    for value in graph.outputs:
        path = value.name.removeprefix("output.")
        if part.gives(path):
            value.name = part.graph_name(path, is_output=True)
            kept.append(value)
    graph.outputs[:] = kept
    values = list(graph.inputs)
    for node in ir.traversal.RecursiveGraphIterator(graph):
        values += node.outputs
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: Any, names: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    text = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), dim.value)
    return int(text) if text.isdecimal() else text


def _save_companions(model: Any, config: ModelConfig, folder: Path) -> None:
    """Write the configs of a model from the hub, and its tokenizer or processor if it has one."""
    import transformers

    with quiet(), library_failures(config.model, "saved"):
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        attempt(lambda: transformers.AutoProcessor.from_pretrained(str(config.model)).save_pretrained(folder))


def _export_for(task: str | None) -> str:
    """What transformers does with a checkpoint, for messages: "cannot be ..."."""
    return f"exported by transformers for task {task!r}" if task else "exported by transformers"
