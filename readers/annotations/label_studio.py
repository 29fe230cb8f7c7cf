"""Label Studio: its export JSON, a list of tasks with their annotations, and the images.

Polygons, ellipses, brushes and bitmasks are instances. Rectangles have no mask, and are void as are
key points. Of several annotations of a task the newest counts, if none is marked as ground truth.
Coordinates are percent of the width and height.    Axes: H W pixels, N points.
"""

import base64
import io
import json
import math
import posixpath
import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Iterator
from urllib.parse import unquote

import numpy as np
from PIL import Image

from ground.errors import UserError
from readers.annotations import shapes
from readers.annotations.coco import NO_PHOTOS
from readers.annotations.files import division, list_files
from readers.annotations.others import hint
from readers.annotations.records import UNNAMED, VOID, Classes, Instance, Record, Source
from readers.annotations.shapes import Draw, Patch, Size
from readers.pictures import brief, endings

# What the value of a region has, by its kind.
FIELDS = {
    "polygon": "points",
    "brush": "rle",
    "bitmask": "imageDataURL",
    "ellipse": "radiusX",
    "rectangle": "width",
    "keypoint": "x",
}
SHAPELESS = ("rectangle", "keypoint")  # have no mask
DOT = 5  # pixels, half the side of a key point
UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # before the names of uploaded files
HALF = 128  # of 255: from here on a pixel of a brush belongs to its region


def read_label_studio(folder: Path, classes: Classes) -> Source:
    """Images that no task names, or whose task nobody annotated, are unlabelled; but those in
    folders of masks and the like are left out."""
    path, tasks = _load(folder)
    source, records, pictures = Source(), {}, defaultdict(list)
    every = list_files(folder)
    for name in every:
        pictures[posixpath.basename(name)].append(name)
    for place, task in enumerate(tasks):
        where = f"{path}: task {brief(task.get('id', f'number {place + 1}'))}"
        result = _result(task, where, source)
        name = _image(task["data"], pictures, where, result is not None)
        if name is None:
            source.passed["tasks without annotation whose image is not here"] += 1
            continue
        if name in records:
            raise UserError(
                f"{where}: its image {brief(name)} has another task already; take one of them out"
            )
        regions = [] if result is None else [*_regions(result, where, source, classes)]
        read = None if result is None else partial(_instances, regions)
        records[name] = Record(name, folder / name, read)
    if source.passed["further annotations of a task"]:
        source.notes.append(
            "of several annotations of a task the newest is taken that is not cancelled, and one "
            "marked as ground truth before others"
        )
    for name in every:
        if name not in records and NO_PHOTOS & {*name.lower().split("/")[:-1]}:
            source.passed["pictures in folders of masks, labels or the like"] += 1
        elif name not in records:
            records[name] = Record(name, folder / name)
    notes = source.notes if classes.inherited is None else []  # what is joined has a division
    part = division((name for name, one in records.items() if one.read), notes)
    for name, record in records.items():
        record.part = part(name)
    return source.settle(folder, [*records.values()])


# ----------------------------------------------------------------------------------- tasks


def _load(folder: Path) -> tuple[Path, list[dict]]:
    names = list_files(folder, ".json")
    names = [name for name in names if posixpath.basename(name) != "notes.json"]
    depth = min((name.count("/") for name in names), default=0)
    near = [name for name in names if name.count("/") == depth]
    if len(near) != 1:
        raise UserError(
            f"{folder}: {brief(near)}; expected one *.json, the export JSON of Label Studio"
            f"{hint(folder, 'label-studio')}"
        )
    path = folder / near[0]
    try:
        tasks = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({brief(str(error))})") from None
    tasks = [tasks] if isinstance(tasks, dict) and "data" in tasks else tasks
    sound = isinstance(tasks, list) and tasks and all(isinstance(task, dict) for task in tasks)
    if sound and "data" not in tasks[0] and {"annotation_id", "annotator"} & tasks[0].keys():
        raise UserError(
            f"{path}: is the export JSON-MIN, which lacks what masks need; in Label Studio choose "
            "JSON"
        )
    if not sound or not all(isinstance(task.get("data"), dict) for task in tasks):
        raise UserError(
            f"{path}: expected a list of tasks with `data` and `annotations`, the export JSON of "
            f"Label Studio{hint(folder, 'label-studio', near)}"
        )
    return path, tasks


