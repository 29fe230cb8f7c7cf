"""Decoder warm-up (DeWa, section 3.3): SAM's masks on all training images, and a decoder that learns to draw them.

SAM is asked everywhere, knows no class and overlaps itself; only L_loc of Eq. (3) is learned (class weight 0, in the loss
and in the matching). Which of the masks are segments of the taxonomy is left to the semi-supervised stage.
Differs from the paper: nothing.    Source: Segment Anything (arXiv:2304.02643); run lengths as in the COCO mask API.
Axes: N masks, H W pixels, B images.
Try, after the demo: `python dearli.py --stage sup --steps 100 --init runs/mini-dewa --out runs/try-dewa`, against the same without --init.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from config import Config
from data import Batches, Labeled, Sample, pad, pad_image, weak_view
from engine.optim import descend, require_finite
from ground import ranks
from losses import learn, point_generators
from matcher import Target
from model import Segmenter
from readers.ground_truth import Taxonomy
from readers.mask_files import read_masks

TAXONOMY = Taxonomy(
    ("segment, object, regular shape",), (True,), (1,)
)  # one class, three names (official)


# ---------------------------------------------------------------------------------------------------- warm-up


class DewaBatches(Batches):
    """All training images, labelled or not, with all of their SAM masks; one that the crop empties stays a target (official), or not.

    images: has len, name(i) and image(i).   folder: of the masks, `generate_masks`.
    """

    def __init__(self, images, folder: Path, cfg: Config, steps: int):
        super().__init__(replace(cfg, crop=cfg.dewa_crop or cfg.crop), steps)
        self.images, self.folder = images, folder
        self.indices = range(len(images))

    def __getitem__(self, step: int) -> Labeled:
        images, targets, names = [], [], []
        for slot in self.slots(self.cfg.dewa_batch):
            i = self.pick(self.indices, step, slot, self.cfg.dewa_batch)
            name = self.images.name(i)
            image = self.images.image(i)
            masks = read_masks(self.folder, name, image.size[::-1], self.images.digest(i))
            image, (masks,) = weak_view(
                Sample(image, [masks]), self.cfg, self.rng(step, slot), colour=True
            )
            masks = torch.from_numpy(
                np.ascontiguousarray(pad(masks, self.cfg.crop, 0).transpose(2, 0, 1))
            )
            if not self.cfg.dewa_keep_empty:
                masks = masks[masks.flatten(1).any(1)]
            images.append(pad_image(image, self.cfg.crop))
            targets.append(Target(torch.zeros(len(masks), dtype=torch.int64), masks=masks))
            names.append(name)
        return Labeled(torch.stack(images), targets, names)


def dewa_step(
    model: Segmenter,
    optimizer: torch.optim.Optimizer,
    batch: Labeled,
    cfg: Config,
    step: int,
    precision: torch.dtype = torch.float32,
) -> dict[str, float]:
    """One warm-up step: L_loc of Eq. (3). Returns the loss terms, weighted, and the gradient norm, as floats. Raises: as `train_step`."""
    device = batch.images.device
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        features = model.backbone(batch.images)
    optimizer.zero_grad(set_to_none=True)
    draws = point_generators(
        cfg.seed, step, ranks.share(cfg.dewa_batch).start, len(batch.targets), device
    )
    losses = require_finite(
        learn(model.head, features, batch.targets, cfg.loss_dewa, draws, precision)
    )
    norm = descend(optimizer, cfg)
    return {
        "loss": sum(losses.values()),
        "mask": losses["mask"],
        "dice": losses["dice"],
        "grad_norm": norm,
    }
