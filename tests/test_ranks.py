"""Several processes that share a stage: they do what one does, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dearli
from engine import checkpoint
from ground import identity, ranks
from mini import scenes
from tests.helpers import SSL, ended, fitting, fork, log_of, run, wait_for

# ----------------------------------------------------------------------------------------- ranks.py


def ranks_run(number, output, *args):
    """The exit codes of so many processes that share a stage, joined as torchrun would join
    them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank):
        os.environ |= {
            "WORLD_SIZE": str(number),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            return run(*args)
        finally:
            ranks.stop()

    return [
        ended(p)
        for p in [
            fork(lambda rank=rank: one(rank), f"{output}{rank}.txt") for rank in range(number)
        ]
    ]


def test_the_shares_of_ranks_are_all_there_is():
    for n, of in ((8, 2), (7, 3), (3, 3)):
        shares = [ranks.share(n, k, of) for k in range(of)]
        assert [i for share in shares for i in share] == list(range(n)) and {
            len(s) for s in shares
        } <= {n // of, -(-n // of)}


def test_fault_38_39_several_processes_label_train_and_evaluate_as_one(small_mini, tmp_path):
    assert run("--stage", "masks", "--sam", "regions", "--out", tmp_path / "masks") == 0
    assert (
        ranks_run(
            3,
            tmp_path / "masks-of",
            "--stage",
            "masks",
            "--sam",
            "regions",
            "--out",
            tmp_path / "masks-3",
        )
        == [0] * 3
    )
    assert [p.read_bytes() for p in sorted((tmp_path / "masks").glob("*.json"))] == [
        p.read_bytes() for p in sorted((tmp_path / "masks-3").glob("*.json"))
    ]
    for stage in (["dewa", "--masks", tmp_path / "masks"], ["sup"], ["ssl", "--method", "dear"]):
        one, two, flags = (
            tmp_path / f"{stage[0]}-1",
            tmp_path / f"{stage[0]}-2",
            ["--stage", *stage, "--steps", 6, "--checkpoint-every", 3],
        )
        flags += [] if stage[0] == "dewa" else ["--no-eval"]
        assert run(*flags, "--out", one) == 0
        assert ranks_run(2, tmp_path / "said", *flags, "--out", two) == [0, 0], (
            tmp_path / "said1.txt"
        ).read_text()
        a, b = log_of(one), log_of(two)
        assert [row["step"] for row in b] == list(range(6)) and len(checkpoint.steps(two)) == 2
        for x, y in zip(a, b):  # rounding: sums in another order, and what grows out of it
            assert (
                x.keys() == y.keys()
                and x["loss"] == pytest.approx(y["loss"], rel=1e-3)
                and x["lr"] == y["lr"]
            )
    assert ranks_run(2, tmp_path / "said", *flags, "--steps", 8, "--out", two, "--resume") == [0, 0]
    assert [row["step"] for row in log_of(two)] == list(range(8))
    figures = []
    for number in (1, 3):  # 3 do not divide the images
        ranks_run(
            number,
            tmp_path / "said",
            "--stage",
            "eval",
            "--weights",
            two,
            "--out",
            tmp_path / f"eval{number}",
        )
        figures.append(json.loads((tmp_path / f"eval{number}" / "metrics.json").read_text()))
    assert len(scenes.load_mini("4").val) % 3 and figures[0] == figures[1]
    assert (
        ranks_run(3, tmp_path / "said", *flags, "--out", tmp_path / "none") == [2] * 3
        and "3 processes cannot share a batch of 2" in (tmp_path / "said0.txt").read_text()
    )
    assert (
        ranks_run(2, tmp_path / "said", "--stage", "demo") == [2, 2]
        and "torchrun serves masks, dewa, sup, ssl, eval" in (tmp_path / "said0.txt").read_text()
    )


def test_several_processes_make_a_warm_up_and_start_from_it_when_it_is_written(
    small_mini, tmp_path, monkeypatch
):
    save = checkpoint.save

    def late(*args):  # rank 0 alone writes, and the other is done with its steps by then
        time.sleep(2)
        return save(*args)

    monkeypatch.setattr(checkpoint, "save", late)
    args = ["--stage", "ssl", "--method", "dearli", "--runs", tmp_path, "--steps", 2]
    args += ["--dewa-steps", 2, "--points-per-side", 2, "--no-eval"]
    assert ranks_run(2, tmp_path / "said", *args) == [0, 0], (tmp_path / "said1.txt").read_text()
    begun = checkpoint.newest(tmp_path / "mini-dearli-4")["config"]["init"]
    warm = checkpoint.newest(tmp_path / "mini-dewa")["student"]
    assert begun["sha256"] == identity.of_tensors(warm)


def test_fault_37_a_dead_rank_ends_the_whole_job(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=0",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=127.0.0.1:0",
        dearli.__file__,
        *fitting([*SSL, "--steps", "100000", "--out", tmp_path / "run"]),
    ]
    with open(tmp_path / "said.txt", "w") as said:
        job = subprocess.Popen(
            command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        log = tmp_path / "run" / "log.jsonl"
        wait_for(lambda: job.poll() is not None or log.exists() and log.stat().st_size, 120)
        assert job.poll() is None, (tmp_path / "said.txt").read_text()
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        assert job.wait(60) != 0
        assert (
            checkpoint.newest(tmp_path / "run") is None
            or checkpoint.newest(tmp_path / "run")["step"] > 0
        )
    finally:
        job.kill()
