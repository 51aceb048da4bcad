"""Masks that are chosen at initialisation: truth tables of each score, counts, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, NumericsError
from pipeline.sparse import Sparsifier, masks_at_start
from pipeline.sparse.initial import INITIAL_SCORES, ScoreInputs
from pipeline.sparse.layers import sparse_weights
from pipeline.sparse.strategy import METHODS

CHOSEN = [name for name, row in METHODS.items() if row.initial != "random"]


def linear(*rows: list[float]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows)
    return layer


def bits(masks: dict[str, Tensor]) -> list[list[list[int]]]:
    return [mask.int().tolist() for mask in masks.values()]


# Both outputs are 3 for x = (1, 2), so both probabilities are 1/2, and for label 0 the gradient is (−1/2, 1/2)ᵀ · x.
ONE_LAYER = linear([2.0, 0.5], [1.0, 1.0])
BATCH = [(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("magnitude_init", [[1, 0], [1, 0]]),  # |w| is 2, 0.5; 1, 1: of equal weights the lower index
        ("snip", [[1, 0], [0, 1]]),  # |w · g| is |2 · −0.5|, |0.5 · −1|; |1 · 0.5|, |1 · 1|
        # H · g is (−1/4, 1/4)ᵀ · x times |x|² / T³ > 0, so w · Hg is in proportion to −2, −1; 1, 2
        ("grasp", [[0, 0], [1, 1]]),
        ("synflow", [[1, 0], [1, 0]]),  # with one layer |w|
    ],
)
def test_two_of_four_weights_by_hand(method: str, expected: list[list[int]]) -> None:
    assert bits(masks_at_start(ONE_LAYER, method, BATCH, density=0.5)) == [expected]


def test_grasp_is_the_hessian_times_the_gradient() -> None:
    row = INITIAL_SCORES["grasp"]
    assert row is not None
    layer = linear([2.0, 0.5], [1.0, 1.0]).double()
    images, labels = BATCH[0]
    (scores,) = row.scores(ScoreInputs(layer, sparse_weights(layer), [(images.double(), labels)])).values()
    logits = layer.weight.detach() @ images[0].double() / 200
    first, second = torch.softmax(logits, 0).tolist()
    assert first == pytest.approx(0.5)
    flow = first * second * 5 / 200**3  # |x|² = 5; the logits and each derivative are divided by T = 200
    assert scores.flatten().tolist() == pytest.approx([flow * s for s in (-2.0, -1.0, 1.0, 2.0)])


def test_synaptic_flow_by_hand_and_in_rounds() -> None:
    network = nn.Sequential(linear([1.0, -2.0], [3.0, 4.0]), nn.ReLU(), linear([1.0, -2.0]))
    row = INITIAL_SCORES["synflow"]
    assert row is not None and row.rounds == 100
    batch = [(torch.zeros(1, 2), torch.tensor([0]))]  # its pixels are not read, only its shape
    inputs = ScoreInputs(network, sparse_weights(network), batch)
    first, second = row.scores(inputs).values()
    # of |w|: what flows through a weight is |v_i| · |w_ij|, and through v_i what its row of w adds up to
    assert (first.tolist(), second.tolist()) == ([[1.0, 2.0], [6.0, 8.0]], [[3.0, 14.0]])


def test_rounds_keep_a_whole_path_where_one_ranking_breaks_two(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(linear([6.0, 6.0], [4.0, 4.0]), linear([1.0, 1.4]))
    batch = [(torch.zeros(1, 2), torch.tensor([0]))]
    # Flows are 6, 6; 5.6, 5.6 in the first layer and 12, 11.2 in the second. Without its first weight the second path
    # has 5.6 in both layers: of equal ones the later layer's goes next, and the rest of the path has no flow then.
    assert bits(masks_at_start(network, "synflow", batch, density=0.5)) == [[[1, 1], [0, 0]], [[1, 0]]]
    row = INITIAL_SCORES["synflow"]
    assert row is not None
    monkeypatch.setitem(INITIAL_SCORES, "synflow", dataclasses.replace(row, rounds=1))
    assert bits(masks_at_start(network, "synflow", batch, density=0.5)) == [[[1, 0], [0, 0]], [[1, 1]]]


@pytest.mark.parametrize("method", CHOSEN)
def test_counts_are_exact_every_layer_keeps_a_weight_and_the_model_is_unchanged(method: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 10)
    ).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))
    state = torch.random.get_rng_state()
    halves = list(zip(images.split(4), labels.split(4), strict=True))
    masks = masks_at_start(network, method, halves, density=0.05)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not network.training and all(parameter.grad is None for parameter in network.parameters())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.05 * (108 + 1440))
    assert all(mask.any() for mask in masks.values())
    again = masks_at_start(network, method, halves, density=0.05)
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"initial: '\w+' chooses the masks .*; do: pass masks=masks_at_start\("):
        Sparsifier(network, optimizer, method, density=0.05, seed=0)
    sparsifier = Sparsifier(network, optimizer, method, density=0.05, seed=0, masks=masks)
    assert sparsifier.density == pytest.approx(0.05, abs=1 / 1548)
    assert not sparsifier.needs_dense_gradient(0.3)  # the masks never change


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ConfigError, match="initial: this method draws its masks at random"):
        masks_at_start(ONE_LAYER, "rigl", BATCH, density=0.5)
    with pytest.raises(ConfigError, match="batches: expected at least one, got none"):
        masks_at_start(ONE_LAYER, "snip", [], density=0.5)
    with pytest.raises(NumericsError, match=r"initial: the score of weight is not finite \(snip\)"):
        masks_at_start(ONE_LAYER, "snip", [(torch.full((1, 2), torch.inf), torch.tensor([0]))], density=0.5)
