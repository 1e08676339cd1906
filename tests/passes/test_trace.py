"""Tracing: what must come out, what must stay as it was, and what must be said when it fails."""

from __future__ import annotations

import copy
import operator
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

import fxzip
from fxzip.errors import CalibrationError, TraceError
from fxzip.passes.trace import trace

IMAGES = torch.randn(2, 3, 32, 32)
ROWS = torch.randn(2, 8)


class Wrapped(nn.Module):
    """A linear layer, and then a function of its output and its input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.fc(x), x)


def targets(graph_module: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph_module.graph.nodes]


# ---- what comes out


@pytest.mark.parametrize(
    "build",
    [
        torchvision.models.resnet18,
        torchvision.models.shufflenet_v2_x0_5,
        lambda: torchvision.models.DenseNet(8, (2, 2, 2, 2), 16),
        lambda: torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [7, 7]),
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32),
    ],
)
def test_torchvision(build: Any) -> None:
    graph_module = trace(build(), (IMAGES,))
    assert graph_module.meta["traced_by"] == "symbolic"
    assert graph_module.meta["unused"] == ()
    assert not graph_module.training


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet_gn"])
def test_timm(name: str) -> None:
    graph_module = trace(timm.create_model(name), (torch.randn(2, 3, 160, 160),))
    assert graph_module.meta["traced_by"] == "symbolic"
    assert graph_module.meta["unused"] == ()


def test_any_batch_size_and_the_models_own_names() -> None:
    model = torchvision.models.resnet18(num_classes=4).eval()
    graph_module = trace(model, (IMAGES[:1],))
    for size in (1, 5):
        x = torch.randn(size, 3, 32, 32)
        assert torch.allclose(graph_module(x), model(x), atol=1e-5)
    assert graph_module.state_dict().keys() == model.state_dict().keys()
    conv = next(node for node in graph_module.graph.nodes if node.target == "layer1.0.conv1")
    assert conv.meta["val"].shape[1:] == (64, 8, 8)
    assert "layer1.0" in conv.meta["nn_module_stack"]


def test_parameters_are_copies() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    graph_module = trace(model, (ROWS,))
    for name, parameter in graph_module.named_parameters():
        assert parameter.data_ptr() != model.get_parameter(name).data_ptr()


@pytest.mark.parametrize(
    "function",
    [
        lambda y, x: y.view(x.shape[0], 2, -1).flatten(1),
        lambda y, x: y.reshape(x.shape[0] * 2, 4).reshape(x.shape[0], -1) if y.shape[1] == 8 else y,
        lambda y, x: torch.cat([part * len(part.shape) for part in y.chunk(2, 1)], 1),
        lambda y, x: torch.stack([column * index for index, column in enumerate(y.unbind(1))], 1),
        lambda y, x: y + torch.arange(y.shape[1], device=x.device, dtype=x.dtype),
        lambda y, x: torch.zeros(x.shape[0], 1, device=y.device).expand(-1, y.size(1)) + y,
        lambda y, x: (1 - y) / (2 + y * y) if isinstance(y, Tensor) and torch.is_tensor(x) else y,
        lambda y, x: y.relu_() if x.dtype.is_floating_point and not x.requires_grad else y,
        lambda y, x: torch.max(y, dim=1).values + y.T.sum(0),
        lambda y, x: y.new_ones((2 * x.shape[0], 3))[: x.shape[0]].sum(1) + y[:, 0] + y[..., -1],
        lambda y, x: F.dropout(y, 0.5, training=False) + y.mean(),
        lambda y, x: y / x.shape[0] + x.shape[0] ** 0.5,
        lambda y, x: torch.einsum("bi,bj->bij", y, x).softmax(-1),
        lambda y, x: F.pad(y, (1, 1))[:, 1:-1].contiguous().to(x.dtype),
    ],
)
def test_python_of_shapes_and_types(function: Any) -> None:
    model = Wrapped(function).eval()
    graph_module = trace(model, (ROWS,))
    assert graph_module.meta["traced_by"] == "symbolic"
    for size in (1, 2, 7):
        x = torch.randn(size, 8)
        assert torch.allclose(graph_module(x), model(x), atol=1e-6)


def test_work_in_place_is_made_plain() -> None:
    def in_place(y: Tensor, x: Tensor) -> Tensor:
        y += 1
        head = y[:, :2]
        head.mul_(3)  # a view: y must see it
        y[:, 4] = x[:, 0]
        return y.clamp_(min=0)

    model = Wrapped(in_place).eval()
    graph_module = trace(model, (ROWS,))
    x = torch.randn(3, 8)
    before = x.clone()
    assert torch.equal(graph_module(x), model(x))
    assert torch.equal(x, before)
    assert operator.add in targets(graph_module)
    assert torch.select_scatter in targets(graph_module)
    assert torch.slice_scatter in targets(graph_module)


def test_in_place_activations_become_plain_ones() -> None:
    graph_module = trace(torchvision.models.resnet18(), (IMAGES,))
    assert not any(getattr(module, "inplace", False) for module in graph_module.modules())
    assert any(getattr(module, "inplace", False) for module in torchvision.models.resnet18().modules())


def test_dropout_and_identity_vanish() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Identity(), nn.Linear(8, 8))
    assert targets(trace(model, (ROWS,))) == ["input", "0", "3", "output"]


def test_own_modules_are_looked_into_and_attention_too() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.gain = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.attention(x, x, x, need_weights=False)[0]) * self.gain  # type: ignore[no-any-return]

    graph_module = trace(Attention(), (torch.randn(2, 5, 8),))
    found = targets(graph_module)
    assert {"attention.in_proj_weight", "layer.linear1", "gain", "layer.self_attn.out_proj.weight"} <= set(found)
    assert F.scaled_dot_product_attention in found
    assert F.multi_head_attention_forward not in found


def test_parametrised_and_normalised_weights_are_computed_in_the_graph() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.utils.weight_norm(nn.Linear(8, 8)),
    )
    graph_module = trace(model, (ROWS,))
    assert {"0.parametrizations.weight.original0", "1.weight_g"} <= set(targets(graph_module))
    assert graph_module.meta["unused"] == ()


class Cached(nn.Module):
    """As LeViT does: what eval mode makes of a parameter is kept for the next run."""

    def __init__(self, clears: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("index", torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]), persistent=False)
        self.clears = clears
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Cached:
        if mode and self.clears:
            self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.fc(x) + self.bias[self.index]  # type: ignore[no-any-return, index]
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias[self.index]  # type: ignore[index]
        return self.fc(x) + self.cache["bias"]  # type: ignore[no-any-return]


def test_a_parameter_that_the_model_caches_stays_a_parameter() -> None:
    model = Cached().eval()
    with torch.no_grad():
        model(ROWS)
    kept = model.cache["bias"]
    graph_module = trace(model, (ROWS,))
    assert graph_module.meta["unused"] == ()
    assert "bias" in targets(graph_module)
    assert model.cache == {"bias": kept}
    assert "index" not in graph_module.state_dict()


def test_a_permuted_copy_does_not_keep_what_was_cached() -> None:
    model = nn.Sequential(Cached(), nn.Linear(8, 3)).double().eval()
    with torch.no_grad():
        expected = model(ROWS.double())
        spec = fxzip.analyse(model, ROWS.double())
        moved = spec.permute(model, torch.Generator().manual_seed(1))
        assert not torch.equal(moved.get_parameter("0.bias"), model.get_parameter("0.bias"))
        assert (moved(ROWS.double()) - expected).abs().max() < 1e-12
    assert model[0].cache


def test_a_cache_that_cannot_be_cleared_is_said() -> None:
    model = Cached(clears=False).eval()
    with torch.no_grad():
        model(ROWS)
    with pytest.warns(UserWarning, match="never uses bias"):
        trace(model, (ROWS,))


def test_unused_parameters_are_listed() -> None:
    model = Wrapped(lambda y, _: y)
    model.extra = nn.Linear(2, 2)
    assert trace(model, (ROWS,)).meta["unused"] == ("extra.weight", "extra.bias")


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))  # type: ignore[no-any-return]

    graph_module = trace(Tied(), (torch.randint(10, (2, 5)),))
    assert graph_module.head.weight is graph_module.embed.weight
    assert graph_module.meta["unused"] == ()


@pytest.mark.parametrize("name", ["rows", "keywords"])
def test_export_is_the_second_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> fx.GraphModule:
        raise NotImplementedError("not today")

    monkeypatch.setattr(sys.modules["fxzip.passes.trace.trace"], "_by_recording", fails)
    model = (Wrapped(lambda y, x: y.view(x.shape[0], 2, 4) + 1) if name == "rows" else Keywords()).eval()
    args, kwargs = ((ROWS,), {}) if name == "rows" else ((), {"x": ROWS, "mask": torch.rand(2, 1)})
    graph_module = trace(model, args, kwargs)
    assert graph_module.meta["traced_by"] == "export"
    assert next(iter(graph_module.graph.nodes)).op == "placeholder"  # cuts count from the inputs
    assert graph_module.meta["passed_over"] == ("symbolic: not today",)
    assert graph_module.state_dict().keys() == model.state_dict().keys()
    if name == "rows":
        x = torch.randn(5, 8)
        assert torch.allclose(graph_module(x), model(x), atol=1e-6)
    else:
        assert torch.allclose(graph_module(**kwargs)["first"], model(**kwargs)["first"], atol=1e-6)


# ---- what surrounds a model


def hooked(change: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    change(model)
    return model


def compile_forward(model: nn.Module) -> None:
    model.forward = torch.compile(model.forward)


def equalise(model: nn.Module) -> None:
    """Learning rates made equal by a hook that makes the weight, a plain tensor, which is not there before a run."""
    weight = model[0].weight
    del model[0].weight
    model[0].register_parameter("weight_orig", nn.Parameter(weight.detach()))  # type: ignore[operator]
    model[0].register_forward_pre_hook(lambda part, _: setattr(part, "weight", part.weight_orig * 0.5))


def compile_part(model: nn.Module) -> None:
    model[2] = torch.compile(model[2])  # type: ignore[index, operator]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.register_forward_pre_hook(lambda _, args: ((args[0] - 0.5) / 0.25,)),
        lambda m: m[0].register_forward_hook(lambda _, args, out: out * 2),
        lambda m: m[2].register_forward_hook(
            lambda _, args, kwargs, out: out + args[0].sum(), with_kwargs=True, always_call=True
        ),
        lambda m: m[0].register_forward_pre_hook(lambda part, _: part.weight.data.clamp_(-0.1, 0.1) is None or None),
        lambda m: nn.utils.spectral_norm(m[0]),
        equalise,
        compile_forward,
        compile_part,
    ],
)
def test_what_surrounds_a_model_is_part_of_it(change: Any) -> None:
    model = hooked(change)
    before = copy.deepcopy(model.state_dict())
    graph_module = trace(model, (ROWS,))
    assert graph_module.meta["traced_by"] == "symbolic"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    actual = graph_module(ROWS)
    torch._dynamo.reset()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.allclose(actual, model(ROWS), atol=1e-6)


def test_a_hook_that_only_watches_leaves_no_trace_and_sees_nothing() -> None:
    seen: list[Any] = []
    model = hooked(lambda m: m[0].register_forward_hook(lambda *args: seen.append(args[2].numpy())))
    with pytest.warns(UserWarning, match="hooks only watch"):
        graph_module = trace(model, (ROWS,))
    assert targets(graph_module) == ["input", "0", "1", "2", "output"]
    assert not seen


def test_a_hook_that_cannot_be_followed_is_named() -> None:
    model = hooked(lambda m: m[0].register_forward_hook(lambda _, args, out: out * float(out.sum())))
    with pytest.raises(TraceError, match=r"hooks cannot be followed: .*<lambda> of 0"):
        trace(model, (ROWS,))


def test_autocast_inside_forward_is_followed() -> None:
    def cast(y: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (y @ x.T).float().relu()

    graph_module = trace(Wrapped(cast), (ROWS,))
    assert graph_module.meta["traced_by"] == "symbolic"
    assert "to" in targets(graph_module)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_layers_are_covered_as_plain_ones_are(name: str) -> None:
    wrap = getattr(nn.utils.parametrizations, name)
    plain, model = hooked(lambda m: None), hooked(lambda m: (wrap(m[0]), wrap(m[2])))
    assert fxzip.analyse(model, ROWS).coverage == fxzip.analyse(plain, ROWS).coverage > 0


def test_an_exported_graph_takes_its_inputs_first() -> None:
    exported = torch.export.export(hooked(lambda m: None), (ROWS,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    graph_module = trace(exported.module(), (ROWS,))
    assert graph_module.meta["traced_by"] == "given"
    assert next(iter(graph_module.graph.nodes)).op == "placeholder"


# ---- inputs and outputs


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None, **rest: Tensor) -> Any:
        y = self.fc(x) * scale
        if mask is not None:
            y = y * mask
        return OrderedDict(first=y, second=[y + 1, (rest["bias"] if rest else y)])


def test_dict_inputs_and_outputs() -> None:
    model = Keywords().eval()
    kwargs = {"mask": torch.rand(2, 1), "x": ROWS, "bias": torch.randn(2, 4)}
    graph_module = trace(model, (), kwargs)
    expected, actual = model(**kwargs), graph_module(**kwargs)
    assert list(actual) == ["first", "second"]
    assert torch.allclose(actual["first"], expected["first"])
    assert torch.equal(actual["second"][1], kwargs["bias"])


def test_several_and_plain_inputs() -> None:
    model = Keywords().eval()
    graph_module = trace(model, (ROWS, 2.0))
    assert torch.allclose(graph_module(ROWS, 2.0)["first"], model(ROWS, 2.0)["first"])


def test_nested_inputs_and_a_dataclass_as_output() -> None:
    @dataclass
    class Result:
        logits: Tensor

    class Nested(nn.Module):
        def forward(self, pair: list[Tensor]) -> Result:
            return Result(pair[0] + pair[1])

    graph_module = trace(Nested(), ([ROWS, ROWS],))
    assert torch.equal(graph_module([ROWS, ROWS])["logits"], ROWS + ROWS)


def test_a_graph_module_is_used_as_it_is() -> None:
    given = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.ReLU()))
    nodes = len(given.graph.nodes)
    graph_module = trace(given, (ROWS,))
    assert graph_module.meta["traced_by"] == "given"
    assert len(graph_module.graph.nodes) == nodes - 1 == len(given.graph.nodes) - 1
    assert given.training


def test_a_graph_module_with_opaque_parts_is_traced_again() -> None:
    class Opaque(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Wrapped)

    model = nn.Sequential(Wrapped(lambda y, _: y), nn.ReLU())
    graph_module = trace(fx.GraphModule(model, Opaque().trace(model)), (ROWS,))
    assert graph_module.meta["traced_by"] == "symbolic"
    assert "0.fc" in targets(graph_module)


def test_wrappers_are_taken_off() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert "0" in targets(trace(wrapped, (ROWS,)))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_memory_formats(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(dtype).to(memory_format=torch.channels_last)
    x = IMAGES.to(dtype).to(memory_format=torch.channels_last)
    assert trace(model, (x,))(x).dtype == dtype


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    graph_module = trace(model, (IMAGES,))
    assert graph_module.conv1.weight.is_meta


# ---- what stays as it was


def test_the_users_model_is_as_it_was() -> None:
    model = Cached()
    model.fc.eval()  # a mixed mode must come back as it was
    seen: list[Any] = []
    model.fc.register_forward_hook(lambda *_: seen.append(1))
    before = copy.deepcopy(model.state_dict())
    attributes = {key: value for key, value in model.__dict__.items() if not key.startswith("_")}
    trace(model, (ROWS,))
    with pytest.raises(TraceError):
        trace(model, (torch.randn(2, 3),))
    assert model.training
    assert not model.fc.training
    assert model.cache == {}
    assert not seen
    assert len(model.fc._forward_hooks) == 1
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert attributes == {key: value for key, value in model.__dict__.items() if not key.startswith("_")}
    assert "forward" not in model.fc.__dict__


# ---- what is said


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        if y.sum() > 0:  # the line to be named
            return -y
        return y


def test_control_flow_on_values_names_the_line() -> None:
    with pytest.raises(TraceError, match=r"test_trace\.py:\d+, in forward \(if y\.sum\(\) > 0:") as caught:
        trace(Deciding(), (ROWS,))
    assert "torch.where" in str(caught.value)


def test_a_loop_over_the_samples_is_refused() -> None:
    model = Wrapped(lambda y, _: torch.stack([row * index for index, row in enumerate(y)]))
    with pytest.raises(TraceError, match="batch"):
        trace(model, (ROWS,))


def test_an_input_that_the_model_cannot_take() -> None:
    with pytest.raises(TraceError, match=r"itself fails on the example input \(float32\[2, 3\]\)"):
        trace(nn.Linear(8, 8), (torch.randn(2, 3),))
    with pytest.raises(CalibrationError, match="batch axis"):
        trace(nn.Linear(8, 8), ())


def test_a_graph_that_computes_something_else_is_refused() -> None:
    calls: list[int] = []

    def fickle(y: Tensor, _: Tensor) -> Tensor:
        calls.append(1)
        return y * len(calls)

    with pytest.raises(TraceError, match="something else than the model: output differs by"):
        trace(Wrapped(fickle), (ROWS,))


class Cache:
    """What a language model gives beside its logits: an object of its own, with tensors in it."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Caching(nn.Module):
    """A layer and a cache, by name or by place."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.layer, self.by_name = nn.Linear(3, 3), by_name

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return {"logits": y, "cache": Cache(y)} if self.by_name else (y, Cache(y))


def test_an_output_that_no_graph_can_give_is_left_out_where_it_has_a_name() -> None:
    x = torch.randn(2, 3)
    with pytest.warns(UserWarning, match="the output 'cache' is a Cache, which a graph cannot give"):
        graph = trace(Caching(by_name=True), (x,))
    assert list(graph(x)) == ["logits"]
    with pytest.raises(TraceError):
        trace(Caching(by_name=False), (x,))
