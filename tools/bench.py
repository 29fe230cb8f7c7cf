"""Measurements: time and memory of the method's parts, beside the official code and the COCO panoptic API where they are installed.

    python bench.py                                  everything, as one table
    python bench.py --only step,index --threads 1    some of it, on one core
    python bench.py --official DIR                   beside the official code: a clone of github.com/helen1c/DEARLi; needs detectron2
    python bench.py --json bench.json                the figures, with the machine they were measured on

Weights are noise and images are made, the same for both sides. Each side has a process of its own, and they take turns, call by call; times are
medians, `ratio` is the median over the turns, with the least and the greatest of them. Peak memory is the largest resident set of the process, interpreter and
libraries included. `limit` is the time of the arithmetic alone: the floating-point operations that torch counts in our work, at the rate at which the same
process multiplies large matrices.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing.connection
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from clip_ensemble import ClipBackbone, Vocabulary
from config import OFFICIAL, Config
from data import Labeled, LabeledBatches, SemiSupervisedBatches, Unlabeled
from engine import training
from inference import panoptic_inference
from matcher import Target
from mean_teacher import MeanTeacher
from model import Segmenter
from panoptic_eval import PanopticQuality
from pretrained import foundation
from pretrained.sam import MaskGenerator
from readers import mask_files, panoptic, pictures
from readers.ground_truth import DataSet, Taxonomy
from readers.panoptic import PanopticFolder
from tools import prepare

CLASSES, NAMES_A_CLASS = 133, 2
COCO_IMAGES, COCO_SEGMENTS = 118_287, 11  # of train2017; segments an image, 1.3 million in all
OFFICIAL_CONFIG = (
    "configs/ade20k/panoptic-segmentation-vlm/convnext_semisup/vlm_convnext_base_ade20k_1_64.yaml"
)
OFFICIAL_DIM = 640  # joint space of convnext_base_w_320
BF16 = torch.bfloat16


class Skipped(Exception):
    """Why something was not measured."""


# ------------------------------------------------------------------------------------------------------- the two sides


class Made(MeanTeacher):
    """DEAR with random weights; embeddings of its classes are made up, too."""

    def network(self, clip) -> Segmenter:
        torch.manual_seed(0)
        clip, _ = foundation.load_clip(dataclasses.replace(OFFICIAL, pretrained="random"))
        dim, classes = clip.visual.head.proj.out_features, len(self.taxonomy)
        embeddings = F.normalize(torch.randn(classes * NAMES_A_CLASS, dim), dim=-1)
        vocabulary = Vocabulary(embeddings, [NAMES_A_CLASS] * classes)
        return Segmenter(ClipBackbone(clip), vocabulary, self.cfg, classes)


def our_method(classes: int = CLASSES, cfg: Config = OFFICIAL, precision=torch.float32) -> Made:
    names = tuple(f"class {k}" for k in range(classes))
    taxonomy = Taxonomy(names, tuple(_things(classes).tolist()), tuple(range(classes)))
    return Made(cfg, taxonomy, torch.device("cpu"), precision)


def official_models(folder: Path, classes: int = CLASSES):
    """Student and teacher of the official code, and its module of the training step. Its CUDA extension is replaced by its own CPU fallback."""
    if folder is None:
        raise Skipped("no --official DIR")
    os.chdir(folder)  # it reads its class names from where it stands
    sys.path.insert(0, os.getcwd())
    extension = types.ModuleType("MultiScaleDeformableAttention")
    extension.__getattr__ = lambda name: None  # its caller then takes the path in plain torch
    sys.modules["MultiScaleDeformableAttention"] = extension
    try:
        import open_clip

        open_clip.create_model_and_transforms = lambda name, **more: (
            open_clip.create_model(name),
            None,
            None,
        )  # noise, not a download
        import mask2former.config as settings
        import mask2former.vision_language_maskformer_teacher as teachers
        from detectron2.config import get_cfg
        from detectron2.data import MetadataCatalog
        from detectron2.modeling import build_model
        from detectron2.projects.deeplab import add_deeplab_config
        from mask2former.semi_sup_train_runner import SemiSupTrainRunner
    except ImportError as error:
        raise Skipped(f"official code: {error}") from None
    names, things = [f"class {k},thing {k}" for k in range(classes)], _things(classes)
    index = {k: k for k in range(classes)}
    MetadataCatalog.get("made").set(
        stuff_classes=names,
        thing_classes=[n for n, t in zip(names, things) if t],
        stuff_dataset_id_to_contiguous_id=index,
        thing_dataset_id_to_contiguous_id={k: k for k in index if things[k]},
    )
    cfg = get_cfg()
    for add in (
        add_deeplab_config,
        settings.add_maskformer2_config,
        settings.add_semi_sup_config,
        settings.add_vl_maskformer2_config,
    ):
        add(cfg)
    cfg.merge_from_file(OFFICIAL_CONFIG, allow_unsafe=True)
    cfg.merge_from_list(
        [
            "MODEL.DEVICE",
            "cpu",
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
            classes,
            "DATASETS.TRAIN",
            ("made",),
        ]
    )
    torch.manual_seed(0)
    student = build_model(cfg)
    student.text_classifier = F.normalize(
        torch.randn(classes * NAMES_A_CLASS, OFFICIAL_DIM), dim=-1
    )
    student.semantic_on = False  # panoptic inference on both sides
    return (
        student,
        teachers.VisionLanguageMaskFormerTeacher(cfg, student, ema_decay=0.999, burn_in_iters=0),
        SemiSupTrainRunner,
    )


def made_batch(
    side: int, classes: int, images: int, segments: int, seed: int
) -> tuple[Labeled, Unlabeled]:
    """Noise in the shape of a batch: partitions into cells around random centres; every other unlabelled image has a CutMix box."""
    g = torch.Generator().manual_seed(seed)

    def picture(n):
        return torch.randint(0, 256, (n, 3, side, side), generator=g, dtype=torch.uint8)

    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    targets = []
    for _ in range(images):
        nearest = torch.full((side, side), torch.inf)
        cells = torch.zeros(side, side, dtype=torch.int32)
        for k, (cy, cx) in enumerate((torch.rand(segments, 2, generator=g) * side).tolist(), 1):
            distance = (y - cy) ** 2 + (x - cx) ** 2
            cells[distance < nearest] = k
            nearest = torch.minimum(nearest, distance)
        targets.append(Target(torch.randint(0, classes, (segments,), generator=g), cells))
    names, box = [f"made {i}" for i in range(images)], (side // 4, side // 2, side // 4, side // 2)
    boxes = [box if i % 2 == 0 else None for i in range(images)]
    mixed = sum(b is not None for b in boxes)
    return Labeled(picture(images), targets, names), Unlabeled(
        picture(images), picture(images), boxes, picture(mixed), picture(mixed), names
    )


def official_batch(labeled: Labeled, unlabeled: Unlabeled) -> list[dict]:
    """The same batch as the official code wants it."""
    from detectron2.structures import Instances

    rows, partner = [], 0
    for i, target in enumerate(labeled.targets):
        side = labeled.images.shape[-1]
        instances = Instances(
            (side, side),
            gt_classes=target.labels,
            gt_masks=torch.stack([target.segment_map == k for k in range(1, len(target) + 1)]),
        )
        rows.append(
            dict(
                image=labeled.images[i],
                instances=instances,
                student_image=unlabeled.strong[i],
                teacher_image=unlabeled.weak[i],
                height=side,
                width=side,
            )
        )
        if unlabeled.boxes[i] is not None:
            top, bottom, left, right = unlabeled.boxes[i]
            box = torch.zeros(side, side)
            box[top:bottom, left:right] = 1
            rows[-1]["cutmix_addons"] = dict(
                cutmix_box=box,
                student_image_cutmix=unlabeled.partner_strong[partner],
                teacher_image_cutmix=unlabeled.partner_weak[partner],
            )
            partner += 1
    return rows


def _things(classes: int) -> torch.Tensor:
    return torch.arange(classes) < classes * 2 // 3


# ---------------------------------------------------------------------------------------------------------- training


def our_step(
    side: int = 256,
    images: int = 2,
    classes: int = CLASSES,
    segments: int = 10,
    queries: int = OFFICIAL.num_queries,
    precision: torch.dtype = torch.float32,
) -> Callable:
    cfg = dataclasses.replace(OFFICIAL, crop=side, num_queries=queries)
    method = our_method(classes, cfg, precision)
    batches = [made_batch(side, classes, images, segments, t) for t in range(5)]
    return lambda t: method.step(batches[t % len(batches)], t)


def official_step(folder: Path, side: int = 256, images: int = 2, segments: int = 10) -> Callable:
    student, teacher, runner = official_models(folder)
    batches = [made_batch(side, CLASSES, images, segments, t) for t in range(5)]
    params = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=OFFICIAL.lr, weight_decay=OFFICIAL.weight_decay)

    class Feed:
        def __iter__(self):
            return (official_batch(*b) for b in itertools.cycle(batches))

    run = runner(teacher, student.train(), Feed(), optimizer)
    run._write_metrics = lambda *a, **k: None
    run.after_backward = lambda: torch.nn.utils.clip_grad_norm_(params, OFFICIAL.clip_norm)

    def one(t):
        run.run_step()
        with torch.no_grad():  # the average that the official hook forms after each step
            for a, b in zip(teacher.parameters(), student.parameters()):
                a.mul_(0.999).add_(b, alpha=0.001)

    return one


# --------------------------------------------------------------------------------------------------------- inference


def our_inference(
    side: int = 256, images: int = 2, precision: torch.dtype = torch.float32
) -> Callable:
    method = our_method(precision=precision)
    teacher = method.models["teacher"]
    x = made_batch(side, CLASSES, images, 1, 0)[0].images

    @torch.no_grad()
    def one(t):
        with method.autocast():
            return method.pseudo_labels(teacher.backbone(x), (side, side), 0)

    return one


def official_inference(folder: Path, side: int = 256, images: int = 2) -> Callable:
    student, _, _ = official_models(folder)
    student.eval()
    rows = [
        dict(image=x, height=side, width=side)
        for x in made_batch(side, CLASSES, images, 1, 0)[0].images
    ]
    return torch.no_grad()(lambda t: student(rows))


def _made_logits(side: int):
    """Logits of 200 queries of which 60 draw a disc of their own class: about as many segments as a busy image has."""
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(side // 4), torch.arange(side // 4), indexing="ij")
    masks = torch.full((200, side // 4, side // 4), -6.0) + torch.randn(
        200, side // 4, side // 4, generator=g
    )
    classes = torch.zeros(200, CLASSES + 1)
    classes[:, -1] = 8.0
    for q, (cy, cx, r, c) in enumerate(torch.rand(60, 4, generator=g).tolist()):
        masks[q][
            (y - cy * side / 4) ** 2 + (x - cx * side / 4) ** 2 < (side / 48 * (1 + r)) ** 2
        ] = 6.0
        classes[q, -1], classes[q, int(c * CLASSES)] = 0.0, 6.0
    return classes, masks


def our_segments(side: int = 512, images: int = 4) -> Callable:
    classes, masks = _made_logits(side)
    posterior, things, sizes = classes.softmax(-1), _things(CLASSES), ((side, side),) * 3
    return lambda t: [panoptic_inference(posterior, masks, things, sizes) for _ in range(images)]


def official_segments(folder: Path, side: int = 512, images: int = 4) -> Callable:
    _, teacher, _ = official_models(folder)
    classes, masks = _made_logits(side)

    @torch.no_grad()
    def one(t):
        full = F.interpolate(
            masks[None].expand(images, -1, -1, -1),
            size=(side, side),
            mode="bilinear",
            align_corners=False,
        )  # as its forward does
        return [teacher.panoptic_inference(classes, m) for m in full]

    return one


# -------------------------------------------------------------------------------------------------- data and evaluation


def _made_folder(
    root: Path, images: int, height: int, width: int, segments: int, name: str, shift: int = 0
) -> Path:
    """A panoptic JSON and its maps, rectangles of a grid, moved by some pixels; returns the JSON."""
    columns = 8
    rows = -(-segments // columns)
    y, x = np.mgrid[0:height, 0:width]
    ids = ((y * rows // height) * columns + (x + shift) % width * columns // width + 1).clip(
        max=segments
    ).astype(np.int32) * 1_000
    areas = np.bincount(ids.ravel())
    (root / name).mkdir(parents=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": k, "name": f"class {k}", "isthing": int(k < 80)} for k in range(1, CLASSES + 1)
        ],
    }
    for i in range(images):
        prepare.encode(ids).save(root / name / f"{i}.png")
        Image.new("RGB", (width, height)).save(root / f"{i}.jpg")
        content["images"].append(
            {"id": i, "file_name": f"{i}.jpg", "height": height, "width": width}
        )
        content["annotations"].append(
            {
                "image_id": i,
                "file_name": f"{i}.png",
                "segments_info": [
                    {
                        "id": 1_000 * k,
                        "category_id": 1 + 3 * k % CLASSES,
                        "area": int(areas[1_000 * k]),
                        "iscrowd": 0,
                    }
                    for k in range(1, segments + 1)
                ],
            }
        )
    (root / f"{name}.json").write_text(json.dumps(content))
    return root / f"{name}.json"


def _both_folders(root: Path, images: int = 20):
    return [
        _made_folder(root, images, 480, 640, 40, name, shift)
        for name, shift in (("true", 0), ("predicted", 20))
    ]


def our_pq(root: Path) -> Callable:
    taxonomy = panoptic.read_taxonomy(_both_folders(root)[0])
    true, predicted = (
        PanopticFolder(root / f"{n}.json", root, root / n, taxonomy) for n in ("true", "predicted")
    )

    def one(t):
        pq = PanopticQuality(len(taxonomy))
        for i in range(len(true)):
            a, b = predicted.truth(i), true.truth(i)
            pq.add(a.segment_map, a.labels, b.segment_map, b.labels, b.areas, b.crowd)
        return pq.result(taxonomy.things)["all"]["pq"]

    return one


def panopticapi_pq(root: Path) -> Callable:
    try:
        from panopticapi.evaluation import pq_compute_single_core
    except ImportError:
        raise Skipped("panopticapi is not installed") from None
    true, predicted = (json.loads(path.read_text()) for path in _both_folders(root))
    categories = {c["id"]: c for c in true["categories"]}
    pairs = list(zip(true["annotations"], predicted["annotations"]))
    return lambda t: pq_compute_single_core(
        0, pairs, str(root / "true"), str(root / "predicted"), categories
    ).pq_average(categories, isthing=None)[0]["pq"]


def _big_photo(root: Path) -> DataSet:
    """One picture of 1.5 megapixels with 40 segments, labelled and unlabelled; its JPEG has about the bytes of a photograph."""
    path = _made_folder(root, 1, 1024, 1536, 40, "true")
    noise = Image.fromarray(
        np.random.default_rng(0).integers(64, 192, (342, 512, 3), np.uint8)
    ).resize((1536, 1024), Image.Resampling.BICUBIC)
    noise.save(root / "0.jpg", quality=90)
    folder = PanopticFolder(path, root, root / "true", panoptic.read_taxonomy(path))
    return DataSet("made", folder.taxonomy, folder, folder, [0], [0])


def our_labeled_sample(root: Path) -> Callable:
    batches = LabeledBatches(_big_photo(root), dataclasses.replace(OFFICIAL, labeled_batch=1), 1000)
    return lambda t: [batches[10 * t + k] for k in range(10)]


def our_unlabeled_sample(root: Path) -> Callable:
    batches = SemiSupervisedBatches(_big_photo(root), OFFICIAL, 1000)
    return lambda t: [batches._two_views(batches.rng(t, k)) for k in range(10)]


def our_loading(root: Path, images: int) -> Callable:
    """Labelled batches of a data set of so many images; all of them are links to one picture."""
    path = _made_folder(root, 1, 480, 640, 10, "true")
    content = json.loads(path.read_text())
    for part, key, folder in (("images", "id", root), ("annotations", "image_id", root / "true")):
        first, ending = content[part][0], Path(content[part][0]["file_name"]).suffix
        content[part] = [{**first, key: i, "file_name": f"{i}{ending}"} for i in range(images)]
        for i in range(1, images):
            os.symlink(folder / f"0{ending}", folder / f"{i}{ending}")
    path.write_text(json.dumps(content))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)).save(
        root / "0.jpg"
    )
    folder = PanopticFolder(path, root, root / "true", panoptic.read_taxonomy(path))
    batches = LabeledBatches(
        DataSet("made", folder.taxonomy, folder, folder, list(range(images)), []), OFFICIAL, 1000
    )
    return lambda t: batches[t]


def _sam():
    """SAM with ViT-B and random weights, what it is asked, and a picture; nothing is thrown away for being uncertain."""
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    cfg = dataclasses.replace(
        OFFICIAL, points_per_side=8, pred_iou_thresh=-1e9, stability_thresh=0.0
    )
    return (
        sam_model_registry["vit_b"]().eval(),
        cfg,
        np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8),
    )


def our_sam(root: Path) -> Callable:
    sam, cfg, picture = _sam()
    generator = MaskGenerator(sam, cfg)
    Image.fromarray(picture).save(root / "0.png")
    images = pictures.ImageFolder(root)
    return lambda t: mask_files.generate_masks(images, generator, root / str(t))


def their_sam() -> Callable:
    from segment_anything import SamAutomaticMaskGenerator

    sam, cfg, picture = _sam()
    generator = SamAutomaticMaskGenerator(
        sam, cfg.points_per_side, cfg.points_per_batch, cfg.pred_iou_thresh, cfg.stability_thresh
    )
    return lambda t: generator.generate(picture)


def decoding(root: Path, maps: bool) -> Callable:
    _big_photo(root)
    paths = [root / "0.jpg", *([root / "true" / "0.png"] if maps else [])]
    return lambda t: [np.asarray(pictures.open_image(p)) for _ in range(10) for p in paths]


def index(root: Path, images: int = COCO_IMAGES, reads: int = 2000, workers: int = 2) -> dict:
    """Opening a panoptic JSON of COCO's size; memory that a loader process (forked) has to itself, before and after reading images."""
    ids = np.repeat(
        np.repeat(np.arange(12, dtype=np.int32).reshape(3, 4) % (COCO_SEGMENTS + 1), 160, 0), 160, 1
    )  # 480 x 640
    prepare.encode(ids).save(root / "map.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*ids.shape, 3), np.uint8)).save(
        root / "image.jpg"
    )
    categories = [
        {"id": k, "name": f"class {k}", "isthing": int(k < 80)} for k in range(1, CLASSES + 1)
    ]
    names = [f"{i:012d}" for i in range(images)]

    def info(i):
        return [
            {
                "id": k,
                "category_id": 1 + (7 * i + k) % CLASSES,
                "iscrowd": 0,
                "bbox": [0, 0, 160, 160],
                "area": 25_600,
            }
            for k in range(1, COCO_SEGMENTS + 1)
        ]

    with open(
        root / "index.json", "w"
    ) as file:  # piece by piece: what writes it is the process that is measured
        file.write('{"categories": ' + json.dumps(categories) + ', "images": [')
        file.write(
            ", ".join(
                json.dumps(
                    {"id": i, "file_name": f"{n}.jpg", "width": 640, "height": 480, "license": 1}
                )
                for i, n in enumerate(names)
            )
        )
        file.write('], "annotations": [')
        for i, n in enumerate(names):
            file.write(
                (", " if i else "")
                + json.dumps({"image_id": i, "file_name": f"{n}.png", "segments_info": info(i)})
            )
        file.write("]}")
    chosen = np.random.default_rng(1).choice(images, reads, replace=False).tolist()
    for kind, source in (("images", "image.jpg"), ("maps", "map.png")):
        (root / kind).mkdir()
        for i in chosen:
            os.symlink(root / source, root / kind / (names[i] + source[-4:]))
    taxonomy = Taxonomy(
        tuple(f"class {k}" for k in range(1, CLASSES + 1)),
        tuple(k < 80 for k in range(1, CLASSES + 1)),
        tuple(range(1, CLASSES + 1)),
    )
    clock = time.perf_counter()
    folder = PanopticFolder(root / "index.json", root / "images", root / "maps", taxonomy)
    seconds = time.perf_counter() - clock
    loader = torch.utils.data.DataLoader(
        _Reads(folder, chosen), batch_size=None, num_workers=workers, multiprocessing_context="fork"
    )
    private = [float(v) for v in loader]  # MB after each read, workers in turn
    early, late = private[10 * workers : 20 * workers], private[-10 * workers :]
    return {
        "images": images,
        "segments": images * COCO_SEGMENTS,
        "seconds": round(seconds, 1),
        "MB a worker, after 10 reads": round(max(early)),
        f"MB a worker, after {reads // workers} reads": round(max(late)),
    }


