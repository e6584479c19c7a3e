"""transformers with our dispatcher and experts: importing this module registers both under the name `crossdock`.

    import crossdock.integrations.transformers
    AutoModelForCausalLM.from_pretrained(
        folder,
        distributed_config=DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="crossdock"),
        experts_implementation="crossdock",
    )

Each name works without the other: our dispatcher brings tokens to any of transformers' experts, and our experts run
without expert parallelism or behind transformers' own dispatch. `crossdock.configure` has the options.

Gradients follow transformers' conventions, not this library's (which only sums, see `crossdock.parallel.fsdp`):

- A rank's loss is the mean over its own tokens, or whatever its caller makes of it, and FSDP averages: a dense
  parameter's gradient is the sum over the `dp_size = dp_replicate_size * fsdp_size` batches, divided by `dp_size`.
- An expert's gradient leaves the exchange as a plain sum over all tokens that reached it, those of the
  `ep_size / tp_size` batches of its group. FSDP sums these over the `efsdp_size = fsdp_size * tp_size / ep_size` ranks
  (and replicas) that share the expert, and transformers sets its divisor to `dp_size`, not to their number: again the
  sum over `dp_size` batches, divided by `dp_size`. So the exchange must divide by nothing.
- The ranks of a `tp` group hold the same tokens. Each sends its slice of them, the slices of the output are gathered
  after, and what flows back to the input is gathered likewise, so that no token counts twice.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError as error:
    raise ImportError(
        "crossdock.integrations.transformers needs transformers >= 5.23, where expert parallelism has a registry; "
        f"transformers {version('transformers')} is installed: pip install 'crossdock[transformers]' ({error})"
    ) from error

from crossdock.dispatch import (
    AUTO_DISPATCHER,
    Dispatched,
    DispatchOptions,
    DispatchSituation,
    build_dispatcher,
    plan_dispatch,
)
from crossdock.experts import ACTIVATIONS, ExpertsFormula, autocast_dtype, choose_backend
from crossdock.integrations.options import current_options
from crossdock.models.hf_experts import UnknownExperts, experts_formula, experts_params

__all__ = ["NAME", "CrossdockEP", "crossdock_experts_forward"]

logger = logging.getLogger(__name__)

NAME = "crossdock"
"""Under which transformers knows the dispatcher (`ep_implementation`) and the experts (`experts_implementation`)."""


class CrossdockEP(EPImplementation):
    """`ep_implementation="crossdock"`: a token travels once to each rank that holds any of its experts.

    transformers' `AllToAllEP` sends one copy per route. transformers builds one instance per experts module.

    Args:
        experts: the module; holds this rank's experts `ep_rank * E/ep .. (ep_rank + 1) * E/ep - 1` already.
        ep_mesh: 1-D, the ranks that together hold all experts.
        tp_mesh: 1-D, the ranks that hold the same tokens.

    Raises:
        ValueError: if `experts_implementation` is `crossdock` and our experts cannot compute this module, or for
            options that cannot work with it.
    """

    num_local_experts: int

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self._config: Any = experts.config
        if self._runs_our_experts():
            _formula(experts)  # refuses early
        options = current_options()
        if options.static_shapes and not self._runs_our_experts():
            raise ValueError(
                f"static_shapes needs experts_implementation={NAME!r}: transformers' own compute the routes that there "
                "are, whose number is not static; set crossdock.configure(static_shapes=False)"
            )
        module: Any = experts
        module.crossdock_static_shapes = options.static_shapes
        self.dispatcher = build_dispatcher(
            self._dispatcher_name(options.dispatcher, ep_mesh, options.dispatch_options(), experts),
            ep_mesh.get_group(),
            self.num_local_experts,
            options.dispatch_options(),
        )

    def _dispatcher_name(self, name: str, ep_mesh: DeviceMesh, options: DispatchOptions, experts: nn.Module) -> str:
        """`name`, or what the rule picks for `auto`."""
        if name != AUTO_DISPATCHER:
            return name
        top_k = getattr(self._config, "num_experts_per_tok", None)
        if not isinstance(top_k, int):
            raise ValueError(
                f"dispatcher = 'auto' needs the number of experts per token, which {type(self._config).__name__} does "
                "not call num_experts_per_tok; choose another, such as crossdock.configure(dispatcher='alltoall')"
            )
        down: Any = experts.down_proj
        situation = DispatchSituation(
            ep_mesh.size(),
            self.num_local_experts * ep_mesh.size(),
            top_k,
            self._config.hidden_size,
            down.dtype,
            torch.device(ep_mesh.device_type),
            ranks=tuple(dist.get_process_group_ranks(ep_mesh.get_group())),
        )
        plan = plan_dispatch(name, 1, situation, options)
        _tell_once(f"dispatcher: {plan}")
        return plan.dispatcher

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum over each token's experts.

        Args:
            hidden_states: `[T, H]`, this rank's tokens; any number, none included.
            top_k_index: `[T, K]` global expert ids.
            top_k_weights: `[T, K]` in the dtype of the activations or in fp32.

        Returns:
            `[T, H]`.
        """
        num_tokens, hidden_size = hidden_states.shape
        shares_tokens = self.tp_mesh.size() > 1
        if shares_tokens:
            hidden_states, top_k_index, top_k_weights = (
                self._own_slice(tensor) for tensor in (hidden_states, top_k_index, top_k_weights)
            )
        arrived = self.dispatcher.dispatch(hidden_states, top_k_index, top_k_weights).wait()
        if self._runs_our_experts():
            y = self.experts_forward(arrived.tokens, arrived.slot_ids, arrived.weights)
        else:
            y = self._run_other_experts(arrived)
        output = self.dispatcher.combine(y, arrived.handle).wait()
        if not shares_tokens:
            return output
        gathered = DTensor.from_local(
            output.contiguous(),
            self.tp_mesh,
            [Shard(0)],
            shape=torch.Size((num_tokens, hidden_size)),
            stride=(hidden_size, 1),
        )
        return gathered.full_tensor()

    def _runs_our_experts(self) -> bool:
        return self._config._experts_implementation == NAME

    def _own_slice(self, tensor: Tensor) -> Tensor:
        """This rank's slice of what all ranks of `tp` hold; the backward pass gathers the slices' gradients."""
        replicated = DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
        return replicated.redistribute(self.tp_mesh, [Shard(0)]).to_local()

    def _run_other_experts(self, arrived: Dispatched) -> Tensor:
        """transformers' experts on one row per route: what all of them take, and none computes a route that is none."""
        tokens, ids, weights = arrived.tokens, arrived.slot_ids, arrived.weights
        top_k = ids.shape[1]
        route = (ids.flatten() >= 0).nonzero().squeeze(1)
        if len(route) == 0:
            # Some of them fail without rows. The sums keep tokens and weights in the graph, so that this rank takes
            # part in the exchanges of the backward pass.
            row = tokens.sum(dim=0, keepdim=True)
            return self.experts_forward(row, ids.new_zeros(1, 1), weights.sum().view(1, 1))[:0]
        rows = self.experts_forward(tokens[route // top_k], ids.flatten()[route, None], weights.flatten()[route, None])
        # Each route has a row of its own, so that a token's routes are summed in one order on every device.
        routes = rows.new_zeros(ids.numel(), rows.shape[1]).index_copy(0, route, rows)
        total = routes.view(*ids.shape, -1).sum(dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
        return total.to(rows.dtype)


def crossdock_experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`experts_implementation="crossdock"`: the weighted sum over each token's experts, by one of our backends.

    Args:
        experts: transformers' module: `gate_up_proj [E, 2I, H]` (`up_proj [E, I, H]` without a gate), `down_proj
            [E, H, I]` (or both transposed), and their biases if it has any.
        hidden_states: `[U, H]`.
        top_k_index: `[U, K]` ids of the module's experts; `E` (transformers' way) or `-1` (ours) is no route.
        top_k_weights: `[U, K]`.

    Returns:
        `[U, H]` in the dtype of `hidden_states`.

    Raises:
        ValueError: if these are experts that ours would compute wrongly.
    """
    formula, params = _formula(experts), experts_params(experts)
    # Autocast does not know every backend's products.
    params = params.to(autocast_dtype(params.down_projs))
    tokens = hidden_states.to(params.down_projs.dtype)
    slot_ids = top_k_index.masked_fill(top_k_index >= len(params.down_projs), -1)
    static = getattr(experts, "crossdock_static_shapes", False)  # as its dispatcher was made
    backend = choose_backend(current_options().experts, tokens, params, static=static)
    return backend(tokens, slot_ids, top_k_weights, params, formula).to(hidden_states.dtype)


@cache
def _tell_once(message: str) -> None:
    logger.info(message)


def _formula(experts: nn.Module) -> ExpertsFormula:
    """What these experts compute; refuses what our backends would compute wrongly."""
    module: Any = experts
    if "crossdock_formula" not in vars(module):
        try:
            module.crossdock_formula = experts_formula(experts)
        except UnknownExperts as error:
            # FSDP renames the class of what it wraps.
            name = type(module).__name__.removeprefix("FSDP")
            raise ValueError(
                f"experts_implementation={NAME!r} computes experts of two products with "
                f"{', '.join(sorted(ACTIVATIONS))} between, but {name} has {error}. Choose one of transformers' own, "
                f"such as experts_implementation='grouped_mm'; ep_implementation={NAME!r} works with all of them"
            ) from None
    return module.crossdock_formula


EPImplementationInterface.register(NAME, CrossdockEP)
ALL_EXPERTS_FUNCTIONS.register(NAME, crossdock_experts_forward)
