"""Exported networks: files of ONNX, OpenVINO and TorchScript, opened to be run, each by its own library.

A file carries, as JSON, what one must know to use it (:class:`~relreid_plugin.backbones.runtimes.Runtime` has it as
``about``). The libraries are imported when a file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, did_you_mean

KINDS = ("onnx", "openvino", "torchscript")
SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".pt": "torchscript", ".ts": "torchscript"}
ABOUT = "relreid"
"""Name of the entry in a file that holds the JSON."""
INSTALL = "pip install 'relreid-plugin[export]'"

Arrays = Mapping[str, np.ndarray]


def library(module: str, what: str) -> Any:
    """Import an optional library.

    Args:
        module: Its module.
        what: What it is needed for, for the sentence.

    Raises:
        UserError: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UserError(f"{what} needs the package '{package}', which is not installed; run {INSTALL}.") from None


class Runtime:
    """An exported network, ready to run on the CPU.

    Attributes:
        path: Its file.
        about: What it says of itself; empty for files that were made elsewhere.
        inputs, outputs: Names, in order.
        version: The library and its version.
    """

    kind = ""
    about: dict[str, Any]
    inputs: list[str]
    outputs: list[str]
    version: str

    def __init__(self, path: Path, threads: int = 0) -> None:
        self.path = path

    def __call__(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs for inputs by name.

        Raises:
            UserError: An input is missing, or the library cannot run the file with what was given.
        """
        missing = [name for name in self.inputs if name not in arrays]
        if missing:
            raise UserError(f"'{self.path}' needs the input '{missing[0]}'; its inputs are {', '.join(self.inputs)}.")
        try:
            return self._run({name: np.ascontiguousarray(arrays[name]) for name in self.inputs})
        except Exception as error:  # every library has exceptions of its own
            first = " ".join(str(error).split())[:240].rstrip(" .") or type(error).__name__
            given = ", ".join(f"{name} {list(arrays[name].shape)} of {arrays[name].dtype}" for name in self.inputs)
            raise UserError(f"'{self.path}' cannot be run with {given} ({first}).") from error

    def _run(self, arrays: Arrays) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return a hash of the file, and of those that belong to it."""
        digest = hashlib.sha256()
        for path in (self.path, *companions(self.path)):
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()[:20]


def companions(path: Path) -> list[Path]:
    """Return the files beside an exported one that hold its weights: those of OpenVINO, and of ONNX beyond 2 GB."""
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else [path.with_name(path.name + ".data")]
    return [other for other in beside if other.is_file()]


class OnnxRuntime(Runtime):
    """A file of ONNX, run by onnxruntime."""

    kind = "onnx"

    def __init__(self, path: Path, threads: int = 0) -> None:
        super().__init__(path, threads)
        ort = library("onnxruntime", "an ONNX file")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [each.name for each in self._session.get_inputs()]
        self.outputs = [each.name for each in self._session.get_outputs()]
        self.about = _about(self._session.get_modelmeta().custom_metadata_map.get(ABOUT))
        self.version = f"onnxruntime {ort.__version__}"

    def _run(self, arrays: Arrays) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self._session.run(None, dict(arrays))))


class OpenVinoRuntime(Runtime):
    """A model of OpenVINO (an .xml file, its weights in a .bin beside it), in float32 where its weights are."""

    kind = "openvino"

    def __init__(self, path: Path, threads: int = 0) -> None:
        super().__init__(path, threads)
        ov = library("openvino", "an OpenVINO file")
        core = ov.Core()
        model = core.read_model(str(path))
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        self._model = core.compile_model(model, "CPU", options)
        self.inputs = [each.get_any_name() for each in self._model.inputs]
        self.outputs = [each.get_any_name() for each in self._model.outputs]
        self.about = _about(model.get_rt_info([ABOUT]).astype(str) if model.has_rt_info([ABOUT]) else None)
        self.version = f"openvino {ov.__version__}"

    def _run(self, arrays: Arrays) -> dict[str, np.ndarray]:
        found = self._model(dict(arrays))
        return {name: np.array(found[index]) for index, name in enumerate(self.outputs)}


class TorchScriptRuntime(Runtime):
    """A program of TorchScript, run by torch."""

    kind = "torchscript"

    def __init__(self, path: Path, threads: int = 0) -> None:
        import torch

        super().__init__(path, threads)
        extra = {ABOUT: ""}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.export will take its place
            self._program = torch.jit.load(str(path), map_location="cpu", _extra_files=extra).eval()
        said = extra[ABOUT]
        self.about = _about(said.decode() if isinstance(said, bytes) else said)
        self.inputs = list(self.about.get("inputs", ["images"]))
        self.outputs = list(self.about.get("outputs", ["features"]))
        self.version = f"torch {torch.__version__}"

    def _run(self, arrays: Arrays) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            found = self._program(*(torch.from_numpy(arrays[name]) for name in self.inputs))
        outputs = found if isinstance(found, tuple) else (found,)
        return {name: each.numpy() for name, each in zip(self.outputs, outputs)}


_RUNTIMES: dict[str, type[Runtime]] = {each.kind: each for each in (OnnxRuntime, OpenVinoRuntime, TorchScriptRuntime)}


def kind_of(path: Path) -> str:
    """Return the kind of an exported file by its name.

    Raises:
        UserError: Another suffix.
    """
    kind = SUFFIXES.get(path.suffix.lower(), "")
    if not kind:
        raise UserError(f"'{path}' is named like no exported network; the suffixes are {', '.join(SUFFIXES)}.")
    return kind


def open_runtime(path: Path | str, *, kind: str = "", threads: int = 0) -> Runtime:
    """Open an exported network.

    Args:
        path: Its file.
        kind: One of :data:`KINDS`; empty: by the file's name.
        threads: Of the library; 0: as many as it takes by itself. TorchScript has those of torch.

    Raises:
        UserError: No such file, one that is damaged or of another kind, or a library that is not installed.
    """
    path = Path(path)
    if kind and kind not in _RUNTIMES:
        raise UserError(f"there is no exported network of kind '{kind}'{did_you_mean(kind, _RUNTIMES)}")
    if not path.is_file():
        raise UserError(f"exported network '{path}' does not exist.")
    runtime = _RUNTIMES[kind or kind_of(path)]
    try:
        return runtime(path, threads or int(os.environ.get("OMP_NUM_THREADS") or 0))
    except UserError:
        raise
    except Exception as error:  # every library has exceptions of its own
        first = " ".join(str(error).split())[:160].rstrip(" .") or type(error).__name__
        raise UserError(f"'{path}' cannot be opened as {runtime.kind} ({first}); export it again.") from None


def _about(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


__all__ = ["ABOUT", "INSTALL", "KINDS", "SUFFIXES", "Runtime", "companions", "kind_of", "library", "open_runtime"]
