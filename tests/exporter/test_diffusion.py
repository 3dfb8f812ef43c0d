"""Pipelines of diffusers: one package of several graphs, adapters on any of its networks, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("diffusers", reason="needs diffusers: pip install onnx-lora[diffusion]")

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file

from onnx_lora import AdapterSession, Package, bind, fold, read_adapter
from onnx_lora.errors import (
    BindError,
    MissingDependencyError,
    ModelError,
    SelectionError,
    UnsupportedAdapterError,
    VerificationError,
)
from onnx_lora.exporter import attach, export
from onnx_lora.exporter.frontends.pipeline import load_pipeline
from onnx_lora.exporter.verification.verify import verify
from onnx_lora.kinds import EMBEDDING, Conv
from onnx_lora.points import Array
from tests.support.diffusion import (
    make_pipeline,
    make_style,
    make_xl_pipeline,
    shaped_package,
    stable_diffusion_1,
    stable_diffusion_2,
)
from tests.support.models import make_adapter
from tests.support.numbers import assert_close, assert_same_bits

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv_in", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "proj_in"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "small"
    make_pipeline(path)
    return path


@pytest.fixture(scope="module")
def package(folder: Path) -> Package:
    return export(folder, folder.parent / "package", targets="all", verify=False)


def _feeds(rows: int = 2) -> dict[str, Array]:
    draw = np.random.default_rng(0)
    return {
        "sample": draw.standard_normal((rows, 4, 8, 6), np.float32),
        "timestep": np.array(37, np.float32),
        "encoder_hidden_states": draw.standard_normal((rows, 16, 32), np.float32),
    }


def _noise(unet: Any, feeds: dict[str, Array]) -> Array:
    with torch.inference_mode():
        values: Array = unet(**{name: torch.from_numpy(value) for name, value in feeds.items()}).sample.numpy()
    return values


def _adapter(folder: Path, out: Path, targets: Any, *, seed: int = 1) -> tuple[Any, Path]:
    """The pipeline's networks under a random adapter of PEFT's, and the adapter's folder."""
    networks = load_pipeline(folder)
    return networks, make_adapter(networks, out, seed=seed, r=3, lora_alpha=5, target_modules=targets)


def test_every_network_becomes_a_graph_under_its_own_name(package: Package) -> None:
    graphs = {graph.name: graph for graph in package.manifest.graphs}
    assert set(graphs) == {"unet", "text_encoder", "vae_encoder", "vae_decoder"}
    assert package.manifest.source == {
        **{"made_by": "optimum", "from": "small", "task": "text-to-image", "precision": "fp32"},
        "pipeline": "StableDiffusionPipeline",
        **{name: version(name) for name in ("diffusers", "transformers", "optimum-onnx")},
    }
    assert package.points["unet.conv_in"].kind == Conv((3, 3))
    assert package.points["text_encoder.text_model.embeddings.token_embedding"].kind == EMBEDDING
    assert all(point.per_row for point in graphs["unet"].points)
    assert not any(graph.unplaced or graph.untargeted for graph in graphs.values())


def test_the_points_of_a_package_are_the_modules_of_the_pipeline(folder: Path, package: Package) -> None:
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)
    modules = {name for name, module in load_pipeline(folder).named_modules() if isinstance(module, kinds)}
    assert set(package.points) == modules


def test_tokenizer_and_scheduler_come_along_where_diffusers_looks_for_them(folder: Path, package: Package) -> None:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(package.path, subfolder="tokenizer")
    assert tokenizer("the cat").input_ids == [54, 53, 2, 0, 45, 55]
    scheduler = diffusers.DDIMScheduler.from_pretrained(package.path, subfolder="scheduler")
    assert scheduler.config.steps_offset == 1
    for name in ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"):
        assert (package.path / name).read_bytes() == (folder / name).read_bytes()
    assert not list(package.path.rglob("*.safetensors"))


