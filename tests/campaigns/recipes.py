"""``python -m tests.campaigns.recipes``: a dry run of every recipe, on data of the right shape.

CIFAR comes from files in the published binary format, ImageNet from archives in the published structure.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.command_line import ArgumentParser
from tests.data_prep.test_cifar import make_binary, pack
from tests.support.imagenet_shaped import make_archives, make_image_folder
from tests.support.launch import ROOT, command, run
from tools.recipes import recipes

DONE = re.compile(r"dry run of \S+: ok, .*")
ONE_RANK = ("python", 1)
# How a recipe is started; the others on one rank. CI starts this one by deepspeed on two.
LAUNCHERS = {"imagenet_r50_s90": (("torchrun", 2), ONE_RANK)}


def make_data(name: str, root: Path) -> Path:
    """Write the data set of a recipe, if it is not there, and return its folder."""
    kind = name.partition("_")[0]
    folder = root / kind
    if not folder.is_dir():
        if kind == "imagenet":
            source = make_archives(root / "archives", *make_image_folder(root / "images", sides=(48, 80)))
        else:
            source = pack(make_binary(root / "published", int(kind.removeprefix("cifar"))))
        arguments = ["data_prep", kind, "--source", str(source), "--output", str(folder)]
        run(command("python", "-m", arguments), log=root / f"{kind}.log")
    return folder


def dry_run(name: str, root: Path, *, launcher: str, ranks: int) -> str:
    """Dry-run a recipe; return the line that it ends with. Raises AssertionError where it fails."""
    data = make_data(name, root)
    files = [f"data.train={data / 'train.beton'}", f"data.val={data / 'val.beton'}", f"output_dir={root / name}"]
    arguments = ["--config", name, "--dry-run", *files, "train.engine=torch", "tracking.backend=none"]
    launch = command(launcher, ROOT / "launchers" / "train.py", arguments, ranks=ranks)
    text = run(launch, log=root / f"{name}.log", timeout_seconds=1800)
    done = DONE.search(text)
    assert done is not None, text[-2000:]
    return done[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Dry-run the recipes; return the exit code."""
    parser = ArgumentParser(prog="python -m tests.campaigns.recipes", description=str(__doc__), allow_abbrev=False)
    known = [path.stem for path in recipes()]
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes (default: all)")
    chosen = parser.parse_args(arguments).names or known
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        starts = [(name, *how) for name in chosen for how in LAUNCHERS.get(name, (ONE_RANK,))]
        for name, launcher, ranks in starts:
            started = time.monotonic()
            try:
                line = dry_run(name, Path(temporary), launcher=launcher, ranks=ranks)
            except AssertionError as error:
                failed.append(name)
                line = f"FAILED: {name}: {error}"
            print(f"{line} ({launcher}, ranks: {ranks}, {time.monotonic() - started:.0f} s)", flush=True)
    print(f"{len(starts) - len(failed)} of {len(starts)} dry runs passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
