"""The miniature OpenCLIP: a real `open_clip.CLIP` with a small ConvNeXt, trained on captions.

It stands in for the LAION-trained ConvNeXt-B of the paper: frozen backbone of the decoder, and
zero-shot classifier of mask-pooled features. It learns from pairs of a picture and a caption only,
never from masks. Module names are those of the big models, so the
same code runs both. Differs from them: size, a word-level tokenizer, and strides 4 8 8 8 (the big
ones: 4 8 16 32).

A mask-pooled feature is only as good as it is local, and the caption never says where things are.
Hence a map that stays at stride 8, and kernels that shrink to 1 x 1 with depth: a feature sees
about one thing (radius 11 to 24 pixels), not its neighbours.

Remake the weights: `python dearli.py --stage mini-clip`. Axes: B pairs, L words, D joint space, N
segments, K classes.
"""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import register_model
from torch import Tensor, nn
from tqdm import tqdm

from clip_ensemble import (
    MAX_SCALE,
    PIXEL_MEAN,
    PIXEL_STD,
    TEMPLATES,
    ClipBackbone,
    Vocabulary,
    text_embeddings,
    zero_shot_logits,
)
from ground.tensor_files import load_foundation
from mini import microcosm

WEIGHTS = Path(__file__).parent / "weights" / "mini_clip.safetensors"
EMBED_DIM = 128  # D
CONTEXT = 24  # L, with start and end; longer texts are cut
SIDE = 64  # pixels of a training picture: a detail of the world, at its scale
COMMAND = "python dearli.py --stage mini-clip"
PAD, START, UNKNOWN = 0, 1, 2


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


_TEXTS = " ".join((*microcosm.CLASSES, *TEMPLATES, "and"))
WORDS = {word: i for i, word in enumerate(sorted(set(_words(_TEXTS))), 3)}
END = len(WORDS) + 3  # the largest id: open_clip reads the text tower's output at the argmax


@register_model
def convnext_mini(pretrained: bool = False, **kwargs) -> nn.Module:
    """timm ConvNeXt with 1.0 M parameters; strides 4 8 8 8.

    timm's own start (std 0.02) leaves so small a trunk asleep.
    """
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    trunk = timm.models.ConvNeXt(
        stem_type="overlap_act",
        dims=(32, 64, 128, 256),
        depths=(2, 2, 2, 1),
        kernel_sizes=(5, 3, 1, 1),
        ls_init_value=0.5,
        output_stride=8,
        **kwargs,
    )
    for module in trunk.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    trunk.default_cfg = {}  # open_clip looks here for a pool size
    return trunk


def build() -> open_clip.CLIP:
    """A fresh model: images (B, 3, H, W), normalised, or tokens (B, L) -> (B, D)."""
    vision = dict(
        timm_model_name="convnext_mini",
        timm_model_pretrained=False,
        timm_pool="",
        timm_proj="linear",
        timm_drop=0.0,
        image_size=SIDE,
    )
    text = dict(context_length=CONTEXT, vocab_size=END + 1, width=128, heads=4, layers=2)
    return open_clip.CLIP(EMBED_DIM, vision, text)


def load(path: str | os.PathLike = WEIGHTS) -> open_clip.CLIP:
    """The trained model in fp32, in eval mode, frozen.

    Raises: UserError if the file is missing, damaged or of another model.
    """
    hint = f"make the mini CLIP with `{COMMAND}`"
    return load_foundation(build(), path, hint).requires_grad_(False)


def tokenize(texts: str | list[str]) -> Tensor:
    """Words to ids: (B, L) int64. Case and punctuation do not count; unknown words are UNKNOWN."""
    texts = [texts] if isinstance(texts, str) else texts
    tokens = torch.full((len(texts), CONTEXT), PAD)
    for row, text in zip(tokens, texts):
        ids = [WORDS.get(word, UNKNOWN) for word in _words(text)][: CONTEXT - 2]
        row[: len(ids) + 2] = torch.tensor([START, *ids, END])
    return tokens


