"""One self-contained HTML file for each study, and a page that lists them."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.files import write_whole
from metamask_plugin.studies.tables import Table

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Picture:
    """A figure of a report.

    Attributes:
        title: stands below it.
        alt: what it shows, in words.
        png: the file, or its bytes; it is copied into the report.
    """

    title: str
    alt: str
    png: Path | bytes

    def embedded(self) -> "EmbeddedPicture":
        """The picture as it stands in the page.

        Raises:
            UserError: when it is no PNG.
        """
        name = self.title if isinstance(self.png, bytes) else str(self.png)
        try:
            content = self.png if isinstance(self.png, bytes) else Path(self.png).read_bytes()
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                width, height = image.size
                inches = 96 / (image.info.get("dpi") or (96, 96))[0]
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"figure {name} must be a PNG file: {error}") from None
        uri = "data:image/png;base64," + base64.b64encode(content).decode()
        return EmbeddedPicture(self.title, self.alt, uri, round(width * inches), round(height * inches))


@dataclass(frozen=True)
class EmbeddedPicture:
    """A picture as a data URI, with its size in CSS pixels."""

    title: str
    alt: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class TrialLine:
    """A trial in the list of all.

    Attributes:
        title: its levels and its seed.
        state: ``finished``, ``failed`` or ``missing``.
        command: the command that makes the same run, or None.
        seconds: what it took, or None.
        error: why it failed, or None.
        date: when it ended, or None.
    """

    title: str
    state: str = "missing"
    command: str | None = None
    seconds: float | None = None
    error: str | None = None
    date: str | None = None

    @property
    def facts(self) -> str:
        took = None if self.seconds is None else duration(self.seconds)
        state = "not made yet" if self.state == "missing" else self.state
        return ", ".join(fact for fact in (state, took, self.date) if fact)


@dataclass(frozen=True)
class Report:
    """All that a report says. Every string is plain text: the page escapes it.

    Attributes:
        title: of the study, e.g. ``MetaMask, Table 2``.
        source: paper and table or figure.
        date: of the report, as it is to be read.
        claim: what the paper says it shows.
        ran: what was run here, in a paragraph: size, data, epochs, seeds.
        verdicts: what came out, a line each (:func:`~metamask_plugin.studies.verdicts.verdicts`).
        tables: of :func:`~metamask_plugin.studies.tables.tables`, with the paper's numbers in their cells.
        differences: of the same, of the paired differences.
        baseline: what these are differences to.
        figures: in the order in which they stand.
        arms: (factor, level, what it changes) for all levels of all factors.
        settings: the study's YAML.
        trials: all of them, finished or not.
        environment: commit, versions, hardware and the like, by name.
    """

    title: str
    source: str
    date: str
    claim: str = ""
    ran: str = ""
    verdicts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    differences: Sequence[Table] = ()
    baseline: str = ""
    figures: Sequence[Picture] = ()
    arms: Sequence[tuple[str, str, str]] = ()
    settings: str = ""
    trials: Sequence[TrialLine] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> int:
        return sum(trial.state == "finished" for trial in self.trials)

    @property
    def state(self) -> str:
        """``7 of 24 trials, 1 failed``."""
        failed = sum(trial.state == "failed" for trial in self.trials)
        total = len(self.trials)
        done = f"all {total} trials" if self.finished == total > 1 else f"{self.finished} of {total} trials"
        return done + (f", {failed} failed" if failed else "")

    @property
    def has_paper(self) -> bool:
        return any(table.has_paper for table in self.tables)


def write_report(path: str | Path, report: Report) -> Path:
    """Writes a report into one HTML file, which loads nothing: no script, no font, no picture.

    Args:
        path: the file; its directory is made. An old one is replaced at once.
        report: what it says.

    Returns:
        The path.

    Raises:
        UserError: when a figure is no PNG file.
    """
    path = Path(path)
    figures = [picture.embedded() for picture in report.figures]
    write_whole(path, _page("report.html", report=report, figures=figures))
    return path


def write_index(folder: str | Path) -> Path:
    """Writes ``index.html``: every ``*/report.html`` in a folder with its title, state and date.

    Args:
        folder: of the studies.

    Returns:
        The page's path.
    """
    folder = Path(folder)
    reports = []
    for path in sorted(folder.glob("*/report.html")):
        meta = _Meta()
        try:
            meta.feed(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:  # another user's, or moved at this moment
            continue
        reports.append(
            {
                "link": f"{quote(path.parent.name)}/report.html",
                "folder": path.parent.name,
                "title": meta.found.get("study-title") or path.parent.name,
                "state": meta.found.get("study-state", UNKNOWN),
                "date": meta.found.get("study-date", UNKNOWN),
            }
        )
    write_whole(folder / "index.html", _page("index.html", reports=reports))
    return folder / "index.html"


def duration(seconds: float) -> str:
    """In words: ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class _Meta(HTMLParser):
    """Collects ``<meta name= content=>``."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "meta" and given.get("name"):
            self.found.setdefault(given["name"], given.get("content") or "")


def _page(template: str, **values) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
