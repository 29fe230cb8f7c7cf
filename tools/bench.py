"""Measurements: time and memory of the method's parts, beside their peers.

    python -m tools.bench                                  everything, as one table
    python -m tools.bench --only step,index --threads 1    some of it, on one core
    python -m tools.bench --official DIR                   beside the official code
    python -m tools.bench --json bench.json                the figures, with their machine
    python -m tools.bench --device cuda                    instead: what `bench_gpu` measures

The official code is a clone of github.com/helen1c/DEARLi; it needs detectron2. Each side has a
process of its own, and they take turns, call by call; times are medians, `ratio` is the median over
the turns, with the least and the greatest of them. Peak memory is the largest resident set of the
process, interpreter and libraries included. `limit` is the time of the arithmetic alone: the
floating-point operations that torch counts in our work, at the rate at which the same process
multiplies large matrices.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.request import multiplies_bf16
from engine.sessions import cpu
from tools import bench_data
from tools import bench_works as works
from tools.bench_growth import GROWTH

BF16 = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Work:
    """ours and peer: makers of bench_works and bench_data.   repeats: calls that count; one before
    warms up."""

    title: str
    repeats: int
    ours: Callable
    peer: Callable | None = None
    peer_name: str = ""


def beside_official(name: str, precision: torch.dtype | None = None, **size) -> tuple:
    ours = partial(getattr(works, f"our_{name}"), **size)
    official = partial(getattr(works, f"official_{name}"), **size)
    if precision:
        return partial(ours, precision=precision), official, "official code (fp32)"
    return ours, official, "official code"


TITLES = """
step                3  one semi-supervised step, ConvNeXt-B, 256 x 256, 2 labelled + 2 unlabelled
step-bf16           3  the same in bf16
step-640            2  one semi-supervised step at 640 x 640, 1 + 1 images, 150 classes
inference           3  panoptic inference, two images of 256 x 256
inference-640       3  panoptic inference, one image of 640 x 640
inference-bf16      3  panoptic inference, two images of 256 x 256, bf16
inference-640-bf16  3  panoptic inference, one image of 640 x 640, bf16
segments            5  segment maps of four images of 512 x 512 from their logits
pq                  5  PQ of 20 images of 480 x 640 with 10 to 40 segments, PNG decoding included
pq-hotcoco          5  PQ of the same 20 images
ap                  3  mask AP of 20 such images, 100 instances found in each
ap-hotcoco          3  mask AP of the same 20 images
sample              5  10 labelled samples, 640 crop, from 1.5 megapixels
views               5  10 pairs of unlabelled views, 640 crop, from 1.5 megapixels
sam                 2  SAM's masks of one image of 480 x 640, ViT-B, 8 x 8 points
ranks               1  a semi-supervised step of the miniature world, two processes of one thread
index               1  a panoptic JSON of COCO's size
"""
SIDES = {
    "step": beside_official("step"),
    "step-bf16": beside_official("step", BF16),
    "step-640": (partial(works.our_step, side=640, images=1, classes=150, most=30),),
    "inference": beside_official("inference"),
    "inference-640": beside_official("inference", side=640, images=1),
    "inference-bf16": beside_official("inference", BF16),
    "inference-640-bf16": beside_official("inference", BF16, side=640, images=1),
    "segments": beside_official("segments"),
    "pq": (bench_data.our_pq, bench_data.panopticapi_pq, "COCO panoptic API"),
    "pq-hotcoco": (bench_data.our_pq, bench_data.hotcoco_pq, "hotcoco"),
    "ap": (bench_data.our_ap, bench_data.coco_ap, "pycocotools"),
    "ap-hotcoco": (bench_data.our_ap, partial(bench_data.coco_ap, of="hotcoco"), "hotcoco"),
    "sample": (
        bench_data.our_sample,
        partial(bench_data.decoding, maps=True),
        "decoding JPEG and PNG",
    ),
    "views": (bench_data.our_views, partial(bench_data.decoding, maps=False), "decoding the JPEG"),
    "sam": (works.our_sam, works.their_sam, "segment_anything"),
    "ranks": (*(partial(works.steps_of_ranks, processes=n) for n in (2, 1)), "one process"),
    "index": (bench_data.index,),
}
WORKS = {
    name: Work(title, int(repeats), *SIDES[name])
    for name, repeats, title in (row.split(maxsplit=2) for row in TITLES.strip().splitlines())
}


# --------------------------------------------------------------------------------- measuring


def serve(make: Callable, official: Path | None, threads: int, pipe) -> None:
    """In a process of its own: make the work, then one call for each number that arrives.

    Answers: seconds, or a dict: figures of the work's own, "skipped", or "failed". The number None
    asks for all figures but time: peak memory, counted arithmetic and its time.
    """
    torch.set_num_threads(threads)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # hotcoco's
    try:
        with tempfile.TemporaryDirectory() as folder:
            require_instructions(make)
            call = make(works.Place(official, Path(folder)))
            pipe.send(call if isinstance(call, dict) else 0.0)
            while (t := pipe.recv()) is not None:
                clock = time.perf_counter()
                call(t)
                pipe.send(time.perf_counter() - clock)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
            pipe.send({"peak GB": round(peak, 2), **arithmetic(make, call)})
    except works.Skipped as reason:
        pipe.send({"skipped": str(reason)})
    except EOFError:  # a dict was all that was wanted
        pass
    except BaseException as error:
        pipe.send({"failed": f"failed: {type(error).__name__}: {error}"})
        raise


def require_instructions(make: Callable) -> None:
    """Raise Skipped where the CPU can do bf16 only step by step, at many times fp32's cost."""
    if getattr(make, "keywords", {}).get("precision") is BF16 and not multiplies_bf16():
        raise works.Skipped("not measured: this CPU has no instructions for bf16")


