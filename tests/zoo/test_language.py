"""Beyond pictures: language models, transformers of torch.nn, recurrent layers. Oracles 1 to 5 of the design."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from tests.oracles import TOLERANCE, call, difference, mutations_missed, permutation_error, randomise, self_zip_errors

WORDS, WIDTH, HEADS, LENGTH = 11, 16, 4, 6
TOKENS = torch.randint(WORDS, (32, LENGTH), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(16, LENGTH, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Causal attention and an MLP."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (t.view(b, n, HEADS, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(c, -1))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
            mixed = (q @ k.transpose(-2, -1)).masked_fill(~mask, float("-inf")).softmax(-1) @ v
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, n, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A language model."""

    def __init__(self, tied: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(fused) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` on words."""

    def __init__(self, norm_first: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 24, 0.1, "gelu", norm_first=norm_first, batch_first=batch_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x.mean(1))


class CrossAttention(nn.Module):
    """``nn.MultiheadAttention`` with keys and values of their own, and its weights as a second output."""

    def __init__(self, width: int | None = None, weights: bool = False) -> None:
        super().__init__()
        self.weights = weights
        self.q, self.kv = nn.Linear(5, WIDTH), nn.Linear(5, width or WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=width, vdim=width, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        memory = self.kv(x)
        mixed, weights = self.attention(self.q(x), memory, memory, need_weights=self.weights)
        return (self.head(mixed), weights) if self.weights else self.head(mixed)


class Recurrent(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self, make: Callable[..., nn.Module] = nn.LSTM, **options: object) -> None:
        super().__init__()
        self.embed, self.before = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.rnn = make(WIDTH, 12, batch_first=True, **options)
        self.after, self.head = nn.Linear(24 if options.get("bidirectional") else 12, 10), nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.rnn(F.relu(self.before(self.embed(tokens))))
        return self.head(F.relu(self.after(x[:, -1])))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, float]] = {
    "gpt": (GPT, TOKENS, 1.0),
    "gpt, tied": (lambda: GPT(tied=True), TOKENS, 1.0),
    "gpt, explicit mask": (lambda: GPT(fused=False), TOKENS, 1.0),
    "encoder": (Encoder, TOKENS, 0.99),
    "encoder, norm first": (lambda: Encoder(norm_first=True), TOKENS, 0.99),
    "encoder, batch second": (lambda: Encoder(batch_first=False), TOKENS, 0.99),
    "attention": (CrossAttention, ROWS, 0.99),
    "attention of other width": (lambda: CrossAttention(8), ROWS, 0.99),
    "attention with weights": (lambda: CrossAttention(weights=True), ROWS, 0.99),
    "lstm": (Recurrent, TOKENS, 0.3),
    "lstm of two layers and ways": (lambda: Recurrent(bidirectional=True, num_layers=2), TOKENS, 0.3),
    "gru": (lambda: Recurrent(nn.GRU), TOKENS, 0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_oracles(name: str) -> None:
    make, x, coverage = CASES[name]
    torch.manual_seed(0)
    model = randomise(make(), x)
    spec = fxzip.analyse(model, x[:2])
    assert spec.coverage >= coverage, str(spec)
    assert not spec.frozen
    assert permutation_error(model, x, spec) < TOLERANCE
    moved = spec.permute(model)
    assert mutations_missed(moved, x, spec, most=20) == []
    errors = self_zip_errors(model, x, spec, cuts=(None, 0.0), methods=("permute", "zip"))
    assert max(errors.values()) < TOLERANCE, errors


def test_the_residual_stream_is_one_space_and_heads_are_blocks() -> None:
    spec = fxzip.analyse(randomise(GPT(), TOKENS), TOKENS)
    stream = spec["wte"]
    assert stream.size == WIDTH
    touched = {site.parameter for site in stream.sites}
    assert {"wpe.weight", "blocks.0.proj.weight", "blocks.1.down.weight", "norm.bias", "head.weight"} <= touched
    heads = [space for space in spec.spaces if space.size == HEADS]
    assert len(heads) == 2
    for space in heads:
        assert [inside.size for inside in spec.children(space.name)] == [WIDTH, WIDTH]  # queries and keys; values


def test_a_recurrent_layer_shares_its_inputs_and_keeps_its_state() -> None:
    spec = fxzip.analyse(randomise(Recurrent(), TOKENS), TOKENS)
    assert [(space.name, space.size) for space in spec.spaces] == [("embed", 16), ("before", 16), ("after", 10)]
    assert {"rnn.weight_ih_l0"} < {site.parameter for site in spec["before"].sites}
    assert len(spec.probed) == 1
    assert spec.probed[0].startswith("rnn (LSTM): axis 2 of the input with axis 1 of weight_ih_l0")
    assert "rnn (LSTM)" in str(spec)


def test_an_encoder_and_a_decoder_with_a_causal_mask() -> None:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source, self.target = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
            self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 24, batch_first=True)
            self.head = nn.Linear(WIDTH, WORDS)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
            return self.head(self.transformer(self.source(source), self.target(target), tgt_mask=mask))

    x = (TOKENS, TOKENS.flip(0))
    model = randomise(Translator(), x)
    spec = fxzip.analyse(model, x)
    assert spec.coverage > 0.99
    assert not spec.frozen
    assert permutation_error(model, x, spec) < TOLERANCE


# ---- tied embeddings


class Soft(nn.Module):
    """Words are read out inside the trunk, by the matrix that embeds them."""

    def __init__(self, tied: bool, functional: bool = False) -> None:
        super().__init__()
        self.wte, self.mid = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WORDS, bias=False)
        self.up, self.head = nn.Linear(WORDS, 12), nn.Linear(12, 3)
        self.functional = functional
        if tied:
            self.out.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        x = x + F.relu(self.mid(x))
        words = F.linear(x, self.out.weight) if self.functional else self.out(x)
        return self.head(F.relu(self.up(words.softmax(-1))))


@pytest.mark.parametrize("name", ["gpt", "gpt, partial", "soft", "soft, functional"])
def test_tied_embeddings_merge_as_untied_ones(name: str) -> None:
    """Whatever role the matrix has where: the result is that of networks with two matrices of the same values."""

    def make(tied: bool) -> nn.Module:
        return GPT(tied) if name.startswith("gpt") else Soft(tied, name.endswith("functional"))

    prepared = []
    for tied in (True, False):
        models = []
        for seed in range(2):
            torch.manual_seed(seed)
            weights = randomise(make(True), TOKENS, seed).state_dict()
            models.append(make(tied).double().eval())
            models[-1].load_state_dict(weights)
        prepared.append(fxzip.prepare(*models, example_inputs=TOKENS).observe([TOKENS], progress=False))
    for method in ("average", "permute", "zip"):
        for refit in (False, True):
            options = {"cut": "blocks.1" if name.endswith("partial") else None, "method": method, "refit": refit}
            tied, untied = (call(p.convert(progress=False, **options), TOKENS) for p in prepared)
            assert difference(untied, tied) < 1e-8, options


def test_a_merged_language_model_takes_sequences_as_its_parents_do() -> None:
    models = [randomise(GPT(tied=True), TOKENS, seed) for seed in range(2)]
    zipped = fxzip.zip(*models, [TOKENS], names=("prose", "code"), progress=False)
    one = zipped(TOKENS[:3], task="code")
    assert one.shape == (3, LENGTH, WORDS)
    later = TOKENS[:3].clone()
    later[:, -1] = (later[:, -1] + 1) % WORDS
    assert torch.equal(zipped(later, task="code")[:, :-1], one[:, :-1])  # causal as before
