"""Muon: what it computes, for which parameters, and that no layout changes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.flop_counter import FlopCounterMode

from crossdock.checkpoint import Checkpointer, materialise_optimizer_state
from crossdock.experts import GroupedExperts
from crossdock.lora import LoRAConfig, add_lora
from crossdock.moe import MoE, moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.optim import MatrixForm, Muon, hidden_matrices
from crossdock.parallel import (
    ParallelDims,
    as_shard,
    local_part,
    parallelize,
    plain_name,
)
from crossdock.routed_experts import RoutedExperts
from crossdock.routing import RouterConfig
from tests.ranks import RankPool

HIDDEN, INNER, WORDS = 16, 24, 11

Held = dict[str, np.ndarray]


class Block(nn.Module):
    """Attention of sorts, whose matrices are wide, tall and of fewer rows than there may be ranks, and experts."""

    def __init__(self, experts: int, unpacked: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.query = nn.Linear(HIDDEN, 32)
        self.low = nn.Linear(32, 3, bias=False)
        self.out = nn.Linear(3, HIDDEN)
        own = [nn.Sequential(nn.Linear(HIDDEN, 8), nn.SiLU(), nn.Linear(8, HIDDEN)) for _ in range(experts)]
        self.moe = MoE(
            HIDDEN,
            None if unpacked else INNER,
            RouterConfig(experts, 2),
            MoEConfig(experts="auto" if unpacked else "eager"),
            experts=own if unpacked else None,
            bias=not unpacked,
            shared_intermediate_size=8,
            shared_gate=True,
        )


class Model(nn.Module):
    layers: Any

    def __init__(self, experts: int = 8, unpacked: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, HIDDEN)
        self.layers = nn.ModuleList([Block(experts, unpacked) for _ in range(2)])
        self.head = nn.Linear(HIDDEN, WORDS)


def filled(name: str, shape: tuple[int, ...], dtype: torch.dtype, step: int = 0) -> Tensor:
    """Values that the name (of a parameter of the whole model) and the step give alone."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.1


def whole_values(model: nn.Module, dtype: torch.dtype, step: int) -> dict[nn.Parameter, Tensor]:
    """A value for each parameter, laid out as it is: the same on every layout, experts by their logical number."""
    slots = {p: layer for layer in moe_layers(model).values() for p in layer.experts.slot_parameters().values()}
    values: dict[nn.Parameter, Tensor] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if parameter in slots:
            experts = filled(plain_name(name), (slots[parameter].num_experts, *shape[1:]), dtype, step)
            whole = experts.new_zeros(shape)
            whole[torch.tensor(slots[parameter].placement.expert_to_slot)] = experts
        else:
            whole = filled(plain_name(name), shape, dtype, step)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        values[parameter] = whole
    return values


class Run:
    """Steps on given gradients: all that differs between layouts is the optimizer."""

    def __init__(
        self, layout: dict[str, int] | None, arguments: tuple[Any, ...], of: torch.dtype, **options: Any
    ) -> None:
        self.model = Model(*arguments).to(of)
        self.dtype = of
        if layout is not None:
            parallelize(self.model, ParallelDims(dist.get_world_size(), **layout).build_mesh("cpu"))
        with torch.no_grad():
            for parameter, value in whole_values(self.model, of, 0).items():
                local_part(parameter).copy_(local_part(value))
        self.optimizer = Muon(self.model, lr=0.1, **options)

    def step(self, number: int) -> None:
        for parameter, gradient in whole_values(self.model, self.dtype, number).items():
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> Held:
        """Parameters and the optimizer's state, whole, experts in logical order. Collective."""
        slots = {
            p: layer for layer in moe_layers(self.model).values() for p in layer.experts.slot_parameters().values()
        }
        found = {}
        for name, parameter in self.model.named_parameters():
            for key, tensor in {"value": parameter.detach(), **self.optimizer.state.get(parameter, {})}.items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if parameter in slots and whole.ndim:
                    whole = whole[torch.tensor(slots[parameter].placement.expert_to_slot)]
                found[f"{plain_name(name)} {key}"] = whole.double().numpy().copy()
        return found


def stepped(layout: dict[str, int] | None, arguments: tuple[Any, ...], options: dict[str, Any]) -> Held:
    run = Run(layout, arguments, torch.float32, **options)
    for number in range(1, 4):
        run.step(number)
    return run.held()


def check_equal(found: Held, expected: Held) -> None:
    for name, value in found.items():
        # AdamW's kernel rounds the last elements of a shard otherwise.
        by_muon = f"{name.split()[0]} momentum_buffer" in expected
        np.testing.assert_allclose(value, expected[name], rtol=0 if by_muon else 1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("world_size", "layout", "arguments", "options"),
    [
        (2, {"ep": 1}, (8,), {"exchange_bytes": 3000}),
        (2, {"ep": 2}, (8,), {"dtype": torch.bfloat16}),
        (4, {"dp_replicate": 2, "ep": 2}, (8,), {}),
        (4, {"ep": 2}, (9,), {"adjust_lr_fn": "original", "exchange_bytes": 1}),
        (4, {"ep": 4}, (9,), {}),
        (4, {"ep": 2}, (3, True), {}),
        (4, {"ep": 4}, (3, True), {}),
    ],
    ids=str,
)
def test_a_step_is_the_same_on_every_layout_bit_by_bit(
    ranks: RankPool, world_size: int, layout: dict[str, int], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Nine experts leave slots empty, three modules a rank; a matrix of three rows leaves ranks without any."""
    results = ranks.run(world_size, stepped, layout, arguments, options)
    expected = stepped(None, arguments, options)
    seen = set()
    for result in results:
        seen |= result.keys()
        check_equal(result, expected)
    assert seen == expected.keys()


def save(folder: str) -> list[Held]:
    """What a checkpoint holds, and what is there two steps later."""
    run = Run({"ep": 2}, (9,), torch.float32)
    run.step(1)
    Checkpointer(Path(folder), run.model, run.optimizer).save(1, {})
    found = [run.held()]
    for number in (2, 3):
        run.step(number)
    return [*found, run.held()]


def load(folder: str, layout: dict[str, int] | None) -> list[Held]:
    run = Run(layout, (9,), torch.float32)
    with torch.no_grad():
        for parameter in run.model.parameters():
            local_part(parameter).fill_(7.0)
    materialise_optimizer_state(run.optimizer)
    Checkpointer(Path(folder), run.model, run.optimizer).load(1)
    found = [run.held()]
    for number in (2, 3):
        run.step(number)
    return [*found, run.held()]


def test_a_checkpoint_goes_on_bit_by_bit_on_any_layout(ranks: RankPool, tmp_path: Path) -> None:
    saved = ranks.run(4, save, str(tmp_path))[0]
    again = ranks.run(4, load, str(tmp_path), {"ep": 2})[0]
    others = [ranks.run(1, load, str(tmp_path), None)[0], ranks.run(2, load, str(tmp_path), {"ep": 2})[0]]
    for loaded in (again, *others):
        for ours, theirs in zip(loaded, saved, strict=True):
            assert ours.keys() == theirs.keys()
            check_equal(ours, theirs)
    for ours, theirs in zip(again, saved, strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], name)


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Muon's polynomial by the other Gram matrix, in float64: `x (a + b x^T x + c (x^T x)^2)`."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x.T @ x
        x = x @ (3.4445 * np.eye(len(gram)) - 4.7750 * gram + 2.0315 * gram @ gram)
    return x


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_each_matrix_of_each_expert_is_orthogonalised_alone(adjust_lr_fn: Any) -> None:
    run = Run(None, (3,), torch.float64, adjust_lr_fn=adjust_lr_fn, weight_decay=0.5)
    experts = run.model.layers[0].moe.experts
    assert isinstance(experts, GroupedExperts)
    # Gate, up and down projection of each expert, n_out first.
    columns = {"gate": slice(0, INNER), "up": slice(INNER, None), "down": slice(None)}

    def matrices(values: Callable[[nn.Parameter], Tensor]) -> dict[tuple[int, str], np.ndarray]:
        return {
            (expert, part): values(experts.down_projs if part == "down" else experts.gate_and_up_projs)[expert]
            .detach()
            .numpy()[:, columns[part]]
            .T.copy()
            for expert in range(3)
            for part in columns
        }

    expected = matrices(lambda parameter: parameter)
    mean = {key: np.zeros_like(matrix) for key, matrix in expected.items()}
    for number in range(1, 4):
        gradients = whole_values(run.model, torch.float64, number)
        for key, gradient in matrices(gradients.__getitem__).items():
            n_out, n_in = gradient.shape
            scale = max(1, n_out / n_in) ** 0.5 if adjust_lr_fn == "original" else 0.2 * max(n_out, n_in) ** 0.5
            mean[key] = 0.95 * mean[key] + 0.05 * gradient
            update = orthogonal(0.05 * gradient + 0.95 * mean[key])
            expected[key] = (1 - 0.1 * 0.5) * expected[key] - 0.1 * scale * update
        run.step(number)
    for key, matrix in matrices(lambda parameter: parameter).items():
        np.testing.assert_allclose(matrix, expected[key], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_matrices_step_as_torchs_own_muon_and_all_else_as_its_adamw(adjust_lr_fn: Any) -> None:
    """torch's iterates in bfloat16, where an order of sums shows at once."""
    ours = Run(None, (3, True), torch.float32, adjust_lr_fn=adjust_lr_fn, dtype=torch.bfloat16, weight_decay=0.3)
    theirs = Run(None, (3, True), torch.float32)
    # Linear layers of the blocks and of experts that are modules, but for the gate, which has one row.
    linear = [m for block in theirs.model.layers for m in block.modules() if isinstance(m, nn.Linear)]
    by_muon = {m.weight for m in linear if m.out_features > 1}
    routers = {block.moe.router.weight for block in theirs.model.layers}
    rest = [p for p in theirs.model.parameters() if p not in by_muon]
    muon = torch.optim.Muon(by_muon, lr=0.1, weight_decay=0.3, adjust_lr_fn=adjust_lr_fn)
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim > 1 and p not in routers]},
            {"params": [p for p in rest if p.ndim == 1 or p in routers], "weight_decay": 0.0},
        ],
        lr=0.1,
        weight_decay=0.3,
        betas=(0.9, 0.95),
        fused=True,
    )
    before = {name: value.detach().clone() for name, value in theirs.model.named_parameters()}
    for number in range(1, 5):
        for parameter, gradient in whole_values(theirs.model, torch.float32, number).items():
            parameter.grad = gradient
        muon.step()
        adamw.step()
        ours.step(number)
    names = dict(ours.model.named_parameters())
    for name, expected in theirs.model.named_parameters():
        change = torch.linalg.vector_norm(expected - before[name])
        allowed = 1e-3 if expected in by_muon else 0.0
        assert torch.linalg.vector_norm(names[name] - expected) <= allowed * change, name


