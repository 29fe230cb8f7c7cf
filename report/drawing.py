"""Panoptic maps drawn on their images, and pictures of several side by side."""

import functools
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps, features
from scipy import ndimage
from tqdm import tqdm

from ground.colours import shade
from readers.ground_truth import Taxonomy

SIDES = (640, 2560)  # pixels; the long side of an overlay lies between them
PAINT = 0.6  # share of the colour of a segment, the rest is the light of the image
# of the stripes of void: pixels of the long side for each pixel between them, and their share
STRIPE, STRIPED, STRIPE_GREY = 40, 0.25, (105, 105, 105)
ROOM = 0.6  # share of a name that must lie on its segment
FONT_SIZES = (13, 48)  # pixels, least and largest
PIXELS_A_FONT_SIZE = 38  # of the long side, for each pixel of the font
NEAREST = Image.Resampling.NEAREST
OUTLINE = {"stroke_width": 2, "stroke_fill": (25, 25, 25)}  # of names
# Files of usual systems (Linux, macOS, Windows) for class names that Pillow's own font has no
# letters for; the first that has them all is taken.
FONTS = (
    "NotoSansCJK-Regular.ttc, NotoSansCJKsc-Regular.otf, SourceHanSansSC-Regular.otf, "
    "wqy-zenhei.ttc, wqy-microhei.ttc, DroidSansFallbackFull.ttf, DroidSansFallback.ttf, "
    "NotoSans-Regular.ttf, DejaVuSans.ttf, FreeSans.ttf, NotoSansArabic-Regular.ttf, "
    "NotoNaskhArabic-Regular.ttf, NotoSansDevanagari-Regular.ttf, Lohit-Devanagari.ttf, "
    "PingFang.ttc, Hiragino Sans GB.ttc, AppleSDGothicNeo.ttc, Arial Unicode.ttf, msyh.ttc, "
    "msgothic.ttc, malgun.ttf, arial.ttf, Nirmala.ttf, Nirmala.ttc"
).split(", ")


def overlay(
    image: Image.Image,
    segment_map: np.ndarray,
    labels: np.ndarray,
    taxonomy: Taxonomy,
    scores=None,
    names: bool = True,
    side: int | None = None,
) -> Image.Image:
    """A panoptic map drawn on its image: colours by class, shades by instance, borders, and the
    names of segments that have room for them.

    Args: segment_map: (H, W) integers, 0 = void, k = k-th segment;  labels: (N,) classes;
        scores: (N,), written behind the names;  side: pixels of the long side, None: that of the
        image, or the nearest of SIDES (names could not be read on less, nobody needs more).
    The n-th instance of a class has the same colour in every image. Void is grey, dark and
    striped: no answer, or no ground truth.
    """
    if segment_map.shape != image.size[::-1]:
        sizes = f"{image.size[::-1]}, the size of the image, got {segment_map.shape}"
        raise ValueError(f"segment_map: expected {sizes}")
    scale = (side or min(max(*image.size, SIDES[0]), SIDES[1])) / max(image.size)
    size = [max(1, round(s * scale)) for s in image.size]
    smooth = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    image = image.convert("RGB").resize(size, smooth)
    ys, xs = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(size[::-1], segment_map.shape)
    )
    drawn = segment_map.take(ys, 0).take(xs, 1)  # (H', W')
    colours, instances = np.zeros((len(labels) + 1, 3), np.uint8), {}
    for k, label in enumerate(np.asarray(labels).tolist(), 1):
        colours[k] = shade(taxonomy.colours[label], instances.get(label, 0))
        instances[label] = instances.get(label, 0) + 1
    # over its light alone: water painted over sand in its colours would be neither
    light = image.convert("L").convert("RGB")
    canvas = Image.blend(light, Image.fromarray(colours[drawn]), PAINT)
    void, grey = drawn == 0, ImageEnhance.Brightness(light).enhance(0.4)
    canvas.paste(grey, mask=Image.fromarray(void))
    canvas.paste(STRIPE_GREY, mask=Image.fromarray(void & _stripes(drawn.shape)))
    width = max(1, round(max(size) / 600))
    dark = ImageEnhance.Brightness(canvas).enhance(0.45)
    canvas.paste(dark, mask=_edges(drawn, 3 * width))
    canvas.paste("white", mask=_edges(drawn, width))
    if names:
        _write_names(canvas, drawn, labels, taxonomy, scores)
    return canvas


