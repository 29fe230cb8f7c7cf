"""."""

import base64
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import dearli
from ground import files
from ground.errors import UserError
from readers import annotations, panoptic
from readers.annotations.coco import _runs
from readers.annotations.labelme import _circle
from readers.annotations.shapes import polygon
from readers.runs import to_runs
from tests.helpers import TINY_FLAGS, fingerprint, fitting, log_of, photo, rewrite, save, validated
from tools import importer

# ------------------------------------------------------------ readers/annotations, tools/importer.p
#
# One scene in every format: on 12 x 10 pixels a cat at x 1 to 4, y 2 to 5 (16 pixels) and a dog at
# x 4 to 8, y 4 to 7 (20); at x 4, y 4 to 5 they overlap.

BOXES = {"cat": (1, 2, 5, 6), "dog": (4, 4, 9, 8)}  # left, top, right, bottom, in corners of pixels
CORNERS = {
    name: [[left, top], [right, top], [right, bottom], [left, bottom]]
    for name, (left, top, right, bottom) in BOXES.items()
}
CITY_IDS = {"cat": 24_001, "dog": 26_000}  # a person and a car


def scene_mask(name, size=(10, 12)):
    left, top, right, bottom = BOXES[name]
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def scene_ids():
    """What every format must give: segment 1 the cat, 2 the dog, and the smaller cat on top."""
    ids = np.where(scene_mask("dog"), 2, 0)
    ids[scene_mask("cat")] = 1
    return ids


def write_labelme(root, names=("a", "b", "c"), bare=("d",), shapes=None, size=(12, 10)):
    for k, name in enumerate((*names, *bare)):
        photo(root / f"{name}.png", size, k)
    for name in names:
        drawn = shapes or [
            {"label": label, "points": points, "shape_type": "polygon", "group_id": None}
            for label, points in CORNERS.items()
        ]
        (root / f"{name}.json").write_text(
            json.dumps(
                {
                    "version": "5.4.1",
                    "shapes": drawn,
                    "imagePath": f"{name}.png",
                    "imageData": None,
                    "imageHeight": size[1],
                    "imageWidth": size[0],
                }
            )
        )
    return root


def coco_content(segmentation, names=("a.png", "b.png", "c.png"), bare=("d.png",)):
    images = [
        {"id": 10 + k, "file_name": name, "width": 12, "height": 10}
        for k, name in enumerate((*names, *bare))
    ]
    annotations = [
        {
            "id": 1,
            "image_id": 10 + k,
            "category_id": category,
            "segmentation": segmentation(label),
            "iscrowd": 0,
        }
        for k in range(len(names))
        for label, category in (("cat", 17), ("dog", 3))
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 17, "name": "cat"}, {"id": 3, "name": "dog"}],
    }


def write_coco(root, segmentation=lambda label: [np.ravel(CORNERS[label]).tolist()]):
    for k, name in enumerate("abcd"):
        photo(root / "images" / f"{name}.png", seed=k)
    (root / "annotations.json").write_text(json.dumps(coco_content(segmentation)))
    return root


def long_runs(label):
    """Uncompressed run lengths: down the columns, zeros first."""
    flat = np.append(scene_mask(label).ravel(order="F"), False).astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [10, 12], "counts": np.diff([0, *edges, 120]).tolist()}


