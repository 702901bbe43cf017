"""Ops written out as loops over numbers, counting as they go: what the formulas are held to.

Every loop computes the op's values as well, which the tests compare with torch's, so that what is counted is provably
the op. Nothing here knows a formula: ``Counter.flops`` grows by 2 with each multiply-add that is carried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, sqrt

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Counter:
    """Arithmetic that counts itself."""

    flops: int = 0

    def multiply_add(self, array: Array, index: tuple[int, ...], x: float, y: float) -> None:
        """``array[index] += x * y``."""
        array[index] += x * y
        self.flops += 2

    def divide(self, x: float, y: float) -> float:
        self.flops += 1
        return x / y

    def root(self, x: float) -> float:
        self.flops += 1
        return sqrt(x)


def positions(sizes: Sequence[int]) -> product[tuple[int, ...]]:
    return product(*map(range, sizes))


def matmul(count: Counter, left: Array, right: Array) -> Array:
    """``(m, k) @ (k, n)``."""
    result = np.zeros((left.shape[0], right.shape[1]))
    for m, n, k in positions((*result.shape, left.shape[1])):
        count.multiply_add(result, (m, n), left[m, k], right[k, n])
    return result


def batched_matmul(count: Counter, left: Array, right: Array) -> Array:
    return np.stack([matmul(count, one, other) for one, other in zip(left, right, strict=True)])


# --- convolutions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convolution:
    """The options of ``aten::convolution``; one int an axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def pairs(self, inputs: Array, weight: Array, outputs: Array) -> list[tuple[tuple[int, ...], ...]]:
        """Every (input element, weight element, output element) that the dense convolution brings together.

        The side that the kernel walks over (the input, or the output of a transposed one) is padded, and so are its
        indices: what lies on padding is multiplied like the rest.
        """
        walked = outputs if self.transposed else inputs
        steps = (inputs if self.transposed else outputs).shape[2:]
        channels_here, channels_there = weight.shape[0] // self.groups, weight.shape[1]
        found = []
        for sample, group, here, there in positions((walked.shape[0], self.groups, channels_here, channels_there)):
            first, second = group * channels_here + here, group * channels_there + there
            for step, tap in product(positions(steps), positions(weight.shape[2:])):
                place = tuple(s * i + d * t for s, i, d, t in zip(self.stride, step, self.dilation, tap, strict=True))
                stepping, under_tap = (sample, first, *step), (sample, second, *place)
                ends = (stepping, under_tap) if self.transposed else (under_tap, stepping)
                found.append((ends[0], (first, there, *tap), ends[1]))
        return found

    def pad(self, array: Array) -> Array:
        """Zeros around, and room behind for the taps of ``output_padding``."""
        widths = [(0, 0), (0, 0)] + [(p, p + o) for p, o in zip(self.padding, self.output_padding, strict=True)]
        return np.pad(array, widths)

    def crop(self, array: Array, shape: Sequence[int]) -> Array:
        return array[(..., *(slice(p, p + size) for p, size in zip(self.padding, shape[2:], strict=True)))]

    def forward(self, count: Counter, inputs: Array, weight: Array, shape: Sequence[int]) -> Array:
        outputs = np.zeros(tuple(shape))
        if not self.transposed:
            inputs = self.pad(inputs)
        else:
            outputs = self.pad(outputs)
        for i, w, o in self.pairs(inputs, weight, outputs):
            count.multiply_add(outputs, o, inputs[i], weight[w])
        return self.crop(outputs, shape) if self.transposed else outputs

    def grad_input(self, count: Counter, grad: Array, inputs: Array, weight: Array) -> Array:
        result = np.zeros_like(inputs)
        if self.transposed:
            grad = self.pad(grad)
        else:
            result = self.pad(result)
        for i, w, o in self.pairs(result, weight, grad):
            count.multiply_add(result, i, grad[o], weight[w])
        return result if self.transposed else self.crop(result, inputs.shape)

    def grad_weight(self, count: Counter, grad: Array, inputs: Array, weight: Array) -> Array:
        result = np.zeros_like(weight)
        if self.transposed:
            grad = self.pad(grad)
        else:
            inputs = self.pad(inputs)
        for i, w, o in self.pairs(inputs, weight, grad):
            count.multiply_add(result, w, inputs[i], grad[o])
        return result


def conv_tbc(count: Counter, inputs: Array, weight: Array, pad: int) -> Array:
    """A convolution along the first axis that leaves out what would lie on padding."""
    taps, num_in, num_out = weight.shape
    result = np.zeros((inputs.shape[0] + 2 * pad - taps + 1, inputs.shape[1], num_out))
    for t, b, o, tap, i in positions((*result.shape, taps, num_in)):
        if 0 <= t + tap - pad < inputs.shape[0]:
            count.multiply_add(result, (t, b, o), inputs[t + tap - pad, b, i], weight[tap, i, o])
    return result


# --- attention ---------------------------------------------------------------------------------------------------


