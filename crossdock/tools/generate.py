"""Text from a model on several ranks, all in step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from crossdock.config import ConfigError
from crossdock.data import ChatTokenizer
from crossdock.models import most_positions

__all__ = ["Sampling", "check_prompt", "generate"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: at most this many, fewer where the model ends the text.
        temperature: 0 takes the likeliest token; else logits are divided by it and one is drawn.
        top_p: drawn from the likeliest tokens that together have this probability.
        seed: of the draws.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def check_prompt(
    hf_config: PreTrainedConfig, tokenizer: Tokenizer, prompt: str, chat: ChatTokenizer | None = None
) -> list[int]:
    """The tokens of a prompt, with `chat` of the question that it is, up to where the answer begins.

    Raises ConfigError for one without any, or one that leaves no room for another.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("--prompt", ascii(prompt[:40]), "must be text in UTF-8") from None
    prompt_ids = tokenizer.encode(prompt).ids if chat is None else chat.prompt(prompt)
    most = most_positions(hf_config) - 1
    if not 1 <= len(prompt_ids) <= most:
        raise ConfigError("--prompt", prompt[:40], f"has {len(prompt_ids)} tokens; the model takes 1 to {most}")
    return prompt_ids


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    write: Callable[[str], None] | None = None,
    *,
    chat: ChatTokenizer | None = None,
) -> list[int]:
    """Continue `prompt`, or answer it; the new tokens, the same on all ranks. Collective.

    The first rank's logits decide for all, so that no rank can leave the loop on its own.

    Args:
        model: from `open_model`.
        tokenizer: its own.
        prompt: see `check_prompt`.
        sampling: how tokens are chosen.
        write: is handed the text piece by piece as it comes.
        chat: takes the prompt as a user's question; the end of its tokenizer's texts ends the answer, too.

    Raises:
        ConfigError: see `check_prompt`.
    """
    prompt_ids = check_prompt(model.config, tokenizer, prompt, chat)
    room = most_positions(model.config) - len(prompt_ids)
    input_ids = torch.tensor([prompt_ids], device=model.device)
    draws: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        draws = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    if chat is not None and chat.end_of_text_id is not None:
        draws["eos_token_id"] = _with(model.generation_config, chat.end_of_text_id)
    torch.manual_seed(sampling.seed)
    output = model.generate(  # type: ignore[operator] (transformers adds it to the class at run time)
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=min(sampling.max_new_tokens, room),
        pad_token_id=0,  # Never used: there is one sequence.
        logits_processor=LogitsProcessorList([_FirstRanksLogits()]),
        streamer=None if write is None else _Streamer(tokenizer, write),
        **draws,
    )
    return output[0, len(prompt_ids) :].tolist()


def _with(config: GenerationConfig | None, end_of_text_id: int) -> list[int]:
    """The tokens that end a text, with another one."""
    known = [] if config is None or config.eos_token_id is None else config.eos_token_id
    return sorted({*(known if isinstance(known, list) else [known]), end_of_text_id})


class _FirstRanksLogits(LogitsProcessor):
    """All ranks take the first rank's logits, which differ in the last bits from theirs."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if dist.is_initialized():
            scores = scores.contiguous()
            dist.broadcast(scores, src=0)
        return scores


class _Streamer(BaseStreamer):
    """Hands on the text of each token as soon as it makes whole characters."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._stream = DecodeStream(skip_special_tokens=True)
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:  # transformers hands over the prompt first.
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            piece = self._stream.step(self._tokenizer, token)
            if piece:
                self._write(piece)

    def end(self) -> None:
        pass
