"""Numbers as people read them, and the round ones that an axis is marked with."""

from __future__ import annotations

import math

__all__ = ["count", "log_ticks", "short", "size", "steps_text", "ticks"]


def short(value: float) -> str:
    """Four significant digits at most: `12,345`, `5.482`, `0.0312`, `3.2e-5`."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e9:
        return _exponent(f"{value:.3e}")
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.001:
        return f"{value:.4g}"
    return _exponent(f"{value:.2e}")


def count(value: float) -> str:
    """`8,300`, `12.3 k`, `4.6 M`, `120 B`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= max(0.9995 * size, 1e4):
            scaled = value / size
            return f"{scaled:.0f} {letter}" if scaled >= 99.95 else f"{scaled:.1f} {letter}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes: `830 B`, `12.3 KiB`, `4.6 MiB`, `120 GiB`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            scaled = value / 1024**power
            return f"{scaled:,.0f} {unit}" if scaled >= 99.95 else f"{scaled:.3g} {unit}"
    return f"{value:.0f} B"


def steps_text(first: int, last: int) -> str:
    """`step 10` or `steps 10 to 20`."""
    return f"step {last:,}" if first == last else f"steps {first:,} to {last:,}"


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[tuple[float, str]]:
    """Round values from `low` to `high`, `most` or a few less, with labels that agree in their decimals.

    Args:
        whole: no fractions.
    """
    if not high > low:
        return [(low, short(low))]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [index * step for index in range(first, last + 1)]
    size = max(abs(low), abs(high))
    if size < 1e-3 or size >= 1e9:
        return [(value, short(value)) for value in values]
    decimals = max(0, -math.floor(math.log10(step * (1 + 1e-9))) + (f"{step / power:g}" == "2.5"))
    return [(value, f"{value:,.{decimals}f}" if value else "0") for value in values]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten between `low` and `high`, thinned to six; with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = math.ceil((last - first) / 6)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    values = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [(value, short(value)) for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def _exponent(text: str) -> str:
    """`3.20e-05` as `3.2e-5`."""
    mantissa, e, power = text.partition("e")
    if not e:
        return text
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(power)}"
