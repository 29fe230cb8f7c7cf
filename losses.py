"""The set loss of Eq. (3): cross-entropy on all queries, BCE and dice on the masks of matched ones.

Masks are compared on P points: most of them where the student is least certain (importance sampling
of PointRend), the rest uniform. The loss is applied to every layer of the decoder (deep
supervision), each with its own matching. A query's mask logits are the product of its embedding and
the mask features; they are formed here, of all queries for the matching and, with gradient, of the
matched ones alone: no other query has a mask loss.
Differs from the paper: nothing.
Axes: B images, Q queries, K classes, C channels, N segments, P points, M matched pairs.
Sources: Mask2Former (arXiv:2112.01527), PointRend (arXiv:1912.08193).
Try: `python dearli.py --stage sup --steps 250 --dice-weight 0 --out runs/try-dice` does without the
dice term, in the loss and in the matching.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from config import LossConfig
from ground import ranks
from matcher import Target, in_parts, match, matching_cost, point_sample


def set_loss(
    layers: list[tuple[Tensor, Tensor]],
    mask_features: Tensor,
    targets: list[Target],
    cfg: LossConfig,
    generators: list[torch.Generator] | None = None,
    points: list[tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Eq. (3), summed over the decoder's layers and weighted; a rank's share, if there are several.

    Args:
        layers: for each layer (the last one is the prediction): class_logits (B, Q, K+1) and mask
            embeddings (B, Q, C).
        mask_features: (B, C, h, w).
        targets: B targets.     generators: for each image the source of its point draws
            (`point_generators`).
        points: instead of draws, for each layer: the matching's (B, P, 2) and the mask losses' (M,
            P, 2), M matched pairs in the order of images and queries; xy in [0, 1].
    Returns: {"class", "mask", "dice"}: scalars; their sum is the loss. A zero weight leaves its
        term out of the sum but in the graph, so DeWa (L_loc only) gives the class head a gradient
        of exactly zero.
    """
    queries = layers[0][0].shape[1]
    num_masks, class_weight = _normalisers(targets, queries, cfg, mask_features.device)
    # B of (hw, C), as the pixel decoder lays them out
    shape, features = mask_features.shape[-2:], mask_features.flatten(2).transpose(1, 2).unbind()
    nothing = torch.zeros(queries, 0, device=mask_features.device)
    costs = []
    for layer, (class_logits, embeddings) in enumerate(layers):
        shared = (
            points[layer][0]
            if points
            else [torch.rand(cfg.num_points, 2, generator=g, device=g.device) for g in generators]
        )
        with torch.no_grad():
            costs += [
                matching_cost(c, logits(f, e, shape), t, p, cfg.weights) if len(t) else nothing
                for c, e, f, t, p in zip(class_logits, embeddings, features, targets, shared)
            ]
    assigned = iter(_moved(match(costs), mask_features.device))
    total = {"class": 0.0, "mask": 0.0, "dice": 0.0}
    for layer, (class_logits, embeddings) in enumerate(layers):
        matches = list(itertools.islice(assigned, len(targets)))
        label = class_loss(class_logits, targets, matches, cfg.no_object_weight)
        chosen = [
            logits(f, e[q], shape).float().contiguous()
            for f, e, (q, _) in zip(features, embeddings.unbind(), matches)
        ]  # B of (M_b, h, w)
        where = (
            points[layer][1]
            if points
            else torch.cat([uncertain_points(c, cfg, g) for c, g in zip(chosen, generators)])
        )
        chosen = torch.cat(chosen)  # (M, h, w)
        certainty = sample_certainty(targets, matches, where)
        mask, dice = mask_losses(chosen, sample_targets(targets, matches, where), where, certainty)
        total["class"] = total["class"] + cfg.weights.label * label / class_weight
        total["mask"] = total["mask"] + cfg.weights.mask * mask / num_masks
        total["dice"] = total["dice"] + cfg.weights.dice * dice / num_masks
    return total


def _moved(matches: list[tuple[Tensor, Tensor]], device) -> list[tuple[Tensor, Tensor]]:
    """Matches of all layers and images, to the device in one copy: each copy makes a GPU wait."""
    flat = [indices for pair in matches for indices in pair]
    if not flat:
        return []
    moved = torch.cat(flat).to(device).split([len(indices) for indices in flat])
    return list(zip(moved[::2], moved[1::2]))


def _normalisers(targets: list[Target], queries: int, cfg: LossConfig, device):
    """Of all ranks: the number of masks, at least 1, and the sum of the weights of all queries."""
    counts = [
        sum(map(len, targets)),
        sum(min(len(t), queries) for t in targets),
        len(targets) * queries,
    ]
    counts = torch.tensor(counts, dtype=torch.float32, device=device)
    num_masks, num_matched, num_queries = ranks.total(counts)
    class_weight = num_matched + cfg.no_object_weight * (num_queries - num_matched)
    return num_masks.clamp(min=1), class_weight


def logits(features: Tensor, embeddings: Tensor, shape) -> Tensor:
    """Mask logits (Q, h, w) of one image from (hw, C) and (Q, C); shape = (h, w).

    The queries of a pixel lie side by side in memory.
    """
    return (features.to(embeddings.dtype) @ embeddings.T).T.unflatten(1, shape)


def learn(
    head,
    features: list[Tensor],
    targets: list[Target],
    cfg: LossConfig,
    generators: list[torch.Generator],
    precision: torch.dtype,
    weight: float = 1.0,
) -> dict[str, Tensor]:
    """Forward pass of the head, set loss, backward pass; gradients are added to those there are.

    precision: of the head's matrix products.   Returns: the terms of the loss times weight, without
        gradient.
    """
    with torch.autocast(features[0].device.type, precision, enabled=precision != torch.float32):
        layers, mask_features = head(features)
    losses = {
        name: weight * term
        for name, term in set_loss(layers, mask_features, targets, cfg, generators).items()
    }
    sum(losses.values()).backward()
    return {name: term.detach() for name, term in losses.items()}


def point_generators(
    seed: int, step: int, first: int, images: int, device: torch.device
) -> list[torch.Generator]:
    """A generator for each image of a batch, from slot `first` on.

    Its points depend on (seed, step, slot) and on nothing else.
    """
    return [
        torch.Generator(device).manual_seed((seed * 1_000_003 + step) * 1024 + first + slot)
        for slot in range(images)
    ]


def class_loss(
    class_logits: Tensor, targets: list[Target], matches, no_object_weight: float
) -> Tensor:
    """Cross-entropy of all queries, a weighted sum. Scalar.

    Unmatched ones should say no-object (index K), with a lower weight.
    """
    num_classes = class_logits.shape[-1] - 1
    wanted = torch.full(
        class_logits.shape[:2], num_classes, dtype=torch.int64, device=class_logits.device
    )
    for row, target, (queries, segments) in zip(wanted, targets, matches):
        row[queries] = target.labels[segments]
    weight = torch.ones(num_classes + 1, device=class_logits.device)
    weight[-1] = no_object_weight
    return F.cross_entropy(class_logits.float().transpose(1, 2), wanted, weight, reduction="sum")


def mask_losses(
    mask_logits: Tensor, wanted: Tensor, points: Tensor, certainty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """BCE and dice of matched masks on their points, summed over masks. Two scalars.

    Args: mask_logits (M, h, w);  wanted (M, P) in [0, 1];  points (M, P, 2) xy in [0, 1];
        certainty (M, P): weights of the points in the BCE.
    """
    x = point_sample(mask_logits, points)  # (M, P)
    bce = F.binary_cross_entropy_with_logits(x, wanted, certainty, reduction="none").mean(1).sum()
    p = x.sigmoid()
    dice = (1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)).sum()
    return bce, dice


@torch.no_grad()
def uncertain_points(
    mask_logits: Tensor,
    cfg: LossConfig,
    generator: torch.Generator | None = None,
    candidates: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """(M, P, 2) points for (M, h, w) logits: the least certain candidates, some uniform ones.

    candidates (M, oversample * P, 2) and uniform (M, P - importance * P, 2) replace the draws when
    given.
    """
    m, device = len(mask_logits), mask_logits.device
    num_uncertain = int(cfg.importance * cfg.num_points)
    if candidates is None:
        candidates = torch.rand(
            m, int(cfg.num_points * cfg.oversample), 2, generator=generator, device=device
        )
    if uniform is None:
        uniform = torch.rand(
            m, cfg.num_points - num_uncertain, 2, generator=generator, device=device
        )
    if m == 0:
        return candidates[:, : cfg.num_points]
    chosen = []
    for logits, drawn in in_parts(2 * candidates.shape[1], mask_logits, candidates):
        certainty = point_sample(logits, drawn).abs()
        nearest = certainty.topk(
            num_uncertain, dim=1, largest=False, sorted=False
        ).indices  # closest to the decision
        chosen.append(drawn.gather(1, nearest[..., None].expand(-1, -1, 2)))
    return torch.cat([torch.cat(chosen), uniform], 1)


@torch.no_grad()
def sample_targets(targets: list[Target], matches, points: Tensor) -> Tensor:
    """(M, P) values of the matched segments of all images, in order, at points (M, P, 2)."""
    per_image = points.split([len(queries) for queries, _ in matches])
    return torch.cat([t.sample(p, s) for t, p, (_, s) in zip(targets, per_image, matches)])


@torch.no_grad()
def sample_certainty(targets: list[Target], matches, points: Tensor) -> Tensor | None:
    """(M, P) what these points count in the BCE, as `sample_targets`; None if no target says."""
    maps = [t.certainty for t in targets]
    if all(certainty is None for certainty in maps):
        return None
    per_image = points.split([len(queries) for queries, _ in matches])
    parts = [
        point_sample(certainty[s], p) for certainty, p, (_, s) in zip(maps, per_image, matches)
    ]
    return torch.cat(parts)
