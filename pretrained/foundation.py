"""The foundation models: OpenCLIP and timm ConvNeXt backbones and SAM, where their weights come from, and how they are checked.

A file that the user names comes first, then the cache, then a download whose SHA-256 is checked: SAM's against the sums below,
those of the Hugging Face hub against the sums that the hub states. Nothing in a file is ever executed.
`mini` stands for the models of the miniature world, `random` for weights of noise.
"""

import hashlib
import os
import re
import urllib.error
from pathlib import Path
from typing import Callable

import torch

from config import TAGS, Config
from ground import tensor_files
from ground.errors import UserError

CACHE = Path(
    os.environ.get("DEARLI_CACHE", Path.home() / ".cache" / "dearli")
)  # SAM's weights, text embeddings of real CLIPs
SAM_ADDRESS = "https://dl.fbaipublicfiles.com/segment_anything"
SAM_FILES = {  # file and its SHA-256
    "vit_h": (
        "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    "vit_l": (
        "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_b": (
        "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
}
CLIP_FILES, TIMM_FILES = (
    ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    ("model.safetensors", "pytorch_model.bin"),
)  # on the hub


def is_timm(backbone: str) -> bool:
    """True for a timm ConvNeXt (`convnext_base.fb_in1k`), False for `mini` and OpenCLIP models; UserError for anything else."""
    if backbone == "mini":
        return False
    import open_clip
    import timm

    if backbone.startswith("convnext") and backbone in open_clip.list_models():
        return False
    try:
        if (
            backbone.startswith("convnext")
            and timm.is_model(backbone)
            and timm.get_pretrained_cfg(backbone).hf_hub_id
        ):
            return True
    except (RuntimeError, AttributeError):  # a tag or a model without weights
        pass
    raise UserError(
        f"unknown backbone '{backbone}'; available: mini, an OpenCLIP ConvNeXt ({', '.join(TAGS)}), or a timm ConvNeXt such as "
        f"convnext_base.fb_in1k (ImageNet-1k) and convnext_base.fb_in22k (ImageNet-21k)"
    )


def load_clip(cfg: Config, weights: dict | None = None) -> tuple[torch.nn.Module, Callable]:
    """The OpenCLIP model of the configuration, in eval mode, and its tokenizer, on the CPU.

    weights: CLIP's, which a checkpoint brought along.
    """
    torch.manual_seed(cfg.seed)
    pretrained = "random" if weights is not None else cfg.pretrained
    if cfg.backbone == "mini":
        from mini import mini_clip

        clip, tokenize = (
            (
                mini_clip.build()
                if pretrained == "random"
                else mini_clip.load(pretrained or mini_clip.WEIGHTS)
            ),
            mini_clip.tokenize,
        )
    else:
        import open_clip

        file = (
            None
            if pretrained == "random"
            else Path(pretrained)
            if Path(pretrained).is_file()
            else _clip_file(cfg.backbone, pretrained)
        )
        clip = _made(
            lambda: open_clip.create_model(cfg.backbone, pretrained=file and str(file)),
            cfg.backbone,
            file,
        )
        tokenize = open_clip.get_tokenizer(cfg.backbone)
    if weights is not None:
        try:
            clip.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint holds another CLIP than --backbone {cfg.backbone}: {' '.join(str(error).split())[:200]} ..."
            ) from None
    return clip.eval(), tokenize  # OpenCLIP hands models over in training mode, with drop path


def load_timm(cfg: Config) -> torch.nn.Module:
    """The timm ConvNeXt of the configuration, without its ImageNet classifier, in eval mode, on the CPU."""
    import timm
    from timm.models.convnext import checkpoint_filter_fn

    torch.manual_seed(cfg.seed)
    model = timm.create_model(cfg.backbone, num_classes=0).eval()
    if cfg.pretrained == "random":
        return model
    file = (
        Path(cfg.pretrained)
        if cfg.pretrained
        else _hub_file(timm.get_pretrained_cfg(cfg.backbone).hf_hub_id, TIMM_FILES, cfg.backbone)
    )
    # Not by timm's own loading: without a classifier it takes any file, missing weights or not, and old versions execute pickles.
    weights = tensor_files.read_weights(
        file, f"--pretrained names a file of {cfg.backbone}, or `random`"
    )
    weights = weights.get(
        "model", weights.get("state_dict", weights)
    )  # the original release wraps them

    def fill():
        model.load_state_dict(
            {
                n: w
                for n, w in checkpoint_filter_fn(weights, model).items()
                if not n.startswith("head.fc.")
            }
        )
        return model

    return _made(fill, cfg.backbone, file)


def _made(make: Callable, backbone: str, file: Path | None) -> torch.nn.Module:
    try:
        return make()
    except Exception as error:  # the libraries raise a dozen types, with pages of text, for what is one thing to the user
        raise UserError(
            f"{file}: not weights of {backbone}, or damaged ({type(error).__name__}: {' '.join(str(error).split())[:160]} ...)"
        ) from None


def _clip_file(backbone: str, tag: str) -> Path:
    import open_clip

    tag = tag or TAGS.get(backbone, "")
    found = open_clip.get_pretrained_cfg(backbone, tag).get("hf_hub", "").strip("/") if tag else ""
    if not found:
        raise UserError(
            f"{backbone}: no file and no OpenCLIP weights are called '{tag}'; available for --pretrained: "
            f"{', '.join(open_clip.list_pretrained_tags_by_model(backbone)) or 'none'}, a file, or `random`"
        )
    return _hub_file(found, CLIP_FILES, backbone)


def _hub_file(repository: str, names: tuple[str, ...], backbone: str) -> Path:
    """One of the files of a Hugging Face repository, from the hub's own cache or by download; its SHA-256 is the one that the hub states."""
    from huggingface_hub import hf_hub_download

    for local in (True, False):  # what is there already needs no network
        for name in names:
            try:
                path = Path(hf_hub_download(repository, name, local_files_only=local))
            except Exception as error:  # the hub's client has a dozen types for "not here"
                why = type(error).__name__
                continue
            # In the hub's cache a file is a link to a blob that has the name of its SHA-256 (and may be a link into another store itself).
            expected = Path(os.readlink(path)).name if path.is_symlink() else ""
            if re.fullmatch("[0-9a-f]{64}", expected) and sha256(path) != expected:
                raise UserError(
                    f"{path.resolve()}: damaged, its SHA-256 is not {expected}; delete it and try again"
                )
            return path
    raise UserError(
        f"{backbone}: weights cannot be had ({why}); download https://huggingface.co/{repository}/resolve/main/{names[-1]} elsewhere and name "
        f"it with --pretrained FILE, or take --pretrained random with --train-backbone"
    )


def load_sam(
    cfg: Config, precision: torch.dtype = torch.float32
) -> Callable[[torch.device], object]:
    """device -> what draws masks: SAM, with the model and thresholds of the configuration, or stable regions."""
    if cfg.sam == "regions":
        from pretrained import regions

        return lambda device: regions.StableRegions()
    if cfg.sam != "mini" and cfg.sam not in SAM_FILES:
        raise UserError(
            f"unknown SAM '{cfg.sam}'; available: mini, regions, {', '.join(SAM_FILES)}"
        )
    from segment_anything import sam_model_registry

    from pretrained.sam import MaskGenerator

    if cfg.sam == "mini":
        from mini import mini_sam

        sam = mini_sam.load(cfg.sam_weights or mini_sam.WEIGHTS)
    else:
        name, digest = SAM_FILES[cfg.sam]
        file = (
            Path(cfg.sam_weights)
            if cfg.sam_weights
            else fetch(
                CACHE / name, f"{SAM_ADDRESS}/{name}", digest, "or name it with --sam-weights FILE"
            )
        )
        sam = tensor_files.load_foundation(
            sam_model_registry[cfg.sam](),
            file,
            f"expected the {cfg.sam} checkpoint of Segment Anything, {name}",
        )
    return lambda device: MaskGenerator(sam.eval().to(device), cfg, precision)


def mask_settings(cfg: Config) -> dict:
    """What `load_sam(cfg)` will say of its masks (`about`), as far as it is known without
    weights."""
    if cfg.sam == "regions":
        from pretrained import regions

        return regions.StableRegions.about
    from pretrained.sam import settings

    return settings(cfg)


def fetch(path: Path, address: str, digest: str, otherwise: str) -> Path:
    """A file of the cache, downloaded if it is not there; what is there and what arrives must have the SHA-256 `digest`.

    Raises: UserError naming file, place and address; then nothing is left behind.
    """
    if path.exists():
        if sha256(path) != digest:
            raise UserError(
                f"{path}: SHA-256 is {sha256(path)}, expected {digest}; delete it, and it is downloaded again from {address}"
            )
        return path
    print(f"{path}: downloading {address}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            address, str(path), hash_prefix=digest
        )  # to a temporary file first
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise UserError(
            f"{address}: cannot be fetched ({error}); download it elsewhere and put it to {path}, {otherwise}"
        ) from None
    return path


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
