"""Where the networks of a merge came from: their names on the hub, their licences, what they were trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
"""A repository of the hub: its owner and its name."""
_LONGEST = 200
"""The most characters of a name."""
_MOST = 100
"""The most data sets of one network."""


@dataclass(frozen=True)
class Origin:
    """What is known of where one network came from; data for cards, which nothing is loaded from.

    Attributes:
        model: Its name on the hub, ``owner/name``.
        licence: Its licence as the hub writes it (``apache-2.0``).
        datasets: Names of the data sets that it was trained on.
    """

    model: str | None = None
    licence: str | None = None
    datasets: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """What is wrong with it, in words; None if nothing is."""
        if self.model is not None and (len(self.model) > _LONGEST or not REPOSITORY.fullmatch(self.model)):
            return f"{self.model[:40]!r} is no owner/name of the hub"
        if len(self.datasets) > _MOST or any(len(text) > _LONGEST for text in (*self.datasets, self.licence or "")):
            return f"a licence or data set has more than {_LONGEST} characters, or there are more than {_MOST}"
        return None


def origin_of(model: nn.Module) -> Origin | None:
    """Where a model says that its weights came from; None where it does not.

    timm's configs name the weights of an architecture, whether or not they were loaded: only a model made from the hub
    (``hf-hub:``) says where it is from. Hugging Face models keep the name that ``from_pretrained`` was given.
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("source") == "hf-hub":
        licence = config.get("license")
        found = Origin(str(config.get("hf_hub_id", "")).partition("@")[0], str(licence) if licence else None)
        return found if found.problem() is None else None
    named = getattr(getattr(model, "config", None), "_name_or_path", None)
    found = Origin(named) if isinstance(named, str) and named else Origin()
    return found if found.model and found.problem() is None else None


def one_licence(origins: Iterable[Origin]) -> str | None:
    """The licence of what is made of some networks: theirs, where all have one; ``other`` where they differ."""
    found = {origin.licence for origin in origins}
    if found <= {None}:
        return None
    return next(iter(found)) if len(found) == 1 else "other"
