"""The names of config files, where the name of a method was expected."""

from ml_collections import ConfigDict

from sparse_lm.core.errors import UserError, listed


def instead_of_method(
  field: str, name: str, valid: list[str], given: ConfigDict, default: ConfigDict
) -> UserError | None:
  """Returns an error that points to `configs/NAME.py`, or `None` if that file leaves the slot unchanged.

  Args:
    field: the config field that names the method.
    name: the name, which is no method of the slot.
    valid: the names of the slot's methods.
    given: the slot's group in `configs/NAME.py`.
    default: the slot's group in `configs/base.py`.
  """
  sets = [
    f'{key}={value!r}'
    for key, value in given.items()
    if not isinstance(value, ConfigDict) and (key not in default or default[key] != value)
  ]
  if not sets:
    return None
  group = field.removesuffix('.name')
  return UserError(
    f'{field}={name!r} is not a method, but configs/{name}.py is a config; valid: '
    f'--config=configs/{name}.py, whose {group} has {", ".join(sets)}; or a method: '
    f'{listed(sorted(valid), name, room=40)}'
  )
