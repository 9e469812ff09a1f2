"""The launcher: what is refused before anything starts, what accelerate is asked for, and what is said afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.cli import main
from fire_llm.core.launch import _verdict, prepare, report_failure
from fire_llm.experiment.recipe.reading import recipes_folder

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((recipes_folder() / "accelerate").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _no_launcher_around(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def asked(monkeypatch) -> list:
    """Keep accelerate from starting anything; record its arguments, settings and environment instead."""
    import accelerate.commands.launch as accelerate

    seen: list = []

    def record(args):
        args, _, _ = accelerate._validate_launch_command(args)
        seen.append((args, yaml.safe_load(Path(args.config_file).read_text()), dict(os.environ)))

    monkeypatch.setattr(accelerate, "launch_command", record)
    return seen


# ---- before anything starts

MISTAKES = [
    (["--num-processes", "0"], "", "--num-processes 0: at least 1 is needed"),
    (["--num-processes", "7"], "", "does not divide into sequences of 128 tokens on 7 process(es). The nearest"),
    (["--num-processes", "2", "--arm", "fier"], "", "Did you mean 'fire'?"),
    (["--num-processes", "2", "--set", "phases.0.stepss=3"], "", "Did you mean 'steps'?"),
    (["--accelerate-config", "{t}/none.yaml"], "", "there is no file"),
    (
        ["--accelerate-config", "fsdp"],
        "",
        "comes with the package. Did you mean 'fsdp2'? Names: cpu, fsdp2, hsdp, multi-g",
    ),
    (
        ["--accelerate-config", "recipes/accelerate/ddp.yaml"],
        "",
        "Names: cpu, fsdp2, hsdp, multi-gpu, multi-node, one-",
    ),
    (["--accelerate-config", "{c}"], "a: b: c", "line 1 is not YAML"),
    (["--accelerate-config", "{c}"], "[1]", "is no accelerate configuration"),
    (["--accelerate-config", "{c}"], "num_processes: 2", "is no accelerate configuration"),
    (["--accelerate-config", "{c}"], "{distributed_type: MULTI_GPUS}", "Did you mean 'MULTI_GPU'?"),
    (["--accelerate-config", "{c}"], "{distributed_type: TPU}", "TPU is not supported"),
    (["--accelerate-config", "{c}"], "{distributed_type: MULTI_GPU, procs: 2}", "refused by accelerate"),
    (["--accelerate-config", "{c}"], "{distributed_type: MULTI_GPU}", "give --num-processes N"),
    (["--accelerate-config", "{c}"], "{distributed_type: FSDP, num_processes: 2}", "FSDP1 flattens parameters"),
    (["--accelerate-config", "{c}"], "{distributed_type: FSDP, fsdp_config: {fsdp_version: 1}}", "fsdp_version: 2"),
    (
        ["--accelerate-config", "{c}"],
        "{distributed_type: FSDP, fsdp_config: {fsdp_version: 2, fsdp_activation_checkpointing: true}}",
        "fsdp_activation_checkpointing is refused: it computes layers again with dropout drawn anew",
    ),
    (["--accelerate-config", "{c}"], "{distributed_type: DEEPSPEED}", "DeepSpeed keeps master copies"),
    (["--accelerate-config", "{c}"], "{distributed_type: MEGATRON_LM}", "Megatron-LM"),
    (
        ["--accelerate-config", "{c}", "--num-processes", "2"],
        "{distributed_type: MULTI_GPU, parallelism_config: {parallelism_config_tp_size: 2}}",
        "tp_size 2 is not supported",
    ),
    (
        ["--accelerate-config", "{h}", "--num-processes", "4"],
        "",
        "dp_replicate_size × dp_shard_size is 8, and there are 4 processes",
    ),
    (["--accelerate-config", "{m}", "--num-processes", "3"], "", "do not divide among the 2 machines"),
    (["--num-machines", "2"], "", "several machines need --num-processes"),
    (["--num-processes", "2", "--num-machines", "0"], "", "--num-machines 0: at least 1 is needed"),
    (["--num-processes", "2", "--num-machines", "2"], "", "--num-machines 2 needs --main-address"),
    (
        ["--num-processes", "2", "--num-machines", "2", "--machine-rank", "2", "--main-address", "a"],
        "",
        "--machine-rank 2: the 2 machine(s) count from 0 to 1",
    ),
    (
        ["--num-processes", "2", "--num-machines", "2", "--main-address", "a:b"],
        "",
        "--main-address a:b: an address, or ADDRESS:PORT",
    ),
    (["--num-processes", "2", "--num-machines", "2", "--main-address", "a:70000"], "", "port 70000 is none"),
]


@pytest.mark.parametrize(("argv", "config", "message"), MISTAKES, ids=[m[:40] for _, _, m in MISTAKES])
def test_mistakes_are_told_once_and_nothing_is_started(argv, config, message, asked, tmp_path, capsys):
    file, folder = tmp_path / "c.yaml", recipes_folder() / "accelerate"
    file.write_text(config)
    names = {"t": tmp_path, "c": file, "h": folder / "hsdp.yaml", "m": folder / "multi-node.yaml"}
    argv = [a.format(**names) for a in argv]
    assert main(["run", "demo", "--output", str(tmp_path / "out"), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("fire-llm: ") and error.count("fire-llm:") == 1
    assert not asked and not (tmp_path / "out").exists()


def test_a_launched_process_does_not_launch(asked, monkeypatch, capsys):
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    assert main(["demo", "--num-processes", "2"]) == 2
    assert "was started by a launcher already" in capsys.readouterr().err and not asked


def test_more_processes_than_gpus_are_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert prepare(2, None).processes == 2
    with pytest.raises(UserError, match=r"--num-processes 3: this machine has 2 accelerator\(s\).* at most 2"):
        prepare(3, None)
    assert prepare(4, str(recipes_folder() / "accelerate" / "cpu.yaml")).processes == 4
    with pytest.raises(UserError, match="at most 4"):
        prepare(8, str(recipes_folder() / "accelerate" / "multi-node.yaml"))


# ---- what accelerate is asked for


def test_replicas_on_cpus(asked, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    before = dict(os.environ)
    given = ["--num-processes", "2", "--set", "precision=fp32", "--arm", "fire", "--output", str(tmp_path / "out")]
    assert main(["run", "demo", *given]) == 0
    args, settings, environment = asked[0]
    assert args.multi_gpu and not args.use_fsdp and not args.cpu and args.module and args.training_script == "fire_llm"
    wanted = ["run", "demo", "--set=precision=fp32", f"--output={tmp_path / 'out'}", "--arm=fire"]
    assert args.training_script_args == wanted
    assert args.num_processes == 2 and settings["mixed_precision"] == "no"
    assert args.standalone and args.main_process_port == 0  # a port of its own, whatever else runs here
    assert environment["OMP_NUM_THREADS"] == "4" == str(args.num_cpu_threads_per_process)
    assert dict(os.environ) == before


def test_several_machines(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fire_llm.core.launch._interface_to", {"10.0.0.1": "eth7"}.get)
    given = ["--num-machines", "2", "--machine-rank", "1", "--main-address", "10.0.0.1"]
    assert main(["run", "demo", "--num-processes", "4", *given, "--output", str(tmp_path / "out")]) == 0
    args, _, environment = asked[0]
    assert args.training_script_args == ["run", "demo", f"--output={tmp_path / 'out'}"]
    assert (args.num_processes, args.num_machines, args.machine_rank) == (4, 2, 1) and not getattr(
        args, "standalone", False
    )
    assert (args.main_process_ip, args.main_process_port) == ("10.0.0.1", 29500)
    assert environment["GLOO_SOCKET_IFNAME"] == "eth7" and args.rdzv_conf == "timeout=600"
    monkeypatch.setenv("FIRE_LLM_MEET_SECONDS", "soon")
    assert main(["run", "demo", "--num-processes", "4", *given, "--output", str(tmp_path / "out")]) == 2
    assert "FIRE_LLM_MEET_SECONDS=soon: it must be a whole number of seconds" in capsys.readouterr().err


def test_the_interface_is_one_that_other_machines_can_reach():
    from fire_llm.core.launch import _interface_to

    assert _interface_to("127.0.0.1") == "lo"  # asked for
    assert _interface_to("localhost") != "lo"  # what a machine calls itself


def test_machines_that_do_not_meet_are_told(monkeypatch, capsys, tmp_path):
    import accelerate.commands.launch as accelerate
    from torch.distributed import DistStoreError

    def alone(_):
        raise DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 clients joined.\nC++ …")

    monkeypatch.setattr(accelerate, "launch_command", alone)
    given = ["--num-machines", "2", "--machine-rank", "0", "--main-address", "127.0.0.1:4000"]
    assert main(["run", "demo", "--num-processes", "2", *given, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "the 2 machines did not meet at 127.0.0.1, port 4000, within 600 s: start the same command on each" in error
    assert error.endswith("1/2 clients joined.)\n") and error.count("fire-llm: ") == 1


def test_the_demo_and_a_configuration(asked, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text((recipes_folder() / "accelerate" / "fsdp2.yaml").read_text().replace("use_cpu: false", ""))
    settings = {**yaml.safe_load(config.read_text()), "use_cpu": True, "mixed_precision": "bf16"}
    config.write_text(yaml.safe_dump(settings))
    argv = ["--num-processes", "2", "--accelerate-config", str(config), "--set", "precision=fp32"]
    assert main(["demo", *argv]) == 0
    args, settings, environment = asked[0]
    assert args.use_fsdp and int(args.fsdp_version) == 2 and args.num_processes == 2
    assert settings["mixed_precision"] == "no"  # the recipe decides
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert args.training_script_args == ["run", "demo", "--set=precision=fp32", "--output=runs/demo"]


def test_one_process_needs_no_launcher(asked, monkeypatch):
    ran: list = []
    monkeypatch.setattr("fire_llm.experiment.run.run_recipe", lambda *_, **__: ran.append(1) or {})
    monkeypatch.setattr("fire_llm.cli.run.show_results", lambda *_: None)
    assert main(["run", "demo", "--num-processes", "1"]) == 0
    assert main(["run", "demo", "--accelerate-config", str(recipes_folder() / "accelerate" / "one-gpu.yaml")]) == 0
    assert main(["run", "demo", "--accelerate-config", "one-gpu"]) == 0
    assert ran == [1, 1, 1] and not asked


def test_a_dry_run_checks_and_starts_nothing(asked, capsys):
    assert main(["run", "demo", "--num-processes", "2", "--dry-run"]) == 0
    assert "no fault found" in capsys.readouterr().out and not asked


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_configurations_that_come_with_the_package_are_accelerates(path, monkeypatch):
    import torch
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    usage = (
        str(path.relative_to(ROOT)) if path.stem in ("one-gpu", "multi-node") else f"--accelerate-config {path.stem}"
    )
    assert path.read_text().startswith("# ") and usage in path.read_text()
    ours = prepare(None, str(path))
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "x.py"])
    theirs, _, _ = _validate_launch_command(arguments)
    assert theirs.num_processes == ours.processes and theirs.num_machines == ours.machines
    assert theirs.use_fsdp == (path.stem in ("fsdp2", "hsdp")) and theirs.multi_gpu != (theirs.use_fsdp or ours.alone)
    theirs.main_process_port = 0
    environment = prepare_multi_gpu_env(theirs)
    if theirs.use_fsdp:
        assert environment["FSDP_VERSION"] == "2" and environment["FSDP_OFFLOAD_PARAMS"] == "false"
    if path.stem == "hsdp":
        sizes = [int(environment[f"PARALLELISM_CONFIG_DP_{kind}_SIZE"]) for kind in ("REPLICATE", "SHARD")]
        assert sizes == [2, 4]


def test_every_way_to_launch_has_a_configuration():
    assert [p.stem for p in CONFIGS] == ["cpu", "fsdp2", "hsdp", "multi-gpu", "multi-node", "one-gpu"]


# ---- what is said afterwards


def failure(exitcode, code=None, message="", timestamp=0):
    data = {"message": message} if code is None else {"message": message, "code": code}
    name = signal.Signals(-exitcode).name if exitcode < 0 else ""
    return SimpleNamespace(
        exitcode=exitcode, pid=17, timestamp=timestamp, message=message, error_file_data=data, signal_name=lambda: name
    )


@pytest.mark.parametrize(
    ("failures", "code", "message"),
    [
        ({0: failure(1, 1, "gloo"), 1: failure(2, 2, "the recipe is wrong", 9)}, 2, "the recipe is wrong"),
        ({0: failure(1, 1, "connection closed"), 1: failure(-9)}, 1, "rank 1 (process 17) was killed by SIGKILL: most"),
        ({0: failure(-15), 1: failure(-11)}, 1, "rank 1 (process 17) was killed by SIGSEGV; what was saved stays"),
        ({0: failure(-15), 3: failure(1, 1, "the loss is nan")}, 1, "the loss is nan (rank 3"),
        ({0: failure(1), 1: failure(-15)}, 1, "rank 0 (process 17) ended with exit code 1"),
        ({0: failure(-15), 1: failure(-15)}, 1, "rank 0 (process 17) ended with SIGTERM"),
        ({0: failure(130), 1: failure(-2)}, 130, "interrupted; what was saved stays"),
        ({0: failure(-15), 1: failure(143, 143, "ended by SIGTERM; saved")}, 143, "ended by SIGTERM; saved"),
        ({0: failure(143, 143, "ended by SIGTERM"), 1: failure(-9)}, 1, "rank 1 (process 17) was killed by SIGKILL"),
    ],
)
def test_the_cause_is_told_and_not_what_followed(failures, code, message):
    told = _verdict(failures)
    assert told[0] == code and told[1].startswith(message)


def test_ranks_leave_the_speaking_to_one(tmp_path, monkeypatch, capsys):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    report_failure(1, "alone")
    assert capsys.readouterr().err == "fire-llm: alone\n"
    file = tmp_path / "0" / "error.json"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    report_failure(2, "a fault that every rank finds")
    assert capsys.readouterr().err == ""
    read = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(file))
    assert read.message == "a fault that every rank finds" and read.error_file_data["code"] == 2
    monkeypatch.setenv("LOCAL_RANK", "0")
    report_failure(2, "a fault that every rank finds")
    assert capsys.readouterr().err == "fire-llm: a fault that every rank finds\n"
    monkeypatch.setenv("FIRE_LLM_LAUNCHER", "1")
    report_failure(2, "a fault that every rank finds")
    assert capsys.readouterr().err == ""


# ---- real launches


def test_a_rank_that_is_killed_ends_the_launch_with_one_message(tmp_path, monkeypatch, capfd):
    """Python finds a module of ours before the ranks load anything; in `test_run.py` one is killed that trains."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, signal, time\n"
        "if rank := os.environ.get('RANK'):\n"
        "    mine, other = (pathlib.Path(__file__).with_name(f'rank-{n}') for n in (int(rank), 1 - int(rank)))\n"
        "    mine.with_suffix('.new').write_text(str(os.getpid()))\n"
        "    mine.with_suffix('.new').rename(mine)\n"
        "    while rank == '0' or not other.exists():\n"
        "        time.sleep(0.05)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    assert main(["run", "demo", "--num-processes", "2", "--output", str(tmp_path / "out")]) == 1
    error, pids = capfd.readouterr().err, [int((tmp_path / f"rank-{n}").read_text()) for n in (0, 1)]
    assert f"fire-llm: rank 1 (process {pids[1]}) was killed by SIGKILL" in error
    assert "the same command goes on from the newest checkpoint" in error
    assert error.count("fire-llm:") == 1 and "Traceback" not in error and "elastic" not in error
    assert not any(map(psutil.pid_exists, pids))