class _Reads(torch.utils.data.Dataset):
    def __init__(self, folder: PanopticFolder, chosen: list[int]):
        self.folder, self.chosen = folder, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, k: int) -> float:
        self.folder.image(self.chosen[k]).load()
        self.folder.truth(self.chosen[k])
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def steps_of_ranks(folder: Path, processes: int) -> dict:
    """Seconds a step (median) of a short semi-supervised run on the miniature world, shared by so many processes of one thread each."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    command = [
        sys.executable,
        *launch,
        "dearli.py",
        "--stage",
        "ssl",
        "--method",
        "dear",
        "--steps",
        "80",
        "--burn-in",
        "20",
        "--no-eval",
        "--device",
        "cpu",
        "--out",
        folder / "run",
    ]
    done = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    times = [
        row["time"] for row in training.read_log(folder / "run" / "log.jsonl") if row["step"] >= 30
    ]  # the first ones with pseudo-labels warm up
    return {"seconds": round(statistics.median(np.diff(times)), 4)}


# ------------------------------------------------------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Work:
    """title; ours and peer: made in the process that measures them, from (--official, a folder of their own); repeats."""

    title: str
    ours: Callable
    peer: Callable | None = None
    peer_name: str = ""
    repeats: int = 3
    goal: str = ""


STEP = "one semi-supervised step, ConvNeXt-B, 256 x 256, 2 labelled + 2 unlabelled"
WORKS = {
    "step": Work(
        STEP,
        lambda o, r: our_step(),
        lambda o, r: official_step(o),
        "official code",
        goal="0.72; half the memory",
    ),
    "step-bf16": Work(
        STEP + ", bf16",
        lambda o, r: our_step(precision=BF16),
        lambda o, r: official_step(o),
        "official code (fp32)",
        goal="0.36",
    ),
    "step-640": Work(
        "one semi-supervised step at 640 x 640, 1 + 1 images, 150 classes",
        lambda o, r: our_step(640, 1, 150, 20),
        repeats=2,
        goal="16 GB",
    ),
    "inference": Work(
        "panoptic inference, two images of 256 x 256",
        lambda o, r: our_inference(),
        lambda o, r: official_inference(o),
        "official code",
        goal="0.75",
    ),
    "inference-640": Work(
        "panoptic inference, one image of 640 x 640",
        lambda o, r: our_inference(640, 1),
        lambda o, r: official_inference(o, 640, 1),
        "official code",
        goal="0.75",
    ),
    "inference-bf16": Work(
        "panoptic inference, two images of 256 x 256, bf16",
        lambda o, r: our_inference(precision=BF16),
        lambda o, r: official_inference(o),
        "official code (fp32)",
        goal="0.45",
    ),
    "inference-640-bf16": Work(
        "panoptic inference, one image of 640 x 640, bf16",
        lambda o, r: our_inference(640, 1, BF16),
        lambda o, r: official_inference(o, 640, 1),
        "official code (fp32)",
        goal="0.45",
    ),
    "segments": Work(
        "segment maps of four images of 512 x 512 from their logits",
        lambda o, r: our_segments(),
        lambda o, r: official_segments(o),
        "official loop",
        5,
        "0.2",
    ),
    "pq": Work(
        "PQ of 20 images of 480 x 640 with 40 segments, PNG decoding included",
        lambda o, r: our_pq(r),
        lambda o, r: panopticapi_pq(r),
        "COCO panoptic API",
        5,
        "0.33",
    ),
    "sample": Work(
        "10 labelled samples, 640 crop, from 1.5 megapixels",
        lambda o, r: our_labeled_sample(r),
        lambda o, r: decoding(r, True),
        "decoding JPEG and PNG",
        5,
        "2.5",
    ),
    "views": Work(
        "10 pairs of unlabelled views, 640 crop, from 1.5 megapixels",
        lambda o, r: our_unlabeled_sample(r),
        lambda o, r: decoding(r, False),
        "decoding the JPEG",
        5,
        "2.5",
    ),
    "sam": Work(
        "SAM's masks of one image of 480 x 640, ViT-B, 8 x 8 points",
        lambda o, r: our_sam(r),
        lambda o, r: their_sam(),
        "segment_anything",
        2,
        "1",
    ),
    "ranks": Work(
        "one semi-supervised step of the miniature world, by two processes of one thread",
        lambda o, r: steps_of_ranks(r, 2),
        lambda o, r: steps_of_ranks(r, 1),
        "one process",
    ),
    "index": Work(
        "a panoptic JSON of COCO's size", lambda o, r: index(r), goal="20 s, 300 MB a worker"
    ),
}
ONE = dict(images=1, side=256)  # the step whose cost grows: 1 labelled + 1 unlabelled image
GROWTH = {
    "images of the data set: a labelled batch": (
        (100, 1_000, 10_000, 100_000),
        lambda n: lambda o, r: our_loading(r, n),
    ),
    "classes: a step": ((20, 150, 1_000), lambda n: lambda o, r: our_step(**ONE, classes=n)),
    "queries: a step": ((100, 200, 400), lambda n: lambda o, r: our_step(**ONE, queries=n)),
    "segments an image: a step": ((5, 50, 300), lambda n: lambda o, r: our_step(**ONE, segments=n)),
    "pixels of the crop's side: a step": (
        (256, 512, 640),
        lambda n: lambda o, r: our_step(**{**ONE, "side": n}),
    ),
    "views, labelled and as many unlabelled: a step": (
        (1, 2, 4),
        lambda n: lambda o, r: our_step(**{**ONE, "images": n}),
    ),
}
GROWING = {
    f"{axis} {n}": Work(f"{axis}, {n:,}", make(n), repeats=2)
    for axis, (values, make) in GROWTH.items()
    for n in values
}


class Turn:
    """`with turn:` waits until it is this process's turn, and then gives it to the other."""

    def __init__(self, mine, other):
        self.mine, self.other = mine, other

    def __enter__(self):
        self.mine.acquire()

    def __exit__(self, *error):
        self.other.release()


