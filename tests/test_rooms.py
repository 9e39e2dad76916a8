"""The map of the house in CONTRIBUTING.md: imports run one way, and private modules stay in their room."""

import ast
from pathlib import Path

import pytest

import pyro_flows_ext

ROOT = Path(pyro_flows_ext.__file__).parent
# Each room imports from rooms before it alone.
ORDER = [
    "files",
    "ops",
    "nn",
    "transforms",
    "distributions",
    "flows",
    "programs",
    "guides",
    "datasets",
    "infer",
    "results",
    "diagnostics",
    "testing",
    "cli",
]


def imports_of(path: Path, source: str):
    """Other modules of the package that a file imports, as tuples of names, with the imported names at the end."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield (*module, alias.name)


def violations(room: str, path: Path, source: str):
    for target in imports_of(path, source):
        if target[0] not in ORDER or target[0] == room:
            continue  # the package's own names, such as its version
        if ORDER.index(target[0]) > ORDER.index(room):
            yield f"{path.name} imports {target[0]}, which comes after {room}"
        if any(part.startswith("_") for part in target):
            yield f"{path.name} imports the private {'.'.join(target)}"


def test_every_room_has_a_place():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms <= set(ORDER)
    table = (ROOT.parent / "CONTRIBUTING.md").read_text()
    assert [room for room in ORDER if f"| `{room}" not in table] == []


@pytest.mark.parametrize("room", ORDER)
def test_imports_run_one_way(room):
    paths = [ROOT / f"{room}.py"] if room == "files" else list((ROOT / room).rglob("*.py"))
    assert paths
    assert [v for path in paths for v in violations(room, path, path.read_text())] == []


def test_violations_are_found():
    path = ROOT / "ops" / "wrong.py"
    found = list(violations("ops", path, "from ..guides import AutoFlow\nfrom ..nn._x import y\n"))
    assert len(found) == 3
