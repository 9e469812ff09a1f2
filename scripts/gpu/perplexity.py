"""Measure perplexity with this package and with a rolling loop, in the same precisions."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import rolling_loop as rolling
from gpu.evidence import tokens_of
from gpu.training import race_of

from fire_llm.models import config_for, fresh_model, load_tokenizer

COMPILING = 25
"""Seconds that compiling may take; a compilation that is cut off may harm later stages."""


def evaluation(stage: Any) -> None:
    """Measure web text with this package and as lm-eval does, in turns: batches of 16, compiled, batches of 1.

    Batches of 1 are lm-eval's default; they are not measured in fp32, which takes long.
    """
    args = stage.args
    tiny = args.size == "tiny"
    with tempfile.TemporaryDirectory() as folder:
        _, held_out = tokens_of(args, Path(folder))
        tokens = held_out.tokens[: 100 if tiny else None].astype("int64")
    prefix = load_tokenizer(args.data / "gpt2-tokenizer").eos_token_id
    race = race_of(args)
    vocabulary = max(race.vocab, int(tokens.max()) + 1, prefix + 1)
    config = config_for(race.preset, context=race.context, overrides={"vocab_size": vocabulary})
    model = fresh_model(config, args.seed).to(args.device).eval()
    stage.note(model=race.preset, tokens=len(tokens), context=race.context, batch_size=16)
    rows: dict[str, Any] = {}
    ratios: dict[str, float] = {}

    def measured(precision: str, sizes: tuple[int, ...], compiled: bool, repeat: int) -> None:
        found = rolling.measure(
            model, tokens, context=race.context, prefix=prefix, precisions=[precision], rolling_batch_sizes=sizes,
            compiled=compiled, repeat=repeat,
        )  # fmt: skip
        rates = {row["contestant"]: row["tokens_per_second"] for row in found}
        for row in found:
            name = f"{row['contestant']}, {precision}"
            if name not in rows:
                rows[name] = row
                stage.say(f"{name:40} {row['tokens_per_second']:12,.0f} tokens/s   nll {row['nll']:.7f}")
            if row["contestant"] != "ours":
                kind = "ours, compiled / ours" if "compiled" in name else f"ours / {row['contestant']}"
                ratio = row["tokens_per_second"] / rates["ours"]
                ratios[f"{kind}, {precision}"] = ratio if "compiled" in name else 1 / ratio
                stage.say(f"{kind}, {precision}: {ratios[f'{kind}, {precision}']:.2f}")
        stage.note(contestants=rows, ratios=ratios)

    for sizes, compiled, repeat in (((16,), False, 3), ((), True, 2), ((1,), False, 1)):
        for precision in rolling.PRECISIONS:
            if precision == "fp32" and sizes == (1,):
                continue
            if compiled and (args.device == "cpu" or stage.left() < COMPILING):
                continue
            what = f"{precision}, {'compiled' if compiled else f'batch {sizes[0]}'}"
            repeat = 1 if tiny else repeat
            stage.attempt(what, lambda p=precision, s=sizes, c=compiled, r=repeat: measured(p, s, c, r))
