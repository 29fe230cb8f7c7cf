"""What other tools write, and which of their exports can be read: for the errors that say that
nothing was found. A folder is known by the names of its files and by how they begin.
"""

import re
from pathlib import Path
from typing import NamedTuple

from readers.annotations.files import PARTS, list_files

HEAD = 4000  # characters of a file that are looked at
LOOKED_AT = 5  # files of an ending that are opened
TEXTS = (".json", ".xml", ".yaml", ".yml", ".geojson", ".csv", ".names", ".data", ".txt")
CLOSED = (".roi", ".zip", ".tfrecord")  # only their names are looked at
AS_MASKS = "--from masks --masks-are instances"


class Sign(NamedTuple):
    """what: is found.   file, text: patterns of a path and of the beginning of the file.
    choose: what to do."""

    what: str
    file: str
    text: str
    choose: str


SIGNS = (  # the first that fits is taken
    Sign(
        "CVAT's XML",
        r"\.xml$",
        r"<annotations>",
        "in CVAT export COCO 1.0 (--from coco-instances) or Ultralytics YOLO Segmentation 1.0 "
        "(--from yolo)",
    ),
    Sign(
        "XML of the web's LabelMe",
        r"\.xml$",
        r"<annotation>[\s\S]*<polygon>",
        "open it in CVAT, which reads LabelMe 3.0, and export COCO 1.0 there (--from "
        "coco-instances)",
    ),
    Sign(
        "XML of Pascal VOC",
        r"\.xml$",
        r"<annotation[\s>]",
        "it holds boxes; the masks are in SegmentationObject/, to be put beside images/ as masks/ "
        f"({AS_MASKS}), or export COCO (--from coco-instances)",
    ),
    Sign(
        "an export of VIA",
        r"\.(json|csv)$",
        r"shape_attributes|_via_settings",
        "in VIA choose Export Annotations (COCO format), and --from coco-instances",
    ),
    Sign(
        "a project of Supervisely",
        r"(^|/)(meta\.json$|ann/.*\.json$)",
        r'"classes"|"classTitle"|"objects"',
        "in Supervisely run Export to COCO, and --from coco-instances",
    ),
    Sign(
        "GeoJSON, as QuPath writes it",
        r"\.(geo)?json$",
        r'"FeatureCollection"|"type"\s*:\s*"Feature"',
        f"in QuPath export labelled images, a value an object, and {AS_MASKS}",
    ),
    Sign(
        "ROIs of ImageJ",
        r"\.roi$|roi[^/]*\.zip$",
        "",
        f"in ImageJ make label images of them, a value a ROI, and {AS_MASKS}",
    ),
    Sign("gtFine, as Cityscapes has it", r"(^|/)gtFine/", "", "say --from cityscapes"),
    Sign("a JSON of labelme", r"\.json$", r'"shapes"\s*:\s*\[', "say --from labelme"),
    Sign(
        "JSON of Label Studio",
        r"\.json$",
        r'^\s*\[\s*\{[\s\S]*"(annotations|completions)"\s*:\s*\[',
        "say --from label-studio",
    ),
    Sign(
        "JSON-MIN or CSV of Label Studio",
        r"\.(json|csv)$",
        r'"?annotation_id"?|"annotator"',
        "in Label Studio choose the export JSON (--from label-studio)",
    ),
    Sign(
        "a JSON in COCO's format",
        r"\.json$",
        r'^\s*\{\s*"(info|licenses|images|annotations|categories)"',
        "say --from coco-instances",
    ),
    Sign("a YAML of YOLO", r"\.ya?ml$", r"(?m)^names\s*:", "say --from yolo"),
    Sign(
        "Darknet's YOLO, which is boxes",
        r"(^|/)obj\.(names|data)$",
        "",
        "choose an export of polygons: COCO (--from coco-instances) or Ultralytics YOLO "
        "Segmentation (--from yolo)",
    ),
    Sign(
        "TFRecords",
        r"\.tfrecord$",
        "",
        "choose the export COCO (--from coco-instances) or YOLOv8 (--from yolo)",
    ),
    Sign("an archive", r"\.zip$", "", "unpack it"),
)


def hint(folder: Path, reader: str, names: list[str] | None = None, too_deep: bool = False) -> str:
    """`; NAME is ...: what to choose`, or nothing if no file is of a known tool.

    reader: the one that found nothing, which is not proposed.   names: look at these files alone.
    too_deep: the reader looks into no folders, so its own files in one are named, too.
    """
    names = list_files(folder, TEXTS + CLOSED) + list_files(folder) if names is None else names
    heads, opened = {}, {}
    for name in names:
        ending = Path(name).suffix.lower()
        opened[ending] = opened.get(ending, 0) + 1
        seen = ending in TEXTS and opened[ending] <= LOOKED_AT
        heads[name] = _head(folder / name) if seen else None
    for sign in SIGNS:
        for name, head in heads.items():
            told = not sign.text or head is not None and re.search(sign.text, head)
            mine, choose = sign.choose == f"say --from {reader}", sign.choose
            if mine and too_deep and "/" in name:
                mine, choose = False, f"did you mean --input {folder / _export_of(name)}?"
            if told and not mine and re.search(sign.file, name, re.IGNORECASE):
                return f"; {name} is {sign.what}: {choose}"
    return _above(folder, reader) if too_deep else ""


def _above(folder: Path, reader: str) -> str:
    """The same of a file of the reader's own in one of two folders above."""
    (sign,) = (sign for sign in SIGNS if sign.choose == f"say --from {reader}")
    for place in folder.resolve().parents[:2]:
        for path in sorted([*place.glob("*.*"), *place.glob("annotations/*.*")]):
            if re.search(sign.file, path.name) and re.search(sign.text, _head(path) or ""):
                return f"; {path} is {sign.what}: did you mean --input {place}?"
    return ""


def _export_of(name: str) -> Path:
    """The folder of an export, of the path of a file in it."""
    place = Path(name).parent
    while place.name.lower() in (*PARTS, "annotations"):
        place = place.parent
    return place


def _head(path: Path) -> str | None:
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read(HEAD)
    except OSError:
        return None
