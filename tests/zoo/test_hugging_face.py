"""Hugging Face's models with random weights (the extra ``hf``): oracles 1 to 5, and inputs and outputs by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fxzip
from fxzip import cli
from tests.oracles import (
    TOLERANCE,
    call,
    difference,
    images,
    mutations_missed,
    permutation_error,
    randomise,
    self_zip_errors,
)

transformers = pytest.importorskip("transformers")

WORDS = 31
TOKENS = torch.randint(WORDS, (8, 6), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


class Logits(nn.Module):
    """One input, one output: what the oracles take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def make(name: str) -> nn.Module:
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=WORDS, n_positions=8, n_embd=16, n_layer=2, n_head=4)
        return transformers.GPT2LMHeadModel(config)
    if name == "bert":
        config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=8, num_labels=3, **SIZES)
        return transformers.BertForSequenceClassification(config)
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **SIZES)
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_oracles(name: str) -> None:
    x = images(8, 16) if name == "vit" else TOKENS
    model = randomise(Logits(make(name)), x)
    spec = fxzip.analyse(model, x[:2])
    assert spec.coverage > 0.999
    assert not spec.frozen
    assert permutation_error(model, x, spec) < TOLERANCE
    assert mutations_missed(model, x, spec, most=15) == []
    errors = self_zip_errors(model, x, spec, cuts=(None, 0.0), methods=("permute", "zip"))
    assert max(errors.values()) < TOLERANCE, errors


def test_a_merge_of_language_models_by_their_own_names() -> None:
    batch = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "use_cache": False}
    models = [make("gpt2").double().eval() for _ in range(2)]
    zipped = fxzip.zip(*models, [batch], method="permute", names=("prose", "code"), progress=False)
    assert zipped(**batch, task="code")["logits"].shape == (8, 6, WORDS)
    ensemble = fxzip.zip(*models, [batch], cut=0.0, progress=False)
    expected = tuple(call(model, batch).logits for model in models)
    assert difference(expected, tuple(out["logits"] for out in call(ensemble, batch))) < TOLERANCE


def causal(name: str) -> nn.Module:
    """A small language model of a family, with random weights; its layers have no more biases than the family has."""
    if name == "gpt2":
        return make("gpt2")
    sizes = {**SIZES, "vocab_size": WORDS, "num_key_value_heads": 2, "max_position_embeddings": 16}
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    if name == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes))
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, tie_word_embeddings=True))


def two_causal(name: str) -> list[Any]:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(causal(name).eval())
    return models


