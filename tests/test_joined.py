"""New annotations into a data set that is there (--stage import --join)."""

import json
import shutil

import numpy as np
import pytest

from ground.errors import UserError
from readers import panoptic
from tests.helpers import photo, rewrite, run
from tests.test_class_maps import own_folder
from tests.test_importer import scene_ids, write_labelme, write_masks
from tools import importer

REST = {"background": "rest"}


@pytest.fixture
def base(tmp_path):
    """Three labelled images, one of them for validation, and the unlabelled d.png."""
    importer.import_folder("masks", write_masks(tmp_path / "source"), tmp_path / "base", **REST)
    return tmp_path / "base"


def corrected(base, root, *names):
    """Labelme files of images of the base, as predict writes them beside the pictures."""
    write_labelme(root, names, bare=())
    for k, name in enumerate(names):
        photo(root / f"{name}.png", (12, 10), 90 + k)  # none of the base's
        if (base / "images" / f"{name}.png").exists():
            shutil.copy(base / "images" / f"{name}.png", root / f"{name}.png")
    return root


def join(base, root, output="new", **flags):
    result = importer.import_folder("labelme", root, base.parent / output, join=base, **flags)
    return panoptic.load_folder(base.parent / output, "all"), result


def truths(images):
    """Segment map and classes of each annotated image, by name."""
    every = ((images.name(i), images.truth(i)) for i in range(images.annotated))
    return {name: (truth.segment_map.tolist(), truth.labels.tolist()) for name, truth in every}


def test_an_unlabelled_image_becomes_labelled_and_all_else_stays(base, tmp_path):
    before = panoptic.load_folder(base, "all")
    dataset, result = join(base, corrected(base, tmp_path / "out", "d", "new"), **REST)
    assert dataset.taxonomy == before.taxonomy and truths(dataset.val) == truths(before.val)
    assert (result["labeled"], result["unlabeled"], result["val"]) == (4, 0, 1)
    assert result["notes"][-1] == (
        f"1 images of {base} have new annotations, and 1 are added to its 4"
    )
    now, old = truths(dataset.train), truths(before.train)
    assert {name: now[name] for name in old} == old and now.keys() - old.keys() == {
        "d.png",
        "new.png",
    }
    expected = np.where(scene_ids() > 0, scene_ids(), 3)
    assert now["d.png"] == now["new.png"] == (expected.tolist(), [0, 1, 2])
    listed = (tmp_path / "new" / "splits" / "all" / "labeled.txt").read_text().split()
    assert sorted(listed) == sorted(now)
    assert run("--stage", "validate", "--dataset", "custom", "--data-root", tmp_path / "new") == 0


def test_new_annotations_take_the_place_of_old_ones_and_images_keep_their_part(base, tmp_path):
    before = panoptic.load_folder(base, "all")
    val = before.val.name(0).removesuffix(".png")
    (train,) = {"a", "b"} - {val} if val in "ab" else {"a"}
    root = corrected(base, tmp_path / "out", val, train)
    for name in (val, train):  # the dog alone
        rewrite(root / f"{name}.json", lambda content: content["shapes"].pop(0) and None)
    dataset, result = join(base, root, **REST)
    assert [dataset.val.name(0)] == [f"{val}.png"] and result["val"] == 1
    for images in (dataset.val, dataset.train):
        for name, (_, labels) in truths(images).items():
            there = name.removesuffix(".png") in (val, train)
            assert labels == ([1, 2] if there else [0, 1, 2]), name


def test_an_image_without_annotation_keeps_the_one_that_it_had(base, tmp_path):
    root = corrected(base, tmp_path / "out", "a", "d")
    (root / "a.json").unlink()
    dataset, _ = join(base, root, **REST)
    before = panoptic.load_folder(base, "all")
    both = truths(dataset.train) | truths(dataset.val)
    assert both["a.png"] == (truths(before.train) | truths(before.val))["a.png"]


def test_stuff_of_the_data_set_is_stuff_though_labelme_cannot_say_so(tmp_path):
    base = tmp_path / "base"
    source = write_labelme(tmp_path / "source")
    importer.import_folder("labelme", source, base, stuff="dog", **REST)
    dataset, _ = join(base, corrected(base, tmp_path / "out", "d"), **REST)
    assert dataset.taxonomy.things == (True, False, False)
    (tmp_path / "cats").mkdir()
    only = corrected(base, tmp_path / "cats", "d")
    rewrite(only / "d.json", lambda content: content["shapes"].pop(1) and None)
    dataset, _ = join(base, only, "two", **REST)  # no stuff is in it, and none need be
    assert truths(dataset.train)["d.png"][1] == [0, 2]


