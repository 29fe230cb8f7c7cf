"""SAM's masks on disk: one JSON an image, in the format of SA-1B, with what they were made of.

Masks are run lengths (`readers.runs`).
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ground import identity, ranks
from ground.errors import UserError
from ground.files import claim, release, write_atomic
from ground.identity import differences
from readers.pictures import brief
from readers.runs import from_runs, to_runs

# What reading a file that is not one of masks raises.
BROKEN = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OSError)
AGAIN = "delete it and run --stage masks again"
EXPOSED = ", or of another exposure of it, see --stretch"


# ------------------------------------------------------------------------------------------ making


def generate_masks(images, generator, folder: Path, redo: bool = False) -> int:
    """Let SAM segment every image; one JSON file an image, so that an interrupted call goes on
    where it was; a file that was cut short is made again.

    A file says of which image it is and what made it. Hours of masks are not replaced in silence:
    where one is there of another image of this name, or by other settings, nothing is made. Files
    without such a word (SA-1B, older versions of ours) are taken as they are.

    Args:
        images: has len, name(i), image(i) and digest(i): `mini.scenes.MiniImages`,
            `readers.panoptic.PanopticFolder`, `readers.pictures.ImageFolder`.
        generator: a `pretrained.sam.MaskGenerator`, or what has its `generate`, and `about`, what
            its masks depend on, where it can say.    folder: of the JSON files.
        redo: replace whatever is there.
    Returns: the number of images segmented now, by all ranks: each takes its share.
    Raises: UserError if masks are there of something else: then no file is written.
    """
    mine = range(ranks.rank(), len(images), ranks.count())
    todo, silent, others = list(mine), 0, []
    if not redo:
        todo, silent, others = _compare(images, mine, getattr(generator, "about", None), folder)
    others = [text for of_rank in ranks.gather(others) for text in of_rank]
    if others:
        raise UserError(
            f"{folder}: {len(others)} of {len(images)} files of masks are of something else: "
            f"{others[0]}; choose another folder (--runs, or --out here and --masks where they "
            "are used), or delete this one",
            "masks",
        )
    silent = sum(ranks.gather(silent))
    if silent and ranks.rank() == 0:
        print(
            f"{folder}: {silent} files do not say of which image they are and what made them; "
            "taken as they are"
        )
    count = sum(ranks.gather(len(todo)))
    if not count:
        return 0
    if ranks.rank() == 0:
        claim(folder)
    ranks.wait()  # what a killed writer left is removed before anybody writes
    quiet = ranks.rank() > 0
    for i in tqdm(todo, desc="SAM masks", unit="image", dynamic_ncols=True, disable=quiet):
        segment(images, i, generator, folder)
    ranks.wait()  # for the last of them
    release(folder)
    return count


def _compare(images, indices, about: dict | None, folder: Path) -> tuple[list[int], int, list[str]]:
    """What is there of these images: those without a whole file, how many files do not say what
    they are of, and a text for each that is of something else."""
    todo, silent, others = [], 0, []
    stems = _stems(folder, images)
    for i in indices:
        path = _place(folder, images.name(i))
        try:
            content = _content(path, images.name(i))
            if _of_either(path, content, stems[path]):
                raise FileNotFoundError
        except (UserError, *BROKEN):
            todo.append(i)  # none, or a part of one: copied by halves, written by another tool
            continue
        digest, made_by = content["image"].get("sha256"), content.get("generator")
        silent += digest is None or made_by is None and about is not None
        if digest not in (None, images.digest(i)):
            others.append(
                f"{path.name} is of another image of that name than the one at hand{EXPOSED}"
            )
        elif about is not None and made_by not in (None, about):
            settings = differences(made_by, about)
            others.append(f"{path.name} was made with other settings ({settings})")
    return todo, silent, others


def segment(images, i: int, generator, folder: Path) -> None:
    """Write the file of the masks of one image; arguments as in `generate_masks`."""
    image, name = np.asarray(images.image(i)), images.name(i)
    masks = generator.generate(image)
    height, width = image.shape[:2]
    content = {
        "image": {
            "image_id": Path(name).stem,
            "file_name": name,
            "height": height,
            "width": width,
            "sha256": images.digest(i),
        },
        "generator": getattr(generator, "about", None),
        "annotations": [
            {
                "id": k,
                "segmentation": to_runs(m["segmentation"]),
                "area": int(m["area"]),
                "predicted_iou": float(m["predicted_iou"]),
                "stability_score": float(m["stability_score"]),
                "crop_box": [float(v) for v in m["crop_box"]],
                "point_coords": [[float(v) for v in p] for p in m["point_coords"]],
            }
            for k, m in enumerate(masks, 1)
        ],
    }
    write_atomic(Path(folder) / f"{name}.json", json.dumps(content).encode())


# ----------------------------------------------------------------------------------------- finding


def mask_file(folder: Path, name: str) -> Path:
    """The file of the masks of an image: NAME.json with its whole name, so that a.jpg and a.png do
    not meet. Where that is not there, the older STEM.json (of SA-1B, too), if it states that it is
    of this image."""
    path = _place(folder, name)
    try:
        _content(path, name)
        return path
    except (UserError, *BROKEN):
        return Path(folder) / f"{name}.json"


def missing_masks(folder: Path, images) -> list[int]:
    """Images without a file of masks, by the names in the folder alone. Only where images share a
    stem, files are opened."""
    folder, stems = Path(folder), _stems(folder, images)
    there = set(folder.rglob("*.json")) if folder.is_dir() else set()

    def has(name: str) -> bool:
        path = folder / f"{name}.json"
        if path not in there:
            path = folder / Path(name).with_suffix(".json")
        if path not in there or stems[path] < 2:
            return path in there
        try:
            return not _of_either(path, _content(path, name), stems[path])
        except (UserError, *BROKEN):
            return False

    return [i for i in range(len(images)) if not has(images.name(i))]


def _place(folder: Path, name: str) -> Path:
    """NAME.json, or where there is only STEM.json that one, whatever it is of."""
    path, older = Path(folder) / f"{name}.json", Path(folder) / Path(name).with_suffix(".json")
    return older if older.exists() and not path.exists() else path


def _stems(folder: Path, images) -> Counter:
    """How many images each STEM.json could be of."""
    names = map(images.name, range(len(images)))
    return Counter(Path(folder) / Path(name).with_suffix(".json") for name in names)


def _of_either(path: Path, content: dict, images: int) -> bool:
    """Several images could be meant, and the file does not say which."""
    return images > 1 and content["image"].get("file_name") is None


# ----------------------------------------------------------------------------------------- reading


def read_masks(
    folder: Path, name: str, expected: tuple[int, int], digest: str | None = None
) -> np.ndarray:
    """(H, W, N) bool: the masks of an image of `expected` size (H, W), which no mask exceeds in
    memory whatever its file states.

    digest: SHA-256 of the image, with which a file that states one has to agree.
    Raises: UserError if there is no file, not such a file, or one of masks of another size or of
    another image.
    """
    path, expected = _place(folder, name), tuple(expected)
    try:
        content = _content(path, name)
        image = content["image"]
        if digest is not None and image.get("sha256") not in (None, digest):
            raise _of_another_image(path, name)
        sizes = {tuple(a["segmentation"]["size"]) for a in content["annotations"]}
        sizes |= {(image["height"], image["width"])}
        if sizes != {expected}:
            other = brief(sorted(sizes - {expected}, key=repr)[0])
            raise UserError(
                f"{path}: masks are {other}, the image {name} is {expected} (height, width); "
                f"{AGAIN}",
                "masks",
            )
        # Each mask in one piece, as its runs are stored: together they are a view of (N, W, H).
        masks = np.zeros((len(content["annotations"]), *expected[::-1]), bool)
        for mask, annotation in zip(masks, content["annotations"]):
            mask[:] = from_runs(annotation["segmentation"], expected).T
    except FileNotFoundError:
        raise UserError(
            f"{path}: no SAM masks for image {name}; make them with --stage masks", "masks"
        ) from None
    except BROKEN as error:
        raise _unreadable(path, error) from None
    return masks.transpose(2, 1, 0)


def made_of(folder: Path, images, indices=None) -> dict:
    """What the masks of a folder are, from up to 64 of its files, evenly spread by name
    (`identity.sample`): {"folder", "generator", "digest"}.

    generator: its settings; None if the files do not say.   digest: changes if masks are of other
    images, of another generator, or (where they do not say) others.

    indices: of the images whose masks are meant; None: all.   Raises: UserError if the files are
    of several generators, or of other images than those of their names.
    """
    order = sorted(range(len(images)) if indices is None else indices, key=images.name)
    makers, parts = [], [images.name(i) for i in order]
    for i in identity.sample(order):
        name = images.name(i)
        path = _place(folder, name)
        if not path.exists():
            continue  # whoever reads it will say so
        try:
            content = _content(path, name)
        except BROKEN as error:
            raise _unreadable(path, error) from None
        digest, generator = content["image"].get("sha256"), content.get("generator")
        if digest not in (None, images.digest(i)):
            raise _of_another_image(path, name)
        makers.append(generator)
        if generator != makers[0]:
            raise UserError(
                f"{folder}: holds masks of several makers "
                f"({differences(makers[0] or {}, generator or {})}); expected one: make them "
                "anew in another folder with --stage masks --out",
                "masks",
            )
        known = digest is not None and generator is not None
        parts.append(digest if known else identity.of_bytes(path.read_bytes()))
    generator = makers[0] if makers else None
    return {
        "folder": str(folder),
        "generator": generator,
        "digest": identity.of_text(*parts, json.dumps(generator, sort_keys=True)),
    }


def _content(path: Path, name: str) -> dict:
    """What a file of `_place` holds. Raises: UserError if it is of an image of another name;
    FileNotFoundError; what BROKEN lists."""
    content = json.loads(path.read_text(encoding="utf-8"))
    stated, _ = content["image"].get("file_name"), content["annotations"]
    if stated is not None and Path(str(stated)).name != Path(name).name:
        raise UserError(
            f"{path}: states that it is of {brief(stated)}, not of {name}; make masks of it with "
            "--stage masks, or mend its file_name",
            "masks",
        )
    return content


def _of_another_image(path: Path, name: str) -> UserError:
    return UserError(
        f"{path}: masks of another image of that name than the {name} at hand{EXPOSED}; name the "
        "folder of its own masks with --masks, or make them in another folder with --stage masks "
        "--out",
        "masks",
    )


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {brief(str(error))}"
    return UserError(f"{path}: not a file of SAM masks ({reason}); {AGAIN}", "masks")
