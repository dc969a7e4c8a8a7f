"""Sphinx configuration. The tutorials are copied in from ``tutorials/`` and shown as they were saved, not executed."""

from __future__ import annotations

import shutil
from importlib.metadata import version as installed_version
from pathlib import Path

here = Path(__file__).parent
tutorials = here / "tutorials"
shutil.rmtree(tutorials, ignore_errors=True)
tutorials.mkdir()
for notebook in sorted(here.parent.glob("tutorials/*.ipynb")):
    shutil.copy(notebook, tutorials)

project = "scllm"
author = "The scllm developers"
project_copyright = f"2026, {author}"
version = release = installed_version("scllm-tools")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# what TYPE_CHECKING hides is shown by the name that the source gives it
python_use_unqualified_type_names = True

napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = False
# the AnnData keys that a verb writes
napoleon_custom_sections = ["Writes"]

nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = f"scllm {version}"
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2}