def write_cityscapes(root, values=None):
    for k, (part, city, annotated) in enumerate(
        (
            ("train", "ulm", True),
            ("train", "bonn", True),
            ("val", "jena", True),
            ("train_extra", "trier", False),
        )
    ):
        stem = f"{city}_000000_000019"
        photo(root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png", seed=k)
        if annotated:
            path = root / "gtFine" / part / city / f"{stem}_gtFine_instanceIds.png"
            path.parent.mkdir(parents=True)
            ids = (
                np.array([0, CITY_IDS["cat"], CITY_IDS["dog"]])[scene_ids()]
                if values is None
                else values
            )
            Image.fromarray(ids.astype(np.uint16)).save(path)
    return root


def write_masks(root, value=7):
    for k, name in enumerate("abcd"):
        photo(root / "images" / f"{name}.png", seed=k)
    for label in BOXES:
        (root / "masks" / label).mkdir(parents=True)
        for name in "abc":
            Image.fromarray(
                (scene_mask(label) * value).astype(np.uint16 if value > 255 else np.uint8)
            ).save(root / "masks" / label / f"{name}.png")
    return root


def write_yolo(root):
    """Roboflow's layout, without a division; d.png has no label file."""
    lines = []
    for number, corners in enumerate(CORNERS.values()):
        shares = (np.array(corners) / (12, 10)).ravel()
        lines.append(" ".join([str(number), *(f"{v:.6f}" for v in shares)]))
    (root / "train" / "labels").mkdir(parents=True)
    for k, name in enumerate("abcd"):
        photo(root / "train" / "images" / f"{name}.png", seed=k)
        if name != "d":
            (root / "train" / "labels" / f"{name}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text("train: ../train/images\nnc: 2\nnames: ['cat', 'dog']\n")
    return root


def studio_region(label, points=None, kind="polygon", **value):
    """An entry of a result of Label Studio; points: in pixels of 12 x 10."""
    value |= {} if points is None else {"points": (np.array(points) / (0.12, 0.1)).tolist()}
    return {
        "id": f"{label}{kind}",
        "type": f"{kind}labels",
        "original_width": 12,
        "original_height": 10,
        "image_rotation": 0,
        "value": {**value, f"{kind}labels": [label]},
    }


def write_label_studio(root, results=None):
    """Uploaded images; nobody annotated d.png."""
    tasks = []
    drawn = [studio_region(label, points) for label, points in CORNERS.items()]
    for k, name in enumerate("abcd"):
        photo(root / "upload" / f"{name}.png", seed=k)
        annotations = [{"id": 50 + k, "was_cancelled": False, "result": results or drawn}]
        task = {"id": k, "data": {"image": f"/data/upload/1/0a1b2c3d-{name}.png"}}
        tasks.append({**task, "annotations": [] if name == "d" else annotations})
    (root / "project-1.json").write_text(json.dumps(tasks))
    return root


SCENES = {
    "labelme": write_labelme,
    "coco-instances": write_coco,
    "cityscapes": write_cityscapes,
    "masks": write_masks,
    "yolo": write_yolo,
    "label-studio": write_label_studio,
}


def imported(kind, source, **flags):
    """The data set that an import makes, read as every stage reads it, and what the import says of
    it.
    """
    output = source.parent / f"{source.name}-out"
    result = importer.import_folder(kind, source, output, **flags)
    assert not (output / "import.part").exists()
    return panoptic.load_folder(output, "all"), result


def told(result):
    """Its notes, but that most of the scene is void."""
    return [note for note in result["notes"] if "--background" not in note]


def maps(dataset):
    """Segment map of each annotated image, by name."""
    return {
        images.name(i): images.truth(i).segment_map
        for images in (dataset.train, dataset.val)
        for i in range(images.annotated)
    }


def import_refused(kind, source, words, **flags):
    with pytest.raises(UserError) as error:
        importer.import_folder(kind, source, source.parent / "refused", **flags)
    assert re.search(words, str(error.value)) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize("kind", SCENES)
def test_one_scene_is_the_same_in_every_format(kind, tmp_path):
    dataset, result = imported(kind, SCENES[kind](tmp_path / "source"))
    assert (
        len(dataset.labeled) == 2
        and len(dataset.unlabeled) == 1
        and len(dataset.val) == 1
        and not result["dropped"]
    )
    assert (result["labeled"], result["unlabeled"], result["val"]) == (2, 1, 1)
    for images, i in ((dataset.train, 0), (dataset.train, 1), (dataset.val, 0)):
        truth = images.truth(i)
        assert (
            np.array_equal(truth.segment_map, scene_ids())
            and truth.areas.tolist() == [16, 18]
            and not truth.crowd.any()
        )
        names = [dataset.taxonomy.names[k] for k in truth.labels]
        assert names == (["person", "car"] if kind == "cityscapes" else ["cat", "dog"]) and all(
            dataset.taxonomy.things[k] for k in truth.labels
        )
    content = json.loads((tmp_path / "source-out" / "panoptic_train.json").read_text())
    first = content["annotations"][0]
    assert [s["id"] for s in first["segments_info"]] == [1, 2] and [
        s["bbox"] for s in first["segments_info"]
    ] == [[1, 2, 4, 4], [4, 4, 5, 4]]
    ids = panoptic.segment_ids(tmp_path / "source-out" / "panoptic" / first["file_name"])
    assert np.array_equal(ids, scene_ids())
    assert {c["id"] for c in content["categories"]} == {
        "coco-instances": {3, 17},
        "cityscapes": set(annotations.CITYSCAPES),
        "yolo": {0, 1},
    }.get(kind, {1, 2})


def test_run_lengths_are_read_like_polygons(tmp_path):
    for name, segmentation in (
        ("long", long_runs),
        ("short", lambda label: to_runs(scene_mask(label))),
    ):
        dataset, _ = imported("coco-instances", write_coco(tmp_path / name, segmentation))
        assert np.array_equal(
            dataset.train.truth(0).segment_map, scene_ids()
        ) and dataset.taxonomy.ids == (17, 3)


def test_pixels_belong_to_a_shape_if_their_centres_do():
    def draw(points):
        return polygon(np.array(points, float), (10, 12))

    def whole(patch, size=(10, 12)):
        mask = np.zeros(size, bool)
        mask[patch[0] : patch[0] + patch[2].shape[0], patch[1] : patch[1] + patch[2].shape[1]] = (
            patch[2]
        )
        return mask

    assert np.array_equal(whole(draw(CORNERS["cat"])), scene_mask("cat")) and np.array_equal(
        whole(draw(np.add(CORNERS["cat"], 0.4))), scene_mask("cat")
    )
    assert np.array_equal(
        whole(draw(np.add(CORNERS["cat"], [-0.5, 0.6]))), np.roll(scene_mask("cat"), 1, 0)
    )  # x: 0.5 and 4.5, down; y: 2.6 and 6.6
    left, right = (
        whole(draw([[0, 0], [6, 0], [6, 10], [0, 10]])),
        whole(draw([[6, 0], [12, 0], [12, 10], [6, 10]])),
    )
    assert (
        not (left & right).any() and (left | right).all()
    )  # neighbours neither overlap nor leave a gap
    assert np.array_equal(
        whole(draw([[-5, -7], [20, -7], [20, 3], [-5, 3]])),
        np.arange(10)[:, None].repeat(12, 1) < 3,
    )  # clipped
    assert (
        draw([[20, 1], [22, 1], [22, 5]])[2].sum()
        == draw([[3.1, 3.1], [3.3, 3.1], [3.3, 3.3]])[2].sum()
        == draw([[1, 1], [5, 5]])[2].sum()
        == 0
    )
    triangle, (ys, xs) = (
        whole(draw([[0, 0], [10, 0], [0, 10]])),
        np.mgrid[:10, :12],
    )  # its long side goes through the centres where x + y = 9
    assert triangle[xs + ys < 9].all() and not triangle[xs + ys > 9].any()
    disc = whole(_circle(np.array([[5.0, 5.0], [7.0, 5.0]]), (10, 12)))
    assert (
        disc.sum() == 12 and disc[3:7, 4:6].all() and disc[4:6, 3:7].all()
    )  # centres within 2 of the corner at (5, 5): 4 + 4 + 4
    assert (
        whole(_circle(np.array([[5.0, 5.0], [6.5, 6.6]]), (10, 12))).sum() == 16
    )  # and within 2.19, so that those 1.5 away on both axes are in


def test_polygons_are_as_large_as_pycocotools_says(tmp_path):
    from pycocotools import mask as coco_mask

    rng, total, exact = np.random.default_rng(0), 0, 0
    for k in range(600):
        side, corners = (3, 8, 20)[k % 3], rng.integers(3, 9)
        angles, radii = np.sort(rng.random(corners)) * 2 * np.pi, side * (0.3 + rng.random(corners))
        points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + rng.uniform(
            5, 55, 2
        )  # concave, and partly outside, too
        points = (np.round(points) if k % 2 else points).clip(-30, 110)
        points = (
            np.concatenate([points, points[:2] + 4, points[:1]]) if k % 5 == 0 else points
        )  # crosses itself
        top, left, mask = polygon(points, (50, 60))
        whole = np.zeros((50, 60), bool)
        whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        assert np.array_equal(
            whole,
            coco_mask.decode(coco_mask.frPyObjects([points.ravel().tolist()], 50, 60)[0]),
        )
        if k % 5 and points.min() >= 0 and (points.max(0) <= (60, 50)).all():
            x, y = points.T
            total, exact = (
                total + mask.sum(),
                exact + abs((x * np.roll(y, 1) - y * np.roll(x, 1)).sum()) / 2,
            )
    assert abs(total / exact - 1) < 0.01 and exact > 1000
    # a square with a square hole, as tools write it in one outline: out along a cut, around the
    # hole, and back along the cut
    ring = [[1, 1], [9, 1], [9, 9], [1, 9], [1, 1], [3, 3], [3, 6], [6, 6], [6, 3], [3, 3]]
    assert polygon(np.array(ring, float), (10, 12))[2].sum() == 64 - 9

    # two parts of one instance, which overlap: COCO's union, 9 + 9 - 4
    def parts(label):
        return (
            [[1, 1, 4, 1, 4, 4, 1, 4], [2, 2, 5, 2, 5, 5, 2, 5]]
            if label == "cat"
            else [np.ravel(np.add(CORNERS["dog"], [0, 2])).tolist()]
        )

    assert imported("coco-instances", write_coco(tmp_path / "parts", parts))[0].train.truth(
        0
    ).areas.tolist() == [14, 20]


def test_run_lengths_are_those_of_pycocotools(tmp_path):
    from pycocotools import mask as coco_mask

    for name, form in (
        ("long", long_runs),
        ("short", lambda label: to_runs(scene_mask(label))),
    ):
        rle = form("dog")
        theirs = (
            coco_mask.frPyObjects(rle, 10, 12)
            if name == "long"
            else {**rle, "counts": rle["counts"].encode()}
        )
        assert coco_mask.area(theirs) == 20 and coco_mask.toBbox(theirs).tolist() == [4, 4, 5, 4]
        top, left, mask = _runs(rle, (10, 12), "")
        assert (top, left) == (0, 0) and np.array_equal(mask, scene_mask("dog"))


def test_labelme_shapes_groups_and_masks(tmp_path):
    held = io.BytesIO()
    Image.fromarray(np.array([[1, 0, 1]], np.uint8)).save(held, "PNG")
    shapes = [
        {"label": "leaf", "points": [[0, 0], [2, 1]], "shape_type": "rectangle", "group_id": 4},
        {
            "label": "leaf",
            "points": [[11, 3], [9, 1]],
            "shape_type": "rectangle",
            "group_id": 4,
        },  # drawn from its lower right
        {
            "label": "stem",
            "points": [[4, 0], [5, 1]],
            "shape_type": "rectangle",
            "group_id": 4,
        },  # another label
        {"label": "disc", "points": [[5, 7], [6, 7]], "shape_type": "circle"},
        {
            "label": "spot",
            "points": [[8, 9], [10, 9]],
            "shape_type": "mask",
            "mask": base64.b64encode(held.getvalue()).decode(),
        },
        {"label": "leaf", "points": [[0, 9], [3, 9], [3, 10], [0, 10]], "shape_type": None},
        {"label": "nothing", "points": [[1, 1]], "shape_type": "point"},
        {"label": "nothing", "points": [[1, 1], [2, 2]], "shape_type": "line"},
        {"label": "__ignore__", "points": [[6, 0], [8, 2]], "shape_type": "rectangle"},
        {"label": "stem", "points": [[7, 7], [7.2, 7], [7.2, 7.2]], "shape_type": "polygon"},
    ]
    dataset, result = imported("labelme", write_labelme(tmp_path / "s", ("a", "b"), (), shapes))
    expected = np.zeros((10, 12), int)
    expected[0, :2] = expected[1:3, 9:11] = 1  # one instance in two parts
    expected[0, 4], expected[6:8, 4:6], expected[9, [8, 10]], expected[9, :3] = 2, 3, 4, 5
    truth = dataset.train.truth(0)
    assert np.array_equal(truth.segment_map, expected) and truth.areas.tolist() == [6, 1, 4, 2, 3]
    assert [dataset.taxonomy.names[k] for k in truth.labels] == [
        "leaf",
        "stem",
        "disc",
        "spot",
        "leaf",
    ] and dataset.taxonomy.names == ("disc", "leaf", "spot", "stem")
    assert (
        result["dropped"]
        == {
            "points and lines": 4,
            "shapes labelled __ignore__": 2,
            "instances without a pixel": 2,  # the small stem
        }
        and result["instances"]["leaf"] == 4
    )


def test_labelme_images_are_found_by_path_by_stem_or_in_the_json(tmp_path):
    root = tmp_path / "s"
    write_labelme(root / "json", ("a", "b", "c"), ())
    photo(root / "images" / "moved.png")
    photo(root / ".thumbnails" / "moved.png")
    photo(root / "__MACOSX" / "moved.png")
    (root / "json" / "a.png").unlink()
    rewrite(
        root / "json" / "a.json", lambda content: content.update(imagePath="..\\images\\moved.png")
    )
    rewrite(
        root / "json" / "b.json", lambda content: content.update(imagePath="/somewhere/else/x.png")
    )
    held = base64.b64encode((root / "json" / "c.png").read_bytes()).decode()
    (root / "json" / "c.png").rename(tmp_path / "c.png")
    rewrite(root / "json" / "c.json", lambda content: content.update(imageData=held))
    dataset, _ = imported("labelme", root)
    assert sorted(p.name for p in (tmp_path / "s-out" / "images").iterdir()) == [
        "images_moved.png",
        "json_b.png",
        "json_c.png",
    ]
    assert (tmp_path / "s-out" / "images" / "json_c.png").read_bytes() == (
        tmp_path / "c.png"
    ).read_bytes() and len(dataset.labeled) == 2


def test_labelme_images_may_be_in_a_json_that_names_itself_or_beside_it_by_another_name(tmp_path):
    root = write_labelme(tmp_path / "s", ("a", "b"), ("c", "other"))
    held = base64.b64encode((root / "a.png").read_bytes()).decode()
    (root / "a.png").unlink()
    rewrite(root / "a.json", lambda content: content.update(imagePath="a.json", imageData=held))
    (root / "b.json").rename(root / "z.json")
    rewrite(root / "z.json", lambda content: content.update(imagePath="C:\\pictures\\other.png"))
    dataset, result = imported("labelme", root)
    assert sorted(p.name for p in (tmp_path / "s-out" / "images").iterdir()) == [
        "a.png",
        "b.png",
        "c.png",
        "other.png",
    ]
    listed = (
        json.loads((tmp_path / "s-out" / "panoptic_train.json").read_text()),
        json.loads((tmp_path / "s-out" / "panoptic_val.json").read_text()),
    )
    assert {a["file_name"] for content in listed for a in content["annotations"]} == {
        "a.png",
        "other.png",
    } and result["unlabeled"] == 2


def test_labelme_rotated_rectangles_are_read_and_unknown_shapes_stop_nothing(tmp_path):
    diamond = [[4, 1], [7, 4], [4, 7], [1, 4]]  # area 18
    shapes = [
        {"label": "cat", "points": diamond, "shape_type": "oriented_rectangle"},
        {"label": "bolt", "points": [[8, 1], [11, 1], [11, 4]], "shape_type": "spline"},
        {"label": "dog", "points": [[8, 6], [11, 9]], "shape_type": "rectangle"},
    ]
    dataset, result = imported(
        "labelme", write_labelme(tmp_path / "s", ("a", "b"), (), shapes), background="lawn"
    )
    truth = dataset.train.truth(0)
    assert dataset.taxonomy.names == ("cat", "dog", "lawn") and truth.areas[:2].tolist() == [
        polygon(np.array(diamond, float), (10, 12))[2].sum(),
        9,
    ]
    assert (
        17 <= truth.areas[0] <= 19
        and (truth.segment_map[1:4, 8:11] == 0).all()
        and (truth.segment_map == 0).sum() == 9
    )
    assert (
        result["dropped"] == {"shapes of the unknown type 'spline'": 2}
        and "2 regions are void" in result["notes"][0]
    )


def test_what_is_ignored_or_has_no_mask_is_void_and_not_background(tmp_path):
    def square(label, x, y, side, **more):
        return {
            "label": label,
            "points": [[x, y], [x + side, y + side]],
            "shape_type": "rectangle",
            **more,
        }

    shapes = [
        square("cat", 10, 10, 20),
        square("__ignore__", 14, 14, 6),
        square("_background_", 22, 22, 4),
        square("__ignore__", 40, 0, 10),
        {"label": "nose", "points": [[12, 12]], "shape_type": "point"},
        {"label": "nose", "points": [[50, 50]], "shape_type": "point"},
        {"label": "wire", "points": [[0, 40], [20, 40]], "shape_type": "line"},
        {"label": "dog", "points": [[60, 5], [60.2, 5], [60.2, 5.2]]},
    ]
    root = write_labelme(tmp_path / "s", ("a", "b"), (), shapes, (64, 56))
    dataset, result = imported("labelme", root, background="lawn")
    truth, cat, lawn = dataset.train.truth(0), 1, 2
    ids = truth.segment_map
    assert [dataset.taxonomy.names[k] for k in truth.labels] == ["cat", "lawn"]
    assert (ids[14:20, 14:20] == 0).all() and (
        ids[0:10, 40:50] == 0
    ).all()  # ignored, on top of what is larger and beside it
    assert (ids[22:26, 22:26] == lawn).all() and ids[
        12, 12
    ] == cat  # labelled as background: a hole; a point on an object takes nothing from it
    assert ids[50, 50] == 0 and ids[40, 10] == 0 and ids[5, 60] == 0 and ids[30, 40] == lawn
    assert truth.areas[0] == 400 - 36 - 16
    assert result["dropped"] == {
        "shapes labelled __ignore__": 4,
        "shapes labelled _background_": 2,
        "points and lines": 6,
        "instances without a pixel": 2,  # the dog
    }
    assert any(
        note.startswith("12 regions are void, not measured, no object in training")
        for note in result["notes"]
    )


def test_coco_boxes_without_a_mask_and_ignored_objects_are_void(tmp_path):
    root = write_coco(tmp_path / "s")

    def edit(content):
        rows = content["annotations"]
        rows[0].update(
            segmentation=[], bbox=[0, 0, 6, 3]
        )  # the cat: only a box, over the dog's corner at no pixel
        rows[2].update(
            segmentation=None, bbox=[3, 3, 3, 3]
        )  # only a box, partly over the dog, which is larger
        rows[4].update(ignore=1)
        rows[5].update(
            segmentation=np.ravel(CORNERS["dog"]).tolist()
        )  # one polygon, not a list of them

    rewrite(root / "annotations.json", edit)
    dataset, result = imported("coco-instances", root, background="lawn", val_share=0.1)
    of = {
        images.name(i): images.truth(i).segment_map
        for images in (dataset.train, dataset.val)
        for i in range(images.annotated)
    }
    dog, box = scene_mask("dog"), np.zeros((10, 12), bool)
    box[3:6, 3:6] = True
    assert (
        (of["a.png"][:3, :6] == 0).all()
        and np.array_equal(of["a.png"] == 1, dog)
        and (of["a.png"] == 2).sum() == 120 - 18 - 20
    )
    assert (
        np.array_equal(of["b.png"] == 1, dog & ~box)
        and np.array_equal(of["b.png"] == 0, box)
        and of["b.png"][3, 3] == 0
    )
    assert (
        np.array_equal(of["c.png"] == 0, scene_mask("cat")) and (of["c.png"] == 1).sum() == 20 - 2
    )
    assert result["dropped"] == {"objects marked as to be ignored": 1, "boxes without a mask": 2}


def test_an_image_turned_by_exif_is_annotated_as_it_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    root = write_labelme(tmp_path / "s", ("a", "b"), ())
    for name in "ab":
        (root / f"{name}.png").unlink()
        Image.new("RGB", (10, 12)).save(
            root / f"{name}.jpg", exif=exif
        )  # stored 10 x 12, shown 12 x 10
    assert np.array_equal(imported("labelme", root)[0].train.truth(0).segment_map, scene_ids())
    for name in "ab":
        rewrite(
            root / f"{name}.json", lambda content: content.update(imageHeight=12, imageWidth=10)
        )
    import_refused("labelme", root, r"a.json: states an image of \(12, 10\), but it is \(10, 12\)")


def test_coco_keeps_crowd_ids_and_its_own_division(tmp_path):
    root = write_coco(tmp_path / "s")
    (root / "annotations.json").unlink()
    (root / "annotations").mkdir()
    whole = coco_content(long_runs)
    whole["annotations"][0]["iscrowd"] = 1
    whole["annotations"][3]["segmentation"] = []  # only a box
    for part, ids in (("train", (10, 11)), ("val", (12, 13))):
        rows = {
            "images": [i for i in whole["images"] if i["id"] in ids],
            "annotations": [a for a in whole["annotations"] if a["image_id"] in ids],
        }
        (root / "annotations" / f"instances_{part}2017.json").write_text(
            json.dumps({**whole, **rows})
        )
    (root / "annotations" / "captions_train2017.json").write_text("{}")
    (root / "val2017").mkdir()
    (root / "images" / "c.png").rename(root / "val2017" / "c.png")
    dataset, result = imported("coco-instances", root, val_share=0.9)
    assert (
        dataset.train.names.tolist() == ["a.png", "b.png"]
        and dataset.val.names.tolist() == ["c.png"]
        and not dataset.unlabeled
    )
    assert dataset.train.truth(0).crowd.tolist() == [True, False] and dataset.train.truth(
        1
    ).areas.tolist() == [16]
    assert result["dropped"] == {
        "boxes without a mask": 1,
        "validation images without annotation": 1,
    }
    assert [
        c["id"]
        for c in json.loads((tmp_path / "s-out" / "panoptic_val.json").read_text())["categories"]
    ] == [17, 3]


def write_layout(root, files, ids=(0, 1), before=()):
    """The JSON files of an export in COCO's format, by path -> file names that each lists; before:
    further categories."""
    for path, names in files.items():
        content = coco_content(lambda label: [np.ravel(CORNERS[label]).tolist()], names, ())
        content["categories"] = [
            *before,
            {"id": ids[0], "name": "cat", "supercategory": "pets"},
            {"id": ids[1], "name": "dog", "supercategory": "pets"},
        ]
        for place, a in enumerate(content["annotations"]):
            a["category_id"] = ids[place % 2]
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(content))
    return root


# JSON -> what it lists; where the pictures are; the names they get; numbers of labelled, unlabelled
# and validation images; what is left out.
LAYOUTS = {
    "roboflow": (
        {
            f"{part}/_annotations.coco.json": [f"{part}_{k}_png.rf.1.png" for k in range(2)]
            for part in ("train", "valid", "test")
        },
        [
            *(
                f"{part}/{part}_{k}_png.rf.1.png"
                for part in ("train", "valid", "test")
                for k in range(2)
            ),
            "train/bare.png",
        ],
        [
            "bare.png",
            "train_0_png.rf.1.png",
            "train_1_png.rf.1.png",
            "valid_0_png.rf.1.png",
            "valid_1_png.rf.1.png",
        ],
        (2, 1, 2),
        {"images of a test set": 2},
    ),
    "fiftyone": (
        {"labels.json": ["a.png", "in/b.png"]},
        ["data/a.png", "data/in/b.png", "data/bare.png"],
        ["a.png", "bare.png", "in_b.png"],
        (1, 1, 1),
        {},
    ),
    "label-studio": (
        {"result.json": ["images\\1f-a.png", "images\\2e-b.png"]},
        ["images/1f-a.png", "images/2e-b.png"],
        ["images_1f-a.png", "images_2e-b.png"],
        (1, 0, 1),
        {},
    ),
    "label-studio-path": (
        {"result.json": ["/data/upload/7/1f-a.png", "../../media/upload/7/2e-b.png"]},
        ["images/1f-a.png", "images/2e-b.png"],
        ["1f-a.png", "2e-b.png"],
        (1, 0, 1),
        {},
    ),
    "label-studio-url": (
        {"result.json": ["http://host/data/local-files/?d=x/a%20b.png", "s3://bucket/c.png"]},
        ["images/a b.png", "images/c.png"],
        ["a b.png", "c.png"],
        (1, 0, 1),
        {},
    ),
    "another-disk": (
        {"dataset.json": ["/home/bob/pictures/a.png", "C:\\pictures\\b.png"]},
        ["images/a.png", "images/b.png"],
        ["a.png", "b.png"],
        (1, 0, 1),
        {},
    ),
    "cvat": (
        {"annotations/instances_default.json": ["a.png", "b.png"]},
        ["images/default/a.png", "images/default/b.png"],
        ["a.png", "b.png"],
        (1, 0, 1),
        {},
    ),
    "cvat-subsets": (
        {
            f"annotations/instances_{part}.json": [f"{part[0]}.png"]
            for part in ("Train", "Validation")
        },
        [
            "images/Train/T.png",
            "images/Train/bare.png",
            "images/Validation/V.png",
            "images/Validation/bare2.png",
        ],
        ["T.png", "V.png", "bare.png"],
        (1, 1, 1),
        {"validation images without annotation": 1},
    ),
    "labelme2coco": (
        {"annotations.json": ["JPEGImages/a.png", "JPEGImages/b.png"]},
        [f"{folder}/{name}.png" for folder in ("JPEGImages", "Visualization") for name in "ab"],
        ["JPEGImages_a.png", "JPEGImages_b.png"],
        (1, 0, 1),
        {"pictures that no JSON lists": 2},
    ),
    "detection": (
        {f"annotations/{part}.json": [f"{part}.png"] for part in ("train", "val")},
        ["images/train/train.png", "images/val/val.png"],
        ["train.png", "val.png"],
        (1, 0, 1),
        {},
    ),
    "train-and-test": (
        {f"{part}/_annotations.coco.json": [f"{part}.png"] for part in ("train", "test")},
        ["train/train.png", "test/test.png"],
        ["test.png", "train.png"],
        (1, 0, 1),
        {},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exports_in_cocos_format_are_imported_as_they_are(layout, tmp_path):
    files, pictures, names, counts, left_out = LAYOUTS[layout]
    before = {
        "roboflow": ({"id": 5, "name": "pets", "supercategory": "none"},),
        "labelme2coco": ({"id": 7, "name": "_background_", "supercategory": None},),
    }.get(layout, ())
    root = write_layout(tmp_path / layout, files, before=before)
    for k, name in enumerate(pictures):
        photo(root / name, seed=k)
    dataset, result = imported("coco-instances", root, val_share=0.5)
    assert sorted(path.name for path in (tmp_path / f"{layout}-out" / "images").iterdir()) == names
    assert (result["labeled"], result["unlabeled"], result["val"]) == counts and result[
        "dropped"
    ] == left_out
    assert dataset.taxonomy.names == ("cat", "dog") and dataset.taxonomy.ids == (0, 1)
    assert np.array_equal(dataset.train.truth(0).segment_map, scene_ids()) and np.array_equal(
        dataset.val.truth(0).segment_map, scene_ids()
    )


def test_categories_of_files_are_joined_by_name_and_unused_ones_of_a_taken_name_are_left_out(
    tmp_path,
):
    root = write_layout(
        tmp_path / "s",
        {"train/_annotations.coco.json": ["a.png"]},
        (1, 2),
        ({"id": 0, "name": "cat", "supercategory": "none"},),
    )
    write_layout(
        root, {"valid/_annotations.coco.json": ["b.png"]}, (2, 1)
    )  # numbered the other way round
    photo(root / "train" / "a.png"), photo(root / "valid" / "b.png")
    dataset, result = imported("coco-instances", root)
    assert (
        dataset.taxonomy.names == ("cat", "dog")
        and dataset.taxonomy.ids == (1, 2)
        and dataset.val.truth(0).labels.tolist() == dataset.train.truth(0).labels.tolist() == [0, 1]
    )
    assert told(result) == [
        "category 0, 'cat', is left out: nothing uses it, and another has its name"
    ]
    rewrite(
        root / "train" / "_annotations.coco.json",
        lambda content: content["annotations"].append(
            {**content["annotations"][0], "category_id": 0}
        ),
    )
    import_refused(
        "coco-instances",
        root,
        r"category 1: the class 'cat' is called like the class 'cat'; rename one of them",
    )


def test_a_category_that_one_file_lacks_and_another_uses_is_said(tmp_path):
    root = write_layout(tmp_path / "s", {"train/_annotations.coco.json": ["a.png"]}, (1, 2))
    write_layout(root, {"valid/_annotations.coco.json": ["b.png"]}, (1, 2))
    photo(root / "train" / "a.png"), photo(root / "valid" / "b.png")

    def without_dog(content):
        content["categories"] = [c for c in content["categories"] if c["name"] != "dog"]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]

    rewrite(root / "valid" / "_annotations.coco.json", without_dog)
    _, result = imported("coco-instances", root, background="rest")
    assert told(result) == [
        "valid/_annotations.coco.json: has no category ['dog'], which others use; if such objects "
        "are in its images, they are not annotated, and its figures are wrong"
    ]


def test_names_that_differ_in_case_or_unicode_form_alone_are_found_and_said(tmp_path):
    names = ["IN/Ä.PNG", "b.png"]
    root = write_layout(tmp_path / "s", {"annotations.json": names})
    photo(root / "images" / "in" / "A\u0308.png"), photo(root / "images" / "b.png", seed=1)
    dataset, result = imported("coco-instances", root)
    assert told(result) == [
        "annotations.json: 1 images have names that differ from those of the files in case or "
        "Unicode form alone: 'IN/Ä.PNG' is A\u0308.png"
    ]
    assert len(dataset.train) == len(dataset.val) == 1
    photo(root / "images" / "In" / "ä.png")
    import_refused("coco-instances", root, "'IN/Ä.PNG' is .* as well as .*; put the folder into")


@pytest.mark.parametrize("kind", ["coco-instances", "yolo", "masks"])
def test_a_part_that_is_imported_alone_names_those_beside_it(kind, tmp_path):
    writer = {"coco-instances": write_coco, "yolo": write_yolo, "masks": write_masks}[kind]
    root = writer(tmp_path / "train")
    (tmp_path / "valid").mkdir()
    _, result = imported(kind, root)
    note = f"{root} alone is read, not valid beside it; --input {tmp_path} reads all of them"
    assert note in result["notes"]


def test_the_dialects_of_via_are_read(tmp_path):
    root = write_coco(tmp_path / "2")

    def via_2(content):
        for a in content["annotations"]:
            a["image_id"] = str(a["image_id"])

    rewrite(root / "annotations.json", via_2)
    dataset, result = imported("coco-instances", root)
    assert result["labeled"] == 2 and np.array_equal(
        dataset.train.truth(0).segment_map, scene_ids()
    )
    root = write_coco(tmp_path / "3")
    rewrite(
        root / "annotations.json",
        lambda content: [image.update(width=-1, height=-1) for image in content["images"]] and None,
    )
    assert imported("coco-instances", root)[1]["labeled"] == 2


def test_a_folder_of_validation_images_whose_json_is_not_there_is_said(tmp_path):
    root = write_layout(tmp_path / "s", {"train/_annotations.coco.json": ["a.png", "b.png"]})
    for name in ("train/a.png", "train/b.png", "valid/c.png"):
        photo(root / name)
    _, result = imported("coco-instances", root)
    assert any(
        note.startswith("valid holds pictures for validation, but no JSON lists them")
        for note in result["notes"]
    )


def test_what_a_background_is_not_is_said(tmp_path):
    root = write_coco(tmp_path / "s")
    _, result = imported("coco-instances", root, background="Cat")
    assert any(note.startswith("'cat', 'Cat': classes whose names") for note in result["notes"])
    everything = write_masks(tmp_path / "all")
    for path in everything.glob("masks/cat/*.png"):
        Image.fromarray(np.full((10, 12), 7, np.uint8)).save(path)
    _, result = imported("masks", everything, background="ground")
    assert any(note.startswith("--background ground: no pixel") for note in result["notes"])


def test_names_of_classes_are_readable_in_notes(tmp_path):
    root = write_coco(tmp_path / "s")
    names = {"cat": "道路", "dog": "fenêtre"}

    def renamed(content):
        for category in content["categories"]:
            category["name"] = names[category["name"]]
        for a in content["annotations"]:
            a["iscrowd"] = int(a["category_id"] == 17)

    rewrite(root / "annotations.json", renamed)
    notes = imported("coco-instances", root)[1]["notes"]
    assert any("nothing else is there of ['道路']" in note for note in notes), notes


def test_a_file_or_a_folder_too_deep_is_answered_with_the_folder_that_was_meant(tmp_path):
    root = write_coco(tmp_path / "coco")
    import_refused("coco-instances", root / "annotations.json", f"is a file; .*its folder, {root}$")
    import_refused("coco-instances", root / "images", rf"did you mean --input {root}\?")
    (root / "annotations").mkdir()
    (root / "annotations.json").rename(root / "annotations" / "instances_train.json")
    import_refused("coco-instances", root / "annotations", rf"did you mean --input {root}\? Else")
    root = write_yolo(tmp_path / "yolo")
    for place in (root / "train", root / "train" / "images"):
        import_refused("yolo", place, rf"did you mean --input {root}\?")


def test_a_list_of_classes_that_lies_with_maps_of_instances_is_said(tmp_path):
    root = write_instance_maps(tmp_path / "s")
    (root / "classes.txt").write_text("cat\ndog\n")
    _, result = imported("masks", root, masks_are="instances")
    assert any("classes.txt is not read: values are objects" in note for note in result["notes"])


def test_pictures_that_no_json_lists_are_unlabelled_images_where_listed_ones_lie(tmp_path):
    root = write_coco(tmp_path / "s")
    for name in (
        "images/more.png",
        "images/deeper/x.png",
        "images/masks/a.png",
        "unlabeled/u.png",
        "maps/a.png",
        "images/._a.png",
    ):
        photo(root / name)
    dataset, result = imported("coco-instances", root)
    assert [dataset.train.name(i) for i in dataset.unlabeled] == [
        "d.png",
        "deeper_x.png",
        "more.png",
        "unlabeled_u.png",
    ]
    assert (
        result["dropped"] == {"pictures that no JSON lists": 2}
        and "left out are the pictures in images/masks, maps: no JSON lists one there"
        in result["notes"][0]
    )


def test_one_file_under_two_ids_and_two_files_of_one_name(tmp_path):
    root = write_coco(tmp_path / "ids")

    def twice(content):
        content["images"][1]["file_name"] = "a.png"  # b's dog and cat are a's as well
        content["annotations"] = [
            a
            for a in content["annotations"]
            if (a["image_id"], a["category_id"]) not in ((10, 3), (11, 17))
        ]

    rewrite(root / "annotations.json", twice)
    dataset, result = imported("coco-instances", root)
    assert (
        result["dropped"] == {"entries of images that are listed twice (joined)": 1}
        and result["unlabeled"] == 2
    )  # b.png, d.png
    truth = {
        images.name(i): images.truth(i).segment_map
        for images in (dataset.train, dataset.val)
        for i in range(images.annotated)
    }
    assert sorted(truth) == ["a.png", "c.png"] and np.array_equal(truth["a.png"], scene_ids())
    root = write_layout(
        tmp_path / "names",
        {f"annotations/instances_{part}2017.json": ["00.png"] for part in ("train", "val")},
    )
    photo(root / "train2017" / "00.png", seed=1), photo(root / "val2017" / "00.png", seed=2)
    dataset, result = imported("coco-instances", root)
    assert (dataset.train.names.tolist(), dataset.val.names.tolist()) == (
        ["train2017_00.png"],
        ["val2017_00.png"],
    )
    assert (tmp_path / "names-out" / "images" / "val2017_00.png").samefile(
        root / "val2017" / "00.png"
    ) and "2 images share their names" in result["notes"][0]
    (root / "annotations" / "instances_val2017.json").unlink()
    import_refused(
        "coco-instances",
        root,
        r"'00.png' is .*train2017/00.png as well as .*val2017/00.png; put the folder into",
    )


def test_an_image_of_the_training_and_the_validation_file_is_for_validation_alone(tmp_path):
    files = {"annotations/train.json": ["a.png", "b.png"], "annotations/val.json": ["b.png"]}
    root = write_layout(tmp_path / "s", files)
    for name in "abc":
        photo(root / "images" / f"{name}.png")
    dataset, result = imported("coco-instances", root)
    assert (dataset.train.names.tolist(), dataset.val.names.tolist()) == (
        ["a.png", "c.png"],
        ["b.png"],
    )
    assert result["dropped"] == {"entries of train.json whose image val has, too": 1}


def test_images_that_differ_by_their_endings_or_folders_alone_get_names_of_their_own(tmp_path):
    root = write_labelme(tmp_path / "s")
    (
        photo(root / "d.jpg", seed=8),
        photo(root / "x" / "d.png", seed=9),
        photo(root / "x_d.png", seed=10),
    )
    dataset, result = imported("labelme", root)
    assert [dataset.train.name(i) for i in dataset.unlabeled] == [
        "d.jpg",
        "d_png.png",
        "x_d.png",
        "x_d_png.png",
    ]
    assert (tmp_path / "s-out" / "images" / "d_png.png").samefile(
        root / "d.png"
    ) and "2 images are renamed" in result["notes"][0]


def test_linked_folders_are_followed_and_said_but_a_linked_file_may_not_lead_out(tmp_path):
    root, elsewhere = write_masks(tmp_path / "s"), tmp_path / "elsewhere"
    (root / "masks" / "dog").rename(elsewhere)
    (root / "masks" / "dog").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(elsewhere)  # a loop
    dataset, result = imported("masks", root)
    assert np.array_equal(dataset.train.truth(0).segment_map, scene_ids()) and told(result) == [
        f"1 linked folders are followed: masks/dog -> {elsewhere}"
    ]
    (elsewhere / "a.png").rename(elsewhere / "a")
    (elsewhere / "a.png").symlink_to(elsewhere / "a")  # inside of the linked folder
    importer.import_folder("masks", root, tmp_path / "two")
    shutil.copy(elsewhere / "a", tmp_path / "out.png")
    (elsewhere / "a.png").unlink()
    (elsewhere / "a.png").symlink_to(tmp_path / "out.png")
    import_refused(
        "masks", root, r"dog/a.png: is a link that leads out of the source, to .*out.png"
    )
    for kind, write in (
        ("labelme", write_labelme),
        ("coco-instances", write_coco),
        ("cityscapes", write_cityscapes),
    ):
        source = write(tmp_path / kind)
        folder = {
            "labelme": source / "day",
            "coco-instances": source / "images",
            "cityscapes": source / "leftImg8bit",
        }[kind]
        if kind == "labelme":
            write_labelme(folder)
        folder.rename(tmp_path / f"{kind}-there")
        folder.symlink_to(tmp_path / f"{kind}-there")
        assert imported(kind, source)[1]["labeled"] == {"labelme": 5}.get(kind, 2)


def test_stuff_is_one_segment_of_its_class_and_is_no_crowd(tmp_path):
    shapes = [
        {"label": label, "points": [[x, 2], [x + 2, 4]], "shape_type": "rectangle"}
        for label, x in (("road", 0), ("cat", 3), ("road", 6), ("cat", 9))
    ]
    root = write_labelme(tmp_path / "s", ("a", "b"), (), shapes)
    dataset, result = imported("labelme", root, stuff="road", background="lawn")
    truth = dataset.train.truth(0)
    assert [
        (dataset.taxonomy.names[k], area) for k, area in zip(truth.labels, truth.areas.tolist())
    ] == [("road", 8), ("cat", 4), ("cat", 4), ("lawn", 104)]
    assert dict(zip(dataset.taxonomy.names, dataset.taxonomy.things)) == {
        "cat": True,
        "road": False,
        "lawn": False,
    }
    assert (truth.segment_map[2:4, [0, 1, 6, 7]] == 1).all() and result["instances"] == {
        "cat": 4,
        "road": 2,
        "lawn": 2,
    }
    import_refused(
        "labelme", root, r"--stuff rod: no such class; available: cat, road", stuff="road,rod"
    )
    city = write_cityscapes(tmp_path / "city")
    dataset, _ = imported("cityscapes", city, stuff="person")
    assert not dataset.taxonomy.things[dataset.taxonomy.names.index("person")]
    coco = write_coco(tmp_path / "coco" / "s")
    rewrite(
        coco / "annotations.json",
        lambda content: [a.update(iscrowd=1) for a in content["annotations"]] and None,
    )
    import_refused(
        "coco-instances",
        coco,
        r"all 6 instances are crowd .*so if these are single objects, set it to 0: sed .*--stuff",
    )
    dataset, _ = imported("coco-instances", coco, stuff="cat, dog")  # all of it is stuff
    assert not any(dataset.taxonomy.things) and not dataset.train.truth(0).crowd.any()
    rewrite(coco / "annotations.json", lambda content: content["annotations"][0].update(iscrowd=0))
    result = importer.import_folder("coco-instances", coco, tmp_path / "some")
    assert told(result) == [
        "5 of 6 instances are crowd, not measured, no object in training; nothing else is there of "
        "['dog'], so if these are single objects, set it to 0: sed -i "
        """'s/"iscrowd": *1/"iscrowd": 0/g' FILE.json"""
    ]


def test_cityscapes_has_stuff_groups_and_void(tmp_path):
    values = np.zeros((10, 12), int)
    values[:3], values[3:5, :6], values[3:5, 6:], values[6, :4], values[7, :4] = (
        23,
        26_003,
        26,
        29_001,
        7,
    )
    values[8, :2], values[9, :2], values[9, 5], values[9, 6] = (
        7,
        65_535,
        9,
        7_001,
    )  # stuff has no instances: void
    dataset, result = imported("cityscapes", write_cityscapes(tmp_path / "s", values))
    truth = dataset.train.truth(0)
    names = [dataset.taxonomy.names[k] for k in truth.labels]
    assert sorted(zip(names, truth.areas.tolist(), truth.crowd.tolist())) == [
        ("car", 12, False),
        ("car", 12, True),
        ("road", 6, False),
        ("sky", 36, False),
    ]
    assert (
        (truth.segment_map > 0).sum() == 66
        and len(dataset.taxonomy) == 19
        and sum(dataset.taxonomy.things) == 8
    )
    assert (
        dataset.taxonomy.colours[dataset.taxonomy.names.index("car")] == (0, 0, 142)
        and result["instances"]["truck"] == 0
    )
    assert (
        dataset.train.names.tolist()[2:]
        == ["trier_000000_000019_leftImg8bit.png"]
        == [dataset.train.name(i) for i in dataset.unlabeled]
    )
    import_refused(
        "cityscapes",
        tmp_path / "s",
        "--background: Cityscapes has stuff of its own",
        background="rest",
    )


def test_masks_may_have_16_bits_a_palette_or_one_class(tmp_path):
    assert np.array_equal(
        imported("masks", write_masks(tmp_path / "deep", 40_000))[0].train.truth(0).segment_map,
        scene_ids(),
    )
    root = write_masks(tmp_path / "flat")
    shutil.rmtree(root / "masks")
    (root / "masks").mkdir()
    for name in "abc":
        image = Image.fromarray(np.array([0, 3, 200], np.uint8)[scene_ids()])
        image.putpalette([0] * 768)  # every colour is black: only the indices tell
        image.save(root / "masks" / f"{name}.png")
    photo(root / "images" / "deeper" / "x.png")
    dataset, result = imported("masks", root, masks_are="instances")
    assert (
        result["dropped"] == {"images in folders of images/": 1}
        and dataset.taxonomy.names == ("object",)
        and np.array_equal(dataset.train.truth(0).segment_map, scene_ids())
        and len(dataset.unlabeled) == 1
    )


def masks_scene(root, form, array, names="abc", **more):
    """images/a.png to d.png, and an array as the mask of some of them, at masks/`form`."""
    for k, name in enumerate("abcd"):
        photo(root / "images" / f"{name}.png", seed=k)
    for name in names:
        path = root / "masks" / form.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, array)
        else:
            image = Image.fromarray(array)
            if "palette" in more:
                image.putpalette(more["palette"])
            image.save(path, **{key: value for key, value in more.items() if key != "palette"})
    return root


def two_squares():
    squares = np.zeros((10, 12), np.uint8)
    squares[1:4, 1:4] = squares[6:9, 6:10] = 255
    return squares


def test_a_map_of_classes_is_read_with_its_names_and_is_never_guessed_to_be_instances(tmp_path):
    ids = np.zeros((10, 12), np.uint8)
    ids[:3], ids[3], ids[5:8, :3], ids[5:8, 6:9] = 15, 255, 3, 3
    palette = [*[0] * 765, 224, 224, 192]  # of 255, as in Pascal VOC
    voc = masks_scene(tmp_path / "voc", "{}.png", ids, palette=palette)
    ade = masks_scene(tmp_path / "ade", "{}.png", np.where(ids == 255, 0, ids).astype(np.uint8))
    for root in (voc, ade):
        import_refused(
            "masks",
            root,
            r"may be classes or instances .*say --masks-are classes, with --classes NAME,NAME",
        )
    import_refused(
        "masks", voc, r"nothing says what the values mean; expected --classes", masks_are="classes"
    )
    import_refused(
        "masks", voc, r"has the value 3, which has no name", masks_are="classes", classes="15:sky"
    )
    dataset, result = imported(
        "masks", voc, masks_are="classes", classes="3:cat,15:sky", background="lawn"
    )
    expected = np.select([ids == 3, ids == 15, ids == 255], [1, 2, 0], 3)
    assert (
        np.array_equal(dataset.train.truth(0).segment_map, expected)
        and dataset.taxonomy.names == ("cat", "sky", "lawn")
        and not any(dataset.taxonomy.things)
    )
    assert (
        dataset.taxonomy.ids == (3, 15, 16)
        and "classes without --stuff: each is stuff, one segment an image" in result["notes"]
    )
    result = importer.import_folder(
        "masks", voc, tmp_path / "things", masks_are="classes", classes="3:cat,15:sky", stuff="sky"
    )
    assert result["instances"] == {"cat": 6, "sky": 3}  # each connected region
    names = "".join(f"c{k}\n" for k in range(1, 16))
    (ade / "classes.txt").write_text(names)
    import_refused("masks", ade, r"a.png: 55% of its pixels are 0, .*write 0:c1,1:c2,.*background")
    (ade / "classes.txt").write_text("".join(f"{k}:c{k}\n" for k in range(1, 16)))
    result = importer.import_folder("masks", ade, tmp_path / "listed")
    assert (
        result["instances"]["c3"] == result["instances"]["c15"] == 3
        and "masks: taken as maps of classes, since " in result["notes"][0]
    )
    (ade / "classes.txt").write_text("background\n" + names)
    assert importer.import_folder("masks", ade, tmp_path / "from-zero")["instances"]["c3"] == 3
    result = importer.import_folder("masks", voc, tmp_path / "instances", masks_are="instances")
    assert result["instances"] == {"object": 6} and any(
        "3 regions are void" in note for note in result["notes"]
    )  # 255 of this palette is void
    zero = masks_scene(tmp_path / "zero", "{}.png", (ids == 3).astype(np.uint8))
    assert importer.import_folder(
        "masks", zero, tmp_path / "zero-named", masks_are="classes", classes="0:road,1:cat"
    )["instances"] == {"road": 3, "cat": 3}


def test_binary_masks_are_guessed_and_said_and_grey_edges_become_no_instances(tmp_path):
    hard = masks_scene(tmp_path / "hard", "disc/{}.png", two_squares())
    dataset, result = imported("masks", hard)
    assert (
        dataset.train.truth(0).areas.tolist() == [9, 12]
        and "masks/disc: taken as binary masks, each connected region an instance"
        in result["notes"][0]
    )
    assert importer.import_folder("masks", hard, tmp_path / "one", masks_are="instances")[
        "instances"
    ] == {"disc": 3}
    assert importer.import_folder("masks", hard, tmp_path / "stuff", stuff="disc")["instances"] == {
        "disc": 3
    }
    for steps in (4, 255):  # of a supersampled edge, and of a smooth one
        grey = np.zeros((10, 12))
        grey[2:8, 2:8] = 255
        grey[2] = grey[2] * np.linspace(
            0.2, 0.8, 12
        )  # the upper edge: half of white is between the columns 5 and 6
        soft = (np.round(grey / 255 * steps) / steps * 255).astype(np.uint8)
        dataset, result = imported(
            "masks", masks_scene(tmp_path / f"soft{steps}", "disc/{}.png", soft)
        )
        assert (
            dataset.train.truth(0).areas.tolist() == [(soft >= 128).sum()]
            and "3 of 3 masks have grey levels between black and white" in result["notes"][0]
        )
    jpeg = masks_scene(tmp_path / "jpeg", "disc/{}.jpg", two_squares(), quality=60)
    dataset, result = imported("masks", jpeg)
    assert dataset.train.truth(0).areas.tolist() == [9, 12] and "grey levels" in result["notes"][0]
    import_refused(
        "masks",
        jpeg,
        r"disc/a.jpg: JPEG keeps no exact values; .*, or say --masks-are binary",
        masks_are="instances",
    )
    result = importer.import_folder(
        "masks",
        masks_scene(
            tmp_path / "grey", "disc/{}.png", np.where(two_squares(), 15, 0).astype(np.uint8)
        ),
        tmp_path / "weak",
        masks_are="binary",
    )
    assert result["instances"] == {"disc": 6}


@pytest.mark.parametrize(
    "form", ["disc/{}/one.png", "{}/one.png", "disc/{}_1.png", "{}_1.png", "disc/{}-mask-1.png"]
)
def test_one_file_may_be_one_instance(form, tmp_path):
    root, label = tmp_path / "s", "disc" if form.startswith("disc") else "object"
    first, second = two_squares(), two_squares()
    first[5:], second[:5] = 0, 0
    masks_scene(root, form, first)
    masks_scene(root, form.replace("1", "2").replace("one", "two"), second)
    dataset, result = imported("masks", root)
    assert (
        dataset.train.truth(0).areas.tolist() == [9, 12]
        and result["instances"] == {label: 6}
        and "6 files are taken for one instance each" in result["notes"][0]
    )
    masks_scene(root, "disc/{}.png", two_squares(), "d")  # now a folder of maps as well
    if form == "disc/{}_1.png":
        import_refused("masks", root, r"disc/a_1.png: expected masks/CLASS/NAME.png, and an image")


@pytest.mark.parametrize(
    "lines, areas",
    [
        (["0 background", "1 road", "2 car"], {"road": 10, "car": 12, "lawn": 98}),
        (["0, background", "1, road", "2, car"], {"road": 10, "car": 12, "lawn": 98}),
        (["1\troad", "2\tcar"], {"road": 10, "car": 12, "lawn": 98}),
        (["unlabeled", "road", "car"], {"road": 10, "car": 12}),
        (["void", "road", "car"], {"road": 10, "car": 12}),
        (["background", "2 wheeler", "car"], {"2 wheeler": 10, "car": 12, "lawn": 98}),
        (["1:road", "2:void"], {"road": 10, "lawn": 98}),
        (["1:road", "2:Unlabelled", "0:ignore"], {"road": 10}),
    ],
)
def test_a_list_of_classes_may_have_numbers_or_begin_with_what_is_none(lines, areas, tmp_path):
    ids = np.zeros((10, 12), np.uint8)
    ids[:, 11], ids[0, :11], ids[1, 0] = 1, 2, 2
    root = masks_scene(tmp_path / "s", "{}.png", ids)
    (root / "classes.txt").write_text("\n".join(lines))
    dataset, _ = imported("masks", root, background="lawn")
    truth = dataset.train.truth(0)
    names = [dataset.taxonomy.names[k] for k in truth.labels]
    assert dict(zip(names, truth.areas.tolist())) == areas


def test_values_that_are_taken_for_instances_of_a_class_are_said(tmp_path):
    ids = np.where(two_squares(), scene_ids() + 1, 0).astype(np.uint8)
    ids[6:9] = np.where(ids[6:9], 255, 0)
    _, result = imported("masks", masks_scene(tmp_path / "s", "disc/{}.png", ids))
    assert "masks/disc: every value is taken for an instance" in " ".join(result["notes"])


def test_polygons_in_shares_of_the_image_are_refused(tmp_path):
    def shares(content):
        for a in content["annotations"]:
            a["segmentation"] = [[0.1, 0.1, 0.5, 0.1, 0.5, 1]]

    root = SCENES["coco-instances"](tmp_path / "s")
    rewrite(root / "annotations.json", shares)
    import_refused("coco-instances", root, r"no point of a polygon is above 1, .*expected pixels")


def test_masks_of_what_is_no_class_are_void_or_background(tmp_path):
    squares, one = two_squares(), np.zeros((10, 12), np.uint8)
    one[:, 11] = 255
    for name in ("__ignore__", "_background_"):
        root = masks_scene(tmp_path / name, "disc/{}.png", squares)
        masks_scene(root, name + "/{}.png", one)
        dataset, _ = imported("masks", root, background="lawn")
        truth = dataset.train.truth(0)
        void = 10 if name == "__ignore__" else 0
        assert dataset.taxonomy.names == ("disc", "lawn")
        assert truth.areas.tolist() == [9, 12, 120 - 9 - 12 - void]


@pytest.mark.parametrize("white", [1, 2, 128, 200, 255, 65535])
def test_the_one_value_of_a_class_is_white_whatever_its_number(white, tmp_path):
    kind = np.uint16 if white > 255 else np.uint8
    squares = np.where(two_squares(), white, 0).astype(kind)
    dataset, result = imported("masks", masks_scene(tmp_path / "s", "disc/{}.png", squares))
    assert dataset.train.truth(0).areas.tolist() == [9, 12]
    assert "masks/disc: taken as binary masks" in result["notes"][0]
    if white in (1, 255, 65535):
        flat = masks_scene(tmp_path / "flat", "{}.png", squares)
        assert importer.import_folder("masks", flat, tmp_path / "o")["instances"] == {"object": 6}


def test_binary_masks_may_have_a_palette_with_white_first_or_an_alpha_channel(tmp_path):
    squares = two_squares()
    inverse = np.where(squares, 0, 1).astype(np.uint8)
    palette = [255, 255, 255, 0, 0, 0]  # index 0 is white
    root = masks_scene(tmp_path / "palette", "disc/{}.png", inverse, palette=palette)
    assert imported("masks", root)[0].train.truth(0).areas.tolist() == [9, 12]
    opaque = np.full_like(squares, 255)
    for layers in ((squares,) * 3, (squares,)):
        array = np.dstack([*layers, opaque])
        root = masks_scene(tmp_path / f"alpha{len(layers)}", "disc/{}.png", array)
        assert imported("masks", root)[0].train.truth(0).areas.tolist() == [9, 12]
    clear = np.dstack([opaque, opaque, opaque, squares])
    root = masks_scene(tmp_path / "clear", "disc/{}.png", clear)
    import_refused("masks", root, r"expected a map of whole numbers with one channel")


@pytest.mark.parametrize(
    "form, kind",
    [
        ("cat/{}.tif", np.uint16),
        ("cat/{}.tif", np.int32),
        ("cat/{}.tif", np.float32),
        ("cat/{}.npy", np.int64),
        ("cat/{}_mask.png", np.uint8),
        ("cat/{}.png.png", np.uint8),
    ],
)
def test_maps_of_instances_may_be_tiff_or_arrays_with_many_bits(form, kind, tmp_path):
    ids = scene_ids() * (1 if kind == np.uint8 else 300)
    dataset, _ = imported("masks", masks_scene(tmp_path / "s", form, ids.astype(kind)))
    assert np.array_equal(dataset.train.truth(0).segment_map, scene_ids())
    if kind == np.float32:
        masks_scene(tmp_path / "s", form, ids.astype(kind) + np.float32(0.5))
        import_refused(
            "masks",
            tmp_path / "s",
            r"cat/a.tif: float32 of shape \(10, 12\), expected a map of whole numbers",
        )


def test_masks_may_be_divided_into_training_and_validation(tmp_path):
    root = tmp_path / "s"
    for part in ("train", "val"):
        photo(root / "images" / part / "0.png")
        (root / "masks" / part / "cat").mkdir(parents=True)
        Image.fromarray(scene_mask("cat").astype(np.uint8)).save(
            root / "masks" / part / "cat" / "0.png"
        )
    dataset, _ = imported("masks", root)
    assert (dataset.train.names.tolist(), dataset.val.names.tolist()) == (
        ["images_train_0.png"],
        ["images_val_0.png"],
    )
    assert dataset.train.truth(0).areas.tolist() == [16]


@pytest.mark.parametrize("kind", ["labelme", "coco-instances", "masks"])
def test_other_pixels_are_one_segment_of_the_named_background(kind, tmp_path):
    dataset, _ = imported(kind, SCENES[kind](tmp_path / "s"), background="lawn")
    truth, k = dataset.train.truth(0), dataset.taxonomy.names.index("lawn")
    assert (
        truth.areas.tolist() == [16, 18, 120 - 34]
        and truth.labels[2] == k
        and not dataset.taxonomy.things[k]
    )
    assert dataset.taxonomy.ids[k] == 1 + max(
        i for i in dataset.taxonomy.ids if i != dataset.taxonomy.ids[k]
    ) and np.array_equal(truth.segment_map, np.where(scene_ids() == 0, 3, scene_ids()))


def test_of_two_segments_the_smaller_is_on_top_and_what_is_hidden_is_counted(tmp_path):
    def square(label, left, top, side):
        return {
            "label": label,
            "points": [[left, top], [left + side, top + side]],
            "shape_type": "rectangle",
        }

    for name, order in (("one", 1), ("two", -1)):
        shapes = [
            square("big", 0, 0, 8),
            square("small", 2, 2, 3),
            square("hidden", 2, 2, 4),
            square("cover", 4, 2, 2),
            square("cover", 2, 4, 2),
            square("cover", 4, 4, 2),
            square("top", 2, 2, 2),
        ][::order]
        dataset, result = imported(
            "labelme", write_labelme(tmp_path / name, ("a", "b"), (), shapes)
        )
        truth = dataset.train.truth(0)
        areas = {dataset.taxonomy.names[k]: area for k, area in zip(truth.labels, truth.areas)}
        assert (
            sorted(truth.areas.tolist()) == [4, 4, 4, 4, 48]
            and areas["big"] == 48
            and areas["top"] == 4
            and "hidden" not in areas
            and "small" not in areas
        )
        assert (
            result["dropped"] == {"instances hidden below others": 4}
            and np.bincount(truth.segment_map.ravel())[1:].tolist() == truth.areas.tolist()
        )


def test_the_share_for_validation_is_drawn_by_seed(tmp_path):
    root = write_labelme(tmp_path / "s", [f"{k:02}" for k in range(10)])

    def chosen(name, **flags):
        return (
            importer.import_folder("labelme", root, tmp_path / name, **flags),
            json.loads((tmp_path / name / "panoptic_val.json").read_text()),
        )

    sets = {
        name: {i["file_name"] for i in chosen(name, val_share=0.3, seed=seed)[1]["images"]}
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    }
    assert sets["a"] == sets["b"] != sets["c"] and len(sets["a"]) == 3
    assert sets["a"] == {f"{k:02}.png" for k in np.random.default_rng(0).permutation(10)[:3]}
    assert (
        chosen("least", val_share=0.001)[0]["val"] == 1
        and chosen("most", val_share=0.999)[0]["labeled"] == 1
    )


def edit_json(name, change):
    return lambda root: rewrite(root / name, change)


def edit_shape(**fields):
    return edit_json("b.json", lambda content: content["shapes"][1].update(fields))


def edit_annotation(**fields):
    return edit_json("annotations.json", lambda content: content["annotations"][1].update(fields))


IMPORT_FAULTS = [
    (
        "labelme",
        lambda root: (root / "b.json").write_text("{"),
        r"b.json: not a readable JSON file",
    ),
    (
        "labelme",
        lambda root: (root / "b.json").write_text("[" * 100_000),
        r"b.json: not a readable JSON file",
    ),
    ("labelme", lambda root: (root / "z.json").write_text("[1]"), r"z.json: has no list `shapes`"),
    (
        "labelme",
        lambda root: [path.unlink() for path in root.glob("*.json")],
        r"no \*.json in this folder",
    ),
    (
        "labelme",
        lambda root: [(root / f"{name}.json").unlink() for name in "ab"],
        r"s: 1 images with a segment; expected at least 2",
    ),
    (
        "labelme",
        lambda root: [
            rewrite(path, lambda content: content.update(shapes=[])) for path in root.glob("*.json")
        ],
        r"not one instance with a pixel",
    ),
    (
        "labelme",
        edit_shape(points=[[1, 1], [float("nan"), 2], [3, 3]]),
        r"b.json: shapes\[1\]: points .*expected pairs of numbers",
    ),
    ("labelme", edit_shape(points=[[1, 1], [1e9, 2], [3, 3]]), r"shapes\[1\]: points .*12 x 10"),
    ("labelme", edit_shape(points=[[1, 1], [1], [3, 3]]), r"shapes\[1\]: points"),
    ("labelme", edit_shape(points={"x": 1}), r"shapes\[1\]: points"),
    ("labelme", edit_shape(shape_type=[]), r"shapes\[1\]"),
    ("labelme", edit_shape(shape_type={"a": 1}), r"shapes\[1\] has shape_type"),
    ("labelme", edit_shape(shape_type="circle"), r"shapes\[1\]: a circle of 4 points, expected 2"),
    (
        "labelme",
        edit_shape(shape_type="mask", points=[[0, 0], [1, 1]], mask="no"),
        r"shapes\[1\]: its mask 'no' is no PNG",
    ),
    ("labelme", edit_shape(label=None), r"shapes\[1\] is .*expected an object with label"),
    ("labelme", edit_shape(label=" , x"), r"shapes\[1\]: ' , x' cannot be the name of a class"),
    ("labelme", edit_shape(label="cat, kitten"), r"'cat, kitten' is called like the class 'cat'"),
    ("labelme", edit_shape(label="rest"), r"'rest' is called like the background"),
    ("labelme", edit_shape(group_id=[1]), r"shapes\[1\] is "),
    (
        "labelme",
        edit_json("b.json", lambda content: content["shapes"].append(3)),
        r"shapes\[2\] is 3",
    ),
    (
        "labelme",
        edit_json("b.json", lambda content: content.update(imageWidth=13)),
        r"b.json: states an image of \(10, 13\), but it is \(10, 12\)",
    ),
    (
        "labelme",
        edit_json("b.json", lambda content: content.update(imagePath="a.png")),
        r"b.json: its image 'a.png' has another JSON already",
    ),
    (
        "labelme",
        lambda root: (root / "b.png").unlink(),
        r"b.json: imagePath 'b.png' is not there, no image is called b and imageData is empty",
    ),
    (
        "labelme",
        lambda root: [
            (root / "b.png").unlink(),
            rewrite(root / "b.json", lambda content: content.update(imagePath="../b.png")),
        ],
        r"b.json: .*leads out of its folder",
    ),
    (
        "labelme",
        lambda root: [
            (root / "b.png").unlink(),
            rewrite(root / "b.json", lambda content: content.update(imageData="bm8=")),
        ],
        r"imageData is no image",
    ),
    ("labelme", lambda root: (root / "d.png").write_bytes(b"no"), r"d.png: not a readable image"),
    (
        "labelme",
        lambda root: [
            photo(root / "b.jpg"),
            rewrite(root / "b.json", lambda content: content.update(imagePath="gone.png")),
        ],
        r"b.json: imagePath 'gone.png' is not there, and b.jpg and b.png have the stem of this JSON",
    ),
    (
        "labelme",
        lambda root: [
            (root / "d.png").rename(root.parent / "d.png"),
            (root / "d.png").symlink_to(root.parent / "d.png"),
        ],
        r"d.png: is a link that leads out of the source, to .*d.png; expected a file",
    ),
    ("labelme", lambda root: photo(root / f"{'n' * 240}.png"), r"rename the image"),
    (
        "coco-instances",
        lambda root: (root / "annotations.json").write_text("{}"),
        r"annotations.json: key 'images' is missing",
    ),
    (
        "coco-instances",
        lambda root: (root / "other.json").write_text("{}"),
        r"s: .*annotations.json.*expected instances_train\*.json",
    ),
    (
        "coco-instances",
        lambda root: (root / "images" / "b.png").unlink(),
        r"images/b.png: no such file, nor in .*train2017, .*val2017, ",
    ),
    (
        "coco-instances",
        edit_json(
            "annotations.json", lambda content: content["images"][1].update(file_name="../b.png")
        ),
        r"image 11: file_name '../b.png' leads out",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["images"][1].update(file_name=5)),
        r"image 11: file_name 5 is not a file name",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["images"][1].update(id=10)),
        r"has the id of another image",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["images"].append([])),
        r"images\[4\] is \[\]",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["images"][1].update(height=12)),
        r"states \(12, 12\) for image b.png, but it is \(10, 12\)",
    ),
    (
        "coco-instances",
        edit_annotation(image_id=77),
        r"annotations\[1\] is of image 77, which is not among the images",
    ),
    ("coco-instances", edit_annotation(image_id=[]), r"annotations\[1\] is "),
    ("coco-instances", edit_annotation(category_id=4), r"annotations\[1\] has category 4"),
    (
        "coco-instances",
        edit_annotation(segmentation=[[1, 2, 3, 4, 5]]),
        r"annotations\[1\]: points",
    ),
    (
        "coco-instances",
        edit_annotation(segmentation=[[1, 2, 3, float("inf"), 5, 6]]),
        r"annotations\[1\]: points",
    ),
    ("coco-instances", edit_annotation(segmentation=[None]), r"annotations\[1\]: points None"),
    ("coco-instances", edit_annotation(segmentation="3"), r"annotations\[1\]: segmentation '3'"),
    ("coco-instances", edit_annotation(iscrowd=2), r"iscrowd 2; expected"),
    (
        "coco-instances",
        edit_annotation(segmentation={"size": [12, 10], "counts": [120]}),
        r"annotations\[1\]: run lengths .*\[10, 12\]",
    ),
    (
        "coco-instances",
        edit_annotation(segmentation={"size": [10, 12], "counts": [60, 61]}),
        r"annotations\[1\]: run lengths .*do not fill it",
    ),
    (
        "coco-instances",
        edit_annotation(segmentation={"size": [10, 12], "counts": [-60, 180]}),
        r"annotations\[1\]: run lengths",
    ),
    (
        "coco-instances",
        edit_annotation(segmentation={"size": [10, 12], "counts": "~"}),
        r"annotations\[1\]: run lengths",
    ),
    (
        "coco-instances",
        edit_annotation(segmentation={"size": 3, "counts": [10]}),
        r"annotations\[1\]: run lengths",
    ),
    (
        "coco-instances",
        edit_annotation(segmentation={"counts": [10]}),
        r"annotations\[1\]: run lengths",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["categories"][0].update(id=-1)),
        r"category .*whole number from 0 on",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["categories"][0].update(id=3)),
        r"category .*of one category",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["categories"][0].update(name="rest")),
        r"'rest' is called like the background",
    ),
    (
        "coco-instances",
        edit_json(
            "annotations.json", lambda content: content["categories"][0].pop("name") and None
        ),
        r"None cannot be the name of a class",
    ),
    (
        "cityscapes",
        lambda root: shutil.rmtree(root / "leftImg8bit"),
        r"leftImg8bit: no PART/CITY/\*_leftImg8bit.png",
    ),
    (
        "cityscapes",
        lambda root: shutil.rmtree(root / "gtFine" / "val"),
        r"2 labelled training and 0 labelled validation images, 1 validation images without annotation",
    ),
    (
        "cityscapes",
        save(
            "gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png",
            np.zeros((10, 13), np.uint16),
        ),
        r"13 x 10 pixels, but its image has 12 x 10",
    ),
    (
        "cityscapes",
        save(
            "gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png",
            np.eye(12, 3, dtype=np.uint8)[:10, None].repeat(12, 1),
        ),
        r"expected a map of whole numbers",
    ),
    ("masks", lambda root: shutil.rmtree(root / "images"), r"images: no such folder"),
    (
        "masks",
        save("masks/cat/e.png", np.zeros((10, 12), np.uint8)),
        r"cat/e.png: expected masks/CLASS/NAME.png, and an image",
    ),
    (
        "masks",
        save("masks/cat/a.tif", np.zeros((10, 12), np.uint8)),
        r"cat/a.tif: .*cat/a.png is the map of this class and image already",
    ),
    (
        "masks",
        save("masks/cat/a.png", np.eye(12, 3, dtype=np.uint8)[:10, None].repeat(12, 1)),
        r"cat/a.png: has 4 colours, as #000000 \(70%\), .*; expected a map of whole numbers",
    ),
    (
        "masks",
        save("masks/cat/a.png", np.zeros((12, 10), np.uint8)),
        r"cat/a.png: 10 x 12 pixels, but its image has 12 x 10",
    ),
    (
        "masks",
        lambda root: (root / "masks" / "cat" / "a.png").write_bytes(b""),
        r"cat/a.png: not a readable image",
    ),
    (
        "masks",
        lambda root: shutil.rmtree(root / "masks"),
        r"masks: no such folder; expected masks",
    ),
    (
        "masks",
        lambda root: (root / "masks" / "cat").rename(root / "masks" / "rest"),
        r"'rest' is called like the background",
    ),
]


