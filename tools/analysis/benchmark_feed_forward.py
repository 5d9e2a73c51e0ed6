"""Check, time and tune the feed-forward half and the depthwise 3x3 on a GPU, and squeeze and excitation.

    python tools/analysis/benchmark_feed_forward.py                        # check, then time
    python tools/analysis/benchmark_feed_forward.py --only tune profile
    python tools/analysis/benchmark_feed_forward.py --only excite          # check and time the perceptron

Times are medians in microseconds of calls replayed from a CUDA graph, beside the plain definition's in the same run, as
it is (eager) and compiled by ``torch.compile``. Floor: the bytes that the operator has to move at 4.3 TB/s, the hidden
map being written and read between its kernels.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from benchmark_depthwise import median  # noqa: E402

from mmoverlock.ops import depthwise_conv3x3, excite, feed_forward  # noqa: E402
from mmoverlock.ops.depthwise import small  # noqa: E402
from mmoverlock.ops.feed_forward import triton as fused  # noqa: E402

PARTS = ['check', 'time', 'tune', 'profile', 'excite']
DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16, 'float32': torch.float32}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# B, C, hidden, H, W: OverLoCK-T's blocks for pictures of 224 x 224 and 800 x 1280, XT's first
CASES = {
    'T 224 /4': (128, 64, 256, 56, 56),
    'T 224 /8': (128, 128, 512, 28, 28),
    'T 224 /16': (128, 256, 1024, 14, 14),
    'T 224 focus /16': (128, 384, 768, 14, 14),
    'T 224 focus /32': (128, 640, 1536, 7, 7),
    'XT 224 /4': (128, 56, 224, 56, 56),
    'T 800x1280 /4': (2, 64, 256, 200, 320),
    'T 800x1280 focus /16': (2, 384, 768, 50, 80),
}
# The last one: so many shares of its sums that they are summed first.
CHECKS = [(2, 64, 256, 56, 56), (3, 56, 224, 28, 28), (2, 384, 1152, 14, 14), (5, 80, 240, 7, 9), (1, 640, 1920, 7, 7)]
CHECKS += [(1, 64, 256, 72, 100)]


# B, C, hidden of squeeze and excitation: T's layers, and B's widest
EXCITED = [
    (64, 64, 16),
    (64, 128, 16),
    (64, 256, 32),
    (64, 512, 64),
    (1, 64, 16),
    (1, 256, 32),
    (1, 512, 64),
    (2, 640, 80),
]


def arguments(sizes, dtype, parameters=torch.float32):
    """Random arguments of ``feed_forward`` on the GPU."""
    batch, channels, hidden, height, width = sizes
    generator = torch.Generator('cuda').manual_seed(0)

    def draw(*shape, scale=1.0):
        tensor = torch.randn(*shape, generator=generator, device='cuda') * scale
        return tensor.to(parameters)

    x = draw(batch, channels, height, width).to(dtype, memory_format=torch.channels_last)
    weights = [draw(hidden, channels, 1, 1, scale=channels**-0.5), draw(hidden), draw(hidden, 1, 3, 3, scale=1 / 3)]
    weights += [draw(hidden), draw(1, hidden, 1, 1), draw(1, hidden, 1, 1)]
    weights += [draw(channels, hidden, 1, 1, scale=hidden**-0.5), draw(channels)]
    return [t.requires_grad_() for t in (x, *weights)]


def conv_arguments(sizes, dtype, parameters=torch.float32):
    """Random arguments of ``depthwise_conv3x3``."""
    x, _, _, weight, bias, *_ = arguments((sizes[0], sizes[2], sizes[2], *sizes[3:]), dtype, parameters)
    return [x, weight, bias]


def check():
    """Compares with float64; True if all is within the tolerance."""
    passed = True
    for dtype in TOLERANCE:
        for sizes in CHECKS:
            for function, draw in ((depthwise_conv3x3, conv_arguments), (feed_forward, arguments)):
                args = draw(sizes, dtype)
                exact = [a.detach().double().requires_grad_() for a in args]
                expected = function(*exact, backend='reference')
                cotangent = torch.randn_like(expected).to(dtype)
                gradients = torch.autograd.grad(expected, exact, cotangent.double())
                torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what is not written with NaN
                out = function(*args, backend='triton')
                found = torch.autograd.grad(out, args, cotangent)
                torch.use_deterministic_algorithms(False)
                errors = [
                    ((a.double() - b).norm() / (b.norm() + 1e-30)).item()
                    for a, b in zip((out, *found), (expected, *gradients))
                ]
                good = all(e <= TOLERANCE[dtype] for e in errors)
                passed &= good
                print(f'{function.__name__:18} {str(dtype)[6:]:9} {sizes} {"" if good else "BAD"}',
                      *(f'{e:.1e}' for e in errors), flush=True)  # fmt: skip
    print('check', 'passed' if passed else 'FAILED', flush=True)
    return passed


def steps(function, args):
    """Forward, and forward and backward, as functions of a backend."""
    plain = [a.detach() for a in args]

    def forward(backend):
        with torch.no_grad():
            return function(*plain, backend=backend)

    def both(backend):
        out = function(*args, backend=backend)
        return torch.autograd.grad(out, args, torch.ones_like(out))

    return {'forward': forward, 'both': both}


def floors(sizes, conv):
    """Microseconds: bytes of the forward pass, and of both passes, in half precision."""
    batch, channels, hidden, height, width = sizes
    small, large = (2 * batch * height * width * n / 4.3e6 for n in (channels, hidden))
    if conv:
        return 2 * large, 5 * large
    # Forward: write, read, write, read the hidden map; training writes it once more. Backward: y, dz and z written; z;
    # dz, y, h, the hidden gradient written; it twice.
    return 2 * small + 4 * large, 2 * small + 5 * large + 5 * small + 11 * large


def report(cases, dtype, compiled):
    """Prints the table of times."""
    print(f'{str(dtype)[6:]:14}{"":34}    ours  definition  compiled   floor  share', flush=True)
    for name, sizes in cases.items():
        for function, draw in ((feed_forward, arguments), (depthwise_conv3x3, conv_arguments)):
            args, conv = draw(sizes, dtype, dtype), function is depthwise_conv3x3
            others = {}
            if compiled and not conv:
                torch._dynamo.reset()
                others = steps(torch.compile(feed_forward), args)
            for (part, run), floor in zip(steps(function, args).items(), floors(sizes, conv)):
                ours, plain = median(partial(run, 'triton')), median(partial(run, 'reference'), 3)
                other = median(partial(others[part], 'reference'), 3) if others else float('nan')
                times = f'{ours:8.1f}{plain:12.0f}{other:10.0f}{floor:8.1f}{floor / ours:7.0%}'
                print(f'{name:22}{function.__name__:18}{part:8}{times}', flush=True)


def profile(cases, dtype):
    """Prints the kernels of forward and backward, in microseconds."""
    for name, sizes in cases.items():
        times = sorted(kernel_times(arguments(sizes, dtype, dtype)).items(), key=lambda item: -item[1])
        print(name, *(f'{key[:26]} {time:.1f};' for key, time in times[:14]), flush=True)


SHAPES = (
    (128, 128, 64, 8, 3, 128), (128, 128, 64, 8, 2, 128), (128, 128, 32, 8, 4, 128), (128, 128, 64, 4, 3, 255),
    (128, 64, 64, 4, 3, 255), (128, 64, 64, 4, 3, 128), (64, 128, 64, 4, 3, 255), (64, 128, 64, 4, 3, 128),
    (64, 128, 32, 4, 4, 128), (64, 64, 64, 4, 3, 255), (256, 128, 64, 8, 3, 255), (64, 256, 64, 8, 3, 128),
)  # fmt: skip
PRODUCTS = [dict(expand=s, project=s, project_grad=s) for s in SHAPES]
CONVS = [
    dict(zip(('columns', 'grad_columns', 'tile', 'warps', 'programs', 'grad_programs'), values))
    for values in (
        ((7, 4), (4,), 256, 4, 2112, 1056), ((7, 4), (4,), 256, 4, 1056, 2112), ((4,), (2,), 256, 4, 4224, 1056),
        ((4,), (4,), 512, 4, 2112, 1056), ((7, 4), (4,), 128, 2, 4224, 2112), ((2,), (2,), 512, 4, 2112, 1056),
    )
]  # fmt: skip
KERNELS = ('ffn_expand', 'ffn_project_kernel', 'ffn_project_grad', 'depthwise3_forward', 'depthwise3_back')


def kernel_times(args, repeats=4):
    """Microseconds of forward and backward by kernel."""
    run = steps(feed_forward, args)['both']
    run('triton')
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for _ in range(repeats):
            run('triton')
        torch.cuda.synchronize()
    return {e.key: e.device_time_total / repeats for e in prof.key_averages()}


def _trial(module, option, sizes, dtype):
    """Times under one choice of launch parameters; what does not fit is a result, too."""
    kept = module.TUNING
    module.TUNING = dataclasses.replace(kept, **option)
    try:
        times = kernel_times(arguments(sizes, dtype, dtype))
    except Exception as problem:
        return type(problem).__name__
    finally:
        module.TUNING = kept
    sums = ((name, sum(t for k, t in times.items() if k.startswith(name))) for name in KERNELS)
    return ' '.join(f'{name} {total:.1f}' for name, total in sums)


def tune(cases, dtype):
    """Prints the kernels of interest, in microseconds, under several launch parameters."""
    runs = [(m, o, s, dtype) for m, options in ((fused, PRODUCTS), (small, CONVS)) for o in options for s in cases]
    # Triton compiles one kernel at a time in a process; these share its cache on disk.
    workers = max(1, min(15, os.cpu_count() or 2))
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn')) as pool:
        list(pool.map(_warm, [(m.__name__, o, cases[s], dtype) for m, o, s, dtype in runs]))
    for module, option, name, _ in runs:
        label = ' '.join(f'{k}={v}' for k, v in option.items())
        print(f'{label:52} {name:22}', _trial(module, option, cases[name], dtype), flush=True)


def _warm(run):
    name, *rest = run
    _trial(sys.modules[name], *rest)


def excited():
    """Prints times of the perceptron of squeeze and excitation in float32, and the largest relative error of output and
    gradients against float64; True if all are within the tolerance."""
    print(f'{"B, C, hidden":16} ours: forward  both   definition: forward  both   error', flush=True)
    passed = True
    for batch, channels, hidden in EXCITED:
        generator = torch.Generator('cuda').manual_seed(0)
        shapes = (batch, channels, 1, 1), (hidden, channels, 1, 1), (hidden,), (channels, hidden, 1, 1), (channels,)
        args = [torch.randn(*s, generator=generator, device='cuda').div_(s[1] ** 0.5 if s[1:] else 1) for s in shapes]
        cotangent = torch.randn(args[0].shape, generator=generator, device='cuda')
        results, times = [], []
        for backend, dtype in (('triton', torch.float32), ('reference', torch.float32), ('reference', torch.float64)):
            given = [a.detach().to(dtype).requires_grad_() for a in args]
            forward = partial(excite, *given, backend=backend)
            both = partial(lambda run, *rest: torch.autograd.grad(run(), *rest), forward, given, cotangent.to(dtype))
            results.append([forward().detach(), *both()])  # no graph is kept, which no recording could be made beside
            if dtype is torch.float32:
                with torch.no_grad():
                    times.append(median(forward))
                times.append(median(both))
        error = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(results[0], results[2]))
        passed &= error < TOLERANCE[torch.float32]
        sizes = f'{batch}, {channels}, {hidden}'
        print(f'{sizes:16} {times[0]:13.1f} {times[1]:6.1f} {times[2]:20.1f} {times[3]:6.1f} {error:8.1e}', flush=True)
    print('check passed' if passed else 'check FAILED', flush=True)
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=PARTS, default=['check', 'time'])
    parser.add_argument('--cases', nargs='+', choices=list(CASES), default=list(CASES))
    parser.add_argument('--dtype', choices=list(DTYPES), default='float16')
    parser.add_argument('--compiled', action='store_true', help='time the compiled definition, too')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error('this script needs a CUDA device')
    print(torch.cuda.get_device_name(), 'torch', torch.__version__, flush=True)
    cases, dtype = {name: CASES[name] for name in args.cases}, DTYPES[args.dtype]
    if 'check' in args.only and not check():
        sys.exit(1)
    if 'time' in args.only:
        report(cases, dtype, args.compiled)
    if 'profile' in args.only:
        profile(cases, dtype)
    if 'tune' in args.only:
        tune(cases, dtype)
    if 'excite' in args.only and not excited():
        sys.exit(1)


if __name__ == '__main__':
    main()
