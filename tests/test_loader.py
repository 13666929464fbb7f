"""The order of rows: one sequence for any number of ranks, each row once an epoch, continued where it was left."""

import itertools
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import DataError
from configs.schema import LongDocuments, OnBadShard
from data.loader import Batch, Loader
from data.shards import Shard, ShardEntry, read_manifest, write_manifest, write_shard

S = 64


def loader(corpus, rank=0, size=1, **changes) -> Loader:
    options = dict(split="train", seq_len=S, global_batch=8, micro_batch=1, seed=3, dp_rank=rank, dp_size=size)
    return Loader(corpus, **{**options, **changes})


def rows(batches: Iterable[Batch]) -> list[list[int]]:
    return [row for b in batches for row in torch.cat((b.tokens, b.labels), dim=1).tolist()]


def documents(batches: list[Batch]) -> list[int]:
    """Document starts over all rows, whatever the micro-batches."""
    out, place = [], 0
    for b in batches:
        out += [place + s for s in b.cu_seqlens[:-1].tolist()]
        place += b.tokens.numel()
    return out


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("how", list(LongDocuments))
def test_any_number_of_ranks_reads_the_same_global_batches(corpus, size, how):
    alone = loader(corpus, long_documents=how)
    ranks = [loader(corpus, r, size, long_documents=how) for r in range(size)]
    for _ in range(4):
        expected, parts = alone.next_step(), [b for r in ranks for b in r.next_step()]
        assert rows(parts) == rows(expected)
        assert documents(parts) == documents(expected)


@pytest.mark.parametrize("micro_batch", [2, 4, 8])
def test_micro_batches_are_the_same_rows(corpus, micro_batch):
    one, many = loader(corpus), loader(corpus, micro_batch=micro_batch)
    for _ in range(3):
        a, b = one.next_step(), many.next_step()
        assert [x.tokens.shape for x in b] == [(micro_batch, S)] * (8 // micro_batch)
        assert rows(a) == rows(b)
        assert documents(a) == documents(b)


@pytest.mark.parametrize("how", list(LongDocuments))
def test_each_row_once_an_epoch_in_another_order_each_time(corpus, how):
    made = loader(corpus, global_batch=1, long_documents=how)
    epochs = [[tuple(rows(made.next_step())[0]) for _ in range(made.total)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) != epochs[0]


@pytest.mark.parametrize("k", [0, 1, 7, 1000])
def test_continues_where_it_was_left(corpus, k):
    unbroken = loader(corpus)
    for _ in range(k):
        unbroken.next_step()
    continued = loader(corpus, 1, 2)
    continued.load_state_dict(unbroken.state_dict())
    assert rows(continued.next_step()) == rows(unbroken.next_step())[4:]
    assert continued.state_dict() == unbroken.state_dict()


def test_a_far_position_takes_no_longer(corpus):
    made = loader(corpus)
    made.load_state_dict({**made.state_dict(), "consumed_rows": 8 * 10**12})
    assert len(made.next_step()) == 8


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"seed": 4}, "seed"), ({"long_documents": LongDocuments.cut}, "long_documents"), ({"split": "val"}, "split")],
    ids=str,
)
def test_another_order_is_refused(corpus, changes, word):
    with pytest.raises(DataError, match=word):
        loader(corpus, **changes).load_state_dict(loader(corpus).state_dict())


def test_other_data_is_refused(corpus, tmp_path):
    other = shutil.copytree(corpus, tmp_path / "other")
    text = (other / "manifest.json").read_text()
    (other / "manifest.json").write_text(text.replace('"name": "bpe:500"', '"name": "other"'))
    with pytest.raises(DataError, match="fingerprint"):
        loader(str(other)).load_state_dict(loader(corpus).state_dict())


def test_the_seed_decides_the_order(corpus):
    assert rows(loader(corpus).next_step()) == rows(loader(corpus).next_step())
    assert rows(loader(corpus, seed=4).next_step()) != rows(loader(corpus).next_step())


def test_labels_stay_in_their_document(corpus):
    made = loader(corpus)
    for _ in range(10):
        for b in made.next_step():
            ends = b.cu_seqlens[1:] - 1
            last = b.labels.flatten()[ends.long()]
            tokens, labels = b.tokens.flatten(), b.labels.flatten()
            inside = torch.ones(len(labels), dtype=torch.bool)
            inside[ends.long()] = False
            counted = inside & (labels >= 0)
            assert torch.equal(labels[counted], tokens.roll(-1)[counted])
            closed = tokens[ends.long()] == made.manifest.tokenizer["end"]
            assert (last[closed] == -100).all()
            assert int(b.cu_seqlens[-1]) == b.tokens.numel()


