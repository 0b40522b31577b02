"""Sphinx's settings. `sphinx-build -W --keep-going -b html docs build/docs` builds the pages.

Nothing is loaded from elsewhere: no fonts, no scripts, no inventories of other projects.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the extension `generated`

import nplora

project = "nplora"
author = "the nplora developers"
copyright = "2026, the nplora developers"
version = release = nplora.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
source_suffix = {".md": "markdown"}
nitpicky = False  # docstrings name types in their own short form
language = "en"
smartquotes = False  # quotes in docstrings belong to code

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
autodoc_typehints = "none"  # `generated` writes signatures as the source has them
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"nplora {version}"
html_static_path = ["_static"]
html_css_files = ["nplora.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
highlight_language = "text"  # what a Python block prints
