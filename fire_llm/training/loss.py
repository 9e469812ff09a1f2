"""Compute the training loss with the logits of a slice of positions at a time, not those of a whole micro-batch.

Shapes: B = sequences a micro-batch, T = tokens a sequence, S = B·T positions, D = width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fire_llm.architectures.names import unwrap
from fire_llm.core.errors import UserError
from fire_llm.core.hardware import device_memory
from fire_llm.distributed import forward_replaced, fsdp_modules, in_parts
from fire_llm.evaluation.precision import device_of, evaluating, own_precision
from fire_llm.evaluation.scoring import IGNORE, PROBE, Scorer, token_nll, with_hidden
from fire_llm.evaluation.unmasked import needs_no_mask, unmasked
from fire_llm.training.progress import report_line
from fire_llm.training.rounded import rounded

SLICE = 2**25
"""Logits of a slice on a CPU: 128 MiB in fp32."""

SLICES = 2**26, 2**29
"""Least and most logits of a slice on an accelerator. The most, with their gradient, take 2 GB in bf16."""

WHOLE = 2**27
"""So many logits are still held whole: 512 MiB in fp32. On one CPU thread, a step with slices took 1.3 times as long as
with whole logits (1024 tokens, V = 50,304, width 192): slices save memory there, not time."""

CACHED = 2**20
"""Logits of one softmax on a CPU: they stay in its cache between passes over them."""

Head = Callable[[Tensor], Tensor]


class SummedLoss:
    """Sum the negative log-likelihood of a micro-batch's tokens, with the logits of one slice at a time in memory.

    What a mixture of experts adds for the balance of its routers, if its config asks for that (`output_router_logits`),
    is added too, once for each token, so that a mean over tokens has it once.

    The model's own forward computes everything, as in `evaluation.scoring`. Its trunk runs once, and then the whole
    forward runs on slices of the trunk's output, so that what a class does after its head is done too. The gradient of
    a slice is computed as soon as its logits are, and replaces them: nothing is computed twice.

    Under FSDP2 the slices are computed while the head is gathered (`in_parts`), once a micro-batch. The trunk is found
    before the model is cut into shards (`look`). Ranks gather the same parameters, whether or not they take slices.

    The logits of a micro-batch are held whole, as in transformers, where they are few; in fp16, whose loss has to be
    scaled before gradients are computed; and where no trunk is found that gives the same logits in slices.

    Args:
        model: A causal LM from transformers.
        autocast: Returns the context that its forward pass runs in.
        fp16: Whether that context computes in fp16.
        params: The dtype that the model reads its parameters in (`rounded`); None leaves dtypes to autocast.
        compiling: Arguments of torch.compile, for the trunk and the softmax; None: they are not compiled.
        report: Called once, with a sentence, where logits are held whole because no trunk is found.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        fp16: bool = False,
        params: torch.dtype | None = None,
        compiling: dict[str, Any] | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.autocast, self.fp16, self.compiling = unwrap(model), autocast, fp16, compiling
        self.params, self.report = params, report
        self._trunk: nn.Module | None = None
        self._looked = self._reported = False
        self._forward: Callable[..., Any] | None = None
        self._differentiate = _differentiate if compiling is None else self._compiled(_differentiate_at_once)

    def __call__(self, model: nn.Module, labels: Tensor, **inputs: Tensor) -> Tensor:
        """Return Σ nll, and Σ of what the model adds, (), fp32.

        Args:
            model: The model as it was wrapped for training.
            labels: (B, T) tokens that follow each position; `IGNORE` where none is scored.
            **inputs: What the model reads: `input_ids` (B, T) and what goes with them.
        """
        sliced, sharded = self.sliced(model, labels), bool(fsdp_modules(model))
        with ExitStack() as stack:
            if self.without_mask(inputs, model if sharded else None):
                stack.enter_context(unmasked(self.model))
            if not sliced:
                if self.params is not None:
                    stack.enter_context(forward_replaced(self.model, self._rounded_forward))
                outputs = model(**inputs, use_cache=False)
                nll: Tensor = token_nll(outputs.logits, labels)
                return with_router_loss(nll.sum(), router_loss(self.model, outputs), labels)
            stack.enter_context(self.autocast())
            first, last = partial(self._first, inputs), partial(self._last, labels.flatten(), inputs)
            total: Tensor
            if sharded:
                assert self._trunk is not None
                total = in_parts(model, self._trunk, first, last, **inputs)
                return total
            # The wrapped model is called, not this one: DistributedDataParallel gets ready for backward in there.
            stack.enter_context(forward_replaced(self.model, lambda **_: last(first())))
            # torch.compile's wrapper is left aside: it would compile this function, of which two parts gain by it.
            total = getattr(model, "_orig_mod", model)(**inputs)
            return total

    def _rounded_forward(self, **inputs: Any) -> Any:
        with self._as_read(self.model):
            # The class's forward: accelerate's own, on the instance, would turn autocast on.
            return type(self.model).forward(self.model, **inputs)

    def _as_read(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext() if self.params is None else rounded(module, self.params)

    def without_mask(self, inputs: dict[str, Tensor], root: nn.Module | None = None) -> bool:
        """Return whether attention is purely causal, so that its kernel needs no mask; checked once for each length.

        Args:
            inputs: What the model reads. Positions of documents, beside the ids, have a mask of their own.
            root: Of a model in shards, the module that FSDP2 gathers first.
        """
        only_ids = set(inputs) == {"input_ids"}
        return only_ids and needs_no_mask(self.model, inputs["input_ids"].shape[-1], self._trunk, root)

    def sliced(self, model: nn.Module, labels: Tensor) -> bool:
        """Return whether the logits of a micro-batch are computed in slices."""
        if labels.numel() * self._vocabulary() <= WHOLE or self.fp16 or isinstance(model, nn.DataParallel):
            return False
        if not self._looked:
            self.look()
        if self._trunk is not None:
            return True
        if self._reported:
            return False
        self._reported = True
        gigabytes = 4 * labels.numel() * self._vocabulary() / 1e9
        self.report(
            f"no part of {type(self.model).__name__} gives the same logits in slices, so that a micro-batch's are held "
            f"whole: {gigabytes:.2g} GB, and as much for their gradients. Smaller micro-batches hold less"
        )
        return False

    def look(self) -> None:
        """Find the trunk of a model that is not in shards, in evaluation mode; leave the model as it was."""
        try:
            # In fp32 a head gives the same logits on a slice, but for rounding; in bf16 rounding hides whether it does.
            with own_precision(self.model), evaluating(self.model), torch.no_grad():
                tokens = torch.arange(PROBE, device=device_of(self.model)) % self._vocabulary()
                self._trunk = Scorer(self.model, tokens).trunk
        except UserError:
            self._trunk = None  # training goes on with whole logits, as in any other trainer
        self._looked = True
        if self._trunk is not None:
            self._forward = self._compiled(self._trunk.forward)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self.compiling is None else torch.compile(function, **self.compiling)

    def _vocabulary(self) -> int:
        config: Any = self.model.config
        return int(config.get_text_config().vocab_size)

    def _first(self, inputs: dict[str, Tensor]) -> tuple[Any, list[Tensor], Tensor | None]:
        """Run the trunk; return its outputs, the parameters behind it (a tied embedding too), and `router_loss`."""
        trunk, forward = self._trunk, self._forward
        assert trunk is not None and forward is not None
        outputs: Any = None
        part: Tensor

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal outputs, part
            with self._as_read(trunk):
                outputs = forward(*args, **kwargs)
            part = outputs[0].detach()[0, :1].requires_grad_()
            return with_hidden(outputs, part[None])

        with forward_replaced(trunk, run):
            one = self._outputs(inputs)  # of one position, whose graph holds the parameters
        parameters = [leaf for leaf in _leaves(one.logits) if leaf is not part]
        return outputs, parameters, router_loss(self.model, one)

    def _last(
        self, targets: Tensor, inputs: dict[str, Tensor], first: tuple[Any, list[Tensor], Tensor | None]
    ) -> Tensor:
        """Return Σ nll from what `_first` returned, a slice at a time, and Σ of the routers' loss."""
        assert self._trunk is not None
        outputs, parameters, of_routers = first
        without = {} if of_routers is None else {"output_router_logits": False}  # that loss is there: not once a slice
        part: Tensor

        def replay(*_: Any, **__: Any) -> Any:
            return with_hidden(outputs, part[None])

        def head(hidden: Tensor) -> Tensor:
            nonlocal part
            part = hidden
            logits: Tensor = self._outputs(inputs, **without).logits
            return logits.squeeze(0)  # not `logits[0]`: its gradient would be copied into zeros as large as the logits

        with forward_replaced(self._trunk, replay):
            hidden = outputs[0].flatten(0, 1)
            rows = even_rows(len(hidden), max(1, logits_at_once(hidden.device) // self._vocabulary()))
            apply: Any = _Sliced.apply
            total: Tensor = apply(head, self._differentiate, targets, rows, hidden, *parameters)
            return with_router_loss(total, of_routers, targets)

    def _outputs(self, inputs: dict[str, Tensor], **options: Any) -> Any:
        # The class's forward: accelerate's, on the instance, would convert the logits to fp32.
        return type(self.model).forward(self.model, **inputs, use_cache=False, **options)


def router_loss(model: Any, outputs: Any) -> Tensor | None:
    """Return what a mixture of experts adds to its mean loss for the balance of its routers, (); None for nothing.

    It is the class's own `aux_loss` times its coefficient, where the config asks for it by `output_router_logits`.

    Raises:
        UserError: The config asks for it, and the outputs hold none.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    held = [getattr(of, name, None) for of in (model, config) for name in ("router_aux_loss_coef", "aux_loss_coef")]
    coefficient = next((one for one in held if one is not None), None)
    if coefficient is None:  # not a class that has such a loss
        return None
    balance = getattr(outputs, "aux_loss", None)
    if not isinstance(balance, Tensor):
        raise UserError(
            f"output_router_logits: the config asks for the loss of the routers, and {type(model).__name__} gives "
            "none. Set output_router_logits to false in the config, or train without compile"
        )
    return balance * float(coefficient)


def with_router_loss(total: Tensor, added: Tensor | None, targets: Tensor) -> Tensor:
    """Return Σ nll, and `router_loss` as often as tokens are scored: a mean over tokens has it once."""
    return total if added is None else total + added * (targets != IGNORE).sum()


def summed_loss(trainer: Any) -> SummedLoss:
    """Return the loss of a `ContinualTrainer`'s model, in the precision and compiled as its arguments say."""
    args = trainer.args
    compiling = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
    return SummedLoss(
        trainer.model,
        trainer.accelerator.autocast,
        fp16=args.fp16,
        # FSDP2 gathers shards in bf16 by itself.
        params=torch.bfloat16 if args.bf16_params and not trainer.is_fsdp_enabled else None,
        compiling=compiling if args.torch_compile else None,
        report=partial(report_line, args),
    )


def logits_at_once(device: torch.device) -> int:
    """Return the number of logits of a slice: with their gradient, in bf16, a 32nd of an accelerator's memory."""
    least, most = SLICES
    return SLICE if device.type == "cpu" else max(least, min(most, device_memory(device) // 128))


def even_rows(total: int, most: int) -> int:
    """Return the rows of a slice, at most `most`, so that all slices have about, if possible exactly, as many.

    Example: 3044 rows in slices of at most 2668 are two of 1522. A shorter last slice would be compiled separately.
    """
    number = -(-total // most)
    exact = next((n for n in range(number, 2 * number) if total % n == 0), number)
    return -(-total // exact)


class _Sliced(torch.autograd.Function):
    """Sum the NLL over slices of the trunk's output, and compute the gradient of each before the next."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, differentiate: Any, targets: Tensor, rows: int, hidden: Tensor, *parameters: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        to_hidden = torch.empty_like(hidden)
        to_parameters: list[Tensor] = []
        for x, y, out in zip(hidden.split(rows), targets.split(rows), to_hidden.split(rows), strict=True):
            with torch.enable_grad():
                part = x.detach().requires_grad_()
                logits = head(part)
            gradient = torch.empty_like(logits)
            n = max(1, CACHED // logits.shape[-1]) if logits.device.type == "cpu" else rows
            for block, labels, to in zip(logits.detach().split(n), y.split(n), gradient.split(n), strict=True):
                total += differentiate(block, labels, to)
            of_part, *of_parameters = torch.autograd.grad(logits, [part, *parameters], gradient)
            out.copy_(of_part)
            if to_parameters:
                to_parameters = [a.add_(b) for a, b in zip(to_parameters, of_parameters, strict=True)]
            elif rows < len(hidden):
                # FSDP2 gathers parameters in 16 bits: added up in these, gradients would be rounded at every slice.
                to_parameters = [g.float() if g.element_size() < 4 else g for g in of_parameters]
            else:
                to_parameters = of_parameters
        to_parameters = [g.to(p.dtype) for g, p in zip(to_parameters, parameters, strict=True)]
        ctx.gradients = [to_hidden, *to_parameters]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [gradient.mul_(above[0]) for gradient in ctx.gradients]
        del ctx.gradients  # they are as large as the head
        return None, None, None, None, *gradients


def _differentiate(logits: Tensor, targets: Tensor, gradient: Tensor) -> Tensor:
    """Return Σ nll of some positions, and write its gradient: softmax less one-hot.

    Args:
        logits: (R, V), any float dtype; the softmax is computed in fp32 (fp64 for fp64).
        targets: (R,) tokens; `IGNORE` where none is scored.
        gradient: (R, V), overwritten.
    """
    nll, log_p, index, ignored = _nll(logits, targets)
    p = log_p.exp_().scatter_add_(-1, index, log_p.new_full((), -1.0).expand(index.shape))
    gradient.copy_(p.masked_fill_(ignored, 0.0))
    return nll


def _differentiate_at_once(logits: Tensor, targets: Tensor, gradient: Tensor) -> Tensor:
    """Do the same as `_differentiate`, in a form that torch.compile makes one kernel of, which writes `gradient` alone.

    A scatter would be another kernel, and would write to another tensor, in fp32.
    """
    nll, log_p, index, ignored = _nll(logits, targets)
    one_hot = torch.arange(logits.shape[-1], device=logits.device) == index
    gradient.copy_((log_p.exp() - one_hot.to(log_p.dtype)).masked_fill(ignored, 0.0))
    return nll


def _nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Σ nll, (); log-probabilities, (R, V); the targets, (R, 1), 0 where ignored; and where they are, (R, 1)."""
    ignored = (targets == IGNORE)[:, None]
    index = targets.clamp(min=0)[:, None]
    log_p = torch.log_softmax(logits, -1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return -log_p.gather(-1, index).masked_fill(ignored, 0.0).sum(), log_p, index, ignored


def smoothed_nll(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return Σ (1 − ε) · nll + ε · mean over the vocabulary of −log p, (), over the positions that are scored.

    Args:
        logits: (B, T, V).
        targets: (B, T); `IGNORE` where none is scored.
        smoothing: ε.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    of_target = -log_p.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    smoothed = (1 - smoothing) * of_target - smoothing * log_p.mean(-1)
    return smoothed.masked_fill(targets == IGNORE, 0.0).sum()


def _leaves(result: Tensor) -> list[Tensor]:
    """Return the leaves of a result's graph: the tensors that would get a gradient."""
    leaves: dict[int, Tensor] = {}
    nodes, seen = [result.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        nodes += [parent for parent, _ in node.next_functions]
    return list(leaves.values())
