"""Finds a family of foreign models that computes the same function as a model of this project."""

from ml_collections import ConfigDict

from sparse_lm.convert.family import Family, family, names
from sparse_lm.convert.fields import Fields
from sparse_lm.core.errors import UserError
from sparse_lm.core.ranges import FieldValue
from sparse_lm.core.records import Json
from sparse_lm.layers.spec import UNSCALED
from sparse_lm.model import slots
from sparse_lm.runs import configs

# Fields that do not change what a model computes in evaluation. Biases are compared by their parameters.
_FREE = (
  *('model.dropout', 'model.precision', 'model.attention_kernel', 'model.remat', 'model.init'),
  *('model.scan_layers', 'model.weights_dtype', 'model.bias', 'model.biases'),
  *('mlp.capacity', 'mlp.balance', 'mlp.z', 'mlp.jitter', 'mlp.executor'),
)
_SCALED = ('model.rope_factor', 'model.rope_low', 'model.rope_high', 'model.rope_context')
_UNUSED = ('.inner.', '.fallback.')  # groups of a slot whose method runs in all layers


def matching(config: ConfigDict, paths: set[str]) -> Family:
  """Returns the family that has models with this config and these parameters.

  Args:
    config: the config; `config.data.vocab_size` is the number of tokens.
    paths: the paths of the model's parameters.

  Raises UserError, with the fields in which the nearest family differs, if there is none.
  """
  faults: dict[str, list[str]] = {}
  for name in names():
    found = family(name, '')
    try:
      faults[name] = _differences(found, config, paths)
    except UserError as error:
      faults[name] = [str(error)]
    if not faults[name]:
      return found
  nearest = min(faults, key=lambda name: len(faults[name]))
  raise UserError(
    f'no family of Hugging Face computes what this model does; the nearest, {nearest}, differs in '
    f'{"; ".join(faults[nearest][:3])}; valid: a model of {", ".join(names())}'
  )


def _differences(found: Family, config: ConfigDict, paths: set[str]) -> list[str]:
  """Returns the fields and parameters that a family cannot express, in words."""
  own = _compared(config)
  if differing := _methods(found, config):
    return differing
  again = found.read(Fields(found.written(config), 'config.json'))
  returned = configs.load(str(configs.BASE), again)
  theirs = _compared(returned)
  names_of_fields = sorted({*own, *theirs})
  different = [name for name in names_of_fields if own.get(name) != theirs.get(name)]
  texts = [f'config.{name}={own.get(name)!r} ({theirs.get(name)!r} there)' for name in different]
  if texts:
    return texts
  there = {path for group in found.tensors(returned) for path in group.ours}
  return [f'the parameter {path}' for path in sorted(there ^ paths)]


def _methods(found: Family, config: ConfigDict) -> list[str]:
  """Returns the MLP method, in words, if it is none of the family's; otherwise an empty list."""
  mlp = config.mlp.name
  return [] if mlp in found.mlps else [f'config.mlp.name={mlp!r} ({" or ".join(found.mlps)} there)']


def _compared(config: ConfigDict) -> dict[str, Json | FieldValue]:
  """Returns the fields that change what a model computes, by dotted name."""
  fields = configs.flat(config)
  groups = ('model', *slots.LAYER_SLOTS, 'stack', 'site')
  kept = {
    name: value
    for name, value in fields.items()
    if name.partition('.')[0] in groups
    and name not in _FREE
    and not any(unused in name for unused in _UNUSED)
  }
  model = config.model
  kept['model.head_width'] = model.head_width or model.width // model.heads
  if model.rope_scaling == UNSCALED:
    kept = {name: value for name, value in kept.items() if name not in _SCALED}
  if 'mlp.hidden' in kept:
    kept['mlp.hidden'] = kept['mlp.hidden'] or model.hidden
  return kept
