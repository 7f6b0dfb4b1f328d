"""plot.py: records are grouped by their fields, whatever their files and runs are called."""

import json
import math
import sys

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

import plot


def record(length, right, perplexity, **fields):
    facts = dict(
        run=f"run {fields}", pos="fope", seed=0, train_len=512, sigma=0.3, fourier_series=True, recompute=False
    )
    facts |= dict(logn=0.0, scaling="none", data="text", train_data="text", trials=10, torch="2", threads=1)
    return facts | dict(length=length, right=right, right_by_depth=[[0, 1]], perplexity=perplexity) | fields


RECORDS = [
    *(record(512, 2, 2.0, seed=0), record(512, 4, 4.0, seed=1), record(512, 9, 6.0, seed=12)),
    *(record(1024, 0, 3.0, seed=0), record(1024, 1, 3.5, seed=1), record(1024, 2, 4.0, seed=12)),
    *(record(512, 5, 7.25, pos="rope", seed=3), record(1024, 0, 8.0, pos="rope", seed=3)),
    *(record(512, 5, 7.0, pos="alibi"), record(1024, 0, math.inf, pos="alibi")),
    *(record(512, 2, 2.0, logn=2.0), record(1024, 7, 2.5, logn=2.0)),
]
TABLE = """\
| | seeds | 512 | 1024 |
|---|---|---|---|
| alibi: perplexity | 1 | 7.00 | inf |
| fope: perplexity | 3 | 4.00 (2.00-6.00) | 3.50 (3.00-4.00) |
| rope: perplexity | 1 | 7.25 | 8.00 |
| fope, logn 2: perplexity | 1 | 2.00 | 2.50 |
| alibi: passkey accuracy | 1 | 0.50 [0.24, 0.76] | 0.00 [0.00, 0.28] |
| fope: passkey accuracy | 3 | 0.50 (0.20-0.90) | 0.10 (0.00-0.20) |
| rope: passkey accuracy | 1 | 0.50 [0.24, 0.76] | 0.00 [0.00, 0.28] |
| fope, logn 2: passkey accuracy | 1 | 0.20 [0.06, 0.51] | 0.70 [0.40, 0.89] |"""


@given(st.permutations(RECORDS))
def test_records_in_any_order_give_one_table_with_mean_and_range_of_the_seeds(records):
    assert plot.table(records) == TABLE


