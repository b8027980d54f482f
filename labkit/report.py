"""The page of a run: what became of each notebook, at a glance."""

from functools import cache
from pathlib import Path

import jinja2

from labkit import progress
from labkit.records import RunReport, replace, versions

TEMPLATE = Path(__file__).with_name("report.html")


def write(report: RunReport) -> None:
    """Write a run's status.json and index.html as it stands now."""
    report.save()
    filters = {"duration": progress.duration, "size": progress.size, "problems": progress.problems}
    page = _template().render(report=report, versions=versions(), **filters)
    replace(report.page, page)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
