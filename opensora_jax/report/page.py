"""One page that shows what a run made and needs nothing beside it.

`sections` gathers plain text and numbers; HTML is in templates/ alone. Whatever they are given is
escaped there, but for the SVG that `charts` draws.
"""

import logging
from collections.abc import Mapping
from typing import Any

import jinja2
from etils import epath
from ml_collections import ConfigDict

from opensora_jax import files
from opensora_jax.report import sections

logger = logging.getLogger(__name__)

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("opensora_jax.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["number"] = format


def write(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes `workdir`/report.html from what the stages left; always anew.

    Raises:
      FileNotFoundError: no workdir.
      ValueError: a file of a stage is not JSON.
    """
    path = epath.Path(workdir) / "report.html"
    render(path, "page.html", sections.gather(config, workdir))
    logger.info("report: %s (%.1f MB)", path, path.stat().length / 1e6)


def render(path: epath.PathLike, template: str, values: Mapping[str, Any]) -> None:
    """Writes the page that a template makes of plain text and figures."""
    page = _TEMPLATES.get_template(template).render(values)
    # Names of files that are not UTF-8 hold surrogates, which UTF-8 cannot.
    files.write_text(path, page.encode("utf-8", "backslashreplace").decode())
