"""The paper's data sets: prepared, loaded, trained and evaluated; and its numbers."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dearli
from config import PAPERS_SPLITS
from ground.errors import UserError
from panoptic_eval import PanopticQuality
from readers import ground_truth, papers
from tests.helpers import REAL_DATA, TINY_FLAGS, fitting, write_downloads
from tools import prepare

# ------------------------------------------------------------------------ tools/prepare.py, readers


def test_ade_segments_follow_the_rules_by_hand():
    semantic = np.array(
        [[1, 1, 1, 8], [1, 1, 4, 8], [0, 0, 4, 13]], np.uint8
    )  # wall, floor; bed (8) and person (13) are things
    instances = np.zeros((3, 4, 3), np.uint8)
    instances[0, 2:, 0], instances[0, 2:, 1] = 1, 5  # instance class 1 = bed, hides a wall pixel
    ids, segments = prepare.ade_panoptic(semantic, instances)
    assert ids.tolist() == [
        [1, 1, 3, 3],
        [1, 1, 2, 0],
        [0, 0, 2, 0],
    ]  # things without an instance are void
    assert [(s["category_id"], s["area"], s["bbox"]) for s in segments] == [
        (0, 5, [0, 0, 3, 2]),
        (3, 2, [2, 1, 1, 2]),
        (7, 2, [2, 0, 2, 1]),
    ]
    instances[2, 0] = (2, 5, 0)
    with pytest.raises(ValueError, match=r"instance 5 has classes \[1, 2\]"):
        prepare.ade_panoptic(semantic, instances)


def test_coco_objects_fuse_stuff_and_void_into_one_background():
    ids = np.array([[9, 9, 0, 4], [7, 7, 5, 4]], np.int32)
    segments = [
        {"id": 9, "category_id": 3, "area": 2, "iscrowd": 1},
        {"id": 7, "category_id": 92, "area": 2, "bbox": [0, 1, 2, 1], "iscrowd": 0},
        {"id": 4, "category_id": 1, "area": 2, "iscrowd": 0},
        {"id": 5, "category_id": 200, "area": 1, "iscrowd": 0},
    ]
    fused, kept = prepare.objects_panoptic(ids, segments)
    assert fused.tolist() == [[9, 9, 7, 4], [7, 7, 7, 4]]
    assert kept == [
        segments[0],
        segments[2],
        {"id": 7, "category_id": 0, "area": 4, "bbox": [0, 1, 2, 1], "iscrowd": 0},
    ]
    things_only = [segments[0], segments[2]]
    fused, kept = prepare.objects_panoptic(np.array([[9, 0, 4]], np.int32), things_only)
    assert fused.tolist() == [[9, 1, 4]] and kept[-1] == {
        "id": 1,
        "category_id": 0,
        "area": 1,
        "iscrowd": 0,
    }
    assert prepare.objects_panoptic(np.array([[9, 4]], np.int32), things_only)[1] == things_only


@pytest.mark.parametrize(
    "name, classes, split",
    [("ade20k", 150, "1_128"), ("coco", 4, "1_512"), ("coco-objects", 3, "1_512")],
)
def test_a_data_set_of_the_paper_is_prepared_trained_and_evaluated(
    name, classes, split, tmp_path, monkeypatch, capsys
):
    base = write_downloads(name, tmp_path, monkeypatch)
    root = ["--dataset", name, "--data-root", str(tmp_path), "--device", "cpu"]
    assert dearli.main(["--stage", "sup", *root, "--split", split]) == 2
    assert "--stage prepare" in capsys.readouterr().err
    assert (
        dearli.main(
            [
                "--stage",
                "prepare",
                *root[:4],
                "--assets",
                str(tmp_path / "assets"),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    assert f"{classes} classes, 4 training and 2 validation images" in capsys.readouterr().out
    assert (
        dearli.main(["--stage", "validate", *root[:4], "--split", split, "--workers", "0"]) == 0
        and "no problem found" in capsys.readouterr().out
    )
    dataset = papers.load(name, tmp_path, split)
    assert (dataset.labeled, dataset.unlabeled) == ([0, 1], [2, 3])
    for i in range(4):
        truth = dataset.train.truth(i)
        assert truth.segment_map.shape == (64, 96) and truth.segment_map.max() <= len(truth.labels)
    if name == "ade20k":  # mIoU against the original semantic map, 0 = ignored
        original = np.asarray(
            Image.open(base / "annotations" / "validation" / "ADE_val_00000001.png")
        )
        assert np.array_equal(dataset.val.truth(0).semantic(), original - 1.0)
    if name == "coco-objects":
        assert dataset.taxonomy.things == (False, True, True) and all(
            (dataset.train.truth(i).segment_map > 0).all() for i in range(4)
        )
    if name == "coco-objects":  # mIoU against UniMatch's maps once they are there
        for stem in ("000000000001", "000000000002"):
            rows = np.repeat(np.array([[0, 1, 2, 255]], np.uint8), 64, 0).repeat(24, 1)
            (base / "masks").mkdir(exist_ok=True)
            Image.fromarray(rows).save(base / "masks" / f"{stem}.png")
        assert np.unique(papers.load(name, tmp_path, split).val.truth(0).semantic()).tolist() == [
            ground_truth.IGNORE,
            0,
            1,
            2,
        ]
    flags = [
        "--preset",
        "mini",
        *TINY_FLAGS[: TINY_FLAGS.index("--split")],
        "--split",
        split,
        "--runs",
        str(tmp_path / "runs"),
        "--workers",
        "0",
    ]
    for args in (["sup"], ["ssl", "--method", "dear"]):
        assert dearli.main(fitting(["--stage", *args, *root, "--steps", "3"], flags)) == 0
    if name == "coco-objects":  # ESL's 81 classes
        esl = ["ssl", "--method", "esl", "--burn-in", "1", "--kmeans-pixels", "9"]
        assert dearli.main(fitting(["--stage", *esl, *root, "--steps", "2"], flags)) == 0
        metrics = json.loads((tmp_path / f"runs/{name}-esl-{split}/metrics.json").read_text())
        assert metrics["teacher/decoder"]["miou_classes"] > 0
        assert "background" in metrics["teacher/decoder"]["per_class"]
    runs = [
        *root,
        "--preset",
        "mini",
        "--pretrained",
        "random",
        "--split",
        split,
        "--runs",
        str(tmp_path / "runs"),
    ]
    assert dearli.main(["--stage", "zeroshot", *runs, "--masks", "gt"]) == 0
    weights = [
        "--weights",
        str(tmp_path / "runs" / f"{name}-dear-{split}"),
        "--out",
        str(tmp_path / "student.pth"),
    ]
    assert (
        dearli.main(["--stage", "export", *root[:4], *weights]) == 0
        and f"{classes} classes" in capsys.readouterr().out
    )
    assert (
        dearli.main(
            fitting(
                ["--stage", "eval", *root, "--weights", tmp_path / "student.pth", "--groups", "2"],
                flags,
            )
        )
        == 0
    )
    assert capsys.readouterr().out.count("student file") == 1  # read once, said once
    metrics = json.loads((tmp_path / "runs" / f"{name}-dear-{split}" / "metrics.json").read_text())
    exported = json.loads((tmp_path / "runs" / "student" / "metrics.json").read_text())[
        "student/ensemble"
    ]
    assert exported["all"] == metrics["student/ensemble"]["all"] and len(exported["groups"]) == 2
    assert (
        0 <= metrics["student/ensemble"]["all"]["pq"] <= 1
        and len(metrics["student/ensemble"]["per_class"]) == classes
    )


def test_lists_come_from_the_repository_and_a_missing_network_is_named(tmp_path, monkeypatch):
    write_downloads("coco", tmp_path, monkeypatch)
    with pytest.raises(UserError, match="cannot be fetched .* name it with --assets DIR"):
        prepare.prepare("coco", tmp_path)
    for given, remote, _ in prepare.lists(
        "coco"
    ).values():  # what the official repository would answer
        (tmp_path / "repository" / remote).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "assets" / given, tmp_path / "repository" / remote)
    monkeypatch.setattr(prepare, "REPOSITORY", (tmp_path / "repository").as_uri())
    prepare.prepare("coco", tmp_path)
    assert len(papers.load("coco", tmp_path, "1_512").labeled) == 2


def test_files_that_are_listed_but_absent_stop_a_run_before_it_begins(
    tmp_path, monkeypatch, capsys
):
    base = write_downloads("coco", tmp_path, monkeypatch)
    root = ["--dataset", "coco", "--data-root", str(tmp_path), "--device", "cpu"]
    assert dearli.main(["--stage", "prepare", *root[:4], "--assets", str(tmp_path / "assets")]) == 0
    flags = [
        "--preset",
        "mini",
        *TINY_FLAGS[: TINY_FLAGS.index("--split")],
        "--split",
        "1_512",
        "--runs",
        str(tmp_path / "runs"),
        "--steps",
        "3",
    ]
    for stage, lost, words in (
        (
            ["ssl", "--method", "dear"],
            base / "train2017" / "000000000004.jpg",
            "1 of 2 unlabelled images",
        ),
        (
            ["sup"],
            base / "panoptic_train2017" / "000000000002.png",
            "1 of 2 labelled panoptic maps",
        ),
        (["sup"], base / "val2017" / "000000000001.jpg", "1 of 2 validation images"),
    ):
        content = lost.read_bytes()
        lost.unlink()
        capsys.readouterr()
        assert dearli.main(fitting(["--stage", *stage, *root], flags)) == 2
        message = capsys.readouterr().err
        assert (
            str(lost) in message
            and words in message
            and message.count("\n") == 1
            and not (tmp_path / "runs").exists()
        )
        lost.write_bytes(content)
    everything = tmp_path / "all.txt"
    everything.write_text("".join(f"{i:012d}.jpg\n" for i in range(1, 5)))
    assert (
        dearli.main(
            [
                *fitting(["--stage", "ssl", *root, "--method", "dear"], flags),
                "--split",
                str(everything),
            ]
        )
        == 2
    )
    assert "none is left for the semi-supervised stage" in capsys.readouterr().err
    content = json.loads((base / "annotations" / "panoptic_val2017.json").read_text())
    content["images"][0]["file_name"] = "../elsewhere.jpg"
    (base / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
    assert (
        dearli.main(fitting(["--stage", "sup", *root], flags)) == 2
        and "'../elsewhere.jpg' leads out of its folder" in capsys.readouterr().err
    )


def test_class_maps_that_are_absent_are_missed_before_the_run(tmp_path, monkeypatch, capsys):
    base = write_downloads("ade20k", tmp_path, monkeypatch)
    root = ["--dataset", "ade20k", "--data-root", str(tmp_path), "--device", "cpu"]
    assert dearli.main(["--stage", "prepare", *root[:4], "--assets", str(tmp_path / "assets")]) == 0
    flags = [
        "--preset",
        "mini",
        *TINY_FLAGS[: TINY_FLAGS.index("--split")],
        "--split",
        "1_128",
        "--runs",
        str(tmp_path / "runs"),
        "--steps",
        "1",
    ]
    (base / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    assert (
        dearli.main(fitting(["--stage", "sup", *root, "--no-eval"], flags)) == 0
    )  # panoptic labels do not need it
    assert (
        dearli.main(fitting(["--stage", "sup", *root, "--labels", "semantic"], flags)) == 2
        and "labelled class maps" in capsys.readouterr().err
    )
    (base / "annotations" / "validation" / "ADE_val_00000002.png").unlink()
    assert (
        dearli.main(fitting(["--stage", "sup", *root], flags)) == 2
        and "1 of 2 validation class maps" in capsys.readouterr().err
    )


needs_coco = pytest.mark.skipif(
    not (REAL_DATA / "coco_panoptic_sample").is_dir(),
    reason=f"no COCO sample at {REAL_DATA} (set DEARLI_TEST_DATA)",
)


@needs_coco
def test_real_coco_images_through_the_coco_preset_with_a_small_openclip(tmp_path, small_openclip):
    sample, base = REAL_DATA / "coco_panoptic_sample", tmp_path / "coco"
    content = json.loads((sample / "panoptic_examples.json").read_text())
    for part in ("train", "val"):
        shutil.copytree(sample / "input_images", base / f"{part}2017")
        shutil.copytree(sample / "panoptic_examples", base / f"panoptic_{part}2017")
        (base / "annotations").mkdir(exist_ok=True)
        (base / "annotations" / f"panoptic_{part}2017.json").write_text(json.dumps(content))
    root = ["--dataset", "coco", "--data-root", str(tmp_path), "--device", "cpu"]
    assert dearli.main(["--stage", "prepare", *root[:4], "--assets", str(REAL_DATA)]) == 0
    dataset = papers.load("coco", tmp_path, "1")
    assert [len(dataset.val.truth(i).labels) for i in range(2)] == [18, 32] and len(
        dataset.taxonomy
    ) == 133
    pq = PanopticQuality(133)
    for truth in (dataset.val.truth(i) for i in range(2)):
        whole = ~truth.crowd  # crowd is no segment that could be predicted
        lut = np.concatenate([[0], np.where(whole, np.cumsum(whole), 0)])
        pq.add(
            lut[truth.segment_map],
            truth.labels[whole],
            truth.segment_map,
            truth.labels,
            truth.areas,
            truth.crowd,
        )
    assert pq.result(dataset.taxonomy.things)["all"]["pq"] == pytest.approx(1.0)
    flags = [
        "--backbone",
        small_openclip,
        "--pretrained",
        "random",
        "--runs",
        str(tmp_path / "runs"),
        "--split",
        "1",
        "--crop",
        "128",
        "--num-queries",
        "20",
        "--encoder-layers",
        "1",
        "--decoder-layers",
        "2",
        "--num-points",
        "256",
        "--labeled-batch",
        "1",
        "--unlabeled-batch",
        "1",
        "--workers",
        "1",
    ]
    assert dearli.main(["--stage", "ssl", "--method", "dear", *root, *flags, "--steps", "2"]) == 0
    metrics = json.loads((tmp_path / "runs" / "coco-dear-1" / "metrics.json").read_text())
    assert (
        metrics["images"] == 2
        and 0 <= metrics["student/ensemble"]["all"]["pq"] <= 1
        and len(metrics["student/ensemble"]["per_class"]) == 133
    )
    stored = json.loads((tmp_path / "runs" / "coco-dear-1" / "config.json").read_text())
    assert (stored["test_size"], stored["test_max"], stored["overlap_threshold"]) == (
        512,
        2048,
        0.8,
    )
    assert (
        dearli.main(["--stage", "eval", *root, "--weights", str(tmp_path / "runs" / "coco-dear-1")])
        == 0
    )
    again = json.loads((tmp_path / "runs" / "coco-dear-1" / "metrics.json").read_text())
    assert again["student/ensemble"] == metrics["student/ensemble"]


def test_a_data_set_is_in_datasets_or_below_a_folder_that_the_environment_names(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEARLI_DATASETS", raising=False)
    ssl = ["--stage", "ssl", "--dataset", "coco", "--split", "1_512"]

    def refused(*args):
        capsys.readouterr()
        assert dearli.main([*map(str, args)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    message = refused(*ssl)
    assert message.startswith(
        "error: datasets/coco: no such folder; it should hold the downloads of coco: "
        "train2017 (from http://"
    )
    assert (
        "python dearli.py --stage prepare --dataset coco`" in message and "--data-root" in message
    )
    (tmp_path / "datasets" / "coco" / "train2017").mkdir(parents=True)
    message = refused(*ssl)  # what is there is not told again
    assert (
        "datasets/coco: 5 of 6 parts of coco are missing: val2017 (from http" in message
        and " train2017 (" not in message
    )
    shutil.rmtree("datasets")
    # the same in the folder that the environment names; COCO-Objects is made of COCO
    monkeypatch.setenv("DEARLI_DATASETS", str(tmp_path / "sets"))
    assert str(tmp_path / "sets" / "ade20k") in refused(
        "--stage", "sup", "--dataset", "ade20k", "--split", "1_128"
    )
    assert str(tmp_path / "sets" / "coco") in refused(
        "--stage", "sup", "--dataset", "coco-objects", "--split", "1_512"
    )
    assert str(tmp_path / "elsewhere") in refused(*ssl, "--data-root", tmp_path / "elsewhere")
    write_downloads("ade20k", tmp_path / "made", monkeypatch)
    (tmp_path / "sets").mkdir()
    (tmp_path / "made").rename(
        tmp_path / "sets" / "ade20k"
    )  # as one who unpacks the zip there has it
    name = ["--dataset", "ade20k", "--device", "cpu"]
    sup = fitting(
        ["--stage", "sup", *name, "--split", "1_64", "--backbone", "mini", "--steps", 1],
        TINY_FLAGS[: TINY_FLAGS.index("--split")],
    )
    message = refused(*sup)
    assert "missing; make it with `python dearli.py --stage prepare --dataset ade20k`" in message
    assert (
        dearli.main(
            [
                "--stage",
                "prepare",
                *name[:2],
                "--assets",
                str(tmp_path / "sets" / "ade20k" / "assets"),
            ]
        )
        == 0
    )
    assert dearli.main([*map(str, sup)]) == 0
    stored = json.loads(Path("runs/ade20k-sup-1_64/config.json").read_text())
    assert stored["data_root"] == str(tmp_path / "sets" / "ade20k")
    metrics = json.loads(Path("runs/ade20k-sup-1_64/metrics.json").read_text())
    monkeypatch.delenv("DEARLI_DATASETS")  # a run knows where its data were
    assert dearli.main(["--stage", "eval", *name, "--weights", "runs/ade20k-sup-1_64"]) == 0
    assert (
        json.loads(Path("runs/ade20k-sup-1_64/metrics.json").read_text())["student/decoder"]
        == metrics["student/decoder"]
    )


def test_an_interrupted_preparation_goes_on_and_wrong_lists_are_refused(tmp_path, monkeypatch):
    base = write_downloads("ade20k", tmp_path, monkeypatch)
    maps, assets = base / "ade20k_panoptic_train", tmp_path / "assets"
    prepare.prepare("ade20k", tmp_path, assets, workers=1)
    target = base / "ade20k_panoptic_train.json"
    whole = json.loads(target.read_text())
    rows = [
        {"key": image["id"], "image": image, "annotation": a}
        for image, a in zip(whole["images"], whole["annotations"])
    ]
    target.with_name(target.name + ".part").write_text(
        "".join(json.dumps(r) + "\n" for r in rows[:2]) + json.dumps(rows[2])[:40]
    )  # cut
    target.unlink()
    before = (maps / "ADE_train_00000001.png").stat().st_mtime_ns
    prepare.prepare("ade20k", tmp_path, assets, workers=1)
    assert (
        json.loads(target.read_text()) == whole
        and (maps / "ADE_train_00000001.png").stat().st_mtime_ns == before
    )
    (base / "dearli" / "ade20k" / "1_64" / "labeled.txt").unlink()
    (assets / "splits" / "ade20k" / "1_64" / "labeled.txt").write_text("another list\n")
    with pytest.raises(UserError, match="labeled.txt: SHA-256 is .* expected"):
        prepare.prepare("ade20k", tmp_path, assets)
    shutil.rmtree(base / "annotations_instance" / "validation")
    with pytest.raises(
        UserError,
        match=r"1 of 6 parts of ade20k are missing: annotations_instance/validation \(from http",
    ):
        prepare.prepare("ade20k", tmp_path, assets)
    with pytest.raises(UserError, match="unknown split '1_512' of .*; available: 1_128, 1_16"):
        papers.load("ade20k", tmp_path, "1_512")


def test_official_lists_have_the_counts_of_the_paper():
    if not (REAL_DATA / "splits").is_dir():
        pytest.skip(f"no official lists at {REAL_DATA} (set DEARLI_TEST_DATA)")
    for name, counts in (
        ("ade20k", (158, 316, 632, 1263, 2526)),
        ("coco", (232, 463, 925, 1849, 3697)),
    ):
        for given, _, digest in prepare.lists(name).values():
            assert hashlib.sha256((REAL_DATA / given).read_bytes()).hexdigest() == digest

        def lines(split):
            path = REAL_DATA / "splits" / name / split / "labeled.txt"
            return path.read_text().splitlines()

        assert tuple(len(lines(split)) for split in PAPERS_SPLITS[name]) == counts
    names = [
        papers.read_names(REAL_DATA / "prompts" / f"{n}_prompts.txt")
        for n in ("ade20k_150", "coco_panoptic", "coco_objects")
    ]
    assert [len(n) for n in names] == [150, 133, 81]  # classes, and all of their names:
    assert [sum(len(v.split(",")) for v in n.values()) for n in names] == [403, 254, 174]


def test_presets_are_the_official_configurations_and_can_be_printed(capsys):
    assert (
        dearli.main(
            [
                "--stage",
                "sup",
                "--dataset",
                "coco_panoptic",
                "--split",
                "1_64",
                "--print-config",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed["crop"],
        printed["dewa_crop"],
        printed["test_size"],
        printed["test_max"],
        printed["sup_steps"],
    ) == (512, 640, 512, 2048, 40_000)
    assert (
        dearli.main(
            [
                "--dataset",
                "ade",
                "--split",
                "1_128",
                "--print-config",
                "--device",
                "cpu",
                "--alpha",
                "0.3",
            ]
        )
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed["crop"],
        printed["sup_steps"],
        printed["ssl_steps"],
        printed["alpha"],
        printed["clip_norm"],
    ) == (640, 10_000, 80_000, 0.3, 0.01)
