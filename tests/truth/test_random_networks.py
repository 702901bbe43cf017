"""Random networks, random flags, every method: every figure equals the real run.

300 networks by default; ``FROSTLINE_EXAMPLES=5000`` asks for more (``-n 2`` shares them between two processes).
"""

from __future__ import annotations

import contextlib
import os
import random
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from tests.cases import Case
from tests.truth.comparing import differences, trace_case
from tests.truth.random_networks import BLOCKS, DRAFTED, INPUTS, Draft, Example, Program, bounded, examples, write
from tests.truth.reference import METHODS, Method
from torch.utils._python_dispatch import TorchDispatchMode

COUNT = int(os.environ.get("FROSTLINE_EXAMPLES", "300"))
SHARDS = max(6, COUNT // 250)  # so that several processes can share them
THE_OTHERS = tuple(method for method in METHODS if method != "train-only")
QUIET = pytest.mark.filterwarnings("ignore")  # whatever torch warns of in a network that nobody wrote


class Watched(TorchDispatchMode):
    """Does nothing but be there."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return op(*args, **(kwargs or {}))


def eager_refuses(case: Case, train: list[str], method: Method) -> bool:
    """Whether the step fails by itself under these flags: some in-place ops do, depending on what requires grad.

    Also if it fails as soon as anybody watches, for then the truth cannot run it either: under any dispatch mode torch
    takes another kernel for ``max_pool1d``, whose result is a view, and not every view may be written to.
    """
    return any(_fails(case, train, method, mode) for mode in (contextlib.nullcontext(), Watched()))


def _fails(case: Case, train: list[str], method: Method, mode: contextlib.AbstractContextManager[Any]) -> bool:
    copy = case.fresh()
    for name, parameter in copy.model.named_parameters():
        parameter.requires_grad_(method not in ("freeze", "train-only") or name in train)
    inputs = [copy.model.get_parameter(name) for name in train] if method == "backward-inputs" else None
    try:
        with mode, bounded():
            loss = copy.run()
            if loss.requires_grad:
                loss.backward(inputs=inputs)
    except RuntimeError:
        return True
    return False


@QUIET
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_figure_of_a_random_network_equals_the_real_run(shard: int) -> None:
    run = settings(
        max_examples=COUNT // SHARDS,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a failing network prints as a script; shrinking it would take longer than the rest
        # A network of thirty instructions takes some choosing; networks come in all sizes.
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    seed(shard)(run(given(example=examples())(check)))()


def check(example: Example) -> None:
    case = example.program.case()
    assume(not eager_refuses(case, [name for name, _ in case.model.named_parameters()], "optimizer-only"))
    trace = trace_case(case)
    # (train-only asks a trace of its own: of every fifth network.)
    methods = METHODS if crc32(str(example.program).encode()) % 5 == 0 else THE_OTHERS
    for train in example.subsets():
        for method in methods:
            try:
                wrong = differences(trace, case, train, method)
            except Exception:
                if eager_refuses(case, train, method):
                    continue
                raise
            assert not wrong, f"train={train}, method={method!r}: (ours, the truth) {wrong}\n{example.program}"


def random_drafts(rng: random.Random, depth: int = 2) -> tuple[Draft, ...]:
    made = []
    for _ in range(rng.randint(4, 16) if depth == 2 else rng.randint(1, 4)):
        picks = tuple(rng.randrange(36) for _ in range(4))
        if depth and rng.random() < 0.2:
            made.append(Draft(rng.choice(list(BLOCKS)), picks, random_drafts(rng, depth - 1)))
        else:
            made.append(Draft(rng.choice(DRAFTED), picks))
    return tuple(made)


def random_program(seed: int) -> Program:
    rng = random.Random(seed)
    return write(random_drafts(rng), rng.choices(INPUTS, k=2), rng.choices(range(36), k=2))


@QUIET
def test_random_programs_run_and_mix_what_there_is() -> None:
    """Of programs drawn alike, nearly all train, and every kind of thing turns up in some."""
    programs = [random_program(seed) for seed in range(200)]
    failing = 0
    for program in programs:
        case = program.case()
        failing += eager_refuses(case, [name for name, _ in case.model.named_parameters()], "optimizer-only")
    assert failing <= 0.05 * len(programs)
    text = "\n".join(map(str, programs))
    for part in (
        *("use_reentrant=False", "use_reentrant=True", "no_grad()", "torch.autocast", "F.linear", "nn.Linear", ".mT"),
        *("_(", ".apply(", "bfloat16", "float64", "einsum", "addmm", "baddbmm", "F.conv1d", "F.conv2d", "dropout"),
        *("softmax", "F.embedding", "detach()", "chunk", "split", "torch.cat", "torch.stack", "[1:]", "expand"),
    ):
        assert part in text, part


@QUIET
def test_a_program_is_the_same_each_time_it_is_written() -> None:
    for number in range(20):
        assert random_program(number) == random_program(number)


def test_a_program_prints_as_source() -> None:
    drafts = [Draft("linear", (0, 2, 0, 1)), Draft("change_values", (0, 1, 0, 0))]
    program = write(drafts, ["torch.randn(3, 4)"], [0])
    assert program.setup == ("p0 = nn.Parameter(torch.randn((2, 4)))",)
    assert program.lines[0] == "v1 = F.linear(x0, self.p0)"
    assert program.lines[1] == "v2 = v1.relu_()"
    assert program.lines[2] == "return v2.float().mean()"
    assert "def forward():\n    v1 = F.linear(x0, self.p0)" in str(program)


@QUIET
def test_an_in_place_op_that_spoils_the_backward_is_left_out() -> None:
    # tanh saves what it returned: changing that in place makes the backward fail.
    drafts = [Draft("linear", (0, 2, 0, 1)), Draft("elementwise", (0, 1, 0, 0)), Draft("change_values", (0, 0, 0, 0))]
    program = write(drafts, ["torch.randn(3, 4)"], [0])
    assert program.lines[1:] == ("v2 = torch.tanh(v1)", "return v2.float().mean()")
    assert torch.is_tensor(program.case().run())
