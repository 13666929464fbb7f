"""Tokenizers: tiktoken's own by name, a rank file by path, or a byte-pair vocabulary trained on the input."""

import base64
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Optional

import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from configs.errors import DataError

LARGEST = 2**22  # tokens of a vocabulary that is trained here
END = "<|endoftext|>"
NAMES = ("gpt2", "cl100k_base", "o200k_base")

# How text is split before pairs are merged. It splits as cl100k_base does, so that its rank file can be given by path.
PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


@cache  # a worker process makes it once
def load(name: str, ranks: Optional[str]) -> tiktoken.Encoding:
    """The encoding of the rank file `ranks`, or of a name that tiktoken knows."""
    return from_file(Path(ranks)) if ranks else named(name)


def named(name: str) -> tiktoken.Encoding:
    """One of NAMES. Raises DataError if its ranks cannot be had."""
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # tiktoken lets errors of its http library through
        why = f"its ranks cannot be had ({type(e).__name__}; no network, and not in $TIKTOKEN_CACHE_DIR)"
        raise DataError("tokenizer", name, why, "set TIKTOKEN_CACHE_DIR, or give a rank file or bpe:8192") from e


def from_file(path: Path) -> tiktoken.Encoding:
    """The encoding of a rank file (a line a token: base64, rank). Raises DataError if it is none."""
    try:
        lines = path.read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    except (OSError, ValueError) as e:
        raise DataError("tokenizer", path, f"no rank file ({e})", "give a file of base64 tokens and ranks") from e
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        why = f"{len(missing)} single bytes have no rank" if missing else "its ranks are not 0, 1, 2, ..."
        raise DataError("tokenizer", path, why, "give a whole byte-level vocabulary")
    specials = {END: len(ranks)}
    return tiktoken.Encoding(path.stem, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def train(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Ranks of a byte-pair vocabulary of `size` tokens, the end-of-text token included; fewer if the text is small."""
    if size < 257:
        raise DataError("tokenizer", f"bpe:{size}", "smaller than the 256 bytes and the end-of-text token", "give more")
    if size > LARGEST:
        raise DataError("tokenizer", f"bpe:{size}", "larger than any vocabulary in use", f"give at most {LARGEST}")
    model = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, trainer)
    decode = _byte_of_letter()
    return {bytes(decode[c] for c in token): rank for token, rank in model.get_vocab().items()}


def _byte_of_letter() -> dict[str, int]:
    """The byte behind each letter that the byte-level alphabet prints it as: printable ones stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def save(ranks: dict[bytes, int], path: Path) -> None:
    """Write a rank file."""
    rows = sorted(ranks.items(), key=lambda item: item[1])
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in rows))


def fingerprint(encoding: tiktoken.Encoding) -> str:
    """sha256 over all that decides how text is encoded."""
    digest = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %d " % (rank, len(token)) + token)
    digest.update(repr(sorted(encoding._special_tokens.items())).encode())
    return digest.hexdigest()
