"""Names that several test modules import: the golden folder and a network small enough to run in no time."""

import os
import subprocess
import sys
from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / 'golden'
sys.path.insert(0, str(GOLDEN))
import fill  # noqa: E402

#: Every part of the network, nothing in size.
TINY = dict(
    depths=(1, 1, 1, 1),
    focus_depths=(2, 1),
    widths=(8, 16, 24, 32),
    mlp_ratios=(2, 2, 2, 2),
    focus_mlp_ratio=2,
    focus_heads=(1, 2),
    kernel_sizes=(7, 7, 5, 5),
    small_kernel=3,
)


def randomise(module, seed=0):
    """Draws every parameter and statistic anew, so that no zero or one hides a mistake."""
    state = module.state_dict()
    module.load_state_dict({k: v.to(state[k].dtype) for k, v in fill.fill(state).items()})
    return module


class OnGpu:
    """A tensor's shape and type on a GPU that is not there."""

    def __init__(self, *shape, dtype=torch.float16):
        self.shape, self.dtype, self.device = shape, dtype, torch.device('cuda', 0)


def compile_kernel(kernel, sizes, constants, warps=4):
    """Compiles a kernel in Triton for a GPU that need not be there; its numbers are float32.

    The interpreter runs what the compiler refuses, such as a name that is of another type after a loop.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: 'i32' if name in sizes else '*fp32' for name in kernel.arg_names}
    signature.update(dict.fromkeys(constants, 'constexpr'))
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return triton.compile(source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=warps))


def run_interpreted(tests):
    """Runs tests of kernels in a process of their own: Triton reads the wish to interpret when it is first imported."""
    env = dict(os.environ, TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', str(tests)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert ' passed' in result.stdout
