"""What writes tokens in `benchmarks.decode`: our generator, ONNX Runtime GenAI's loop, PEFT's model, llama.cpp's. Each
starts a text and goes on token by token, greedily, past end tokens; what it cost is the caller's business."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort

from onnx_lora import AdapterSession, Package
from onnx_lora.runtime import Sampling, TextGenerator

__all__ = ["Contender", "GenAI", "LlamaCpp", "Ours", "OursByCall", "Torch", "genai_model", "opened", "without_points"]

# Rows of eight adapters, put together once: 250 MB for eight of rank 16 on everything.
_COMPOSED_BYTES = 2**30


class Contender(Protocol):
    """One way to generate."""

    def start(self, prompt: Sequence[int], new: int) -> None:
        """Read the prompt and choose the first token; `new` tokens are to come at most."""

    def step(self) -> None:
        """One token more."""

    def stop(self) -> None:
        """Free what the text needed."""


def without_points(package: Package) -> Package:
    """The same package with its base graph only."""
    graph = package.graph()
    plain = replace(graph, file=graph.base_file, points=(), branches=(), replaceable=())
    return replace(package, manifest=replace(package.manifest, graphs=(plain,)))


def opened(package: Package, threads: int) -> TextGenerator:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return TextGenerator(AdapterSession(package, sess_options=options, composed_bytes=_COMPOSED_BYTES))


class Ours:
    """`TextGenerator.stream`, with all of its Python: choosing, end tokens, text. `adapter`: a list makes a batch."""

    def __init__(self, generator: TextGenerator, adapter: Any = None) -> None:
        self._generator = generator
        self._adapter = adapter
        self._rows = len(adapter) if isinstance(adapter, list) else 1
        self._stream: Any = None

    def start(self, prompt: Sequence[int], new: int) -> None:
        sampling = Sampling(max_tokens=new, ignore_eos=True)
        prompts = [list(prompt)] * self._rows
        self._stream = self._generator.stream(prompts, adapter=self._adapter, sampling=sampling)
        self.step()

    def step(self) -> None:
        for _ in range(self._rows):
            next(self._stream)

    def stop(self) -> None:
        self._stream = None


class OursByCall:
    """A call of `generate` for each token on the cache of the one before, the adapters in turn: the only way to
    switch within a text."""

    def __init__(self, generator: TextGenerator, adapters: Sequence[str]) -> None:
        self._generator = generator
        self._adapters = adapters
        self._made = 0
        self._cache: Any = None

    def start(self, prompt: Sequence[int], new: int) -> None:  # noqa: ARG002 - a cache grows as it must
        self._call(list(prompt))

    def step(self) -> None:
        self._call("")

    def _call(self, prompt: str | list[int]) -> None:
        self._made += 1
        result = self._generator.generate(
            prompt,
            adapter=self._adapters[self._made % len(self._adapters)],
            sampling=Sampling(max_tokens=1, ignore_eos=True),
            cache=self._cache,
            keep_cache=True,
            allow_other_adapter=True,
        )
        self._cache = result.cache

    def stop(self) -> None:
        self._cache = None


def genai_model(folder: Path, graph: str, threads: int) -> Any:
    """ONNX Runtime GenAI over a folder, with another graph of it and so many threads."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    decoder = {"filename": graph, "session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": decoder}}))
    return og.Model(config)


class GenAI:
    """ONNX Runtime GenAI's own loop, as its examples write it. `adapter`: a converted file."""

    def __init__(self, model: Any, adapter: Path | None = None) -> None:
        import onnxruntime_genai as og

        self._og = og
        self._model = model
        self._tokenizer = og.Tokenizer(model)
        self._adapters = og.Adapters(model)
        self._adapter = adapter
        if adapter is not None:
            self._adapters.load(str(adapter), "it")
        self._generator: Any = None
        self._text: Any = None

    def start(self, prompt: Sequence[int], new: int) -> None:
        length = len(prompt) + new
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        self._generator = self._og.Generator(self._model, parameters)
        self._text = self._tokenizer.create_stream()
        if self._adapter is not None:
            self._generator.set_active_adapter(self._adapters, "it")
        self._generator.append_tokens(list(prompt))
        self.step()

    def step(self) -> None:
        self._generator.generate_next_token()
        self._text.decode(self._generator.get_next_tokens()[0])

    def stop(self) -> None:
        self._generator = None


class Torch:
    """PyTorch with the cache of transformers; no text is made of the tokens."""

    def __init__(self, checkpoint: Path, adapter: Path | None, threads: int) -> None:
        import torch
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        model: Any = LlamaForCausalLM.from_pretrained(checkpoint)
        self._model: Any = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
        self._cache: Any = None
        self._token: Any = None

    def start(self, prompt: Sequence[int], new: int) -> None:  # noqa: ARG002 - its cache grows as it must
        from transformers import DynamicCache

        self._cache = DynamicCache()
        self._token = self._torch.tensor([list(prompt)])
        self.step()

    def step(self) -> None:
        with self._torch.inference_mode():
            outputs = self._model(input_ids=self._token, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._token = outputs.logits[:, -1:].argmax(dim=-1)
            self._token.item()

    def stop(self) -> None:
        self._cache = None


class LlamaCpp:
    """llama.cpp through llama_cpp, with a GGUF file and an adapter's; no text is made of the tokens."""

    def __init__(self, model: Path, adapter: Path | None, threads: int, context: int) -> None:
        # No dependency of ours, and without types.
        self._llama: Any = import_module("llama_cpp").Llama(
            str(model),
            lora_path=None if adapter is None else str(adapter),
            n_threads=threads,
            n_threads_batch=threads,
            n_ctx=context,
            verbose=False,
        )

    def start(self, prompt: Sequence[int], new: int) -> None:  # noqa: ARG002 - the context has its length
        self._llama.reset()
        self._llama.eval(list(prompt))

    def step(self) -> None:
        self._llama.eval([self._llama.sample(temp=0.0)])

    def stop(self) -> None:
        self._llama.reset()
