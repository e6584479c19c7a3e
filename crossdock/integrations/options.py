"""Options of the plug-ins, kept apart from the libraries that they plug into."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from crossdock.comm import WireDtype
from crossdock.dispatch import DispatchOptions
from crossdock.moe_config import MoEConfig

__all__ = ["PluginOptions", "configure", "current_options"]


@dataclass(frozen=True)
class PluginOptions:
    """What `configure` sets, by the names of `MoEConfig`. A model takes all but `experts` when it is loaded.

    Raises:
        ValueError: for a value that is not valid, or settings that do not go together.
    """

    dispatcher: str = "alltoall"
    """How tokens travel: `auto`, `alltoall`, `allgather`, `hierarchical`, `deepep` or `symmetric`."""
    ranks_per_node: int = 0
    """Consecutive expert-parallel ranks that make a node, for `hierarchical`; 0: those launched on one machine."""
    wire_dtype: WireDtype = "same"
    """What tokens travel in: `same`, `bf16`, `fp16`, or `fp8` with a scale for every 128 values."""
    wire_directions: Literal["tokens", "both"] = "tokens"
    """What `wire_dtype` applies to: the forward pass's tokens alone, or results and gradients as well (`both`)."""
    static_shapes: bool = False
    """Worst-case buffers and no sync of the GPU, with `auto`, `alltoall`, `allgather` or `symmetric`; needs
    `experts_implementation="crossdock"`."""
    deepep_api: Literal["auto", "elastic", "buffer"] = "auto"
    """Of deep_ep: `ElasticBuffer`, the older `Buffer`, or the first of them that there is."""
    deepep_num_sms: int = 0
    """SMs that an exchange of deep_ep may take, even; 0: its choice."""
    deepep_fp8_dispatch: bool = False
    """Let deep_ep send tokens in FP8."""
    deepep_expand: bool = False
    """Let tokens arrive once per route, sorted by expert. Needs `ElasticBuffer`."""
    deepep_max_tokens_per_rank: int = 0
    """Tokens per rank that deep_ep's buffer has room for from the start."""
    experts: str = "auto"
    """Backend of `experts_implementation="crossdock"`, of `crossdock.experts.EXPERTS_BACKENDS`, or `auto`: `cpu` on
    a CPU, `grouped_mm` on a GPU, `eager` where that cannot. Looked up in every
    forward pass."""

    def __post_init__(self) -> None:
        self._as_settings().check()
        if self.dispatcher == "local":
            raise ValueError("dispatcher = 'local': transformers has no dispatcher with ep_size = 1, and needs none")

    def dispatch_options(self) -> DispatchOptions:
        """Those of the dispatcher."""
        return self._as_settings().dispatch_options()

    def _as_settings(self) -> MoEConfig:
        return MoEConfig(**asdict(self))


_options = PluginOptions()


def configure(
    *,
    dispatcher: str | None = None,
    ranks_per_node: int | None = None,
    wire_dtype: WireDtype | None = None,
    wire_directions: Literal["tokens", "both"] | None = None,
    static_shapes: bool | None = None,
    deepep_api: Literal["auto", "elastic", "buffer"] | None = None,
    deepep_num_sms: int | None = None,
    deepep_fp8_dispatch: bool | None = None,
    deepep_expand: bool | None = None,
    deepep_max_tokens_per_rank: int | None = None,
    experts: str | None = None,
) -> PluginOptions:
    """Set options of the plug-ins in this process; call it before a model is loaded, on all ranks alike.

    Args:
        dispatcher: see `PluginOptions`; `None` leaves an option as it is.
        ranks_per_node: likewise.
        wire_dtype: likewise.
        wire_directions: likewise.
        static_shapes: likewise.
        deepep_api: likewise.
        deepep_num_sms: likewise.
        deepep_fp8_dispatch: likewise.
        deepep_expand: likewise.
        deepep_max_tokens_per_rank: likewise.
        experts: likewise.

    Returns:
        All options as they are now.

    Raises:
        ValueError: for a value that is not valid, or options that do not go together; nothing is set then.
    """
    global _options
    given = {name: value for name, value in locals().items() if value is not None}
    try:
        _options = replace(_options, **given)
    except ValueError as error:
        raise ValueError(f"crossdock.configure: {error}") from None
    return _options


def current_options() -> PluginOptions:
    """The options as `configure` left them."""
    return _options
