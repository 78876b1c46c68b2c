"""The page that says what each method can do says what it does."""

from tests import support


def test_the_page_is_what_happens():
    written = support.PAGE.read_text(encoding="utf-8")
    assert written == support.page(), "python tests/support.py writes it anew"
