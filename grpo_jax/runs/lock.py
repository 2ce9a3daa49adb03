"""One run, one process: a lock on a run's directory, which a process that is dead does not hold.

The system holds the lock for as long as the process lives that has the file open, so that a killed run can be gone on
with at once. The file stays in the directory; what it says is of use only while the lock is held.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from grpo_jax.errors import UserError, warn
from grpo_jax.runs.files import read_json, writing

NAME = ".lock"
_held: set[IO[str]] = set()


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Holds the lock of a run's directory, which exists.

    Raises:
      UserError: if another process (or this one) holds it, with the process and its machine.
      RunError: if the directory cannot be written.
    """
    with writing(run_dir):
        file = _locked(run_dir / NAME, run_dir)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)
        file.close()


def _locked(path: Path, run_dir: Path) -> IO[str]:
    """The lock's file, opened and locked."""
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            holder = read_json(path)
            by = f"process {holder['pid']} on {holder['host']}" if holder.keys() >= {"pid", "host"} else "a process"
            raise UserError(
                f"{str(run_dir)!r} is being written by {by}, which is still running: wait until it has ended, or stop "
                "it, and give this command again."
            ) from None
        except OSError as error:
            warn(f"{path} cannot be locked ({error.strerror}): do not start a second process on this run.")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # the directory was removed by a run that was refused, and made again


def _let_go() -> None:
    """A child that a process forks, such as a reward's worker, may live longer and must not hold the run."""
    for file in _held:
        os.close(file.fileno())


os.register_at_fork(after_in_child=_let_go)
