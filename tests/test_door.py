"""."""

import numpy as np
import pytest
import torch
from PIL import Image

import dearli
from ground.errors import UserError
from readers import panoptic
from tests.helpers import run, write_coco_folder

# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, words",
    [
        (
            ["--stage", "sup", "--compare", "runs/a"],
            "--compare: only --stage report knows it, not --stage sup",
        ),
        (["--stage", "report"], "this stage needs --weights runs/NAME"),
        (
            ["--stage", "report", "--weights", "."],
            "holds no config.json, metrics.json or log.jsonl; expected the folder of a run",
        ),
        (
            ["--stage", "sup", "--report-images", "-1"],
            "--report-images -1: expected a number of at least 0",
        ),
        (
            ["--stage", "evall"],
            "unknown stage 'evall'; available: prepare, import, validate, masks",
        ),
        (["--stage", "evall"], "(did you mean eval?)"),
        (["--stage", "sup", "--spilt", "4"], "unknown flag '--spilt' (did you mean --split?)"),
        (["--stage", "sup", "--lerning-rate", "4"], "unknown flag '--lerning-rate'"),
        (["sup"], "'sup': expected a flag such as --stage"),
        (["--stage", "sup", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--stage", "sup", "--help", "--dataset", "coko"], "unknown data set 'coko'"),
        (
            ["--stage", "eval", "--dry-run"],
            "--dry-run: only --stage masks, dewa, sup and ssl know it, not --stage eval",
        ),
        (["--steps", "5", "--burn-in", "5"], "--burn-in 5: all 5 steps of the run"),
        (
            ["--stage", "ladder", "--steps", "150", "--burn-in-warm", "150"],
            "--burn-in-warm 150: all 150 steps of the run",
        ),
        (["--stage", "sup", "--lr", "-1"], "--lr -1.0: expected a number of at least 0"),
        (
            ["--stage", "sup", "--num-queries", "0"],
            "--num-queries 0: expected a number of at least 1",
        ),
        (["--stage", "sup", "--hidden", "97"], "--hidden 97: expected a multiple of 32"),
        (["--stage", "sup", "--steps", "0"], "--sup-steps 0: expected a number of at least 1"),
        (["--stage", "sup", "--workers", "-1"], "--workers -1: expected a number of at least 0"),
        (["--stage", "ssl", "--cutmix-prob", "1.5"], "--cutmix-prob 1.5: expected a share, 0 to 1"),
        (["--stage", "ssl", "--ema-decay", "nan"], "--ema-decay nan: expected a share"),
        (
            ["--stage", "sup", "--scale-min", "3"],
            "--scale-min 3.0: expected no more than --scale-max",
        ),
        (["--stage", "sup", "--log", "wandb"], "unknown log 'wandb'; available: tensorboard"),
        (
            ["--stage", "report", "--palette", "coco"],
            "unknown palette 'coco'; available: dataset, safe",
        ),
        (
            ["--dataset", "mapillary"],
            "unknown data set 'mapillary'; available: mini, custom, ade20k, coco, coco-objects",
        ),
        (
            ["--stage", "ssl", "--method", "dearly"],
            "unknown method 'dearly'; available: ssl, dear, dearli",
        ),
        (["--stage", "sup", "--split", "0"], "unknown split '0' of data set mini"),
        (["--stage", "sup", "--split", "1_32"], "unknown split '1_32' of data set mini"),
        (["--stage", "sup", "--precision", "fp8"], "unknown precision 'fp8'"),
        (["--stage", "sup", "--backbone", "vgg16"], "unknown backbone 'vgg16'"),
        (
            ["--stage", "sup", "--classifier", "mlp"],
            "unknown classifier 'mlp'; available: language, linear",
        ),
        (["--stage", "sup", "--dataset", "custom"], "--data-root"),
        (
            ["--stage", "sup", "--dataset", "custom", "--data-root", "/no/such/folder"],
            "/no/such/folder: no such folder",
        ),
        (["--stage", "eval"], "--weights"),
        (["--stage", "eval", "--weights", "/no/such/run"], "/no/such/run"),
        (["--stage", "masks", "--sam", "vit_b"], "sam_vit_b_01ec64.pth: cannot be fetched"),
        (["--stage", "sup", "--device", "tpu"], "device 'tpu': expected cpu, cuda, cuda:N or mps"),
        (["--stage", "sup", "--device", "gpu"], "device 'gpu': expected cpu, cuda, cuda:N or mps"),
        (["--stage", "sup", "--device", "0"], "device '0': expected cpu, cuda, cuda:N or mps"),
        (["--stage", "sup", "--device", "hpu"], "device 'hpu': not available here; available: cpu"),
        (
            ["--stage", "sup", "--init", "/no/such/run"],
            "/no/such/run: no such run or file (--init)",
        ),
        (
            ["--stage", "sup", "--out", __file__],
            "test_door.py is a file; expected a folder for results; choose another with --out",
        ),
        (
            ["--stage", "sup", "--out", f"{__file__}/x"],
            "test_door.py is a file; expected a folder for results",
        ),
        (
            ["--stage", "zeroshot", "--masks", "/no/such/folder"],
            "/no/such/folder: no such folder of masks; expected one, or gt or sam",
        ),
        (
            ["--stage", "predict", "--weights", __file__, "--input", "/no/such/picture"],
            "/no/such/picture: no such picture or folder of pictures",
        ),
        (
            ["--stage", "report", "--weights", ".", "--compare", "/no/such/run"],
            "/no/such/run: no such run or file (--compare)",
        ),
        (
            ["--stage", "sup", "--dataset", "ade20k", "--split", "1_512"],
            "unknown split '1_512' of ade20k; available: 1_128",
        ),
        (
            ["--stage", "prepare"],
            "unknown data set to prepare 'mini'; available: ade20k, coco, coco-objects",
        ),
        (
            ["--stage", "masks", "--sam", "vit_b", "--sam-weights", "/no/such/file"],
            "/no/such/file: no such weights file; expected the vit_b checkpoint",
        ),
        (
            ["--stage", "masks", "--images", "/no/such/folder"],
            "/no/such/folder: no such folder of images",
        ),
        (
            ["--stage", "sup", "--object-width", "20"],
            "--object-width: images are shown by their short side; it counts with --seen-width",
        ),
        (
            ["--stage", "sup", "--preset", "custom", "--test-max", "300"],
            "--test-max: images are shown by the width of their objects",
        ),
        (["--stage", "sup", "--window", "100"], "--window 100: expected a multiple of 32"),
        (["--stage", "ssl", "--alpha", "1.2"], "--alpha 1.2: expected a number from 0 to 1"),
        (["--stage", "ssl", "--alpha", "often"], "--alpha often: expected"),
        (["--stage", "ssl", "--alpha", "0.4:2"], "--alpha 0.4:2: expected"),
        (["--stage", "ssl", "--alpha", "0.4:"], "--alpha 0.4:: expected a number from 0 to 1"),
        (["--stage", "ssl", "--alpha", ":0.4"], "--alpha :0.4: expected a number from 0 to 1"),
        (["--stage", "sup", "--eval-on", "test"], "unknown evaluation set 'test'"),
        (
            ["--stage", "predict", "--which", "techer"],
            "unknown model 'techer'; available: student, teacher (did you mean teacher?)",
        ),
        (["--stage", "predict", "--posterior", "clip"], "unknown posterior 'clip'"),
        (["--stage", "export", "--format", "onxx"], "unknown format 'onxx'"),
        (
            ["--stage", "import", "--input", ".", "--out", "x"],
            "--stage import needs --from, the kind of annotations: labelme",
        ),
        (
            ["--stage", "ssl", "--teacher-posterior", "mt"],
            "unknown teacher posterior 'mt'; available: decoder, clip, ensemble",
        ),
        (
            ["--stage", "ssl", "--labels", "instance"],
            "unknown labels 'instance'; available: panoptic, semantic",
        ),
        (["--stage", "sup", "--input", "/tmp"], "--input: only --stage predict"),
        (["--stage", "predict", "--input", "/tmp"], "--weights"),
        (
            ["--stage", "sup", "--images", "/tmp"],
            "--images: only --stage masks and dewa know it, not --stage sup",
        ),
        (
            ["--stage", "alpha", "--alpha", "0.3"],
            "--alpha: the rungs of --stage alpha set it themselves",
        ),
        (["--stage", "ladder", "--classifier", "linear"], "need --classifier language"),
        (
            ["--stage", "sup", "--backbone", "convnext_base"],
            "no OpenCLIP weights are called ''; available for --pretrained: laion400m_s13b_b51k",
        ),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_clear_line(
    args, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert dearli.main(args) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and message.startswith("error: ")


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not a readable JSON"),
        ("[]", "key 'images' is missing"),
        ('{"images": [], "annotations": []}', "key 'categories' is missing"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}', "isthing"),
        (
            '{"images": [], "annotations": [{"image_id": 3}], "categories": [{"id": 1, "name": "cat", "isthing": 1}]}',
            "no entry for 3",
        ),
    ],
)
def test_a_json_without_what_is_needed_gets_one_clear_line(content, words, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=1)
    (root / "panoptic_train.json").write_text(content)
    with pytest.raises(UserError, match=words) as error:
        panoptic.load_folder(root, "1")
    assert "panoptic_train.json" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_with_missing_or_wrong_files_says_which(tmp_path):
    root = write_coco_folder(tmp_path / "set")
    with pytest.raises(UserError, match="available: 1_3"):
        panoptic.load_folder(root, "1_64")
    (root / "splits" / "1_3" / "labeled.txt").write_text("train0.png\nnowhere.png\n")
    with pytest.raises(UserError, match="'nowhere.png' is not an image of the training set"):
        panoptic.load_folder(root, "1_3")
    (root / "images" / "train1.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="train1.png: not a readable image"):
        panoptic.load_folder(root, "2").train.image(1)
    Image.fromarray(np.full((64, 64, 3), 9, np.uint8)).save(root / "panoptic" / "train2.png")
    with pytest.raises(
        UserError, match="train2.png: segment 592137 has pixels but is not in segments_info"
    ):
        panoptic.load_folder(root, "2").train.truth(2)


def test_weights_of_another_configuration_are_named(small_mini, tmp_path, capsys):
    assert run("--stage", "sup", "--steps", 1, "--no-eval", "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert (
        dearli.main(
            [
                "--stage",
                "eval",
                "--weights",
                str(tmp_path / "run"),
                "--hidden",
                "64",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "other"),
            ]
        )
        == 2
    )
    assert "fits another configuration" in capsys.readouterr().err


def test_a_damaged_or_foreign_foundation_gets_one_clear_line(small_mini, tmp_path, capsys):
    from mini import mini_clip, mini_sam

    cut, foreign, pickled = (
        tmp_path / "cut.safetensors",
        mini_clip.WEIGHTS,
        tmp_path / "sam_vit_b.pth",
    )
    cut.write_bytes(mini_sam.WEIGHTS.read_bytes()[:10_000])
    torch.save({"hook": print}, pickled)  # code in a weights file is not run
    for args, words in (
        (("masks", "--sam-weights", cut), "cut.safetensors: damaged"),
        (
            ("masks", "--sam-weights", foreign),
            "mini_clip.safetensors: weights of another model than Sam",
        ),
        (
            ("masks", "--sam", "vit_b", "--sam-weights", pickled),
            "sam_vit_b.pth: not a checkpoint that can be read safely",
        ),
        (("sup", "--pretrained", cut), "cut.safetensors: damaged"),
    ):
        flags = [
            str(a)
            for a in (
                "--stage",
                *args,
                "--runs",
                tmp_path / "runs",
                "--split",
                "4",
                "--device",
                "cpu",
            )
        ]
        assert dearli.main(flags) == 2, args
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1, message
