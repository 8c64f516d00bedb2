"""Settings of the site; `make docs` builds it into build/docs."""

import os
import pathlib
import sys

DOCS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]
# Modules are imported for their docstrings, and nothing is computed.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import architecture  # noqa: E402
import docstrings  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

from sparse_lm.core.version import VERSION  # noqa: E402

project = 'sparse_lm'
author = 'the sparse_lm authors'
copyright = author
release = version = VERSION

extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'sphinx_copybutton',
]
exclude_patterns = ['lines', 'templates', '_templates']
templates_path = ['_templates']
# Fields of two classes may have one name; a docstring never links to them.
suppress_warnings = ['ref.python']

myst_enable_extensions = ['deflist', 'dollarmath']
myst_heading_anchors = 3

# Docstrings are Google's style, and write code in single backticks.
default_role = 'code'
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_mock_imports = ['torch']
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_default_options = {'members': True, 'show-inheritance': False}
autosummary_ignore_module_all = False
# A package has a page of its own, and no section on the page of the package above it.
autosummary_context = {
  'packages': [
    '.'.join(p.relative_to(DOCS.parent).parts) for p in DOCS.parent.glob('sparse_lm/**/')
  ]
}
add_module_names = False
python_use_unqualified_type_names = True

html_theme = 'furo'
html_title = f'sparse_lm {VERSION}'
html_static_path = []
copybutton_exclude = '.linenos, .gp'


def convert_docstring(
  app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
  """Replaces the lines of a docstring by reStructuredText."""
  if what == 'module' and name.startswith('configs.'):
    lines[:] = docstrings.literal_from_command(lines)
  else:
    lines[:] = docstrings.converted(lines)


def setup(app: Sphinx) -> None:
  """Draws the diagram of the architecture, and registers the conversion of docstrings."""
  generated = DOCS / 'concepts' / 'generated'
  generated.mkdir(exist_ok=True)
  architecture.draw(generated / 'architecture.svg')
  (generated / 'folders.md').write_text(architecture.table(), encoding='utf-8')
  # Before Napoleon, which has the priority 500.
  app.connect('autodoc-process-docstring', convert_docstring, priority=400)
