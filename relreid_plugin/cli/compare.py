"""``relreid compare`` and ``relreid calibrate``: whether pictures show the same one, and the threshold that says so."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import number
from .command import Command, add_overrides
from .naming import MODEL, add_naming, naming

if TYPE_CHECKING:
    from ..features.verifier import Verifier

METHODS = ("isotonic", "logistic")
"""Those of :data:`relreid_plugin.features.verifier.METHODS`, written here so that ``--help`` needs no torch."""
_HELD_OUT = ("val-query.pt", "val-gallery.pt")
_share = number(0, 1, above=True, below=True)


def _calibration_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, default="isotonic", help="score to probability (default: isotonic)")
    parser.add_argument(
        "--fmr", metavar="RATE", type=_share, default=1e-3, help="false-match rate of the threshold (default: 0.001)"
    )


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", help="run whose held-out identities are taken, and that keeps it")
    parser.add_argument(
        "--on",
        metavar="FILE",
        nargs="+",
        help="labelled features of the model instead: one file, or queries and gallery",
    )
    parser.add_argument("--out", metavar="FILE", help="where it is written (default: verifier.json in RUN)")
    _calibration_arguments(parser)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="IMAGE", help="a picture")
    parser.add_argument("others", metavar="IMAGE", nargs="+", help="pictures, or folders of them, that it is compared with")
    parser.add_argument("--model", metavar="MODEL", required=True, help=MODEL)
    parser.add_argument("--verifier", metavar="FILE", help="of 'relreid calibrate' (default: verifier.json in RUN)")
    parser.add_argument("--threshold", metavar="SCORE", type=number(-1, 1), help="smallest score that counts as the same")
    parser.add_argument("--prior", type=_share, default=0.5, help="how likely a pair is one beforehand (default: 0.5)")
    parser.add_argument("--json", metavar="FILE", help="write scores, probabilities and answers there")
    add_naming(parser)
    add_overrides(parser)


def _pair(run: str | None, on: list[str] | None) -> tuple[Any, Any]:
    """Labelled features to calibrate on."""
    from ..errors import UserError
    from ..features import read

    if on:
        if len(on) > 2:
            raise UserError("command line: --on takes one file of features, or queries and gallery.")
        parts = [read(name) for name in on]
        if len(parts) == 1 and parts[0].splits is not None:
            parts = [parts[0].part("query"), parts[0].part("gallery")]
        return parts[0], parts[-1]
    if not run:
        raise UserError("command line: name a run, or labelled features by --on.")
    places = [Path(run) / "bank" / name for name in _HELD_OUT]
    if not all(place.is_file() for place in places):
        raise UserError(
            f"run '{run}' keeps no features of held-out identities ('{places[0]}' does not exist); train it with "
            "'train.val_fraction' and a second stage, or name labelled features by 'relreid calibrate --on FILE'."
        )
    return read(places[0]), read(places[1])


def _fingerprint(run: str) -> str:
    """What a run's features are told by; empty for a run on given features, which sees no pictures."""
    from ..config.defaults import load_config
    from ..search import FeatureExtractor

    if load_config(Path(run) / "config.yml").data.type == "features":
        return ""
    return FeatureExtractor(run).fingerprint


def calibrated(run: str | None, on: list[str] | None, out: Path, *, method: str, rate: float, model: str = "") -> Verifier:
    """Calibrate a verifier and write it.

    Args:
        run: Folder of a run with held-out identities, or ``None``.
        on: Files of labelled features instead.
        out: Where it is written.
        method: ``isotonic`` or ``logistic``.
        rate: False-match rate of its threshold.
        model: Fingerprint of the run's features; empty: it is looked up.

    Raises:
        UserError: The features are not labelled, or not those of the run's model.
    """
    from ..errors import UserError
    from ..features.verifier import Verifier

    query, gallery = _pair(run, on)
    model = (model or _fingerprint(run)) if run else ""
    for part in (query, gallery):
        if model and part.model not in ("", model):
            raise UserError(
                f"{part.called} were made by another model ({part.model}) than run '{run}' ({model}); "
                "extract them by the run."
            )
    made = Verifier.fit(query, gallery, method=method, false_match_rate=rate, model=model)
    made.save(out)
    print(f"{out}: {made.sentence()}")
    return made


