"""What every page of a study has to be: well-formed, self-contained, with nothing in it that runs."""

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br", "hr", "link", "input"}
RUNS_OR_LOADS = {"script", "iframe", "object", "embed", "link", "base", "form"}


class Page(HTMLParser):
    """A parsed page: its tags with their attributes, and the text of each kind of element."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], {}
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if data.strip():
            self.texts.setdefault(self.open[-1] if self.open else "", []).append(" ".join(data.split()))

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(text for tag, texts in self.texts.items() if tag != "style" for text in texts)


def check_page(path, relative_links=False):
    """Asserts what holds for each page, and returns it parsed."""
    page = Page(path)
    assert not {tag for tag, _ in page.tags} & RUNS_OR_LOADS
    assert len(page.texts["title"]) == len(page.texts["h1"]) == 1
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), f"<{tag}> has a handler"
        assert "src" not in attributes or attributes["src"].startswith("data:image/png;base64,")
        assert tag != "img" or attributes["alt"].strip()
        link = attributes.get("href", "")
        assert not link or (relative_links and ":" not in link and not link.startswith("/"))
    assert all("url(" not in style and "@import" not in style for style in page.texts["style"])
    (policy,) = [meta for meta in page.attributes("meta") if "http-equiv" in meta]
    assert policy["content"].startswith("default-src 'none'")
    return page
