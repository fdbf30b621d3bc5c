"""The controller against reference numbers, and what must hold for any gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localrl.algorithms.steering import LARGEST, Control, clip_masks, control, detect, geometry, shortest

VECTORS = Path(__file__).parent.parent / "vectors"


def cases(name: str, key: str = "") -> list[Any]:
    found = json.loads((VECTORS / f"{name}.json").read_text())["cases"]
    return [pytest.param(case, id=case["tag"]) for case in found if key in case["expected"] or not key]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(found: Any, expected: Any, limit: float = 1e-9) -> None:
    found, expected = torch.as_tensor(found, dtype=torch.float64), tensor(expected)
    assert float((found - expected).abs().max()) <= limit * max(1.0, float(expected.abs().max())), (found, expected)


@pytest.mark.parametrize("case", cases("gradient_directed_controller"))
def test_the_controller_decides_as_the_reference(case: dict[str, Any]) -> None:
    gradients, expected = tensor(case["inputs"]["grads"]), case["expected"]
    gram = gradients @ gradients.T
    shape, found = geometry(gram), control(gram, case["inputs"]["w0"])
    near(shape.cos, expected["cos"])
    other = 1 - torch.eye(len(gram), dtype=torch.float64)            # the reference's own figures of a vector with itself are rounding
    near(shape.wedge * other, (tensor(expected["wedge"]) * other).tolist())
    near(shape.angle * other, (tensor(expected["angle_deg"]) * other).tolist())
    assert not (shape.wedge * (1 - other)).any()
    near(found.weights, expected["w"])
    near(tensor(found.weights) @ gradients, expected["direction"])
    near([found.after.dispersion, found.after.coherence, found.rate, found.mix], [expected[k] for k in ("D", "coh", "lr_mult", "mix")])
    near([found.before.dispersion, found.before.coherence], [expected["D_before"], expected["coh_before"]])
    near(found.after.p, expected["p"])
    near(found.before.p, expected["p_before"])
    near(found.norm, float(tensor(expected["direction"]).norm()))
    assert found.state == expected["state"]


@pytest.mark.parametrize("case", cases("moo_weights", "mgda_exact_w"))
def test_the_shortest_vector_is_exact(case: dict[str, Any]) -> None:
    gradients, expected = tensor(case["inputs"]["grads"]), case["expected"]
    gram = tensor(expected.get("gram", (gradients @ gradients.T).tolist()))
    u = shortest(gram)
    near(u, expected["mgda_exact_w"])
    near(float(u @ gram @ u), expected["mgda_exact_norm2"])


@pytest.mark.parametrize("case", cases("clip_sign_coefficients"))
def test_clipping_looks_at_the_sign_alone(case: dict[str, Any]) -> None:
    given_, expected = case["inputs"], case["expected"]
    advantage, ratio = tensor(given_["adv"]), tensor(given_["ratio"])
    up, down = clip_masks(ratio, 1 - given_["clip_low"], 1 + given_["clip_high"])
    near(up, expected["mask_pos"])
    near(down, expected["mask_neg"])
    near(ratio * (advantage.clamp(min=0) * up + advantage.clamp(max=0) * down), expected["coeff"])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_clip_masks_are_the_objectives_own_gradient(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    ratio, advantage = (torch.rand(40, generator=g).double() * 2).requires_grad_(), torch.randn(40, generator=g).double()
    torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage).sum().backward()
    up, down = clip_masks(ratio.detach(), 0.8, 1.3)
    assert torch.equal(ratio.grad, advantage.clamp(min=0) * up + advantage.clamp(max=0) * down)


# -- for any gradients ------------------------------------------------------------------------------------------------------------

problems = st.fixed_dictionaries({
    "seed": st.integers(0, 10**6), "count": st.integers(1, 6), "size": st.sampled_from([2, 3, 8, 40]), "spread": st.floats(0, 3),
    "dead": st.booleans(), "twin": st.sampled_from([0, 1, -1]),
})  # fmt: skip


def gradients_of(problem: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(K, n) of lengths that differ, one perhaps 0, one perhaps another's double or opposite; and weights (K,)."""
    g = torch.Generator().manual_seed(problem["seed"])
    found = torch.randn(problem["count"], problem["size"], generator=g).double()
    found *= torch.exp(problem["spread"] * torch.randn(problem["count"], 1, generator=g).double())
    if problem["twin"] and problem["count"] > 1:
        found[1] = problem["twin"] * 2 * found[0]
    if problem["dead"] and problem["count"] > 2:
        found[2] = 0
    return found, torch.rand(problem["count"], generator=g).double() + 0.1


