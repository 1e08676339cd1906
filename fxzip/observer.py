"""The observer: streaming moments of all models' channels, gathered while the models run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fxzip.channels import MergePoint
from fxzip.errors import CalibrationError
from fxzip.moments import Moments

# Elements copied at a time: a slice should stay in a CPU's cache, and be large enough to fill an accelerator.
_SLICE = 2**20
_ACCELERATOR_SLICE = 2**26


class Observer(nn.Module):
    """Gathers the `Moments` of one channel space from the N models' activations at its merge points.

    In a graph it is a ``call_module`` node ``observer(k, a_1, ..., a_N)``, one for each merge point ``k``.

    Per batch: the batch mean is subtracted in float32 (float64 where the activations are), the products are
    summed by GEMMs in that precision, and the batch is folded into float64 sums by the update of Chan et al.
    So nothing cancels, as E[xxᵀ] - mmᵀ would; only slices of some megabytes are ever copied. Half precision
    is widened to float32. (``torch.backends.cuda.matmul.allow_tf32``, off by default, is followed where a
    user sets it.)
    """

    # torch.fx removes call_module nodes without users, unless the module says that it has effects.
    _is_impure = True

    def __init__(self, n_models: int, *points: MergePoint, name: str = "", device: torch.device | None = None) -> None:
        """``points`` are the merge points pooled into these moments; ``name`` is the space's.

        Sums are kept on ``device``; None: where the activations are.

        Raises:
            ValueError: no points, or points of different numbers of channels.
        """
        super().__init__()
        sizes = {len(point.index) for point in points}
        if len(sizes) != 1:
            raise ValueError(f"merge points of one space must have the same number of channels, not {sorted(sizes)}")
        self.name, self.device = name, device
        self.n_models = n_models
        self.size = n_models * sizes.pop()
        self._places = [_Place(point) for point in points]
        self.rows: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self._count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    @property
    def moments(self) -> Moments:
        """What was seen so far, as a value of its own."""
        if self._mean is None or self._scatter is None:
            zeros = torch.zeros(self.size, dtype=torch.float64)
            return Moments(0, zeros, torch.outer(zeros, zeros))
        return Moments(self._count, self._mean.clone(), _mirrored(self._scatter.clone()))

    @property
    def state(self) -> tuple[int, Tensor | None, Tensor | None]:
        """The sums as they stand: count, mean and scatter, of which only the upper panels are known."""
        return self._count, self._mean, self._scatter

    def restore(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Go on from such sums."""
        self._count, self._mean, self._scatter = count, mean, scatter

    def take(self) -> Moments:
        """What was seen so far, which is forgotten here: no second copy of the sums is made."""
        if self._mean is None or self._scatter is None:
            return self.moments
        found = Moments(self._count, self._mean, _mirrored(self._scatter))
        self.reset()
        return found

    @torch.no_grad()
    def forward(self, point: int, *activations: Tensor) -> None:
        """Fold one batch in.

        Raises:
            CalibrationError: an activation is not finite, or has not the channels that the merge point names.
        """
        place = self._places[point]
        tensors = [activation.detach() for activation in activations]
        if len(tensors) != self.n_models:
            raise ValueError(f"expected the activations of {self.n_models} models, got {len(tensors)}")
        if len({tensor.shape for tensor in tensors}) > 1:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise CalibrationError(f"the models' activations at node {place.node!r} differ in shape: {shapes}")
        tensors = self._counted(tensors, place)
        work = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        # Autocast would take the products to half precision.
        with torch.autocast(tensors[0].device.type, enabled=False):
            views = [_ChannelView(tensor, place) for tensor in tensors]
            outer, inner = _same_grid(views)
            if outer * inner == 0:
                return
            shift = torch.cat([view.mean(work) for view in views])
            _require_finite(shift, place.node)
            scatter, drift = _scatter(views, shift, place.copies)
            _require_finite(scatter.diagonal(), place.node)
        self._fold(outer * inner * place.copies, shift, drift, scatter)

    def _counted(self, tensors: list[Tensor], place: _Place) -> list[Tensor]:
        """The samples that count; all of them where axis 0 does not hold the samples."""
        rows = self.rows
        if rows is None or 0 in place.axes or any(len(tensor) != len(rows) for tensor in tensors if tensor.dim()):
            return tensors
        for tensor in tensors:
            _require_finite(tensor[~rows], place.node)
        return [tensor[rows] for tensor in tensors]

    def _fold(self, count: int, shift: Tensor, drift: Tensor, scatter: Tensor) -> None:
        """Chan's update with a batch whose scatter is about ``shift``; ``drift`` is Σ (x - shift)."""
        if self._mean is None or self._scatter is None:
            # Metal has no float64.
            home = self.device or (torch.device("cpu") if shift.device.type == "mps" else shift.device)
            self._mean = torch.zeros(self.size, dtype=torch.float64, device=home)
            self._scatter = torch.zeros(self.size, self.size, dtype=torch.float64, device=home)
        home = self._mean.device
        drift = drift.to(home).double() / count
        delta = shift.to(home).double() + drift - self._mean
        total = self._count + count
        # Two rank-one terms in one pass: between the batches, and from the shift to the batch's own mean.
        left = torch.stack([delta * (self._count * count / total), drift * -float(count)], dim=1)
        right = torch.stack([delta, drift])
        for rows, columns in _upper_panels(self.size):
            self._scatter[rows, columns].add_(scatter[rows, columns].to(home)).addmm_(left[rows], right[:, columns])
        self._mean.add_(delta, alpha=count / total)
        self._count = total


