"""."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dearli
from config import MINI
from engine import checkpoint, masks, optim
from engine.evaluation import evaluate
from engine.request import Course, Machine, Place, Source
from ground import identity
from ground.errors import UserError
from mean_teacher import Supervised
from mini import scenes
from pretrained.segmenter import build
from readers import panoptic
from readers.instances import things_only
from report.groups import frequency_groups, group_quality
from tests.helpers import (
    REAL_DATA,
    TINY,
    TINY_FLAGS,
    back_to,
    fitting,
    log_of,
    needs_nuclei,
    run,
    same,
    write_coco_folder,
)
from tools import ladder
from tools.zeroshot import flatten, precision_and_recall, zero_shot

# --------------------------------------------------------------------------------------------------


def test_two_images_can_be_learned_by_heart(small_mini):
    cfg = dataclasses.replace(
        MINI, labeled_batch=2, num_points=256, lr=2e-3, scale_min=1.0, scale_max=1.0
    )
    dataset = scenes.load_mini("2")
    dataset.val = dataset.train
    method = Supervised(cfg, dataset.taxonomy, torch.device("cpu"))
    batches = data.LabeledBatches(dataset, cfg, 70)
    for step in range(70):
        optim.set_lr(method.optimizer, step, 70, cfg)
        method.step(batches[step], step)
    metrics = evaluate(method, dataset, limit=2)["student/decoder"]
    assert metrics["all"]["pq"] > 0.6, metrics["all"]


def test_the_whole_pipeline_at_its_smallest(small_mini, tmp_path, capsys):
    runs = ["--runs", tmp_path]
    assert run("--stage", "ssl", "--no-make", *runs) == 2  # DEARLi without DeWa weights
    message = capsys.readouterr().err
    assert "--stage dewa" in message and "--method dear" in message and message.count("\n") == 1
    assert (
        run("--stage", "dewa", "--no-make", *runs) == 2
        and "--stage masks" in capsys.readouterr().err
    )
    assert run("--stage", "masks", *runs, "--points-per-side", 4) == 0
    assert len(list((tmp_path / "mini-masks").glob("*.json"))) == 12
    assert run("--stage", "dewa", *runs, "--steps", 2) == 0
    assert all(row["loss"] > 0 for row in log_of(tmp_path / "mini-dewa"))
    for args in (
        ["sup"],
        ["ssl", "--method", "ssl"],
        ["ssl", "--method", "dear"],
        ["ssl", "--method", "dearli"],
    ):
        assert run("--stage", *args, *runs, "--steps", 4) == 0
    metrics = json.loads((tmp_path / "mini-dearli-4" / "metrics.json").read_text())
    assert {"student/decoder", "student/ensemble", "teacher/decoder", "teacher/ensemble"} <= set(
        metrics
    )
    assert (
        0 <= metrics["teacher/ensemble"]["all"]["pq"] <= 1
        and len(metrics["student/decoder"]["per_class"]) == 20
    )
    (tmp_path / "mini-dearli-4" / "metrics.json").unlink()
    assert (
        dearli.main(
            [
                "--stage",
                "eval",
                "--dataset",
                "mini",
                "--weights",
                str(tmp_path / "mini-dearli-4"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert (
        json.loads((tmp_path / "mini-dearli-4" / "metrics.json").read_text()) == metrics
    )  # every flag is remembered


def test_a_stage_makes_what_an_earlier_one_has_not_made_or_goes_on_with_it(
    small_mini, tmp_path, capsys
):
    ssl = [
        "--stage",
        "ssl",
        "--runs",
        tmp_path,
        "--steps",
        2,
        "--dewa-steps",
        4,
        "--checkpoint-every",
        2,
        "--points-per-side",
        2,
        "--no-eval",
    ]
    assert run(*ssl, "--dry-run") == 0 and not list(tmp_path.rglob("*.json"))
    said = capsys.readouterr().out
    assert (
        "mini-dewa: no DeWa weights; the warm-up would come first" in said
        and "mini-masks: no SAM masks; they would be made first" in said
    )
    assert (
        re.search(r"^masks +about \d+ seconds: 12 images", said, re.M)
        and said.count("\ntime ") == 2
    )
    assert run(*ssl) == 0
    said = capsys.readouterr().out
    assert (
        "mini-dewa: no DeWa weights; the warm-up comes first" in said
        and "mini-masks: masks of 12 images, 12 of them made now" in said
    )
    warm = checkpoint.newest(tmp_path / "mini-dewa")
    assert warm["step"] == 4 and checkpoint.newest(tmp_path / "mini-dearli-4")["config"]["init"][
        "sha256"
    ] == identity.of_tensors(warm["student"])
    assert run(*ssl, "--dewa-steps", 9, "--resume") == 0
    said = capsys.readouterr().out
    assert "that it began with; --dewa-steps, --points-per-side change nothing" in said
    # what was stopped on the way goes on: a warm-up at its second step, masks at their eleventh
    # image
    back_to(tmp_path / "mini-dewa", 2)
    (tmp_path / "mini-masks" / "train_00011.png.json").unlink()
    assert (
        run(*ssl, "--no-make", "--out", tmp_path / "not") == 2
        and "mini-dewa: DeWa stopped at step 2 of 4" in capsys.readouterr().err
    )
    assert run(*ssl, "--out", tmp_path / "again") == 0
    said = capsys.readouterr().out
    assert (
        "mini-dewa: DeWa stopped at step 2 of 4; the warm-up comes first" in said
        and "masks of 12 images, 1 of them made now" in said
    )
    assert same(checkpoint.newest(tmp_path / "mini-dewa"), warm)
    # by numbers that are asked for and are not those of what is there: refused; by numbers of the
    # preset: said
    for flags, words in (
        (
            ["--points-per-side", 3],
            "masks made with other settings (points_per_side: 2 there, 3 now)",
        ),
        (["--dewa-steps", 5], "dewa_steps: 4 there, 5 now"),
        (["--hidden", 64], "hidden: 32 there, 64 now"),
    ):
        assert run(*ssl, *flags, "--out", tmp_path / "not") == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    assert (
        run(
            "--stage",
            "ssl",
            "--runs",
            tmp_path,
            "--steps",
            2,
            "--no-eval",
            "--out",
            tmp_path / "preset",
        )
        == 0
    )
    assert (
        "masks made with other settings than the preset's (points_per_side: 2 there, 12 now); "
        "taken as they are" in capsys.readouterr().out
    )


def test_what_refuses_a_run_does_so_before_what_it_needs_is_made(
    small_mini, tmp_path, monkeypatch, capsys
):
    assert run("--stage", "sup", "--steps", 1, "--no-eval", "--out", tmp_path / "there") == 0
    monkeypatch.setattr(
        masks, "make", lambda *args: pytest.fail("hours of work, and then an error")
    )
    timm = ["--backbone", "convnext_atto.d2_in1k", "--pretrained", "random"]
    for flags, words in (
        (["--out", tmp_path / "there"], "holds a run already"),
        (["--out", "/proc/there"], "cannot be written"),
        (["--pretrained", tmp_path / "no.pt"], "no such weights file"),
        (["--backbone", "convnext_foo"], "unknown backbone"),
    ):
        for stage in (["dewa"], ["ssl", "--method", "dearli"]):
            capsys.readouterr()
            assert run("--stage", *stage, "--runs", tmp_path / "runs", *flags) == 2
            assert words in capsys.readouterr().err
    # a warm-up has no use for words, DEARLi has
    linear = ["--stage", "ssl", "--method", "dearli", *timm, "--classifier", "linear"]
    assert run(*linear, "--runs", tmp_path / "runs") == 2
    assert "no text tower" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_zero_shot_on_true_masks_beats_chance_and_sam_is_flattened(small_mini, tmp_path):
    flags = [
        "--dataset",
        "mini",
        "--split",
        4,
        "--device",
        "cpu",
        "--runs",
        tmp_path,
        "--stage",
        "zeroshot",
    ]

    def main(*args):
        return dearli.main([str(a) for a in [*flags, *args]])

    assert main("--masks", "gt") == 0
    metrics = json.loads((tmp_path / "mini-zeroshot-gt" / "metrics.json").read_text())["zero-shot"]
    assert metrics["all"]["pq"] > 0.4
    assert all(
        c["sq"] == pytest.approx(1) for c in metrics["per_class"].values() if c["tp"]
    )  # true masks, only the classes may be wrong
    assert main("--masks", "sam", "--points-per-side", 4) == 0
    sam = json.loads((tmp_path / "mini-zeroshot-sam" / "metrics.json").read_text())["zero-shot"]
    assert 0 <= sam["all"]["pq"] < metrics["all"]["pq"]
    dataset = scenes.load_mini("4")
    model = build(MINI, dataset.taxonomy, torch.device("cpu"))
    nothing = zero_shot(
        model, dataset, MINI, torch.device("cpu"), lambda i: np.zeros((128, 128), np.int32)
    )
    assert nothing["all"]["pq"] == 0 and sum(c["fn"] for c in nothing["per_class"].values()) > 0
    overlapping = np.zeros((4, 6, 3), bool)
    overlapping[:, :, 1], overlapping[1:3, 1:4, 0], overlapping[1, 1, 2] = (
        True,
        True,
        True,
    )  # large, small on top, one pixel
    assert flatten(overlapping, least=2).tolist() == [
        [2] * 6,
        [2, 0, 1, 1, 2, 2],
        [2, 1, 1, 1, 2, 2],
        [2] * 6,
    ]


def test_groups_of_classes_by_labelled_pixels(small_mini):
    dataset = scenes.load_mini("4")
    groups = frequency_groups(dataset, 5)
    assert (
        sorted(k for g in groups for k in g) == list(range(20))
        and [len(g) for g in groups] == [4] * 5
    )
    pixels = sum(
        np.bincount(dataset.train.truth(i).semantic().ravel().astype(int), minlength=20)
        for i in dataset.labeled
    )
    assert max(pixels[groups[0]]) <= min(pixels[groups[-1]])
    per_class = {
        n: {"pq": k / 20, "tp": k % 2, "fp": 0, "fn": 0}
        for k, n in enumerate(dataset.taxonomy.short_names)
    }
    rows = group_quality({"per_class": per_class}, dataset.taxonomy, groups)
    for group, row in zip(groups, rows):
        odd = [k for k in group if k % 2]
        assert row["n"] == len(odd) and row["pq"] == pytest.approx(np.mean(odd) / 20 if odd else 0)


def test_the_confusion_that_is_stored_is_that_of_the_stored_miou(small_mini):
    dataset = scenes.load_mini("4")
    method = Supervised(MINI, dataset.taxonomy, torch.device("cpu"))
    result = evaluate(method, dataset)["student/ensemble"]
    confusion = np.array([[int(v) for v in row.split()] for row in result["confusion"]])
    assert (
        confusion.sum(1).tolist()
        == sum(
            np.bincount(dataset.val.truth(i).semantic().ravel().astype(int), minlength=20)
            for i in range(4)
        ).tolist()
    )
    iou = confusion.diagonal() / np.maximum(
        confusion.sum(0) + confusion.sum(1) - confusion.diagonal(), 1
    )
    assert result["miou"] == pytest.approx(iou[confusion.sum(1) > 0].mean())


def test_clip_names_true_instances_with_precision_and_recall_by_class(small_mini, tmp_path, capsys):
    """Table II of PL-DC."""
    line = f"--stage zeroshot --split 4 --labels instances --runs {tmp_path}".split()
    assert dearli.main(line) == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "mini-zeroshot-gt" / "metrics.json").read_text())
    figures = content["zero-shot"]
    there = {n: row for n, row in figures["per_class"].items() if row["instances"]}
    dataset = things_only(scenes.load_mini("4"))
    true = [k for i in range(len(dataset.val)) for k in dataset.val.truth(i).labels]
    assert figures["instances"] == len(true) == sum(row["instances"] for row in there.values())
    assert figures["accuracy"] > 0.5 and content["clip_view"] == "masked"
    assert figures["recall"] == pytest.approx(sum(r["recall"] for r in there.values()) / len(there))
    rows = [r.rsplit(maxsplit=2)[0] for r in out.splitlines() if r.strip().split()[-1:] != []]
    listed = [name for name in rows if name in there]
    assert listed == sorted(there, key=lambda name: -there[name]["recall"])
    assert dearli.main([*line, "--clip-view", "none"]) == 2
    assert "CLIP is asked for nothing" in capsys.readouterr().err


def test_precision_is_of_what_is_said_and_recall_of_what_is_there():
    counts = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 0]])  # true x said
    figures = precision_and_recall(counts, ["a", "b", "c"])
    assert figures["per_class"] == {
        "a": {"precision": 0.6, "recall": 0.75, "instances": 4},
        "b": {"precision": 0.0, "recall": None, "instances": 0},
        "c": {"precision": None, "recall": 0.0, "instances": 2},
    }
    means = {key: figures[key] for key in ("precision", "recall", "accuracy", "instances")}
    assert means == {"precision": 0.3, "recall": 0.375, "accuracy": 0.5, "instances": 6}


def test_demo_and_ladder_end_with_tables_and_a_picture(small_mini, tmp_path, capsys):
    sizes = [
        "--runs",
        tmp_path,
        "--ssl-steps",
        4,
        "--dewa-steps",
        2,
        "--points-per-side",
        4,
        "--jobs",
        1,
    ]
    assert run(*sizes) == 0
    out = capsys.readouterr().out
    assert "DEARLi" in out and Image.open(tmp_path / "demo.png").size[0] > 500
    page = tmp_path / "mini-dearli-4" / "report.html"
    assert page.exists() and f"{page}: open it in a browser" in out.splitlines()[-1]
    assert run("--stage", "ladder", "--seeds", 2, *sizes) == 0
    content = json.loads((tmp_path / "ladder.json").read_text())
    assert content["seeds"] == [0, 1] and {k: len(v) for k, v in content["results"].items()} == {
        "sup": 2,
        "ssl": 2,
        "dear": 2,
        "dear-control": 2,
        "dearli": 2,
    }
    # equal semi-supervised steps, the warm-up on top; the control has its steps instead
    runs = tmp_path / "ladder"
    lengths = {run: len(log_of(runs / f"mini-{run}-4")) for run in content["results"]}
    assert lengths == {"sup": 4, "ssl": 4, "dear": 4, "dear-control": 6, "dearli": 4}
    assert len(log_of(runs / "mini-dewa")) == 2
    # a run that is there is not made longer: it would be of no length at all
    assert run("--stage", "ladder", "--seeds", 2, *sizes, "--ssl-steps", 5) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "a run with --sup-steps 4, where the table has 5; choose another folder" in message
    assert [len(log_of(runs / f"mini-{run}-4")) for run in lengths] == list(lengths.values())


class Few(Source):
    """Eight images for validation, also in a process that knows no `small_mini`."""

    def load(self, *args, **named):
        dataset = super().load(*args, **named)
        dataset.val.count = 8
        return dataset


def test_runs_in_processes_of_their_own_are_those_made_one_after_the_other(tmp_path):
    cfg = dataclasses.replace(TINY, ssl_steps=3, burn_in=1, eval_batch=32)
    titles = ("M2F-Lang, supervised", "DEAR")
    rungs = [(rung, cfg) for rung in ladder.RUNGS if rung.title in titles]

    def trainer(split, runs):
        source, place = Few(split=split, eval_on="dev"), Place(runs=runs)
        # hundreds of pictures in reports say nothing of the processes
        return dearli.trainer(source, place, Machine(), Course(watch=1, report_images=1))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: sums in the same order
    one, two = (
        ladder.run_rungs(trainer("4", tmp_path / str(jobs)), rungs, jobs) for jobs in (1, 2)
    )
    torch.set_num_threads(threads)
    assert one == two and len(one) == 2
    with pytest.raises(UserError, match="unknown split '400' of data set mini"):
        ladder.run_rungs(trainer("400", tmp_path / "3"), rungs, 2)


def test_a_folder_of_ones_own_runs_through_every_stage(tmp_path):
    root = write_coco_folder(tmp_path / "set")
    own = ["--dataset", "custom", "--data-root", root, "--runs", tmp_path / "runs"]
    flags = TINY_FLAGS[: TINY_FLAGS.index("--split")] + [
        "--split",
        "1_3",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    for args in (
        ["masks"],
        *(
            [*stage, "--steps", 2]
            for stage in (
                ["dewa"],
                ["sup"],
                ["ssl", "--method", "ssl"],
                ["ssl", "--method", "dearli"],
            )
        ),
    ):
        assert dearli.main(fitting(["--stage", *args, *own], flags)) == 0
    metrics = json.loads((tmp_path / "runs" / "set-ssl-1_3" / "metrics.json").read_text())
    assert 0 <= metrics["student/decoder"]["all"]["pq"] <= 1


@needs_nuclei
def test_real_microscopy_images_train_and_evaluate(tmp_path):
    flags = TINY_FLAGS[: TINY_FLAGS.index("--split")] + [
        "--split",
        "1_32",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    dataset = panoptic.load_folder(REAL_DATA / "nuclei_panoptic", "1_32")
    assert (len(dataset.train), len(dataset.val), len(dataset.labeled), len(dataset.unlabeled)) == (
        513,
        128,
        16,
        497,
    )
    for i in (0, 100):
        truth = dataset.train.truth(i)
        assert np.array_equal(
            np.bincount(truth.segment_map.ravel(), minlength=len(truth.labels) + 1)[1:], truth.areas
        )
    args = [
        "--stage",
        "ssl",
        "--method",
        "ssl",
        "--dataset",
        "custom",
        "--data-root",
        REAL_DATA / "nuclei_panoptic",
        "--runs",
        tmp_path,
        "--steps",
        3,
        "--no-eval",
    ]
    assert dearli.main(fitting(args, flags)) == 0


def test_student_and_teacher_of_a_run_that_starts_from_another_begin_with_its_weights(
    small_mini, tmp_path
):
    runs, dewa, out = ["--runs", tmp_path], tmp_path / "mini-dewa", tmp_path / "run"
    assert run("--stage", "dewa", "--points-per-side", 4, "--steps", 1, *runs) == 0
    start = ["--method", "dearli", "--init", dewa, "--burn-in-warm", 0, "--ema-decay", 0.999]
    assert run("--stage", "ssl", "--no-eval", "--steps", 1, *start, "--out", out) == 0
    (file,), (there,) = checkpoint.steps(out), checkpoint.steps(dewa)
    state, first = torch.load(file, weights_only=True), torch.load(there, weights_only=True)
    for name, value in first["student"].items():
        # of the step the teacher takes a thousandth, Eq. (2)
        mixed = 0.999 * value + 0.001 * state["student"][name]
        if value.is_floating_point() and "decoder.classify" not in name:
            assert torch.allclose(state["teacher"][name], mixed, atol=1e-6), name
