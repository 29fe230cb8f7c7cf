"""."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
import dearli
import mean_teacher
from config import DEEPLAB_FIELDS, MINI, OFFICIAL, Config
from engine import checkpoint, request, training
from engine.checkpoint import state_of
from engine.checks import check
from engine.evaluation import evaluate
from engine.flags import ALL, DATASETS, FIELDS, FLAGS, READS, SOURCES, STORED, reads
from engine.parser import HINTS, WIDTH, flag_texts, numbers, parser
from engine.resolve import resolve
from engine.run_log import read_log
from engine.stored import restore
from ground import colours
from mini import microcosm, scenes
from pretrained.segmenter import build
from readers import annotations, ground_truth
from report import watch
from report.finish import repainted
from tests.helpers import ROOT, SSL, fitting, log_of, run, wait_for, write_coco_folder
from tools import importer, ladder, onnx_export

# ----------------------------- engine/flags.py, parser.py, checks.py, rehearsal.py; report/watch.py


def test_help_is_one_screen_and_the_pages_of_the_stages_have_every_flag_and_every_number(capsys):
    assert dearli.main(["--help"]) == 0
    screen = capsys.readouterr().out.splitlines()
    assert len(screen) <= 40 and max(map(len, screen)) <= 110
    assert [line.split()[1 if line[2] != " " else 0] for line in screen[4 : 4 + len(ALL)]] == [*ALL]
    shown = Counter()
    for stage in ALL:
        if stage != "demo":
            assert dearli.main(["--stage", stage, "--help"]) == 0
            page = capsys.readouterr().out
            assert max(map(len, page.splitlines())) <= WIDTH
            flags = set(re.findall(r"^  (--[\w-]+)", page, re.M))
            assert {f"--{flag.name}" for flag in FLAGS if stage in flag.stages} <= flags
            shown.update(flags)
    assert {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(Config)} <= shown.keys()
    fields = [name for section in numbers().values() for name, text in section if text.strip()]
    assert fields == [f.name for f in dataclasses.fields(Config)]
    assert dearli.main(["--stage", "ssl", "--dataset", "coco", "--help"]) == 0 and re.search(
        r"--crop .*\[512\]", capsys.readouterr().out
    )  # defaults of the preset


def test_stages_on_the_command_line_are_those_that_there_are():
    stages = [name[6:].replace("_", "-") for name in vars(dearli) if name.startswith("stage_")]
    assert sorted(ALL) == sorted(stages) and SOURCES == tuple(annotations.READERS)
    texts, precisions = flag_texts(), [f.choices for f in FLAGS if f.name == "precision"]
    assert all(form in texts["masks-are"] for form in annotations.FORMS)
    assert texts["dataset"] == ", ".join(DATASETS)
    assert precisions == [tuple(request.PRECISIONS)] and all(texts.values())


@pytest.mark.parametrize(
    "flag, words",
    [
        (
            "--batch-size",
            "it is --labeled-batch and --unlabeled-batch, --dewa-batch in the warm-up, --eval-batch at evaluation",
        ),
        ("--batch_size=8", "it is --labeled-batch"),
        ("--num-epochs", "--steps N"),
        ("--max-iters", "--steps N"),
        ("--lr-rate", "it is --lr"),
        ("--gpu", "--device cuda"),
        ("--gpus", "torchrun --nproc_per_node=N"),
        ("--num-workers", "it is --workers"),
        ("--num_workers", "it is --workers"),
        ("--resume-from", "it is --resume"),
        ("--config", "--preset NAME"),
        ("--data", "it is --data-root"),
        ("--output-dir", "it is --out DIR"),
        ("--pretrain", "--pretrained is of the backbone"),
        ("--optim", "did you mean --optimizer?"),
        ("--amp", "it is --precision bf16"),
        ("--labeled_batch", "did you mean --labeled-batch?"),
        ("--Lr", "did you mean --lr?"),
        ("--spilt", "did you mean --split?"),
    ],
)
def test_flags_of_other_programs_get_the_name_that_they_have_here(flag, words, capsys):
    assert dearli.main(["--stage", "sup", flag, "3"]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and f"unknown flag '{flag}'" in message


def test_hints_name_flags_that_there_are():
    flags = {option for action in parser()._actions for option in action.option_strings}
    for name, hint in HINTS.items():
        assert (
            f"--{name}" not in flags
            and set(re.findall(r"--[a-z][\w-]+", hint)) - {"--nproc_per_node"} <= flags
        ), name


def test_the_version_is_of_this_program_python_and_torch(capsys):
    assert dearli.main(["--version"]) == 0 and dearli.main(["--stage", "sup", "--version"]) == 0
    line, again = capsys.readouterr().out.splitlines()
    assert line == again and line.startswith(
        f"dearli {dearli.__version__}, python {sys.version.split()[0]}, torch {torch.__version__.split('+')[0]}"
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stage", "sup"], "go on with --resume"),
        ([], "go on with --resume"),
        (["--stage", "masks"], "the same command goes on where it was"),
        (
            ["--stage", "import", "--from", "masks", "--input", ".", "--out", "x"],
            "the same command begins again",
        ),
        (["--stage", "zeroshot"], "nothing is kept of it"),
        (["--stage", "validate"], "nothing is kept of it"),
    ],
)
def test_ctrl_c_advises_what_the_stage_has(flags, words, capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(dearli, "run", interrupted)
    assert dearli.main(flags) == 130
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and ("--resume" in said) == ("--resume" in words)


def test_a_folder_of_ones_own_is_trained_without_clip_unless_somebody_says_otherwise():
    def method(*flags):
        args = parser().parse_args(["--stage", "ssl", *flags])
        check(args)
        return args.method

    custom = ["--dataset", "custom", "--data-root", "DIR"]
    assert (
        method(*custom) == "ssl"
        and method(*custom, "--method", "dear") == "dear"
        and method() == "dearli"
    )
    assert (
        method(*custom, "--preset", "official") == "dearli"
        and method(*custom, "--preset", "official", "--classifier", "linear") == "ssl"
    )
    assert method("--dataset", "coco", "--split", "1_512") == "dearli"
    sup = parser().parse_args(["--stage", "sup", *custom, "--device", "cpu"])
    assert resolve(sup)["method"] is None  # no other stage has one


def test_a_cpu_without_bf16_is_told_from_one_with_it(tmp_path, monkeypatch, capsys):
    info = tmp_path / "cpuinfo"
    for flags, expected in (
        ("flags\t\t: fpu avx2 avx512f", False),
        ("flags\t: fpu avx512_bf16 sse", True),
        ("flags\t: amx_tile amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("Features\t: fp asimd", False),
        ("nothing", True),
    ):
        info.write_text(f"processor\t: 0\n{flags}\n")
        assert request.multiplies_bf16(info) == expected
    assert request.multiplies_bf16(tmp_path / "none")
    monkeypatch.setattr(request, "multiplies_bf16", lambda: False)
    for precision, count in (("bf16", 1), ("fp32", 0)):
        resolve(
            parser().parse_args(["--stage", "sup", "--device", "cpu", "--precision", precision])
        )
        assert capsys.readouterr().out.count("this CPU has no instructions for it") == count


def test_a_dry_run_says_what_a_run_will_take_and_writes_nothing(small_mini, tmp_path, capsys):
    masks, runs = (
        ["--points-per-side", 2, "--pred-iou-thresh", 0, "--stability-thresh", 0],
        ["--runs", tmp_path],
    )
    assert run("--stage", "masks", *masks, "--out", tmp_path / "masks") == 0
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert (
        run("--stage", "masks", "--dry-run", *masks, *runs) == 0
        and "12 images of" in capsys.readouterr().out
    )
    assert (
        run("--stage", "dewa", "--dry-run", "--masks", tmp_path / "masks", "--steps", 5, *runs) == 0
        and "1 to 5: " in capsys.readouterr().out
    )
    assert run("--stage", "sup", "--dry-run", "--steps", 7, *runs) == 0
    out = capsys.readouterr().out
    assert (
        "4 labelled and 8 unlabelled images, 4 for validation" in out
        and "1 to 7: " in out
        and "4 images of" in out
        and "10 times or more 4 images, beside the training (--watch)" in out
    )
    assert run("--stage", "sup", "--dry-run", "--steps", 7, "--watch", 0, *runs) == 0
    assert "watching" not in capsys.readouterr().out
    assert (
        run(
            "--stage",
            "ssl",
            "--method",
            "dear",
            "--dry-run",
            "--steps",
            900,
            "--burn-in",
            2,
            "--lr",
            1e-3,
            *runs,
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        re.search(r"^steps +1 to 2: ", out, re.M)
        and re.search(r"^steps +3 to 900: ", out, re.M)
        and "lr 0.001" in out
    )  # a burn-in is another kind of step
    parts = [
        (int(n) - int(m) + 1) * (float(a) + float(b))
        for m, n, a, b in re.findall(
            r"^steps +(\d+) to (\d+): ([\d.e-]+) s each; making a batch takes ([\d.e-]+) s more",
            out,
            re.M,
        )
    ]
    said = re.search(r"^time +about (\d+) (seconds|minutes|hours)", out, re.M)
    assert sum(parts) == pytest.approx(
        int(said[1]) * {"seconds": 1, "minutes": 60, "hours": 3600}[said[2]], rel=0.3
    )  # of rounded numbers
    count = re.search(r"student: ([\d,]+) trained parameters, teacher", out)[1]
    cfg = resolve(parser().parse_args(fitting(["--stage", "sup"])))["cfg"]
    student = build(cfg, scenes.mini_taxonomy(), torch.device("cpu"))
    assert int(count.replace(",", "")) == sum(p.numel() for p in state_of(student).values())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_is_watched_is_the_run_that_is_not_and_what_was_seen_is_true(
    small_mini, tmp_path, capsys
):
    ssl = [
        "--stage",
        "ssl",
        "--method",
        "dear",
        "--checkpoint-every",
        2,
        "--lr",
        1e-3,
        "--overlap-threshold",
        0.1,
    ]
    assert run(*ssl, "--steps", 6, "--out", tmp_path / "watched", "--watch", 3) == 0
    assert run(*ssl, "--steps", 6, "--out", tmp_path / "alone", "--watch", 0) == 0
    one, two = (checkpoint.newest(tmp_path / name) for name in ("watched", "alone"))
    assert all(torch.equal(one[m][k], two[m][k]) for m in ("student", "teacher") for k in one[m])
    assert (
        not (tmp_path / "alone" / "pq.jsonl").exists()
        and not (tmp_path / "alone" / "pseudo").exists()
    )
    rows = watch.read(tmp_path / "watched")
    assert [(row["step"], row["images"]) for row in rows] == [(k, 3) for k in range(1, 7)]
    asked = resolve(
        parser().parse_args(
            ["--stage", "eval", "--weights", str(tmp_path / "watched"), "--device", "cpu"]
        )
    )
    run_there, cfg, device = asked["stored"], asked["cfg"], asked["machine"].device
    dataset = asked["source"].load(cfg)
    method = restore(run_there, cfg, dataset.taxonomy, device, dataset.name)
    metrics = evaluate(method, dataset, 3)
    assert {reading: of["all"]["pq"] for reading, of in metrics.items()} == {
        k: v for k, v in rows[-1].items() if "/" in k
    }
    pictures = sorted((tmp_path / "watched" / "pseudo").iterdir())
    assert [p.name for p in pictures] == [
        f"{step:08d}-{k}.webp" for step in range(1, 7) for k in range(4)
    ]
    page = (tmp_path / "watched" / "report.html").read_text()
    assert page.count("step 5</figcaption>") == 4 and "on the first 3 validation images" in page
    first = (tmp_path / "watched" / "pq.jsonl").read_text()
    max(
        (tmp_path / "watched").glob("step_*.pt")
    ).unlink()  # back to step 4, and on: what was seen later is seen again
    assert run(*ssl, "--steps", 6, "--out", tmp_path / "watched", "--watch", 3, "--resume") == 0
    assert (tmp_path / "watched" / "pq.jsonl").read_text() == first


def test_a_run_goes_on_to_the_length_it_was_begun_with_and_its_results_are_not_replaced_by_others(
    small_mini, tmp_path, capsys
):
    stop = training.Run._steps

    def stopped_after_two(self, start, seconds, method, batches):
        batches.steps, length = 2, batches.steps
        stop(self, start, seconds, method, batches)
        batches.steps = length

    out = ["--out", tmp_path / "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "_steps", stopped_after_two)
        assert run("--stage", "sup", "--steps", 5, "--no-eval", *out) == 0
    assert run("--stage", "sup", "--resume", *out) == 0  # not the 500 of the preset
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.jsonl")] == [
        0,
        1,
        2,
        3,
        4,
    ]
    metrics = (tmp_path / "run" / "metrics.json").read_text()
    evaluated = [
        "--stage",
        "eval",
        "--weights",
        str(tmp_path / "run"),
        "--object-mask-threshold",
        "0.5",
        "--eval-batch",
        "1",
        "--device",
        "cpu",
        "--report-images",
        "0",
    ]
    capsys.readouterr()
    assert (
        dearli.main(evaluated) == 2
        and "object_mask_threshold 0.0 there, 0.5 now" in capsys.readouterr().err
    )
    assert (tmp_path / "run" / "metrics.json").read_text() == metrics
    assert (
        dearli.main([*evaluated, "--out", str(tmp_path / "other")]) == 0
        and (tmp_path / "other" / "metrics.json").exists()
    )


class Recorder(Config):
    """A configuration that remembers which of its numbers were read, other than to be copied or
    compared.
    """

    read: set = set()

    def __getattribute__(self, name):
        frame = sys._getframe(1)
        callers = {frame.f_code.co_name, frame.f_back.f_code.co_name}
        if (
            name in vars(Config)["__dataclass_fields__"]
            and frame.f_code.co_filename != dataclasses.__file__
            and not callers
            & {
                "settled",
                "_in_steps",
                "ablations",
                "require_semi_supervised",
                "changes",
                "differing",
            }
        ):
            Recorder.read.add(name)
        return super().__getattribute__(name)


def test_fault_45_the_table_of_numbers_that_stages_read_is_what_they_read(
    small_mini, tmp_path, monkeypatch
):
    found = {}

    def stage(name, *args):
        asked = parser().parse_args(fitting(["--stage", name, *args]))
        wanted = resolve(asked)
        wanted["cfg"] = Recorder(**dataclasses.asdict(wanted["cfg"]))
        Recorder.read.clear()
        dearli.call(name, wanted)
        found.setdefault(name, set()).update(Recorder.read)

    monkeypatch.setattr(scenes, "MINI_TRAIN", 6)
    monkeypatch.setattr(scenes, "MINI_VAL", 2)
    monkeypatch.setattr(importer, "import_folder", lambda *args, **named: None)
    monkeypatch.setattr(importer, "summary", lambda *args: "")
    root, runs, folder = (
        write_coco_folder(tmp_path / "set", images=4),
        ["--runs", tmp_path],
        tmp_path / "run",
    )
    Image.fromarray(microcosm.scene("val", 0).image).save(tmp_path / "a.png")
    own, alone = ["--dataset", "custom", "--data-root", root], ["--report-images", 0]
    stage("import", "--from", "masks", "--input", tmp_path, "--out", tmp_path / "new")
    stage("validate", *own, "--workers", 0)
    stage("masks", *runs, "--points-per-side", 2)
    stage("masks", *runs, *own, "--split", 2)
    stage("dewa", *runs, "--steps", 1, "--train-backbone", "--out", tmp_path / "dewa")
    masks = ["--merging", "masks"]
    stage("sup", *runs, "--steps", 1, "--train-backbone", *masks, *alone)
    stage(
        "sup", *runs, "--steps", 1, "--classifier", "linear", *alone, "--out", tmp_path / "linear"
    )
    dear = ["--method", "dear", "--cutmix-prob", 1, *masks]
    stage("ssl", "--steps", 2, *dear, "--out", folder, *alone)
    stage(
        "ssl",
        "--steps",
        1,
        "--method",
        "ssl",
        "--init",
        tmp_path / "dewa",
        "--train-backbone",
        "--no-eval",
        "--out",
        tmp_path / "warm",
    )
    instances = ["--method", "guided", "--guided-steps", 1, "--burn-in", 1, "--steps", 3]
    instances += ["--class-threshold", 0, "--clip-view", "masked", "--schedule", "multistep"]
    stage("ssl", *instances, "--no-eval", "--out", tmp_path / "guided")
    deep = ["--backbone", "resnet18", "--aux-weight", 0.4, "--ohem", 0.5, *alone]
    stage("sup", *runs, "--network", "deeplab", "--steps", 1, *deep)
    esl = ["--method", "esl", "--steps", 2, "--burn-in", 0, "--anchor-confidence", 0.1]
    stage("ssl", *esl, "--kmeans-pixels", 9, *deep, "--out", tmp_path / "esl")
    stage("eval", "--weights", folder, "--report-images", 1)
    stage("eval", "--weights", tmp_path / "linear", *alone)
    stage("report", "--weights", tmp_path / "linear", "--report-images", 1)
    stage("eval", "--weights", tmp_path / "esl", *alone)
    stage("report", "--weights", tmp_path / "esl", "--report-images", 1)
    said = ["--input", tmp_path / "a.png", "--out", tmp_path / "said"]
    stage("predict", "--weights", tmp_path / "esl", *said)
    stage(
        "predict",
        "--weights",
        folder,
        "--input",
        tmp_path / "a.png",
        "--out",
        tmp_path / "predictions",
    )
    stage("report", "--weights", folder, "--report-images", 1)
    stage("export", "--weights", folder, "--out", tmp_path / "run.pth")
    monkeypatch.setattr(onnx_export, "to_onnx", lambda *args: b"")  # without its packages
    monkeypatch.setattr(
        onnx_export, "compare", lambda graph, _, size: str(graph(torch.zeros(1, 3, size, size)))
    )
    stage("export", "--weights", folder, "--format", "onnx", "--out", tmp_path / "run.onnx")
    stage("zeroshot", *runs, "--masks", "sam", "--points-per-side", 2)
    stage("zeroshot", *runs, "--labels", "instances", "--out", tmp_path / "named")
    model = {
        "train_backbone",
        "classifier",
        "num_queries",
        "hidden",
        "heads",
        "encoder_layers",
        "encoder_ffn",
        "encoder_points",
        "decoder_layers",
        "decoder_ffn",
    }
    # read, and of no effect: the class term of the warm-up has weight 0, and CLIP alone is asked
    # where a decoder was built
    found["dewa"] -= {"class_weight", "no_object_weight"}
    found["zeroshot"] -= model
    for name in ("dewa", "sup"):
        found[name] |= {"milestones"}  # of the other schedule, as in ssl
    found["dewa"] |= {"test_size", "test_max", "eval_batch"}  # stored with the run for its sisters
    found["import"] |= {"seed"}  # by `import_folder`, which is not called here
    for name in (
        "dewa",
        "sup",
        "ssl",
        *STORED,
        "zeroshot",
    ):  # of a folder: the miniature world has 8 bits, and is seen as a whole
        found[name] |= {*FIELDS["EXPOSURE"], *FIELDS["SCALE"]} & READS[name]
    found["validate"] |= {"test_size"}  # of a data set without things
    for name in found:
        found[name] -= {"labels"} - READS[name]  # asked, and answered by the run or the preset
        found[name] |= {"least_score"} & READS[name]  # by runs on instances
    for name in found:  # no less; and no more than it makes up for
        assert READS[name] <= found[name] <= reads(name), (
            name,
            READS[name] - found[name],
            found[name] - reads(name),
        )
    assert {name for name in ALL if name not in found} == {
        "prepare",
        "demo",
        "ladder",
        "alpha",
        "mini-clip",
        "mini-sam",
    }
    semi = READS["ssl"] - {*FIELDS["INSTANCES"]} - DEEPLAB_FIELDS  # the demo is DEARLi's
    assert READS["demo"] == READS["masks"] | READS["dewa"] | semi


@pytest.mark.parametrize(
    "args, words",
    [
        (
            ["--stage", "dewa", "--class-weight", "3"],
            "--class-weight: only --stage sup, ssl, demo, ladder and alpha know it, not --stage dewa",
        ),
        (["--stage", "dewa", "--no-object-weight", "3"], "--no-object-weight: only --stage"),
        (
            ["--stage", "masks", "--alpha", "0.1"],
            "--alpha: only --stage sup, ssl, eval, predict, report",
        ),
        (
            ["--stage", "sup", "--method", "dearli"],
            "--method: only --stage ssl and ladder know it, not --stage sup",
        ),  # its default
        (
            ["--stage", "sup", "--lambda-u", "1"],
            "--lambda-u: only --stage ssl, demo, ladder and alpha know it",
        ),
        (["--stage", "sup", "--burn-in", "0"], "--burn-in: only --stage"),
        (
            ["--stage", "ssl", "--method", "dear", "--dewa-steps", "9"],
            "--dewa-steps: no masks and no warm-up are made here",
        ),
        (
            ["--stage", "sup", "--dewa-steps", "9"],
            "--dewa-steps: only --stage dewa, ssl, demo and ladder know it",
        ),
        (
            ["--stage", "ssl", "--method", "dear", "--no-dewa-keep-empty"],
            "--dewa-keep-empty: no masks and no warm-up are made here",
        ),
        (["--stage", "zeroshot", "--num-queries", "9"], "--num-queries: only --stage"),
        (
            ["--stage", "zeroshot", "--clip-view", "pool"],
            "--clip-view: it is about instances; it counts with --labels instances",
        ),
        (
            ["--stage", "zeroshot", "--labels", "instances", "--masks", "sam"],
            "--masks: true instances are named, as they are; it counts with --labels panoptic",
        ),
        (
            ["--stage", "zeroshot", "--points-per-side", "9"],
            "--points-per-side: it counts with --masks sam",
        ),
        (["--stage", "masks", "--eval-on", "val"], "--eval-on: only --stage"),
        (["--stage", "validate", "--out", "x"], "--out: only --stage"),
        (["--stage", "ladder", "--sup-steps", "9"], "--sup-steps: only --stage sup knows it"),
        (
            ["--stage", "ssl", "--burn-in", "0.2"],
            "--burn-in: a run that starts from other weights (--method dearli, or --init) has --burn-in-warm",
        ),
        (
            ["--stage", "ssl", "--method", "dear", "--burn-in-warm", "0.2"],
            "--burn-in-warm: a run that starts from a random decoder has --burn-in",
        ),
        (
            ["--stage", "sup", "--backbone-lr-multiplier", "0.5"],
            "--backbone-lr-multiplier: it counts with --train-backbone",
        ),
        (
            ["--stage", "masks", "--sam", "regions", "--points-per-side", "9"],
            "--points-per-side: stable regions",
        ),
        (
            ["--stage", "sup", "--classifier", "linear", "--alpha", "0.5"],
            "--alpha: CLIP has no say here",
        ),
        (
            ["--stage", "sup", "--classifier", "linear", "--clip-scale", "9"],
            "--clip-scale: CLIP has no say here",
        ),
        (
            ["--stage", "dewa", "--dataset", "coco", "--crop", "512"],
            "--crop: the warm-up crops to --dewa-crop 640",
        ),
        (
            ["--stage", "ssl", "--method", "dear", "--blur-prob", "0", "--blur-radius", "1"],
            "--blur-radius: nothing is blurred",
        ),
        (
            ["--stage", "sup", "--importance", "0", "--oversample", "2"],
            "--oversample: no point is chosen by uncertainty",
        ),
        (
            ["--stage", "sup", "--dataset", "custom", "--data-root", "x", "--eval-on", "dev"],
            "--eval-on: only --dataset mini",
        ),
        (["--stage", "sup", "--data-root", "x"], "--data-root: --dataset mini is drawn"),
        (["--stage", "sup", "--variant", "_4class"], "--variant: it counts with --dataset custom"),
        (
            ["--stage", "masks", "--images", ".", "--dataset", "coco", "--data-root", "."],
            "--data-root: the images are those of --images",
        ),
        (
            ["--stage", "dewa", "--images", ".", "--split", "4"],
            "--split: the images are those of --images",
        ),
        (["--stage", "sup", "--no-eval", "--groups", "5"], "--groups: nothing is evaluated"),
        (["--stage", "ssl", "--no-eval", "--watch", "8"], "--watch: nothing is evaluated"),
        (
            ["--stage", "sup", "--no-eval", "--report-images", "4"],
            "--report-images: pictures are of an evaluation; it counts without --no-eval",
        ),
        (["--stage", "masks", "--no-eval"], "--no-eval: only --stage sup and ssl know it"),
        (["--stage", "dewa", "--no-eval"], "--no-eval: only --stage sup and ssl know it"),
        (["--stage", "dewa", "--watch", "4"], "--watch: only --stage sup, ssl, demo"),
        (["--stage", "dewa", "--report-images", "4"], "--report-images: only --stage sup"),
        (["--stage", "prepare", "--device", "cpu"], "--device: only --stage masks, dewa"),
        (["--stage", "prepare", "--runs", "x"], "--runs: only --stage masks, dewa"),
        (["--stage", "import", "--device", "cpu"], "--device: only --stage"),
        (["--stage", "import", "--runs", "x"], "--runs: only --stage"),
        (["--stage", "validate", "--device", "cpu"], "--device: only --stage"),
        (["--stage", "mini-sam", "--runs", "x"], "--runs: only --stage"),
        (
            ["--stage", "ssl", "--method", "dear", "--no-make"],
            "--no-make: no masks and no warm-up are made here",
        ),
        (
            ["--stage", "ssl", "--method", "ssl", "--teacher-posterior", "ensemble"],
            "--teacher-posterior ensemble: --method ssl has decoder; expected --method dear or dearli",
        ),
        (
            ["--stage", "ssl", "--method", "ssl", "--teacher-posterior", "clip"],
            "--teacher-posterior clip: --method ssl has decoder; expected --method dear or dearli",
        ),
        (
            ["--stage", "ssl", "--method", "dear", "--teacher-posterior", "decoder"],
            "--teacher-posterior decoder: --method dear has ensemble; expected --method ssl",
        ),
        (
            ["--stage", "ssl", "--teacher-posterior", "decoder"],
            "expected --method ssl, with --init FOLDER from a warm-up",
        ),
        (
            ["--stage", "dewa", "--optimizer", "lion"],
            "unknown optimizer 'lion'; available: adamw, sgd",
        ),
        (["--stage", "ssl", "--schedule", "cosine"], "unknown schedule 'cosine'; available: poly"),
        (["--stage", "eval", "--optimizer", "adamw"], "--optimizer: only --stage dewa, sup, ssl"),
        (["--stage", "sup", "--steps", "5", "--sup-steps", "6"], "--steps 5: --sup-steps says 6"),
        (["--stage", "ssl", "--jitter", "1.5"], "--jitter 1.5: expected a share, 0 to 1"),
        (
            ["--stage", "ssl", "--jitter-hue", "0.6"],
            "--jitter-hue 0.6: expected a number from 0 to 0.5",
        ),
        (
            ["--stage", "ssl", "--blur-radius", "0"],
            "--blur-radius 0.0: expected a number of at least 0.1",
        ),
        (
            ["--stage", "sup", "--overlap-threshold", "80"],
            "--overlap-threshold 80.0: expected a share",
        ),
        (
            ["--stage", "masks", "--stability-thresh", "95"],
            "--stability-thresh 95.0: expected a share",
        ),
        (
            ["--stage", "sup", "--seed", "99999999999999999999"],
            "--seed 99999999999999999999: expected a number from 0 to 4294967295",
        ),
        (["--stage", "sup", "--scale-max", "1.25"], "--scale-max 1.25: expected a multiple of 0.1"),
        (["--stage", "sup", "--crop", "100"], "--crop 100: expected a multiple of 32"),
        (
            ["--stage", "sup", "--test-size", "1024"],
            "--test-size 1024: expected no more than --test-max 512",
        ),
        (
            ["--stage", "sup", "--num-points", "8", "--importance", "0.1"],
            "--importance 0.1: expected 0, or enough for one of --num-points 8",
        ),
        (["--stage", "ladder", "--seeds", "0"], "--seeds 0: expected a number of at least 1"),
        (["--stage", "sup", "--watch", "-1"], "--watch -1: expected a number of at least 0"),
        (["--stage", "sup", "--lr", "0"], "--lr 0: nothing would be learned"),
        (
            ["--stage", "sup", "--lr", "1", "--weight-decay", "2"],
            "--weight-decay 2.0: at --lr 1.0 a step would take all of a weight away",
        ),
        (
            ["--stage", "sup", "--train-backbone", "--backbone-lr-multiplier", "0"],
            "--backbone-lr-multiplier 0: the backbone would not be trained",
        ),
        (
            ["--stage", "dewa", "--mask-weight", "0", "--dice-weight", "0"],
            "--mask-weight and --dice-weight are 0: there is nothing to learn",
        ),
        (
            ["--stage", "sup", "--class-weight", "0", "--mask-weight", "0", "--dice-weight", "0"],
            "there is nothing to learn",
        ),
        (
            ["--stage", "ssl", "--method", "ssl", "--steps", "800", "--burn-in", "1000"],
            "--burn-in 1000: all 800 steps of the run (--steps) would pass without",
        ),
        (
            [
                "--stage",
                "ssl",
                "--method",
                "ssl",
                "--steps",
                "800",
                "--burn-in",
                "1000",
                "--dry-run",
            ],
            "--burn-in 1000: all 800 steps",
        ),
        (
            ["--stage", "ssl", "--steps", "9", "--burn-in-warm", "9"],
            "--burn-in-warm 9: all 9 steps",
        ),
        (
            ["--stage", "ssl", "--method", "dear", "--burn-in", "1.5"],
            "--burn-in 1.5: expected a share of the steps, below 1, or a whole number of steps",
        ),
        (
            ["--stage", "demo", "--steps", "50", "--burn-in-warm", "60"],
            "--burn-in-warm 60: all 50 steps",
        ),
        (
            ["--stage", "sup", "--dataset", "ade20k"],
            "--dataset ade20k: say with --split which images are labelled: 1_128, 1_64, 1_32, 1_16, 1_8",
        ),
        (
            ["--stage", "ssl", "--dataset", "coco"],
            "--dataset coco: say with --split which images are labelled: 1_512",
        ),
        (
            ["--stage", "ladder", "--dataset", "coco-objects"],
            "--dataset coco-objects: say with --split",
        ),
    ],
)
def test_fault_45_what_a_stage_cannot_use_or_does_not_read_is_refused_before_anything_is_imported(
    args, words, capsys, tmp_path, monkeypatch
):
    for module in ("engine.resolve", "engine.stored", "torch"):  # an import of it would fail
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    assert dearli.main(args) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and message.startswith("error: ")


def test_fault_45_a_stored_run_keeps_the_numbers_that_its_weights_are_part_of(
    small_run, tmp_path, capsys
):
    evaluated = [
        "--stage",
        "eval",
        "--weights",
        str(small_run / "run"),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    for flag, words in (
        (["--heads", "4"], "--heads 4: "),
        (["--seed", "3"], "it was trained with 0"),
        (["--preset", "custom"], "--preset: the numbers are those"),
    ):
        assert dearli.main([*evaluated, *flag]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1 and not (tmp_path / "out").exists()


def test_fault_45_legitimate_ablations_are_said_in_a_line(small_mini, tmp_path, capsys):
    out = ["--out", tmp_path / "run", "--dry-run"]
    assert run(*SSL[:-1], "--steps", 3, "--lambda-u", 0, "--alpha", 1, "--ema-decay", 1, *out) == 0
    said = capsys.readouterr().out
    for words in (
        "--lambda-u 0: the unlabelled images change nothing",
        "--alpha 1: CLIP has no say",
        "--ema-decay 1: the teacher stays",
    ):
        assert said.count(f"warning: {words}") == 1
    assert (
        run("--stage", "sup", "--steps", 2, "--class-weight", 0, *out) == 0
        and "warning: --class-weight 0: no classes" in capsys.readouterr().out
    )


def test_a_burn_in_is_a_share_of_the_steps_that_does_not_move_when_a_run_is_made_longer(
    small_mini, tmp_path, capsys
):
    from config import CUSTOM

    for preset, cold, warm in (
        (MINI, 250, 100),
        (CUSTOM, 1000, 300),
        (OFFICIAL, 0, 0),
    ):  # the steps that presets had
        assert (preset.burn_in_steps(False), preset.burn_in_steps(True)) == (cold, warm)
    rungs = {rung.run: rung.config(MINI) for rung in ladder.RUNGS}
    assert [
        (rungs[name].ssl_steps, rungs[name].burn_in_steps(name == "dearli"))
        for name in ("dearli", "dear", "dear-control")
    ] == [(500, 100), (500, 250), (1000, 250)]
    steps = dataclasses.replace(MINI, burn_in=7, ssl_steps=9)
    assert [mean_teacher.ema_decay(t, steps, False) for t in (6, 7)] == [
        0,
        MINI.ema_decay,
    ] and data.SemiSupervisedBatches(None, steps, 9).parts == [0, 7]
    out, batches = ["--out", tmp_path / "run"], ["--burn-in", "0.5"]
    assert run(*SSL, "--steps", 4, *batches, *out) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["burn_in"] == 2 and stored["ssl_steps"] == 4
    flags = [pair for pair in zip(fitting(SSL)[5::2], fitting(SSL)[6::2]) if pair[0] != "--burn-in"]
    again = [
        *SSL,
        "--resume",
        "--out",
        tmp_path / "run",
        *(word for pair in flags for word in pair),
    ]
    assert dearli.main([*map(str, again), "--steps", "8"]) == 0  # the burn-in is not half of 8
    assert json.loads((tmp_path / "run" / "config.json").read_text())["burn_in"] == 2
    assert ["unlabeled/mask" in row for row in log_of(tmp_path / "run")] == [False, False] + [
        True
    ] * 6
    assert dearli.main([*map(str, again), "--steps", "9", "--burn-in", "0.25"]) == 0  # 2 of 8 steps
    capsys.readouterr()
    assert (
        dearli.main([*map(str, again), "--steps", "9", "--burn-in", "3"]) == 2
        and "burn_in: 2 there, 3 now" in capsys.readouterr().err
    )


def test_ctrl_c_ends_runs_side_by_side_and_begins_no_other(tmp_path):
    code = f"import sys; from mini import scenes; scenes.MINI_TRAIN, scenes.MINI_VAL = 12, 4; import dearli; sys.exit(dearli.main({fitting(['--runs', tmp_path, '--steps', 9000, '--jobs', 2])}))"
    # the processes of the pool import nothing of this line: their world is of full size, and drawn
    # in a second or two
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell's background jobs ignore it, and so do theirs
    try:
        wait_for(
            lambda: any(path.stat().st_size > 2000 for path in tmp_path.glob("*/log.jsonl")), 120
        )
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "Traceback" not in said, said[-2000:]
    assert not (tmp_path / "mini-sup-4" / "log.jsonl").exists()  # the third of three, two at a time
    begun = [path for path in tmp_path.glob("*/log.jsonl") if path.read_text()]
    assert begun and all(checkpoint.steps(path.parent) for path in begun)


def test_runs_side_by_side_end_with_the_table_that_began_them(tmp_path):
    """It is killed alone, and cannot tell them."""
    line = ["--stage", "alpha", "--split", 4, "--steps", 9000, "--jobs", 2, "--runs", tmp_path]
    process = subprocess.Popen(
        [sys.executable, "dearli.py", *map(str, fitting(line))],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    logs = lambda: [p for p in tmp_path.rglob("log.jsonl") if p.stat().st_size > 500]  # noqa: E731
    try:
        wait_for(lambda: len(logs()) == 2, 120)
        process.kill()
        process.wait()
        wait_for(lambda: all(checkpoint.steps(path.parent) for path in logs()), 60)
        wait_for(lambda: not alive(process.pid), 60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def alive(group: int) -> bool:
    """A process of the group is."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_tensorboard_gets_the_log_and_its_absence_is_said(
    small_mini, tmp_path, capsys, monkeypatch
):
    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

    written = []
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter)
    )
    sup = ["--stage", "sup", "--steps", 2, "--no-eval", "--log", "tensorboard"]
    assert run(*sup, "--out", tmp_path / "run") == 0
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert (
        sorted(written)
        == sorted(
            (name, value, row["step"])
            for row in rows
            for name, value in row.items()
            if name != "step"
        )
        and len(written) > 8
    )

    def absent(name, *more):
        raise ModuleNotFoundError(name="tensorboard")

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if not installed
    capsys.readouterr()
    assert run(*sup, "--out", tmp_path / "other") == 2
    assert "tensorboard is not installed" in capsys.readouterr().err and not checkpoint.steps(
        tmp_path / "other"
    )
    assert run(*sup, "--dry-run") == 2  # it takes what the run takes, and says the same
    assert "tensorboard is not installed" in capsys.readouterr().err