def test_held_out_rows_begin_anew(corpus):
    made = loader(corpus, split="val", global_batch=2)
    first = rows(made.next_step())
    made.next_step()
    made.reset()
    assert rows(made.next_step()) == first


def test_an_empty_split(corpus):
    with pytest.raises(DataError, match="the split test is empty"):
        loader(corpus, split="test")


END = 0


def ids(made: list[Batch]) -> list[int]:
    """The tokens that are ids: every one of `numbered` but the ends of documents."""
    return [t for b in made for t in b.tokens.flatten().tolist() if t != END]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> list[str]:
    """Two data sets in which each token is another number; their documents are short, and some longer than rows."""
    paths, number = [], 1
    for name, shards in (("a", 19), ("b", 9)):
        folder, rng, entries = tmp_path_factory.mktemp("numbered") / name, np.random.default_rng(len(name)), []
        folder.mkdir()
        for i in range(shards):
            documents = []
            for n in rng.integers(1, 150, rng.integers(2, 12)).tolist():
                documents.append(np.append(np.arange(number, number + n), END))
                number += n
            entries.append(write_shard(folder / f"train-{i:06d}.tar", documents, "uint32"))
        tokenizer = {"name": "n", "fingerprint": "n", "vocab_size": number, "end": END, "ranks": None}
        write_manifest(folder, tokenizer, "uint32", {"train": entries}, {})
        paths.append(str(folder))
    return paths


def everything(path: str) -> Counter:
    return everything_of(loader(path, global_batch=1))


def everything_of(made: Loader) -> Counter:
    return Counter(ids([b for _ in range(made.total) for b in made.next_step()]))


@pytest.mark.parametrize("how", list(LongDocuments))
def test_an_epoch_has_every_token_once_through_kills_and_other_sizes(numbered, how):
    """Stops anywhere, goes on with another number of ranks, throws away what was read ahead."""
    made, seen, sizes, state = loader(numbered[0], long_documents=how), [], [1, 4, 2, 8, 1, 2], None
    epoch, steps = made.total, 0
    while steps * 8 < epoch:
        size = sizes[steps % len(sizes)]
        ranks = [loader(numbered[0], r, size, read_ahead=r % 3, long_documents=how) for r in range(size)]
        for r in ranks if state else []:
            r.load_state_dict(state)
        for _ in range(steps % 4 + 1):
            seen += [row for r in ranks for b in r.next_step() for row in b.tokens.tolist()]
            steps += 1
        (state,) = {str(r.state_dict()): r.state_dict() for r in ranks}.values()
    counts = Counter(t for row in seen[:epoch] for t in row if t != END)
    assert counts == everything(numbered[0])
    assert set(counts.values()) == {1}
    assert counts == Counter(range(1, len(counts) + 1))


@pytest.mark.parametrize("read_ahead", [1, 4])
def test_reading_ahead_changes_nothing(numbered, read_ahead):
    plain, ahead = loader(numbered[0]), loader(numbered[0], read_ahead=read_ahead)
    for step in range(40):
        if step == 20:
            for made in (plain, ahead):
                made.reset()
        assert rows(plain.next_step()) == rows(ahead.next_step())
        assert plain.state_dict() == ahead.state_dict()


def test_a_mixture_has_its_weights_and_each_source_its_epochs(numbered):
    mix = dict(zip(numbered, (0.7, 0.3)))
    of_a = set(everything(numbered[0]))
    made, seen = loader(mix, global_batch=10, micro_batch=10), Counter()
    for step in range(1, 30):
        tokens = made.next_step()[0].tokens.tolist()
        from_a = sum(any(t in of_a for t in row) for row in tokens)
        assert from_a == 7, step
        seen.update(t for row in tokens for t in row if t != END)
    alone = loader(numbered[0], global_batch=1)
    first = Counter(ids([b for _ in range(29 * 7) for b in alone.next_step()]))
    assert Counter({t: n for t, n in seen.items() if t in of_a}) == first, "each source goes through its own order"


@pytest.mark.parametrize("size", [1, 2])
def test_a_mixture_continues_on_other_ranks(numbered, size):
    mix = dict(zip(numbered, (0.55, 0.45)))
    whole = loader(mix)
    for _ in range(13):
        whole.next_step()
    ranks = [loader(mix, r, size) for r in range(size)]
    for r in ranks:
        r.load_state_dict(whole.state_dict())
    assert rows(b for r in ranks for b in r.next_step()) == rows(whole.next_step())
    with pytest.raises(DataError, match="weights"):
        loader(dict(zip(numbered, (0.5, 0.5)))).load_state_dict(whole.state_dict())


