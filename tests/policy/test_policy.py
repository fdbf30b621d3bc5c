"""One quantised base, adapters on it: read, update, save, load, and nothing wrong in silence."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from localrl.batch import Batch, Prompt, Request, Rollout, collate
from localrl.config import Run, build
from localrl.policy.adapters import using
from localrl.policy.load import ADAPTER
from localrl.policy.policy import Policy
from localrl.settings import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
QUANTIZATIONS = ["none", "nf4", "int8"]


def a_run(folder: Path, **sections: Any) -> Run:
    values: dict[str, Any] = {
        "model": {"path": str(folder), "quantization": "nf4", "device": "cpu"},
        "data": {"path": "unused.jsonl"},
        "rewards": {"functions": [{"function": "exact_answer"}]},
        "algorithm": {"name": "grpo"},
        "adapter": {"lora_r": 4, "lora_alpha": 8},
        "optim": {"learning_rate": 0.01},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build(values)


def a_policy(run: Run, *, critic: bool = False, checkpointing: bool = True, perturbed: bool = True) -> Policy:
    policy = Policy.create(run, critic=critic, checkpointing=checkpointing, head_chunk=8)
    if perturbed:                                                    # B starts at 0: give the adapters something to say
        torch.manual_seed(1)
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    return policy


def a_batch(seed: int = 0, sizes: tuple[tuple[int, int], ...] = ((5, 7), (5, 3), (9, 1), (2, 6))) -> Batch:
    draw = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 256, (count,), generator=draw).tolist())

    rows = [Rollout(Request(Prompt(i, tokens(p), "")), tokens(t), "", True, 0, rewards=(1.0,)) for i, (p, t) in enumerate(sizes)]
    return collate(rows, (1.0,), 16)


def gradients(policy: Policy, batch: Batch, rows: list[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    policy.drop_gradients()
    for part in rows or [torch.arange(len(batch))]:
        readout = policy.read(batch[part], {"logp", "entropy"})
        (readout.logp.sum() + 0.3 * readout.entropy.sum()).backward()
    found = {n: p.grad.clone() for n, p in policy.trainable() if p.grad is not None}
    policy.drop_gradients()
    return found


def hash_of_base(policy: Policy) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted([*policy.model.named_parameters(), *policy.model.named_buffers()]):
        if "lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                digest.update(state.absmax.detach().contiguous().view(torch.uint8).numpy().tobytes())
                digest.update(str(getattr(state, "packing_format_for_cpu", None)).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_columns_are_those_of_the_model_at_the_right_place(make_model: Callable[..., Path], quantization: str) -> None:
    """Token t is predicted one position before it; context and padding have no part."""
    run = a_run(make_model(), model={"quantization": quantization}, rollout={"temperature": 0.7})
    policy, batch = a_policy(run), a_batch()
    readout = policy.read(batch, {"logp", "entropy", "lse", "ref"})
    for i in range(len(batch)):
        context, length = int(batch.context_length[i]), int(batch.response_length[i])
        ids = torch.cat([batch.context[i, :context], batch.tokens[i, :length]])
        for column, adapter in (("logp", ADAPTER), ("ref", None)):
            with torch.no_grad(), using(policy.model, adapter):
                logits = policy.model(input_ids=ids[None]).logits[0, context - 1 : -1].float() / 0.7
            scores = logits.log_softmax(-1)
            expected = scores.gather(1, ids[context:, None])[:, 0]
            torch.testing.assert_close(getattr(readout, column)[i, :length], expected, rtol=1e-4, atol=2e-5)
            if column == "logp":
                torch.testing.assert_close(readout.entropy[i, :length], -(scores.exp() * scores).sum(1), rtol=1e-4, atol=2e-5)
                torch.testing.assert_close(readout.lse[i, :length], logits.logsumexp(1), rtol=1e-4, atol=2e-5)
        assert not readout.logp[i, length:].any()


def test_a_window_reads_its_own_tokens_and_the_critic_all(make_model: Callable[..., Path]) -> None:
    """Earlier tokens are context for the policy: no logits are made of them. Values are wanted of every token."""
    policy, batch = a_policy(a_run(make_model()), critic=True), a_batch()
    assert policy.critic is not None
    torch.nn.init.normal_(policy.critic.weight)
    fresh = batch.mask & (torch.arange(batch.mask.shape[1]) >= 2)
    whole, part = policy.read(batch, {"logp", "value", "ref"}), policy.read(replace(batch, fresh=fresh), {"logp", "value", "ref"})
    for name in ("logp", "ref"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name) * fresh, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(part.value, whole.value, rtol=1e-5, atol=1e-6)
    assert (part.value != 0)[batch.mask].all()


def test_a_stored_reference_is_not_read_again(make_model: Callable[..., Path]) -> None:
    policy, batch = a_policy(a_run(make_model())), a_batch()
    stored = torch.full(batch.mask.shape, -3.0) * batch.mask
    assert policy.read(replace(batch, ref=stored), {"ref"}).ref is stored


def test_critic_and_policy_have_rates_and_norms_of_their_own(make_model: Callable[..., Path]) -> None:
    run = a_run(make_model(), optim={"learning_rate": 1e-3, "critic_learning_rate": 1e-2, "max_grad_norm": 0.5})
    policy, batch = a_policy(run, critic=True), a_batch()
    readout = policy.read(batch, {"logp", "value"})
    (readout.logp.sum() + 100 * (readout.value - 1).square().sum()).backward()
    found = policy.update(rate=0.5)
    assert [group["lr"] for group in policy.optimizer.param_groups] == pytest.approx([5e-4, 5e-3])
    assert found["critic_grad_norm"] != found["grad_norm"]
    before = {n: p.detach().clone() for n, p in policy.trainable()}
    policy.read(batch, {"logp"}).logp.sum().backward()
    policy.update(rate=0.0)                                          # what a controller asks for where gradients cancel
    assert all(torch.equal(p, before[n]) for n, p in policy.trainable())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_splitting_a_step_changes_nothing(make_model: Callable[..., Path], quantization: str) -> None:
    policy, batch = a_policy(a_run(make_model(), model={"quantization": quantization})), a_batch()
    whole = gradients(policy, batch)
    assert len(whole) == 2 * 7 * 2
    for name, gradient in gradients(policy, batch, [torch.tensor([2]), torch.tensor([3, 0]), torch.tensor([1])]).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-5)
    read = policy.read_whole(batch, {"logp"}, [torch.tensor([1, 3]), torch.tensor([0, 2])])
    torch.testing.assert_close(read.logp, policy.read(batch, {"logp"}).logp.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_gradients_after_sampling_equal_those_before(make_model: Callable[..., Path], quantization: str) -> None:
    """bitsandbytes' evaluation path would repack the weights here and lose gradients without a word."""
    policy, batch = a_policy(a_run(make_model(), model={"quantization": quantization})), a_batch()
    before, bytes_before = gradients(policy, batch), hash_of_base(policy)
    policy.model.eval()                                              # what a careless caller might do
    with torch.no_grad():
        policy.model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=True, pad_token_id=0)
    policy.model.train()
    after = gradients(policy, batch)
    assert all(gradient.abs().max() > 0 for gradient in before.values())
    for name, gradient in after.items():
        assert torch.equal(gradient, before[name]), name
    assert hash_of_base(policy) == bytes_before


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_updates_move_the_adapter_and_nothing_else(make_model: Callable[..., Path], quantization: str, optimizer: str) -> None:
    policy = a_policy(a_run(make_model(), model={"quantization": quantization}, optim={"optimizer": optimizer}))
    batch, before = a_batch(), hash_of_base(policy)
    losses = []
    for _ in range(4):
        loss = -policy.read(batch, {"logp"}).logp.mean()
        loss.backward()
        losses.append(loss.item())
        policy.update()
    assert losses[-1] < losses[0] - 0.01
    assert hash_of_base(policy) == before
    assert {p.dtype for _, p in policy.trainable()} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_policy_and_critic_share_a_base_without_mixing(make_model: Callable[..., Path], checkpointing: bool) -> None:
    """Both are read before either's backward pass; the recomputation of checkpointing must not see the other one's adapter."""
    policy = a_policy(a_run(make_model()), critic=True, checkpointing=checkpointing)
    assert policy.critic is not None
    torch.nn.init.normal_(policy.critic.weight)
    batch = a_batch()

    def alone(column: str) -> dict[str, torch.Tensor]:
        policy.drop_gradients()
        getattr(policy.read(batch, {column}), column).sum().backward()
        return {n: p.grad.clone() for n, p in policy.trainable() if p.grad is not None}

    actor, critic = alone("logp"), alone("value")
    assert all(f".{ADAPTER}." in n for n in actor)
    assert all("critic" in n for n in critic)
    assert len(critic) == len(actor) + 2
    policy.drop_gradients()
    readout = policy.read(batch, {"logp", "value"})
    (readout.logp.sum() + readout.value.sum()).backward()
    for name, parameter in policy.trainable():
        torch.testing.assert_close(parameter.grad, (actor | critic)[name], rtol=1e-5, atol=1e-6)


