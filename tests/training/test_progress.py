"""What a person sees while a phase trains."""

from __future__ import annotations

import math

from fire_llm.training.progress import perplexities


def test_perplexities_of_any_size_take_few_characters():
    values = {"a": 12.345, "b": 999_999.0, "c": 1.234e36, "d": math.inf, "e": math.nan}
    told = perplexities({f"eval_{name}_perplexity": value for name, value in values.items()} | {"loss": 1.0})
    assert told == {"ppl a": "12.3", "ppl b": "999999.0", "ppl c": "1.2e+36", "ppl d": "inf", "ppl e": "nan"}
