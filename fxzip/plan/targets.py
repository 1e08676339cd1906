"""Which functions and methods a saved graph may call, by qualified name: a closed list, and no import.

Left out on purpose: what reads or writes files or other memory (``load``, ``from_file``, ``as_strided``,
``set_``, ``empty``), what takes a callable (``apply_``, ``compile``), what leaves tensors (``numpy``), and what
trusts its arguments: the ``native_`` norms read beyond statistics that are too short (`fxzip.plan.safe` writes the
checked functions instead).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxzip.errors import FileFormatError
from fxzip.plan.safe import DEFORM, deform_conv2d, is_deform
from fxzip.plan.values import words

_NAMES = words("""
abs absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d add addbmm addcdiv addcmul addmm addmv affine_grid all allclose
alpha_dropout amax amin aminmax any arange arcsin argmax argmin argsort asin atan atan2 atleast_1d
atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bernoulli bilinear bitwise_and
bitwise_not bitwise_or bitwise_xor block_diag bmm broadcast_tensors broadcast_to bucketize cat cdist ceil
celu channel_shuffle chunk clamp clamp_max clamp_min clip clone column_stack complex concat concatenate conj
constant_pad_nd conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d copysign cos cosh
cosine_similarity cross cummax cummin cumprod cumsum deg2rad detach diag diag_embed diagonal diagonal_scatter
diff div divide
dot dropout dropout1d dropout2d dropout3d dsplit dstack einsum elu embedding eq erf erfc exp exp2 expm1 eye
feature_alpha_dropout feature_dropout fft fft2 fftn flatten flip fliplr flipud floor floor_divide fmax fmin
fmod fold frac full full_like gather ge gelu glu grid_sample group_norm gt hardshrink hardsigmoid hardswish
hardtanh histc hsplit hstack hypot ifft ifft2 ifftn imag index_add index_copy index_fill index_put
index_select inner instance_norm interpolate inverse irfft irfft2 irfftn isfinite isinf isnan kron
layer_norm le leaky_relu lerp linear linspace local_response_norm log log10 log1p log2 log_softmax logaddexp
logical_and logical_not logical_or logical_xor logit logsigmoid logsumexp lp_pool1d lp_pool2d lp_pool3d lt
masked_fill masked_scatter matmul matrix_norm matrix_power max max_pool1d max_pool2d max_pool3d
max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices max_unpool1d max_unpool2d
max_unpool3d maximum mean median meshgrid min minimum mish mm movedim moveaxis msort mul multi_dot multiply
mv nan_to_num nanmean nansum narrow native_layer_norm ne neg negative
nonzero norm normal normalize numel one_hot ones ones_like outer pad pairwise_distance permute pixel_shuffle
pixel_unshuffle polar positive pow prelu prod quantile rad2deg rand rand_like randint
randint_like randn randn_like randperm ravel real reciprocal relu relu6 remainder
renorm repeat_interleave reshape rfft rfft2 rfftn rms_norm roll rot90 round rrelu rsqrt rsub scalar_tensor
scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select select_scatter selu sgn
sigmoid sign signbit silu sin sinc sinh slice_scatter softmax softmin softplus softshrink softsign sort
split split_with_sizes sqrt square squeeze stack std std_mean sub subtract sum swapaxes swapdims t take
take_along_dim tan tanh tanhshrink tensor tensor_split tensordot threshold tile topk trace transpose
trapezoid tril tril_indices triu triu_indices true_divide trunc unbind unflatten unfold unsqueeze
unravel_index upsample upsample_bilinear upsample_nearest vander var var_mean vdot vector_norm
view_as_complex view_as_real vsplit vstack where xlogy zeros zeros_like sym_float sym_int sym_ite sym_max
sym_min sym_not
""")

# Methods of torch.Tensor besides those that are also functions of torch.
_METHODS = words("""
bfloat16 bool byte char contiguous copy_ cpu cuda dim double expand expand_as fill_ float half int long
masked_fill_ ndimension nelement new_full new_ones new_tensor new_zeros repeat reshape_as short size stride
sum_to_size to type type_as view view_as zero_ __and__ __or__ __xor__ __invert__ __lshift__ __rshift__
__rsub__ __rdiv__ __rtruediv__ __rpow__ __rfloordiv__ __radd__ __rmul__ __rmatmul__ __rmod__ __iadd__
__isub__ __imul__ __itruediv__ __mod__ __pow__ __abs__ __len__
""")

_OPERATORS = words("""
abs add and_ eq floordiv ge getitem gt iadd iand ifloordiv imod imul inv invert ior ipow isub itruediv ixor
le lshift lt matmul mod mul ne neg not_ or_ pos pow rshift setitem sub truediv xor
""")
_MATH = words("ceil exp floor log log2 prod sqrt trunc")

# Operators of ATen, which torch.export writes, besides those that share a name with a function or method.
_ATEN = words("""
_adaptive_avg_pool2d _adaptive_avg_pool3d _conj _log_softmax _softmax _to_copy _unsafe_index _unsafe_view alias col2im
constant_pad_nd convolution copy fill im2col index layer_norm leaky_relu lift_fresh lift_fresh_copy
linalg_vector_norm max_pool2d_with_indices mean pixel_shuffle reflection_pad1d reflection_pad2d
reflection_pad3d replication_pad1d replication_pad2d replication_pad3d slice split_with_sizes squeeze_copy
sym_numel sym_size sym_stride upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
view_copy zero
""")

ATTRIBUTES = frozenset(words("H T data device dtype imag is_cuda layout mH mT ndim real requires_grad shape"))
"""What ``getattr`` may read."""

_NAMESPACES: tuple[tuple[str, Any], ...] = (
    ("torch", torch),
    ("torch.nn.functional", functional),
    ("torch.linalg", torch.linalg),
    ("torch.fft", torch.fft),
)
_CALLABLES = (FunctionType, BuiltinFunctionType, MethodDescriptorType)
_PREFIX = "torch.ops.aten."


@functools.cache
def functions() -> Mapping[str, Any]:
    """The functions that a graph may call, by qualified name; those of ATen are found by `find_function`."""
    table: dict[str, Any] = {"builtins.getattr": getattr, DEFORM: deform_conv2d}
    for prefix, namespace in _NAMESPACES:
        for name in _NAMES:
            for variant in (name, f"{name}_"):
                found = getattr(namespace, variant, None)
                if found is not None and not isinstance(found, (ModuleType, type)):
                    table[f"{prefix}.{variant}"] = found
    table.update({f"operator.{name}": getattr(operator, name) for name in _OPERATORS})
    table.update({f"math.{name}": getattr(math, name) for name in _MATH})
    strange = [name for name, found in table.items() if not isinstance(found, _CALLABLES)]
    assert not strange, strange
    return table


@functools.cache
def methods() -> frozenset[str]:
    """The methods of torch.Tensor that a graph may call, with the in-place forms of the named ones."""
    names = [*_METHODS, *_NAMES, *(f"{name}_" for name in _NAMES)]
    return frozenset(name for name in names if isinstance(getattr(Tensor, name, None), _CALLABLES))


@functools.cache
def _qualified() -> Mapping[int, str]:
    """Qualified names by the identity of the functions, which live as long as torch does."""
    return {id(found): name for name, found in reversed(tuple(functions().items()))}


@functools.cache
def _aten() -> frozenset[str]:
    return frozenset((*_ATEN, *_NAMES, *(f"{name}_" for name in _NAMES), *methods()))


def name_of(target: object) -> str | None:
    """The qualified name of a function that a saved graph may call; None for any other."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, packet = target._schema.name.partition("::")
        known = namespace == "aten" and packet in _aten() and _takes_tensors(target)
        return f"{_PREFIX}{packet}.{target._overloadname}" if known else None
    if is_deform(target):
        return DEFORM
    name = _qualified().get(id(target))
    return name if name is not None and functions()[name] is target else None


