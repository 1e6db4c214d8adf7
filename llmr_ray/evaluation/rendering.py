"""Pages from the templates of this package."""

from functools import cache
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """A page: everything that goes into it is escaped, and a name that the template knows but `values` lacks is an
    error."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("llmr_ray.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
