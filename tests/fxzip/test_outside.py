"""Faults from outside: too few images, what is set around a call, likely mistakes with loaders, full disks, Ctrl-C."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxzip
from fxzip.data.groups import find_images
from fxzip.data.images import ImageLoader
from fxzip.errors import CalibrationError, OptionError, TraceError
from fxzip.passes.refit.norms import scale_and_shift
from fxzip.passes.refit.regression import Regression, Residuals
from tests.fxzip.served import zipped_small
from tests.fxzip.test_images import pixels
from tests.nets import Net, Residual, chain, conv, pair, untouched
from tests.oracles import call, images

X = images(8, 8)
DTYPES = (torch.float32, torch.float64)


def merged(*models: nn.Module, loader: Any = None, **options: Any) -> fxzip.ZippedModel:
    return fxzip.zip(*models, loader=[X] if loader is None else loader, progress=False, **options)


# ---- samples that say nothing


def tiny() -> nn.Module:
    layers = {"a": conv(3, 8), "norm": nn.BatchNorm2d(8), "act": nn.ReLU(), "b": conv(8, 6), "act2": nn.ReLU()}
    return Net(chain, **layers, head=nn.Linear(6, 3))


DULL: dict[str, Callable[[Tensor], Tensor]] = {
    "one": lambda x: x[:1],
    "equal": lambda x: x[:1].expand(8, -1, -1, -1),
    "nearly equal": lambda x: x[:1] * (1 + 1e-7 * torch.linspace(-1, 1, 8, dtype=x.dtype)[:, None, None, None]),
    "constant": lambda x: torch.full_like(x, 0.3),
    "zero": torch.zeros_like,
}


def saturated(m: Net, x: Tensor) -> Tensor:
    x = m.a(x).relu()
    x = x * m.gate(x.mean((2, 3), keepdim=True)).sigmoid()
    return m.head((x + m.b(x)).relu().mean((2, 3)))


def closed() -> nn.Module:
    net = Net(saturated, a=conv(3, 8), gate=conv(8, 8, 1), b=conv(8, 8), head=nn.Linear(8, 3))
    net.gate.bias.data -= torch.tensor([60.0, 200.0] * 4)
    return net


def flat(m: Net, x: Tensor) -> Tensor:
    return m.head(m.c(m.norm(m.b(m.a(x.flatten(1)).sigmoid()))).relu())


def perceptron() -> nn.Module:
    parts = {"a": nn.Linear(192, 24), "b": nn.Linear(24, 24), "norm": nn.LayerNorm(24), "c": nn.Linear(24, 24)}
    return Net(flat, **parts, head=nn.Linear(24, 3))


@pytest.mark.filterwarnings("ignore::fxzip.FewImagesWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [tiny, closed, perceptron])
def test_samples_that_say_nothing_give_sane_weights(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    models = [make().to(dtype).eval() for _ in range(2)]
    for name, dull in DULL.items():
        x = dull(X.to(dtype))
        prepared = fxzip.prepare(*models, example_inputs=x).observe([x], progress=False)
        prior = prepared.convert(refit=False, reset_batch_norm=False, progress=False)
        found = prepared.convert(progress=False)
        sizes = [max(float(p.detach().abs().max()) for p in net.parameters()) for net in (prior, found)]
        assert sizes[1] < 10 * sizes[0], (name, sizes)

        def error(net: nn.Module, x: Tensor = x) -> float:
            outs = zip(call(net, x), (call(model, x) for model in models), strict=True)
            return sum(float((out - wanted).square().sum()) for out, wanted in outs)

        assert error(found) <= error(prior) + 1e-9, name


def step(x: Tensor, t: Tensor, prior: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """What a regression changes, from sums that are taken in the data's dtype, as refit takes them."""
    regression, residuals = Regression(), Residuals()
    regression.add(x)
    left = t - prior.to(x) @ x
    residuals.add(x.shape[2], (left @ x.mT).double(), left.sum(2).double(), x.sum(2).double())
    return regression.step(residuals, ridge)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e12])
def test_constant_inputs_leave_weights_at_their_prior(dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(1, 5, 1, generator=generator, dtype=dtype) + 1).expand(1, 5, 40) * size
    t = torch.randn(1, 3, 1, generator=generator, dtype=dtype).expand(1, 3, 40)
    prior = torch.randn(1, 3, 5, generator=generator, dtype=torch.float64)
    weights, bias = step(x, t, prior)
    moved = float((weights @ x[:, :, :1].double()).abs().max())
    rounding = min(1.0, 1e7 * torch.finfo(dtype).eps)  # without a floor it is 1e7 times what is left, and more
    assert moved < rounding * float((t.double() - prior @ x.double()).abs().max())
    given = (prior + weights) @ x[:, :, :1].double() + bias[:, :, None]
    torch.testing.assert_close(given, t[:, :, :1].double(), rtol=1e-5, atol=1e-5 * size)


