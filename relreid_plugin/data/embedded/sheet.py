"""A contact sheet of a data set in the layout of Market-1501."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ...errors import UserError
from ...files import atomic_file
from ..images import read_image
from .dataset import MARKET_FOLDER, SPLITS

_NAME = re.compile(r"(-?\d+)_c(\d)s\d+_(\d+)_\d+\.jpg$")


def contact_sheet(
    root_dir: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    num_ids: int = 7,
    num_cameras: int = 6,
    shots: int = 2,
    num_distractors: int = 12,
) -> None:
    """Write a PNG with one row per identity and ``shots`` columns per camera, and a last row of false detections.

    Args:
        root_dir: Data set folder that holds ``Market-1501-v15.09.15``.
        path: PNG file to write.
        num_ids: Identities to show, those that most cameras saw first.
        num_cameras: Cameras to show.
        shots: Shots per identity and camera.
        num_distractors: False detections (pid 0) to show.

    Raises:
        UserError: The folder holds no images in Market-1501's layout.
    """
    found: dict[int, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for split in SPLITS:
        for image in sorted((Path(root_dir) / MARKET_FOLDER / split).glob("*.jpg")):
            match = _NAME.search(image.name)
            if match:
                found[int(match[1])][int(match[2])].append(image)
    ids = sorted((pid for pid in found if pid > 0), key=lambda pid: (-len(found[pid]), pid))[:num_ids]
    if not ids:
        raise UserError(
            f"'{root_dir}' holds no images in the layout of Market-1501 ({MARKET_FOLDER}/{SPLITS[0]}/0001_c1s1_….jpg)."
        )
    ids.sort()
    strays = [image for camera in sorted(found[0]) for image in found[0][camera]] if 0 in found else []
    strays = strays[:: max(1, len(strays) // max(1, num_distractors))][:num_distractors]

    width, height = read_image(found[ids[0]][min(found[ids[0]])][0]).size
    left, top, gap, between = 40, 18, 2, 8
    block = shots * (width + gap) + between
    rows = len(ids) + (1 if strays else 0)
    sheet = Image.new("RGB", (left + num_cameras * block, top + rows * (height + gap)), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)

    def place(image: Path, column: int, row: int) -> None:
        x = left + (column // shots) * block + (column % shots) * (width + gap)
        sheet.paste(read_image(image).resize((width, height)), (x, top + row * (height + gap)))

    for camera in range(num_cameras):
        draw.text((left + camera * block, 3), f"camera {camera + 1}", fill=(0, 0, 0), font=font)
    for row, pid in enumerate(ids):
        draw.text((4, top + row * (height + gap) + height // 2 - 6), f"{pid:04d}", fill=(0, 0, 0), font=font)
        for camera in range(num_cameras):
            for index, image in enumerate(sorted(found[pid].get(camera + 1, []), key=lambda p: p.name)[:shots]):
                place(image, camera * shots + index, row)
    if strays:
        draw.text((4, top + len(ids) * (height + gap) + height // 2 - 6), "0000", fill=(0, 0, 0), font=font)
        for column, image in enumerate(strays[: num_cameras * shots]):
            place(image, column, len(ids))
    save_sheet(sheet, path, colours=192)


def save_sheet(sheet: Image.Image, path: str | os.PathLike[str], *, colours: int) -> None:
    """Write a contact sheet as a PNG with few colours.

    Raises:
        WriteError: The file cannot be written.
    """
    target = Path(path)
    with atomic_file(target) as temporary:
        sheet.quantize(colours, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE).save(
            temporary, "PNG", optimize=True
        )
