"""Llama 3.2 1B from scratch on 25 billion tokens, 20 a parameter.

    torchrun --nproc_per_node 8 train.py --recipe llama_1b --data.train fineweb.pbin --data.val fineweb_val.pbin \\
        --data.tokenizer llama3/tokenizer.json --data.eod "<|end_of_text|>"

Its data is the demo's until you give your own. Batch, learning rate and schedule are those of TinyLlama (Zhang et al.,
arXiv 2401.02385), which is as large; Meta distilled its model from larger ones. RoPE is not scaled, for that came after
pretraining. By the dry run's estimate it needs GPUs of 80 GB. It was not run: it has no measured loss and no measured
rate.
"""

from dataclasses import replace

from modalities import presets
from modalities.checkpoint import CheckpointConfig
from modalities.data import DataConfig
from modalities.fsdp import ParallelConfig
from modalities.log import LogConfig
from modalities.optim import OptimConfig, ScheduleConfig
from modalities.recipe import Recipe
from modalities.rope import RopeScaling
from modalities.step import EvalConfig

recipe = Recipe(
    steps=12_000,  # of 2,097,152 tokens
    model=replace(presets.llama3_1b(), max_seq_len=4096, rope_scaling=RopeScaling()),
    data=DataConfig(seq_len=4096, global_batch=512),
    optim=OptimConfig(lr=4e-4, schedule=ScheduleConfig(kind="cosine", warmup=2000)),
    parallel=ParallelConfig(micro_batch=4),
    eval=EvalConfig(every=500, samples=1024),
    checkpoint=CheckpointConfig(every=1000),
    log=LogConfig(every=10),
)
