"""Maps of classes as they are downloaded: lists of names and colours, folders and endings of names,
and what an import says of them.
"""

import json

import numpy as np
import pytest
from PIL import Image

from ground.errors import UserError
from readers import class_maps, panoptic
from readers.annotations import masks
from readers.annotations.values import read_values
from tests.helpers import photo
from tests.test_importer import import_refused, masks_scene, write_labelme
from tools import importer

IDS = np.repeat(np.arange(4, dtype=np.uint8), 30).reshape(10, 12)  # a fourth each, from the top
COLOURS = np.array([(0, 0, 0), (128, 64, 128), (70, 70, 70), (0, 0, 142)], np.uint8)
ROWS = {"background": 0, "road": 1, "house": 2, "car": 3}


def taken(root, **flags):
    """The data set that an import of maps makes, and what it says; each in a folder of its own."""
    output = root.parent / f"out{len([*root.parent.iterdir()])}"
    result = importer.import_folder("masks", root, output, **flags)
    return panoptic.load_folder(output, "all"), result


def areas(truth, taxonomy):
    """{class: pixels}, void included."""
    names = [taxonomy.names[k] for k in truth.labels]
    count = dict(zip(names, truth.areas.tolist()))
    return count | ({"": void} if (void := int((truth.segment_map == 0).sum())) else {})


def listed(form, names):
    """The lines of a list of colours as some tool writes it."""
    heads = {
        "{0},{1},{2},{3}": "name,r,g,b",
        "{0}:{1},{2},{3}::": "# label:color_rgb:parts:actions",
    }
    lines = [form.format(name, *COLOURS[k]) for name, k in names.items()]
    return "\n".join([*([heads[form]] if form in heads else []), *lines, ""])


@pytest.mark.parametrize(
    "rows",
    [
        ["sky 2", "road 1", "house 3"],
        ["sky (2)", "road (1)", "house (3)"],
        ["sky,2", "road", "house,3"],
        ["2,sky,#00ff00", "1,road,#ff0000", "3,house,#0000ff"],
        ["0:ground,1:road,2:sky,3:house"],
        ["1:road", "2: sky 7 8 9", "3:house"],
    ],
)
def test_lines_of_which_it_cannot_be_told_are_refused(rows, tmp_path):
    masks_scene(tmp_path / "s", "{}.png", IDS)
    (tmp_path / "s" / "classes.txt").write_text("\n".join(rows) + "\n")
    import_refused("masks", tmp_path / "s", "classes.txt: .*; expected a name in every line, or")
    with pytest.raises(UserError, match="classes.txt: .*; expected a name in every line, or"):
        class_maps.read_classes(tmp_path / "s")


@pytest.mark.parametrize("rows", [["1,road", "3,car"], ["id,name", "1,road", "3,car"], ["car 3"]])
def test_a_folder_of_class_maps_reads_such_lists_as_an_import_does(rows, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(rows) + "\n")
    taxonomy, values = class_maps.read_classes(tmp_path)
    if len(rows) > 1:
        assert taxonomy.names == ("road", "car") and values[[1, 3]].tolist() == [0, 1]
    else:
        assert taxonomy.names == ("car 3",)  # one name alone may end in a number


def test_names_may_hold_numbers_and_lists_be_in_quotes(tmp_path):
    for rows, names in (
        (["class 1", "class 2"], {1: "class 1", 2: "class 2"}),
        (["2 wheeler", "car", "Boeing 737"], {1: "2 wheeler", 2: "car", 3: "Boeing 737"}),
        (['"road"', '"sky"'], {1: "road", 2: "sky"}),
        (['"road",2', '"sky, blue sky",1'], {2: "road", 1: "sky, blue sky"}),
        (["2. sky", "1. road"], {2: "sky", 1: "road"}),
        (["1 - road", "2 - sky"], {1: "road", 2: "sky"}),
    ):
        (tmp_path / "classes.txt").write_text("\n".join(rows) + "\n")
        assert read_values(tmp_path, "", 255).classes() == names


