"""The numbers that a run may change, in one place: the configuration, its presets, the methods.

Values are those of the official code (github.com/helen1c/DEARLi, commit 1de0dc8); where the paper
says otherwise, the comment names both. `mini` differs from the paper's sizes in numbers only.
"""

from dataclasses import dataclass, field, fields, replace

import pldc_numbers

# Weights taken with an OpenCLIP model unless --pretrained names others: the paper's, and two larger
TAGS = {
    "convnext_base_w_320": "laion_aesthetic_s13b_b82k_augreg",
    "convnext_large_d_320": "laion2b_s29b_b131k_ft_soup",
    "convnext_xxlarge": "laion2b_s34b_b82k_augreg_soup",
}
INSTANCE_DATASETS = ("coco-instances", "cityscapes-instances")
PAPERS_DATASETS = ("ade20k", "coco", "coco-objects", *INSTANCE_DATASETS, "voc", "cityscapes")
PAPERS_SPLITS = {  # the official partitions, smallest first
    "ade20k": ("1_128", "1_64", "1_32", "1_16", "1_8"),
    **dict.fromkeys(("coco", "coco-objects"), ("1_512", "1_256", "1_128", "1_64", "1_32")),
    "coco-instances": ("1", "2", "5", "10", "100"),  # percent; 100 with unlabeled2017
    "cityscapes-instances": ("5", "10", "20", "30"),
    "voc": tuple("92 183 366 732 1464 662 1323 2646 5291".split()),  # classic; blender
    "cityscapes": ("186", "372", "744", "1488"),
}
ALIASES = {
    **dict.fromkeys(("ade", "ade20k-panoptic", "ade20k_panoptic"), "ade20k"),
    **dict.fromkeys(("coco-panoptic", "coco_panoptic", "coco2017"), "coco"),
    **dict.fromkeys(("objects", "coco_objects"), "coco-objects"),
}


@dataclass(frozen=True)
class CostWeights:
    """Weights of the terms of Eq. (3), the same in the matching cost and in the loss."""

    label: float = 2.0
    mask: float = 5.0
    dice: float = 5.0


@dataclass(frozen=True)
class LossConfig:
    weights: CostWeights = CostWeights()
    no_object_weight: float = 0.1  # weight of class K in the cross-entropy
    num_points: int = 12544  # P = 112 * 112, for the matching and for each mask loss
    oversample: float = 3.0  # candidates drawn for each point chosen by uncertainty
    importance: float = 0.75  # share of the points chosen by uncertainty