def tiny(tmp_path) -> Path:
    """Write a recipe of seconds."""
    (tmp_path / "a.txt").write_text("".join(f"the quick brown fox jumps over {i} lazy dogs\n\n" for i in range(400)))
    data = {
        "name": "tiny",
        "data_root": str(tmp_path),
        "model": {"preset": "gpt-tiny", "context": 16, "config": {"n_embd": 16, "n_layer": 1, "n_head": 1}},
        "tokenizer": {"train": 300},
        "corpora": {"a": {"files": "a.txt", "holdout": 0.1}},
        "batch": {"tokens_per_step": 64},
        "phases": [{"name": "one", "data": {"a": 1.0}, "steps": 4000}],
        "save_every_steps": 2,
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "tiny.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["fire_llm", "run", "--accelerate-config", "cpu.yaml"],
        ["accelerate.commands.launch", "--config_file", "cpu.yaml", "-m", "fire_llm", "run"],
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fire_llm", "run"],
    ],
    ids=["fire-llm", "accelerate", "torchrun"],
)
def test_launchers_agree(launcher, tmp_path):
    """Two of each at once, in one machine, are no trouble to each other; a fault is told once."""
    recipe = tiny(tmp_path)
    module, *rest = [str(recipes_folder() / "accelerate" / a) if a == "cpu.yaml" else a for a in launcher]
    ours = module == "fire_llm"
    outputs = [tmp_path / "x", tmp_path / "y"] if ours else [tmp_path / "x"]
    command = [sys.executable, "-m", module, *rest, str(recipe), "--set", "phases.0.steps=6", "--output"]
    runs = [subprocess.Popen([*command, str(o)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for o in outputs]
    for run in runs:
        assert run.wait(280) == 0, run.stderr.read().decode()[-2000:]
        run.communicate()
    alone = run_recipe(load_recipe(recipe, ["phases.0.steps=6"]), tmp_path / "alone", progress=False)["phases"][0]
    for output in outputs:
        both = json.loads((output / "results.json").read_text())["phases"][0]
        assert both["batches_hash"] == alone["batches_hash"]
        assert both["final"]["a"]["nll"] == pytest.approx(alone["final"]["a"]["nll"], abs=1e-5)
    wrong = [*command, str(outputs[0]), "--set", "optimizer.lr=1.0"]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=280)
    assert done.returncode == (2 if ours else 1)
    assert done.stderr.count("fire-llm: ") == 1 and "optimizer.lr: 0.0006 then, 1.0 now" in done.stderr
    assert not ours or "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_a_launcher_that_is_killed_leaves_no_ranks(training, tmp_path):
    """They end as by SIGTERM: at once while they start, with their step saved while they train."""
    command = [sys.executable, "-m", "fire_llm", "run", str(tiny(tmp_path)), "--output", str(tmp_path / "out")]
    devnull = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "--num-processes", "2"], **devnull, start_new_session=True)
    launcher, ranks = psutil.Process(process.pid), []
    deadline = time.monotonic() + 200

    def begun() -> bool:
        saved = list((tmp_path / "out").glob("one/seed-1/checkpoint-*/continual_state.json"))
        return len(ranks) == 2 and (bool(saved) or not training)

    while not begun():
        assert process.poll() is None and time.monotonic() < deadline
        ranks = [child for child in launcher.children() if str(tmp_path / "out") in " ".join(child.cmdline())]
        time.sleep(0.05)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for rank in alive:
        rank.kill()
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_launch_says_so_once(number, code, tmp_path):
    command = [sys.executable, "-m", "fire_llm", "run", str(tiny(tmp_path)), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--num-processes", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").glob("one/seed-1/checkpoint-*/continual_state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    # Ctrl-C reaches every process of the terminal; a scheduler's SIGTERM the launcher alone.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, error = process.communicate(timeout=90)
    assert process.returncode == code
    text = error.decode()
    by = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    said = re.findall(r"fire-llm: (.*)", text)
    assert len(said) == 1 and re.fullmatch(rf"{by}; saved at step (\d+); the same command goes on", said[0]), text
    assert "Traceback" not in text
    step = int(re.search(r"step (\d+)", said[0])[1])
    assert (tmp_path / "out" / "one" / "seed-1" / f"checkpoint-{step}" / "manifest.json").exists()


# ---- scripts


@pytest.mark.parametrize("name", ["launch.sh", "slurm.sbatch"])
def test_scripts_are_bash(name):
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / name)], check=True)


