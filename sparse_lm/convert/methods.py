"""Names of methods in the configs of imported models. Only this file of `convert` spells them."""

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.ranges import FieldValue

Overrides = dict[str, FieldValue]

GATED_MLP, PLAIN_MLP, MIXTURE = 'gated', 'dense', 'moe_topk'

# Fields of `config.activation`, by the name of the activation in foreign configs.
_ACTIVATIONS: dict[str, Overrides] = {
  'silu': {'activation.name': 'silu'},
  'swish': {'activation.name': 'silu'},
  'gelu': {'activation.name': 'gelu', 'activation.approximate': False},
  'gelu_new': {'activation.name': 'gelu', 'activation.approximate': True},
  'gelu_pytorch_tanh': {'activation.name': 'gelu', 'activation.approximate': True},
  'relu': {'activation.name': 'relu'},
  'relu2': {'activation.name': 'relu2'},
}


def activation(field: str, name: object) -> Overrides:
  """Returns the fields of `config.activation` for a foreign name. Raises UserError if it is unknown."""
  if name not in _ACTIVATIONS:
    raise unknown(field, name, _ACTIVATIONS)
  return _ACTIVATIONS[name]


def foreign_activation(fields: Overrides) -> str:
  """Returns the foreign name of an activation.

  Args:
    fields: the fields of `config.activation` by dotted name; others are not read.

  Raises UserError if the activation has no foreign name.
  """
  for name, own in _ACTIVATIONS.items():
    if all(fields.get(field) == value for field, value in own.items()):
      return name
  raise UserError(
    f'config.activation.name={fields["activation.name"]!r} has no counterpart in Hugging Face; valid: '
    f'{", ".join(sorted({own["activation.name"] for own in _ACTIVATIONS.values()}))}'
  )
