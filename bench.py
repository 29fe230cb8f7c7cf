"""Measurements: time and memory of the method's parts at real size, one process each, with weights of noise and made images.

    python bench.py                            everything, as one table
    python bench.py --only step,index          some of it
    python bench.py --json bench.json          the figures, with the machine they were measured on

Times are medians. Peak memory is the largest resident set of the process that did the work, interpreter and libraries included.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import datasets
import foundation
from clip_ensemble import ClipBackbone, Vocabulary
from config import OFFICIAL
from data import Labeled, PanopticFolder, Taxonomy, Unlabeled
from matcher import Target
from mean_teacher import train_step
from model import Segmenter
from optim import build_optimizer

COCO_IMAGES, COCO_SEGMENTS = 118_287, 11         # of train2017; segments an image, 1.3 million in all
NAMES_A_CLASS = 3


def step(side: int = 640, classes: int = 150, images: int = 1, segments: int = 20, repeats: int = 3) -> dict:
    """Semi-supervised steps of the official size: ConvNeXt-B, 200 queries, 12 544 points, `images` labelled and as many unlabelled, CutMix on."""
    torch.manual_seed(0)
    cfg = dataclasses.replace(OFFICIAL, pretrained="random", crop=side)
    clip, _ = foundation.load_clip(cfg)
    vocabulary = Vocabulary(F.normalize(torch.randn(classes * NAMES_A_CLASS, clip.visual.head.proj.out_features), dim=-1), [NAMES_A_CLASS] * classes)
    student = Segmenter(ClipBackbone(clip), vocabulary, cfg, classes)
    del clip                                     # the text tower has done its work before the training begins
    teacher, optimizer, things = student.teacher(), build_optimizer(student, cfg), torch.arange(classes) < classes * 2 // 3
    times = []
    for t in range(repeats + 1):
        labeled, unlabeled = made_batch(side, classes, images, segments, t)
        clock = time.perf_counter()
        train_step(student, teacher, optimizer, labeled, unlabeled, things, cfg, t)
        times.append(time.perf_counter() - clock)
    return {"seconds a step": round(statistics.median(times[1:]), 2), "peak GB": peak_gb(), "limit": "16 GB"}


def made_batch(side: int, classes: int, images: int, segments: int, seed: int) -> tuple[Labeled, Unlabeled]:
    """Noise in the shape of a batch: partitions into cells around random centres, one CutMix box an unlabelled image."""
    g = torch.Generator().manual_seed(seed)
    picture = lambda: torch.randint(0, 256, (images, 3, side, side), generator=g, dtype=torch.uint8)
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
    return Labeled(picture(), targets, names), Unlabeled(picture(), picture(), [box] * images, picture(), picture(), names)


def index(images: int = COCO_IMAGES, reads: int = 2000, workers: int = 2) -> dict:
    """Opening a panoptic JSON of COCO's size, and the memory that a loader process has to itself, before and after reading images."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ids = np.repeat(np.repeat(np.arange(12, dtype=np.int32).reshape(3, 4) % (COCO_SEGMENTS + 1), 160, 0), 160, 1)     # 480 x 640
        datasets.encode(ids).save(root / "map.png")
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*ids.shape, 3), np.uint8)).save(root / "image.jpg")
        categories = [{"id": k, "name": f"class {k}", "isthing": int(k < 80)} for k in range(1, 134)]
        rows, names = [], [f"{i:012d}" for i in range(images)]
        for i, name in enumerate(names):
            info = [{"id": k, "category_id": 1 + (7 * i + k) % 133, "iscrowd": 0, "bbox": [0, 0, 160, 160], "area": 25_600} for k in range(1, COCO_SEGMENTS + 1)]
            rows.append({"image_id": i, "file_name": f"{name}.png", "segments_info": info})
        listed = [{"id": i, "file_name": f"{name}.jpg", "width": 640, "height": 480, "license": 1} for i, name in enumerate(names)]
        (root / "index.json").write_text(json.dumps({"images": listed, "annotations": rows, "categories": categories}))
        del rows, listed
        chosen = np.random.default_rng(1).choice(images, reads, replace=False).tolist()
        for kind, ending in (("images", "jpg"), ("maps", "png")):
            (root / kind).mkdir()
            for i in chosen:
                os.symlink(root / f"{'image' if kind == 'images' else 'map'}.{ending}", root / kind / f"{names[i]}.{ending}")
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        process = multiprocessing.get_context("spawn").Process(target=_open_index, args=(root, chosen, workers, queue))
        process.start()
        result = queue.get()
        process.join()
        return {"images": images, "segments": images * COCO_SEGMENTS, **result, "limit": "20 s, 300 MB a worker"}


def _open_index(root: Path, chosen: list[int], workers: int, queue) -> None:
    """In a process of its own: what wrote the file is not in its memory."""
    taxonomy = Taxonomy(tuple(f"class {k}" for k in range(1, 134)), tuple(k < 80 for k in range(1, 134)), tuple(range(1, 134)))
    clock = time.perf_counter()
    folder = PanopticFolder(root / "index.json", root / "images", root / "maps", taxonomy)
    seconds = time.perf_counter() - clock
    loader = torch.utils.data.DataLoader(_Reads(folder, chosen), batch_size=None, num_workers=workers, multiprocessing_context="fork")
    private = [float(v) for v in loader]                           # MB after each read, workers in turn
    early, late = private[10 * workers:20 * workers], private[-10 * workers:]
    queue.put({"seconds to open": round(seconds, 1), "MB a worker, after 10 reads": round(max(early)),
               f"MB a worker, after {len(chosen) // workers} reads": round(max(late))})


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


def peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, 2)           # Linux counts in KiB


WORKS = {"step": step, "index": index}


def run(name: str) -> dict:
    """One work in a process of its own, so that its peak memory is its own."""
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(name, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def _run(name: str, queue) -> None:
    try:
        queue.put(WORKS[name]())
    except BaseException as error:
        queue.put({"failed": f"{type(error).__name__}: {error}"})
        raise


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default=",".join(WORKS), help=", ".join(f"{n}: {f.__doc__.splitlines()[0]}" for n, f in WORKS.items()))
    p.add_argument("--json", type=Path, help="write the figures to this file")
    args = p.parse_args()
    chosen = args.only.split(",")
    unknown = [name for name in chosen if name not in WORKS]
    if unknown:
        p.error(f"unknown work '{unknown[0]}'; available: {', '.join(WORKS)}")
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print("machine: " + ", ".join(f"{k} {v}" for k, v in machine.items()), flush=True)
    results = {}
    for name in chosen:
        results[name] = run(name)
        print(f"\n{name}: {WORKS[name].__doc__.splitlines()[0]}")
        for key, value in results[name].items():
            print(f"  {key:<40}{value:>16,}" if isinstance(value, int) else f"  {key:<40}{value:>16}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
