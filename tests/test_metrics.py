"""Closed forms against counting, and the accounting against hand-made figures."""

import pytest

from configs.schema import Branch, Compression
from parallel import metrics
from tests import tiny

LENGTHS = [0, 1, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 500]
SIZES = [(8, 4, 16, 4, 12), (4, 4, 4, 1, 1), (32, 16, 64, 3, 50), (16, 2, 32, 2, 1000)]


def counted(length: int, l: int, d: int, l_slc: int, n: int, w: int) -> tuple[int, int, int, int]:
    """Keys by branch, a query at a time; t counts from 1."""
    cmp = slc = win = dense = 0
    for t in range(1, length + 1):
        cmp += (t - l) // d + 1 if t >= l else 0
        own = -(-t // l_slc)
        slc += t if own <= n else n * l_slc - (l_slc * own - t)
        win += min(t, w)
        dense += t
    return cmp, slc, win, dense


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_closed_forms_count_right(sizes):
    l, d, l_slc, n, w = sizes
    for t in LENGTHS:
        found = (
            metrics.compressed_keys(t, l, d),
            metrics.selected_keys(t, l_slc, n),
            metrics.window_keys(t, w),
            metrics.dense_keys(t),
        )
        assert found == counted(t, *sizes), t


def test_reference_table_of_average_keys():
    """Average keys per query at l=32, d=16, l'=64, n=16, w=512."""
    for t, expected in {8192: (255, 933, 496), 65536: (2047, 985, 510)}.items():
        found = metrics.compressed_keys(t, 32, 16), metrics.selected_keys(t, 64, 16), metrics.window_keys(t, 512)
        assert tuple(int(keys / t + 0.5) for keys in found) == expected


def test_full_attention_by_hand():
    cfg = tiny.config("full")
    m, tokens = cfg.model, 96 + 32
    weights = m.layers * m.dim * (8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 192) + m.dim * 512
    keys = 96 * 97 // 2 + 32 * 33 // 2
    found = metrics.flops(cfg, 512, [96, 32])
    assert found.linear == 6 * tokens * weights
    assert found.full == found.attention == 3 * 2 * m.layers * m.heads * (8 + 8) * keys
    assert found.total == found.linear + found.full
    assert metrics.dense_equivalent(cfg, 512, [96, 32]) == found


def test_nsa_by_hand():
    cfg = tiny.config("nsa")
    m, a = cfg.model, cfg.attention
    found = metrics.flops(cfg, 512, [96])
    weights = m.layers * m.dim * (8 * 8 + 3 * 2 * 4 * 8 + 8 * 8 + 3 * 8 + 3 * 192) + m.dim * 512
    assert found.linear == 6 * 96 * weights
    blocks = (96 - 8) // 4 + 1
    assert found.compress == 6 * m.layers * m.kv_heads * blocks * 2 * (8 * 8 * 8 + 8 * 8)
    keys = counted(96, a.l, a.d, a.l_slc, a.n, a.w)
    assert [found.cmp, found.slc, found.win] == [6 * m.layers * m.heads * 16 * k for k in keys[:3]]
    assert metrics.dense_equivalent(cfg, 512, [96]) == metrics.flops(tiny.config("full"), 512, [96])


def test_a_branch_that_sees_all_costs_what_full_attention_does():
    full = metrics.flops(tiny.config("full"), 512, [96, 40]).full
    win = tiny.config("nsa", attention__branches=[Branch.win], attention__w=96)
    assert metrics.flops(win, 512, [96, 40]).win == full
    slc = tiny.config("nsa", attention__n=6)
    assert metrics.flops(slc, 512, [96, 40]).slc == full


def test_ablations_cost_less():
    whole = metrics.flops(tiny.config("nsa"), 512, [96])
    shared = metrics.flops(tiny.config("nsa", attention__shared_kv=True), 512, [96])
    mean = metrics.flops(tiny.config("nsa", attention__compression=Compression.mean), 512, [96])
    assert shared.linear < whole.linear
    assert mean.compress == 0
    alone = tiny.config("nsa", attention__branches=[Branch.slc], attention__compression=Compression.mean)
    found = metrics.flops(alone, 512, [96])
    scores = 2 * 4 * 8 * 8 * metrics.compressed_keys(96, 8, 4)  # forward only, one product of the key width
    assert found.slc == whole.slc + scores


def test_documents_are_counted_apart():
    cfg = tiny.config("full")
    assert metrics.flops(cfg, 512, [96]).full > metrics.flops(cfg, 512, [48, 48]).full
    assert metrics.flops(cfg, 512, [96]).linear == metrics.flops(cfg, 512, [48, 48]).linear


def test_throughput():
    out = metrics.throughput(8 * 10**12, 12 * 10**12, 1000, 2.0, 4, 10e12, 250.0)
    assert out["tokens_per_s"] == 500
    assert out["tokens_per_s_per_gpu"] == 125
    assert out["model_tflops"] == 1
    assert out["mfu"] == pytest.approx(0.1)
    assert out["dense_equiv_tflops"] == 1.5
    assert out["flop_saving"] == 1.5
    assert out["speedup_vs_full"] == 2
    assert out["saving_realised"] == pytest.approx(2 / 1.5)


def test_what_is_not_known_is_none():
    out = metrics.throughput(10**12, 10**12, 1000, 1.0, 1, None, None)
    assert out["mfu"] is out["speedup_vs_full"] is out["saving_realised"] is None


def test_peaks():
    assert metrics.device_peak("NVIDIA H200") == metrics.device_peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert metrics.device_peak("NVIDIA H100 PCIe") == 756e12
    assert metrics.device_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert metrics.device_peak("NVIDIA L40S") == 362e12
    assert metrics.device_peak("AMD EPYC 9B14") is None
