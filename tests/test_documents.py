"""."""

import ast
import json
import re
import shlex
import subprocess
import sys

import pytest

import dearli
from engine import command_line
from engine.resolve import resolve
from tests.helpers import ROOT, TINY_FLAGS, fitting, log_of
from tests.test_house import FILES

# ------------------------------------------------------------------------------------------------------------- documents


def commands(text):
    """What follows `python dearli.py` in the code of a document."""
    return [
        line.split("#")[0].split("python dearli.py", 1)[1].split()
        for line in text.splitlines()
        if line.startswith("python dearli.py")
    ]


def test_every_command_of_the_documents_is_one_that_the_program_knows():
    here = ROOT
    listed = [
        command
        for page in ("README.md", "docs/course.md", "docs/own-data.md")
        for command in commands((here / page).read_text())
    ]
    tried = [
        code
        for path in (here / file for file in FILES)
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
    for line in (here / "TABLES.md").read_text().splitlines():
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
        args = command_line.parser().parse_args([*arguments, "--device", "cpu"])
        if args.stage not in (
            "eval",
            "predict",
            "export",
            "report",
            "import",
        ):  # these read the run that they are about
            resolve(args)


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
        "ssl",
        "predict",
        "report",
    ]
    smaller = TINY_FLAGS[: TINY_FLAGS.index("--crop")] + [
        "--workers",
        "0",
        "--device",
        "cpu",
        "--report-images",
        "1",
    ]
    for args in listed:
        assert dearli.main(fitting(args, smaller)) == 0, args
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
    assert (
        json.loads((tmp_path / "runs" / "shapes-ssl-2" / "config.json").read_text())["split"] == "2"
    )
    assert all(
        row["unlabeled/mask"] >= 0 for row in log_of(tmp_path / "runs" / "shapes-ssl-all")
    )  # the teacher has had its say


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
    code = f"import sys, dearli; code = dearli.main({flags!r}); print(code, sorted({{'torch', 'numpy', 'PIL', 'scipy'}} & sys.modules.keys()))"
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
    code = f"import sys; from engine import resolve; print(sorted({heavy} & sys.modules.keys()))"
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
    here = ROOT
    text = (here / "README.md").read_text()
    command = re.search(rf"<!-- {kind} command -->\n```sh\n(.+)\n```", text)[1]
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
            "test": ".venv/bin/python -m pytest -q",
        }[kind]
    )
    ignored = (here / ".gitignore").read_text().splitlines()
    assert ".venv*/" in ignored and "/datasets/" in ignored
