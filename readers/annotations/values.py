"""What the values, or the colours, of maps of classes mean: as --classes says, or a list that lies
with the maps, as people and tools write it.
"""

import re
from pathlib import Path
from typing import NamedTuple

from ground.errors import UserError
from readers.annotations.files import PARTS
from readers.ground_truth import VOID_NAMES
from readers.name_lists import lines_of, numbered
from readers.pictures import brief

OWN = ("classes.txt", "labels.txt", "classes.csv")  # lists that people write
# Those of tools: of colours (CamVid's, CVAT's), or of numbers (Roboflow's, which lies in train/).
COLOUR_LISTS = ("class_dict.csv", "label_colors.txt", "labelmap.txt")
NUMBER_LISTS = ("_classes.csv",)
REST_NAMES = frozenset("_background_ background".split())  # of the value 0, or of black
_RGB = r"(?P<r>\d{1,3})%s(?P<g>\d{1,3})%s(?P<b>\d{1,3})"
LISTS = (*OWN, *COLOUR_LISTS, *NUMBER_LISTS)
COLOURED = [  # a line of a list of colours
    re.compile(r"#(?P<hex>[0-9a-fA-F]{6})\s*[:=,\s]\s*(?P<name>.+)"),
    re.compile(r"(?P<name>[^:]+):" + _RGB % (",", ",") + r"(:.*)?"),  # label:color_rgb:parts:...
    # a number that says nothing of the maps may come first
    re.compile(
        r"\d+\s*[,;]\s*(?P<name>[^,;]*[^\d,;\s][^,;]*?)\s*[,;]\s*" + _RGB % ((r"\s*[,;]\s*",) * 2)
    ),
    re.compile(r"(?P<name>(?=.*[^\d\s,;]).*?\S)\s*[,;]\s*" + _RGB % ((r"\s*[,;]\s*",) * 2)),
    re.compile(_RGB % ((r"\s*[\s,]\s*",) * 2) + r"\s*[\s,]\s*(?P<name>\D.*)"),
    re.compile(r"(?P<name>(?=.*[^\d\s].*\s\d).*?\S)\s+" + _RGB % (r"\s+", r"\s+")),
]


class Values(NamedTuple):
    """What a list says.

    names: of each value, `__ignore__` for void and `_background_`.   coloured: the values are
    colours, 65536 r + 256 g + b.   keys: what each becomes in `Classes`: a value itself, of a
    colour its place in the list.   where: the list.   doubtful: names as they were given, of a list
    that began at 1 without a word, so that its first may be of 0; else empty.   rest: the list
    names the background itself.
    """

    names: dict[int, str]
    coloured: bool = False
    keys: dict[int, int] = {}
    where: str = ""
    doubtful: tuple[str, ...] = ()
    rest: bool = False

    def classes(self) -> dict[int, str]:
        """Name by key, of the values that are classes."""
        void = {"__ignore__", "_background_"}
        return {self.keys[v]: name for v, name in self.names.items() if name not in void}

    def shown(self, value: int) -> str:
        return f"#{value:06x}" if self.coloured else str(value)


def read_values(folder: Path, names: str, largest: int) -> Values:
    """The meaning of values: a name for each from 1 on; from 0 on if the first is a background or
    void; or `7:road,11:building`, or `#804080:road,...`.

    names: separated by commas; empty: the lines of a list in masks/, or beside it, or in train/ and
    valid/, if there is one. What is called void is void, whatever its value. 0 and 255, or black,
    are nothing (0 the background, if there is one) where nothing names them. Raises: UserError for
    a list that does not say it, for lists of parts that differ, or for values above `largest`.
    """
    if names:
        return _meaning(names.split(","), "--classes", largest)
    for place in (folder / "masks", folder):
        if (place / "classes.json").is_file() and not any(
            (place / name).is_file() for name in LISTS
        ):
            raise UserError(
                f"{place / 'classes.json'}: not read with maps; write the same into "
                f"{place / OWN[0]}, VALUE:NAME a line"
            )
        found = _lists(place, largest)
        for values in found[1:]:
            _require_alike(found[0], values, "take out the one that is wrong, or say it in")
        if found:
            return found[0]
    found = []
    for place in sorted(folder.iterdir()):
        if PARTS.get(place.name) in ("train", "val"):
            found += _lists(place, largest)
    for values in found[1:]:
        _require_alike(found[0], values, "expected one list for all parts, or")
    return found[0] if found else Values({})


def _lists(place: Path, largest: int) -> list[Values]:
    files = [place / name for name in LISTS if (place / name).is_file()]
    return [values for file in files if (values := _of_file(file, largest))]


