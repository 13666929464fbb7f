"""A trained vocabulary is a genuine tiktoken encoding: any text comes back, and special tokens are only text."""

import pytest

from configs.errors import DataError
from data import tokenizer

HARD = [
    "",
    "a",
    "  \n\t x",
    "naïve café 日本語 🙂🙂 \u0000",
    "<|endoftext|>",
    "x" * 5000,
    "1234567 3.14",
    "\r\n\r\nend ",
]


@pytest.fixture(scope="module")
def encoding(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    tokenizer.save(tokenizer.train(texts, 700), path)
    return tokenizer.from_file(path)


def test_size_and_end(encoding):
    assert encoding.n_vocab == 700
    assert encoding.eot_token == 699


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_round_trip(encoding, text):
    tokens = encoding.encode_to_numpy(text, disallowed_special=()).tolist()
    assert encoding.decode(tokens) == text
    assert encoding.eot_token not in tokens


def test_it_compresses(encoding, texts):
    text = "".join(texts)
    assert len(encoding.encode_ordinary(text)) < len(text.encode()) / 2


def test_fingerprint_sees_every_rank(encoding, texts, tmp_path):
    ranks = tokenizer.train(texts, 700)
    tokenizer.save(ranks, tmp_path / "same.tiktoken")
    assert tokenizer.fingerprint(tokenizer.from_file(tmp_path / "same.tiktoken")) == tokenizer.fingerprint(encoding)
    a, b = sorted(ranks, key=ranks.get)[-2:]
    ranks[a], ranks[b] = ranks[b], ranks[a]
    tokenizer.save(ranks, tmp_path / "other.tiktoken")
    assert tokenizer.fingerprint(tokenizer.from_file(tmp_path / "other.tiktoken")) != tokenizer.fingerprint(encoding)


def test_too_small_a_vocabulary(texts):
    with pytest.raises(DataError, match="256 bytes"):
        tokenizer.train(texts, 256)


@pytest.mark.parametrize("text", ["", "not base64 at all", "IQ== x", "IQ==\n"])
def test_what_is_no_rank_file(tmp_path, text):
    (tmp_path / "bad.tiktoken").write_text(text)
    with pytest.raises(DataError, match=r"bad.tiktoken"):
        tokenizer.from_file(tmp_path / "bad.tiktoken")
