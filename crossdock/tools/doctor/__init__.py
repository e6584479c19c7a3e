"""What a machine is, what of crossdock works on it, and a test of it."""

from crossdock.tools.doctor.checkup import Finding, checkup
from crossdock.tools.doctor.machine import installed_versions, machine_facts
from crossdock.tools.doctor.self_test import TestedDispatcher, self_test

__all__ = ["Finding", "TestedDispatcher", "checkup", "installed_versions", "machine_facts", "self_test"]
