"""What methods share that learn a class for every pixel: DeepLabv3+, labelled images, answers.

`Baseline` is supervised training, ESL's first rung; a prediction is a partition with one segment a
class. Nothing here knows instances.
Differs from the paper: nothing.
Axes: B images, C = K classes, H W pixels, h w a grid, S pixels of a side.
Try: `python dearli.py --stage sup --network deeplab --steps 100 --out runs/try-deeplab`.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_ensemble import resize
from data import PAD_VALUE, Labeled, LabeledBatches
from deeplab import IGNORE, DeepLab, Maps, cross_entropy
from engine.optim import NotFinite, build_optimizer, descend, require_finite
from ground.errors import UserError
from inference import Prediction
from matcher import Target
from panoptic_eval import SemanticScore
from pretrained.segmenter import build_deeplab


class Baseline:
    """The supervised baseline: labelled images only. A method as in `engine.method`."""

    title = "supervised"
    metrics = (SemanticScore,)

    def __init__(self, cfg, taxonomy, device, precision=torch.float32, clip=None, warm=False):
        if clip is not None:
            raise UserError("an official file holds a Mask2Former: --network deeplab cannot use it")
        self.cfg, self.device, self.precision, self.warm = cfg, device, precision, warm
        self.taxonomy = replace(taxonomy, things=(False,) * len(taxonomy))  # classes, no instances
        self.models = {"student": build_deeplab(cfg, self.taxonomy, device, self.projects)}

    @property
    def projects(self) -> bool:
        return False

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.models["student"], self.cfg)

    def batches(self, dataset) -> LabeledBatches:
        return LabeledBatches(dataset, self.cfg, self.cfg.sup_steps)

    def step(self, labeled: Labeled, t: int) -> dict[str, float]:
        """Cross-entropy of labelled images."""
        with as_it_was(self.models["student"]):
            maps = self.run(self.models["student"], labeled.images)
            terms = self.labeled_terms(maps, class_maps(labeled.targets))
            return self.descend(terms)

    def run(self, network: DeepLab, images: Tensor) -> Maps:
        with self.autocast():
            return network(images)

    def autocast(self):
        """For the network; losses, parts and soft labels are always fp32."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled)

    def labeled_terms(self, maps: Maps, classes: Tensor) -> dict[str, Tensor]:
        """L_CE of the first images of the maps. classes: (B, H, W), IGNORE where there is none."""
        count, cfg = len(classes), self.cfg
        terms = {"labeled/class": cross_entropy(maps.logits[:count], classes, cfg)}
        if maps.auxiliary is not None:
            auxiliary = cross_entropy(maps.auxiliary[:count], classes, cfg)
            terms["labeled/auxiliary"] = cfg.aux_weight * auxiliary
        return terms

    def descend(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Down the gradient of the sum of the terms."""
        self.optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        for group in self.optimizer.param_groups:
            for param in group["params"]:  # of a projector before the contrast starts
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        values = require_finite(terms)
        norm = descend(self.optimizer, self.cfg)
        return {"loss": sum(values.values()), **values, "grad_norm": norm}

    @property
    def readings(self) -> dict[str, str]:
        return {f"{name}/decoder": name for name in ("student", "teacher") if name in self.models}

    reading = "student/decoder"
    pictured: dict[str, str] = {}

    @torch.no_grad()
    def predict(self, images, sizes, readings, t=None, semantic=True, sums=False):
        """As `inference.predict`; a segment is all pixels of a class."""
        readings, probs = list(readings), {}
        for name in dict.fromkeys(reading.split("/")[0] for reading in readings):
            network = self.models[name].eval()
            probs[name] = network.upsample(network(images).logits.float(), images.shape[-2:])
        for k, ((height, width), output) in enumerate(sizes):
            for reading in readings:
                logits = probs[reading.split("/")[0]][k : k + 1, :, :height, :width]
                answer = logits if logits.shape[-2:] == tuple(output) else resize(logits, output)
                yield k, reading, by_class(answer[0].softmax(0), sums)


@contextmanager
def as_it_was(*networks: DeepLab):
    """Batch-norm statistics go back if the step is not taken."""
    before = [(b, b.clone()) for network in networks for b in network.buffers()]
    try:
        yield
    except NotFinite:
        for buffer, value in before:
            buffer.copy_(value)
        raise


def class_maps(targets: list[Target]) -> Tensor:
    """(B, H, W) int64 classes of partitions, IGNORE where they are void."""
    maps = [
        torch.cat([t.labels.new_tensor([IGNORE]), t.labels])[t.segment_map.long()] for t in targets
    ]
    return torch.stack(maps)


def image_shown(views: Tensor) -> Tensor:
    """(B, S, S) bool: not the grey that fills up views (B, 3, S, S) at the right and bottom."""
    image = (views != PAD_VALUE).any(1)
    rows, columns = image.any(2), image.any(1)
    rows, columns = (x.flip(1).cummax(1).values.flip(1) for x in (rows.byte(), columns.byte()))
    return (rows[:, :, None] & columns[:, None]).bool()


def nearest(maps: Tensor, size) -> Tensor:
    """Maps (B, H, W) -> (B, *size), nearest neighbour, of their type."""
    return F.interpolate(maps[:, None].float(), size=tuple(size))[:, 0].to(maps.dtype)


def by_class(probs: Tensor, sums: bool) -> Prediction:
    """Probabilities (K, H, W) as an answer: a class for every pixel, a segment a class."""
    confidence, classes = probs.max(0)
    labels, segments = classes.unique(return_inverse=True)
    scores = (
        torch.bincount(segments.flatten(), confidence.flatten()) / segments.flatten().bincount()
    )
    answer = [(segments + 1).int(), labels, scores.float(), classes, probs if sums else None]
    return Prediction(*(None if x is None else x.cpu().numpy() for x in answer))
