"""ESL's numbers by data set: presets of `--network deeplab`, under the names of `config.PRESETS`.

Values are the paper's where it states them, then U2PL's, whose protocol it shares (backbone at a
tenth of `lr`, the heads' rate); COCO's are UniMatch's, since the supplement has none.
Differs from the paper: nothing that it states.
Sources: ESL (ICCV 2023), U2PL (arXiv:2203.03884), UniMatch (arXiv:2208.09910).
"""

from dataclasses import replace

from config import CUSTOM, MINI, OFFICIAL, Config

# What DeepLabv3+ is in any case
_DEEPLAB = {
    "network": "deeplab",
    "labels": "semantic",
    "classifier": "linear",
    "teacher_posterior": "decoder",
    "train_backbone": True,
    "optimizer": "sgd",
    "clip_norm": float("inf"),
    "lambda_u": 0.2,  # lambda_1
    "ema_decay": 0.99,  # U2PL's; ESL states none
    "cutmix_min": 0.5,  # U2PL's
    "cutmix_max": 0.5,
    # Weak views alone, and CutMix
    **dict.fromkeys(("jitter", "jitter_hue", "grayscale_prob", "blur_prob"), 0.0),
    "colour": False,
}
# Images are shown as they are, and in training 0.5 to 2 times as large: pixels shown a pixel are
# seen_width / object_width.
_AS_THEY_ARE = {"seen_width": 1.0, "object_width": 1.0}
VOC = replace(
    OFFICIAL,
    **_DEEPLAB,
    **_AS_THEY_ARE,
    backbone="resnet101.tv_in1k",
    pretrained="",
    crop=513,  # no image has more than 500 pixels a side: the centre crop of 513 is the whole
    lr=1e-2,  # the backbone's is 1e-3
    backbone_lr_multiplier=0.1,
    weight_decay=1e-4,
    epochs=80,
    burn_in=0,
)
CITYSCAPES = replace(
    VOC,
    crop=769,
    window=769,
    lr=1e-1,  # heads at 10 times the backbone's, as stated; U2PL: 1e-2 for both
    weight_decay=5e-4,
    epochs=200,
    aux_weight=0.4,
    ohem=0.7,
)
COCO = replace(
    VOC,
    backbone="xception65.tf_in1k",
    output_stride=16,
    atrous=6,
    lr=4e-2,
    epochs=30,
)
# The miniature: the mini CLIP's backbone, whose last stages are dilated to stride 8, trained along.
_SMALL = {
    "hidden": 64,
    "atrous": 3,
    "projection": 64,
    "kmeans_pixels": 512,
    "queue": 32,
    "anchors_max": 64,
    "lr": 5e-2,
    "backbone_lr_multiplier": 0.1,
    "weight_decay": 1e-4,
    "burn_in": 0.3,
    "burn_in_warm": 0.1,
    "ema_decay": 0.97,  # of so few steps; at 0.99 the teacher stays behind
    "lambda_u": 1.0,
}
SMALL = replace(
    MINI,
    **{**_DEEPLAB, **_SMALL},
    crop=96,
    scale_min=1.0,
    scale_max=1.9,
    ssl_steps=400,
    sup_steps=400,
)
OWN = replace(CUSTOM, **{**_DEEPLAB, **_SMALL}, seen_width=0.0, window=0)
PRESETS: dict[str, Config] = {
    "mini": SMALL,
    "custom": OWN,
    **dict.fromkeys(("official", "ade20k", "voc"), VOC),
    "cityscapes": CITYSCAPES,
    **dict.fromkeys(("coco", "coco-objects"), COCO),
}
