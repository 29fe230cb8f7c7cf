"""Decoder warm-up (DeWa, section 3.3): SAM's masks on all training images, and a decoder that learns to draw them.

SAM is asked everywhere, knows no class and overlaps itself; only L_loc of Eq. (3) is learned (class weight 0, in the loss
and in the matching). Which of the masks are segments of the taxonomy is left to the semi-supervised stage.
Differs from the paper: nothing.    Source: Segment Anything (arXiv:2304.02643); run lengths as in the COCO mask API.
Axes: N masks, H W pixels, B images.
Try, after the demo: `python dearli.py --stage sup --steps 100 --init runs/mini-dewa --out runs/try-dewa`, against the same without --init.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import ranks
from checkpoint import claim, release, write_atomic
from config import Config, UserError
from data import Batches, Labeled, Sample, Taxonomy, brief, pad, pad_image, weak_view
from losses import learn, point_generators
from matcher import Target
from model import Segmenter
from optim import descend, require_finite

MAX_DIGITS = 7                         # groups of 5 bits a run length after the first: more than any image has pixels, far less than 64 bits hold
TAXONOMY = Taxonomy(("segment, object, regular shape",), (True,), (1,))            # one class, three names (official)


# ------------------------------------------------------------------------------------------------ masks on disk

def generate_masks(images, generator, folder: Path, redo: bool = False) -> int:
    """Let SAM segment every image; one JSON file an image, so that an interrupted call goes on where it was;
    a file that was cut short is made again.

    Args:
        images: has len, name(i) and image(i) (`data.MiniImages`, `data.PanopticFolder`).
        generator: a `sam_masks.MaskGenerator`, or what has its `generate`.    folder: of the JSON files.
    Returns: the number of images segmented now, by all ranks: each takes its share.
    """
    todo = [i for i in range(ranks.rank(), len(images), ranks.count()) if redo or not is_whole(mask_file(folder, images.name(i)))]
    done = sum(ranks.gather(len(todo)))
    if not done:
        return 0
    if ranks.rank() == 0:
        claim(folder)
    ranks.wait()                                   # what a killed writer left is removed before anybody writes
    for i in tqdm(todo, desc="SAM masks", unit="image", dynamic_ncols=True, disable=ranks.rank() > 0):
        image = np.asarray(images.image(i))
        found = generator.generate(image)
        height, width = image.shape[:2]
        content = {"image": {"image_id": Path(images.name(i)).stem, "file_name": images.name(i), "height": height, "width": width},
                   "annotations": [{"id": k, "segmentation": encode_rle(m["segmentation"]), "area": int(m["area"]),
                                    "predicted_iou": float(m["predicted_iou"]), "stability_score": float(m["stability_score"]),
                                    "crop_box": [float(v) for v in m["crop_box"]],
                                    "point_coords": [[float(v) for v in p] for p in m["point_coords"]]}
                                   for k, m in enumerate(found, 1)]}
        write_atomic(mask_file(folder, images.name(i)), json.dumps(content).encode())
    ranks.wait()                                   # for the last of them
    release(folder)
    return done


def is_whole(path: Path) -> bool:
    """There is a file of masks, and not a part of one (copied by halves, or from a tool that does not write whole files)."""
    try:
        return "annotations" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def mask_file(folder: Path, name: str) -> Path:
    return Path(folder) / Path(name).with_suffix(".json")


def read_masks(folder: Path, name: str, expected: tuple[int, int]) -> np.ndarray:
    """(H, W, N) bool: the masks of an image of `expected` size (H, W), which no mask exceeds in memory whatever its file states.

    Raises: UserError if there is no file, not such a file, or one of masks of another size.
    """
    path = mask_file(folder, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sizes = {(content["image"]["height"], content["image"]["width"]), *(tuple(a["segmentation"]["size"]) for a in content["annotations"])}
        if sizes != {tuple(expected)}:
            raise UserError(f"{path}: masks are {brief(sorted(sizes - {tuple(expected)}, key=repr)[0])}, the image {name} is {tuple(expected)} (height, width); "
                            f"delete it and run --stage masks again", "masks")
        masks = [decode_rle(a["segmentation"]) for a in content["annotations"]]
    except FileNotFoundError:
        raise UserError(f"{path}: no SAM masks for image {name}; make them with --stage masks", "masks") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path}: not a file of SAM masks ({type(error).__name__}: {brief(str(error))}); delete it and run --stage masks again", "masks") from None
    return np.stack(masks, -1) if masks else np.zeros((*expected, 0), bool)


def encode_rle(mask: np.ndarray) -> dict:
    """(H, W) bool -> {"size": [H, W], "counts": text}, COCO's compressed run lengths.

    Runs go down the columns and start with zeros; each is stored as its difference from the last but one, in groups of
    5 bits, lowest first, with a bit that says whether more follow, shifted into printable characters.
    """
    flat = np.asarray(mask, bool).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    text = []
    for k, count in enumerate(counts):
        x = count - counts[k - 2] if k > 2 else count
        more = True
        while more:
            bits, x = x & 31, x >> 5
            more = x != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return {"size": [int(v) for v in mask.shape], "counts": "".join(text)}


def decode_rle(rle: dict) -> np.ndarray:
    """The inverse of `encode_rle`: (H, W) bool. Raises ValueError if the runs do not fill the mask."""
    height, width = rle["size"]
    codes = np.frombuffer(rle["counts"].encode("ascii"), np.uint8).astype(np.int64) - 48
    last = (codes & 32) == 0
    if not len(codes) or not last[-1]:
        raise ValueError("run lengths end in the middle of a number")
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(codes)) - np.repeat(starts, np.diff(np.append(starts, len(codes))))
    if place.max() > MAX_DIGITS:
        raise ValueError("run lengths hold a number that no image needs")
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    ends = np.flatnonzero(last)
    values = values - np.where(codes[ends] & 16, 1 << (5 * (place[ends] + 1)), 0)
    counts = values.copy()
    counts[1::2] = np.cumsum(values[1::2])                                         # undo the differences, odd runs
    counts[2::2] = np.cumsum(values[2::2])                                         # even runs; run 0 stands alone
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(f"run lengths cover {counts.sum()} pixels, expected {height * width}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


# ---------------------------------------------------------------------------------------------------- warm-up

class DewaBatches(Batches):
    """All training images, labelled or not, with all of their SAM masks; one that the crop empties stays a target (official), or not.

    images: has len, name(i) and image(i).   folder: of the masks, `generate_masks`.
    """

    def __init__(self, images, folder: Path, cfg: Config, steps: int):
        super().__init__(replace(cfg, crop=cfg.dewa_crop or cfg.crop), steps)
        self.images, self.folder = images, folder
        self.indices = range(len(images))

    def __getitem__(self, step: int) -> Labeled:
        images, targets, names = [], [], []
        for slot in self.slots(self.cfg.dewa_batch):
            i = self.pick(self.indices, step, slot, self.cfg.dewa_batch)
            name = self.images.name(i)
            image = self.images.image(i)
            masks = read_masks(self.folder, name, image.size[::-1])
            image, (masks,) = weak_view(Sample(image, [masks]), self.cfg, self.rng(step, slot), colour=True)
            masks = torch.from_numpy(np.ascontiguousarray(pad(masks, self.cfg.crop, 0).transpose(2, 0, 1)))
            if not self.cfg.dewa_keep_empty:
                masks = masks[masks.flatten(1).any(1)]
            images.append(pad_image(image, self.cfg.crop))
            targets.append(Target(torch.zeros(len(masks), dtype=torch.int64), masks=masks))
            names.append(name)
        return Labeled(torch.stack(images), targets, names)


def dewa_step(model: Segmenter, optimizer: torch.optim.Optimizer, batch: Labeled, cfg: Config, step: int,
              precision: torch.dtype = torch.float32) -> dict[str, float]:
    """One warm-up step: L_loc of Eq. (3). Returns the loss terms, weighted, and the gradient norm, as floats. Raises: as `train_step`."""
    device = batch.images.device
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        features = model.backbone(batch.images)
    optimizer.zero_grad(set_to_none=True)
    draws = point_generators(cfg.seed, step, ranks.share(cfg.dewa_batch).start, len(batch.targets), device)
    losses = require_finite(learn(model.head, features, batch.targets, cfg.loss_dewa, draws, precision))
    norm = descend(optimizer, cfg)
    return {"loss": sum(losses.values()), "mask": losses["mask"], "dice": losses["dice"], "grad_norm": norm}
