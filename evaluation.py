"""From a model to its figures: PQ and mIoU of student and teacher, each with the decoder's posterior and with the ensemble.

The paper reads DEAR and DEARLi from the student with the ensemble, plain SSL from the student's decoder alone (Table 1).
Panoptic quality is measured at the size of the original image.
"""

import numpy as np
import torch
from tqdm import tqdm

from config import Config
from data import PAD_VALUE, DataSet, Sample, resize
from model import Segmenter, panoptic_inference, resize_masks, semantic_inference
from panoptic_eval import MeanIoU, PanopticQuality

POSTERIORS = {"decoder": False, "ensemble": True}


@torch.no_grad()
def evaluate(models: dict[str, Segmenter], dataset: DataSet, cfg: Config, device: torch.device, posteriors=tuple(POSTERIORS),
             limit: int | None = None, title: str = "evaluation") -> dict:
    """PQ, SQ, RQ and mIoU on the validation images.

    Args: models: by name; those that share a backbone share its pass.   posteriors: of "decoder", "ensemble".
    Returns: {"student/ensemble": {"all": {pq, sq, rq, n}, "things", "stuff", "per_class", "miou"}, ...}, values 0 to 1.
    """
    taxonomy, images = dataset.taxonomy, dataset.val
    things = torch.tensor(taxonomy.things, device=device)
    readings = [(m, p) for m in models for p in posteriors]
    pq = {r: PanopticQuality(len(taxonomy)) for r in readings}
    miou = {r: MeanIoU(len(taxonomy)) for r in readings}
    count = min(limit or len(images), len(images))
    bar = tqdm(total=count, desc=title, unit="image", dynamic_ncols=True)
    for group in _groups(images, range(count), cfg):
        views = [resize(Sample(images.image(i), []), cfg.test_size, cfg.test_max).image for i in group]
        batch = torch.stack([_pad_tensor(v) for v in views]).to(device)
        results, logits, shared = {}, {}, {}
        for name, model in models.items():
            model.eval()
            if id(model.backbone) not in shared:
                shared[id(model.backbone)] = model.backbone(batch)
            features = shared[id(model.backbone)]
            class_logits, logits[name] = model.head(features)[-1]
            for posterior in posteriors:
                results[name, posterior] = model.posterior(features, class_logits, logits[name], POSTERIORS[posterior])
        for slot, i in enumerate(group):
            truth, view = images.truth(i), views[slot]
            sizes = (tuple(batch.shape[-2:]), view.size[::-1], truth.segment_map.shape)
            masks = {name: resize_masks(m[slot], *sizes).sigmoid() for name, m in logits.items()}
            for reading, posterior in results.items():
                given = posterior[slot], logits[reading[0]][slot]
                segment_map, labels, _ = panoptic_inference(*given, things, sizes, cfg.object_mask_threshold, cfg.overlap_threshold,
                                                            masks[reading[0]])
                pq[reading].add(segment_map.cpu().numpy(), labels.cpu().numpy(), truth.segment_map, truth.labels, truth.areas, truth.crowd)
                semantic = semantic_inference(*given, sizes, masks[reading[0]])
                miou[reading].add(semantic.cpu().numpy(), truth.semantic())
        bar.update(len(group))
    bar.close()
    result = {}
    for reading in readings:
        score = pq[reading].result(things.cpu().numpy(), taxonomy.short_names)
        ious = miou[reading].result(taxonomy.short_names)
        for name, row in score["per_class"].items():
            row["semantic_iou"] = ious["per_class"][name]["iou"]
        result["/".join(reading)] = {**score, "miou": ious["miou"]}
    return result


@torch.no_grad()
def predict(model: Segmenter, image, things: torch.Tensor, cfg: Config, device: torch.device, ensemble: bool):
    """Segment one PIL image: segment_map (H, W) int32 at its size, labels (N,), scores (N,)."""
    view = resize(Sample(image, []), cfg.test_size, cfg.test_max).image
    batch = _pad_tensor(view)[None].to(device)
    features = model.eval().backbone(batch)
    class_logits, mask_logits = model.head(features)[-1]
    posterior = model.posterior(features, class_logits, mask_logits, ensemble)
    sizes = (tuple(batch.shape[-2:]), view.size[::-1], image.size[::-1])
    return panoptic_inference(posterior[0], mask_logits[0], things, sizes, cfg.object_mask_threshold, cfg.overlap_threshold)


def _pad_tensor(image) -> torch.Tensor:
    """(3, H', W') uint8; sides grown to a multiple of 32, the coarsest stride, so that all levels cover the same area."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    h, w = (-(-s // 32) * 32 for s in x.shape[1:])
    return torch.nn.functional.pad(x, (0, w - x.shape[2], 0, h - x.shape[1]), value=PAD_VALUE)


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
