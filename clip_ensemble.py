"""Recognition: a frozen OpenCLIP ConvNeXt, and its zero-shot opinion about the class of a mask.

Implements mask pooling Eq. (4), the zero-shot posterior Eq. (5) and the geometric ensemble Eq. (6).
Differs from the paper, as the official code does: mask logits are resized to the feature grid
before they are thresholded (the paper thresholds first), and a class may have several names, of
which the best counts.
Axes: B images, Q queries, K classes, T names, D joint image-text space, C channels of the last
stage.
Sources: FC-CLIP (arXiv:2308.02487), ODISE (arXiv:2303.04803); prompts from ViLD (arXiv:2104.13921).
Try: `python dearli.py --stage ssl --method ssl --steps 350 --burn-in 150 --out runs/try-pens` makes
the pseudo-labels without CLIP.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPLATES = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)
# Image statistics times 255, RGB: CLIP's, and ImageNet's for backbones without CLIP
PIXEL_MEAN = (122.7709383, 116.7460125, 104.09373615)
PIXEL_STD = (68.5005327, 66.6321579, 70.32316305)
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_SCALE = 100.0  # CLIP clamps its inverse temperature here
STRIDE = 32  # pixels, of the coarsest map


class Backbone(nn.Module):
    """A timm ConvNeXt or ResNet as a source of feature maps, and nothing more (plain Mask2Former).

    Args: trunk: the ConvNeXt, or what has its stem, stages and head.   mean, std: of its images, 0
        to 255, RGB.
        frozen: no gradients and eval mode, for ever: drop path would make its features another
            network's.
    Student and teacher share one frozen backbone: it is no part of the average, the optimiser or a
    checkpoint.
    """

    def __init__(self, trunk: nn.Module, frozen: bool = True, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.trunk = trunk
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.channels = [f["num_chs"] for f in trunk.feature_info]
        self.frozen = frozen
        self.requires_grad_(not frozen)
        trunk.head.requires_grad_(False)
        self.train()  # libraries hand a trunk over in either mode

    def train(self, mode: bool = True):
        """What leads from the features into the joint space stays in eval mode in any case."""
        super().train(mode and not self.frozen)
        self.trunk.head.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) uint8 or float, 0 to 255, RGB -> four maps, strides 4, 8, 16, 32.

        Sides that are no multiple of 32 are padded right and bottom with the mean colour, so that
        all maps cover the same area: the maps are those of `padded_size(H, W)`.
        """
        if self.frozen:
            self.eval()  # whatever was done to a part of it
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = (images.float() - self.mean) / self.std
            height, width = padded_size(*x.shape[-2:])
            x = self.trunk.stem(F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])))
            maps = []
            for stage in self.trunk.stages:
                x = stage(x)
                maps.append(x)
        return maps


class ClipBackbone(Backbone):
    """The image tower of an OpenCLIP ConvNeXt: feature maps, and their way into the joint space.

    Args: clip: an `open_clip.CLIP` whose image tower is a timm ConvNeXt.
    As officially, a trained backbone trains its feature maps only: the way into the joint space
    stays CLIP's.
    """

    def __init__(self, clip: nn.Module, frozen: bool = True):
        super().__init__(clip.visual.trunk, frozen, PIXEL_MEAN, PIXEL_STD)
        self.head = clip.visual.head.requires_grad_(False)
        self.register_buffer("logit_scale", clip.logit_scale.detach().float().clone())
        self.train()  # the projection, too

    def train(self, mode: bool = True):
        super().train(mode)
        if hasattr(self, "head"):  # not yet, when `Backbone` is made
            self.head.eval()
        return self

    def embed(self, pooled: Tensor) -> Tensor:
        """Pooled features of the last stage (B, Q, C) -> joint space (B, Q, D), not normalised."""
        self.trunk.head.eval()
        self.head.eval()
        x = self.head(self.trunk.head(pooled.reshape(-1, pooled.shape[-1], 1, 1)))
        return x.view(*pooled.shape[:2], -1)


