"""The tape joined with autograd's own graph: which parameters stand behind each argument, what backward reaches.

Flags are carried over the edges autograd recorded (an argument's ``grad_fn`` and its ``next_functions``), never over
tensor identity, so ``detach``, views, in-place writes and shared tensors need no rules of ours.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from frostline.tracing.calls import NOWHERE, Call, Edge, Slot, TensorHook, values_decide_shape
from frostline.tracing.recorder import Recorder

# (unit, which of its outputs receive a gradient) -> the inputs that get a defined gradient, when all of them need one
Defined = Callable[["Unit", frozenset[int]], frozenset[int]]


@dataclass(slots=True, eq=False)
class Unit:
    """One call that is costed as a whole."""

    call: Call
    inputs: list[Slot]  # the call's own, then what it captured
    behind: list[int]  # per input: the parameters (a bit each) a gradient to it would go on to; 0: none
    outputs: list[Slot]
    held: bool = False  # autograd holds what it saved when the loss returns
    receives: frozenset[int] = frozenset()  # outputs that receive a gradient (output_nr for ops, else position)
    reached: frozenset[int] | None = None  # outputs whose nodes the loss reaches, by position; None: of an op, its node
    ops: list[Call] = field(default_factory=list)  # the op calls of its forward

    @property
    def module(self) -> str:
        return self.call.module


@dataclass
class Tape:
    """One recorded run: with every parameter trainable, none, or a given set."""

    recorder: Recorder
    loss: Slot | None
    excluded: frozenset[int]  # storages of parameters and buffers
    inputs: frozenset[int]  # storages of the step's arguments
    parameter_of_leaf: dict[int, int]  # index into recorder.leaves -> parameter number
    num_parameters: int
    real: bool

    @property
    def unknown_leaves(self) -> list[Tensor]:
        """Tensors that require grad of themselves and are no parameters of the model."""
        return [leaf for n, leaf in enumerate(self.recorder.leaves) if n not in self.parameter_of_leaf]

    @property
    def calls(self) -> list[Call]:
        return self.recorder.root.children


def units_of(calls: Iterable[Call]) -> Iterator[Call]:
    """The calls that are costed one by one: ops, except inside what has to be probed as a whole."""
    for call in calls:
        if call.kind == "torch" and not call.opaque:
            yield from units_of(call.children)
        else:
            yield call


class Graph:
    """See the module's docstring. ``units`` are in execution order."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.recorder = tape.recorder
        self.always = 1 << tape.num_parameters  # the bit of leaves that are no parameters: they always need a gradient
        self._alive: list[Any] = list(self.recorder.nodes)
        self._behind_node: dict[int, int] = {}
        self.unmatched: list[str] = []
        self.hooks: list[tuple[TensorHook, int]] = []  # those a gradient passes through, with the parameters behind
        _mark_functions_opaque(tape.calls)
        root = None if tape.loss is None or tape.loss.edge is None else tape.loss.edge
        self._root: tuple[Any, int] | None = None
        if root is not None and root[0] >= 0:
            self._root = (self.recorder.nodes[root[0]], root[1])
        self._reached = self._walk()
        self._select_units()

    # -- parameters behind an edge -------------------------------------------------------------------------------------

    def behind(self, edge: Edge | None) -> int:
        """The parameters a gradient along ``edge`` would reach, as bits."""
        if edge is None:
            return 0
        if edge == NOWHERE:
            return self.always
        if edge[0] < 0:
            extra = self.always if edge in self.recorder.always_edges else 0
            return self._leaf_bit(edge[1]) | extra
        extra = self.always if edge in self.recorder.always_edges else 0
        return self._behind(self.recorder.nodes[edge[0]]) | extra

    def _leaf_bit(self, leaf: int) -> int:
        number = self.tape.parameter_of_leaf.get(leaf)
        return self.always if number is None else 1 << number

    def _behind(self, node: Any) -> int:
        known = self._behind_node
        stack = [node]
        while stack:
            top = stack[-1]
            if id(top) in known:
                stack.pop()
                continue
            waiting = [fn for fn, _ in top.next_functions if fn is not None and id(fn) not in known]
            if waiting:
                self._alive.extend(waiting)
                stack.extend(waiting)
                continue
            known[id(top)] = self._bits_of(top)
            stack.pop()
        return known[id(node)]

    def _bits_of(self, node: Any) -> int:
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and not node.next_functions:
            return self._leaf_bit(self.recorder._leaf(variable))
        bits = 0
        for fn, nr in node.next_functions:
            if fn is not None:
                bits |= self._behind_node[id(fn)]
                index = self.recorder._node_index.get(id(fn))
                if index is not None and (index, nr) in self.recorder.always_edges:
                    bits |= self.always
        return bits or self.always  # (only views that lead nowhere: it requires grad all the same)

    # -- what the loss reaches -----------------------------------------------------------------------------------------

    def _walk(self) -> list[Any]:
        """Every node reachable from the loss."""
        return [] if self._root is None else self._below([self._root[0]], set())

    def _below(self, roots: list[Any], seen: set[int]) -> list[Any]:
        """The nodes that can be reached from ``roots``, but for those already ``seen`` (by id)."""
        order = [node for node in roots if id(node) not in seen]
        seen.update(map(id, order))
        for node in order:
            for fn, _ in node.next_functions:
                if fn is not None and id(fn) not in seen:
                    seen.add(id(fn))
                    order.append(fn)
        self._alive.extend(order)
        return order

    def _select_units(self) -> None:
        calls = list(units_of(self.tape.calls))
        owners = self._match(calls, self._reached)
        enclosing = [owner for owner in self._orphans if owner is not None and owner.replayable]
        if any(owner is not None and not owner.replayable for owner in self._orphans):
            self.recorder.entangled = "forward-mode differentiation, or a transform of torch.func, lies in a call"
        if enclosing:  # a node made by no op (a C++ autograd function): probe the torch call around it as a whole
            for call in enclosing:
                call.opaque = True
            calls = list(units_of(self.tape.calls))
            owners = self._match(calls, self._reached)
        self.unmatched = self._unexplained
        self.units = [self._unit(call, index) for index, call in enumerate(calls)]
        self._owner_of_node = {node: self.units[index] for node, index in owners.items()}
        for node in self._reached:
            unit = self._owner_of_node.get(id(node))
            if unit is not None:
                unit.held = True
        self.entangled = self._why_entangled()
        self._find_region_outputs()
        self._find_reached_outputs()
        self.forced_leaves = self._forced_leaves()
        self.landings = self._find_landings()

    def _why_entangled(self) -> str:
        """What makes autograd hold, or run, more than the flags of single calls say; '' if nothing does."""
        if self.recorder.entangled:
            return self.recorder.entangled
        kept = []
        casts = _casts_of_weights(self.units)
        cached = _casts_of_weights(unit for unit in self.units if unit.call.kind != "op")
        for unit in self.units:
            call = unit.call
            where = f"in module {call.module or '(the model)'!r}"
            if call.kind != "op" and any(map(values_decide_shape, unit.ops)):
                return f"values decide what {call.name} {where} runs"
            if call.autocast and any(slot.value in cached for slot in call.captured):
                return f"{call.name} {where} uses a cast that autocast had cached inside another call"
            if call.kind != "checkpoint":
                continue
            if call.recompute and any(slot.edge is not None and not slot.is_leaf for slot in call.captured):
                return (
                    f"a reentrant checkpoint {where} uses an activation that is not among its arguments, and its "
                    "backward runs on through the graph around it"
                )
            if call.is_reentrant and any(slot.storage in self.tape.excluded for slot in call.outputs):
                return f"a reentrant checkpoint {where} returns a view of a parameter"
            if call.autocast and any(slot.value in casts for slot in call.captured):
                return f"a checkpoint {where} uses a cast that autocast had cached before it"
            if _holds_checkpoint(call.children) or any(_holds_checkpoint(again.children) for again in call.recompute):
                return f"a checkpoint {where} holds another one"
            if unit.held and call.is_region:
                slots = [slot for slot in unit.inputs if slot.edge is not None and slot.edge[0] >= 0]
                kept += [self.recorder.nodes[slot.edge[0]] for slot in slots if slot.edge is not None]
        if self._below(kept, set(map(id, self._reached))):
            return "a checkpoint keeps an activation whose graph the loss reaches no other way"
        return ""

    def _forced_leaves(self) -> list[tuple[int, int]]:
        """Tensors that are leaves though no parameters: (what would make them no leaf, their storage).

        A leaf is held by its own node: an input that requires grad, or an activation after ``requires_grad_()``.
        """
        found: dict[Edge, tuple[int, int]] = {}
        for unit in self.units:
            if not unit.held:
                continue
            inside = [] if unit.call.kind == "op" else [slot for op in unit.ops for slot in op.inputs]
            for slot in (*unit.inputs, *inside):
                edge = slot.edge
                if edge is None or edge in found or edge == NOWHERE or not unit.call.grad_enabled:
                    continue
                if edge[0] < 0 and edge[1] not in self.tape.parameter_of_leaf:
                    found[edge] = (0, slot.storage)
                elif edge[0] >= 0 and edge in self.recorder.always_edges:
                    found[edge] = (self._behind(self.recorder.nodes[edge[0]]), slot.storage)
        return list(found.values())

    def _match(self, calls: list[Call], nodes: list[Any]) -> dict[int, int]:
        """Which unit made each reached node: by autograd's sequence numbers."""
        made_by: dict[int, int] = {}
        starts: list[int] = []
        start_unit: list[int] = []
        highest = 0
        function_unit: dict[int, int] = {}
        for index, unit_call in enumerate(calls):
            if unit_call.kind == "function" or unit_call.is_reentrant:
                function_unit[id(unit_call)] = index
            for op in unit_call.ops():
                first = op.first_node
                if first > highest and op.grad_enabled and any(slot.edge for slot in op.inputs):
                    made_by[first - 1] = index
                highest = max(highest, first)
                starts.append(first)
                start_unit.append(index)
        intervals = sorted(
            (call.first_node, call.end_node, index) for index, call in enumerate(calls) if call.kind != "op"
        )
        interval_starts = [start for start, _, _ in intervals]
        owners: dict[int, int] = {}
        self._orphans: list[Call | None] = []
        self._unexplained: list[str] = []
        for node in nodes:
            if not node.next_functions and hasattr(node, "variable"):
                continue
            number = node._sequence_nr()
            position = bisect_right(interval_starts, number) - 1
            node_index = self.recorder._node_index.get(id(node), -1)
            function_call = self.recorder.function_nodes.get(node_index)
            if function_call is not None and id(function_call) in function_unit:
                owners[id(node)] = function_unit[id(function_call)]
            elif position >= 0 and number < intervals[position][1]:
                owners[id(node)] = intervals[position][2]
            elif number in made_by and not _is_copy_slices(node):
                owners[id(node)] = made_by[number]
            elif _is_copy_slices(node) and starts:
                owners[id(node)] = start_unit[bisect_right(starts, number) - 1]
            elif _saves_tensors(node):
                around = _enclosing_torch_call(self.tape.calls, number)
                self._orphans.append(around)
                if around is None:
                    self._unexplained.append(node.name())
        return owners

    def _unit(self, call: Call, index: int) -> Unit:
        call.index = index
        inputs = list(call.inputs)
        ops = list(call.ops())
        if call.kind != "op":
            _find_captured(call)
            inputs += call.captured
        differentiable = call.grad_enabled
        behind = [self.behind(slot.edge) if differentiable else 0 for slot in inputs]
        return Unit(call, inputs, behind, call.outputs, ops=ops)

    def _find_region_outputs(self) -> None:
        """A checkpointed region's outputs are what it made and others use; regions may be nested."""
        made_in: dict[int, tuple[Call, ...]] = {}
        seen: dict[int, set[int]] = {}

        def use(slot: Slot, around: tuple[Call, ...]) -> None:
            for region in made_in.get(slot.value, ()):
                if region not in around and slot.value not in seen.setdefault(id(region), set()):
                    seen[id(region)].add(slot.value)
                    region.outputs.append(slot)

        def visit(calls: Iterable[Call], around: tuple[Call, ...]) -> None:
            for call in calls:
                if call.kind != "torch" or call.opaque:
                    for slot in (*call.inputs, *call.captured):
                        use(slot, around)
                if call.is_region or (call.kind == "torch" and not call.opaque):
                    visit(call.children, (*around, call) if call.is_region else around)
                else:  # replayed as one call: only what it returns can be used
                    for slot in call.outputs:
                        made_in.setdefault(slot.value, around)
                for again in call.recompute:
                    visit(again.children, around)
                    for slot in again.outputs:
                        use(slot, around)

        visit(self.tape.calls, ())
        if self.tape.loss is not None:
            use(self.tape.loss, ())

    def _find_reached_outputs(self) -> None:
        """Which outputs of calls with several nodes the loss keeps alive."""
        reached = set(map(id, self._reached))
        for unit in self.units:
            if unit.call.kind != "op":
                found = frozenset(
                    position
                    for position, slot in enumerate(unit.outputs)
                    if slot.edge is not None and slot.edge[0] >= 0 and id(self.recorder.nodes[slot.edge[0]]) in reached
                )
                # (None of them, though the unit is: at the base of a view that it returned, which stands for it.)
                unit.reached = found or None

    def _find_landings(self) -> dict[Edge, tuple[int, int]]:
        """Per edge: the unit (by position) that a gradient along it comes to, and as which of its outputs'.

        Outputs are numbered as in ``receives``. A leaf is unit -1, and which leaf it is.
        """
        found: dict[Edge, tuple[int, int]] = {}
        outputs = {
            slot.edge: (unit.call.index, position)
            for unit in self.units
            if unit.call.kind != "op"
            for position, slot in enumerate(unit.outputs)
            if slot.edge is not None
        }
        loss = self.tape.loss
        for slot in (*(slot for unit in self.units for slot in unit.inputs), *([] if loss is None else [loss])):
            edge = slot.edge
            if edge is None or edge in found or edge == NOWHERE:
                continue
            if edge in outputs:
                found[edge] = outputs[edge]
            elif slot.is_leaf:
                found[edge] = (-1, edge[1])
            elif (place := self._land(self.recorder.nodes[edge[0]], edge[1])) is not None:
                found[edge] = place
        return found

    def _land(self, node: Any, number: int) -> tuple[int, int] | None:
        """Where a gradient that comes to ``node`` is used, past the nodes that are nobody's (a view's, made anew)."""
        while (owner := self._owner_of_node.get(id(node))) is None:
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor) and not node.next_functions:
                return (-1, self.recorder._leaf(variable))
            behind = [edge for edge in node.next_functions if edge[0] is not None]
            if len(behind) != 1:
                return None
            node, number = behind[0]
        return (owner.call.index, number)

    # -- which outputs receive a gradient ------------------------------------------------------------------------------

    def settle_receivers(self, defined: Defined) -> None:
        """Find which outputs of each unit receive a gradient, asking ``defined`` where user code decides.

        Gradients that user code leaves out (a Function returning None) end the flow there.
        """
        if self._root is None:
            return
        waiting: dict[int, int] = {}
        for node in self._reached:
            for fn, _ in node.next_functions:
                if fn is not None:
                    waiting[id(fn)] = waiting.get(id(fn), 0) + 1
        received: dict[int, set[int]] = {id(self._root[0]): {self._root[1]}}
        entries: dict[Unit, set[Edge]] = {}  # where gradients come into a unit from outside
        if (last := self._owner_of_node.get(id(self._root[0]))) is not None:
            entries[last] = {(self.recorder._node_index[id(self._root[0])], self._root[1])}
        ready = [self._root[0]]
        while ready:
            node = ready.pop()
            numbers = frozenset(received.get(id(node), ()))
            owner = self._owner_of_node.get(id(node))
            runs = bool(numbers) or (owner is not None and _is_function(owner))  # (it is given zeros, and goes on)
            passes = self._passes(node, numbers, defined) if runs else frozenset()
            for position, (fn, nr) in enumerate(node.next_functions):
                if fn is None:
                    continue
                if position in passes:
                    received.setdefault(id(fn), set()).add(nr)
                    entered = self._owner_of_node.get(id(fn))
                    if entered is not None and entered is not owner:
                        entries.setdefault(entered, set()).add((self.recorder._node_index.get(id(fn), -1), nr))
                waiting[id(fn)] -= 1
                if waiting[id(fn)] == 0:
                    ready.append(fn)
        edges: set[Edge] = {
            (self.recorder._node_index[node], nr)
            for node, numbers in received.items()
            if node in self.recorder._node_index
            for nr in numbers
        }
        self.hooks = [
            (hook, self.behind(hook.edge))
            for hook in self.recorder.tensor_hooks
            if hook.edge in edges or hook.edge[0] < 0
        ]
        for node in self._reached:
            owner = self._owner_of_node.get(id(node))
            if owner is not None and owner.call.kind == "op" and id(node) in received:
                owner.receives = frozenset(received[id(node)])
        for unit in self.units:
            if unit.call.kind == "op":
                continue
            unit.receives = frozenset(i for i, slot in enumerate(unit.outputs) if slot.edge in edges)
            if entries.get(unit, set()) <= {slot.edge for slot in unit.outputs}:
                continue
            # It came in at the base of a view that was returned and then written to.
            if unit.call.kind == "torch":  # the view stands for it
                unit.receives = frozenset(i for i, slot in enumerate(unit.outputs) if slot.edge is not None)
            else:
                self.entangled = f"a gradient enters {unit.call.name} elsewhere than at what it returned"

    def _passes(self, node: Any, numbers: frozenset[int], defined: Defined) -> frozenset[int]:
        unit = self._owner_of_node.get(id(node))
        every = frozenset(range(len(node.next_functions)))
        if unit is None or not _is_function(unit):
            return every
        gets = defined(unit, numbers)
        direct = [hole.index for hole in unit.call.direct_tensors]
        if len(direct) != len(node.next_functions):
            return every
        return frozenset(position for position, index in enumerate(direct) if index in gets)

    def release(self) -> None:
        """Let autograd's nodes go; nothing below needs them."""
        self._alive.clear()
        self._reached.clear()
        self._owner_of_node.clear()
        self._behind_node.clear()
        self.recorder.nodes = [None] * len(self.recorder.nodes)


def _mark_functions_opaque(calls: Iterable[Call]) -> None:
    """A torch call that runs an autograd.Function (a custom op) is replayed as the torch call it is."""
    for call in calls:
        if call.kind == "torch":
            if any(child.kind in ("function", "checkpoint") for child in call.children):
                call.opaque = True
            _mark_functions_opaque(call.children)


def _find_captured(call: Call) -> None:
    """Tensors that the call's inside used and that came neither from its arguments nor from inside; nested ones too."""
    known = {slot.value for slot in call.captured}
    region = call.recompute[0] if call.recompute else call  # (whose inputs were detached: an outer one may be captured)
    known |= {slot.value for slot in region.inputs}
    inside = region.children
    for child in inside:
        if child.kind != "op":
            _find_captured(child)
            _capture(child.inputs, known, call)
        for op in child.ops():
            if op.target is not torch.ops.aten.lift_fresh.default:  # (its argument was made inside)
                _capture(op.inputs, known, call)
            known.update(slot.value for slot in op.outputs)
        known.update(slot.value for slot in child.outputs)


def _capture(slots: Iterable[Slot], known: set[int], call: Call) -> None:
    for slot in slots:
        if slot.value not in known:
            known.add(slot.value)
            call.captured.append(slot)


def _holds_checkpoint(calls: Iterable[Call]) -> bool:
    return any(call.kind == "checkpoint" or _holds_checkpoint(call.children) for call in calls)


def _casts_of_weights(units: Iterable[Unit]) -> set[int]:
    """The tensors made in ``units`` that are a parameter in another dtype: autocast may have cached them."""
    return {
        op.outputs[0].value
        for unit in units
        for op in unit.ops
        if op.target is torch.ops.aten._to_copy.default and op.inputs[0].is_leaf
    }


def _enclosing_torch_call(calls: Iterable[Call], number: int) -> Call | None:
    for call in calls:
        if call.kind == "torch" and call.target is not None and call.first_node <= number < call.end_node:
            return call
    return None


def _is_function(unit: Unit) -> bool:
    """Whether user code decides which gradients it passes on."""
    return unit.call.kind == "function" or unit.call.is_reentrant


def _is_copy_slices(node: Any) -> bool:
    """The node of a base that was written to through a view."""
    return bool(node.name().endswith("CopySlices"))


def _saves_tensors(node: Any) -> bool:
    """Whether a node that no op explains may hold or compute something: view nodes made anew do not."""
    name = node.name()
    if any(attribute.startswith("_raw_saved_") for attribute in dir(node)):
        return True
    return not name.endswith(("Backward0", "Backward1"))
