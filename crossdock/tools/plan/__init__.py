"""What a run would take, before any GPU is paid for: memory, bytes sent, time, and which layout is best."""

from crossdock.tools.plan.advice import advice
from crossdock.tools.plan.assumed import Assumed, AssumedAgreement, assume_counts
from crossdock.tools.plan.auto import found_device, is_open, known_device, settle
from crossdock.tools.plan.counting import Counted, Sent, StepCounter
from crossdock.tools.plan.devices import Device, DeviceError, find_device, read_devices
from crossdock.tools.plan.estimate import Estimator
from crossdock.tools.plan.extended import DryRun, Runner, calibrate, extended_run, kept_blocks
from crossdock.tools.plan.figures import Calibration, Estimate, Memory, Work
from crossdock.tools.plan.measured import calibrated_on_run
from crossdock.tools.plan.model import BlockFacts, ModelFacts, UnknownModel, plan_model, read_model
from crossdock.tools.plan.picture import picture
from crossdock.tools.plan.planning import Plan, PlanOptions, make_plan
from crossdock.tools.plan.routes import RankRoutes, Skew, SkewError, read_skew
from crossdock.tools.plan.search import Found, ScaleRow, scale, search
from crossdock.tools.plan.show import as_json, show

__all__ = [
    "Assumed",
    "AssumedAgreement",
    "BlockFacts",
    "Calibration",
    "Counted",
    "Device",
    "DeviceError",
    "DryRun",
    "Estimate",
    "Estimator",
    "Found",
    "Memory",
    "ModelFacts",
    "Plan",
    "PlanOptions",
    "RankRoutes",
    "Runner",
    "ScaleRow",
    "Sent",
    "Skew",
    "SkewError",
    "StepCounter",
    "UnknownModel",
    "Work",
    "advice",
    "as_json",
    "assume_counts",
    "calibrate",
    "calibrated_on_run",
    "extended_run",
    "find_device",
    "found_device",
    "is_open",
    "kept_blocks",
    "known_device",
    "make_plan",
    "picture",
    "plan_model",
    "read_devices",
    "read_model",
    "read_skew",
    "scale",
    "search",
    "settle",
    "show",
]
