"""Flags that a stage knows and that do nothing beside the others: when, and what would count.

They are refused, so that nothing is passed over in silence. Imports no library.
"""

import argparse

from config import METHODS, Config
from engine.flags import (
    FIELDS,
    LABELED,
    MAKES,
    OF_INSTANCES,
    STORED,
    TABLES,
    WARM,
    WITH_CLIP,
    given,
    is_warm,
    names_instances,
    rows,
    steps_of,
)

# Flags by dest that a stage knows and that may do nothing: when (see `idle`), and what would count.
_IDLE = """
warm | burn_in | a run that starts from other weights (--method {warm}, or --init) has
    --burn-in-warm
cold | burn_in_warm | a run that starts from a random decoder has --burn-in
frozen | backbone_lr_multiplier | it counts with --train-backbone
no clip | alpha clip_scale | CLIP has no say here; it counts with --classifier language, or with
    --method {clip}
named | masks NETWORK sam clip_scale SIZES | true instances are named, as they are; it counts with
    --labels panoptic
unnamed | NAMER | it is about instances; it counts with --labels instances
no choice | oversample | no point is chosen by uncertainty; it counts with --importance above 0
no width | object_width | images are shown by their short side; it counts with --seen-width above 0
magnified | test_size | images are shown by the width of their objects, --object-width
    {cfg.object_width:g}; it counts with --seen-width 0
by width | test_max scaled_side | images are shown by the width of their objects; it counts with
    --seen-width 0
no blur | blur_radius | nothing is blurred; it counts with --blur-prob above 0
no instances | INSTANCES | no instance is a pseudo-label here; it counts with --method {instances}
instances | colour | --method {args.method} has no such views; it counts with --stage sup, or with
    --method {mixing}
instances | cutmix_prob | --method {args.method} mixes no images; it counts with --method {mixing}
coupled | class_threshold mask_threshold | it counts with --coupled 0
not guided | guided_steps | it counts with --method guided
not asked | clip_margin clip_model clip_pretrained | CLIP is not asked about pseudo-labels; it
    counts with --clip-view crop, masked or pool
pooled | clip_margin | there is no box; it counts with --clip-view crop or masked
poly | milestones | it counts with --schedule multistep
multistep | poly_power | it counts with --schedule poly
no jitter | jitter jitter_hue | no colour is jittered; it counts with --jitter-prob above 0
no layers | decoder_ffn | the decoder has no layers; it counts with --decoder-layers above 0
own crop | crop crop_height | the warm-up crops to --dewa-crop {cfg.dewa_crop}; name that
    one, or set it to 0
no network | NETWORK | stable regions (--sam regions) have no network; it counts with --sam mini or
    vit_h
no sam | sam NETWORK | it counts with --masks sam
no warm-up | WARM_UP make | no masks and no warm-up are made here; it counts with --method {warm}
    and without --init
deeplab | QUERIES | DeepLabv3+ has no queries; it counts with --network mask2former
deeplab | groups | it is about PQ, and there are no segments; it counts with --network mask2former
mask2former | DEEPLAB SOFT CONTRAST | it is of DeepLabv3+; it counts with --network
    deeplab (--stage sup), or with --method esl or hard
no contrast | CONTRAST | no parts are told apart; it counts with
    --contrast-weight above 0
no mining | ohem_kept | it counts with --ohem above 0
adamw | momentum | it counts with --optimizer sgd
stepped | epochs | --steps says how long the run is; expected one of them
rungs | teacher_posterior | the rungs of --stage {args.stage} set it themselves; use --stage ssl
alphas | alpha | the rungs of --stage alpha set it themselves; use --stage ssl
not mini | eval_on | only --dataset mini has images to tune on
not custom | variant | it counts with --dataset custom
mini | data_root | --dataset mini is drawn, not read; it counts with --dataset custom or another
bytes | EXPOSURE | images of --dataset mini have 8 bits, and one exposure
images | data_root variant split | the images are those of --images; it counts without
overlapping | groups MERGING | instances do not compete for
    pixels; it counts with --labels panoptic
pixels | least_quality | queries compete for pixels; it counts with --merging masks
stretched | white | each image is stretched by its own values; it counts with --no-stretch
partition | least_score | segments have no such score; it counts with --labels instances
no eval | groups watch | nothing is evaluated; it counts without --no-eval
no graph | which posterior GRAPH | it counts with --format onnx
graph | no_object_weight | there is no loss in it; it counts with --format official or safetensors
no rehearsal | report | it counts with --dry-run; a run writes its report.html by itself
no figures | report_images | pictures are of an evaluation; it counts without --no-eval
"""
IDLE = [row.split(" | ") for row in rows(_IDLE)]
GROUPS = {
    **{
        n: FIELDS[n]
        for n in (
            "EXPOSURE NETWORK NAMER SIZES MERGING GRAPH INSTANCES QUERIES SOFT CONTRAST".split()
        )
    },
    "DEEPLAB": (*FIELDS["DEEPLAB"], *FIELDS["PROJECTOR"], "ohem", "ohem_kept"),
    "WARM_UP": tuple(MAKES["ssl"]),
}


