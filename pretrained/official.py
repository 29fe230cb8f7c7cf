"""The authors' checkpoints, without detectron2: recognised by their keys, and read safely.

An official file is {"model": {name: tensor}, ...} and holds all of CLIP, text tower included, so
neither CLIP's weights nor the network is needed to use it. Student, teacher and DeWa files differ
by the criterion's buffers alone:

    student    criterion_labeled.empty_weight, criterion_pseudolabeled.empty_weight: K + 1 values
    teacher    no criterion, hence no word about K
    dewa       criterion.empty_weight (DeWa: K = 1; a supervised run of the same code has it, too)

Source: github.com/helen1c/DEARLi, commit 1de0dc8. Axes: K classes.
"""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ground import files, tensor_files
from ground.errors import UserError

# prefix of CLIP in an official file; behind it come open_clip's own names
CLIP = "backbone.clip_model."
KINDS = ("student", "teacher", "dewa")
# official prefix, ours; # = number of a layer; the first that fits wins, in both directions
NAMES = (
    ("sem_seg_head.pixel_decoder.transformer.level_embed", "head.pixel_decoder.level_embed"),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.", "head.pixel_decoder.layers."),
    ("sem_seg_head.pixel_decoder.adapter_1.norm.", "head.pixel_decoder.lateral.1."),
    ("sem_seg_head.pixel_decoder.adapter_1.", "head.pixel_decoder.lateral.0."),
    ("sem_seg_head.pixel_decoder.layer_1.norm.", "head.pixel_decoder.output.1."),
    ("sem_seg_head.pixel_decoder.layer_1.", "head.pixel_decoder.output.0."),
    ("sem_seg_head.pixel_decoder.", "head.pixel_decoder."),
    (
        "sem_seg_head.predictor.transformer_self_attention_layers.#.self_attn.",
        "head.decoder.layers.#.self_attn.",
    ),
    (
        "sem_seg_head.predictor.transformer_self_attention_layers.#.norm.",
        "head.decoder.layers.#.self_norm.",
    ),
    (
        "sem_seg_head.predictor.transformer_cross_attention_layers.#.multihead_attn.",
        "head.decoder.layers.#.cross_attn.",
    ),
    (
        "sem_seg_head.predictor.transformer_cross_attention_layers.#.norm.",
        "head.decoder.layers.#.cross_norm.",
    ),
    ("sem_seg_head.predictor.transformer_ffn_layers.#.norm.", "head.decoder.layers.#.ffn_norm."),
    ("sem_seg_head.predictor.transformer_ffn_layers.#.", "head.decoder.layers.#."),
    ("sem_seg_head.predictor.class_embed.layers.", "head.decoder.classify.class_embed.layers."),
    ("sem_seg_head.predictor.logit_scale", "head.decoder.classify.logit_scale"),
    ("void_embedding.", "head.decoder.classify.void_embedding."),
    (
        "sem_seg_head.predictor.class_embed.",
        "head.decoder.classify.",
    ),  # the linear head of plain Mask2Former
    ("sem_seg_head.predictor.", "head.decoder."),
)


def to_ours(name: str) -> str:
    """Our name of an official parameter of the head; any other name as it is."""
    return _rename(name, 0, 1)


def to_official(name: str) -> str:
    """The inverse of `to_ours`."""
    return _rename(name, 1, 0)


def _rename(name: str, source: int, target: int) -> str:
    for pair in NAMES:
        match = re.match(re.escape(pair[source]).replace(r"\#", r"(\d+)"), name)
        if match:
            return pair[target].replace("#", "".join(match.groups())) + name[match.end() :]
    return name


@dataclass
class Weights:
    """A whole model in three parts. kind: of KINDS.

    head: parameters of `Segmenter.head`, by our names.   clip: OpenCLIP's state dict, text tower
        included.
    rest: what only the official code has (the criterion's buffers), by its names.
    """

    kind: str
    head: dict[str, Tensor]
    clip: dict[str, Tensor]
    rest: dict[str, Tensor]

    @property
    def num_classes(self) -> int | None:
        """K; None where the file does not say (teacher)."""
        return next(
            (t.numel() - 1 for name, t in self.rest.items() if name.endswith("empty_weight")), None
        )

    def summary(self) -> str:
        classes = f"{self.num_classes} classes" if self.num_classes else "any number of classes"
        return (
            f"{self.kind} file: {len(self.head)} tensors of the head, {len(self.clip)} of CLIP, "
            f"{classes}" + (f"; not used: {', '.join(self.rest)}" if self.rest else "")
        )


def recognise(content: dict) -> Weights | None:
    """The parts of an official file, from what `tensor_files.load` read; None if it is none."""
    model = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(model, dict) or not any(
        str(name).startswith("sem_seg_head.") for name in model
    ):
        return None
    try:
        model = {str(name): torch.as_tensor(value) for name, value in model.items()}
    except (TypeError, ValueError, RuntimeError):  # some value is no tensor
        return None
    head = {to_ours(n): t for n, t in model.items() if to_ours(n).startswith("head.")}
    used = (CLIP, "head.")
    rest = {n: t for n, t in model.items() if not to_ours(n).startswith(used)}
    kind = "teacher"
    if "criterion_labeled.empty_weight" in rest:
        kind = "student"
    elif "criterion.empty_weight" in rest:
        kind = "dewa"
    return Weights(kind, head, _part(model, CLIP), rest)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def official(weights: Weights) -> dict[str, Tensor]:
    """The state dict of the official code: the inverse of `recognise`."""
    return {
        **{CLIP + n: t for n, t in weights.clip.items()},
        **{to_official(n): t for n, t in weights.head.items()},
        **weights.rest,
    }


def criterion(kind: str, num_classes: int, no_object_weight: float) -> dict[str, Tensor]:
    """The criterion's buffers in a file of a kind: class weights, the last one of no-object."""
    names = {
        "student": ("criterion_labeled.empty_weight", "criterion_pseudolabeled.empty_weight"),
        "teacher": (),
        "dewa": ("criterion.empty_weight",),
    }
    weight = torch.ones(num_classes + 1)
    weight[-1] = no_object_weight
    return {name: weight.clone() for name in names[kind]}


def read(path: Path) -> Weights | None:
    """Weights from an official .pth or a .safetensors of `write`; None if it is something else.

    Raises: UserError if the file is missing or damaged. Nothing in it is executed.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return recognise(tensor_files.load(path))
    tensors, metadata = tensor_files.read_tensors(path)
    try:
        kind = json.loads(metadata.get("dearli", "{}")).get("kind")
    except (ValueError, AttributeError, RecursionError):
        kind = None
    if kind not in KINDS:
        raise UserError(
            f"{path}: not weights of a segmenter (no kind in its header); expected a file of "
            f"--stage export"
        )
    head = {n: t for n, t in tensors.items() if n.startswith("head.")}
    return Weights(kind, head, _part(tensors, "clip."), _part(tensors, "rest."))


def write(path: Path, weights: Weights, form: str) -> None:
    """Write a model: `official`, a .pth that the official code loads, or `safetensors`."""
    if form == "official":
        buffer = io.BytesIO()
        torch.save({"model": official(weights)}, buffer)
        content = buffer.getvalue()
    else:
        tensors = {
            **weights.head,
            **{f"clip.{n}": t for n, t in weights.clip.items()},
            **{f"rest.{n}": t for n, t in weights.rest.items()},
        }
        content = tensor_files.hashed_tensors(
            tensors, {"dearli": json.dumps({"kind": weights.kind})}
        )
    files.write_atomic(path, content)
