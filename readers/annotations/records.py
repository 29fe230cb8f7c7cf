"""What every reader of annotations gives: records of images, their instances and the classes; and
how it finds files.

Links to folders are followed; a linked file may not lead out of the source, or of the linked folder
that it is in. Axes: H W pixels.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Callable, Iterable

import numpy as np

from ground.errors import UserError
from readers.pictures import brief, name_fault, pictures

VOID = None  # category of pixels that are not looked at
REST = ""  # category of pixels that belong to the background
UNNAMED = {"__ignore__": VOID, "_background_": REST}  # for labelme's own converters no classes
PARTS = {  # what folders and files are called -> what they are for
    **dict.fromkeys("train training".split(), "train"),
    **dict.fromkeys("val valid validation".split(), "val"),
    **dict.fromkeys("test testing".split(), "test"),
}
Patch = tuple[int, int, np.ndarray]  # top, left, (h, w) bool: pixels of an instance, in the image
Draw = Callable[[], Patch]  # made anew at every call, so that one mask at a time is in memory


@dataclass
class Instance:
    """category: a key of Classes, VOID or REST.   draw: its pixels.
    around: what it covers at most; void, below all instances, if it has no pixel of its own (a box
    without a mask, a line)."""

    category: str | int | None
    draw: Draw
    crowd: bool = False
    around: Draw | None = None


@dataclass
class Record:
    """An image.   name: path below the source, with slashes.   image: a file, or its content.
    read: its (H, W) -> instances; None: nobody annotated it.
    part: `train`, `val`, or empty where the source does not say."""

    name: str
    image: Path | bytes
    read: Callable[[tuple[int, int]], list[Instance]] | None = None
    part: str = ""


@dataclass
class Source:
    """count: of records, or so.   passed: what was passed over.
    notes: lines that say what was guessed or joined."""

    records: Iterable[Record] = ()
    count: int = 0
    passed: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


class Classes(dict):
    """Name, thing flag and colour (or None) of each class, by key: its id where it has one, or else
    its name. No two are called alike, and none as the background.

    stuff: names, separated by commas, of classes that are no things whatever a reader says.
    """

    def __init__(self, stuff: str = "", background: str = ""):
        super().__init__()
        self.stuff = {name.strip() for name in stuff.split(",")} - {"", background}
        self.owners: dict[str, str] = {}  # whose a first name is
        if background:
            self._claim(background, "--background", "the background,")

    def add(self, key, name, where: str, thing: bool = True, colour: tuple | None = None) -> None:
        """Raises: UserError if the name is none, or its first synonym is taken."""
        first = self._claim(name, where, "the class")
        self[key] = (name, thing and first not in self.stuff, colour)

    def require_stuff(self) -> None:
        """Raise UserError if a class that is named as stuff is none."""
        names = sorted(_first(name) for name, *_ in self.values())
        if unknown := sorted(self.stuff - {*names}):
            raise UserError(f"--stuff {unknown[0]}: no such class; available: {', '.join(names)}")

    def _claim(self, name, where: str, owner: str) -> str:
        first = require_name(name, where)
        if first in self.owners:
            raise UserError(
                f"{where}: the class {brief(name)} is called like {self.owners[first]}; rename one "
                "of them"
            )
        self.owners[first] = f"{owner} {brief(name)}"
        return first


def require_name(name, where: str) -> str:
    """The first of the names of a class. Raises: UserError if that is no name."""
    first = _first(name) if isinstance(name, str) else ""
    if not first or name_fault(first.replace("/", "_").replace(".", "_")):
        raise UserError(
            f"{where}: {brief(name)} cannot be the name of a class; expected text without control "
            "characters"
        )
    return first


def require_size(stated: tuple, size: tuple[int, int], claim: str, mend: str) -> None:
    """Raise UserError if an annotation states another (height, width) than that of its image."""
    if stated != (None, None) and stated != size:
        raise UserError(f"{claim}, but it is {size} (height, width, turned as EXIF says); {mend}")


def tell_apart(folder: Path, source: Source) -> None:
    """Files of one name get the names of their folders, too."""
    count = Counter(record.name.casefold() for record in source.records)
    several = [record for record in source.records if count[record.name.casefold()] > 1]
    for record in several:
        record.name = PurePosixPath(os.path.relpath(record.image, folder)).as_posix()
    if several:
        source.notes.append(
            f"{len(several)} images share their names, so the folders are part of these: "
            f"{', '.join(record.name for record in several[:2])}, ..."
        )


def list_files(folder: Path, ending: str = "") -> list[str]:
    """Paths below the folder, sorted, with slashes, of the pictures, or of the files that end so
    (with a dot, in small letters). A folder that is not there has none."""
    images, others = _everything(folder)
    return [name for name in others if name.lower().endswith(ending)] if ending else images


def follow_links(folder: Path) -> list[str]:
    """Lines that say which links to folders are followed. Raises: UserError if a linked file leads
    out of the source and of every linked folder."""
    images, others = _everything(folder)
    above = {PurePosixPath(os.path.dirname(name)) for name in (*images, *others)}
    above |= {parent for place in above for parent in place.parents}
    links = sorted(str(place) for place in above - {PurePosixPath()})
    links = {
        link: os.path.realpath(folder / link) for link in links if (folder / link).is_symlink()
    }
    inside = tuple(os.path.join(real, "") for real in (os.path.realpath(folder), *links.values()))
    for path in (folder / name for name in (*images, *others)):
        if path.is_symlink() and not os.path.realpath(path).startswith(inside):
            raise UserError(
                f"{path}: is a link that leads out of the source, to {os.path.realpath(path)}; "
                "expected a file (a whole folder may be a link): copy it there"
            )
    if not links:
        return []
    listed = [f"{link} -> {real}" for link, real in links.items()]
    more = ", ..." if len(listed) > 3 else ""
    return [f"{len(listed)} linked folders are followed: {', '.join(listed[:3])}{more}"]


def _first(name: str) -> str:
    return name.split(",")[0].strip()


def _everything(folder: Path) -> tuple[list[str], list[str]]:
    """The pictures below a folder, and the other files, without hidden ones; both are sorted."""
    if not folder.is_dir():
        return [], []
    others: list[str] = []
    images = pictures(folder, others.append)
    others = [name for name in others if not name.endswith("/")]  # folders that are passed over
    return images, sorted(name for name in others if not os.path.basename(name).startswith("."))
