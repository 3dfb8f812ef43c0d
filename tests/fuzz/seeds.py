"""The whole files that mutants are made of: small, and one sample of everything that a reader tells apart. A function
here writes samples into a folder, each in a folder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

from onnx_lora import bind, write_bound
from onnx_lora.adapters import Delta
from onnx_lora.adapters.formats.diffusion.diffusers_names import METADATA
from onnx_lora.adapters.write import write_adapter
from onnx_lora.exporter import attach
from onnx_lora.exporter.quantization import Method, quantize
from onnx_lora.package import Package
from onnx_lora.points import Array
from tests.adapters.building import PackageBuilder, adapter, lora, numbers, peft_folder
from tests.support.graphs import random, save

__all__ = [
    "adapter_package",
    "checkpoints",
    "converted",
    "decoders",
    "diffusion_files",
    "exports",
    "ggufs",
    "graphs",
    "kohya_files",
    "manifests",
    "mlx_folders",
    "packages",
    "peft_folders",
    "peft_methods",
    "peft_pickles",
    "texts",
]

node = helper.make_node


def stored(path: Path, tensors: Mapping[str, Array], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors.numpy.save(dict(tensors), metadata))
    return path


# --- adapters ------------------------------------------------------------------------------------


def adapter_package(folder: Path) -> Package:
    """What adapters are bound to; most names of the samples are points of it."""
    builder = PackageBuilder(folder)
    for module in ("m.q", "m.v", "a.q", "unet.a.q", "unet.h", "model.layers.0.self_attn.q_proj"):
        builder.point(module, 4, 6)
    builder.point("0.up", 12, 24).point("0.down", 24, 12).table("m.emb", 10, 4, seed=3)
    builder.weight("score.weight", 4, 3, free=True).bias("score.bias", 3, free=True).whole("norm.weight", 4)
    return builder.open()


def peft_folders(folder: Path) -> None:
    peft_folder(folder / "plain")
    dora = lora("m.q", 4, 6) | {"base_model.model.m.q.lora_magnitude_vector": numbers(6)}
    peft_folder(folder / "dora", dora, use_dora=True, use_rslora=True, target_modules="m\\.(q|v)")
    heads = {"base_model.model.score.weight": numbers(3, 4), "base_model.model.score.bias": numbers(3)}
    tokens = {"base_model.model.m.emb.token_adapter.trainable_tokens_delta": numbers(2, 4)}
    peft_folder(folder / "heads", lora("m.q", 4, 6) | heads, modules_to_save=["score"], task_type="SEQ_CLS")
    peft_folder(folder / "tokens", lora("m.q", 4, 6) | tokens, trainable_token_indices={"emb": [1, 9]})
    patterns = {
        "rank_pattern": {"m.v": 3, r".*\.k$": 5},
        "alpha_pattern": {r"^m\.v": 7},
        "exclude_modules": r".*\.k",
        "layers_to_transform": [0],
        "layers_pattern": "layers",
        "target_modules": ["q", "v"],
    }
    both = lora("layers.0.q", 4, 6) | lora("layers.0.v", 4, 6, rank=3)
    peft_folder(folder / "patterns", both, **(patterns | {"rank_pattern": {"v": 3}}))
    peft_folder(folder / "embedding", {
        "base_model.model.m.emb.lora_embedding_A": numbers(2, 10),
        "base_model.model.m.emb.lora_embedding_B": numbers(4, 2),
    }, target_modules=["emb"])  # fmt: skip


def _net() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(
        nn.ModuleDict({"up": nn.Linear(12, 24), "down": nn.Linear(24, 12, bias=False)})  # never called
    )


def peft_methods(folder: Path) -> None:
    """One folder of each of PEFT's methods, as PEFT saves it."""
    import peft

    both = ["up", "down"]
    configs: dict[str, Any] = {
        "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=both, init_weights=False),
        "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=both, init_weights=False),
        "ia3": peft.IA3Config(target_modules=both, feedforward_modules=["down"]),
        "oft": peft.OFTConfig(oft_block_size=4, target_modules=both),
        "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["up"]),
        "vera": peft.VeraConfig(r=4, target_modules=["up"], save_projection=True),
        "randlora": peft.RandLoraConfig(r=4, target_modules=["up"], save_projection=True),
        "hra": peft.HRAConfig(r=2, target_modules=both),
        "fourierft": peft.FourierFTConfig(n_frequency=20, target_modules=both),
        "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=both),
        "vblora": peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, target_modules=["up"]),
        "miss": peft.MissConfig(r=2, target_modules=["up"]),
        "shira": peft.ShiraConfig(r=2, target_modules=["up"]),
        "c3a": peft.C3AConfig(block_size=4, target_modules=["up"]),
        "lora bias": peft.LoraConfig(r=2, target_modules=["up"], lora_bias=True, bias="lora_only"),
    }
    for name, config in configs.items():
        peft.get_peft_model(_net(), config).save_pretrained(folder / name)
        (folder / name / "README.md").unlink(missing_ok=True)


