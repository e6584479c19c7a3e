"""Documents of a row, through transformers' attention: each as if it were alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from crossdock.data import Batch, TokenBatches, TokenFile, evaluation_batches
from crossdock.data.config import Packing

SEQ_LEN = 24
LENGTHS = [9, 1, 5, 14, 60, 3, 2, 1, 1, 8, 11]


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    ids = np.random.default_rng(0).integers(1, 97, sum(LENGTHS))
    (tmp_path / "tokens.bin").write_bytes(ids.astype("uint16").tobytes())
    (tmp_path / "documents.bin").write_bytes(np.cumsum([0, *LENGTHS]).astype(np.int64).tobytes())
    return TokenFile(tmp_path / "tokens.bin", "random", "uint16", sum(LENGTHS), len(LENGTHS), 97, None)


def model(attention: str) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,  # So that attention is far from even.
        "attn_implementation": attention,
    }
    config = Qwen3MoeConfig(**settings)
    return Qwen3MoeForCausalLM(config).eval()


def logits(model: Qwen3MoeForCausalLM, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


def stretches(position_ids: torch.Tensor) -> list[tuple[int, int]]:
    """Where each document of a row begins and ends."""
    begins = torch.nonzero(position_ids == 0).flatten().tolist()
    return list(zip(begins, [*begins[1:], len(position_ids)], strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_a_document_of_a_row_is_computed_as_if_it_were_alone(
    tokens: TokenFile, attention: str, packing: Packing
) -> None:
    network = model(attention)
    sampler = TokenBatches(
        [tokens],
        seq_len=SEQ_LEN,
        global_batch_size=4,
        local_batch_size=4,
        dp_rank=0,
        dp_degree=1,
        seed=0,
        packing=packing,
        attend_within_documents=True,
    )
    compared = 0
    for batch in [*sampler.at(0), *evaluation(tokens, packing)]:
        assert batch.position_ids is not None
        packed = logits(network, batch.input_ids, batch.position_ids)
        assert packed.isfinite().all()  # Padding included.
        for row in range(len(packed)):
            for start, end in stretches(batch.position_ids[row]):
                if batch.padding_mask is not None and batch.padding_mask[row, start]:
                    continue
                alone = logits(network, batch.input_ids[row, start:end][None], None)
                torch.testing.assert_close(packed[row, start:end], alone[0], rtol=1e-5, atol=1e-5)
                compared += start > 0
    assert compared > 5
    # And it makes a difference: without the positions a row is one document.
    (batch,) = sampler.at(0)
    assert not torch.allclose(
        logits(network, batch.input_ids, batch.position_ids), logits(network, batch.input_ids, None), atol=1e-2
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_nothing_before_it(tokens: TokenFile, attention: str) -> None:
    """Without positions too: it is at the ends of rows, where causal attention does not look."""
    network = model(attention)
    for batch in evaluation(tokens, "documents", within=False):
        assert batch.padding_mask is not None
        padded = logits(network, batch.input_ids, None)
        for row, real in enumerate((~batch.padding_mask).sum(dim=1).tolist()):
            if real:
                alone = logits(network, batch.input_ids[row, :real][None], None)
                torch.testing.assert_close(padded[row, :real], alone[0], rtol=1e-5, atol=1e-5)


def evaluation(tokens: TokenFile, packing: Packing, *, within: bool = True) -> list[Batch]:
    return list(
        evaluation_batches(
            [tokens],
            seq_len=SEQ_LEN,
            local_batch_size=5,
            dp_rank=0,
            dp_degree=1,
            packing=packing,
            attend_within_documents=within,
        )
    )
