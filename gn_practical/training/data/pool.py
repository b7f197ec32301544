"""Work on all cores, with progress, bounded memory and clean ends."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import cv2
from PIL import ImageFile
from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNKS_AHEAD = 4  # of each worker: enough to keep it busy, and little memory


class Pool:
    """Worker processes that map a function over lists, chunk by chunk.

    Only a few chunks are on their way at once, so that a large json is never copied as a whole.
    Ctrl-C reaches the main process alone; the workers end with it.

    Args:
        workers: processes; all cores by default.
        show_progress: draw a bar for every map.

    Example:
        >>> with Pool(1, show_progress=False) as pool:
        ...     list(pool.map(abs, [-1, 2], "number"))
        [1, 2]
    """

    def __init__(self, workers: int | None = None, show_progress: bool = True) -> None:
        self.workers = workers or available_cores()
        self.show_progress = show_progress
        # Not forks of this process: a lock that a thread of OpenCV or OpenMP holds at that moment
        # is never opened in the copy.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__package__])
        self._executor = ProcessPoolExecutor(self.workers, context, _start_worker)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._executor.shutdown(cancel_futures=True)

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        title: str,
        chunk_size: int = 32,
    ) -> Iterator[Result]:
        """Yield the results in order.

        Args:
            function: can be pickled.
            items: can be pickled.
            title: what the bar says.
            chunk_size: items that go to a worker at once.

        Raises:
            RuntimeError: if a worker dies.
        """
        starts = iter(range(0, len(items), chunk_size))
        running: deque[tuple[int, Any]] = deque()
        with tqdm(total=len(items), desc=title, disable=not (self.show_progress and items)) as bar:
            while True:
                while len(running) < self.workers * _CHUNKS_AHEAD:
                    start = next(starts, None)
                    if start is None:
                        break
                    chunk = items[start : start + chunk_size]
                    running.append((start, self._submit(partial(_run, function), chunk)))
                if not running:
                    return
                start, future = running.popleft()
                results = self._result(future, start, items)
                bar.update(len(results))
                yield from results

    def _submit(self, function: Callable, chunk: Sequence[Any]) -> Any:
        try:
            return self._executor.submit(function, chunk)
        except BrokenProcessPool as error:
            raise _dead_worker() from error

    def _result(self, future: Any, start: int, items: Sequence[Any]) -> list[Any]:
        try:
            return future.result()
        except BrokenProcessPool as error:
            what = f" ({items[start]})" if isinstance(items[start], str) else ""
            where = f" at number {start + 1} of {len(items)}{what} or soon after"
            raise _dead_worker(where) from error


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))  # what a container or a batch system leaves us
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _dead_worker(where: str = "") -> RuntimeError:
    return RuntimeError(
        f"A worker process must live to the end, got one that died{where}. The system may have "
        "killed it for want of memory, or a file crashes its decoder. Try fewer --workers; see "
        "also dmesg."
    )


def _run(function: Callable[[Item], Result], chunk: Sequence[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # Pillow's; what matters it raises
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that made the pool was killed, which no queue tells it.

    Its parent for the system, the fork server, waits for it and so would live on too.
    """
    multiprocessing.parent_process().join()
    os._exit(1)
