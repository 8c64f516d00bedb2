"""Named initialisations; the initial distribution depends on the matrix's role.

- `fan_in`: normal with standard deviation `1/sqrt(in)`, times `1/sqrt(2 * layers)` for matrices whose
  output is added to the residual stream. The head starts at zero, so the first loss is ln(vocab).
- `gpt2`: normal with standard deviation 0.02, and `0.02/sqrt(2 * layers)` for matrices whose output is
  added to the residual stream (Radford et al. 2019; nanoGPT).
"""

from collections.abc import Callable

import jax

Init = Callable[..., jax.Array]
ROLES = ('embed', 'in', 'out', 'head')


def _fan_in(role: str, layers: int) -> Init:
  if role == 'embed':
    return jax.nn.initializers.normal(1.0)
  if role == 'head':
    return jax.nn.initializers.zeros
  scale = 1.0 if role == 'in' else 1.0 / (2 * layers)
  return jax.nn.initializers.variance_scaling(scale, 'fan_in', 'normal')


def _gpt2(role: str, layers: int) -> Init:
  return jax.nn.initializers.normal(0.02 / (2 * layers) ** 0.5 if role == 'out' else 0.02)


INITS: dict[str, Callable[[str, int], Init]] = {'fan_in': _fan_in, 'gpt2': _gpt2}
