"""What operators gave for tensors of some shapes: asked once of torch, then remembered.

A step calls the same operators with the same shapes again and again, and torch's kernels for the meta device, many of
them written in Python, take up to a hundred times as long as making one tensor without numbers.
"""

from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch


class _Form(NamedTuple):
    """What a new tensor is: all that an operator on tensors without numbers says of its result."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class KnownResults:
    """Results on the meta device of operators that neither change nor return what they are given."""

    def __init__(self):
        self._known: dict[Hashable, object] = {}

    def of(self, operator, args: tuple, kwargs: dict, compute: Callable[[], object]):
        """Return the result of an operator, by `compute` where it is not known yet."""
        if not _makes_new_tensors(operator):
            return compute()
        key = operator, torch.get_default_dtype(), _key(args), _key(tuple(kwargs.items()))
        form = self._known.get(key)
        if form is not None:
            return _made(form)
        result = compute()
        if _are_whole(result, (*args, *kwargs.values())):
            self._known[key] = _form(result)
        return result


@lru_cache(None)
def _makes_new_tensors(operator) -> bool:
    schema = operator._schema  # noqa: SLF001 (torch's)
    return not schema.is_mutable and bool(schema.returns) and all(each.alias_info is None for each in schema.returns)


def _key(value) -> Hashable:
    """Return what a result's form depends on; 1, 1.0 and True give results of different types."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    return type(value), value


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _are_whole(result, given: tuple) -> bool:
    """Return whether each tensor of a result has a storage of its own, of its own size: so is one made anew."""
    of_arguments = {each.untyped_storage()._cdata for each in _tensors(given)}
    made = [*_tensors(result)]
    storages = {each.untyped_storage()._cdata for each in made}
    return len(storages) == len(made) and not storages & of_arguments and all(
        _form(each).made().untyped_storage().nbytes() == each.untyped_storage().nbytes() for each in made)


def _form(result):
    if isinstance(result, torch.Tensor):
        return _Form(tuple(result.shape), result.stride(), result.dtype)
    return type(result)(map(_form, result)) if isinstance(result, tuple | list) else result


def _made(form):
    if isinstance(form, _Form):
        return form.made()
    return type(form)(map(_made, form)) if isinstance(form, tuple | list) else form
