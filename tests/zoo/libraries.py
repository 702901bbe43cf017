"""Models of transformers and peft, built from tiny configurations, never downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tests.cases import Case, case
from torch import nn


def enable_checkpoints(model: Any, *, use_reentrant: bool) -> None:
    # transformers 5.20 renamed it and warns of the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def token_inputs(vocabulary: int = 32, batch: int = 2, length: int = 6) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(3, vocabulary, (batch, length)),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
    }


def bert_model(attention: str = "sdpa") -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        attn_implementation=attention,
    )
    return BertForSequenceClassification(config).train()


def bert_case(model: nn.Module) -> Case:
    return Case(model, {**token_inputs(), "labels": torch.tensor([0, 2])})


@case(needs="transformers")
def bert_sdpa() -> Case:
    return bert_case(bert_model())


@case(needs="transformers")
def bert_eager() -> Case:
    return bert_case(bert_model("eager"))


@case(needs="transformers")
def bert_eval() -> Case:
    return bert_case(bert_model().eval())


@case(needs="transformers")
def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    inputs = token_inputs()
    return Case(GPT2LMHeadModel(config).train(), {**inputs, "labels": inputs["input_ids"].clone()})


def llama_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def llama_case(model: nn.Module) -> Case:
    inputs = token_inputs()
    return Case(model, {**inputs, "labels": inputs["input_ids"].clone()})


@case(needs="transformers")
def llama() -> Case:
    return llama_case(llama_model())


@case(needs="transformers")
def llama_checkpointed() -> Case:
    model: Any = llama_model()
    enable_checkpoints(model, use_reentrant=False)
    return llama_case(model)


@case(needs="transformers")
def t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        use_cache=False,
    )
    inputs = token_inputs()
    return Case(T5ForConditionalGeneration(config).train(), {**inputs, "labels": torch.randint(3, 32, (2, 4))})


@case(needs="transformers")
def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    model = ViTForImageClassification(config).train()
    return Case(model, {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 2])})


@case(needs="transformers")
def swin() -> Case:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
        mlp_ratio=2.0,
        num_labels=3,
    )
    model = SwinForImageClassification(config).train()
    return Case(model, {"pixel_values": torch.randn(1, 3, 16, 16), "labels": torch.tensor([1])})


def lora(model: nn.Module, targets: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=targets))


@case(needs="peft")
def lora_bert() -> Case:
    return bert_case(lora(bert_model(), ["query", "value"]))


@case(needs="peft")
def lora_llama() -> Case:
    return llama_case(lora(llama_model(), ["q_proj", "v_proj"]))


def lora_llama_with_checkpoints(*, use_reentrant: bool) -> Case:
    model: Any = llama_model()
    enable_checkpoints(model, use_reentrant=use_reentrant)
    model.enable_input_require_grads()
    return llama_case(lora(model, ["q_proj", "v_proj"]))


@case(needs="peft")
def lora_llama_checkpointed() -> Case:
    return lora_llama_with_checkpoints(use_reentrant=False)


@case(needs="peft")
def lora_llama_reentrant() -> Case:
    return lora_llama_with_checkpoints(use_reentrant=True)
