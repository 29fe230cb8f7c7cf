"""A segmenter on a pretrained backbone: the image tower of a CLIP with the words of the classes, or
a timm network of four maps.
"""

import torch

from clip_ensemble import (
    PIXEL_MEAN,
    PIXEL_STD,
    TEMPLATES,
    Backbone,
    ClipBackbone,
    Vocabulary,
    text_embeddings,
)
from config import Config
from deeplab import DeepLab, TimmMaps, synchronise
from ground import tensor_files
from ground.errors import UserError
from ground.identity import of_tensors
from model import Segmenter
from pretrained import foundation
from readers.ground_truth import Taxonomy


def build(
    cfg: Config, taxonomy: Taxonomy, device: torch.device, clip_weights: dict | None = None
) -> Segmenter:
    """A segmenter with a random decoder (by seed).

    clip_weights: of a whole CLIP that a checkpoint brings along, instead of those that the
    configuration names.
    Raises: UserError if weights cannot be had, or a backbone without text tower is asked for its
        opinion on classes.
    """
    if foundation.is_timm(cfg.backbone):
        if cfg.has_ensemble or clip_weights is not None:
            raise UserError(
                f"backbone {cfg.backbone} has no text tower: it needs --classifier linear, and "
                "--method ssl in the semi-supervised stage"
            )
        backbone = Backbone(foundation.load_timm(cfg), frozen=not cfg.train_backbone)
        vocabulary = None
    else:
        clip, vocabulary = load_clip(cfg, taxonomy, device, clip_weights)
        backbone = ClipBackbone(clip, frozen=not cfg.train_backbone)
    torch.manual_seed(cfg.seed)
    return Segmenter(backbone, vocabulary, cfg, len(taxonomy)).to(device)


def load_clip(
    cfg: Config, taxonomy: Taxonomy, device: torch.device, weights: dict | None = None
) -> tuple[torch.nn.Module, Vocabulary]:
    """The CLIP of the configuration, and what it reads of the classes. weights: as in `build`."""
    clip, tokenize = foundation.load_clip(cfg, weights)
    lasting = weights is None and cfg.pretrained != "random" and cfg.backbone != "mini"
    return clip, _vocabulary(clip, tokenize, cfg.backbone, taxonomy, device, lasting)


def build_deeplab(
    cfg: Config, taxonomy: Taxonomy, device: torch.device, projector: bool = False
) -> DeepLab:
    """A DeepLabv3+ with random heads (by seed) on the backbone of the configuration: that of the
    mini CLIP, or a timm network by name.

    Raises: UserError if its weights cannot be had.
    """
    if cfg.backbone == "mini":
        clip, _ = foundation.load_clip(cfg)
        clip.requires_grad_(True)
        backbone = Backbone(clip.visual.trunk, not cfg.train_backbone, PIXEL_MEAN, PIXEL_STD)
    else:
        backbone = TimmMaps(foundation.load_maps(cfg))
        backbone.requires_grad_(cfg.train_backbone)
    torch.manual_seed(cfg.seed)
    return synchronise(DeepLab(backbone, cfg, len(taxonomy), projector).to(device))


def _vocabulary(clip, tokenize, name: str, taxonomy, device, lasting: bool) -> Vocabulary:
    """The text embeddings of all classes. lasting: kept on disk, by what is in the text tower and
    not by its name.
    """
    names = [name for names in taxonomy.synonyms for name in names]

    def embed() -> torch.Tensor:
        return text_embeddings(clip.to(device), tokenize, names)

    if lasting:
        weights = clip.state_dict()
        tower = {k: value for k, value in weights.items() if not k.startswith("visual.")}
        key = ["text", name, of_tensors(tower), TEMPLATES, names]
        embeddings = tensor_files.cached(foundation.CACHE, key, embed)
    else:
        embeddings = embed()
    return Vocabulary(embeddings, [len(synonyms) for synonyms in taxonomy.synonyms])
