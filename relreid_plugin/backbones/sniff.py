"""What a file given as weights really is, by its first bytes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

TORCH_ZIP, TORCH_LEGACY, SAFETENSORS = "torch", "torch before 1.6", "safetensors"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_HEADER_LIMIT = 100_000_000  # bytes, as the safetensors package has it
_STATE_DICT = "save its state dict by torch.save(model.state_dict(), FILE), and give that."

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights; fetch them by 'git lfs pull'."),
    (b"\x89HDF\r\n\x1a\n", f"is an HDF5 file (Keras, TensorFlow); load it there, convert it to torch and {_STATE_DICT}"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it by gunzip, or tar -xzf, and give the file inside."),
    (b"BZh", "is compressed by bzip2; unpack it by bunzip2 and give the file inside."),
    (b"\xfd7zXZ\0", "is compressed by xz; unpack it by unxz and give the file inside."),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; unpack it by unzstd and give the file inside."),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive; unpack it and give the file inside."),
    (b"Rar!\x1a\x07", "is a RAR archive; unpack it and give the file inside."),
    (b"PK\x05\x06", "is an empty zip archive; fetch the weights again."),
    (b"\x93NUMPY", f"is an array of numpy (.npy), not named weights; {_STATE_DICT}"),
    (b"GGUF", "is a GGUF file of a language model, no weights of an image network."),
    (b"\x89PNG", "is a picture (PNG); give the file of the weights."),
    (b"\xff\xd8\xff", "is a picture (JPEG); give the file of the weights."),
    (b"%PDF", "is a PDF document; give the file of the weights."),
    (b"MATLAB 5.0", f"is a MATLAB file; load it there, convert it to torch and {_STATE_DICT}"),
)


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether the first bytes of a file of ``size`` bytes are those of safetensors: a length, then JSON."""
    return len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _HEADER_LIMIT


def _archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError):
        return "is a torch file or zip archive that is cut off or damaged; fetch or copy it again."
    leaves = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in leaves or any(leaf.startswith("code/") for leaf in leaves):
        return f"is a TorchScript archive (torch.jit.save), which holds a program; open it by torch.jit.load, {_STATE_DICT}"
    if "data.pkl" in leaves:
        return TORCH_ZIP
    if any(name.endswith(".weights.h5") for name in names):
        return f"is a Keras archive; load it there, convert it to torch and {_STATE_DICT}"
    if names and all(name.endswith(".npy") for name in names):
        return f"is an archive of numpy arrays (.npz); load it, turn the arrays into tensors and {_STATE_DICT}"
    inside = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"is a zip archive ({inside}); unpack it and give the file of the weights inside."


def _text(head: bytes) -> str:
    """Sentence for a text file, else empty."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = head.decode(encoding)
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # else a character that the end of the sample cuts
            return ""
        text = head[: error.start].decode(encoding)
    text = text.strip()
    if any(ord(letter) < 32 and letter not in "\t\r\n\f" for letter in text):
        return ""
    start = text[:400].lower()
    if start.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in start:
        return "is a web page (HTML), not the weights; fetch the file itself (its 'raw' or 'download' address)."
    if start.startswith("<"):
        return "is an XML text, not weights; give the file of the weights."
    shown = " ".join(text[:60].split())
    if start.startswith(("{", "[")):
        if '"weight_map"' in text:
            return "is the index of weights that lie in several files; join them into one file and give that."
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        message = value.get("error") or value.get("message") if isinstance(value, dict) else None
        if isinstance(message, (str, dict)):
            shown = " ".join(str(message)[:60].split())
            return f"is an error message of a server ('{shown}'), not the weights; fetch them again."
        return f"is a JSON text ('{shown}'), not weights; give the file of the weights."
    return f"is a text ('{shown}'), not weights; give the file of the weights, or fetch it again."


def sniff(path: Path) -> str:
    """Say what a regular file is.

    Args:
        path: The file.

    Returns:
        :data:`TORCH_ZIP`, :data:`TORCH_LEGACY` or :data:`SAFETENSORS`; for anything else the rest of a sentence that begins
        with the file's name.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as stream:
        head = stream.read(4096)
    size = path.stat().st_size
    if not size:
        return "is empty; fetch or copy it again."
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    if head.startswith(LEGACY_MAGIC):
        return TORCH_LEGACY
    if not head.strip(b"\0"):
        return "begins with zeros alone, as an interrupted download does; fetch or copy it again."
    for magic, sentence in _MAGIC:
        if head.startswith(magic):
            return sentence
    if is_safetensors(head, size):
        return SAFETENSORS
    if head[257:262] == b"ustar" or (path.suffix == ".tar" and head[100:107].isdigit()):
        return "is a tar archive; unpack it by tar -xf and give the file of the weights inside."
    if head[4:8] == b"TFL3":
        return f"is a TensorFlow Lite model; convert it to torch and {_STATE_DICT}"
    if head[:1] == b"\x08" and (path.suffix == ".onnx" or b"pytorch" in head[:64] or b"onnx" in head[:256].lower()):
        return f"is an ONNX model; open what it was exported from and {_STATE_DICT}"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return f"is a pickle that torch.save did not write, and could run code; where it was made, {_STATE_DICT}"
    if path.suffix == ".safetensors":
        return "is no whole safetensors file: its header is damaged; fetch or copy it again."
    return _text(head) or "is no file of weights that is known here (torch or safetensors); give one of those."


__all__ = ["LEGACY_MAGIC", "SAFETENSORS", "TORCH_LEGACY", "TORCH_ZIP", "is_safetensors", "sniff"]
