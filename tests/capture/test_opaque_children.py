"""Modules that go their own way on every call, and the graphs of their children."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.analysis.coverage import coverage_of
from gdnsq_fx.annotations import facts
from gdnsq_fx.capture.capture import capture
from gdnsq_fx.errors import CalibrationWarning, NotQuantizedError
from gdnsq_fx.nested import nested_graphs, path_of
from gdnsq_fx.sites import sites, weight_sites

_CONFIG = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4)


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.fc1(x).relu()))


class Mixture(nn.Module):
    """Each token goes to one expert; experts without a token do not run."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(Expert(width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        share, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero().squeeze(-1)
            made = self.experts[number](tokens[rows]) * share[rows, None]
            out.index_add_(0, rows, made)
        return out.view_as(x)


class Routed(nn.Module):
    """Tokens of the form ``+-e_i`` of the first half of the inputs choose expert i."""

    def __init__(self, width: int = 8, count: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.mixture = Mixture(width, count)
        self.head = nn.Linear(width, 5)
        with torch.no_grad():
            self.mixture.router.weight.zero_()
            self.mixture.router.weight[:, :count] = 3 * torch.eye(count)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.stem(x) + self.mixture(x)).mean(1))


def _tokens(*experts: int, batch: int = 2) -> Tensor:
    """``[batch, len(experts), 8]``: in each sample a token for each of the experts."""
    x = 0.1 * torch.randn(batch, len(experts), 8)
    for place, number in enumerate(experts):
        x[:, place, number] += 2.0
    return x


_ALL = (0, 1, 2, 3)


def _prepared(**options: Any) -> GraphModule:
    return gdnsq_fx.prepare(
        Routed(), _tokens(0, 1), _CONFIG, [_tokens(*_ALL, batch=4)], **options
    )


def test_experts_that_the_example_did_not_hit_run_for_other_tokens(same: Any) -> None:
    others = ((_tokens(2, 3),), (_tokens(*_ALL, batch=5),), (_tokens(1),))
    captured = same(Routed(), _tokens(0, 1), others=others)
    assert list(captured.facts.opaque) == ["mixture"]
    paths = [path_of(graph) for graph in nested_graphs(captured)]
    experts = [f"mixture.experts.{number}" for number in _ALL]
    assert paths == ["mixture.router", *experts]


def test_weights_and_activations_of_every_expert_are_quantized() -> None:
    qmodel = _prepared()
    edges = {site.edge for site in sites(qmodel)}
    for number in _ALL:
        for layer in ("fc1", "fc2"):
            for operand in ("input", "weight"):
                assert f"mixture.experts.{number}.{layer}.{operand}" in edges
    assert {"mixture.router.input", "mixture.router.weight"} <= edges
    found = coverage_of(qmodel)
    assert (found.macs, found.weights, found.skipped) == (1.0, 1.0, ())


def test_macs_are_those_of_the_tokens_that_an_expert_got() -> None:
    qmodel = _prepared()
    graphs = {path_of(graph): graph for graph in nested_graphs(qmodel)}
    macs = {
        path: sum(facts(node).macs for node in graph.graph.nodes)
        for path, graph in graphs.items()
    }
    # Two tokens in each sample: one for expert 0, one for expert 1.
    assert macs["mixture.router"] == 2 * 8 * 4
    assert macs["mixture.experts.0"] == 2 * 8 * 16
    assert macs["mixture.experts.2"] == 0


@pytest.mark.parametrize("training", [False, True])
def test_at_identity_precision_it_is_the_model(agree: Any, training: bool) -> None:
    model = Routed()
    x = _tokens(0, 1)
    qmodel = gdnsq_fx.prepare(model, x, _CONFIG, [_tokens(*_ALL, batch=4)])
    for parameter in (p for site in sites(qmodel) for p in site.quantizer.parameters()):
        parameter.requires_grad_(False)
    for other in (x, _tokens(2, 3), _tokens(*_ALL, batch=3)):
        model.train(training)
        qmodel.train(training)
        torch.manual_seed(1)
        wanted = model(other)
        with gdnsq_fx.quantization_disabled(qmodel):
            torch.manual_seed(1)
            got = qmodel(other)
        torch.testing.assert_close(got, wanted)
        model.zero_grad()
        qmodel.zero_grad()
        wanted.square().sum().backward()
        got.square().sum().backward()
        mine = dict(qmodel.named_parameters())
        for name, parameter in model.named_parameters():
            theirs, ours = parameter.grad, mine[name].grad
            assert (theirs is None) == (ours is None), name
            if theirs is not None:
                torch.testing.assert_close(ours, theirs)


