"""Decoder warm-up (DeWa, section 3.3): SAM's masks on all training images, and a decoder that
learns to draw them.

SAM is asked everywhere, knows no class and overlaps itself; only L_loc of Eq. (3) is learned (class
weight 0, in the loss and in the matching). Which of the masks are segments of the taxonomy is left
to the semi-supervised stage.
Differs from the paper: length and crop are those of its code (docs/differences.md).
Source: Segment Anything (arXiv:2304.02643).
Axes: N masks, H W pixels, B images.
Try, after the demo: `python dearli.py --stage sup --steps 100 --init runs/mini-dewa --out
runs/try-dewa`, against the same without --init.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch

from config import Config
from data import Batches, Labeled, Sample, pad_image, weak_view
from engine.optim import build_optimizer, descend, require_finite
from ground import ranks
from losses import learn, point_generators
from matcher import Target
from pretrained.segmenter import build
from readers.ground_truth import Taxonomy
from readers.mask_files import read_masks

# One class with three names, as officially.
TAXONOMY = Taxonomy(("segment, object, regular shape",), (True,), (1,))


@dataclass(frozen=True)
class MaskedImages:
    """Images and the folder of their masks (`readers.mask_files.generate_masks`). indices: of the
    images to learn from.

    images: has len, name(i), image(i) and digest(i), as `readers.pictures.ImageFolder`.
    """

    images: Any
    folder: Path
    indices: Sequence[int]


class Dewa:
    """The warm-up as a method (`engine.method`): a student that knows one class, and no reading."""

    title = "DeWa"
    metrics = ()
    readings: dict[str, str] = {}
    reading = ""
    pictured: dict[str, str] = {}

    def __init__(self, cfg, taxonomy, device, precision=torch.float32, clip=None, warm=False):
        self.cfg, self.taxonomy, self.device = cfg, taxonomy, device
        self.precision = precision
        self.models = {"student": build(cfg, taxonomy, device, clip)}

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.models["student"], self.cfg)

    def batches(self, dataset: MaskedImages) -> "DewaBatches":
        return DewaBatches(dataset, self.cfg, self.cfg.dewa_steps)

    def step(self, batch: Labeled, t: int) -> dict[str, float]:
        """L_loc of Eq. (3) on all masks. Raises: as `engine.method.Method.step`."""
        student, cfg = self.models["student"], self.cfg
        enabled = self.precision != torch.float32
        with torch.autocast(self.device.type, self.precision, enabled=enabled):
            features = student.backbone(batch.images)
        self.optimizer.zero_grad(set_to_none=True)
        first = ranks.share(cfg.dewa_batch).start
        generators = point_generators(cfg.seed, t, first, len(batch.targets), self.device)
        losses = learn(
            student.head, features, batch.targets, cfg.loss_dewa, generators, self.precision
        )
        losses = require_finite(losses)
        norm = descend(self.optimizer, cfg)
        row = {"loss": sum(losses.values()), "mask": losses["mask"], "dice": losses["dice"]}
        return {**row, "grad_norm": norm}

    def predict(self, images, sizes, readings, t=None, semantic=True, sums=False):
        return iter(())


class DewaBatches(Batches):
    """Images with all of their SAM masks; one that the crop empties stays a target (official), or
    not.
    """

    def __init__(self, dataset: MaskedImages, cfg: Config, steps: int):
        if cfg.dewa_crop:
            cfg = replace(cfg, crop=cfg.dewa_crop, crop_height=0)
        super().__init__(cfg, steps)
        self.dataset = dataset

    def __getitem__(self, step: int) -> Labeled:
        images, targets, names = [], [], []
        for slot in self.slots(self.cfg.dewa_batch):
            i = self.pick(self.dataset.indices, step, slot, self.cfg.dewa_batch)
            image, masks = self._view(i, self.rng(step, slot))
            images.append(pad_image(image, self.cfg.crop_size))
            targets.append(Target(torch.zeros(len(masks), dtype=torch.int64), masks=masks))
            names.append(self.dataset.images.name(i))
        return Labeled(torch.stack(images), targets, names)

    def _view(self, i: int, rng) -> tuple[torch.Tensor, torch.Tensor]:
        """A weak view of an image, (3, h, w), and its masks (N, S, T) bool, of the crop."""
        source = self.dataset.images
        image, name = source.image(i), source.name(i)
        masks = read_masks(self.dataset.folder, name, image.size[::-1], source.digest(i))
        layers = list(np.moveaxis(masks, 2, 0))  # one by one: each is in one piece
        image, layers = weak_view(Sample(image, layers), self.cfg, rng, colour=True)
        masks = torch.zeros(len(layers), *self.cfg.crop_size, dtype=torch.bool)
        for mask, layer in zip(masks, layers):
            mask[: layer.shape[0], : layer.shape[1]] = torch.from_numpy(layer.copy())
        if not self.cfg.dewa_keep_empty:
            masks = masks[masks.flatten(1).any(1)]
        return image, masks
