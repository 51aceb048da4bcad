"""One pass over a batch gives the bits of torch's three."""

from __future__ import annotations

import pytest
import torch

from pipeline.data import normalise as module
from pipeline.data.normalise import normalise
from pipeline.memory import HUGE_PAGE


@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (4, 3, 224, 224)], ids=["small pages", "huge pages"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_bits_and_layout_of_torch(
    shape: tuple[int, ...], memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(memory_format=memory_format)
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1).expand(1, *shape[1:]).contiguous(memory_format=memory_format)
        for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    )
    assert (4 * images.numel() >= HUGE_PAGE) == (shape[-1] == 224)
    expected = images.to(torch.float32, memory_format=memory_format).sub_(mean).div_(std)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one_pass = normalise(images, mean, std)
    monkeypatch.setattr(module, "is_compiling", lambda: False)
    three_passes = normalise(images, mean, std)
    torch.set_num_threads(threads)
    for found in (one_pass, three_passes):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
