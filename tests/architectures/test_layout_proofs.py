"""What a fused weight holds is proved by what transformers' own forward pass does with it, never by the layout table.

Each block is taken out of a small model together with the arguments of one call, and called again after its matrices
were changed: without v attention says nothing, −up turns an MLP's sign, a query matters to its own token only, …
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.small_models import CANNOT, SMALL, VOCABULARY, build, modeling_classes
from support.small_others import OTHERS, build_other, inputs_of
from torch import Tensor, nn
from transformers import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fire_llm.architectures import lookup
from fire_llm.architectures.families import TABLE
from fire_llm.architectures.matrices import ParameterSlice, logical_matrices, register_layout
from fire_llm.core.compat import left_out
from fire_llm.core.errors import UserError

transformers.logging.set_verbosity_error()
TOKENS, CHANGED, LATER = 9, 1, 5
"""Tokens of the input, the one that is changed, and the first that no short convolution carries the change to."""

Key = tuple[str, str]


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Forget what a test registers."""
    before = dict(lookup.REGISTERED)
    yield
    lookup.REGISTERED.clear()
    lookup.REGISTERED.update(before)


# ---------------------------------------------------------------------------------------------------------------------
# A block, its matrices, and one call of it


# What a plain child is called that plays one of the parts.
PLAIN = {
    "q": "q q_proj query_proj q_b_proj q_attn query q_lin Wq project_q",
    "k": "k k_proj key_proj key k_lin Wk project_k",
    "v": "v v_proj value_proj value v_lin Wv project_v",
    "gate": "gate_proj wi_0",
    "up": "up_proj wi_1",
    "down": "down_proj output_linear",
    "r": "r",
    "o": "o",
}
LABELS = {child: part for part, children in PLAIN.items() for child in children.split()}


# Blocks that add their input to their output, and under which name they get it.
RESIDUAL = {"AlbertAttention": "hidden_states", "BltCrossAttention": "hidden_states", "XLNetRelativeAttention": "h"}

# Blocks that scale what comes out of the gate or the heads to a length, so that it never is nought.
LAST_NORM = {"AlbertAttention": "LayerNorm", "DoryAttention": "attn_sub_norm", "XLNetRelativeAttention": "layer_norm"}


class Case:
    """Hold one block of a model, its logical matrices by label, and how to call it again.

    Args:
        name: Full name of the block in the model.
        block: The module.
        matrices: Its logical matrices.
    """

    def __init__(self, name: str, block: nn.Module, matrices: list[ParameterSlice]) -> None:
        self.name, self.block, self.kind = name, block, type(block).__name__
        self.matrices = matrices
        self.call: tuple[inspect.BoundArguments, nn.Module] | None = None
        self.inputs: dict[str, Tensor] = {}
        self.parts: dict[str, list[ParameterSlice]] = {}
        for m in matrices:
            self.parts.setdefault(m.part or LABELS.get(self.child(m), ""), []).append(m)

    def child(self, matrix: ParameterSlice) -> str:
        """Name the child as the layout table does, for children without indices."""
        return matrix.parameter.removeprefix(f"{self.name}.").removesuffix(".weight")

    @property
    def fused(self) -> set[Key]:
        """List the children that hold several parts, or a stack."""
        return {(self.kind, self.child(m)) for m in self.matrices if m.spec.index is not None or m.part}

    def has(self, *labels: str) -> bool:
        """Tell whether every label is there."""
        return all(label in self.parts for label in labels)

    def run(self) -> Tensor:
        """Call the block again: (tokens, features)."""
        bound, module = self.call
        out = module(*bound.args, **bound.kwargs)
        out = out if isinstance(out, Tensor) else out[0]
        if residual := RESIDUAL.get(self.kind):
            out = out - bound.arguments[residual]
        axis = next((i for i, n in enumerate(out.shape[:-1]) if n == TOKENS), 0)
        return out.detach().clone().movedim(axis, 0).flatten(1)

    @contextlib.contextmanager
    def changed(self, labels: str, change: Callable[[ParameterSlice], Tensor]) -> Iterator[None]:
        """Replace every matrix of the labels that are there, and put them back."""
        found = [m for label in labels.split() for m in self.parts.get(label, [])]
        old = [m.read().clone() for m in found]
        try:
            for m in found:
                m.write_(change(m))
            yield
        finally:
            for m, matrix in zip(found, old, strict=True):
                m.write_(matrix)

    def without(self, labels: str) -> Any:
        """Set matrices to zero."""
        return self.changed(labels, lambda m: torch.zeros(m.shape))

    def redrawn(self, labels: str) -> Any:
        """Put other matrices in their place."""
        draw = torch.Generator().manual_seed(1)
        return self.changed(labels, lambda m: torch.randn(m.shape, generator=draw))

    def for_one_token(self, labels: str) -> Any:
        """Change what matrices say about one token, and about no other."""
        draw = torch.Generator().manual_seed(2)

        def change(m: ParameterSlice) -> Tensor:
            dual = torch.linalg.pinv(self.inputs[m.parameter].double())[:, CHANGED].float()
            return m.read() + torch.outer(10 * torch.randn(m.shape[0], generator=draw), dual)

        return self.changed(labels, change)

    def constant(self, labels: str, value: float) -> Any:
        """Let matrices map every token to the same number."""

        def change(m: ParameterSlice) -> Tensor:
            column = value * torch.linalg.pinv(self.inputs[m.parameter].double()).sum(1).float()
            return column.expand(m.shape)

        return self.changed(labels, change)

    def sees(self, labels: str, tokens: int = TOKENS) -> bool:
        """Tell whether it is known what the matrices multiply, and that it is one row a token."""
        found = [m for label in labels.split() for m in self.parts.get(label, [])]
        return all(len(self.inputs.get(m.parameter, ())) == tokens for m in found) and bool(found)


