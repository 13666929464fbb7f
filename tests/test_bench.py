"""The benchmark on a small corpus: every figure is there, and memory stays bounded however much is read."""

import json

from data import bench


def test_the_benchmark_prints_and_writes_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "WHOLE", 1 << 20)
    out = tmp_path / "figures.json"
    options = ["--tokens", str(4 << 20), "--shard-tokens", str(1 << 20), "--passes", "1"]
    assert bench.main([*options, "--directory", str(tmp_path), "--json", str(out)]) == 0
    figures, said = json.loads(out.read_text()), capsys.readouterr().out
    for name in ("raw read", "webdataset, a document a sample", "rows of 4096", "rows of 65536"):
        assert figures[name]["best"] > 10**6
        assert name in said
    assert figures["rows of 4096"]["best"] > figures["webdataset, a document a sample"]["best"]
    assert figures["rows of 4096"]["padding"] < 0.01
    large = figures["100,000 shards"]
    assert large["start"] < 2, "0.5 s where the machine is not shared"
    assert max(v for k, v in large.items() if k.startswith("restore")) < 0.5
    assert large["peak"] < 340 << 20, "300 MiB beside a torch that takes no more than 222"
    assert large["memory"] - large["imports"] < 80 << 20
    assert not [p for p in tmp_path.iterdir() if p != out], "nothing is left behind"
