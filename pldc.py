"""PL-DC: semi-supervised instance segmentation, whose pseudo-labels are filtered, renamed and
weighted; and Guided Distillation, which it builds on.

Implements section 3 of the paper, after Eq. (1): decoupled thresholds (DDTF, Eq. 3-5), CLIP's
correction of the classes (DICC, Eq. 6-9) and a mask loss that trusts the teacher where it is sure
(PMUA, Eq. 10-11). `Pldc` is a Mean Teacher after a supervised burn-in; `Guided` has a burn-in of
its own, and thresholds the class alone. Each of the three is a number or a flag of either.
Differs from the paper: where it is silent the public code is followed: the softmax of Eq. (3) has
no-object in it, masks have more than 5 pixels, labelled images are learned from their weak and from
their strong view, w of Eq. (7) starts with the pseudo-labels, a batch without pseudo-labels teaches
nothing. See docs/differences.md for both.
Axes: B images, N instances, Q queries, K classes, H W pixels, h w mask grid (stride 4).
Sources: PL-DC (arXiv:2505.11075); Guided Distillation (arXiv:2308.02668).
Try: `python dearli.py --stage ssl --method pldc --steps 350 --burn-in 150 --clip-view none --out
runs/try-dicc` does without CLIP (DICC), `--coupled 0.48` without DDTF, `--no-pixel-certainty`
without PMUA.
"""

import math
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_ensemble import (
    MAX_SCALE,
    PIXEL_MEAN,
    PIXEL_STD,
    ClipBackbone,
    Vocabulary,
    padded_size,
    resize,
    zero_shot_logits,
)
from config import Config
from data import (
    PAD_VALUE,
    Labeled,
    Sample,
    SemiSupervisedBatches,
    Unlabeled,
    pad_image,
    strong_view,
    weak_view,
)
from engine.checkpoint import state_of
from engine.optim import descend, require_finite
from ground import ranks
from ground.errors import UserError
from inference import PSEUDO, Prediction, mask_quality, paint, resize_masks  # Eq. (4)
from matcher import Target
from mean_teacher import MeanTeacher, segments_an_image, update_teacher
from pretrained import segmenter

LEAST_AREA = 5  # pixels; Guided Distillation counts them on the mask grid, by their probabilities


@torch.no_grad()
def keep_instances(
    class_probs: Tensor,
    mask_logits: Tensor,
    class_threshold: float,
    mask_threshold: float,
    least_area: int = 5,
    coupled: float | None = None,
) -> tuple[Tensor, Tensor]:
    """DDTF, Eq. (5): the queries of an image that become instances.

    Args:
        class_probs: (Q, K+1), softmax; index K is no-object. The class quality c is the largest of
            the others (Eq. 3).
        mask_logits: (Q, H, W).    class_threshold, mask_threshold: least c and least m, 0 to 1.
        least_area: pixels; a mask has to have more (public code).
        coupled: instead of the two, the least product c * m, Mask2Former's score: what the
            ablation "- DDTF" thresholds at 0.9 * 0.85 = 0.765.
    Returns: (query (N,), label (N,)), int64, in the order of the queries; empty if none is kept.
    """
    c, label = class_probs[:, :-1].max(-1)
    m = mask_quality(mask_logits)
    good = (c >= class_threshold) & (m >= mask_threshold) if coupled is None else c * m >= coupled
    area = (mask_logits.float().sigmoid() > 0.5).sum((-2, -1))
    query = (good & (area > least_area)).nonzero()[:, 0]
    return query, label[query]


def clip_weight(step: int, burn_in: int, steps: int) -> float:
    """CLIP's share w in the class of a pseudo-label, Eq. (7): from 0.5 at the end of the burn-in
    down to 0 at the end of the training.
    """
    return 0.25 * (math.cos(math.pi * (step - burn_in) / (steps - burn_in)) + 1)


