"""plot.py: tables and figures from eval.json files, loss curves from log.jsonl files."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import matplotlib.image
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

import plot

ROOT = Path(__file__).resolve().parent.parent


def result_of(name, passkey, perplexity, **changes):
    """A result at two lengths and 10 trials, as read_result() returns it."""
    seed = int(name.split("-s")[-1])
    facts = {"train_len": 512, "step": 9, "trials": 10, "data": "books", "dtype": "float32", "lengths": [512, 1024]}
    config = {"seed": seed, "pos": "fope", "sigma": 0.3, "device": "auto", "init_from": f"out/start-s{seed}"}
    measured = {"name": name, "file": f"out/{name}/eval.json", "passkey": passkey, "perplexity": perplexity}
    return facts | measured | changes | {"config": config | changes.get("config", {})}


RESULTS = [
    result_of("small-fope-s0", [2, 0], [2.0, 3.0]),
    result_of("small-fope-s1", [4, 1], [4.0, 3.5]),
    result_of("small-fope-s12", [9, 2], [6.0, 4.0]),
    result_of("small-rope-s3", [5, 0], [7.25, 8.0]),
    result_of("small-nope-s0", [5, 0], [7.25, 8.0]),
    result_of("small-alibi-s0", [5, 0], [7.0, math.inf]),
]


# ---------------------------------------------------------------------------------------------------------------------
# The table

TABLE = """\
| | seeds | 512 | 1024 |
|---|---|---|---|
| small-fope: perplexity | 3 | 4.00 (2.00-6.00) | 3.50 (3.00-4.00) |
| small-rope: perplexity | 1 | 7.25 | 8.00 |
| small-nope: perplexity | 1 | 7.25 | 8.00 |
| small-alibi: perplexity | 1 | 7.00 | inf |
| small-fope: passkey | 3 | 0.50 (0.20-0.90) | 0.10 (0.00-0.20) |
| small-rope: passkey | 1 | 0.50 [0.24, 0.76] | 0.00 [0.00, 0.28] |
| small-nope: passkey | 1 | 0.50 [0.24, 0.76] | 0.00 [0.00, 0.28] |
| small-alibi: passkey | 1 | 0.50 [0.24, 0.76] | 0.00 [0.00, 0.28] |"""


def test_table_has_mean_and_range_of_seeds_and_an_interval_for_one():
    assert plot.table(RESULTS) == TABLE


def test_table_has_the_ratio_only_where_every_seed_has_it():
    first, second = RESULTS[0] | {"perplexity_ratio": [1.5, 2.0]}, RESULTS[1] | {"perplexity_ratio": [2.5, 4.0]}
    row = "| small-fope: ratio to perplexity on own data | 2 | 2.00 (1.50-2.50) | 3.00 (2.00-4.00) |"
    assert row in plot.table([first, second])
    assert "ratio" not in plot.table([first, RESULTS[1] | {"perplexity_ratio": []}])


# The last row is from Newcombe 1998, table I.
WILSON = [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662)]


@pytest.mark.parametrize("right, trials, low, high", WILSON)
def test_wilson_has_the_published_values(right, trials, low, high):
    assert plot.wilson(right, trials) == pytest.approx((low, high), abs=1e-4)


UNLIKE = [  # what differs in the second seed, and what the message says
    ({"trials": 400}, "trials 10 and 400"),
    ({"lengths": [512, 2048]}, "[512, 1024] and [512, 2048]"),
    ({"data": "C4"}, "data books and C4"),
    ({"dtype": "bfloat16"}, "dtype float32 and bfloat16"),
    ({"step": 10}, "step 9 and 10"),
    ({"train_len": 256}, "train_len 512 and 256"),
    ({"config": {"sigma": 0.5}}, "--sigma 0.3 and 0.5"),
    ({"config": {"init_from": "out/rope-s1"}}, "--init_from out/start and out/rope"),
    ({"config": {"seed": 0}}, "same name and seed 0"),
]


@pytest.mark.parametrize("changes, words", UNLIKE)
def test_unlike_results_are_not_averaged(changes, words):
    with pytest.raises(ValueError) as error:
        plot.table([RESULTS[0], result_of("small-fope-s1", [4, 1], [4.0, 3.5], **changes)])
    assert words in str(error.value)
    assert "out/small-fope-s0/eval.json and out/small-fope-s1/eval.json" in str(error.value)


LIKE = [  # what may differ between two seeds
    {"config": {"device": "cuda"}},
    {"config": {"init_from": "out/start-s1"}},  # each seed continues the run of its own seed
    {"config": {"field of a later version": 1}},
    {"scaling": "none"},  # a field that the first result does not have
]


@pytest.mark.parametrize("changes", LIKE)
def test_seeds_may_differ_in_what_changes_no_result(changes):
    pair = [RESULTS[0], result_of("small-fope-s1", [4, 1], [4.0, 3.5], **changes)]
    assert "| small-fope: passkey | 2 |" in plot.table(pair)


# ---------------------------------------------------------------------------------------------------------------------
# The figures


def drawn(draw, *args, **options):
    """The figure that draw() saves."""
    with mock.patch.object(Figure, "savefig", autospec=True, side_effect=Figure.savefig) as save:
        assert draw(*args, **options)
    return save.call_args.args[0]


def lines_of(axis):
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


@pytest.fixture(scope="module")
def fig(tmp_path_factory):
    return drawn(plot.figure, RESULTS, tmp_path_factory.mktemp("figure") / "eval.png", title="FoPE wins")


def test_figure_shows_mean_and_range_of_the_seeds(fig):
    for axis, means, low_high in zip(fig.axes, ([0.5, 0.1], [4, 3.5]), ([0, 0.9], [2, 6])):
        curve, band = lines_of(axis)["small-fope (3 seeds)"], axis.collections[0].get_paths()[0]
        assert curve.get_xdata().tolist() == [512, 1024]
        assert curve.get_ydata().tolist() == pytest.approx(means)
        assert band.get_extents().intervaly.tolist() == pytest.approx(low_high)


def test_figure_has_labels_the_training_length_and_a_title(fig):
    assert fig.get_suptitle() == "FoPE wins"
    assert [axis.get_ylabel() for axis in fig.axes] == ["passkey accuracy", "validation perplexity"]
    for axis in fig.axes:
        assert axis.get_xlabel() == "length in tokens"
        assert [text.get_text() for text in axis.get_xticklabels()] == ["512\n= N", "1024"]
        assert [512, 512] in [list(line.get_xdata()) for line in axis.lines]  # upright


def test_fope_is_thick_and_colored_rope_black_the_others_thin_and_grey(fig):
    fope, rope, nope, alibi = lines_of(fig.axes[0]).values()
    assert fope.get_linewidth() > rope.get_linewidth() > nope.get_linewidth() == alibi.get_linewidth()
    assert len(set(to_rgb(fope.get_color()))) > 1 and to_rgb(rope.get_color()) == (0, 0, 0)
    assert nope.get_color() == alibi.get_color() == "0.45"
    assert len({line.get_marker() for line in (fope, rope, nope, alibi)}) == 4


@pytest.mark.parametrize("count", [2, 14])
def test_labels_at_the_ends_do_not_overlap(tmp_path, count):
    """All lines end at accuracy 0 and at almost one perplexity."""
    results = [result_of(f"run{i}-s0", [i % 10, 0], [3, 3 + i / 99]) for i in range(count)]
    axes = drawn(plot.figure, results, tmp_path / "eval.png").axes
    boxes = [Text.get_window_extent(text) for axis in axes for text in axis.texts]  # without the joint
    boxes += [axis.xaxis.label.get_window_extent() for axis in axes]
    assert len(boxes) == 2 * count + 2
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_reference_results_are_dashed_lines_beside_a_run_of_the_same_name(tmp_path):
    axes = drawn(plot.figure, RESULTS[:1], tmp_path / "eval.png", reference=RESULTS[:3]).axes
    lines = {line.get_label(): line.get_linestyle() for line in axes[0].lines if line.get_label()[0] != "_"}
    assert lines == {"small-fope (1 seed)": "-", "small-fope reference (3 seeds)": "--"}


def test_figure_against_what_is_varied_has_a_line_for_each_length(tmp_path):
    varied = {"small-rope": 0, "small-fope": 0.3}
    axes = drawn(plot.figure, RESULTS[:4], tmp_path / "eval.png", xlabel="sigma", varied=varied).axes
    expected = ({0: (0.5, 0), 0.3: (0.5, 0.1)}, {0: (7.25, 8), 0.3: (4, 3.5)})  # value: at 512, at 1024
    for axis, at in zip(axes, expected):
        assert axis.get_xlabel() == "sigma" and list(lines_of(axis)) == ["512 tokens = N", "1024 tokens"]
        for i, line in enumerate(lines_of(axis).values()):
            points = dict(zip(line.get_xdata(), line.get_ydata()))
            assert points == pytest.approx({value: both[i] for value, both in at.items()})


LOG = [{"step": 1, "loss": 5.5, "lr": 1}, {"step": 2, "loss": 4.0, "lr": 1}, {"step": 2, "val_loss": 4.5}]


def run_folder(folder, log=LOG, result=None):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    if result:
        (folder / "eval.json").write_text(json.dumps(result))
    return folder


def test_loss_figure_shows_training_and_validation_loss(tmp_path):
    log = run_folder(tmp_path / "tiny-rope-s0") / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "lo')  # a line that is being written
    (axis,) = drawn(plot.loss_figure, [log], tmp_path / "loss.png").axes
    assert [line.get_xydata().tolist() for line in axis.lines] == [[[1, 5.5], [2, 4.0]], [[2, 4.5]]]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("step", "loss (nats per token)")
    assert [text.get_text() for text in axis.texts] == ["tiny-rope-s0"]


@pytest.mark.parametrize("module", ["matplotlib", "matplotlib.figure"])
def test_without_matplotlib_one_line_says_so(monkeypatch, tmp_path, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert not plot.figure(RESULTS, tmp_path / "eval.png")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no figure" in error and "matplotlib" in error


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_command_overlays_run_folders_and_needs_no_other_file_of_the_project(tmp_path):
    shutil.copy(ROOT / "plot.py", tmp_path)
    folders = [run_folder(tmp_path / result["name"], LOG, result) for result in RESULTS]
    folders.append(run_folder(tmp_path / "unfinished"))
    command = [sys.executable, "plot.py", *folders, "--out=new/all"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=100)
    out = tmp_path / "new/all"
    assert sorted(path.name for path in out.iterdir()) == ["eval.md", "eval.png", "loss.png"]
    assert (out / "eval.md").read_text() == TABLE + "\n" and TABLE in done.stdout
    assert "unfinished has no eval.json: only its loss is drawn" in done.stdout
    assert matplotlib.image.imread(out / "eval.png").shape[1] == 1280  # 6.4 inches at 200 dpi


BAD = [  # arguments, and what the line says
    ("{d}/good/eval.json {d}/good", "same name and seed 0"),
    ("{d}/nothing", "nothing: name the folder of a run"),
    ("{d}/empty", "empty has no eval.json and no log.jsonl"),
    ("{d}/cut.json", "cut.json is not a whole result"),
    ("{d}/unequal.json", "unequal.json is not a whole result"),
    ("{d}/list.json", "list.json is not a whole result"),
    ("{d}/no-loss", "no-loss/log.jsonl has no loss yet"),
    ("{d}/good/eval.json {d}/bad.jsonl", "bad.jsonl is not a log of train.py"),
    ("{d}/good --out={d}/cut.json", "cut.json"),
    ("{d}/good --ou={d}/new", "--ou"),
]


@pytest.mark.parametrize("argv, words", BAD)
def test_bad_input_gets_one_line_and_writes_nothing(tmp_path, argv, words):
    run_folder(tmp_path / "good", LOG, RESULTS[0])
    run_folder(tmp_path / "no-loss", [])
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.json").write_text(json.dumps(RESULTS[0])[:-20])
    (tmp_path / "unequal.json").write_text(json.dumps(RESULTS[0] | {"passkey": [1]}))
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "bad.jsonl").write_text('{"loss": 1}\n')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        plot.main(argv.format(d=tmp_path).split())
    assert words in end.value.code and "\n" not in end.value.code  # Python prints it, and exits with status 1
    assert sorted(tmp_path.rglob("*")) == before
