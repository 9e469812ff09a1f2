"""What the tests share: tiny models, a private cache, and the folder of real text where it is at hand."""

from __future__ import annotations

import os
import signal
from pathlib import Path

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


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tokenised corpora out of the user's cache."""
    os.environ["FIRE_LLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


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


def tiny_gpt2(seed: int = 0, **settings):
    """Build a GPT-2 of 2 layers and width 32."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    defaults = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97, "n_positions": 64}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**defaults, **off, **settings}))


def tiny_llama(seed: int = 0, **settings):
    """Build a Llama of 2 layers, width 32 and grouped queries."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    defaults = {
        "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **settings}))
