"""The chunked head against the plain formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from localrl.policy.head import Head, TokenReadout, read_tokens, workspace
from localrl.policy.output_layer import multiplies_into_fp32
from localrl.settings import UserError


def plain(hidden: Tensor, targets: Tensor, head: Head, temperature: float = 1.0) -> TokenReadout:
    """The formula as anyone would write it, in fp64, with every logit at once."""
    z = hidden.double() @ head.weight.double().T
    z = head.scale * (z if head.bias is None else z + head.bias.double())
    z = (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)) / temperature
    log_p = z.log_softmax(1)
    return TokenReadout(log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1), z.logsumexp(1))


def combined(pull: Sequence[Tensor | None], out: TokenReadout) -> Tensor:
    """sum(pull * output); None: that output is not used."""
    parts = [(p.to(o) * o).sum() for p, o in zip(pull, out, strict=True) if p is not None and o is not None]
    return torch.stack(parts).sum()


def pulled(read: Callable[[Tensor], TokenReadout], hidden: Tensor, pull: Sequence[Tensor | None]) -> tuple[TokenReadout, Tensor]:
    """The readout and the gradient of the combination to the hidden states."""
    leaf = hidden.detach().clone().requires_grad_()
    out = read(leaf)
    combined(pull, out).backward()
    assert leaf.grad is not None
    return out, leaf.grad


def gap(ours: Tensor | None, truth: Tensor | None, size: float = 1.0) -> float:
    """Largest difference, as a share of the largest true value (or of `size`, if that is more)."""
    assert ours is not None
    assert truth is not None
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).abs().max()) / max(size, float(truth.abs().max()))


def make(seed: int, n: int, v: int, h: int, types: tuple[torch.dtype, torch.dtype], bias: bool, **kind: Any) -> tuple[Tensor, Tensor, Head]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g).to(types[0])
    weight = (torch.randn(v, h, generator=g) * 2 / h**0.5).to(types[1])
    return hidden, torch.randint(v, (n,), generator=g), Head(weight, torch.randn(v, generator=g).to(types[1]) if bias else None, **kind)


# -- the formula -------------------------------------------------------------------------------------------------------------

positive = st.floats(0.4, 2.5)
problems = st.fixed_dictionaries(
    {"seed": st.integers(0, 99), "n": st.integers(1, 9), "v": st.integers(1, 23), "h": st.integers(1, 7), "bias": st.booleans(),
     "scale": positive, "softcap": st.none() | st.floats(1, 30)}
)  # fmt: skip
ways = st.fixed_dictionaries({"temperature": positive, "chunk": st.integers(1, 12), "tile": st.integers(1, 30)})
uses = st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any)


@settings(max_examples=150, deadline=None)
@given(problem=problems, way=ways, use=uses, exact=st.booleans())
def test_values_and_gradients_are_right(problem: dict[str, Any], way: dict[str, Any], use: Sequence[bool], exact: bool) -> None:
    kind, limit = (torch.float64, 1e-10) if exact else (torch.float32, 1e-5)
    hidden, targets, head = make(types=(kind, kind), **problem)
    g = torch.Generator().manual_seed(problem["seed"] + 1)
    pull = [torch.randn(len(hidden), generator=g, dtype=torch.float64) if used else None for used in use]
    ours, slope = pulled(lambda x: read_tokens(x, targets, head, **way), hidden, pull)
    truth, true_slope = pulled(lambda x: plain(x, targets, head, way["temperature"]), hidden.double(), pull)
    for mine, theirs in zip(ours, truth, strict=True):
        assert gap(mine, theirs) < limit
    assert ours.logp.dtype == kind
    assert slope.dtype == kind
    assert gap(slope, true_slope) < limit


@settings(max_examples=60, deadline=None)
@given(problem=problems, way=ways, types=st.tuples(*[st.sampled_from([torch.bfloat16, torch.float16, torch.float32])] * 2))
def test_half_precision_inputs_are_never_rounded_again(problem: dict[str, Any], way: dict[str, Any], types: Any) -> None:
    hidden, targets, head = make(types=types, **problem)
    pull = [torch.randn(len(hidden)), torch.randn(len(hidden)), torch.randn(len(hidden))]
    ours, slope = pulled(lambda x: read_tokens(x, targets, head, **way), hidden, pull)
    truth, true_slope = pulled(lambda x: plain(x, targets, head, way["temperature"]), hidden.double(), pull)
    for mine, theirs in zip(ours, truth, strict=True):
        assert gap(mine, theirs) < 1e-5
    assert ours.logp.dtype == torch.float32
    assert slope.dtype == hidden.dtype
    # The gradient is rounded once, when it is handed back in the hidden states' type.
    assert gap(slope, true_slope) < 1e-5 + torch.finfo(hidden.dtype).eps / 2


@pytest.mark.parametrize("want_entropy", [True, False])
@pytest.mark.parametrize("kind", [{}, {"softcap": 3.0, "scale": 1.7}])
def test_gradcheck(want_entropy: bool, kind: dict[str, float]) -> None:
    hidden, targets, head = make(3, 5, 11, 4, (torch.float64, torch.float64), True, **kind)

    def read(x: Tensor) -> tuple[Tensor, ...]:
        out = read_tokens(x, targets, head, temperature=0.8, chunk=2, tile=4, want_entropy=want_entropy)
        return tuple(o for o in out if o is not None)

    assert len(read(hidden)) == 2 + want_entropy
    assert torch.autograd.gradcheck(read, hidden.requires_grad_())


@pytest.mark.parametrize("spread", [1, 60])
def test_large_logits_lose_nothing(spread: int) -> None:
    # Whole numbers, so that the product itself is exact: what is left is the softmax's own error at logits of about 10^4, near each
    # other or far apart. A single fp32 step at 10^4 is 1e-3, so log p must not be had as a difference from the log-sum-exp.
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-spread, spread + 1, (32, 8), generator=g).float()
    head = Head(torch.randint(-spread, spread + 1, (300, 8), generator=g).float())
    hidden[:, 0], head.weight[:, 0] = 100, 100
    hidden.requires_grad_()
    targets = torch.cat([(hidden @ head.weight.T).argmax(1)[:16], torch.randint(300, (16,), generator=g)])
    ours, truth = read_tokens(hidden, targets, head, tile=37), plain(hidden, targets, head)
    assert float(truth.lse.detach().min()) > 1e4
    assert gap(ours.lse, truth.lse) < 1e-7
    assert gap(ours.entropy, truth.entropy) < 1e-6
    near = truth.logp.detach() > -20
    assert near.sum() >= 16
    assert gap(ours.logp[near], truth.logp[near]) < 1e-6
    one, two = (torch.autograd.grad(combined([torch.ones(32)] * 3, out), hidden)[0] for out in (ours, truth))
    assert gap(one, two) < 1e-5


def test_chunks_and_tiles_change_nothing_but_rounding() -> None:
    hidden, targets, head = make(0, 33, 101, 8, (torch.float32, torch.float32), False)
    whole = read_tokens(hidden, targets, head)
    for chunk, tile in [(1, 1), (7, 13), (33, 101), (10**9, 10**9)]:
        for a, b in zip(whole, read_tokens(hidden, targets, head, chunk=chunk, tile=tile), strict=True):
            assert a is not None
            assert b is not None
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_no_tokens_at_all() -> None:
    _, _, head = make(0, 1, 11, 4, (torch.float32, torch.float32), True)
    hidden = torch.empty(0, 4, requires_grad=True)
    out = read_tokens(hidden, torch.empty(0, dtype=torch.int64), head)
    assert [len(o) for o in out if o is not None] == [0, 0, 0]
    out.logp.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 4)


def test_any_layout_of_the_hidden_states() -> None:
    _, targets, head = make(0, 6, 11, 4, (torch.float32, torch.float32), True)
    store = torch.randn(8, 12)
    for view in (store.T[:6, ::2], store[:6, 1::3], store[:1, :4].expand(6, 4)):
        assert not view.is_contiguous()
        ours, slope = pulled(lambda x: read_tokens(x, targets, head, chunk=4, tile=3), view, [torch.ones(6)] * 3)
        truth, true_slope = pulled(lambda x: plain(x, targets, head), view, [torch.ones(6)] * 3)
        assert gap(ours.logp, truth.logp) < 1e-5
        assert gap(slope, true_slope) < 1e-5
    leaf = store.requires_grad_()
    one, two = (torch.autograd.grad(read(leaf.T[:6, ::2], targets, head).logp.sum(), leaf)[0] for read in (read_tokens, plain))
    assert gap(one, two) < 1e-5


def test_without_entropy_the_rest_is_the_same() -> None:
    hidden, targets, head = make(0, 9, 30, 4, (torch.float32, torch.float32), False, softcap=5.0)
    pull = [torch.randn(9), None, torch.randn(9)]
    full, slope = pulled(lambda x: read_tokens(x, targets, head, tile=8), hidden, pull)
    lean, lean_slope = pulled(lambda x: read_tokens(x, targets, head, tile=8, want_entropy=False), hidden, pull)
    assert lean.entropy is None
    assert torch.equal(full.logp, lean.logp)
    assert torch.equal(full.lse, lean.lse)
    assert torch.equal(slope, lean_slope)


# -- half precision multiplied into fp32 ---------------------------------------------------------------------------------------


@pytest.fixture
def mixed_kernel() -> Iterator[None]:
    """PyTorch has torch.mm(half, half, out_dtype=float32) for CUDA alone: the same operator for the CPU, so that its path runs here."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda a, b, out_dtype: torch.mm(a.to(out_dtype), b.to(out_dtype)), "CPU")
    assert multiplies_into_fp32(torch.device("cpu"))
    yield
    library._destroy()
    assert not multiplies_into_fp32(torch.device("cpu"))


