"""What a person looks at: tables of figures, panoptic maps drawn on their images, and pictures of several side by side."""

import functools
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps, features
from scipy import ndimage
from tqdm import tqdm

from ground.colours import shade
from readers.ground_truth import Taxonomy

COLUMNS = (
    ("PQ", ("all", "pq")),
    ("PQ things", ("things", "pq")),
    ("PQ stuff", ("stuff", "pq")),
    ("SQ", ("all", "sq")),
    ("RQ", ("all", "rq")),
    ("mIoU", ("miou",)),
)
SIDES = (640, 2560)  # pixels; the long side of an overlay lies between them
PAINT = 0.55  # share of the colour of a segment, the rest is the image
ROOM = 0.6  # share of a name that must lie on its segment
FONT_SIZE, PIXELS_A_FONT_SIZE = (
    (13, 48),
    38,
)  # in pixels; least and largest, and so much of the long side for each pixel of the font
# Files of usual systems (Linux, macOS, Windows) for class names that Pillow's own font has no
# letters for; the first that has them all is taken.
FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "FreeSans.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoNaskhArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "Lohit-Devanagari.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "AppleSDGothicNeo.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "msgothic.ttc",
    "malgun.ttf",
    "arial.ttf",
    "Nirmala.ttf",
    "Nirmala.ttc",
)


def figure(metrics: dict | None, keys: tuple[str, ...]) -> float | None:
    """A figure of one reading, as ("things", "pq"); None if it is not there, or is over nothing:
    `evaluation.evaluate` gives 0 then, as the COCO panoptic API.
    """
    value, counted = metrics, None
    for key in keys:
        if not isinstance(value, dict):
            return None
        value, counted = value.get(key), value.get("miou_classes" if key == "miou" else "n")
    return None if counted == 0 else value


def table(rows: list[tuple[str, dict]], columns=COLUMNS) -> str:
    """A plain-text table of metrics in percent, n/a where there is nothing to measure. rows:
    (title, metrics of one reading as `evaluation.evaluate` returns).
    """
    width = max(len(title) for title, _ in rows)
    lines = [" " * width + "".join(f"{name:>11}" for name, _ in columns)]
    for title, metrics in rows:
        cells = []
        for _, keys in columns:
            value = figure(metrics, keys)
            cells.append(f"{'n/a':>11}" if value is None else f"{100 * value:11.1f}")
        lines.append(f"{title:<{width}}" + "".join(cells))
    return "\n".join(lines)


def overlay(
    image: Image.Image,
    segment_map: np.ndarray,
    labels: np.ndarray,
    taxonomy: Taxonomy,
    scores=None,
    names: bool = True,
    side: int | None = None,
) -> Image.Image:
    """A panoptic map drawn on its image: colours by class, shades by instance, borders, and the names of segments that have room for them.

    Args: segment_map: (H, W) integers, 0 = void, k = k-th segment;  labels: (N,) classes.    scores: (N,), written behind the names.
        side: pixels of the long side; None: that of the image, or the nearest of SIDES (names could not be read on less, nobody needs more).
    The n-th instance of a class has the same colour in every image. Void is grey and dark.
    """
    if segment_map.shape != image.size[::-1]:
        raise ValueError(
            f"segment_map: expected {image.size[::-1]}, the size of the image, got {segment_map.shape}"
        )
    long = max(image.size)
    scale = (side or min(max(long, SIDES[0]), SIDES[1])) / long
    size = [max(1, round(s * scale)) for s in image.size]
    image = image.convert("RGB").resize(
        size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    )
    ys, xs = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(size[::-1], segment_map.shape)
    )
    drawn = segment_map.take(ys, 0).take(xs, 1)  # (H', W')
    colours, seen = np.zeros((len(labels) + 1, 3), np.uint8), {}
    for k, label in enumerate(np.asarray(labels).tolist(), 1):
        colours[k] = shade(taxonomy.colours[label], seen.get(label, 0))
        seen[label] = seen.get(label, 0) + 1
    grey = ImageEnhance.Brightness(image.convert("L").convert("RGB")).enhance(0.4)
    canvas = Image.blend(image, Image.fromarray(colours[drawn]), PAINT)
    canvas.paste(grey, mask=Image.fromarray(drawn == 0))
    width = max(1, round(max(size) / 600))
    dark, light = (_edges(drawn, w) for w in (3 * width, width))
    canvas.paste(ImageEnhance.Brightness(canvas).enhance(0.45), mask=dark)
    canvas.paste("white", mask=light)
    if names:
        _write_names(canvas, drawn, labels, taxonomy, scores)
    return canvas


def _edges(drawn: np.ndarray, width: int) -> Image.Image:
    """Mask of the pixels around borders between segments, a line so wide."""
    edge = np.zeros(drawn.shape, bool)
    edge[1:] |= drawn[1:] != drawn[:-1]
    edge[:, 1:] |= drawn[:, 1:] != drawn[:, :-1]
    return Image.fromarray(ndimage.maximum_filter(edge.view(np.uint8), width).view(bool))


