"""Images of differing exposure: stretched alike by every reader, and by whoever goes on with a run."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from config import BEFORE, CUSTOM, MINI, OFFICIAL
from engine import begin
from engine.stored import Stored
from readers import exposure, pictures
from readers.stretch import BRIGHT, DARK, counts, ramp
from tests.helpers import log_of, png_of_16_bits, run_folder, write_coco_folder


def stretched(values):
    return ramp(counts(values))[values]


@pytest.mark.parametrize("kind, top", [("u1", 256), ("u1", 40), ("u2", 65536), ("u2", 700)])
def test_the_percentiles_become_black_and_white_and_nothing_moves_the_second_time(kind, top):
    values = np.random.default_rng(top).gamma(2.0, top / 16, (90, 70)).clip(0, top - 1).astype(kind)
    low, high = np.percentile(values, [100 * DARK, 100 * BRIGHT], method="inverted_cdf")
    expected = ((values - float(low)) / (high - low) * 255).clip(0, 255)
    once = stretched(values)
    assert once.dtype == np.uint8 and np.abs(once - expected).max() <= 0.5
    assert (once == 0).mean() >= DARK and (once == 255).mean() >= 1 - BRIGHT
    assert np.array_equal(stretched(once), once)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_an_image_of_one_value_is_black(value):
    assert not stretched(np.full((5, 4, 3), value, np.uint8)).any()


def test_every_kind_of_file_is_stretched_by_all_its_bits(tmp_path):
    rng = np.random.default_rng(0)
    deep = rng.integers(300, 900, (40, 30, 4)).astype(np.uint16)
    colour, grey = stretched(deep[..., :3]), stretched(deep[..., 0])
    png_of_16_bits(tmp_path / "grey.png", deep[..., 0])
    png_of_16_bits(tmp_path / "rgba.png", deep)
    tifffile.imwrite(tmp_path / "rgb.tif", deep[..., :3], photometric="rgb")
    files = {"grey.png": np.repeat(grey[..., None], 3, 2), "rgba.png": colour, "rgb.tif": colour}
    flat = (deep[..., :3] >> 4).astype(np.uint8)
    Image.fromarray(flat).save(tmp_path / "eight.png")
    Image.fromarray(flat[..., 0]).convert("P").save(tmp_path / "palette.png")
    files["eight.png"] = stretched(flat)
    files["palette.png"] = np.repeat(stretched(flat[..., 0])[..., None], 3, 2)
    for name, expected in files.items():
        image = pictures.open_image(tmp_path / name, stretch=True)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected), name
        assert len(np.unique(expected)) > 30, name  # the 8 upper bits of `deep` have 3
    turned = Image.fromarray(flat)
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    image = np.asarray(pictures.open_image(tmp_path / "turned.png", stretch=True))
    assert np.array_equal(image, np.rot90(stretched(flat), -1))


def test_stretched_images_have_no_white_point_and_are_other_images(tmp_path):
    png_of_16_bits(tmp_path / "a.png", np.arange(600, dtype=np.uint16).reshape(20, 30))
    plain, images = (pictures.ImageFolder(tmp_path) for _ in range(2))
    exposure.see(0, False, plain)
    exposure.see(0, True, images)
    assert (plain.white, images.white) == (1023, 65535)
    assert np.asarray(plain.image(0)).max() < 160 < np.asarray(images.image(0)).max()
    assert plain.digest(0) != images.digest(0)


def test_only_the_preset_for_images_of_ones_own_stretches_and_no_run_of_before_did():
    assert CUSTOM.stretch and not MINI.stretch and not OFFICIAL.stretch and not BEFORE["stretch"]


@pytest.mark.parametrize("warm", [True, False])
def test_a_run_says_that_what_it_starts_from_saw_another_exposure(warm, capsys):
    for stretch in (True, False):
        cfg = dataclasses.replace(CUSTOM, stretch=stretch)
        begin.say_other_sight(Stored(Path("warm"), {"config": {"stretch": warm}}), cfg)
        said = capsys.readouterr().out
        assert ("saw images stretched" in said) == (warm and not stretch)
        assert ("saw images as they are" in said) == (stretch and not warm)


def test_a_run_does_not_depend_on_the_exposure_of_its_images(tmp_path):
    losses = {}
    for name, share in (("bright", 1), ("dark", 2)):
        root = write_coco_folder(tmp_path / name, images=3)
        for path in sorted((root / "images").iterdir()):
            even = np.asarray(Image.open(path).convert("RGB")) & 254
            Image.fromarray(even // share).save(path)
        for flag in ("--stretch", "--no-stretch"):
            out = tmp_path / name / flag
            flags = ("--split", "1", "--steps", 2, "--no-eval", "--out", out, flag)
            assert run_folder("ssl", root, *flags, "--method", "ssl") == 0
            losses[name, flag] = [row["loss"] for row in log_of(out)]
            stored = json.loads((out / "config.json").read_text())
            assert stored["stretch"] == (flag == "--stretch")
    assert len(losses["dark", "--stretch"]) == 2
    assert losses["dark", "--stretch"] == losses["bright", "--stretch"]
    assert losses["dark", "--no-stretch"] != losses["bright", "--no-stretch"]
