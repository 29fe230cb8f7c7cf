"""Every stage of the command line once on a device, and its results beside those of the CPU.

Rows as in `bench_gpu_works`. The miniature world has a few scenes here, and runs have a few steps.
What is compared: files of masks, metrics and maps that both devices make from the same weights; and
of one training step the outputs, losses and gradients, from the same weights and points, with TF32
off. Points are drawn on the device, so the losses of whole runs are not the same.
"""

import contextlib
import copy
import importlib
import io
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import MINI, OFFICIAL
from engine.run_log import read_log
from losses import set_loss
from matcher import Target
from mini import microcosm, scenes
from model import Segmenter, mask_logits
from pretrained.segmenter import build
from readers import mask_files
from tools.bench_gpu_works import BF16, FP32, Bench, distance, mode, taxonomy
from tools.bench_works import cells, counts

# Of a decoder that a CPU trains in no time.
TINY = """--pretrained random --hidden 32 --heads 2 --encoder-layers 1 --decoder-layers 2
--encoder-ffn 32 --decoder-ffn 32 --num-queries 8 --num-points 64 --crop 64 --test-size 64"""
TINY = TINY.replace("\n", " ")
BATCHES = " --labeled-batch 2 --unlabeled-batch 2"
SPLIT = 4  # labelled images
# Largest distances of a device from the CPU, |x - y| / |y| of L2 norms, in fp32 with TF32 off.
TOLERANCE = {
    **dict.fromkeys(("class logits", "mask logits", "posterior", "losses", "gradient norm"), 1e-3),
    "gradients": 1e-2,  # a pixel at the border of a mask is attended to, or not
}
BF16_TOLERANCE = 0.1  # of the losses in bf16 from those in fp32
LEAST_IOU, LEAST_SAME = 0.98, 0.99  # of masks, in the mean; share of pixels of the same class
FIGURE = 0.01  # most that PQ and mIoU (0 to 1) differ


@contextlib.contextmanager
def few_scenes(bench: Bench):
    before = scenes.MINI_TRAIN, scenes.MINI_VAL
    scenes.MINI_TRAIN, scenes.MINI_VAL = (8, 4) if bench.small else (24, 8)
    try:
        yield
    finally:
        scenes.MINI_TRAIN, scenes.MINI_VAL = before


def stage(bench: Bench, flags: str) -> float:
    """Seconds of one call of the real entry, which is above this wing and so found by name."""
    said, main = io.StringIO(), importlib.import_module("dearli").main
    bench.wait()
    clock = time.perf_counter()
    with few_scenes(bench), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(flags.split())
    bench.wait()
    if code:
        lines = said.getvalue().splitlines()
        wrong = [text for text in lines if text.startswith("error: ")] or lines[-1:]
        raise RuntimeError(f"exit code {code}: {' '.join(wrong)}; dearli.py {flags}")
    return time.perf_counter() - clock


def runs(bench: Bench, name: str, device=None) -> Path:
    """Where runs of a precision go, by device."""
    return bench.folder / f"{(device or bench.device).type}-{name}"


def steps(bench: Bench, kind: str) -> int:
    return 4 if bench.small else {"dewa": 20, "sup": 30, "ssl": 60}[kind]


# -------------------------------------------------------------------------------------- stages


def masks(bench: Bench, name: str) -> dict:
    """SAM's masks of all training images, beside those that the CPU draws in fp32."""
    cpu = torch.device("cpu")
    seconds = _masks(bench, name, bench.device)
    if not runs(bench, "fp32-alone", cpu).exists():
        _masks(bench, "fp32", cpu, "fp32-alone")
    of_device, of_cpu = (
        _records(bench, folder / "mini-masks")
        for folder in (runs(bench, name), runs(bench, "fp32-alone", cpu))
    )
    numbers = [sum(m.shape[2] for m in records) for records in (of_device, of_cpu)]
    best = [_best_iou(a, b) for a, b in zip(of_device, of_cpu) if a.shape[2]]
    mean = float(np.concatenate(best).mean()) if best else 0.0
    close = mean >= LEAST_IOU and abs(numbers[0] - numbers[1]) <= 0.02 * numbers[1]
    return {
        "said": f"{seconds:.1f} s; {numbers[0]} masks, the CPU's {numbers[1]}; IoU {mean:.4f}",
        # in bf16 other masks are stable
        "ok": numbers[0] > 0 and (close or name != "fp32"),
        **{"seconds": seconds, "masks": numbers, "mean IoU": mean},
    }