def test_lists_and_folders_of_the_data_set_stay(base, tmp_path):
    before = panoptic.load_folder(base, "all")
    name = before.train.name(before.labeled[0])
    (base / "splits" / "one").mkdir()
    (base / "splits" / "one" / "labeled.txt").write_text(f"{name}\n")
    (base / "images" / "day1").mkdir()
    (base / "images" / "d.png").rename(base / "images" / "day1" / "d.png")
    content = json.loads((base / "panoptic_train.json").read_text())
    for image in content["images"]:
        image["file_name"] = image["file_name"].replace("d.png", "day1/d.png")
    (base / "panoptic_train.json").write_text(json.dumps(content))
    root = tmp_path / "out"
    write_labelme(root / "day1", ("d",), bare=())
    shutil.copy(base / "images" / "day1" / "d.png", root / "day1" / "d.png")
    write_labelme(root / "day2", ("a",), bare=())  # no image of the data set
    photo(root / "day2" / "a.png", seed=9)
    dataset, result = join(base, root, **REST)
    assert "day1/d.png" in truths(dataset.train) and "day2_a.png" in truths(dataset.train)
    assert result["labeled"] == 4
    assert [dataset.train.name(i) for i in panoptic.load_folder(tmp_path / "new", "one").labeled]


def test_maps_of_images_of_one_stem_do_not_meet(base, tmp_path):
    root = tmp_path / "out"
    write_labelme(root, ("a",), bare=())
    image = root / "a.png"
    image.rename(root / "a.tiff")
    photo(root / "a.tiff", seed=9)
    rewrite(root / "a.json", lambda content: content.update(imagePath="a.tiff"))
    dataset, _ = join(base, root, **REST)
    both = truths(dataset.train) | truths(dataset.val)
    before = panoptic.load_folder(base, "all")
    assert both["a.png"] == (truths(before.train) | truths(before.val))["a.png"]
    assert "a_tiff.tiff" in both


def refused(base, root, words, **flags):
    with pytest.raises(UserError, match=words):
        join(base, root, "refused", **flags)
    shutil.rmtree(base.parent / "refused", ignore_errors=True)


def test_what_does_not_belong_to_the_data_set_is_refused(base, tmp_path):
    root = corrected(base, tmp_path / "out", "d")
    refused(
        base, root, "'ground': is no class of .*base, which has cat, dog, rest", background="ground"
    )
    masks = write_masks(tmp_path / "plain", value=255)
    for path in (masks / "masks" / "cat").iterdir():
        path.rename(masks / "masks" / path.name)
    shutil.rmtree(masks / "masks" / "cat")
    shutil.rmtree(masks / "masks" / "dog")
    with pytest.raises(
        UserError, match="'object': is no class of .*into masks/CLASS/, as masks/ca"
    ):
        importer.import_folder("masks", masks, tmp_path / "none", join=base, **REST)
    photo(root / "d.png", seed=77)
    refused(base, root, "images/d.png: another picture than the one of this name", **REST)
    refused(tmp_path / "source", root, "source: the panoptic JSON is missing", **REST)
    refused(base / "images", root, "one of it and|the panoptic JSON is missing", **REST)


def test_the_command_line_joins_and_has_no_share_for_validation_then(base, tmp_path, capsys):
    root = corrected(base, tmp_path / "out", "d")
    flags = ["--stage", "import", "--from", "labelme", "--input", root, "--background", "rest"]
    flags += ["--join", base, "--out", tmp_path / "new"]
    assert run(*flags, "--val-share", "0.5") == 2
    assert "--val-share: " in capsys.readouterr().err
    assert run(*flags) == 0
    assert "3 labelled, 0 unlabelled and 1 validation images" in capsys.readouterr().out


