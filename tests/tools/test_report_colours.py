"""The colours of curves and bars can be told apart by people who see fewer colours."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import combinations

import numpy as np
import pytest

NAMES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
# Machado, Oliveira and Fernandes 2009, a severity of 1, in linear RGB.
VISION = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
# Of CIE 1976; 2.3 is a difference that is just noticed.
LEAST = 25.0


def lab(rgb: np.ndarray) -> np.ndarray:
    """Of linear RGB, 0 to 1, under D65."""
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_differ_for_every_kind_of_vision(theme: str, vision: str) -> None:
    style = files("crossdock.tools.report").joinpath("page.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    text = light if theme == "light" else dark
    colours = []
    for name in NAMES:
        found = re.search(rf"--{name}: (#[0-9a-f]{{6}});", text)
        assert found is not None, name
        colours.append(lab(VISION[vision] @ linear(found[1])))
    distances = {
        (one, two): float(np.linalg.norm(colours[one] - colours[two])) for one, two in combinations(range(8), 2)
    }
    assert min(distances.values()) > LEAST
