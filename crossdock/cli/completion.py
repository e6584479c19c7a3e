"""`crossdock completion SHELL`: a script that completes commands, options, settings and their values."""

from __future__ import annotations

import argparse
import io
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

from crossdock.cli.common import MACHINE_OPTIONS, Parser

__all__ = ["completion_command"]

_Commands = Mapping[str, Callable[[list[str], argparse.Namespace], int]]

# Which commands take settings, after the name of a preset or a file, and which ranks; elsewhere a first word that is no
# option is a file or folder.
_WITH_SETTINGS = ("train", "config", "tune", "plan")
_WITH_RANKS = ("train", "config", "tune", "generate", "eval", "export", "convert", "bench", "doctor")
_OTHERS = ("--help", "--version")

_BASH = """\
# completion of crossdock, by `crossdock completion`; to source from ~/.bashrc
_crossdock() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=''
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W {commands} -- "$word"))
        return
    fi
    if [[ $word == = ]]; then # the shell takes --option=value for three words
        word=''
    elif [[ $before == = ]]; then
        before=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    case $before in
{values}
    esac
    if [[ -z $words && $word == -* ]]; then
        case ${{COMP_WORDS[1]}} in
{options}
        esac
    elif [[ -z $words && $COMP_CWORD == 2 ]]; then
        case ${{COMP_WORDS[1]}} in
        {with_settings}) COMPREPLY=($(compgen -W {presets} -- "$word")) ;;
        esac
        COMPREPLY+=($(compgen -f -- "$word"))
        return
    fi
    if [[ -n $words ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _crossdock crossdock
"""


def completion_command(arguments: list[str], commands: _Commands) -> int:
    """`crossdock completion bash | zsh | fish`: prints the script."""
    parser = Parser(
        prog="crossdock completion",
        description="Print a script that completes crossdock's commands, options and settings.",
        examples=(
            'eval "$(crossdock completion bash)"    # in this shell; making the script takes some seconds',
            "crossdock completion bash > ~/.crossdock-completion    # once, to source from ~/.bashrc",
            "crossdock completion zsh > ~/.crossdock-completion     # once, to source from ~/.zshrc after compinit",
            "crossdock completion fish > ~/.config/fish/completions/crossdock.fish",
        ),
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(arguments).shell
    options = {name: _options(name, command) for name, command in commands.items()}
    values = _values()
    print(_fish(options, values) if shell == "fish" else _bash(options, values, zsh=shell == "zsh"), end="")
    return 0


def _options(name: str, command: Callable[[list[str], argparse.Namespace], int]) -> list[str]:
    """What a command takes, by its own help; settings by their classes, since their help is a page."""
    found: set[str] = set(MACHINE_OPTIONS if name in _WITH_RANKS else ())
    if name in _WITH_SETTINGS:
        found |= {option for option, _ in _settings()}
    if name == "train":
        found.add("--profile")
    if name not in ("train", "config"):
        shown = io.StringIO()
        with redirect_stdout(shown), suppress(SystemExit):
            command(["--help"], argparse.Namespace())
        shown_options, _, _ = shown.getvalue().partition("\nexamples\n")
        # Words of prose are not options: those stand in the usage or begin a line.
        found |= set(re.findall(r"(?<![\w\"'`-])(--[a-z][a-z0-9-]*)(?=[\s,\]])", shown_options))
    return sorted(found | {"--help"})


def _settings() -> list[tuple[str, tuple[str, ...]]]:
    """Every setting's option, with the values that it is restricted to."""
    from crossdock.config import Config

    found: list[tuple[str, tuple[str, ...]]] = []
    for section, section_type in get_type_hints(Config).items():
        hints = get_type_hints(section_type)
        for field in fields(section_type):
            name = field.name.replace("_", "-")
            prefix = section.replace("_", "-")
            hint = hints[field.name]
            found.append((f"--{prefix}.{name}", get_args(hint) if get_origin(hint) is Literal else ()))
            if hint is bool:
                found.append((f"--{prefix}.no-{name}", ()))
    return found


def _values() -> dict[str, tuple[str, ...]]:
    """By option, what may follow it."""
    from crossdock.tools.plan import read_devices

    restricted = {option: tuple(map(str, values)) for option, values in _settings() if values}
    return {**restricted, "--gpu": tuple(read_devices())}


def _presets() -> list[str]:
    from crossdock.config import PRESETS

    return list(PRESETS)


def _bash(options: Mapping[str, list[str]], values: Mapping[str, tuple[str, ...]], *, zsh: bool) -> str:
    script = _BASH.format(
        commands=shlex.quote(" ".join((*options, *_OTHERS))),
        with_settings="|".join(_WITH_SETTINGS),
        presets=shlex.quote(" ".join(_presets())),
        values="\n".join(f"    {name}) words={shlex.quote(' '.join(each))} ;;" for name, each in values.items()),
        options="\n".join(f"        {name}) words={shlex.quote(' '.join(each))} ;;" for name, each in options.items()),
    )
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if zsh else script


def _fish(options: Mapping[str, list[str]], values: Mapping[str, tuple[str, ...]]) -> str:
    lines = [
        "# fish completion of crossdock",
        f"complete -c crossdock -n __fish_use_subcommand -f -a {shlex.quote(' '.join((*options, *_OTHERS)))}",
    ]
    for command, names in options.items():
        condition = shlex.quote(f"__fish_seen_subcommand_from {command}")
        if command in _WITH_SETTINGS:
            lines.append(f"complete -c crossdock -n {condition} -a {shlex.quote(' '.join(_presets()))}")
        for name in names:
            of_values = f" -x -a {shlex.quote(' '.join(values[name]))}" if name in values else ""
            lines.append(f"complete -c crossdock -n {condition} -l {name.removeprefix('--')}{of_values}")
    return "\n".join(lines) + "\n"
