"""Tensors that say they are on a GPU and are computed on the CPU: what mixes devices fails as it does on a card.

:class:`Pretended` is a wrapper subclass of torch's with the values in a tensor of the CPU. Every operation checks its
arguments as a kernel on a card would, works on the values, and returns a pretended tensor. So there are numbers, unlike with
torch's fake tensors: searches can branch on them, and results are compared with the CPU's. Inside of :class:`Pretending`
functions that make tensors on a device, or move them, know the pretended one; so does a backward pass.

What torch allows on a card is allowed: numbers of the CPU (tensors without dimensions) beside tensors of the card, indices
of the CPU into them, and copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CARD = torch.device("cuda", 0)
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
_INDEXED = {"aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index_put"}
_INDEXED |= {"aten::_index_put_impl_"}
_WAITED = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "bincount",
}
waits: list[str] = []
"""Operations for which the host waits until a card is done with all before them: it needs their values, or their sizes."""


class MixedDevices(RuntimeError):
    """An operation on a card took a tensor of the CPU, or the other way round."""


class Pretended(Tensor):
    """A tensor of the CPU that says it is on a card."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Pretended:
        out = Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype
        )
        out.values = values
        return out

    device = property(lambda self: CARD)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        name = func._schema.name
        chosen = args[1] if name in _INDEXED else ()
        rows = any(isinstance(each, Pretended) and each.dtype == torch.bool for each in chosen)
        if rows or name.removeprefix("aten::") in _WAITED:
            waits.append(name)
        if name not in _COPIES:
            _check(name, args[0:1] if name in _INDEXED else (), given, args)
        owners = {id(each.values): each for each in given if isinstance(each, Pretended)}
        own = {id(each): each for each in given if not isinstance(each, Pretended)}
        with _asked():
            out = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

        def wrapped(each: Any) -> Any:
            if not isinstance(each, Tensor) or id(each) in own:
                return each
            return owners.get(id(each)) if id(each) in owners else Pretended(each)

        return tree_map(wrapped, out)


class PretendedGenerator(torch.Generator):
    """A generator of the pretended card."""

    device = CARD  # type: ignore[assignment]


def _plain(each: Any) -> Any:
    return each.values if isinstance(each, Pretended) else each


def _check(name: str, first: Any, given: list[Tensor], args: Any) -> None:
    if first:  # x[indices], and x[indices] = values: indices may be the CPU's where x is a card's
        if isinstance(first[0], Pretended):
            given = [each for each in [first[0], *args[2:3]] if isinstance(each, Tensor)]
    card = [each for each in given if isinstance(each, Pretended)]
    host = [each for each in given if not isinstance(each, Pretended) and (each.dim() or first)]
    if first and isinstance(first[0], Pretended):
        host = [each for each in host if each.dim()]
    if card and host:
        shapes = ", ".join(f"{tuple(each.shape)} on {'cuda' if isinstance(each, Pretended) else 'cpu'}" for each in given)
        raise MixedDevices(f"{name} takes tensors of one device, got {shapes}")


def _on_card(device: Any) -> bool:
    if device is None or isinstance(device, bool):
        return False
    return torch.device(device).type == "cuda"


def _moved(value: Tensor, card: bool) -> Tensor:
    if isinstance(value, Pretended) and not card:
        waits.append("to the host")
    if card:
        if isinstance(value, Pretended):
            return value
        return Pretended(value.detach().clone()).requires_grad_(value.requires_grad and value.is_leaf)
    return value.values if isinstance(value, Pretended) else value


_python = 0
"""How many functions of torch that Python has called are under way."""


@contextlib.contextmanager
def _asked() -> Iterator[None]:
    global _python
    _python += 1
    try:
        yield
    finally:
        _python -= 1


class _Filled(TorchDispatchMode):
    """In a backward pass: what torch itself fills missing gradients with is on the card."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = isinstance(out, Tensor) and not any(isinstance(each, Tensor) for each in tree_flatten((args, kwargs))[0])
        return Pretended(out) if made and not _python else out


class Pretending(TorchFunctionMode):
    """In the block ``device="cuda"`` is the pretended card."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, torch._ops.OpOverload):  # a kernel, called by what is above
            return func(*args, **kwargs)
        if func in (Tensor.backward, torch.autograd.backward):
            return self._backward(*args, **kwargs)
        with _asked():
            return self._called(func, args, kwargs)

    def _called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        first = args[0] if args else None
        if func in (Tensor.numpy, Tensor.__array__) and isinstance(first, Pretended):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func is Tensor.cpu:
            return _moved(first, False)
        if func is Tensor.cuda:
            return _moved(first, True)
        if func is Tensor.tolist and isinstance(first, Pretended):
            waits.append("tolist")
            return first.values.tolist()
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is F.embedding_bag and isinstance(first, Pretended) and first.dim() == 2:  # its offsets are made in there
            offsets = Pretended(torch.arange(0, first.numel(), first.shape[1]))
            weights = kwargs.pop("per_sample_weights", None)
            kwargs["per_sample_weights"] = None if weights is None else weights.reshape(-1)
            return func(first.reshape(-1), args[1], **{**kwargs, "offsets": offsets})
        if func is Tensor.new_tensor and isinstance(first, Pretended):
            return Pretended(first.values.new_tensor(*args[1:], **kwargs))
        if "device" in kwargs:
            card = _on_card(kwargs["device"])
            generator = kwargs.get("generator")
            if generator is not None and (generator.device.type == "cuda") != card:
                raise MixedDevices(f"{func.__name__} takes a generator of its own device")
            if card:
                out = func(*args, **{**kwargs, "device": "cpu"})
                return out if isinstance(out, Pretended) else Pretended(out.detach()).requires_grad_(out.requires_grad)
            if kwargs["device"] is not None and isinstance(first, Pretended):  # x.new_zeros(…, device="cpu")
                first = first.values
            return func(first, *args[1:], **kwargs) if args else func(**kwargs)
        return func(*args, **kwargs)

    def _backward(self, loss: Tensor, gradient: Tensor | None = None, *_: Any, **__: Any) -> None:
        """The engine of torch, with what runs in it knowing the card."""
        gradient = torch.ones_like(loss) if gradient is None else gradient
        with self, _Filled():
            engine = torch.autograd.Variable._execution_engine
            engine.run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)

    @staticmethod
    def _to(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wanted = kwargs.pop("device", None)
        rest = []
        for word in args:
            if isinstance(word, (str, torch.device)):
                wanted = word
            elif isinstance(word, Tensor):
                wanted, word = word.device, word.dtype
                rest.append(word)
            else:
                rest.append(word)
        if wanted is not None:
            value = _moved(value, _on_card(wanted))
        kwargs.pop("non_blocking", None)
        rest = [word for word in rest if not isinstance(word, bool)]
        return value.to(*rest, **kwargs) if rest or kwargs else value


def on_card(value: Any) -> Any:
    """Return tensors, in containers too, as on the pretended card; a module is moved there."""
    if not isinstance(value, nn.Module):
        return tree_map(lambda each: _moved(each, True) if isinstance(each, Tensor) else each, value)
    known: dict[int, Any] = {}
    for module in value.modules():
        for name, own in module._parameters.items():
            if own is not None:
                moved = nn.Parameter(_moved(own.detach(), True), requires_grad=own.requires_grad)
                module._parameters[name] = known.setdefault(id(own), moved)
        for name, held in module._buffers.items():
            if held is not None:
                module._buffers[name] = known.setdefault(id(held), _moved(held, True))
    return value


def values(value: Any) -> Any:
    """Return what is on the pretended card as it is on the CPU."""
    return tree_map(_plain, value)
