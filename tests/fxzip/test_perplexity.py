"""Language models: perplexity and the accuracy of the next token, from Python and by ``fxzip eval``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner, Result

import fxzip
from fxzip import cli
from fxzip.accuracy import measure, measure_one, measure_tokens, table
from fxzip.data.tokens import LEFT_OUT, TokenBatches, find_tokens
from fxzip.errors import CalibrationError, OptionError
from tests.fxzip.served import hand_made

WORDS, LENGTH, WIDTH = 13, 7, 16
NAMES = ("prose", "code")


class Plain(nn.Module):
    """A causal language model that takes tokens only: a mean over what came before, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def body(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x))[:, None].chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None)
        return self.head(self.norm2(x + self.proj(mixed[:, 0])))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device)), None)


class Masked(Plain):
    """One with the inputs and outputs of Hugging Face's."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool = True) -> Any:
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=input_ids.device).tril()
        allowed = causal & (attention_mask[:, None, None] > 0)
        scores = torch.where(allowed, 0.0, -1e9)
        return {"logits": self.body(self.wte(input_ids) + self.wpe(position_ids), scores)}


def models(make: Callable[[], nn.Module]) -> list[nn.Module]:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(make().eval())
    return found


def texts(seed: int, count: int = 9, length: int = LENGTH) -> Tensor:
    return torch.randint(WORDS, (count, length), generator=torch.Generator().manual_seed(seed))


def padding(count: int = 9) -> Tensor:
    """1 up to a length of 2 or more."""
    lengths = torch.randint(2, LENGTH + 1, (count, 1), generator=torch.Generator().manual_seed(3))
    return (torch.arange(LENGTH) < lengths).long()


def merge(make: Callable[[], nn.Module], batch: Any) -> fxzip.ZippedModel:
    options: Any = {"names": NAMES, "method": "permute", "refit": False, "progress": False}
    return fxzip.zip(*models(make), [batch], **options)


@pytest.fixture(scope="module")
def plain() -> fxzip.ZippedModel:
    return merge(Plain, texts(5))


@pytest.fixture(scope="module")
def masked() -> fxzip.ZippedModel:
    mask = padding()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": texts(5), "attention_mask": mask, "position_ids": places, "use_cache": False}
    return merge(Masked, batch)


def by_hand(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> tuple[float, float, int]:
    """Perplexity, accuracy in % and how many tokens, one token after another."""
    losses, right = [], 0
    for row in range(len(tokens)):
        for place in range(1, tokens.shape[1]):
            if mask is None or mask[row, place]:
                before = logits[row, place - 1]
                losses.append(F.cross_entropy(before, tokens[row, place]).item())
                right += int(before.argmax() == tokens[row, place])
    return math.exp(sum(losses) / len(losses)), 100 * right / len(losses), len(losses)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def one_line(done: Result) -> str:
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.strip().splitlines()
    return line


# ---- in Python


def test_each_head_is_measured_on_its_own_texts(plain: fxzip.ZippedModel) -> None:
    given = {"prose": texts(1), "code": texts(2, 5)}
    found = measure_tokens(plain, given, batch_size=4, progress=False)
    for task, tokens in given.items():
        perplexity, percent, count = by_hand(plain(tokens, task=task), tokens)
        assert found.perplexity[task] == pytest.approx(perplexity, rel=1e-5)
        assert found.tasks[task] == pytest.approx(percent)
        assert found.measured[task] == count == len(tokens) * (LENGTH - 1)
    assert found.joint is None
    assert found.perplexity["prose"] != pytest.approx(found.perplexity["code"], rel=1e-3)


def test_masks_leave_out_padding_and_go_into_the_network(masked: fxzip.ZippedModel) -> None:
    tokens, mask = texts(1), padding()
    found = measure_tokens(masked, {"code": tokens}, {"code": mask}, batch_size=2, progress=False)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    perplexity, percent, count = by_hand(masked(**given, task="code")["logits"], tokens, mask)
    assert found.perplexity["code"] == pytest.approx(perplexity, rel=1e-5)
    assert (found.tasks["code"], found.measured["code"]) == (pytest.approx(percent), count)
    assert count == int(mask[:, 1:].sum()) < tokens[:, 1:].numel()
    other = torch.where(mask > 0, tokens, (tokens + 1) % WORDS)  # what is padding makes no difference
    again = measure_tokens(masked, {"code": other}, {"code": mask}, batch_size=2, progress=False)
    assert again.perplexity["code"] == pytest.approx(perplexity, rel=1e-5)
    whole = measure_tokens(masked, {"code": tokens}, progress=False)
    assert whole.measured["code"] == tokens[:, 1:].numel()


def test_a_mask_is_for_networks_without_one_too(plain: fxzip.ZippedModel) -> None:
    tokens, mask = texts(1), padding()
    found = measure_tokens(plain, {"prose": tokens.numpy()}, {"prose": mask.bool().numpy()}, progress=False)
    assert found.perplexity["prose"] == pytest.approx(by_hand(plain(tokens, task="prose"), tokens, mask)[0], rel=1e-5)


def test_a_parent_is_measured_on_the_same(plain: fxzip.ZippedModel) -> None:
    parent, tokens = models(Plain)[1].train(), texts(1)
    loader = TokenBatches(plain, "code", tokens, batch_size=4)
    found = measure_one("code", parent, loader, progress=False)
    assert parent.training
    perplexity, percent, _ = by_hand(parent(tokens), tokens)
    assert found.perplexity["code"] == pytest.approx(perplexity, rel=1e-5)
    assert found.tasks["code"] == pytest.approx(percent)
    shown = table([measure(plain, {"code": loader}, progress=False), found], ["code"])
    assert f"{perplexity:.2f}" in shown
    assert "tokens" in shown
    assert "joint" not in shown


def test_a_network_in_half_precision_and_one_that_knows_nothing() -> None:
    class Sure(nn.Module):
        """Sure of the token 0."""

        def forward(self, tokens: Tensor) -> Tensor:
            return F.one_hot(tokens * 0, WORDS).to(torch.bfloat16) * 1000

    zipped = hand_made(Sure(), Sure(), x=torch.zeros(2, LENGTH, dtype=torch.int64))
    found = measure_tokens(zipped, {"task0": torch.zeros(2, LENGTH, dtype=torch.int64)}, progress=False)
    assert (found.perplexity["task0"], found.tasks["task0"]) == (1.0, 100.0)
    found = measure_tokens(zipped, {"task0": torch.ones(2, LENGTH, dtype=torch.int64)}, progress=False)
    assert (found.perplexity["task0"], found.tasks["task0"]) == (math.inf, 0.0)


def test_the_next_token_is_the_label(plain: fxzip.ZippedModel) -> None:
    tokens, mask = np.array([[5, 6, 7, 8, 9, 10, 11]]), np.array([[0, 0, 1, 1, 1, 0, 1]])
    ((inputs, labels),) = TokenBatches(plain, "prose", tokens, mask)
    assert inputs.args[0].tolist() == tokens.tolist()
    assert labels.tolist() == [[LEFT_OUT, 7, 8, 9, LEFT_OUT, 11, LEFT_OUT]]


@pytest.mark.parametrize(
    ("tokens", "mask", "says"),
    [
        (texts(0, length=5), None, r"have 5 tokens, and the network was traced with 7 .* pad them to 7 \(prose\.mask"),
        (texts(0) + 4, None, "token ids are 4 to 16, and the vocabulary of its head is 0 to 12"),
        (texts(0) - 1, None, "token ids are -1 to 11"),
        (texts(0).float(), None, r"prose\.tokens: float32\[9, 7\]; give whole numbers \(n, length\)"),
        (texts(0)[0], None, r"prose\.tokens: int64\[7\]"),
        (texts(0)[:0], None, r"prose\.tokens: int64\[0, 7\]"),
        (texts(0), torch.ones(9, 6), r"the mask is float32\[9, 6\]; give 0 or 1 for each token, \[9, 7\]"),
        (texts(0), 2 * padding(), "give 0 or 1 for each token"),
        (texts(0), torch.zeros(9, LENGTH), "prose: no token follows another"),
    ],
)
def test_tokens_that_do_not_fit(plain: fxzip.ZippedModel, tokens: Tensor, mask: Tensor | None, says: str) -> None:
    with pytest.raises(CalibrationError, match=says):
        measure_tokens(plain, {"prose": tokens}, None if mask is None else {"prose": mask}, progress=False)


def test_names_that_are_not_there(plain: fxzip.ZippedModel) -> None:
    with pytest.raises(OptionError, match="no task 'verse'"):
        measure_tokens(plain, {"verse": texts(0)}, progress=False)
    with pytest.raises(CalibrationError, match="a mask of 'code', and tokens of prose only"):
        measure_tokens(plain, {"prose": texts(0)}, {"code": padding()}, progress=False)
    with pytest.raises(OptionError, match="no task 'verse'"):
        measure(plain, {"verse": [(texts(0), texts(0))]}, progress=False)


class Pooled(Plain):
    """One answer for a whole text."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).mean(1)


