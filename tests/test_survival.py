"""What a run survives: kills, signals, full disks, damaged files, numbers that are not finite."""

import hashlib
import http.server
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import data
import dearli
from engine import checkpoint, run_log
from engine.checkpoint import state_of
from engine.method import find
from ground import files, identity, tensor_files
from ground.errors import UserError
from mean_teacher import MeanTeacher
from mini import scenes
from pretrained import fetching, foundation
from readers import mask_files, panoptic
from tests.helpers import (
    ROOT,
    SSL,
    TINY_FLAGS,
    Answers,
    FakeSam,
    back_to,
    ended,
    fitting,
    fork,
    log_of,
    run,
    same,
    wait_for,
    write_coco_folder,
)


def test_fault_01_08_a_kill_while_saving_leaves_a_whole_checkpoint_and_strays_are_removed(tmp_path):
    def save_for_ever():
        files.claim(tmp_path)
        for step in range(1, 10**6):
            checkpoint.save(
                tmp_path,
                step,
                {
                    "step": step,
                    "student": torch.full((10**6,), float(step)),
                    "teacher": torch.full((10**6,), float(step)),
                },
            )

    torn = 0
    for kill in range(6):
        process = fork(save_for_ever, tmp_path / "said.txt")
        try:
            wait_for(
                lambda: (
                    checkpoint.steps(tmp_path)
                    and any(p.suffix == ".tmp" for p in tmp_path.iterdir())
                )
            )
        finally:
            process.kill()
        assert ended(process) == -signal.SIGKILL
        torn += any(p.suffix == ".tmp" for p in tmp_path.iterdir())
        state = checkpoint.newest(tmp_path)
        assert (
            state["student"].eq(state["step"]).all() and state["teacher"].eq(state["step"]).all()
        )  # of one step, both
        assert len(checkpoint.steps(tmp_path)) <= checkpoint.KEEP + 1
    assert torn > 0, "no kill was in the middle of a write"
    files.claim(tmp_path)
    files.release(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_fault_02_a_signal_finishes_the_step_saves_and_says_so_also_with_loader_processes(
    number, code, small_mini, tmp_path, monkeypatch
):
    train_step = MeanTeacher.step

    def step(self, batch, t):
        if t == 2:
            os.killpg(os.getpgrp(), number)  # as a terminal and a scheduler do: to all of the group
            time.sleep(0.5)
        return train_step(self, batch, t)

    monkeypatch.setattr(MeanTeacher, "step", step)
    process = fork(
        lambda: run(*SSL, "--steps", 9, "--workers", 2, "--out", tmp_path / "run"),
        tmp_path / "said.txt",
    )
    assert ended(process) == code
    said = (tmp_path / "said.txt").read_text()
    assert (
        f"stopped at step 3 of 9 by {signal.Signals(number).name}; go on with --resume" in said
        and "Traceback" not in said
    )
    assert checkpoint.newest(tmp_path / "run")["step"] == len(log_of(tmp_path / "run")) == 3
    assert not (tmp_path / "run" / "lock").read_text()


def test_fault_03_a_full_disk_is_named_and_leaves_checkpoint_and_log_whole(
    small_mini, tmp_path, monkeypatch
):
    folder, train_step = tmp_path / "run", MeanTeacher.step
    for full, limit, words in (
        (3, 100_000, "step_0000004.pt: cannot be written (File too large)"),
        (2, 50, "log.jsonl: cannot be written (File too large)"),
    ):

        def step(self, batch, t):
            if t == full:
                log = (folder / "log.jsonl").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (log + limit, resource.RLIM_INFINITY))
            return train_step(self, batch, t)

        monkeypatch.setattr(MeanTeacher, "step", step)
        process = fork(
            lambda: run(*SSL, "--steps", 6, "--checkpoint-every", 2, "--out", folder),
            tmp_path / "said.txt",
        )
        assert ended(process) == 2
        said = (tmp_path / "said.txt").read_text()
        assert f"error: {folder}/{words}" in said and "Traceback" not in said
        assert checkpoint.newest(folder)["step"] == 2 and not [
            p for p in folder.iterdir() if p.suffix == ".tmp"
        ]
        text = (folder / "log.jsonl").read_text()
        assert text.endswith("}\n") and [row["step"] for row in log_of(folder)] == list(
            range(4 if full == 3 else 2)
        )
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "args",
    [["sup"], ["ssl", "--method", "dear"], ["zeroshot", "--masks", "gt"], ["ladder"], ["masks"]],
)
def test_fault_04_an_output_folder_that_cannot_be_written_is_refused_before_any_model_is_built(
    args, small_mini, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    for name in ("load_sam", "load_clip"):
        monkeypatch.setattr(foundation, name, lambda *a: pytest.fail("a model was built"))
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run("--stage", *args, "--out", out) == 2
        message = capsys.readouterr().err
        assert f"{out}: cannot be written" in message and message.count("\n") == 1


def test_fault_05_06_a_damaged_checkpoint_is_said_and_the_one_before_it_is_used(tmp_path, capsys):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step, "x": torch.arange(1000)})
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step_0000002.pt", "step_0000003.pt"]
    path = tmp_path / "step_0000003.pt"
    whole = path.read_bytes()
    assert (
        torch.load(path, weights_only=True)["x"].sum() == 499500
    )  # a plain torch file all the same
    for place in (
        *range(0, len(whole) - 75, 97),
        *range(len(whole) - 64, len(whole)),
    ):  # one flipped bit, wherever it is
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert (
            checkpoint.newest(tmp_path)["step"] == 2
            and f"{path}: damaged" in capsys.readouterr().out
        )
    for size in (0, 1, 100, *range(len(whole) - 95, len(whole))):  # cut short, also within the sum
        path.write_bytes(whole[:size])
        assert (
            checkpoint.newest(tmp_path)["step"] == 2
            and f"warning: {path}: " in capsys.readouterr().out
        )
    checkpoint.save(
        tmp_path, 2, {"step": 2}
    )  # going on from 2: the damaged one goes, not the good one
    checkpoint.save(tmp_path, 1, {"step": 1})
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step_0000001.pt"]
    (tmp_path / "step_0000001.pt").write_bytes(b"")
    with pytest.raises(
        UserError, match="none of its 1 checkpoints can be read; choose another folder"
    ):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", ["dewa", "sup", "ssl"])
