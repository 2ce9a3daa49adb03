"""Checkpoints: saves and restores, with Orbax, everything that a training step depends on.

A checkpoint is one pytree (e.g. `{"trainable": ..., "optimizer": ..., "step": 40}`), stored flat: one array for each
leaf, under the leaf's path. So the saved leaves can be compared with the wanted ones, and a difference in structure,
shape or dtype is reported before anything is read.

A checkpoint is written into a folder whose name begins with a dot, and gets its own name when everything is on the
disk. So it is whole or absent, however the process ends. `SHA256SUMS` in it has the checksum of each of its files
(`sha256sum -c` reads it). They are compared before anything is read, since a bit that has flipped on a disk may be a
number as good as any other. Earlier versions wrote the checksums after the checkpoint had its name: one of theirs (its
arrays are in a folder `default`) may lack them, and is read all the same.

`Saver` writes while training goes on. Orbax copies the arrays before `save` returns, and writes the copy in threads of
its own. The arrays are not compressed: weights become 7 % smaller by that, and take twice as long to write.
"""

import errno
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.errors import RunError, UserError
from grpo_jax.runs.files import sync
from grpo_jax.runs.sums import damage_of, write_sums

_OVERHEAD = 64 * 1024  # bytes that a checkpoint takes beside its arrays
_DAY = 86_400  # seconds that a save may take; Orbax's own limit of ten minutes is too short for a slow disk

# What Orbax logs of a failure is no news: it raises the error too, and this module says what follows from it. Nor are
# the parts of a save that it did not come to then.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
warnings.filterwarnings("ignore", r"coroutine '(NumpyHandler|BasePyTreeCheckpointHandler)\.", RuntimeWarning)


def newest_two(steps: Sequence[int]) -> Collection[int]:
    """Of the saved steps, in their order, the newest two."""
    return steps[-2:]


