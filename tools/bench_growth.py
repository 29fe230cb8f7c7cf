"""What `python -m tools.bench --growth` measures: how time and memory grow, axis by axis.

A maker is called with a `Place` and the number of its axis. Weights are noise; what that would not
find is made, so that what finds, stitches and writes it has something to do.
"""

import dataclasses
import json
import os
import types
from functools import partial
from typing import Callable

import numpy as np
import tifffile

from config import CUSTOM
from inference import Prediction
from mean_teacher import MeanTeacher
from mini.scenes import mini_taxonomy
from readers import mask_files, pictures
from readers.sixteen_bit import WHITE
from tools import bench_data, large
from tools import bench_works as works

READING = "teacher/decoder"
OBJECTS, RADII = 12, (8.0, 13.0)  # in a window; pixels of it: as wide as `custom` shows objects
MAGNIFICATION = 0.25  # of objects of about 90 pixels
MASKS = 20  # of an image


class Busy(MeanTeacher):
    """Its network answers in full, and then discs are found in every window."""

    def predict(self, images, sizes, *args, **kwargs):
        for k, reading, answer in super().predict(images, sizes, *args, **kwargs):
            _, (height, width) = sizes[k]
            yield k, reading, discs(answer, images.shape[-2:], (height, width))


def discs(answer: Prediction, shown: tuple[int, int], size: tuple[int, int]) -> Prediction:
    """OBJECTS discs in the place of an answer's segments; its sums of classes stay."""
    rng, y, x = np.random.default_rng(0), *np.ogrid[: size[0], : size[1]]
    scale, segment_map = size[0] / shown[0], np.zeros(size, np.int32)
    for k in range(OBJECTS):
        row, column = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        inside = (y - row) ** 2 + (x - column) ** 2 < (scale * rng.uniform(*RADII)) ** 2
        segment_map[inside] = k + 1
    labels, scores = np.zeros(OBJECTS, np.int64), rng.uniform(0.5, 1, OBJECTS)
    return Prediction(segment_map, labels, scores.astype(np.float32), None, answer.sums)


def our_windows(place: works.Place, side: int) -> Callable:
    """A TIFF of side x side pixels, read, seen in windows of `custom` and written, by parts."""
    cfg = dataclasses.replace(CUSTOM, object_width=CUSTOM.seen_width / MAGNIFICATION)
    method = Busy(cfg, mini_taxonomy(), place.device)
    for model in method.models.values():
        model.eval()
    run = types.SimpleNamespace(
        method=method, reading=READING, taxonomy=method.taxonomy, cfg=cfg, white=WHITE
    )
    tile, path = np.asarray(bench_data.photo((512, 512))), place.folder / "large.tif"
    options = dict(tile=tile.shape[:2], compression="zlib", photometric="rgb")
    tiles = (tile for _ in range((-(-side // len(tile))) ** 2))
    tifffile.imwrite(path, tiles, shape=(side, side, 3), dtype=np.uint8, **options)
    targets = [place.folder / name for name in ("panoptic.tif", "semantic.tif", "overlay.png")]

    def predict(t: int) -> int:
        objects, _ = large.predict_large(run, path, targets, lambda answer: len(answer.labels))
        return objects

    return predict


def masks_again(place: works.Place, images: int) -> Callable:
    """--stage masks on a folder whose masks are there but for one: what is there is looked at."""
    folder, to = place.folder / "images", place.folder / "masks"
    folder.mkdir()
    bench_data.photo(bench_data.SIZE).save(folder / "0.jpg", quality=90)
    for i in range(1, images):
        os.link(folder / "0.jpg", folder / f"{i}.jpg")
    ids = bench_data.natural_map(bench_data.SIZE, MASKS)
    found = [
        dict(
            segmentation=ids == k,
            area=(ids == k).sum(),
            predicted_iou=0.9,
            stability_score=0.9,
            crop_box=[0, 0, *bench_data.SIZE[::-1]],
            point_coords=[[0, 0]],
        )
        for k in range(1, MASKS + 1)
    ]
    generator = types.SimpleNamespace(generate=lambda image: found, about={"made": True})
    there = pictures.ImageFolder(folder)
    mask_files.segment(there, 0, generator, to)
    content = json.loads((to / "0.jpg.json").read_text())
    for i in range(1, images):
        content["image"] |= dict(image_id=str(i), file_name=f"{i}.jpg")
        (to / f"{i}.jpg.json").write_text(json.dumps(content))

    def again(t: int) -> int:
        (to / "0.jpg.json").unlink()
        return mask_files.generate_masks(pictures.ImageFolder(folder), generator, to)

    return again


ONE = partial(
    works.our_step, images=1, most=20
)  # the step whose cost grows: 1 labelled + 1 unlabelled
# axis: calls that count, the maker, the name of its number, values
GROWTH = {
    "images of the data set: a labelled batch": (
        *(2, bench_data.our_loading, "images"),
        (100, 10_000, 100_000),
    ),
    "images whose masks are there but of one: --stage masks": (
        *(2, masks_again, "images"),
        (100, 1_000, 10_000),
    ),
    "pixels of a picture's side, in windows: predict": (
        *(1, our_windows, "side"),
        (1_000, 4_000, 20_000),
    ),
    "segments an image: a step": (2, ONE, "most", (5, 50, 300)),
    "pixels of the crop's side: a step": (2, ONE, "side", (256, 512, 640)),
}
