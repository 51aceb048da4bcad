"""A run that continues on another number of ranks: part of ``python -m tests.campaigns.resume``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from tests.campaigns.small_runs import CASES, STEPS, arguments, checkpoint_at, log_of, outcome_of, require_codes
from tests.support.ranks import RankServer


def regrouped(
    server: RankServer,
    data: Path,
    folder: Path,
    *,
    ranks: Sequence[int] = (4, 2, 1, 4),
    stops: Sequence[int | None] = (9, 18, 27, None),
) -> bool:
    """Train on ``ranks``, changing their number after ``stops``, and once on the first number only.

    Samples, masks at each resume and accuracy must agree.

    Returns:
        Whether they do.
    """
    case = CASES["Sup-tickets, stage 0"]
    note = {"call": "tests.support.injections:note_samples"}
    whole, output = folder / "four", folder / "regrouped"
    require_codes(
        server.start(
            arguments(data, whole, *case),
            ranks=ranks[0],
            log=log_of(folder),
            inject={**note, "path": str(whole) + ".samples"},
        ),
        [0] * ranks[0],
    )
    is_well, saved = True, ""
    for number, stop in zip(ranks, stops, strict=True):
        more = ["--resume", "auto"]
        inject = {**note, "path": str(output) + ".samples", "stop_after": stop}
        job = server.start(arguments(data, output, *case) + more, ranks=number, log=log_of(folder), inject=inject)
        require_codes(job, [0 if stop is None else 75] * number)
        masks = [line.split()[-1] for line in job.text.splitlines() if "masks resumed" in line]
        is_reported = re.search(r"resume is not bit-exact: .*ranks \d -> \d", job.text) is not None
        is_well &= (masks == [saved] * number and is_reported) if saved else not masks
        change = ", change of ranks reported" if is_reported else ""
        print(f"{number} ranks to step {stop or STEPS}: masks {'as saved' if saved else 'drawn'}{change}")
        if stop is not None:
            saved = checkpoint_at(output, stop)["mask_digest"]
    samples = [_samples(Path(f"{path}.samples")) for path in (whole, output)]
    same = samples[0] == samples[1] and len(samples[0]) == STEPS
    tops = [{row["name"]: row["top1"] for row in outcome_of(path)["report"]} for path in (whole, output)]
    noise = 3 * math.sqrt(2 * 0.25 / 500)
    largest = max(abs(tops[0][name] - tops[1][name]) for name in tops[0])
    print(f"samples of {len(samples[0])} steps: {'the same' if same else 'DIFFER'}")
    print(f"top-1 differs by at most {largest:.3f}, noise is {noise:.3f}")
    print(f"    {ranks[0]} ranks throughout {tops[0]}\n    regrouped {tops[1]}", flush=True)
    return is_well and same and largest <= noise


def _samples(path: Path) -> dict[int, list[str]]:
    """Return for each step the digests of its images, in the order of the global batch."""
    steps: dict[int, dict[int, list[str]]] = {}
    for file in sorted(path.parent.glob(f"{path.name}.*")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], {})[record["rank"]] = record["images"]
    return {step: [image for rank in sorted(ranks) for image in ranks[rank]] for step, ranks in sorted(steps.items())}
