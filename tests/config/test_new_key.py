"""A configuration key is one line: the one that CONTRIBUTING shows, in a copy of the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.tickets.verify import read_verified
from tests.support.stored_run import STORED

ROOT = Path(__file__).parents[2]
PROBE = """
import dataclasses, sys
from pathlib import Path
import pipeline
from launchers.config_reference import markdown, reference
from pipeline.checkpoint.verify import read_state
from pipeline.config.load import config_digest, differences, load_config
from pipeline.errors import ConfigError

assert Path(pipeline.__file__).is_relative_to(Path.cwd()), pipeline.__file__
stored, checkpoint = sys.argv[1:]
old, new = load_config(stored), load_config(stored, ["train.noise=0.25"])
before = read_state(Path(checkpoint))["config"]
print(old.train.noise, new.train.noise)
print(config_digest(old))
print(config_digest(new) != config_digest(old))
print(differences(before, dataclasses.asdict(old)), differences(before, dataclasses.asdict(new)))
print(differences(dataclasses.asdict(new), dataclasses.asdict(old)))
for wrong in ("train.noise=1.5", "train.noise=much", "train.nose=0.5"):
    try:
        load_config(stored, [wrong])
    except ConfigError as error:
        print(error.what)
print(reference("train.noise"), end="")
print([line for line in markdown().splitlines() if "train.noise" in line])
"""


def test_the_line_that_contributing_shows_adds_a_key(tmp_path: Path) -> None:
    (line,) = re.findall(r"```python\n( +noise: .*\n)```", (ROOT / "CONTRIBUTING.md").read_text())
    for folder in ("pipeline", "launchers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    schema = tmp_path / "pipeline" / "config" / "schema.py"
    head, mark, tail = schema.read_text().partition("\n\n@dataclass\nclass SparsityConfig:")
    assert mark
    schema.write_text(f"{head}{line}{mark}{tail}")
    arguments = [str(STORED / "run" / "config.yaml"), str(STORED / "run" / "checkpoints" / "step-00000008")]
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""
    ticket = read_verified(STORED / "run" / "tickets" / "ticket-000.safetensors")
    assert done.stdout.splitlines() == [
        "0.0 0.25",
        ticket.provenance.config_digest,
        "True",
        "[] ['train.noise: 0.0 -> 0.25']",
        "['train.noise: 0.25 -> 0.0']",
        "train.noise: expected a number from 0 to 0.5, got 1.5",
        "override 'train.noise=much': train.noise: expected a finite number, got 'much'",
        "override 'train.nose=0.5': unknown key 'train.nose'; did you mean 'train.noise'?",
        "  train.noise: number; default 0.0; from 0 to 0.5; fixed, neutral value 0.0",
        "      standard deviation of noise on gradients; 0: none",
        "['| `train.noise` | number | `0.0` | from 0 to 0.5 | fixed, neutral value 0.0 | "
        "standard deviation of noise on gradients; 0: none |']",
    ]