def test_reference_is_the_base_itself(make_model: Callable[..., Path]) -> None:
    folder = make_model()
    fresh = a_policy(a_run(folder), perturbed=False)
    batch = a_batch()
    readout = fresh.read(batch, {"logp", "ref"})
    torch.testing.assert_close(readout.logp.detach(), readout.ref, rtol=0, atol=0)      # B = 0: the untrained policy is its reference
    torch.testing.assert_close(a_policy(a_run(folder)).read(batch, {"ref"}).ref, readout.ref, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("critic", [False, True])
def test_save_and_load_go_on_bit_for_bit(make_model: Callable[..., Path], tmp_path: Path, optimizer: str, critic: bool) -> None:
    run = a_run(make_model(), optim={"optimizer": optimizer}, adapter={"lora_r": 64})       # 64 * 64 = 4096: large enough for 8-bit state

    def advance(policy: Policy, steps: int) -> None:
        for _ in range(steps):
            columns = {"logp", "value"} if critic else {"logp"}
            readout = policy.read(a_batch(policy.step), columns)
            (-readout.logp.mean() + (readout.value.mean() if critic else 0)).backward()
            policy.update()
            policy.step += 1

    straight = a_policy(run, critic=critic)
    advance(straight, 2)
    straight.save(tmp_path)
    advance(straight, 2)
    resumed = a_policy(run, critic=critic, perturbed=False)
    resumed.load(tmp_path)
    assert resumed.step == 2
    advance(resumed, 2)
    for (name, one), (_, other) in zip(straight.trainable(), resumed.trainable(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_loads_in_plain_peft(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model()
    policy = a_policy(a_run(folder, model={"quantization": "none"}))
    policy.save(tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, policy.model(ids).logits, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "tokenizer.json").exists()
    assert (tmp_path / "chat_template.jinja").exists()


def test_a_gradient_that_is_not_finite_updates_nothing(make_model: Callable[..., Path]) -> None:
    policy = a_policy(a_run(make_model()))
    before = {n: p.detach().clone() for n, p in policy.trainable()}
    (policy.read(a_batch(), {"logp"}).logp.sum() * torch.inf).backward()
    assert not torch.isfinite(torch.tensor(policy.update()["grad_norm"]))
    assert all(torch.equal(p, before[n]) for n, p in policy.trainable())


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda f: [p.unlink() for p in f.glob("*token*")], "no tokenizer"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 100), "cannot be loaded"),
    ],
)
def test_a_broken_model_folder_is_one_sentence(make_model: Callable[..., Path], tmp_path: Path, break_it: Callable[[Path], object], sentence: str) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(make_model(), folder)
    break_it(folder)
    with pytest.raises(UserError, match=sentence):
        Policy.create(a_run(folder), critic=False, checkpointing=False, head_chunk=8)


def test_target_modules_that_do_not_exist_are_named(make_model: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"q_projj.*q_proj"):
        a_policy(a_run(make_model(), adapter={"lora_target_modules": ["q_projj"]}))


