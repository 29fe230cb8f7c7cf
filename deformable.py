"""Multi-scale deformable attention: each pixel reads a few learned positions on every level, mixed by learned weights.

What Mask2Former's pixel decoder is made of. A sample between pixels mixes its four neighbours, so a pixel's answer is a weighted sum of
4 L P vectors of the maps. On a GPU torch's grid sampling reads them; on a CPU, which that makes fetch one number at a time, the sum is a
product with a sparse matrix, which reads whole vectors. Neither keeps the samples, the largest tensors of the whole model, for the backward pass.
Differs from the paper: nothing.    Axes: B images, S pixels of all levels, H heads, d channels a head, L levels, P points.
Source: Deformable DETR (arXiv:2010.04159), Eq. (3).
Try: `python dearli.py --stage sup --steps 250 --encoder-points 1 --out runs/try-points-a-head` reads one position a level instead of four.
"""

import math
import warnings
from dataclasses import dataclass

import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from matcher import in_parts

with warnings.catch_warnings():  # that such matrices are "in beta", said once a process
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))

BORDER = 2  # pixels of zeros around a map in a table of its values: a sample that lies outside mixes four of them


@dataclass
class Pyramid:
    """Where the pixels of L maps of (h, w) pixels lie, coarsest first, in the order in which S counts them; the same in all layers.

    centres, size: (2, S, H, L, P) float32, x then y: a pixel's centre on each level, in pixels of that level (the first one's centre is 0); pixels a side.
    first, below: (S, H, L, P), in rows of the table that `bordered` makes: the level's first pixel; from a pixel to the one below it.
    Written out for every sample: short axes that repeat would cost more than the numbers.
    """

    shapes: list[tuple[int, int]]
    centres: Tensor
    size: Tensor
    first: Tensor
    below: Tensor

    @property
    def rows(self) -> int:
        """Of the table, for each image."""
        return self.first.shape[1] * sum(
            (h + 2 * BORDER) * (w + 2 * BORDER) for h, w in self.shapes
        )

    def inside(self, table: Tensor) -> list[Tensor]:
        """The levels in a table (b, N, H, d), without their borders: views (b, h, w, H, d)."""
        sides = [(h + 2 * BORDER, w + 2 * BORDER) for h, w in self.shapes]
        parts = table.split([h * w for h, w in sides], 1)
        return [
            part.unflatten(1, side)[:, BORDER:-BORDER, BORDER:-BORDER]
            for part, side in zip(parts, sides)
        ]

    @staticmethod
    def of(shapes: list[tuple[int, int]], heads: int, points: int, device) -> "Pyramid":
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=device).T[
            :, None, None, :, None
        ]  # (2, 1, 1, L, 1)
        centre = torch.cat([pixel_centres(h, w, device) for h, w in shapes]).T[
            :, :, None, None, None
        ]  # (2, S, 1, 1, 1)
        full = (centre.shape[1], heads, len(shapes), points)
        written = lambda t: t.expand(*t.shape[:-4], *full).contiguous()
        width, height = sizes + 2 * BORDER
        start = (width * height).cumsum(2) - width * height + BORDER * (width + 1)
        head = torch.arange(heads, device=device)[:, None, None]
        return Pyramid(
            shapes,
            written(centre * sizes - 0.5),
            written(sizes),
            written(heads * start + head),
            written(heads * width),
        )


