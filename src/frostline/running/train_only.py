"""``fl.train_only``: set a model up so that only a subset trains, and put it back afterwards."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from frostline.errors import FrostlineWarning, RunError
from frostline.kernels import lean_kernels
from frostline.running.buffers import Guard, wholly_frozen
from frostline.running.flags import set_flags, standing
from frostline.subsets import Subset, resolve
from frostline.subsets.names import Names, listed

if TYPE_CHECKING:
    from frostline.costing.cost import Cost
    from frostline.running.audit import Audit


def train_only(model: nn.Module, train: object = None, *, freeze_buffers: bool = True) -> Run:
    """Let only ``train`` train, and at the cost of only that. Undone by leaving the ``with`` block, or by ``close()``.

    >>> import torch, frostline as fl
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2))
    >>> inputs, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])
    >>> with fl.train_only(model, "3") as run:
    ...     optimizer = torch.optim.AdamW(run.parameters())
    ...     for _ in range(5):
    ...         optimizer.zero_grad()
    ...         nn.functional.cross_entropy(model(inputs), labels).backward()
    ...         optimizer.step()
    >>> model[1].num_batches_tracked, model[0].weight.grad, model[0].weight.requires_grad
    (tensor(0), None, True)

    Args:
        model: any eager module. One that is wrapped in ``torch.compile`` gets the flags and buffers only (a
            `FrostlineWarning` says so); parameters of an ``OptimizedModule`` go by the names they have without it.
        train: names, globs, modules, parameters, a predicate, a Plan, a Subset ... (see ``frostline.subsets``). None:
            ``requires_grad`` as set now. Whole parameters only.
        freeze_buffers: keep the buffers of wholly frozen modules as they are; see below.

    Until it is closed, and in this order:

    - the subset requires grad and no other parameter does. A frozen parameter's ``.grad`` is set aside, and given back
      at the end: left in place, an optimizer that owns the parameter would go on moving it, by its momentum too.
      Trained parameters keep the ``.grad`` they have.
    - the buffers of *wholly frozen* modules do not move. A module is wholly frozen if it has parameters of its own and
      none trains; a module without any goes by those inside it, or else by its neighbour's (see
      `frostline.running.buffers.wholly_frozen`). While it is called in train mode it is lent copies, so what it
      computes is to the bit what it computes without frostline: a batch norm still normalises by the batch, and its
      ``running_mean``, ``running_var`` and ``num_batches_tracked`` (with ``momentum=None`` too) stay; so do those of
      ``InstanceNorm(track_running_stats=True)``, the vectors of both kinds of ``spectral_norm``, and what a module of
      yours writes, such as a codebook's moving average: each call starts from the frozen values. Not covered: modules
      in eval mode (torch's read their buffers only); buffers that ``state_dict`` leaves out, which are caches; a
      module that writes the buffers of another; and ``forward`` called by hand, past ``__call__``. ``audit`` sees
      those. Dropout, like every mode, stays as you set it.
    - in the thread that made the run, autograd keeps only what the asked gradients read.

    Keep the run: it is closed, with a `ResourceWarning`, where nothing refers to it any more.

    Raises:
        SubsetError: ``train`` names nothing, or what cannot train.
        RunError: a slice of a tensor is asked for; or the model, or a parameter of it, is in another run.
    """
    return Run(model, train, freeze_buffers=freeze_buffers)


class Run:
    """A model of which only a subset trains, until ``close()``. Made by `train_only`.

    Attributes:
        model: the model.
        subset: what trains.
        frozen_modules: names of the modules whose buffers are kept from moving.
        notes: what a user should know, one sentence each.
        is_open: whether it has not been closed.
    """

    def __init__(self, model: nn.Module, train: object, *, freeze_buffers: bool) -> None:
        self.is_open = False
        self._undo = ExitStack()
        inner: nn.Module = model._orig_mod if isinstance(model, _optimized_module()) else model
        names = Names(inner)
        self.model = model
        self.subset: Subset = resolve(train, inner)
        self.notes: list[str] = []
        self.frozen_modules: tuple[str, ...] = ()
        self.freeze_buffers = freeze_buffers
        self._names = names
        self._thread = threading.get_ident()
        self._entered = False
        _refuse_slices(self.subset)
        with ExitStack() as undo:
            _claim(self, undo.callback)
            set_aside = set_flags(inner, names.params, set(self.subset), undo.callback)
            if set_aside:
                self.notes.append(
                    f".grad of frozen parameters, {set_aside:,} bytes, is set aside until the run is closed: "
                    "model.zero_grad() beforehand frees it"
                )
            if freeze_buffers:
                self._freeze_buffers(inner, undo.callback)
            if is_compiled(model):
                self._note_compiled(undo.callback)
            else:
                undo.enter_context(lean_kernels())
            self._undo = undo.pop_all()
        self.is_open = True

    def _freeze_buffers(self, model: nn.Module, later: Callable[..., object]) -> None:
        frozen = wholly_frozen(model, {id(parameter) for parameter in self.parameters()})
        scripted = [name for name, module in frozen.items() if isinstance(module, torch.jit.ScriptModule)]
        if scripted:
            self.notes.append(f"buffers of scripted modules cannot be kept from moving: {listed(scripted, 3)}")
        guard = Guard()
        later(guard.close)
        for name, module in frozen.items():
            if name not in scripted:
                guard.watch(module, later)
        self.frozen_modules = tuple(name for name in frozen if name not in scripted)

    def _note_compiled(self, later: Callable[..., object]) -> None:
        if torch.__version__ < "2.13":  # what was compiled before does not notice hooks
            torch.compiler.reset()
            later(torch.compiler.reset)
        note = "the model is compiled: a run sets its flags and keeps its buffers, and torch.compile says what is saved"
        self.notes.append(note)
        warnings.warn(note, FrostlineWarning, stacklevel=4)

    # -- what trains ---------------------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that train, by name, in the model's order; those that have the names now."""
        for name in self.subset:
            yield name, standing(self._names.model, name, self._names.params[name])

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train: hand these to the optimizer, which must not own (and so decay) any other."""
        for _, parameter in self.named_parameters():
            yield parameter

    def audit(self, step: Callable[[], Any], strict: bool = False, cost: Cost | None = None) -> Audit:
        """Run one step under a recorder, and say what ran, was kept or changed beyond the plan.

        Args:
            step: called once, without arguments: a real step, with forward, backward and, if you like, the optimizer.
            strict: raise if anything goes beyond the plan.
            cost: what ``trace.cost(..., method="train-only")`` says of such a step: it is not to keep more.

        Raises:
            RunError: the run is closed.
            AuditError: ``strict``, and something went beyond the plan. The step has run all the same.
        """
        from frostline.running.audit import audit

        if not self.is_open:
            raise RunError("the run is closed: there is no plan to hold a step to. Make a new one with fl.train_only.")
        return audit(self, step, strict=strict, planned_bytes=None if cost is None else cost.saved_bytes)

    # -- begin and end -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        if not self.is_open:
            raise RunError("the run is closed, and cannot be entered again. Make a new one with fl.train_only.")
        if self._entered:
            raise RunError(f"the run of {self._spelled()} is entered already: leave its with block first.")
        self._entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Undo everything that the run set up, from any thread. Closing twice is fine."""
        self.is_open = False
        self._undo.close()

    def __del__(self) -> None:
        if self.is_open:
            text = f"{self!r} was dropped, and so it ended: keep it, or use it in a with statement"
            self.close()
            warnings.warn(text, ResourceWarning, source=self, stacklevel=2)

    def __copy__(self) -> Run:
        """The same run: copying what holds one (a trainer, a model) begins no other, and ends none."""
        return self

    def __deepcopy__(self, memo: Any) -> Run:
        return self

    def __reduce__(self) -> Any:
        raise RunError(f"{self!r} cannot be pickled: it is of the model in this process. Pickle its subset.")

    # -- printed -------------------------------------------------------------------------------------------------------

    def _spelled(self) -> str:
        return f"{str(self.subset)!r} of {type(self.model).__name__}"

    def __repr__(self) -> str:
        state = "open" if self.is_open else "closed"
        return f"<train_only {self._spelled()}: {len(self.subset)} of {len(self._names.params)} parameters, {state}>"

    def __str__(self) -> str:
        total = sum(parameter.numel() for parameter in self._names.params.values())
        trained = self.subset.num_parameters()
        lines = [
            f"train only {self._spelled()}{'' if self.is_open else ' (closed)'}",
            f"  trains   {trained:,} of {total:,} elements, in {len(self.subset)} of {len(self._names.params)} tensors",
            *(f"           {match}" for match in self.subset.matched),
        ]
        if self.frozen_modules:
            count = len(self.frozen_modules)
            where = listed([name or "the model itself" for name in self.frozen_modules], 4)
            lines.append(f"  buffers  of {count} frozen module{'s' * (count > 1)} stay as they are: {where}")
        lines += [f"  note     {note}" for note in self.notes]
        return "\n".join(lines)


_RUNS: WeakValueDictionary[int, Run] = WeakValueDictionary()  # by id of every parameter of its model
_LOCK = threading.Lock()


def _claim(run: Run, later: Callable[..., object]) -> None:
    """Make sure that no parameter of the model is in another run."""
    with _LOCK:
        for name, parameter in run._names.params.items():
            other = _RUNS.get(id(parameter))
            if other is not None:
                raise RunError(
                    f"{name!r} is in a run already, that of {other._spelled()}: a parameter can be in one run at a "
                    "time. Close that run first."
                )
        for parameter in run._names.params.values():
            _RUNS[id(parameter)] = run
    later(_release, list(run._names.params.values()))


def _release(parameters: list[nn.Parameter]) -> None:
    with _LOCK:
        for parameter in parameters:
            _RUNS.pop(id(parameter), None)


def _refuse_slices(subset: Subset) -> None:
    """A slice cannot be trained exactly: gradient, optimizer state and decay are of the whole tensor."""
    if not subset.slices:
        return
    name = next(iter(subset.slices))
    entry = f"{name}{subset.slices[name][0]}"
    raise RunError(
        f"{entry!r} is a slice of a tensor, and a run trains whole parameters only: autograd would make the gradient "
        f"of all of {name!r}, and the optimizer would decay the frozen part. Train {name!r} as a whole, or make the "
        "slice a Parameter of its own and have forward put the two together (torch.cat)."
    )


def _optimized_module() -> Any:
    """The class of what ``torch.compile`` returns; without its module having been imported, there is none to meet."""
    module = sys.modules.get("torch._dynamo.eval_frame")
    return () if module is None else module.OptimizedModule


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a module in it, goes through ``torch.compile``."""
    compiled = _optimized_module()
    return any(isinstance(m, compiled) or m._compiled_call_impl is not None for m in model.modules())
