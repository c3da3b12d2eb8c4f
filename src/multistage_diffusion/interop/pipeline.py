"""Multistage models as components of diffusers: import this module, and `DiffusionPipeline` loads converted folders.

Without it, diffusers loads them by the code that lies in them, if told `trust_remote_code=True`. With it, the classes
of this package are taken, and no code of a folder runs. diffusers is an extra, so nothing else in the package imports
this at its top.
"""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from multistage_diffusion.interop.multistage_pipeline import MultistagePipeline
from multistage_diffusion.interop.multistage_unet import MultistageUNet

__all__ = ["MultistagePipeline", "MultistageUNet"]

_load_config = DiffusionPipeline.load_config.__func__  # pyright: ignore[reportFunctionMemberAccess]


def _load_config_with_installed_classes(cls: Any, *arguments: Any, **options: Any) -> Any:
    """`DiffusionPipeline.load_config`, whose entries of converted folders name this package's classes."""
    loaded = _load_config(cls, *arguments, **options)
    config = loaded[0] if isinstance(loaded, tuple) else loaded
    if config.get("_class_name") in (["pipeline", MultistagePipeline.__name__], MultistagePipeline.__name__):
        config["_class_name"] = MultistagePipeline.__name__
        config["unet"] = [MultistageUNet.__module__, MultistageUNet.__name__]
    return loaded


diffusers.MultistagePipeline = MultistagePipeline  # pyright: ignore[reportAttributeAccessIssue]
DiffusionPipeline.load_config = classmethod(_load_config_with_installed_classes)  # pyright: ignore
