"""Plans of language models: one of each, from one trace, and the costs of passes of other kinds."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

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
  """The plan of evaluation over the whole context.

  Raises UserError as `plan.read` does, and where a method names a site that the model does not have.
  """
  tokens_BxL = jnp.zeros((1, model.spec.context), jnp.int32)
  init = functools.partial(model.init_with_output, mode='eval')
  plan = read(lambda key: init(key, tokens_BxL), tokens_BxL.size, SOWN)
  sites.check(model.site.module(model.spec).where, plan.sites, f'{model.site.group}.where')
  return plan


def ledger(model: LM, length: int, mode: str = 'eval') -> Ledger:
  """FLOPs per token of every matmul of a forward pass over `length` tokens, from a trace alone.

  Raises UserError where a kernel is in no entry, or an entry names what is no kernel.
  """
  plan = plan_of(model)
  if (length, mode) == (model.spec.context, 'eval'):
    return plan.ledger
  found = traced(model, length, mode).ledger
  check_accounted(plan.kernels, found)
  return found


@functools.lru_cache(maxsize=32)
def traced(model: LM, length: int, mode: str = 'eval') -> Traced:
  """What one sequence of `length` tokens executes and charges, in FLOPs per token.

  In mode 'decode' it is one token that is decoded with a cache for `length` tokens, and in mode 'train'
  the head on what the stack's method sows as exits belongs to it.
  """
  if mode == 'decode':
    model = model.clone(spec=dataclasses.replace(model.spec, context=length))
    return executed.trace(*_decoding(model, plan_of(model).variables))

  def run(variables: Tree, tokens_BxL: jax.Array) -> Tree:
    key = jax.random.key(0)
    rngs = {'dropout': key, 'gates': key} if mode == 'train' else None
    out, changed = model.apply(variables, tokens_BxL, mode=mode, mutable=True, rngs=rngs)
    return out, changed, lm.exits(model, variables, changed)

  tokens_BxL = jax.ShapeDtypeStruct((1, length), jnp.int32)
  return executed.trace(run, plan_of(model).variables, tokens_BxL).per_token(length)


def reads(model: LM, variables: Tree) -> Reads:
  """What a token reads of what layers keep of the tokens before it: as many as the context has.

  Args:
    variables: of the model, packed or not; shape structs will do.
  """
  return executed.reads(*_decoding(model, variables))


def _decoding(model: LM, variables: Tree) -> tuple[Callable[..., Tree], Tree, Tree, Tree]:
  """A function that decodes a token with a cache for the model's context, and its arguments."""
  cache = lm.cache_shapes(model, variables, 1)

  def run(variables: Tree, cache: Tree, token_Bx1: jax.Array) -> Tree:
    return model.apply({**variables, 'cache': cache}, token_Bx1, mode='decode', mutable=['cache'])

  return run, variables, cache, jax.ShapeDtypeStruct((1, 1), jnp.int32)


@functools.lru_cache(maxsize=32)
def recomputed(model: LM, length: int) -> float:
  """Share of a training step's forward pass that its backward pass computes again: 0 without remat."""
  if model.spec.remat == NO_REMAT:
    return 0.0
  variables = dict(plan_of(model).variables)
  params = variables.pop('params')
  tokens_BxL = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def flops(remat: str) -> float:
    """Of a pass and its gradients."""
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
