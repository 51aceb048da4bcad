"""The public face: what it takes, what it refuses, threads and forks, memory, and what it imports."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.support.samples import network_ticket
from pipeline.errors import ConfigError, DataError, IntegrityError
from pipeline.inference import SparseEnsemble, SparseNetwork
from pipeline.inference.cache import VARIABLE
from pipeline.tickets import Ticket, encode

ROOT = Path(__file__).parents[2]
SMALL = {"args": {"width": 8}, "num_classes": 10, "resolution": 32}
plain = partial(SparseNetwork, is_tuned=False)


@pytest.fixture(scope="module")
def ticket() -> Ticket:
    return network_ticket("cifar_resnet8", **SMALL)[1]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_path_the_bytes_and_the_ticket_are_the_same(ticket: Ticket, images: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "ticket-000.safetensors"
    path.write_bytes(encode(ticket))
    results = [plain(source)(images) for source in (ticket, path, str(path), path.read_bytes())]
    assert all(torch.equal(results[0], each) for each in results)
    assert plain(ticket)(images[:0]).shape == (0, 10)


def test_each_image_is_computed_alone(ticket: Ticket, images: torch.Tensor) -> None:
    network = plain(ticket)
    together = network(images)
    assert torch.equal(together, torch.cat([network(image[None]) for image in images]))


def test_threads_change_no_bit(ticket: Ticket, images: torch.Tensor) -> None:
    alone = plain(ticket)(images)
    for threads in (2, 3):
        network = plain(ticket, threads=threads)
        assert torch.equal(network(images), alone)
        assert torch.equal(network(images[:1]), alone[:1])


@pytest.mark.parametrize("threads", [1, 2])
def test_several_threads_may_call_at_once(ticket: Ticket, images: torch.Tensor, threads: int) -> None:
    network = plain(ticket, threads=threads)
    expected, wrong = plain(ticket)(images), []

    def call() -> None:
        for start in range(5):
            part = images[start:]
            if not torch.equal(network(part), expected[start:]):
                wrong.append(start)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.parametrize("threads", [1, 2])
def test_a_fork_goes_on(ticket: Ticket, images: torch.Tensor, threads: int) -> None:
    network = plain(ticket, threads=threads)
    expected = network(images[:1]).numpy()
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(network(images[:1].numpy()), expected) else 3)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_forks_that_run_at_once_do_not_share_memory(ticket: Ticket, images: torch.Tensor) -> None:
    network = plain(ticket)
    expected = network(images[:2]).numpy()
    children = []
    for number in range(2):
        if (child := os.fork()) == 0:
            mine = images[number : number + 1].numpy()
            wrong = sum(not np.array_equal(network(mine)[0], expected[number]) for _ in range(3000))
            os._exit(3 if wrong else 0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0]


def test_an_ensemble_is_the_mean_of_the_probabilities(ticket: Ticket, images: torch.Tensor) -> None:
    other = network_ticket("cifar_resnet8", **SMALL, seed=1)[1]  # type: ignore[arg-type]
    mean = SparseEnsemble([plain(ticket), plain(other)])(images)
    by_hand = (plain(ticket)(images).softmax(1) + plain(other)(images).softmax(1)) / 2
    assert torch.allclose(mean, by_hand, atol=1e-6)
    with pytest.raises(ConfigError, match="at least one ticket"):
        SparseEnsemble([])


def test_wrong_images_are_refused_in_one_line(ticket: Ticket, images: torch.Tensor) -> None:
    network = plain(ticket)
    with pytest.raises(ConfigError, match=r"expected the shape \[N, C, H, W\], got \[3, 32, 32\]"):
        network(images[0])
    with pytest.raises(ConfigError, match="expected float32"):
        network(images.double())
    with pytest.raises(ConfigError, match="expected float32"):
        network(images.numpy().astype(np.uint8))
    with pytest.raises(ConfigError, match="the network does not take images of 4×32×32"):
        network(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ConfigError, match="threads: expected a whole number"):
        SparseNetwork(ticket, threads=0)


def test_damaged_and_missing_tickets_are_refused_in_one_line(ticket: Ticket, tmp_path: Path) -> None:
    content = bytearray(encode(ticket))
    content[-1] ^= 1
    with pytest.raises(IntegrityError, match="is not an intact ticket"):
        SparseNetwork(bytes(content))
    with pytest.raises(DataError, match="does not exist"):
        SparseNetwork(tmp_path / "missing.safetensors")


def changed(ticket: Ticket, **provenance: Any) -> Ticket:
    return replace(ticket, provenance=replace(ticket.provenance, **provenance))


@pytest.mark.parametrize(
    ("provenance", "kind", "message"),
    [
        ({"model": "no_such_model"}, ConfigError, "'no_such_model' is not a model of"),
        ({"model_args": {"width": 16}}, DataError, "ticket 0 of run does not fit cifar_resnet8: "),
        ({"model_args": {"width": 10**9}}, ConfigError, "1000000000 is out of range for the"),
        ({"model_args": {"height": 8}}, ConfigError, "height"),
        ({"preprocessing": {"eval_resolution": "28"}}, IntegrityError, 'from 1 to 65536, got "28"'),
        ({"preprocessing": {"eval_resolution": 2**60}}, IntegrityError, "from 1 to 65536, got 1152921504606846976"),
        ({"preprocessing": {"mean": [0.0, 1e300]}}, IntegrityError, "mean: expected three numbers, got a list"),
    ],
)
def test_a_hostile_ticket_is_refused_in_one_line_before_it_runs(
    ticket: Ticket, provenance: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)) as caught:
        SparseNetwork(encode(changed(ticket, **provenance)))
    assert "\n" not in str(caught.value)


def test_images_that_need_too_much_memory_are_refused(ticket: Ticket) -> None:
    network = plain(changed(ticket, preprocessing={"eval_resolution": 65536}))
    with pytest.raises(ConfigError, match=r"an image of 65536×65536 pixels needs [\d,.]+ GB .* at most 8\.6; do: use"):
        _ = network.layers


def test_a_ticket_that_was_replaced_is_not_mixed_with_the_old_one(
    ticket: Ticket, images: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "ticket-000.safetensors"
    path.write_bytes(encode(ticket))
    network = plain(path)
    assert torch.equal(network(images), plain(ticket)(images))
    path.write_bytes(encode(changed(ticket, step=101)))
    with pytest.raises(DataError, match="is another ticket than when it was opened; do: open it again"):
        network(images[:, :, :16, :16])


def test_a_damaged_cache_is_made_anew(
    ticket: Ticket, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.inference import jit

    expected = plain(ticket)(images)
    tmp_path.chmod(0o700)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    text = "define void @nothing() {\n  ret void\n}\n"
    jit.compile_ir("nothing", lambda: text, jit.host(), is_optimized=False)
    (entry,) = tmp_path.iterdir()
    sound = entry.read_bytes()
    for damaged in (sound[:-1] + bytes([sound[-1] ^ 1]), b"", sound[:40]):
        entry.write_bytes(damaged)
        assert jit.compile_ir("nothing", lambda: text, jit.host(), is_optimized=False).address("nothing")
        assert entry.read_bytes() == sound
    tmp_path.chmod(0o770)  # others could have written the code
    entry.unlink()
    assert torch.equal(plain(ticket)(images), expected)
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o700)


def test_tuning_changes_speed_only_and_is_remembered(
    ticket: Ticket, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.inference import tune

    expected = plain(ticket)(images)
    tmp_path.chmod(0o700)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    first = SparseNetwork(ticket)
    assert torch.allclose(first(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    (entry,) = tmp_path.glob("tuning-*")
    with monkeypatch.context() as patch:
        patch.setattr(tune, "_fastest", None)  # what the cache holds is not measured again
        second = SparseNetwork(ticket)
        assert torch.equal(second(images), first(images))
        assert second.layers == first.layers
    for damaged in (b"", entry.read_bytes()[:-2], cached(b"[[1, 99, 1]]"), cached(b"{}"), cached(b"[[1], 2]")):
        entry.write_bytes(damaged)
        assert torch.allclose(SparseNetwork(ticket)(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert entry.read_bytes() != damaged


def cached(content: bytes) -> bytes:
    return hashlib.sha256(content).digest() + content


def test_the_packed_weights_are_little_larger_than_the_file() -> None:
    for distribution in ("uniform", "erk"):
        ticket = network_ticket("cifar_resnet20", args={"width": 64}, resolution=32, distribution=distribution)[1]
        assert plain(ticket).num_bytes <= 1.8 * len(encode(ticket))


def test_the_import_pulls_in_no_training_stack() -> None:
    code = (
        "import sys; from pipeline.inference import SparseNetwork, SparseEnsemble; "
        "print({'ffcv', 'deepspeed', 'mlflow', 'numba', 'omegaconf', 'matplotlib', 'torchvision'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr
