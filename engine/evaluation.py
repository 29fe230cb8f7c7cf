"""From a method to its figures: every metric of every reading, on the validation images at their
original size.

DEARLi's readings are student and teacher, each with the decoder's posterior and with the ensemble;
its metrics PQ and mIoU.
Try, after the demo: `python dearli.py --stage eval --weights runs/mini-sup-16 --alpha 0 --out
runs/try-alpha`: masks of the decoder, classes of CLIP alone.
"""

from dataclasses import replace
from functools import partial
from typing import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from config import Config
from data import Sample, resize_part
from engine.method import Method
from engine.windows import in_windows, predict_in_windows, shown_size
from ground import ranks
from ground.ahead import ahead
from inference import Prediction
from readers.ground_truth import DataSet


@torch.no_grad()
def evaluate(
    method: Method, dataset: DataSet, limit: int | None = None, title: str = "evaluation"
) -> dict[str, dict]:
    """The results of all metrics of the method by reading, from the validation images, or the first
    `limit` of them.

    Several ranks share the images; all return the same. Values are 0 to 1; where `n` or
    `miou_classes` is 0, a mean over nothing is given as 0 and is no figure
    (`report.tables.figure`).   title: of the progress bar; empty: none.
    """
    images, cfg = dataset.val, method.cfg
    scores = {r: [metric(dataset.taxonomy) for metric in method.metrics] for r in method.readings}
    count = min(limit or len(images), len(images))
    mine = range(ranks.rank(), count, ranks.count())
    hidden = ranks.rank() > 0 or not title
    with tqdm(total=len(mine), desc=title, unit="image", dynamic_ncols=True, disable=hidden) as bar:
        for group, read in ahead(_groups(images, mine, cfg), partial(_read, images)):
            pictures, truths = read()
            for k, reading, prediction in _answers(method, pictures, method.readings):
                for score in scores[reading]:
                    score.add(prediction, truths[k])
            bar.update(len(group))
    for rank, other in enumerate(ranks.gather(scores)):
        if rank != ranks.rank():
            _merge(scores, other)
    return {reading: _together(scores[reading]) for reading in method.readings}


def _merge(scores: dict, others: dict) -> None:
    for reading, row in scores.items():
        for score, other in zip(row, others[reading]):
            score.merge(other)


def _together(scores: list) -> dict:
    """The results of several metrics as one; "per_class" has the figures of all of them."""
    result: dict = {}
    for score in scores:
        for key, value in score.result().items():
            if key == "per_class" and key in result:
                for name, figures in value.items():
                    result[key][name] |= figures
            else:
                result[key] = value
    return result


def _answers(
    method: Method,
    images: list[Image.Image],
    readings: Iterable[str],
    t: int | None = None,
    semantic: bool = True,
) -> Iterator[tuple[int, str, Prediction]]:
    """As `Method.predict`, of RGB images of one size: as they are, or in windows of them."""
    if in_windows(images[0].size, method.cfg):
        for k, image in enumerate(images):
            for reading, answer in predict_in_windows(method, image, readings, t).items():
                classes = answer.semantic.clip(1).astype(np.int64) - 1
                yield k, reading, replace(answer, semantic=classes)
    else:
        batch, sizes = views(images, method.cfg)
        yield from method.predict(batch.to(method.device), sizes, readings, t, semantic)


def views(images: list[Image.Image], cfg: Config):
    """Images of one size as a batch at the size of evaluation: (B, 3, h, w) uint8, and the sizes
    that `predict` takes.
    """
    width, height = shown_size(*images[0].size, cfg)
    whole = (0, 0, width, height)
    resized = [resize_part(Sample(x, []), (width, height), whole).image for x in images]
    batch = torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in resized])
    return batch, [((height, width), image.size[::-1]) for image in images]


@torch.no_grad()
def predict_image(
    method: Method,
    image: Image.Image,
    readings: Iterable[str],
    t: int | None = None,
    semantic: bool = False,
) -> dict[str, Prediction]:
    """What readings say of one RGB image, at its size. t, semantic: as in `Method.predict`."""
    answers = _answers(method, [image], readings, t, semantic)
    return {reading: prediction for _, reading, prediction in answers}


def _read(images, group: list[int]) -> tuple[list[Image.Image], list]:
    return [images.image(i) for i in group], [images.truth(i) for i in group]


def _groups(images, indices, cfg: Config):
    """Runs of at most eval_batch neighbouring images that have one size."""
    group, size = [], None
    for i in indices:
        of_image = images.image(i).size if cfg.eval_batch > 1 else i
        if group and (len(group) == cfg.eval_batch or of_image != size):
            yield group
            group = []
        group, size = [*group, i], of_image
    if group:
        yield group
