"""What makes a stored run another run than the one that is asked for."""

import dataclasses

from config import BEFORE, Config
from engine.flags import READS
from ground.identity import differences

# What may change on --resume: how far to go, how fast, and how masks are made, which is another
# stage's business.
MAY_CHANGE = set(
    "epochs ssl_steps sup_steps dewa_steps workers checkpoint_every log_every eval_batch sam "
    "sam_weights points_per_side points_per_batch pred_iou_thresh stability_thresh "
    "mask_nms_thresh".split()
)

# What runs did not always store of their identity.
LATER = {"taxonomy", "data", "truth", "labeled", "init", "masks", "data_root", "variant"}


def differing(stored: dict, config: dict) -> list[str]:
    """Keys that make a stored run another run than the one asked for; numbers that its stage does
    not read make none.
    """
    # a run of stage ssl is named after its method; runs did not always store everything
    read = READS.get(config["stage"], READS["ssl"])
    idle = (
        MAY_CHANGE | (LATER - stored.keys()) | ({f.name for f in dataclasses.fields(Config)} - read)
    )
    stored = {**BEFORE, **stored}
    if stored["merging"] == config.get("merging") == "pixels":
        idle |= {"least_quality"}  # it is not read; runs of before have another one than presets
    if stored.get("data") is not None and stored["data"] == config.get("data"):
        idle |= {"dataset", "data_root"}  # the same images under another path are the same
    return [
        key
        for key in config
        if key not in idle and _essence(key, stored.get(key)) != _essence(key, config[key])
    ]


def _essence(key: str, value):
    """What of a value makes a run that run: not the path of a thing, nor the colours of classes."""
    parts = {
        "init": ("sha256",),
        "masks": ("generator", "digest"),
        "taxonomy": ("names", "things"),
    }.get(key)
    return {part: value.get(part) for part in parts} if parts and isinstance(value, dict) else value


def difference(key: str, there, now) -> str:
    """A line's part about a key of `differing`."""
    if key == "masks" and isinstance(there, dict) and isinstance(now, dict):
        differs = differences(there.get("generator") or {}, now["generator"] or {})
        return f"masks: {differs or 'others'} (it began with those of {there.get('folder')})"
    what = {
        "data": "data: other training images",
        "labeled": "labeled: other contents of labelled images or of their ground truth",
        "truth": "truth: other ground truth, or other labelled or unlabelled images",
    }.get(key)
    return f"{what} than it began with" if what else f"{key}: {there!s:.60} there, {now!s:.60} now"
