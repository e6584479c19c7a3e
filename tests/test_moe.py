"""The MoE layer on one rank, against router and experts in float64 numpy, with gradients by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from crossdock import MoE, MoEConfig, RouterConfig, finish_step, moe_layers
from crossdock.experts import ExpertsFormula
from tests.experts.oracle import experts_forward, experts_gradients
from tests.routing.oracle import route, route_gradients

B, S, H, I = 3, 9, 16, 8


def _layer(router: RouterConfig, dtype: torch.dtype, experts: str = "eager", **settings: Any) -> MoE:
    torch.manual_seed(0)
    layer = MoE(H, I, router, MoEConfig(experts=experts, **settings))  # pyright: ignore[reportArgumentType]
    layer.router.reset_parameters(std=0.5)
    layer.experts.reset_parameters(std=0.4)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.normal_(std=0.2)
    return layer.to(dtype)


def _array(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().double().numpy()


def _run(layer: MoE, x: Tensor, padding_mask: Tensor | None, grad: Tensor) -> dict[str, np.ndarray]:
    layer.zero_grad()
    inputs = x.detach().requires_grad_()
    output = layer(inputs, padding_mask)
    assert output.dtype == x.dtype
    assert output.shape == x.shape
    output.backward(grad)
    return {"output": _array(output), "x": _array(inputs.grad)} | {
        name: _array(parameter.grad) for name, parameter in layer.named_parameters()
    }


def _expected(layer: MoE, x: Tensor, padding_mask: Tensor | None, grad: Tensor) -> dict[str, np.ndarray]:
    tokens, grad_output = _array(x).reshape(-1, H), _array(grad).reshape(-1, H)
    mask = None if padding_mask is None else padding_mask.numpy().reshape(-1)
    config, bias = layer.router.config, layer.router.expert_bias
    scoring = (config.score_function, config.norm_topk_prob, config.routed_scaling_factor)
    weight = _array(layer.router.weight)
    routing = route(tokens, weight, config.top_k, *scoring, None if bias is None else _array(bias), mask)
    params = _array(layer.experts.gate_and_up_projs), _array(layer.experts.down_projs)
    inputs = tokens, routing.expert_ids, routing.weights, *params
    grads = experts_gradients(grad_output, *inputs)
    through_router, grad_weight = route_gradients(grads.weights, routing, tokens, weight, *scoring)
    return {
        "output": experts_forward(*inputs).reshape(x.shape),
        "x": (grads.tokens + through_router).reshape(x.shape),
        "router.weight": grad_weight,
        "experts.gate_and_up_projs": grads.gate_and_up_projs,
        "experts.down_projs": grads.down_projs,
    }


def _assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = np.linalg.norm(ours[name] - expected)
        assert error <= tolerance * np.linalg.norm(expected), f"{name}: {error}"


ROUTERS = {
    "softmax": RouterConfig(6, 2),
    "softmax, raw weights": RouterConfig(6, 2, norm_topk_prob=False),
    "sigmoid, scaled": RouterConfig(6, 3, "sigmoid", routed_scaling_factor=2.5),
    "expert bias": RouterConfig(6, 2, "sigmoid", expert_bias=True),
    "all experts": RouterConfig(6, 6),
    "one expert": RouterConfig(1, 1, norm_topk_prob=False),
}


def _tokens(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x, grad = (torch.randn(B, S, H, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, torch.arange(S) >= torch.tensor([[S], [4], [7]]), grad


@pytest.mark.parametrize("name", ROUTERS)
def test_output_and_gradients_equal_the_float64_reference(name: str) -> None:
    cases = (
        ("eager", torch.float64, 1e-12),
        ("eager", torch.float32, 2e-6),
        ("cpu", torch.float64, 1e-12),
        ("cpu", torch.float32, 2e-6),
        ("cpu", torch.bfloat16, 2e-2),
        ("grouped_mm", torch.float32, 2e-6),
        ("grouped_mm", torch.bfloat16, 2e-2),
    )
    for experts, dtype, tolerance in cases:
        layer = _layer(ROUTERS[name], dtype, experts)
        x, padding_mask, grad = _tokens(dtype)
        for mask in (None, padding_mask):
            _assert_close(_run(layer, x, mask, grad), _expected(layer, x, mask, grad), tolerance)


@pytest.mark.parametrize("experts", ["cpu", "eager", "grouped_mm"])
def test_2048_experts(experts: str) -> None:
    layer = _layer(RouterConfig(2048, 8), torch.float32, experts)
    x, mask, grad = _tokens(torch.float32)
    _assert_close(_run(layer, x, mask, grad), _expected(layer, x, mask, grad), 2e-6)


@pytest.mark.parametrize("experts", ["cpu", "eager", "grouped_mm"])
def test_skewed_routing_leaves_idle_experts_a_zero_gradient(experts: str) -> None:
    layer = _layer(RouterConfig(8, 2, expert_bias=True), torch.float32, experts)
    assert layer.router.expert_bias is not None
    layer.router.expert_bias.copy_(torch.tensor([0, 0, 5.0, 0, 0, 5.0, 0, 0]))
    x, mask, grad = _tokens(torch.float32)
    grads = _run(layer, x, mask, grad)
    _assert_close(grads, _expected(layer, x, mask, grad), 2e-6)
    assert layer.load.tokens_per_expert.nonzero().flatten().tolist() == [2, 5]
    idle = [0, 1, 3, 4, 6, 7]
    assert not grads["experts.gate_and_up_projs"][idle].any()
    assert not grads["experts.down_projs"][idle].any()


def test_shape_and_strides_of_the_input_change_nothing() -> None:
    layer = _layer(ROUTERS["softmax"], torch.float32, "grouped_mm")
    x, _, grad = _tokens(torch.float32)
    expected = _run(layer, x, None, grad)
    views = {
        "transposed batch": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "transposed features": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "reversed strides": lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "every other feature": lambda t: torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0],
    }
    for name, view in views.items():
        assert not view(x).is_contiguous(), name
        for key, value in _run(layer, view(x), None, view(grad)).items():
            np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=1e-6, err_msg=f"{name}: {key}")
    flat = _run(layer, x.view(-1, H), None, grad.view(-1, H))
    deep = _run(layer, x.view(B, 3, 3, H), None, grad.view(B, 3, 3, H))
    for key, value in expected.items():
        np.testing.assert_array_equal(flat[key].reshape(value.shape), value)
        np.testing.assert_array_equal(deep[key].reshape(value.shape), value)
    torch.testing.assert_close(layer(x[0, 0]).double().detach(), torch.from_numpy(expected["output"][0, 0]))

    ones = _run(layer, x, None, torch.ones_like(x))
    expanded = _run(layer, x, None, torch.ones(()).expand(x.shape))
    for key, value in ones.items():
        np.testing.assert_array_equal(expanded[key], value)


@pytest.mark.parametrize("experts", ["cpu", "eager", "grouped_mm"])
def test_padding_gives_zero_rows_and_moves_nothing_else(experts: str) -> None:
    layer = _layer(ROUTERS["softmax"], torch.float32, experts)
    x, padding_mask, _ = _tokens(torch.float32)
    output = layer(x, padding_mask)
    assert (output[padding_mask] == 0).all()
    assert output[~padding_mask].any(dim=1).all()
    torch.testing.assert_close(output[~padding_mask], layer(x)[~padding_mask], rtol=1e-6, atol=1e-6)
    other = x.clone()
    other[padding_mask] = 1e6
    assert torch.equal(layer(other, padding_mask), output)


@pytest.mark.parametrize("experts", ["cpu", "eager", "grouped_mm"])
def test_no_tokens_give_zero_gradients(experts: str) -> None:
    layer = _layer(ROUTERS["softmax"], torch.float32, experts)
    for shape in ((0, H), (0, S, H), (B, 0, H)):
        layer.zero_grad()
        x = torch.zeros(shape, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad == 0).all(), name


@pytest.mark.parametrize("experts", ["cpu", "eager", "grouped_mm"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_numbers_flow_and_stay_in_their_row(experts: str, value: float) -> None:
    layer = _layer(
        ROUTERS["expert bias"], torch.float32, experts, sequence_aux_loss_coeff=0.1, batch_aux_loss_coeff=0.1
    )
    x, _, _ = _tokens(torch.float32)
    clean = layer(x)
    x[1, 2, 3] = value
    output = layer(x)
    assert not output[1, 2].isfinite().any()
    others = torch.ones(B, S, dtype=torch.bool)
    others[1, 2] = False
    torch.testing.assert_close(output[others], clean[others], rtol=1e-5, atol=1e-6)
    output.sum().backward()
    assert layer.load.tokens_per_expert.sum() == 2 * B * S


def test_the_attribute_padding_mask_is_of_one_forward_pass() -> None:
    layer = _layer(ROUTERS["softmax"], torch.float32)
    x, padding_mask, _ = _tokens(torch.float32)
    whole, masked = layer(x), layer(x, padding_mask)
    layer.padding_mask = padding_mask
    assert torch.equal(layer(x), masked)
    assert torch.equal(layer(x), whole)
    layer.padding_mask = padding_mask
    none = torch.zeros_like(padding_mask)
    assert torch.equal(layer(x, none), whole), "an argument goes before"
    assert torch.equal(layer(x), whole), "and the attribute was of that pass"
    layer.padding_mask = padding_mask
    with pytest.raises(ValueError, match="padding_mask must be"):
        layer(x[:, 1:])
    assert torch.equal(layer(x), whole)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_recompute_sees_the_mask_that_is_set_inside_of_it(where: str) -> None:
    layer = _layer(ROUTERS["softmax"], torch.float64)
    x, padding_mask, grad = _tokens(torch.float64)
    expected = _run(layer, x, padding_mask, grad)

    def block(inputs: Tensor) -> Tensor:
        if where == "inside":
            layer.padding_mask = padding_mask
        return layer(inputs)

    layer.zero_grad()
    inputs = x.detach().requires_grad_()
    if where == "outside":
        layer.padding_mask = padding_mask
    output = checkpoint(block, inputs, use_reentrant=False)
    assert isinstance(output, Tensor)
    layer(x)  # another pass in between
    if where == "outside":
        with pytest.raises(CheckpointError, match="number of tensors was saved"):
            output.backward(grad)
        return
    output.backward(grad)
    np.testing.assert_array_equal(_array(inputs.grad), expected["x"])
    for name, parameter in layer.named_parameters():
        np.testing.assert_array_equal(_array(parameter.grad), expected[name])


def test_wrong_sizes_and_names_are_refused() -> None:
    layer = _layer(ROUTERS["softmax"], torch.float32)
    for wrong, text in ((torch.tensor(1.0), "x is a scalar"), (torch.randn(H - 1), f"x has {H - 1} features")):
        with pytest.raises(ValueError, match=text):
            layer(wrong)
    assert layer(torch.randn(H)).shape == (H,)
    with pytest.raises(ValueError, match=r"the model has no crossdock\.MoE layer"):
        finish_step(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=rf"{H + 1} features.*hidden_size is {H}"):
        layer(torch.randn(B, S, H + 1))
    with pytest.raises(ValueError, match=r"'abacus'.*auto, cpu, eager, grouped_mm"):
        _layer(ROUTERS["softmax"], torch.float32, "abacus")


@pytest.mark.parametrize("expert_bias", [True, False])
def test_can_be_built_on_the_meta_device(expert_bias: bool) -> None:
    with torch.device("meta"):
        layer = MoE(H, I, RouterConfig(6, 2, expert_bias=expert_bias), MoEConfig(experts="eager"))
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    layer.to_empty(device="cpu")
    layer.router.reset_parameters()
    layer.experts.reset_parameters()
    for buffer in layer.buffers():
        buffer.fill_(3)  # as uninitialised memory may
    layer.reset_buffers()
    reference = MoE(H, I, RouterConfig(6, 2, expert_bias=expert_bias), MoEConfig(experts="eager"))
    for (name, buffer), (other, expected) in zip(layer.named_buffers(), reference.named_buffers(), strict=True):
        assert name == other
        assert buffer.dtype == expected.dtype, name
        assert torch.equal(buffer, expected), name
    reference.load_state_dict(layer.state_dict())
    x, _, _ = _tokens(torch.float32)
    assert torch.equal(layer(x), reference(x))


def test_metadata_of_one_rank() -> None:
    layer = _layer(RouterConfig(5, 2), torch.float32)
    assert (layer.ep_group, layer.ep_rank, layer.ep_world_size) == (None, 0, 1)
    assert layer.local_expert_ids == (0, 1, 2, 3, 4)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Sequential(layer)})
    assert moe_layers(model) == {"b.0": layer}


def _with_shared(gate: bool, **settings: Any) -> MoE:
    torch.manual_seed(0)
    layer = MoE(H, I, RouterConfig(6, 2), MoEConfig(**settings), shared_intermediate_size=12, shared_gate=gate)
    return layer.double()


def test_shared_experts_on_a_stream_of_their_own_change_nothing() -> None:
    x = torch.randn(7, H, dtype=torch.float64)
    outputs = [_with_shared(False, shared_expert_overlap=overlap)(x) for overlap in (False, True)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("gate", [False, True])
def test_shared_experts_add_to_the_routed_ones(gate: bool) -> None:
    layer = _with_shared(gate)
    shared = layer.shared_experts
    assert shared is not None
    assert shared.up_proj is not None
    assert (shared.gate is not None) == gate
    x, padding_mask, _ = _tokens(torch.float64)
    gate_part, up = x @ shared.gate_proj.weight.T, x @ shared.up_proj.weight.T
    expected = (gate_part * gate_part.sigmoid() * up) @ shared.down_proj.weight.T
    if shared.gate is not None:
        expected = expected * (x @ shared.gate.weight.T).sigmoid()
    output = layer(x)
    layer.shared_experts = None
    torch.testing.assert_close(output, layer(x) + expected)
    layer.shared_experts = shared
    assert (layer(x, padding_mask)[padding_mask] == 0).all()
    layer(x).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in shared.parameters())


def test_gradient_scale_multiplies_by_mean_over_own_routes() -> None:
    """Each expert alone: outputs by `c / c_e`, or its weights' gradients by it and all else as it is."""
    x, _, grad = _tokens(torch.float64)
    results, factors = {}, torch.ones(6, dtype=torch.float64)
    for scale in ("off", "output", "gradient"):
        layer = _layer(RouterConfig(6, 2, norm_topk_prob=False), torch.float64, gradient_scale=scale)
        results[scale] = _run(layer, x, None, grad)
        counts = layer.load.tokens_per_expert
        assert counts.min() > 0
        assert counts.max() > counts.min()
        factors = counts.double().mean() / counts
        evaluated = layer.eval()(x)
        np.testing.assert_allclose(_array(evaluated), results["off"]["output"], rtol=1e-12)
    column = factors.numpy()[:, None, None]
    for name, theirs in results["off"].items():
        ours = results["gradient"][name]
        np.testing.assert_allclose(ours, theirs * column if "experts" in name else theirs, rtol=1e-6)
    plain = _layer(RouterConfig(6, 2, norm_topk_prob=False), torch.float64)
    with torch.no_grad():
        plain.experts.down_projs.mul_(factors[:, None, None])
    expected = _run(plain, x, None, grad)
    np.testing.assert_allclose(results["output"]["output"], expected["output"], rtol=1e-6)
    np.testing.assert_allclose(results["output"]["x"], expected["x"], rtol=1e-6, atol=1e-9)


def test_gradient_scale_of_the_output_needs_the_weight_there() -> None:
    with pytest.raises(ValueError, match=r"gradient_scale.*weight on the output"):
        MoE(H, I, RouterConfig(6, 2), MoEConfig(gradient_scale="output"), formula=ExpertsFormula(weight_on="input"))


def test_a_bad_number_in_padding_reaches_no_gradient() -> None:
    torch.manual_seed(0)
    config = MoEConfig(sequence_aux_loss_coeff=0.1, batch_aux_loss_coeff=0.1, z_loss_coeff=0.1)
    layer = MoE(8, 4, RouterConfig(4, 2), config, shared_intermediate_size=4)
    x = torch.randn(1, 5, 8)
    mask = torch.tensor([[False, False, True, False, True]])
    results = []
    for filler in (0.0, torch.nan):
        own = x.masked_fill(mask[..., None], filler).requires_grad_()
        layer.zero_grad()
        layer(own, mask).square().sum().backward()
        results.append([own.grad, *(parameter.grad for parameter in layer.parameters())])
    for clean, bad in zip(*results, strict=True):
        assert torch.equal(clean, bad)


def test_an_expert_that_there_is_none_of_is_named() -> None:
    layer = MoE(8, 4, RouterConfig(4, 2))
    layer.router.register_forward_hook(
        lambda module, args, routing: routing._replace(expert_ids=routing.expert_ids + 99)
    )
    with pytest.raises(ValueError, match=r"the router chose expert \d+; valid are 0 to 3, or -1"):
        layer(torch.randn(1, 5, 8))


def test_static_shapes_of_float64_say_what_helps() -> None:
    layer = MoE(8, 4, RouterConfig(4, 2), MoEConfig(static_shapes=True)).double()
    with pytest.raises(ValueError, match=r"static_shapes .* not torch.float64; use static_shapes = false"):
        layer(torch.randn(3, 8).double())


@pytest.mark.parametrize("shared", [0, 4])
def test_autocast_leaves_a_float64_layer_alone_as_it_does_linear_layers(shared: int) -> None:
    layer = MoE(8, 4, RouterConfig(4, 2), shared_intermediate_size=shared).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        with pytest.raises(ValueError, match=r"x is torch\.float32, this layer torch\.float64"):
            layer(x.float())
    assert torch.equal(output, layer(x))