@pytest.mark.parametrize("targets", [ATTENTION, CONVOLUTIONS, ATTENTION + CONVOLUTIONS], ids=["attn", "conv", "both"])
def test_an_adapter_of_the_unet_gives_pefts_numbers(
    folder: Path, package: Package, tmp_path: Path, targets: list[str]
) -> None:
    feeds = _feeds()
    base = _noise(load_pipeline(folder)["unet"], feeds)
    networks, adapter = _adapter(folder, tmp_path / "style", rf"unet\..*({'|'.join(targets)})")
    expected = _noise(networks["unet"], feeds)
    assert np.abs(expected - base).max() > 0.05
    session = AdapterSession(package, graph="unet")
    bound = session.load_adapter("style", adapter)
    assert {name.split(".")[0] for name in bound.coverage.applied} == {"unet"}
    assert_close(session.run(None, feeds)[0], base)
    assert_close(session.run(None, feeds, adapter="style")[0], expected)
    assert_close(fold(package, adapter, graph="unet").run(None, feeds)[0], expected)


def test_an_adapter_of_the_text_encoder_gives_pefts_numbers(folder: Path, package: Package, tmp_path: Path) -> None:
    networks, adapter = _adapter(folder, tmp_path / "it", r"text_encoder\..*(q_proj|v_proj|fc1|token_embedding)")
    ids = np.array([[54, 2, 53, 9, 55, 55], [54, 7, 1, 30, 4, 55]])
    with torch.inference_mode():
        expected = networks["text_encoder"](torch.from_numpy(ids)).last_hidden_state.numpy()
    session = AdapterSession(package, graph="text_encoder")
    session.load_adapter("it", adapter)
    outputs = ["last_hidden_state"]
    assert_close(session.run(outputs, {"input_ids": ids}, adapter="it")[0], expected)
    assert_close(fold(package, adapter, graph="text_encoder").run(outputs, {"input_ids": ids})[0], expected)


def test_two_prompts_in_two_styles_share_a_batch(folder: Path, package: Package, tmp_path: Path) -> None:
    _, ink = _adapter(folder, tmp_path / "ink", ATTENTION)
    _, oil = _adapter(folder, tmp_path / "oil", rf"unet\..*({'|'.join(CONVOLUTIONS + ATTENTION[:1])})", seed=2)
    session, feeds = AdapterSession(package, graph="unet"), _feeds()
    session.load_adapter("ink", ink)
    session.load_adapter("oil", oil)
    single = {name: session.run(None, feeds, adapter=name)[0] for name in ("ink", "oil")}
    mixed = session.run(None, feeds, adapter=["ink", "oil"])[0]
    assert_close(mixed, np.stack([single["ink"][0], single["oil"][1]]))
    base = session.run(None, feeds)[0]
    assert_close(session.run(None, feeds, adapter=[None, "oil"])[0], np.stack([base[0], single["oil"][1]]))
    with pytest.raises(SelectionError, match="2"):
        session.run(None, _feeds(rows=3), adapter=["ink", "oil"])


def test_points_that_no_adapter_reaches_leave_the_base_as_it_is(package: Package) -> None:
    """Of no channels ONNX Runtime's Conv gives what lay in memory: the branch of rank 0 must not be one."""
    feeds = _feeds()
    session = AdapterSession(package, graph="unet")
    dirty = {name: np.full_like(value, np.nan) for name, value in feeds.items()}
    import onnxruntime as ort

    base = ort.InferenceSession(package.path / "base.unet.onnx").run(None, feeds)[0]
    for _ in range(3):
        session.run(None, dirty)
        assert_same_bits(session.run(None, feeds)[0], base)


