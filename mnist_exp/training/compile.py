"""Compiling the training step: inductor and CUDA graphs.

This is the only file that knows private parts of torch's compiler, as trace.py is of its dispatch.
"""

import contextlib
import logging
import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import platformdirs
import torch
from torch import Tensor, fx

from mnist_exp.training.trace import Call, trace

# The number of steps times models from which on compiling is worth its while. On the seed recipe a
# compiled step takes 0.18 ms less than a traced one (of 0.41 ms), and 0.3 to 1.5 ms less in stacks
# of 4 to 16. To compile takes 8 s of a processor (18 s for a model alone, where a call holds more
# steps) and 15 s more the first time on a machine; from the cache on disk, 3 s.
COMPILE_FROM = 80_000


def compile_in_place(
    function: Call,
    state: Sequence[Tensor],
    constants: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> Call:
    """Return `function` compiled, so that a call with new inputs updates `state` in place.

    The function is traced to plain tensor operations by running it on copies, so that what the
    compiler sees knows no vmap, autograd or module. Nothing in `state` is changed by compiling.
    A compiler can raise anything.

    Args:
        function: Takes the state, the constants and the inputs, one tensor an argument, and
            returns the tensors of the new state and its other results.
        state: The tensors that the compiled function reads and overwrites.
        constants: The tensors that it only reads, the same in every call.
        inputs: Examples of what a call brings; every call must bring the same shapes.
    """

    def in_place(*flat: Tensor) -> Sequence[Tensor]:
        results = function(*flat)
        for old_tensor, new_tensor in zip(flat[: len(state)], results, strict=False):
            if new_tensor is not old_tensor:
                old_tensor.copy_(new_tensor)
        return results[len(state) :]

    example = [*(t.clone() for t in state), *constants, *inputs]
    graph = trace(in_place, example)
    with torch.random.fork_rng(), torch.no_grad():
        call = _inductor(graph, example)
        call(*example)
        if inputs[0].device.type == "cuda":
            return capture_cuda_graph(call, state, constants, inputs)
    return lambda *inputs: call(*state, *constants, *inputs)


def _inductor(graph: fx.GraphModule, example: Sequence[Tensor]) -> Call:
    """Return the traced `graph` as a function compiled for inputs like those of the example."""
    from torch._inductor import config as inductor  # 2 s to import, for those who compile

    # not from torch._inductor itself, where the module hides the function once it is imported
    from torch._inductor.standalone_compile import standalone_compile

    _choose_cache()
    # on a machine without a GPU, the CUDA build of torch says so in the middle of the epochs
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    inductor.compile_threads = 1  # its pool of worker processes would double the memory
    # to compile the headers takes 12 s and saves 2 s a shape, of which a program has few
    inductor.cpp_cache_precompile_headers = False
    call: Call = standalone_compile(
        graph,
        list(example),
        dynamic_shapes="from_example_inputs",
        options={"config_patches": {"cpp_wrapper": example[0].device.type == "cpu"}},
    )
    return call


def _choose_cache() -> None:
    """Let inductor keep what it compiles where a restart does not remove it.

    Its own choice is the system's temporary folder, to which this leaves it where it has to.
    """
    folder = platformdirs.user_cache_path("mnist-exp") / "inductor"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def capture_cuda_graph(
    call: Call, state: Sequence[Tensor], constants: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Call:
    """Return `call` as a CUDA graph, which is one launch, whatever it holds.

    The arguments are those of `compile_in_place`; `state` is as it was before.
    """
    before = [t.clone() for t in state]
    static_inputs = [t.clone() for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels are built and tuned at first use, which cannot be captured
            call(*state, *constants, *static_inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(*state, *constants, *static_inputs)
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)

    def replay(*inputs: Tensor) -> Sequence[Tensor]:
        for tensor, value in zip(static_inputs, inputs, strict=True):
            tensor.copy_(value)
        graph.replay()
        return [t.clone() for t in results]

    return replay


def warm_up_compiler() -> None:
    """Compile next to nothing, so that processes which are forked from this one start at once.

    The first time in a process takes a second more than those that follow, even from the cache: the
    compiler is imported, and what a cached result depends on (torch, triton, the C++ compiler) is
    read and hashed.
    """
    x = torch.zeros(16)
    with contextlib.suppress(Exception), torch.no_grad():  # TrainStep.compile() will say why not
        _inductor(trace(lambda x: [x + 1], [x]), [x])(x)


def worth_compiling(steps: int, size: int, device: torch.device, has_convolutions: bool) -> bool:
    """Return whether compiling a stack of `size` models repays itself in so many steps.

    It does not on a CPU where convolutions take the time. A step of 128 images on one thread takes,
    compiled / not compiled: 36 / 40 ms for cnn of width 16, 95 / 90 for width 32, 63 / 52 for
    cnn_pooled.
    """
    if has_convolutions and device.type == "cpu":
        return False
    return steps * size >= COMPILE_FROM and can_compile(device)


def can_compile(device: torch.device) -> bool:
    """Return whether this machine has a C++ compiler, and Python's headers for the wrappers."""
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    has_compiler = any(shutil.which(name) for name in compilers)
    return device.type in ("cpu", "cuda") and headers and has_compiler