def measure(
    name: str,
    side: str,
    official: Path | None,
    threads: int,
    repeats: int | None,
    answer,
    turn: Turn,
) -> None:
    """In a process of its own: seconds (median, and all; the first call warms up), peak GB; for our side of a model's work also the arithmetic's time."""
    torch.set_num_threads(threads)
    work = {**WORKS, **GROWING}[name]
    repeats = repeats or work.repeats
    try:
        with tempfile.TemporaryDirectory() as folder:
            with turn:
                made = (work.ours if side == "ours" else work.peer)(official, Path(folder))
            if isinstance(made, dict):
                answer.send(made)
                return
            times = []
            for t in range(repeats + 1):
                with turn:
                    clock = time.perf_counter()
                    made(t)
                    times.append(time.perf_counter() - clock)
            result = {
                "seconds": round(statistics.median(times[1:]), 4),
                "all": [round(s, 4) for s in times[1:]],
                "peak GB": peak_gb(),
            }
            if side == "ours" and any(word in name for word in ("step", "inference")):
                counter = FlopCounterMode(display=False)
                with turn, counter:
                    made(repeats)
                flops = counter.get_total_flops()
                result |= {
                    "GFLOP": round(flops / 1e9),
                    "limit": round(
                        flops / matmul_rate(BF16 if "bf16" in name else torch.float32), 4
                    ),
                }
            answer.send(result)
    except Skipped as reason:
        answer.send({"skipped": str(reason)})
    except BaseException as error:
        answer.send({"failed": f"failed: {type(error).__name__}: {error}"})
        raise


