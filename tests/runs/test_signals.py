"""Ctrl-C and SIGTERM outside of the steps: an exception, its status, and a second signal that Python cannot hear."""

import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from grpo_jax.errors import Terminated, exit_status
from grpo_jax.runs.signals import stop_between_steps, terminable

# Stands for a compilation: C code that runs for a minute, lets other threads run, and does not look at signals.
COMPILES = """
import hashlib, sys
from grpo_jax.errors import exit_status
from grpo_jax.runs import signals
signals.GRACE = 0.2
with signals.terminable():
    def command():
        print("begun", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    sys.exit(exit_status(command))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_the_status_that_a_scheduler_knows(
    number: signal.Signals, status: int, capsys: Any
) -> None:
    ended = []

    def command() -> None:
        try:
            signal.raise_signal(number)
        finally:
            ended.append("cleanly")

    with terminable():
        assert exit_status(command) == status
    assert ended == ["cleanly"] and capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1


def test_what_handles_ctrl_c_handles_sigterm_and_within_steps_it_is_a_request() -> None:
    with terminable():
        with terminable(), pytest.raises(KeyboardInterrupt) as caught:  # of a command and of the run that it makes
            signal.raise_signal(signal.SIGTERM)
        assert caught.type is Terminated
        with stop_between_steps() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop() and stop.number == signal.SIGTERM
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_a_handler_of_the_users_own_stays() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with terminable():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_process_that_python_does_not_hear_in(number: signal.Signals, status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILES], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    time.sleep(1)  # until it is within the one call that holds Python
    began = time.monotonic()
    try:
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)  # the first waits until Python has its turn
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == status and time.monotonic() - began < 20
    assert said == "\nstopped at once: the last checkpoint is kept\n"
