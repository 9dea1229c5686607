"""The operators that work plane by plane, and where they leave the split dimension of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Mark:
    """Where in a tensor the split dimension is.

    Args:
        dim: of the tensor.
        outer: how many planes of other dimensions are merged with it, as slower indices.
        inner: the same, as faster ones.
    """

    dim: int
    outer: int = 1
    inner: int = 1

    def total(self, tensor: Tensor) -> int:
        """Planes of the volume."""
        return tensor.shape[self.dim] // (self.outer * self.inner)


CONSTANT = "constant"
"""The mark of tensors that hold one number everywhere: of a slab's shape they are right on slabs."""


class NotLocal(Exception):
    """An operator joins planes; says how."""


class Arguments:
    """Of an operator, by name, and what is known of its tensors."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        self.known = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        self.known |= {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        self.tensors: list[Tensor] = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.out = out
        self.outs: list[Tensor] = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]

    def __getitem__(self, name: str) -> Any:
        return self.known[name]

    def get(self, name: str) -> Any:
        """An argument, or None where the operator has none of that name."""
        return self.known.get(name)

    @property
    def marked(self) -> list[tuple[Tensor, Mark]]:
        """The split tensors."""
        return [(t, m) for t in self.tensors if isinstance(m := mark_of(t), Mark)]

    @property
    def first(self) -> tuple[Tensor, Mark]:
        """The only split tensor.

        Raises:
            NotLocal: it is not the operator's first.
        """
        x = self.tensors[0]
        mark = mark_of(x)
        if not isinstance(mark, Mark) or len(self.marked) > 1:
            raise NotLocal("of several tensors that are split")
        return x, mark


Rule = Callable[[Arguments], Mark | None]
"""The mark of an operator's results; None: as many planes on every rank, whatever the slabs."""


def mark_of(tensor: Tensor) -> Mark | str | None:
    """What is known of a tensor. None: it is common, the same on all ranks."""
    found: Mark | str | None = getattr(tensor, "_patchreg_split", None)
    return found


def set_mark(tensor: Tensor, mark: Mark | str | None) -> None:
    """Note what is known of a tensor."""
    if mark is not None or mark_of(tensor) is not None:
        tensor._patchreg_split = mark  # type: ignore[attr-defined]


CONSTANTS = {"zeros", "ones", "full", "empty", "empty_strided", "empty_memory_format", "scalar_tensor"}


KEEPERS = {
    "alias", "clone", "detach", "expand", "fill", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like",
    "permute", "reshape", "select", "slice", "squeeze", "t", "_to_copy", "transpose", "unsqueeze", "_unsafe_view", "view",
    "zeros_like", "empty_like", "lift_fresh",
}  # fmt: skip
"""Operators that make of one number everywhere one number everywhere, beside those that work number by number."""


def keeps_constants(func: Any) -> bool:
    """Whether an operator makes, of tensors that have one number everywhere, such a tensor, whatever its shape."""
    name = func.overloadpacket.__name__
    if is_random(func):
        return False
    return torch.Tag.pointwise in func.tags or name in CONSTANTS or name.removesuffix("_") in KEEPERS


