"""The emulated GPU refuses what a GPU refuses, and counts what makes the host wait for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.support.emulated_gpu import EmulatedGpu, GpuError, GpuTensor


@pytest.fixture
def gpu() -> Iterator[EmulatedGpu]:
    with EmulatedGpu() as emulated:
        yield emulated


def waits(gpu: EmulatedGpu, action: Callable[[], Any]) -> list[str]:
    with gpu.counting() as count:
        action()
    return [wait.kind for wait in count.waits]


def test_tensors_say_where_they_are_and_have_the_values_of_the_cpu(gpu: EmulatedGpu) -> None:
    values = torch.arange(6.0).view(2, 3)
    there = values.to("cuda")
    assert isinstance(there, GpuTensor) and there.device == torch.device("cuda", 0) and there.is_cuda
    assert torch.equal((there * 2).cpu(), values * 2)
    assert type(torch.zeros(2, device="cuda")) is type(torch.empty_like(there)) is GpuTensor
    assert type(torch.zeros_like(there, device="cpu")) is Tensor
    assert not isinstance(values, GpuTensor) and values.device.type == "cpu"


def test_a_network_trains_as_on_the_cpu(gpu: EmulatedGpu) -> None:
    def train(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        model = model.to(device).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(4, 3, 8, 8, generator=generator).to(device)
            cross_entropy(model(images), torch.arange(4).to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        return [tensor.detach().cpu() for tensor in model.state_dict().values()]

    assert all(torch.equal(one, other) for one, other in zip(train("cpu"), train("cuda"), strict=True))


def test_devices_do_not_mix(gpu: EmulatedGpu) -> None:
    there = torch.ones(3, device="cuda")
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a single value of the host may join
    for action in (
        lambda: there + torch.ones(3),
        lambda: torch.ones(3).add_(there),
        lambda: there.numpy(),
    ):
        with pytest.raises(GpuError, match="cuda:0"):
            action()


def test_what_makes_the_host_wait_is_counted(gpu: EmulatedGpu) -> None:
    there, host = torch.tensor([1.0, 0.0, 2.0], device="cuda"), torch.ones(3)
    for action, expected in (
        (there.tolist, ["tolist"]),
        (lambda: float(there[0]), ["_local_scalar_dense"]),
        (lambda: bool(there.any()), ["_local_scalar_dense"]),
        (there.cpu, ["copy to the host"]),
        (lambda: host.copy_(there), ["copy to the host"]),
        (lambda: there.to(host), ["copy to the host"]),
        (lambda: host.to("cuda"), ["copy to the device"]),
        (lambda: there.copy_(host), ["copy to the device"]),
        (lambda: torch.tensor([1, 2], device="cuda"), ["tensor of values of the host"]),
        (there.nonzero, ["nonzero"]),
        (lambda: there[there > 0], ["index by mask"]),
        (lambda: there[torch.tensor([0, 2])], ["index by indices of the host"]),
        (lambda: torch.equal(there, there), ["equal"]),
        (torch.cuda.synchronize, ["torch.cuda.synchronize"]),
        (lambda: host.to("cuda", non_blocking=True), []),
        (lambda: there.copy_(host, non_blocking=True), []),
        (lambda: torch.full((3,), 2.0, device="cuda"), []),
        (lambda: there.masked_fill_(there > 0, 1.0).sort(), []),
    ):
        assert waits(gpu, action) == expected


def test_operations_are_counted_and_views_are_none(gpu: EmulatedGpu) -> None:
    there = torch.ones(4, 2, device="cuda")
    with gpu.counting() as count:
        there.view(8)[:4].reshape(2, 2).t().mul_(2)
        there.sum()
    assert count.operations == {"mul_": 1, "sum": 1} and count.num_operations == 2


def test_host_memory_may_be_written_once_its_copy_is_over(gpu: EmulatedGpu) -> None:
    host = torch.zeros(3)
    host.to("cuda", non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()
    host += 1
    host.to("cuda", non_blocking=True)
    host += 1
    with pytest.raises(GpuError, match=r"^race: the source of the copy at "):
        torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.ones(2), "NCCL has no collectives of tensors on the host"),
        (GpuTensor(torch.ones(2, dtype=torch.int16)), r"NCCL has no torch\.int16"),
        (GpuTensor(torch.ones(4, 4)[:, ::2]), "NCCL needs a tensor without gaps"),
    ],
)
def test_nccls_rules_hold_for_collectives(gpu: EmulatedGpu, tensor: Tensor, expected: str) -> None:
    for action in (lambda: dist.all_reduce(tensor), lambda: dist.all_gather([GpuTensor(torch.ones(2))], tensor)):
        with pytest.raises(GpuError, match=rf"^all_(reduce|gather): {expected}"):
            action()
