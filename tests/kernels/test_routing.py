"""A router's decision by one kernel, beside torch's own operations in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crossdock.kernels.routing import Decision, Scoring, decide, decide_reference

SCORINGS = {
    "softmax": Scoring(4),
    "softmax, as they are, scaled": Scoring(3, normalise=False, scale=2.5),
    "sigmoid": Scoring(4, "sigmoid", scale=2.5),
    "sigmoid, as they are": Scoring(1, "sigmoid", normalise=False),
    "sqrt_softplus": Scoring(6, "sqrt_softplus", scale=1.5),
    "over the chosen": Scoring(4, over_chosen=True),
    "all of them": Scoring(9),
}
# A block has 2,048 values: less, several and a part of one.
SIZES = [(5, 9), (300, 9), (37, 64), (3, 300), (1, 16), (0, 16)]

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
scorings = pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def evaluate(
    function: Callable[..., Decision], logits: Tensor, scoring: Scoring, *given: Tensor | None
) -> tuple[Decision, Tensor]:
    """The decision, and the gradient of logits through weights and scores alike."""
    logits = logits.detach().requires_grad_()
    decision = function(logits, scoring, *given)
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
        for out in (decision.weights, decision.scores)
    ]
    (grad,) = torch.autograd.grad((decision.weights, decision.scores), logits, grads)
    return decision, grad


def check(logits: Tensor, scoring: Scoring, bias: Tensor | None, mask: Tensor | None) -> None:
    ours, grad = evaluate(decide, logits, scoring, bias, mask)
    exact = [None if given is None else given.cpu().double() for given in (logits, bias)]
    wanted, wanted_grad = evaluate(decide_reference, exact[0], scoring, exact[1], None if mask is None else mask.cpu())  # type: ignore[arg-type]
    assert torch.equal(ours.expert_ids.cpu(), wanted.expert_ids)
    assert torch.equal(ours.counts.cpu(), wanted.counts)
    assert ours.counts.dtype == ours.expert_ids.dtype == torch.int64
    for got, reference in ((ours.weights, wanted.weights), (ours.scores, wanted.scores), (grad, wanted_grad)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.detach().cpu().double(), reference.detach(), rtol=1e-5, atol=1e-5)


@scorings
@sizes
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
def test_decides_as_torch_does(
    scoring: Scoring, size: tuple[int, int], biased: bool, padded: bool, device: torch.device
) -> None:
    # Where two scores are the same number in fp32 and not in float64, the choice may differ: not with these.
    torch.manual_seed(sum(size))
    logits = torch.randn(size, device=device) * 2
    bias = torch.randn(size[1], device=device) if biased else None
    mask = torch.rand(size[0], device=device) < 0.3 if padded else None
    check(logits, scoring, bias, mask)


@scorings
def test_the_lowest_index_wins_a_tie(scoring: Scoring, device: torch.device) -> None:
    check(torch.zeros(7, 12, device=device), scoring, None, None)
    check(torch.randn(50, 3, device=device).repeat_interleave(4, dim=1), scoring, None, None)


@scorings
def test_extreme_logits_stay_numbers(scoring: Scoring, device: torch.device) -> None:
    logits = torch.randn(20, 12, device=device) * 1e4
    logits[0] = -torch.inf if scoring.over_chosen else -200
    logits[0, :9] = torch.arange(9, device=device)
    decision, grad = evaluate(decide, logits, scoring)
    assert (decision.expert_ids >= 0).all()
    assert decision.expert_ids.sort(dim=1).values.diff(dim=1).all()
    assert decision.weights.isfinite().all()
    assert grad.isfinite().all()


def test_nan_is_chosen_and_seen(device: torch.device) -> None:
    """As torch's topk has it: ids stay valid, and the weights tell."""
    logits = torch.randn(3, 8, device=device)
    logits[1, 5] = torch.nan
    for scoring in (Scoring(2), Scoring(2, "sigmoid"), Scoring(2, "sqrt_softplus"), Scoring(2, over_chosen=True)):
        decision = decide(logits, scoring)
        assert ((decision.expert_ids >= 0) & (decision.expert_ids < 8)).all()
        assert decision.weights[1].isnan().any()
        assert decision.weights[[0, 2]].isfinite().all()
        assert decision.counts.sum() == 6


@scorings
def test_nan_is_seen_in_the_gradient(scoring: Scoring, device: torch.device) -> None:
    logits = torch.randn(3, 9, device=device)
    logits[1, 5] = torch.nan
    _, grad = evaluate(decide, logits, scoring)
    assert grad[1, 5].isnan()
    assert grad[[0, 2]].isfinite().all()


def test_a_root_of_a_large_logit_has_its_slope(device: torch.device) -> None:
    """Where `exp(-s^2)` is 0 or about to be."""
    logits = torch.tensor([[15.0, 40.0, 87.5, 97.0, 103.2, 110.0, 3000.0]], device=device).t()
    _, grad = evaluate(decide, logits, Scoring(1, "sqrt_softplus", normalise=False))
    _, wanted = evaluate(decide_reference, logits.cpu().double(), Scoring(1, "sqrt_softplus", normalise=False))
    torch.testing.assert_close(grad.cpu().double(), wanted, rtol=1e-5, atol=0)


def test_strided_inputs_change_nothing(device: torch.device) -> None:
    """Every second one of a wider tensor's."""
    logits = torch.randn(9, 12, device=device).t()
    bias, mask = torch.randn(18, device=device)[::2], (torch.rand(24, device=device) < 0.4)[::2]
    check(logits, Scoring(3), bias, mask)
