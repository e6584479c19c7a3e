"""Auxiliary losses, the node that carries them, the counts it keeps, and the expert bias that reads them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from crossdock import MoE, MoEConfig, RouterConfig, set_batch_totals
from crossdock.routing import (
    BatchTotals,
    LoadCounter,
    LossCoefficients,
    Observed,
    Router,
    Routing,
    count_experts,
    load_statistics,
    reduce_load,
    router_losses,
    switch_loss,
    update_expert_bias,
    z_loss,
)
from tests.ranks import RankPool
from tests.routing.oracle import ScoreFunction, sequence_losses, z_losses

B, S, H, I, E, K = 4, 10, 16, 8, 6, 2
COEFFICIENT = 5.0
LEVELS = ("sequence_aux_loss_coeff", "batch_aux_loss_coeff", "z_loss_coeff")
VALUES = {
    "sequence_aux_loss_coeff": "sequence_aux_loss",
    "batch_aux_loss_coeff": "batch_aux_loss",
    "z_loss_coeff": "z_loss",
}


def _layer(score_function: ScoreFunction = "softmax", **settings: Any) -> MoE:
    torch.manual_seed(0)
    layer = MoE(H, I, RouterConfig(E, K, score_function), MoEConfig(experts="eager", **settings)).double()
    layer.router.reset_parameters(std=0.5)
    layer.experts.reset_parameters(std=0.5)
    return layer


def _batch(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, an uneven padding mask, and factors that make a scalar of an output."""
    torch.manual_seed(seed)
    x = torch.randn(B, S, H, dtype=torch.float64)
    lengths = torch.tensor([S, 3, 7, 1])
    return x, torch.arange(S) >= lengths[:, None], torch.randn(B, S, H, dtype=torch.float64)


def _gradients(layer: MoE) -> dict[str, Tensor]:
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert len(grads) == len(list(layer.parameters())), "a parameter has no gradient"
    return grads


def _captured(layer: MoE) -> list[Routing]:
    routings: list[Routing] = []

    def hook(_module: Any, _args: Any, routing: Any) -> None:
        routings.append(routing)

    layer.router.register_forward_hook(hook)
    return routings


def _random_routing(score_function: ScoreFunction, seed: int = 0) -> tuple[Routing, Tensor]:
    torch.manual_seed(seed)
    router = Router(H, RouterConfig(E, K, score_function)).double()
    router.reset_parameters(std=0.5)
    x, padding_mask, _ = _batch(seed)
    return router(x.view(-1, H), padding_mask=padding_mask.view(-1)), padding_mask


# Values


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrt_softplus"])
def test_values_equal_the_definitions(score_function: ScoreFunction) -> None:
    """Padding counts nowhere: neither in `T` nor in `n_e`; sigmoid scores are normalised first."""
    routing, padding_mask = _random_routing(score_function)
    ids = routing.expert_ids.numpy()
    scores = routing.scores.detach().numpy()
    mask = padding_mask.numpy()
    coefficients = LossCoefficients(sequence_aux=0.3, batch_aux=0.2, z=0.1)
    losses = router_losses(routing, coefficients, (B, S), padding_mask.view(-1), None, LoadCounter(E))

    per_sequence = sequence_losses(scores.reshape(B, S, E), ids.reshape(B, S, K), mask)
    whole_batch = sequence_losses(scores[None], ids[None], mask.reshape(1, -1))
    unpadded_z = z_losses(routing.logits.detach().numpy())[~mask.reshape(-1)]
    np.testing.assert_allclose(losses["sequence_aux_loss"].item(), per_sequence.mean(), rtol=1e-12)
    np.testing.assert_allclose(losses["batch_aux_loss"].item(), whole_batch[0], rtol=1e-12)
    np.testing.assert_allclose(losses["z_loss"].item(), unpadded_z.mean(), rtol=1e-12)

    totals = BatchTotals(sequences=32, tokens=300)
    shares = router_losses(routing, coefficients, (B, S), padding_mask.view(-1), totals, LoadCounter(E))
    np.testing.assert_allclose(shares["sequence_aux_loss"].item(), per_sequence.sum() / 32, rtol=1e-12)
    np.testing.assert_allclose(shares["batch_aux_loss"].item(), whole_batch[0] * len(unpadded_z) / 300, rtol=1e-12)
    np.testing.assert_allclose(shares["z_loss"].item(), unpadded_z.sum() / 300, rtol=1e-12)

    assert router_losses(routing, LossCoefficients(), (B, S), padding_mask.view(-1), None, LoadCounter(E)) == {}


