"""lesson/index.html: its data are those of fope.py and the records, and in a browser its numbers are fope.py's.

python -m pytest -n 0 -m browser tests/test_lesson_page.py     needs selenium, Chromium and chromedriver
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from fope import FoPE, RoPE, log_n
from paper import figures

TEXT = figures.PAGE.read_text(encoding="utf-8")
DATA = json.loads(re.search(r'id="data">\n(.*?)</script>', TEXT, re.DOTALL)[1])


def test_it_loads_nothing_and_its_data_are_up_to_date():
    assert not re.search(r"https?:|fetch|import|<link|src=", TEXT)
    assert figures.page() == TEXT, "run: python paper/figures.py"


def test_its_data_are_the_mean_and_the_range_over_the_seeds():
    records = [json.loads(line) for line in (figures.RESULTS / "tiny/eval.jsonl").read_text().splitlines()]
    assert {run["pos"] for run in DATA["runs"]} >= {"rope", "fope", "alibi", "kerple"}
    for run in DATA["runs"]:
        seeds = {r["seed"]: r for r in records if (r["run"], r["logn"], r["length"]) == (run["pos"], run["p"], 1024)}
        rates = [r["right"] / r["trials"] for r in seeds.values()]
        for name, x in (("right", rates), ("perplexity", [r["perplexity"] for r in seeds.values()])):
            assert run[name][1] == pytest.approx([np.mean(x), min(x), max(x)], abs=0.00501)
        assert run["seeds"] == len(seeds)


# ----------------------------------------------------------------------------------------------------------------------
# In a browser

browser = pytest.mark.browser
SETTINGS = [dict(), dict(N=12, theta=5.7, d=7, sigma=1.5, coefficients=3, amplitudes=2)]


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("no Chromium with chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(chromedriver)) as driver:
        yield driver


@pytest.fixture
def page(driver):
    """page(javascript, ..) in a fresh page. Afterwards, the console must be empty."""
    driver.get("about:blank")
    driver.get(figures.PAGE.as_uri())
    yield driver.execute_script
    assert driver.get_log("browser") == []


def move(page, **values):
    """Sets sliders, as a hand does."""
    for name, value in values.items():
        page("element(arguments[0]).value = arguments[1]", name, value)
        assert float(page("return element(arguments[0]).value", name)) == value
        page("element(arguments[0]).dispatchEvent(new Event('input', {bubbles: true}))", name)


def modules(page):
    """fope.py's modules with the frequencies and coefficients of the page."""
    N, theta, d = page("return ['N', 'theta', 'd'].map(get)")
    shape = dict(n_head=1, head_dim=int(d), train_len=int(N), theta=theta, seed=0)
    fope = FoPE(**shape)
    fope.coef = torch.tensor(page("return embedding('fope').coef"), dtype=torch.float64)[:, None]
    return dict(rope=RoPE(head_dim=int(d), theta=theta), clipped=FoPE(**shape, fourier_series=False), fope=fope)


@browser
@pytest.mark.parametrize("setting", SETTINGS)
def test_frequencies_cos_and_sin_and_the_logit(page, setting):
    page("location.hash = 'floor'; show()")
    move(page, **setting)
    for name, position in modules(page).items():
        assert page("return embedding(arguments[0]).omega", name) == pytest.approx(position.omega.tolist(), abs=1e-12)
        d, t = position.head_dim, torch.tensor([0, 1, 37, 511, 8191])
        cos_sin = position.cos_sin(t, torch.float64)[:, 0]  # (2, T, M): clipped pairs may be left out
        script = "return arguments[1].map((t) => cosSin(embedding(arguments[0]), t))"
        found = torch.tensor(page(script, name, t.tolist()), dtype=torch.float64).transpose(0, 1)
        torch.testing.assert_close(found[..., : cos_sin.shape[-1]], cos_sin, atol=1e-5, rtol=0)
        both = torch.tensor(page("return queryAndKey()"), dtype=torch.float64).view(2, 64, 2)[:, : d // 2]
        q, k = both.transpose(1, 2).reshape(2, 1, 1, 1, d).expand(2, 1, 1, len(t), d)  # pair m is (m, m + d/2)
        qs, ks = position(q, k, t)
        for i, j in ((0, 0), (2, 1), (4, 3)):
            script = "return sum(terms(embedding(arguments[0]), queryAndKey(), arguments[1], arguments[2]))"
            logit = page(script, name, t[i].item(), t[j].item())
            assert logit == pytest.approx((qs[0, 0, i] @ ks[0, 0, j]).item(), abs=1e-5)
    clipped = position.head_dim // 2 - len(position.omega)
    assert page("return element('floor-says').textContent").startswith(f"{clipped} of {position.head_dim // 2} pairs")


@browser
@pytest.mark.parametrize("coef_init", ["xavier", "normal"])
def test_the_coefficients_have_the_size_of_fopes(page, coef_init):
    page("element('normal').checked = arguments[0]", coef_init == "normal")
    expected = FoPE(n_head=8, head_dim=64, train_len=512, seed=0, coef_init=coef_init)
    drawn = []
    for draw in range(1, 11):
        move(page, coefficients=draw)
        drawn.append(page("return embedding('fope').coef"))
    drawn = torch.tensor(drawn).flatten(1)
    assert drawn.std() == pytest.approx(expected.coef.std().item(), rel=0.05)
    assert (drawn.corrcoef() - torch.eye(10)).abs().max() < 5 / drawn.shape[1] ** 0.5  # the draws are independent


@browser
def test_the_share_is_that_of_softmax_with_log_n(page):
    for n, lead, p in ((8192, 8.0, 0.0), (2048, 3.0, 2.0), (128, 8.0, 2.0)):
        q = log_n(torch.ones(1, 1, 1, 1, dtype=torch.float64), n - 1, 512, p).item()
        logits = torch.zeros(n, dtype=torch.float64)
        logits[0] = q * lead
        found = page("return share(arguments[0], 512, arguments[1], arguments[2])", n, lead, p)
        assert found == pytest.approx(logits.softmax(0)[0].item(), abs=1e-5)


@browser
def test_the_table_shows_the_records_and_what_was_not_measured(page):
    page("location.hash = 'measured'; show(); data.runs.find((run) => run.pos === 'rope' && run.p === 2).right[4] = []")
    move(page, power=2, length=4)
    rows = [re.findall(r"<td>([^<]+)", row) for row in page("return element('measured-says').innerHTML").split("<tr>")]
    for run in (run for run in DATA["runs"] if run["p"] == 2):
        (row,) = [row for row in rows if row and row[0].lower().startswith(run["pos"])]
        perplexity, low, high = run["perplexity"][4]
        right = "{:.2f} ({:.2f}–{:.2f})".format(*run["right"][4]) if run["pos"] != "rope" else "not measured"
        assert row[1:] == [right, f"{perplexity:.2f} ({low:.2f}–{high:.2f})"]
