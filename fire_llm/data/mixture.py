"""Mix token files by weight: sample i is a pure function of (seed, phase, i).

No state is stored and no sample depends on earlier ones. So resuming is arithmetic, any rank can read any sample, and
the order does not depend on the number of workers or ranks, nor on a library's random generator.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import itertools
import math
import operator
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.core.hashing import digest
from fire_llm.data.documents import Boundaries
from fire_llm.data.tokens import TokenFile

Sampling = Literal["without-replacement", "with-replacement"]
SAMPLINGS: tuple[str, ...] = get_args(Sampling)

_MASK = (1 << 64) - 1
_ROUNDS = 8


class Mixture(Dataset[dict[str, Tensor]]):
    """Blocks of tokens of several corpora, in proportion to weights over tokens. C = context.

    Block b of a corpus is its tokens [b·C, b·C + C]: C inputs and, shifted by one, C labels.

    Without replacement, the first i samples contain round(i·w) of a corpus with share w. Every block of a corpus comes
    once in each of the corpus's epochs, in another order each time. With replacement, corpus and block of every sample
    are independent draws, as in the authors' code.
    """

    every_label_counts = True
    """No label is -100, so that the labels of a batch can be counted without reading them."""

    def __init__(
        self,
        sources: Mapping[str, TokenFile],
        weights: Mapping[str, float],
        *,
        context: int,
        seed: int,
        phase: str,
        sampling: str = "without-replacement",
        document_positions: bool = False,
    ) -> None:
        """Prepare a mixture; no token is read.

        Args:
            sources: token files by corpus.
            weights: shares of the tokens by corpus, of any sum; a corpus with weight 0 is never drawn.
            context: tokens of a sample.
            seed: seed of the order.
            phase: name of the phase; the order of another phase is another one.
            sampling: "without-replacement" or "with-replacement".
            document_positions: whether samples also have "position_ids", which start again at every document. Models
                of transformers then attend only within documents.

        Raises:
            UserError: for weights that are no shares or not of these corpora, an unknown sampling, a context below 1,
                or a corpus shorter than one block.
        """
        if sampling not in SAMPLINGS:
            raise UserError(
                f"unknown sampling '{sampling}'; allowed: {', '.join(SAMPLINGS)}.{did_you_mean(sampling, SAMPLINGS)}"
            )
        if context < 1:
            raise UserError(f"context must be at least 1 token, not {context}.")
        for name in weights:
            if name not in sources:
                raise UserError(
                    f"the mixture weighs '{name}', which is none of its corpora: {', '.join(sources)}."
                    f"{did_you_mean(name, sources)}"
                )
        for name in sources:
            if name not in weights:
                raise UserError(f"the mixture has no weight for its corpus '{name}'. Give one; 0 leaves it out.")
            if not math.isfinite(weights[name]) or weights[name] < 0:
                raise UserError(f"the weight of '{name}' is {weights[name]}; it must be a finite number of at least 0.")
        if not any(weights[name] > 0 for name in sources):
            raise UserError("all weights of the mixture are 0. Give at least one corpus a weight above 0.")
        # A NumPy integer would print, and so hash, in another way.
        self.context, self.seed, self.phase, self.sampling = int(context), int(seed), phase, sampling
        self.sources = {name: sources[name] for name in sorted(sources) if weights[name] > 0}
        for name, source in self.sources.items():
            if source.n_tokens < context + 1:
                raise UserError(
                    f"corpus '{name}' has {source.n_tokens} tokens, fewer than one block of context {context} needs "
                    f"({context + 1}). Give it more text, or shorten the context."
                )
            if document_positions and source.open_end and source.n_documents == 1:
                raise UserError(
                    f"corpus '{name}' holds no end-of-text token, so that nobody knows where its documents begin: "
                    "leave document_mask out, or write its tokens with one after each document"
                )
        # The weights become exact integers: by way of str(), 0.1 is one tenth, and 9.0 : 0.1 is 90 : 1.
        exact = [Fraction(str(float(weights[name]))) for name in self.sources]
        scale = math.lcm(*(share.denominator for share in exact))
        self.weights = {name: int(share * scale) for name, share in zip(self.sources, exact, strict=True)}
        self._tree = _tree(self.weights)
        self._names, self._limits = [*self.weights], [*itertools.accumulate(self.weights.values())]
        self.boundaries = {name: Boundaries(s) for name, s in self.sources.items()} if document_positions else None

    @property
    def epoch_tokens(self) -> int:
        """Return the tokens of one epoch: the sum over all corpora with a weight."""
        return sum(source.n_tokens for source in self.sources.values())

    def blocks(self, corpus: str) -> int:
        """Return how many blocks a corpus has; tokens after the last whole block are not used."""
        return (self.sources[corpus].n_tokens - 1) // self.context

    def locate(self, i: int) -> tuple[str, int, int]:
        """Return where sample i comes from: (corpus, the corpus's epoch from 0, block).

        Args:
            i: index of the sample from 0; there is no last sample.
        """
        i = operator.index(i)  # a NumPy integer would overflow below
        if i < 0:
            raise IndexError(f"a mixture has samples from 0 on; {i} was asked for")
        if self.sampling == "with-replacement":
            draw = _hash(self.seed, self.phase, "draw", i)
            point = (draw >> 64) * self._limits[-1] >> 64
            corpus = self._names[bisect.bisect_right(self._limits, point)]
            return corpus, 0, (draw & _MASK) * self.blocks(corpus) >> 64
        corpus, ordinal = _quota(self._tree, i)
        epoch, position = divmod(ordinal, self.blocks(corpus))
        return corpus, epoch, permute(position, self.blocks(corpus), (self.seed, self.phase, corpus, epoch))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """Return {"input_ids": (C,), "labels": (C,)}, int64; the labels are already shifted by one.

        With `document_positions`, "position_ids" (C,) too.
        """
        corpus, _, block = self.locate(i)
        start = block * self.context
        tokens = torch.from_numpy(self.sources[corpus].tokens[start : start + self.context + 1].astype("int64"))
        # The labels are a copy, so that they can be masked in place without a change to the inputs.
        sample = {"input_ids": tokens[:-1], "labels": tokens[1:].clone()}
        if self.boundaries is not None:
            sample["position_ids"] = torch.from_numpy(self.boundaries[corpus].positions(start, self.context))
        return sample


class _Node:
    """A split of samples between two sides by weight; a side is another node or the name of a corpus."""

    def __init__(self, left: _Node | str, left_weight: int, right: _Node | str, right_weight: int) -> None:
        self.left, self.right = left, right
        self.left_weight, self.weight = left_weight, left_weight + right_weight

    def left_count(self, i: int) -> int:
        """Return how many of the first i samples go left: i · share, rounded, in integers."""
        return (2 * i * self.left_weight + self.weight) // (2 * self.weight)


def _tree(weights: Mapping[str, int]) -> _Node | str:
    """Return a Huffman tree of the corpora.

    Every split rounds, and rounding errors add up along a path. A Huffman tree keeps heavy corpora near the root, and
    light ones inherit only a part of the error. So a count is off by less than 1 for up to three corpora, and by less
    than 2 for any number (½·(1 + Σ w/w_ancestor), whose terms fall at least as fast as reciprocal Fibonacci numbers).
    """
    tie = itertools.count()  # among equal weights the order of names decides
    heap: list[tuple[int, int, _Node | str]] = [(weight, next(tie), name) for name, weight in sorted(weights.items())]
    heapq.heapify(heap)
    while len(heap) > 1:
        light, _, left = heapq.heappop(heap)
        heavy, _, right = heapq.heappop(heap)
        heapq.heappush(heap, (light + heavy, next(tie), _Node(left, light, right, heavy)))
    return heap[0][2]


def _quota(node: _Node | str, i: int) -> tuple[str, int]:
    """Return (corpus, ordinal): sample i is the ordinal-th, from 0, of that corpus."""
    while not isinstance(node, str):
        left = node.left_count(i)
        if node.left_count(i + 1) > left:
            node, i = node.left, left
        else:
            node, i = node.right, i - left
    return node, i


def _hash(*key: object) -> int:
    """Return a 128-bit hash of a key that is the same in every process, on every machine and in every version."""
    return int(digest(repr(key), 16), 16)


def permute(position: int, n: int, key: tuple[object, ...]) -> int:
    """Return where a keyed pseudo-random permutation of range(n) sends `position`; constant time and memory.

    A Feistel network permutes a range whose size is the next power of four. A result outside range(n) is permuted
    again until it is inside (cycle walking), which takes fewer than four turns on average.

    Args:
        position: 0 ≤ position < n.
        n: size of the range.
        key: numbers and strings that choose the permutation.
    """
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    keys = _round_keys(key)
    while True:
        left, right = position >> half, position & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        position = left << half | right
        if position < n:
            return position


@functools.lru_cache(maxsize=256)
def _round_keys(key: tuple[object, ...]) -> tuple[int, ...]:
    return tuple(_hash("round", number, *key) & _MASK for number in range(_ROUNDS))


def _mix(x: int) -> int:
    """Return the SplitMix64 finaliser of x (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
