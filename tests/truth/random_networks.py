"""Random networks: drafts that hypothesis draws, written out as Python that surely runs.

A `Draft` is an op's name and a few numbers. `write` turns drafts into a `Program`: it carries each one out on real
tensors with every parameter trainable, lets the draft's numbers choose among the operands that fit, and leaves out
what torch refuses. So every list of drafts is a valid network, and so is every shorter list of them. A failing example
prints as a short script of torch calls.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from tests.cases import Case, build
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MOST_ELEMENTS = 400  # larger results are left out: a program of products grows fast
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


# Functions of a user's ------------------------------------------------------------------------------------------------


class Polite(torch.autograd.Function):
    """``x @ y``; computes what is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x @ y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        needs_x, needs_y = ctx.needs_input_grad
        return grad @ y.mT if needs_x else None, x.mT @ grad if needs_y else None


class Rude(Polite):
    """Computes both gradients, asked or not."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        return grad @ y.mT, x.mT @ grad


class Thrifty(Polite):
    """Saves only what the gradients asked for will read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        needs_x, needs_y = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_y else None, y if needs_x else None)
        return x @ y


class Hoarder(torch.autograd.Function):
    """Keeps a copy where saved-tensor hooks do not look."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.squared, ctx.y = x.square(), y
        return ctx.squared @ y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_y = ctx.needs_input_grad
        return 2 * ctx.squared.sqrt() * (grad @ ctx.y.mT), ctx.squared.mT @ grad if needs_y else None


class Redo(torch.autograd.Function):
    """Runs autograd itself in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return torch.tanh(x @ y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            x, y = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            out = torch.tanh(x @ y)
        return torch.autograd.grad(out, (x, y), grad)


class Cut(torch.autograd.Function):
    """Gives its first argument no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return None, x.mT @ grad


class Double(torch.autograd.Function):
    """Changes its argument in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Same(torch.autograd.Function):
    """Returns its argument as it is; turns the gradient around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Pair(torch.autograd.Function):
    """Two results, the second not differentiable; undefined gradients arrive as None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        out, sign = x * x, torch.sign(x)
        ctx.save_for_backward(x, sign)
        ctx.mark_non_differentiable(sign)
        ctx.set_materialize_grads(False)
        return out, sign

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Tensor | None:
        x, _sign = ctx.saved_tensors
        return None if grad is None else 2 * x * grad


class Split(torch.autograd.Function):
    """Two differentiable results, of which a program may use one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y)
        ctx.set_materialize_grads(False)
        return x @ y, (x * 0.5) @ y

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        grads = [(first, 1.0), (second, 0.5)]
        grad_x = [grad @ y.mT * scale for grad, scale in grads if grad is not None]
        grad_y = [(x * scale).mT @ grad for grad, scale in grads if grad is not None]
        return sum(grad_x[1:], grad_x[0]), sum(grad_y[1:], grad_y[0])


FUNCTIONS = {cls.__name__: cls for cls in (Polite, Rude, Thrifty, Hoarder, Redo, Cut, Double, Same, Pair, Split)}
NAMES = {"torch": torch, "nn": nn, "F": F, "checkpoint": checkpoint, **FUNCTIONS}


# Programs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """One instruction before it is known what it will apply to."""

    op: str
    picks: tuple[int, ...]
    body: tuple[Draft, ...] = ()

    def __repr__(self) -> str:
        body = f", {self.body!r}" if self.body else ""
        return f"Draft({self.op!r}, {self.picks!r}{body})"


@dataclass(frozen=True)
class Program:
    """A network as source: what its module holds, what its forward does, the inputs' shapes."""

    setup: tuple[str, ...]
    lines: tuple[str, ...]
    inputs: tuple[str, ...] = ()

    def __str__(self) -> str:
        given = [f"x{i} = {source}" for i, source in enumerate(self.inputs)]
        return "\n".join(["", *given, *(f"self.{line}" for line in self.setup), "def forward():", *self._body()])

    def _body(self) -> list[str]:
        return ["    " + line for line in self.lines]

    def case(self, name: str = "random network") -> Case:
        return build(self._case, name)

    def _case(self) -> Case:
        model = Network(self)
        return Case(model, tuple(eval(source, dict(NAMES)) for source in self.inputs))


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    return compile(source, "<random network>", "exec")


class Network(nn.Module):
    """Runs a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        for line in program.setup:
            name, _, source = line.partition(" = ")
            setattr(self, name, eval(source, dict(NAMES)))
        arguments = ", ".join(f"x{i}" for i in range(len(program.inputs)))
        namespace: dict[str, Any] = dict(NAMES)
        exec(_compiled("\n".join([f"def forward(self, {arguments}):", *program._body()])), namespace)
        self.run = namespace["forward"]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


@contextlib.contextmanager
def bounded(depth: int = 12) -> Iterator[None]:
    """Refuse a backward that runs another, that runs another: a reentrant checkpoint may come upon itself for ever."""
    run, nested = torch.autograd._engine_run_backward, 0

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal nested
        if nested >= depth:
            raise RuntimeError("backward inside backward without end")
        nested += 1
        try:
            return run(*args, **kwargs)
        finally:
            nested -= 1

    with mock.patch.object(torch.autograd, "_engine_run_backward", count):
        yield


def _usable(tensor: Tensor) -> bool:
    """Whether autograd still answers for a tensor: not for some views after a write to their base."""
    try:
        return tensor.grad_fn is None or True
    except RuntimeError:
        return False


# Writing --------------------------------------------------------------------------------------------------------------

Pick = Callable[[Tensor], bool]


def any_tensor(_: Tensor) -> bool:
    return True


class Spoilt(Exception):  # noqa: N818  a finding, not a mistake
    """An in-place statement, by number, changed what an earlier one had saved."""


class Writer:
    """Carries drafts out on real tensors and writes down what worked.

    ``banned``: which in-place statements, by number, to leave out.
    """

    def __init__(self, inputs: Sequence[str], banned: Set[int] = frozenset()) -> None:
        self.model = nn.Module()
        self.inputs = tuple(inputs)
        self.setup: list[str] = []
        self.lines: list[str] = []
        self.indent = ""
        self.names: list[str] = []  # floating-point tensors in reach, the oldest first
        self.made = 0
        self.changes = 0
        self.banned = banned
        self.protected: set[int] = set()  # storages that must not be written to here
        self.storages: list[Any] = []  # all that were seen: an address used again would protect another
        self.autocast = False
        self.in_checkpoint = False
        self.namespace: dict[str, Any] = {**NAMES, "self": self.model}
        for i, source in enumerate(inputs):
            self._remember(f"x{i}", eval(source, self.namespace))

    # -- operands ------------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        found: Tensor = eval(name, self.namespace)
        return found

    def fitting(self, fits: Pick) -> list[str]:
        """The newest first: that is what a smaller number stands for."""
        return [name for name in reversed(self.names) if _usable(self.tensor(name)) and fits(self.tensor(name))]

    def some(self, number: int, fits: Pick = any_tensor) -> str | None:
        names = self.fitting(fits)
        if number < 24:  # two times in three one of the last few, so that programs grow long rather than wide
            names = names[:4]
        return names[number % len(names)] if names else None

    def writable(self, number: int, fits: Pick = any_tensor) -> str | None:
        return self.some(number, lambda t: t.untyped_storage()._cdata not in self.protected and fits(t))

    def parameter(self, number: int, shape: Sequence[int], dtype: torch.dtype) -> str:
        """A tensor of this shape that there is, or (every third time, or for want of one) a new parameter."""
        fits = self.fitting(lambda t: t.shape == tuple(shape) and (t.dtype == dtype or self.autocast))
        if fits and number % 3 != 2:
            return fits[number // 3 % len(fits)]
        kind = "" if dtype == torch.float32 else f", dtype={dtype}"
        return self.hold("p", f"nn.Parameter(torch.randn({tuple(shape)}{kind}))")

    def module(self, number: int, source: str) -> str:
        """A module; every other time one already there."""
        there = [line.partition(" = ")[0] for line in self.setup if line.endswith(f" = {source}")]
        return f"self.{there[-1]}" if there and number % 2 == 0 else self.hold("m", source)

    def hold(self, letter: str, source: str) -> str:
        name = f"{letter}{len(self.setup)}"
        setattr(self.model, name, eval(source, self.namespace))
        self.setup.append(f"{name} = {source}")
        if letter == "p":
            self._remember(f"self.{name}", getattr(self.model, name))
        for parameter in getattr(self.model, name).parameters() if letter == "m" else [getattr(self.model, name)]:
            self.protected.add(parameter.untyped_storage()._cdata)
        return f"self.{name}"

    # -- statements ----------------------------------------------------------------------------------------------------

    def write(self, drafts: Sequence[Draft]) -> None:
        for draft in drafts:
            a, b, c, d = draft.picks
            if draft.op in BLOCKS:
                BLOCKS[draft.op](self, draft)
                continue
            source = OPS[draft.op](self, a, b, c, d)
            if source is None:
                continue
            if draft.op not in CHANGES:
                self.say(source)
                continue
            self.changes += 1
            if self.changes not in self.banned and self.say(source) and not self._goes_back(self.names[-1]):
                raise Spoilt(self.changes)

    def _goes_back(self, name: str) -> bool:
        """Whether a backward from this tensor finds what it saved as it was."""
        tensor = self.tensor(name)
        if not _usable(tensor) or not tensor.requires_grad or tensor.grad_fn is None:
            return True
        try:
            with bounded():
                torch.autograd.backward(tensor.sum(), retain_graph=True)
        except RuntimeError:
            return False
        finally:
            self.model.zero_grad()
        return True

    def say(self, source: str, *names: str, keep: bool = True) -> bool:
        """Run one statement; write it down if torch agrees. An expression gets names for what it returns."""
        self.made += 1
        try:
            if not keep:
                exec(source, self.namespace)
                result = None
            else:
                result = eval(source, self.namespace)
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
            return False
        if not keep:
            self.lines.append(self.indent + source)
            return True
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if not all(self._keeps(each) for each in results):
            return False
        targets = list(names) or [f"v{self.made}" + (f"_{i}" if i else "") for i in range(len(results))]
        for name, each in zip(targets, results, strict=True):
            self._remember(name, each)
        comma = "," if isinstance(result, (tuple, list)) and len(results) == 1 else ""
        self.lines.append(f"{self.indent}{', '.join(targets)}{comma} = {source}")
        return True

    def _keeps(self, value: Any) -> bool:
        if not (isinstance(value, Tensor) and _usable(value) and value.dim() <= 4):
            return False
        # A reentrant checkpoint that returns a parameter as it is takes away that parameter's requires_grad.
        stripped = self.in_checkpoint and isinstance(value, nn.Parameter)
        return 0 < value.numel() <= MOST_ELEMENTS and not stripped

    def _remember(self, name: str, tensor: Tensor) -> None:
        self.storages.append(tensor.untyped_storage())
        if not name.startswith("self."):
            self.namespace[name] = tensor
        if tensor.is_floating_point():
            self.names.append(name)

    @contextlib.contextmanager
    def block(self, header: str) -> Iterator[None]:
        """Statements written inside are indented under ``header``; without any, neither is."""
        start = len(self.lines)
        self.lines.append(self.indent + header)
        before, self.indent = self.indent, self.indent + "    "
        try:
            yield
        finally:
            self.indent = before
            if len(self.lines) == start + 1:
                self.lines.pop()


# Ops: (writer, four numbers) -> an expression, or None where nothing fits ---------------------------------------------

Op = Callable[[Writer, int, int, int, int], "str | None"]
OPS: dict[str, Op] = {}
CHANGES: set[str] = set()  # ops that write in place
BLOCKS: dict[str, Callable[[Writer, Draft], None]] = {}


def op(function: Op) -> Op:
    OPS[function.__name__] = function
    return function


def change(function: Op) -> Op:
    CHANGES.add(function.__name__)
    return op(function)


def block(function: Callable[[Writer, Draft], None]) -> Callable[[Writer, Draft], None]:
    BLOCKS[function.__name__] = function
    return function


def nth(choices: Sequence[str], number: int) -> str:
    return choices[number % len(choices)]


def at_least(dim: int) -> Pick:
    return lambda t: t.dim() >= dim


ELEMENTWISE = (
    "torch.relu({})", "torch.tanh({})", "{} * 0.5", "F.gelu({})", "{}.square()", "torch.sigmoid({})", "-{}",
    "{} + 1", "torch.sin({})", "F.silu({})", "{}.abs()", "F.softplus({})", "{}.clone()", "{}.contiguous()",
    "{}.clamp(min=0)", "{}.masked_fill({} > 0, 0.5)", "{}.pow(3)", "2 / ({}.square() + 1)", "F.hardtanh({})",
    "F.elu({})", "torch.exp({}).reciprocal()",
)  # fmt: skip


@op
def elementwise(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a)
    return name and nth(ELEMENTWISE, b).replace("{}", name)


ROWWISE = (
    "torch.softmax({}, -1)", "F.layer_norm({}, {}.shape[-1:])", "F.dropout({}, 0.3)", "{}.sum(0)",
    "{}.mean(-1, keepdim=True)", "{}.sum(0, keepdim=True)", "F.log_softmax({}, 0)", "{}.amax(-1, keepdim=True)",
    "{}.max(-1).values", "{}.cumsum(0)", "{}.sort(-1).values",
    "torch.linalg.vector_norm({}, dim=-1, keepdim=True)", "F.normalize({}, dim=-1)", "{}.var(-1, correction=0)",
    "{}.logsumexp(-1)", "{}.flip(0)", "{}.roll(1, 0)", "F.rms_norm({}, {}.shape[-1:])", "F.dropout({}, 0.0)",
    "F.dropout({}, 0.5, training=False)", "{}.topk(1, -1).values", "F.glu({}, -1)", "{}.std(0, keepdim=True)",
    "{}.prod(-1)", "{}.tril()", "F.pad({}, (1, 1))", "torch.fft.rfft({}.float()).abs()",
    "{}.repeat_interleave(2, 0)", "{}.median(-1).values", "torch.std_mean({}, -1)", "torch.aminmax({}, dim=-1)",
    "torch.linalg.norm({})",
)  # fmt: skip


@op
def rowwise(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, at_least(1))
    return name and nth(ROWWISE, b).replace("{}", name)


VIEWS = (
    "{}.transpose(0, -1)", "{}[0]", "{}[1:]", "{}[..., :2]", "{}.reshape(-1)", "{}.reshape({}.shape[0], -1)",
    "{}.unsqueeze(0)", "{}.unsqueeze(1)", "{}.squeeze()", "{}.mT", "{}[..., ::2]", "{}.view(-1, {}.shape[-1])",
    "{}.expand(2, *{}.shape)", "{}.movedim(0, -1)", "{}.flatten(0, 1)", "{}.chunk(2, -1)", "{}.split(1, 0)",
    "{}.unbind(0)", "{}.tensor_split(2, 0)", "{}.diagonal()", "{}.narrow(0, 0, 1)", "{}.unfold(-1, 2, 1)",
    "{}.view_as({})", "{}.T", "{}.detach()", "{}[:]", "{}.select(-1, 0)",
    "{}.permute(*range({}.dim() - 1, -1, -1))",
)  # fmt: skip


@op
def view(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, at_least(1))
    return name and nth(VIEWS, b).replace("{}", name)


@op
def cast(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a)
    return name and f"{name}.to({DTYPES[b % 3]})"


def broadcasts(shape: torch.Size) -> Pick:
    def fits(t: Tensor) -> bool:
        with contextlib.suppress(RuntimeError):
            return torch.broadcast_shapes(t.shape, shape) is not None
        return False

    return fits


BINARY = (
    "{} + {y}", "{} * {y}", "{} - {y}", "torch.maximum({}, {y})", "{} / ({y}.square() + 1)",
    "torch.where({} > 0, {}, {y})", "torch.add({}, {y}, alpha=2)", "torch.addcmul({}, {y}, {y})",
    "torch.lerp({}, {y}.to({}.dtype), 0.3)", "torch.atan2({}, {y})", "torch.hypot({}, {y})",
    "F.mse_loss({}, {y}.expand_as({}))",
)  # fmt: skip


@op
def binary(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a)
    other = name and w.some(c, broadcasts(w.tensor(name).shape))
    return name and other and nth(BINARY, b).replace("{}", name).replace("{y}", other)


@op
def join(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, at_least(1))
    if name is None:
        return None
    x = w.tensor(name)
    other = w.some(c, lambda t: t.dim() == x.dim() and t.shape[1:] == x.shape[1:]) or name
    alike = w.some(c, lambda t: t.shape == x.shape) or name
    return nth((f"torch.cat([{name}, {other}])", f"torch.stack([{name}, {alike}], {d % 2})",
                f"torch.cat([{name}, {alike}], -1)", f"torch.cat([{name}, {name}, {other}])"), b)  # fmt: skip


@op
def linear(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, at_least(1))
    if name is None:
        return None
    x = w.tensor(name)
    weights = w.fitting(lambda t: t.dim() == 2 and t.shape[1] == x.shape[-1] and (t.dtype == x.dtype or w.autocast))
    if weights and b % 3 != 2:
        weight = weights[b // 3 % len(weights)]
    else:
        weight = w.parameter(2, (1 + d % 4, x.shape[-1]), x.dtype)
    bias = f", {w.parameter(c // 2, w.tensor(weight).shape[:1], x.dtype)}" if c % 2 else ""
    return f"F.linear({name}, {weight}{bias})"


@op
def linear_module(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, lambda t: t.dim() >= 1 and (t.dtype == torch.float32 or w.autocast))
    if name is None:
        return None
    return f"{w.module(b, f'nn.Linear({w.tensor(name).shape[-1]}, {1 + d % 4})')}({name})"


def multiplies(x: Tensor, *, loose: bool) -> Pick:
    def fits(y: Tensor) -> bool:
        if not (y.dtype == x.dtype or loose) or y.dim() == 0:
            return False
        return y.shape[-2 if y.dim() > 1 else -1] == x.shape[-1]

    return fits


PRODUCTS = ("{} @ {y}", "torch.matmul({}, {y})", "Polite.apply({}, {y})", "Rude.apply({}, {y})",
            "Thrifty.apply({}, {y})", "Hoarder.apply({}, {y})", "Redo.apply({}, {y})", "Cut.apply({}, {y})",
            "Split.apply({}, {y})")  # fmt: skip


@op
def matmul(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, at_least(1))
    other = name and w.some(c, multiplies(w.tensor(name), loose=w.autocast))
    if name is None or other is None:
        return None
    if b % 2 and (w.tensor(name).dim() != 2 or w.tensor(other).dim() != 2):
        b = 0  # the Functions' gradients do not sum over what broadcasting added
    return nth(PRODUCTS, 0 if b % 2 == 0 else 1 + b // 2).replace("{}", name).replace("{y}", other)


@op
def function(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a)
    return name and nth(("Same.apply({})", "Pair.apply({})"), b).replace("{}", name)


@op
def product(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    """Products of three, and batched ones."""
    name = w.some(a, lambda t: t.dim() in (2, 3))
    if name is None:
        return None
    x = w.tensor(name)
    same = lambda t: t.dtype == x.dtype or w.autocast  # noqa: E731
    if x.dim() == 2:
        other = w.some(c, lambda t: same(t) and t.dim() == 2 and t.shape[0] == x.shape[1])
        if other is None:
            return None
        bias = w.some(d, lambda t: same(t) and t.dim() <= 2 and t.shape[-1:] in (w.tensor(other).shape[1:], (1,)))
        vector = w.some(d, lambda t: same(t) and t.shape == x.shape[1:])
        choices = [f"torch.mm({name}, {other})", f"torch.einsum('ij,jk->ki', {name}, {other})"]
        if bias:
            choices += [f"torch.addmm({bias}, {name}, {other})",
                        f"torch.addmm({bias}, {name}, {other}, beta=0.5, alpha=2)"]  # fmt: skip
        if vector:
            choices += [f"torch.mv({name}, {vector})", f"torch.einsum('ij,j->i', {name}, {vector})"]
        return nth(choices, b)
    batched = lambda t: same(t) and t.dim() == 3 and t.shape[0] == x.shape[0]  # noqa: E731
    other = w.some(c, lambda t: batched(t) and t.shape[1] == x.shape[2])
    rows = w.some(c, lambda t: batched(t) and t.shape[2] == x.shape[2])
    weight = w.some(c, lambda t: same(t) and t.dim() == 2 and t.shape[1] == x.shape[2])
    choices = [f"torch.bmm({name}, {name}.mT)", f"torch.einsum('bti,bsi->bts', {name}, {rows or name})",
               f"F.scaled_dot_product_attention({name}, {rows or name}, {rows or name})",
               f"torch.einsum('bti,bti->bt', {name}, {name})"]  # fmt: skip
    if other:
        y = w.tensor(other)
        bias = w.some(d, lambda t: same(t) and t.dim() <= 3 and t.shape[-1:] in (y.shape[2:], (1,)))
        choices += [f"torch.bmm({name}, {other})", f"{name} @ {other}"]
        if bias:
            choices += [f"torch.baddbmm({bias}, {name}, {other})", f"torch.baddbmm({bias}, {name}, {other}, beta=2)"]
    if weight:
        choices += [f"torch.einsum('bti,oi->bto', {name}, {weight})", f"torch.einsum('bti,oi->ot', {name}, {weight})",
                    f"{name} @ {weight}.mT"]  # fmt: skip
    return nth(choices, b)


@op
def convolution(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, lambda t: t.dim() == 3 and t.shape[-1] >= 2)
    if name is None:
        return None
    x = w.tensor(name)
    if b % 4 == 0:
        weight = w.parameter(c, (1 + d % 3, x.shape[1], 2), x.dtype)
        return f"F.conv1d({name}, {weight}, padding={d % 2})"
    if b % 4 == 1:
        weight = w.parameter(c, (2, 1, 2, 2), x.dtype)
        return f"F.conv2d({name}.unsqueeze(1), {weight}, {w.parameter(d, (2,), x.dtype)}, padding=1).flatten(0, 1)"
    if b % 4 == 2:
        weight = w.parameter(c, (x.shape[1], 1 + d % 3, 2), x.dtype)
        return f"F.conv_transpose1d({name}, {weight})"
    weight = w.parameter(c, (x.shape[1], 1, 2), x.dtype)
    return f"F.conv1d({name}, {weight}, groups={x.shape[1]}, stride={1 + d % 2})"


@op
def pool(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, lambda t: t.dim() == 3 and t.shape[-1] >= 2)
    return name and nth(("F.max_pool1d({}, 2)", "F.max_pool2d({}, (1, 2))", "F.avg_pool1d({}, 2)",
                         "F.adaptive_avg_pool1d({}, 1)", "F.interpolate({}, scale_factor=2)",
                         "F.adaptive_max_pool1d({}, 2)"), b).replace("{}", name)  # fmt: skip


@op
def norm(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, lambda t: t.dim() in (2, 3) and t.dtype == torch.float32)
    if name is None:
        return None
    x = w.tensor(name)
    source = nth((f"nn.LayerNorm({x.shape[-1]})", f"nn.BatchNorm1d({x.shape[1]})",
                  f"nn.BatchNorm1d({x.shape[1]}).eval()", f"nn.GroupNorm(1, {x.shape[1]})",
                  f"nn.InstanceNorm1d({x.shape[1]}, affine=True)", f"nn.RMSNorm({x.shape[-1]})",
                  f"nn.PReLU({x.shape[1]})"), b)  # fmt: skip
    return f"{w.module(c, source)}({name})"


@op
def weighted_norm(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, at_least(1))
    if name is None:
        return None
    x = w.tensor(name)
    weight = w.parameter(c, x.shape[-1:], x.dtype)
    if b % 2:
        return f"F.layer_norm({name}, {name}.shape[-1:], {weight}, {w.parameter(d, x.shape[-1:], x.dtype)})"
    return f"F.rms_norm({name}, {name}.shape[-1:], {weight})"


@op
def lookup(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    table = w.some(a, at_least(2)) if b % 4 else w.parameter(2 * (a % 2), (3, 1 + d % 4), DTYPES[c % 3])
    if table is None:
        return None
    rows = w.tensor(table).shape[0]
    ids = nth(("torch.tensor([0, 1, 1])", "torch.tensor([[0, 2], [1, 1]])", "torch.tensor([0])"), c)
    if w.tensor(table).dim() == 2 and d % 2:
        return f"F.embedding({ids} % {rows}, {table})"
    return nth((f"{table}[{ids} % {rows}]", f"{table}.index_select(0, torch.tensor([0, {rows - 1}]))",
                f"torch.gather({table}, 0, torch.zeros_like({table}, dtype=torch.int64))",
                f"{table}[{table}.detach().sum(-1) * 0 == 0]"), d // 2 if c % 4 else d // 2 % 3)  # fmt: skip


@op
def recurrent(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, lambda t: t.dim() == 3 and t.dtype == torch.float32)
    if name is None:
        return None
    width = w.tensor(name).shape[-1]
    kind = nth((f"nn.GRU({width}, 2)", f"nn.LSTM({width}, 2)", f"nn.RNN({width}, 2)"), b)
    return f"{w.module(c, kind)}({name})[0]"


@op
def attention(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, lambda t: t.dim() == 3 and t.dtype == torch.float32)
    if name is None:
        return None
    width = w.tensor(name).shape[-1]
    mode = ".eval()" if d % 2 else ""
    module = w.module(c, f"nn.MultiheadAttention({width}, 1, batch_first=True){mode}")
    return f"{module}({name}, {name}, {name}, need_weights={b % 2 == 1})[0]"


FRESH = ("torch.zeros_like({})", "torch.zeros({}.shape)", "torch.randn_like({})",
         "{}.new_zeros(2, {}.shape[-1])", "torch.ones({}.shape, dtype={}.dtype)",
         "torch.empty_like({}).fill_(0.5)", "torch.full_like({}, 0.5)", "torch.zeros(2, *{}.shape, dtype={}.dtype)",
         "torch.arange({}.numel()).view({}.shape).to({}.dtype)")  # fmt: skip


@op
def fresh(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a)
    return name and nth(FRESH, b).replace("{}", name)


@op
def parameter(w: Writer, a: int, b: int, c: int, d: int) -> None:
    name = w.some(a)
    if name is not None:
        x = w.tensor(name)
        w.parameter(2, x.shape[b % 2 :], x.dtype)


# In place -------------------------------------------------------------------------------------------------------------


@change
def change_values(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.writable(a)
    return name and nth(("{}.mul_(0.5)", "{}.relu_()", "{}.add_(1)", "{}.tanh_()", "{}.zero_()", "{}.clamp_(min=0)",
                         "F.silu({}, inplace=True)", "F.dropout({}, 0.3, inplace=True)", "{}.neg_()", "{}.exp_()",
                         "{}.masked_fill_({} > 0, 0.5)", "F.leaky_relu({}, inplace=True)", "{}.normal_()",
                         "Double.apply({})", "{}.detach_()", "{}.requires_grad_()", "{}.sigmoid_()",
                         "{}.square_()"), b).replace("{}", name)  # fmt: skip


INTO = ("{}.add_({y})", "{}.mul_({y})", "{}.copy_({y})", "{}.sub_({y}, alpha=2)", "{}.addcmul_({y}, {y})",
        "{}.lerp_({y}.to({}.dtype).expand_as({}), 0.5)", "{}.div_({y}.square() + 1)")  # fmt: skip


def fills(x: Tensor) -> Pick:
    return lambda t: (
        t.dim() <= x.dim() and broadcasts(x.shape)(t) and torch.broadcast_shapes(t.shape, x.shape) == x.shape
    )


@change
def change_by(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.writable(a)
    other = name and w.some(c, fills(w.tensor(name)))
    return name and other and nth(INTO, b).replace("{}", name).replace("{y}", other)


PARTS = ("[0]", "[:1]", "[..., :1]", "[..., 0]", "[..., ::2]", ".mT", ".view(-1)", ".unsqueeze(0)", "[0][0]",
         ".transpose(0, -1)[0]", ".diagonal()", ".narrow(-1, 0, 1)", ".flatten()[1:]", ".detach()")  # fmt: skip


@change
def change_part(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    """Write through a view made on the spot."""
    name = w.writable(a, at_least(1))
    if name is None:
        return None
    part = f"{name}{nth(PARTS, b)}"
    try:
        x = eval(part, w.namespace)
    except (RuntimeError, IndexError):
        return None
    if d % 3 == 0:
        return f"{part}{nth(('.mul_(0.5)', '.relu_()', '.zero_()', '.tanh_()'), d // 3)}"
    other = w.some(c, fills(x))
    return other and nth(INTO, d // 3).replace("{}", part).replace("{y}", other)


@change
def change_rows(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    """Indexed writes."""
    name = w.writable(a, at_least(1))
    if name is None:
        return None
    x = w.tensor(name)
    rows = w.some(c, lambda t: t.dtype == x.dtype and t.shape == (1, *x.shape[1:]))
    row = w.some(c, lambda t: t.dtype == x.dtype and t.shape == x.shape[1:])
    same = w.some(c, lambda t: t.dtype == x.dtype and t.shape == x.shape)
    choices = [f"{name}.index_fill_(0, torch.tensor([0]), 0.5)"]
    if rows:
        choices += [f"{name}.index_add_(0, torch.tensor([0]), {rows})",
                    f"{name}.index_copy_(0, torch.tensor([0]), {rows})"]  # fmt: skip
    if row:
        choices += [f"{name}.index_put_((torch.tensor([0]),), {row})",
                    f"{name}.index_put_((torch.tensor([0, 0]),), {row}, accumulate=True)"]  # fmt: skip
    if same:
        choices += [f"{name}.masked_scatter_({name} > 0, {same})",
                    f"{name}.scatter_add_(0, torch.zeros_like({name}, dtype=torch.int64), {same})"]  # fmt: skip
    return nth(choices, b)


@change
def change_product(w: Writer, a: int, b: int, c: int, d: int) -> str | None:
    name = w.some(a, lambda t: t.dim() == 2)
    if name is None:
        return None
    x = w.tensor(name)
    other = w.some(c, lambda t: t.dtype == x.dtype and t.dim() == 2 and t.shape[0] == x.shape[1])
    if other is None:
        return None
    y = w.tensor(other)
    target = w.writable(d, lambda t: t.dtype == x.dtype and t.shape == (x.shape[0], y.shape[1]))
    return target and f"{target}.addmm_({name}, {other})"


# Blocks ---------------------------------------------------------------------------------------------------------------


def _with(w: Writer, draft: Draft, header: str, context: Any) -> None:
    with w.block(f"with {header}:"), context:
        w.write(draft.body)


@block
def no_grad(w: Writer, draft: Draft) -> None:
    _with(w, draft, "torch.no_grad()", torch.no_grad())


@block
def enable_grad(w: Writer, draft: Draft) -> None:
    _with(w, draft, "torch.enable_grad()", torch.enable_grad())


@block
def autocast(w: Writer, draft: Draft) -> None:
    before, w.autocast = w.autocast, draft.picks[0] % 3 != 2
    header = f'torch.autocast("cpu", torch.bfloat16, enabled={w.autocast})'
    _with(w, draft, header, torch.autocast("cpu", torch.bfloat16, enabled=w.autocast))
    w.autocast = before


@block
def checkpointed(w: Writer, draft: Draft) -> None:
    """Part of the program as a function given to checkpoint; it may capture what it is not given."""
    a, b, c, d = draft.picks
    given = list(dict.fromkeys(name for name in (w.some(a), w.some(b)) if name is not None))[: 1 + c % 2]
    names, lines, namespace = list(w.names), list(w.lines), dict(w.namespace)
    w.made += 1
    title = f"f{w.made}"
    arguments = [f"a{w.made}{letter}" for letter in "xy"[: len(given)]]
    kind = ("use_reentrant=False", "use_reentrant=True", "use_reentrant=False, early_stop=False")[d // 2 % 3]
    protected = set(w.protected)
    w.protected |= {w.tensor(name).untyped_storage()._cdata for name in names}
    for argument, name in zip(arguments, given, strict=True):
        w._remember(argument, w.tensor(name))
    known, start = len(w.names), len(w.lines)
    before, w.in_checkpoint = w.in_checkpoint, True
    with w.block(f"def {title}({', '.join(arguments)}):"):
        w.write(draft.body)
        w.in_checkpoint = before
        made = [name for name in w.names[known:] if not name.startswith("self.")]
        results = made[-1 - d % 2 :]
        w.lines.append(f"{w.indent}return {', '.join(results)}")
    held = [name for name in w.names[known:] if name.startswith("self.")]
    definition = [line[len(w.indent) :] for line in w.lines[start:]]
    written = w.lines[start:]
    w.names, w.lines, w.protected = names + held, lines, protected | w.protected
    w.namespace.clear()
    w.namespace.update(namespace)
    if not results:
        return
    exec("\n".join(definition), w.namespace)
    w.lines = lines + written
    if not w.say(f"checkpoint({', '.join([title, *given, kind])})"):
        w.lines = lines


DRAFTED = [*OPS, *(["linear", "matmul", "product", "view", "elementwise", "binary"] * 2), *CHANGES]


def write(drafts: Sequence[Draft], inputs: Sequence[str], terms: Sequence[int]) -> Program:
    """The program that drafts stand for; in-place statements that a backward does not survive are left out."""
    banned: set[int] = set()
    while True:
        torch.manual_seed(0)
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            writer = Writer(inputs, banned)
            try:
                writer.write(drafts)
            except Spoilt as spoilt:
                banned.add(spoilt.args[0])
                continue
            program = _finish(writer, terms)
            left = set(range(1, writer.changes + 1)) - banned
            if not left or _trains(program):
                return program
            banned.add(max(left))


def _finish(w: Writer, terms: Sequence[int]) -> Program:
    """The loss: a sum over a few tensors that need a gradient."""
    if not w.setup:
        w.parameter(2, (2,), torch.float32)
    if not w.fitting(lambda t: t.requires_grad):
        w.parameter(2, (2,), torch.float32)
    computed = w.some(0, lambda t: t.requires_grad and t.grad_fn is not None)
    chosen = dict.fromkeys(
        w.some(number, lambda t: t.requires_grad and (t.grad_fn is not None or not computed)) for number in terms
    )
    kinds = ("{}.float().mean()", "{}.float().square().mean()", "{}.double().sum()")
    w.lines.append("return " + " + ".join(nth(kinds, n).format(name) for n, name in zip(terms, chosen, strict=False)))
    return Program(tuple(w.setup), tuple(w.lines), w.inputs)


def _trains(program: Program) -> bool:
    try:
        with bounded():
            program.case().run().backward()
    except RuntimeError:
        return False
    return True


# Drawing --------------------------------------------------------------------------------------------------------------

INPUTS = ("torch.randn(2, 3, 4)", "torch.randn(3, 4)", "torch.randn(4, 4)", "torch.randn(1, 2, 3)", "torch.randn(5)",
          "torch.randn(2, 4, dtype=torch.float64)", "torch.randn(3, 2, dtype=torch.bfloat16)")  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A random network and random subsets of its parameters."""

    drafts: tuple[Draft, ...]
    inputs: tuple[str, ...]
    terms: tuple[int, ...]
    masks: tuple[int, ...] = field(default=(1, 2))

    @functools.cached_property
    def program(self) -> Program:
        return write(self.drafts, self.inputs, self.terms)

    def subsets(self) -> list[list[str]]:
        """As each mask's bits say, over and over."""
        names = [name for name, _ in self.program.case().model.named_parameters()]
        chosen = [[n for i, n in enumerate(names) if mask >> i % 16 & 1] or names[:1] for mask in self.masks]
        return list(map(list, dict.fromkeys(map(tuple, chosen))))


def drafts(depth: int = 2, least: int = 0, most: int = 16) -> st.SearchStrategy[list[Draft]]:
    picks = st.tuples(*[st.integers(0, 35)] * 4)
    plain = st.builds(Draft, st.sampled_from(DRAFTED), picks)
    if depth == 0:
        return st.lists(plain, min_size=least, max_size=most)
    body = drafts(depth - 1, 1, 4).map(tuple)
    blocks = st.builds(Draft, st.sampled_from(list(BLOCKS)), picks, body)
    return st.lists(st.one_of(plain, plain, plain, plain, blocks), min_size=least, max_size=most)


def examples() -> st.SearchStrategy[Example]:
    return st.builds(
        Example,
        drafts(least=4).map(tuple),
        st.lists(st.sampled_from(INPUTS), min_size=1, max_size=3).map(tuple),
        st.lists(st.integers(0, 35), min_size=1, max_size=4).map(tuple),
        st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1)),
    )
