"""The rotation from a repository of kernels; norms of the heads and the write into the cache stay torch's.

`apply_rotary_transformers(q, k, cos, sin, unsqueeze_dim=1)` of kernels-community/rotary, which transformers calls as its
`rotary_pos_emb`: q and k (1, heads, tokens, dim), cos and sin (1, tokens, dim); gives both, turned (read from
rotary/torch-ext/rotary/__init__.py of github.com/huggingface/kernels-community). `layers.liger_rotary_pos_emb` of liger-kernels has
the same parameters and may turn its inputs in place, so it is given copies.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slipstream.ops.attention_input import reference
from slipstream.ops.candidate import function
from slipstream.ops.choose import Case
from slipstream.ops.norm.torch import norm
from slipstream.ops.rope import Turns

if TYPE_CHECKING:
    from slipstream.ops.hub import Opened

PARAMETERS = ("q", "k", "cos", "sin", "unsqueeze_dim")


def reject(case: Case) -> str | None:
    return None


def adapt(opened: Opened, case: Case) -> Any:
    liger = not hasattr(opened.module, "apply_rotary_transformers")
    name = "layers.liger_rotary_pos_emb" if liger else "apply_rotary_transformers"
    return partial(attention_input, function(opened.module, name, *PARAMETERS), liger)


def attention_input(
    rotary: Any,
    in_place: bool,
    qkv: Tensor,  # (tokens, heads + 2 * kv_heads, head_dim)
    turns: Turns | None,
    norms: tuple[Tensor, Tensor, float] | None,
    keys: Tensor,  # (num_slots, kv_heads, head_dim)
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    heads = qkv.shape[1] - 2 * keys.shape[1]

    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (tokens, heads + kv_heads, head_dim), (tokens, 1, dim)
        dim = cos.shape[-1]
        part = x[..., :dim].transpose(0, 1)[None]
        q, k = part[:, :heads], part[:, heads:]
        if in_place:
            q, k = q.clone(), k.clone()
        half = sin[:, 0, dim // 2 :]  # the first half of ours is negated
        q, k = rotary(q, k, cos[:, 0][None], torch.cat((half, half), -1)[None], unsqueeze_dim=1)
        turned = torch.cat((q, k), 1)[0].transpose(0, 1)
        return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), -1)

    return reference.attention_input(qkv, turns, norms, keys, values, slots, norm=norm, rope=rope)
