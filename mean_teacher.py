"""The semi-supervised step: a teacher labels weakly augmented images, the student learns them
strongly augmented.

Implements Eq. (1), labelled plus unlabelled loss, and Eq. (2), the teacher as moving average of the
student; the teacher's class posteriors are ensembled with CLIP's (Eq. 6) before hard panoptic
pseudo-labels are read off. `Supervised` is the baseline, `MeanTeacher` plain SSL, DEAR and DEARLi:
they differ in the posterior and in what the student starts from.
Differs from the paper: nothing. The burn-in (supervised steps before the first pseudo-label) is 0
officially.
Sources: Mean Teacher (arXiv:1703.01780), CutMix (arXiv:1905.04899).
Axes: B images, Q queries, K classes, N segments, S pixels of a side.
Try: `python dearli.py --stage ssl --method dear --steps 350 --burn-in 0 --out runs/try-burn-in`: a
teacher that begins without having learned anything.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from clip_ensemble import padded_size
from config import Config, alpha_at
from data import Labeled, LabeledBatches, SemiSupervisedBatches, Unlabeled
from engine.checkpoint import state_of
from engine.optim import Broken, build_optimizer, descend, require_finite
from ground import ranks
from inference import (
    POSTERIORS,
    PSEUDO,
    Prediction,
    join_stuff,
    papers_reading,
    predict,
    segments,
    semantic_inference,
)
from instance_eval import ErrorTypes, MaskAP
from losses import learn, point_generators
from matcher import Target
from model import Segmenter
from panoptic_eval import PanopticScore, SemanticScore
from pretrained.segmenter import build


class Supervised:
    """The supervised baseline: labelled images only. A method as in `engine.method`, which says
    what its names mean.
    """

    title = "supervised"

    def __init__(self, cfg, taxonomy, device, precision=torch.float32, clip=None, warm=False):
        self.cfg, self.taxonomy, self.device = cfg, taxonomy, device
        self.precision, self.warm = precision, warm
        self.models = {"student": self.network(clip)}
        self.things = torch.tensor(taxonomy.things)  # asked one by one: a GPU would wait each time

    def network(self, clip: dict | None) -> Segmenter:
        return build(self.cfg, self.taxonomy, self.device, clip)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.models["student"], self.cfg)

    @cached_property
    def counted(self) -> Tensor:
        """(K,) bool, the things of what is learned: semantic labels have one segment a class."""
        return torch.tensor(self.taxonomy.things) & (self.cfg.labels != "semantic")

    def batches(self, dataset) -> LabeledBatches:
        return LabeledBatches(dataset, self.cfg, self.cfg.sup_steps)

    def step(self, labeled: Labeled, t: int) -> dict[str, float]:
        """The labelled half of Eq. (1)."""
        with self.autocast():
            features = self.models["student"].backbone(labeled.images)
        self.optimizer.zero_grad(set_to_none=True)
        terms = require_finite(self.learn_labeled(features, labeled, t))
        norm = descend(self.optimizer, self.cfg)
        return {"loss": sum(terms.values()), **terms, "grad_norm": norm}

    def learn_labeled(self, features, labeled: Labeled, t: int) -> dict[str, Tensor]:
        first = ranks.share(self.cfg.labeled_batch).start
        return self.learn("labeled", features, labeled.targets, t, first)

    def learn(self, kind: str, features, targets, t: int, slot: int, weight=1.0) -> dict:
        """Eq. (3) of the student and its gradient. slot: of the first image, for its sampled
        points.
        """
        head, cfg = self.models["student"].head, self.cfg
        generators = point_generators(cfg.seed, t, slot, len(targets), self.device)
        losses = learn(head, features, targets, cfg.loss, generators, self.precision, weight)
        return {f"{kind}/{name}": value for name, value in losses.items()}

    def autocast(self):
        """For the model's matrix products; losses, matching and the ensemble are always fp32."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled)

    @property
    def metrics(self) -> tuple:
        instances = self.cfg.labels == "instances"
        return (MaskAP, ErrorTypes) if instances else (PanopticScore, SemanticScore)

    @property
    def readings(self) -> dict[str, str]:
        posteriors = ("decoder", "ensemble") if self.cfg.has_ensemble else ("decoder",)
        models = [name for name in ("student", "teacher") if name in self.models]
        return {f"{model}/{p}": POSTERIORS[p] for model in models for p in posteriors}

    @property
    def reading(self) -> str:
        """The paper reads DEAR and DEARLi with the ensemble, the others from the decoder alone
        (Table 1).
        """
        return papers_reading(self.cfg.teacher_posterior)

    @property
    def pictured(self) -> dict[str, str]:
        return {"student/clip": POSTERIORS["clip"]} if self.cfg.has_ensemble else {}

    def predict(self, images, sizes, readings, t=None, semantic=True, sums=False):
        """See `inference.predict`."""
        alphas = {"decoder": 1.0, "clip": 0.0, "ensemble": alpha_at(self.cfg.alpha, 1.0)}
        alphas = {reading: alphas[reading.split("/")[1]] for reading in readings}
        return predict(self.models, alphas, images, sizes, self.things, self.cfg, semantic, sums)


