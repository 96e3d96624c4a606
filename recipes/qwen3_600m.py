"""Qwen3 0.6B from scratch on 12 billion tokens, 20 a parameter.

    torchrun --nproc_per_node 8 train.py --recipe qwen3_600m --data.train fineweb.pbin --data.val fineweb_val.pbin \\
        --data.tokenizer qwen3/tokenizer.json --data.eod "<|endoftext|>"

Its data is the demo's until you give your own. Sequences of 4,096 tokens are those of Qwen3's first stage (Yang et al.,
arXiv 2505.09388, section 3.2); batch, learning rate and schedule are ours, for the report gives none. By the dry
run's estimate it needs GPUs of 80 GB. It was not run: it has no measured loss and no measured rate.
"""

from dataclasses import replace

from modalities import presets
from modalities.checkpoint import CheckpointConfig
from modalities.data import DataConfig
from modalities.fsdp import ParallelConfig
from modalities.log import LogConfig
from modalities.optim import OptimConfig, ScheduleConfig
from modalities.recipe import Recipe
from modalities.step import EvalConfig

recipe = Recipe(
    steps=11_400,  # of 1,048,576 tokens
    model=replace(presets.qwen3_600m(), max_seq_len=4096),
    data=DataConfig(seq_len=4096, global_batch=256),
    optim=OptimConfig(lr=6e-4, schedule=ScheduleConfig(kind="wsd", warmup=500, decay=2300, final=0.0)),
    parallel=ParallelConfig(micro_batch=4),
    eval=EvalConfig(every=500, samples=1024),
    checkpoint=CheckpointConfig(every=1000),
    log=LogConfig(every=10),
)
