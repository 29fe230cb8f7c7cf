"""Pictures of more pixels than fit in memory: read, predicted and written by parts."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from ground.errors import UserError
from mini import microcosm
from readers import large, pictures, stretch
from readers.large import LargeImage
from readers.stretch import counts, ramp
from tests.helpers import run

SHAPE = 133, 217
WAYS = {
    "in tiles": {"tile": (64, 48), "compression": "zlib"},
    "in strips": {"rowsperstrip": 7, "compression": "zlib"},
    "in one piece": {},
    "of a big-endian machine": {"byteorder": ">", "tile": (32, 32), "predictor": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind, channels", [("u1", 1), ("u1", 3), ("u1", 4), ("u2", 1), ("u2", 3)])
def test_parts_of_a_tiff_are_those_of_the_whole(way, kind, channels, tmp_path, monkeypatch):
    rng, options = np.random.default_rng(0), dict(WAYS[way])
    values = rng.integers(0, np.iinfo(kind).max, (*SHAPE, channels)).astype(kind)
    if options.get("predictor"):
        options["compression"] = "zlib"
    options["photometric"] = "minisblack" if channels == 1 else "rgb"
    stored = values[..., 0] if channels == 1 else values
    tifffile.imwrite(tmp_path / "a.tif", stored, **options)
    monkeypatch.setattr(large, "KEPT", 20_000)  # bytes: a few tiles
    monkeypatch.setattr(large, "BAND", 50)  # rows: the last ones are fewer
    monkeypatch.setattr(stretch, "PIECE", 1000)
    stretched = LargeImage(tmp_path / "a.tif", stretch=True)
    image = LargeImage(tmp_path / "a.tif", white=65535)
    assert image.size == SHAPE[::-1]
    whole = (values >> 8 if kind == "u2" else values).astype(np.uint8)
    whole = np.repeat(whole, 3, 2) if channels == 1 else whole[..., :3]
    clear = values[..., :3]
    clear = np.broadcast_to(ramp(counts(clear))[clear], whole.shape)
    for _ in range(30):
        left, top = rng.integers(0, SHAPE[1]), rng.integers(0, SHAPE[0])
        right, bottom = rng.integers(left, SHAPE[1]) + 1, rng.integers(top, SHAPE[0]) + 1
        part = np.asarray(image.crop((left, top, right, bottom)))
        assert np.array_equal(part, whole[top:bottom, left:right])
        part = np.asarray(stretched.crop((left, top, right, bottom)))
        assert np.array_equal(part, clear[top:bottom, left:right])
        assert image.bytes == sum(tile.nbytes for tile in image.kept.values())
        assert image.bytes <= 20_000 or len(image.kept) == 1


def test_sixteen_bits_of_a_large_tiff_become_eight_by_the_white_point(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0, 1000, 4095, 9999]], np.uint16))
    part = LargeImage(tmp_path / "a.tif", white=4095).crop((0, 0, 4, 1))
    with pictures.opened(tmp_path / "a.tif") as small:
        assert np.array_equal(np.asarray(part), np.asarray(pictures.as_rgb(small, 4095)))


def test_what_cannot_be_read_by_parts_is_refused_in_one_line(tmp_path, monkeypatch):
    grey, colour = np.zeros(SHAPE, np.uint8), np.zeros((3, *SHAPE), np.uint8)
    cases = {
        "expected 8 or 16 bits": (grey.astype(np.float32), {}),
        "expected pixel by pixel": (colour, {"photometric": "rgb", "planarconfig": "separate"}),
        "save it upright": (grey, {"extratags": [(274, 3, 1, 6, True)]}),
        "save it in tiles": (grey, {"rowsperstrip": SHAPE[0], "compression": "zlib"}),
    }
    monkeypatch.setattr(large, "PIECE", 100 * 100)
    for words, (values, options) in cases.items():
        tifffile.imwrite(tmp_path / "a.tif", values, **options)
        with pytest.raises(UserError, match=words) as error:
            LargeImage(tmp_path / "a.tif")
        assert "\n" not in str(error.value) and "a.tif" in str(error.value)
    (tmp_path / "a.tif").write_bytes(b"II*\0 and no more")
    with pytest.raises(UserError, match="not a readable TIFF"):
        LargeImage(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "a.tif", grey + 7, tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        place = file.pages[0].dataoffsets[1]
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[place : place + 8] = b"rubbish!"
    (tmp_path / "a.tif").write_bytes(content)
    image = LargeImage(tmp_path / "a.tif")
    image.crop((0, 0, 64, 64))
    with pytest.raises(UserError, match="piece 1 of the image cannot be decoded"):
        image.crop((0, 0, 65, 1))


def test_a_large_picture_is_predicted_by_parts_as_it_is_as_a_whole(
    small_run, tmp_path, monkeypatch, capsys
):
    scene = np.tile(microcosm.scene("val", 0).image, (1, 2, 1))
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", scene, tile=(64, 64), photometric="rgb")
    Image.fromarray(scene[:60, :60]).save(tmp_path / "in" / "b.png")
    flags = ["--stage", "predict", "--weights", small_run / "run", "--input", tmp_path / "in"]
    flags += ["--seen-width", 20, "--object-width", 20, "--window", 64, "--device", "cpu"]
    assert run(*flags, "--out", tmp_path / "whole") == 0
    monkeypatch.setattr(pictures, "MAX_PIXELS", 5000)
    killed = tmp_path / "parts" / "panoptic" / ".a.tif.tif.123.tmp"
    killed.parent.mkdir(parents=True)
    killed.write_bytes(b"what a call that was killed has left")
    assert run(*flags, "--out", tmp_path / "parts") == 0
    results = [json.loads((tmp_path / k / "panoptic.json").read_text()) for k in ("whole", "parts")]
    whole, parts = ({a["image_id"]: a for a in r["annotations"]} for r in results)
    assert parts["b.png"] == whole["b.png"] and parts["a.tif"]["file_name"] == "a.tif.tif"
    assert parts["a.tif"]["segments_info"] == whole["a.tif"]["segments_info"]
    assert len(parts["a.tif"]["segments_info"]) > 1
    assert results[0]["images"] == results[1]["images"]
    coded = np.asarray(Image.open(tmp_path / "whole" / "panoptic" / "a.tif.png")).astype(int)
    ids = tifffile.imread(tmp_path / "parts" / "panoptic" / "a.tif.tif")
    assert np.array_equal(ids, coded @ (1, 256, 65536))
    classes = tifffile.imread(tmp_path / "parts" / "semantic" / "a.tif.tif")
    assert np.array_equal(classes, Image.open(tmp_path / "whole" / "semantic" / "a.tif.png"))
    tables = [(tmp_path / k / "objects.csv").read_text() for k in ("whole", "parts")]
    assert tables[0] == tables[1]
    left = [p.name for p in (tmp_path / "parts").rglob(".*")]
    assert left == [] and (tmp_path / "parts" / "overlay" / "a.tif.png").exists()
    capsys.readouterr()
    assert run(*flags, "--out", tmp_path / "parts", "--resume") == 0
    assert "2 pictures, 0 of them made now" in capsys.readouterr().out
    assert run(*flags, "--out", tmp_path / "parts") == 2  # nothing is overwritten
    assert "exists already" in capsys.readouterr().err


def test_a_picture_too_large_to_be_seen_whole_is_refused_by_a_run_that_sees_images_whole(
    small_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 5000)
    (tmp_path / "in").mkdir()
    for name in ("a.tif", "b.png"):
        Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(tmp_path / "in" / name)
    flags = ["--stage", "predict", "--weights", small_run / "run", "--device", "cpu"]
    assert run(*flags, "--input", tmp_path / "in", "--out", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert "a.tif: 100 x 100 pixels are too many to be seen at once" in out
    assert "let it see windows with --window" in out and "2 of 2 pictures could not" in err
    assert "b.png: its header states more than" in out and "cut it into tiles" in out