class MeanTeacher(Supervised):
    """SSL, DEAR and DEARLi. Subclasses that make other pseudo-labels replace `teacher_answer` or
    `pseudo_labels`.
    """

    title = "Mean Teacher"

    def __init__(self, cfg, taxonomy, device, precision=torch.float32, clip=None, warm=False):
        super().__init__(cfg, taxonomy, device, precision, clip, warm)
        self.models["teacher"] = self.models["student"].teacher()

    def batches(self, dataset) -> SemiSupervisedBatches:
        return SemiSupervisedBatches(dataset, self.cfg, self.cfg.ssl_steps, self.warm)

    def step(self, batch: tuple[Labeled, Unlabeled | None], t: int) -> dict[str, float]:
        """One step of Eq. (1) and (2). During burn-in there are no unlabelled images, and the
        teacher is the student.
        """
        labeled, unlabeled = batch
        cfg, student, teacher = self.cfg, self.models["student"], self.models["teacher"]
        pseudo = []
        with self.autocast():
            if unlabeled is None:
                f_labeled = student.backbone(labeled.images)
            else:
                # 1 the views; a frozen backbone is shared and sees all of them in one pass
                strong = mix_images(unlabeled.strong, unlabeled.partner_strong, unlabeled.boxes)
                weak = torch.cat([unlabeled.weak, unlabeled.partner_weak])
                f_labeled, f_strong, f_weak = self.features(labeled.images, strong, weak)
                # 2 pseudo-labels of the weak views; then CutMix, the same boxes as on the images
                size = weak.shape[-2:]
                pseudo = self.pseudo_labels(f_weak, (size, size, size), t)
                first, partners = pseudo[: len(strong)], pseudo[len(strong) :]
                pseudo = mix_targets(first, partners, unlabeled.boxes, self.counted)
        # 3 the student learns from both, without the ensemble: Eq. (3) each, Eq. (1) as a sum of
        # gradients
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.learn_labeled(f_labeled, labeled, t)
        if unlabeled is not None:
            slot = cfg.labeled_batch + ranks.share(cfg.unlabeled_batch).start
            terms |= self.learn("unlabeled", f_strong, pseudo, t, slot, cfg.lambda_u)
        # 4 student by gradient, then teacher by average
        terms = require_finite(terms)
        norm = descend(self.optimizer, cfg)
        update_teacher(teacher, student, ema_decay(t, cfg, self.warm))  # Eq. (2)
        row = {"loss": sum(terms.values()), **terms}
        if unlabeled is not None:
            row["pseudo_segments"] = segments_an_image(pseudo, self.device)
        return {**row, "grad_norm": norm}

    def features(self, labeled: Tensor, strong: Tensor, weak: Tensor):
        """Backbone features of three groups of images: one pass if the frozen backbone is shared,
        else one each.
        """
        student, teacher = self.models["student"], self.models["teacher"]
        if student.backbone is teacher.backbone:
            maps = student.backbone(torch.cat([labeled, strong, weak]))
            return zip(*(m.split([len(labeled), len(strong), len(weak)]) for m in maps))
        with torch.no_grad():
            of_teacher = teacher.backbone(weak)
        return student.backbone(labeled), student.backbone(strong), of_teacher

    @property
    def pictured(self) -> dict[str, str]:
        pseudo = (
            {PSEUDO: POSTERIORS[self.cfg.teacher_posterior]} if "teacher" in self.models else {}
        )
        return {**super().pictured, **pseudo}

    def predict(self, images, sizes, readings, t=None, semantic=True, sums=False):
        """Also of PSEUDO: the labels that the student would get, without scores of their own."""
        others = [r for r in readings if r != PSEUDO]
        yield from super().predict(images, sizes, others, t, semantic, sums)
        if PSEUDO in readings:
            yield from self.pseudo_predictions(images, sizes, t, sums)

    @torch.no_grad()
    def pseudo_predictions(self, images: Tensor, sizes: list[tuple], t: int | None, sums: bool):
        padded, maps = padded_size(*images.shape[-2:]), self.models["teacher"].backbone(images)
        for k, size in enumerate(sizes):
            features = [m[k : k + 1] for m in maps]
            (target,) = self.pseudo_labels(features, (padded, *size), t)
            labels = target.labels.cpu().numpy()
            segment_map = target.segment_map.cpu().numpy()
            scores, added = np.ones(len(labels), np.float32), None
            if sums:
                classes = np.arange(len(self.taxonomy))[:, None, None]
                added = (np.append(-1, labels)[segment_map] == classes).astype(np.float32)
            yield k, PSEUDO, Prediction(segment_map, labels, scores, sums=added)

    def teacher_answer(self, features: list[Tensor], t: int | None) -> tuple[Tensor, Tensor]:
        """What pseudo-labels of step t are made of: class posterior (B, Q, K+1), Eq. (4)-(6), and
        mask_logits (B, Q, h, w). t: None: at the end of the training.
        """
        teacher = self.models["teacher"]
        class_logits, mask_logits = teacher.predict(features)
        alpha = teacher_alpha(self.cfg, t, self.warm)
        return teacher.posterior(features, class_logits, mask_logits, alpha), mask_logits

    @torch.no_grad()
    def pseudo_labels(self, features: list[Tensor], sizes, t: int | None) -> list[Target]:
        """Hard pseudo-labels of B images at full resolution.

        sizes: (padded, image, output) of all of them, as in `inference.resize_masks`.   t: as in
        `teacher_answer`.
        No confidence threshold and no area filter beside the rules of panoptic inference, which
        with --merging masks ask a quality of things, --least-quality. Semantic ones (cfg.labels)
        are the classes of semantic inference, a segment each; no pixel is void.
        """
        targets, cfg = [], self.cfg
        for posterior, mask_logits in zip(*self.teacher_answer(features, t)):
            if cfg.labels == "semantic":
                classes = semantic_inference(posterior, mask_logits, sizes)
                labels, segment_map = classes.unique(return_inverse=True)
                targets.append(Target(labels, (segment_map + 1).int()))
                continue
            segment_map, labels, _ = segments(posterior, mask_logits, self.counted, sizes, cfg)
            targets.append(Target(labels, segment_map))
        return targets