def test_every_key_of_the_state_is_kept() -> None:
    model, qmodel = Routed(), _prepared()
    kept = [key for key in qmodel.state_dict() if "quantizers" not in key.split(".")]
    assert kept == list(model.state_dict())
    model.load_state_dict({key: qmodel.state_dict()[key] for key in kept})
    qmodel.load_state_dict({**qmodel.state_dict(), **model.state_dict()})


def test_inplace_shares_weights_and_leaves_the_modules_of_the_user() -> None:
    model = Routed().eval()
    model.mixture.experts[2].train()
    before = {path: (id(m), m.training) for path, m in model.named_modules()}
    attributes = {path: dict(vars(m)) for path, m in model.named_modules()}
    children = {path: dict(m.named_children()) for path, m in model.named_modules()}
    qmodel = gdnsq_fx.prepare(
        model, _tokens(0, 1), _CONFIG, [_tokens(*_ALL)], inplace=True
    )
    assert {p: (id(m), m.training) for p, m in model.named_modules()} == before
    for path, module in model.named_modules():
        assert vars(module).keys() == attributes[path].keys(), path
        assert dict(module.named_children()) == children[path], path
        assert not module._forward_pre_hooks
    mine = dict(qmodel.named_parameters())
    assert all(mine[name] is p for name, p in model.named_parameters())


def test_converted_saved_and_loaded_are_the_prepared_model(tmp_path: Path) -> None:
    qmodel = _prepared().eval()
    imodel = gdnsq_fx.convert(qmodel)
    file = str(tmp_path / "model.safetensors")
    gdnsq_fx.save(imodel, file)
    # With these weights the first expert gets every token of the example.
    other = Routed()
    with torch.no_grad():
        other.mixture.router.weight.zero_()
        other.mixture.router.bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    loaded = gdnsq_fx.load(file, other, _tokens(0, 1))
    for x in (_tokens(0, 1), _tokens(2, 3), _tokens(*_ALL, batch=5)):
        assert torch.equal(imodel(x), qmodel(x))
        assert torch.equal(loaded(x), qmodel(x))
    names = [name for name, _ in imodel.named_parameters()]
    assert not [name for name in names if name.endswith("weight")]
    assert "mixture.experts.3.quantizers.fc1_weight.codes" in imodel.state_dict()


def test_a_file_can_be_loaded_where_the_weights_show_no_choice(tmp_path: Path) -> None:
    qmodel = _prepared().eval()
    file = str(tmp_path / "model.safetensors")
    gdnsq_fx.save(gdnsq_fx.convert(qmodel), file)
    loaded = gdnsq_fx.load(file, Routed(), _tokens(*_ALL))
    x = _tokens(2, 0)
    assert torch.equal(loaded(x), qmodel(x))


def test_copies_and_pickles_are_the_model() -> None:
    qmodel = _prepared().eval()
    x = _tokens(*_ALL, batch=3)
    for twin in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert [s.edge for s in sites(twin)] == [s.edge for s in sites(qmodel)]
        assert torch.equal(twin(x), qmodel(x))


def test_strict_has_nothing_to_refuse_where_all_inside_is_quantized() -> None:
    strict = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4, strict=True)
    qmodel = gdnsq_fx.prepare(Routed(), _tokens(0, 1), strict, [_tokens(*_ALL)])
    assert len(weight_sites(qmodel)) == 11


