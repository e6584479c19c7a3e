"""Commands on a model that there is: generate, eval, export."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdock.cli.common import Parser, check_gpus, fail, is_rank, machines_of, parse_bytes

if TYPE_CHECKING:
    import torch

    from crossdock.data import DataConfig
    from crossdock.tools.opening import ModelSource

__all__ = ["evaluate_command", "export_command", "generate_command"]

_DTYPES = ("float32", "bfloat16")


def generate_command(arguments: list[str], options: argparse.Namespace) -> int:
    """`crossdock generate MODEL --prompt TEXT`."""
    parser = _parser(
        "generate",
        "Continue a text. The experts are spread over the ranks, which all keep in step.",
        (
            'crossdock generate runs/debug/20261121-101622 --prompt "Fellow citizens" --temperature 0.8 --top-p 0.9',
            'crossdock generate Qwen3-30B-A3B --nproc 8 --chat --prompt "What is a cross-dock?"',
        ),
    )
    parser.add_argument(
        "--prompt", action="append", help="the text; several are continued in turn; else standard input"
    )
    parser.add_argument("--prompt-file", type=Path, help="a file with the text, in UTF-8")
    parser.add_argument("--chat", action="store_true", help="the text is a question; the answer is printed alone")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="at most this many (100)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest that have this probability (1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parsed = parser.parse_args(arguments)
    _check(
        parser,
        ("--max-new-tokens", parsed.max_new_tokens > 0, "1 or more"),
        ("--temperature", 0 <= parsed.temperature < float("inf"), "0 or more"),
        ("--top-p", 0 < parsed.top_p <= 1, "above 0 and at most 1"),
        ("--seed", 0 <= parsed.seed < 2**63, "0 to 2^63 - 1"),
    )
    with tempfile.TemporaryDirectory() as folder:
        if not parsed.prompt and not parsed.prompt_file:
            # The ranks share no standard input, and an argument holds no more than some 100 KB.
            parsed.prompt_file = Path(folder, "prompt.txt")
            parsed.prompt_file.write_bytes(sys.stdin.buffer.read())
            arguments = [*arguments, f"--prompt-file={parsed.prompt_file}"]
        return _generate(arguments, options, parsed)


def _generate(arguments: list[str], options: argparse.Namespace, parsed: argparse.Namespace) -> int:
    prompts = list(parsed.prompt or [])
    if parsed.prompt_file:
        prompts.append(_read_text(parsed.prompt_file))

    def generate(source: ModelSource, device: torch.device, rank: int) -> None:
        from crossdock.tools.generate import Sampling, generate
        from crossdock.tools.opening import open_model

        sampling = Sampling(parsed.max_new_tokens, parsed.temperature, parsed.top_p, parsed.seed)
        model, tokenizer = open_model(source, device, compute_dtype=_compute_dtype(parsed.dtype)), source.tokenizer()
        chat = source.chat_tokenizer() if parsed.chat else None
        for prompt in prompts:
            if rank == 0 and chat is None:
                _write(prompt)
            generate(model, tokenizer, prompt, sampling, _write if rank == 0 else None, chat=chat)
            if rank == 0:
                _write("\n")

    def check(source: ModelSource) -> None:
        from crossdock.tools.generate import check_prompt

        chat = source.chat_tokenizer() if parsed.chat else None
        for prompt in prompts:
            check_prompt(source.hf_config, source.tokenizer(), prompt, chat)

    return _on_ranks("generate", arguments, options, parsed, check, generate)


def evaluate_command(arguments: list[str], options: argparse.Namespace) -> int:
    """`crossdock eval MODEL --data FILE`."""
    parser = _parser(
        "eval",
        "Loss and perplexity on a text. The text is split among the ranks.",
        ("crossdock eval runs/debug/20261121-101622 --data speech.txt --max-samples 100",),
    )
    parser.add_argument("--data", required=True, help="a source, as in data.source: a file, a folder, datasets:NAME")
    parser.add_argument("--format", choices=("text", "chat"), help="what the source holds (what the run has read)")
    parser.add_argument("--text-field", default="text", help="field or column that holds a document (text)")
    parser.add_argument("--messages-field", default="messages", help="that holds the messages (messages)")
    parser.add_argument(
        "--train-on", choices=("assistant", "last", "all"), help="tokens of a conversation that count (the run's)"
    )
    parser.add_argument("--chat-template", default="", help="a file with a template, in the place of MODEL's")
    parser.add_argument("--seq-len", type=int, help="tokens of a sequence (the run's, else 1024 at most)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per rank at once (4)")
    parser.add_argument("--max-samples", type=int, help="look at no more than this many sequences, evenly spread")
    parser.add_argument("--cache-folder", default="~/.cache/crossdock", help="keeps tokenised data")
    parsed = parser.parse_args(arguments)
    _check(
        parser,
        ("--seq-len", parsed.seq_len is None or parsed.seq_len > 0, "1 or more"),
        ("--batch-size", parsed.batch_size > 0, "1 or more"),
        ("--max-samples", parsed.max_samples is None or parsed.max_samples > 0, "1 or more"),
    )

    def check(source: ModelSource) -> None:
        from crossdock.config import ConfigError
        from crossdock.data import check_chat_template, check_source, read_chat_template
        from crossdock.models import most_positions

        source.tokenizer()
        check_source(parsed.data)
        chat = _data_of(parsed, source).format == "chat"
        for name, given in {"--train-on": parsed.train_on, "--chat-template": parsed.chat_template}.items():
            if given and not chat:
                raise ConfigError(name, given, "needs --format chat")
        if read_chat_template(parsed.chat_template) is None and chat:
            check_chat_template(source.assets)
        most = most_positions(source.hf_config)
        if (parsed.seq_len or 1) > most:
            raise ConfigError("--seq-len", parsed.seq_len, f"at most the model's {most} positions")

    def evaluate(source: ModelSource, device: torch.device, rank: int) -> None:
        import torch.distributed as dist

        from crossdock.data import TooLong, evaluation_batches, prepare_tokens
        from crossdock.tools.evaluate import evaluate
        from crossdock.tools.opening import open_model
        from crossdock.train.together import patient_group, together

        data, seq_len = _data_of(parsed, source), parsed.seq_len or source.seq_len
        tokens = together(lambda: prepare_tokens(data, source.assets), patient_group())
        if (too_long := TooLong.of(tokens.train, seq_len)).conversations and rank == 0:
            _write(f"{too_long}\n")
        model = open_model(source, device, compute_dtype=_compute_dtype(parsed.dtype))
        batches = evaluation_batches(
            tokens.train,
            seq_len=seq_len,
            local_batch_size=parsed.batch_size,
            dp_rank=rank,
            dp_degree=dist.get_world_size(),
            packing=data.row_packing,
            attend_within_documents=data.within_documents,
            max_samples=parsed.max_samples,
        )
        result = evaluate(model, batches, device)
        if rank == 0:
            _write(
                f"loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  tokens {result.targets:,}  "
                f"max/mean load {result.max_mean_load:.2f}\n"
            )

    return _on_ranks("eval", arguments, options, parsed, check, evaluate)


def _data_of(parsed: argparse.Namespace, source: ModelSource) -> DataConfig:
    """What `eval` reads, and how: as the model's run did, but for what is asked for."""
    data = source.data
    if parsed.format not in (None, data.format):  # Rows are packed as is usual for it.
        data = replace(data, format=parsed.format, packing=None, attend_within_documents=None)
    return replace(
        data,
        source=(parsed.data,),
        weights=(),
        held_out=0.0,
        text_field=parsed.text_field,
        messages_field=parsed.messages_field,
        train_on=parsed.train_on or data.train_on,
        chat_template=parsed.chat_template,
        cache_folder=parsed.cache_folder,
    )


