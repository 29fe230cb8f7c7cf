"""Pictures of a run for its report: images, ground truth, what models say of them, pseudo-labels as training goes on, SAM's masks.

The worst and the best validation images by their own PQ, and some unlabelled images. A picture is a small WebP with a panoptic map over it.
"""

import dataclasses
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import Config, alpha_at
from data import Sample, resize_part
from engine.evaluation import posterior_alphas, predict
from ground.errors import UserError
from ground.files import write_atomic
from panoptic_eval import PanopticQuality
from readers import mask_files
from readers.ground_truth import DataSet, Taxonomy
from report import drawing

SAMPLE = 4  # validation images that are looked at, for every one that is shown
SIDE = 320  # pixels, long side of a picture
QUALITY = 80  # WebP
SNAPSHOTS, SHOWN_SNAPSHOTS = (
    4,
    5,
)  # unlabelled images that are followed through the training; steps of it that a card shows
POSTERIORS = {"decoder": "decoder alone", "ensemble": "with the ensemble", "clip": "CLIP alone"}


@dataclasses.dataclass(frozen=True)
class Card:
    """One image and what is said of it. cells: captions (HTML), each with a picture (WebP)."""

    title: str
    note: str
    cells: list[tuple[str, bytes]]


@dataclasses.dataclass(frozen=True)
class Reading:
    """A model with its configuration and the alpha of its posterior. title: HTML, what stands below its pictures."""

    title: str
    model: torch.nn.Module
    cfg: Config
    alpha: float

    def answer(
        self, image: Image.Image, things: torch.Tensor, device
    ) -> tuple[np.ndarray, np.ndarray]:
        segment_map, labels, _ = predict(
            self.model, image, things.to(device), self.cfg, device, self.alpha
        )
        return segment_map.cpu().numpy(), labels.cpu().numpy()


