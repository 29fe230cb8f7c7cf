"""The set loss of Eq. (3): class cross-entropy on all queries, BCE and dice on the masks of the matched ones.

Masks are compared on P points: most of them where the student is least certain (importance sampling of PointRend),
the rest uniform. The loss is applied to every layer of the decoder (deep supervision), each with its own matching.
Differs from the paper: nothing.    Axes: B images, Q queries, K classes, N segments, P points, L layers.
Sources: Mask2Former (arXiv:2112.01527), PointRend (arXiv:1912.08193).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from matcher import CostWeights, Target, match, point_sample


@dataclass(frozen=True)
class LossConfig:
    weights: CostWeights = CostWeights()
    no_object_weight: float = 0.1      # weight of class K in the cross-entropy
    num_points: int = 12544            # P = 112 * 112, for the matching and for each mask loss
    oversample: float = 3.0            # candidates drawn for each point chosen by uncertainty
    importance: float = 0.75           # share of the points chosen by uncertainty


def set_loss(layers: list[tuple[Tensor, Tensor]], targets: list[Target], cfg: LossConfig,
             generator: torch.Generator | None = None, points: list[tuple[Tensor, Tensor]] | None = None) -> dict[str, Tensor]:
    """Eq. (3), summed over the layers of the decoder and weighted.

    Args:
        layers: for each layer (the last one is the prediction): class_logits (B, Q, K+1) and mask_logits (B, Q, h, w).
        targets: B targets.     generator: source of all point draws, None for torch's own.
        points: instead of draws, for each layer: the matching's (B, P, 2) and the mask losses' (M, P, 2), M matched pairs
            in the order of images and queries; xy in [0, 1].
    Returns: {"class", "mask", "dice"}: scalars; their sum is the loss. A zero weight leaves its term out of the sum but
        in the graph, so DeWa (L_loc only) gives the class head a gradient of exactly zero.
    """
    num_masks = max(sum(len(t) for t in targets), 1)
    total = {"class": 0.0, "mask": 0.0, "dice": 0.0}
    for layer, (class_logits, mask_logits) in enumerate(layers):
        shared = points[layer][0] if points else torch.rand(len(targets), cfg.num_points, 2, generator=generator, device=mask_logits.device)
        matches = [match(c, m, t, p, cfg.weights) for c, m, t, p in zip(class_logits, mask_logits, targets, shared)]
        label = class_loss(class_logits, targets, matches, cfg.no_object_weight)
        rows = torch.cat([queries + image * mask_logits.shape[1] for image, (queries, _) in enumerate(matches)])
        chosen = mask_logits.flatten(0, 1)[rows.to(mask_logits.device)].float()              # (M, h, w), matched queries
        where = points[layer][1] if points else uncertain_points(chosen, cfg, generator)
        mask, dice = mask_losses(chosen, sample_targets(targets, matches, where), where, num_masks)
        for name, term in ("class", cfg.weights.label * label), ("mask", cfg.weights.mask * mask), ("dice", cfg.weights.dice * dice):
            total[name] = total[name] + term
    return total


def class_loss(class_logits: Tensor, targets: list[Target], matches, no_object_weight: float) -> Tensor:
    """Cross-entropy of all queries; unmatched ones should say no-object (index K), with a lower weight. Scalar."""
    num_classes = class_logits.shape[-1] - 1
    wanted = torch.full(class_logits.shape[:2], num_classes, dtype=torch.int64, device=class_logits.device)
    for row, target, (queries, segments) in zip(wanted, targets, matches):
        row[queries] = target.labels[segments]
    weight = torch.ones(num_classes + 1, device=class_logits.device)
    weight[-1] = no_object_weight
    return F.cross_entropy(class_logits.float().transpose(1, 2), wanted, weight)


def mask_losses(mask_logits: Tensor, wanted: Tensor, points: Tensor, num_masks: float) -> tuple[Tensor, Tensor]:
    """BCE and dice of matched masks on their points, summed over masks and divided by num_masks. Two scalars.

    Args: mask_logits (M, h, w);  wanted (M, P) in [0, 1];  points (M, P, 2) xy in [0, 1].
    """
    x = point_sample(mask_logits, points)                                                    # (M, P)
    bce = F.binary_cross_entropy_with_logits(x, wanted, reduction="none").mean(1).sum() / num_masks
    p = x.sigmoid()
    dice = (1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)).sum() / num_masks
    return bce, dice


@torch.no_grad()
def uncertain_points(mask_logits: Tensor, cfg: LossConfig, generator: torch.Generator | None = None,
                     candidates: Tensor | None = None, uniform: Tensor | None = None) -> Tensor:
    """(M, P, 2) points for (M, h, w) logits: the least certain of oversample * P candidates, and some uniform ones.

    candidates (M, oversample * P, 2) and uniform (M, P - importance * P, 2) replace the draws when given.
    """
    m, device = len(mask_logits), mask_logits.device
    num_uncertain = int(cfg.importance * cfg.num_points)
    if candidates is None:
        candidates = torch.rand(m, int(cfg.num_points * cfg.oversample), 2, generator=generator, device=device)
    if uniform is None:
        uniform = torch.rand(m, cfg.num_points - num_uncertain, 2, generator=generator, device=device)
    if m == 0:
        return candidates[:, :cfg.num_points]
    certainty = point_sample(mask_logits, candidates).abs()
    nearest = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices      # closest to the decision
    chosen = candidates.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, uniform], 1)


@torch.no_grad()
def sample_targets(targets: list[Target], matches, points: Tensor) -> Tensor:
    """(M, P) target values of the matched segments of all images, in the order of the matches, at points (M, P, 2)."""
    per_image = points.split([len(queries) for queries, _ in matches])
    return torch.cat([t.sample(p, s.to(p.device)) for t, p, (_, s) in zip(targets, per_image, matches)])
