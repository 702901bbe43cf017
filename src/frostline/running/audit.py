"""``run.audit``: one step held to its plan."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from frostline.errors import AuditError
from frostline.kernels import fallbacks
from frostline.running.buffers import lasting_buffers
from frostline.running.recorder import Leaf, RanOp, StepRecorder, Use
from frostline.running.values import changed, digests
from frostline.subsets.names import listed

if TYPE_CHECKING:
    from frostline.running.train_only import Run


@dataclass(frozen=True)
class Finding:
    """One thing that a step did.

    Attributes:
        kind: ``"no-backward"``, ``"not-reached"``, ``"discarded-gradient"``, ``"forced-gradient"``,
            ``"foreign-gradient"``, ``"frozen-moved"``, ``"buffer-moved"``, ``"buffer-drift"``, ``"fallback"``,
            ``"kept-more"``, ``"kernels-off"`` or ``"unchecked"``.
        beyond: whether it goes beyond the plan; else it is only worth knowing.
        text: a sentence, with the names.
        names: the parameters, buffers or modules it is about.
        flops: what it cost in this step.
    """

    kind: str
    beyond: bool
    text: str
    names: tuple[str, ...] = ()
    flops: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "beyond": self.beyond,
            "text": self.text,
            "names": list(self.names),
            "flops": self.flops,
        }


@dataclass(frozen=True)
class BackwardOp:
    """One kind of op call that the backward made.

    Attributes:
        op: the ATen op. ``node``: the autograd node that ran it. ``module``: where that node was made.
        mask: for each of the op's results, whether there was one: which gradients it computed.
        use: what the most useful of them was for: ``"asked"``, ``"foreign"``, ``"forced"``, ``"discarded"``,
            ``"nothing"``; ``"recompute"`` for a checkpoint's forward, ``"other"`` outside of autograd's nodes.
        num_calls, flops: of all such calls together.
    """

    op: str
    node: str
    module: str
    mask: tuple[bool, ...]
    use: str
    num_calls: int
    flops: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "node": self.node,
            "module": self.module,
            "mask": list(self.mask),
            "use": self.use,
            "num_calls": self.num_calls,
            "flops": self.flops,
        }


@dataclass(frozen=True)
class Audit:
    """What one step of a run did, and what of it went beyond the plan.

    Attributes:
        subset: what was to train, as the caller wrote it.
        findings: what goes beyond the plan first, then what is worth knowing.
        ops: the ops of the backward.
        backward_flops: of all of them, recompute included.
        kept_bytes: the distinct storages that autograd alone kept when the loss returned, outside parameters and
            buffers. Assumes: whatever the forward made and is still there, and neither a variable of a function that
            is running nor a module's attribute holds, is autograd's.
        planned_bytes: what it was to keep; None where nobody said.
        uncounted: ops of the backward without a FLOP formula: in no figure here.
    """

    subset: str
    findings: tuple[Finding, ...]
    ops: tuple[BackwardOp, ...]
    backward_flops: int
    kept_bytes: int
    planned_bytes: int | None
    uncounted: tuple[str, ...]

    @property
    def beyond(self) -> tuple[Finding, ...]:
        """The findings that go beyond the plan: none, if all is well."""
        return tuple(finding for finding in self.findings if finding.beyond)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "subset": self.subset,
            "findings": [finding.to_dict() for finding in self.findings],
            "ops": [op.to_dict() for op in self.ops],
            "backward_flops": self.backward_flops,
            "kept_bytes": self.kept_bytes,
            "planned_bytes": self.planned_bytes,
            "uncounted": list(self.uncounted),
        }

    def __str__(self) -> str:
        from frostline.reports.audit import audit_text

        return audit_text(self)


def audit(run: Run, step: Callable[[], Any], *, strict: bool, planned_bytes: int | None) -> Audit:
    """Run one step and hold it to its plan; see `Run.audit`."""
    model = run.model
    fell_back = _fallback_counts()
    before = digests(_tensors(model))
    recorder = StepRecorder(model, dict(run.named_parameters()))
    with ExitStack() as watching:
        watching.enter_context(recorder.watching())
        step()
    moved = changed(before, digests(_tensors(model)))
    found = [
        *_reach(run, recorder),
        *_gradients(run, recorder),
        *_moved(run, moved),
        *_unchecked(before),
        *_kernels(run, _fallback_counts() - fell_back),
        *_kept(sum(recorder.kept.values()), planned_bytes),
    ]
    result = Audit(
        subset=str(run.subset),
        findings=tuple(sorted(found, key=lambda finding: not finding.beyond)),
        ops=_grouped(recorder.ops),
        backward_flops=sum(sum(op.flops) for op in recorder.ops),
        kept_bytes=sum(recorder.kept.values()),
        planned_bytes=planned_bytes,
        uncounted=tuple(sorted(recorder.uncounted)),
    )
    if strict and result.beyond:
        raise AuditError(str(result), result)
    return result


def _tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


# -- findings ----------------------------------------------------------------------------------------------------------


def _reach(run: Run, recorder: StepRecorder) -> Iterator[Finding]:
    """What was to train and got no gradient."""
    missed = tuple(name for name in run.subset if name not in recorder.reached)
    if not recorder.num_backward_runs:
        yield Finding("no-backward", True, "the step ran no backward, so nothing was trained", missed)
    elif missed:
        named = listed(list(missed), 4)
        what = f"none of the subset ({named})" if len(missed) == len(run.subset) else f"only a part of it, not {named}"
        yield Finding("not-reached", True, f"the loss reaches {what}: to train, and without a gradient", missed)


def _gradients(run: Run, recorder: StepRecorder) -> Iterator[Finding]:
    """Gradients that were computed and are not the subset's."""
    foreign = [leaf for leaf in recorder.leaves if leaf.name]
    names = {leaf.name: None for leaf in foreign}
    trained = {id(parameter) for parameter in run.parameters()}
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None and id(parameter) not in trained:
            names[name] = None
    if names:
        what = f"{listed(list(names), 4)} got a gradient and should be frozen: something set requires_grad (or .grad)"
        yield _priced("foreign-gradient", what, tuple(names), recorder.ops, Use.FOREIGN)
    for leaf in recorder.leaves:
        if not leaf.name:
            yield _forced(leaf, recorder.ops)
    for op, total in _discarded(recorder.ops):
        what = (
            f"{op.node} in {op.module or 'the loss'} computes a gradient that autograd throws away ({op.name}), for a "
            "tensor that requires none: have its backward ask ctx.needs_input_grad"
        )
        yield Finding("discarded-gradient", True, what, (op.module,), total)


