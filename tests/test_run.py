"""Weights of a run, and of the official code: what is written is read, and nothing else is."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

import dearli
from config import OFFICIAL
from engine import checkpoint, stored
from engine.checkpoint import state_of
from engine.sameness import differing
from ground import identity, tensor_files
from ground.errors import UserError
from model import Mask2Former
from pretrained import foundation, official
from readers import ground_truth
from readers.panoptic import load_folder
from tests.helpers import (
    REAL_DATA,
    TINY,
    random_vocabulary,
    rewrite,
    run,
    run_folder,
    tiny_head,
    tiny_segmenter,
    write_coco_folder,
)

# ------------------------------------------------------------------------ checkpoint.py, trainer.py


def test_a_flipped_bit_in_exported_weights_or_kept_embeddings_is_noticed(tmp_path, capsys):
    path = tmp_path / "student.safetensors"
    official.write(
        path, official.Weights("student", {"head.a": torch.ones(100)}, {}, {}), "safetensors"
    )
    assert official.read(path).head["head.a"].eq(1).all()

    def make():
        return torch.ones(100)

    tensor_files.cached(tmp_path / "cache", ["key"], make)
    for file in (path, *(tmp_path / "cache").iterdir()):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(UserError, match="student.safetensors: damaged, the SHA-256 of its tensors"):
        official.read(path)
    assert (
        torch.equal(tensor_files.cached(tmp_path / "cache", ["key"], make), make())
        and "damaged; made again" in capsys.readouterr().out
    )


def test_a_file_that_no_run_has_saved_is_refused_in_one_line(tmp_path):
    path, config = tmp_path / "some.pt", dataclasses.asdict(TINY)
    for content, words in (
        ([1, 2], "holds a list"),
        ({"weight": torch.zeros(2)}, "neither a checkpoint of a run"),
        ({"student": {"a": 3}, "config": config}, "neither"),
        (
            {"student": {"a": torch.zeros(2)}, "config": {**config, "hidden": "96"}},
            "its config has hidden = '96', expected int",
        ),
        ({"model": {"sem_seg_head.a": "text"}}, "neither"),
        ({"teacher": {"a": torch.zeros(2)}, "config": config}, "some.pt: holds no student"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=words) as error:
            stored.take(stored.read(path), "student", None, str(path))
        assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_fault_09_weights_of_another_configuration_are_refused_and_nothing_is_copied():
    into = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(UserError, match=r"b: expected \(3,\), found \(4,\)"):
        checkpoint.load_weights(into, {"a": torch.ones(2), "b": torch.ones(4)}, "file.pt")
    assert into["a"].eq(0).all()
    assert "1 of 2 tensors taken; not taken: b" in checkpoint.load_weights(
        into, {"a": torch.ones(2), "b": torch.ones(4)}, "file.pt", ("b",)
    )


def test_official_names_map_one_to_one_onto_our_parameters():
    head = Mask2Former([128, 256, 512, 1024], OFFICIAL, 150, random_vocabulary((1,) * 150, 640))
    ours = {f"head.{name}": list(p.shape) for name, p in head.named_parameters()}
    assert (
        sum(math.prod(shape) for shape in ours.values()) == 20_350_913
    )  # trainable, as officially
    shapes = {official.to_ours(name): shape for name, shape in official_shapes().items()}
    assert {name: shape for name, shape in shapes.items() if name.startswith("head.")} == ours


def test_embeddings_are_made_once_for_a_key_and_again_when_damaged(tmp_path, capsys):
    calls = []

    def make():
        return calls.append(1) or torch.arange(6.0).view(2, 3)

    first, second = (tensor_files.cached(tmp_path, ["model", ["a", "b"]], make) for _ in range(2))
    assert torch.equal(first, second) and len(calls) == 1
    tensor_files.cached(tmp_path, ["model", ["a", "c"]], make)
    assert len(calls) == 2
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:40])
    assert (
        torch.equal(tensor_files.cached(tmp_path, ["model", ["a", "b"]], make), first)
        and len(calls) == 3
    )
    assert "damaged" in capsys.readouterr().out


def official_shapes():
    listed = REAL_DATA.parent / "official_keys.json"
    if not listed.exists():
        pytest.skip(f"{listed} with the official names is not there")
    return json.loads(listed.read_text())["shapes"]


def test_an_official_file_of_real_size_loads_runs_and_goes_back_unchanged(tmp_path):
    torch.manual_seed(0)
    sizes = {
        name: [151] if name.endswith("empty_weight") else shape
        for name, shape in official_shapes().items()
    }  # K + 1
    model = {name: torch.randn(shape) * 0.02 for name, shape in sizes.items()}
    weights = official.recognise({"model": model, "iteration": 79_999})
    assert (
        weights.kind == "student"
        and weights.num_classes == 150
        and (len(weights.head), len(weights.clip)) == (298, 493)
    )
    back = official.official(weights)
    assert back.keys() == model.keys() and all(back[name] is model[name] for name in model)
    taxonomy = ground_truth.Taxonomy(("a, b", "c"), (True, False), (1, 2))
    segmenter = tiny_segmenter(OFFICIAL, taxonomy, weights.clip)
    taken = checkpoint.load_weights(state_of(segmenter), weights.head, "file")
    assert "298 of 298 tensors taken" in taken
    with torch.no_grad():
        class_logits, mask_logits = segmenter.eval()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert class_logits.shape == (1, 200, 3) and mask_logits.shape == (1, 200, 16, 16)


def test_official_files_are_evaluated_continued_and_written_back(small_mini, tmp_path, capsys):
    runs = ["--runs", tmp_path]
    assert run("--stage", "ssl", "--method", "dear", *runs, "--steps", 3) == 0
    folder, theirs, ours, again = (
        tmp_path / "mini-dear-4",
        tmp_path / "a.pth",
        tmp_path / "b.safetensors",
        tmp_path / "c.pth",
    )

    def main(*args):
        return dearli.main([str(a) for a in args] + ["--dataset", "mini"])

    assert main("--stage", "export", "--weights", folder, "--out", theirs) == 0
    assert (
        main("--stage", "export", "--weights", theirs, "--format", "safetensors", "--out", ours)
        == 0
    )
    assert main("--stage", "export", "--weights", ours, "--out", again) == 0
    first, second = (torch.load(p, weights_only=True)["model"] for p in (theirs, again))
    assert first.keys() == second.keys() and all(
        torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first
    )
    capsys.readouterr()
    assert (
        main("--stage", "export", "--weights", ours, "--out", again) == 2
        and "exists already" in capsys.readouterr().err
    )
    assert main("--stage", "eval", "--weights", ours, "--labels", "semantic") == 2
    assert "has no teacher" in capsys.readouterr().err
    # the file alone gives the figures of the run: it brings its CLIP along (the run's own was
    # random)
    expected = json.loads((folder / "metrics.json").read_text())
    for file in (theirs, ours):
        assert run("--stage", "eval", "--weights", file, "--out", tmp_path / "eval") == 0
        assert (
            json.loads((tmp_path / "eval" / "metrics.json").read_text())["student/ensemble"]
            == expected["student/ensemble"]
        )
    assert (
        run(
            "--stage",
            "ssl",
            "--init",
            theirs,
            "--out",
            tmp_path / "more",
            "--steps",
            2,
            "--no-eval",
        )
        == 0
    )
    # a backbone that was trained along is exported with its CLIP, and trained on from there
    assert (
        run(
            "--stage",
            "sup",
            "--init",
            theirs,
            "--out",
            tmp_path / "along",
            "--steps",
            2,
            "--train-backbone",
        )
        == 0
    )
    assert (
        main("--stage", "export", "--weights", tmp_path / "along", "--out", tmp_path / "along.pth")
        == 0
    )
    assert (
        run("--stage", "eval", "--weights", tmp_path / "along.pth", "--out", tmp_path / "eval") == 0
    )
    one, other = (
        json.loads((tmp_path / d / "metrics.json").read_text())["student/ensemble"]["all"]
        for d in ("along", "eval")
    )
    assert one == other


def test_official_files_are_told_apart_and_what_does_not_fit_is_refused(
    small_mini, tmp_path, capsys
):
    head = {official.to_official(f"head.{n}"): p for n, p in tiny_head().state_dict().items()}
    for extra, kind, classes in (
        ({}, "teacher", None),
        (official.criterion("dewa", 1, 0.1), "dewa", 1),
        (official.criterion("student", 150, 0.1), "student", 150),
    ):
        weights = official.recognise({"model": {**head, **extra}})
        assert (weights.kind, weights.num_classes) == (kind, classes) and len(weights.head) == len(
            head
        )
    assert official.recognise({"step": 3, "student": {}}) is None
    clip = foundation.load_clip(TINY)[0].state_dict()
    whole = official.Weights("student", weights.head, clip, official.criterion("student", 150, 0.1))
    official.write(tmp_path / "ade.pth", whole, "official")
    wrong = {**clip, "visual.head.proj.weight": torch.zeros(1, 1)}
    official.write(tmp_path / "other.pth", dataclasses.replace(whole, clip=wrong), "official")
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    for name, words in (
        ("ade.pth", "trained on 150 classes, the data set has 20"),
        ("other.pth", "another CLIP than --backbone mini"),
        ("cut.safetensors", "damaged"),
        ("none.pth", "no such run or file (--weights)"),
    ):
        capsys.readouterr()
        assert run("--stage", "eval", "--weights", tmp_path / name) == 2, name
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1


def test_figures_are_not_replaced_by_those_of_other_images_or_runs(tmp_path, capsys):
    root, out = write_coco_folder(tmp_path / "set", images=4), tmp_path / "run"
    for name in ("run", "other"):
        flags = ("--split", "2", "--steps", 1, "--out", tmp_path / name)
        assert run_folder("sup", root, *flags, "--seed", len(name)) == 0
    assert dearli.main(["--stage", "eval", "--weights", str(out)]) == 0  # the same again
    shutil.copytree(root, tmp_path / "fewer")
    rewrite(tmp_path / "fewer" / "panoptic_val.json", lambda c: c["annotations"].pop() and None)
    own = (out / "metrics.json").read_text()
    fewer = ["--stage", "eval", "--data-root", str(tmp_path / "fewer"), "--dataset", "custom"]
    capsys.readouterr()
    assert dearli.main([*fewer, "--weights", str(out)]) == 2
    assert "is of other validation images, or other truth" in capsys.readouterr().err
    assert (out / "metrics.json").read_text() == own
    there = ["--out", str(tmp_path / "there")]
    assert dearli.main([*fewer, "--weights", str(out), *there]) == 0
    assert dearli.main([*fewer, "--weights", str(tmp_path / "other"), *there]) == 2
    assert "is of another run, and would be replaced" in capsys.readouterr().err
    compare = ["--stage", "report", "--weights", str(out), "--compare", str(tmp_path / "there")]
    assert dearli.main([*compare, "--report-images", "0"]) == 0
    said = capsys.readouterr().out
    assert f"warning: {tmp_path / 'there'}: measured by other validation images" in said


def test_all_labelled_images_are_known_again_however_many_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "SAMPLED", 1)
    root = write_coco_folder(tmp_path / "set", images=4)
    dataset = load_folder(root, "3")
    seen = {}
    for folder in (None, "images", "panoptic"):
        if folder:
            path = root / folder / dataset.train.name(dataset.labeled[-1])
            path.write_bytes(path.read_bytes()[:-1] + b"?")  # as long, and no sample is of it
        prints = dataset.train.fingerprint(dataset.labeled), dataset.truth_fingerprint()
        seen[folder] = *prints, dataset.labeled_fingerprint()
    assert len({prints[:2] for prints in seen.values()}) == 1
    assert len({prints[2] for prints in seen.values()}) == 3
    before, now = ({"stage": "sup", "labeled": seen[key][2]} for key in (None, "images"))
    assert differing(before, now) == ["labeled"] and not differing({"stage": "sup"}, now)
    monkeypatch.setattr(ground_truth, "READ", 2)
    assert dataset.labeled_fingerprint() == ""
