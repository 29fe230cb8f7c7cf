"""SAM's masks of everything: a grid of points over an image, three answers to each, and of those the ones to keep.

The model and its weights are segment_anything's, and the masks are those of its `SamAutomaticMaskGenerator` without crops; only the way
there is shorter. What depends on no point (the image, up to the first layer's answer) is computed once; an answer that its own
predicted IoU rejects is not drawn; masks take the size of the image a few at a time, and are kept small until it is known which of them stay.
Differs from the paper: no crops, as in the official DeWa masks.    Source: Segment Anything (arXiv:2304.02643), section 5 and appendices A, B.
Axes: N points, T tokens a point, M masks, S = G G cells of the embedding, C channels, H W pixels.
Try: `python dearli.py --stage masks --points-per-side 4 --out runs/try-grid` asks at 16 points an image instead of 144, for --stage dewa --masks.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, Sam
from segment_anything.utils.amg import build_point_grid
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn
from torchvision.ops import nms

from config import Config
from ground import identity
from inference import resize_masks
from matcher import in_parts

OFFSET = 1.0  # logits: a mask is stable if it hardly changes when its threshold is raised and lowered by so much


class MaskGenerator:
    """All masks of an image.

    Args: sam: in eval mode, on its device.   cfg: points_per_side, points_per_batch and the three thresholds of the masks.
        precision: of the image encoder's products. The answers to the points are always fp32: many of their masks would be others in bf16.
    """

    def __init__(self, sam: Sam, cfg: Config, precision: torch.dtype = torch.float32):
        self.sam, self.cfg, self.precision = sam.eval(), cfg, precision
        self.grid = build_point_grid(cfg.points_per_side)  # (N, 2) in [0, 1]

    @functools.cached_property
    def about(self) -> dict:
        """All that a mask depends on, beside the image. weights: SHA-256 of SAM's."""
        return {
            **settings(self.cfg),
            "precision": str(self.precision).removeprefix("torch."),
            "weights": identity.of_tensors(self.sam.state_dict()),
        }

    @torch.inference_mode()
    def generate(self, image: np.ndarray) -> list[dict]:
        """Image (H, W, 3) uint8 RGB -> records, those of the highest predicted IoU first: segmentation (H, W) bool, area and bbox [x, y, w, h] in pixels,
        predicted_iou, stability_score, crop_box (the whole image), point_coords [[x, y]], the point that was asked."""
        size, device, side = image.shape[:2], self.sam.device, self.sam.image_encoder.img_size
        transform = ResizeLongestSide(side)
        resized = torch.as_tensor(transform.apply_image(image), device=device).permute(2, 0, 1)
        points = self.grid * size[::-1]
        asked = torch.as_tensor(
            transform.apply_coords(points, size), dtype=torch.float32, device=device
        )
        kept = []
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            embedding = self.sam.image_encoder(self.sam.preprocess(resized)[None]).float()
        for at in torch.arange(len(points), device=device).split(self.cfg.points_per_batch):
            of_point, iou, small = answers(self.sam, embedding, asked[at], self.cfg.pred_iou_thresh)
            for point, *part in (
                in_parts(max(side**2, math.prod(size)), at[of_point], iou, small)
                if len(iou)
                else ()
            ):
                full = resize_masks(part[-1], (side, side), resized.shape[1:], size)
                stability = (full > OFFSET).flatten(1).sum(1, dtype=torch.int32) / (
                    full > -OFFSET
                ).flatten(1).sum(1, dtype=torch.int32)
                stable = stability >= self.cfg.stability_thresh  # 0 / 0 is not
                kept.append([t[stable] for t in (point, stability, boxes(full), *part)])
        if not kept:
            return []
        point, stability, box, iou, small = map(torch.cat, zip(*kept))
        best, records = nms(box, iou, self.cfg.mask_nms_thresh), []
        for mask, *figures in zip(
            small[best], *(t[best].tolist() for t in (point, stability, box, iou))
        ):
            at, score, (x, y, right, below), quality = figures
            mask = (
                (resize_masks(mask[None], (side, side), resized.shape[1:], size)[0] > 0)
                .cpu()
                .numpy()
            )
            records.append(
                {
                    "segmentation": mask,
                    "area": int(mask.sum()),
                    "bbox": [x, y, right - x, below - y],
                    "predicted_iou": quality,
                    "stability_score": score,
                    "crop_box": [0, 0, size[1], size[0]],
                    "point_coords": [points[at].tolist()],
                }
            )
        return records


def settings(cfg: Config) -> dict:
    """The numbers that masks depend on; how many points are asked at once is none of them."""
    return {
        "kind": "sam",
        "sam": cfg.sam,
        "points_per_side": cfg.points_per_side,
        "pred_iou_thresh": cfg.pred_iou_thresh,
        "stability_thresh": cfg.stability_thresh,
        "mask_nms_thresh": cfg.mask_nms_thresh,
    }