def test_a_constant_input_changes_nothing_for_the_others() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 60, generator=generator, dtype=torch.float64)
    t = torch.randn(1, 2, 60, generator=generator, dtype=torch.float64)
    prior = torch.zeros(1, 2, 4, dtype=torch.float64)
    alone, shift = step(x, t, prior, ridge=0)
    more, also = step(
        torch.cat([x, torch.full((1, 1, 60), 7.0).double()], 1), t, torch.zeros(1, 2, 5).double(), ridge=0
    )
    torch.testing.assert_close(more[:, :, :4], alone, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(also + 7 * more[:, :, 4], shift, rtol=1e-6, atol=1e-9)
    assert float(more[:, :, 4].abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_channel_that_hardly_varies_keeps_its_scale(dtype: torch.dtype) -> None:
    x = torch.randn(50, 3, dtype=dtype)
    x[:, 1] = 5 + 1e-6 * x[:, 1]
    slope, shift = scale_and_shift([x], [2 * torch.randn(50, 3, dtype=dtype) + 1], axis=1)
    assert slope[1] == 1
    assert float(slope.abs().max()) < 3
    assert bool(shift.isfinite().all())


def test_one_warning_says_how_few_images_there_are() -> None:
    models = pair(Residual, X)
    with pytest.warns(fxzip.FewImagesWarning) as told:
        merged(*models, loader=[X[:3]])
    (warning,) = told
    assert str(warning.message).startswith("3 images are not enough for ")
    assert "fc (3 samples for 12 inputs)" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxzip.FewImagesWarning)
        merged(*models, loader=[images(32, 8)])


# ---- what is set around a call


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "deterministic": deterministic,
}


@pytest.fixture(scope="module")
def plain() -> tuple[list[nn.Module], dict[str, Tensor]]:
    models = [model.float() for model in pair(tiny, X)]
    return models, merged(*models).state_dict()


@pytest.mark.filterwarnings("ignore::fxzip.FewImagesWarning")
@pytest.mark.parametrize("kind", AROUND)
def test_modes_around_the_call_change_nothing(plain: tuple[list[nn.Module], dict[str, Tensor]], kind: str) -> None:
    models, expected = plain
    with AROUND[kind](), untouched(*models):
        found = merged(*models)
    assert all(torch.equal(expected[name], value) for name, value in found.state_dict().items())
    assert not any(value.is_inference() for value in found.state_dict().values())
    sum(out.sum() for out in found(X.float())).backward()


@pytest.mark.filterwarnings("ignore::fxzip.FewImagesWarning")
def test_models_and_images_of_inference_mode(plain: tuple[list[nn.Module], dict[str, Tensor]]) -> None:
    with torch.inference_mode():
        found = merged(*copy.deepcopy(plain[0]), loader=[X.float() + 0])
    assert all(torch.equal(plain[1][name], value) for name, value in found.state_dict().items())


def surroundings() -> list[Any]:
    legacy = np.random.get_state()  # noqa: NPY002  the legacy generator is the global one
    state = [random.getstate(), torch.get_rng_state().tolist(), str(legacy), dict(os.environ), list(warnings.filters)]
    return [*state, torch.is_grad_enabled(), torch.get_default_dtype(), signal.getsignal(signal.SIGINT)]


@pytest.mark.filterwarnings("ignore::fxzip.FewImagesWarning")
def test_random_state_filters_and_environment_are_as_they_were(tmp_path: Path) -> None:
    def drawn(m: Net, x: Tensor) -> Tensor:
        random.random()
        np.random.rand()  # noqa: NPY002
        os.environ["FXZIP_TEST"] = "1"
        return chain(m, x)

    models = pair(lambda: Net(drawn, a=conv(3, 8), act=nn.ReLU(), b=conv(8, 6), head=nn.Linear(6, 3)), X)
    os.environ.pop("FXZIP_TEST", None)
    before = surroundings()
    prepared = fxzip.prepare(*models, example_inputs=X)
    assert surroundings() == before
    prepared.observe(DataLoader(list(X), 4, shuffle=True), progress=False)
    assert surroundings() == before
    zipped = prepared.convert(progress=False)
    assert surroundings() == before
    zipped.save(tmp_path / "saved")
    assert surroundings() == before
    fxzip.load(tmp_path / "saved").export(tmp_path / "m.pt2")
    assert surroundings() == before


