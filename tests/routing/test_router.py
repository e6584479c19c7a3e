"""The router's decision: against an independent float64 computation, transformers, and its own contract."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from crossdock.kernels import runtime
from crossdock.routing import Router, RouterConfig, count_experts
from tests.routing.oracle import ScoreFunction, dense_weights, route, route_gradients

T, H, E, K = 40, 24, 12, 3


def _router(config: RouterConfig, seed: int = 0, hidden_size: int = H) -> Router:
    torch.manual_seed(seed)
    router = Router(hidden_size, config)
    router.reset_parameters(std=0.5)
    if router.expert_bias is not None:
        router.expert_bias.normal_(std=0.3)
    return router


def _sorted(expert_ids: Tensor | np.ndarray) -> np.ndarray:
    return np.sort(np.asarray(expert_ids), axis=1)


@pytest.mark.parametrize("scaling_factor", [1.0, 2.5])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("expert_bias", [True, False])
def test_decision_and_gradients_equal_the_formulas(
    score_function: ScoreFunction, norm_topk_prob: bool, scaling_factor: float, expert_bias: bool
) -> None:
    config = RouterConfig(E, K, score_function, norm_topk_prob, scaling_factor, expert_bias)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        router = _router(config).to(dtype)
        x = torch.randn(T, H, dtype=dtype, requires_grad=True)
        padding_mask = torch.rand(T) < 0.2
        routing = router(x, padding_mask=padding_mask)

        x_array, weight = x.detach().double().numpy(), router.weight.detach().double().numpy()
        bias = None if router.expert_bias is None else router.expert_bias.double().numpy()
        expected = route(x_array, weight, K, score_function, norm_topk_prob, scaling_factor, bias, padding_mask.numpy())
        np.testing.assert_array_equal(_sorted(routing.expert_ids), _sorted(expected.expert_ids))
        np.testing.assert_allclose(routing.logits.detach(), expected.logits, rtol=tolerance, atol=10 * tolerance)
        np.testing.assert_allclose(routing.scores.detach(), expected.scores, rtol=10 * tolerance)
        ours = dense_weights(routing.expert_ids.numpy(), routing.weights.detach().double().numpy(), E)
        theirs = dense_weights(expected.expert_ids, expected.weights, E)
        np.testing.assert_allclose(ours, theirs, rtol=10 * tolerance)

        probe = torch.randn(E, dtype=dtype)  # one factor per expert, so that the order of a token's experts is free
        (routing.weights * probe[routing.expert_ids]).sum().backward()
        grads = route_gradients(
            probe.double().numpy()[expected.expert_ids],
            expected,
            x_array,
            weight,
            score_function,
            norm_topk_prob,
            scaling_factor,
        )
        assert x.grad is not None
        assert router.weight.grad is not None
        for ours, theirs in zip((x.grad, router.weight.grad), grads, strict=True):
            assert np.linalg.norm(ours.double().numpy() - theirs) <= 10 * tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("top_k", [1, 4, 16])
def test_equals_transformers_qwen3(norm_topk_prob: bool, top_k: int) -> None:
    router = _router(RouterConfig(16, top_k, norm_topk_prob=norm_topk_prob))
    config = Qwen3MoeConfig(
        hidden_size=H, num_experts=16, num_experts_per_tok=top_k, norm_topk_prob=norm_topk_prob, num_hidden_layers=1
    )
    peer = Qwen3MoeTopKRouter(config)
    peer.weight = nn.Parameter(router.weight.detach().clone())
    x = torch.randn(500, H)
    routing = router(x)
    _, weights, expert_ids = peer(x)
    assert torch.equal(routing.expert_ids, expert_ids)
    torch.testing.assert_close(routing.weights, weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrt_softplus"])
def test_bias_changes_the_choice_and_never_the_weights(score_function: ScoreFunction) -> None:
    """A bias of any size, negative sums included, decides who is chosen; weights are the scores alone."""
    config = RouterConfig(E, K, score_function, norm_topk_prob=False, expert_bias=True)
    router = _router(config)
    assert router.expert_bias is not None
    x = torch.randn(T, H)
    router.expert_bias.zero_()
    plain = router(x)
    for favourite in (0, E - 1):
        router.expert_bias.fill_(-7.0)
        router.expert_bias[favourite] = -5.0
        biased = router(x)
        assert (biased.expert_ids == favourite).any(dim=1).all()
        assert not (plain.expert_ids == favourite).any(dim=1).all()
        assert torch.equal(biased.scores, plain.scores)
        assert torch.equal(biased.weights, plain.scores.gather(1, biased.expert_ids))


def test_bias_is_a_buffer_that_gets_no_gradient() -> None:
    router = _router(RouterConfig(E, K, expert_bias=True))
    assert router.expert_bias is not None
    assert "expert_bias" in router.state_dict()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    router(torch.randn(T, H)).weights.square().sum().backward()
    assert not router.expert_bias.requires_grad
    assert router.expert_bias.grad is None


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.half().float(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float64),
    ],
    ids=["bfloat16", "double", "half-float", "to-bfloat16", "to-device-and-float64"],
)
def test_bias_keeps_its_fp32_bits_through_casts(cast: Callable[[nn.Module], nn.Module]) -> None:
    router = _router(RouterConfig(E, K, expert_bias=True))
    assert router.expert_bias is not None
    before = router.expert_bias.clone()
    cast(nn.Sequential(router))
    assert router.expert_bias.dtype == torch.float32
    assert torch.equal(router.expert_bias, before)
    router.expert_bias += 1e-3  # The buffer that the model saves is still the one that routing reads.
    assert torch.equal(router.state_dict()["expert_bias"], before + 1e-3)


def test_bias_is_fp32_under_another_default_dtype() -> None:
    """Model libraries build under `set_default_dtype(bfloat16)`, where steps of 1e-3 would be rounded away."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = Router(H, RouterConfig(E, K, expert_bias=True))
    finally:
        torch.set_default_dtype(default)
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias is not None
    assert router.expert_bias.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("expert_bias", [True, False])
