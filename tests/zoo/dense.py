"""Linear layers, norms, embeddings and what ties them together."""

from __future__ import annotations

import itertools

import torch
from tests.cases import Case, case
from torch import Tensor, nn
from torch.nn import functional


def mean_square(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


@case()
def mlp() -> Case:
    return Case(
        nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 16), lambda out: out.sum()
    )


@case()
def linear_10_20_10_5() -> Case:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
    labels = torch.randint(0, 5, (32,))
    return Case(model, torch.randn(32, 10), lambda out: functional.cross_entropy(out, labels))


@case()
def ten_equal_layers() -> Case:
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(10)))
    return Case(model, torch.randn(6, 12), mean_square)


@case()
def mlp_3d_input() -> Case:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))
    return Case(model, torch.randn(2, 5, 8), mean_square)


@case()
def activations() -> Case:
    layers: list[nn.Module] = []
    for activation in (
        nn.ReLU6(),
        nn.LeakyReLU(),
        nn.SiLU(),
        nn.Hardswish(),
        nn.ELU(),
        nn.Softplus(),
        nn.Sigmoid(),
        nn.Mish(),
    ):
        layers += [nn.Linear(6, 6), activation]
    return Case(nn.Sequential(*layers), torch.randn(4, 6), mean_square)


@case()
def log_softmax_nll() -> Case:
    model = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Dropout(0.3), nn.Linear(14, 6), nn.LogSoftmax(dim=-1))
    labels = torch.randint(0, 6, (9,))
    return Case(model, torch.randn(9, 10), lambda out: functional.nll_loss(out, labels))


@case()
def batch_norm_1d() -> Case:
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    return Case(model, torch.randn(7, 8), mean_square)


@case()
def norms_1d() -> Case:
    model = nn.Sequential(
        nn.Linear(8, 12),
        nn.LayerNorm(12),
        nn.Linear(12, 12),
        nn.RMSNorm(12),
        nn.Linear(12, 12, bias=False),
        nn.LayerNorm(12, elementwise_affine=False),
        nn.Linear(12, 12),
        nn.GroupNorm(3, 12),
        nn.Linear(12, 2),
    )
    return Case(model, torch.randn(5, 8), mean_square)


class HandRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@case()
def prelu_and_glu() -> Case:
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.PReLU(),
        nn.Linear(8, 12),
        nn.GLU(),
        HandRMSNorm(6),
        nn.Linear(6, 6),
        nn.PReLU(6),
        nn.Linear(6, 2),
    )
    return Case(model, torch.randn(5, 6), mean_square)


class SharedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.shared, self.after = nn.Linear(8, 10), nn.Linear(10, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for _ in range(3):
            x = torch.tanh(self.shared(x))
        return self.after(x)


@case()
def shared_layer_thrice() -> Case:
    return Case(SharedLayer(), torch.randn(4, 8), mean_square)


class TinyLanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 20, width: int = 8, *, tied: bool = True, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0, sparse=sparse)
        self.hidden = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.hidden(self.embedding(ids)))))


def next_token(ids: Tensor):
    return lambda logits: functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@case()
def tied_embedding() -> Case:
    ids = torch.randint(0, 20, (2, 7))
    return Case(TinyLanguageModel(), ids, next_token(ids))


@case()
def untied_embedding() -> Case:
    ids = torch.randint(0, 20, (2, 7))
    return Case(TinyLanguageModel(tied=False), ids, next_token(ids))


@case()
def sparse_embedding() -> Case:
    ids = torch.randint(1, 20, (2, 7))  # no padding: its rows are left out of a sparse gradient
    return Case(TinyLanguageModel(tied=False, sparse=True), ids, next_token(ids))


class BagOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(15, 6, mode="mean")
        self.maximum = nn.EmbeddingBag(15, 6, mode="max")
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.cat([self.bag(ids), self.maximum(ids)], dim=1))


@case()
def embedding_bag() -> Case:
    return Case(BagOfWords(), torch.randint(0, 15, (4, 5)), mean_square)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 6))
        self.right = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 6))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a = functional.normalize(self.left(left), dim=-1)
        b = functional.normalize(self.right(right), dim=-1)
        return self.scale.exp() * a @ b.T


