"""Pictures of the warm-up for its report: views of the training, SAM's masks of them, and which of
these the decoder draws.

There is no class yet, and no answer that is right: of every mask the page shows the query that is
nearest to it, each query for one mask at most, as in the matching.
"""

import torch
from PIL import Image
from torch import Tensor

from clip_ensemble import resize
from data import Labeled
from dewa import TAXONOMY, Dewa, DewaBatches, MaskedImages
from engine.request import Source
from engine.stored import Stored, restore
from ground.errors import UserError
from matcher import match
from readers.mask_files import missing_masks
from report.gallery import Card, painted, webp

SHOWN = 6  # views


@torch.no_grad()
def cards(method: Dewa, batches: DewaBatches) -> dict[str, list[Card]]:
    """Cards of the views of the first steps, of those that a short run had not, too."""
    model, found = method.models["student"], []
    for step in range(SHOWN):
        batch = batches[step]
        _, mask_logits = model.predict(model.backbone(batch.images.to(method.device)))
        drawn = resize(mask_logits.float(), batch.images.shape[-2:]).cpu() > 0
        found += [_card(batch, k, queries) for k, queries in enumerate(drawn)]
        if len(found) >= SHOWN:
            break
    return {"warm_up": found[:SHOWN]}


def _card(batch: Labeled, k: int, drawn: Tensor) -> Card:
    """drawn: (Q, H, W) bool, the masks of the queries in this view."""
    true = batch.targets[k].masks
    iou = overlaps(drawn, true)
    ((queries, masks),) = match([1 - iou])
    nearest = torch.zeros_like(true)
    nearest[masks] = drawn[queries]
    reached = iou[queries, masks]
    note = (
        f"{int((reached >= 0.5).sum())} of {len(true)} masks are drawn with an IoU of at least 0.5"
    )
    image = Image.fromarray(batch.images[k].permute(1, 2, 0).contiguous().numpy())
    order = true.flatten(1).sum(1).argsort(descending=True, stable=True)
    of_sam, own = (painted(image, x[order].permute(1, 2, 0).numpy()) for x in (true, nearest))
    cells = [("view", webp(image)), (f"{len(true)} SAM masks", of_sam), ("the decoder", own)]
    return Card(batch.names[k], note, cells)


def overlaps(drawn: Tensor, true: Tensor) -> Tensor:
    """IoU (Q, N) of masks (Q, H, W) and (N, H, W), bool; 0 of two that are empty."""
    a, b = drawn.flatten(1).float(), true.flatten(1).float()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1)[None] - both).clamp(min=1)


def cards_again(stored: Stored, source: Source, cfg, device, masks) -> dict[str, list[Card]]:
    """The same of a stored warm-up. masks: folder of SAM's. Raises: UserError without images, masks
    or weights."""
    if stored.config.get("dataset") != source.name and not stored.config.get("data_root"):
        raise UserError(
            f"{stored.path}: does not say where its images are (a folder of --images, or an older "
            "run); of a data set, name it with --dataset and --data-root"
        )
    images, _ = source.load_images(cfg)
    if lacking := missing_masks(masks, images):
        raise UserError(
            f"{masks}: no SAM masks of {len(lacking)} of {len(images)} images; name the folder "
            "that the warm-up had with --masks"
        )
    method = restore(stored, cfg, TAXONOMY, device, source.name)
    return cards(method, method.batches(MaskedImages(images, masks, range(len(images)))))
