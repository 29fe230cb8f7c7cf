"""Instances as ground truth: COCO instance JSON as it is, and the things of other data sets.

A JSON in COCO's format for detection lists images, annotations (one an instance, or a crowd of
them) and categories. Masks are polygons, or run lengths as numbers or as text, and may overlap. All
of it is read at once; masks are kept as text and drawn when their image is asked for.
Differs from COCO: an annotation without a mask, or of the wrong size, is refused.
Axes: N instances, H W pixels, K classes.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from ground import identity
from ground.errors import UserError, refuse
from readers.annotations import shapes
from readers.ground_truth import DataSet, Taxonomy, Truth
from readers.panoptic import PanopticFolder, image_folder, require_root
from readers.panoptic_json import Complain, Wrong, classes_in, joined, read_json
from readers.pictures import brief, image_header, name_fault
from readers.runs import from_runs
from readers.splits import read_split

# The JSON of a part (train, val) and a variant, below the root of a data set.
PLACES = ("instances_{}{}", "annotations/instances_{}{}", "annotations/instances_{}2017{}")
IMPORT = "--stage import --from coco-instances"


class InstanceFolder(PanopticFolder):
    """Images and instances in COCO's format for detection: what has the methods of a panoptic
    folder, and masks that overlap.

    Of training images those with an instance that is no crowd are annotated, the others are
    unlabelled; of validation images all are: on one without instance all that is found is wrong.
    An image is turned as its EXIF block says, and its masks are those of the image as it is shown.

    ids: of the images, as in the JSON.   areas: (S,) as stated, NaN where they are not.
    Args: content: of the JSON, as `read_json` gives it.   The others: as of `PanopticFolder`.
    """

    def __init__(
        self,
        annotations: Path,
        folder: Path,
        taxonomy: Taxonomy,
        content: dict,
        validation: bool = False,
        complain: Complain = refuse,
    ):
        def wrong(kind: str, text: str) -> None:
            complain(UserError(f"{annotations}: {text}", kind))

        self.annotations, self.folder, self.taxonomy = Path(annotations), Path(folder), taxonomy
        self.maps = self.semantic = self.order = None
        self.hidden, self.unused, self.without_crowd, self.refused = True, [], 0, set()
        homes = (self.annotations.parent, self.folder)
        self.homes = tuple(f"{Path(home).resolve()}/" for home in homes)
        images = _images(content["images"], wrong)
        sound = _sound(content["annotations"], images, taxonomy, wrong)
        of_image: dict = {key: [] for key in images}
        for key, *row in sound:
            of_image[key].append(row)
        learnable = {key for key, *_, crowd, _ in sound if not crowd}
        keys = sorted(images, key=lambda key: not (validation or key in learnable))  # stable
        if validation and all(type(key) is int for key in keys):
            keys.sort()  # as COCOeval does: where scores are equal, the order counts
        self.ids = keys
        self.annotated = len(keys) if validation else len(learnable)
        self.names = np.array([images[key][0] for key in keys], str)
        self.sizes = np.array([images[key][1] for key in keys], np.int64).reshape(-1, 2)
        rows = [row for key in keys for row in of_image[key]]
        self.starts = np.cumsum([0, *(len(of_image[key]) for key in keys)])
        columns = [(number, k, round(area or 0), crowd) for number, k, area, crowd, _ in rows]
        self.segments = np.array(columns, np.int64).reshape(-1, 4)
        self.areas = np.array([area for _, _, area, _, _ in rows], np.float64)  # NaN: not stated
        # One piece of memory, which loader processes share.
        texts = [json.dumps(form).encode() for *_, form in rows]
        self.ends = np.cumsum([0, *map(len, texts)])
        self.forms = np.frombuffer(b"".join(texts), np.uint8)

    def rooted(self, folder: Path) -> None:
        """Name the images from another folder, above their own."""
        below = self.folder.relative_to(folder).as_posix()
        self.names = np.array([f"{below}/{name}" for name in self.names.tolist()], str)
        self.folder = Path(folder)
        self.homes += (f"{Path(folder).resolve()}/",)

    def add_unlabeled(self, names: list[str], folder: Path) -> None:
        """Further images without annotation. folder: where they are, which may be a link."""
        self.homes += (f"{Path(folder).resolve()}/",)
        self.names = np.array([*self.names.tolist(), *names], str)
        self.ids = [*self.ids, *names]
        self.sizes = np.concatenate([self.sizes, np.zeros((len(names), 2), np.int64)])
        self.starts = np.append(self.starts, np.repeat(self.starts[-1], len(names)))

    def _form(self, row: int) -> bytes:
        return self.forms[self.ends[row] : self.ends[row + 1]].tobytes()

    def truth_digest(self, i: int) -> str:
        """SHA-256 of its masks as the JSON has them."""
        return identity.of_text(*(self._form(r).decode() for r in self._rows(i)))

    def _rows(self, i: int) -> range:
        return range(self.starts[i], self.starts[i + 1])

    def truth(self, i: int, complain: Complain = refuse) -> Truth:
        """The instances of image i. The segment map has the smaller ones on top."""
        width, height = image_header(self.path(i))[0]
        stated = tuple(self.sizes[i].tolist())
        if stated not in ((0, 0), (height, width)):
            raise UserError(
                f"{self.annotations}: states {stated} for image {self.name(i)}, but it is "
                f"{(height, width)} (height, width, turned as EXIF says); mend the JSON",
                "size",
            )
        rows = self._rows(i)
        masks, kept = np.zeros((len(rows), height, width), bool), []
        for mask, row in zip(masks, rows):
            try:
                self._draw(mask, row)
                kept.append(row - rows.start)
            except UserError as error:
                complain(UserError(str(error), "malformed"))
        if len(kept) < len(rows):
            masks = masks[kept]
        own = rows.start + np.array(kept, np.int64)
        segments, areas, pixels = self.segments[own], self.areas[own], masks.sum((1, 2))
        areas = np.where(np.isnan(areas), pixels, areas)
        segment_map = np.zeros((height, width), np.int32)
        for k in np.argsort(-pixels, kind="stable"):
            segment_map[masks[k]] = k + 1
        crowd = segments[:, 3].astype(bool)
        return Truth(segment_map, segments[:, 1], areas, crowd, masks=masks)

    def _draw(self, mask: np.ndarray, row: int) -> None:
        """Fill a mask (H, W) from what the JSON has for it."""
        form, size = json.loads(self._form(row)), mask.shape
        where = f"{self.annotations}: annotation {self.segments[row, 0]}"
        if isinstance(form, dict):
            try:
                mask[:] = from_runs(form, size)
            except ValueError as error:
                raise UserError(
                    f"{where}: run lengths {brief(form)}, expected those of {list(size)}, the "
                    f"height and width of its image ({error})"
                ) from None
            return
        for part in form:
            points = shapes.read_points(part, size, where, flat=True)
            shapes.lay(mask, shapes.polygon(points, size), True)


def _images(entries: list, wrong: Wrong) -> dict:
    """{id: (file name, (height, width) or (0, 0) where it does not say)}"""
    images, names = {}, set()
    for place, entry in enumerate(entries):
        try:
            key, name = entry["id"], entry["file_name"]
            size = entry.get("height", 0), entry.get("width", 0)
            twice = key in images or name in names
            sound = all(type(s) in (int, float) and 0 <= s < 1 << 31 and s % 1 == 0 for s in size)
        except (KeyError, TypeError, AttributeError):
            text = f"images[{place}] is {brief(entry)}, expected an object with id and file_name"
            wrong("malformed", text)
            continue
        fault = "is listed twice" if twice else name_fault(name)
        if not sound:
            fault = f"states {brief(size)} as height and width, expected whole numbers"
        if fault:
            wrong("image twice" if twice else "name", f"image {brief(key)}: {brief(name)} {fault}")
            continue
        images[key] = name, (int(size[0]), int(size[1]))
        names.add(name)
    return images


def _sound(entries: list, images: dict, taxonomy: Taxonomy, wrong: Wrong) -> list[tuple]:
    """(id of the image, id, class, area, crowd, segmentation) of the annotations that have no
    fault that can be seen without their image.
    """
    rows, used = [], set()
    classes = {category: k for k, category in enumerate(taxonomy.ids) if category >= 0}
    for place, a in enumerate(entries):
        try:
            key, number, category = a["image_id"], a["id"], a["category_id"]
            area, crowd, form = a.get("area"), a.get("iscrowd", 0), a.get("segmentation")
            there, k = key in images, classes.get(category)
        except (KeyError, TypeError, AttributeError):
            wrong(
                "malformed",
                f"annotations[{place}] is {brief(a)}, expected an object with id, image_id, "
                "category_id, segmentation, area and iscrowd",
            )
            continue
        fault = _fault(number, area, crowd, form)
        if fault:
            pass
        elif number in used:
            fault = "is listed twice; expected an id of its own"
        elif not there:
            fault = f"is of image {brief(key)}, which is not among the images"
        elif k is None:
            fault = f"has category {brief(category)}, which is not among the categories"
        if fault:
            wrong("malformed", f"annotation {brief(number)} {fault}")
            continue
        used.add(number)
        rows.append((key, number, k, area, int(crowd), form))
    return rows


def _fault(number, area, crowd, form) -> str:
    """What is wrong with an annotation; empty: nothing that can be seen without its image."""
    if type(number) is not int or abs(number) >= 1 << 62:
        return "has an id that is no whole number"
    stated = 0 if area is None else area
    if type(stated) not in (int, float) or not 0 <= stated < 1 << 40:
        return f"has area {brief(area)}, expected a number of pixels"
    if crowd not in (0, 1):
        return f"has iscrowd {brief(crowd)}, expected 0 or 1"
    if not form:
        return (
            "has no segmentation; expected polygons or run lengths: a box alone teaches no mask, "
            "so draw one, or take it out"
        )
    if isinstance(form, list) and all(map(_is_list, form)):
        return "" if max(map(len, form)) >= 6 else "has no polygon of 3 points: no mask"
    if isinstance(form, dict):
        return ""
    return f"has segmentation {brief(form)}, expected a list of polygons, or run lengths"


def _is_list(part) -> bool:
    return isinstance(part, list)


# ------------------------------------------------------------------------------------ whole folders


def instance_json(root: Path, part: str, variant: str = "") -> Path | None:
    """The instance JSON of a part of a folder, if it has one."""
    paths = (Path(root) / f"{place.format(part, variant)}.json" for place in PLACES)
    return next((path for path in paths if path.is_file()), None)


def load_instances(
    root: Path, split: str, seed: int = 0, variant: str = "", complain: Complain = refuse
) -> DataSet:
    """A folder with instances_train.json and instances_val.json (or annotations/instances_*.json)
    and images; arguments as of `readers.panoptic.load_folder`.
    """
    root = Path(root).expanduser()
    require_root(root)
    paths = {part: instance_json(root, part, variant) for part in ("train", "val")}
    places = {p: ", ".join(f"{place.format(p, variant)}.json" for place in PLACES) for p in paths}
    if paths["train"] is None:
        raise UserError(
            f"{root}: has neither instances nor panoptic maps; looked for {places['train']}, and "
            f"as much of panoptic_train{variant}; of annotations of other tools --stage import "
            "makes panoptic maps, whose things --labels instances takes"
        )
    if paths["val"] is None:
        raise UserError(
            f"{root}: has {paths['train'].relative_to(root)}, and none of validation images; "
            f"looked for {places['val']}; {IMPORT} divides one JSON"
        )
    folders = {part: image_folder(root, part) for part in paths}
    taxonomy, train, val = read_pair(paths, folders, complain)
    return DataSet(root.name, taxonomy, train, val, *read_split(root, split, train, seed, complain))


def read_pair(
    paths: dict[str, Path], folders: dict[str, Path], complain: Complain = refuse
) -> tuple[Taxonomy, InstanceFolder, InstanceFolder]:
    """Classes, training and validation images, of the JSON and the image folder of each, by part;
    the classes of the two are joined by name.
    """
    contents = {part: read_json(path) for part, path in paths.items()}
    own = {part: _classes(contents[part]["categories"], paths[part]) for part in paths}
    taxonomy = own["train"]
    theirs = joined(taxonomy, own["val"], paths["train"], paths["val"], complain)
    train, val = (
        InstanceFolder(paths[part], folders[part], classes, contents[part], part == "val", complain)
        for part, classes in (("train", taxonomy), ("val", theirs))
    )
    return taxonomy, train, val


def _classes(categories: list, path: Path) -> Taxonomy:
    """All are things."""
    return classes_in([{**c, "isthing": 1} if isinstance(c, dict) else c for c in categories], path)


def require_every_pixel(dataset: DataSet) -> None:
    """Raise UserError if a data set has instances alone: a run wants a class for every pixel."""
    if isinstance(dataset.train, InstanceFolder):
        raise UserError(
            f"{dataset.train.annotations}: has instances and no stuff, so there is no class for "
            f"every pixel; say --labels instances, or make panoptic maps with {IMPORT}"
        )


# ----------------------------------------------------------------------- things of other data sets


def things_only(dataset: DataSet) -> DataSet:
    """The data set with its things as classes; stuff becomes void. One that has only things stays
    as it is. Raises: UserError if it has none.
    """
    things = np.array(dataset.taxonomy.things)
    if not things.any():
        raise UserError(
            f"--labels instances: {dataset.name} has no class that is a thing, so there is no "
            "instance to learn; expected a data set with things, or --labels panoptic"
        )
    if things.all():
        return dataset
    places = np.where(things, np.cumsum(things) - 1, -1)
    taxonomy = dataset.taxonomy.select(np.flatnonzero(things))
    train, val = (
        ThingsFolder(images, places)
        if isinstance(images, PanopticFolder)
        else Things(images, places)
        for images in (dataset.train, dataset.val)
    )
    return replace(dataset, taxonomy=taxonomy, train=train, val=val)


class Things:
    """Images whose ground truth is their things alone. images: `mini.scenes.MiniImages`, or what
    has its methods, all of which this has, too.

    places: (K,) the class of a thing among the things, -1 of stuff.
    """

    def __init__(self, images, places: np.ndarray):
        self.images, self.places = images, places

    def __len__(self) -> int:
        return len(self.images)

    def __getattr__(self, name: str):
        if name == "images":  # while a loader process unpacks this
            raise AttributeError(name)
        return getattr(self.images, name)

    def truth(self, i: int) -> Truth:
        return self.images.truth(i).only(self.places)

    def follow(self, order: np.ndarray) -> None:
        """Class k becomes class order[k]."""
        self.places = followed(self.places, order)


class ThingsFolder(PanopticFolder):
    """The same of a folder in COCO panoptic format; its index has the things alone, too."""

    def __init__(self, images: PanopticFolder, places: np.ndarray):
        self.__dict__.update(vars(images))
        self.whole, self.places, self.semantic = images, places, None
        classes = places[images.segments[:, 1]]
        kept = np.append(0, np.cumsum(classes >= 0))
        self.segments = images.segments[classes >= 0].copy()
        self.segments[:, 1] = classes[classes >= 0]
        self.starts = kept[images.starts]
        self.taxonomy = images.taxonomy.select(np.flatnonzero(places >= 0))

    def truth(self, i: int, complain=None) -> Truth:
        faults = () if complain is None else (complain,)
        return self.whole.truth(i, *faults).only(self.places)

    def follow(self, order: np.ndarray) -> None:
        super().follow(order)
        self.places = followed(self.places, order)


def followed(places: np.ndarray, order: np.ndarray) -> np.ndarray:
    return np.where(places >= 0, order[places], -1)
