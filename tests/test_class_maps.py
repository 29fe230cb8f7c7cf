"""Folders of class maps: of one's own, PASCAL VOC and Cityscapes, made here."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

import dearli
from config import MINI, PAPERS_SPLITS
from engine.request import Source
from ground.errors import UserError
from readers import class_maps, papers
from readers.checks import require_files
from readers.ground_truth import IGNORE
from readers.panoptic import PanopticFolder
from tests.helpers import REAL_DATA, photo, run_folder, write_coco_folder
from tools import prepare

RAINBOW = [value for k in range(256) for value in (k, 255 - k, 7 * k % 256)]


def write_map(path, values, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if palette:
        image = Image.fromarray(np.asarray(values, np.uint8), "P")
        image.putpalette(RAINBOW)
    image.save(path)


def own_folder(root, flat=False, classes="sky\nball, sphere\ngrass\n"):
    """Four training images, the last one without a map, and two for validation."""
    generator = np.random.default_rng(0)
    for k in range(6):
        part = "" if flat else ("val" if k > 3 else "train")
        (root / "images" / part).mkdir(parents=True, exist_ok=True)
        photo(root / "images" / part / f"p{k}.jpg", (48, 40), k)
        if k != 3:
            values = generator.choice([0, 1, 2, 255], (40, 48))
            write_map(root / "labels" / part / f"p{k}.png", values, palette=k % 2 > 0)
    if flat:
        (root / "val.txt").write_text("p4\np5.jpg\n")
    (root / "classes.txt").write_text(classes)
    return root


@pytest.mark.parametrize("flat", [False, True])
def test_a_folder_of_ones_own_is_read_with_unlabelled_images(tmp_path, flat):
    dataset = class_maps.load(own_folder(tmp_path, flat), "all")
    assert dataset.taxonomy.short_names == ["sky", "ball", "grass"]
    assert [dataset.train.name(i) for i in dataset.unlabeled] == ["p3.jpg"]
    assert len(dataset.labeled) == 3 and len(dataset.val) == 2
    i = dataset.labeled[1]
    stored = np.asarray(Image.open(dataset.train.map_file(i)))
    truth = dataset.train.truth(i)
    assert np.array_equal(truth.semantic(), np.where(stored == 255, IGNORE, stored.astype(int)))
    assert truth.labels.tolist() == [0, 1, 2] and truth.areas.sum() == (stored < 255).sum()


def test_values_may_be_named_and_classes_follow_a_run(tmp_path):
    root = own_folder(tmp_path, classes="2:grass\n0:sky\n1:ball\n")
    dataset = class_maps.load(root, "2")
    assert dataset.taxonomy.short_names == ["grass", "sky", "ball"]
    assert len(dataset.labeled) == 2 and len(dataset.unlabeled) == 2
    before = dataset.train.truth(0).semantic()
    (root / "classes.txt").write_text("sky\nball\ngrass\n")
    other = class_maps.load(root, "2")
    other.follow(dataset.taxonomy, "run")
    assert np.array_equal(other.train.truth(0).semantic(), before)
    (root / "classes.txt").unlink()
    for content in (["sky", "ball", "grass"], {"0": "sky", "1": "ball", "2": "grass"}):
        (root / "classes.json").write_text(json.dumps(content))
        assert class_maps.load(root, "2").taxonomy.short_names == ["sky", "ball", "grass"]


def fault(root) -> str:
    with pytest.raises(UserError) as error:
        dataset = class_maps.load(root, "all")
        for i in dataset.labeled:
            dataset.train.truth(i)
    return str(error.value)


def test_what_does_not_fit_is_said_in_a_line(tmp_path):
    root = own_folder(tmp_path)
    write_map(root / "labels" / "train" / "p0.png", np.full((40, 48), 7))
    assert "value 7 is no class; expected one of 3 classes" in fault(root)
    write_map(root / "labels" / "train" / "p0.png", np.zeros((4, 8)))
    assert "expected one size" in fault(root)
    Image.new("RGB", (48, 40)).save(root / "labels" / "train" / "p0.png")
    assert "expected one channel of class numbers" in fault(root)
    write_map(root / "labels" / "train" / "p0.png", np.zeros((40, 48)))
    write_map(root / "labels" / "train" / "q.png", np.zeros((40, 48)))
    assert "no image in" in fault(root) and "'q'" in fault(root)
    (root / "labels" / "train" / "q.png").unlink()
    photo(root / "images" / "train" / "p0.png", (48, 40))
    assert "would have one map" in fault(root)
    (root / "images" / "train" / "p0.png").unlink()
    for text, words in (
        ("a\na\n", "distinct"),
        ("255:a\n", "without 255"),
        ("0:a\n0:b\n", "twice"),
    ):
        (root / "classes.txt").write_text(text)
        assert words in fault(root)


def test_validate_counts_it_and_lists_what_is_wrong(tmp_path, capsys):
    root = own_folder(tmp_path)
    words = ["--stage", "validate", "--dataset", "custom", "--data-root", str(root)]
    assert dearli.main([*words, "--workers", "0"]) == 0
    assert "3" in capsys.readouterr().out
    write_map(root / "labels" / "train" / "p0.png", np.full((40, 48), 7))
    write_map(root / "labels" / "train" / "p1.png", np.zeros((4, 8)))
    write_map(root / "labels" / "val" / "q.png", np.zeros((40, 48)))
    assert dearli.main([*words, "--workers", "0"]) == 2
    said = "".join(capsys.readouterr())
    for part in ("value 7 is no class", "expected one size", "is called 'q'"):
        assert part in said


def test_stages_run_on_it(tmp_path, capsys):
    root = own_folder(tmp_path / "own")
    small = ["--steps", 2, "--split", "all", "--watch", 0]
    kmeans = ["--burn-in", 0, "--kmeans-pixels", 32]
    assert run_folder("ssl --method esl", root, *small, *kmeans) == 0
    metrics = json.loads((tmp_path / "own-esl-all" / "metrics.json").read_text())
    assert metrics["teacher/decoder"]["miou_classes"] == 3
    assert run_folder("sup --network deeplab", root, *small) == 0
    words = ["--dataset", "custom", "--data-root", str(tmp_path / "no")]
    assert dearli.main(["--stage", "ssl", "--method", "esl", *words]) == 2


# ------------------------------------------------------------------------- VOC and Cityscapes


def assets(folder, name, lists, monkeypatch):
    """A copy of U2PL's lists, shortened, and their sums."""
    there = {"voc": "pascal"}.get(name, name)
    for split in (*PAPERS_SPLITS[name], "."):
        for file, names in lists.items() if split != "." else [("val.txt", lists["val.txt"])]:
            path = folder / "data" / "splits" / there / split / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(names) + "\n")
    for key in [key for key in prepare.SHA256 if key.startswith(name)]:
        content = (folder / "data" / "splits" / there / key.split("/", 1)[1]).read_bytes()
        monkeypatch.setitem(prepare.SHA256, key, hashlib.sha256(content).hexdigest())
    return folder


