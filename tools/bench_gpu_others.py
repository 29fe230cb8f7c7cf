"""What `tools.bench_gpu` measures beside others: SAM's masks, the official step, a run beside the
same run again, and several processes.

Rows as in `bench_gpu_works`.
"""

import contextlib
import importlib
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from config import MINI, OFFICIAL, Config
from ground import ranks
from pretrained.sam import MaskGenerator
from pretrained.sam_fast import answers
from tools import bench_works as works
from tools.bench_gpu_works import FP32, Bench, distance, mode, step_size, taxonomy, verdict
from tools.bench_works import Answering, cells, made_batch

ROOT = Path(__file__).resolve().parent.parent
SAM_GOAL, OFFICIAL_GOAL = 1 / 3, 0.5  # of the peer's time


# ------------------------------------------------------------------------------------------- SAM


def smooth_sam(bench: Bench):
    """A SAM of noise whose masks have borders as a trained one's have: where the image is even.

    Its upsampling has equal weights for the four pixels of a cell; else every mask would be a
    checkerboard, whose run lengths take segment_anything minutes.
    """
    if bench.small:
        from mini import mini_sam

        return mini_sam.load().to(bench.device)
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    with bench.device:
        sam = sam_model_registry["vit_h"]()
    with torch.no_grad():
        for k in (0, 3):
            weight = sam.mask_decoder.output_upscaling[k].weight
            weight.copy_(weight.mean((2, 3), keepdim=True).expand_as(weight))
    return sam.to(bench.device).eval()


def even_picture(side: int) -> np.ndarray:
    """(side, side, 3) uint8: 40 cells, each of one colour."""
    g = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (41, 3), generator=g, dtype=torch.uint8)
    return colours[cells(side, 40, g).long()].numpy()


def sam_setting(bench: Bench):
    """SAM, picture, and a configuration whose threshold keeps a tenth of its answers, as a trained
    SAM's does about; the threshold lies in the widest gap, so that rounding moves none across."""
    if "sam" in bench.cache:
        return bench.cache["sam"]
    sam, side, points = smooth_sam(bench), *((128, 4) if bench.small else (1024, 32))
    picture = even_picture(side)
    cfg = replace(OFFICIAL, points_per_side=points, stability_thresh=0.0, mask_nms_thresh=1.0)
    generator, iou = MaskGenerator(sam, cfg), []
    xy = torch.as_tensor(generator.grid * side, dtype=torch.float32, device=bench.device)
    with torch.inference_mode():
        image = torch.as_tensor(picture, device=bench.device).permute(2, 0, 1)
        embedding = sam.image_encoder(sam.preprocess(image)[None])
        for batch in xy.split(cfg.points_per_batch):
            iou.append(answers(sam, embedding, batch, -float("inf"))[1])
    iou = torch.cat(iou).sort(descending=True).values
    first, last = len(iou) // 12, len(iou) // 8
    gap = first + int((iou[first:last] - iou[first + 1 : last + 1]).argmax())
    cfg = replace(cfg, pred_iou_thresh=float(iou[gap] + iou[gap + 1]) / 2)
    bench.cache["sam"] = sam, picture, cfg
    return bench.cache["sam"]


def sam(bench: Bench, name: str) -> dict:
    """Masks of one image by ours and by segment_anything's generator, which has no bf16: then only
    ours is timed."""
    with mode(name) as precision:
        model, picture, cfg = sam_setting(bench)
        ours = MaskGenerator(model, cfg, precision)
        sides = {"ours": lambda: ours.generate(picture)}
        if precision == FP32:
            sides["segment_anything"] = their_generator(model, cfg, picture)
        found, times, memory = {}, {}, {}
        for side, generate in sides.items():
            bench.clean()
            times[side] = bench.times(lambda t: found.update({side: generate()}), 3, 1)
            memory[side] = bench.peak_gb()
    median = {side: statistics.median(t) for side, t in times.items()}
    said = [
        f"{side} {median[side]:.2f} s" + (f", peak {memory[side]:.1f} GB" if bench.on_gpu else "")
        for side in sides
    ]
    result = {"times": times, "peak GB": memory, "masks": {k: len(m) for k, m in found.items()}}
    if len(sides) == 1:
        said.append(f"{len(found['ours'])} masks")
        return {"said": "; ".join(said), "ok": len(found["ours"]) > 0, **result}
    # Rounding apart: torch's own choice for convolutions is TF32.
    if name == "fp32":
        with mode("exact"):
            found = {side: generate() for side, generate in sides.items()}
    mean, worst = agreement(*found.values())
    same = len({len(m) for m in found.values()}) == 1 and mean > 0.98
    ratio = median["ours"] / median["segment_anything"]
    said += [f"ratio {ratio:.2f}", f"masks {' and '.join(str(len(m)) for m in found.values())}"]
    said += [f"IoU {mean:.4f} in the mean, {worst:.3f} at least"]
    return {
        "said": "; ".join(said),
        "goal": "" if bench.small else verdict("ratio", ratio, SAM_GOAL),
        "ok": min(map(len, found.values())) > 0 and (same or name != "fp32"),
        **{"ratio": ratio, "mean IoU": mean, "least IoU": worst, **result},
    }


