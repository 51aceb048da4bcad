"""The loop of :mod:`pipeline.engine.masked_sgd`, compiled with numba, which this module needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def as_float(_: Any, bits: Any) -> Any:
    """Read the bits of a whole number as those of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return types.float32(types.int32), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(_: Any, a: Any, b: Any, c: Any) -> Any:
    """Compute ``a * b + c``, rounded once."""

    def generate(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def floats_at(_: Any, address: Any) -> Any:
    """Return a pointer to the float32 at an address."""
    return types.CPointer(types.float32)(types.int64), _inttoptr


@intrinsic  # type: ignore[untyped-decorator]
def words_at(_: Any, address: Any) -> Any:
    """Return a pointer to the int32 at an address."""
    return types.CPointer(types.int32)(types.int64), _inttoptr


@intrinsic  # type: ignore[untyped-decorator]
def bytes_at(_: Any, address: Any) -> Any:
    """Return a pointer to the int8 at an address."""
    return types.CPointer(types.int8)(types.int64), _inttoptr


def _inttoptr(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


def _masked_step(
    tensors: Any,
    minus_lr: Any,
    momentum: Any,
    weight_decay: Any,
    decays: Any,
    nesterov: Any,
) -> None:
    for number in range(len(tensors)):
        size = tensors[number, 4]
        weight, buffer = carray(floats_at(tensors[number, 0]), size), carray(floats_at(tensors[number, 2]), size)
        gradient, is_active = carray(words_at(tensors[number, 1]), size), carray(bytes_at(tensors[number, 3]), size)
        has_momentum = tensors[number, 2] != 0
        for i in range(size):
            change = as_float(gradient[i] & -np.int32(is_active[i]))
            if decays:
                change = multiply_add(weight[i], weight_decay, change)
            if has_momentum:
                average = buffer[i] * momentum + change
                buffer[i] = average
                change = multiply_add(average, momentum, change) if nesterov else average
            weight[i] = multiply_add(change, minus_lr, weight[i])


# every flag is given: numba takes a missing one from its environment or from the function that it is compiling
_FLAGS: dict[str, Any] = {
    "nogil": True,
    "fastmath": False,
    "error_model": "numpy",
    "forceinline": False,
    "parallel": False,
    "boundscheck": False,
    "debug": False,
    "_nrt": True,
}
try:
    masked_step = njit(**_FLAGS, cache=True)(_masked_step)
except RuntimeError:  # no folder for the cache is writable
    masked_step = njit(**_FLAGS)(_masked_step)
