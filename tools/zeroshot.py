"""."""

import numpy as np
import torch
from tqdm import tqdm

from clip_ensemble import padded_size, zero_shot_logits
from config import Config
from data import Sample, resize
from engine.evaluation import _tensor
from model import Segmenter
from panoptic_eval import PanopticQuality
from readers.ground_truth import DataSet


@torch.no_grad()
def zero_shot(
    model: Segmenter,
    dataset: DataSet,
    cfg: Config,
    device: torch.device,
    partition,
    limit: int | None = None,
) -> dict:
    """PQ of CLIP alone: given segments, each classified by Eq. (4) and (5); Figure 3 (true segments), section 3.3 (SAM's).

    partition(i) -> (H, W) integers of validation image i, 0 = no segment.   Segments that are given one class of stuff are joined.
    Returns: {"all", "things", "stuff", "per_class"}, as `evaluate`.
    """
    taxonomy, images = dataset.taxonomy, dataset.val
    model.eval()
    pq = PanopticQuality(len(taxonomy))
    for i in tqdm(
        range(min(limit or len(images), len(images))),
        desc="zero-shot",
        unit="image",
        dynamic_ncols=True,
    ):
        truth, given = images.truth(i), partition(i)
        segment_map = np.searchsorted(np.unique(np.append(0, given)), given).astype(
            np.int32
        )  # 0 = none, 1 ... N
        if not segment_map.any():
            pq.add(
                segment_map,
                np.zeros(0, np.int64),
                truth.segment_map,
                truth.labels,
                truth.areas,
                truth.crowd,
            )
            continue
        view = resize(Sample(images.image(i), [segment_map]), cfg.test_size, cfg.test_max)
        batch = _tensor(view.image)[None].to(device)
        grid = np.zeros(padded_size(*batch.shape[-2:]), np.int32)
        grid[: view.layers[0].shape[0], : view.layers[0].shape[1]] = view.layers[0]
        quarter = torch.from_numpy(grid[2::4, 2::4].copy()).to(
            device
        )  # as fine as the decoder's masks
        number = torch.arange(1, int(segment_map.max()) + 1, device=device)
        mask_logits = 2.0 * (quarter[None, None] == number[:, None, None]) - 1  # (1, N, H/4, W/4)
        features = model.backbone(batch)
        classes = (
            zero_shot_logits(
                model.backbone, features[-1], mask_logits, model.vocabulary, cfg.clip_scale
            )[0]
            .argmax(-1)
            .cpu()
            .numpy()
        )
        lut, labels, joined = np.zeros(len(classes) + 1, np.int32), [], {}
        for k, label in enumerate(classes.tolist(), 1):
            if taxonomy.things[label] or label not in joined:
                labels.append(label)
                joined[label] = len(labels)
            lut[k] = len(labels) if taxonomy.things[label] else joined[label]
        pq.add(
            lut[segment_map],
            np.array(labels, np.int64),
            truth.segment_map,
            truth.labels,
            truth.areas,
            truth.crowd,
        )
    return pq.result(np.array(taxonomy.things), taxonomy.short_names)


def flatten(masks: np.ndarray, least: int = 512) -> np.ndarray:
    """Overlapping masks (H, W, N) -> partition (H, W) int32: large masks first, smaller on top; what then shows fewer than `least`
    pixels goes (as the official panoptic view of SAM's masks)."""
    out = np.zeros(masks.shape[:2], np.int32)
    for k in np.argsort(-masks.sum((0, 1)), kind="stable"):
        out[masks[..., k]] = k + 1
    left = np.bincount(out.ravel(), minlength=masks.shape[-1] + 1) >= least
    return np.where(left[out], out, 0)
