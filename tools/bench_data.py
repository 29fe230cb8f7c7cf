"""What `tools.bench` measures of reading and of evaluation, on files like life.

A map is of cells with ragged borders, of about the bytes that COCO's maps have; an image is of
noise at all scales, of a photograph's bytes as a JPEG. Both sides of a work have the same files.
"""

import contextlib
import dataclasses
import io
import json
import os
import time
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from config import OFFICIAL
from data import LabeledBatches, SemiSupervisedBatches
from inference import Prediction
from instance_eval import MaskAP, run_lengths
from panoptic_eval import PanopticQuality
from readers import pictures
from readers.ground_truth import DataSet, Truth
from readers.panoptic import PanopticFolder, encode
from tools.bench_works import CLASSES, TAXONOMY, THINGS, Place, Skipped

COCO_IMAGES, COCO_SEGMENTS = 118_287, 11  # of train2017; segments an image, 1.3 million in all
SCALES = ((40, 30), (6, 12), (1.5, 3))  # pixels: of the noise that bends borders, and how far
SIZE, IMAGES, SEGMENTS = (480, 640), 20, (10, 20, 30, 40)  # of evaluations: images in turn


def natural_map(size: tuple[int, int], segments: int, seed: int = 0) -> np.ndarray:
    """(H, W) int32, 1 to `segments`: cells of various sizes around random centres, whose distances
    are measured in an image that is bent coarsely and finely. All occur."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    for width, reach in SCALES:
        for axis in (y, x):
            axis += 2 * reach * width * ndimage.gaussian_filter(rng.standard_normal(size), width)
    best, ids = np.full(size, np.inf, np.float32), np.zeros(size, np.int32)
    for k, (row, column) in enumerate(rng.uniform(0, 1, (segments, 2)) * size, 1):
        distance = ((y - row) ** 2 + (x - column) ** 2) / rng.gamma(1.5)
        nearer = distance < best
        best[nearer], ids[nearer] = distance[nearer], k
    for k in set(range(1, segments + 1)) - set(np.unique(ids).tolist()):
        ids.ravel()[7919 * k % ids.size] = k  # a small one
    return ids


def photo(size: tuple[int, int]) -> Image.Image:
    """Noise of all scales, the coarser the stronger."""
    rng, total = np.random.default_rng(0), 0.0
    for level in range(8):
        coarse = rng.standard_normal((3, *(1 + side // 2**level for side in size)))
        strength = 7 * 1.3**level
        total = total + strength * np.stack([_enlarged(c, size) for c in coarse.astype(np.float32)])
    return Image.fromarray((128 + total).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def _enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BICUBIC))


def made_folder(
    root: Path, images: int, size: tuple[int, int], segments, name="true", shift=0, read=True
) -> PanopticFolder | None:
    """A panoptic data set, whose maps are moved by `shift` pixels.

    segments: of a map, or those of several: images are links to one picture, and to these maps in
    turn.
    """
    counts = (segments,) if isinstance(segments, int) else segments
    folders = {".jpg": root / f"{name} images", ".png": root / name}
    for folder in folders.values():
        folder.mkdir(parents=True)
    photo(size).save(folders[".jpg"] / "0.jpg", quality=90)
    colours = np.random.default_rng(1).choice(2**24 - 1, max(counts), replace=False) + 1
    infos = []
    for k, count in enumerate(counts):
        ids = colours[np.roll(natural_map(size, count, k), shift, 1) - 1]
        encode(ids).save(folders[".png"] / f"{k}.png")
        numbers, areas = np.unique(ids, return_counts=True)
        classes = dict(zip(colours.tolist(), range(0, 3 * count, 3)))
        infos.append(
            [
                dict(
                    id=n, category_id=1 + classes[n] % CLASSES, area=a, iscrowd=0, bbox=[0, 0, 1, 1]
                )
                for n, a in zip(numbers.tolist(), areas.tolist())
            ]
        )
    for i in range(images):
        for ending, made in ((".jpg", 1), (".png", len(counts))):
            if i >= made:
                os.symlink(f"{i % made}{ending}", folders[ending] / f"{i}{ending}")
    shape = dict(height=size[0], width=size[1])
    content = dict(
        images=[dict(id=i, file_name=f"{i}.jpg", **shape) for i in range(images)],
        annotations=[
            dict(image_id=i, file_name=f"{i}.png", segments_info=infos[i % len(infos)])
            for i in range(images)
        ],
        categories=[
            dict(id=k, name=n, isthing=int(thing))
            for k, n, thing in zip(TAXONOMY.ids, TAXONOMY.names, TAXONOMY.things)
        ],
    )
    (root / f"{name}.json").write_text(json.dumps(content))
    if read:
        return PanopticFolder(root / f"{name}.json", folders[".jpg"], folders[".png"], TAXONOMY)


# ------------------------------------------------------------------------------ panoptic quality


def both_folders(root: Path) -> list[PanopticFolder]:
    sides = ("true", 0), ("predicted", 10)
    return [made_folder(root, IMAGES, SIZE, SEGMENTS, name, shift) for name, shift in sides]


def our_pq(place: Place) -> Callable:
    true, predicted = both_folders(place.folder)

    def evaluate(t: int) -> float:
        pq = PanopticQuality(CLASSES)
        for i in range(len(true)):
            a, b = predicted.truth(i), true.truth(i)
            pq.add(a.segment_map, a.labels, b.segment_map, b.labels, b.areas, b.crowd)
        return pq.result(TAXONOMY.things)["all"]["pq"]

    return evaluate


def panopticapi_pq(place: Place) -> Callable:
    try:
        from panopticapi.evaluation import pq_compute_single_core
    except ImportError:
        raise Skipped("panopticapi is not installed") from None
    both_folders(place.folder)
    folders = [place.folder / name for name in ("true", "predicted")]
    true, predicted = (json.loads(f.with_suffix(".json").read_text()) for f in folders)
    categories = {c["id"]: c for c in true["categories"]}
    pairs = list(zip(true["annotations"], predicted["annotations"]))
    args = (0, pairs, *map(str, folders), categories)

    def evaluate(t: int) -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            return pq_compute_single_core(*args).pq_average(categories, isthing=None)[0]["pq"]

    return evaluate


def hotcoco_pq(place: Place) -> Callable:
    panoptic = hotcoco().panoptic
    both_folders(place.folder)
    paths = [str(place.folder / f"{name}.json") for name in ("true", "predicted")]

    def evaluate(t: int) -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            return panoptic.pq_compute(*paths)["All"]["pq"]

    return evaluate


def hotcoco():
    try:
        import hotcoco
        import hotcoco.panoptic
    except ImportError:
        raise Skipped("hotcoco is not installed") from None
    return hotcoco


# ---------------------------------------------------------------------------------------- mask AP


def instances() -> list[tuple[Prediction, Truth]]:
    """What a model may say of the things of IMAGES images, 100 instances each, and what is true:
    each time a thing, by chance, is found a little aside."""
    pairs, rng = [], np.random.default_rng(2)
    for i in range(IMAGES):
        count = SEGMENTS[i % len(SEGMENTS)]
        ids = natural_map(SIZE, count, i)
        labels = 3 * np.arange(count) % THINGS
        masks = ids == np.arange(1, count + 1)[:, None, None]
        found = rng.integers(count, size=100)
        moved = np.stack([np.roll(masks[k], rng.integers(-12, 13, 2), (0, 1)) for k in found])
        scores = np.sort(rng.random(100).astype(np.float32))[::-1]
        areas = masks.sum((1, 2))
        truth = Truth(ids, labels, areas, np.zeros(count, bool), masks)
        said = Prediction(np.zeros_like(ids), labels[found], scores, masks=moved)
        pairs.append((said, truth))
    return pairs


def our_ap(place: Place) -> Callable:
    pairs = instances()

    def evaluate(t: int) -> float:
        metric = MaskAP(TAXONOMY)
        for said, truth in pairs:
            metric.add(said, truth)
        return metric.result()["ap"]

    return evaluate


def coco_ap(place: Place, of: str = "pycocotools") -> Callable:
    """By a COCOeval that is given the same masks, encoded as ours are."""
    pairs = instances()
    make, judge = COCO, COCOeval
    if of == "hotcoco":
        make, judge = hotcoco().COCO, hotcoco().COCOeval

    def evaluate(t: int) -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            truth, found = as_coco(pairs)
            true = make()
            true.dataset = truth
            true.createIndex()
            result = judge(true, true.loadRes(found), "segm")
            result.evaluate()
            result.accumulate()
            result.summarize()
        return float(result.stats[0])

    return evaluate


def as_coco(pairs: list[tuple[Prediction, Truth]]) -> tuple[dict, list[dict]]:
    """A data set and results in COCO's format."""
    true, found = [], []
    for image, (said, truth) in enumerate(pairs):
        for answer, rows in ((truth, true), (said, found)):
            for k, (label, mask) in enumerate(zip(answer.labels.tolist(), run_lengths(answer))):
                mask = {**mask, "counts": mask["counts"].decode()}
                row = dict(image_id=image, category_id=label + 1, segmentation=mask)
                if answer is truth:
                    row |= dict(id=len(true) + 1, area=int(truth.areas[k]), iscrowd=0)
                    row |= dict(bbox=[0, 0, 1, 1])
                else:
                    row |= dict(score=float(said.scores[k]))
                rows.append(row)
    shape = dict(zip(("height", "width"), pairs[0][1].segment_map.shape))
    names = zip(TAXONOMY.ids, TAXONOMY.names)
    images = [dict(id=i, file_name=f"{i}.jpg", **shape) for i in range(len(pairs))]
    return (
        dict(images=images, annotations=true, categories=[dict(id=k, name=n) for k, n in names]),
        found,
    )


