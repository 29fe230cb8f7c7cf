"""."""

import contextlib
import dataclasses
import io
import json
import random
import re
import resource
import signal
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import data
import dewa
from config import Config
from engine import checkpoint, stored
from ground.errors import UserError
from pretrained import official
from readers import mask_files, panoptic
from tests.helpers import TINY, fingerprint, rewrite, write_coco_folder
from tools import validate

# ---- a fuzz: `python test_dearli.py --fuzz 2000`

WEIRD = [
    "NaN",
    "1e999",
    "-1e400",
    "-1",
    "0",
    "1.5",
    "99999999999999999999999",
    "16777216",
    "2147483648",
    "null",
    "true",
    "[]",
    "{}",
    '""',
    '"70000"',
    '"../x.png"',
    '"\\ud800"',
    '"a\\u0000b"',
    "[[null]]",
    "[" * 5000,
    "\x00",
    "}",
    ",",
]


def mutate(content, rng):
    """Bytes that differ from the content: flipped bits, a part lost, doubled or overwritten, or (in a text) a value replaced by a weird one."""
    b, kinds = bytearray(content), ["flip", "flip", "head", "cut", "lose", "double", "noise"]
    kind = rng.choice(
        kinds + ["value"] * (20 if content.startswith(b"{") else 3)
    )  # a JSON would hardly ever stay one
    at, size = rng.randrange(len(b)), rng.choice([1, 4, 16, len(b) // 4 + 1])
    tokens = (
        list(re.finditer(rb'"[^"]*"|-?[0-9.]+|[^\s",:]+', content))
        if kind == "value" and b"\x00" not in content
        else []
    )
    if tokens:
        token = rng.choice(tokens)
        b[token.start() : token.end()] = rng.choice(WEIRD).encode()
    elif kind in ("flip", "head", "value"):
        for _ in range(rng.choice([1, 1, 3, 20])):
            b[rng.randrange(min(len(b), 200) if kind == "head" else len(b))] ^= 1 << rng.randrange(
                8
            )
    elif kind == "cut":
        del b[at:]
    elif kind == "lose":
        del b[at : at + size]
    elif kind == "double":
        b[at:at] = b[at : at + size]
    else:
        b[at : at + size] = rng.randbytes(size)
    return bytes(b)


def fuzz_files(folder):
    """Small files of every kind that a user may bring along: {kind: (paths, action that reads them)}."""
    root, masks = write_coco_folder(folder / "set", images=5, side=32), folder / "masks"
    cfg = dataclasses.replace(TINY, crop=32, labeled_batch=3, dewa_batch=5, dewa_crop=32)
    exif = Image.Exif()
    exif[0x0112] = 6
    formats = {
        1: ("jpg", {"exif": exif}),
        2: ("webp", {}),
        3: ("gif", {}),
        4: ("tif", {"compression": "tiff_lzw"}),
    }

    def change(content):
        for i, (ending, options) in formats.items():
            image = content["images"][i]
            with Image.open(root / "images" / image["file_name"]) as opened:
                opened.save(root / "images" / f"train{i}.{ending}", **options)
            image["file_name"] = f"train{i}.{ending}"

    rewrite(root / "panoptic_train.json", change)
    (root / "splits" / "1_3" / "labeled.txt").write_text(
        "".join(f"images/train{i}.{ending} x\n" for i, (ending, _) in formats.items())
    )
    mask_files.generate_masks(
        panoptic.load_folder(root, "5").train,
        SimpleNamespace(
            generate=lambda image: [
                {
                    "segmentation": np.tri(*image.shape[:2], k, dtype=bool),
                    "area": 9,
                    "predicted_iou": 0.9,
                    "stability_score": 0.9,
                    "crop_box": [0, 0, 32, 32],
                    "point_coords": [[1.0, 2.0]],
                }
                for k in (-3, 5)
            ]
        ),
        masks,
    )
    torch.manual_seed(0)
    head = {f"head.decoder.layer{k}.weight": torch.randn(64, 8) for k in range(4)}
    model = SimpleNamespace(trained=lambda: {name: torch.zeros_like(t) for name, t in head.items()})
    state = {
        "step": 3,
        "config": {"stage": "ssl", **dataclasses.asdict(cfg)},
        "student": head,
        "teacher": head,
    }
    checkpoint.save(folder / "run", 3, state)
    torch.save(state, folder / "weights.pt")
    official.write(
        folder / "official.pth",
        official.Weights(
            "student",
            {
                n.replace("head.decoder", "head.decoder.classify.class_embed.layers"): t
                for n, t in head.items()
            },
            {"a": torch.zeros(2)},
            official.criterion("student", 2, 0.1),
        ),
        "official",
    )
    official.write(
        folder / "export.safetensors", official.Weights("student", head, {}, {}), "safetensors"
    )

    def load():
        """As training does, and as --stage validate does, which must list whatever training refuses."""
        faults = []
        try:
            found = validate.check(
                panoptic.load_folder(root, "1_3", complain=faults.append), faults
            )
            json.dumps(found), validate.report(found, "set")
            strict = bool(found["problems"])
        except UserError:
            strict = True
        try:
            dataset = panoptic.load_folder(root, "1_3")
            (
                [data.LabeledBatches(dataset, cfg, 2)[step] for step in range(2)],
                [
                    (dataset.val.truth(i).semantic(), dataset.val.image(i))
                    for i in range(len(dataset.val))
                ],
            )
        except UserError as error:
            assert strict, f"validate found nothing, but: {error}"
            raise

    images = panoptic.load_folder(root, "5").train
    masked = dewa.MaskedImages(images, masks, range(len(images)))

    def restore(path):
        there = stored.read(path)
        stored.take(there, "student", model, str(path)), stored.require_classes(there, 2)
        dataclasses.replace(
            cfg,
            **{
                f.name: there.config[f.name]
                for f in dataclasses.fields(Config)
                if f.name in there.config
            },
        )

    def only(path, action):
        return [path], lambda: action(path)

    return {
        "images": (sorted((root / "images").glob("*")), load),
        "panoptic maps": (sorted((root / "panoptic").glob("*")), load),
        "panoptic JSON": (sorted(root.glob("*.json")), load),
        "split lists": (sorted(root.glob("splits/*/*")), load),
        "SAM masks": (
            sorted(masks.glob("*.json")),
            lambda: [dewa.DewaBatches(masked, cfg, 2)[step] for step in range(2)],
        ),
        "checkpoints of a run": (
            [folder / "run" / "step_0000003.pt"],
            lambda: restore(folder / "run" / "step_0000003.pt"),
        ),
        "checkpoints without hash": only(folder / "weights.pt", restore),
        "official files": only(
            folder / "official.pth", lambda path: official.read(path) or stored.read(path)
        ),
        "safetensors": only(folder / "export.safetensors", restore),
    }


def fuzz(count, seed=0, limit=20):
    """Read `count` mutated files, kind by kind: {kind: Counter(read, refused)}.

    Raises: AssertionError naming the case for any other end than success or one line for the user: another exception, more than `limit`
    seconds, a file that was changed or left behind.
    """
    results = {}

    def too_long(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        files = fuzz_files(Path(name))
        for n in range(count):
            kind = list(files)[n % len(files)]
            (paths, action), rng = files[kind], random.Random(f"{seed} {n}")
            path = rng.choice(paths)
            whole = path.read_bytes()
            path.write_bytes(mutate(whole, rng))
            there, case = (
                fingerprint(Path(name)),
                f"fuzz case {n} (seed {seed}): {kind}, {path.name}",
            )
            signal.alarm(limit)
            try:
                action()
                end = "read"
            except UserError as error:
                end = "refused"
                assert "\n" not in str(error) and len(str(error)) < 1500, f"{case}: {error}"
            except BaseException as error:
                raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
            assert fingerprint(Path(name)) == there, f"{case}: a file was changed"
            path.write_bytes(whole)
            results.setdefault(kind, Counter())[end] += 1
    signal.signal(signal.SIGALRM, before)
    return results


def test_mutated_files_are_read_or_refused_in_one_line(capsys):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = fuzz(153)
    assert sum(c.total() for c in results.values()) == 153 and all(
        c["refused"] for c in results.values()
    ), results
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000
    )  # KB; no header makes us allocate what it states
