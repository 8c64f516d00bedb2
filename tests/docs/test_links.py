"""Links in README and on the site lead somewhere.

Files and headings of this repository are looked up. External addresses are not fetched: they are compared
with the list in external_links.txt, which a person has read.
"""

import itertools
import pathlib
import re
import urllib.parse

import guide
import markdown_it
import pytest

ROOT = guide.ROOT
DOCS = ROOT / 'docs'
LISTED = pathlib.Path(__file__).with_name('external_links.txt')
# The address of a file of this repository.
OWN = 'https://github.com/sparse-lm/sparse_lm/blob/main/'
PAGES = sorted(
  path
  for path in (*DOCS.rglob('*.md'), *ROOT.glob('*.md'))
  if not {'templates', 'generated', 'build'} & set(path.relative_to(ROOT).parts)
)


def targets(markdown):
  """The targets of all links and images, in Markdown and in directives that show an image."""
  for block in markdown_it.MarkdownIt('commonmark').parse(markdown):
    for token in block.children or ():
      if token.type in ('link_open', 'image'):
        yield token.attrs.get('href') or token.attrs['src']
    if block.type == 'fence' and (image := re.match(r'\{(?:image|figure)\} (\S+)', block.info)):
      yield image[1]


def headings(path):
  """The anchors of a page's headings, as MyST and GitHub make them."""
  tokens = markdown_it.MarkdownIt('commonmark').parse(path.read_text(encoding='utf-8'))
  for heading, text in itertools.pairwise(tokens):
    if heading.type == 'heading_open':
      plain = ''.join(child.content for child in text.children)
      yield re.sub(r'[^\w\- ]', '', plain.lower()).replace(' ', '-')


def fault(page, target):
  """What is wrong with a link of a page to a place in this repository; '' if nothing."""
  file, _, anchor = target.partition('#')
  path = (page.parent / file).resolve() if file else page
  if 'generated' in path.parts:
    return '' if written_by_the_build(path) else f'{target}: the build writes no such page'
  if not path.exists():
    return f'{target}: there is no such file'
  if anchor and path.suffix == '.md' and anchor not in headings(path):
    return f'{target}: there is no such heading'
  return ''


def written_by_the_build(path):
  """True for the diagram, the table of folders, and the pages of packages."""
  if path.parent.parent == DOCS / 'concepts':
    return path.name in ('architecture.svg', 'folders.md')
  index = (DOCS / 'reference' / 'index.md').read_text(encoding='utf-8')
  return path.suffix == '.rst' and re.search(rf'^ +{re.escape(path.stem)}$', index, re.MULTILINE)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_internal_links_lead_to_files_and_headings(page):
  found = list(targets(page.read_text(encoding='utf-8')))
  own = [link.removeprefix(OWN) for link in found if link.startswith(OWN)]
  assert [path for path in own if not (ROOT / path).exists()] == []
  local = [link for link in found if not re.match(r'\w+:', link)]
  assert [problem for link in local if (problem := fault(page, link))] == []


def external():
  for page in PAGES:
    for link in targets(page.read_text(encoding='utf-8')):
      if re.match(r'\w+:', link) and not link.startswith(OWN):
        yield link


def test_external_links_are_well_formed_and_listed():
  found = sorted(set(external()))
  for link in found:
    parts = urllib.parse.urlsplit(link)
    assert parts.scheme == 'https' and re.fullmatch(r'[\w-]+(\.[\w-]+)+', parts.netloc), link
    assert not re.search(r'[\s<>"]', link), link
  assert found == LISTED.read_text(encoding='utf-8').split(), (
    f'read them, and list them in {LISTED}'
  )


@pytest.mark.parametrize(
  ('target', 'message'),
  [
    ('index.md', ''),
    ('concepts/costs.md#time', ''),
    ('concepts/costs.md#space', 'no such heading'),
    ('concepts/nothing.md', 'no such file'),
    ('reference/generated/sparse_lm.weights.rst', ''),
    ('reference/generated/sparse_lm.nothing.rst', 'no such page'),
  ],
)
def test_a_wrong_link_is_found(target, message):
  assert message in fault(DOCS / 'index.md', target)
  assert bool(message) == bool(fault(DOCS / 'index.md', target))


def test_links_are_found_in_text_images_and_directives():
  text = '[a](b.md) ![c](d.png)\n\n`[e](f)`\n\n```{image} g.svg\n:alt: h\n```\n\n[![i](j)](k)\n'
  assert list(targets(text)) == ['b.md', 'd.png', 'g.svg', 'k', 'j']
