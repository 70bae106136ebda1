"""docs/settings.md: as the tool writes it, and each of its statements held against the composed configs."""

import importlib.util
from pathlib import Path

import pytest

from metamask_plugin.errors import UserError

TOOL = Path(__file__).resolve().parents[1] / "tools" / "settings_page.py"
spec = importlib.util.spec_from_file_location("settings_page", TOOL)
settings_page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(settings_page)

STATEMENTS = [statement for group in settings_page.source()[1] for statement in group["statements"]]


def of(kind):
    """The statements that a test is about, called by section and key."""
    chosen = [s for s in STATEMENTS if "key" in s and s["value"] is not None and ("deviation" in s) == kind]
    return pytest.mark.parametrize("statement", chosen, ids=lambda s: f"{s['section']} {s['key']}")


def agreeing(statement):
    """By config or study: whether each of its values is the paper's."""
    found = settings_page.values(statement)
    assert found
    return {
        name: [settings_page.agrees(v, statement["value"]) for v in several]
        for name, several in found.items()
    }


@of(False)
def test_a_setting_is_the_papers(statement):
    assert all(all(several) for several in agreeing(statement).values()), settings_page.values(statement)


@of(True)
def test_a_deviation_is_one(statement):
    """A mended one must lose its reason."""
    assert not any(any(several) for several in agreeing(statement).values()), settings_page.values(statement)


def test_what_the_papers_do_not_give_has_a_reason_and_nothing_has_two():
    for statement in STATEMENTS:
        reasons = statement.keys() & {"deviation", "chosen", "note"}
        assert (reasons == {"chosen"}) == (statement["value"] is None), statement
        assert len(reasons) == 1 or not reasons and statement["sentence"] != "-", statement
        assert ("key" in statement) != ("here" in statement), statement


def test_every_config_probe_and_study_has_its_statements():
    covered = {name for statement in STATEMENTS for name in settings_page.matching(statement["of"])}
    assert covered == set(settings_page.names())


def test_the_page_is_what_the_tool_writes():
    assert settings_page.PAGE.read_text() == settings_page.page(), "make settings"


def test_a_value_counts_as_the_papers_up_to_rounding():
    assert settings_page.agrees([5e-4 * 512 / 256, [1, "adam"]], [1e-3, [1.0, "adam"]])
    assert not settings_page.agrees(1.01e-3, 1e-3)
    assert not settings_page.agrees([1], [1, 2])
    assert not settings_page.agrees(None, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "optimizer.rate"}, "must have the key optimizer.rate, got none called rate"),
        ({"of": ["pretrain/cifra/*"]}, "of must match a config or a study"),
        ({"of": ["study/metamask_fig8"], "where": {"encoder": ["medium"]}}, "where must match a trial"),
    ],
)
def test_a_statement_about_nothing_is_refused(change, message):
    statement = {"of": ["pretrain/cifar/metamask_barlow"], "key": "max_epochs", "with": (), "where": {}}
    with pytest.raises(UserError, match=message):
        settings_page.values(statement | change)


def test_check_refuses_a_page_that_was_changed(tmp_path, monkeypatch):
    source, written = tmp_path / "settings.yaml", tmp_path / "settings.md"
    monkeypatch.setattr(settings_page, "SOURCE", source)
    monkeypatch.setattr(settings_page, "PAGE", written)
    source.write_text("""
introduction: "{} statements, {} differ"
groups:
  - title: One
    about: Of one.
    of: [pretrain/metamask_barlow]
    statements: [{section: "4", sentence: "-", key: method_kwargs.alpha, value: 10, deviation: So.}]
""")
    with pytest.raises(SystemExit, match="make settings"):
        settings_page.main(["--check"])
    settings_page.main([])
    assert written.read_text().startswith("1 statements, 1 differ")
    assert "| 4 | – |  | `method_kwargs.alpha` | 10 | **100** | So. |" in written.read_text()
    settings_page.main(["--check"])
    written.write_text(written.read_text().replace("100", "10"))
    with pytest.raises(SystemExit, match="make settings"):
        settings_page.main(["--check"])
