"""COCO's and Cityscapes' instances: prepared from their downloads, loaded by partition."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

import dearli
from config import PAPERS_SPLITS
from ground.errors import UserError
from readers import papers
from tests.helpers import REAL_DATA, photo, run
from tests.test_instance_files import CATEGORIES, SIZE, annotations
from tools import prepare, prepare_instances

# the ids of six images, out of order; the last one has a crowd alone, the one before nothing
IDS = (30, 7, 50, 12, 41, 2)
INDICES = {"1.0": [2], "2.0": [1, 2], "5.0": [0, 2, 3], "10.0": [3, 2, 1]}


def write_lists(assets, files, monkeypatch):
    """Copies of the public lists, which are then the right ones."""
    digests = {}
    for given, text in files.items():
        path = assets / given
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        digests[given] = hashlib.sha256(text.encode()).hexdigest()
    splits = {given: digest for given, digest in digests.items() if given.startswith("splits")}
    monkeypatch.setattr(prepare, "SHA256", digests)
    monkeypatch.setattr(prepare_instances, "SHA256", splits)


def write_coco(root, monkeypatch):
    base = root / "coco"
    (base / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        images, rows = [], []
        for i in IDS:
            photo(base / f"{part}2017" / f"{i:012d}.jpg", SIZE[::-1], i)
            images.append({"id": i, "file_name": f"{i:012d}.jpg", "height": 40, "width": 50})
            own = annotations()[3:] if i == 2 else annotations() if i != 41 else []
            rows += [{**a, "image_id": i, "id": 100 * i + k} for k, a in enumerate(own)]
        content = {"images": images, "annotations": rows, "categories": CATEGORIES}
        (base / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
    files = {
        "prompts/coco_panoptic_prompts.txt": "0:invalid_class_id\n4:core,kernel\n9:cell,blob\n",
        "splits/coco-instances/COCO_supervision.txt": json.dumps(
            {percent: {"0": [0], "1": indices} for percent, indices in INDICES.items()}
        ),
    }
    write_lists(root / "assets", files, monkeypatch)
    return base


def write_cityscapes(root, monkeypatch):
    base = root / "cityscapes"
    for part, cities in (("train", ("aachen", "ulm")), ("val", ("bonn",))):
        for city in cities:
            for k in range(3):
                ids = np.full(SIZE, 7, np.int32)  # road
                ids[:5] = 65535  # a number plate, in 16 bits
                ids[10:20, 10:20], ids[12:16, 30:40] = 26000, 26001  # two cars
                ids[30:36, 2:12], ids[30:36, 14:20] = 24, 33  # groups of persons and bicycles
                ids[25:28, 30:40] = 29000  # a caravan
                ids = np.where(ids > 999, 7, ids) if (city, k) == ("ulm", 2) else ids
                stem = f"{city}_{k:06d}_000019"
                photo(base / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png", SIZE[::-1], k)
                path = base / "gtFine" / part / city / f"{stem}_gtFine_instanceIds.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(ids.astype(np.uint16)).save(path)
    line = "{}_{:06d}_000019_gtFine_instanceIds.png\n".format
    files = {
        f"splits/cityscapes-instances/perc_{percent}.txt": line("ulm", 1) + line("aachen", 2) * more
        for percent, more in (("5", 0), ("10", 1), ("20", 1), ("30", 1))
    }
    write_lists(root / "assets", files, monkeypatch)
    return base


def prepared(name, root):
    line = ["--stage", "prepare", "--dataset", name, "--data-root", root, "--assets"]
    return dearli.main([*map(str, line), str(root / "assets")])


@pytest.mark.parametrize("split", ["1", "2", "5", "10"])
def test_partitions_of_coco_count_images_with_an_instance_by_id(tmp_path, monkeypatch, split):
    write_coco(tmp_path, monkeypatch)
    assert prepared("coco-instances", tmp_path) == 0
    dataset = papers.load("coco-instances", tmp_path, split)
    sound = sorted(set(IDS) - {41, 2})  # 7, 12, 30, 50
    labeled = [sound[k] for k in INDICES[f"{split}.0"]]
    assert [dataset.train.ids[i] for i in dataset.labeled] == labeled
    assert sorted(dataset.train.ids[i] for i in dataset.unlabeled) == sorted({*IDS} - {*labeled})
    assert dataset.train.name(dataset.labeled[0]) == f"train2017/{labeled[0]:012d}.jpg"
    assert dataset.train.image(dataset.labeled[0]).size == SIZE[::-1]
    assert len(dataset.train.truth(dataset.labeled[0]).masks) == 4 and len(dataset.val) == 6
    assert dataset.taxonomy.names == ("cell,blob", "core,kernel")


def test_all_of_coco_stand_beside_what_is_not_labelled_at_all(tmp_path, monkeypatch):
    base = write_coco(tmp_path, monkeypatch)
    assert prepared("coco-instances", tmp_path) == 0
    with pytest.raises(UserError, match="unlabeled2017: missing.*unlabeled2017.zip"):
        papers.load("coco-instances", tmp_path, "100")
    for k in (8, 9):
        photo(base / "unlabeled2017" / f"{k:012d}.jpg", SIZE[::-1], k)
    dataset = papers.load("coco-instances", tmp_path, "100")
    assert len(dataset.labeled) == 4 and len(dataset.unlabeled) == 4
    names = [dataset.train.name(i) for i in dataset.unlabeled]
    assert names[-2:] == ["unlabeled2017/000000000008.jpg", "unlabeled2017/000000000009.jpg"]
    assert dataset.train.image(dataset.unlabeled[-1]).size == SIZE[::-1]
    assert len(dataset.train.fingerprint()) == 64 and dataset.truth_fingerprint()


def test_a_partition_of_another_coco_is_refused(tmp_path, monkeypatch, capsys):
    base = write_coco(tmp_path, monkeypatch)
    path = base / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 7]
    path.write_text(json.dumps(content))
    assert prepared("coco-instances", tmp_path) == 2
    assert "1 images with an instance that is no crowd, and the p" in capsys.readouterr().err


def test_things_of_cityscapes_are_instances_and_groups_are_crowds(tmp_path, monkeypatch):
    base = write_cityscapes(tmp_path, monkeypatch)
    assert prepared("cityscapes-instances", tmp_path) == 0
    dataset = papers.load("cityscapes-instances", tmp_path, "10")
    names = [dataset.train.name(i) for i in dataset.labeled]
    assert names == [
        "ulm/ulm_000001_000019_leftImg8bit.png",
        "aachen/aachen_000002_000019_leftImg8bit.png",
    ]
    assert len(dataset.unlabeled) == 4 and len(dataset.val) == 3
    words = "person, rider, car, truck, bus, train, motorcycle, bicycle"
    assert dataset.taxonomy.short_names == words.split(", ") and all(dataset.taxonomy.things)
    truth = dataset.train.truth(dataset.labeled[0])
    rows = [
        (dataset.taxonomy.short_names[k], int(a), c)
        for k, a, c in zip(truth.labels, truth.areas, truth.crowd)
    ]
    assert sorted(rows) == [
        ("bicycle", 36, True),
        ("car", 40, False),
        ("car", 100, False),
        ("person", 60, True),
    ]
    assert truth.masks.sum((1, 2)).tolist() == truth.areas.tolist()
    assert (base / "dearli" / "cityscapes-instances" / "30" / "labeled.txt").is_file()


def test_a_list_that_names_a_map_without_instance_is_refused(tmp_path, monkeypatch, capsys):
    base = write_cityscapes(tmp_path, monkeypatch)
    path = base / "gtFine" / "train" / "ulm" / "ulm_000001_000019_gtFine_instanceIds.png"
    Image.fromarray(np.full(SIZE, 24, np.uint16)).save(path)
    assert prepared("cityscapes-instances", tmp_path) == 2
    assert "not there, or without an instance, though perc_5.txt" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["coco-instances", "cityscapes-instances"])
def test_what_is_missing_is_said_with_where_it_comes_from(tmp_path, monkeypatch, capsys, name):
    write = {"coco-instances": write_coco, "cityscapes-instances": write_cityscapes}[name]
    base = write(tmp_path, monkeypatch)
    line = ["--stage", "sup", "--dataset", name, "--data-root", str(tmp_path)]
    assert dearli.main([*line, "--split", "10"]) == 2
    assert f"missing; make it with `python dearli.py --stage prepare --dataset {name}" in (
        capsys.readouterr().err
    )
    for folder in [*base.glob("train2017"), *base.glob("leftImg8bit/train")]:
        folder.rename(folder.with_name("elsewhere"))
    assert prepared(name, tmp_path) == 2
    assert f"1 of 4 parts of {name} are missing" in capsys.readouterr().err
    assert dearli.main(["--stage", "prepare", "--dataset", name, "--data-root", "nowhere"]) == 2
    assert "it should hold the downloads of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["coco-instances", "cityscapes-instances"])
def test_both_are_trained_and_evaluated(tmp_path, monkeypatch, name):
    write = {"coco-instances": write_coco, "cityscapes-instances": write_cityscapes}[name]
    write(tmp_path, monkeypatch)
    assert prepared(name, tmp_path) == 0
    line = ["--stage", "sup", "--dataset", name, "--data-root", tmp_path, "--split", "10"]
    line += ["--backbone", "mini", "--pretrained", "random", "--steps", 1, "--workers", 0]
    assert run(*line, "--out", tmp_path / "run") == 0
    config, metrics = (
        json.loads((tmp_path / "run" / f"{file}.json").read_text())
        for file in ("config", "metrics")
    )
    assert config["labels"] == "instances" and config["sup_steps"] == 1
    result = metrics["student/decoder"]
    assert result["instances"] == {"coco-instances": 12, "cityscapes-instances": 6}[name]
    assert result["ap"] is not None


LISTS = REAL_DATA / "splits"


@pytest.mark.skipif(not (LISTS / "coco-instances").is_dir(), reason=f"no lists at {LISTS}")
def test_the_public_lists_are_what_is_checked():
    for given, digest in prepare_instances.SHA256.items():
        content = (REAL_DATA / given).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    table = json.loads((LISTS / "coco-instances" / "COCO_supervision.txt").read_text())
    counts = [len(table[f"{s}.0"]["1"]) for s in PAPERS_SPLITS["coco-instances"][:-1]]
    assert counts == [1172, 2345, 5863, 11726]