def segments_an_image(targets: list[Target], device) -> float:
    """Of all ranks."""
    counts = torch.tensor([sum(map(len, targets)), len(targets)], dtype=torch.float32)
    segments, images = ranks.total(counts.to(device)).tolist()
    return segments / images


def mix_images(images: Tensor, partners: Tensor, boxes) -> Tensor:
    """CutMix of images (B, 3, S, S): inside its box, each image shows its partner. Partners only of
    images with a box.
    """
    mixed, partner = images.clone(), iter(partners)
    for image, box in zip(mixed, boxes):
        if box is not None:
            top, bottom, left, right = box
            image[:, top:bottom, left:right] = next(partner)[:, top:bottom, left:right]
    return mixed


def mix_targets(
    targets: list[Target], partners: list[Target], boxes, things: Tensor
) -> list[Target]:
    """CutMix of pseudo-labels, with the boxes of the images; see `mix_target`."""
    partner = iter(partners)
    return [
        t if box is None else mix_target(t, next(partner), box, things)
        for t, box in zip(targets, boxes)
    ]


def mix_target(
    first: Target, second: Target, box: tuple[int, int, int, int], things: Tensor
) -> Target:
    """Paste the second partition into the box of the first, void included.

    Segments without a pixel left are dropped; stuff of one class from both images becomes one
    segment; things stay apart.
    """
    top, bottom, left, right = box
    shifted = torch.where(second.segment_map > 0, second.segment_map + len(first), 0)
    mixed = first.segment_map.clone()
    mixed[top:bottom, left:right] = shifted[top:bottom, left:right].to(mixed.dtype)
    labels = torch.cat([first.labels, second.labels])
    pixels = torch.bincount(mixed.flatten(), minlength=len(labels) + 1).tolist()
    segments, number = join_stuff(labels.tolist(), [n > 0 for n in pixels[1:]], things)
    number = torch.tensor([0, *number], dtype=mixed.dtype, device=mixed.device)
    return Target(labels[segments], number[mixed.long()])


