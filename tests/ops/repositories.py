"""Repositories of kernels, with the public functions of the real ones in plain torch: their names, their arguments, no others.

Read from github.com/huggingface/kernels-community (activation, liger-kernels, rotary, vllm-flash-attn3, megablocks), flash-attn's
layer_norm.py, vLLM's flash_attn_varlen_func, and what transformers calls of gpt-oss-triton-kernels. None is their code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

from slipstream.ops.hub import Opened

ACTIVATION = {
    "__init__.py": """
import torch, torch.nn.functional as F

def silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return out.copy_(F.silu(gate) * up)

def gelu_and_mul(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return out.copy_(F.gelu(gate) * up)

def gelu_tanh_and_mul(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return out.copy_(F.gelu(gate, approximate="tanh") * up)
"""
}
LIGER = {
    "__init__.py": "from . import layers\n__all__ = ['layers']\n",
    "layers.py": """
import torch, torch.nn as nn

class LigerRMSNorm(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1]).float()  # a view, as the real one takes it
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(hidden_states.dtype)
        return (self.weight * x).to(hidden_states.dtype).view(hidden_states.shape)

def liger_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    assert cos.shape[-1] == q.shape[-1] and cos.dim() == 3
    half, c, s = q.shape[-1] // 2, cos[:, None, :, : q.shape[-1] // 2], sin[:, None, :, : q.shape[-1] // 2]
    for x in (q, k):  # in place, as the real one does
        a, b = x[..., :half].clone(), x[..., half:].clone()
        x[..., :half], x[..., half:] = a * c - b * s, b * c + a * s
    return q, k
""",
}
FLASH_NORM = {
    "__init__.py": """
import torch

def rms_norm_fn(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
                prenorm=False, residual_in_fp32=False, return_dropout_mask=False):
    assert bias is None
    total = x if residual is None else x + residual
    y = total.float() * torch.rsqrt(total.float().square().mean(-1, keepdim=True) + eps)
    y = (y * weight.float()).to(x.dtype)
    return (y, total) if prenorm else y
"""
}
ROTARY = {
    "__init__.py": """
import torch
from typing import Tuple

def apply_rotary_transformers(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                              unsqueeze_dim: int = 1) -> Tuple[torch.Tensor, torch.Tensor]:
    assert q.dim() == 4 and cos.dim() == 3 and q.shape[2] == cos.shape[1]
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    def turn(x):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
    return turn(q), turn(k)
"""
}
_PAGED = """
import torch

def paged(q, k_cache, v_cache, lengths, table, cu, scale, causal, window, softcap, s_aux):
    assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only supports fp16 and bf16"
    assert causal and cu.dtype == lengths.dtype == table.dtype == torch.int32
    assert s_aux is None or s_aux.dtype == q.dtype
    out, share = torch.empty_like(q), q.shape[1] // k_cache.shape[2]
    for i, length in enumerate(lengths.tolist()):
        rows = slice(int(cu[i]), int(cu[i + 1]))
        count = rows.stop - rows.start
        k, v = (c[table[i].long()].flatten(0, 1)[:length].repeat_interleave(share, 1).double() for c in (k_cache, v_cache))
        scores = torch.einsum("qhd,khd->hqk", q[rows].double(), k) * scale
        if softcap > 0:
            scores = torch.tanh(scores / softcap) * softcap
        key = torch.arange(length)[None]
        query = torch.arange(count)[:, None] + length - count
        hidden = key > query
        if window[0] >= 0:
            hidden |= key < query - window[0]
        scores.masked_fill_(hidden, float("-inf"))
        if s_aux is not None:
            scores = torch.cat((scores, s_aux.double()[:, None, None].expand(-1, count, 1)), -1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :length], v).to(q.dtype)
    return out
"""
FLASH3 = {
    "__init__.py": _PAGED
    + """
