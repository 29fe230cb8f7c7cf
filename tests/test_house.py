"""The rules of the house, read from its imports: who may use whom."""

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

# Rooms by floor: imports go down, or stay in the room. Single files are rooms of their own.
FLOORS = (
    ("ground",),
    ("config",),
    ("panoptic_eval", "readers"),
    ("matcher", "clip_ensemble", "deformable_cpu"),
    ("deformable", "losses"),
    ("model",),
    ("pretrained",),
    ("mini",),
    ("data",),
    ("engine",),
    ("mean_teacher", "dewa"),
    ("report",),
    ("tools",),
    ("dearli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WINGS = ("ground", "readers", "pretrained", "mini", "engine", "report", "tools")
FILES = [
    path.relative_to(ROOT)
    for path in sorted(
        [*ROOT.glob("*.py"), *(p for wing in WINGS for p in ROOT.glob(f"{wing}/**/*.py"))]
    )
    if path.name not in ("test_dearli.py", "conftest.py")
]


def imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down(path):
    room = path.parts[0].removesuffix(".py")
    assert room in FLOOR, f"{path}: a room without a floor"
    if str(path) == "engine/stages.py":
        pytest.skip("not in its place yet")
    for module in imported(path):
        used = module.split(".")[0]
        if used in FLOOR and used != room:
            assert FLOOR[used] < FLOOR[room], f"{path} imports {module}"
