"""What `tools.bench_gpu` measures of the step, and what its rows share.

A row is a function of a `Bench` that returns a dict: `said`, the line of the table; `ok`, whether
its checks held; `goal`, what of the goals is met; and the figures. Weights are noise, images are
made. With `bench.small` a row has its smallest size, for a CPU.
"""

import contextlib
import gc
import statistics
import time
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import losses
import mean_teacher
from config import MINI, OFFICIAL, Config
from readers.ground_truth import Taxonomy
from tools.bench_works import SEGMENTS, Answering, made_batch

BF16, FP32 = torch.bfloat16, torch.float32
# The precisions of a row: autocast to, whether matrix products and convolutions may round fp32 to
# TF32. `fp32` is what --precision fp32 is with torch's own settings.
MODES = {
    "fp32": (FP32, False, True),
    "tf32": (FP32, True, True),
    "exact": (FP32, False, False),
    "bf16": (BF16, False, True),
}
MEMORY_GOAL, SHARE_GOAL = 24.0, 0.35  # GB of a ConvNeXt-L step; of the bf16 peak


@dataclass
class Bench:
    """small: every row at its smallest.   folder: for files, kept for all rows.   official: a clone
    of the official code.   cache: what rows of one group share.
    """

    device: torch.device
    small: bool
    folder: Path
    official: Path | None = None
    cache: dict = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def clean(self) -> None:
        """What earlier rows held is given back, and the peak begins anew."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gb(self) -> float | None:
        """The most that tensors took since `clean`, in 10^9 bytes; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.on_gpu else None

    def times(self, call: Callable[[int], object], repeats: int, warm: int = 2) -> list[float]:
        """Seconds of call(t), each waited for; the first `warm` calls do not count."""
        seconds = []
        for t in range(warm + repeats):
            self.wait()
            clock = time.perf_counter()
            call(t)
            self.wait()
            seconds.append(time.perf_counter() - clock)
        return seconds[warm:]


@contextlib.contextmanager
def mode(name: str):
    """The settings of one of MODES; gives the dtype of autocast."""
    precision, products, convolutions = MODES[name]
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = products, convolutions
    try:
        yield precision
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def peak_rate(bench: Bench, name: str) -> float:
    """FLOP/s of the best of ten large matrix products in a mode."""
    side = 256 if bench.small else 8192
    with mode(name) as precision:
        a, b = torch.randn(2, side, side, device=bench.device, dtype=precision)
        return 2 * side**3 / min(bench.times(lambda t: a @ b, 10, 3))


def verdict(name: str, value: float | None, goal: float, unit: str = "") -> str:
    """value is to be at most goal."""
    met = "not measured" if value is None else "met" if value <= goal else "missed"
    return f"{name} at most {goal:.2g}{unit}: {met}"


def distance(x: Tensor, true: Tensor) -> float:
    """|x - true| / |true|, of L2 norms."""
    x, true = x.detach().double().cpu(), true.detach().double().cpu()
    return float((x - true).norm() / true.norm().clamp(min=1e-30))


# ------------------------------------------------------------------------------------ the step


