"""The report: one page with nothing from outside, that draws what the files hold and refuses what is no such file."""

import json
import re
from xml.etree import ElementTree

import pytest

from halfbyte.report import frontier, kind_of, plot_pareto, read_documents, write_report

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
                                   evaluated("turning", 4.3, 0.006), evaluated("fp", 32, 0.0)]),
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
    assert headings == ["Bits against loss, tiny-qwen", "Ladder, tiny-qwen", "Layers, tiny-qwen",
                        "Time and memory against context, tiny-qwen"]  # fmt: skip
    assert "prefers-color-scheme: dark" in page
    assert "per &lt;token&gt;" in page
    assert "a &lt;processor&gt;" in page
    assert "0123abc" in page


def test_drawings_are_well_formed_and_inside_their_frame(page):
    drawings = [ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", page)]
    assert len(drawings) == 5
    for drawing in drawings:
        _, _, width, height = map(float, drawing.get("viewBox").split())
        for circle in drawing.iter("circle"):
            assert 0 < float(circle.get("cx")) < width
            assert 0 < float(circle.get("cy")) < height
        for bar in drawing.iter("rect"):
            assert float(bar.get("x")) + float(bar.get("width")) < width
    circles = {c.find("title").text.split(":")[0]: float(c.get("cy")) for c in drawings[0].iter("circle")}
    assert circles["turning"] > circles["default"] > circles["q4_0"]  # less loss, further down
    bars = [float(bar.get("width")) for bar in drawings[1].iter("rect")]
    assert bars[0] > bars[1]


def test_the_frontier_is_what_nothing_beats():
    rows = [evaluated("a", 4, 0.1), evaluated("b", 4.5, 0.2), evaluated("c", 5, 0.05), evaluated("d", 5, 0.04)]
    assert [row["recipe"] for row in frontier(rows)] == ["a", "d"]
    assert [kind_of(name) for name in ("turning", "turning-token", "q4_0")] == [
        "halfbyte", "halfbyte, simulated", "others, simulated"]  # fmt: skip


def test_the_pareto_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [evaluated("default", 4.3, 0.01), evaluated("q4_0", 4.5, 0.7), evaluated("turning", 4.3, 0.006)]
    plot_pareto([written(tmp_path, "eval", rows)], tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="none of the files is of `eval`"):
        plot_pareto([written(tmp_path, "x", [{"ok": True}])], tmp_path / "none.png")


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
