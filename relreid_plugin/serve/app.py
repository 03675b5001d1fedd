"""The JSON API and the page of a search service."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import hashlib
import hmac
import io
import math
import re
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path as FilePath
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import Depends, FastAPI, File, Form, HTTPException, Path, Query, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from pydantic import BaseModel

from .. import __version__
from ..data.labels import Label, as_label
from ..data.photos import TooManyPixels, check_boxes, check_pixels, clip_boxes, read_photo
from ..errors import UserError
from ..files import WriteError
from ..metrics.rivals import RIVALS
from ..processes import usable_cores
from .batching import Batcher, Busy
from .feedback import pairs_table, training_table
from .gallery import Enrolment, NoSuchRow, ServedGallery, Wish, as_png
from .guard import log
from .metrics import Metrics

PIXELS = 40_000_000
MOST_RESULTS, MOST_RERANKED = 200, 2000
_BATCH, _WRITES, _WAITING = 32, 64, 256  # pictures of a forward pass, writes at once, and what may wait for either
_SIDES = (32, 1024)  # of the images that are served
_WORD = 200  # characters of a label
_MOST_NAMES = 100  # cameras or labels of a filter


class Result(BaseModel):
    """An image that was found."""

    rank: int
    score: float
    row: int
    label: int | str | None
    camera: int | str | None
    name: str
    probability: float | None
    same: bool | None


class Results(BaseModel):
    """The images that were found, and how many there are to find."""

    images: int
    results: list[Result]


class Store(BaseModel):
    """What is searched, and what can be asked of it."""

    images: int
    cameras: list[int | str]
    relations: bool
    reranking: list[str]
    threshold: float | None
    enrols: bool
    answers: int
    version: str


class Enrolled(BaseModel):
    """The row of an image, and whether it is new."""

    row: int
    new: bool


class Kept(BaseModel):
    """How many pairs have an answer."""

    answers: int


class Health(BaseModel):
    """That the service works."""

    status: str
    images: int


Picture = Annotated[UploadFile, File(description="the picture's file")]
Box = Annotated[str | None, Form(description="left,top,right,bottom of the part that is meant, in pixels, upright")]
Word = Annotated[str | None, Form(max_length=_WORD)]
Words = Annotated[list[str], Form(max_length=_MOST_NAMES)]
Row = Annotated[int, Path(ge=0, le=2**62)]


class Service:
    """A gallery, its batches and the threads that work for it.

    Args:
        gallery: The store.
        token: What a client that writes must know.
        metrics: Counts.
        pixels: Most pixels of a picture.
    """

    def __init__(self, gallery: ServedGallery, token: str, metrics: Metrics, *, pixels: int = PIXELS) -> None:
        self.gallery, self.metrics, self.pixels = gallery, metrics, pixels
        self._token = hashlib.sha256(token.encode()).digest()
        self._pool = ThreadPoolExecutor(max(2, usable_cores()), "relreid-serve")
        network: Any = gallery.extractor.extractor
        self._pixels_of: Callable[[Image.Image], np.ndarray] = network.pixels

        def forward(pixels: list[np.ndarray]) -> Any:
            return list(network.forward(np.stack(pixels)))

        self._forward: Batcher[np.ndarray, torch.Tensor] = Batcher(
            forward, most=_BATCH, wait=0.002, waiting=_WAITING, observe=metrics.batches.observe, name="forward"
        )
        self._writer: Batcher[Any, Any] = Batcher(gallery.write, most=_WRITES, waiting=_WAITING, name="write")
        self._reopening = threading.Event()
        self.count()

    def count(self) -> None:
        """Bring the number of images among the counters up to date."""
        self.metrics.images.set(int(self.gallery.view.living.sum()))

    def close(self) -> None:
        """Finish what is in work, and end the threads."""
        self._forward.close()
        self._writer.close()
        self._pool.shutdown()

    def knows(self, given: str) -> bool:
        """Whether a client's token is the right one; how long that takes tells nothing."""
        return hmac.compare_digest(hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest(), self._token)

    async def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do something in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    async def write(self, item: Enrolment | int | None) -> Any:
        """Let the writing thread do something; what it did is on the disk then."""
        found = await asyncio.wrap_future(self._writer.submit(item))
        self.count()
        return found

    def refresh(self) -> None:
        """Let the store be opened anew where another process has written to it; what is searched stays until then."""
        if self.gallery.changed and not self._reopening.is_set():
            self._reopening.set()
            try:
                self._writer.submit(None).add_done_callback(self._reopened)
            except Busy:  # whatever is written then opens it
                self._reopening.clear()

    def _reopened(self, done: Future[Any]) -> None:
        if done.exception() is not None:
            log.error("the store has changed and cannot be opened: %s", done.exception())
        self._reopening.clear()
        self.count()

    async def picture(self, upload: UploadFile, box: str | None) -> Image.Image:
        """Read the part of a picture that is meant.

        Raises:
            HTTPException: It is no picture, or has too many pixels.
        """
        return await self.run(self._read, await upload.read(), box)

    def _read(self, data: bytes, box: str | None) -> Image.Image:
        try:
            check_pixels(data, self.pixels)
            picture = read_photo(data, pixel_range=self.gallery.extractor.pixel_range, key="data.pixel_range")
        except TooManyPixels as error:
            raise HTTPException(413, str(error)) from None
        except UserError as error:
            raise HTTPException(415, str(error)) from None
        return picture if box is None else picture.crop(clip_boxes(_box(box), picture.size)[0])

    async def feature(self, picture: Image.Image) -> torch.Tensor:
        """Return a picture's feature (d,), made together with those of other requests."""
        pixels = await self.run(self._pixels_of, picture)
        return await asyncio.wrap_future(self._forward.submit(pixels))


