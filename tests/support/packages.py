"""System packages that some tests need. ``.ci/run`` treats a test that was skipped for one as failed."""

from __future__ import annotations

import pytest

from data_prep.doctor import FASHION_MNIST

WHY_NO_FASHION_MNIST = "Fashion-MNIST is not here: apt-get install dataset-fashion-mnist"
needs_fashion_mnist = pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason=WHY_NO_FASHION_MNIST)


def require_fashion_mnist() -> None:
    """Skip the test whose fixture calls this where the data set is not installed."""
    if not FASHION_MNIST.is_dir():
        pytest.skip(WHY_NO_FASHION_MNIST)
