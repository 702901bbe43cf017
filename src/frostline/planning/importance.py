"""``fl.importance``: what each parameter is worth training, from the gradients of a few batches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from frostline.errors import ImportanceError
from frostline.planning.gradients import Gradients
from frostline.planning.reductions import KINDS, Reduction
from frostline.subsets.names import Names, listed, trains
from frostline.tracing.calls import tensors_in
from frostline.tracing.environment import rng_state, set_rng_state
from frostline.tracing.step import default_loss, map_tensors, split_inputs, sum_loss, wants_labels

Kind = Literal["taylor", "gradient_norm", "gradient_l1", "relative_gradient_norm"]
FORMAT = "frostline importance 1"


def importance(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor] | str | None = None,
    *,
    kind: Kind = "taylor",
    step: Callable[[nn.Module, Any], Tensor] | None = None,
    num_batches: int | None = None,
) -> Importance:
    """Score every parameter by its gradients on a few batches, without holding the gradients.

    >>> import torch, frostline as fl
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> fl.importance(model, [torch.tensor([[1.0, 1.0]])], loss=lambda y: y.sum(), kind="taylor").scores
    {'weight': 7.0}

    Each kind is a number for a whole tensor, taken batch by batch and added up over the batches (w: the parameter, g:
    its gradient):

    - ``"taylor"``: |w . g|, by how much the loss would change, to first order, if the parameter were set to zero.
      Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019) and, for feature maps,
      "Pruning Convolutional Neural Networks for Resource Efficient Inference" (ICLR 2017). Good at: comparing tensors
      of different size and scale on one scale, the loss's own. Bad at: weights whose scale the norm behind them takes
      out again (a convolution before a batch norm in train mode), for which w . g is zero whatever they are worth, by
      Euler's theorem on homogeneous functions; what is zero now (a fresh bias, LoRA's B); a tensor whose elements pull
      in opposite directions, which cancel. It was made to say what may be cut away, not what should move.
    - ``"gradient_norm"``: ||g||, how steep the loss is along the tensor. Good at: finding where a small step of
      plain gradient descent helps most, zero weights and weights before a norm included. Bad at: different scales. It
      grows with a tensor's size and shrinks as its weights grow: it prefers large tensors, and those of small values.
    - ``"gradient_l1"``: the sum of |g|, by how much the loss falls, to first order, if each element takes a step of
      one size downhill, as under Adam at first. Source: Bernstein et al., "signSGD" (ICML 2018), descent in the
      max norm. It adds up over tensors, as a plan does. Good at: what an optimizer of Adam's kin can gain soon. Bad at:
      noise; where batches disagree, many small gradients count as if they did not.
    - ``"relative_gradient_norm"``: ||g|| / ||w||, the step's size in terms of what is there. Source: Lee et
      al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts" (ICLR 2023), Auto-RGN. Good at: finding the
      layers that a shift of the inputs asks to change, where a few layers are to be chosen. Bad at: tensors near zero,
      such as biases, whose score is large for that reason alone. All of a tensor zero has no finite score: it is given
      the largest of the others and named in a note.

    All of them know the loss near the present weights only, by the batches given, in the modes (train or eval) that the
    modules are in.

    Args:
        model: any eager module with its weights. Parameters that are frozen now are scored too.
        batches: what the model is called on, one batch after the other: each a tensor, a tuple (positional) or a
            mapping (keywords), as `frostline.trace` takes ``inputs``. With ``step``, anything that it takes.
        loss: ``callable(outputs) -> scalar``. By default ``outputs.loss``, or the outputs if they are a scalar;
            ``"sum"``: the sum of the outputs, which a note tells.
        kind: see above.
        step: ``callable(model, batch) -> scalar loss``, in place of ``loss``: for batches that bring their targets.
        num_batches: take no more batches than these.

    Memory: that of one forward and what autograd keeps of it, and one gradient at a time: each is reduced to a number
    as soon as it is whole, and dropped. (If a gradient comes in parts, as with a reentrant checkpoint around each use
    of a shared weight, that one is kept until its batch is done, and a note says so.)

    Afterwards flags, ``.grad``, buffers, modules' attributes, modes, hooks and random number generators are as they
    were, after an error too. ``.grad`` that is there is set aside meanwhile. Hooks that users put on gradients with
    ``register_hook`` act as in training; those put on with ``register_post_accumulate_grad_hook``, which may step an
    optimizer, do not run.

    Raises:
        ImportanceError: no batches; a loss that is no scalar or needs no gradient; labels that are not given; a
            gradient or weight that is not finite; weights on ``meta``.
        Exception: whatever the model or the loss raises, with a note that tells the batch.
    """
    _check(model, batches, loss, kind, step, num_batches)
    names = Names(getattr(model, "_orig_mod", model))
    parameters = _trainable(names)
    reduction = Reduction(kind, parameters)
    notes: list[str] = []
    run = _step(model, loss, step, notes)
    sums = dict.fromkeys(parameters, 0.0)
    count = 0
    reached: set[str] = set()
    before = rng_state()
    try:
        with Gradients(model, parameters, reduction) as gradients, torch.inference_mode(False), torch.enable_grad():
            for batch in islice(batches, num_batches):
                try:
                    found = gradients.of(lambda batch=batch: run(batch))  # type: ignore[misc]
                    _check_finite(found, reduction)
                except Exception as error:
                    error.add_note(f"frostline: while measuring importance, in batch {count}")
                    raise
                for name, value in found.items():
                    sums[name] += value
                reached.update(found)
                count += 1
            notes += gradients.notes
    finally:
        set_rng_state(before)
    if not count:
        raise ImportanceError("there are no batches: give at least one")
    scores, more = reduction.finish(sums)
    without = [name for name in parameters if name not in reached]
    if without:
        notes.append(f"no gradient comes to {len(without)} parameters, so their score is 0: {listed(without, 5)}")
    fixed = [name for name in names.params if name not in parameters]
    if fixed:
        notes.append(f"{len(fixed)} parameters cannot train (integers, bools): their score is 0: {listed(fixed, 5)}")
    ordered = {name: scores.get(name, 0.0) for name in names.params}
    return Importance(ordered, kind, count, type(names.model).__name__, _mode(names.model), (*notes, *more))


@dataclass(frozen=True)
class Importance:
    """What each parameter of a model is worth, as `importance` found it.

    Attributes:
        scores: by parameter name, in the model's order, a tied parameter under its first; none negative, none NaN.
        kind: how they were measured, such as ``"taylor"``.
        num_batches: how many batches were added up.
        model: the class of the model.
        mode: ``"train"``, ``"eval"`` or ``"mixed"``: the modes its modules were in.
        notes: what a reader should know, one sentence each.
        versions: of frostline and torch.
    """

    scores: Mapping[str, float]
    kind: str
    num_batches: int
    model: str = ""
    mode: str = ""
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: _versions())

    def to_dict(self) -> dict[str, Any]:
        """The same as a mapping that JSON can hold."""
        return {
            "format": FORMAT,
            "model": self.model,
            "mode": self.mode,
            "kind": self.kind,
            "num_batches": self.num_batches,
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "scores": dict(self.scores),
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Read what `save` wrote.

        Raises:
            ImportanceError: the file holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ImportanceError(f"{Path(path).name} is no JSON: {error}") from error
        return cls.from_dict(data, Path(path).name)

    @classmethod
    def from_dict(cls, data: Any, where: str = "this") -> Importance:
        """The reverse of `to_dict`.

        Raises:
            ImportanceError: it is something else, or a score is missing, negative or not finite.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ImportanceError(f"{where} is no saved importance ({FORMAT!r} is its format)")
        scores = data.get("scores")
        if not isinstance(scores, Mapping):
            raise ImportanceError(f"{where} has no scores")
        wrong = [name for name, value in scores.items() if not _is_score(value)]
        if wrong:
            raise ImportanceError(f"{where} has scores that are no finite numbers of 0 or more: {listed(wrong, 5)}")
        return cls(
            {name: float(value) for name, value in scores.items()},
            str(data.get("kind", "")),
            int(data.get("num_batches", 0)),
            str(data.get("model", "")),
            str(data.get("mode", "")),
            tuple(str(note) for note in data.get("notes", ())),
            dict(data.get("versions", {})),
        )

    def __repr__(self) -> str:
        return f"<Importance {self.kind!r} of {len(self.scores)} parameters, {self.num_batches} batches>"

    def __str__(self) -> str:
        """The parameters that are worth most, and how much of the whole they are."""
        total = sum(self.scores.values())
        ranked = sorted(self.scores.items(), key=lambda item: -item[1])
        batches = f"{self.num_batches} batch" + "es" * (self.num_batches != 1)
        lines = [f"importance of {self.model or 'a model'} by {self.kind}, {batches}, {self.mode or 'unknown'} mode"]
        width = max((len(name) for name, _ in ranked[:_SHOWN]), default=0)
        covered = 0.0
        for name, score in ranked[:_SHOWN]:
            covered += score
            share = f"{100 * score / total:5.1f} %" if total else "    - "
            lines.append(f"  {name:<{width}}  {score:>10.4g}  {share}")
        if len(ranked) > _SHOWN:
            rest = f"{100 * (1 - covered / total):.1f} %" if total else "nothing"
            lines.append(f"  and {len(ranked) - _SHOWN} more, {rest} of the sum")
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])


