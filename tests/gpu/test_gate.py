"""The gate: what a run does on a GPU, on a machine without one.

Training, checks, updates, checkpoint, resume, evaluation and recalibration run on an emulated GPU
(``tests/support/emulated_gpu.py``) and on the CPU, for the engine ``torch``. Both must make the same
masks, nothing may mix devices or do what NCCL cannot, and the host may wait for the device as often as
the budgets of ``gate.py`` allow. (For ``deepspeed``: ``tests/engine/test_engines.py`` counts its waits.)
``python -m tests.campaigns.gpu`` trains in all cells of the table; here is a sample.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.schema import DataConfig, TrainConfig
from pipeline.data.loaders import NOT_PINNED, TrainLoader, _Loader
from pipeline.distributed import session
from pipeline.engine.sgd import OnePassSGD
from pipeline.engine.torch_engine import TorchEngine, place_model
from pipeline.errors import ConfigError, DataError, IntegrityError, NumericsError
from pipeline.sparse import at_once
from pipeline.sparse.sparsifier import Sparsifier
from tests.gpu import gate
from tests.gpu.planted import planted
from tests.support.emulated_gpu import DEVICE, EmulatedGpu, GpuError
from tests.support.forked import run_ranks

WORKER = Path(__file__).with_name("gate_worker.py")
FEED = 3  # operations of a batch: two copies to the device, and from bytes to normalised in channels-last


PER_LAYER = 6  # operations of an update, of a layer: |w|, |gradient|, and what masks the gradient and the weight


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gate")
    run_ranks(WORKER, (2, [folder, *gate.SAMPLE_OF_TWO_RANKS]), log=folder / "log")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", gate.SAMPLE)
def test_a_cell_trains_with_the_masks_of_the_cpu_and_within_its_budget(name: str) -> None:
    cell = gate.CELLS[name]
    on_cpu, on_gpu = gate.train(cell, "cpu"), gate.train(cell, "cuda")
    assert gate.differences(cell, on_cpu, on_gpu) == []
    assert gate.over_budget(cell, on_gpu.counts, num_ranks=1) == []
    assert set(on_gpu.counts) == {"step", "check", "update"}


@pytest.mark.parametrize("method", ["rigl_itop", "set", "set_itop"])
def test_an_update_asks_for_few_operations_a_layer_and_waits_as_often_for_many_layers(method: str) -> None:
    counts = []
    for num_layers in (4, 12):
        with gate.on("cuda") as gpu:
            model = place_model(torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(num_layers))), TrainConfig())
            sparsifier = Sparsifier(
                model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), method, density=0.5, seed=0
            )
            assert gpu is not None
            with gpu.counting() as count:
                for weight in model.parameters():
                    weight.grad = torch.ones_like(weight)
                count.operations.clear()
                sparsifier.before_step(0.3, is_finite=True)
                sparsifier.after_step()
            counts.append(count)
    assert len(counts[0].waits) == len(counts[1].waits)
    assert counts[1].num_operations - counts[0].num_operations <= 8 * PER_LAYER


def test_the_table_has_every_method_and_structure_and_its_empty_cells_have_a_reason() -> None:
    reasons = {name: cell.reason for name, cell in gate.TABLE.items() if cell.reason}
    assert len(gate.TABLE) == 14 * 4 and len(reasons) == 16
    assert "lets outputs die" in reasons["srigl, 2:4"] and "has one density" in reasons["granet, fan_in"]
    for name, reason in reasons.items():
        with pytest.raises(ConfigError) as caught:
            gate.Trainer(gate.TABLE[name])
        assert reason.split("; ")[0].partition(": ")[2] in str(caught.value)
    shown = {part for name in gate.SAMPLE for part in name.split(", ")}
    # GMP prunes as GraNet does, and what grows under AC/DC and MEST is SET-ITOP's
    assert {*gate.TRAINED, *gate.STRUCTURES} - {"static", "rigl_itop", "gmp", "acdc", "mest"} <= shown


@pytest.mark.parametrize("name", gate.SAMPLE_OF_TWO_RANKS)
def test_two_ranks_train_with_the_masks_of_the_cpu_and_within_their_budget(
    two: list[dict[str, Any]], name: str
) -> None:
    assert [rank[name]["problems"] for rank in two] == [[], []]
    assert two[0][name]["waits"]["step"] == []


def test_saving_resuming_recalibrating_and_evaluating_give_the_numbers_of_the_cpu(
    two: list[dict[str, Any]], tmp_path: Path
) -> None:
    for on_cpu, on_gpu in (
        [gate.rest_of_a_run(tmp_path / device, device) for device in ("cpu", "cuda")],
        *(rank["rest"] for rank in two),
    ):
        assert on_cpu == on_gpu
        assert on_gpu["resumed bit for bit"] and on_gpu["resumed at"] == gate.UPDATE_AT
    assert on_cpu["predictions"] is None  # rank 1; rank 0 has them all
    assert len(two[0]["rest"][0]["labels"]) == 22


def test_a_check_on_the_device_names_what_is_damaged(two: list[dict[str, Any]]) -> None:
    with gate.on("cuda"):
        sparsifier = gate.Trainer(gate.TABLE["rigl, none"]).sparsifier
        mask, weight = sparsifier.masks["3.weight"], sparsifier.weights["3.weight"]
        sparsifier.check()
        with torch.no_grad():
            weight.add_(1e-20)
        with pytest.raises(IntegrityError, match=r"3\.weight has non-zero values where its mask is 0"):
            sparsifier.check()
        with torch.no_grad():
            weight.mul_(mask)
        sparsifier.check()
        mask[0, 0, 0, 0] ^= True
        with pytest.raises(IntegrityError, match=r"the mask of 3\.weight has changed since update 0"):
            sparsifier.check()
    expected = "masks differ between ranks after step 0: first in 0.weight, ranks [1] against rank 0"
    assert all(rank["a mask of another rank"].startswith(expected) for rank in two)


BAD = 2  # the step whose images are NaN


def _steps(name: str, *, stop_at: int | None = None) -> tuple[gate.Trainer, list[torch.Tensor], list[bool]]:
    """Take four steps, of which step ``BAD`` is bad unless a stop is requested during step ``stop_at``.

    Returns the trainer, all weights and optimiser states after each step, and whether each went on.
    """
    trainer = gate.Trainer(gate.CELLS[name])
    kept, going = [], []
    with contextlib.suppress(NumericsError):
        for step in range(4):
            images, labels = gate.batch(step, "cuda")
            trainer.ranks.is_stop_requested = stop_at is not None and step >= stop_at
            going.append(
                trainer.step(step, images * float("nan") if stop_at is None and step == BAD else images, labels)
            )
            states = (trainer.engine.state_of(parameter) for parameter in trainer.engine.model.parameters())
            tensors = [*trainer.engine.model.parameters(), *(state[key] for state in states for key in sorted(state))]
            kept.append(torch.cat([tensor.detach().cpu().contiguous().view(-1) for tensor in tensors]))
    return trainer, kept, going


@pytest.mark.parametrize("name", ["rigl, none", "set, none", "adamw", "muon", "clipped"])
def test_a_bad_step_changes_no_weight_and_is_reported_by_its_number_before_the_next(name: str) -> None:
    with gate.on("cuda"):
        trainer, kept, _ = _steps(name)
        assert len(kept) == BAD + 1 and trainer.ranks.step == BAD  # step 3 ends before its optimiser step
        assert not torch.equal(kept[0], kept[1]) and torch.equal(kept[1], kept[2])


def test_a_bad_step_changes_weights_where_the_guard_is_missing() -> None:
    with gate.on("cuda"), planted(OnePassSGD, "step", "found_inf=self.found_inf", "found_inf=None"):
        _, kept, _ = _steps("rigl, none")
        assert kept[BAD].isnan().any()


def test_what_ranks_agree_on_is_not_read_before_it_is_on_the_host() -> None:
    with gate.on("cuda"), planted(session, "_wait_for", "event.synchronize()", "pass"):
        trainer = gate.Trainer(gate.CELLS["rigl, none"])
        with pytest.raises(
            IntegrityError, match="whole when they were looked at again"
        ):  # what is read is not the answer
            trainer.step(0, *gate.batch(0, "cuda"))


def test_a_stop_comes_at_most_two_steps_after_the_signal() -> None:
    with gate.on("cuda"):
        *_, going = _steps("rigl, none", stop_at=1)
        assert going[:3] == [True, True, False]  # it comes during step 1, and step 2 is the last
        trainer = gate.Trainer(gate.CELLS["rigl, none"])
        trainer.ranks.stop_after = 2
        assert [trainer.step(step, *gate.batch(step, "cuda")) for step in (0, 1)] == [True, False]


def _feed() -> list[tuple[int, int]]:
    """Load batches on the emulated GPU and check their content; return waits and operations of each."""
    counts = []
    with EmulatedGpu() as gpu, gpu.counting() as count:
        for _, (images, labels) in gate.loader("cuda").steps(0, 2 * gate.Ring.num_slots):
            counts.append((len(count.waits), count.num_operations))
            count.operations.clear()
            count.waits.clear()
            mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (gate.DATA.mean, gate.DATA.std))
            pixels = (images.held * std + mean).round()
            assert torch.equal(pixels[:, 0, 0, 0].long() % gate.CLASSES, labels.held)
        gpu.land()
    return counts


def test_batches_arrive_whole_and_without_a_wait() -> None:
    counts = _feed()
    # mean and standard deviation come with the first; with the first of the next epoch come the copies of two
    assert len(counts) == 10 and not any(waits for waits, _ in counts[1:])
    assert sum(operations for _, operations in counts[1:]) <= 9 * FEED


def test_a_batch_under_autocast_is_what_autocast_makes_of_the_pixels_of_the_cpu(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = DataConfig(train="ring", val="ring", train_resolution=gate.SIDE)
    batches = [next(iter(gate.loader("cpu", data=data).steps(0, 1)))[1][0]]
    with EmulatedGpu():
        for dtype in (torch.float32, torch.bfloat16):
            images = next(iter(gate.loader("cuda", data=data, dtype=dtype).steps(0, 1)))[1][0]
            assert images.dtype == dtype and images.is_contiguous(memory_format=torch.channels_last)
            batches.append(images.held)
    assert torch.allclose(batches[1], batches[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(batches[2], batches[1].bfloat16())
    told = [record.message for record in caplog.records]
    assert told == [f"ring: rank 0: {NOT_PINNED}"] * 2  # once by each loader of the GPU: this machine pins nothing


class Damaged(gate.Ring):
    """Has a third batch that cannot be read."""

    def batches(self, *args: Any, **settings: Any) -> Iterator[Any]:
        for index, given in enumerate(super().batches(*args, **settings)):
            if index == 2:
                raise DataError("is damaged", do="prepare it again")
            yield given


def test_a_damaged_batch_ends_training_when_its_turn_comes() -> None:
    with EmulatedGpu():
        steps = TrainLoader(Damaged(), gate.DATA, global_batch=8, seed=0, device=DEVICE, channels_last=True).steps(0, 8)
        assert [next(steps)[0], next(steps)[0]] == [0, 1]
        with pytest.raises(DataError, match="ring: epoch 0, batch 2: is damaged"):
            next(steps)


# -- planted defects: each makes the gate fail


def test_a_buffer_that_is_written_before_its_copy_is_over_is_found() -> None:
    with (
        planted(_Loader, "_copied_ahead", "copied.synchronize()", "pass"),
        pytest.raises(GpuError, match=r"race: the source of the copy at pipeline/data/loaders\.py:\d+ \S+ was written"),
    ):
        _feed()


def test_a_value_that_is_read_in_a_step_is_found() -> None:
    cell = gate.TABLE["rigl, none"]
    with planted(TorchEngine, "backward", "losses.append(loss.detach())", "losses.append(loss.detach() + loss.item())"):
        found = gate.over_budget(cell, gate.train(cell, "cuda").counts, num_ranks=1)
    (line,) = [line for line in found if line.startswith("rigl, none: step: 1 waits, 0 allowed: ")]
    assert "_local_scalar_dense at pipeline/engine/torch_engine.py:" in line


def test_a_selection_that_moves_to_the_host_in_silence_is_found() -> None:
    cell = gate.TABLE["rigl, none"]
    cat = "_best_first(torch.cat(list(parts[group])), sizes)"
    with planted(at_once, "highest_k", cat, f"{cat.replace(', sizes', '.cpu(), sizes')}.to(parts[0].device)"):
        found = gate.over_budget(cell, gate.train(cell, "cuda").counts, num_ranks=1)
    assert len(found) == 1 and found[0].startswith("rigl, none: update: 11 waits, 7 allowed: ")
    assert "copy to the host at pipeline/sparse/at_once.py:" in found[0]


def test_a_host_tensor_in_a_collective_is_found(two: list[dict[str, Any]]) -> None:
    expected = (
        "GpuError: all_gather: NCCL has no collectives of tensors on the host, at pipeline/distributed/session.py:"
    )
    assert two[0]["a host tensor in a collective"].startswith(expected)


def test_a_mask_by_a_stale_name_is_found(two: list[dict[str, Any]]) -> None:
    assert two[0]["a mask by a stale name"].startswith("ConfigError: masks: _orig_mod.0.weight is not a parameter of")