def test_the_loop_around_the_graphs_gives_the_pipelines_image(folder: Path, package: Package, tmp_path: Path) -> None:
    """Prompts in, images out, under one file for UNet and text encoder: as diffusers does it in PyTorch."""
    pipeline = load_pipeline(folder).pipeline
    style = make_style(pipeline, tmp_path / "style.safetensors")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "latents": latents, "output_type": "np"}
    pipeline.set_progress_bar_config(disable=True)
    base = pipeline(["the cat", "a dog"], **options).images
    pipeline.load_lora_weights(tmp_path, weight_name=style.name)
    expected = pipeline(["the cat", "a dog"], **options).images
    assert np.abs(expected - base).max() > 0.01
    sessions = {name: AdapterSession(package, graph=name) for name in ("text_encoder", "unet", "vae_decoder")}
    for session in sessions.values():
        session.load_adapter("style", style)

    def run(graph: str, **feeds: Array) -> Array:
        output: Array = sessions[graph].run(None, feeds, adapter="style")[0]
        return output

    tokenizer = transformers.CLIPTokenizer.from_pretrained(package.path, subfolder="tokenizer")
    ids = tokenizer(["the cat", "a dog"], padding="max_length", return_tensors="np").input_ids
    text = run("text_encoder", input_ids=ids.astype(np.int64))
    scheduler = diffusers.DDIMScheduler.from_pretrained(package.path, subfolder="scheduler")
    scheduler.set_timesteps(3)
    sample = latents
    for step in scheduler.timesteps:
        noise = run("unet", sample=sample.numpy(), timestep=step.numpy().astype(np.float32), encoder_hidden_states=text)
        sample = scheduler.step(torch.from_numpy(noise), step, sample).prev_sample
    scaling = json.loads((package.path / "vae" / "config.json").read_text("utf-8"))["scaling_factor"]
    images = run("vae_decoder", latent_sample=sample.numpy() / np.float32(scaling))
    assert_close((images / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1), expected)


def test_two_text_encoders_have_modules_of_their_own(tmp_path: Path) -> None:
    make_xl_pipeline(tmp_path / "xl")
    package = export(tmp_path / "xl", tmp_path / "package")
    assert {graph.name for graph in package.manifest.graphs} >= {"text_encoder", "text_encoder_2", "unet"}
    below = {
        name: {module.removeprefix(f"{name}.") for module in package.points if module.startswith(f"{name}.")}
        for name in ("text_encoder", "text_encoder_2")
    }
    assert below["text_encoder"] == below["text_encoder_2"] - {"text_projection"}
    digests = {package.points[f"{name}.text_model.encoder.layers.0.mlp.fc1"].sha256 for name in below}
    assert len(digests) == 2
    networks, adapter = _adapter(tmp_path / "xl", tmp_path / "it", r"text_encoder_2\..*(q_proj|text_projection)")
    ids = np.array([[54, 2, 9, 55]])
    session = AdapterSession(package, graph="text_encoder_2")
    coverage = session.load_adapter("it", adapter).coverage
    assert {name.split(".")[0] for name in coverage.applied} == {"text_encoder_2"}
    with torch.inference_mode():
        expected = networks["text_encoder_2"](torch.from_numpy(ids)).text_embeds.numpy()
    assert_close(session.run(["text_embeds"], {"input_ids": ids}, adapter="it")[0], expected)


def test_every_graph_is_verified_base_adapter_and_rows(folder: Path, package: Package) -> None:
    compared = verify(package, folder)
    assert {entry.graph for entry in compared} == {graph.name for graph in package.manifest.graphs}
    assert {entry.case for entry in compared if entry.graph == "unet"} == {"base", "adapter", "rows"}
    assert all(entry.effect > 0.01 for entry in compared if entry.case == "adapter")


def test_another_pipeline_is_told_from_the_packages(folder: Path, package: Package, tmp_path: Path) -> None:
    _, adapter = _adapter(folder, tmp_path / "it", rf"unet\..*({'|'.join(ATTENTION)})")
    tensors = bind(read_adapter(adapter), package).graph_inputs
    other = load_pipeline(folder)
    with torch.no_grad():
        other["unet"].conv_norm_out.bias += 1.0
    other.pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(VerificationError, match="graph unet, base") as caught:
        verify(package, tmp_path / "other", adapter=adapter, tensors=tensors)
    assert {problem.split(",")[0] for problem in caught.value.problems} == {"graph unet"}


