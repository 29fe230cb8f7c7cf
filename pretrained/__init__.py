"""CLIP, timm and SAM."""