def their_generator(model, cfg: Config, picture: np.ndarray) -> Callable:
    from segment_anything import SamAutomaticMaskGenerator

    args = cfg.points_per_side, cfg.points_per_batch, cfg.pred_iou_thresh, cfg.stability_thresh
    generator = SamAutomaticMaskGenerator(model, *args, box_nms_thresh=cfg.mask_nms_thresh)
    return lambda: generator.generate(picture)


def agreement(ours: list[dict], theirs: list[dict]) -> tuple[float, float]:
    """Mean and least IoU of our masks, each with the most alike of theirs from the same point."""
    by_point: dict[tuple, list[np.ndarray]] = {}
    for record in theirs:
        by_point.setdefault(_point(record), []).append(record["segmentation"])
    best = []
    for record in ours:
        mask, others = record["segmentation"], by_point.get(_point(record), [])
        best.append(max((_iou(mask, other) for other in others), default=0.0))
    return (float(np.mean(best)), float(np.min(best))) if best else (0.0, 0.0)


def _point(record: dict) -> tuple:
    return tuple(round(float(x), 2) for x in record["point_coords"][0])


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    either = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / either if either else 1.0


# ------------------------------------------------------------------------------- the same again


def determinism(bench: Bench, name: str) -> dict:
    """Two runs of a few steps from the same seed: whether their bits are the same."""
    cfg = step_size(replace(bench, small=True), "")[0]
    if not bench.small:
        cfg = replace(MINI, pretrained="random")
    steps = 2 if bench.small else 8
    with mode(name) as precision:
        first, second = (_few_steps(bench, cfg, precision, steps) for _ in range(2))
        ops = unsteady(lambda: _few_steps(bench, cfg, precision, 1)) if bench.on_gpu else []
    same = {key: _differing(first[key], second[key]) for key in first}
    agree = not any(count for count, _ in same.values())
    said = f"{steps} steps twice: " + ("the same bits" if agree else "not the same bits; ")
    if not agree:
        said += "; ".join(
            f"{key}: {count} of {len(first[key])} differ, by up to {most:.1e} of their norm"
            for key, (count, most) in same.items()
        )
    said += f"; operations without a repeatable version: {', '.join(ops)}" if ops else ""
    # on a CPU it is promised
    return {"said": said, "ok": agree or bench.on_gpu, "differing": same, "operations": ops}


def _few_steps(bench: Bench, cfg: Config, precision: torch.dtype, steps: int) -> dict:
    """Losses of the steps, gradients of the first, and weights after the last, each by name."""
    method = Answering(cfg, taxonomy(7), bench.device, precision)
    images, most = cfg.labeled_batch, 8
    method.answer_with(images, most)
    found: dict[str, dict] = {"losses": {}, "gradients of step 1": {}}
    for t in range(steps):
        batch = made_batch(cfg.crop, images, most, t, 7)
        row = method.step(tuple(half.to(bench.device) for half in batch), t)
        found["losses"][t] = torch.tensor(row["loss"], dtype=torch.float64)
        if t == 0:
            named = method.models["student"].named_parameters()
            grads = {n: p.grad.clone() for n, p in named if p.grad is not None}
            found["gradients of step 1"] = grads
    weights = method.models["student"].named_parameters()
    return {**found, "weights": {n: p.detach() for n, p in weights if p.requires_grad}}


def _differing(first: dict, second: dict) -> tuple[int, float]:
    """How many tensors differ in a bit, and the largest difference, relative to the norm."""
    wrong = [n for n in first if not torch.equal(first[n], second[n])]
    return len(wrong), max((distance(second[n], first[n]) for n in wrong), default=0.0)