def _calibrate(args: argparse.Namespace) -> None:
    from ..errors import UserError

    if not args.run and not args.out:
        raise UserError("command line: name a run, or where the verifier is written by --out.")
    if args.run and not (Path(args.run) / "config.yml").is_file():
        raise UserError(f"'{args.run}' holds no run ('{Path(args.run) / 'config.yml'}' does not exist).")
    out = Path(args.out) if args.out else Path(args.run) / "verifier.json"
    calibrated(args.run, args.on, out, method=args.method, rate=args.fmr)


def verifier_of(run: str, path: str | None, *, dim: int, model: str) -> Verifier:
    """Return the verifier of a run, calibrated on its held-out identities where there is none yet.

    Args:
        run: The run's folder.
        path: Another verifier's file.
        dim: Width of the features that are compared.
        model: Fingerprint of what makes them.

    Raises:
        UserError: None, and nothing to calibrate on; or one of features of another model or width.
    """
    from ..errors import UserError
    from ..features.verifier import FILE, Verifier

    if not path and not (Path(run) / "config.yml").is_file():
        raise UserError(
            f"model '{run}' is no run and keeps no verifier; calibrate one by 'relreid calibrate --on FEATURES --out FILE' "
            "on labelled features of it, and name it by --verifier."
        )
    place = Path(path or Path(run) / FILE)
    if path or place.is_file():
        found = Verifier.load(place, model=model)
    else:
        found = calibrated(run, None, place, method="isotonic", rate=1e-3, model=model)
    if found.dim != dim:
        raise UserError(f"verifier '{place}' was calibrated on features of width {found.dim}, and the model's have {dim}.")
    return found


def _compare(args: argparse.Namespace) -> None:
    import dataclasses

    from ..errors import UserError
    from ..files import write_json
    from ..search import FeatureExtractor
    from ..search.extractor import list_images

    first_files, others = list_images([args.first]), list_images(args.others)
    if len(first_files) > 1:
        raise UserError(f"command line: '{args.first}' holds {len(first_files)} images; one is compared with others.")
    files = [*first_files, *others]
    extractor = FeatureExtractor(args.model, args.opts, **naming(args))
    features = extractor.features(list(dict.fromkeys(files)))
    row = {name: number for number, name in enumerate(dict.fromkeys(files))}
    first = features[[row[files[0]]] * (len(files) - 1)]
    second = features[[row[name] for name in files[1:]]]
    verifier = verifier_of(args.model, args.verifier, dim=features.shape[1], model=extractor.fingerprint)
    threshold = verifier.threshold if args.threshold is None else args.threshold
    scores = verifier.scores(first, second)
    chances, same = verifier.probability(scores, prior=args.prior), verifier.same(scores, threshold=threshold)
    found = []
    for name, score, chance, answer in zip(files[1:], scores.tolist(), chances.tolist(), same.tolist()):
        print(f"{files[0]}  {name}: score {score:.4f}, probability {chance:.3f}, {'same' if answer else 'not the same'}")
        found.append({"first": files[0], "second": name, "score": score, "probability": chance, "same": answer})
    if args.threshold is None:
        print(f"threshold {threshold:.4f}, at which {verifier.false_match_rate:.2g} of the pairs of two are taken for one")
    else:
        print(f"threshold {threshold:.4f}, as given")
    if args.json:
        content = {"pairs": found, "threshold": threshold, "prior": args.prior, "verifier": dataclasses.asdict(verifier)}
        write_json(Path(args.json), content)


COMPARE = Command(
    "compare",
    description="Tell whether pictures show the same one: score, probability, and the answer at a threshold.",
    examples=[
        "relreid compare a.jpg b.jpg --model log/magformer",
        "relreid compare a.jpg b.jpg c.jpg --model log/magformer --prior 0.01 --json same.json",
        "relreid compare a.jpg b.jpg --model host:osnet_x0_25 --weights osnet.pth --verifier verifier.json",
    ],
    epilog="Without a verifier the run's held-out identities are calibrated on; see relreid calibrate.",
    arguments=_compare_arguments,
    work=_compare,
)
CALIBRATE = Command(
    "calibrate",
    description="Calibrate score, probability and threshold of 'same or not' on labelled features.",
    examples=[
        "relreid calibrate log/magformer",
        "relreid calibrate log/magformer --on query.npz gallery.npz --fmr 0.0001",
        "relreid calibrate --on features.npz --method logistic --out verifier.json",
    ],
    epilog="The identities must be others than those that the model was trained on. Needs scikit-learn (extra 'figures').",
    arguments=_calibrate_arguments,
    work=_calibrate,
)