@case()
def two_towers() -> Case:
    labels = torch.arange(6)
    return Case(
        TwoTowers(),
        {"left": torch.randn(6, 8), "right": torch.randn(6, 5)},
        lambda logits: (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2,
    )


class EinsumAndBilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 4, 5) / 4)
        self.bilinear = nn.Bilinear(5, 6, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mixed = torch.einsum("bhi,hij->bj", x, self.mix)
        return self.head(torch.tanh(self.bilinear(mixed, y)))


@case()
def einsum_and_bilinear() -> Case:
    return Case(EinsumAndBilinear(), (torch.randn(4, 3, 4), torch.randn(4, 6)), mean_square)


class FoldOrExpand(nn.Module):
    """Whether ``matmul`` folds a 4-d operand depends on ``requires_grad`` and on strides."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.matrix = nn.Parameter(torch.randn(6, 5) / 3)
        self.vector = nn.Parameter(torch.randn(4) / 3)
        self.left = nn.Parameter(torch.randn(7, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)  # (2, 4, 3, 6), not contiguous
        x = torch.matmul(self.before(x).transpose(1, 2), self.matrix)  # (2, 3, 4, 5)
        x = torch.matmul(self.left, x.transpose(1, 2))  # (7, 3) @ (2, 4, 3, 5)
        return torch.matmul(x.permute(0, 2, 3, 1), self.vector)


@case()
def matmul_4d_by_2d() -> Case:
    return Case(FoldOrExpand(), torch.randn(2, 3, 4, 6), mean_square)


@case()
def weight_norm_parametrization() -> Case:
    norm = torch.nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(6, 8)), nn.ReLU(), norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2))
    return Case(model, torch.randn(4, 6), mean_square)


@case()
def weight_norm_hook() -> Case:
    norm = torch.nn.utils.weight_norm
    model = nn.Sequential(norm(nn.Linear(6, 8)), nn.ReLU(), norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2))
    return Case(model, torch.randn(4, 6), mean_square)


@case()
def spectral_norm_parametrization() -> Case:
    norm = torch.nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(norm(nn.Linear(6, 8)), nn.ReLU(), norm(nn.Linear(8, 5)), nn.ReLU(), nn.Linear(5, 2))
    return Case(model, torch.randn(4, 6), mean_square)


class ListOfParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [6, 9, 7, 3]
        self.weights = nn.ParameterList(torch.randn(o, i) / 3 for i, o in itertools.pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(o) for o in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = torch.sigmoid(functional.linear(x, weight, bias))
        return x


@case()
def parameter_list() -> Case:
    return Case(ListOfParameters(), torch.randn(5, 6), mean_square)


class SingularValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        _, singular, _ = torch.linalg.svd(self.before(x), full_matrices=False)  # only S is used
        return (singular * self.scale).sum()


@case()
def svd_values_only() -> Case:
    return Case(SingularValues(), torch.randn(6, 5))


class ManyOps(nn.Module):
    """Ops with weights that are not layers: outer products, cumulative sums, gathers, solves."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, 5) / 4 + 3 * torch.eye(5))
        self.b = nn.Parameter(torch.randn(5))
        self.c = nn.Parameter(torch.randn(5, 3))
        self.d = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.linalg.solve(self.a, x.T).T
        y = torch.addmm(self.d, y.cumsum(1), self.c) + torch.outer(x[:, 0], self.b)[:, :3]
        y = torch.baddbmm(y.unsqueeze(1), y.unsqueeze(1), self.c[:3].expand(y.shape[0], 3, 3)).squeeze(1)
        gate = self.c.index_select(0, torch.tensor([0, 2])).sum(0)
        return torch.where(y > 0, y * gate, torch.mv(y, self.d).unsqueeze(1))


@case()
def many_ops() -> Case:
    return Case(ManyOps(), torch.randn(4, 5), mean_square)


class WeightOnlyChain(nn.Module):
    """A hypernetwork: a weight made from parameters alone by another layer, so its matmul gradient is grad_weight."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(1, 4))
        self.generator = nn.Linear(4, 30)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(6, 2))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.generator(torch.tanh(self.code)).view(6, 5) + self.lora_b @ self.lora_a
        return self.head(functional.linear(x, weight))


@case()
def hypernetwork() -> Case:
    return Case(WeightOnlyChain(), torch.randn(4, 5), mean_square)
