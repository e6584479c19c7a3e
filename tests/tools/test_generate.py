"""Text from a model on one rank or many: the tokens of transformers, the same on all ranks and layouts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from crossdock.config import ConfigError
from crossdock.models import FAMILIES, export_hf
from crossdock.tools.generate import Sampling, check_prompt, generate
from crossdock.tools.opening import find_model, open_model
from tests.checkpoint.hf_folders import read_tensors
from tests.models.oracle import qwen3_logits
from tests.ranks import RankPool
from tests.tiny import run_trainer, write_assets, write_hf_model

PROMPTS = ["The state of the Union", "Ü", "a b c"]
GREEDY = [(prompt, {"max_new_tokens": 24}) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def folder(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, with checkpoints of steps 5 and 10; `biased`, whose experts are chosen by a strong bias."""
    folder = tmp_path_factory.mktemp("generate")
    write_assets(folder / "assets", initializer_range=0.4, num_experts=9)
    for name, *options in (("run", "--checkpoint.interval=5"), ("biased", "--moe.expert-bias-rate=0.1")):
        settings = ["--training.steps", "10", "--training.local-batch-size", "4", *options]
        settings += ["--moe.expert-bias"] if name == "biased" else []
        ranks.run(2, run_trainer, str(folder / "assets"), str(folder / name), str(folder / "cache"), settings)
    return folder


def continue_texts(model_path: str, requests: list[tuple[str, dict[str, Any]]]) -> list[tuple[list[int], list[str]]]:
    """The new tokens of each request, and the pieces that were streamed, on this rank."""
    source = find_model(Path(model_path))
    model, tokenizer = open_model(source, torch.device("cpu")), source.tokenizer()
    results = []
    for prompt, sampling in requests:
        pieces: list[str] = []
        tokens = generate(model, tokenizer, prompt, Sampling(**sampling), pieces.append)
        results.append((tokens, pieces))
    return results


def _tokens(ranks: RankPool, world_size: int, model: Path, requests: list[Any]) -> list[list[int]]:
    """The new tokens of each request; the same on all ranks."""
    first, *others = ranks.run(world_size, continue_texts, str(model), requests)
    assert all(other == first for other in others)
    return [tokens for tokens, _ in first]


def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "assets" / "tokenizer.json"))


def _transformers_tokens(hf_folder: Path) -> list[list[int]]:
    """What transformers' own loop gives for `GREEDY`, and a check that no choice was close."""
    # Its grouped_mm takes no odd sizes.
    model: Any = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32, experts_implementation="eager")
    tokenizer = Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    results = []
    for prompt, options in GREEDY:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        top = torch.cat(output.logits).topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 1e-4, "too close to call"
        results.append(output.sequences[0, ids.shape[1] :].tolist())
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_greedy_tokens_are_those_of_transformers_from_the_exported_folder(
    ranks: RankPool, folder: Path, world_size: int
) -> None:
    expected = _transformers_tokens(folder / "run" / "hf")
    assert len({token for tokens in expected for token in tokens}) > 5, "a model that says nothing tests nothing"
    assert _tokens(ranks, world_size, folder / "run", GREEDY) == expected
    assert _tokens(ranks, world_size, folder / "run" / "hf", GREEDY) == expected


def export_checkpoint(model_path: str, destination: str) -> None:
    source = find_model(Path(model_path))
    model = open_model(source, torch.device("cpu"))
    export_hf(model, FAMILIES["qwen3"].hf_keys, source.assets, Path(destination))


def test_a_checkpoint_of_a_given_step_is_a_model(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    fifth = folder / "run" / "checkpoint" / "step-00000005"
    tokens = _tokens(ranks, 2, fifth, GREEDY)
    assert tokens != _tokens(ranks, 2, folder / "run", GREEDY)
    ranks.run(2, export_checkpoint, str(fifth), str(tmp_path / "hf"))
    assert tokens == _transformers_tokens(tmp_path / "hf")
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "step-00000010")
    assert tokens == _tokens(ranks, 1, tmp_path / "run", GREEDY)


def test_draws_depend_on_the_seed_and_not_on_the_ranks(ranks: RankPool, folder: Path) -> None:
    warm = {"max_new_tokens": 24, "temperature": 0.9, "top_p": 0.8}
    requests = [(PROMPTS[0], warm | {"seed": seed}) for seed in (0, 1, 0)]
    requests.append((PROMPTS[0], warm | {"top_p": 1e-6}))
    zero, one, again, narrow = _tokens(ranks, 1, folder / "run", requests)
    assert zero == again
    assert zero != one
    assert narrow == _transformers_tokens(folder / "run" / "hf")[0], "the likeliest alone"
    for world_size in (2, 4):
        assert _tokens(ranks, world_size, folder / "run", requests) == [zero, one, again, narrow]


