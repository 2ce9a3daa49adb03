"""The folder of what the tests compile belongs to the user alone."""

import os
import stat

from private import private_folder


def test_a_private_folder_is_made_or_closed_to_others(tmp_path):
    assert private_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert private_folder(tmp_path / "open") is not None
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o700


def test_what_is_somebody_elses_or_no_folder_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    assert private_folder(tmp_path / "file") is private_folder(tmp_path / "file" / "x") is None
    assert private_folder(tmp_path / "link") is None
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert private_folder(tmp_path) is None
