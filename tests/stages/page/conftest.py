"""Share one drawn page among the tests of the report, since drawing takes seconds."""

from types import SimpleNamespace

import pytest
from report_run import fake_run, page_of


@pytest.fixture(scope="session")
def drawn_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Return the run with all parts, whose page and plots are in `publish`."""
    ctx = fake_run(tmp_path_factory.mktemp("drawn"))
    page_of(ctx, with_plots=True)
    return ctx
