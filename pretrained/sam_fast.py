"""SAM's answers to the points of one image, in less time than by its own `MaskDecoder.forward`.

segment_anything repeats the image for every point. Here what depends on no point (the image, up to
the first layer's answer) is computed once, and an answer that its own predicted IoU rejects is not
drawn. With a ViT-B, 8 x 8 points and every third answer drawn it takes 0.85 of the time.
Differs from `MaskDecoder.forward`: nothing but rounding.
Axes: N points, T tokens a point, M masks, S = G G cells of the embedding, C channels.
"""

import math

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, Sam
from torch import Tensor, nn


def answers(sam: Sam, embedding: Tensor, xy: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Three answers to each point, of which those with a predicted IoU above `least` are drawn.

    Args: embedding (1, C, G, G);  xy (N, 2), in pixels of the resized image.
    Returns: for M masks the index of the point, the predicted IoU, and logits (M, 4G, 4G).
    """
    tokens, cells, predicted = asked(sam, embedding, xy)
    of_point, answer = (predicted > least).nonzero(as_tuple=True)
    points, place = of_point.unique(return_inverse=True)
    logits = draw(sam.mask_decoder, tokens[points], cells[points])
    return of_point, predicted[of_point, answer], logits[place, answer]


def asked(sam: Sam, embedding: Tensor, xy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points (N, 2) in an embedding (1, C, G, G) -> what is drawn of, and predicted IoUs (N, 3).

    Drawn (`draw`) of tokens (N, 3, C) and cells (N, S, C): the first of the four mask tokens is for
    prompts of several points.
    """
    decoder = sam.mask_decoder
    labels = torch.ones(len(xy), 1, dtype=torch.int, device=xy.device)
    prompts, no_mask = sam.prompt_encoder(points=(xy[:, None], labels), boxes=None, masks=None)
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([outputs.expand(len(xy), -1, -1), prompts], 1)  # (N, T, C)
    cells = (embedding + no_mask[:1]).flatten(2).transpose(1, 2)  # (1, S, C)
    positions = sam.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)
    tokens, cells = two_way(decoder.transformer, tokens, cells, positions)
    return tokens[:, 2:5], cells, decoder.iou_prediction_head(tokens[:, 0])[:, 1:]


def two_way(
    transformer: nn.Module, tokens: Tensor, cells: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """SAM's transformer: tokens (N, T, C), cells and positions (1, S, C) -> (N, T, C), (N, S, C).

    The cells are the same for all points until they have looked at the tokens.
    """
    prompt = tokens
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            tokens = attend(layer.self_attn, tokens, tokens, tokens)
        else:
            tokens = tokens + attend(layer.self_attn, tokens + prompt, tokens + prompt, tokens)
        tokens, placed = layer.norm1(tokens), cells + positions
        looked = attend(layer.cross_attn_token_to_image, tokens + prompt, placed, cells)
        tokens = layer.norm2(tokens + looked)
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        looked = attend(layer.cross_attn_image_to_token, placed, tokens + prompt, tokens)
        cells = layer.norm4(cells + looked)
    final = transformer.final_attn_token_to_image
    attended = attend(final, tokens + prompt, cells + positions, cells)
    return transformer.norm_final_attn(tokens + attended), cells


def attend(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """segment_anything's attention, its weights not kept. Batches of 1 are those of all points."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    q, k = heads(attention.q_proj(query)), heads(attention.k_proj(key))
    v = heads(attention.v_proj(value))
    if k.shape[2] < q.shape[2]:
        # a softmax over a few keys is many times faster along a long axis, that of the queries
        weights = (k @ q.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(2)  # (N, heads, T, S)
        mixed = (v.transpose(2, 3) @ weights).flatten(1, 2).transpose(1, 2)
    else:
        n = max(len(q), len(k))
        q, k, v = (t.expand(n, -1, -1, -1) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return attention.out_proj(mixed)


def draw(decoder: MaskDecoder, tokens: Tensor, cells: Tensor) -> Tensor:
    """tokens (N, 3, C), cells (N, S, C) -> mask logits (N, 3, 4G, 4G).

    A transposed convolution of size and stride 2 makes four cells of each and mixes no neighbours:
    it is a matrix product, for which cells may stay rows.
    """
    first, norm, activation, second, _ = decoder.output_upscaling

    def into_four(x: Tensor, conv: nn.ConvTranspose2d) -> Tensor:
        weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
        return F.linear(x, weight, conv.bias.repeat(4)).unflatten(-1, (2, 2, -1))

    x = into_four(cells, first)
    x = activation(F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps))
    x = activation(into_four(x, second))  # (N, S, 2, 2, 2, 2, C/8)
    mlps = decoder.output_hypernetworks_mlps[1:]
    wanted = torch.stack([mlp(t) for mlp, t in zip(mlps, tokens.unbind(1))], 1)
    side = math.isqrt(cells.shape[1])
    logits = (wanted @ x.flatten(1, -2).transpose(1, 2)).unflatten(2, (side, side, 2, 2, 2, 2))
    return logits.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5).flatten(2, 4)