def _takes_tensors(target: torch._ops.OpOverload) -> bool:
    """Whether an operator takes or gives tensors: those of numbers only check nothing, ``remainder.int`` not even 0."""
    schema = target._schema
    return any("Tensor" in str(part.type) for part in (*schema.arguments, *schema.returns))


def find_function(name: str) -> Any:
    """The function of a qualified name.

    Raises:
        FileFormatError: It is not one that a saved graph may call.
    """
    found = functions().get(name)
    if found is None and name.startswith(_PREFIX):
        packet, _, overload = name.removeprefix(_PREFIX).partition(".")
        if packet in _aten() and hasattr(torch.ops.aten, packet):
            operators = getattr(torch.ops.aten, packet)
            found = getattr(operators, overload) if overload in operators.overloads() else None
            found = found if found is None or _takes_tensors(found) else None
    if found is None:
        raise FileFormatError(f"it calls {name!r}, which a saved graph may not")
    return found


_ENUMERATIONS = {"ScalarType": torch.dtype, "Layout": torch.layout, "MemoryFormat": torch.memory_format}


def check_arguments(target: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise what is wrong with the arguments of a function: of ``getattr``, and of operators of ATen.

    Raises:
        FileFormatError: It reads an attribute that it may not, or gives a number for a dtype, a layout or a memory
            format: an operator of ATen looks such a number up in a table without a look at the table's length.
    """
    if target is getattr and (len(args) != 2 or kwargs or args[1] not in ATTRIBUTES):
        raise FileFormatError(f"it reads the attribute {args[1:]!r}, which a saved graph may not")
    if isinstance(target, torch._ops.OpOverload):
        for place, argument in enumerate(target._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            kind = _ENUMERATIONS.get(str(argument.real_type).removeprefix("Optional[").removesuffix("]"))
            if kind is not None and value is not None and not isinstance(value, kind) and not _reads_attribute(value):
                raise FileFormatError(f"its {argument.name} is {value!r}, which is not a {kind.__name__}")


def _reads_attribute(value: object) -> bool:
    """Whether a value is a node like ``x.dtype``."""
    kinds = ("dtype", "layout")
    return isinstance(value, fx.Node) and value.target is getattr and len(value.args) == 2 and value.args[1] in kinds
