"""Enhanced soft labels (ESL): pseudo-labels that keep the classes between which the teacher is
undecided, and parts of objects that are told apart by contrast.

Implements the dynamic soft label and its cross-entropy, and the pixel-to-part contrastive loss;
prototypes and queues of the parts are in `part_bank.py`.
Differs from the paper: the segmentation head has two of three blocks, logits having a sign; what
it leaves open is in docs/differences.md.
Axes: B images, C classes, K parts a class, H W pixels, N pixels of several images, A anchors, L
channels of the projection, L' of the encoder.
Sources: Enhanced Soft Label for Semi-Supervised Semantic Segmentation (ICCV 2023), which has no
public code; U2PL (arXiv:2203.03884), whose protocol it shares.
Try: `python dearli.py --stage ssl --method esl --steps 60 --eta 0 --out runs/try-esl`:
arg-max labels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_ensemble import resize
from data import Labeled, LabeledBatches, SemiSupervisedBatches, Unlabeled
from deeplab import IGNORE, Maps
from ground import ranks
from inference import PSEUDO, Prediction
from losses import point_generators
from mean_teacher import ema_decay, mix_images, update_teacher
from part_bank import PartBank, kmeans, pooled
from semantic import Baseline, as_it_was, class_maps, image_shown, nearest

PARTS = "student/parts"  # a reading: its classes, divided into parts of objects


# -------------------------------------------------------------------------------- soft labels


@torch.no_grad()
def soft_label(probs: Tensor, eta: float) -> Tensor:
    """Dynamic soft labels (B, C, H, W): the fewest classes that reach eta together, renormalised.

    probs: (B, C, H, W), 0 to 1, over C they sum to 1.   eta: 0 to 1; 0 is the arg-max, a hard
    label. Classes that are as probable as the last one of these are in, too. Sums to 1 over C.
    """
    ordered = probs.sort(1, descending=True).values
    needed = ordered.cumsum(1)[:, :-1] < eta  # one class more than these; the last needs no sum
    least = ordered.gather(1, needed.sum(1, keepdim=True))
    kept = torch.where(probs >= least, probs, 0)
    return kept / kept.sum(1, keepdim=True)


def soft_cross_entropy(logits: Tensor, soft: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy with soft labels, the mean over valid pixels; of several ranks a share of it.

    logits, soft: (B, C, H, W).   valid: (B, H, W) bool; without any the loss is 0.
    """
    soft = torch.where(valid[:, None], soft, 0)
    count = ranks.total(valid.sum()).clamp(min=1)
    return -(soft * logits.float().log_softmax(1)).sum() / count


# ------------------------------------------------------------------------------------ contrast


def contrastive_loss(
    anchors: Tensor,
    anchor_class: Tensor,
    anchor_part: Tensor,
    bank: PartBank,
    sigma: float,
    negatives: int,
    draws: Tensor | None = None,
) -> Tensor:
    """The pixel-to-part contrastive loss: an anchor resembles an entry of its own part's queue and
    none of the others; the mean over the anchors of a class, then over classes that have any.

    anchors: (A, L), student's projections; the bank has no gradient.   anchor_class, anchor_part:
    (A,).   sigma: temperature of the cosine.   draws: as in `PartBank.sample`.
    Returns: a scalar, of several ranks a share of it. Anchors whose own queue is empty are left
    out; without any the loss is 0.
    """
    positive, negative = bank.sample(anchor_class, anchor_part, negatives, draws)
    usable = positive >= 0
    kept, classes = anchors.float()[usable], anchor_class[usable]
    positive, negative = positive[usable], negative[usable]
    counts = ranks.total(classes.bincount(minlength=bank.classes))
    share = counts[classes] * (counts > 0).sum()  # anchors of the class times classes
    entries = F.normalize(bank.entries(), dim=-1)
    similar = F.normalize(kept, dim=-1) @ entries.T / sigma  # (A, E), log phi
    same = similar.gather(1, positive[:, None])
    other = similar.gather(1, negative.clamp(min=0)).masked_fill(negative < 0, -torch.inf)
    terms = torch.cat([same, other], 1).logsumexp(1) - same[:, 0]
    return (terms / share).sum() + 0 * anchors.float().sum()


# ------------------------------------------------------------------------------------ methods


