"""CLIP alone on given masks: zero-shot recognition without any training (DEARLi's Figure 3 and
section 3.3; of true instances, seen as DICC sees them, Table II of PL-DC).
"""

import json
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from tqdm import tqdm

import pldc
from clip_ensemble import padded_size, zero_shot_logits
from config import TAGS, Config
from data import Sample, resize
from engine.request import Machine, Place, Source
from ground.errors import UserError
from ground.files import require_writable, write_atomic
from inference import Prediction, join_stuff
from model import Segmenter
from panoptic_eval import PanopticScore
from pretrained import foundation
from pretrained.segmenter import build
from readers import mask_files
from readers.checks import require_files, require_truth
from readers.ground_truth import DataSet
from report import tables


def run(source: Source, place: Place, machine: Machine, cfg: Config, masks, folder: Path) -> None:
    """Measure, write metrics.json, print the table. masks: None or "gt": the true ones; "sam"; or a
    folder.
    """
    dataset = source.load(cfg)
    require_writable(folder)
    if cfg.labels == "instances":
        return name_instances(dataset, machine, cfg, folder)
    require_truth(dataset, learn=False)
    require_files(dataset.val, range(len(dataset.val)), "validation")
    if foundation.is_timm(cfg.backbone):
        raise UserError(
            f"--stage zeroshot: backbone {cfg.backbone} has no text tower; expected an OpenCLIP "
            f"ConvNeXt such as {', '.join(TAGS)}"
        )
    images = dataset.val
    if str(masks) == "sam":
        masks = place.runs / f"{source.name}-masks-{source.eval_on}"
        mask_files.generate_masks(images, foundation.load_sam(cfg)(machine.device), masks)

    def partition(i: int) -> np.ndarray:
        if masks is None or str(masks) == "gt":
            return images.truth(i).segment_map
        size = images.image(i).size[::-1]
        return flatten(mask_files.read_masks(masks, images.name(i), size, images.digest(i)))

    model = build(cfg, dataset.taxonomy, machine.device)
    metrics = zero_shot(model, dataset, cfg, machine.device, partition)
    content = {"images": len(images), "zero-shot": metrics}
    write_atomic(folder / "metrics.json", json.dumps(content, indent=1).encode())
    print(tables.table([("zero-shot", metrics)], PanopticScore.columns))
    print(f"{folder / 'metrics.json'}")


def name_instances(dataset: DataSet, machine: Machine, cfg: Config, folder: Path) -> None:
    """CLIP's precision and recall of the true instances of the validation images, by class, as
    `clip_view` shows them; metrics.json, and a table of classes, the best known first.
    """
    require_files(dataset.val, range(len(dataset.val)), "validation")
    namer = pldc.build_namer(cfg, dataset.taxonomy, machine.device)
    if namer is None:
        raise UserError(
            "--stage zeroshot: CLIP is asked for nothing, with one class or --clip-view none; "
            "expected several classes, and one that shows it instances: crop, masked or pool"
        )
    counts = confusion(namer, dataset, machine.device)
    figures = precision_and_recall(counts, dataset.taxonomy.short_names)
    content = {"images": len(dataset.val), "clip_view": cfg.clip_view, "zero-shot": figures}
    write_atomic(folder / "metrics.json", json.dumps(content, indent=1).encode())
    rows = [(name, row) for name, row in figures["per_class"].items() if row["instances"]]
    rows.sort(key=lambda row: -row[1]["recall"])
    columns = (("precision", ("precision",)), ("recall", ("recall",)))
    print(tables.table([*rows, ("mean over classes", figures)], columns))
    print(f"{folder / 'metrics.json'}")


def confusion(namer: pldc.Namer, dataset: DataSet, device, limit: int | None = None) -> np.ndarray:
    """(K, K) counts of true instances (without crowds): true class, class by CLIP."""
    images, classes = dataset.val, len(dataset.taxonomy)
    counts = np.zeros((classes, classes), np.int64)
    count = min(limit or len(images), len(images))
    for i in tqdm(range(count), desc="zero-shot", unit="image", dynamic_ncols=True):
        truth, image = images.truth(i), np.array(images.image(i))
        if not len(truth.labels):
            continue
        pixels = torch.from_numpy(image).permute(2, 0, 1).to(device)
        masks = torch.from_numpy(np.stack([truth.mask(k) for k in range(len(truth.labels))]))
        seen = torch.from_numpy(truth.crowd == 0) & masks.flatten(1).any(1)
        if seen.any():
            said = namer(pixels, 2.0 * masks[seen].to(device) - 1).argmax(-1).cpu().numpy()
            np.add.at(counts, (truth.labels[seen.numpy()], said), 1)
    return counts


