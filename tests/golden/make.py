"""Make the golden packages of the format that the onnx_lora on the path writes: `python tests/golden/make.py FOLDER`.

Each folder beside the others holds what one version wrote and computed, and is never made again: today's code must
open it and give the same. A new format gets a folder of its own; the script stays as it is, or the folders of one
script would hold different models.

    FOLDER/NAME/package/               what `attach` wrote
    FOLDER/NAME/ADAPTER/               an adapter as PEFT writes it
    FOLDER/NAME/ADAPTER.safetensors    the same, converted for the package, and as .onnx_adapter
    FOLDER/NAME/outputs.npz            feeds, and what was computed: `base`, `ADAPTER`, `ADAPTER folded`, `rows`
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from onnx_lora import AdapterSession, Package, bind, fold, read_adapter, write_bound
from onnx_lora.exporter import attach

Tensors = Mapping[str, np.ndarray[Any, Any]]

node = helper.make_node


@dataclass(frozen=True)
class Model:
    """A graph, how points are attached to it, and adapters of it. `unfoldable`: adapters that no fold can hold."""

    nodes: Sequence[onnx.NodeProto]
    weights: Tensors
    feeds: Tensors
    output: Sequence[int | str]
    attach: Mapping[str, Any]
    adapters: Mapping[str, tuple[Mapping[str, Any], Tensors]]
    checkpoint: Tensors | None = None
    unfoldable: Sequence[str] = ()
    rows: Sequence[str | None] = ()


def numbers(*shape: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def text() -> Model:
    """Two tables, a norm, packed q, k and v, a weight that torch keeps `[in, out]`, and a head with a bias: every role
    of whole weights, and DoRA."""
    table, norm = numbers(11, 8, seed=1), numbers(8, seed=2)
    q, k, v = (numbers(8, 8, seed=seed) for seed in (3, 4, 5))
    lift, positions = numbers(8, 6, seed=8), numbers(11, 8, seed=9)
    score, bias = numbers(3, 6, seed=6), numbers(3, seed=7)
    attention = "model.layers.0.self_attn"
    checkpoint = {
        "model.embed_tokens.weight": table,
        "model.positions.weight": positions,
        "model.norm.weight": norm,
        "model.lift.weight": lift,
        f"{attention}.q_proj.weight": q,
        f"{attention}.k_proj.weight": k,
        f"{attention}.v_proj.weight": v,
        "score.weight": score,
        "score.bias": bias,
    }
    nodes = [
        node("Gather", ["model.embed_tokens.weight", "ids"], ["embedded"], name="/model/embed_tokens/Gather"),
        node("Gather", ["model.positions.weight", "ids"], ["placed"], name="/model/positions/Gather"),
        node("Add", ["embedded", "placed"], ["summed"]),
        node("Mul", ["summed", "model.norm.weight"], ["normed"], name="/model/norm/Mul"),
        node("MatMul", ["normed", "qkv"], ["packed"], name="/model/layers.0/self_attn/qkv_proj/MatMul"),
        node("Split", ["packed"], ["q", "k", "v"], axis=-1, num_outputs=3),
        node("Mul", ["q", "k"], ["qk"]),
        node("Tanh", ["qk"], ["gate"]),
        node("Add", ["gate", "v"], ["mixed"]),
        node("MatMul", ["mixed", "lift"], ["lifted"], name="/model/lift/MatMul"),
        node("MatMul", ["lifted", "score_t"], ["product"], name="/score/MatMul"),
        node("Add", ["product", "score.bias"], ["y"], name="/score/Add"),
    ]
    weights = {
        "model.embed_tokens.weight": table,
        "model.positions.weight": positions,
        "model.norm.weight": norm,
        "lift": lift,
        "qkv": np.concatenate([q.T, k.T, v.T], axis=1),
        "score_t": np.ascontiguousarray(score.T),
        "score.bias": bias,
    }
    lora = {
        f"{attention}.q_proj.lora_A.weight": numbers(2, 8, seed=10),
        f"{attention}.q_proj.lora_B.weight": numbers(8, 2, seed=11),
        f"{attention}.v_proj.lora_A.weight": numbers(2, 8, seed=12),
        f"{attention}.v_proj.lora_B.weight": numbers(8, 2, seed=13),
        "model.embed_tokens.lora_embedding_A": numbers(2, 11, seed=14),
        "model.embed_tokens.lora_embedding_B": numbers(8, 2, seed=15),
        "model.norm.weight": numbers(8, seed=16),
        "score.weight": numbers(4, 6, seed=17),
        "score.bias": numbers(4, seed=18),
    }
    dora = {
        f"{attention}.k_proj.lora_A.weight": numbers(3, 8, seed=20),
        f"{attention}.k_proj.lora_B.weight": numbers(8, 3, seed=21),
        f"{attention}.k_proj.lora_magnitude_vector": np.abs(numbers(8, seed=22)) + 1,
        "model.embed_tokens.weight": numbers(11, 8, seed=23),
        "model.positions.weight": numbers(13, 8, seed=24),
        "model.lift.weight": numbers(8, 6, seed=25),
    }
    head = {name: tensor for name, tensor in lora.items() if "norm" not in name}
    of_dora = {"target_modules": ["k_proj"], "r": 3, "lora_alpha": 3, "use_dora": True}
    of_dora["modules_to_save"] = ["embed_tokens", "positions", "lift"]
    wanted = ["q_proj", "v_proj", "embed_tokens"]
    return Model(
        nodes,
        weights,
        {"ids": np.array([[3, 1, 4, 1], [5, 9, 2, 6]])},
        ["batch", "seq", 3],
        {
            "targets": ["q_proj", "k_proj", "v_proj", "embed_tokens"],
            "replaceable": ["score", "norm", "embed_tokens", "positions", "lift"],
            "dora": True,
        },
        {
            "lora": ({"target_modules": wanted, "modules_to_save": ["score", "norm"]}, lora),
            "head": ({"target_modules": wanted, "modules_to_save": ["score"]}, head),
            "dora": (of_dora, dora),
        },
        checkpoint,
        rows=["head", None],
    )


def vision() -> Model:
    """Two convolutions, one in groups, and a table of positions that is replaceable."""
    nodes = [
        node("Conv", ["x", "conv.weight", "conv.bias"], ["h"], name="/conv/Conv", pads=[1, 1, 1, 1]),
        node("Tanh", ["h"], ["t"]),
        node("Conv", ["t", "grouped.weight"], ["y"], name="/grouped/Conv", group=2),
    ]
    weights = {
        "conv.weight": numbers(6, 4, 3, 3, seed=1),
        "conv.bias": numbers(6, seed=2),
        "grouped.weight": numbers(6, 3, 1, 1, seed=3),
    }
    conv = {"conv.lora_A.weight": numbers(2, 4, 3, 3, seed=10), "conv.lora_B.weight": numbers(6, 2, 1, 1, seed=11)}
    grouped = {
        "grouped.lora_A.weight": numbers(2, 6, 1, 1, seed=12),
        "grouped.lora_B.weight": numbers(6, 1, 1, 1, seed=13),
    }
    return Model(
        nodes,
        weights,
        {"x": numbers(2, 4, 5, 5, seed=9)},
        ["batch", 6, 5, 5],
        {"targets": "all"},
        {
            "conv": ({"target_modules": ["conv"]}, conv),
            "both": ({"target_modules": ["conv", "grouped"]}, {**conv, **grouped}),
        },
        unfoldable=["both"],
        rows=["conv", "both"],
    )


def quantized() -> Model:
    """MatMulNBits in 4 bits with zero points, and MatMul over DequantizeLinear with a scale for each output."""
    attributes = {"K": 32, "N": 6, "bits": 4, "block_size": 16}
    nodes = [
        node("MatMulNBits", ["x", "b", "s", "z"], ["h"], "/up/MatMul", domain="com.microsoft", **attributes),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wide"], name="/down/DequantizeLinear", axis=1),
        node("MatMul", ["h", "wide"], ["y"], name="/down/MatMul"),
    ]
    random = np.random.default_rng(8)
    weights = {
        "b": random.integers(0, 256, (6, 2, 8), dtype=np.uint8),
        "s": np.abs(numbers(12, seed=1)) / 8 + np.float32(0.01),
        "z": random.integers(0, 256, 6, dtype=np.uint8),
        "w": random.integers(-127, 128, (6, 8), dtype=np.int8),
        "ws": np.abs(numbers(8, seed=2)) / 100 + np.float32(0.001),
        "wz": random.integers(-9, 10, 8, dtype=np.int8),
    }
    lora = {
        "up.lora_A.weight": numbers(2, 32, seed=10),
        "up.lora_B.weight": numbers(6, 2, seed=11),
        "down.lora_A.weight": numbers(2, 6, seed=12),
        "down.lora_B.weight": numbers(8, 2, seed=13),
    }
    return Model(
        nodes,
        weights,
        {"x": numbers(2, 3, 32, seed=9)},
        ["batch", "seq", 8],
        {},
        {"lora": ({"target_modules": ["up", "down"]}, lora)},
        unfoldable=["lora"],
        rows=["lora", None],
    )


MODELS = {"text": text, "vision": vision, "quantized": quantized}


def main() -> None:
    out = Path(sys.argv[1])
    for name, model in MODELS.items():
        make(model(), out / name)


def make(model: Model, out: Path) -> None:
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        given = dict(model.attach)
        if model.checkpoint is not None:
            given["checkpoint"] = _write_checkpoint(model.checkpoint, Path(scratch) / "checkpoint")
        attach(_write_graph(model, Path(scratch) / "model.onnx"), out / "package", **given)
    for name, (config, tensors) in model.adapters.items():
        _write_peft(config, tensors, out / name)
    np.savez(out / "outputs.npz", **{f"feeds {name}": value for name, value in model.feeds.items()}, **run(model, out))


def run(model: Model, out: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What this version computes, and on the way the adapters as it converts them."""
    package = Package.open(out / "package")
    session = AdapterSession(package)
    found = {"base": session.run(None, model.feeds)[0]}
    for name in model.adapters:
        bound = bind(read_adapter(out / name), package, **_allowing(bind))
        write_bound(bound, out / f"{name}.safetensors")
        session.load_adapter(name, bound, **_allowing(session.load_adapter))
        found[name] = session.run(None, model.feeds, adapter=name)[0]
        if name not in model.unfoldable:
            folded = fold(package, out / name, **_allowing(fold))
            found[f"{name} folded"] = folded.run(None, dict(model.feeds))[0]
        if not bound.coverage.fold_only:
            write_bound(bound, out / f"{name}.onnx_adapter", format="onnx_adapter")
    found["rows"] = session.run(None, model.feeds, adapter=list(model.rows))[0]
    return found | {"onnxruntime": np.array(onnxruntime.__version__)}


def _allowing(function: Any) -> dict[str, bool]:
    """Format 3 asked for no leave."""
    return {"allow_unproven": True} if "allow_unproven" in inspect.signature(function).parameters else {}


def _write_graph(model: Model, file: Path) -> Path:
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    inputs = []
    for name, value in model.feeds.items():
        shape = ["batch", *value.shape[1:]] if value.ndim == 4 else ["batch", "seq", *value.shape[2:]]
        inputs.append(helper.make_tensor_value_info(name, types[value.dtype], shape))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(model.output))
    weights = [numpy_helper.from_array(value, name) for name, value in model.weights.items()]
    graph = helper.make_graph(list(model.nodes), "graph", inputs, [output], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    return file


def _write_checkpoint(tensors: Tensors, folder: Path) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "golden", "tie_word_embeddings": False}))
    return folder


def _write_peft(config: Mapping[str, Any], tensors: Tensors, folder: Path) -> None:
    folder.mkdir()
    whole = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "golden", **config}
    (folder / "adapter_config.json").write_text(json.dumps(whole, indent=1))
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
