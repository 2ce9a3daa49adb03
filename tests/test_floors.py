"""The house stays as it is drawn in DESIGN §2: a room imports only from floors below its own."""

import ast
from pathlib import Path

import pytest

import grpo_jax

HOUSE = Path(grpo_jax.__file__).parent
FLOORS = [
    {"errors"},  # under the house: every room may raise errors
    {"experiment", "sharding", "__init__"},
    {"policy", "advantages", "losses", "rewards"},
    {"sampler", "logprobs", "tasks"},
    {"rollout"},
    {"evaluation"},
    {"algorithms"},
    {"update"},
    {"runs"},
    {"training"},
    {"sweep", "statistics", "reward_model"},
    {"report"},
    {"reward_lab", "research"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_JAX = {"errors", "experiment", "tasks", "rewards"}
MODULES = sorted(HOUSE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """Every module that the source names in an import, as a dotted path; names imported from the package included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            found |= {f"grpo_jax.{alias.name}" for alias in node.names} if node.module == "grpo_jax" else {node.module}
    return found


def test_imports_are_found_in_every_form():
    source = (
        "import jax.numpy as jnp\nfrom grpo_jax import logs, losses\ndef f():\n    from grpo_jax.policy.lora import g"
    )
    assert imports(source) == {"jax.numpy", "grpo_jax.logs", "grpo_jax.losses", "grpo_jax.policy.lora"}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_a_room_imports_only_from_floors_below_its_own(module):
    room = room_of(module)
    assert room in FLOOR, f"{module} is on no floor: give it a place in DESIGN §2 and here"
    for name in imports(module.read_text()):
        if name.startswith("grpo_jax."):
            other = name.split(".")[1]
            assert other in FLOOR, f"{module} imports {name}, which is on no floor"
            assert other == room or FLOOR[other] < FLOOR[room], f"{module} imports {name}, which is not below it"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_torch_is_imported_nowhere_and_jax_not_where_only_text_lives(module):
    packages = {name.split(".")[0] for name in imports(module.read_text())}
    assert "torch" not in packages
    if room_of(module) in WITHOUT_JAX:
        assert not packages & {"jax", "jaxlib", "flax", "optax", "orbax"}
