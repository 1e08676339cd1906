"""Images from folders and archives: groups, labels, broken files, accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fxzip
from fxzip.accuracy import measure, measure_one, table
from fxzip.data.groups import find_images
from fxzip.data.images import ImageLoader
from fxzip.errors import CalibrationError
from tests.fxzip.served import hand_made


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.atleast_3d(np.asarray(image, dtype=np.float32))).permute(2, 0, 1)


def paint(path: Path, value: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 4), (value,) * len(mode) if len(mode) > 1 else value).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Dogs of 2 classes with 3 images each, birds of 3 classes with 1; the red value says which."""
    for label, name in enumerate(("beagle", "poodle")):
        for number in range(3):
            paint(tmp_path / "dogs" / name / f"{number}.png", 10 * label + number)
    for label, name in enumerate(("gull", "owl", "wren")):
        paint(tmp_path / "birds" / name / "0.JPG", 100 + 10 * label)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def values(loader: ImageLoader) -> list[float]:
    return [float(image.max()) for images, _ in loader for image in images]


def test_tree_of_tasks_and_classes(tree: Path) -> None:
    groups = find_images(tree, labelled=True)
    assert {name: (len(g), g.classes) for name, g in groups.items()} == {
        "birds": (3, ("gull", "owl", "wren")),
        "dogs": (6, ("beagle", "poodle")),
    }
    loader = ImageLoader([groups["dogs"]], pixels, seed=None, batch_size=4)
    assert len(loader) == 2
    batches = list(loader)
    assert [tuple(images.shape) for images, _ in batches] == [(4, 3, 4, 4), (2, 3, 4, 4)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    assert values(loader) == [0, 1, 2, 10, 11, 12]


def test_an_empty_class_keeps_its_number(tree: Path) -> None:
    (tree / "dogs" / "collie").mkdir()
    group = find_images(tree, labelled=True)["dogs"]
    assert group.classes == ("beagle", "collie", "poodle")
    assert set(group.labels or ()) == {0, 2}


def test_without_labels_any_depth_will_do(tree: Path) -> None:
    paint(tree / "loose.png", 200)
    assert {name: len(g) for name, g in find_images(tree).items()} == {"birds": 3, "dogs": 6, "": 1}


def test_groups_are_mixed_evenly_and_the_order_repeats(tree: Path) -> None:
    groups = find_images(tree).values()
    loader = ImageLoader(groups, pixels, limit=6)
    first = values(loader)
    assert sum(value > 90 for value in first) == 3
    assert all(a > 90 > b for a, b in zip(first[::2], first[1::2], strict=True))
    assert values(loader) == first
    assert values(ImageLoader(groups, pixels, limit=6, seed=5)) != first
    assert len(values(ImageLoader(groups, pixels))) == 9


def test_broken_images_are_skipped_and_counted(tree: Path) -> None:
    (tree / "dogs" / "beagle" / "0.png").write_bytes(b"nothing")
    whole = (tree / "dogs" / "beagle" / "1.png").read_bytes()
    (tree / "dogs" / "beagle" / "1.png").write_bytes(whole[: len(whole) // 2])
    groups = find_images(tree, labelled=True)
    loader = ImageLoader([groups["dogs"]], pixels, batch_size=2, seed=None)
    assert values(loader) == [2, 10, 11, 12]
    assert torch.cat([labels for _, labels in loader]).tolist() == [0, 1, 1, 1]
    assert len(loader.broken) == 2  # once, however often they are read
    assert "2 images were skipped; the first:" in str(loader.skipped())
    strict = ImageLoader([groups["dogs"]], pixels, strict=True)
    with pytest.raises(CalibrationError, match=r"beagle/.\.png cannot be read"):
        list(strict)


def test_broken_images_with_workers(tree: Path) -> None:
    (tree / "dogs" / "beagle" / "0.png").write_bytes(b"nothing")
    loader = ImageLoader(find_images(tree).values(), pixels, workers=1)
    assert len(values(loader)) == 8
    assert len(loader.broken) == 1


def test_not_one_good_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match="none of the images can be read"):
        list(ImageLoader(find_images(tmp_path).values(), pixels))


def test_whole_images_have_no_complaint(tree: Path) -> None:
    loader = ImageLoader(find_images(tree).values(), pixels)
    list(loader)
    assert loader.skipped() is None


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes(tmp_path: Path, mode: str, channels: int) -> None:
    Image.new("RGB", (4, 4), (9, 9, 9)).convert(mode).save(tmp_path / "a.png")
    loader = ImageLoader(find_images(tmp_path).values(), pixels, channels=channels)
    assert next(iter(loader))[0].shape == (1, channels, 4, 4)


def test_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    grey = np.full((2, 4, 4), 7, dtype=np.uint8)
    coloured = np.full((3, 4, 4, 3), 8, dtype=np.uint8)
    ready = np.full((2, 3, 4, 4), 0.25)
    np.savez(path, **{"a.images": grey, "a.labels": np.array([0, 1]), "b.images": coloured, "c.images": ready})
    groups = find_images(path)
    assert values(ImageLoader([groups["a"]], pixels, channels=1)) == [7, 7]
    assert values(ImageLoader([groups["b"]], pixels)) == [8, 8, 8]
    assert [g.prepared for g in groups.values()] == [False, False, True]
    images, labels = next(iter(ImageLoader([groups["c"]], pixels)))
    assert images.dtype == torch.float32
    assert torch.equal(images, torch.full((2, 3, 4, 4), 0.25))
    assert labels.tolist() == [-1, -1]
    with pytest.raises(CalibrationError, match=r"has no labels beside it: b\.labels"):
        find_images(path, labelled=True)
    np.savez(path, images=grey, labels=np.array([1, 0]))
    assert [label for _, ls in ImageLoader(find_images(path).values(), pixels, seed=None) for label in ls] == [1, 0]


ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"images": np.zeros((2, 4, 4))}, r"float64\[2, 4, 4\]"),
    ({"images": np.zeros((2, 3, 4, 5), dtype=np.uint8)}, r"uint8\[2, 3, 4, 5\]"),
    ({"images": np.zeros((2, 4, 4), dtype=np.int64)}, "images are uint8"),
    ({"images": np.zeros((2, 4, 4), dtype=np.uint8), "labels": np.zeros(3, dtype=int)}, "give 2 integers"),
    ({"x": np.zeros(3)}, "no array called images"),
    ({"images": np.array([{}])}, "cannot be read"),
]


