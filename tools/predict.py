"""A trained run applied to pictures: to one from Python, to a folder from the command line
(`--stage predict`).

    import dearli

    model = dearli.load("runs/mini-dearli-16")
    result = model("picture.jpg")              # or a PIL image, or an array (H, W, 3) or (H, W)
    print(result.segment_map.shape, result.names, result.scores)
    result.overlay().save("overlay.png")

For a picture PATH/a.jpg of the folder, OUTPUT/ holds (the whole name stays, so that a.jpg and a.png
do not meet):

    panoptic/PATH/a.jpg.png   segment ids R + 256 G + 65536 B, 0 = void
    semantic/PATH/a.jpg.png   class + 1, the place among `categories` of the JSON; 8 bits, or 16
                              where there are more than 255 classes. By semantic inference, which
                              knows no void: 0 does not occur, and a class need not be that of the
                              panoptic map. classes.txt there says which value is which
    overlay/PATH/a.jpg.png    for the eye, see `report.drawing.overlay`
    panoptic.json             COCO panoptic format: ids of images are their names PATH/a.jpg, every
                              segment has a score, `info` says what predicted;
                              sha256 of a picture: of its file, so that --resume predicts one anew
                              that has become another
    panoptic.jsonl            the same, a line a picture, written after the files of its picture:
                              a kill loses one picture at most
    labelme/, instances.json, objects.csv, counts.csv
                              to correct and to count, see `tools.exchange`
    results.json              of a run of --labels instances: all of them, of any score, as COCO
                              results; the other files have those of at least --least-score, each
                              where no surer one hides it, and semantic/ is 0 where there is none

Maps are as large as the picture as it is shown: turned as its EXIF block says.
"""

import contextlib
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

import inference
from config import BEFORE, Config
from engine.evaluation import predict_image
from engine.method import Method
from engine.request import Machine, Source
from engine.run_log import append
from engine.stored import Stored, restore
from ground.ahead import ahead
from ground.errors import UserError, choose
from ground.files import claim, release, write_atomic
from ground.identity import listed
from readers.arrays import from_array
from readers.exposure import doubts, meaning
from readers.ground_truth import Taxonomy
from readers.pictures import as_rgb, brief, endings, file_digest, name_fault, open_image, pictures
from readers.sixteen_bit import WHITE
from report import drawing
from report.finish import repainted
from tools import exchange, large
from tools.prepare import encode

KINDS = ("panoptic", "semantic", "overlay")
ROW = ("image", "annotation", "objects")  # of panoptic.jsonl; the last see `tools.exchange`
# Of Config, that a prediction depends on.
NUMBERS = (
    "alpha clip_scale merging least_quality object_mask_threshold overlap_threshold least_score "
    "test_size test_max seen_width object_width window white stretch"
).split()
ROWS = 2**24  # pixels of a map that are counted at once


@dataclass
class Prediction:
    """What a model says of one image. segment_map: (H, W) int32, 0 = void, k = k-th segment;
    labels: (N,) classes;  scores: (N,), as in `inference.Prediction`;  semantic: (H, W) int64,
    a class for every pixel.   answer: of a run that predicts instances: all of them, of any score,
    with their masks; the others are those of at least `least_score`, and semantic is -1 where there
    is none.
    """

    image: Image.Image
    segment_map: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    semantic: np.ndarray
    taxonomy: Taxonomy
    answer: inference.Prediction | None = None

    @property
    def names(self) -> list[str]:
        """The class name of every segment."""
        return [self.taxonomy.short_names[label] for label in self.labels]

    def overlay(self, **flags) -> Image.Image:
        """flags: as in `report.drawing.overlay`."""
        return drawing.overlay(self.image, self.segment_map, self.labels, self.taxonomy, **flags)

    def segments_info(self) -> list[dict]:
        """As in COCO panoptic format, with a score."""
        return segments_info(self, self.taxonomy)


