"""A whole layer on a GPU: the numbers of a CPU, no wait for the device, and a CUDA graph of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock import MoE, MoEConfig, RouterConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

HIDDEN, INNER, NUM_EXPERTS, TOP_K = 256, 192, 16, 4
ON_GPU: dict[str, dict[str, Any]] = {
    "grouped_mm": {"experts": "grouped_mm"},
    "triton": {"experts": "triton"},
    "all kernels": {"experts": "triton", "router_kernel": "triton", "shared_expert_overlap": True},
    "static": {"experts": "triton", "router_kernel": "triton", "static_shapes": True},
}


def layer(config: dict[str, Any], dtype: torch.dtype, device: str) -> MoE:
    """The same weights for all settings."""
    torch.manual_seed(0)
    settings = MoEConfig(sequence_aux_loss_coeff=0.01, z_loss_coeff=1e-3, **config)
    moe = MoE(HIDDEN, INNER, RouterConfig(NUM_EXPERTS, TOP_K), settings, shared_intermediate_size=128)
    return moe.to(device, dtype)


def evaluate(moe: MoE, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients, in float64 on the CPU."""
    x = x.detach().to(next(moe.parameters()).device, next(moe.parameters()).dtype).requires_grad_()
    y = moe(x)
    y.square().mean().backward()
    grads = {name: parameter.grad for name, parameter in moe.named_parameters()}
    given = {"y": y.detach(), "x": x.grad, **grads}
    return {name: tensor.cpu().double() for name, tensor in given.items() if tensor is not None}


@pytest.mark.parametrize("config", ON_GPU.values(), ids=ON_GPU)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_output_and_gradients_are_a_cpus(config: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    # The CPU computes in float64 with what the GPU has, so that no router decides otherwise.
    x = torch.randn(2, 300, HIDDEN).to(dtype)
    ours = evaluate(layer(config, dtype, "cuda"), x)
    wanted = evaluate(layer({"experts": "eager"}, dtype, "cpu").double(), x)
    assert ours.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert ours[name].isfinite().all(), name
        assert (ours[name] - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("config", [ON_GPU["all kernels"], ON_GPU["static"]], ids=["one rank", "static"])
def test_a_layer_never_waits_for_the_gpu(config: dict[str, Any]) -> None:
    moe = layer(config, torch.bfloat16, "cuda")
    x = torch.randn(2, 300, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    moe(x).sum().backward()  # compiles, and allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_of_a_layer_computes_what_the_layer_does() -> None:
    """Forward and backward captured once, replayed for other tokens."""
    moe = layer(ON_GPU["static"], torch.bfloat16, "cuda").eval()
    plain = copy.deepcopy(moe)
    x = torch.randn(600, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            moe(x).sum().backward()
        moe.zero_grad()
        x.grad = None
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe(x)
        y.sum().backward()
    for _ in range(2):
        fresh = torch.randn_like(x).detach()
        with torch.no_grad():
            x.copy_(fresh)
            for parameter in moe.parameters():
                parameter.grad.zero_()  # type: ignore[union-attr]
            x.grad.zero_()  # type: ignore[union-attr]
        graph.replay()
        plain.zero_grad()
        leaf = fresh.requires_grad_()
        wanted = plain(leaf)
        wanted.sum().backward()
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(x.grad, leaf.grad)
        for ours, theirs in zip(moe.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