def prepared(name, root, folder) -> int:
    words = ["--dataset", name, "--data-root", str(root), "--assets", str(folder)]
    return dearli.main(["--stage", "prepare", *words])


def test_voc_is_read_with_its_palette_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    lists = {"labeled.txt": ["a", "b"], "unlabeled.txt": ["c", "d"], "val.txt": ["e"]}
    folder = assets(tmp_path / "lists", "voc", lists, monkeypatch)
    root = tmp_path / "VOCdevkit" / "VOC2012"
    root.mkdir(parents=True)
    assert prepared("voc", tmp_path, folder) == 2
    said = "".join(capsys.readouterr())
    assert "2 of 2 parts of voc are missing" in said and "VOCtrainval_11-May-2012" in said
    (root / "JPEGImages").mkdir()
    values = np.arange(48 * 40).reshape(40, 48) % 22
    values[values == 21] = 255
    for name in "abcde":
        photo(root / "JPEGImages" / f"{name}.jpg", (48, 40))
        if name in "abe":
            write_map(root / "SegmentationClass" / f"{name}.png", values, palette=True)
    assert prepared("voc", tmp_path, folder) == 0
    dataset = papers.load("voc", tmp_path, "92")
    assert [dataset.train.name(i) for i in dataset.labeled] == ["a.jpg", "b.jpg"]
    assert [dataset.train.name(i) for i in dataset.unlabeled] == ["c.jpg", "d.jpg"]
    semantic = dataset.val.truth(0).semantic()
    assert np.array_equal(semantic, np.where(values == 255, IGNORE, values))
    assert dataset.taxonomy.short_names[15] == "person" and len(dataset.taxonomy) == 21
    (root / "JPEGImages" / "c.jpg").unlink()
    train = papers.load("voc", tmp_path, "92").train
    with pytest.raises(UserError, match="c.jpg: no such file; 1 of 2 unlabelled images"):
        require_files(train, [2, 3], "unlabelled", maps=False)


