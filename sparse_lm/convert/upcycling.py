"""Makes a dense model a mixture of experts (sparse upcycling, Komatsuzaki et al. 2022)."""

import dataclasses

import numpy as np
from tqdm import tqdm

from sparse_lm.convert.methods import GATED_MLP, MIXTURE, PLAIN_MLP
from sparse_lm.convert.model_parts import ModelParts, open_workdir
from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError, require
from sparse_lm.core.tree import Tree
from sparse_lm.inference.pack import nested
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.runs import configs
from sparse_lm.runs.environment import environment
from sparse_lm.runs.run_folder import CONFIG, WEIGHTS, with_format
from sparse_lm.runs.weight_files import WeightFiles
from sparse_lm.runs.workdir import check_new, whole_folder, write_json

# Standard deviation of the router's initial weights times sqrt(width), as in `methods/mlp/moe_topk.py`.
_ROUTER_SCALE = 0.1**0.5


@dataclasses.dataclass(frozen=True)
class Upcycling:
  """The size of a mixture of experts.

  Attributes:
    experts: number of experts, all of which begin as copies of the dense MLP.
    k: number of experts that a token visits, at least 2. Their weights sum to 1, so the mixture computes
      the same as the dense model before training. With k = 1 the weight of an expert would be its
      probability, and the mixture would compute something else.
  """

  experts: int
  k: int

  @classmethod
  def parse(cls, text: str) -> 'Upcycling':
    """Parses 'experts:8,k:2'. Raises UserError for other texts and for numbers out of range."""
    valid = "such as 'experts:8,k:2', with 2 <= k <= experts"
    try:
      pairs = dict(pair.split(':') for pair in text.split(','))
      found = cls(**{name.strip(): int(value) for name, value in pairs.items()})
    except (ValueError, TypeError):
      raise UserError(f'--upcycle={text!r} is not valid; valid: {valid}') from None
    require(2 <= found.k <= found.experts <= 2**16, '--upcycle', text, valid)
    return found


def upcycle(workdir: str, out: str, size: Upcycling) -> ModelParts:
  """Writes a workdir whose MLPs are mixtures of copies of a dense model's MLPs.

  Args:
    workdir: the workdir of the dense model.
    out: the new workdir.
    size: the size of the mixture.

  Returns the dense model. Raises UserError if its MLP is not dense, or if it has collections besides the
  parameters.
  """
  check_new(out, '--out')
  model = open_workdir(workdir)
  mlp = model.config.mlp
  if mlp.name not in (GATED_MLP, PLAIN_MLP) or mlp.layers != ':' or mlp.order:
    raise UserError(
      f'--upcycle needs one dense MLP in every layer, and {workdir} has config.mlp.name={mlp.name!r} in '
      f'the layers {mlp.layers!r}; valid: {GATED_MLP} or {PLAIN_MLP} in all layers'
    )
  if model.model_state:
    raise UserError(
      f'--upcycle copies parameters alone, and {workdir} also holds the collections '
      f'{", ".join(sorted(model.model_state))}; valid: a model without them (upcycle first, and '
      'calibrate thresholds then)'
    )
  fields = {'mlp.name': MIXTURE, 'mlp.experts': size.experts, 'mlp.k': size.k}
  fields |= {'mlp.gated': mlp.name == GATED_MLP, 'mlp.normalise': True}
  config = configs.derive(model.config, fields, allowed=('mlp',))
  shapes = tree.named(plan_of(lm.from_config(config, model.tokenizer.vocab_size)).params)
  draw = np.random.default_rng(rng.data_seed(config.seed))
  with whole_folder(out) as folder:
    write_json(folder / CONFIG, with_format(configs.to_json(config)))
    write_json(folder / 'env.json', environment())
    write_json(folder / 'tokenizer.json', model.tokenizer.to_json())
    files = WeightFiles(folder / WEIGHTS, config.model.layers)
    bar = tqdm(files.parts, desc='copying', unit='layer', delay=2, leave=False, disable=None)
    for part in bar:
      params, masks = (_copied(found, size.experts) for found in model.read(part))
      if part is not None:
        router = f'block_{part}/mlp/router/kernel'
        noise = draw.normal(size=shapes[router].shape) * _ROUTER_SCALE
        params[router] = (noise * shapes[router].shape[0] ** -0.5).astype(shapes[router].dtype)
      files.write(part, nested(params), nested(masks))
    files.finish(f'{size.experts} experts copied from {model.source}', model.step, model.work)
  return model


def _copied(found: Tree, experts: int) -> dict[str, np.ndarray]:
  """Returns all arrays by path. The arrays of an MLP are repeated once for each expert."""
  arrays = {}
  for path, array in tree.named(found).items():
    layer, _, rest = path.partition('/mlp/')
    if rest:
      name, _, kind = rest.partition('/')
      path = f'{layer}/mlp/experts/{name if kind == "kernel" else f"{name}_{kind}"}'
      array = np.broadcast_to(np.asarray(array), (experts, *array.shape))
    arrays[path] = array
  return arrays
