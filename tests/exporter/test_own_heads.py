"""What a package says of heads that its checkpoint lacked, and adapters that transformers itself trained on a
classifier: they bring no head."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig
from transformers.integrations import peft as of_peft

from onnx_lora import AdapterSession, Package, attach, export, fold, quantize
from onnx_lora.errors import BindError
from tests.support.models import make_model
from tests.support.numbers import assert_close

IDS = torch.arange(1, 9).view(2, 4)


def _train_in_transformers(model: Any, folder: Path) -> Any:
    """What `model.add_adapter` and `save_pretrained` leave: a task in the config, and no head in the file."""
    torch.manual_seed(1)
    if hasattr(of_peft, "MIN_PEFT_VERSION"):
        # transformers 5.24 asks for a PEFT that is not out yet; adding and saving work with today's.
        of_peft.MIN_PEFT_VERSION = version("peft")
    model.add_adapter(LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False))
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(IDS).logits.numpy()


def _run(session: Any, **choice: Any) -> Any:
    feeds = {"input_ids": IDS.numpy(), "attention_mask": np.ones((2, 4), np.int64)}
    feeds["token_type_ids"] = np.zeros((2, 4), np.int64)
    names = {value.name for value in session.get_inputs()}
    return session.run(["logits"], {name: value for name, value in feeds.items() if name in names}, **choice)[0]


def test_an_adapter_of_transformers_runs_on_the_bases_own_head(packages: Callable[[str], Path], tmp_path: Path) -> None:
    package = Package.open(packages("bert"))
    assert package.manifest.untrained == ()
    expected = _train_in_transformers(make_model("bert"), tmp_path / "adapter")
    session = AdapterSession(package)
    session.load_adapter("it", tmp_path / "adapter")
    assert_close(_run(session, adapter="it"), expected)
    assert_close(_run(fold(package, tmp_path / "adapter")), expected)
    assert np.abs(_run(session) - expected).max() > 0.001


def test_a_head_that_the_checkpoint_lacks_is_written_down_and_takes_no_adapter_without_one(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    hf.BertModel.from_pretrained(checkpoints("bert")).save_pretrained(tmp_path / "body")
    package = export(tmp_path / "body", tmp_path / "package", task="text-classification", verify=False)
    assert package.manifest.untrained == ("classifier.bias", "classifier.weight")
    assert quantize(package, tmp_path / "int8").manifest.untrained == package.manifest.untrained
    _train_in_transformers(make_model("bert"), tmp_path / "adapter")
    with pytest.raises(BindError, match=r"classifier: .* newly initialised at export"):
        AdapterSession(package).load_adapter("it", tmp_path / "adapter")


def test_of_an_attached_graph_its_checkpoint_tells(
    packages: Callable[[str], Path], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    graph = packages("bert") / "base.onnx"
    expected = _train_in_transformers(make_model("bert"), tmp_path / "adapter")
    alone = attach(graph, tmp_path / "alone")
    with pytest.raises(BindError, match=r"does not say whether the base's own was trained: .* `checkpoint="):
        AdapterSession(alone).load_adapter("it", tmp_path / "adapter")
    session = AdapterSession(attach(graph, tmp_path / "known", checkpoint=checkpoints("bert")))
    session.load_adapter("it", tmp_path / "adapter")
    assert_close(_run(session, adapter="it"), expected)