def softmax(scores: Array) -> Array:
    """Along the last axis, without counting: free by declaration."""
    powers = np.vectorize(exp)(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def attention(count: Counter, query: Array, key: Array, value: Array, mask: Array | float = 0.0) -> Array:
    """``(batch, head, sequence, dim)``; keys and values may have fewer heads."""
    result = np.zeros((*query.shape[:3], value.shape[3]))
    shared = query.shape[1] // key.shape[1]
    for b, h in positions(query.shape[:2]):
        scores = matmul(count, query[b, h], key[b, h // shared].T)
        probabilities = softmax(scores / sqrt(query.shape[3]) + mask)
        result[b, h] = matmul(count, probabilities, value[b, h // shared])
    return result


def attention_backward(
    counts: dict[str, Counter], grad: Array, query: Array, key: Array, value: Array, mask: Array | float = 0.0
) -> tuple[Array, Array, Array]:
    """Nothing but q, k, v kept: the scores are computed again. Each product has a count of its own."""
    scale = 1 / sqrt(query.shape[3])
    grads = np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
    shared = query.shape[1] // key.shape[1]
    for b, h in positions(query.shape[:2]):
        q, k, v, dout = query[b, h], key[b, h // shared], value[b, h // shared], grad[b, h]
        p = softmax(matmul(counts["scores"], q, k.T) * scale + mask)
        dp = matmul(counts["grad_probabilities"], dout, v.T)
        ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
        grads[0][b, h] += matmul(counts["grad_query"], ds, k)
        grads[1][b, h // shared] += matmul(counts["grad_key"], ds.T, q)
        grads[2][b, h // shared] += matmul(counts["grad_value"], p.T, dout)
    return grads


# --- recurrent layers --------------------------------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


@dataclass
class Lstm:
    """One layer in one direction; biases are added, which is free."""

    w_ih: Array
    w_hh: Array
    bias: Array

    def forward(self, count: Counter, inputs: Array, h: Array, c: Array) -> tuple[Array, Array, Array]:
        self.inputs, self.steps, outputs = inputs, [], []
        for x in inputs:
            gates = matmul(count, x, self.w_ih.T) + matmul(count, h, self.w_hh.T) + self.bias
            i, f, g, o = np.split(gates, 4, axis=1)
            i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
            h_before, c_before, c = h, c, f * c + i * g
            h = o * np.tanh(c)
            self.steps.append((h_before, c_before, c, i, f, g, o))
            outputs.append(h)
        return np.stack(outputs), h, c

    def backward(self, counts: dict[str, Counter], grad_outputs: Array) -> tuple[Array, ...]:
        """``(grad_input, grad_w_ih, grad_w_hh, grad_bias, grad_hx, grad_cx)``."""
        grad_inputs = np.zeros_like(self.inputs)
        grad_w_ih, grad_w_hh, grad_bias = (np.zeros_like(x) for x in (self.w_ih, self.w_hh, self.bias))
        dh, dc = np.zeros_like(self.steps[0][0]), np.zeros_like(self.steps[0][1])
        for t in reversed(range(len(self.steps))):
            h_before, c_before, c, i, f, g, o = self.steps[t]
            dh = dh + grad_outputs[t]
            dc = dc + dh * o * (1 - np.tanh(c) ** 2)
            d_i, d_f, d_g, d_o = dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g**2), dh * np.tanh(c)
            gates = np.concatenate([d_i, d_f, d_g, d_o * o * (1 - o)], axis=1)
            grad_inputs[t] = matmul(counts["grad_input"], gates, self.w_ih)
            grad_w_ih += matmul(counts["grad_w_ih"], gates.T, self.inputs[t])
            grad_w_hh += matmul(counts["grad_w_hh"], gates.T, h_before)
            grad_bias += gates.sum(0)
            dh, dc = matmul(counts["grad_hx"], gates, self.w_hh), dc * f
        return grad_inputs, grad_w_ih, grad_w_hh, grad_bias, dh, dc


# --- direct solvers ----------------------------------------------------------------------------------------------


def substitute(count: Counter, matrix: Array, right: Array, *, upper: bool, unit: bool = False) -> Array:
    """Solve ``matrix @ x = right`` for a triangular matrix."""
    n = len(matrix)
    x = np.array(right)
    order = list(reversed(range(n))) if upper else list(range(n))
    for column in range(right.shape[1]):
        for done, row in enumerate(order):
            for other in order[:done]:
                count.multiply_add(x, (row, column), -matrix[row, other], x[other, column])
            if not unit:
                x[row, column] = count.divide(x[row, column], matrix[row, row])
    return x


def cholesky(count: Counter, matrix: Array) -> Array:
    lower = np.tril(matrix)
    n = len(matrix)
    for j in range(n):
        for k in range(j):
            count.multiply_add(lower, (j, j), -lower[j, k], lower[j, k])
        lower[j, j] = count.root(lower[j, j])
        for i in range(j + 1, n):
            for k in range(j):
                count.multiply_add(lower, (i, j), -lower[i, k], lower[j, k])
            lower[i, j] = count.divide(lower[i, j], lower[j, j])
    return lower


def lu(count: Counter, matrix: Array) -> tuple[Array, list[int]]:
    """Factors in one matrix, and which row went where; pivots are the largest in their column."""
    factors, rows = np.array(matrix), list(range(len(matrix)))
    for pivot in range(min(matrix.shape)):
        best = pivot + int(np.abs(factors[pivot:, pivot]).argmax())
        factors[[pivot, best]] = factors[[best, pivot]]
        rows[pivot], rows[best] = rows[best], rows[pivot]
        for row in range(pivot + 1, matrix.shape[0]):
            factors[row, pivot] = count.divide(factors[row, pivot], factors[pivot, pivot])
            for column in range(pivot + 1, matrix.shape[1]):
                count.multiply_add(factors, (row, column), -factors[row, pivot], factors[pivot, column])
    return factors, rows


def lu_solve(count: Counter, factors: Array, rows: list[int], right: Array) -> Array:
    return substitute(count, factors, substitute(count, factors, right[rows], upper=False, unit=True), upper=True)
