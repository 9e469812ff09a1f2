"""Exact perplexity against hand-computed numbers and plain loops."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.hard_logits import hard_rows, softmax_in_fp64
from support.models import tiny_gpt2, tiny_llama
from support.ranks import run_ranks
from support.simulated import Graphs, given_masks
from support.small_models import SMALL, VOCABULARY, build, stand_ins
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertLMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from fire_llm import UserError, diagnose, perplexity
from fire_llm.evaluation import kernels, scores, scoring, windows

TOKENS = torch.randint(0, 97, (1003,), generator=torch.Generator().manual_seed(0))


def by_hand(model, tokens, context, stride, prefix=None):
    """Score each target in the first window that covers it, one window at a time, in fp64."""
    stream = torch.cat([torch.tensor([prefix]), tokens]) if prefix is not None else tokens
    model, total, done = model.double().eval(), 0.0, 0
    n = len(stream) - 1
    for start in range(0, n, stride):
        end = min(start + context, n)
        with torch.no_grad():
            log_p = F.log_softmax(model(input_ids=stream[start:end][None]).logits[0], -1)
        total -= sum(float(log_p[k - start, stream[k + 1]]) for k in range(done, end))
        done = end
        if end == n:
            break
    assert done == n
    return total / n


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize(("context", "stride", "prefix"), [(64, 64, None), (64, 16, 0), (17, 5, 3), (64, 1, None)])
def test_perplexity_equals_a_plain_loop(build, context, stride, prefix):
    tokens = TOKENS[:130]
    wanted = by_hand(build(), tokens, context, stride, prefix)
    measured = perplexity(build(), tokens, context=context, stride=stride, prefix=prefix, batch_size=4)
    assert measured.nll == pytest.approx(wanted, rel=1e-7)
    assert measured.perplexity == pytest.approx(math.exp(wanted), rel=1e-6)
    assert measured.tokens == len(tokens) - (prefix is None)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_perplexity_does_not_depend_on_the_batch_size(build):
    model = build()
    values = [perplexity(model, TOKENS, context=64, batch_size=b, prefix=0).perplexity for b in (1, 3, 8)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, TOKENS, context=64).perplexity == pytest.approx(97, rel=1e-9)


def test_a_bigram_model_has_the_hand_computed_perplexity():
    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).log())
            self.config = tiny_gpt2(vocab_size=3).config

        def forward(self, input_ids, **_):
            return type("Output", (), {"logits": self.table[input_ids]})

    # 0→1→1→2→0: 0.25, 0.8, 0.1, 0.2
    wanted = -math.log(0.25 * 0.8 * 0.1 * 0.2) / 4
    measured = perplexity(Bigram(), [0, 1, 1, 2, 0], context=2, n_bytes=8)
    assert measured.nll == pytest.approx(wanted, rel=1e-7)
    assert measured.bits_per_byte == pytest.approx(wanted * 4 / math.log(2) / 8, rel=1e-7)


@pytest.mark.parametrize("reach_back", [False, True])
@pytest.mark.parametrize(("context", "stride"), [(4, 4), (4, 1), (4, 3), (100, 100)])
def test_windows_score_every_position_once(context, stride, reach_back):
    lengths = [1, 10, 0, 12, 4, 5]
    scored = {d: [] for d in range(len(lengths))}
    for document, start, end, first in windows(lengths, context, stride, reach_back=reach_back).tolist():
        assert 0 <= start <= first < end <= lengths[document] and end - start <= context
        assert not reach_back or end - start == min(context, lengths[document])
        scored[document] += range(first, end)
    assert scored == {d: list(range(n)) for d, n in enumerate(lengths)}


def test_mode_and_gradients_are_left_as_they_were():
    model = tiny_gpt2().train()
    perplexity(model, TOKENS[:50], context=16)
    assert model.training
    model(input_ids=TOKENS[None, :8], labels=TOKENS[None, :8]).loss.backward()


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "0 token"),
        ([5], {}, "1 token"),
        ([5, 97], {}, "token 97 is outside the model's vocabulary of 97"),
        ([5, 6], {"context": 65}, "context 65 must lie between 1 and 64, the most tokens"),
        ([5, 6], {"context": 8, "stride": 9}, "stride 9 must lie between 1 and the context, 8"),
        ([5, 6], {"context": 8, "stride": -1}, "stride -1"),
    ],
)
def test_bad_input(tokens, options, message):
    with pytest.raises(UserError, match=message):
        perplexity(tiny_gpt2(), torch.tensor(tokens, dtype=torch.long), **options)


def test_logits_that_are_not_finite_are_refused():
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        perplexity(model, TOKENS[:20], context=8)


def test_results_are_plain_data():
    assert json.loads(json.dumps(perplexity(tiny_gpt2(), TOKENS[:20], context=8).to_dict()))["tokens"] == 19


# ---- documents

ENDS = [7, 8, 40, 103, 110]


def alone(model, tokens, context, prefix):
    """Score a document by itself in fp64, a token at a time: each reads the `context` tokens that its window has."""
    stream, total = torch.cat([torch.tensor([prefix]), tokens]), 0.0
    n = len(tokens)
    for k in range(n):
        start = min(k // context * context, max(0, n - context))
        with torch.no_grad():
            log_p = F.log_softmax(model(input_ids=stream[start : k + 1][None]).logits[0, -1], -1)
        total -= float(log_p[stream[k + 1]])
    return total


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_each_document_by_itself_equals_scoring_its_tokens_one_by_one(build):
    tokens, model = TOKENS[:110], build().double().eval()
    wanted = [alone(model, tokens[a:b], 16, 5) for a, b in zip([0, *ENDS[:-1]], ENDS, strict=True)]
    measured = perplexity(
        build(), tokens, context=16, documents=ENDS, per_document=True, prefix=5, batch_size=2, n_words=[3, 1, 9, 20, 2]
    )
    assert measured.scores.nll == pytest.approx(wanted, rel=1e-6)
    assert measured.nll == pytest.approx(sum(wanted) / 110, rel=1e-6)
    assert measured.word_perplexity == pytest.approx(math.exp(sum(wanted) / 35), rel=1e-6)
    assert (measured.tokens, measured.documents, measured.words) == (110, 5, 35)


def test_a_stream_gives_each_document_the_tokens_that_are_its_own():
    model = tiny_llama()
    whole = perplexity(model, TOKENS[:110], context=16, prefix=3)
    cut = perplexity(model, TOKENS[:110], context=16, prefix=3, documents=ENDS, n_bytes=range(1, 6))
    assert cut.nll == pytest.approx(whole.nll, rel=1e-12)
    assert cut.scores.tokens.tolist() == [7, 1, 32, 63, 7] and cut.bytes == 15
    head = perplexity(model, TOKENS[:8], context=16, prefix=3, documents=[7, 8])
    assert head.scores.nll.sum() == pytest.approx(cut.scores.nll[:2].sum(), rel=1e-6)


def test_perplexity_does_not_depend_on_order_batches_or_padding():
    """fp64 leaves only the order of sums: what else differed would show."""
    model = tiny_llama().double()
    pieces = [TOKENS[a:b] for a, b in zip([0, *ENDS[:-1]], ENDS, strict=True)]

    def measured(order, **options):
        ends = torch.tensor([len(pieces[i]) for i in order]).cumsum(0)
        tokens = torch.cat([pieces[i] for i in order])
        return perplexity(model, tokens, documents=ends, per_document=True, prefix=5, context=16, **options).nll

    wanted = measured(range(5), batch_size=1)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        for batch_size in (1, 2, 7, 100):
            assert measured(order, batch_size=batch_size) == pytest.approx(wanted, rel=1e-12)


def test_ranks_share_documents_and_agree(tmp_path):
    (alone,) = run_ranks(1, _measure_shared, tmp_path)
    for world in (2, 3):
        shared = run_ranks(world, _measure_shared, tmp_path)
        assert shared == [shared[0]] * world
        assert shared[0] == pytest.approx(alone, rel=1e-9)


def _measure_shared(rank, world):
    model = tiny_gpt2()
    stream = perplexity(model, TOKENS[:500], context=33, prefix=0, batch_size=2, share=True)
    each = perplexity(
        model, TOKENS[:110], context=16, documents=ENDS, per_document=True, prefix=5, batch_size=1, share=True
    )
    return [stream.nll, each.nll, *each.scores.nll]


# ---- models

SOME = [
    "bloom",
    "cohere",
    "falcon",
    "gemma2",
    "gpt_neox",
    "granite",
    "mamba",
    "minicpm3",
    "mixtral",
    "opt",
    "prophetnet",
]
NOT_CAUSAL = {
    "bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "doge", "electra", "ernie",
    "gemma4_assistant", "gemma4_unified_assistant", "megatron-bert", "musicgen", "musicgen_melody", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet",
    "xmod",
}  # fmt: skip
"""Types that read both ways as they are by default, or no text alone."""


@pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in sorted(SMALL)])
def test_every_type_scores_as_its_own_forward_does_or_is_refused(name):
    """Head, soft caps and scales are applied as the class does it, though no batch's logits are ever held."""
    with stand_ins():
        model = build(name).eval()
        tokens = torch.randint(0, VOCABULARY, (50,), generator=torch.Generator().manual_seed(1))
        refused = ""
        try:
            measured = perplexity(
                model, tokens, context=16, stride=7, batch_size=3, documents=[20, 23, 50], per_document=True, prefix=1
            )
        except UserError as error:
            refused = str(error)
        if refused:
            assert "is non-causal" in refused or "tokens alone" in refused
            assert name.partition("+")[0] in NOT_CAUSAL
            return
        for (a, b), nll in zip(((0, 20), (20, 23), (23, 50)), measured.scores.nll, strict=True):
            stream, wanted, done = torch.cat([torch.tensor([1]), tokens[a:b]]), 0.0, 0
            for turn in range(0, b - a, 7):
                end = min(turn + 16, b - a)
                start = max(0, end - 16)
                with torch.no_grad():
                    logits = model(input_ids=stream[start:end][None], use_cache=False).logits[0].double()
                wanted -= sum(float(F.log_softmax(logits, -1)[k - start, stream[k + 1]]) for k in range(done, end))
                done = end
                if end == b - a:
                    break
            assert nll == pytest.approx(wanted, rel=1e-6)


