"""What was predicted, for the programs in which people correct and count it.

Written by `tools.predict` beside its own files, for a picture PATH/a.jpg:

    labelme/PATH/a.json   labelme's polygons, and labelme/PATH/a.jpg, a hard link to the picture (a
                          copy on another disk), so that the folder opens in labelme and comes back
                          through `--stage import --from labelme`. Where another picture is called
                          PATH/a.png, PATH/a.jpg.json
    instances.json        COCO instances of all pictures, with scores: polygons as in labelme/
    objects.csv           a row for each thing: its picture; the number of its segment; class and
                          score; area in pixels; the diameter of a circle of this area; centre x, y;
                          box. In pixels from the upper left corner of the picture
    results.json          of instances: COCO results, a list of {image_id, category_id,
                          segmentation: run lengths, score}. Where all pictures are called by whole
                          numbers, as COCO's are, these are the image_id; else it is that of
                          instances.json. Without pictures that are read by parts
    counts.csv            a row for each picture: how many things of each class, how many pixels of
                          each class, and how many without an answer

Parts of an object are polygons of one group_id; a hole is cut out by a line to it and back. Stuff
is drawn, too, but for the only class of it beside things: it is what the things leave, and
`--background` at import makes it again. Sizes and coordinates are of the picture as it is shown,
turned as its EXIF block says; labelme turns it likewise.    Axes: H W pixels, K segments.
"""

import csv
import io
import json
import math
import os
import shlex
from collections import Counter
from pathlib import Path
from typing import Iterable

import numpy as np

from ground.errors import UserError
from ground.files import place, write_atomic
from readers.annotations.labelme import digest, is_untouched
from readers.ground_truth import Taxonomy
from readers.pictures import brief
from readers.runs import to_runs
from tools.outlines import outlines

FOLDER = "labelme"
FILES = ("instances.json", "objects.csv", "counts.csv")
RESULTS = "results.json"
VERSION = "5.5.0"  # of labelme, whose files these are like
NO_ANSWER = "no answer (pixels)"
COLUMNS = "picture number class score area diameter x y left top width height".split()


def drawn(taxonomy: Taxonomy) -> np.ndarray:
    """Which classes have polygons: all, but for a background of things."""
    things = np.array(taxonomy.things)
    return things | ((~things).sum() != 1 or not things.any())


def labelme_files(names: Iterable[str]) -> dict[str, str]:
    """The JSON of each picture, by name: of its stem, as labelme looks for it, where no other has
    that, or else of its whole name."""
    names = {*names}
    stems = Counter(os.path.splitext(name)[0].casefold() for name in names)
    taken = {name.casefold() for name in names}
    files = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        alone = stems[stem.casefold()] == 1 and stem.casefold() not in taken
        files[name] = f"{stem if alone else name}.json"
    return files


# -------------------------------------------------------------------------------- of one picture


def write_picture(
    picture: Path,
    file: Path,
    segment_map: np.ndarray,
    segments_info: list[dict],
    taxonomy: Taxonomy,
) -> str:
    """Write the labelme JSON, and the picture beside it.

    segment_map: (H, W), 0 = void, k = k-th segment.   segments_info: (K,), as in panoptic.json.
    Returns: JSON of what `write_folder` needs beside them, (K,): the centre of a thing, x and y in
        pixels, or None; and polygons, x, y, x, y, ..., none if its class is not drawn.
    """
    classes = [taxonomy.ids.index(segment["category_id"]) for segment in segments_info]
    areas = np.array([segment["area"] for segment in segments_info], np.int64)
    polygons = outlines(segment_map, areas, drawn(taxonomy)[classes] if classes else areas > 0)
    shapes, objects = [[] for _ in classes], []
    for k, (label, segment) in enumerate(zip(classes, segments_info), 1):
        points = [_numbers(part) for part in polygons[k - 1]]
        centre = _centre(segment_map, k, segment["bbox"]) if taxonomy.things[label] else None
        objects.append([centre, [sum(part, []) for part in points]])
        group = k if len(points) > 1 else None
        about = taxonomy.names[label], group, f"score {segment['score']:.2f}"
        shapes[k - 1] = [_shape(part, *about) for part in points]
    shapes = sum((shapes[k] for k in np.argsort(-areas, kind="stable")), [])  # small on top
    content = {
        "version": VERSION,
        "flags": {},
        "shapes": shapes,
        "predicted": digest(shapes),
        "imagePath": picture.name,
        "imageData": None,
        "imageHeight": segment_map.shape[0],
        "imageWidth": segment_map.shape[1],
    }
    write_atomic(file, json.dumps(content, ensure_ascii=False).encode())
    place(picture, file.with_name(picture.name))
    return json.dumps(objects, separators=(",", ":"))


