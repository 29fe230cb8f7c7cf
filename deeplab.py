"""DeepLabv3+ in plain torch: an encoder with dilated stages, ASPP, a low-level branch, and heads.

The encoder is any backbone with four maps, the coarsest at stride 8 or 16; ASPP looks at that one
with several dilations, and joins the map of stride 4. A segmentation head gives class logits, a
projector the vectors that ESL compares pixels by.
Differs from the paper: the segmentation head of ESL has two Conv-BN-ReLU blocks and a 1x1
convolution, not three blocks: logits have a sign. Layout and widths are U2PL's, whose protocol ESL
shares; multi-grid dilations are not.
Axes: B images, C classes, L channels of the projection, L' of the encoder, h w at stride 4.
Sources: DeepLabv3+ (arXiv:1802.02611), U2PL (arXiv:2203.03884), OHEM (arXiv:1604.03540).
Try: `python dearli.py --stage sup --network deeplab --steps 100 --out runs/try-deeplab`.
"""

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_grad
import torch.nn.functional as F
from torch import Tensor, nn

from clip_ensemble import IMAGENET_MEAN, IMAGENET_STD, Backbone, padded_size, resize
from config import Config
from ground import ranks

DROPOUT = 0.1  # of the segmentation head
IGNORE = -1  # class of a pixel that no loss sees


@dataclass(frozen=True)
class Maps:
    """What the network makes of B images.

    logits: (B, C, h, w).   encoder: (B, L', h', w'), the coarsest map.   decoder: (B, D, h, w),
    what the heads see.   auxiliary: (B, C, h'', w''), logits of the map before the coarsest; or
    None.
    """

    logits: Tensor
    encoder: Tensor
    decoder: Tensor
    auxiliary: Tensor | None


