"""From a model to its figures: PQ and mIoU of student and teacher, each with the decoder's posterior and with the ensemble.

The paper reads DEAR and DEARLi from the student with the ensemble, plain SSL from the student's decoder alone (Table 1).
Panoptic quality is measured at the size of the original image.
Try, after the demo: `python dearli.py --stage eval --weights runs/mini-sup-16 --alpha 0 --out runs/try-alpha`: masks of the decoder, classes of CLIP alone.
"""

import numpy as np
import torch
from tqdm import tqdm

from clip_ensemble import padded_size
from config import Config, alpha_at
from data import Sample, resize
from ground import ranks
from model import Segmenter, panoptic_inference, resize_masks, semantic_inference
from panoptic_eval import MeanIoU, PanopticQuality
from readers.ground_truth import IGNORE, DataSet

# Values of full-size masks, 4 bytes each, that the readings of a model share for speed. Those of a
# larger image are made anew by every reading, a part at a time: they would fill the memory.
SHARED_MASKS = 2**27


def posterior_alphas(cfg: Config) -> dict[str, float]:
    """The posteriors to evaluate and their alpha: the decoder's, and where CLIP has a say the ensemble's."""
    return {"decoder": 1.0, **({"ensemble": alpha_at(cfg.alpha, 1.0)} if cfg.has_ensemble else {})}


def papers_reading(teacher_posterior: str) -> str:
    """Which of the readings the paper reports for a method (Table 1); teacher_posterior: `Config.teacher_posterior`."""
    return "student/decoder" if teacher_posterior == "decoder" else "student/ensemble"


@torch.no_grad()
def evaluate(
    models: dict[str, Segmenter],
    dataset: DataSet,
    cfg: Config,
    device: torch.device,
    limit: int | None = None,
    title: str = "evaluation",
) -> dict:
    """PQ, SQ, RQ and mIoU on the validation images, by every posterior of the configuration.

    Args: models: by name; those that share a backbone share its pass.   limit: the first so many images.   title: of the progress bar; empty: none.
    Returns: {"student/ensemble": {"all": {pq, sq, rq, n}, "things", "stuff", "per_class", "miou",
    "miou_classes", "confusion"}, ...}, values 0 to 1;
        n, miou_classes: classes in the mean, and where there is none the 0 is no figure
        (`tables.figure`);
        confusion: pixels, a row of text for every true class: so many taken for the first class, the second, ...
    """
    taxonomy, images = dataset.taxonomy, dataset.val
    things = torch.tensor(taxonomy.things, device=device)
    posteriors = posterior_alphas(cfg)
    readings = [(m, p) for m in models for p in posteriors]
    pq = {r: PanopticQuality(len(taxonomy)) for r in readings}
    miou = {r: MeanIoU(len(taxonomy)) for r in readings}
    count = min(limit or len(images), len(images))
    bar = tqdm(
        total=len(range(ranks.rank(), count, ranks.count())),
        desc=title,
        unit="image",
        dynamic_ncols=True,
        disable=ranks.rank() > 0 or not title,
    )
    for group in _groups(images, range(ranks.rank(), count, ranks.count()), cfg):
        views = [
            resize(Sample(images.image(i), []), cfg.test_size, cfg.test_max).image for i in group
        ]
        batch = torch.stack([_tensor(v) for v in views]).to(device)
        results, logits, shared = {}, {}, {}
        for name, model in models.items():
            model.eval()
            if id(model.backbone) not in shared:
                shared[id(model.backbone)] = model.backbone(batch)
            features = shared[id(model.backbone)]
            class_logits, logits[name] = model.predict(features)
            for posterior, alpha in posteriors.items():
                results[name, posterior] = model.posterior(
                    features, class_logits, logits[name], alpha
                )
        for slot, i in enumerate(group):
            truth, view = images.truth(i), views[slot]
            sizes = (padded_size(*batch.shape[-2:]), view.size[::-1], truth.segment_map.shape)
            for name, mask_logits in logits.items():
                masks = shared_masks(mask_logits[slot], sizes)
                for posterior in posteriors:
                    given = results[name, posterior][slot], mask_logits[slot]
                    segment_map, labels, _ = panoptic_inference(
                        *given,
                        things,
                        sizes,
                        cfg.object_mask_threshold,
                        cfg.overlap_threshold,
                        masks,
                    )
                    pq[name, posterior].add(
                        segment_map.cpu().numpy(),
                        labels.cpu().numpy(),
                        truth.segment_map,
                        truth.labels,
                        truth.areas,
                        truth.crowd,
                    )
                    semantic = semantic_inference(*given, sizes, masks)
                    miou[name, posterior].add(semantic.cpu().numpy(), truth.semantic(), IGNORE)
                del masks  # before those of the next model are made
        bar.update(len(group))
    bar.close()
    for other in (scores for k, scores in enumerate(ranks.gather((pq, miou))) if k != ranks.rank()):
        for mine, theirs in zip((pq, miou), other):
            for reading in readings:
                mine[reading].merge(theirs[reading])
    result = {}
    for reading in readings:
        score = pq[reading].result(things.cpu().numpy(), taxonomy.short_names)
        ious = miou[reading].result(taxonomy.short_names)
        for name, row in score["per_class"].items():
            row["semantic_iou"] = ious["per_class"][name]["iou"]
        confusion = [
            " ".join(map(str, row)) for row in miou[reading].confusion.tolist()
        ]  # text: JSON with indent gives every number a line
        result["/".join(reading)] = {
            **score,
            "miou": ious["miou"],
            "miou_classes": ious["n"],
            "confusion": confusion,
        }
    return result


def shared_masks(mask_logits: torch.Tensor, sizes) -> torch.Tensor | None:
    """(Q, H, W) probabilities at the output size, or None if there are more than SHARED_MASKS.

    mask_logits: (Q, h, w);  sizes: as in `model.resize_masks`.
    """
    if len(mask_logits) * max(height * width for height, width in sizes) > SHARED_MASKS:
        return None
    return resize_masks(mask_logits, *sizes).sigmoid_()


@torch.no_grad()
def predict(
    model: Segmenter, image, things: torch.Tensor, cfg: Config, device: torch.device, alpha: float
):
    """Segment one PIL image: segment_map (H, W) int32 at its size, labels (N,), scores (N,).   alpha: as in `Segmenter.posterior`."""
    posterior, mask_logits, sizes = posterior_of(model, image, cfg, device, alpha)
    return panoptic_inference(
        posterior, mask_logits, things, sizes, cfg.object_mask_threshold, cfg.overlap_threshold
    )


@torch.no_grad()
def posterior_of(model: Segmenter, image, cfg: Config, device: torch.device, alpha: float):
    """What the model says of one PIL image: posterior (Q, K+1), mask_logits (Q, h, w), and the sizes that inference takes."""
    view = resize(Sample(image, []), cfg.test_size, cfg.test_max).image
    batch = _tensor(view)[None].to(device)
    features = model.eval().backbone(batch)
    class_logits, mask_logits = model.predict(features)
    posterior = model.posterior(features, class_logits, mask_logits, alpha)
    return (
        posterior[0],
        mask_logits[0],
        (padded_size(*batch.shape[-2:]), view.size[::-1], image.size[::-1]),
    )


def frequency_groups(dataset: DataSet, groups: int) -> list[list[int]]:
    """Classes by their share of the pixels of the labelled images, least to most frequent, in groups of one size (Figure 5)."""
    pixels = class_pixels(dataset, dataset.labeled)
    return [part.tolist() for part in np.array_split(np.argsort(pixels, kind="stable"), groups)]


def class_pixels(dataset: DataSet, images: list[int]) -> np.ndarray:
    """(K,) pixels of every class in the ground truth of training images."""
    pixels = np.zeros(len(dataset.taxonomy), np.int64)
    for i in images:
        truth = dataset.train.truth(i)
        np.add.at(
            pixels,
            truth.labels,
            np.bincount(truth.segment_map.ravel(), minlength=len(truth.labels) + 1)[1:],
        )
    return pixels


def group_quality(result: dict, taxonomy, groups: list[list[int]]) -> list[dict]:
    """Mean PQ of each group of classes, over the n that are in the ground truth or predicted: [{"pq", "n", "classes"}]."""
    rows = []
    for group in groups:
        names = [taxonomy.short_names[k] for k in group]
        per_class = [result["per_class"][name] for name in names]
        counted = [c["pq"] for c in per_class if c["tp"] + c["fp"] + c["fn"]]
        rows.append(
            {"pq": float(np.mean(counted)) if counted else 0.0, "n": len(counted), "classes": names}
        )
    return rows


def _tensor(image) -> torch.Tensor:
    """PIL, RGB -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _groups(images, indices, cfg: Config):
    """Runs of at most eval_batch neighbouring images that have one size after resizing."""
    group, size = [], None
    for i in indices:
        w, h = images.image(i).size if cfg.eval_batch > 1 else (i, i)
        if group and (len(group) == cfg.eval_batch or (w, h) != size):
            yield group
            group = []
        group, size = group + [i], (w, h)
    if group:
        yield group