def segments_info(answer, taxonomy: Taxonomy) -> list[dict]:
    """The segments of a prediction as in COCO panoptic format, with a score.

    answer: what has segment_map, labels and scores; the map may be in a file.
    """
    areas = np.zeros(len(answer.labels) + 1, np.int64)
    rows = max(1, ROWS // answer.segment_map.shape[1])
    for top in range(0, len(answer.segment_map), rows):
        areas += np.bincount(answer.segment_map[top : top + rows].ravel(), minlength=len(areas))
    boxes = [
        (xs.start, ys.start, xs.stop - xs.start, ys.stop - ys.start)
        for ys, xs in ndimage.find_objects(answer.segment_map)
    ]
    return [
        {
            "id": k + 1,
            "category_id": taxonomy.ids[label],
            "area": int(areas[k + 1]),
            "bbox": [*boxes[k]],
            "iscrowd": 0,
            "score": round(float(answer.scores[k]), 6),
        }
        for k, label in enumerate(answer.labels)
    ]


class Predictor:
    """A run as a function of images. reading: "student/ensemble", ...   about: what `info` of the
    JSON shall say of its weights."""

    def __init__(self, method: Method, reading: str, about: dict):
        self.method, self.reading = method, reading
        self.taxonomy, self.cfg = method.taxonomy, method.cfg
        self.white = self.cfg.white or WHITE  # see `open_image`; an official file stores none
        which, posterior = reading.split("/")
        self.model = method.models[which].eval()
        self.about = {**about, "which": which, "posterior": posterior}

    def __call__(self, image) -> Prediction:
        """image: a path; or PIL, of any size and mode, not turned (`readers.pictures.open_image`
        does that); or what `readers.arrays.from_array` takes."""
        if isinstance(image, (str, os.PathLike)):
            return self.predict(self.open(Path(image)))
        image = image if isinstance(image, Image.Image) else from_array(image)
        return self.predict(as_rgb(image, self.white, self.cfg.stretch))

    def predict(self, image: Image.Image) -> Prediction:
        """image: as `open` has it, RGB by the run's exposure."""
        answer = predict_image(self.method, image, [self.reading], semantic=True)[self.reading]
        if self.cfg.labels == "instances":
            sure = answer.sure(self.cfg.least_score)
            classes = np.append(-1, sure.labels)[sure.segment_map]
            arrays = sure.segment_map, sure.labels, sure.scores, classes
            return Prediction(image, *arrays, self.taxonomy, answer)
        arrays = answer.segment_map, answer.labels, answer.scores, answer.semantic
        return Prediction(image, *arrays, self.taxonomy)

    def open(self, path: Path) -> Image.Image:
        """As the run sees its images."""
        return open_image(path, white=self.white, stretch=self.cfg.stretch)

    def read(self, path: Path) -> tuple[Image.Image, dict[str, str]]:
        """The same, and what may be wrong with how it is seen (`readers.exposure.doubts`)."""
        image = self.open(path)
        return image, doubts(path, image, self.white, self.cfg.stretch)

    def info(self) -> dict:
        """What a prediction depends on, beside the image. sha256: of weights and classes."""
        digest = hashlib.sha256(repr(self.taxonomy).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
        return {
            **self.about,
            "sha256": digest.hexdigest(),
            **{name: getattr(self.cfg, name) for name in NUMBERS},
            "white": self.white,
        }


def predictor(
    stored: Stored,
    source: Source,
    machine: Machine,
    cfg: Config,
    which: str,
    posterior: str,
    palette: str,
) -> Predictor:
    """The student or the teacher of a run, with its own classes. posterior: empty: the paper's."""
    if cfg.alpha == "labeled":
        raise UserError("--alpha labeled: expected a number, pictures have no labelled share")
    if stored.is_warm_up:
        raise UserError(
            f"{stored.path}: a DeWa run knows no classes; expected one of --stage sup or --stage "
            "ssl"
        )
    choose(f"model of {stored.path}", which, stored.names)
    taxonomy = repainted(stored.taxonomy(source, cfg), palette == "safe")
    method = restore(stored, cfg, taxonomy, machine.device, source.name)
    posteriors = [r.split("/")[1] for r in method.readings if r.split("/")[0] == which]
    usual = method.reading.split("/")[1]
    posterior = choose("posterior of this run", posterior or usual, posteriors)
    return Predictor(method, f"{which}/{posterior}", {"weights": str(stored.path)})


class Pictures:
    """A picture, or those of a folder and of the folders in it, and where their predictions go.

    What a picture is, `readers.pictures.pictures` says; earlier predictions in the same folder are
    passed over, too.
    Raises: UserError if there is no picture, or something is there already that neither force
        allows to replace nor resume to continue.
    """

    def __init__(self, source: Path, output: Path, force: bool = False, resume: bool = False):
        self.asked, self.source, self.output = source, Path(source), Path(output)
        self.json, self.log = self.output / "panoptic.json", self.output / "panoptic.jsonl"
        self.names, self.others, self.faults = [self.source.name], [], []
        if self.source.is_file():
            self.source = self.source.parent
        else:
            self._list()
        claim(self.output)
        resume = resume and self.log.exists()
        self.begun, rows = _read(self.log) if resume else ({}, {})
        there = _read(self.log)[1] if force and not resume and self.log.exists() else {}
        self.replaced = exchange.labelme_files(there)
        self.labelme = exchange.labelme_files([*self.names, *rows])
        self.rows = {name: row for name, row in rows.items() if self._is_done(name, row)}
        if resume or force:
            self._require_uncorrected()
        else:
            self._require_free()

    def _list(self) -> None:
        if not self.source.is_dir():
            raise UserError(f"{self.source}: no such picture or folder of pictures")
        own = {os.path.realpath(self.output / kind) for kind in (*KINDS, exchange.FOLDER)}
        if own.intersection(map(str, (self.source.resolve(), *self.source.resolve().parents))):
            raise UserError(
                f"{self.source}: is what --out {self.output} holds; expected pictures elsewhere, "
                "or another --out"
            )
        images = [Path(name) for name in pictures(self.source, self.others.append, own)]
        self.others.sort()
        if not images:
            raise UserError(
                f"{self.source}: no pictures in this folder; expected files that end in "
                f"{', '.join(endings())}"
            )
        self.names = []
        for path in images:
            # from it come the names of its predictions, and of the files that become them
            longest = path.with_name(f".{path.name}.json.{os.getpid():07}.tmp").as_posix()
            if name_fault(longest):
                self.faults.append(
                    f"{self.source}: {brief(path.as_posix())} leaves no room for the names of its "
                    "predictions, or has control characters; rename it"
                )
            else:
                self.names.append(path.as_posix())

    def _require_free(self) -> None:
        wanted = [
            self.log,
            self.json,
            *(self.output / file for file in (*exchange.FILES, exchange.RESULTS)),
            *(p for name in self.names for p in self.targets(name) + self.large_targets(name)),
        ]
        there = next((path for path in wanted if path.exists()), None)
        if there:
            release(self.output)
            raise UserError(
                f"{there}: exists already; go on with --resume if it is of an interrupted call, "
                "replace it with --force, or choose another --out"
            )

    def _require_uncorrected(self) -> None:
        """What somebody corrected in labelme is hours of work."""
        files = [self.labelme[name] for name in self.names if name not in self.rows]
        files += {*self.replaced.values()} - {*files}
        folder = self.output / exchange.FOLDER
        corrected = [file for file in files if exchange.is_corrected(folder / file)]
        if corrected:
            release(self.output)
            raise UserError(
                f"{folder}: {listed(sorted(corrected))}: not as predict wrote it, and would be "
                "replaced; move what was corrected elsewhere, or choose another --out"
            )

    def _is_done(self, name: str, row: dict) -> bool:
        """Its files are there, and of the picture that has this name now. Older rows do not say."""
        by_parts = row["annotation"]["file_name"] == f"{name}.tif"
        targets = self.large_targets(name) if by_parts else self.targets(name)
        if not all(path.exists() for path in targets):
            return False
        return name not in self.names or row["image"].get("sha256") in (None, self._digest(name))

    def _digest(self, name: str) -> str | None:
        try:
            return file_digest(self.source / name)
        except UserError:  # whoever reads it will say so
            return None

    def targets(self, name: str) -> list[Path]:
        """The images of KINDS, and in the folder of labelme the JSON and the picture."""
        labelme = [self.output / exchange.FOLDER / file for file in (self.labelme[name], name)]
        return [*self._images(name), *labelme]

    def _images(self, name: str) -> list[Path]:
        return [self.output / kind / f"{name}.png" for kind in KINDS]

    def large_targets(self, name: str) -> list[Path]:
        """Those of a picture that is read by parts (`tools.large`)."""
        endings_of = dict.fromkeys(KINDS, ".tif") | {"overlay": ".png"}
        return [self.output / kind / f"{name}{ending}" for kind, ending in endings_of.items()]

    def fill(self, model: Predictor) -> int:
        """Predict what is not done. Returns the number of pictures that were.

        Raises: UserError at the end if some could not be read.
        """
        todo, info = [name for name in self.names if name not in self.rows], model.info()
        self.doubts = {"little": [], "cut off": []}
        try:
            self._require_same(info)
            self._clear()
            rows = ({"info": info}, *self.rows.values())
            write_atomic(self.log, "".join(json.dumps(row) + "\n" for row in rows).encode())
            with open(self.log, "ab", buffering=0) as log:
                opened = ahead(todo, lambda n: model.read(self.source / n))
                bar = tqdm(opened, "predict", len(todo), unit="image", dynamic_ncols=True)
                for name, read in bar:
                    self._predict(model, name, read, log)
            rows = [self.rows[name] for name in sorted(self.rows)]
            both = {f"{key}s": [row[key] for row in rows] for key in ("image", "annotation")}
            content = {"info": info, **both, "categories": model.taxonomy.categories()}
            if rows:
                exchange.write_folder(self.output, rows, model.taxonomy, info)
                write_atomic(self.json, json.dumps(content).encode())
            else:  # nothing is there that a call after this one would have to go on with
                self.log.unlink()
        finally:
            release(self.output)
        self._say(model.white, model.cfg.stretch)
        if rows:
            print(exchange.next_step(self.output, rows, model.taxonomy))
        if self.faults:
            every = len(self.names) + self.unnamed
            rest = f"; the others are in {self.output}" if len(self.faults) < every else ""
            raise UserError(
                f"{self.asked}: {len(self.faults)} of {every} pictures could not be read (see "
                f"above){rest}"
            )
        return len(todo)

    def _require_same(self, info: dict) -> None:
        self.unnamed = len(self.faults)  # pictures that `names` has not
        begun = {**BEFORE, **self.begun}
        changed = [key for key in info if key != "weights" and begun.get(key) != info[key]]
        if self.begun and changed:
            differs = ", ".join(
                f"{key}: {begun.get(key)!s:.12} there, {info[key]!s:.12} now" for key in changed
            )
            raise UserError(
                f"{self.output}: cannot go on with what another model began ({differs}); choose "
                "another folder with --out, or begin anew with --force"
            )

    def _clear(self) -> None:
        """With --force what an earlier call wrote goes whole, and not as far as names are alike."""
        for name, file in self.replaced.items():
            labelme = [self.output / exchange.FOLDER / own for own in (file, name)]
            self._remove([*self._images(name), *self.large_targets(name), *labelme])

    def _remove(self, paths: Iterable[Path]) -> None:
        """Delete files, but for a picture that is to be predicted."""
        inputs = {os.path.realpath(self.source / name) for name in self.names}
        for path in paths:
            if os.path.realpath(path) not in inputs:
                path.unlink(missing_ok=True)

    def _predict(self, model: Predictor, name: str, read, log) -> None:
        path = self.source / name
        try:
            try:
                image, found = read()
            except UserError as error:
                if not large.is_large(error, path):
                    raise
                self._remove({*self.targets(name)} - {*self.large_targets(name)})
                self.rows[name] = self._write_large(model, name)
            else:
                for doubt in found:
                    self.doubts[doubt].append(name)
                self._remove({*self.large_targets(name)} - {*self.targets(name)})
                self.rows[name] = self._write(name, model.predict(image))
        except UserError as error:
            if not error.kind:  # it is no fault of the picture
                raise
            self._remove([*self.targets(name), *self.large_targets(name)])
            self.faults.append(error)
        else:
            append(log, self.rows[name])

    def _write_large(self, model: Predictor, name: str) -> dict:
        """Write the files of a picture that is read by parts. Returns its part of the JSON."""
        path, targets = self.source / name, self.large_targets(name)

        def describe(answer) -> tuple[list[dict], str]:
            segments = segments_info(answer, model.taxonomy)
            return segments, exchange.centres(answer.segment_map, segments, model.taxonomy)

        (segments, objects), size = large.predict_large(model, path, targets, describe)
        return self._row(name, size, targets[0].name, segments, objects)

    def _write(self, name: str, result: Prediction) -> dict:
        """Write the files of one picture. Returns its part of the JSON."""
        small = np.uint8 if len(result.taxonomy) < 256 else np.uint16
        classes = Image.fromarray((result.semantic + 1).astype(small))
        images = encode(result.segment_map), classes, result.overlay()
        *paths, labelme, _ = self.targets(name)
        for path, image in zip(paths, images):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            write_atomic(path, buffer.getbuffer())
        segments = result.segments_info()
        arrays = result.segment_map, segments, result.taxonomy
        objects = exchange.write_picture(self.source / name, labelme, *arrays)
        row = self._row(name, result.segment_map.shape[::-1], paths[0].name, segments, objects)
        if result.answer is not None:
            row["results"] = exchange.coco_results(result.answer, result.taxonomy)
        return row

    def _row(self, name: str, size, file: str, segments: list[dict], objects: str) -> dict:
        """Of panoptic.jsonl. size: (W, H);  file: the name of its panoptic map."""
        about = {"id": name, "file_name": name, "width": size[0], "height": size[1]}
        annotation = {"image_id": name, "file_name": Path(name).with_name(file).as_posix()}
        return {
            "image": {**about, "sha256": self._digest(name)},
            "annotation": {**annotation, "segments_info": segments},
            "objects": objects,
        }

    def _say(self, white: int, stretch: bool) -> None:
        """What was passed over, what looks wrong, and what could not be read."""
        if self.others:
            print(
                f"{self.source}: {len(self.others)} files passed over, by their endings no images: "
                f"{listed([*map(brief, self.others)])}"
            )
        if others := sorted(self.rows.keys() - {*self.names}):
            print(
                f"{self.output}: has {len(others)} pictures of earlier calls as well, which are "
                f"not in {self.asked}: {listed([*map(brief, others)])}"
            )
        for doubt, what in meaning(white, stretch).items():
            if names := self.doubts[doubt]:
                shown = listed([*map(brief, names)])
                print(f"warning: {self.source}: {len(names)} pictures {what}: {shown}")
        for fault in self.faults:
            print(f"warning: {fault}")


def _read(log: Path) -> tuple[dict, dict]:
    """What panoptic.jsonl knows: what predicted, and the finished pictures by name, whole lines."""
    info, rows = {"sha256": "nothing"}, {}
    for line in log.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if "info" in row:
                info = dict(row["info"])
            else:
                # without "objects", as before labelme/ was written: predicted anew
                known = (*ROW, *({"results"} & row.keys()))
                rows[row["image"]["id"]] = {key: row[key] for key in known}
    return info, rows