def teacher_alpha(cfg: Config, step: int | None, warm: bool) -> float:
    """The decoder's share in the posterior that makes the pseudo-labels of a step (None: after the
    last): P_MT, P_CLIP or P_ENS (Table 7).
    """
    if cfg.teacher_posterior != "ensemble":
        return {"decoder": 1.0, "clip": 0.0}[cfg.teacher_posterior]
    if step is None:
        return alpha_at(cfg.alpha, 1.0)
    burn_in = cfg.burn_in_steps(warm)
    return alpha_at(cfg.alpha, max(step - burn_in, 0) / max(cfg.ssl_steps - burn_in, 1))


def ema_decay(step: int, cfg: Config, warm: bool) -> float:
    """The decay of Eq. (2) at a step, from 0.

    During burn-in 0: the teacher is the student. From a random start min(1 - 1/(t+1), ema_decay),
    so the first step copies the student; after a burn-in, or from DeWa weights, constant.
    """
    burn_in = cfg.burn_in_steps(warm)
    if step < burn_in:
        return 0.0
    if burn_in or warm:
        return cfg.ema_decay
    return min(1 - 1 / (step + 1), cfg.ema_decay)


@torch.no_grad()
def update_teacher(teacher: Segmenter, student: Segmenter, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, Eq. (2), over what training changes,
    paired by name.

    Counters and other integers are copied.
    Raises: Broken if a weight of the student is not finite: an average would keep a NaN for ever.
    """
    source, average = state_of(student), state_of(teacher)
    real = [name for name, value in source.items() if value.is_floating_point()]
    values = [source[name] for name in real]
    norms = torch.stack(torch._foreach_norm(values))
    if not torch.isfinite(norms).all():
        bad = [name for name, norm in zip(real, norms) if not torch.isfinite(norm)]
        raise Broken(
            f"student weights are not finite: {', '.join(bad[:5])}; the teacher was left as it was"
        )
    torch._foreach_lerp_([average[name] for name in real], values, 1 - decay)
    for name in source.keys() - set(real):
        average[name].copy_(source[name])