def padded_size(height: int, width: int) -> tuple[int, int]:
    """The size of an image, pixels, with sides grown to a multiple of the coarsest stride."""
    return -(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear. C may be 0, as masks of an image without any are."""
    if not maps.shape[1]:
        return maps.new_zeros(*maps.shape[:2], *size)
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


class Vocabulary(nn.Module):
    """Text embeddings of the names of K classes. Classes have several names; the best one counts.

    embeddings: (T, D), unit length, all names of class 0 first.   counts: K numbers of names,
        summing to T.
    """

    def __init__(self, embeddings: Tensor, counts: list[int]):
        super().__init__()
        if sum(counts) != len(embeddings) or min(counts) < 1:
            raise ValueError(
                f"text embeddings: expected {sum(counts)} rows for {len(counts)} classes with at "
                f"least one name each, got {len(embeddings)}"
            )
        self.register_buffer("embeddings", embeddings, persistent=False)
        # (K, S): rows of each class, the first one repeated up to the longest: a maximum does not
        # mind repetition
        first = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
        steps = torch.arange(max(counts))[None].expand(len(counts), -1)
        self.register_buffer(
            "names",
            first[:, None] + torch.where(steps < torch.tensor(counts)[:, None], steps, 0),
            persistent=False,
        )

    def __len__(self) -> int:
        return len(self.names)

    def cosine(self, unit: Tensor) -> Tensor:
        """Cosines of unit embeddings (..., D) with each class, the best of its names: (..., K)."""
        # (T, N): what is said of a name is a row
        similarity = self.embeddings.to(unit.dtype) @ unit.flatten(0, -2).T
        return F.embedding(self.names, similarity).amax(1).T.unflatten(0, unit.shape[:-1])


@torch.no_grad()
def text_embeddings(clip: nn.Module, tokenizer, names: list[str], batch: int = 128) -> Tensor:
    """(T, D) unit embeddings of T names: the means of their templates' unit embeddings.

    clip: put into eval mode, and left there.
    """
    clip.eval()
    device = next(clip.parameters()).device
    prompts = [template.format(name) for name in names for template in TEMPLATES]
    parts = [
        F.normalize(clip.encode_text(tokenizer(prompts[i : i + batch]).to(device)).float(), dim=-1)
        for i in range(0, len(prompts), batch)
    ]
    return F.normalize(torch.cat(parts).view(len(names), len(TEMPLATES), -1).mean(1), dim=-1)


def mask_pool(features: Tensor, mask_logits: Tensor) -> Tensor:
    """Mean feature under each mask, Eq. (4).

    Args: features (B, C, h, w), the last stage;  mask_logits (B, Q, H, W), any resolution.
    Returns: (B, Q, C); zero where a mask has no pixel with a positive logit at the resolution of
        the features.
    """
    if mask_logits.shape[-2:] != features.shape[-2:]:
        mask_logits = resize(mask_logits, features.shape[-2:])
    masks = (mask_logits > 0).to(features.dtype).flatten(2)  # (B, Q, hw)
    return masks @ features.flatten(2).transpose(1, 2) / masks.sum(-1, keepdim=True).clamp(min=1)


def zero_shot_logits(
    backbone: ClipBackbone,
    features: Tensor,
    mask_logits: Tensor,
    vocabulary: Vocabulary,
    scale: float = 0.0,
) -> Tensor:
    """Logits (B, Q, K) of the zero-shot posterior, Eq. (5): p_CLIP is their softmax; fp32.

    Args: features (B, C, h, w), the last stage;  mask_logits (B, Q, H, W);  scale: inverse
        temperature, 0 = CLIP's own.
    """
    with torch.autocast(features.device.type, enabled=False):
        pooled = mask_pool(backbone.trunk.norm_pre(features.float()), mask_logits.float())
        scale = torch.as_tensor(scale) if scale else backbone.logit_scale.exp().clamp(max=MAX_SCALE)
        return scale.to(pooled) * vocabulary.cosine(F.normalize(backbone.embed(pooled), dim=-1))


def alpha_of_share(share: float) -> float:
    """An alpha for the labelled share of the images, 0 to 1: more labels, the decoder counts more.

    A line in log2(share) through the best alpha of each partition of Table 8, supplement C (the
    vertex of the parabola through its three values), kept to the 0.5 to 0.7 that the table covers.
    """
    return min(max(0.64 + 0.028 * (math.log2(share) + 5), 0.5), 0.7)


def geometric_ensemble(class_logits: Tensor, clip_logits: Tensor, alpha: float) -> Tensor:
    """Log-probabilities of the ensemble, Eq. (6): p_ENS ~ p_MT ** alpha * p_CLIP ** (1 - alpha).

    Args: class_logits (..., K+1), the decoder's, index K is no-object;  clip_logits (..., K);
        alpha in [0, 1].
    Returns: (..., K+1) fp32. The probability of no-object is the decoder's own: CLIP has no opinion
        about it.
        alpha = 1 is P_MT, the decoder alone; alpha = 0 is P_CLIP.
    Computed in log space: a posterior that underflows to 0 would be -inf times 0 when alpha is 0
    or 1.
    """
    log_p = class_logits.float().log_softmax(-1)
    log_mt = class_logits[..., :-1].float().log_softmax(-1)
    log_clip = clip_logits.float().log_softmax(-1)
    log_ens = (alpha * log_mt + (1 - alpha) * log_clip).log_softmax(-1)
    # log(1 - p_void), without cancellation
    log_object = log_p[..., :-1].logsumexp(-1, keepdim=True)
    return torch.cat([log_ens + log_object, log_p[..., -1:]], -1)