@functools.lru_cache(maxsize=64)
def written(names: tuple[str, ...], ids: tuple[int, ...]) -> tuple[str, ...]:
    """What pictures call classes: names, or `#` and the category id of one that no font writes.

    Which is which is said once, in one line.
    """
    # a letter and its accent as one character, where there is one
    names = tuple(unicodedata.normalize("NFC", name) for name in names)
    shown = tuple(
        name if font_of(name) is not None else f"#{number}" for name, number in zip(names, ids)
    )
    changed = [f"{new} {old}" for old, new in zip(names, shown) if new != old]
    if changed:
        tqdm.write(
            "warning: no font here writes every class name; pictures show category ids instead: "
            f"{', '.join(changed)}; a font such as Noto Sans (CJK), and libraqm for Arabic and "
            "Indian scripts, would show the names"
        )
    return shown


@functools.lru_cache(maxsize=4096)
def font_of(text: str) -> str | None:
    """A font that has every letter of a text: empty for Pillow's own, or a file of the system.

    None if there is none.

    Arabic, Hebrew and Indian scripts are shaped and ordered by libraqm: without it, they would
    be wrong in any font.
    """
    shaped = any(
        unicodedata.bidirectional(c) in ("R", "AL") or unicodedata.category(c) in ("Mn", "Mc")
        for c in text
    )
    if shaped and not features.check("raqm"):
        return None
    return next((name for name in ("", *FONTS) if _has(name, text)), None)


def _has(name: str, text: str) -> bool:
    font = _font(name, 20)
    if font is None:
        return False

    def drawn(character):
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    missing = drawn("\uffff")  # no character: what a font draws for all that it has not
    return all(
        c.isspace() or unicodedata.category(c) in ("Mn", "Mc", "Cf") or drawn(c) != missing
        for c in text
    )


@functools.lru_cache(maxsize=256)
def _font(name: str | None, size: int):
    """A font of this size, in pixels; None for a file that the system has not. name: of `font_of`."""
    if not name:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _write_names(
    canvas: Image.Image, drawn: np.ndarray, labels: np.ndarray, taxonomy: Taxonomy, scores
) -> None:
    """Write the name of each segment where the most of it lies on the segment and on no other name, near its middle; large ones first."""
    least, largest = FONT_SIZE
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
        (y0, y1), (x0, x1) = (
            (max(0, s.start // step - n), s.stop // step + n) for s, n in zip(boxes[k], (h, w))
        )
        inside = (coarse[y0:y1, x0:x1] == k + 1).astype(np.int32)
        if areas[k] < ROOM * w * h or inside.shape[0] < h or inside.shape[1] < w:
            continue
        sums = np.pad(inside.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        covered = (sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]) / (w * h)
        middle = np.argwhere(inside).mean(0) - (h / 2, w / 2)
        distance = np.hypot(*(np.indices(covered.shape) - middle[:, None, None]))
        y, x = np.unravel_index(np.argmax(covered - 1e-4 * distance), covered.shape)
        if covered[y, x] < ROOM:
            continue
        coarse[y0 + y : y0 + y + h, x0 + x : x0 + x + w] = 0  # taken
        draw.text(
            ((x0 + x) * step - left, (y0 + y) * step - top),
            text,
            "white",
            font,
            anchor="lt",
            stroke_width=2,
            stroke_fill=(25, 25, 25),
        )


def picture(
    rows: list[tuple[Image.Image, list[tuple[np.ndarray, np.ndarray]]]],
    titles: list[str],
    taxonomy: Taxonomy,
    path: Path,
    caption: str = "",
    side: int = 256,
) -> None:
    """A PNG with one row an image: the image, then panoptic maps (segment_map, labels) under the titles, and a legend.

    Args: rows: image and maps, of one size each;  titles: of all columns, the image's first.   side: pixels of a cell.
    """
    font, small = ImageFont.load_default(18), ImageFont.load_default(13)
    names = written(tuple(taxonomy.short_names), tuple(taxonomy.ids))
    gap, head, foot = 8, 34, 30
    shown = sorted({int(label) for _, maps in rows for _, labels in maps for label in labels})
    columns = len(titles)
    width = columns * (side + gap) + gap
    per_line = max(1, width // 175)
    legend = (len(shown) + per_line - 1) // per_line * 22 + 12
    canvas = Image.new(
        "RGB", (width, head + len(rows) * (side + gap) + legend + (foot if caption else 0)), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for c, title in enumerate(titles):
        draw.text((gap + c * (side + gap) + side / 2, head / 2), title, "black", font, anchor="mm")
    for r, (image, maps) in enumerate(rows):
        y = head + r * (side + gap)
        cells = [ImageOps.contain(image, (side, side))] + [
            overlay(image, segment_map, labels, taxonomy, side=side) for segment_map, labels in maps
        ]
        for c, cell in enumerate(cells):
            canvas.paste(cell, (gap + c * (side + gap), y))
    y = head + len(rows) * (side + gap) + 6
    for k, label in enumerate(shown):
        x, line = gap + k % per_line * 175, y + k // per_line * 22
        draw.rectangle((x, line, x + 16, line + 14), taxonomy.colours[label], "black")
        kind = "thing" if taxonomy.things[label] else "stuff"
        font = _font(font_of(names[label]), 13)
        draw.text((x + 22, line + 7), f"{names[label]} ({kind})", "black", font, anchor="lm")
    if caption:
        draw.text((gap, canvas.height - foot / 2), caption, "black", small, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
