"""``relreid export``: a trained model as a file of ONNX, OpenVINO or TorchScript, with the proof that it is the same."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..options import integer, number
from .command import Command, add_overrides
from .naming import MODEL, add_network, network


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--to", choices=("onnx", "openvino", "torchscript"), required=True, help="kind of the file")
    parser.add_argument("--out", metavar="FILE", required=True, help="the file: .onnx, .xml (OpenVINO) or .pt (TorchScript)")
    parser.add_argument(
        "--part",
        choices=("image", "gallery", "queries"),
        default="image",
        help="the image model (default), or the half of the relation encoder that refines a gallery, or queries",
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="half precision inside; inputs and outputs stay float32")
    precision.add_argument("--int8", action="store_true", help="quantise weights and activations; needs --calibration")
    parser.add_argument(
        "--with-preprocessing", action="store_true", help="the file takes photos of any size as bytes, and resizes them"
    )
    parser.add_argument("--modalities", metavar="A+B", default="", help="modalities that go in (default: all of the model)")
    parser.add_argument("--images", metavar="FOLDER", nargs="+", default=[], help="compare on these images instead")
    parser.add_argument(
        "--target",
        metavar="NAME",
        default="",
        help="test set to compare on (default: the run's first; of other models rendered persons)",
    )
    parser.add_argument(
        "--most", metavar="N", type=integer(0, 10**7), default=1000, help="images compared at most; 0: all (default: 1000)"
    )
    parser.add_argument("--calibration", metavar="FOLDER", nargs="+", default=[], help="images that --int8 is fitted to")
    parser.add_argument(
        "--max-loss", metavar="POINTS", type=number(0, 100), help="loss of mAP allowed (default: fp16 0.5, int8 2)"
    )
    parser.add_argument("--licence", metavar="TEXT", default="unspecified", help="licence that the file names")
    parser.add_argument("--exporter", choices=("auto", "trace", "dynamo"), default="auto", help="of torch's for ONNX")
    add_network(parser)
    add_overrides(parser)


def _export(args: argparse.Namespace) -> None:
    from ..export.exporting import Request

    request = Request(
        kind=args.to,
        out=Path(args.out),
        precision="int8" if args.int8 else "fp16" if args.fp16 else "float32",
        with_preprocessing=args.with_preprocessing,
        subset=tuple(filter(None, args.modalities.split("+"))),
        images=tuple(args.images),
        target=args.target,
        most_images=args.most,
        calibration=tuple(args.calibration),
        most_loss=args.max_loss,
        licence=args.licence,
        exporter=args.exporter,
    )
    request.check()
    proof = _proof(args, request)
    for note in proof["notes"]:
        print(f"note: {note}")
    print(sentence(proof, request.out))


def _proof(args: argparse.Namespace, request: Any) -> dict[str, Any]:
    """Export, and return the proof."""
    from ..errors import UserError
    from ..export.exporting import export_named, export_run
    from ..features.opening import is_run

    if not is_run(args.model.removeprefix("run:")):
        from ..extractor import load_extractor

        if args.part != "image":
            raise UserError(f"--part {args.part}: model '{args.model}' is no run, and has no relation encoder.")
        extractor = load_extractor(args.model, device="cpu", channels_last=False, **network(args))
        for note in extractor.notes:
            print(f"note: {note}")
        return export_named(extractor, request, args.opts)
    from .. import register
    from ..engine.runner import open_run
    from ..export.relations import export_relations

    given = [name for name, value in network(args).items() if value]
    if given:
        raise UserError(f"run '{args.model}' knows its own network and does not take '{given[0]}'; leave it out.")
    register()
    run = open_run(args.model.removeprefix("run:"), [*args.opts, "use_gpu", "False"])
    return export_run(run, request) if args.part == "image" else export_relations(run, args.part, request)


def sentence(proof: dict[str, Any], out: Path) -> str:
    """Return what a proof says, for people."""
    score = ""
    if proof["mAP"]:
        score = (
            f", mAP {proof['mAP']['exported']:.2f} ({proof['mAP']['model']:.2f}), "
            f"R1 {proof['R1']['exported']:.2f} ({proof['R1']['model']:.2f})"
        )
    rates = ", ".join(f"{name} {rate:g}" for name, rate in proof["images_per_second"].items() if rate)
    speed = f"; images per second: {rates}" if rates else ""
    return (
        f"{out}: {proof['bytes'] / 1e6:.1f} MB, width {proof['about']['dim']}; {proof['images']} images "
        f"({proof['compared_on']}): cosine {proof['min_cosine']:.6f} at least, {proof['mean_cosine']:.6f} "
        f"in the mean{score}, {proof['other_first']} of {proof['queries']} first places differ{speed}"
    )


EXPORT = Command(
    "export",
    description=(
        "Write a trained model as a file for another runtime, and prove on images that it gives the same features and the "
        "same ranking; without that nothing is written."
    ),
    examples=[
        "relreid export log/magformer --to onnx --out model.onnx",
        "relreid export host:osnet_x0_25 --weights osnet_x0_25_msmt17.pth --to onnx --out osnet.onnx",
        "relreid export log/magformer --to openvino --fp16 --with-preprocessing --out model.xml",
        "relreid export log/magformer --to onnx --int8 --calibration photos/ --out model.int8.onnx",
        "relreid export log/magformer --part gallery --to onnx --out refine_gallery.onnx",
        "relreid export log/graft --to onnx --modalities RGB+TIR --out rgb_tir.onnx",
    ],
    epilog=(
        "The proof lies beside the file, FILE.proof.json. A model with a camera embedding has a second input, 'cameras': "
        "rows of the embedding, -1 for an unknown camera, which gets their mean."
    ),
    arguments=_export_arguments,
    work=_export,
)
main = EXPORT.main
