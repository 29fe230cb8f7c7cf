"""What a network will see, before a run: --dry-run --report."""

import base64
import dataclasses
import json
import math
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

from config import MINI
from data import PAD_VALUE, labeled_view
from engine.method import find
from engine.parser import parser
from engine.resolve import resolve
from mean_teacher import mix_images
from readers.ground_truth import Truth
from report import views
from tests.helpers import fitting, log_of, run, run_folder, write_coco_folder
from tests.test_page import Outline

SSL = ["--stage", "ssl", "--steps", 6, "--dry-run"]


def words(folder):
    """Of the one page in a folder, and how many pictures it has."""
    (path,) = folder.glob("*-views.html")
    page = path.read_text()
    outline = Outline(page)
    pictures = re.findall(r'src="data:image/webp;base64,([^"]*)"', page)
    assert all(base64.b64decode(picture)[8:12] == b"WEBP" for picture in pictures)
    assert all(a.startswith(("data:", "#")) for a in outline.addresses)
    return path.name, outline.text, len(pictures)


def test_a_dry_run_writes_a_page_of_the_views_and_nothing_else(small_mini, tmp_path, capsys):
    dear = ["--stage", "ssl", "--method", "dear", "--steps", 4, "--burn-in", 1]
    dear += ["--cutmix-prob", 1.0, "--runs", tmp_path]
    assert run(*dear, "--dry-run", "--report") == 0
    assert [path.name for path in tmp_path.rglob("*")] == ["mini-dear-4-views.html"]
    assert f"views      {tmp_path / 'mini-dear-4-views.html'}: " in capsys.readouterr().out
    _, text, pictures = words(tmp_path)
    # 6 labelled images: as they are, view, target;  6 unlabelled ones: weak, strong, mixed
    assert pictures == 6 * 3 + 6 * 4 and text.count("with CutMix") == 6 + 1
    assert "4 labelled, 8 unlabelled, 4 for validation" in text
    assert "The views of step 2 and after" in text  # before it there is a burn-in
    assert "there are 8 queries" in text and "64 x 64 pixels, cut from" in text


def test_the_views_are_those_of_the_steps_of_the_run(small_mini):
    args = parser().parse_args(fitting([*SSL, "--method", "dear", "--cutmix-prob", "0.5"]))
    request = resolve(args)
    cfg, dataset = request["cfg"], request["source"].load(request["cfg"])
    batches = find("dear")(cfg, dataset.taxonomy, request["machine"].device).batches(dataset)
    labeled, unlabeled = views.look(batches)
    assert len(labeled) == len(unlabeled) == 2 * 3  # two a step, from step 3 on
    for step in (3, 4, 5):
        ours, (first, second) = slice(2 * step - 6, 2 * step - 4), batches[step]
        seen = [view.image for view in labeled[ours]]
        assert torch.equal(torch.stack(seen), first.images)
        assert [len(view.target) for view in labeled[ours]] == [*map(len, first.targets)]
        mixed = mix_images(second.strong, second.partner_strong, second.boxes)
        for view, box, expected in zip(unlabeled[ours], second.boxes, mixed):
            assert (view.mixed is None) == (box is None)
            assert box is None or torch.equal(view.mixed, expected)
        assert torch.equal(torch.stack([v.image for v in unlabeled[ours]]), second.weak)
    assert {view.mixed is None for view in unlabeled} == {True, False}


@pytest.mark.parametrize(
    "flags, pictures, said",
    [
        ("--stage ssl --method pldc", 4 * 3 + 2 * 3, "Every image comes twice"),
        ("--stage ssl --method esl --cutmix-prob 0", 2 * 3 + 2 * 3, "of 2 views"),
        ("--stage dewa --points-per-side 2 --pred-iou-thresh 0", 4 * 3, "2 with masks"),
        ("--stage sup --crop 96 --crop-height 64", 4 * 3, "96 x 64 pixels, cut from"),
    ],
)
def test_every_kind_of_target_has_its_page(flags, pictures, said, small_mini, tmp_path):
    flags = [*flags.split(), "--steps", 2, "--dry-run", "--report", "--runs", tmp_path]
    assert run(*flags) == 0
    assert len([*tmp_path.rglob("*")]) == 1
    _, text, there = words(tmp_path)
    assert there == pictures and said in text
    assert ("SAM masks" in text) == ("dewa" in flags)
    assert ("Unlabelled images" in text) == ("ssl" in flags)


def test_a_crop_may_be_less_high_than_wide():
    bands = np.repeat(np.arange(96)[:, None] // 14, 96, 1).astype(np.int32)  # 0, void, to 6
    picture = Image.fromarray(np.stack([30 * bands.astype(np.uint8)] * 3, -1))
    truth = Truth(bands, np.arange(6), np.bincount(bands.ravel())[1:], np.zeros(6, bool))
    wide = dataclasses.replace(MINI, crop=64, crop_height=32, scale_min=1.5, scale_max=1.5)
    for seed in range(6):  # 96 x 96, as it is
        image, target = labeled_view(picture, truth, wide, random.Random(seed), colour=False)
        assert image.shape == (3, 32, 64)
        shown = torch.cat([torch.tensor([0]), 30 * (target.labels + 1)])[target.segment_map.long()]
        assert torch.equal(shown, image[0].long()) and 2 <= len(image.unique()) <= 4
    small = dataclasses.replace(wide, scale_min=0.3, scale_max=0.3)  # 19 x 19, padded
    image, target = labeled_view(picture, truth, small, random.Random(0), colour=False)
    assert image.shape == (3, 32, 64) and target.segment_map.shape == (32, 64)
    for side in (np.s_[19:], np.s_[:, 19:]):
        assert not target.segment_map[side].any() and (image[0][side] == PAD_VALUE).all()


@pytest.mark.parametrize("method", ["dear", "pldc", "guided", "esl", "hard"])
def test_every_method_learns_from_such_views(method, small_mini, tmp_path):
    steps = ["--steps", 3, "--burn-in", 1, "--no-eval", "--crop", 96, "--crop-height", 64]
    assert run("--stage", "ssl", "--method", method, *steps, "--out", tmp_path) == 0
    rows = log_of(tmp_path)
    assert all(math.isfinite(row["loss"]) for row in rows) and len(rows) == 3
    assert any(name.startswith("unlabeled") for name in rows[-1])


def test_a_page_of_ones_own_images_says_how_wide_objects_are(tmp_path):
    root = write_coco_folder(tmp_path / "set")
    path = root / "panoptic_train.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "a<b>.png"
    path.write_text(json.dumps(content))
    (root / "images" / "train0.png").rename(root / "images" / "a<b>.png")
    all_of_them = ["--steps", 1, "--labeled-batch", 6]
    assert run_folder("sup", root, *all_of_them, "--dry-run", "--report") == 0
    name, text, _ = words(tmp_path)
    assert name == "set-sup-all-views.html" and "a<b>.png" in text
    assert "labelled objects are" in text and re.search(r"those of \d+ are seen \d+ wide", text)


def test_the_page_is_one_of_a_dry_run(small_mini, tmp_path, capsys):
    assert run("--stage", "sup", "--report", "--runs", tmp_path) == 2
    assert "--report: it counts with --dry-run" in capsys.readouterr().err
