"""What the documents say: their commands, names and links; and what waits for no library."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

import config
import dearli
from engine import method
from engine.parser import parser
from engine.resolve import resolve
from mean_teacher import MeanTeacher
from mini.scenes import mini_taxonomy
from tests.helpers import ROOT, fitting, log_of
from tests.test_house import FILES, FLOOR, FLOORS, WINGS

PAGES = [
    page.relative_to(ROOT)
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
]
README = (ROOT / "README.md").read_text()

# ------------------------------------------------------------------------------------- documents


def commands(text):
    """What follows `python dearli.py` in the code of a document."""
    return [
        line.split("#")[0].split("python dearli.py", 1)[1].split()
        for line in text.splitlines()
        if line.startswith("python dearli.py")
    ]


def test_every_command_of_the_documents_is_one_that_the_program_knows():
    listed = [command for page in PAGES for command in commands((ROOT / page).read_text())]
    tried = [
        code
        for path in (ROOT / file for file in FILES)
        for code in re.findall(
            r"^Try\b[^`]*`([^`]*)`", ast.get_docstring(ast.parse(path.read_text())) or "", re.M
        )
    ]
    assert len(tried) > 12
    listed += [
        shlex.split(code.split("dearli.py", 1)[1])
        for code in tried
        if "dearli.py" in code and "test_dearli.py" not in code
    ]
    prefix, outs = [], {}
    for line in (ROOT / "docs" / "tables.md").read_text().splitlines():
        if line.startswith("## "):
            name = (
                "coco-objects"
                if "Objects" in line
                else "coco"
                if "on COCO-Panoptic (" in line
                else "ade20k"
            )
            prefix = [
                "--dataset",
                name,
                "--data-root",
                "ROOT",
                "--split",
                "1_512" if name.startswith("coco") else "1_128",
            ]
        listed += [
            [*prefix, *code.split()] for code in line.split("`")[1::2] if code.startswith("--stage")
        ]
        listed += [
            code.split()[2:]
            for code in line.split("`")[1::2]
            if code.startswith("python dearli.py --stage")
        ]
        for folder in [
            code.split()[code.split().index("--out") + 1]
            for code in line.split("`")[1::2]
            if "--out" in code and "--stage" in code
        ]:
            assert outs.setdefault(folder, name) == name, f"{folder} is a run of two data sets"
    assert len(listed) > 50 and len(outs) > 20
    for arguments in listed:
        args = parser().parse_args(arguments)
        args.device = "cpu"
        if args.stage not in ("eval", "predict", "export", "report", "import"):
            resolve(args)  # those read the run that they are about


def test_the_guide_to_data_of_ones_own_runs_word_for_word(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "own-data.md").read_text()
    (snippet,), (block,) = (
        re.findall(f"```{language}\n(.*?)```", text, re.S) for language in ("python", "sh")
    )
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    listed = commands(block)
    assert [args[1] for args in listed] == [
        "import",
        "validate",
        "sup",
        "ssl",
        "predict",
        "report",
    ]
    here = ["--workers", "0", "--device", "cpu", "--report-images", "1"]
    for args in listed:
        assert dearli.main(fitting(args, here)) == 0, args
    out = capsys.readouterr().out
    assert (
        "6 labelled, 4 unlabelled and 2 validation images; left out: nothing" in out
        and "segments: bar 8, disc 8, ground 8" in out
        and "no problem found" in out
    )
    assert (
        len(list((tmp_path / "predictions" / "overlay").iterdir())) == 12
        and (tmp_path / "runs" / "shapes-ssl-all" / "report.html").is_file()
    )
    rows = log_of(tmp_path / "runs" / "shapes-ssl-all")
    assert all(row["unlabeled/mask"] >= 0 for row in rows[25:])  # the teacher has had its say
    for name in ("sup", "ssl"):  # and what they see is there to be seen
        metrics = json.loads(
            (tmp_path / "runs" / f"shapes-{name}-all" / "metrics.json").read_text()
        )
        assert metrics["student/decoder"]["all"]["pq"] > 0.5


# --------------------------------------------------------------------------------- names and links


def resolved(name):
    """Whether `module.function`, `module.Class.method` or the like exists; imports the module."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        if (ROOT / "/".join(parts[:n])).with_suffix(".py").is_file():
            thing = importlib.import_module(".".join(parts[:n]))
            for part in parts[n:]:
                thing = getattr(thing, part, None)
            return thing is not None
    return False


def section(title):
    return README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_readme_has_at_most_200_lines():
    assert len(README.splitlines()) <= 200


def test_the_map_has_a_function_for_every_equation():
    rows = [row for row in section("Where each equation is").splitlines() if row[:3] == "| E"]
    assert [row.split(")")[0] for row in rows] == [f"| Eq. ({n}" for n in range(1, 7)]
    assert all(re.search(r"`\w+\.[\w.]+`", row) for row in rows)


