"""A miniature SAM: segment_anything's own model, small enough to learn its world on one core.

Stands in for SAM where the method takes its masks (DeWa, paper section 3.3): promptable,
class-agnostic, with several honest answers to one point. The prompt encoder, the two-way
transformer, the mask decoder and `Sam` are segment_anything's, unmodified; only the image encoder
is ours, a small convolutional network, because a ViT needs far more images than this. It learns
from collection `sam` alone, which no other stage sees.

    masks = MaskGenerator(mini_sam.load(), config.MINI).generate(image)      # (128, 128, 3) uint8

Differs from SAM (arXiv:2304.02643): point prompts only; the slots of the multi-mask output have
fixed roles (part, whole, the better of both) instead of competing for one mask; plain BCE for focal
loss; and a first phase trains the encoder alone.

Axes: B images, P points an image, G side of the embedding grid, H = 4 G side of the mask logits, S
= SIDE pixels.
"""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from tqdm import tqdm

from config import MINI
from ground.tensor_files import load_foundation
from mini import microcosm
from mini.mini_clip import save
from pretrained import sam_fast
from pretrained.sam import MaskGenerator

WEIGHTS = Path(__file__).parent / "weights" / "mini_sam.safetensors"
# pixels, side of the images the encoder takes (a larger image is resized by segment_anything)
SIDE = 128
GRID = 32  # G, cells, side of the embedding: stride 4
WIDTH = 64  # channels of embedding and decoder (SAM: 256)
SLOTS = 3  # masks for an ambiguous point: part, whole, the better of both
COMMAND = "python dearli.py --stage mini-sam"
SCENES = 4000  # training images, drawn once and kept
# Phases of training. prompts: the decoder learns, too; the weight of the loss that needs none
# (`Affinity`) then falls linearly to 0.
PHASES = (
    dict(name="encoder", steps=4000, images=8, points=24, lr=2e-3, prompts=False),
    dict(name="all", steps=3000, images=4, points=9, lr=1.5e-3, prompts=True),
)


