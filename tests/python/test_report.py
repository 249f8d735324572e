"""The report: one page with nothing from outside, that draws what the files hold and refuses what is no such file."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from halfbyte.report import evaluated_rows, frontier, kind_of, pareto, read_documents, write_report
from halfbyte.report_plots import write_plots

MACHINE = {"cpu": "a <processor>", "cores": 2}


def written(folder, name, rows, command="halfbyte eval --model tiny-qwen"):
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"command": command, "commit": "0123abc", "machine": MACHINE, "rows": rows}))
    return path


def evaluated(name, bits, kl):
    return {"recipe": name, "bits": bits, "ppl": 50.0, "kl": kl, "kl_by_position": [kl] * 8}


def line(table, name, kl):
    return {"table": table, "line": name, "kl": kl, "paper": "", "bytes_ratio": None}


@pytest.fixture
def page(tmp_path):
    files = [
        written(tmp_path, "eval", [evaluated("default", 4.3, 0.01), evaluated("q4_0", 4.5, 0.7),
                                   evaluated("table", 4.3, 0.006), evaluated("fp", 32, 0.0),
                                   *(evaluated(f"other-{i}", 3 + i, 0.1 / 2**i) for i in range(5))]),
        written(tmp_path, "tables", [line("ladder", "per <token>", 0.8), line("ladder", "ours", 0.008),
                                     line("layers", "layer 0 K", 0.001), line("layers", "layer 0 V", 0.004)]),
        written(tmp_path, "generate", [
            {"model": "tiny-qwen", "prefix": p, "fp_ms_per_token": p / 100, "int4_ms_per_token": p / 200,
             "fp_cache_bytes": 1000 * p, "int4_cache_bytes": 300 * p} for p in (256, 4096)]),
    ]  # fmt: skip
    assert write_report(files, tmp_path / "report.html") == 4
    return (tmp_path / "report.html").read_text()


def test_everything_is_on_the_page_and_nothing_comes_from_outside(page):
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == ["Bits against loss, tiny-qwen (8 windows of 2048, packed)", "Ladder, tiny-qwen",
                        "Layers, tiny-qwen", "Time and memory against context, tiny-qwen"]  # fmt: skip
    assert "prefers-color-scheme: dark" in page
    assert "per &lt;token&gt;" in page
    assert "a &lt;processor&gt;" in page
    assert "0123abc" in page


def test_drawings_are_well_formed_and_inside_their_frame(page):
    drawings = [ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", page)]
    assert len(drawings) == 4
    for drawing in drawings:
        _, _, width, height = map(float, drawing.get("viewBox").split())
        for circle in drawing.iter("circle"):
            assert 0 < float(circle.get("cx")) < width
            assert 0 < float(circle.get("cy")) < height
        for bar in drawing.iter("rect"):
            assert float(bar.get("x")) + float(bar.get("width")) < width
    circles = {c.find("title").text.split(":")[0]: float(c.get("cy")) for c in drawings[0].iter("circle")}
    assert circles["table"] > circles["default"] > circles["q4_0"]  # less loss, further down
    bars = [float(width) for width in re.findall(r'<i style="width: ([0-9.]+)%">', page)]
    assert 100 > bars[0] > bars[1] > 0


def test_the_frontier_is_what_nothing_beats():
    rows = [evaluated("a", 4, 0.1), evaluated("b", 4.5, 0.2), evaluated("c", 5, 0.05), evaluated("d", 5, 0.04)]
    assert [row["recipe"] for row in frontier(rows)] == ["a", "d"]
    assert [kind_of(name) for name in ("default", "table", "q4_0")] == [
        "halfbyte", "halfbyte, simulated", "others, simulated"]  # fmt: skip


def test_only_what_was_measured_alike_is_joined(tmp_path):
    one, two = [evaluated("default", 4.3, 0.01)], [evaluated("q4_0", 4.5, 0.7)]
    command = "halfbyte eval --model tiny-qwen --windows 4"
    files = [
        written(tmp_path, "a", one, command), written(tmp_path, "b", two, command),
        written(tmp_path, "c", [evaluated("default", 4.3, 0.002)], command + " --protocol deployed"),
    ]  # fmt: skip
    found = evaluated_rows(read_documents(files))
    assert {key: [row["kl"] for row in rows] for key, rows in found.items()} == {
        ("tiny-qwen", "4 windows of 2048, packed"): [0.01, 0.7],
        ("tiny-qwen", "4 windows of 2048, deployed"): [0.002],
    }
    again = written(tmp_path, "d", [evaluated("default", 4.3, 0.009)], command)
    (_, rows), *_ = evaluated_rows(read_documents([*files, again])).items()
    assert [row["kl"] for row in rows] == [0.009, 0.7]  # the newest of a recipe counts


def test_the_files_of_the_results_page_become_pictures(tmp_path):
    """What the README shows is drawn from the files in docs/results, each picture with its panels."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    results = Path(__file__).parents[2] / "docs/results"
    files = [*results.glob("quality/*.json"), *results.glob("cpu/generate-*.json")]
    names = ["pareto.png", "ladder.png", "layers.png", "time.png", "memory.png"]
    assert write_plots(files, tmp_path) == names
    for name in names:
        picture = pyplot.imread(tmp_path / name)
        assert picture.shape[0] > 250
        assert picture.shape[1] > 1.5 * picture.shape[0]  # a panel a model, side by side
        assert (results / "quality" / name).stat().st_size < 200_000  # the one that is shown: in the repository, small
    only = written(tmp_path, "ladder", [line("ladder", "per token", 0.8), line("ladder", "`ours`", 0.008)])
    assert write_plots([only], tmp_path / "new" / "folder") == ["ladder.png"]
    with pytest.raises(ValueError, match="none of the files is of `eval`"):
        write_plots([written(tmp_path, "x", [{"ok": True}])], tmp_path)


def test_names_that_would_cover_each_other_are_left_out():
    rows = [evaluated("a-name", 4.3, 0.01), evaluated("another", 4.3, 0.0101), evaluated("far", 8, 0.5)]
    drawing = ElementTree.fromstring(re.search("<svg.*?</svg>", pareto(rows)).group())
    boxes = [
        (float(t.get("x")), float(t.get("x")) + 5.6 * len(t.text), float(t.get("y")))
        for t in drawing.iter("text") if t.get("class") == "small"
    ]  # fmt: skip
    assert len(boxes) == 3
    for i, (start, end, y) in enumerate(boxes):
        assert not any(start < e and end > s and abs(y - other) < 10 for s, e, other in boxes[:i])


def test_other_files_are_refused(tmp_path):
    other = tmp_path / "other.json"
    for content in ("{", "[]", '{"rows": []}', '{"rows": [{}]}'):
        other.write_text(content)
        with pytest.raises(ValueError, match=r"other.json' is not a file that --json wrote"):
            read_documents([other])
    with pytest.raises(ValueError, match="is not a file"):
        read_documents([tmp_path / "missing.json"])
    with pytest.raises(ValueError, match="none of the files is of"):
        write_report([written(tmp_path, "x", [{"ok": True}])], tmp_path / "report.html")