@torch.no_grad()
def correct_classes(teacher_probs: Tensor, clip_probs: Tensor, weight: float) -> Tensor:
    """DICC, Eq. (8) and (9): the classes (N,) int64 that teacher and CLIP agree on.

    teacher_probs, clip_probs: (N, K), both over the classes without no-object.   weight: CLIP's.
    """
    return (weight * clip_probs + (1 - weight) * teacher_probs).argmax(-1)


@torch.no_grad()
def certainty(mask_logits: Tensor) -> Tensor:
    """1 - u of Eq. (10), PMUA's weight of a pixel in the BCE: 0 where the teacher says 0.5, 1 where
    it says 0 or 1. Any shape, the same out.
    """
    return 2 * (mask_logits.float().sigmoid() - 0.5).abs()


# -------------------------------------------------------------------------------- CLIP's opinion


class Namer(nn.Module):
    """A frozen CLIP that is asked for the classes of instances (DICC), and for nothing else.

    clip: an `open_clip.CLIP`.   view, margin: `clip_view` and `clip_margin` of the configuration.
    """

    def __init__(self, clip: nn.Module, vocabulary: Vocabulary, view: str, margin: float):
        super().__init__()
        if view == "pool" and not hasattr(clip.visual, "trunk"):
            raise UserError(
                "--clip-view pool: pools the last map of a ConvNeXt, which --clip-model does not "
                "have; expected one that is a ConvNeXt, or --clip-view crop"
            )
        self.view, self.margin, self.vocabulary = view, margin, vocabulary
        self.visual = ClipBackbone(clip) if view == "pool" else clip.visual
        self.side = int(np.max(clip.visual.image_size))  # pixels
        self.scale = float(clip.logit_scale.detach().exp().clamp(max=MAX_SCALE))
        for name, usual in (("mean", PIXEL_MEAN), ("std", PIXEL_STD)):
            own = getattr(clip.visual, f"image_{name}", None)  # 0 to 1, where a CLIP says it
            values = torch.tensor(usual) if own is None else 255 * torch.tensor(own)
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, image: Tensor, mask_logits: Tensor) -> Tensor:
        """Eq. (6): the classes (N, K) of N instances of an image, softmax.

        image: (3, H, W), 0 to 255, RGB.   mask_logits: (N, H, W), each positive somewhere.
        """
        with torch.autocast(image.device.type, enabled=False):
            if self.view == "pool":
                maps = self.visual(image[None])
                return zero_shot_logits(
                    self.visual, maps[-1], mask_logits[None], self.vocabulary, self.scale
                )[0].softmax(-1)
            masked = self.view == "masked"
            seen = patches(image, mask_logits > 0, self.side, self.margin, masked)
            unit = F.normalize(self.visual((seen - self.mean) / self.std), dim=-1)
            return (self.scale * self.vocabulary.cosine(unit)).softmax(-1)


def patches(
    image: Tensor, masks: Tensor, side: int, margin: float = 0.0, masked: bool = False
) -> Tensor:
    """The boxes of instances, cut from an image and resized: (N, 3, side, side), 0 to 255.

    image: (3, H, W).   masks: (N, H, W) bool, each with a pixel.   margin: around a box, a share of
    its sides.   masked: grey where the mask is not.
    """
    seen = [image.new_zeros(0, 3, side, side, dtype=torch.float32)]
    for mask in masks:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        (top, bottom), (left, right) = (
            _grown(int(line[0]), int(line[-1]) + 1, margin, size)
            for line, size in zip((rows, columns), mask.shape)
        )
        part = image[:, top:bottom, left:right].float()
        if masked:
            part = torch.where(mask[top:bottom, left:right], part, PAD_VALUE)
        cut = F.interpolate(part[None], (side, side), mode="bicubic", antialias=True)
        seen.append(cut.clamp(0, 255))
    return torch.cat(seen)


def _grown(first: int, end: int, margin: float, size: int) -> tuple[int, int]:
    """An interval of pixels with a margin at either end, inside of the image."""
    more = round(margin * (end - first))
    return max(0, first - more), min(size, end + more)