def _stripes(shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool, diagonal."""
    ys, xs = np.indices(shape, sparse=True)
    apart = max(6, max(shape) // STRIPE)
    return (ys + xs) % apart < max(1, STRIPED * apart)


def _edges(drawn: np.ndarray, width: int) -> Image.Image:
    """Mask of the pixels around borders between segments, a line so wide."""
    edge = np.zeros(drawn.shape, bool)
    edge[1:] |= drawn[1:] != drawn[:-1]
    edge[:, 1:] |= drawn[:, 1:] != drawn[:, :-1]
    return Image.fromarray(ndimage.maximum_filter(edge.view(np.uint8), width).view(bool))


def picture(
    rows: list[tuple[Image.Image, list[tuple[np.ndarray, np.ndarray]]]],
    titles: list[str],
    taxonomy: Taxonomy,
    path: Path,
    caption: str = "",
    side: int = 256,
) -> None:
    """A PNG with one row an image: the image, then its panoptic maps (segment_map, labels), and a
    legend. titles: of all columns, the image's first;  side: pixels of a cell.
    """
    gap, head, foot, entry = 8, 34, 14 + 18 * len(caption.splitlines()), (175, 22)
    labels = sorted({int(label) for _, maps in rows for _, own in maps for label in own})
    width = len(titles) * (side + gap) + gap
    per_line = max(1, width // entry[0])
    end = head + len(rows) * (side + gap)
    height = end + -(-len(labels) // per_line) * entry[1] + 12 + (foot if caption else 0)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for c, title in enumerate(titles):
        middle = (gap + c * (side + gap) + side / 2, head / 2)
        draw.text(middle, title, "black", _font("", 18), anchor="mm")
    for r, (image, maps) in enumerate(rows):
        cells = [overlay(image, *answer, taxonomy, side=side) for answer in maps]
        for c, cell in enumerate([ImageOps.contain(image, (side, side)), *cells]):
            canvas.paste(cell, (gap + c * (side + gap), head + r * (side + gap)))
    names = written(tuple(taxonomy.short_names), tuple(taxonomy.ids))
    for k, label in enumerate(labels):
        x, y = gap + k % per_line * entry[0], end + 6 + k // per_line * entry[1]
        draw.rectangle((x, y, x + 16, y + 14), swatch(taxonomy.colours[label]), "black")
        text = f"{names[label]} ({'thing' if taxonomy.things[label] else 'stuff'})"
        draw.text((x + 22, y + 7), text, "black", _font(font_of(names[label]), 13), anchor="lm")
    if caption:
        draw.text((gap, height - foot / 2), caption, "black", _font("", 13), anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def swatch(colour: tuple) -> tuple[int, int, int]:
    """A colour as it is drawn, over a middle grey."""
    return tuple(round(PAINT * c + (1 - PAINT) * 128) for c in colour)


@functools.lru_cache(maxsize=64)
def written(names: tuple[str, ...], ids: tuple[int, ...]) -> tuple[str, ...]:
    """What pictures call classes: names, or `#` and the category id of one that no font writes.

    Which is which is said once, in one line.
    """
    # a letter and its accent as one character, where there is one
    names = [unicodedata.normalize("NFC", name) for name in names]
    shown = [f"#{id_}" if font_of(name) is None else name for name, id_ in zip(names, ids)]
    changed = [f"{new} {old}" for old, new in zip(names, shown) if new != old]
    if changed:
        tqdm.write(
            "warning: no font here writes every class name; pictures show category ids instead: "
            f"{', '.join(changed)}; a font such as Noto Sans (CJK), and libraqm for Arabic and "
            "Indian scripts, would show the names"
        )
    return tuple(shown)


@functools.lru_cache(maxsize=4096)
def font_of(text: str) -> str | None:
    """A font that has every letter of a text: empty for Pillow's own, or a file of the system.

    None if there is none.

    Arabic, Hebrew and Indian scripts are shaped and ordered by libraqm: without it, they would
    be wrong in any font.
    """
    shaped = any(unicodedata.bidirectional(c) in ("R", "AL") or _is_mark(c) for c in text)
    if shaped and not features.check("raqm"):
        return None
    return next((name for name in ("", *FONTS) if _has(name, text)), None)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Mc")


def _has(name: str, text: str) -> bool:
    font = _font(name, 20)
    if font is None:
        return False

    def drawn(character):
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    missing = drawn("\uffff")  # no character: what a font draws for all that it has not
    unseen = [c.isspace() or _is_mark(c) or unicodedata.category(c) == "Cf" for c in text]
    return all(skip or drawn(c) != missing for c, skip in zip(text, unseen))


@functools.lru_cache(maxsize=256)
def _font(name: str | None, size: int):
    """A font of `font_of`, so many pixels high; None for a file that the system has not."""
    if not name:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _write_names(
    canvas: Image.Image, drawn: np.ndarray, labels: np.ndarray, taxonomy: Taxonomy, scores
) -> None:
    """Write the name of each segment where the most of it lies on the segment and on no other
    name, near its middle; large ones first.
    """
    least, largest = FONT_SIZES
    size = min(max(max(canvas.size) // PIXELS_A_FONT_SIZE, least), largest)
    names = written(tuple(taxonomy.short_names), tuple(taxonomy.ids))
    draw, boxes = ImageDraw.Draw(canvas), ndimage.find_objects(drawn, len(labels))
    step = max(1, max(canvas.size) // 320)  # names are placed on a coarser grid
    coarse = drawn[step // 2 :: step, step // 2 :: step].copy()
    areas = np.bincount(coarse.ravel(), minlength=len(labels) + 1)[1:]
    for k in np.argsort(-areas, kind="stable"):
        if boxes[k] is None:
            continue
        text = names[labels[k]] + ("" if scores is None else f" {scores[k]:.2f}")
        if font_of(text) is None:  # the font of the name has no digits
            text = names[labels[k]]
        font = _font(font_of(text), size)
        left, top, right, bottom = draw.textbbox((0, 0), text, font, anchor="lt", stroke_width=2)
        w, h = -(-(right - left) // step), -(-(bottom - top) // step)
        place = _place(coarse, k + 1, boxes[k], (h, w), step)
        if place is None:
            continue
        y, x = place
        coarse[y : y + h, x : x + w] = 0  # taken
        corner = (x * step - left, y * step - top)
        draw.text(corner, text, "white", font, anchor="lt", **OUTLINE)


def _place(
    coarse: np.ndarray, k: int, box: tuple[slice, slice], shape: tuple[int, int], step: int
) -> tuple[int, int] | None:
    """The upper left corner (y, x) for a name of this shape on segment k, if it has room.

    coarse: the map, every `step`-th pixel;  box: around the segment, in pixels.
    """
    h, w = shape
    y0, x0 = (max(0, side.start // step - n) for side, n in zip(box, shape))
    y1, x1 = (side.stop // step + n for side, n in zip(box, shape))
    inside = (coarse[y0:y1, x0:x1] == k).astype(np.int32)
    if inside.sum() < ROOM * w * h or inside.shape[0] < h or inside.shape[1] < w:
        return None
    sums = np.pad(inside.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    covered = (sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]) / (w * h)
    middle = np.argwhere(inside).mean(0) - (h / 2, w / 2)
    distance = np.hypot(*(np.indices(covered.shape) - middle[:, None, None]))
    y, x = np.unravel_index(np.argmax(covered - 1e-4 * distance), covered.shape)
    return (y0 + y, x0 + x) if covered[y, x] >= ROOM else None
