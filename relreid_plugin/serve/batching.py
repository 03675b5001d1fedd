"""Work of many requests at once: what waits is done together, by one thread, in the order in which it came."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Busy(Exception):
    """More waits already than may wait."""


class Batcher(Generic[Item, Result]):
    """Collects items and hands them over together.

    The first item is not kept waiting for others when nothing is being done; whatever comes while a batch is in work is the
    next batch.

    Args:
        work: Takes a list of items, returns one result for each; an exception among the results is that of its item.
        most: Items of a batch.
        wait: Seconds for which the first item of a batch waits for others.
        waiting: Items that may wait; more are refused.
        observe: Is told the size of every batch.
        name: Of the thread.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Result | Exception]],
        *,
        most: int,
        wait: float = 0.0,
        waiting: int = 1024,
        observe: Callable[[int], Any] = lambda size: None,
        name: str = "batch",
    ) -> None:
        self._work, self._most, self._wait, self._observe = work, most, wait, observe
        self._queue: queue.Queue[tuple[Item, Future[Result]] | None] = queue.Queue(waiting)
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"relreid-{name}", daemon=True)
        self._thread.start()

    def submit(self, item: Item) -> Future[Result]:
        """Return the future result of an item.

        Raises:
            Busy: Too many wait, or the batcher is closed.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._closed:
                raise Busy
            try:
                self._queue.put_nowait((item, future))
            except queue.Full:
                raise Busy from None
        return future

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, last = self._collected(first)
            batch = [pair for pair in batch if pair[1].set_running_or_notify_cancel()]
            if batch:
                self._observe(len(batch))
                self._finish(batch)
            if last:
                return

    def _collected(self, first: tuple[Item, Future[Result]]) -> tuple[list[tuple[Item, Future[Result]]], bool]:
        """The items of a batch, and whether it is the last one."""
        batch, until = [first], time.monotonic() + self._wait
        while len(batch) < self._most:
            try:
                left = until - time.monotonic()
                pair = self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if pair is None:
                return batch, True
            batch.append(pair)
        return batch, False

    def _finish(self, batch: list[tuple[Item, Future[Result]]]) -> None:
        try:
            results = self._work([item for item, _ in batch])
        except Exception as error:
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results):
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


__all__ = ["Batcher", "Busy"]