def test_switch_loss_of_groups_equals_the_definition() -> None:
    torch.manual_seed(0)
    probabilities = torch.rand(3, 50, E, dtype=torch.float64).softmax(dim=-1)
    expert_ids = torch.rand(3, 50, E).topk(K).indices
    expert_ids[0, :20, 1] = -1  # dropped routes
    mask = torch.rand(3, 50) < 0.7
    mask[2] = False
    expert_ids = expert_ids.masked_fill(~mask[..., None], -1)
    losses, counted = switch_loss(probabilities, expert_ids, mask)

    for group in range(2):
        real = probabilities[group][mask[group]].numpy()
        counts = np.bincount(expert_ids[group][expert_ids[group] >= 0].numpy(), minlength=E)
        expected = E / (K * len(real) ** 2) * (counts * real.sum(axis=0)).sum()
        np.testing.assert_allclose(losses[group].item(), expected, rtol=1e-12)
    assert losses[2] == 0, "a group without tokens"
    assert counted.tolist() == mask.sum(dim=1).tolist()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrt_softplus"])
def test_switch_loss_is_one_under_perfect_balance(score_function: ScoreFunction) -> None:
    router = Router(H, RouterConfig(E, K, score_function, force_load_balance=True)).double()
    with torch.no_grad():
        router.weight.zero_()
    num_tokens = E * B
    routing = router(torch.randn(num_tokens, H, dtype=torch.float64))
    coefficients = LossCoefficients(sequence_aux=1.0, batch_aux=1.0)
    losses = router_losses(routing, coefficients, (B, E), None, None, LoadCounter(E))
    for loss in losses.values():
        np.testing.assert_allclose(loss.item(), 1.0, rtol=1e-14)

    everything_to_one = torch.zeros(1, num_tokens, 1, dtype=torch.int64)
    probabilities = torch.zeros(1, num_tokens, E, dtype=torch.float64)
    probabilities[..., 0] = 1
    assert switch_loss(probabilities, everything_to_one, torch.ones(1, num_tokens, dtype=torch.bool))[0] == E


def test_z_loss_sums_over_the_tokens_that_count() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(30, E, dtype=torch.float64) * 20, torch.rand(30) < 0.5
    np.testing.assert_allclose(z_loss(logits, mask).item(), z_losses(logits.numpy())[mask.numpy()].sum(), rtol=1e-12)


# Gradients, through the layer


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("coefficient", LEVELS)
def test_gradient_equals_that_of_the_explicit_objective(score_function: ScoreFunction, coefficient: str) -> None:
    """The node adds the gradient of `coeff * aux` to the router, and leaves the output as it is, bit by bit."""
    x, padding_mask, probe = _batch()
    layer = _layer(score_function, **{coefficient: COEFFICIENT})
    inputs = x.clone().requires_grad_()
    output = layer(inputs, padding_mask)
    (output * probe).sum().backward()

    plain = _layer(score_function)
    routings = _captured(plain)
    plain_inputs = x.clone().requires_grad_()
    plain_output = plain(plain_inputs, padding_mask)
    assert torch.equal(output, plain_output)

    # The objective in plain torch, one sequence after the other.
    (routing,) = routings
    real = ~padding_mask
    ids, scores = routing.expert_ids.view(B, S, K), routing.scores.view(B, S, E)
    logits = routing.logits.view(B, S, E)

    def switch(token_scores: Tensor, token_ids: Tensor) -> Tensor:
        counts = torch.bincount(token_ids.flatten(), minlength=E)
        probabilities = token_scores / token_scores.sum(dim=1, keepdim=True)
        return E / (K * len(token_ids) ** 2) * (counts * probabilities.sum(dim=0)).sum()

    aux = {
        "sequence_aux_loss_coeff": lambda: torch.stack([switch(scores[b][real[b]], ids[b][real[b]]) for b in range(B)]),
        "batch_aux_loss_coeff": lambda: switch(scores[real], ids[real]),
        "z_loss_coeff": lambda: logits[real].exp().sum(dim=1).log().square(),
    }[coefficient]().mean()
    language_model = (plain_output * probe).sum()
    (without,) = torch.autograd.grad(language_model, plain.router.weight, retain_graph=True)
    (language_model + COEFFICIENT * aux).backward()

    for name, grad in _gradients(layer).items():
        torch.testing.assert_close(grad, _gradients(plain)[name], rtol=1e-11, atol=1e-13, msg=name)
    assert inputs.grad is not None
    assert plain_inputs.grad is not None
    torch.testing.assert_close(inputs.grad, plain_inputs.grad, rtol=1e-11, atol=1e-13)
    assert layer.router.weight.grad is not None
    assert (layer.router.weight.grad - without).norm() > 1e-3 * without.norm(), "the loss did not reach the router"
    torch.testing.assert_close(layer.load.losses[VALUES[coefficient]], aux.detach(), rtol=1e-12, atol=0)


