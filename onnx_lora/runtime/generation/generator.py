"""Text from a package: prompts and an adapter in, texts out. It checks what a call asks for, and starts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

from onnx_lora.adapters import BoundAdapter
from onnx_lora.boundary import public
from onnx_lora.errors import CacheError, InputError, PackageError, PromptError
from onnx_lora.package import Package
from onnx_lora.runtime._ort import Device, Providers
from onnx_lora.runtime.binding import AnyAdapter, AnyPackage, open_package
from onnx_lora.runtime.generation.cache import Cache
from onnx_lora.runtime.generation.chat import Chat, ChatTemplate
from onnx_lora.runtime.generation.families import make_memory
from onnx_lora.runtime.generation.graph import OF_ENCODER_DECODER, DecoderGraph
from onnx_lora.runtime.generation.memory import Memory
from onnx_lora.runtime.generation.prompts import OnePrompt, Prompt, Room, encode_prompts, is_batch
from onnx_lora.runtime.generation.results import Generation
from onnx_lora.runtime.generation.sampling import Sampling
from onnx_lora.runtime.generation.settings import Settings
from onnx_lora.runtime.generation.stream import Stream, Work
from onnx_lora.runtime.generation.text import TextTokenizer
from onnx_lora.runtime.selection import AdapterChoice
from onnx_lora.runtime.session import AdapterSession

__all__ = ["TextGenerator"]

_GREEDY = Sampling()

# Tokens in, text out.
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class _Call:
    """What `generate` and `stream` are asked for."""

    prompt: Prompt
    adapter: AdapterChoice
    sampling: Sampling
    cache: Cache | None
    keep_cache: bool
    allow_other_adapter: bool

    def check(self) -> None:
        """Raises InputError, CacheError: an argument is of another type."""
        if not isinstance(self.sampling, Sampling):
            raise InputError(f"sampling must be a Sampling, and is a {type(self.sampling).__name__}")
        if self.cache is not None and not isinstance(self.cache, Cache):
            raise CacheError(f"cache must be a result's cache, and is a {type(self.cache).__name__}")


@public
class TextGenerator:
    """Generates text with a package's decoder, each call with the adapter it names.

    Safe to use from many threads, as the `AdapterSession` beneath it: the adapter and the cache belong to the call. An
    adapter unloaded while a generation runs is used by it to its end.
    """

    def __init__(
        self,
        package: AnyPackage | AdapterSession,
        *,
        graph: str | None = None,
        providers: Providers | None = None,
        provider_options: Sequence[dict[Any, Any]] | None = None,
        sess_options: Any = None,
    ) -> None:
        """Open `package`, or generate with a session that is open already; the other arguments are for a package's
        session, as `AdapterSession` takes them.

        Raises PackageError: the package is broken, or its graph is no decoder.
        """
        if isinstance(package, AdapterSession):
            if any(given is not None for given in (graph, providers, provider_options, sess_options)):
                raise InputError("graph, providers and options must be given where a session is started, not over one")
            self._session = package
        elif isinstance(package, str | os.PathLike | Package):
            opened = open_package(package)
            if graph is None:
                _check_decoder_only(opened)
            self._session = AdapterSession(
                opened,
                graph=graph,
                providers=providers,
                provider_options=provider_options,
                sess_options=sess_options,
            )
        else:
            raise InputError(
                f"package must be a path, a Package or an AdapterSession, and is a {type(package).__name__}"
            )
        self._settings = Settings.read(self._session.package.path)
        self._graph = _find_decoder(self._session, self._settings)
        self._room = Room(self._settings.context, self._graph.vocabulary)
        self._device = Device.of(self._session)

    @property
    def session(self) -> AdapterSession:
        """The session that runs the decoder."""
        return self._session

    @property
    def adapters(self) -> Mapping[str, BoundAdapter]:
        """The adapters loaded at this moment, by name; read-only."""
        return self._session.adapters

    @property
    def context(self) -> int | None:
        """How many tokens a text may have, prompt included; None where the package does not say."""
        return self._room.context

    def load_adapter(
        self,
        name: str,
        adapter: AnyAdapter,
        *,
        strict: bool = False,
        allow_unproven: bool = False,
        replace: bool = False,
    ) -> BoundAdapter:
        """As `AdapterSession.load_adapter`. Generations that run finish with the adapter that they began with."""
        return self._session.load_adapter(name, adapter, strict=strict, allow_unproven=allow_unproven, replace=replace)

    def unload_adapter(self, name: str) -> None:
        """As `AdapterSession.unload_adapter`. Generations that run finish with it; a kept cache that it filled can
        then be gone on with by no adapter."""
        self._session.unload_adapter(name)

    # A str is a sequence of str, too: the first that fits counts.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompt: str | Chat | list[int],
        *,
        adapter: AdapterChoice = ...,
        sampling: Sampling = ...,
        cache: Cache | None = ...,
        keep_cache: bool = ...,
        allow_other_adapter: bool = ...,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Sequence[OnePrompt],
        *,
        adapter: AdapterChoice = ...,
        sampling: Sampling = ...,
        cache: Cache | None = ...,
        keep_cache: bool = ...,
        allow_other_adapter: bool = ...,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: AdapterChoice = None,
        sampling: Sampling = _GREEDY,
        cache: Cache | None = None,
        keep_cache: bool = False,
        allow_other_adapter: bool = False,
    ) -> Generation | list[Generation]:
        """Write on behind a prompt; behind each of a list of prompts, in one batch.

        `prompt`: text, a `Chat`, or token ids (a list or an array); a list of these is a batch, and gives a list.
        `adapter`: as `AdapterSession.run` takes it; a list has a choice for every prompt.
        `cache`: a result's, to go on where it ended: the prompt is what comes next (it may be ""), and gets no start
        token. `keep_cache`: leave one in the result. `allow_other_adapter`: go on with a cache that other adapters
        filled, knowing that no single adapter would have written what follows.

        Raises PromptError: a prompt is empty, too long, or no prompt. SelectionError: no such adapter, blend or row.
        CacheError: the cache is used up, or not this adapter's. PackageError: text needs a tokenizer, or a chat a
        template, and the package has none. RunError: ONNX Runtime failed.
        """
        call = _Call(prompt, adapter, sampling, cache, keep_cache, allow_other_adapter)
        stream = Stream(self._prepare(call))
        for _ in stream:
            pass
        return stream.results if is_batch(prompt) else stream.results[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: AdapterChoice = None,
        sampling: Sampling = _GREEDY,
        cache: Cache | None = None,
        keep_cache: bool = False,
        allow_other_adapter: bool = False,
    ) -> Stream:
        """As `generate`, piece by piece; everything is checked before it returns. The pieces' texts of a row are
        together what `generate` gives. `.results` has the results at the end, with their cache."""
        return Stream(self._prepare(_Call(prompt, adapter, sampling, cache, keep_cache, allow_other_adapter)))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        adapter: AdapterChoice = None,
        sampling: Sampling = _GREEDY,
    ) -> Generation:
        """The answer to a conversation, by the package's chat template: `generate(Chat(messages))`.

        Raises PackageError: the package has no template. PromptError: the template refuses the messages.
        """
        return self.generate(Chat(messages), adapter=adapter, sampling=sampling)

    def encode(self, prompt: str | Chat) -> list[int]:
        """The tokens that a prompt is fed as. A chat's template writes the special tokens itself."""
        return self._encode(prompt, special=True)

    def _encode(self, prompt: str | Chat, *, special: bool) -> list[int]:
        if isinstance(prompt, Chat):
            return self._tokenizer.encode(self._template.text(prompt), special=False)
        return self._tokenizer.encode(prompt, special=special)

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        return TextTokenizer.open(self._session.package.path)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.read(self._session.package.path)

    def _prepare(self, call: _Call) -> Work:
        """The generation a call asks for, checked."""
        call.check()
        cache = call.cache
        new = encode_prompts(call.prompt, lambda text: self._encode(text, special=cache is None))
        lease = self._session.lease(call.adapter, len(new))
        if cache is None:
            past: list[list[int]] = [[] for _ in new]
            feed = new
        else:
            cache.check(self._session, len(new), lease.identity, any_adapter=call.allow_other_adapter)
            # The last token of a text was chosen, and not fed yet.
            past = [list(row[:-1]) for row in cache.tokens]
            feed = [[row[-1], *tokens] for row, tokens in zip(cache.tokens, new, strict=True)]
        self._check_room(past, feed, batch=is_batch(call.prompt))
        lengths = [len(old) + len(row) for old, row in zip(past, feed, strict=True)]
        limits = self._room.limits(lengths, call.sampling.max_tokens)
        decode = self._find_decode(call.sampling)
        memory: Memory = make_memory(self._graph, self._device, len(new)) if cache is None else cache.take()
        memory.reserve(max(map(len, feed)) + max(limits))
        return Work(
            self._session,
            self._graph,
            lease,
            memory,
            past=past,
            feed=feed,
            limits=limits,
            sampling=call.sampling,
            end=self._settings.end,
            decode=decode,
            keep_cache=bool(call.keep_cache),
        )

    def _check_room(self, past: Sequence[Sequence[int]], feed: Sequence[Sequence[int]], *, batch: bool) -> None:
        problems: list[str] = []
        for index, (old, row) in enumerate(zip(past, feed, strict=True)):
            name = f"prompt {index} " if batch else "the prompt "
            problems += self._room.problems(name, len(old), row)
        if problems:
            raise PromptError("no text can be generated from this prompt", problems=problems)

    def _find_decode(self, sampling: Sampling) -> Decode | None:
        """How tokens become text. Where the package or this Python cannot, and nothing asks for it: None, and texts
        stay empty."""
        if not sampling.stops and not TextTokenizer.possible(self._session.package.path):
            return None
        return self._tokenizer.decode


def _check_decoder_only(package: Package) -> None:
    """Raises PackageError: the package has an encoder and a decoder, which no single graph stands for."""
    names = [graph.name for graph in package.manifest.graphs]
    parts = {name.partition("_")[0] for name in names}
    if parts >= {"encoder", "decoder"}:
        raise PackageError(OF_ENCODER_DECODER, path=package.path, problems=[f"it has the graphs {', '.join(names)}"])


def _find_decoder(session: AdapterSession, settings: Settings) -> DecoderGraph:
    """A session's graph as a decoder. Raises PackageError: it is none."""
    inputs = {arg.name: arg for arg in session.get_inputs()}
    outputs = {arg.name: arg for arg in session.get_outputs()}
    return DecoderGraph.of(session.package.path / session.graph.file, settings, inputs, outputs)
