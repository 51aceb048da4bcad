"""Superposition, compared with tests/conformance.json and with sums computed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import IntegrityError
from pipeline.superposition.rules import RULES as TABLE
from pipeline.superposition.rules import ordered
from pipeline.superposition.superpose import superpose

FACTS = json.loads((Path(__file__).parents[1] / "conformance.json").read_text())["superposition density=0.5"]
RULES = {"mean": "mean", "connection_aware": "connection_aware", "moving": "moving beta=0.5"}


@dataclass
class Network:
    state: dict[str, Tensor]
    masks: dict[str, Tensor]
    buffers: frozenset[str] = field(default_factory=frozenset)


def network(weights: list[float], mask: list[int] | None = None, **other: list[float]) -> Network:
    alive = torch.tensor(weights) != 0 if mask is None else torch.tensor(mask).bool()
    return Network(
        {"w": torch.tensor(weights)} | {name: torch.tensor(value) for name, value in other.items()}, {"w": alive}
    )


def from_facts(name: str) -> Network:
    state = {key: torch.tensor(value) for key, value in FACTS["inputs"][name].items()}
    return Network(state, {key: value != 0 for key, value in state.items()})


@pytest.mark.parametrize("rule", RULES)
def test_conformance(rule: str) -> None:
    tickets = [from_facts("prev"), from_facts("cur")]
    for num_active, key in ((8, "unpruned"), (4, "pruned to 4 active, global, lower index kept on ties")):
        result = superpose(tickets, num_active, rule=rule)
        assert {name: tensor.tolist() for name, tensor in result.state.items()} == FACTS[key][RULES[rule]]
        assert sum(int(mask.sum()) for mask in result.masks.values()) == num_active


def test_mean_of_three_weighs_them_equally() -> None:
    tickets = [network([3.0, 6.0, 0.0]), network([6.0, 0.0, 3.0]), network([0.0, 6.0, 6.0])]
    assert superpose(tickets, 3).state["w"].tolist() == [3.0, 4.0, 3.0]
    assert superpose(tickets, 1).num_members == 3


def test_connection_aware_divides_by_the_tickets_in_which_a_connection_is_alive() -> None:
    # Alive in 3, 2 and 1 of 3 tickets; the second's zero at index 1 is a newly grown weight, alive with value 0.
    tickets = [
        network([3.0, 6.0, 0.0], [1, 1, 0]),
        network([6.0, 0.0, 0.0], [1, 1, 0]),
        network([9.0, 0.0, 5.0], [1, 0, 1]),
    ]
    assert superpose(tickets, 3, rule="connection_aware").state["w"].tolist() == [6.0, 3.0, 5.0]


def test_connection_aware_forgets_what_was_pruned() -> None:
    # After the second ticket [4, 1, 2] is pruned to [4, 0, 2]: the 1 of index 1 no longer counts in its average.
    tickets = [network([4.0, 1.0, 0.0]), network([4.0, 0.0, 2.0]), network([4.0, 7.0, 0.0])]
    assert superpose(tickets, 2, rule="connection_aware", prune_every=True).state["w"].tolist() == [4.0, 7.0, 0.0]
    assert superpose(tickets, 3, rule="connection_aware", prune_every=False).state["w"].tolist() == [4.0, 4.0, 2.0]


def test_moving_forgets_by_beta() -> None:
    tickets = [network([8.0]), network([0.0], [1]), network([4.0])]
    assert superpose(tickets, 1, rule="moving", beta=0.25).state["w"].tolist() == [0.75 * (0.75 * 8) + 0.25 * 4]


def test_weights_of_tickets() -> None:
    tickets = [network([8.0, 0.0]), network([4.0, 4.0])]
    assert superpose(tickets, 2, weights=[1, 3]).state["w"].tolist() == [(8 + 3 * 4) / 4, 3 * 4 / 4]
    assert superpose(tickets, 2, weights=[1, 3], rule="connection_aware").state["w"].tolist() == [(8 + 3 * 4) / 4, 4.0]
    assert (
        superpose(tickets, 2, weights=[2, 2]).state["w"].tolist()
        == superpose(tickets, 2).state["w"].tolist()
        == [6.0, 2.0]
    )
    with pytest.raises(ValueError, match="zip"):
        superpose(tickets, 2, weights=[1])


def near_five(state: dict[str, Tensor], masks: dict[str, Tensor]) -> float:
    return -abs(state["w"][0].item() - 5)


def test_interpolation_takes_the_share_that_scores_best_and_leaves_out_what_does_not_help() -> None:
    # 4 → 4 + ¼·4 = 5, not 4 + ½·4 = 6; from 5 on every share of 0 leads away.
    tickets = [network([4.0], mean=[1.0]), network([8.0], mean=[2.0]), network([0.0], [1], mean=[3.0])]
    for ticket in tickets:
        ticket.buffers = frozenset({"mean"})
    result = superpose(tickets, 1, rule="interpolation", coefficients=[0.5, 0.25, 0.75], score=near_five)
    assert result.state["w"].tolist() == [5.0] and result.shares == (1.0, 0.25, 0.0) and result.num_members == 2
    assert result.parts == [0.75, 0.25, 0.0]
    assert result.state["mean"].tolist() == [2.0]  # of the last that came in


def test_a_greedy_soup_is_the_mean_of_the_tickets_that_help() -> None:
    tickets = [network([4.0]), network([9.0]), network([6.0])]  # with 9 it would be 6.5
    result = superpose(tickets, 1, rule="greedy_soup", score=near_five)
    assert result.state["w"].tolist() == [5.0] and result.shares == (1.0, 0.0, 0.5)
    weighted = superpose(
        tickets, 1, rule="greedy_soup", score=near_five, weights=[1, 5, 3]
    )  # (4 + 3·6)/4; what is out weighs nothing
    assert weighted.state["w"].tolist() == [5.5] and weighted.shares == (1.0, 0.0, 0.75)


def test_a_ticket_that_changes_nothing_is_left_out() -> None:
    assert superpose([network([3.0])] * 3, 1, rule="greedy_soup", score=near_five).shares == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("prune_every", [True, False])
def test_what_is_scored_is_pruned_and_the_first_score_is_that_of_the_first_ticket(prune_every: bool) -> None:
    seen: list[list[float]] = []

    def score(state: dict[str, Tensor], masks: dict[str, Tensor]) -> float:
        assert torch.equal(masks["w"], torch.tensor([[1, 0, 1], [1, 0, 1], [0, 1, 1]][len(seen)]).bool())
        seen.append(state["w"].tolist())
        return float(len(seen))

    # [4, 0, 3]; mean with [2, 0, 5]: [3, 0, 4]; then with [0, 9, 1] a third of each: [2, 3, 3].
    tickets = [network([4.0, 0.0, 3.0]), network([2.0, 0.0, 5.0]), network([0.0, 9.0, 1.0])]
    result = superpose(tickets, 2, rule="greedy_soup", score=score, prune_every=prune_every)
    expected = torch.tensor([[4.0, 0.0, 3.0], [3.0, 0.0, 4.0], [0.0, 3.0, 3.0]])
    torch.testing.assert_close(torch.tensor(seen), expected)
    assert result.state["w"].tolist() == seen[-1]


def test_the_order_in_which_a_rule_takes_tickets() -> None:
    scores = {"a": 1.0, "b": 3.0, "c": 1.0, "d": 2.0}
    orders = {name: "".join(ordered(list(scores), rule, scores.__getitem__)) for name, rule in TABLE.items()}
    assert orders == {
        "mean": "abcd",
        "connection_aware": "abcd",
        "moving": "abcd",
        "interpolation": "dcba",
        "greedy_soup": "bdac",
    }


def test_pruning_after_every_ticket_differs_from_pruning_at_the_end() -> None:
    # Mean of the first two: [2, 1.5, 1]; pruned to two, the last is 0 before the third comes.
    tickets = [network([4.0, 0.0, 2.0]), network([0.0, 3.0, 0.0]), network([0.0, 0.0, 9.0])]
    every = superpose(tickets, 2, prune_every=True)
    end = superpose(tickets, 2, prune_every=False)
    torch.testing.assert_close(every.state["w"], torch.tensor([4 / 3, 0.0, 3.0]))
    torch.testing.assert_close(end.state["w"], torch.tensor([4 / 3, 0.0, 11 / 3]))


def test_layer_scope_keeps_a_count_in_each_layer() -> None:
    ticket = Network(
        {"a": torch.tensor([9.0, 8.0]), "b": torch.tensor([2.0, 1.0])},
        {"a": torch.ones(2).bool(), "b": torch.ones(2).bool()},
    )
    assert [mask.tolist() for mask in superpose([ticket], 2).masks.values()] == [[True, True], [False, False]]
    assert [mask.tolist() for mask in superpose([ticket], {"a": 1, "b": 1}).masks.values()] == [
        [True, False],
        [True, False],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_weights_the_lower_index_of_the_first_layers_is_kept(dtype: torch.dtype) -> None:
    state = {"a": torch.tensor([1.0, -1.0, 1.0]).to(dtype), "b": torch.tensor([-2.0, 1.0, -1.0]).to(dtype)}
    ticket = Network(state, {name: torch.ones(3).bool() for name in state})
    assert {n: mask.int().tolist() for n, mask in superpose([ticket], 3).masks.items()} == {
        "a": [1, 1, 0],
        "b": [1, 0, 0],
    }
    in_layers = superpose([ticket], {"a": 2, "b": 2}).masks
    assert [mask.int().tolist() for mask in in_layers.values()] == [[1, 1, 0], [1, 1, 0]]


def test_dense_parameters_are_averaged_and_buffers_are_those_of_the_last() -> None:
    tickets = [network([1.0], bias=[1.0], mean=[1.0]), network([1.0], bias=[4.0], mean=[5.0])]
    for ticket in tickets:
        ticket.buffers = frozenset({"mean"})
    for rule, bias in (("mean", 2.5), ("connection_aware", 2.5), ("moving", 0.9 * 1 + 0.1 * 4)):
        state = superpose(tickets, 1, rule=rule, beta=0.1).state
        torch.testing.assert_close(state["bias"], torch.tensor([bias]))
        assert state["mean"].tolist() == [5.0]


def test_the_tickets_are_read_once_and_not_changed() -> None:
    tickets = [network([3.0, 1.0]), network([5.0, 0.0])]
    states = [{name: tensor.clone() for name, tensor in ticket.state.items()} for ticket in tickets]

    def once() -> Iterator[Network]:
        yield from tickets

    result = superpose(once(), 1)
    result.state["w"].zero_()
    assert all(torch.equal(ticket.state["w"], state["w"]) for ticket, state in zip(tickets, states, strict=True))


def test_dtype_is_kept_and_sums_are_float32() -> None:
    # In bfloat16 the next number after 1 is 1 + 1/128. The mean of the first two, 1 + 1/256, would
    # round back to 1 and stay there.
    step = 1 / 128
    tickets = [
        Network({"w": torch.tensor([1 + k * step], dtype=torch.bfloat16)}, {"w": torch.tensor([True])})
        for k in (0, 1, 1, 1)
    ]
    state = superpose(tickets, 1).state
    assert state["w"].dtype == torch.bfloat16
    assert state["w"].item() == 1 + step  # 1 + 3/4 of a step, rounded


def test_different_networks_are_refused() -> None:
    for other in (network([1.0, 2.0]), network([1.0], bias=[1.0]), Network({"w": torch.ones(1)}, {})):
        with pytest.raises(IntegrityError, match="different networks"):
            superpose([network([1.0]), other], 1)


def test_dense_tickets_are_averaged() -> None:
    tickets = [Network({"w": torch.tensor([1.0, 0.0])}, {}), Network({"w": torch.tensor([3.0, 2.0])}, {})]
    result = superpose(tickets, 0)
    assert result.state["w"].tolist() == [2.0, 1.0] and result.masks == {}