def is_random(func: Any) -> bool:
    """Whether an operator draws numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def rule_of(func: Any) -> Rule | None:
    """What an operator does to the split dimension. None: it is not known to work plane by plane."""
    name = func.overloadpacket.__name__
    if func.namespace == "aten":
        for known in (name, name.removesuffix("_"), name.removesuffix("_copy")):
            if known in RULES:
                return RULES[known]
    return _pointwise if torch.Tag.pointwise in func.tags else None


def _pointwise(given: Arguments) -> Mark:
    """Tensors of any shapes that broadcast: from the last dimension on, what is split must be split in all."""
    found = {(t.ndim - m.dim, m.outer, m.inner) for t, m in given.marked}
    if len(found) > 1:
        raise NotLocal("its tensors are split along different dimensions")
    from_end, outer, inner = found.pop()
    for tensor in given.tensors:
        if mark_of(tensor) is None and tensor.ndim >= from_end and tensor.shape[-from_end] != 1:
            raise NotLocal(f"a tensor of shape {tuple(tensor.shape)} is not split, but joined with one that is")
    return Mark(given.outs[0].ndim - from_end, outer, inner)


def _same(given: Arguments) -> Mark:
    return given.first[1]


def _view(given: Arguments) -> Mark:
    """The split dimension may be merged with others, but not be cut to pieces."""
    x, mark = given.first
    total = mark.total(x)
    before = math.prod(x.shape[: mark.dim]) * mark.outer
    to, product = tuple(given.outs[0].shape), 1
    for dim, size in enumerate(to):
        if before % product == 0 and (product * size) % (before * total) == 0:
            return Mark(dim, before // product, product * size // (before * total))
        product *= size
    raise NotLocal(f"shape {tuple(x.shape)} becomes {to}, so that planes are regrouped")


def _permute(given: Arguments) -> Mark:
    x, mark = given.first
    dims = [d % x.ndim for d in given["dims"]]
    return Mark(dims.index(mark.dim), mark.outer, mark.inner)


def _transpose(given: Arguments) -> Mark:
    x, mark = given.first
    a, b = (given["dim0"] % x.ndim, given["dim1"] % x.ndim) if "dim0" in given.known else (0, 1)
    return Mark({a: b, b: a}.get(mark.dim, mark.dim), mark.outer, mark.inner)


def _unsqueeze(given: Arguments) -> Mark:
    x, mark = given.first
    return Mark(mark.dim + (given["dim"] % (x.ndim + 1) <= mark.dim), mark.outer, mark.inner)


def _squeeze(given: Arguments) -> Mark:
    x, mark = given.first
    dims = given.get("dim")
    dims = range(x.ndim) if dims is None else [d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)]
    gone = sum(x.shape[d] == 1 for d in dims if d < mark.dim)
    return Mark(mark.dim - gone, mark.outer, mark.inner)


def _expand(given: Arguments) -> Mark:
    x, mark = given.first
    return Mark(mark.dim + given.outs[0].ndim - x.ndim, mark.outer, mark.inner)


def _repeat(given: Arguments) -> Mark:
    x, mark = given.first
    if given["repeats"][mark.dim - x.ndim] != 1:
        raise NotLocal(f"it repeats dim {mark.dim}, which is split")
    return _expand(given)


def _along(given: Arguments, dim: str = "dim") -> Mark:
    """Something along one dimension, or several, that stay."""
    x, mark = given.first
    dims = given.get(dim)
    dims = list(range(x.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    if mark.dim in [d % x.ndim for d in dims]:
        raise NotLocal(f"it works along dim {mark.dim} of {tuple(x.shape)}, which is split")
    return mark


def _slice(given: Arguments) -> Mark:
    x, mark = given.first
    if given["dim"] % x.ndim == mark.dim and given.outs[0].shape == x.shape:
        return mark
    return _along(given)


def _flip(given: Arguments) -> Mark:
    return _along(given, "dims")


def _reduce(given: Arguments) -> Mark:
    """Dimensions that become one, or go."""
    x, mark = given.first
    _along(given)
    if given.get("keepdim"):
        return mark
    dims = given["dim"]
    gone = [d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)]
    return Mark(mark.dim - sum(d < mark.dim for d in gone), mark.outer, mark.inner)


def _select(given: Arguments) -> Mark:
    x, mark = given.first
    _along(given)
    return Mark(mark.dim - (given["dim"] % x.ndim < mark.dim), mark.outer, mark.inner)


def _join(given: Arguments, new: bool = False) -> Mark:
    """``cat`` or ``stack``."""
    found = {m for _, m in given.marked}
    if len(found) > 1:
        raise NotLocal("its tensors are split along different dimensions")
    mark = found.pop()
    for tensor in given.tensors:
        if mark_of(tensor) is None and tensor.numel():
            raise NotLocal(f"a tensor of shape {tuple(tensor.shape)} is not split, but joined with one that is")
    dim = (given.get("dim") or 0) % given.outs[0].ndim
    if not new and dim == mark.dim:
        raise NotLocal(f"it joins along dim {dim}, which is split")
    return Mark(mark.dim + (new and dim <= mark.dim), mark.outer, mark.inner)


def _stack(given: Arguments) -> Mark:
    return _join(given, new=True)


def _pad(given: Arguments) -> Mark:
    x, mark = given.first
    pair = 2 * (x.ndim - 1 - mark.dim)
    if any(given["pad"][pair : pair + 2]):
        raise NotLocal(f"it pads dim {mark.dim}, which is split")
    return mark


def _layer_norm(given: Arguments) -> Mark:
    x, mark = given.first
    if mark.dim >= x.ndim - len(given["normalized_shape"]):
        raise NotLocal(f"it normalises over dim {mark.dim}, which is split")
    return mark


def _batch_norm(given: Arguments) -> Mark:
    _, mark = given.first
    if given.get("training") or mark.dim == 1:
        raise NotLocal("its statistics are those of the volume")
    return mark


def _conv(given: Arguments) -> Mark:
    """One plane at a time: kernels of one plane, or planes as a batch."""
    _, mark = given.first
    if mark.dim == 1:
        raise NotLocal("its channels are split")
    if mark.dim > 1:
        axis = mark.dim - 2
        options = [(list(given[n]) * 3)[axis] if len(given[n]) == 1 else given[n][axis] for n in ("stride", "padding")]
        if given["weight"].shape[mark.dim] != 1 or options != [1, 0] or any(given["output_padding"]):
            raise NotLocal("its kernel reaches across planes")
    return mark


def _product(names: tuple[str, str]) -> Rule:
    """Of matrices: rows of the first or columns of the second may be split, or the batch of both."""

    def rule(given: Arguments) -> Mark:
        a, b = (given[name] for name in names)
        inputs = given.get("self")
        if inputs is not None and inputs is not a and mark_of(inputs) is not None:
            raise NotLocal("the tensor that is added is split")
        mark, other = mark_of(a), mark_of(b)
        batch = a.ndim - 2
        if isinstance(mark, Mark) and isinstance(other, Mark):
            if mark == other and mark.dim < batch:
                return mark
        elif isinstance(mark, Mark):
            if mark.dim == batch:
                return mark
        elif isinstance(other, Mark) and other.dim == b.ndim - 1:
            return Mark(given.outs[0].ndim - 1, other.outer, other.inner)
        raise NotLocal("it sums over planes, or multiplies each with every other")

    return rule


def _attention(given: Arguments) -> Mark:
    found = {m for _, m in given.marked}
    if len(found) > 1 or any(mark_of(given[name]) not in found for name in ("query", "key", "value")):
        raise NotLocal("queries, keys and values are not split alike")
    mark = found.pop()
    if mark.dim >= given["query"].ndim - 2:
        raise NotLocal("every token attends to those of other planes")
    return mark


def _new(given: Arguments) -> None:
    """A tensor of one number, or of none yet, whatever is in the given one."""
    return


RULES: dict[str, Rule] = {
    **dict.fromkeys(("clone", "_to_copy", "detach", "alias", "lift_fresh", "fill", "zero", "contiguous"), _same),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), _same),
    **dict.fromkeys(("log_sigmoid_forward", "_prelu_kernel"), _pointwise),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"), _new),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view),
    **dict.fromkeys(("transpose", "t"), _transpose),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "glu", "index_select"), _along),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort"), _along),
    **dict.fromkeys(("flip", "roll"), _flip),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "prod", "any", "all", "norm", "linalg_vector_norm"), _reduce),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean", "logsumexp", "argmax", "argmin", "max", "min"), _reduce),
    **dict.fromkeys(("select", "unbind"), _select),
    **dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("mm", "bmm"), _product(("self", "mat2"))),
    **dict.fromkeys(("addmm", "_addmm_activation"), _product(("mat1", "mat2"))),
    "baddbmm": _product(("batch1", "batch2")),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "repeat": _repeat,
    "slice": _slice,
    "cat": _join,
    "stack": _stack,
    "constant_pad_nd": _pad,
    "native_layer_norm": _layer_norm,
    "convolution": _conv,
    "copy": _pointwise,
}