def decided(gradients: Tensor, weights: Tensor, **more: Any) -> Control:
    return control(gradients @ gradients.T, weights.tolist(), **more)


@settings(max_examples=150, deadline=None)
@given(problems)
def test_goals_are_met_or_the_state_says_why_not(problem: dict[str, Any]) -> None:
    gradients, weights = gradients_of(problem)
    found = decided(gradients, weights)
    update = tensor(found.weights) @ gradients
    active = torch.tensor(found.active)
    if found.state in ("ok", "reweighted"):
        assert found.after.dispersion >= 0.7 - 1e-8
        assert float((gradients @ update).min()) >= -1e-8 * float(gradients.norm(dim=1).max() * update.norm())
        assert found.after.coherence >= 0.05
        assert found.rate == 1
    else:
        assert found.mix == 1 or found.after.coherence < 0.05
    if found.state == "ok":
        near(tensor(found.weights)[active], weights[active].tolist())
    assert found.mix == 0 or found.state != "ok"
    assert not tensor(found.weights)[~active].any()
    # what the figures say is what the gradients say
    if found.after.coherence > 1e-6:
        unit = gradients[active] / gradients[active].norm(dim=1, keepdim=True)
        near(found.after.p, (unit @ update / update.norm()).tolist(), 1e-6)
    near(sum(found.unit), 1.0)
    near(float((tensor(found.weights) * gradients.norm(dim=1)).sum()), float((weights * gradients.norm(dim=1))[active].sum()))


@settings(max_examples=100, deadline=None)
@given(problems, st.floats(1e-3, 1e3), st.permutations(range(6)))
def test_scale_and_order_do_not_matter(problem: dict[str, Any], factor: float, order: list[int]) -> None:
    gradients, weights = gradients_of(problem)
    order = [k for k in order if k < len(gradients)]
    found, scaled, moved = decided(gradients, weights), decided(factor * gradients, weights), decided(gradients[order], weights[order])
    if abs(found.after.coherence - 0.05) > 1e-6:                     # the state has a threshold, rounding may decide on it
        assert found.state == scaled.state == moved.state
    near(scaled.weights, list(found.weights), 1e-7)
    near(moved.weights, [found.weights[k] for k in order], 1e-7)
    near(moved.unit, [found.unit[k] for k in order], 1e-7)


@settings(max_examples=60, deadline=None)
@given(problems)
def test_no_weights_make_a_shorter_vector(problem: dict[str, Any]) -> None:
    gradients, _ = gradients_of(problem)
    u = shortest(gradients @ gradients.T)
    d = u @ gradients
    size = float(gradients.square().sum(1).max())
    near(float(u.sum()), 1.0)
    assert float(u.min()) >= 0
    assert float((gradients @ d).min()) >= float(d @ d) - 1e-6 * size           # the condition of optimality: every vector reaches beyond d
    for k in range(len(gradients)):
        step = torch.nn.functional.one_hot(torch.tensor(k), len(u)).double()
        other = 0.999 * u + 0.001 * step
        assert float((other @ gradients).square().sum()) >= float(d @ d) - 1e-9 * size


def test_twelve_directions_are_solved_and_thirteen_refused() -> None:
    gradients = torch.randn(LARGEST + 1, 30, generator=torch.Generator().manual_seed(0)).double()
    u = shortest(gradients[:LARGEST] @ gradients[:LARGEST].T)
    reach = gradients[:LARGEST] @ (u @ gradients[:LARGEST])
    assert float(reach.min()) >= float(u @ reach) - 1e-10
    with pytest.raises(ValueError, match="at most 12"):
        shortest(gradients @ gradients.T)


def test_one_direction_goes_its_way() -> None:
    found = control(tensor([[4.0]]), [0.3])
    assert (found.state, found.weights, found.rate, found.mix) == ("ok", (0.3,), 1.0, 0.0)
    assert (found.after.dispersion, found.after.coherence, found.norm) == (1.0, 1.0, 0.6)


