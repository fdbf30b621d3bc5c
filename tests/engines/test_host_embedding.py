"""The embedding in the host's memory: the same logits, whoever reads the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from localrl.engines.decoder import Decoder
from localrl.engines.graph import capturable
from localrl.engines.weights import compute_device
from localrl.policy.load import keep_embedding_on_host
from localrl.settings import UserError
from tests.engines.models import by_name, engine, fingerprint, load, requests

OWN = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False}
TOKENS = torch.tensor([[5, 9, 200, 31, 7]])


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen3", {"head_dim": 24}), ("gemma3_text", OWN)])
def test_logits_and_rollouts_are_the_same(make_model: Callable[..., Path], family: str, changes: dict[str, object]) -> None:
    model, tokenizer = load(make_model(family, **changes), "nf4")
    with torch.no_grad():
        before = model(input_ids=TOKENS, use_cache=False).logits
    asked = engine(model, tokenizer).generate(requests(), 0)
    whole = fingerprint(model)
    assert keep_embedding_on_host(model) == 0                        # nothing to move
    assert model.get_input_embeddings().weight.device.type == "cpu" and fingerprint(model) == whole
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, before)
    assert by_name(engine(model, tokenizer).generate(requests(), 0)) == by_name(asked)


def test_where_the_embedding_is_the_output_layer_it_stays(make_model: Callable[..., Path]) -> None:
    model, _ = load(make_model("llama", tie_word_embeddings=True), "none")
    with pytest.raises(UserError, match="embedding_on_host = true but this llama model's embedding is its output layer"):
        keep_embedding_on_host(model)


def test_rows_come_to_where_the_model_computes(make_model: Callable[..., Path]) -> None:
    """By a device that holds nothing, in place of a card: what is looked up on the host arrives there."""
    model, _ = load(make_model("llama"), "none", adapter=False)
    inner = model.model
    expected = inner.embed_tokens(TOKENS)
    weight = inner.embed_tokens.weight
    model.to("meta")
    inner.embed_tokens.weight = weight
    assert compute_device(model).type == "meta" and not capturable(model)
    keep_embedding_on_host(model)
    rows = inner.embed_tokens(TOKENS)
    assert rows.device.type == "meta" and rows.shape == expected.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card(make_model: Callable[..., Path]) -> None:
    model, _ = load(make_model("llama"), "none", adapter=False)
    model.to("cuda")
    contexts, owner, tokens = [(5, 9, 200), (31, 7)], [0, 0, 1], torch.tensor([3, 4, 5], device="cuda")

    def logits() -> torch.Tensor:
        decoder = Decoder(model, False, 8)
        first, cache = decoder.prefill(contexts, owner, 4)
        cache.grow()
        return torch.cat((first, decoder.step(tokens, cache)))

    with torch.no_grad():
        before, taken = logits(), torch.cuda.memory_allocated()
        moved = keep_embedding_on_host(model)
        assert moved == model.model.embed_tokens.weight.nbytes > 0 and torch.cuda.memory_allocated() <= taken - moved
        assert not capturable(model) and torch.equal(logits(), before)
        assert torch.equal(model(input_ids=TOKENS.cuda(), use_cache=False).logits, model(input_ids=TOKENS, use_cache=False).logits)
