"""Keys and values in 8 bits: nearly the same distribution, a fraction of the bytes, and the same text whatever the wave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from localrl.batch import Prompt, Request
from localrl.demo.task import questions, row
from localrl.engines.cache import BLOCK, Cache, Shape
from localrl.engines.decoder import Decoder
from localrl.engines.store import EightBit, Full, rounded
from localrl.engines.torch import TorchEngine
from localrl.policy.place import DEMO_MODEL
from localrl.settings import UserError
from tests.engines.models import load, requests, sampling
from tests.engines.test_decoder import stepped
from tests.engines.test_torch_engine import tokens_of
from tests.memory.tracker import StorageTracker


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_half_a_step_at_most(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-2, 2, 50)[:, None]).to(dtype)
    x[0, 0, 0] = 0
    codes, scales = rounded(x)
    assert codes.dtype == torch.int8 and scales.dtype == dtype and codes.abs().amax() == 127
    limit = 0.5 * scales.float() + (x.abs().amax(-1, keepdim=True).float() * torch.finfo(dtype).eps)     # where a scale was rounded down
    assert ((codes * scales.float() - x.float()).abs() <= limit).all()
    store = EightBit.of(x[None].expand(2, -1, -1, -1, -1))
    assert torch.equal(store.read(0), (codes.to(dtype) * scales).flatten(0, 1))
    assert torch.equal(store.select(torch.tensor([2, 0])).read(1), store.codes[1][:, [2, 0]].to(dtype).mul(store.scales[1][:, [2, 0]]).flatten(0, 1))
    assert torch.equal(store.joined(x[None].expand(2, -1, -1, -1, -1)).read(0, 50), store.read(0))


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1 / 4 + 1 / 128), (torch.bfloat16, 1 / 2 + 1 / 128)])
def test_bytes(dtype: torch.dtype, share: float) -> None:
    """One and one scale in 128 instead of two (bf16), or of four (fp32); the block that is being filled comes on top."""
    shape = Shape(layers=3, heads=4, kv_heads=2, width=128, scale=1.0, dtype=dtype)

    def taken(eight_bit: bool, fixed: bool) -> int:
        with StorageTracker() as tracker:
            cache = Cache(shape, [512, 100], [0, 0, 1, 1], 1024 + BLOCK, torch.device("cpu"), fixed, eight_bit)
            cache.fill(1024 + BLOCK)
            return tracker.now

    block = 3 * 2 * 2 * 4 * BLOCK * 128 * dtype.itemsize
    for fixed in (False, True):
        full = taken(False, False) - block
        assert taken(True, fixed) - block == pytest.approx(share * full, rel=0.01)


def demo() -> tuple[object, object, list[Prompt]]:
    """The embedded model, which can add, and what it is asked."""
    model, tokenizer = load(DEMO_MODEL, "none", adapter=False)
    asked = [row(question)["prompt"] for question, _ in zip(questions(5, held_out=True), range(24), strict=False)]
    texts = [tokenizer.apply_chat_template(turns if isinstance(turns, list) else [{"role": "user", "content": turns}], add_generation_prompt=True)
             for turns in asked]  # fmt: skip
    return model, tokenizer, [Prompt(i, tuple(text["input_ids"]), "") for i, text in enumerate(texts)]


def test_the_demo_model_says_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localrl.engines.cache.FIRST_WIDTH", BLOCK)  # widths double on the way
    model, tokenizer, prompts = demo()
    greedy = sampling(temperature=0.0, max_completion_length=120)
    asked = [Request(prompt) for prompt in prompts]
    full, eight = (TorchEngine(model, tokenizer, greedy, 0, kv_cache=kind).generate(asked, 0) for kind in ("full", "int8"))
    same = sum(a.text == b.text for a, b in zip(full, eight, strict=True))
    assert same >= 20, same
    assert max(len(r.tokens) for r in full) > BLOCK                  # prompts are rounded at once, responses from here on

    contexts, owner = [p.tokens for p in prompts], list(range(len(prompts)))

    def logp(eight_bit: bool, fixed: bool) -> Tensor:
        with torch.no_grad():
            logits, cache = (decoder := Decoder(model, False, 300, fixed, eight_bit)).prefill(contexts, owner, 99)
            found = [logits]
            for t in range(99):
                cache.grow()
                found.append(decoder.step(torch.tensor([r.tokens[t % len(r.tokens)] for r in full]), cache))      # its answer, again and again
        return torch.log_softmax(torch.stack(found, 1), -1)

    exact, close = logp(False, False), logp(True, False)
    kl = (exact.exp() * (exact - close)).sum(-1)
    print(f"KL mean {kl.mean():.2e}, largest {kl.max():.2e} nats; same text {same} of 24")
    assert 0 < kl.mean() < 1e-4 and kl.max() < 0.02
    torch.testing.assert_close(logp(True, True), close, atol=1e-4, rtol=0)               # the form that can be captured


def test_a_rollout_hardly_depends_on_the_wave(make_model: Callable[..., Path]) -> None:
    """Sums of another order may tip a number over the edge of its 8 bits, and then a token: on some processors, of few rollouts."""
    model, tokenizer = load(make_model("qwen3", head_dim=24))
    model.generation_config.eos_token_id = list(range(0, 256, 20))                        # rows leave all the time
    asked = requests(count=4, samples=5)

    def sampled(concurrent: int | None, weights: str = "auto") -> dict[tuple[int, int], tuple[int, ...]]:
        settings = sampling(concurrent=concurrent, max_completion_length=60, weights=weights)
        return tokens_of(TorchEngine(model, tokenizer, settings, 7, kv_cache="int8").generate(asked, 1))

    whole = sampled(None)
    assert max(map(len, whole.values())) > 2 * BLOCK and min(map(len, whole.values())) < BLOCK
    others = [*(sampled(concurrent) for concurrent in (1, 3, 7)), sampled(4, "live")]
    assert all(sum(other[row] != whole[row] for row in whole) <= 2 for other in others)


def test_rows_leave_in_both_forms_alike(make_model: Callable[..., Path]) -> None:
    model, _ = load(make_model("llama"), "none")
    answers = [[(17 * i + 5 * t) % 256 for t in range(20)] for i in range(3)]
    grown, fixed = (stepped(Decoder(model, False, 64, form, eight_bit=True), answers) for form in (False, True))
    torch.testing.assert_close(fixed, grown, atol=1e-4, rtol=0, equal_nan=True)
    exact = stepped(Decoder(model, False, 64), answers)
    assert 0 < (grown - exact).abs().nanmean() < 0.01 * exact.abs().nanmean()


def test_the_engine_says_that_it_is_not_quite_the_policy(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("llama"), "none", adapter=False)
    assert TorchEngine(model, tokenizer, sampling(), 0).exact and not TorchEngine(model, tokenizer, sampling(), 0, kv_cache="int8").exact
    gemma, tokenizer = load(make_model("gemma2"), "none", adapter=False)
    with pytest.raises(UserError, match=r"memory.kv_cache = 'int8' but .* Gemma2ForCausalLM"):
        TorchEngine(gemma, tokenizer, sampling(), 0, kv_cache="int8").generate(requests(), 0)


def test_full_precision_is_kept_as_it_is() -> None:
    block = torch.randn(2, 2, 3, 5, 8)
    store = Full.of(block)
    assert torch.equal(store.read(1), block[1].flatten(0, 1)) and store.values.data_ptr() != block.data_ptr()