@dataclass(frozen=True)
class Config:
    # backbone: an OpenCLIP ConvNeXt
    backbone: str = "convnext_base_w_320"  # of OpenCLIP, timm (`convnext_base.fb_in1k`), or `mini`
    pretrained: str = "laion_aesthetic_s13b_b82k_augreg"  # OpenCLIP tag or a file; empty: the
    #    backbone's own; `random` starts from noise
    train_backbone: bool = False  # train the image tower along, student's and teacher's
    backbone_lr_multiplier: float = 0.1  # of lr, when the backbone is trained
    # Mask2Former
    classifier: str = "language"  # class head: `language` (M2F-Lang) or `linear` (M2F)
    num_queries: int = 200  # object queries
    hidden: int = 256  # channels of both decoders
    heads: int = 8  # attention heads, both decoders
    encoder_layers: int = 6  # deformable attention layers of the pixel decoder
    encoder_ffn: int = 1024  # hidden units, pixel decoder
    encoder_points: int = 4  # sampling points a head and level
    decoder_layers: int = 9  # masked attention layers; with the initial queries one output more
    decoder_ffn: int = 2048  # hidden units, masked-attention decoder
    # DeepLabv3+
    network: str = "mask2former"  # what is trained: `mask2former`, or `deeplab` (ESL's DeepLabv3+,
    #    whose heads have `hidden` channels)
    output_stride: int = 8  # of its coarsest map, 8 or 16; U2PL's: ESL states none
    atrous: int = 12  # ASPP looks with dilations of 1, 2 and 3 times that (U2PL's: 12 24 36)
    aux_weight: float = 0.0  # of a second head on the third stage; 0: none (U2PL, Cityscapes: 0.4)
    ohem: float = 0.0  # labelled pixels count whose true class has less; 0: all (Cityscapes: 0.7)
    ohem_kept: int = 100_000  # but at least the hardest so many, a step and process (U2PL's)
    # ESL
    eta: float = 0.95  # a soft label has the fewest classes that reach it together; 0: the arg-max
    contrast_weight: float = 0.1  # lambda_2, of the pixel-to-part contrast; 0: no parts at all
    contrast_start: int = 0  # step of its first gradient (ESL states no warm-up)
    parts: int = 5  # K, of a class
    part_momentum: float = 0.99  # theta, of the prototypes, a step
    kmeans_pixels: int = 2048  # a class, at most, that the prototypes begin with; not stated
    queue: int = 64  # entries of a part; not stated. Few: those of a teacher that is still alike
    anchor_share: float = 0.1  # of a class's pixels in an image
    anchor_confidence: float = 0.95  # zeta: the teacher's, above which an unlabelled pixel counts
    anchors_max: int = 256  # a class and image; not stated. It bounds the memory
    negatives: int = 255  # N_s, an anchor
    contrast_temperature: float = 0.5  # sigma
    projection: int = 512  # L, channels that pixels are compared by
    projector: str = "block"  # its last layer: `block`, Conv-BN-ReLU as stated; `conv`, as U2PL's
    teacher_norm: str = "average"  # statistics of its batch norm, not stated: `average` of the
    #    student's, as of weights; `student`: a copy; `batch`: of the images at hand
    # set loss, Eq. (3)
    class_weight: float = 2.0  # in loss and matching; DeWa sets it to 0
    mask_weight: float = 5.0  # binary cross-entropy
    dice_weight: float = 5.0  # dice
    no_object_weight: float = 0.1  # of the no-object class in the cross-entropy
    num_points: int = 12544  # sampled points a mask
    oversample: float = 3.0  # candidates a point chosen by uncertainty
    importance: float = 0.75  # share of points chosen by uncertainty
    # Mean Teacher, Eq. (1) and (2)
    lambda_u: float = 1.0  # weight of the unlabelled loss, Eq. (1)
    ema_decay: float = 0.999  # teacher average, a step, Eq. (2)
    burn_in: float = 0.0  # steps without unlabelled loss, below 1 a share of them; then the
    #    teacher is a copy of the student
    burn_in_warm: float = 0.0  # the same for a run that starts from DeWa weights
    cutmix_prob: float = 0.5  # chance of a CutMix box, an unlabelled image
    cutmix_min: float = 0.02  # share of the view that the box has, uniform from here
    cutmix_max: float = 0.4  # to here (U2PL: half of the view)
    # recognition, Eq. (4)-(6)
    alpha: float | str = 0.6  # the mask transformer's share in the ensemble, 0 to 1, Eq. (6);
    #    `0.4:0.8` grows while there are pseudo-labels, `labeled` follows the labelled share of the
    #    images (`clip_ensemble.alpha_of_share`)
    teacher_posterior: str = "ensemble"  # of pseudo-labels: `decoder` (P_MT), `clip` (P_CLIP) or
    #    `ensemble` (P_ENS), Table 7; usual is that of --method
    labels: str = "panoptic"  # `semantic`: one segment a class, pseudo-labels too (Table 12);
    #    `instances`: things alone, which may overlap
    clip_scale: float = 0.0  # inverse temperature of Eq. (5); 0 = CLIP's own
    # pseudo-labels of --method pldc and guided
    class_threshold: float = 0.85  # least probability of the class (c_t)
    mask_threshold: float = 0.9  # least mask quality (m_t), Eq. (4) of PL-DC
    coupled: float = 0.0  # above 0: instead of both, least product of the two (without DDTF: 0.765)
    clip_view: str = "crop"  # what CLIP is asked about (DICC): `crop`, the box of an instance;
    #    `masked`, the same with grey around the mask; `pool`, the features under the mask (of a
    #    ConvNeXt); `none`: it is not asked
    clip_margin: float = 0.0  # around that box, a share of its sides
    clip_model: str = ""  # CLIP of DICC: an OpenCLIP model, or `mini`; empty: that of --backbone
    clip_pretrained: str = ""  # its weights: OpenCLIP tag or a file; `random`
    pixel_certainty: bool = True  # pixels count in the BCE as the teacher is sure of them (PMUA)
    ema_first: bool = True  # the teacher's average comes before the student's step (public code)
    guided_steps: float = 0.0  # --method guided: steps, or below 1 their share, after the burn-in
    #    in which a new student learns from a teacher that stays as it is
    # panoptic inference
    merging: str = "pixels"  # of queries that overlap: `pixels`, they compete for each (the paper);
    #    `masks`, the surest mask takes its pixels first: for many small objects that are alike
    least_quality: float = 0.0  # with `masks`: least mask quality of a thing
    object_mask_threshold: float = 0.0  # least score of a query
    overlap_threshold: float = 0.8  # least visible share of a query's mask
    # instance inference
    least_score: float = 0.5  # of an instance that is drawn and counted; AP and results.json take
    #    all
    # optimisation
    optimizer: str = "adamw"  # of all trained parameters: `adamw`, or `sgd` with momentum
    momentum: float = 0.9  # of sgd
    schedule: str = "poly"  # of the learning rate: `poly`, lr * (1 - t / steps) ** poly_power, or
    #    `multistep`, a tenth after each milestone
    milestones: str = "0.9231"  # of `multistep`: shares of the steps, with colons between them
    lr: float = 1e-4  # what the schedule begins with
    lr_warmup: float = 0.0  # share of the steps in which the learning rate rises in a line, times
    #    the schedule: at the full rate at once some runs lose queries that never come back
    weight_decay: float = 0.05  # not on norms and embeddings
    clip_norm: float = 0.01  # largest L2 norm of the whole gradient
    poly_power: float = 0.9  # of the schedule
    epochs: float = 0.0  # passes over the unlabelled images instead of --steps; 0: --steps counts
    ssl_steps: int = 80_000  # optimiser steps, stage ssl
    sup_steps: int = 10_000  # stage sup; ADE20K, COCO: 10 000 more a larger split (supplement D)
    dewa_steps: int = 160_000  # stage dewa; the paper says 80 000 on ADE20K
    labeled_batch: int = 8  # images a step
    unlabeled_batch: int = 8  # images a step
    dewa_batch: int = 16  # images a step
    dewa_keep_empty: bool = True  # SAM masks that the crop emptied stay targets; off where
    #    crops show a small part of the image
    # data
    crop: int = 640  # pixels, side of the square training crop
    crop_height: int = 0  # pixels, of a crop that is less high than wide; 0 = crop
    dewa_crop: int = 0  # pixels, the same in the warm-up; 0 = crop (COCO: 640, the paper says 512)
    scale_min: float = 0.5  # short side = crop * k, k from scale_min ...
    scale_max: float = 2.0  # ... to scale_max in steps of 0.1 (the paper says 0.1 to 2.0)
    seen_width: float = 0.0  # pixels: how wide an object of object_width is shown, in views (times
    #    k) and in windows; 0 = the paper's rule, whole images by their short side (crop * k,
    #    test_size)
    object_width: float = 0.0  # pixels: a small object in the images as they are, a quarter is
    #    smaller, as diameter of a disc of its area; 0 = measured on the labelled images
    window: int = 0  # pixels as shown: images larger than that are predicted in windows that
    #    overlap by half, and stitched; 0 = whole images
    turns: bool = False  # views are also turned by quarter turns: for images without an up, as
    #    from a microscope or from above
    scaled_side: str = "short"  # the side that is crop * k: `short`, or `long` (large-scale jitter)
    colour: bool = True  # labelled views also get SSD's colours (ESL: flip, scale and crop alone)
    jitter_prob: float = 1.0  # strong view: chance of the colour jitter
    jitter: float = 0.8  # strong view: brightness, contrast, saturation times 1 +- jitter
    jitter_hue: float = 0.2  # strong view: hue turns by up to +- this share of a circle
    grayscale_prob: float = 0.2  # strong view
    blur_prob: float = 0.5  # strong view
    blur_radius: float = 2.0  # strong view: largest radius of the Gaussian blur, pixels (least 0.1)
    cutout: str = "none"  # strong view: rectangles of noise; aspects as the paper of PL-DC prints
    #    them, `paper`, or as its public code has them, `code`
    white: int = 0  # 16-bit grey value that becomes 255; 0 = measured: the least of 2^k - 1 (k = 8
    #    ... 16) that no 16-bit training image exceeds, of 1 000 evenly spread
    stretch: bool = False  # each image is stretched by its own values, so that exposures are alike:
    #    their 1st and 99.8th percentile become 0 and 255, whatever their bits, instead of white
    test_size: int = 640  # pixels, short side at evaluation
    test_max: int = 2560  # pixels, long side at evaluation
    workers: int = 4  # loader processes
    eval_batch: int = 1  # images at once at evaluation
    # SAM masks
    sam: str = "vit_h"  # segment_anything model, `mini`, or `regions` (stable ones, no network)
    sam_weights: str = ""  # file; empty: the one of the preset
    points_per_side: int = 32  # prompts along each side
    pred_iou_thresh: float = 0.88  # least IoU that SAM predicts of its own mask
    stability_thresh: float = 0.95  # least stability
    mask_nms_thresh: float = 0.7  # box IoU above which the worse of two masks goes
    points_per_batch: int = 64  # prompts at once; affects speed and memory only
    # a run
    seed: int = 0  # of everything random
    checkpoint_every: int = 1000  # steps
    log_every: int = 20  # steps between lines on the screen

    @property
    def crop_size(self) -> tuple[int, int]:
        """(height, width) of a training view."""
        return self.crop_height or self.crop, self.crop

    @property
    def magnification(self) -> float:
        """Pixels shown for a pixel of an image; 0: that is the paper's rule, by short sides."""
        return self.seen_width / self.object_width if self.object_width else 0.0

    @property
    def has_ensemble(self) -> bool:
        """CLIP has a say: a linear classifier under a plain Mean Teacher never asks it."""
        return self.classifier == "language" or self.teacher_posterior != "decoder"

    def burn_in_steps(self, warm: bool) -> int:
        """Steps of stage ssl without unlabelled loss; warm: a run that starts from DeWa weights."""
        return self._in_steps(self.burn_in_warm if warm else self.burn_in)

    def settled(self) -> "Config":
        """With PHASES in steps, as a run stores them: they stay when the run is made longer."""
        return replace(self, **{name: self._in_steps(getattr(self, name)) for name in PHASES})

    def _in_steps(self, value: float) -> int:
        return round(value * self.ssl_steps if value < 1 else value)

    @property
    def loss(self) -> LossConfig:
        return LossConfig(
            CostWeights(self.class_weight, self.mask_weight, self.dice_weight),
            self.no_object_weight,
            self.num_points,
            self.oversample,
            self.importance,
        )

    @property
    def loss_dewa(self) -> LossConfig:
        """L_loc only: the class term is neither in the loss nor in the matching."""
        return replace(self, class_weight=0.0).loss