def build_namer(cfg: Config, taxonomy, device) -> Namer | None:
    """The CLIP of DICC, as the configuration says; None where nobody is asked: there is one class.

    Raises: UserError for a class without a name that CLIP could tell from the others'.
    """
    if cfg.clip_view == "none" or len(taxonomy) == 1:
        return None
    named = replace(cfg, pretrained=cfg.clip_pretrained or cfg.pretrained)
    if cfg.clip_model:
        named = replace(cfg, backbone=cfg.clip_model, pretrained=cfg.clip_pretrained)
    clip, vocabulary = segmenter.load_clip(named, taxonomy, device)
    require_names(taxonomy.short_names, vocabulary)
    return Namer(clip, vocabulary, cfg.clip_view, cfg.clip_margin).to(device)


def require_names(names: list[str], vocabulary: Vocabulary) -> None:
    """Raise UserError for classes that are the same to CLIP, as words that it has never read are to
    a small one.
    """
    cosines = vocabulary.cosine(vocabulary.embeddings[vocabulary.names[:, 0]])
    same = (cosines.fill_diagonal_(0) > 1 - 1e-5).nonzero().tolist()
    nameless = [name for name in names if not any(map(str.isalnum, name))]
    if same or nameless:
        which = (
            f"class '{nameless[0]}' has no name"
            if nameless
            else (f"classes '{names[same[0][0]]}' and '{names[same[0][1]]}' are the same words")
        )
        raise UserError(
            f"{which} to CLIP, which is asked for the classes of pseudo-labels; name them in the "
            "data set, choose another CLIP with --clip-model, or do without: --clip-view none"
        )


# ------------------------------------------------------------------------------------- the methods