def gallery(
    models: dict,
    dataset: DataSet,
    cfg: Config,
    device,
    reading: str,
    count: int,
    masks: Path | None = None,
    folder: Path | None = None,
    others: list[Reading] = (),
) -> dict[str, list[Card]]:
    """Cards of the `count` validation images with the lowest and the highest PQ among SAMPLE * count, and of some unlabelled images.

    models: student, teacher or both.   reading: the one that PQ is of.   masks: of SAM;  folder: of the run, for its snapshots; if there are any.
    others: models to put beside.
    """
    taxonomy, things = dataset.taxonomy, torch.tensor(dataset.taxonomy.things)
    which, first = reading.split("/")
    alphas = {
        first: 0.0,
        **posterior_alphas(cfg),
        **({"clip": 0.0} if cfg.has_ensemble else {}),
    }  # in the order of the columns
    own = [
        Reading(POSTERIORS[posterior], models[which], cfg, alpha)
        for posterior, alpha in alphas.items()
    ]

    def quality(i, answered):
        truth, pq = dataset.val.truth(i), PanopticQuality(len(taxonomy))
        pq.add(*answered, truth.segment_map, truth.labels, truth.areas, truth.crowd)
        result = pq.result(taxonomy.things)["all"]
        return result["pq"] if result["n"] else None

    scored = [
        (q, i)
        for i in spread(range(len(dataset.val)), SAMPLE * count)
        if (q := quality(i, own[0].answer(dataset.val.image(i), things, device))) is not None
    ]
    scored.sort()

    def card(q, i):
        image, truth = dataset.val.image(i), dataset.val.truth(i)
        cells = [
            ("image", webp(image)),
            ("ground truth", webp(image, truth.segment_map, truth.labels, taxonomy)),
        ]
        for one in (*own, *others):
            answered = one.answer(image, things, device)
            pq = quality(i, answered)
            cells.append(
                (
                    f"{one.title} <b>{'–' if pq is None else f'{100 * pq:.1f}'}</b>",
                    webp(image, *answered, taxonomy),
                )
            )
        return Card(dataset.val.name(i), f"PQ {100 * q:.1f}", cells)

    shown = min(count, len(scored))
    cards = {
        f"{name} of {len(scored)}": [card(q, i) for q, i in chosen]
        for name, chosen in (
            ("worst", scored[: shown - shown // 2]),
            ("best", scored[::-1][: shown // 2]),
        )
    }
    if "teacher" in models and dataset.unlabeled and count:
        alpha = {"decoder": 1.0, "clip": 0.0}.get(cfg.teacher_posterior, alpha_at(cfg.alpha, 1.0))
        teacher = Reading(
            f"teacher, {POSTERIORS[cfg.teacher_posterior]}", models["teacher"], cfg, alpha
        )
        cards["unlabelled"] = [
            _unlabelled(dataset, i, teacher, things, device, masks)
            for i in spread(dataset.unlabeled, -(-count // 3))
        ]
        cards["training"] = _filmstrips(dataset, folder) if folder else []
    return cards


def _unlabelled(
    dataset: DataSet, i: int, teacher: Reading, things: torch.Tensor, device, masks: Path | None
) -> Card:
    image, name = dataset.train.image(i), dataset.train.name(i)
    cells = [
        ("image", webp(image)),
        (teacher.title, webp(image, *teacher.answer(image, things, device), dataset.taxonomy)),
    ]
    found = None
    if masks and mask_files.mask_file(masks, name).exists():
        try:
            found = mask_files.read_masks(masks, name, image.size[::-1], dataset.train.digest(i))
        except UserError as error:  # of another image: the others can be shown
            print(f"warning: no picture of masks: {error}")
    if found is not None:
        n, order = found.shape[-1], np.argsort(-found.sum((0, 1)), kind="stable")
        flat = np.zeros(found.shape[:2], np.int32)
        for place, k in enumerate(order, 1):  # small ones on top
            flat[found[..., k]] = place
        cells.append(
            (
                f"{n} SAM masks",
                webp(
                    image,
                    flat,
                    np.arange(n),
                    Taxonomy(("",) * n, (True,) * n, tuple(range(n))),
                    names=False,
                ),
            )
        )
    return Card(name, "", cells)


def snapshot(folder: Path, step: int, teacher: Reading, dataset: DataSet, device) -> None:
    """Keep what the teacher says of a few unlabelled images at this step: FOLDER/pseudo/STEP-K.webp."""
    things = torch.tensor(dataset.taxonomy.things)
    for k, i in enumerate(spread(dataset.unlabeled, SNAPSHOTS)):
        image = dataset.train.image(i)
        write_atomic(
            _film(folder) / f"{step:08d}-{k}.webp",
            webp(image, *teacher.answer(image, things, device), dataset.taxonomy),
        )


def _filmstrips(dataset: DataSet, folder: Path) -> list[Card]:
    """What `snapshot` has kept of each image, at steps evenly spread."""
    cards = []
    for k, i in enumerate(spread(dataset.unlabeled, SNAPSHOTS)):
        kept = sorted(_film(folder).glob(f"*-{k}.webp"))
        kept = (
            [
                kept[j]
                for j in np.unique(
                    np.linspace(0, len(kept) - 1, SHOWN_SNAPSHOTS).round().astype(int)
                )
            ]
            if kept
            else []
        )
        if kept:
            cards.append(
                Card(
                    dataset.train.name(i),
                    "",
                    [
                        ("image", webp(dataset.train.image(i))),
                        *((f"step {int(path.name[:8]):,}", path.read_bytes()) for path in kept),
                    ],
                )
            )
    return cards


def _film(folder: Path) -> Path:
    return Path(folder) / "pseudo"


def spread(indices, count: int) -> list[int]:
    """At most so many of them, evenly spaced."""
    count = min(count, len(indices))
    return [indices[k * len(indices) // count] for k in range(count)]


def webp(
    image: Image.Image,
    segment_map=None,
    labels=None,
    taxonomy: Taxonomy | None = None,
    names: bool = True,
) -> bytes:
    """A small picture of an image, with a panoptic map over it if there is one."""
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(s * scale)) for s in image.size)
    small = resize_part(
        Sample(image, [] if segment_map is None else [segment_map]), size, (0, 0, *size)
    )
    shown = (
        small.image
        if segment_map is None
        else drawing.overlay(small.image, small.layers[0], labels, taxonomy, names=names)
    )
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()