def peft_pickles(folder: Path) -> None:
    """`adapter_model.bin`, in both of torch's layouts."""
    import torch

    state = {name: torch.from_numpy(values) for name, values in lora("m.q", 4, 6).items()}
    state["base_model.model.score.weight"] = torch.ones(3, 4, dtype=torch.bfloat16).T.contiguous().T
    for name, zipped in (("zip", True), ("legacy", False)):
        place = peft_folder(folder / name, modules_to_save=["score"])
        (place / "adapter_model.safetensors").unlink()
        torch.save(state, place / "adapter_model.bin", _use_new_zipfile_serialization=zipped)


def kohya_files(folder: Path) -> None:
    """kohya's LoRA, LyCORIS's LoHa, LoKr, full and norm, cloneofsimo's numbered modules, sgm's names."""
    from tests.adapters.test_format_others import numbered  # loads torch

    tensors: dict[str, Array] = {}
    for name, values in {"lora_down.weight": numbers(2, 4), "lora_up.weight": numbers(6, 2)}.items():
        tensors[f"lora_unet_a_q.{name}"] = values
        tensors[f"lora_te_b_q.{name}"] = values
    tensors |= {"lora_unet_a_q.alpha": np.array(1, "f4"), "lora_unet_a_q.dora_scale": numbers(6, 1)}
    tensors |= {f"lora_unet_h.hada_w{n}_a": numbers(6, 2) for n in "12"}
    tensors |= {f"lora_unet_h.hada_w{n}_b": numbers(2, 4) for n in "12"}
    tensors |= {"lora_unet_k.lokr_w1": numbers(2, 2), "lora_unet_k.lokr_w2": numbers(3, 2)}
    tensors |= {"lora_unet_f.diff": numbers(6, 4), "lora_unet_n.w_norm": numbers(4), "lora_unet_n.b_norm": numbers(4)}
    stored(folder / "kohya" / "x.safetensors", tensors, {"ss_network_args": '{"rank_dropout": "0.1"}'})
    block = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    sgm = {f"{block}.lora_down.weight": numbers(2, 4), f"{block}.lora_up.weight": numbers(6, 2)}
    conv = "lora_unet_input_blocks_1_0_in_layers_2"
    sgm |= {f"{conv}.lora_down.weight": numbers(2, 4, 3, 3), f"{conv}.lora_up.weight": numbers(6, 2, 1, 1)}
    stored(folder / "sgm" / "x.safetensors", sgm)
    (folder / "cloneofsimo").mkdir()
    numbered(folder / "cloneofsimo" / "x.safetensors", text=48)


