"""Exports the model of a workdir as a Hugging Face folder, which the library transformers loads."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from sparse_lm.convert import hf_folder
from sparse_lm.convert.family import Family, Tensors
from sparse_lm.convert.matching import matching
from sparse_lm.convert.model_parts import ModelParts, open_workdir
from sparse_lm.core import discovery, tree
from sparse_lm.core.paths import Place
from sparse_lm.core.records import JsonObject
from sparse_lm.data.hf_tokenizer import HuggingFace
from sparse_lm.data.tokenizers import Bpe, Tokenizer
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.runs.workdir import check_new, whole_folder

SHARD = 2**30  # bytes of tensors in a file, unless a layer is larger


@dataclasses.dataclass(frozen=True)
class Exported:
  """A summary of an exported model.

  Attributes:
    family: the name of the family.
    source: where the weights come from, in words.
    parameters: number of parameters.
    tokenizer: whether the folder has the tokenizer; only Hugging Face tokenizers and BPEs are written.
  """

  family: str
  source: str
  parameters: int
  tokenizer: bool


def export(workdir: str, out: str) -> Exported:
  """Writes a model as a Hugging Face folder. Weights that a mask drops are exact zeros.

  Args:
    workdir: the workdir of a run, or of an imported or pruned model.
    out: the new folder.

  Raises UserError, before anything is written, if no family has models that compute the same function.
  """
  check_new(out, '--out')
  model = open_workdir(workdir)
  config = model.config
  shapes = tree.named(plan_of(lm.from_config(config, model.tokenizer.vocab_size)).params)
  found = matching(config, {*shapes})
  name = discovery.name_of(type(found))
  dtype = config.model.weights_dtype
  fields = {'model_type': name, 'architectures': [found.architecture], 'torch_dtype': dtype}
  special = {'bos_token_id': None, 'eos_token_id': None}
  tokenizer = _of_hugging_face(model.tokenizer)
  if tokenizer is not None:
    special = {'bos_token_id': tokenizer.bos, 'eos_token_id': tokenizer.eos}
  with whole_folder(out) as folder:
    _write_json(folder / hf_folder.CONFIG, fields | found.written(config) | special)
    _write_json(folder / hf_folder.GENERATION, {k: v for k, v in special.items() if v is not None})
    _write_tensors(folder, model, found, shapes)
    if tokenizer is not None:
      _write_tokenizer(folder, tokenizer)
  count = sum(leaf.size for leaf in shapes.values())
  return Exported(name, model.source, count, tokenizer is not None)


def _of_hugging_face(tokenizer: Tokenizer) -> HuggingFace | None:
  """Returns the tokenizer as a Hugging Face tokenizer, or `None` for a kind that has no counterpart."""
  if isinstance(tokenizer, Bpe):
    (separator,) = tokenizer.encode('\0').tolist()  # the token between documents
    return HuggingFace(tokenizer.contents, tokenizer.vocab_size, eos=separator)
  return tokenizer if isinstance(tokenizer, HuggingFace) else None


def _write_json(path: pathlib.Path, values: JsonObject) -> None:
  path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def _write_tensors(
  folder: pathlib.Path, model: ModelParts, found: Family, shapes: dict[str, jax.ShapeDtypeStruct]
) -> None:
  """Writes the tensors. A shard holds one or more whole parts; several shards get an index file."""
  groups: dict[int | None, list[Tensors]] = {part: [] for part in model.parts}
  for group in found.tensors(model.config):
    groups[Place.parse(group.ours[0]).layer].append(group)
  shards: list[list[int | None]] = [[]]
  sizes = {part: _nbytes(shapes, groups[part]) for part in model.parts}
  for part in model.parts:
    if shards[-1] and sum(sizes[one] for one in shards[-1]) + sizes[part] > SHARD:
      shards.append([])
    shards[-1].append(part)
  place: dict[str, str] = {}
  bar = tqdm(shards, desc='writing', unit='file', delay=2, leave=False, disable=None)
  for number, shard in enumerate(bar, start=1):
    file = f'model-{number:05}-of-{len(shards):05}.safetensors'
    file = hf_folder.WEIGHTS if len(shards) == 1 else file
    arrays = {}
    for part in shard:
      params = tree.named(model.read(part)[0])
      for group in groups[part]:
        made = group.outward([np.asarray(params[path]) for path in group.ours])
        arrays |= {_full(found, n): np.ascontiguousarray(a) for n, a in zip(group.theirs, made)}
    save_file(arrays, folder / file, metadata={'format': 'pt'})
    place |= dict.fromkeys(arrays, file)
  if len(shards) > 1:
    total = {'total_size': sum(sizes.values())}
    _write_json(folder / hf_folder.INDEX, {'metadata': total, 'weight_map': place})


def _nbytes(shapes: dict[str, jax.ShapeDtypeStruct], groups: list[Tensors]) -> int:
  return sum(tree.nbytes(shapes[path]) for group in groups for path in group.ours)


def _full(found: Family, name: str) -> str:
  """Returns the name of a tensor in a file. Tensors of the head have no prefix, and all others do."""
  return name if name in found.heads else found.prefix + name


def _write_tokenizer(folder: pathlib.Path, tokenizer: HuggingFace) -> None:
  contents = json.loads(tokenizer.contents)
  _write_json(folder / hf_folder.TOKENIZER, contents)
  options: JsonObject = {'tokenizer_class': 'PreTrainedTokenizerFast'}
  for name, text in (('bos_token', tokenizer.bos_text), ('eos_token', tokenizer.eos_text)):
    if text:
      options[name] = text
  if tokenizer.chat_template is not None:
    options['chat_template'] = tokenizer.chat_template
  _write_json(folder / hf_folder.TOKENIZER_CONFIG, options)
