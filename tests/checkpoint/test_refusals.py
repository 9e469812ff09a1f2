"""Every checkpoint and option that cannot be worked with: one message, exit code 2, nothing read, nothing written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import tiny_gpt2, tiny_llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import fire_llm.architectures.lookup
import fire_llm.checkpoint.rewrite
from fire_llm.checkpoint.headers import StoredTensor
from fire_llm.cli import main

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"
Q = "model.layers.1.self_attn.q_proj"
Spoil = Callable[[Path], object]


def tiny_mixtral():
    """Build a Mixtral of one layer and 3 experts, which are stored one by one."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, **heads))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save one checkpoint of each kind, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder / "llama")
    tiny_llama().save_pretrained(folder / "shards", max_shard_size="20KB")
    tiny_gpt2().save_pretrained(folder / "gpt2")
    tiny_mixtral().save_pretrained(folder / "mixtral")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return what lies below a folder: every file's SHA-256, folders and links by name."""
    paths = sorted(folder.rglob("*"))
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in paths}


# ---- ways to spoil a checkpoint


def settings(**changes: Any) -> Spoil:
    """Change keys of config.json; those that are given as `...` go."""

    def spoil(src: Path) -> None:
        data = {**json.loads((src / "config.json").read_text()), **changes}
        (src / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))

    return spoil


