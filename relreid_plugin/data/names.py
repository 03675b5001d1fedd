"""What a file's name says of the image: conventions by name or by a regular expression, and names that say it otherwise."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ..errors import UserError, did_you_mean

GROUPS = ("identity", "camera")
MAX_PATTERN = 500  # characters
MATCH_SECONDS = 2.0  # more than that on one name is no pattern to read a data set with

_CAMERA_WORD = r"(?i:camera|kamera|cam|c)"
_WHO = r"(?i:person|subject|identity|vehicle|object|car|pid|vid|id)"  # a word before the number of an identity


@dataclass(frozen=True)
class Preset:
    """A convention of file names.

    Attributes:
        regex: Matched from the beginning of the name.
        form: How such a name looks.
    """

    regex: str
    form: str


PRESETS: dict[str, Preset] = {
    "market": Preset(r"(?s)(?P<identity>.+?)_c(?P<camera>\d+)", "0002_c1s1_000451_03.jpg"),
    "duke": Preset(r"(?P<identity>[^/_]+)_c(?P<camera>\d+)_", "0001_c2_f0046182.jpg"),
    "msmt17": Preset(r"(?P<identity>\d+)_\d+_(?P<camera>\d+)_", "0000_000_01_0303morning_0008_0.jpg"),
    "veri": Preset(r"(?P<identity>\d+)_c(?P<camera>\d+)_", "0002_c002_00030600_0.jpg"),
    "vehicleid": Preset(r"(?P<identity>\d+)[/_]\d+\.", "VEHICLE_IMAGE.jpg or VEHICLE/IMAGE.jpg, without a camera"),
    "camera-first": Preset(
        rf"{_CAMERA_WORD}[-_ ]?(?P<camera>\d+)(?:s\d+)?(?P<by>[-_ ])"
        rf"(?P<identity>(?:{_WHO}[-_ ])?[^/]+?)(?=(?P=by)|\.[^./]*$|$)",
        "c1_0002_01.jpg or cam01_person01.jpg",
    ),
}
"""The conventions that ``data.name_pattern`` knows by name."""


@dataclass(frozen=True)
class NamePattern:
    """A rule that reads identity and camera from the names of files.

    Attributes:
        key: ``data.name_pattern``: a preset's name, or the expression.
        form: What a name should look like, for messages.
        match: Takes a name, returns a match with the groups, or None.
        depth: Folders above the file that are part of the name.
    """

    key: str
    form: str
    match: Callable[[str], Any]
    depth: int

    def find(self, path: str) -> tuple[str, str | None] | None:
        """Return (identity, camera or None) of a file, or None where its name does not match.

        Raises:
            UserError: The expression takes too long.
        """
        name = "/".join(PurePath(path).parts[-1 - self.depth :])
        try:
            found = self.match(name)
            if found is None and self.depth and self.key in PRESETS:  # the folder may name the identity, or the file
                found = self.match(name.rpartition("/")[2])
        except TimeoutError:
            raise UserError(
                f"key 'data.name_pattern': '{self.key}' takes more than {MATCH_SECONDS:.0f} s for the name '{name}'; "
                "write it without repetitions inside repetitions."
            ) from None
        if found is None or not found["identity"]:
            return None
        return found["identity"], found.groupdict().get("camera") or None

    def read(self, path: str) -> tuple[str, str | None]:
        """Return (identity, camera or None) of a file.

        Raises:
            UserError: Its name does not match; the sentence names the file and the form expected.
        """
        found = self.find(path)
        if found is None:
            raise UserError(
                f"image '{path}' does not match 'data.name_pattern {self.key}' ({self.form}); rename the file, take it out "
                "of the data set, or change the pattern."
            )
        return found


def name_pattern(key: str) -> NamePattern | None:
    """Return the rule of ``data.name_pattern``, or None for an empty key.

    Args:
        key: Empty, one of :data:`PRESETS`, or a regular expression with the named groups ``identity`` and, where names hold
            one, ``camera``. It is matched from the beginning of a file's name and need not reach its end; with slashes in
            it, as many folders above the file are part of the name.

    Raises:
        UserError: No such preset, an expression that does not compile, has no ``identity``, or is too long.
    """
    if not key:
        return None
    name = key.strip().lower().replace("_", "-")
    if name in PRESETS:
        preset = PRESETS[name]
        return NamePattern(name, f"names like {preset.form}", re.compile(preset.regex).match, int("/" in preset.form))
    if "(" not in key:
        raise UserError(
            f"key 'data.name_pattern' is '{key}', which is no preset ({', '.join(PRESETS)}); else it is a regular "
            "expression with the groups (?P<identity>…) and (?P<camera>…)."
        )
    if len(key) > MAX_PATTERN:
        raise UserError(f"key 'data.name_pattern' has {len(key)} characters; {MAX_PATTERN} are allowed.")
    import regex  # the standard library's knows no time limit

    try:
        matcher = regex.compile(key)
    except (regex.error, RecursionError, OverflowError) as error:
        raise UserError(f"key 'data.name_pattern': '{key}' is no regular expression ({error}).") from None
    groups = set(matcher.groupindex)
    if "identity" not in groups:
        raise UserError(f"key 'data.name_pattern': '{key}' has no group (?P<identity>…), which says whom an image shows.")
    for group in sorted(groups - set(GROUPS)):
        raise UserError(
            f"key 'data.name_pattern': '{key}' has a group '{group}', which nothing reads{did_you_mean(group, GROUPS)}"
        )
    return NamePattern(
        key,
        "a regular expression that is matched from the beginning of the name",
        functools.partial(matcher.match, timeout=MATCH_SECONDS),
        depth=key.count("/"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Without a pattern: the form of Market-1501, ID_cC_…

WITH_CAMERA = re.compile(r"(?s)(?P<identity>.+?)_c(?P<camera>\d+)")
CAMERA_ONLY = re.compile(r"(?:^|_)c(?P<camera>\d+)")

_FIRST = re.compile(rf"{_CAMERA_WORD}\d+(?:s\d+)?(?![A-Za-z0-9])")  # c1_…, cam01-…, C2s1_…; not c3po_…, cat_…
_FIRST_APART = re.compile(r"(?i:camera|kamera|cam)[-_ ]\d+[-_ ]")  # cam_1_0002; but camera_01.jpg shows a camera
_LOOSE = re.compile(rf"(?<=[-_ .]){_CAMERA_WORD}\d+(?![A-Za-rt-z0-9])")  # a camera that is not written _cC
_ADVICE = (
    "name it ID_cC_….jpg, or say how names are written by 'data.name_pattern camera-first' (or another preset, or a regular "
    "expression); with 'data.name_pattern market' the name is taken as it is"
)


def read_market_name(name: str) -> tuple[str, str] | None:
    """Return (identity, camera) of a file named ``ID_cC_….jpg``, or None for every other name."""
    stem = PurePath(name).stem
    match = WITH_CAMERA.match(stem)
    if match is None or (_FIRST.match(stem) and not _is_short(match["identity"])) or _FIRST_APART.match(stem):
        return None
    return match["identity"], match["camera"]


@dataclass(frozen=True)
class ReadName:
    """What the form of Market-1501 found in a name.

    Attributes:
        path: The file.
        text: What the identity was read from: the file's name without its extension, or the folder of the identity.
        identity: The identity.
        camera: The camera as written, or None.
    """

    path: str
    text: str
    identity: str
    camera: str | None


def check_names(splits: dict[str, list[ReadName]]) -> None:
    """Refuse names in which the form of Market-1501 takes a camera for an identity, or sees no camera where there is one.

    Args:
        splits: What was read of every split.

    Raises:
        UserError: One of the files, the form expected, and the pattern that would read it.
    """
    for names in splits.values():
        odd = _camera_first(names)
        if odd:
            more = f" ({len(odd) - 1} more of {len(names)} names like that)" if len(odd) > 1 else ""
            raise UserError(f"image '{odd[0].path}' begins with a camera where the identity is expected{more}; {_ADVICE}.")
    everything = [name for names in splits.values() for name in names]
    if everything and all(name.camera is None and _LOOSE.search(_rest(name)) for name in everything):
        raise UserError(
            f"image '{everything[0].path}' seems to name a camera, but not as _cC, and so do all others; no camera would be "
            "read: name them ID_cC_….jpg, or say how names are written by 'data.name_pattern', such as "
            r"(?P<identity>[^_]+)_(?i:cam|c)(?P<camera>\d+)."
        )


def _rest(name: ReadName) -> str:
    return "_" + PurePath(name.path).stem if name.text == name.identity else name.text


def _camera_first(names: Sequence[ReadName]) -> list[ReadName]:
    """The names that begin with a camera.

    Where a camera follows in the right form as well (``c4_c1_…``), the beginning is an identity, unless it is a camera by
    its word or there is more of it, and all names of the split are so.
    """
    strict = [name for name in names if name.camera is None and _FIRST.match(name.text)]
    if strict:
        return strict
    apart = [name for name in names if _FIRST_APART.match(name.text) or _FIRST_APART.match(f"{name.identity}_")]
    twice = [name for name in names if name.camera is not None and _FIRST.match(name.text) and not _is_short(name.identity)]
    return next((found for found in (apart, twice) if found and len(found) == len(names)), [])


def _is_short(identity: str) -> bool:
    return re.fullmatch(r"(?i:c)\d+", identity) is not None