class Saver:
    """Saves checkpoints to a directory while training goes on, one at a time.

    Leaving it as a context waits for the last one. A save that fails is a `RunError` of the next `save` or `wait`, or
    of the context's end if nothing else has failed there.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory).absolute()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.wait()
        except RunError:
            if error is None:
                raise  # else what went wrong first is what must be told
        finally:
            self._pool.shutdown()

    def save(
        self,
        step: int,
        state: Any,
        *,
        keep: Callable[[Sequence[int]], Collection[int]] = newest_two,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Saves the pytree `state` of arrays and numbers, as it is now, as the checkpoint of `step`.

        If the step is saved already, nothing happens: a run that is resumed and stopped at once has nothing new.

        Args:
          keep: of the steps that are then saved, in their order, those that remain; the others are removed.
          files: further files of the checkpoint, by name, with their content.

        Raises:
          RunError: if the directory cannot be written, or if the save before this one has failed.
        """
        self.wait()
        leaves = {name: np.asarray(leaf) if _is_number(leaf) else leaf for name, leaf in _flatten(state).items()}
        stored = {name: leaf for name, leaf in leaves.items() if leaf.size}  # Orbax refuses arrays without elements
        part = self._directory / f".{step}.part"
        try:
            steps = kept_steps(self._directory)
            if step in steps:
                return
            self._directory.mkdir(parents=True, exist_ok=True)
            for left in _unfinished(self._directory):
                shutil.rmtree(left)
            _require_room(self._directory, sum(leaf.nbytes for leaf in stored.values()))
            checkpointer = ocp.AsyncCheckpointer(_handler(), timeout_secs=_DAY)
            checkpointer.save(part, args=ocp.args.PyTreeSave(stored))
        except Exception as error:  # Orbax and TensorStore raise many types
            raise self._failure(step, error) from error
        removed = set(steps) - set(keep(sorted([*steps, step])))
        self._pending = self._pool.submit(self._finish, checkpointer, step, part, files or {}, removed)

    def wait(self) -> None:
        """Returns when everything is on the disk. Raises `RunError` if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _finish(
        self,
        checkpointer: ocp.AsyncCheckpointer,
        step: int,
        part: Path,
        files: Mapping[str, str],
        removed: Collection[int],
    ) -> None:
        """Waits for the arrays and writes the rest; then the checkpoint gets its name, and earlier ones may go."""
        try:
            with checkpointer:
                checkpointer.wait_until_finished()
            for name, text in files.items():
                (part / name).write_text(text, "utf-8")
            write_sums(part)
            part.rename(self._directory / str(step))
            sync(self._directory)
            for other in removed:
                gone = self._directory / f".{other}.part"  # or a process that is killed here would leave half of it
                (self._directory / str(other)).rename(gone)
                shutil.rmtree(gone)
        except Exception as error:
            raise self._failure(step, error) from error

    def _failure(self, step: int, error: Exception) -> RunError:
        for left in _unfinished(self._directory):
            shutil.rmtree(left, ignore_errors=True)  # which makes room for the record of the failure
        return RunError(f"the checkpoint of step {step} cannot be written to {self._directory}: {_reason(error)}.")


def save(
    directory: str | Path,
    step: int,
    state: Any,
    *,
    keep: Callable[[Sequence[int]], Collection[int]] = newest_two,
    files: Mapping[str, str] | None = None,
) -> None:
    """Saves one checkpoint as `Saver.save` does, and returns when it is on the disk."""
    with Saver(directory) as saver:
        saver.save(step, state, keep=keep, files=files)


def latest_step(directory: str | Path) -> int | None:
    """The newest step that is completely saved in `directory`, or None if there is none."""
    return max(kept_steps(directory), default=None)


def kept_steps(directory: str | Path) -> list[int]:
    """The steps that are completely saved in `directory`, the newest last.

    Raises `UserError` if that is no directory.
    """
    try:
        return sorted(int(name) for name in os.listdir(directory) if name.isdecimal() and name == str(int(name)))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{str(directory)!r} cannot be read, where checkpoints are kept: {error.strerror}.") from None


def saved_leaves(directory: str | Path, step: int | None = None) -> set[str]:
    """The paths of the leaves in a checkpoint (the newest), e.g. `trainable/norm/0`; none without a checkpoint."""
    step = latest_step(directory) if step is None else step
    if step is None:
        return set()
    try:
        return set(_metadata(_arrays(directory, step)))
    except Exception:  # a damaged checkpoint; `restore` says so
        return set()


def read_file(directory: str | Path, step: int, name: str) -> str | None:
    """One of the `files` that were saved with a checkpoint; None if there is none of this name."""
    path = Path(directory) / str(step) / name
    return path.read_text("utf-8") if path.is_file() else None


def restore(
    directory: str | Path,
    like: Any,
    *,
    step: int | None = None,
    optional_leaves: Collection[str] = (),
    partial: bool = False,
    place: Callable[[np.ndarray], Any] = lambda array: array,
) -> tuple[int, Any]:
    """Reads the checkpoint of `step` (default: the newest) into the structure of `like` and returns (step, state).

    `like` is a pytree of arrays, `jax.ShapeDtypeStruct`s or numbers. A leaf with a sharding is returned as a
    `jax.Array` with that sharding, a number as a number, and any other leaf as what `place` makes of its NumPy array.
    The arrays are read and placed one after the other, so that there is never a second copy of the whole state.
    `optional_leaves` names leaves that the checkpoint may lack, because earlier versions did not save them; then those
    of `like` are returned. With `partial`, `like` may be a part of what was saved, and the rest is not read.
    Raises `UserError` if there is no checkpoint, if it cannot be read, or if a leaf's name, shape or dtype differs.
    """
    step = latest_step(directory) if step is None else step
    if step is None:
        raise UserError(f"there is no checkpoint in {str(directory)!r}.")
    require_whole(directory, step)
    leaves = _flatten(like)
    try:
        folder = _arrays(directory, step)
        found = _metadata(folder)
        wanted = {name: leaf for name, leaf in leaves.items() if name in found or name not in optional_leaves}
        if partial:
            found = {name: leaf for name, leaf in found.items() if name in wanted}
        _compare(_place(directory, step), wanted, found)
        state = dict(leaves)
        with ocp.Checkpointer(_handler()) as checkpointer:
            for name, leaf in wanted.items():  # one by one: Orbax holds up to three copies of what it reads at once
                array = _read(checkpointer, folder, name, leaf) if name in found else None
                state[name] = _like(leaf, array, place)
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for foreign and for incomplete files
        raise UserError(
            f"{_place(directory, step)} cannot be read: it is damaged or was not written by grpo_jax"
            f"{remedy(directory, step)}."
        ) from error
    return step, jax.tree.unflatten(jax.tree.structure(like), state.values())


def require_whole(directory: str | Path, step: int) -> None:
    """Raises `UserError` if a file of a checkpoint is not what was saved."""
    folder = Path(directory) / str(step)
    if (damage := damage_of(folder, may_lack_sums=_is_of_earlier_version(folder))) is not None:
        raise UserError(f"{_place(directory, step)} is damaged: its file {damage}{remedy(directory, step)}.")


def remedy(directory: str | Path, step: int) -> str:
    """What to do about a checkpoint that is of no use, as the end of a sentence; empty if there is no earlier one."""
    earlier = [other for other in kept_steps(directory) if other < step]
    return f" (remove its folder to go back to step {max(earlier)})" if earlier else ""


def _place(directory: str | Path, step: int) -> str:
    return f"the checkpoint of step {step} in {str(directory)!r}"


def _unfinished(directory: Path) -> list[Path]:
    """What a process that was killed has left in a directory of checkpoints, also one of an earlier version."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if ".orbax-checkpoint-tmp" in path.name or path.suffix == ".part"]
    return [path for path in found if path.is_dir()]


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _arrays(directory: str | Path, step: int) -> Path:
    """The folder in which Orbax has written a checkpoint's arrays."""
    folder = Path(directory).resolve() / str(step)
    return folder / "default" if _is_of_earlier_version(folder) else folder


