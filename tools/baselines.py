"""What a small tool must beat where one kind of object lies on a background, as nuclei do.

    python -m tools.baselines otsu --data-root DIR --split 1_32
    python -m tools.baselines unet --data-root DIR --split 1_32 --seed 0 --out unet.json

otsu needs no label: a threshold, and connected components. unet is what one would do by hand with a
few labelled images: a small U-Net that says how likely a pixel is an object and how near it is to
the middle of its own, and a watershed on that. It sees images stretched, as the preset `custom`
does (`readers.stretch`). Its settings are fixed; those of the watershed were chosen on labelled
images, none on validation images. Both are measured as the stages measure.
Axes: H W pixels of an image, h w of a crop, B images.
Sources: Otsu (IEEE Trans. SMC 9, 1979); U-Net (arXiv:1505.04597); distances as targets (StarDist,
arXiv:1806.03535); watershed by flooding (Meyer, Signal Processing 38, 1994).
"""

import argparse
import heapq
import json
import random
import sys
import time
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from data import ssd_colour, to_bytes
from ground.errors import UserError
from ground.files import require_writable, write_atomic
from inference import Prediction
from panoptic_eval import PanopticScore, SemanticScore
from readers.checks import require_files, require_truth
from readers.exposure import see
from readers.ground_truth import DataSet, Taxonomy, Truth
from readers.panoptic import load_folder
from report import tables

SPECK = 20  # pixels; what is smaller is no object
WIDTHS = (16, 32, 64, 128, 256)  # channels of the U-Net: 2.0 million parameters
CROP, BATCH = 192, 8  # pixels, images
ZOOM = (0.5, 2.0)  # of training crops, uniform in its logarithm
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-4  # AdamW, cosine to 0
STEPS = 1200
SMOOTH = 1.0  # pixels, standard deviation; of the distances, before their maxima are taken
RISE = 0.05  # of a distance of 0 to 1: what parts two maxima must be lower than both by this
COLUMNS = PanopticScore.columns + SemanticScore.columns


# -------------------------------------------------------------------------------- without any label


def otsu(image: Image.Image) -> np.ndarray:
    """(H, W) int32 objects of an RGB image, 0 = background: the side of the threshold that has
    fewer pixels, its holes filled, in connected parts."""
    grey = np.asarray(image.convert("L"))
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    below, sums = np.cumsum(share), np.cumsum(share * np.arange(256))
    # The variance between both sides, times the product of their shares.
    spread = (sums[-1] * below - sums) ** 2
    product = below * (1 - below)
    between = np.divide(spread, product, out=np.zeros(256), where=product > 1e-9)
    bright = grey > between.argmax()
    if bright.mean() > 0.5:
        bright = ~bright
    parts, _ = ndimage.label(ndimage.binary_fill_holes(bright))
    return without_specks(parts)


def without_specks(objects: np.ndarray) -> np.ndarray:
    """(H, W) int32 with objects of at least SPECK pixels, numbered anew from 1."""
    area = np.bincount(objects.ravel())
    keep = area >= SPECK
    keep[0] = False
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[objects]


# ----------------------------------------------------------------------- with a few labelled images


