"""plot.py: records are grouped by their fields, whatever their files and runs are called."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import plot


def record(length=512, right=2, perplexity=2.0, **fields):
    facts = dict(run=f"run {fields}", pos="fope", seed=0, train_len=512, sigma=0.3, fourier_series=True, logn=0.0)
    facts |= dict(scaling="none", data="text", trials=10, torch="2", threads=1, right_by_depth=[[0, 1]])
    return facts | dict(length=length, right=right, perplexity=perplexity) | fields


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


def test_wilson_has_the_published_values():
    assert plot.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert plot.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


FIELDS = {"pos": ["fope", "rope"], "seed": [0, 1], "length": [512, 1024], "data": ["text", "other"], "logn": [0.0, 2.0]}
FIELDS |= {"trials": [10, 400], "scaling": ["none", "yarn"], "clip_floor": [True, False], "an_option_of_yours": [1, 2]}
CHOICES = st.fixed_dictionaries({field: st.sampled_from(values) for field, values in FIELDS.items()})


@given(st.lists(CHOICES, min_size=1, max_size=9, unique_by=lambda choice: tuple(map(choice.get, FIELDS))))
def test_a_group_has_records_that_differ_in_seed_and_length_alone_and_every_record_is_in_one(choices):
    groups = plot.group([record(**choice) for choice in choices]).values()
    for some in groups:
        assert len({tuple(r[field] for field in FIELDS if field not in ("seed", "length")) for r in some}) == 1
    assert sum(map(len, groups)) == len(choices)


def test_what_changes_no_result_tells_no_seeds_apart():
    records = [record(seed=seed, device=f"card {seed}", threads=seed, micro_tokens=seed) for seed in (9, 10)]
    assert "| fope: perplexity | 2 | 2.00 (2.00-2.00) |" in plot.table(records)


LABELS = [  # the fields in which runs differ, and their labels
    ([{}, dict(sigma=0.5)], ["fope, sigma 0.3", "fope, sigma 0.5"]),
    ([{}, dict(pos="rope"), dict(fourier_series=False)], ["fope", "fope, no fourier_series", "rope"]),
    ([{}, dict(pos="rope", scaling="yarn", scale=4.0)], ["fope", "rope, scaling yarn"]),  # scale goes with scaling
    ([dict(run="before"), dict(run="after")], ["fope, run after", "fope, run before"]),  # the code was changed
]


@pytest.mark.parametrize("changes, labels", LABELS)
def test_a_label_says_what_differs_between_the_runs_shown(changes, labels):
    groups = plot.group([record(**fields) for fields in changes])
    assert sorted(groups) == sorted(labels)


def test_the_last_record_counts_of_a_measurement_that_was_made_anew():
    again = [record(512, 2, 2.0, run="a"), record(512, 3, 5.0, run="a", torch="3", threads=8)]
    assert "| fope: perplexity | 1 | 5.00 |" in plot.table(again)


def test_what_a_record_does_not_hold_stays_blank_and_a_metric_of_newer_records_counts():
    older = {field: value for field, value in record(seed=1).items() if field != "right"}
    records = [older, record(), record(pos="rope", ratio=1.5), record(1024, pos="rope")]
    assert "| fope: passkey accuracy | 2 | 0.20 [0.06, 0.51] |  |" in plot.table(records)
    assert "| rope: ratio to perplexity on the training text | 1 | 1.50 |  |" in plot.table(records)
    assert [axis.get_ylabel() for axis in plot.figure([older]).axes] == ["perplexity"]


def test_a_length_that_one_seed_skipped_has_no_mean_over_the_others():
    records = [record(512, 2, 2.0), record(512, 4, 4.0, seed=1), record(1024, None, 3.0), record(1024, 9, 3.0, seed=1)]
    assert "| fope: passkey accuracy | 2 | 0.30 (0.20-0.40) | not measured |" in plot.table(records)
    line = plot.figure(records).axes[0].get_lines()[0]
    assert line.get_xydata().tolist() == [[512, pytest.approx(0.3)]]


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def test_figure_shows_mean_and_range_of_the_seeds():
    for axis, means, low_high in zip(plot.figure(RECORDS).axes, ([0.5, 0.1], [4, 3.5]), ([0, 0.9], [2, 6])):
        (curve,) = (line for line in axis.lines if line.get_label() == "fope")
        assert curve.get_xdata().tolist() == [512, 1024] and curve.get_ydata().tolist() == pytest.approx(means)
        bands = [band.get_paths()[0].get_extents().intervaly.tolist() for band in axis.collections]
        assert pytest.approx(low_high) in bands


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


def test_run_folders_make_one_table_and_one_figure_of_each_kind(tmp_path, capsys):
    for i, some in enumerate((RECORDS[:6], RECORDS[6:])):
        write(tmp_path / f"{i}/eval.jsonl", some, '{"run": "half a li')
    write(tmp_path / "0/log.jsonl", LOG)
    plot.main([str(tmp_path / "0"), str(tmp_path / "1"), f"--out={tmp_path / 'new/all'}"])
    out = tmp_path / "new/all"
    assert sorted(path.name for path in out.iterdir()) == ["eval.md", "eval.png", "loss.png"]
    assert (out / "eval.md").read_text() == TABLE + "\n" and TABLE in capsys.readouterr().out