def matmul_rate(precision: torch.dtype, side: int = 2048) -> float:
    """Floating-point operations a second of this process in a large matrix product: the best of ten."""
    a, b, times = (
        torch.randn(side, side, dtype=precision),
        torch.randn(side, side, dtype=precision),
        [],
    )
    for _ in range(10):
        clock = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - clock)
    return 2 * side**3 / min(times)


def peak_gb() -> float:
    return round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2
    )  # Linux counts in KiB


def measured(
    name: str, sides: tuple[str, ...], official: Path | None, threads: int, repeats: int | None
) -> list[dict]:
    """The sides of a work, each in a process of its own; they take turns, so that a machine that slows down does so for both."""
    context, processes, results = multiprocessing.get_context("spawn"), {}, {}
    turns = [context.Semaphore(int(k == 0)) for k in range(len(sides))]
    for k, side in enumerate(sides):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=measure,
            args=(name, side, official, threads, repeats, sender, Turn(turns[k], turns[k - 1])),
        )
        process.start()
        sender.close()  # so that the end of the process, however it comes, ends the waiting
        processes[receiver] = k, process
    while processes:
        for receiver in multiprocessing.connection.wait(list(processes)):
            k, process = processes.pop(receiver)
            try:
                results[k] = receiver.recv()
            except EOFError:
                process.join()
                results[k] = {
                    "failed": f"failed: ended by signal {-process.exitcode}"
                    if process.exitcode < 0
                    else f"failed: exit status {process.exitcode}"
                }
            for _ in range(100):  # the other one has no one to wait for
                turns[k - 1].release()
            process.join()
    return [results[k] for k in range(len(sides))]


