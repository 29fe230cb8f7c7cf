"""Pictures of a run for its report: images, ground truth, what models say of them, pseudo-labels as
training goes on, SAM's masks.

The worst and the best validation images by their own PQ (all, where they are few), and some
unlabelled images. A picture is a small WebP with a panoptic map over it.
"""

import html
import io
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data import Sample, resize_part
from engine.evaluation import predict_image
from engine.method import Method
from ground.errors import UserError
from ground.files import write_atomic
from inference import PSEUDO, Prediction
from readers import mask_files
from readers.ground_truth import DataSet, Taxonomy
from report import drawing
from report.tables import figure, found, things_of

SAMPLE = 4  # validation images that are looked at, for every one that is shown
SIDE = 320  # pixels, long side of a picture
QUALITY = 80  # WebP
SNAPSHOTS = 4  # unlabelled images that are followed through the training
FEW_CLASSES = 2  # need no names in the pictures: their colours tell them apart
SHOWN_SNAPSHOTS = 5  # steps of it that a card shows


@dataclass(frozen=True)
class Card:
    """One image and what is said of it. cells: captions (HTML), each with a picture (WebP)."""

    title: str
    note: str
    cells: list[tuple[str, bytes]]


@dataclass(frozen=True)
class Other:
    """A run beside: its method with its weights, and the reading that the paper takes. title: what
    stands below its pictures.
    """

    title: str
    method: Method
    reading: str


