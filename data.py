"""Weak and strong views of images, CutMix boxes, and batches.

Every random number is sampled from (seed, step, slot), so a batch does not depend on workers, on
what came before it or on where a run was resumed.
Differs from the paper: short sides are 0.5 to 2.0 of the crop (official code; the paper says 0.1 to
2.0), and labelled images also get the SSD colour augmentation (official code only). Quarter turns
and views by the width of objects (--seen-width) are ours.
Axes: H W pixels of an image, h w of a view, S T height and width of the crop, N segments, B images.
Sources: Mask2Former (arXiv:2112.01527); SSD (arXiv:1512.02325); CutMix (arXiv:1905.04899).
Try: `python dearli.py --stage sup --steps 250 --scale-min 1 --scale-max 1 --out runs/try-scale`:
training images of one size only.
"""

import random
import signal
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from config import Config
from cutout import PATTERNS, cut_out
from ground import ranks
from ground.errors import UserError
from matcher import Target
from readers.ground_truth import DataSet, Truth
from readers.pictures import open_image  # noqa: F401  for scripts: `from data import open_image`

PAD_VALUE = 128  # grey levels; images are padded right and bottom to the crop
CUTMIX_ASPECT = (0.3, 1 / 0.3)  # height / width, uniform
CUTMIX_TRIES = 1000  # before the boxes that fit are listed; in an ordinary view a few will do
GRACE = 10  # seconds that a loader process outlives a SIGTERM
MAX_LONG_SIDE = 4  # long side of a training view, in crops (2560 of 640)


# ------------------------------------------------------------------------------ views of an image


@dataclass
class Sample:
    """An image on its way to a batch. image: PIL, RGB.   layers: maps that move along, each (H, W),
    nearest neighbour."""

    image: Image.Image
    layers: list[np.ndarray]


def weak_view(
    sample: Sample, cfg: Config, rng: random.Random, colour: bool = False
) -> tuple[Tensor, list[np.ndarray]]:
    """Random scale and crop, the SSD colour augmentation for labelled images, a flip, and with
    `turns` some quarter turns: (3, h, w) uint8, not padded, and its layers."""
    w, h = size = training_size(*sample.image.size, cfg, rng)
    cw, ch = min(w, cfg.crop), min(h, cfg.crop_size[0])
    x, y = rng.randint(0, w - cw), rng.randint(0, h - ch)
    sample = resize_part(sample, size, (x, y, x + cw, y + ch))
    image = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1).contiguous()
    layers = sample.layers
    if colour:
        image = ssd_colour(image, rng)
    if rng.random() < 0.5:
        image, layers = image.flip(-1), [a[:, ::-1] for a in layers]
    if cfg.turns:
        quarters = rng.randrange(4)
        image = image.rot90(quarters, (1, 2)).contiguous()
        layers = [np.rot90(a, quarters) for a in layers]
    return image, layers


def training_size(w: int, h: int, cfg: Config, rng: random.Random) -> tuple[int, int]:
    """(w, h) of an image of that size in a training view, before the crop: short side (or long
    side, `scaled_side`) = crop * k, or with `seen_width` a small object k times as wide as
    that."""
    k = rng.choice(range(round(10 * cfg.scale_min), round(10 * cfg.scale_max) + 1))
    if cfg.magnification:
        return magnified(w, h, 0.1 * k * cfg.magnification)
    side = int(0.1 * k * cfg.crop)
    if cfg.scaled_side == "long":
        return output_size(w, h, side, side)
    return output_size(w, h, side, MAX_LONG_SIDE * cfg.crop)


def magnified(w: int, h: int, times: float) -> tuple[int, int]:
    """(w, h) so many times as large, at least a pixel."""
    return max(1, round(w * times)), max(1, round(h * times))


def resize(sample: Sample, short_side: int, long_side: int) -> Sample:
    """To a short side, unless the long side then exceeds its limit."""
    size = output_size(*sample.image.size, short_side, long_side)
    return resize_part(sample, size, (0, 0, *size))


