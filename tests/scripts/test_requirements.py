"""The lock files: every package that the project asks for, at one version within its bounds, with its digests."""

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("py*.txt"))
ENTRY = re.compile(
    r"^(?P<name>[\w.-]+)==(?P<version>\S+) \\\n(?P<hashes>(?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M
)


def locked(path: Path) -> dict[str, str]:
    return {canonicalize_name(entry["name"]): entry["version"] for entry in ENTRY.finditer(path.read_text())}


def wanted() -> list[Requirement]:
    """What `pip install grpo_jax[test]` asks for."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    lines = f"{config['options']['install_requires']}\n{extras['test']}\n{extras['gguf']}".split("\n")
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("grpo_jax[")]


def test_there_is_a_lock_for_the_oldest_and_the_newest_python():
    assert [path.name for path in LOCKS] == ["py311.txt", "py313.txt"]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_every_requirement_within_its_bounds(path):
    versions = locked(path)
    assert len(wanted()) > 15 and len(versions) == len(re.findall(r"(?m)^[^\s#]", path.read_text()))
    for requirement in wanted():
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_says_which_command_makes_it_again(path):
    version = f"3.{path.stem.removeprefix('py3')}"
    command = f"uv pip compile setup.cfg --extra test --python-version {version} --generate-hashes -o requirements/"
    assert f"#    {command}{path.name}\n" in path.read_text()
    assert command.replace(version, "3.11") in (ROOT / "CONTRIBUTING.md").read_text()
