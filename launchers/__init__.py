"""Entry points: ``train`` (train a network), ``evaluate`` (evaluate tickets) and ``run`` (start ranks on a cluster)."""

import pipeline  # noqa: F401  (keeps the old module paths importable)