def _is_of_earlier_version(folder: Path) -> bool:
    return (folder / "default").is_dir()


def _metadata(folder: Path) -> dict[str, Any]:
    """The shape and dtype of each array in a checkpoint, by its path."""
    with ocp.Checkpointer(_handler()) as checkpointer:
        return dict(checkpointer.metadata(folder).item_metadata.tree)


def _flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path, e.g. `trainable/norm/0`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (bool, int, float))


def _shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    leaf = np.asarray(leaf) if _is_number(leaf) else leaf
    return tuple(leaf.shape), np.dtype(leaf.dtype)


def _compare(place: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises `UserError` for the first leaf that differs between the wanted state and the checkpoint."""
    for name, leaf in wanted.items():
        shape, dtype = _shape_and_dtype(leaf)
        if name not in found:
            if 0 in shape:
                continue
            raise UserError(f"{place} holds no {name!r}: it was saved by a different policy or optimizer.")
        other_shape, other_dtype = _shape_and_dtype(found[name])
        if shape != other_shape:
            raise UserError(f"{place} holds {name!r} with shape {list(other_shape)}, where {list(shape)} is wanted.")
        if dtype != other_dtype:
            raise UserError(f"{place} holds {name!r} as {other_dtype}, where {dtype} is wanted.")
    unknown = sorted(set(found) - set(wanted))
    if unknown:
        raise UserError(f"{place} holds {unknown[0]!r}, which this policy and optimizer do not have.")


def _read(checkpointer: ocp.Checkpointer, folder: Path, name: str, leaf: Any) -> Any:
    """One array of a checkpoint, where `leaf` is: on devices if it has a sharding, else on the host."""
    sharding = getattr(leaf, "sharding", None)
    how = ocp.RestoreArgs(restore_type=np.ndarray) if sharding is None else ocp.ArrayRestoreArgs(sharding=sharding)
    arguments = ocp.args.PyTreeRestore(item={name: 0}, restore_args={name: how}, partial_restore=True)
    return checkpointer.restore(folder, args=arguments)[name]


def _like(leaf: Any, value: Any, place: Callable[[np.ndarray], Any]) -> Any:
    """A restored value as the type of `leaf`."""
    if value is None:  # an array without elements is not stored
        value = np.zeros(leaf.shape, leaf.dtype)
    if _is_number(leaf):
        return type(leaf)(value.item())
    return place(value) if isinstance(value, np.ndarray) else value


def _require_room(directory: Path, wanted: int) -> None:
    """Raises `OSError` if a disk has no room for so many bytes.

    It is asked before Orbax writes, since TensorStore goes on for a while with a disk that is full.
    """
    free = shutil.disk_usage(directory).free
    if free < wanted + _OVERHEAD:
        needs = f"it needs {wanted / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({needs})")


def _reason(error: Exception) -> str:
    """What an error says, in one line without a full stop; of an error of the system in TensorStore, that alone."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".")


def _without_closed_loops(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A hook for errors that nobody can catch, which leaves out what TensorStore has to say to a loop that is closed.

    Orbax closes its event loop at the first write that fails, and the other writes then report to it all the same.
    """

    def told(error: Any) -> None:
        if not (isinstance(error.exc_value, RuntimeError) and str(error.exc_value) == "Event loop is closed"):
            hook(error)

    return told


sys.unraisablehook = _without_closed_loops(sys.unraisablehook)
