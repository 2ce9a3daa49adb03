"""What Ctrl-C and SIGTERM do to a run: the first ends it with what it has, the second ends the process.

Between two training steps a signal is granted at once; within a step it waits for its end, and the step is saved.
Everywhere else (while a policy is loaded, evaluated or compiled) it ends the run as soon as Python gets to it. Python
does not while XLA compiles, which may take minutes: then a thread sees to it that a second signal is heard.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from grpo_jax.errors import Terminated

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 2.0  # seconds that a run has after the second signal, before the process is ended


class Request:
    """Whether the user or a scheduler has asked a run to stop.

    Attributes:
      number: the signal that did; None if none has come.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None


def interruption(number: int | None) -> KeyboardInterrupt:
    """The exception for a signal; the exit status follows from it."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def stop_between_steps() -> Iterator[Request]:
    """Turns the first Ctrl-C or SIGTERM into a request that is granted between two steps; the next one acts at once."""
    request = Request()

    def ask(number: int, frame: FrameType | None) -> None:
        if request():
            raise interruption(number)
        request.number = number
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM an exception, as Ctrl-C is one, and ends the process after two signals that Python did not hear.

    Does nothing outside of the main thread, or where somebody else handles these signals.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    heard, wake = os.pipe()
    os.set_blocking(wake, False)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)  # written to even while Python is in C code
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(heard, over), name="signals", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        os.close(wake)  # which ends the thread
        watch.join()
        os.close(heard)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise interruption(number)


def _watch(heard: int, over: threading.Event) -> None:
    """Counts the signals, and ends the process if a second one has no effect."""
    count = 0
    while numbers := os.read(heard, 64):
        for number in numbers:
            count += number in SIGNALS
            if number in SIGNALS and count == 2 and not over.wait(GRACE):
                print("\nstopped at once: the last checkpoint is kept", file=sys.stderr, flush=True)
                os._exit(128 + number)
