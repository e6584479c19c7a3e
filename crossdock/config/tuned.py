"""What `crossdock tune` has measured: the file, and which of its entries is for a run (docs/tune.md)."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import torch
import torch.distributed as dist

from crossdock.dispatch import find_nodes
from crossdock.kernels import Tiles, TileTable
from crossdock.moe_config import MoEConfig
from crossdock.routed_experts import RoutedExperts

__all__ = [
    "AUTOMATIC",
    "KERNEL_TILES",
    "THREADS",
    "TunedEntry",
    "TunedFileError",
    "TunedKey",
    "find_entry",
    "near_miss",
    "read_tuned",
    "tile_setting",
    "tile_table",
    "tuned_file",
    "write_entry",
]

AUTOMATIC: Mapping[str, Any] = MappingProxyType(
    {
        "experts": "auto",
        "overlap_chunks": 0,
        "deepep_num_sms": 0,
        "deepep_dispatch_chunk": 0,
        "deepep_combine_chunk": 0,
        "wire_dtype": "same",
    }
)
"""Settings of `[moe]` that a tuned value may take the place of, and the value that leaves them open."""
THREADS = "threads"
"""A setting besides: threads of a rank on a CPU."""
KERNEL_TILES = "kernel_tiles"
"""What names of settings begin with that are tiles of backend `triton`, see `tile_setting`."""

_FORMAT, _VERSION = "crossdock tuned", 1
# What else of `[moe]` has a part in how fast tokens travel.
_TRAVEL = ("ranks_per_node", "deepep_api", "deepep_fp8_dispatch", "deepep_expand", "wire_directions")
# An entry that differs in so many fields is worth a word.
_NEAR = 2


class TunedFileError(ValueError):
    """A file that holds no measurements; the message names it and says what is wrong."""


@dataclass(frozen=True)
class TunedKey:
    """What a measurement is valid for; nothing else is taken.

    Attributes:
        device: name of the GPU, or of the processor with its number of cores.
        torch, triton, crossdock, deep_ep: their versions; empty where they are not installed.
        hidden_size, intermediate_size, num_experts, top_k: `H`, `I`, `E`, `K`.
        tokens_per_rank: `T`, of a forward pass.
        ep: ranks that together hold all experts.
        ranks_per_machine: that share its cores and links.
        dtype: of activations.
        dispatcher, static_shapes: as set, of `[moe]`; the former with what else is set of how tokens travel.
    """

    device: str
    torch: str
    triton: str
    crossdock: str
    deep_ep: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    tokens_per_rank: int
    ep: int
    ranks_per_machine: int
    dtype: str
    dispatcher: str
    static_shapes: bool

    @classmethod
    def of(cls, layer: RoutedExperts, *, tokens_per_rank: int, ep: int, dtype: str, device: torch.device) -> TunedKey:
        """The key of a layer with `GroupedExperts`, in this process group and environment."""
        return cls(
            device=device_name(device),
            torch=torch.__version__,
            triton=_version("triton"),
            crossdock=_version("crossdock"),
            deep_ep=_version("deep_ep"),
            hidden_size=layer.hidden_size,
            intermediate_size=layer.experts.down_projs.shape[1],
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            tokens_per_rank=tokens_per_rank,
            ep=ep,
            ranks_per_machine=find_nodes(range(dist.get_world_size()), 0).of_ranks.count(0),
            dtype=dtype,
            dispatcher=_travel(layer.config),
            static_shapes=layer.config.static_shapes,
        )

    def differences(self, other: TunedKey) -> list[str]:
        """Fields in which `other` differs, with its value and this one's."""
        pairs = ((each.name, getattr(other, each.name), getattr(self, each.name)) for each in fields(self))
        return [f"{name} {theirs!r}, here {ours!r}" for name, theirs, ours in pairs if theirs != ours]


