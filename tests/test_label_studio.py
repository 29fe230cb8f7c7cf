"""Label Studio's export: regions, run lengths of brushes, annotations, images, faults."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from readers.annotations.label_studio import decode_runs
from tests.helpers import photo, rewrite
from tests.test_importer import (
    CORNERS,
    import_refused,
    imported,
    maps,
    scene_ids,
    scene_mask,
    studio_region,
    write_label_studio,
)

LENGTHS = (3, 4, 8, 16)  # bits, of the lengths of runs


def packed(*fields):
    """Bytes of a text of bits, filled up with zeros."""
    bits = "".join(fields).replace(" ", "")
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[k : k + 8], 2) for k in range(0, len(bits), 8))


def head(count):
    return f"{count:032b}" + f"{7:05b}" + "".join(f"{width - 1:04b}" for width in LENGTHS)


def brush_runs(mask, colour=(255, 255, 255)):
    """A mask as Label Studio packs it: runs of the four channels, a repeated value where there is
    one, else a block of single values."""
    pixels = np.where(mask[..., None], [*colour, 255], 0).ravel().tolist()
    fields, at = [head(len(pixels))], 0
    while at < len(pixels):
        run = 1
        while at + run < len(pixels) and pixels[at + run] == pixels[at]:
            run += 1
        single = pixels[at : at + 3] if run < 2 else []
        length = len(single) or run
        which = next(k for k, width in enumerate(LENGTHS) if length <= 1 << width)
        fields += ["0" if single else "1", f"{which:02b}", f"{length - 1:0{LENGTHS[which]}b}"]
        fields += [f"{value:08b}" for value in single or [pixels[at]]]
        at += length
    return [*packed(*fields)]


def test_run_lengths_of_brushes_are_read_bit_by_bit():
    # 2 x 1 pixels, one empty and one white: 8 values. In front their number, 32 bits; 7 for values
    # of 8 bits; 2, 3, 7, 15 for lengths of 3, 4, 8 and 16 bits. Then 4 times 0 and 4 times 255.
    stream = packed(
        "00000000 00000000 00000000 00001000  00111  0010 0011 0111 1111",
        "1 00 011 00000000",
        "1 00 011 11111111",
    )
    assert [*stream] == [0, 0, 0, 8, 57, 27, 252, 96, 17, 255, 128]
    assert decode_runs(stream, 8).tolist() == [0] * 4 + [255] * 4
    # 5 single values in a block, with the second width, and 300 times 7 with the fourth
    stream = packed(
        head(305), "0 01 0100", *(f"{v:08b}" for v in (1, 2, 3, 4, 250)), "1 11", f"{299:016b}"
    )
    stream = packed("".join(f"{byte:08b}" for byte in stream)[: 53 + 7 + 40 + 19], "00000111")
    assert decode_runs(stream, 305).tolist() == [1, 2, 3, 4, 250] + [7] * 300
    for broken, count in ((stream, 304), (stream[:-1], 305), (b"", 8), (stream[:9], 305)):
        with pytest.raises(ValueError):
            decode_runs(broken, count)
    with pytest.raises(ValueError, match="longer than the image"):
        decode_runs(packed(head(4), "1 00 111 00000000"), 4)


def data_url(mask):
    buffer = io.BytesIO()
    rgba = np.zeros((*mask.shape, 4), np.uint8)
    rgba[..., 3] = mask * 255
    Image.fromarray(rgba).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.mark.parametrize("form", ["white", "coloured", "bitmask", "labels"])
def test_brushes_and_bitmasks_of_label_studio_are_the_masks_that_were_painted(form, tmp_path):
    results = []
    for name in CORNERS:
        mask = scene_mask(name)
        if form == "bitmask":
            results.append(studio_region(name, kind="bitmask", imageDataURL=data_url(mask)))
            continue
        colour = (255, 255, 255) if form == "white" else (10, 200, 30)
        results.append(
            studio_region(name, kind="brush", format="rle", rle=brush_runs(mask, colour))
        )
        if form == "labels":  # <Brush> with <Labels>: the shape, and again with its label
            value = results[-1]["value"]
            value["labels"] = value.pop("brushlabels")
            bare = {key: value[key] for key in ("format", "rle")}
            results[-1]["type"] = "labels"
            results.append({**results[-1], "type": "brush", "value": bare})
    dataset, result = imported("label-studio", write_label_studio(tmp_path / "s", results))
    assert np.array_equal(dataset.train.truth(0).segment_map, scene_ids())
    assert result["instances"] == {"cat": 3, "dog": 3} and not result["dropped"]


def test_ellipses_are_instances_and_boxes_points_and_the_like_are_not(tmp_path):
    results = [
        # around (6, 5), 4 to the right and 2 down, turned clockwise by 135 degrees: from the lower
        # left to the upper right
        studio_region(
            "disc", kind="ellipse", x=50, y=50, radiusX=400 / 12, radiusY=20, rotation=135
        ),
        studio_region("flat", kind="ellipse", x=50, y=50, radiusX=0, radiusY=20),
        # a box at (10, 2), 3 x 1, turned by a quarter around its upper left corner: x 9 to 10,
        # y 2 to 5
        studio_region("box", kind="rectangle", x=1000 / 12, y=20, width=25, height=10, rotation=90),
        studio_region("dot", kind="keypoint", x=0, y=0, width=0.5),
        {"type": "choices", "value": {"choices": ["good"]}, "from_name": "quality"},
        {"type": "relation", "from_id": "a", "to_id": "b"},
        {
            **studio_region("none", [[0, 6], [2, 6], [2, 8], [0, 8]]),
            "type": "polygon",
            "id": "alone",
        },
        studio_region("__ignore__", [[0, 9], [2, 9], [2, 10], [0, 10]]),
        studio_region("open", [[10, 8], [12, 8], [12, 10]], closed=False),
    ]
    root = write_label_studio(tmp_path / "s", results)
    dataset, result = imported("label-studio", root, background="lawn")
    truth = dataset.train.truth(0)
    assert dataset.taxonomy.names == ("disc", "flat", "lawn")
    ys, xs = np.mgrid[:10, :12] + 0.5
    turned = (xs - 6 + 1j * (ys - 5)) * np.exp(-0.75j * np.pi)
    disc = (turned.real / 4) ** 2 + (turned.imag / 2) ** 2 <= 1
    assert disc[2, 8] and disc[7, 3] and not disc[2, 3] and not disc[7, 8]
    assert np.array_equal(truth.segment_map == 1, disc) and abs(disc.sum() - np.pi * 8) < 3
    assert (truth.segment_map[2:5, 9] == 0).all() and (truth.segment_map[2:5, 10:] == 2).all()
    nowhere = ((truth.segment_map[rows, :2] == 0).all() for rows in (slice(6, 8), 9))
    assert (truth.segment_map[:5, :4] == 0).all() and all(nowhere)
    assert {what: count // 3 for what, count in result["dropped"].items()} == {
        "boxes without a mask": 1,
        "key points": 1,
        "results of type 'choices', which are no regions": 1,
        "results of type 'relation', which are no regions": 1,
        "regions without a label": 1,
        "regions labelled __ignore__": 1,
        "polygons that are not closed": 1,
        "instances without a pixel": 1,
    }


def test_of_several_annotations_the_newest_counts_that_is_not_cancelled_or_the_true_one(tmp_path):
    root = write_label_studio(tmp_path / "s")
    cat = [studio_region("cat", CORNERS["cat"])]

    def edit(tasks):
        old, new = "2024-01-02T10:00:00.1Z", "2024-01-02T11:00:00Z"
        (whole,) = tasks[0]["annotations"]
        tasks[0]["annotations"] = [
            {**whole, "updated_at": old},
            {"id": 1, "updated_at": new, "result": cat},
            {"id": 9, "updated_at": "2025", "was_cancelled": True, "result": []},
        ]
        tasks[1]["annotations"] += [{"id": 99, "updated_at": new, "result": cat}]
        tasks[1]["annotations"][0] |= {"updated_at": old, "ground_truth": True}
        tasks[2]["annotations"][0]["was_cancelled"] = True
        tasks[2]["predictions"] = [{"result": cat}]
        tasks[3]["drafts"] = [{"result": cat}]

    rewrite(root / "project-1.json", edit)
    dataset, result = imported("label-studio", root)
    of = maps(dataset)
    assert sorted(of) == ["upload_a.png", "upload_b.png"] and result["unlabeled"] == 2
    assert of["upload_a.png"].max() == 1 and np.array_equal(of["upload_b.png"], scene_ids())
    assert result["dropped"] == {
        "cancelled annotations": 2,
        "further annotations of a task": 2,
        "predictions, which are no annotations": 1,
        "drafts, which are no annotations": 1,
    }
    assert any(note.startswith("of several annotations") for note in result["notes"])


def test_images_of_label_studio_are_found_by_the_end_of_their_address(tmp_path):
    root = write_label_studio(tmp_path / "s")
    photo(root / "day1" / "x y.png", seed=8), photo(root / "day2" / "x y.png", seed=9)
    photo(root / "masks" / "a.jpg"), photo(root / "extra.png", seed=7)
    (root / "upload" / "c.png").rename(root / "upload" / "0a1b2c3d-c.png")

    def edit(tasks):
        tasks[0]["data"] = {"picture": "s3://bucket/day2/x%20y.png", "text": "no picture"}
        tasks[1]["data"] = {"image": "/data/local-files/?d=mnt/day1/x y.png"}
        tasks[3]["data"] = {"image": "https://host/gone.png?token=a/b.png"}

    rewrite(root / "project-1.json", edit)
    dataset, result = imported("label-studio", root)
    assert sorted(maps(dataset)) == ["day1_x y.png", "day2_x y.png", "upload_0a1b2c3d-c.png"]
    assert result["unlabeled"] == 4  # extra, and a, b and d of upload/
    assert result["dropped"] == {
        "tasks without annotation whose image is not here": 1,
        "pictures in folders of masks, labels or the like": 1,
    }


def task(**fields):
    return lambda root: rewrite(root / "project-1.json", lambda tasks: tasks[1].update(fields))


def region(**fields):
    def edit(tasks):
        tasks[1]["annotations"][0]["result"][1].update(fields)

    return lambda root: rewrite(root / "project-1.json", edit)


def whole(content):
    return lambda root: (root / "project-1.json").write_text(json.dumps(content))


RUNS = brush_runs(scene_mask("dog"))
STUDIO_FAULTS = [
    (lambda root: (root / "project-1.json").write_text("["), r"not a readable JSON file"),
    (lambda root: (root / "b.json").write_text("[]"), r"expected one \*.json"),
    (lambda root: (root / "project-1.json").unlink(), r"s: \[\]; expected one \*.json"),
    (whole([]), r"expected a list of tasks"),
    (whole([{"image": "a.png", "annotation_id": 3}]), r"JSON-MIN.*choose JSON$"),
    (whole([3]), r"expected a list of tasks"),
    (whole({"images": [], "annotations": []}), r"in COCO's format: say --from coco-instances"),
    (task(annotations=[3]), r"task 1: annotations \[3\], expected a list of objects"),
    (task(annotations=[{"result": None}]), r"task 1: annotations"),
    (task(data={"text": "a"}), r"task 1: data .*expected the address of one image"),
    (task(data={"a": "x/a.png", "b": "x/b.png"}), r"task 1: data .*address of one image"),
    (task(data={"image": "/data/upload/1/gone.png"}), r"task 1: no image 'gone.png' below"),
    (task(data={"image": "/upload/a.png"}), r"task 1: its image 'upload/a.png' has another task"),
    (
        lambda root: [photo(root / "x" / "b.png"), photo(root / "y" / "b.png")],
        r"task 1: image '.*0a1b2c3d-b.png' is upload/b.png as well as x/b.png",
    ),
    (region(type=None), r"task 1: result\[1\] is .*expected an object with type"),
    (region(type="vectorlabels"), r"result\[1\]: of type 'vectorlabels'.*expected a region"),
    (region(value=None), r"result\[1\]: of type 'polygonlabels', value None"),
    (region(value={"points": [[1, 2]], "polygonlabels": ["a", "b"]}), r"expected one: an instance"),
    (region(value={"points": [[1, 2]], "polygonlabels": [" "]}), r"cannot be the name of a class"),
    (region(value={"points": [[1], [2, 3]], "polygonlabels": ["a"]}), r"in percent of the width"),
    (region(value={"points": [[1, 500]], "polygonlabels": ["a"]}), r"in percent of the width"),
    (region(value={"points": [[1, float("nan")]], "polygonlabels": ["a"]}), r"in percent"),
    (region(image_rotation=90), r"result\[1\]: image_rotation 90, .*turn the image back"),
    (region(item_index=1), r"item_index 1; expected 0"),
    (region(original_width=13), r"states an image of \(10, 13\), but it is \(10, 12\)"),
    (
        region(type="brushlabels", value={"rle": RUNS[:-1], "brushlabels": ["a"]}),
        r"result\[1\]: rle .*image of 12 x 10 \('it ends too early'\)",
    ),
    (region(type="brushlabels", value={"rle": [300], "brushlabels": ["a"]}), r"result\[1\]: rle"),
    (region(type="brushlabels", value={"rle": "x", "brushlabels": ["a"]}), r"result\[1\]: rle 'x'"),
    (region(type="brushlabels", value={"rle": 10**30, "brushlabels": ["a"]}), r"rle 1000.*a list"),
    (
        region(type="bitmasklabels", value={"imageDataURL": "data:x,", "bitmasklabels": ["a"]}),
        r"imageDataURL 'data:x,' is no PNG",
    ),
    (
        region(
            type="bitmasklabels",
            value={"imageDataURL": data_url(np.ones((3, 3), bool)), "bitmasklabels": ["a"]},
        ),
        r"a mask of 3 x 3, but its image has 12 x 10",
    ),
    (
        region(
            type="ellipselabels", value={"x": 1, "y": 2, "radiusX": "a", "ellipselabels": ["a"]}
        ),
        r"result\[1\]: points .*in percent",
    ),
]


@pytest.mark.parametrize("k", range(len(STUDIO_FAULTS)))
def test_faults_of_label_studio_get_one_clear_line(k, tmp_path):
    root = write_label_studio(tmp_path / "s")
    break_it, words = STUDIO_FAULTS[k]
    break_it(root)
    import_refused("label-studio", root, words)
