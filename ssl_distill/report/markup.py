"""Templates of the page. Whatever is put into one is escaped."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

COLORS = 6  # of runs; then they repeat


def _setting(value: Any) -> str:
    """The value of an argument as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


TEMPLATES = Environment(
    loader=PackageLoader("ssl_distill.report", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals["COLORS"] = COLORS
TEMPLATES.filters["setting"] = _setting