def taxonomy(classes: int) -> Taxonomy:
    things = tuple(k < classes * 3 // 5 for k in range(classes))
    return Taxonomy(tuple(f"class {k}" for k in range(classes)), things, tuple(range(classes)))


def step_size(bench: Bench, backbone: str) -> tuple[Config, int, int]:
    """(configuration, classes, most segments) of the step's rows."""
    if bench.small:
        size = dict(pretrained="random", crop=64, num_queries=12, num_points=64)
        return replace(MINI, **size, labeled_batch=2, unlabeled_batch=2), 7, 8
    return replace(OFFICIAL, backbone=backbone, pretrained="random", crop=640), 133, SEGMENTS[1]


def step(bench: Bench, backbone: str, name: str) -> dict:
    """Time, memory and share of the peak of a semi-supervised step in a mode."""
    cfg, classes, most = step_size(bench, backbone)
    images, repeats = cfg.labeled_batch, 1 if bench.small else 7
    with mode(name) as precision:
        method = Answering(cfg, taxonomy(classes), bench.device, precision)
        method.answer_with(images, most)
        batches = [made_batch(cfg.crop, images, most, seed, classes) for seed in range(2)]
        batches = [tuple(half.to(bench.device) for half in batch) for batch in batches]
        rows = []

        def call(t: int) -> None:
            rows.append(method.step(batches[t % 2], t))

        bench.times(call, 0, warm=2)
        bench.clean()
        times = bench.times(call, repeats, warm=0)
        peak_gb = bench.peak_gb()
        parts = step_parts(bench, method, lambda: call(1))
        with FlopCounterMode(display=False) as counter:
            call(0)
        flops = counter.get_total_flops()
        top = kernels(lambda: call(0)) if bench.on_gpu else None
    seconds, rate = statistics.median(times), peak_rate(bench, name)
    share, pseudo = flops / seconds / rate, rows[-1]["pseudo_segments"]
    images *= 2
    said = (
        f"{seconds:.3f} s ({min(times):.3f} to {max(times):.3f}), {images / seconds:.1f} images/s"
    )
    said += f", peak {peak_gb:.1f} GB" if peak_gb else ""
    said += f", {flops / 1e12:.2f} TFLOP: {share:.0%} of the peak of {rate / 1e12:.0f} TFLOP/s"
    said += f"; {pseudo:.1f} pseudo-segments an image; " + ", ".join(
        f"{part} {seconds:.3f}" for part, seconds in parts.items()
    )
    goals = [f"{SHARE_GOAL:.0%} of the peak: {'met' if share >= SHARE_GOAL else 'missed'}"]
    if "large" in backbone:
        goals.insert(0, verdict("memory", peak_gb, MEMORY_GOAL, " GB"))
    return {
        "said": said,
        "goal": "; ".join(goals) if name == "bf16" and not bench.small else "",
        "ok": pseudo >= SEGMENTS[0] / 2 and all(np.isfinite(row["loss"]) for row in rows),
        **{"seconds": seconds, "times": times, "images a second": images / seconds},
        **{"peak GB": peak_gb, "FLOP": flops, "peak FLOP/s": rate, "share of the peak": share},
        **{"parts": parts, "kernels": top, "pseudo-segments": pseudo, "loss": rows[-1]["loss"]},
    }


def step_parts(bench: Bench, method, call: Callable[[], None]) -> dict[str, float]:
    """Seconds of the parts of one call, each waited for, so that their sum is more than a step.
    What is in another part is counted in both."""
    parts = {
        "backbone": (method, "features"),
        "pseudo-labels": (method, "pseudo_labels"),
        "forward, losses, backward": (method, "learn"),
        "of these matching cost": (losses, "matching_cost"),
        "matching": (losses, "match"),
        "optimiser": (mean_teacher, "descend"),
        "teacher": (mean_teacher, "update_teacher"),
    }
    seconds = dict.fromkeys(parts, 0.0)

    def timed(part: str, function: Callable) -> Callable:
        def wrapped(*args, **flags):
            bench.wait()
            clock = time.perf_counter()
            result = function(*args, **flags)
            bench.wait()
            seconds[part] += time.perf_counter() - clock
            return result

        return wrapped

    with contextlib.ExitStack() as stack:
        for part, (owner, name) in parts.items():
            own = isinstance(owner, types.ModuleType)
            original = getattr(owner, name)
            setattr(owner, name, timed(part, original))
            if own:
                stack.callback(setattr, owner, name, original)
            else:  # it shadows the one of the class
                stack.callback(delattr, owner, name)
        call()
    return seconds


def kernels(call: Callable[[], None], most: int = 15) -> list[dict] | str:
    """The operations of one call that take the GPU longest. A profiler that fails is no failure."""
    try:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        events = sorted(profiler.key_averages(), key=_gpu_time, reverse=True)
        return [{"op": e.key[:80], "ms": _gpu_time(e) / 1e3, "calls": e.count} for e in events][
            :most
        ]
    except Exception as error:
        return f"no profile: {type(error).__name__}: {error}"


def _gpu_time(event) -> float:
    return getattr(event, "self_device_time_total", 0)