def test_fault_07_a_run_that_is_stopped_at_every_step_equals_one_that_is_not_bit_for_bit(
    stage, workers, small_mini, tmp_path, monkeypatch
):
    if stage == "dewa":
        mask_files.generate_masks(scenes.load_mini("4").train, FakeSam(), tmp_path / "masks")
    method, stop_at = find(stage), []
    usual_step = method.step

    def step(self, batch, t):
        if t in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        row = usual_step(self, batch, t)
        return {**row, "drawn": torch.rand(()).item()}  # as drop path of a trained backbone draws

    monkeypatch.setattr(method, "step", step)
    args = [
        "--stage",
        stage,
        *(["--method", "dear"] if stage == "ssl" else []),
        *(["--no-eval"] if stage != "dewa" else []),
        "--masks",
        tmp_path / "masks",
        "--steps",
        4,
        "--workers",
        workers,
    ]
    assert run(*args, "--out", tmp_path / "straight") == 0
    stop_at += [0, 1, 2]
    for step in range(4):
        assert run(*args, "--out", tmp_path / "stopped", "--resume") == (143 if step < 3 else 0)
        assert checkpoint.newest(tmp_path / "stopped")["step"] == step + 1
    assert same(checkpoint.newest(tmp_path / "straight"), checkpoint.newest(tmp_path / "stopped"))
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "stopped")
    times = [
        json.loads(line)["time"]
        for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()
    ]
    assert times == sorted(times) and times[0] > 0  # of all sessions together


def test_fault_07_killed_again_and_again_a_run_ends_as_one_that_was_not(small_mini, tmp_path):
    assert soak(3, tmp_path, seed=0)["kills"] == 3


