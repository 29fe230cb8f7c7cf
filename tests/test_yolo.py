"""YOLO segmentation: layouts, label files, faults."""

import shutil

import numpy as np
import pytest

from tests.helpers import photo
from tests.test_importer import (
    import_refused,
    imported,
    maps,
    scene_ids,
    scene_mask,
    write_yolo,
)
from tools import importer

CAT = "0 0.083333 0.2 0.416667 0.2 0.416667 0.6 0.083333 0.6"  # of the scene
DOG = "1 0.333333 0.4 0.75 0.4 0.75 0.8 0.333333 0.8"

# data.yaml; further files; the pictures, the labelled ones with the path of their labels; names
# that they get; numbers of labelled, unlabelled and validation images; part of a note.
YOLO_LAYOUTS = {
    "roboflow": (
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\n"
        "names: ['cat', 'dog']\nroboflow:\n  version: 1\n",
        {},
        {
            "train/images/a.png": "train/labels/a.txt",
            "train/images/bare.png": None,
            "valid/images/b.png": "valid/labels/b.txt",
            "test/images/c.png": "test/labels/c.txt",
        },
        ["a.png", "b.png", "bare.png"],
        (1, 1, 1),
        "1 images have no label file and are taken as unlabelled",
    ),
    "roboflow-without-validation": (
        "train: ../train/images\nval: ../valid/images\nnames: [cat, dog]\n",
        {},
        {f"train/images/{name}.png": f"train/labels/{name}.txt" for name in "ab"},
        ["a.png", "b.png"],
        (1, 0, 1),
        "val is '../valid/images', which is not there",
    ),
    "cvat": (
        "path: ./\ntrain: train.txt\nval: val.txt\nnames:\n  0: cat\n  1: dog\n",
        {
            "train.txt": "data/images/train/in/a.png\n",
            "val.txt": "images/val/b.png\n\n",
        },
        {
            "images/train/in/a.png": "labels/train/in/a.txt",
            "images/val/b.png": "labels/val/b.txt",
            "unlabeled/c.png": None,
            "elsewhere/d.png": None,
        },
        ["b.png", "in_a.png", "unlabeled_c.png"],
        (1, 1, 1),
        "left out are the pictures in elsewhere",
    ),
    "ultralytics": (
        "path: ../datasets/pets\ntrain: [images/train, more/images]\nval: images/val\ntest:\n"
        "names: {0: cat, 1: dog}\n",
        {},
        {
            "images/train/a.png": "labels/train/a.txt",
            "more/images/a.png": "more/labels/a.txt",
            "images/val/b.png": "labels/val/b.txt",
        },
        ["b.png", "images_train_a.png", "more_images_a.png"],
        (2, 0, 1),
        "2 images share their names",
    ),
    "another-disk": (
        "train: C:\\data\\pets\\train\\images\nval: /home/bob/pets/val/images\nnames: [cat, dog]\n",
        {},
        {f"{part}/images/{part}.png": f"{part}/labels/{part}.txt" for part in ("train", "val")},
        ["train.png", "val.png"],
        (1, 0, 1),
        "val is '/home/bob/pets/val/images'; taken is 'val/images'",
    ),
    "train-is-val": (
        "train: images\nval: images\nnames: [cat, dog]\n",
        {},
        {f"images/{name}.png": f"labels/{name}.txt" for name in "ab"},
        ["a.png", "b.png"],
        (1, 0, 1),
        "all images of train are in val, too, so there is no division",
    ),
    "train-and-test": (
        "train: images/train\ntest: images/test\nnames: [cat, dog]\n",
        {},
        {f"images/{part}/{part}.png": f"labels/{part}/{part}.txt" for part in ("train", "test")},
        ["test.png", "train.png"],
        (1, 0, 1),
        "the test set is taken for validation",
    ),
    "in-a-folder": (
        None,
        {
            "export/data.yaml": "train: ../train/images\nval: ../val/images\nnames: [cat, dog]",
            "classes.txt": "no\nthing",
        },
        {
            "export/train/images/a.png": "export/train/labels/a.txt",
            "export/val/images/b.png": "export/val/labels/b.txt",
        },
        ["a.png", "b.png"],
        (1, 0, 1),
        "",
    ),
    "label-studio": (
        None,
        {"classes.txt": "cat\ndog\n", "notes.json": "{}"},
        {
            **{f"images/{name}.png": f"labels/{name}.txt" for name in "ab"},
            "images/bare.png": None,
        },
        ["a.png", "b.png", "bare.png"],
        (1, 1, 1),
        "",
    ),
    "folders-alone": (
        "names: [cat, dog]",
        {},
        {f"{part}/images/{part}.png": f"{part}/labels/{part}.txt" for part in ("train", "valid")},
        ["train.png", "valid.png"],
        (1, 0, 1),
        "",
    ),
    "labels-beside": (
        None,
        {"classes.txt": "cat\ndog"},
        {"a.png": "a.txt", "b.png": "b.txt"},
        ["a.png", "b.png"],
        (1, 0, 1),
        "",
    ),
}


@pytest.mark.parametrize("layout", YOLO_LAYOUTS)
def test_layouts_of_yolo_are_imported_as_they_are(layout, tmp_path):
    content, files, pictures, names, counts, note = YOLO_LAYOUTS[layout]
    root = tmp_path / layout
    files = {**files, **({} if content is None else {"data.yaml": content})}
    for k, (name, label) in enumerate(pictures.items()):
        photo(root / name, seed=k)
        files |= {label: f"{CAT}\n{DOG}\n"} if label else {}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    dataset, result = imported("yolo", root, val_share=0.5)
    assert sorted(path.name for path in (tmp_path / f"{layout}-out" / "images").iterdir()) == names
    assert (result["labeled"], result["unlabeled"], result["val"]) == counts
    assert any(note in line for line in result["notes"]) or not note
    assert dataset.taxonomy.names == ("cat", "dog") and dataset.taxonomy.ids == (0, 1)
    for segment_map in maps(dataset).values():
        assert np.array_equal(segment_map, scene_ids())
    if layout not in ("roboflow-without-validation", "train-is-val", "label-studio"):
        val = {*dataset.val.names.tolist()}
        assert layout == "labels-beside" or val <= {"b.png", "val.png", "valid.png", "test.png"}


def test_an_empty_label_file_is_an_image_without_objects_and_a_missing_one_says_nothing(tmp_path):
    root = write_yolo(tmp_path / "s")
    (root / "train" / "labels" / "b.txt").write_text(" \n\n")
    dataset, result = imported("yolo", root, background="lawn", val_share=0.3)
    (empty,) = {"b.png"} & maps(dataset).keys()
    assert (maps(dataset)[empty] == 1).all() and "d.png" not in maps(dataset)
    assert [note[:40] for note in result["notes"]] == [
        "there is no validation set; its images a",
        "1 images have an empty label file: annot",
        "1 images have no label file and are take",
    ]
    bare = importer.import_folder("yolo", root, tmp_path / "bare")
    assert (bare["labeled"], bare["val"], bare["unlabeled"]) == (1, 1, 2)


def test_a_box_of_yolo_is_void_and_counted_and_a_rotated_one_is_a_polygon(tmp_path):
    root = write_yolo(tmp_path / "s")
    rotated = "1 0.5 0.1 0.75 0.4 0.5 0.7 0.25 0.4"  # a diamond around (6, 4): area 6 * 6 / 2 = 18
    for name, text in (("a", f"1 0.5 0.5 0.5 0.4\n{CAT}"), ("b", rotated)):
        (root / "train" / "labels" / f"{name}.txt").write_text(text)
    dataset, result = imported("yolo", root, background="lawn", val_share=0.3)
    of = maps(dataset)
    box = np.zeros((10, 12), bool)
    box[3:7, 3:9] = True  # centre (6, 5), 6 x 4
    assert np.array_equal(of["a.png"] == 1, scene_mask("cat"))
    assert np.array_equal(of["a.png"] == 0, box & ~scene_mask("cat"))
    assert 17 <= (of["b.png"] == 1).sum() <= 19
    assert result["dropped"]["boxes without a mask"] == 1


