"""Llama 3 8B from scratch on 160 billion tokens, 20 a parameter.

    torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --recipe llama_8b \\
        --data.train web.pbin code.pbin --data.val val.pbin \\
        --data.tokenizer llama3/tokenizer.json --data.eod "<|end_of_text|>"

Its data is the demo's until you give your own. Peak learning rate, batch of 4 million tokens, AdamW and the decay to a
hundredth are those of Llama 3 (Grattafiori et al., arXiv 2407.21783, table 3 and section 3.4.1); the warm-up is
shorter, for so is the run. RoPE is not scaled, for that came after pretraining. By the dry run's estimate it needs
eight or more GPUs of 141 GB, for activations are kept. It was not run: it has no measured loss and no measured rate.
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
    steps=38_000,  # of 4,194,304 tokens
    model=replace(presets.llama3_8b(), max_seq_len=8192, rope_scaling=RopeScaling()),
    data=DataConfig(seq_len=8192, global_batch=512),
    optim=OptimConfig(lr=3e-4, schedule=ScheduleConfig(kind="cosine", warmup=2000, final=0.01)),
    parallel=ParallelConfig(micro_batch=1),
    eval=EvalConfig(every=500, samples=512),
    checkpoint=CheckpointConfig(every=1000),
    log=LogConfig(every=10),
)
