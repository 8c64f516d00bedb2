"""The dense model and its training step in PyTorch, the reference for the speed of the JAX step.

`python -m experiments.torch_twin --width=768 ...` runs in a process of its own, so that the two
frameworks do not share an allocator. It compiles the step (`torch.compile` and bfloat16 autocast on a
GPU; eager float32 in two threads on a CPU) and prints a JSON object with `params` and `torch` (the
version). Each line of its input is a number of steps. It runs these steps without waiting for the
device in between, and prints a JSON object with their `seconds` and its `peak_memory` in bytes so far.

The model is that of config.model.norm=layernorm and config.model.positions=learned: pre-norm layers,
fused query, key and value projections, SDPA, squared ReLU, an untied head, no biases. AdamW is fused
and decays matrices only; the gradient is clipped by its global norm. The constants are those of
`configs/base.py`.
"""

import argparse
import dataclasses
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

LEARNING_RATE, BETAS, EPS, DECAY, CLIP = 2e-3, (0.9, 0.99), 1e-8, 0.1, 1.0
NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Dimensions of the model and of its batch; the defaults are those of GPT-2 small."""

  layers: int = 12
  width: int = 768
  hidden: int = 3072
  heads: int = 12
  context: int = 1024
  batch: int = 16
  vocab: int = 50304


class Block(nn.Module):
  """One pre-norm layer of attention and MLP."""

  def __init__(self, sizes: Sizes) -> None:
    super().__init__()
    width, hidden = sizes.width, sizes.hidden
    self.heads = sizes.heads
    self.norm_1 = nn.LayerNorm(width, eps=NORM_EPS, bias=False)
    self.norm_2 = nn.LayerNorm(width, eps=NORM_EPS, bias=False)
    self.qkv, self.out = (
      nn.Linear(width, 3 * width, bias=False),
      nn.Linear(width, width, bias=False),
    )
    self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps activations `[B, L, D]` to `[B, L, D]`."""
    b, l, d = x.shape
    parts = self.qkv(self.norm_1(x)).split(d, 2)
    q, k, v = (part.view(b, l, self.heads, -1).transpose(1, 2) for part in parts)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, l, d)
    x = x + self.out(y)
    return x + self.down(F.relu(self.up(self.norm_2(x))).square())


class TorchLM(nn.Module):
  """A language model of pre-norm layers, and its loss."""

  def __init__(self, sizes: Sizes) -> None:
    super().__init__()
    self.embed = nn.Embedding(sizes.vocab, sizes.width)
    self.position = nn.Embedding(sizes.context, sizes.width)
    self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
    self.norm = nn.LayerNorm(sizes.width, eps=NORM_EPS, bias=False)
    self.head = nn.Linear(sizes.width, sizes.vocab, bias=False)
    nn.init.normal_(self.embed.weight, std=0.02)
    nn.init.normal_(self.position.weight, std=0.02)

  def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy in nats per token, for int64 tokens and targets `[B, L]`."""
    x = self.embed(tokens) + self.position.weight
    for block in self.blocks:
      x = block(x)
    return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


class Trainer:
  """The model, its optimizer and one batch of random tokens."""

  def __init__(self, sizes: Sizes) -> None:
    self.gpu = torch.cuda.is_available()
    self.device = 'cuda' if self.gpu else 'cpu'
    self.model = TorchLM(sizes).to(self.device)
    self.loss = torch.compile(self.model) if self.gpu else self.model
    parameters = list(self.model.parameters())
    groups = [
      {'params': [p for p in parameters if p.ndim >= 2], 'weight_decay': DECAY},
      {'params': [p for p in parameters if p.ndim < 2], 'weight_decay': 0.0},
    ]
    self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)
    shape = (sizes.batch, sizes.context + 1)
    self.tokens = torch.randint(0, sizes.vocab, shape, device=self.device)

  def step(self) -> torch.Tensor:
    """Runs one optimizer step, and returns the loss before its update."""
    with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.gpu):
      loss = self.loss(self.tokens[:, :-1], self.tokens[:, 1:].contiguous())
    loss.backward()
    nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  def window(self, steps: int) -> float:
    """Runs `steps` steps and returns the seconds; the device is idle before and after them."""
    self.wait()
    begin = time.perf_counter()
    for _ in range(steps):
      self.step()
    self.wait()
    return time.perf_counter() - begin

  def wait(self) -> None:
    """Waits until the device is idle."""
    if self.gpu:
      torch.cuda.synchronize()

  @property
  def peak_memory(self) -> int | None:
    """The peak memory of tensors so far, in bytes; `None` on a CPU."""
    return torch.cuda.max_memory_allocated() if self.gpu else None


def main() -> None:
  """Runs a window of steps for each line of the input, until the input ends."""
  parser = argparse.ArgumentParser()
  for field in dataclasses.fields(Sizes):
    parser.add_argument(f'--{field.name}', type=int, default=field.default)
  if not torch.cuda.is_available():
    torch.set_num_threads(2)
  torch.set_float32_matmul_precision('high')
  trainer = Trainer(Sizes(**vars(parser.parse_args())))
  trainer.window(1)
  _print(params=sum(p.numel() for p in trainer.model.parameters()), torch=torch.__version__)
  for line in sys.stdin:
    _print(seconds=trainer.window(int(line)), peak_memory=trainer.peak_memory)


def _print(**values: float | str | None) -> None:
  print(json.dumps(values), flush=True)


if __name__ == '__main__':
  main()