@pytest.mark.parametrize(
    "kind, break_it, words",
    IMPORT_FAULTS,
    ids=[f"{kind}-{k}" for k, (kind, *_) in enumerate(IMPORT_FAULTS)],
)
def test_faulty_annotations_get_one_clear_line(kind, break_it, words, tmp_path):
    root = SCENES[kind](tmp_path / "s")
    flags = {} if kind == "cityscapes" else {"background": "rest"}
    importer.import_folder(kind, root, tmp_path / "sound", **flags)
    break_it(root)
    import_refused(kind, root, words, **flags)


def test_nothing_that_exists_is_overwritten_and_nothing_of_the_source_is_changed(tmp_path):
    root = write_labelme(tmp_path / "s")
    before = fingerprint(root)
    importer.import_folder("labelme", root, tmp_path / "out")
    there = fingerprint(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"panoptic_train.json: exists already; choose another folder with --out"
    ):
        importer.import_folder("labelme", root, tmp_path / "out")
    mark = json.dumps({"from": "labelme", "input": str(root.resolve()), "background": ""})
    (tmp_path / "out" / "import.part").write_text(
        mark
    )  # killed between the last JSON and the removal of the mark: it is whole
    with pytest.raises(
        UserError, match=r"panoptic_train.json: exists already; choose another folder with --out"
    ):
        importer.import_folder("labelme", root, tmp_path / "out")
    (tmp_path / "out" / "import.part").unlink()
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "a.png").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"mine/images: exists already; choose another folder"):
        importer.import_folder("labelme", root, tmp_path / "mine")
    for output in (root, root / "sub", tmp_path):
        with pytest.raises(UserError, match="is inside the other"):
            importer.import_folder("labelme", root, output)
    assert (
        (tmp_path / "mine" / "images" / "a.png").read_bytes() == b"precious"
        and fingerprint(root) == before
        and fingerprint(tmp_path / "out") == there
    )


def test_images_are_hard_links_or_copies_where_there_can_be_none(tmp_path, monkeypatch):
    root = write_labelme(tmp_path / "s")
    (root / "a.png").rename(root / "elsewhere")
    (root / "a.png").symlink_to(root / "elsewhere")
    importer.import_folder("labelme", root, tmp_path / "linked")
    for name in "abcd":
        target = tmp_path / "linked" / "images" / f"{name}.png"
        assert target.samefile(root / f"{name}.png") and not target.is_symlink()

    def no_links(*_):
        raise OSError(18, "another disk")

    monkeypatch.setattr(os, "link", no_links)
    importer.import_folder("labelme", root, tmp_path / "copied")
    for name in "abcd":
        target = tmp_path / "copied" / "images" / f"{name}.png"
        assert (
            not target.samefile(root / f"{name}.png")
            and target.read_bytes() == (root / f"{name}.png").read_bytes()
        )


def test_an_interrupted_import_is_no_data_set_and_is_run_again(tmp_path, monkeypatch):
    root, out = write_labelme(tmp_path / "s"), tmp_path / "out"
    importer.import_folder("labelme", root, tmp_path / "whole")
    expected = {
        path.removeprefix(str(tmp_path / "whole")): content
        for path, content in fingerprint(tmp_path / "whole").items()
    }
    written, write = [], files.write_atomic
    for after in range(9):  # the mark, 3 maps, the list, 2 JSON files
        shutil.rmtree(out, ignore_errors=True)
        written.clear()

        def interrupt(path, content):
            if len(written) == after:
                raise KeyboardInterrupt
            written.append(path)
            write(path, content)

        monkeypatch.setattr(importer, "write_atomic", interrupt)
        try:
            importer.import_folder("labelme", root, out)
            break
        except KeyboardInterrupt:
            assert not (out / "panoptic_train.json").exists()
        monkeypatch.setattr(importer, "write_atomic", write)
        if after > 1:  # after the mark alone there is nothing to mix up
            with pytest.raises(
                UserError,
                match="exists already; an interrupted import of another source or kind began it",
            ):
                importer.import_folder("masks", write_masks(tmp_path / f"m{after}"), out)
        importer.import_folder("labelme", root, out)
        assert {
            path.removeprefix(str(out)): content for path, content in fingerprint(out).items()
        } == expected
    assert after == 7