def _result(task: dict, where: str, source: Source) -> list | None:
    """The result of the annotation that counts; None if nobody annotated the task."""
    stated = task.get("annotations", task.get("completions")) or []
    sound = isinstance(stated, list) and all(
        isinstance(a, dict) and isinstance(a.get("result"), list) for a in stated
    )
    if not sound:
        raise UserError(
            f"{where}: annotations {brief(stated)}, expected a list of objects with `result`"
        )
    for key in ("predictions", "drafts"):
        several = task.get(key)
        source.passed[f"{key}, which are no annotations"] += (
            len(several) if isinstance(several, list) else 0
        )
    live = [a for a in stated if not a.get("was_cancelled")]
    source.passed["cancelled annotations"] += len(stated) - len(live)
    source.passed["further annotations of a task"] += max(0, len(live) - 1)
    if not live:
        return None
    true = [a for a in live if a.get("ground_truth")] or live
    return max(true, key=_age)["result"]


def _age(annotation: dict) -> tuple[str, int]:
    """When an annotation was changed; of two at once the later number is the newer."""
    number = annotation.get("id")
    changed = annotation.get("updated_at") or annotation.get("created_at")
    return str(changed), number if isinstance(number, int) else 0


def _image(data: dict, pictures: dict[str, list[str]], where: str, annotated: bool) -> str | None:
    """The picture below the source that a task is of, by the last part of its address and, where
    several are called so, by as many folders as it takes. None: not there, nor annotated."""
    known = tuple(endings())
    addresses = {key: _address(value) for key, value in data.items() if isinstance(value, str)}
    named = [words for words in addresses.values() if words[-1].lower().endswith(known)]
    if "image" in addresses:
        named = [addresses["image"]]
    if len(named) != 1:
        raise UserError(
            f"{where}: data {brief(data)}, expected the address of one image, called `image`"
        )
    words = named[0]
    last = words[-1]
    found = pictures.get(last) or pictures.get(UPLOAD.sub("", last, count=1), [])
    for count in range(2, len(words) + 1):
        tail = "/".join(words[-count:])
        fitting = [name for name in found if f"/{name}".endswith(f"/{tail}")]
        found = fitting if len(found) > 1 and fitting else found
    if len(found) > 1:
        raise UserError(
            f"{where}: image {brief('/'.join(words))} is {found[0]} as well as {found[1]}; take "
            "one of them out"
        )
    if not found and annotated:
        raise UserError(
            f"{where}: no image {brief(last)} below this folder; put the images beside the JSON "
            "(uploaded ones are in media/upload of Label Studio's data folder)"
        )
    return found[0] if found else None


def _address(stated: str) -> list[str]:
    """Folders and name that an address ends with: of /data/local-files/?d=a/b.jpg a and b.jpg."""
    path = stated.replace("\\", "/")
    local = re.split("[?&]d=", path)
    path = local[-1] if len(local) > 1 else re.split("[?#]", path)[0]
    return unquote(path).rstrip("/").split("/")


# ----------------------------------------------------------------------------------- regions


def _regions(
    result: list, where: str, source: Source, classes: Classes
) -> Iterator[tuple[dict, str, str | None, str]]:
    """Entry, kind, category and place of each region; its class is added to `classes`."""
    entries = [(f"{where}: result[{k}]", entry) for k, entry in enumerate(result)]
    for here, entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise UserError(f"{here} is {brief(entry)}, expected an object with type and value")
    labelled = {str(entry.get("id")) for _, entry in entries if entry["type"].endswith("labels")}
    labelled.discard("None")
    for here, entry in entries:
        stated, value = entry["type"], entry.get("value")
        kind = _kind(stated, value, here)
        if kind is None:
            source.passed[f"results of type {brief(stated)}, which are no regions"] += 1
            continue
        if stated == kind and str(entry.get("id")) in labelled:
            continue  # a second result of this id has its label and the same shape
        if entry.get("image_rotation") or entry.get("item_index"):
            raise UserError(
                f"{here}: image_rotation {brief(entry.get('image_rotation'))}, item_index "
                f"{brief(entry.get('item_index'))}; expected 0: turn the image back in Label "
                "Studio, and have one image a task"
            )
        label = _label(stated, value, here)
        passed = _passed(kind, label, value)
        if passed:
            source.passed[passed] += 1
        if kind in SHAPELESS or label is None or value.get("closed") is False:
            yield entry, kind, VOID, here
            continue
        if label not in UNNAMED and label not in classes:
            classes.add(label, label, here)
        yield entry, kind, UNNAMED.get(label, label), here


