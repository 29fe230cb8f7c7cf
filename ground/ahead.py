"""The next thing is read while this one is worked on."""

from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterable, Iterator, TypeVar

T, R = TypeVar("T"), TypeVar("R")


def ahead(items: Iterable[T], read: Callable[[T], R]) -> Iterator[tuple[T, Callable[[], R]]]:
    """Each item, and a function that returns what `read` made of it, or raises what that raised.

    One thread reads, in order, and is at most one item ahead: beside the caller's there is no more
    than one in memory. Decoding releases the lock of the interpreter.
    """
    items = iter(items)
    with ThreadPoolExecutor(1, "ahead") as reader:
        for item in items:
            now = item, reader.submit(read, item)
            break
        else:
            return
        for item in items:
            now, (before, reading) = (item, reader.submit(read, item)), now
            yield before, reading.result
        yield now[0], now[1].result
