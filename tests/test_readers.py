"""Folders in COCO panoptic format and image files: what is read, and what is refused in one line."""

import dataclasses
import json
import re
import resource
import shutil
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import dearli
from ground.ahead import ahead
from ground.errors import UserError
from mini import microcosm
from readers import checks, large, mask_files, panoptic, papers, pictures
from readers.runs import to_runs
from tests.helpers import (
    TINY,
    fingerprint,
    photo,
    png_of_16_bits,
    rewrite,
    run_folder,
    validated,
    write_coco_folder,
    write_downloads,
)
from tools import predict, prepare, validate


def png_header(width, height):
    """A PNG that states a size and holds next to nothing."""

    def chunk(kind, content):
        size, check = len(content), zlib.crc32(kind + content)
        return struct.pack(">I", size) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def one_refusal(root, words, split="2"):
    """Loading or the first batch of a folder is refused in one line with these words."""
    with pytest.raises(UserError) as error:
        dataset = panoptic.load_folder(root, split)
        for step in range(3):
            data.LabeledBatches(dataset, dataclasses.replace(TINY, labeled_batch=4), 3)[step]
    assert re.search(words, str(error.value)) and "\n" not in str(error.value), str(error.value)


def test_a_sound_data_set_is_described_and_passes(small_mini, tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set")
    out, errors, content = validated(root, "--split", "1_3", code=0, capsys=capsys)
    assert (
        "no problem found" in out
        and not errors
        and not content["problems"]
        and str(root) not in out
    )
    assert (
        content["counts"]["training"]["images"] == 6
        and content["counts"]["labelled"]["images"] == 2
        and content["counts"]["unlabelled"]["images"] == 4
    )
    truths = [panoptic.load_folder(root, "1_3").train.truth(i) for i in range(6)]
    assert (
        content["counts"]["training"]["segments"] == sum(len(t.labels) for t in truths)
        and content["counts"]["training"]["void"] == 0
    )
    for k, row in enumerate(content["classes"]):
        assert row["share"] == pytest.approx(np.mean([t.semantic() == k for t in truths])) and row[
            "images"
        ] == sum(k in t.labels for t in truths)
        assert row["labeled_images"] == sum(k in truths[i].labels for i in (0, 3))
    unseen = [row["name"] for row in content["classes"] if not row["labeled_images"]]
    assert f"{len(unseen)} classes of 20 that no labelled image shows: {', '.join(unseen)}" in out
    assert (
        validated(root, code=0, capsys=capsys)[2]["counts"]["labelled"]["images"] == 6
    )  # without --split: all
    assert (
        dearli.main(["--stage", "validate", "--split", "4"]) == 0
        and "no problem found" in capsys.readouterr().out
    )


def test_all_faults_of_a_folder_are_listed_by_kind_and_nothing_is_changed(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set", images=16)
    image, panoptic = (
        (lambda i: root / "images" / f"train{i}.png"),
        (lambda i: root / "panoptic" / f"train{i}.png"),
    )
    image(0).write_bytes(image(0).read_bytes()[:-300])
    image(1).write_bytes(b"")
    image(2).unlink()
    image(4).write_bytes(png_header(30_000, 30_000))
    image(5).unlink()
    image(5).symlink_to(tmp_path)
    Image.open(panoptic(6)).resize((20, 30)).save(panoptic(6))

    def change(content):
        def segments(i):
            return content["annotations"][i]["segments_info"]

        segments(7)[0]["id"] = 9
        segments(8)[0]["area"] += 5
        segments(9)[0]["category_id"] = 1000
        segments(10).append(dict(segments(10)[0]))
        del segments(11)[0]["iscrowd"]
        segments(12)[0]["area"] = None
        content["images"][13]["file_name"] = "../train13.png"
        content["images"].append(content["images"][14])
        content["annotations"].append(content["annotations"][14])
        content["annotations"].append(["train15"])

    rewrite(root / "panoptic_train.json", change)
    (root / "splits" / "1_3" / "labeled.txt").write_text(
        "train14.png\ntrain15.png\ntrain14.png\nelsewhere.png\n"
    )
    (root / "splits" / "1_3" / "unlabeled.txt").write_text("train3.png\ntrain15.png\n")
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(16):
        side = 32 if i == 3 else 64
        (masks / f"train{i}.json").write_text(
            json.dumps({"image": {"height": side, "width": side}, "annotations": []})
            if i != 7
            else "{"
        )
    before = fingerprint(root)
    out, errors, content = validated(
        root, "--split", "1_3", "--masks", masks, code=2, capsys=capsys
    )
    expected = {
        "absent": ["train2"],
        "unreadable": ["train0", "train1"],
        "large": ["train4"],
        "name": ["train13", "train5"],
        "malformed": ["train12", "[16]", "[17]"],
        "image twice": ["train14"],
        "category": ["train9"],
        "segment twice": ["train10"],
        "size": ["train6"],
        "not in json": ["train7"],
        "no pixel": ["train7"],
        "area": ["train8"],
        "split": ["train14", "elsewhere", "train15"],
        "masks": ["train3", "train7"],
    }
    elsewhere = {
        "stuff twice",
        "nothing",
        "value",
        "palette",
        "astray",
        "other",
    }  # have tests of their own
    assert list(content["problems"]) == [
        k for k in validate.KINDS if k not in elsewhere
    ]  # in one order
    assert content["problems"].keys() == expected.keys()
    for kind, names in expected.items():
        faults = content["problems"][kind]["faults"]
        assert len(faults) == len(names) and all(
            name in fault for name, fault in zip(names, faults)
        ), (kind, faults)
        assert (
            all(fault.replace(f"{root}/", "") in out for fault in faults)
            and f"{len(names)} x {validate.KINDS[kind][0]}: {validate.KINDS[kind][1]}" in out
        )
    assert (
        errors
        == [
            f"error: {root}: {sum(map(len, expected.values()))} problems of 14 kinds, listed above "
            f"and in {tmp_path / 'report.json'}"
        ]
        and "note: panoptic_train.json: 1 segment without iscrowd" in out
    )
    assert (
        validated(root, "--split", "1_3", "--masks", masks, "--workers", 2, code=2, capsys=capsys)[
            2
        ]
        == content
    )
    assert fingerprint(root) == before


def test_presets_are_validated_with_their_own_rules_and_class_maps(tmp_path, monkeypatch, capsys):
    base = write_downloads("ade20k", tmp_path, monkeypatch)
    (base / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    semantic = np.ones(
        (64, 96), np.uint8
    )  # wall; the instances hide half of the image, and all of a second kind of stuff
    semantic[8:40, 10:50] = 2
    Image.fromarray(semantic).save(base / "annotations" / "training" / "ADE_train_00000001.png")
    root = [
        "--dataset",
        "ade20k",
        "--data-root",
        str(tmp_path),
        "--workers",
        "0",
    ]
    assert dearli.main(["--stage", "prepare", *root, "--assets", str(tmp_path / "assets")]) == 0
    truth = papers.load("ade20k", tmp_path, "1_128").train.truth(0)
    assert (
        np.bincount(truth.segment_map.ravel(), minlength=len(truth.labels) + 1)[1:] == 0
    ).any()  # the official rule lists it all the same
    assert (
        dearli.main(["--stage", "validate", *root, "--split", "1_128"]) == 0
        and "no problem found" in capsys.readouterr().out
    )
    (base / "annotations" / "validation" / "ADE_val_00000001.png").write_bytes(b"")
    rewrite(
        base / "ade20k_panoptic_train.json",
        lambda content: content["annotations"][1]["segments_info"][0].update(area=1),
    )
    assert dearli.main(["--stage", "validate", *root]) == 2
    out = capsys.readouterr().out
    assert (
        "ADE_val_00000001.png: not a readable image (empty file)" in out
        and "the JSON states 1\n" in out
    )


def test_a_json_too_broken_to_open_is_the_one_line_of_the_report(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set")
    (root / "panoptic_val.json").write_text('{"images": [')
    out, errors, content = validated(root, code=2, capsys=capsys)
    assert (
        not out
        and len(errors) == 1
        and "panoptic_val.json: not a readable JSON file" in errors[0]
        and content["refused"] in errors[0]
    )


def test_many_faults_of_a_kind_are_counted_and_the_first_few_shown(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set", images=12)
    for path in (root / "images").glob("train*"):
        path.write_bytes(b"")
    out, _, content = validated(root, code=2, capsys=capsys)
    assert (
        "12 x files cannot be read" in out
        and "... and 7 more" in out
        and out.count("(empty file)") == 5
        and len(content["problems"]["unreadable"]["faults"]) == 12
    )


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n", None])
def test_fault_19_truncated_empty_or_non_image_files_are_named(content, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    for path in (root / "images" / "train1.png", root / "panoptic" / "train1.png"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 3 // 4] if content is None else content)
        one_refusal(root, f"{path}: not a readable image")
        path.write_bytes(whole)
    (root / "splits" / "1_3" / "labeled.txt").write_bytes(b"\xff\xfe\x00")
    one_refusal(root, "labeled.txt: not a readable text file", "1_3")


def test_validate_says_what_is_dark_cut_off_unlisted_or_stuff_twice(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set", images=3)
    out, _, content = validated(root, "--no-stretch", code=0, capsys=capsys)
    assert not any("range" in line or "picture" in line for line in content["notices"])
    size = Image.open(root / "images" / "train0.png").size
    deep = np.zeros(size[::-1], np.uint16)
    deep[:, ::2] = 4000  # 12 bits; the white point is 4095
    png_of_16_bits(root / "images" / "train0.png", deep)
    png_of_16_bits(
        root / "images" / "val0.png", np.where(deep, 200, 0)
    )  # 200 of 4095 becomes 12: next to nothing
    png_of_16_bits(
        root / "images" / "val1.png", np.where(deep, 9000, 0)
    )  # cut off in half of its pixels
    Image.new("RGB", size, (9, 9, 15)).save(root / "images" / "train1.png")
    Image.new("RGB", size).save(root / "images" / "new.png")
    Image.new("RGB", size).save(root / "images" / ".hidden.png")
    out, _, content = validated(root, "--no-stretch", code=0, capsys=capsys)
    assert (
        "note: 2 of 5 images that use less than 1/16 of their range and show next to nothing (0 to "
        "255; 16-bit ones become that by --white, here 4095; 4095 is that of 12 bits): "
        "train1.png (9 to 15), val0.png (0 to 12)" in out
    )
    assert (
        "note: 1 of 5 images of 16 bits that lose what is brighter than --white 4095: "
        "val1.png (50%)" in out
    )
    assert (
        "note: 1 picture in images that no JSON lists, which are not used: new.png; list them"
        in out
    )
    out, _, content = validated(
        root, "--no-stretch", "--white", "65535", code=0, capsys=capsys
    )  # what /256 would do: 4000 becomes 15
    assert "3 of 5 images that use less than 1/16" in out and "train0.png (0 to 15)" in out

    def split_stuff(content):
        ids = [c["id"] for c in content["categories"]]
        things = {c["id"] for c in content["categories"] if c["isthing"]}
        segments = content["annotations"][1]["segments_info"]
        stuff = next(i for i in ids if i not in things)
        segments[0]["category_id"] = segments[2]["category_id"] = segments[1]["category_id"] = (
            stuff  # the second one is crowd
        )

    rewrite(root / "panoptic_train.json", split_stuff)
    whole = [
        s["category_id"]
        for s in json.loads((root / "panoptic_train.json").read_text())["annotations"][1][
            "segments_info"
        ]
    ]
    dataset = panoptic.load_folder(root, "all")
    stuff = dataset.taxonomy.things.index(False)
    count = whole.count(dataset.taxonomy.ids[stuff]) - 1
    assert (
        checks.repeated_stuff(dataset.train) == [(1, stuff, count)]
        and checks.repeated_stuff(dataset.val) == []
    )
    out, _, content = validated(root, code=2, capsys=capsys)
    assert content["problems"]["stuff twice"]["faults"] == [
        f"train1.png: {count} segments of {dataset.taxonomy.short_names[stuff]}"
    ]
    assert any(
        "1 of 3 labelled images have several segments of one stuff class" in line
        for line in checks.limits(dataset, TINY)
    )


def test_validate_looks_at_the_images_that_training_takes(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set")
    for lists, count in (([], 6), (["train1.png", "train2.png"], 2)):
        if lists:
            (root / "splits" / "all").mkdir()
            (root / "splits" / "all" / "labeled.txt").write_text("\n".join(lists))
        _, _, content = validated(root, code=0, capsys=capsys)
        assert content["counts"]["labelled"]["images"] == count and content["split"] == "all"
        assert run_folder("sup", root, "--dry-run") == 0
        assert f"{count} labelled" in capsys.readouterr().out


def test_a_category_0_is_a_class_like_any_other(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    for part in ("train", "val"):

        def shift(content):
            first = content["categories"][0]["id"]
            for c in content["categories"]:
                c["id"] -= first
            for s in (s for a in content["annotations"] for s in a["segments_info"]):
                s["category_id"] -= first

        rewrite(root / f"panoptic_{part}.json", shift)
    dataset = panoptic.load_folder(root, "all")
    assert dataset.taxonomy.ids[0] == 0 and np.array_equal(
        dataset.train.truth(1).labels, microcosm.scene("train", 1, 64).labels
    )
    said = predict.Prediction(
        Image.new("RGB", (2, 2)),
        np.ones((2, 2), np.int32),
        np.array([0]),
        np.array([1.0]),
        np.zeros((2, 2), int),
        dataset.taxonomy,
    )
    assert (
        said.segments_info()[0]["category_id"] == 0 and dataset.taxonomy.categories()[0]["id"] == 0
    )


def test_fault_20_every_kind_of_image_becomes_8_bit_rgb_and_stays_aligned(tmp_path):
    side, left = 24, np.zeros((24, 40), bool)
    left[:, :15] = True  # the left is dark, the right bright, of every image
    grey = np.where(left, 30, 200).astype(np.uint8)
    deep = (grey.astype(np.uint16) << 8) + 77  # 16 bits: divided by 256, not clipped to 255
    rgb = Image.fromarray(np.repeat(grey[..., None], 3, -1))
    frames = [rgb, Image.new("RGB", rgb.size)]
    kinds = {
        "grey.png": Image.fromarray(grey),
        "deep.png": Image.fromarray(deep),
        "deep.tif": Image.fromarray(deep),
        "alpha.png": rgb.convert("RGBA"),
        "palette.png": rgb.quantize(4),
        "bilevel.png": Image.fromarray(~left),
        "cmyk.tif": rgb.convert("CMYK"),
        "grey-alpha.png": rgb.convert("LA"),
        "plain.webp": rgb,
    }
    for name, image in kinds.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    rgb.save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    for name in (*kinds, "animated.gif"):
        image = pictures.open_image(tmp_path / name)
        assert image.mode == "RGB" and image.size == (40, side), name
        expected = np.where(left, 0, 255) if "bilevel" in name else grey
        assert np.abs(np.asarray(image).astype(int) - expected[..., None]).max() <= 1, name
    for name, image in {
        "float.tif": Image.fromarray(grey.astype(np.float32)),
        "wide.tif": Image.fromarray(grey.astype(np.int32)),
    }.items():
        image.save(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: .*32 bits a channel"):
            pictures.open_image(tmp_path / name)


def test_a_stack_is_no_image_and_a_pyramid_is_one(tmp_path):
    pages = [Image.new("L", (40, 24), value) for value in (1, 2, 3)]
    small = [page.resize((20, 12)) for page in pages]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "pyramid.tif", save_all=True, append_images=small[1:])
    for read in (pictures.open_image, pictures.image_header, large.LargeImage):
        with pytest.raises(UserError, match="stack.tif: holds several images of one size"):
            read(tmp_path / "stack.tif")
        read(tmp_path / "pyramid.tif")
    assert np.asarray(pictures.open_image(tmp_path / "pyramid.tif")).max() == 1


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_fault_20_a_map_lies_on_the_image_whatever_its_exif_orientation(ending, tmp_path):
    # The image is bright where segment 1 lies. Annotators drew on the image as shown, or a program
    # on the pixels as stored: the size tells.
    root = write_coco_folder(tmp_path / "set", images=1)
    shown = np.zeros((48, 64), np.uint8)
    shown[:10, :20] = 255
    back = {3: 3, 6: 8, 8: 6, 5: 5, 7: 7, 2: 2, 1: 1}  # orientation -> the one that undoes it

    def change(content):
        content["images"][0]["file_name"] = f"turned.{ending}"
        content["annotations"][0]["segments_info"] = [
            {"id": 1, "category_id": 7, "area": 200, "iscrowd": 0}
        ]

    rewrite(root / "panoptic_train.json", change)
    for orientation, inverse in back.items():
        stored = Image.fromarray(np.repeat(shown[..., None], 3, -1))
        stored = stored.transpose(pictures.TURN[inverse]) if inverse in pictures.TURN else stored
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(
            root / "images" / f"turned.{ending}",
            exif=exif,
            **({"quality": 95} if ending != "png" else {}),
        )
        drawn = [shown > 0] + [np.asarray(stored)[..., 0] > 128] * (
            stored.size != (64, 48) and ending != "tif"
        )  # Pillow hides how a TIFF is stored
        for on in drawn:
            prepare.encode(on.astype(np.int32)).save(root / "panoptic" / "train0.png")
            images = panoptic.load_folder(root, "1").train
            bright, truth = np.asarray(images.image(0))[..., 0] > 128, images.truth(0)
            assert bright.shape == truth.segment_map.shape == (48, 64)
            assert (bright == (truth.segment_map == 1)).mean() > 0.98, (ending, orientation)


def test_fault_20_a_broken_exif_block_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    assert (
        pictures.open_image(tmp_path / "a.jpg").size
        == pictures.image_header(tmp_path / "a.jpg")[0]
        == (48, 64)
    )
    content = (tmp_path / "a.jpg").read_bytes()
    assert content.count(b"MM\x00*") == 1
    (tmp_path / "a.jpg").write_bytes(content.replace(b"MM\x00*", b"XX\x00*"))
    assert (
        pictures.open_image(tmp_path / "a.jpg").size
        == pictures.image_header(tmp_path / "a.jpg")[0]
        == (64, 48)
    )


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (1, 1), (5000, 20), (20, 5000)])
def test_fault_20_thin_and_long_images_make_batches(size, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=1)
    Image.new("RGB", size, (9, 9, 9)).save(root / "images" / "train0.png")
    prepare.encode(np.ones(size[::-1], np.int32)).save(root / "panoptic" / "train0.png")

    def change(content):
        content["annotations"][0]["segments_info"] = [
            {"id": 1, "category_id": 7, "area": size[0] * size[1], "iscrowd": 0}
        ]

    rewrite(root / "panoptic_train.json", change)
    batch = data.LabeledBatches(panoptic.load_folder(root, "1"), TINY, 2)[0]
    for image, target in zip(batch.images, batch.targets):
        assert image.shape == (3, 64, 64) and len(target) == 1
        assert ((image[0] != data.PAD_VALUE) == (target.segment_map == 1)).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_fault_21_a_decompression_bomb_is_refused_with_its_path_before_it_is_unpacked(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    for width, height in (
        (30_000, 30_000),
        (10_000, 9_000),
    ):  # Pillow refuses the first and would only warn of the second
        for path in (root / "images" / "train1.png", root / "panoptic" / "train1.png"):
            whole = path.read_bytes()
            path.write_bytes(png_header(width, height))
            one_refusal(root, f"{path}: its header states more than 89 million pixels")
            path.write_bytes(whole)


def test_fault_21_masks_do_not_take_more_memory_than_their_image(tmp_path):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = to_runs(np.zeros((1, 1), bool))["counts"]
    for size, counts in (
        ([100_000, 100_000], "0"),
        ([1 << 40, 1 << 40], "0"),
        ([64, 64], "~" * 30 + "0"),
        ([64, 64], counts),
        ([64, 64], "PPT" + "P" * 10 + "1"),
        ([64.0, 64], "0"),
        ("64", "0"),
    ):
        (tmp_path / "a.json").write_text(
            json.dumps(
                {
                    "image": {"height": 64, "width": 64},
                    "annotations": [{"segmentation": {"size": size, "counts": counts}}],
                }
            )
        )
        with pytest.raises(UserError, match="a.json: .*delete it and run --stage masks again"):
            mask_files.read_masks(tmp_path, "a.png", (64, 64))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # KB


@pytest.mark.parametrize(
    "edit, words",
    [
        (
            lambda s: s[0].update(id=9),
            r"train1.png: segment \d+ has pixels but is not in segments_info",
        ),
        (
            lambda s: s.append({"id": 9, "category_id": 7, "area": 4}),
            "train1.png: segment 9 is in segments_info but has no pixel",
        ),
        (
            lambda s: s[0].update(category_id=1000),
            r"segment 70000 of image train1.png has category 1000",
        ),
        (lambda s: s.append(dict(s[0])), "segment 70000 of image train1.png is listed twice"),
        (lambda s: s[0].update(iscrowd=2), "of image train1.png: expected id .* iscrowd"),
    ],
)
def test_fault_22_map_and_json_that_disagree_name_image_and_segment(edit, words, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    rewrite(
        root / "panoptic_train.json",
        lambda content: edit(content["annotations"][1]["segments_info"]),
    )
    one_refusal(root, words)


def test_fault_22_a_map_of_another_size_is_named_and_a_missing_iscrowd_is_zero(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    rewrite(
        root / "panoptic_train.json",
        lambda content: (
            [s.pop("iscrowd") for s in content["annotations"][0]["segments_info"]] and None
        ),
    )
    assert not panoptic.load_folder(root, "2").train.truth(0).crowd.any()
    path = root / "panoptic" / "train1.png"
    Image.open(path).resize((63, 64), Image.Resampling.NEAREST).save(path)
    one_refusal(root, f"{path}: 63 x 64 pixels, but its image train1.png has 64 x 64")
    rewrite(
        root / "panoptic_val.json",
        lambda content: content["categories"][0].update(name="something else"),
    )
    one_refusal(root, "category 7 is 'something else', but")


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000, "not a readable JSON"),
        (
            '{"images": {}, "annotations": [], "categories": []}',
            "key 'images' is missing or not a list",
        ),
        ("null", "key 'images'"),
        (
            '{"images": [], "annotations": [], "categories": '
            '[{"id": 1e999, "name": "cat", "isthing": 1}]}',
            "expected a whole number as id",
        ),
        (
            '{"images": [], "annotations": [], "categories": '
            '[{"id": 1, "name": "cat", "isthing": 1}, {"id": 1, "name": "dog", "isthing": 1}]}',
            "shares its id",
        ),
        (
            '{"images": [], "annotations": [], "categories": '
            '[{"id": 1, "name": ["cat"], "isthing": 1}]}',
            "expected a whole number as id, a name",
        ),
    ],
)
def test_fault_23_a_malformed_json_is_one_line(text, words, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=1)
    (root / "panoptic_train.json").write_text(text)
    one_refusal(root, f"panoptic_train.json: .*{words}")


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "1e999",
        "1e400",
        "-1",
        "-1e400",
        "99999999999999999999999",
        "16777216",
        "1.5",
        '"70000"',
        "null",
        "[]",
        "{}",
        "[[null]]",
        "true",
    ],
)
def test_fault_23_numbers_that_are_none_are_one_line(value, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=1)
    path = root / "panoptic_train.json"
    text = path.read_text()
    for key, old in (
        ("id", '"id": 70000'),
        ("area", '"area": [0-9]+'),
        ("category_id", '"category_id": [0-9]+'),
        ("image_id", '"image_id": 0'),
        ("images", '"images": [^]]*]'),
    ):
        path.write_text(re.sub(old, f'"{key}": {value}', text, count=1))
        if (key, value) == ("area", "16777216"):
            panoptic.load_folder(root, "1")  # so large an area is possible
        else:
            one_refusal(root, "panoptic_train.json: ", "1")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "../outside.png",
        "a/../../outside.png",
        "",
        ".",
        "a\x00.png",
        "a\nb.png",
        "\ud800.png",
        "n" * 300,
        ["train0.png"],
        None,
        3,
    ],
)
def test_fault_24_names_that_leave_the_data_root_or_are_none_are_refused(name, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    for table in ("images", "annotations"):
        whole = (root / "panoptic_train.json").read_text()
        rewrite(
            root / "panoptic_train.json", lambda content: content[table][1].update(file_name=name)
        )
        one_refusal(root, "panoptic_train.json: .*file_name")
        (root / "panoptic_train.json").write_text(whole)


def test_fault_24_preparation_writes_nowhere_else(tmp_path, monkeypatch):
    base = write_downloads("coco-objects", tmp_path, monkeypatch)
    rewrite(
        base / "annotations" / "panoptic_train2017.json",
        lambda content: content["annotations"][0].update(file_name="../../../stray.png"),
    )
    with pytest.raises(UserError, match="file_name '../../../stray.png' leads out of its folder"):
        prepare.prepare("coco-objects", tmp_path, tmp_path / "assets")
    assert not list(tmp_path.parent.glob("stray.png"))


def test_fault_24_links_stay_in_the_data_root(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    for folder in ("images", "panoptic"):
        path = root / folder / "train1.png"
        outside, inside = tmp_path / f"{folder}.png", root / "raw" / f"{folder}.png"
        inside.parent.mkdir(exist_ok=True)
        shutil.copy(path, inside)
        path.rename(outside)
        path.symlink_to(outside)
        one_refusal(root, f"{path}: is a link that leads out of the data root, to {outside}")
        path.unlink()
        path.symlink_to(Path("..") / "raw" / f"{folder}.png")  # a link within it is no fault
        panoptic.load_folder(root, "2").train.truth(1)
    (root / "images").rename(tmp_path / "disk")
    (root / "images").symlink_to(tmp_path / "disk")  # nor is a whole folder on another disk
    (root / "images" / "train1.png").unlink()
    shutil.copy(root / "raw" / "images.png", root / "images" / "train1.png")
    data.LabeledBatches(panoptic.load_folder(root, "2"), TINY, 1)[0]


@pytest.mark.parametrize(
    "labeled, unlabeled, words",
    [
        ("", None, "labeled.txt: the list is empty"),
        ("\n \n", None, "labeled.txt: the list is empty"),
        (
            "train0.png\nnowhere.png\n",
            None,
            "labeled.txt: 'nowhere.png' is not an image of the training set",
        ),
        ("train0.png\ntrain1.png\ntrain0.png\n", None, "labeled.txt: 'train0.png' is listed twice"),
        (
            "train0.png\n",
            "train1.png\ntrain0.png\n",
            "unlabeled.txt: 'train0.png' is in labeled.txt, too",
        ),
        ("train0.png\n", "", "unlabeled.txt: the list is empty"),
    ],
)
def test_fault_25_lists_that_are_empty_absent_twice_or_overlapping_are_refused(
    labeled, unlabeled, words, tmp_path
):
    root = write_coco_folder(tmp_path / "set", images=3)
    (root / "splits" / "1_3" / "labeled.txt").write_text(labeled)
    if unlabeled is not None:
        (root / "splits" / "1_3" / "unlabeled.txt").write_text(unlabeled)
    one_refusal(root, words, "1_3")


def test_fault_25_fewer_images_than_a_batch_are_taken_again(tmp_path):
    dataset = panoptic.load_folder(write_coco_folder(tmp_path / "set", images=2), "1")
    labeled, unlabeled = data.SemiSupervisedBatches(
        dataset, dataclasses.replace(TINY, labeled_batch=5, unlabeled_batch=3, burn_in=0), 1
    )[0]
    assert (
        labeled.images.shape == (5, 3, 64, 64)
        and len(set(labeled.names)) == 1
        and unlabeled.weak.shape == (3, 3, 64, 64)
    )


def test_fault_29_a_file_that_disappears_after_the_listing_is_named(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    for path in (root / "images" / "train1.png", root / "panoptic" / "train1.png"):
        dataset, whole = panoptic.load_folder(root, "2"), path.read_bytes()
        checks.require_files(dataset.train, range(2), "training")
        path.unlink()
        with pytest.raises(UserError, match=f"{path}: no such file"):
            data.LabeledBatches(dataset, TINY, 1)[0]
        path.write_bytes(whole)


def test_fault_29_unicode_spaces_long_names_and_a_read_only_folder_are_no_fault(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "a set with späces")
    names = [
        "ein Bild.png",
        "写真 1.png",
        "a\u202fb.png",
        "x" * 250 + ".png",
        "sub folder/üñí.png",
        "..dots..png",
    ]
    for kind in ("images", "panoptic"):
        (root / kind / "sub folder").mkdir()
        for i, name in enumerate(names):
            (root / kind / f"train{i}.png").rename(root / kind / name)

    def change(content):
        for image, annotation, name in zip(content["images"], content["annotations"], names):
            image["file_name"] = annotation["file_name"] = name

    rewrite(root / "panoptic_train.json", change)
    (root / "splits" / "1_3" / "labeled.txt").write_text(
        "\ufeff" + "\r\n".join(names[:4]), encoding="utf-8"
    )
    paths = [root, *root.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        dataset, before = panoptic.load_folder(root, "1_3"), fingerprint(root)
        assert [dataset.train.name(i) for i in dataset.labeled] == names[:4] and [
            dataset.train.name(i) for i in dataset.unlabeled
        ] == names[4:]
        out, _, content = validated(root, "--split", "1_3", code=0, capsys=capsys)
        assert content["counts"]["training"]["images"] == 6 and fingerprint(root) == before
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_fault_30_an_index_keeps_flat_arrays_whatever_the_number_of_images(tmp_path):
    objects = []
    for images in (1, 6):
        folder = panoptic.load_folder(
            write_coco_folder(tmp_path / f"set{images}", images=images), "1"
        ).train
        objects.append(
            sum(
                len(value)
                for value in vars(folder).values()
                if isinstance(value, (list, dict, set, tuple))
            )
        )
        assert len(folder.names) == images and folder.segments.dtype == np.int64
    assert objects[0] == objects[1]


def test_fault_33_segment_ids_use_all_three_bytes(tmp_path):
    ids = np.array([[0, 1, 255, 256], [65_535, 65_536, 70_000, (1 << 24) - 1]], np.int32)
    prepare.encode(ids).save(tmp_path / "ids.png")
    assert np.array_equal(panoptic.segment_ids(tmp_path / "ids.png"), ids)


def test_the_next_thing_is_read_while_this_one_is_worked_on_and_no_other():
    begun, go_on = [], threading.Event()

    def read(item):
        begun.append(item)
        if item == 1:
            assert go_on.wait(10)  # the caller has item 0 before item 1 is read
        if item == 2:
            raise UserError("two")
        return 10 * item

    things = ahead(iter(range(4)), read)
    item, get = next(things)
    go_on.set()
    assert (item, get()) == (0, 0)
    item, get = next(things)
    assert (item, get()) == (1, 10)
    assert begun in ([0, 1], [0, 1, 2])  # the one after, and no more
    item, get = next(things)
    with pytest.raises(UserError, match="two"):  # where it is asked for
        get()
    assert [(item, get()) for item, get in things] == [(3, 30)]
    assert list(ahead([], read)) == [] and begun == [0, 1, 2, 3]
    threads = threading.active_count()
    things = ahead(range(9), lambda item: item)
    next(things)
    things.close()  # as whoever is stopped does
    assert threading.active_count() == threads


@pytest.mark.parametrize("turn, said", [(3, True), (1, False)])
def test_validate_says_which_annotated_images_are_turned(turn, said, tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set", images=2)
    with Image.open(root / "images" / "train1.png") as image:
        exif = image.getexif()
        exif[274] = turn
        image.save(root / "images" / "train1.png", exif=exif)
    out, _, _ = validated(root, code=0, capsys=capsys)
    assert ("1 annotated images are turned as their EXIF says" in out) == said


def test_a_name_without_its_ending_has_to_be_that_of_one_image(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set", images=2)
    rewrite(
        root / "panoptic_train.json",
        lambda c: c["images"].append(
            {"id": 99, "file_name": "train0.jpg", "width": 12, "height": 10}
        ),
    )
    photo(root / "images" / "train0.jpg", (12, 10))
    (root / "one.txt").write_text("train0\n")
    one_refusal(root, "'train0' is the name of several images but for", str(root / "one.txt"))
    (root / "one.txt").write_text("train0.png\n")
    dataset = panoptic.load_folder(root, str(root / "one.txt"))
    assert [dataset.train.name(i) for i in dataset.labeled] == ["train0.png"]
