"""The foundation models: OpenCLIP, timm ConvNeXts and ResNets, SAM; and where their weights come
from.

A file that the user names comes first, then the cache, then a download whose SHA-256 is checked:
SAM's against the sums below, those of the Hugging Face hub against the sums that the hub states.
Nothing in a file is ever executed.
`mini` stands for the models of the miniature world, `random` for weights of noise.
"""

import importlib
import os
from pathlib import Path
from typing import Callable

import torch

from config import TAGS, Config
from ground import tensor_files
from ground.errors import UserError
from pretrained.fetching import fetch, hub_file

# SAM's weights, text embeddings of real CLIPs
CACHE = Path(os.environ.get("DEARLI_CACHE", Path.home() / ".cache" / "dearli"))
SAM_ADDRESS = "https://dl.fbaipublicfiles.com/segment_anything"
SAM_FILES = {  # file and its SHA-256
    name: (file, digest)
    for name, file, digest in (
        line.split()
        for line in """
vit_h sam_vit_h_4b8939.pth a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e
vit_l sam_vit_l_0b3195.pth 3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622
vit_b sam_vit_b_01ec64.pth ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912
""".strip().splitlines()
    )
}
# names on the hub
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")


def miniature(name: str):
    """The module `mini.NAME` of the miniature world, whose models stand in for those of this file.

    By name, when it is asked for: those modules stand above this one, and are made of what it
        offers.
    """
    return importlib.import_module(f"mini.{name}")


def is_timm(backbone: str) -> bool:
    """True for a timm ConvNeXt or ResNet (`convnext_base.fb_in1k`, `resnet50.tv_in1k`), False for
    `mini` and OpenCLIP's.

    Raises: UserError for anything else.
    """
    if backbone == "mini":
        return False
    import open_clip
    import timm

    if backbone.startswith(("convnext", "resnet")):
        if backbone in open_clip.list_models():
            return False
        try:
            if timm.is_model(backbone) and timm.get_pretrained_cfg(backbone).hf_hub_id:
                return True
        except (RuntimeError, AttributeError):  # a tag or a model without weights
            pass
    raise UserError(
        f"unknown backbone '{backbone}'; available: mini, an OpenCLIP ConvNeXt "
        f"({', '.join(TAGS)}), or a timm ConvNeXt or ResNet such as convnext_base.fb_in1k, "
        f"resnet50.tv_in1k (ImageNet-1k) and convnext_base.fb_in22k (ImageNet-21k)"
    )


def load_clip(cfg: Config, weights: dict | None = None) -> tuple[torch.nn.Module, Callable]:
    """The OpenCLIP model of the configuration, in eval mode, and its tokenizer, on the CPU.

    weights: CLIP's, which a checkpoint brought along.
    """
    torch.manual_seed(cfg.seed)
    pretrained = "random" if weights is not None else cfg.pretrained
    load = _mini_clip if cfg.backbone == "mini" else _open_clip
    clip, tokenize = load(cfg.backbone, pretrained)
    if weights is not None:
        try:
            clip.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint holds another CLIP than --backbone {cfg.backbone}: "
                f"{_short(error, 200)}"
            ) from None
    return clip.eval(), tokenize  # OpenCLIP hands models over in training mode, with drop path


def _mini_clip(backbone: str, pretrained: str) -> tuple[torch.nn.Module, Callable]:
    mini_clip = miniature("mini_clip")
    if pretrained == "random":
        return mini_clip.build(), mini_clip.tokenize
    return mini_clip.load(pretrained or mini_clip.WEIGHTS), mini_clip.tokenize


def _open_clip(backbone: str, pretrained: str) -> tuple[torch.nn.Module, Callable]:
    """pretrained: a file, a tag of OpenCLIP's, empty for the usual one, or `random`."""
    import open_clip

    file = None
    if pretrained != "random":
        file = Path(pretrained)
        if not file.is_file():
            file = _clip_file(backbone, pretrained)
    # OpenAI's own weights are of another GELU, which a file does not say
    quick = bool(open_clip.get_pretrained_cfg(backbone, pretrained).get("quick_gelu"))

    def make():
        weights = file and str(file)
        return open_clip.create_model(backbone, pretrained=weights, force_quick_gelu=quick)

    clip = _filled(make, backbone, file)
    return clip, open_clip.get_tokenizer(backbone)


def _clip_file(backbone: str, tag: str) -> Path:
    import open_clip

    tag = tag or TAGS.get(backbone, "")
    source = open_clip.get_pretrained_cfg(backbone, tag).get("hf_hub", "") if tag else ""
    if not source.strip("/"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(backbone)) or "none"
        raise UserError(
            f"{backbone}: no file and no OpenCLIP weights are called '{tag}'; available for "
            f"--pretrained: {tags}, a file, or `random`"
        )
    return hub_file(source.strip("/"), CLIP_FILES, backbone)


class ResNetTrunk(torch.nn.Module):
    """A timm ResNet with the parts of a ConvNeXt: stem, four stages (strides 4, 8, 16, 32), head.

    Its batch norms are fixed scales and shifts, for ever (as in Mask2Former, trained or not).
    """

    def __init__(self, resnet: torch.nn.Module):
        super().__init__()
        from timm.layers import freeze_batch_norm_2d

        resnet = freeze_batch_norm_2d(resnet)
        self.stem = torch.nn.Sequential(resnet.conv1, resnet.bn1, resnet.act1, resnet.maxpool)
        layers = resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4
        self.stages = torch.nn.ModuleList(layers)
        self.head = torch.nn.Identity()
        self.feature_info = resnet.feature_info[1:]


