"""Perplexity beside lm_eval's and the loop of transformers' documentation; downstream tasks handed to lm_eval."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from io import StringIO
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
from rich.console import Console
from support.corpora import TEXTS, corpus_of, prose
from support.models import tiny_gpt2, tiny_llama
from transformers import RobertaConfig, RobertaForCausalLM

from fire_llm import UserError, perplexity
from fire_llm.data import train_tokenizer
from fire_llm.evaluation.checkpoints import score_checkpoints
from fire_llm.evaluation.table import print_scores
from fire_llm.evaluation.tasks import run_tasks

RELATIVE = 1e-6


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([corpus_of(TEXTS)], 400, progress=False)


def tokens_of(tokenizer, texts) -> tuple[np.ndarray, np.ndarray]:
    """Return the texts' tokens, one after the other, and where each text ends."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return np.concatenate([np.asarray(each, dtype=np.int64) for each in ids]), np.cumsum([len(each) for each in ids])


def ours(model, tokenizer, texts, originals=None, **options):
    """Measure each text by itself, after the token that lm_eval reads before a text."""
    tokens, ends = tokens_of(tokenizer, texts)
    counted = originals or texts
    return perplexity(
        model,
        tokens,
        documents=ends,
        per_document=True,
        prefix=tokenizer.bos_token_id,
        n_bytes=[len(text.encode()) for text in counted],
        n_words=[len(re.split(r"\s+", text)) for text in counted],
        **options,
    )


def rolling(lm, texts) -> list[float]:
    requests = [Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=0) for text in texts]
    return lm.loglikelihood_rolling(requests, disable_tqdm=True)


@pytest.fixture(scope="module")
def ragged(tokenizer) -> list[str]:
    """Write documents of 1, 31, 32, 33, 63, 64, 65, 96 and 333 tokens, and short ones between."""
    words = tokenizer(prose(2000, seed=5))["input_ids"]
    texts, at = [], 0
    for n in (1, 31, 32, 33, 5, 63, 64, 65, 2, 96, 333, 17):
        texts.append(tokenizer.decode(words[at : at + n]))
        at += n
    return texts


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("context", [64, 32])
def test_each_document_scores_as_in_lm_evals_rolling_windows(build, context, tokenizer, ragged):
    model = build(vocab_size=400).eval()
    lengths = [len(tokenizer(text)["input_ids"]) for text in ragged]
    assert {n < context for n in lengths} == {True, False} and context in lengths and max(lengths) > 5 * context
    theirs = rolling(HFLM(pretrained=model, tokenizer=tokenizer, max_length=context, batch_size=3), ragged)
    measured = ours(model, tokenizer, ragged, context=context)
    assert measured.scores.nll == pytest.approx([-x for x in theirs], rel=RELATIVE)
    assert measured.tokens == sum(lengths)


def write_task(folder: Path, name: str, docs: list[dict], lines: str) -> Path:
    """Write a task of one's own, its YAML and its documents; nothing of it is cached outside the folder."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    kwargs = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
    path = folder / f"{name}.yaml"
    path.write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(kwargs)}\ntest_split: test\n{lines}"
    )
    return path


WIKITEXT = f"""
include: {Path(lm_eval.__file__).parent}/tasks/wikitext/wikitext.yaml
dataset_name: null
training_split: null
validation_split: null
"""
"""lm_eval's own task, its documents from a file: the detokenised page is scored, the original's words are counted."""


def compare_wikitext(model, tokenizer, pages: list[str], folder: Path, batch_size: int) -> float:
    """Return the largest relative difference between lm_eval's task `wikitext` and ours on the same pages."""
    task = write_task(folder, "local_wikitext", [{"page": page} for page in pages], WIKITEXT)
    answer = run_tasks((model, tokenizer), [task], batch_size=batch_size)
    theirs = answer["results"]["local_wikitext"]
    assert answer["n-samples"]["local_wikitext"] == {"original": len(pages), "effective": len(pages)}
    texts = [wikitext_detokenizer({"page": page}) for page in pages]
    measured = ours(model, tokenizer, texts, pages, context=answer["settings"]["context"])
    assert texts != pages
    return max(
        abs(getattr(measured, name) / theirs[f"{name},none"] - 1)
        for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
    )