PHASES = "burn_in", "burn_in_warm", "guided_steps"  # of stage ssl: steps, or below 1 their share
OFFICIAL = Config()  # ADE20K; SAM and CLIP at full size
COCO = replace(OFFICIAL, crop=512, dewa_crop=640, test_size=512, test_max=2048)
SUP_STEPS_A_SPLIT = 10_000  # supplement D: of the smallest split; a larger one takes as many more
# SAM's thresholds (0.88, 0.95) are for a confident model; the mini SAM has a modest opinion of its
# own masks. At SAM's own NMS, these kept the best recall on the test scenes of an earlier mini SAM
# for about 13 masks an image (today's has 12): there are some 6 segments to be found.
MINI = Config(
    backbone="mini",
    pretrained="",
    num_queries=20,
    hidden=96,
    heads=4,
    encoder_layers=2,
    encoder_ffn=192,
    decoder_layers=3,
    decoder_ffn=192,
    num_points=384,
    ema_decay=0.99,
    lr=6e-4,
    clip_norm=1.0,
    ssl_steps=500,
    sup_steps=500,
    dewa_steps=500,
    burn_in=0.5,
    burn_in_warm=0.2,
    labeled_batch=4,
    unlabeled_batch=4,
    dewa_batch=8,
    crop=128,
    scale_min=0.8,
    scale_max=1.5,
    jitter=0.4,
    jitter_hue=0.05,
    grayscale_prob=0.05,
    blur_radius=1.0,
    test_size=128,
    test_max=512,
    workers=0,
    eval_batch=10,
    sam="mini",
    points_per_side=12,
    pred_iou_thresh=0.4,
    stability_thresh=0.5,
    points_per_batch=24,
    checkpoint_every=200,
)