def test_fault_09_another_configuration_is_refused_with_its_keys_and_more_steps_are_said(
    small_mini, tmp_path, capsys
):
    out = ["--out", tmp_path / "run"]
    assert run(*SSL, *out, "--steps", 2) == 0
    assert (
        run(*SSL, *out, "--steps", 2) == 2
        and "holds a run already; go on with --resume" in capsys.readouterr().err
    )
    config, state = (
        (tmp_path / "run" / "config.json").read_bytes(),
        checkpoint.newest(tmp_path / "run"),
    )
    other = ["--split", "5", "--method", "ssl", "--lr", "0.5", "--num-queries", "7"]
    assert dearli.main([*fitting([*SSL, *out, "--resume"]), *other]) == 2
    message = capsys.readouterr().err
    for words in (
        "stage: dear there, ssl now",
        "split: 4 there, 5 now",
        "lr: 0.0006 there, 0.5 now",
        "num_queries: 8 there, 7 now",
    ):
        assert words in message
    assert (tmp_path / "run" / "config.json").read_bytes() == config and same(
        checkpoint.newest(tmp_path / "run"), state
    )
    assert (
        run(*SSL, *out, "--steps", 2, "--resume") == 0
        and "finished at step 2, nothing to do" in capsys.readouterr().out
    )
    (tmp_path / "run" / "metrics.json").touch()  # of the first two steps
    assert run(*SSL, *out, "--steps", 3, "--resume") == 0
    assert (
        "2 steps were taken on the schedule of 2, the rest follows that of 3"
        in capsys.readouterr().out
    )
    assert [row["step"] for row in log_of(tmp_path / "run")] == [0, 1, 2] and not (
        tmp_path / "run" / "metrics.json"
    ).exists()
    torch.save({"model": {}}, tmp_path / "run" / "step_0000009.pt")
    assert (
        run(*SSL, *out, "--steps", 3, "--resume") == 2
        and "is not a checkpoint of a run" in capsys.readouterr().err
    )


def test_fault_10_what_was_taken_from_dewa_is_said_and_kept(small_mini, tmp_path, capsys):
    mask_files.generate_masks(scenes.load_mini("4").train, FakeSam(), tmp_path / "mini-masks")
    runs = ["--runs", tmp_path, "--classifier", "linear"]
    assert run("--stage", "dewa", *runs, "--steps", 1) == 0
    assert run("--stage", "ssl", "--method", "dearli", "--no-eval", *runs, "--steps", 1) == 0
    init = json.loads((tmp_path / "mini-dearli-4" / "config.json").read_text())["init"]
    kept = init["taken"]
    assert init["source"] == str(tmp_path / "mini-dewa") and init["sha256"] == identity.of_tensors(
        checkpoint.newest(tmp_path / "mini-dewa")["student"]
    )
    assert kept in capsys.readouterr().out and kept.startswith(f"{tmp_path / 'mini-dewa'}: ")
    assert (
        "tensors taken; not taken: " in kept
        and "classify.weight: expected (21, 32), found (2, 32)" in kept
    )


def test_fault_45_what_a_run_began_with_is_taken_from_it_on_resume_and_nothing_else_is(
    small_mini, tmp_path, capsys
):
    for name, seed in (("start", 0), ("other", 1)):
        assert (
            run(
                "--stage",
                "sup",
                "--no-eval",
                "--steps",
                1,
                "--seed",
                seed,
                "--out",
                tmp_path / name,
            )
            == 0
        )
    ssl = [*SSL, "--steps", 4, "--checkpoint-every", 2, "--out", tmp_path / "run"]
    assert run(*ssl, "--init", tmp_path / "start") == 0
    ended, config = (
        checkpoint.newest(tmp_path / "run"),
        (tmp_path / "run" / "config.json").read_bytes(),
    )
    # burn-in is of 1 step for a run that starts from weights, of 2 for one that does not: without
    # them step 2 would be another
    assert len(log_of(tmp_path / "run")) == 4 and "unlabeled/mask" in log_of(tmp_path / "run")[1]
    shutil.rmtree(tmp_path / "start")  # its weights are in the checkpoint
    for flags in ([], ["--init", tmp_path / "moved"]):
        back_to(tmp_path / "run", 2)
        if flags:  # the same weights under another path
            assert (
                run("--stage", "sup", "--no-eval", "--steps", 1, "--out", tmp_path / "moved") == 0
            )
        assert run(*ssl, "--resume", *flags) == 0
        assert (
            same(checkpoint.newest(tmp_path / "run"), ended)
            and (tmp_path / "run" / "config.json").read_bytes() == config
        )
    capsys.readouterr()
    assert run(*ssl, "--resume", "--init", tmp_path / "other") == 2
    assert "run: began with other weights than those of" in capsys.readouterr().err
    assert (
        run(
            "--stage",
            "sup",
            "--no-eval",
            "--seed",
            1,
            "--out",
            tmp_path / "other",
            "--resume",
            "--init",
            tmp_path / "moved",
        )
        == 2
    )
    assert "other: began without --init, and cannot be resumed with" in capsys.readouterr().err


