"""What several tests use: a tiny model, small data sets, runs in processes of their own."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dearli
from clip_ensemble import Vocabulary
from config import MINI
from engine import checkpoint
from engine.flags import FLAGS, READS, configure, usual_method
from engine.idle import idle
from engine.parser import parser
from engine.stored import written_config
from mini import microcosm
from model import Mask2Former
from pretrained import segmenter
from readers import downloads
from readers.ground_truth import Taxonomy
from tools import prepare

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("DEARLI_TEST_DATA", ROOT.parent / "shared" / "data"))
needs_nuclei = pytest.mark.skipif(
    not (REAL_DATA / "nuclei_panoptic").is_dir(),
    reason=f"no real images at {REAL_DATA} (set DEARLI_TEST_DATA)",
)
TINY = dataclasses.replace(
    MINI,
    pretrained="random",
    hidden=32,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    encoder_ffn=32,
    decoder_ffn=32,
    num_queries=6,
    num_points=64,
    labeled_batch=2,
    unlabeled_batch=2,
    dewa_batch=2,
    crop=64,
    test_size=64,
)
CPU = torch.device("cpu")
TWO_CLASSES = Taxonomy(("red ball", "grass, lawn"), (True, False), (1, 2))


def tiny_segmenter(cfg=TINY, taxonomy=TWO_CLASSES, clip=None):
    return segmenter.build(cfg, taxonomy, CPU, clip)


def random_vocabulary(counts=(1, 2, 1), dim=16, seed=0):
    return Vocabulary(
        F.normalize(
            torch.randn(sum(counts), dim, generator=torch.Generator().manual_seed(seed)), dim=-1
        ),
        list(counts),
    )


def tiny_head(cfg=TINY, channels=(8, 8, 16, 16), counts=(1, 2, 1)):
    torch.manual_seed(0)
    vocabulary = random_vocabulary(counts)
    return Mask2Former(list(channels), cfg, len(counts), vocabulary)


def features(batch=2, channels=(8, 8, 16, 16), sides=(16, 8, 4, 2)):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(batch, c, s, s, generator=g) for c, s in zip(channels, sides)]


def quarters():
    """A 8 x 8 partition: segment 1 upper left, 2 upper right, 3 below."""
    segment_map = torch.full((8, 8), 3, dtype=torch.int32)
    segment_map[:4, :4], segment_map[:4, 4:] = 1, 2
    return segment_map


def sizes(h, w):
    return ((h, w),) * 3


def write_coco_folder(root, images=6, side=64):
    """A data set in COCO panoptic format from the miniature world, with ids above 65535 and a
    crowd region."""
    (root / "images").mkdir(parents=True)
    (root / "panoptic").mkdir()
    categories = [
        {"id": 10 * k + 7, "name": name.split(",")[0], "isthing": int(k < len(microcosm.THINGS))}
        for k, name in enumerate(microcosm.CLASSES)
    ]
    for part, count in (("train", images), ("val", 2)):
        content = {"images": [], "annotations": [], "categories": categories}
        for i in range(count):
            s = microcosm.scene("train" if part == "train" else "dev", i, side)
            ids = np.array([0] + [70_000 + 300 * k for k in range(len(s.labels))])[s.segment_map]
            Image.fromarray(s.image).save(root / "images" / f"{part}{i}.png")
            Image.fromarray(
                np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
            ).save(root / "panoptic" / f"{part}{i}.png")
            segments = [
                {
                    "id": 70_000 + 300 * k,
                    "category_id": 10 * int(label) + 7,
                    "area": int((s.segment_map == k + 1).sum()),
                    "iscrowd": int(k == 1),
                }
                for k, label in enumerate(s.labels)
            ]
            content["images"].append(
                {"id": i, "file_name": f"{part}{i}.png", "height": side, "width": side}
            )
            content["annotations"].append(
                {"image_id": i, "file_name": f"{part}{i}.png", "segments_info": segments}
            )
        (root / f"panoptic_{part}.json").write_text(json.dumps(content))
    (root / "splits" / "1_3").mkdir(parents=True)
    (root / "splits" / "1_3" / "labeled.txt").write_text(
        "train0.png train0.png\ntrain3.png train3.png\n"
    )
    return root


def png_of_16_bits(path, values):
    """A PNG of (H, W) or (H, W, channels) values, 16 bits each: grey, grey and alpha, RGB or
    RGBA."""
    values = np.asarray(values)
    values = values[..., None] if values.ndim == 2 else values
    height, width, channels = values.shape

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def write_downloads(name, root, monkeypatch):
    """The downloads of a data set in their original layout, two handfuls of pixels each, and its
    official lists."""
    kind = "ade20k" if name == "ade20k" else "coco"
    base, rng = root / downloads.FOLDERS[kind], np.random.default_rng(0)

    def save(array, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    def photo():
        return rng.integers(0, 256, (64, 96, 3), np.uint8)

    if kind == "ade20k":
        stems = {
            "training": [f"ADE_train_{i:08d}" for i in range(1, 5)],
            "validation": ["ADE_val_00000001", "ADE_val_00000002"],
        }
        for part, names in stems.items():
            for stem in names:
                semantic = np.repeat(
                    np.repeat(rng.choice([0, 1, 3, 4, 13, 21], (4, 6)).astype(np.uint8), 16, 0),
                    16,
                    1,
                )
                instances = np.zeros((64, 96, 3), np.uint8)
                instances[8:40, 10:50, :2], instances[30:60, 60:90, :2] = (5, 1), (9, 2)
                save(photo(), base / "images" / part / f"{stem}.jpg")
                save(semantic, base / "annotations" / part / f"{stem}.png")
                save(instances, base / "annotations_instance" / part / f"{stem}.png")

        def line(stem):
            return f"images/training/{stem}.jpg annotations/training/{stem}.png\n"

        labeled, unlabeled = (
            line(a) + line(b) for a, b in (stems["training"][:2], stems["training"][2:])
        )
        prompts = ["0:invalid_class_id", *(f"{k}:class {k},synonym {k}" for k in range(1, 151))]
    else:
        categories = [
            {"id": 1, "name": "person", "isthing": 1},
            {"id": 3, "name": "car", "isthing": 1},
            {"id": 92, "name": "banner", "isthing": 0},
            {"id": 200, "name": "rug", "isthing": 0},
        ]
        for part, count in (("train", 4), ("val", 2)):
            content = {"images": [], "annotations": [], "categories": categories}
            for i in range(1, count + 1):
                ids = np.repeat(
                    np.repeat(rng.choice([0, 300, 70_000, 5, 6], (4, 6)), 16, 0), 16, 1
                ).astype(np.int32)
                segments = [
                    {
                        "id": n,
                        "category_id": c,
                        "area": int((ids == n).sum()),
                        "bbox": [0, 0, 96, 64],
                        "iscrowd": int(n == 6),
                    }
                    for n, c in ((300, 1), (70_000, 92), (5, 200), (6, 3))
                    if (ids == n).any()
                ]
                content["images"].append(
                    {"id": i, "file_name": f"{i:012d}.jpg", "width": 96, "height": 64}
                )
                content["annotations"].append(
                    {"image_id": i, "file_name": f"{i:012d}.png", "segments_info": segments}
                )
                save(photo(), base / f"{part}2017" / f"{i:012d}.jpg")
                save(
                    np.asarray(prepare.encode(ids)),
                    base / f"panoptic_{part}2017" / f"{i:012d}.png",
                )
            (base / "annotations").mkdir(exist_ok=True)
            (base / "annotations" / f"panoptic_{part}2017.json").write_text(json.dumps(content))
        labeled, unlabeled = (
            "".join(f"train2017/{i:012d}.jpg masks/{i:012d}.png\n" for i in (1, 2)),
            "",
        )
        prompts = [
            "0:background" if name == "coco-objects" else "0:invalid_class_id",
            "1:person,child",
            "2:invalid_class_id",
            "3:car",
            "92:banner",
            "200:rug",
        ]
    hashes = {}
    for given, _, _ in prepare.lists(name).values():
        path = root / "assets" / given
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "\n".join(prompts)
            if given.startswith("prompts")
            else unlabeled
            if "unlabeled" in given
            else labeled
        )
        hashes[given] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(prepare, "SHA256", hashes)
    return base


# ------------------------------------------------------------- validate.py, and faults in data sets
#
# Fault 26 (archives that unpack outside their folder, or to more than fits) has no test because
# nothing here unpacks an archive: `--stage prepare` names the addresses and reads what was
# unpacked.


def rewrite(path, change):
    """Change a JSON in place: change(content) edits it, or returns what takes its place."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def fingerprint(folder):
    """Names and contents of all files, links not followed."""
    return {
        str(p): p.is_symlink()
        and os.readlink(p)
        or p.is_file()
        and hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
    }