@pytest.mark.usefixtures("mixed_kernel")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_the_path_of_mixed_products(kind: torch.dtype, softcap: float | None) -> None:
    hidden, targets, head = make(0, 50, 300, 32, (kind, kind), True, softcap=softcap)
    pull = [torch.randn(50), torch.randn(50), torch.randn(50)]
    ours, slope = pulled(lambda x: read_tokens(x, targets, head, temperature=0.9, chunk=16, tile=64), hidden, pull)
    truth, true_slope = pulled(lambda x: plain(x, targets, head, 0.9), hidden.double(), pull)
    for mine, theirs in zip(ours, truth, strict=True):
        assert gap(mine, theirs) < 1e-5  # as good as fp32
    # dz is rounded to the weight's type, and the sum once more: a few units of that type's precision.
    assert gap(slope, true_slope) < 2 * torch.finfo(kind).eps


@pytest.mark.usefixtures("mixed_kernel")
def test_tiny_loss_weights_stay_within_half_precision() -> None:
    # p * 1e-4 is 5e-8 here, the smallest step of fp16: left as it is, the whole second half of W_t - sum p W would be noise.
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 16, generator=g).half(), (8 + torch.randn(2000, 16, generator=g) * 0.1).half()
    targets, head = torch.randint(2000, (20,), generator=g), Head(weight)
    pull = [torch.full((20,), 1e-4), torch.full((20,), 1e-4), torch.full((20,), -3e-4)]
    _, slope = pulled(lambda x: read_tokens(x, targets, head, tile=512), hidden, pull)
    _, true_slope = pulled(lambda x: plain(x, targets, head), hidden.double(), pull)
    assert gap(slope, true_slope, 0.0) < 2 * torch.finfo(torch.float16).eps


