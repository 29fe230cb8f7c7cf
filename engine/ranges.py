"""What values the numbers of a configuration may have, and the words for it."""

from config import Config, alpha_at, dashed, shares_of
from ground.errors import UserError, choose

INF = float("inf")
# Least and largest value. A hue beyond half a circle comes round; seeds are multiplied by steps and
# slots, and torch takes 64 bits; larger scales of CLIP overflow the softmax.
BOUNDS = {
    (1, INF): "num_queries hidden heads encoder_layers encoder_ffn encoder_points decoder_ffn crop "
    "atrous parts kmeans_pixels queue anchors_max negatives projection ohem_kept "
    "num_points oversample ssl_steps sup_steps dewa_steps labeled_batch unlabeled_batch dewa_batch "
    "test_size test_max eval_batch points_per_side points_per_batch checkpoint_every log_every",
    (0, INF): "seen_width object_width window backbone_lr_multiplier decoder_layers class_weight "
    "mask_weight dice_weight no_object_weight lambda_u burn_in burn_in_warm lr weight_decay "
    "epochs aux_weight contrast_weight contrast_start poly_power dewa_crop crop_height white "
    "workers clip_margin guided_steps",
    (0.1, INF): "blur_radius",
    (0, 1): "cutmix_min cutmix_max eta part_momentum anchor_share momentum lr_warmup "
    "anchor_confidence ohem importance ema_decay cutmix_prob grayscale_prob blur_prob jitter "
    "jitter_prob class_threshold mask_threshold coupled object_mask_threshold overlap_threshold "
    "least_score least_quality pred_iou_thresh stability_thresh mask_nms_thresh",
    (0, 0.5): "jitter_hue",
    (0, 2**32 - 1): "seed",
    (0, 10_000): "clip_scale",
    (0.1, 20): "scale_min scale_max",
}
CHOICES = {
    "classifier": ("language", "linear"),
    "teacher_posterior": ("decoder", "clip", "ensemble"),
    "labels": ("panoptic", "semantic", "instances"),
    "merging": ("pixels", "masks"),
    "network": ("mask2former", "deeplab"),
    "output_stride": (8, 16),
    "projector": ("block", "conv"),
    "teacher_norm": ("average", "student", "batch"),
    "optimizer": ("adamw", "sgd"),
    "schedule": ("poly", "multistep"),
    "scaled_side": ("short", "long"),
    "cutout": ("none", "paper", "code"),
    "clip_view": ("crop", "masked", "pool", "none"),
}
# What else holds of a value x in a configuration c, and the words for it.
RULES = {
    "alpha": (
        lambda x, c: _is_alpha(x),
        "a number from 0 to 1, two of them with a colon (0.4:0.8: from the first to the last "
        "step), or `labeled`",
    ),
    "milestones": (
        lambda x, c: (
            all(map(_is_share, x.split(":"))) and list(shares_of(x)) == sorted(shares_of(x))
        ),
        "rising shares of the steps, with colons between them, such as 0.889:0.963",
    ),
    "scale_min": (lambda x, c: x <= c.scale_max, "no more than --scale-max {0.scale_max}"),
    "scale_min scale_max": (lambda x, c: abs(10 * x - round(10 * x)) < 1e-6, "a multiple of 0.1"),
    "burn_in burn_in_warm guided_steps": (
        lambda x, c: x <= 1 or x % 1 == 0,
        "a share of the steps, below 1, or a whole number of steps",
    ),
    "crop crop_height dewa_crop window": (
        lambda x, c: x % 32 == 0 or c.network == "deeplab" and c.backbone != "mini",
        "a multiple of 32, the coarsest stride",
    ),
    "crop_height": (
        lambda x, c: x == 0 or x <= c.crop and not c.turns,
        "0 (square) where views are turned (--turns), elsewhere no more than --crop {0.crop}",
    ),
    "labels": (
        lambda x, c: x == "semantic" or c.network != "deeplab",
        "semantic: --network deeplab knows classes, and no things",
    ),
    "train_backbone": (
        lambda x, c: x or c.network != "deeplab",
        "it trained: --network deeplab has batch norm in it, or dilated anew",
    ),
    "contrast_temperature": (lambda x, c: x > 0, "a number above 0"),
    "cutmix_min": (lambda x, c: 0 < x <= c.cutmix_max, "above 0, to --cutmix-max {0.cutmix_max}"),
    "white": (
        lambda x, c: x == 0 or 255 <= x <= 65535,
        "0 (measured), or a grey value of 16 bits, 255 to 65535",
    ),
    "hidden": (
        lambda x, c: x % 32 == 0 and x % c.heads == 0,
        "a multiple of 32 (groups of the normalisation) and of --heads {0.heads}",
    ),
    "clip_norm": (lambda x, c: x > 0, "a number above 0"),
    "test_size": (lambda x, c: x <= c.test_max, "no more than --test-max {0.test_max}"),
    "importance": (
        lambda x, c: x == 0 or int(x * c.num_points) >= 1,
        "0, or enough for one of --num-points {0.num_points}",
    ),
}


def require_ranges(cfg: Config) -> None:
    """Raise UserError for a value that no run can use, before a stage finds out in its own way."""
    for name, values in CHOICES.items():
        choose(name.replace("_", " "), getattr(cfg, name), values)
    rules = [(names, _within(*bounds), _bounds(*bounds)) for bounds, names in BOUNDS.items()]
    for names, holds, expected in rules + [(names, *rule) for names, rule in RULES.items()]:
        for name in names.split():
            if not holds(getattr(cfg, name), cfg):
                raise UserError(
                    f"{dashed(name)} {getattr(cfg, name)}: expected {expected.format(cfg)}"
                )


def _within(least: float, most: float):
    return lambda x, c: least <= x <= most and x != INF  # no NaN, either


def _bounds(least: float, most: float) -> str:
    if most == INF:
        return f"a number of at least {least}"
    return "a share, 0 to 1" if (least, most) == (0, 1) else f"a number from {least} to {most}"


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def _is_alpha(value: float | str) -> bool:
    try:
        return value == "labeled" or all(0 <= alpha_at(value, end) <= 1 for end in (0.0, 1.0))
    except ValueError:
        return False
