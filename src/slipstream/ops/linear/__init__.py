"""Linear layers: an implementation lays a weight out once (`prepare`) and multiplies by it from then on.

kernel.prepare(weight, dtype) -> tuple of tensors, from a `Weight` of shape (out, in)
kernel(x, packed, bias) -> (tokens, out); x (tokens, in)
kernel.wide(x, packed, bias, out) -> the same in float32, not rounded to the dtype of x, into `out` if it is given; as
kernel(x, packed, bias) gives it where that would be a kernel more. Of kernels for CUDA
kernel.left(x, packed, bias) -> the same, or parts of the sum that are left to the norm that comes next (ops/moe: Pairs), where a
kernel is faster so
kernel.held_bytes(format, shape, dtype, packed) -> bytes, where `prepare` lays out a packed weight in a way of its own, or
None where it keeps this format as it is; packed is its size before

A weight that arrives packed stays packed, and is multiplied by an implementation that takes its format:

| | formats | runs on |
|---|---|---|
| blocks | mxfp4, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K as they stand | CPUs, where there is a C compiler |
| int4pack | int4, and Q4_0, Q4_1, Q8_0 with scales in bfloat16 | CPUs |
| int8pack | int8 | CPUs |
| triton | mxfp4, int8, int4, Q4_0, Q4_1, Q8_0 | CUDA |
| unpacked | mxfp4, int8, int4, decoded slice by slice | CPUs |
| triton_few | dense bfloat16, float16: few tokens here, more by cuBLAS | CUDA, from Hopper on |
| onednn, torch | dense | CPUs; anything |
| reference | all; if packed, then only if it is forced | anything |

Those below give a token the same bits in any batch. They are slower, and run only with `batch_invariant`.

| | formats | runs on |
|---|---|---|
| blocks_invariant | those of blocks | CPUs, where there is a C compiler |
| native_invariant | dense, int8, int4 | the same |
| triton_invariant | those of triton | CUDA |
| triton_dense_invariant | dense | CUDA |
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from slipstream.ops.choose import Case, Impl, only_invariant
from slipstream.ops.formats import MADE, Weight
from slipstream.ops.formats.blocks import BLOCKS, OURS

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LinearKernel(Protocol):
    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]: ...

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor: ...


def _reference() -> Any:
    from slipstream.ops.linear.reference import Reference

    return Reference()


def _torch() -> Any:
    from slipstream.ops.linear.torch import Dense

    return Dense()


def _onednn() -> Any:
    from slipstream.ops.linear.onednn import OneDNN

    return OneDNN()


def _blocks() -> Any:
    from slipstream.ops.linear.blocks import Blocks

    return Blocks()


def _blocks_invariant() -> Any:
    from slipstream.ops.linear.blocks import Blocks

    return Blocks(invariant=True)


def _reject_blocks(case: Case) -> str | None:
    return _reject_direct(case, "many tokens are multiplied by torch, which sums in another order than few are")


def _reject_direct(case: Case, varies: str | None = None) -> str | None:
    if case.get("format") not in ("mxfp4", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"):
        return f"takes mxfp4, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K and Q6_K, not {case.get('format')}"
    if case.device != "cpu":
        return "is compiled for CPUs"
    if case.dtype not in ("bfloat16", "float32"):
        return f"takes bfloat16 and float32 activations, not {case.dtype}"
    if case.batch_invariant == (varies is not None):
        return varies or only_invariant(case)
    return _not_built("blocks", strict=case.batch_invariant)


def _not_built(name: str, strict: bool) -> str | None:
    from slipstream.ops.native import missing

    return missing(name, strict)


def _native() -> Any:
    from slipstream.ops.linear.native import Native

    return Native()


def _reject_native(case: Case) -> str | None:
    if case.get("format") not in ("dense", "int8", "int4"):
        return f"takes floats, int8 and int4, not {case.get('format')}"
    if case.device != "cpu":
        return "is compiled for CPUs"
    return only_invariant(case) or _not_built("dense", strict=True)


def _int4() -> Any:
    from slipstream.ops.linear.int4 import Int4

    return Int4()


def _reject_int4(case: Case) -> str | None:
    if case.get("format") not in ("int4", "Q4_0", "Q4_1", "Q8_0"):
        return f"takes int4, Q4_0, Q4_1 and Q8_0, not {case.get('format')}"
    if case.device != "cpu":
        return "is an operator of torch for CPUs"
    if case.dtype != "bfloat16":
        return f"is fast in bfloat16 only, not in {case.dtype}"
    if case.get("in_features", 0) % 32 or case.get("out_features", 0) % 64:
        return "needs in_features in multiples of 32 and out_features in multiples of 64"
    return _torchs(case)


def _torchs(case: Case) -> str | None:
    return "torch chooses the order of a product's sums by the number of tokens" if case.batch_invariant else None


def _int8() -> Any:
    from slipstream.ops.linear.int8 import Int8

    return Int8()


def _reject_int8(case: Case) -> str | None:
    if case.get("format") != "int8":
        return f"takes int8, not {case.get('format')}"
    if case.device != "cpu":
        return "is an operator of torch for CPUs"
    if case.dtype != "bfloat16":
        return f"is fast in bfloat16 only, not in {case.dtype}"
    if case.get("in_features", 0) % 32:  # the operator reads past the end of other rows
        return "needs in_features in multiples of 32"
    return _torchs(case)


def _triton() -> Any:
    from slipstream.ops.linear.triton import Triton

    return Triton()


def _triton_few() -> Any:
    from slipstream.ops.linear.triton_few import Few

    return Few()


def _triton_slabs() -> Any:
    from slipstream.ops.linear.triton_slabs import Slabs

    return Slabs()


def _triton_invariant() -> Any:
    from slipstream.ops.linear.triton import Triton

    return Triton(invariant=True)


def _triton_dense() -> Any:
    from slipstream.ops.linear.triton_dense import TritonDense

    return TritonDense()


def _reject_triton(case: Case) -> str | None:
    return _reject_triton_packed(
        case, "its tiles, and the parts that a sum is cut into, depend on the number of tokens"
    )


def _reject_triton_packed(case: Case, varies: str | None = None) -> str | None:
    if case.get("format") not in ("mxfp4", "int8", "int4", "Q4_0", "Q4_1", "Q8_0"):
        return f"takes mxfp4, int8, int4, Q4_0, Q4_1 and Q8_0, not {case.get('format')}"
    if case.device == "cuda" and case.get("in_features", 0) % 32:
        return "needs in_features in multiples of 32"
    if case.device == "cuda" and case.batch_invariant == (varies is not None):
        return varies or only_invariant(case)
    return _no_triton(case)


def _reject_triton_slabs(case: Case) -> str | None:
    if case.get("format") != "mxfp4":
        return f"takes mxfp4, not {case.get('format')}"
    if case.device == "cuda" and case.dtype != "bfloat16":
        return f"takes bfloat16 activations, not {case.dtype}"
    if case.device == "cuda" and case.capability is not None and case.capability < (9, 0):
        return "was measured on Hopper"
    if case.device == "cuda" and (case.get("in_features", 0) % 32 or case.get("out_features", 0) % 16):
        return "needs in_features in multiples of 32 and out_features in multiples of 16"
    if case.get("shared"):
        return "the weight is shared with the embedding, which looks rows up as they stand in the file"
    if case.device == "cuda" and case.batch_invariant:
        return "its tiles depend on the number of tokens"
    return _no_triton(case)


def _reject_triton_dense(case: Case) -> str | None:
    if case.get("format") != "dense":
        return f"takes floats, not {case.get('format')}"
    return only_invariant(case) or _no_triton(case)


def _reject_triton_few(case: Case) -> str | None:
    if case.get("format") != "dense":
        return f"takes floats, not {case.get('format')}"
    if case.device == "cuda" and case.batch_invariant:
        return "few tokens are summed in another order than many, which cuBLAS multiplies"
    if case.device == "cuda" and case.dtype == "float32":
        return "is faster than cuBLAS in 16 bits only"
    if case.device == "cuda" and case.capability is not None and case.capability < (9, 0):
        return "was measured to be faster than cuBLAS on Hopper: what it gains is to start before the kernel before it ends"
    if case.device == "cuda" and case.get("in_features", 0) % 16:
        return "needs in_features in multiples of 16"
    return _no_triton(case)


def _no_triton(case: Case) -> str | None:
    if case.device != "cuda":
        return "is for CUDA devices"
    if case.dtype not in ("bfloat16", "float32", "float16"):
        return f"takes bfloat16, float32 and float16 activations, not {case.dtype}"
    if case.capability is not None and case.capability < (8, 0):
        return f"needs compute capability 8.0, and this device has {'.'.join(map(str, case.capability))}"
    return None if find_spec("triton") else "triton is not installed: pip install triton"


def _unpacked() -> Any:
    from slipstream.ops.linear.unpacked import Unpacked

    return Unpacked()


def _reject_unpacked(case: Case) -> str | None:
    if case.get("format") not in MADE:
        return f"takes {', '.join(MADE)}, not {case.get('format')}"
    return _torchs(case) if case.device == "cpu" else "is for CPUs"


def _reject_onednn(case: Case) -> str | None:
    if case.get("format") != "dense":
        return f"takes floats, not {case.get('format')}"
    if case.device != "cpu":
        return "is for CPUs"
    if case.batch_invariant:
        return "oneDNN chooses the order of a product's sums by the number of tokens"
    if case.dtype != "bfloat16":
        return f"packs bfloat16 only, not {case.dtype}"
    if case.get("shared"):
        return "the weight is shared with the embedding, which needs it unpacked"
    import torch

    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this processor"
    return None


def _reject_torch(case: Case) -> str | None:
    return _torchs(case) if case.get("format") == "dense" else f"takes floats, not {case.get('format')}"


def _reject_reference(case: Case) -> str | None:
    if case.batch_invariant:
        return _torchs(case)
    if case.device != "cpu" and case.get("format") in set(BLOCKS) - set(OURS):
        return f"{case.get('format')} is decoded by the gguf library, on CPUs"
    return None


def _reference_unasked(case: Case) -> str | None:
    if case.get("format") == "dense":
        return None
    return "multiplies in float32 by numbers decoded at every call, so it runs only if it is forced"


IMPLS = (
    Impl("blocks", _blocks, _reject_blocks),
    Impl("blocks_invariant", _blocks_invariant, _reject_direct),
    Impl("native_invariant", _native, _reject_native),
    Impl("int4pack", _int4, _reject_int4),
    Impl("int8pack", _int8, _reject_int8),
    Impl("triton_slabs", _triton_slabs, _reject_triton_slabs),
    Impl("triton", _triton, _reject_triton),
    Impl("triton_invariant", _triton_invariant, _reject_triton_packed),
    Impl("triton_dense_invariant", _triton_dense, _reject_triton_dense),
    Impl("triton_few", _triton_few, _reject_triton_few),
    Impl("unpacked", _unpacked, _reject_unpacked),
    Impl("onednn", _onednn, _reject_onednn),
    Impl("torch", _torch, _reject_torch),
    Impl("reference", _reference, _reject_reference, _reference_unasked),
)