def continue_with_noise(model_path: str) -> list[list[int]]:
    """Draw tokens where the logits of this rank are of its own."""
    source = find_model(Path(model_path))
    model, tokenizer = open_model(source, torch.device("cpu")), source.tokenizer()
    noise = torch.Generator().manual_seed(dist.get_rank())

    def add_noise(module: Any, args: Any, output: Any) -> Any:
        output.logits += torch.randn(output.logits.shape, generator=noise)
        return output

    model.register_forward_hook(add_noise)
    return [generate(model, tokenizer, "The", Sampling(20, temperature=t, seed=3)) for t in (0.0, 1.0)]


def test_ranks_whose_logits_differ_keep_in_step(ranks: RankPool, folder: Path) -> None:
    first, second = ranks.run(2, continue_with_noise, str(folder / "run"))
    assert first == second


def test_draws_come_from_the_nucleus_in_proportion(ranks: RankPool, folder: Path) -> None:
    prompt, top_p, temperature, draws = "The", 0.6, 1.4, 300
    sampling = {"max_new_tokens": 1, "temperature": temperature, "top_p": top_p}
    requests = [(prompt, sampling | {"seed": seed}) for seed in range(draws)]
    drawn = torch.tensor([tokens[0] for tokens in _tokens(ranks, 1, folder / "run", requests)])
    config = Qwen3MoeConfig.from_pretrained(folder / "run" / "hf")
    ids = torch.tensor([_tokenizer(folder).encode(prompt).ids])
    logits = qwen3_logits(read_tensors(folder / "run" / "hf"), config, ids)
    sorted_probabilities, order = (logits[0, -1] / temperature).softmax(-1).sort(descending=True)
    kept = int((sorted_probabilities.cumsum(-1) < top_p).sum()) + 1
    expected = sorted_probabilities[:kept] / sorted_probabilities[:kept].sum()
    counts = torch.bincount(drawn, minlength=config.vocab_size)[order]
    assert counts[kept:].sum() == 0
    assert 3 <= kept < 100
    # Five standard deviations of a count, and some more for the smallest.
    assert ((counts[:kept] - draws * expected).abs() < 5 * (draws * expected).sqrt() + 2).all()


def _write_chain(folder: Path, text: str) -> Path:
    """A model that writes `text`, byte by byte, then the end of the text, then itself over and over."""
    write_hf_model(folder, num_hidden_layers=1, eos_token_id=0, max_position_embeddings=48)
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    tokens.append(0)
    assert len(set(tokens)) == len(tokens) <= 32, "each token must tell the next"
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) or "embed_tokens" in name or "lm_head" in name:
            tensor.zero_()
    for place, (token, following) in enumerate(pairwise([*tokens, tokens[0]])):
        tensors["model.embed_tokens.weight"][token, place] = 1
        tensors["lm_head.weight"][following, place] = 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_whole_characters_are_streamed_up_to_the_end_of_the_text(ranks: RankPool, tmp_path: Path) -> None:
    _write_chain(tmp_path / "chain", "Aé☕𝄞!")
    requests = [("A", {"max_new_tokens": limit}) for limit in (100, 4, 10, 11)]
    for world_size in (1, 2):
        for result in ranks.run(world_size, continue_texts, str(tmp_path / "chain"), requests):
            (all_tokens, pieces), (few_tokens, few), (_, up_to_end), (_, with_end) = result
            assert pieces == ["é", "☕", "𝄞", "!"]
            assert len(all_tokens) == 11
            assert all_tokens[-1] == 0
            assert few_tokens == all_tokens[:4]
            assert few == ["é"], "two bytes of three are no character"
            assert up_to_end == with_end == pieces