# -- autograd ------------------------------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused() -> None:
    hidden, targets, head = make(0, 3, 5, 2, (torch.float64, torch.float64), False)
    leaf = hidden.requires_grad_()
    for output in read_tokens(leaf, targets, head):
        assert output is not None
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(output.sum(), leaf, create_graph=True)


def test_one_reading_gives_several_gradients() -> None:
    hidden, targets, head = make(0, 9, 30, 4, (torch.float32, torch.float32), False)
    out = read_tokens(hidden.requires_grad_(), targets, head, tile=7)
    one, two = (torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (out.logp, out.lse))
    (both,) = torch.autograd.grad(out.logp.sum() + out.lse.sum(), hidden)
    torch.testing.assert_close(one + two, both)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_gradient_checkpointing(reentrant: bool) -> None:
    hidden, targets, head = make(0, 9, 30, 4, (torch.float32, torch.float32), False)
    layer = nn.Linear(4, 4)

    def loss(x: Tensor) -> Tensor:
        out = read_tokens(layer(x).tanh(), targets, head, chunk=4, tile=7)
        return out.logp.sum() + out.lse.square().sum()

    loss(hidden).backward()
    assert layer.weight.grad is not None
    slope = layer.weight.grad.clone()
    layer.zero_grad()
    checkpoint(loss, hidden.requires_grad_(), use_reentrant=reentrant).backward()
    torch.testing.assert_close(layer.weight.grad, slope)


