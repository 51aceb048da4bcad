"""Sparse training from scratch at ImageNet scale: masks, tickets, superposition and ensembles.

Nothing heavy is imported here: ``pipeline.sparse``, ``pipeline.tickets.format`` and
``pipeline.evaluation.metrics`` need torch and numpy only.
"""

from pipeline.moved import keep_old_paths

keep_old_paths()
