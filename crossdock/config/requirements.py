"""What every check of a setting needs."""

from __future__ import annotations

import os
from operator import attrgetter

from crossdock.config.reading import absolute
from crossdock.config.settings import Config, ConfigError

__all__ = ["check_writable", "require"]


def require(config: Config, name: str, holds: bool, valid: str) -> None:
    if not holds:
        raise ConfigError(name, attrgetter(name)(config), valid)


def check_writable(name: str, folder: str) -> None:
    """Raises ConfigError but for a folder that exists or can be made: its nearest existing parent decides."""
    place = absolute(folder)
    while place and not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place) or not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(name, folder, f"must be a folder that you may write to; {place!r} is none")