class DeformableAttention(nn.Module):
    """Attention of each pixel to L P positions a head, Eq. (3) of the source."""

    def __init__(self, channels: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj, self.output_proj = (
            nn.Linear(channels, channels),
            nn.Linear(channels, channels),
        )
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(heads) * (
            2 * math.pi / heads
        )  # head i looks in direction i, point j at j + 1 pixels
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1).view(1, 1, points, 1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(
                (direction.view(heads, 1, 1, 2) * steps).expand(-1, levels, -1, -1).reshape(-1)
            )
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, src: Tensor, pyramid: Pyramid) -> Tensor:
        """query, src (B, S, C) -> (B, S, C). Positions and samples are always fp32."""
        b, s, c = src.shape
        value = self.value_proj(src).float().view(b, s, self.heads, c // self.heads)
        offsets = (
            self.sampling_offsets(query).float().view(b, s, self.heads, self.levels, self.points, 2)
        )  # in pixels of each level
        positions = offsets.movedim(-1, 1).contiguous() + pyramid.centres
        scores = self.attention_weights(query).float().view(-1, self.levels * self.points)
        weights = (
            scores.T.contiguous().softmax(0).T.reshape(offsets.shape[:-1])
        )  # along a short last axis it takes 5 times as long on a CPU
        return self.output_proj(weighted_samples(value, positions, weights, pyramid).flatten(2))


def weighted_samples(value: Tensor, positions: Tensor, weights: Tensor, pyramid: Pyramid) -> Tensor:
    """The sum over levels and points of weight times bilinear sample; outside a map counts 0.

    Args: value (B, S, H, d);  positions (B, 2, S, H, L, P), x then y, in pixels of each level;  weights (B, S, H, L, P).    Returns: (B, S, H, d).
    """
    # a row of the matrix has no more entries than columns, and float32 counts the rows of the table exactly
    if value.device.type == "cpu" and 4 * weights[0, 0, 0].numel() <= pyramid.rows <= 2**24:
        return SparseSamples.apply(value, positions, weights, pyramid)
    out, first = 0.0, 0
    for level, (h, w) in enumerate(pyramid.shapes):
        part = value[:, first : first + h * w].unflatten(1, (h, w))
        out = out + checkpoint(
            grid_samples,
            part,
            positions[:, :, :, :, level],
            weights[:, :, :, level],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        first += h * w
    return out


def grid_samples(value: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """The same on one level, by torch's grid sampling: value (B, h, w, H, d), positions (B, 2, S, H, P), weights (B, S, H, P) -> (B, S, H, d)."""
    b, h, w, heads, d = value.shape
    x, y = positions.unbind(1)
    grid = torch.stack(
        [(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], -1
    )  # sides of the map at -1 and 1
    samples = F.grid_sample(
        value.permute(0, 3, 4, 1, 2).flatten(0, 1),
        grid.transpose(1, 2).flatten(0, 1),
        align_corners=False,
    )
    mixed = (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)  # (B H, d, S)
    return mixed.view(b, heads, d, -1).permute(0, 3, 1, 2)


class SparseSamples(torch.autograd.Function):
    """The same on all levels, as a product of a sparse matrix with the table of all values: S H rows with 4 L P entries, for each image.

    Both passes make it, a few images at a time; only rows and shares of its entries are kept between them.
    """

    @staticmethod
    def forward(ctx, value: Tensor, positions: Tensor, weights: Tensor, pyramid: Pyramid) -> Tensor:
        out, kept = [], []
        for v, p, w in in_parts(positions[0].numel(), value, positions, weights):
            table = bordered(v, pyramid)
            rows, shares = neighbours(p, w, pyramid)
            kept += rows, shares
            out.append(
                F.embedding_bag(
                    rows, table.flatten(0, 2), per_sample_weights=shares, mode="sum"
                ).view_as(v)
            )
        ctx.pyramid = pyramid
        ctx.save_for_backward(
            value, positions, weights, *kept
        )  # so that each layer's are forgotten once it has gone backward
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        value, positions, weights, *kept = ctx.saved_tensors
        parts = []
        for (v, p, w, g), (rows, shares) in zip(
            in_parts(positions[0].numel(), value, positions, weights, grad),
            zip(kept[::2], kept[1::2]),
        ):
            table = bordered(v, ctx.pyramid)
            shape, table, g = table.shape, table.flatten(0, 2), g.flatten(0, 2).contiguous()
            entries, starts = (
                shares.flatten(),
                torch.arange(len(g) + 1, dtype=torch.int32) * shares.shape[1],
            )
            matrix = torch.sparse_csr_tensor(
                starts, rows.flatten(), entries, (len(g), len(table)), check_invariants=False
            )
            of_shares = (
                torch.sparse.sampled_addmm(matrix, g, table.T, beta=0)
                .values()
                .view(*w.shape[:3], 4, *w.shape[3:])
            )  # of the entries that there are
            transposed = scipy.sparse.csr_array(
                (entries.numpy(), rows.flatten().numpy(), starts.numpy()), (len(g), len(table))
            ).T
            of_table = torch.from_numpy(transposed @ g.numpy()).view(shape)
            # slopes of a sample: to the right the difference of its right and left pixels, mixed by height, and likewise downwards
            right, lower = (p - p.floor()).unbind(1)
            upper_left, upper_right, lower_left, lower_right = of_shares.movedim(3, 0).contiguous()
            above, below = upper_left.lerp(upper_right, right), lower_left.lerp(lower_right, right)
            slopes = torch.stack(
                [(upper_right - upper_left).lerp(lower_right - lower_left, lower), below - above], 1
            ).mul_(w[:, None])
            parts.append(
                (
                    torch.cat([level.flatten(1, 2) for level in ctx.pyramid.inside(of_table)], 1),
                    slopes,
                    above.lerp_(below, lower),
                )
            )
        return *map(torch.cat, zip(*parts)), None


def bordered(value: Tensor, pyramid: Pyramid) -> Tensor:
    """Maps (b, S, H, d) with zeros around each level: a table (b, N, H, d)."""
    b, _, heads, d = value.shape
    table = value.new_zeros(b, pyramid.rows // heads, heads, d)
    for level, part, shape in zip(
        pyramid.inside(table), value.split([h * w for h, w in pyramid.shapes], 1), pyramid.shapes
    ):
        level.copy_(part.unflatten(1, shape))
    return table


def neighbours(positions: Tensor, weights: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """The 4 L P pixels that a pixel's samples mix: rows of the table of all b images, int32, and their shares, both (b S H, 4 L P).

    What lies outside is looked for on the border, where all four values are 0, and so are all slopes.
    """
    low = (
        positions.nan_to_num().floor_()
    )  # a diverged model's answer is NaN, by its shares; its rows must still be rows
    low = torch.clamp(low, low.new_tensor(-float(BORDER)), pyramid.size)
    above = positions - low
    image = torch.arange(len(positions), dtype=torch.int32).view(-1, 1, 1, 1, 1) * pyramid.rows
    corner = (
        torch.addcmul(pyramid.first, low[:, 1], pyramid.below)
        .add_(low[:, 0], alpha=weights.shape[2])
        .int()
        .add_(image)
    )
    under = corner + pyramid.below.int()
    right, lower = above.unbind(1)
    left, upper, lower = 1 - right, weights * (1 - lower), weights * lower
    corners = corner, corner + weights.shape[2], under, under + weights.shape[2]
    shares = upper * left, upper * right, lower * left, lower * right
    return tuple(
        torch.stack([t.flatten(3) for t in four], 3).flatten(3).flatten(0, 2)
        for four in (corners, shares)
    )


def pixel_centres(h: int, w: int, device) -> Tensor:
    """(h w, 2) xy in [0, 1]."""
    y, x = (torch.arange(h, device=device) + 0.5) / h, (torch.arange(w, device=device) + 0.5) / w
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1)
