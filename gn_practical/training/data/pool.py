"""Work on all cores, with progress, bounded memory and clean ends."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property, partial
from itertools import islice
from typing import TypeVar

import cv2
from PIL import ImageFile
from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNKS_AHEAD = 4  # of each worker: enough to keep it busy, and little memory
_FEW_CHUNKS = 16  # are done here before worker processes have started


class Pool:
    """Worker processes that map a function over lists, chunk by chunk.

    Ctrl-C reaches the main process alone; the workers end with it, also where it is killed. Short
    lists are mapped in this process.

    Args:
        workers: processes; all cores by default, 0 for this process alone.
        show_progress: draw a bar for every map, on a terminal.
    """

    def __init__(self, workers: int | None = None, show_progress: bool = True) -> None:
        self.workers = available_cores() if workers is None else workers
        self.show_progress = show_progress

    @cached_property
    def _executor(self) -> ProcessPoolExecutor:
        # Not forks of this process: a lock that a thread of OpenCV or OpenMP holds at that moment
        # is never opened in the copy.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__package__])
        return ProcessPoolExecutor(self.workers, context, _start_worker)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        if "_executor" in vars(self):
            self._executor.shutdown(cancel_futures=True)

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        title: str,
        chunk_size: int = 32,
    ) -> Iterator[Result]:
        """Yield the results in order, under a bar with this title; all can be pickled.

        Raises:
            RuntimeError: if a worker dies.
        """
        starts = range(0, len(items), chunk_size)
        chunks = (items[start : start + chunk_size] for start in starts)
        run = partial(_run, function)
        here = not self.workers or len(starts) <= _FEW_CHUNKS
        disable = None if self.show_progress and items else True  # None: but on a terminal
        with tqdm(total=len(items), desc=title, disable=disable) as bar:
            for results in map(run, chunks) if here else self._map_chunks(run, chunks):
                bar.update(len(results))
                yield from results

    def _map_chunks(
        self, run: Callable[[Sequence[Item]], list[Result]], chunks: Iterator[Sequence[Item]]
    ) -> Iterator[list[Result]]:
        running: deque[tuple[Item, Future]] = deque()
        first = None
        try:
            while True:
                # Few at once, so that a large json is never copied as a whole.
                for chunk in islice(chunks, self.workers * _CHUNKS_AHEAD - len(running)):
                    running.append((chunk[0], self._executor.submit(run, chunk)))
                if not running:
                    return
                first, future = running.popleft()
                yield future.result()
        except BrokenProcessPool as error:
            where = f" at {first} or soon after" if isinstance(first, str) else ""
            raise RuntimeError(
                f"A worker process must live to the end, got one that died{where}. The system may "
                "have killed it for want of memory, or a file crashes its decoder. Try fewer "
                "--workers; see also dmesg."
            ) from error


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # what a container or a batch system leaves us
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(function: Callable[[Item], Result], chunk: Sequence[Item]) -> list[Result]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's; what matters it raises
        return [function(item) for item in chunk]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # No queue tells that; and its parent for the system, the fork server, waits for this process.
    multiprocessing.parent_process().join()
    os._exit(1)
