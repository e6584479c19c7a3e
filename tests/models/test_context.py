"""Ranks that share sequences: outputs and gradients of transformers' models are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from crossdock import MoEConfig
from crossdock.models import FAMILIES, UnknownAttention, accept_context_parallel, replace_experts
from crossdock.models.context import mask_documents
from crossdock.parallel import (
    ActivationCheckpointConfig,
    CompileConfig,
    LayoutError,
    ParallelDims,
    apply_cp,
    parallelize,
    plain_name,
    transformer_blocks,
)
from tests.models.tiny_families import SIZES, sizes_of
from tests.parallel.test_gradients import CountExchanges, relative
from tests.ranks import RankPool

LENGTH = 16
REFUSED = {"llama4": "attn_temperature_tuning", "qwen3_next": "linear_attention (Qwen3NextGatedDeltaNet)"}


def build(name: str, attention: str = "eager", **sizes: Any) -> PreTrainedModel:
    """transformers' own tiny model in float64, with attention that is far from even."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[FAMILIES[name].model_type](**sizes_of(name, **sizes))
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager", dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    if name == "gpt_oss":
        mask_documents(model)
    return model


def batch(documents: bool, padded: bool = False) -> dict[str, Tensor]:
    """Two rows; of several documents, whose borders are no border of ranks; or with padding at the end of one."""
    ids = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if documents:
        inputs["position_ids"] = torch.tensor([[*range(7), *range(9)], [*range(3), *range(11), *range(2)]])
    if padded:
        inputs["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [11]])).long()
    return inputs


def labels() -> Tensor:
    return torch.randint(60, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, inputs: dict[str, Tensor], own: slice) -> dict[str, Any]:
    """Logits, loss and gradients of a part of the positions."""
    logits = model(**{name: value[:, own] for name, value in inputs.items()}, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels()[:, own].flatten(), reduction="sum")
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            name = plain_name(name)
            gradients[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return {"logits": logits.detach(), "loss": loss.detach(), "gradients": gradients}


def own_positions() -> slice:
    each = LENGTH // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def differences(ours: dict[str, Any], theirs: dict[str, Any], *, summed: bool = False) -> dict[str, float]:
    """The largest relative difference of logits and of gradients, which are `summed` over ranks already."""
    gradients = []
    for name, expected in theirs["gradients"].items():
        grad = ours["gradients"][name]
        if not summed:
            dist.all_reduce(grad)
        gradients.append(relative(grad.numpy(), expected.numpy()))
    expected = theirs["logits"][:, own_positions()]
    return {"logits": relative(ours["logits"].numpy(), expected.numpy()), "gradients": max(gradients)}


def share(model: PreTrainedModel) -> PreTrainedModel:
    world_size = dist.get_world_size()
    apply_cp(accept_context_parallel(model), ParallelDims(world_size, cp=world_size).build_mesh("cpu"))
    return model


def compare(cases: list[tuple[str, str, dict[str, Any], dict[str, bool]]]) -> list[dict[str, float]]:
    found = []
    for name, attention, sizes, what in cases:
        inputs = batch(**what)
        expected = run(build(name, attention, **sizes), inputs, slice(None))
        found.append(differences(run(share(build(name, attention, **sizes)), inputs, own_positions()), expected))
    return found


DOCUMENTS, PADDED = {"documents": True}, {"documents": False, "padded": True}
PLAIN = {"documents": False}
CASES: dict[int, list[tuple[str, str, dict[str, Any], dict[str, bool]]]] = {
    2: [
        *((name, "eager", {}, DOCUMENTS) for name in SIZES if name not in REFUSED),
        ("qwen3", "sdpa", {}, PLAIN),
        ("qwen3", "sdpa", {}, DOCUMENTS),
        ("qwen3", "sdpa", {}, PADDED),
        ("qwen3", "eager", {}, PADDED),
        ("qwen3", "sdpa", {"num_key_value_heads": 1}, PLAIN),
        ("gpt_oss", "eager", {}, PLAIN),  # sinks; sliding windows of 8 in every other layer
        ("deepseek_v3", "sdpa", {"qk_nope_head_dim": 24}, PLAIN),
        ("mixtral", "sdpa", {"sliding_window": 5}, PLAIN),
        ("llama4", "sdpa", {"attn_temperature_tuning": False, "attention_chunk_size": 6}, DOCUMENTS),
    ],
    4: [
        ("gpt_oss", "eager", {}, DOCUMENTS),
        # Key heads are repeated, but no more than need be: 6 of them to 12, 24 query heads find two each.
        ("qwen3", "sdpa", {"num_attention_heads": 24, "num_key_value_heads": 6}, PLAIN),
    ],
}
# Routers of transformers that compute weights in fp32: how their sums are rounded depends on the processor.
FP32_ROUTERS = ("deepseek_v2", "deepseek_v3", "glm4", "minimax_m2")


@pytest.mark.parametrize("num_ranks", CASES)
def test_outputs_and_gradients_equal_one_process(ranks: RankPool, num_ranks: int) -> None:
    for result in ranks.run(num_ranks, compare, CASES[num_ranks]):
        for case, found in zip(CASES[num_ranks], result, strict=True):
            tolerance = 1e-6 if case[0] in FP32_ROUTERS else 1e-12
            assert found["logits"] < tolerance, case
            assert found["gradients"] < tolerance, case


def masks() -> list[bool]:
    """Whether blocks are given a mask: with sdpa, alone; and with documents."""
    model = share(build("qwen3", "sdpa"))
    seen: list[bool] = []
    for block in transformer_blocks(model):
        block.register_forward_pre_hook(
            lambda block, args, kwargs: seen.append(kwargs["attention_mask"] is not None), with_kwargs=True
        )
    for documents in (False, True):
        run(model, batch(documents), own_positions())
    return seen


def test_plain_causal_attention_makes_no_mask_of_all_pairs_of_positions(ranks: RankPool) -> None:
    assert ranks.run(2, masks) == [[False] * 3 + [True] * 3] * 2


def own_model(mode: Any, compiled: bool) -> dict[str, Any]:
    """A model of a user's own, with half of the experts on each rank."""
    inputs = batch(documents=True)
    expected = run(build("qwen3", "sdpa", num_experts=4), inputs, slice(None))
    model = accept_context_parallel(build("qwen3", "sdpa", num_experts=4))
    replace_experts(model, model.config, MoEConfig(experts="eager"))
    parallelize(
        model,
        ParallelDims(2, cp=2, ep=2).build_mesh("cpu"),
        activation_checkpoint=ActivationCheckpointConfig(mode),
        compile_config=CompileConfig(enable=compiled, backend="aot_eager"),
    )
    own = run(model, inputs, own_positions())
    # Experts are called and laid out otherwise; the rest is enough here.
    shared = {name: grad for name, grad in expected["gradients"].items() if ".experts." not in name}
    return differences(own, {**expected, "gradients": shared}, summed=True)


@pytest.mark.parametrize(("mode", "compiled"), [("none", False), ("selective", False), ("full", False), ("none", True)])
def test_a_model_of_ones_own_goes_through_parallelize(ranks: RankPool, mode: str, compiled: bool) -> None:
    for found in ranks.run(2, own_model, mode, compiled):
        assert max(found.values()) < 1e-12


def exchanges(mode: Any) -> tuple[int, int]:
    model = accept_context_parallel(build("qwen3", "sdpa", mlp_only_layers=[0, 1, 2]))
    parallelize(model, ParallelDims(2, cp=2).build_mesh("cpu"), activation_checkpoint=ActivationCheckpointConfig(mode))
    inputs = {"input_ids": batch(documents=False)["input_ids"][:, own_positions()]}
    with CountExchanges() as forward:
        loss = model(**inputs, use_cache=False).logits.square().sum()
    with CountExchanges() as backward:
        loss.backward()
    return forward.count, backward.count


def test_attention_exchanges_twice_and_selective_recompute_repeats_none(ranks: RankPool) -> None:
    plain, selective = (ranks.run(2, exchanges, mode)[0] for mode in ("none", "selective"))
    assert plain == selective == (6, 6)  # three layers


def ring() -> list[dict[str, float]]:
    """In fp32, in which torch merges the parts of a ring."""
    found = []
    for sizes in ({}, {"num_attention_heads": 5, "num_key_value_heads": 1}):
        expected = run(build("qwen3", "sdpa", **sizes), batch(documents=False), slice(None))
        model = accept_context_parallel(build("qwen3", "sdpa", **sizes), "ring").float()
        apply_cp(model, ParallelDims(4, cp=4).build_mesh("cpu"))
        found.append(differences(run(model, batch(documents=False), own_positions()), expected))
        with pytest.raises(ValueError, match="plainly causal"):
            run(model, batch(documents=True), own_positions())
    return found


def test_a_ring_gives_the_same_whatever_the_number_of_heads(ranks: RankPool) -> None:
    """torch's ring, with the operators of a CPU in the place of a GPU's."""
    for result in ranks.run(4, ring):
        for found in result:
            assert max(found.values()) < 1e-5


def refusals() -> dict[str, str]:
    found = {}
    for name in REFUSED:
        with pytest.raises(UnknownAttention) as unknown:
            accept_context_parallel(build(name))
        found[name] = str(unknown.value)
    meshes = ParallelDims(4, cp=4).build_mesh("cpu")
    with pytest.raises(LayoutError) as layout:
        apply_cp(accept_context_parallel(build("qwen3", num_attention_heads=6)), meshes)
    found["heads"] = str(layout.value)
    with pytest.raises(ValueError, match="accept_context_parallel") as unprepared:
        apply_cp(build("qwen3"), meshes)
    found["unprepared"] = str(unprepared.value)
    model = share(build("qwen3"))
    ids = batch(documents=False)["input_ids"][:, own_positions()]
    for what in ({"use_cache": True}, {"labels": ids}):
        with pytest.raises(ValueError, match="share sequences") as refused:
            model(input_ids=ids, **what)
        found[next(iter(what))] = str(refused.value)
    return found


def test_what_cannot_be_shared_is_refused_by_name(ranks: RankPool) -> None:
    found = ranks.run(4, refusals)[0]
    for name, part in REFUSED.items():
        assert part in found[name]
    assert "query heads (6) and the 4 ranks of dp_shard x cp: 1, 2; the nearest is 2" in found["heads"]
    assert "shift" in found["labels"]
    assert "cache" in found["use_cache"]


def test_one_rank_computes_what_it_did_without_being_prepared() -> None:
    inputs = batch(documents=True)
    expected = run(build("gpt_oss"), inputs, slice(None))
    ours = run(accept_context_parallel(build("gpt_oss")), inputs, slice(None))
    assert torch.equal(ours["logits"], expected["logits"])


def test_gpt_oss_keeps_documents_apart() -> None:
    """transformers' own model does not look at position_ids for its masks; the family's adapter does."""
    model = build("gpt_oss")
    inputs = batch(documents=True)
    with torch.no_grad():
        packed = model(**inputs, use_cache=False).logits[0, 7:]
        alone = model(input_ids=inputs["input_ids"][:1, 7:], use_cache=False).logits[0]
    assert relative(packed.numpy(), alone.numpy()) < 1e-12