def _masks(bench: Bench, name: str, device, folder: str = "") -> float:
    flags = f"--stage masks --device {device} --split {SPLIT} --precision {name} "
    flags += f"--runs {runs(bench, folder or name, device)}"
    with mode("exact" if name == "fp32" else name):
        return stage(bench, flags + (" --points-per-side 3" if bench.small else ""))


def _records(bench: Bench, folder: Path) -> list[np.ndarray]:
    """(H, W, N) of each training image."""
    with few_scenes(bench):
        images = scenes.load_mini(str(SPLIT)).train
        return [
            mask_files.read_masks(folder, images.name(i), images.image(i).size[::-1])
            for i in range(len(images))
        ]


def _best_iou(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of each of ours (H, W, N) with the most alike of theirs: (N,)."""
    a, b = (x.reshape(-1, x.shape[2]).astype(np.float32) for x in (ours, theirs))
    both = a.T @ b
    either = a.sum(0)[:, None] + b.sum(0)[None] - both
    return (both / either.clip(1)).max(1, initial=0.0)


def regions(bench: Bench) -> dict:
    out = bench.folder / "regions"
    flags = f"--stage masks --sam regions --device {bench.device} --split {SPLIT} --out {out}"
    seconds = stage(bench, flags)
    count = len(list(out.glob("*.json")))
    return {"said": f"{seconds:.1f} s; masks of {count} images", "ok": count >= 8}


def train(bench: Bench, kind: str, name: str, more: int = 0) -> dict:
    """A run of a few steps: dewa, sup or ssl (DEARLi), with its evaluation. more: steps, of a run
    that goes on."""
    folder, small = runs(bench, name) / f"mini-{_named(kind)}", bench.small
    flags = f"{_common(bench, kind, name, folder, more)} --dewa-steps {steps(bench, 'dewa')}"
    if kind == "sup":
        flags = _common(bench, kind, name, folder, more) + (" --resume" if more else "")
        flags += " --labeled-batch 2" if small else ""
    elif kind == "dewa":
        flags = _common(bench, kind, name, folder, more)
        flags += " --dewa-batch 2 --points-per-side 3" if small else ""
    else:
        flags += " --burn-in-warm 2"
        flags += f"{BATCHES} --dewa-batch 2 --points-per-side 3" if small else ""
    seconds = stage(bench, flags)
    return {**_of_log(folder), "stage seconds": seconds}


def _common(bench: Bench, kind: str, name: str, folder: Path, more: int = 0) -> str:
    """Flags of all training stages."""
    flags = f"--stage {kind} --device {bench.device} --precision {name} --split {SPLIT} --steps "
    flags += f"{steps(bench, kind) + more} --runs {runs(bench, name)} --out {folder} "
    flags += "" if kind == "dewa" else "--report-images 2 --watch 0 "
    return flags + (TINY if bench.small else "")


def _named(kind: str) -> str:
    return {"dewa": "dewa", "sup": f"sup-{SPLIT}", "ssl": f"dearli-{SPLIT}"}[kind]


def _of_log(folder: Path) -> dict:
    rows = read_log(folder / "log.jsonl")
    lost = [row.get("loss", math.nan) for row in rows]
    times = np.diff([row["time"] for row in rows])[1:]
    pseudo = [row["pseudo_segments"] for row in rows if "pseudo_segments" in row]
    each = statistics.median(times) if len(times) else math.nan
    said = f"{len(rows)} steps of {each:.3f} s, loss {lost[0]:.2f} to {lost[-1]:.2f}"
    if pseudo:
        said += f", {pseudo[-1]:.1f} pseudo-segments an image"
    return {"said": said, "ok": bool(rows) and bool(np.isfinite(lost).all()), "losses": lost}


def resume(bench: Bench) -> dict:
    """The supervised run, made two steps longer."""
    folder = runs(bench, "fp32") / f"mini-{_named('sup')}"
    before = len(read_log(folder / "log.jsonl")) if folder.exists() else 0
    if not before:
        train(bench, "sup", "fp32")
        before = steps(bench, "sup")
    result = train(bench, "sup", "fp32", 2)
    after = len(read_log(folder / "log.jsonl"))
    return {**result, "ok": result["ok"] and after == before + 2}


def rehearse(bench: Bench) -> dict:
    tiny = TINY if bench.small else ""
    flags = f"--stage ssl --method dear --dry-run --device {bench.device} --split {SPLIT} {tiny}"
    seconds = stage(bench, flags + f" --runs {bench.folder / 'none'}")
    return {"said": f"{seconds:.1f} s", "ok": not (bench.folder / "none").exists()}


def trained_along(bench: Bench, name: str) -> dict:
    """A trained backbone, a linear classifier, loader processes, images in windows."""
    folder = runs(bench, name) / "along"
    flags = _common(bench, "ssl", name, folder) + (BATCHES if bench.small else "")
    flags += " --method ssl --train-backbone --classifier linear --seen-width 18 --window 64"
    seconds = stage(bench, flags + " --burn-in 2 --workers 2")
    return {**_of_log(folder), "stage seconds": seconds}


def zeroshot(bench: Bench) -> dict:
    out = bench.folder / "zeroshot"
    flags = f"--stage zeroshot --device {bench.device} --split {SPLIT} --out {out}"
    seconds = stage(bench, flags)
    figures = json.loads((out / "metrics.json").read_text())["zero-shot"]["all"]
    return {"said": f"{seconds:.1f} s; PQ {100 * figures['pq']:.1f}", "ok": figures["pq"] > 0}


# ------------------------------------------------------------------------- results of both devices


def trained(bench: Bench) -> Path:
    folder = runs(bench, "fp32") / f"mini-{_named('ssl')}"
    if not (folder / "config.json").exists():
        train(bench, "ssl", "fp32")
    return folder


def both(bench: Bench, flags: str, name: str) -> tuple[list[Path], list[float]]:
    """The folders and seconds of a stage on the device and on the CPU, from the same weights."""
    weights, folders, seconds = trained(bench), [], []
    for side, device in (("device", bench.device), ("cpu", "cpu")):
        folders.append(bench.folder / f"{name}-{side}-{time.time_ns()}")
        more = f" --weights {weights} --device {device} --out {folders[-1]}"
        with mode("exact"):
            seconds.append(stage(bench, flags + more))
    return folders, seconds


def evaluation(bench: Bench) -> dict:
    """PQ and mIoU of every reading."""
    folders, seconds = both(bench, "--stage eval --report-images 2", "eval")
    ours, true = (_figures(json.loads((f / "metrics.json").read_text())) for f in folders)
    apart = {key: abs(value - ours[key]) for key, value in true.items()}
    worst = max(apart, key=apart.get)
    said = f"{seconds[0]:.1f} s, the CPU {seconds[1]:.1f}; {len(apart)} figures of all readings, "
    said += f"at most {apart[worst]:.4f} apart ({worst}: {ours[worst]:.4f}, {true[worst]:.4f})"
    ok = ours.keys() == true.keys() and apart[worst] <= FIGURE and max(true.values()) > 0
    return {"said": said, "ok": ok, "figures": ours, "of the CPU": true}


def _figures(metrics: dict) -> dict[str, float]:
    """PQ and mIoU by reading."""
    found = {}
    for reading, result in metrics.items():
        if isinstance(result, dict) and "all" in result:
            found[f"{reading} PQ"] = result["all"]["pq"]
            found |= {f"{reading} mIoU": v for k, v in result.items() if k == "miou"}
    return found


def prediction(bench: Bench) -> dict:
    """Maps of pictures; also of the first by the function of Python."""
    pictures = bench.folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for i in range(2 if bench.small else 6):
        Image.fromarray(microcosm.scene("dev", i).image).save(pictures / f"{i}.png")
    folders, seconds = both(bench, f"--stage predict --input {pictures}", "predict")
    maps = [sorted((folder / "semantic").glob("*.png")) for folder in folders]
    pairs = [[np.asarray(Image.open(path)) for path in pair] for pair in zip(*maps)]
    same = [float((a == b).mean()) for a, b in pairs]
    load = importlib.import_module("dearli").load
    answer = load(trained(bench), device=str(bench.device))(pictures / "0.png")
    rows = json.loads((folders[0] / "panoptic.json").read_text())["annotations"]
    count = sum(len(row["segments_info"]) for row in rows)
    said = f"{seconds[0]:.1f} s, the CPU {seconds[1]:.1f}; {count} segments; semantic maps: "
    said += f"{np.mean(same):.5f} of the pixels as on the CPU"
    ok = len(same) == len(list(pictures.iterdir())) and np.mean(same) >= LEAST_SAME
    return {"said": said, "ok": bool(ok) and answer.semantic.shape == pairs[0][0].shape[:2]}


def one_step(bench: Bench, name: str) -> dict:
    """Outputs, losses and gradients of one forward and backward pass beside the CPU's in fp32."""
    if "step" not in bench.cache:
        model, inputs, cfg = _setting(bench)
        bench.cache["step"] = model, inputs, cfg, _outputs(model, *inputs, cfg, FP32)
    model, inputs, cfg, true = bench.cache["step"]
    own = copy.deepcopy(model).to(bench.device)
    moved = [_to(x, bench.device) for x in inputs]
    with mode("bf16" if name == "bf16" else "exact"):
        found = _outputs(own, *moved, cfg, BF16 if name == "bf16" else FP32)
    apart = {part: distance(found[part], true[part]) for part in true}
    said = ", ".join(f"{part} {value:.1e}" for part, value in apart.items())
    if name == "bf16":
        ok = apart["losses"] <= BF16_TOLERANCE
        return {"said": f"{said} (losses: at most {BF16_TOLERANCE})", "ok": ok, "apart": apart}
    ok = all(apart[part] <= most for part, most in TOLERANCE.items())
    said += f" (at most {TOLERANCE['losses']:.0e}, gradients {TOLERANCE['gradients']:.0e})"
    return {"said": said, "ok": ok, "apart": apart}


def _setting(bench: Bench) -> tuple:
    """A model on the CPU, what it learns from (images, targets, points), its configuration."""
    if bench.small:
        layers = dict(encoder_layers=1, decoder_layers=1)
        cfg = replace(MINI, pretrained="random", crop=64, num_points=64, **layers)
        classes, most = 7, 8
    else:
        cfg, classes, most = replace(OFFICIAL, pretrained="random", crop=256), 20, 30
    model = build(cfg, taxonomy(classes), torch.device("cpu"))
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, cfg.crop, cfg.crop), generator=g, dtype=torch.uint8)
    targets = [
        Target(torch.randint(0, classes, (n,), generator=g), cells(cfg.crop, n, g))
        for n in counts(2, most)
    ]
    # more queries than segments: every segment has its query, and its points
    shapes = (2, cfg.num_points, 2), (sum(map(len, targets)), cfg.num_points, 2)
    points = [
        tuple(torch.rand(shape, generator=g) for shape in shapes)
        for _ in range(cfg.decoder_layers + 1)
    ]
    return model, (images, targets, points), cfg


