"""Dense engines for CPUs as functions from images to logits: torch, ONNX Runtime, OpenVINO, on a number of threads."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Images = npt.NDArray[np.float32]
Engine = Callable[[Images], npt.NDArray[np.float32]]
INSTALL = "python -m pip install -e '.[bench]'"


def missing() -> list[str]:
    """Names of engines that are not installed."""
    return [
        name for name in ("onnxruntime", "openvino", "onnx", "onnxscript") if importlib.util.find_spec(name) is None
    ]


def dense_engines(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    threads: int,
    precisions: tuple[str, ...] = ("fp32",),
    with_compile: bool = False,
) -> Iterator[tuple[str, Engine]]:
    """Build every engine that is installed, for images of ``shape`` [N, C, H, W].

    Args:
        model: in evaluation mode.
        shape: of the images.
        threads: of each engine.
        precisions: ``fp32``, ``bf16`` and ``int8``, of those that an engine has.
        with_compile: torch.compile as well, which takes minutes.
    """
    if "fp32" in precisions:
        yield "torch", _torch(model)
        if with_compile:
            yield "torch.compile", _torch(torch.compile(model))
    absent = missing()
    if "onnx" in absent or "onnxscript" in absent:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, shape, path)
        if "onnxruntime" not in absent:
            if "fp32" in precisions:
                yield "ONNX Runtime", _onnxruntime(path, threads)
            if "int8" in precisions:
                yield "ONNX Runtime int8", _onnxruntime(_quantized(path, shape), threads)
        if "openvino" not in absent:
            for precision in precisions:
                if precision == "int8" and "onnxruntime" not in absent:
                    yield "OpenVINO int8", _openvino(_quantized(path, shape), threads, "f32")
                elif precision != "int8":
                    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
                    yield f"OpenVINO{'' if precision == 'fp32' else ' ' + precision}", _openvino(path, threads, hint)


def _torch(model: Callable[[torch.Tensor], torch.Tensor]) -> Engine:
    def run(images: Images) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(images)).numpy())

    return run


def export(model: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Write the network as ONNX."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(
        model, (torch.zeros(shape),), path, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
    )


def _onnxruntime(path: Path, threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(None, {"images": images})[0])


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

    target = path.with_name("int8.onnx")
    if target.exists():
        return target
    random = np.random.default_rng(0)
    batches = iter([{"images": random.standard_normal(shape, np.float32)} for _ in range(2)])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(batches, None)

    prepared = path.with_name("prepared.onnx")
    quantization.shape_inference.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(prepared), str(target), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True
    )
    return target


def capped_environment() -> dict[str, str]:
    """Variables that keep OpenVINO and torch to AVX2, for a process that is started with them."""
    return {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def is_capped() -> bool:
    """Whether this process was started so."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2"
