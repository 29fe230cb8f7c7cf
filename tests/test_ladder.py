"""Ladders of methods: what their rungs are, and what the tables say of them."""

import dataclasses

import pytest

import dearli
from config import METHODS
from engine.checks import check
from engine.flags import LADDERS, configure
from engine.parser import parser
from instance_eval import MaskAP
from tools import ladder


def numbers(*flags):
    args = parser().parse_args(["--dataset", "mini", *flags])
    check(args)
    return configure(args)


def test_rungs_are_the_methods_themselves_at_equal_lengths():
    """Of each: the numbers that `--stage ssl --method NAME` has, but for what a rung changes."""
    assert set(LADDERS) == set(ladder._RUNGS_OF)
    for method in LADDERS:
        cfg = numbers("--stage", "ladder", "--method", method)
        rungs, name = ladder.ladder(method, "mini")
        assert name == f"ladder-{method}" and len({rung.run for rung in rungs}) == len(rungs)
        ladder.require_rungs(cfg, rungs)
        for rung in rungs:
            mine = rung.config(cfg)
            length = mine.sup_steps if rung.kind == "sup" else mine.ssl_steps
            on_top = cfg.settled().burn_in if rung.kind == "guided" else 0
            assert length == cfg.ssl_steps + on_top, rung.title
            if rung.kind == "sup":
                assert (mine.labels, mine.network) == (cfg.labels, cfg.network)
                continue
            alone = numbers("--stage", "ssl", "--method", rung.kind).settled()
            idle = {"clip_margin", "ssl_steps"} if rung.kind == "guided" else set()  # no CLIP asked
            for key, value in dataclasses.asdict(alone).items():
                if key not in {*dict(rung.changes), *idle}:
                    assert getattr(mine, key) == value, (rung.title, key)
    without = {
        rung.title.split()[-1]: dict(rung.changes) for rung in ladder.ladder("pldc", "mini")[0]
    }
    cfg = numbers("--stage", "ssl", "--method", "pldc")
    assert without["DDTF"] == {"coupled": round(cfg.class_threshold * cfg.mask_threshold, 3)}
    assert METHODS["hard"].on("mini")["eta"] == 0


def test_flags_change_the_rungs_of_the_method_that_they_are_of():
    cfg = numbers("--stage", "ladder", "--method", "pldc", "--steps", "9", "--burn-in", "3")
    first, alone, guided, own = ladder.ladder("pldc", "mini")[0][:4]
    assert (
        not first.config(cfg).colour and alone.config(cfg).lambda_u == 0 < own.config(cfg).lambda_u
    )
    assert [rung.config(cfg).ssl_steps for rung in (guided, own)] == [12, 9]
    assert [rung.config(cfg).burn_in for rung in (guided, own)] == [3, 3]
    assert guided.config(cfg).guided_steps == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--method", "dear"), "--stage ladder has those of pldc and esl, and without --method"),
        (("--class-threshold", "0.5"), "no instance is a pseudo-label here"),
        (("--guided-steps", "5"), "it counts with --method guided"),
        (("--eta", "0.5"), "it is of DeepLabv3+"),
        (("--method", "esl", "--num-queries", "5"), "DeepLabv3+ has no queries"),
        (("--method", "pldc", "--dewa-steps", "5"), "no masks and no warm-up are made here"),
        (("--method", "pldc", "--cutmix-prob", "0.5"), "--method pldc mixes no images"),
        (("--method", "pldc", "--labels", "panoptic"), "--labels panoptic: --method pldc has"),
        (("--method", "pldc", "--burn-in-warm", "5"), "a run that starts from a random decoder"),
        (("--method", "esl", "--steps", "9", "--burn-in", "9"), "without an unlabelled image"),
    ],
)
def test_what_is_not_of_a_ladder_is_refused(flags, words, capsys):
    assert dearli.main(["--stage", "ladder", "--dataset", "mini", *flags]) == 2
    assert words in capsys.readouterr().err


def test_tables_have_gains_by_seed_and_the_columns_that_were_measured():
    def result(pq, things):
        part = {"sq": 0.5, "rq": 0.5, "n": 3}
        whole = {"all": {"pq": pq, **part}, "things": {"pq": things, **part}}
        return {**whole, "stuff": {"pq": 0.0, **part, "n": 0}, "miou": 0.25, "miou_classes": 4}

    first = [{"student/decoder": result(pq, 0.1)} for pq in (0.1, 0.2, 0.3)]
    second = [{"student/decoder": result(pq, 0.1)} for pq in (0.2, 0.2, 0.5)]
    rungs = ladder.Rung("A", "sup"), ladder.Rung("  B", "ssl", over=("A",))
    lines = ladder.tables(rungs, {"sup": first, "ssl": second}).splitlines()
    assert lines[0] == "| rung (the paper's reading) | PQ | PQ things | mIoU |"
    assert lines[2] == "| A | 20.0 ± 10.0 | 10.0 ± 0.0 | 25.0 ± 0.0 |"
    assert lines[3] == "| B | 30.0 ± 17.3 | 10.0 ± 0.0 | 25.0 ± 0.0 |"
    # differences 10, 0, 20: deviation 10, standard error 10 / sqrt(3)
    assert lines[7] == "| B over A | +10.0 ± 5.8 | +0.0 ± 0.0 | +0.0 ± 0.0 |"
    assert [len({line.count("|") for line in part}) for part in (lines[:4], lines[5:8])] == [1, 1]
    assert ladder._slim(first[0]) == {
        "student/decoder": {"pq": 0.1, "sq": 0.5, "rq": 0.5, "pq_things": 0.1, "miou": 0.25}
    }


def test_tables_of_instances_are_of_mask_ap():
    values = {keys[0]: 0.25 for _, keys in MaskAP.columns}
    metrics = [{"student/decoder": values, "teacher/decoder": values}]
    lines = ladder.tables((ladder.Rung("A", "sup"),), {"sup": metrics}).splitlines()
    assert lines[0].startswith("| rung (the paper's reading) | AP | AP50 | AP75 |")
    assert lines[-1] == "| sup | 25.0 ± 0.0 |  | 25.0 ± 0.0 |  |"
