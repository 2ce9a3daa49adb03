"""Calls a function of the user under a time limit that ends it, and says where in the user's code it failed."""

import ctypes
import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.errors import failure_of

_ALARM_INTERVAL = 0.05  # seconds; alarms repeat, because a bare `except:` in the function may catch the first one
_GRACE = 1.0  # seconds that a function in a thread of its own has to end, once its time is up


@dataclass(frozen=True)
class Failure:
    """Why a call gave no result: the predicate of a sentence, such as "raised ValueError: …", and the exception."""

    reason: str
    cause: BaseException


def attempt(function: Callable[[], Any], seconds: float, *callers: str) -> Any:
    """Returns `function()`, or a `Failure` if it raised an exception or ran past its time limit.

    SIGALRM enforces the limit, which ends Python code, sleeps, regular expressions and blocking reads. It cannot end C
    code that never checks for signals, or a function that sets an alarm itself. Signals need the main thread. In
    another thread the call has a thread of its own, which the limit ends between two lines of Python.

    Args:
      seconds: the time limit.
      callers: the files (`__file__`) between here and the user's code, which a failure does not name.
    """
    try:
        return _within(seconds, function)
    except _TimeUp as error:
        return Failure(f"ran past its time limit of {seconds:g} s{_place(error, callers)}", error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what exits would end the run with the status of a finished one
        return Failure(f"raised {failure_of(error)}{_place(error, callers)}", error)


def _place(error: BaseException, callers: Collection[str]) -> str:
    """Returns where in the user's own file the error occurred, as ` (at file:line)`."""
    ours = {__file__, *callers}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" (at {Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


class _TimeUp(BaseException):
    """A function exceeded its time limit. Not an `Exception`, so that no `except Exception` in it catches it."""


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """Returns `function()`, or raises `_TimeUp` after `seconds`. Restores the alarm that was set before."""
    if threading.current_thread() is not threading.main_thread():
        return _within_in_thread(seconds, function)
    running, reached = True, False

    def ring(*_: object) -> None:
        nonlocal reached
        if running:
            reached = True
            raise _TimeUp

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _ALARM_INTERVAL)
    try:
        try:
            result = function()
        finally:
            running = False  # in the inner `finally`, so that after an alarm at this moment the outer one still runs
    finally:
        left = max(delay - (time.monotonic() - started), 1e-3) if delay else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)
    if reached:
        raise _TimeUp
    return result


def _within_in_thread(seconds: float, function: Callable[[], Any]) -> Any:
    """The same outside of the main thread, where no signal arrives: in a thread that can be left behind."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:  # also what it exits with, to be raised where it was called
            outcome.append((None, error))

    worker = threading.Thread(target=work, name="of the user", daemon=True)
    worker.start()
    worker.join(seconds)
    deadline, reached = time.monotonic() + _GRACE, worker.is_alive()
    while worker.is_alive() and time.monotonic() < deadline:
        # Raises `_TimeUp` before the thread's next line of Python.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(_TimeUp))
        worker.join(_ALARM_INTERVAL)
    if not outcome:
        raise _TimeUp
    result, error = outcome[0]
    if reached and not isinstance(error, _TimeUp):
        raise _TimeUp
    if error is not None:
        raise error
    return result