def test_data_sets_of_two_tokenizers_do_not_mix(numbered, corpus):
    with pytest.raises(DataError, match="another tokenizer"):
        loader({numbered[0]: 1, corpus: 1})


@pytest.mark.parametrize("lengths", [(32, 128), (128, 32), (32, 96, 64)], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("how", list(LongDocuments))
def test_a_stage_of_another_length_reads_the_rest_of_the_epoch(numbered, lengths, steps, how):
    """Every token once although the length changes, and changes again; a resume inside a stage is the same stage."""
    seen, state = [], None
    for length in lengths[:-1]:
        made = loader(numbered[0], seq_len=length, long_documents=how)
        if state:
            made.load_state_dict(state)
        seen += ids([b for _ in range(steps) for b in made.next_step()])
        state = made.state_dict()
    last = loader(numbered[0], seq_len=lengths[-1], global_batch=1, long_documents=how)
    last.load_state_dict(state)
    total = sum(everything(numbered[0]).values())
    while len(seen) < total:
        seen += ids(last.next_step())
        again = loader(numbered[0], seq_len=lengths[-1], global_batch=1, long_documents=how)
        again.load_state_dict(last.state_dict())
    assert Counter(seen) == everything(numbered[0])
    assert rows(again.next_step()) == rows(last.next_step())
    assert len(str(last.state_dict())) < 400


@pytest.mark.parametrize("how", list(LongDocuments))
def test_padding_is_less_than_a_hundredth(corpus, how):
    made, padding = loader(corpus, global_batch=1, long_documents=how), 0
    for _ in range(made.total):
        padding += sum(b.padding for b in made.next_step())
    assert padding == made.total * S - sum(e.tokens for e in made.manifest.splits["train"])
    assert padding < 0.01 * made.total * S


def test_documents_that_fit_into_a_row_are_whole_if_long_ones_are_cut(numbered):
    """By the ids that are their tokens; `numbered` has documents of 1 to 150 tokens, and rows have 256."""
    made, where = loader(numbered[0], global_batch=1, seq_len=256, long_documents=LongDocuments.cut), {}
    for row in range(made.total):
        where |= dict.fromkeys(ids(made.next_step()), row)
    found = []
    for entry in made.manifest.splits["train"]:
        shard = Shard(numbered[0], entry, "uint32")
        ends = [*shard.starts.tolist(), len(shard)]
        found += [{where[t] for t in shard.read(a, b).tolist() if t != END} for a, b in itertools.pairwise(ends)]
    assert sum(len(rows) > 1 for rows in found) < 0.1 * len(found)


def test_positions(corpus):
    for b in loader(corpus, micro_batch=4).next_step():
        starts = set(b.cu_seqlens.tolist())
        expected, place = [], 0
        for i in range(b.tokens.numel()):
            place = 0 if i in starts else place + 1
            expected.append(place)
        assert b.positions.flatten().tolist() == expected


def test_a_hundred_thousand_shards_start_and_continue_at_once(tmp_path):
    names = [f"train-{i:06d}.tar" for i in range(100_000)]
    shards = [ShardEntry(n, 1, "0" * 64, 1, 1, 32_000_000 + i) for i, n in enumerate(names)]
    tokenizer = {"name": "n", "fingerprint": "n", "vocab_size": 9, "end": END, "ranks": None}
    write_manifest(tmp_path, tokenizer, "uint16", {"train": shards}, {})
    times = {"start": time.process_time()}
    made = loader(str(tmp_path), seq_len=4096, global_batch=64)
    times["start"] = time.process_time() - times["start"]
    for step in (1, 10**6, 10**9):
        begin = time.process_time()
        made.load_state_dict({**made.state_dict(), "consumed_rows": step * 64})
        made._place(step * 64)
        times[step] = time.process_time() - begin
    assert times.pop("start") < 0.5
    assert max(times.values()) < 0.1, times


def damage(numbered: list[str], tmp_path: Path, at: float) -> str:
    """A copy of the first data set with a bit flipped in its largest shard."""
    data = Path(shutil.copytree(numbered[0], tmp_path / "damaged"))
    path = data / max(read_manifest(data).splits["train"], key=lambda e: e.tokens).path
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= 1
    path.write_bytes(raw)
    return str(data)


def zeroed(raw: bytes) -> bytes:
    return raw[:1024] + b"\0" * 1024 + raw[2048:]


DAMAGE = {  # what a shard becomes, and what the line says of it
    "flipped": (lambda raw: raw[:2000] + bytes([raw[2000] ^ 8]) + raw[2001:], "sample 0 does not match its checksum"),
    "cut short": (lambda raw: raw[:1700], "bytes instead of"),
    "cut at a member": (lambda raw: raw[:1024], "bytes instead of"),
    "empty": (lambda raw: b"", "bytes instead of"),
    "zeroed": (zeroed, "sample 0 does not match its checksum"),
    "html": (lambda raw: b"<html>503 Service Unavailable</html>", "(it is HTML)"),
    "html as long": (lambda raw: b"<html>".ljust(len(raw)), "(it is HTML)"),
    "missing": (lambda raw: None, "is missing, with samples 0 to 0"),
}


@pytest.mark.parametrize("index", ["with", "without"])
@pytest.mark.parametrize("kind", list(DAMAGE))
def test_every_damage_stops_with_a_line_or_is_skipped_and_counted(numbered, tmp_path, kind, index):
    data = Path(shutil.copytree(numbered[0], tmp_path / "damaged"))
    path = data / max(read_manifest(data).splits["train"], key=lambda e: e.tokens).path
    spoilt, says = DAMAGE[kind][0](path.read_bytes()), DAMAGE[kind][1]
    path.unlink() if spoilt is None else path.write_bytes(spoilt)
    if index == "without":
        path.with_suffix(".idx").unlink()
        says = says.replace("sample 0 does not match its checksum", "does not match its hash")
    with pytest.raises(DataError) as e:
        everything_of(loader(str(data), global_batch=1))
    assert e.value.code == 65
    assert path.name in str(e.value)
    assert says in str(e.value)
    whole = loader(numbered[0])
    ranks = [loader(str(data), r, 2, on_bad_shard=OnBadShard.skip) for r in range(2)]
    skipped = 0
    for _ in range(whole.total // 8):
        expected, parts = rows(whole.next_step()), [r.next_step() for r in ranks]
        assert [len(batches) for batches in parts] == [4, 4], "ranks have as many batches as without damage"
        changed = sum(a != b for a, b in zip(expected, rows([b for batches in parts for b in batches])))
        assert changed == sum(len(r.damaged) for r in ranks)
        skipped += changed
    assert skipped == sum(r.skipped for r in ranks) > 0


def test_damage_stops_with_shard_and_sample(numbered, tmp_path):
    made = loader(damage(numbered, tmp_path, 0.3), global_batch=1)
    with pytest.raises(DataError, match=r"shard .*train-0000\d\d.tar: sample 0 does not match its checksum"):
        everything_of(made)


@pytest.mark.parametrize("how", list(LongDocuments))
def test_skipped_rows_are_empty_counted_and_the_rest_is_unchanged(numbered, tmp_path, how):
    whole = loader(numbered[0], long_documents=how)
    path = damage(numbered, tmp_path, 0.3)
    options = dict(on_bad_shard=OnBadShard.skip, read_ahead=1, long_documents=how)
    ranks = [loader(path, r, 2, **options) for r in range(2)]
    empty = 0
    for _ in range(whole.total // 8):
        expected = rows(whole.next_step())
        got = rows([b for r in ranks for b in r.next_step()])
        first = whole.consumed - 8
        bad = {k - first for r in ranks for k in r.damaged}
        for i, (a, b) in enumerate(zip(expected, got)):
            assert b == ([END] * S + [-100] * S if i in bad else a)
        empty += len(bad)
    assert empty == sum(r.skipped for r in ranks) > 0


def test_rows_that_another_rank_could_not_read_are_emptied_here(numbered):
    made, plain = loader(numbered[0], 1, 2, micro_batch=2), loader(numbered[0], 1, 2, micro_batch=2)
    made.next_step(), plain.next_step()
    batches, expected = made.next_step(), rows(plain.next_step())
    got = rows(made.blank(batches, {9, 13}))
    assert got == [[END] * S + [-100] * S if 12 + i == 13 else row for i, row in enumerate(expected)]
    assert made.skipped == 2, "all ranks count alike"
    assert rows(made.next_step()) == rows(plain.next_step())


def test_few_shards_stay_open(numbered, monkeypatch):
    monkeypatch.setattr("data.source.OPEN", 3)
    few, plain = loader(numbered[0]), loader(numbered[0])
    for _ in range(40):
        assert rows(few.next_step()) == rows(plain.next_step())
        assert len(few.sources[0]._open) <= 3