def _require_alike(first: Values, other: Values, advice: str) -> None:
    """Raise UserError for a list that contradicts another. Of numbers and of colours, which may be
    meant for other maps, the first is taken."""
    if first.coloured == other.coloured and first.names != other.names:
        raise UserError(f"{other.where}: names other values than {first.where}; {advice} --classes")


def unread_lists(folder: Path) -> str:
    """What to say of a list that lies there and is not read: its name, or its lines, are none of
    those that are known; empty if there is none."""
    for place in (folder / "masks", folder):
        for file in sorted(place.glob("*.csv")) + sorted(place.glob("*.txt")):
            known = file.name in LISTS
            if known or re.search("class|label|colou?r", file.name, re.IGNORECASE):
                name = "" if known else f", called {COLOUR_LISTS[0]} or {OWN[0]}"
                return f"; {file} is not understood: expected lines NAME,R,G,B or VALUE:NAME{name}"
    return ""


def unused_lists(folder: Path) -> list[str]:
    """A line on lists that lie with maps whose values are no classes."""
    found = [place / name for place in (folder / "masks", folder) for name in LISTS]
    return [
        f"{file} is not read: values are objects, all of one class; of 256 * class + instance say "
        "--masks-are both, and of classes --masks-are classes"
        for file in found
        if file.is_file()
    ][:1]


def _of_file(file: Path, largest: int) -> Values | None:
    """None for a file that is called like a tool's list and is none."""
    try:
        rows = lines_of(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: not a readable list of class names ({brief(str(error))})"
        ) from None
    if file.name in COLOUR_LISTS and not _coloured(rows):
        return None
    return _meaning(rows, str(file), largest)


def _meaning(rows: list[str], where: str, largest: int) -> Values:
    rows = [row.strip() for row in rows if row.strip()]
    if colours := _coloured(rows):
        return _settled(colours, False, where, 0xFFFFFF, coloured=True)
    if odd := [row for row in rows if re.match(r"#[0-9a-fA-F]{6}\b", row)]:
        raise UserError(f"{where}: {brief(odd[0])}; expected a colour and a name in every line")
    return _settled(*_numbered(rows, where), where, largest)


def _coloured(rows: list[str]) -> list[tuple[int, str]]:
    """(colour, name) of lines that all are of one form; else none."""
    for form in COLOURED:
        found = [form.fullmatch(row) for row in rows]
        if rows and all(found):
            return [(_colour(row.groupdict()), row["name"].strip()) for row in found]
    return []


def _colour(parts: dict[str, str]) -> int:
    """Of the groups of a line; -1 if it is none."""
    if "hex" in parts:
        return int(parts["hex"], 16)
    r, g, b = (int(parts[key]) for key in "rgb")
    return 65536 * r + 256 * g + b if max(r, g, b) < 256 else -1


def _numbered(rows: list[str], where: str) -> tuple[list[tuple[int, str]], bool]:
    """(value, name) of lines, and whether they began at 1 though none says so."""
    if (pairs := numbered(rows, where)) is not None:
        return pairs, False
    name = rows[0].lower()
    first = -1 if name == "__ignore__" else int(name not in VOID_NAMES | REST_NAMES)
    return [*enumerate(rows, first)], first == 1 and len(rows) > 1


def _settled(
    named: list[tuple[int, str]],
    doubtful: bool,
    where: str,
    largest: int,
    coloured: bool = False,
) -> Values:
    values = [value for value, _ in named]
    if len({*values}) < len(values) or max(values) > largest or (coloured and min(values) < 0):
        twice = [brief(name) for value, name in named if values.count(value) > 1]
        none = [brief(name) for v, name in named if v > largest or coloured and v < 0]
        what = f"{', '.join(twice[:3])} have one value" if twice else f"{none[0]} has none that is"
        raise UserError(f"{where}: {what}; expected distinct ones up to {largest}")
    names = {0: "_background_"} if coloured else {0: "_background_", 255: "__ignore__"}
    rest = False
    for value, name in named:
        background = value == 0 and name.lower() in REST_NAMES
        rest |= background
        void = name.lower() in VOID_NAMES
        names[value] = "__ignore__" if void else "_background_" if background else name
    names.pop(-1, None)  # of labelme's lists, which begin with it
    keys = {value: k for k, value in enumerate(values, 1)} if coloured else {v: v for v in names}
    given = tuple(name for _, name in named) if doubtful else ()
    return Values(names, coloured, {0: 0} | keys, where, given, rest)
