"""Sources of graphs and exporters of checkpoints: a new exporter is one object, options belong to their source, and
other libraries are left as they were."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from onnx_lora import Package
from onnx_lora.errors import ExportError, ModelError, VerificationError
from onnx_lora.exporter import (
    Checkpoint,
    Method,
    OnnxFiles,
    Pipeline,
    Points,
    Precision,
    TorchModule,
    attach,
    export,
    quantize,
    verify,
)
from onnx_lora.exporter.frontends import quiet
from onnx_lora.exporter.frontends.configs.model_config import ModelConfig
from onnx_lora.exporter.frontends.exporters.registry import EXPORTERS, ExportRequest, Refusal
from onnx_lora.exporter.frontends.failures import library_failures
from onnx_lora.exporter.frontends.source import Loaded, ModelSource, Original
from onnx_lora.exporter.request import Progress
from tests.support.exporters import VIA

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Tiny(nn.Module):
    """Of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 16)
        self.down = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def make_tiny(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny().eval()


# --- a new exporter is one object ----------------------------------------------------------------------------------


class TinyExporter:
    """Knows one architecture, and nothing of quantization."""

    name = "tiny"

    def accepts(self, request: ExportRequest) -> Refusal | None:
        if request.precision.quantized:
            return Refusal("writes floats alone")
        return None if request.config.architecture == "Tiny" else Refusal("knows the architecture Tiny alone")

    def python(self) -> str | None:
        return None

    def load(self, request: ExportRequest, folder: Path, progress: Progress) -> Loaded:
        loaded = self._source(request).load(folder, progress)
        return replace(loaded, record={"made_by": self.name, "from": request.config.name})

    def load_original(self, request: ExportRequest, package: Package) -> Original:
        return self._source(request).load_original(package)

    def _source(self, request: ExportRequest) -> TorchModule:
        model = Tiny()
        model.load_state_dict(load_file(Path(request.config.model) / "model.safetensors"))
        return TorchModule(model, example_inputs=(X,))


EXPORTER = TinyExporter()


@pytest.fixture
def registered() -> Iterator[None]:
    """The exporter before all others, as a line at the top of the registry would have it."""
    others = dict(EXPORTERS)
    EXPORTERS.clear()
    EXPORTERS.update({"tiny": f"{__name__}:EXPORTER"} | others)
    yield
    EXPORTERS.clear()
    EXPORTERS.update(others)


def save_tiny(folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Tiny"]}), "utf-8")
    save_file(make_tiny(seed).state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("via", [None, "tiny"])
def test_an_exporter_that_is_registered_exports_and_is_asked_by_verify(tmp_path: Path, via: str | None) -> None:
    folder = save_tiny(tmp_path / "mine")
    package = export(folder, tmp_path / "out", via=via)
    assert package.manifest.source == {"made_by": "tiny", "from": "mine"}
    assert package.base_names == ("mine",)
    assert set(package.points) == {"up", "down"}
    assert {entry.case for entry in verify(package, folder)} >= {"base", "adapter", "rows"}
    with pytest.raises(VerificationError, match="must reproduce the model"):
        verify(package, save_tiny(tmp_path / "other", seed=1))


@pytest.mark.usefixtures("registered")
def test_a_request_that_no_exporter_takes_names_every_reason(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "mine")
    with pytest.raises(ModelError, match="no exporter takes this checkpoint") as caught:
        export(folder, tmp_path / "out", precision="int4", task="image-classification")
    refusing = [problem.partition(":")[0] for problem in caught.value.problems]
    assert refusing == ["tiny", "genai", "transformers", "optimum"]
    with pytest.raises(ModelError, match="writes floats alone"):
        export(folder, tmp_path / "out", precision="int4", via="tiny")


def test_a_checkpoints_config_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "mine")
    opened: list[str] = []
    plain_open = Path.open

    def count(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(path.name)
        return plain_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", count)
    config = ModelConfig.read(folder)
    assert (config.architecture, config.name, config.base, config.layers) == ("Tiny", "mine", {}, 0)
    assert config.translated == config.fields
    with config.open_readable() as read:
        assert read == folder
    assert opened.count("config.json") == 1


# --- sources -------------------------------------------------------------------------------------------------------


def test_a_source_and_its_short_spelling_give_the_same_package(tmp_path: Path) -> None:
    model = make_tiny()
    points = Points(targets=["up"], replaceable=["down.weight"], dora=True)
    full = export(TorchModule(model, example_inputs=(X,), input_names=["x"]), tmp_path / "full", points=points)
    options: dict[str, Any] = {"targets": ["up"], "replaceable": ["down.weight"], "dora": True}
    short = export(model, tmp_path / "short", example_inputs=(X,), input_names=["x"], **options)
    names = [file.name for file in sorted(full.path.iterdir())]
    assert names == [file.name for file in sorted(short.path.iterdir())]
    for name in names:
        assert (full.path / name).read_bytes() == (short.path / name).read_bytes(), name


def test_attaching_is_exporting_files_without_a_model(tmp_path: Path) -> None:
    base = export(make_tiny(), tmp_path / "base", example_inputs=(X,), verify=False)
    (tmp_path / "in").mkdir()
    for data in base.path.glob("*.data"):
        shutil.copyfile(data, tmp_path / "in" / data.name)
    file = tmp_path / "in" / "model.onnx"
    shutil.copyfile(base.path / base.graph().base_file, file)
    attached = attach(file, tmp_path / "attached")
    exported = export(OnnxFiles(file), tmp_path / "exported")
    assert attached.manifest == exported.manifest
    with pytest.raises(ModelError, match="compared with a checkpoint in PyTorch, and none was given"):
        export(OnnxFiles(file), tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [Checkpoint, OnnxFiles, Pipeline, TorchModule])
def test_every_source_has_what_export_and_verify_ask_for(kind: Callable[..., object]) -> None:
    assert isinstance(kind("anything"), ModelSource)


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("module", {"via": "genai"}, "via: .*for checkpoints"),
        ("module", {"task": "text-generation"}, "task: .*for checkpoints"),
        ("module", {"precision": "fp16"}, "precision: .*for checkpoints"),
        ("module", {"block_size": 32}, "block_size: .*for checkpoints"),
        ("folder", {"example_inputs": (X,)}, "example_inputs: only for a torch module"),
        ("folder", {"dynamic_shapes": {}}, "dynamic_shapes: only for a torch module"),
        ("folder", {"input_names": ["x"]}, "input_names: only for a torch module"),
        ("folder", {"precision": Precision("int4"), "block_size": 16}, "must be said by the precision"),
        ("source", {"task": "text-generation"}, "task: must be said by the source, a TorchModule"),
        ("source", {"output_names": ["y"]}, "output_names: must be said by the source, a TorchModule"),
        ("source", {"points": Points(), "targets": ["up"]}, "fields of points: give them there alone"),
        ("source", {"points": ["up"]}, "points must be a Points, and is a list"),
    ],
)
def test_an_option_of_another_source_is_refused(
    tmp_path: Path, model: str, options: dict[str, Any], message: str
) -> None:
    given = {"module": make_tiny(), "folder": tmp_path, "source": TorchModule(make_tiny(), (X,))}[model]
    with pytest.raises(ModelError, match=message):
        export(given, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_limits_of_quantization_are_the_same_for_every_exporter() -> None:
    for size in (8, 24, 512):
        for make in (lambda size: Precision("int4", block_size=size), lambda size: Method(block_size=size)):
            with pytest.raises(ModelError, match=f"block_size must be one of 16, .* 256, and is {size}"):
                make(size)
    for level in (-1, 5):
        for make in (lambda it: Precision("int8", accuracy_level=it), lambda it: Method(accuracy_level=it)):
            with pytest.raises(ModelError, match=f"accuracy_level must be one of 0, .* 4, and is {level}"):
                make(level)
    assert Precision("int4") == Precision("int4", block_size=32, accuracy_level=4)


# --- other libraries are left as they were -------------------------------------------------------------------------

_LOGGERS = ("", "optimum", "transformers", "diffusers", "torch.onnx", "onnxruntime")


def _state() -> dict[str, Any]:
    """What a program may have set, and an export may not change."""
    from transformers.utils import logging as theirs

    state: dict[str, Any] = {
        "disabled": logging.root.manager.disable,
        "root handlers": list(logging.getLogger().handlers),
        "warnings": list(warnings.filters),
        "transformers' bars": theirs.is_progress_bar_enabled(),
        "transformers' level": theirs.get_verbosity(),
        "stdout": sys.stdout,
    }
    for name in _LOGGERS:
        state[f"level of {name or 'root'}"] = logging.getLogger(name).level
    return state


@pytest.fixture
def noticed() -> Iterator[dict[str, Any]]:
    """Levels that nobody would set by chance, restored when the test ends."""
    import diffusers  # noqa: F401 - each sets its level when it is imported
    import optimum.exporters.onnx  # noqa: F401
    import transformers  # noqa: F401

    before = {name: logging.getLogger(name).level for name in _LOGGERS}
    for index, name in enumerate(_LOGGERS):
        logging.getLogger(name).setLevel(11 + index)
    yield _state()
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def test_an_export_and_a_failed_one_leave_other_libraries_as_they_were(
    noticed: dict[str, Any], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    export(checkpoints("bert"), tmp_path / "bert", via=VIA, targets=["query"])
    assert _state() == noticed
    package = export(make_tiny(), tmp_path / "tiny", example_inputs=(X,))
    assert _state() == noticed
    with pytest.raises(ExportError):
        export(make_tiny(), tmp_path / "out", example_inputs=(X, X))
    assert _state() == noticed
    quantize(package, tmp_path / "quantized", method=Method("dynamic", bits=8))
    assert _state() == noticed


def test_quiet_restores_what_it_changes_where_the_block_fails(noticed: dict[str, Any]) -> None:
    for hush in (quiet.quiet, quiet.without_bars, quiet.quiet_diffusers, quiet.quiet_imports, quiet.quiet_root):
        with pytest.raises(ZeroDivisionError):
            _fail_within(hush, noticed)
        assert _state() == noticed, hush.__name__


def _fail_within(hush: Callable[[], AbstractContextManager[None]], noticed: dict[str, Any]) -> None:
    with hush():
        if hush is quiet.quiet_root:
            quiet.silence_root()
        assert _state() != noticed
        raise ZeroDivisionError


# --- what is called of other libraries, and promised by nobody -----------------------------------------------------

# A module, what is taken from it, the parameters that are given, and the file of ours to change when it moves.
PRIVATE = [
    (
        "optimum.exporters.onnx.utils",
        "_get_submodels_and_onnx_configs",
        ["model", "task", "monolith", "custom_onnx_configs", "custom_architecture", "_variant", "library_name"],
        "optimum.py: references, the inputs of every graph",
    ),
    ("optimum.exporters.utils", "_DIFFUSERS_CLASS_NAME_TO_SUBMODEL_TYPE", [], "pipeline.py: the networks it may have"),
    ("optimum.exporters.utils", "get_diffusion_models_for_export", ["pipeline", "float_dtype"], "pipeline.py: _parts"),
    (
        "optimum.exporters.tasks",
        "TasksManager._DIFFUSERS_TASKS_TO_MODEL_MAPPINGS",
        [],
        "pipeline.py: what a pipeline's class is for",
    ),
    ("optimum.exporters.onnx", "onnx_export_from_model", ["model", "output", "task"], "optimum.py: load"),
    ("optimum.exporters.onnx", "export", ["model", "config", "output"], "pipeline.py: load"),
    (
        "optimum.exporters.onnx.base",
        "OnnxConfig.patch_model_for_export",
        ["self", "model"],
        "optimum_references.py: what a module answers",
    ),
    (
        "optimum.exporters.onnx.base",
        "OnnxConfig.generate_dummy_inputs_for_validation",
        ["self", "reference_model_inputs", "onnx_input_names"],
        "optimum_references.py: a graph's inputs by its own names",
    ),
    ("optimum.exporters.onnx.base", "OnnxConfig.rename_ambiguous_inputs", ["self", "inputs"], "optimum_references.py"),
    (
        "optimum.exporters.onnx.base",
        "OnnxConfig.flatten_output_collection_property",
        ["name", "field"],
        "optimum_references.py: outputs that are lists",
    ),
    ("optimum.exporters.onnx.base", "OnnxConfig.torch_to_onnx_output_map", [], "optimum_references.py"),
    ("torch._C", "_jit_pass_onnx_eval_peephole", [], "unfused.py: TorchScript's pass that fuses batch norms"),
    ("onnxscript.rewriter", "_DEFAULT_REWRITE_RULES", [], "unfused.py: dynamo's rules that fuse batch norms"),
    (
        "optimum.exporters.tasks",
        "TasksManager._TRANSFORMERS_TASKS_TO_MODEL_MAPPINGS",
        [],
        "optimum.py: the tasks of a class",
    ),
    (
        "transformers.models.auto.modeling_auto",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        [],
        "language_part.py: the text-only class of a language model",
    ),
    ("transformers.models.auto.configuration_auto", "CONFIG_MAPPING", [], "newer.py: the class of a config"),
    (
        "onnxruntime.quantization.matmul_nbits_quantizer",
        "MatMulNBitsQuantizer",
        ["model", "nodes_to_exclude", "algo_config"],
        "quantization.py: blocks",
    ),
    (
        "onnxruntime.quantization.matmul_nbits_quantizer",
        "DefaultWeightOnlyQuantConfig",
        ["block_size", "is_symmetric", "bits", "accuracy_level"],
        "quantization.py: blocks",
    ),
    ("onnxruntime.quantization.onnx_model", "ONNXModel.replace_gemm_with_matmul", ["self"], "quantization.py: Gemm"),
    ("peft.tuners.lora", "LoraModel", ["model", "peft_config", "adapter_name"], "random_adapters.py: put_adapter"),
    ("peft.tuners.lora", "LoraModel.unload", ["self"], "random_adapters.py: put_adapter"),
]


@pytest.mark.parametrize("module, name, parameters, ours", PRIVATE, ids=lambda value: value if "." in value else "")
def test_what_nobody_promises_is_where_it_was(module: str, name: str, parameters: list[str], ours: str) -> None:
    """When this fails, the library moved what it never promised: look at the file of `exporter` that is named."""
    import importlib
    import inspect

    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
        assert found is not None, f"{module} has no {name} any more: see {ours}"
    if parameters:
        signature = inspect.signature(found).parameters
        takes_more = any(value.kind is value.VAR_KEYWORD for value in signature.values())
        missing = [parameter for parameter in parameters if parameter not in signature]
        assert not missing or takes_more, f"{module}.{name} takes no {', '.join(missing)} any more: see {ours}"


def test_the_answers_of_a_source_are_those_of_its_module(tmp_path: Path) -> None:
    model = make_tiny()
    package = export(model, tmp_path / "out", example_inputs=(X,), verify=False)
    (reference,) = TorchModule(model, (X,)).load_original(package).references()
    with torch.inference_mode():
        expected = model(X).numpy()
    (answer,) = reference.answer().values()
    np.testing.assert_array_equal(answer, expected)


def test_a_name_that_the_hub_does_not_give_is_told_in_the_words_for_users() -> None:
    try:
        try:
            raise KeyError("set 'local_files_only' to False")
        except KeyError as cause:
            raise OSError("We couldn't connect to the hub\nand more") from cause
    except OSError as error:
        failure = error
    with (
        pytest.raises(ModelError, match=r"no model of this name could be had from the hub: We couldn't connect to"),
        library_failures("nobody/nothing", "loaded"),
    ):
        raise failure
