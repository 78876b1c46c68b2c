"""The page that says what each method can do says what it does, and every method compiles in every family."""

import pytest

from pefast.methods import METHODS
from tests import support
from tests.cases import why_declined
from tests.models import FAMILIES


def test_the_page_is_what_happens():
    written = support.PAGE.read_text(encoding="utf-8")
    assert written == support.page(), "python tests/support.py writes it anew"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
def test_each_method_compiles_in_one_graph(kind, family):
    if why := why_declined(family, support.case_of(kind)):
        pytest.skip(why)
    model = support.attached(kind, family)
    assert support.tried(lambda: support.compiles(model, family)) == ""