@pytest.mark.parametrize(("arrays", "says"), ARRAYS)
def test_bad_archives(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CalibrationError, match=says):
        find_images(tmp_path / "a.npz")


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(CalibrationError, match="holds no images"):
        find_images(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(CalibrationError, match="neither a folder"):
        find_images(tmp_path / "a.txt")


# ---- accuracy


class Fixed(nn.Module):
    """Logits from the first pixel: the class that it names is the largest, with a given strength."""

    def __init__(self, classes: int, strength: float) -> None:
        super().__init__()
        self.classes, self.strength = classes, strength

    def forward(self, x: Tensor) -> Tensor:
        wanted = x[:, 0, 0, 0].long() % 10
        return torch.nn.functional.one_hot(wanted, 10)[:, : self.classes] * self.strength


def zipped() -> fxzip.ZippedModel:
    return hand_made(Fixed(2, 2.0), Fixed(3, 1.0))


def batch(pixel: list[int], labels: list[int]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.tensor(pixel).float()[:, None, None, None].expand(-1, 3, 2, 2), torch.tensor(labels))]


def test_accuracy_by_task_and_joint() -> None:
    # Task 0 has the stronger head: where both name a class, it wins the joint choice.
    data = {"task0": batch([0, 1, 1, 1], [0, 1, 0, 0]), "task1": batch([2, 1], [2, 1])}
    found = measure(zipped(), data, progress=False)
    assert found.tasks == {"task0": 50.0, "task1": 100.0}
    assert found.measured == {"task0": 4, "task1": 2}
    assert found.average == 75.0
    assert found.joint == pytest.approx(100 * (2 + 1) / 6)
    only = measure(zipped(), {"task1": data["task1"]}, progress=False)
    assert only.tasks == {"task1": 100.0}
    assert only.joint is None
    alone = measure_one("task0", Fixed(2, 1.0), data["task0"], progress=False)
    assert alone.tasks == {"task0": 50.0}
    text = table([found, alone], ["task0", "task1"])
    assert "75.0" in text
    assert "task0 alone" in text


def test_labels_that_do_not_fit_the_head() -> None:
    with pytest.raises(CalibrationError, match="a label is 2, and the head has 2 classes"):
        measure(zipped(), {"task0": batch([0], [2])}, progress=False)
    with pytest.raises(CalibrationError, match=r"folders of 3 classes .* and the head has 2"):
        measure(zipped(), {"task0": batch([0], [1])}, {"task0": ("a", "b", "c")}, progress=False)
    with pytest.raises(CalibrationError, match=r"gives .*; accuracy needs logits"):
        measure(hand_made(nn.Identity(), nn.Identity()), {"task0": batch([0], [0])}, progress=False)
