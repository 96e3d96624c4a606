"""`--profile` on the real command line: what it writes is true, and what is trained is the same to the bit."""

import json
import re
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_loop import assert_same_weights
from test_train import ROOT, command

from modalities import loop
from modalities.config import to_dict
from modalities.log import read_metrics
from modalities.profiling import choose_steps, group, parse_steps
from modalities.recipe import Recipe


def write_recipe(recipe: Recipe) -> str:
    path = Path(recipe.log.dir).with_name(f"{recipe.name}.json")
    path.write_text(json.dumps(to_dict(recipe)))
    return str(path)


def profile(recipe: Recipe, *steps: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    args = ("--recipe", write_recipe(recipe), "--profile", *steps)
    return command(*launcher, str(ROOT / "train.py"), *args, cwd=Path(recipe.log.dir).parent)


def profiled(recipe: Recipe, *steps: str, launcher: tuple[str, ...] = ()) -> str:
    done = profile(recipe, *steps, launcher=launcher)
    assert done.returncode == 0, done.stderr
    return done.stdout


def events(path: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def test_a_profiled_run_is_the_same_to_the_bit_and_tells_where_its_time_went(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    recipe = replace(recipe, model=replace(recipe.model, attention="sdpa"))  # of `manual` an operator tells nothing
    plain = loop.train(recipe)
    shown = profiled(replace(recipe, name="profiled"), "4-5")
    assert_same_weights(plain, tmp_path / "runs" / "profiled")

    (path,) = (tmp_path / "runs" / "profiled" / "profile").iterdir()
    assert path.name == "steps-4-5-rank-0.json"
    found = events(path)
    assert {event["name"] for event in found if event["name"].startswith("step ")} == {"step 4", "step 5"}
    assert sum(event["name"] == "aten::mm" for event in found) >= 2 * 180, "torch.func's levels each tell of one"

    groups, operators = shown.split("the 10 longest operators:")
    rows = re.findall(r"^ +([\d.]+)% +[\d.]+ ms  (.+)$", groups, re.MULTILINE)
    shares = {name: float(share) for share, name in rows}
    assert {"matmul", "attention", "loss", "optimizer", "copies", "elementwise", "between operators"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(100, abs=1), "the groups make up the steps"
    assert len(re.findall(r"^ +[\d.]+% +[\d.]+ ms  \d+ × .+ \(", operators, re.MULTILINE)) == 10
    assert "180 × aten::mm (matmul)" in operators, "of a step: 4 micro-batches, 15 matrices, once forward, twice back"


def test_each_rank_has_its_trace_and_the_main_one_tells_of_communication(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    recipe = tiny.recipe(tmp_path, steps=3, checkpoint=replace(tiny.recipe(tmp_path).checkpoint, every=0))
    shown = profiled(recipe, "3", launcher=launcher)
    found = sorted((recipe.folder / "profile").iterdir())
    assert [path.name for path in found] == ["steps-3-3-rank-0.json", "steps-3-3-rank-1.json"]
    assert all("step 3" in {event["name"] for event in events(path)} for path in found)
    assert re.search(r"ms  communication$", shown, re.MULTILINE) and shown.count("longest operators") == 1


@pytest.mark.slow
@tiny.needs_compiler
def test_compiled_code_is_told_apart_and_computes_the_same(tmp_path: Path) -> None:
    parallel = replace(tiny.recipe(tmp_path).parallel, param_dtype="bfloat16", compile="model")
    recipe = tiny.recipe(tmp_path, parallel=parallel, data=replace(tiny.recipe(tmp_path).data, val=()))
    plain = loop.train(recipe)
    shown = profiled(replace(recipe, name="profiled"), "10-12")
    assert_same_weights(plain, tmp_path / "runs" / "profiled")
    assert "ms  fused elementwise" in shown
    (path,) = (tmp_path / "runs" / "profiled" / "profile").iterdir()
    assert any("cpp_fused" in event["name"] for event in events(path))


@pytest.mark.parametrize("text", ["", "12-10", "0-3", "ten", "3-", "-3"])
def test_what_is_no_range_of_steps_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--profile {text!r} is not a range of steps")):
        parse_steps(text)


def test_steps_that_a_run_does_not_have_are_refused() -> None:
    assert parse_steps("10-12") == range(10, 13) and parse_steps("7") == range(7, 8)
    assert choose_steps("10-12", 9, 12) == range(10, 13) and choose_steps(None, 20, 20) is None
    for done, total in ((10, 20), (0, 11)):
        with pytest.raises(ValueError, match=f"10-12: this run has the steps {done + 1}-{total} before it"):
            choose_steps("10-12", done, total)
    for text in ("10-12", ""):
        with pytest.raises(ValueError, match="this run is already trained to its end, step 20; give another --name"):
            choose_steps(text, 20, 20)


@pytest.mark.parametrize(
    "done, total, first, last",
    [(0, 100, 10, 12), (50, 100, 60, 62), (90, 100, 98, 100), (98, 100, 99, 100), (0, 1, 1, 1)],
)
def test_steps_are_chosen_among_those_before_the_run(done: int, total: int, first: int, last: int) -> None:
    assert choose_steps("", done, total) == range(first, last + 1)


@pytest.mark.slow
def test_steps_are_chosen_and_refused_on_the_command_line(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=4)
    searched = replace(recipe, parallel=replace(recipe.parallel, micro_batch="auto"))
    refused = profile(searched, "3-5")
    assert refused.returncode == 1 and "3-5: this run has the steps 1-4 before it" in refused.stderr
    assert "verdict" not in refused.stdout and not recipe.folder.exists(), "it is said before anything is done"
    assert "\nsteps 2-4: " in profiled(recipe)
    again = profile(recipe)
    assert again.returncode == 1 and again.stderr.startswith("error: --profile: this run is already trained")
    assert len(again.stderr.splitlines()) == 1


def test_what_is_written_is_no_time_of_training(tmp_path: Path) -> None:
    """The trace of five steps takes as long to write as many steps."""
    recipe = tiny.recipe(tmp_path, checkpoint=replace(tiny.recipe(tmp_path).checkpoint, every=0))
    profiled(recipe, "2-6")
    rates = {line["step"]: line["tokens_per_s"] for line in read_metrics(recipe.folder) if "tokens_per_s" in line}
    assert rates[7] > 0.25 * statistics.median(rates[step] for step in range(8, 21))


@pytest.mark.parametrize(
    "path, expected",
    [
        (("step 1", "aten::linear", "nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT"), "matmul"),
        (("step 1", "aten::mm", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64"), "matmul"),
        (("aten::_scaled_dot_product_flash_attention", "void pytorch_flash::flash_fwd_kernel<...>"), "attention"),
        (("step 1", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16"), "attention"),
        (("step 1", "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"), "communication"),
        (("step 1", "FSDP::all_gather (layers.0)", "aten::copy_", "Memcpy DtoD (Device -> Device)"), "communication"),
        (("step 1", "optimizer", "aten::_foreach_mul_", "multi_tensor_apply_kernel<BinaryOp>"), "optimizer"),
        (("step 1", "aten::_foreach_add_", "multi_tensor_apply_kernel<BinaryOp>"), "elementwise"),
        (("step 1", "modalities::linear_cross_entropy", "aten::mm"), "loss"),
        (("step 1", "Torch-Compiled Region: 0/0", "triton_red_fused__log_softmax_nll_loss_forward_3"), "loss"),
        (("Torch-Compiled Region: 0/0", "triton_poi_fused__scaled_dot_product_flash_attention_view_3"),
         "fused elementwise"),
        (("step 1", "Torch-Compiled Region: 0/0"), "between operators"),
        (("step 1", "Memcpy HtoD (Pinned -> Device)"), "copies"),
        (("step 1", "batch"), "batch"),
    ],
)  # fmt: skip
def test_operators_and_kernels_fall_into_their_groups(path: tuple[str, ...], expected: str) -> None:
    assert group(path) == expected


def test_the_profiler_is_not_loaded_for_the_list_of_recipes() -> None:
    done = command("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train; train.main(['--help']); "
                   "print('torch' in sys.modules)", cwd=ROOT)  # fmt: skip
    assert "--profile" in done.stdout and done.stdout.endswith("False\n")
