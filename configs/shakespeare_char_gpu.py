"""nanoGPT's GPU setting on tiny Shakespeare, with nanoGPT's architecture.

Command:  python -m sparse_lm.train --config=configs/shakespeare_char_gpu.py --workdir=results/gpu
          --config.data.path=<folder>/tiny_shakespeare.txt
Time:     91 s on one H100 (jax 0.11.2, bfloat16), 10.5 ms a step. It is meant for a GPU: on 2 CPU cores
          a step of 1.2 TFLOP would take about 13 s.
Expected: lowest validation loss 1.447 nats per character, near step 2000. The model then overfits: 1.710
          at step 5000. nanoGPT reports 1.4697 for its best checkpoint.
Source:   github.com/karpathy/nanoGPT, config/train_shakespeare_char.py.
"""

from ml_collections import ConfigDict

from configs import shakespeare_char_nanogpt


def get_config() -> ConfigDict:
  """6 layers, 6 heads, width 384, context 256, batch 64, 5000 steps, dropout 0.2.

  The model overfits, so the best checkpoint counts, and it is evaluated as often as in nanoGPT.
  """
  config = shakespeare_char_nanogpt.get_config()
  config.data.update({'context': 256, 'batch': 64})
  config.model.update(
    {'layers': 6, 'width': 384, 'hidden': 1536, 'heads': 6, 'kv_heads': 6, 'dropout': 0.2}
  )
  config.optimizer.update({'warmup': 0.02})
  config.train.update({'steps': 5000, 'eval_every': 250, 'checkpoint_every': 2500})
  return config
