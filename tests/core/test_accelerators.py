"""What runs do on accelerators, as far as it shows where there is none: counts, peaks and backends are put in place."""

from __future__ import annotations

import json
import os
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
import torch
import torch.distributed as dist
from _pytest.config import parse_warning_filter
from support.ranks import PROCESSES
from support.tiny_recipe import recipe

from fire_llm import load_recipe, run_recipe
from fire_llm.distributed import PATIENCE
from fire_llm.distributed.agree import wire_device
from fire_llm.experiment import train as run
from fire_llm.training.throughput import Throughput, peak_memory


def test_the_peak_of_memory_is_that_of_one_training(monkeypatch):
    """An allocator's own peak only rises; a second training that takes less reports less."""
    peak = {}
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update({device: 0}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak.__getitem__)
    for most in (900, 400):
        speed = Throughput(None, None, cuda)
        peak[cuda] = max(peak[cuda], most)
        assert peak_memory(cuda) == most
        speed.stop()  # what `Trainer` logs later is of the same training
        assert peak_memory(cuda) == most


@pytest.mark.parametrize(
    ("config", "device", "wire"),
    [
        ("cpu:gloo,cuda:gloo", "cuda:1", "cpu"),  # what torch makes of "gloo"
        ("cpu:gloo,cuda:gloo,mps:gloo", "cpu", "cpu"),
        ("cuda:gloo,cpu:gloo", "cuda:1", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cuda:nccl", "cpu", "cuda:3"),
        ("cpu:mpi,cuda:mpi", "cuda:1", "cuda:1"),
    ],
)
def test_what_gloo_cannot_send_goes_by_the_cpu(config, device, wire, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    assert wire_device(None, torch.device(device)) == torch.device(wire)


def test_gloo_names_accelerators_as_its_own(tmp_path):
    """The set-up that the test above stands for, as torch describes it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert "cuda:gloo" in dist.get_backend_config(None)
        assert wire_device(None, torch.device("cuda", 0)) == torch.device("cpu")
    finally:
        dist.destroy_process_group()


def test_warnings_of_accelerators_are_no_errors_where_a_test_needs_one():
    """Filters as pytest reads them; what is not known stays an error, and other tests have none of them."""

    class Item:
        def __init__(self, *marks: str) -> None:
            self.marks, self.added = marks, []

        def get_closest_marker(self, name: str) -> str | None:
            return name if name in self.marks else None

        def add_marker(self, mark: Any) -> None:
            self.added.append(mark.args[0])

    gpu, other = Item("gpu"), Item("slow")
    conftest.pytest_collection_modifyitems([gpu, other])
    assert not other.added
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for line in gpu.added:
            warnings.filterwarnings(*parse_warning_filter(line, escape=False))
        for told, kind in (
            ("TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Do", UserWarning),
            ("\nOnline softmax is disabled on the fly since Inductor decides to split", UserWarning),
            ("This process (pid=1) is multi-threaded, use of fork() may lead to deadlocks", DeprecationWarning),
        ):
            warnings.warn(told, kind, stacklevel=1)
        with pytest.raises(UserWarning, match="another"):
            warnings.warn("another", stacklevel=1)


# ---- runs on a machine of several GPUs


def gpus(monkeypatch: pytest.MonkeyPatch, number: int, visible: str | None) -> None:
    """Have torch tell of so many GPUs."""
    from fire_llm.experiment import resources
    from fire_llm.experiment import run as running

    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)
    monkeypatch.setattr(resources, "cores", lambda: 64)
    alone = SimpleNamespace(num_processes=1, is_main_process=True, wait_for_everyone=lambda: None)
    for module in (run, running):
        monkeypatch.setattr(module, "ranks", lambda: alone)
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


class Started(Exception):
    """Hold the environments of the workers that a command would have started."""


@pytest.mark.parametrize(
    ("number", "visible", "workers", "wanted"),
    [
        (8, None, None, ["0", "1", "2", "3"]),  # no more than there are arms and seeds
        (2, None, None, ["0", "1"]),
        (2, "5,6", None, ["5", "6"]),  # those that a scheduler gave, by its own names
        (2, "GPU-1a, GPU-2b, GPU-none", None, ["GPU-1a", "GPU-2b"]),  # the third is not there
        (2, None, 4, ["0", "1", "0", "1"]),  # two on each, as was asked for
        (8, None, 2, ["0", "1"]),
    ],
)
def test_each_worker_has_a_gpu(number, visible, workers, wanted, tmp_path, monkeypatch):
    from fire_llm.experiment import processes, worker

    def start(self: Any, n: int, log: Path, instructions: Path) -> None:
        self.environments = [*getattr(self, "environments", []), processes.environment(n, len(self.logs), self.trials)]
        if n + 1 == len(self.logs):
            raise Started(self.environments)

    gpus(monkeypatch, number, visible)
    monkeypatch.setattr(processes.Workers, "_start", start)
    monkeypatch.setattr(processes.Overview, "say", lambda *_: None)
    monkeypatch.setattr(worker, "train", lambda *_: pytest.fail("trained where all GPUs are seen"))
    arms = "phases.1.arms={base: keep, fire: {method: fire}}"
    settings = load_recipe(recipe(tmp_path), [arms, "seed=[1,2]"])
    with pytest.raises(Started) as started:
        run_recipe(settings, tmp_path / "out", workers=workers)
    environments = started.value.args[0]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == wanted
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        assert {each[name] for each in environments} == {str(64 // len(wanted))}


@pytest.mark.parametrize(("number", "workers"), [(1, None), (1, 1), (8, 1)])
def test_one_worker_of_one_gpu_is_the_command_itself(number, workers, tmp_path, monkeypatch):
    from fire_llm.experiment import processes, worker

    gpus(monkeypatch, number, None)
    trained = []
    monkeypatch.setattr(processes.Workers, "_start", lambda *_: pytest.fail("a worker was started"))

    def train(stage: Any, *_: Any) -> None:
        trained.append(stage.folder)
        raise Started

    monkeypatch.setattr(worker, "train", train)
    with pytest.raises(Started):
        run_recipe(load_recipe(recipe(tmp_path)), tmp_path / "out", workers=workers, progress=False)
    assert trained == ["first/seed-1"]


# ---- process groups


def _as_rank(folder: Path, argv: list[str]) -> None:
    """Run a verb on the one rank of a launcher, and write what became of its process group."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", FIRE_LLM_CACHE=str(folder / "cache"))
    made: list[timedelta] = []
    destroyed: list[int] = []
    real_make, real_destroy = dist.init_process_group, dist.destroy_process_group

    def make(*args: Any, timeout: timedelta, **kwargs: Any) -> None:
        made.append(timeout)
        real_make(*args, timeout=timeout, **kwargs)

    def destroy(*args: Any) -> None:
        destroyed.append(dist.get_rank())
        real_destroy(*args)

    dist.init_process_group, dist.destroy_process_group = make, destroy
    from fire_llm.cli import main

    told = [main(argv), made == [PATIENCE], destroyed, dist.is_initialized()]
    (folder / "told.json").write_text(json.dumps(told))


def on_one_rank(folder: Path, *argv: str) -> list[Any]:
    """Return [exit code, whether ranks waited long, ranks that destroyed their group, whether one is left]."""
    process = PROCESSES.Process(target=_as_rank, args=(folder, list(argv)))
    process.start()
    process.join(240)
    return json.loads((folder / "told.json").read_text())


@pytest.mark.slow
def test_ranks_wait_for_hours_and_leave_once(tmp_path):
    path = recipe(tmp_path)
    short = ["--set=phases.0.steps=1", "--set=phases.1.steps=1", "--set=phases.0.keep=[]"]
    run = ["run", str(path), *short, f"--output={tmp_path / 'run'}"]
    assert timedelta(hours=1) < PATIENCE
    ended_well = [0, True, [0], False]
    assert on_one_rank(tmp_path, *run) == ended_well
    checkpoint = str(tmp_path / "run" / "first" / "seed-1" / "checkpoint-1")
    assert on_one_rank(tmp_path, "apply", "fire", checkpoint, str(tmp_path / "reset")) == ended_well
    text = str(tmp_path / "a.jsonl")
    assert on_one_rank(tmp_path, "eval", checkpoint, "--data", text) == ended_well
    # A rank that failed may have left others in a collective, and says so through the group's store.
    assert on_one_rank(tmp_path, "eval", str(tmp_path / "missing"), "--data", text) == [2, True, [], True]
