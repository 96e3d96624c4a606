"""The real command line, end to end, in a folder of its own: prep.py, train.py, torchrun, generate."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_loop import assert_same_weights, losses, weights

from modalities import loop
from modalities.log import read_metrics
from modalities.optim import ScheduleConfig
from modalities.pbin import open_pbin

ROOT = Path(__file__).parents[1]
# Small enough for a test, whole in every part: the recipe is `demo` with these overrides.
SMALL_MODEL = ["--model.num-layers=2", "--model.width=64", "--model.num-heads=4", "--model.max-seq-len=64"]
SMALL_RUN = ["--data.seq-len=64", "--data.global-batch=4", "--parallel.micro-batch=2", "--parallel.compile=off"]
SMALL_RUN += ["--parallel.param-dtype=float32", "--eval.samples=8", "--eval.every=10", "--sample.num-tokens=8"]
SMALL_RUN += ["--sample.every=10", "--checkpoint.every=10", "--log.every=1", "--optim.schedule.warmup=5"]
SMALL = SMALL_MODEL + SMALL_RUN


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True)


def train(*args: str, cwd: Path, ranks: int = 0) -> str:
    """Run train.py (under torchrun if `ranks`), which must succeed, and return what it prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", f"{ranks}"] if ranks else []
    done = command(*launcher, str(ROOT / "train.py"), *args, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    done = command(str(ROOT / "prep.py"), "demo", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "data"


@pytest.fixture
def here(tmp_path: Path, demo_data: Path) -> Path:
    """A folder in which the demo data is prepared."""
    (tmp_path / "data").symlink_to(demo_data)
    return tmp_path


def test_from_documents_to_text(here: Path) -> None:
    shown = train("--recipe", "demo", "--steps", "20", *SMALL, cwd=here)
    run = here / "runs" / "demo"
    assert "val/val loss" in shown and "tokens/s" in shown and "eta" in shown and "runs/demo/loss.png" in shown
    assert (run / "recipe.py").read_bytes() == (ROOT / "recipes" / "demo.py").read_bytes()
    assert {"git_commit", "torch", "python", "hosts", "command"} <= json.loads(
        (run / "environment.json").read_text()
    ).keys()
    assert (run / "tokenizer.json").read_bytes() == (here / "data/demo/tokenizer.json").read_bytes()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tb").glob("events*"))
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2
    assert losses(run)[-1] < losses(run)[0] - 0.5

    generate = ("-m", "modalities.generate", "runs/demo", "--prompt", "def ", "--num-tokens", "12")
    greedy = [command(*generate, "--temperature", "0", cwd=here).stdout for _ in range(2)]
    assert greedy[0] == greedy[1] and greedy[0].startswith("def ")
    as_json = json.loads(command(*generate, "--json", "--seed", "3", cwd=here).stdout)
    assert as_json["prompt"] == "def " and as_json["text"]


def test_a_recipe_of_ones_own(here: Path) -> None:
    (here / "recipes").mkdir()
    text = (ROOT / "recipes" / "gpt2_60m.py").read_text()
    edited = text.replace(
        "num_layers=10, width=512, num_heads=8, mlp_width=1536", "num_layers=2, width=32, num_heads=2"
    )
    assert edited != text
    (here / "recipes" / "mine.py").write_text(edited)
    train("--recipe", "mine", "--steps", "2", *SMALL_RUN, "--data.seq-len", "32", cwd=here)
    assert json.loads((here / "runs/mine/recipe.json").read_text())["model"]["width"] == 32
    assert "mine" in command(str(ROOT / "train.py"), "--help", cwd=here).stdout


def test_recipe_json_reproduces_a_run_to_the_bit(here: Path) -> None:
    train("--recipe", "demo", "--steps", "20", "--name", "x", "--model.resid-dropout", "0.1", *SMALL, cwd=here)
    train("--recipe", "runs/x/recipe.json", "--name", "y", cwd=here)
    assert_same_weights(here / "runs/x", here / "runs/y")
    assert losses(here / "runs/x") == losses(here / "runs/y")


AUTO = """
import sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
from pathlib import Path
import tiny
from modalities.checkpoint import CheckpointConfig
recipe = tiny.recipe(Path({folder!r}), steps=4, checkpoint=CheckpointConfig(every=2))
recipe = replace(recipe, parallel=replace(recipe.parallel, micro_batch="auto"))
"""


@pytest.mark.slow
def test_a_run_with_a_searched_micro_batch_goes_on_and_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "auto.py").write_text(AUTO.format(tests=str(ROOT / "tests"), folder=str(tmp_path)))
    again = ("--recipe", "auto.py", "--name", "x")
    train(*again, cwd=tmp_path)
    assert json.loads((tmp_path / "runs/x/recipe.json").read_text())["parallel"]["micro_batch"] == "auto"
    shutil.move(tmp_path / "runs/x/step-00000004", tmp_path / "straight/step-00000004")
    assert "after step 2" in train(*again, cwd=tmp_path)
    train("--recipe", "runs/x/recipe.json", "--name", "y", cwd=tmp_path)
    straight, resumed, repeated = (weights(tmp_path / name, 4) for name in ("straight", "runs/x", "runs/y"))
    assert len(straight) > 10 and all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert all(torch.equal(straight[name], repeated[name]) for name in straight)


@pytest.mark.slow
def test_model_from_on_the_command_line(here: Path) -> None:
    """A run begun from another's weights goes on by the same command, whatever became of the other."""
    train("--recipe", "demo", "--name", "x", *SMALL, "--steps", "4", cwd=here)
    again = ("--recipe", "demo", "--name", "y", "--model-from", "runs/x", *SMALL_RUN, "--model.resid-dropout", "0.1")
    train(*again, "--steps", "2", cwd=here)
    recipe = json.loads((here / "runs/y/recipe.json").read_text())
    assert recipe["model_from"] == "runs/x/step-00000004" and recipe["model"]["resid_dropout"] == 0.1
    shutil.move(here / "runs/x", here / "gone")
    assert "y is trained" in train(*again, "--steps", "2", cwd=here)
    text = command("-m", "modalities.generate", "runs/y", "--prompt", "def ", "--num-tokens", "3", cwd=here).stdout
    assert text.startswith("def ")


def test_a_run_opens_in_transformers(here: Path) -> None:
    """Trained in bf16, as recipes are: in fp32 it is the same model here and there."""
    transformers = pytest.importorskip("transformers")
    train("--recipe", "demo", *SMALL, "--parallel.param-dtype=bfloat16", "--steps", "30", cwd=here)
    shown = command("-m", "modalities.hf", "export", "runs/demo", "--out", "hf", cwd=here)
    assert shown.returncode == 0 and "to the bit" in shown.stdout, shown.stderr
    model, info = transformers.AutoModelForCausalLM.from_pretrained(here / "hf", output_loading_info=True)
    assert not any(info.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(here / "hf")

    prompt = "    def __init__(self"
    tokens = tokenizer(prompt, return_tensors="pt")
    theirs = model.generate(**tokens, max_new_tokens=30, do_sample=False)[0]
    args = ("--prompt", prompt, "--temperature", "0", "--num-tokens", "30", "--dtype", "float32")
    for source in ("runs/demo", "hf"):
        ours = command("-m", "modalities.generate", source, *args, cwd=here).stdout
        assert ours == tokenizer.decode(theirs, skip_special_tokens=True) + "\n"

    stream = torch.from_numpy(open_pbin(here / "data/demo/val.pbin").tokens[: 8 * 64 + 1].astype("int64"))
    with torch.no_grad():
        logits = model(stream[:-1].view(8, 64)).logits
    loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), stream[1:]))
    options = ("--data", "data/demo/val.pbin", "--seq-len", "64", "--samples", "8", "--dtype", "float32", "--json")
    for source in ("runs/demo", "hf"):
        found = json.loads(command("-m", "modalities.evaluate", source, *options, cwd=here).stdout)
        assert found["total"]["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_backend_that_cannot_run_leaves_no_folder(here: Path) -> None:
    args = ("--recipe", "demo", "--name", "f", "--model.attention", "flash")
    done = command(str(ROOT / "train.py"), *args, cwd=here)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "model.attention 'flash' cannot run here: it needs a CUDA device" in done.stderr
    assert not (here / "runs/f").exists()


def test_gpt2_60m_on_one_and_two_ranks(here: Path) -> None:
    """The recipe's own command with fewer steps, layers, words and tokens; `make test-all` runs the model whole."""
    small = ("--model.num-layers", "1", "--model.vocab-size", "8192", "--data.seq-len", "32")
    same_losses(5, small, here)


@pytest.mark.slow
def test_gpt2_60m_whole_on_one_and_two_ranks(here: Path) -> None:
    same_losses(20, ("--data.seq-len", "64"), here)


def same_losses(steps: int, args: tuple[str, ...], here: Path) -> None:
    args = ("--recipe", "gpt2_60m", "--steps", f"{steps}", *args)
    args += ("--data.global-batch", "4", "--parallel.micro-batch", "2", "--log.every", "1", "--data.val")
    args += ("--parallel.param-dtype", "float32", "--parallel.compile=off", "--checkpoint.every", "0")
    train(*args, "--name", "one", cwd=here)
    train(*args, "--name", "two", cwd=here, ranks=2)
    one, two = losses(here / "runs/one"), losses(here / "runs/two")
    assert len(one) == steps
    torch.testing.assert_close(two, one, rtol=1e-4, atol=0)


def test_two_sources_in_packed_documents(here: Path) -> None:
    sources = ["--data.train", "data/demo/train.pbin", "data/demo/val.pbin", "--data.names", "stdlib", "more"]
    shown = train("--recipe", "demo", "--steps", "4", *SMALL, *sources, "--data.weights", "3", "1",
                  "--data.sampling", "best_fit", "--data.document-mask", cwd=here)  # fmt: skip
    assert "stdlib (best_fit): " in shown and "% padding" in shown and "documents cut; 75.0% of the run" in shown
    assert "loss/more" in shown
    lines = [json.loads(line) for line in (here / "runs/demo/metrics.jsonl").read_text().splitlines()]
    assert any("loss/stdlib" in line and "loss/more" in line for line in lines)


@pytest.mark.slow
def test_compiled_ranks_train(here: Path) -> None:
    train("--recipe", "demo", "--steps", "10", *SMALL, "--parallel.compile=model", "--parallel.param-dtype", "bfloat16",
          cwd=here, ranks=2)  # fmt: skip
    eager = SMALL + ["--parallel.param-dtype", "bfloat16", "--name", "eager"]
    train("--recipe", "demo", "--steps", "10", *eager, cwd=here)
    compiled = losses(here / "runs/demo")
    torch.testing.assert_close(compiled, losses(here / "runs/eager"), rtol=1e-2, atol=0)


def test_without_a_compiler_it_trains_all_the_same(here: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": "", "CXX": ""}
    args = ["--recipe", "demo", "--steps", "2", *SMALL, "--parallel.compile=model"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *args], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout and len(losses(here / "runs/demo")) == 2


def test_dry_run_says_what_would_happen_and_does_nothing(here: Path) -> None:
    shown = train("--recipe", "gpt2_60m", "--dry-run", "--optim.lr", "0.002", cwd=here)
    resolved, _, facts = shown.partition("\n}\n")
    assert json.loads(resolved + "\n}")["optim"]["lr"] == 0.002
    assert "59,845,120" in facts and "(4, 4, 512)" in facts and "FLOPs per token" in facts and "MiB" in facts
    assert not (here / "runs").exists()


def test_a_mistake_under_torchrun_is_said_and_fails(here: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = command(*torchrun, str(ROOT / "train.py"), "--recipe", "demo", "--data.global-batch", "18", cwd=here)
    assert done.returncode == 1 and "error: data.global_batch 18 is not divisible by 2 rank(s)" in done.stderr
    assert "ValueError" not in done.stderr and not (here / "runs").exists()


def test_dry_run_speaks_once_for_all_ranks(here: Path) -> None:
    shown = train("--recipe", "gpt2_60m", "--dry-run", cwd=here, ranks=2)
    assert shown.count("memory per rank") == 1 and "on 2 rank(s)" in shown


def test_help_lists_recipes_and_fields(here: Path) -> None:
    listed = train("--help", cwd=here)
    assert "demo" in listed and "gpt2_60m" in listed
    fields = train("--recipe", "demo", "--help", cwd=here)
    assert "--optim.schedule.kind" in fields and "Peak learning rate" in fields and "--data.seq-len" in fields


MISTAKES = {
    "unknown recipe": (["--recipe", "gpt2_60n"], "did you mean gpt2_60m?"),
    "no recipe": (["--steps", "3"], "--recipe NAME"),
    "unknown field": (["--recipe", "demo", "--optim.lrr", "1"], "did you mean --optim.lr?"),
    "wrong type": (["--recipe", "demo", "--steps", "many"], "--steps"),
    "heads do not divide the width": (["--recipe", "demo", "--model.num-heads", "5"], "model.num_heads 5"),
    "token beyond the vocabulary": (["--recipe", "demo", "--model.vocab-size", "100"], "model.vocab_size is 100"),
    "sequence longer than the data": (
        ["--recipe", "demo", "--data.seq-len", "9999999", "--model.max-seq-len", "9999999"],
        "data.seq_len 9,999,999",
    ),
    "global batch": (["--recipe", "demo", "--data.global-batch", "17"], "data.global_batch 17"),
    "no data": (["--recipe", "demo", "--data.train", "no.pbin"], "no.pbin is missing"),
    "no second source": (["--recipe", "demo", "--data.train", "data/demo/train.pbin", "no.pbin"], "no.pbin is missing"),
    "weights of other sources": (["--recipe", "demo", "--data.weights", "1", "2"], "data.weights: 2 given for the 1"),
    "not a mask": (["--recipe", "demo", "--data.masks", "data/demo/train.pbin"], "train.pbin is no mask"),
    "no name": (["--recipe"], "--recipe"),
    "no such json": (["--recipe", "runs/x/recipe.json"], "runs/x/recipe.json"),
}


@pytest.mark.parametrize("args, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_in_one_line(args: list[str], message: str, here: Path) -> None:
    done = command(str(ROOT / "train.py"), *args, cwd=here)
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not (here / "runs").exists()


def test_generate_without_a_checkpoint_says_so(here: Path) -> None:
    done = command("-m", "modalities.generate", "runs/none", "--prompt", "x", cwd=here)
    assert done.returncode == 1 and done.stderr.startswith("error: runs/none holds no checkpoint")


def test_a_killed_run_continues(here: Path) -> None:
    args = ("--recipe", "demo", "--steps", "40", *SMALL)
    train(*args, "--name", "straight", cwd=here)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args], cwd=here, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 25/"):
            process.kill()
            break
    process.wait()
    assert sorted(p.name for p in (here / "runs/demo").glob("step-*")) == ["step-00000010", "step-00000020"]
    shown = train(*args, cwd=here)
    assert "after step 20" in shown
    assert_same_weights_at(here, 40)


def assert_same_weights_at(here: Path, step: int) -> None:
    for run in ("demo", "straight"):
        shutil.copytree(here / "runs" / run / f"step-{step:08}", here / "compare" / run / "step-00000020")
    assert_same_weights(here / "compare/demo", here / "compare/straight")


def test_a_ramp_resumed_in_the_middle_is_the_same_run(tmp_path: Path) -> None:
    """Batches of 4 up to 384 tokens (12 sequences), of 8 up to 1,000, then of 16."""
    base = tiny.recipe(tmp_path)
    recipe = replace(
        base,
        steps=10,
        data=replace(base.data, global_batch=4, ramp=((384, 8), (1000, 16))),
        optim=replace(base.optim, schedule=ScheduleConfig(kind="cosine", unit="tokens", warmup=500)),
        checkpoint=replace(base.checkpoint, every=5),
        eval=replace(base.eval, every=0),
    )
    straight = loop.train(recipe)
    lines = [line for line in read_metrics(straight) if "loss" in line]
    assert [line["samples"] for line in lines] == [4, 8, 12, 20, 28, 36, 52, 68, 84, 100]
    assert [line["tokens"] for line in lines] == [32 * line["samples"] for line in lines]
    rates = [line["lr"] for line in lines]
    assert rates[:3] == pytest.approx([1e-2 * n * 128 / 500 for n in (1, 2, 3)])
    # The step that starts at `samples` and the last, whose decay is not over.
    after = [(32 * line["samples"] - 500) / (3200 - 500) for line in lines[3:-1]]
    assert rates[4:] == pytest.approx([1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * part)) for part in after])

    shutil.copytree(straight, tmp_path / "runs/resumed", ignore=shutil.ignore_patterns("step-00000010"))
    loop.train(replace(recipe, name="resumed"))
    assert losses(tmp_path / "runs/resumed") == losses(straight)
    first, second = weights(straight, 10), weights(tmp_path / "runs/resumed", 10)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