# ---- loaders

SAMPLES = [(image, 3) for image in X]
LOADERS: dict[str, tuple[Any, str]] = {
    "dataset": (
        TensorDataset(X, torch.arange(8)),
        r"dataset \(TensorDataset\).*\(float64\[3, 8, 8\], int64\[\]\).*write Da",
    ),
    "datasets": ([TensorDataset(X), TensorDataset(X)], r"dataset \(TensorDataset\).*DataLoader\(dataset"),
    "tensor": (X, r"one float64\[8, 3, 8, 8\].*like \[images\]"),
    "array": (X.numpy(), r"one numpy float64\[8, 3, 8, 8\].*like \[images\]"),
    "samples": (SAMPLES, r"single sample, \(float64\[3, 8, 8\], int\).*like float64\[1, 3, 8, 8\]"),
    "bare samples": (list(X), r"single sample, float64\[3, 8, 8\], without a batch axis"),
    "arrays": ([X.numpy()], r"gave numpy float64\[8, 3, 8, 8\], not tensors: convert by torch\.from_numpy"),
    "arrays and labels": ([(X.numpy(), [1])], r"gave \(numpy float64\[8, 3, 8, 8\], \(int\)\), not tensors"),
    "dict of arrays": ([{"x": X.numpy()}], r"without a tensor: \['x'\]; convert its arrays by torch.from_numpy"),
    "empty": ([X, X[:0]], r"batch 1: the batch is empty, float64\[0, 3, 8, 8\]: leave it out"),
    "sparse": ([X.to_sparse()], r"batch 0: a tensor is sparse.*\.to_dense\(\)"),
    "only labels": ([{"labels": torch.arange(8)}], r"batch 0: the batch holds only 'labels'"),
}


@pytest.mark.filterwarnings("ignore::fxzip.DroppedInputWarning")
@pytest.mark.parametrize("kind", LOADERS)
def test_likely_mistakes_with_loaders(kind: str) -> None:
    loader, match = LOADERS[kind]
    models = pair(tiny, X)
    with untouched(*models), pytest.raises(CalibrationError, match=match):
        merged(*models, loader=loader)


def test_whole_numbers_are_refused() -> None:
    models = pair(tiny, X)
    with pytest.raises(TraceError, match=r"uint8\[8, 3, 8, 8\] holds whole numbers.*images\.float\(\) / 255"):
        merged(*models, loader=[X.mul(9).to(torch.uint8)])


def test_arguments_in_another_order() -> None:
    a, b = pair(tiny, X)
    right = r"write fxzip\.zip\(model_a, model_b, loader\)"
    with pytest.raises(OptionError, match=rf"argument 2 of 3 is a DataLoader, not a model; {right}"):
        fxzip.zip(a, DataLoader(list(X)), b, progress=False)
    with pytest.raises(OptionError, match=rf"argument 1 of 3 is a list, not a model; {right}"):
        fxzip.zip([X] * 5, a, b, progress=False)
    with pytest.raises(OptionError, match=rf"the loader is a model \(Net\); {right}"):
        fxzip.zip(a, b, loader=b, progress=False)
    with pytest.raises(OptionError, match=r"argument 3 of 3 is a float64\[8, 3, 8, 8\], not a model.*example_inputs"):
        fxzip.prepare(a, b, X, example_inputs=X)


@pytest.mark.filterwarnings("ignore::fxzip.FewImagesWarning")
@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.float16])
def test_floats_get_the_precision_of_the_models(other: torch.dtype) -> None:
    models = [model.float() for model in pair(tiny, X)]
    expected = merged(*models, loader=[X.to(other).float()]).state_dict()
    found = merged(*models, loader=[X.to(other)]).state_dict()
    assert all(torch.equal(expected[name], value) for name, value in found.items())