def export_command(arguments: list[str], options: argparse.Namespace) -> int:
    """`crossdock export RUN DESTINATION`."""
    about = "Write a folder that transformers' from_pretrained loads; of a LoRA run, one that PEFT's loads."
    examples = (
        "crossdock export runs/debug/20261121-101622 exported --dtype bfloat16",
        "crossdock export runs/lora merged --merge",
    )
    parser = _parser("export", about, examples, has_dtype=False)
    parser.add_argument("destination", help="a folder that does not exist yet")
    choices = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="", choices=choices, help="of the weights; else as they were loaded")
    parser.add_argument(
        "--max-shard-size", type=parse_bytes, default=parse_bytes("5GB"), help="of a file, such as 500MB or 2GiB (5GB)"
    )
    parser.add_argument("--merge", action="store_true", help="of a LoRA run: the whole model, adapters added")
    parsed = parser.parse_args(arguments)
    destination = Path(parsed.destination).absolute()

    def check(source: ModelSource) -> None:
        from crossdock.tools.export import check_export

        check_export(source, destination, merge=parsed.merge)

    def export(source: ModelSource, device: torch.device, rank: int) -> None:
        from crossdock.tools.export import export

        left_out = export(source, destination, device, parsed.dtype, parsed.max_shard_size, merge=parsed.merge)
        if rank == 0:
            _write(f"written: {destination}{left_out}\n")

    return _on_ranks("export", arguments, options, parsed, check, export)


def _read_text(path: Path) -> str:
    from crossdock.config import ConfigError

    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError("--prompt-file", str(path), f"must be a readable file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError("--prompt-file", str(path), f"must be text in UTF-8 ({error})") from None


def _parser(command: str, description: str, examples: Sequence[str], *, has_dtype: bool = True) -> Parser:
    parser = Parser(prog=f"crossdock {command}", description=description, examples=examples, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, or folder in Hugging Face's format")
    if has_dtype:
        parser.add_argument("--dtype", default=_DTYPES[0], choices=_DTYPES, help=f"of the computation ({_DTYPES[0]})")
        parser.add_argument("--family", default="", help="as model.name; else that of its model_type")
    else:
        parser.set_defaults(family="")
    return parser


def _check(parser: Parser, *rules: tuple[str, bool, str]) -> None:
    for name, holds, valid in rules:
        if not holds:
            parser.error(f"argument {name} must be {valid}")


def _on_ranks(
    command: str,
    arguments: list[str],
    options: argparse.Namespace,
    parsed: argparse.Namespace,
    check: Callable[[ModelSource], None],
    action: Callable[[ModelSource, Any, int], None],
) -> int:
    """Check everything, then run `action(source, device, rank)` on all ranks."""
    from crossdock.checkpoint import CheckpointError
    from crossdock.data import DataError
    from crossdock.tools.opening import check_ranks, find_model
    from crossdock.train.launch import run_rank, start_ranks
    from crossdock.train.together import TrainingStopped

    source = find_model(Path(parsed.model).absolute(), parsed.family)

    def act(device: torch.device) -> int:
        action(source, device, int(os.environ["RANK"]))
        return 0

    try:
        if is_rank():
            return run_rank(act, os.environ)
        machines = machines_of(options)
        check_gpus(machines)
        check_ranks(source, machines.world_size)
        check(source)
        return start_ranks([command, *arguments], machines)
    except DataError as error:
        fail(str(error))
    except (CheckpointError, TrainingStopped) as error:
        fail(str(error), exit_code=1)


def _compute_dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "float32" else getattr(torch, name)


def _write(text: str) -> None:
    from crossdock.train.metrics import say

    say(text, end="")
