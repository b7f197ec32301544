"""Signals that ask a run to stop: it finishes its step, saves, and says so by its exit code."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from detectron2.utils import comm
from torch import distributed

# EX_TEMPFAIL of sysexits.h, "try again": stopped by a signal, --resume goes on.
EXIT_INTERRUPTED = 75
# The cluster's warning before it takes a machine, its end of it, and Ctrl-C.
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# Launchers pass on what the cluster or the terminal has sent already: that is one request.
_ECHO_SECONDS = 1.0


class Interrupted(SystemExit):
    """Ends the process with :data:`EXIT_INTERRUPTED`."""

    def __init__(self) -> None:
        super().__init__(EXIT_INTERRUPTED)


@contextmanager
def stop_signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle :data:`STOP_SIGNALS` here, and leave them afterwards to who handled them before."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """What became of the signals of a process.

    The first one sets ``received``. Where nothing is lost it raises :class:`Interrupted` at once;
    within :meth:`held` it waits to be asked for. A second one ends the process at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._time = 0.0
        self._held = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals here, and leave them afterwards to who handled them before."""
        if threading.current_thread() is not threading.main_thread():  # Python forbids it there
            yield
            return
        self.received, process = None, os.getpid()

        def handle(number: int, _: FrameType | None) -> None:
            if os.getpid() == process:  # and not a data loader's worker, which has the handler too
                self._receive(signal.Signals(number))

        with stop_signals_to(handle):
            yield

    @contextmanager
    def held(self, held: bool = True) -> Iterator[None]:
        """Hold signals back here; or, with False inside of it, do not, for what can be redone.

        Raises:
            Interrupted: (for False) as soon as a signal comes, or has come before.
        """
        before, self._held = self._held, held
        try:
            if self.received and not held:
                raise Interrupted
            yield
        except Exception as error:  # as when a rank that was stopped too is waited for
            if self.received and not held:
                raise Interrupted from error
            raise
        finally:
            self._held = before

    def ignore(self) -> None:
        """Take no further signal: the checkpoint that the first one asked for is being written."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.received and now - self._time > _ECHO_SECONDS:
            os._exit(EXIT_INTERRUPTED)
        if not self.received:
            self.received, self._time = number, now
            if not self._held:
                raise Interrupted
            # Not by print or logging, which a handler may have interrupted.
            os.write(2, f"{number.name}: stopping after this step. Again: at once.\n".encode())


STOP = StopSignals()


class Agreement:
    """Tells every rank at the same step that a signal has reached one of them.

    The ranks' votes are summed while the next step runs, so that no step waits for it; they agree
    one step later. Constructed on every rank at once.
    """

    def __init__(self) -> None:
        self._alone = comm.get_world_size() == 1
        self._group = None if self._alone else distributed.new_group(backend="gloo")
        self._vote = torch.zeros(1)
        self._work: distributed.Work | None = None

    def stop(self, wanted: bool) -> bool:
        """Return whether to stop now; called by every rank after every step.

        Args:
            wanted: whether this rank has been asked to.
        """
        if self._alone:
            return wanted
        self.finish()
        if self._vote.item():
            return True
        self._vote.fill_(wanted)
        self._work = distributed.all_reduce(self._vote, group=self._group, async_op=True)
        return False

    def finish(self) -> None:
        """Wait for the vote under way, if there is one."""
        if self._work is not None:
            self._work.wait()
            self._work = None
