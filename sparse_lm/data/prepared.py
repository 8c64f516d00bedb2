"""Reads corpora that TFDS prepared as array_record, without TensorFlow."""

import json
import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from sparse_lm.core.errors import UserError
from sparse_lm.core.records import Json
from sparse_lm.data.corpus import SPLITS, Corpus, join, why_not_text

if TYPE_CHECKING:
  import tensorflow_datasets as tfds

_INFO, _FEATURES = 'dataset_info.json', 'features.json'
# The keys of features.json that name the class of a feature, in current and earlier versions of TFDS.
# TFDS imports the module of the named class.
_CLASS_KEYS = ('pythonClassName', 'python_class_name', 'type')
_CHUNK = 1024  # number of examples read at once


def read(path: str) -> Corpus:
  """Reads the text of a TFDS directory: one document per example, in the order of its files.

  Splits are found by their names, and a missing test split is empty. The text is the feature `text`, or
  the only string feature. Empty examples are skipped.

  Args:
    path: the directory of a version (`.../1.0.0`), or a parent that contains exactly one; `~` is
      expanded.

  Raises:
    UserError: the path contains no version or several; a feature has a class that is not part of TFDS;
      the format is not array_record; a file is damaged; the text feature is ambiguous; the training or
      validation split is missing or empty; or an example is not text.
  """
  folder = _folder(path)
  what = f'config.data.path {str(folder)!r}'
  builder = _open(folder, what)
  splits = builder.info.splits
  feature = _text_feature(builder.info.features, what)
  members: dict[str, list[bytes]] = {name: [] for name in SPLITS}
  for name in SPLITS:
    if name in splits:
      members[name] = _documents(builder, name, feature, what)
    if not members[name] and name != 'test':
      raise UserError(
        f'{what} has no text in a {name} split; its splits: {", ".join(sorted(splits)) or "none"}; '
        'valid: a directory with train and validation'
      )
  origin = {
    'source': 'tfds',
    'path': path,
    'builder': builder.info.full_name.rpartition('/')[0],
    'version': str(builder.info.version),
    'feature': feature,
    'examples': {name: splits[name].num_examples if name in splits else 0 for name in SPLITS},
  }
  return join(members, origin)


def _folder(path: str) -> pathlib.Path:
  if not path:
    raise UserError(
      "config.data.source='tfds' needs config.data.path; valid: a directory that TFDS prepared, such as "
      '~/tensorflow_datasets/wikitext/1.0.0'
    )
  root = pathlib.Path(
    os.path.expanduser(path)
  )  # `~` of an unknown user stays and will not be found
  if (root / _INFO).is_file():
    return root
  found = sorted(
    file.parent
    for depth in ('*', '*/*', '*/*/*')  # name/config/version
    for file in root.glob(f'{depth}/{_INFO}')
    if not file.parent.name.startswith('incomplete.')  # TFDS has not finished writing it
  )
  if not found:
    raise UserError(
      f'config.data.path {path!r} is not a directory that TFDS prepared (no {_INFO}); valid: one '
      'such as ~/tensorflow_datasets/wikitext/1.0.0, or what python -m sparse_lm.data.prepare made'
    )
  if len(found) > 1:
    versions = ', '.join(str(folder.relative_to(root)) for folder in found)
    raise UserError(
      f'config.data.path {path!r} holds {len(found)} datasets ({versions}); valid: one of them'
    )
  return found[0]


def _open(folder: pathlib.Path, what: str) -> 'tfds.core.DatasetBuilder':
  """Opens a dataset, after a check that its features are classes of tensorflow_datasets."""
  import tensorflow_datasets as tfds  # takes a second, so other sources do not import it

  own = {
    f'{cls.__module__}.{cls.__name__}'
    for cls in vars(tfds.features).values()
    if isinstance(cls, type) and issubclass(cls, tfds.features.FeatureConnector)
  }
  try:
    named = _classes(json.loads((folder / _FEATURES).read_text(encoding='utf-8')))
    if foreign := sorted(named - own):
      raise UserError(
        f'{what}: {_FEATURES} names the class {foreign[0][:100]!r}, whose module would be imported; '
        'valid: the features of tensorflow_datasets'
      )
    builder = tfds.builder_from_directory(folder)
  except UserError:
    raise
  except Exception as error:  # for example, JSON that is malformed or nested too deeply
    raise _damaged(what, error) from error
  formats = {file_format.value for file_format in builder.info.available_file_formats()}
  if 'array_record' not in formats:
    raise UserError(
      f'{what} has the file format {", ".join(sorted(formats)) or "none"}; valid: array_record, which '
      "can be read without TensorFlow (prepare it with file_format='array_record')"
    )
  return builder


def _classes(value: Json) -> set[str]:
  """Returns the names of all classes in a features.json, including JSON that its strings contain."""
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except ValueError:
      return set()
  if isinstance(value, dict):
    own = {value[key] for key in _CLASS_KEYS if isinstance(value.get(key), str)}
    return own.union(*map(_classes, value.values()))
  return set().union(*map(_classes, value)) if isinstance(value, list) else set()


def _text_feature(features: 'tfds.features.FeaturesDict', what: str) -> str:
  import tensorflow_datasets as tfds

  # A string's `np_dtype` is object; its `dtype` would import TensorFlow.
  strings = [
    name
    for name, feature in features.items()
    if isinstance(feature, tfds.features.Tensor)
    and feature.shape == ()
    and np.dtype(feature.np_dtype).kind == 'O'
  ]
  if 'text' in strings:
    return 'text'
  if len(strings) != 1:
    raise UserError(
      f'{what} has {len(strings)} features of text ({", ".join(strings) or "none"}) among '
      f"{', '.join(features)}; valid: one named 'text', or only one"
    )
  return strings[0]


def _documents(
  builder: 'tfds.core.DatasetBuilder', split: str, feature: str, what: str
) -> list[bytes]:
  import tensorflow_datasets as tfds

  found: list[bytes] = []
  try:
    # Other features, such as images or sound, are not decoded.
    others = {n: tfds.decode.SkipDecoding() for n in builder.info.features if n != feature}
    source = builder.as_data_source(split, decoders=others or None)
    chunks = range(0, len(source), _CHUNK)
    for begin in tqdm(chunks, f'reading {split}', delay=2, leave=False, disable=None):
      examples = source.__getitems__(range(begin, min(begin + _CHUNK, len(source))))
      found += [example[feature] for example in examples]
  except Exception as error:  # missing, truncated or changed files raise many types
    raise _damaged(f'{what}, split {split},', error) from error
  for number, text in enumerate(found):
    if fault := why_not_text(text):
      raise UserError(f'{what}: example {number} of {split} {fault}; valid: UTF-8 text')
  return [text for text in found if text]


def _damaged(what: str, error: Exception) -> UserError:
  reason = (str(error).strip().splitlines() or [repr(error)])[0][:160]
  return UserError(f'{what} cannot be read ({reason}); valid: an intact copy, or prepare it anew')