def test_generation_config_says_what_ends_a_text(ranks: RankPool, tmp_path: Path) -> None:
    chain = _write_chain(tmp_path / "chain", "Aé☕𝄞!")
    end = Tokenizer.from_file(str(chain / "tokenizer.json")).encode("!").ids[0]
    for eos in (end, [500, end]):
        (chain / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        ((tokens, pieces),) = ranks.run(1, continue_texts, str(chain), [("A", {"max_new_tokens": 30})])[0]
        assert tokens[-1] == end
        assert len(tokens) == 10
        assert pieces == ["é", "☕", "𝄞", "!"]


def test_streamed_pieces_join_to_the_decoded_text(ranks: RankPool, folder: Path) -> None:
    requests = [(PROMPTS[1], {"max_new_tokens": 60, "temperature": 1.5, "seed": seed}) for seed in range(6)]
    tokenizer = _tokenizer(folder)
    for tokens, pieces in ranks.run(1, continue_texts, str(folder / "run"), requests)[0]:
        decoded = tokenizer.decode(tokens)
        assert len(pieces) > 5
        assert all(pieces)
        assert decoded.startswith("".join(pieces))
        assert set(decoded.removeprefix("".join(pieces))) <= {"\ufffd"}, "more than an unfinished character is lacking"


def test_a_prompt_must_leave_room(ranks: RankPool, tmp_path: Path) -> None:
    _write_chain(tmp_path / "chain", "Aé☕𝄞!")
    source = find_model(tmp_path / "chain")
    for prompt, tokens in (("", 0), ("x" * 48, 48), ("é" * 24, 48)):
        with pytest.raises(ConfigError, match=f"has {tokens} tokens; the model takes 1 to 47"):
            check_prompt(source.hf_config, source.tokenizer(), prompt)
    ((tokens, pieces),) = ranks.run(1, continue_texts, str(tmp_path / "chain"), [("x" * 46 + "A", {})])[0]
    assert len(tokens) == 1, "there is one position left"
    assert pieces == []


def test_an_expert_bias_is_the_checkpoints(ranks: RankPool, folder: Path) -> None:
    biases: dict[str, torch.Tensor] = {}
    for path in (folder / "biased" / "checkpoint" / "step-00000010").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            biases |= {name: file.get_tensor(name) for name in file.keys() if "expert_bias" in name}  # noqa: SIM118
    assert len(biases) == 2
    ordered = [biases[name] for name in sorted(biases)]
    assert min(bias.abs().max() for bias in ordered) > 0.1
    tensors = read_tensors(folder / "biased" / "hf")
    config = Qwen3MoeConfig.from_pretrained(folder / "biased" / "hf")
    tokens = _tokens(ranks, 1, folder / "biased", GREEDY)
    assert tokens == _tokens(ranks, 2, folder / "biased", GREEDY)
    for (prompt, _), new in zip(GREEDY, tokens, strict=True):
        ids = torch.tensor([_tokenizer(folder).encode(prompt).ids + new])
        chosen = qwen3_logits(tensors, config, ids, ordered).argmax(-1)[0]
        assert new == chosen[-len(new) - 1 : -1].tolist()
    assert tokens != _transformers_tokens(folder / "biased" / "hf"), "the bias changes nothing"


def test_float64_runs_and_odd_sizes_are_models_too(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    settings = ["--training.steps", "2", "--training.dtype", "float64"]
    run = tmp_path / "run"
    ranks.run(1, run_trainer, str(folder / "assets"), str(run), str(folder / "cache"), settings)
    assert json.loads((run / "hf" / "config.json").read_text())["dtype"] == "float64"
    assert _tokens(ranks, 2, run, GREEDY) == _transformers_tokens(run / "hf")
    odd = write_hf_model(tmp_path / "odd", hidden_size=30, moe_intermediate_size=18, initializer_range=0.4)
    assert _tokens(ranks, 2, odd, GREEDY) == _transformers_tokens(odd)


def _crossdock(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "crossdock", *arguments, "--nproc", "2"],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"COLUMNS": "200"}, **options,
    )  # fmt: skip


def test_the_command_line_writes_prompt_and_text(ranks: RankPool, folder: Path) -> None:
    prompt = "--The state\n"  # From standard input, where it may be anything.
    ended = _crossdock("generate", str(folder / "run"), "--max-new-tokens", "5", input=prompt)
    assert ended.returncode == 0, ended.stderr
    ((_, pieces),) = ranks.run(2, continue_texts, str(folder / "run"), [(prompt, {"max_new_tokens": 5})])[0]
    assert ended.stdout == prompt + "".join(pieces) + "\n"
    assert ended.stderr == ""


@pytest.mark.slow
def test_the_command_line_exports(folder: Path, tmp_path: Path) -> None:
    ended = _crossdock("export", str(folder / "run"), "hf", "--dtype", "bfloat16", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"written: {tmp_path / 'hf'}\n"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    whole = AutoModelForCausalLM.from_pretrained(folder / "run" / "hf", dtype=torch.float32)
    assert exported.dtype == torch.bfloat16
    for name, parameter in whole.named_parameters():
        assert torch.equal(exported.get_parameter(name), parameter.bfloat16()), name
