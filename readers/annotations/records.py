"""What every reader of annotations gives: records of images, their instances and the classes.

Axes: H W pixels.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Callable, Iterable

from ground.errors import UserError
from readers.annotations.shapes import Draw, Size
from readers.pictures import brief, name_fault

VOID = None  # category of pixels that are not looked at
REST = ""  # category of pixels that belong to the background
UNNAMED = {"__ignore__": VOID, "_background_": REST}  # for labelme's own converters no classes


@dataclass
class Instance:
    """category: a key of Classes, VOID or REST.   draw: its pixels.
    around: what it covers at most; void, if it has no pixel of its own (a box without a mask).
    slight: that is a line or a dot, and only void where nothing else is."""

    category: str | int | None
    draw: Draw
    crowd: bool = False
    around: Draw | None = None
    slight: bool = False


@dataclass
class Record:
    """An image.   name: path below the source, with slashes.   image: a file, or its content.
    read: its (H, W) -> instances; None: nobody annotated it.
    part: `train`, `val`, or empty where the source does not say."""

    name: str
    image: Path | bytes
    read: Callable[[Size], list[Instance]] | None = None
    part: str = ""


@dataclass
class Source:
    """count: of records, or so.   passed: what was passed over.
    notes: lines that say what was guessed or joined."""

    records: Iterable[Record] = ()
    count: int = 0
    passed: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def settle(self, folder: Path, records: list[Record]) -> "Source":
        """Take these records but those of a test set; of files of one name the folders become part
        of it."""
        self.records = [record for record in records if record.part != "test"]
        self.count = len(self.records)
        self.passed["images of a test set"] = len(records) - self.count
        count = Counter(record.name.casefold() for record in self.records)
        several = [record for record in self.records if count[record.name.casefold()] > 1]
        for record in several:
            record.name = PurePosixPath(os.path.relpath(record.image, folder)).as_posix()
        if several:
            self.notes.append(
                f"{len(several)} images share their names, so the folders are part of these: "
                f"{', '.join(record.name for record in several[:2])}, ..."
            )
        return self


class Classes(dict):
    """Name, thing flag and colour (or None) of each class, by key: its id where it has one, or else
    its name. No two are called alike, and none as the background.

    stuff: names, separated by commas, of classes that are no things whatever a reader says; the
    background is none of them, though it may be all that is named.   inherited: names of stuff of a
    data set that they are for, whose other classes are things, whatever anybody says; None without
    one.   background: the class of all pixels of no other, or empty.
    """

    def __init__(self, stuff: str = "", background: str = ""):
        super().__init__()
        self.stuff = {name.strip() for name in stuff.split(",")} - {"", background}
        self.says_stuff = bool(stuff.strip(" ,"))
        self.background = background
        self.inherited: set[str] | None = None
        self.owners: dict[str, str] = {}  # whose a first name is
        if background:
            self._claim(background, "--background", "the background,")

    def add(self, key, name, where: str, thing: bool = True, colour: tuple | None = None) -> None:
        """Raises: UserError if the name is none, or its first synonym is taken."""
        first = self._claim(name, where, "the class")
        own = thing and first not in self.stuff
        self[key] = (name, own if self.inherited is None else first not in self.inherited, colour)

    def require_stuff(self) -> None:
        """Raise UserError if a class that is named as stuff is none."""
        names = sorted(self.first_name(name) for name, *_ in self.values())
        if unknown := sorted(self.stuff - {*names}):
            raise UserError(f"--stuff {unknown[0]}: no such class; available: {', '.join(names)}")

    @staticmethod
    def first_name(name, where: str = "") -> str:
        """The first synonym. Raises: UserError if there is none."""
        first = name.split(",")[0].strip() if isinstance(name, str) else ""
        if not first or name_fault(first.replace("/", "_").replace(".", "_")):
            raise UserError(
                f"{where}: {brief(name)} cannot be the name of a class; expected text without "
                "control characters"
            )
        return first

    def _claim(self, name, where: str, owner: str) -> str:
        first = self.first_name(name, where)
        if first in self.owners:
            raise UserError(
                f"{where}: the class {brief(name)} is called like {self.owners[first]}; rename one "
                "of them"
            )
        self.owners[first] = f"{owner} {brief(name)}"
        return first
