"""Packages that the program needs: which there are, and what to do about one that there is not."""

import importlib.metadata
import sys

# Of every stage.
REQUIRED = ("torch", "torchvision", "numpy", "PIL", "scipy", "tqdm", "safetensors", "pycocotools")
# Of some stages, by the name that they are imported by: as pip installs them.
PACKAGES = {
    "open_clip": "open_clip_torch>=2.30",
    "timm": "timm>=1.0.12",
    "segment_anything": "segment-anything>=1.0",
    "huggingface_hub": "huggingface_hub",
    "tensorboard": "tensorboard",
    "onnx": "onnx onnxscript onnxruntime",  # the last one runs and checks the file
    "onnxscript": "onnx onnxscript onnxruntime",
}


def missing(package: str, stage: str) -> str | None:
    """What to do about a package that is not installed; None if it is none of ours."""
    if package in REQUIRED:
        return (
            f"{package} is not installed for {sys.executable}; activate the environment that the "
            "README makes (source .venv/bin/activate), or make it: python3 -m venv .venv && "
            ".venv/bin/python -m pip install -r requirements.txt"
        )
    if package in PACKAGES:
        wanted = " ".join(f"'{name}'" for name in PACKAGES[package].split())
        return (
            f"{package} is not installed, and --stage {stage} needs it; python -m pip install "
            f"{wanted}"
        )
    return None


def version(program: str) -> str:
    """This program (its version), Python and the libraries that decide on results; none of them is
    imported.
    """
    parts = [f"dearli {program}", f"python {sys.version.split()[0]}"]
    for package in ("torch", "torchvision"):
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{package} not installed")
    return ", ".join(parts)
