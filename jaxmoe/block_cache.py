"""Decoded parts of files, kept for as long as there is room for them."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

CACHE_BYTES = 2**28
"""What is held decoded in memory: files with more are decoded again and again by shuffled reading."""


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Block = TypeVar("Block", bound=Sized)


class BlockCache(Generic[Block]):
    """Blocks of one kind by what tells them apart, the least recently used dropped first; safe from threads.

    A pickled one is empty where it arrives.
    """

    def __init__(self, most: int = CACHE_BYTES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple, Block] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple, decode: Callable[[], Block]) -> Block:
        """A block, decoded by one thread at a time unless it is there."""
        with self._lock:
            if key not in self._blocks:
                block = decode()
                self._blocks[key] = block
                self._bytes += block.nbytes
                while self._bytes > self._most and len(self._blocks) > 1:
                    self._bytes -= self._blocks.popitem(last=False)[1].nbytes
            self._blocks.move_to_end(key)
            return self._blocks[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockCache, (self._most,)
