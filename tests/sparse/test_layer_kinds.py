"""Every kind of layer that holds weights becomes sparse, and the weights that it computes with are sparse exactly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from pipeline.errors import ConfigError
from pipeline.sparse import METHODS, Sparsifier, layer_macs, method, sparse_weights
from pipeline.sparse.distribution import densities_of
from pipeline.sparse.flops import MIXED, sparse_flops
from pipeline.sparse.layers import Form, forms_of
from pipeline.sparse.select import strongest_of_norms
from pipeline.sparse.update import magnitude_masks, prune_to
from pipeline.tickets import Provenance, decode, encode, ticket_of

timm_layers = pytest.importorskip("timm.layers")


class Wrapped(nn.Module):
    """Calls a layer with what it wants of an image [n, 8, 6, 6], and classifies."""

    def __init__(self, layer: nn.Module, num_features: int) -> None:
        super().__init__()
        self.layer = layer
        self.fc = nn.Linear(num_features, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.use(x)
        output: Tensor = self.fc(out.reshape(len(out), self.fc.in_features, -1).mean(2))
        return output

    def use(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.RNNBase):  # 36 tokens
            output: Tensor = self.layer(x.flatten(2).transpose(1, 2))[0].transpose(1, 2)
        elif isinstance(self.layer, nn.RNNCellBase):
            state = self.layer(x.mean((2, 3)))
            output = state[0] if isinstance(state, tuple) else state
        elif isinstance(self.layer, nn.Bilinear):
            output = self.layer(x.mean((2, 3)), x.amax((2, 3)))
        elif isinstance(self.layer, timm_layers.CondConv2d):
            output = self.layer(x, x.mean((2, 3))[:, :4].softmax(1))
        elif isinstance(self.layer, (nn.ConvTranspose1d, nn.Conv1d)):
            output = self.layer(x.flatten(2))
        elif isinstance(self.layer, (nn.ConvTranspose3d, nn.Conv3d)):
            output = self.layer(x[:, :, None])
        elif isinstance(self.layer, nn.Linear):
            output = self.layer(x.mean((2, 3)))
        else:
            output = self.layer(x)
        return output


class Experts(nn.Module):
    """Two experts of a mixture, in the layout of transformers' Mixtral; the second half is weighed 0."""

    def __init__(self, num_experts: int = 2) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.randn(num_experts, 8, 12))
        self.down = nn.Parameter(torch.randn(num_experts, 12, 8))
        self.up_bias = nn.Parameter(torch.zeros(num_experts, 12))
        self.scale = nn.Parameter(torch.ones(num_experts, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).reshape(1, -1, 8).expand(self.num_experts, -1, -1)
        hidden = torch.baddbmm(self.up_bias[:, None], tokens, self.up).relu()
        out = (torch.bmm(hidden, self.down) * self.scale).mean(0)
        return out.view(len(x), -1, 8).transpose(1, 2)


NORM = "parametrizations.weight.original"
# layer, number of its output channels, {the weight that is sparse: (the shape that the distribution uses, MACs)}
KINDS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, tuple[tuple[int, ...], int]]]] = {
    "transposed 1d": (lambda: nn.ConvTranspose1d(8, 4, 3), 4, {"weight": ((4, 8, 3), 96 * 36)}),
    "transposed 2d, strided": (lambda: nn.ConvTranspose2d(8, 4, 3, 2), 4, {"weight": ((4, 8, 3, 3), 288 * 36)}),
    "transposed 2d, grouped": (
        lambda: nn.ConvTranspose2d(8, 12, 3, groups=4),
        12,
        {"weight": ((12, 2, 3, 3), 12 * 2 * 9 * 36)},
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(8, 4, 2), 4, {"weight": ((4, 8, 2, 2, 2), 256 * 36)}),
    "bilinear": (lambda: nn.Bilinear(8, 8, 5), 5, {"weight": ((5, 64), 320)}),
    "LSTM": (
        lambda: nn.LSTM(8, 6, 2, batch_first=True),
        6,
        {
            "weight_ih_l0": ((24, 8), 192 * 36),
            "weight_hh_l0": ((24, 6), 144 * 36),
            "weight_ih_l1": ((24, 6), 144 * 36),
            "weight_hh_l1": ((24, 6), 144 * 36),
        },
    ),
    "LSTM, both ways, projected": (
        lambda: nn.LSTM(8, 6, batch_first=True, bidirectional=True, proj_size=2),
        4,
        {
            f"weight_{kind}_l0{way}": (shape, math.prod(shape) * 36)
            for way in ("", "_reverse")
            for kind, shape in (("ih", (24, 8)), ("hh", (24, 2)), ("hr", (2, 6)))
        },
    ),
    "GRU": (
        lambda: nn.GRU(8, 6, batch_first=True),
        6,
        {"weight_ih_l0": ((18, 8), 144 * 36), "weight_hh_l0": ((18, 6), 108 * 36)},
    ),
    "RNN": (
        lambda: nn.RNN(8, 6, batch_first=True),
        6,
        {"weight_ih_l0": ((6, 8), 48 * 36), "weight_hh_l0": ((6, 6), 36 * 36)},
    ),
    "a cell": (lambda: nn.LSTMCell(8, 6), 6, {"weight_ih": ((24, 8), 192), "weight_hh": ((24, 6), 144)}),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Conv2d(8, 16, 3)),
        16,
        {f"{NORM}1": ((16, 8, 3, 3), 1152 * 16)},
    ),
    "weight_norm, old": (lambda: weight_norm(nn.Linear(8, 16)), 16, {"weight_v": ((16, 8), 128)}),
    "weight_norm of a transposed one": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(8, 4, 3), dim=1),
        4,
        {f"{NORM}1": ((4, 8, 3, 3), 288 * 36)},
    ),
    "weight_norm of a whole weight": (
        lambda: weight_norm(nn.Linear(8, 16), dim=None),
        16,
        {"weight_v": ((16, 8), 128)},
    ),
    "weight_norm of an LSTM": (
        lambda: weight_norm(nn.LSTM(8, 6, batch_first=True), "weight_hh_l0"),
        6,
        {"weight_ih_l0": ((24, 8), 192 * 36), "weight_hh_l0_v": ((24, 6), 144 * 36)},
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Conv2d(8, 4, 3)),
        4,
        {NORM: ((4, 8, 3, 3), 288 * 16)},
    ),
    "spectral_norm, old": (lambda: spectral_norm(nn.Conv1d(8, 4, 3)), 4, {"weight_orig": ((4, 8, 3), 96 * 34)}),
    "both norms": (
        lambda: parametrizations.spectral_norm(parametrizations.weight_norm(nn.Conv3d(8, 4, 1))),
        4,
        {f"{NORM}1": ((4, 8, 1, 1, 1), 32 * 36)},
    ),
    "experts that are mixed": (
        lambda: timm_layers.CondConv2d(8, 4, 3, num_experts=4),
        4,
        {"weight": ((4, 8, 3, 3), 4 * 288 + 288 * 36)},
    ),
    "experts of a matrix product": (Experts, 8, {"up": ((8, 12), 192 * 36), "down": ((12, 8), 192 * 36)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_each_kind_is_sparse_from_mask_to_ticket(kind: str) -> None:
    torch.manual_seed(0)
    make, width, expected = KINDS[kind]
    model = Wrapped(make(), width)
    weights, forms, macs = sparse_weights(model), forms_of(model), layer_macs(model, (8, 6, 6))
    assert [name for name in weights if name != "fc.weight"] == sorted(
        (f"layer.{name}" for name in expected), key=list(dict(model.named_parameters())).index
    )
    for name, (shape, count) in expected.items():
        assert forms[f"layer.{name}"].shape == shape
        assert math.prod(shape) * forms[f"layer.{name}"].copies == weights[f"layer.{name}"].numel()
        assert macs[f"layer.{name}"] + macs.get(f"layer.{name}{MIXED}", 0) == count, name
    assert set(macs) == {*weights, *(f"{name}{MIXED}" for name, form in forms.items() if form.is_mixed)}

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier = Sparsifier(
        model, optimizer, method("rigl", min_active=2), density=0.4, seed=0, macs=macs, check_every=1
    )
    total = sum(weight.numel() for weight in weights.values())
    assert sum(int(mask.sum()) for mask in sparsifier.masks.values()) == round(0.4 * total)
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    for step in range(4):
        loss = nn.functional.cross_entropy(model(torch.randn(4, 8, 6, 6)), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        assert sparsifier.before_step(0.9 if step % 2 else None)
        optimizer.step()
        sparsifier.after_step()
        optimizer.zero_grad()
        assert torch.isfinite(loss), step
    assert all(not torch.equal(mask, before[name]) for name, mask in sparsifier.masks.items() if not bool(mask.all()))
    assert sum(int(mask.sum()) for mask in sparsifier.masks.values()) == round(0.4 * total)
    model.eval()
    _assert_weights_in_use_are_sparse(model, sparsifier.masks)
    ticket = ticket_of(model, sparsifier.masks, provenance=PROVENANCE)
    again = Wrapped(make(), width)
    again.load_state_dict(decode(encode(ticket)).state)
    images = torch.randn(2, 8, 6, 6)
    assert torch.equal(again.eval()(images), model(images))


def _assert_weights_in_use_are_sparse(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Not the parameters, but what is multiplied with: 0 outside the mask, and not 0 for all that are not 0 inside."""
    model(torch.randn(2, 8, 6, 6))  # hooks compute the weight in use
    for path, mask in masks.items():
        parameter = dict(model.named_parameters())[path]
        place = path.split(".parametrizations.")[0] if ".parametrizations." in path else path.rpartition(".")[0]
        attribute = path.rpartition(".")[2].removesuffix("_v").removesuffix("_orig")
        attribute = "weight" if ".parametrizations." in path else attribute
        in_use = getattr(model.get_submodule(place), attribute)
        assert in_use.shape == mask.shape and bool(torch.isfinite(in_use).all())
        assert torch.equal(in_use != 0, parameter != 0) and not bool((in_use != 0)[~mask].any()), path


PROVENANCE = Provenance(0, "m", {}, 3, "rigl", "p", 0, 0, 0.0, 0.4, 0.4, 0, "", "", "", "", "")


def test_stacked_experts_are_found_by_convention_only() -> None:
    experts = Experts()
    assert list(sparse_weights(experts)) == ["up", "down"]  # not the bias, nor a scale of one row an expert
    experts.num_experts = 3  # of which the first dimension is not
    assert not sparse_weights(experts)
    flat = timm_layers.CondConv2d(8, 4, 3, num_experts=4)
    assert list(sparse_weights(flat)) == ["weight"]
    flat.weight_shape = (4, 8, 3)  # not the shape of what an expert holds
    assert not sparse_weights(flat)


def test_another_parametrization_is_not_taken_for_one_that_keeps_zeros() -> None:
    model = nn.Sequential(
        parametrizations.orthogonal(nn.Linear(4, 4)),
        prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
        parametrizations.spectral_norm(parametrizations.orthogonal(nn.Linear(4, 4))),
        nn.Linear(4, 2),
    )
    assert list(sparse_weights(model)) == ["3.weight"]
    macs = layer_macs(nn.Sequential(nn.Flatten(), model), (4, 1, 1))
    assert sum(macs.values()) == 3 * 16 + 8 and macs["1.3.weight"] == 8


def test_finding_weights_computes_nothing() -> None:
    """spectral_norm takes a step of its power iteration whenever the weight is asked for in training."""
    model = parametrizations.spectral_norm(nn.Linear(8, 8)).train()
    before = copy.deepcopy(model.state_dict())
    sparse_weights(model), forms_of(model), layer_macs(nn.Sequential(nn.Flatten(), model), (8, 1, 1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_experts_are_layers_of_their_own_for_the_distribution() -> None:
    """ERK by one expert's fan-in and fan-out: as if the two had been two layers."""
    apart = densities_of({"a": Form((8, 4)), "b": Form((8, 4)), "c": Form((32, 32))}, "erk", 0.25)
    stacked = densities_of({"ab": Form((8, 4), copies=2), "c": Form((32, 32))}, "erk", 0.25)
    assert stacked["ab"] == apart["a"] == apart["b"] and stacked["c"] == apart["c"]


def test_flops_of_a_mixed_kernel_are_those_of_the_union_by_hand() -> None:
    macs = {"w": 10, f"w{MIXED}": 100}
    mask = torch.tensor([[True, False, False, False], [True, True, False, False]])
    assert sparse_flops(macs, {"w": mask}) == 2 * (10 * 3 / 8 + 100 * 2 / 4)


# -- weight_norm divides by the norm of each output's weights, which must not become 0


def test_the_strongest_weight_of_each_norm_by_hand() -> None:
    values = torch.tensor([3.0, -4.0, 1.0, 1.0, 0.0])
    indices = torch.tensor([0, 1, 4, 5, 6])  # of 3×3: two of the first row, two of the second, one of the third
    strongest = strongest_of_norms(values, indices, (3, 3), (3, 1))
    assert strongest.tolist() == [False, True, True, False, True]  # of equal ones the lower index
    assert strongest_of_norms(values, indices, (3, 3), (1, 3)).tolist() == [True, True, False, True, False]
    assert strongest_of_norms(values, indices, (3, 3), (1, 1)).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("scope", ["layer", "global", "global_prune", "global_normalised"])
@pytest.mark.parametrize("prune_by", ["magnitude", "sign_aware"])
def test_an_update_that_would_empty_outputs_leaves_the_strongest_weight_of_each(scope: str, prune_by: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 32)), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = method("rigl", scope=scope, prune=prune_by, distribution="uniform")
    sparsifier = Sparsifier(model, optimizer, strategy, density=0.07, seed=0)
    name = "0.parametrizations.weight.original1"
    assert int(sparsifier.masks[name].sum()) == 36 and bool(sparsifier.masks[name].any(1).all())
    for _ in range(3):
        strongest = (sparsifier.weights[name] * sparsifier.masks[name]).abs().argmax(1, keepdim=True)
        model(torch.randn(8, 16)).square().mean().backward()
        sparsifier.before_step(1.0)  # replaces all that it may
        sparsifier.after_step()
        optimizer.zero_grad()
        assert bool(sparsifier.masks[name].gather(1, strongest).all())
        assert bool(sparsifier.weights[name].ne(0).any(1).all()) and bool(torch.isfinite(model[0].weight).all())


def test_density_steps_and_superposition_keep_a_weight_of_each_norm() -> None:
    weights = {"v": torch.tensor([[1.0, 2.0], [30.0, 40.0]]), "w": torch.tensor([50.0])}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    down = prune_to(masks, weights, 2, min_active=0, norm_shapes={"v": (2, 1)})
    assert [mask.tolist() for mask in down.values()] == [[[False, True], [False, True]], [False]]
    for num_active in (3, {"v": 2, "w": 1}):
        kept = magnitude_masks(weights, num_active, norm_shapes={"v": (2, 1)})
        assert [mask.tolist() for mask in kept.values()] == [[[False, True], [False, True]], [True]]


def test_a_density_without_a_weight_for_each_norm_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64), weight_norm(nn.Linear(64, 64)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    message = (
        "density: 0.005 leaves 20 weights in 1.weight_v, but weight_norm needs one for each of its 64 norms; do: raise"
    )
    with pytest.raises(ConfigError, match=message):
        Sparsifier(model, optimizer, "static", density=0.005, seed=0)
    assert Sparsifier(model, optimizer, "static", density=0.005, seed=0, dense_layers=["1.*"]).density < 0.0051
    # where there are enough, each of its outputs comes first: 64 of the 82, and the others have 18
    sparsifier = Sparsifier(model, optimizer, "static", density=0.01, seed=0)
    assert [int(mask.sum()) for mask in sparsifier.masks.values()] == [18, 64]
    assert bool(sparsifier.masks["1.weight_v"].any(1).all())


@pytest.mark.parametrize("kind", ["transposed 2d, strided", "weight_norm", "experts of a matrix product"])
def test_a_structure_is_refused_where_inputs_cannot_be_told(kind: str) -> None:
    make, width, _ = KINDS[kind]
    model = Wrapped(make(), width)
    strategy = method("rigl", structure="fan_in", distribution="uniform")
    with pytest.raises(ConfigError, match=r"structure: 'fan_in' does not fit layer\.") as error:
        Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), strategy, density=0.5, seed=0)
    assert error.value.do.startswith("keep these layers dense: dense_layers: [layer.")


def test_a_whole_network_of_experts() -> None:
    """timm's CondConv network: 80% of its weights are experts, which once were dense without a word."""
    import timm

    from pipeline import models

    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_cc_b0_4e", pretrained=False)
    experts = [m for m in model.modules() if type(m).__name__ == "CondConv2d"]
    assert experts and models.image_size("timm/tf_efficientnet_cc_b0_4e") == 224
    weights = sparse_weights(model)
    held = {id(weight) for weight in weights.values()}
    assert all(id(each.weight) in held for each in experts)
    matrices = [p for p in model.parameters() if sum(size > 1 for size in p.shape) > 1]
    assert sum(w.numel() for w in weights.values()) == sum(p.numel() for p in matrices)
    forms = forms_of(model)
    assert sum(form.copies == 4 and form.is_mixed for form in forms.values()) == len(experts)


def test_every_network_of_the_presets_has_the_weights_that_it_had() -> None:
    from pipeline import models

    for name, num_layers, num_weights in (("resnet50", 54, 25_502_912), ("vgg16_bn", 16, 138_344_128)):
        weights = sparse_weights(models.outline(name))
        assert (len(weights), sum(weight.numel() for weight in weights.values())) == (num_layers, num_weights), name
        assert all(form == Form(tuple(weights[each].shape)) for each, form in forms_of(models.outline(name)).items())
    assert set(METHODS) >= {"rigl_itop", "set_itop"}


# -- what stays dense is said


class Own(nn.Module):
    """A matrix of one's own, an embedding, and a layer with norm and bias, beside a small sparse one."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 64))
        self.table = nn.Embedding(4, 64)
        self.orthogonal = parametrizations.orthogonal(nn.Linear(8, 8, bias=False))
        self.pruned = prune.l1_unstructured(nn.Linear(8, 8, bias=False), "weight", 0.5)
        self.frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.norm = nn.LayerNorm(64)
        self.named = nn.Linear(64, 3)
        self.fc = nn.Linear(64, 4, bias=False)


def test_every_dense_weight_is_named_with_its_reason_and_most_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = Own()
    with caplog.at_level("INFO", logger="pipeline.sparse"):
        sparsifier = _static(model, dense_layers=["named.*"])
    assert {weight.name: (weight.num_values, weight.why) for weight in sparsifier.dense.weights} == {
        "matrix": (512, "a parameter of Own"),
        "table.weight": (256, "an embedding"),
        "orthogonal.parametrizations.weight.original": (64, "parametrised by _Orthogonal"),
        "pruned.weight_orig": (64, "under torch.nn.utils.prune"),
        "frozen.weight": (64, "requires no gradient"),
        "named.weight": (192, "named in dense_layers"),
    }
    dense = 512 + 256 + 3 * 64 + 192 + 2 * 64 + 3
    assert sparsifier.density == 0.125 and sparsifier.dense.num_others == 131
    assert sparsifier.network_density == (32 + dense) / (256 + dense)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage() == (
        "32 of 256 weights active in 1 layer; network density 0.8545; 6 weights stay dense (1,152 values): "
        "matrix (a parameter of Own), table.weight (an embedding), "
        "orthogonal.parametrizations.weight.original (parametrised by _Orthogonal) and 3 more"
    )


@pytest.mark.parametrize("network", ["all sparse", "all asked for"])
def test_what_was_asked_for_is_no_warning(network: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4, bias=False))
    with caplog.at_level("INFO", logger="pipeline.sparse"):
        _static(model, dense_layers=["0.*"] if network == "all asked for" else [])
    (record,) = caplog.records
    assert record.levelname == "INFO"
    said = "dense: 64 biases, scales and norms" if network == "all sparse" else "1 weight stays dense (4,096"
    assert said in record.getMessage()


def _static(model: nn.Module, dense_layers: list[str]) -> Sparsifier:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Sparsifier(model, optimizer, "static", density=0.125, seed=0, dense_layers=dense_layers)


def test_products_with_a_matrix_of_ones_own_count_in_full() -> None:
    class Matrix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(8, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.matrix

    assert layer_macs(nn.Sequential(Matrix(), nn.Linear(64, 4)), (8, 1, 1)) == {"0.matrix": 512, "1.weight": 256}
