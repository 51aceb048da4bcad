"""From files in the published format of CIFAR-100 to steps of a recipe."""

from __future__ import annotations

from pathlib import Path

from tests.data_prep.test_cifar import make_binary, pack
from tests.support.launch import ROOT, command, run


def test_dry_run_of_a_cifar_recipe_on_a_network_of_its_table(tmp_path: Path) -> None:
    archive = pack(make_binary(tmp_path / "published", 100))
    run(
        command("python", "-m", ["data_prep", "cifar100", "--source", str(archive), "--output", str(tmp_path)]),
        log=tmp_path / "log",
    )
    files = [f"data.train={tmp_path / 'train.beton'}", f"data.val={tmp_path / 'val.beton'}"]
    given = ["--config", "cifar100_granet_sup", "--dry-run", "model.name=cifar_vgg19", "sparsity.density=0.05", *files]
    given += [f"output_dir={tmp_path / 'run'}", "train.engine=torch", "tracking.backend=none"]
    text = run(
        command("python", ROOT / "launchers" / "train.py", given), log=tmp_path / "train.log", timeout_seconds=500
    )
    # 50,000 images would be enough, so the plan is theirs
    assert "with these 20 training samples the run itself would fail: sparsity.density_until: no update" in text
    # 20,018,880 weights of convolutions and 512·100 of the classifier, of which GraNet starts with half
    assert "granet: 10,035,040 of 20,070,080 weights active in 17 layers" in text
    assert "ticket 0 after step 2: end of exploration, density 0.0500" in text
    done = "8 steps in 4 phases, 8 networks and ensembles evaluated"  # 4 tickets, superposed, ensembles of 2 to 4
    assert f"dry run of cifar100_cifar_vgg19_granet_sup_d0.05: ok, {done}; nothing was kept" in text
