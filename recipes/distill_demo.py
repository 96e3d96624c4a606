"""A student of 1.5M parameters that learns the demo corpus from the demo's own model as well as from the data.

    python prep.py demo
    python train.py --recipe demo
    python train.py --recipe distill_demo
    python train.py --recipe distill_demo --name distill_demo_alone --distill.teacher ""

Needs the 900 steps of runs/demo, and 1 GB of memory. After 300 steps, with two seeds: validation loss 4.81 and 4.84
with the teacher; without it, by the last command, 5.12 and 5.13. `benchmarks/distill.py` makes the four runs.
"""

from modalities.checkpoint import CheckpointConfig
from modalities.data import DataConfig
from modalities.fsdp import ParallelConfig
from modalities.generate import SampleConfig
from modalities.kl import DistillConfig
from modalities.log import LogConfig
from modalities.model import ModelConfig
from modalities.optim import OptimConfig, ScheduleConfig
from modalities.recipe import Recipe
from modalities.step import EvalConfig

recipe = Recipe(
    steps=300,
    model=ModelConfig(vocab_size=8192, num_layers=2, width=128, num_heads=2, max_seq_len=256),
    data=DataConfig(seq_len=256, global_batch=8),
    distill=DistillConfig(teacher="runs/demo", weight=0.5),
    optim=OptimConfig(lr=3e-3, betas=(0.9, 0.99), schedule=ScheduleConfig(kind="cosine", warmup=50, final=0.0)),
    parallel=ParallelConfig(micro_batch=8),
    eval=EvalConfig(every=100),
    sample=SampleConfig(every=0),
    checkpoint=CheckpointConfig(every=0),
    log=LogConfig(every=10),
)
