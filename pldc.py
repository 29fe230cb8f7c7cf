"""PL-DC: semi-supervised instance segmentation, whose pseudo-labels are filtered, renamed and
weighted.

Implements section 3 of the paper: decoupled thresholds (DDTF, Eq. 3-5), CLIP's correction of the
classes (DICC, Eq. 6-9) and a mask loss that trusts the teacher where it is sure (PMUA, Eq. 10-11).
Axes: N instances, Q queries, K classes, H W pixels.
Sources: PL-DC (arXiv:2505.11075); Guided Distillation (arXiv:2308.02668).
"""

import math

import torch
from torch import Tensor


@torch.no_grad()
def mask_quality(mask_logits: Tensor) -> Tensor:
    """m of Eq. (4): the mean probability of the pixels that are inside of a mask. (..., H, W) ->
    (...), 0.5 to 1.

    Inside is a probability above 0.5, not at it; 0 for a mask without a pixel.
    """
    p = mask_logits.float().sigmoid()
    inside = p > 0.5
    return (p * inside).sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)


@torch.no_grad()
def keep_instances(
    class_probs: Tensor,
    mask_logits: Tensor,
    class_threshold: float,
    mask_threshold: float,
    least_area: int = 5,
    coupled: float | None = None,
) -> tuple[Tensor, Tensor]:
    """DDTF, Eq. (5): the queries of an image that become instances.

    Args:
        class_probs: (Q, K+1), softmax; index K is no-object. The class quality c is the largest of
            the others (Eq. 3).
        mask_logits: (Q, H, W).    class_threshold, mask_threshold: least c and least m, 0 to 1.
        least_area: pixels; a mask has to have more (public code).
        coupled: instead of the two, the least product c * m, Mask2Former's score: what the
            ablation "- DDTF" thresholds at 0.9 * 0.85 = 0.765.
    Returns: (query (N,), label (N,)), int64, in the order of the queries; empty if none is kept.
    """
    c, label = class_probs[:, :-1].max(-1)
    m = mask_quality(mask_logits)
    good = (c >= class_threshold) & (m >= mask_threshold) if coupled is None else c * m >= coupled
    area = (mask_logits.float().sigmoid() > 0.5).sum((-2, -1))
    query = (good & (area > least_area)).nonzero()[:, 0]
    return query, label[query]


def clip_weight(step: int, burn_in: int, steps: int) -> float:
    """CLIP's share w in the class of a pseudo-label, Eq. (7): from 0.5 at the end of the burn-in
    down to 0 at the end of the training.
    """
    return 0.25 * (math.cos(math.pi * (step - burn_in) / (steps - burn_in)) + 1)


@torch.no_grad()
def correct_classes(teacher_probs: Tensor, clip_probs: Tensor, weight: float) -> Tensor:
    """DICC, Eq. (8) and (9): the classes (N,) int64 that teacher and CLIP agree on.

    teacher_probs, clip_probs: (N, K), both over the classes without no-object.   weight: CLIP's.
    """
    return (weight * clip_probs + (1 - weight) * teacher_probs).argmax(-1)


@torch.no_grad()
def certainty(mask_logits: Tensor) -> Tensor:
    """1 - u of Eq. (10), PMUA's weight of a pixel in the BCE: 0 where the teacher says 0.5, 1 where
    it says 0 or 1. Any shape, the same out.
    """
    return 2 * (mask_logits.float().sigmoid() - 0.5).abs()
