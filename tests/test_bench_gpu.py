"""The measurements of a GPU, at their smallest and on a CPU: that they run, and that each of their
checks can fail."""

import json
import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from inference import panoptic_inference
from tests.helpers import CPU
from tools import bench_gpu, bench_works
from tools import bench_gpu_others as others
from tools import bench_gpu_paths as paths
from tools import bench_gpu_works as works

FAST = """step-fp32 masks-fp32 regions dewa-fp32 sup-fp32 ssl-fp32 resume dry-run eval predict
zeroshot"""
NAMES = [
    *(f"paths/{name}" for name in FAST.split()),
    *("step-640-l/fp32", "sam-h/fp32", "determinism/fp32", "nccl/steps", "compile/head"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Shared, as in a call: the stages use what earlier ones made."""
    return works.Bench(CPU, True, tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_measured_and_its_checks_hold(bench, name):
    result = bench_gpu.ROWS[name].measure(bench)
    assert result["ok"], result["said"]
    shown = bench_gpu.line(name, result, 1.0)
    assert "WRONG" not in shown and "\n" not in shown and shown.count("|") == 6
    json.dumps(result)
    if name.startswith("step"):
        assert result["FLOP"] > 1e8 and 2 < result["pseudo-segments"] <= 8
        assert set(result["parts"]) >= {"backbone", "matching"}
        assert all(seconds > 0 for seconds in result["parts"].values())


def test_a_trained_backbone_in_windows_is_one_of_the_rows(bench):
    result = paths.trained_along(bench, "fp32")  # the row's bf16 takes this CPU too long
    assert result["ok"] and len(result["losses"]) == 4


def test_a_step_whose_outputs_are_others_than_the_cpus_is_wrong(bench, monkeypatch):
    right = paths._outputs
    bench.cache.pop("step", None)
    assert paths.one_step(bench, "fp32")["ok"]

    def shifted(*args):
        found = right(*args)
        return {**found, "class logits": found["class logits"] * 1.002}

    monkeypatch.setattr(paths, "_outputs", shifted)
    result = paths.one_step(bench, "fp32")
    assert not result["ok"] and result["apart"]["class logits"] == pytest.approx(0.002, rel=1e-3)
    assert "WRONG" in bench_gpu.line("paths/step-fp32", result, 1.0) and bench_gpu.is_bad(result)


def test_runs_that_are_not_the_same_again_are_told_with_what_differs(bench, monkeypatch):
    made, calls = others.made_batch, []

    def drifting(side, images, classes, most, seed):
        calls.append(seed)
        return made(side, images, classes, most, seed + (len(calls) > 2))

    monkeypatch.setattr(others, "made_batch", drifting)
    result = others.determinism(bench, "fp32")
    assert not result["ok"] and "losses: 2 of 2 differ" in result["said"]
    assert result["differing"]["weights"][0] > 10


def test_distances_and_agreement_by_hand():
    assert works.distance(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
    mask, half = np.ones((2, 4), bool), np.ones((2, 4), bool)
    half[0] = False

    def record(x, point):
        return {"segmentation": x, "point_coords": [point]}

    theirs = [record(mask, (1, 1)), record(half, (1, 1))]
    assert others.agreement([record(mask, (1, 1))], theirs) == (1.0, 1.0)
    ours = [record(half, (1, 1)), record(mask, (2, 1))]  # nobody else asked at the second point
    assert others.agreement(ours, theirs) == (0.5, 0.0)
    assert others.agreement([record(mask, (1, 1))], theirs[1:]) == (0.5, 0.5)
    assert others.agreement([], theirs) == (0.0, 0.0)


def test_made_answers_have_the_segments_that_they_promise():
    cfg, classes, most = works.step_size(works.Bench(CPU, True, None), "")
    posterior, masks = bench_works.made_answers(cfg, 3, most, classes)
    assert torch.allclose(posterior.sum(-1), torch.ones(3, cfg.num_queries))
    sizes = ((cfg.crop, cfg.crop),) * 3
    things = torch.ones(classes, dtype=torch.bool)
    for k, n in enumerate(bench_works.counts(3, most)):
        segment_map, labels, _ = panoptic_inference(posterior[k], masks[k], things, sizes)
        assert n * 0.7 <= len(labels) <= n, "few are too thin for a mask of a quarter of the size"
        assert (segment_map > 0).float().mean() > 0.8
    assert bench_works.counts(8, 60)[::7] == [5, 60] and bench_works.counts(1, 20) == [20]


def test_tf32_is_as_a_mode_says_and_as_before_after_it():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with works.mode("exact") as precision:
        assert precision == torch.float32 and not matmul.allow_tf32 and not cudnn.allow_tf32
    with works.mode("tf32"):
        assert matmul.allow_tf32 and cudnn.allow_tf32
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


# ------------------------------------------------------------------------------- rows that go wrong


def heard(monkeypatch, messages, left, limit=0.2, end=60.0, closed=False):
    """What `_hear` tells of a process that sends these messages, and what it leaves."""
    monkeypatch.setattr(bench_gpu, "START", limit)
    for name in left:
        row = bench_gpu.Row(None, limit, name)
        monkeypatch.setitem(bench_gpu.ROWS, name, row)
    ours, theirs = multiprocessing.Pipe()
    for message in messages:
        theirs.send(message)
    if closed:
        theirs.close()
    told, process = {}, SimpleNamespace(join=lambda: None, exitcode=-9)

    def tell(name, result, seconds):
        told[name] = result.get("skipped") or result.get("failed") or result["said"]

    clock = bench_gpu.time.monotonic()
    rest = bench_gpu._hear(process, ours, left, clock + end, tell)
    return told, rest


def test_a_row_that_hangs_leaves_the_others_to_a_new_process(monkeypatch):
    good = ("a/1", {"said": "fine"})
    told, rest = heard(monkeypatch, [None, good], ["a/1", "a/2", "a/3"])
    assert told == {"a/1": "fine", "a/2": "failed: not done in 0.2 s"} and rest == ["a/3"]


def test_a_process_that_dies_is_told_with_its_status(monkeypatch):
    told, rest = heard(monkeypatch, [None], ["a/1", "a/2"], closed=True)
    assert told == {"a/1": "failed: its process ended, exit status -9"} and rest == ["a/2"]


def test_rows_beyond_the_budget_are_skipped_and_said(monkeypatch):
    good = ("a/1", {"said": "fine"})
    told, rest = heard(monkeypatch, [None, good], ["a/1", "a/2", "a/3"], limit=9, end=0.3)
    used = "the budget is used up"
    assert told == {"a/1": "fine", "a/2": used, "a/3": used} and rest == []


def test_a_row_that_raises_says_so_in_a_line_and_the_next_one_is_measured(tmp_path, monkeypatch):
    def bad(bench):
        raise RuntimeError("first line\nsecond line")

    rows = {"a/1": bad, "a/2": lambda bench: {"said": "fine", "ok": True}}
    for name, measure in rows.items():
        monkeypatch.setitem(bench_gpu.ROWS, name, bench_gpu.Row(measure, 9, name))
    sent = []
    bench = works.Bench(CPU, True, tmp_path)
    with bench_gpu.warnings.catch_warnings():
        bench_gpu.serve(bench, list(rows), SimpleNamespace(send=sent.append))
    assert sent[0] is None and sent[1][1]["failed"] == "failed: RuntimeError: first line"
    assert "second line" in sent[1][1]["traceback"] and bench_gpu.is_bad(sent[1][1])
    assert sent[2] == ("a/2", {"said": "fine", "ok": True}) and not bench_gpu.is_bad(sent[2][1])


def test_the_command_writes_its_rows_and_says_what_it_skips(tmp_path, capsys):
    flags = ["--device", "cpu", "--only", "determinism/fp32,official", "--json"]
    assert bench_gpu.main([*flags, str(tmp_path / "gpu.json")]) == 0
    said = capsys.readouterr().out
    assert "the same bits" in said and "| skipped: " in said and "2 rows" in said
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["small"] and content["machine"]["torch"] == torch.__version__
    assert list(content["results"]) == ["determinism/fp32", "official/step"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "tpu"], "expected cuda, cuda:N or cpu"),
        (["--device", "cpu", "--only", "step"], "unknown row 'step'; available: paths, step-640-b"),
    ],
)
def test_a_wrong_flag_is_answered_in_a_line(capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        bench_gpu.parsed(flags)
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        bench_gpu.parsed(["--device", "cuda"])
    assert "finds no GPU here" in capsys.readouterr().err
