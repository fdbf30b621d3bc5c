"""One backward pass against D of them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from localrl.batch import Batch, Seed
from localrl.policy.directions import Directions, decode, encode, sketch
from localrl.policy.load import ADAPTER
from localrl.policy.lora import low_rank_gradients
from localrl.policy.policy import Policy
from localrl.settings import UserError
from tests.policy.test_lora import unfold
from tests.policy.test_policy import QUANTIZATIONS, a_batch, a_policy, a_run

Make = Callable[..., Path]
D = 3
WHOLE = [torch.arange(4)]
PARTS = [torch.tensor([2]), torch.tensor([3, 0]), torch.tensor([1])]
WEIGHTS = (0.5, -1.25, 2.0)
COEFFICIENTS = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(5))
VECTORS = Path(__file__).parent.parent / "vectors"


def a_small_policy(make: Make, quantization: str = "none", checkpointing: bool = True, kind: str = "float32", **more: Any) -> Policy:
    return a_policy(a_run(make("qwen2"), model={"quantization": quantization, "compute_dtype": kind}), checkpointing=checkpointing, **more)


def seeds_of(policy: Policy, batch: Batch, rows: Tensor) -> list[Seed]:
    """Two sums over a micro-batch's rows, which count differently in each direction."""
    readout = policy.read(batch[rows], {"logp", "entropy"})
    return [Seed(readout.logp.sum(), COEFFICIENTS[0][rows]), Seed((readout.entropy**2).sum(), COEFFICIENTS[1][rows])]


def gather(policy: Policy, directions: Directions, parts: Sequence[Tensor] = PARTS, batch: Batch | None = None) -> None:
    for rows in parts:
        directions.backward(seeds_of(policy, batch or a_batch(), rows), policy.token_rows)


def taken(policy: Policy) -> list[Tensor]:
    """The adapter's gradients, which are cleared."""
    found = [p.grad.clone() for _, p in policy.trainable() if p.grad is not None]
    policy.optimizer.zero_grad(set_to_none=True)
    return found


def one_by_one(policy: Policy, batch: Batch | None = None) -> list[list[Tensor]]:
    """D backward passes, each of one direction's own loss."""
    gradients = []
    batch = batch or a_batch()
    for d in range(D):
        readout = policy.read(batch, {"logp", "entropy"})
        ((readout.logp.sum(1) * COEFFICIENTS[0][:, d]).sum() + ((readout.entropy**2).sum(1) * COEFFICIENTS[1][:, d]).sum()).backward()
        gradients.append(taken(policy))
    return gradients


