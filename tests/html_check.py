"""What must hold of every page we write: well-formed, self-contained, readable."""

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "hr", "input", "col"}


class Page(HTMLParser):
    """Follows the tags and collects what a page would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.errors = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.sources += [given[key] for key in ("src", "href", "srcset") if given.get(key)]
        if tag == "img" and not given.get("alt"):
            self.errors.append("a picture without words")
        if tag == "script":
            self.errors.append("a script")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> closes something else")


def check_report(path):
    """Asserts that a report is whole and loads nothing."""
    text = path.read_text()
    page = Page(text)
    assert page.errors == [] and page.open == [], page.errors
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert not re.search(r"url\(\s*['\"]?(?!data:)", text)
