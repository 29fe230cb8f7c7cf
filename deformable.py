"""Multi-scale deformable attention: each pixel reads a few learned positions on every level.

What Mask2Former's pixel decoder is made of. `grid_samples` is the definition, and what a GPU runs;
on a CPU the same sum is a product with a sparse matrix (`deformable_cpu.py`). Neither keeps the
samples, the largest tensors of the whole model, for the backward pass.
Differs from the paper: nothing.
Axes: B images, S pixels of all levels, H heads, d channels a head, L levels, P points.
Source: Deformable DETR (arXiv:2010.04159), Eq. (3).
Try: `python dearli.py --stage sup --steps 250 --encoder-points 1 --out runs/try-points-a-head`
reads one position a level instead of four.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deformable_cpu


class DeformableAttention(nn.Module):
    """Attention of each pixel to L P positions a head, Eq. (3) of the source."""

    def __init__(self, channels: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        # head i looks in direction i, point j at j + 1 pixels
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1).view(1, 1, points, 1)
        offsets = (direction.view(heads, 1, 1, 2) * steps).expand(-1, levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.reshape(-1))
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, src: Tensor, pyramid: "Pyramid") -> Tensor:
        """query, src (B, S, C) -> (B, S, C). Positions and samples are always fp32."""
        b, s, c = src.shape
        value = self.value_proj(src).float().view(b, s, self.heads, c // self.heads)
        offsets = self.sampling_offsets(query).float()  # in pixels of each level
        offsets = offsets.view(b, s, self.heads, self.levels, self.points, 2)
        positions = offsets.movedim(-1, 1).contiguous() + pyramid.centres
        scores = self.attention_weights(query).float().view(-1, self.levels * self.points)
        # along a short last axis a softmax takes 5 times as long on a CPU
        weights = scores.T.contiguous().softmax(0).T.reshape(offsets.shape[:-1])
        return self.output_proj(weighted_samples(value, positions, weights, pyramid).flatten(2))


@dataclass
class Pyramid:
    """Where the pixels of L maps lie, in the order in which S counts them; the same in all layers.

    shapes: L of (h, w), pixels, coarsest first.
    centres: (2, S, H, L, P) float32, x then y: a pixel's centre on each level, in pixels of that
        level (the first one's centre is 0). Written out for every sample: adding to short axes that
        repeat takes longer.
    """

    shapes: list[tuple[int, int]]
    centres: Tensor

    @staticmethod
    def of(shapes: list[tuple[int, int]], heads: int, points: int, device) -> "Pyramid":
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=device)
        centres = torch.cat([pixel_centres(h, w, device) for h, w in shapes])
        centres = centres.T[:, :, None, None, None] * sizes.T[:, None, None, :, None] - 0.5
        return Pyramid(shapes, centres.expand(-1, -1, heads, -1, points).contiguous())

    @functools.cached_property
    def table(self) -> deformable_cpu.Table:
        return deformable_cpu.Table.of(self.shapes, self.centres.shape[1:])


def weighted_samples(value: Tensor, positions: Tensor, weights: Tensor, pyramid: Pyramid) -> Tensor:
    """The sum over levels and points of weight times bilinear sample; outside a map counts 0.

    Args: value (B, S, H, d);  positions (B, 2, S, H, L, P), x then y, in pixels of each level;
        weights (B, S, H, L, P).
    Returns: (B, S, H, d).
    """
    traced = torch.compiler.is_compiling()  # a graph for others takes the definition
    if value.device.type == "cpu" and not traced and pyramid.table.fits:
        return deformable_cpu.SparseSamples.apply(value, positions, weights, pyramid.table)
    return grid_samples(value, positions, weights, pyramid.shapes)


def grid_samples(value: Tensor, positions: Tensor, weights: Tensor, shapes) -> Tensor:
    """`weighted_samples` by torch's grid sampling. The backward pass makes the samples again."""
    total = 0.0
    for level, maps in enumerate(value.split([h * w for h, w in shapes], 1)):
        args = maps.unflatten(1, shapes[level]), positions[..., level, :], weights[..., level, :]
        total = total + checkpoint(
            level_samples, *args, use_reentrant=False, preserve_rng_state=False
        )
    return total


def level_samples(value: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """value (B, h, w, H, d), positions (B, 2, S, H, P), weights (B, S, H, P) -> (B, S, H, d)."""
    b, h, w, heads, d = value.shape
    x, y = positions.unbind(1)
    grid = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], -1)  # the map's sides: -1 and 1
    maps = value.permute(0, 3, 4, 1, 2).flatten(0, 1)  # (B H, d, h, w)
    samples = F.grid_sample(maps, grid.transpose(1, 2).flatten(0, 1), align_corners=False)
    mixed = (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)  # (B H, d, S)
    return mixed.view(b, heads, d, -1).permute(0, 3, 1, 2)


def pixel_centres(h: int, w: int, device) -> Tensor:
    """(h w, 2) xy in [0, 1]."""
    y, x = (torch.arange(h, device=device) + 0.5) / h, (torch.arange(w, device=device) + 0.5) / w
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1)