def mixed(gradients: list[list[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    return [sum(w * g for w, g in zip(weights, each, strict=True)) for each in zip(*gradients, strict=True)]


def gap(found: list[Tensor], truth: list[Tensor]) -> float:
    """The worst tensor's error, as a share of its length."""
    return max(float((f - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True))


def gram_of(gradients: list[list[Tensor]]) -> Tensor:
    flat = torch.stack([torch.cat([g.flatten() for g in one]) for one in gradients]).double()
    return flat @ flat.T


def cosine_error(found: Tensor, truth: Tensor) -> float:
    lengths = truth.diagonal().sqrt()
    return float(((found - truth) / lengths / lengths[:, None]).abs().max())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_pass_gives_the_gradients_of_many(make_model: Make, quantization: str, checkpointing: bool) -> None:
    policy = a_small_policy(make_model, quantization, checkpointing)
    truth = one_by_one(policy)
    directions = Directions(policy.model, ADAPTER, D, "float32")
    assert directions.passes == 1
    for d in range(D):
        gather(policy, directions)
        assert not taken(policy)
        assert cosine_error(directions.gram(), gram_of(truth)) < 1e-5
        directions.combine([float(d == k) for k in range(D)])
        assert gap(taken(policy), truth[d]) < 1e-5
    gather(policy, directions, WHOLE)
    directions.combine(WEIGHTS)
    assert gap(taken(policy), mixed(truth, WEIGHTS)) < 1e-5


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_small_buffers_are_nearly_right(make_model: Make, kind: Any, quantization: str) -> None:
    policy = a_small_policy(make_model, quantization)
    truth, limit = one_by_one(policy), {"bfloat16": 0.01, "int8": 0.05}[kind]
    directions = Directions(policy.model, ADAPTER, D, kind)
    for d in range(D):
        gather(policy, directions)
        assert cosine_error(directions.gram(), gram_of(truth)) < limit
        directions.combine([float(d == k) for k in range(D)])
        assert gap(taken(policy), truth[d]) < limit


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_two_passes_are_exact_for_the_weights(make_model: Make, quantization: str, checkpointing: bool) -> None:
    policy = a_small_policy(make_model, quantization, checkpointing)
    truth = one_by_one(policy)
    directions = Directions(policy.model, ADAPTER, D, "two_pass")
    assert directions.passes == 2
    for _ in range(2):
        gather(policy, directions)
        assert cosine_error(directions.gram(), gram_of(truth)) < 0.05
        directions.combine(WEIGHTS)
        assert not taken(policy)
        directions.backward(seeds_of(policy, a_batch(), PARTS[0]), policy.token_rows)
        with pytest.raises(RuntimeError, match="6 rows are missing"):
            directions.gram()
        gather(policy, directions, [torch.tensor([3]), torch.tensor([0, 1])])                   # another split of the same rows
        assert gap(taken(policy), mixed(truth, WEIGHTS)) < 1e-5
    assert directions.turn() == pytest.approx(1, abs=1e-5)
    gather(policy, directions)
    directions.combine(WEIGHTS)
    with pytest.raises(RuntimeError, match="2 rows more than the first"):
        gather(policy, directions, [torch.tensor([0, 1, 2, 3, 3])])
    directions.drop()
    assert directions.gram().abs().max() == 0


def test_lagged_weights_act_a_step_later(make_model: Make, tmp_path: Path) -> None:
    policy = a_small_policy(make_model, "nf4")
    truth = one_by_one(policy)
    directions = Directions(policy.model, ADAPTER, D, "lagged", (1.0, 2.0, 3.0))
    gather(policy, directions)
    assert cosine_error(directions.gram(), gram_of(truth)) < 0.05
    directions.combine(WEIGHTS)
    assert gap(taken(policy), mixed(truth, (1.0, 2.0, 3.0))) < 1e-5
    assert math.isnan(directions.turn())
    again = Directions(policy.model, ADAPTER, D, "lagged")
    again.restore(directions.state())
    for each in (directions, again):
        gather(policy, each)
        each.combine((0.0, 0.0, 1.0))
        assert gap(taken(policy), mixed(truth, WEIGHTS)) < 1e-5
    assert again.turn() == directions.turn()
    one, other = (torch.cat([g.flatten() for g in mixed(truth, w)]) for w in ((1.0, 2.0, 3.0), WEIGHTS))
    assert directions.turn() == pytest.approx(float(one @ other / one.norm() / other.norm()), abs=0.05)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "two_pass", "lagged"])
def test_the_turn_is_the_cosine_with_the_update_before(make_model: Make, kind: Any) -> None:
    policy = a_small_policy(make_model)
    directions = Directions(policy.model, ADAPTER, D, kind, WEIGHTS)
    updates: list[Tensor] = []
    turns: list[float] = []
    for step in range(3):
        batch = a_batch(step)
        for _ in range(directions.passes):
            gather(policy, directions, PARTS, batch)
            if len(turns) == step:
                directions.combine(WEIGHTS)
                turns.append(directions.turn())
        updates.append(torch.cat([g.flatten() for g in taken(policy)]))
    assert math.isnan(turns[0])
    for step in (1, 2):
        exact = torch.nn.functional.cosine_similarity(updates[step], updates[step - 1], 0)
        assert turns[step] == pytest.approx(float(exact), abs=0.05)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_half_precision_the_sum_of_directions_is_the_ordinary_gradient(make_model: Make, quantization: str, checkpointing: bool) -> None:
    policy = a_small_policy(make_model, quantization, checkpointing, "bfloat16")
    directions, truth = Directions(policy.model, ADAPTER, D, "float32"), one_by_one(policy)
    for d in range(D):
        gather(policy, directions, WHOLE)
        directions.combine([float(d == k) for k in range(D)])
        assert gap(taken(policy), truth[d]) < 0.03                    # dy is rounded after the coefficients there, before them here


def test_no_more_than_the_directions_lives(make_model: Make) -> None:
    policy = a_small_policy(make_model, "nf4")
    numbers = sum(p.numel() for _, p in policy.trainable())

    def living() -> dict[int, Tensor]:
        gc.collect()                                                  # type(), for isinstance() would wake up deprecated objects
        real = (t for t in gc.get_objects() if issubclass(type(t), Tensor) and not issubclass(type(t), FakeTensor))
        return {t.untyped_storage().data_ptr(): t for t in real}

    sizes = {}
    for kind in ("float32", "bfloat16", "int8", "lagged", "two_pass"):
        directions, before = Directions(policy.model, ADAPTER, D, kind), living()
        gather(policy, directions)
        policy.optimizer.zero_grad(set_to_none=True)
        new = {address: t for address, t in living().items() if address not in before}
        sizes[kind] = sum(t.untyped_storage().nbytes() for t in new.values()) / (D * numbers)
        del new
        held = directions.held
        directions.combine(WEIGHTS)
        assert directions.held <= held - sizes[kind] * D * numbers + 2**14 * 4 + 1
        policy.optimizer.zero_grad(set_to_none=True)
    assert sizes["float32"] == 4
    assert sizes["bfloat16"] == 2
    assert 1 < sizes["int8"] < 1.15                                   # the last block of these small matrices is half empty
    assert sizes["lagged"] == sizes["two_pass"] == 0


def test_only_the_adapter_is_touched_and_nothing_stays_attached(make_model: Make) -> None:
    policy = a_small_policy(make_model, critic=True)
    batch, directions = a_batch(), Directions(policy.model, ADAPTER, D, "float32")
    readout = policy.read(batch, {"logp", "value"})
    directions.backward([Seed(readout.logp.sum() + readout.value.sum(), COEFFICIENTS[0])], policy.token_rows)
    assert not taken(policy)
    assert all(layer.collector is None for layer in policy.model.modules() if hasattr(layer, "collector"))
    policy.read(batch, {"value"}).value.sum().backward()              # the critic learns as ever
    critic = {n for n, p in policy.trainable() if p.grad is not None}
    assert critic
    assert all("critic" in n for n in critic)


def test_a_gradient_of_another_making_is_noticed(make_model: Make) -> None:
    policy = a_small_policy(make_model)
    directions = Directions(policy.model, ADAPTER, D, "float32")
    unfold(policy)
    with pytest.raises(RuntimeError, match="another making"):
        gather(policy, directions)
    with pytest.raises(UserError, match="no plain linear adapter"):
        Directions(policy.model, ADAPTER, D, "float32")


def test_rows_and_directions_must_fit(make_model: Make) -> None:
    policy = a_small_policy(make_model)
    directions, value = Directions(policy.model, ADAPTER, D, "float32"), policy.read(a_batch(), {"logp"}).logp.sum()
    with pytest.raises(ValueError, match="for 3 directions"):
        directions.backward([Seed(value, torch.ones(4, 2))], policy.token_rows)
    with pytest.raises(RuntimeError, match="does not keep rows apart"):
        directions.backward([Seed(value, torch.ones(4, 3))], policy.token_rows[1:])
    with pytest.raises(ValueError, match="2 weights for 3"):
        directions.combine((1.0, 2.0))
    with pytest.raises(UserError, match="3 directions"):
        directions.restore(Directions(policy.model, ADAPTER, 2, "float32").state())


def test_a_linear_layer_by_hand() -> None:
    v = load_file(VECTORS / "lora_multireward_linear.safetensors")
    scale, dy, x = float(v["scale"]), v["dy"].flatten(0, 1), v["x"].flatten(0, 1)
    da, db = low_rank_gradients(scale * dy @ v["B"], x, scale * x @ v["A"].T, dy, v["coeff"].T.repeat_interleave(v["x"].shape[1], 0))
    torch.testing.assert_close(da, v["dA"])
    torch.testing.assert_close(db.transpose(1, 2), v["dB"])
    both = torch.cat([da.flatten(1), db.flatten(1)], 1)
    torch.testing.assert_close(both @ both.T, v["gram"])


# -- the stores' arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_int8_is_as_good_at_every_size(size: float) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(2, 1000, generator=g) * torch.exp(2 * torch.randn(2, 1, generator=g)) * size
    values[0, 256:512] = 0
    back = decode(encode(values, "int8"))
    assert back.shape == values.shape
    assert float((back - values).norm() / values.norm()) < 0.015
    assert not back[0, 256:512].any()
    values[1, 3] = torch.inf
    assert not torch.isfinite(decode(encode(values, "int8"))[1]).all()


def test_sketches_keep_inner_products() -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(1, 100_000, generator=g)
    values = base + 1.5 * torch.randn(4, 100_000, generator=g)
    values[:, ::16384] *= 50                                          # heavy numbers at one distance must not meet
    table = sketch(values, 3)
    assert table.shape == (4, 2**14)
    truth = values.double() @ values.double().T
    assert cosine_error(table.double() @ table.double().T, truth) < 0.04
    torch.testing.assert_close(sketch(values[:2] + values[2:], 3), table[:2] + table[2:], rtol=1e-4, atol=1e-3)
    assert torch.equal(sketch(values, 3), table)
    other = sketch(values, 4)                                         # another tensor's signs have nothing to do with these
    assert float((table.double() @ other.double().T / truth.diagonal().sqrt() / truth.diagonal().sqrt()[:, None]).abs().max()) < 0.04
    assert sketch(torch.arange(5.0)[None], 0)[0, :].abs().sort().values[-4:].tolist() == [1, 2, 3, 4]