def padded() -> Tensor:
    """The mask of `TOKENS`, of which every third sequence is short."""
    mask = torch.ones_like(TOKENS)
    mask[::3, 4:] = 0
    return mask


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2"])
def test_language_models_as_users_have_them(name: str) -> None:
    """As they come, with their cache: padded batches go in, and what comes out generates."""
    models, mask = two_causal(name), padded()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    loader = [{"input_ids": TOKENS, "attention_mask": mask, "position_ids": places, "labels": TOKENS}]
    refit = fxzip.RefitOptions(biases=False, rounds=0, ridge=0.1)
    with pytest.warns(UserWarning, match="is a DynamicCache, which a graph cannot give"):
        zipped = fxzip.zip(*models, loader, names=("prose", "code"), method="permute", refit=refit, progress=False)
    found = zipped(input_ids=TOKENS, attention_mask=mask, position_ids=places, task="code")
    assert list(found) == ["logits"]
    (code,) = (model for task, model in zipped.as_models().items() if task == "code")
    prompt = TOKENS[:2, :4]
    generated = code.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False, use_cache=True,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    whole = torch.ones_like(generated)  # as long as the examples: a traced network takes no other length
    given = {"input_ids": generated, "attention_mask": whole, "position_ids": whole.cumsum(1) - 1}
    assert torch.equal(zipped(**given, task="code")["logits"][:, 3:5].argmax(-1), generated[:, 4:])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_perplexity_is_what_the_models_own_loss_says(name: str, tmp_path: Path) -> None:
    models, mask = two_causal(name), padded()
    batch = {"input_ids": TOKENS, "attention_mask": mask, "use_cache": False}
    options: dict[str, Any] = {"method": "permute", "refit": False, "progress": False}
    fxzip.zip(*models, [batch], names=("prose", "code"), **options).save(tmp_path / "m")
    side_by_side = fxzip.zip(*models, [batch], names=("prose", "code"), cut=0.0, **options)
    side_by_side.save(tmp_path / "e")
    tokens, lengths = TOKENS.flip(0), mask.flip(0)
    arrays = {f"{task}.{kind}": value.numpy() for task in ("prose", "code") for kind, value in
              (("tokens", tokens), ("mask", lengths))}  # fmt: skip
    np.savez(tmp_path / "t.npz", **arrays)
    for folder, parts in (
        ("m", fxzip.load(tmp_path / "m").as_models(models)),
        ("e", {"prose": models[0], "code": models[1]}),
    ):
        arguments = ["eval", tmp_path / folder, "--data", tmp_path / "t.npz", "--quiet", "--json", tmp_path / "r.json"]
        done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
        for task, model in parts.items():
            given = {"input_ids": tokens, "attention_mask": lengths}
            loss = model(**given, labels=tokens.masked_fill(lengths == 0, -100)).loss
            assert row["perplexity"][task] == pytest.approx(loss.exp().item(), rel=1e-4)


# ---- back into their own classes


QUICK: dict[str, Any] = {
    "method": "select",
    "refit": fxzip.RefitOptions(rounds=0, ridge=1e-2, biases=False),
    "progress": False,
}


def merged(name: str) -> tuple[list[nn.Module], fxzip.ZippedModel, dict[str, Any]]:
    batch = {"pixel_values": images(8, 16).float()} if name == "vit" else {"input_ids": TOKENS}
    if name == "gpt2":
        batch = {**batch, "use_cache": False}
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(make(name).eval())
    return models, fxzip.zip(*models, [batch], names=("a", "b"), hold_back=False, **QUICK), batch


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
@pytest.mark.parametrize("layout", ["models", "deltas"])
def test_folders_that_from_pretrained_reads(name: str, layout: Any, tmp_path: Path) -> None:
    models, zipped, batch = merged(name)
    folder = zipped.save(tmp_path / "out", layout=layout)
    kinds = {
        "gpt2": transformers.AutoModelForCausalLM,
        "bert": transformers.AutoModelForSequenceClassification,
        "vit": transformers.AutoModelForImageClassification,
    }
    for task, model, own in zip(zipped.names, zipped.as_models().values(), models, strict=True):
        assert model.state_dict().keys() == own.state_dict().keys()
        again = kinds[name].from_pretrained(folder / task).eval()
        assert type(again) is type(own)
        expected = call(zipped, batch)[list(zipped.names).index(task)]["logits"]
        assert difference(expected, call(model, batch).logits) < 1e-4
        assert difference(call(model, batch).logits, call(again, batch).logits) < 1e-6


def test_generate_gives_what_the_graph_gives() -> None:
    """The graph takes as many tokens as it was merged on: what comes behind a token changes nothing."""
    _, zipped, _ = merged("gpt2")
    for task, model in zipped.as_models().items():
        for start in TOKENS[:3, :3]:
            found = model.generate(start[None], max_new_tokens=3, do_sample=False, pad_token_id=0)[0]
            tokens = torch.zeros(1, 6, dtype=torch.long)
            tokens[0, :3] = start
            for place in range(3, 6):
                with torch.no_grad():
                    logits = zipped(input_ids=tokens, use_cache=False, task=task)["logits"]
                tokens[0, place] = logits[0, place - 1].argmax()
            assert found.tolist() == tokens[0].tolist()