def _forced(leaf: Leaf, ops: list[RanOp]) -> Finding:
    shape = f"[{', '.join(map(str, leaf.shape))}]"
    what = f"the output of {leaf.module}, {shape}," if leaf.module else f"a tensor {shape} that the step was given"
    return _priced(
        "forced-gradient",
        f"{what} requires grad though nothing before it trains (requires_grad_(), such as peft's for gradient "
        "checkpointing)",
        (leaf.module,) if leaf.module else (),
        ops,
        Use.FORCED,
    )


def _priced(kind: str, what: str, names: tuple[str, ...], ops: list[RanOp], use: Use) -> Finding:
    """A finding with its price: the ops that ran for this use and for no better one."""
    paid = [op for op in ops if op.in_node and max(op.uses, default=Use.NOTHING) is use]
    total = sum(each for op in ops for each, for_ in zip(op.flops, op.uses, strict=True) if for_ is use)
    where = list(dict.fromkeys(op.module or "the loss" for op in paid if any(op.flops)))
    if paid:
        price = f"; {len(paid)} ops of the backward ran only for this"
        what += price + (f", in {listed(where, 4)}" if where else "")
    return Finding(kind, True, what, names, total)


def _discarded(ops: list[RanOp]) -> Iterator[tuple[RanOp, int]]:
    """Ops whose FLOPs went into a gradient that was thrown away, one for each module, node and op, with their FLOPs."""
    total: Counter[tuple[str, str, str]] = Counter()
    example: dict[tuple[str, str, str], RanOp] = {}
    for op in ops:
        wasted = sum(each for each, use in zip(op.flops, op.uses, strict=True) if use is Use.DISCARDED)
        if wasted:
            key = (op.module, op.node, op.name)
            total[key] += wasted
            example.setdefault(key, op)
    for key, op in example.items():
        yield op, total[key]


