"""SAM's masks of everything: a grid of points over an image, three answers to each, the best kept.

The model and its weights are segment_anything's, and the masks are those of its
`SamAutomaticMaskGenerator` without crops; masks take the size of the image a few at a time, and are
kept small until it is known which of them stay.
Differs from the paper: no crops, as in the official DeWa masks.
Source: Segment Anything (arXiv:2304.02643), section 5 and appendices A, B.    Axes: N points, M
masks, H W pixels.
Try: `python dearli.py --stage masks --points-per-side 4 --out runs/try-grid` asks at 16 points an
image instead of 144, for --stage dewa --masks.
"""

import functools
import math

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_point_grid
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torchvision.ops import nms

from config import Config
from ground import identity
from matcher import in_parts
from model import resize_masks
from pretrained.sam_fast import answers

# logits: a mask is stable if it hardly changes when its threshold is raised and lowered by so much
OFFSET = 1.0
SETTINGS = "sam points_per_side pred_iou_thresh stability_thresh mask_nms_thresh".split()


class MaskGenerator:
    """All masks of an image.

    Args:
        sam: in eval mode, on its device.
        cfg: points_per_side, points_per_batch and the three thresholds of the masks.
        precision: of the image encoder's products. The answers to the points are always fp32: many
            of their masks would be others in bf16.
    """

    def __init__(self, sam: Sam, cfg: Config, precision: torch.dtype = torch.float32):
        self.sam, self.cfg, self.precision = sam.eval(), cfg, precision
        self.grid = build_point_grid(cfg.points_per_side)  # (N, 2) in [0, 1]

    @functools.cached_property
    def about(self) -> dict:
        """All that a mask depends on, beside the image. weights: SHA-256 of SAM's."""
        return {
            **settings(self.cfg),
            "precision": str(self.precision).removeprefix("torch."),
            "weights": identity.of_tensors(self.sam.state_dict()),
        }

    @torch.inference_mode()
    def generate(self, image: np.ndarray) -> list[dict]:
        """Image (H, W, 3) uint8 RGB -> records, those of the highest predicted IoU first.

        A record has: segmentation (H, W) bool, area and bbox [x, y, w, h] in pixels, predicted_iou,
        stability_score, crop_box (the whole image), point_coords [[x, y]], the point that was
        asked.
        """
        size, device, side = image.shape[:2], self.sam.device, self.sam.image_encoder.img_size
        transform = ResizeLongestSide(side)
        resized = torch.as_tensor(transform.apply_image(image), device=device).permute(2, 0, 1)
        sizes = (side, side), resized.shape[1:], size
        points = self.grid * size[::-1]
        xy = transform.apply_coords(points, size)
        xy = torch.as_tensor(xy, dtype=torch.float32, device=device)
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            embedding = self.sam.image_encoder(self.sam.preprocess(resized)[None]).float()
        parts = []
        for batch in torch.arange(len(points), device=device).split(self.cfg.points_per_batch):
            at, iou, small = answers(self.sam, embedding, xy[batch], self.cfg.pred_iou_thresh)
            if len(iou):
                parts += self._stable(batch[at], iou, small, sizes)
        if not parts:
            return []
        at, stability, box, iou, small = map(torch.cat, zip(*parts))
        best = nms(box, iou, self.cfg.mask_nms_thresh)
        figures = (t[best].tolist() for t in (at, stability, box, iou))
        masks = (resize_masks(mask[None], *sizes)[0] > 0 for mask in small[best])
        return [
            _record(mask.cpu().numpy(), points[k].tolist(), *rest)
            for mask, k, *rest in zip(masks, *figures)
        ]

    def _stable(self, at: Tensor, iou: Tensor, small: Tensor, sizes):
        """The stable ones of M answers, a few at a time: point, stability, box, IoU, logits."""
        for point, *answer in in_parts(max(sizes[0][0] ** 2, math.prod(sizes[2])), at, iou, small):
            full = resize_masks(answer[-1], *sizes)
            sure, possible = (
                (full > offset).flatten(1).sum(1, dtype=torch.int32) for offset in (OFFSET, -OFFSET)
            )
            stability = sure / possible
            stable = stability >= self.cfg.stability_thresh  # 0 / 0 is not
            yield [t[stable] for t in (point, stability, boxes(full), *answer)]


def settings(cfg: Config) -> dict:
    """The numbers that masks depend on; how many points are asked at once is none of them."""
    return {"kind": "sam", **{name: getattr(cfg, name) for name in SETTINGS}}


def boxes(logits: Tensor) -> Tensor:
    """Logits (M, H, W) -> first and last column and row with a positive one, xyxy (M, 4) float32.

    Zeros of an empty mask.
    """
    columns, rows = (logits.amax(1) > 0).float(), (logits.amax(2) > 0).float()
    first = [hits.argmax(1) for hits in (columns, rows)]
    last = [hits.shape[1] - 1 - hits.flip(1).argmax(1) for hits in (columns, rows)]
    return torch.stack([*first, *last], 1) * columns.amax(1, keepdim=True)


def _record(mask: np.ndarray, point: list, stability: float, box: list, iou: float) -> dict:
    """As segment_anything's, of one mask."""
    x, y, right, below = box
    return {
        "segmentation": mask,
        "area": int(mask.sum()),
        "bbox": [x, y, right - x, below - y],
        "predicted_iou": iou,
        "stability_score": stability,
        "crop_box": [0, 0, mask.shape[1], mask.shape[0]],
        "point_coords": [point],
    }
