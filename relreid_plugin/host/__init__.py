"""The only door to torchreid.

Importing this package imports torchreid, in whichever layout it is installed, and raises
:class:`relreid_plugin.errors.UserError` when it is not. :func:`apply_patches` mends the host's defects,
:func:`register_datasets` adds the plug-in's data sets, :func:`build_datamanager` builds the host's data manager from a
configuration.
"""

from __future__ import annotations

from ..data.transforms import reset_transforms
from .checkpoint import load_host_checkpoint, load_matching_weights
from .datamanager import build_datamanager, build_sampler, cap_workers, complete_manager, make_loader
from .datasets import register_datasets, resolve_dataset
from .layout import HOST, Host, find_host
from .opening import open_dataset
from .optimizer import build_optimizer, build_scheduler
from .patches import apply_patches, clean_worker_error, worker_init
from .registry import (
    available_image_datasets,
    available_models,
    available_video_datasets,
    build_model,
    register_image_dataset,
    register_model,
)

LAYOUT = HOST.layout
VERSION = HOST.version
data = HOST.data
engine = HOST.engine
models = HOST.models
optim = HOST.optim
metrics = HOST.metrics
utils = HOST.utils
losses = HOST.losses

__all__ = [
    "HOST",
    "LAYOUT",
    "VERSION",
    "Host",
    "apply_patches",
    "available_image_datasets",
    "available_models",
    "available_video_datasets",
    "build_datamanager",
    "build_model",
    "build_optimizer",
    "build_sampler",
    "build_scheduler",
    "cap_workers",
    "complete_manager",
    "clean_worker_error",
    "data",
    "engine",
    "find_host",
    "load_host_checkpoint",
    "load_matching_weights",
    "losses",
    "make_loader",
    "metrics",
    "models",
    "open_dataset",
    "optim",
    "register_datasets",
    "register_image_dataset",
    "register_model",
    "reset_transforms",
    "resolve_dataset",
    "utils",
    "worker_init",
]
