"""Pages of HTML from templates: self-contained, so that a page can be mailed and opened anywhere, without a network."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wsipipe

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """The page that a template of `templates/` makes of `values`; texts are escaped."""
    return _environment().get_template(template).render(version=wsipipe.__version__, **values)


def hours(seconds: float) -> str:
    """A time to be read: 45.2 s, 3 min 20 s, 2 h 5 min.

    Examples
    --------
    >>> hours(45.23), hours(200), hours(7500)
    ('45.2 s', '3 min 20 s', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def area(mm2: float) -> str:
    """An area to be read, in mm² or µm², three digits.

    Examples
    --------
    >>> area(0), area(0.0005), area(0.0212), area(2827.6)
    ('0 mm²', '500 µm²', '0.0212 mm²', '2,828 mm²')
    """
    return f"{mm2 * 1e6:.0f} µm²" if 0 < mm2 < 0.001 else f"{mm2:,.0f} mm²" if mm2 >= 100 else f"{mm2:.3g} mm²"


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(hours=hours, area=area)
    return environment
