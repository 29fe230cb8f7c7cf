"""Bipartite matching of queries to segments (Hungarian assignment), on sampled points.

Implements the matching M of Eq. (3): cost = w_class * class + w_mask * BCE + w_dice * dice, on P
points that all masks of an image share. Targets stay segment maps: binary masks of full size are
built a few at a time, or not at all.
Differs from the paper: nothing.
Axes: B images, Q queries, K classes, N segments, P points, h w mask grid (stride 4).
Sources: Mask2Former (arXiv:2112.01527); point sampling from PointRend (arXiv:1912.08193).
Try: `python dearli.py --stage sup --steps 250 --num-points 8 --out runs/try-points` compares masks
on 8 points instead of 384.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from config import CostWeights

# values that work takes at once: 1 MB, what a core's cache holds; a small part of a GPU's memory
PART, GPU_PART = 2**18, 2**27


def in_parts(values: int, *tensors: Tensor):
    """Tensors of N rows, split alike: a few rows at a time.

    So that work on `values` numbers a row stays in the cache of a CPU, or within reason on a GPU.
    """
    rows = max(1, (PART if tensors[0].device.type == "cpu" else GPU_PART) // values)
    return zip(*(t.split(rows) for t in tensors))


@dataclass
class Target:
    """What one image should be segmented into. Exactly one of `segment_map` and `masks` is given.

    labels: (N,) int64 in [0, K).
    segment_map: (H, W) integers; 0 = void, k = k-th segment: a partition (ground truth, hard
        pseudo-labels).
    masks: (N, H, W) bool, may overlap (masks drawn by SAM, instances).
    certainty: (N, H, W) float32, 0 to 1: what a pixel counts in the BCE of masks; None: all alike.
    """

    labels: Tensor
    segment_map: Tensor | None = None
    masks: Tensor | None = None
    certainty: Tensor | None = None

    def __post_init__(self):
        if (self.segment_map is None) == (self.masks is None):
            raise ValueError("target: expected either a segment map or masks")
        if self.masks is not None and len(self.masks) != len(self.labels):
            raise ValueError(
                f"masks: expected ({len(self.labels)}, H, W) for {len(self.labels)} labels, "
                f"got {tuple(self.masks.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device) -> "Target":
        parts = (self.labels, self.segment_map, self.masks, self.certainty)
        return Target(*(t if t is None else t.to(device, non_blocking=True) for t in parts))

    def sample(self, points: Tensor, segments: Tensor) -> Tensor:
        """Bilinear samples of the binary masks of some segments, each at its own points.

        Args: points (M, P, 2) xy in [0, 1];  segments (M,) int64 in [0, N).   Returns: (M, P)
        float32 in [0, 1].
        A few masks at a time: all those of full size would fill the memory.
        """
        source, parts = self.segment_map if self.masks is None else self.masks, []
        for at, chosen in in_parts(source.shape[-2] * source.shape[-1], points, segments):
            masks = source == (chosen + 1)[:, None, None] if self.masks is None else source[chosen]
            parts.append(point_sample(masks.float(), at))
        return torch.cat(parts)

    def sample_all(self, points: Tensor) -> Tensor:
        """Every segment's mask at the same points: points (P, 2) -> (N, P) float32."""
        n = len(self)
        if self.masks is not None:
            return self.sample(points.expand(n, -1, -1), torch.arange(n, device=points.device))
        index, weight = _neighbours(points, *self.segment_map.shape)  # (P, 4)
        owner = self.segment_map.reshape(-1)[index].long()
        samples = points.new_zeros(n + 1, len(points))  # row 0 collects void
        samples.scatter_add_(0, owner.T, weight.T.to(samples.dtype))
        return samples[1:]


def _neighbours(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Flat indices and bilinear weights, (..., 4) each, of the pixels around xy in [0, 1]."""
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    xs, ys = torch.stack([x0, x0 + 1, x0, x0 + 1], -1), torch.stack([y0, y0, y0 + 1, y0 + 1], -1)
    weight = torch.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy], -1)
    inside = (xs >= 0) & (xs < width) & (ys >= 0) & (ys < height)
    index = ys.clamp(0, height - 1).long() * width + xs.clamp(0, width - 1).long()
    return index, weight * inside


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of maps, each at its own points; outside counts 0.

    Pixel centres lie at (i + 0.5) / size.
    Args: maps (M, h, w) float;  points (M, P, 2) xy in [0, 1].   Returns: (M, P).
    """
    return F.grid_sample(maps[:, None], (2 * points[:, None]).sub_(1), align_corners=False)[:, 0, 0]


def match(costs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Assign every segment of an image to a distinct query at the lowest total cost.

    Many images (and layers) at once.
    Args: costs: matrices (Q, N), see `matching_cost`. They cross to the CPU together: a GPU is
        asked to wait once.
    Returns: for each (query_idx, segment_idx), both (min(Q, N),) int64 on the CPU, sorted by query;
        empty when N = 0.
    A cost that is not finite comes from outputs that are not: any assignment will do, for the loss,
    which sees them too, stops the step.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and only training matches

    flat = torch.cat([cost.flatten() for cost in costs]).cpu().nan_to_num()
    matrices = [
        part.view(cost.shape).numpy()
        for part, cost in zip(flat.split([cost.numel() for cost in costs]), costs)
    ]
    return [tuple(map(torch.as_tensor, linear_sum_assignment(matrix))) for matrix in matrices]


@torch.no_grad()
def matching_cost(
    class_logits: Tensor, mask_logits: Tensor, target: Target, points: Tensor, weights: CostWeights
) -> Tensor:
    """The cost (Q, N) of giving segment n of one image to query q; always computed in fp32.

    Args:
        class_logits: (Q, K+1), unnormalised; index K is no-object.
        mask_logits: (Q, h, w), logits, 1/4 of the input resolution.
        points: (P, 2) xy in [0, 1], the same for all masks.
    """
    with torch.autocast(class_logits.device.type, enabled=False):
        cost_class = -class_logits.float().softmax(-1)[:, target.labels]  # (Q, N)
        target_values = target.sample_all(points)  # (N, P)
        # A pixel's logits of all queries, side by side, are a row of a table; a point mixes four
        # rows. A few points at a time stay in the cache.
        table = mask_logits.float().flatten(1).T.contiguous()  # (hw, Q)
        index, weight = _neighbours(points, *mask_logits.shape[-2:])  # (P, 4)
        bce = overlap = area = 0.0
        for i, w, t in in_parts(table.shape[1], index, weight, target_values.T):
            x = F.embedding_bag(i, table, per_sample_weights=w, mode="sum")  # (P', Q)
            p = x.sigmoid()
            bce = bce + F.softplus(x).sum(0)[:, None] - (t.T @ x).T  # BCE(x, t) = softplus(x) - x t
            overlap, area = overlap + (t.T @ p).T, area + p.sum(0)[:, None]
        cost_dice = 1 - (2 * overlap + 1) / (area + target_values.sum(-1) + 1)
        return (
            weights.label * cost_class + weights.mask * bce / len(points) + weights.dice * cost_dice
        )