def test_a_model_without_a_head_or_with_foresight_is_refused():
    model = tiny_gpt2()
    with pytest.raises(UserError, match=r"GPT2Model has no causal head.*AutoModelForCausalLM"):
        perplexity(model.transformer, TOKENS[:50])
    bert = BertLMHeadModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=97)
    )
    with pytest.raises(UserError, match=r"BertLMHeadModel is non-causal.*is_decoder"):
        perplexity(bert, TOKENS[:50], context=16)
    bert.config.is_decoder = True
    bert = BertLMHeadModel(bert.config)
    assert perplexity(bert, TOKENS[:50], context=16).tokens == 49


def test_a_forward_that_a_library_replaced_is_put_back():
    model = tiny_llama()
    own = model.model.forward
    perplexity(model, TOKENS[:50], context=16)
    assert "forward" not in model.model.__dict__ and model.model.forward == own
    model.model.forward = wrapped = lambda *args, **kwargs: own(*args, **kwargs)
    perplexity(model, TOKENS[:50], context=16)
    assert model.model.forward is wrapped


def test_compiling_changes_speed_alone_and_happens_once(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(tuple(inputs[0].shape))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model, options = tiny_gpt2(), {"context": 16, "batch_size": 1}
    perplexity(model, TOKENS[:100], **options, compiled=True)
    assert not graphs  # 6 batches, and the rest: not worth it
    wanted = perplexity(model, TOKENS, **options).nll
    assert perplexity(model, TOKENS, **options, compiled=True).nll == pytest.approx(wanted, rel=1e-7)
    made = len(graphs)
    assert made
    for another in (model, tiny_gpt2()):
        perplexity(another, TOKENS, **options, compiled=True)
    assert len(graphs) == made


def test_a_compiled_trunk_has_no_mask_where_it_needs_none_and_one_where_it_does(monkeypatch):
    graphs = Graphs()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    window = MistralConfig(vocab_size=97, num_key_value_heads=2, sliding_window=8, pad_token_id=0, **sizes)
    for model, needed in ((tiny_llama(), False), (MistralForCausalLM(window), True)):
        graphs.clear()
        wanted = perplexity(model, TOKENS, context=16, batch_size=1).nll
        assert perplexity(model, TOKENS, context=16, batch_size=1, compiled=True).nll == pytest.approx(wanted, rel=1e-7)
        masks = given_masks(graphs)
        assert masks and all((mask is not None) is needed for mask in masks)
        assert model.config._attn_implementation == "sdpa"
    torch._dynamo.reset()


def test_a_compiled_model_is_not_kept(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    model = tiny_gpt2()
    perplexity(model, TOKENS, context=16, batch_size=1, compiled=True)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Waits(TorchDispatchMode):
    """Count the operations for whose result the host has to wait where they run on another device."""

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.waits += by_mask or func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.equal,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [128, 96])
@pytest.mark.parametrize("per_document", [False, True])
def test_the_host_waits_once_a_batch_at_most(stride, per_document):
    """A batch of 256 positions is four slices at V = 65 k. On a CPU transformers' look at a mask is left."""
    model, waits = tiny_gpt2(vocab_size=65536, n_positions=128, n_embd=16), []
    for n in (2, 8):  # windows: one batch, and four
        ends = [128 * (k + 1) for k in range(n)] if per_document else [128 + (n - 1) * stride]
        options = {"context": 128, "stride": stride, "batch_size": 2, "per_document": per_document, "prefix": 0}
        with Waits() as mode:
            perplexity(model, torch.arange(ends[-1]) % 97, documents=ends, **options)
        waits.append(mode.waits)
    assert waits[1] - waits[0] <= 3


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_scorer_waits_for_nothing_where_masks_are_left_out(monkeypatch, build):
    """As on an accelerator, where masks are looked at; here they are for the sake of a shape that never comes."""
    monkeypatch.setattr(torch, "compile", lambda f: f)
    model = build().eval()
    ids, rows = TOKENS[:128].view(2, 64), torch.arange(3, 128, 2)
    with torch.inference_mode():
        plain = scoring.Scorer(model, ids[0])(ids, ids.flatten()[rows], rows)
        scorer = scoring.Scorer(model, ids[0], context=64, compiled=(0, 0))
        assert scorer.unmasked
        with Waits() as mode:
            found = scorer(ids, ids.flatten()[rows], rows)
    assert mode.waits == 0 and torch.equal(found, plain)


def test_a_gpus_likelihoods_are_added_a_batch_later_and_all_of_them(monkeypatch):
    fetched = []
    monkeypatch.setattr(scores, "_to_host", lambda nll: lambda: fetched.append(len(nll)) or nll.numpy())
    sums = scores.DocumentSums(np.asarray([3, 5]), torch.device("cuda"))
    sums.add(np.asarray([1, 2, 3]), torch.tensor([0.5, 0.25, 8.0], dtype=torch.float64))
    assert not fetched
    sums.add(np.asarray([4]), torch.tensor([math.inf], dtype=torch.float64))
    assert fetched == [3] and sums.finite
    assert sums.finish().tolist() == [0.75, math.inf] and not sums.finite


@pytest.mark.parametrize(("gigabytes", "slices"), [(80, 4), (24, 5), (8, 14)])
def test_slices_on_a_gpu_are_even_and_fit_its_memory(monkeypatch, gigabytes, slices):
    memory = gigabytes * 10**9
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    rows = scoring._slice(16_384, 50_304, torch.device("cuda"))
    assert -(-16_384 // rows) == slices and rows * (slices - 1) < 16_384
    assert rows * 50_304 * 4 <= min(memory / 32, 2**30)


DTYPES = pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)


INTERPRETED = """
import sys, torch
from fire_llm.evaluation.kernels import row_nll
torch.save([row_nll(*each) for each in torch.load(sys.argv[1])], sys.argv[2])
"""


def interpreted(cases, folder):
    """Return what the kernel gives for (logits, targets) each, run by Triton's interpreter on the CPU."""
    pytest.importorskip("triton")
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, "-c", INTERPRETED, str(folder / "cases.pt"), str(folder / "found.pt")]
    package = Path(kernels.__file__).parents[2]
    subprocess.run(command, check=True, cwd=package, env=os.environ | {"TRITON_INTERPRET": "1"})
    return torch.load(folder / "found.pt")


def test_the_kernel_gives_the_softmax_of_fp64(tmp_path):
    cases = [hard_rows(dtype, v) for dtype in kernels.DTYPES for v in (1, 97, 4096, 12_289)]
    cases += [(logits.t().contiguous().t(), targets) for logits, targets in cases]  # columns lie together
    found = interpreted(cases, tmp_path)
    for (logits, targets), nll in zip(cases, found, strict=True):
        wanted = softmax_in_fp64(logits, targets)
        torch.testing.assert_close(nll, wanted, rtol=1e-9, atol=2e-8)
        assert float((nll - wanted).mean()) == pytest.approx(0, abs=1e-9 * max(1, float(wanted.mean())))


def test_the_kernel_hides_no_logit_that_is_not_finite(tmp_path):
    logits = torch.randn(5, 5000)
    logits[0, 4999], logits[1, 4], logits[2] = math.nan, math.inf, -math.inf
    logits[3:, 7] = -math.inf
    (found,) = interpreted([(logits, torch.tensor([0, 0, 0, 7, 8]))], tmp_path)
    assert found[:3].isnan().all() and found[3] == math.inf and found[4].isfinite()


@DTYPES
def test_the_kernel_compiles_for_an_h100(monkeypatch, tmp_path, dtype):
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    types = {"logits": f"*{name}", "targets": "*i64", "out": "*fp64", "stride": "i32"}
    constants = {"SIZE": 50_304, "BLOCK": 4096}
    source = compiler.ASTSource(kernels.kernel(), types | dict.fromkeys(constants, "constexpr"), constants)
    made = compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=kernels.OPTIONS)
    assert made.asm["cubin"] and "ex2.approx" not in made.asm["ptx"]


def test_without_a_kernel_torch_takes_the_softmax(monkeypatch):
    monkeypatch.setattr(kernels, "triton", object())
    kernels.usable.cache_clear()
    with pytest.warns(UserWarning, match="perplexity takes torch's operations"):
        assert not kernels.usable(torch.device("cpu"), torch.float32, 97)
    kernels.usable.cache_clear()
    assert not kernels.usable(torch.device("cpu"), torch.float64, 97)


def test_logits_are_never_held():
    """At a vocabulary of 64 k, four windows of 512 have 537 MB of logits in fp32."""
    model = tiny_gpt2(vocab_size=65536, n_positions=512, n_embd=16)
    heaviest = max_memory(lambda: perplexity(model, torch.arange(1200) * 54, context=512, batch_size=4))
    assert heaviest <= 2**26


def max_memory(function):
    """Return the bytes of the largest storage that any operation made."""

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and not func.is_view:
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes())
            return out

    with Largest() as mode:
        function()
    return mode.largest


def test_the_document_with_logits_that_are_not_finite_is_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[42].fill_(float("inf"))
    tokens = torch.arange(90) % 41
    tokens[50] = 42
    with pytest.raises(UserError, match=r"document 3 of 4 \(tokens 40 to 69\)"):
        perplexity(model, tokens, documents=[20, 40, 70, 90], per_document=True, prefix=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": [5]}, "documents must rise from at least 1 to 20"),
        ({"documents": [5, 5, 20]}, "Leave empty documents out"),
        ({"documents": [5, 6, 20], "per_document": True}, r"document 2 of 3 \(tokens 5 to 5\) has 1 token"),
        ({"context": -2}, "context -2 must lie between 1 and"),
        ({"context": 0}, "context 0 must lie between 1 and"),
        ({"stride": 0}, "stride 0 must lie between 1 and the context, 64"),
        ({"prefix": 97}, "token 97 is outside the model's vocabulary"),
    ],
)
def test_bad_documents_and_windows(options, message):
    with pytest.raises(UserError, match=message):
        perplexity(tiny_gpt2(), TOKENS[:20], **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "cpmant", "roberta", "roc_bert", "xlm", "xlnet"])