class _Place:
    """A merge point, with what need not be found again for each batch."""

    def __init__(self, point: MergePoint) -> None:
        self.node = point.node
        self.axes = point.axes
        self.pooled, self.mixed = point.pooled, point.mixed
        self.index = point.index.cpu()
        self.size = len(self.index)
        self.copies = 1 if self.mixed else self.index.shape[1]
        self.needed = int(self.index.max()) + 1 if self.index.numel() else 0
        self.first = int(self.index[0, 0]) if self.index.numel() else 0
        span = torch.arange(self.first, self.first + self.size)
        self.is_range = self.index.shape[1] == 1 and torch.equal(self.index[:, 0], span)


class _ChannelView:
    """One activation as channels × outer × inner samples, copied nowhere that strides can say it.

    Raises:
        CalibrationError: the activation has not the axes or the channels of the merge point.
    """

    def __init__(self, tensor: Tensor, place: _Place) -> None:
        axes = place.axes
        if max(axes) >= tensor.ndim or min(axes) < -tensor.ndim:
            raise CalibrationError(
                f"the activation at node {place.node!r} has shape {tuple(tensor.shape)}, which lacks axes of {axes}"
            )
        if place.pooled:
            tensor = _summary(tensor, place.pooled)
        front = tensor.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)
        if place.needed > len(front):
            raise CalibrationError(
                f"the activation at node {place.node!r} has shape {tuple(tensor.shape)}: {len(front)} "
                f"channels on axes {axes}, at least {place.needed} expected"
            )
        if place.mixed:
            index = place.index.to(tensor.device)
            front = _summary(front[index.flatten()].unflatten(0, index.shape), (1,))
        rows = _as_grid(front)
        self.index = None if place.is_range or place.mixed else place.index.to(tensor.device)
        self.rows = rows.narrow(0, place.first, place.size) if place.is_range else rows

    def flatten(self) -> None:
        """Make the samples one axis, with a copy where strides cannot say it."""
        self.rows = self.rows.reshape(len(self.rows), -1, 1)

    def mean(self, dtype: torch.dtype) -> Tensor:
        """Mean of each channel, of shape (channels,)."""
        mean = self.rows.sum((1, 2), dtype=dtype) / (self.rows.shape[1] * self.rows.shape[2])
        return mean if self.index is None else mean[self.index].mean(1)

    def centred(self, outer: slice, inner: slice, shift: Tensor, out: Tensor) -> None:
        """Write a slice's samples minus ``shift`` to ``out``, of shape (channels, samples of the slice)."""
        part = self.rows[:, outer, inner]
        if self.index is not None:
            part = part[self.index.flatten()].unflatten(0, self.index.shape).flatten(1, 2)
        torch.sub(part, shift[:, None, None], out=out.unflatten(1, part.shape[1:]))