# ------------------------------------------------------------------------------------------- data


def data_set(root: Path, images: int, size: tuple[int, int], segments: int) -> DataSet:
    folder = made_folder(root, images, size, segments)
    return DataSet("made", TAXONOMY, folder, folder, list(range(images)), [0])


def big_photo(root: Path) -> DataSet:
    """One picture of 1.5 megapixels with 40 segments, labelled and unlabelled."""
    return data_set(root, 1, (1024, 1536), 40)


def our_sample(place: Place) -> Callable:
    cfg = dataclasses.replace(OFFICIAL, labeled_batch=1)
    batches = LabeledBatches(big_photo(place.folder), cfg, 1000)
    return lambda t: [batches[10 * t + k] for k in range(10)]


def our_views(place: Place) -> Callable:
    batches = SemiSupervisedBatches(big_photo(place.folder), OFFICIAL, 1000)
    return lambda t: [batches._two_views(batches.rng(t, k)) for k in range(10)]


def decoding(place: Place, maps: bool) -> Callable:
    big_photo(place.folder)
    paths = [place.folder / "true images" / "0.jpg"]
    if maps:
        paths.append(place.folder / "true" / "0.png")
    return lambda t: [np.asarray(pictures.open_image(p)) for _ in range(10) for p in paths]


def our_loading(place: Place, images: int) -> Callable:
    """Labelled batches of a data set of so many images."""
    batches = LabeledBatches(data_set(place.folder, images, SIZE, 10), OFFICIAL, 1000)
    return lambda t: batches[t]


