"""What modules read and yield while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from brittle.models.quantised import real_numbers

Note = Callable[[nn.Module, Tensor | None, Tensor | None], None]
"""Called with a module, the first thing it read and what it yielded; None for what is no tensor."""


@contextmanager
def watch_calls(modules: Iterable[nn.Module], note: Note) -> Iterator[None]:
    """Call ``note`` after every call of one of the modules inside the block; no hook is left after it.

    Args:
        modules: Parts of a network; one that is named twice counts once.
        note: Gets quantised tensors in real numbers, and all others as they are: it has to clone what it keeps, since
            operations that follow may work in place.
    """

    def tell(module: nn.Module, arguments: tuple[object, ...], result: object) -> None:
        values = (arguments[0] if arguments else None, result)
        note(module, *(real_numbers(value) if isinstance(value, Tensor) else None for value in values))

    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            stack.callback(module.register_forward_hook(tell).remove)
        yield
