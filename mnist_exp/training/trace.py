"""Tracing: what a function of tensors does, as a graph of plain operations.

To run the graph costs no autograd, no vmap and no module: a third of the time of a step of a small
model. A compiler gets the same graph.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[..., Sequence[Tensor]]

# Operations that are called as people call them, which takes 1 µs less than `torch.ops`.
_METHODS = frozenset({"expand", "new_zeros", "view"})
_FUNCTIONS = frozenset(
    {
        *("abs", "add", "addcmul", "addmm", "amax", "argmax", "bitwise_and", "bmm", "div", "eq"),
        *("exp", "gather", "index_select", "lerp", "log", "maximum", "mean", "mm", "mul", "ne"),
        *("neg", "relu", "scatter_add", "select", "sqrt", "squeeze", "stack", "sub", "sum", "t"),
        *("transpose", "unsqueeze", "where"),
    }
)
# what depends on no value of its arguments
_CONSTANTS = frozenset({"ones_like", "zeros_like", "new_zeros", "scalar_tensor", "arange"})


def trace(function: Call, example: Sequence[Tensor]) -> fx.GraphModule:
    """Return `function` as a module that carries out the operations which it comes to.

    What Python decides on the way is decided by the example, once and for all.

    Args:
        function: Takes tensors, and returns tensors.
        example: The tensors to call it with; those that it writes to are written to.

    Raises:
        ValueError: If what the function does depends on values.
    """
    devices = {t.device for t in example if t.is_cuda}  # with several, torch asks which
    with torch.random.fork_rng(list(devices)), _Recorder() as recorder:
        results = function(*example)
    writer = _Writer(recorder.done, example)
    graph = writer.graph
    graph.output([writer.node(t) for t in results])
    _turn_products(graph)
    ends = ("placeholder", "output")
    graph.eliminate_dead_code(lambda node: node.op in ends or node in writer.writing)
    return fx.GraphModule(writer.constants, graph)


class _Done(NamedTuple):
    """An operation that was carried out."""

    function: Any  # of torch.ops
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any  # a tensor, or several, or none

    @property
    def name(self) -> str:
        """The name of the operation, without that of its variant."""
        return str(self.function._schema.name.partition("::")[2])

    @property
    def writes(self) -> bool:
        """True where it writes to an argument."""
        return bool(self.function._schema.is_mutable)

    @property
    def draws(self) -> bool:
        """True where it draws random numbers."""
        return torch.Tag.nondeterministic_seeded in self.function.tags

    @property
    def given(self) -> list[Tensor]:
        """The tensors among its arguments."""
        found: list[Any] = []
        map_aggregate([self.args, dict(self.kwargs)], found.append)
        return [part for part in found if isinstance(part, Tensor)]


class _Recorder(TorchDispatchMode):
    """A context that writes down the operations of torch, as they come out of autograd and vmap."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: list[_Done] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: to hide what follows from torch's compiler takes its import, a second."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        parts = result if isinstance(result, list | tuple) else [result]
        if not all(part is None or isinstance(part, Tensor) for part in parts):
            raise ValueError(f"what it does depends on values ({func})")
        self.done.append(_Done(func, args, kwargs or {}, result))
        return result


class _Writer:
    """Writes a graph that does again what was done to the tensors of an example."""

    def __init__(self, done: Sequence[_Done], example: Sequence[Tensor]) -> None:
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.writing: set[fx.Node] = set()  # the nodes that write to their arguments
        self._nodes: dict[int, fx.Node] = {}  # by the id of the tensor; all tensors are alive
        self._views: dict[Any, fx.Node] = {}
        self._constant: set[int] = set()  # the ids of the tensors that are the same in every call
        self._written = {_memory(t) for each in done if each.writes for t in each.given}
        for i, tensor in enumerate(example):
            self._add(tensor, self.graph.placeholder(f"input_{i}"))
        for each in done:
            self._write(each)

    def node(self, tensor: Tensor) -> fx.Node:
        """Return the node whose value is `tensor`; what nothing has computed is a constant."""
        if id(tensor) not in self._nodes:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor
            self._add(tensor, self.graph.create_node("get_attr", name))
        return self._nodes[id(tensor)]

    def _write(self, done: _Done) -> None:
        result, given = done.result, done.given
        if isinstance(result, Tensor) and not done.writes:
            is_same = done.name in _CONSTANTS or all(id(t) in self._constant for t in given)
            if is_same and not done.draws and _memory(result) not in self._written:
                self._constant.add(id(result))
                return
            # vmap, autograd and the functions of torch make many views that are there already
            same = given[0] if self._is_identity(done) else None
            seen = self.node(same) if same is not None else self._views.get(_view(result))
            if seen is not None:
                self._nodes[id(result)] = seen
                return
        node = self._create(done)
        if done.writes:
            self.writing.add(node)
        if isinstance(result, Tensor):
            self._add(result, node)
        else:
            for i, part in enumerate(result or ()):
                if part is not None:  # a gradient that is not needed
                    self._add(part, self.graph.call_function(operator.getitem, (node, i)))

    def _is_identity(self, done: _Done) -> bool:
        """Return whether an operation is the product with 1, to which vmap brings every bias.

        The product is another tensor where somebody writes to it, or to what it was made of.
        """
        if done.name != "mul" or not isinstance(done.args[1], int) or done.args[1] != 1:
            return False
        memories = {_memory(done.result), _memory(done.given[0])}
        is_same = bool(done.result.dtype == done.given[0].dtype)
        return is_same and not memories & self._written

    def _add(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._views.setdefault(_view(tensor), node)

    def _create(self, done: _Done) -> fx.Node:
        def with_nodes(arguments: Any) -> Any:
            return map_aggregate(
                arguments, lambda part: self.node(part) if isinstance(part, Tensor) else part
            )

        args, kwargs = with_nodes(done.args), with_nodes(dict(done.kwargs))
        if done.name in _FUNCTIONS:
            return self.graph.call_function(getattr(torch, done.name), args, kwargs)
        if done.name in _METHODS:
            return self.graph.call_method(done.name, args, kwargs)
        return self.graph.call_function(done.function, args, kwargs)


def _memory(tensor: Tensor) -> int:
    """Return what all views of the same memory have in common."""
    return int(tensor.untyped_storage()._cdata)


def _view(tensor: Tensor) -> Any:
    """Return what two tensors have in common that are the same view of the same memory."""
    place = _memory(tensor), tensor.storage_offset()
    return *place, tensor.shape, tensor.stride(), tensor.dtype


def _turn_products(graph: fx.Graph) -> None:
    """Replace the transposes of batched products, (AB)^T, by products of transposes, B^T A^T.

    The gradients of the weights of stacked linear layers are such. They would be laid out the other
    way round than the weights, and the update of the weights would take several times as long.
    """
    for node in graph.nodes:
        product = _transposed(node)
        if product is not None and product.target is torch.bmm and len(product.users) == 1:
            first, second = product.args
            with graph.inserting_before(node):
                factors = _transpose(graph, second), _transpose(graph, first)
                turned = graph.call_function(torch.bmm, factors)
            node.replace_all_uses_with(turned)


def _transposed(node: fx.Node) -> Any:
    """Return the node of which this is the transpose, as matrices in a batch, or None."""
    is_transpose = node.target is torch.transpose and {*node.args[1:]} == {1, 2}
    return node.args[0] if is_transpose else None


def _transpose(graph: fx.Graph, node: Any) -> fx.Node:
    """Return the node of the transpose, which may be there already."""
    before: fx.Node | None = _transposed(node)
    return graph.call_function(torch.transpose, (node, 1, 2)) if before is None else before
