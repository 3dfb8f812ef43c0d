"""Which exporter a checkpoint goes to, when nobody said so. It reads configs; it exports nothing."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

from onnx_lora.errors import MissingDependencyError, ModelError
from onnx_lora.exporter.frontends.diffusion import is_pipeline
from onnx_lora.exporter.frontends.huggingface import config_of
from onnx_lora.exporter.frontends.newer import translated_config
from onnx_lora.exporter.frontends.source import Precision

__all__ = ["MEASURED", "Via", "choose"]

Via = Literal["optimum", "genai"]

# The architectures of onnxruntime-genai 0.15 whose fp32 graph was found equal to PyTorch's numbers on the CPU. The
# builder takes more, and is asked when told to; of OLMo it takes the wrong norm, of Phi and Nemotron a wrong epsilon.
MEASURED = frozenset(
    {
        "Ernie4_5ForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GemmaForCausalLM",
        "GptOssForCausalLM",
        "GraniteForCausalLM",
        "HunYuanDenseV1ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "SmolLM3ForCausalLM",
    }
)

# What the builder exports for, by Optimum's names.
_TASKS = (None, "text-generation", "text-generation-with-past", "causal-lm", "causal-lm-with-past")

# GroupQueryAttention's kernels rotate and multiply this many numbers at once.
_LANES = 16


def choose(
    model: str | os.PathLike[str], *, via: str | None, task: str | None, precision: Precision
) -> Via | Literal["diffusion"]:
    """The GenAI builder for the causal language models it is right for, where it is installed, and for every
    quantized one; else Optimum, which takes the networks of a diffusion pipeline one by one.

    Raises ModelError: `via` is none of the two, or cannot do what is asked. MissingDependencyError: the
    builder is needed, and not installed.
    """
    if is_pipeline(model):
        if via not in (None, "optimum") or precision.quantized:
            raise ModelError("a pipeline is exported via Optimum, in fp32 or fp16", path=model)
        return "diffusion"
    if via == "optimum" or (via is None and not precision.quantized):
        if precision.quantized:
            raise ModelError(f"Optimum writes no {precision.name}: the GenAI builder does, with via='genai'")
        return "optimum" if via == "optimum" or not _goes_to_builder(model, task) else "genai"
    if via not in (None, "genai"):
        raise ModelError(f"via must be one of {', '.join(get_args(Via))}, and is {via!r}")
    wanted = "via='genai'" if via else f"precision {precision.name!r}"
    if task not in _TASKS:
        raise ModelError(f"{wanted} is for text generation, and the task is {task!r}; {_OPTIMUM}", path=model)
    if not _is_installed():
        raise MissingDependencyError(f"{wanted} needs onnxruntime-genai: pip install 'onnx-lora[export,genai,cpu]'")
    if problem := _unfit_heads(translated_config(config_of(model), model)):
        raise ModelError(f"{wanted}: {problem}; {_OPTIMUM}", path=model)
    return "genai"


_OPTIMUM = "export it with via='optimum', in fp32 or fp16"


def _goes_to_builder(model: str | os.PathLike[str], task: str | None) -> bool:
    if task not in _TASKS or not _is_installed():
        return False
    try:
        config = translated_config(config_of(model), model)
    except ModelError:
        return False  # Optimum says what is wrong with it
    names = config.get("architectures") or [""]
    # Weights that are quantized already are unpacked by the builder, and by nobody here to compare with.
    return names[0] in MEASURED and "quantization_config" not in config and _unfit_heads(config) is None


def _unfit_heads(config: Mapping[str, Any]) -> str | None:
    """Why ONNX Runtime's attention refuses a model's heads, or None; unknown configs are the builder's to judge."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        return None
    size = config.get("head_dim") or width // heads
    rotated = int(size * (config.get("partial_rotary_factor") or 1.0))
    if size % _LANES or rotated % _LANES:
        return f"attention heads must have a multiple of {_LANES} numbers, rotated ones too, and have {size}"
    return None


def _is_installed() -> bool:
    return importlib.util.find_spec("onnxruntime_genai") is not None