def _kind(stated: str, value, where: str) -> str | None:
    """A key of FIELDS; None if a result is an answer about the image or a region, and no region."""
    bare = stated.removesuffix("labels")
    if stated.endswith("labels") and isinstance(value, dict):
        bare = bare or next((kind for kind, field in FIELDS.items() if field in value), "")
    elif bare not in FIELDS:
        return None
    if bare not in FIELDS or not isinstance(value, dict) or FIELDS[bare] not in value:
        raise UserError(
            f"{where}: of type {brief(stated)}, value {brief(value)}; expected a region of an "
            f"image with {brief([*FIELDS.values()])}: one of {', '.join(FIELDS)}"
        )
    return bare


def _label(stated: str, value: dict, where: str) -> str | None:
    """The one label of a region, or None if it has none."""
    labels = value.get(stated) if stated.endswith("labels") else None
    if not labels:
        return None
    if not isinstance(labels, list) or len(labels) > 1 or not isinstance(labels[0], str):
        raise UserError(
            f"{where}: labels {brief(labels)}, expected one: an instance is of one class"
        )
    return labels[0]


def _passed(kind: str, label: str | None, value: dict) -> str:
    """Why a region is no instance; empty if it is one."""
    if kind in SHAPELESS:
        return "boxes without a mask" if kind == "rectangle" else "key points"
    if label is None:
        return "regions without a label"
    if value.get("closed") is False:
        return "polygons that are not closed"
    return f"regions labelled {label}" if label in UNNAMED else ""


def _instances(regions: list[tuple], size: Size) -> list[Instance]:
    instances = []
    for entry, kind, category, where in regions:
        stated = entry.get("original_height"), entry.get("original_width")
        claim = f"{where}: states an image of {brief(stated)}"
        shapes.require_size(stated, size, claim, "export again with this image")
        draw = _drawing(kind, entry["value"], size, where)
        if kind in SHAPELESS:
            slight = kind != "rectangle"
            instances.append(Instance(VOID, shapes.nothing, around=draw, slight=slight))
        else:
            instances.append(Instance(category, draw))
    return instances


# ----------------------------------------------------------------------------------- shapes


def _drawing(kind: str, value: dict, size: Size, where: str) -> Draw:
    if kind == "brush":
        return partial(_brush, value["rle"], size, where)
    if kind == "bitmask":
        return partial(_bitmask, value["imageDataURL"], size, where)
    if kind == "polygon":
        return partial(shapes.polygon, _points(value["points"], size, where), size)
    turn = value.get("rotation") or 0
    extent = {"ellipse": ("radiusX", "radiusY"), "rectangle": ("width", "height")}.get(kind, ())
    numbers = [[value.get("x"), value.get("y")], [value.get(key) for key in extent] or [0, 0]]
    (x, y), (across, down) = _points(numbers, size, where)
    if not isinstance(turn, int | float) or not math.isfinite(turn):
        raise UserError(f"{where}: rotation {brief(turn)}, expected degrees")
    turn = math.radians(turn)
    if kind == "keypoint":
        return partial(shapes.filled, np.array([[x - DOT, y - DOT], [x + DOT, y + DOT]]), size)
    if kind == "ellipse":
        return partial(_ellipse, (x, y), (across, down), turn, size)
    # A rectangle turns around its upper left corner, clockwise.
    right = np.array([math.cos(turn), math.sin(turn)]) * across
    below = np.array([-math.sin(turn), math.cos(turn)]) * down
    corner = np.array([x, y])
    corners = np.array([corner, corner + right, corner + right + below, corner + below])
    return partial(shapes.polygon, corners, size)


