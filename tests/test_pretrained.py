"""."""

import dataclasses
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import config
import dearli
from config import MINI, OFFICIAL, Config
from ground.errors import UserError
from mini import microcosm
from pretrained import fetching, foundation, sam
from pretrained.sam import MaskGenerator
from tests.helpers import TINY, run

# --------------------------------------------------------------------------------------------------


def test_fault_41_a_download_is_checked_kept_and_missed_in_one_line(tmp_path):
    content = b"weights" * 1000
    (tmp_path / "far").write_bytes(content)
    near, digest, far = (
        tmp_path / "cache" / "w.pth",
        hashlib.sha256(content).hexdigest(),
        (tmp_path / "far").as_uri(),
    )
    with pytest.raises(
        UserError, match="far: cannot be fetched .*invalid hash.* put it to .*w.pth, or else"
    ):
        fetching.fetch(near, far, "0" * 64, "or else")
    assert not list(near.parent.iterdir())  # nothing half-done is left behind
    assert fetching.fetch(near, far, digest, "") == near and near.read_bytes() == content
    (tmp_path / "far").unlink()
    assert fetching.fetch(near, far, digest, "") == near  # from the cache
    near.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"w.pth: SHA-256 is .*, expected {digest}; delete it"):
        fetching.fetch(near, far, digest, "")


def test_sam_comes_from_a_file_the_cache_or_nowhere(tmp_path, monkeypatch):
    import segment_anything

    from mini import mini_sam

    monkeypatch.setitem(
        segment_anything.sam_model_registry, "vit_b", mini_sam.build
    )  # the size of the model is not the point
    cfg = dataclasses.replace(OFFICIAL, sam="vit_b")
    with pytest.raises(
        UserError,
        match="cannot be fetched .* put it to .*sam_vit_b_01ec64.pth, or name it with --sam-weights FILE",
    ):
        foundation.load_sam(cfg)
    file = tmp_path / "cache" / "sam_vit_b_01ec64.pth"
    file.parent.mkdir(exist_ok=True)
    weights = mini_sam.load(mini_sam.WEIGHTS).state_dict()
    torch.save(weights, file)
    with pytest.raises(UserError, match="sam_vit_b_01ec64.pth: SHA-256 is"):  # not Meta's file
        foundation.load_sam(cfg)
    monkeypatch.setitem(foundation.SAM_FILES, "vit_b", (file.name, fetching.sha256(file)))
    for found in (cfg, dataclasses.replace(cfg, sam_weights=str(file))):
        taken = foundation.load_sam(found)(torch.device("cpu")).sam.state_dict()
        assert all(torch.equal(taken[name], weights[name]) for name in weights)


