"""Reading weight files of any origin without running code out of them."""

from __future__ import annotations

import io
import os
import pickletools
import stat
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..seal import damage
from .sniff import SAFETENSORS, TORCH_LEGACY, TORCH_ZIP, sniff

_HUB_NAMES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_DANGEROUS = frozenset(
    "os posix nt sys subprocess shutil socket pty runpy importlib ctypes pickle code codeop commands multiprocessing "
    "webbrowser urllib http asyncio signal threading".split()
)
_DANGEROUS_BUILTINS = frozenset("eval exec compile open input getattr setattr delattr __import__ breakpoint globals".split())


@dataclass(frozen=True)
class WeightFile:
    """What a weight file holds.

    Attributes:
        path: The file; for a folder in the hub's layout, the file inside.
        content: Its outermost dict, tensors on the CPU.
        unread: Classes of objects beside the tensors that were passed over, as ``module.Class``.
    """

    path: Path
    content: dict[Any, Any]
    unread: tuple[str, ...] = ()


class Unread:
    """What stands for an object of a class that is not read: it takes any arguments and any state, and drops them."""

    def __new__(cls, *args: object, **options: object) -> Any:
        """Take anything."""
        return super().__new__(cls)

    def __init__(self, *args: object, **options: object) -> None:
        """Drop it."""

    def __setstate__(self, state: object) -> None:
        """Drop the state."""


def _stand_in(name: str, kind: str) -> Any:
    """A class under the name of another one, whose objects are inert: plain objects, dicts or lists."""
    module, _, leaf = name.rpartition(".")
    makers: dict[str, Callable[..., Any]] = {"dict": lambda cls, *_: OrderedDict(), "list": lambda cls, *_: []}
    body: dict[str, Any] = {"__module__": module, "__qualname__": leaf}
    if kind in makers:
        body["__new__"] = makers[kind]
    return type(leaf, (Unread,), body)


def _numpy_scalar(dtype: Any, raw: bytes = b"") -> Any:
    """A numpy number out of its bytes, as torchreid stores ``rank1``; only plain numbers."""
    data = raw.encode("latin1") if isinstance(raw, str) else raw
    if np.dtype(dtype).kind not in "biufc":
        raise ValueError("no number")
    return np.frombuffer(data, dtype)[0]


def _numpy_names() -> dict[str, Any]:
    """What a pickled numpy number refers to, under the names of numpy 1 and 2."""
    found: dict[str, Any] = {}
    for core in ("core", "_core"):

        def scalar(dtype: Any, raw: bytes = b"") -> Any:
            return _numpy_scalar(dtype, raw)

        scalar.__module__, scalar.__qualname__ = f"numpy.{core}.multiarray", "scalar"
        scalar.__name__ = "scalar"
        found[f"numpy.{core}.multiarray.scalar"] = scalar
    return found


@contextmanager
def _allowed(names: Mapping[str, Any]) -> Iterator[None]:
    """Let torch's reader of weights know further names while the block lasts."""
    before = torch.serialization.get_safe_globals()
    kinds = [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)]
    torch.serialization.add_safe_globals([np.dtype, *kinds, *names.values()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(before))


def _named_globals(stream: Any, pickles: int) -> list[str]:
    """Names of what the first pickles of a stream refer to, in their order; nothing is executed."""
    found: dict[str, None] = {}
    for _ in range(pickles):
        for code, argument, _ in pickletools.genops(stream):
            if code.name == "GLOBAL" and isinstance(argument, str):
                name = argument.replace(" ", ".", 1)
                found[name] = None
                if name.startswith("__builtin__."):  # Python 2's name, which newer versions of torch translate
                    found["builtins." + name.removeprefix("__builtin__.")] = None
    return list(found)


def _globals_of(path: Path, kind: str) -> list[str]:
    if kind == TORCH_LEGACY:
        with path.open("rb") as stream:
            return _named_globals(stream, 4)
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if name.count("/") <= 1 and name.endswith("data.pkl")]
        return _named_globals(io.BytesIO(archive.read(name)), 1)


