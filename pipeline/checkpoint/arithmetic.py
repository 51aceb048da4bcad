"""Changes of what a run computes, from one version of this project to the next. Standard library only.

A run that resumes from a checkpoint of an earlier version goes on with today's arithmetic. Where
that differs, in the last bit of a weight or in a mask, the run is not the one that would have been,
and the resume says so. A checkpoint records how many of these changes it was computed with.
"""

from __future__ import annotations

# Oldest first; rows are only ever added. Each says what is computed differently, and stands in
# CHANGELOG.md under "Arithmetic" too.
CHANGES: tuple[str, ...] = ()


def changes_since(number: int) -> list[str]:
    """What is computed differently since a checkpoint that records ``number`` changes; none is recorded by version 0.1."""
    if number > len(CHANGES):
        return ["the checkpoint is of a newer version of this project, which computes something differently"]
    return list(CHANGES[number:])
