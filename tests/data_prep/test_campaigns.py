"""Short versions of the campaigns ``data_prep_kills`` and ``beton_damage``."""

from __future__ import annotations

import os

import pytest

from tests.campaigns import beton_damage, data_prep_kills


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount small file systems")
def test_killed_writers_and_full_disks() -> None:
    said: list[str] = []
    assert data_prep_kills.run_campaign(kills=6, disks=2, seed=1, say=said.append), said
    assert said[0].startswith("kills 6/6 ")


def test_damaged_files_are_refused_with_their_sidecar() -> None:
    caught, alone = beton_damage.run(num=2 * len(beton_damage.KINDS), seed=1, with_loader=False)
    assert sum(caught.values()) == 18
    assert {kind: level for kind, level in caught if kind not in ("anywhere", "lost block")} == {
        **dict.fromkeys(("header", "sample table", "allocation table", "truncated", "appended"), "0"),
        **dict.fromkeys(("raw image", "JPEG image"), "2"),
    }
    assert "none" not in {level for _, level in caught}
    assert alone["refused"] >= 8  # headers, tables and lengths tell by themselves
