"""`python -m sparse_lm.data.prepare`."""

import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sparse_lm.data import prepare, sources

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARTICLES = [
  ' \n = A b = \n \n Text of it . \n \n = = Part = = \n \n x = y \n',
  ' \n = C = \n \n More . \n',
]
# What stands around its line tells a formula from a title.
ARTICLES += [' \n = D ( e ) = \n \n A length \n = 2 r = \n of it . \n']


@pytest.fixture
def main(monkeypatch, capfd):
  """`main(*arguments) -> (exit code, stdout, stderr)`."""

  def run(*given):
    capfd.readouterr()
    monkeypatch.setattr(sys, 'argv', ['prepare', *map(str, given)])
    try:
      prepare.main()
      code = 0
    except SystemExit as stop:
      code = stop.code
    return code, *capfd.readouterr()

  return run


@pytest.fixture
def wikitext(tmp_path):
  """A folder with three splits of one article, two and three."""
  folder = tmp_path / 'wiki'
  folder.mkdir()
  for count, name in enumerate(('wiki.test.tokens', 'wiki.valid.tokens', 'wiki.train.tokens'), 1):
    (folder / name).write_text(''.join(ARTICLES[:count]))
  (folder / 'README').write_text('about it')
  return folder


def loaded(out):
  """The corpus that the printed overrides give."""
  given = dict(re.findall(r'--config\.data\.(\w+)=(\S+)', out))
  return sources.load(SimpleNamespace(**given, split=(1, 0, 0)))


def test_text(main, tmp_path):
  for name in 'ab':
    (tmp_path / f'{name}.txt').write_text(f'line of {name}\n\n' * 50)
  code, out, err = main('--out', tmp_path / 'out', '--kind=text', tmp_path / '*.txt')
  assert code == 0 and 'Traceback' not in err
  assert f'{tmp_path}/out/text/1.0.0: examples: train 2, validation 2, test 2' in out
  assert loaded(out).splits == sources.files(f'{tmp_path}/*.txt').splits
  assert [path.name for path in (tmp_path / 'out').iterdir()] == ['text']
  assert [path.name for path in (tmp_path / 'out' / 'text').iterdir()] == ['1.0.0']


@pytest.mark.parametrize('how', ['folder', 'files', 'named'])
def test_wikitext(how, main, wikitext, tmp_path):
  files = [wikitext / f'wiki.{name}.tokens' for name in ('train', 'valid', 'test')]
  named = [f'--{split}={file}' for split, file in zip(('train', 'validation', 'test'), files)]
  given = {'folder': [wikitext], 'files': files, 'named': named}[how]
  code, out, _ = main('--out', tmp_path / 'out', '--kind=wikitext', *given)
  assert code == 0 and 'train 3, validation 2, test 1' in out
  corpus = loaded(out)
  assert corpus.splits['train'].decode().split('\0') == ARTICLES
  assert corpus.splits['test'].decode() == ARTICLES[0]


def test_wikitext_with_windows_line_ends_has_the_same_articles(main, wikitext, tmp_path):
  for file in wikitext.glob('*.tokens'):
    file.write_bytes(file.read_bytes().replace(b'\n', b'\r\n'))
  code, out, _ = main('--out', tmp_path / 'out', '--kind=wikitext', wikitext)
  assert code == 0 and 'train 3, validation 2, test 1' in out
  want = [article.replace('\n', '\r\n') for article in ARTICLES]
  assert loaded(out).splits['train'].decode().split('\0') == want


def test_articles_of_wikitext_2(shared_data):
  for name in ('wikitext2_valid.txt', 'wikitext2_test.txt'):
    path = shared_data(name)
    articles = prepare.wikitext({'train': str(path), 'validation': str(path)})['train']
    assert len(articles) == 60  # the published number, of both
    assert b''.join(articles) == path.read_bytes()


def test_an_existing_folder_is_kept(main, tmp_path):
  (tmp_path / 'a.txt').write_text('a b ' * 100)
  given = ('--out', tmp_path, '--kind=text', tmp_path / 'a.txt')
  assert main(*given)[0] == 0
  before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
  code, out, err = main(*given)
  assert code == 2 and not out
  assert err == f'error: {tmp_path}/text/1.0.0 already exists; valid: another --out, or remove it\n'
  assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


def test_an_interrupted_preparation_leaves_no_readable_folder(tmp_path, monkeypatch):
  def stop(self, split):
    yield 0, {'text': b'a'}
    raise KeyboardInterrupt

  monkeypatch.setattr(prepare._Documents, '_generate_examples', stop)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare(str(tmp_path), 'text', {split: [b'a', b'b'] for split in sources.SPLITS})
  assert not list(tmp_path.rglob('dataset_info.json'))
  assert not list(tmp_path.rglob('*array_record*'))


BAD = {
  'no arguments': ([], '--out, --kind'),
  'kind': (['--out=x', '--kind=wiki', 'a'], "'text', 'wikitext'"),
  'unknown argument': (['--out=x', '--kind=text', '--nam=a'], "unknown argument '--nam'"),
  'text without a path': (['--out=x', '--kind=text'], 'PATH'),
  'text with a split': (['--out=x', '--kind=text', '--train=a', 'a'], '--train'),
  'no match': (['--out=x', '--kind=text', 'none*.txt'], "'none*.txt' matches no file"),
  'empty file': (['--out=x', '--kind=text', 'empty.txt'], "'empty.txt' is empty"),
  'short file': (['--out=x', '--kind=text', 'short.txt'], 'validation is empty'),
  'no train': (['--out=x', '--kind=wikitext', '--validation=wiki/wiki.valid.tokens'], 'train.txt'),
  'no validation': (['--out=x', '--kind=wikitext', '--train=short.txt'], 'valid.txt'),
  'another name': (['--out=x', '--kind=wikitext', 'short.txt'], '--train=FILE'),
  'two of a split': (
    ['--out=x', '--kind=wikitext', 'wiki', 'wiki/wiki.train.tokens'],
    'are both train',
  ),
  'no file': (['--out=x', '--kind=wikitext', 'wiki', '--test=none'], '--test=none is not a file'),
  'no article': (['--out=x', '--kind=wikitext', 'wiki', '--test=short.txt'], "' = Title = '"),
  'a home that is none': (
    ['--out=~nobody_/x', '--kind=text', 'long.txt'],
    '--out=~nobody_/x',
  ),
  'a file for a folder': (['--out=short.txt', '--kind=text', 'long.txt'], '--out=short.txt'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line(case, main, wikitext, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty.txt').write_text('')
  (tmp_path / 'short.txt').write_text('ab')
  (tmp_path / 'long.txt').write_text('ab ' * 100)
  given, expected = BAD[case]
  code, out, err = main(*given)
  assert code == 2 and not out
  assert err.startswith('error: ') and err.count('\n') == 1 and expected in err, err
  assert not (tmp_path / 'x').exists()


def test_bad_input_of_a_process(tmp_path):
  command = [sys.executable, '-m', 'sparse_lm.data.prepare', f'--out={tmp_path}/x', '--kind=txt']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
