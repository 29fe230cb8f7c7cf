"""A run as an ONNX file (`--stage export --format onnx`), for programs without torch.

The graph is backbone, head and class posterior at one image size, for any number of images:

    images                uint8 (B, 3, S, S), RGB, 0 to 255; normalisation is in the graph
    class_probabilities   float32 (B, Q, K+1), of the reading; index K is no-object
    mask_logits           float32 (B, Q, S/4, S/4); a mask is where they are positive

S is --test-size, or --window of a run that sees windows. An image of another shape is scaled until
it fits and padded right and bottom with the mean colour, or cut into windows (`engine.windows`).
What remains is `inference.panoptic_inference` (docs/predict.md has it in numpy), or with --merging
masks `inference.merge_masks`. What it needs is in
the file, as JSON in the metadata `dearli`:

    layout                2, of these names and keys; 1 has no stretch, and is not stretched
    size                  S, pixels
    magnification         pixels shown for a pixel of an image; 0: whole images are shown
    mean                  R, G, B, 0 to 255: the colour of the padding
    categories            of the K classes, in their order: id, name (synonyms separated by commas),
                          isthing, color, as in COCO panoptic format
    merging, least_quality, object_mask_threshold, overlap_threshold    of panoptic inference
    white, stretch        the 16-bit grey value that becomes 255, or whether images are stretched
                          (docs/data-sets.md)
    weights, which, posterior, alpha    where it comes from; alpha: the decoder's share, Eq. (6)

Needs onnx and onnxscript. Where onnxruntime is there, too, its answer is compared with torch's
before anything is written.
"""

import importlib.util
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from clip_ensemble import STRIDE
from config import Config, alpha_at
from engine.request import Machine, Source
from engine.stored import Stored
from ground.errors import UserError
from ground.files import write_atomic
from model import Segmenter
from tools.export import free
from tools.predict import Predictor, predictor

LAYOUT = 2  # of inputs, outputs and metadata
LARGEST = 2**31  # bytes of an ONNX file: a limit of protobuf
TOLERANCE = 0.01  # mean difference of probabilities that rounding does not explain


class Graph(nn.Module):
    """What the file holds: images (B, 3, S, S), 0 to 255 -> class_probabilities (B, Q, K+1) and
    mask_logits (B, Q, S/4, S/4). alpha: the decoder's share in the posterior; 1 is the decoder
    alone."""

    def __init__(self, model: Segmenter, alpha: float):
        super().__init__()
        self.model, self.alpha = model, alpha

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.backbone(images)
        class_logits, mask_logits = self.model.predict(features)
        posterior = self.model.posterior(features, class_logits, mask_logits, self.alpha)
        return posterior, mask_logits


def export(
    stored: Stored, source: Source, cfg: Config, out: Path | None, which: str, posterior: str | None
) -> Path:
    """Write the file; `out` None: beside the run, under its name.

    which, posterior: as in `tools.predict.predictor`.
    Raises: UserError for a DeWa run, a size that does not fit, or an answer that is not torch's.
    """
    side = cfg.window or cfg.test_size
    if side % STRIDE:
        raise UserError(
            f"--test-size {cfg.test_size}: --format onnx has square images, expected a multiple of "
            f"{STRIDE}"
        )
    path = free(out or Path(stored.path).with_suffix(".onnx"))
    model = predictor(stored, source, Machine(), cfg, which, posterior, "dataset")
    alpha = 1.0 if model.reading.endswith("decoder") else alpha_at(cfg.alpha, 1.0)
    graph = Graph(model.model, alpha).eval().requires_grad_(False)
    require_room(graph)
    content = to_onnx(graph, side, about(model, alpha, side))
    said = compare(graph, content, side)
    write_atomic(path, content)
    print(f"{path}: {which}, {model.about['posterior']}, images of {side} x {side}; {said}")
    return path


def about(model: Predictor, alpha: float, side: int) -> dict:
    """The metadata of the file. side: S, pixels."""
    cfg = model.cfg
    return {
        "layout": LAYOUT,
        "size": side,
        "magnification": round(cfg.magnification, 4),
        "mean": [round(float(value), 3) for value in model.model.backbone.mean.flatten()],
        "categories": model.taxonomy.categories(),
        "object_mask_threshold": cfg.object_mask_threshold,
        "overlap_threshold": cfg.overlap_threshold,
        "merging": cfg.merging,
        "least_quality": cfg.least_quality,
        "white": model.white,
        "stretch": cfg.stretch,
        **model.about,
        "alpha": alpha,
    }


def require_room(graph: Graph) -> None:
    """Raise UserError if the weights are more than a file can hold."""
    size = sum(tensor.nbytes for tensor in graph.state_dict().values())
    if size >= LARGEST:
        raise UserError(
            f"--format onnx: the weights have {size / 2**30:.1f} GiB, and a file holds less than "
            f"{LARGEST / 2**30:.0f}; expected a smaller --backbone"
        )


@torch.no_grad()
def to_onnx(graph: Graph, size: int, metadata: dict) -> bytes:
    """The graph for any number of images of size x size pixels, as the content of a file."""
    # torch takes a dimension of 1 for one that is always 1
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    # by torch.export, which refuses a graph that holds for this number of images only; torch.onnx
    # would write it
    dimensions = ({0: torch.export.Dim("batch")},)
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)  # what it does not fold, a line each
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about itself
            traced = torch.export.export(graph, (example,), dynamic_shapes=dimensions, strict=False)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                dynamic_shapes=dimensions,  # for the name
                input_names=["images"],
                output_names=["class_probabilities", "mask_logits"],
                verbose=False,
            )
    finally:
        log.setLevel(level)
    proto = program.model_proto
    forget_sources(proto.graph)
    entry = proto.metadata_props.add()
    entry.key, entry.value = "dearli", json.dumps(metadata)
    return proto.SerializeToString()


def forget_sources(graph) -> None:
    """Of an `onnx.GraphProto`, drop what torch notes of every node, where in which file of this
    machine it comes from: nobody's business, and an eighth of a small file."""
    noted = (graph.node, graph.initializer, graph.value_info, graph.input, graph.output)
    for part in (graph, *(part for parts in noted for part in parts)):
        del part.metadata_props[:]


@torch.no_grad()
def compare(graph: Graph, content: bytes, size: int) -> str:
    """In words, how far onnxruntime's answer to a random image is from torch's; or that it is not
    installed. Raises: UserError if it is another answer.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return "not checked, onnxruntime is not installed"
    import onnxruntime

    images = np.random.default_rng(0).integers(0, 256, (1, 3, size, size), np.uint8)
    theirs = onnxruntime.InferenceSession(content).run(None, {"images": images})
    ours = [tensor.numpy() for tensor in graph(torch.from_numpy(images))]
    differences = [np.abs(a - b) for a, b in zip(ours, theirs)]
    if not differences[0].mean() <= TOLERANCE:  # NaN, too
        raise UserError(
            f"--format onnx: onnxruntime {onnxruntime.__version__} finds other class probabilities "
            f"than torch {torch.__version__}, by {differences[0].mean():.3g} in the mean; expected "
            "rounding; nothing is written, try other versions of onnxscript and onnxruntime"
        )
    probabilities, logits = (x.max() for x in differences)
    return (
        f"onnxruntime differs from torch by at most {probabilities:.1g} in probabilities and "
        f"{logits:.1g} in mask logits (a random image)"
    )