def train(
    out: str | os.PathLike = WEIGHTS,
    steps: int = 1300,
    batch: int = 64,
    pictures: int = 14_000,
    lr: float = 1.5e-3,
    seed: int = 0,
) -> dict:
    """Contrastive training (`open_clip.ClipLoss`); writes weights and quality, and returns that.

    Args: batch: pairs a step.   pictures: drawn beforehand; each keeps its pixels, its caption is
        said anew every time.
    """
    rng, started = np.random.default_rng(seed), time.time()
    images, labels = np.empty((pictures, SIDE, SIDE, 3), np.uint8), []
    for i in tqdm(range(pictures), desc="mini CLIP, pictures", unit="image", dynamic_ncols=True):
        s = microcosm.scene("clip", i, SIDE, things=(1, 3), stuff=(1, 2), tail=False)
        images[i] = s.image
        labels.append(s.labels)
    torch.manual_seed(seed)
    model, contrast = build(), open_clip.ClipLoss()
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == many], "weight_decay": decay}
        for many, decay in ((True, 0.05), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, max(steps, 2), pct_start=0.08, cycle_momentum=False
    )
    bar = tqdm(range(steps), desc="mini CLIP", unit="step", dynamic_ncols=True)
    for step in bar:
        picked, captions = distinct_pairs(labels, batch, rng)
        x = normalize(images[picked])
        x = x.flip(-1) if step % 2 else x
        image = model.encode_image(x, normalize=True)
        text = model.encode_text(tokenize(captions), normalize=True)
        loss = contrast(image, text, model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(MAX_SCALE))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    quality = {
        "command": COMMAND,
        "steps": steps,
        "seed": seed,
        "train_seconds": round(time.time() - started),
        **evaluate(model.eval().requires_grad_(False)),
    }
    save(model, out, {"quality": json.dumps(quality)})
    return quality


def save(model: nn.Module, out: str | os.PathLike, metadata: dict[str, str]) -> None:
    """fp16 weights with metadata in the safetensors header; whole or not at all."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, f"{out}.tmp", metadata=metadata)
    os.replace(f"{out}.tmp", out)


def distinct_pairs(
    labels: list[np.ndarray], batch: int, rng: np.random.Generator
) -> tuple[list[int], list[str]]:
    """Pictures and captions that all speak of different classes.

    Equal ones would be each other's negatives.
    """
    picked, captions, named = [], [], set()
    for i in rng.integers(len(labels), size=3 * batch):
        classes, text = microcosm.caption(labels[i], rng)
        if classes not in named and len(picked) < batch:
            named.add(classes)
            picked.append(i)
            captions.append(text)
    return picked, captions


def normalize(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 RGB -> (B, 3, H, W) float32, by CLIP's statistics."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return (x - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)


@torch.no_grad()
def evaluate(model: open_clip.CLIP, collection: str = "clip-test", images: int = 200) -> dict:
    """Zero-shot classification of ground-truth masks, Eq. (4)-(5), in scenes of 128 pixels.

    Returns: `accuracy` a segment; `class_mean`, `things`, `stuff`: means of the accuracies of
    classes; `scale`: CLIP's inverse temperature, `nll` at it, and `best_nll` at `best_scale`; all
    but the scales and the logs in 0 to 1.
    """
    names = [name.split(", ") for name in microcosm.CLASSES]
    vocabulary = Vocabulary(
        text_embeddings(model, tokenize, [n for group in names for n in group]),
        [len(group) for group in names],
    )
    backbone, things = ClipBackbone(model), len(microcosm.THINGS)
    cosines, labels = [], []
    for i in range(images):
        s = microcosm.scene(collection, i)
        features = backbone(torch.from_numpy(s.image).permute(2, 0, 1)[None])
        numbers = torch.arange(1, len(s.labels) + 1).view(-1, 1, 1)
        masks = (torch.from_numpy(s.segment_map)[None] == numbers)[None].float() * 2 - 1
        cosines += zero_shot_logits(backbone, features[-1], masks, vocabulary, scale=1.0)
        labels.append(torch.from_numpy(s.labels))
    cosines, labels = torch.cat(cosines), torch.cat(labels)
    right = (cosines.argmax(1) == labels).float()
    per_class = {k: right[labels == k].mean().item() for k in labels.unique().tolist()}
    of_things = [v for k, v in per_class.items() if k < things]
    of_stuff = [v for k, v in per_class.items() if k >= things]
    scale = float(backbone.logit_scale.exp().clamp(max=MAX_SCALE))
    scales = (scale, *np.geomspace(2, 100, 60))
    nll = {t: F.cross_entropy(cosines * t, labels).item() for t in scales}
    best = min(nll, key=nll.get)
    return {
        "collection": collection,
        "images": images,
        "segments": len(labels),
        "accuracy": round(right.mean().item(), 3),
        "class_mean": round(float(np.mean(list(per_class.values()))), 3),
        "things": round(float(np.mean(of_things)), 3),
        "stuff": round(float(np.mean(of_stuff)), 3),
        "scale": round(scale, 2),
        "nll": round(nll[scale], 3),
        "best_scale": round(float(best), 2),
        "best_nll": round(nll[best], 3),
    }
