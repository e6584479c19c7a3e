"""Keeps the ranks that hold a model's experts evenly busy while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossdock.balance.checks import borrowed_slots, check_balance, copies_per_rank
from crossdock.balance.config import BalanceConfig
from crossdock.balance.costs import Rates, SpillCosts
from crossdock.balance.deciding import Deciding
from crossdock.balance.migrate import Migration, migrate
from crossdock.balance.monitor import PASSES, BalanceMonitor, RankLoad
from crossdock.balance.placing import Proposal, propose
from crossdock.balance.rates import measure_rates
from crossdock.balance.relief import LayerRelief, ReliefRules
from crossdock.balance.spilling import SpillLimits
from crossdock.dispatch import build_dispatcher, find_nodes
from crossdock.moe import moe_layer_places, moe_layers
from crossdock.parallel import local_part
from crossdock.placement import EMPTY, PLANNERS, Placement, PlanningSituation
from crossdock.routed_experts import RoutedExperts
from crossdock.routing import RouterConfig, StepLoad

__all__ = ["Balancer"]

# Values of AdamW for each of a parameter, which move with it.
_MOMENTS = 2


class Balancer:
    """Places, copies and relieves the experts of all MoE layers of a model, as `[balance]` says (docs/balance.md).

    Make one when the model is on its layout, before its first forward pass. Then, after each optimizer step,

        metrics, messages = balancer.after_step(finish_step(model, group))

    Where further copies of the model take part (`ReplicaGroups`), the counts of `load` and what `gather` gives are
    summed over them first, so that all copies place experts alike.

    The methods are collective among the ranks of the default group.

    Args:
        model: with expert parallelism applied, and FSDP, where they are wanted.
        config: alike on all ranks.
        optimizer: its states move along with the experts.
        stage: all ranks of this pipeline stage; all there are if `None`.
        dtype: in which experts compute, for measurements; that of the parameters if `None`.

    Attributes:
        monitor: the loads.
        seen: those of the ranks in the last step; `None` before it, and where one rank holds all experts.

    Raises:
        BalanceError: for a setting that does not go with the model or its layout.
    """

    def __init__(
        self,
        model: nn.Module,
        config: BalanceConfig,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        stage: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config, self.optimizer, self._stage, self._dtype = config, optimizer, stage, dtype
        self._layers = list(moe_layers(model).values())
        self._places = moe_layer_places(model)
        self._device = next(chain(model.buffers(), model.parameters())).device
        # A pipeline stage without MoE layers takes part in what concerns all.
        self.num_ranks = _largest(max((layer.ep_world_size for layer in self._layers), default=1), self._device)
        groups = dist.get_world_size(stage) // self.num_ranks if dist.is_initialized() else 1
        self.monitor = BalanceMonitor(self._places, self._layers, self.num_ranks, max(groups, 1), config.load_decay)
        self._ranks_per_node = self._find_nodes()
        self._deciding = Deciding(config, self.num_ranks // self._ranks_per_node)
        self._copies_per_rank = self._num_borrowed = 0
        self._rates: Rates | None = None
        self.seen: RankLoad | None = None
        if not self.is_active:
            return
        check_balance(config, self._layers)
        self._copies_per_rank = copies_per_rank(config, self.num_ranks)
        if config.spills:
            held = self._layers[0].placement.rows_per_rank + self._copies_per_rank
            self._num_borrowed = borrowed_slots(config, held, self.num_ranks)
        if (config.moves and config.move_if_it_pays) or (config.spills and config.spill_if_it_pays):
            self._rates = self._measure()
        for layer in self._layers:
            assert layer.ep_group is not None
            placement = Placement.contiguous(layer.num_experts, self.num_ranks, self._copies_per_rank)
            slots, plan = placement.slots_per_rank + self._num_borrowed, layer.dispatch_plan
            options = replace(layer.config.dispatch_options(), overlap_chunks=plan.overlap_chunks)
            layer.dispatcher = build_dispatcher(plan.dispatcher, layer.ep_group, slots, options)
            layer.experts.register_load_state_dict_post_hook(partial(_weights_changed, layer))
            self._put(layer, placement)

    @property
    def is_active(self) -> bool:
        """Whether anything is balanced; loads are only watched otherwise."""
        return self.config.strategy != "none" and self.num_ranks > 1 and bool(self._layers)

    def gather(self, load: StepLoad) -> Tensor:
        """What `after_step` is to know of all ranks: a vector whose sum over copies of the model has a meaning.

        Loads of ranks (`BalanceMonitor.gather`), then what was measured here of links and ranks, and a one. Float64, on
        the CPU; empty where one rank holds all experts.
        """
        if self.num_ranks == 1:
            return torch.zeros(0, dtype=torch.float64)
        rates = [0.0] * 3 if self._rates is None else self._rates
        last = torch.tensor([*rates, 1.0], dtype=torch.float64)
        return torch.cat([self.monitor.gather(load).flatten(), last])

    def after_step(self, load: StepLoad, gathered: Tensor | None = None) -> tuple[dict[str, Any], list[str]]:
        """Take in a step's `load`, and move experts where that is due.

        Args:
            load: of the whole global batch, all copies of the model together.
            gathered: of `gather`, summed over these copies; `None` where there is one.

        Returns:
            Metrics, and messages for people: what was decided, and why.

        Raises:
            MigrationError: where experts could not be moved, and the model is not whole any more.
        """
        if self.num_ranks == 1:
            return {}, []
        gathered = self.gather(load) if gathered is None else gathered
        *rates, copies = gathered[-4:].tolist()
        if self._rates is not None and copies > 1:
            self._rates = Rates(*(value / copies for value in rates))
        loads = gathered[:-4].view(len(self._places.names), self.num_ranks + 1)
        seen = self.seen = self.monitor.update(load, loads, round(copies))
        metrics: dict[str, Any] = seen.metrics(self._ranks_per_node)
        if self.config.strategy == "none":
            return metrics, []
        spilled = self._deciding.spills
        messages = self._deciding.update(metrics["rank_max_mean_before"], metrics["rank_max_mean"])
        if self._deciding.spills != spilled:
            self._put_all()
        if self.config.spills:
            metrics["borrowed_experts"] = self._take_borrowed()
        if self._deciding.is_due():
            more, message = self.rebalance()
            metrics |= more
            messages.append(message)
        return metrics, messages

    def _take_borrowed(self) -> int:
        """Experts that ranks have borrowed in the step, over all layers and groups."""
        reliefs = [layer.relief for layer in self._layers]
        taken = sum(relief.take_borrowed() for relief in reliefs if isinstance(relief, LayerRelief))
        # All ranks of a group know of all that is borrowed in it.
        return round(_sums([taken / self.num_ranks], self._device)[0])

    def rebalance(self, *, always: bool = False) -> tuple[dict[str, Any], str]:
        """Plan by the average loads; move experts, if that pays or `always`. Returns metrics and a message.

        Raises:
            MigrationError: see `after_step`.
            ValueError: before the first step.
        """
        self._deciding.looked()
        if self.monitor.average is None:
            raise ValueError("there are no loads yet to place experts by; take a step first")
        before = after = saved = spent = 0.0
        moved, migration = 0, Migration()
        if self.is_active:
            loads = self.monitor.average[list(self._places.own)]
            present = [layer.placement for layer in self._layers]
            planner = PLANNERS[self.config.planner]
            proposal = propose(
                planner, loads, self._situation(), present, self._stage, self._device, self.config.min_gain
            )
            moved = int(proposal.moved.sum())
            saved, spent = self._worth(proposal, loads)
            before, after = proposal.before.sum().item(), proposal.after.sum().item()
            if self._agreed(always or self._rates is None or not moved or saved > spent):
                migration = self._move(proposal)
            else:
                after = before
        # Of each stage and group of ranks; layers count once, as all of its ranks have these numbers.
        share = 1 / dist.get_world_size(self._stage)
        own = (before, after, moved, migration.experts, migration.seconds, saved, spent)
        *sums, sent = _sums([*(share * value for value in own), migration.bytes], self._device)
        before, after, moved, experts, seconds, saved, spent = sums
        before, after = before / len(self._places.names), after / len(self._places.names)
        metrics = {
            "predicted_rank_max_mean": after,
            "moved_experts": round(experts),
            "moved_bytes": round(sent),
            "move_seconds": seconds,
        }
        what = f"balance: max/mean over ranks {before:.3f}, {after:.3f} with {round(experts)} experts moved"
        if round(moved) > round(experts):
            return metrics, f"{what}; {round(moved - experts)} stay: {saved:.2g} s to win, {spent:.2g} s to move them"
        return metrics, f"{what} ({sent / 2**20:.1f} MiB, {seconds:.2f} s)" if round(experts) else what

    def _agreed(self, verdict: bool) -> bool:
        """That of the stage's first rank: on another one, numbers may differ in the last bit."""
        agreed = torch.tensor(verdict, device=self._device)
        dist.broadcast(agreed, group=self._stage, group_src=0)
        return bool(agreed)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: average loads, placements, what has been decided. Plain numbers. Collective."""
        average = self.monitor.average
        if average is None:
            return {}
        held = [layer.placement.without_last_slots(self._num_borrowed) for layer in self._layers]
        placements = {
            index: list(placement.slot_to_expert) for index, placement in zip(self._places.own, held, strict=True)
        }
        if self._stage is not None and dist.get_world_size(self._stage) < dist.get_world_size():
            of_stages: list[dict[int, list[int]]] = [{}] * dist.get_world_size()
            dist.all_gather_object(of_stages, placements)
            placements = {index: slots for each in of_stages for index, slots in each.items()}
        return {
            "average_routes": average.tolist(),
            "deciding": self._deciding.state(),
            "num_ranks": self.num_ranks,
            "copies_per_rank": self._copies_per_rank,
            "placements": [placements[index] for index in sorted(placements)] if self.is_active else [],
        }

    def restore(self, state: dict[str, Any]) -> str | None:
        """Go on where a checkpoint was: with its placements on as many ranks, else with some by its loads.

        Experts' weights and optimizer states move along, to no purpose where they are loaded afterwards.

        Returns:
            A message, where experts were placed anew.
        """
        if "average_routes" not in state:
            return None
        self.monitor.average = torch.tensor(state["average_routes"], dtype=torch.float64)
        layout = (state["num_ranks"], state["copies_per_rank"], len(state["placements"]))
        if self.is_active and layout == (self.num_ranks, self._copies_per_rank, len(self._places.names)):
            self._deciding.restore(state["deciding"])
            self._put_all()
            self._place([state["placements"][index] for index in self._places.own])
            return None
        self._deciding.restore({key: state["deciding"][key] for key in ("moves", "spills")})
        self._put_all()
        if self.config.strategy == "none" or self.num_ranks == 1 or not self._deciding.moves:
            return None
        return self.rebalance(always=True)[1]

    def forget_step(self) -> None:
        """Drop what has been noted of a step that does not count."""
        for layer in self._layers:
            layer.clock.take()
            if isinstance(layer.relief, LayerRelief):
                layer.relief.take_borrowed()

    def _place(self, slots: list[list[int]]) -> None:
        """Placements of held slots in force."""
        placements = [
            Placement(layer.num_experts, self.num_ranks, tuple(own), self._copies_per_rank)
            for layer, own in zip(self._layers, slots, strict=True)
        ]
        unknown = torch.zeros(len(placements))
        self._move(Proposal(placements, unknown, unknown, unknown))

    def _move(self, proposal: Proposal) -> Migration:
        changed = {
            layer: placement
            for layer, placement in zip(self._layers, proposal.placements, strict=True)
            if layer.placement.without_last_slots(self._num_borrowed) != placement
        }
        migration = migrate(changed, self.optimizer)
        for layer, placement in changed.items():
            self._put(layer, placement)
        return migration

    def _put_all(self) -> None:
        """The present placements once more, by what has been decided since."""
        for layer in self._layers if self.is_active else ():
            self._put(layer, layer.placement.without_last_slots(self._num_borrowed))

    def _put(self, layer: RoutedExperts, placement: Placement) -> None:
        """A placement of held slots in force, with the relief that goes with it."""
        assert layer.ep_group is not None
        whole = placement.with_more_slots(self._num_borrowed)
        spills = self._deciding.spills
        copies = sum(expert != EMPTY for expert in placement.slot_to_expert) > layer.num_experts
        rules = ReliefRules(self.config.copy_choice, self._ranks_per_node)
        if spills:
            rules = rules._replace(limits=self._limits(), costs=self._costs(layer))
        relief = LayerRelief(whole, self._num_borrowed, layer.ep_group, rules) if copies or spills else None
        layer.replace(whole, relief)

    def _limits(self) -> SpillLimits:
        config = self.config
        return SpillLimits(self._num_borrowed, config.spill_slack, config.min_spilled_routes, config.memory_bound)

    def _costs(self, layer: RoutedExperts) -> SpillCosts | None:
        if self._rates is None or not self.config.spill_if_it_pays:
            return None
        return SpillCosts(self._expert_bytes(layer), self._flops_per_route(layer), self._rates)

    def _expert_bytes(self, layer: RoutedExperts) -> int:
        """Of an expert's parameters, whole, as they travel."""
        parameters = layer.experts.slot_parameters().values()
        return sum(parameter[0].numel() * (self._dtype or parameter.dtype).itemsize for parameter in parameters)

    def _flops_per_route(self, layer: RoutedExperts) -> int:
        """Of a forward pass."""
        matrices = (layer.experts.gate_and_up_projs, layer.experts.down_projs)
        return sum(2 * matrix[0].numel() for matrix in matrices)

    def _worth(self, proposal: Proposal, loads: Tensor) -> tuple[float, float]:
        """Seconds that a proposal would save until placements are looked at again, and that moving would take."""
        if self._rates is None:
            return 0.0, 0.0
        layer = self._layers[0]
        routes = ((proposal.before - proposal.after) * loads.mean(dim=1)).sum().item()
        routes *= loads.shape[1] / self.num_ranks / self.monitor.num_groups
        steps = self.config.rebalance_interval or 100
        saved = steps * PASSES * routes * self._flops_per_route(layer) / self._rates.flops_per_second
        rows = [local_part(parameter.detach()) for parameter in layer.experts.slot_parameters().values()]
        row_bytes = sum(each[0].nbytes for each in rows) * (1 + _MOMENTS)
        spent = proposal.moved.sum().item() / self.num_ranks * row_bytes / self._rates.bytes_per_second
        return saved, spent

    def _situation(self) -> PlanningSituation:
        layer = self._layers[0]
        router: RouterConfig | None = None if layer.router is None else layer.router.config
        is_limited = router is not None and router.topk_group < router.n_group
        return PlanningSituation(
            self.num_ranks,
            layer.placement.slots_per_rank - self._num_borrowed,
            num_groups=router.n_group if router is not None and is_limited else 1,
            num_nodes=self.num_ranks // self._ranks_per_node,
            copy_choice=self.config.copy_choice,
            move_cost=self.config.move_cost,
        )

    def _find_nodes(self) -> int:
        """Ranks of a node, of those that hold the experts; all of them where nodes differ."""
        layer, nodes = next(iter(self._layers), None), 1
        if layer is not None and layer.ep_group is not None:
            ranks = dist.get_process_group_ranks(layer.ep_group)
            nodes = self.num_ranks // (find_nodes(ranks, layer.config.ranks_per_node).size or self.num_ranks)
        return self.num_ranks // _largest(nodes, self._device)

    def _measure(self) -> Rates:
        layer = self._layers[0]
        assert layer.ep_group is not None
        intermediate_size, hidden_size = layer.experts.down_projs.shape[1:]
        dtype = self._dtype or layer.example().dtype
        rates = measure_rates(layer.ep_group, self._device, dtype, hidden_size, intermediate_size)
        # Other groups hold the same experts, and must decide alike.
        slowest = torch.tensor(
            [1 / rates.bytes_per_second, 1 / rates.flops_per_second, rates.seconds_per_exchange],
            dtype=torch.float64,
            device=self._device,
        )
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=self._stage)
        per_byte, per_flop, per_exchange = slowest.tolist()
        return Rates(1 / per_byte, 1 / per_flop, per_exchange)


def _sums(values: Sequence[float], device: torch.device) -> list[float]:
    """Over all ranks of the default group."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def _largest(value: int, device: torch.device) -> int:
    """Of all ranks of the default group."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _weights_changed(layer: RoutedExperts, *_: object) -> None:
    layer.weights_changed()
