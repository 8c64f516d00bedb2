import collections
import hashlib
import json
import os
import pathlib
import platform
import sysconfig
from types import SimpleNamespace

import pytest

from sparse_lm.core.errors import UserError
from sparse_lm.data import sources

SHAKESPEARE = pathlib.Path(__file__).parents[2].parent / 'shared' / 'data' / 'tiny_shakespeare.txt'


def documents(corpus, split):
  return corpus.splits[split].split(b'\0')


def test_stdlib_holds_whole_files_each_in_one_split():
  corpus = sources.stdlib()
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  on_disk = collections.Counter(path.read_bytes() for path in root.rglob('*.py') if path.is_file())
  held = collections.Counter(text for split in corpus.splits for text in documents(corpus, split))
  assert held <= on_disk
  assert sum(held.values()) == corpus.card['files'] > 300
  once = {text for text, count in on_disk.items() if count == 1}
  train, validation, test = (once & set(documents(corpus, s)) for s in corpus.splits)
  assert not train & validation and not train & test and not validation & test


def test_stdlib_sizes_and_what_is_left_out():
  splits = sources.stdlib().splits
  assert list(splits) == ['train', 'validation', 'test']
  assert 5_000_000 < len(splits['train']) < 20_000_000
  for name in ('validation', 'test'):
    assert 100_000 <= len(splits[name]) < 160_000
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  kept = set(b'\0'.join(splits.values()).split(b'\0'))
  assert (root / 'argparse.py').read_bytes() in kept
  for path in [*root.glob('test/test_[a-d]*.py'), *root.glob('_sysconfigdata*.py')]:
    assert path.read_bytes() not in kept


def test_card_is_json_and_its_hashes_are_of_the_content():
  corpus = sources.stdlib()
  card = json.loads(json.dumps(corpus.card))
  assert card == corpus.card
  assert card['source'] == 'stdlib' and card['python'] == platform.python_version()
  for name, text in corpus.splits.items():
    assert card['bytes'][name] == len(text)
    assert card['sha256'][name] == hashlib.sha256(text).hexdigest()
  assert len(set(card['sha256'].values())) == 4


def tree(root, names):
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f'# {name}\n'.encode() * 2000)
  (root / 'latin.py').write_bytes(b'# \xe9')
  (root / 'nul.py').write_bytes(b'a\0b')
  (root / 'empty.py').write_bytes(b'')
  (root / 'notes.txt').write_bytes(b'no Python')
  return root


def test_stdlib_split_ignores_location_and_listing_order(tmp_path, monkeypatch):
  names = [f'package{i % 7}/module{i}.py' for i in range(40)]
  left_out = ['test/a.py', 'p/tests/b.py', 'test_c.py', 'site-packages/d.py', 'idle/idle_test/e.py']
  roots = tree(tmp_path / 'here', names), tree(tmp_path / 'x/y', [*left_out, *reversed(names)])
  corpora = []
  walk = os.walk
  for root, backwards in zip(roots, (False, True)):

    def listing(top, backwards=backwards):
      for folder, subfolders, files in walk(top):
        subfolders.sort(reverse=backwards)
        yield folder, subfolders, sorted(files, reverse=backwards)

    monkeypatch.setattr(sources.os, 'walk', listing)
    monkeypatch.setattr(sources.sysconfig, 'get_path', lambda _, root=root: str(root))
    corpora.append(sources.stdlib())
  assert corpora[0] == corpora[1]
  assert corpora[0].card['files'] == len(names)
  assert all(corpora[0].splits.values())


def test_stdlib_without_source_files(tmp_path, monkeypatch):
  monkeypatch.setattr(sources.sysconfig, 'get_path', lambda _: str(tmp_path))
  with pytest.raises(UserError, match=r"config\.data\.source='files' with .*config\.data\.path"):
    sources.stdlib()


def test_files_cut_every_file_by_characters(tmp_path):
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'b.txt').write_text('é' * 90 + 'v' * 5 + 't' * 5, encoding='utf-8')
  (tmp_path / 'sub' / 'c.txt').write_text('C' * 18 + 'VT', encoding='utf-8')
  corpus = sources.files(str(tmp_path / '**' / '*.txt'))
  assert corpus.splits['train'].decode() == 'é' * 90 + '\0' + 'C' * 18
  assert corpus.splits['validation'] == b'v' * 5 + b'\0' + b'V'
  assert corpus.splits['test'] == b't' * 5 + b'\0' + b'T'
  assert corpus.card['files'] == 2
  assert corpus.card['bytes']['train'] == 180 + 1 + 18


@pytest.mark.parametrize(
  ('split', 'sizes'),
  [
    ((0.7, 0.1, 0.2), (7, 1, 2)),  # in floating point 0.7 + 0.1 < 0.8
    ((0.9, 0.1, 0.0), (9, 1, 0)),
    ((2 / 3, 1 / 3, 0), (6, 4, 0)),
    ((0.6, 0.2, 0.2), (6, 2, 2)),
  ],
)
def test_files_fractions(tmp_path, split, sizes):
  (tmp_path / 'a').write_text('0123456789')
  splits = sources.files(str(tmp_path / 'a'), split).splits
  assert tuple(map(len, splits.values())) == sizes
  assert b''.join(splits.values()) == b'0123456789'


