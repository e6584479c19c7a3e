"""Reading settings: a TOML file, then command-line overrides."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from crossdock.checkpoint import UNCHECKED, checksum, find_checkpoint
from crossdock.config.settings import ASSETS_FOLDER, Config, ConfigError, setting_types
from crossdock.data import is_path
from crossdock.models.family import DEEPEP_SUFFIX

__all__ = [
    "RUN_CONFIG_FILE",
    "absolute",
    "assets_of",
    "load_config",
    "read_run_settings",
    "read_toml",
    "to_toml",
    "write_run_settings",
]

logger = logging.getLogger(__name__)

# The resolved settings in a run folder.
RUN_CONFIG_FILE = "config.toml"
"""In a run folder: the settings that the run has."""
PRESETS: Mapping[str, Path] = MappingProxyType(
    {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))}
)
"""Configurations that a person runs by name, wherever crossdock is installed."""
# Above all settings, in the help of the commands that have no options of their own.
_HELP: Mapping[str, str] = MappingProxyType(
    {
        "train": "Train. All settings of a run, with their defaults, or what CONFIG.toml says in their place. "
        "Example: crossdock train debug --training.steps 20",
        "config": "Print what a configuration resolves to, as TOML, without training. "
        "Example: crossdock config debug --training.steps 20 > mine.toml",
    }
)
# Its first line; elsewhere, as in a copy that somebody edits, it is a comment and no more.
_FIRST_LINE = re.compile(rf"# checksum of what follows: ([0-9a-f]{{32}}|{UNCHECKED})\n".encode())
_WRITTEN_BY = "# Written by crossdock "
# What settings of earlier versions are called now.
_RENAMED: Mapping[str, str] = MappingProxyType({"training.max_skipped_steps": "fault_tolerance.max_skipped_steps"})


def load_config(path: Path | None, overrides: Sequence[str] = (), *, command: str = "train") -> Config:
    """The settings of a TOML file (or the defaults), with `--section.key value` overrides; `-` and `_` are alike.

    A bare name such as `debug` is that of a file, or of a configuration that comes with crossdock. Without a file, a
    `job.dump_folder` that holds a run gives that run's settings. A flavor with the suffix `-deepep` sets
    `moe.dispatcher`. Paths that belong to the run become absolute. The page of help is that of `command`.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key or a value of the wrong type.
        SystemExit: with code 0 for `--help`, which prints all settings.
    """
    base = Config() if path is None else read_toml(path)
    if "--help" in overrides or "-h" in overrides:
        import tyro  # The page of help alone needs it, and takes a quarter of a second to load it.

        tyro.cli(
            Config, prog=f"crossdock {command} [CONFIG.toml]", description=_HELP[command], default=base, args=["--help"]
        )
    config = _override(base, overrides)
    folder = absolute(config.job.dump_folder)
    if path is None and folder and os.path.isfile(os.path.join(folder, RUN_CONFIG_FILE)):
        config = _override(read_run_settings(Path(folder)), overrides)
    start = absolute(config.checkpoint.initial_load_path)
    if config.lora.rank and (checkpoint := find_checkpoint(Path(start))) is not None:
        start = str(checkpoint[0] / f"step-{checkpoint[1]:08d}")  # The base stays the same when that run goes on.
    # Weights mean nothing with another tokenizer, or another configuration.
    assets = absolute(config.model.hf_assets_path) or assets_of(start)
    model = replace(config.model, hf_assets_path=assets)
    moe = replace(config.moe, dispatcher="deepep") if model.flavor.endswith(DEEPEP_SUFFIX) else config.moe
    checkpoint = replace(config.checkpoint, initial_load_path=start)
    data = replace(
        config.data,
        source=tuple(_absolute_source(entry) for entry in config.data.source),
        chat_template=absolute(config.data.chat_template),
    )
    validation = replace(config.validation, data=_absolute_source(config.validation.data))
    job = replace(config.job, dump_folder=folder)
    lora = replace(config.lora, adapter_path=absolute(config.lora.adapter_path))
    tuned = config.training.tuned
    training = replace(config.training, tuned=tuned if tuned in ("auto", "off") else absolute(tuned))
    config = replace(config, job=job, model=model, data=data, training=training, moe=moe, lora=lora)
    return replace(config, checkpoint=checkpoint, validation=validation)


def to_toml(config: Config) -> str:
    """The settings as TOML that `load_config` reads; unset ones (`None`) are left out."""
    sections = asdict(config)
    return tomli_w.dumps({name: {k: v for k, v in keys.items() if v is not None} for name, keys in sections.items()})


def absolute(path: str) -> str:
    """A path that stays the same in another working directory; empty stays empty."""
    return os.path.abspath(os.path.expanduser(path)) if path else ""


def assets_of(weights: str) -> str:
    """The folder with tokenizer and configuration of a folder with weights; empty where it has none."""
    if not weights:
        return ""
    checkpoint = find_checkpoint(Path(weights))
    folder = Path(weights) if checkpoint is None else checkpoint[0].parent / ASSETS_FOLDER
    return str(folder) if (folder / "tokenizer.json").is_file() else ""


def _absolute_source(source: str) -> str:
    """A source of data that stays the same in another working directory."""
    return absolute(source) if source and is_path(source) else source


def read_toml(path: Path) -> Config:
    """The settings of a TOML file, or of a preset; what it leaves out has its default. Raises ConfigError."""
    if str(path) in PRESETS and not path.is_file():
        path = PRESETS[str(path)]
    return _parse_toml(path, _read(path, f", or the name of one that comes with crossdock: {', '.join(PRESETS)}"))


def read_run_settings(folder: Path) -> Config:
    """The settings that `write_run_settings` has left in a run folder.

    Raises:
        ConfigError: for a file that cannot be read or is damaged, or was changed by hand: its checksum tells.
    """
    path = folder / RUN_CONFIG_FILE
    data = _read(path)
    found = _FIRST_LINE.match(data)
    if found is None:
        valid = "is damaged, or was written by another version: its first line is not the checksum of the others"
        raise ConfigError("config file", str(path), valid)
    if found[1] not in (UNCHECKED.encode(), checksum(data[found.end() :]).encode()):
        raise ConfigError(
            "config file",
            str(path),
            "is damaged, or was changed by hand: its first line is not the checksum of the others. Settings are "
            f"changed by --section.key value; to have the file taken as it is, write {UNCHECKED} there in place of the "
            "checksum",
        )
    return _parse_toml(path, data)


def write_run_settings(config: Config, folder: Path) -> None:
    """Write config.toml into the run folder, with its checksum and the version that writes it. Raises OSError."""
    path, version = folder / RUN_CONFIG_FILE, importlib.metadata.version("crossdock")
    if path.is_file() and (other := _other_version(path.read_bytes())):
        logger.warning(f"{path}: {other}, which the run goes on with")
    text = f"{_WRITTEN_BY}{version}\n\n{to_toml(config)}".encode()
    beside = folder / f".{RUN_CONFIG_FILE}.partial"
    beside.write_bytes(f"# checksum of what follows: {checksum(text)}\n".encode() + text)
    beside.rename(path)


def _other_version(data: bytes) -> str:
    """Which version has written a run's settings and which this is; empty where it is this, or they do not tell."""
    ours = importlib.metadata.version("crossdock")
    found = re.search(rf"^{_WRITTEN_BY}(\S+)$", data[:1000].decode(errors="replace"), re.MULTILINE)
    return f"crossdock {found[1]} has written it, this is {ours}" if found is not None and found[1] != ours else ""