def test_a_run_of_an_older_version_goes_on_and_what_it_does_not_store_is_said(
    small_mini, tmp_path, capsys
):
    assert run(*SSL, "--steps", 4, "--checkpoint-every", 2, "--out", tmp_path / "run") == 0
    ended = checkpoint.newest(tmp_path / "run")
    back_to(tmp_path / "run", 2)
    state = checkpoint.newest(tmp_path / "run")
    for key in ("data", "truth", "init", "foundation"):
        del state["config"][key]
    checkpoint.save(tmp_path / "run", 2, state)
    capsys.readouterr()
    assert (
        run(*SSL, "--steps", 4, "--checkpoint-every", 2, "--out", tmp_path / "run", "--resume") == 0
    )
    assert (
        "an older run that does not store what it was made of (data, truth, init): not compared"
        in capsys.readouterr().out
    )
    assert same(checkpoint.newest(tmp_path / "run"), ended)


def test_fault_49_the_same_data_elsewhere_is_the_same_and_other_data_in_its_place_is_not(
    tmp_path, capsys
):
    root = write_coco_folder(tmp_path / "set")
    flags = TINY_FLAGS[: TINY_FLAGS.index("--split")] + [
        "--split",
        "2",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--watch",
        "0",
    ]
    usual = ["--stage", "sup", "--dataset", "custom", "--steps", 1, "--no-eval"]

    def sup(*args):
        return dearli.main(fitting([*usual, "--out", tmp_path / "run", *args], flags))

    assert sup("--data-root", root) == 0
    moved = root.rename(tmp_path / "moved")
    assert (
        sup("--data-root", moved, "--resume") == 0
        and "finished at step 1, nothing to do" in capsys.readouterr().out
    )
    dataset = panoptic.load_folder(moved, "2")
    name = dataset.train.name(dataset.labeled[0])
    kept = (moved / "images" / name).read_bytes()
    (moved / "images" / name).write_bytes(
        (moved / "images" / dataset.train.name(dataset.labeled[1])).read_bytes()
    )
    assert (
        sup("--data-root", moved, "--resume") == 2
        and "data: other training images than it began with" in capsys.readouterr().err
    )
    (moved / "images" / name).write_bytes(kept)
    content = json.loads((moved / "panoptic_train.json").read_text())
    segment = next(a for a in content["annotations"] if a["file_name"] == name)["segments_info"][0]
    segment["category_id"] = next(
        c["id"] for c in content["categories"] if c["id"] != segment["category_id"]
    )
    (moved / "panoptic_train.json").write_text(json.dumps(content))
    assert (
        sup("--data-root", moved, "--resume") == 2
        and "truth: other ground truth" in capsys.readouterr().err
    )


