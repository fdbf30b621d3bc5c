"""The output layer as it stands in real models: found, refused where it must be, and compared with the model's own logits."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from localrl.policy.head import read_tokens
from localrl.policy.output_layer import Head
from localrl.settings import UserError

VOCABULARY, WIDTH = 40, 16

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
    ("granite", {"logits_scaling": 8.0}),
    ("cohere", {"logit_scale": 0.0625}),
    ("minicpm3", {"dim_model_base": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}),
    ("hyperclovax", {"logits_scaling": 0.25}),
    ("phi", {}),  # has a bias
]


def tiny(family: str, kind: torch.dtype = torch.float32, **changes: Any) -> Any:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | changes)), dtype=kind)
    return model.requires_grad_(False)


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_models_own_logits(family: str, changes: dict[str, Any], kind: torch.dtype) -> None:
    model = tiny(family, kind, **changes)
    head = Head.of(model)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings
    assert head.verify(model) < (1e-5 if kind == torch.float32 else 0.02)
    if kind == torch.bfloat16:
        return
    inputs, targets = torch.randint(3, VOCABULARY, (1, 24)), torch.randint(VOCABULARY, (24, 1))
    embedded = model.get_input_embeddings()(inputs).requires_grad_()
    z = model(inputs_embeds=embedded, use_cache=False).logits[0].double() / 0.7
    log_p = z.log_softmax(1)
    truth = torch.stack([log_p.gather(1, targets)[:, 0], -(log_p.exp() * log_p).sum(1), z.logsumexp(1)])
    hidden = model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
    logp, entropy, lse = read_tokens(hidden, targets[:, 0], head, temperature=0.7, chunk=10, tile=16)
    assert entropy is not None
    ours = torch.stack([logp, entropy, lse]).double()
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    pull = torch.randn(3, 24)
    one, two = (torch.autograd.grad((pull * out).sum(), embedded)[0] for out in (ours, truth))
    assert float((one - two).abs().max()) < 1e-5 * float(two.abs().max())


def test_a_family_that_does_what_we_do_not_know_is_found() -> None:
    class Doubled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 2 * out.logits
            return out

    model = Doubled(tiny("llama").config).requires_grad_(False)
    with pytest.raises(UserError, match="llama does something to its logits"):
        Head.of(model).verify(model)
    granite = tiny("granite", logits_scaling=8.0)
    with pytest.raises(UserError, match="granite does something to its logits"):
        Head(granite.lm_head.weight).verify(granite)


def test_inside_peft_it_is_still_the_live_tensor() -> None:
    model = tiny("llama")
    weight = model.lm_head.weight
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    head = Head.of(wrapped)
    assert head.weight is weight
    assert head.verify(wrapped) < 1e-5


def test_heads_that_cannot_be_read_say_why() -> None:
    with pytest.raises(UserError, match="being trained"):
        Head.of(tiny("llama").requires_grad_(True))
    with pytest.raises(UserError, match="carries an adapter"):
        Head.of(get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj", "lm_head"])))
    with pytest.raises(UserError, match="carries an adapter"):
        Head.of(get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])))
    with pytest.raises(UserError, match="carries an adapter"):
        Head.of(get_peft_model(tiny("llama", tie_word_embeddings=True), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3])))
    quantised = tiny("llama")
    quantised.lm_head = bnb.nn.Linear4bit(WIDTH, VOCABULARY, bias=False, quant_type="nf4").to("cpu")
    with pytest.raises(UserError, match="quantised"):
        Head.of(quantised)
    quantised.lm_head = bnb.nn.Linear8bitLt(WIDTH, VOCABULARY, bias=False, has_fp16_weights=False).to("cpu")
    with pytest.raises(UserError, match="quantised"):
        Head.of(quantised)
    with torch.device("meta"):
        offloaded = tiny("llama")
    with pytest.raises(UserError, match="offloaded"):
        Head.of(offloaded)
    with pytest.raises(UserError, match="has no output layer"):
        Head.of(tiny("llama").model)