def test_the_three_perplexities_are_those_of_lm_evals_task_wikitext(tokenizer, tmp_path):
    pages = [f" = Page {n} = \n \n" + prose(40 + 50 * n, seed=n, end=" @-@ ") + " . \n 's , end \n" for n in range(6)]
    assert compare_wikitext(tiny_llama(vocab_size=400), tokenizer, pages, tmp_path, batch_size=4) < RELATIVE


def by_loop(model, ids, longest: int, stride: int) -> tuple[float, int]:
    """Return Σ nll and the tokens scored, in the way of "Perplexity of fixed-length models" (transformers' docs).

    Labels of what an earlier window scored are -100. The model shifts labels by one, so that no window predicts its
    first token: one of L tokens predicts L − 1, as ours does with a context of L − 1. That first token was scored
    before, as long as windows overlap; with stride = L they do not, and a token a window is never scored. The
    documentation weighs each window's mean by one less than its labels, even where the shift took none; here, the mean
    is weighed by the tokens that it is of.
    """
    total, counted, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + longest, len(ids))
        window = ids[None, begin:end]
        labels = window.clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(input_ids=window, labels=labels).loss
        scored = int((labels[:, 1:] != -100).sum())
        total += float(loss) * scored
        counted += scored
        before = end
        if end == len(ids):
            return total, counted
    raise AssertionError("unreachable")


@pytest.mark.parametrize(("stride", "n"), [(1, 1053), (256, 3000), (512, 3000), (1024, 3000)])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_perplexity_equals_the_loop_of_the_documentation(build, stride, n):
    size = {"n_positions": 1025} if build is tiny_gpt2 else {"max_position_embeddings": 1025}
    model = build(**size).eval()
    ids = torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(stride))
    total, counted = by_loop(model, ids, 1025, stride)
    measured = perplexity(model, ids, context=1024, stride=stride)
    assert measured.tokens == counted == n - 1
    assert measured.nll == pytest.approx(total / counted, rel=RELATIVE)


def test_the_loop_of_the_documentation_skips_tokens_where_its_windows_do_not_overlap():
    ids = torch.randint(0, 97, (640,), generator=torch.Generator().manual_seed(0))
    assert by_loop(tiny_gpt2().eval(), ids, 64, 64)[1] == 639 - 9  # ten windows; the first token is nobody's
    assert perplexity(tiny_gpt2(), ids, context=64, stride=64).tokens == 639


def wikipedia_pages(text: str) -> list[str]:
    """Cut raw WikiText into articles, at their headings " = Title = "."""
    return [page for page in re.split(r"(?m)^(?= = [^=].*[^=] = $)", text) if page.strip()]


def trained(tokenizer, text: str, *, steps: int) -> torch.nn.Module:
    """Train a small Llama for some seconds, so that its logits are those of a language model."""
    model = tiny_llama(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, max_position_embeddings=128
    ).train()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(0, len(ids) - 128, (16,), generator=draw)
        batch = torch.stack([ids[a : a + 128] for a in rows.tolist()])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.shared_data
def test_wikitext_2_raw_scores_as_in_lm_eval(shared_data, tmp_path):
    folder = shared_data / "wikitext2-raw"
    train = (folder / "train_head_1MB.txt").read_text()
    pages = wikipedia_pages((folder / "test.txt").read_text())
    assert len(pages) == 62  # as many as lm_eval's task has documents
    tokenizer = train_tokenizer([corpus_of(wikipedia_pages(train))], 2048, progress=False)
    model = trained(tokenizer, train, steps=200)
    assert compare_wikitext(model, tokenizer, pages, tmp_path, batch_size=32) < RELATIVE


QUESTIONS = [
    {"question": prose(6, seed=n), "choices": [prose(4, seed=90 + n), prose(4, seed=60 + n)]} for n in range(9)
]
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3
"""


def likelier(model, tokenizer, doc: dict) -> bool:
    """Tell whether the first choice has the higher likelihood, computed by hand."""
    totals = []
    for choice in doc["choices"]:
        # lm_eval puts a space before the answer and moves the question's last one to it.
        whole = tokenizer(f"{doc['question'].rstrip()}{doc['question'][len(doc['question'].rstrip()) :]} {choice}")
        start = len(tokenizer(doc["question"].rstrip())["input_ids"])
        ids = torch.tensor(whole["input_ids"])
        with torch.no_grad():
            log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        totals.append(sum(float(log_p[k - 1, ids[k]]) for k in range(start, len(ids))))
    return totals[0] > totals[1]


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_gpt2(vocab_size=400, n_positions=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_task_of_ones_own_is_run_from_its_file(checkpoint, tokenizer, tmp_path):
    task = write_task(tmp_path, "own_choice", QUESTIONS, CHOICE)
    answer = run_tasks(checkpoint, [task], num_fewshot=0, batch_size=2)
    right = [likelier(tiny_gpt2(vocab_size=400, n_positions=256).eval(), tokenizer, doc) for doc in QUESTIONS]
    assert 0 < sum(right) < len(right)
    assert answer["results"]["own_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert answer["versions"]["own_choice"] == 3 and answer["n-shot"]["own_choice"] == 0
    assert answer["settings"]["context"] == 256 and answer["settings"]["prefix"] == tokenizer.bos_token_id
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer


def test_a_folder_of_tasks_is_run_whole_on_the_model_given(checkpoint, tokenizer, tmp_path):
    write_task(tmp_path, "one", QUESTIONS, CHOICE)
    write_task(tmp_path, "two", QUESTIONS, CHOICE)
    model = tiny_gpt2(vocab_size=400, n_positions=256).train()
    answer = run_tasks((model, tokenizer), [f"{tmp_path}/"], limit=4)
    assert set(answer["results"]) == {"one", "two"}
    assert answer["n-samples"]["one"] == {"original": 9, "effective": 4}
    assert model.training


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
@pytest.mark.parametrize("context", [32, None])
def test_the_context_asked_for_is_the_one_that_is_read(kind, context, tokenizer, tmp_path):
    """RoBERTa's 64 positions hold 62 tokens: left to itself, lm_eval reads 64 and fails."""
    if kind == "gpt2":
        model, longest = tiny_gpt2(vocab_size=400, n_positions=64), 64
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = RobertaConfig(vocab_size=400, max_position_embeddings=64, pad_token_id=1, is_decoder=True, **sizes)
        model, longest = RobertaForCausalLM(config), 62
    pages = [prose(200), prose(30)]
    task = write_task(tmp_path, "windows", [{"page": page} for page in pages], WIKITEXT)
    answer = run_tasks((model, tokenizer), [task], context=context)
    assert answer["settings"]["context"] == (context or longest)
    texts = [wikitext_detokenizer({"page": page}) for page in pages]
    measured = ours(model.eval(), tokenizer, texts, pages, context=context or longest)
    assert answer["results"]["windows"]["bits_per_byte,none"] == pytest.approx(measured.bits_per_byte, rel=1e-5)


def test_answers_that_are_longer_than_the_context_are_refused(checkpoint, tmp_path):
    lines = "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: question\n"
    task = write_task(tmp_path, "answers", QUESTIONS, f"{lines}metric_list: [{{metric: exact_match}}]\n")
    with pytest.raises(UserError, match=r"lm_eval refuses: .*max tokens to generate \(256\).*\(32\)"):
        run_tasks(checkpoint, [task], context=32, limit=1)
    with pytest.raises(UserError, match="context 257 must lie between 1 and 256, the most tokens"):
        run_tasks(checkpoint, [task], context=257)


def test_a_group_in_the_folder_has_a_score_of_its_own(checkpoint, tmp_path):
    for name, questions in (("one", QUESTIONS), ("two", QUESTIONS[:3]), ("alone", QUESTIONS[3:5])):
        write_task(tmp_path, name, questions, CHOICE)
    (tmp_path / "group.yaml").write_text("group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc}]\n")
    answer = run_tasks(checkpoint, [tmp_path])
    scores = {name: answer["results"][name]["acc,none"] for name in ("one", "two", "alone")}
    assert answer["groups"]["both"]["acc,none"] == pytest.approx((9 * scores["one"] + 3 * scores["two"]) / 12)
    assert answer["group_subtasks"]["both"] == ["one", "two"]


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "no task is named"),
        (["wikitexd"], {}, r"lm_eval has no 'wikitexd'. Did you mean 'wikitext'\? `lm_eval ls tasks`"),
        (["./nowhere.yaml"], {}, "no file or folder 'nowhere.yaml'"),
        (["bad.yaml"], {}, "lm_eval cannot load '.*bad.yaml': ValueError, Unknown config shape"),
        (["gone.yaml"], {}, "lm_eval cannot load '.*gone.yaml': FileNotFoundError"),
        (["empty/"], {}, "no YAML file in 'empty/' defines a task"),
        (["x"], {"limit": 0}, "limit 0 is neither"),
        (["x"], {"limit": 1.5}, "limit 1.5 is neither"),
        (["x"], {"num_fewshot": -1}, "num_fewshot -1 is below 0"),
    ],
)
def test_bad_input(checkpoint, tmp_path, monkeypatch, tasks, options, message):
    monkeypatch.chdir(tmp_path)
    # It looks for its own tasks beside this file: those of one folder, not all 15,000.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(Path(lm_eval.__file__).parent / "tasks/wikitext/x.py"))
    (tmp_path / "bad.yaml").write_text("metric: acc\n")
    (tmp_path / "empty").mkdir()
    write_task(tmp_path, "gone", QUESTIONS, CHOICE)
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(UserError, match=message):
        run_tasks(checkpoint, tasks, **options)