def diffusion_files(folder: Path) -> None:
    from tests.adapters.test_format_others import onnx_adapter  # loads torch

    tensors = {"unet.a.lora_A.weight": numbers(2, 4), "unet.a.lora_B.weight": numbers(6, 2)}
    tensors |= {"text_encoder.q.lora.down.weight": numbers(2, 4), "text_encoder.q.lora.up.weight": numbers(6, 2)}
    config = {"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["a"], "unet.rank_pattern": {"a": 2}}
    stored(folder / "diffusers" / "x.safetensors", tensors, {METADATA: json.dumps(config)})
    pair = {"a.q.lora_A.weight": numbers(4, 2), "a.q.lora_B.weight": numbers(2, 6)}
    (folder / "olive").mkdir()
    onnx_adapter(folder / "olive" / "x.onnx_adapter", pair)


def mlx_folders(folder: Path) -> None:
    own = adapter({"a.q": Delta(numbers(2, 4), numbers(6, 2), 2.0, magnitude=numbers(6))})
    write_adapter(own, folder / "safetensors", format="mlx")
    shutil.copytree(folder / "safetensors", folder / "npz")
    weights = folder / "npz" / "adapters.safetensors"
    np.savez(folder / "npz" / "adapters.npz", **safetensors.numpy.load_file(weights))
    weights.unlink()


def ggufs(folder: Path) -> None:
    from tests.adapters.test_format_gguf import file as gguf_file  # loads torch

    tensors = {"blk.0.attn_q.weight.lora_a": numbers(2, 4), "blk.0.attn_q.weight.lora_b": numbers(8, 2)}
    tensors |= {"token_embd.weight.lora_a": numbers(9, 2), "token_embd.weight.lora_b": numbers(4, 2)}
    for name in ("float", "list", "Q4_0", "Q8_0"):
        (folder / name).mkdir()
    gguf_file(folder / "float" / "x.gguf", tensors, arch="llama", fields={"llama.attention.head_count": 2})
    gguf_file(folder / "list" / "x.gguf", tensors, arch="qwen2", fields={"general.numbers": [1, 2]})
    blocks = {"output.weight.lora_a": numbers(32, 32), "output.weight.lora_b": numbers(8, 32)}
    for kind in ("Q4_0", "Q8_0"):
        gguf_file(folder / kind / "x.gguf", blocks, quantized=kind)


def converted(folder: Path) -> None:
    """Bound adapters as we write them."""
    package = adapter_package(folder / "package")
    whole = {"score.weight": numbers(3, 4), "score.bias": numbers(3), "norm.weight": numbers(4)}
    deltas = {"m.q": Delta(numbers(2, 4), numbers(6, 2), 0.5), "m.v": Delta(numbers(2, 4), numbers(6, 2), 1.0)}
    bound = bind(adapter(deltas, whole, name="sql"), package)
    for kind in ("safetensors", "onnx_adapter"):
        (folder / kind).mkdir()
        write_bound(bound, folder / kind / f"x.{kind}", format=kind)  # type: ignore[arg-type]
    shutil.rmtree(folder / "package")


# --- packages' own files -------------------------------------------------------------------------


def manifests(folder: Path) -> None:
    """Packages that are opened and not run: their graphs may be anything. Those of every format are among them."""
    for golden in (Path(__file__).parent.parent / "golden").glob("format-*/*/package"):
        version, name = golden.parts[-3:-1]
        shutil.copytree(golden, folder / f"{version}-{name}")
    adapter_package(folder / "float")
    source = save(
        folder / "m.onnx",
        [node("MatMul", ["x", "w"], ["y"], name="/m/q/MatMul")],
        {"w": random(40, 24)},
        inputs={"x": ["batch", "seq", 40]},
        outputs={"y": ["batch", "seq", 24]},
        opset=21,
    )
    made = attach(source, folder / "made")
    quantize(made, folder / "blocks", method=Method(bits=4, block_size=16))
    quantize(made, folder / "dynamic", method=Method("dynamic", 8))
    source.unlink()


def texts(folder: Path) -> None:
    """What says how text is generated: settings, a tokenizer, chat templates."""
    _settings(folder / "settings")
    _settings(folder / "template")
    (folder / "template" / "chat_template.jinja").write_text(_TEMPLATE)


_TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}\n{% endfor %}"


def _settings(place: Path) -> None:
    place.mkdir(parents=True)
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    decoder = {
        "head_size": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "inputs": inputs | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    _json(
        place / "genai_config.json",
        {"model": {"type": "llama", "eos_token_id": [2, 3], "context_length": 64, "decoder": decoder}},
    )
    _json(place / "generation_config.json", {"eos_token_id": 2})
    _json(place / "config.json", {"hidden_size": 8, "num_attention_heads": 2, "n_positions": 64, "text_config": {}})
    _json(place / "tokenizer.json", _tokenizer())
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    _json(place / "tokenizer_config.json", {"chat_template": [{"name": "default", "template": _TEMPLATE}], **tokens})
    _json(place / "special_tokens_map.json", tokens)


def _tokenizer() -> dict[str, Any]:
    words = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 1, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {word: index for index, word in enumerate(words)}, "merges": [["a", "b"]],
        },
    }  # fmt: skip


def _json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


# --- graphs --------------------------------------------------------------------------------------

_X = {"x": ["batch", "seq", 8]}
_Y = {"y": ["batch", "seq", 8]}


def _mlp() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="/m/up/MatMul"),
        node("Add", ["h", "b1"], ["g"], name="/m/up/Add"),
        node("Tanh", ["g"], ["t"]),
        node("MatMul", ["t", "w2"], ["y"], name="/m/down/MatMul"),
    ]
    return nodes, {"w1": random(8, 12), "b1": random(12), "w2": random(12, 8)}


