"""Any adapter at all: the output is the float64 oracle's, or one of our errors names the cause."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from onnx_lora import AdapterSession, OnnxLoraError, Package
from onnx_lora.exporter import export
from tests.support.numbers import assert_close
from tests.test_kinds import IDS, Net, _net

# Modules by their weights, as PEFT keeps the factors for them: A's axes behind the rank, and the outputs.
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "embed": ((10,), 8),
    "line": ((8, 3), 6),
    "plane": ((1, 3, 2), 4),
    "transposed": ((20,), 7),
    "head": ((7,), 5),
}
DTYPES = ("float32", "float16", "float64", "bfloat16")
FAULTS = ("none", "none", "none", "missing", "shape", "nan", "unknown", "rank", "integer", "twice")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> AdapterSession:
    out = tmp_path_factory.mktemp("property") / "package"
    names: dict[str, Any] = {"input_names": ["ids"], "output_names": ["tokens", "pooled"]}
    export(_net(), out, example_inputs=(IDS,), targets="all", verify=False, **names)
    return AdapterSession(Package.open(out))


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, Any]:
    modules = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    patterns = draw(st.lists(st.sampled_from(sorted(SHAPES)), unique=True))
    return {
        "modules": modules,
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.sampled_from([0.5, 1, 3, 16])),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": {name: draw(st.integers(1, 6)) for name in patterns},
        "alpha_pattern": {name: draw(st.sampled_from([0.25, 2, 7.5])) for name in patterns[::2]},
        "prefix": draw(st.sampled_from(["base_model.model.", "", "base_model.model.base_model.model."])),
        "name": draw(st.sampled_from(["", "default", "mine"])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "fault": draw(st.sampled_from(FAULTS)),
        "seed": draw(st.integers(0, 2**16)),
    }


def _factors(drawn: dict[str, Any]) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    random, made = np.random.default_rng(drawn["seed"]), {}
    kind = ml_dtypes.bfloat16 if drawn["dtype"] == "bfloat16" else np.dtype(drawn["dtype"])
    for module in drawn["modules"]:
        inputs, outputs = SHAPES[module]
        rank = drawn["rank_pattern"].get(module, drawn["r"])
        spatial = (1,) * (len(inputs) - 1)
        made[module] = (
            random.standard_normal((rank, *inputs)).astype(kind),
            random.standard_normal((outputs, rank, *spatial)).astype(kind),
        )
    return made


def _keys(drawn: dict[str, Any], module: str) -> tuple[str, str]:
    middle = f".{drawn['name']}" if drawn["name"] else ""
    if module == "embed":
        return tuple(f"{drawn['prefix']}{module}.lora_embedding_{side}{middle}" for side in "AB")  # type: ignore[return-value]
    return tuple(f"{drawn['prefix']}{module}.lora_{side}{middle}.weight" for side in "AB")  # type: ignore[return-value]


def _write(drawn: dict[str, Any], folder: Path) -> str | None:
    """Write the folder; gives what an error must name, where the fault is one."""
    tensors: dict[str, Any] = {}
    for module, pair in _factors(drawn).items():
        tensors.update(zip(_keys(drawn, module), pair, strict=True))
    module = drawn["modules"][0]
    key_a, key_b = _keys(drawn, module)
    config = {key: drawn[key] for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")}
    config |= {"peft_type": "LORA", "target_modules": list(drawn["modules"]), "bias": "none"}
    cause: str | None = module
    match drawn["fault"]:
        case "missing":
            del tensors[key_b]
        case "shape":
            tensors[key_b] = np.concatenate([tensors[key_b], tensors[key_b][:1]])
        case "nan":
            tensors[key_a].reshape(-1)[0] = math.nan
        case "unknown":
            tensors["base_model.model.head.lora_C.weight"] = np.ones((2, 2), np.float32)
            cause = "lora_C"
        case "rank":
            config["rank_pattern"] = drawn["rank_pattern"] | {module: len(tensors[key_a]) + 1}
        case "integer":
            tensors[key_a] = np.ones(tensors[key_a].shape, np.int64)
        case "twice":
            tensors[f"{drawn['prefix']}other.{key_a.removeprefix(drawn['prefix'])}"] = tensors[key_a] * 2
            cause = "other"
        case _:
            cause = None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return cause


def _oracle(drawn: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """The model in float64 with W0 + scale · B · A as its weights."""
    net: Net = _net().double()
    for module, (a, b) in _factors(drawn).items():
        alpha = next((v for k, v in drawn["alpha_pattern"].items() if re.match(rf"(.*\.)?({k})$", module)), None)
        scale = (drawn["lora_alpha"] if alpha is None else alpha) / (
            math.sqrt(len(a)) if drawn["use_rslora"] else len(a)
        )
        product = torch.from_numpy(
            scale * b.astype(np.float64).reshape(len(b), -1) @ a.astype(np.float64).reshape(len(a), -1)
        )
        weight = net.get_submodule(module).weight.data
        weight += (
            product.T.reshape(weight.shape) if module in ("embed", "transposed") else product.reshape(weight.shape)
        )
    with torch.inference_mode():
        return [value.numpy() for value in net(IDS)]


def _load(session: AdapterSession, folder: str) -> OnnxLoraError | None:
    try:
        session.load_adapter("drawn", folder)
    except OnnxLoraError as error:
        return error
    return None


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=adapters())
def test_the_output_is_the_oracles_or_the_error_names_the_cause(session: AdapterSession, drawn: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        cause = _write(drawn, Path(folder))
        error = _load(session, folder)
    if error is not None:
        assert cause is not None, f"refused without a fault: {error}"
        assert cause in str(error), f"{cause!r} is not named: {error}"
        return
    try:
        assert cause is None, f"{drawn['fault']} went through"
        for actual, expected in zip(
            session.run(None, {"ids": IDS.numpy()}, adapter="drawn"), _oracle(drawn), strict=True
        ):
            assert_close(actual, expected)
    finally:
        session.unload_adapter("drawn")
