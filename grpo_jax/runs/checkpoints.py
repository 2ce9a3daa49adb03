"""Checkpoints: saves and restores, with Orbax, everything that a training step depends on.

A checkpoint is one pytree (e.g. `{"trainable": ..., "optimizer": ..., "step": 40}`), stored flat: one array for each
leaf, under the leaf's path. So the saved leaves can be compared with the wanted ones, and a difference in structure,
shape or dtype is reported before anything is read. Orbax writes a step into a temporary directory and renames it when
everything is on disk, so an interrupted save leaves the earlier checkpoints unchanged.

`SHA256SUMS` in a checkpoint's folder has the checksum of each of its files (`sha256sum -c` reads it). They are compared
before anything is read, since a bit that has flipped on a disk may be a number as good as any other. A checkpoint
without that file is of an earlier version, or its run was killed right after the save; it is read all the same.
"""

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.errors import RunError, UserError
from grpo_jax.runs.files import write_text

SUMS = "SHA256SUMS"  # in the folder of each checkpoint


def save(directory: str | Path, step: int, state: Any, *, keep: int = 2) -> None:
    """Saves the pytree `state` of arrays and numbers as the checkpoint of `step`. Only the newest `keep` remain.

    If the step is saved already, nothing happens: a run that is resumed and stopped at once has nothing new to save.
    Raises `RunError` if the directory cannot be written.
    """
    leaves = {name: np.asarray(leaf) if _is_number(leaf) else leaf for name, leaf in _flatten(state).items()}
    stored = {name: leaf for name, leaf in leaves.items() if leaf.size}  # Orbax refuses arrays without elements
    try:
        with _manager(directory, keep=keep, create=True) as manager:
            if step not in manager.all_steps():
                manager.save(step, args=ocp.args.PyTreeSave(stored), force=True)
                _write_sums(Path(directory) / str(step))
    except (OSError, ValueError) as error:
        raise RunError(
            f"the checkpoint of step {step} cannot be written to {directory}: {_first_line(error)}"
        ) from error


def latest_step(directory: str | Path) -> int | None:
    """The newest step that is completely saved in `directory`, or None if there is none."""
    return max(kept_steps(directory), default=None)


def kept_steps(directory: str | Path) -> list[int]:
    """The steps that are completely saved in `directory`, the newest last."""
    if not Path(directory).is_dir():
        return []
    with _manager(directory) as manager:
        return sorted(manager.all_steps())


def saved_leaves(directory: str | Path, step: int | None = None) -> set[str]:
    """The paths of the leaves in a checkpoint (the newest), e.g. `trainable/norm/0`; none without a checkpoint."""
    step = latest_step(directory) if step is None else step
    if step is None:
        return set()
    with _manager(directory) as manager:
        try:
            return set(dict(manager.item_metadata(step).tree))
        except Exception:  # a damaged checkpoint; `restore` says so
            return set()


def restore(
    directory: str | Path,
    like: Any,
    *,
    step: int | None = None,
    optional_leaves: Collection[str] = (),
    partial: bool = False,
) -> tuple[int, Any]:
    """Reads the checkpoint of `step` (default: the newest) into the structure of `like` and returns (step, state).

    `like` is a pytree of arrays, `jax.ShapeDtypeStruct`s or numbers. A leaf with a sharding is returned as a
    `jax.Array` with that sharding, a number as a number, and any other leaf as a NumPy array. `optional_leaves` names
    leaves that the checkpoint may lack, because earlier versions did not save them; then those of `like` are returned.
    With `partial`, `like` may be a part of what was saved, and the rest is not read.
    Raises `UserError` if there is no checkpoint, if it cannot be read, or if a leaf's name, shape or dtype differs.
    """
    step = latest_step(directory) if step is None else step
    if step is None:
        raise UserError(f"there is no checkpoint in {str(directory)!r}.")
    place = f"the checkpoint of step {step} in {str(directory)!r}"
    leaves = _flatten(like)
    if (damaged := _damaged_file(Path(directory) / str(step))) is not None:
        remedy = _remedy([other for other in kept_steps(directory) if other < step])
        raise UserError(f"{place} is damaged: its file {damaged} is not what was saved{remedy}.")
    with _manager(directory) as manager:
        try:
            found = dict(manager.item_metadata(step).tree)
            wanted = {name: leaf for name, leaf in leaves.items() if name in found or name not in optional_leaves}
            if partial:
                found = {name: leaf for name, leaf in found.items() if name in wanted}
            _compare(place, wanted, found)
            arguments = {name: _restore_arguments(wanted[name]) for name in found}
            item = dict.fromkeys(found, 0)
            how = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
            stored = manager.restore(step, args=how)
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types for foreign and for incomplete files
            remedy = _remedy([other for other in manager.all_steps() if other < step])
            raise UserError(f"{place} cannot be read: it is damaged or was not written by grpo_jax{remedy}.") from error
    restored = [_like(leaf, stored.get(name)) if name in wanted else leaf for name, leaf in leaves.items()]
    return step, jax.tree.unflatten(jax.tree.structure(like), restored)


def _remedy(earlier: Sequence[int]) -> str:
    return f" (remove its folder to go back to step {max(earlier)})" if earlier else ""


def _write_sums(folder: Path) -> None:
    """Writes the checksums of a checkpoint's files, in the form of the command sha256sum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_sum_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    write_text(folder / SUMS, "".join(lines))


def _damaged_file(folder: Path) -> str | None:
    """The first file of a checkpoint that is missing or differs from its checksum; None if there is none."""
    try:
        lines = (folder / SUMS).read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        wanted, _, name = line.partition("  ")
        try:
            if _sum_of(folder / name) != wanted:
                return name or SUMS
        except (OSError, ValueError):
            return name or SUMS
    return None


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _restore_arguments(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    return ocp.RestoreArgs(restore_type=np.ndarray) if sharding is None else ocp.ArrayRestoreArgs(sharding=sharding)


def _like(leaf: Any, value: Any) -> Any:
    """A restored value as the type of `leaf`."""
    if value is None:  # an array without elements is not stored
        return np.zeros(leaf.shape, leaf.dtype)
    return type(leaf)(value.item()) if _is_number(leaf) else value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _manager(
    directory: str | Path, *, keep: int | None = None, create: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """Opens `directory` with Orbax. Its log messages (through absl) are switched off meanwhile."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    # Not asynchronous: when `save` returns, everything is on disk.
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create, enable_async_checkpointing=False)
    try:
        handler = ocp.PyTreeCheckpointHandler()
        with ocp.CheckpointManager(Path(directory).resolve(), options=options, item_handlers=handler) as manager:
            yield manager
    finally:
        logger.setLevel(level)
