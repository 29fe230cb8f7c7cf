"""Mask2Former in plain torch on an OpenCLIP ConvNeXt: pixel decoder, masked-attention decoder,
class heads.

The pixel decoder refines three feature maps by multi-scale deformable attention (`deformable.py`)
and adds one FPN level for the mask features; the decoder lets Q learned queries attend to the maps,
each only inside its own mask so far, and predicts after every layer. M2F-Lang (section 3.2)
classifies a query by its cosine with the text embeddings of the classes.
Differs from the paper: nothing.
Axes: B images, Q queries, K classes, C channels, D joint image-text space, S pixels.
Sources: Mask2Former (arXiv:2112.01527), FC-CLIP (arXiv:2308.02487).
Parameters are laid out as in the official code, so its files load by renaming (`official.py`).
Try: `python dearli.py --stage sup --steps 250 --decoder-layers 0 --out runs/try-decoder`: queries
that never look at the image.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_ensemble import (
    MAX_SCALE,
    Backbone,
    Vocabulary,
    geometric_ensemble,
    resize,
    zero_shot_logits,
)
from config import Config
from deformable import DeformableAttention, Pyramid


class Segmenter(nn.Module):
    """A backbone and a Mask2Former head, with all that inference needs: what student and teacher
    are.

    vocabulary: of the K classes; None on a backbone without CLIP, which has a linear classifier and
    no ensemble.
    """

    # Of its state: a linear class head has a row a class, and no-object last.
    class_rows = ("head.decoder.classify.weight", "head.decoder.classify.bias")

    def __init__(
        self, backbone: Backbone, vocabulary: Vocabulary | None, cfg: Config, num_classes: int
    ):
        super().__init__()
        self.backbone, self.cfg = backbone, cfg
        self.vocabulary = vocabulary
        self.head = Mask2Former(backbone.channels, cfg, num_classes, vocabulary)
        self.averaged = False  # a teacher: never trained by gradient, and always in eval mode

    def train(self, mode: bool = True):
        return super().train(mode and not self.averaged)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), 0 to 255 -> class_logits (B, Q, K+1), mask_logits (B, Q, H/4, W/4).

        Sides H and W that are no multiple of 32 grow to the next one (`Backbone.forward`).
        """
        return self.predict(self.backbone(images))

    def predict(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The same from the features of the backbone."""
        [(class_logits, embeddings)], mask_features = self.head(features, last_only=True)
        return class_logits, mask_logits(embeddings, mask_features)

    def posterior(
        self, features: list[Tensor], class_logits: Tensor, mask_logits: Tensor, alpha: float
    ) -> Tensor:
        """Class probabilities (B, Q, K+1), Eq. (6). alpha: the decoder's share; 1 is the decoder
        alone, without asking CLIP.
        """
        if alpha == 1:
            return class_logits.float().softmax(-1)
        clip_logits = zero_shot_logits(
            self.backbone, features[-1], mask_logits, self.vocabulary, self.cfg.clip_scale
        )
        return geometric_ensemble(class_logits, clip_logits, alpha).exp()

    def teacher(self) -> "Segmenter":
        """A copy that is never trained by gradient, in eval mode for ever. A frozen backbone is
        shared, not copied.
        """
        memo = {id(self.backbone): self.backbone} if self.backbone.frozen else {}
        teacher = copy.deepcopy(self, memo).requires_grad_(False)
        teacher.averaged = True
        return teacher.eval()

    @property
    def constant(self) -> tuple[str, ...]:
        """Beginnings of names in state_dict() that training never changes
        (`engine.checkpoint.state_of`).
        """
        return ("backbone.",) if self.backbone.frozen else ("backbone.logit_scale",)


class Mask2Former(nn.Module):
    """The head: features of the backbone -> a list of (class_logits, mask embeddings), one a layer
    or (last_only, for inference) the last one's alone, and the mask_features (B, C, H/4, W/4)."""

    def __init__(
        self, channels: list[int], cfg: Config, num_classes: int, vocabulary: Vocabulary | None
    ):
        super().__init__()
        self.pixel_decoder = PixelDecoder(channels, cfg)
        self.decoder = MaskedAttentionDecoder(cfg, num_classes, vocabulary)

    def forward(
        self, features: list[Tensor], last_only: bool = False
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        mask_features, maps = self.pixel_decoder(features)
        return self.decoder(maps, mask_features, last_only), mask_features


# ----------------------------------------------------------------------------------- pixel decoder


class PixelDecoder(nn.Module):
    """Deformable attention over strides 8, 16, 32, then one FPN step to stride 4.

    forward: four maps (B, C_i, H/2^i, W/2^i), i = 2..5 -> mask_features (B, C, H/4, W/4) and three
    maps (B, C, ., .), coarsest first.
    """

    def __init__(self, channels: list[int], cfg: Config):
        super().__init__()
        c = cfg.hidden
        self.heads, self.points = cfg.heads, cfg.encoder_points
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, c, 1), nn.GroupNorm(32, c)) for n in reversed(channels[1:])
        )
        self.level_embed = nn.Parameter(torch.randn(3, c))
        self.layers = nn.ModuleList(
            DeformableLayer(c, cfg.heads, 3, cfg.encoder_points, cfg.encoder_ffn)
            for _ in range(cfg.encoder_layers)
        )
        self.lateral = nn.Sequential(nn.Conv2d(channels[0], c, 1, bias=False), nn.GroupNorm(32, c))
        self.output = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1, bias=False), nn.GroupNorm(32, c), nn.ReLU()
        )
        self.mask_features = nn.Conv2d(c, c, 1)
        for proj in self.input_proj:
            nn.init.xavier_uniform_(proj[0].weight)
            nn.init.zeros_(proj[0].bias)
        for conv in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        maps = [proj(f) for proj, f in zip(self.input_proj, reversed(features[1:]))]
        shapes = [m.shape[-2:] for m in maps]
        src = torch.cat([tokens(m) for m in maps], 1)  # (B, S, C)
        pos = [tokens(sine_position(m)) + e for m, e in zip(maps, self.level_embed)]
        pos = torch.cat(pos, 1)  # (1, S, C)
        pyramid = Pyramid.of(shapes, self.heads, self.points, src.device)
        for layer in self.layers:
            src = layer(src, pos, pyramid)
        parts = src.split([h * w for h, w in shapes], 1)
        maps = [s.transpose(1, 2).unflatten(2, shape) for s, shape in zip(parts, shapes)]
        fine = self.lateral(features[0])
        fine = self.output(fine + resize(maps[-1], fine.shape[-2:]))
        return self.mask_features(fine), maps


