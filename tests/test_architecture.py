"""Which part may know which: read from the imports of the source, wherever in a file they are."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "wsipipe"
PURE = (
    "geometry", "tissue", "tiles", "maps", "instances", "outlines", "rings", "features", "neighbours", "seams",
    "metrics", "comparison", "training.targets",
)  # fmt: skip
SHELL = ("slide", "store", "stages")
FOREIGN = ("zarr", "torch")
# Each knows only those before it, by whatever way; helpers that are not named here are found through their users.
LAYERS = (
    ("errors",), ("atomic",), ("geometry",), ("config",), ("slide", "tissue", "roi"), ("tiles",), ("model", "maps"),
    ("provenance",), ("store",), ("instances",), ("features",), ("table",), ("geojson",), ("overlay",),
    ("stages",), ("cli",),
)  # fmt: skip
SLOW = ("torch", "zarr", "dask", "geopandas", "skimage", "numba", "pyarrow", "cv2")


@cache
def modules() -> dict[str, Path]:
    """Module names without the package's own ("" is the package itself), and their files."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """What a module's file imports: names of `modules` for ours, full names for others'."""
    return frozenset(_imports(ast.parse(modules()[module].read_text(encoding="utf-8"))))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path"
            # `from package import module` means the module, `from module import name` the module too
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            ours = name.removeprefix("wsipipe").removeprefix(".")
            if not name.startswith("wsipipe"):
                yield name
            else:
                yield ours if ours in modules() else ours.rpartition(".")[0]


@cache
def reached(module: str) -> frozenset[str]:
    """Our modules that importing `module` and calling it may bring in."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        new = (imports(todo.pop()) & modules().keys()) - seen - {""}
        seen |= new
        todo.extend(new)
    return frozenset(seen)


def within(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(part + ".") for part in parts)


@pytest.mark.parametrize("module", [*PURE, *SHELL, *(name for layer in LAYERS for name in layer)])
def test_a_module_these_rules_speak_of_exists(module: str) -> None:
    assert module in modules(), f"wsipipe/{module}.py was renamed or is missing: name it here as it is called now"


@pytest.mark.parametrize("module", [module for module in PURE if module in modules()])
def test_a_pure_module_knows_no_slide_store_stage_array_store_or_network_library(module: str) -> None:
    known = {module, *reached(module)}
    assert not [other for other in known if within(other, SHELL)]
    foreign = {f"{by} imports {name}" for by in known for name in imports(by) if within(name, FOREIGN)}
    assert not {line for line in foreign if not line.startswith("maps imports torch")}


@pytest.mark.parametrize("module", sorted(modules().keys() - {""}))
def test_imports_go_one_way(module: str) -> None:
    for number, layer in enumerate(LAYERS):
        if within(module, layer):
            later = tuple(name for after in LAYERS[number + 1 :] for name in after)
            assert not [other for other in reached(module) if within(other, later)]


def test_no_two_modules_need_each_other() -> None:
    TopologicalSorter({module: (imports(module) & modules().keys()) - {""} for module in modules()}).prepare()


@pytest.mark.parametrize("module", ["cli", "config", "model.spec", "doctor", "device"])
def test_what_help_needs_imports_nothing_slow(module: str) -> None:
    code = f"import sys, wsipipe.{module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not set(SLOW) & set(run.stdout.split())


@pytest.mark.parametrize("module", sorted(modules()))
def test_nothing_is_printed(module: str) -> None:
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "print"]