def test_autocast_does_not_reach_inside() -> None:
    hidden, targets, head = make(0, 9, 300, 16, (torch.float32, torch.float32), False)

    def read(x: Tensor) -> TokenReadout:
        return read_tokens(x, targets, head, tile=128)

    ours, slope = pulled(read, hidden, [torch.ones(9)] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_slope = pulled(read, hidden, [torch.ones(9)] * 3)
        assert (hidden @ head.weight.T).dtype == torch.bfloat16
    assert torch.equal(ours.logp, cast.logp)
    assert torch.equal(slope, cast_slope)


def test_nothing_is_kept_where_nothing_learns() -> None:
    hidden, targets, head = make(0, 9, 30, 4, (torch.float32, torch.float32), False)
    assert read_tokens(hidden, targets, head).logp.grad_fn is None
    with torch.no_grad():
        assert read_tokens(hidden.requires_grad_(), targets, head).logp.grad_fn is None


# -- what is refused -----------------------------------------------------------------------------------------------------------


def test_a_foreign_token_is_named() -> None:
    hidden, _, head = make(0, 3, 5, 2, (torch.float32, torch.float32), False)
    for wrong in (5, -1):
        with pytest.raises(UserError, match=f"token {wrong} is not among the model's 5"):
            read_tokens(hidden, torch.tensor([0, wrong, 4]), head)


def test_a_head_that_is_trained_is_refused() -> None:
    hidden, targets, head = make(0, 3, 5, 2, (torch.float32, torch.float32), True)
    for part in (head.weight, head.bias):
        assert part is not None
        part.requires_grad_()
        with pytest.raises(UserError, match="being trained"):
            Head(head.weight, head.bias)
        with pytest.raises(UserError, match="being trained"):
            read_tokens(hidden, targets, head)
        part.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden": torch.zeros(3, 7)}, "hidden must be"),
        ({"hidden": torch.zeros(3, 2, dtype=torch.int32)}, "hidden must be"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets must be"),
        ({"targets": torch.zeros(3)}, "targets must be"),
        ({"targets": torch.zeros(3, dtype=torch.int64, device="meta")}, "share a device"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"chunk": 0}, "chunk and tile"),
        ({"tile": 0}, "chunk and tile"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], says: str) -> None:
    hidden, targets, head = make(0, 3, 5, 2, (torch.float32, torch.float32), False)
    arguments: dict[str, Any] = {"hidden": hidden, "targets": targets, "head": head}
    with pytest.raises(ValueError, match=says):
        read_tokens(**(arguments | change))


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": float("inf")}, {"softcap": 0.0}, {"softcap": -1.0}, {"bias": torch.zeros(4)}])
def test_heads_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Head(torch.zeros(5, 2), **wrong)


# -- other devices -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mixed_kernel")
def test_a_simulated_run_needs_no_values() -> None:
    with FakeTensorMode():
        head = Head(torch.empty(1000, 8, dtype=torch.bfloat16))
        hidden = torch.empty(64, 8, dtype=torch.bfloat16, requires_grad=True)
        out = read_tokens(hidden, torch.zeros(64, dtype=torch.int64), head, chunk=16, tile=128)
        combined([torch.ones(64)] * 3, out).backward()
        assert hidden.grad is not None
        assert hidden.grad.shape == hidden.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(kind: torch.dtype) -> None:
    hidden, targets, head = make(0, 3000, 50_000, 256, (kind, kind), False)
    pull = [torch.randn(3000), torch.randn(3000), torch.randn(3000)]
    truth, true_slope = pulled(lambda x: plain(x, targets, head), hidden.double(), pull)
    hidden, targets, head = hidden.cuda(), targets.cuda(), Head(head.weight.cuda())
    pull = [p.cuda() for p in pull]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours, slope = pulled(lambda x: read_tokens(x, targets, head), hidden, pull)
    peak = torch.cuda.max_memory_allocated() - before
    for mine, theirs in zip(ours, truth, strict=True):
        assert mine is not None
        assert gap(mine.cpu(), theirs) < 1e-5
    assert gap(slope.cpu(), true_slope) < 1e-5 + (2 * torch.finfo(kind).eps if kind != torch.float32 else 0)
    promise = workspace(3000, 50_000, 256, weight=kind, hidden=kind, mixed=multiplies_into_fp32(hidden.device))
    assert peak <= promise + 3 * hidden.numel() * hidden.itemsize + 64 * 2**20  # the copy, its gradient; cuBLAS's workspace