def test_without_lm_eval_the_extra_is_named(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'fire-llm\[tasks\]'"):
        run_tasks(checkpoint, ["wikitext"])


def test_a_model_that_gives_nan_gives_null(tokenizer, tmp_path):
    task = write_task(tmp_path, "nan_wikitext", [{"page": prose(30)}], WIKITEXT)
    model = tiny_gpt2(vocab_size=400)
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    answer = run_tasks((model, tokenizer), [task])
    assert answer["results"]["nan_wikitext"]["bits_per_byte,none"] is None


@pytest.mark.parametrize("prefix", ["auto", "bos", "eos"])
def test_one_command_reads_one_first_token(prefix, tokenizer, tmp_path):
    """A tokenizer whose beginning of text is another token than its end: texts and tasks read the same one."""
    own = copy.deepcopy(tokenizer)
    own.bos_token = own.convert_ids_to_tokens(7)
    tiny_gpt2(vocab_size=400).save_pretrained(tmp_path / "model")
    own.save_pretrained(tmp_path / "model")
    text = " ".join(prose(80).split())
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    lines = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n- metric: "
    task = write_task(tmp_path / "task", "whole", [{"text": text}], f"{lines}bits_per_byte\n")
    names, data = [str(tmp_path / "model")], [str(tmp_path / "text.jsonl")]
    found = score_checkpoints(names, data, per_document=True, prefix=prefix, tasks=[str(task)], progress=False)
    row, answer = found.rows[0], found.tasks[names[0]]
    assert (row.prefix == 7) == (prefix != "eos")
    assert {key: answer["settings"][key] for key in ("prefix", "prefix_text")} == {
        "prefix": row.prefix, "prefix_text": row.prefix_text,
    }  # fmt: skip
    assert answer["results"]["whole"]["bits_per_byte,none"] == pytest.approx(row.bits_per_byte, rel=RELATIVE)
    out = StringIO()
    print_scores(found.rows, tasks=found.tasks, console=Console(file=out, width=200))
    assert out.getvalue().count(f"after {row.prefix_text}") == 2


def test_a_first_token_that_tasks_cannot_do_without_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(UserError, match="--prefix none: lm_eval reads a token before every text"):
        score_checkpoints([str(tmp_path / "nowhere")], [], prefix="none", tasks=["x.yaml"])


def test_a_checkpoint_in_bf16_is_asked_in_fp32_and_the_table_says_so(tokenizer, tmp_path):
    folder, model = tmp_path / "half", tiny_gpt2(vocab_size=400).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pages = [prose(200), prose(30)]
    task = write_task(tmp_path, "windows", [{"page": page} for page in pages], WIKITEXT)
    texts = [wikitext_detokenizer({"page": page}) for page in pages]
    wanted = ours(tiny_gpt2(vocab_size=400).to(torch.bfloat16).float(), tokenizer, texts, pages).bits_per_byte
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = run_tasks(folder, [task])
    assert full["results"]["windows"]["bits_per_byte,none"] == pytest.approx(wanted, rel=1e-6)
    half = run_tasks((model, tokenizer), [task])
    assert half["results"]["windows"]["bits_per_byte,none"] != pytest.approx(wanted, rel=1e-6)
    out = StringIO()
    print_scores([], tasks={"runs/a": full, "runs/b": half}, console=Console(file=out, width=200))
    read = "at most 64 tokens at once, texts after <|endoftext|>"
    assert f"a: in fp32, {read}; b: in bf16, {read}\n" in out.getvalue()
