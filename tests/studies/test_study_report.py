"""Reports: what they say, that they are one safe file, and that a browser shows them without complaint."""

import html
import io
import re
import shutil
import subprocess
from base64 import b64decode

import pytest
from PIL import Image
from report_page import check_page

from metamask_plugin.errors import UserError
from metamask_plugin.studies.report import Picture, Report, TrialLine, duration, write_index, write_report
from metamask_plugin.studies.statistics import paired, summarise
from metamask_plugin.studies.tables import tables

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONG = "python main_pretrain.py --config-name cifar/metamask_barlow " + " ".join(
    f"key{i}=value" for i in range(40)
)


def png(size=(300, 150), dpi=150):
    content = io.BytesIO()
    Image.new("RGB", size, "red").save(content, "PNG", dpi=(dpi, dpi))
    return content.getvalue()


def full_report(word="word", states=("finished", "failed", "missing")):
    """A report with ``word`` wherever a user's name can stand."""
    rows = [
        {
            "arm": f"{arm} {word}",
            word: level,
            "seed": s,
            "checkpoint": "last",
            "metric": metric,
            "value": v + s,
        }
        for v, arm in enumerate("ab")
        for level in (word, f"2 {word}")
        for s in (5, 6, 7)
        for metric in ("knn200", word)
    ]
    factors, baseline = ["arm", word], {"arm": f"a {word}"}
    paper = [{"arm": f"a {word}", "metric": "knn200", "value": 85.72}]
    layout = {"rows": "arm", "columns": [word], "metrics": ["knn200", word], "title": word}
    return Report(
        title=f"Table {word}",
        source=f"Li et al. {word}",
        date="2026-11-22",
        claim=f"claim {word}",
        ran=f"ran {word}",
        verdicts=[f"verdict {word}"],
        tables=tables(layout, summarise(rows, factors), paper, factors),
        differences=tables(layout, paired(rows, factors, baseline), (), factors),
        baseline=f"arm = a {word}",
        figures=[Picture(f"title {word}", f"alt {word}", png())],
        arms=[("arm", f"level {word}", f"task={word}")],
        settings=f"name: {word}",
        trials=[
            TrialLine(f"{state} {word}", state, f"{LONG} {word}", 61.0, f"why {word}") for state in states
        ],
        environment={f"commit {word}": f"abc {word}"},
    )


def test_the_report_says_everything_and_is_one_file(tmp_path):
    path = write_report(tmp_path / "new" / "report.html", full_report())
    page = check_page(path)
    assert page.texts["title"] == page.texts["h1"] == ["Table word"]
    for text in (
        "Li et al. word",
        "claim word",
        "ran word",
        "verdict word",
        "name: word",
        "task=word",
        "why word",
    ):
        assert text in page.text
    assert page.text.count("1 of 3 trials, 1 failed") == 2
    assert "Differences to arm = a word" in page.text
    # the paper's number stands for both levels of the other factor
    assert page.text.count("paper 85.72") == 2
    assert page.texts["pre"] == ["name: word", *[f"{LONG} word"] * 3]
    assert "failed, 1 min 1 s" in page.text and "commit word" in page.text
    assert list(path.parent.iterdir()) == [path]


def test_tables_keep_their_shape(tmp_path):
    report = full_report()
    page = check_page(write_report(tmp_path / "report.html", report))
    cells = [
        cell for table in (*report.tables, *report.differences) for _, line in table.rows for cell in line
    ]
    extra = 2  # of "What differs"
    assert len(page.attributes("td")) == len(cells) + extra
    assert page.attributes("th")[0] == {"scope": "col", "rowspan": "2"}
    assert page.texts["strong"][0].startswith("+") is False
    marked = [cell.text for cell in cells if cell.marked]
    assert [text for text in page.texts["strong"] if not text.endswith("word")] == marked


def test_pictures_are_embedded_with_alt_text_and_their_size(tmp_path):
    (tmp_path / "figure.png").write_bytes(png())
    pictures = [Picture("bytes", "three bars", png()), Picture("file", "a curve", tmp_path / "figure.png")]
    page = check_page(write_report(tmp_path / "report.html", Report("t", "s", "d", figures=pictures)))
    for image, alt in zip(page.attributes("img"), ("three bars", "a curve")):
        assert b64decode(image["src"].split(",")[1]) == png()
        assert image["alt"] == alt
        assert (image["width"], image["height"]) == ("192", "96"), (
            "300 x 150 dots, 150 an inch, in CSS pixels"
        )


