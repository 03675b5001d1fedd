"""Features on a plane by t-SNE (van der Maaten and Hinton, JMLR 2008), as scikit-learn computes it.

Shapes: n images, d width.
"""

from __future__ import annotations

import numpy as np

from ..errors import needed

SEED = 0
_PERPLEXITY = 30.0


def perplexity_of(count: int) -> float:
    """Return the perplexity for a number of images: 30, or as much as few images allow."""
    return min(_PERPLEXITY, (count - 1) / 3)


def on_a_plane(values: np.ndarray, *, what: str) -> np.ndarray:
    """Return places (n, 2) of features (n, d), the same for the same features.

    Args:
        values: Float64.
        what: What needs it, for the sentence where scikit-learn is missing.

    Raises:
        UserError: scikit-learn is missing.
    """
    embed = needed("sklearn.manifold", what).TSNE
    method = embed(n_components=2, perplexity=perplexity_of(len(values)), init="pca", random_state=SEED)
    return np.asarray(method.fit_transform(values), dtype=float)


__all__ = ["SEED", "on_a_plane", "perplexity_of"]
