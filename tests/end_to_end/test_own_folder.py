"""The template for folders of one's own images passes its dry run."""

from __future__ import annotations

from pathlib import Path

from tests.support import sweeps
from tests.support.ranks import RankServer


def test_the_template_for_folders_passes_its_dry_run(server: RankServer, tmp_path: Path) -> None:
    sweeps.make_configuration(tmp_path)  # for its images, of two classes
    argv = ["--config", "imagefolder", "--dry-run", f"data.train={tmp_path}/train", f"data.val={tmp_path}/val"]
    small = ["data.train_resolution=32", "data.eval_resolution=32", "data.num_workers=1", f"output_dir={tmp_path}/run"]
    job = server.start([*argv, *small], ranks=1, log=tmp_path / "log")
    assert job.wait(300) == [0], job.text
    assert "data: 192 images to train on, 80 to evaluate on, 2 classes" in job.text
    assert "dry run of imagefolder: ok, 8 steps in 4 phases" in job.text
    assert not (tmp_path / "run").exists()