class Pldc(MeanTeacher):
    """PL-DC. A method as in `engine.method`, which says what its names mean.

    views: of a labelled image: the weak one, and the strong one too.   silent: a batch without any
    pseudo-label teaches nothing, not that there is no object.
    """

    title = "PL-DC"
    views = 2
    silent = True

    @cached_property
    def clip(self) -> Namer | None:
        """Asked for classes of pseudo-labels; no part of `models`: nothing of it is trained."""
        return build_namer(self.cfg, self.taxonomy, self.device)

    @cached_property
    def burn_in(self) -> int:
        return self.cfg.burn_in_steps(self.warm)

    def batches(self, dataset) -> "InstanceBatches":
        _ = self.clip  # its weights are asked for before the first step, not after the burn-in
        return InstanceBatches(dataset, self.cfg, self.cfg.ssl_steps, self.warm, self.views)

    def step(self, batch: tuple[Labeled, Unlabeled | None], t: int) -> dict[str, float]:
        """One step of section 3. During burn-in there are no unlabelled images.

        After NotFinite the teacher may have taken its average: of a student that is finite.
        """
        labeled, unlabeled = batch
        cfg, student = self.cfg, self.models["student"]
        # 0 the teacher: a copy of the student up to the end of the burn-in, then its average
        self.prepare(t)
        pseudo = []
        with self.autocast():
            if unlabeled is None:
                f_labeled = student.backbone(labeled.images)
            else:
                views = labeled.images, unlabeled.strong, unlabeled.weak
                f_labeled, f_strong, f_weak = self.features(*views)
                # 1 pseudo-labels of the weak views: DDTF, DICC, PMUA
                sizes = (unlabeled.weak.shape[-2:],) * 3
                pseudo = self.pseudo_labels(f_weak, sizes, t, unlabeled.weak)
        # 2 the student learns from both: Eq. (1) as a sum of gradients
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.learn_labeled(f_labeled, labeled, t)
        if unlabeled is not None:
            terms |= self.learn_unlabeled(f_strong, pseudo, t)
        # 3 student by gradient (and, if that is asked for, the teacher after it)
        terms = require_finite(terms)
        norm = descend(self.optimizer, cfg)
        if not cfg.ema_first:
            self.average(t)
        row = {"loss": sum(terms.values()), **terms}
        if unlabeled is not None:
            row["pseudo_segments"] = segments_an_image(pseudo, self.device)
        return {**row, "grad_norm": norm}

    def prepare(self, t: int) -> None:
        """The teacher before step t."""
        if t <= self.burn_in:
            update_teacher(self.models["teacher"], self.models["student"], 0.0)
        elif self.cfg.ema_first:
            self.average(t)

    def average(self, t: int) -> None:
        if t >= self.burn_in:
            update_teacher(self.models["teacher"], self.models["student"], self.cfg.ema_decay)

    def learn_labeled(self, features, labeled: Labeled, t: int) -> dict[str, Tensor]:
        first = self.views * ranks.share(self.cfg.labeled_batch).start
        return self.learn("labeled", features, labeled.targets, t, first)

    def learn_unlabeled(self, features, pseudo: list[Target], t: int) -> dict[str, Tensor]:
        cfg = self.cfg
        count = torch.tensor(float(sum(map(len, pseudo))), device=self.device)
        if ranks.total(count) == 0 and self.silent:
            return {f"unlabeled/{name}": count for name in ("class", "mask", "dice")}
        slot = self.views * cfg.labeled_batch + ranks.share(cfg.unlabeled_batch).start
        return self.learn("unlabeled", features, pseudo, t, slot, cfg.lambda_u)

    @torch.no_grad()
    def pseudo_labels(self, features, sizes, t: int | None, images: Tensor) -> list[Target]:
        """Instances of B images, which may overlap.

        images: (B, 3, H, W), the weak views.   sizes, t: as in `MeanTeacher.pseudo_labels`.
        """
        answers = zip(*self.teacher_answer(features, t), images)
        return [self.instances(*answer, sizes, t) for answer in answers]

    def instances(self, posterior, mask_logits, image, sizes, t: int | None) -> Target:
        """Those of one image. posterior: (Q, K+1); mask_logits: (Q, h, w); image: (3, H, W)."""
        cfg = self.cfg
        # DDTF. A mask whose class is too weak can pass neither filter (c m >= t needs c >= t), so
        # it is not drawn at full size.
        sure = posterior[:, :-1].amax(-1) >= (cfg.coupled or cfg.class_threshold)
        posterior, masks = posterior[sure], self.draw(mask_logits[sure], sizes)
        thresholds = cfg.class_threshold, cfg.mask_threshold
        query, label = self.keep(posterior, masks, *thresholds, coupled=cfg.coupled or None)
        probs, masks = posterior[query, :-1], masks[query]
        # DICC
        weight = 0.0 if t is None else clip_weight(t, self.burn_in, cfg.ssl_steps)
        if weight and len(query) and self.clip is not None:
            seen = self.seen(masks, sizes)
            there = (seen > 0).flatten(1).any(1)  # all of a mask may lie in the padding
            probs = probs[there] / probs[there].sum(-1, keepdim=True)
            label[there] = correct_classes(probs, self.clip(image, seen[there]), weight)
        # PMUA
        trust = certainty(masks) if cfg.pixel_certainty else None
        return Target(label, masks=masks > 0, certainty=trust)

    keep = staticmethod(keep_instances)

    @torch.no_grad()
    def pseudo_predictions(self, images: Tensor, sizes: list[tuple], t: int | None, sums: bool):
        padded, maps = padded_size(*images.shape[-2:]), self.models["teacher"].backbone(images)
        for k, (size, output) in enumerate(sizes):
            features = [m[k : k + 1] for m in maps]
            view = images[k : k + 1, :, : size[0], : size[1]]
            (target,) = self.pseudo_labels(features, (padded, size, size), t, view)
            seen = self.seen(target.masks, (padded, size, size)) > 0
            masks = resize(seen[None].float(), output)[0] > 0.5
            scores, added = torch.ones(len(target)), None
            if sums:
                added = torch.zeros(len(self.taxonomy), *output)
                for label, mask in zip(target.labels.tolist(), masks):
                    added[label][mask] = 1
            arrays = paint(masks), target.labels, scores, None, added, masks
            arrays = (None if x is None else x.cpu().numpy() for x in arrays)
            yield k, PSEUDO, Prediction(*arrays)

    def draw(self, mask_logits: Tensor, sizes) -> Tensor:
        """Logits of masks on the grid that pseudo-labels have."""
        return resize_masks(mask_logits, *sizes)

    def seen(self, masks: Tensor, sizes) -> Tensor:
        """Masks of that grid, above 0 inside, at the size of the image."""
        return masks