def test_fault_43_a_warm_up_goes_on_with_its_masks_wherever_they_are_and_with_no_others(
    small_mini, tmp_path, capsys
):
    images = scenes.load_mini("4").train
    for points in (4, 8):
        mask_files.generate_masks(images, Answers(points), tmp_path / f"masks{points}")
    warm = ["--stage", "dewa", "--steps", 1, "--out", tmp_path / "dewa", "--masks"]
    assert run(*warm, tmp_path / "masks4") == 0
    stored = checkpoint.newest(tmp_path / "dewa")["config"]
    assert (
        stored["masks"]["generator"] == Answers(4).about and stored["data"] == images.fingerprint()
    )
    (tmp_path / "masks4").rename(tmp_path / "moved")
    capsys.readouterr()
    assert (
        run(*warm, tmp_path / "moved", "--resume") == 0
        and "nothing to do" in capsys.readouterr().out
    )
    assert run(*warm, tmp_path / "masks8", "--resume") == 2
    assert (
        "masks: points_per_side: 4 there, 8 now (it began with those of" in capsys.readouterr().err
    )
    # looked up by name, it is taken only if it is of these images
    shutil.copytree(tmp_path / "dewa", tmp_path / "runs" / "mini-dewa")
    state = checkpoint.newest(tmp_path / "dewa")
    state["config"]["data"] = "0" * 64
    checkpoint.save(tmp_path / "runs" / "mini-dewa", 1, state)
    ssl = ["--stage", "ssl", "--no-eval", "--steps", 1, "--runs", tmp_path / "runs"]
    assert run(*ssl) == 2
    message = capsys.readouterr().err
    assert (
        "mini-dewa: a DeWa run of something else (other training images" in message
        and message.count("\n") == 1
    )
    assert run(*ssl, "--init", tmp_path / "runs" / "mini-dewa") == 0  # somebody's word
    assert (
        "was warmed up on other images than the training images of this run"
        in capsys.readouterr().out
    )


