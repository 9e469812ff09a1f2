"""Texts that the models of a run wrote after each prompt, as the page shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fire_llm.core.terminal import shown
from fire_llm.reporting.comparison import Comparison
from fire_llm.reporting.schema import Run, Sample

_EMPTY = re.compile(r"\n{4,}")
"""Empty lines that would fill the page."""


@dataclass(frozen=True)
class Written:
    """One text, its writer and its time."""

    by: str
    """Phase, arm and seed, as far as they tell writers apart."""
    when: str
    text: str
    first: bool
    """Whether it is the first text of its writer."""


@dataclass(frozen=True)
class Prompted:
    """What was written after one prompt."""

    prompt: str
    """Empty where a model wrote by itself."""
    few: list[Written]
    """Of the first seed of each arm: before the reset, after it, and at the end."""
    every: list[Written]
    """All texts, those of earlier phases too; empty if `few` has them all."""


def samples(c: Comparison) -> list[Prompted]:
    """Return what was written, by prompt; nothing if the run wrote no text."""
    arms = [(arm, run) for arm in c.arms for run in c.runs(arm)]
    others = [(" / ".join(filter(None, (run.phase, run.arm))), run) for run in c.results.phases]
    every = [*others, *arms]
    seeds = [run.seed for _, run in arms or others]
    chosen = [(name, run) for name, run in arms or others if run.seed == seeds[0]]
    prompts = dict.fromkeys(sample.prompt for _, run in every for sample in run.samples)
    several = len({run.seed for _, run in every}) > 1
    prompted = []
    for prompt in prompts:
        few = [text for name, run in chosen for text in _written(name, run, prompt, brief=True)]
        named = [(f"{name}, seed {run.seed}" if several else name, run) for name, run in every]
        whole = [text for name, run in named for text in _written(name, run, prompt)]
        prompted.append(Prompted(shown(prompt), few, whole if len(whole) > len(few) else []))
    return prompted


def _written(name: str, run: Run, prompt: str, brief: bool = False) -> list[Written]:
    own = [sample for sample in run.samples if sample.prompt == prompt]
    last = max((sample.step for sample in own), default=0)
    kept = [sample for sample in own if not brief or sample.step in (0, last)]
    texts = [_EMPTY.sub(lambda empty: f"\n[{len(empty[0])} line breaks]\n", shown(sample.text)) for sample in kept]
    return [
        Written(name, _when(sample, run, own), text, i == 0)
        for i, (sample, text) in enumerate(zip(kept, texts, strict=True))
    ]


def _when(sample: Sample, run: Run, own: list[Sample]) -> str:
    if sample.step:
        return f"step {sample.step:,}" + (", the last" if sample.step == run.steps else "")
    if sample.before_reset:
        return "before the reset"
    return "after the reset" if any(other.before_reset for other in own) else "step 0"