def _dangerous(name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    if module in ("builtins", "__builtin__"):
        return leaf in _DANGEROUS_BUILTINS
    return module.split(".")[0] in _DANGEROUS or name in ("torch.load", "torch.hub.load", "numpy.load")


def _torch_load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reader's advice is for those who can change the file
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except UnicodeDecodeError:  # written by Python 2
            return torch.load(path, map_location="cpu", weights_only=True, encoding="latin1")


def _read_torch(path: Path, kind: str, label: str) -> tuple[Any, tuple[str, ...]]:
    """The content of a file of torch's, its foreign objects replaced by inert ones."""
    try:
        names = _globals_of(path, kind)
    except Exception:  # a damaged pickle raises all kinds of exceptions
        raise UserError(f"{label} is a torch file that is cut off or damaged; fetch or copy it again.") from None
    bad = [name for name in names if _dangerous(name)]
    if bad:
        raise UserError(
            f"{label} asks to run '{bad[0]}' when it is read, and may be malicious; it was not read: get the weights from a "
            "source that you trust."
        )
    known, kinds = _numpy_names(), dict[str, str]()
    for _ in range(2 + len(names)):
        stand_ins = {name: _stand_in(name, choice) for name, choice in kinds.items()}
        try:
            with _allowed({**known, **stand_ins}):
                return _torch_load(path), tuple(kinds)
        except Exception as error:
            reason = str(error)
        unknown = [name for name in names if name not in kinds and name not in known and f"{name} " in f"{reason} "]
        if not unknown and "nsupported global" in reason:  # torch shortens the names of builtins
            unknown = [name for name in names if name not in kinds and name.startswith(("builtins.", "__builtin__."))]
        items = "does not support item assignment"  # Python's own words, which torch passed on before 2.7
        misfits = [
            name
            for name in kinds
            if f"<class '{name}'>" in reason or f"'{name.rpartition('.')[2]}' object {items}" in reason
        ]
        if unknown:
            kinds.update(dict.fromkeys(unknown, "object"))
        elif misfits and any(word in reason.lower() for word in ("append", "extend")) and kinds[misfits[0]] != "list":
            kinds[misfits[0]] = "list"
        elif misfits and ("SETITEM" in reason or items in reason) and kinds[misfits[0]] != "dict":
            kinds[misfits[0]] = "dict"
        else:
            break
    foreign = ", ".join(list(kinds)[:3])
    if any(name.startswith("torch.nn.modules.") for name in names):
        raise UserError(whole_model(label, [name for name in names if not name.startswith("torch.")]))
    if foreign:
        raise UserError(
            f"{label} holds objects beside its tensors ({foreign}) that cannot be passed over; where it came from, save its "
            "state dict alone by torch.save(checkpoint['state_dict'], FILE)."
        )
    first = reason.strip().split("\n")[0].split(". ")[0][:160].rstrip(" .")
    raise UserError(f"{label} cannot be read as weights, it is damaged or foreign ({first}); fetch or copy it again.")


def whole_model(label: str, names: list[str]) -> str:
    """Return the sentence for a file of a whole pickled model."""
    shown = f" ('{names[0]}')" if names else ""
    return (
        f"{label} is a whole model{shown} saved by torch.save(model), which only its own code can read; there, save its "
        "state dict by torch.save(model.state_dict(), FILE), and give that."
    )


def _read_safetensors(path: Path, label: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except OSError:
        raise
    except Exception as error:  # the package's own error, and KeyError for types that torch does not know
        first = str(error).strip().split("\n")[0][:120] or type(error).__name__
        raise UserError(
            f"{label} is a safetensors file that is cut off or damaged ({first}); fetch or copy it again."
        ) from None


def _regular(path: Path, label: str) -> Path:
    """The file itself; a folder in the hub's layout stands for the file of weights in it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{label} does not exist.") from None
    if stat.S_ISDIR(mode):
        inside = [path / name for name in _HUB_NAMES if (path / name).is_file()]
        if inside:
            return inside[0]
        raise UserError(
            f"{label} is a folder without one of {', '.join(_HUB_NAMES[:2])}; name the file of the weights in it."
        )
    if not stat.S_ISREG(mode):
        raise UserError(f"{label} is no regular file (a pipe, device or socket); copy the weights into a file.")
    return path


def read_weight_file(path: str | os.PathLike[str], *, key: str = "") -> WeightFile:
    """Read a file of torch or safetensors; nothing in it is executed.

    Args:
        path: The file, or a folder of the Hugging Face hub's layout with one in it.
        key: The configuration's key that names it, for the sentences.

    Raises:
        UserError: Missing, damaged, or something else than weights; the sentence names what it is.
    """
    label = f"{key}: '{path}'" if key else f"weight file '{path}'"
    try:
        file = _regular(Path(path).expanduser(), label)
        kind = sniff(file)
        if kind == SAFETENSORS:
            return WeightFile(file, _read_safetensors(file, label))
        if kind not in (TORCH_ZIP, TORCH_LEGACY):
            raise UserError(f"{label} {kind}")
        broken = damage(file)
        if broken:
            raise UserError(f"{label} is damaged ({broken}); fetch or copy it again.")
        content, unread = _read_torch(file, kind, label)
    except OSError as error:
        raise UserError(f"{label} cannot be read ({error.strerror or type(error).__name__}).") from None
    except (ValueError, MemoryError) as error:  # a path with a zero byte; tensors larger than the memory
        first = str(error).split("\n")[0][:120] or "not enough memory"
        raise UserError(f"{label} cannot be read ({first}).") from None
    if isinstance(content, Mapping):
        return WeightFile(file, dict(content), unread)
    if isinstance(content, (Unread, torch.nn.Module)):
        raise UserError(whole_model(label, [name for name in unread if not name.startswith("torch.")][:1]))
    raise UserError(f"{label} holds a {type(content).__name__} alone, not named weights (a state dict).")


__all__ = ["Unread", "WeightFile", "read_weight_file", "whole_model"]