# Any folder of one's own on a laptop: the mini backbone, trained along because it has never seen a
# photograph, a linear classifier because it has never read those class names, and windows, because
# objects may be small and images large. `--preset official` is the real thing.
CUSTOM = replace(
    MINI,
    train_backbone=True,
    backbone_lr_multiplier=1.0,
    classifier="linear",
    num_queries=40,
    num_points=2048,
    lr=1e-3,
    lr_warmup=0.125,
    seen_width=16.2,
    window=128,
    merging="masks",
    least_quality=0.9,
    scale_min=0.6,
    scale_max=1.5,
    turns=True,
    stretch=True,
    test_size=256,
    eval_batch=16,
    sam="regions",
    ssl_steps=2400,
    sup_steps=2400,
    dewa_steps=800,
    dewa_keep_empty=False,
    burn_in=0.4167,
    burn_in_warm=0.125,
    workers=1,
    checkpoint_every=600,
)

# Of `mini` in the demo, which has to be over in some ten minutes on two cores.
DEMO = {"sup_steps": 300, "ssl_steps": 300, "dewa_steps": 150}

INSTANCES = replace(OFFICIAL, **pldc_numbers.COCO)
CITYSCAPES = replace(INSTANCES, **pldc_numbers.CITYSCAPES)

PRESETS = {
    "mini": MINI,
    "custom": CUSTOM,
    "official": OFFICIAL,
    "ade20k": OFFICIAL,
    "coco": COCO,
    "coco-objects": COCO,
    "coco-instances": INSTANCES,
    "cityscapes-instances": CITYSCAPES,
    **dict.fromkeys(("voc", "cityscapes"), replace(COCO, labels="semantic")),
}


