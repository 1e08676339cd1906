"""Settings: the numbers that a user may set, each declared once with its default, its range and its help.

Those of refit are the fields of `RefitOptions`, those of the matchers stand in `MATCHING`. `fxzip.zip`, `convert`, the
recipes and the command line derive from them. PyTorch is not imported here, so that the command
line shows its help at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from fxzip.errors import OptionError


@dataclass(frozen=True)
class Setting:
    """A number that a user may set.

    Attributes:
        default: Its value if nothing is given; an int says that it is a whole number, None that fxzip finds it.
        help: What it does, in one line.
        low: The least that it may be.
        high: The most that it may be.
    """

    default: float | None
    help: str
    low: float = -math.inf
    high: float = math.inf

    @property
    def kind(self) -> type[int] | type[float]:
        """Its type: int where it is a whole number, float otherwise."""
        return int if isinstance(self.default, int) else float

    @property
    def wanted(self) -> str:
        """What it may be, in words."""
        noun = "a whole number" if self.kind is int else "a number"
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{noun} from {self.range}"
        return f"{noun}, {self.range or 'not infinite'}"

    @property
    def range(self) -> str:
        """Its range, in words; empty where any finite number will do."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{self.low:g} to {self.high:g}"
        if math.isfinite(self.low):
            return f"{self.low:g} or more"
        return f"{self.high:g} or less" if math.isfinite(self.high) else ""

    def check(self, name: str, value: object) -> Any:
        """The value as a number of Python's own; None where fxzip is to find it.

        Args:
            name: What the setting is called.
            value: What was given; NumPy's numbers will do.

        Raises:
            OptionError: Not a number (True is none), not finite, not whole as it must be, or out of range.
        """
        if value is None and self.default is None:
            return None
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
        fits = math.isfinite(number) and self.low <= number <= self.high
        if not fits or (self.kind is int and not number.is_integer()):
            raise OptionError(f"{name}={value!r}: it must be {self.wanted}")
        exact: Any = value
        return self.kind(exact)

    def __str__(self) -> str:
        """Its help, range and default, in one line."""
        default = "default: found from the images" if self.default is None else f"default: {self.default}"
        return "; ".join(filter(None, (self.help, self.range, default)))


def _field(default: float | None, help: str, low: float) -> Any:
    """The field of a dataclass that is a setting."""
    return field(default=default, metadata={"setting": Setting(default, help, low)})


@dataclass(frozen=True)
class RefitOptions:
    """How to refit (`fxzip.passes.refit`).

    Attributes:
        ridge: λ as a share of the mean of the inputs' sums of squares; 0 or more. None: found for each layer from
            images that its fit leaves out (`fxzip.passes.refit.ridge`).
        rounds: How often at most an inner layer (of a residual branch, of an MLP) and the layer that uses it are
            solved in turn, in the trunk; in the heads it is once. 0: each layer is solved once.
        steps: How often a layer before a ReLU is solved again, each time with what the last solution gives below 0 let
            be; 0: its targets are the parents' values before their ReLUs.
        polish: How many steps all layers take together towards the parents' outputs, after they were solved one by
            one (`fxzip.passes.polish`); 0: none. A step takes some eight passes over the images, and 2,048 of these
            at most. If the merge explains less of the images held back then, it is left as it was.
        images: Most images to use from the loader; fewer where ``memory`` does not hold them.
        samples: Least number of positions that a layer is fitted on, if there are as many. Layers with large feature
            maps take fewer images, so that memory is bounded by this number.
        memory: Most bytes of inputs and activations to keep, unless ``least_images`` need more: where they would
            not fit, fewer images are used.
        least_images: Least number of images that every layer is fitted on, if there are as many.
        seed: Seed for the random choice of positions.
        biases: Whether a layer or norm without a bias may get one, which mostly fits better. False: only biases that
            the model's class has, or its BatchNorms hold, so that `ZippedModel.as_models` finds a place for each.
        keep_norms: Whether BatchNorms stay where they are, the same in eval mode, and in train mode normalise by the
            batch and learn. False: they are folded into layers. (Without refit nothing is folded: they stay.)

    Raises:
        OptionError: A value is no number, or out of range, or ``biases`` or ``keep_norms`` is neither True nor False.
    """

    ridge: float | None = _field(
        None, "how strongly weights are pulled to ZipIt!'s rule, as a share of the inputs' power", low=0
    )
    rounds: int = _field(5, "how often the layers of a branch are solved in turn (0: each only once)", low=0)
    steps: int = _field(2, "how often a layer before a ReLU is solved again, for what the ReLU gives", low=0)
    polish: int = _field(0, "how many steps all layers take together on the outputs, after they are solved", low=0)
    images: int = _field(
        10_000, "most images to use; more are slower and bring the result closer to the parents", low=1
    )
    samples: int = _field(2**17, "least number of positions that each layer is fitted on", low=1)
    memory: int = _field(3 * 2**30, "most bytes of inputs and activations to keep", low=0)
    least_images: int = _field(64, "least number of images for each layer, whatever memory they take", low=1)
    seed: int = _field(0, "seed for the random choice of positions", low=0)
    biases: bool = True
    keep_norms: bool = False

    def __post_init__(self) -> None:
        for name, setting in refit_settings().items():
            object.__setattr__(self, name, setting.check(name, getattr(self, name)))
        for name in ("biases", "keep_norms"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r}: it must be True or False")


EFFORTS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"rounds": 0, "steps": 0, "images": 1_000, "samples": 2**15},
    "default": {},
    "thorough": {"rounds": 12, "steps": 4, "images": 30_000, "samples": 2**18},
}
"""What a refit costs and keeps, in one word: the settings that differ from their defaults."""


def refit_settings() -> dict[str, Setting]:
    """The settings of refit, by name."""
    return {each.name: each.metadata["setting"] for each in fields(RefitOptions) if "setting" in each.metadata}


EACH = "each"
"""A head for each task (`fxzip.joint`)."""
AUTO = "auto"
"""The method that tries others and takes the best (`fxzip.passes.choose`)."""

_SAMPLES = Setting(None, "how many independent samples the covariances are of: few make regressions cautious", 1)

MATCHING: Mapping[str, Mapping[str, Setting]] = {
    "zip": {
        "alpha": Setting(1.0, "how readily merged channels merge again (arXiv 2305.03053, section 4.3)", 0, 1),
        "beta": Setting(1.0, "share of a model's merges that may lie within it", 0, 1),
    },
    "select": {"samples": _SAMPLES},
    "pca": {"samples": _SAMPLES},
    "permute": {},
    "average": {},
    "optimal": {},
    "weights": {},
    "dual": {"gamma": Setting(0.5, "share of the activations in the blend of weights and activations", 0, 1)},
    "cca": {"gamma": Setting(1e-3, "regularisation, as a share of the channels' mean variance", 0, 1)},
}
"""The options of fxzip's own matchers (`fxzip.matching`), by matcher and by name."""