def shell(folder: Path, **programs: str) -> dict[str, str]:
    """Put programs of one line into a folder, and return an environment that finds them first."""
    folder.mkdir()
    for name, body in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_launch_sh_hands_over_to_fire_llm(tmp_path):
    environment = shell(tmp_path / "bin", **{"fire-llm": 'echo "$@"'})
    script = str(ROOT / "scripts" / "launch.sh")

    def said(**variables):
        command = [script, "r.yaml", "--arm", "two words"]
        done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True)
        return done.stdout or done.stderr

    assert said(GPUS="2") == said(PROCESSES="2") == "run r.yaml --arm two words --num-processes 2\n"
    two = said(GPUS="8", NODES="2", NODE_RANK="1", MAIN_ADDRESS="10.0.0.1", ACCELERATE_CONFIG="fsdp2")
    assert two.endswith(
        "--num-processes 16 --accelerate-config fsdp2 --num-machines 2 --machine-rank 1 --main-address 10.0.0.1:29500\n"
    )
    assert "MAIN_ADDRESS" in said(GPUS="1", NODES="2")
    assert subprocess.run([script], capture_output=True, env=environment).returncode == 2


@pytest.mark.parametrize("preempted", [False, True])
def test_slurm_sbatch_starts_every_node_and_requeues_what_is_preempted(preempted, tmp_path):
    environment = shell(
        tmp_path / "bin",
        scontrol='if [[ $1 == show ]]; then printf "node7\\nnode8\\n"; else echo "$@"; fi',
        srun=f'shift; echo $$ >{tmp_path}/steps; SLURM_NODEID=1 SLURM_GPUS_ON_NODE=4 exec "$@"',
        scancel=f'[[ "$*" == "--signal=TERM 20001" ]] && kill -TERM "$(<{tmp_path}/steps)"',
        **{"fire-llm": 'echo "$@"; exec sleep 30' if preempted else 'echo "$@"; exit 3'},
    )
    job = {"SLURM_JOB_ID": "20001", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    process = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "slurm.sbatch"), "r.yaml", "--arm", "a b"],
        env={**environment, **job, "SLURM_SUBMIT_DIR": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started = process.stdout.readline()
    assert started.startswith("run r.yaml --arm a b --num-processes 8 --num-machines 2 --machine-rank 1")
    assert started.endswith("--main-address node7:20001\n")
    if preempted:
        process.send_signal(signal.SIGUSR1)
        assert "back into the queue" in process.stdout.readline()
        assert process.stdout.readline() == "requeue 20001\n"
        assert process.wait(10) == 0
        with pytest.raises(ProcessLookupError):  # its steps were ended first
            os.killpg(process.pid, signal.SIGKILL)
    else:
        assert process.wait(10) == 3
    process.stdout.close()