def load_timm(cfg: Config) -> torch.nn.Module:
    """The timm ConvNeXt or ResNet of the configuration without its classifier, in eval mode, on the
    CPU.
    """
    is_resnet = cfg.backbone.startswith("resnet")
    model = _timm(cfg, "fc." if is_resnet else "head.fc.")
    return ResNetTrunk(model) if is_resnet else model


def _timm(cfg: Config, classifier: str) -> torch.nn.Module:
    """classifier: beginning of the names that are left out."""
    import timm
    from timm.models.convnext import checkpoint_filter_fn

    torch.manual_seed(cfg.seed)
    model = timm.create_model(cfg.backbone, num_classes=0).eval()
    if cfg.pretrained == "random":
        return model
    if cfg.pretrained:
        file = Path(cfg.pretrained)
    else:
        file = hub_file(timm.get_pretrained_cfg(cfg.backbone).hf_hub_id, TIMM_FILES, cfg.backbone)
    # Not by timm's own loading: without a classifier it takes any file, missing weights or not, and
    # old versions execute pickles.
    weights = tensor_files.read_weights(
        file, f"--pretrained names a file of {cfg.backbone}, or `random`"
    )
    # the original release wraps them
    weights = weights.get("model", weights.get("state_dict", weights))

    def fill():
        # of a ConvNeXt there are files with other names
        named = checkpoint_filter_fn(weights, model) if classifier == "head.fc." else weights
        model.load_state_dict({n: w for n, w in named.items() if not n.startswith(classifier)})
        return model

    return _filled(fill, cfg.backbone, file)


def load_maps(cfg: Config) -> torch.nn.Module:
    """A timm network that gives its feature maps, with the last stages dilated to
    `cfg.output_stride`, on the CPU. `random`: untrained.
    """
    import timm

    name = cfg.backbone
    if not timm.is_model(name):
        raise UserError(
            f"unknown backbone '{name}' of --network deeplab; available: mini, and timm's such as "
            "resnet50.tv_in1k, resnet101.tv_in1k, xception65.tf_in1k, resnet18.tv_in1k"
        )
    torch.manual_seed(cfg.seed)
    try:
        model = timm.create_model(name, features_only=True, output_stride=cfg.output_stride)
        reduction = model.feature_info.reduction()[-4:]
    except Exception as error:  # of networks without maps, or whose stages cannot be dilated
        raise UserError(
            f"backbone {name} gives no maps of stride {cfg.output_stride} ({_short(error, 120)}); "
            "expected a convolutional network such as resnet50.tv_in1k"
        ) from None
    if reduction[0] != 4 or reduction[-1] != cfg.output_stride:
        raise UserError(
            f"backbone {name} has maps of strides {reduction}, expected 4 to {cfg.output_stride}"
        )
    if cfg.pretrained == "random":
        return model
    if cfg.pretrained:
        file = Path(cfg.pretrained)
    else:
        file = hub_file(timm.get_pretrained_cfg(name).hf_hub_id, TIMM_FILES, name)
    weights = tensor_files.read_weights(file, f"--pretrained names a file of {name}, or `random`")

    def fill():
        own = model.state_dict()
        # its classifier is left out; timm joins the first two names of what it takes apart
        renamed = {n if n in own else n.replace(".", "_", 1): w for n, w in weights.items()}
        model.load_state_dict({n: w for n, w in renamed.items() if n in own})
        return model

    return _filled(fill, name, file)


def _filled(make: Callable, backbone: str, file: Path | None) -> torch.nn.Module:
    try:
        return make()
    except Exception as error:  # the libraries have a dozen types, with pages of text, for this
        raise UserError(
            f"{file}: not weights of {backbone}, or damaged ({type(error).__name__}: "
            f"{_short(error, 160)})"
        ) from None


def _short(error: Exception, length: int) -> str:
    return f"{' '.join(str(error).split())[:length]} ..."


def load_sam(
    cfg: Config, precision: torch.dtype = torch.float32
) -> Callable[[torch.device], object]:
    """device -> what draws masks: the SAM and thresholds of the configuration, or regions."""
    if cfg.sam == "regions":
        from pretrained.regions import StableRegions

        return lambda device: StableRegions()
    if cfg.sam != "mini" and cfg.sam not in SAM_FILES:
        raise UserError(
            f"unknown SAM '{cfg.sam}'; available: mini, regions, {', '.join(SAM_FILES)}"
        )
    from pretrained.sam import MaskGenerator

    sam = _mini_sam(cfg) if cfg.sam == "mini" else _segment_anything(cfg)
    return lambda device: MaskGenerator(sam.eval().to(device), cfg, precision)


def _mini_sam(cfg: Config) -> torch.nn.Module:
    mini_sam = miniature("mini_sam")
    return mini_sam.load(cfg.sam_weights or mini_sam.WEIGHTS)


def _segment_anything(cfg: Config) -> torch.nn.Module:
    from segment_anything import sam_model_registry

    name, digest = SAM_FILES[cfg.sam]
    if cfg.sam_weights:
        file = Path(cfg.sam_weights)
    else:
        otherwise = "or name it with --sam-weights FILE"
        file = fetch(CACHE / name, f"{SAM_ADDRESS}/{name}", digest, otherwise)
    hint = f"expected the {cfg.sam} checkpoint of Segment Anything, {name}"
    return tensor_files.load_foundation(sam_model_registry[cfg.sam](), file, hint)


def mask_settings(cfg: Config) -> dict:
    """`about` of what `load_sam(cfg)` makes, as far as it is known without weights."""
    if cfg.sam == "regions":
        from pretrained.regions import StableRegions

        return StableRegions.about
    from pretrained.sam import settings

    return settings(cfg)
