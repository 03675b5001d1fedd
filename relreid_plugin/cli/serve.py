"""``relreid serve``: a store as a search page and a JSON API."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import integer, number
from .command import Command, add_overrides
from .compare import verifier_of
from .naming import MODEL, add_naming, naming
from .search import add_index_arguments, chosen_config

if TYPE_CHECKING:
    from ..serve.gallery import ServedGallery


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder of the store, or of its shards")
    parser.add_argument("--model", metavar="MODEL", help=f"what made the store: {MODEL}")
    parser.add_argument("--relations", action="store_true", help="offer searches by the run's relation encoder, too")
    parser.add_argument("--verifier", metavar="FILE", help="of 'relreid calibrate' (default: verifier.json in the run)")
    parser.add_argument(
        "--prior",
        type=number(0, 1, above=True, below=True),
        default=0.5,
        help="how likely a pair is one beforehand (default: 0.5)",
    )
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="write the answers of the store's service as training data (CSV) instead, and end; needs no --model",
    )
    add_index_arguments(parser)
    group = parser.add_argument_group("service")
    group.add_argument("--host", default="127.0.0.1", help="address to listen to (default: 127.0.0.1)")
    group.add_argument("--port", type=integer(0, 65535), default=8008, help="port; 0: a free one (default: 8008)")
    group.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="a name by which the service may be asked for"
    )
    group.add_argument("--token-file", metavar="FILE", help="file with the token for writing (default: RELREID_TOKEN)")
    group.add_argument(
        "--rate",
        metavar="N",
        type=integer(0),
        default=600,
        help="searches and writes of one client per minute; 0: any number (default: 600)",
    )
    group.add_argument(
        "--most-bytes", metavar="MB", type=number(0.01, 1000), default=10.0, help="of a request (default: 10)"
    )
    group.add_argument(
        "--most-pixels", metavar="MP", type=number(0.01, 1000), default=40.0, help="millions, of a picture (default: 40)"
    )
    add_naming(parser)
    add_overrides(parser)


def _export(store: str, out: str) -> None:
    from ..errors import UserError
    from ..files import write_text
    from ..serve.feedback import Journal, training_table
    from ..serve.gallery import FOLDER

    place = Path(store) / FOLDER / "feedback.jsonl"
    if not place.is_file():
        raise UserError(f"store '{store}' has no answers ('{place}' does not exist).")
    table, notes = training_table(Journal(place).answers())
    write_text(Path(out), table)
    for note in notes:
        print(f"note: {note}")
    print(f"'{out}': {table.count(chr(10)) - 1} images")


def _opened(args: argparse.Namespace) -> ServedGallery:
    from ..errors import UserError
    from ..features.verifier import FILE
    from ..search import FeatureExtractor
    from ..serve.gallery import ServedGallery

    extractor = FeatureExtractor(args.model, args.opts, **naming(args))
    if extractor.modalities:
        raise UserError(f"model '{args.model}' reads several modalities, and a service takes one picture; name another.")
    verifier = None
    if args.verifier or (Path(args.model) / FILE).is_file():
        verifier = verifier_of(args.model, args.verifier, dim=extractor.extractor.dim, model=extractor.fingerprint)
    config = chosen_config(args, extractor)
    return ServedGallery(args.store, extractor, config, relations=args.relations, verifier=verifier, prior=args.prior)


def _serve(args: argparse.Namespace) -> None:
    from ..errors import UserError, needed

    if args.export:
        return _export(args.store, args.export)
    for module in ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "limits"):
        needed(module, "the search service")
    if not args.model:
        raise UserError("command line: name the model that made the store by --model.")
    if not Path(args.store).is_dir():
        if args.store.startswith("milvus:"):
            raise UserError(f"'{args.store}' is in Milvus; a service takes the folder of a store.")
        raise UserError(f"store '{args.store}' does not exist; make one by relreid extract.")
    import logging

    from ..locks import folder_lock
    from ..serve import server
    from ..serve.app import Service, create_app
    from ..serve.gallery import FOLDER
    from ..serve.guard import Guard, Limits
    from ..serve.metrics import Metrics

    token, made = server.find_token(args.host, args.token_file)
    place = server.listen(args.host, args.port)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("relreid.serve").setLevel(logging.INFO)
    with place, folder_lock(Path(args.store) / FOLDER):
        metrics = Metrics()
        service = Service(_opened(args), token, metrics, pixels=int(args.most_pixels * 1e6))
        limits = Limits(body=int(args.most_bytes * 1e6), rate=args.rate)
        app: Any = Guard(create_app(service), limits, metrics, server.allowed_hosts(args.host, args.allow_host))
        host, port = place.getsockname()[:2]
        address = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

        def ready() -> None:
            images = int(service.gallery.view.living.sum())
            print(f"{args.store}: {images} images at {address}" + (f"#token={token}" if made else ""), flush=True)

        server.make_server(app, ready).run(sockets=[place])
    print("stopped; everything that was acknowledged is on the disk")


SERVE = Command(
    "serve",
    description="Serve a store as a search page and a JSON API, with enrolment, deletion and feedback.",
    examples=[
        "relreid serve gallery --model log/magformer",
        "relreid serve gallery --model log/magformer --relations --port 9000",
        "relreid serve gallery --model host:osnet_x0_25 --weights osnet_x0_25_msmt17.pth --verifier verifier.json",
        "relreid serve gallery --export answers.csv",
    ],
    epilog=(
        "Listens to this machine alone unless --host says otherwise, which needs a token of your own. SIGTERM and Ctrl-C "
        "let requests in work finish. Needs the extra 'serve'."
    ),
    arguments=_arguments,
    work=_serve,
)
