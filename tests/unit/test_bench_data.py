"""`bench-data` reads every sample it counts, by every way; its figures are not tested."""

import json
import sys
from argparse import Namespace

import pytest

from flux2_ds import bench_data


def test_the_report(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_data, "MODELS", {"tiny": (16, 0.001)})
    monkeypatch.setattr(bench_data, "_SHARD_OF_INDEX", 100_000)
    arguments = [
        "--json",
        "--gb",
        "0.01",
        "--rounds",
        "1",
        "--model",
        "tiny",
        "--work",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["bench-data", *arguments, "--from", "disk", "http", "s3"])
    monkeypatch.setattr(bench_data.argparse.ArgumentParser, "error", pytest.fail)
    bench_data.main()
    found = json.loads(capsys.readouterr().out)
    sources = [f"tiny from {kind}" for kind in ("disk", "http", "s3")]
    assert list(found)[1:4] == sources
    for source in sources:
        assert all(found[source][f"{name}, MB/s"] > 0 for name in ("raw read", "loader"))
        assert found[source]["loader, CPU ms a sample"] > 0
        assert ("loader, server's CPU ms" in found[source]) == ("disk" not in source)
        assert ("plain WebDataset, MB/s" in found[source]) == ("s3" not in source)
        assert found[source]["wait at 0.001 s a step"].endswith(" %")
    assert found["index of 100,000,000 samples"]["shards"] == 1000
    assert not list(tmp_path.iterdir())


def test_a_reading_that_misses_samples_is_no_figure(monkeypatch, tmp_path):
    index = bench_data.make_shards(tmp_path / "x", 16, 1)
    monkeypatch.setattr(bench_data, "plain_pipeline", lambda *_: iter([1]))
    with pytest.raises(RuntimeError, match="1 samples read of 2"):
        bench_data.measure("disk", tmp_path / "x", index, Namespace(readers=1, rounds=1), 0.0)