def arithmetic(make: Callable, call: Callable) -> dict:
    """Of our models' works: floating-point operations, and seconds of large matrix products."""
    maker, args = getattr(make, "func", make), getattr(make, "keywords", {})
    if maker not in (works.our_step, works.our_inference):
        return {}
    with FlopCounterMode(display=False) as counter:
        call(0)
    flops, times = counter.get_total_flops(), []
    a, b = torch.randn(2, 2048, 2048, dtype=args.get("precision", torch.float32))
    for _ in range(10):
        clock = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - clock)
    return {"GFLOP": round(flops / 1e9), "limit": round(flops * min(times) / 2 / 2048**3, 4)}


def measured(work: Work, official: Path | None, threads: int, repeats: int | None) -> list[dict]:
    """Ours and the peer, each in a process of its own, call by call in turn.

    So a machine that slows down does so for both; a side that fails leaves the other one alone.
    """
    context, sides = multiprocessing.get_context("spawn"), []
    for make in filter(None, (work.ours, work.peer)):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(make, official, threads, theirs))
        process.start()
        theirs.close()  # so that the end of the process, however it comes, ends the waiting
        sides.append((process, ours, {"all": []}))
        hear(*sides[-1])
        if "skipped" in sides[0][-1]:  # then a peer says nothing
            break
    count = repeats or work.repeats
    for t in (*range(count + (count > 1)), None):
        for process, pipe, result in sides:
            if "all" in result:
                pipe.send(t)
                hear(process, pipe, result)
    for process, pipe, _ in sides:
        pipe.close()
        process.join()
    return [result for _, _, result in sides]


def hear(process, pipe, result: dict) -> None:
    """One answer of `serve`, into the result; the last one ends it.

    The making does not count, nor the first of several calls.
    """
    try:
        answer = pipe.recv()
    except EOFError:
        process.join()
        answer = {"failed": f"failed: exit status {process.exitcode}"}  # of a signal: -number
    if isinstance(answer, float):
        result["all"].append(round(answer, 4))
        return
    times = result.pop("all")[1:]
    times = times[1:] or times
    if "peak GB" in answer:
        result |= {"seconds": round(statistics.median(times), 4), "times": times}
    result |= answer