class Speaking(nn.Module):
    """A forward that takes labels, as those of Hugging Face do, and gives a loss if it gets them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.head(self.b(self.a(pixel_values).relu()).relu().mean((2, 3)))
        return logits if labels is None else nn.functional.cross_entropy(logits, labels)


class Needing(Speaking):
    def forward(self, pixel_values: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(pixel_values) + target[:, None]


@pytest.mark.filterwarnings("ignore::fxzip.FewImagesWarning")
@pytest.mark.parametrize("key", ["labels", "label", "targets", "target"])
def test_labels_never_become_inputs(key: str) -> None:
    models = pair(Speaking, X)
    expected = merged(*models).state_dict()
    batches = [{"pixel_values": X[:4], key: torch.zeros(4).long()}, {"pixel_values": X[4:], key: torch.zeros(4).long()}]
    with pytest.warns(fxzip.DroppedInputWarning, match=f"hold '{key}': labels are not inputs") as told:
        found = merged(*models, loader=batches)
    assert len([w for w in told if w.category is fxzip.DroppedInputWarning]) == 1
    assert found.state_dict().keys() == expected.keys()
    assert [node.target for node in found.trunk.graph.find_nodes(op="placeholder")] == ["pixel_values"]
    needing = pair(Needing, (X, torch.zeros(8).double()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxzip.DroppedInputWarning)
        merged(*needing, loader=[{"pixel_values": X, "target": torch.zeros(8).double()}])


# ---- images


SIXTEEN = np.linspace(0, 65535, 16).reshape(4, 4).astype(np.uint16)
EIGHT = (SIXTEEN / 257).round()


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled(tmp_path: Path, channels: int) -> None:
    Image.fromarray(SIXTEEN).save(tmp_path / "a.png")
    Image.fromarray((SIXTEEN / 65535).astype(np.float32)).save(tmp_path / "b.tiff")
    Image.fromarray((SIXTEEN / 257).astype(np.float32)).save(tmp_path / "c.tiff")
    Image.fromarray(SIXTEEN.astype(np.int32)).save(tmp_path / "d.tiff")
    loader = ImageLoader(find_images(tmp_path).values(), pixels, channels=channels, seed=None, strict=True)
    ((read, _),) = loader
    assert read.shape == (4, channels, 4, 4)
    for image in read:
        assert torch.equal(image, torch.from_numpy(EIGHT).float().expand(channels, 4, 4))


def test_values_of_no_known_range_are_no_image(tmp_path: Path) -> None:
    Image.fromarray(SIXTEEN.astype(np.int32) * 3).save(tmp_path / "a.tiff")
    with pytest.raises(CalibrationError, match=r"a\.tiff cannot be read: its values \(I\) are 0 to 196605"):
        list(ImageLoader(find_images(tmp_path).values(), pixels, strict=True))


@pytest.mark.parametrize("mode", ["LA", "PA", "P", "CMYK", "1", "RGBA"])
def test_odd_modes_have_their_colours(tmp_path: Path, mode: str) -> None:
    white = np.zeros((4, 4, 3), dtype=np.uint8)
    white[:2] = 255
    image = Image.fromarray(white)
    image = image.convert("RGBA").quantize(4) if mode == "PA" else image.convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes([0, 128])
    image.save(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((read, _),) = ImageLoader(find_images(tmp_path).values(), pixels, strict=True)
    assert torch.equal(read[0], torch.from_numpy(white).permute(2, 0, 1).float())


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short", b"\x93NUMPY"])
def test_an_archive_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"a\.npz cannot be read as an \.npz archive"):
        find_images(tmp_path / "a.npz")


def test_an_array_is_no_archive(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, SIXTEEN)
    with pytest.raises(CalibrationError, match=r"a\.npz cannot be read as an \.npz archive"):
        find_images(tmp_path / "a.npz")


# ---- full disks, dumps, Ctrl-C


FULL = """
import sys, resource, signal, fxzip
zipped = fxzip.load(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
for path in sys.argv[2:]:
    try:
        zipped.export(path)
    except fxzip.ExportError as error:
        print(error)
"""


def test_a_full_disk_is_an_export_error(tmp_path: Path) -> None:
    zipped_small(5, 5).save(tmp_path / "saved")
    paths = [str(tmp_path / "out" / name) for name in ("m.pt2", "m.onnx")]
    arguments = [sys.executable, "-c", FULL, str(tmp_path / "saved"), *paths]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in told] == ["m.pt2 cannot be exported", "m.onnx cannot be exported"]
    assert list((tmp_path / "out").iterdir()) == []


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head((x if x.mean() > 0 else -x).mean((2, 3)))


def test_torchs_dumps_are_out_of_sight(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="fxzip"), pytest.raises(TraceError):
        fxzip.prepare(Deciding(), Deciding(), example_inputs=X.float())
    assert capfd.readouterr() == ("", "")
    assert any("def forward" in record.getMessage() for record in caplog.records if record.name == "fxzip")


PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
from fxzip import __main__
print("started", flush=True)
__main__.main()
"""


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.3, 0.8, 1.5])
def test_ctrl_c_from_the_first_moment(tmp_path: Path, delay: float) -> None:
    arguments = [sys.executable, "-c", PROGRAM, "inspect", "timm:vit_large_patch14_224", "--quiet"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert (out, told) == ("", "fxzip: stopped; no result was written\n")
