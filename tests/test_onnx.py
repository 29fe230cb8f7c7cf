"""onnx_export.py: the graph against torch, by onnxruntime where it is installed."""

import dataclasses
import json
import re
import sys
from collections import Counter
from types import ModuleType

import numpy as np
import pytest
import torch

import dearli
from clip_ensemble import mask_pool
from engine import stored
from engine.request import Source
from ground.errors import UserError
from inference import panoptic_inference
from mini import microcosm
from mini.scenes import mini_taxonomy
from readers.pictures import open_image
from tests.helpers import (
    ROOT,
    TINY,
    features,
    photo,
    run_folder,
    sizes,
    tiny_head,
    tiny_segmenter,
    write_coco_folder,
)
from tools import onnx_export

SIDE = 64


def exported(weights, which, posterior, folder, monkeypatch):
    """The file of a run, its metadata, what onnxruntime makes of three images, and torch; the two
    answers are (probabilities, mask logits)."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(folder)
    path = folder / "model.onnx"
    words = f"--stage export --format onnx --weights {weights} --which {which} --out model.onnx"
    words = [*words.split(), "--posterior", posterior]
    assert dearli.main(words) == 0 and dearli.main(words) == 2  # it is there already
    session = runtime.InferenceSession(str(path))
    about = json.loads(session.get_modelmeta().custom_metadata_map["dearli"])
    scenes = [microcosm.scene("val", k, SIDE).image for k in range(3)]
    images = np.ascontiguousarray(np.stack(scenes).transpose(0, 3, 1, 2))
    theirs = session.run(None, {"images": images})
    for together, alone in zip(theirs, session.run(None, {"images": images[:1]})):
        np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-4)
    model = dearli.load(weights, which=which, posterior=posterior, device="cpu")
    with torch.no_grad():
        maps = model.model.backbone(torch.from_numpy(images))
        logits, masks = model.model.predict(maps)
        posterior = model.model.posterior(maps, logits, masks, about["alpha"])
    return path, about, model, theirs, (posterior.numpy(), masks.numpy())


def require_same(model, theirs, ours):
    """Answers are the same but for rounding, and so are panoptic maps."""
    for a, b in zip(theirs, ours):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    for k in range(3):
        one, two = (
            panoptic_inference(*map(torch.from_numpy, pair), model.method.things, sizes(SIDE, SIDE))
            for pair in ((a[0][k], a[1][k]) for a in (theirs, ours))
        )
        assert (one[0] != two[0]).float().mean() < 0.01


def test_onnxruntime_says_what_torch_says_of_a_teacher_and_clip(
    small_run, tmp_path, monkeypatch, capsys
):
    of = small_run / "run", "teacher", "ensemble", tmp_path, monkeypatch
    path, about, model, theirs, ours = exported(*of)
    said = capsys.readouterr()
    assert "model.onnx: teacher, ensemble, images of 64 x 64; onnxruntime differs" in said.out
    assert "model.onnx: exists already; name another file" in said.err
    require_same(model, theirs, ours)
    assert theirs[0].shape == (3, 8, len(model.taxonomy) + 1)
    assert theirs[1].shape == (3, 8, SIDE // 4, SIDE // 4)
    assert about["categories"] == json.loads(json.dumps(model.taxonomy.categories()))
    told = {"which": "teacher", "posterior": "ensemble", "alpha": 0.6, "size": SIDE, "layout": 2}
    assert told.items() <= about.items()
    assert (about["object_mask_threshold"], about["overlap_threshold"]) == (0.0, 0.1)
    content = path.read_bytes()  # of the machine it knows what it was told
    assert b"stack_trace" not in content and str(ROOT).encode() not in content


def test_onnxruntime_says_what_torch_says_of_a_trained_backbone_without_clip(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    root = write_coco_folder(tmp_path / "own")
    flags = ["--steps", 2, "--split", "all", "--no-eval", "--out", tmp_path / "run"]
    assert run_folder("sup", root, *flags) == 0
    _, about, model, theirs, ours = exported("run", "student", "decoder", tmp_path, monkeypatch)
    require_same(model, theirs, ours)
    assert about["alpha"] == 1 and about["weights"] == "run"


@pytest.mark.parametrize("stretch", [False, True])
def test_the_snippet_of_the_document_makes_the_map_of_panoptic_inference(
    stretch, tmp_path, monkeypatch
):
    runtime = ModuleType("onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    text = (ROOT / "docs" / "predict.md").read_text()
    (snippet,) = [code for code in re.findall("```python\n(.*?)```", text, re.S) if "onnx" in code]
    photo(tmp_path / "picture.jpg", (150, 100))
    taxonomy, side = mini_taxonomy(), 64
    k = len(taxonomy)
    # a model by hand: a thing left, the same stuff twice right, a thing that others cover
    masks = torch.full((1, 5, 16, 16), -9.0)
    masks[0, 0, :, :6], masks[0, 1, :6, 6:], masks[0, 2, 6:, 6:], masks[0, 3, :8] = 9, 9, 9, 3
    probabilities = torch.zeros(1, 5, k + 1)
    thing, stuff = taxonomy.things.index(True), taxonomy.things.index(False)
    for q, (c, p) in enumerate([(thing, 0.9), (stuff, 0.8), (stuff, 0.7), (thing, 0.2), (k, 1)]):
        probabilities[0, q, c] = p
    about = {"size": side, "mean": [1.0, 2.0, 3.0], "categories": taxonomy.categories()}
    about |= {"object_mask_threshold": 0.0, "overlap_threshold": 0.8, "merging": "pixels"}
    about |= {"layout": onnx_export.LAYOUT, "stretch": stretch}
    seen = open_image(tmp_path / "picture.jpg", stretch=stretch).resize((side, 43), 2)

    class Session:
        def __init__(self, path):
            assert path == "student.onnx"

        def get_modelmeta(self):
            return type("Meta", (), {"custom_metadata_map": {"dearli": json.dumps(about)}})

        def run(self, _, inputs):
            images = inputs["images"]
            assert images.shape == (1, 3, side, side) and images.dtype == np.uint8
            assert (images[0, :, 43:] == np.array([1, 2, 3])[:, None, None]).all()
            assert np.array_equal(images[0, :, :43].transpose(1, 2, 0), np.asarray(seen))
            return [probabilities.numpy(), masks.numpy()]

    runtime.InferenceSession = Session
    monkeypatch.chdir(tmp_path)
    made = {}
    exec(snippet, made)
    things = torch.tensor(taxonomy.things)
    shapes = (side, side), (43, side), (100, 150)
    expected, labels, scores = panoptic_inference(probabilities[0], masks[0], things, shapes)
    assert (made["segment_map"] == expected.numpy()).mean() > 0.98
    assert expected.unique().tolist() == np.unique(made["segment_map"]).tolist() == [0, 1, 2]
    names = [taxonomy.names[label] for label in labels]
    assert [name for name, _ in made["segments"]] == names
    assert [score for _, score in made["segments"]] == pytest.approx(scores.tolist())


def test_a_traced_head_holds_for_any_number_of_images_and_samples_by_the_definition():
    head = tiny_head(dataclasses.replace(TINY, decoder_layers=0)).eval().requires_grad_(False)
    maps = features(batch=2)
    shapes = ([{0: torch.export.Dim("batch")}] * len(maps),)
    with torch.no_grad():
        program = torch.export.export(head, (maps,), dynamic_shapes=shapes, strict=False)
        more = features(batch=3)
        (theirs, _), (ours, _) = program.module()(more), head(more)
        torch.testing.assert_close(theirs[-1], ours[-1], rtol=1e-3, atol=1e-4)
    called = Counter(str(node.target) for node in program.graph.nodes)
    assert called["aten.grid_sampler.default"] == 3 * TINY.encoder_layers


class Pool(torch.nn.Module):
    def forward(self, images):
        pooled = mask_pool(images.float(), images.float())
        return pooled, 2 * pooled


def test_a_query_without_a_pixel_is_pooled_to_zero_in_the_graph_too():
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    session = runtime.InferenceSession(onnx_export.to_onnx(Pool(), 4, {}))
    images = np.zeros((1, 3, 4, 4), np.uint8)
    images[0, 0, :2] = 8
    pooled, _ = session.run(None, {"images": images})
    assert pooled[0].tolist() == [[8, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_what_cannot_be_exported_is_said_in_a_line(small_run, tmp_path, monkeypatch, capsys):
    def refusal(*words):
        words = ["--weights", small_run / "run", "--out", tmp_path / "x", *words]
        words = ["--stage", "export", *words]
        assert dearli.main([str(word) for word in words]) == 2
        assert not (tmp_path / "x").exists()
        return capsys.readouterr().err

    assert "--test-size: it counts with --format onnx" in refusal("--test-size", 64)
    for package in ("onnx", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)  # as if not installed
            error = refusal("--format", "onnx")
        assert f"{package} is not installed, and --stage export needs it" in error or (
            "onnx is not installed" in error
        )
        assert "python -m pip install 'onnx' 'onnxscript' 'onnxruntime'" in error
    of_ssl = stored.read(small_run / "run")
    state = {**of_ssl.state, "config": {**of_ssl.config, "stage": "dewa"}}
    of_dewa, cfg = dataclasses.replace(of_ssl, state=state), TINY
    with pytest.raises(UserError, match="a DeWa run knows no classes"):
        onnx_export.export(of_dewa, Source(), cfg, tmp_path / "x", "student", None)
    with pytest.raises(UserError, match="--test-size 100: .* expected a multiple of 32"):
        odd = dataclasses.replace(cfg, test_size=100)
        onnx_export.export(of_ssl, Source(), odd, tmp_path / "x", "student", None)


def test_an_answer_of_onnxruntime_that_is_not_torchs_is_refused(monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    graph = onnx_export.Graph(tiny_segmenter(TINY), 1.0).eval()
    with torch.no_grad():
        images = np.random.default_rng(0).integers(0, 256, (1, 3, SIDE, SIDE), np.uint8)
        answer = [tensor.numpy() for tensor in graph(torch.from_numpy(images))]

    class Session:
        def __init__(self, content):
            self.broken = content == b"broken"

        def run(self, _, inputs):
            probabilities = answer[0].copy()
            if self.broken:
                probabilities[0, 0] = np.nan
            return [probabilities, answer[1]]

    monkeypatch.setattr(runtime, "InferenceSession", Session)
    assert "at most 0 in probabilities" in onnx_export.compare(graph, b"right", SIDE)
    with pytest.raises(UserError, match="finds other class probabilities than torch"):
        onnx_export.compare(graph, b"broken", SIDE)
