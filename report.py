"""What a person looks at: tables of figures, and pictures of images, ground truth and predictions side by side."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import Taxonomy

COLUMNS = (("PQ", ("all", "pq")), ("PQ things", ("things", "pq")), ("PQ stuff", ("stuff", "pq")), ("SQ", ("all", "sq")),
           ("RQ", ("all", "rq")), ("mIoU", ("miou",)))
OUTLINE = (20, 20, 20)


def table(rows: list[tuple[str, dict]], columns=COLUMNS) -> str:
    """A plain-text table of metrics in percent. rows: (title, metrics of one reading as `evaluation.evaluate` returns)."""
    width = max(len(title) for title, _ in rows)
    lines = [" " * width + "".join(f"{name:>11}" for name, _ in columns)]
    for title, metrics in rows:
        cells = []
        for _, keys in columns:
            value = metrics
            for key in keys:
                value = value[key]
            cells.append(f"{100 * value:11.1f}")
        lines.append(f"{title:<{width}}" + "".join(cells))
    return "\n".join(lines)


def paint(segment_map: np.ndarray, labels: np.ndarray, taxonomy: Taxonomy, scale: int = 1) -> Image.Image:
    """A panoptic map in class colours, things of one class in different shades, every segment outlined; void is black."""
    colours = np.zeros((len(labels) + 1, 3), np.float32)
    seen: dict[int, int] = {}
    for k, label in enumerate(labels.tolist(), 1):
        shade = 1 - 0.22 * (seen.get(label, 0) % 3) if taxonomy.things[label] else 1
        seen[label] = seen.get(label, 0) + 1
        colours[k] = np.array(taxonomy.colours[label]) * shade
    big = np.kron(segment_map, np.ones((scale, scale), segment_map.dtype))
    edge = np.zeros(big.shape, bool)
    edge[1:] |= big[1:] != big[:-1]
    edge[:, 1:] |= big[:, 1:] != big[:, :-1]
    painted = colours[big]
    painted[edge] = OUTLINE
    return Image.fromarray(painted.astype(np.uint8))


def overlay(image: Image.Image, segment_map: np.ndarray, labels: np.ndarray, taxonomy: Taxonomy, scores=None, names: bool = True) -> Image.Image:
    """The image with a panoptic map (H, W) of its size laid over it, and the class names on segments that have room for them."""
    mixed = Image.blend(image, paint(segment_map, labels, taxonomy), 0.6)
    if names:
        _name_segments(ImageDraw.Draw(mixed), segment_map, labels, taxonomy, 0, 0, max(image.size), ImageFont.load_default(13))
    return mixed


def picture(rows: list[tuple[Image.Image, list[tuple[np.ndarray, np.ndarray]]]], titles: list[str], taxonomy: Taxonomy,
            path: Path, caption: str = "", side: int = 256) -> None:
    """A PNG with one row an image: the image, then panoptic maps (segment_map, labels) under the titles, and a legend.

    Args: rows: image and maps, of one size each;  titles: of all columns, the image's first.   side: pixels of a cell.
    """
    font, small = ImageFont.load_default(18), ImageFont.load_default(13)
    gap, head, foot = 8, 34, 30
    shown = sorted({int(label) for _, maps in rows for _, labels in maps for label in labels})
    columns = len(titles)
    width = columns * (side + gap) + gap
    per_line = max(1, width // 175)
    legend = (len(shown) + per_line - 1) // per_line * 22 + 12
    canvas = Image.new("RGB", (width, head + len(rows) * (side + gap) + legend + (foot if caption else 0)), "white")
    draw = ImageDraw.Draw(canvas)
    for c, title in enumerate(titles):
        draw.text((gap + c * (side + gap) + side / 2, head / 2), title, "black", font, anchor="mm")
    for r, (image, maps) in enumerate(rows):
        y = head + r * (side + gap)
        scale = max(1, round(side / max(image.size)))
        cells = [image] + [paint(m, labels, taxonomy, scale) for m, labels in maps]
        for c, cell in enumerate(cells):
            cell.thumbnail((side, side)) if max(cell.size) > side else None
            if max(cell.size) < side:
                cell = cell.resize([int(s * side / max(cell.size)) for s in cell.size], Image.Resampling.BILINEAR if c == 0 else Image.Resampling.NEAREST)
            canvas.paste(cell, (gap + c * (side + gap), y))
        for c, (segment_map, labels) in enumerate(maps):
            _name_segments(draw, segment_map, labels, taxonomy, gap + (c + 1) * (side + gap), y, side, small)
    y = head + len(rows) * (side + gap) + 6
    for k, label in enumerate(shown):
        x, line = gap + k % per_line * 175, y + k // per_line * 22
        draw.rectangle((x, line, x + 16, line + 14), taxonomy.colours[label], "black")
        draw.text((x + 22, line + 7), f"{taxonomy.short_names[label]} ({'thing' if taxonomy.things[label] else 'stuff'})", "black", small, anchor="lm")
    if caption:
        draw.text((gap, canvas.height - foot / 2), caption, "black", small, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _name_segments(draw, segment_map, labels, taxonomy, x0, y0, side, font) -> None:
    """Write the class name on each segment that has room for it."""
    scale = side / max(segment_map.shape)
    for k, label in enumerate(labels.tolist(), 1):
        ys, xs = np.nonzero(segment_map == k)
        if len(ys) * scale * scale < 900:
            continue
        middle = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)                  # a pixel of the segment, near its centre
        name = taxonomy.short_names[label]
        half = draw.textlength(name, font) / 2
        x = min(max(x0 + xs[middle] * scale, x0 + half + 2), x0 + side - half - 2)
        draw.text((x, min(max(y0 + ys[middle] * scale, y0 + 8), y0 + side - 8)), name, "white", font, anchor="mm", stroke_width=2, stroke_fill="black")
