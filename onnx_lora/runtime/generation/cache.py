"""A cache that outlives its generation: to go on with, once, under the adapters that filled it. It knows whose it is,
not how it lies in memory."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from weakref import ref

from onnx_lora.errors import CacheError
from onnx_lora.runtime.generation.memory import Memory
from onnx_lora.runtime.lease import Identity

__all__ = ["Cache"]


class Cache:
    """The keys and values of texts, as `generate(..., keep_cache=True)` leaves them in its results.

    It goes on where they ended, stop strings and end tokens included, and can be used once: what is written into it
    then would be in a second use, too. `copy()` before makes another. A batch's results share one cache.
    """

    def __init__(self, owner: object, memory: Memory, tokens: Sequence[Sequence[int]], identity: Identity) -> None:
        """`owner`: the session whose runs filled the memory; no other one goes on with it. `tokens`: each row's."""
        self._owner = ref(owner)
        self._memory: Memory | None = memory
        self._tokens = tuple(tuple(row) for row in tokens)
        self._identity = identity
        self._lock = Lock()

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """Each row's tokens, prompt and text. The last of a row is not in the cache yet: it is fed first."""
        return self._tokens

    @property
    def adapter(self) -> str:
        """What filled it, in words."""
        return str(self._identity)

    def copy(self) -> Cache:
        """Another cache of the same texts. Raises CacheError: this one is used up."""
        with self._lock:
            owner = self._owner()
            if self._memory is None or owner is None:
                raise _refuse_second_use()
            return Cache(owner, self._memory.copy(), self._tokens, self._identity)

    def check(self, owner: object, rows: int, identity: Identity, *, any_adapter: bool) -> None:
        """Raises CacheError: these rows cannot go on with it under this adapter."""
        if self._owner() is not owner:
            raise CacheError("a cache must be gone on with by the generator that filled it, and this is another one")
        if len(self._tokens) != rows:
            raise CacheError(
                f"the cache holds {len(self._tokens)} rows, and {rows} were given; give one text for each, '' for none"
            )
        if self._memory is None:
            raise _refuse_second_use()
        if any_adapter or self._identity.parts == identity.parts:
            return
        again = " (unloaded since, and loaded again: another one)" if str(identity) == self.adapter else ""
        raise CacheError(
            f"the cache was filled by {self.adapter}, and {identity}{again} was asked for; what they remember of a "
            "text differs. Name the same adapter, or start without the cache, or pass allow_other_adapter=True"
        )

    def take(self) -> Memory:
        """What it holds; from then on it is used up. Raises CacheError: it is already."""
        with self._lock:
            memory, self._memory = self._memory, None
        if memory is None:
            raise _refuse_second_use()
        return memory


def _refuse_second_use() -> CacheError:
    return CacheError("a cache can be gone on with once, and this one was; keep cache.copy() for a second time")
