"""BatchNorm statistics computed by hand, in one process; test_ranks.py has the same over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import DataError
from pipeline.evaluation.batchnorm import average_buffers, evaluating, recalibrate


def network() -> nn.Sequential:
    """An identity convolution before the BatchNorm layer, so that the batch statistics are those of the images."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Dropout(0.5))
    nn.init.ones_(model[0].weight)
    return model


def images(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def test_statistics_are_means_over_micro_batches_weighted_by_images() -> None:
    model = network()
    model[1].running_mean.fill_(float("nan"))  # of no consequence
    # Means 2 and 5; unbiased variances 2 and 1; weights 2 and 3.
    assert recalibrate(model, iter([images(1, 3), images(4, 5, 6)])) == 5
    assert model[1].running_mean.item() == pytest.approx((2 * 2 + 3 * 5) / 5)
    assert model[1].running_var.item() == pytest.approx((2 * 2 + 3 * 1) / 5)
    assert model[1].num_batches_tracked.item() == 2


def test_equal_micro_batches_give_torchs_cumulative_average() -> None:
    batches = torch.randn(5, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 + 1
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2, momentum=0.3)
    )
    theirs = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
        nn.BatchNorm2d(2, momentum=None),
    )
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        for batch in batches:
            theirs(batch)
    recalibrate(model, batches)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_nothing_else_changes() -> None:
    model = network().train()
    model[1].momentum = 0.3
    model[2].eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    recalibrate(model, [images(1, 3)])
    assert [module.training for module in model] == [True, True, False]
    assert model[1].momentum == 0.3 and not model[1]._forward_hooks
    assert all(
        torch.equal(parameter, before[name]) and parameter.grad is None for name, parameter in model.named_parameters()
    )


def test_an_error_while_recalibrating_leaves_the_model_usable() -> None:
    model = network().eval()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recalibrate(model, [images(1)])
    assert not model.training and model[1].momentum == 0.1 and not model[1]._forward_hooks


def test_a_layer_that_no_image_reaches_keeps_its_statistics() -> None:
    model = network()
    model.spare = nn.BatchNorm2d(2)
    model.spare.running_mean.fill_(3.0)
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    recalibrate(model, [images(1, 3)])
    assert model.spare.running_mean.tolist() == [3.0, 3.0] and model.spare.running_var.tolist() == [1.0, 1.0]


def test_no_image_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="no full micro-batch"):
        recalibrate(network(), [])


def test_autocast_statistics_are_float32() -> None:
    model = network()
    recalibrate(model, [images(1, 3), images(5, 7)], autocast_dtype=torch.bfloat16)
    assert model[1].running_mean.dtype == torch.float32 and model[1].running_mean.item() == 4.0


def test_averaged_buffers_are_new_tensors_under_state_dict_names() -> None:
    model = nn.Sequential(network(), nn.BatchNorm1d(3, track_running_stats=False))
    buffers = average_buffers(model)
    assert (
        buffers.keys()
        == {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"}
        <= model.state_dict().keys()
    )
    buffers["0.1.running_mean"].fill_(5.0)
    assert model[0][1].running_mean.item() == 0.0


def test_modes_come_back_also_after_an_error() -> None:
    model = network().train()
    model[1].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model] == [True, False, True]
