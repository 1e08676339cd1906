"""Records of the units that were solved, so that a run that was interrupted goes on behind them (`fxzip.journal`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxzip.journal import Journal
from fxzip.passes.refit.fit import Fit


@dataclass(frozen=True, eq=False)
class Record:
    """What a unit became.

    Attributes:
        weights: (groups, o, d), float64.
        bias: (groups, o), float64.
        ridge: The λ that was found last.
    """

    weights: Tensor
    bias: Tensor
    ridge: float


class Records:
    """The units of one network that were solved, by their numbers.

    An inner unit changes with its outer one, so both are written together, when neither changes any more.
    """

    def __init__(self, journal: Journal, name: str) -> None:
        """Read what was kept before.

        Args:
            journal: Where records are kept.
            name: Of the network.
        """
        self._journal, self._name, self._written = journal, name, 0
        self._solved: dict[int, tuple[Fit, float]] = {}
        self.known: dict[int, Record] = {}
        while (found := journal.read(f"{name}-{self._written}")) is not None:
            tensors, values = found
            self.known |= {
                number: Record(tensors[f"weights.{number}"], tensors[f"bias.{number}"], ridge)
                for number, ridge in values
            }
            self._written += 1

    def add(self, number: int, fit: Fit, ridge: float) -> None:
        """A unit was solved, and may change still."""
        self._solved[number] = fit, ridge

    def write(self) -> None:
        """Write those that were added: they do not change any more."""
        tensors: dict[str, Tensor] = {}
        for number, (fit, _) in self._solved.items():
            tensors |= {f"weights.{number}": fit.weights, f"bias.{number}": fit.bias}
        values = [(number, ridge) for number, (_, ridge) in self._solved.items()]
        self._journal.keep(f"{self._name}-{self._written}", tensors, values)
        self._solved.clear()
        self._written += 1
