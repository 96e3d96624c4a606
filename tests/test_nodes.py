"""Several machines: two agents of torchrun, as on two nodes, train the run of one process."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_loop import losses
from test_run import wait_for
from test_train import ROOT

from modalities import loop
from modalities.config import to_dict
from modalities.recipe import Recipe

SCRIPT = ROOT / "docs" / "slurm.sh"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A short run whose losses one process has written, and `two.json`, which is to become the same run."""
    recipe = replace(tiny.recipe(tmp_path, steps=4), name="one")
    loop.train(recipe)
    two = replace(recipe, name="two")
    (tmp_path / "two.json").write_text(json.dumps(to_dict(two)))
    return two


def assert_same_run(recipe: Recipe) -> None:
    one, two = losses(recipe.folder.with_name("one")), losses(recipe.folder)
    assert len(one) == 4
    hosts = json.loads((recipe.folder / "environment.json").read_text())["hosts"]
    assert len(hosts) == 2, "both were ranks of one run"
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_two_agents_that_know_their_numbers(recipe: Recipe, tmp_path: Path) -> None:
    line = f"--nnodes 2 --nproc_per_node 1 --master_addr localhost --master_port {free_port()}".split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", *line]
    train = [str(ROOT / "train.py"), "--recipe", str(tmp_path / "two.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen([*torchrun, "--node_rank", f"{node}", *train], env=environment, stderr=subprocess.PIPE)
        for node in range(2)
    ]
    problems = [agent.communicate()[1].decode() for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], problems
    assert_same_run(recipe)


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def job_environment(folder: Path, slurm: Path) -> dict[str, str]:
    """What Slurm gives to the script of a job on two nodes, its commands those in the folder `slurm`."""
    for command in slurm.iterdir():
        command.chmod(0o755)
    job = {"SLURM_JOB_ID": f"{free_port()}", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    job |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **job, "PATH": f"{slurm}:{os.environ['PATH']}"}


@pytest.mark.parametrize(("number", "queued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_the_slurm_script_queues_itself_anew_when_its_time_is_up(
    number: signal.Signals, queued: bool, tmp_path: Path
) -> None:
    """Before its time is up Slurm sends SIGUSR1 to the script; scancel sends SIGTERM to the step, as here."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    (slurm / "scontrol").write_text('#!/bin/bash\nif [ "$1" = requeue ]; then echo "$2" > queued; else echo here; fi\n')
    # A step that takes its time to save.
    (slurm / "srun").write_text(
        '#!/bin/bash\ntrap "sleep 0.3; exit 75" USR1 TERM\necho $$ > step\nwhile true; do sleep 0.1; done\n'
    )
    environment = job_environment(tmp_path, slurm)
    job = subprocess.Popen(["bash", str(SCRIPT), "--recipe", "two.json"], env=environment)
    wait_for(lambda: (tmp_path / "step").exists() and (tmp_path / "step").read_text())
    os.kill(job.pid if queued else int((tmp_path / "step").read_text()), number)
    assert job.wait(30) == 75
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == environment["SLURM_JOB_ID"] + "\n"


# Both commands of the Makefile run in one; without, the script's `source .venv/bin/activate` has nothing to read.
@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="the script activates a virtual environment")
def test_the_slurm_script_with_two_agents_that_meet(recipe: Recipe, tmp_path: Path) -> None:
    """All of the script is real but Slurm, whose two commands are stood in for: here both nodes are this one."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    (slurm / "scontrol").write_text("#!/bin/bash\necho localhost\necho other\n")
    # Drops srun's own options, and runs the command once for each node.
    (slurm / "srun").write_text(
        '#!/bin/bash\nshift 2\n"$@" & first=$!\n"$@" & second=$!\nwait $first && wait $second\n'
    )
    args = ["bash", str(SCRIPT), "--recipe", "two.json"]
    done = subprocess.run(args, env=job_environment(tmp_path, slurm), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(recipe)
