"""Recognition: a frozen OpenCLIP ConvNeXt, and its zero-shot opinion about the class of a mask.

Implements mask pooling Eq. (4), the zero-shot posterior Eq. (5) and the geometric ensemble Eq. (6).
Differs from the paper, as the official code does: mask logits are resized to the feature grid before they are
thresholded (the paper thresholds first), and a class may have several names, of which the best counts.
Axes: B images, Q queries, K classes, T names, D joint image-text space, C channels of the last stage.
Sources: FC-CLIP (arXiv:2308.02487), ODISE (arXiv:2303.04803); prompts from ViLD (arXiv:2104.13921).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPLATES = (
    "a photo of a {}.", "This is a photo of a {}", "There is a {} in the scene", "There is the {} in the scene",
    "a photo of a {} in the scene", "a photo of a small {}.", "a photo of a medium {}.", "a photo of a large {}.",
    "This is a photo of a small {}.", "This is a photo of a medium {}.", "This is a photo of a large {}.",
    "There is a small {} in the scene.", "There is a medium {} in the scene.", "There is a large {} in the scene.")
# CLIP's image statistics times 255, RGB
PIXEL_MEAN = (122.7709383, 116.7460125, 104.09373615)
PIXEL_STD = (68.5005327, 66.6321579, 70.32316305)
MAX_SCALE = 100.0                      # CLIP clamps its inverse temperature here


class ClipBackbone(nn.Module):
    """The image tower of an OpenCLIP ConvNeXt: feature maps, and the way from pooled features into the joint space.

    Args: clip: an `open_clip.CLIP` whose image tower is a timm ConvNeXt.   frozen: no gradients, for ever.
    Student and teacher share one frozen backbone: it is no part of the average, the optimiser or a checkpoint.
    """

    def __init__(self, clip: nn.Module, frozen: bool = True):
        super().__init__()
        self.trunk, self.head = clip.visual.trunk, clip.visual.head
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)
        self.register_buffer("logit_scale", clip.logit_scale.detach().float().clone())
        self.channels = [f["num_chs"] for f in self.trunk.feature_info]
        # As officially, a trained backbone trains its feature maps only: the way into the joint space stays CLIP's.
        self.requires_grad_(not frozen)
        self.trunk.head.requires_grad_(False)
        self.head.requires_grad_(False)
        self.frozen = frozen

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)     # frozen means eval: no drop path

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) uint8 or float in 0 to 255, RGB -> outputs of the four stages, strides 4, 8, 16, 32."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = self.trunk.stem((images.float() - self.mean) / self.std)
            maps = []
            for stage in self.trunk.stages:
                x = stage(x)
                maps.append(x)
        return maps

    def embed(self, pooled: Tensor) -> Tensor:
        """Pooled features of the last stage (B, Q, C) -> joint space (B, Q, D), not normalised."""
        x = self.head(self.trunk.head(pooled.reshape(-1, pooled.shape[-1], 1, 1)))
        return x.view(*pooled.shape[:2], -1)


class Vocabulary(nn.Module):
    """Text embeddings of the names of K classes. Classes have several names; the best one counts.

    embeddings: (T, D), unit length, all names of class 0 first.   counts: K numbers of names, summing to T.
    """

    def __init__(self, embeddings: Tensor, counts: list[int]):
        super().__init__()
        if sum(counts) != len(embeddings) or min(counts) < 1:
            raise ValueError(f"text embeddings: expected {sum(counts)} rows for {len(counts)} classes with at least one name "
                             f"each, got {len(embeddings)}")
        self.register_buffer("embeddings", embeddings, persistent=False)
        # (K, S): rows of each class, the first one repeated up to the longest: a maximum does not mind repetition
        first = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
        steps = torch.arange(max(counts))[None].expand(len(counts), -1)
        self.register_buffer("names", first[:, None] + torch.where(steps < torch.tensor(counts)[:, None], steps, 0), persistent=False)

    def __len__(self) -> int:
        return len(self.names)

    def cosine(self, embeddings: Tensor) -> Tensor:
        """Cosine similarity of (..., D) embeddings with each class, the best of its names: (..., K)."""
        similarity = F.normalize(embeddings, dim=-1) @ self.embeddings.T.to(embeddings.dtype)
        return similarity[..., self.names].amax(-1)


@torch.no_grad()
def text_embeddings(clip: nn.Module, tokenizer, names: list[str], batch: int = 128) -> Tensor:
    """(T, D) unit embeddings of T names: each template is embedded and normalised, then averaged, then normalised."""
    device = next(clip.parameters()).device
    prompts = [template.format(name) for name in names for template in TEMPLATES]
    parts = [F.normalize(clip.encode_text(tokenizer(prompts[i:i + batch]).to(device)).float(), dim=-1)
             for i in range(0, len(prompts), batch)]
    return F.normalize(torch.cat(parts).view(len(names), len(TEMPLATES), -1).mean(1), dim=-1)


def mask_pool(features: Tensor, mask_logits: Tensor) -> Tensor:
    """Mean feature under each mask, Eq. (4).

    Args: features (B, C, h, w), the last stage;  mask_logits (B, Q, H, W), any resolution.
    Returns: (B, Q, C); zero where a mask has no pixel with a positive logit at the resolution of the features.
    """
    if mask_logits.shape[-2:] != features.shape[-2:]:
        mask_logits = F.interpolate(mask_logits, size=features.shape[-2:], mode="bilinear", align_corners=False)
    masks = (mask_logits > 0).to(features.dtype).flatten(2)                        # (B, Q, hw)
    return masks @ features.flatten(2).transpose(1, 2) / (masks.sum(-1, keepdim=True) + 1e-8)


def zero_shot_logits(backbone: ClipBackbone, features: Tensor, mask_logits: Tensor, vocabulary: Vocabulary,
                     scale: float = 0.0) -> Tensor:
    """Logits of the zero-shot posterior, Eq. (5): p_CLIP = softmax over K of the result (B, Q, K), fp32.

    Args: features (B, C, h, w), the last stage;  mask_logits (B, Q, H, W);  scale: inverse temperature, 0 = CLIP's own.
    """
    with torch.autocast(features.device.type, enabled=False):
        pooled = mask_pool(backbone.trunk.norm_pre(features.float()), mask_logits.float())
        scale = torch.as_tensor(scale) if scale else backbone.logit_scale.exp().clamp(max=MAX_SCALE)
        return scale.to(pooled) * vocabulary.cosine(backbone.embed(pooled))


def geometric_ensemble(class_logits: Tensor, clip_logits: Tensor, alpha: float) -> Tensor:
    """Log-probabilities of the ensemble, Eq. (6): p_ENS ~ p_MT ** alpha * p_CLIP ** (1 - alpha) over the K classes.

    Args: class_logits (..., K+1), the decoder's, index K is no-object;  clip_logits (..., K);  alpha in [0, 1].
    Returns: (..., K+1) fp32. The probability of no-object is the decoder's own: CLIP has no opinion about it.
    Computed in log space: a posterior that underflows to 0 would be -inf times 0 when alpha is 0 or 1.
    """
    log_p = class_logits.float().log_softmax(-1)
    log_mt, log_clip = class_logits[..., :-1].float().log_softmax(-1), clip_logits.float().log_softmax(-1)
    log_ens = (alpha * log_mt + (1 - alpha) * log_clip).log_softmax(-1)
    log_object = log_p[..., :-1].logsumexp(-1, keepdim=True)                       # log(1 - p_void), without cancellation
    return torch.cat([log_ens + log_object, log_p[..., -1:]], -1)
