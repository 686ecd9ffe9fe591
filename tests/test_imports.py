"""Who may import whom: a floor of the package imports only from itself and the floors below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nestor

PACKAGE = Path(nestor.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up. Errors, files and jobs serve all; `import nestor` names what floors up to the models
# define.
GROUND = ("errors", "files", "jobs")
FLOORS = (
    "ops",
    "layers",
    "models",
    "learning",
    "data",
    "training",
    "evaluation",
    "store",
    "serving",
    "quickstart",
    "cli",
)
ENTRIES = ("__init__", "__main__")
RESOURCES = ("configs", "checkpoints")

# Libraries that a floor must do without, and what no file may load before it is asked to.
FORBIDDEN = {
    "errors": ("torch", "transformers"),
    "ops": ("transformers", "accelerate", "datasets"),
    "layers": ("transformers", "accelerate", "datasets"),
    "store": ("fastapi", "starlette", "uvicorn"),
}
LAZY = ("fla", "triton", "lm_eval", "trl", "peft")


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported, as far as a module's text shows it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield f"relative import of {node.module}"
            elif node.module == "nestor":
                yield from (f"nestor.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def part(name: str) -> str:
    """The floor or single file of the package that `nestor.x.y` lies in: `x`."""
    return name.split(".")[1] if "." in name else "__init__"


def violations(source: str, home: str) -> list[str]:
    """What a module of the part `home` imports and must not."""
    found = []
    height = FLOORS.index(home) if home in FLOORS else -1
    allowed = FLOORS[: height + 1]
    if height > FLOORS.index("models"):
        allowed += ("__init__",)
    for name in imports(ast.parse(source)):
        top = name.split(".")[0]
        if name.startswith("relative"):
            found.append(name)
        elif top == "nestor" and home not in ENTRIES:
            target = part(name)
            named_only = name == "nestor.__version__"
            if not (target in allowed or target in GROUND or named_only):
                found.append(f"nestor/{home} imports {name}")
        elif top in FORBIDDEN.get(home, ()):
            found.append(f"nestor/{home} imports {name}")
    return found


def home_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_every_file_belongs_to_a_floor():
    assert {home_of(path) for path in FILES} <= {*GROUND, *FLOORS, *ENTRIES, *RESOURCES}
    assert len(FILES) > 50


@pytest.mark.parametrize("home", sorted({home_of(path) for path in FILES}))
def test_a_floor_imports_only_from_the_floors_below(home):
    files = [path for path in FILES if home_of(path) == home]
    assert [found for path in files for found in violations(path.read_text("utf-8"), home)] == []


def test_an_operation_is_no_module():
    """`ops` holds tensor functions: no class there derives from, or even names, `nn.Module`."""
    for path in FILES:
        if home_of(path) == "ops":
            tree = ast.parse(path.read_text("utf-8"))
            named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            named |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert "Module" not in named, path


def test_optional_libraries_are_loaded_where_they_are_used():
    """Nothing at the top of a module may need an extra of the package; files of kernels may need Triton."""
    for path in FILES:
        tree = ast.parse(path.read_text("utf-8"))
        tops = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        loaded = {name.split(".")[0] for node in tops for name in imports(node)}
        optional = set(LAZY) - ({"triton"} if "kernels" in path.parts else set())
        assert not loaded & optional, path


@pytest.mark.parametrize(
    ("home", "source"),
    [
        ("ops", "from nestor.layers.span import Span"),
        ("ops", "import transformers"),
        ("layers", "from transformers.cache_utils import Cache"),
        ("layers", "def f():\n    import nestor.models.state"),
        ("models", "from nestor.training import train"),
        ("models", "from nestor import training"),
        ("data", "from nestor.training.config import TrainConfig"),
        ("evaluation", "if TYPE_CHECKING:\n    from nestor.cli.main import main"),
        ("files", "from nestor.models.state import State"),
        ("errors", "import torch"),
        ("layers", "import nestor"),
        ("cli", "from .main import main"),
    ],
)
def test_a_wrong_import_is_seen(home, source):
    assert len(violations(source, home)) == 1


@pytest.mark.parametrize(
    ("home", "source"),
    [
        ("layers", "import torch\nfrom nestor.ops.neural_memory import MemorySpec"),
        ("layers", "from nestor.errors import ConfigError"),
        ("training", "import nestor"),
        ("training", "from nestor import __version__\nfrom nestor.data import Batch"),
        ("cli", "from nestor.evaluation import suites\nimport nestor.models.state"),
        ("__init__", "from nestor.layers.attention import Attention"),
    ],
)
def test_a_right_import_is_let_through(home, source):
    assert violations(source, home) == []
