"""Saving and exporting real architectures, served by a fresh process; and what an export refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxzip
from fxzip import export as export_module
from fxzip.errors import ExportError, OptionError
from tests.fxzip.served import BATCHES, NETWORKS, Small, hand_made, serve, zipped_small


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_process_serves_what_was_merged(name: str, tmp_path: Path) -> None:
    make, count, size = NETWORKS[name]
    zipped = fxzip.zip(*(make() for _ in range(count)), [torch.randn(8, 3, size, size)], method="zip", progress=False)
    assert zipped.report.spaces
    zipped.save(tmp_path / "saved")
    for path in (tmp_path / "m.onnx", tmp_path / "m.pt2"):
        done = zipped.export(path)
        assert done.path == path
        assert done.difference < 1e-4
        assert done.outputs == zipped.names
    inputs = {str(batch): torch.randn(batch, 3, size, size) for batch in BATCHES}
    found = serve(tmp_path, inputs)
    assert tuple(found["names"]) == zipped.names
    assert found["keys"] == list(zipped.state_dict())
    for batch, x in inputs.items():
        with torch.no_grad():
            expected = zipped(x)
        for task in range(count):
            assert torch.equal(found[f"loaded{batch}"][task], expected[task])
            torch.testing.assert_close(found[f"program{batch}"][task], expected[task], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[f"onnx{batch}"][task], expected[task], rtol=1e-3, atol=1e-4)


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return {"out": y, "parts": (y.mean((2, 3)), y.amax((2, 3)))}


def test_outputs_of_a_structure_are_named_by_their_place(tmp_path: Path) -> None:
    import onnxruntime

    x = torch.randn(2, 3, 8, 8)
    zipped = hand_made(Structured(), nn.Conv2d(3, 2, 1), x=x)
    done = zipped.export(tmp_path / "m.onnx")
    assert done.outputs == ("task0.out", "task0.parts_0", "task0.parts_1", "task1")
    assert done.inputs == ("x",)
    assert "task0.parts_1" in str(done)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    found = session.run(["task0.parts_1", "task1"], {"x": x.repeat(3, 1, 1, 1).numpy()})
    assert [value.shape for value in found] == [(6, 4), (6, 2, 8, 8)]
    np.testing.assert_allclose(found[0][:2], zipped(x)[0]["parts"][1].detach(), rtol=1e-4, atol=1e-5)
    program = torch.export.load(zipped.export(tmp_path / "m.pt2", task="task0").path).module()
    torch.testing.assert_close(program(x)["parts"][0], zipped(x)[0]["parts"][0])


def test_an_exported_file_can_be_quantised(tmp_path: Path) -> None:
    """Weights are described once: a quantiser transposes them."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    zipped = zipped_small(5, 7)
    zipped.export(tmp_path / "m.onnx")
    quantize_dynamic(tmp_path / "m.onnx", tmp_path / "q.onnx")
    x = torch.randn(3, 3, 12, 12)
    found = onnxruntime.InferenceSession(tmp_path / "q.onnx").run(list(zipped.names), {"x": x.numpy()})
    with torch.no_grad():
        for expected, value in zip(zipped(x), found, strict=True):
            assert (expected - torch.from_numpy(value)).abs().max() < 0.1 * expected.abs().max()


def test_one_task_and_an_opset(tmp_path: Path) -> None:
    import onnx

    zipped = zipped_small(5, 5)
    done = zipped.export(tmp_path / "one.onnx", task="task1", opset=18)
    model = onnx.load(done.path)
    assert [value.name for value in model.graph.output] == ["task1"]
    assert model.opset_import[0].version == 18
    (batch, *_) = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.onnx"]


def test_keyword_inputs(tmp_path: Path) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.head((self.embed(ids) * mask[..., None]).mean(1))

    batch = {"ids": torch.randint(0, 10, (4, 6)), "mask": torch.ones(4, 6)}
    zipped = fxzip.zip(TwoInputs(), TwoInputs(), [batch], progress=False)
    zipped.save(tmp_path / "saved")
    again = fxzip.load(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(zipped(**batch), again(**batch), strict=True))
    assert again.export(tmp_path / "m.onnx").inputs == ("ids", "mask")
    again.export(tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(program(**batch), zipped(**batch))


# ---- what is refused


def test_a_difference_is_an_error_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped = zipped_small()
    monkeypatch.setattr(export_module, "_difference", lambda *_: 0.5)
    for name in ("m.onnx", "m.pt2"):
        with pytest.raises(ExportError, match=rf"{name} would differ from the network by 5.0e-01"):
            zipped.export(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_earlier_file(tmp_path: Path) -> None:
    class Loops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x.mean((0, 1))).real  # ONNX has no such operator

    zipped = hand_made(Loops(), x=torch.randn(2, 3, 4, 4))
    (tmp_path / "m.onnx").write_text("earlier")
    with pytest.raises(ExportError, match=r"m\.onnx cannot be exported"):
        zipped.export(tmp_path / "m.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_wrong_shapes_and_dtypes_are_differences() -> None:
    with pytest.raises(ExportError, match="shape"):
        export_module._relative(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ExportError, match="float64"):
        export_module._relative(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    nan = torch.tensor([float("nan"), float("inf"), 2.0])
    assert export_module._relative(nan, nan) == 0.0
    assert export_module._relative(nan, torch.tensor([float("nan"), float("inf"), 1.0])) == 0.5
    assert not export_module._relative(nan, torch.zeros(3)) <= 1.0


def test_bad_options(tmp_path: Path) -> None:
    zipped = hand_made(Small())
    with pytest.raises(OptionError, match=r"\.onnx .*\.pt2"):
        zipped.export(tmp_path / "m.pth")
    with pytest.raises(OptionError, match="there is no task 'dogs'; the tasks are task0"):
        zipped.export(tmp_path / "m.onnx", task="dogs")
    with pytest.raises(OptionError, match="example_inputs"):
        zipped.export(tmp_path / "m.pt2")
    with pytest.raises(OptionError, match="opset"):
        zipped.export(tmp_path / "m.pt2", opset=18)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written to"):
        zipped.export(tmp_path / "file" / "m.pt2", example_inputs=torch.randn(2, 3, 8, 8))
    with pytest.raises(ExportError, match="cannot be exported"):
        zipped.export(tmp_path / "m.pt2", example_inputs=torch.randn(2, 7, 8, 8))


def test_a_missing_extra_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(ExportError, match=r"needs onnxruntime: pip install 'fxzip\[onnx\]'"):
        hand_made(Small()).export(tmp_path / "m.onnx")
