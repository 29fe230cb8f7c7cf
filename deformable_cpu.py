"""The samples of deformable attention on a CPU: a sparse matrix times the values of the pixels.

torch's grid sampling fetches one number at a time there. A sample mixes its four neighbours, so
what a pixel reads in a head is a weighted sum of 4 L P rows of a table, which holds the d values of
each pixel and head side by side.
With `grid_samples` in its place a training step took longer: this one needs 0.69 of that time on
the miniature world, 0.88 with a ConvNeXt-B at 256 x 256 (medians, one thread of a shared CPU).
Differs from `deformable.grid_samples`: nothing but rounding, and where a sample lies exactly on a
pixel its slope is that to the right and downwards.
Axes: as there; rows of a table: B N H, the N pixels of all levels with borders.
"""

import warnings
from dataclasses import dataclass

import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

with warnings.catch_warnings():  # that such matrices are "in beta", said once a process
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))

BORDER = 2  # pixels of zeros around a map: a sample that lies outside mixes four of them


@dataclass
class Table:
    """Where the pixels of L maps lie in a table of their values, each map with a border of zeros.

    size: (2, S, H, L, P) float32, x then y, pixels a side of each level.
    first, below: (S, H, L, P) float32, in rows: the level's first pixel; from a pixel to the one
        below it.
    They are written out for every sample: adding to short axes that repeat takes longer.
    """

    shapes: list[tuple[int, int]]
    size: Tensor
    first: Tensor
    below: Tensor

    @staticmethod
    def of(shapes: list[tuple[int, int]], samples: torch.Size) -> "Table":
        """samples: (S, H, L, P)."""
        heads = samples[1]
        size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32).T[..., None]
        width, height = size + 2 * BORDER  # (L, 1)
        start = (width * height).cumsum(0) - width * height + BORDER * (width + 1)
        first = heads * start + torch.arange(heads)[:, None, None]  # (H, L, 1)
        written = (
            t.expand(*t.shape[:-4], *samples).contiguous()
            for t in (size[:, None, None], first[None], (heads * width)[None, None])
        )
        return Table(shapes, *written)

    @property
    def bordered(self) -> list[tuple[int, int]]:
        return [(h + 2 * BORDER, w + 2 * BORDER) for h, w in self.shapes]

    @property
    def rows(self) -> int:
        """Of the table, for each image."""
        return self.first.shape[1] * sum(h * w for h, w in self.bordered)

    @property
    def fits(self) -> bool:
        """A row of the matrix has no more entries than columns; float32 counts them exactly."""
        return 4 * self.first[0, 0].numel() <= self.rows <= 2**24

    def inside(self, padded: Tensor) -> list[Tensor]:
        """The levels in a table (B, N, H, d), without their borders: views (B, h, w, H, d)."""
        levels = padded.split([h * w for h, w in self.bordered], 1)
        return [
            level.unflatten(1, shape)[:, BORDER:-BORDER, BORDER:-BORDER]
            for level, shape in zip(levels, self.bordered)
        ]

    def filled(self, value: Tensor) -> Tensor:
        """The table (B, N, H, d) of maps (B, S, H, d)."""
        b, _, heads, d = value.shape
        padded = value.new_zeros(b, self.rows // heads, heads, d)
        maps = value.split([h * w for h, w in self.shapes], 1)
        for level, part, shape in zip(self.inside(padded), maps, self.shapes):
            level.copy_(part.unflatten(1, shape))
        return padded


class SparseSamples(torch.autograd.Function):
    """`deformable.weighted_samples`: S H rows with 4 L P entries, for each image.

    Only the rows and shares of the entries are kept between the passes.
    """

    @staticmethod
    def forward(ctx, value: Tensor, positions: Tensor, weights: Tensor, table: Table) -> Tensor:
        rows, shares = neighbours(positions, weights, table)
        ctx.table = table
        # by torch, so that each layer's are forgotten once it has gone backward
        ctx.save_for_backward(value, positions, weights, rows, shares)
        values = table.filled(value).flatten(0, 2)
        mixed = F.embedding_bag(rows, values, per_sample_weights=shares, mode="sum")
        return mixed.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        value, positions, weights, rows, shares = ctx.saved_tensors
        padded = ctx.table.filled(value)
        of_values, of_shares = product_gradients(
            rows, shares, padded.flatten(0, 2), grad.flatten(0, 2).contiguous()
        )
        levels = ctx.table.inside(of_values.view_as(padded))
        of_value = torch.cat([level.flatten(1, 2) for level in levels], 1)
        corners = of_shares.view(*weights.shape[:3], 4, *weights.shape[3:])
        upper_left, upper_right, lower_left, lower_right = corners.movedim(3, 0).contiguous()
        # slopes of a sample: to the right the difference of its right and left pixels, mixed by
        # height, and so downwards
        right, lower = (positions - positions.floor()).unbind(1)
        above, below = upper_left.lerp(upper_right, right), lower_left.lerp(lower_right, right)
        rightwards = (upper_right - upper_left).lerp(lower_right - lower_left, lower)
        slopes = torch.stack([rightwards, below - above], 1).mul_(weights[:, None])
        return of_value, slopes, above.lerp_(below, lower), None


def product_gradients(
    rows: Tensor, shares: Tensor, values: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the product: of the values (B N H, d), and of the shares (B S H, 4 L P)."""
    columns, entries, shape = rows.flatten(), shares.flatten(), (len(grad), len(values))
    starts = torch.arange(len(grad) + 1, dtype=torch.int32) * rows.shape[1]
    matrix = torch.sparse_csr_tensor(starts, columns, entries, shape, check_invariants=False)
    of_shares = torch.sparse.sampled_addmm(matrix, grad, values.T, beta=0).values()
    matrix = scipy.sparse.csr_array((entries.numpy(), columns.numpy(), starts.numpy()), shape)
    return torch.from_numpy(matrix.T @ grad.numpy()), of_shares.view_as(shares)


def neighbours(positions: Tensor, weights: Tensor, table: Table) -> tuple[Tensor, Tensor]:
    """What the samples mix: int32 rows of the table, and their shares, both (B S H, 4 L P).

    What lies outside is looked for on the border, where all four values are 0, and so are all
    slopes.
    """
    heads = weights.shape[2]
    # a diverged model's answer is NaN, by its shares; its rows must still be rows
    low = positions.nan_to_num().floor_()
    low = torch.clamp(low, low.new_tensor(-float(BORDER)), table.size)
    image = torch.arange(len(positions), dtype=torch.int32).view(-1, 1, 1, 1, 1) * table.rows
    corner = torch.addcmul(table.first, low[:, 1], table.below).add_(low[:, 0], alpha=heads)
    corner = corner.int().add_(image)
    under = corner + table.below.int()
    right, lower = (positions - low).unbind(1)
    left, upper, lower = 1 - right, weights * (1 - lower), weights * lower
    rows = corner, corner + heads, under, under + heads
    shares = upper * left, upper * right, lower * left, lower * right
    return _side_by_side(rows), _side_by_side(shares)


def _side_by_side(corners: tuple[Tensor, ...]) -> Tensor:
    """Four of (B, S, H, L, P) -> (B S H, 4 L P)."""
    return torch.stack([t.flatten(3) for t in corners], 3).flatten(3).flatten(0, 2)
