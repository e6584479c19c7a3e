"""docs/coming_from.md names only what is there."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from crossdock.config import Config

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text()
ROWS = [line.split("|")[1:4] for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| there")]
OURS = [name for _, _, here in ROWS for name in re.findall(r"`([^`]+)`", here)]
NAMES = sorted({name for name in OURS if name.startswith("crossdock.")})
SETTINGS = sorted({name.partition(" ")[0] for name in OURS if re.match(r"[a-z_]+\.[a-z_]+( =|$)", name)} - set(NAMES))
KNOWN = [
    "GroupedExpertsDeepEP",
    "Gate",
    "fused_dispatch",
    "fused_combine",
    "MoEFlexTokenDispatcher",
    "ep_dispatch_and_compute",
    "apply_expert_parallel",
    "MoEFSDPSyncMixin",
    "MoEAuxLossAutoScaler",
    "BackendConfig",
    "MoEArgs(use_deepep=True)",
    "n_routed_experts",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_ours_can_be_imported(name: str) -> None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return
    pytest.fail(f"{name} is not there")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_exists(name: str) -> None:
    section, key = name.split(".")
    sections = get_type_hints(Config)
    assert section in sections
    assert key in {field.name for field in fields(sections[section])}


@pytest.mark.parametrize("name", KNOWN)
def test_what_people_know_is_in_the_table(name: str) -> None:
    assert any(f"`{name}`" in known for _, known, _ in ROWS)
