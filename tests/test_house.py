"""The rules of the house, read from its imports: who may use whom."""

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

# Rooms by floor: imports go down, or stay in the room. Single files are rooms of their own.
FLOORS = (
    ("ground", "pldc_numbers", "cutout"),
    ("config", "part_bank"),
    ("deeplab_presets",),
    ("panoptic_eval", "instance_eval", "readers"),
    ("matcher", "clip_ensemble", "deformable_cpu"),
    ("deformable", "losses"),
    ("model", "deeplab"),
    ("inference",),
    ("pretrained",),
    ("mini",),
    ("data",),
    ("engine",),
    ("mean_teacher", "dewa", "semantic"),
    ("pldc", "esl"),
    ("report",),
    ("tools",),
    ("dearli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
METHODS = ("mean_teacher", "dewa", "pldc", "esl")
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
    for module in imported(path):
        used = module.split(".")[0]
        if used in FLOOR and used != room:
            assert FLOOR[used] < FLOOR[room], f"{path} imports {module}"


def test_methods_share_the_mean_teacher_and_nothing_else_of_each_other():
    for name in METHODS:
        others = set(METHODS) - {name, "mean_teacher"}
        assert not others & imported(Path(f"{name}.py")), name


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "engine"], ids=str)
def test_the_engine_knows_no_method(path):
    assert not {*METHODS, "dearli"} & {module.split(".")[0] for module in imported(path)}


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "readers"], ids=str)
def test_readers_know_no_network(path):
    networks = {"torch.nn", "torchvision", "open_clip", "timm", "segment_anything"}
    assert not networks & imported(path)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_has_at_most_500_lines_and_a_function_60(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_says_what_it_is_for_and_costs_no_time(wing):
    tree = ast.parse((ROOT / wing / "__init__.py").read_text())
    assert len(ast.get_docstring(tree)) > 100
    assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(tree))
