"""60M parameters with GPT-2's vocabulary and a Llama-like block.

    torchrun --nproc_per_node 2 train.py --recipe gpt2_60m

Its data is the demo's until you give your own. On two cores of a 2.1 GHz Xeon one process does 1,090 tokens/s in bf16
and 520 in fp32, so all 2,000 steps would take four hours, and were not run. The loss at steps 1, 10 and 20: 10.92,
9.97, 9.03.
"""

from modalities.checkpoint import CheckpointConfig
from modalities.data import DataConfig
from modalities.fsdp import ParallelConfig
from modalities.model import ModelConfig
from modalities.optim import OptimConfig, ScheduleConfig
from modalities.recipe import Recipe
from modalities.step import EvalConfig

recipe = Recipe(
    steps=2000,
    model=ModelConfig(vocab_size=50_257, num_layers=10, width=512, num_heads=8, mlp_width=1536, max_seq_len=512),
    data=DataConfig(seq_len=512, global_batch=16),
    optim=OptimConfig(lr=1e-3, schedule=ScheduleConfig(kind="cosine", warmup=100)),
    parallel=ParallelConfig(micro_batch=4, activation_checkpointing="selective"),
    eval=EvalConfig(every=500, samples=64),
    checkpoint=CheckpointConfig(every=500),
)
