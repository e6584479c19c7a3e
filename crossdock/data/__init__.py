"""Data: documents from sources, token files on disk, and the batches that each rank sees at each step."""

from crossdock.data.batches import MIXTURE_BLOCK, TokenBatches, evaluation_batches, mixture_quotas
from crossdock.data.chat import ChatTokenizer, check_chat_template, read_chat_template
from crossdock.data.config import DataConfig, DataError, Packing, TrainOn
from crossdock.data.packing import IGNORED_LABEL, Batch, TooLong
from crossdock.data.sources import check_source, is_path
from crossdock.data.tokenizer import open_tokenizer, read_tokenizer, vocabulary_size
from crossdock.data.tokens import TokenFile, Tokens, prepare_tokens

__all__ = [
    "IGNORED_LABEL",
    "MIXTURE_BLOCK",
    "Batch",
    "ChatTokenizer",
    "DataConfig",
    "DataError",
    "Packing",
    "TokenBatches",
    "TokenFile",
    "Tokens",
    "TooLong",
    "TrainOn",
    "check_chat_template",
    "check_source",
    "evaluation_batches",
    "is_path",
    "mixture_quotas",
    "open_tokenizer",
    "prepare_tokens",
    "read_chat_template",
    "read_tokenizer",
    "vocabulary_size",
]
