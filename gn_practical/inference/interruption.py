"""Ctrl-C and SIGTERM as a request that is looked at where stopping loses nothing."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO_SECONDS = 1.0  # a terminal and a launcher may both send the same one
_NOTICE = b"\nStopping after this batch; what is done is kept. Again: at once.\n"


class Interruption:
    """Notes the first signal in this block; a second one ends the process at once.

    Attributes:
        received: the signal, None if there was none.

    Example:
        >>> with Interruption() as interruption:
        ...     interruption.asked
        False
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._time = 0.0
        self._before: dict = {}

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal has ended: 130 after Ctrl-C."""
        return 128 + self.received if self.received else 0

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._handle) for each in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._time = signal.Signals(number), now
            os.write(2, _NOTICE)  # not by print, which a handler may have interrupted
        elif now - self._time > _ECHO_SECONDS:
            os._exit(self.exit_code)
