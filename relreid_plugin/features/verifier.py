"""Same or not: a score, a probability and a threshold, calibrated on labelled features and kept as JSON.

Shape letters: n pairs, d width.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.samefile import file_numbers
from ..errors import UserError, did_you_mean, needed
from ..files import write_json
from ..metrics.neighbours import normalise
from ..metrics.verification import RATES, cosine_scores, verify
from ..reading import read_json
from .pairs import test_set
from .sets import Features, TestFeatures, common_model

FORMAT = 1
METHODS = ("isotonic", "logistic")
FILE = "verifier.json"
"""Name of the file in a run's folder."""
_BINS = 4096  # of the cosine, for the calibration alone


def junk_pairs(data: TestFeatures) -> Any:
    """Return which pairs of some queries are none, (B, G) bool: one identity and camera, or the query's own file."""
    query, gallery = data.query, data.gallery
    numbers = file_numbers(query.paths, gallery.paths) if query.paths and gallery.paths else None

    def junk(rows: slice) -> np.ndarray:
        own = (query.pids[rows, None] == gallery.pids[None]) & (query.camids[rows, None] == gallery.camids[None])
        return own if numbers is None else own | (numbers[0][rows, None] == numbers[1][None])

    return junk


@dataclass(frozen=True)
class Verifier:
    """Tells whether two features are of one identity.

    Attributes:
        method: ``isotonic`` or ``logistic``.
        parameters: Of the calibration: ``slope`` and ``offset``, or the ``scores`` and ``odds`` of its steps.
        threshold: Smallest score that counts as the same.
        false_match_rate: Share of pairs of two identities that reach it, in the calibration.
        true_match_rate: Share of pairs of one identity that reach it.
        rates: Rate asked for to threshold, false-match and true-match rate.
        eer: Equal error rate with its interval.
        pairs: Pairs of one identity and of two that it was calibrated on.
        identities: Their query identities.
        model: Fingerprint of what made the features, weights and how pictures are read; empty: unknown.
        dim: Their width d.
        source: Where they came from.

    A probability is that of a pair which was as likely one identity as two before it was looked at.
    """

    method: str
    parameters: dict[str, Any]
    threshold: float
    false_match_rate: float
    true_match_rate: float
    rates: dict[str, list[float]]
    eer: list[float]
    pairs: list[int]
    identities: int
    model: str = ""
    dim: int = 0
    source: str = ""

    @classmethod
    def fit(
        cls,
        query: Features,
        gallery: Features,
        *,
        method: str = "isotonic",
        false_match_rate: float = 1e-3,
        model: str = "",
    ) -> Verifier:
        """Calibrate on all pairs of labelled features, whose identities the model was not trained on.

        Args:
            query: Q features.
            gallery: G features; may be the same ones.
            method: ``isotonic`` or ``logistic`` regression of scikit-learn, both classes weighted alike.
            false_match_rate: That the threshold shall keep.
            model: Fingerprint of what made the features; empty: what they say themselves.

        Raises:
            UserError: No pairs of one identity or of two, another method or rate, or scikit-learn is not installed.
        """
        if method not in METHODS:
            raise UserError(f"there is no calibration '{method}'{did_you_mean(method, METHODS)}")
        _check_rate(false_match_rate)
        if query is gallery and not query.paths:  # the same row is the same image
            places = [f"row {row}" for row in range(len(query))]
            query = gallery = dataclasses.replace(query, paths=places)
        data, _ = test_set(query, gallery)
        units = normalise(data.query.features), normalise(data.gallery.features)
        junk, scores = junk_pairs(data), cosine_scores(*units)
        wanted = sorted({*RATES, false_match_rate}, reverse=True)
        found = verify(scores, data.query.pids, data.gallery.pids, junk=junk, rates=wanted)
        if found.negatives * false_match_rate < 1:
            print(
                f"note: {found.negatives} pairs of two identities cannot show a false-match rate of {false_match_rate:g}; "
                "the threshold lets none of them pass."
            )
        counts = _histograms(scores, data, junk)
        threshold, false, true = found.threshold(false_match_rate)
        return cls(
            method,
            _calibrate(method, *counts),
            threshold,
            false,
            true,
            {f"{rate:g}": list(found.threshold(rate)) for rate in wanted},
            [found.eer.value, found.eer.low, found.eer.high],
            [found.positives, found.negatives],
            found.identities,
            model or common_model([query, gallery]),
            query.dim,
            query.source,
        )

    # --- asking -------------------------------------------------------------------------------------------------------
    def scores(self, first: Tensor | np.ndarray, second: Tensor | np.ndarray) -> np.ndarray:
        """Return the cosine of every pair: (n, d) and (n, d) -> (n,) float32.

        Raises:
            UserError: Another width than that of the calibration, or other numbers of rows.
        """
        one, two = (torch.as_tensor(part).float().reshape(-1, torch.as_tensor(part).shape[-1]) for part in (first, second))
        if one.shape != two.shape or (self.dim and one.shape[1] != self.dim):
            raise UserError(
                f"features of shape {tuple(one.shape)} and {tuple(two.shape)} cannot be compared by a verifier of width "
                f"{self.dim}; both need its model."
            )
        return (normalise(one) * normalise(two)).sum(dim=1).numpy()

    def probability(self, scores: Any, *, prior: float = 0.5) -> np.ndarray:
        """Return the probability that pairs are of one identity.

        Args:
            scores: (n,) cosines.
            prior: How likely that was before they were looked at.

        Raises:
            UserError: A prior that is not between 0 and 1.
        """
        if not 0 < prior < 1:
            raise UserError(f"the prior is {prior}; it must lie between 0 and 1.")
        values = np.asarray(scores, np.float64)
        if self.method == "logistic":
            logit = self.parameters["slope"] * values + self.parameters["offset"]
        else:
            steps = np.clip(np.interp(values, self.parameters["scores"], self.parameters["odds"]), 1e-9, 1 - 1e-9)
            logit = np.log(steps) - np.log1p(-steps)
        return 1 / (1 + np.exp(-np.clip(logit + math.log(prior / (1 - prior)), -700, 700)))

    def same(self, scores: Any, *, threshold: float | None = None) -> np.ndarray:
        """Return which pairs (n,) score at least the threshold."""
        return np.asarray(scores) >= (self.threshold if threshold is None else threshold)

    # --- keeping ------------------------------------------------------------------------------------------------------
    def save(self, path: Path | str) -> None:
        """Write it as JSON, atomically."""
        write_json(Path(path), {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path | str, *, model: str = "") -> Verifier:
        """Read it.

        Args:
            path: The file.
            model: Fingerprint of what makes the features to compare; empty: any. A file that knows none is taken, and
                that is said.

        Raises:
            UserError: Missing, damaged, or of another model.
        """
        path = Path(path)
        way_out = "calibrate again by 'relreid calibrate'"
        if not path.is_file():
            raise UserError(f"there is no verifier '{path}'; {way_out.replace(' again', '')}.")
        found = read_json(path, what="verifier", remedy=way_out)
        if found.pop("format", None) != FORMAT:
            raise UserError(f"'{path}' is no verifier of this version; {way_out}.")
        try:
            made = cls(**found)
            numbers = [made.threshold, made.false_match_rate, made.true_match_rate, *made.probability([-1.0, 0.0, 1.0])]
            if made.method not in METHODS or not all(math.isfinite(float(number)) for number in numbers):
                raise ValueError("not finite")
        except (TypeError, ValueError, KeyError, AttributeError):
            raise UserError(f"'{path}' is damaged (entries of the verifier are missing or wrong); {way_out}.") from None
        if model and made.model and made.model != model:
            raise UserError(
                f"'{path}' was calibrated on features of another model, or of pictures read in another way ({made.model}, "
                f"not {model}); {way_out}."
            )
        if model and not made.model:
            print(
                f"note: '{path}' does not say on which model's features it was calibrated; {way_out} to have that checked."
            )
        return made

    def sentence(self) -> str:
        """Return what it is and on what it was calibrated."""
        return (
            f"threshold {self.threshold:.4f}: false-match rate {self.false_match_rate:.2g}, true-match rate "
            f"{self.true_match_rate:.1%}; EER {self.eer[0]:.1%} [{self.eer[1]:.1%}, {self.eer[2]:.1%}]; {self.method}, "
            f"{self.pairs[0]:,} pairs of one identity and {self.pairs[1]:,} of two, {self.identities} identities"
        )


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise UserError(f"the false-match rate is {rate}; it must lie between 0 and 1.")


def _histograms(scores: Any, data: TestFeatures, junk: Any) -> tuple[np.ndarray, np.ndarray]:
    """(2, bins) counts of pairs of two identities and of one, and the middle of every bin."""
    counts = np.zeros((2, _BINS), np.int64)
    step = max(1, 2**22 // len(data.gallery))
    for start in range(0, len(data.query), step):
        rows = slice(start, start + step)
        place = np.clip(((scores(rows).numpy() + 1) / 2 * _BINS).astype(np.int64), 0, _BINS - 1)
        same, pairs = data.query.pids[rows, None] == data.gallery.pids[None], ~junk(rows)
        for line, chosen in zip(counts, (~same & pairs, same & pairs)):
            line += np.bincount(place[chosen], minlength=_BINS)
    return counts, (np.arange(_BINS) + 0.5) / _BINS * 2 - 1


def _calibrate(method: str, counts: np.ndarray, middles: np.ndarray) -> dict[str, Any]:
    """Parameters of a calibration with both classes of the same weight."""
    weights = counts / counts.sum(axis=1, keepdims=True) / 2
    there = weights.sum(axis=0) > 0
    if method == "isotonic":
        isotonic = needed("sklearn.isotonic", "the calibration of a verifier")
        share = weights[1, there] / weights[:, there].sum(axis=0)
        fitted = isotonic.IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        fitted.fit(middles[there], share, sample_weight=weights[:, there].sum(axis=0))
        return {"scores": fitted.X_thresholds_.tolist(), "odds": fitted.y_thresholds_.tolist()}
    linear = needed("sklearn.linear_model", "the calibration of a verifier")
    x = np.concatenate([middles, middles])[:, None]
    y = np.repeat([0, 1], len(middles))
    weight = weights.reshape(-1)
    fitted = linear.LogisticRegression(C=1e6, max_iter=1000, tol=1e-8)
    fitted.fit(x[weight > 0], y[weight > 0], sample_weight=weight[weight > 0] * 1000)
    return {"slope": float(fitted.coef_[0, 0]), "offset": float(fitted.intercept_[0])}


__all__ = ["FILE", "METHODS", "Verifier", "junk_pairs"]
