"""The architecture of docs/design.md: a room imports only from floors below its own, and what follows from it."""

import ast
import re
from pathlib import Path

import pytest

import grpo_jax
from grpo_jax.algorithms import ALGORITHMS
from grpo_jax.experiment import METHODS

HOUSE = Path(grpo_jax.__file__).parent
FLOORS = [
    {"errors"},  # every room may raise errors
    {"experiment", "sharding", "confidence", "text"},
    {"policy", "advantages", "losses", "rewards", "guards"},
    {"sampler", "logprobs", "tasks"},
    {"rollout"},
    {"evaluation"},
    {"algorithms"},
    {"update", "memory"},
    {"runs"},
    {"training"},
    {"sweep", "statistics", "reward_model", "replay"},
    {"report"},
    {"reward_lab", "research"},
    {"doctor"},
    {"api"},
    {"cli", "__init__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_JAX = {"errors", "text", "confidence", "experiment", "guards", "tasks", "rewards", "statistics"}
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
    assert room in FLOOR, f"{module} is on no floor: give it a place in docs/design.md and here"
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


def functions(module: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.FunctionDef)]


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


LONG = {"losses/policy_gradient.py:loss"}  # a wrapper for callers that have single arrays and no struct


def test_no_function_takes_more_than_seven_arguments():
    found = {
        f"{module.relative_to(HOUSE)}:{function.name}"
        for module in MODULES
        for function in functions(module)
        if len(parameters(function)) > 7
    }
    assert found == LONG


def test_no_file_has_more_than_400_lines():
    assert {m.name: n for m in MODULES if (n := len(m.read_text().splitlines())) > 400} == {}


INITS = sorted(set(HOUSE.rglob("__init__.py")) - {HOUSE / "__init__.py"})


@pytest.mark.parametrize("module", INITS, ids=lambda path: str(path.relative_to(HOUSE)))
def test_an_init_exports_and_holds_no_code(module):
    for node in ast.parse(module.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert is_docstring or is_all or isinstance(node, ast.ImportFrom), ast.unparse(node)


def test_one_module_knows_devices():
    found = {m.name for m in MODULES if re.search(r"pmap|devices\.|local_device|device_put", m.read_text())}
    assert found == {"sharding.py"}


def test_no_two_modules_import_each_other():
    """Imports inside of functions do not count: they are how a cycle is broken, and how JAX is left out of a config."""
    graph = {}
    for module in MODULES:
        name = ".".join(("grpo_jax", *module.relative_to(HOUSE).with_suffix("").parts)).removesuffix(".__init__")
        # Nor do imports for annotations alone, `if TYPE_CHECKING:`.
        body = [n for n in ast.parse(module.read_text()).body if not isinstance(n, (ast.FunctionDef, ast.If))]
        top = ast.Module(body, [])
        graph[name] = {other for other in imports(ast.unparse(top)) if other in SUBMODULES and other != name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


SUBMODULES = {
    ".".join(("grpo_jax", *module.relative_to(HOUSE).with_suffix("").parts))
    for module in MODULES
    if module.name != "__init__.py"
}


def test_every_method_of_the_package_is_one_file_that_a_config_knows():
    assert list(ALGORITHMS) == list(METHODS)
    for name, algorithm in ALGORITHMS.items():
        assert type(algorithm).__module__ == f"grpo_jax.algorithms.{name}"
        assert isinstance(algorithm, type(METHODS[name]))  # one and the same check
