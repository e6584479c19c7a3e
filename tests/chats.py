"""Chat templates, conversations, and a tiny tokenizer that has a template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tests.tiny import write_assets, write_hf_model

__all__ = [
    "CHATML",
    "PLAIN",
    "QWEN3",
    "TAGGED",
    "turns",
    "write_chat_assets",
    "write_chat_model",
    "write_conversations",
]

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content | default('')) }}
    {%- for call in message.tool_calls | default([]) %}
        {{- '\\n<tool_call>' + call.function | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The same with tags around what the assistant writes.
TAGGED = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content | default('') }}
            {%- for call in message.tool_calls | default([]) %}
                {{- '\\n<tool_call>' + call.function | tojson + '</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# What Qwen3's does with thoughts: those before the last question are left out, an answer to it has some, if empty ones.
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- set thoughts = message.reasoning_content | default('') %}
        {%- if '</think>' in message.content %}
            {%- set thoughts = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Without a special token.
PLAIN = """\
{%- for message in messages %}
    {{- ('Question: ' if message.role == 'user' else 'Answer: ') + message.content + '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Answer: ' }}{%- endif %}"""


def turns(*contents: str) -> list[dict[str, Any]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


def write_conversations(path: Path, conversations: Sequence[list[dict[str, Any]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


def _add_template(folder: Path, template: str) -> Path:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def write_chat_assets(folder: Path, template: str = CHATML, **overrides: Any) -> Path:
    """`tests.tiny.write_assets` with a chat template; its tokens are bytes, special ones and `<think>`."""
    return _add_template(write_assets(folder, vocab_size=264, **overrides), template)


def write_chat_model(folder: Path, template: str = CHATML, **overrides: Any) -> Path:
    """The same with weights."""
    return _add_template(write_hf_model(folder, vocab_size=264, **overrides), template)