def test_what_predict_wrote_is_imported_from_where_people_correct_it(base, tmp_path):
    root = tmp_path / "predictions"
    corrected(base, root / "labelme", "d")
    shutil.copy(root / "labelme" / "d.png", root / "d.png")
    content = {"images": [], "annotations": [], "categories": []}
    (root / "instances.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"did you mean --input {root / 'labelme'}\?"):
        join(base, root, **REST)
    with pytest.raises(UserError, match=r"1 files in .*labelme are corrected \('d.json'\); take"):
        importer.import_folder("coco-instances", root, tmp_path / "new", join=base, **REST)


def test_things_that_look_like_stuff_are_not_doubted_where_the_data_set_has_decided(base, tmp_path):
    def notes(**flags):
        root = corrected(base, tmp_path / "out", "d", "new")
        for path in root.glob("*.json"):
            large = [[0, 0], [12, 0], [12, 9], [0, 9]]
            rewrite(path, lambda content: content["shapes"][0].update(points=large) and None)
        output = tmp_path / f"n{len(flags)}"
        return importer.import_folder("labelme", root, output, **REST, **flags)["notes"]

    assert any("say --stuff" in note for note in notes())
    assert not any("say --stuff" in note for note in notes(join=base))


def test_new_truth_of_validation_images_is_said(base, tmp_path):
    val = panoptic.load_folder(base, "all").val.name(0).removesuffix(".png")
    _, result = join(base, corrected(base, tmp_path / "out", val), **REST)
    assert "(1 of them validation images, which runs are measured by)" in result["notes"][-1]


def test_class_maps_are_not_joined_and_what_to_do_is_said(base, tmp_path):
    root = own_folder(tmp_path / "maps")
    words = "holds class maps; expected COCO panoptic format"
    refused(root, corrected(base, tmp_path / "out", "d"), words, **REST)


def test_pictures_of_the_data_set_are_known_by_their_pixels_under_other_names(base, tmp_path):
    """As predict calls them of a folder above: val/c.png, and with it the new folder val_c.png."""
    before = panoptic.load_folder(base, "all")
    val, flat, root = (
        before.val.name(0),
        corrected(base, tmp_path / "flat", "a", "b"),
        tmp_path / "out",
    )
    for part, name in (("val", val), ("train", "d.png")):
        (root / part).mkdir(parents=True)
        shutil.copy(base / "images" / name, root / part / name)
        shutil.copy(flat / "a.json", root / part / f"{name[0]}.json")
        rewrite(root / part / f"{name[0]}.json", lambda c, name=name: c.update(imagePath=name))
    dataset, result = join(base, root, **REST)
    assert [dataset.val.name(i) for i in range(len(dataset.val))] == [val]
    images = sorted(path.name for path in (tmp_path / "new" / "images").iterdir())
    assert images == ["a.png", "b.png", "c.png", "d.png"]
    assert (
        "2 images of" in result["notes"][-1] and "and 0 are added to its 4" in result["notes"][-1]
    )
    assert "(2 of them are known by their pixels, under other names)" in result["notes"][-1]
    shutil.copy(root / "val" / val, root / "again.png")
    shutil.copy(root / "val" / f"{val[0]}.json", root / "again.json")
    rewrite(root / "again.json", lambda c: c.update(imagePath="again.png"))
    with pytest.raises(UserError, match=f"both are annotated, and both are the picture {val} of"):
        join(base, root, "twice", **REST)


@pytest.mark.parametrize("what", ["images", "maps"])
def test_names_that_training_and_validation_share_are_refused(what, base, tmp_path):
    """One of two files would be gone, or be that of both."""
    for part in ("train", "val"):
        for folder in ("images", "panoptic"):
            (base / folder / part).mkdir(exist_ok=True)
            for file in (base / folder).glob("*.png"):
                shutil.copy(file, base / folder / part / file.name)
    content = json.loads((base / "panoptic_val.json").read_text())
    train = json.loads((base / "panoptic_train.json").read_text())
    own, other = content["annotations"][0], train["annotations"][0]["file_name"]
    name = own["file_name"] if what == "maps" else content["images"][0]["file_name"]
    folder = "panoptic" if what == "maps" else "images"
    (base / folder / "val" / name).rename(base / folder / "val" / other)
    (own if what == "maps" else content["images"][0])["file_name"] = other
    (base / "panoptic_val.json").write_text(json.dumps(content))
    assert len(panoptic.load_folder(base, "all").val) == 1  # sound where it is
    with pytest.raises(
        UserError, match=f"{what} of training and of validation are called '{other}'"
    ):
        join(base, corrected(base, tmp_path / "out", "new"), **REST)


def test_validation_images_that_nobody_annotated_stay_and_count_once_somebody_did(base, tmp_path):
    photo(base / "images" / "v.png", (12, 10), 77)
    rewrite(
        base / "panoptic_val.json",
        lambda c: c["images"].append({"id": 99, "file_name": "v.png", "width": 12, "height": 10}),
    )
    dataset, result = join(base, corrected(base, tmp_path / "out", "new"), **REST)
    assert dataset.val.unused == ["v.png"] and (result["val"], result["unlabeled"]) == (1, 1)
    assert (tmp_path / "new" / "images" / "v.png").exists()
    dataset, result = join(base, corrected(base, tmp_path / "more", "v"), "newer", **REST)
    assert "v.png" in [dataset.val.name(i) for i in range(len(dataset.val))] and result["val"] == 2