def test_fault_11_a_checkpoint_that_would_execute_code_is_refused(small_mini, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    evil = tmp_path / "run" / "step_0000001.pt"
    checkpoint.save(evil.parent, 1, {"step": Evil(), "config": {}})  # with a sum that fits, too
    with pytest.raises(UserError, match="read safely"):
        tensor_files.load(evil)
    for args in (
        ["ssl", "--method", "dear", "--out", evil.parent, "--resume"],
        ["ssl", "--init", evil],
        ["sup", "--pretrained", evil],
    ):
        assert (
            dearli.main(
                [*fitting(["--stage", args[0], "--runs", tmp_path / "runs"]), *map(str, args[1:])]
            )
            == 2
        )
        assert "step_0000001.pt: not a checkpoint that can be read safely" in "".join(
            capsys.readouterr()
        )
    assert (
        dearli.main(["--stage", "eval", "--weights", str(evil)]) == 2
        and not (tmp_path / "owned").exists()
    )


def test_fault_12_14_steps_that_are_not_finite_are_skipped_and_five_in_a_row_stop_the_run(
    small_mini, tmp_path, monkeypatch, capsys
):
    def spoil_gradient(student):
        return student.head.decoder.query_feat.weight.register_hook(lambda grad: grad * math.inf)

    def spoil_outputs(student):  # reaches the matching
        return student.head.register_forward_hook(
            lambda module, given, out: ([(c * math.nan, e) for c, e in out[0]], out[1])
        )

    spoilt = {1: spoil_gradient, 3: spoil_outputs}

    def weights(method):
        return [value for model in method.models.values() for value in state_of(model).values()]

    train_step = MeanTeacher.step

    def step(method, batch, t):
        handle = spoilt[t](method.models["student"]) if t in spoilt else None
        before = [value.clone() for value in weights(method)]
        try:
            return train_step(method, batch, t)
        finally:
            if handle:
                handle.remove()
                assert len(before) > 100 and all(map(torch.equal, before, weights(method)))
                averages = method.optimizer.state.values()
                assert all(torch.isfinite(v).all() for s in averages for v in s.values())

    monkeypatch.setattr(MeanTeacher, "step", step)
    assert run(*SSL, "--steps", 5, "--burn-in", 2, "--out", tmp_path / "run") == 0
    rows, said = log_of(tmp_path / "run"), capsys.readouterr().out
    assert [row["step"] for row in rows if "skipped" in row] == [
        1,
        3,
    ] and "2 steps were skipped" in said
    assert (
        "norm of the gradient is" in rows[1]["skipped"]
        and "loss is not finite: labeled/class nan" in rows[3]["skipped"]
    )
    assert (
        len(rows[1]["images"]) == 2
        and len(rows[3]["images"]) == 4
        and "step 3: loss is not finite" in said
        and rows[3]["images"][0] in said
    )
    assert all(math.isfinite(row["loss"]) for row in rows if "skipped" not in row)
    assert (
        run(*SSL, "--steps", 20, "--burn-in", 2, "--lambda-u", "1e39", "--out", tmp_path / "stop")
        == 2
    )
    message, rows = capsys.readouterr().err, log_of(tmp_path / "stop")
    assert (
        "stopped after 5 steps in a row that were not finite; last: step 5: loss is" in message
        and all(name in message for name in rows[-1]["images"])
    )
    assert len(rows) == 6  # step 0 is burn-in, step 1 is spoilt as before


def test_fault_13_weights_that_are_not_finite_are_never_saved(
    small_mini, tmp_path, monkeypatch, capsys
):
    train_step = MeanTeacher.step

    def step(method, batch, t):
        if t == 3:
            method.models["student"].head.decoder.query_feat.weight.data[0, 0] = math.nan
        losses = train_step(method, batch, t)
        assert all(torch.isfinite(p).all() for p in state_of(method.models["teacher"]).values())
        return losses

    monkeypatch.setattr(MeanTeacher, "step", step)
    assert run(*SSL, "--steps", 6, "--checkpoint-every", 2, "--out", tmp_path / "run") == 2
    assert (
        "weights are not finite at step 4 (student: head.decoder.query_feat.weight"
        in capsys.readouterr().err
    )
    assert checkpoint.newest(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("stage", [["sup"], ["ssl", "--method", "dear"], ["dewa"]])
def test_fault_13_a_run_whose_step_spoils_a_weight_stops_at_once_and_keeps_its_checkpoint(
    stage, small_mini, tmp_path, monkeypatch, capsys
):
    if stage == ["dewa"]:
        mask_files.generate_masks(scenes.load_mini("4").train, FakeSam(), tmp_path / "masks")
    step, taken = torch.optim.AdamW.step, []

    def spoiling(self, *args, **kwargs):
        step(self, *args, **kwargs)
        taken.append(len(taken))
        if len(taken) == 4:
            self.param_groups[0]["params"][0].data.view(-1)[0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)
    masks = ["--masks", tmp_path / "masks"] if stage == ["dewa"] else []
    assert (
        run(
            "--stage",
            *stage,
            *masks,
            "--steps",
            8,
            "--checkpoint-every",
            2,
            *([] if stage == ["dewa"] else ["--watch", 0]),
            "--out",
            tmp_path / "run",
        )
        == 2
    )
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        "weights are not finite at step 4 (student: " in message
        and "images: " in message
        and "begin again with a lower --lr" in message
    )
    assert len(taken) == 4 and [row["step"] for row in log_of(tmp_path / "run")] == [0, 1, 2]
    state = checkpoint.newest(tmp_path / "run")
    assert state["step"] == 2 and all(
        torch.isfinite(p).all()
        for name in ("student", "teacher")
        for p in state.get(name, {}).values()
    )


def test_fault_16_a_second_run_in_a_folder_is_refused_and_a_stale_lock_is_not(
    small_mini, tmp_path, capsys
):
    folder = tmp_path / "run"

    def hold():
        files.claim(folder)
        time.sleep(60)

    first = fork(hold, tmp_path / "said.txt")
    wait_for(lambda: (folder / "lock").exists() and (folder / "lock").read_text())
    assert run(*SSL, "--steps", 1, "--out", folder) == 2
    message = capsys.readouterr().err
    assert (
        f"{folder}: process {first.pid} on " in message
        and "is writing there" in message
        and message.count("\n") == 1
    )
    first.kill()
    assert (
        ended(first) == -signal.SIGKILL and str(first.pid) in (folder / "lock").read_text()
    )  # stale
    (folder / "lock").write_text("process 1 on here")  # a number that another process has by now
    assert run(*SSL, "--steps", 1, "--out", folder) == 0


def test_fault_27_a_loader_process_that_is_killed_stops_the_run_in_one_line(
    small_mini, tmp_path, monkeypatch
):
    read = data.LabeledBatches.__getitem__

    def killed(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, step)

    monkeypatch.setattr(data.LabeledBatches, "__getitem__", killed)
    out = [
        "--stage",
        "sup",
        "--no-eval",
        "--steps",
        9,
        "--workers",
        2,
        "--checkpoint-every",
        1,
        "--out",
        tmp_path / "run",
    ]
    process = fork(
        lambda: run(*out) + len(multiprocessing.active_children()), tmp_path / "said.txt"
    )
    assert ended(process) == 2
    last = (tmp_path / "said.txt").read_text().splitlines()[-1]
    assert last.startswith(
        f"error: {tmp_path / 'run'}: a loader process died (DataLoader worker (pid"
    ) and last.endswith("go on with --resume")
    monkeypatch.setattr(data.LabeledBatches, "__getitem__", read)
    assert run(*out, "--resume") == 0 and [row["step"] for row in log_of(tmp_path / "run")] == list(
        range(9)
    )


def test_a_run_says_everything_once_and_not_every_step(small_mini, tmp_path):
    process = fork(
        lambda: run(*SSL, "--steps", 8, "--workers", 2, "--out", tmp_path / "run"),
        tmp_path / "said.txt",
    )
    assert ended(process) == 0
    lines = [
        line
        for line in (tmp_path / "said.txt").read_text().replace("\r", "\n").splitlines()
        if line.strip() and "step/s" not in line and "s/step" not in line
    ]
    assert len(lines) == len(set(lines)), lines


def test_fault_35_masks_that_were_cut_short_are_made_again_and_strays_removed(small_mini, tmp_path):
    images = scenes.load_mini("4").train

    class Killed(FakeSam):
        def generate(self, image):
            if self.calls == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().generate(image)

    process = fork(
        lambda: mask_files.generate_masks(images, Killed(), tmp_path), tmp_path / "said.txt"
    )
    assert ended(process) == -signal.SIGKILL and len(list(tmp_path.glob("*.json"))) == 5
    (tmp_path / ".train_00005.png.json.1234.tmp").write_text("{")
    half = tmp_path / "train_00002.png.json"
    content = half.read_text()
    for cut in (
        0,
        1,
        len(content) // 2,
        content.index("]]}") + 3,
        len(content) - 1,
    ):  # also where an annotation ends
        half.write_text(content[:cut])
        assert (
            mask_files.generate_masks(images, FakeSam(), tmp_path) == (8 if cut == 0 else 1)
            and half.read_text() == content
        )
    assert mask_files.generate_masks(images, FakeSam(), tmp_path) == 0 and not list(
        tmp_path.glob(".*.tmp")
    )


def test_fault_40_help_and_the_miniature_world_need_no_optional_library_and_a_missing_one_is_named(
    tmp_path,
):
    lines = [fitting(["--stage", stage, "--runs", tmp_path]) for stage in ("masks", "sup")]
    code = f"""if True:
        import sys
        class Missing:
            names = {{"panopticapi", "detectron2", "cv2", "matplotlib", "pytest"}}
            names |= {{"open_clip", "timm", "segment_anything"}}
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in self.names:
                    raise ModuleNotFoundError(f"No module named {{name}}", name=name)
        sys.meta_path.insert(0, Missing())
        import dearli
        from mini import scenes
        scenes.MINI_TRAIN, scenes.MINI_VAL = 6, 2
        masks, sup = {lines!r}
        try:
            dearli.main(["--help"])
        except SystemExit as end:
            assert end.code == 0
        assert dearli.main(masks) == 2
        assert dearli.main(sup) == 2
        Missing.names -= {{"open_clip", "timm"}}
        assert dearli.main([*sup, "--steps", "1"]) == 0
        Missing.names -= {{"segment_anything"}}
        assert dearli.main([*masks, "--points-per-side", "2"]) == 0
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name, package in (
        ("segment_anything", "segment-anything>=1.0"),
        ("open_clip", "open_clip_torch>=2.30"),
    ):
        assert (
            f"error: {name} is not installed" in done.stderr
            and f"python -m pip install '{package}'" in done.stderr
        )


def test_fault_41_a_download_that_is_cut_short_leaves_nothing_and_is_resumed_by_running_again(
    tmp_path,
):
    content = b"weights" * 10_000

    class Cut(http.server.BaseHTTPRequestHandler):
        sent = len(content) // 2

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: Cut.sent])

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def fetch():
            return fetching.fetch(
                tmp_path / "cache" / "w.pth",
                f"http://127.0.0.1:{server.server_port}/w.pth",
                hashlib.sha256(content).hexdigest(),
                "or else",
            )

        with pytest.raises(UserError, match="w.pth: cannot be fetched") as error:
            fetch()
        assert "\n" not in str(error.value) and not list((tmp_path / "cache").iterdir())
        Cut.sent = len(content)
        assert fetch().read_bytes() == content
        server.shutdown()


def test_fault_42_a_log_whose_last_line_was_cut_is_read_without_it(small_mini, tmp_path):
    assert run(*SSL, "--steps", 3, "--out", tmp_path / "run") == 0
    log = tmp_path / "run" / "log.jsonl"
    whole = log.read_bytes()
    for cut in range(whole.rindex(b"{"), len(whole) - 2):
        log.write_bytes(whole[:cut])
        assert [row["step"] for row in run_log.read_log(log)] == [0, 1]
    assert run_log.read_log(tmp_path / "none") == []
    log.write_bytes(whole + whole[:30])
    assert run(*SSL, "--steps", 4, "--out", tmp_path / "run", "--resume") == 0 and [
        row["step"] for row in log_of(tmp_path / "run")
    ] == [0, 1, 2, 3]


def soak(kills, folder, seed=None):
    """A semi-supervised run that is killed (SIGKILL) so many times must end as one that was not.

    Half of the kills come at the sight of a half-written file, the run is resumed after each, with
    0, 1 or 2 loader processes by turns; weights, optimiser, log and metrics are the same, all bits.
    Returns: what happened.
    """
    rng, straight, killed = random.Random(seed), Path(folder) / "straight", Path(folder) / "killed"
    args = [
        "--stage",
        "ssl",
        "--method",
        "dear",
        "--steps",
        8 * kills,
        "--checkpoint-every",
        1,
        "--watch",
        1,  # image a step
        "--resume",
    ]
    assert ended(fork(lambda: run(*args, "--out", straight), f"{straight}.txt"), 600 + kills) == 0

    def strays():
        return killed.is_dir() and any(p.suffix == ".tmp" for p in killed.iterdir())

    def lines():
        return len(log.read_bytes().splitlines()) if (log := killed / "log.jsonl").exists() else 0

    happened = {"kills": 0, "in a write": 0, "seconds": time.monotonic()}
    for k in range(kills):
        process = fork(lambda: run(*args, "--out", killed, "--workers", k % 3), f"{killed}.txt")
        until, pause = lines() + rng.randrange(6), rng.uniform(0, 0.3)
        wait_for(lambda: not process.is_alive() or lines() >= until)
        if k % 2:
            time.sleep(pause)
        else:
            wait_for(lambda: not process.is_alive() or strays())
        assert process.is_alive(), (killed.with_suffix(".txt")).read_text()
        process.kill()
        assert ended(process) == -signal.SIGKILL
        happened["kills"] += 1
        happened["in a write"] += strays()
    assert ended(fork(lambda: run(*args, "--out", killed), f"{killed}.txt"), 600 + kills) == 0
    assert same(checkpoint.newest(straight), checkpoint.newest(killed)) and log_of(
        straight
    ) == log_of(killed)
    assert [row["step"] for row in log_of(killed)] == list(range(8 * kills))
    assert (straight / "metrics.json").read_bytes() == (
        killed / "metrics.json"
    ).read_bytes() and not strays()
    return {
        **happened,
        "steps": 8 * kills,
        "seconds": round(time.monotonic() - happened["seconds"], 1),
    }