def test_computes_in_fp32_or_in_float64_where_the_input_is(
    dtype: torch.dtype, expected: torch.dtype, expert_bias: bool
) -> None:
    router = _router(RouterConfig(E, K, expert_bias=expert_bias)).to(dtype)
    x = torch.randn(T, H).to(dtype)
    routing = router(x)
    assert {routing.logits.dtype, routing.scores.dtype, routing.weights.dtype} == {expected}
    assert routing.expert_ids.dtype == torch.int64
    logits = x.double() @ router.weight.detach().double().T
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[expected]
    assert (routing.logits - logits).norm() <= tolerance * logits.norm(), "rounded on the way"


def test_computes_in_fp32_under_autocast() -> None:
    router = _router(RouterConfig(E, K))
    x = torch.randn(T, H)
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    for ours, theirs in zip(routing[:4], expected[:4], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("force_load_balance", [True, False])
def test_padding_has_no_expert_no_weight_and_no_gradient(force_load_balance: bool) -> None:
    router = _router(RouterConfig(E, K, force_load_balance=force_load_balance))
    x = torch.randn(T, H, requires_grad=True)
    padding_mask = torch.arange(T) % 3 == 1
    routing = router(x, sequence_shape=(4, T // 4), padding_mask=padding_mask)
    assert (routing.expert_ids[padding_mask] == -1).all()
    assert (routing.weights[padding_mask] == 0).all()
    assert (routing.expert_ids[~padding_mask] >= 0).all()
    assert int(count_experts(routing.expert_ids, E).sum()) == int((~padding_mask).sum()) * K
    (routing.weights * torch.randn(T, K)).sum().backward()
    assert x.grad is not None
    assert (x.grad[padding_mask] == 0).all()
    assert x.grad[~padding_mask].any(dim=1).all()

    alone = router(x[~padding_mask])
    assert torch.equal(routing.expert_ids[~padding_mask], alone.expert_ids)
    all_padding = router(x, padding_mask=torch.ones(T, dtype=torch.bool))
    assert (all_padding.expert_ids == -1).all()
    assert (all_padding.weights == 0).all()


@pytest.mark.parametrize(("num_experts", "top_k"), [(12, 3), (12, 5), (12, 12), (7, 2), (2048, 8)])
def test_forced_balance_is_uniform_whatever_the_input(num_experts: int, top_k: int) -> None:
    router = _router(RouterConfig(num_experts, top_k, force_load_balance=True, expert_bias=True))
    num_tokens = 2 * num_experts
    padding_mask = torch.zeros(3 * num_experts, dtype=torch.bool)
    padding_mask[torch.randperm(3 * num_experts)[:num_experts]] = True

    counts = count_experts(router(torch.randn(num_tokens, H)).expert_ids, num_experts)
    assert (counts == num_tokens * top_k // num_experts).all()
    padded = router(torch.randn(3 * num_experts, H), padding_mask=padding_mask).expert_ids
    assert torch.equal(count_experts(padded, num_experts), counts)
    assert torch.equal(router(torch.randn(3 * num_experts, H), padding_mask=padding_mask).expert_ids, padded)
    assert all(len(set(ids)) == top_k for ids in padded[~padding_mask].tolist())

    uneven = count_experts(router(torch.randn(num_experts + 1, H)).expert_ids, num_experts)
    assert uneven.sum() == (num_experts + 1) * top_k
    assert uneven.max() - uneven.min() <= 1


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("expert_bias", [True, False])
def test_bad_numbers_get_valid_ids(score_function: ScoreFunction, expert_bias: bool) -> None:
    """NaN and infinity flow: ids are distinct experts, the other tokens' decision is untouched."""
    router = _router(RouterConfig(E, K, score_function, expert_bias=expert_bias))
    x = torch.randn(T, H)
    clean = router(x)
    bad = torch.zeros(T, dtype=torch.bool)
    for row, value in ((0, torch.nan), (1, torch.inf), (2, -torch.inf), (3, 3e38)):
        x[row] = value
        bad[row] = True
    x[4, 0], bad[4] = torch.nan, True
    routing = router(x)
    assert int(routing.expert_ids.min()) >= 0
    assert int(routing.expert_ids.max()) < E
    assert all(len(set(ids)) == K for ids in routing.expert_ids.tolist())
    for ours, theirs in zip(routing[:4], clean[:4], strict=True):
        assert torch.equal(ours[~bad], theirs[~bad])
    assert routing.weights[0].isnan().all()


def test_ties_are_decided_the_same_way_each_time() -> None:
    router = _router(RouterConfig(64, 8))
    with torch.no_grad():
        router.weight.zero_()
    first, second = (router(torch.randn(200, H)).expert_ids for _ in range(2))
    assert torch.equal(first, second)
    assert all(len(set(ids)) == 8 for ids in first.tolist())


def test_no_tokens_and_all_experts() -> None:
    router = _router(RouterConfig(E, E))
    routing = router(torch.randn(0, H))
    assert routing.expert_ids.shape == routing.weights.shape == (0, E)
    routing.weights.sum().backward()
    assert router.weight.grad is not None
    assert (router.weight.grad == 0).all()
    assert torch.equal(router(torch.randn(T, H)).expert_ids.sort().values, torch.arange(E).expand(T, E))


@pytest.mark.parametrize("top_k", [0, E + 1, -1])
def test_impossible_top_k_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k \({top_k}\).*num_experts \({E}\)"):
        RouterConfig(E, top_k)


def test_unknown_score_function_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tanh'.*softmax, sigmoid, sqrt_softplus"):
        RouterConfig(E, K, score_function="tanh")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("seed", [None, 3])
def test_forced_zipf_draws_by_the_law_whatever_the_input(seed: int | None) -> None:
    config = RouterConfig(12, 2, force_zipf=1.0, force_zipf_seed=seed)
    router, num_tokens = _router(config), 20_000
    ids = router(torch.randn(num_tokens, H)).expert_ids
    assert torch.equal(ids, router(torch.randn(num_tokens, H)).expert_ids)
    assert (ids[:, 0] != ids[:, 1]).all()
    # The first of a token's experts is drawn from all of them: its frequencies are the law's.
    law = 1 / torch.arange(1, 13).double()
    law /= law.sum()
    shares = torch.bincount(ids[:, 0], minlength=12).double() / num_tokens
    popular = shares.argsort(descending=True)
    in_order = torch.equal(popular[:3], torch.arange(3))
    assert in_order == (seed is None)
    assert (shares.sort(descending=True).values - law).abs().max() < 0.015


@pytest.mark.parametrize("seed", [None, 3])
def test_forced_zipf_drifts_with_the_steps(seed: int | None) -> None:
    router = _router(RouterConfig(12, 2, force_zipf=1.5, force_zipf_seed=seed, force_zipf_drift=2))
    popular = []
    for _ in range(6):
        popular.append(router(torch.randn(2000, H)).expert_ids.flatten().mode().values.item())
        router.steps += 1
    assert popular[::2] == popular[1::2]
    assert len(set(popular)) > 1
    assert seed is not None or popular[::2] == [0, 1, 2]


def test_jitter_moves_the_decision_in_training_alone() -> None:
    router = _router(RouterConfig(E, K, input_jitter=0.3))
    plain = _router(RouterConfig(E, K))
    plain.load_state_dict(router.state_dict())
    x = torch.randn(T, H)
    assert torch.equal(router.eval()(x).logits, plain(x).logits)
    router.train()
    torch.manual_seed(5)
    noise = torch.empty_like(x).uniform_(0.7, 1.3)
    torch.manual_seed(5)
    assert torch.equal(router(x).logits, plain(x * noise).logits)
    assert not torch.equal(router(x).logits, router(x).logits)


def test_router_dtype_input_rounds_as_the_input_does() -> None:
    wide, narrow = (_router(RouterConfig(E, K, router_dtype=dtype)) for dtype in ("float32", "input"))
    narrow.load_state_dict(wide.state_dict())
    x = torch.randn(T, H).bfloat16()
    logits = narrow.bfloat16()(x).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits.bfloat16().float())
    assert not torch.equal(wide.bfloat16()(x).logits, logits)


def test_groups_that_lose_are_out_even_where_all_scores_are_negative() -> None:
    router = _router(RouterConfig(8, 2, "sigmoid", n_group=4, topk_group=1, expert_bias=True))
    assert router.expert_bias is not None
    router.expert_bias.fill_(-5)
    ids = router(torch.randn(T, H)).expert_ids
    assert torch.equal(ids[:, 0] // 2, ids[:, 1] // 2), "both from one group"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_group": 5}, r"n_group \(5\).*num_experts \(12\)"),
        ({"n_group": 4, "topk_group": 5}, r"topk_group \(5\)"),
        ({"n_group": 6, "topk_group": 1}, r"topk_group \(1\).*top_k \(3\).*not 2"),
        ({"softmax_over": "chosen", "score_function": "sigmoid"}, "softmax_over"),
        ({"input_jitter": 1.0}, r"input_jitter \(1.0\)"),
        ({"capacity_factor": 0.0}, r"capacity_factor \(0.0\)"),
        ({"force_zipf": -1.0}, r"force_zipf \(-1.0\)"),
        ({"drop_policy": "random"}, "'random'.*probs, position"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RouterConfig(12, 3, **settings)


def test_an_expert_far_below_the_others_has_a_finite_gradient() -> None:
    """softplus is 0 in fp32 from a logit of -104 on, where its root has no slope."""
    router = Router(4, RouterConfig(4, 2, score_function="sqrt_softplus"))
    with torch.no_grad():
        router.weight.copy_(torch.diag(torch.tensor([10.0, 5.0, 2.0, -200.0])))
    x = torch.ones(3, 4, requires_grad=True)
    router(x, sequence_shape=(3,)).weights.square().sum().backward()
    assert x.grad is not None
    assert router.weight.grad is not None
    assert x.grad.isfinite().all()
    assert router.weight.grad.isfinite().all()


def test_a_router_whose_weights_are_constant_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    importlib.import_module("crossdock.routing.router")._warn_of_constant_weights.cache_clear()
    for config in (RouterConfig(4, 2), RouterConfig(4, 1, norm_topk_prob=False)):
        Router(H, config)
    assert caplog.messages == []
    for config in (RouterConfig(4, 1), RouterConfig(4, 1, norm_topk_prob=False, softmax_over="chosen")):
        router = Router(H, config)
        routing = router(torch.randn(T, H))
        torch.testing.assert_close(routing.weights, torch.ones(T, 1))
    (said,) = caplog.messages
    assert "top_k = 1 with normalised weights" in said


@pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    "config",
    [
        RouterConfig(8, 2),
        RouterConfig(8, 3, "sigmoid", norm_topk_prob=False, routed_scaling_factor=2.5, expert_bias=True),
        RouterConfig(8, 2, "sqrt_softplus"),
        RouterConfig(8, 4, softmax_over="chosen", bias=True),
        RouterConfig(8, 2, n_group=4, topk_group=2),
        RouterConfig(8, 2, capacity_factor=1.0),
        RouterConfig(8, 2, force_load_balance=True),
    ],
    ids=["softmax", "sigmoid", "sqrt_softplus", "chosen", "groups", "capacity", "forced"],
)
def test_one_kernel_decides_as_torch_does(config: RouterConfig) -> None:
    """Where it cannot, torch does."""
    torch.manual_seed(0)
    ours, theirs = (Router(16, replace(config, kernel=kernel)) for kernel in ("triton", "torch"))
    x, mask = torch.randn(40, 16), torch.rand(40) < 0.2
    for router in (ours, theirs):
        router.load_state_dict(theirs.state_dict())
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.linspace(-0.1, 0.1, 8))
    results = []
    for router in (ours, theirs):
        routing = router(x, padding_mask=mask)
        (routing.weights.square().sum() + routing.scores.square().sum() + routing.logits.square().sum()).backward()
        results.append((routing, router.weight.grad))
    (decided, grad), (wanted, wanted_grad) = results
    assert torch.equal(decided.expert_ids, wanted.expert_ids)
    torch.testing.assert_close(decided.weights, wanted.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(decided.scores, wanted.scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-5)
    plain = not (config.n_group > 1 or config.capacity_factor or config.force_load_balance)
    assert (decided.counts is not None) == plain
    if decided.counts is not None:
        assert torch.equal(decided.counts, count_experts(wanted.expert_ids, 8))