@dataclass(frozen=True)
class MethodEntry:
    """A method of stage ssl: --method NAME."""

    place: str  # "file.Class" of what `engine.method.Method` describes
    help: str  # in a line
    numbers: dict = field(default_factory=dict)  # fields of Config that it sets
    variants: dict = field(default_factory=dict)  # other values of these that are still the method
    warm: bool = False  # starts from the DeWa run of the data set, unless --init names another
    usual: dict = field(default_factory=dict)  # by preset, "" for all: fields that it sets, and
    #    that flags may change

    @property
    def has_clip(self) -> bool:
        """CLIP has a say in its pseudo-labels."""
        return self.numbers.get("teacher_posterior") != "decoder"

    def on(self, preset: str) -> dict:
        """All fields of Config that it sets on a preset."""
        return {**self.usual.get("", {}), **self.usual.get(preset, {}), **self.numbers}

    def values(self, name: str) -> tuple:
        """Of a field of Config that it sets: its own first."""
        return (self.numbers[name], *self.variants.get(name, ())) if name in self.numbers else ()


DECODER = {"teacher_posterior": "decoder"}
ENSEMBLE, CLIP = {"teacher_posterior": "ensemble"}, {"teacher_posterior": ("clip",)}
DEEPLAB_ALONE = {**DECODER, "network": "deeplab"}
MEAN_TEACHER = "mean_teacher.MeanTeacher"
SSL_HELP = "Mean Teacher, pseudo-labels from the decoder alone"
DEAR_HELP = "pseudo-labels from the ensemble with CLIP"
DEARLI_HELP = "dear, starting from the DeWa weights"
GUIDED_HELP = "instances: Guided Distillation, a new student under a teacher of labels alone"
PLDC_HELP = "instances: PL-DC, pseudo-labels filtered (DDTF), renamed (DICC), weighted (PMUA)"
OF_INSTANCES = {**DECODER, "labels": "instances", "cutmix_prob": 0.0}
HARD = {"": {"eta": 0.0, "contrast_weight": 0.0}}
ESL_HELP = "classes alone: DeepLabv3+, soft pseudo-labels, contrast of object parts"
HARD_HELP = "as esl, with hard pseudo-labels and without the contrast: its baseline"
METHODS = {
    "ssl": MethodEntry(MEAN_TEACHER, SSL_HELP, DECODER),
    "dear": MethodEntry(MEAN_TEACHER, DEAR_HELP, ENSEMBLE, CLIP),
    "dearli": MethodEntry(MEAN_TEACHER, DEARLI_HELP, ENSEMBLE, CLIP, warm=True),
    "guided": MethodEntry("pldc.Guided", GUIDED_HELP, OF_INSTANCES, usual=pldc_numbers.GUIDED),
    "pldc": MethodEntry("pldc.Pldc", PLDC_HELP, OF_INSTANCES, usual=pldc_numbers.PLDC),
    "esl": MethodEntry("esl.ESL", ESL_HELP, DEEPLAB_ALONE),
    "hard": MethodEntry("esl.ESL", HARD_HELP, DEEPLAB_ALONE, usual=HARD),
}


