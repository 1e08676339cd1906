"""Kinds of networks that the fuzzer found wrong, or that raised errors of PyTorch, each as small as could be."""

import warnings
from random import Random

import pytest
import torch
from torch import Generator, Tensor

import fxzip
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.permute import permute, random_permutations
from fxzip.passes.refit import RefitOptions
from fxzip.passes.trace import trace
from tests.fuzz.oracles import Check, merge_by_true_maps, prepared_of, true_maps
from tests.fuzz.outcome import Outcome
from tests.fuzz.program import Program, build, inputs_of, off, run


@torch.library.custom_op("fuzz::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


PERMUTED = {
    "tokens under a causal mask": """
        x: (3, 4, 4)
        m.a = nn.Conv2d(3, 6, 1)
        m.b = nn.Linear(16, 8)
        v0 = m.b(F.softplus(m.a(x)).flatten(2)).unsqueeze(1)
        v1 = F.scaled_dot_product_attention(v0, v0, v0, is_causal=True)
        return v1.mean(2).flatten(1)
    """,
    "constants in some channels that meet learned positions": """
        x: (4, 3, 3)
        m.a = nn.Conv2d(4, 11, 3, padding=1)
        m.b = nn.Parameter(torch.randn(1, 1, 9))
        m.c = nn.Linear(99, 4)
        v0 = F.celu(m.a(x)).flatten(2)
        v1 = torch.ones_like(v0)
        v1[:, :4, :-1] = v0[:, :4, 1:]
        return m.c((v1 + m.b).flatten(1))
    """,
    "a token beside others that are kept in place": """
        x: (3, 4)
        m.a = nn.Parameter(torch.randn(1, 1, 4))
        return torch.cat([m.a.expand(x.shape[0], -1, -1), x], 1).mean(1)
    """,
    "a mean over tokens, half of which have their channels in reverse": """
        x: (4, 3)
        m.a = nn.Parameter(torch.randn(10, 3))
        m.b = nn.Linear(10, 2)
        v0, v1 = F.linear(x, m.a).split([2, 2], 1)
        return m.b(torch.cat([v0.flip(2), v1], 1).mean(1))
    """,
    "a mean over tokens, the channels of each moved by another number": """
        x: (4, 3)
        m.a = nn.Linear(3, 4)
        m.b = nn.Linear(4, 2)
        v0 = m.a(x)
        return m.b(torch.stack([v0[:, t].roll(t, 1) for t in range(4)], 1).amax(1))
    """,
    "groups that read the same channel at other places": """
        x: (3, 3, 4)
        m.a = nn.Conv2d(3, 3, 1)
        m.b = nn.Parameter(torch.randn(1, 1, 3))
        m.c = nn.Conv1d(5, 10, 1, groups=5)
        m.d = nn.Linear(3, 4)
        v0 = m.a(x).flatten(2).mT[:, :4]
        v1 = torch.cat([m.b.expand(x.shape[0], -1, -1), v0], 1)
        return m.d(m.c(v1).sigmoid().mean(1))
    """,
    "constants in groups of a norm": """
        x: (6,)
        m.a = nn.Linear(6, 10)
        m.b = nn.GroupNorm(2, 10, affine=False)
        m.c = nn.Linear(10, 4)
        v0 = m.a(x).sigmoid()
        v1 = torch.zeros_like(v0)
        v1[:, :4] = v0[:, :4]
        return m.c(m.b(v1))
    """,
    "constants in groups of a norm with weights": """
        x: (6,)
        m.a = nn.Linear(6, 10)
        m.b = nn.GroupNorm(2, 10)
        m.c = nn.Linear(10, 4)
        v0 = m.a(x).sigmoid()
        v1 = torch.zeros_like(v0)
        v1[:, :4] = v0[:, :4]
        return m.c(m.b(v1))
    """,
    "a product of a value and of another function of it": """
        x: (3, 6, 6)
        m.a = nn.Conv2d(3, 3, 1)
        m.b = nn.Linear(9, 4)
        v0 = m.a(x).flatten(2)
        return m.b((v0 @ F.relu(v0).mT).flatten(1))
    """,
    "a product of the copies of channels": """
        x: (3, 6, 6)
        m.a = nn.Conv2d(3, 6, 1)
        m.b = nn.Linear(36, 4)
        v0 = m.a(x).flatten(2)
        v1 = torch.cat([v0[:, :3], v0[:, :3] + v0[:, 3:]], 1)
        return m.b((v1 @ v1.mT).flatten(1))
    """,
    "a product over tokens of a value with itself, and its transpose": """
        x: (7,)
        m.a = nn.Linear(7, 8)
        m.b = nn.Linear(4, 5)
        m.c = nn.Linear(5, 3)
        v0 = m.a(x).unflatten(1, (2, 4))
        v1 = v0.flip(2).mT @ v0[..., [2, 3, 0, 1]]
        v2 = v1 + v1.mT.sigmoid()
        return m.c(m.b(v2).tanh().mean(1))
    """,
    "groups that read copies of channels in another order": """
        x: (4, 6)
        m.a = nn.Conv1d(4, 5, 1)
        m.b = nn.Conv1d(5, 10, 1, groups=5)
        m.c = nn.Linear(5, 3)
        m.d = nn.Linear(10, 4)
        v0 = torch.cat(m.a(x).tanh().chunk(2, 1)[::-1], 1)
        v1 = v0[:, [0, 2, 1, 4, 3]]
        return m.c(torch.addcmul(v1, v1, v0).mean(2)), m.d(m.b(v1).sigmoid().mean(2))
    """,
}
MERGED = {
    "tokens and channels on one axis": """
        x: (3, 4, 4)
        m.a = nn.Conv2d(3, 5, 1)
        m.b = nn.Linear(16, 8)
        m.c = nn.Linear(2, 7)
        m.d = nn.Linear(7, 3)
        v0 = m.b(m.a(x).flatten(2)).unflatten(-1, (2, -1)).transpose(1, 2)
        v1 = m.c(v0.flatten(2).mT).mT.unflatten(2, (5, -1))
        return m.d(v1.amax((2, 3)))
    """,
    "groups of which some channels are kept in place": """
        x: (5, 6)
        m.a = nn.Conv1d(5, 4, 1)
        m.b = nn.ConvTranspose1d(4, 12, 1, groups=4)
        m.c = nn.Linear(6, 3)
        v0 = m.b(m.a(x) * torch.linspace(0.5, 1, 4, dtype=x.dtype)[:, None])
        v0[:, ::2] += 0.5
        return m.c(v0.mean(1))
    """,
    "heads that are folded into the batch": """
        x: (3, 4, 4)
        m.a = nn.Conv2d(3, 5, 3, padding=1)
        m.b = nn.MultiheadAttention(16, 16, batch_first=True)
        v0 = m.a(x).flatten(2)
        return m.b(v0, v0, v0)[0]
    """,
    "parts that hold one copy of some channels and another of others": """
        x: (3, 3, 4)
        m.a = nn.Conv2d(3, 6, 1)
        m.b = nn.Conv1d(6, 6, 1)
        m.c = nn.Linear(6, 3)
        v0 = m.a(x).flatten(2).mT
        v1 = torch.cat(v0.chunk(2, 2)[::-1], 2)
        v2 = torch.stack([v0[..., ::2], v0[..., 1::2]], 3).flatten(2)
        v3 = v1.sum(1)[:, :, None] * v2.mean(1)[:, None]
        v4 = v3 + v3.mT.sigmoid()
        return m.c(m.b(v4).tanh().mean(2))
    """,
}

SELECTED = {
    "tokens and channels that are kept from different models": """
        x: (6, 5)
        m.a = nn.Linear(5, 8)
        m.b = nn.Parameter(torch.randn(1, 2, 8))
        m.c = nn.Linear(8, 8)
        m.d = nn.Linear(8, 3)
        v0 = m.a(x).sigmoid()
        v1 = torch.cat([m.b.expand(v0.shape[0], -1, -1), v0], 1)
        return m.d(m.c(v1).sigmoid().mean(1))
    """,
}


MATCHED = {
    "means over the channels of another space that cancel": """
        x: (3, 4, 4)
        m.a = nn.Conv2d(3, 6, 1)
        m.b = nn.Linear(16, 5)
        m.c = nn.Linear(6, 2)
        v0 = m.b(m.a(x).flatten(2)).sigmoid()
        v1 = v0 - torch.cat(v0.chunk(2, 1)[::-1], 1)
        return m.c(v1.mean(2))
    """,
    "copies that lie at the channels of another space": """
        x: (2, 3, 6)
        m.a = nn.Linear(6, 5)
        m.b = nn.Parameter(torch.randn(2, 8))
        m.c = nn.Linear(3, 3)
        v0 = torch.einsum("bctu,co->btuo", m.a(x).sin(), m.b)
        v0.select(1, 0).sin_()
        return m.c(v0.mean((2, 3)))
    """,
    "a space that lies along two axes": """
        x: (6,)
        m.a = nn.Linear(6, 5)
        m.b = nn.Parameter(torch.randn(5, 5))
        m.c = nn.Linear(5, 4)
        v0 = m.a(x)
        v1 = v0[:, :, None] * F.relu(v0)[:, None] + m.b
        return m.c(v1.tanh().sum(2))
    """,
}


def outcome_of(text: str, only: str | None = None, extras: tuple[str, ...] = ()) -> Outcome:
    """What the oracles find of a program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Check(Program.parse(text), Random(0), extras, only=only).run()


@pytest.mark.parametrize("name", PERMUTED)
def test_channels_in_another_order_change_nothing(name: str) -> None:
    outcome = outcome_of(PERMUTED[name], "permutation")
    assert not outcome.findings
    assert not outcome.is_refused


@pytest.mark.parametrize("name", MERGED)
def test_a_merge_at_any_cut_is_the_network(name: str) -> None:
    """With a permuted copy of itself, by the true maps."""
    program = Program.parse(MERGED[name])
    inputs, net = inputs_of(program, 16), build(program)
    traced = canonicalise(trace(net, inputs))
    spec = analyse_graph(traced, inputs, {})
    order = random_permutations(spec, Generator().manual_seed(1))
    prepared = prepared_of([traced, permute(spec, traced, order)], spec)
    assert spec.spaces
    for cut in prepared.cuts:
        place = prepared.places.cuts.named[cut]  # also where nothing is merged before it
        merged = merge_by_true_maps(prepared, true_maps(spec, [order]), 0, place)
        assert max(off(run(net, inputs), output) for output in merged(inputs)) < 1e-9, cut


@pytest.mark.parametrize("name", SELECTED)
def test_channels_that_are_kept_make_up_the_network_again(name: str) -> None:
    """By `select`: what fails would be kept in place."""
    outcome = outcome_of(SELECTED[name], extras=("budget",))
    assert not outcome.findings
    assert not outcome.frozen
    assert "select" not in outcome.refused


@pytest.mark.parametrize("name", MATCHED)
def test_channels_are_matched_by_what_tells_them_apart(name: str) -> None:
    """By `convert` on images: the merge with a permuted copy is the network."""
    outcome = outcome_of(MATCHED[name])
    assert not outcome.findings
    assert not outcome.frozen
    assert "convert cut=None" not in outcome.refused


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "steps",
    [
        "return m.a(x) + m.b(m.a(x))",  # in the heads
        "return m.c(m.b(m.a(x)).tanh())",  # in the trunk
    ],
)
def test_a_model_that_cannot_run_on_one_sample_is_refused(steps: str, verify: bool) -> None:
    """Its costs cannot be counted."""
    text = "x: (4,)\nm.a = nn.Linear(4, 6)\nm.b = nn.GroupNorm(6, 6)\nm.c = nn.Linear(6, 3)\n"
    outcome = Check(Program.parse(text + steps), Random(0), verify=verify).run()
    assert not outcome.findings
    assert any("a batch of 1" in text for text in outcome.refused.values())


def test_an_operator_without_a_backward_between_two_layers_is_refitted() -> None:
    """It lets no gradient through, so the layers are solved by themselves."""
    text = "x: (6,)\nm.a = nn.Linear(6, 8)\nm.b = nn.Linear(8, 6)\nm.c = nn.Linear(6, 3)\n"
    text += "return m.c(m.b(torch.ops.fuzz.doubled(m.a(x)).tanh()).tanh())"
    outcome = outcome_of(text, extras=("refit",))
    assert not outcome.findings
    assert not outcome.is_refused


def test_a_layer_that_is_filled_many_times_has_one_parameter_for_it() -> None:
    """The name of it is the node's and its own."""
    text = "x: (6,)\nm.a = nn.Parameter(torch.randn(8, 6))\nm.b = nn.Linear(8, 6)\nm.c = nn.Linear(6, 3)\n"
    program = Program.parse(text + "return m.c(m.b(F.linear(x, m.a).tanh()).tanh())")
    (x,) = inputs_of(program, 64)
    options = RefitOptions(rounds=2)
    zipped = fxzip.zip(build(program), build(program, 1), [x], refit=options, progress=False)
    assert [name for name, _ in zipped.named_parameters() if name.endswith("_bias")] == ["trunk.linear_bias"]


def test_what_two_tensors_need_at_a_cut_has_two_names() -> None:
    """``linear`` has channels along two axes; the indices for its axis 1 are not those of ``linear_1``."""
    text = "x: (4, 3)\nm.a = nn.Linear(3, 7)\nm.b = nn.Linear(7, 8)\nm.c = nn.Conv1d(4, 8, 5, padding=2)\n"
    text += "m.d = nn.Linear(8, 2)\nm.e = nn.Parameter(torch.randn(2, 8))\nm.f = nn.Parameter(torch.randn(8, 4))\n"
    text += "m.g = nn.Linear(6, 3)\nv0 = m.a(x)\nv1 = m.b(v0)\nv2 = F.linear(m.c(v0), m.a.weight.t())\n"
    text += "v3 = F.linear(v1.mean(1), m.e)\nreturn m.g(torch.cat([v3, v2.mean(2) @ m.f], 1))"
    program = Program.parse(text)
    (x,) = inputs_of(program, 16)
    options = {"start": "linear", "cut": "mean_1", "method": "select", "refit": False, "progress": False}
    zipped = fxzip.zip(build(program), build(program, 1), [x], **options)
    assert [tuple(out.shape) for out in zipped(x)] == [(16, 3), (16, 3)]


def test_a_tied_weight_in_what_comes_before_the_start() -> None:
    """Both of its roles stay with the models; the trunk begins behind them and does not have it."""
    text = "x: (6,)\nm.a = nn.Linear(6, 11)\nm.b = nn.Linear(6, 8)\nm.c = nn.Linear(8, 3)\n"
    program = Program.parse(text + "return m.c(m.b((m.a(x) @ m.a.weight).tanh()).tanh())")
    (x,) = inputs_of(program, 16)
    models = build(program), build(program, 1)
    zipped = fxzip.zip(*models, [x], start="tanh", refit=False, progress=False)
    assert [tuple(out.shape) for out in zipped(x)] == [(16, 3), (16, 3)]


def test_a_view_behind_the_place_where_merging_starts() -> None:
    """What both stems give is joined along the channels, and lies in order then."""
    text = "x: (5, 3)\nm.a = nn.Conv1d(5, 12, 3, padding=1)\nm.b = nn.Conv1d(5, 12, 3, padding=2, dilation=2)\n"
    text += "m.c = nn.Linear(36, 6)\nm.d = nn.Linear(6, 2)\n"
    program = Program.parse(text + "return m.d(m.c((m.a(x) * m.b(x)).view(x.shape[0], -1)).tanh())")
    (x,) = inputs_of(program, 16)
    models = build(program), build(program, 1)
    zipped = fxzip.zip(*models, [x], start="b", refit=False, progress=False)
    assert [tuple(out.shape) for out in zipped(x)] == [(16, 2), (16, 2)]


@pytest.mark.parametrize(
    "steps",
    [
        "v1 = torch.bmm(v0.mT, v0)\nreturn m.c(m.b(v1)[0].mean(2))",  # along the steps as along the inputs
        "v1 = torch.bmm(v0.mT, v0)\nreturn m.c(torch.linalg.solve_triangular(v1, v1 + 0, upper=False).mean(2))",
        "return m.c(torch.cdist(v0.mT, v0.mT.cumsum(1)).mean(2))",
    ],
)  # fmt: skip
def test_channels_that_lie_along_two_axes_of_what_is_probed(steps: str) -> None:
    """That an operation takes any order along the one says nothing of the other."""
    text = "x: (3, 5)\nm.a = nn.Linear(5, 8)\nm.b = nn.GRU(8, 6, batch_first=True)\nm.c = nn.Linear(8, 2)\n"
    outcome = outcome_of(text + "v0 = m.a(x)\n" + steps)
    assert not outcome.findings


@pytest.mark.parametrize(
    "steps",
    [
        "v2 = v1.softmax(1)",
        "v2 = F.normalize(v1, dim=1)",
        "v2 = F.avg_pool2d(v1, 3, 1, 1)",
        "v2 = F.layer_norm(v1.permute(0, 2, 3, 1), (9,)).permute(0, 3, 1, 2)",
        "v2 = v1.cumsum(2)",
        "v2 = v1.tril()",
        "v2 = F.fold(F.unfold(v1, 3, padding=1), (4, 4), 3, padding=1)",
        "v2 = F.unfold(v1, 3, padding=1).unflatten(2, (4, 4))",
        "v2 = torch.copysign(v1, torch.linspace(-1, 1, 4, dtype=v1.dtype))",
    ],
)
def test_constants_that_are_alike_until_an_operation_tells_them_apart(steps: str) -> None:
    """A channel of ones beside others; what follows gives it other values at other places."""
    text = "x: (3, 4, 4)\nm.a = nn.Conv2d(3, 8, 1)\nm.b = nn.LazyLinear(3)\nv0 = m.a(x)\n"
    text += f"v1 = torch.cat([v0, torch.ones_like(v0[:, :1])], 1)\n{steps}\nreturn m.b(v2.flatten(1))"
    text = text.replace("nn.LazyLinear(3)", f"nn.Linear({81 * 16 if 'unflatten' in steps else 144}, 3)")
    assert not outcome_of(text).findings


@pytest.mark.parametrize(
    "made", ["F.pad(v1[:, :, :2], (0, 0, 1, 1))", "torch.cat([v1[:, :, :2], v1[:, :, :2] * 0], 2)", "v1.cumsum(3)"]
)
def test_constants_of_several_values_are_not_alike(made: str) -> None:
    """What a constant is padded or joined with may be another one."""
    text = "x: (3, 4, 4)\nm.a = nn.Conv2d(3, 8, 1)\nm.b = nn.Linear(144, 3)\nv0 = m.a(x)\n"
    text += f"v1 = torch.ones_like(v0[:, :1])\nreturn m.b(torch.cat([v0, {made}], 1).flatten(1))"
    assert not outcome_of(text).findings


def test_a_constant_that_is_written_over_in_part() -> None:
    """It is all alike no more."""
    text = "x: (6,)\nm.a = nn.Linear(6, 12)\nm.b = nn.Linear(12, 8)\nm.c = nn.Linear(8, 3)\nv0 = m.a(x)\n"
    text += "v1 = torch.full_like(v0, 0.5)\nv1[:, :2] = v1[:, :2] * 3\nreturn m.c(m.b(v1) + m.b(v0))"
    assert not outcome_of(text).findings


@pytest.mark.parametrize(
    "steps",
    [
        "return m.c(v1.unflatten(1, (2, 5)).flip(1).flatten(1))",
        "return m.c(v1 * v1.unflatten(1, (2, 5)).flip(1).flatten(1))",
        "return m.c(torch.stack([v1[:, :5], v1[:, 5:]], 1).flip(1).flatten(1))",
        "return m.c((v1.unflatten(1, (2, 5)) + v1.unflatten(1, (2, 5)).flip(1)).flatten(1))",
    ],
)
def test_constants_among_channels_that_are_folded_over_one_another(steps: str) -> None:
    """Where one row has a channel the other has a constant, and for the next channel it is the other way round."""
    text = "x: (6,)\nm.a = nn.Linear(6, 10)\nm.c = nn.Linear(10, 2)\nv1 = m.a(x) * 1\nv1[:, ::2] = 0.5\n"
    assert not outcome_of(text + steps).findings


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("order", [[1, 11, 2, 7, 4, 9, 5, 8, 0, 3, 10, 6], [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]])
def test_channels_in_any_order_between_two_grouped_layers(groups: int, order: list[int]) -> None:
    """In one group a space's channels lie where in another group those of another space do."""
    text = "x: (10, 3)\nm.a = nn.Conv1d(10, 12, 1, groups=2)\n"
    text += f"m.b = nn.Conv1d(12, {2 * groups}, 1, groups={groups})\nm.c = nn.Linear({2 * groups}, 3)\n"
    outcome = outcome_of(text + f"v0 = m.a(x)[:, {order}]\nreturn m.c(m.b(v0).mean(2))")
    assert not outcome.findings


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shuffle", ["F.channel_shuffle(v1, {})", "m.s(v1)"])
def test_a_shuffle_is_a_copy_on_the_cpu(groups: int, shuffle: str) -> None:
    """Fake tensors, and GPUs, give a view of its input where it moves nothing."""
    text = "x: (3, 2, 2)\nm.a = nn.Conv2d(3, 4, 3, padding=1)\nm.b = nn.Linear(16, 2)\n"
    text += f"m.s = nn.ChannelShuffle({groups})\nv1 = m.a(x)\nv2 = {shuffle.format(groups)}\n"
    outcome = outcome_of(text + "v1[:, :, :, :1].mul_(3)\nreturn m.b((v2 + v1).flatten(1))")
    assert not outcome.findings


@pytest.mark.parametrize("gated", ["F.glu(v1, 1)", "v1[:, :4] * v1[:, 4:]", "v1[:, :4] - v1[:, 4:].tanh()"])
def test_a_gate_of_zeros_is_not_zeros_with_a_gate(gated: str) -> None:
    """The channel that a constant gates is not like the one that gates a constant."""
    text = "x: (5,)\nm.a = nn.Linear(5, 8)\nm.b = nn.Linear(4, 3)\nv0 = m.a(x)\n"
    assert not outcome_of(text + f"v1 = F.pad(v0[:, :6], (1, 1))\nreturn m.b({gated})").findings


@pytest.mark.parametrize("product", ["torch.einsum('bct,oc->bot', v1, m.d)", "m.d @ v1"])
def test_channels_that_a_product_takes_in_another_order_from_some_rows(product: str) -> None:
    """Two sums of the same channels are not alike where each summand has a weight of its own."""
    text = "x: (6, 2)\nm.b = nn.Linear(2, 10)\nm.d = nn.Parameter(torch.randn(9, 6))\nm.e = nn.Linear(90, 2)\n"
    text += "v0 = m.b(x)\nv1 = torch.cat([v0[:, :3].flip(2), v0[:, 3:]], 1)\n"
    assert not outcome_of(text + f"return m.e(({product}).flatten(1))").findings