def graphs(folder: Path) -> None:
    """ONNX files as others export them, each with something that attaching must look at."""
    nodes, weights = _mlp()
    for name, external in (("inline", False), ("external", True)):
        save(folder / name / "m.onnx", nodes, weights, inputs=_X, outputs=_Y, external=external)
    _gemm(folder / "gemm")
    _convolution(folder / "conv")
    _branches(folder / "subgraph")
    _function(folder / "function")
    _decoder(folder / "decoder")
    manifest_free = attach(folder / "inline" / "m.onnx", folder / "package")
    quantized = quantize(manifest_free, folder / "quantized package", method=Method(bits=8, block_size=16))
    dynamic = quantize(manifest_free, folder / "dynamic package", method=Method("dynamic", 8))
    for name, package in (("blocks", quantized), ("dynamic", dynamic)):
        (folder / name).mkdir()
        shutil.copyfile(package.path / package.graph().base_file, folder / name / "m.onnx")
        for data in package.path.glob("*.data"):
            shutil.copyfile(data, folder / name / data.name)
    for made in ("package", "quantized package", "dynamic package"):
        shutil.rmtree(folder / made)


def _gemm(folder: Path) -> None:
    nodes = [
        node("Gather", ["m.emb.weight", "ids"], ["e"], name="/m/emb/Gather"),
        node("ReduceMean", ["e", "axis"], ["p"], keepdims=0),
        node("Gemm", ["p", "m.q.weight", "m.q.bias"], ["h"], name="/m/q/Gemm", transB=1),
        node("Relu", ["h"], ["r"]),
        node("Gemm", ["r", "score.weight", "score.bias"], ["y"], name="/score/Gemm", transB=1),
    ]
    weights: dict[str, Array] = {"m.emb.weight": random(10, 8), "axis": np.array([1]), "m.q.weight": random(6, 8)}
    weights |= {"m.q.bias": random(6), "score.weight": random(3, 6), "score.bias": random(3)}
    save(folder / "m.onnx", nodes, weights, inputs={"ids": ["batch", "seq"]}, outputs={"y": ["batch", 3]})


def _convolution(folder: Path) -> None:
    nodes = [
        node("Conv", ["x", "c1.weight", "c1.bias"], ["h"], name="/c1/Conv", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        node("Relu", ["h"], ["r"]),
        node("Conv", ["r", "c2.weight"], ["y"], name="/c2/Conv", group=2, strides=[1, 1]),
    ]
    weights = {"c1.weight": random(4, 3, 3, 3), "c1.bias": random(4), "c2.weight": random(4, 2, 1, 1)}
    shapes = {"inputs": {"x": ["batch", 3, "h", "w"]}, "outputs": {"y": ["batch", 4, "h", "w"]}}
    save(folder / "m.onnx", nodes, weights, **shapes)  # type: ignore[arg-type]


def _branches(folder: Path) -> None:
    inside = helper.make_graph(
        [node("MatMul", ["h", "w2"], ["then"], name="/m/then/MatMul")],
        "then",
        [],
        [helper.make_tensor_value_info("then", TensorProto.FLOAT, ["batch", "seq", 8])],
        [numpy_helper.from_array(random(8, 8), "w2")],
    )
    other = helper.make_graph(
        [node("Identity", ["h"], ["else"])],
        "else",
        [],
        [helper.make_tensor_value_info("else", TensorProto.FLOAT, ["batch", "seq", 8])],
    )
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="/m/q/MatMul"),
        node("ReduceSum", ["h"], ["total"], keepdims=0),
        node("Greater", ["total", "zero"], ["flag"]),
        node("If", ["flag"], ["y"], then_branch=inside, else_branch=other),
    ]
    save(folder / "m.onnx", nodes, {"w1": random(8, 8), "zero": np.float32(0)}, inputs=_X, outputs=_Y)


