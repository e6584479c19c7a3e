"""The layer's settings: what cannot work, or would be ignored, is refused: field, value, and what is valid."""

from __future__ import annotations

from typing import Any

import pytest

from crossdock import MoE, MoEConfig, RouterConfig
from crossdock.moe_config import MoEConfigError

ROUTER = RouterConfig(4, 2)


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("gradient_scale", "foo", "off, output, gradient"),
        ("wire_dtype", "fp4", "same, bf16, fp16, fp8"),
        ("dispatcher", "pigeon", "auto, local, allgather, alltoall"),
        ("overlap_chunks", -1, "0 or more"),
        ("z_loss_coeff", -0.1, "0 or more"),
        ("z_loss_coeff", float("nan"), "finite"),
        ("sequence_aux_loss_coeff", float("inf"), "finite"),
        ("capacity_factor", float("inf"), "finite"),
        ("debug_force_zipf", float("nan"), "finite"),
        ("debug_force_zipf", -0.5, "0 or more, or -1"),
        ("input_jitter", 1.0, "at least 0 and below 1"),
        ("deepep_num_sms", 3, "even"),
        ("deepep_max_tokens_per_rank", -1, "0 or more"),
        ("deepep_dispatch_chunk", 256, "0 to 255"),
        ("deepep_combine_chunk", -1, "0 to 255"),
    ],
)
def test_a_value_that_cannot_be_names_the_field_and_what_is_valid(name: str, value: Any, valid: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = .*{value}.*{valid}"):
        MoE(8, 4, ROUTER, MoEConfig(**{name: value}))


# Settings, of which the first would be ignored or cannot work; what it needs; settings with which it is right.
TOGETHER: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    **{
        f"{name} with {dispatcher}": (
            {name: value, "dispatcher": dispatcher},
            f"needs dispatcher = deepep or auto, not {dispatcher}",
            {"dispatcher": right},
        )
        for name, value in {
            "deepep_api": "elastic",
            "deepep_num_sms": 8,
            "deepep_dispatch_chunk": 8,
            "deepep_combine_chunk": 4,
            "deepep_fp8_dispatch": True,
            "deepep_expand": True,
            "deepep_max_tokens_per_rank": 64,
        }.items()
        for dispatcher, right in (("alltoall", "auto"), ("local", "deepep"))
    },
    "expand of Buffer": ({"deepep_api": "buffer", "deepep_expand": True}, "elastic", {"deepep_api": "elastic"}),
    "chunks of ElasticBuffer": (
        {"deepep_dispatch_chunk": 8, "deepep_api": "elastic"},
        "ElasticBuffer has no chunks",
        {"deepep_api": "buffer"},
    ),
    "both directions of nothing": (
        {"wire_directions": "both"},
        "needs a wire_dtype other than same",
        {"wire_dtype": "fp8"},
    ),
    "what to drop of none": ({"drop_policy": "position"}, "needs a capacity_factor", {"capacity_factor": 1.5}),
    "a step of no bias": ({"expert_bias_rate": 0.01}, "needs expert_bias = true", {"expert_bias": True}),
    "a seed of no draw": ({"debug_force_zipf_seed": 3}, "needs debug_force_zipf", {"debug_force_zipf": 0.0}),
    "a drift of no draw": ({"debug_force_zipf_drift": 3}, "needs debug_force_zipf", {"debug_force_zipf": 0.0}),
    "a wire to nowhere": (
        {"wire_dtype": "fp8", "dispatcher": "local"},
        "needs a dispatcher other than local",
        {"dispatcher": "alltoall"},
    ),
    "a wire beside DeepEP's": (
        {"wire_dtype": "fp8", "dispatcher": "deepep"},
        "deepep_fp8_dispatch",
        {"dispatcher": "alltoall"},
    ),
    "static, in two hops": (
        {"static_shapes": True, "dispatcher": "hierarchical"},
        "needs dispatcher = auto or local or allgather or alltoall or symmetric, not hierarchical",
        {"dispatcher": "local"},
    ),
    "static, in a loop": (
        {"static_shapes": True, "experts": "eager"},
        "needs experts = auto or grouped_mm or triton, not eager",
        {"experts": "grouped_mm"},
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_a_setting_that_would_be_ignored_is_refused(name: str) -> None:
    settings, valid, right = TOGETHER[name]
    field, value = next(iter(settings.items()))
    with pytest.raises(MoEConfigError) as caught:
        MoE(8, 4, ROUTER, MoEConfig(**settings))
    assert (caught.value.field, caught.value.value) == (field, value)
    assert valid in caught.value.valid
    assert str(caught.value) == f"{field} = {value!r}: {caught.value.valid}"
    MoE(8, 4, ROUTER, MoEConfig(**settings | right))


def test_what_the_family_has_needs_no_setting_of_the_user() -> None:
    family = RouterConfig(4, 2, capacity_factor=1.25, drop_policy="position", expert_bias=True)
    MoE(8, 4, family, MoEConfig(expert_bias_rate=0.01))
    assert MoEConfig().router_config(family).drop_policy == "position"
    capped = RouterConfig(4, 2, capacity_factor=1.25)
    layer = MoE(8, 4, capped, MoEConfig(drop_policy="position"))
    assert (layer.router.config.capacity_factor, layer.router.config.drop_policy) == (1.25, "position")
    own = MoEConfig(capacity_factor=2.0).router_config(family)
    assert (own.capacity_factor, own.drop_policy) == (2.0, "probs")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("ranks_per_node", "2", "int"),
        ("overlap_chunks", 1.5, "int"),
        ("capacity_factor", None, "float"),
        ("expert_bias", "yes", "bool"),
        ("static_shapes", 1, "bool"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any, kind: str) -> None:
    with pytest.raises(MoEConfigError, match=f"{name} = {value!r}: must be of type {kind}"):
        MoEConfig(**{name: value})
    MoEConfig(capacity_factor=2, z_loss_coeff=1)  # whole numbers are numbers
