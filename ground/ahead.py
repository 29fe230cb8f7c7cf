"""The next thing is read while this one is worked on."""

from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterable, Iterator, TypeVar

T, R = TypeVar("T"), TypeVar("R")


def ahead(items: Iterable[T], read: Callable[[T], R]) -> Iterator[tuple[T, Callable[[], R]]]:
    """Each item, and a function that returns what `read` made of it, or raises what that raised.

    One thread reads, in order, and is at most one item ahead: beside the caller's there is no more
    than one in memory. Decoding releases the lock of the interpreter.
    """
    with ThreadPoolExecutor(1, "ahead") as reader:
        before = None
        for item in items:
            now = item, reader.submit(read, item).result
            if before:
                yield before
            before = now
        if before:
            yield before