class UNet(nn.Module):
    """(B, 3, H, W), 0 to 255, -> (B, 2, H, W) logits of foreground and distance. H and W: multiples
    of its `multiple`."""

    def __init__(self):
        super().__init__()
        self.multiple = 2 ** (len(WIDTHS) - 1)
        self.down = nn.ModuleList(map(_twice, (3, *WIDTHS[:-1]), WIDTHS))
        self.up = nn.ModuleList(
            _twice(fine + coarse, fine) for fine, coarse in zip(WIDTHS[:-1], WIDTHS[1:])
        )
        self.last = nn.Conv2d(WIDTHS[0], 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        x, fine = images / 128 - 1, []
        for level in self.down[:-1]:
            x = level(x)
            fine.append(x)
            x = F.max_pool2d(x, 2)
        x = self.down[-1](x)
        for level, same in zip(reversed(self.up), reversed(fine)):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
            x = level(torch.cat([same, x], 1))
        return self.last(x)


def _twice(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        convolution = nn.Conv2d(channels, after, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def distances(objects: np.ndarray) -> np.ndarray:
    """(H, W) float32 of a map (H, W), 0 = none: how far it is to the edge of the object, 1 where
    that is farthest."""
    out = np.zeros(objects.shape, np.float32)
    for k, box in enumerate(ndimage.find_objects(objects), 1):
        if box is not None:
            mask = objects[box] == k
            distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
            out[box][mask] = (distance / distance.max())[mask]
    return out


def layers(image: Image.Image, truth: Truth, thing: int) -> Tensor:
    """(6, H, W): the image, 0 to 255; foreground and distance, 0 to 1; 1 where the truth is known,
    0 on void and crowd."""
    thing_ids = np.append(False, (truth.labels == thing) & ~truth.crowd)
    known = np.append(False, ~truth.crowd)[truth.segment_map]
    objects = np.where(thing_ids, np.arange(len(thing_ids)), 0)[truth.segment_map]
    maps = np.stack([objects > 0, distances(objects), known]).astype(np.float32)
    return torch.cat([pil_to_tensor(image), torch.from_numpy(maps)])


def crop(x: Tensor, rng: random.Random) -> Tensor:
    """(6, H, W) layers -> (6, CROP, CROP): zoomed, turned, flipped, and in other colours. What lies
    outside of the image is 0, and so not known."""
    side = round(CROP / ZOOM[0] * (ZOOM[0] / ZOOM[1]) ** rng.random())
    top, left = (rng.randint(0, max(0, length - side)) for length in x.shape[1:])
    x = x[:, top : top + side, left : left + side]
    x = F.pad(x, (0, side - x.shape[2], 0, side - x.shape[1]))
    x = F.interpolate(x[None], (CROP, CROP), mode="bilinear", antialias=True)[0]
    x = x.rot90(rng.randrange(4), (1, 2))
    x = x.flip(2) if rng.random() < 0.5 else x
    colours = ssd_colour(to_bytes(x[:3].clamp(0, 255) / 255), rng)
    return torch.cat([colours.float(), x[3:]])


def train(images: list[Tensor], steps: int, seed: int) -> UNet:
    """A U-Net that has learned from (6, H, W) layers of images, all random numbers from the
    seed."""
    torch.manual_seed(seed)
    rng, model = random.Random(seed), UNet()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order: list[Tensor] = []
    for _ in (bar := tqdm(range(steps), desc="unet", unit="step", dynamic_ncols=True)):
        while len(order) < BATCH:
            order += rng.sample(images, len(images))
        batch = torch.stack([crop(order.pop(0), rng) for _ in range(BATCH)])
        target, known = batch[:, 3:5], batch[:, 5:]
        loss = F.binary_cross_entropy_with_logits(model(batch[:, :3]), target, reduction="none")
        loss = (loss * known).sum() / known.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss:.3f}")
    return model.eval()


@torch.no_grad()
def unet(model: UNet, image: Image.Image) -> np.ndarray:
    """(H, W) int32 objects of an RGB image, 0 = background."""
    x = pil_to_tensor(image)[None].float()
    height, width = x.shape[-2:]
    x = F.pad(x, (0, -width % model.multiple, 0, -height % model.multiple), mode="replicate")
    foreground, distance = model(x)[0, :, :height, :width].sigmoid().numpy()
    return without_specks(split(foreground > 0.5, distance))


def split(foreground: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """(H, W) int32 objects of a mask, parted where their distances (H, W) part: flooded from the
    maxima down; floods that meet before one of them has sunk by RISE are one.

    A heap, because `scipy.ndimage.watershed_ift` floods by differences of neighbours, not by
    height: of two discs that touch, the larger would eat up the smaller.
    """
    height = ndimage.gaussian_filter(distance.astype(np.float32), SMOOTH)
    top = foreground & (height == ndimage.maximum_filter(height, 3))
    markers, count = ndimage.label(top, np.ones((3, 3)))
    peak = [0, *ndimage.maximum(height, markers, range(1, count + 1))]
    owner = list(range(count + 1))  # of each marker, the one that it has joined
    # A border of background, so that every pixel has four neighbours.
    height, markers, mask = (np.pad(a, 1) for a in (height, markers, foreground))
    width, shape = mask.shape[1], mask.shape
    height, markers, mask = height.ravel().tolist(), markers.ravel().tolist(), mask.ravel().tolist()
    queue = [(-height[i], i) for i, marker in enumerate(markers) if marker]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        for j in (i - width, i - 1, i + 1, i + width):
            if mask[j] and not markers[j]:
                markers[j], height[j] = markers[i], min(height[i], height[j])
                heapq.heappush(queue, (-height[j], j))
            elif mask[j]:
                _join(markers[i], markers[j], min(height[i], height[j]), peak, owner)
    floods = [_owner(owner, k) for k in range(count + 1)]
    number = np.unique(floods, return_inverse=True)[1].astype(np.int32)
    objects = number[markers].reshape(shape)[1:-1, 1:-1]
    rest, _ = ndimage.label(foreground & (objects == 0))  # parts whose maximum lies beside them
    return np.where(rest > 0, rest + number.max(), objects)


def _join(a: int, b: int, saddle: float, peak: list[float], owner: list[int]) -> None:
    """Make two floods one whose saddle is less than RISE below the lower of their peaks."""
    low, high = sorted((_owner(owner, a), _owner(owner, b)), key=peak.__getitem__)
    if low != high and peak[low] - saddle < RISE:
        owner[low] = high


def _owner(owner: list[int], k: int) -> int:
    while owner[k] != k:
        k = owner[k]
    return k


# ------------------------------------------------------------------------------------------ figures


def one_thing(taxonomy: Taxonomy, source) -> int:
    """The place of the thing class. Raises: UserError unless there is one thing class and one of
    stuff."""
    if sorted(taxonomy.things) != [False, True]:
        things = sum(taxonomy.things)
        raise UserError(
            f"{source}: has {things} thing and {len(taxonomy) - things} stuff classes; the "
            "baselines need one thing class (the objects) and one stuff class (their background)"
        )
    return taxonomy.things.index(True)


def measure(dataset: DataSet, objects: Callable[[Image.Image], np.ndarray]) -> dict:
    """The figures of a reading, as in metrics.json, of all validation images. objects: as
    `otsu`; what is none of them is background."""
    thing = one_thing(dataset.taxonomy, dataset.name)
    quality, pixels = PanopticScore(dataset.taxonomy), SemanticScore(dataset.taxonomy)
    images = dataset.val
    for i in tqdm(range(len(images)), desc="evaluation", unit="image", dynamic_ncols=True):
        segment_map = objects(images.image(i))
        labels = np.full(segment_map.max(), thing)
        if not segment_map.all():
            labels = np.append(labels, 1 - thing)
            segment_map = np.where(segment_map, segment_map, len(labels))
        semantic = labels[segment_map - 1]
        answer = Prediction(segment_map, labels, np.ones(len(labels)), semantic)
        for score in (quality, pixels):
            score.add(answer, images.truth(i))
    result, semantic = quality.result(), pixels.result()
    for name, row in semantic.pop("per_class").items():
        result["per_class"][name] |= row
    return result | semantic


def run(args: argparse.Namespace) -> None:
    """Train if need be, measure, print the table, write the file. Raises: UserError."""
    if args.out:
        require_writable(args.out.resolve().parent)
    dataset = load_folder(args.data_root, args.split)
    thing = one_thing(dataset.taxonomy, args.data_root)
    learns = args.baseline == "unet"
    require_truth(dataset, learn=learns)
    require_files(dataset.train, dataset.labeled if learns else [], "labelled")
    require_files(dataset.val, range(len(dataset.val)), "validation")
    # Otsu's threshold asks for no exposure; a network has seen few of them.
    see(0, learns, dataset.train, dataset.val)
    content = {"baseline": args.baseline, "data": dataset.name, "split": args.split}
    start, objects = time.perf_counter(), otsu
    if learns:
        chosen = dataset.labeled
        samples = [layers(dataset.train.image(i), dataset.train.truth(i), thing) for i in chosen]
        model = train(samples, args.steps, args.seed)
        content |= {
            "labelled images": len(chosen),
            "seed": args.seed,
            "steps": args.steps,
            "parameters": sum(p.numel() for p in model.parameters()),
            "threads": torch.get_num_threads(),
            "seconds of training": round(time.perf_counter() - start, 1),
        }
        start = time.perf_counter()

        def objects(image):
            return unet(model, image)

    metrics = measure(dataset, objects)
    content["seconds of evaluation"] = round(time.perf_counter() - start, 1)
    content |= {"images": len(dataset.val), args.baseline: metrics}
    print(tables.table([(args.baseline, metrics)], COLUMNS))
    if args.out:
        write_atomic(args.out, json.dumps(content, indent=1).encode())
        print(args.out)


def main(words: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = p.add_subparsers(dest="baseline", required=True)
    for name in ("otsu", "unet"):
        one = which.add_parser(name)
        one.add_argument("--data-root", type=Path, required=True, help="in COCO panoptic format")
        one.add_argument("--split", required=True, help="which images are labelled, as dearli.py")
        one.add_argument("--out", type=Path, help="write the figures to this JSON file")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--steps", type=_at_least_1, default=STEPS)
    try:
        run(p.parse_args(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _at_least_1(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {word}")
    return int(word)


if __name__ == "__main__":
    sys.exit(main())
