"""List how the arithmetic of a run changed from one version of this project to the next. Standard library only.

A run that resumes from a checkpoint of an earlier version continues with today's arithmetic. If
that differs, in the last bit of a weight or in a mask, the resume is not bit-exact, and a warning
says so. A checkpoint records the number of changes known when it was saved.
"""

from __future__ import annotations

# Oldest first; rows are only ever added. Each says what is computed differently, and is also listed
# in CHANGELOG.md under "Arithmetic".
CHANGES: tuple[str, ...] = (
    "images are resized without fast floating-point mathematics: a few pixels differ by one level",
    "`sparsity.method: granet`: what its density step prunes and growth takes back at once restarts at 0",
    "on a CPU in channels-last format: a 1×1 convolution with a stride and fewer than 8 input channels (16 with "
    "AVX-512) takes every n-th pixel first, because oneDNN's weight gradient would damage memory",
)


def changes_since(number: int) -> list[str]:
    """List the changes since a checkpoint that records ``number`` changes (0 if it was saved by version 0.1)."""
    if number > len(CHANGES):
        return ["the checkpoint was saved by a newer version of this project, whose arithmetic differs"]
    return list(CHANGES[number:])
