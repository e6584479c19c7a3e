"""Experts that are modules of a user's own, on every layout, against one process that calls them one by one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crossdock import MoE, MoEConfig, ParallelDims, RouterConfig, apply_ep, clip_grad_norm_, finish_step, parallelize
from crossdock.checkpoint import Checkpointer, CheckpointError, HFCheckpoint, HFKeys, save_hf
from crossdock.moe import moe_layers
from crossdock.parallel import ActivationCheckpointConfig, global_grad_norm, plain_name
from tests.checkpoint.hf_folders import read_tensors
from tests.ranks import RankPool

HIDDEN, CLASSES, SEQUENCES, LENGTH = 12, 5, 8, 6
KEYS = HFKeys(renamed=((".moe.router.weight", ".moe.gate.weight"),))


class Gated(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(HIDDEN, size, bias=False), nn.Linear(HIDDEN, size, bias=False)
        self.w2 = nn.Linear(size, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Scaled(nn.Module):
    """Fails without rows, has a parameter of one element and one that it does not use, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, HIDDEN)
        self.scale, self.unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3))
        self.register_buffer("shift", torch.full((HIDDEN,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):
            raise ValueError("no rows")
        return torch.tanh(self.w1(x) + self.get_buffer("shift")) * self.scale


def experts(number: int) -> nn.ModuleList:
    """Of different sizes and kinds."""
    return nn.ModuleList([Scaled() if index % 4 == 3 else Gated(7 + 2 * index) for index in range(number)])


class Block(nn.Module):
    def __init__(self, num_experts: int, config: MoEConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        router = RouterConfig(num_experts, 2, expert_bias=True)
        self.moe = MoE(HIDDEN, None, router, config, experts=experts(num_experts), shared_intermediate_size=8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Classifier(nn.Module):
    def __init__(self, num_experts: int, config: MoEConfig | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(num_experts, config or MoEConfig()) for _ in range(2)])
        self.head = nn.Linear(HIDDEN, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SEQUENCES, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (SEQUENCES, LENGTH), generator=generator)


def own_rows(tensor: Tensor) -> Tensor:
    return tensor.tensor_split(dist.get_world_size())[dist.get_rank()]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (SEQUENCES * LENGTH)


def favour(model: nn.Module, busy: list[int]) -> None:
    """Let the routers choose among these experts alone."""
    for layer in moe_layers(model).values():
        assert layer.router.expert_bias is not None
        layer.router.expert_bias.fill_(-5)
        layer.router.expert_bias[busy] = 5


def plain_moe(layer: MoE, modules: nn.ModuleList, x: Tensor) -> Tensor:
    """The layer's formula: every expert on every token, weighted by the routing."""
    tokens = x.flatten(0, 1)
    routing = layer.router(tokens, sequence_shape=x.shape[:-1])
    weights = torch.zeros(len(tokens), len(modules), dtype=x.dtype)
    weights = weights.scatter(1, routing.expert_ids, routing.weights)
    outputs = torch.stack([module(tokens) for module in modules], dim=1)
    assert layer.shared_experts is not None
    return ((outputs * weights[..., None]).sum(dim=1) + layer.shared_experts(tokens)).view_as(x)


def whole(tensor: Tensor) -> np.ndarray:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().numpy().copy()


def merged(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Of all ranks; what two of them have, must be equal."""
    every: dict[str, np.ndarray] = {}
    for result in results:
        for name, value in result.items():
            np.testing.assert_array_equal(value, every.setdefault(name, value), err_msg=name)
    return every


def reference(num_experts: int, busy: list[int]) -> dict[str, Any]:
    model = Classifier(num_experts)
    favour(model, busy)
    x, labels = batch()
    x.requires_grad_()
    hidden = x
    for block in model.layers:
        assert isinstance(block, Block)
        modules = nn.ModuleList([block.moe.experts.get_submodule(str(expert)) for expert in range(num_experts)])
        hidden = hidden + plain_moe(block.moe, modules, block.norm(hidden))
    logits = model.head(hidden)
    loss_of(logits, labels).backward()
    # Outside of our layer, what an expert does not use has no gradient.
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    gradients = {name: whole(grad) for name, grad in grads.items()}
    assert x.grad is not None
    return {
        "gradients": gradients,
        "norm": float(np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))),
        "output": whole(logits),
        "input_gradient": whole(x.grad),
    }


def run(ep: int, num_experts: int, busy: list[int], mode: Any, config: dict[str, Any], fsdp: bool) -> dict[str, Any]:
    model = Classifier(num_experts, MoEConfig(**config))
    favour(model, busy)
    mesh = ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu")
    if fsdp:
        parallelize(model, mesh, activation_checkpoint=ActivationCheckpointConfig(mode))
    else:
        apply_ep(model, mesh)
    x, labels = batch()
    x = own_rows(x).requires_grad_()
    output = model(x)
    loss_of(output, own_rows(labels)).backward()
    assert x.grad is not None
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"
    if not fsdp:
        shared = [p for name, p in model.named_parameters() if ".experts." not in name]
        for parameter in shared:
            dist.all_reduce(parameter.grad)
    gradients = {plain_name(name): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    norm = clip_grad_norm_(model.parameters(), 0.01)
    clipped = global_grad_norm(model.parameters()).item()
    load = finish_step(model, dist.group.WORLD)
    return {
        "gradients": gradients,
        "norm": norm.item(),
        "clipped": clipped,
        "output": whole(output),
        "input_gradient": whole(x.grad),
        "routes": load.routes.numpy(),
    }


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30))


@pytest.mark.parametrize(
    ("world_size", "ep", "num_experts", "mode", "config", "fsdp"),
    [
        (1, 1, 5, "none", {}, True),
        (2, 1, 5, "none", {}, True),
        (2, 2, 4, "none", {}, False),
        (2, 2, 4, "selective", {"dispatcher": "allgather"}, True),
        (2, 2, 5, "full", {"overlap_chunks": 2}, True),
        (4, 2, 5, "none", {}, True),
        (4, 2, 8, "selective", {"dispatcher": "hierarchical", "ranks_per_node": 1}, True),
        (4, 4, 9, "none", {}, True),
        (4, 4, 3, "full", {}, True),
    ],
)
def test_every_layout_equals_one_process(
    ranks: RankPool, world_size: int, ep: int, num_experts: int, mode: str, config: dict[str, Any], fsdp: bool
) -> None:
    busy = [1, num_experts - 1, *range(2, num_experts - 2)]  # the first is idle, and one or two others
    expected = reference(num_experts, busy)
    results = ranks.run(world_size, run, ep, num_experts, busy, mode, config, fsdp)
    for name in ("output", "input_gradient"):
        assert relative(np.concatenate([result[name] for result in results]), expected[name]) < 1e-9, name
    gradients = merged([result["gradients"] for result in results])
    assert gradients.keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert relative(gradients[name], gradient) < 1e-9, name
        if ".experts.0." in name:
            assert not gradients[name].any(), f"{name} of an idle expert"
    for result in results:
        assert result["norm"] == pytest.approx(expected["norm"], rel=1e-9)
        assert result["clipped"] == pytest.approx(0.01, rel=1e-3)
        assert result["norm"] == results[0]["norm"]
        assert not result["routes"][:, 0].any()
        assert result["routes"].sum() == 2 * 2 * SEQUENCES * LENGTH


def scaled_gradients(scale: str) -> dict[str, np.ndarray]:
    model = Classifier(4, MoEConfig(gradient_scale=scale))  # pyright: ignore[reportArgumentType]
    x, labels = batch()
    x.requires_grad_()
    block = model.layers[0]
    assert isinstance(block, Block)
    loss_of(model.head(block(x)), labels).backward()
    assert x.grad is not None
    gradients = {name: whole(p.grad) for name, p in block.named_parameters() if p.grad is not None}
    return gradients | {"x": whole(x.grad), "counts": block.moe.load.tokens_per_expert.numpy()}


def test_gradient_scale_multiplies_the_experts_gradients_alone() -> None:
    plain, scaled = scaled_gradients("off"), scaled_gradients("gradient")
    counts = plain["counts"]
    for name, gradient in plain.items():
        expert = int(name.split(".")[2]) if name.startswith("moe.experts.") else None
        factor = 1 if expert is None else counts.mean() / counts[expert]
        np.testing.assert_allclose(scaled[name], gradient * factor, rtol=1e-12, atol=1e-15, err_msg=name)


# Ranks and expert-parallel degrees; five experts divide over no number of ranks.
LAYOUTS = ((1, 1), (2, 2), (3, 3), (4, 2), (4, 4))


class Run:
    """A model in training on a layout, and its checkpoints."""

    def __init__(self, folder: Path | str, ep: int, seed: int) -> None:
        self.model = Classifier(5)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.1 * seed)
        parallelize(self.model, ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu"))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.checkpointer = Checkpointer(Path(folder), self.model, self.optimizer)

    def train(self, seed: int) -> float:
        x, labels = batch(seed)
        loss_of(self.model(own_rows(x)), own_rows(labels)).backward()
        norm = clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        finish_step(self.model, dist.group.WORLD)
        return norm

    def contents(self) -> dict[str, np.ndarray]:
        held = {}
        for name, parameter in self.model.named_parameters():
            for key, value in {"value": parameter, **self.optimizer.state[parameter]}.items():
                held[f"{name} {key}"] = whole(value)
        return held


def save_and_load(folder: str, ep: int, saved: list[str]) -> dict[str, Any]:
    """Load what other layouts have saved; or train, save, and go on for a step."""
    if saved:
        run = Run(folder, ep, seed=1)
        run.train(9)
        loaded = {}
        for each in saved:
            run.checkpointer = Checkpointer(Path(each), run.model, run.optimizer)
            run.checkpointer.load(2)
            loaded[each] = {"contents": run.contents(), "next": run.train(3)}
        return loaded
    run = Run(folder, ep, seed=0)
    run.train(1)
    run.train(2)
    run.checkpointer.save(2, {})
    return {"contents": run.contents(), "next": run.train(3)}


@pytest.mark.parametrize("layouts", [LAYOUTS[1::2], pytest.param(LAYOUTS, marks=pytest.mark.slow)])
def test_a_checkpoint_of_any_layout_loads_on_any_other(
    ranks: RankPool, tmp_path: Path, layouts: tuple[tuple[int, int], ...]
) -> None:
    folders = [str(tmp_path / f"{world_size}-{ep}") for world_size, ep in layouts]
    held, after = {}, {}
    for folder, (world_size, ep) in zip(folders, layouts, strict=True):
        results = ranks.run(world_size, save_and_load, folder, ep, [])
        held[folder] = merged([result["contents"] for result in results])
        after[folder] = results[0]["next"]
    assert any(name.endswith("experts.4.w1.weight exp_avg") for name in held[folders[-1]])
    for world_size, ep in layouts:
        results = ranks.run(world_size, save_and_load, "unused", ep, folders)
        for folder in folders:
            loaded = merged([result[folder]["contents"] for result in results])
            assert loaded.keys() == held[folder].keys()
            for name, value in held[folder].items():
                np.testing.assert_array_equal(loaded[name], value, err_msg=f"{folder} on {world_size}-{ep}: {name}")
            assert results[0][folder]["next"] == pytest.approx(after[folder], rel=1e-9)


def load_others(folder: str, changes: str) -> str:
    run = Run(folder, 2, seed=0)
    if changes == "fewer":
        run.model.layers[1] = nn.Identity()
    else:
        run.model.extra = nn.Linear(2, 2).double()
    try:
        Checkpointer(Path(folder), run.model, None).load(2)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_checkpoint_that_does_not_fit_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_and_load, str(tmp_path), 2, [])
    for message in ranks.run(2, load_others, str(tmp_path), "fewer"):
        assert "layers.1.moe.experts.0.w1.weight is in the checkpoint, but not in this run" in message
    for message in ranks.run(2, load_others, str(tmp_path), "more"):
        assert "extra.weight is missing" in message


def hf_round_trip(source: str, export: str, ep: int) -> dict[str, np.ndarray]:
    """Export a model's weights, and read another's."""
    model = Classifier(5)
    parallelize(model, ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu"))
    if dist.get_rank() == 0:
        Path(export).mkdir()
    dist.barrier()
    save_hf(model, KEYS, Path(export), {}, "F64")
    weights = HFCheckpoint.open(Path(source))
    weights.check(model, KEYS)
    weights.load(model, KEYS)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def test_hugging_face_files_name_each_expert_by_its_global_index(ranks: RankPool, tmp_path: Path) -> None:
    ones = Classifier(5)
    written = {name: whole(parameter) for name, parameter in ones.named_parameters()}
    with torch.no_grad():
        for index, parameter in enumerate(ones.parameters()):
            parameter.fill_(index)
    (tmp_path / "source").mkdir()
    save_hf(ones, KEYS, tmp_path / "source", {}, "F64")
    expected = {name: whole(parameter) for name, parameter in ones.named_parameters()}
    for world_size, ep in ((2, 2), (4, 2), (4, 4)):
        export = tmp_path / f"{world_size}-{ep}"
        results = ranks.run(world_size, hf_round_trip, str(tmp_path / "source"), str(export), ep)
        loaded = merged(results)
        assert loaded.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(loaded[name], value, err_msg=name)
        exported = read_tensors(export)
        assert "layers.1.moe.experts.4.w1.weight" in exported
        assert exported.keys() == {name.replace(".moe.router.", ".moe.gate.") for name in written}
        for name, value in written.items():
            there = exported[name.replace(".moe.router.", ".moe.gate.")]
            np.testing.assert_array_equal(np.asarray(there), value, err_msg=name)


def test_what_cannot_be_is_refused() -> None:
    router = RouterConfig(4, 2)
    with pytest.raises(ValueError, match="experts has 3 modules, the router num_experts = 4"):
        MoE(HIDDEN, None, router, experts=experts(3))
    with pytest.raises(ValueError, match="must be None with experts"):
        MoE(HIDDEN, 24, router, experts=experts(4))
    with pytest.raises(ValueError, match="intermediate_size is None"):
        MoE(HIDDEN, None, router)
    for config in (MoEConfig(experts="eager"), MoEConfig(static_shapes=True)):
        with pytest.raises(ValueError, match="experts that are modules"):
            MoE(HIDDEN, None, router, config, experts=experts(4))
    one = Gated(8)
    with pytest.raises(ValueError, match=r"experts\.1\.w1\.weight is the same parameter as experts\.0\.w1\.weight"):
        MoE(HIDDEN, None, router, experts=[one, one, Gated(8), Gated(8)])
    layer = MoE(HIDDEN, None, router, experts=[nn.Linear(HIDDEN, 5) for _ in range(4)])
    with pytest.raises(ValueError, match=r"expert \d gives \[\d+, 5\] for tokens \[\d+, 12\]"):
        layer(torch.randn(3, HIDDEN))


def test_the_program_in_the_docs_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "moe.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(program, "docs/moe.md", "exec"), names)
    layer = names["moe"]
    layer(torch.randn(4, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert "experts.7.w1.weight" in layer.state_dict()