def test_constants_in_a_data_file_cost_no_rows(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Optimum puts them in graphs of more than 2 GB; shapes depend on them."""
    monkeypatch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")
    unet = export(folder, tmp_path / "out", targets=ATTENTION, verify=False).graph("unet")
    assert len(unet.points) == 32
    assert all(point.per_row for point in unet.points)
    assert unet.points[0].parts[0].stored.file == "unet.onnx_data"


def test_a_constant_in_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "data").write_bytes(bytes(12))
    constant = onnx.TensorProto(name="c", data_type=onnx.TensorProto.FLOAT, dims=[4])
    constant.data_location = onnx.TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="data")
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "layer.weight")
    nodes = [
        onnx.helper.make_node("Constant", [], ["c"], value=constant, name="/Constant"),
        onnx.helper.make_node("Add", ["x", "c"], ["sum"]),
        onnx.helper.make_node("MatMul", ["sum", "layer.weight"], ["y"], name="/layer/MatMul"),
    ]
    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["batch", 4]) for name in "xy")
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [weight])
    onnx.save(
        onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)]),
        tmp_path / "model" / "model.onnx",
    )
    with pytest.raises(ModelError, match="was cut off"):
        attach(tmp_path / "model" / "model.onnx", tmp_path / "out")
    (tmp_path / "model" / "data").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    package = attach(tmp_path / "model" / "model.onnx", tmp_path / "out")
    x_value = np.ones((2, 4), np.float32)
    assert_close(AdapterSession(package).run(None, {"x": x_value})[0], np.full((2, 4), 10.0, np.float32))


def _index(folder: Path, **changed: Any) -> Path:
    """A pipeline's folder without weights, its index changed."""
    folder.mkdir()
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.2",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index | changed), "utf-8")
    return folder


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"_class_name": ["pipeline", "Mine"]}, "classes of the folder's own are not run"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unet is a diffusers.UNet3DConditionModel; known are"),
        ({"unet": ["unet.my_code", "UNet2DConditionModel"]}, "unet is a unet.my_code.UNet2DConditionModel"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae is a diffusers.AutoencoderTiny; known are AutoencoderKL"),
        ({"scheduler": ["my_code", "MyScheduler"]}, "scheduler is code of the folder's own"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet .* would be left out of the graphs"),
        ({"unet": [None, None]}, "must have a vae, and a unet or a transformer"),
    ],
    ids=["class", "unet", "code", "vae", "scheduler", "controlnet", "none"],
)
def test_a_pipeline_that_would_not_be_whole_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        export(_index(tmp_path / "it", **changed), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it"]


def test_a_folder_without_the_index_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "it", ignore=shutil.ignore_patterns("model_index.json"))
    with pytest.raises(ModelError, match=r"holds text_encoder, unet, vae and no model_index\.json"):
        export(tmp_path / "it", tmp_path / "out")


def test_one_network_of_a_pipeline_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"one network of a pipeline \(UNet2DConditionModel\)"):
        export(folder / "unet", tmp_path / "out")


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    (_index(tmp_path / "it") / "model_index.json").write_text("{", "utf-8")
    with pytest.raises(ModelError, match="must be JSON"):
        export(tmp_path / "it", tmp_path / "out")


def test_missing_weights_are_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded by diffusers"):
        export(_index(tmp_path / "it"), tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"via": "genai"}, "a pipeline is exported via Optimum"),
        ({"precision": "int4"}, "in fp32 or fp16"),
        ({"task": "text-generation"}, "exported for text-to-image, image-to-image, inpainting, and not for"),
    ],
    ids=["via", "precision", "task"],
)
def test_what_no_pipeline_is_exported_for_is_refused(
    folder: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        export(folder, tmp_path / "out", **options)  # type: ignore[arg-type]


def test_without_diffusers_the_error_names_the_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingDependencyError, match=r"onnx-lora\[diffusion,cpu\]"):
        export(folder, tmp_path / "out")


# Files of public repositories, and the networks that they were trained for.
OF_DIFFUSERS = {
    "diffusers_wellCh4n_pokemon/pytorch_lora_weights.safetensors": stable_diffusion_1,
    "diffusers_vfph55_half/pytorch_lora_weights.safetensors": stable_diffusion_2,
}


