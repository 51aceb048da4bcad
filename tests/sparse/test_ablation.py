"""SRigL's neuron ablation: outputs with few salient weights die, and the others share their weights.

The oracle is written in plain Python from the paper's description of one update (arXiv 2305.02299,
section 3.2), one layer at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.sparse.criteria import GrowthStage
from pipeline.sparse.flops import layer_macs
from pipeline.sparse.masks import mask_digest
from pipeline.sparse.request import Request
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS, Strategy
from pipeline.sparse.structure import Layout, fan_ins_after_ablation, structured_masks
from pipeline.sparse.update import share_of, updated_masks

SRIGL = METHODS["srigl"]
SHAPES = [(4, 6), (6, 4), (5, 1, 3, 1), (3, 2, 2, 2), (1, 7), (7, 1)]


def paper(mask: Tensor, weight: Tensor, gradient: Tensor, drop_fraction: float, gamma: str) -> list[list[int]]:
    """The mask of one layer after an update: [outputs][inputs and kernel], 1 is active.

    Of equal magnitudes and equal numbers, the lower index comes first. ``gamma`` is a decimal number.
    """
    outputs = len(mask)
    active, size = mask.flatten().tolist(), mask.numel() // outputs
    magnitude, growth = weight.abs().flatten().tolist(), gradient.abs().flatten().tolist()
    places = range(len(active))
    strongest = sorted((i for i in places if active[i]), key=lambda i: (-magnitude[i], i))
    num_active, num_replaced = len(strongest), share_of(drop_fraction, len(strongest))

    # A weight is salient if its magnitude, or its gradient among those that are not kept, is one of the largest.
    kept = strongest[: num_active - num_replaced]
    largest = sorted(set(places) - set(kept), key=lambda i: (-growth[i], i))
    salient = [0] * outputs
    for i in kept + largest[:num_replaced]:
        salient[i // size] += 1

    # Outputs below gamma times the fan-in die, but as many live as can hold the weights.
    least = max(1, math.floor(Fraction(gamma) * (num_active // outputs)))
    least = min(least, sorted(salient, reverse=True)[math.ceil(num_active / size) - 1])
    living = sorted((o for o in range(outputs) if salient[o] >= least), key=lambda o: (-salient[o], o))
    fan_in = dict.fromkeys(range(outputs), 0)
    for turn in range(num_active):
        fan_in[living[turn % len(living)]] += 1

    # The weakest of the layer are pruned, those of dead outputs first; each living output grows to its fan-in.
    new: list[list[int]] = [[] for _ in range(outputs)]
    for i in [i for i in strongest if fan_in[i // size]][: num_active - num_replaced]:
        if len(new[i // size]) < fan_in[i // size]:
            new[i // size].append(i)
    for output, own in enumerate(new):
        free = sorted(set(range(output * size, (output + 1) * size)) - set(own), key=lambda i: (-growth[i], i))
        own += free[: fan_in[output] - len(own)]
    return [[int(o * size + i in new[o]) for i in range(size)] for o in range(outputs)]


def update(
    mask: Tensor, weight: Tensor, gradient: Tensor, drop_fraction: float, min_salient: float, **options: Any
) -> Tensor:
    """One update of one layer that is not the last of its network."""
    strategy = dataclasses.replace(SRIGL, min_salient=min_salient, **options)
    growth = [GrowthStage({"w": gradient.abs().flatten()}, 1.0)]
    new = updated_masks(
        {"w": mask},
        {"w": weight},
        Request(drop_fraction),
        growth,
        strategy=strategy,
        num_active_before=int(mask.sum()),
        output_layer="classifier",
    )
    return new.masks["w"]


def rows(mask: Tensor) -> list[list[int]]:
    return mask.flatten(1).int().tolist()


def test_an_output_with_few_salient_weights_dies_by_hand() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    weight = torch.tensor([[9.0, 8.0, 0, 0], [1.0, 2.0, 0, 0], [0, 0, 7.0, 6.0]])
    gradient = torch.tensor([[0.0, 0, 5, 1], [0, 0, 3, 0], [4, 2, 0, 0]])
    # 6 active, a third is replaced. 9, 8, 7, 6 are kept; of all others the gradients 5 (output 0) and 4 (output 2) are
    # the largest. Salient: 3, 0, 3. Output 1 has fewer than max(1, 0.3·2) and dies: 6 weights for 2 outputs, 3 each.
    # Output 0 keeps 9, 8 and grows at 5; output 2 keeps 7, 6 and grows at 4.
    assert rows(update(mask, weight, gradient, 1 / 3, 0.3)) == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]]
    # RigL with the same fan-in, and nothing else: output 1 lost both and regrows both.
    assert rows(update(mask, weight, gradient, 1 / 3, 0.0)) == [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]]


def test_a_dead_output_revives_by_its_gradient_and_takes_back_its_share() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
    weight = torch.tensor([[9.0, 8.0, 2.0, 0], [0, 0, 0, 0], [1.0, 0, 7.0, 6.0]])
    gradient = torch.tensor([[0.0, 0, 0, 0], [6, 0, 0, 7], [0, 5, 0, 0]])
    # 2 of 6 are replaced: 9, 8, 7, 6 stay, the gradients 7 and 6 of output 1 are salient. It has 2 of max(1, 0.3·2).
    assert rows(update(mask, weight, gradient, 1 / 3, 0.3)) == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]]
    # An output that has more than its share loses its weakest, though they are stronger than another's: 5 is pruned.
    weight = torch.tensor([[9.0, 8.0, 5.0, 0], [0, 0, 0, 0], [1.0, 0, 2.0, 3.0]])
    assert rows(update(mask, weight, gradient, 1 / 3, 0.3)) == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 0, 1]]


@pytest.mark.parametrize(
    ("salient", "num_active", "min_salient", "expected"),
    [
        ([2, 2, 2], 6, 0.3, [2, 2, 2]),
        ([5, 1, 0], 6, 0.3, [3, 3, 0]),  # at least 1, although 0.3·2 is less
        ([5, 2, 0, 1], 8, 0.9, [3, 3, 0, 2]),  # 0.9·2 is 1.8: 1 is enough
        ([5, 2, 0, 1], 8, 1.0, [4, 4, 0, 0]),  # all of the fan-in
        ([4, 3, 0, 4, 0], 11, 0.5, [4, 3, 0, 4, 0]),  # 11 does not divide by 3: most salient first, then by index
        ([3, 3, 0, 3, 0], 10, 0.5, [4, 3, 0, 3, 0]),
        ([6, 1, 1, 1, 0], 9, 1.0, [3, 2, 2, 2, 0]),
        # 13 of fan-in 2 do not fit in the outputs with 2 salient weights, 12 in two outputs of 6; the third has 1,
        # and so have the others that live with it
        ([6, 5, 1, 1, 0, 0], 13, 1.0, [4, 3, 3, 3, 0, 0]),
        ([6, 6, 0], 12, 1.0, [6, 6, 0]),  # these are full
        ([6, 6, 6], 18, 1.0, [6, 6, 6]),
    ],
)
def test_fan_ins_by_hand(salient: list[int], num_active: int, min_salient: float, expected: list[int]) -> None:
    marks = torch.arange(6) < torch.tensor(salient)[:, None]
    assert fan_ins_after_ablation(marks, num_active, min_salient).tolist() == expected
    of_kernels = marks.view(len(salient), 3, 2, 1)
    assert fan_ins_after_ablation(of_kernels, num_active, min_salient).tolist() == expected


def test_a_threshold_is_not_missed_by_a_rounding_error() -> None:
    assert 0.29 * 100 < 29  # in floating point
    marks = torch.arange(200) < torch.tensor([[29], [28], [143], [200]])
    assert fan_ins_after_ablation(marks, 400, 0.29).tolist() == [133, 0, 133, 134]


@given(
    shape=st.sampled_from(SHAPES),
    density=st.sampled_from([0.01, 0.2, 0.4, 0.7, 1.0]),
    num_values=st.sampled_from([1, 2, 4, 1000]),  # all equal, many ties, hardly one
    drop_fraction=st.sampled_from([0.01, 0.3, 0.5, 1.0]),
    gamma=st.sampled_from(["0.01", "0.3", "0.5", "0.95", "1"]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_updates_are_those_of_the_paper(
    shape: tuple[int, ...], density: float, num_values: int, drop_fraction: float, gamma: str, seed: int
) -> None:
    """Linear and convolutional layers, ties, dead outputs that revive, counts that do not divide, dense layers."""
    generator = torch.Generator().manual_seed(seed)

    def values() -> Tensor:
        return torch.randint(-num_values, num_values, shape, generator=generator).float()

    layout = Layout(shape, "fan_in")
    num_active = layout.num_active(round(density * math.prod(shape)))
    mask = structured_masks(values(), layout, num_active)
    for _ in range(3):
        weight, gradient = values() * mask, values()
        new = update(mask, weight, gradient, drop_fraction, float(gamma))
        assert rows(new) == paper(mask, weight, gradient, drop_fraction, gamma)
        of_outputs = new.flatten(1).sum(1)
        assert int(of_outputs.sum()) == num_active
        assert int(of_outputs.max()) - int(of_outputs[of_outputs > 0].min()) <= 1
        mask = new


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, 2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 10)).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def make(strategy: Strategy | str = "srigl", density: float = 0.1, **options: Any) -> tuple[nn.Module, Any, Sparsifier]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, Sparsifier(model, optimizer, strategy, density=density, seed=0, check_every=1, **options)


def train(model: nn.Module, optimizer: Any, sparsifier: Sparsifier, steps: range) -> list[int]:
    """Replace 30% in every second step, and return the number of dead outputs after each update."""
    dead = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.randn(16, 3, 9, 9, generator=generator), torch.randint(0, 10, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        sparsifier.before_step(0.3 if step % 2 else None)
        optimizer.step()
        if (update := sparsifier.after_step()) is not None:
            dead.append(update.num_ablated)
    return dead


def fan_ins(sparsifier: Sparsifier) -> dict[str, Tensor]:
    return {name: mask.flatten(1).sum(1) for name, mask in sparsifier.masks.items()}


@pytest.mark.parametrize(
    "changes", [{}, {"scope": "global_prune"}, {"grow_share": 0.5}, {"grow": "random"}, {"regrown": "zero"}]
)
def test_training_keeps_counts_and_the_classes(changes: dict[str, Any]) -> None:
    strategy = dataclasses.replace(SRIGL, min_salient=0.95, distribution="uniform", **changes)
    model, optimizer, sparsifier = make(strategy)
    before = {name: int(fan_in.sum()) for name, fan_in in fan_ins(sparsifier).items()}
    dead = train(model, optimizer, sparsifier, range(12))
    after = fan_ins(sparsifier)
    assert {name: int(fan_in.sum()) for name, fan_in in after.items()} == before
    assert dead[-1] == sum(int((fan_in == 0).sum()) for fan_in in after.values()) > 0
    *hidden, classifier = after.values()
    assert (classifier == classifier[0]).all()  # every class keeps its fan-in
    if not changes:
        assert all((fan_in == 0).any() for fan_in in hidden)  # the first layer is no exception
    assert all(int(fan_in.max() - fan_in[fan_in > 0].min()) <= 1 for fan_in in hidden)


def test_the_last_layer_of_the_network_is_spared_and_not_the_last_sparse_one() -> None:
    strategy = dataclasses.replace(SRIGL, min_salient=0.95, distribution="uniform")
    model, optimizer, sparsifier = make(strategy, dense_layers=["7.weight"])
    train(model, optimizer, sparsifier, range(12))
    assert all((fan_in == 0).any() for fan_in in fan_ins(sparsifier).values())


def test_without_ablation_it_is_rigl_with_the_structure() -> None:
    masks = []
    for strategy in (
        dataclasses.replace(SRIGL, min_salient=0.0),
        dataclasses.replace(METHODS["rigl"], structure="fan_in"),
    ):
        model, optimizer, sparsifier = make(strategy)
        assert train(model, optimizer, sparsifier, range(6)) == [0, 0, 0]
        masks.append(mask_digest(sparsifier.masks))
    assert masks[0] == masks[1]


def test_a_resumed_run_kills_and_revives_the_same_outputs() -> None:
    strategy = dataclasses.replace(SRIGL, min_salient=0.95, distribution="uniform")
    model, optimizer, sparsifier = make(strategy)
    train(model, optimizer, sparsifier, range(6))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    dead = train(model, optimizer, sparsifier, range(6, 12))
    again, other, resumed = make(strategy)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    assert train(again, other, resumed, range(6, 12)) == dead
    assert resumed.history_digest == sparsifier.history_digest
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))


def test_flops_follow_the_weights_wherever_they_are() -> None:
    strategy = dataclasses.replace(SRIGL, min_salient=0.95, distribution="uniform")
    macs = layer_macs(network(), (3, 9, 9))
    model, optimizer, sparsifier = make(strategy, macs=macs)
    assert sparsifier.flops is not None
    before = sparsifier.flops.forward
    assert train(model, optimizer, sparsifier, range(2)) > [0]
    assert sparsifier.flops.forward == before  # as many weights of each layer, each used as often


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"min_salient": 1.5}, r"min_salient: expected 0 to 1, got 1\.5"),
        ({"min_salient": math.nan}, "min_salient: expected 0 to 1, got nan"),
        ({"structure": "none"}, r"min_salient: 0\.3 lets outputs die, which structure 'none' does not support"),
        ({"structure": "block 2x2"}, r"min_salient: .* 'block 2x2' does not support; use structure 'fan_in'"),
        ({"scope": "global"}, "scope: 'global' ranks growth over all layers"),
    ],
)
def test_what_ablation_cannot_go_with_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make(dataclasses.replace(SRIGL, **changes))