def test_which_parameters_are_matrices_of_hidden_layers() -> None:
    model = Model(8)
    model.layers[0].query.requires_grad_(False)
    model.layers[1].out.weight = model.layers[0].out.weight
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: form for parameter, form in hidden_matrices(model).items()}
    linear, down = MatrixForm(), MatrixForm(transposed=True)
    shared = {f"moe.shared_experts.{name}_proj.weight": linear for name in ("gate", "up", "down")}
    experts = {"moe.experts.gate_and_up_projs": MatrixForm(transposed=True, parts=2), "moe.experts.down_projs": down}
    expected = {f"layers.0.{name}": form for name, form in {**shared, **experts, "low.weight": linear}.items()}
    expected |= {f"layers.1.{name}": form for name, form in {**shared, **experts, "low.weight": linear}.items()}
    assert found == expected | {"layers.1.query.weight": linear, "layers.0.out.weight": linear}


class OwnRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 8)
        self.up_proj = nn.Linear(HIDDEN, 12)
        self.experts = RoutedExperts(GroupedExperts(8, HIDDEN, INNER), 8, HIDDEN, 2, MoEConfig())


def test_a_router_that_a_family_keeps_is_no_hidden_matrix_and_is_not_decayed() -> None:
    model = nn.ModuleList([OwnRouter()])
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in hidden_matrices(model)} == {
        "0.up_proj.weight",
        "0.experts.experts.gate_and_up_projs",
        "0.experts.experts.down_projs",
    }
    undecayed = Muon(model).param_groups[2]
    assert undecayed["weight_decay"] == 0
    assert {names[p] for p in undecayed["params"]} == {"0.gate.weight", "0.gate.bias", "0.up_proj.bias"}


