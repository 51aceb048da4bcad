"""What version 0.1 stored is read, compared and resumed by today's code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.arithmetic import CHANGES
from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.checkpoint.verify import checkpoints_in, find_damage, read_state
from pipeline.config.checks import leaves
from pipeline.config.keys import NONE
from pipeline.config.load import config_digest, differences, load_config
from pipeline.config.schema import KEYS, Config
from pipeline.datasets.sets import inspect
from pipeline.engine.build import build_engine
from pipeline.plan import build_plan
from pipeline.tickets.format import decode
from pipeline.tickets.store import TicketStore
from pipeline.training import assembly
from tests.support.launch import ROOT, command, run
from tests.support.stored_run import STORED, STORED_ADAMW, make_images, restore, unpack_beton

CHECKPOINT = STORED / "run" / "checkpoints" / "step-00000008"


@pytest.fixture
def config() -> Config:
    return load_config(str(STORED / "run" / "config.yaml"))


def test_stored_tickets_and_the_checkpoint_are_valid_and_of_this_configuration(config: Config, tmp_path: Path) -> None:
    make_images(tmp_path)
    digest = inspect(tmp_path / "train", level=1).digest
    tickets = [decode(ref.path) for ref in TicketStore(STORED / "run" / "tickets").list()]
    tickets.append(decode(STORED / "expected" / "ticket-002.safetensors"))
    assert [ticket.provenance.index for ticket in tickets] == [0, 2]
    assert {ticket.provenance.config_digest for ticket in tickets} == {config_digest(config)}
    assert {ticket.provenance.data_digest for ticket in tickets} == {digest}
    assert checkpoints_in(STORED / "run" / "checkpoints") == [CHECKPOINT]
    assert find_damage(CHECKPOINT) == ""
    state = read_state(CHECKPOINT)
    assert state["data_digest"] == digest
    assert differences(state["config"], dataclasses.asdict(config)) == []


def test_the_digest_leaves_out_exactly_what_came_after_version_0_1() -> None:
    """Keys that were added since then have a neutral value; older keys have none.

    Otherwise the digest would change.
    """
    stored = {name for name, _ in leaves(read_state(CHECKPOINT)["config"])}
    for name, key in KEYS.items():
        if not key.section and not key.may_change:
            is_stored = name in stored or any(each.startswith(f"{name}.") for each in stored)
            assert (key.neutral is NONE) == is_stored, f"{name}: see pipeline.config.keys.key, neutral values"


def test_beton_files_adamw_bf16_and_momentum_growth_of_version_0_1_are_read_and_resumed(tmp_path: Path) -> None:
    """The second stored run: everything that decides how it goes on comes back."""
    beton = unpack_beton(tmp_path)
    train, val = (inspect(beton / f"{split}.beton", level=2) for split in ("train", "val"))
    assert (train.num_samples, val.num_samples) == (32, 8)
    config = load_config(str(STORED_ADAMW / "run" / "config.yaml"))
    (ref,) = TicketStore(STORED_ADAMW / "run" / "tickets").list()
    ticket = decode(ref.path)
    assert (ticket.provenance.config_digest, ticket.provenance.data_digest) == (config_digest(config), train.digest)
    engine = build_engine(assembly.build_model(config), config.train)
    sparsifier = assembly.build_sparsifier(engine, config)
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    plan = build_plan(config, steps_per_epoch=4)
    saved = Checkpoints(STORED_ADAMW / "run" / "checkpoints", config, plan, data_digest=train.digest)
    resumed = saved.load(engine, sparsifier, resume="auto")
    assert (resumed.step, len(resumed.tracker_run)) == (8, 32)
    assert any(not torch.equal(mask, before[name]) for name, mask in sparsifier.masks.items())
    weights = dict(engine.model.named_parameters())
    for name, mask in sparsifier.masks.items():
        assert torch.equal(mask, ticket.masks[name])  # saved after the same step
        value = weights[name].detach()
        assert torch.equal(value.bfloat16().float(), ticket.state[name].float()) and not value[~mask].any()
        assert engine.optimizer.state[weights[name]]["exp_avg"][mask].any()


@pytest.mark.slow
def test_the_stored_run_resumes_and_finishes(tmp_path: Path) -> None:
    restore(tmp_path)
    arguments = ["--config", str(STORED / "stored.yaml"), "--resume", "auto"]
    text = run(command("python", ROOT / "launchers" / "train.py", arguments), cwd=tmp_path, log=tmp_path / "log")
    assert "resumed from run/checkpoints/step-00000008: step 8" in text
    assert all(change in text for change in CHANGES)  # a resume names what has been computed differently since
    tickets = [decode(ref.path) for ref in TicketStore(tmp_path / "run" / "tickets").list()]
    assert [ticket.provenance.index for ticket in tickets] == [0, 1, 2]
    expected, resumed = decode(STORED / "expected" / "ticket-002.safetensors"), tickets[2]
    assert (tmp_path / "run" / "report" / "report.json").exists()
    assert read_state(tmp_path / "run" / "checkpoints" / "step-00000016")["arithmetic"] == len(CHANGES)
    # The third change reaches this run, in last bits. Where one changes more: compare only the tickets up to the
    # resumed step.
    assert resumed.provenance == expected.provenance  # with the digests of configuration, data and masks
    for name, value in expected.state.items():  # equal bits on the same machine; other CPUs sum in another order
        assert torch.allclose(resumed.state[name].float(), value.float(), rtol=1e-3, atol=1e-5), name


def test_changes_of_arithmetic_stand_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^### Arithmetic\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    told = [" ".join(item.split()) for section in reversed(sections) for item in section.split("\n- ")]
    assert [item.removeprefix("- ") for item in told if item] == list(CHANGES)
