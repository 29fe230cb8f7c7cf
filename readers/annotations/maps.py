"""Whole numbers to pixels: image files and arrays whose values are instances or classes, for
Cityscapes and folders of masks. Axes: H W pixels.
"""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from ground.errors import UserError
from readers.annotations.shapes import Draw, Patch, Size
from readers.pictures import FORMATS, brief, open_image

VOC_VOID = (224, 224, 192)  # the colour of what is void in Pascal VOC, 255 of its palette
FRAMED = (".tif", ".tiff", ".gif", ".webp")  # endings of files that may hold several images


def read_map(
    path: Path, size: Size | None = None, colours: str = "", indices: bool = False
) -> tuple[np.ndarray, set[int]]:
    """(H, W) whole numbers of a map (of a palette its indices; of three equal channels one), and
    which of them Pascal VOC's colour says to be void.

    colours: `all`: the numbers are colours, 65536 r + 256 g + b; `any`: where it has colours.
    indices: of a palette of black and white, too; else these are 0 and 255.
    Raises: UserError if it is no such map, or not of this (H, W).
    """
    if path.suffix.lower() == ".npy":
        values, void = _load_array(path), set()
    else:
        values, void = _load_image(path, colours == "all", indices)
    values = values if colours == "all" else _one_channel(values)
    if values.ndim == 3 and values.shape[2] == 3 and values.dtype == np.uint8:
        weights = np.array([65536, 256, 1], np.int32)
        values, void = values.astype(np.int32) @ weights, {int(weights @ VOC_VOID)}
        if not colours:
            raise UserError(f"{path}: {_say_colours(values)}")
    elif colours == "all":
        raise UserError(
            f"{path}: {values.dtype} of shape {values.shape}, and the list has colours; expected "
            "three channels of 8 bits, or --classes 0:NAME,1:NAME,... for whole numbers"
        )
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise UserError(
            f"{path}: {values.dtype} of shape {values.shape}, expected a map of whole numbers with "
            "one channel"
        )
    if size is not None and values.shape != size:
        raise UserError(
            f"{path}: {values.shape[1]} x {values.shape[0]} pixels, but its image has {size[1]} x "
            f"{size[0]} (turned as EXIF says); expected one size"
        )
    return values, void


def draw_values(values: np.ndarray) -> list[tuple[int, Draw]]:
    """Each value of a map, however large, and how to draw it."""
    distinct, places = np.unique(values, return_inverse=True)
    numbers = places.reshape(values.shape).astype(np.int32) + 1
    return [(int(distinct[n - 1]), draw) for n, draw in _numbers(numbers)]


def draw_regions(mask: np.ndarray) -> list[Draw]:
    """How to draw each connected region of a binary mask; corners connect."""
    return [draw for _, draw in _numbers(ndimage.label(mask, np.ones((3, 3)))[0])]


def _numbers(numbers: np.ndarray) -> list[tuple[int, Draw]]:
    """Each number from 1 on that is in an (H, W) map, and how to draw it."""

    def draw(n: int, where: tuple[slice, slice]) -> Patch:
        return where[0].start, where[1].start, numbers[where] == n

    places = enumerate(ndimage.find_objects(numbers), 1)
    return [(n, partial(draw, n, where)) for n, where in places if where]


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a readable array ({brief(str(error))})") from None


def _say_colours(values: np.ndarray) -> str:
    found, counts = np.unique(values, return_counts=True)
    common = [f"#{found[k]:06x} ({counts[k] / values.size:.0%})" for k in np.argsort(-counts)[:3]]
    return (
        f"has {len(found)} colours, as {', '.join(common)}; expected a map of whole numbers with "
        "one channel; or what they mean: of classes --masks-are classes with --classes "
        "'#804080:NAME,...' or a list of colours beside them (class_dict.csv, labelmap.txt); of "
        "instances, each of its own colour, --masks-are instances"
    )


def _load_image(path: Path, coloured: bool, indices: bool) -> tuple[np.ndarray, set[int]]:
    """coloured: as (H, W, 3), if it has 8 bits.   indices: as of `read_map`."""
    image = open_image(path, None)
    if path.suffix.lower() in FRAMED:
        with Image.open(path, formats=FORMATS) as whole:
            frames = getattr(whole, "n_frames", 1)
        if frames > 1:
            raise UserError(
                f"{path}: has {frames} frames, expected one map; save them as files of their own"
            )
    if coloured and not image.mode.startswith(("I", "F")):
        shown = np.asarray(image.convert("RGBA"))
        if (shown[..., 3] < 255).any():
            raise UserError(
                f"{path}: has pixels that are clear, whose colour nobody sees; save it without "
                "transparency"
            )
        return shown[..., :3], set()
    if image.mode != "P":
        return np.asarray(image), set()
    colours = image.getpalette() or ()
    void = {255} if len(colours) == 768 and tuple(colours[-3:]) == VOC_VOID else set()
    return np.asarray(image) if indices else _black_and_white(image), void


def _one_channel(values: np.ndarray) -> np.ndarray:
    """Without an alpha channel in which no pixel is clear; of three equal channels one; of
    fractions that are whole numbers those."""
    if values.ndim == 3 and values.shape[2] in (2, 4) and (values[..., -1] == 255).all():
        values = values[..., :-1] if values.shape[2] == 4 else values[..., 0]
    if values.ndim == 3 and values.shape[2] == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim == 2 and values.dtype.kind == "f":
        whole = (values == np.floor(values)).all() and (np.abs(values) < 2**31).all()
        values = values.astype(np.int64) if whole else values
    return values


def _black_and_white(image: Image.Image) -> np.ndarray:
    """(H, W) indices of a map with a palette; of one of black and white alone 0 and 255, since
    some tools make white the first of the two."""
    indices = np.asarray(image)
    colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
    used = np.unique(indices)
    white = (colours == 255).all(1)
    plain = (white | (colours == 0).all(1)).all() and white.any() and not white.all()
    if not plain or used[-1] >= len(colours) or np.bincount(white[used]).max() > 1:
        return indices
    return np.where(white[indices], 255, 0).astype(np.uint8)