def test_maps_that_all_show_the_same_values_are_asked_about(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", np.where(two_regions(), IDS, 0).astype(np.uint8))
    import_refused("masks", root, r"may be classes or instances .*\[1, 2, 3\]")
    (root / "classes.json").write_text('["road", "house", "car"]')
    import_refused("masks", root, r"classes.json: not read with maps; write .* VALUE:NAME a line")


@pytest.mark.parametrize(
    "rows",
    [
        ["background,0", "road,1", "house,2", "car,3"],
        ["name;value", "car; 3", "road; 1", "house; 2"],
        ["house: 2", "car: 3", "road: 1"],
        ["class\tid", "road\t1", "house\t2", "car\t3"],
    ],
)
def test_a_list_may_name_first_and_number_then(rows, tmp_path):
    masks_scene(tmp_path / "s", "{}.png", IDS)
    (tmp_path / "s" / "masks" / "classes.txt").write_text("\n".join(rows) + "\n")
    dataset, _ = taken(tmp_path / "s", background="ground")
    assert set(dataset.taxonomy.names) == {"ground", "road", "house", "car"}
    counts = areas(dataset.train.truth(0), dataset.taxonomy)
    assert counts == dict.fromkeys(("ground", "road", "house", "car"), 30)


@pytest.mark.parametrize(
    "file, form",
    [
        ("class_dict.csv", "{0},{1},{2},{3}"),
        ("masks/labelmap.txt", "{0}:{1},{2},{3}::"),
        ("label_colors.txt", "{1} {2} {3}\t{0}"),
    ],
)
@pytest.mark.parametrize("palette", [False, True])
def test_colours_are_classes_where_a_list_says_which(file, form, palette, tmp_path):
    root = tmp_path / "s"
    if palette:
        masks_scene(root, "{}.png", IDS, palette=COLOURS.ravel().tolist())
    else:
        masks_scene(root, "{}.png", COLOURS[IDS])
    (root / file).write_text(listed(form, ROWS))
    dataset, result = taken(root, stuff="road,house")
    assert dataset.taxonomy.names == ("road", "house", "car")
    assert dataset.taxonomy.things == (False, False, True)
    found = areas(dataset.train.truth(0), dataset.taxonomy)
    assert found == {"road": 30, "house": 30, "car": 30, "": 30}
    (root / file).write_text(listed(form, {"none": 0, "road": 1, "house": 2, "Void": 3}))
    dataset, result = taken(root)
    found = areas(dataset.train.truth(0), dataset.taxonomy)
    assert found == {"none": 30, "road": 30, "house": 30, "": 30}
    assert any("of these values nothing is learnt" in note for note in result["notes"])
    (root / file).write_text(listed(form, {"none": 0, "road": 1, "house": 2}))
    import_refused("masks", root, r"has the colour #00008e, which has no name; .*as void")


def test_colours_may_be_named_on_the_command_line_and_are_else_shown(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", COLOURS[IDS])
    import_refused(
        "masks", root, r"a.png: has 4 colours, as #000000 \(25%\).*--classes '#804080:NAME"
    )
    named = "#804080:road,#464646:void,#00008E:car"
    result = importer.import_folder(
        "masks", root, tmp_path / "o", masks_are="classes", classes=named, stuff="road"
    )
    assert result["instances"] == {"road": 3, "car": 3}
    result = importer.import_folder("masks", root, tmp_path / "i", masks_are="instances")
    assert result["instances"] == {"object": 9}  # every colour but black


def test_values_that_are_called_void_are_none_whatever_they_are(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", IDS)
    for lines, expected in (
        ("0:sky\n1:road\n2:house\n3:void\n", {"sky": 30, "road": 30, "house": 30, "": 30}),
        ("0:sky\n1:unlabelled\n2:ignore\n3:car\n", {"sky": 30, "car": 30, "": 60}),
        (
            "Pixel Value, Class\n0, background\n1, a\n2, b\n3, c\n",
            {"a": 30, "b": 30, "c": 30, "": 30},
        ),
    ):
        (root / "_classes.csv").write_text(lines)
        dataset, _ = taken(root)
        assert areas(dataset.train.truth(0), dataset.taxonomy) == expected
    import_refused(
        "masks",
        root,
        r"25% of its pixels are 0, and the first name of --classes, x, may",
        classes="x,y,z",
    )


def test_void_is_none_in_a_folder_of_class_maps_too(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nvoid\nroad\ncar\n")
    for part in ("train", "val"):
        photo(tmp_path / "images" / part / "a.png")
        (tmp_path / "labels" / part).mkdir(parents=True)
        Image.fromarray(IDS).save(tmp_path / "labels" / part / "a.png")
    (tmp_path / "classes.txt").write_text("void\nignore\n")
    with pytest.raises(UserError, match="expected at least one name"):
        class_maps.load(tmp_path, "all")
    (tmp_path / "classes.txt").write_text("0:sky\n1:void\n2:road\n3:car\n9:void\n255:void\n")
    dataset = class_maps.load(tmp_path, "all")
    assert dataset.taxonomy.names == ("sky", "road", "car")
    truth = dataset.train.truth(0)
    assert truth.areas.tolist() == [30, 30, 30] and (truth.segment_map == 0).sum() == 30


def test_one_is_asked_where_values_are_in_several_places_of_every_map(tmp_path):
    houses = np.zeros((10, 12), np.uint8)
    houses[1:3, 1:3] = houses[1:3, 6:9] = houses[6:8, 3:5] = 1
    houses[5, :2] = houses[5, 8:] = houses[9, 3:6] = 2
    root = masks_scene(tmp_path / "s", "{}.png", houses)
    import_refused("masks", root, r"its values may be classes or instances")
    result = importer.import_folder("masks", root, tmp_path / "o", masks_are="instances")
    assert result["instances"] == {"object": 6}


@pytest.mark.parametrize("form", ["{}_mask.png", "{}.png"])
@pytest.mark.parametrize("parts", [("train", "valid", "test"), ("train",), ("",)])
def test_masks_may_lie_beside_their_images(form, parts, tmp_path):
    root = tmp_path / "s"
    for part in parts:
        for k, name in enumerate(("a_1", "a_2", "b")):
            photo(root / part / f"{name}.jpg", seed=k)
            Image.fromarray(IDS).save(root / part / form.format(name))
        (root / part / "_classes.csv").write_text(
            "Pixel Value, Class\n 0, unlabeled\n 1, road\n 2, house\n 3, car\n"
        )
        photo(root / part / "c.jpg")
    dataset, result = taken(root)
    count = len(parts) // 2
    assert result["labeled"] == (3 if count else 2) and result["unlabeled"] == 1
    assert areas(dataset.train.truth(0), dataset.taxonomy) == {
        "road": 30,
        "house": 30,
        "car": 30,
        "": 30,
    }
    assert any("pictures are masks by their names" in note for note in result["notes"])


@pytest.mark.parametrize(
    "image, mask, said",
    [
        ("{}.png", "{}_L.png", "with _L"),
        ("{}_leftImg8bit.png", "{}_gtFine_labelIds.png", "with _gtFine_labelIds in place of"),
    ],
)
def test_masks_may_have_an_ending_of_their_own(image, mask, said, tmp_path):
    root = tmp_path / "s"
    (root / "masks").mkdir(parents=True)
    for k in range(4):
        photo(root / "images" / image.format(f"x_{k}"), seed=k)
        if k < 3:
            Image.fromarray(IDS).save(root / "masks" / mask.format(f"x_{k}"))
    dataset, result = taken(root, classes="background,road,house,car")
    assert result["labeled"] == 2 and result["unlabeled"] == 1 and result["val"] == 1
    assert any(said in note for note in result["notes"])
    Image.fromarray(IDS).save(root / "masks" / "odd.png")
    import_refused("masks", root, "rename it", classes="background,road,house,car")


def test_a_list_says_what_is_for_validation(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", IDS)
    (root / "masks" / "classes.txt").write_text("background\nroad\nhouse\ncar\n")
    (root / "val.txt").write_text("b\n")
    dataset, _ = taken(root)
    assert dataset.val.names.tolist() == ["b.png"] and len(dataset.unlabeled) == 1
    (root / "val.txt").write_text("images/q.png\n")
    import_refused("masks", root, r"val.txt: .*q.png.* is no image")


def test_copies_of_a_picture_are_on_one_side(tmp_path):
    names = [f"{k}_jpg.rf.{copy}{k}a" for k in range(6) for copy in "012"]
    root = write_labelme(tmp_path / "s", names, ())
    for seed in range(4):
        out = tmp_path / f"o{seed}"
        result = importer.import_folder("labelme", root, out, val_share=0.34, seed=seed)
        assert result["val"] == 6 and result["labeled"] == 12
        sides = [
            {
                image["file_name"].split(".rf.")[0]
                for image in json.loads(path.read_text())["images"]
            }
            for path in (out / "panoptic_train.json", out / "panoptic_val.json")
        ]
        assert not sides[0] & sides[1]
        assert any("6 pictures have several copies" in note for note in result["notes"])


def test_things_that_cover_most_pixels_are_asked_about(tmp_path):
    def square(label, side):
        return {"label": label, "points": [[0, 0], [side, side]], "shape_type": "rectangle"}

    root = write_labelme(tmp_path / "s", "abc", (), [square("wall", 9), square("door", 2)])
    result = importer.import_folder("labelme", root, tmp_path / "o")
    assert any("if they are stuff" in note and "--stuff wall" in note for note in result["notes"])
    result = importer.import_folder("labelme", root, tmp_path / "p", stuff="wall")
    assert not any("if they are stuff" in note for note in result["notes"])


@pytest.mark.parametrize("names", ["road,void,car", "road,void"])
def test_what_is_proposed_has_the_names_in_their_places(names, tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", np.minimum(IDS, 2))
    import_refused("masks", root, "write 0:road,1:void,.*background,road,void", classes=names)
    result = importer.import_folder(
        "masks", root, tmp_path / "o", classes="road,car", background="lawn"
    )  # who says what the rest is has said what 0 is
    assert result["instances"] == {"road": 3, "car": 3, "lawn": 3}


def test_a_background_that_is_void_is_said(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", IDS)
    names = "background,road,house,car"
    _, result = taken(root, classes=names)
    assert any("background of --classes is void" in note for note in result["notes"])
    _, result = taken(root, classes=names, background="ground")
    assert not any("is void" in note for note in result["notes"])
    assert result["instances"]["ground"] == 3


def test_lists_of_tools_are_read_in_their_own_form_alone(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", np.where(two_regions(), IDS, 0).astype(np.uint8))
    (root / "labelmap.txt").write_text("item {\n  id: 1\n  name: 'cell'\n}\n")
    result = importer.import_folder("masks", root, tmp_path / "o", masks_are="instances")
    assert "object" in result["instances"]  # TensorFlow's file is no list of colours
    (root / "class_dict.csv").write_text(listed("{0},{1},{2},{3}", ROWS))
    import_refused("masks", root, r"#010101.*say --classes 0:NAME.*or say --masks-are instances")


def two_regions():
    there = np.zeros((10, 12), bool)
    there[:4], there[6:] = True, True
    return there


def test_lists_of_parts_that_differ_are_refused_and_that_of_a_test_set_is_not_asked(tmp_path):
    root = tmp_path / "s"
    names = {"train": "road\n2, house", "valid": "road\n2, house", "test": "house\n2, road"}
    for k, (part, text) in enumerate(names.items()):
        photo(root / part / "a.jpg", seed=k)
        Image.fromarray(np.minimum(IDS, 2)).save(root / part / "a_mask.png")
        (root / part / "_classes.csv").write_text(f"Pixel Value, Class\n0, void\n1, {text}\n")
    dataset, _ = taken(root)
    found = areas(dataset.train.truth(0), dataset.taxonomy)
    assert found == {"road": 30, "house": 60, "": 30}
    (root / "valid" / "_classes.csv").write_text("0, void\n1, house\n2, road\n")
    import_refused(
        "masks", root, r"valid/_classes.csv: names other values than .*train/_classes.csv"
    )


def test_every_mask_beside_an_image_is_one_and_other_pictures_are_counted(tmp_path):
    """As BUSI names them: NAME_mask.png, NAME_mask_1.png; and a list in a folder of its own."""
    root, whole = tmp_path / "s", two_regions()
    whole[:4] = False
    for k in range(3):
        photo(root / f"benign ({k}).png", seed=k)
        Image.fromarray(255 * whole.astype(np.uint8)).save(root / f"benign ({k})_mask.png")
    Image.fromarray(255 * whole[::-1].astype(np.uint8)).save(root / "benign (1)_mask_1.png")
    photo(root / "unlabeled" / "u.jpg", seed=7)
    photo(root / "more" / "v.jpg", seed=8)
    (root / "masks").mkdir()
    (root / "masks" / "README.txt").write_text("none here")
    dataset, result = taken(root)
    assert result["labeled"] + result["val"] == 3 and result["unlabeled"] == 1
    assert result["instances"] == {"object": 4}
    assert result["dropped"]["pictures of other folders"] == 1


def test_a_list_for_validation_may_be_as_others_write_it(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", IDS)
    names = "background,road,house,car"
    for text in ("b", "images/b.jpg masks/b.png\n", "# mine\nimages\\b.png\n"):
        (root / "val.txt").write_text(text)
        dataset, result = taken(root, classes=names)
        assert dataset.val.names.tolist() == ["b.png"]
        assert any("val.txt names are for validation" in note for note in result["notes"])
    (root / "val.txt").write_bytes("b.png".encode("utf-16"))
    import_refused("masks", root, "val.txt: not a readable list", classes=names)
    (root / "val.txt").write_text("\n")
    import_refused("masks", root, "val.txt: names no image", classes=names)


def test_colours_that_nobody_can_be_sure_of_are_refused(tmp_path):
    named = "#000000:none,#804080:road,#464646:house,#00008e:car"
    clear = np.dstack([COLOURS[IDS], np.where(IDS, 255, 0).astype(np.uint8)])
    root = masks_scene(tmp_path / "clear", "{}.png", clear)
    import_refused("masks", root, "pixels that are clear", classes=named)
    root = masks_scene(tmp_path / "wide", "{}.png", IDS.astype(np.uint16) * 300)
    import_refused("masks", root, "uint16 .* and the list has colours", classes=named)
    root = masks_scene(tmp_path / "array", "{}.npy", IDS.astype(np.int64))
    import_refused("masks", root, "int64 .* and the list has colours", classes=named)
    root = masks_scene(tmp_path / "mixed", "{}.png", COLOURS[IDS])
    import_refused("masks", root, "expected a colour and a name", classes="#804080:road,2:car")


def test_vocs_border_is_void_in_maps_of_colours_too(tmp_path):
    shown = COLOURS[IDS]
    shown[4] = (224, 224, 192)
    root = masks_scene(tmp_path / "s", "{}.png", shown)
    dataset, _ = taken(root, masks_are="instances")
    assert (dataset.train.truth(0).segment_map[4] == 0).all()
    assert len(dataset.train.truth(0).labels) == 3


def test_a_palette_of_black_and_white_is_numbers_where_these_are_named(tmp_path):
    for name, palette in (("white", [255] * 3 + [0] * 3), ("black", [0] * 3 + [255] * 3)):
        root = masks_scene(tmp_path / name, "{}.png", np.minimum(IDS, 1), palette=palette)
        dataset, _ = taken(root, classes="0:a,1:b")
        assert areas(dataset.train.truth(0), dataset.taxonomy) == {"a": 30, "b": 90}


def test_an_ending_is_known_from_the_other_part(tmp_path):
    root = tmp_path / "s"
    for part, count in (("train", 3), ("val", 1)):
        (root / "masks" / part).mkdir(parents=True)
        for k in range(count):
            photo(root / "images" / part / f"{part}{k}.png", seed=k)
            Image.fromarray(IDS).save(root / "masks" / part / f"{part}{k}_L.png")
    _, result = taken(root, classes="background,road,house,car")
    assert (result["labeled"], result["val"]) == (3, 1)


def coded(classes, instances):
    """A map of 256 * class + instance, 16 bits."""
    return (256 * np.asarray(classes, np.uint16) + np.asarray(instances, np.uint16)).astype(
        np.uint16
    )


def test_class_and_instance_in_one_number_are_never_guessed_and_both_are_read(tmp_path):
    """As Mapillary's and KITTI's: two cars that touch, and stuff that is no instance."""
    number = np.zeros_like(IDS)
    number[IDS == 3], number[:, 6:][IDS[:, 6:] == 3] = 1, 2
    root = masks_scene(tmp_path / "s", "{}.png", coded(IDS + 7, number))
    import_refused("masks", root, r"look like 256 \* class \+ instance.*--masks-are both")
    names = "7:void,8:road,9:house,10:car"
    for stuff, expected in (("road,house", {"road": 30, "house": 30}), ("", None)):
        dataset, result = taken(root, masks_are="both", classes=names, stuff=stuff)
        truth = dataset.train.truth(0)
        assert sorted(truth.areas.tolist()) == [12, 18, 30, 30]
        assert (truth.segment_map == 0).sum() == 30
        if expected:
            assert areas(truth, dataset.taxonomy).items() >= expected.items()
            assert dataset.taxonomy.things == (False, False, True)
        assert any("each number an instance" in note for note in result["notes"])
    import_refused(
        "masks", root, "has 2 values without a name, 8, 9;", masks_are="both", classes="7:a,10:b"
    )
    counted = np.arange(1, 601, dtype=np.uint16).reshape(20, 30)
    assert not masks._is_coded({*counted.ravel().tolist()}), "so many instances are no classes"
    tracked = {int(k) for k in np.random.default_rng(0).integers(1, 2000, 40)}
    assert not masks._is_coded(tracked), "nor are numbers that objects keep from map to map"
    assert masks._is_coded({7 * 256, 11 * 256, 24 * 256 + 2, 26 * 256 + 1, 26 * 256 + 3})


def test_what_is_a_thing_in_the_data_set_stays_one_when_maps_of_classes_are_joined(tmp_path):
    base = masks_scene(tmp_path / "base", "{}.png", IDS)
    (base / "classes.txt").write_text("background\nroad\nhouse\ncar\n")
    importer.import_folder("masks", base, tmp_path / "set", stuff="road", background="ground")
    two = IDS.copy()
    two[:, 5:7][two[:, 5:7] == 3] = 1  # the car falls into two
    more = masks_scene(tmp_path / "more", "{}.png", two)
    (more / "classes.txt").write_text("background\nroad\nhouse\ncar\n")
    for flags in ({}, {"stuff": "road"}):
        _, result = taken(more, join=tmp_path / "set", background="ground", **flags)
        assert result["instances"]["car"] == 2 * 3 and result["instances"]["road"] == 3
        assert any("things and stuff are as in the data set" in note for note in result["notes"])
    wrong = {"join": tmp_path / "set", "background": "ground", "stuff": "car"}
    import_refused("masks", more, "--stuff car: its objects are things in", **wrong)


def test_the_background_may_be_the_only_stuff_of_maps_of_classes(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", IDS)
    (root / "classes.txt").write_text("background\nroad\nhouse\ncar\n")
    dataset, _ = taken(root, background="ground", stuff="ground")
    assert dict(zip(dataset.taxonomy.names, dataset.taxonomy.things)) == {
        "road": True,
        "house": True,
        "car": True,
        "ground": False,
    }


def test_a_mask_without_its_image_is_no_image(tmp_path):
    root = tmp_path / "s"
    for name in ("a", "b", "c"):
        photo(root / f"{name}.jpg")
        Image.fromarray(IDS).save(root / f"{name}_mask.png")
    (root / "_classes.csv").write_text(
        "Pixel Value, Class\n0, background\n1, road\n2, house\n3, car\n"
    )
    assert taken(root, background="ground")[1]["labeled"] == 2
    (root / "c.jpg").unlink()
    import_refused("masks", root, "c_mask.png: is called as a mask, and there is no image")


def test_a_list_of_colours_may_number_its_rows_and_have_semicolons(tmp_path):
    rows = [(name, *COLOURS[k]) for name, k in {**ROWS, "Void": 0}.items() if name != "background"]
    for form, head in (("{k},{0},{1},{2},{3}", "id,name,r,g,b"), ("{0};{1};{2};{3}", ";r;g;b")):
        root = masks_scene(tmp_path / head[:3], "{}.png", COLOURS[IDS])
        lines = [head, *(form.format(*row, k=k) for k, row in enumerate(rows, 7))]
        (root / "class_dict.csv").write_text("\n".join(lines))
        dataset, _ = taken(root)
        assert areas(dataset.train.truth(0), dataset.taxonomy) == {
            **dict.fromkeys(("road", "house", "car"), 30),
            "": 30,
        }


def test_numbers_whose_palettes_differ_from_map_to_map_are_refused(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", IDS, palette=COLOURS.ravel().tolist())
    (root / "classes.txt").write_text("background\nroad\nhouse\ncar\n")
    assert taken(root, background="ground")[1]["labeled"] == 2
    image = Image.fromarray(IDS, "P")
    image.putpalette(COLOURS[[0, 2, 1, 3]].ravel().tolist())
    image.save(root / "masks" / "b.png")
    import_refused("masks", root, "its palette shows 1 as #464646, that of .* as #804080")


def test_masks_of_pictures_that_exif_turns_are_said(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", IDS)
    (root / "classes.txt").write_text("background\nroad\nhouse\ncar\n")
    assert not any("EXIF" in note for note in taken(root)[1]["notes"])
    path = next((root / "images").glob("a.*"))
    exif = Image.Exif()
    exif[0x0112] = 3  # by half a turn, so that the size stays
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=exif)
    notes = taken(root)[1]["notes"]
    assert any("1 annotated images are turned as their EXIF says" in note for note in notes)


def test_void_is_said_where_stuff_is_named_too(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", np.where(IDS == 3, 3, 0).astype(np.uint8))
    for flags in ({}, {"stuff": "car"}):
        notes = taken(root, masks_are="classes", classes="3:car", **flags)[1]["notes"]
        assert any("75 % of the pixels of annotated images are in no segment" in n for n in notes)


def test_lists_that_contradict_each_other_are_refused(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", IDS)
    (root / "labels.txt").write_text("1:road\n2:house\n3:car\n")
    (root / "classes.csv").write_text("value,name\n1,road\n2,house\n3,car\n")
    assert set(taken(root)[0].taxonomy.names) == {"road", "house", "car"}
    (root / "classes.csv").write_text("value,name\n1,house\n2,road\n3,car\n")
    words = "classes.csv: names other values than .*labels.txt; take out the one that is wrong"
    import_refused("masks", root, words)


@pytest.mark.parametrize(
    "file, rows, said",
    [
        ("class_dict.csv", "class,hex\nsky,#4682b4\n", "class_dict.csv is not understood: "),
        ("labels.csv", "name,r,g,b\nsky,1,2,3\n", "labels.csv is not .* called class_dict.csv or"),
        ("val.txt", "a.png\n", "_classes.csv$"),
    ],
)
def test_a_list_that_is_there_and_not_read_is_named(file, rows, said, tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", IDS)
    (root / file).write_text(rows)
    import_refused("masks", root, f"nothing says what the values mean.*{said}", masks_are="classes")


@pytest.mark.parametrize("row", ["{name} {r} {g} {b}", "{r} {g} {b} {name}", "{name},{r},{g},{b}"])
def test_a_colour_may_lie_before_or_behind_its_name(row, tmp_path):
    colours = {"sky": (70, 130, 180), "class 2": (0, 0, 142)}
    rows = [row.format(name=name, r=r, g=g, b=b) for name, (r, g, b) in colours.items()]
    (tmp_path / "label_colors.txt").write_text("\n".join(rows) + "\n")
    values = read_values(tmp_path, "", 255)
    assert values.coloured and set(values.classes().values()) == {*colours}
    assert {0x4682B4, 0x8E} <= values.names.keys()


def test_pictures_without_masks_are_unlabelled_or_counted_wherever_they_lie(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", IDS)
    before = taken(root, classes="background,road,house,car")[1]
    for place in ("unlabeled/x.png", "unlabeled/deep/y.png", "other/z.png", "w.png"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        photo(root / place, (12, 10), len(place))
    dataset, result = taken(root, classes="background,road,house,car")
    assert result["unlabeled"] == before["unlabeled"] + 2
    assert result["dropped"]["pictures outside of images/ and unlabeled/"] == 2
    unlabelled = {dataset.train.name(i) for i in dataset.unlabeled}
    assert {"x.png", "deep_y.png"} <= unlabelled


def test_masks_whose_names_are_composed_otherwise_belong_to_their_images(tmp_path):
    root = masks_scene(tmp_path / "s", "{}.png", IDS)
    there = sorted((root / "images").iterdir())[0]
    mask = root / "masks" / f"{there.stem}.png"
    there.rename(there.with_name(f"Stra\u00dfe \u00f6{there.suffix}"))
    mask.rename(mask.with_name("Stra\u00dfe o\u0308.png"))
    dataset, result = taken(root, classes="background,road,house,car")
    assert result["labeled"] + result["val"] == len([*(root / "masks").glob("*.png")])
