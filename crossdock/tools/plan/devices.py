"""The table of devices: what each can do, and its links."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["Device", "DeviceError", "find_device", "read_devices"]

_BASE = "based_on"


class DeviceError(ValueError):
    """A device, or a table of devices, that cannot be used; the message names the file and the key."""


@dataclass(frozen=True)
class Device:
    """One device of a node, as devices.toml describes it; GB are 10^9 bytes, GiB 2^30."""

    name: str
    peak_tflops: float
    achieved: float
    hbm_gbytes: float
    memory_gib: float
    node_size: int
    nvlink_gbytes: float
    nvlink_latency_us: float
    network_gbytes: float
    network_latency_us: float
    collective_share: float
    dollars_per_hour: float

    def seconds(self, nvlink_bytes: float, network_bytes: float, nvlink_hops: float, network_hops: float) -> float:
        """How long a device sends: both kinds of link at once, and the latencies of what follows one another."""
        rates = nvlink_bytes / (self.nvlink_gbytes * 1e9), network_bytes / (self.network_gbytes * 1e9)
        return max(rates) + (nvlink_hops * self.nvlink_latency_us + network_hops * self.network_latency_us) * 1e-6


def read_devices(path: Path | None = None) -> dict[str, Device]:
    """The devices that come with the package, and those of the file `path`, which go before.

    Raises:
        DeviceError: for a file that cannot be read, or an entry that is no device.
    """
    text = Path(__file__).with_name("devices.toml").read_text()
    devices = _parse(text, "devices.toml", {})
    if path is None:
        return devices
    try:
        own = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(f"{path} cannot be read: {error}") from None
    return devices | _parse(own, str(path), devices)


def find_device(name: str, devices: Mapping[str, Device]) -> Device:
    """Of `devices` the one of this name, in any case.

    Raises:
        DeviceError: names those that there are.
    """
    for known, device in devices.items():
        if known.lower() == name.lower():
            return device
    raise DeviceError(f"--gpu = {name!r}\none of {', '.join(devices)}, or one of a file of your own (--devices FILE)")


def _parse(text: str, source: str, known: Mapping[str, Device]) -> dict[str, Device]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DeviceError(f"{source} is no TOML: {error}") from None
    devices = dict(known)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise DeviceError(f"{source}: {name} = {table!r} stands in no table; a device is a table [{name}]")
        devices[name] = _device(name, table, source, devices)
    return {name: devices[name] for name in tables}


def _device(name: str, table: Mapping[str, Any], source: str, known: Mapping[str, Device]) -> Device:
    base = table.get(_BASE)
    if base is not None and base not in known:
        raise DeviceError(f"{source}: [{name}] {_BASE} = {base!r}: one of {', '.join(known)}")
    names = [field.name for field in fields(Device) if field.name != "name"]
    for key, value in table.items():
        if key not in (*names, _BASE):
            raise DeviceError(f"{source}: [{name}] has no key {key!r}; there are {', '.join(names)}, {_BASE}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        least = 0 if key in ("collective_share", "dollars_per_hour") or key.endswith("_us") else 1e-9
        if key != _BASE and not (number and math.isfinite(value) and value >= least):
            raise DeviceError(f"{source}: [{name}] {key} = {value!r}: must be a positive number")
    whole = table.get("node_size", 1)
    if not isinstance(whole, int):
        raise DeviceError(f"{source}: [{name}] node_size = {whole!r}: must be a whole number")
    for key in ("achieved", "collective_share"):
        if table.get(key, 0) > 1:
            raise DeviceError(f"{source}: [{name}] {key} = {table[key]!r}: must be a share, at most 1")
    given = {} if base is None else {key: getattr(known[base], key) for key in names}
    given |= {key: value for key, value in table.items() if key != _BASE}
    missing = [key for key in names if key not in given]
    if missing:
        raise DeviceError(f"{source}: [{name}] has no {', '.join(missing)}; or name a device in {_BASE}")
    return Device(name, **given)
