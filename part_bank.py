"""Parts of objects: a bank of prototypes and queues that ESL's contrast compares pixels with.

Axes: C classes, K parts a class, N pixels of several images, A anchors, L channels of the
projection, L' of the encoder.
Source: Enhanced Soft Label for Semi-Supervised Semantic Segmentation (ICCV 2023).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ground import ranks

KMEANS_ROUNDS = 20  # of Lloyd's algorithm, at most: the parts move on with the training


class PartBank(nn.Module):
    """C x K parts of objects: a prototype each, by which pixels find their part, and a queue each
    of the part's features in past images, oldest out first. All of it is state, and in checkpoints.

    dim_encoder: L', of the prototypes.   dim: L, of the queues.   size: entries of a queue.
    theta: momentum of the prototypes, a step.
    """

    class_rows = "prototypes", "queues", "pushed"

    def __init__(
        self,
        classes: int,
        parts: int,
        dim_encoder: int,
        dim: int,
        size: int,
        theta: float = 0.99,
    ):
        super().__init__()
        self.classes, self.parts, self.size, self.theta = classes, parts, size, theta
        self.register_buffer("prototypes", torch.zeros(classes, parts, dim_encoder))
        self.register_buffer("queues", torch.zeros(classes, parts, size, dim))
        self.register_buffer("pushed", torch.zeros(classes, parts, dtype=torch.int64))  # ever
        self.register_buffer("ready", torch.tensor(0))  # 1: the prototypes have been initialised

    @property
    def filled(self) -> Tensor:
        """(C, K) entries of each queue: its first places."""
        return self.pushed.clamp(max=self.size)

    def entries(self) -> Tensor:
        """(E, L) what is in all queues, in the order of classes and parts."""
        places = torch.arange(self.size, device=self.pushed.device)
        return self.queues[places < self.filled[..., None]]

    @torch.no_grad()
    def part_of(self, features: Tensor, classes: Tensor) -> Tensor:
        """(N,) the part of each pixel: the prototype of its class with the largest cosine, the
        first of equal ones; one that is 0, which no pixel has made, has none.

        features: (N, L') of the encoder.   classes: (N,) int64 in [0, C).
        """
        prototypes = F.normalize(self.prototypes, dim=-1).flatten(0, 1)  # (C K, L')
        cosines = F.normalize(features.float(), dim=-1) @ prototypes.T
        cosines = cosines.masked_fill(~prototypes.any(1), -2.0)
        own = classes[:, None] * self.parts + torch.arange(self.parts, device=classes.device)
        return cosines.gather(1, own).argmax(1)

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        projections: Tensor,
        classes: Tensor,
        parts: Tensor,
        images: Tensor,
        pixels: Tensor | None = None,
    ) -> None:
        """Take in the pixels of a batch: a mean projection for each image and part goes into the
        queues, in the order of images; the prototypes of the parts that occur move towards their
        mean feature in the batch.

        features: (N, L') of the encoder.   projections: (N, L).   classes, parts: (N,).
        images: (N,) int64, the slot of its image in the batch of all ranks, whose pixels are
        joined. Ranks keep equal banks.   pixels: (N,) how many each row is the mean of; None: one.
        """
        cells = self.classes * self.parts
        pixels = torch.ones_like(classes) if pixels is None else pixels
        found = pooled(images * cells + classes * self.parts + parts, pixels, features, projections)
        if ranks.count() > 1:
            there = zip(*ranks.gather([x.cpu() for x in found]))
            found = [torch.cat(x).to(classes.device) for x in there]
            order = found[0].argsort()
            found = [x[order] for x in found]
        key, count, features, projections = found
        self._push(key % cells, projections)
        cell, _, target = pooled(key % cells, count, features)
        flat = self.prototypes.flatten(0, 1)
        flat[cell] = self.theta * flat[cell] + (1 - self.theta) * target

    def _push(self, cell: Tensor, means: Tensor) -> None:
        """cell: (G,) class * K + part, several of one allowed.   means: (G, L), oldest first."""
        before = (cell == cell[:, None]).tril(-1).sum(1)  # of the same cell in this batch
        total = cell.bincount(minlength=self.pushed.numel())
        place = (self.pushed.flatten()[cell] + before) % self.size
        stays = before >= total[cell] - self.size  # the others would be overwritten at once
        self.queues.flatten(0, 1)[cell[stays], place[stays]] = means[stays]
        self.pushed += total.view_as(self.pushed)

    def sample(
        self, classes: Tensor, parts: Tensor, negatives: int, draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """For each anchor one entry of its own queue and some of all the others, with replacement.

        classes, parts: (A,).   draws: (A, 1 + negatives) uniform in [0, 1); None: from torch's
        generator.
        Returns: (A,) and (A, negatives), places in `entries()`; -1 where there is nothing.
        """
        filled = self.filled.flatten()
        cell = classes * self.parts + parts
        own, first = filled[cell], (filled.cumsum(0) - filled)[cell]
        others = filled.sum() - own
        if draws is None:
            draws = torch.rand(len(cell), 1 + negatives, device=cell.device)
        positive = _drawn(draws[:, 0], own) + first
        negative = _drawn(draws[:, 1:], others[:, None])
        negative += (negative >= first[:, None]) * own[:, None]  # past the own queue
        nothing = own.new_tensor(-1)
        positive = torch.where(own > 0, positive, nothing)
        return positive, torch.where(others[:, None] > 0, negative, nothing)


def pooled(key: Tensor, weight: Tensor, *values: Tensor) -> list[Tensor]:
    """Rows of one key together: keys (G,), in order; sums of weights (G,); weighted means of each
    of the values (N, D), (G, D).
    """
    keys, group = key.unique(return_inverse=True)
    # Matrix products and not index_add: the same on every call on a GPU, too.
    members = (group == torch.arange(len(keys), device=key.device)[:, None]) * weight.float()
    count = members.sum(1)
    return [keys, count, *((members / count[:, None]) @ x.float() for x in values)]


def _drawn(draws: Tensor, count: Tensor) -> Tensor:
    """Draws in [0, 1) -> integers in [0, count); 0 of nothing."""
    return (draws * count).long().minimum(count - 1).clamp(min=0)


@torch.no_grad()
def kmeans(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Centres (clusters, L) of points (N, L), by Lloyd's algorithm from seeds far from each other.

    Fewer distinct points than clusters: the rest are 0.
    generator: on the CPU.   Source: k-means++ (Arthur and Vassilvitskii, 2007).
    """
    centres = points.new_zeros(clusters, points.shape[1])
    distance, found = points.new_ones(len(points)), 0
    while found < clusters and distance.sum() > 0:
        chances = distance.double().cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64).to(chances.device)
        place = torch.searchsorted(chances, draw * chances[-1], right=True).clamp(
            max=len(points) - 1
        )
        centre = points[place]  # (1, L)
        nearer = (points - centre).square().sum(1)
        distance = nearer if found == 0 else distance.minimum(nearer)
        centres[found] = centre[0]
        found += 1
    for _ in range(KMEANS_ROUNDS if found else 0):
        nearest = torch.cdist(points, centres[:found]).argmin(1)
        members = (nearest == torch.arange(found, device=points.device)[:, None]).float()
        count = members.sum(1, keepdim=True)
        moved = torch.where(count > 0, members @ points / count.clamp(min=1), centres[:found])
        if torch.equal(moved, centres[:found]):
            break
        centres[:found] = moved
    return centres