def test_cityscapes_has_the_19_classes_of_its_label_ids(tmp_path, monkeypatch):
    names = [f"leftImg8bit/train/ulm/ulm_{k}_leftImg8bit.png" for k in range(3)]
    lists = {"labeled.txt": names[:1], "unlabeled.txt": names[1:]}
    lists["val.txt"] = ["leftImg8bit/val/bonn/bonn_0_leftImg8bit.png"]
    folder = assets(tmp_path / "lists", "cityscapes", lists, monkeypatch)
    values = np.arange(40 * 48).reshape(40, 48) % 34
    for name in [*names, *lists["val.txt"]]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo(tmp_path / name, (48, 40))
        labels = name.replace("leftImg8bit/", "gtFine/", 1)
        write_map(tmp_path / labels.replace("leftImg8bit", "gtFine_labelIds"), values)
    assert prepared("cityscapes", tmp_path, folder) == 0
    dataset = papers.load("cityscapes", tmp_path, "186")
    assert len(dataset.labeled) == 1 and len(dataset.unlabeled) == 2
    semantic = dataset.train.truth(dataset.labeled[0]).semantic()
    classes = dict(zip(values.ravel().tolist(), semantic.ravel().tolist()))
    assert [classes[k] for k in (7, 8, 11, 24, 26, 33)] == [0, 1, 2, 11, 13, 18]
    assert [classes[k] for k in (0, 6, 9, 14, 18, 29, 30)] == [IGNORE] * 7
    assert sorted({k for k in classes.values() if k >= 0}) == list(range(19))
    assert dataset.taxonomy.short_names[6] == "traffic light"


def test_the_lists_are_those_of_the_public_code():
    lists = REAL_DATA / "splits"
    if not (lists / "voc").is_dir():
        pytest.skip("needs DEARLI_TEST_DATA")
    for name, folder in (("voc", "voc"), ("cityscapes", "cityscapes-semantic")):
        for local, (_, _, digest) in prepare.lists(name).items():
            content = (lists / folder / local.split("/", 1)[1]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest, local


def test_a_list_of_classes_beside_a_panoptic_json_changes_nothing(tmp_path):
    root = write_coco_folder(tmp_path / "set")
    (root / "classes.txt").write_text("sky\nball\n")
    dataset = Source("custom", str(root), split="1_3").load(MINI)
    assert isinstance(dataset.train, PanopticFolder)


def test_class_maps_that_keep_no_exact_values_are_refused(tmp_path):
    root = own_folder(tmp_path)
    path = root / "labels" / "train" / "p0.png"
    Image.open(path).convert("L").save(path.with_suffix(".jpg"))
    path.unlink()
    dataset = class_maps.load(root, "all")
    with pytest.raises(UserError, match="p0.jpg: JPEG keeps no exact values; .*PNG"):
        dataset.train.truth(dataset.train.names.tolist().index("p0.jpg"))


def test_a_folder_of_class_maps_without_its_list_is_told_what_is_missing(tmp_path, capsys):
    root = own_folder(tmp_path)
    (root / "classes.txt").rename(root / "names.txt")
    flags = ("--stage", "validate", "--dataset", "custom", "--data-root", str(root))
    assert dearli.main(list(flags)) == 2
    assert "for class maps in labels/, classes.txt is missing" in capsys.readouterr().err
    (root / "classes.txt").write_text("sky\nball\nsky\n")
    with pytest.raises(UserError, match="'sky' is there 2 times; expected .* distinct"):
        class_maps.read_classes(root)


def test_palettes_that_show_one_number_in_two_colours_are_refused(tmp_path, capsys):
    root = own_folder(tmp_path)
    path = root / "labels" / "train" / "p1.png"
    image = Image.open(path)
    image.putpalette(RAINBOW[:-3] + [1, 2, 3])
    image.save(path)
    class_maps.load(root, "all")  # 255 is no class
    image.putpalette([255 - value for value in RAINBOW])
    image.save(path)
    with pytest.raises(UserError, match="its palette shows . as #......, that of .*reads them by"):
        class_maps.load(root, "all")
    assert (
        dearli.main(["--stage", "validate", "--dataset", "custom", "--data-root", str(root)]) == 2
    )
    assert "the numbers may mean other classes in each" in capsys.readouterr().out
