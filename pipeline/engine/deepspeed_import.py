"""What importing DeepSpeed costs, undone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing_deepspeed() -> Iterator[None]:
    """Import DeepSpeed inside this block: mlflow is not imported with it.

    DeepSpeed's autotuner, which no run uses, imports mlflow if it is there: a second of processor, four
    times what the rest of DeepSpeed takes.
    """
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # "import mlflow" is then an ImportError
    try:
        yield
    finally:
        del sys.modules["mlflow"]
