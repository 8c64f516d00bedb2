"""TFDS directories: text is read back, and every fault is a one-line error."""

import contextlib
import json
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sparse_lm.core.errors import UserError
from sparse_lm.data import pipeline, prepare, prepared, sources
from sparse_lm.data.corpus import SPLITS


class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A directory as another program may have left it."""

  VERSION = tfds.core.Version('2.3.4')

  def __init__(self, features, splits, out):
    self.name, self.features, self.texts = 'made', features, splits
    super().__init__(data_dir=out, file_format='array_record')

  def _info(self):
    features = tfds.features.FeaturesDict(self.features)
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(texts) for split, texts in self.texts.items()}

  def _generate_examples(self, texts):
    for i, text in enumerate(texts):
      values = {name: text if 'number' not in name else i for name in self.features}
      yield i, values


TEXT = {'text': tfds.features.Text()}


def made(out, splits, features=TEXT):
  builder = Made(features, splits, out)
  builder.download_and_prepare(download_dir=out / 'downloads')
  return builder.data_path


@pytest.fixture(scope='module')
def documents():
  """Texts with every kind of character, more than are read at once, in an order of their own."""
  draw = random.Random(0)
  letters = 'ab \n\t.é–漢😀'
  texts = [''.join(draw.choices(letters, k=draw.randint(1, 40))).encode() for _ in range(2600)]
  return dict(zip(SPLITS, (texts[:2500], texts[2500:2590], texts[2590:])))


@pytest.fixture(scope='module')
def written(documents, tmp_path_factory):
  return prepare.prepare(str(tmp_path_factory.mktemp('tfds')), 'text', documents)


@pytest.fixture
def copy(written, tmp_path):
  """A copy that a test may spoil."""
  return shutil.copytree(written, tmp_path / 'copy')


def refused(path):
  with pytest.raises(UserError) as error:
    prepared.read(str(path))
  assert '\n' not in str(error.value) and 'config.data.path' in str(error.value)
  return str(error.value)


def test_what_was_written_is_read_back_in_its_order(written, documents):
  corpus = prepared.read(str(written))
  for split in SPLITS:
    assert corpus.splits[split].split(b'\0') == documents[split]
  card = corpus.card
  assert card == json.loads(json.dumps(card))
  assert (card['source'], card['builder'], card['version']) == ('tfds', 'text', '1.0.0')
  assert card['examples'] == card['documents'] == {'train': 2500, 'validation': 90, 'test': 10}


def test_the_corpus_of_files_is_the_same_prepared_or_not(tmp_path):
  for name in 'abc':
    (tmp_path / f'{name}.txt').write_text(f'é{name}\n\nwords ' * 300, encoding='utf-8')
  pattern = str(tmp_path / '*.txt')
  folder = prepare.prepare(str(tmp_path / 'out'), 'text', prepare.text([pattern, pattern]))
  config = SimpleNamespace(source='tfds', path=str(folder), split=(1, 0, 0))
  one, other = sources.load(config), sources.files(pattern)
  assert one.splits == other.splits and one.card['sha256'] == other.card['sha256']


def test_a_parent_with_one_version_will_do(written, tmp_path, monkeypatch):
  want = prepared.read(str(written)).splits
  for parent in (written.parent, written.parents[1]):
    assert prepared.read(str(parent)).splits == want
  monkeypatch.setenv('HOME', str(written.parents[1]))
  assert prepared.read('~/text').splits == want
  unfinished = shutil.copytree(written, tmp_path / 'text' / 'incomplete.ABC_1.0.0')
  assert 'is not a directory that TFDS prepared' in refused(tmp_path)
  shutil.copytree(unfinished, tmp_path / 'text' / '1.0.0')
  assert prepared.read(str(tmp_path)).splits == want
  shutil.copytree(unfinished, tmp_path / 'other' / 'config' / '2.0.0')
  assert 'holds 2 datasets (other/config/2.0.0, text/1.0.0)' in refused(tmp_path)


def test_a_path_that_is_not_a_prepared_directory_is_refused(tmp_path):
  assert "source='tfds' needs config.data.path" in refused('')
  for path in (tmp_path, tmp_path / 'none', __file__):
    message = refused(path)
    assert str(path) in message and 'is not a directory that TFDS prepared' in message


@pytest.mark.parametrize('splits', [('train',), ('train', 'test'), ('test', 'validation')])
def test_a_missing_split(splits, tmp_path):
  message = refused(made(tmp_path, {name: ['ab', 'cd'] for name in splits}))
  missing = 'train' if 'train' not in splits else 'validation'
  assert f'no text in a {missing} split; its splits: {", ".join(sorted(splits))};' in message


def test_a_missing_test_split_is_empty_and_empty_examples_are_left_out(tmp_path):
  folder = made(tmp_path, {'train': ['ab', '', 'cd', ''], 'validation': ['ef']})
  corpus = prepared.read(str(folder))
  assert corpus.splits == {'train': b'ab\0cd', 'validation': b'ef', 'test': b''}
  assert corpus.card['builder'] == 'made' and corpus.card['version'] == '2.3.4'
  assert corpus.card['examples'] == {'train': 4, 'validation': 1, 'test': 0}
  assert corpus.card['documents'] == {'train': 2, 'validation': 1, 'test': 0}
  # In a mixture, only the other component has a test split then.
  (tmp_path / 'a.txt').write_text('xyz' * 20)
  path = f'tfds:{folder}=1, files:{tmp_path}/a.txt=1'
  config = SimpleNamespace(source='mixture', path=path, split=(0.8, 0.1, 0.1), tokenizer='chars')
  config.vocab_size, config.context, config.batch = 300, 3, 2
  data = pipeline.load(config)
  assert list(data.components('test')) == [f'files:{tmp_path}/a.txt']
  assert list(data.components()) == [f'tfds:{folder}', f'files:{tmp_path}/a.txt']


@pytest.mark.parametrize(
  ('features', 'found'),
  [
    ({'text': tfds.features.Text(), 'title': tfds.features.Text()}, 'text'),
    ({'number': tfds.features.Scalar(np.int64), 'body': tfds.features.Text()}, 'body'),
    ({'body': tfds.features.Scalar(np.str_), 'number': tfds.features.Scalar(np.int64)}, 'body'),
    ({'title': tfds.features.Text(), 'body': tfds.features.Text()}, '2 features of text'),
    ({'number': tfds.features.Scalar(np.int64)}, '0 features of text (none) among number'),
  ],
)
def test_which_feature_is_the_text(features, found, tmp_path):
  folder = made(tmp_path, {'train': ['ab'], 'validation': ['cd']}, features)
  if found in features:
    corpus = prepared.read(str(folder))
    assert corpus.card['feature'] == found and corpus.splits['train'] == b'ab'
  else:
    message = refused(folder)
    assert found in message and all(name in message for name in features)


@pytest.mark.parametrize(('text', 'said'), [(b'a\xff', 'not UTF-8 (byte 1)'), (b'a\0b', 'zero')])
def test_an_example_that_is_not_text(text, said, tmp_path):
  message = refused(made(tmp_path, {'train': [b'ab', text], 'validation': [b'cd']}))
  assert 'example 1 of train' in message and said in message


def test_another_file_format_is_named(copy):
  info = copy / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  assert 'has the file format tfrecord; valid: array_record' in refused(copy)


def spoil(kind, copy):
  (shard,) = copy.glob('*train.array_record*')
  data = shard.read_bytes()
  shard.unlink()
  if kind == 'altered':
    middle = len(data) // 4
    shard.write_bytes(data[:middle] + bytes(64) + data[middle + 64 :])
  elif kind == 'short':
    shard.write_bytes(data[: len(data) // 2])
  elif kind == 'empty':
    shard.write_bytes(b'')


@pytest.mark.parametrize('kind', ['altered', 'short', 'empty', 'missing'])
def test_a_damaged_shard_is_one_line(kind, copy):
  spoil(kind, copy)
  message = refused(copy)
  assert str(copy) in message and 'split train, cannot be read' in message


@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json'])
def test_damaged_metadata_is_one_line(name, copy):
  (copy / name).write_text('{"name": ')
  assert 'cannot be read' in refused(copy)


FEATURES = 'tensorflow_datasets.core.features'
NESTED = {'pythonClassName': f'{FEATURES}.features_dict.FeaturesDict'}
FOREIGN = {
  'at the top': {'pythonClassName': 'harmful.Feature'},
  'in its other spelling': {'python_class_name': 'harmful.Feature'},
  'of one feature': NESTED
  | {'featuresDict': {'features': {'type': {'pythonClassName': 'harmful.Feature', 'text': {}}}}},
  'of earlier versions': {'type': 'harmful.Feature', 'content': {}},
  'within one of earlier versions': {
    'type': f'{FEATURES}.sequence_feature.Sequence',
    'content': {'feature': {'type': 'harmful.Feature', 'content': {}}, 'length': 1},
  },
  'in JSON within JSON': NESTED
  | {'jsonFeature': {'json': json.dumps({'text': {'type': 'harmful.Feature', 'content': {}}})}},
  'in a message within JSON': {
    'type': f'{FEATURES}.features_dict.FeaturesDict',
    'proto_cls': 'tensorflow_datasets.FeaturesDict',
    'content': json.dumps({'features': {'text': {'pythonClassName': 'harmful.Feature'}}}),
  },
}


@pytest.mark.parametrize('where', FOREIGN)
def test_no_code_that_a_directory_names_is_run(where, copy, tmp_path, monkeypatch):
  proof = tmp_path / 'proof'
  (tmp_path / 'harmful.py').write_text(f'open({str(proof)!r}, "w").write("imported")\n')
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  (copy / 'features.json').write_text(json.dumps(FOREIGN[where]))
  assert "names the class 'harmful.Feature'" in refused(copy)
  assert not proof.exists()
  with contextlib.suppress(Exception):  # TFDS itself imports it, and finds no feature there
    tfds.builder_from_directory(copy)
  assert proof.read_text() == 'imported'
  sys.modules.pop('harmful')


@pytest.mark.parametrize(
  'text',
  ['[1, 2]', '"text"', '3', 'null', '{}', '{"type": {}}', '[' * 100_000, '{"a": NaN}', '\xff'],
)
@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json'])
def test_metadata_of_another_shape_is_one_line(name, text, copy):
  (copy / name).write_bytes(text.encode('latin-1'))
  assert 'cannot be read' in refused(copy) or 'no text in a train split' in refused(copy)


def test_names_of_modules_in_the_metadata_are_not_imported(copy, tmp_path, monkeypatch):
  (tmp_path / 'harmful.py').write_text(f'open({str(tmp_path / "proof")!r}, "w")\n')
  monkeypatch.syspath_prepend(str(tmp_path))
  info = json.loads((copy / 'dataset_info.json').read_text())
  (copy / 'dataset_info.json').write_text(json.dumps(info | {'moduleName': 'harmful'}))
  prepared.read(str(copy))
  assert not (tmp_path / 'proof').exists()