def convolution(width: int, out: int, stride: int = 1) -> nn.Sequential:
    """(B, width, h, w) -> (B, out, h / stride, w / stride), at least 0."""
    return nn.Sequential(
        nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = convolution(width, width), convolution(width, width)[:2]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class ConvEncoder(nn.Module):
    """Images (B, 3, S, S), normalised -> embedding (B, WIDTH, G, G): a small U-Net.

    Outlines are read at stride 4, and who belongs to whom at strides 8 and 16.
    """

    img_size = SIDE  # `Sam` and `SamPredictor` read it

    def __init__(self, widths: tuple[int, int, int] = (48, 96, 144)):
        super().__init__()
        fine, middle, coarse = widths
        self.down = nn.ModuleList(  # to strides 4, 8, 16
            [
                nn.Sequential(
                    convolution(3, fine // 2, 2), convolution(fine // 2, fine, 2), Block(fine)
                ),
                nn.Sequential(convolution(fine, middle, 2), Block(middle)),
                nn.Sequential(convolution(middle, coarse, 2), Block(coarse), Block(coarse)),
            ]
        )
        self.narrow = nn.ModuleList([nn.Conv2d(coarse, middle, 1), nn.Conv2d(middle, fine, 1)])
        self.up = nn.ModuleList([Block(middle), Block(fine)])  # at strides 8, 4
        self.neck = nn.Sequential(
            nn.Conv2d(fine, WIDTH, 3, padding=1, bias=False),
            LayerNorm2d(WIDTH),  # as SAM's
        )

    def forward(self, image: Tensor) -> Tensor:
        x, seen = image.contiguous(memory_format=torch.channels_last), []
        for level in self.down:
            x = level(x)
            seen.append(x)
        for narrow, block, finer in zip(self.narrow, self.up, seen[-2::-1]):
            x = block(finer + F.interpolate(narrow(x), scale_factor=2.0))
        return self.neck(x)


def build() -> Sam:
    """An untrained mini SAM."""
    sam = Sam(
        image_encoder=ConvEncoder(),
        prompt_encoder=PromptEncoder(WIDTH, (GRID, GRID), (SIDE, SIDE), mask_in_chans=4),
        mask_decoder=MaskDecoder(
            transformer_dim=WIDTH,
            num_multimask_outputs=SLOTS,
            iou_head_depth=3,
            iou_head_hidden_dim=WIDTH,
            transformer=TwoWayTransformer(
                depth=1,
                embedding_dim=WIDTH,
                mlp_dim=2 * WIDTH,
                num_heads=2,
                attention_downsample_rate=1,
            ),
        ),
        pixel_mean=[115.0, 115.0, 115.0],
        pixel_std=[65.0, 65.0, 65.0],
    )
    # A point must find its own cell before it can learn anything. Queries that start equal to the
    # keys, in both directions, and contents that start quieter than positions make its attention
    # peak where it is, from the first step on.
    transformer = sam.mask_decoder.transformer
    crossings = [
        *(layer.cross_attn_token_to_image for layer in transformer.layers),
        transformer.final_attn_token_to_image,
        *(layer.cross_attn_image_to_token for layer in transformer.layers),
    ]
    for attention in crossings:
        nn.init.orthogonal_(attention.k_proj.weight, gain=4.0)
        attention.q_proj.load_state_dict(attention.k_proj.state_dict())
    for norm in (sam.image_encoder.neck[-1], *(layer.norm1 for layer in transformer.layers)):
        nn.init.constant_(norm.weight, 0.3)
    for embedding in sam.prompt_encoder.point_embeddings:
        nn.init.normal_(embedding.weight, 0.0, 0.2)
    return sam.to(memory_format=torch.channels_last)


def load(path: Path = WEIGHTS) -> Sam:
    """The trained mini SAM: eval mode, fp32.

    Raises: UserError if the file is missing, damaged or of another model.
    """
    return load_foundation(build(), path, f"make the mini SAM with `{COMMAND}`")


# ---- training


def train(
    out: Path = WEIGHTS,
    seed: int = 0,
    phases: tuple[dict, ...] = PHASES,
    scenes: int = SCENES,
    warmup: int = 60,
    test_images: int = 50,
) -> dict:
    """Train a mini SAM and save it in fp16, with its measured quality, which is returned.

    phases: each is one AdamW run, `warmup` steps up to its lr, then a cosine down to 0.
    """
    torch.manual_seed(seed)
    numbers = tqdm(range(scenes), desc="mini SAM scenes", mininterval=5)
    pool = [microcosm.scene("sam", i) for i in numbers]
    sam, started = build().train(), time.time()
    for phase in phases:
        rng = np.random.default_rng((seed, *phase["name"].encode()))
        train_phase(sam, Affinity(), pool, rng, warmup, SimpleNamespace(**phase))
    quality = {
        "command": COMMAND,
        "steps": {phase["name"]: phase["steps"] for phase in phases},
        "seed": seed,
        "scenes": scenes,
        "train_seconds": round(time.time() - started),
        **evaluate(sam.eval(), images=test_images),
    }
    save(sam, out, {"format": "pt", "mini_sam": json.dumps(quality)})
    return quality


def train_phase(
    sam: Sam,
    affinity: "Affinity",
    pool: list[microcosm.Scene],
    rng: np.random.Generator,
    warmup: int,
    phase: SimpleNamespace,
) -> None:
    """Train in place: `phase.steps` steps of B = images scenes with P = points prompts each."""
    steps, images = phase.steps, phase.images
    parameters = [*sam.parameters(), *affinity.parameters()]
    optimizer = torch.optim.AdamW(parameters, phase.lr, betas=(0.9, 0.98), weight_decay=0.01)
    bar, shown = tqdm(range(steps), desc=f"mini SAM, {phase.name}", mininterval=5), None
    for step in bar:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = phase.lr * min((step + 1) / warmup, cosine)
        picked = [turned(pool[i], rng) for i in rng.integers(0, len(pool), images)]
        asked = [sample_points(s, phase.points, rng) for s in picked]
        image = torch.stack([torch.from_numpy(s.image) for s in picked])  # (B, S, S, 3) uint8
        embedding = sam.image_encoder(sam.preprocess(image.permute(0, 3, 1, 2)))
        share = 1 - step / steps if phase.prompts else 1.0
        loss = share * affinity(embedding, sam.prompt_encoder.get_dense_pe(), asked)
        if phase.prompts:
            answers = sum(prompt_loss(sam, e, *prompt) for e, prompt in zip(embedding, asked))
            loss = loss + answers / images
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"mini SAM, phase {phase.name}, step {step}: loss is {loss.item()}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shown = loss.item() if shown is None else 0.98 * shown + 0.02 * loss.item()
        bar.set_postfix(loss=f"{shown:.3f}", refresh=False)


def turned(s: microcosm.Scene, rng: np.random.Generator) -> microcosm.Scene:
    """One of the eight ways to turn and mirror a scene."""
    turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
    image, segment_map, part_map = (
        np.ascontiguousarray(np.rot90(a[:, ::-1] if mirror else a, turns))
        for a in (s.image, s.segment_map, s.part_map)
    )
    return microcosm.Scene(image, segment_map, s.labels, part_map)


def sample_points(
    s: microcosm.Scene, points: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Points of one scene and the two answers to each.

    A third of the points is uniform (as the generator's grid is), a third lands in random wholes, a
    third in random parts.
    Returns: xy (P, 2) float32 pixels; masks (P, 2, S, S) bool: the smallest region at the point
    (its part if it lies in one, else its whole), and the whole.
    """
    size = s.segment_map.shape[0]
    third = points // 3
    flat = list(rng.integers(0, size * size, points - 2 * third))
    for region_map in (s.segment_map, s.part_map):
        ids = np.unique(region_map[region_map > 0])
        for _ in range(third):
            if len(ids):
                flat.append(rng.choice(np.flatnonzero(region_map.ravel() == rng.choice(ids))))
            else:
                flat.append(rng.integers(0, size * size))
    flat = np.array(flat)
    whole_id, part_id = s.segment_map.ravel()[flat], s.part_map.ravel()[flat]
    whole = s.segment_map[None] == whole_id[:, None, None]  # (P, S, S)
    part = whole & (s.part_map[None] == part_id[:, None, None])
    smallest = np.where((part_id > 0)[:, None, None], part, whole)
    xy = np.stack([flat % size, flat // size], 1).astype(np.float32)
    return torch.from_numpy(xy), torch.from_numpy(np.stack([smallest, whole], 1))


class Affinity(nn.Module):
    """Make the cells of one region alike, and those of others not: all of the first phase.

    Without it the decoder has nothing to select by, and several hundred steps pass before it takes
    off. Thrown away afterwards.
    """

    def __init__(self, dim: int = 32):
        super().__init__()
        self.project, self.dim = nn.Conv2d(WIDTH, 2 * dim, 1), dim
        self.bias = nn.Parameter(torch.tensor([2.0, 2.0]))

    def forward(
        self, embedding: Tensor, pe: Tensor, prompts: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """embedding (B, WIDTH, G, G), pe (1, WIDTH, G, G), prompts of `sample_points` -> scalar."""
        stride = SIDE // GRID
        codes = self.project(embedding + pe).flatten(2).unflatten(1, (2, self.dim))  # (B, 2, D, S)
        loss = 0.0
        for code, (xy, masks) in zip(codes, prompts):
            x, y = (xy / stride).long().unbind(1)
            asked = code[:, :, y * GRID + x].transpose(1, 2)  # (2, P, D)
            squares = asked.square().sum(2)[:, :, None] + code.square().sum(1)[:, None]
            distance = (squares - 2 * asked @ code) / self.dim  # (2, P, S)
            logits = self.bias[:, None, None] - 4 * distance
            target = F.avg_pool2d(masks.float(), stride).transpose(0, 1)  # (2, P, G, G)
            loss = loss + mask_loss(logits.unflatten(2, (GRID, GRID)), target).mean()
        return loss / len(prompts)


def prompt_loss(sam: Sam, embedding: Tensor, xy: Tensor, masks: Tensor) -> Tensor:
    """Loss of the answers to the points of one image: 2 BCE + dice + squared error of the IoU.

    embedding: (WIDTH, G, G).   xy: (P, 2) pixels.   masks: (P, 2, S, S) bool, part and whole.
    """
    logits, iou_head = decode(sam, embedding, xy)  # (P, 3, H, H), (P, 3)
    target = F.interpolate(masks.float(), logits.shape[-2:], mode="area")
    part, whole, free = logits.unbind(1)
    answers = torch.stack([part, whole, free, free], 1)
    pairs = mask_loss(answers, target.repeat(1, 2, 1, 1))  # (P, 4)
    loss = pairs[:, :2].sum(1) + pairs[:, 2:].min(1).values  # (P,)
    with torch.no_grad():
        iou = mask_iou(logits[:, [0, 1, 2, 2]] > 0, (target > 0.5).repeat(1, 2, 1, 1))
        iou = torch.stack([iou[:, 0], iou[:, 1], iou[:, 2:].max(1).values], 1)  # (P, 3)
    return loss.mean() / SLOTS + F.mse_loss(iou_head, iou)


def decode(sam: Sam, embedding: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Answers to points (P, 2) in an embedding (WIDTH, G, G): (P, 3, H, H) logits, (P, 3) IoUs."""
    tokens, cells, iou = sam_fast.asked(sam, embedding[None], xy)
    return sam_fast.draw(sam.mask_decoder, tokens, cells), iou


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """2 BCE + dice of (..., H, W) logits against targets in [0, 1] -> (...)."""
    probability = logits.sigmoid()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((-2, -1))
    overlap = (probability * target).sum((-2, -1))
    areas = probability.sum((-2, -1)) + target.sum((-2, -1))
    return 2 * bce + 1 - (2 * overlap + 1) / (areas + 1)


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boolean masks (..., H, W), pairwise in place -> (...)."""
    return (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clamp(min=1)


# ---- quality


def evaluate(sam: Sam, collection: str = "sam-test", images: int = 50, **settings) -> dict:
    """Quality of the masks of the preset `mini`, with other settings on top, on so many scenes.

    Recall is the share of true regions that some mask matches; a mask matches a region from IoU
    0.5.
    """
    generate = MaskGenerator(sam, replace(MINI, **settings)).generate
    whole_iou, part_iou = [], []  # of the true regions, the best mask's
    counts, fits_whole, fits_part, seconds = [], [], [], 0.0
    for i in range(images):
        s = microcosm.scene(collection, i)
        started = time.perf_counter()
        masks = [record["segmentation"] for record in generate(s.image)]
        seconds += time.perf_counter() - started
        wholes = iou_matrix(masks, _regions(s.segment_map))  # (M, N)
        parts = iou_matrix(masks, _regions(s.part_map))
        whole_iou.extend(wholes.max(0, initial=0))
        part_iou.extend(parts.max(0, initial=0))
        best_whole, best_part = wholes.max(1, initial=0), parts.max(1, initial=0)  # (M,)
        fits_whole.extend((best_whole >= 0.5) & (best_whole >= best_part))
        fits_part.extend((best_part >= 0.5) & (best_part > best_whole))
        counts.append(len(masks))
    whole_iou, part_iou = np.array(whole_iou), np.array(part_iou)
    figures = {
        "recall50": (whole_iou >= 0.5).mean(),
        "recall75": (whole_iou >= 0.75).mean(),
        "mean_best_iou": whole_iou.mean(),
        "part_recall50": (part_iou >= 0.5).sum() / max(len(part_iou), 1),
        "masks_mean": np.mean(counts),
        "masks_max": max(counts),
        "share_whole": sum(fits_whole) / max(sum(counts), 1),
        "share_part": sum(fits_part) / max(sum(counts), 1),
        "seconds_per_image": seconds / images,
    }
    return {
        "collection": collection,
        "images": images,
        **{name: round(float(value), 3) for name, value in figures.items()},
    }


def iou_matrix(masks: list[np.ndarray], regions: list[np.ndarray]) -> np.ndarray:
    """IoU of M masks and N regions, boolean (S, S) each -> (M, N)."""
    if not masks or not regions:
        return np.zeros((len(masks), len(regions)))
    a, b = (np.stack(side).reshape(len(side), -1).astype(np.float32) for side in (masks, regions))
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1)[None] - both)


def _regions(region_map: np.ndarray) -> list[np.ndarray]:
    return [region_map == k for k in np.unique(region_map) if k > 0]
