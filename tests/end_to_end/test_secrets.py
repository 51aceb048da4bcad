"""A real run leaves no secret anywhere.

It has secrets in environment and address, a hostile server in place of MLflow, and ends with an error.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.campaigns.cases import make_good
from tests.end_to_end.small_job import TRAIN
from tests.support.hostile_server import hostile_server
from tests.support.launch import ROOT

PASSWORD = "hunter2%2Fse%3Acret"
SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": "correct-horse-battery",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "SLURM_JWT": "eyJhbGciOiJIUzI1NiJ9.e30.sig",
    "RUN_API_TOKEN": "ghp_16C7e42F292c6912E7",
}
SETTINGS = (
    *(
        "model.args={width: 8}",
        "data.train_resolution=8",
        "data.eval_resolution=8",
        "train.engine=torch",
        "train.channels_last=false",
    ),
    *(
        "plan.exploration.length=2 epochs",
        "plan.exploration.update_interval=2 steps",
        "plan.num_refinements=1",
        "plan.reference_batch=4",
    ),
    *(
        "evaluation.batch=6",
        "evaluation.recalibration_batch=4",
        "evaluation.recalibration_batches=2",
        "checkpoint.every=4 steps",
    ),
    *("tracking.backend=mlflow", "tracking.log_every_steps=1"),
)


def test_no_secret_is_in_anything_that_a_run_leaves(tmp_path: Path) -> None:
    good = make_good(tmp_path / "good")
    output = tmp_path / "out"
    output.mkdir()
    (output / "report").write_text(
        "in the way"
    )  # the report cannot be written: the run ends in an error after its last step
    with hostile_server() as address:
        uri = f"tracking.uri=http://me:{PASSWORD}@{address}"
        command = [sys.executable, str(TRAIN), "--config", str(good.config), *SETTINGS, uri, f"output_dir={output}"]
        environ = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(command, env=environ | SECRETS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 73, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 1 and "Traceback" not in done.stdout + done.stderr, done.stderr[-3000:]
    crash = (output / "crash-rank0.txt").read_text()
    assert f"(traceback in {output}/crash-rank0.txt)" in errors[0]
    redacted = [f"{name}=[redacted]" for name in ("MLFLOW_TRACKING_PASSWORD", "SLURM_JWT")]
    for what in ("Traceback", "train.py", "global_batch: 4", '"train/loss"', *redacted, "torch 2", "step 8"):
        assert what in crash, what
    steps = [json.loads(line).get("step") for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert set(range(9)) <= set(steps)  # whatever the server answered

    left = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert {path.suffix for path in left} >= {".txt", ".jsonl", ".json", ".yaml", ".safetensors"}
    assert len(list((output / "tickets").glob("*.safetensors"))) == 2
    for secret in (*SECRETS.values(), PASSWORD, "hunter2"):
        assert secret not in done.stdout + done.stderr
        assert not [path for path, content in left.items() if secret.encode() in content], secret