@pytest.mark.parametrize("content", [b"GIF89a", b"<svg onload=alert(1)>", "missing.png"])
def test_what_is_no_png_is_one_line_and_leaves_the_old_report(tmp_path, content):
    path = write_report(tmp_path / "report.html", Report("old", "s", "d"))
    picture = Picture("name", "alt", content if isinstance(content, bytes) else tmp_path / content)
    with pytest.raises(UserError, match="must be a PNG file") as error:
        write_report(path, Report("new", "s", "d", figures=[picture]))
    assert "\n" not in str(error.value)
    assert check_page(path).texts["h1"] == ["old"]


@pytest.mark.parametrize(
    "word",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "' onmouseover='alert(1)",
        "</style></title>&amp;",
    ],
)
def test_names_are_text_wherever_they_stand(tmp_path, word):
    path = write_report(tmp_path / "a" / "report.html", full_report(word))
    page = check_page(path)
    plain = check_page(write_report(tmp_path / "b" / "report.html", full_report()))
    tags = [
        (tag, {key: value.replace("word", word) for key, value in found.items()}) for tag, found in plain.tags
    ]
    assert page.tags == tags, "no name became a tag or an attribute"
    texts = {tag: [text.replace("word", word) for text in found] for tag, found in plain.texts.items()}
    assert page.texts == texts
    index = check_page(write_index(tmp_path), relative_links=True)
    assert f"Table {word}" in index.texts["a"]


def test_a_study_without_a_finished_trial(tmp_path):
    report = Report(
        "t", "s", "d", trials=[TrialLine("one", command="python main_pretrain.py"), TrialLine("two")]
    )
    page = check_page(write_report(tmp_path / "report.html", report))
    assert "0 of 2 trials" in page.text and "None yet: no trial is finished." in page.text
    assert "No numbers yet." in page.text and "Differences" not in page.text and "Figures" not in page.text
    assert page.text.count("not made yet") == 2


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["finished"] * 7 + ["missing"] * 17, "7 of 24 trials"),
        (["finished"] * 2, "all 2 trials"),
        (["finished", "failed"], "1 of 2 trials, 1 failed"),
        ([], "0 of 0 trials"),
    ],
)
def test_the_state_counts_trials(states, expected):
    assert Report("t", "s", "d", trials=[TrialLine("x", state) for state in states]).state == expected


def test_durations():
    assert [duration(s) for s in (0.4, 59.6, 3725, 170000)] == [
        "0 s",
        "1 min 0 s",
        "1 h 2 min",
        "47 h 13 min",
    ]


def test_the_index_lists_every_report_with_its_state_and_date(tmp_path):
    assert "No report yet." in check_page(write_index(tmp_path), relative_links=True).text
    write_report(tmp_path / "b study" / "report.html", Report("Second", "s", "2026-11-21"))
    write_report(tmp_path / "a#1" / "report.html", full_report())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.html").write_bytes(b"<p>\xff")
    (tmp_path / "empty").mkdir()
    page = check_page(write_index(tmp_path), relative_links=True)
    links = [link["href"] for link in page.attributes("a")]
    assert links == ["a%231/report.html", "b%20study/report.html", "broken/report.html"]
    assert page.texts["a"] == ["Table word", "Second", "broken"]
    assert page.texts["td"] == [
        *("1 of 3 trials, 1 failed", "2026-11-22"),
        *("0 of 0 trials", "2026-11-21"),
        *("unknown", "unknown"),
    ]


MEASURE = """<!DOCTYPE html><title>wait</title><iframe id=f width={width} height=900 srcdoc="{page}"></iframe>
<script>f.onload = () => {{
  const page = f.contentDocument.documentElement;
  document.title = [page.scrollWidth, page.clientWidth, f.contentDocument.images[0].naturalWidth,
    f.contentDocument.querySelectorAll("tbody tr").length].join(" ");
}};</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path")
@pytest.mark.parametrize("width", [400])
def test_a_browser_shows_it_without_complaint_or_overflow(tmp_path, width):
    page = write_report(tmp_path / "report.html", full_report("W" * 60 + " <script>alert(1)</script>"))
    # in a frame, as headless windows are not to be had that narrow everywhere
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(MEASURE.format(width=width + 4, page=html.escape(page.read_text())))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, wrapper.as_uri()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    measured = re.search(r"<title>(.*?)</title>", done.stdout)[1].split()
    full, visible, image, lines = map(int, measured)
    assert full <= visible <= width + 4, "the page is wider than the screen"
    assert image == 300 and lines == 4