def _box(text: str) -> np.ndarray:
    if not re.fullmatch(r"\s*-?[\d.]{1,12}\s*(,\s*-?[\d.]{1,12}\s*){3}", text, re.ASCII):
        raise UserError("box takes left,top,right,bottom in pixels.")
    return check_boxes([float(word) if word.count(".") < 2 else math.nan for word in text.split(",")])


def _moment(name: str, text: str | None) -> float | None:
    if not text:
        return None
    try:
        return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError):
        raise UserError(f"{name} takes a time like 2024-05-31 or 2024-05-31T14:30.") from None


def _label(text: str | None) -> Label:
    word = (text or "").strip()
    if not word.isprintable():
        raise UserError("a label holds characters that cannot be printed.")
    return as_label(word) if word else -1


def _file_name(picture: Image.Image) -> str:
    """The name of the file that keeps a picture: that of its pixels."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:32] + ".png"


def page() -> tuple[str, str]:
    """Return the page, and the content security policy that lets it load nothing but itself and this service's answers."""
    text = (FilePath(__file__).parent / "page.html").read_text(encoding="utf-8")
    sums = {}
    for tag in ("script", "style"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert inside is not None
        sums[tag] = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{sums['script']}'; style-src 'sha256-{sums['style']}'; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def create_app(service: Service) -> FastAPI:
    """Return the application.

    Args:
        service: What it serves; closed when the application ends.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="relreid serve",
        version=__version__,
        description="Search a store of pictures by a picture.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    gallery = service.gallery
    text, policy = page()

    def writer(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not service.knows(given.strip()):
            raise HTTPException(401, "this needs the service's token.", {"WWW-Authenticate": "Bearer"})

    needs_token = [Depends(writer)]

    def fails(kind: type[Exception], status: int, **headers: str) -> None:
        async def answer(_: Request, error: Exception) -> JSONResponse:
            return JSONResponse({"detail": str(error) or "the service is busy; try again."}, status, headers)

        app.add_exception_handler(kind, answer)

    fails(UserError, 422)
    fails(NoSuchRow, 404)
    fails(Busy, 503, **{"Retry-After": "1"})

    async def unwritten(_: Request, error: Exception) -> JSONResponse:
        log.error("%s", error)
        return JSONResponse({"detail": "it could not be written; the service's log says why."}, 507)

    async def broken(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "internal error; the service's log says more."}, 500)

    app.add_exception_handler(WriteError, unwritten)
    app.add_exception_handler(Exception, broken)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(text, headers={"content-security-policy": policy})

    @app.get("/health")
    async def health() -> Health:
        """Say that the service works."""
        return Health(status="ok", images=int(gallery.view.living.sum()))

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the counters in the text format of Prometheus."""
        content, kind = service.metrics.text()
        return Response(content, media_type=kind)

    @app.get("/api/store")
    async def about() -> Store:
        """Say what is searched."""
        view = gallery.view
        return Store(
            images=int(view.living.sum()),
            cameras=view.camera_labels,
            relations=view.related is not None,
            reranking=list(RIVALS),
            threshold=None if gallery.verifier is None else gallery.verifier.threshold,
            enrols=view.enrols,
            answers=len(gallery.journal),
            version=__version__,
        )

    @app.post("/api/search")
    async def search(
        image: Picture,
        box: Box = None,
        k: Annotated[int, Form(ge=1, le=MOST_RESULTS)] = 10,
        relations: Annotated[bool, Form(description="refine by the relation encoder")] = False,
        rerank: Annotated[int, Form(ge=0, le=MOST_RERANKED, description="re-rank that many best images")] = 0,
        by: Annotated[str, Form(max_length=_WORD, description="how to re-rank")] = "rerank",
        camera: Annotated[str | None, Form(max_length=_WORD, description="of the picture, as the store shows it")] = None,
        cameras: Words = [],  # noqa: B006
        labels: Words = [],  # noqa: B006
        since: Word = None,
        until: Word = None,
        threshold: Annotated[float | None, Form(description="leave out what scores less")] = None,
    ) -> Results:
        """Rank the store for a picture."""
        service.refresh()
        if threshold is not None and not math.isfinite(threshold):
            raise UserError("threshold takes a number.")
        wish = Wish(
            k,
            relations,
            rerank,
            by,
            camera or None,
            tuple(filter(None, cameras)),
            tuple(filter(None, labels)),
            _moment("since", since),
            _moment("until", until),
            threshold,
        )
        feature = await service.feature(await service.picture(image, box))
        return Results(**await service.run(gallery.search, feature, wish))

    @app.get("/api/images/{row}", response_class=Response)
    async def image(row: Row, side: Annotated[int, Query(ge=_SIDES[0], le=_SIDES[1])] = 256) -> Response:
        """Return an image of the store as JPEG, no side longer than asked for."""

        def made() -> bytes:
            picture = gallery.picture(row)
            picture.thumbnail((side, side), Image.Resampling.BILINEAR)
            stream = io.BytesIO()
            picture.save(stream, "JPEG", quality=88)
            return stream.getvalue()

        content = await service.run(made)
        return Response(content, media_type="image/jpeg", headers={"cache-control": "private, max-age=600"})

    @app.post("/api/images", status_code=201, dependencies=needs_token)
    async def enrol(
        response: Response, image: Picture, box: Box = None, label: Word = None, camera: Word = None, time: Word = None
    ) -> Enrolled:
        """Put a picture into the store; it is on the disk when this is answered. A picture that is there stays as it is."""
        named, seen, taken = _label(label), _label(camera), _moment("time", time)
        picture = await service.picture(image, box)
        feature = await service.feature(picture)
        png = await service.run(as_png, picture)
        row, new = await service.write(Enrolment(png, _file_name(picture), feature, named, seen, taken))
        service.metrics.written.labels("enrolled").inc(int(new))
        response.status_code = 201 if new else 200
        return Enrolled(row=row, new=new)

    @app.delete("/api/images/{row}", status_code=204, dependencies=needs_token)
    async def delete(row: Row) -> None:
        """Take an image out of the store; nothing finds it from then on."""
        await service.write(row)
        service.metrics.written.labels("deleted").inc()

    @app.post("/api/feedback", status_code=201, dependencies=needs_token)
    async def feedback(
        image: Picture,
        row: Annotated[int, Form(ge=0, le=2**62)],
        same: Annotated[bool, Form()],
        box: Box = None,
        camera: Word = None,
    ) -> Kept:
        """Keep whether a picture and an image of the store show the same one; it is on the disk when this is answered."""
        seen = _label(camera)
        gallery.view.living_row(row)
        picture = await service.picture(image, box)
        png = await service.run(as_png, picture)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        await service.run(gallery.note, png, _file_name(picture), row, same, seen, now)
        service.metrics.written.labels("answers").inc()
        return Kept(answers=len(gallery.journal))

    @app.get("/api/feedback.csv", response_class=Response, dependencies=needs_token)
    async def export(form: Annotated[str, Query(pattern="^(training|pairs)$")] = "training") -> Response:
        """Return the answers as a data set to train on (path,pid,camid,split), or as pairs."""
        answers = gallery.journal.answers()
        table, notes = (pairs_table(answers), []) if form == "pairs" else training_table(answers)
        headers = {"content-disposition": f'attachment; filename="{form}.csv"'}
        if notes:
            headers["x-left-out"] = "; ".join(notes)
        return Response(table.encode("utf-8", "surrogateescape"), media_type="text/csv", headers=headers)

    return app


__all__ = ["PIXELS", "Service", "create_app", "page"]