def _function(folder: Path) -> None:
    """Local functions, one of them called by another and of another opset version than the graph."""
    inner = helper.make_function(
        "local", "Inner", ["a", "b"], ["c"], [node("MatMul", ["a", "b"], ["c"])], [helper.make_opsetid("", 17)]
    )
    outer = helper.make_function(
        "local",
        "Outer",
        ["a", "b"],
        ["d"],
        [node("Inner", ["a", "b"], ["c"], domain="local"), node("Tanh", ["c"], ["d"])],
        [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)],
    )
    graph = helper.make_graph(
        [node("Outer", ["x", "m.q.weight"], ["y"], domain="local", name="/m/q/Outer")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", 8])],
        [numpy_helper.from_array(random(8, 8), "m.q.weight")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    folder.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[inner, outer], ir_version=8), folder / "m.onnx")


def checkpoints(folder: Path) -> None:
    """A graph that lost its names, and the checkpoint it was made from: whole, in shards, and for int8 weights."""
    nodes, weights = _mlp()
    for each in nodes:
        each.name = ""
    tensors = {
        "m.up.weight": weights["w1"].T.copy(),
        "m.up.bias": weights["b1"],
        "m.down.weight": weights["w2"].T.copy(),
    }
    for name in ("whole", "shards", "packed"):
        place = folder / name
        save(place / "m.onnx", nodes, weights, inputs=_X, outputs=_Y)
        checkpoint = place / "checkpoint"
        checkpoint.mkdir()
        _json(
            checkpoint / "config.json", {"architectures": ["Net"], "hidden_size": 8, "transformers_version": "4.57.0"}
        )
    stored(folder / "whole" / "checkpoint" / "model.safetensors", tensors)
    parts = {"m.gate.weight": tensors["m.up.weight"][:5].copy(), "m.up.weight": tensors["m.up.weight"][5:].copy()}
    stored(folder / "packed" / "checkpoint" / "model.safetensors", parts | {"m.down.weight": tensors["m.down.weight"]})
    shards = {f"model-{index}.safetensors": name for index, name in enumerate(tensors)}
    for file, name in shards.items():
        stored(folder / "shards" / "checkpoint" / file, {name: tensors[name]})
    index = {"weight_map": {name: file for file, name in shards.items()}, "metadata": {}}
    _json(folder / "shards" / "checkpoint" / "model.safetensors.index.json", index)


def packages(folder: Path) -> None:
    """Packages that are opened, run and folded."""
    made = folder / "made"
    graphs(made)
    for name, options in (("inline", {}), ("gemm", {"replaceable": ["score"]}), ("conv", {}), ("blocks", {})):
        attach(made / name / "m.onnx", folder / name, targets="all", dora=name == "inline", **options)  # type: ignore[arg-type]
    shutil.rmtree(made)


def decoders(folder: Path) -> None:
    """A package of a decoder."""
    _decoder(folder / "source")
    attach(folder / "source" / "m.onnx", folder / "decoder")
    shutil.rmtree(folder / "source")


def _decoder(folder: Path) -> None:
    """A decoder with a cache, and all that says how text is made with it."""
    nodes = [
        node("Gather", ["embed.weight", "input_ids"], ["e"], name="/embed/Gather"),
        node("MatMul", ["e", "k.weight_t"], ["k"], name="/k/MatMul"),
        node("Reshape", ["k", "heads"], ["k4"]),
        node("Transpose", ["k4"], ["kt"], perm=[0, 2, 1, 3]),
        node("Concat", ["past_key_values.0.key", "kt"], ["present.0.key"], axis=2),
        node("Concat", ["past_key_values.0.value", "kt"], ["present.0.value"], axis=2),
        node("MatMul", ["k", "head_t"], ["logits"], name="/lm_head/MatMul"),
    ]
    weights: dict[str, Array] = {"embed.weight": random(7, 8), "k.weight_t": random(8, 8), "head_t": random(8, 7)}
    weights["heads"] = np.array([0, 0, 2, 4])
    past = helper.make_tensor_value_info
    inputs = [past(name, TensorProto.INT64, ["batch", "seq"]) for name in ("input_ids", "attention_mask")]
    inputs += [past(f"past_key_values.0.{kv}", TensorProto.FLOAT, ["batch", 2, "past", 4]) for kv in ("key", "value")]
    outputs = [past("logits", TensorProto.FLOAT, ["batch", "seq", 7])]
    outputs += [past(f"present.0.{kv}", TensorProto.FLOAT, ["batch", 2, "total", 4]) for kv in ("key", "value")]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, tensors)
    _settings(folder)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), folder / "m.onnx")


def exports(folder: Path) -> None:
    """Checkpoints of transformers."""
    import transformers as hf

    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    made: dict[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=20, **small)),
        "bert": lambda: hf.BertForSequenceClassification(
            hf.BertConfig(vocab_size=20, max_position_embeddings=32, pad_token_id=0, **small)
        ),
    }
    for name, make in made.items():
        make().save_pretrained(folder / name)