def _summary(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """What does not depend on the order along axes, side by side on the first of them, of size 2; the others are of 1.

    The mean, and the root of the mean square: means of opposite values (differences of halves, what a norm has centred)
    cancel, so that nothing but rounding would be left to match by.
    """
    count = math.prod(tensor.shape[axis] for axis in axes)
    size = torch.linalg.vector_norm(tensor, dim=axes, keepdim=True) / math.sqrt(max(count, 1))
    return torch.cat([tensor.mean(axes, keepdim=True), size], axes[0])


def _as_grid(front: Tensor) -> Tensor:
    """Channels × ... as channels × outer × inner; channels last merges all samples, else images stay."""
    if front.ndim <= 2 or front.stride(0) == 1:
        return front.reshape(len(front), -1, 1)
    return front.flatten(2)


def _same_grid(views: list[_ChannelView]) -> tuple[int, int]:
    """The outer × inner grid of samples that all models share."""
    if len({view.rows.shape[1:] for view in views}) > 1:  # the models' memory formats differ
        for view in views:
            view.flatten()
    _, outer, inner = views[0].rows.shape
    return outer, inner


def _scatter(views: list[_ChannelView], shift: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    """Σ (x - shift)(x - shift)ᵀ (upper blocks only) and Σ (x - shift) over one batch, in its dtype."""
    scatter = shift.new_zeros(len(shift), len(shift))
    drift = torch.zeros_like(shift)
    rows = views[0].rows
    scratch = _scratch(rows.stride(0) == 1, shift)
    limit = (_SLICE if shift.device.type == "cpu" else _ACCELERATOR_SLICE) // (len(shift) * copies)
    for outer, inner in _slices(rows.shape[1], rows.shape[2], max(1, limit)):
        part = scratch(copies * (outer.stop - outer.start) * (inner.stop - inner.start))
        for view, own, out in zip(views, shift.chunk(len(views)), part.chunk(len(views)), strict=True):
            view.centred(outer, inner, own, out)
        drift += part.sum(1)
        _add_gram(part, scatter)
    return scatter, drift


def _scratch(channels_last: bool, like: Tensor) -> Callable[[int], Tensor]:
    """A buffer that is used again for each slice, of shape (channels, samples), laid out as its source is."""
    channels = len(like)
    flat = like.new_empty(0)

    def take(samples: int) -> Tensor:
        nonlocal flat
        if flat.numel() < channels * samples:
            flat = like.new_empty(channels * samples)
        used = flat[: channels * samples]
        return used.view(samples, channels).T if channels_last else used.view(channels, samples)

    return take


def _slices(outer: int, inner: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Cut an outer × inner grid of samples into slices of at most ``limit``, of whole rows where they fit."""
    step = max(1, limit // inner)
    width = inner if limit >= inner else math.ceil(inner / math.ceil(inner / limit))
    for start in range(0, outer, step):
        for left in range(0, inner, width):
            yield slice(start, min(start + step, outer)), slice(left, min(left + width, inner))


def _upper_panels(channels: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the panels that hold a symmetric matrix on and above its diagonal.

    Little more than half the work of the whole. What lies below the diagonal in a panel's first square is written,
    but not to be read.
    """
    height = min(max(64, channels // 8), 256)
    for start in range(0, channels, height):
        yield slice(start, min(start + height, channels)), slice(start, channels)


def _add_gram(part: Tensor, scatter: Tensor) -> None:
    """``scatter += part @ part.T`` in the panels on and above the diagonal."""
    for rows, columns in _upper_panels(len(part)):
        scatter[rows, columns].addmm_(part[rows], part[columns].T)


def _mirrored(upper: Tensor) -> Tensor:
    """Make a matrix symmetric, in place, of which the panels on and above the diagonal are known."""
    for rows, columns in _upper_panels(len(upper)):
        panel = upper[rows, columns]
        upper[columns, rows][len(panel) :] = panel[:, len(panel) :].T
        square = panel[:, : len(panel)].triu()
        upper[rows, rows] = square + square.triu(1).T
    return upper


def _require_finite(sums: Tensor, node: str) -> None:
    """Sums are finite exactly when every sample is, overflow aside: no pass over the elements is needed."""
    if not bool(torch.isfinite(sums).all()):
        raise CalibrationError(f"the activations at node {node!r} are not finite (NaN, infinite or overflowing)")