def test_adapters_are_left_to_adamw_so_that_a_model_of_them_alone_is_refused() -> None:
    model = Model(8)
    add_lora(model, LoRAConfig(2, targets=("experts",)))
    with pytest.raises(ValueError, match="no matrix of a hidden layer that is trained; use AdamW"):
        Muon(model)
    model.layers[0].query.requires_grad_()
    optimizer = Muon(model)
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(32, HIDDEN)]
    assert sum(p.ndim == 3 for p in optimizer.param_groups[1]["params"]) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, "momentum = 1.0: must be at least 0 and below 1"),
        ({"adjust_lr_fn": "match"}, "adjust_lr_fn = 'match': must be match_rms_adamw or original"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon(Model(), **arguments)


def test_every_parameter_follows_the_learning_rate_of_its_group() -> None:
    run = Run(None, (3,), torch.float32)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    before = run.held()
    run.step(1)
    at_rest = run.held()
    for group in run.optimizer.param_groups:
        group["lr"] = 0.1
    run.step(2)
    for name, value in run.held().items():
        if name.endswith(" value"):
            np.testing.assert_array_equal(at_rest[name], before[name], name)
            assert not np.array_equal(value, before[name]), name


def flops_of_a_step(layout: dict[str, int] | None) -> int:
    run = Run(layout, (8,), torch.float32)
    with FlopCounterMode(display=False) as counter:
        run.step(1)
    return counter.get_total_flops()


@pytest.mark.parametrize("layout", [{"ep": 1}, {"ep": 2}], ids=str)
def test_the_work_is_divided_evenly_over_the_ranks_that_share_matrices(ranks: RankPool, layout: dict[str, int]) -> None:
    flops, whole = ranks.run(4, flops_of_a_step, layout), flops_of_a_step(None)
    assert sum(flops) == whole
    assert max(flops) <= 1.15 * whole / 4


def without_gradients(rank_without: int) -> list[float]:
    """How much experts and `query` move, where `query` has no gradient on one rank (-1: on all)."""
    run = Run({"ep": 1}, (8,), torch.float32)
    query, down = run.model.layers[0].query.weight, run.model.layers[0].moe.experts.down_projs
    before = [local_part(p).detach().clone() for p in (query, down)]
    for number in range(1, 3):
        for parameter, gradient in whole_values(run.model, torch.float32, number).items():
            parameter.grad = gradient
        if rank_without in (-1, dist.get_rank()):
            query.grad = None
        run.optimizer.step()
    return [(local_part(p) - old).norm().item() for p, old in zip((query, down), before, strict=True)]


def test_matrices_without_a_gradient_stay_as_they_are_and_nobody_waits(ranks: RankPool) -> None:
    everywhere, on_one = (ranks.run(2, without_gradients, rank) for rank in (-1, 1))
    assert [moved for moved, _ in everywhere] == [0, 0]
    assert [moved > 0 for moved, _ in on_one] == [True, False]
    assert all(experts > 0 for _, experts in (*everywhere, *on_one))


class Dense(nn.Module):
    """A feed-forward block as tensor parallelism cuts it, and one matrix that it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.whole = nn.Linear(12, 12)


def over_two_meshes() -> dict[str, Any]:
    """A step with FSDP over tensor parallelism, as torch lays them out; then with placements of all kinds."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    torch.manual_seed(0)
    model = nn.ModuleList([Dense(), Dense()])
    reference = [{name: p.detach().clone() for name, p in block.named_parameters()} for block in model]
    for block in model:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["fsdp"])
    placements = {str(p.placements) for p in model.parameters() if isinstance(p, DTensor)}
    assert any("_S" in text for text in placements), placements
    named = {f"{index}.{name}": value for index, values in enumerate(reference) for name, value in values.items()}
    matrices: dict[nn.Parameter, MatrixForm] = dict(hidden_matrices(model))
    expected = {p: named[name] for name, p in model.named_parameters() if p in matrices}
    for shape, layout in (
        ((10, 7), (Shard(1), Shard(0))),
        ((5, 3), (Shard(0), Shard(0))),
        ((8, 6), (Replicate(), Shard(1))),
        ((12, 6), (_StridedShard(0, split_factor=3), Shard(1))),
        ((4, 6, 6), (_StridedShard(2, split_factor=3), Shard(1))),
        ((3, 6, 8), (Shard(0), Shard(2))),
    ):
        value = filled(f"{shape}", shape, torch.float32)
        parameter = nn.Parameter(laid_out(value, mesh, layout))
        model.register_parameter(f"extra{len(matrices)}", parameter)
        matrices[parameter] = MatrixForm(parts=2 if len(shape) == 3 else 1)
        expected[parameter] = value
    optimizer = Muon(model, lr=0.1, matrices=matrices, exchange_bytes=500)
    plain = nn.ParameterList(nn.Parameter(value.clone()) for value in expected.values())
    alone = Muon(plain, lr=0.1, matrices=dict(zip(plain, matrices.values(), strict=True)))
    for step in range(2):
        for index, (parameter, own) in enumerate(zip(matrices, plain, strict=True)):
            own.grad = filled(f"gradient {index}", tuple(own.shape), torch.float32, step)
            assert isinstance(parameter, DTensor)
            parameter.grad = laid_out(own.grad, mesh, parameter.placements)
        optimizer.step()
        alone.step()
    equal = []
    for parameter, own in zip(matrices, plain, strict=True):
        assert isinstance(parameter, DTensor)
        equal.append(torch.equal(local_part(parameter), local_part(laid_out(own.detach(), mesh, parameter.placements))))
    return {
        "equal": equal,
        "moved": [not torch.equal(own, old) for own, old in zip(plain, expected.values(), strict=True)],
    }


def laid_out(whole: Tensor, mesh: DeviceMesh, placements: Any) -> DTensor:
    """This rank's part, by torch's own cut of each dimension, the outer mesh dimension first."""
    local = whole
    for dim, placement in enumerate(placements):
        if not isinstance(placement, Replicate):
            parts, _ = placement._split_tensor(local, mesh.size(dim), with_padding=False)
            local = parts[mesh.get_local_rank(dim)].contiguous()
    return as_shard(local.clone(), mesh, tuple(placements), whole.shape)


def test_matrices_over_two_mesh_dimensions_step_as_whole_ones(ranks: RankPool) -> None:
    for result in ranks.run(4, over_two_meshes):
        assert result["equal"] == result["moved"] == [True] * 12