class DeformableLayer(nn.Module):
    """One encoder layer: deformable self-attention and a feed-forward net, post-norm."""

    def __init__(self, channels: int, heads: int, levels: int, points: int, ffn: int):
        super().__init__()
        self.self_attn = DeformableAttention(channels, heads, levels, points)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.linear1, self.linear2 = nn.Linear(channels, ffn), nn.Linear(ffn, channels)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, src: Tensor, pos: Tensor, pyramid: Pyramid) -> Tensor:
        src = self.norm1(src + self.self_attn(src + pos, src, pyramid))
        return self.norm2(src + self.linear2(self.linear1(src).relu_()))


def tokens(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, S, C), S = h w."""
    return maps.flatten(2).transpose(1, 2)


def sine_position(maps: Tensor, temperature: float = 10000.0) -> Tensor:
    """(1, C, h, w) sine embedding of the position of each pixel, both axes normalised to (0, 2 pi];
    half the channels a axis.
    """
    h, w = maps.shape[-2:]
    half = maps.shape[1] // 2
    i = torch.arange(half, dtype=torch.float32, device=maps.device)
    period = temperature ** (2 * (i // 2) / half)

    def axis(n: int) -> Tensor:
        """(n, half)"""
        place = torch.arange(1, n + 1, dtype=torch.float32, device=maps.device)
        angle = (place / (n + 1e-6) * 2 * math.pi)[:, None] / period
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1)

    y = axis(h)[:, None].expand(h, w, half)
    x = axis(w)[None].expand(h, w, half)
    return torch.cat([y, x], -1).permute(2, 0, 1)[None]


# ------------------------------------------------------------------------- masked-attention decoder


class MaskedAttentionDecoder(nn.Module):
    """Q queries, refined by masked cross-attention, self-attention and a feed-forward net, layer
    after layer.

    forward: three maps (B, C, ., .) coarsest first and mask_features (B, C, H/4, W/4) -> a list of
    layers + 1 predictions (class_logits (B, Q, K+1), mask embeddings (B, Q, C)); the last is the
    result, all are supervised. With last_only there is one. A query's mask is the product of its
    embedding with the mask features. Resizing is linear, so the mask on a coarse grid, where the
    query may look next, is the product with mask features of that size: no mask of full size is
    made here.
    """

    def __init__(self, cfg: Config, num_classes: int, vocabulary: Vocabulary | None):
        super().__init__()
        c = cfg.hidden
        self.query_feat = nn.Embedding(cfg.num_queries, c)
        self.query_embed = nn.Embedding(cfg.num_queries, c)
        self.level_embed = nn.Embedding(3, c)
        self.layers = nn.ModuleList(
            DecoderLayer(c, cfg.heads, cfg.decoder_ffn) for _ in range(cfg.decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(c)
        self.mask_embed = MLP(c, c, c)
        if cfg.classifier == "language":
            self.classify = LanguageClassifier(c, vocabulary)
        else:
            self.classify = LinearClassifier(c, num_classes)

    def forward(
        self, maps: list[Tensor], mask_features: Tensor, last_only: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        src = [tokens(m) + e for m, e in zip(maps, self.level_embed.weight)]  # (B, S_i, C)
        keys = [s + tokens(sine_position(m)) for s, m in zip(src, maps)]
        queries = self.query_feat.weight.expand(mask_features.shape[0], -1, -1)
        query_pos = self.query_embed.weight
        with torch.no_grad():
            coarse = [resize(mask_features, m.shape[-2:]) for m in maps]
        states, masks = [], []
        for i in range(len(self.layers) + 1):
            states.append(self.decoder_norm(queries))
            masks.append(self.mask_embed(states[-1]))
            if i < len(self.layers):
                level = i % len(maps)
                allowed = attention_mask(masks[-1], coarse[level])
                queries = self.layers[i](queries, query_pos, src[level], keys[level], allowed)
        first = len(self.layers) if last_only else 0
        # the classes of all layers at once
        return list(zip(self.classify(torch.stack(states[first:])), masks[first:]))


def mask_logits(embeddings: Tensor, mask_features: Tensor) -> Tensor:
    """(B, Q, C), (B, C, h, w) -> (B, Q, h, w)."""
    return torch.einsum("bqc,bchw->bqhw", embeddings, mask_features.to(embeddings.dtype))


@torch.no_grad()
def attention_mask(embeddings: Tensor, coarse: Tensor) -> Tensor:
    """(B, 1, Q, S) bool: True where a query may look, that is inside its own mask; everywhere, if
    that is nowhere.

    embeddings (B, Q, C); coarse (B, C, h, w), the mask features on the grid of the keys, S = h w.
    """
    allowed = mask_logits(embeddings, coarse).float().sigmoid().flatten(2) >= 0.5
    return (allowed | ~allowed.any(-1, keepdim=True))[:, None]


class DecoderLayer(nn.Module):
    """Masked cross-attention first, then self-attention, then feed-forward; post-norm."""

    def __init__(self, channels: int, heads: int, ffn: int):
        super().__init__()
        self.cross_attn, self.self_attn = Attention(channels, heads), Attention(channels, heads)
        self.linear1, self.linear2 = nn.Linear(channels, ffn), nn.Linear(ffn, channels)
        self.cross_norm, self.self_norm, self.ffn_norm = (nn.LayerNorm(channels) for _ in range(3))
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self, queries: Tensor, query_pos: Tensor, src: Tensor, keys: Tensor, allowed: Tensor
    ) -> Tensor:
        queries = self.cross_norm(
            queries + self.cross_attn(queries + query_pos, keys, src, allowed)
        )
        placed = queries + query_pos
        queries = self.self_norm(queries + self.self_attn(placed, placed, queries))
        return self.ffn_norm(queries + self.linear2(self.linear1(queries).relu_()))


class Attention(nn.Module):
    """Multi-head attention with the parameter layout of nn.MultiheadAttention, batch first, mask
    (B, 1, Q, S) or None.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, ., d)
            for x, w, b in zip((query, key, value), weights, biases)
        )
        # torch's attention in bf16 takes half as long again on a CPU, with its gradients
        if q.device.type == "cpu":
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(q.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Three linear layers with ReLU between."""

    def __init__(self, channels: int, hidden: int, out: int):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(channels, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](self.layers[1](self.layers[0](x).relu_()).relu_())


class LinearClassifier(nn.Linear):
    """M2F: (..., Q, C) -> class_logits (..., Q, K+1)."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__(channels, num_classes + 1)


class LanguageClassifier(nn.Module):
    """M2F-Lang: class_logits = scale * cosine with the text embeddings; no-object has a learned
    embedding.

    Queries are mapped to the joint space by an MLP; text embeddings are fixed; the scale is learned
    (exp, at most 100).
    """

    def __init__(self, channels: int, vocabulary: Vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        dim = vocabulary.embeddings.shape[1]
        self.class_embed = MLP(channels, channels, dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.void_embedding = nn.Embedding(1, dim)

    def forward(self, queries: Tensor) -> Tensor:
        """(..., Q, C) -> class_logits (..., Q, K+1)."""
        unit = F.normalize(self.class_embed(queries), dim=-1)
        void = unit @ F.normalize(self.void_embedding.weight, dim=-1).T
        return self.logit_scale.exp().clamp(max=MAX_SCALE) * torch.cat(
            [self.vocabulary.cosine(unit), void], -1
        )