def idle(args: argparse.Namespace, cfg: Config) -> dict[str, str]:
    """Flags, by dest, that the stage knows and that do nothing with the others as they are; with
    what would make them count. With --dry-run all may be said that the run itself takes.
    """
    stage, mini = args.stage, args.dataset == "mini"
    ssl = stage == "ssl" or stage == "ladder" and args.method is not None
    begins = ssl and not args.resume  # one that goes on knows what it started from
    unmeasured = stage in LABELED and not args.evaluate
    of_instances = ssl and args.method in OF_INSTANCES
    holds = {
        **_numbers(args, cfg),
        "warm": begins and is_warm(args),
        "cold": begins and not is_warm(args),
        "no clip": not cfg.has_ensemble and stage != "zeroshot",
        "named": names_instances(args),
        "unnamed": stage == "zeroshot" and not names_instances(args),
        "no instances": stage in ("ssl", "ladder") and not of_instances,
        "instances": of_instances,
        "not guided": stage in ("ssl", "ladder") and args.method != "guided",
        "no sam": stage == "zeroshot" and str(args.masks) != "sam",
        "no warm-up": ssl and not (args.method in WARM and args.init is None),
        "no contrast": ssl and not cfg.contrast_weight,
        "stepped": steps_of(stage) in given(args),
        "rungs": stage in TABLES,
        "alphas": stage == "alpha",
        "not mini": not mini,
        "not custom": args.dataset != "custom",
        "mini": mini,
        "bytes": mini and stage not in ("predict", "export") and not args.images,
        "images": args.images is not None,
        "no eval": unmeasured,
        "no graph": stage == "export" and args.format != "onnx",
        "no rehearsal": not args.dry_run,
        "graph": stage == "export" and args.format == "onnx",
        "no figures": unmeasured and not args.resume,
    }
    named = {"warm": " or ".join(WARM), "clip": " and ".join(WITH_CLIP)}
    named["instances"] = " or ".join(OF_INSTANCES)
    named["mixing"] = ", ".join(name for name in METHODS if name not in OF_INSTANCES)
    return {
        dest: counts.format(args=args, cfg=cfg, **named)
        for condition, names, counts in IDLE
        if holds[condition]
        for name in names.split()
        for dest in GROUPS.get(name, (name,))
    }


def _numbers(args: argparse.Namespace, cfg: Config) -> dict[str, bool]:
    """What holds of the numbers, of `idle`."""
    stage = args.stage
    return {
        "frozen": not cfg.train_backbone,
        "no choice": not cfg.importance,
        "no width": not cfg.seen_width,
        # of a run it is known; before one there may be no things, and the short side counts
        "magnified": cfg.magnification > 0 and stage in STORED and stage != "export",
        "by width": cfg.seen_width > 0,
        "no blur": not cfg.blur_prob,
        "coupled": cfg.coupled > 0,
        "not asked": cfg.clip_view == "none",
        "pooled": cfg.clip_view == "pool",
        "poly": cfg.schedule == "poly",
        "multistep": cfg.schedule == "multistep",
        "no jitter": not cfg.jitter_prob,
        "no layers": not cfg.decoder_layers,
        "own crop": stage == "dewa" and cfg.dewa_crop > 0 and "dewa_crop" not in args.flags,
        "no network": cfg.sam == "regions",
        "deeplab": cfg.network == "deeplab",
        "mask2former": cfg.network != "deeplab",
        "no mining": not cfg.ohem,
        "adamw": cfg.optimizer != "sgd",
        "overlapping": cfg.labels == "instances",
        "pixels": cfg.merging == "pixels",
        "stretched": cfg.stretch,
        "partition": cfg.labels != "instances",
    }
