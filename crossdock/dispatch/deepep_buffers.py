"""Which DeepEP there is, and its buffers: one set per group, shared by all layers and freed at exit."""

from __future__ import annotations

import atexit
import importlib
import sys
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch.distributed as dist

from crossdock.dispatch.deepep_api import Buffers, DeepEPOptions, ElasticBuffers, PlainBuffers

__all__ = ["choose_deepep_api", "free_deepep_buffers", "load_deepep", "shared_buffers"]

_NEEDS = (
    "dispatcher 'deepep' needs the package deep_ep with ElasticBuffer (2.1 or newer; github.com/deepseek-ai/DeepEP "
    "says how to install it) or Buffer.get_dispatch_layout; meanwhile use dispatcher 'alltoall'"
)


def load_deepep() -> Any:
    """The module `deep_ep`. Raises ValueError, one line that says what to install, where it is missing or too old."""
    try:
        library = importlib.import_module("deep_ep")
    except (ImportError, OSError) as error:  # a shared library of its own may be missing
        raise ValueError(f"{_NEEDS} ({error})") from error
    choose_deepep_api(library, DeepEPOptions())
    return library


# In order of preference: the class of each API, and what of the library it needs.
_APIS: Mapping[str, tuple[type[Buffers], Callable[[Any], bool]]] = MappingProxyType(
    {
        "elastic": (ElasticBuffers, lambda library: hasattr(library, "ElasticBuffer")),
        "buffer": (PlainBuffers, lambda library: hasattr(getattr(library, "Buffer", None), "get_dispatch_layout")),
    }
)


def choose_deepep_api(library: Any, options: DeepEPOptions) -> type[Buffers]:
    """The class for the API that `options` ask for. Raises ValueError where the library does not have it."""
    there = [name for name, (_, exists) in _APIS.items() if exists(library)]
    version = getattr(library, "__version__", "of unknown version")
    if not there:
        raise ValueError(f"{_NEEDS} (deep_ep {version} has neither)")
    wanted, asking = options.api, f"api = {options.api!r}"
    if options.expand:
        wanted, asking = "elastic", "expand"
    elif options.has_chunks:
        wanted, asking = "buffer", "a size of chunks"
    name = there[0] if wanted == "auto" else wanted
    if name not in there:
        raise ValueError(
            f"dispatcher 'deepep': {asking} needs what deep_ep {version} lacks; it has the API {there[0]!r} alone"
        )
    return _APIS[name][0]


@cache
def _shared() -> dict[tuple[Any, ...], Buffers]:
    """The process's buffers by group, library and options: like process groups, there is one set of them."""
    atexit.register(_free_at_exit)
    return {}


def shared_buffers(library: Any, group: dist.ProcessGroup, options: DeepEPOptions) -> Buffers:
    """The buffers of `group`, the same for all layers. Nothing is allocated before the first exchange."""
    shared, key = _shared(), (id(library), group, options)
    if key not in shared:
        shared[key] = choose_deepep_api(library, options)(library, group, options)
    return shared[key]


def free_deepep_buffers(*, destroy: bool = True) -> None:
    """Free all buffers of this process; call it before `destroy_process_group`. Collective.

    Args:
        destroy: false only forgets them, where other ranks may be gone or wait elsewhere.
    """
    shared = _shared()
    while shared:
        buffers = shared.pop(next(iter(shared)))
        if destroy:
            buffers.destroy()


def _free_at_exit() -> None:
    """After an unhandled exception the other ranks wait elsewhere: to wait for them here would be a hang."""
    failed = getattr(sys, "last_value", None) is not None
    free_deepep_buffers(destroy=dist.is_initialized() and not failed)
