"""`experts_implementation="crossdock"` on one rank: transformers' own numbers, or one clear refusal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

import crossdock
from crossdock.integrations.transformers import crossdock_experts_forward
from tests.experts.oracle import experts_forward, experts_gradients
from tests.integrations.tiny_models import load, loss_and_gradients, token_ids, write_model

E, H, I = 5, 16, 24


class _Experts(nn.Module):
    """The parameters of transformers' experts modules, in the order in memory that a family has."""

    def __init__(self, config: Any, dtype: torch.dtype, transposed: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        gate_up = torch.randn(E, H, 2 * I, generator=generator, dtype=torch.float64)
        down = torch.randn(E, I, H, generator=generator, dtype=torch.float64)
        if not transposed:
            gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
        self.gate_up_proj = nn.Parameter(gate_up.to(dtype))
        self.down_proj = nn.Parameter(down.to(dtype))
        self.num_experts = E
        self.act_fn = ACT2FN["silu"]


def _experts(dtype: torch.dtype, transposed: bool) -> Any:
    class Experts(_Experts):
        pass

    decorated = use_experts_implementation(Experts, is_transposed=transposed)
    return decorated(SimpleNamespace(_experts_implementation="crossdock"), dtype, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_output_and_gradients_equal_float64_oracle(transposed: bool, dtype: torch.dtype, tolerance: float) -> None:
    experts = _experts(dtype, transposed)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(9, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.rand(9, 3, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    ids = torch.randint(0, E, (9, 3), generator=generator)
    # "No route", in transformers' way and in ours; a row without any.
    ids[0, 1], ids[1, 2], ids[2] = E, -1, E
    grad = torch.randn(9, H, generator=generator, dtype=torch.float64).to(dtype)

    y = experts(tokens, ids, weights)
    y.backward(grad)

    params = [p.detach().double().numpy() for p in (experts.gate_up_proj, experts.down_proj)]
    if not transposed:
        params = [p.transpose(0, 2, 1) for p in params]
    routes = np.where(ids.numpy() == E, -1, ids.numpy())
    inputs = (tokens.detach().double().numpy(), routes, weights.detach().double().numpy(), *params)
    expected = experts_gradients(grad.double().numpy(), *inputs)
    _assert_close(y, experts_forward(*inputs), tolerance)
    _assert_close(tokens.grad, expected.tokens, tolerance)
    _assert_close(weights.grad, expected.weights, tolerance)
    for parameter, gradient in (
        (experts.gate_up_proj, expected.gate_and_up_projs),
        (experts.down_proj, expected.down_projs),
    ):
        _assert_close(parameter.grad, gradient if transposed else gradient.transpose(0, 2, 1), tolerance)


def _assert_close(actual: Tensor | None, expected: np.ndarray, tolerance: float) -> None:
    assert actual is not None
    assert np.linalg.norm(actual.detach().double().numpy() - expected) <= tolerance * np.linalg.norm(expected)


class _CopiesOf(TorchDispatchMode):
    """Counts ops that copy a tensor with as many elements as a weight."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.count = sizes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("clone", "copy_", "_to_copy", "contiguous") and args[0].numel() in self.sizes:
            self.count += 1
        return result


@pytest.mark.parametrize("transposed", [False, True])
def test_no_copy_of_the_weights_and_gradients_in_their_order_of_memory(transposed: bool) -> None:
    experts = _experts(torch.float32, transposed)
    tokens, ids = torch.randn(9, H), torch.randint(0, E, (9, 2))
    with _CopiesOf({experts.gate_up_proj.numel(), experts.down_proj.numel()}) as copies:
        experts(tokens, ids, torch.rand(9, 2)).sum().backward()
    assert copies.count == 0
    for parameter in experts.parameters():
        assert parameter.grad.stride() == parameter.stride()


def test_autocast_computes_in_its_dtype_like_transformers_eager() -> None:
    experts = _experts(torch.float32, transposed=False)
    tokens, ids, weights = torch.randn(40, H), torch.randint(0, E, (40, 2)), torch.rand(40, 2)
    exact = experts(tokens, ids, weights)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = experts(tokens, ids, weights)
    assert rounded.dtype == exact.dtype
    distance = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-4 < distance < 2e-2


@pytest.mark.parametrize(
    ("family", "overrides"), [("qwen3_moe", {}), ("qwen3_moe", {"hidden_act": "gelu_pytorch_tanh"}), ("gpt_oss", {})]
)
def test_model_on_one_rank_equals_transformers_own(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    folder = write_model(tmp_path, family, **overrides)
    ids = token_ids(0)
    loss, gradients = loss_and_gradients(load(folder, experts="eager"), ids)
    our_loss, our_gradients = loss_and_gradients(load(folder, experts="crossdock"), ids)
    assert our_loss == pytest.approx(loss, rel=1e-6)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert np.linalg.norm(our_gradients[name] - gradient) <= 1e-5 * np.linalg.norm(gradient), name


def test_experts_that_ours_cannot_compute_are_refused(tmp_path: Path) -> None:
    model = load(write_model(tmp_path, "qwen3_moe", hidden_act="mish"), experts="crossdock")
    reason = "Qwen3MoeExperts has the activation Mish"
    with pytest.raises(ValueError, match=f"{reason}.*experts_implementation='grouped_mm'"):
        model(input_ids=token_ids(0))


@pytest.mark.parametrize("what", ["a norm after each expert", "a gating function of its own"])
def test_what_experts_have_beside_their_products_is_refused(what: str) -> None:
    experts = _experts(torch.float32, transposed=False)
    if "norm" in what:
        experts.has_post_expert_norm = True
    else:
        type(experts)._apply_gate = lambda self, gate_up: gate_up[..., :I]
    with pytest.raises(ValueError, match=what):
        crossdock_experts_forward(experts, torch.randn(1, H), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def test_experts_without_a_gate_equal_transformers_own() -> None:
    class Experts(_Experts):
        def __init__(self, config: Any) -> None:
            super().__init__(config, torch.float32, transposed=False)
            self.up_proj = nn.Parameter(self.gate_up_proj.detach()[:, :I].contiguous())
            del self.gate_up_proj
            self.act_fn = ACT2FN["relu2"]

    config = SimpleNamespace(_experts_implementation="grouped_mm")
    experts = use_experts_implementation(Experts, has_gate=False)(config)  # type: ignore[call-arg]
    tokens, ids, weights = torch.randn(9, H), torch.randint(0, E, (9, 2)), torch.rand(9, 2)
    results = []
    for name in ("grouped_mm", "crossdock"):
        config._experts_implementation = name
        y = experts(tokens, ids, weights)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(experts.parameters()))])
    for theirs, ours in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_configured_backend_is_used(caplog: pytest.LogCaptureFixture) -> None:
    experts = _experts(torch.float64, transposed=False)
    tokens, ids = torch.randn(2, H, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.int64)
    try:
        crossdock.configure(experts="grouped_mm")
        experts(tokens, ids, torch.ones(2, 1))
    finally:
        crossdock.configure(experts="auto")
    (said,) = caplog.messages
    assert "grouped_mm" in said
    assert "float64" in said
