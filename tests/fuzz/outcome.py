"""What became of a network that was checked."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """What became of a network.

    Attributes:
        wrong: Oracles that failed, with how far off outputs were.
        raw: Errors that are none of fxzip's own, with the oracle that raised them.
        mismatched: Merges by `convert` that were off although the true maps are right.
        caught: What verification kept in place, and with it from a merge that is wrong: a fault of a rule all the same.
        touched: What is not as it was before: the model, or PyTorch's random numbers.
        refused: What fxzip would not do, by oracle, in its words.
        frozen: Warnings of channels that are kept in place.
        coverage: Of the channel spaces; None where there are none.
    """

    wrong: dict[str, str] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, str] = field(default_factory=dict)
    caught: dict[str, str] = field(default_factory=dict)
    touched: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    coverage: float | None = None

    @property
    def findings(self) -> dict[str, str]:
        """All that should not be, by oracle."""
        return {**self.wrong, **self.raw, **self.mismatched, **self.caught, **self.touched}

    @property
    def is_refused(self) -> bool:
        """Whether the network is not merged at all; that one cut or start will not do says little."""
        return bool(self.refused.keys() & {"analyse", "permutation", "prepare", "observe", "convert cut=None"})

    @property
    def kinds(self) -> set[str]:
        """What the findings are, without the names of cuts: the oracle, and an error's type and place."""
        found = {kind_of(name) for name in (*self.wrong, *self.mismatched, *self.caught, *self.touched)}
        return found | {
            f"{message.partition(':')[0]} at {message.rpartition('[')[2][:-1]}" for message in self.raw.values()
        }


def kind_of(oracle: str) -> str:
    """An oracle without the cut that it was run at, but for the empty trunk's."""
    return oracle if "cut=0.0" in oracle else oracle.partition(" cut=")[0].partition(" start=")[0]
