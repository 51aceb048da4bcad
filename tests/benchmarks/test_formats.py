"""The table of ``python -m benchmarks.formats``, on reports that are written by hand."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.formats import BASELINE, KINDS, table, values_of


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    top1 = {"raw": (0.90, 0.92, 0.91), "jpeg": (0.89, 0.90, 0.91), "folder": (0.89, 0.91, 0.90)}
    for kind, values in top1.items():
        for seed, value in enumerate(values):
            report = tmp_path / kind / f"seed={seed}" / "report" / "report.json"
            report.parent.mkdir(parents=True)
            report.write_text(json.dumps({"rows": [{"name": "ticket-0", "top1": value, "nll": 0.25}]}))
    text = table({name: values_of(tmp_path / kind) for name, kind in KINDS.items()})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[2] == [".beton, raw", "3", "91.00", "0.2500", "+1.00 [+1.00, +1.00]", "+0.0000 [+0.0000, +0.0000]"]
    # differences of 0, -1 and 1 points: a mean of 0, and 4.3027 · 1/√3 = 2.48 on either side
    assert rows[3][:3] == [".beton, JPEG 90", "3", "90.00"] and rows[3][4] == "+0.00 [-2.48, +2.48]"
    assert rows[4] == [BASELINE, "3", "90.00", "0.2500", "", ""]
