"""Instances in COCO's format for detection: what is read, and what is refused in one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as coco

import dearli
from config import MINI
from engine.request import Source
from ground.errors import UserError
from mini import scenes
from readers.instances import InstanceFolder, load_instances
from readers.runs import to_runs
from tests.helpers import photo, run, write_coco_folder
from tests.test_ranks import ranks_run

SIZE = 40, 50  # (H, W), pixels
CATEGORIES = [{"id": 9, "name": "cell"}, {"id": 4, "name": "core, kernel", "supercategory": "x"}]


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


def polygon(top: int, left: int, bottom: int, right: int) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def annotations() -> list[dict]:
    """Of image 7: a polygon in two parts, two run lengths that overlap it, and a crowd."""
    long = coco.frPyObjects({"size": [*SIZE], "counts": [41, 5, 2000 - 46]}, *SIZE)
    assert coco.area(long) == 5
    forms = [
        polygon(2, 3, 20, 30) + polygon(25, 3, 30, 8),
        to_runs(rectangle(10, 20, 35, 45)),
        {"size": [*SIZE], "counts": [41, 5, 2000 - 46]},
        {"size": [*SIZE], "counts": to_runs(rectangle(0, 40, 40, 50))["counts"]},
    ]
    return [
        {
            "id": 70 + k,
            "image_id": 7,
            "category_id": (9, 4, 9, 9)[k],
            "iscrowd": int(k == 3),
            "area": (511.0, 625.25, 5, 400)[k],
            "bbox": [0, 0, 1, 1],
            "segmentation": form,
        }
        for k, form in enumerate(forms)
    ]


def write_instances(root, own=None, images=(7, 3, 5), val=True):
    """A folder of three images: one with the annotations of `own`, one with another, one with
    none. Returns: root.
    """
    own = annotations() if own is None else own
    other = {**annotations()[1], "id": 1, "image_id": 5}
    for part, rows in (("train", [*own, other]), ("val", [other, *own]))[: 1 + val]:
        (root / "images" / part).mkdir(parents=True, exist_ok=True)
        for i in images:
            photo(root / "images" / part / f"{i}.png", SIZE[::-1], i)
        listed = [
            {"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in images
        ]
        content = {"images": listed, "annotations": rows, "categories": CATEGORIES}
        (root / f"instances_{part}.json").write_text(json.dumps(content))
    return root


def edited(root, edit, part="train"):
    path = write_instances(root) / f"instances_{part}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return root


def test_all_kinds_of_masks_are_read_as_pycocotools_reads_them(tmp_path):
    from pycocotools.coco import COCO

    dataset = load_instances(write_instances(tmp_path), "all")
    truth = dataset.train.truth(0)
    theirs = COCO(str(tmp_path / "instances_train.json"))
    for k, row in enumerate(theirs.loadAnns(theirs.getAnnIds(imgIds=7))):
        assert np.array_equal(truth.masks[k], theirs.annToMask(row).astype(bool))
        assert truth.areas[k] == row["area"] and truth.crowd[k] == row["iscrowd"]
    assert truth.labels.tolist() == [0, 1, 0, 0]
    assert (truth.masks[0] & truth.masks[1]).any()
    # the smaller one lies on top: 540 + 25 pixels on 625 + 400, and 5 of the last one on none
    assert truth.segment_map[15, 25] == 1 and truth.segment_map[15, 35] == 2
    assert dataset.taxonomy.short_names == ["cell", "core"] and dataset.taxonomy.ids == (9, 4)
    assert all(dataset.taxonomy.things)


def test_an_image_without_annotation_is_unlabelled_and_in_validation_has_nothing_to_find(tmp_path):
    dataset = load_instances(write_instances(tmp_path), "all")
    names = [dataset.train.name(i) for i in range(3)]
    assert names == ["7.png", "5.png", "3.png"] and dataset.train.ids == [7, 5, 3]
    assert (dataset.labeled, dataset.unlabeled) == ([0, 1], [2])
    assert [dataset.val.name(i) for i in range(3)] == ["3.png", "5.png", "7.png"]
    assert len(dataset.val.truth(0).masks) == 0 and dataset.val.truth(0).segment_map.max() == 0
    assert dataset.val.annotated == 3


def test_a_crowd_alone_is_nothing_to_learn_from(tmp_path):
    dataset = load_instances(write_instances(tmp_path, annotations()[3:]), "all")
    assert [dataset.train.name(i) for i in dataset.labeled] == ["5.png"]
    assert dataset.train.truth(1).crowd.tolist() == [True]


def test_an_area_that_is_not_stated_is_that_of_the_mask(tmp_path):
    rows = annotations()
    for row in rows:
        del row["area"], row["iscrowd"]
    truth = load_instances(write_instances(tmp_path / "a", rows), "all").train.truth(0)
    assert truth.areas.tolist() == truth.masks.sum((1, 2)).tolist() and not truth.crowd.any()
    rows[0]["area"], rows[1]["area"] = 0, None  # as COCOeval: 0 is stated
    truth = load_instances(write_instances(tmp_path / "b", rows), "all").train.truth(0)
    assert truth.areas.tolist() == [0, *truth.masks.sum((1, 2))[1:].tolist()]


def test_sizes_that_are_whole_numbers_may_be_written_as_fractions(tmp_path):
    def edit(content):
        for image in content["images"]:
            image.update(height=40.0, width=50.0)

    assert load_instances(edited(tmp_path, edit), "all").train.truth(0).masks.shape[1:] == (40, 50)
    for side in (float("inf"), float("nan"), 40.5, True):
        root = edited(tmp_path, lambda content: content["images"][0].update(height=side))
        with pytest.raises(UserError, match="as height and width, expected whole numbers"):
            load_instances(root, "all")


def test_classes_of_validation_are_joined_by_name(tmp_path):
    def swap(content):
        ids = [c["id"] for c in content["categories"]]
        content["categories"].reverse()
        for c, number in zip(content["categories"], ids):
            c["id"] = number
        for a in content["annotations"]:
            a["category_id"] = {9: 4, 4: 9}[a["category_id"]]

    dataset = load_instances(edited(tmp_path, swap, "val"), "all")
    assert dataset.val.truth(2).labels.tolist() == dataset.train.truth(0).labels.tolist()


def test_a_run_follows_the_names_of_another_and_what_it_learned_from_is_known(tmp_path):
    dataset = load_instances(write_instances(tmp_path / "a"), "all")
    before = dataset.truth_fingerprint()
    dataset.follow(dataset.taxonomy.select(np.array([1, 0])), "a run")
    assert dataset.taxonomy.short_names == ["core", "cell"] and dataset.taxonomy.ids == (4, 9)
    assert dataset.train.truth(0).labels.tolist() == [1, 0, 1, 1]
    assert dataset.truth_fingerprint() == before
    rows = annotations()
    rows[0]["segmentation"] = polygon(2, 3, 20, 31)
    other = load_instances(write_instances(tmp_path / "b", rows), "all")
    assert other.truth_fingerprint() != before


FAULTS = {
    "not in images": (lambda a: a.update(image_id=99), "annotation 70 is of image 99"),
    "no category": (lambda a: a.update(category_id=5), "annotation 70 has category 5, which is"),
    "twice": (lambda a: a.update(id=71), "annotation 71 is listed twice"),
    "no id": (lambda a: a.pop("id"), r"annotations\[0\] is .*, expected an object with id"),
    "id": (lambda a: a.update(id="x"), "annotation 'x' has an id that is no whole number"),
    "no mask": (lambda a: a.update(segmentation=[]), "annotation 70 has no segmentation.*a box"),
    "flat": (
        lambda a: a.update(segmentation=[1, 2, 3, 4, 5, 6]),
        "annotation 70 has segmentation .*polygons",
    ),
    "text": (lambda a: a.update(segmentation="x"), "annotation 70 has segmentation 'x'"),
    "area": (lambda a: a.update(area=-1), "annotation 70 has area -1"),
    "crowd": (lambda a: a.update(iscrowd=2), "annotation 70 has iscrowd 2"),
    "outside": (
        lambda a: a.update(segmentation=polygon(2, 3, 20, 3000)),
        "annotation 70: points .* of 50 x 40",
    ),
    "odd": (lambda a: a.update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 70: points"),
    "line": (lambda a: a.update(segmentation=[[1, 2, 3, 4], []]), "annotation 70 has no polygon"),
    "words": (lambda a: a.update(segmentation=[["a", "b"] * 3]), "annotation 70: points"),
    "short": (
        lambda a: a.update(segmentation={"size": [40, 50], "counts": [5, 7]}),
        r"annotation 70: run lengths .*those of \[40, 50\].*12 pixels of 2000",
    ),
    "broken": (
        lambda a: a.update(segmentation={"size": [40, 50], "counts": "X"}),
        "annotation 70: run lengths .*the middle of a number",
    ),
    "turned": (
        lambda a: a.update(segmentation={"size": [50, 40], "counts": [2000]}),
        r"annotation 70: run lengths .*expected those of \[40, 50\]",
    ),
    "no object": (lambda a: a.clear(), r"annotations\[0\] is {}, expected an object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_annotation_is_refused_in_a_line_with_file_and_id(tmp_path, fault):
    edit, words = FAULTS[fault]
    root = edited(tmp_path, lambda content: edit(content["annotations"][0]))
    with pytest.raises(UserError, match=f"instances_train.json: {words}") as caught:
        load_instances(root, "all").train.truth(0)
    assert "\n" not in str(caught.value)


def test_validate_lists_every_fault_and_not_the_first_alone(tmp_path, capsys):
    def edit(content):
        content["annotations"][0].update(segmentation={"size": [40, 50], "counts": [5, 7]})
        content["annotations"][1].update(segmentation=polygon(2, 3, 20, 3000))
        content["annotations"][2].update(category_id=5)
        content["images"][2].update(height=50, width=40)

    root = edited(tmp_path, edit)
    line = [
        "--stage",
        "validate",
        "--dataset",
        "custom",
        "--data-root",
        str(root),
        "--workers",
        "0",
    ]
    assert dearli.main([*line, "--labels", "instances"]) == 2
    out, err = capsys.readouterr()
    assert "4 problems of 2 kinds" in err
    for words in (
        "annotation 70: run lengths",
        "annotation 71: points",
        "annotation 72 has category",
    ):
        assert words in out
    assert "states (50, 40) for image 5.png" in out
    assert dearli.main(line) == 2 and "say --labels instances" in capsys.readouterr().err
    root = write_instances(tmp_path / "sound")
    line[5] = str(root)
    assert dearli.main([*line, "--labels", "instances"]) == 0
    assert "no problem found" in capsys.readouterr().out


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda c: c["images"][0].update(id=3), "image 3: '3.png' is listed twice"),
        (lambda c: c["images"][0].update(file_name="../x.png"), "image 7: .*leads out"),
        (lambda c: c["images"][0].update(height="40"), "image 7: .*as height and width"),
        (lambda c: c["images"].insert(0, 5), r"images\[0\] is 5"),
        (
            lambda c: c["images"][0].update(height=50, width=40),
            r"states \(50, 40\) for image 7.png",
        ),
        (lambda c: c["categories"].clear(), "categories is empty"),
        (lambda c: c["categories"][0].pop("name"), "a category lacks 'name'"),
        (lambda c: c["categories"][0].update(id=4), "category 4 .*shares its id"),
        (lambda c: c.pop("annotations"), "key 'annotations' is missing"),
    ],
)
def test_a_faulty_file_is_refused_in_a_line(tmp_path, edit, words):
    with pytest.raises(UserError, match=f"instances_train.json: {words}"):
        load_instances(edited(tmp_path, edit), "all").train.truth(0)


@pytest.mark.parametrize("part, words", [("train", "learned"), ("val", "measured")])
def test_a_file_without_any_instance_is_refused_before_a_run_begins(tmp_path, capsys, part, words):
    root = edited(tmp_path, lambda content: content["annotations"].clear(), part)
    line = ["--stage", "sup", "--dataset", "custom", "--data-root", str(root), "--split", "all"]
    assert dearli.main([*line, "--labels", "instances", "--seen-width", "0"]) == 2
    error = capsys.readouterr().err
    assert f"instances_{part}.json: no" in error and f"so nothing can be {words}" in error


def test_validation_without_a_file_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(UserError, match="none of validation images; looked for instances_val.json"):
        load_instances(write_instances(tmp_path, val=False), "all")


def test_a_folder_without_either_says_what_instances_are_looked_for_in(tmp_path):
    source = Source("custom", str(tmp_path), split="all")
    with pytest.raises(UserError, match="looked for instances_train.json, .*--stage import makes"):
        source.load(replace(MINI, labels="instances"))
    with pytest.raises(UserError, match="looked for panoptic_train.json"):
        source.load(MINI)


def test_the_folder_decides_and_where_it_has_both_the_labels(tmp_path):
    source = Source("custom", str(write_instances(tmp_path / "a")), split="all")
    dataset = source.load(replace(MINI, labels="instances"))
    assert isinstance(dataset.train, InstanceFolder)
    with pytest.raises(UserError, match="has instances and no stuff.*say --labels instances"):
        source.load(MINI)
    images, _ = source.load_images(MINI)  # masks and the warm-up need images alone
    assert len(images) == 3
    both = write_coco_folder(tmp_path / "b", images=2)
    source = Source("custom", str(both), split="all")
    assert not isinstance(source.load(replace(MINI, labels="instances")).train, InstanceFolder)
    write_instances(both)
    assert isinstance(source.load(replace(MINI, labels="instances")).train, InstanceFolder)
    assert not isinstance(source.load(MINI).train, InstanceFolder)


def test_things_of_a_panoptic_folder_are_instances_and_its_stuff_is_void(tmp_path):
    root = write_coco_folder(tmp_path, images=2)
    source = Source("custom", str(root), split="all")
    whole, things = source.load(MINI), source.load(replace(MINI, labels="instances"))
    names = [n for n, t in zip(whole.taxonomy.short_names, whole.taxonomy.things) if t]
    assert things.taxonomy.short_names == names and len(names) < len(whole.taxonomy)
    for i in range(2):
        rows, truth = things.train.segments_of(i), things.train.truth(i)
        assert rows[:, 1].tolist() == truth.labels.tolist() and all(truth.areas > 0)
        before = whole.train.truth(i)
        kept = [k for k, label in enumerate(before.labels) if whole.taxonomy.things[label]]
        stuff = ~np.isin(before.segment_map, np.array(kept) + 1)
        assert np.array_equal(truth.segment_map == 0, stuff)
    assert things.truth_fingerprint() != whole.truth_fingerprint()


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ("ssl", "--method", "dear"),
            "makes pseudo-labels that do not overlap; expected --stage s",
        ),
        (("ladder",), "the rungs of --stage ladder are of every pixel"),
        (("sup", "--groups", "2"), "--groups: instances do not compete for pixels"),
        (("sup", "--overlap-threshold", "0.5"), "--overlap-threshold: instances do not compete"),
    ],
)
def test_what_is_not_for_instances_is_refused(flags, words, capsys):
    line = ["--stage", *flags, "--dataset", "mini", "--split", "4", "--labels", "instances"]
    assert dearli.main(line) == 2 and words in capsys.readouterr().err


def test_a_run_on_instances_trains_is_evaluated_and_predicts(tmp_path, capsys):
    from pycocotools.coco import COCO

    root, folder = write_instances(tmp_path / "set"), tmp_path / "run"
    data = ["--dataset", "custom", "--data-root", root]
    line = ["--stage", "sup", *data, "--labels", "instances", "--split", "all", "--steps", 2]
    assert run(*line, "--out", folder) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    (result,) = [value for key, value in metrics.items() if key == "student/decoder"]
    assert result["instances"] == 4 and 0 <= result["ap"] <= 1
    assert result["per_class"].keys() == {"cell", "core"}
    assert "AP50" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert ">AP50<" in page and ">PQ<" not in page
    assert json.loads((folder / "pq.jsonl").read_text().splitlines()[-1])["student/decoder"] >= 0
    assert run("--stage", "eval", "--weights", folder, *data, "--split", "all") == 0
    assert json.loads((folder / "metrics.json").read_text()) == metrics

    found, pictures = tmp_path / "found", root / "images" / "val"
    line = ["--stage", "predict", "--weights", folder, "--input", pictures, "--out", found]
    assert run(*line, "--least-score", 0) == 0
    theirs = COCO(str(root / "instances_val.json")).loadRes(str(found / "results.json"))
    assert {a["image_id"] for a in theirs.anns.values()} <= {3, 5, 7} and theirs.anns
    assert {a["category_id"] for a in theirs.anns.values()} <= {4, 9}
    assert all(len(theirs.getAnnIds(imgIds=i)) <= 100 for i in (3, 5, 7))
    results = (found / "results.json").read_bytes()
    (found / "results.json").unlink()
    assert run(*line, "--least-score", 0, "--resume") == 0
    assert (found / "results.json").read_bytes() == results
    assert run(*line, "--least-score", 1, "--force") == 0
    assert (found / "results.json").read_bytes() == results
    assert (found / "objects.csv").read_text().count("\n") == 1  # none is that sure


def test_a_least_score_is_for_instances_alone(tmp_path, capsys):
    line = ["--stage", "sup", "--dataset", "mini", "--split", "4", "--least-score", "0.2"]
    assert dearli.main(line) == 2 and "counts with --labels instances" in capsys.readouterr().err


def test_several_processes_measure_instances_as_one(small_mini, tmp_path):
    folder, figures = tmp_path / "run", []
    line = ["--stage", "sup", "--labels", "instances", "--steps", 2, "--no-eval", "--out", folder]
    assert run(*line) == 0
    for number in (1, 3):  # 3 do not divide the images
        out = tmp_path / f"eval{number}"
        line = ["--stage", "eval", "--weights", folder, "--out", out]
        assert ranks_run(number, tmp_path / "said", *line) == [0] * number
        figures.append(json.loads((out / "metrics.json").read_text())["student/decoder"])
    one, three = figures
    assert len(scenes.load_mini("4").val) % 3 and one["instances"] == three["instances"] > 0
    for name in ("ap", "ap50", "ap75"):
        assert one[name] == pytest.approx(three[name], abs=1e-6)
