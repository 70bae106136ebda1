"""Names of studies, classes, files and runs: in a page, a table, a picture, a terminal they are only text."""

import csv
import json
import re
import shutil
import subprocess

import pytest
import torch
from composing import composed
from report_page import check_page

from metamask_plugin.cli import knn
from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.cli.study import sweep
from metamask_plugin.errors import UserError, printable
from metamask_plugin.evaluation.figures import save
from metamask_plugin.evaluation.maps import class_maps
from metamask_plugin.evaluation.report import format_table
from metamask_plugin.evaluation.semantic_figures import region_bars
from metamask_plugin.studies.report import Report, write_index, write_report
from metamask_plugin.studies.tables import write_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MARKUP = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    '" style="background:url(javascript:alert(1))',
    "javascript:alert(1)",
    "</title></style></pre><svg onload=alert(1)>",
    "<!--",
    "]]><iframe src=//example.org>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;script&gt;&#x3c;b&#x3e;",
]
"""What would be markup, a handler, a link or a template's expression, were it not escaped."""

TERMINAL = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "a\rb", "a\nerror: b", "\u202ecba", "\x00", "\x08\x08"]
"""What clears a screen, renames a window, colours, overwrites a line, adds one, or turns the direction."""

security = pytest.mark.fault("security")


def study(folder, *overrides):
    """A study's pages before any trial: all of its texts, and the names of its checkpoints, stand in them."""
    given = [f"dir={folder}", "size=smoke", "seeds=[5]", "report_only=True", *overrides]
    return composed("study", "confounder_audit", *given)


@security
@pytest.mark.parametrize("text", MARKUP)
def test_a_studys_names_are_text_in_its_page_and_in_the_index(tmp_path, text):
    def page_of(word):
        folder = tmp_path / ("a" if word == "word" else "b")
        cfg = study(folder)
        for key in ("title", "source", "claim"):
            cfg[key] = f"{word} {key}"
        cfg.checkpoint = [f"{word}.ckpt"]
        report = sweep(cfg, lambda jobs, first: [])
        return check_page(report), check_page(write_index(folder), relative_links=True)

    for page, plain in zip(page_of(text), page_of("word")):
        assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
        assert [list(found) for _, found in page.tags] == [list(found) for _, found in plain.tags]
        # of the page's own texts none went, and the name is there as it was written
        assert " ".join(f"{text} title".split()) in page.text


@security
@pytest.mark.parametrize("text", MARKUP)
def test_a_folders_name_is_text_in_the_index_and_its_link_stays_inside(tmp_path, text):
    name = text.replace("/", "\u2215")
    write_report(tmp_path / name / "report.html", Report("title", "source", "date"))
    page = check_page(write_index(tmp_path), relative_links=True)
    (link,) = page.attributes("a")
    assert re.fullmatch(r"[\w.~%-]+/report\.html", link["href"])
    assert " ".join(name.split()) in page.text


@security
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium")
def test_a_browser_runs_nothing_even_without_the_pages_own_policy(tmp_path):
    sets_title = [text.replace("alert(1)", "document.title=1") for text in MARKUP]
    page = write_report(tmp_path / "report.html", Report(" ".join(sets_title), sets_title[1], sets_title[0]))
    content = page.read_text()
    assert content.count("Content-Security-Policy") == 1
    probe = "<script>document.body.dataset.ran='yes'</script></body>"
    page.write_text(content.replace('http-equiv="Content-Security-Policy"', "").replace("</body>", probe))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert 'data-ran="yes"' in shown, "scripts do run here"
    assert "<title>1</title>" not in shown
    assert shown.count("<script") == 1 and "<svg" not in shown and "<iframe" not in shown


@security
@pytest.mark.parametrize("text", ["\x1b[2J", "a\nerror: b", "a\n\nb", '","', '"', "\u202ecba", ";"])
def test_a_names_line_ends_and_quotes_stay_in_its_cell(tmp_path, text):
    write_rows([{"arm": text, "seed": seed, "value": 1.0} for seed in (5, 6)], tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["arm", "seed", "value"], [text, "5", "1.0"], [text, "6", "1.0"]]


@security
@pytest.mark.parametrize("text", TERMINAL)
def test_a_table_of_text_keeps_its_lines(text):
    shown = format_table([{"features": text, "knn5": 1.0}, {"features": "b", "knn5": 2.0}])
    assert len(shown.split("\n")) == 4
    assert all(line.isprintable() for line in shown.split("\n"))


@security
@pytest.mark.parametrize("text", TERMINAL)
def test_an_error_line_does_nothing_to_a_terminal(tmp_path, capsys, text):
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError(f"data.train_path must be a folder, got {text}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data.train_path must be a folder") and line.isprintable()
    if "\x00" in text:
        return  # no file's name
    folder = tmp_path / f"run {text}"
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"backbone": {"name": f"conv{text}"}}))
    torch.save({"state_dict": {"backbone.x": torch.zeros(1)}}, folder / "last.ckpt")
    with pytest.raises(SystemExit) as stop:
        knn.main(["--pretrained_checkpoint_dir", str(folder)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and line.isprintable()


def test_words_of_any_language_stay_as_they_are():
    assert printable("Prüfung, 検査, проверка: 100 % – 'ok'") == "Prüfung, 検査, проверка: 100 % – 'ok'"


@security
@pytest.mark.parametrize("name", [r"$\foo$", "$x^$", "a$b$c", "$"])
def test_a_classes_or_a_runs_name_is_no_formula(tmp_path, name):
    classes = [name, "other"]
    save(class_maps({name: torch.randn(8, 2)}, torch.arange(8) % 2, classes, name), tmp_path / "map.png")
    row = {"name": name, "trained on": "full", "tested on": "full", "knn5": 50.0, "linear": 60.0}
    save(region_bars([row]), tmp_path / "bars.png")
    assert (tmp_path / "map.png").stat().st_size > 0 and (tmp_path / "bars.png").stat().st_size > 0
