"""The methods that the guides add pass the contract test, as their last sections say."""

import shutil
import subprocess
import sys

import guide
import pytest

METHODS = {
  'weight': ('taylor', 'fisher', 'hard_threshold'),
  'activation': ('winner',),
  'attention': ('sinks',),
  'mlp': ('skip', 'top_one'),
  'depth': ('strided',),
  'stack': ('u_net',),
  'site': ('threshold',),
}
LONGEST = 40  # lines of a file that a guide adds


def files():
  """The files that the guides add, by their path in a checkout."""
  pages = sorted((guide.ROOT / 'docs/guides/extend').glob('*.md'))
  found = [block for page in pages for block in guide.blocks(page.read_text(encoding='utf-8'))]
  return {block.path: block.text for block in found if block.path}


def test_every_file_is_short_and_every_slot_has_one():
  written = files()
  assert not {path: n for path, text in written.items() if (n := text.count('\n')) > LONGEST}
  folders = {slot: f'sparse_lm/methods/{slot}/' for slot in METHODS}
  named = {
    slot: {
      path.removeprefix(start).removesuffix('.py') for path in written if path.startswith(start)
    }
    for slot, start in folders.items()
  }
  assert named == {slot: set(names) for slot, names in METHODS.items()}


@pytest.mark.slow
def test_methods_pass_the_contract(tmp_path):
  guide.copy_checkout(tmp_path)
  shutil.copytree(guide.ROOT / 'tests', tmp_path / 'tests')
  shutil.copy(guide.ROOT / 'pyproject.toml', tmp_path)
  for path, text in files().items():
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(text, encoding='utf-8')
  # Layer methods are tested under names such as 'mlp-skip', weight methods under their own.
  tests = [n if slot == 'weight' else f'{slot}-{n}' for slot in METHODS for n in METHODS[slot]]
  contract = 'tests/test_contract.py', 'tests/test_flops_contract.py'
  options = '-q', '-m', 'not slow', '-k', ' or '.join(tests)
  command = [sys.executable, '-m', 'pytest', *options, *contract]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout
