"""Which masks are of which image: images/NAME.* with masks/CLASS/NAME.* or masks/NAME.*; one file
an instance, masks/CLASS/NAME_3.*, masks/CLASS/NAME/*.*, masks/NAME/*.*; both folders divided into
train/ and val/, or val.txt beside them; or masks beside their images.
"""

import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Iterable, NamedTuple

from ground.errors import UserError
from readers.annotations.files import PARTS, list_files
from readers.annotations.others import hint
from readers.annotations.records import Record, Source
from readers.class_maps import CLASSES
from readers.pictures import LOSSY, brief

# What a mask's name may have behind that of its image: a word, or the number of an instance.
_WORD = r"(masks?|labels?|seg|segmentation|gt|instances?|annotation)"
SUFFIX = re.compile(
    rf"[_\-. ]+({_WORD}|((mask|instance|inst|object|obj|cell)[_\-. ]*)?(?P<number>\d+))"
)
# The same beside the images, which may be numbered themselves.
SUFFIX_BESIDE = re.compile(rf"[_\-. ]+{_WORD}([_\-. ]*\d+)?")
UNLABELED = "unlabeled"  # a folder of further images


class Mask(NamedTuple):
    """A file.   label: its class, or empty.   single: whether it is one instance."""

    label: str
    path: Path
    single: bool

    @property
    def lossy(self) -> bool:
        return self.path.suffix.lower() in LOSSY


Rows = list[tuple[Record, list[Mask]]]


def find_pairs(folder: Path, source: Source) -> Rows:
    """All images with their masks, and without one those of unlabeled/. What is passed over is
    counted, and what is guessed is a note. Raises: UserError for a mask without an image, or of
    two."""
    images, masks = folder / "images", folder / "masks"
    if not images.is_dir() and not _maps(masks) and (found := _beside(folder, source)):
        return found
    rows = _in_folders(folder, images, masks, source)
    read = ("images", "masks", UNLABELED)
    left = [name for name in list_files(folder) if name.split("/")[0] not in read]
    source.passed["pictures outside of images/ and unlabeled/"] += len(left)
    return rows + _further(folder)


def _further(folder: Path) -> Rows:
    """Images that nobody annotated."""
    further = folder / UNLABELED
    return [(Record(name, further / name, part="train"), []) for name in list_files(further)]


def _in_folders(folder: Path, images: Path, masks: Path, source: Source) -> Rows:
    names = list_files(images)
    tops = sorted({name.split("/")[0] for name in names})
    if any("/" not in name for name in names):
        own = [name for name in names if "/" not in name]
        source.passed["images in folders of images/"] += len(names) - len(own)
        rows = _pairs(images, own, masks, _maps(masks), "", source)
        _divide(folder, rows, source)
        return rows
    if not names or not {*tops} <= {*PARTS}:
        fault = "no images in this folder" if images.is_dir() else "no such folder"
        raise UserError(
            f"{images}: {fault}; expected images/NAME.* and masks/CLASS/NAME.png (folders that are "
            f"called otherwise may be links), or masks beside their images, NAME.jpg and "
            f"NAME_mask.png{likely(folder)}{hint(folder, 'masks')}"
        )
    rows, endings = [], []
    for place, part in _parts({images / top: PARTS[top] for top in tops}).items():
        own, theirs = _flat(place), masks / place.name
        source.passed["images in folders of images/"] += len(list_files(place)) - len(own)
        rows += _pairs(place, own, theirs, _maps(theirs), part, source, endings)
    return rows