def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
                            cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
                            max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None,
                            softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
                            scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
                            s_aux=None, cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None):
    assert max_seqlen_q == (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max()
    return paged(q, k_cache, v_cache, cache_seqlens, page_table, cu_seqlens_q, softmax_scale, causal, window_size, softcap, s_aux)

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    raise AssertionError("it knows no pages")
"""
}
FLASH3_WITHOUT_SINKS = {"__init__.py": FLASH3["__init__.py"].replace("                            s_aux=None,", " " * 27)
                        .replace("softcap, s_aux)\n\ndef", "softcap, None)\n\ndef")}  # fmt: skip
FLASH3_VLLM = {
    "__init__.py": _PAGED
    + """
def flash_attn_varlen_func(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None,
                           dropout_p=0.0, softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None, *, return_softmax_lse=False, out=None,
                           scheduler_metadata=None, q_descale=None, k_descale=None, v_descale=None, num_splits=0, s_aux=None):
    assert max_seqlen_k >= seqused_k.max()
    return paged(q, k, v, seqused_k, block_table, cu_seqlens_q, softmax_scale, causal, window_size, softcap, s_aux)
"""
}
MEGABLOCKS = {
    "__init__.py": "from . import layers\n",
    "layers.py": """
import torch

def forward_once(x, expert_weights, top_experts, w1, w2, w1_bias, w2_bias, gradient_scale=None, alpha=1.702, sort_end_bit=0,
                 top_k=4, num_experts=128, expert_parallel_group=None, moe_capacity_factor=1.0,
                 moe_expert_model_parallelism=False, mlp_impl=None):
    sl, bs, hidden = x.size()
    assert 2 ** sort_end_bit >= num_experts == len(w1) and moe_capacity_factor == 0.0
    x, out, limit = x.view(-1, hidden), torch.zeros(sl * bs, hidden, dtype=torch.float32), 7.0
    for pair, e in enumerate(top_experts.flatten().tolist()):
        gate_up = x[pair // top_k] @ w1[e] + w1_bias[e]
        gate, up = gate_up[::2].clamp(max=limit), gate_up[1::2].clamp(-limit, limit)
        h = ((up + 1) * gate * torch.sigmoid(gate * alpha)) @ w2[e] + w2_bias[e]
        out[pair // top_k] += h.float() * expert_weights.flatten()[pair].float()
    return out.to(x.dtype), torch.bincount(top_experts.flatten(), minlength=num_experts)
""",
}
TRITON_KERNELS = {
    "__init__.py": "from . import matmul_ogs, tensor_details, tensor, swiglu, routing\n",
    "tensor_details/__init__.py": "from . import layout\n",
    "tensor_details/layout.py": """
class StridedLayout: pass
class Swizzled: pass
def make_default_matmul_mxfp4_w_layout(mx_axis):
    assert mx_axis == 1
    return Swizzled, {"swizzle": 4}
""",
    "tensor.py": """
from .tensor_details.layout import StridedLayout, Swizzled
FP4 = "fp4"
class Tensor:
    def __init__(self, data, dtype): self.data, self.dtype, self.shape, self.layout = data, dtype, data.shape, None
def wrap_torch_tensor(torch_tensor, dtype=None): return Tensor(torch_tensor, dtype)
def convert_layout(tensor, layout_cls, **layout_kwargs):
    assert (layout_cls is Swizzled) == (tensor.dtype == FP4) == (layout_kwargs == {"swizzle": 4})
    assert tensor.data.stride(-2) == 1  # the inputs of a weight are neighbours
    tensor.layout = layout_cls
    return tensor
""",
    "routing.py": """
import torch
from dataclasses import dataclass, field
@dataclass
class GatherIndx: src_indx: torch.Tensor; dst_indx: torch.Tensor
@dataclass
class ScatterIndx: src_indx: torch.Tensor; dst_indx: torch.Tensor
@dataclass
class RoutingData:
    gate_scal: torch.Tensor = field()
    expt_hist: torch.Tensor = field()
    n_expts_tot: int = field()
    n_expts_act: int = field()
    expt_data: object = None
def compute_expt_data_torch(hist, n_expts_tot, n_gates):
    assert hist.dtype == torch.int32 and int(hist.sum()) == n_gates
    return torch.cat((torch.zeros(1, dtype=torch.int32), hist.cumsum(0).int()))
""",
    "swiglu.py": """
import torch
def swiglu_fn(input, alpha, limit):
    gate, up = input[..., ::2].clamp(max=limit), input[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
""",
    "matmul_ogs.py": """
import torch
from dataclasses import dataclass
@dataclass
class InFlexData: dtype: object = None
@dataclass
class FlexCtx: lhs_data: object = None; rhs_data: object = None
@dataclass
class PrecisionConfig: weight_scale: object = None; flex_ctx: object = None; out_dtype: object = None
@dataclass
class FnSpecs: name: str; fn: object; fn_arg_names: tuple
@dataclass
class FusedActivation: specs: FnSpecs; fn_args: tuple; reduction_n: int
VALUES = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])

def matmul_ogs(x, w, bias, routing_data=None, gather_indx=None, scatter_indx=None, precision_config=None, betas=None, gammas=None,
               out_alpha=None, y=None, fused_activation=None, epilogue=None):
    packed, scale = w.data, precision_config.weight_scale.data  # (experts, in / 2, out), (experts, in / 32, out)
    numbers = torch.stack((VALUES[(packed & 15).long()], VALUES[(packed >> 4).long()]), 2).flatten(1, 2)
    numbers = numbers * 2.0 ** (scale.float() - 127).repeat_interleave(32, 1)
    assert tuple(w.shape) == tuple(numbers.shape) and bias.dtype == torch.float32
    offsets, top_k = routing_data.expt_data.tolist(), routing_data.n_expts_act
    if gather_indx is not None:
        x = x[gather_indx.src_indx.long() // top_k]
    rows = [x[a:b].float() @ numbers[e] + bias[e] for e, (a, b) in enumerate(zip(offsets, offsets[1:]))]
    out = torch.cat(rows)
    if fused_activation is not None:
        assert fused_activation.reduction_n == 2 and fused_activation.specs.fn_arg_names == ("alpha", "limit")
        out = fused_activation.specs.fn(out, *fused_activation.fn_args)
    out = out.to(x.dtype)
    if gammas is not None:
        out = out * gammas[:, None]
    if scatter_indx is not None:
        out = out[scatter_indx.src_indx.long()].unflatten(0, (-1, top_k)).sum(1)
    return out
""",
}


def load(files: dict[str, str], folder: Path) -> Opened:
    """The module, imported as it is: for tests of adapters alone. The real way is `open_kernel`."""
    name = f"kernel_{hashlib.sha256(repr((files, str(folder))).encode()).hexdigest()[:12]}"
    for path, text in files.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_text(text)
    spec = importlib.util.spec_from_file_location(
        name, folder / name / "__init__.py", submodule_search_locations=[str(folder / name)]
    )
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return Opened(module, f"tests/{name}", None, "torch-cpu", "0" * 64, folder)


def publish(files: dict[str, str], folder: Path, variant: str = "torch-cpu") -> Path:
    """A repository in a folder, as `kernels lock` takes it."""
    build = folder / "build" / variant
    digests = {n: hashlib.sha256(t.encode()).digest() for n, t in files.items()}
    import base64

    metadata = {
        "name": "local-kernel", "id": "_local_kernel_1", "version": 1, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": {n: base64.b64encode(d).decode() for n, d in digests.items()}},
    }  # fmt: skip
    for path, text in {**files, "metadata.json": json.dumps(metadata)}.items():
        (build / path).parent.mkdir(parents=True, exist_ok=True)
        (build / path).write_text(text)
    return folder.resolve()


def pin(folder: Path, *repositories: Path) -> dict[str, str]:
    """A lock and a policy for these: the options of an engine that name them."""
    from slipstream.trust import Lock
    from slipstream.trust.fetch import pin_folder
    from slipstream.trust.tree import hash_tree

    lock, policy = folder / "kernels.lock", folder / "kernels-policy.toml"
    pins = {str(r): pin_folder(r, None, hash_tree) for r in repositories}
    lock.write_text(Lock(pins, lock).text())
    policy.write_text(f"sources = {json.dumps([str(r) for r in repositories])}\n")
    return {"kernels_lock": str(lock), "kernels_policy": str(policy)}