_SHOWN = 10  # rows that are printed


def _is_score(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _check(model: Any, batches: Any, loss: Any, kind: Any, step: Any, num_batches: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ImportanceError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if kind not in KINDS:
        raise ImportanceError(f"kind must be one of {', '.join(map(repr, get_args(Kind)))}; got {kind!r}")
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ImportanceError(f"batches must give one batch after the other; for a single batch write [{_a(batches)}]")
    if step is not None and (loss is not None or not callable(step)):
        raise ImportanceError("give either loss= or step=, and step= as callable(model, batch) -> loss")
    if loss is not None and loss != "sum" and (isinstance(loss, str) or not callable(loss)):
        raise ImportanceError(f'loss must be callable(outputs) -> scalar, or "sum"; got {loss!r}')
    if num_batches is not None and (not isinstance(num_batches, int) or num_batches < 1):
        raise ImportanceError(f"num_batches must be a whole number of 1 or more, got {num_batches!r}")


def _a(value: Any) -> str:
    return "batch" if not isinstance(value, Iterable) else f"the {type(value).__name__}"


def _trainable(names: Names) -> dict[str, nn.Parameter]:
    found = {name: parameter for name, parameter in names.params.items() if trains(parameter)}
    if not found:
        raise ImportanceError(f"{type(names.model).__name__} has no parameters that could train")
    weightless = [name for name, parameter in found.items() if parameter.device.type == "meta"]
    if weightless:
        raise ImportanceError(
            f"importance needs weights, and {weightless[0]!r} (of {len(weightless)} parameters) is on meta: load them"
        )
    return found


def _step(model: nn.Module, loss: Any, step: Any, notes: list[str]) -> Callable[[Any], Tensor]:
    """``batch -> loss``, checked to be a scalar that needs a gradient."""
    if loss == "sum":
        notes.append('the loss is the sum of the outputs (loss="sum")')
    take_loss = default_loss if loss is None else sum_loss if loss == "sum" else loss

    def run(batch: Any) -> Tensor:
        if step is not None:
            found = step(model, batch)
        else:
            args, kwargs = split_inputs(batch, None, None)
            if loss is None and wants_labels(model, args, kwargs):
                raise ImportanceError("the batch brings no labels, and gradients of made-up ones say nothing: add them")
            args, kwargs = _lent(args), _lent(kwargs)
            found = take_loss(model(*args, **kwargs))
        if not isinstance(found, Tensor) or found.numel() != 1 or found.is_complex():
            what = f"shape {tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise ImportanceError(f"the loss must be a real scalar tensor, got {what}: reduce it, for example .mean()")
        if not found.requires_grad:
            raise ImportanceError("the loss needs no gradient: nothing that could train leads to it (detach, no_grad?)")
        return found

    return run


def _lent(values: Any) -> Any:
    """The inputs, cut off from what computed them: backward is not to run through, and free, the caller's own graph."""
    if not any(tensor.requires_grad for tensor in tensors_in(values)):
        return values
    return map_tensors(values, lambda t: t.detach().requires_grad_() if t.requires_grad else t)


def _check_finite(found: Mapping[str, float], reduction: Reduction) -> None:
    wrong = [name for name, value in found.items() if not math.isfinite(value)]
    if not wrong:
        return
    weights = [name for name in wrong if not reduction.weight_is_finite(name)]
    what, names = ("weights", weights) if weights else ("gradients", wrong)
    raise ImportanceError(
        f"{what} that are not finite (inf or nan), of {len(names)} parameters: {listed(names, 5)}. Look at the loss of "
        "this batch; in float16, scale it down or measure in bfloat16 or float32"
    )


def _mode(model: nn.Module) -> str:
    modes = {module.training for module in model.modules()}
    return "mixed" if len(modes) > 1 else "train" if True in modes else "eval"


def _versions() -> Mapping[str, str]:
    from frostline import __version__

    return {"frostline": __version__, "torch": str(torch.__version__)}
