"""Files of a source. Links to folders are followed; a linked file may not lead out of the source,
or of the linked folder that it is in.
"""

import contextlib
import os
from pathlib import Path, PurePosixPath
from typing import Callable, Iterable

from ground.errors import UserError
from readers.pictures import brief, pictures

# Endings of files that some reader reads, and of what tools put beside them.
READ = {*".json .txt .yaml .yml .names .npy .csv .md".split()}
PARTS = {  # what folders and files are called -> what they are for
    **dict.fromkeys("train training".split(), "train"),
    **dict.fromkeys("val valid validation".split(), "val"),
    **dict.fromkeys("test testing".split(), "test"),
}


def list_files(folder: Path, ending: str | tuple[str, ...] = "") -> list[str]:
    """Paths below the folder, sorted, with slashes, of the pictures, or of the files that end so
    (with a dot, in small letters; one of several). A folder that is not there has none."""
    images, others = _everything(folder)
    return [name for name in others if name.lower().endswith(ending)] if ending else images


def part_of(name: str) -> str:
    """What an image is for by its folders (a value of PARTS, the innermost), or empty."""
    words = reversed(os.path.dirname(name).lower().split("/"))
    return next((PARTS[word] for word in words if word in PARTS), "")


def division(annotated: Iterable[str], notes: list[str]) -> Callable[[str], str]:
    """The part of an image by its name, where folders divide those that are annotated into training
    and validation (or test, if there is no other); else always empty. Adds a line on which it
    is."""
    used = {part_of(name) for name in annotated}
    second = next((part for part in ("val", "test") if part in used), "")
    if not second:
        return lambda name: ""
    if not used & {"train", ""}:
        notes.append(f"all that is annotated is in folders for {second}, so these divide nothing")
        return lambda name: ""
    notes.append(f"validation images are those in folders for {second}")
    return part_of if second == "val" else lambda name: part_of(name).replace("test", "val")


def survey(folder: Path) -> list[str]:
    """Lines on what of a source is read and what is not. Raises: as `_follow_links` does."""
    return [*_neighbours(folder), *_follow_links(folder), *_passed_over(folder)]


def _follow_links(folder: Path) -> list[str]:
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


def _neighbours(folder: Path) -> list[str]:
    """A line that says that the source is one part of a division, and the others are not read."""
    here = folder.resolve()
    own, others = PARTS.get(here.name.lower()), []
    if own:
        with contextlib.suppress(OSError):  # nobody may list it
            others = [path.name for path in here.parent.iterdir() if path.is_dir()]
    others = [name for name in others if PARTS.get(name.lower(), own) != own]
    if not others:
        return []
    return [
        f"{folder} alone is read, not {', '.join(sorted(others))} beside it; --input "
        f"{here.parent} reads all of them"
    ]


def _passed_over(folder: Path) -> list[str]:
    """A line that says which files are neither pictures nor any text or array of annotations."""
    _, others = _everything(folder)
    odd = [name for name in others if os.path.splitext(name)[1].lower() not in READ]
    if not odd:
        return []
    listed = ", ".join(map(brief, odd[:3])) + (", ..." if len(odd) > 3 else "")
    return [
        f"{len(odd)} files passed over, by their endings neither pictures nor annotations: {listed}"
    ]


def _everything(folder: Path) -> tuple[list[str], list[str]]:
    """The pictures below a folder, and the other files, without hidden ones; both are sorted."""
    if not folder.is_dir():
        return [], []
    others: list[str] = []
    images = pictures(folder, others.append)
    others = [name for name in others if not name.endswith("/")]  # folders that are passed over
    return images, sorted(name for name in others if not os.path.basename(name).startswith("."))