def alpha_at(alpha: float | str, progress: float) -> float:
    """The alpha of Eq. (6) at a time of the training: a number stays, `A:B` goes from A to B.

    progress: 0 to 1; 1 at evaluation. A growing alpha is the paper's future work (supplement C).
    Raises: ValueError if it is neither.
    """
    first, colon, last = str(alpha).partition(":")
    end = last if colon else first
    return float(first) + progress * (float(end) - float(first))


def shares_of(milestones: str) -> tuple[float, ...]:
    """The shares of the steps that `0.889:0.963` names."""
    return tuple(map(float, milestones.split(":")))


def changes(numbers: dict, preset: Config) -> dict:
    """Fields of a configuration, as a run stores it, that are not those of a preset.

    Returns: {name: value}. PHASES are compared in steps.
    """
    settled = replace(preset, ssl_steps=numbers.get("ssl_steps", preset.ssl_steps)).settled()
    usual = {**vars(preset), **{name: getattr(settled, name) for name in PHASES}}
    return {
        f.name: numbers[f.name]
        for f in fields(Config)
        if f.name in numbers and numbers[f.name] not in (usual[f.name], getattr(preset, f.name))
    }


DEEPLAB_FIELDS = set(
    "network output_stride atrous aux_weight ohem ohem_kept eta contrast_weight contrast_start "
    "parts part_momentum kmeans_pixels queue anchor_share anchor_confidence anchors_max negatives "
    "contrast_temperature projection projector teacher_norm cutmix_min cutmix_max momentum "
    "epochs".split()
)
# What versions did that did not know a field yet, and so did not store it.
BEFORE = {
    **{"white": 65535, "optimizer": "adamw", "schedule": "poly", "lr_warmup": 0.0},
    **{"seen_width": 0.0, "object_width": 0.0, "window": 0, "least_score": 0.5},
    **{"merging": "pixels", "least_quality": 0.0, "stretch": False},
    **{"milestones": "0.9231", "scaled_side": "short", "jitter_prob": 1.0, "cutout": "none"},
    **{"class_threshold": 0.85, "mask_threshold": 0.9, "coupled": 0.0, "guided_steps": 0},
    **{"clip_view": "crop", "clip_margin": 0.0, "clip_model": "", "clip_pretrained": ""},
    **{"pixel_certainty": True, "ema_first": True, "colour": True, "crop_height": 0},
    **{f.name: f.default for f in fields(Config) if f.name in DEEPLAB_FIELDS},
}


def numbers_of(stored: dict) -> dict:
    """The fields of Config in what a run has stored, as the version behaved that stored it."""
    known = {**BEFORE, **stored} if stored else {}
    return {f.name: known[f.name] for f in fields(Config) if f.name in known}


def dashed(name: str) -> str:
    """A field of Config as a flag."""
    return "--" + name.replace("_", "-")