def is_corrected(file: Path) -> bool:
    """Whether a labelme JSON is there that somebody changed, or that is not `write_picture`'s."""
    try:
        return not is_untouched(json.loads(file.read_text()))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


def require_corrections(kind: str, folder: Path) -> None:
    """Raise UserError if a folder is what predict wrote, and what people correct is in a folder of
    it that --from `kind` does not read."""
    predicted, inner = folder / FILES[0], folder / FOLDER
    if not predicted.is_file() or not inner.is_dir():
        return
    if kind == "labelme":
        raise UserError(
            f"{folder}: what --stage predict wrote; the files to correct are in {inner}: did you "
            f"mean --input {inner}?"
        )
    files = sorted(inner.rglob("*.json"))
    changed = [file.relative_to(inner).as_posix() for file in files if is_corrected(file)]
    if kind == "coco-instances" and changed:
        raise UserError(
            f"{predicted}: has what was predicted, but {len(changed)} files in {inner} are "
            f"corrected ({brief(changed[0])}); take these by --from labelme --input {inner}, or "
            "move that folder elsewhere"
        )


def centres(segment_map: np.ndarray, segments_info: list[dict], taxonomy: Taxonomy) -> str:
    """As `write_picture` returns it, of a picture whose objects are not drawn: centres alone."""
    things = {taxonomy.ids[k] for k, thing in enumerate(taxonomy.things) if thing}
    objects = []
    for k, segment in enumerate(segments_info, 1):
        is_thing = segment["category_id"] in things
        objects.append([_centre(segment_map, k, segment["bbox"]) if is_thing else None, []])
    return json.dumps(objects, separators=(",", ":"))


def _shape(points: list, label: str, group: int | None, description: str) -> dict:
    return {
        "label": label,
        "points": points,
        "group_id": group,
        "description": description,
        "shape_type": "polygon",
        "flags": {},
        "mask": None,
    }


def _numbers(points: np.ndarray) -> list[list[float]]:
    """(N, 2) as x, y pairs; whole numbers without a point."""
    return [[int(v) if v == int(v) else v for v in pair] for pair in points.tolist()]


def _centre(segment_map: np.ndarray, k: int, box: list[int]) -> list[float]:
    """x, y: the mean of the centres of its pixels."""
    left, top, width, height = box
    mask = segment_map[top : top + height, left : left + width] == k
    columns, rows = mask.sum(0), mask.sum(1)
    x, y = (count @ (np.arange(len(count)) + 0.5) / count.sum() for count in (columns, rows))
    return [round(float(left + x), 2), round(float(top + y), 2)]


# ------------------------------------------------------------------------------- of all pictures


def write_folder(output: Path, rows: list[dict], taxonomy: Taxonomy, info: dict) -> None:
    """Write FILES from the rows of panoptic.jsonl, sorted by name."""
    write_atomic(output / "instances.json", _instances(rows, taxonomy, info).encode())
    write_atomic(output / "objects.csv", _csv(COLUMNS, _objects(rows, taxonomy)).encode())
    header, counts = _counts(rows, taxonomy)
    write_atomic(output / "counts.csv", _csv(header, counts).encode())
    listed = "".join(f"{k}:{name}\n" for k, name in enumerate(_headings(taxonomy), 1))
    write_atomic(output / "semantic" / "classes.txt", listed.encode())
    if any("results" in row for row in rows):
        write_atomic(output / RESULTS, _results(rows).encode())
    else:
        (output / RESULTS).unlink(missing_ok=True)


def coco_results(answer, taxonomy: Taxonomy) -> str:
    """JSON of the instances of a picture as COCO results, without its image_id.

    answer: has mask(k) -> (H, W) bool, labels and scores.
    """
    found = [
        {
            "category_id": taxonomy.ids[label],
            "segmentation": to_runs(answer.mask(k)),
            "score": float(f"{answer.scores[k]:.9g}"),  # all that 32 bits have
        }
        for k, label in enumerate(answer.labels.tolist())
    ]
    return json.dumps(found, separators=(",", ":"))


def _results(rows: list[dict]) -> str:
    """COCO results of all pictures, as text."""
    stems = [Path(row["image"]["file_name"]).stem for row in rows]
    numbers = {int(stem) for stem in stems if stem.isdecimal()}
    named = len(numbers) == len(rows)
    found = []
    for number, (row, stem) in enumerate(zip(rows, stems), 1):
        image = {"image_id": int(stem) if named else number}
        for one in json.loads(row.get("results", "[]")):
            found.append(json.dumps({**image, **one}, separators=(",", ":")))
    return f"[{', '.join(found)}]"


