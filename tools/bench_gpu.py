"""Measurements on one device, with one command: `python -m tools.bench --device cuda`.

    python -m tools.bench --device cuda --small --budget 90      does all of it work? small sizes
    python -m tools.bench --device cuda --json gpu.json          the table, at most 9 minutes
    python -m tools.bench --device cuda --only step-640-l,sam-h  some of it
    python -m tools.bench --device cpu                           the small sizes, without a GPU

Weights are noise, data are made, nothing is downloaded. A row is printed when it is measured, and
the JSON is written after every row. Rows run in one process; one that fails says so and the others
go on, in a new process where the old one hangs, died or lost its device.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Callable

import torch

from engine.sessions import cpu
from tools import bench_gpu_others as others
from tools import bench_gpu_paths as paths
from tools import bench_gpu_works as works
from tools.bench_works import Skipped

START = 120  # seconds that a new process may take for its imports
BASE, LARGE = "convnext_base_w_320", "convnext_large_d_320"
PACKAGES = "torchvision timm open_clip_torch segment-anything triton detectron2".split()


@dataclasses.dataclass(frozen=True)
class Row:
    """measure: of a Bench, see `bench_gpu_works`.   limit: seconds, then its process is ended."""

    measure: Callable
    limit: int
    title: str


def rows() -> dict[str, Row]:
    """By name, group/part, in the order in which they are measured."""
    table: dict[str, Row] = {
        "paths/step-fp32": Row(
            partial(paths.one_step, name="fp32"), 90, "a training step beside the CPU's, TF32 off"
        ),
        "paths/step-bf16": Row(partial(paths.one_step, name="bf16"), 60, "the same in bf16"),
    }
    for p in ("fp32", "bf16"):
        table[f"paths/masks-{p}"] = Row(partial(paths.masks, name=p), 60, f"--stage masks, {p}")
    table["paths/regions"] = Row(paths.regions, 60, "--stage masks --sam regions")
    for p in ("fp32", "bf16"):
        for kind in ("dewa", "sup", "ssl"):
            measure = partial(paths.train, kind=kind, name=p)
            table[f"paths/{kind}-{p}"] = Row(measure, 60, f"--stage {kind}, {p}")
    along = partial(paths.trained_along, name="bf16")
    table |= {
        "paths/along": Row(along, 60, "a trained backbone, linear classes, windows, bf16"),
        "paths/resume": Row(paths.resume, 60, "--stage sup --resume"),
        "paths/dry-run": Row(paths.rehearse, 60, "--stage ssl --dry-run"),
        "paths/eval": Row(paths.evaluation, 60, "--stage eval beside the CPU's"),
        "paths/predict": Row(paths.prediction, 60, "--stage predict beside the CPU's"),
        "paths/zeroshot": Row(paths.zeroshot, 60, "--stage zeroshot"),
    }
    for group, backbone in (("step-640-b", BASE), ("step-640-l", LARGE)):
        for p in ("bf16", "fp32", "tf32"):
            title = f"a step of 8 + 8 images at 640, {backbone}, {p}"
            measure = partial(works.step, backbone=backbone, name=p)
            table[f"{group}/{p}"] = Row(measure, 75, title)
    for p in ("fp32", "tf32", "bf16"):
        title = f"SAM ViT-H, 32 x 32 points, 1024 px, {p}"
        table[f"sam-h/{p}"] = Row(partial(others.sam, name=p), 90, title)
    for p in ("fp32", "bf16"):
        measure = partial(others.determinism, name=p)
        table[f"determinism/{p}"] = Row(measure, 40, f"two runs from one seed, {p}")
    return table | {
        "nccl/steps": Row(others.several, 120, "a process for each GPU, by torchrun"),
        "compile/head": Row(paths.compiled, 150, "torch.compile of the head"),
        "official/step": Row(others.official, 120, "the official step, ConvNeXt-B, 8 + 8 at 640"),
    }


ROWS = rows()


def group_of(name: str) -> str:
    return name.split("/")[0]


# ------------------------------------------------------------------------- the process with the GPU


def serve(bench: works.Bench, names: list[str], pipe) -> None:
    """In a process of its own: measure rows, and send (name, result) of each; None when ready."""
    warnings.simplefilter("ignore")  # of libraries; rows that want them ask for them
    pipe.send(None)
    group = ""
    for name in names:
        if group_of(name) != group:
            bench.cache.clear()
            group = group_of(name)
        lost = False
        try:
            bench.clean()
            result = ROWS[name].measure(bench)
        except Skipped as reason:
            result = {"skipped": str(reason)}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            said = f"failed: {type(error).__name__}: {lines[0][:300]}"
            result = {"failed": said, "traceback": traceback.format_exc()}
            bench.cache.clear()
            lost = bench.on_gpu and not _answers(bench)
        pipe.send((name, result))
        if lost:  # after some errors a process cannot use its GPU any more
            os._exit(1)


def _answers(bench: works.Bench) -> bool:
    try:
        torch.ones(8, device=bench.device).sum().item()
        return True
    except Exception:
        return False


def measured(bench: works.Bench, names: list[str], budget: float, tell: Callable) -> None:
    """Measure rows within so many seconds. tell(name, result, seconds) of each, in order."""
    end, left = time.monotonic() + budget, list(names)
    context = multiprocessing.get_context("spawn")
    while left:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(bench, left, theirs), daemon=False)
        process.start()
        theirs.close()  # so that its end ends the waiting
        try:
            left = _hear(process, ours, left, end, tell)
        finally:
            process.kill()
            process.join()
            ours.close()


def _hear(process, pipe, left: list[str], end: float, tell: Callable) -> list[str]:
    """What a process measures. Returns: the rows that are left for another one."""
    ready, left = False, list(left)
    while left:
        limit = ROWS[left[0]].limit if ready else START
        clock, room = time.monotonic(), max(0.0, end - time.monotonic())
        result = None
        try:
            if pipe.poll(min(limit, room)):
                answer = pipe.recv()
                if not ready:
                    ready = True
                    continue
                result = answer[1]
            elif room <= limit:
                for name in left:
                    tell(name, {"skipped": "the budget is used up"}, 0.0)
                return []
            else:
                result = {"failed": f"failed: not done in {limit} s"}
        except EOFError:
            process.join()
            result = {"failed": f"failed: its process ended, exit status {process.exitcode}"}
        tell(left.pop(0), result, time.monotonic() - clock)
        if "not done" in result.get("failed", "") or "process ended" in result.get("failed", ""):
            return left
    return []


# ---------------------------------------------------------------------------------------- the table


def machine(bench: works.Bench) -> dict:
    said = {"device": str(bench.device), "cpu": cpu()}
    said |= {"python": platform.python_version()}
    said["torch"] = torch.__version__
    if bench.on_gpu:
        of_gpu = torch.cuda.get_device_properties(bench.device)
        said |= {"gpu": of_gpu.name, "gpus": torch.cuda.device_count()}
        said |= {"gpu GB": round(of_gpu.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            said[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            said[package] = "absent"
    return said


def line(name: str, result: dict, seconds: float) -> str:
    told = result.get("skipped") or result.get("failed") or result["said"]
    if "skipped" in result:
        told = f"skipped: {told}"
    elif not result.get("ok", True):
        told = f"WRONG: {told}"
    return f"| {name} | {ROWS[name].title} | {told} | {result.get('goal', '')} | {seconds:.0f} |"


def is_bad(result: dict) -> bool:
    return "failed" in result or not result.get("ok", True)


def parsed(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = list(dict.fromkeys(map(group_of, ROWS)))
    p.add_argument("--device", required=True, help="cuda, cuda:N or cpu")
    p.add_argument("--only", default=",".join(groups), help=f"rows or groups: {', '.join(ROWS)}")
    p.add_argument("--small", action="store_true", help="smallest sizes; always on a CPU")
    p.add_argument("--budget", type=float, default=540, help="seconds for all; default 540")
    p.add_argument("--official", type=Path, help="a clone of the official code, to measure beside")
    p.add_argument("--json", type=Path, help="write the figures to this file, after every row")
    args = p.parse_args(argv)
    wanted = args.only.split(",")
    unknown = [name for name in wanted if name not in (*groups, *ROWS)]
    if unknown:
        p.error(f"unknown row '{unknown[0]}'; available: {', '.join((*groups, *ROWS))}")
    if not args.device.startswith(("cuda", "cpu")):
        p.error(f"--device {args.device}: expected cuda, cuda:N or cpu")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        p.error(f"--device {args.device}: torch {torch.__version__} finds no GPU here")
    args.names = [name for name in ROWS if name in wanted or group_of(name) in wanted]
    return args


def main(argv: list[str]) -> int:
    args = parsed(argv)
    device, clock = torch.device(args.device), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        small = args.small or device.type == "cpu"
        bench = works.Bench(device, small, Path(folder), args.official)
        content = {"machine": machine(bench), "small": small, "results": {}}
        print("machine: " + ", ".join(f"{k} {v}" for k, v in content["machine"].items()))
        print("\n| row | what | result | goals | s |\n|---|---|---|---|---|", flush=True)

        def tell(name: str, result: dict, seconds: float) -> None:
            print(line(name, result, seconds), flush=True)
            content["results"][name] = {**result, "row seconds": round(seconds, 1)}
            if args.json:
                text = json.dumps(content, indent=1, default=str)
                args.json.write_text(text)
            elif "traceback" in result:
                print(result["traceback"], file=sys.stderr, flush=True)

        measured(bench, args.names, args.budget, tell)
    bad = [name for name, result in content["results"].items() if is_bad(result)]
    seconds = time.monotonic() - clock
    print(f"\n{len(args.names)} rows in {seconds:.0f} s; {len(bad)} failed or wrong", end="")
    print(f": {', '.join(bad)}" if bad else "", flush=True)
    return int(bool(bad))