def test_patterns_reach_the_layers_inside() -> None:
    config = gdnsq_fx.QuantConfig(
        weight_bits=4,
        act_bits=4,
        exclude=("mixture.router",),
        overrides={"mixture.experts.*": {"weight_bits": 2}},
    )
    qmodel = gdnsq_fx.prepare(Routed(), _tokens(0, 1), config, [_tokens(*_ALL)])
    bits = {site.edge: site.quantizer.spec.bits for site in weight_sites(qmodel)}
    assert bits["mixture.experts.3.fc2.weight"] == 2 and bits["stem.weight"] == 4
    assert "mixture.router.weight" not in bits


def test_analysis_and_fine_tuning_reach_the_edges_inside() -> None:
    qmodel = _prepared()
    batches = [_tokens(*_ALL, batch=4) for _ in range(3)]
    report = gdnsq_fx.analyze(qmodel, batches, confirm=1)
    found = {edge.name: edge for edge in report.edges}
    for name in ("experts.1.fc1.weight", "experts.3.fc2.input"):
        assert found[f"mixture.{name}"].predicted_divergence > 0.0
    before = [site.weight().detach().clone() for site in weight_sites(qmodel)]
    result = gdnsq_fx.finetune(qmodel, batches, steps=5, progress=False)
    assert result.budget_met and result.bits.keys() == found.keys()
    after = [site.weight() for site in weight_sites(qmodel)]
    assert not any(map(torch.equal, before, after))


def test_the_predicted_divergence_inside_is_that_measured() -> None:
    config = gdnsq_fx.QuantConfig(weight_bits=6, act_bits=6)
    batches = [_tokens(*_ALL, batch=16) for _ in range(4)]
    qmodel = gdnsq_fx.prepare(Routed().eval(), _tokens(0, 1), config, batches)
    report = gdnsq_fx.analyze(qmodel, batches, draws=16, confirm=99)
    inside = [e for e in report.edges if ".experts." in e.name]
    assert len(inside) == 16
    ratios = [e.predicted_divergence / (e.measured_divergence or 1e-30) for e in inside]
    assert 0.7 < torch.tensor(ratios).median() < 1.4


def test_an_expert_that_calibration_misses_has_levels_of_the_others() -> None:
    with pytest.warns(CalibrationWarning, match=r"experts\.2\.fc1\.input from the oth"):
        qmodel = gdnsq_fx.prepare(Routed(), _tokens(0, 1), _CONFIG, [_tokens(0, 3)])
    steps = {s.edge: s.quantizer.step for s in sites(qmodel)}
    assert steps["mixture.experts.2.fc1.input"].isfinite()
    observed = [
        qmodel.get_buffer(f"mixture.experts.{n}.quantizers.fc1_input.observed")
        for n in (0, 3, 2)
    ]
    low, high = (torch.stack(observed[:2])[:, side] for side in (0, 1))
    assert torch.equal(observed[2], torch.stack([low.min(), high.max()]))
    with pytest.warns(CalibrationWarning, match=r"experts\.1\.fc1\.input from the exa"):
        gdnsq_fx.prepare(Routed(), _tokens(0, 1), _CONFIG, [_tokens(0, 2, 3)])


class Exits(nn.Module):
    """Runs its layer again until the output is small: how often depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(0.5 * torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 1.0:
            x = self.layer(x)
        return x


def test_a_loop_over_data_becomes_opaque_where_other_values_show_it() -> None:
    x = torch.tensor([[9.0, 0, 0, 0], [1.5, 0, 0, 0]])
    model = nn.Sequential(nn.Linear(4, 4), Exits()).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
    captured = capture(model, (x,), {})
    assert "makes other calls" in captured.facts.opaque["1"]
    for scale in (0.1, 1.0, 7.0):
        torch.testing.assert_close(captured(scale * x), model(scale * x))


class Checks(nn.Module):
    """Reads data, and always goes one way."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x).any():
            raise ValueError("NaN")
        return self.fc(x)


def test_a_module_that_only_checks_data_is_looked_into(same: Any) -> None:
    captured = same(nn.Sequential(nn.Linear(4, 4), Checks()), torch.randn(3, 4))
    assert captured.facts.real and not captured.facts.opaque


