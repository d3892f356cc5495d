"""Trees of tensors: checks of leaves, names of entries, and bases of the whole tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._autograd.twice_differentiable import with_second_derivatives
from torch_secondorder._foundation.private_torch import pytree

_LEAF = pytree.tree_structure(0)


def flatten(tree: Any, what: str) -> tuple[list[Tensor], pytree.TreeSpec]:
    """The leaves of a tree that derivatives are taken by, or that have derivatives.

    Args:
        tree: A tensor, or dicts, lists and tuples of them.
        what: How the tree is called in errors.

    Raises:
        TypeError: A leaf is no tensor, or its dtype has no derivatives.
    """
    # Most trees are one tensor; going through pytree takes as long as a small layer.
    leaves, spec = ([tree], _LEAF) if isinstance(tree, Tensor) else pytree.tree_flatten(tree)
    for leaf in leaves:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            raise _undifferentiable(tree, what)
    return leaves, spec


def unflatten(leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """The tree with these leaves."""
    return leaves[0] if spec is _LEAF else pytree.tree_unflatten(list(leaves), spec)


def _undifferentiable(tree: Any, what: str) -> TypeError:
    for name, leaf in named(tree, what):
        if not isinstance(leaf, Tensor):
            return TypeError(
                f"{name} is {type(leaf).__name__}, not a tensor: derivatives are taken by "
                "tensors; close over everything else, or leave it out of the output"
            )
        if leaf.is_complex():
            return TypeError(
                f"{name} is complex ({leaf.dtype}): take torch.view_as_real of it, and "
                "torch.view_as_complex within the function"
            )
        if not leaf.is_floating_point():
            return TypeError(
                f"{name} has dtype {leaf.dtype}, which has no derivatives: convert it with "
                ".float(), or close over it and leave it out of the tree"
            )
    raise AssertionError("every leaf is a tensor of real numbers")


def named(tree: Any, what: str) -> list[tuple[str, Any]]:
    """The leaves with their places, such as `x['weight']`."""
    found, _ = pytree.tree_flatten_with_path(tree)
    return [(what + pytree.keystr(path), leaf) for path, leaf in found]


def like(tree: Any, leaves: Sequence[Tensor], spec: pytree.TreeSpec, what: str) -> list[Tensor]:
    """The leaves of a vector in the space of another tree.

    Args:
        tree: The vector.
        leaves: Those of the other tree.
        spec: Its structure.
        what: How the vector is called in errors.

    Raises:
        ValueError: Structure, a shape or a dtype differs.
    """
    found: list[Tensor]
    found, structure = pytree.tree_flatten(tree)
    if structure != spec:
        raise ValueError(f"{what} is a tree {structure}, but what it multiplies is {spec}")
    for i, (a, b) in enumerate(zip(found, leaves, strict=True)):
        same = isinstance(a, Tensor) and a.shape == b.shape and a.dtype == b.dtype
        if not same:
            has = f"{tuple(a.shape)} {a.dtype}" if isinstance(a, Tensor) else type(a).__name__
            raise ValueError(
                f"{named(tree, what)[i][0]} is {has}, but has to be {tuple(b.shape)} {b.dtype}, "
                "as what it multiplies"
            )
    return found


def flattened(
    f: Callable[[Any], Any], spec: pytree.TreeSpec
) -> tuple[Callable[..., tuple[Tensor, ...]], list[pytree.TreeSpec]]:
    """The function from leaves to leaves, and a list that a call puts the output's structure in."""
    specs: list[pytree.TreeSpec] = []
    f = with_second_derivatives(f)

    def of_leaves(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs, found = flatten(f(unflatten(leaves, spec)), "f(x)")
        specs[:] = [found]
        return tuple(outputs)

    return of_leaves, specs


def scalar(f: Callable[[Any], Any]) -> Callable[[Any], Tensor]:
    """The function, with an error where it has no Hessian."""
    f = with_second_derivatives(f)

    def checked(x: Any) -> Tensor:
        value = f(x)
        if not isinstance(value, Tensor) or value.shape != ():
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
            raise ValueError(
                f"a Hessian is that of a scalar function, f(x) has {got}: reduce it within the "
                "function (.sum(), .mean(), [0]), or take `jacobian` for first derivatives"
            )
        if not value.is_floating_point():
            raise TypeError(f"f(x) has dtype {value.dtype}, which has no derivatives")
        return value

    return checked


def spans(total: int, chunk_size: int | None) -> list[tuple[int, int]]:
    """Ranges of at most `chunk_size` places that cover `total`."""
    step = total if chunk_size is None else chunk_size
    return [(start, min(start + step, total)) for start in range(0, total, max(step, 1))]


def numels(leaves: Sequence[Tensor]) -> list[int]:
    """The entries of each leaf."""
    return [leaf.numel() for leaf in leaves]


def basis(leaves: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Unit vectors of the tree's flat space, one for each place in a range.

    Args:
        leaves: Those of the tree.
        start: The first place.
        stop: One past the last.

    Returns:
        For each leaf a tensor of shape `(stop - start, *leaf.shape)`.
    """
    if len(leaves) == 1 and (start, stop) == (0, leaves[0].numel()):
        (leaf,) = leaves
        return [torch.eye(stop, dtype=leaf.dtype, device=leaf.device).view(stop, *leaf.shape)]
    parts, offset = [], start
    for leaf in leaves:
        # Ones on a diagonal of the block: place `start + row` is column `offset + row` of the leaf.
        block = torch.zeros(stop - start, leaf.numel(), dtype=leaf.dtype, device=leaf.device)
        if leaf.numel() > 0 and -(stop - start) < offset < leaf.numel():
            block.diagonal(offset).fill_(1.0)
        parts.append(block.view(stop - start, *leaf.shape))
        offset -= leaf.numel()
    return parts