def test_the_picture_of_the_house_has_its_floors_from_the_top_down():
    picture = re.search(r"```text\n(.*?)```", section("The house"), re.S)[1]
    rooms = [line[:49].split() for line in picture.splitlines()]  # the column of names
    floors = [{room.removesuffix(".py").strip("/") for room in floor} for floor in rooms]
    assert floors == [set(rooms) for rooms in reversed(FLOORS)]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_between_documents_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, anchor
    if page.name != "README.md":
        pages = "".join((ROOT / other).read_text() for other in PAGES if other != page)
        assert f"{page.name})" in pages, "no page links to it"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_and_functions_that_documents_name_exist(page):
    text = (ROOT / page).read_text()
    near = [ROOT, ROOT / page.parent, ROOT / "readers" / "annotations"]
    files = {*re.findall(r"[\w./-]*\w\.py\b", text)} - {"sharper.py"}  # the toy method
    assert [name for name in files if not any((folder / name).is_file() for folder in near)] == []
    names = [name for name in re.findall(r"`(\w+\.[\w.]+)`", text) if name.split(".")[0] in FLOOR]
    names = [name for name in names if not name.endswith((".py", ".json", ".html", ".yaml"))]
    assert [name for name in names if not resolved(name)] == []


@pytest.mark.parametrize("wing", [*WINGS, "tests"])
def test_a_wing_lists_its_modules(wing):
    listed = re.findall(r"^    (\w+)  ", importlib.import_module(wing).__doc__, re.M)
    there = [
        path.stem
        for path in (ROOT / wing).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    ]
    assert sorted(listed) == sorted({*there} - {"__init__"})


def test_the_snippet_of_python_is_the_same_on_its_page():
    snippet = re.search(r"```python\n.*?```", README, re.S)[0]
    assert snippet in (ROOT / "docs" / "predict.md").read_text()


def test_the_toy_method_of_contributing_is_a_method(tmp_path, monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (tmp_path / "sharper.py").write_text(re.search(r"```python\n(\"{3}.*?)```", text, re.S)[1])
    monkeypatch.syspath_prepend(tmp_path)
    line = re.search(r"\"sharper\": (MethodEntry\(.*?\)),\n   ```", text, re.S)[1]
    monkeypatch.setitem(config.METHODS, "sharper", eval(line, vars(config)))
    setting = config.MINI, mini_taxonomy(), torch.device("cpu")
    toy, usual = method.find("sharper")(*setting), MeanTeacher(*setting)
    features = usual.models["teacher"].backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with torch.no_grad():
        posterior, masks = toy.teacher_answer(features, 0)
        expected, same_masks = usual.teacher_answer(features, 0)
    expected = expected.square() / expected.square().sum(-1, keepdim=True)
    assert torch.equal(posterior, expected) and torch.equal(masks, same_masks)
    monkeypatch.delitem(sys.modules, "sharper")


@pytest.mark.parametrize(
    "flags",
    [
        ["--help"],
        ["--stage", "ssl", "--help"],
        ["--stage", "sssl"],
        ["--stage", "sup", "--alpha", "4"],
        ["--lrr", "1"],
        [
            "--stage",
            "ssl",
            "--dataset",
            "coco",
            "--split",
            "1_512",
            "--data-root",
            "/no/such/folder",
        ],
        ["--version"],
        ["--stage", "eval", "--weights", "/no/such/run"],
        ["--stage", "sup", "--out", __file__],
        ["--stage", "prepare"],
        ["--stage", "sup", "--device", "gpu"],
        ["--stage", "predict", "--weights", ".", "--input", "/no/such/picture"],
    ],
)
def test_a_page_of_help_and_a_refusal_wait_for_no_library(flags):
    heavy = {"torch", "numpy", "PIL", "scipy"}
    code = (
        f"import sys, dearli; code = dearli.main({flags!r}); "
        f"print(code, sorted({heavy} & sys.modules.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (
        said.stdout.splitlines()[-1]
        == f"{0 if '--help' in flags or '--version' in flags else 2} []"
    )


def test_a_stage_that_builds_no_model_waits_for_none_of_its_libraries():
    heavy = {
        "torchvision",
        "open_clip",
        "timm",
        "segment_anything",
        "transformers",
        "scipy.optimize",
    }
    rooms = "import dearli, engine.resolve, tools.prepare, tools.importer, tools.validate"
    code = f"import sys; {rooms}; print(sorted({heavy} & sys.modules.keys()))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert said.stdout == "[]\n", said.stderr


def test_a_library_that_is_missing_is_told_with_the_environment_that_has_it(capsys, monkeypatch):
    def absent(args):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(dearli, "run", absent)
    assert dearli.main(["--stage", "sup"]) == 2
    message = capsys.readouterr().err
    assert (
        "torch is not installed for" in message
        and ".venv/bin/activate" in message
        and message.count("\n") == 1
    )


@pytest.mark.parametrize("kind", ["run", "test"])
def test_the_two_commands_make_their_own_environment_in_an_ignored_folder(kind, tmp_path):
    command = re.search(rf"<!-- {kind} command -->\n```sh\n(.+)\n```", README)[1]
    assert "\n" not in command
    make, install, use = command.split(" && ")
    assert (
        make == "python3 -m venv .venv"
        and install == ".venv/bin/python -m pip install -r requirements.txt"
    )
    assert (
        use
        == {
            "run": ".venv/bin/python dearli.py",
            "test": ".venv/bin/python -m pytest -q -n auto --maxprocesses 4",
        }[kind]
    )
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".venv*/" in ignored and "/datasets/" in ignored
