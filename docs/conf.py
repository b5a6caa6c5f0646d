"""The documentation site: these Markdown pages and docstrings, as HTML (``make docs``)."""

from mogan import __version__

project = "MoGAN"
copyright = "The MoGAN authors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_use_ivar = True  # attributes once, where the docstring names them

html_theme = "furo"
html_title = f"MoGAN {release}"
