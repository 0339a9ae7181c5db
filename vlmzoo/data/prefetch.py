"""Work done ahead of whoever takes its results, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

W = TypeVar("W")
T = TypeVar("T")


def prefetched(work: Iterable[W], make: Callable[[W], T], depth: int, *, workers: int = 1) -> Generator[T, None, None]:
    """`map(make, work)`, with up to `depth` results made ahead by threads.

    The work is taken by the caller's thread, a result's work at most `depth` before the result. What `make` raises is
    raised where its result would have come, after all before it. Close the iterator to leave early, as
    `contextlib.closing` does: nothing new is begun then, and what has begun is waited for.

    Args:
        make: safe to call from `workers` threads at once.
        depth: 0: nothing is made ahead, and there is no thread.
    """
    if depth == 0:
        yield from map(make, work)
        return
    remaining, ahead = iter(work), deque[Future[T]]()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    try:
        ahead.extend(pool.submit(make, item) for item in islice(remaining, depth))
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(make, item) for item in islice(remaining, 1))
            yield result
            del result  # while the next one is waited for, this one need not be held
    finally:
        pool.shutdown(cancel_futures=True)
