"""Memory runs out at every allocation of a step in turn, and the step is the undisturbed one.

`LOCALRL_EVERY_ALLOCATION=1` takes all of them instead of a sample (minutes).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localrl.batch import Loss
from localrl.interrupt import Interrupts
from localrl.oom import Limits, OutOfMemory, attempt, out_of_memory
from localrl.policy.optim import make_optimizer, take_step
from localrl.sections import OptimSettings
from localrl.train import train
from tests.engines.models import engine, load, requests
from tests.forced import CASES, MICRO_BATCH, SMALL, Bench, Undisturbed, a_bench, distance, one_thread
from tests.oom import Scarce, budget, fail_at, fragmented

EVERY = bool(os.environ.get("LOCALRL_EVERY_ALLOCATION"))


@pytest.fixture
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model("llama", **SMALL)


@pytest.mark.parametrize("name", CASES)
def test_a_step_in_which_memory_runs_out_is_the_undisturbed_step(folder: Path, name: str) -> None:
    """Gradient (the optimiser's first moment), weights and metrics are the same; no more than one micro-batch's reading is done twice."""
    with one_thread():
        step = Undisturbed(a_bench(folder, CASES[name]))
        assert step.allocations > 500
        stride = 1 if EVERY else step.allocations // (24 if name == "grpo nf4" else 8)
        for forced in step.fail(range(1, step.allocations + 1, stride)):
            assert forced.refused == forced.retries == 1 and forced.same_rollouts, forced
            assert not forced.gaps and forced.distance < 2e-5, forced
            assert forced.again <= (2 if "reference" in name else 1) * MICRO_BATCH, forced


# -- passes -----------------------------------------------------------------------------------------------------------------


def learn_in(bench: Bench, memory: Scarce, naively: bool = False) -> list[Tensor]:
    """The gradients of one micro-batch of all that was just sampled, with memory like that; `naively`: catch, halve, retry."""
    policy, batch = bench.session.policy, bench.batch

    def work(rows: Tensor) -> None:
        readout = policy.read(batch[rows], {"logp"})
        assert readout.logp is not None
        policy.backward(Loss((readout.logp * batch.fresh[rows][:, : readout.logp.shape[1]]).sum(), {}))

    def halving(rows: Tensor) -> None:
        if attempt(partial(work, rows)) is None:
            for half in rows.chunk(2):
                halving(half)

    policy.drop_gradients()
    with memory:
        if naively:
            halving(torch.arange(len(batch)))
        else:
            policy.in_pieces("learning", work, torch.arange(len(batch)), batch)
    gradients = [p.grad.clone() for _, p in policy.trainable() if p.grad is not None]
    policy.drop_gradients()
    return gradients


def test_catch_halve_retry_alone_is_wrong_and_this_harness_sees_it(folder: Path) -> None:
    with one_thread():
        bench = a_bench(folder, {})
        true = learn_in(bench, memory := fail_at(None))
        naive, ours = [], []
        for number in range(memory.allocations * 2 // 5, memory.allocations, memory.allocations // 30):
            bench.restore()
            naive.append(distance(learn_in(bench, fail_at(number), naively=True), true))
            ours.append(distance(learn_in(bench, fail_at(number)), true))
        assert max(ours) < 1e-5 and sum(error > 0.1 for error in naive) > 2, (max(ours), naive)


def test_nothing_of_a_failed_pass_stays(folder: Path) -> None:
    """Inside the `except` block the traceback still holds the activations; behind it nothing does."""
    with one_thread():
        bench = a_bench(folder, {}, gradient_checkpointing=False)
        policy, batch = bench.session.policy, bench.batch

        def work() -> None:
            logp = policy.read(batch, {"logp"}).logp
            assert logp is not None
            logp.sum().backward()

        with fail_at(None) as counting:
            work()
        policy.drop_gradients()
        with fail_at(counting.allocations // 2) as memory:
            try:
                work()
            except torch.OutOfMemoryError:
                pinned = memory.now
            policy.drop_gradients()
            gc.collect()
            kept = memory.now
        policy.drop_gradients()
        with fail_at(counting.allocations // 2) as memory:
            assert attempt(work) is None
            policy.drop_gradients()
            assert memory.failures == 1 and memory.now <= kept < pinned / 5, (memory.now, kept, pinned)


@pytest.mark.parametrize("scarce", [budget, fragmented])
def test_passes_shrink_until_they_fit_and_stay_small(folder: Path, scarce: Callable[[int], Scarce]) -> None:
    """With memory for less than half of a pass, and where only large blocks are refused."""
    with one_thread():
        bench = a_bench(folder, {}, micro_batch_tokens=10_000, gradient_checkpointing=False, head_chunk=1000)
        said: list[str] = []
        bench.session.limits.say = said.append
        true = learn_in(bench, whole := fail_at(None))
        gradients = sum(g.nbytes for g in true)
        bench.batch, everything = bench.batch[torch.tensor([0])], bench.batch
        learn_in(bench, single := fail_at(None))
        bench.batch = everything
        size = int((whole.peak - gradients) * 0.35) + gradients if scarce is budget else single.largest + 1
        assert distance(learn_in(bench, memory := scarce(size)), true) < 1e-5
        limits, length = bench.session.limits, int(bench.batch.sequence_length.sum())
        assert memory.failures == limits.retries >= 2
        assert said[0].startswith(f"out of memory while learning with {length} tokens a pass: going on with ")
        assert limits.micro_batch_tokens is not None and limits.micro_batch_tokens < length // 2
        learned = replace(limits)
        assert distance(learn_in(bench, memory := scarce(size)), true) < 1e-5
        assert memory.failures == 0 and limits == learned, "what was learned is heeded"


def test_a_row_that_never_fits_is_a_sentence_and_nothing_has_changed(folder: Path) -> None:
    class Silent:
        def phase(self, name: str) -> None: ...
        def step(self, *args: Any) -> None: ...
        def rest(self, step: int) -> None: ...

    with one_thread():
        bench = a_bench(folder, {"algorithm": {"name": "ppo"}}, gradient_checkpointing=False)
        bench.restore()
        session = bench.session
        before, place = [t.clone() for t in bench.changing()], session.buffer.state()
        with fragmented(6000), pytest.raises(OutOfMemory, match=r"out of memory while \w+ .*: .*max_completion_length"):
            train(session, Silent(), Interrupts())
        assert session.policy.updates == 0 and session.policy.step == bench.step
        assert session.buffer.state() == place
        assert all(torch.equal(a, b) for a, b in zip(bench.changing(), before, strict=True))
        assert all(p.grad is None for _, p in session.policy.trainable())
        bench.restore()
        bench.run_step()                                             # and it goes on


# -- sampling ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gemma3_text", {"head_dim": 16})])
def test_responses_are_the_same_wherever_sampling_runs_out(make_model: Callable[..., Path], family: str, changes: dict[str, Any]) -> None:
    """Also with stop strings, continued responses, several ends, and a model that is decoded by its own forward pass."""
    with one_thread():
        model, tokenizer = load(make_model(family, **SMALL | {"num_key_value_heads": 1}, **changes))
        model.generation_config.eos_token_id = list(range(0, 256, 40))
        sampler = engine(model, tokenizer, max_completion_length=14, concurrent=5, stop=("ab", "Q"))
        asked = requests(count=3, samples=4)
        asked[5] = replace(asked[5], so_far=(7, 8, 9))
        with fail_at(None) as memory:
            true = sampler.generate(asked, 1)
        generated = sampler.stats.generated_tokens
        for number in range(1, memory.allocations + 1, 1 if EVERY else memory.allocations // 12):
            sampler.limits, sampler._live = Limits(), False
            with fail_at(number) as scarce:
                found = sampler.generate(asked, 1)
            assert scarce.failures == sampler.limits.retries == 1
            for one, other in zip(found, true, strict=True):
                assert replace(one, logp=None) == replace(other, logp=None), number
                assert one.logp == pytest.approx(other.logp, abs=2e-4, nan_ok=True)
            assert sampler.stats.generated_tokens == generated


def test_waves_shrink_to_one_row_and_no_further(make_model: Callable[..., Path]) -> None:
    with one_thread():
        model, tokenizer = load(make_model("llama", **SMALL))
        sampler = engine(model, tokenizer, max_completion_length=40, weights="live")
        said: list[str] = []
        asked = requests(count=2, samples=4)
        sampler.limits.say = said.append
        with fail_at(None) as memory:
            true = sampler.generate(asked, 1)
        with fail_at(None) as alone:
            sampler.generate(asked[:1], 1)
        with budget((memory.peak + 2 * alone.peak) // 3) as scarce:
            found = sampler.generate(asked, 1)
        assert [r.tokens for r in found] == [r.tokens for r in true] and scarce.failures > 0
        assert "out of memory while sampling 8 responses at once: going on with 4" in said[0]
        learned = sampler.limits.concurrent
        assert learned is not None and learned <= 4
        with budget(alone.peak * 3 // 4), pytest.raises(OutOfMemory, match=r"sampling one response by itself, \d+ tokens.*max_completion_length=20.*kv_cache"):
            sampler.generate(asked, 1)


# -- updating ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_an_update_happens_once_wherever_it_runs_out(name: str) -> None:
    """State is there from the start; a step is bit for bit the undisturbed one."""
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=draw)) for size in (5000, 10, 4200)]
    gradients = [torch.randn(p.shape, generator=draw) for p in parameters]
    optimizer = make_optimizer(OptimSettings(optimizer=name, weight_decay=0.1), [parameters[:2], parameters[2:]])
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    start = [t.detach().clone() for t in [*parameters, *state]]

    def step(memory: Scarce) -> list[Tensor]:
        with torch.no_grad():
            for tensor, value in zip([*parameters, *state], start, strict=True):
                tensor.copy_(value)
        for entry in optimizer.state.values():
            entry["step"] = 0 if isinstance(entry["step"], int) else entry["step"]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        with memory:
            take_step(optimizer, Limits())
        assert all(float(entry["step"]) == 1 for entry in optimizer.state.values())
        return [t.detach().clone() for t in [*parameters, *state]]

    with one_thread():
        true = step(memory := fail_at(None))
        assert not torch.equal(true[0], start[0]) and {id(v) for s in optimizer.state.values() for v in s.values()} >= {id(t) for t in state}
        for number in range(1, memory.allocations + 1):
            found = step(scarce := fail_at(number))
            assert scarce.failures == 1
            assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True)), number


# -- what is kept -----------------------------------------------------------------------------------------------------------


def test_what_counts() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(real.value) and not isinstance(real.value, torch.OutOfMemoryError)
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not out_of_memory(ValueError("out of memory")) and not out_of_memory(RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        attempt(lambda: (_ for _ in ()).throw(RuntimeError("size mismatch")))


def test_limits_only_shrink_and_travel() -> None:
    limits = Limits()
    assert limits.cut([9, 9, 9]) == [(0, 3)]
    assert limits.halve("learning", [50, 30, 30]) == [(0, 1), (1, 3)]
    assert limits.cut([50, 30, 30, 20]) == [(0, 1), (1, 3), (3, 4)]
    limits.halve("learning", [500, 500])
    limits.narrow(9)
    limits.narrow(80)
    other = Limits(micro_batch_tokens=40)
    other.learn(limits.to_dict())
    assert other.to_dict() == {"micro_batch_tokens": 40, "concurrent": 5} and limits.to_dict() == {"micro_batch_tokens": 60, "concurrent": 5}
    other.learn({})
    assert other.concurrent == 5