class Looks(nn.Module):
    """Cannot be looked into, and looks into one of its layers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x.data = x.data * self.second.in_features
        return self.second(self.first(x).to(self.first.weight.dtype))


def test_a_child_that_is_looked_into_stays_as_it_is_with_a_reason(same: Any) -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), Looks())
    captured = same(model, x)
    assert [path_of(graph) for graph in nested_graphs(captured)] == ["1.second"]
    qmodel = gdnsq_fx.prepare(model, x, _CONFIG, [x])
    (skip,) = coverage_of(qmodel).skipped
    assert skip.name == "1" and "1.first is looked into from outside" in skip.reason
    assert coverage_of(qmodel).macs == pytest.approx(2 / 3)
    assert torch.equal(gdnsq_fx.convert(qmodel)(x), qmodel.eval()(x))
    with pytest.raises(NotQuantizedError, match="looked into from outside"):
        strict = gdnsq_fx.QuantConfig(strict=True)
        gdnsq_fx.prepare(model, x, strict, [x])


class Chooses(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.positive, self.negative = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.positive(x) if x.mean() > 0 else self.negative(x)


class Unlike(Chooses):
    """Its branches are of two classes, so that neither can stand for the other."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Linear(4, 4))
        self.negative = nn.Sequential(nn.Linear(4, 4))


def test_opaque_modules_inside_opaque_modules() -> None:
    model = nn.Sequential(Chooses(lambda: Chooses(lambda: nn.Linear(4, 4)))).eval()
    x = torch.rand(3, 4)
    captured = capture(model, (x,), {})
    for value in (x, -x, x - 0.5):
        torch.testing.assert_close(captured(value), model(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        qmodel = gdnsq_fx.prepare(model, x, _CONFIG, [x]).eval()
    edges = {site.edge for site in weight_sites(qmodel)}
    assert edges == {
        f"0.{outer}.{inner}.weight"
        for outer in ("positive", "negative")
        for inner in ("positive", "negative")
    }
    imodel = gdnsq_fx.convert(qmodel)
    for value in (x, -x, x - 0.5):
        assert torch.equal(imodel(value), qmodel(value))


def test_what_the_example_cannot_reach_stays_with_a_reason() -> None:
    model = nn.Sequential(Unlike()).eval()
    x = torch.rand(3, 4)
    # The first sample repeated has a negative mean, so that the branch is seen.
    x[0] -= 0.9
    captured = capture(model, (x,), {})
    assert list(captured.facts.left) == ["0.negative.0"]
    assert "the example runs neither" in captured.facts.left["0.negative.0"]
    for value in (x, -x):
        torch.testing.assert_close(captured(value), model(value))


class _Scores(nn.Module):
    """Multiplies, and has no parameters that tell its precision."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1)


class _Attends(nn.Module):
    """Cannot be looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = _Scores()

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x.data = 2 * x.data
        return self.scores(x, x) @ x


def test_a_child_without_parameters_computes_in_the_precision_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), _Attends()).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    qmodel = gdnsq_fx.prepare(model, x, _CONFIG, [x]).eval()
    assert {"1.scores.matmul.input", "1.scores.matmul.other"} < {
        site.edge for site in sites(qmodel)
    }
    imodel = gdnsq_fx.convert(qmodel)
    assert torch.equal(imodel(x), qmodel(x)) and imodel(x).dtype is torch.float64
    # What the opaque module multiplies itself stays in floating point, with a reason.
    (skip,) = coverage_of(qmodel).skipped
    assert skip.name == "1" and "cannot be looked into" in skip.reason
    assert coverage_of(qmodel).macs == pytest.approx((48 + 36) / (48 + 36 + 36))


def test_tied_weights_stay_tied() -> None:
    model = Routed()
    model.mixture.experts[1].fc1.weight = model.mixture.experts[0].fc1.weight
    captured = capture(model, (_tokens(0, 1),), {})
    one, other = (
        captured.get_parameter(f"mixture.experts.{number}.fc1.weight")
        for number in (0, 1)
    )
    assert one is other
