"""Every model of torchreid's zoo as a file of another runtime: whether ``relreid export`` writes it, and how near it is.

python benchmarks/exports.py                                        all models, as ONNX, OpenVINO and TorchScript
python benchmarks/exports.py --models osnet_x0_25 hacnn --to onnx   some

Every model is built with random weights, saved as torchreid saves it, opened by ``host:NAME`` with that file, and exported
with its proof: on rendered persons, at the size that the model is tested with, in batches of several sizes. A cell is the
least cosine of the model's and the file's feature, or the reason why there is no file. Exit code 1 where one is missing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from relreid_plugin.data.embedded import MARKET_FOLDER, ensure_embedded

ENDINGS = {"onnx": "onnx", "openvino": "xml", "torchscript": "pt"}
CLASSES = 5
REASON = 100
"""Characters of a reason that are printed."""


def zoo() -> list[str]:
    """Names of the models that are torchreid's own."""
    from relreid_plugin import host, register
    from relreid_plugin.methods import BASELINE, builders

    register()
    return [name for name in host.available_models() if name not in {BASELINE, *builders()}]


def weights(name: str, folder: Path) -> Path:
    """Random weights in a file, as torchreid's trainer writes them."""
    from relreid_plugin.host import build_model

    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # the zoo calls functions of torch that have new names
    model = build_model(name, CLASSES, "softmax", False, False)
    path = folder / f"{name}.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 0}, path)
    return path


def export(name: str, kinds: list[str], images: int, data: Path) -> list[str]:
    """One row of the table."""
    from relreid_plugin.errors import UserError
    from relreid_plugin.export.exporting import Request, export_named
    from relreid_plugin.extractor import load_extractor

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            extractor = load_extractor(
                f"host:{name}", weights=weights(name, folder), device="cpu", channels_last=False, batch_size=4
            )
        except UserError as error:
            return [f"`{name}`", "-", "-", *[str(error)[:REASON]] * len(kinds)]
        cells = []
        for kind in kinds:
            try:
                proof = export_named(
                    extractor, Request(kind, folder / f"model.{ENDINGS[kind]}", target=str(data), most_images=images)
                )
                cells.append(f"{proof['min_cosine']:.6f}")
            except UserError as error:
                cells.append(str(error).replace(str(folder), "")[:REASON].replace("|", "/"))
    return [f"`{name}`", f"{extractor.size[0]}x{extractor.size[1]}", str(extractor.dim), *cells]


def main() -> int:
    """Print the table; 1: something was not exported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="some models (default: all)")
    parser.add_argument("--to", nargs="+", choices=ENDINGS, default=list(ENDINGS), help="kinds of files (default: all)")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="rendered persons of the proof (default: 8)")
    args = parser.parse_args()
    print(f"| model | images | width | {' | '.join(args.to)} |\n|---|---|---:|{'---:|' * len(args.to)}", flush=True)
    failed, started = 0, time.perf_counter()
    names = args.models or zoo()
    with tempfile.TemporaryDirectory() as root:
        data = ensure_embedded("embedded_persons_tiny", root, verbose=False) / MARKET_FOLDER
        for name in names:
            row = export(name, args.to, args.images, data)
            failed += any(not cell.startswith(("0.", "1.")) for cell in row[3:])
            print("| " + " | ".join(row) + " |", flush=True)
    print(f"{len(names) - failed} of {len(names)} models; torch {torch.__version__}", file=sys.stderr)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