def _deltas(unet: Any, file: Path) -> dict[str, Array]:
    """What diffusers adds to each weight of a UNet, as it reads the file."""
    state, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(file.parent, weight_name=file.name)
    prefix = "unet" if any(name.startswith("unet.") for name in state) else None
    unet.load_lora_adapter(state, prefix=prefix, network_alphas=alphas, adapter_name="it", low_cpu_mem_usage=True)
    layers = {name: layer for name, layer in unet.named_modules() if "it" in getattr(layer, "lora_A", {})}
    with torch.inference_mode():
        return {name: layer.get_delta_weight("it").float().numpy() for name, layer in layers.items()}


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_real_files_are_applied_as_diffusers_applies_them(data: Path, tmp_path: Path, name: str) -> None:
    """To a UNet of the size they were trained for: 860 million parameters, which take no room until somebody reads."""
    file = data / "other_formats" / name
    networks = OF_DIFFUSERS[name]()
    bound = bind(read_adapter(file), shaped_package(tmp_path / "package", networks))
    expected = _deltas(networks["unet"].to_empty(device="cpu"), file)
    assert set(bound.coverage.applied) == {f"unet.{module}" for module in expected}
    assert len(expected) == 128
    for module, delta in expected.items():
        a, b = (bound.tensors[f"unet.{module}.lora_{side}.weight"][0] for side in "AB")
        assert_close((a @ b).T, delta)


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_a_real_file_of_another_text_encoder_is_refused(data: Path, tmp_path: Path, name: str) -> None:
    other = {stable_diffusion_1: stable_diffusion_2, stable_diffusion_2: stable_diffusion_1}[OF_DIFFUSERS[name]]
    with pytest.raises(BindError, match=r"attn2\.to_k: lora_A must have (768|1024) inputs, and has") as caught:
        bind(read_adapter(data / "other_formats" / name), shaped_package(tmp_path / "package", other()))
    assert len(caught.value.problems) == 32


def test_a_real_file_with_flat_names_reaches_the_same_modules(data: Path, tmp_path: Path) -> None:
    package = shaped_package(tmp_path / "package", stable_diffusion_1())
    flat, dotted = (
        bind(read_adapter(data / "other_formats" / name), package).coverage.applied
        for name in ("diffusers_timohavdk/new.safetensors", "diffusers_wellCh4n_pokemon")
    )
    assert flat == dotted


def test_a_real_file_with_numbers_for_names_reaches_unet_and_text_encoder(data: Path, tmp_path: Path) -> None:
    file = data / "other_formats" / "cloneofsimo" / "lora_disney.safetensors"
    package = shaped_package(tmp_path / "package", stable_diffusion_1())
    with pytest.raises(UnsupportedAdapterError, match="<s1>: is the embedding of a token"):
        read_adapter(file)
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("<")}
    save_file(kept, tmp_path / "it.safetensors")
    coverage = bind(read_adapter(tmp_path / "it.safetensors"), package).coverage
    assert len(coverage.applied) == len(kept) // 2 == 16 * 9 + 12 * 4
    assert {name.split(".")[0] for name in coverage.applied} == {"unet", "text_encoder"}


@pytest.mark.slow
@pytest.mark.skipif("ONNX_LORA_TEST_LARGE" not in os.environ, reason="takes 4 minutes, 10 GB of memory and 9 of disk")
def test_stable_diffusion_1_at_its_full_size(data: Path, tmp_path: Path) -> None:
    """Exported and verified with a point on everything; a real file, delta and folded, against diffusers in PyTorch."""
    make_pipeline(tmp_path / "large", networks=stable_diffusion_1())
    package = export(tmp_path / "large", tmp_path / "package", targets="all")
    assert len(package.graph("unet").points) == 282
    assert all(point.per_row for point in package.graph("unet").points)
    file = data / "other_formats" / "diffusers_wellCh4n_pokemon" / "pytorch_lora_weights.safetensors"
    draw = np.random.default_rng(0)
    feeds = {
        "sample": draw.standard_normal((2, 4, 16, 24), np.float32),
        "timestep": np.array(37, np.float32),
        "encoder_hidden_states": draw.standard_normal((2, 77, 768), np.float32),
    }
    unet = load_pipeline(tmp_path / "large")["unet"]
    base = _noise(unet, feeds)
    _deltas(unet, file)
    expected = _noise(unet, feeds)
    del unet
    assert np.abs(expected - base).max() > 1e-3
    session = AdapterSession(package, graph="unet")
    session.load_adapter("it", file)
    assert_close(session.run(None, feeds, adapter="it")[0], expected)
    assert_close(session.run(None, feeds, adapter=[None, "it"])[0], np.stack([base[0], expected[1]]))
    del session
    assert_close(fold(package, file, graph="unet").run(None, feeds)[0], expected)
