"""Where tests of kernels in Triton run: on a GPU, or on the CPU where TRITON_INTERPRET=1 has them interpreted."""

import os

import pytest
import torch

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cuda' if torch.cuda.is_available() and not INTERPRETED else 'cpu'
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]  # it cannot multiply matrices of bfloat16
#: ``pytestmark`` of such a file.
MARKS = [
    pytest.mark.skipif(DEVICE == 'cpu' and not INTERPRETED, reason='needs a GPU or TRITON_INTERPRET=1'),
    pytest.mark.usefixtures('full_precision'),
]


def _mend_interpreter():
    """Triton 3.6 turns a loop's bound, an array of one element, into an int in a way that NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, '__index__', lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor


if INTERPRETED:
    _mend_interpreter()
