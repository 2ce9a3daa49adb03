"""The checksums of a folder's files, in the form of the command sha256sum."""

import hashlib
from pathlib import Path

from grpo_jax.runs.files import sync

SUMS = "SHA256SUMS"  # in the folder


def write_sums(folder: Path) -> None:
    """Writes the checksums of a folder's files. When it returns, all of the folder is on the disk."""
    files = _files(folder)
    (folder / SUMS).write_text("".join(f"{_sum_of(path)}  {name}\n" for name, path in files.items()))
    for path in (*files.values(), folder / SUMS, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)


def damage_of(folder: Path, *, may_lack_sums: bool = False) -> str | None:
    """The first file of a folder that is missing, added or not what it was, and which of these; None if all are whole.

    Args:
      may_lack_sums: a folder without checksums passes for whole.
    """
    try:
        lines = (folder / SUMS).read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return None if may_lack_sums else f"{SUMS} is missing"
    except OSError:
        return f"{SUMS} cannot be read"
    sums = {name: wanted for wanted, _, name in (line.partition("  ") for line in lines)}
    for name in sorted(sums.keys() | _files(folder).keys()):
        try:
            if _sum_of(folder / name) != sums.get(name):
                return f"{name or SUMS} is not what was saved"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError):
            return f"{name or SUMS} cannot be read"
    return None


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder by their names in it; hidden ones, as of a file manager, do not count."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths) if path != folder / SUMS}


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
