"""Plans of language models (cached), and the costs of other kinds of passes."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_lm.core.errors import UserError
from sparse_lm.core.paths import BIAS, Place
from sparse_lm.core.tree import Tree
from sparse_lm.layers.sow import SOWN
from sparse_lm.layers.spec import NO_REMAT
from sparse_lm.model import lm
from sparse_lm.model.lm import LM
from sparse_lm.plan import executed, sites
from sparse_lm.plan.cost import Ledger, Reads
from sparse_lm.plan.executed import Traced
from sparse_lm.plan.plan import ModelPlan, check_accounted, read


@functools.lru_cache(maxsize=64)
def plan_of(model: LM) -> ModelPlan:
  """Returns the plan of an evaluation pass over the whole context.

  Raises:
    UserError: `plan.read` raises it, or the site method names a site that the model does not have.
  """
  context = model.spec.context

  def init(key: jax.Array) -> tuple[Tree, Tree]:
    # The tokens are made inside the trace, because outside it they would be a compiled program.
    return model.init_with_output(key, jnp.zeros((1, context), jnp.int32), mode='eval')

  plan = read(init, context, SOWN)
  sites.check(model.site.module(model.spec).where, plan.sites, f'{model.site.group}.where')
  _check_biases(model, plan)
  return plan


def _check_biases(model: LM, plan: ModelPlan) -> None:
  """Raises a UserError if a name in `config.model.biases` gives no layer a bias."""
  biases = [place for place in map(Place.parse, plan.shapes) if place.is_bias]
  # 'block_0/mlp/up/bias' and 'block_0/mlp/experts/up_bias' are biases of layers named 'up'.
  names = ['/'.join(place.names).removesuffix(BIAS)[:-1] for place in biases]
  layers = {name.rpartition('/')[2] for name in names}
  for name in model.spec.biases:
    if name not in {layer.rstrip('_0123456789') for layer in layers}:
      raise UserError(
        f'config.model.biases={model.spec.biases}: no layer of this model is named {name!r}; valid: '
        'names of its layers'
      )


def ledger(model: LM, length: int, mode: str = 'eval') -> Ledger:
  """Returns the FLOPs per token of every matmul of a forward pass over `length` tokens, by tracing.

  Raises:
    UserError: a kernel has no entry in the ledger, or an entry names a parameter that is not a kernel.
  """
  plan = plan_of(model)
  if (length, mode) == (model.spec.context, 'eval'):
    return plan.ledger
  found = traced(model, length, mode).ledger
  check_accounted(plan.kernels, found)
  return found


@functools.lru_cache(maxsize=32)
def traced(model: LM, length: int, mode: str = 'eval') -> Traced:
  """Returns the executed and the charged FLOPs per token of a sequence of `length` tokens.

  In mode 'decode', this is one token that is decoded with a cache for `length` tokens. In mode 'train',
  it includes the head's predictions from early exits.
  """
  if mode == 'decode':
    model = model.clone(spec=dataclasses.replace(model.spec, context=length))
    return executed.trace(*_decoding(model, plan_of(model).variables))

  def run(variables: Tree, tokens_BxL: jax.Array) -> Tree:
    key = jax.random.key(0)
    rngs = {'dropout': key, 'gates': key} if mode == 'train' else None
    out, changed = model.apply(variables, tokens_BxL, mode=mode, mutable=True, rngs=rngs)
    return out, changed, lm.exit_predictions(model, variables, changed)

  tokens_BxL = jax.ShapeDtypeStruct((1, length), jnp.int32)
  return executed.trace(run, plan_of(model).variables, tokens_BxL).per_token(length)


def reads(model: LM, variables: Tree) -> Reads:
  """Returns the bytes that decoding one token reads from caches that hold the whole context.

  Args:
    model: the model.
    variables: its variables, packed or not; shape structs suffice.
  """
  return executed.reads(*_decoding(model, variables))


def _decoding(model: LM, variables: Tree) -> tuple[Callable[..., Tree], Tree, Tree, Tree]:
  """Returns a function that decodes one token with a cache for the whole context, and its arguments."""
  cache = lm.cache_shapes(model, variables, 1)

  def run(variables: Tree, cache: Tree, token_Bx1: jax.Array) -> Tree:
    return model.apply({**variables, 'cache': cache}, token_Bx1, mode='decode', mutable=['cache'])

  return run, variables, cache, jax.ShapeDtypeStruct((1, 1), jnp.int32)


@functools.lru_cache(maxsize=32)
def recomputed(model: LM, length: int) -> float:
  """Returns the fraction of a training step's forward pass that the backward pass recomputes (remat)."""
  if model.spec.remat == NO_REMAT:
    return 0.0
  variables = dict(plan_of(model).variables)
  params = variables.pop('params')
  tokens_BxL = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def flops(remat: str) -> float:
    """Returns the FLOPs of a forward and a backward pass."""
    same = model.clone(spec=dataclasses.replace(model.spec, remat=remat))
    key = jax.random.key(0)
    rngs = {'dropout': key, 'gates': key}

    def total(params: Tree, state: Tree, tokens_BxL: jax.Array) -> jax.Array:
      found = same.apply({'params': params, **state}, tokens_BxL, 'train', mutable=True, rngs=rngs)
      return jnp.sum(found[0])

    return executed.trace(jax.grad(total), params, variables, tokens_BxL).flops

  return (flops(model.spec.remat) - flops(NO_REMAT)) / (
    length * traced(model, length, 'train').flops
  )