class Guided(Pldc):
    """Guided Distillation, in three stages: a teacher of labels alone; a new student that learns
    from them and from that teacher, which stays as it is; then the student becomes the teacher, and
    the rest is a Mean Teacher.

    The first is the burn-in, or another run (--init).
    """

    title = "Guided Distillation"
    views = 1
    silent = False

    def __init__(self, cfg, taxonomy, device, precision=torch.float32, clip=None, warm=False):
        super().__init__(cfg, taxonomy, device, precision, clip, warm)
        state = state_of(self.models["student"])
        self.new = {name: value.to("cpu", copy=True) for name, value in state.items()}

    @property
    def end(self) -> int:
        """The first step of the third stage."""
        return self.burn_in + self.cfg.guided_steps

    def prepare(self, t: int) -> None:
        if t <= self.burn_in or t == self.end:
            update_teacher(self.models["teacher"], self.models["student"], 0.0)
        elif self.cfg.ema_first:
            self.average(t)
        if t == self.burn_in < self.end:
            for name, value in state_of(self.models["student"]).items():
                value.copy_(self.new[name])
            self.optimizer.state.clear()

    def average(self, t: int) -> None:
        if t >= self.end:
            super().average(t)

    @staticmethod
    def keep(posterior, masks, class_threshold, mask_threshold, coupled=None):
        """A mask has to have some area by its probabilities, on the mask grid."""
        large = (masks.float().sigmoid().sum((-2, -1)) > LEAST_AREA).nonzero()[:, 0]
        thresholds = class_threshold, mask_threshold
        query, label = keep_instances(posterior[large], masks[large], *thresholds, 0, coupled)
        return large[query], label

    def draw(self, mask_logits: Tensor, sizes) -> Tensor:
        return mask_logits

    def seen(self, masks: Tensor, sizes) -> Tensor:
        # Enlarged as they are, not as logits, of which a single weak cell would be gone.
        return resize_masks((masks > 0).float(), *sizes) - 0.5


# ----------------------------------------------------------------------------------------- batches


class InstanceBatches(SemiSupervisedBatches):
    """Labelled images in `views` views (weak; weak and strong, side by side), and unlabelled ones
    in both. No CutMix. Views are padded before they are made strong.
    """

    def __init__(self, dataset, cfg: Config, steps: int, warm: bool, views: int):
        cfg = replace(cfg, cutmix_prob=0.0, colour=False)
        super().__init__(dataset, cfg, steps, warm)
        self.views = views

    def __getitem__(self, step: int) -> tuple[Labeled, Unlabeled | None]:
        labeled, unlabeled = super().__getitem__(step)
        return (labeled if self.views == 1 else self._both(labeled, step)), unlabeled

    def _both(self, labeled: Labeled, step: int) -> Labeled:
        slots = self.slots(self.cfg.labeled_batch)
        images = [
            view
            for image, slot in zip(labeled.images, slots)
            for view in (image, strong_view(image, self.cfg, self.rng("strong", step, slot)))
        ]
        targets, names = (
            [x for x in of for _ in (0, 1)] for of in (labeled.targets, labeled.names)
        )
        return Labeled(torch.stack(images), targets, names)

    def _two_views(self, rng) -> tuple[str, Tensor, Tensor]:
        train, i = self.dataset.train, rng.choice(self.dataset.unlabeled)
        weak, _ = weak_view(Sample(train.image(i), []), self.cfg, rng)
        weak = pad_image(weak, self.cfg.crop_size)
        return train.name(i), weak, strong_view(weak, self.cfg, rng)
