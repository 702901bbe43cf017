"""What was traced: the facts that a reader needs to judge a figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frostline.reports.units import bytes_text

if TYPE_CHECKING:
    from frostline.tracing.trace import Trace


@dataclass(frozen=True)
class Header:
    """The top of every report.

    Attributes:
        modes: ``"train"``, ``"eval"``, or what is mixed.
        attention: the kernels attention runs on; empty if there is none.
        forward: ``"fake"`` (nothing was computed) or ``"real"``.
    """

    model: str
    num_parameters: int
    parameter_bytes: int
    dtypes: tuple[str, ...]
    modes: str
    inputs: tuple[str, ...]
    device: str
    torch: str
    attention: str
    forward: str

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def lines(self) -> Iterator[str]:
        """Two lines of facts; a renderer may wrap them at the commas."""
        kept = bytes_text(self.parameter_bytes)
        yield f"{self.model}, {self.num_parameters:,} parameters, {' and '.join(self.dtypes)}, {kept}, {self.modes}"
        facts = [f"input {', '.join(self.inputs)}" if self.inputs else "input made by the step itself", self.device]
        facts.append(f"torch {self.torch}")
        if self.attention:
            facts.append(f"attention {self.attention}")
        facts.append(f"{self.forward} forward")
        yield ", ".join(facts)


def header(trace: Trace) -> Header:
    """The header of a trace."""
    parameters = trace.parameter_list
    sizes: Counter[str] = Counter()
    for parameter in parameters:
        sizes[_short(parameter.dtype)] += parameter.numel()
    return Header(
        model=type(trace.model).__name__,
        num_parameters=sum(sizes.values()),
        parameter_bytes=trace.parameter_bytes,
        dtypes=tuple(name for name, _ in sizes.most_common()),
        modes=_modes(trace),
        inputs=tuple(_inputs(trace)),
        device=str(trace.device),
        torch=torch.__version__.split("+")[0],
        attention=", ".join(_attention(trace)),
        forward=trace.forward,
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _modes(trace: Trace) -> str:
    modules = trace.modes
    if len({training for _, training in modules}) == 1:
        return "train mode" if modules[0][1] else "eval mode"
    mode = modules[0][1]
    other = [name for name, training in modules if training is not mode and name]
    return (
        f"mixed modes: {'train' if mode else 'eval'}, but {len(other)} of {len(modules)} modules in "
        f"{'eval' if mode else 'train'} ({other[0]}{', ...' if len(other) > 1 else ''})"
    )


def _inputs(trace: Trace) -> Iterator[str]:
    rehearsal = trace.rehearsal
    for value in rehearsal.args:
        yield from _described(value, "")
    for name, value in rehearsal.kwargs.items():
        yield from _described(value, name)


def _described(value: Any, name: str) -> Iterator[str]:
    label = f"{name} " if name else ""
    if isinstance(value, Tensor):
        yield f"{label}{_short(value.dtype)}{list(value.shape)}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _described(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _described(item, name)


def _attention(trace: Trace) -> list[str]:
    """Which kernels attention runs on, as found on the tape."""
    kernels: Counter[str] = Counter()
    calls = list(trace.tape_on.calls)
    while calls:
        call = calls.pop()
        called = call.name.rpartition(".")[2]
        names = [str(op.target).split(".")[1] for op in call.ops()] if call.kind != "checkpoint" else []
        fused = [n for n in names if n.startswith("_scaled_dot_product_") and not n.endswith("_backward")]
        inner_math = (
            call.kind == "torch"
            and called == "scaled_dot_product_attention"
            and not [n for n in fused if not n.endswith("_math")]
        )
        if inner_math:
            kernels["math"] += 1
        elif fused and (call.kind == "op" or called == "scaled_dot_product_attention"):
            kernels.update(_kernel_name(n) for n in fused)
        elif call.kind != "op":
            calls.extend(call.children)
            if called == "softmax" and _follows_matmul(call, trace):
                kernels["written out (matmul, softmax)"] += 1
    return [name for name, _ in kernels.most_common()]


def _kernel_name(op: str) -> str:
    """
    >>> _kernel_name("_scaled_dot_product_flash_attention_for_cpu"), _kernel_name("_scaled_dot_product_attention_math")
    ('flash (cpu)', 'math')
    """
    name = op.removeprefix("_scaled_dot_product_")
    where = name.partition("_for_")[2]
    kind = name.partition("_for_")[0].replace("attention_math", "math").replace("attention", "").strip("_")
    return f"{kind or 'fused'} ({where})" if where else kind or "fused"


def _follows_matmul(call: Any, trace: Trace) -> bool:
    """Whether a softmax is over scores: at least three dimensions, in a step that multiplies batches of matrices."""
    shape = call.inputs[0].meta.shape if call.inputs else ()
    if len(shape) < 3:
        return False
    cached = trace.__dict__.get("_batched_matmul")
    if cached is None:
        ops = (op for top in trace.tape_on.calls for op in top.ops())
        cached = trace.__dict__["_batched_matmul"] = any("bmm" in str(op.target) for op in ops)
    return bool(cached)