def test_half_precision_hides_no_foresight(name, dtype):
    """What a later token does to the logits is there no more than rounding."""
    with stand_ins():
        model = build(name).to(dtype).eval()
        with pytest.raises(UserError, match="is non-causal"):
            perplexity(model, torch.arange(50) % VOCABULARY, context=16)


def test_a_model_without_gradients_is_measured_in_half_precision():
    """Reformer's class refuses to be differentiated unless its config says how."""
    model = build("reformer").to(torch.bfloat16).eval()
    assert perplexity(model, torch.arange(40) % VOCABULARY, context=16).precision == "bf16"


def test_rounding_of_half_precision_is_no_foresight():
    """Experts get other batches where a later token goes elsewhere, and their products other roundings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_local_experts": 8}
    config = MixtralConfig(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, **sizes)
    for dtype in (torch.bfloat16, torch.float32):
        assert perplexity(MixtralForCausalLM(config).to(dtype), TOKENS[:100], context=32).tokens == 99


def test_a_model_is_looked_at_whatever_is_read_first():
    """One token shows no foresight, and what was found of a model is kept."""
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=97)
    bert = BertLMHeadModel(config)
    for tokens in ([5], TOKENS[:50]):
        with pytest.raises(UserError, match="is non-causal"):
            perplexity(bert, tokens, prefix=1)


@pytest.mark.parametrize("longest", [1, 8])
def test_a_model_that_reads_less_than_it_is_looked_at_with(longest):
    model = tiny_gpt2(n_positions=longest)
    assert perplexity(model, TOKENS[:50]).nll == pytest.approx(by_hand(model, TOKENS[:50], longest, longest), rel=1e-7)


@pytest.mark.parametrize(("tokens", "prefix"), [([1, 2, 3], -1), ([1, 2, 3], 97), ([1, -2, 3], 0)])
def test_ids_outside_the_vocabulary_are_refused(tokens, prefix):
    with pytest.raises(UserError, match=r"token (-1|97|-2) is outside the model's vocabulary of 97"):
        perplexity(tiny_gpt2(), tokens, prefix=prefix)


def test_ids_that_a_model_reads_and_never_predicts_are_refused():
    """As in Apertus 1.5 and Inkling, whose heads have fewer outputs than the embedding has rows."""
    model = tiny_llama()
    model.lm_head = torch.nn.Linear(32, 50, bias=False)
    assert perplexity(model, [5, 49, 7], context=4, prefix=96).tokens == 3
    with pytest.raises(UserError, match="token 50 is one that the model reads and never predicts: its head has 50 out"):
        perplexity(model, [5, 50, 7], context=4)


def test_a_wrapped_model_is_measured_as_the_one_inside():
    plain = perplexity(tiny_llama(), TOKENS[:100], context=32).nll
    for wrapped in (torch.compile(tiny_llama(), backend="eager", fullgraph=True), torch.nn.DataParallel(tiny_llama())):
        assert perplexity(wrapped, TOKENS[:100], context=32).nll == plain


def test_weights_that_accelerate_keeps_elsewhere_and_weights_that_are_nowhere():
    from accelerate import cpu_offload

    plain = perplexity(tiny_llama(), TOKENS[:100], context=32).nll
    assert perplexity(cpu_offload(tiny_llama(), execution_device="cpu"), TOKENS[:100], context=32).nll == plain
    with pytest.raises(UserError, match="LlamaForCausalLM is on device 'meta', without weights: load them"):
        perplexity(tiny_llama().to("meta"), TOKENS[:100])


@pytest.mark.parametrize("measure", [perplexity, diagnose])
def test_what_is_no_language_model_is_refused_by_name(measure):
    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    images = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **settings))
    for model in (images, *([torch.nn.Linear(2, 2)] if measure is perplexity else [])):
        with pytest.raises(
            UserError, match=f"{type(model).__name__} is no language model .*; diagnose_module measures"
        ):
            measure(model, np.arange(20))