def test_an_imported_set_is_validated_and_trained_on(tmp_path, capsys):
    root = write_labelme(
        tmp_path / "source",
        ("a", "b", "c"),
        ("d", "e"),
        [
            {"label": "cat", "points": [[8, 8], [30, 8], [30, 30], [8, 30]]},
            {"label": "dog", "points": [[44, 44], [60, 44]], "shape_type": "circle"},
        ],
        (64, 64),
    )
    out = tmp_path / "set"
    assert (
        dearli.main(
            [
                "--stage",
                "import",
                "--from",
                "labelme",
                "--input",
                str(root),
                "--output",
                str(out),
                "--background",
                "lawn",
                "--val-share",
                "0.3",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{out}: 2 labelled, 2 unlabelled and 1 validation images; left out: nothing",
        "segments: cat 3, dog 3, lawn 3",
        f"next: python dearli.py --stage validate --dataset custom --data-root {out}",
    ]
    assert "no problem found" in validated(out, code=0, capsys=capsys)[0]
    own = [
        "--dataset",
        "custom",
        "--data-root",
        str(out),
        "--runs",
        str(tmp_path / "runs"),
        "--workers",
        "0",
    ]
    flags = TINY_FLAGS[: TINY_FLAGS.index("--split")] + ["--device", "cpu", "--report-images", "0"]
    assert (
        dearli.main(fitting(["--stage", "sup", "--split", "all", "--steps", "2", *own], flags)) == 0
    )
    assert (
        dearli.main(
            fitting(
                ["--stage", "ssl", "--method", "ssl", "--split", "all", "--steps", "1", *own], flags
            )
        )
        == 0
    )
    (row,) = log_of(tmp_path / "runs" / "set-ssl-all")
    assert len(log_of(tmp_path / "runs" / "set-sup-all")) == 2 and np.isfinite(row["loss"])
    assert "student/decoder" in json.loads(
        (tmp_path / "runs" / "set-sup-all" / "metrics.json").read_text()
    )


@pytest.mark.parametrize(
    "args, words",
    [
        (["--stage", "import", "--from", "labelme"], "--stage import needs --input DIR"),
        (
            ["--stage", "import", "--from", "voc", "--input", "x", "--out", "y"],
            "unknown kind of annotations (--from) 'voc'; available: labelme, coco-instances, cityscapes, masks",
        ),
        (
            ["--stage", "import", "--from", "masks", "--input", "/no/such/folder", "--out", "y"],
            "/no/such/folder: no such folder of annotated images",
        ),
        (
            [
                "--stage",
                "import",
                "--from",
                "masks",
                "--input",
                ".",
                "--out",
                "/tmp/y",
                "--val-share",
                "1.5",
            ],
            "--val-share 1.5: expected a share",
        ),
        (["--stage", "sup", "--from", "labelme"], "--from: only --stage import knows it"),
        (["--stage", "sup", "--background", "lawn"], "--background: only --stage import knows it"),
        (["--stage", "sup", "--stuff", "lawn"], "--stuff: only --stage import knows it"),
        (
            [
                "--stage",
                "import",
                "--from",
                "masks",
                "--masks-are",
                "things",
                "--input",
                ".",
                "--out",
                "y",
            ],
            "--masks-are things: expected one of instances, classes, both, binary",
        ),
        (
            [
                "--stage",
                "import",
                "--from",
                "labelme",
                "--classes",
                "cat",
                "--input",
                ".",
                "--out",
                "y",
            ],
            "--classes: is for --from masks, not for labelme",
        ),
        (
            ["--stage", "predict", "--val-share", "0.3", "--weights", "x"],
            "--val-share: only --stage import knows it",
        ),
    ],
)
def test_mistakes_in_an_import_command_get_one_clear_line(args, words, capsys):
    assert dearli.main(args) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and message.startswith("error: ")


def test_what_is_void_for_want_of_a_background_is_said(tmp_path):
    root = write_masks(tmp_path / "s")
    _, result = imported("masks", root)
    assert result["notes"] == [
        "72 % of the pixels of annotated images are in no segment, and so void: not measured, "
        "no object in training; --background NAME makes a class of them"
    ]
    for flags, said in (({"background": "rest"}, 0), ({"stuff": "cat"}, 1)):
        again = importer.import_folder("masks", root, tmp_path / f"{[*flags]}", **flags)
        assert again["notes"] == result["notes"][:said]


def test_files_of_unknown_kinds_are_counted(tmp_path):
    root = write_masks(tmp_path / "s")
    (root / "images" / "d.png").rename(root / "images" / "d.czi")
    (root / "notes.txt").write_text("hello")
    _, result = imported("masks", root)
    assert result["unlabeled"] == 0 and told(result) == [
        "1 files passed over, by their endings neither pictures nor annotations: 'images/d.czi'"
    ]


def write_instance_maps(root, ending=""):
    """As `write_masks`, with a map of all objects for each image."""
    shutil.rmtree(write_masks(root) / "masks")
    (root / "masks").mkdir()
    for name in "abc":
        save(f"masks/{name}{ending}.png", scene_ids().astype(np.uint8))(root)
    return root


def test_maps_of_instances_that_are_named_as_one_instance_are_refused(tmp_path):
    root = write_instance_maps(tmp_path / "s", "_1")
    import_refused("masks", root, r"a_1.png: is one instance by its name, .* holds 2 values .*1, 2")
    for name in "abc":
        (root / "masks" / f"{name}_1.png").rename(root / "masks" / f"{name}_mask.png")
    dataset, _ = imported("masks", root, masks_are="instances")
    assert np.array_equal(dataset.train.truth(0).segment_map, scene_ids())


def test_the_folder_that_was_meant_is_named(tmp_path):
    root = write_masks(tmp_path / "s")
    (root / "masks").rename(root / "labels")
    import_refused("masks", root, r"s/masks: no such folder; .*; if .*labels holds them, call it")
    import_refused("masks", root / "images", rf"did you mean --input {root}\?")
    (root / "classes.txt").write_text("cat\ndog\n")
    import_refused("masks", root, rf"folder of class maps already: train with --data-root {root}$")
    (root / "labels").rename(root / "Masks")
    import_refused("masks", root, r"no such folder; .*; did you mean .*/Masks\? call it masks")


def test_masks_that_are_white_where_nothing_is_are_noticed(tmp_path):
    def notes(name, mask):
        root = tmp_path / name
        for k, image in enumerate("abcd"):
            photo(root / "images" / f"{image}.png", seed=k)
            (root / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(root / "masks" / f"{image}.png")
        _, result = imported("masks", root, background="rest")
        return [note for note in result["notes"] if "invert" in note]

    cat = np.where(scene_mask("cat"), 255, 0).astype(np.uint8)
    assert notes("right", cat) == []
    (note,) = notes("wrong", 255 - cat)
    assert "fills more than half of the image in 4 of 4" in note and "invert them" in note


def test_a_class_that_no_training_image_shows_is_said(tmp_path):
    root = write_coco(tmp_path / "s")
    content = json.loads((root / "annotations.json").read_text())
    images = {image["id"]: image["file_name"] for image in content["images"]}
    (root / "train2017").mkdir()
    (root / "val2017").mkdir()
    for part, names in (("train2017", ("a.png", "b.png")), ("val2017", ("c.png",))):
        keys = {key for key, name in images.items() if name in names}
        rows = [a for a in content["annotations"] if a["image_id"] in keys]
        for row in rows if part == "train2017" else ():
            if row["category_id"] == rows[0]["category_id"]:
                row.update(segmentation=[], bbox=[0, 0, 6, 3])
        own = [image for image in content["images"] if image["id"] in keys]
        for name in names:
            (root / "images" / name).rename(root / part / name)
        text = json.dumps({**content, "images": own, "annotations": rows})
        (root / f"instances_{part}.json").write_text(text)
    (root / "annotations.json").unlink()
    _, result = imported("coco-instances", root)
    assert result["dropped"]["boxes without a mask"] == 2
    assert "['cat']: in validation images alone, so nothing is learnt of it" in result["notes"]


@pytest.mark.parametrize("folders, val", [(("train", "val"), "val"), (("train", "test"), "test")])
def test_folders_of_labelme_files_divide_them(folders, val, tmp_path):
    for part in (*folders, "more"):
        write_labelme(tmp_path / "in" / part, ("x", "y"), ("z",))
    dataset, result = imported("labelme", tmp_path / "in")
    names = [dataset.val.name(i) for i in range(len(dataset.val))]
    assert sorted(names) == [f"{val}_x.png", f"{val}_y.png"]
    assert f"validation images are those in folders for {val}" in result["notes"]
    assert (result["labeled"], result["unlabeled"]) == (4, 2)
    assert result["dropped"]["validation images without annotation"] == 1


def test_a_test_folder_beside_a_validation_folder_is_left_out_and_one_folder_divides_nothing(
    tmp_path,
):
    for part in ("train", "val", "test"):
        write_labelme(tmp_path / "in" / part, ("x", "y"), ())
    dataset, result = imported("labelme", tmp_path / "in")
    assert result["dropped"]["images of a test set"] == 2
    assert len(dataset.val) == result["labeled"] == 2
    (tmp_path / "in" / "val" / "x.json").write_text('{"shapes": [], "imagePath": "x.png"}')
    (tmp_path / "in" / "val" / "y.json").write_text('{"imagePath": "y.png", "shapes": [\n ]}')
    shutil.rmtree(tmp_path / "in" / "test")
    result = importer.import_folder("labelme", tmp_path / "in", tmp_path / "drawn")
    assert (result["labeled"], result["unlabeled"], result["val"]) == (1, 2, 1)
    write_labelme(tmp_path / "one" / "val", ("x", "y", "z"), ())
    result = importer.import_folder("labelme", tmp_path / "one", tmp_path / "one out")
    assert "all that is annotated is in folders for val, so these divide nothing" in result["notes"]
    assert (result["labeled"], result["val"]) == (2, 1)


def test_a_share_that_draws_nothing_is_said(tmp_path):
    for part in ("train", "val"):
        write_labelme(tmp_path / "in" / part, ("x", "y"), ())
    flags = {"val_share": 0.5, "seed": 3}
    result = importer.import_folder("labelme", tmp_path / "in", tmp_path / "out", **flags)
    assert "--val-share and --seed draw nothing: the division is there already" in result["notes"]