def device_name(device: torch.device) -> str:
    """Of a GPU; or of the processor with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {os.cpu_count()} cores"


def _travel(config: MoEConfig) -> str:
    set_beside = [name for name in _TRAVEL if getattr(config, name) != getattr(MoEConfig, name)]
    return ", ".join([config.dispatcher, *(f"{name} = {getattr(config, name)}" for name in set_beside)])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class TunedEntry:
    """What was measured for one key.

    Attributes:
        key: what it is valid for.
        date: of the measurement, ISO 8601.
        settings: by name what was measured of each: `default` and `chosen` values, and `candidates` with their times.
    """

    key: TunedKey
    date: str
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def choices(self) -> dict[str, Any]:
        """The settings for which another value than the default was chosen."""
        measured = self.settings.items()
        return {name: each["chosen"] for name, each in measured if each["chosen"] != each["default"]}


def tuned_file(tuned: str) -> Path | None:
    """The file that `training.tuned` means; `None` for `off`."""
    if tuned == "off":
        return None
    if tuned != "auto":
        return Path(tuned)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The specification ignores relative paths.
    return Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"), "crossdock", "tuned.json")


def read_tuned(path: Path) -> list[TunedEntry]:
    """The entries of a file.

    Raises:
        TunedFileError: where it cannot be read, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TunedFileError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise TunedFileError(f"{path} is damaged: it is no JSON ({error})") from None
    try:
        return _entries(document)
    except (ValueError, TypeError, KeyError) as error:
        cause = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise TunedFileError(f"{path} is damaged, or not a file of `crossdock tune`: {cause}") from None


def _entries(document: Any) -> list[TunedEntry]:
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError(f"it has no format {_FORMAT!r}")
    if document.get("version") != _VERSION:
        raise ValueError(f"its version is {document.get('version')!r}, this crossdock reads {_VERSION}")
    entries = [
        TunedEntry(TunedKey(**each["key"]), str(each["date"]), dict(each["settings"])) for each in document["entries"]
    ]
    types = get_type_hints(TunedKey)
    for entry in entries:
        for name, value in asdict(entry.key).items():
            if type(value) is not types[name]:
                raise ValueError(f"{name} is {value!r}, not of type {types[name].__name__}")
        _check_choices(entry.choices)
    return entries


def _check_choices(choices: Mapping[str, Any]) -> None:
    """Raises ValueError for what no setting takes. Settings that are not known here are left alone."""
    threads = choices.get(THREADS, 1)
    if type(threads) is not int or threads < 1:
        raise ValueError(f"{THREADS} is {threads!r}; it must be 1 or more")
    tile_table(choices)
    MoEConfig(**{name: value for name, value in choices.items() if name in AUTOMATIC}).check()


def tile_setting(kernel: str, buckets: Sequence[int]) -> str:
    """The name under which tiles of a kernel are kept that are for these buckets of rows per slot."""
    return ".".join([KERNEL_TILES, kernel, *map(str, buckets)])


def tile_table(choices: Mapping[str, Any]) -> TileTable | None:
    """The tiles of `choices`, `None` without any. Raises ValueError for what is no kernel, bucket or tiles."""
    tiles: dict[tuple[str, int], Tiles] = {}
    for name, values in choices.items():
        prefix, *rest = name.split(".")
        if prefix == KERNEL_TILES:
            try:
                kernel, *buckets = rest
                tiles |= {(kernel, int(bucket)): Tiles(*values) for bucket in buckets}
            except TypeError as error:
                raise ValueError(f"{name} is {values!r}: no tiles ({error})") from None
    return TileTable(tiles) if tiles else None


def find_entry(entries: Sequence[TunedEntry], key: TunedKey) -> TunedEntry | None:
    """The entry with this key."""
    return next((entry for entry in entries if entry.key == key), None)


def near_miss(entries: Sequence[TunedEntry], key: TunedKey) -> str:
    """In what the nearest entry of another key differs, where that is little; else empty."""
    differences = min((key.differences(entry.key) for entry in entries), key=len, default=[])
    return "; ".join(differences) if len(differences) <= _NEAR else ""


def write_entry(path: Path, entry: TunedEntry) -> None:
    """Put an entry into a file, which is made where there is none.

    Of an entry with the same key that is there, settings stay that this one has not measured.

    Raises:
        TunedFileError: for a file that holds something else, which is left as it is.
        OSError: where it cannot be written.
    """
    entries = read_tuned(path) if path.exists() else []
    before = find_entry(entries, entry.key)
    settings = {**(before.settings if before else {}), **entry.settings}
    kept = [each for each in entries if each is not before]
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "entries": [asdict(each) for each in (*kept, TunedEntry(entry.key, entry.date, settings))],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write at once must not share it.
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