def _accumulated(layer: MoE, micro_batches: list[slice], use_totals: bool = True) -> dict[str, Tensor]:
    x, padding_mask, probe = _batch()
    if use_totals:
        set_batch_totals(layer, sequences=B, tokens=int((~padding_mask).sum()))
    for rows in micro_batches:
        (layer(x[rows], padding_mask[rows]) * probe[rows]).sum().backward()
    return _gradients(layer)


@pytest.mark.parametrize("coefficient", ["sequence_aux_loss_coeff", "z_loss_coeff"])
def test_gradient_does_not_depend_on_the_number_of_micro_batches(coefficient: str) -> None:
    settings: dict[str, Any] = {coefficient: COEFFICIENT}
    layer = _layer(**settings)
    whole = _accumulated(layer, [slice(0, B)])
    alone = _accumulated(_layer(**settings), [slice(0, B)], use_totals=False)
    off = _accumulated(_layer(), [slice(0, B)])
    assert (whole["router.weight"] - off["router.weight"]).norm() > 1e-2 * off["router.weight"].norm()
    for micro_batches in ([slice(b, b + 1) for b in range(B)], [slice(0, 1), slice(1, B)]):
        split_layer = _layer(**settings)
        split = _accumulated(split_layer, micro_batches)
        for name, grad in whole.items():
            torch.testing.assert_close(split[name], grad, rtol=1e-11, atol=1e-13, msg=name)
        value = VALUES[coefficient]
        torch.testing.assert_close(split_layer.load.losses[value], layer.load.losses[value], rtol=1e-12, atol=0)
        assert torch.equal(split_layer.load.tokens_per_expert, layer.load.tokens_per_expert)
    for name, grad in whole.items():
        torch.testing.assert_close(alone[name], grad, rtol=1e-11, atol=1e-13, msg=name)


def test_batch_level_depends_on_the_micro_batches_by_definition() -> None:
    whole = _accumulated(_layer(batch_aux_loss_coeff=COEFFICIENT), [slice(0, B)])
    split = _accumulated(_layer(batch_aux_loss_coeff=COEFFICIENT), [slice(b, b + 1) for b in range(B)])
    assert (whole["router.weight"] - split["router.weight"]).norm() > 1e-3 * whole["router.weight"].norm()


def test_global_level_of_one_micro_batch_is_the_batch_level() -> None:
    values = []
    for name in ("batch_aux_loss", "global_aux_loss"):
        settings: dict[str, Any] = {f"{name}_coeff": COEFFICIENT}
        layer = _layer(**settings)
        gradients = _accumulated(layer, [slice(0, B)])
        values.append((gradients, layer.load.losses[name]))
    (batch, batch_value), (whole, whole_value) = values
    torch.testing.assert_close(whole_value, batch_value, rtol=1e-12, atol=0)
    for name, grad in batch.items():
        torch.testing.assert_close(whole[name], grad, rtol=1e-11, atol=1e-13, msg=name)


def test_global_level_counts_up_over_the_micro_batches_of_a_step() -> None:
    """`E sum_e f_e P_e` with the frequencies of all tokens until now, token by token."""
    layer = _layer(global_aux_loss_coeff=COEFFICIENT)
    x, padding_mask, _ = _batch()
    micro_batches = [slice(0, 1), slice(1, B)]
    _accumulated(layer, micro_batches)
    with torch.no_grad():
        routing = layer.router(x.reshape(-1, H), padding_mask=padding_mask.reshape(-1))
    real, total = ~padding_mask, int((~padding_mask).sum())
    expected, seen, tokens = 0.0, torch.zeros(E, dtype=torch.float64), 0
    for rows in micro_batches:
        inside = torch.zeros_like(real)
        inside[rows] = real[rows]
        inside = inside.reshape(-1)
        seen += count_experts(routing.expert_ids[inside], E)
        tokens += int(inside.sum())
        probabilities = routing.scores[inside].sum(dim=0) / total
        expected += float(E * (seen / (tokens * K) * probabilities).sum())
    torch.testing.assert_close(layer.load.losses["global_aux_loss"].item(), expected, rtol=1e-12, atol=0)
    assert int(layer.load.tokens) == total
    layer.load.reset()
    assert int(layer.load.tokens) == 0