def _moved(run: Run, moved: list[str]) -> Iterator[Finding]:
    """Parameters and buffers that changed and should not have, and buffers that may."""
    names = set(moved)
    trained = {id(parameter) for parameter in run.parameters()}
    frozen = tuple(n for n, p in run.model.named_parameters() if n in names and id(p) not in trained)
    if frozen:
        what = f"frozen parameters changed: {listed(list(frozen), 4)}. An optimizer must own run.parameters() only"
        yield Finding("frozen-moved", True, what, frozen)
    kept: list[str] = []
    free: list[str] = []
    for prefix, module in run.model.named_modules():
        lasting = lasting_buffers(module)
        for buffer in module._buffers:
            name = f"{prefix}.{buffer}" if prefix else buffer
            if name in names:
                guarded = prefix in run.frozen_modules and buffer in lasting
                (kept if guarded else free).append(name)
    if kept:
        what = (
            f"buffers of frozen modules changed: {listed(kept, 4)}. They were written outside of a call in train mode"
        )
        yield Finding("buffer-moved", True, what, tuple(kept))
    if free:
        why = "their modules train" if run.freeze_buffers else "freeze_buffers is off"
        yield Finding(
            "buffer-drift", False, f"buffers moved, as in plain PyTorch ({why}): {listed(free, 4)}", tuple(free)
        )


def _unchecked(digest: dict[str, bytes | None]) -> Iterator[Finding]:
    names = tuple(name for name, each in digest.items() if each is None)
    if names:
        yield Finding("unchecked", False, f"whether these changed could not be read: {listed(list(names), 4)}", names)


def _kernels(run: Run, fell_back: Counter[tuple[str, str]]) -> Iterator[Finding]:
    for (op, why), times in sorted(fell_back.items()):
        yield Finding("fallback", False, f"{op} ran {times} times by eager's own kernel: {why}", (op,))
    if threading.get_ident() != run._thread:
        yield Finding("kernels-off", False, "this thread keeps what eager keeps: the run was made in another")


def _kept(kept: int, planned: int | None) -> Iterator[Finding]:
    if planned is not None and kept > planned:
        more = f"autograd kept {kept:,} bytes when the loss returned, {kept - planned:,} more than planned"
        yield Finding(
            "kept-more", True, f"{more}: another batch than the one traced, or something that holds the graph"
        )


def _fallback_counts() -> Counter[tuple[str, str]]:
    return Counter({(op, why): times for op, whys in fallbacks().items() for why, times in whys.items()})


def _grouped(ops: list[RanOp]) -> tuple[BackwardOp, ...]:
    """Calls that are alike in one row, in the order in which they ran first."""
    rows: dict[tuple[Any, ...], BackwardOp] = {}
    for op in ops:
        use = (
            "recompute" if op.recomputed else max(op.uses, default=Use.NOTHING).name.lower() if op.in_node else "other"
        )
        key = (op.name, op.node, op.module, op.mask, use)
        row = rows.get(key) or BackwardOp(*key, num_calls=0, flops=0)
        rows[key] = replace(row, num_calls=row.num_calls + 1, flops=row.flops + sum(op.flops))
    return tuple(rows.values())
