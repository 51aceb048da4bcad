"""Dense engines for CPUs, to compare with: torch, ONNX Runtime and OpenVINO, as functions from images to logits."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Images = npt.NDArray[np.float32]
Engine = Callable[[Images], npt.NDArray[np.float32]]
PRECISIONS = ("fp32", "bf16", "int8")
PACKAGES = ("onnxruntime", "openvino", "onnx", "onnxscript")
INSTALL = f"python -m pip install {' '.join(PACKAGES)}"


@dataclass(frozen=True)
class DenseEngine:
    """An engine that is installed; ``open`` builds it, which may take minutes or fail."""

    name: str
    precision: str
    open: Callable[[], Engine]


def missing() -> list[str]:
    """Return the names of packages of engines that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def has_compiler() -> bool:
    """Return whether there is a C++ compiler, which torch.compile needs."""
    return any(shutil.which(name) for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")))


def dense_engines(
    model: nn.Module,
    shape: tuple[int, ...],
    folder: Path,
    *,
    threads: int,
    precisions: tuple[str, ...] = PRECISIONS,
    with_compile: bool = False,
) -> list[DenseEngine]:
    """List the engines that are installed. torch computes on ``torch.get_num_threads()`` threads.

    Args:
        model: in evaluation mode.
        shape: of the images, [N, C, H, W].
        folder: for files, which must be there until the engines are open.
        threads: of each engine.
        precisions: some of :data:`PRECISIONS`; those that an engine does not have are left out.
        with_compile: torch.compile as well, which takes minutes.
    """
    found = [DenseEngine("torch", "fp32", lambda: _torch(model))]
    if with_compile and has_compiler():
        found.append(DenseEngine("torch.compile", "fp32", lambda: _torch(torch.compile(model))))
    exported = functools.cache(lambda: export(model, shape, folder / "model.onnx"))
    quantized = functools.cache(lambda: _quantized(exported(), shape))
    absent = missing()
    can_export = "onnx" not in absent and "onnxscript" not in absent
    if can_export and "onnxruntime" not in absent:
        found.append(DenseEngine("ONNX Runtime", "fp32", lambda: _onnxruntime(exported(), threads)))
        found.append(DenseEngine("ONNX Runtime", "int8", lambda: _onnxruntime(quantized(), threads)))
    if can_export and "openvino" not in absent:
        found.append(DenseEngine("OpenVINO", "fp32", lambda: _openvino(exported(), threads, "f32")))
        if "BF16" in _openvino_capabilities():
            found.append(DenseEngine("OpenVINO", "bf16", lambda: _openvino(exported(), threads, "bf16")))
        if "onnxruntime" not in absent:  # which quantises
            found.append(DenseEngine("OpenVINO", "int8", lambda: _openvino(quantized(), threads, "f32")))
    return [engine for engine in found if engine.precision in precisions]


def _torch(model: Callable[[torch.Tensor], torch.Tensor]) -> Engine:
    def run(images: Images) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(images)).numpy())

    return run


def export(model: nn.Module, shape: tuple[int, ...], path: Path) -> Path:
    """Write the network as ONNX, for images of one shape; returns the path."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(
        model,
        (torch.zeros(shape),),
        path,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["images"],
        output_names=["logits"],
    )
    return path


def _onnxruntime(path: Path, threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(None, {"images": images})[0])


@functools.cache
def _openvino_capabilities() -> tuple[str, ...]:
    import openvino

    return tuple(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _openvino(path: Path, threads: int, precision: str) -> Engine:
    import openvino

    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()
    return lambda images: np.array(next(iter(request.infer({0: images}).values())))


def _quantized(path: Path, shape: tuple[int, ...]) -> Path:
    """Quantise to int8 with ONNX Runtime, calibrated with two random batches: for its speed, not its accuracy."""
    from onnxruntime import quantization

    random = np.random.default_rng(0)
    batches = iter([{"images": random.standard_normal(shape, np.float32)} for _ in range(2)])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(batches, None)

    prepared, target = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    quantization.shape_inference.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(prepared), str(target), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True
    )
    return target
