"""The semi-supervised step: a teacher labels weakly augmented images, the student learns them strongly augmented.

Implements Eq. (1), labelled plus unlabelled loss, and Eq. (2), the teacher as moving average of the student; the teacher's
class posteriors are ensembled with CLIP's (Eq. 6) before hard panoptic pseudo-labels are read off.
Differs from the paper: nothing. The burn-in (supervised steps before the first pseudo-label) is 0 officially.
Sources: Mean Teacher (arXiv:1703.01780), CutMix (arXiv:1905.04899).    Axes: B images, N segments, S pixels of a side.
Try: `python dearli.py --stage ssl --method dear --steps 350 --burn-in 0 --out runs/try-burn-in`: a teacher that begins without having learned anything.
"""

import torch
from torch import Tensor

from config import Config, alpha_at
from data import Labeled, Unlabeled
from engine.optim import Broken, descend, require_finite
from ground import ranks
from losses import learn, point_generators
from matcher import Target
from model import Segmenter, panoptic_inference, semantic_inference


def train_step(
    student: Segmenter,
    teacher: Segmenter | None,
    optimizer: torch.optim.Optimizer,
    labeled: Labeled,
    unlabeled: Unlabeled | None,
    things: Tensor,
    cfg: Config,
    step: int,
    warm: bool = False,
    precision: torch.dtype = torch.float32,
) -> dict[str, float]:
    """One Mean Teacher step, Eq. (1) and (2). Without unlabelled images: a supervised step.

    Args:
        things: (K,) bool; none of them with semantic labels.     step: from 0.     warm: the teacher started from DeWa weights (constant decay).
        precision: of the model's matrix products; losses, matching and the ensemble are always fp32.
    Returns: the loss terms, weighted, and the gradient norm, as floats.
    Raises: NotFinite, with both models as they were; Broken, with the teacher as it was, if the student is lost.
    """
    device = labeled.images.device
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        if unlabeled is None:
            f_labeled = student.backbone(labeled.images)
        else:
            # 1 the views; a frozen backbone is shared and sees all of them in one pass
            strong = mix_images(unlabeled.strong, unlabeled.partner_strong, unlabeled.boxes)
            weak = torch.cat([unlabeled.weak, unlabeled.partner_weak])
            f_labeled, f_strong, f_weak = backbone_features(
                student, teacher, labeled.images, strong, weak
            )
            # 2 pseudo-labels: weak views, teacher, CLIP ensemble; then CutMix, the same boxes as on the images
            pseudo = pseudo_labels(
                teacher, f_weak, things, weak.shape[-2:], teacher_alpha(cfg, step, warm)
            )
            pseudo = mix_targets(
                pseudo[: len(strong)], pseudo[len(strong) :], unlabeled.boxes, things
            )
    # 3 the student learns from both, without the ensemble: Eq. (3) for each, and Eq. (1) as a sum of gradients
    optimizer.zero_grad(set_to_none=True)
    draws = point_generators(
        cfg.seed, step, ranks.share(cfg.labeled_batch).start, len(labeled.targets), device
    )
    terms = {
        f"labeled/{k}": v
        for k, v in learn(
            student.head, f_labeled, labeled.targets, cfg.loss, draws, precision
        ).items()
    }
    if unlabeled is not None:
        draws = point_generators(
            cfg.seed,
            step,
            cfg.labeled_batch + ranks.share(cfg.unlabeled_batch).start,
            len(pseudo),
            device,
        )
        terms |= {
            f"unlabeled/{k}": v
            for k, v in learn(
                student.head, f_strong, pseudo, cfg.loss, draws, precision, cfg.lambda_u
            ).items()
        }
    # 4 student by gradient, then teacher by average
    terms = require_finite(terms)
    loss = sum(terms.values())
    norm = descend(optimizer, cfg)
    if teacher is not None:
        update_teacher(teacher, student, ema_decay(step, cfg, warm))  # Eq. (2)
    if unlabeled is not None:
        segments, images = ranks.total(
            torch.tensor([sum(map(len, pseudo)), len(pseudo)], dtype=torch.float32, device=device)
        ).tolist()
        terms["pseudo_segments"] = segments / images
    return {"loss": loss, **terms, "grad_norm": norm}