def test_no_tokens_give_no_loss_and_zero_gradients() -> None:
    layer = _layer(sequence_aux_loss_coeff=1.0, batch_aux_loss_coeff=1.0, z_loss_coeff=1.0)
    for shape in ((0, H), (0, S, H), (B, 0, H)):
        layer(torch.randn(*shape, dtype=torch.float64)).sum().backward()
    x, padding_mask, _ = _batch()
    layer(x, torch.ones_like(padding_mask)).sum().backward()
    assert all((grad == 0).all() for grad in _gradients(layer).values())
    assert all(loss == 0 for loss in layer.load.losses.values())
    assert layer.load.tokens_per_expert.sum() == 0


# Counts


def _must_save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_tokens_are_counted_once_and_the_loss_is_added_once(recompute: str) -> None:
    x, padding_mask, probe = _batch()
    settings: dict[str, Any] = {"sequence_aux_loss_coeff": 0.5, "batch_aux_loss_coeff": 0.5, "z_loss_coeff": 0.5}
    reference = _layer(**settings)
    routings = _captured(reference)
    (reference(x, padding_mask) * probe).sum().backward()
    ids = routings[0].expert_ids.numpy()
    expected = np.bincount(ids[ids >= 0], minlength=E)
    assert expected.sum() == K * int((~padding_mask).sum())

    layer = _layer(**settings)
    runs = _captured(layer)
    options: dict[str, Any] = {"use_reentrant": False}
    if recompute == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _must_save_products)
    outputs = [
        layer(inputs, padding_mask) if recompute == "none" else checkpoint(layer, inputs, padding_mask, **options)
        for inputs in (x.clone().requires_grad_(), x.clone().requires_grad_())
    ]
    assert layer.load.tokens_per_expert.sum() == 0, "a forward pass may run twice: it must not count"
    for number, output in enumerate(outputs, start=1):
        assert output is not None
        (output * probe).sum().backward()
        np.testing.assert_array_equal(layer.load.tokens_per_expert.numpy(), number * expected)
        for name, value in reference.load.losses.items():
            torch.testing.assert_close(layer.load.losses[name], number * value, rtol=1e-12, atol=0)
    assert len(runs) == (2 if recompute == "none" else 4), "the test recomputed nothing"
    for name, grad in _gradients(layer).items():
        torch.testing.assert_close(grad, 2 * _gradients(reference)[name], rtol=1e-12, atol=0, msg=name)
    assert layer.load.evaluation_tokens_per_expert.sum() == 0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_layer_is_counted_once(training: bool, recompute: bool) -> None:
    """Before a layer that is trained, whose backward pass ends there, or is running it again."""
    x, padding_mask, _ = _batch()
    real = K * int((~padding_mask).sum())
    frozen = _layer(sequence_aux_loss_coeff=1.0).requires_grad_(False).train(training)
    trained = torch.nn.Linear(H, H, dtype=torch.float64)
    runs = _captured(frozen)

    def both(inputs: torch.Tensor) -> torch.Tensor:
        return trained(frozen(inputs, padding_mask)).sin()

    for number in (1, 2):
        loss = checkpoint(both, x, use_reentrant=False) if recompute else both(x)
        assert loss is not None
        loss.sum().backward()
        counted, others = frozen.load.tokens_per_expert, frozen.load.evaluation_tokens_per_expert
        assert counted.sum() == (number * real if training else 0)
        assert others.sum() == (0 if training else number * real)
        assert len(runs) == number * (1 + recompute)
        assert bool(frozen.load.losses) == training
    with torch.no_grad():
        both(x)
    assert frozen.load.tokens_per_expert.sum() == (2 * real if training else 0)


def test_evaluation_counts_into_its_own_counter() -> None:
    layer = _layer(expert_bias=True, sequence_aux_loss_coeff=1.0)
    x, padding_mask, _ = _batch()
    real = K * int((~padding_mask).sum())
    layer.eval()
    layer(x, padding_mask)
    with torch.no_grad():
        layer.train()(x, padding_mask)
    assert layer.load.evaluation_tokens_per_expert.sum() == 2 * real
    assert layer.load.tokens_per_expert.sum() == 0
    assert layer.load.losses == {}
    layer(x, padding_mask).sum().backward()
    assert layer.load.tokens_per_expert.sum() == real
    assert layer.load.evaluation_tokens_per_expert.sum() == 2 * real
    layer.load.reset()
    assert layer.load.tokens_per_expert.sum() == 0
    assert layer.load.evaluation_tokens_per_expert.sum() == 2 * real, "a training step forgets no evaluation"
    layer.load.reset_evaluation()
    assert layer.load.evaluation_tokens_per_expert.sum() == 0


