"""What the tests share: tiny models, a private cache, and the folder of real text where it is at hand."""

from __future__ import annotations

import gc
import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

# Tiny tensors: a second thread costs more than it gives, and much more on a busy machine. Set before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# A shell's background job ignores Ctrl-C, and all that it starts does too: what is tested here is the usual case.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


OF_ACCELERATORS = (
    # Inductor, where fp32 is computed as fp32: it is asked for.
    "ignore:TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled:UserWarning",
    "ignore:\\s*Online softmax is disabled on the fly:UserWarning",
    # Inductor's pool of compilers, from Python 3.12 on; NVML's bindings, as torch imports them.
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning",
    "ignore:The pynvml package is deprecated:FutureWarning",
    # What counts waits for the device, by `torch.cuda.set_sync_debug_mode`.
    "ignore:Synchronization debug mode is a prototype feature:UserWarning",
    # Subprocesses and files of compilers that outlive a test.
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
"""Warnings of libraries that show on accelerators alone: no errors in tests that are marked gpu."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave these warnings out of what is an error."""
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            for warning in OF_ACCELERATORS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True, scope="module")
def _without_the_imported() -> None:
    """Leave what is imported by now out of Python's searches for cycles, half of the time of a tiny training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tokenised corpora out of the user's cache, and trackers out of the user's home and off the network."""
    os.environ["FIRE_LLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    trackers = str(tmp_path_factory.mktemp("trackers"))
    for place in ("TRACKIO_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        os.environ[place] = trackers
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    from support.ranks import fork_the_server

    fork_the_server()


@pytest.fixture(scope="module")
def script(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Import the script that a module of tests names in `SCRIPT`, and with it those beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
        yield importlib.import_module(request.module.SCRIPT)


@pytest.fixture
def shared_data_or_none() -> Path | None:
    """Return the folder of real text, or None."""
    folder = Path(os.environ.get("FIRE_LLM_SHARED_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
    return folder if folder.is_dir() else None


@pytest.fixture
def shared_data(shared_data_or_none: Path | None) -> Path:
    """Return the folder of real text, or skip."""
    if shared_data_or_none is None:
        pytest.skip("the folder of real text is not at hand; set FIRE_LLM_SHARED_DATA")
    return shared_data_or_none


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the two corpora of `support.runs`."""
    from support.runs import write_texts

    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Run the recipe of `support.runs` once, for every test that only looks; return its folder and results."""
    from support.runs import recipe_data

    from fire_llm import load_recipe, run_recipe

    folder = tmp_path_factory.mktemp("run") / "tiny"
    return folder, run_recipe(load_recipe(recipe_data(texts)), folder, progress=False)
