"""`static_shapes`: the numbers of the other dispatchers, without an operation whose shape depends on the routing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossdock import MoE, MoEConfig, RouterConfig, apply_ep
from crossdock.dispatch import DispatchOptions, StaticDispatcher, build_dispatcher
from tests.ranks import RankPool

H, I, E, K, TOKENS = 16, 8, 9, 3, 6
# What a GPU has to be waited for.
_SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal")


class _NoSyncs(TorchDispatchMode):
    """Refuses what reads values on the host, or makes a shape of them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _SYNCS, name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} with a mask"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None
        if definition := OPDEFS.get(func._schema.name):
            with self:  # An operator of ours would run unseen.
                return definition._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _tokens(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(num_tokens, H), torch.randn(num_tokens, H)


def _array(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().double().numpy()


def _settings(dispatcher: Any, **others: Any) -> MoEConfig:
    return MoEConfig(dispatcher, experts="grouped_mm", sequence_aux_loss_coeff=0.1, z_loss_coeff=0.01, **others)


def _layer(config: MoEConfig) -> MoE:
    torch.manual_seed(0)
    layer = MoE(H, I, RouterConfig(E, K, expert_bias=True), config, bias=True, shared_intermediate_size=8)
    layer.router.reset_parameters(std=0.5)
    layer.experts.reset_parameters(std=0.4)
    for bias in (layer.experts.gate_and_up_bias, layer.experts.down_bias):
        assert bias is not None
        nn.init.normal_(bias)
    return layer


def _run(layer: MoE, x: Tensor, grad: Tensor, mask: Tensor | None) -> dict[str, np.ndarray]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x, mask)
    out.backward(grad)
    named = {name: _array(parameter.grad) for name, parameter in layer.named_parameters()}
    return {"out": _array(out), "x": _array(x.grad)} | named


def _compare() -> list[dict[str, dict[str, np.ndarray]]]:
    """Of batches of several sizes: `alltoall`, and `static_shapes`, whose first batch is the largest."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    layers = {}
    for name, config in (
        ("plain", _settings("alltoall")),
        ("static", _settings("alltoall", static_shapes=True)),
        ("checked", _settings("allgather", static_shapes=True, debug_checks=True)),
    ):
        layers[name] = _layer(config)
        apply_ep(nn.ModuleList([layers[name]]), mesh)
    results = []
    for batch, num_tokens in enumerate((TOKENS - rank, 2 * rank, 0, TOKENS)):
        x, grad = _tokens(num_tokens, 10 * batch + rank)
        mask = torch.arange(num_tokens) == 1
        of_batch = {}
        for name, layer in layers.items():
            if name == "static" and batch:
                with _NoSyncs():
                    of_batch[name] = _run(layer, x, grad, mask)
                    layer.eval()(x)
                    layer.train()
            else:
                of_batch[name] = _run(layer, x, grad, mask)
        results.append(of_batch)
    static = layers["static"].dispatcher
    assert isinstance(static, StaticDispatcher)
    assert static.max_tokens == TOKENS
    counts = [layer.load.tokens_per_expert.tolist() for layer in layers.values()]
    assert counts[0] == counts[1] == counts[2]
    # Too many tokens: everywhere, since another rank would wait for one that refuses alone.
    with pytest.raises(ValueError, match=rf"{TOKENS + 1} tokens are more than the {TOKENS} .* largest batch"):
        layers["static"](torch.randn(TOKENS + 1, H))
    with pytest.raises(ValueError, match=rf"{TOKENS + 1} tokens are more than the {TOKENS} .* static_shapes = false"):
        layers["checked"](torch.randn(TOKENS + (rank == 0), H))
    return results


def test_numbers_are_those_of_alltoall_and_nothing_syncs(ranks: RankPool) -> None:
    for results in ranks.run(3, _compare):
        for of_batch in results:
            for name, expected in of_batch["plain"].items():
                np.testing.assert_array_equal(of_batch["checked"][name], of_batch["static"][name])
                np.testing.assert_allclose(of_batch["static"][name], expected, 1e-5, 1e-6, err_msg=name)


def test_one_rank_needs_no_sync_either() -> None:
    layers = [_layer(_settings("alltoall", static_shapes=static)) for static in (False, True)]
    x, grad = _tokens(TOKENS, 0)
    mask = torch.arange(TOKENS) == 1
    expected = _run(layers[0], x, grad, mask)
    with pytest.raises(AssertionError, match="nonzero"), _NoSyncs():
        layers[0](x)
    with _NoSyncs():
        ours = _run(layers[1], x, grad, mask)
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, 1e-6, 1e-7, err_msg=name)


def _build(dispatcher_name: str) -> str:
    assert dist.group.WORLD is not None
    try:
        return type(
            build_dispatcher(dispatcher_name, dist.group.WORLD, 1, DispatchOptions(static_shapes=True))
        ).__name__
    except ValueError as error:
        return str(error)


def test_what_cannot_have_static_shapes_is_refused(ranks: RankPool) -> None:
    assert ranks.run(2, _build, "alltoall") == ["StaticDispatcher"] * 2
    for message in ranks.run(2, _build, "hierarchical"):
        assert message == "static_shapes needs dispatcher allgather or alltoall or symmetric, not hierarchical"
    for experts in ("cpu", "eager"):
        with pytest.raises(ValueError, match=f"static_shapes = True: needs experts = .*, not {experts}"):
            MoE(H, I, RouterConfig(E, K), MoEConfig(experts=experts, static_shapes=True))
