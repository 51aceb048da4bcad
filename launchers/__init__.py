"""Entry points: ``train`` (the story of a run), ``evaluate`` (tickets to a report) and ``run`` (the supervisor for clusters)."""

import pipeline  # noqa: F401  (keeps the old module paths importable)
