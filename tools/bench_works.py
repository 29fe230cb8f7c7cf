"""What `tools.bench` measures: our side of each work, and that of the peer it is measured beside.

A maker is called in the process that measures it, with a `Place`, and returns a function of the
number of the call. Weights are noise and images are made, the same for both sides.
"""

import dataclasses
import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import types
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clip_ensemble import ClipBackbone, Vocabulary
from config import OFFICIAL, Config
from data import Labeled, Unlabeled
from engine import training
from inference import panoptic_inference
from matcher import Target
from mean_teacher import MeanTeacher
from model import Segmenter
from pretrained import foundation
from pretrained.sam import MaskGenerator
from readers import mask_files, pictures
from readers.ground_truth import Taxonomy

CLASSES, THINGS, NAMES_A_CLASS = 133, 80, 2
OFFICIAL_CONFIG = (
    "configs/ade20k/panoptic-segmentation-vlm/convnext_semisup/vlm_convnext_base_ade20k_1_64.yaml"
)
OFFICIAL_DIM = 640  # joint space of convnext_base_w_320
NAMES = tuple(f"class {k}" for k in range(1, CLASSES + 1))
SEGMENTS = (5, 60)  # least and most, of a target and of a pseudo-label
TAXONOMY = Taxonomy(NAMES, tuple(k < THINGS for k in range(CLASSES)), tuple(range(1, CLASSES + 1)))


class Skipped(Exception):
    """Why something was not measured."""


@dataclasses.dataclass(frozen=True)
class Place:
    """official: a clone of the official code.   folder: an empty one of this maker's own."""

    official: Path | None
    folder: Path
    device: torch.device = torch.device("cpu")


# ------------------------------------------------------------------------------------- models


