"""A LoRA model of peft's: adapters train, and what peft forces for gradient checkpointing is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.zoo.libraries import enable_checkpoints

import frostline as fl

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def lora_llama(checkpointing: bool) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    if checkpointing:
        enable_checkpoints(model, use_reentrant=False)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[2], init_lora_weights=False)
    return peft.get_peft_model(model, lora), torch.randint(50, (2, 6))


def step_of(model: Any, tokens: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def test_adapters_train_as_in_plain_peft_and_the_base_stays():
    model, tokens = lora_llama(checkpointing=False)
    plain, _ = lora_llama(checkpointing=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with fl.train_only(model, "*lora_*") as run:  # as @now would be: peft has frozen the rest itself
        optimizer = torch.optim.AdamW(run.parameters(), lr=0.1)
        for _ in range(5):
            step_of(model, tokens, optimizer)
        audit = run.audit(lambda: step_of(model, tokens, optimizer), strict=True)
    assert audit.beyond == ()
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    for _ in range(6):
        step_of(plain, tokens, optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
        assert ("lora_" in name) != torch.equal(tensor, before[name]), name


def test_forced_input_gradients_are_found_with_their_module_and_price():
    model, tokens = lora_llama(checkpointing=True)
    with fl.train_only(model, "*lora_*") as run:
        optimizer = torch.optim.AdamW(run.parameters())
        audit = run.audit(lambda: step_of(model, tokens, optimizer))
    (finding,) = audit.beyond
    assert finding.kind == "forced-gradient"
    assert finding.names == ("base_model.model.model.embed_tokens",)
    assert "requires_grad_()" in finding.text
    layers = {op.module.partition("layers.")[2][:1] for op in audit.ops if op.use == "forced" and op.flops}
    assert {"0", "1"} <= layers  # whole layers below the first that trains
    assert 0.4 * audit.backward_flops < finding.flops