def _instances(rows: list[dict], taxonomy: Taxonomy, info: dict) -> str:
    """COCO instances as text; of the polygons those of one picture at a time are lists."""
    images, annotations, count = [], [], 0
    for number, row in enumerate(rows, 1):
        images.append({**row["image"], "id": number})
        for segment, (_, polygons) in _segments(row):
            if polygons:
                count += 1
                known = {key: v for key, v in segment.items() if key != "id"}
                one = {"id": count, "image_id": number, **known, "segmentation": polygons}
                annotations.append(json.dumps(one, separators=(",", ":")))
    categories = [
        {"id": number, "name": name}
        for number, name, polygons in zip(taxonomy.ids, taxonomy.names, drawn(taxonomy))
        if polygons
    ]
    head = json.dumps({"info": info, "images": images, "categories": categories})
    return f'{head[:-1]}, "annotations": [{", ".join(annotations)}]}}'


def _segments(row: dict) -> Iterable[tuple[dict, tuple]]:
    """Each segment of a picture, with its centre and its polygons."""
    return zip(row["annotation"]["segments_info"], json.loads(row["objects"]))


def _objects(rows: list[dict], taxonomy: Taxonomy) -> Iterable[list]:
    """A row of COLUMNS for each thing."""
    names = dict(zip(taxonomy.ids, _headings(taxonomy)))
    for row in rows:
        for segment, (centre, _) in _segments(row):
            if centre is not None:
                diameter = round(2 * math.sqrt(segment["area"] / math.pi), 2)
                about = segment["id"], names[segment["category_id"]], segment["score"]
                size = segment["area"], diameter, *centre, *segment["bbox"]
                yield [row["image"]["file_name"], *about, *size]


def _counts(rows: list[dict], taxonomy: Taxonomy) -> tuple[list[str], Iterable[list]]:
    """Heading and rows: the picture, its size, things by class, and pixels of every class and of no
    segment."""
    columns = [*zip(taxonomy.ids, _headings(taxonomy), taxonomy.things)]
    things = [(number, name) for number, name, thing in columns if thing]
    classes = things + [(number, name) for number, name, thing in columns if not thing]
    header = [name for _, name in things] + [f"{name} (pixels)" for _, name in classes]
    counts = []
    for row in rows:
        image, count, pixels = row["image"], Counter(), Counter()
        for segment in row["annotation"]["segments_info"]:
            count[segment["category_id"]] += 1
            pixels[segment["category_id"]] += segment["area"]
        size = image["file_name"], image["width"], image["height"]
        found = [count[number] for number, _ in things] + [pixels[number] for number, _ in classes]
        counts.append([*size, *found, image["width"] * image["height"] - pixels.total()])
    return ["picture", "width", "height", *header, NO_ANSWER], counts


def _headings(taxonomy: Taxonomy) -> list[str]:
    """Names of classes: short ones, where no other class has the same."""
    count = Counter(taxonomy.short_names)
    both = zip(taxonomy.short_names, taxonomy.names)
    return [short if count[short] == 1 else name for short, name in both]


def _csv(header: list[str], rows: Iterable[list]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def next_step(output: Path, rows: list[dict], taxonomy: Taxonomy) -> str:
    """How corrected files come back, as the command of the last line: with the names of stuff,
    which labelme does not tell from things. Import refuses names that no file has, so the line
    above it has those that were not predicted."""
    seen = {s["category_id"] for row in rows for s in row["annotation"]["segments_info"]}
    flags = ["--input", str(output / FOLDER)]
    classes = [*zip(taxonomy.ids, taxonomy.names, taxonomy.short_names, drawn(taxonomy))]
    stuff = [column for column, thing in zip(classes, taxonomy.things) if not thing]
    for _, name, _, polygons in stuff:
        flags += [] if polygons else ["--background", name]
    names = [short for number, _, short, polygons in stuff if polygons and number in seen]
    unseen = [short for number, _, short, polygons in stuff if polygons and number not in seen]
    flags += ["--stuff", ",".join(names)] if names else []
    more = (
        f"stuff that was not predicted, to be named as well if you draw it: {', '.join(unseen)}\n"
    )
    return (
        (more if unseen else "")
        + f"to correct them: labelme {shlex.quote(str(output / FOLDER))}; then, with --join DIR "
        "into the data set DIR: python dearli.py "
        f"--stage import --from labelme {shlex.join(flags)} --out NEW"
    )