class Answering(MeanTeacher):
    """DEAR whose teacher answers in full, as in a run, and is then given made answers: a teacher
    of noise would find no segment, and what follows would cost nothing."""

    made: tuple[Tensor, Tensor]

    def teacher_answer(self, features, t):
        of_noise = super().teacher_answer(features, t)
        answer = tuple(x[: len(features[0])] for x in self.made)
        assert [x.shape for x in answer] == [x.shape for x in of_noise]
        return answer

    def answer_with(self, images: int, most: int) -> None:
        """Of so many weak views and the partners of their CutMix boxes, every other image's."""
        made = made_answers(self.cfg, images + -(-images // 2), most, len(self.taxonomy))
        self.made = tuple(x.to(self.device) for x in made)


class Made(Answering):
    """The same with random weights; the embeddings of its classes are made up, too."""

    def network(self, clip) -> Segmenter:
        torch.manual_seed(0)
        clip, _ = foundation.load_clip(dataclasses.replace(OFFICIAL, pretrained="random"))
        classes = len(self.taxonomy)
        names = torch.randn(classes * NAMES_A_CLASS, clip.visual.head.proj.out_features)
        vocabulary = Vocabulary(F.normalize(names, dim=-1), [NAMES_A_CLASS] * classes)
        model = Segmenter(ClipBackbone(clip), vocabulary, self.cfg, classes)
        return model.to(self.device)


def our_method(
    classes: int = CLASSES,
    cfg=OFFICIAL,
    precision=torch.float32,
    device: torch.device | None = None,
) -> Made:
    things = tuple(k < classes * THINGS // CLASSES for k in range(classes))
    names = tuple(f"class {k}" for k in range(classes))
    taxonomy = Taxonomy(names, things, tuple(range(classes)))
    return Made(cfg, taxonomy, device or torch.device("cpu"), precision)


def official_models(place: Place):
    """Student and teacher of the official code, and its module of the training step.

    Its CUDA extension, on a CPU or where it was not built, is replaced by its own fallback in plain
    torch, CLIP's download by noise.
    """
    if place.official is None:
        raise Skipped("no --official DIR")
    os.chdir(place.official)  # it reads its class names from where it stands
    sys.path.insert(0, os.getcwd())
    name = "MultiScaleDeformableAttention"
    if place.device.type == "cpu" or importlib.util.find_spec(name) is None:
        extension = types.ModuleType(name)
        extension.__getattr__ = lambda name: None  # its caller then takes the path in plain torch
        sys.modules[name] = extension
    try:
        import open_clip

        create = open_clip.create_model
        open_clip.create_model_and_transforms = lambda name, **more: (create(name), None, None)
        import mask2former.config as settings
        import mask2former.vision_language_maskformer_teacher as teachers
        from detectron2.config import get_cfg
        from detectron2.data import MetadataCatalog
        from detectron2.modeling import build_model
        from detectron2.projects.deeplab import add_deeplab_config
        from mask2former.semi_sup_train_runner import SemiSupTrainRunner
    except ImportError as error:
        raise Skipped(f"official code: {error}") from None
    names = [f"class {k},thing {k}" for k in range(CLASSES)]
    MetadataCatalog.get("made").set(
        stuff_classes=names,
        thing_classes=names[:THINGS],
        stuff_dataset_id_to_contiguous_id={k: k for k in range(CLASSES)},
        thing_dataset_id_to_contiguous_id={k: k for k in range(THINGS)},
    )
    cfg = get_cfg()
    add_deeplab_config(cfg)
    for name in ("maskformer2", "semi_sup", "vl_maskformer2"):
        getattr(settings, f"add_{name}_config")(cfg)
    cfg.merge_from_file(OFFICIAL_CONFIG, allow_unsafe=True)
    cfg.MODEL.DEVICE, cfg.DATASETS.TRAIN = str(place.device), ("made",)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = CLASSES
    torch.manual_seed(0)
    student = build_model(cfg)
    text = torch.randn(CLASSES * NAMES_A_CLASS, OFFICIAL_DIM)
    student.text_classifier = F.normalize(text, dim=-1).to(place.device)
    student.semantic_on = False  # panoptic inference on both sides
    teacher = teachers.VisionLanguageMaskFormerTeacher(
        cfg, student, ema_decay=0.999, burn_in_iters=0
    )
    return student, teacher, SemiSupTrainRunner


def cells(side: int, segments: int, g: torch.Generator) -> Tensor:
    """(side, side) int32, 1 ... segments: every pixel is its nearest centre's."""
    centres = torch.rand(segments, 2, generator=g) * side
    axis = torch.arange(side, dtype=torch.float32)
    squares = (axis[:, None] - centres.T[:, None, :]) ** 2  # (2, side, segments)
    return (squares[0][:, None] + squares[1][None]).argmin(-1).int() + 1


def counts(images: int, most: int) -> list[int]:
    """Segments of the images of a batch, from the least to `most`, which one image has."""
    least = SEGMENTS[0] if images > 1 else most
    return np.linspace(least, most, images).round().astype(int).tolist()


def made_batch(side: int, images: int, most: int, seed: int, classes: int = CLASSES):
    """Noise in the shape of a labelled and an unlabelled batch, which has every other CutMix box.

    Targets are partitions into 5 to `most` cells.
    """
    g = torch.Generator().manual_seed(seed)
    targets = [
        Target(torch.randint(0, classes, (n,), generator=g), cells(side, n, g))
        for n in counts(images, most)
    ]
    box = (side // 4, side // 2, side // 4, side // 2)
    boxes = [box if i % 2 == 0 else None for i in range(images)]
    numbers = (images, images, images, len(boxes[::2]), len(boxes[::2]))
    labeled, weak, strong, *partners = (
        torch.randint(0, 256, (n, 3, side, side), generator=g, dtype=torch.uint8) for n in numbers
    )
    names = [f"made {i}" for i in range(images)]
    return Labeled(labeled, targets, names), Unlabeled(weak, strong, boxes, *partners, names)


def made_answers(cfg: Config, images: int, most: int, classes: int) -> tuple[Tensor, Tensor]:
    """Posteriors (B, Q, K+1) and mask logits (B, Q, S/4, S/4) whose panoptic inference has 5 to
    `most` segments, less the stuff that is joined; no more than there are queries."""
    g = torch.Generator().manual_seed(9)
    posterior = torch.full((images, cfg.num_queries, classes + 1), 0.01 / classes)
    posterior[..., -1] = 0.99
    masks = torch.full((images, cfg.num_queries, cfg.crop // 4, cfg.crop // 4), -6.0)
    for k, n in enumerate(counts(images, min(most, cfg.num_queries))):
        owner = cells(cfg.crop // 4, n, g)
        masks[k, :n] = torch.where(owner == torch.arange(1, n + 1)[:, None, None], 6.0, -6.0)
        posterior[k, :n, -1] = 0.01
        chosen = torch.randint(0, classes, (n,), generator=g)
        posterior[k, torch.arange(n), chosen] = 0.98 + 0.01 / classes
    return posterior, masks


def official_batch(labeled: Labeled, unlabeled: Unlabeled) -> list[dict]:
    """The same batch as the official code wants it."""
    from detectron2.structures import Instances

    rows, side = [], labeled.images.shape[-1]
    partners = zip(unlabeled.partner_strong, unlabeled.partner_weak)
    for i, target in enumerate(labeled.targets):
        masks = torch.stack([target.segment_map == k for k in range(1, len(target) + 1)])
        row = dict(
            image=labeled.images[i],
            instances=Instances((side, side), gt_classes=target.labels, gt_masks=masks),
            student_image=unlabeled.strong[i],
            teacher_image=unlabeled.weak[i],
            height=side,
            width=side,
        )
        if unlabeled.boxes[i] is not None:
            top, bottom, left, right = unlabeled.boxes[i]
            box = torch.zeros(side, side)
            box[top:bottom, left:right] = 1
            strong, weak = next(partners)
            row["cutmix_addons"] = dict(
                cutmix_box=box, student_image_cutmix=strong, teacher_image_cutmix=weak
            )
        rows.append(row)
    return rows


def our_step(
    place,
    side=256,
    images=2,
    classes=CLASSES,
    most=SEGMENTS[1],
    queries=200,
    precision=torch.float32,
) -> Callable:
    cfg = dataclasses.replace(OFFICIAL, crop=side, num_queries=queries)
    method = our_method(classes, cfg, precision, place.device)
    method.answer_with(images, most)
    batches = [made_batch(side, images, most, t, classes) for t in range(5)]
    batches = [tuple(half.to(place.device) for half in batch) for batch in batches]

    def step(t: int) -> None:
        method.step(batches[t % len(batches)], t)

    return step


def official_step(place, side=256, images=2, most=SEGMENTS[1]) -> Callable:
    student, teacher, runner = official_models(place)
    partners = -(-images // 2)
    answer_officially(teacher, [slice(images, images + partners), slice(images)], side, most)
    batches = [made_batch(side, images, most, t) for t in range(5)]
    params = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=OFFICIAL.lr, weight_decay=OFFICIAL.weight_decay)

    class Feed:
        def __iter__(self):
            return (official_batch(*batch) for batch in itertools.cycle(batches))

    run = runner(teacher, student.train(), Feed(), optimizer)
    run._write_metrics = lambda *a, **k: None
    run.after_backward = lambda: torch.nn.utils.clip_grad_norm_(params, OFFICIAL.clip_norm)

    def step(t: int) -> None:
        run.run_step()
        with torch.no_grad():  # the average that the official hook forms after each step
            for a, b in zip(teacher.parameters(), student.parameters()):
                a.mul_(0.999).add_(b, alpha=0.001)

    return step


def answer_officially(model, parts: list[slice], side: int, most: int) -> None:
    """As `Answering`, of an official model, whose ensemble of these answers with CLIP's noise has
    the same classes. parts: of the made answers, for its calls in turn."""
    cfg, images = dataclasses.replace(OFFICIAL, crop=side), max(part.stop for part in parts)
    posterior, masks = made_answers(cfg, images, most, CLASSES)
    turns = itertools.cycle(parts)

    def answer(head, inputs, outputs):
        part, like = next(turns), outputs["pred_logits"]
        logits = 3 * posterior[part].log()  # sure enough to outweigh what CLIP says
        made = {"pred_logits": logits.to(like.device), "pred_masks": masks[part].to(like.device)}
        assert all(outputs[key].shape == value.shape for key, value in made.items())
        return {**outputs, **made}

    model.sem_seg_head.register_forward_hook(answer)


def our_inference(place, side=256, images=2, precision=torch.float32) -> Callable:
    cfg = dataclasses.replace(OFFICIAL, crop=side)
    method = our_method(cfg=cfg, precision=precision)
    method.answer_with(images, SEGMENTS[1])
    teacher, x = method.models["teacher"], made_batch(side, images, 1, 0)[0].images

    @torch.no_grad()
    def infer(t: int):
        with method.autocast():
            return method.pseudo_labels(teacher.backbone(x), ((side, side),) * 3, 0)

    return infer


def official_inference(place, side=256, images=2) -> Callable:
    student = official_models(place)[0].eval()
    answer_officially(student, [slice(images)], side, SEGMENTS[1])
    pictures = made_batch(side, images, 1, 0)[0].images
    rows = [dict(image=x, height=side, width=side) for x in pictures]
    return torch.no_grad()(lambda t: student(rows))


def made_logits(side: int):
    """Of 200 queries, of which 60 draw a disc of their own class: as many as a busy image has."""
    g, grid = torch.Generator().manual_seed(0), torch.arange(side // 4)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    masks = torch.randn(200, side // 4, side // 4, generator=g) - 6
    classes = torch.zeros(200, CLASSES + 1)
    classes[:, -1] = 8.0
    for q, (cy, cx, r, c) in enumerate(torch.rand(60, 4, generator=g).tolist()):
        distance = (y - cy * side / 4) ** 2 + (x - cx * side / 4) ** 2
        masks[q][distance < (side / 48 * (1 + r)) ** 2] = 6.0
        classes[q, -1], classes[q, int(c * CLASSES)] = 0.0, 6.0
    return classes, masks


def our_segments(place, side=512, images=4) -> Callable:
    classes, masks = made_logits(side)
    args = classes.softmax(-1), masks, torch.tensor(TAXONOMY.things), ((side, side),) * 3
    return lambda t: [panoptic_inference(*args) for _ in range(images)]


def official_segments(place, side=512, images=4) -> Callable:
    _, teacher, _ = official_models(place)
    classes, masks = made_logits(side)
    masks = masks[None].expand(images, -1, -1, -1)

    @torch.no_grad()
    def segment(t: int):  # as its forward does
        full = F.interpolate(masks, size=(side, side), mode="bilinear", align_corners=False)
        return [teacher.panoptic_inference(classes, m) for m in full]

    return segment


# ------------------------------------------------------------------------------ SAM and ranks


def random_sam():
    """SAM with ViT-B and random weights, a cfg that rejects no mask, and a picture."""
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    lax = dict(points_per_side=8, pred_iou_thresh=-1e9, stability_thresh=0.0)
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    return sam_model_registry["vit_b"]().eval(), dataclasses.replace(OFFICIAL, **lax), picture


def our_sam(place: Place) -> Callable:
    sam, cfg, picture = random_sam()
    generator, root = MaskGenerator(sam, cfg), place.folder
    Image.fromarray(picture).save(root / "0.png")
    images = pictures.ImageFolder(root)
    return lambda t: mask_files.generate_masks(images, generator, root / str(t))


def their_sam(place: Place) -> Callable:
    from segment_anything import SamAutomaticMaskGenerator

    sam, cfg, picture = random_sam()
    batch, lax = cfg.points_per_batch, (cfg.pred_iou_thresh, cfg.stability_thresh)
    generator = SamAutomaticMaskGenerator(sam, cfg.points_per_side, batch, *lax)
    return lambda t: generator.generate(picture)


def steps_of_ranks(place: Place, processes: int) -> dict:
    """Seconds a step (median) of a short run on the miniature world, by processes of one thread."""
    launch = f"-m torch.distributed.run --standalone --nproc_per_node={processes} ".split()
    options = "--stage ssl --method dear --steps 80 --burn-in 20 --no-eval --device cpu".split()
    run = place.folder / "run"
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), "dearli.py", *options, "--out", run],
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    rows = training.read_log(run / "log.jsonl")
    times = [row["time"] for row in rows if row["step"] >= 30]  # the first pseudo-labels warm up
    return {"seconds": round(statistics.median(np.diff(times)), 4)}
