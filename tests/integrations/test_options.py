"""`crossdock.configure`, and what importing the plug-in does."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

import crossdock
from crossdock.dispatch import DeepEPOptions
from crossdock.integrations.options import PluginOptions, current_options


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    crossdock.configure(**asdict(PluginOptions()))


def test_configure_sets_what_is_given_and_keeps_the_rest() -> None:
    assert crossdock.configure(experts="eager") == PluginOptions("alltoall", experts="eager")
    assert crossdock.configure(dispatcher="alltoall") == PluginOptions("alltoall", experts="eager")
    assert current_options() == PluginOptions("alltoall", experts="eager")


@pytest.mark.parametrize("option", ["dispatcher", "wire_dtype", "wire_directions", "experts"])
def test_configure_refuses_what_is_unknown_and_sets_nothing(option: str) -> None:
    valid: dict[str, Any] = {
        "dispatcher": "alltoall",
        "wire_dtype": "fp8",
        "wire_directions": "both",
        "experts": "eager",
    }
    with pytest.raises(ValueError, match=f"{option} = 'fast' is unknown; valid: .*{valid[option]}"):
        crossdock.configure(**{**valid, option: "fast"})
    assert current_options() == PluginOptions()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks_per_node": -1}, "ranks_per_node = -1: must be 0 or more"),
        ({"deepep_num_sms": 3, "dispatcher": "deepep"}, "deepep_num_sms = 3: must be 0, or an even number above"),
        ({"deepep_num_sms": 8}, "deepep_num_sms = 8: needs dispatcher = deepep or auto, not alltoall"),
        ({"wire_directions": "both"}, "wire_directions = 'both': needs a wire_dtype"),
        ({"static_shapes": True, "experts": "eager"}, "static_shapes = True: needs experts = auto or grouped_mm"),
        ({"static_shapes": True, "dispatcher": "hierarchical"}, "static_shapes = True: needs dispatcher = auto"),
        ({"dispatcher": "local"}, "dispatcher = 'local': transformers has no dispatcher with ep_size = 1"),
    ],
)
def test_configure_refuses_what_does_not_go_together_and_sets_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"crossdock.configure: {said}"):
        crossdock.configure(**options)
    assert current_options() == PluginOptions()


def test_options_of_deepep_and_static_shapes_reach_the_dispatcher() -> None:
    options = crossdock.configure(
        dispatcher="deepep",
        deepep_api="elastic",
        deepep_num_sms=8,
        deepep_fp8_dispatch=True,
        deepep_expand=True,
        deepep_max_tokens_per_rank=64,
    )
    assert options.dispatch_options().deepep == DeepEPOptions("elastic", 8, True, True, 64)
    crossdock.configure(**asdict(PluginOptions()))
    assert crossdock.configure(dispatcher="auto", static_shapes=True).dispatch_options().static_shapes


def test_configure_needs_no_transformers() -> None:
    program = "import sys, crossdock; crossdock.configure(experts='eager'); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_transformers_without_a_registry_gives_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.distributed.expert_parallel", None)
    monkeypatch.delitem(sys.modules, "crossdock.integrations.transformers", raising=False)
    with pytest.raises(ImportError, match=r"needs transformers >= 5\.23.* is installed: pip install"):
        importlib.import_module("crossdock.integrations.transformers")


def test_importing_twice_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    first = importlib.import_module("crossdock.integrations.transformers")
    before = set(registry)
    monkeypatch.delitem(sys.modules, first.__name__)
    importlib.import_module(first.__name__)
    assert set(registry) == before >= {"crossdock", "grouped_mm"}