def gallery(
    method: Method,
    dataset: DataSet,
    reading: str,
    count: int,
    masks: Path | None = None,
    folder: Path | None = None,
    others: list[Other] = (),
) -> dict[str, list[Card]]:
    """Cards of validation images, SAMPLE * count of which are looked at: some of them at random,
    and the `count` with the lowest and the highest PQ, or all if there are no more; and of some
    unlabelled images.

    reading: the one that PQ is of.   masks: of SAM;  folder: of the run, for its snapshots; if
    there are any.
    """
    looked_at = spread(range(len(dataset.val)), SAMPLE * count)
    scored = []
    for i in looked_at:
        answer = predict_image(method, dataset.val.image(i), [reading])[reading]
        quality = image_quality(method, dataset, i, answer)
        if quality is not None:
            scored.append((quality, i))
    some = random.Random(0).sample(scored, min(-(-count // 3), len(scored)))
    scored.sort()
    shown = min(count, len(scored))
    parts = {
        "some": some,
        "worst": scored[: shown - shown // 2],
        "best": scored[::-1][: shown // 2],
    }
    if len(scored) == shown:
        parts = {"all": scored}
    cards = {
        f"{name} of {len(scored)}": [
            _validation(method, dataset, reading, i, quality, others) for quality, i in part
        ]
        for name, part in parts.items()
    }
    if PSEUDO in method.pictured and dataset.unlabeled and count:
        images = spread(dataset.unlabeled, -(-count // 3))
        cards["unlabelled"] = [_unlabelled(method, dataset, i, masks) for i in images]
        cards["training"] = _filmstrips(dataset, folder) if folder else []
    return cards


def image_quality(method: Method, dataset: DataSet, i: int, answer: Prediction) -> float | None:
    """The method's first figure (PQ) of a validation image; None if there is none."""
    _, where = method.metrics[0].columns[0]
    return figure(image_result(method, dataset, i, answer), where)


def image_result(method: Method, dataset: DataSet, i: int, answer: Prediction) -> dict:
    """What the method's first metric says of one validation image."""
    score = method.metrics[0](dataset.taxonomy)
    score.add(answer, dataset.val.truth(i))
    return score.result()


def _validation(method, dataset: DataSet, reading: str, i: int, quality: float, others) -> Card:
    image, truth = dataset.val.image(i), dataset.val.truth(i)
    model = reading.split("/")[0]
    captions = {r: c for r, c in {**method.readings, **method.pictured}.items() if r != PSEUDO}
    own = [reading, *(r for r in captions if r != reading and r.split("/")[0] == model)]
    answers = predict_image(method, image, own)
    columns = [(", ".join(dict.fromkeys((model, captions[r]))), answers[r]) for r in own]
    for other in others:
        answer = predict_image(other.method, image, [other.reading])[other.reading]
        columns.append((other.title, answer))
    cells = [("image", webp(image)), ("ground truth", webp(image, truth, dataset.taxonomy))]
    for title, answer in columns:
        own_quality = image_quality(method, dataset, i, answer)
        number = "–" if own_quality is None else f"{100 * own_quality:.1f}"
        caption = f"{html.escape(title)} <b>{number}</b>"
        cells.append((caption, webp(image, shown(answer, method.cfg), dataset.taxonomy)))
    heading, _ = method.metrics[0].columns[0]
    things = things_of(dataset.taxonomy) if method.cfg.labels == "panoptic" else []
    note = found(image_result(method, dataset, i, answers[reading]), things, short=True)
    return Card(dataset.val.name(i), note or f"{heading} {100 * quality:.1f}", cells)


def _unlabelled(method: Method, dataset: DataSet, i: int, masks: Path | None) -> Card:
    image, name = dataset.train.image(i), dataset.train.name(i)
    answer = predict_image(method, image, [PSEUDO])[PSEUDO]
    title = f"teacher, {method.pictured[PSEUDO]}"
    cells = [("image", webp(image)), (title, webp(image, answer, dataset.taxonomy))]
    if masks and mask_files.mask_file(masks, name).exists():
        try:
            size, digest = image.size[::-1], dataset.train.digest(i)
            cells.append(all_masks(image, mask_files.read_masks(masks, name, size, digest)))
        except UserError as error:  # of another image: the others can be shown
            print(f"warning: no picture of masks: {error}")
    return Card(name, "", cells)


def all_masks(image: Image.Image, masks: np.ndarray) -> tuple[str, bytes]:
    """A caption and a picture. masks: (H, W, N) bool; small ones on top."""
    order = np.argsort(-masks.sum((0, 1)), kind="stable")
    return f"{masks.shape[-1]} SAM masks", painted(image, masks[..., order])


def painted(image: Image.Image, masks: np.ndarray) -> bytes:
    """masks: (H, W, N) bool; later ones on top, each place in a colour of its own."""
    n = masks.shape[-1]
    stacked = np.zeros(masks.shape[:2], np.int32)
    for k in range(n):
        stacked[masks[..., k]] = k + 1
    nameless = Taxonomy(("",) * n, (True,) * n, tuple(range(n)))
    answer = Prediction(stacked, np.arange(n), np.ones(n))
    return webp(image, answer, nameless, names=False)


def snapshot(folder: Path, step: int, method: Method, dataset: DataSet) -> None:
    """Keep what the teacher says of a few unlabelled images at this step:
    FOLDER/pseudo/STEP-K.webp.
    """
    for k, i in enumerate(spread(dataset.unlabeled, SNAPSHOTS)):
        image = dataset.train.image(i)
        answer = predict_image(method, image, [PSEUDO], step)[PSEUDO]
        picture = webp(image, answer, dataset.taxonomy)
        write_atomic(_film(folder) / f"{step:08d}-{k}.webp", picture)


def _filmstrips(dataset: DataSet, folder: Path) -> list[Card]:
    """What `snapshot` has kept of each image, at steps evenly spread."""
    cards = []
    for k, i in enumerate(spread(dataset.unlabeled, SNAPSHOTS)):
        pictures = sorted(_film(folder).glob(f"*-{k}.webp"))
        if not pictures:
            continue
        places = np.linspace(0, len(pictures) - 1, SHOWN_SNAPSHOTS).round().astype(int)
        cells = [("image", webp(dataset.train.image(i)))]
        for path in (pictures[j] for j in np.unique(places)):
            cells.append((f"step {int(path.name[:8]):,}", path.read_bytes()))
        cards.append(Card(dataset.train.name(i), "", cells))
    return cards


def _film(folder: Path) -> Path:
    return Path(folder) / "pseudo"


def shown(answer: Prediction, cfg) -> Prediction:
    """What of an answer is drawn: of instances, the surer ones."""
    return answer.sure(cfg.least_score) if cfg.labels == "instances" else answer


def spread(indices, count: int) -> list[int]:
    """At most so many of them, evenly spaced."""
    count = min(count, len(indices))
    return [indices[k * len(indices) // count] for k in range(count)]


def webp(image: Image.Image, segments=None, taxonomy=None, names: bool = True) -> bytes:
    """A small picture of an image, with a panoptic map over it if there is one.

    segments: what has segment_map and labels, a `Prediction` or a `Truth`.
    """
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(s * scale)) for s in image.size)
    layers = [] if segments is None else [segments.segment_map]
    small = resize_part(Sample(image, layers), size, (0, 0, *size))
    shown = small.image
    if segments is not None:
        labels, names = segments.labels, names and len(taxonomy) > FEW_CLASSES
        shown = drawing.overlay(small.image, small.layers[0], labels, taxonomy, names=names)
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()
