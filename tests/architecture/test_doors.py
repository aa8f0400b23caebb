"""Import directions, import circles, sizes of modules and functions, tests of modules, where a target may be named."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("vae_export", "runtimes")
MOST_LINES = 400
MOST_FUNCTION_LINES = 60
FOREIGN_TO_RUNTIMES = {"vae_export", "torch", "onnx", "diffusers", "safetensors"}

#: module -> what it imports all the same, inside a function
ALLOWED_IMPORTS = {
    # Reads and writes a checkpoint in diffusers' layout where a user asks; the extra `flax` installs safetensors.
    "runtimes.flax.params": {"safetensors", "safetensors.numpy"},
}
#: module -> the lines that it may have
LONG_MODULES: dict[str, int] = {}
#: function -> the lines that it may have
LONG_FUNCTIONS = {
    "vae_export.cli.app.export": 85,  # typer reads a command's options from its signature
    "vae_export.cli.dataset.encode_dataset_command": 100,  # as above
    "vae_export.export.export_bundle": 65,  # the main job, read from top to bottom
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def nodes_that_run(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below `node`, but for the bodies of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from nodes_that_run(other)
            continue
        yield child
        yield from nodes_that_run(child)


def imported(name: str) -> set[str]:
    """What the module imports, at module level and inside functions."""
    parts = name.split(".")
    package = parts if FILES[name].name == "__init__.py" else parts[:-1]
    found = set()
    for node in nodes_that_run(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            # `from package import module` needs the module alone; `from package import name` needs the package.
            found |= {other if other in FILES else base for other in inner}
    return found


TESTS = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("test_*.py"))}
IMPORTS = {name: imported(name) for name in FILES}


def circles() -> list[list[str]]:
    """Groups of modules that reach one another."""
    reached = {}
    for name in FILES:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            for other in IMPORTS[waiting.pop()] & FILES.keys() - seen:
                seen.add(other)
                waiting.append(other)
        reached[name] = seen
    groups = {
        frozenset({name, *(b for b in reached[name] if name in reached[b])}) for name in FILES if name in reached[name]
    }
    return sorted(sorted(group) for group in groups)


@pytest.mark.parametrize("name", [name for name in FILES if name.split(".")[0] == "runtimes"])
def test_runtimes_import_neither_vae_export_nor_the_export_libraries_but_where_listed(name):
    assert {other for other in IMPORTS[name] if other.split(".")[0] in FOREIGN_TO_RUNTIMES} == ALLOWED_IMPORTS.get(
        name, set()
    )


def test_no_modules_import_one_another_in_a_circle():
    assert circles() == []


def test_no_module_but_the_listed_is_longer_than_400_lines():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > LONG_MODULES.get(name, MOST_LINES)} == {}


def test_no_function_but_the_listed_is_longer_than_60_lines():
    lengths = {
        f"{name}.{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    most = {name: LONG_FUNCTIONS.get(name, MOST_FUNCTION_LINES) for name in lengths}
    assert {name: lines for name, lines in lengths.items() if lines > most[name]} == {}


@pytest.mark.parametrize("name", ["export", "comparison", "validate", "tune", "options"])
def test_what_every_target_shares_names_no_target(name):
    code = FILES[f"vae_export.{name}"].read_text().lower()
    assert [word for word in ("openvino", "tensorrt", "flax") if word in code] == []


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_module_imports_another_or_a_conftest(path):
    """What tests share is in `tests/helpers`."""
    modules = []
    for node in ast.walk(TESTS[path]):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "helpers are imported by their whole name"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    others = {other.stem for other in TESTS} | {"conftest"}
    assert [name for name in modules if name.split(".")[0] in others] == []
    ours = [name for name in modules if name.split(".")[0] == "tests"]
    assert [name for name in ours if not name.startswith("tests.helpers.")] == []


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if path.name != "__init__.py"])
def test_each_module_has_a_test_file_or_is_named_in_the_docstring_of_one(name):
    path = FILES[name]
    named = path.relative_to(ROOT).as_posix()
    docstrings = {test: " ".join((ast.get_docstring(tree) or "").split()) for test, tree in TESTS.items()}
    assert any(
        (test.stem == f"test_{path.stem}" and test.parent.name == named.split("/")[0]) or named in text
        for test, text in docstrings.items()
    ), f"no tests/{named.split('/')[0]}/test_{path.stem}.py, and no docstring of a test module names {named}"
