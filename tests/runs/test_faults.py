"""A run whose disk fails ends with one sentence, says so in run.json where it can, and goes on when there is room.

The command trains; its update and its sampler are simple functions (see `simple_run`).
"""

import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import letters
import pytest
from malformed import ASKED
from simple_run import assert_same_run, simple_training

from grpo_jax import cli
from grpo_jax.cli import common

SETTINGS = ["steps=3", "checkpoint_every=1", "evaluation.num_prompts=1", "evaluation.num_samples=1"]


@pytest.fixture(scope="module", autouse=True)
def _simple():
    with simple_training():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return Path(shutil.copy(letters.__file__, tmp_path_factory.mktemp("experiment") / "toy.py"))


def train(source: Path, run_dir: Path, *more: str) -> int:
    return cli.main(["train", str(source), "--run-dir", str(run_dir), "--quiet", "--set", *SETTINGS, *more])


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert train(source, run_dir) == 0
    return run_dir


class FullDisk:
    """A disk that has no room for another file or byte from its `room`-th write on; to read, and to change is allowed.

    Attributes:
      writes: how many files have been opened to write, made durable or created as folders so far.
    """

    def __init__(self, patch: pytest.MonkeyPatch, directory: Path, room: int) -> None:
        self.writes, self._room, self._directory = 0, room, str(directory)
        self._open, self._fsync, self._mkdir = io.open, os.fsync, os.mkdir
        for target in ("builtins.open", "io.open"):
            patch.setattr(target, self.open)
        patch.setattr(os, "mkdir", self.mkdir)
        patch.setattr(os, "fsync", self.fsync)

    def open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wax"):
            self.write(file)
        return self._open(file, mode, *arguments, **options)

    def mkdir(self, path: Any, *arguments: Any, **options: Any) -> None:
        self.write(path)
        self._mkdir(path, *arguments, **options)

    def fsync(self, file: int) -> None:
        self.write(os.readlink(f"/proc/self/fd/{file}"))
        self._fsync(file)

    def write(self, path: Any) -> None:
        if isinstance(path, int) or not os.path.abspath(path).startswith(self._directory):
            return
        self.writes += 1
        if self.writes > self._room:
            raise OSError(28, "No space left on device", str(path))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorboardX leaves its file open
def test_a_disk_that_is_full_from_any_write_on_ends_the_run_with_one_sentence(source, whole, tmp_path, capfd):
    with pytest.MonkeyPatch.context() as patch:
        disk = FullDisk(patch, tmp_path, room=10**9)
        assert train(source, tmp_path / "counted") == 0
    assert disk.writes > 60
    last = disk.writes - 9  # Orbax does not always write the same number of files
    for room in range(0, last, 1 if ASKED else last // 6):
        run_dir = tmp_path / f"run{room}"
        capfd.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            FullDisk(patch, tmp_path, room)
            status = train(source, run_dir)
        said = capfd.readouterr().err
        assert status == 1, room
        assert re.fullmatch(r"error: [^\n]*cannot (write|be written)[^\n]*No space left on device\.\n", said), said
        if (run_dir / "run.json").exists():
            assert json.loads((run_dir / "run.json").read_text())["status"] == "failed", room
        assert train(source, run_dir, "--resume") == 0, room
        assert_same_run(run_dir, whole)
    gc.collect()  # here, where the warning about the open files is ignored


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A real file system of 1 MB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("left", [4, 100, 200, 300])
def test_a_real_disk_that_becomes_full_ends_the_run_with_one_sentence(source, whole, small_disk, capfd, left):
    """`left` kB are left: the run takes about 400, most of it for its checkpoints."""
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (2**20 - left * 1024))
    capfd.readouterr()
    status, said = train(source, small_disk / "run"), capfd.readouterr().err
    assert status == 1 and re.fullmatch(r"error: [^\n]*No space left on device[^\n]*\n", said), said
    if (record := small_disk / "run" / "run.json").exists():
        assert json.loads(record.read_text())["status"] == "failed"
    filler.unlink()
    assert train(source, small_disk / "run", "--resume") == 0
    assert_same_run(small_disk / "run", whole)


def meanwhile(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Something that happens when the second step is done."""
    callback = SimpleNamespace(on_step=lambda event: action() if event.step == 1 else None)
    monkeypatch.setattr(common, "callbacks", lambda track: [callback])


def test_a_disk_that_can_only_be_read_from_then_on_ends_the_run_with_one_sentence(
    source, whole, small_disk, capfd, monkeypatch
):
    meanwhile(monkeypatch, lambda: subprocess.run(["mount", "--bind", "-o", "ro", small_disk, small_disk], check=True))
    assert train(source, small_disk / "run") == 1
    assert re.fullmatch(r"error: [^\n]*Read-only file system[^\n]*\n", capfd.readouterr().err)
    subprocess.run(["umount", "--lazy", small_disk], check=True)
    monkeypatch.undo()
    assert train(source, small_disk / "run", "--resume") == 0
    assert_same_run(small_disk / "run", whole)


def test_a_run_directory_that_vanishes_ends_the_run_with_one_sentence(source, tmp_path, capfd, monkeypatch):
    meanwhile(monkeypatch, lambda: shutil.move(tmp_path / "run", tmp_path / "elsewhere"))
    assert train(source, tmp_path / "run") == 1
    said = capfd.readouterr().err
    assert re.fullmatch(r"error: [^\n]*(cannot write|cannot be written)[^\n]*\n", said), said


@pytest.mark.parametrize("hook", ["on_start", "on_step", "on_evaluation"])
def test_events_that_cannot_be_written_end_the_run_and_it_goes_on_later(
    source, whole, tmp_path, capfd, monkeypatch, hook
):
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    name = {"on_start": "_writer", "on_step": "_add", "on_evaluation": "_add_scalars"}[hook]
    monkeypatch.setattr(f"grpo_jax.runs.tensorboard.TensorBoard.{name}", property(fail) if hook == "on_start" else fail)
    assert train(source, tmp_path / "run") == 1
    said = capfd.readouterr().err
    assert re.fullmatch(r"error: cannot write [^\n]*: No space left on device\.\n", said), said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    assert train(source, tmp_path / "run", "--resume") == 0
    assert_same_run(tmp_path / "run", whole)


PROGRAM = """
import jax, jax.numpy as jnp
x = jnp.arange(12.0).reshape(3, 4)
print(float(jax.jit(lambda x: (jnp.sin(x) @ x.T).sum())(x)))
"""


def test_programs_in_jaxs_cache_that_were_damaged_are_compiled_again(tmp_path):
    """JAX checks its entries, which are compressed; that an entry lies under another's name it does not see."""
    small = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    environment = {**os.environ, **small, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}

    def run() -> str:
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    right = run()
    entries = [path for path in tmp_path.iterdir() if path.name.endswith("-cache")]
    assert len(entries) > 1
    for number, path in enumerate(entries):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes([b"", b"garbage", data[: len(data) // 2], data][number % 4])
    assert run() == right