def test_openclip_weights_come_from_a_file_the_hub_or_nowhere(
    tmp_path, small_openclip, monkeypatch
):

    cfg = dataclasses.replace(OFFICIAL, backbone=small_openclip, pretrained="random")
    clip, tokenize = foundation.load_clip(cfg)
    assert tokenize(["a cat"]).shape == (1, 77)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    again, _ = foundation.load_clip(
        dataclasses.replace(cfg, seed=1, pretrained=str(tmp_path / "clip.pt"))
    )
    assert all(
        torch.equal(a, b) for a, b in zip(clip.state_dict().values(), again.state_dict().values())
    )
    (tmp_path / "cut.pt").write_bytes((tmp_path / "clip.pt").read_bytes()[:9000])
    with pytest.raises(UserError, match=f"cut.pt: not weights of {small_openclip}, or damaged"):
        foundation.load_clip(dataclasses.replace(cfg, pretrained=str(tmp_path / "cut.pt")))
    with pytest.raises(
        UserError,
        match="no OpenCLIP weights are called 'laion7b'; available for --pretrained: laion_aesthetic_s13b_b82k, laion_aesthetic_s13b_b82k_augreg",
    ):
        foundation.load_clip(dataclasses.replace(OFFICIAL, pretrained="laion7b"))
    with pytest.raises(
        UserError,
        match="weights cannot be had .* download https://huggingface.co/laion/CLIP-convnext_base_w_320.* name it with --pretrained FILE",
    ) as error:
        foundation.load_clip(OFFICIAL)
    assert "\n" not in str(error.value)
    # the hub's cache names a file by its SHA-256, which is checked
    blob = tmp_path / hashlib.sha256((tmp_path / "clip.pt").read_bytes()).hexdigest()
    shutil.copy(tmp_path / "clip.pt", blob)
    store = tmp_path / "store" / ("f" * 64)  # newer clients keep the bytes in a store of their own
    store.parent.mkdir()
    blob.rename(store)
    blob.symlink_to(store)
    (tmp_path / "snapshot.bin").symlink_to(blob)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repository, name, **more: str(tmp_path / "snapshot.bin"),
    )
    assert (
        fetching.hub_file("laion/some", foundation.CLIP_FILES, "some") == tmp_path / "snapshot.bin"
    )
    store.write_bytes(store.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{store.name}: damaged, its SHA-256 is not {blob.name}"):
        fetching.hub_file("laion/some", foundation.CLIP_FILES, "some")


def test_the_weights_of_the_paper_are_known_to_openclip_and_go_with_their_model(capsys):
    import open_clip

    assert all(
        tag in open_clip.list_pretrained_tags_by_model(model) for model, tag in config.TAGS.items()
    )
    assert (
        dearli.main(
            [
                "--dataset",
                "coco",
                "--backbone",
                "convnext_large_d_320",
                "--print-config",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["pretrained"] == "laion2b_s29b_b131k_ft_soup"


def test_a_timm_backbone_trains_plain_mask2former_and_refuses_what_needs_text(
    small_mini, tmp_path, capsys
):
    timm_flags = ["--backbone", "convnext_atto.d2_in1k", "--classifier", "linear"]
    for extra in ([], ["--train-backbone"]):
        out = tmp_path / f"sup{len(extra)}"
        assert run("--stage", "sup", *timm_flags, *extra, "--steps", 2, "--out", out) == 0
        metrics = json.loads((out / "metrics.json").read_text())
        assert "student/decoder" in metrics and "student/ensemble" not in metrics
    assert run("--stage", "masks", "--runs", tmp_path) == 0
    assert run("--stage", "dewa", *timm_flags, "--runs", tmp_path, "--steps", 2) == 0
    assert (
        run(
            "--stage",
            "ssl",
            "--method",
            "ssl",
            *timm_flags,
            "--init",
            tmp_path / "mini-dewa",
            "--out",
            tmp_path / "ssl",
            "--steps",
            3,
        )
        == 0
    )
    assert run("--stage", "eval", "--weights", tmp_path / "ssl") == 0
    capsys.readouterr()
    for k, (args, words) in enumerate(
        (
            (["--stage", "sup", *timm_flags[:2]], "no text tower: it needs --classifier linear"),
            (["--stage", "ssl", "--method", "dear", *timm_flags], "--method ssl"),
            (["--stage", "zeroshot", *timm_flags[:2]], "has no text tower"),
            (["--stage", "export", "--weights", tmp_path / "ssl"], "has none"),
            (
                ["--stage", "sup", "--backbone", "vgg16"],
                "unknown backbone 'vgg16'; available: mini, an OpenCLIP ConvNeXt",
            ),
        )
    ):
        assert run(*args, "--out", tmp_path / f"refused{k}") == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    # weights of timm's own making, from a file
    import timm

    made = timm.create_model("convnext_atto", num_classes=10)
    torch.save(made.state_dict(), tmp_path / "timm.pth")
    cfg = dataclasses.replace(
        TINY, backbone="convnext_atto.d2_in1k", pretrained=str(tmp_path / "timm.pth")
    )
    assert torch.equal(foundation.load_timm(cfg).stem[0].weight, made.stem[0].weight)
    torch.save(
        {"model": made.state_dict()}, tmp_path / "wrapped.pth"
    )  # as the original release has them
    assert torch.equal(
        foundation.load_timm(dataclasses.replace(cfg, pretrained=str(tmp_path / "wrapped.pth")))
        .stem[0]
        .weight,
        made.stem[0].weight,
    )
    torch.save({"foo.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    torch.save({"x": os.system}, tmp_path / "code.pth")
    for name, words in (
        ("foreign.pth", "foreign.pth: not weights of convnext_atto"),
        ("code.pth", "code.pth: not a checkpoint that can be read safely"),
        ("none.pth", "none.pth: no such weights file"),
    ):
        with pytest.raises(UserError, match=words):
            foundation.load_timm(dataclasses.replace(cfg, pretrained=str(tmp_path / name)))
    with pytest.raises(
        UserError, match="unknown backbone 'convnext_base.fb_in21k'"
    ):  # a tag that does not exist
        foundation.is_timm("convnext_base.fb_in21k")
    with pytest.raises(
        UserError, match="weights cannot be had .*huggingface.co/timm/convnext_atto.d2_in1k"
    ):
        foundation.load_timm(dataclasses.replace(cfg, pretrained=""))


# --------------------------------------------------------------------------------------------------


def _masks_of_both(picture: np.ndarray, cfg: Config) -> tuple[list[dict], list[dict]]:
    """The mini SAM's masks of a picture by segment_anything's own generator, and by ours."""
    from segment_anything import SamAutomaticMaskGenerator

    from mini import mini_sam

    sam = mini_sam.load()
    theirs = SamAutomaticMaskGenerator(
        sam,
        cfg.points_per_side,
        cfg.points_per_batch,
        cfg.pred_iou_thresh,
        cfg.stability_thresh,
        box_nms_thresh=cfg.mask_nms_thresh,
    )
    return theirs.generate(picture), MaskGenerator(sam, cfg).generate(picture)


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(points_per_side=5, points_per_batch=7, mask_nms_thresh=0.9),
        dict(pred_iou_thresh=0.6, stability_thresh=0.7, points_per_side=6),
        dict(pred_iou_thresh=-1.0, stability_thresh=0.0, points_per_side=3),
    ],
)
@pytest.mark.parametrize(
    "size", [(128, 128), (75, 100), (210, 160)]
)  # of the model's square; smaller and wide; larger and high
def test_masks_and_their_records_are_those_of_segment_anything(size, change):
    picture = np.asarray(Image.fromarray(microcosm.scene("val", 3).image).resize(size[::-1]))
    theirs, ours = _masks_of_both(picture, dataclasses.replace(MINI, **change))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs):
        assert (
            set(one) == set(other)
            and np.array_equal(one["segmentation"], other["segmentation"])
            and one["segmentation"].shape == size
        )
        for field in ("area", "bbox", "crop_box", "point_coords", "stability_score"):
            assert one[field] == other[field], field
        assert one["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-5)
    json.dumps([{k: v for k, v in one.items() if k != "segmentation"} for one in ours])


def test_a_sam_with_its_own_vision_transformer_is_asked_alike_in_either_precision():
    from segment_anything import SamAutomaticMaskGenerator
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=64,
        patch_size=16,
        embed_dim=32,
        depth=2,
        num_heads=2,
        out_chans=32,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
    )
    sam = Sam(
        encoder,
        PromptEncoder(32, (4, 4), (64, 64), 16),
        MaskDecoder(transformer_dim=32, transformer=TwoWayTransformer(2, 32, 2, 64)),
    ).eval()
    cfg = dataclasses.replace(
        OFFICIAL,
        points_per_side=4,
        points_per_batch=6,
        pred_iou_thresh=-9.0,
        stability_thresh=0.0,
        mask_nms_thresh=0.95,
    )
    picture = np.asarray(Image.fromarray(microcosm.scene("val", 3).image).resize((90, 50)))
    theirs = SamAutomaticMaskGenerator(sam, 4, 6, -9.0, 0.0, box_nms_thresh=0.95).generate(picture)
    ours, rounded = (
        MaskGenerator(sam, cfg, precision).generate(picture)
        for precision in (torch.float32, torch.bfloat16)
    )
    assert len(ours) == len(theirs) > 1 and len(rounded) > 1
    same = [
        (one["segmentation"] == other["segmentation"]).mean() for one, other in zip(ours, theirs)
    ]
    assert min(same) > 0.99


def test_a_picture_of_which_every_mask_is_rejected_has_none():
    picture = microcosm.scene("val", 3).image
    for change in (dict(pred_iou_thresh=9.0), dict(stability_thresh=1.1)):
        cfg = dataclasses.replace(MINI, points_per_side=4, **change)
        assert _masks_of_both(picture, cfg) == ([], [])


def test_boxes_of_masks_by_hand_and_of_an_empty_one():
    logits = torch.full((3, 4, 5), -0.5)
    logits[0, 1:3, 2:4], logits[1, 3, 0] = 1.0, 2.0
    assert sam.boxes(logits).tolist() == [[2, 1, 3, 2], [0, 3, 0, 3], [0, 0, 0, 0]]


def test_masks_with_an_encoder_in_bf16_are_nearly_those_of_fp32():
    from mini import mini_sam

    sam, found = mini_sam.load(), []
    cfg = dataclasses.replace(MINI, points_per_side=8)
    for i in range(4):
        picture = microcosm.scene("val", i).image
        exact, rounded = (
            [one["segmentation"] for one in MaskGenerator(sam, cfg, precision).generate(picture)]
            for precision in (torch.float32, torch.bfloat16)
        )
        found.extend(mini_sam.iou_matrix(exact, rounded).max(1))
    assert len(found) > 20 and np.mean(np.array(found) > 0.95) > 0.9, np.sort(found)


def test_answers_without_the_repeated_image_are_those_of_segment_anythings_decoder():
    from mini import mini_sam
    from pretrained.sam_fast import answers

    loaded, size = mini_sam.load(), mini_sam.SIDE
    picture = torch.from_numpy(microcosm.scene("val", 3).image).permute(2, 0, 1)[None]
    xy = torch.rand(9, 2, generator=torch.Generator().manual_seed(0)) * size
    with torch.no_grad():
        embedding = loaded.image_encoder(loaded.preprocess(picture))
        asked = xy[:, None], torch.ones(9, 1, dtype=torch.int)
        sparse, dense = loaded.prompt_encoder(points=asked, boxes=None, masks=None)
        place = loaded.prompt_encoder.get_dense_pe()
        logits, iou = loaded.mask_decoder(embedding, place, sparse, dense, multimask_output=True)
        assert logits.shape == (9, 3, size, size)
        # a threshold in the widest gap of the middle: rounding cannot carry a value over it
        middle = iou.flatten().sort().values[9:18]
        gap = middle.diff().argmax()
        assert middle.diff()[gap] > 1e-3
        for least in (-9.0, middle[gap : gap + 2].mean().item()):
            points, ious, masks = answers(loaded, embedding, xy, least)
            drawn = (iou > least).nonzero(as_tuple=True)
            assert torch.equal(points, drawn[0]) and 0 < len(points) <= 27
            torch.testing.assert_close(ious, iou[drawn], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(masks, logits[drawn], rtol=1e-3, atol=1e-3)