def test_files_expands_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a.txt').write_text('x' * 100)
  assert len(sources.files('~/a.txt').splits['train']) == 90


@pytest.mark.parametrize(
  'split', [(0.9, 0.1), (0.5, 0.4, 0.2), (1.2, -0.1, -0.1), (0, 0.5, 0.5), (0.9, 0, 0.1)]
)
def test_bad_split(tmp_path, split):
  (tmp_path / 'a').write_text('x' * 100)
  with pytest.raises(UserError, match=r'config\.data\.split=.*three fractions') as error:
    sources.files(str(tmp_path / 'a'), split)
  assert str(split) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    (b'', 'is empty'),
    (b'abc\xff', r'is not UTF-8 \(byte 3\)'),
    ('utf-16'.encode('utf-16-le'), 'zero bytes'),
    (b'abc', r'too short for fractions .* config\.data\.split'),
  ],
)
def test_bad_file(tmp_path, content, said):
  (tmp_path / 'a.txt').write_bytes(content)
  with pytest.raises(UserError, match=said) as error:
    sources.files(str(tmp_path / '*.txt'))
  assert str(error.value).startswith('config.data.path') and '\n' not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  (tmp_path / 'a.txt').write_text('x' * 100)

  def denied(self):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(pathlib.Path, 'read_bytes', denied)  # root may read everything
  with pytest.raises(UserError, match=r"config\.data\.path: '.*a\.txt' cannot be read \(Perm"):
    sources.files(str(tmp_path / '*.txt'))


def test_no_match(tmp_path):
  with pytest.raises(UserError, match=r"config\.data\.path '.*nothing.*' matches no file"):
    sources.files(str(tmp_path / 'nothing*'))


def test_load(tmp_path):
  (tmp_path / 'a.txt').write_text('x' * 100)
  config = SimpleNamespace(source='files', path=str(tmp_path / 'a.txt'), split=[0.8, 0.1, 0.1])
  assert len(sources.load(config).splits['train']) == 80
  config.path = ''
  with pytest.raises(UserError, match=r'needs config\.data\.path'):
    sources.load(config)
  config.source = 'stdlb'
  with pytest.raises(
    UserError, match=r"unknown config\.data\.source 'stdlb': did you mean 'stdlib'"
  ):
    sources.load(config)


@pytest.mark.skipif(
  not SHAKESPEARE.exists(),
  reason='../shared/data/tiny_shakespeare.txt is missing: place input.txt of '
  'karpathy/char-rnn data/tinyshakespeare there (1,115,394 bytes)',
)
def test_tiny_shakespeare_splits_are_the_published_ones():
  tfds = sources.files(str(SHAKESPEARE)).card['bytes']
  assert tfds == {'train': 1_003_854, 'validation': 55_770, 'test': 55_770}
  nanogpt = sources.files(str(SHAKESPEARE), (0.9, 0.1, 0.0)).card['bytes']
  assert nanogpt == {'train': 1_003_854, 'validation': 111_540, 'test': 0}


NAMES = ('a[1].txt', 'b*.txt', 'c?.txt', 'd[!x].txt', 'e e.txt', 'ü雪.txt', r'f\g.txt', '[', 'h**')


@pytest.mark.parametrize('name', NAMES)
def test_an_existing_file_is_read_whatever_its_name(name, tmp_path, monkeypatch):
  folder = tmp_path / 'in [these]'
  folder.mkdir()
  (folder / name).write_text('x' * 100)
  for other in ('a1.txt', 'bb.txt', 'cc.txt', 'dd.txt', 'fg.txt', 'hh'):  # what a glob would match
    (folder / other).write_text('y' * 100)
  assert sources.matching(str(folder / name)) == [str(folder / name)]
  monkeypatch.setenv('HOME', str(folder))
  assert sources.files(f'~/{name}').splits['train'] == b'x' * 90
  monkeypatch.chdir(folder)
  assert [os.path.normpath(path) for path in sources.matching(name)] == [name]


def test_a_glob_in_a_folder_with_brackets(tmp_path):
  for folder in ('in [1]', 'in 1'):
    (tmp_path / folder / 'deep').mkdir(parents=True)
    for name in ('a.txt', 'b.txt', 'deep/c.txt'):
      (tmp_path / folder / name).write_text('x')

  def names(pattern):
    return [str(pathlib.Path(path).relative_to(tmp_path)) for path in sources.matching(pattern)]

  assert names(f'{tmp_path}/in [1]/*.txt') == ['in [1]/a.txt', 'in [1]/b.txt']
  assert names(f'{tmp_path}/in [1]/**/[ac].txt') == ['in [1]/a.txt', 'in [1]/deep/c.txt']
  assert names(f'{tmp_path}/in [1-9]/a.txt') == ['in 1/a.txt']
  with pytest.raises(UserError, match='matches no file'):
    sources.matching(f'{tmp_path}/in [1]/*.md')
