"""The layout of docstrings becomes reStructuredText, read with Docutils."""

import importlib.util
import inspect

import guide
import pytest

core = pytest.importorskip('docutils.core')


@pytest.fixture(scope='module')
def docstrings():
  path = guide.ROOT / 'docs' / 'docstrings.py'
  spec = importlib.util.spec_from_file_location('docstrings', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def html(lines):
  settings = {'report_level': 1, 'halt_level': 1}
  parts = core.publish_parts('\n'.join(lines), writer='html5', settings_overrides=settings)
  return ' '.join(parts['body'].split())


def test_two_columns_are_a_definition_list(docstrings):
  text = """
    What a run may be.

    Either
    old, worn   has been trained
                for long
    new         has not
    and nothing else.
  """
  shown = html(docstrings.converted(inspect.cleandoc(text).splitlines()))
  assert '<dt>old, worn</dt> <dd><p>has been trained for long</p> </dd>' in shown
  assert '<dt>new</dt> <dd><p>has not</p> </dd>' in shown
  assert '<p>Either</p>' in shown and '<p>and nothing else.</p>' in shown


def test_values_of_a_field_are_a_bulleted_list(docstrings):
  text = """
    apply: what happens.
      'masked': it is zero, and stays
        zero.
      'soft': it shrinks.
    """
  shown = html(docstrings.converted(inspect.cleandoc(text).splitlines()))
  assert shown.count('<li>') == 2 and 'it is zero, and stays zero.' in shown


def test_a_letter_may_follow_code(docstrings):
  shown = html(
    ['.. default-role:: code', '', *docstrings.converted(['without `None`s, `a`, ``b``'])]
  )
  assert '>None</code>s, ' in shown and '>a</code>, ' in shown


@pytest.mark.parametrize('text', ['One  space too many.', 'Plain.\n\nSecond paragraph.'])
def test_other_text_stays_as_it_is(text, docstrings):
  assert docstrings.converted(text.splitlines()) == text.splitlines()


def test_the_command_of_a_config_is_literal(docstrings):
  lines = ['A model.', '', 'Command:  python -m x \\', '            --y=1', 'Time:     3 s.']
  assert '<pre class="literal-block">Command: python -m x \\ --y=1 Time: 3 s.</pre>' in html(
    docstrings.literal_from_command(lines)
  )