def test_counting_leaves_dropped_routes_out_and_is_exact() -> None:
    torch.manual_seed(0)
    expert_ids = torch.randint(-1, 2048, (5000, 4))
    counts = count_experts(expert_ids, 2048)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts, np.bincount(expert_ids[expert_ids >= 0], minlength=2048))
    assert count_experts(torch.full((3, K), -1), E).tolist() == [0] * E
    assert count_experts(expert_ids[:0], E).tolist() == [0] * E
    loads = torch.tensor([[3, 3, 3], [9, 0, 0], [0, 0, 0]])
    assert load_statistics(loads).max_mean.tolist() == [1.0, 3.0, 0.0]


# Expert bias


def _bias(router: Router) -> Tensor:
    assert router.expert_bias is not None
    return router.expert_bias


def test_expert_bias_follows_the_sign_of_the_imbalance_and_is_centred() -> None:
    routers = [Router(H, RouterConfig(4, 2, expert_bias=True)) for _ in range(3)] + [Router(H, RouterConfig(4, 2))]
    large = 2**40  # beyond what fp32 tells apart
    counts = torch.tensor([[10, 2, 6, 6], [9, 1, 1, 1], [large + 1, large - 1, large, large], [1, 2, 3, 4]])
    update_expert_bias(routers, counts, rate=0.25)
    assert _bias(routers[0]).tolist() == [-0.25, 0.25, 0, 0]
    assert _bias(routers[1]).tolist() == [-0.375, 0.125, 0.125, 0.125]
    assert _bias(routers[2]).tolist() == [-0.25, 0.25, 0, 0]
    assert routers[3].expert_bias is None
    before = _bias(routers[1]).clone()
    update_expert_bias(routers, torch.zeros_like(counts), rate=0.25)
    assert torch.equal(_bias(routers[1]), before), "no tokens, no move"

    with torch.no_grad():
        _bias(routers[0]).add_(1)
    update_expert_bias(routers[:1], counts[:1], rate=0.25)
    assert abs(_bias(routers[0]).mean().item()) < 1e-7


def test_expert_bias_levels_the_load() -> None:
    """The loop of layer, counter and bias: an expert that starves is fed, and the training signal is not asked."""
    layer = _layer("sigmoid", expert_bias=True)
    x = torch.randn(4, 200, H, dtype=torch.float64) + 1.0  # a common direction that some experts like better
    ratios, starved = [], None
    for _ in range(40):
        layer.load.reset()
        layer(x).sum().backward()
        counts = reduce_load([layer.load], None).routes
        ratios.append(load_statistics(counts).max_mean.item())
        starved = int(counts[0].argmin()) if starved is None else starved
        update_expert_bias([layer.router], counts, rate=0.02)
        if len(ratios) == 1:
            assert _bias(layer.router)[starved] == _bias(layer.router).max() > 0
    assert ratios[0] > 2.5
    assert min(ratios[-10:]) < 1.2
    assert _bias(layer.router).grad is None


def _reduced_counts_and_bias() -> tuple[np.ndarray, np.ndarray]:
    rank = dist.get_rank()
    counters = [LoadCounter(4) for _ in range(2)]
    for layer, counter in enumerate(counters):
        counter.record(
            Observed(torch.tensor([rank, 2 * rank, 5, 100 * layer]), torch.tensor(3), torch.tensor(rank)), {}
        )
    counts = reduce_load(counters, dist.group.WORLD).routes
    routers = [Router(H, RouterConfig(4, 2, expert_bias=True)) for _ in range(2)]
    update_expert_bias(routers, counts, rate=1e-3)
    return counts.numpy(), torch.stack([_bias(router) for router in routers]).numpy()


def test_counts_are_summed_over_ranks_and_the_bias_is_the_same_on_all(ranks: RankPool) -> None:
    results = ranks.run(3, _reduced_counts_and_bias)
    for counts, bias in results:
        np.testing.assert_array_equal(counts, [[3, 6, 15, 0], [3, 6, 15, 300]])
        np.testing.assert_array_equal(bias, results[0][1])
        np.testing.assert_allclose(bias, [[7.5e-4, -2.5e-4, -1.25e-3, 7.5e-4], [5e-4, 5e-4, 5e-4, -1.5e-3]], atol=1e-9)