def test_an_image_of_training_and_validation_is_for_validation_alone(tmp_path):
    root = tmp_path / "s"
    for k, name in enumerate("abc"):
        photo(root / "images" / f"{name}.png", seed=k)
        (root / "labels").mkdir(exist_ok=True)
        (root / "labels" / f"{name}.txt").write_text(CAT)
    (root / "train.txt").write_text("images/a.png\nimages/b.png\n")
    (root / "val.txt").write_text("images/b.png\nimages/c.png\n")
    (root / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [cat, dog]\n")
    dataset, result = imported("yolo", root)
    assert dataset.train.names.tolist() == ["a.png"] and len(dataset.val) == 2
    assert any("1 images of train are in another part" in note for note in result["notes"])


def test_a_part_that_is_called_otherwise_than_the_yaml_says_is_not_lost(tmp_path):
    root = write_yolo(tmp_path / "s")
    (root / "data.yaml").write_text("train: train/images\nval: val/images\nnames: [cat, dog]\n")
    for kind in ("images", "labels"):
        (root / "valid" / kind).mkdir(parents=True)
        for path in (root / "train" / kind).glob("c.*"):
            path.rename(root / "valid" / kind / path.name)
    words = r"data.yaml: val is 'val/images', which is not there, but valid/images has .*1 in all"
    import_refused("yolo", root, words)
    shutil.rmtree(root / "valid" / "images")
    _, result = imported("yolo", root)
    assert "there is no validation set; its images are drawn (--val-share)" in result["notes"]
    assert "label files without an image: ['valid/labels/c.txt']" in result["notes"]


def test_an_image_for_validation_without_objects_is_not_called_unlabelled(tmp_path):
    root = write_yolo(tmp_path / "s")
    (root / "data.yaml").write_text("train: train/images\nval: val/images\nnames: [cat, dog]\n")
    for kind in ("images", "labels"):
        (root / "val" / kind).mkdir(parents=True)
        for path in [p for name in "bc" for p in (root / "train" / kind).glob(f"{name}.*")]:
            path.rename(root / "val" / kind / path.name)
    (root / "val" / "labels" / "c.txt").write_text("")
    _, result = imported("yolo", root)
    assert result["dropped"]["validation images without annotation"] == 1
    assert not any("have no object are unlabelled" in note for note in result["notes"])


def label(text):
    return lambda root: (root / "train" / "labels" / "b.txt").write_text(text)


def yaml(text):
    return lambda root: (root / "data.yaml").write_text(text)


def boxes_alone(root):
    for path in root.glob("*/labels/*.txt"):
        path.write_text("0 .5 .5 .2 .2\n")


def images_gone(root):
    shutil.rmtree(root / "train" / "images")


YOLO_FAULTS = [
    (label(f"{CAT}\n2 0.1 0.1 0.2 0.1 0.2 0.2"), r"b.txt: line 2: class 2, which has no name"),
    (label(CAT.replace("0 ", "0.5 ", 1)), r"line 1: class 0.5, which has no name"),
    (label("0 0.1 0.1 0.2 0.2 0.3"), r"line 1: 5 numbers behind the class, expected pairs"),
    (label("\n0 0.1 0.1"), r"line 2: 2 numbers behind the class"),
    (label("0"), r"line 1: 0 numbers behind the class"),
    (label("0 nan 0.1 0.2 0.1 0.2 0.2"), r"line 1: points \[\[nan.*between 0 and 1"),
    (label("0 1 2 5 2 5 6 1 6"), r"line 1: points .*divide pixels by the size"),
    (label("0 1.2 0.1 0.2 0.1 0.2 0.2"), r"line 1: points .*between 0 and 1"),
    (label("0 0.5 0.5 7 0.1"), r"line 1: points .*between 0 and 1"),
    (label("cat 0.1 0.1 0.2 0.1 0.2 0.2"), r"line 1: 'cat .*expected numbers"),
    (label("0, 0.1, 0.1, 0.2, 0.1, 0.2, 0.2"), r"line 1: .*expected numbers"),
    (
        lambda root: (root / "train" / "labels" / "b.txt").write_bytes(b"\xff\xfe\x00"),
        r"b.txt: not a readable text file",
    ),
    (boxes_alone, r"all 3 lines of its label files are boxes .* Ultralytics YOLO Segmentation 1.0"),
    (lambda root: shutil.rmtree(root / "train" / "labels"), r"no label file for any of 4 images"),
    (images_gone, r"data.yaml: no picture where its train and val say .*'../train/images'"),
    (
        lambda root: photo(root / "train" / "images" / "b.jpg"),
        r"b.txt: is of .*b.jpg or of .*b.png",
    ),
    (yaml("names: [cat, dog\n"), r"data.yaml: not a readable YAML file"),
    (yaml("names: [cat, no]\n"), r"data.yaml: names \['cat', False\].*put quotes around"),
    (yaml("names: 3\n"), r"data.yaml: names 3, expected a list of texts"),
    (yaml("names: {a: cat}\n"), r"data.yaml: names {'a': 'cat'}, expected"),
    (yaml("names: [cat, cat]\n"), r"names\[1\]: the class 'cat' is called like the class 'cat'"),
    (yaml("names: [cat, rest]\n"), r"'rest' is called like the background"),
    (yaml("nc: 3\nnames: [cat, dog]\n"), r"data.yaml: nc 3, but 2 names"),
    (yaml("kpt_shape: [17, 3]\nnames: [cat, dog]\n"), r"its labels are poses, not masks"),
    (
        lambda root: (root / "train" / "labels" / "classes.txt").write_text("cat\ncow\n"),
        r"train/labels/classes.txt: class 1 is 'cow', but 'dog' in data.yaml; take out the one",
    ),
    (
        lambda root: (root / "other.yaml").write_text("names: [x]"),
        r"'data.yaml', 'other.yaml'\] have `names`",
    ),
    (lambda root: (root / "data.yaml").unlink(), r"no data.yaml with `names` and no classes.txt"),
    (
        lambda root: [
            yaml("train: train.txt\nnames: [cat, dog]")(root),
            (root / "train.txt").write_text("images/gone.png"),
        ],
        r"train.txt: line 1: 'images/gone.png' is not there",
    ),
]


@pytest.mark.parametrize("k", range(len(YOLO_FAULTS)))
def test_faults_of_yolo_get_one_clear_line(k, tmp_path):
    root = write_yolo(tmp_path / "s")
    break_it, words = YOLO_FAULTS[k]
    break_it(root)
    import_refused("yolo", root, words, background="rest")


def test_a_folder_of_another_part_is_not_taken_for_one_that_is_missing(tmp_path):
    root = tmp_path / "s"
    for k, name in enumerate("ab"):
        photo(root / "images" / f"{name}.png", seed=k)
        (root / "labels").mkdir(exist_ok=True)
        (root / "labels" / f"{name}.txt").write_text(CAT)
    (root / "data.yaml").write_text("train: images\nval: ../val/images\nnames: [cat]\n")
    _, result = imported("yolo", root)
    assert any("val is '../val/images', which is not there" in note for note in result["notes"])


def test_a_point_a_little_outside_is_cut_off_at_the_border(tmp_path):
    root = write_yolo(tmp_path / "s")
    for name in "abc":
        label_file = root / "train" / "labels" / f"{name}.txt"
        label_file.write_text("0 -0.05 -0.05 0.5 -0.05 0.5 0.5 -0.05 0.5")
    dataset, _ = imported("yolo", root)
    expected = np.zeros((10, 12), int)
    expected[:5, :6] = 1
    assert np.array_equal(dataset.train.truth(0).segment_map, expected)
