"""What a Sparsifier saves beside the model and the optimiser, and how the state of a different one is recognised."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.sparse.request import Request

POSTPONED = "postponed "  # prefix of the numbers of a postponed update; without such an update there are none
Numbers = Mapping[str, int | float | str]


@dataclass
class Progress:
    """What a Sparsifier counts and remembers from step to step, apart from its masks and tensors."""

    history_digest: str  # chained over all updates: runs with the same value had the same masks after every update
    steps: int = 0  # optimiser steps so far
    update_index: int = 0  # topology updates so far
    postponed: Request | None = None  # the update that is still to be made, because its step was skipped

    def note_update(self, mask_digest: str) -> None:
        """Count a topology update that led to the masks with this digest."""
        self.update_index += 1
        self.history_digest = hashlib.sha256((self.history_digest + mask_digest).encode()).hexdigest()

    def numbers(self) -> dict[str, int | float | str]:
        """Return the values to save, by name."""
        numbers: dict[str, int | float | str] = {
            "update_index": self.update_index,
            "steps": self.steps,
            "history_digest": self.history_digest,
        }
        if self.postponed is not None:
            numbers |= {f"{POSTPONED}{key}": value for key, value in vars(self.postponed).items() if value is not None}
        return numbers

    @classmethod
    def of(cls, numbers: Numbers) -> Progress:
        """Return the progress that :meth:`numbers` saved; other numbers are ignored."""
        postponed: dict[str, Any] = {
            key.removeprefix(POSTPONED): value for key, value in numbers.items() if key.startswith(POSTPONED)
        }
        return cls(
            history_digest=str(numbers["history_digest"]),
            steps=int(numbers["steps"]),
            update_index=int(numbers["update_index"]),
            postponed=Request(**postponed) if postponed else None,
        )

    def fingerprint(self) -> int:
        """Return a 60-bit hash of everything that must be equal on all ranks."""
        text = f"{self.history_digest} {self.update_index} {self.steps}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def state_mismatch(saved: Mapping[str, Mapping[str, Any]], own: Mapping[str, Mapping[str, Any]]) -> str:
    """Return why a Sparsifier with state ``own`` cannot load the state ``saved``; an empty text if it can.

    Both have the form of ``Sparsifier.state_dict()``.
    """
    if missing := [kind for kind in own if kind not in saved]:
        return f"it is not the state of a Sparsifier: it has no {missing[0]!r}"
    numbers, present = saved["numbers"], own["numbers"]
    if numbers.get("seed", present["seed"]) != present["seed"]:
        return f"its masks were drawn with seed {numbers['seed']}, not {present['seed']}"
    if not all(set(saved[kind]) == set(own["masks"]) for kind in ("masks", "ever_active")):
        return "its masks are for other layers than this model's"
    if set(saved["tensors"]) != set(own["tensors"]) or not {n for n in present if not n.startswith(POSTPONED)} <= set(
        numbers
    ):
        return "it was made by another method"
    for kind in ("masks", "ever_active", "tensors"):
        for name, tensor in own[kind].items():
            if (shape := tuple(saved[kind][name].shape)) != tuple(tensor.shape):
                return f"{name} is of shape {shape}, not {tuple(tensor.shape)}"
    return ""
