"""tools/benchmark.py measures, prints and writes what it says."""

import json
import subprocess
import sys


def test_op_writes_times_and_ratios_of_every_grouping(repository, tmp_path):
    figures = tmp_path / "op.json"
    command = [sys.executable, repository / "tools/benchmark.py", "op", "--threads", "1"]
    command += ["--shape", "2", "24", "20", "32", "--directions", "up", "left", "--seconds", "0.1"]
    command += ["--groups", "32", "1", "--json", figures]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "(2, 24, 20, 32)" in shown and "2 directions" in " ".join(shown.split())
    rows = json.loads(figures.read_text())["rows"]
    assert [row["groups"] for row in rows] == [32, 1]
    for row in rows:
        assert 0 < row["op_forward_ms"] < row["op_forward_backward_ms"]
        ratio = row["reference_forward_backward_ms"] / row["op_forward_backward_ms"]
        assert row["forward_backward_ratio"] == ratio
        assert ratio > 1, "the operator is slower than one PyTorch expression per line"
