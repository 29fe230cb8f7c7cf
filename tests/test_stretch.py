"""Images of differing exposure: stretched alike by every reader, and by whoever goes on with a run."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import dearli
from config import BEFORE, CUSTOM, MINI, OFFICIAL
from engine import begin
from engine.flags import configure
from engine.parser import parser
from engine.stored import Stored
from mini.scenes import load_mini
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


@pytest.mark.parametrize("ground, thing", [(255, 60), (0, 200), (130, 131)])
def test_a_small_object_on_an_even_ground_is_not_lost(ground, thing):
    values = np.full((100, 100), ground, np.uint8)
    values[0, :9] = thing  # 0.09 %: outside of both percentiles on either side
    found = stretched(values)
    assert set(found[0, :9]) == {255 * (thing > ground)} != set(found[1])
    assert np.array_equal(stretched(found), found)


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "tif"])
def test_a_picture_of_16_bits_that_is_open_gives_the_same_as_its_file_every_time(kind, tmp_path):
    deep = np.random.default_rng(0).integers(300, 900, (20, 30, 4)).astype(np.uint16)
    path = tmp_path / ("a.tif" if kind == "tif" else "a.png")
    if kind == "tif":
        tifffile.imwrite(path, deep[..., :3], photometric="rgb")
    else:
        png_of_16_bits(path, deep[..., : len(kind)])
    expected = np.asarray(pictures.open_image(path, stretch=True))
    assert np.array_equal(expected, stretched(deep[..., :3]))
    with Image.open(path) as image:
        for _ in range(3):  # after the first time it is read, and says RGB of 8 bits
            assert np.array_equal(np.asarray(pictures.as_rgb(image, stretch=True)), expected)
    image.load()
    by_white = np.asarray(pictures.as_rgb(image, 1023))
    assert np.array_equal(by_white, deep[..., :3] >> 2)
    image.thumbnail((10, 10))
    with pytest.raises(ValueError, match="no longer as large as in its file"):
        pictures.as_rgb(image, stretch=True)


def test_a_picture_that_is_read_needs_its_file_no_more(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 99, (9, 9, 3)).astype(np.uint8)).save(path)
    image = Image.open(path)
    expected = np.asarray(pictures.as_rgb(image, stretch=True))
    path.unlink()
    assert np.array_equal(np.asarray(pictures.as_rgb(image, stretch=True)), expected)
    path.write_text("something else")
    assert np.array_equal(np.asarray(pictures.as_rgb(image, stretch=True)), expected)


def test_a_frame_of_16_bits_has_its_own_lower_bits(tmp_path):
    deep = np.random.default_rng(0).integers(0, 60000, (3, 20, 30, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "stack.tif", deep, photometric="rgb")
    with Image.open(tmp_path / "stack.tif") as stack:
        for k in (2, 0, 1):
            stack.seek(k)
            for _ in range(2):
                assert np.array_equal(pictures.values_of(stack), deep[k])


def test_stretched_images_have_no_white_point_and_are_other_images(tmp_path):
    png_of_16_bits(tmp_path / "a.png", np.arange(600, dtype=np.uint16).reshape(20, 30))
    plain, images = (pictures.ImageFolder(tmp_path) for _ in range(2))
    exposure.see(0, False, plain)
    exposure.see(0, True, images)
    assert (plain.white, images.white) == (1023, 65535)
    assert np.asarray(plain.image(0)).max() < 160 < np.asarray(images.image(0)).max()
    assert plain.digest(0) != images.digest(0)


def test_empty_images_and_what_stretching_makes_black_or_white_are_named(tmp_path):
    rng = np.random.default_rng(0)
    made = {
        "noise": rng.integers(96, 105, (64, 64)),
        "rich": rng.integers(0, 256, (64, 64)),
        "dark": rng.integers(253, 256, (64, 64)),  # and an object of 1 % on top
        "speck": rng.integers(253, 256, (64, 64)),  # and a pixel, as sensors have
    }
    made["dark"][:8, :5] = 60
    made["speck"][0, 0] = 0
    for name, values in made.items():
        Image.fromarray(values.astype(np.uint8)).convert("RGB").save(tmp_path / f"{name}.png")
    found = {}
    for name in made:
        path = tmp_path / f"{name}.png"
        for stretch in (False, True):
            image = pictures.open_image(path, stretch=stretch)
            found[name, stretch] = exposure.doubts(path, image, 65535, stretch)
    assert found == {
        ("noise", False): {"little": "96 to 104"},
        ("noise", True): {"little": "96 to 104"},
        ("rich", False): {},
        ("rich", True): {},
        ("dark", False): {},
        ("dark", True): {"cut off": "1.0%"},
        ("speck", False): {},
        ("speck", True): {},
    }


def test_the_miniature_world_is_not_stretched_whatever_the_preset(capsys):
    assert not begin.settle(CUSTOM, load_mini("16")).stretch
    small = ("--preset", "custom", "--crop", 64, "--window", 64, "--no-eval", "--steps", 1)
    flags = ["--stage", "sup", "--dataset", "mini", "--split", "16", *small, "--dry-run"]
    assert dearli.main([str(word) for word in flags]) == 0
    assert "stretch False" in capsys.readouterr().out
    assert dearli.main([str(word) for word in [*flags, "--stretch"]]) == 2
    assert "--stretch: images of --dataset mini have 8 bits" in capsys.readouterr().err


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


def test_what_a_run_saw_stretched_is_not_read_otherwise_without_a_word(tmp_path, capsys):
    root, out = write_coco_folder(tmp_path / "set", images=3), tmp_path / "run"
    flags = ("--split", "1", "--method", "ssl", "--out", out)
    assert run_folder("ssl", root, *flags, "--steps", 1, "--stretch") == 0
    page, main = out / "report.html", ["--stage", "report", "--weights", str(out)]
    written = page.read_bytes()
    assert dearli.main(main) == 0
    page.write_bytes(written)
    capsys.readouterr()
    assert dearli.main([*main, "--no-stretch"]) == 2
    assert "stretch True there, False now) and would be replaced" in capsys.readouterr().err
    assert page.read_bytes() == written
    # a run of before this flag was there knows none, and goes on without
    assert run_folder("ssl", root, *flags, "--steps", 2, "--no-stretch", "--resume") == 2
    said = capsys.readouterr().err
    assert "stretch: True there, False now" in said
    with pytest.raises(TypeError, match="load: stretch='no': expected bool"):
        dearli.load(out, device="cpu", stretch="no")
    assert dearli.load(out, device="cpu", stretch=False).cfg.stretch is False
    assert dearli.load(out, device="cpu", least_quality=np.float32(0.5)).cfg.least_quality == 0.5
    # read without, its images have a white point: the one that is measured
    deep = np.asarray(Image.open(root / "images" / "val0.png").convert("L")).astype(np.uint16) << 4
    for path in sorted((root / "images").iterdir()):
        png_of_16_bits(path, np.minimum(deep, 4095))
    flags = ["--stage", "eval", "--weights", str(out), "--no-stretch", "--out", str(tmp_path / "e")]
    assert dearli.main(flags) == 0 and "lose what is brighter" not in capsys.readouterr().out
    assert configure(parser().parse_args(flags), {"stretch": True, "white": 65535}).white == 0
