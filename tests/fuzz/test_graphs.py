"""Sixty small random networks against the exact oracles; `make fuzz` runs thousands, and larger ones.

They are drawn from seeds, not by hypothesis, whose choices took twenty times as long as the network's own and would end
at the first that fails. ``python -m tests.fuzz --seed suite --steps 5 --only N`` runs one again, with all oracles.
"""

from random import Random

import pytest

from tests.fuzz.__main__ import EXTRAS, check
from tests.fuzz.generate import network


@pytest.mark.parametrize("number", range(60))
def test_a_random_network_is_merged_rightly_or_refused(number: int) -> None:
    seed = f"suite/{number}"
    program = network(Random(seed), 5)
    extras = () if number % 2 else (EXTRAS[number // 2 % len(EXTRAS)],)
    outcome = check(program, seed, extras, True)
    assert not outcome.findings, f"{program}\n{outcome.findings}"
