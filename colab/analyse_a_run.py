# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Analyse a run
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-lm/sparse_lm/blob/main/colab/analyse_a_run.ipynb)
#
# This notebook trains a small sparse transformer for a few seconds. It then shows the training log,
# costs, masks, logits, sampled text, activations, attention maps, and interventions on activations. All
# of these come from the object that `sparse_lm.load` returns for the folder of a trained or packed
# model.

# %%
# Installs the missing packages. Packages that are already installed keep their versions.
import importlib.util

if importlib.util.find_spec('sparse_lm') is None:
  # !git clone -q https://github.com/sparse-lm/sparse_lm
  # %cd -q sparse_lm
  # !sh colab/install.sh
  pass

# %%
import tempfile

import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import sparse_lm
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.loop import train

# %matplotlib inline
runtime.prepare()
workdir = tempfile.mkdtemp()
fields = {
  'weight.name': 'static',
  'weight.sparsity': 0.8,
  'train.steps': 300,
  'train.eval_every': 100,
}
result = train(configs.load('configs/ablation.py', fields), workdir, progress=False)
run = sparse_lm.load(workdir)
print(f'step {run.step}: {run.evaluate()["val_loss"]:.3f} nats per byte on the validation text')

# %% [markdown]
# ## Log, costs and masks
#
# `run.metrics` is the training log as a pandas DataFrame, and `run.plot` plots columns of it.
# `run.costs()` returns numbers of parameters, bytes and FLOPs, and their ratios to those of the dense
# twin: the same model with the dense method in every slot.

# %%
run.plot('loss', 'val_loss')

# %%
costs = run.costs()
names = ('params', 'nonzero_params', 'sparsity_prunable', 'stored_bytes', 'flops_forward_ratio')
pd.Series({name: costs[name] for name in names})

# %% [markdown]
# `run.masks` is a dict from the path of each masked parameter to its mask, a bool array.

# %%
pd.DataFrame(
  {
    'shape': {path: str(mask.shape) for path, mask in run.masks.items()},
    'weights kept (%)': {path: 100 * mask.mean() for path, mask in run.masks.items()},
  }
)

# %% [markdown]
# ## Logits and sampled text
#
# `run.logits` and similar methods take a text, a list of texts, token ids, or an array of token ids. The
# *surprise* of a token is its negative log-probability given the tokens before it, in nats.


# %%
def surprise(logits, tokens):
  """Nats of each token but the first, `[L - 1]`."""
  logits = logits[0, :-1].astype(np.float64)
  log_sum = np.log(np.exp(logits).sum(axis=-1))
  return log_sum - logits[range(len(logits)), tokens[0, 1:]]


text = 'def __init__(self, name, value=None):\n    self.name = name\n'
tokens = run.tokens(text)
nats = surprise(run.logits(text), tokens)
print(f'{nats.mean():.3f} nats per byte; most surprising: {text[1 + nats.argmax()]!r}')
print(run.generate('def ', max_new_tokens=50, temperature=0.7, seed=1))

# %% [markdown]
# ## Activations by site
#
# A *site* is a named point of the model where activations can be read. `run.sites()` lists the sites and
# the shapes of their activations for one sequence. A shell pattern such as `block_*` selects several
# sites.

# %%
pd.Series({name: str(shape) for name, shape in run.sites().items() if 'block_0' in name})

# %%
hidden = run.activations(text, sites='block_*/mlp/hidden')
for name, value in hidden.items():
  print(f'{name}: {(value != 0).mean():.1%} of the hidden activations are not zero')

# %% [markdown]
# ## Attention maps
#
# Attention weights have the shape `[batch, key heads, query heads per key head, queries, keys]`. A fused
# attention kernel does not store these weights, so attention is computed by einsums when you read them.

# %%
maps = run.activations(text, sites='block_*/attention/attention/weights')
panels = [
  (f'layer {layer}, head {head}', weights_LxS)
  for layer, value in enumerate(maps.values())
  for head, weights_LxS in enumerate(value[0].reshape(-1, *value.shape[-2:]))
]
figure = Figure(figsize=(2.2 * len(panels), 2.3), layout='constrained')
for axes, (title, weights_LxS) in zip(figure.subplots(1, len(panels)), panels):
  image = axes.imshow(np.sqrt(weights_LxS), cmap='Greys', vmin=0, vmax=1, interpolation='nearest')
  axes.set(title=title, xticks=[], yticks=[], xlabel='key', ylabel='query')
figure.colorbar(image, ax=figure.axes, label='√(attention weight)')
figure

# %% [markdown]
# ## Interventions
#
# An intervention is a function of the activation at a site, and its result replaces the activation. Here
# we set the output of one attention layer or MLP to zero, and measure the loss on the text. The longer
# the bar, the more the prediction of the text depends on this layer. The dashed line is the loss without
# an intervention.

# %%
layers = [
  f'block_{layer}/{part}/output' for layer in range(len(maps)) for part in ('attention', 'mlp')
]
losses = {'nothing': nats.mean()}
for site in layers:
  logits = run.logits(text, interventions={site: jnp.zeros_like})
  losses[site] = surprise(logits, tokens).mean()

figure = Figure(figsize=(6.4, 2.4), layout='constrained')
axes = figure.add_subplot()
axes.barh(list(losses), list(losses.values()), color='#0072B2')
axes.axvline(losses['nothing'], color='#444444', linestyle='--')
axes.invert_yaxis()
axes.set(xlabel='loss (nats per byte)', ylabel='output set to zero')
figure

# %% [markdown]
# The function can be any function that keeps the shape. This one removes a single head. It uses that the
# input of the output projection is the concatenation of all heads.

# %%
heads = run.config.model.heads


def without(head):
  """Returns a function that sets the output of one head to zero."""

  def intervene(x):
    width = x.shape[-1] // heads
    return x.at[..., head * width : (head + 1) * width].set(0)

  return intervene


pd.Series(
  {
    f'without head {head}': surprise(
      run.logits(text, interventions={'block_1/attention/out/input': without(head)}), tokens
    ).mean()
    for head in range(heads)
  },
  name='loss (nats per byte)',
)
