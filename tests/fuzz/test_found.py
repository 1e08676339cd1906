"""Kinds of networks that the fuzzer found wrong, or that raised errors of PyTorch, each as small as could be."""

import warnings
from random import Random

import pytest

from tests.fuzz.oracles import Check
from tests.fuzz.outcome import Outcome
from tests.fuzz.program import Program

PERMUTED = {
    "tokens under a causal mask": """
        x: (3, 4, 4)
        m.a = nn.Conv2d(3, 6, 1)
        m.b = nn.Linear(16, 8)
        v0 = m.b(F.softplus(m.a(x)).flatten(2)).unsqueeze(1)
        v1 = F.scaled_dot_product_attention(v0, v0, v0, is_causal=True)
        return v1.mean(2).flatten(1)
    """,
    "a token beside others that are kept in place": """
        x: (3, 4)
        m.a = nn.Parameter(torch.randn(1, 1, 4))
        return torch.cat([m.a.expand(x.shape[0], -1, -1), x], 1).mean(1)
    """,
}
MERGED = {
    "heads that are folded into the batch": """
        x: (3, 4, 4)
        m.a = nn.Conv2d(3, 5, 3, padding=1)
        m.b = nn.MultiheadAttention(16, 16, batch_first=True)
        v0 = m.a(x).flatten(2)
        return m.b(v0, v0, v0)[0]
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
    """The seed chooses the cuts that are tried."""
    outcome = outcome_of(MERGED[name], extras=("refit",))
    assert not outcome.findings
    assert not outcome.is_refused


def test_a_model_that_cannot_run_on_one_sample_is_refused() -> None:
    """Its costs cannot be counted."""
    outcome = outcome_of("x: (4,)\nm.a = nn.Linear(4, 6)\nm.b = nn.GroupNorm(6, 6)\nreturn m.a(x) + m.b(m.a(x))")
    assert not outcome.findings
    assert "resized to a batch of 1" in outcome.refused["analyse"]