def likely(folder: Path) -> str:
    """What was meant, where a folder is a part of the wanted one, or the masks are called
    otherwise."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if (folder.parent / "images").is_dir() and folder.name in ("images", "masks"):
        return f"; did you mean --input {folder.parent}?"
    spelt = [name for name in names if name.lower() in ("images", "masks") and name != name.lower()]
    if spelt:
        return f"; did you mean {folder / spelt[0]}? call it {spelt[0].lower()}"
    if {"images", "labels"} <= {*names} and any((folder / name).exists() for name in CLASSES):
        return f"; it is a folder of class maps already: train with --data-root {folder}"
    others = [name for name in names if name not in ("images", "masks") and name not in PARTS]
    if "images" in names and "masks" not in names and len(others) == 1:
        return f"; if {folder / others[0]} holds them, call it masks"
    return ""


# ------------------------------------------------------------------------------------- folders


def _maps(folder: Path) -> list[str]:
    return sorted(list_files(folder) + list_files(folder, ".npy"))


def _flat(folder: Path) -> list[str]:
    """Names of the pictures of a folder, without those of folders in it."""
    return [name for name in list_files(folder) if "/" not in name]


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _parts(parts: dict[Path, str]) -> dict[Path, str]:
    """What folders are for, or nothing where none is for validation: a share is drawn then."""
    divided = "val" in parts.values()
    return {path: part if divided or part == "test" else "" for path, part in parts.items()}


def _beside(folder: Path, source: Source) -> Rows:
    """Images with their masks beside them, NAME.jpg with NAME_mask.png or NAME.png, in the folder
    or in train/, valid/ and test/, and images without one in unlabeled/; empty if there is no such
    mask."""
    parts = {path: PARTS[path.name] for path in sorted(folder.iterdir()) if path.name in PARTS}
    rows, count, used, endings = [], 0, 0, []
    named = {place: _flat(place) for place in _parts(parts) or [folder]}
    found = {place: _masks_among(names) for place, names in named.items()}
    _require_images(named, found)
    for place, part in (_parts(parts) or {folder: ""}).items():
        names, masks = named[place], found[place]
        images = [name for name in names if name not in masks]
        count, used = count + len(masks), used + len(names)
        rows += _pairs(place, images, place, sorted(masks), part, source, endings)
    if not count:
        return []
    further = _further(folder)
    left = len(list_files(folder)) - used - len(further)
    source.passed["pictures of other folders"] += left
    source.notes.append(f"{count} pictures are masks by their names, of the images beside them")
    if not parts:
        _divide(folder, rows, source)
    return rows + further


def _masks_among(names: list[str]) -> set[str]:
    """The masks in a folder of images: NAME_mask.* and NAME_mask_1.* of NAME.*, NAME.png of
    NAME.jpg."""
    stems = {_stem(name) for name in names}
    photos = {_stem(name) for name in names if PurePosixPath(name).suffix.lower() in LOSSY}
    png = {name for name in names if name.lower().endswith(".png") and _stem(name) in photos}
    return png | {name for name in names if _before(SUFFIX_BESIDE, _stem(name), stems)[0]}


def _require_images(named: dict[Path, list[str]], masks: dict[Path, set[str]]) -> None:
    """Raise UserError for a picture that is called as the masks are, and is of no image."""
    words = set()
    for place, names in masks.items():
        stems = {_stem(name) for name in named[place]}
        for stem in map(_stem, names):
            tail = SUFFIX_BESIDE.fullmatch(stem[len(_before(SUFFIX_BESIDE, stem, stems)[0]) :])
            words |= {tail[1]} if tail else set()
    alike = re.compile(rf".*[_\-. ]+({'|'.join(sorted(words))})([_\-. ]*\d+)?") if words else None
    for place, names in named.items():
        lost = [n for n in names if alike and n not in masks[place] and alike.fullmatch(_stem(n))]
        if lost:
            raise UserError(
                f"{place / lost[0]}: is called as a mask, and there is no image that it is of; put "
                "that beside it, rename it, or take it out of the folder"
            )


def _divide(folder: Path, rows: Rows, source: Source) -> None:
    """By val.txt or valid.txt, a name of an image a line, if there is one: with or without folders
    and ending."""
    file = next((folder / n for n in ("val.txt", "valid.txt") if (folder / n).is_file()), None)
    if file is None:
        return
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable list ({brief(str(error))})") from None
    stems = {record.name: record for record, _ in rows}
    stems |= {_stem(record.name): record for record, _ in rows}
    chosen = set()
    for line in (line for line in lines if line and not line.startswith("#")):
        # some lists have the map behind the image, and some images have a blank in their names
        for name in (line, line.split()[0]):
            name = name.replace("\\", "/")  # as Windows writes it
            found = stems.get(PurePosixPath(name).name) or stems.get(_stem(name))
            if found:
                chosen.add(found.name)
                break
        else:
            raise UserError(
                f"{file}: {brief(line)} is no image here; expected the name of an image for "
                "validation a line"
            )
    if not chosen:
        raise UserError(f"{file}: names no image; expected those for validation, or no such file")
    source.notes.append(f"the {len(chosen)} images that {file.name} names are for validation")
    for record, _ in rows:
        record.part = "val" if record.name in chosen else "train"


# --------------------------------------------------------------------------------------- names


def _pairs(
    images: Path,
    names: list[str],
    masks: Path,
    files: list[str],
    part: str,
    source: Source,
    endings: list | None = None,
) -> Rows:
    """Images `names` of a folder with those of the masks `files`. endings: as of `_by_ending`."""
    real = {_composed(file): file for file in files}
    files = [PurePosixPath(file) for file in real]
    stems = defaultdict(list)
    for name in names:
        stems[_composed(_stem(name))].append(name)
    stems = _by_ending(stems, files, source, [] if endings is None else endings) or stems
    # masks are called a.png or a.jpg.png
    owners = {_composed(name): [name] for name in names} | stems
    inner = [file for file in files if len(file.parts) == 2]
    tops = {file.parts[0] for file in inner}
    by_image = tops <= stems.keys() and not all(file.stem in stems for file in inner)
    exact = {file.parent for file in files if file.stem in stems and len(file.parts) <= 2}
    owned = defaultdict(list)
    for file in files:
        depth, path = len(file.parts), masks / real[str(file)]
        label, stem, single = "" if depth == 1 or by_image else file.parts[0], file.stem, False
        if depth == 3 or depth == 2 and by_image:
            stem, single = file.parts[-2], True
        elif stem not in owners and (file.parent not in exact or images == masks):
            stem, single = _before(SUFFIX, stem, stems)
        if depth > 3 or stem not in owners:
            place = "" if depth == 1 else "masks/CLASS/NAME.png, and "
            raise UserError(
                f"{path}: expected {place}an image {images / file.stem}.*; rename it, or take it "
                "out of the folder"
            )
        first, *others = owners[stem]
        if others:
            raise UserError(
                f"{path}: is of {first} or of {others[0]}; call it {first}.png, or rename one of "
                "the images"
            )
        twins = [mask.path for mask in owned[first] if mask.label == label and not mask.single]
        if twins and not single:
            raise UserError(
                f"{path}: {twins[0]} is the map of this class and image already; take one of them "
                "out"
            )
        owned[first].append(Mask(label, path, single))
    return [(Record(name, images / name, part=part), owned[name]) for name in names]


def _composed(name: str) -> str:
    """As most systems write it; what macOS packs may have letters and their accents apart."""
    return unicodedata.normalize("NFC", name)


def _by_ending(
    stems: dict, files: list[PurePosixPath], source: Source, endings: list
) -> dict | None:
    """Images by the stem of their mask, where all masks have one ending more than their images, or
    another: NAME_L.png of NAME.png, NAME_labelIds.png of NAME_leftImg8bit.png; else None.

    endings: (of images, of masks) of the folders before, to which what is found here is added: of a
    single mask nothing can be found.
    """
    masks = {file.stem for file in files}
    known = any(mask in stems or _before(SUFFIX, mask, stems)[0] for mask in masks)
    if known or not masks:
        return None
    ours, theirs = (_common_endings(names) for names in (stems, masks))
    found = [(own, their) for own in ("", *ours) for their in theirs] if len(masks) > 1 else []
    for own, their in endings + found:
        bare = {stem.removesuffix(own): names for stem, names in stems.items()}
        fits = all(mask.endswith(their) and mask.removesuffix(their) in bare for mask in masks)
        if fits and len(bare) == len(stems):
            if (own, their) not in endings:
                endings.append((own, their))
                instead = f" in place of {own}" if own else ""
                source.notes.append(f"masks are called as their images, with {their}{instead}")
            return {f"{stem}{their}": names for stem, names in bare.items()}
    return None


def _common_endings(names: Iterable[str]) -> list[str]:
    """What all names end with, from a sign and with a letter: `_gtFine_labelIds`, `_labelIds`."""
    whole = os.path.commonprefix([name[::-1] for name in names])[::-1]
    signs = [m.start() for m in re.finditer(r"[_\-. ]+(?=.*[A-Za-z])", whole)]
    return [whole[k:] for k in signs]


def _before(suffix: re.Pattern, stem: str, stems: Iterable[str]) -> tuple[str, bool]:
    """The longest of the stems that a mask's begins with before such a suffix, and whether that
    says that it is one instance; empty if there is none."""
    for end in range(len(stem) - 1, 0, -1):
        found = suffix.fullmatch(stem[end:])
        if found and stem[:end] in stems:
            return stem[:end], bool(found.groupdict().get("number"))
    return "", False
