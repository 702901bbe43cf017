"""Networks too large for most machines, built without weights: costing them needs none.

frostline cost examples/llama.py:llama_3_8b --train @last:4 --train @head
frostline cost examples/llama.py:llama_3_8b --sweep last
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _llama(**shape: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama 3 of this shape on ``meta``, 1 x 2048 tokens with labels, in bfloat16 and train mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        **shape,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    tokens_BT = torch.zeros(1, 2048, dtype=torch.int64)
    return model.train(), {"input_ids": tokens_BT, "labels": tokens_BT}


def llama_3_8b() -> tuple[nn.Module, dict[str, Tensor]]:
    """The shape of Llama 3 8B: 32 blocks, 4096 wide, 32 heads over 8 key-value heads."""
    return _llama(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )


def llama_405b() -> tuple[nn.Module, dict[str, Tensor]]:
    """The shape of Llama 3.1 405B: 126 blocks, 16384 wide, 128 heads over 8 key-value heads."""
    return _llama(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
    )
