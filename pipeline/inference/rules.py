"""One rule for each operator that runs without torch: which operations it becomes, or which it goes into."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.inference.graph import Add, Clamped, Convolution, Copy, Mean, Planes, Pointwise, Pool
from pipeline.inference.lowering import Lowering
from pipeline.inference.trace import Held, Operator, Value

MAX_POOL = 16  # widest window that is compiled
Rule = Callable[[Lowering, Operator], bool]  # False: the operator stays on torch


def _convolution(low: Lowering, operator: Operator) -> bool:
    x, weight, bias, stride, padding, dilation, is_transposed, _, groups = operator.arguments[:9]
    source = low.planes_of(x)
    if source is None or is_transposed or not isinstance(weight, Held) or len(weight.shape) != 4:
        return False
    (output,) = operator.outputs
    assert output is not None
    stride, padding, dilation = (_pair(item) for item in (stride, padding, dilation))
    num_outputs = weight.shape[0]
    return low.add(
        Convolution(
            weight.name.removesuffix(".weight"),
            source,
            Planes(*output.shape[1:]),
            weight=weight.name,
            scale=np.ones(num_outputs, np.float32),
            bias=np.zeros(num_outputs, np.float32) if bias is None else low.numbers(bias),
            kernel=_pair(weight.shape[2:]),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        ),
        output,
    )


def _linear(low: Lowering, operator: Operator) -> bool:
    bias, x, weight = operator.arguments if operator.name == "addmm" else (None, *operator.arguments)
    held = low.transposed.get(weight) if isinstance(weight, Value) else None
    if held is None or operator.options or not isinstance(x, Value) or not isinstance(bias, Held | None):
        return False
    is_tokens = x.shape[0] > 1
    source = low.planes_of(x, as_tokens=is_tokens)
    if source is None:
        return False
    num_outputs = held.shape[0]
    return low.add(
        Convolution(
            held.name.removesuffix(".weight"),
            source,
            Planes(num_outputs, 1, source.width if is_tokens else 1),
            weight=held.name,
            scale=np.ones(num_outputs, np.float32),
            bias=np.zeros(num_outputs, np.float32) if bias is None else low.numbers(bias),
        ),
        operator.outputs[0],
        is_tokens=is_tokens,
    )


def _transpose(low: Lowering, operator: Operator) -> bool:
    (weight,) = operator.arguments
    if isinstance(weight, Held) and len(weight.shape) == 2 and operator.outputs[0] is not None:
        low.transposed[operator.outputs[0]] = weight
        return True
    return False


def _batch_norm(low: Lowering, operator: Operator) -> bool:
    x, weight, bias, mean, variance, *rest = operator.arguments
    is_training, epsilon = (rest[0], rest[-1]) if len(rest) == 3 else (False, rest[-1])
    source = low.planes_of(x)
    if source is None or is_training or mean is None or not isinstance(mean, Held):
        return False
    scale = 1 / np.sqrt(low.numbers(variance).astype(np.float64) + epsilon)
    if weight is not None:
        scale = scale * low.numbers(weight)
    shift = -low.numbers(mean).astype(np.float64) * scale + (0 if bias is None else low.numbers(bias))
    made = low.only_use(x)
    output = operator.outputs[0]
    if isinstance(made, Convolution) and made.other is None and made.low == -math.inf and made.high == math.inf:
        made.scale = (made.scale * scale).astype(np.float32)
        made.bias = (made.bias * scale + shift).astype(np.float32)
        return low.same(output, made.output)
    planes = Planes(source.channels, source.height, source.width)
    step = Pointwise("batch_norm", source, planes, scale=scale.astype(np.float32), shift=shift.astype(np.float32))
    return low.add(step, output)


def _limits(low: float, high: float) -> Rule:
    def rule(lowering: Lowering, operator: Operator) -> bool:
        bottom, top = low, high
        if operator.name in ("hardtanh", "clamp"):
            given = [*operator.arguments[1:3], *operator.options.values()]
            if len(given) != 2 or not all(isinstance(limit, int | float) for limit in given):
                return False
            bottom, top = map(float, given)
        elif len(operator.arguments) > 1 or operator.options:
            return False
        return _pointwise(lowering, operator, "same", bottom, top)

    return rule


def _pointwise(low: Lowering, operator: Operator, function: str, bottom: float, top: float) -> bool:
    x, (output,) = operator.arguments[0], operator.outputs
    if not isinstance(x, Value) or x not in low.planes:
        return False
    source, is_tokens = low.planes[x]
    made = low.only_use(x)
    is_open = isinstance(made, Clamped) and not (isinstance(made, Pointwise) and made.function != "same")
    if is_open and isinstance(made, Clamped) and (made.low, made.high) == (-math.inf, math.inf):
        if function == "same":
            made.low, made.high = bottom, top
            return low.same(output, made.output, is_tokens=is_tokens)
        if isinstance(made, Pointwise):
            made.function = function
            return low.same(output, made.output, is_tokens=is_tokens)
    planes, count = Planes(source.channels, source.height, source.width), source.channels
    step = Pointwise(
        operator.name,
        source,
        planes,
        low=bottom,
        high=top,
        function=function,
        scale=np.ones(count, np.float32),
        shift=np.zeros(count, np.float32),
    )
    return low.add(step, output, is_tokens=is_tokens)


def _function(name: str) -> Rule:
    def rule(low: Lowering, operator: Operator) -> bool:
        function = name
        if operator.options.get("approximate") == "tanh" and name == "gelu":
            function = "gelu_tanh"
        elif len(operator.arguments) > 1 or operator.options.get("approximate", "none") != "none":
            return False
        return _pointwise(low, operator, function, -math.inf, math.inf)

    return rule


def _add(low: Lowering, operator: Operator) -> bool:
    if len(operator.arguments) != 2 or operator.options.get("alpha", 1) != 1:
        return False
    one, two = operator.arguments
    if not isinstance(one, Value) or not isinstance(two, Value) or one.shape != two.shape:
        return False
    if not (one in low.planes or two in low.planes):
        return False
    is_tokens = low.planes[one if one in low.planes else two][1]
    given = [low.planes_of(each, as_tokens=is_tokens) for each in (one, two)]
    if given[0] is None or given[1] is None:
        return False
    planes = [each for each in given if each is not None]
    for value, other in ((one, planes[1]), (two, planes[0])):
        made = low.only_use(value)
        is_free = (
            isinstance(made, Convolution) and made.other is None and (made.low, made.high) == (-math.inf, math.inf)
        )
        if one is not two and is_free and isinstance(made, Convolution):
            made.other = other
            low.steps.remove(made)  # it runs later now, when what it adds is there
            return low.add(made, operator.outputs[0], is_tokens=is_tokens)
    output = Planes(planes[0].channels, planes[0].height, planes[0].width)
    return low.add(Add("add", planes[0], output, other=planes[1]), operator.outputs[0], is_tokens=is_tokens)


def _max_pool(low: Lowering, operator: Operator) -> bool:
    x, kernel, *rest = operator.arguments
    stride = rest[0] if rest and rest[0] else kernel
    padding = rest[1] if len(rest) > 1 else 0
    dilation = rest[2] if len(rest) > 2 else 1
    source, output = low.planes_of(x), operator.outputs[0]
    kernel, stride, padding = _pair(kernel), _pair(stride), _pair(padding)
    indices = operator.outputs[1] if len(operator.outputs) > 1 else None
    if source is None or output is None or _pair(dilation) != (1, 1) or kernel[1] > MAX_POOL:
        return False
    if indices is not None and low.uses[indices]:
        return False
    planes = Planes(*output.shape[1:])
    return low.add(Pool("max_pool", source, planes, kind="max", kernel=kernel, stride=stride, padding=padding), output)


def _average_pool(low: Lowering, operator: Operator) -> bool:
    x, kernel, *rest = operator.arguments
    defaults = [kernel, 0, False, True, None]
    stride, padding, _, is_padding_counted, divisor = [*rest, *defaults[len(rest) :]]
    source, (output,) = low.planes_of(x), operator.outputs
    kernel, stride, padding = _pair(kernel), _pair(stride or kernel), _pair(padding)
    if source is None or output is None or kernel[1] > MAX_POOL or operator.options:
        return False
    planes = Planes(*output.shape[1:])
    counts = []
    sizes = (planes.height, source.height), (planes.width, source.width)
    for (num_outputs, size), k, s, p in zip(sizes, kernel, stride, padding, strict=True):
        start = np.arange(num_outputs) * s - p
        end = np.minimum(start + k, size + p)
        counts.append(end - start if is_padding_counted else np.minimum(end, size) - np.maximum(start, 0))
    shares = 1 / (np.outer(*counts) if divisor is None else np.full(planes.height * planes.width, divisor))
    step = Pool(
        "avg_pool",
        source,
        planes,
        kind="average",
        kernel=kernel,
        stride=stride,
        padding=padding,
        shares=shares.astype(np.float32).reshape(-1),
    )
    return low.add(step, output)


def _mean(low: Lowering, operator: Operator) -> bool:
    x, dimensions = operator.arguments[:2]
    source, (output,) = low.planes_of(x), operator.outputs
    if source is None or dimensions is None or sorted(d % 4 for d in dimensions) != [2, 3] or operator.options:
        return False
    if not isinstance(x, Value) or len(x.shape) != 4:
        return False
    if source.is_vector:
        return low.same(output, source)
    return low.add(Mean("mean", source, Planes(source.channels)), output)


def _adaptive_average_pool(low: Lowering, operator: Operator) -> bool:
    x, size = operator.arguments
    source, (output,) = low.planes_of(x), operator.outputs
    if source is None or output is None:
        return False
    height, width = _pair(size)
    if (height, width) == (source.height, source.width):
        return low.same(output, source)
    if (height, width) == (1, 1):
        return low.add(Mean("mean", source, Planes(source.channels)), output)
    return False


def _view(low: Lowering, operator: Operator) -> bool:
    x, (output,) = operator.arguments[0], operator.outputs
    if not isinstance(x, Value) or x not in low.planes or output is None:
        return False
    source, is_tokens = low.planes[x]
    if is_tokens:  # a token's numbers stay together
        is_kept = output.shape[-1:] == x.shape[-1:]
        return is_kept and low.same(output, source, is_tokens=True)
    if source.is_vector and output.shape[:2] == (1, source.channels) and math.prod(output.shape) == source.channels:
        return low.same(output, source)
    if len(x.shape) == 4 and output.shape == (1, math.prod(x.shape)):
        return low.add(Copy("flatten", source, Planes(output.shape[1]), is_flattened=True), output)
    return False


def _clone(low: Lowering, operator: Operator) -> bool:
    x, (output,) = operator.arguments[0], operator.outputs
    if isinstance(x, Value) and x in low.planes and output is not None and output.shape == x.shape:
        planes, is_tokens = low.planes[x]
        return low.same(output, planes, is_tokens=is_tokens)
    return False


def _cat(low: Lowering, operator: Operator) -> bool:
    parts, (output,) = operator.arguments[0], operator.outputs
    dimension = operator.arguments[1] if len(operator.arguments) > 1 else 0
    if output is None or len(output.shape) != 4 or dimension % 4 != 1:
        return False
    planes = [low.planes_of(part) for part in parts]
    if any(each is None for each in planes):
        return False
    joined, channel = Planes(*output.shape[1:]), 0
    for each in planes:
        assert each is not None
        low.add(Copy("concatenate", each, joined, first_channel=channel), output)
        channel += each.channels
    low.made_by.pop(id(joined))
    return True


def _pair(item: Any) -> tuple[int, int]:
    if isinstance(item, int):
        return item, item
    numbers = tuple(item)
    return (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


RULES: dict[str, Rule] = {
    "convolution": _convolution,
    "addmm": _linear,
    "mm": _linear,
    "t": _transpose,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "relu": _limits(0.0, math.inf),
    "relu6": _limits(0.0, 6.0),
    "hardtanh": _limits(-1.0, 1.0),
    "clamp": _limits(0.0, 0.0),
    "sigmoid": _function("sigmoid"),
    "tanh": _function("tanh"),
    "silu": _function("silu"),
    "gelu": _function("gelu"),
    "hardsigmoid": _function("hardsigmoid"),
    "hardswish": _function("hardswish"),
    "add": _add,
    "max_pool2d_with_indices": _max_pool,
    "max_pool2d": _max_pool,
    "avg_pool2d": _average_pool,
    "_adaptive_avg_pool2d": _adaptive_average_pool,
    "adaptive_avg_pool2d": _adaptive_average_pool,
    "mean": _mean,
    "view": _view,
    "_unsafe_view": _view,
    "reshape": _view,
    "clone": _clone,
    "cat": _cat,
}
