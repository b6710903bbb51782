"""The engine's tiny model, given a chat template and the special tokens of conversations."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.engine.tiny import LLAMA, write

HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", *HARMONY)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_chat_model(folder: Path, *, template: str | None = TEMPLATE, max_position_embeddings: int = 2048) -> Path:
    """A random llama whose vocabulary is special tokens and single printable characters."""
    write(folder, LLAMA | {"max_position_embeddings": max_position_embeddings, "eos_token_id": 3})
    alphabet = [*SPECIAL, *(chr(c) for c in range(33, 127)), "\u0120", "\u010a"]  # the last two spell space, line end
    vocab = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": True, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder
