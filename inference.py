"""From queries to an answer: panoptic, semantic and instance inference, and the readings of a
model.

A query is a class posterior and a mask. Panoptic inference lets queries compete for pixels
(arXiv:2107.06278, section 3.4); semantic inference adds their masks up, class by class. A reading
is a model with a posterior: the student's or the teacher's, the decoder alone (P_MT), CLIP alone
(P_CLIP) or their ensemble (P_ENS, Eq. 6).
Differs from the paper: nothing, unless --merging masks has the surest mask take its pixels first.
Axes: B images, Q queries, K classes, N segments, h w mask grid (stride 4), H W image.
Try, after the demo: `python dearli.py --stage eval --weights runs/mini-sup-16 --overlap-threshold 0
--out runs/try-overlap`: queries that others cover stay segments.
"""

from dataclasses import dataclass, replace
from typing import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from clip_ensemble import padded_size, resize
from config import Config

# Values of full-size masks at once: on a CPU they stay in the cache, on a GPU they are a small part
# of the memory.
CPU_CHUNK, GPU_CHUNK = 2**21, 2**27
# Values of full-size masks, 4 bytes each, that the readings of a model share for speed. Those of a
# larger image are made anew by every reading, a part at a time: they would fill the memory.
SHARED_MASKS = 2**27
KEPT = 0.5  # least share of its pixels that a mask keeps beside surer ones
TOP_INSTANCES = 100  # of an image, as COCO counts them
# The posteriors that readings take, in words.
POSTERIORS = {"decoder": "decoder alone", "ensemble": "with the ensemble", "clip": "CLIP alone"}
PSEUDO = "teacher/pseudo"  # the reading that is the pseudo-labels, of a method that makes any


@dataclass(frozen=True)
class Prediction:
    """What a reading says of an image of H x W pixels.

    segment_map: (H, W) int32, 0 = void, k = k-th segment;  labels: (N,) int64 classes;  scores:
    (N,) posterior of the class, or with --merging masks mask quality of things, 0 to 1;
    semantic: (H, W) int64, a class for every pixel;  sums: (K, H, W) float32, what that is the
    largest of (`class_sums`); None where nobody asked.
    masks: (N, H, W) bool, of instances, which may overlap: in falling order of their scores (class
    times mask quality), and the segment map shows them with the highest score on top; None: the
    segments are the map's.
    """

    segment_map: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    semantic: np.ndarray | None = None
    sums: np.ndarray | None = None
    masks: np.ndarray | None = None

    def mask(self, k: int) -> np.ndarray:
        """(H, W) bool, of instance k from 0, whichever way they are kept."""
        return self.segment_map == k + 1 if self.masks is None else self.masks[k]

    def sure(self, least: float) -> "Prediction":
        """What is drawn and counted: without instances of a lower score, and without those of whose
        pixels surer ones that stay hide more than half.
        """
        chosen = self.scores >= least
        if self.masks is None:
            pixels = np.bincount(self.segment_map.ravel(), minlength=len(self.labels) + 1)[1:]
            chosen = np.flatnonzero(chosen & (pixels > 0))
            lut = np.zeros(len(self.labels) + 1, self.segment_map.dtype)
            lut[chosen + 1] = np.arange(1, len(chosen) + 1)
            segment_map, masks = lut[self.segment_map], None
        else:
            chosen = np.flatnonzero(chosen & self.masks.any((1, 2)))
            kept, laid = lay_down(torch.from_numpy(self.masks[chosen]))
            chosen, segment_map = chosen[kept], laid.numpy()
            masks = self.masks[chosen]
        kept = {"labels": self.labels[chosen], "scores": self.scores[chosen], "masks": masks}
        return replace(self, segment_map=segment_map, **kept)


@torch.no_grad()
def predict(
    models: dict[str, nn.Module],
    alphas: dict[str, float],
    images: Tensor,
    sizes: list[tuple],
    things: Tensor,
    cfg: Config,
    semantic: bool = True,
    sums: bool = False,
) -> Iterator[tuple[int, str, Prediction]]:
    """What readings say of B images, one at a time: (index of the image, reading, prediction).

    Args:
        models: segmenters by name; those that share a backbone share its pass.   alphas: of each
            reading, "student/ensemble", whose first part names the model: the decoder's share in
            its posterior.
        images: (B, 3, S, S') uint8.    sizes: for each (its size in the batch, the size of the
            answer), (H, W) both.
        things: (K,) bool.    semantic: whether anybody wants the semantic map.    sums: the images
            are windows of larger ones, which want what that map is the largest of, and with
            --merging masks whole masks of things, though they overlap.
    """
    padded = padded_size(*images.shape[-2:])
    names = list(dict.fromkeys(reading.split("/")[0] for reading in alphas))
    features, mask_logits, posteriors = {}, {}, {}
    for name in names:
        model = models[name].eval()
        if id(model.backbone) not in features:
            features[id(model.backbone)] = model.backbone(images)
        maps = features[id(model.backbone)]
        class_logits, mask_logits[name] = model.predict(maps)
        for reading in _of(name, alphas):
            posteriors[reading] = model.posterior(
                maps, class_logits, mask_logits[name], alphas[reading]
            )
    del features
    for k, size in enumerate(sizes):
        for name in names:
            logits, all_sizes = mask_logits[name][k], (padded, *size)
            masks = shared_masks(logits, all_sizes)
            for reading in _of(name, alphas):
                p = posteriors[reading][k]
                *found, instances = _segments(p, logits, things, all_sizes, cfg, masks, sums)
                classes = semantic_inference(p, logits, all_sizes, masks) if semantic else None
                added = class_sums(p, logits, all_sizes, masks) if sums else None
                arrays = (*found, classes, added, instances)
                arrays = (None if x is None else x.cpu().numpy() for x in arrays)
                yield k, reading, Prediction(*arrays)
            del masks  # before those of the next model are made


def _segments(p: Tensor, mask_logits: Tensor, things, sizes, cfg: Config, masks, parts: bool):
    """segment_map, labels, scores and masks of a `Prediction`, as cfg wants them; semantic ones are
    panoptic here. masks: as in `panoptic_inference`;  parts: the image is a window of a larger one,
    in which what overlaps is settled with its neighbours.
    """
    if cfg.labels == "instances":
        instances, labels, scores = instance_inference(p, mask_logits, sizes, masks=masks)
        return paint(instances), labels, scores, instances
    if cfg.merging == "masks" and parts:
        instances, labels, scores = sure_things(p, mask_logits, things, sizes, cfg, masks)
        kept, _ = lay_down(instances)
        return paint(instances[kept]), labels[kept], scores[kept], instances[kept]
    return *segments(p, mask_logits, things, sizes, cfg, masks), None


def segments(
    posterior: Tensor, mask_logits: Tensor, things: Tensor, sizes, cfg: Config, masks=None
):
    """Panoptic inference as cfg.merging wants it: see `panoptic_inference` and `merge_masks`."""
    if cfg.merging == "masks":
        return merge_masks(posterior, mask_logits, things, sizes, cfg, masks)
    thresholds = cfg.object_mask_threshold, cfg.overlap_threshold
    return panoptic_inference(posterior, mask_logits, things, sizes, *thresholds, masks)


def papers_reading(teacher_posterior: str) -> str:
    """Which reading the paper reports for a method (Table 1). teacher_posterior: as in Config."""
    return "student/decoder" if teacher_posterior == "decoder" else "student/ensemble"


def _of(name: str, readings: Iterable[str]) -> list[str]:
    """The readings of a model."""
    return [reading for reading in readings if reading.split("/")[0] == name]


def shared_masks(mask_logits: Tensor, sizes) -> Tensor | None:
    """(Q, H, W) probabilities at the output size, or None if there are more than SHARED_MASKS.

    mask_logits: (Q, h, w);  sizes: as in `resize_masks`.
    """
    if len(mask_logits) * max(height * width for height, width in sizes) > SHARED_MASKS:
        return None
    return resize_masks(mask_logits, *sizes).sigmoid_()


@torch.no_grad()
def resize_masks(
    mask_logits: Tensor, padded: tuple[int, int], image: tuple[int, int], output: tuple[int, int]
) -> Tensor:
    """(Q, h, w) logits -> (Q, *output): up to the padded input, padding cut off, then to the output
    size.
    """
    full = resize(mask_logits[None].float(), padded)[..., : image[0], : image[1]]
    return (full if tuple(output) == tuple(image) else resize(full, output))[0]


def full_masks(mask_logits: Tensor, sizes, given: bool = False):
    """Masks at the output size, a few queries at a time, as (first query, (q, H, W) probabilities).

    All of them at once would fill the memory with large images.   given: they are masks already.
    """
    height, width = sizes[2]
    at_once = max(1, _chunk(mask_logits) // (height * width))
    for first in range(0, len(mask_logits), at_once):
        part = mask_logits[first : first + at_once]
        yield first, part if given else resize_masks(part, *sizes).sigmoid_()


@torch.no_grad()
def panoptic_inference(
    posterior: Tensor,
    mask_logits: Tensor,
    things: Tensor,
    sizes,
    object_mask_threshold: float = 0.0,
    overlap_threshold: float = 0.8,
    masks: Tensor | None = None,
    free: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries compete for pixels; those that keep most of their mask become segments.

    Args:
        posterior: (Q, K+1) probabilities.     mask_logits: (Q, h, w).     things: (K,) bool.
        sizes: (padded, image, output) as in `resize_masks`.
        masks: (Q, H, W) probabilities at the output size, if they are at hand already.
        free: (H, W) bool, pixels that are competed for, and that a mask's size is of; None: all.
    Returns: segment_map (H, W) int32, 0 = void, k = k-th segment; labels (N,) int64; scores (N,),
        the query's probability. Stuff of one class is one segment (with the score of its first
        query); things stay apart.
    """
    scores, labels = posterior.max(-1)
    keep = (labels != posterior.shape[-1] - 1) & (scores > object_mask_threshold)
    scores, labels = scores[keep], labels[keep]
    if len(labels) == 0:
        return torch.zeros(sizes[2], dtype=torch.int32, device=posterior.device), labels, scores
    candidates = mask_logits[keep] if masks is None else masks[keep]
    winner, solid, own = _competition(candidates, scores, sizes, masks is not None, free)
    there = winner.flatten() if free is None else winner[free]
    won = torch.bincount(there, minlength=len(labels))
    both = torch.bincount(winner[solid], minlength=len(labels))
    survives = (both > 0) & (own > 0) & ~(won / own < overlap_threshold)
    first, number = join_stuff(labels.tolist(), survives.tolist(), things)
    number = torch.tensor(number, dtype=torch.int32, device=winner.device)
    return number[winner] * solid, labels[first], scores[first]


def _competition(masks: Tensor, scores: Tensor, sizes, given: bool, free: Tensor | None = None):
    """The query with the largest score * mask at every pixel (the first one wins a tie).

    free: (H, W) bool, pixels that masks have; None: all. Returns: winner (H, W) int64;  solid
        (H, W) bool, whether the pixel is inside the winner's mask;  own (Q,) pixels of every mask.
    """
    own = []
    best, winner, solid = scores.new_full(sizes[2], -1.0), None, None
    for first, part in full_masks(masks, sizes, given):
        inside = part >= 0.5 if free is None else (part >= 0.5) & free
        own.append(inside.flatten(1).sum(1, dtype=torch.int32))
        value, index = (part * scores[first : first + len(part), None, None]).max(0)
        inside = inside.gather(0, index[None])[0]
        better = value > best
        best = torch.where(better, value, best)
        winner = index + first if winner is None else torch.where(better, index + first, winner)
        solid = inside if solid is None else torch.where(better, inside, solid)
    return winner, solid, torch.cat(own)


def join_stuff(labels: list[int], present: list[bool], things) -> tuple[list[int], list[int]]:
    """Candidates that are present become segments: each thing one of its own, all stuff of a class
    one together.

    Args: labels: classes of n candidates.   present: n flags.   things: (K,) bool.
    Returns: first: the first candidate of each segment;  number: for each candidate its segment,
        from 1; 0 = none.
    """
    first, number, stuff = [], [], {}
    for k, label in enumerate(labels):
        if not present[k]:
            number.append(0)
        elif label in stuff:
            number.append(stuff[label])
        else:
            first.append(k)
            number.append(len(first))
            if not things[label]:
                stuff[label] = len(first)
    return first, number


@torch.no_grad()
def merge_masks(
    posterior: Tensor,
    mask_logits: Tensor,
    things: Tensor,
    sizes,
    cfg: Config,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of things are laid down, the surest first; stuff is what is seen between them.

    Where queries compete for single pixels, two that see one object cover each other, and neither
    keeps enough of its mask to stay: the object is lost, the more often the more alike objects are
    near each other. Here the second one goes.

    Args: as of `panoptic_inference`; cfg: `object_mask_threshold`, `least_quality`.
    Returns: as there; scores of things: mask quality. A thing is left out that keeps less than KEPT
        of its pixels. For the rest, queries of stuff compete.
    Source: the heuristic of arXiv:1901.02446, section 3, by Mask2Former's quality of masks.
    """
    instances, labels, scores = sure_things(posterior, mask_logits, things, sizes, cfg, masks)
    kept, segment_map = lay_down(instances)
    free = segment_map == 0
    of_stuff = _among(~things, posterior.max(-1).indices)
    thresholds = cfg.object_mask_threshold, cfg.overlap_threshold
    full = None if masks is None else masks[of_stuff]
    given = posterior[of_stuff], mask_logits[of_stuff], things, sizes, *thresholds, full, free
    stuff, classes, chances = panoptic_inference(*given)
    segment_map += torch.where(stuff > 0, stuff + len(kept), 0)
    return segment_map, torch.cat([labels[kept], classes]), torch.cat([scores[kept], chances])


def lay_down(masks: Tensor) -> tuple[list[int], Tensor]:
    """Masks (N, H, W) bool, the surest first, each on the pixels that are free.

    Returns: kept: indices of those that keep at least KEPT of their pixels;  segment_map (H, W)
        int32, 0 = free, k = the k-th of these.
    """
    kept, segment_map = [], torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)
    for k, mask in enumerate(masks):
        free = mask & (segment_map == 0)
        if free.sum() >= KEPT * mask.sum():
            kept.append(k)
            segment_map[free] = len(kept)
    return kept, segment_map


def _among(wanted: Tensor, labels: Tensor) -> Tensor:
    """Which labels are of the wanted classes (K,), where the labels are; no-object is not."""
    return torch.cat([wanted, wanted.new_zeros(1)]).to(labels.device)[labels]


@torch.no_grad()
def sure_things(
    posterior: Tensor,
    mask_logits: Tensor,
    things: Tensor,
    sizes,
    cfg: Config,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (N, H, W) bool of the queries that are things, which may overlap; labels (N,) int64;
    scores (N,), their `mask_quality` at the output size, falling. None has less than
    cfg.least_quality, or a class below cfg.object_mask_threshold.
    """
    chances, labels = posterior.max(-1)
    sure = (chances > cfg.object_mask_threshold) & _among(things, labels)
    labels = labels[sure]
    candidates = mask_logits[sure] if masks is None else masks[sure]
    inside = [labels.new_zeros(0, *sizes[2], dtype=torch.bool)]
    scores, kept = [posterior.new_zeros(0, dtype=torch.float32)], [labels.new_zeros(0)]
    for first, part in full_masks(candidates, sizes, masks is not None):
        quality = _quality(part)
        good = ((quality > 0) & (quality >= cfg.least_quality)).nonzero()[:, 0]
        inside.append(part[good] > 0.5)
        scores.append(quality[good])
        kept.append(good + first)
    scores, order = torch.cat(scores).sort(descending=True, stable=True)
    return torch.cat(inside)[order], labels[torch.cat(kept)[order]], scores


@torch.no_grad()
def mask_quality(mask_logits: Tensor) -> Tensor:
    """How sure a mask is of its pixels: the mean of the sigmoid where that is above 0.5; 0 where it
    nowhere is. (..., H, W) -> (...).
    """
    return _quality(mask_logits.float().sigmoid())


def _quality(masks: Tensor) -> Tensor:
    """`mask_quality` of probabilities."""
    inside = masks > 0.5
    area = inside.sum((-2, -1))
    return (masks * inside).sum((-2, -1)) / area.clamp(min=1)


@torch.no_grad()
def instance_inference(
    posterior: Tensor,
    mask_logits: Tensor,
    sizes,
    top: int = TOP_INSTANCES,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The surest pairs of a query and a class are instances: a query may be several, of different
    classes, and masks may overlap.

    Args:
        posterior: (Q, K+1) probabilities.     mask_logits: (Q, h, w).
        sizes: (padded, image, output) as in `resize_masks`.
        top: of the Q x K pairs those with the largest probabilities.
        masks: (Q, H, W) probabilities at the output size, if they are at hand already.
    Returns: masks (N, H, W) bool; labels (N,) int64; scores (N,), probability of the class times
        `mask_quality` at the output size, falling. A mask without a pixel is none.
    Source: Mask2Former (arXiv:2112.01527).
    """
    classes = posterior.shape[-1] - 1
    chances, pairs = posterior[:, :-1].flatten().sort(descending=True, stable=True)
    chances, pairs = chances[:top], pairs[:top]
    queries, rows = (pairs // max(classes, 1)).unique(return_inverse=True)
    candidates = mask_logits[queries] if masks is None else masks[queries]
    inside, quality = [], [chances.new_zeros(0)]
    for _, part in full_masks(candidates, sizes, masks is not None):
        inside.append(part > 0.5)
        quality.append(_quality(part))
    inside = torch.cat(inside) if inside else chances.new_zeros(0, *sizes[2], dtype=torch.bool)
    scores = chances * torch.cat(quality)[rows]
    scores, order = scores.sort(descending=True, stable=True)
    order = order[inside.flatten(1).any(1)[rows][order]]
    return inside[rows[order]], pairs[order] % max(classes, 1), scores[: len(order)]


def paint(masks: Tensor) -> Tensor:
    """(N, H, W) bool, the uppermost first -> (H, W) int32, 0 = none, k = the k-th mask."""
    painted = torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)
    for k in range(len(masks), 0, -1):
        painted[masks[k - 1]] = k
    return painted


@torch.no_grad()
def class_sums(
    posterior: Tensor, mask_logits: Tensor, sizes, masks: Tensor | None = None
) -> Tensor:
    """(K, H, W): for every class the sum over queries of probability * sigmoid(mask)."""
    masks = resize_masks(mask_logits, *sizes).sigmoid_() if masks is None else masks
    return torch.einsum("qk,qhw->khw", posterior[:, :-1], masks)


@torch.no_grad()
def semantic_inference(
    posterior: Tensor, mask_logits: Tensor, sizes, masks: Tensor | None = None
) -> Tensor:
    """(H, W) int64: the class with the largest sum over queries of probability * sigmoid(mask);
    never void.

    Without masks at hand, they are made a few rows at a time: all of them at once would fill the
    memory with large images.
    """
    if masks is not None:
        return class_sums(posterior, mask_logits, sizes, masks).max(0).indices
    padded, image, (height, width) = sizes
    whole, strips = resize_masks(mask_logits, padded, image, image), []  # (Q, *image)
    rows_of = torch.arange(height, device=whole.device)
    centres = ((rows_of + 0.5) * image[0] / height - 0.5).clamp(0, image[0] - 1)
    above, share = centres.long(), centres.frac()[:, None]
    below = (above + 1).clamp(max=image[0] - 1)
    for rows in rows_of.split(max(1, _chunk(whole) // (len(whole) * width))):
        part = whole[:, above[rows]].lerp(whole[:, below[rows]], share[rows])
        part = resize(part[None], (len(rows), width))[0].sigmoid_()
        strips.append(torch.einsum("qk,qhw->khw", posterior[:, :-1], part).max(0).indices)
    return torch.cat(strips)


def _chunk(x: Tensor) -> int:
    """Values of full-size masks at once, where x is."""
    return CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK
