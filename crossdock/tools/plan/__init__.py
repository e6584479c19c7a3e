"""What a run would take, before any GPU is paid for: memory, bytes sent, time, and which layout is best."""

from crossdock.tools.plan.assumed import Assumed, AssumedAgreement, assume_counts
from crossdock.tools.plan.counting import Counted, Sent, StepCounter
from crossdock.tools.plan.devices import Device, DeviceError, find_device, read_devices
from crossdock.tools.plan.model import BlockFacts, ModelFacts, plan_model, read_model
from crossdock.tools.plan.routes import RankRoutes, Skew, SkewError, read_skew

__all__ = [
    "Assumed",
    "AssumedAgreement",
    "BlockFacts",
    "Counted",
    "Device",
    "DeviceError",
    "ModelFacts",
    "RankRoutes",
    "Sent",
    "Skew",
    "SkewError",
    "StepCounter",
    "assume_counts",
    "find_device",
    "plan_model",
    "read_devices",
    "read_model",
    "read_skew",
]