def validated(root, *flags, code, capsys):
    """Output, error line and JSON of --stage validate."""
    target = root.parent / "report.json"
    target.unlink(missing_ok=True)
    capsys.readouterr()
    arguments = [
        "--stage",
        "validate",
        "--dataset",
        "custom",
        "--data-root",
        root,
        "--json",
        target,
        "--workers",
        0,
        *flags,
    ]
    assert dearli.main([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    return (
        out,
        [line for line in err.splitlines() if line.startswith("error: ")],
        json.loads(target.read_text()),
    )


def counts(result, c=0):
    return tuple(result["per_class"][c][key] for key in ("tp", "fp", "fn"))


class FakeSam:
    """Two overlapping masks an image; counts its calls."""

    calls = 0

    def generate(self, image):
        self.calls += 1
        first, second = np.zeros(image.shape[:2], bool), np.zeros(image.shape[:2], bool)
        first[:40], second[20:, :50] = True, True
        return [
            {
                "segmentation": m,
                "area": m.sum(),
                "predicted_iou": 0.9,
                "stability_score": 0.9,
                "crop_box": [0, 0, 128, 128],
                "point_coords": [[1.0, 2.0]],
            }
            for m in (first, second)
        ]


class Answers(FakeSam):
    """A generator that says what it is, and whose masks say of which image they are: as many
    pixels as the sum of its first row."""

    def __init__(self, points):
        self.about = {"kind": "fake", "points_per_side": points, "weights": "0" * 64}

    def generate(self, image):
        found = super().generate(image)
        found[0]["segmentation"] = (
            np.arange(image[..., 0].size) < int(image[0].sum()) % 1000
        ).reshape(image.shape[:2])
        return found


def log_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


TINY_FLAGS = [
    "--pretrained",
    "random",
    "--hidden",
    "32",
    "--heads",
    "2",
    "--encoder-layers",
    "1",
    "--decoder-layers",
    "2",
    "--encoder-ffn",
    "32",
    "--decoder-ffn",
    "32",
    "--num-queries",
    "8",
    "--num-points",
    "64",
    "--labeled-batch",
    "2",
    "--unlabeled-batch",
    "2",
    "--dewa-batch",
    "2",
    "--crop",
    "64",
    "--test-size",
    "64",
    "--burn-in",
    "0.5",
    "--burn-in-warm",
    "0.25",
    "--report-images",
    "1",
    "--split",
    "4",
    "--device",
    "cpu",
]


def fitting(args, flags=TINY_FLAGS):
    """args, and of the pairs in flags those that their stage reads."""
    args = [str(a) for a in args]
    asked = parser().parse_args([a for a in args if a != "--resume"])
    if asked.stage == "ssl":
        asked.method = asked.method or usual_method(asked)
    flags = [*map(str, flags)]
    known = {flag.dest for flag in FLAGS if asked.stage in flag.stages} | READS[asked.stage]
    stored = written_config(asked.weights) if asked.weights else {}
    by_width = stored.get("object_width") and "seen_width" not in asked.flags
    stored = stored if stored.get("network") == "deeplab" or by_width else None
    known -= idle(asked, configure(asked, stored)).keys()
    known -= {"split"} if asked.stage == "predict" else set()  # a run knows its classes
    pairs = [
        (flag, value)
        for flag, value in zip(flags[::2], flags[1::2])
        if flag[2:].replace("-", "_") in known and flag not in args
    ]
    return args + [word for pair in pairs for word in pair]


def run(*args):
    return dearli.main(fitting(args))


def run_folder(stage, root, *flags):
    """A stage on a folder in COCO panoptic format, beside it; --split is not given unless it is
    among the flags.
    """
    split = TINY_FLAGS.index("--split")
    usual = TINY_FLAGS[:split] + TINY_FLAGS[split + 2 :]
    arguments = [
        "--stage",
        *stage.split(),
        "--dataset",
        "custom",
        "--data-root",
        root,
        "--runs",
        root.parent,
        *flags,
    ]
    return dearli.main(fitting(arguments, usual))


# ------------------------------- the state of a run: what it must survive, each by the fault itself


def fork(main, output):
    """main() in a process of its own, which has everything loaded; what it says goes to a file.
    Its return value is the exit code."""

    def target():
        torch.set_num_threads(1)  # no OpenMP after a fork
        os.setpgrp()  # so that a test can signal it with its loader processes
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell's background jobs ignore it, and so do theirs
        with open(output, "w", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            os.dup2(sys.stdout.fileno(), 2)
            sys.exit(main())

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def ended(process, seconds=60):
    """The exit code of a forked process, none of whose own processes is left."""
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return process.exitcode
        time.sleep(0.1)
    pytest.fail("a loader process is left")


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.0005)


def same(a, b):
    """Two states of a run, all tensors bit for bit; the time is what it is."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a if k not in ("time", "workers")
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


SSL = ["--stage", "ssl", "--method", "dear", "--no-eval"]


def back_to(folder, step):
    """Drop the checkpoints after a step, as if a run had been stopped there."""
    for path in checkpoint.steps(folder):
        if path.stem > f"step_{step:07d}":
            path.unlink()


# ---------------------------------------------------------------- colours.py, report.py, predict.py


def square(image_side=64):
    """A grey image, and a map with two things of class 0 side by side, stuff of class 1 below,
    void at the right."""
    segment_map = np.zeros((image_side, image_side), np.int32)
    half, void = image_side // 2, 3 * image_side // 4
    (
        segment_map[:half, : half - 8],
        segment_map[:half, half - 8 : void],
        segment_map[half:, :void],
    ) = 1, 2, 3
    return (
        Image.new("RGB", (image_side, image_side), (128, 128, 128)),
        segment_map,
        np.array([0, 0, 1]),
    )


def predict_stage(folder, *flags, weights=None):
    return dearli.main(
        [
            str(a)
            for a in [
                "--stage",
                "predict",
                "--weights",
                weights or folder / "run",
                "--device",
                "cpu",
                *flags,
            ]
        ]
    )


def photo(path, size=(12, 10), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)).save(
        path
    )


def save(name, array):
    return lambda root: Image.fromarray(array).save(root / name)
