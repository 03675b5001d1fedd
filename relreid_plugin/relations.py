"""Features that refine each other by a trained relation encoder. No host is needed.

Shape letters: Q queries, G gallery images, d width.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .engine.evaluator import EvaluationOptions, Evaluator
from .errors import UserError
from .features.pairs import both_have_cameras
from .features.sets import TestFeatures
from .functions import Labels, Source, as_pair
from .magformer.loading import encoder_of_run


@torch.no_grad()
def refine(
    query: Source,
    gallery: Source,
    *,
    encoder: Any,
    cameras: tuple[Labels, Labels] | None = None,
    protocol: str = "inductive",
) -> TestFeatures:
    """Return queries and gallery with refined features, to be scored by cosine.

    Args:
        query: Q queries: features, an array, or a file; of the image model that the encoder was trained behind.
        gallery: G images.
        encoder: A run's folder, or a :class:`~relreid_plugin.magformer.encoder.RelationEncoder`. A run on given features
            takes features as they were given to it.
        cameras: Those of both, with arrays that have any.
        protocol: ``inductive``: every query is alone with the gallery; ``transductive``: all look at each other.

    Raises:
        UserError: No such encoder, features of another width, cameras on one side alone, or what does not fit.
    """
    if protocol not in ("inductive", "transductive"):
        raise UserError(f"protocol is '{protocol}'; valid ones: inductive, transductive.")
    first, second = as_pair(query, gallery, None, cameras)
    if isinstance(encoder, (str, Path)):
        encoder, head = encoder_of_run(encoder)
        if head is not None:
            first, second = (replace(part, features=head(part.features)) for part in (first, second))
    if first.dim != encoder.dim:
        raise UserError(
            f"features have width {first.dim} and the relation encoder {encoder.dim}; both need one image model."
        )
    if not both_have_cameras(first, second):  # as runs have it
        first = replace(first, camids=first.camids * 0)
        second = replace(second, camids=second.camids * 0 + 1)
    evaluator = Evaluator("features", TestFeatures(first, second), options=EvaluationOptions(), parameters=0)
    refined = evaluator.refined_features(encoder, protocol)
    return TestFeatures(replace(first, features=refined[0]), replace(second, features=refined[1]))


__all__ = ["refine"]
