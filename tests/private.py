"""A folder that is the user's alone."""

import os
import stat
from pathlib import Path


def private_folder(path: Path) -> Path | None:
    """Makes a folder that this user alone can read and write; None if that cannot be, or if it is somebody else's."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return None
        path.chmod(0o700)
    except OSError:
        return None
    return path
