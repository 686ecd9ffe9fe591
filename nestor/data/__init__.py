"""Data: tokenizers, corpora, token streams, synthetic tasks."""

from nestor.data.corpora import Corpus, open_corpus, shipped_corpora
from nestor.data.mixture import Mixture
from nestor.data.prefetch import Prefetcher
from nestor.data.streams import IGNORED, Batch, LaneStream, TokenStream, rank_lanes
from nestor.data.tokenized import TokenizedCorpus, default_cache_dir, tokenize
from nestor.data.tokenizers import (
    ByteTokenizer,
    StreamDecoder,
    check_vocabulary,
    encode_text,
    load_tokenizer,
    tokenizer_identity,
)
from nestor.data.workers import WorkerStream

__all__ = [
    "IGNORED",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "LaneStream",
    "Mixture",
    "Prefetcher",
    "StreamDecoder",
    "TokenStream",
    "TokenizedCorpus",
    "WorkerStream",
    "check_vocabulary",
    "default_cache_dir",
    "encode_text",
    "load_tokenizer",
    "open_corpus",
    "rank_lanes",
    "shipped_corpora",
    "tokenize",
    "tokenizer_identity",
]