class Cloze(Plain):
    """One that sees the whole text, as BERT does."""

    def body(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        return super().body(x, torch.zeros(LENGTH, LENGTH))


class Translator(Plain):
    """One that takes two texts."""

    def forward(self, tokens: Tensor, source: Tensor) -> Tensor:
        return super().forward(tokens) + self.head(self.wte(source))


def test_networks_that_are_no_language_models(plain: fxzip.ZippedModel) -> None:
    two = {"task0": texts(0)}
    pooled, tokens = torch.fx.symbolic_trace(Pooled()), texts(0, 2)
    with pytest.raises(
        CalibrationError, match=r"task0 gives float32\[2, 13\]; perplexity needs logits \(batch, tokens"
    ):
        measure_tokens(hand_made(pooled, pooled, x=tokens), two, progress=False)
    cloze = torch.fx.symbolic_trace(Cloze())
    with pytest.raises(
        CalibrationError, match="task0: what its head gives for a token depends on the tokens behind it"
    ):
        measure_tokens(hand_made(cloze, cloze, x=tokens), two, progress=False)
    images = hand_made(nn.Identity(), nn.Identity(), x=torch.zeros(2, 3, 4, 4))
    with pytest.raises(CalibrationError, match=r"takes no token ids \(batch, length\), but x float32\[2, 3, 4, 4\]"):
        measure_tokens(images, two, progress=False)
    with pytest.raises(CalibrationError, match="no example of its inputs"):
        measure_tokens(hand_made(nn.Identity(), nn.Identity()), two, progress=False)
    with pytest.raises(
        CalibrationError, match=r"the head of prose gives .*\[9, 7, 13\]; accuracy needs logits .* TASK"
    ):
        measure(plain, {"prose": [(texts(0), torch.zeros(9, dtype=torch.int64))]}, progress=False)
    with pytest.raises(CalibrationError, match=r"batch 0 of int64\[9, 5\] does not fit the model"):
        measure(plain, {"prose": [(texts(0, length=5), texts(0, length=5))]}, progress=False)
    with pytest.raises(CalibrationError, match="prose: the loader gave no labels to measure"):
        measure(plain, {"prose": [(texts(0), torch.full((9, LENGTH), LEFT_OUT))]}, progress=False)


def test_inputs_that_do_not_follow_from_tokens() -> None:
    batch = {"tokens": texts(0), "source": texts(1)}
    with pytest.raises(CalibrationError, match=r"also takes source \(int64\[\d+, 7\]\), which does not follow"):
        measure_tokens(merge(Translator, batch), {"code": texts(0)}, progress=False)


# ---- by the command


@pytest.fixture(scope="module")
def saved(plain: fxzip.ZippedModel, masked: fxzip.ZippedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain/, masked/ and texts.npz of both tasks, prose with a mask."""
    folder = tmp_path_factory.mktemp("language")
    plain.save(folder / "plain")
    masked.save(folder / "masked")
    arrays = {"prose.tokens": texts(1), "prose.mask": padding(), "code.tokens": texts(2, 5).to(torch.uint8)}
    np.savez(folder / "texts.npz", **{name: array.numpy() for name, array in arrays.items()})
    return folder


@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_eval_of_a_saved_network(saved: Path, tmp_path: Path, kind: str) -> None:
    data, report = saved / "texts.npz", tmp_path / "e.json"
    done = run("eval", saved / kind, "--data", data, "--batch-size", 4, "--quiet", "--json", report)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(report.read_text())["rows"]
    zipped = fxzip.load(saved / kind)
    for task, tokens, mask in (("prose", texts(1), padding()), ("code", texts(2, 5), torch.ones(5, LENGTH).long())):
        if kind == "plain":
            logits = zipped(tokens, task=task)
        else:
            given = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
            logits = zipped(**given, position_ids=(mask.cumsum(1) - 1).clamp(min=0), task=task)["logits"]
        perplexity, percent, count = by_hand(logits, tokens, mask)
        assert row["perplexity"][task] == pytest.approx(perplexity, rel=1e-5)
        assert row["tasks"][task] == pytest.approx(percent)
        assert row["measured"][task] == count
        assert f"{perplexity:.2f}" in done.stdout
    assert row["name"] == "prose + code"


def test_eval_of_one_task_and_some_sequences(saved: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "only.npz", tokens=texts(1).numpy(), mask=padding().numpy())
    alone = run("eval", saved / "plain", "--data", tmp_path / "only.npz", "--task", "prose", "--quiet")
    named = run("eval", saved / "plain", "--data", saved / "texts.npz", "--task", "prose", "--quiet")
    assert alone.exit_code == 0, alone.output
    assert alone.stdout == named.stdout
    few = run("eval", saved / "plain", "--data", saved / "texts.npz", "--task", "code", "--limit", 2, "--quiet")
    assert few.exit_code == 0, few.output
    assert "tokens12\n" in few.stdout.replace(" ", "")  # 2 texts of 7 tokens


def test_eval_says_what_does_not_fit(saved: Path, tmp_path: Path) -> None:
    data = tmp_path / "d.npz"

    def told(*more: str, **arrays: Any) -> str:
        np.savez(data, **{name.replace("_", "."): array for name, array in arrays.items()})
        return one_line(run("eval", saved / "plain", "--data", data, "--quiet", *more))

    both = {"prose_tokens": texts(1).numpy(), "code_tokens": texts(2).numpy()}
    assert "has no token ids of the task 'code': it has 'prose'" in told(prose_tokens=texts(1).numpy())
    assert "has no token ids of the task 'prose': it has ''; " in told(tokens=texts(1).numpy())
    assert "the network was traced with 7" in told(**{**both, "code_tokens": texts(2, length=9).numpy()})
    assert "token ids are 0 to 13" in told(**{**both, "code_tokens": np.arange(14).reshape(2, 7)})
    assert "code.tokens: float64[2, 7]; give whole numbers" in told(**{**both, "code_tokens": np.zeros((2, 7))})
    assert "d.npz cannot be read as an .npz archive" in told(**{**both, "code_tokens": np.array([{}])})
    assert "--originals: no recipe beside the network names the checkpoints" in told("--originals", **both)
    assert "--mean says how images are prepared, and " in told("--mean", "0.5", **both)
    x, labels = np.zeros((2, 1, 4, LENGTH), dtype=np.float32), np.zeros(2, dtype=int)
    images = {f"{task}_{kind}": array for task in NAMES for kind, array in (("images", x), ("labels", labels))}
    assert "batch 0 of float32[2, 1, 4, 7] does not fit the model" in told(**images)


def test_archives_of_tokens(saved: Path, tmp_path: Path) -> None:
    found = find_tokens(saved / "texts.npz")
    assert {name: (len(group), group.mask is None) for name, group in found.items()} == {
        "prose": (9, False),
        "code": (5, True),
    }
    assert found["prose"].some([2, 0]).ids.tolist() == texts(1)[[2, 0]].tolist()
    assert find_tokens(tmp_path) == {}
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 4, 4), dtype=np.uint8))
    assert find_tokens(tmp_path / "images.npz") == {}
