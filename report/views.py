"""What the network will see (--dry-run --report): views of a run that has not begun, with their
targets, as one static page beside its folder.

They are batches of the run itself, the first that have all that its batches can have: a run of the
same flags takes these very steps. Try: `python dearli.py --stage ssl --method dear --dry-run
--report`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from data import Batches, Labeled, Unlabeled
from engine.method import Method
from ground.files import write_atomic
from inference import Prediction, paint
from matcher import Target
from mean_teacher import mix_images
from readers.ground_truth import DataSet
from readers.scale import scale_text, widths
from report import page
from report.gallery import Card, all_masks, webp

SHOWN = 6  # images of a kind, each in all of its views
LOOKED_AT = 24  # views of a kind, at most, that numbers are of
STEPS = 8  # that are looked at for so many


@dataclass(frozen=True)
class View:
    """One image as the network gets it: (3, S, S) uint8 each. `target` of labelled ones; `strong`
    and, where it has a CutMix box, `mixed` of unlabelled ones."""

    name: str
    image: Tensor
    target: Target | None = None
    strong: Tensor | None = None
    mixed: Tensor | None = None


def write(folder: Path, method: Method, batches: Batches, dataset: DataSet | None = None) -> Path:
    """FOLDER-views.html about the run that would be in a folder. Nothing is drawn from its chance,
    and its folder is not made.

    dataset: None: images with masks, without classes (`batches.dataset`, as of the warm-up).
    Raises: UserError if it cannot be written, or an image cannot be read.
    """
    folder = Path(folder) if Path(folder).name not in ("", "..") else Path(folder).resolve()
    labeled, unlabeled = look(batches)
    of = type(method)
    facts = [f"{of.__name__} of {of.__module__}.py", f"seed {batches.cfg.seed}"]
    if dataset is not None:
        facts[1:1] = [dataset.name]
    values = {
        "title": folder.name,
        "facts": facts,
        "step": batches.parts[-1] + 1,
        "last": len(batches),
        "numbers": numbers(method, batches, dataset, labeled, unlabeled),
        "labeled": [_labeled(view, method, batches, dataset) for view in labeled[:SHOWN]],
        "unlabeled": [_unlabeled(view, dataset) for view in unlabeled[:SHOWN]],
        "masks": dataset is None,
        "labels": "Images with masks" if dataset is None else "Labelled images",
        "doubled": len(labeled) > 1 and labeled[0].target is labeled[1].target,
        "mixed": any(view.mixed is not None for view in unlabeled[:SHOWN]),
    }
    path = folder.with_name(f"{folder.name}-views.html")
    write_atomic(path, page.template("views.html.j2").render(values).encode("utf-8", "replace"))
    return path


def look(batches: Batches) -> tuple[list[View], list[View]]:
    """Labelled and unlabelled views of the first steps of the last part of a run, which has all
    that its batches can have; up to LOOKED_AT of each."""
    labeled, unlabeled = [], []
    first = batches.parts[-1]
    for step in range(first, min(first + STEPS, len(batches))):
        batch = batches[step]
        for part in batch if isinstance(batch, tuple) else (batch,):
            if isinstance(part, Labeled):
                labeled += [View(*of) for of in zip(part.names, part.images, part.targets)]
            elif isinstance(part, Unlabeled):
                mixed = mix_images(part.strong, part.partner_strong, part.boxes)
                mixed = [None if box is None else x for box, x in zip(part.boxes, mixed)]
                views = zip(part.names, part.weak, part.strong, mixed)
                unlabeled += [View(name, weak, None, *others) for name, weak, *others in views]
        if len(labeled) >= LOOKED_AT:
            break
    return labeled[:LOOKED_AT], unlabeled[:LOOKED_AT]


def numbers(method: Method, batches: Batches, dataset: DataSet | None, labeled, unlabeled):
    """[(what, text)]: images, views, widths of objects, targets a view."""
    cfg, rows = batches.cfg, []
    source, indices = _images(batches, dataset)
    counts = f"{len(indices):,} with masks"
    if dataset is not None:
        counts = (
            f"{len(dataset.labeled):,} labelled, {len(dataset.unlabeled):,} unlabelled, "
            f"{len(dataset.val):,} for validation"
        )
    rows.append(("images", counts))
    sizes = [source.image(i).size for i in indices[:LOOKED_AT]]
    rows.append(("image size", f"{_sizes(sizes)} pixels (the first {len(sizes)} images)"))
    rows.append(("views", f"{cfg.crop} x {cfg.crop_size[0]} pixels, cut from {_shown(cfg)}"))
    if dataset is not None and cfg.magnification:
        rows.append(("objects", scale_text(dataset, cfg)))
    elif dataset is not None and len(found := widths(dataset)):
        rows.append(("objects", f"{_spread(found)} pixels wide in the labelled images"))
    things = np.array(method.taxonomy.things)
    found = np.concatenate([np.zeros(0), *(_widths(view.target, things) for view in labeled)])
    if len(found):
        rows.append(("objects seen", f"{_spread(found)} pixels wide in {len(labeled)} views"))
    each = [len(view.target) for view in labeled]
    if each:
        text = f"{min(each)} to {max(each)}, {np.mean(each):.1f} on average of {len(each)} views"
        if cfg.network == "mask2former":
            text += f"; there are {cfg.num_queries} queries"
        rows.append(("targets", text))
        if empty := each.count(0):
            rows.append(("empty views", f"{empty} of {len(each)} labelled views show no target"))
    if unlabeled and cfg.cutmix_prob:
        mixed = sum(view.mixed is not None for view in unlabeled)
        rows.append(("CutMix", f"in {mixed} of {len(unlabeled)} unlabelled views"))
    return rows


def _images(batches: Batches, dataset: DataSet | None):
    """The images that labelled views are of, and the indices of these."""
    if dataset is None:
        return batches.dataset.images, batches.dataset.indices
    return dataset.train, dataset.labeled


def _sizes(sizes: list[tuple[int, int]]) -> str:
    least, most = min(sizes), max(sizes)
    text = f"{least[0]} x {least[1]}"
    return text if least == most else f"{text} to {most[0]} x {most[1]}"


def _shown(cfg) -> str:
    """How large images are shown in a training view (`data.training_size`)."""
    if cfg.magnification:
        low, high = (k * cfg.magnification for k in (cfg.scale_min, cfg.scale_max))
        return f"images shown {low:.2g} to {high:.2g} times as large"
    low, high = (int(k * cfg.crop) for k in (cfg.scale_min, cfg.scale_max))
    return f"images whose {cfg.scaled_side} side is shown with {low} to {high} pixels"


def _spread(found: np.ndarray) -> str:
    low, middle, high = np.percentile(found, (10, 50, 90))
    return f"{middle:.0f} (the median; a tenth below {low:.0f}, a tenth above {high:.0f})"


def _widths(target: Target, things: np.ndarray) -> np.ndarray:
    """Pixels, the equivalent diameters of the things of a target."""
    if target.masks is None:
        areas = np.bincount(target.segment_map.numpy().ravel(), minlength=len(target) + 1)[1:]
    else:
        areas = target.masks.flatten(1).sum(1).numpy()
    return np.sqrt(4 / np.pi * areas[things[target.labels.numpy()] & (areas > 0)])


# ------------------------------------------------------------------------------------------ cards


def _labeled(view: View, method: Method, batches: Batches, dataset: DataSet | None) -> Card:
    cells = _original(view, *_images(batches, dataset))
    cells.append(("view", _picture(view.image)))
    count, image = len(view.target), _pil(view.image)
    if dataset is None:
        cells.append(all_masks(image, view.target.masks.permute(1, 2, 0).numpy()))
    else:
        cells.append(("its target", webp(image, _drawn(view.target), method.taxonomy)))
    what = "segments" if view.target.masks is None else "masks"
    return Card(view.name, f"{count} {what if count != 1 else what[:-1]}", cells)


def _unlabeled(view: View, dataset: DataSet) -> Card:
    cells = _original(view, dataset.train, dataset.unlabeled)
    cells += [("weak view", _picture(view.image)), ("strong view", _picture(view.strong))]
    if view.mixed is not None:
        cells.append(("with CutMix", _picture(view.mixed)))
    return Card(view.name, "", cells)


def _original(view: View, images, indices) -> list[tuple[str, bytes]]:
    """The image that a view is of, as it is."""
    i = next(i for i in indices if images.name(i) == view.name)
    image = images.image(i)
    return [(f"image, {image.width} x {image.height}", webp(image))]


def _drawn(target: Target) -> Prediction:
    """A target to be drawn; of masks that overlap, small ones on top."""
    segment_map, labels = target.segment_map, target.labels
    if segment_map is None:
        order = target.masks.flatten(1).sum(1).argsort(stable=True)
        segment_map, labels = paint(target.masks[order]), labels[order]
    return Prediction(segment_map.numpy(), labels.numpy(), np.ones(len(labels), np.float32))


def _pil(view: Tensor) -> Image.Image:
    return Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())


def _picture(view: Tensor) -> bytes:
    return webp(_pil(view))
