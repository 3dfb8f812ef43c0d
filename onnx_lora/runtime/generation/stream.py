"""One generation: a prompt goes in, tokens come out one round after another until every row has ended. It ties
decoder, choosers and texts together; prompts are tokens by now."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from onnx_lora.boundary import public
from onnx_lora.runtime.generation.cache import Cache
from onnx_lora.runtime.generation.decoder import Decoder
from onnx_lora.runtime.generation.graph import DecoderGraph
from onnx_lora.runtime.generation.memory import Memory
from onnx_lora.runtime.generation.pieces import RunningText, StopFilter
from onnx_lora.runtime.generation.results import Generation, Piece, Reason
from onnx_lora.runtime.generation.sampling import Chooser, Sampling
from onnx_lora.runtime.lease import Lease

__all__ = ["Row", "Stream", "Work"]


@dataclass(frozen=True, slots=True)
class Work:
    """A generation that was checked, and can start.

    owner: whose runs they are, for a cache that is kept. `past`: each row's tokens that the memory has; `feed`: those
    that it is fed first. `limits`: how many tokens each row may get.
    """

    owner: object
    graph: DecoderGraph
    lease: Lease
    memory: Memory
    past: Sequence[Sequence[int]]
    feed: Sequence[Sequence[int]]
    limits: Sequence[int]
    sampling: Sampling
    end: frozenset[int]
    decode: Callable[[Sequence[int]], str] | None
    keep_cache: bool


@dataclass
class Row:
    """One row on its way."""

    index: int
    history: list[int]
    prompt: int  # tokens, with what the cache had
    limit: int
    chooser: Chooser
    running: RunningText | None
    stops: StopFilter
    text: list[str] = field(default_factory=list)
    reason: Reason | None = None

    @staticmethod
    def of(work: Work, index: int) -> Row:
        history = [*work.past[index], *work.feed[index]]
        return Row(
            index=index,
            history=history,
            prompt=len(history),
            limit=work.limits[index],
            chooser=Chooser(work.sampling, index, history),
            running=None if work.decode is None else RunningText(work.decode, history),
            stops=StopFilter(work.sampling.stops),
        )

    def take(self, token: int, end: frozenset[int]) -> Piece:
        """One more token, and what it adds."""
        self.history.append(token)
        new = ""
        if token in end:
            self.reason = "stop"
        elif self.running is not None:
            new = self.stops.push(self.running.push(token))
        if self.reason is None and len(self.history) - self.prompt >= self.limit:
            self.reason = "length"
        if self.reason is not None and self.running is not None:
            new += self.stops.push(self.running.finish())
        if self.stops.stopped:
            self.reason = "stop_string"
        elif self.reason is not None:
            new += self.stops.finish()
        if new:
            self.text.append(new)
        return Piece(self.index, new, token, self.reason)

    def result(self, cache: Cache | None) -> Generation:
        """The row as it is at this moment."""
        tokens = tuple(self.history[self.prompt :])
        return Generation("".join(self.text), tokens, self.prompt, self.reason, cache)


@public
class Stream:
    """The pieces of a generation as they come. It computes when it is asked for the next one, and frees what it needs
    when it ends, is closed, or is dropped."""

    def __init__(self, work: Work) -> None:
        self._rows = [Row.of(work, index) for index in range(len(work.feed))]
        self._kept: list[Cache] = []
        self._pieces = _generate_pieces(work, self._rows, self._kept)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Stop here."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def results(self) -> list[Generation]:
        """Every row as it is at this moment; at the end, what `generate` returns."""
        cache = self._kept[0] if self._kept else None
        return [row.result(cache) for row in self._rows]


def _generate_pieces(work: Work, rows: list[Row], kept: list[Cache]) -> Generator[Piece, None, None]:
    """A function, and not a method: a stream that is dropped must not keep itself alive through it."""
    decoder = Decoder(work.graph, work.lease, work.memory)
    end = frozenset() if work.sampling.ignore_eos else work.end
    feed = work.feed
    while True:
        logits = decoder.feed(feed)
        running = [row for row in rows if row.reason is None]
        # All of a round before the first is given out: `results` and the cache are of one moment.
        tokens = [row.chooser.choose(logits[row.index]) for row in running]
        pieces = [row.take(token, end) for row, token in zip(running, tokens, strict=True)]
        ended = all(row.reason is not None for row in rows)
        if ended and work.keep_cache:
            histories = [row.history for row in rows]
            kept.append(Cache(work.owner, work.memory, histories, work.lease.identity))
        yield from pieces
        if ended:
            return
        feed = [() if row.reason else row.history[-1:] for row in rows]