def test_bounds_hold_and_the_figures_are_those_of_the_bounded_weights() -> None:
    gradients = tensor([[10.0, 0.0], [0.0, 1.0]])
    free, bound = decided(gradients, tensor([0.5, 0.5])), decided(gradients, tensor([0.5, 0.5]), bounds=(0.8, 1.2))
    assert free.weights[1] > 0.9
    near(bound.weights, [free.weights[0], 0.6])
    assert bound.after.dispersion < 0.7 < free.after.dispersion
    assert bound.after.dispersion > bound.before.dispersion


@pytest.mark.parametrize("gram", [torch.zeros(3, 3), torch.full((3, 3), torch.nan)])
def test_without_a_gradient_there_is_no_update(gram: Tensor) -> None:
    found = control(gram, [1.0, 1.0, 1.0])
    assert (found.weights, found.rate, found.state) == ((0.0, 0.0, 0.0), 0.0, "stationary")
    assert all(value == value for value in found.stats().values())


def test_a_direction_without_weight_stays_out() -> None:
    found = control(torch.eye(3), [1.0, 0.0, 1.0])
    assert found.weights == (1.0, 0.0, 1.0)
    assert found.active == (True, False, True)


def test_the_rate_falls_with_coherence_and_the_step_is_left_out_at_last() -> None:
    def rate(bend: float) -> float:
        return decided(tensor([[1.0, bend], [-1.0, bend]]), tensor([0.5, 0.5])).rate

    assert rate(0.1) == 1.0
    assert rate(0.03) == pytest.approx(0.6, rel=1e-2)
    assert rate(0.004) == 0.0


# -- unstable regions ---------------------------------------------------------------------------------------------------------------

CALM = {"steering/coherence": 0.5, "steering/conflicts": 1.0, "steering/pairs": 10.0, "steering/norm": 1.0, "steering/turn": 0.3, "steering/alarm": 0.0}


def test_two_signs_of_four_slow_the_run_down() -> None:
    past = [CALM] * 20
    assert detect(CALM, past) == ((), False, 1.0)
    one = {"coherence": {"steering/coherence": 0.01}, "conflicts": {"steering/conflicts": 6.0}, "growth": {"steering/norm": 6.0}}
    for name, change in one.items():
        assert detect(CALM | change, past) == ((name,), False, 1.0)
    assert detect(CALM, [CALM | {"steering/turn": -0.5}] * 20) == (("turning",), False, 1.0)
    for name in ("coherence", "conflicts"):
        assert detect(CALM | one[name] | one["growth"], past) == ((name, "growth"), True, 0.5)
    assert detect(CALM | {"steering/conflicts": 5.0, "steering/norm": 5.0, "steering/coherence": 0.05}, past).signs == ()        # limits themselves are fine


def test_the_learning_rate_stays_halved_for_ten_steps_by_the_stats_alone() -> None:
    past, rates = [CALM] * 12, []
    for step in range(14):
        now = CALM | ({"steering/coherence": 0.0, "steering/conflicts": 9.0} if step == 1 else {})
        region = detect(now, past[-20:])
        past = [*past, now | region.stats()]
        rates.append(region.rate)
    assert rates == [1.0] + [0.5] * 10 + [1.0] * 3


def test_medians_wait_for_ten_known_values() -> None:
    turning = CALM | {"steering/turn": -0.9}
    assert detect(CALM, [turning] * 8).signs == ()
    assert detect(CALM, [turning] * 10).signs == ("turning",)
    assert detect(CALM, [CALM | {"steering/turn": float("nan")}] * 20).signs == ()
    assert detect(CALM | {"steering/norm": 99.0}, [CALM] * 9).signs == ()


def test_what_control_reports_is_what_the_detector_reads() -> None:
    stats = control(tensor([[1.0, -0.99], [-0.99, 1.0]]), [1.0, 0.0001]).stats()
    assert {"steering/coherence", "steering/conflicts", "steering/pairs", "steering/norm"} <= stats.keys()
    assert detect(stats | {"steering/coherence": 0.0}, []).signs == ("coherence", "conflicts")
