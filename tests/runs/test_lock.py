"""One run, one process: who holds a run's directory, and until when."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.errors import UserError
from grpo_jax.runs.lock import NAME, only_writer

HOLDER = """
import sys, time
from pathlib import Path
from grpo_jax.runs.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(run_dir: Path) -> subprocess.Popen:
    """A process that holds the lock of a directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_with_the_pid_and_host_of_the_first_until_that_is_killed(tmp_path: Path) -> None:
    first = holder(tmp_path)
    try:
        with pytest.raises(UserError) as caught, only_writer(tmp_path):
            pass
        assert f"is being written by process {first.pid} on {socket.gethostname()}, which" in str(caught.value)
        assert json.loads((tmp_path / NAME).read_text())["pid"] == first.pid  # nor is the holder's entry overwritten
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert first.stdout is not None
        first.stdout.close()
    with only_writer(tmp_path):  # a dead process holds nothing
        assert json.loads((tmp_path / NAME).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}


def test_a_second_log_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(UserError, match="is being written by"), only_writer(tmp_path):
        pass
    with only_writer(tmp_path):
        pass


def test_a_lock_whose_holder_wrote_nothing_yet_is_held_all_the_same(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        (tmp_path / NAME).write_text("")
        with pytest.raises(UserError, match="is being written by a process, which"), only_writer(tmp_path):
            pass


def test_a_child_that_was_forked_and_lives_on_does_not_hold_the_run(tmp_path: Path) -> None:
    code = f"""
import os, time
from pathlib import Path
from grpo_jax.runs.lock import only_writer
with only_writer(Path({str(tmp_path)!r})):
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)  # once it has let go of the lock
        time.sleep(60)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.stdout.close()
    process.kill()
    process.wait()
    try:
        with only_writer(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_directory_that_was_removed_and_made_again_is_locked_anew(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with only_writer(run_dir):
        (run_dir / NAME).unlink()  # as a run that is refused removes its directory
        with only_writer(run_dir), pytest.raises(UserError), only_writer(run_dir):
            pass