class ESL(Baseline):
    """Enhanced soft labels; with eta = 0 and without contrast the hard baseline."""

    title = "ESL"

    def __init__(self, cfg, taxonomy, device, precision=torch.float32, clip=None, warm=False):
        super().__init__(cfg, taxonomy, device, precision, clip, warm)
        student = self.models["student"]
        self.models["teacher"] = student.teacher()
        if self.projects:
            dims = student.backbone.channels[-1], cfg.projection
            bank = PartBank(len(taxonomy), cfg.parts, *dims, cfg.queue, cfg.part_momentum)
            self.models["bank"] = bank.to(device)

    @property
    def projects(self) -> bool:
        return self.cfg.contrast_weight > 0

    def batches(self, dataset) -> SemiSupervisedBatches:
        self.dataset = dataset  # for the first prototypes
        return SemiSupervisedBatches(dataset, self.cfg, self.cfg.ssl_steps, self.warm)

    def step(self, batch: tuple[Labeled, Unlabeled | None], t: int) -> dict[str, float]:
        """L_CE + lambda_1 L_SCE + lambda_2 L_CTR, then the teacher, then the bank. During burn-in
        L_CE alone.
        """
        labeled, unlabeled = batch
        cfg, student, teacher = self.cfg, self.models["student"], self.models["teacher"]
        classes, row, memory = class_maps(labeled.targets), {}, None
        with as_it_was(student, teacher):
            if unlabeled is None:
                terms = self.labeled_terms(self.run(student, labeled.images), classes)
            else:
                # 1 the teacher sees weak views; its soft labels, and CutMix as of the images
                seen = self.seen(labeled.images, unlabeled)
                soft, valid = self.soft_labels(seen, unlabeled)
                row["soft_classes"] = _mean(((soft > 0).sum(1) * valid).sum(), valid.sum())
                # 2 the student learns both, in one pass: batch norm is of all of them
                strong = mix_images(unlabeled.strong, unlabeled.partner_strong, unlabeled.boxes)
                maps = self.run(student, torch.cat([labeled.images, strong]))
                terms = self.labeled_terms(maps, classes)
                own = student.upsample(maps.logits[len(classes) :].float(), strong.shape[-2:])
                terms["unlabeled/soft"] = cfg.lambda_u * soft_cross_entropy(own, soft, valid)
                if self.projects:  # 3 parts of objects
                    contrast, memory = self.contrast(maps, seen, classes, unlabeled, t)
                    terms["unlabeled/contrast"] = cfg.contrast_weight * contrast
            row = {**self.descend(terms), **row}
        self.average(ema_decay(t, cfg, self.warm))
        if memory is not None:
            self.models["bank"].update(*memory)
        return row

    @torch.no_grad()
    def seen(self, labeled: Tensor, unlabeled: Unlabeled) -> Maps:
        """The teacher's maps of weak views: labelled, unlabelled, partners of CutMix."""
        teacher = self.models["teacher"].eval()
        teacher.batch_statistics(self.cfg.teacher_norm == "batch")
        views = torch.cat([labeled, unlabeled.weak, unlabeled.partner_weak])
        maps = self.run(teacher, views)
        teacher.batch_statistics(False)
        return maps

    @torch.no_grad()
    def soft_labels(self, seen: Maps, unlabeled: Unlabeled) -> tuple[Tensor, Tensor]:
        """(B, C, S, S) soft labels of the mixed images; (B, S, S) which pixels show an image."""
        count, size = len(unlabeled.weak), unlabeled.weak.shape[-2:]
        logits = seen.logits[-count - len(unlabeled.partner_weak) :].float()
        probs = self.models["teacher"].upsample(logits, size).softmax(1)
        soft, boxes = soft_label(probs, self.cfg.eta), unlabeled.boxes
        there = [image_shown(views)[:, None] for views in (unlabeled.weak, unlabeled.partner_weak)]
        valid = mix_images(*there, boxes)[:, 0]
        return mix_images(soft[:count], soft[count:], boxes), valid

    def contrast(self, maps: Maps, seen: Maps, labels: Tensor, unlabeled: Unlabeled, t: int):
        """L_CTR of the student's maps, and what the bank takes in after the step
        (`PartBank.update`).

        labels: (B, H, W) ground truth of the labelled images.
        """
        cfg, student, bank = self.cfg, self.models["student"], self.models["bank"]
        if not bank.ready:
            self.initialise(bank)
        grid, first = maps.logits.shape[-2:], len(labels)
        classes, sure = self.grid_classes(seen, labels, unlabeled, grid)
        with torch.no_grad(), self.autocast():
            keys = self.models["teacher"].project(seen.decoder)
        slots = self.slots(first, len(unlabeled.weak))
        parts, memory = self.parts(seen.encoder, keys, classes, slots)
        if t < cfg.contrast_start:
            return maps.logits.sum() * 0, memory
        candidates = torch.where(sure, classes, IGNORE)
        labeled, unmixed = candidates[:first], candidates[first:]
        mixed = mix_grids(unmixed, unlabeled)
        candidates = torch.cat([labeled, mixed])
        parts = torch.cat([parts[:first], mix_grids(parts[first:], unlabeled)])
        with self.autocast():
            vectors = student.project(maps.decoder)
        anchors = self.anchors(vectors.float(), candidates, parts, slots, t)
        rest = bank, cfg.contrast_temperature, cfg.negatives
        return contrastive_loss(*anchors[:3], *rest, anchors[3]), memory

    def slots(self, labeled: int, unlabeled: int) -> list[int]:
        """Places of this rank's images in the batch of all: labelled ones first."""
        cfg = self.cfg
        first = ranks.share(cfg.labeled_batch).start
        second = cfg.labeled_batch + ranks.share(cfg.unlabeled_batch).start
        return [*range(first, first + labeled), *range(second, second + unlabeled)]

    @torch.no_grad()
    def grid_classes(self, seen: Maps, labels: Tensor, unlabeled: Unlabeled, grid):
        """Of the images in `seen` on the grid of the projections: the class of every pixel, IGNORE
        where there is none, and whether it may be an anchor; (B, h, w) both.
        """
        probs = seen.logits[len(labels) :].float().softmax(1)
        confidence, classes = probs.max(1)
        there = image_shown(torch.cat([unlabeled.weak, unlabeled.partner_weak]))
        classes = torch.where(nearest(there, grid), classes, IGNORE)
        true = nearest(labels, grid)
        sure = torch.cat([true != IGNORE, confidence > self.cfg.anchor_confidence])
        return torch.cat([true, classes]), sure

    @torch.no_grad()
    def parts(self, encoder: Tensor, keys: Tensor, classes: Tensor, slots: list[int]):
        """(B, h, w) parts of all pixels; and of the images that have a slot the means of parts, as
        `PartBank.update` takes them.

        One image at a time: the encoder's features on the grid fill the memory.
        """
        bank, parts, rows = self.models["bank"], torch.zeros_like(classes), []
        for k, own in enumerate(classes):
            features = resize(encoder[k : k + 1].float(), own.shape)[0].flatten(1).T  # (hw, L')
            place = (own != IGNORE).flatten()
            own, features = own.flatten()[place], features[place]
            part = bank.part_of(features, own)
            parts[k].view(-1)[place] = part
            if k < len(slots):
                vectors = keys[k].flatten(1).T[place]
                key, pixels, *means = pooled(
                    own * bank.parts + part, torch.ones_like(own), features, vectors
                )
                image = torch.full_like(key, slots[k])
                rows.append((*means, key // bank.parts, key % bank.parts, image, pixels))
        return parts, [torch.cat(column) for column in zip(*rows)]

    def anchors(self, vectors: Tensor, classes: Tensor, parts: Tensor, slots: list[int], t: int):
        """Pixels that are compared: their vectors (A, L), classes, parts (A,), and draws for what
        with (A, 1 + negatives). Drawn image by image: a random share of each class.
        """
        cfg, device, rows = self.cfg, vectors.device, []
        for image, own, part, slot in zip(vectors, classes, parts, slots):
            (generator,) = point_generators(cfg.seed, t, slot, 1, device)
            own, chance = own.flatten(), torch.rand(own.numel(), generator=generator, device=device)
            chosen = [own.new_zeros(0)]
            for label in own.unique().tolist():
                pixels = (own == label).nonzero()[:, 0]
                count = min(cfg.anchors_max, math.ceil(cfg.anchor_share * len(pixels)))
                if label != IGNORE:
                    chosen.append(pixels[chance[pixels].topk(count).indices])
            chosen = torch.cat(chosen)
            shape = len(chosen), 1 + cfg.negatives
            draws = torch.rand(shape, generator=generator, device=device)
            image = image.flatten(1).T[chosen]
            rows.append((image, own[chosen], part.flatten()[chosen], draws))
        return [torch.cat(column) for column in zip(*rows)]

    @torch.no_grad()
    def initialise(self, bank: PartBank) -> None:
        """Prototypes: k-means of the teacher's encoder features of every class, from one training
        view of each labelled image. All ranks look at all of them.
        """
        cfg, teacher = self.cfg, self.models["teacher"].eval()
        batches = LabeledBatches(self.dataset, cfg, cfg.ssl_steps)
        batches.rank, batches.ranks = 0, 1
        generator = torch.Generator().manual_seed(cfg.seed)
        kept = [None] * bank.classes  # of each class (features, their random order)
        for step in range(math.ceil(len(self.dataset.labeled) / cfg.labeled_batch)):
            batch = batches[step].to(self.device)
            encoder = self.run(teacher, batch.images).encoder.float()
            classes = nearest(class_maps(batch.targets), encoder.shape[-2:])
            order = torch.rand(classes.shape, generator=generator).to(self.device)
            features = encoder.permute(0, 2, 3, 1)
            for c in classes.unique().tolist():
                if c != IGNORE:
                    found = features[classes == c], order[classes == c]
                    found = [torch.cat(x) for x in zip(kept[c], found)] if kept[c] else found
                    least = found[1].argsort()[: cfg.kmeans_pixels]
                    kept[c] = [x[least] for x in found]
        for c, found in enumerate(kept):
            if found:
                bank.prototypes[c] = kmeans(found[0], bank.parts, generator)
        ranks.agree([bank.prototypes])
        bank.ready.fill_(1)

    def average(self, decay: float) -> None:
        """The teacher, after the student's step; its batch-norm statistics: see `teacher_norm`."""
        student, teacher = self.models["student"], self.models["teacher"]
        own = {name: value.clone() for name, value in teacher.named_buffers()}
        update_teacher(teacher, student, decay)
        if self.cfg.teacher_norm != "average":
            source = own if self.cfg.teacher_norm == "batch" else dict(student.named_buffers())
            for name, value in teacher.named_buffers():
                value.copy_(source[name])

    @property
    def pictured(self) -> dict[str, str]:
        """Parts can be shown where a bank knows them."""
        bank = self.models.get("bank")
        known = bank is not None and bool(bank.ready)
        return {
            PSEUDO: "arg-max of the soft labels",
            **({PARTS: "parts of objects"} if known else {}),
        }

    def predict(self, images, sizes, readings, t=None, semantic=True, sums=False):
        """As `Baseline.predict`; PARTS: the student's classes, divided into their parts."""
        readings = list(readings)
        others = [reading for reading in readings if reading != PARTS]
        yield from super().predict(images, sizes, others, t, semantic, sums)
        if PARTS in readings:
            yield from self.object_parts(images, sizes)

    @torch.no_grad()
    def object_parts(self, images: Tensor, sizes: list[tuple]):
        """The student's classes of every pixel, and of those the part whose prototype the encoder's
        features resemble most. Every class that is there has all its K segments, in order, some of
        them empty: a part has one shade in all pictures.
        """
        network, bank = self.models["student"].eval(), self.models["bank"]
        maps, padded = network(images), images.shape[-2:]
        probs = network.upsample(maps.logits.float(), padded)
        encoder = resize(maps.encoder.float(), maps.logits.shape[-2:])
        for k, ((height, width), output) in enumerate(sizes):
            classes = resize(probs[k : k + 1, :, :height, :width], output)[0].argmax(0)
            features, grid = encoder[k].flatten(1).T, encoder.shape[-2:]
            segment_map, there = torch.zeros_like(classes), classes.unique()
            for place, label in enumerate(there):
                part = bank.part_of(features, label.expand(len(features)))
                part = nearest(part.view(1, *grid), padded)[:, :height, :width]
                own = classes == label
                segment_map[own] = place * bank.parts + 1 + nearest(part, output)[0][own]
            labels = there.repeat_interleave(bank.parts)
            arrays = segment_map.int(), labels, torch.ones(len(labels)), classes
            yield k, PARTS, Prediction(*(x.cpu().numpy() for x in arrays))


def mix_grids(maps: Tensor, unlabeled: Unlabeled) -> Tensor:
    """CutMix of maps (B + M, h, w): of B images and, behind them, of the M partners."""
    count, _, *size = unlabeled.weak.shape
    boxed = [k for k, box in enumerate(unlabeled.boxes) if box is not None]
    empty, full = maps.new_zeros(count, 1, *size), maps.new_ones(len(boxed), 1, *size)
    inside = nearest(mix_images(empty, full, unlabeled.boxes)[:, 0], maps.shape[-2:]) > 0
    partners = maps[:count].clone()
    partners[boxed] = maps[count:]
    return torch.where(inside, partners, maps[:count])


def _mean(total: Tensor, count: Tensor) -> float:
    """Of all ranks."""
    total, count = ranks.total(torch.stack([total, count]).float()).tolist()
    return total / max(count, 1)