def _points(value, size: Size, where: str) -> np.ndarray:
    """(N, 2) pixels, from percent of width and height; they may lie outside of the image, but not
    by more than its size. Raises: UserError if they are none."""
    try:
        points = np.array(value, np.float64)
        sound = points.ndim == 2 and points.shape[1] == 2 and (abs(points - 50) <= 150).all()
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise UserError(
            f"{where}: points {brief(value)}, expected pairs of numbers in percent of the width "
            "and height of its image"
        )
    return points * size[::-1] / 100


def _ellipse(
    centre: tuple[float, float], radii: tuple[float, float], turn: float, size: Size
) -> Patch:
    """turn: radians, clockwise, around the centre."""
    (x, y), (across, down) = centre, radii
    if min(radii) <= 0:
        return shapes.nothing()
    far = max(radii)
    corners = np.array([[x - far, y - far], [x + far, y + far]])
    top, left, height, width = shapes.box(corners, size)
    ys, xs = np.ogrid[top : top + height, left : left + width]
    right, below = xs + 0.5 - x, ys + 0.5 - y
    along = (right * math.cos(turn) + below * math.sin(turn)) / across
    beside = (below * math.cos(turn) - right * math.sin(turn)) / down
    return top, left, along**2 + beside**2 <= 1


def _bitmask(held, size: Size, where: str) -> Patch:
    """The alpha of a PNG as large as the image, in a data URL."""
    try:
        kind, _, content = held.partition(",")
        if kind != "data:image/png;base64":
            raise ValueError(kind)
        image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)), formats=("PNG",))
        fits = image.size == size[::-1]
        alpha = np.asarray(image.convert("RGBA"))[..., 3] if fits else None
    except Exception:  # Pillow raises a dozen types for what is one thing to the user
        raise UserError(
            f"{where}: its imageDataURL {brief(held)} is no PNG in base64; export again"
        ) from None
    if alpha is None:
        raise UserError(
            f"{where}: a mask of {image.width} x {image.height}, but its image has {size[1]} x "
            f"{size[0]}"
        )
    return 0, 0, alpha >= HALF


def _brush(held, size: Size, where: str) -> Patch:
    """The alpha of the run lengths of an RGBA image, row by row."""
    try:
        if not isinstance(held, list):  # bytes of a number are as many zeros
            raise TypeError("not a list of bytes")
        values = decode_runs(bytes(held), 4 * size[0] * size[1])
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{where}: rle {brief(held)}, expected Label Studio's run lengths of an image of "
            f"{size[1]} x {size[0]} ({brief(str(error))})"
        ) from None
    return 0, 0, values.reshape(*size, 4)[..., 3] >= HALF


def decode_runs(packed: bytes, count: int) -> np.ndarray:
    """Run lengths of Label Studio's brushes -> (count,) uint8.

    A stream of bits, high ones first: 32 bits the number of values; 5 bits the width of a value
    less 1; 4 times 4 bits the widths of lengths less 1. Then blocks: 1 bit, whether one value is
    repeated; 2 bits, which of the 4 widths; in so many bits the length less 1; and the value, or so
    many values.
    Raises: ValueError, if it is not this, or of another number of values.
    """
    bits, at = np.unpackbits(np.frombuffer(packed, np.uint8)), 0

    def take(width: int) -> int:
        nonlocal at
        end = at + width
        if end > len(bits):
            raise ValueError("it ends too early")
        word = int.from_bytes(packed[at // 8 : -(-end // 8)], "big") >> -end % 8
        at = end
        return word & ((1 << width) - 1)

    total, width = take(32), take(5) + 1
    if total != count or width > 8:
        raise ValueError(f"{total} values of {width} bits, expected {count} of 8 at most")
    lengths = [take(4) + 1 for _ in range(4)]
    places = 1 << np.arange(width - 1, -1, -1)  # what each bit of a value is worth
    values, done = np.empty(count, np.uint8), 0
    while done < count:
        repeated, which = take(1), take(2)
        length = take(lengths[which]) + 1
        if done + length > count:
            raise ValueError("the runs are longer than the image")
        if repeated:
            values[done : done + length] = take(width)
        else:
            end = at + length * width
            if end > len(bits):
                raise ValueError("it ends too early")
            values[done : done + length] = bits[at:end].reshape(length, width) @ places
            at = end
        done += length
    return values