def test_a_report_shows_what_other_runs_say_of_the_same_images(
    small_run, small_mini, tmp_path, capsys
):
    assert (
        run("--stage", "sup", "--steps", 2, "--out", tmp_path / "<other>", "--eval-batch", 1) == 0
    )
    assert run("--stage", "eval", "--weights", small_run / "run", "--out", tmp_path / "run") == 0
    for file in (small_run / "run").iterdir():
        shutil.copy(file, tmp_path / "run")
    report = ["--stage", "report", "--weights", tmp_path / "run", "--compare", tmp_path / "<other>"]
    report = [*map(str, report), "--report-images", "2", "--device", "cpu"]
    assert dearli.main(report) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert len(re.findall("<figcaption[^>]*>&lt;other&gt; <b>", page)) == 3
    next((tmp_path / "<other>").glob("step_*.pt")).unlink()
    capsys.readouterr()
    assert dearli.main(report) == 0
    assert "no pictures of a run beside this one" in capsys.readouterr().out


def test_a_palette_is_the_data_sets_own_or_the_safe_one(small_mini):
    taxonomy = ground_truth.Taxonomy(("a", "b"), (True, False), (1, 2), ((1, 2, 3), (4, 5, 6)))
    assert repainted(taxonomy, safe=False).colours == [(1, 2, 3), (4, 5, 6)]
    assert repainted(taxonomy, safe=True).colours == colours.palette(2)


@pytest.mark.skipif(os.name == "nt", reason="no such pipe")
@pytest.mark.parametrize("flags", ["--help", "--print-config --dataset mini --stage sup"])
def test_a_page_of_which_somebody_has_read_enough_is_no_error(flags):
    line = f"{shlex.quote(sys.executable)} dearli.py {flags} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "" and done.returncode == 0
