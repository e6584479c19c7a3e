"""`crossdock.configure`, and what importing the plug-in does."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

import crossdock
from crossdock.integrations.options import PluginOptions, current_options


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    crossdock.configure(dispatcher=PluginOptions().dispatcher, experts=PluginOptions().experts)


def test_configure_sets_what_is_given_and_keeps_the_rest() -> None:
    assert crossdock.configure(experts="eager") == PluginOptions("alltoall", "eager")
    assert crossdock.configure(dispatcher="alltoall") == PluginOptions("alltoall", "eager")
    assert current_options() == PluginOptions("alltoall", "eager")


@pytest.mark.parametrize("option", ["dispatcher", "experts"])
def test_configure_refuses_what_is_unknown_and_sets_nothing(option: str) -> None:
    valid = {"dispatcher": "alltoall", "experts": "eager"}
    with pytest.raises(ValueError, match=f"{option} = 'fast' is unknown; valid: .*{valid[option]}"):
        crossdock.configure(**(valid | {option: "fast"}))
    assert current_options() == PluginOptions()


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