# --------------------------------------------------------------------------------- the tables


def shown(result: dict) -> str:
    if "skipped" in result or "failed" in result:
        return result.get("skipped") or result["failed"]
    units = {"seconds": " s", "peak GB": " GB"}
    figures = [f"{result[k]:,}{unit}" for k, unit in units.items() if k in result]
    return "; ".join([" ".join(figures), *(f"{k} {v}" for k, v in result.items() if "MB" in k)])


def row(work: Work, ours: dict, peer: dict | None) -> str:
    ratio, limit = "", ""
    if peer and "seconds" in ours and "seconds" in peer:
        both = [side.get("times", [side["seconds"]]) for side in (ours, peer)]
        ratios = [a / b for a, b in zip(*both)]
        ratio = f"{statistics.median(ratios):.2f}"
        if "peak GB" in ours:
            ratio += f" ({min(ratios):.2f} to {max(ratios):.2f})"
            ratio += f", memory {ours['peak GB'] / peer['peak GB']:.2f}"
    if "limit" in ours:
        limit = f"{ours['limit']:,} s ({ours['GFLOP']:,} GFLOP)"
    beside = f"{work.peer_name}: {shown(peer)}" if peer else ""
    return f"| {work.title} | {shown(ours)} | {beside} | {ratio} | {limit} |"


def works_table(names: list[str], measure: Callable) -> dict:
    print("\n| work | ours | peer | ratio | limit |\n|---|---|---|---|---|", flush=True)
    results = {}
    for name in names:
        ours, peer = (*measure(WORKS[name]), None)[:2]
        results[name] = {"ours": ours, "peer": peer}
        print(row(WORKS[name], ours, peer), flush=True)
    return results


def growth_tables(measure: Callable) -> dict:
    """Time and memory along each axis, beside the arithmetic."""
    results = {}
    for axis, (repeats, make, number, values) in GROWTH.items():
        print(f"\n| {axis} | seconds | arithmetic alone | peak GB |\n|---|---|---|---|", flush=True)
        for n in values:
            (r,) = measure(Work(axis, repeats, partial(make, **{number: n})))
            results[f"{axis} {n}"] = {"ours": r}
            seconds = r.get("seconds", r.get("failed"))
            print(
                f"| {n:,} | {seconds} | {r.get('limit', '')} | {r.get('peak GB', '')} |", flush=True
            )
    return results


def main() -> int:
    if any(word.split("=")[0] == "--device" for word in sys.argv[1:]):
        from tools import bench_gpu  # its rows import all of the method

        return bench_gpu.main(sys.argv[1:])
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    titles = "; ".join(f"{n}: {w.title}" for n, w in WORKS.items())
    p.add_argument("--only", default=",".join(WORKS), help=titles)
    p.add_argument("--official", type=Path, help="a clone of the official code, to measure beside")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--repeats", type=int, metavar="N", help="calls that count; default 2 to 5")
    p.add_argument(
        "--growth", action="store_true", help="instead: how time and memory grow, axis by axis"
    )
    p.add_argument("--device", help="instead, with flags of its own: `--device cuda --help`")
    p.add_argument("--json", type=Path, help="write the figures to this file")
    args = p.parse_args()
    names = args.only.split(",")
    unknown = [name for name in names if name not in WORKS]
    if unknown:
        p.error(f"unknown work '{unknown[0]}'; available: {', '.join(WORKS)}")
    machine = {
        "cpu": cpu(),
        "torch": torch.__version__,
        "threads": args.threads,
    }
    print("machine: " + ", ".join(f"{k} {v}" for k, v in machine.items()))
    measure = partial(measured, official=args.official, threads=args.threads, repeats=args.repeats)
    results = growth_tables(measure) if args.growth else works_table(names, measure)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    return int(any("failed" in (side or {}) for r in results.values() for side in r.values()))


if __name__ == "__main__":
    sys.exit(main())