def backbone_features(
    student: Segmenter, teacher: Segmenter, labeled: Tensor, strong: Tensor, weak: Tensor
):
    """Features of the three groups of images: one pass if the frozen backbone is shared, one each if it is trained."""
    if student.backbone is teacher.backbone:
        maps = student.backbone(torch.cat([labeled, strong, weak]))
        return zip(*(m.split([len(labeled), len(strong), len(weak)]) for m in maps))
    with torch.no_grad():
        of_teacher = teacher.backbone(weak)
    return student.backbone(labeled), student.backbone(strong), of_teacher


@torch.no_grad()
def pseudo_labels(
    teacher: Segmenter, features: list[Tensor], things: Tensor, size, alpha: float
) -> list[Target]:
    """Hard panoptic pseudo-labels of B images: Eq. (4)-(6), then panoptic inference at full resolution `size` = (H, W).

    No confidence threshold and no area filter: a segment is in or out by the rules of panoptic inference alone.
    Semantic ones (cfg.labels) are the classes of semantic inference, a segment each; no pixel is void.
    """
    class_logits, mask_logits = teacher.predict(features)
    posterior = teacher.posterior(features, class_logits, mask_logits, alpha)
    targets = []
    for p, m in zip(posterior, mask_logits):
        if teacher.cfg.labels == "semantic":
            labels, segment_map = semantic_inference(p, m, (size, size, size)).unique(
                return_inverse=True
            )
            targets.append(Target(labels, (segment_map + 1).int()))
            continue
        segment_map, labels, _ = panoptic_inference(
            p,
            m,
            things,
            (size, size, size),
            teacher.cfg.object_mask_threshold,
            teacher.cfg.overlap_threshold,
        )
        targets.append(Target(labels, segment_map))
    return targets


def mix_images(images: Tensor, partners: Tensor, boxes) -> Tensor:
    """CutMix of images (B, 3, S, S): inside its box, each image shows its partner. Partners only of images with a box."""
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

    Segments without a pixel left are dropped; stuff of one class from both images becomes one segment; things stay apart.
    """
    top, bottom, left, right = box
    shifted = torch.where(second.segment_map > 0, second.segment_map + len(first), 0)
    mixed = first.segment_map.clone()
    mixed[top:bottom, left:right] = shifted[top:bottom, left:right].to(mixed.dtype)
    labels = torch.cat([first.labels, second.labels])
    present = torch.bincount(mixed.flatten(), minlength=len(labels) + 1).tolist()
    lut, stuff, kept = [0] * (len(labels) + 1), {}, []
    for k, label in enumerate(labels.tolist()):
        if not present[k + 1]:
            continue
        if label in stuff:
            lut[k + 1] = stuff[label]
            continue
        kept.append(k)
        lut[k + 1] = len(kept)
        if not things[label]:
            stuff[label] = len(kept)
    return Target(
        labels[kept], torch.tensor(lut, dtype=mixed.dtype, device=mixed.device)[mixed.long()]
    )


def teacher_alpha(cfg: Config, step: int, warm: bool) -> float:
    """The decoder's share in the posterior that makes the pseudo-labels of a step: P_MT, P_CLIP or P_ENS (Table 7)."""
    if cfg.teacher_posterior != "ensemble":
        return {"decoder": 1.0, "clip": 0.0}[cfg.teacher_posterior]
    burn_in = cfg.burn_in_steps(warm)
    return alpha_at(cfg.alpha, max(step - burn_in, 0) / max(cfg.ssl_steps - burn_in, 1))


def ema_decay(step: int, cfg: Config, warm: bool) -> float:
    """The decay of Eq. (2) at a step, from 0.

    During burn-in 0: the teacher is the student. From a random start min(1 - 1/(t+1), ema_decay), so the first step copies
    the student; after a burn-in, or from DeWa weights, constant.
    """
    burn_in = cfg.burn_in_steps(warm)
    if step < burn_in:
        return 0.0
    if burn_in or warm:
        return cfg.ema_decay
    return min(1 - 1 / (step + 1), cfg.ema_decay)


@torch.no_grad()
def update_teacher(teacher: Segmenter, student: Segmenter, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, Eq. (2), over what is trained, paired by name.

    Raises: Broken if a weight of the student is not finite: an average would keep a NaN for ever.
    """
    source, average = student.trained(), teacher.trained()
    norms = torch.stack(torch._foreach_norm(list(source.values())))
    if not torch.isfinite(norms).all():
        bad = [name for name, norm in zip(source, norms) if not torch.isfinite(norm)]
        raise Broken(
            f"student weights are not finite: {', '.join(bad[:5])}; the teacher was left as it was"
        )
    torch._foreach_lerp_([average[name] for name in source], list(source.values()), 1 - decay)
