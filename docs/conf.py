"""The documentation as a site: `sphinx-build -W -b html docs build/docs`."""

from sparsekd import __version__

project = "sparsekd"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
html_theme = "furo"
html_title = f"sparsekd {__version__}"