# The last row is from Newcombe 1998, table I.
@pytest.mark.parametrize(
    "right, trials, low, high", [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_has_the_published_values(right, trials, low, high):
    assert plot.wilson(right, trials) == pytest.approx((low, high), abs=1e-4)


def test_two_seeds_that_differ_in_what_changes_no_result_are_seeds_of_one_run():
    for name in ("run", "out", "device", "threads", "torch", "compile", "recompute", "micro_tokens"):
        records = [record(512, 2, 2.0, seed=seed) | {name: f"value {seed}"} for seed in (9, 10)]
        assert "| fope: perplexity | 2 | 2.00 (2.00-2.00) |" in plot.table(records), name


LABELS = [  # the fields in which runs differ, and their labels
    ([{}, dict(seed=1)], ["fope"]),
    ([{}, dict(sigma=0.5)], ["fope, sigma 0.3", "fope, sigma 0.5"]),
    ([dict(sigma=9.0), dict(sigma=16.0), dict(pos="rope")], ["fope, sigma 16", "fope, sigma 9", "rope, sigma 0.3"]),
    ([{}, dict(pos="rope"), dict(fourier_series=False)], ["fope", "fope, no fourier_series", "rope"]),
    ([dict(logn=2.0), {}, dict(logn=1.0)], ["fope", "fope, logn 1", "fope, logn 2"]),
    ([{}, dict(pos="rope", scaling="yarn", scale=4.0)], ["fope", "rope, scaling yarn"]),  # scale goes with scaling
    ([{}, dict(pos="rope", trials=400)], ["fope, trials 10", "rope, trials 400"]),
    ([{}, dict(data="other")], ["fope, data other", "fope, data text"]),
    ([{}, dict(an_option_of_yours=1)], ["fope", "fope, an_option_of_yours 1"]),
    ([dict(run="before"), dict(run="after")], ["fope, run after", "fope, run before"]),  # the code was changed
]


@pytest.mark.parametrize("changes, labels", LABELS)
def test_a_label_says_what_differs_between_the_runs_shown(changes, labels):
    groups = plot.group([record(512, 2, 2.0, **fields) for fields in changes])
    assert sorted(groups) == sorted(labels)


def test_the_last_record_counts_of_a_measurement_that_was_made_anew():
    again = [record(512, 2, 2.0, run="a"), record(512, 3, 5.0, run="a", torch="3", threads=8)]
    assert "| fope: perplexity | 1 | 5.00 |" in plot.table(again)


def without(metric, some):
    return {field: value for field, value in some.items() if field != metric}


def test_what_no_record_of_a_length_holds_stays_blank():
    bare = without("right", record(1024, 0, 3.0))
    records = [record(512, 2, 2.0), bare, record(512, 2, 2.0, pos="rope", ratio=1.5)]
    assert "| fope: passkey accuracy | 1 | 0.20 [0.06, 0.51] |  |" in plot.table(records)
    assert "| rope: ratio to perplexity on the training text | 1 | 1.50 |  |" in plot.table(records)


def test_seeds_from_before_a_metric_was_added_stay_valid():
    old, new = without("right", record(512, 0, 2.0, seed=0)), record(512, 4, 3.0, seed=1)
    assert "| fope: passkey accuracy | 2 | 0.40 [0.17, 0.69] |" in plot.table([old, new])
    superseded = [record(512, 4, 2.0, run="a"), without("right", record(512, 0, 2.0, run="a"))]
    assert [axis.get_ylabel() for axis in plot.figure(superseded).axes] == ["perplexity"]


def test_a_length_that_one_seed_skipped_has_no_mean_over_the_others():
    records = [record(512, 2, 2.0), record(512, 4, 4.0, seed=1), record(1024, None, 3.0), record(1024, 9, 3.0, seed=1)]
    assert "| fope: passkey accuracy | 2 | 0.30 (0.20-0.40) | not measured |" in plot.table(records)
    line = plot.figure(records).axes[0].get_lines()[0]
    assert line.get_xydata().tolist() == [[512, pytest.approx(0.3)]]


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def lines_of(axis):
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


@pytest.fixture(scope="module")
def fig():
    return plot.figure(RECORDS[:10], "FoPE wins")


def test_figure_shows_mean_and_range_of_the_seeds(fig):
    for axis, means, low_high in zip(fig.axes, ([0.5, 0.1], [4, 3.5]), ([0, 0.9], [2, 6])):
        curve, band = lines_of(axis)["fope"], axis.collections[1].get_paths()[0]
        assert curve.get_xdata().tolist() == [512, 1024]
        assert curve.get_ydata().tolist() == pytest.approx(means)
        assert band.get_extents().intervaly.tolist() == pytest.approx(low_high)


@pytest.mark.parametrize("count", [2, 14])
def test_labels_at_the_ends_do_not_overlap(tmp_path, count):
    """All lines end at accuracy 0 and at almost one perplexity."""
    records = [record(length, i % 10 // length, 3 + i / 99, sigma=i) for i in range(count) for length in (512, 1024)]
    fig = plot.figure(records)
    fig.savefig(tmp_path / "a.png")
    boxes = [Text.get_window_extent(text) for axis in fig.axes for text in axis.texts]  # without the joint
    assert len(boxes) == 2 * count and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


LOG = [{"step": 1, "loss": 5.5}, {"step": 2, "loss": 9.0}, {"resumed": 1}, {"step": 2, "loss": 4.0}]
LOG += [{"step": 2, "val_loss": 4.5}]


def write(path, lines, end=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path


def test_loss_figure_leaves_out_what_a_resumed_run_wrote_again_and_half_a_line(tmp_path):
    log = write(tmp_path / "tiny-rope-s0/log.jsonl", LOG, '{"step": 3, "lo')
    (axis,) = plot.loss_figure([log]).axes
    assert [line.get_xydata().tolist() for line in axis.lines] == [[[1, 5.5], [2, 4.0]], [[2, 4.5]]]
    assert [text.get_text() for text in axis.texts] == ["tiny-rope-s0"]


def test_a_failed_figure_costs_one_line_but_a_bug_keeps_its_traceback(monkeypatch, tmp_path, capsys):
    assert not plot.save(tmp_path / "no folder/a.png", plot.figure, RECORDS)
    with pytest.raises(ZeroDivisionError):
        plot.save(tmp_path / "a.png", lambda records: 1 / 0, RECORDS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot.save(tmp_path / "a.png", plot.figure, RECORDS)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "No such file" in lines[0] and "matplotlib" in lines[1]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_run_folders_make_one_table_and_one_figure_of_each_kind(tmp_path, capsys):
    for i, some in enumerate((RECORDS[:6], RECORDS[6:])):
        write(tmp_path / f"{i}/eval.jsonl", some, '{"run": "half a li')
    write(tmp_path / "0/log.jsonl", LOG)
    plot.main([str(tmp_path / "0"), str(tmp_path / "1"), f"--out={tmp_path / 'new/all'}"])
    out = tmp_path / "new/all"
    assert sorted(path.name for path in out.iterdir()) == ["eval.md", "eval.png", "loss.png"]
    assert (out / "eval.md").read_text() == TABLE + "\n" and TABLE in capsys.readouterr().out
    assert matplotlib.image.imread(out / "eval.png").shape[1] == 1280  # 6.4 inches at 200 dpi