class DeepLab(nn.Module):
    """What student and teacher are. projector: whether it has one.

    backbone: `clip_ensemble.Backbone`, which pads to `padded_size`, or `TimmMaps`: images
    (B, 3, H, W), 0 to 255, RGB -> four maps with `channels`, the first at stride 4.
    """

    constant = ()  # training changes all of it, batch-norm statistics too
    class_rows = ("classify.2.weight", "classify.2.bias", "auxiliary.1.weight", "auxiliary.1.bias")
    begins_anew = ("projector.", "auxiliary.")  # a run that starts from one without them may have

    def __init__(self, backbone: nn.Module, cfg: Config, num_classes: int, projector=False):
        super().__init__()
        width, channels = cfg.hidden, backbone.channels
        self.backbone = backbone
        self.aspp = ASPP(channels[-1], width, cfg.atrous)
        self.high = block(width * 5, width, 3)
        self.low = block(channels[0], width, 1)
        self.classify = nn.Sequential(
            nn.Sequential(block(2 * width, width, 3), nn.Dropout2d(DROPOUT)),
            nn.Sequential(block(width, width, 3), nn.Dropout2d(DROPOUT)),
            nn.Conv2d(width, num_classes, 1),
        )
        self.projector = None
        if projector:
            last = block(width, cfg.projection, 1)
            last = last if cfg.projector == "block" else nn.Conv2d(width, cfg.projection, 1)
            self.projector = nn.Sequential(block(2 * width, width, 3), block(width, width, 3), last)
        self.auxiliary = None
        if cfg.aux_weight:
            self.auxiliary = nn.Sequential(
                block(channels[-2], width, 3), nn.Conv2d(width, num_classes, 1)
            )
        self.averaged = False  # a teacher: never trained by gradient

    def forward(self, images: Tensor) -> Maps:
        low, *_, third, encoder = self.backbone(images)
        decoded = resize(self.high(self.aspp(encoder)), low.shape[-2:])
        decoded = torch.cat([self.low(low), decoded], 1)
        auxiliary = self.auxiliary(third) if self.auxiliary is not None else None
        return Maps(self.classify(decoded), encoder, decoded, auxiliary)

    def upsample(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W) of images of that size."""
        pads = isinstance(self.backbone, Backbone)
        return resize(logits, padded_size(*size) if pads else size)[..., : size[0], : size[1]]

    def project(self, decoded: Tensor) -> Tensor:
        """(B, L, h, w) of `Maps.decoder`."""
        return self.projector(decoded)

    def train(self, mode: bool = True):
        return super().train(mode and not self.averaged)

    def teacher(self) -> "DeepLab":
        """A copy that is never trained by gradient, in eval mode (`batch_statistics` aside)."""
        teacher = copy.deepcopy(self).requires_grad_(False)
        teacher.averaged = True
        return teacher.eval()

    def batch_statistics(self, on: bool) -> None:
        """Whether batch norm goes by the batch, and notes it, in a network that is in eval mode."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(on)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 convolution, three dilated 3x3 and the mean of the
    image, side by side: (B, C, h, w) -> (B, 5 * width, h, w).
    """

    def __init__(self, channels: int, width: int, atrous: int):
        super().__init__()
        self.branches = nn.ModuleList(
            [
                block(channels, width, 1),
                *(block(channels, width, 3, atrous * k) for k in (1, 2, 3)),
            ]
        )
        # Without batch norm: a batch of one image has one value a channel.
        self.mean = nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return torch.cat([mean, *(branch(x) for branch in self.branches)], 1)


class TimmMaps(nn.Module):
    """A timm network (`features_only`) as a source of four maps. Student and teacher have one
    each.
    """

    def __init__(self, network: nn.Module, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.channels = network.feature_info.channels()[-4:]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.network((images.float() - self.mean) / self.std)[-4:]


def block(channels: int, width: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU; the size stays."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


# ----------------------------------------------------------------------------- several processes


class OverRanks:
    """Batch norm whose statistics are those of all ranks' pixels together: mixed into the class of
    a layer by `synchronise`. Torch's own SyncBatchNorm does the same, on GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or ranks.count() == 1:
            return super().forward(x)
        dims = (0, 2, 3)
        count = ranks.total(x.new_tensor(x.numel() / x.shape[1], dtype=torch.float32))
        mean = dist_grad.all_reduce(x.float().sum(dims)) / count
        centred = x.float() - mean[:, None, None]
        variance = dist_grad.all_reduce(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        y = (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
        # timm's layers may join what follows
        return self.act(self.drop(y)) if hasattr(self, "act") else y


def synchronise(model: nn.Module) -> nn.Module:
    """Give the model's batch norms the statistics of all ranks, if there are several."""
    if dist.is_initialized() and ranks.count() > 1:
        for module in model.modules():
            kind = type(module)
            if isinstance(module, nn.BatchNorm2d) and not isinstance(module, OverRanks):
                module.__class__ = type(f"OverRanks{kind.__name__}", (OverRanks, kind), {})
    return model


# ------------------------------------------------------------------------------ labelled pixels


def cross_entropy(logits: Tensor, classes: Tensor, cfg: Config) -> Tensor:
    """The mean over labelled pixels, or with `ohem` over the hard ones of them; of several ranks a
    share. 0 where none is labelled.

    logits: (B, C, h, w), resized to the (B, H, W) classes, IGNORE where there is none.
    """
    logits = resize(logits.float(), classes.shape[-2:])
    pixels = F.cross_entropy(logits, classes, ignore_index=IGNORE, reduction="none")
    kept = classes != IGNORE
    if cfg.ohem:
        kept = hard_pixels(pixels.detach(), kept, cfg.ohem, cfg.ohem_kept)
    return (pixels * kept).sum() / ranks.total(kept.sum()).clamp(min=1)


def hard_pixels(pixels: Tensor, labelled: Tensor, threshold: float, least: int) -> Tensor:
    """Online hard example mining: labelled pixels whose true class has less than `threshold`, or
    the `least` hardest if these are more; all, where fewer are labelled.

    pixels: cross-entropies of the pixels of a rank.   labelled: bool, of the same shape.
    """
    own = pixels[labelled]
    if len(own) <= least:
        return labelled
    bar = own.kthvalue(len(own) - least + 1).values  # of the last of the hardest
    return labelled & ((pixels > -torch.log(pixels.new_tensor(threshold))) | (pixels >= bar))