def row(name: str, ours: dict, peer: dict | None) -> str:
    work, shown = (
        WORKS[name],
        lambda r: (
            r.get("skipped")
            or r.get("failed")
            or " ".join(
                f"{r[k]:,} {unit}" for k, unit in (("seconds", "s"), ("peak GB", "GB")) if k in r
            )
        ),
    )
    ratio = ""
    if peer is not None and "seconds" in ours and "seconds" in peer:
        ratios = [
            a / b
            for a, b in zip(ours.get("all", [ours["seconds"]]), peer.get("all", [peer["seconds"]]))
        ]
        ratio = f"{statistics.median(ratios):.2f}" + (
            f" ({min(ratios):.2f} to {max(ratios):.2f}), memory {ours['peak GB'] / peer['peak GB']:.2f}"
            if "peak GB" in ours
            else ""
        )
    more = "; ".join(f"{k} {v:,}" for k, v in ours.items() if k.startswith("MB"))
    limit = f"{ours['limit']:,} s ({ours['GFLOP']:,} GFLOP)" if "limit" in ours else ""
    return f"| {work.title} | {shown(ours)}{'; ' + more if more else ''} | {work.peer_name + ': ' + shown(peer) if peer else ''} | {ratio} | {limit} | {work.goal} |"


def growth_tables(threads: int, repeats: int | None) -> dict:
    """Time and memory along each axis, beside the arithmetic; every point in a process of its own."""
    results = {}
    for axis, (values, _) in GROWTH.items():
        print(f"\n| {axis} | seconds | arithmetic alone | peak GB |\n|---|---|---|---|", flush=True)
        for n in values:
            r = results[f"{axis} {n}"] = measured(f"{axis} {n}", ("ours",), None, threads, repeats)[
                0
            ]
            print(
                f"| {n:,} | {r.get('seconds', r.get('failed'))} | {r.get('limit', '')} | {r.get('peak GB', '')} |",
                flush=True,
            )
    return results


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--only",
        default=",".join(WORKS),
        help="; ".join(f"{n}: {w.title}" for n, w in WORKS.items()),
    )
    p.add_argument("--official", type=Path, help="a clone of the official code, to measure beside")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help="calls of each side that count; default 2 to 5, by the work",
    )
    p.add_argument(
        "--growth",
        action="store_true",
        help="instead: how time and memory grow with data set, classes, queries, segments, crop and views",
    )
    p.add_argument("--json", type=Path, help="write the figures to this file")
    args = p.parse_args()
    chosen = args.only.split(",")
    unknown = [name for name in chosen if name not in WORKS]
    if unknown:
        p.error(f"unknown work '{unknown[0]}'; available: {', '.join(WORKS)}")
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": args.threads,
    }
    print("machine: " + ", ".join(f"{k} {v}" for k, v in machine.items()))
    if args.growth:
        results = growth_tables(args.threads, args.repeats)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
        return int(any("failed" in r for r in results.values()))
    print("\n| work | ours | peer | ratio | limit | goal |\n|---|---|---|---|---|---|", flush=True)
    results = {}
    for name in chosen:
        ours, peer = (
            *measured(
                name,
                ("ours", "peer") if WORKS[name].peer else ("ours",),
                args.official,
                args.threads,
                args.repeats,
            ),
            None,
        )[:2]
        results[name] = {"ours": ours, "peer": peer}
        print(row(name, ours, peer), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    return int(any("failed" in (side or {}) for both in results.values() for side in both.values()))


if __name__ == "__main__":
    sys.exit(main())