def boxes(logits: Tensor) -> Tensor:
    """Mask logits (M, H, W) -> first and last column and row with a positive one, xyxy (M, 4) float32; zeros of an empty mask."""
    columns, rows = (logits.amax(1) > 0).float(), (logits.amax(2) > 0).float()
    last = lambda hits: hits.shape[1] - 1 - hits.flip(1).argmax(1)
    return torch.stack(
        [columns.argmax(1), rows.argmax(1), last(columns), last(rows)], 1
    ) * columns.amax(1, keepdim=True)


def answers(sam: Sam, embedding: Tensor, xy: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Three answers to each point, of which those with a predicted IoU above `least` are drawn.

    Args: embedding (1, C, G, G);  xy (N, 2), in pixels of the resized image.
    Returns: for M masks the index of the point, the predicted IoU, and logits (M, 4G, 4G).
    """
    decoder = sam.mask_decoder
    labels = torch.ones(len(xy), 1, dtype=torch.int, device=xy.device)
    prompts, no_mask = sam.prompt_encoder(points=(xy[:, None], labels), boxes=None, masks=None)
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([outputs.expand(len(xy), -1, -1), prompts], 1)  # (N, T, C)
    cells = (embedding + no_mask[:1]).flatten(2).transpose(1, 2)  # (1, S, C)
    positions = sam.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)
    tokens, cells = two_way(decoder.transformer, tokens, cells, positions)
    predicted = decoder.iou_prediction_head(tokens[:, 0])[
        :, 1:
    ]  # (N, 3); the first one is for prompts of several points
    of_point, answer = (predicted > least).nonzero(as_tuple=True)
    drawn, place = of_point.unique(return_inverse=True)
    logits = draw(decoder, tokens[drawn, 2:5], cells[drawn])
    return of_point, predicted[of_point, answer], logits[place, answer]


def two_way(
    transformer: nn.Module, tokens: Tensor, cells: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """SAM's transformer: tokens (N, T, C) and cells (1, S, C), the same for all points until they have looked at the tokens -> (N, T, C), (N, S, C)."""
    prompt = tokens
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            tokens = attend(layer.self_attn, tokens, tokens, tokens)
        else:
            tokens = tokens + attend(layer.self_attn, tokens + prompt, tokens + prompt, tokens)
        tokens, placed = layer.norm1(tokens), cells + positions
        tokens = layer.norm2(
            tokens + attend(layer.cross_attn_token_to_image, tokens + prompt, placed, cells)
        )
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        cells = layer.norm4(
            cells + attend(layer.cross_attn_image_to_token, placed, tokens + prompt, tokens)
        )
    attended = attend(
        transformer.final_attn_token_to_image, tokens + prompt, cells + positions, cells
    )
    return transformer.norm_final_attn(tokens + attended), cells


def attend(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of segment_anything's module, without writing its weights out. Batches of 1 are those of all points."""
    heads = lambda x: x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    q, k, v = (
        heads(attention.q_proj(query)),
        heads(attention.k_proj(key)),
        heads(attention.v_proj(value)),
    )
    if (
        k.shape[2] < q.shape[2]
    ):  # a softmax over a few keys is many times faster along a long axis, that of the queries
        weights = (k @ q.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(2)  # (N, heads, T, S)
        mixed = (v.transpose(2, 3) @ weights).flatten(1, 2).transpose(1, 2)
    else:
        n = max(len(q), len(k))
        mixed = (
            F.scaled_dot_product_attention(*(t.expand(n, -1, -1, -1) for t in (q, k, v)))
            .transpose(1, 2)
            .flatten(2)
        )
    return attention.out_proj(mixed)


def draw(decoder: MaskDecoder, tokens: Tensor, cells: Tensor) -> Tensor:
    """tokens (N, 3, C), cells (N, S, C) -> mask logits (N, 3, 4G, 4G).

    A transposed convolution of size and stride 2 makes four cells of each and mixes no neighbours: a product, for which cells may stay rows.
    """
    first, norm, activation, second, _ = decoder.output_upscaling
    into_four = lambda x, c: F.linear(
        x, c.weight.permute(2, 3, 1, 0).flatten(0, 2), c.bias.repeat(4)
    ).unflatten(-1, (2, 2, -1))
    x = activation(
        F.layer_norm(into_four(cells, first), norm.weight.shape, norm.weight, norm.bias, norm.eps)
    )
    x = activation(into_four(x, second))  # (N, S, 2, 2, 2, 2, C/8)
    wanted = torch.stack(
        [mlp(t) for mlp, t in zip(decoder.output_hypernetworks_mlps[1:], tokens.unbind(1))], 1
    )
    side = math.isqrt(cells.shape[1])
    logits = (wanted @ x.flatten(1, -2).transpose(1, 2)).unflatten(2, (side, side, 2, 2, 2, 2))
    return logits.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5).flatten(2, 4)