def resize_part(sample: Sample, size: tuple[int, int], part: tuple[int, int, int, int]) -> Sample:
    """Resize to size (w, h) and crop to part (left, top, right, bottom) of the result; what lies
    outside of it is never computed.

    Values differ by at most two grey levels from the whole, cropped: Pillow may take columns before
    rows for the one and not for the other.
    """
    (w, h), (nw, nh), (left, top, right, bottom) = sample.image.size, size, part
    source = left * w / nw, top * h / nh, right * w / nw, bottom * h / nh
    image = sample.image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, source)
    xs = ((np.arange(left, right) + 0.5) * w / nw).astype(int)
    ys = ((np.arange(top, bottom) + 0.5) * h / nh).astype(int)
    return Sample(image, [a.take(ys, 0).take(xs, 1) for a in sample.layers])


def output_size(w: int, h: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(w, h) after scaling the short side to short_side, or less if the long side would exceed
    long_side."""
    scale = min(short_side / min(w, h), long_side / max(w, h))
    return max(1, int(w * scale + 0.5)), max(1, int(h * scale + 0.5))


def ssd_colour(image: Tensor, rng: random.Random) -> Tensor:
    """Brightness +-32 grey levels, contrast and saturation 0.5 to 1.5, hue +-36 degrees, each with
    probability 0.5. (3, h, w) uint8."""
    x = image.float() / 255
    if rng.random() < 0.5:
        x = (x + rng.uniform(-32, 32) / 255).clamp(0, 1)
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    contrast_first = rng.random() < 0.5
    if contrast_first:
        x = (x * contrast).clamp(0, 1)
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = rng.randint(-18, 18) if rng.random() < 0.5 else 0  # in OpenCV's units of 2 degrees
    if saturation != 1.0 or hue:
        x = shift_hsv(x, hue / 180, saturation)
    if not contrast_first:
        x = (x * contrast).clamp(0, 1)
    return to_bytes(x)


def strong_view(image: Tensor, cfg: Config, rng: random.Random) -> Tensor:
    """Colour jitter (in random order), sometimes grayscale, sometimes Gaussian blur, and CutOut.
    (3, h, w) uint8."""
    colours = cfg.jitter or cfg.jitter_hue or cfg.grayscale_prob or cfg.blur_prob
    if not colours and cfg.cutout == "none":
        return image
    # Takes two seconds to import: only who needs it waits.
    from torchvision.transforms.v2 import functional as TF

    factor, hue = (1 - cfg.jitter, 1 + cfg.jitter), (-cfg.jitter_hue, cfg.jitter_hue)
    steps = [
        (TF.adjust_brightness, factor),
        (TF.adjust_contrast, factor),
        (TF.adjust_saturation, factor),
        (shift_hsv, hue),
    ]
    rng.shuffle(steps)
    x = image.float() / 255
    # at 1 nobody asks: views of a seed are what they were before there was a chance
    if cfg.jitter_prob == 1 or rng.random() < cfg.jitter_prob:
        for adjust, interval in steps:
            x = adjust(x, rng.uniform(*interval))
    if rng.random() < cfg.grayscale_prob:
        x = TF.rgb_to_grayscale(x, num_output_channels=3)
    if rng.random() < cfg.blur_prob:
        x = gaussian_blur(x, rng.uniform(0.1, cfg.blur_radius))
    return cut_out(to_bytes(x), PATTERNS[cfg.cutout], rng)


def shift_hsv(x: Tensor, turn: float, saturation: float = 1.0) -> Tensor:
    """Turn the hue by a share of the circle and multiply the saturation, as in HSV. (3, h, w) RGB
    in [0, 1].

    Torchvision's goes through six cases a pixel, Pillow's through 8 bits of hue; on the circle one
    rule serves the three channels: full up to one sixth of a turn from its own hue, none from two
    sixths on, linear between.
    """
    r, g, b = x
    top, low = x.amax(0), x.amin(0)
    # In sixths of a turn, red = 0.
    hue = torch.copysign(1 + (g + b - r - low) / (top - low).clamp(min=1e-6), g - b) + 6 * turn
    chroma = ((top - low) * saturation).minimum(top)
    low = top - chroma
    shifted = torch.empty_like(x)
    for channel, own in zip(shifted, (0, 2, 4)):
        distance = hue - own
        distance -= 6 * torch.round(distance / 6)  # the short way round: -3 to 3
        torch.addcmul(low, chroma, (2 - distance.abs()).clamp_(0, 1), out=channel)
    return shifted


def gaussian_blur(x: Tensor, radius: float) -> Tensor:
    """As Pillow's: three equal box blurs whose variances add up to radius ** 2, here as one kernel.
    (3, h, w); pixels of the edge repeat."""
    variance = radius**2 / 3
    # A box has weight 1 at -n to n and less at either end.
    n = int(((12 * variance + 1) ** 0.5 - 1) / 2)
    end = (2 * n + 1) * (variance - n * (n + 1) / 3) / 2 / ((n + 1) ** 2 - variance)
    box = np.array([end, *[1] * (2 * n + 1), end]) / (2 * n + 1 + 2 * end)
    kernel = np.convolve(box, np.convolve(box, box)).tolist()
    reach = len(kernel) // 2
    x = F.pad(x[None], (reach, reach, reach, reach), mode="replicate")[0]
    for axis in (1, 2):
        moved = [x.narrow(axis, k, x.shape[axis] - 2 * reach) for k in range(len(kernel))]
        x = torch.zeros_like(moved[0])
        for weight, image in zip(kernel, moved):
            x.add_(image, alpha=weight)
    return x


def to_bytes(x: Tensor) -> Tensor:
    """[0, 1] -> uint8."""
    # torch's own conversion takes twice as long.
    return torch.from_numpy((x * 255).round_().numpy().astype(np.uint8))


def cutmix_box(
    height: int, width: int, rng: random.Random, share: tuple[float, float] = (0.02, 0.4)
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a CutMix box, in pixels of the view that it is cut from.

    share: of the view's area that it has, uniform from the first to the second.
    Of the area that is sampled, aspect and corner are sampled until the box fits. Where it hardly
    ever does, in a long and thin view, the box is one of those that fit, each with its chance;
    where none fits, it is the largest that does.
    """
    area = rng.uniform(*share) * height * width
    for _ in range(CUTMIX_TRIES):
        w, h = _sides(area, rng.uniform(*CUTMIX_ASPECT))
        x, y = rng.randrange(width), rng.randrange(height)
        if x + w <= width and y + h <= height:
            return y, y + h, x, x + w
    w, h = _fitting_sides(area, height, width, rng)
    x, y = rng.randrange(max(1, width - w + 1)), rng.randrange(max(1, height - h + 1))
    return y, y + h, x, x + w


def _sides(area: float, aspect: float) -> tuple[int, int]:
    """(w, h) of a box, rounded down."""
    return int((area / aspect) ** 0.5), int((area * aspect) ** 0.5)


def _fitting_sides(area: float, height: int, width: int, rng: random.Random) -> tuple[int, int]:
    """(w, h) as the tries of `cutmix_box` would end with, however many it takes."""
    least, most = CUTMIX_ASPECT
    # Aspects between two of which w and h do not change.
    ends = {least, most}
    ends |= {area / k**2 for k in range(1, width + 2)}
    ends |= {k**2 / area for k in range(1, height + 2)}
    ends = sorted(end for end in ends if least <= end <= most)
    boxes, chances = [], []
    for first, last in zip(ends, ends[1:]):
        w, h = _sides(area, (first + last) / 2)
        if w <= width and h <= height:
            boxes.append((w, h))
            chances.append((last - first) * min(width, width - w + 1) * min(height, height - h + 1))
    if boxes:
        return rng.choices(boxes, chances)[0]
    aspect = min(max(height / width, least), most)
    return min(width, int(height / aspect)), min(height, int(width * aspect))


def to_target(segment_map: np.ndarray, labels: np.ndarray, crowd: np.ndarray) -> Target:
    """Training target: crowd regions become void, segments without a pixel are dropped, ids are
    made consecutive."""
    areas = np.bincount(segment_map.ravel(), minlength=len(labels) + 1)[1:]
    keep = (areas > 0) & ~crowd
    lut = np.zeros(len(labels) + 1, np.int32)
    lut[1:][keep] = np.arange(1, keep.sum() + 1)
    labels = torch.as_tensor(labels[keep], dtype=torch.int64)
    return Target(labels, torch.from_numpy(lut[segment_map]))


def instance_target(masks: list[np.ndarray], labels: np.ndarray, crowd, size) -> Target:
    """The same of masks that may overlap, (h, w) each, at most of size (S, T)."""
    kept = [k for k, mask in enumerate(masks) if not crowd[k] and mask.any()]
    padded = torch.zeros(len(kept), *size, dtype=torch.bool)
    for row, k in zip(padded, kept):
        height, width = masks[k].shape
        row[:height, :width] = torch.from_numpy(masks[k].copy())  # layers may be turned views
    return Target(torch.as_tensor(labels[kept], dtype=torch.int64), masks=padded)


def labeled_view(
    image: Image.Image, truth: Truth, cfg: Config, rng, colour: bool = True
) -> tuple[Tensor, Target]:
    """The weak view of a labelled image, (3, S, T), and its target, as cfg.labels wants it."""
    truth = truth.by_class() if cfg.labels == "semantic" else truth
    layers = [truth.segment_map] if truth.masks is None else list(truth.masks)
    view, layers = weak_view(Sample(image, layers), cfg, rng, colour)
    if truth.masks is None:
        target = to_target(pad(layers[0], cfg.crop_size, 0), truth.labels, truth.crowd)
    else:
        target = instance_target(layers, truth.labels, truth.crowd, cfg.crop_size)
    return pad_image(view, cfg.crop_size), target


# ------------------------------------------------------------------------------------------ batches


@dataclass
class Labeled:
    """images (B, 3, S, T) uint8; B targets; names of the files."""

    images: Tensor
    targets: list[Target]
    names: list[str]

    def to(self, device) -> "Labeled":
        images = self.images.to(device, non_blocking=True)
        return Labeled(images, [target.to(device) for target in self.targets], self.names)


@dataclass
class Unlabeled:
    """Two views of B images, and for images with a CutMix box the two views of the partner.

    weak, strong: (B, 3, S, T) uint8.   boxes: B boxes (top, bottom, left, right) or None.
    partner_weak, partner_strong: (M, 3, S, T) uint8, M = boxes that are not None, in their order.
    """

    weak: Tensor
    strong: Tensor
    boxes: list[tuple[int, int, int, int] | None]
    partner_weak: Tensor
    partner_strong: Tensor
    names: list[str]

    def to(self, device) -> "Unlabeled":
        views = (self.weak, self.strong, self.partner_weak, self.partner_strong)
        weak, strong, *partners = (view.to(device, non_blocking=True) for view in views)
        return Unlabeled(weak, strong, self.boxes, *partners, self.names)


class Batches(torch.utils.data.Dataset):
    """Batch number `step` of a run: a map from step to batch, so that order and workers do not
    matter.

    Subclasses say what a batch is; `rng` is the only source of chance they may use.
    """

    def __init__(self, cfg: Config, steps: int):
        self.cfg, self.steps = cfg, steps
        self.rank, self.ranks = ranks.rank(), ranks.count()  # a loader process could not ask
        self._order = (None, [])  # the pass that was shuffled last

    def __len__(self) -> int:
        return self.steps

    @property
    def parts(self) -> list[int]:
        """The first steps of parts of the run whose batches differ in kind."""
        return [0]

    def slots(self, batch: int) -> range:
        """The images of a batch that this rank takes. Raises UserError if some rank would have
        none."""
        if batch < self.ranks:
            raise UserError(
                f"{self.ranks} processes cannot share a batch of {batch}: start fewer with "
                "torchrun --nproc_per_node, or choose a larger batch"
            )
        return ranks.share(batch, self.rank, self.ranks)

    def rng(self, *key) -> random.Random:
        return random.Random(repr((self.cfg.seed, type(self).__name__, *key)))

    def pick(self, indices: list[int], step: int, slot: int, batch: int) -> int:
        """Endless shuffled passes over the indices."""
        epoch, position = divmod(step * batch + slot, len(indices))
        if self._order[0] != epoch:
            order = list(indices)
            self.rng("epoch", epoch).shuffle(order)
            self._order = epoch, order
        return self._order[1][position]


class LabeledBatches(Batches):
    """Labelled images with ground truth, for stages sup and ssl."""

    def __init__(self, dataset: DataSet, cfg: Config, steps: int):
        super().__init__(cfg, steps)
        self.dataset = dataset

    def __getitem__(self, step: int) -> Labeled:
        cfg, train, indices = self.cfg, self.dataset.train, self.dataset.labeled
        images, targets, names = [], [], []
        for slot in self.slots(cfg.labeled_batch):
            i = self.pick(indices, step, slot, cfg.labeled_batch)
            rng, truth = self.rng(step, slot), train.truth(i)
            image, target = labeled_view(train.image(i), truth, cfg, rng, cfg.colour)
            images.append(image)
            targets.append(target)
            names.append(train.name(i))
        return Labeled(torch.stack(images), targets, names)


class SemiSupervisedBatches(Batches):
    """A labelled batch, and an unlabelled one, whose images are sampled independently and with
    replacement. No unlabelled one during burn-in."""

    def __init__(self, dataset: DataSet, cfg: Config, steps: int, warm: bool = False):
        super().__init__(cfg, steps)
        self.dataset, self.labeled = dataset, LabeledBatches(dataset, cfg, steps)
        self.burn_in = cfg.burn_in_steps(warm)
        # Of `strong_view`: here once, not in every loader process.
        import torchvision.transforms.v2.functional  # noqa: F401

    @property
    def parts(self) -> list[int]:
        return [0, self.burn_in] if 0 < self.burn_in < self.steps else [0]

    def __getitem__(self, step: int) -> tuple[Labeled, Unlabeled | None]:
        if step < self.burn_in:
            return self.labeled[step], None
        views, partners, boxes, names = [], [], [], []
        for slot in self.slots(self.cfg.unlabeled_batch):
            rng = self.rng(step, slot)
            name, *pair = self._two_views(rng)
            views.append(pair)
            names.append(name)
            box = None
            # Sampled first: an image without a box needs no partner.
            if rng.random() < self.cfg.cutmix_prob:
                _, *partner = self._two_views(rng)
                partners.append(partner)
                share = self.cfg.cutmix_min, self.cfg.cutmix_max
                box = cutmix_box(*partner[0].shape[1:], rng, share)
            boxes.append(box)
        weak, strong = self._stacked(views)
        return self.labeled[step], Unlabeled(weak, strong, boxes, *self._stacked(partners), names)

    def _two_views(self, rng: random.Random) -> tuple[str, Tensor, Tensor]:
        train, i = self.dataset.train, rng.choice(self.dataset.unlabeled)
        weak, _ = weak_view(Sample(train.image(i), []), self.cfg, rng)
        return train.name(i), weak, strong_view(weak, self.cfg, rng)

    def _stacked(self, pairs: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """The weak views and the strong ones, each (len(pairs), 3, S, T)."""
        size = self.cfg.crop_size
        if not pairs:
            return (torch.empty(0, 3, *size, dtype=torch.uint8),) * 2
        weak, strong = zip(*pairs)
        return (
            torch.stack([pad_image(view, size) for view in weak]),
            torch.stack([pad_image(view, size) for view in strong]),
        )


def pad_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, h, w) -> (3, *size), grey at the right and at the bottom."""
    (height, width), (_, h, w) = size, image.shape
    return F.pad(image, (0, width - w, 0, height - h), value=PAD_VALUE)


def pad(a: np.ndarray, size: tuple[int, int], value: int) -> np.ndarray:
    """(h, w, ...) -> (*size, ...)."""
    out = np.full((*size, *a.shape[2:]), value, a.dtype)
    out[: a.shape[0], : a.shape[1]] = a
    return out


def loader(batches: Batches, start: int, workers: int):
    """Iterate over batches start, start + 1, ... with loader processes, which end when the
    generator is closed."""
    try:
        yield from torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=range(start, len(batches)),
            collate_fn=as_it_is,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=_await_the_parent,
        )
        return
    except UserError as error:  # a worker's error arrives with its traceback as text
        words = str(error).strip().splitlines()[-1].split("UserError: ")[-1]
    raise UserError(words)  # not from within: the first error would keep the loader processes alive


def _await_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group: a loader process ends a
    little later, when the parent knows as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def as_it_is(batch):
    """A collate function: torch's own would turn tuples into lists, and arrays into tensors."""
    return batch