def cases(model: nn.Module, **inputs: Any) -> list[Case]:
    """Take the blocks out of a model, one of each kind, and record one call of each in the model's forward pass."""
    modules = dict(model.named_modules())
    blocks: dict[str, list[ParameterSlice]] = {}
    for m in logical_matrices(model, ("attention", "mlp", "ssm")):
        owner = m.parameter.rpartition(".")[0]
        name = owner
        while name and type(modules[name]).__name__ != m.block:
            name = name.rpartition(".")[0]
        blocks.setdefault(name, []).append(m)
    found: dict[Any, Case] = {}
    for name, matrices in blocks.items():
        case = Case(name, modules[name], matrices)
        found.setdefault((case.kind, tuple((case.child(m), m.name[-6:], m.shape) for m in matrices)), case)
    hooks = []
    for case in found.values():
        hooks.append(called(case, modules).register_forward_pre_hook(partial(record_call, case), with_kwargs=True))
        for parameter in {m.parameter for m in case.matrices}:
            if parameter.endswith(".weight"):
                owner = modules[parameter.removesuffix(".weight")]
                hooks.append(owner.register_forward_pre_hook(partial(record_input, case, parameter)))
        for name, parameter in case.block.named_parameters():
            if name.endswith("bias") or "adapter" in name or name == "up_embed.weight":
                parameter.detach().zero_()
        if norm := LAST_NORM.get(case.kind):
            setattr(case.block, norm, nn.Identity())
        if case.kind == "DoryAttention":
            case.block.s_gate.detach().fill_(case.block.config.initializer_range)
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return list(found.values())


def called(case: Case, modules: dict[str, nn.Module]) -> nn.Module:
    """Give the module that is called: the block, or the one around a block that is only asked for its matrices."""
    parent = case.name.rpartition(".")[0]
    return modules[parent] if case.kind in ("DbrxExpertGLU", "JetMoeMoA") else case.block


