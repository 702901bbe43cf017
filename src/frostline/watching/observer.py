"""Sees a training script through torch's own hooks, and writes down what it did.

The first steps of every optimizer are *inspected*: their graphs are followed and their passes recorded. Later steps are
only looked at: flags, gradients and which optimizer stepped. No random number is drawn and no tensor of the script's is
written.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from frostline.kernels import kernels_active
from frostline.kernels.unseen import unseen
from frostline.probing.page_faults import page_faults
from frostline.running.values import digests, is_plain
from frostline.watching.moves import Moves
from frostline.watching.naming import WRAPPERS, Names, around, holding, shown
from frostline.watching.places import caller
from frostline.watching.ranks import Ranks, is_world
from frostline.watching.record import (
    BufferFact,
    ClipFact,
    ModelFact,
    ModuleFact,
    OptimizerFact,
    ParameterFact,
    PassFact,
    Record,
    WrapFact,
)
from frostline.watching.samples import Samples
from frostline.watching.tape import Replay, Tape, autocast_on, is_transformed, leaves, snapshot, variables
from frostline.watching.values import Values

INSPECTED = 2
"""How many steps of each optimizer are inspected."""
_MOST_INSPECTED = 16
_MOST_PASSES = 8  # recorded within one step
_MOST_MODELS = 8


class _Local(threading.local):
    def __init__(self) -> None:
        self.stack: list[nn.Module] = []
        self.checkpoints: list[bool] = []
        self.norm_type = 2.0


class Observer:
    """Watches from `open` to `close`; ``record`` holds what was seen.

    Args:
        values: also note what flows through the modules; ``values`` then holds it.
        on_step: called after every optimizer step with how many there were; what it raises ends the script.
    """

    def __init__(self, record: Record, on_step: Callable[[int], None] | None = None, *, values: bool = False) -> None:
        self.record = record
        self.values = Values() if values else None
        self.on_step = on_step
        self._undo = ExitStack()
        self._pid = os.getpid()
        self._child_trained = mmap.mmap(-1, 1)  # memory that forked children share
        self._processes = 0
        self._local = _Local()
        self._open = False
        self._backward = 0
        self._inspected = 0
        self._until = INSPECTED  # so many steps, of all optimizers, are inspected
        self._trainable: frozenset[int] | None = None  # at the last step
        self._passes_in_step = 0
        self._names = Names()
        self._by_module: dict[int, ModelFact] = {}
        self._by_parameter: dict[int, ParameterFact] = {}
        self._tape = Tape(self._by_parameter)
        self._tape_thread = 0
        self._by_optimizer: WeakKeyDictionary[Any, OptimizerFact] = WeakKeyDictionary()
        self._strangers: set[int] = set()  # parameters that optimizers hold and that were looked for in the models
        self._fresh: set[int] = set()  # optimizers made after others had stepped: they are to be inspected too
        self._used: list[nn.Module] = []  # models called since the last pass
        self._moves = Moves(record, self._safely)
        self._samples = Samples()
        self._ranks = Ranks(record)
        self._step_ended: tuple[float, int] | None = None  # the last one, if what follows is not inspected

    # -- begin and end -------------------------------------------------------------------------------------------------

    def open(self) -> None:
        with ExitStack() as undo:
            undo.callback(register_module_forward_pre_hook(self._before_module).remove)
            after = register_module_forward_hook(self._after_module, with_kwargs=True, always_call=True)
            undo.callback(modules._global_forward_hooks_with_kwargs.pop, after.id, None)  # (its handle leaves that)
            undo.callback(after.remove)
            undo.callback(register_optimizer_step_pre_hook(self._before_step).remove)
            undo.callback(register_optimizer_step_post_hook(self._after_step).remove)
            undo.enter_context(_replaced(torch.optim.Optimizer, "__init__", self._optimizer_made))
            undo.enter_context(_replaced(torch.autograd, "_engine_run_backward", self._run_backward))
            undo.enter_context(
                _replaced(torch_checkpoint.CheckpointFunction, "forward", self._checkpointed, static=True)
            )
            undo.enter_context(_replaced(clip_grad, "_get_total_norm", self._total_norm))
            undo.enter_context(_replaced(clip_grad, "_clip_grads_with_norm_", self._clipped))
            undo.enter_context(_replaced(BaseProcess, "start", self._process_starts))
            undo.enter_context(_replaced(nn.parallel.DistributedDataParallel, "_ddp_init_helper", self._spread))
            for owner in (torch.distributed, getattr(torch.distributed, "distributed_c10d", None)):
                undo.enter_context(_replaced(owner, "destroy_process_group", self._group_ends))
            undo.callback(self._tape.take)
            self._undo = undo.pop_all()
        self._open = True

    def close(self) -> None:
        """Take everything away, and look at the values a last time."""
        if not self._open:
            return
        self._open = False
        self._safely(self._ranks.meet)
        self._undo.close()
        self._note_processes()
        self._moves.close()
        self._tape.drop()
        self._used.clear()
        self._safely(self._count_samples)
        for model in self.record.models:
            self._safely(_look, model, "last")
        for _, fact in self.record.facts():
            fact.owners = set(self.record.owned.get(id(fact.parameter), ()))

    @property
    def _inspects(self) -> bool:
        """Whether this step is inspected."""
        if self._inspected >= _MOST_INSPECTED:
            return False
        total = self.record.num_steps
        return (
            total < self._until
            or bool(self._fresh)
            or any(0 < each.steps < INSPECTED for each in self.record.optimizers)
        )

    @property
    def _here(self) -> bool:
        return self._open and os.getpid() == self._pid

    # -- models --------------------------------------------------------------------------------------------------------

    def _before_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # (Asked first: torch.compile reads on until here.)
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or self._transformed():
            return
        local = self._local
        if local.stack:
            local.stack.append(module)
            if self._inspects and not self._backward:
                self._module_called(module, args)
            return
        if not self._here or self._backward:
            return
        local.stack.append(module)
        self._tape.take()
        if self._inspects:
            self._safely(self._model_called, module, args)

    def _transformed(self) -> bool:
        """Whether a transform of torch.func is at work, which has its own parameters and its own backward."""
        if is_transformed() and self._here and not self._local.stack:
            self._note("modules are called inside torch.func transforms: what ran there was not seen")
        return is_transformed()

    def _model_called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        inner = _unwrapped(module)
        model = self._model_of(inner, compiled=inner is not module and _is_compiled(module))
        if model is not None:
            model.calls += 1
            if model.place is None and module.training:
                model.place = caller(own=True)
                self._names.look()
            self._module_called(module, args)

    def _module_called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        model = self._by_module.get(id(module))
        fact = None if model is None else model.modules.get(id(module))
        if fact is None:
            return
        checkpoints = self._local.checkpoints
        if checkpoints:
            fact.checkpointed += not any(checkpoints)
        elif torch.is_grad_enabled():
            fact.with_grad += 1
        else:
            fact.without_grad += 1
        fact.training += module.training
        fact.from_trained += any(isinstance(each, Tensor) and each.requires_grad for each in args)

    def _after_module(self, module: nn.Module, args: Any, *rest: Any) -> None:
        """``rest``: keyword arguments and the result; after an error only None."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or is_transformed():
            return
        stack = self._local.stack
        if not stack:
            return
        top = stack[0]
        while stack:  # what an exception skipped goes too
            if stack.pop() is module:
                break
        if (self._samples.asked or self._inspects) and not self._backward and len(rest) == 2 and self._here:
            self._safely(self._look_at_samples, module, top, args, *rest)
        if self.values is not None and len(rest) == 2 and not self._backward and self._here:
            self._safely(self._values_of, module, args, *rest)
        if not stack and len(rest) == 2 and self._inspects and self._here:
            self._safely(self._model_returned, module, args, *rest)

    def _look_at_samples(self, module: nn.Module, top: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        inspect = self._inspects
        if inspect and (model := self._by_module.get(id(module))) is not None and id(module) in model.modules:
            model.modules[id(module)].plain &= not kwargs and _is_row_by_row(args, result)
        self._samples.returned(module, _unwrapped(top), args, kwargs, result, inspect=inspect)

    def _values_of(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        assert self.values is not None
        model = self._by_module.get(id(module))
        if model is None or not torch.is_grad_enabled() or (module._modules and module is not model.module):
            return
        name = self.record.spelled(model, model.modules[id(module)].name)
        self.values.called(name, module, args, kwargs, result, self.record.num_steps + 1, full=self._inspects)

    def _model_returned(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if self._passes_in_step >= _MOST_PASSES or result is None:
            return
        if self._tape_thread not in (0, threading.get_ident()):
            return
        self._tape_thread = threading.get_ident()
        inner = _unwrapped(module)
        model = self._by_module.get(id(inner))
        tensors = list(leaves(result))
        if not tensors or (model is None and not any(tensor.requires_grad for tensor in tensors)):
            return
        if model is not None and all(model.module is not each for each in self._used):
            self._used.append(model.module)
        autocast = autocast_on(tensors[0].device.type)
        self._tape.module_called(inner, args, kwargs, result, autocast, is_model=model is not None)
        self._tape.put()

    def _model_of(self, module: nn.Module, *, compiled: bool = False) -> ModelFact | None:
        """The model that a module is, or is a part of; new ones are taken in."""
        known = self._by_module.get(id(module))
        if known is not None:
            return known
        if isinstance(module, torch.jit.ScriptModule):
            self._note(f"{type(module).__name__} is scripted or jit-traced: neither it nor its parameters were seen")
            return None
        if next(module.parameters(), None) is None:
            return None
        top = _unwrapped(around(module))
        if any(torch.nn.parameter.is_lazy(p) or p.is_meta for p in top.parameters()):  # (others will take their place)
            return None
        model = _facts_of(top, shown(top))
        model.names = self._names.of(top)
        self._names.look()
        if model.compiled or compiled:
            model.compiled = True
            what = model.variable or model.kind
            self._note(f"{what} is compiled: the calls of the modules inside it were not seen")
        before = [each for each in self.record.models if id(each.module) in model.modules]
        for each in before:  # a part was called first
            self.record.models.remove(each)
            for number, fact in each.parameters.items():
                if number in model.parameters:
                    fact.name = model.parameters[number].name
                    model.parameters[number] = fact
        if len(self.record.models) >= _MOST_MODELS:
            self._note(f"more than {_MOST_MODELS} models were called: the later ones were not looked at")
            return None
        self.record.models.append(model)
        for number in model.modules:
            self._by_module[number] = model
        self._by_parameter.update(model.parameters)
        _look(model, "first")
        return model

    def _refresh(self) -> None:
        """Take in what the models have by now: modules and parameters may have been replaced, or be new."""
        for model in self.record.models:
            now = _facts_of(model.module, model.variable)
            if now.parameters.keys() == model.parameters.keys() and now.modules.keys() == model.modules.keys():
                continue
            for number in model.parameters.keys() - now.parameters.keys():
                self._by_parameter.pop(number, None)
            for number in model.modules.keys() - now.modules.keys():
                self._by_module.pop(number, None)
            _keep(model, now)
            self._by_parameter.update(model.parameters)
            self._by_module.update(dict.fromkeys(model.modules, model))
            _look(model, "first")

    # -- optimizers ----------------------------------------------------------------------------------------------------

    def _optimizer_made(self, original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(optimizer, *args, **kwargs)
        if self._here and optimizer not in self._by_optimizer:
            self._optimizer(optimizer, made=True)
        return result

    def _optimizer(self, optimizer: Any, *, made: bool = False) -> OptimizerFact:
        fact = self._by_optimizer.get(optimizer)
        if fact is None:
            number = len(self.record.optimizers)
            fact = OptimizerFact(number, optimizer, caller() if made else None, self._names.of(optimizer))
            self._safely(self._names.look)
            self._safely(self._refresh)
            self.record.optimizers.append(fact)
            self._by_optimizer[optimizer] = fact
            if self.record.num_steps:
                self._fresh.add(number)
        return fact

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._here:
            self._safely(self._look_before_step, optimizer)

    def _look_before_step(self, optimizer: Any) -> None:
        self._tape.take()
        if self._inspects:
            self._ranks.look()
        fact = self._optimizer(optimizer)
        fact.optimizer = optimizer
        self._meet(fact)
        self._look_at_flags()
        if self._inspects:
            fact.step_place = fact.step_place or caller(own=True)
            self._names.look()
        if self.values is not None and self._inspects:
            self.values.before_step()
        self._moves.before(fact, self._by_parameter, inspect=self._inspects)

    def _meet(self, fact: OptimizerFact) -> None:
        """Take in parameters that an optimizer was given since it was made, and that are new in their models."""
        new = {id(each) for each in fact.parameters()} - self._by_parameter.keys() - self._strangers
        if new:
            self._refresh()
            self._strangers |= new

    def _look_at_flags(self) -> None:
        trainable = frozenset(number for number, fact in self._by_parameter.items() if fact.parameter.requires_grad)
        if self._trainable not in (None, trainable):  # (this step's backward is over)
            self._until = self.record.num_steps + 1 + INSPECTED
        self._trainable = trainable
        for fact in self._by_parameter.values():
            parameter = fact.parameter
            if parameter.requires_grad:
                fact.was_trainable = True
            else:
                fact.was_frozen = True
            if parameter.grad is not None:
                fact.with_gradient += 1

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._here:
            return
        self._safely(self._look_after_step, optimizer)
        if self.on_step is not None:
            self.on_step(self.record.num_steps)

    def _look_after_step(self, optimizer: Any) -> None:
        fact = self._optimizer(optimizer)
        self._moves.after(fact)
        self._let_go_of_strangers(fact)
        if self.values is not None and self._inspects:
            self.values.after_step()
        if self._inspects:
            self._inspected += 1
        fact.steps += 1
        if fact.steps >= INSPECTED:
            self._fresh.discard(fact.number)
        self.record.num_steps += 1
        self._passes_in_step = 0
        if not self._inspects:
            self._tape.drop()
            self._used.clear()
        self._look_at_pace()

    def _let_go_of_strangers(self, fact: OptimizerFact) -> None:
        """Keep no optimizer alive all of whose parameters train, and neither are nor meet those that are looked at."""
        numbers = {id(parameter) for parameter in fact.parameters()}
        if numbers <= self.record.stray and not any(numbers & each.reached for each in self.record.passes):
            self.record.stray -= numbers
            fact.optimizer = None

    def _look_at_pace(self) -> None:
        now = time.perf_counter(), page_faults()
        if self._step_ended is not None:
            self.record.pace.add(now[0] - self._step_ended[0], now[1] - self._step_ended[1])
        self._step_ended = None if self._inspects else now

    # -- backward ------------------------------------------------------------------------------------------------------

    def _run_backward(self, original: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._here:
            if self._open:
                self._child_trained[0] = 1
            return original(outputs, *args, **kwargs)
        if is_transformed():
            return original(outputs, *args, **kwargs)
        if self._backward:  # of a reentrant checkpoint
            if self._inspects:
                self._safely(self._look_inside_pass, tuple(outputs))
            return original(outputs, *args, **kwargs)
        self.record.num_passes += 1
        inspect = self._inspects
        if inspect:
            self._safely(self._look_at_pass, tuple(outputs), args, kwargs)
        if inspect or self._samples.asked:
            self._safely(self._look_at_trained, inspect)
        self._tape.take()
        self._backward += 1
        try:
            return original(outputs, *args, **kwargs)
        finally:
            self._backward -= 1

    def _look_at_trained(self, inspect: bool) -> None:
        self._samples.trained(self.record.num_steps, inspect=inspect)

    def _count_samples(self) -> None:
        self.record.samples = self._samples.facts()

    def _look_at_pass(self, roots: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        gradients = tuple(args[0]) if args and args[0] is not None else (None,) * len(roots)
        inputs = args[3] if len(args) > 3 else kwargs.get("inputs")
        accumulates = bool(kwargs.get("accumulate_grad", False))
        found = variables(roots)
        self._find_models(found)
        if inputs:
            wanted = {id(each) for each in inputs if isinstance(each, Tensor)}
            found = {number: each for number, each in found.items() if number in wanted}
        reached = frozenset(found.keys() & self._by_parameter.keys())
        self._reached(reached, accumulates)
        held = frozenset(found.keys() & self.record.owned.keys() if reached else ())  # (an image is in no model)
        given = self._tape.given()
        forced = tuple(
            tuple(each.shape)
            for number, each in found.items()
            if not isinstance(each, nn.Parameter) and number not in given and given
        )
        replay, why = self._replay(roots, gradients)
        self._passes_in_step += 1
        steps = self.record.num_steps
        fact = PassFact(steps, caller(), accumulates, reached | held, replay, why, forced, kernels_active())
        if replay is not None:
            self._let_go_of_those_like(fact)
        self.record.passes.append(fact)

    def _let_go_of_those_like(self, found: PassFact) -> None:
        """Of passes that are alike only the latest is kept, for each holds a batch."""
        for each in self.record.passes:
            if each.replay is not None and (each.place, each.reached) == (found.place, found.reached):
                each.replay, each.unrecorded = None, "a later pass stands for it"

    def _find_models(self, reached: dict[int, Tensor]) -> None:
        """Take in parameters that are new in their models, and the models of those that were reached without a call of
        a module (compiled ones, say).
        """
        if any(n not in self._by_parameter and isinstance(each, nn.Parameter) for n, each in reached.items()):
            self._refresh()
        for number, variable in reached.items():
            if number not in self._by_parameter and isinstance(variable, nn.Parameter):
                module = holding(variable)
                if module is not None:
                    self._model_of(_unwrapped(module), compiled=_is_compiled(module))

    def _look_inside_pass(self, roots: tuple[Any, ...]) -> None:
        reached = frozenset(variables(roots).keys() & self._by_parameter.keys())
        self._reached(reached, accumulates=True)
        if self.record.passes:
            self.record.passes[-1].reached |= reached

    def _reached(self, reached: frozenset[int], accumulates: bool) -> None:
        for number in reached:
            fact = self._by_parameter[number]
            fact.reached += 1
            if accumulates and fact.parameter._backward_hooks:
                self._moves.watch(fact.parameter)

    def _replay(self, roots: tuple[Any, ...], gradients: tuple[Any, ...]) -> tuple[Replay | None, str]:
        if self._passes_in_step >= _MOST_PASSES:
            return None, f"only the first {_MOST_PASSES} passes of a step are recorded"
        entries = self._tape.sealed(roots)
        inside = {id(m) for entry in entries or () if entry.is_model for m in [entry.function]}
        used = tuple(each for each in self._used if any(id(m) in inside for m in each.modules()))
        if not entries or not used:
            return None, "what made the loss of the model's outputs was not seen"
        trainable = frozenset(number for number, fact in self._by_parameter.items() if fact.parameter.requires_grad)
        plain = tuple(None if g is None or g.numel() == 1 else g.detach() for g in gradients)
        self._tape_thread = 0
        replay = Replay(entries, self._tape._roots, plain, used, trainable, snapshot(used))
        self._samples.expect(Counter(id(entry.function) for entry in entries if entry.is_model))
        self._tape.drop()
        self._used.clear()
        return replay, ""

    # -- clipping and checkpoints --------------------------------------------------------------------------------------

    def _total_norm(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self._here:
            self._local.norm_type = kwargs.get("norm_type", args[1] if len(args) > 1 else 2.0)
        return original(*args, **kwargs)

    def _clipped(
        self, original: Any, parameters: Any, max_norm: float, total_norm: Tensor, *args: Any, **kw: Any
    ) -> Any:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if self._here and self._inspects:
            self._safely(self._look_at_clip, parameters, max_norm, total_norm)
        return original(parameters, max_norm, total_norm, *args, **kw)

    def _look_at_clip(self, parameters: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
        owned = self.record.owned
        given = [p for p in parameters if p.grad is not None]
        foreign = frozenset(id(p) for p in given if id(p) not in owned and id(p) in self._by_parameter)
        ours = [p.grad for p in given if id(p) in owned and p.grad is not None]
        if not foreign or not ours:
            return
        norms = torch.stack([torch.linalg.vector_norm(g.detach(), self._local.norm_type).cpu() for g in ours])
        owned_norm = float(torch.linalg.vector_norm(norms, self._local.norm_type))
        self.record.clips.append(ClipFact(caller(), float(max_norm), float(total_norm), owned_norm, foreign))

    def _checkpointed(self, original: Any, ctx: Any, function: Any, preserve: Any, *args: Any) -> Any:
        if not self._here:
            return original(ctx, function, preserve, *args)
        place = caller() if self._inspects else None
        if place is not None:
            self.record.checkpoint_places[place] += 1
        checkpoints = self._local.checkpoints
        checkpoints.append(any(isinstance(each, Tensor) and each.requires_grad for each in args))
        try:
            return original(ctx, function, preserve, *args)
        finally:
            checkpoints.pop()

    # -- several processes ---------------------------------------------------------------------------------------------

    def _process_starts(self, original: Any, process: Any) -> Any:
        self._processes += self._here
        return original(process)

    def _note_processes(self) -> None:
        if self._child_trained[0]:
            self._note("a process that the script forked trained too: what it did was not seen")
        elif self._processes and not self.record.num_passes:
            self._note(f"the script started {self._processes} other processes: what they did was not seen")

    def _spread(self, original: Any, wrapper: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
        """Of a DistributedDataParallel that is being made: the parameters whose gradients it is to exchange."""
        if self._here:
            exchanged = frozenset(map(id, parameters))
            self.record.wraps[id(wrapper.module)] = WrapFact(caller(), exchanged)
            self._safely(self._names.look)
        return original(wrapper, parameters, *args, **kwargs)

    def _group_ends(self, original: Any, group: Any = None) -> Any:
        if self._here and is_world(group):
            self._safely(self._ranks.meet)
        return original(group)

    def _safely(self, look: Callable[..., None], *args: Any) -> None:
        """What goes wrong in our looking is a note, and never the script's trouble; its modes do not see us."""
        try:
            with unseen():
                look(*args)
        except Exception as error:
            said = f"{look.__name__.strip('_').replace('_', ' ')}: {type(error).__name__}: {error}"
            self._note(f"not seen ({said})")

    def _note(self, text: str) -> None:
        if text not in self.record.notes:
            self.record.notes.append(text)


def _replaced(owner: Any, name: str, wrapper: Callable[..., Any], *, static: bool = False) -> Any:
    """``owner.name`` with ``wrapper(original, ...)`` in its place; nothing where there is no such thing."""
    original = getattr(owner, "__dict__", {}).get(name)
    if original is None:
        return nullcontext()
    plain = original.__func__ if isinstance(original, staticmethod) else original

    def run(*args: Any, **kwargs: Any) -> Any:
        return wrapper(plain, *args, **kwargs)

    run.__name__, run.__doc__ = plain.__name__, plain.__doc__
    run.__wrapped__ = plain  # type: ignore[attr-defined]
    return mock.patch.object(owner, name, staticmethod(run) if static else run)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside what compiles it, or spreads it over devices."""
    name = WRAPPERS.get(type(module).__name__)
    inner = None if name is None else getattr(module, name, None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else module


def _is_row_by_row(args: tuple[Any, ...], result: Any) -> bool:
    """Whether one tensor was given and one returned, with as many rows."""
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(result, Tensor):
        return False
    return bool(args[0].dim() and result.dim() and args[0].shape[0] == result.shape[0])


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"


def _facts_of(module: nn.Module, variable: str) -> ModelFact:
    parameters: dict[int, ParameterFact] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        if id(parameter) not in parameters:
            parameters[id(parameter)] = ParameterFact(name, parameter)
    for number, fact in parameters.items():
        fact.aliases = tuple(names[number][1:])
    buffers = [BufferFact(name, buffer.numel()) for name, buffer in module.named_buffers()]
    modules = {id(each): ModuleFact(name, each) for name, each in module.named_modules()}
    compiled = any(m._compiled_call_impl is not None for m in module.modules())
    return ModelFact(module, variable, parameters, buffers, modules, compiled=compiled)


def _keep(model: ModelFact, now: ModelFact) -> None:
    """Make a model's facts be about what is in it ``now``, and keep those of what was there before."""
    for number, fact in model.parameters.items():
        if number in now.parameters:
            fact.name, fact.aliases = now.parameters[number].name, now.parameters[number].aliases
            now.parameters[number] = fact
    for number, module in model.modules.items():
        if number in now.modules:
            module.name = now.modules[number].name
            now.modules[number] = module
    stayed = {fact.name for number, fact in now.modules.items() if number in model.modules}
    buffers = {buffer.name: buffer for buffer in model.buffers if buffer.name.rpartition(".")[0] in stayed}
    model.buffers = [buffers.get(each.name, each) for each in now.buffers]
    model.parameters, model.modules = now.parameters, now.modules


def _look(model: ModelFact, when: str) -> None:
    """Take checksums of a model's parameters and buffers."""
    facts = {str(n): fact for n, fact in model.parameters.items() if when == "last" or fact.first is None}
    for number, digest in digests((number, fact.parameter) for number, fact in facts.items()).items():
        setattr(facts[number], when, digest)
    buffers = dict(model.module.named_buffers())
    looked = [fact for fact in model.buffers if when == "last" or fact.first is None]
    values = digests((fact.name, buffers[fact.name]) for fact in looked if fact.name in buffers)
    for each in looked:
        setattr(each, when, values.get(each.name))
        buffer = buffers.get(each.name)
        if buffer is not None and each.is_kept and is_plain(buffer):
            if when == "first":
                each.value = buffer.detach().clone()
            elif each.value is not None and each.value.shape == buffer.shape:
                each.most = float((_wide(buffer) - _wide(each.value)).abs().max())


def _wide(tensor: Tensor) -> Tensor:
    """The numbers in a dtype that takes all others: there is no difference of two booleans, nor of small floats."""
    return tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)