def index(place: Place, images=COCO_IMAGES, reads=2000, workers=2) -> dict:
    """Opening a JSON of COCO's size; memory that a loader process (forked) has to itself."""
    root = place.folder
    args = root / "true.json", root / "true images", root / "true", TAXONOMY
    made_folder(root, images, SIZE, COCO_SEGMENTS, read=False)
    clock = time.perf_counter()
    folder = PanopticFolder(*args)
    seconds = time.perf_counter() - clock
    chosen = np.random.default_rng(1).choice(images, reads, replace=False).tolist()
    loader = torch.utils.data.DataLoader(
        Reads(folder, chosen), batch_size=None, num_workers=workers, multiprocessing_context="fork"
    )
    private = list(loader)  # MB after each read, workers in turn
    early, late = private[10 * workers : 20 * workers], private[-10 * workers :]
    return {
        "seconds": round(seconds, 1),
        "MB a worker, after 10 reads": round(max(early)),
        f"MB a worker, after {reads // workers} reads": round(max(late)),
    }


class Reads(torch.utils.data.Dataset):
    """Item k: read an image and its map; the process's private memory after it, MB."""

    def __init__(self, folder: PanopticFolder, indices: list[int]):
        self.folder, self.indices = folder, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, k: int) -> float:
        self.folder.image(self.indices[k]).load()
        self.folder.truth(self.indices[k])
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
