"""Signals that ask a run to stop: it finishes its step, saves, and says so by its exit code."""

import logging
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
_NOTICE = "stopping where nothing is lost. Again: at once.\n"


class Interrupted(SystemExit):
    """Ends the process with :data:`EXIT_INTERRUPTED`."""

    def __init__(self) -> None:
        super().__init__(EXIT_INTERRUPTED)


@contextmanager
def stop_signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle :data:`STOP_SIGNALS` in this block; afterwards they are handled as before it."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """What became of the signals of a process.

    The handler notes the first one in ``received`` and raises nothing, for it may have interrupted
    anybody's code. :meth:`check` is called where stopping loses nothing: between the phases of
    set-up, and between the batches of an evaluation; the trainer looks at ``received`` after each
    step. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._time = 0.0
        self._handles = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals in this block; within another such block it changes nothing.

        Raises:
            Interrupted: in place of an error that came after a signal, as when a rank that was
                stopped too is waited for.
        """
        # Python forbids other threads to handle signals.
        if self._handles or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._handles, process = True, os.getpid()
        says_so = comm.is_main_process()

        def handle(number: int, _: FrameType | None) -> None:
            now = time.monotonic()
            if os.getpid() != process:  # a data loader's worker, which has the handler too
                return
            if not self.received:
                self.received, self._time = signal.Signals(number), now
                if says_so:  # not by print or logging, which a handler may have interrupted
                    os.write(2, f"{self.received.name}: {_NOTICE}".encode())
            elif now - self._time > _ECHO_SECONDS:
                os._exit(EXIT_INTERRUPTED)

        try:
            with stop_signals_to(handle):
                yield
        except Exception as error:
            if self.received:
                logging.getLogger(__name__).warning("Failed after the signal", exc_info=True)
                raise Interrupted from error
            raise
        finally:
            self.received, self._handles = None, False  # another run may follow in this process

    def check(self) -> None:
        """Stop here if a signal has asked for it.

        Raises:
            Interrupted: if one has.
        """
        if self.received:
            raise Interrupted

    def ignore(self) -> None:
        """Take no further signal: the checkpoint that the first one asked for is being written."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


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
        """Return whether to stop now; called by every rank after every step, as it was asked."""
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
