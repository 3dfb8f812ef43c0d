"""LoRA on the embeddings and the head of GenAI's graphs: tied ones share one weight, turned or in blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from onnx_lora import AdapterSession, bind, fold, read_adapter
from onnx_lora.exporter import export
from onnx_lora.kinds import EMBEDDING, LINEAR
from onnx_lora.runtime import Requantize
from tests.support.models import make_adapter
from tests.support.numbers import assert_close

pytest.importorskip("onnxruntime_genai", reason="needs ONNX Runtime GenAI: pip install onnx-lora[genai]")

TARGETS = ["q_proj", "embed_tokens", "lm_head"]


def _model() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_tied_embeddings_and_head_get_points_of_their_own(precision: str, tmp_path: Path) -> None:
    from benchmarks.subject import make_tokenizer

    _model().save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    # Verified on the way: PEFT's layers on all three, and rows.
    package = export(tmp_path / "base", tmp_path / "out", via="genai", precision=precision, targets=TARGETS)
    assert {package.points[name].kind for name in ("model.embed_tokens", "lm_head")} == {EMBEDDING, LINEAR}
    tuned = _model()
    folder = make_adapter(tuned, tmp_path / "a", r=3, target_modules=TARGETS)
    bound = bind(read_adapter(folder), package)
    session = AdapterSession(package)
    session.load_adapter("a", bound)
    past = np.zeros((2, 2, 0, 16), np.float32)
    feeds = {value.name: past for value in session.get_inputs() if "past" in value.name}
    feeds |= {"input_ids": np.array([[3, 1, 4], [1, 5, 9]]), "attention_mask": np.ones((2, 3), np.int64)}
    delta = session.run(["logits"], feeds, adapter="a")[0]
    base = session.run(["logits"], feeds)[0]
    rows = session.run(["logits"], feeds, adapter=[None, "a"])[0]
    assert np.abs(delta - base).max() > 1e-2
    assert_close(rows[0], base[0])
    assert_close(rows[1], delta[1])
    if precision == "fp32":
        with torch.inference_mode():
            expected = tuned(input_ids=torch.tensor(feeds["input_ids"])).logits.numpy()
        assert_close(delta, expected)
        assert_close(fold(package, bound).run(["logits"], feeds)[0], expected)
    else:
        leave = Requantize()
        folded = fold(package, bound, requantize=leave).run(["logits"], feeds)[0]
        assert np.abs(folded - delta).max() < np.abs(delta - base).max()
        assert {"model.embed_tokens", "lm_head"} <= set(leave.rounding)
