"""What all tests share: no network, the miniature world made small, a run to look at."""

import json
import os

import pytest
import torch
from PIL import Image

from ground import identity
from mini import microcosm, scenes
from pretrained import foundation, segmenter
from report import drawing
from tests.helpers import run
from tools import prepare

# one where several processes share the tests, as pytest-xdist makes them
alone = "PYTEST_XDIST_WORKER" not in os.environ
torch.set_num_threads(min(2, os.cpu_count() or 1) if alone else 1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Downloads find empty caches and nobody at home."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(foundation, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(foundation, "SAM_ADDRESS", (tmp_path / "nowhere").as_uri())
    monkeypatch.setattr(prepare, "REPOSITORY", (tmp_path / "nowhere").as_uri())


@pytest.fixture(autouse=True)
def embedded_once(monkeypatch, embeddings):
    """What a text tower makes of the same names is computed once: half a second a model."""
    embed = segmenter.text_embeddings

    def remembered(clip, tokenize, names):
        tower = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
        key = identity.of_tensors(tower), type(tokenize), *names
        if key not in embeddings:
            embeddings[key] = embed(clip, tokenize, names)
        clip.eval()  # as `text_embeddings` leaves it
        return embeddings[key].clone()

    monkeypatch.setattr(segmenter, "text_embeddings", remembered)


@pytest.fixture(scope="session")
def embeddings():
    return {}


@pytest.fixture(scope="session")
def small_openclip(tmp_path_factory):
    """A real OpenCLIP ConvNeXt with a real tokenizer, only smaller: its name."""
    import open_clip

    path = tmp_path_factory.mktemp("open_clip") / "convnext_test.json"
    vision = dict(
        timm_model_name="convnext_atto",
        timm_model_pretrained=False,
        timm_pool="",
        timm_proj="linear",
        timm_drop=0.0,
        timm_drop_path=0.1,
        image_size=64,
    )
    path.write_text(
        json.dumps(
            dict(
                embed_dim=32,
                vision_cfg=vision,
                text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1),
            )
        )
    )
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture
def small_mini(monkeypatch):
    """The miniature world with a handful of images, and small pictures of them in reports."""
    monkeypatch.setattr(drawing, "SIDES", (160, drawing.SIDES[1]))
    monkeypatch.setattr(scenes, "MINI_TRAIN", 12)
    monkeypatch.setattr(scenes, "MINI_DEV", 4)
    monkeypatch.setattr(scenes, "MINI_VAL", 4)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run of the miniature world, hardly trained: its folder, and one with three of its
    pictures."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("MINI_TRAIN", 12), ("MINI_VAL", 4)):
            patch.setattr(scenes, name, count)
        assert (
            run(
                "--stage",
                "ssl",
                "--method",
                "dear",
                "--steps",
                4,
                "--burn-in",
                3,
                "--no-eval",
                "--out",
                folder / "run",
                "--overlap-threshold",
                0.1,
                "--eval-batch",
                1,
            )
            == 0
        )
    (folder / "pictures" / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "more/c.png")):
        Image.fromarray(microcosm.scene("val", i).image).save(folder / "pictures" / name)
    return folder
