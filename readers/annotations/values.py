"""What the values, or the colours, of maps of classes mean: as --classes says, or a list that lies
with the maps, as people and tools write it.
"""

import re
from pathlib import Path
from typing import NamedTuple

from ground.errors import UserError
from readers.annotations.files import PARTS
from readers.ground_truth import VOID_NAMES
from readers.pictures import brief

# Lists, by name: one's own, CamVid's, CVAT's, and Roboflow's (which lies in train/).
LISTS = "classes.txt labels.txt class_dict.csv label_colors.txt labelmap.txt _classes.csv".split()
REST_NAMES = frozenset("_background_ background".split())  # of the value 0, or of black
HEADER = re.compile(r"# .*|name\s*,\s*r(ed)?\s*,.*|pixel value\s*,.*", re.IGNORECASE)
_RGB = r"(?P<r>\d{1,3})%s(?P<g>\d{1,3})%s(?P<b>\d{1,3})"
COLOURED = [  # a line of a list of colours
    re.compile(r"#(?P<hex>[0-9a-fA-F]{6})\s*[:=]\s*(?P<name>.+)"),
    re.compile(r"(?P<name>[^:]+):" + _RGB % (",", ",") + r"(:.*)?"),  # label:color_rgb:parts:...
    re.compile(r"(?P<name>.+?)\s*,\s*" + _RGB % ((r"\s*,\s*",) * 2)),
    re.compile(_RGB % ((r"\s+",) * 2) + r"\s+(?P<name>\D.*)"),
]


class Values(NamedTuple):
    """names: of each value;   coloured: the values are colours, 65536 r + 256 g + b.
    keys: what each becomes in `Classes`: a value itself, of a colour its place in the list.
    doubtful: the list began at 1 without a word, so the value 0 may be its first class."""

    names: dict[int, str]
    coloured: bool = False
    keys: dict[int, int] = {}
    doubtful: bool = False

    def classes(self) -> dict[int, str]:
        """Name by key, of the values that are classes."""
        void = {"__ignore__", "_background_"}
        return {self.keys[v]: name for v, name in self.names.items() if name not in void}


def read_values(folder: Path, names: str, largest: int) -> Values:
    """The meaning of values: a name for each from 1 on; from 0 on if the first is a background or
    void; or `7:road,11:building`, or `#804080:road,...`.

    names: separated by commas; empty: the lines of a list of LISTS in masks/, or beside it, if
    there is one. What is called void is void, whatever its value. 0 and 255, or black, are nothing
    (0 the background, if there is one) where nothing names them. Raises: UserError for a list that
    does not say it, or values above `largest`.
    """
    places = [f"{part}{name}" for part in ("masks/", "", *_parts(folder)) for name in LISTS]
    file = next((folder / name for name in places if (folder / name).is_file()), None)
    if not names and file is None:
        return Values({})
    where = "--classes" if names else str(file)
    rows = names.split(",") if names else _lines(file)
    rows = [row.strip() for row in rows if row.strip()]
    for form in COLOURED:
        found = [form.fullmatch(row) for row in rows]
        if rows and all(found):
            return _settled([(_colour(row), row["name"]) for row in found], where, 0xFFFFFF, True)
    named, doubtful = _numbered(rows, where)
    return _settled(named, where, largest, doubtful=doubtful)


def _parts(folder: Path) -> list[str]:
    return [f"{path.name}/" for path in sorted(folder.iterdir()) if path.name in PARTS]


def _lines(file: Path) -> list[str]:
    """Without lines that are headings."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: not a readable list of class names ({brief(str(error))})"
        ) from None
    return [line for line in lines if not HEADER.fullmatch(line.strip())]


def _colour(row: re.Match) -> int:
    parts = row.groupdict()
    if "hex" in parts:
        return int(parts["hex"], 16)
    r, g, b = (int(parts[key]) for key in "rgb")
    return 65536 * r + 256 * g + b if max(r, g, b) < 256 else -1


def _numbered(rows: list[str], where: str) -> tuple[list[tuple[int, str]], bool]:
    """(value, name) of lines, and whether they began at 1 though none says so."""
    # A list of numbers and names may have a space or a comma between them. Some classes are called
    # "2 wheeler": only if every line begins with a number, it is one.
    pairs = [re.fullmatch(r"(\d+)\s*[:=]\s*(.+)", row) for row in rows]
    if not any(pairs):
        loose = [re.fullmatch(r"(\d+)\s*[\s,;]\s*(\D.*)", row) for row in rows]
        pairs = loose if all(loose) else pairs
    if any(pairs) and not all(pairs) or not rows:
        raise UserError(
            f"{where}: {brief(rows)}, expected a name for each value from 1 on, or value:name for "
            "all of them"
        )
    if any(pairs):
        return [(int(pair[1]), pair[2].strip()) for pair in pairs], False
    name = rows[0].lower()
    first = -1 if name == "__ignore__" else int(name not in VOID_NAMES | REST_NAMES)
    return [*enumerate(rows, first)], first == 1 and len(rows) > 1


def _settled(named: list, where: str, largest: int, coloured=False, doubtful=False) -> Values:
    values = [value for value, _ in named]
    if len({*values}) < len(values) or max(values) > largest or (coloured and min(values) < 0):
        raise UserError(f"{where}: a value is named twice, or is none; expected distinct ones")
    names = {0: "_background_"} if coloured else {0: "_background_", 255: "__ignore__"}
    for value, name in named:
        void = name.lower() in VOID_NAMES
        rest = value == 0 and name.lower() in REST_NAMES
        names[value] = "__ignore__" if void else "_background_" if rest else name
    names.pop(-1, None)  # of labelme's lists, which begin with it
    keys = {value: k for k, value in enumerate(values, 1)} if coloured else {v: v for v in names}
    return Values(names, coloured, {0: 0} | keys, doubtful)
