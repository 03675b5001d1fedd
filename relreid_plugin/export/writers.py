"""Writing graphs: ONNX by torch's exporter, OpenVINO out of that, TorchScript by tracing; float32, fp16 or int8.

ONNX is written by torch's tracing exporter: it takes every model here, in a third of a second for a small one where the
exporter on torch.export takes seven, and both give the same opset. Tracing fixes what Python decides on the way, such as
numbers of modalities and parts, which a graph is to have fixed; that nothing else was fixed is what the proof is for, which
runs the file with batches of several sizes. Where tracing does not know an operator, the other exporter is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backbones.runtimes import ABOUT, library
from ..errors import UserError
from .graphs import Graph
from .tracing import open_batches, quiet, rms_norm

OPSET = 20
"""Of ONNX: the newest that both exporters of torch write; it has GELU and the like as operators of their own."""
PRECISIONS = ("float32", "fp16", "int8")
EXPORTERS = ("auto", "trace", "dynamo")
LARGEST = 2 * 1024**3 - 1024**2
"""Bytes of weights that one ONNX file takes (protobuf's 2 GB); above, they go into a file beside it."""

Batches = Sequence[dict[str, np.ndarray]]


def write_graph(
    graph: Graph,
    path: Path,
    kind: str,
    *,
    precision: str = "float32",
    calibration: Batches = (),
    exporter: str = "auto",
) -> None:
    """Write a graph.

    Args:
        graph: What is exported.
        path: The file; OpenVINO's weights go beside it.
        kind: ``onnx``, ``openvino`` or ``torchscript``.
        precision: One of :data:`PRECISIONS`. Inputs and outputs stay float32.
        calibration: Inputs for ``int8``, of which the ranges of activations are taken.
        exporter: One of :data:`EXPORTERS`, of ONNX.

    Raises:
        UserError: A library is missing, or the kind has no such precision.
    """
    if kind == "torchscript":
        if precision != "float32":
            raise UserError(f"--to torchscript writes float32 only; for {precision} write --to onnx or --to openvino.")
        _write_torchscript(graph, path)
        return
    if precision == "int8" and not calibration:
        raise UserError("int8 needs images to take the ranges of activations from; name a folder by --calibration.")
    if kind == "openvino":
        _write_openvino(graph, path, precision, calibration, exporter)
        return
    write_onnx(graph, path, exporter=exporter)
    if precision == "fp16":
        _halve_onnx(path)
    elif precision == "int8":
        _quantise_onnx(path, calibration)
    if precision != "float32":
        _describe_onnx(path, graph.about)


def write_onnx(graph: Graph, path: Path, *, exporter: str = "auto") -> None:
    """Write a graph as ONNX in float32.

    Raises:
        UserError: A library is missing, or torch cannot export the graph.
    """
    onnx = library("onnx", "an export to ONNX or OpenVINO")
    tried = {"auto": ["trace", "dynamo"]}.get(exporter, [exporter])
    if graph.bytes > LARGEST:
        tried = ["dynamo"]  # the other one has no files beside the file
    for name in tried:
        try:
            with quiet(), open_batches(), torch.no_grad():
                _EXPORTERS[name](graph, path)
            break
        except (UserError, OSError):  # a full disk is not the model's fault
            raise
        except Exception as error:
            if name == tried[-1]:
                first = " ".join(str(error).split())[:200].rstrip(" .") or type(error).__name__
                raise UserError(f"torch cannot write this model as ONNX ({first}).") from error
    outside = graph.bytes > LARGEST
    if not outside:
        onnx.checker.check_model(str(path))
    _describe_onnx(path, graph.about)


def _trace(graph: Graph, path: Path) -> None:
    torch.onnx.register_custom_op_symbolic("aten::rms_norm", rms_norm, OPSET)
    torch.onnx.export(
        graph.module,
        tuple(graph.inputs.values()),
        str(path),
        dynamo=False,
        input_names=list(graph.inputs),
        output_names=graph.outputs,
        dynamic_axes=graph.dynamic,
        opset_version=OPSET,
    )


def _dynamo(graph: Graph, path: Path) -> None:
    library("onnxscript", "the exporter 'dynamo'")
    dimensions = [
        {axis: torch.export.Dim(said, min=1) for axis, said in graph.dynamic.get(name, {}).items()} for name in graph.inputs
    ]
    program: Any = torch.onnx.export(
        graph.module,
        tuple(graph.inputs.values()),
        dynamo=True,
        input_names=list(graph.inputs),
        output_names=graph.outputs,
        opset_version=OPSET,
        dynamic_shapes=tuple(dimensions),
        verbose=False,
    )
    program.save(str(path), external_data=graph.bytes > LARGEST)


_EXPORTERS = {"trace": _trace, "dynamo": _dynamo}


def _describe_onnx(path: Path, about: dict[str, Any]) -> None:
    onnx = library("onnx", "an export to ONNX")
    model = onnx.load(str(path), load_external_data=False)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {ABOUT: json.dumps(about)})
    model.producer_name = "relreid_plugin"
    onnx.save_model(model, str(path))


def _halve_onnx(path: Path) -> None:
    """Halve the weights and what is computed with them; inputs and outputs stay float32."""
    onnx = library("onnx", "an export to ONNX")
    convert = library("onnxruntime.transformers.float16", "fp16")
    model = onnx.load(str(path))
    with quiet():
        half = convert.convert_float_to_float16(model, keep_io_types=True)
    onnx.save_model(half, str(path))


class _Reader:
    """onnxruntime's reader of calibration data."""

    def __init__(self, batches: Batches) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next inputs; ``None``: no more."""
        return next(self._left, None)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self._left

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._left)


def _quantise_onnx(path: Path, calibration: Batches) -> None:
    """Quantise weights per channel and activations per tensor, both to signed bytes, as pairs of Q and DQ."""
    quantisation = library("onnxruntime.quantization", "int8")
    prepare = library("onnxruntime.quantization.shape_inference", "int8")
    prepared, done = path.with_suffix(".prepared.onnx"), path.with_suffix(".int8.onnx")
    with quiet():
        prepare.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantisation.quantize_static(
            str(prepared),
            str(done),
            _Reader(calibration),
            quant_format=quantisation.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            activation_type=quantisation.QuantType.QInt8,
            weight_type=quantisation.QuantType.QInt8,
        )
    done.replace(path)
    prepared.unlink()


def _write_openvino(graph: Graph, path: Path, precision: str, calibration: Batches, exporter: str) -> None:
    """Write OpenVINO's form of the ONNX graph."""
    ov = library("openvino", "an export to OpenVINO")
    between = path.with_suffix(".onnx")
    write_onnx(graph, between, exporter=exporter)
    with quiet():
        model = ov.convert_model(str(between))
        if precision == "int8":
            nncf = library("nncf", "int8 of OpenVINO")
            model = nncf.quantize(model, nncf.Dataset(list(calibration)), subset_size=len(calibration))
        model.set_rt_info(json.dumps(graph.about), [ABOUT])
        ov.save_model(model, str(path), compress_to_fp16=precision == "fp16")
    for left in between.parent.glob(f"{between.name}*"):
        left.unlink()


def _write_torchscript(graph: Graph, path: Path) -> None:
    with quiet(), open_batches(), torch.no_grad():
        program = torch.jit.trace(graph.module, tuple(graph.inputs.values()), check_trace=False)
        torch.jit.save(program, str(path), _extra_files={ABOUT: json.dumps(graph.about)})


__all__ = ["EXPORTERS", "LARGEST", "OPSET", "PRECISIONS", "Batches", "write_graph", "write_onnx"]
