"""Plant a defect in the project: a function with a part of its text replaced."""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def planted(owner: Any, name: str, old: str, new: str) -> Iterator[None]:
    """Inside the block, ``owner.name`` is the same function with ``new`` in place of ``old``.

    ``owner`` is a module or a class. ``old`` must occur once, so that a change of the project that makes
    the defect impossible to plant is noticed.
    """
    real = inspect.unwrap(getattr(owner, name))
    text = textwrap.dedent(inspect.getsource(real))
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {name}"
    code = compile(text.replace(old, new), inspect.getfile(real), "exec", __future__.annotations.compiler_flag)
    made: dict[str, Any] = {}
    exec(code, real.__globals__, made)
    before = owner.__dict__[name]
    setattr(owner, name, made[name])
    try:
        yield
    finally:
        setattr(owner, name, before)