def record_call(case: Case, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if case.call is None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        for key, value in bound.arguments.items():
            if isinstance(value, Cache):
                bound.arguments[key] = None
            if isinstance(value, Tensor):
                bound.arguments[key] = torch.zeros_like(value) if key == "residual" else value.clone()
        if case.kind == "BltCrossAttention":
            bound.arguments["attention_mask"] = None  # a patch of one byte has nothing to choose from
        case.call = bound, module
        if case.kind == "XLNetRelativeAttention":
            case.inputs.update({m.parameter: args[0].flatten(0, 1).clone() for m in case.matrices})


def record_input(case: Case, parameter: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    case.inputs.setdefault(parameter, args[0].detach().reshape(-1, args[0].shape[-1]).clone())


def take(name: str) -> list[Case]:
    """Build a small model and take its blocks out."""
    model: Any = build(name)
    tokens = torch.arange(3, 3 + TOKENS)[None]
    inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
    if name.startswith("musicgen"):
        inputs["input_ids"] = torch.stack([tokens[0], tokens[0] + TOKENS])
    draw = torch.Generator().manual_seed(3)
    if name.endswith("+cross") and name not in NEVER_CALLED:
        inputs["encoder_hidden_states"] = torch.randn(1, 6, 48, generator=draw)
    if name.endswith("_assistant"):
        # It reads the main model's embeddings, keys and values.
        memory = {
            kind: (torch.randn(1, 2, 6, width, generator=draw), torch.randn(1, 2, 6, width, generator=draw))
            for kind, width in (("full_attention", 512), ("sliding_attention", 16))
        }
        embeddings = torch.randn(1, TOKENS, model.pre_projection.in_features, generator=draw)
        inputs = {"inputs_embeds": embeddings, "shared_kv_states": memory}
        inputs |= {"position_ids": torch.arange(TOKENS)[None], "output_hidden_states": True}
    assert VOCABULARY > 3 + 2 * TOKENS
    with torch.no_grad():
        return cases(model, **inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Proofs: each yields what it finds wrong.


def small(a: Tensor, beside: Tensor, tolerance: float = 1e-4) -> bool:
    """Tell whether a tensor is nought, beside another one."""
    return bool(a.abs().max() <= tolerance * beside.abs().max())


def vanishes(case: Case, label: str) -> Iterator[str]:
    before = case.run()
    if before.abs().max() < 1e-7:
        yield "its output is nought from the start"
    with case.without(label):
        if not small(case.run(), before):
            yield f"without {label} its output is not nought"


def ignores(case: Case, without: str, of: str) -> Iterator[str]:
    before = case.run()
    with case.redrawn(of):
        if small(case.run() - before, before):
            yield f"{of} does not matter to begin with"
    with case.without(without):
        one = case.run()
        with case.redrawn(of):
            if not small(case.run() - one, before, 1e-5):
                yield f"without {without} it still depends on {of}"


def reaches(case: Case, label: str, far: bool, later: int = LATER) -> Iterator[str]:
    """Show that a part carries a change of one token to later ones, or that it does not."""
    before = case.run()
    if not case.sees(label) or len(before) != TOKENS:
        return
    with case.for_one_token(label):
        change = case.run() - before
    if not far and change[:CHANGED].abs().max() > 1e-3 * change.abs().max():
        yield f"what {label} says of a token changes the tokens before"
    if small(change, before):
        yield f"what {label} says of a token changes nothing"
    elif small(change[later:], change, 1e-3) == far:
        yield f"what {label} says of a token {'does not reach' if far else 'reaches'} later ones"


def attention(case: Case) -> Iterator[str]:
    keys = " ".join(label for label in ("k", "k_nope", "k_rope", "r") if case.has(label))
    for label in ("v", "kv_latent"):
        if case.has(label):
            yield from vanishes(case, label)
    if case.has("q") and keys:
        yield from ignores(case, keys, "q")
        yield from reaches(case, "q", far=False)
    for label in ("k", "k_nope", "k_rope", "v", "kv_latent"):
        if case.has(label):
            yield from reaches(case, label, far=True)
    for gate in ("gate", "ogate"):
        if case.has(gate) and case.sees(gate):
            yield from silences(case, gate)
    if case.has("z"):
        yield from vanishes(case, "z")
        yield from reaches(case, "z", far=False)


def silences(case: Case, gate: str) -> Iterator[str]:
    """Show that a sigmoid of the part multiplies the output, and that the query is something else."""
    before = case.run()
    with case.constant(gate, -60.0):
        if not small(case.run(), before):
            yield f"{gate} far below nought does not silence it"
    with case.constant("q", -60.0):
        if small(case.run(), before):
            yield "q far below nought silences it"
    yield from reaches(case, gate, far=False)


def gated_mlp(case: Case) -> Iterator[str]:
    before = case.run()
    yield from vanishes(case, "gate")
    if case.kind == "MiniMaxM3VLDenseMLP":  # gate · sigmoid(α gate) · (up + 1)
        with case.constant("up", -1.0):
            if not small(case.run(), before):
                yield "up at −1 does not silence it"
        return
    with case.changed("up", lambda m: -m.read().clone()):
        if not small(case.run() + before, before):
            yield "−up does not turn the sign of its output"


def mamba(case: Case) -> Iterator[str]:
    if case.has("z"):
        for label, far in (("x", True), ("z", False)):
            yield from vanishes(case, label)
            yield from reaches(case, label, far)
        for without, of in (("B", "C"), ("C", "B"), ("B", "dt"), ("C", "dt")):
            yield from ignores(case, without, of)
        for label, far in (("B", True), ("C", False), ("dt", True)):
            yield from reaches(case, label, far)
    else:  # A short convolution: C · conv(B · x); B and x may be exchanged.
        for label, far in (("B", True), ("C", False), ("x", True)):
            yield from vanishes(case, label)
            yield from reaches(case, label, far, CHANGED + 1)


def stack_of(case: Case, label: str) -> dict[int, Tensor]:
    return {m.spec.index: m.read() for m in case.parts.get(label, [])}


def activation(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Give what an experts module makes of gate and up."""
    alpha = getattr(module, "alpha", getattr(module, "swiglu_alpha", None))
    if alpha is not None:
        return lambda gate, up: (up + 1) * gate * torch.sigmoid(alpha * gate)
    names = ("act_fn", "activation_fn", "activation")
    act = next((getattr(module, n) for n in names if hasattr(module, n)), nn.functional.silu)
    if type(act).__name__.endswith("SoftcappedSwiGLU"):
        return act
    return lambda gate, up: act(gate) * up


def differs(got: Tensor, want: Tensor) -> Iterator[str]:
    if want.abs().max() < 1e-7 or not small(got - want, want):
        yield "an MLP a token and expert, built from the matrices, gives something else"


def experts(case: Case) -> Iterator[str]:
    """Rebuild experts from their matrices: hidden states, expert indices and weights are the first arguments."""
    bound, module = case.call
    gate, up, down = (stack_of(case, label) for label in ("gate", "up", "down"))
    glu = activation(case.block)
    want = torch.zeros_like(x := bound.args[0].flatten(0, -2))
    for token, slot in torch.cartesian_prod(*(torch.arange(n) for n in bound.args[1].shape)).tolist():
        e = int(bound.args[1][token, slot])
        y = x[token]
        if e in down:
            wide = glu(gate[e] @ y, up[e] @ y) if gate else case.block.act_fn(up[e] @ y)
            y = down[e] @ wide
        want[token] += bound.args[2][token, slot] * y
    yield from differs(module(*bound.args, **bound.kwargs).flatten(0, -2), want)


def dbrx_experts(case: Case) -> Iterator[str]:
    for label, child in (("gate", "w1"), ("up", "v1"), ("down", "w2")):
        case.parts[label] = [m for m in case.matrices if case.child(m) == child]
    yield from experts(case)


def llama4_experts(case: Case) -> Iterator[str]:
    """Rebuild experts that each get as many rows of the input."""
    bound, module = case.call
    gate, up, down = (stack_of(case, label) for label in ("gate", "up", "down"))
    glu, x = activation(case.block), bound.args[0].chunk(len(gate))
    want = [glu(y @ gate[e].T, y @ up[e].T) @ down[e].T for e, y in enumerate(x)]
    yield from differs(module(*bound.args), torch.cat(want))


def shared_experts(case: Case) -> Iterator[str]:
    """Rebuild experts that every token visits, each weighted by a number a token."""
    bound, module = case.call
    gate, up, down = (stack_of(case, label) for label in ("gate", "up", "down"))
    x, weights = bound.args[0].flatten(0, -2), bound.args[1].reshape(-1, len(gate), 1)
    glu = activation(module)
    want = sum(weights[:, e] * (glu(x @ gate[e].T, x @ up[e].T) @ down[e].T) for e in gate)
    yield from differs(module(*bound.args).flatten(0, -2), want)


def jetmoe_mlp(case: Case) -> Iterator[str]:
    bound, module = case.call
    gate, up, down = (stack_of(case, label) for label in ("gate", "up", "down"))
    x = bound.args[0].flatten(0, -2)
    _, tokens, weights, sizes = module.router(x)[:4]
    experts_of = [e for e, n in enumerate(sizes) for _ in range(n)]
    glu, want = activation(module), torch.zeros_like(x)
    for e, token, weight in zip(experts_of, tokens.tolist(), weights, strict=True):
        want[token] += weight * (down[e] @ glu(gate[e] @ x[token], up[e] @ x[token]))
    yield from differs(module(*bound.args)[0], want)


def jetmoe_attention(case: Case) -> Iterator[str]:
    """Rebuild the queries, and what the outputs make of them if they are taken for heads."""
    x = case.call[0].arguments["hidden_states"]
    queries, _, topology = case.block.map(x)
    order, tokens, weights, sizes = topology
    experts_of = [e for e, n in enumerate(sizes) for _ in range(n)]
    q, o = (
        {m.spec.index: m.read() for m in case.matrices if case.child(m) == c} for c in ("input_linear", "output_linear")
    )
    flat = queries[0].flatten(0, 1)
    want, out = torch.zeros_like(flat), torch.zeros_like(x[0])
    for place, e, token, weight in zip(order.tolist(), experts_of, tokens.tolist(), weights, strict=True):
        want[place] = q[e] @ x[0, token]
        out[token] += weight * (o[e] @ flat[place])
    yield from differs(flat, want)
    yield from differs(case.block.reduce(queries, topology)[0], out)


def grouped_output(case: Case) -> Iterator[str]:
    """Rebuild DeepSeek V4's output projection: one matrix for each group of heads."""
    blocks = [m.read() for m in case.matrices if case.child(m) == "o_a_proj"]
    x = torch.randn(TOKENS, len(blocks), blocks[0].shape[1], generator=torch.Generator().manual_seed(4))
    want = torch.stack([x[:, g] @ w.T for g, w in enumerate(blocks)], 1)
    yield from differs(case.block.o_a_proj(x), want)


def recurrent_unit(case: Case) -> Iterator[str]:
    """Rebuild the gates of a linear recurrence, one block a head, and run it."""
    bound, module = case.call
    x = bound.args[0][0]
    gates = {}
    for kind in ("input", "recurrent"):
        blocks = [m.read() for m in case.matrices if case.child(m) == f"{kind}_gate_weight"]
        heads = x.chunk(len(blocks), dim=-1)
        gates[kind] = torch.sigmoid(torch.cat([h @ w.T for h, w in zip(heads, blocks, strict=True)], -1))
    log = -8.0 * gates["recurrent"] * nn.functional.softplus(module.recurrent_param)
    state, want = torch.zeros_like(x[0]), []
    for t in range(TOKENS):
        fresh = 1.0 if t == 0 else torch.sqrt(1 - torch.exp(2 * log[t]))
        state = (0.0 if t == 0 else torch.exp(log[t])) * state + x[t] * gates["input"][t] * fresh
        want.append(state)
    yield from differs(case.run(), torch.stack(want))


def xlnet_output(case: Case) -> Iterator[str]:
    """Show that a change of one row of the output matrix changes one feature of the output."""
    before = case.run()

    def change(m: ParameterSlice) -> Tensor:
        return torch.cat([m.read()[:1] + 1, m.read()[1:]])

    with case.changed("o", change):
        change_of = (case.run() - before).abs().amax(0)
    if change_of[0] < 1e-4 or change_of[1:].max() > 1e-6:
        yield "a row of o is not a feature of the output"
    yield from reaches_table(case)


def reaches_table(case: Case) -> Iterator[str]:
    """Show that r projects the table of positions, which the keys do not see."""
    bound, _ = case.call
    table = bound.arguments["r"]
    with case.without("k"):
        before = case.run()
        bound.arguments["r"] = torch.roll(table, 1, 0)
        if small(case.run() - before, before):
            yield "positions do not matter"
        with case.without("r"):
            one = case.run()
            bound.arguments["r"] = table
            if not small(case.run() - one, before):
                yield "without r positions still matter"
    bound.arguments["r"] = table


# Blocks whose stack has a forward pass of its own kind.
SPECIAL: dict[str, Callable[[Case], Iterator[str]]] = {
    "DbrxExpertGLU": dbrx_experts,
    "DeepseekV4Attention": grouped_output,
    "InklingSharedExperts": shared_experts,
    "JetMoeMoA": jetmoe_attention,
    "JetMoeMoE": jetmoe_mlp,
    "Llama4TextExperts": llama4_experts,
    "RecurrentGemmaRglru": recurrent_unit,
}
# Blocks whose plain q, k and v are used in another way, so that the proof for attention does not apply.
NO_ATTENTION = {"RwkvFeedForward": "its key and value are the layers of an MLP"}


# Small models with a fused weight that no forward pass can be had of.
NEVER_CALLED = {
    "gpt_bigcode+cross": "transformers' own forward pass fails: it never splits the keys of cross-attention into heads",
}


# The parts that a proof tells apart, where it is none of experts.
PROVES = {attention: "q k v k_nope k_rope kv_latent gate ogate z", mamba: "x z B C dt"}


def proofs(case: Case) -> list[Callable[[Case], Iterator[str]]]:
    """Choose the proofs of a block by the parts it has."""
    if case.kind in SPECIAL:
        return [SPECIAL[case.kind]]
    chosen: list[Callable[[Case], Iterator[str]]] = []
    stacked = any(m.spec.index is not None for m in case.matrices)
    if case.has("v") and (case.has("k") or case.has("k_nope")) and case.kind not in NO_ATTENTION:
        chosen.append(attention)
    if case.has("o", "r"):
        chosen.append(xlnet_output)
    if case.has("B", "C"):
        chosen.append(mamba)
    elif stacked:
        chosen.append(experts)
    elif case.has("gate", "up"):
        chosen.append(gated_mlp)
    return chosen


def wrong(name: str) -> tuple[list[str], int]:
    """Prove what can be proved of a small model: what is wrong, and how many proofs there were."""
    if name in OTHERS:
        model = build_other(name)
        with torch.no_grad():
            return prove(cases(model, **inputs_of(model)))
    return prove(take(name), called=name not in NEVER_CALLED)


def prove(found_cases: list[Case], called: bool = True) -> tuple[list[str], int]:
    """Prove what can be proved of blocks that were taken out of a model."""
    found: list[str] = []
    count = 0
    for case in found_cases:
        chosen = proofs(case)
        proved = " ".join(PROVES.get(proof, "gate up") for proof in chosen).split()
        if unproved := {m.part for m in case.matrices if m.part} - set(proved):
            found.append(f"{case.kind}: nothing proves {sorted(unproved)}")
        if case.fused and not chosen:
            found.append(f"{case.kind}: nothing proves {sorted(case.fused)}")
        if case.call is None:
            if case.fused and called:
                found.append(f"{case.kind}: the forward pass does not call it")
            continue
        for proof in chosen:
            count += 1
            with torch.no_grad():
                found += [f"{case.kind} ({case.name}): {message}" for message in proof(case)]
    return found, count


# ---------------------------------------------------------------------------------------------------------------------

_FEW = """
llama gemma2 gpt2 gpt2+cross openai-gpt gpt_neox bloom falcon falcon+new falcon+mha codegen gpt_bigcode
gpt_bigcode+mha mpt phi3 persimmon modernbert-decoder deepseek_v3 longcat_flash mixtral gpt_oss dbrx jetmoe
llama4_text qwen3_next mamba mamba2 zamba lfm2 recurrent_gemma xlnet xlstm+fused minimax granitemoeshared+shared
"""
# Beyond causal LMs: fused in_proj, Wqkv, Wi and c_attn, T5's gated MLP and cross-attention.
_OTHERS = """
DebertaForSequenceClassification+plain ModernBertForMaskedLM ImageGPTForImageClassification
T5ForConditionalGeneration+gated
"""
FEW = [*_FEW.split(), *_OTHERS.split()]
# With relative positions, the scores depend on q by a way beside k; these are proved without them, as +plain.
RELATIVE = ("DebertaForSequenceClassification", "DebertaV2ForSequenceClassification")
REST = [name for name in [*SMALL, *OTHERS] if name not in (*FEW, *RELATIVE)]


def check(name: str) -> None:
    found, count = wrong(name)
    assert not found, "\n".join(found)
    if not count:
        pytest.skip("none of its blocks that a short input reaches is fused, or has q, k and v")


@pytest.mark.parametrize("name", FEW)
def test_the_forward_pass_uses_every_matrix_as_the_layout_says(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_the_forward_pass_uses_every_matrix_as_the_layout_says_in_all_types(name: str) -> None:
    check(name)


@pytest.mark.parametrize(
    ("name", "block", "out"),
    [("BlipModel", "BlipAttention", "projection"), ("HieraForImageClassification", "HieraMaskUnitAttention", "proj")],
)
def test_attention_over_patches_is_rebuilt_from_its_matrices(name: str, block: str, out: str) -> None:
    """softmax(q kᵀ / √d) v, written down here, is what the block computes from a fused qkv."""
    model = build_other(name)
    modules = {
        n: m for n, m in model.named_modules() if type(m).__name__ == block and getattr(m, "query_stride", 1) == 1
    }
    where, attention = next(iter(modules.items()))
    found = {m.part or "out": m.read() for m in logical_matrices(model) if m.parameter.startswith(f"{where}.")}
    assert set(found) == {"q", "k", "v", "out"}
    for bias in (attention.qkv.bias, getattr(attention, out).bias):
        bias.detach().zero_()
    x = torch.randn(1, 16, found["q"].shape[1], generator=torch.Generator().manual_seed(5))
    if getattr(attention, "use_mask_unit_attn", False):
        x = x[:, : attention.window_size]
    q, k, v = ((x @ found[part].T).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in ("q", "k", "v"))
    shares = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
    want = (shares @ v).transpose(1, 2).flatten(2) @ found["out"].T
    with torch.no_grad():
        torch.testing.assert_close(attention(x)[0], want, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The proofs have teeth: a wrong layout fails them.


def of_heads(attention: Any) -> int:
    return attention.config.num_attention_heads


QKV = ("q", "k", "v")
EXPERTS: dict[str, Any] = {"role": "mlp", "stack": lambda experts: experts.num_experts}
WRONG: list[tuple[str, str, str, dict[str, Any]]] = [
    (
        "gpt2",
        "GPT2Attention",
        "c_attn",
        {"parts": ("v", "k", "q"), "orientation": "in_first", "module_class": "Conv1D"},
    ),
    (
        "gpt2",
        "GPT2Attention",
        "c_attn",
        {"parts": ("k", "q", "v"), "orientation": "in_first", "module_class": "Conv1D"},
    ),
    ("gpt_neox", "GPTNeoXAttention", "query_key_value", {"parts": QKV}),
    ("gpt_neox", "GPTNeoXAttention", "query_key_value", {"parts": ("k", "q", "v"), "groups": of_heads}),
    ("mpt", "MptAttention", "Wqkv", {"parts": QKV, "groups": 4}),
    ("bloom", "BloomAttention", "query_key_value", {"parts": QKV}),
    ("codegen", "CodeGenAttention", "qkv_proj", {"parts": QKV, "groups": 4}),
    ("codegen", "CodeGenAttention", "qkv_proj", {"parts": ("q", "v", "k")}),
    (
        "falcon+new",
        "FalconAttention",
        "query_key_value",
        {"parts": (("q", 48), "k", "v"), "module_class": "FalconLinear"},
    ),
    ("gpt_bigcode", "GPTBigCodeAttention", "c_attn", {"parts": (("q", 48), "v", "k")}),
    ("phi3", "Phi3Attention", "qkv_proj", {"parts": ("k", "v", "q")}),
    ("deepseek_v3", "DeepseekV3Attention", "kv_b_proj", {"parts": (("k_nope", 48), ("v", 40))}),
    ("deepseek_v3", "DeepseekV3Attention", "kv_a_proj_with_mqa", {"parts": (("k_rope", 8), ("kv_latent", 24))}),
    ("qwen3_5_text", "Qwen3_5Attention", "q_proj", {"parts": ("q", "gate")}),
    ("qwen3_5_text", "Qwen3_5Attention", "q_proj", {"parts": ("gate", "q"), "groups": of_heads}),
    (
        "qwen3_next",
        "Qwen3NextGatedDeltaNet",
        "in_proj_qkvz",
        {"parts": (("q", 24), ("k", 24), *"vz"), "role": "ssm"},
    ),
    ("phi3", "Phi3MLP", "gate_up_proj", {"parts": ("up", "gate"), "role": "mlp"}),
    ("mixtral", "MixtralExperts", "gate_up_proj", {"parts": ("up", "gate"), **EXPERTS}),
    ("gpt_oss", "GptOssExperts", "gate_up_proj", {"parts": ("gate", "up"), "orientation": "in_first", **EXPERTS}),
    ("mamba", "MambaMixer", "in_proj", {"parts": ("z", "x"), "role": "ssm"}),
    ("mamba", "MambaMixer", "x_proj", {"parts": (("dt", 5), ("C", 8), ("B", 8)), "role": "ssm"}),
    ("mamba2", "Mamba2Mixer", "in_proj", {"parts": (("x", 96), ("z", 96), "B", "C", ("dt", 4)), "role": "ssm"}),
    ("zamba", "ZambaMambaMixer", "in_proj", {"parts": ("x", "z"), "role": "ssm"}),
    ("lfm2", "Lfm2ShortConv", "in_proj", {"parts": ("C", "B", "x"), "role": "ssm"}),
    ("recurrent_gemma", "RecurrentGemmaRglru", "input_gate_weight", {"stack": 4, "role": "ssm"}),
    ("DebertaForSequenceClassification+plain", "DisentangledSelfAttention", "in_proj", {"parts": QKV}),
    ("ModernBertForMaskedLM", "ModernBertAttention", "Wqkv", {"parts": ("k", "q", "v")}),
    ("ModernBertForMaskedLM", "ModernBertMLP", "Wi", {"parts": ("up", "gate"), "role": "mlp"}),
    ("xlnet", "XLNetRelativeAttention", "q", {"orientation": "out_first"}),
    ("xlnet", "XLNetRelativeAttention", "o", {"orientation": "in_first"}),
]


@pytest.mark.parametrize(("name", "block", "child", "layout"), WRONG)
def test_a_wrong_layout_fails_its_proof(name: str, block: str, child: str, layout: dict[str, Any]) -> None:
    register_layout(block, child, **{"role": "attention", **layout})
    found, _ = wrong(name)
    assert any(block in message for message in found)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_fused_weight_of_the_table_is_in_a_small_model() -> None:
    seen: set[Key] = set()
    for name in [*SMALL, *OTHERS]:
        model = build_other(name) if name in OTHERS else build(name)
        locations = lookup.Lookup(model)
        with contextlib.suppress(UserError):
            matrices = logical_matrices(model, ("attention", "mlp", "ssm"))
            seen |= {(m.block, locations.location(m.parameter).child) for m in matrices}
    # Every fused entry of the table must have been met, or its proofs say nothing; an older transformers lacks some.
    fused = {key for key, layout in TABLE.items() if layout.matrix and (layout.parts or layout.stack)}
    others = tuple(name.partition("_")[0] for name in left_out())
    here = {block for block in modeling_classes() if not block.lower().startswith(others)}
    assert not {(block, child) for block, child in fused - seen if block in here}


def test_every_type_has_a_small_model_or_a_reason() -> None:
    assert {name.partition("+")[0] for name in SMALL} | set(CANNOT) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not set(SMALL) & set(CANNOT)


def test_a_small_model_is_the_same_each_time_and_has_no_idle_weights() -> None:
    before = torch.random.get_rng_state()
    one, again, other = build("jamba"), build("jamba"), build("jamba", dtype=torch.bfloat16, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b, c in zip(one.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and c.dtype == torch.bfloat16 and not torch.equal(a.bfloat16(), c)


@pytest.mark.slow
def test_small_models_can_be_saved(tmp_path: Path) -> None:
    for name in SMALL:
        model: Any = build(name)
        for parameter in model.parameters():
            assert (parameter != 0).all() and (parameter.numel() == 1 or parameter.min() < parameter.max())
        model.save_pretrained(tmp_path)