def weights(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    """Change the tensors of the single file."""

    def spoil(src: Path) -> None:
        tensors = load_file(src / WEIGHTS)
        change(tensors)
        save_file(tensors, src / WEIGHTS, {"format": "pt"})

    return spoil


def added(**tensors: Tensor) -> Spoil:
    """Add tensors whose names are given with `__` for a dot."""
    return weights(lambda stored: stored.update({k.replace("__", "."): t for k, t in tensors.items()}))


def becomes(name: str, change: Callable[[Tensor], Tensor]) -> Spoil:
    """Change one tensor."""
    return weights(lambda stored: stored.update({name: change(stored[name]).contiguous()}))


def lacks(pattern: str) -> Spoil:
    """Remove the tensors whose names match."""

    def change(stored: dict[str, Tensor]) -> None:
        for name in [n for n in stored if re.search(pattern, n)]:
            del stored[name]

    return weights(change)


def renamed(change: Callable[[str], str]) -> Spoil:
    """Rename all tensors."""

    def rename(stored: dict[str, Tensor]) -> None:
        items = {change(k): t for k, t in stored.items()}
        stored.clear()
        stored.update(items)

    return weights(rename)


def coded(codes: dict[str, Tensor], *, without: str = f"^{Q}.weight$") -> Spoil:
    """Replace the weight of a linear layer by what a quantiser stores instead."""

    def change(stored: dict[str, Tensor]) -> None:
        for name in [n for n in stored if re.search(without, n)]:
            del stored[name]
        stored.update({Q + name: tensor for name, tensor in codes.items()})

    return weights(change)


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change the header of the single file, and nothing else of it."""

    def spoil(src: Path) -> None:
        raw = (src / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + length])
        change(entries)
        new = json.dumps(entries).encode()
        (src / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])

    return spoil


def shifted(by: int) -> Callable[[dict[str, Any]], None]:
    """Move one tensor's bytes."""

    def change(entries: dict[str, Any]) -> None:
        entries[UP]["data_offsets"] = [n + by for n in entries[UP]["data_offsets"]]

    return change


def entry(**changes: Any) -> Spoil:
    """Change one tensor's entry in the header."""
    return header(lambda entries: entries[UP].update(changes))


def bytes_of(change: Callable[[bytes], bytes], pattern: str = WEIGHTS) -> Spoil:
    """Change the bytes of the first file that matches."""

    def spoil(src: Path) -> None:
        path = sorted(src.glob(pattern))[0]
        path.write_bytes(change(path.read_bytes()))

    return spoil


def index(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change the index."""

    def spoil(src: Path) -> None:
        data = json.loads((src / INDEX).read_text())
        change(data)
        (src / INDEX).write_text(json.dumps(data))

    return spoil


def put(name: str, content: str | bytes = b"x") -> Spoil:
    """Write a file."""
    return lambda src: (src / name).write_bytes(content.encode() if isinstance(content, str) else content)


def pipe(name: str) -> Spoil:
    """Put a named pipe in the place of a file: who opens it waits."""
    return lambda src: [(src / name).unlink(missing_ok=True), os.mkfifo(src / name)]


def gone(*patterns: str) -> Spoil:
    """Remove files."""
    return lambda src: [path.unlink() for pattern in patterns for path in sorted(src.glob(pattern))]


def weights_are(name: str) -> Spoil:
    """Give the weights' file another name, and with it another kind."""
    return lambda src: (src / WEIGHTS).rename(src / name)


def both(*spoils: Spoil) -> Spoil:
    """Do several things."""
    return lambda src: [spoil(src) for spoil in spoils]


def as_file(src: Path) -> None:
    shutil.rmtree(src)
    src.write_text("x")


def wider(src: Path) -> None:
    """Save a Llama of another width beside it."""
    tiny_llama(intermediate_size=64).save_pretrained(src.with_name("wide"))


def missing(src: Path) -> None:
    shutil.rmtree(src)


def swap(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """Change which file the index names for a tensor."""
    return lambda data: data["weight_map"].update({old: new})


def shard_without(name: str) -> Spoil:
    """Take a tensor out of its shard; the index lists it still."""

    def spoil(src: Path) -> None:
        shard = src / json.loads((src / INDEX).read_text())["weight_map"][name]
        save_file({k: t for k, t in load_file(shard).items() if k != name} or {"other": torch.ones(1)}, shard)

    return spoil


def in_two_shards(src: Path) -> None:
    """Put another value of a tensor into a shard where the index does not look for it."""
    shards = sorted(set(json.loads((src / INDEX).read_text())["weight_map"].values()))
    for shard in (shards[0], shards[-1]):
        tensors = load_file(src / shard)
        save_file({**tensors, UP: torch.ones(80, 32)}, src / shard)
    for shard in shards[1:-1]:
        tensors = load_file(src / shard)
        tensors.pop(UP, None)
        save_file(tensors, src / shard)


# ---- the cases


@dataclass(frozen=True)
class Case:
    """Hold one bad input.

    Args:
        name: Of the case.
        message: Regular expression that the message matches, from its first character on.
        spoil: What is done to the copy of a checkpoint.
        kind: Which checkpoint.
        options: After `apply SRC DST`; {src}, {tmp} and {saved} are filled in.
        dst: The folder to make.
        patch: What else is changed, with pytest's monkeypatch.
        late: Whether weights are read before it can be known.
    """

    name: str
    message: str
    spoil: Spoil | None = None
    kind: str = "llama"
    options: tuple[str, ...] = ()
    dst: str = "{tmp}/dst"
    src: str = "{src}"
    patch: Callable[[pytest.MonkeyPatch], object] | None = None
    late: bool = False


def offline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def read_only(patch: pytest.MonkeyPatch) -> None:
    def mkdir(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    patch.setattr(Path, "mkdir", mkdir)


I8, U8, I32, F8 = torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn
UNQUANTISED = r"\. FIRE needs the weights themselves: take the checkpoint that it was quantised from$"
AGAIN = r".* Download or copy it again$"


def quantised(method: str | None, says: str, **more: Any) -> Case:
    """Make the case of a config that names a method of quantisation."""
    content = {**({"quant_method": method} if method else {}), **more}
    label = re.sub(r"\W+", "-", says)
    sign = r" \(quantization_config in config\.json\)"
    message = f"'.*src' is quantised with {re.escape(says)}{sign}{UNQUANTISED}"
    return Case(f"config-{label}", message, settings(quantization_config=content))


PLACE = [
    Case("src-missing", "there is no folder '.*/src'.*check the spelling", missing),
    Case("src-a-file", "'.*/src' is a file: name the folder that holds config.json and the weights", as_file),
    Case("hub-id-too-deep", "there is no folder 'a/b/c', and a Hub id has the form owner/name", src="a/b/c"),
    Case("hub-id-no-owner", "there is no folder 'llama', and a Hub id has the form owner/name", src="llama"),
    Case("hub-id-half", "there is no folder 'owner/', and a Hub id has the form owner/name", src="owner/"),
    Case("hub-id-blank", "there is no folder 'own er/name'.*Hub could not be asked for a model of that name: ",
         src="own er/name", patch=offline),
    Case("hub-offline", "there is no folder 'owner/name', and the Hub's cache, .* holds no model",
         src="owner/name", patch=offline),
    Case("src-name-too-long", "there is no folder 'x+'.*check the spelling", src="x" * 300),
    Case("revision-of-a-folder", "--revision main: '.*/src' is a folder", options=("--revision", "main")),
    Case("dst-a-folder", "'.*/src' exists already: name a new folder", dst="{src}"),
    Case("dst-a-file", "'.*/config.json' exists already: name a new folder", dst="{src}/config.json"),
    Case("dst-a-dangling-link", "'.*/link' exists already", lambda s: (s.parent / "link").symlink_to("x"),
         dst="{tmp}/link"),
    Case("dst-inside-src", "'.*/src/new' lies inside '.*/src', which is never written to", dst="{src}/new"),
    Case("dst-inside-src-by-a-link", "'.*/link/new' lies inside '.*/src', which is never written to",
         lambda s: (s.parent / "link").symlink_to("src"), dst="{tmp}/link/new"),
    Case("dst-below-a-file", "'.*/f/dst' cannot be made: '.*/f' is a file", lambda s: (s.parent / "f").touch(),
         dst="{tmp}/f/dst"),
    Case("dst-name-too-long", "'.*/y+' cannot be made: File name too long. Choose another", dst="{tmp}/" + "y" * 300),
    Case("dst-partial-too-long", "'.*/y+' cannot be made: File name too long. Choose another",
         dst="{tmp}/" + "y" * 250),
    Case("dst-read-only", "cannot write below '.*': the file system is read-only. Choose another folder",
         patch=read_only),
    Case("no-space", r"'.*/dst': the result takes 0\.00 GB and 0\.00 GB are free there\. Free some space",
         patch=lambda m: m.setattr(fire_llm.checkpoint.rewrite, "free_bytes", lambda _: 999)),
]  # fmt: skip

CONFIG = [
    Case("no-config", "'.*src' has no config.json, .* name the folder of one", gone("config.json")),
    Case("config-not-json", "'.*config.json' is not JSON .*: download or copy it again", put("config.json", "{")),
    Case("config-empty", "'.*config.json' is not JSON .*: download or copy it again", put("config.json", "")),
    Case("config-not-text", "'.*config.json' is not JSON .*: download or copy it again", put("config.json",
         b"\xff\xfe")),
    Case("config-deep", "'.*config.json' is not JSON .*: download or copy it again", put("config.json", "[" * 100_000)),
    Case("config-a-list", "'.*config.json' is not a JSON object: download or copy it again", put("config.json", "[]")),
    Case("config-null", "'.*config.json' is not a JSON object: download or copy it again", put("config.json", "null")),
    Case("config-nested", "'.*config.json' holds data in data, more than 50 deep",
         settings(extra=json.loads("[" * 300 + "]" * 300))),
    Case("config-a-folder", "'.*config.json' is a folder, not a file", both(gone("config.json"),
         lambda s: (s / "config.json").mkdir())),
    *(Case(f"{name}-a-pipe", f"'.*src/{name}' is a named pipe, not a file", pipe(name), kind)
      for name, kind in (("config.json", "llama"), (WEIGHTS, "llama"), (INDEX, "shards"), ("tokenizer.json", "llama"),
                         ("generation_config.json", "llama"))),
    Case("config-a-device", "'.*config.json' is a device, not a file",
         both(gone("config.json"), lambda s: (s / "config.json").symlink_to("/dev/zero"))),
    *(Case(f"huge-{key}", rf"'.*config.json': {key} is {value}; at most [\d,]+ is allowed", settings(**{key: value}))
      for key, value in (("num_hidden_layers", 10**9), ("n_layer", 10**9), ("num_labels", 10**9),
                         ("num_experts", 10**9), ("vocab_size", 10**12), ("max_position_embeddings", 10**12),
                         ("encoder_layers", 10**9))),
    Case("huge-inside", r"'.*config.json': num_labels is 1000000000; at most",
         settings(text={"a": [{"num_labels": 10**9}]})),
    Case("no-model-type", "'.*config.json' has no model_type: a name such as 'llama'", settings(model_type=...)),
    Case("unknown-model-type", "'.*src': model_type 'lama' is unknown .* Did you mean 'llama'",
         settings(model_type="lama", architectures=...)),
    Case("model-type-like-no-other", r"'.*src': model_type 'qqqqqq' is unknown .*\. A newer one may know it\. Only",
         settings(model_type="qqqqqq")),
    Case("unknown-model-type-known-class", "'.*src': model_type 'lama' is unknown .* Did you mean 'llama'",
         settings(model_type="lama")),
    Case("model-type-a-list", r"'.*config.json' has \['llama'\] as model_type: a name", settings(model_type=["llama"])),
    Case("model-type-a-number", "'.*config.json' has 5 as model_type: a name such as", settings(model_type=5)),
    Case("t5", r"'.*src': .* is no causal language model, and .*\. Only what AutoModelForCausalLM loads .*, or a "
         "class of transformers that config.json names in 'architectures'",
         settings(model_type="t5", architectures=["T5ForNothing"])),
    Case("another-class", r"the checkpoint lacks \d+ of the tensors of ViTForImageClassification",
         settings(model_type="vit", architectures=["ViTForImageClassification"])),
    Case("no-class-of-a-model", "'.*src': model_type .* is no causal .*ViTImageProcessor.* names no model of that type",
         settings(model_type="vit", architectures=["ViTImageProcessor"])),
    Case("vit", r"'.*src': model_type 'vit' is no causal language model\. Only",
         settings(model_type="vit", architectures=None)),
    Case("architectures-odd", "'.*src': model_type 'vit' is no causal language model",
         settings(model_type="vit", architectures=[{}])),
    Case("auto-map", "'.*src' brings code of its own .auto_map in config.json.",
         settings(auto_map={"AutoModelForCausalLM": "modeling.Mine"})),
    *(Case(f"config-{name}", f"'.*config.json' is no config that transformers can read: {says}", settings(**changes))
      for name, says, changes in (
          ("width-not-divisible", r"The hidden size \(32\) is not a multiple of", {"num_attention_heads": 5}),
          ("zero-heads", ".*zero", {"num_attention_heads": 0}),
          ("text-for-a-number", "Field 'hidden_size' expected int, got str", {"hidden_size": "wide"}),
          ("null-for-a-number", "Field 'hidden_size' expected int, got NoneType", {"hidden_size": None}),
          ("table-for-a-text", "Field 'text_config' .* dict, got str",
           {"text_config": "x", "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}),
          ("unknown-dtype", ".*float99", {"dtype": "float99"}),
      )),
    *(Case(f"config-{name}", "LlamaForCausalLM holds no attention, MLP or SSM matrix: is it a .* at least one layer",
           settings(num_hidden_layers=layers)) for name, layers in (("negative-layers", -1), ("no-layers", 0))),
    Case("negative-width", "transformers cannot build Llama from this config: .*negative dimension",
         settings(hidden_size=-32)),
    Case("unknown-activation", "transformers cannot build Llama from this config: .*gelux",
         settings(hidden_act="gelux")),
    Case("more-layers-than-weights", "the checkpoint lacks 9 of the tensors of LlamaForCausalLM: 'model.layers.2.*",
         settings(num_hidden_layers=3)),
    Case("weights-named-missing", "'.*src/other.safetensors' cannot be read: No such file",
         settings(transformers_weights="other.safetensors")),
    *(Case(f"weights-named-{name}", rf"'.*config.json': transformers_weights is {re.escape(repr(value))}; it must",
           settings(transformers_weights=value))
      for name, value in (("outside", "../other.safetensors"), ("a-number", 5), ("pickled", "pytorch_model.bin"))),
]  # fmt: skip

QUANTISED = [
    quantised("bitsandbytes", "bitsandbytes (4 bit)", load_in_4bit=True, load_in_8bit=False),
    quantised("bitsandbytes", "bitsandbytes (8 bit)", load_in_8bit=True),
    quantised(None, "bitsandbytes (8 bit)", load_in_8bit=True),
    quantised("gptq", "GPTQ", bits=4),
    quantised("awq", "AWQ", bits=4),
    quantised("fp8", "FP8", weight_block_size=[128, 128]),
    quantised("mxfp4", "MXFP4"),
    quantised("compressed-tensors", "compressed-tensors", format="pack-quantized"),
    quantised("hqq", "hqq"),
    quantised(None, "an unnamed method", bits=4),
    Case("config-not-a-table", "'.*src' is quantised with an unnamed method", settings(quantization_config="gptq")),
    Case("config-in-text-config", r"'.*src' is quantised with AWQ \(text_config.quantization_config in config.json\)",
         settings(text_config={"quantization_config": {"quant_method": "awq"}})),
    *(Case(f"file-{name}", rf"'.*src' is quantised \({name}\){UNQUANTISED}", put(name, "{}"))
      for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json")),
    Case("bnb-4bit",
         rf"'.*src' is quantised with bitsandbytes \(4 bit\) \('{Q}.weight.quant_state.*', U8\){UNQUANTISED}",
         coded({".weight": torch.zeros(512, 1, dtype=U8), ".weight.absmax": torch.ones(16),
                ".weight.quant_map": torch.ones(16),
                ".weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=U8)})),
    Case("bnb-4bit-codes-alone", rf"'.*src' is quantised with bitsandbytes \(4 bit\) \('{Q}.weight', U8\)",
         coded({".weight": torch.zeros(512, 1, dtype=U8), ".weight.absmax": torch.ones(16)})),
    Case("bnb-4bit-kept-as-bf16", r"'.*src' is quantised with bitsandbytes \(4 bit\)",
         coded({".weight": torch.zeros(256, 1).bfloat16(), ".weight.absmax": torch.ones(16),
                ".weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=U8)})),
    Case("bnb-8bit", rf"'.*src' is quantised with bitsandbytes \(8 bit\) \('{Q}.weight', I8\)",
         coded({".weight": torch.zeros(32, 32, dtype=I8), ".SCB": torch.ones(32),
                ".weight_format": torch.zeros((), dtype=U8)})),
    Case("gptq", rf"'.*src' is quantised with GPTQ \('{Q}.qweight', I32\)",
         coded({".qweight": torch.zeros(4, 32, dtype=I32), ".qzeros": torch.zeros(1, 4, dtype=I32),
                ".scales": torch.ones(1, 32), ".g_idx": torch.zeros(32, dtype=I32)})),
    Case("awq", rf"'.*src' is quantised with GPTQ or AWQ \('{Q}.qweight', I32\)",
         coded({".qweight": torch.zeros(32, 4, dtype=I32), ".qzeros": torch.zeros(1, 4, dtype=I32),
                ".scales": torch.ones(1, 32)})),
    Case("compressed-tensors", rf"'.*src' is quantised with compressed-tensors \('{Q}.weight_packed', I32\)",
         coded({".weight_packed": torch.zeros(32, 4, dtype=I32), ".weight_scale": torch.ones(32, 1),
                ".weight_shape": torch.tensor([32, 32])})),
    Case("compressed-tensors-int8", rf"'.*src' is quantised with .*compressed-tensors \('{Q}.weight', I8\)",
         coded({".weight": torch.zeros(32, 32, dtype=I8), ".weight_scale": torch.ones(32, 1)})),
    Case("mxfp4", r"'.*src' is quantised with MXFP4 \('model.layers.0.mlp.experts.down_proj_blocks', U8\)",
         added(model__layers__0__mlp__experts__down_proj_blocks=torch.zeros(2, 32, 2, 16, dtype=U8),
               model__layers__0__mlp__experts__down_proj_scales=torch.zeros(2, 32, 2, dtype=U8))),
    Case("fp8-blocks", rf"'.*src' is quantised with FP8 \('{Q}.weight', F8_E4M3\)",
         coded({".weight": torch.zeros(32, 32).to(F8), ".weight_scale_inv": torch.ones(1, 1)})),
    Case("fp8-alone", rf"'{Q}.weight' in '{WEIGHTS}' is F8_E4M3; a reset needs one of F64, .*Quantised\? Take",
         becomes(f"{Q}.weight", lambda t: t.to(F8))),
    Case("int32", rf"'{UP}' in 'model.safetensors' is I32; a reset needs one of F64, F32, F16, BF16",
         becomes(UP, lambda t: t.to(I32))),
]  # fmt: skip

KIND = [
    Case("gguf", rf"'.*src' holds GGUF \('m.gguf'\), made for running a model{UNQUANTISED}",
         both(gone("*.json", WEIGHTS), put("m.gguf"))),
    Case("gguf-with-config", "'.*src' holds GGUF", weights_are("m-q4_k_m.gguf")),
    Case("adapter", r"'.*src' is an adapter \(adapter_config.json\).*: merge first, with peft: .*merge_and_unload\(\)",
         both(gone("*"), put("adapter_config.json", "{}"), put("adapter_model.safetensors"))),
    Case("adapter-beside-config", r"'.*src' is an adapter .*: merge first", put("adapter_config.json", "{}")),
    Case("adapter-keys", "'.*src' holds adapter weights .*lora_A.*: merge them first",
         added(model__layers__0__mlp__up_proj__lora_A__default__weight=torch.zeros(4, 32))),
    Case("base-layer-keys", "'.*src' holds adapter weights .*base_layer.*: merge them first",
         renamed(lambda k: k.replace("up_proj.weight", "up_proj.base_layer.weight"))),
    Case("peft-prefix", "'.*src' holds adapter weights .'base_model.model.*: merge them first",
         renamed("base_model.model.{}".format)),
    *(Case(f"pickled{kind}", rf"'.*src' holds pickled weights \('{name}'\), which can run code.*: convert them first",
           weights_are(name))
      for kind, name in ((".bin", "pytorch_model.bin"), (".pt", "model.pt"), (".pth", "consolidated.00.pth"))),
    *(Case(f"foreign-{name}", rf"'.*src' holds weights of another framework \('{name}'\): convert them",
           weights_are(name))
      for name in ("tf_model.h5", "flax_model.msgpack", "model.onnx")),
    Case("no-weights", f"'.*src' holds neither {WEIGHTS} nor {INDEX}: download or copy what is missing$",
         gone(WEIGHTS)),
    Case("odd-name", rf"'.*src' holds neither {WEIGHTS} nor {INDEX}.*but 'weights.safetensors': rename it",
         weights_are("weights.safetensors")),
    Case("index-lost", rf"'.*src' holds neither {WEIGHTS} nor {INDEX}.*'model-00001.*'", gone(INDEX), "shards"),
]  # fmt: skip

DAMAGED = [
    Case("index-not-json", f"'.*{INDEX}' is damaged: it is not JSON{AGAIN}", put(INDEX, "{"), "shards"),
    Case("index-a-list", f"'.*{INDEX}' is damaged: it holds no weight_map{AGAIN}", put(INDEX, "[]"), "shards"),
    Case("index-without-map", f"'.*{INDEX}' is damaged: it holds no weight_map{AGAIN}", put(INDEX, "{}"), "shards"),
    Case("index-empty-map", f"'.*{INDEX}' is damaged: its weight_map{AGAIN}", put(INDEX, '{"weight_map": {}}'),
         "shards"),
    Case("index-odd-map", f"'.*{INDEX}' is damaged: its weight_map{AGAIN}",
         put(INDEX, '{"weight_map": {"a": ["b"]}}'), "shards"),
    Case("index-outside", f"'.*{INDEX}' is damaged: its weight_map does not map tensors to .* beside it{AGAIN}",
         index(swap(UP, "../x.safetensors")), "shards"),
    Case("index-absolute", f"'.*{INDEX}' is damaged: its weight_map does not map tensors to .* beside it{AGAIN}",
         index(swap(UP, "/x.safetensors")), "shards"),
    Case("index-of-pickles", f"'.*{INDEX}' is damaged: its weight_map does not map tensors to .safetensors",
         index(swap(UP, "x.bin")), "shards"),
    Case("shard-missing", "'.*' names 'model-00001-of-.*', which is not there: download or copy the checkpoint again",
         gone("model-00001-*"), "shards"),
    Case("index-tensor-nowhere",
         "the checkpoint lacks 1 of the .*: 'model.norm.weight'.*; '.*index.json' lists 'model.norm.weight', which no",
         shard_without("model.norm.weight"), "shards"),
    Case("in-two-shards", f"'{UP}' is in 'model-0.*' and in 'model-0.*', and readers differ", in_two_shards, "shards"),
    Case("stored-twice", "the checkpoint holds 'model.norm.weight' twice, as 'model.norm.weight' and as 'norm.weight'",
         added(norm__weight=torch.ones(32))),
    Case("shard-cut-off", f"'.*model-00001.*' is damaged: it is cut off: its header lists .* bytes{AGAIN}",
         bytes_of(lambda b: b[:-7], "model-00001*"), "shards"),
    Case("cut-off", f"'.*{WEIGHTS}' is damaged: it is cut off: .* lists .* bytes, the file has{AGAIN}",
         bytes_of(lambda b: b[:-1])),
    Case("appended", f"'.*{WEIGHTS}' is damaged: it has bytes behind its last tensor: {AGAIN}",
         bytes_of(lambda b: b + b"x")),
    Case("cut-in-header", f"'.*{WEIGHTS}' is damaged: its 99 bytes do not hold the header that it announces{AGAIN}",
         bytes_of(lambda b: b[:99])),
    Case("header-too-long", f"'.*{WEIGHTS}' is damaged: its .* bytes do not hold the header that it announces{AGAIN}",
         bytes_of(lambda b: struct.pack("<Q", 2**63) + b[8:])),
    Case("empty-file", f"'.*{WEIGHTS}' is damaged: its 0 bytes do not hold{AGAIN}", put(WEIGHTS, b"")),
    Case("seven-bytes", f"'.*{WEIGHTS}' is damaged: its 7 bytes do not hold{AGAIN}", put(WEIGHTS, b"\0" * 7)),
    Case("header-empty", f"'.*{WEIGHTS}' is damaged: its header is not JSON{AGAIN}", put(WEIGHTS, b"\0" * 8)),
    Case("header-not-json", f"'.*{WEIGHTS}' is damaged: its header is not JSON{AGAIN}",
         bytes_of(lambda b: b[:8] + b"[" + b[9:])),
    Case("header-not-utf8", f"'.*{WEIGHTS}' is damaged: its header is not JSON{AGAIN}",
         bytes_of(lambda b: b[:8] + b"\xff" + b[9:])),
    Case("header-deep", f"'.*{WEIGHTS}' is damaged: its header is not JSON{AGAIN}",
         put(WEIGHTS, struct.pack("<Q", 100_000) + b"[" * 100_000)),
    Case("header-a-list", f"'.*{WEIGHTS}' is damaged: its header is not a JSON object{AGAIN}",
         put(WEIGHTS, struct.pack("<Q", 2) + b"[]")),
    Case("no-tensors", f"'.*{WEIGHTS}' holds no tensors", put(WEIGHTS, struct.pack("<Q", 2) + b"{}")),
    Case("weights-a-link-to-nothing", f"'.*src/{WEIGHTS}' cannot be read: No such file",
         both(gone(WEIGHTS), lambda s: (s / WEIGHTS).symlink_to("nothing"))),
    Case("shape-endless", f"'.*{WEIGHTS}' is damaged: the entry of '{UP}' is not what safetensors writes{AGAIN}",
         entry(shape=[9] * 10**6)),
    Case("shape-of-long-numbers", f"'.*{WEIGHTS}' is damaged: the entry of '{UP}' is not what",
         entry(shape=[10**4000] * 20)),
    Case("tensors-endless", f"'.*{WEIGHTS}' is damaged: its header lists 300,0.. tensors, and at most 300,000 are read",
         header(lambda entries: entries.update(dict.fromkeys(map(str, range(300_000)), 0)))),
    Case("name-endless", f"'.*{WEIGHTS}' is damaged: the entry of 'x{{1000}}' is not what",
         header(lambda entries: entries.update({"x" * 10**6: entries.pop(UP)}))),
    Case("dtype-endless", f"'{UP}' in '{WEIGHTS}' is x{{20}}; a reset needs one of", entry(dtype="x" * 10**6)),
    Case("weights-a-folder", f"'.*src/{WEIGHTS}' is a folder, not a file", both(gone(WEIGHTS),
         lambda s: (s / WEIGHTS).mkdir())),
    Case("git-lfs-pointer", f"'.*{WEIGHTS}' is a pointer of git-lfs, not the file that it stands for: run git lfs pull",
         put(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")),
    Case("overlap", f"'.*{WEIGHTS}' is damaged: it has bytes that belong to another tensor too in '.*'{AGAIN}",
         header(shifted(-4))),
    Case("hole", f"'.*{WEIGHTS}' is damaged: it has a hole before '{UP}'{AGAIN}", header(shifted(4))),
    Case("offsets-backwards", f"'.*{WEIGHTS}' is damaged: the entry of '{UP}' is not what safetensors writes{AGAIN}",
         entry(data_offsets=[10, 2])),
    Case("offsets-three", f"'.*{WEIGHTS}' is damaged: the entry of '{UP}' is not what safetensors writes{AGAIN}",
         entry(data_offsets=[1, 2, 3])),
    Case("offsets-lost", f"'.*{WEIGHTS}' is damaged: the entry of '{UP}' is not what safetensors writes{AGAIN}",
         header(lambda e: e[UP].pop("data_offsets"))),
    Case("entry-a-text", f"'.*{WEIGHTS}' is damaged: the entry of '{UP}' is not what safetensors writes{AGAIN}",
         header(lambda e: e.update({UP: "x"}))),
    Case("shape-negative", f"'.*{WEIGHTS}' is damaged: the entry of '{UP}' is not what safetensors writes{AGAIN}",
         entry(shape=[-80, -32])),
    Case("shape-and-bytes", rf"'.*{WEIGHTS}' is damaged: '{UP}' is F32 of shape \(80, 33\), but has 10240 bytes{AGAIN}",
         entry(shape=[80, 33])),
    Case("type-and-bytes", rf"'.*{WEIGHTS}' is damaged: '{UP}' is BF16 of shape \(80, 32\), but has 10240 bytes{AGAIN}",
         entry(dtype="BF16")),
    Case("type-unknown", f"'{UP}' in '{WEIGHTS}' is F99; a reset needs one of F64, F32, F16, BF16", entry(dtype="F99")),
]  # fmt: skip

FIT = [
    Case("wrong-shape", rf"'{UP}' has shape \(80, 31\), which does not fit '{UP}' of shape \(80, 32\) that the config",
         becomes(UP, lambda t: t[:, :31])),
    Case("too-few-rows", rf"'{UP}' has shape \(79, 32\), which does not fit '{UP}' of shape \(80, 32\)",
         becomes(UP, lambda t: t[:79])),
    Case("too-many-rows", rf"'{UP}' has shape \(81, 32\), which does not fit '{UP}' of shape \(80, 32\)",
         becomes(UP, lambda t: torch.cat([t, t[:1]]))),
    Case("transposed", rf"'{UP}' has shape \(32, 80\), which does not fit '{UP}' of shape \(80, 32\)",
         becomes(UP, lambda t: t.T)),
    Case("no-axes", rf"'{UP}' has shape \(\), which does not fit '{UP}' of shape \(80, 32\)",
         becomes(UP, lambda t: t.sum())),
    Case("wrong-norm", r"'model.norm.weight' has shape \(31,\), which does not fit '.*' of shape \(32,\)",
         becomes("model.norm.weight", lambda t: t[:31])),
    Case("tensor-missing", rf"the checkpoint lacks 1 of the tensors of LlamaForCausalLM: '{UP}'\. It is of another",
         lacks(UP)),
    Case("layer-missing", "the checkpoint lacks 9 of the tensors of LlamaForCausalLM: '.*', '.*', '.*' and 6 more",
         lacks("layers.1")),
    Case("other-architecture", "the checkpoint lacks .* of the tensors of LlamaForCausalLM: .*another architecture",
         lambda s: tiny_gpt2().save_pretrained(s / "x") or (s / "x" / WEIGHTS).replace(s / WEIGHTS)),
    Case("expert-missing",
         r"'model.layers.0.*experts\.\d.*' .* do not fill '.*experts.gate_up_proj' of shape \(3, 48, 16\)",
         lacks(r"experts\.1\."), "mixtral"),
    Case("part-of-an-expert-missing",
         r"'model.layers.0.*experts\.\d\.w.*' .* do not fill '.*experts.gate_up_proj' of shape \(3, 48, 16\)",
         lacks(r"experts\.1\.w3"), "mixtral"),
    Case("all-gates-of-experts-missing",
         r"'model.layers.0.*experts\.\d\.w.*' .* do not fill '.*experts.gate_up_proj' of shape \(3, 48, 16\)",
         lacks(r"\.w1\."), "mixtral"),
    Case("all-experts-missing", "the checkpoint lacks 2 of the tensors of MixtralForCausalLM", lacks("experts"),
         "mixtral"),
    Case("expert-of-another-shape", r"'.*experts.1.w2.weight' has shape \(16, 23\), which does not fit '.*down_proj'",
         becomes("model.layers.0.block_sparse_moe.experts.1.w2.weight", lambda t: t[:, :23]), "mixtral"),
    Case("expert-no-axes", r"'.*experts.1.w1.weight' has shape \(\), which does not fit '.*gate_up_proj'",
         becomes("model.layers.0.block_sparse_moe.experts.1.w1.weight", lambda t: t.sum()), "mixtral"),
    Case("nan", "'transformer.h.0.mlp.c_fc.weight' .*NaN or infinity",
         becomes("transformer.h.0.mlp.c_fc.weight", lambda t: t.index_fill(0, torch.tensor(3), torch.nan)), "gpt2",
         late=True),
    Case("infinity", f"'{UP}' .*NaN or infinity", becomes(UP, lambda t: t / 0), late=True),
    Case("layout-unknown", r"LlamaForCausalLM: no layout is known for LlamaMLP.up_proj .*register_layout",
         patch=lambda m: m.delitem(fire_llm.architectures.lookup.TABLE, ("LlamaMLP", "up_proj"))),
    Case("nan-leaves-no-folders-above", f"'{UP}' .*NaN or infinity", becomes(UP, lambda t: t / 0), dst="{tmp}/a/b/dst",
         late=True),
]  # fmt: skip


def asked(name: str, message: str, *options: str, **more: Any) -> Case:
    """Make the case of bad options on a good checkpoint."""
    return Case(f"option-{name}", message, options=options, **more)


def online(patch: pytest.MonkeyPatch) -> None:
    """Let the Hub seem to be at hand, nobody logged in."""
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr("huggingface_hub.get_token", lambda: None)


RESET = ("--method", "full_reset")
OPTIONS = [
    asked("init-and-seed", "'full_reset' needs initial weights: give one of --init CHECKPOINT and --seed N",
          *RESET, "--init", "{src}", "--seed", "1"),
    asked("neither", "'full_reset' needs initial weights: give one of --init CHECKPOINT and --seed N", *RESET),
    asked("init-is-src", "--init: '.*src' is the checkpoint that is reset, and no initial", *RESET, "--init", "{src}"),
    asked("init-for-fire", "--init: 'fire' uses no initial weights: leave it out", "--init", "{src}"),
    asked("seed-for-fire", "--seed: 'fire' uses no initial weights: leave it out", "--seed", "1"),
    asked("seed-for-keep", "--seed: 'none' uses no initial weights: leave it out", "--method", "keep", "--seed", "1"),
    asked("seed-negative", "--seed -1: a whole number from 0 to", *RESET, "--seed", "-1"),
    asked("seed-huge", "--seed 9+: a whole number from 0 to", *RESET, "--seed", "9" * 30),
    asked("init-missing", "there is no folder '.*/nowhere'.*, and a Hub id has .*check the spelling",
          *RESET, "--init", "{tmp}/nowhere"),
    asked("dst-inside-init", "'.*/start/new' lies inside '.*/start', which is never written to", *RESET, "--init",
          "{tmp}/start", spoil=lambda s: shutil.copytree(s, s.with_name("start")), dst="{tmp}/start/new"),
    asked("init-other-architecture", "the initial weights hold no '.*' of shape .*another architecture",
          *RESET, "--init", "{saved}/gpt2"),
    asked("init-other-shape", r"the initial weights hold no 'model.*' of shape \(.*\): another architecture",
          *RESET, "--init", "{tmp}/wide", spoil=wider),
    asked("method", "method: unknown reset 'fier'. Did you mean 'fire'. Known: none,", "--method", "fier"),
    asked("role", "roles: unknown role 'atention'. Did you mean 'attention'. Known: attention", "--role", "atention"),
    asked("role-no-matrices", "roles: 'fire' acts on matrices .*; norm are not. Remove them", "--role", "norm"),
    asked("exclude", r"exclude: '\(' is not a regular expression", "--exclude", "("),
    asked("iterations-negative", "iterations: -1 is not allowed: .*greater than", "--iterations", "-1"),
    asked("tolerance-nan", "tolerance: nan is not allowed", "--solver", "polar", "--tolerance", "nan"),
    asked("solver", "solver: 'nonsense' is not allowed: .*'newton-schulz' or 'polar'", "--solver", "nonsense"),
    asked("scale", "scale: 'big' is not allowed: ", "--scale", "big"),
    asked("shrink-of-fire", "shrink: unknown option of 'fire'", "--shrink", "0.5"),
    asked("shrink-too-large", "shrink: 2.0 is not allowed: .*", "--method", "shrink_perturb", "--seed", "1",
          "--shrink", "2"),
    asked("device", "device: 'gpu' is none; give auto, cpu, cuda or cuda:N", "--device", "gpu"),
    asked("device-empty", "device: '' is none; give auto, cpu, cuda or cuda:N", "--device", ""),
    asked("device-meta", "device: 'meta' is not on this machine", "--device", "meta"),
    asked("device-absent", "device: 'cuda' is not on this machine, which has cpu alone", "--device", "cuda",
          patch=lambda m: m.setattr(torch.accelerator, "is_available", lambda: False)),
    asked("processes", "--num-processes 0: at least 1 is needed", "--num-processes", "0"),
    asked("push-bad-id", "--push-to-hub: 'a/b/c' is not of the form owner/name", "--push-to-hub", "a/b/c"),
    asked("push-no-owner", "--push-to-hub: 'mine' is not of the form owner/name", "--push-to-hub", "mine"),
    asked("push-offline", "--push-to-hub me/mine: HF_HUB_OFFLINE is set", "--push-to-hub", "me/mine", patch=offline),
    asked("push-nobody", "--push-to-hub me/mine: nobody is logged in to the Hub: `hf auth login`",
          "--push-to-hub", "me/mine", patch=online),
]  # fmt: skip

ORDER = [
    Case("adapter-before-quantised", "'.*src' is an adapter",
         both(put("adapter_config.json", "{}"), put("quant_config.json"))),
    Case("adapter-before-config", "'.*src' is an adapter",
         both(put("adapter_config.json", "{}"), put("config.json", "{"))),
    Case("quantised-before-remote-code", "'.*src' is quantised with AWQ",
         settings(quantization_config={"quant_method": "awq"}, auto_map={"AutoModel": "x"})),
    Case("quantised-before-unknown", "'.*src' is quantised with MXFP4",
         settings(quantization_config={"quant_method": "mxfp4"}, model_type="lama", architectures=None)),
    Case("quantised-before-damaged", "'.*src' is quantised with FP8",
         both(settings(quantization_config={"quant_method": "fp8"}), put(WEIGHTS, b""))),
    Case("destination-before-damaged", "'.*src/new' lies inside", put(WEIGHTS, b""), dst="{src}/new"),
    Case("options-before-damaged", "iterations: -1", put(WEIGHTS, b""), options=("--iterations", "-1")),
]  # fmt: skip

CASES = [*PLACE, *CONFIG, *QUANTISED, *KIND, *DAMAGED, *FIT, *OPTIONS, *ORDER]


def one_message(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command line that must end with exit code 2 and one line on stderr, which says what it should."""
    assert main(line) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("fire-llm: ") and error.count("\n") == 1 and error.endswith("\n"), error
    text = error.removeprefix("fire-llm: ").removesuffix("\n")
    assert re.match(message, text), text


def prepared(saved: Path, tmp_path: Path, kind: str = "llama", spoil: Spoil | None = None) -> Path:
    """Copy a checkpoint and spoil it."""
    src = tmp_path / "src"
    shutil.copytree(saved / kind, src)
    if spoil is not None:
        spoil(src)
    return src


def refused(
    verb: str,
    case: Case,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run a verb on a bad input: one message, no weight read, and nothing on the disk is another."""
    src = prepared(saved, tmp_path, case.kind, case.spoil)
    if case.patch is not None:
        case.patch(monkeypatch)
    if not case.late:
        monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("a weight was read"))
    before = contents(tmp_path)
    parts = [case.src, *([case.dst] if verb == "apply" else []), *case.options]
    one_message([verb, *(p.format(src=src, tmp=tmp_path, saved=saved) for p in parts)], case.message, capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_apply_refuses(case: Case, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    refused("apply", case, saved, tmp_path, monkeypatch, capsys)


INSPECT = [
    asked("missing", "there is no folder '.*nowhere'.*check the spelling", src="{tmp}/nowhere"),
    asked("quantised", "'.*src' is quantised with AWQ", spoil=settings(quantization_config={"quant_method": "awq"})),
    asked("adapter", "'.*src' is an adapter", spoil=put("adapter_config.json", "{}")),
    asked("cut-off", f"'.*{WEIGHTS}' is damaged: it is cut off", spoil=bytes_of(lambda b: b[:-1])),
    asked("int32", f"'{UP}' in '{WEIGHTS}' is I32; a reset needs", spoil=becomes(UP, lambda t: t.to(I32))),
    asked("against-missing", "there is no folder '.*nowhere'", "--against", "{tmp}/nowhere"),
    asked("against-other-architecture", "'.*gpt2' holds no 'model.layers.0.*' of shape .*: another architecture",
          "--against", "{saved}/gpt2"),
    asked("against-other-shape", r"'.*wide' holds no '.*gate_proj.*' of shape \(80, 32\): another architecture",
          "--against", "{tmp}/wide", spoil=wider),
    asked("nan", f"'{UP}' of '.*src' holds NaN or infinity: it has no singular values",
          spoil=becomes(UP, lambda t: t * torch.nan), late=True),
    asked("nan-against", f"'{UP}' of '.*nan' holds NaN or infinity: it has no singular values",
          "--against", "{tmp}/nan",
          spoil=lambda s: becomes(UP, lambda t: t / 0)(Path(shutil.copytree(s, s.with_name("nan")))), late=True),
    asked("role-unknown", ".*'atention'.*Did you mean 'attention'", "--role", "atention"),
    asked("role-absent", "'.*src' holds no matrix of the roles ssm: choose others with --role", "--role", "ssm"),
    asked("device", "device: 'gpu' is none; give auto, cpu, cuda or cuda:N", "--device", "gpu"),
    asked("json-a-folder", "--json: '.*' is a folder: name a file", "--json", "{tmp}"),
    asked("html-a-folder", "--html: '.*' is a folder: name a file", "--html", "{tmp}"),
    asked("json-below-a-file", "--json: '.*/config.json/x.json' cannot be written: '.*/config.json' is a file",
          "--json", "{src}/config.json/x.json"),
]  # fmt: skip


@pytest.mark.parametrize("case", INSPECT, ids=lambda case: case.name.removeprefix("option-"))
def test_inspect_refuses(case: Case, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    refused("inspect", case, saved, tmp_path, monkeypatch, capsys)


# ---- what only resembles something bad


@pytest.mark.parametrize("value", [None, {}])
def test_a_config_that_names_no_quantisation_is_accepted(value, saved: Path, tmp_path: Path, capsys) -> None:
    change = settings(quantization_config=value, auto_map={}, text_config=None, task={"quantization_config": value})
    src = prepared(saved, tmp_path, spoil=change)
    assert main(["apply", str(src), str(tmp_path / "dst")]) == 0
    assert "14 tensors touched" in capsys.readouterr().out


def test_tensors_that_only_end_like_those_of_quantised_weights_are_kept(saved: Path, tmp_path: Path, capsys) -> None:
    """Scales without codes, blocks of floating-point numbers, and F8 that no reset reads."""
    more = {
        "model.up_blocks": torch.ones(2, 3), "model.up_scales": torch.ones(2), "model.image_scales": torch.ones(2),
        "model.x.absmax": torch.ones(3), f"{Q}.scales": torch.ones(4), f"{Q}.weight_scale": torch.ones(32, 1),
        f"{Q}.input_scale": torch.ones(1), f"{Q}.SCB": torch.ones(32), "model.visited_blocks": torch.ones(2, dtype=U8),
        "model.mtp.0.weight": torch.ones(4, 4).to(F8), "model.lora_A_norm.weight": torch.ones(3),
    }  # fmt: skip
    src = prepared(saved, tmp_path, spoil=weights(lambda stored: stored.update(more)))
    before = load_file(src / WEIGHTS)
    assert main(["apply", str(src), str(tmp_path / "dst")]) == 0
    out = capsys.readouterr().out
    assert "14 tensors touched" in out and "kept as stored, not loaded by the class: " in out
    after = load_file(tmp_path / "dst" / WEIGHTS)
    assert json.loads((tmp_path / "dst" / "fire.json").read_text())["kept_unread"] == sorted(more)
    assert all(torch.equal(before[name].view(U8), after[name].view(U8)) for name in more)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "m.gguf", "tf_model.h5", "consolidated.safetensors", "x.onnx"])
def test_other_forms_beside_the_weights_are_left_behind(name, saved: Path, tmp_path: Path, capsys) -> None:
    src = prepared(saved, tmp_path, spoil=put(name))
    assert main(["apply", str(src), str(tmp_path / "dst")]) == 0
    assert f"not copied: {name}" in capsys.readouterr().out and not (tmp_path / "dst" / name).exists()


def test_matrices_that_no_reset_reads_may_be_of_any_type(saved: Path, tmp_path: Path) -> None:
    src = prepared(saved, tmp_path, spoil=becomes("lm_head.weight", lambda t: t.to(F8)))
    assert main(["apply", str(src), str(tmp_path / "dst")]) == 0
    assert load_file(tmp_path / "dst" / WEIGHTS)["lm_head.weight"].dtype == F8
    assert main(["apply", str(src), str(tmp_path / "head"), "--role", "lm_head"]) == 2
    src = prepared(saved, tmp_path / "int", spoil=becomes(UP, lambda t: t.to(I32)))
    assert main(["apply", str(src), str(tmp_path / "left"), "--exclude", r"0\.mlp\.up_proj"]) == 0


def test_a_class_registered_for_causal_language_models_is_none_of_the_unknown(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes transformers' own registers to load such a checkpoint, so they count."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlamaConfig, LlamaForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class MyConfig(LlamaConfig):
        model_type = "my-llama"

    class MyForCausalLM(LlamaForCausalLM):
        config_class = MyConfig

    for register in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(register, "_extra_content", {})  # and take out again what is put in
    AutoConfig.register("my-llama", MyConfig)
    AutoModelForCausalLM.register(MyConfig, MyForCausalLM)
    src = prepared(saved, tmp_path, spoil=settings(model_type="my-llama", architectures=["MyForCausalLM"]))
    assert main(["apply", str(src), str(tmp_path / "dst")]) == 0


def test_a_module_called_base_layer_is_no_adapter(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """PEFT calls so what an adapter is added to; a model that has such a module itself may be reset."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlamaConfig, LlamaForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class OwnConfig(LlamaConfig):
        model_type = "own-llama"

    class OwnForCausalLM(LlamaForCausalLM):
        config_class = OwnConfig

        def __init__(self, config: OwnConfig) -> None:
            super().__init__(config)
            self.model.base_layer = torch.nn.LayerNorm(config.hidden_size)

    for register in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(register, "_extra_content", {})
    AutoConfig.register("own-llama", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)

    def add_norm(stored: dict[str, Tensor]) -> None:
        stored.update({f"model.base_layer.{name}": torch.ones(32) for name in ("weight", "bias")})

    own = settings(model_type="own-llama", architectures=["OwnForCausalLM"])
    src = prepared(saved, tmp_path, spoil=both(own, weights(add_norm)))
    assert main(["apply", str(src), str(tmp_path / "dst")]) == 0
    assert "14 tensors touched" in capsys.readouterr().out
    assert "model.base_layer.weight" in load_file(tmp_path / "dst" / WEIGHTS)
    lone = prepared(saved, tmp_path / "lone", spoil=weights(lambda s: s.update({"x.base_layer.weight": torch.ones(3)})))
    assert main(["apply", str(lone), str(tmp_path / "lone-dst")]) == 0  # no weight of the model is missing
