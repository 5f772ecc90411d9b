"""Tiny random model folders of transformers, and plugins of architectures as installed packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

_SPECIAL = ("<pad>", "<s>", "</s>")
_VOCABULARY = 400
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": _VOCABULARY}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def write_tokenizer(folder: Path, texts: Sequence[str], *, template: str) -> None:
    """Write a byte-level tokenizer that puts special tokens around texts as the template says: "<s> $A </s>"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY,
            special_tokens=list(_SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if template != "$A":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, i) for i, token in enumerate(_SPECIAL)]
        )
    tokenizer.enable_truncation(4)  # as many folders have it: the agent must not heed it
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model_folder(folder: Path, kind: str, texts: Sequence[str], *, seed: int = 0) -> Path:
    """Write a random "bert", "roberta", "gpt2" or "llama" of two layers, as `save_pretrained` does."""
    import transformers

    made: dict[str, tuple[str, str, Mapping[str, Any]]] = {
        "bert": ("BertForMaskedLM", "<s> $A </s>", {"intermediate_size": 64, "max_position_embeddings": 64}),
        "roberta": ("RobertaModel", "<s> $A </s>", {"intermediate_size": 64, "max_position_embeddings": 64}),
        "gpt2": ("GPT2LMHeadModel", "$A", {"max_position_embeddings": 64}),
        "llama": ("LlamaForCausalLM", "<s> $A", {"intermediate_size": 64, "num_key_value_heads": 1}),
    }
    name, template, sizes = made[kind]
    model_class = getattr(transformers, name)
    config = model_class.config_class(**_SIZES, **_TOKENS, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        if kind in ("gpt2", "llama"):  # what they write must hang on more than rounding
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir(parents=True)
    model.save_pretrained(str(folder))
    write_tokenizer(folder, texts, template=template)
    return folder
