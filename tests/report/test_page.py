"""The page shows every figure of the JSON, marks what happened in training, and needs nothing from outside."""

import base64
import copy
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from sparsekd import report
from sparsekd.goals import Classification, Regression
from sparsekd.report import compare, page, verdict
from sparsekd.report.charts import Chart, Series, _apart, _LogScale, _Scale, pareto

VOID = {"meta", "img", "br"}


class Outline(HTMLParser):
    """Tags that are balanced, and what they say."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        optional = {"tr", "td", "th"}
        while self.open and self.open[-1] != tag and self.open[-1] in optional:
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag, **attributes):
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]


def row(name, density, accuracy, epochs=(), seed=0, **metrics):
    mask = np.zeros((2, 3, 3, 3), bool)
    mask[0, 1] = True  # one input of the first 16 outputs, whole
    bits = base64.b64encode(np.packbits(mask).tobytes()).decode()
    metrics = {
        "accuracy": accuracy,
        "val_accuracy": accuracy,
        "weights_kept": density or 1.0,
        "parameters": 9,
        **metrics,
    }
    return {
        "name": name,
        "method": None,
        "seed": seed,
        "target_density": density,
        "metrics": {
            "parameters": 9,
            "file_bytes": 1,
            "train_seconds": 1.0,
            "step_ms_first": 1.0,
            "step_ms_last": 1.0,
            "latency_ms_dense": 2.0,
            "latency_ms_frozen": density or 1.5,
            "latency_ratio": 0.5,
            "joules_frozen": None,
            **metrics,
        },
        "energy_note": "not measured: no counter here",
        "epochs": list(epochs),
        "blocks": {"blocks.0.conv1": {"shape": [2, 3, 3, 3], "bits": bits}} if density else {},
    }


@pytest.fixture
def run():
    epochs = [
        {"epoch": 1, "val_accuracy": 0.3, "density": 1.0, "pruned": True, "rewound": True},
        {"epoch": 2, "val_accuracy": 0.1, "density": 0.5, "pruned": True, "rewound": False},
        {"epoch": 3, "val_accuracy": 0.2, "density": 0.25, "pruned": False, "rewound": False},
    ]
    rows = [row("SAD", None, accuracy, epochs[:1], seed) for seed, accuracy in enumerate((0.7546, 0.7548))]
    rows += [row("LTH-SAD", 0.5, 0.7312, epochs), row("LTH-SAD", 0.25, 0.7001)]
    return {
        "command": "sparsekd run cifar100 --data <DIR>",
        "task": {"name": "pictures", "goal": Classification().describe()},
        "protocol": {"machine": "a machine & more", "quick": False},
        "baselines": [],
        "rows": rows,
        "summary": report.summarise(rows, Classification().judge),
    }


def test_tables_and_texts(run):
    outline = Outline(page.html([run]))
    cells = " ".join(outline.words)
    for figure in ("75.47 ± 0.01", "73.12", "70.01", "not measured", "no counter here", "a machine & more", "<DIR>"):
        assert figure in cells
    best = outline.all("tr", **{"class": "best"})
    assert len(best) == 2 and outline.words.count("best") == 2 + 2  # in both tables, and around two points
    assert "Quality against latency" in cells and "Quality against energy: not measured" in cells


def test_what_did_best_of_another_method_is_shaded(run):
    run["rows"] += [row("SP-SAD", 0.5, 0.60), row("SP-SAD", 0.25, 0.61)]
    text = page.html([{**run, "summary": report.summarise(run["rows"], Classification().judge)}])
    assert len(Outline(text).all("tr", **{"class": "selected"})) == 2 and "Shaded: of each other method" in text
    assert "Shaded" not in page.html([{**run, "summary": report.summarise(run["rows"][:4], Classification().judge)}])


def test_the_result_comes_first_in_a_sentence(run):
    words = Outline(page.html([run])).words
    sentence = next(word for word in words if "keeps" in word)
    assert sentence == (
        "LTH-SAD @ 0.5 keeps 50% of the weights and has a test accuracy of 73.12 %, where the dense SAD has 75.47 %; "
        "frozen, it answers in 0.5 ms at batch 1, 3.0 times as fast as the dense one frozen."
    )
    order = [words.index(word) for word in (sentence, "Quality against latency", "model", "Training (seed 0)")]
    assert order == sorted(order)


def test_of_several_that_have_learnt_validation_none_is_the_best(run):
    pruned = [entry for entry in run["summary"] if entry["target_density"] is not None]
    assert len(pruned) > 1 and verdict.best(run, run["summary"]) in pruned
    run["task"]["validation"] = "learnt"
    assert verdict.best(run, run["summary"]) is None and verdict.sentence(run, run["summary"]) == ""
    assert "keeps" not in " ".join(Outline(page.html([run])).words[:20])
    assert verdict.best(run, pruned[:1]) is pruned[0]


def test_the_sentence_names_what_does_better_without_a_network(run):
    run["baselines"] = [{"name": "ridge", "accuracy": 0.70}, {"name": "EASE"}]
    assert "no network" not in verdict.sentence(run, run["summary"])
    run["baselines"] += [{"name": "popularity", "accuracy": 0.74}, {"name": "ItemKNN", "accuracy": 0.7350}]
    assert verdict.sentence(run, run["summary"]).endswith(
        "as the dense one frozen; popularity, which is no network, has 74.00 %."
    )


def test_nothing_comes_from_outside(run):
    text = page.html([run])
    assert re.findall(r'(?:src|href)="(?!data:)([^"]*)"', text) == [
        "results.json"
    ]  # the raw data, which lies beside it
    assert not re.findall(r"@import|url\(|<script", text)
    assert "prefers-color-scheme: dark" in text


def test_what_a_run_says_is_text_and_not_markup(run):
    hostile = '<b onmouseover=x>"it\'s" & so</b>'
    run["task"]["name"] = run["protocol"]["machine"] = run["command"] = hostile
    for one in run["rows"]:
        one["name"] = one["energy_note"] = hostile
    text = page.html([{**run, "summary": report.summarise(run["rows"], Classification().judge)}])
    assert "<b on" not in text and hostile in Outline(text).words


def test_captions_speak_of_what_is_drawn(run):
    text = page.html([run])
    assert "Bars: one standard deviation" in text and "Mean ± standard deviation" in text
    assert "Pareto front" in text
    alone = [one for one in run["rows"] if one["seed"] == 0 and one["target_density"] != 0.25]
    for one in alone:
        one["metrics"]["accuracy"] = one["metrics"]["latency_ms_frozen"] = 0.5
    run["rows"], run["summary"] = alone, report.summarise(alone, Classification().judge)
    text = page.html([run])
    for word in ("deviation", "Pareto", "Beyond the axis", "↺: and"):
        assert (word in text) == (word == "↺: and")


def test_a_far_predictor_does_not_squeeze_the_students(run):
    """It is named in the caption; a near one has a line with its name."""
    run["baselines"] = [{"name": "constant", "accuracy": 0.01}, {"name": "ridge", "accuracy": 0.72}]
    text = page.html([run])
    assert "Beyond the axis: constant 1.00." in text
    assert re.search(r'<text class="name[^>]*>ridge 72.00</text>', text) and not re.search(r">constant 1.00</t", text)
    heights = [float(y) for y in re.findall(r'<circle class="dot"[^>]*cy="([\d.]+)"', text)]
    assert max(heights) - min(heights) > 100


def test_training_marks_prunes_and_rewinds(run):
    words = Outline(page.html([run])).words
    assert "50 % ↺" in words and "25 %" in words


def test_block_maps_are_pictures_of_the_masks(run):
    (first, _) = Outline(page.html([run])).all("img")
    data = base64.b64decode(first["src"].removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (3, 2)
    begin = data.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", data[begin - 8 : begin - 4])
    pixels = np.frombuffer(zlib.decompress(data[begin : begin + length]), np.uint8).reshape(2, 13)[:, 4::4]
    assert pixels.tolist() == [[0, 255, 0], [0, 0, 0]]
    assert first["title"] == "17% kept"


def test_several_runs_on_one_page(run, tmp_path):
    other = {**run, "task": {"name": "movielens", "goal": Regression().describe()}, "rows": [], "baselines": []}
    for name, one in (("a", run), ("b", {**other, "protocol": {"quick": True}})):
        report.write(one, tmp_path / name)
    paths = report.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert [path.name for path in paths] == ["merged.json", "report.md", "report.html"]
    words = Outline(paths[2].read_text()).words
    assert "pictures" in words and "movielens" in words and "A quick run: not to be quoted." in words
    assert paths[1].read_text().count(": distilled, pruned, frozen") == 2
    assert 'href="merged.json"' in paths[2].read_text()


def test_several_runs_are_compared_in_one_table_and_one_chart(run):
    """Of one task by its metric; of several by what each wins or loses beside the dense network of its own run."""
    faster = copy.deepcopy(run)
    for one in faster["rows"]:
        one["metrics"]["latency_ms_frozen"] /= 4
    faster["summary"] = report.summarise(faster["rows"], Classification().judge)
    runs = [{**run, "source": "a"}, {**faster, "source": "b"}]
    heading, rows, best = compare.table(runs)
    assert heading[:4] == ["model", "run", "test accuracy %", "better than dense %"]
    assert [row[:2] for row in rows[:4:3]] == [["SAD", "pictures, a"], ["SAD", "pictures, b"]] and best == {1, 4}
    assert rows[1][2] == "73.12" and rows[1][3] == f"{100 * (0.7312 / 0.7547 - 1):+.2f}" and rows[0][3] == "+0.00"
    chart = compare.chart(runs)
    assert (chart.x_label, chart.y_label) == ("ms at batch 1, frozen", "test accuracy %")
    assert chart.series[1].points[1][:2] == pytest.approx((0.125, 73.12))
    faster["task"]["name"] = "others"
    heading, rows, _ = compare.table([*runs[:1], faster])
    assert heading[2] == "test score" and rows[1][1:3] == ["pictures", "accuracy % 73.12"]
    assert compare.chart([*runs[:1], faster]).y_label == "better than the run's dense network, %"
    assert len(Outline(page.html(runs)).all("tr", **{"class": "best"})) == 2 + 4


def test_the_front_is_what_nothing_beats():
    points = [(1.0, 70.0), (2.0, 69.0), (2.0, 72.0), (3.0, 72.0), (4.0, 75.0)]
    assert pareto(points, higher_is_better=True) == [(1.0, 70.0), (2.0, 72.0), (4.0, 75.0)]
    assert pareto(points, higher_is_better=False) == [(1.0, 70.0), (2.0, 69.0)]
    assert pareto([], True) == []


@pytest.mark.parametrize("values", [[0.0, 1.0], [3.2, 3.9], [70.0], [0.0], [-5.0, 12345.0], [1e-5, 3e-5]])
def test_ticks_are_round_and_inside(values):
    scale = _Scale(values, 0.0, 100.0)
    assert 2 <= len(scale.ticks) <= 7
    assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in scale.ticks)
    assert all(0 <= scale(value) <= 100 for value in values)


def test_a_logarithmic_scale_has_its_ticks_at_powers_of_ten():
    scale = _LogScale([1.3, 10_240], 0.0, 100.0)
    assert scale.ticks == [1, 10, 100, 1000, 10_000]
    assert scale(100) - scale(10) == pytest.approx(scale(1000) - scale(100))
    assert 0 < scale(1.3) < scale(10_240) < 100
    assert 0 < _LogScale([20.0], 0.0, 100.0)(20.0) < 100
    with pytest.raises(ValueError, match="above 0, got 0"):
        _LogScale([0.0, 1.0], 0.0, 100.0)
    svg = Chart("x", "y", [Series("a", 0, [(10, 1, None, "low"), (1000, 100, None, "high")])], x_log=True, y_log=True)
    assert re.findall(r'class="tick"[^>]*>([^<]*)<', svg.svg()) == ["1", "10", "100", "10", "100", "1000"]


def test_names_of_lines_keep_apart():
    assert _apart([50.0, 52.0, 200.0], 15, 30, 300) == [50.0, 65.0, 200.0]
    assert _apart([290.0, 295.0, 299.0], 15, 30, 300) == [270.0, 285.0, 300.0]
    assert _apart([], 15, 30, 300) == []


def test_points_lie_where_the_axes_say():
    svg = Chart("x", "y", [Series("a", 0, [(0, 0, None, "low"), (10, 1, 0.5, "high")])]).svg()
    (low, high) = re.findall(r'<circle class="dot" cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert float(low[0]) < float(high[0]) and float(low[1]) > float(high[1])
    assert "<title>high</title>" in svg and Chart("x", "y").svg() == ""