def _read(path: Path, or_else: str = "") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        valid = f"must be a readable TOML file ({error.strerror}){or_else}"
        raise ConfigError("config file", str(path), valid) from None


def _parse_toml(path: Path, data: bytes) -> Config:
    try:
        return _build(tomllib.loads(data.decode("utf-8")))
    except ConfigError as error:
        where = "; ".join(filter(None, (f"in {path}", _other_version(data))))
        raise ConfigError(error.field, error.value, f"{error.valid} ({where})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError("config file", str(path), f"must be valid TOML ({error})") from None


def _build(document: dict[str, Any]) -> Config:
    settings, sections = setting_types(), get_type_hints(Config)
    values: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for written_section, table in document.items():
        section = written_section.replace("-", "_")
        if section not in sections:
            raise _unknown(section, table)
        if not isinstance(table, dict):
            raise ConfigError(section, table, f"must be a table: [{section}]")
        for written_key, value in table.items():
            key = written_key.replace("-", "_")
            name = f"{section}.{key}"
            if name not in settings:
                raise _unknown(name, value)
            if key in values[section]:
                raise ConfigError(name, value, "is set twice, with - and with _")
            values[section][key] = _typed(name, settings[name], value)
    return Config(**{section: cls(**values[section]) for section, cls in sections.items()})


def _typed(name: str, hint: Any, value: Any) -> Any:
    """The value of a TOML key; a whole number will do for a float, and a single value for a list."""
    if get_origin(hint) is tuple:
        try:
            return tuple(_typed(name, get_args(hint)[0], item) for item in (value if type(value) is list else [value]))
        except ConfigError:
            raise ConfigError(name, value, f"must be {_expected(hint)}") from None
    for option in get_args(hint) if type(None) in get_args(hint) else (hint,):
        if (get_origin(option) is Literal and value in get_args(option)) or type(value) is option:
            return value
        if option is float and type(value) is int:
            return float(value)
    raise ConfigError(name, value, f"must be {_expected(hint)}")


def _override(config: Config, arguments: Sequence[str]) -> Config:
    """`config` with `--section.key value`, `--section.key=value`, `--section.switch`, `--section.no-switch` in turn."""
    settings, rest = setting_types(), list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(
                "argument", argument, "does not belong here: settings are --section.key value, after the config file"
            )
        option, equals, written = argument[2:].partition("=")
        has_value = bool(equals) or (bool(rest) and not rest[0].startswith("--"))
        if has_value and not equals:
            written = rest.pop(0)
        name = option.replace("-", "_")
        switch = name.removeprefix("no_").replace(".no_", ".")
        if settings.get(switch) in (bool, bool | None):
            if has_value:
                shown = switch.replace("_", "-")
                off = shown.replace(".", ".no-")
                raise ConfigError(switch, written, f"is a switch, without a value: --{shown} or --{off}")
            name, value = switch, name == switch
        elif name not in settings:
            raise _unknown(name, written)
        elif not has_value:
            raise ConfigError(name, written, f"has no value; must be {_expected(settings[name])}")
        else:
            value = _parsed(name, settings[name], written)
        section, _, key = name.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


def _parsed(name: str, hint: Any, written: str) -> Any:
    """The value of a setting as the command line has it: `a,b` is a list, the empty string an empty one."""
    if get_origin(hint) is tuple:
        words = [word.strip() for word in written.split(",")] if written else []
        try:
            return tuple(_parsed(name, get_args(hint)[0], word) for word in words)
        except ConfigError as error:
            raise ConfigError(name, error.value, f"must be {_expected(hint)}") from None
    for option in get_args(hint) if type(None) in get_args(hint) else (hint,):
        if option is type(None) and written == "None":
            return None
        if get_origin(option) is Literal and written in get_args(option):
            return written
        if option in (int, float, str):
            try:
                return option(written)
            except ValueError:
                continue
    raise ConfigError(name, written, f"must be {_expected(hint)}")


def _expected(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"{_expected(get_args(hint)[0])}, or several: a list in TOML, with commas on the command line"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(str(choice) or 'nothing (empty)' for choice in get_args(hint))}"
    if get_args(hint):
        return " or ".join(map(_expected, get_args(hint)))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}.get(hint, "None")


def _unknown(name: str, value: object) -> ConfigError:
    """The error for a setting or section that does not exist; its nearest may be of the same key elsewhere."""
    settings, sections = list(setting_types()), list(get_type_hints(Config))
    if name in _RENAMED:
        return ConfigError(name, value, f"is called {_RENAMED[name]} now")
    if name in sections:
        return ConfigError(name, value, f"is a section; a setting is written {name}.key")
    section, _, key = name.rpartition(".")
    same_key = [known for known in settings if known.endswith(f".{key}")]
    siblings = [known for known in settings if known.startswith(f"{section}.")] or [*sections, *settings]
    nearest = difflib.get_close_matches(name, same_key or siblings, n=1, cutoff=0.0 if same_key else 0.6)
    hint = f"did you mean {nearest[0]}?" if nearest else "`crossdock --help` and `crossdock train --help` list all"
    return ConfigError(name, value, f"does not exist; {hint}")
