"""New annotations and the data set that they are for, as one: `--stage import --join DIR`.

All images of DIR stay, and their parts, lists and classes. An image of DIR that was annotated now
has its new segments, so an unlabelled one becomes labelled; any other is one more image to train
on, unlabelled if nobody annotated it. DIR itself is only read.
"""

import os
from collections import defaultdict
from pathlib import Path

from ground.errors import UserError
from ground.files import place
from ground.identity import of_bytes
from readers.annotations import Classes, Record
from readers.annotations.masks import PLAIN
from readers.class_maps import is_one
from readers.ground_truth import Taxonomy
from readers.panoptic import has_maps, load_folder
from readers.panoptic_json import read_json
from readers.pictures import brief, file_digest, image_header


class Base:
    """The data set DIR, in COCO panoptic format, as rows of `tools.importer`.

    taxonomy: its classes.   rows: by name of the image.   files: of an image, the picture and, if
    it is annotated, the map.
    Raises: UserError if it is no such folder, or something in its JSON is wrong.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if is_one(self.folder) and not has_maps(self.folder):
            raise UserError(
                f"{self.folder}: holds class maps; expected COCO panoptic format, as an import "
                "writes it: import it, --from masks, with labels/ called masks/, and join that"
            )
        data = load_folder(self.folder, "all")
        self.taxonomy, self.rows, self.files = data.taxonomy, {}, {}
        self.parts: dict[str, str] = {}  # by `images` or `maps` and a name
        labeled = {data.train.name(i) for i in data.labeled}
        for part, images in (("train", data.train), ("val", data.val)):
            boxes = _boxes(images.annotations)
            for i in range(len(images)):
                name, known = images.name(i), i < images.annotated
                segments = self._segments(images.segments_of(i), boxes.get(name)) if known else []
                file = str(images.files[i]) if known else ""
                self._add(part, name, images.path(i), segments, file)
                self.rows[name]["listed"] = part == "train" and name in labeled
                self.files[name] = images.path(i), images.map_file(i) if known else None
            for name in images.unused:  # listed for validation, and not annotated
                if (images.folder / name).is_file():
                    self._add(part, name, images.folder / name)
        self.stems = {os.path.splitext(name)[0].casefold() for name in self.rows}
        self.maps = {row["map"].casefold() for row in self.rows.values()}
        self.sizes, self.met, self.digests = defaultdict(list), {}, {}
        for name, (picture, _) in self.files.items():
            self.sizes[picture.stat().st_size].append(name)

    def _add(self, part: str, name: str, picture: Path, segments=(), file: str = "") -> None:
        """Take a row. Raises: UserError if another has its name, or that of its map: both would be
        one file in the new folder."""
        for what, own in (("images", name), ("maps", file)):
            if own and self.parts.setdefault(f"{what} {own}", part) != part:
                raise UserError(
                    f"{self.folder}: {what} of training and of validation are called "
                    f"{brief(own)}, and would be one file in the new folder; rename one of them, "
                    "and in its JSON"
                )
        width, height = image_header(picture)[0]
        self.rows[name] = {
            "image": {"file_name": name, "width": width, "height": height},
            "part": part,
            "segments": [*segments],
            "map": file,
            "listed": False,
        }
        self.files[name] = picture, None

    def _segments(self, segments, boxes: dict | None) -> list[dict]:
        rows = []
        for number, k, area, crowd in segments.tolist():
            row = {"id": number, "category_id": self.taxonomy.ids[k], "area": area}
            box = (boxes or {}).get(number)
            rows.append({**row, **({"bbox": box} if box else {}), "iscrowd": crowd})
        return rows

    @property
    def classes(self) -> tuple[Taxonomy, dict]:
        """As `tools.importer.numbered` has them: rows of `join` have category ids already."""
        return self.taxonomy, {number: number for number in self.taxonomy.ids}

    @property
    def stuff(self) -> set[str]:
        """Names of classes that are no things: most tools cannot say so."""
        kinds = zip(self.taxonomy.short_names, self.taxonomy.things)
        return {name for name, thing in kinds if not thing}

    def decide(self, classes: Classes) -> None:
        """What is stuff is as it is here. Raises: UserError if --stuff says otherwise."""
        if wrong := sorted(classes.stuff.intersection(self.taxonomy.short_names) - self.stuff):
            raise UserError(
                f"--stuff {wrong[0]}: its objects are things in {self.folder}, which says what is "
                "stuff; leave the class out of --stuff"
            )
        classes.stuff -= self.stuff  # which need not occur
        classes.inherited = self.stuff - {classes.background}

    def name_of(self, record: Record) -> str | None:
        """What the picture of a record is called in DIR, if it is there: as here, or otherwise.

        Raises: UserError if another annotated record is that picture.
        """
        image, name = record.image, record.name
        if name not in self.rows:
            whole = isinstance(image, bytes)
            alike = self.sizes.get(len(image) if whole else image.stat().st_size, ())
            digest = (of_bytes(image) if whole else file_digest(image)) if alike else ""
            name = next((n for n in alike if self._digest(n) == digest), None)
        if name and record.read and self.met.setdefault(name, record.name) != record.name:
            raise UserError(
                f"{record.name} and {self.met[name]}: both are annotated, and both are the picture "
                f"{name} of {self.folder}; take one of them out"
            )
        return name

    def _digest(self, name: str) -> str:
        """Of a picture of DIR, which is read once."""
        if name not in self.digests:
            self.digests[name] = file_digest(self.files[name][0])
        return self.digests[name]

    def map_name(self, name: str) -> str:
        """Where the map of an image goes that was annotated now: the place of its old one, or one
        that no other has."""
        if name in self.rows and self.rows[name]["map"]:
            return self.rows[name]["map"]
        path = Path(name)
        free = path.with_suffix(".png").as_posix()
        return free if free.casefold() not in self.maps else f"{name}.png"

    def join(
        self, rows: list[dict], classes: Classes, background: str, output: Path
    ) -> tuple[list[dict], str]:
        """All rows, and a line on what was joined. What is DIR's is placed in the output.

        rows: of what was annotated now; their images and maps are in the output.
        Raises: UserError if a class is none of DIR's, or an image is called like one of DIR's that
            is another picture.
        """
        numbers, joined = self._numbers(classes, background), dict(self.rows)
        again = truth = 0
        for row in rows:
            name, old = row["image"]["file_name"], self.rows.get(row["image"]["file_name"])
            if old:
                self._require_same(name, output / "images" / name)
            if old and not row["segments"]:
                continue
            again += old is not None
            truth += old is not None and old["part"] == "val"
            for segment in row["segments"]:
                segment["category_id"] = numbers[segment["category_id"]]
            joined[name] = {**row, "part": old["part"] if old else "train", "listed": True}
        for name, row in joined.items():
            if row is self.rows.get(name):
                picture, map_file = self.files[name]
                place(picture, output / "images" / name)
                if map_file is not None:
                    place(map_file, output / "panoptic" / row["map"])
        for path in sorted((self.folder / "splits").glob("*/*.txt")):
            if path.parent.name != "all":
                place(path, output / "splits" / path.parent.name / path.name)
        more, other = len(joined) - len(self.rows), sum(k != name for k, name in self.met.items())
        known = f" ({other} of them are known by their pixels, under other names)" if other else ""
        measure = f" ({truth} of them validation images, which runs are measured by)"
        known += measure if truth else ""
        return list(joined.values()), (
            f"{again} images of {self.folder} have new annotations{known}, and {more} are "
            f"added to its {len(self.rows)}"
        )

    def _numbers(self, classes: Classes, background: str) -> dict:
        """DIR's category ids, by key of the new classes."""
        known = dict(zip(self.taxonomy.short_names, self.taxonomy.ids))
        named = {key: name for key, (name, *_) in classes.items()}
        named |= {background: background} if background else {}
        numbers = {key: known.get(Classes.first_name(name)) for key, name in named.items()}
        unknown = sorted(named[key] for key, number in numbers.items() if number is None)
        if unknown:
            mend = "rename it in the annotations, or in --background"
            if unknown == [PLAIN]:
                mend = f"put the masks of a class into masks/CLASS/, as masks/{next(iter(known))}/"
            raise UserError(
                f"{brief(unknown[0])}: is no class of {self.folder}, which has "
                f"{', '.join(known)}; {mend}"
            )
        return numbers

    def _require_same(self, name: str, picture: Path) -> None:
        if file_digest(picture) != file_digest(self.files[name][0]):
            raise UserError(
                f"{self.files[name][0]}: another picture than the one of this name that was "
                "annotated; rename that one, and its annotation"
            )


def _boxes(annotations: Path) -> dict[str, dict[int, list]]:
    """Boxes by image and id of the segment: the reader of the JSON has no use for them."""
    content = read_json(annotations)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    return {
        names[one["image_id"]]: {s["id"]: s.get("bbox") for s in one["segments_info"]}
        for one in content["annotations"]
    }
