"""Pictures of more pixels than fit in memory: read, predicted and written by parts."""


import numpy as np
import pytest
import tifffile

from ground.errors import UserError
from readers import large, pictures
from readers.large import LargeImage

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
    image = LargeImage(tmp_path / "a.tif", white=65535)
    assert image.size == SHAPE[::-1]
    whole = (values >> 8 if kind == "u2" else values).astype(np.uint8)
    whole = np.repeat(whole, 3, 2) if channels == 1 else whole[..., :3]
    for _ in range(30):
        left, top = rng.integers(0, SHAPE[1]), rng.integers(0, SHAPE[0])
        right, bottom = rng.integers(left, SHAPE[1]) + 1, rng.integers(top, SHAPE[0]) + 1
        part = np.asarray(image.crop((left, top, right, bottom)))
        assert np.array_equal(part, whole[top:bottom, left:right])
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
