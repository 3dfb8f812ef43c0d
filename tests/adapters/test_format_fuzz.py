"""Damaged and hostile files of every format end in an adapter or in one of our errors, without a memory of their own
choice. `ONNX_LORA_FUZZ=5000` tries that many mutations of each."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from onnx_lora import OnnxLoraError, Package, bind, read_adapter
from onnx_lora.adapters import Delta
from onnx_lora.adapters.formats.diffusers import METADATA
from onnx_lora.adapters.write import write_adapter
from onnx_lora.points import Array
from tests.adapters.building import PackageBuilder, adapter, numbers
from tests.adapters.test_format_gguf import file as gguf_file
from tests.adapters.test_format_others import numbered, onnx_adapter

MUTATIONS = int(os.environ.get("ONNX_LORA_FUZZ", "400"))

# What reading takes beside the file's own bytes: Python's objects, and room for the largest config at once.
ROOM = 24 * 2**20  # bytes

# Numbers that headers should not be believed, as they stand in bytes.
NASTY = [b"\xff" * 8, b"\0" * 8, (2**40).to_bytes(8, "little"), b"9" * 12, b"-1", b'"', b"[" * 40, b"\x80"]


def kohya(folder: Path) -> Path:
    tensors: dict[str, Array] = {}
    for name, values in {"lora_down.weight": numbers(2, 4), "lora_up.weight": numbers(6, 2)}.items():
        tensors[f"lora_unet_a_q.{name}"] = values
        tensors[f"lora_te_b_q.{name}"] = values
    tensors |= {"lora_unet_a_q.alpha": np.array(1, "f4"), "lora_unet_a_q.dora_scale": numbers(6, 1)}
    tensors |= {f"lora_unet_h.hada_w{n}_a": numbers(6, 2) for n in "12"}
    tensors |= {f"lora_unet_h.hada_w{n}_b": numbers(2, 4) for n in "12"}
    tensors |= {"lora_unet_k.lokr_w1": numbers(2, 2), "lora_unet_k.lokr_w2": numbers(3, 2)}
    return stored(folder / "x.safetensors", tensors)


def stored(path: Path, tensors: dict[str, Array], metadata: dict[str, str] | None = None) -> Path:
    path.write_bytes(safetensors.numpy.save(tensors, metadata))
    return path


def diffusers(folder: Path) -> Path:
    tensors = {"unet.a.lora_A.weight": numbers(2, 4), "unet.a.lora_B.weight": numbers(6, 2)}
    tensors |= {"text_encoder.q.lora.down.weight": numbers(2, 4), "text_encoder.q.lora.up.weight": numbers(6, 2)}
    config = {"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["a"], "unet.rank_pattern": {}}
    return stored(folder / "x.safetensors", tensors, {METADATA: json.dumps(config)})


def cloneofsimo(folder: Path) -> Path:
    numbered(folder / "x.safetensors", text=48)
    return folder / "x.safetensors"


def mlx(folder: Path) -> Path:
    own = adapter({"a.q": Delta(numbers(2, 4), numbers(6, 2), 2.0, magnitude=numbers(6))})
    return write_adapter(own, folder / "mlx", format="mlx")


def npz(folder: Path) -> Path:
    out = mlx(folder)
    tensors = safetensors.numpy.load_file(out / "adapters.safetensors")
    (out / "adapters.safetensors").unlink()
    np.savez(out / "adapters.npz", **tensors)
    return out


def gguf(folder: Path) -> Path:
    tensors = {"blk.0.attn_q.weight.lora_a": numbers(2, 4), "blk.0.attn_q.weight.lora_b": numbers(8, 2)}
    tensors |= {"token_embd.weight.lora_a": numbers(9, 2), "token_embd.weight.lora_b": numbers(4, 2)}
    heads = {"llama.attention.head_count": 2}
    return gguf_file(folder / "x.gguf", tensors, arch="llama", fields=heads)


def quantised(folder: Path) -> Path:
    tensors = {"output.weight.lora_a": numbers(32, 32), "output.weight.lora_b": numbers(8, 32)}
    return gguf_file(folder / "x.gguf", tensors, quantised="Q4_0")


def olive(folder: Path) -> Path:
    return onnx_adapter(
        folder / "x.onnx_adapter", {"a.q.lora_A.weight": numbers(4, 2), "a.q.lora_B.weight": numbers(2, 6)}
    )


SAMPLES = (kohya, diffusers, cloneofsimo, mlx, npz, gguf, quantised, olive)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, a piece cut out, put in or copied, or the end cut off; more in front, where headers are."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        end = len(out) if chance.random() < 0.3 else min(len(out), 700)
        place, kind = chance.randrange(max(end, 1)), chance.randrange(6)
        if kind == 0 and out:
            out[place] = chance.randrange(256)
        elif kind == 1:
            del out[place:]
        elif kind == 2:
            del out[place : place + chance.randint(1, 16)]
        elif kind == 3:
            out[place:place] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 16)))
        elif kind == 4:
            nasty = chance.choice(NASTY)
            out[place : place + len(nasty)] = nasty
        else:
            out[place:place] = out[place : place + chance.randint(1, 64)]
    return bytes(out)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    builder = PackageBuilder(tmp_path_factory.mktemp("fuzz") / "package")
    for module in ("a.q", "unet.a.q", "unet.h", "model.layers.0.self_attn.q_proj"):
        builder.point(module, 4, 6)
    return builder.open()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda make: make.__name__)
def test_whatever_is_in_the_file_it_ends_in_an_adapter_or_in_our_errors(
    tmp_path: Path, package: Package, sample: Callable[[Path], Path]
) -> None:
    place = sample(tmp_path)
    read_adapter(place)
    files = [place] if place.is_file() else sorted(place.iterdir())
    whole = {file: file.read_bytes() for file in files}
    chance = random.Random(sample.__name__)
    tracemalloc.start()
    try:
        for _ in range(MUTATIONS):
            file = chance.choice(files)
            file.write_bytes(mutated(whole[file], chance))
            tracemalloc.reset_peak()
            attempt(place, tmp_path / "out", package)
            peak, size = tracemalloc.get_traced_memory()[1], sum(len(own) for own in whole.values())
            assert peak < 2 * size + ROOM, f"{peak} bytes of memory for {size} of files"
            file.write_bytes(whole[file])
    finally:
        tracemalloc.stop()


def attempt(place: Path, out: Path, package: Package) -> None:
    """What can be done with an adapter; whatever the file says, nothing but our errors comes of it."""
    try:
        own = read_adapter(place)
    except OnnxLoraError:
        return
    for use in (
        lambda: bind(own, package),
        lambda: write_adapter(own, out, format="peft"),
        lambda: write_adapter(own, out, format="kohya"),
        lambda: write_adapter(own, out, format="mlx"),
    ):
        try:
            use()
        except OnnxLoraError:
            continue
        finally:
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
