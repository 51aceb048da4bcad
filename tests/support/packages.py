"""System packages that some tests need. ``.ci/run`` treats a test that was skipped for one as failed."""

from __future__ import annotations

import pytest

from data_prep.doctor import FASHION_MNIST
from tools.browser import find_chromium

WHY_NO_FASHION_MNIST = "Fashion-MNIST is not here: apt-get install dataset-fashion-mnist"
needs_fashion_mnist = pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason=WHY_NO_FASHION_MNIST)
needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="no browser is here: apt-get install chromium")


def require_fashion_mnist() -> None:
    """Skip the test whose fixture calls this where the data set is not installed."""
    if not FASHION_MNIST.is_dir():
        pytest.skip(WHY_NO_FASHION_MNIST)