def precision_and_recall(counts: np.ndarray, names: list[str]) -> dict:
    """{"precision", "recall": mean over the classes that are there; "accuracy": of all instances;
    "instances"; "per_class": {name: {"precision": None if CLIP never says it, "recall",
    "instances"}}}, 0 to 1. counts: as `confusion` returns.
    """
    true, said, right = counts.sum(1), counts.sum(0), counts.diagonal()
    per_class = {
        name: {
            "precision": float(right[k] / said[k]) if said[k] else None,
            "recall": float(right[k] / true[k]) if true[k] else None,
            "instances": int(true[k]),
        }
        for k, name in enumerate(names)
    }
    there = [row for row in per_class.values() if row["instances"]]
    means = {
        key: float(np.mean([row[key] or 0.0 for row in there])) if there else None
        for key in ("precision", "recall")
    }
    accuracy = float(right.sum() / true.sum()) if true.sum() else None
    return {**means, "accuracy": accuracy, "instances": int(true.sum()), "per_class": per_class}


@torch.no_grad()
def zero_shot(
    model: Segmenter,
    dataset: DataSet,
    cfg: Config,
    device: torch.device,
    partition: Callable[[int], np.ndarray],
    limit: int | None = None,
) -> dict:
    """PQ of given segments, each classified by Eq. (4) and (5).

    partition(i) -> (H, W) integers of validation image i, 0 = no segment.   Segments that are given
    one class of stuff are joined.   Returns: {"all", "things", "stuff", "per_class"}, as
    `panoptic_eval.PanopticQuality.result`.
    """
    images = dataset.val
    model.eval()
    score = PanopticScore(dataset.taxonomy)
    count = min(limit or len(images), len(images))
    for i in tqdm(range(count), desc="zero-shot", unit="image", dynamic_ncols=True):
        given = partition(i)
        segment_map = np.searchsorted(np.unique(np.append(0, given)), given).astype(np.int32)
        classes = np.zeros(0, np.int64)
        if segment_map.any():
            classes = _classes(model, images.image(i), segment_map, cfg, device)
        first, number = join_stuff(classes.tolist(), [True] * len(classes), dataset.taxonomy.things)
        number = np.array([0, *number], np.int32)
        answer = Prediction(number[segment_map], classes[first], np.ones(len(first)))
        score.add(answer, images.truth(i))
    return score.result()


def _classes(model: Segmenter, image, segment_map: np.ndarray, cfg: Config, device) -> np.ndarray:
    """(N,) class of each segment of a map, 1 ... N, by CLIP."""
    view = resize(Sample(image, [segment_map]), cfg.test_size, cfg.test_max)
    batch = torch.from_numpy(np.array(view.image)).permute(2, 0, 1)[None].to(device)
    height, width = view.layers[0].shape
    grid = np.zeros(padded_size(*batch.shape[-2:]), np.int32)
    grid[:height, :width] = view.layers[0]
    quarter = torch.from_numpy(grid[2::4, 2::4].copy()).to(device)  # as fine as the decoder's masks
    number = torch.arange(1, int(segment_map.max()) + 1, device=device)
    mask_logits = 2.0 * (quarter[None, None] == number[:, None, None]) - 1  # (1, N, H/4, W/4)
    backbone = model.backbone
    features = backbone(batch)[-1]
    logits = zero_shot_logits(backbone, features, mask_logits, model.vocabulary, cfg.clip_scale)
    return logits[0].argmax(-1).cpu().numpy()


def flatten(masks: np.ndarray, least: int = 512) -> np.ndarray:
    """Overlapping masks (H, W, N) -> partition (H, W) int32: large masks first, smaller on top;
    what then shows fewer than `least` pixels goes (as the official panoptic view of SAM's
    masks)."""
    out = np.zeros(masks.shape[:2], np.int32)
    for k in np.argsort(-masks.sum((0, 1)), kind="stable"):
        out[masks[..., k]] = k + 1
    left = np.bincount(out.ravel(), minlength=masks.shape[-1] + 1) >= least
    return np.where(left[out], out, 0)