def _to(x, device):
    if isinstance(x, (list, tuple)):
        return type(x)(_to(part, device) for part in x)
    return x.to(device)


def _outputs(model: Segmenter, images, targets, points, cfg, precision) -> dict[str, Tensor]:
    model.train()
    device = images.device.type
    with torch.autocast(device, precision, enabled=precision != FP32):
        features = model.backbone(images)
        layers, mask_features = model.head(features)
        class_logits, embeddings = layers[-1]
        drawn = mask_logits(embeddings, mask_features).detach()
        with torch.no_grad():
            posterior = model.posterior(features, class_logits, drawn, 0.6)
    terms = set_loss(layers, mask_features, targets, cfg.loss, points=points)
    sum(terms.values()).backward()
    grads = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return {
        "class logits": class_logits.detach(),
        "mask logits": drawn,
        "posterior": posterior,
        "losses": torch.stack([term.detach() for term in terms.values()]),
        "gradient norm": torch.cat(grads).norm(),
        "gradients": torch.cat(grads),
    }


def compiled(bench: Bench) -> dict:
    """torch.compile of the student's head, which no flag asks for: its outputs, and its time."""
    model, inputs, cfg = _setting(bench)
    model = model.to(bench.device)
    images, targets, points = (_to(x, bench.device) for x in inputs)
    name = "fp32" if bench.small else "bf16"
    precision, results, seconds = FP32 if bench.small else BF16, {}, {}
    eager = model.head
    backend = "inductor" if bench.on_gpu else "eager"  # on a CPU it would call a compiler
    for side in ("as it is", "compiled"):
        clock = time.perf_counter()
        if side == "compiled":
            model.head = torch.compile(eager, backend=backend)
        with mode(name):

            def call(t: int) -> None:
                results[side] = _outputs(model, images, targets, points, cfg, precision)

            call(0)
            first = time.perf_counter() - clock
            seconds[side] = statistics.median(bench.times(call, 1 if bench.small else 5, 1))
    apart = {k: distance(results["compiled"][k], v) for k, v in results["as it is"].items()}
    ok = apart["losses"] <= (BF16_TOLERANCE if precision == BF16 else TOLERANCE["losses"])
    said = ", ".join(f"{side} {s:.3f} s" for side, s in seconds.items())
    said += f", ratio {seconds['compiled'] / seconds['as it is']:.2f}; compiling {first:.0f} s; "
    said += f"losses {apart['losses']:.1e} apart; forward, losses and backward of two images, "
    said += f"{cfg.crop} px, {name}"
    return {"said": said, "ok": ok, "apart": apart, "seconds": seconds, "compiling": first}