def unsteady(call: Callable[[], object]) -> list[str]:
    """The operations of a call for which torch has no version that gives the same bits again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            call()
        finally:
            torch.use_deterministic_algorithms(False)
    texts = [str(w.message) for w in caught if "determinis" in str(w.message)]
    return sorted({text.split(" does not have")[0][:60] for text in texts})


# -------------------------------------------------------------------------------- processes, peers


def several(bench: Bench) -> dict:
    """A rank for each GPU, started by torchrun: what ranks ask of each other, and some steps."""
    backend = "nccl" if bench.on_gpu else "gloo"
    count = torch.cuda.device_count() if bench.on_gpu else 1
    run = bench.folder / f"ranks-{time.time_ns()}"
    code = "import sys; from tools.bench_gpu_others import as_rank; as_rank(*sys.argv[1:])"
    launch = f"-m torch.distributed.run --standalone --nproc_per_node={count} --no-python".split()
    command = [sys.executable, *launch, sys.executable, "-c", code, bench.device.type, str(run)]
    steps, path = 3 if bench.small else 20, os.pathsep.join((str(ROOT), *sys.path[1:]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    clock = time.perf_counter()
    done = subprocess.run(
        [*command, str(steps)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    seconds = time.perf_counter() - clock
    if done.returncode:
        wrong = [text for text in done.stderr.splitlines() if "rror:" in text] or [""]
        raise RuntimeError(f"exit status {done.returncode}: {wrong[0]}\n{done.stderr[-3000:]}")
    answer = done.stdout.strip().splitlines()[-1]
    said = f"{count} of {backend}, {answer}; {seconds:.0f} s with the start"
    return {"said": said, "ok": answer.startswith(f"{steps} steps"), "ranks": count}


def as_rank(device: str, run: str, steps: str) -> None:
    """What a process of `several` does. One rank alone opens its group, too, which a run does not:
    the calls that `ground.ranks` makes are made here."""
    from engine.run_log import read_log

    place = torch.device(ranks.local_device(device))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "nccl" if place.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=ranks.PATIENCE)
    own, world = torch.ones(3, device=place), torch.distributed.get_world_size()
    torch.distributed.all_reduce(own)
    torch.distributed.broadcast(own, 0)
    names = [None] * world
    torch.distributed.all_gather_object(names, ranks.rank())
    torch.distributed.barrier()
    if own.tolist() != [world] * 3 or names != list(range(world)):
        raise RuntimeError(f"{backend}: sum {own.tolist()}, gathered {names} of {world} ranks")
    batch = max(4, world)
    flags = f"--stage ssl --method dear --device {device} --steps {steps} --burn-in 1 --no-eval"
    flags += f" --labeled-batch {batch} --unlabeled-batch {batch} --out"
    with contextlib.redirect_stdout(sys.stderr):
        code = importlib.import_module("dearli").main([*flags.split(), run])
    if code:
        raise SystemExit(code)
    if ranks.rank() == 0:
        rows = [row for row in read_log(Path(run) / "log.jsonl") if "loss" in row]
        print(f"{len(rows)} steps, last loss {rows[-1]['loss']:.3f}")


def official(bench: Bench) -> dict:
    """The official step beside ours at the same size, both in fp32 as torch sets it."""
    if not bench.on_gpu:
        raise works.Skipped(
            "the official code is measured on a CPU by --only step, without --device"
        )
    size = dict(side=640, images=8)
    with mode("fp32"):
        place = works.Place(bench.official, bench.folder, bench.device)
        theirs = works.official_step(place, **size)  # first: it may be skipped
        bench.clean()
        their_times, their_peak = bench.times(theirs, 5), bench.peak_gb()
        del theirs
        ours = works.our_step(place, **size)
        bench.clean()
        our_times, our_peak = bench.times(ours, 5), bench.peak_gb()
    a, b = statistics.median(our_times), statistics.median(their_times)
    said = f"ours {a:.3f} s, {our_peak:.1f} GB; official {b:.3f} s, {their_peak:.1f} GB"
    return {
        "said": f"{said}; ratio {a / b:.2f}",
        "goal": verdict("ratio", a / b, OFFICIAL_GOAL),
        "ok": True,
        **{"ours": our_times, "official": their_times},
    }
