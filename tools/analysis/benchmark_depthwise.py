"""Checks the depthwise convolution on a GPU against its definition in float64, then times it beside PyTorch's.

    python tools/analysis/benchmark_depthwise.py                     # check, time; a wrong result is not timed
    python tools/analysis/benchmark_depthwise.py --only check time tune
    python tools/analysis/benchmark_depthwise.py --only time --dtype float32 --json depthwise.json
    python tools/analysis/benchmark_depthwise.py --only layers       # all branches with their norms
    python tools/analysis/benchmark_depthwise.py --only resources    # what the compiler makes of it; needs no GPU
    python tools/analysis/benchmark_depthwise.py --only cpu          # the CPU's form beside PyTorch's; needs no GPU

Times are medians in microseconds of calls replayed from a CUDA graph: as in a compiled network, without launches from
Python. Floors: ``bytes``, each map read or written once at 4.3 TB/s; ``fma``, the direct form at 33.5e12 multiply-adds
a second; ``tc``, the products that the kernels do, zeros and padding included, at 400 TFLOP/s.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from mmoverlock.ops import depthwise_conv2d, depthwise_conv2d_norm_branches  # noqa: E402
from mmoverlock.ops.depthwise import norm_dilated, norm_small  # noqa: E402
from mmoverlock.ops.depthwise import triton as fused  # noqa: E402

DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16, 'float32': torch.float32}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAMES = ('forward', 'input', 'weight', 'bias')

# (B, C, H, W), kernel, dilation: stages of OverLoCK-T for pictures of 224 x 224 and 800 x 1280, of B, then branches
CASES = {
    'T 224 /4': ((128, 64, 56, 56), 17, 1),
    'T 224 /8': ((128, 128, 28, 28), 15, 1),
    'T 224 /16': ((128, 256, 14, 14), 13, 1),
    'T 224 /32': ((128, 512, 7, 7), 7, 1),
    'T 800x1280 /4': ((2, 64, 200, 320), 17, 1),
    'T 800x1280 /8': ((2, 128, 100, 160), 15, 1),
    'T 800x1280 /16': ((2, 256, 50, 80), 13, 1),
    'T 800x1280 /32': ((2, 512, 25, 40), 7, 1),
    'B 224 /4': ((128, 80, 56, 56), 17, 1),
    'B 224 /8': ((128, 160, 28, 28), 15, 1),
    'B 224 /16': ((128, 384, 14, 14), 13, 1),
    'B 224 /32': ((128, 576, 7, 7), 7, 1),
    'T 224 /4, 64': ((64, 64, 56, 56), 17, 1),
    'T 224 /16, 64': ((64, 256, 14, 14), 13, 1),
    '5x5': ((64, 64, 56, 56), 5, 1),
    '9x9, 2': ((64, 64, 56, 56), 9, 2),
    '3x3, 7': ((64, 64, 56, 56), 3, 7),
    'T 224 /4, 1': ((1, 64, 56, 56), 17, 1),
    'T 224 /16, 1': ((1, 256, 14, 14), 13, 1),
}
CHECKS = [
    ((3, 5, 56, 56), 17, 1),
    ((2, 3, 28, 28), 15, 1),
    ((70, 2, 14, 14), 13, 1),
    ((130, 2, 7, 7), 7, 1),
    ((1, 2, 200, 320), 17, 1),
    ((20, 3, 56, 56), 9, 2),
    ((2, 3, 56, 56), 3, 7),
    ((2, 2, 31, 33), 19, 1),
    ((1, 4, 1, 1), 5, 1),
    ((2, 3, 5, 3), 17, 1),
    ((1, 2, 19, 130), 11, 3),
    ((5, 3, 14, 14), 7, 2),
    ((3, 2, 23, 44), 3, 5),
    ((1, 1, 9, 97), 9, 1),
    ((17, 2, 12, 30), 5, 1),
    ((2, 2, 40, 40), 1, 1),
]
BRIEF = (0, 2, 3, 6, 8, 9, 10)  # of CHECKS, for the other types
# (B, C, H, W) and the kernel whose branches, as models.layers has them, are trained with it
LAYERS = {
    'T 224 /16, 64': ((64, 256, 14, 14), 13),
    'T 224 /32, 64': ((64, 512, 7, 7), 7),
    'T 224 /8, 64': ((64, 128, 28, 28), 15),
    'T 224 /4, 64': ((64, 64, 56, 56), 17),
    'T 224 /16, 128': ((128, 256, 14, 14), 13),
    'T 800x1280 /4': ((2, 64, 200, 320), 17),
    'T 800x1280 /16': ((2, 256, 50, 80), 13),
}
CPU_CASES = [
    ((8, 56, 24, 24), 9, 2),
    ((8, 112, 12, 12), 7, 2),
    ((8, 256, 6, 6), 7, 2),
    ((8, 56, 24, 24), 17, 1),
    ((2, 64, 56, 56), 17, 1),
    ((8, 256, 6, 6), 13, 1),
]
LAYER_NAMES = ('out', 'mean', 'var', 'map', 'weights', 'gammas', 'betas')
LAYER_CHECKS = [
    *list(LAYERS.values())[:2], ((5, 3, 16, 16), 15), ((67, 4, 14, 14), 13), ((3, 5, 7, 12), 13),
    ((2, 3, 9, 4), 15), ((65, 3, 8, 8), 7), ((1, 2, 16, 11), 9),
    ((8, 64, 56, 56), 17), ((2, 128, 100, 160), 15), ((2, 40, 50, 80), 13), ((1, 24, 25, 40), 7), ((3, 5, 17, 33), 19),
]  # fmt: skip


def draw(shape, size, dtype, parameters=torch.float32, channels_last=False, seed=0):
    """Random map, weight and bias."""
    generator = torch.Generator('cuda').manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, device='cuda')

    x = normal(*shape).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = (normal(shape[1], 1, size, size) / size).to(parameters), normal(shape[1]).to(parameters)
    return [t.requires_grad_() for t in (x, weight, bias)]


def check_one(shape, size, dilation, dtype, **options):
    """Errors of output and gradients, every uninitialised tensor poisoned with NaN; NaN if two runs differ."""
    torch.backends.cudnn.allow_tf32 = False
    args = draw(shape, size, dtype, **options)
    exact = [a.detach().to(dtype).double().requires_grad_() for a in args]
    expected = depthwise_conv2d(*exact, dilation, backend='reference')
    cotangent = torch.randn(shape, device='cuda').to(dtype)
    gradients = torch.autograd.grad(expected, exact, cotangent.double())
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        runs = []
        for _ in range(2):
            out = depthwise_conv2d(*args, dilation, backend='triton')
            runs.append((out.detach(), *torch.autograd.grad(out, args, cotangent)))
    finally:
        torch.use_deterministic_algorithms(False)
    errors = []
    for ours, again, right in zip(*runs, (expected.detach(), *gradients)):
        error = ((ours.double() - right).norm() / right.norm()).item()
        errors.append(error if torch.equal(ours, again) else float('nan'))
    return errors


def _check_run(run):
    try:
        shape, size, dilation, dtype, options = run
        return check_one(shape, size, dilation, dtype, **options)
    except Exception as problem:
        return f'{type(problem).__name__}: {str(problem)[:300]}'


def check_runs():
    runs = [(*case, torch.float16, {}) for case in CHECKS]
    runs += [(*CHECKS[n], dtype, {}) for dtype in (torch.float32, torch.bfloat16) for n in BRIEF]
    runs += [(*CHECKS[n], torch.float16, dict(channels_last=True, parameters=torch.float16)) for n in (0, 2)]
    return runs


def report_check(title, names, runs, results):
    """Prints a sweep; returns whether every error is within its tolerance.

    Args:
        title (str): What is checked.
        names (sequence): Of the errors.
        runs (list): What was run, the label and the type of each.
        results: Errors of each, or why there are none.
    """
    passed = True
    print(f'{title:50}', *(f'{n:>8}' for n in names))
    for (label, dtype), errors in zip(runs, results):
        label = f'{label:36} {str(dtype)[6:]:9}'
        if isinstance(errors, str):
            print(label, 'BAD', errors, flush=True)
            passed = False
            continue
        good = all(e <= TOLERANCE[dtype] for e in errors)
        passed &= good
        print(f'{label} {"" if good else "BAD":3}', *(f'{e:8.1e}' for e in errors), flush=True)
    print(f'check of {title}', 'passed' if passed else 'FAILED', flush=True)
    return passed


def median(function, repeats=7, seconds=0.01):
    """Median time in microseconds of ``function``, replayed from a CUDA graph of many calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize()
        inner = max(1, min(50, int(seconds / (time.perf_counter() - begin))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            function()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(stop) / inner)
    return statistics.median(times)


def steps(shape, size, dilation, dtype):
    """Functions without arguments: ours and PyTorch's forward, input gradient, weight gradient."""
    x, weight, bias = (t.detach() for t in draw(shape, size, dtype))
    grad = torch.randn_like(x)
    theirs, own_bias, pad = weight.to(dtype), bias.to(dtype), dilation * (size // 2)

    def backward(*mask):
        sizes = ([1, 1], [pad, pad], [dilation, dilation], False, [0, 0], shape[1])
        return lambda: torch.ops.aten.convolution_backward(grad, x, theirs, None, *sizes, [*mask, False])

    ops = torch.ops.mmoverlock
    return {
        'forward': (
            lambda: ops.depthwise_conv2d(x, weight, bias, dilation, False),
            lambda: depthwise_conv2d(x, theirs, own_bias, dilation, backend='reference'),
        ),
        'input': (lambda: ops.depthwise_conv2d(grad, weight, None, dilation, True), backward(True, False)),
        'weight': (lambda: ops.depthwise_conv2d_weight_grad(grad, x, size, dilation), backward(False, True)),
    }


def floors(shape, size, dilation, dtype, form):
    """Least time in microseconds by bytes, by multiply-adds and by the products that the kernels do."""
    batch, channels, height, width = shape
    numbers = batch * channels * height * width
    x = torch.empty(shape, dtype=dtype, device='meta')
    launch = fused.grad_launch if form == 'weight' else fused.forward_launch
    plan, constants = launch(x, size, dilation)
    tiles = constants['BM']
    area = plan.tile[0] * plan.tile[1]
    products = channels * plan.groups * -(-plan.lanes // tiles) * tiles * plan.length(width) * area
    return (2 * numbers * dtype.itemsize / 4.3e6, numbers * size**2 / 33.5e6, 2 * products / 400e6)


def time_cases(cases, dtype):
    """Prints and returns the table of times."""
    rows = []
    print(f'{str(dtype)[6:]:16}{"":8}    ours   torch  ratio | floors: bytes     fma      tc | best floor/ours')
    for name, (shape, size, dilation) in cases.items():
        for form, (ours, theirs) in steps(shape, size, dilation, dtype).items():
            least = floors(shape, size, dilation, dtype, form)
            row = dict(case=name, dtype=str(dtype)[6:], form=form, ours=median(ours), torch=median(theirs, 3))
            row.update(zip(('bytes', 'fma', 'tc'), least))
            rows.append(row)
            print(
                f'{name:16}{form:8}{row["ours"]:8.1f}{row["torch"]:8.0f}{row["torch"] / row["ours"]:7.1f} |'
                f'{least[0]:14.1f}{least[1]:8.1f}{least[2]:8.1f} | {max(least[0], least[2]) / row["ours"]:6.0%}',
                flush=True,
            )
    return rows


FORWARD_TRIALS = [
    dict(areas=(area,), tiles=tiles, depth=depth, whole=(tiles, depth), warps=warps, stages=stages)
    for area, tiles, depth, warps, stages in (
        (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 128, 128, 4, 2), (64, 128, 64, 8, 3), (64, 256, 64, 8, 3),
        (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 256, 32, 8, 3), (256, 128, 64, 8, 3),
        (64, 64, 64, 4, 3), (64, 64, 128, 4, 3), (32, 128, 64, 4, 3), (128, 64, 32, 4, 3), (128, 64, 32, 4, 4),
    )
]  # fmt: skip
FORWARD_TRIALS += [dict(vector=8)]
GRAD_TRIALS = [
    dict(zip(('grad_area', 'grad_depth', 'grad_tiles', 'grad_warps', 'grad_stages'), values), grad_few=())
    for values in (
        (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 128, 128, 4, 2), (64, 256, 64, 8, 3), (64, 256, 64, 4, 3),
        (128, 128, 64, 8, 3), (128, 256, 64, 8, 2), (64, 64, 64, 4, 3), (64, 128, 32, 4, 4), (32, 128, 64, 4, 3),
        (32, 64, 32, 4, 4),
    )
]  # fmt: skip
GRAD_TRIALS += [dict(grad_programs=p) for p in (264, 1056)]
TRIALS = [('forward', t) for t in FORWARD_TRIALS] + [('weight', t) for t in GRAD_TRIALS]


def _warm(run):
    case, dtype, form, option = run
    kept = fused.TUNING
    fused.TUNING = dataclasses.replace(kept, **option)
    try:
        steps(*case, dtype)[form][0]()
        torch.cuda.synchronize()
    except Exception:
        pass  # the timed run will say it
    finally:
        fused.TUNING = kept


def tune(cases, dtype):
    """Times forward and weight gradient under several launch parameters, one line each."""
    kept = fused.TUNING
    print(f'{"tuning, microseconds":60}', *(f'{name.removeprefix("T "):>14}' for name in cases))
    for form, option in TRIALS:
        fused.TUNING = dataclasses.replace(kept, **option)
        times = []
        for case in cases.values():
            try:
                times.append(f'{median(steps(*case, dtype)[form][0], 5, 0.004):14.1f}')
            except Exception as problem:  # a launch that does not fit is a result, too
                times.append(f'{type(problem).__name__[:14]:>14}')
        label = ' '.join(f'{k.removeprefix("grad_")}={v}' for k, v in option.items())
        print(f'{form:8}{label:52}', *times, flush=True)
    fused.TUNING = kept


def profile(cases, dtype):
    """Prints the kernels of a call, in microseconds."""
    for name, case in cases.items():
        for form, (ours, _) in steps(*case, dtype).items():
            ours()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
                for _ in range(5):
                    ours()
                torch.cuda.synchronize()
            events = sorted(prof.key_averages(), key=lambda e: -e.device_time_total)
            print(f'{name:16}{form:8}', *(f'{e.key[:24]} {e.device_time_total / 5:.1f}' for e in events), flush=True)


def draw_layer(shape, size, dtype, seed=0):
    """Random map, whose channels lie far from zero, and branches: (k, dilation) of each, weights, gammas, betas."""
    from mmoverlock.models.layers import BRANCHES

    generator = torch.Generator('cuda').manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, device='cuda')

    branches, channels = ((size, 1), *BRANCHES[size]), shape[1]
    x = (normal(*shape) + (torch.arange(channels, device='cuda') % 5).view(1, -1, 1, 1)).to(dtype)
    weights = [normal(channels, 1, k, k) / k for k, _ in branches]
    norms = [normal(channels) for _ in range(2 * len(branches))]
    return branches, [t.requires_grad_() for t in (x, *weights, *norms)]


def run_layer(branches, args, backend='triton'):
    """Output, means, variances."""
    n = len(branches)
    x, weights, gammas, betas = args[0], args[1 : n + 1], args[n + 1 : 2 * n + 1], args[2 * n + 1 :]
    return depthwise_conv2d_norm_branches(x, weights, [d for _, d in branches], gammas, betas, [1e-5] * n, backend)


@contextlib.contextmanager
def branch_by_branch():
    """Every branch's map is made, whatever it and the branches are."""
    kept = norm_small.takes, norm_dilated.count
    norm_small.takes, norm_dilated.count = lambda *args: False, lambda *args: 0
    try:
        yield
    finally:
        norm_small.takes, norm_dilated.count = kept


def check_layer(shape, size, dtype):
    """Errors of output, means, variances and gradients of map, weights, gammas, betas; NaN if two runs differ."""
    branches, args = draw_layer(shape, size, dtype)
    exact = [a.detach().double().requires_grad_() for a in args]
    expected = run_layer(branches, exact, 'reference')
    cotangent = torch.randn(shape, device='cuda').to(dtype)
    expected = *expected, *torch.autograd.grad(expected[0], exact, cotangent.double())
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        runs = []
        for _ in range(2):
            out = run_layer(branches, args)
            runs.append((*out, *torch.autograd.grad(out[0], args, cotangent)))
    finally:
        torch.use_deterministic_algorithms(False)
    errors = []
    for ours, again, right in zip(*runs, expected):
        error = ((ours.double() - right).norm() / right.norm()).item()
        errors.append(error if torch.equal(ours, again) else float('nan'))
    n = len(branches)
    weights, gammas, betas = errors[4 : 4 + n], errors[4 + n : 4 + 2 * n], errors[4 + 2 * n :]
    return [*errors[:4], *map(max, (weights, gammas, betas))]


def _check_layer_run(run):
    norm_small._IMAGES = 1  # this process checks only: small maps of few images go the way of many
    try:
        return check_layer(*run)
    except Exception as problem:
        return f'{type(problem).__name__}: {str(problem)[:300]}'


def time_layers(dtype):
    """Times layers, forward and with their backward pass, in both forms, and prints the kernels of each."""
    print(f'{str(dtype)[6:]:28}{"":10} forward    both kept MiB | branch by branch')
    for name, (shape, size) in LAYERS.items():
        branches, args = draw_layer(shape, size, dtype)
        # As in the network, where the neighbours' maps are channels-last.
        args[0] = args[0].detach().to(memory_format=torch.channels_last).requires_grad_()
        cotangent = torch.randn(shape, device='cuda').to(dtype, memory_format=torch.channels_last)
        forward = functools.partial(run_layer, branches, args)
        both = functools.partial(lambda run, *rest: torch.autograd.grad(run()[0], *rest), forward, args, cotangent)
        times, kernels = [], []
        for form in (contextlib.nullcontext, branch_by_branch):
            with form():
                before = torch.cuda.memory_allocated()
                out = forward()
                room = (torch.cuda.memory_allocated() - before) / 2**20
                del out
                times += [median(forward), median(both), room]
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
                    for _ in range(5):
                        both()
                    torch.cuda.synchronize()
            events = sorted(prof.key_averages(), key=lambda e: -e.device_time_total)
            kernels.append([f'{e.key[:26]} {e.device_time_total / 5:.1f} ({e.count // 5})' for e in events])
        print(f'{name:16}{shape!s:22}', *(f'{t:8.1f}' for t in times), flush=True)
        for events in kernels:
            print('   ', *events, sep='  ', flush=True)


def resources(cases, dtype, capability=90):
    """Compiles the kernels for a GPU that need not be there; prints registers, local memory, instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmoverlock.ops.depthwise import triton_kernels as kernels

    cuobjdump = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    element = {'float16': '*fp16', 'bfloat16': '*bf16', 'float32': '*fp32'}[str(dtype)[6:]]
    print(f'{"case":18} {"kernel":18} registers local shared instructions in the loop')
    for name, (shape, size, dilation) in cases.items():
        x = torch.empty(shape, dtype=dtype, device='meta')
        launches = (
            (kernels.depthwise_forward_kernel, fused.forward_launch),
            (kernels.depthwise_weight_grad_kernel, fused.grad_launch),
        )
        for kernel, launch in launches:
            constants = dict(launch(x, size, dilation)[1])
            options = {o: constants.pop(o) for o in ('num_warps', 'num_stages')}
            if kernel is kernels.depthwise_forward_kernel:
                constants.update(BIAS=True, ADD=False)
            signature, values, hints = {}, {}, {}
            for place, argument in enumerate(kernel.arg_names):
                if argument in constants:
                    signature[argument], values[(place,)] = 'constexpr', constants[argument]
                elif argument in kernels._SIZES:
                    signature[argument] = 'i32'
                else:
                    signature[argument] = '*fp32' if argument in ('bias', 'products') else element
                    hints[(place,)] = [['tt.divisibility', 16]]
            source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)
            compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
            with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
                Path(file.name).write_bytes(compiled.asm['cubin'])
                usage, text = (
                    subprocess.check_output([cuobjdump, flag, file.name], text=True) for flag in ('-res-usage', '-sass')
                )
            registers, local = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
            lines = re.findall(r'/\*([0-9a-f]{4,})\*/\s+(.*?);', text)
            jumps = [(int(at, 16), re.search(r'BRA.* 0x([0-9a-f]+)', line)) for at, line in lines]
            loop = max((at - int(jump[1], 16) for at, jump in jumps if jump), default=0) // 16
            print(
                f'{name:18} {kernel.__name__:18} {registers:>9} {local:>5} {compiled.metadata.shared:6} '
                f'{len(lines):12} {loop:11}',
                flush=True,
            )


def cpu():
    """Times PyTorch's way and ours on one thread: ms of process time, medians, and how far they differ."""
    torch.set_num_threads(1)
    print(f"{'ms, PyTorch / ours':28} forward            map's gradient     weight's gradient  largest error")
    for shape, size, dilation in CPU_CASES:
        x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
        weight = torch.randn(shape[1], 1, size, size).requires_grad_()
        cotangent = torch.randn(shape).to(memory_format=torch.channels_last)
        times, results = [], []
        for backend in ('reference', 'cpu'):
            runs = [functools.partial(depthwise_conv2d, x.detach(), weight.detach(), None, dilation, backend)]
            results.append([runs[0]()])
            for inputs in ((x, weight.detach()), (x.detach(), weight)):
                out, wanted = depthwise_conv2d(*inputs, None, dilation, backend), [t for t in inputs if t.requires_grad]
                runs.append(functools.partial(torch.autograd.grad, out, wanted, cotangent, retain_graph=True))
                results[-1] += runs[-1]()
            times.append([])
            for run in runs:
                spans = []
                for _ in range(7):
                    begin = time.process_time()
                    run()
                    spans.append(1000 * (time.process_time() - begin))
                times[-1].append(statistics.median(spans))
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results[::-1]))
        cells = ''.join(f'{a:8.1f} /{b:6.1f}  ' for a, b in zip(*times))
        print(f'{f"{shape}, {size}, dilation {dilation}":28}{cells}{error:8.1e}', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ('check', 'time', 'tune', 'profile', 'layers', 'resources', 'cpu')
    parser.add_argument('--only', nargs='+', choices=parts, default=['check', 'time'])
    parser.add_argument('--cases', nargs='+', choices=list(CASES), default=list(CASES))
    parser.add_argument('--tune-cases', nargs='+', choices=list(CASES), default=list(CASES)[:5])
    parser.add_argument('--dtype', choices=list(DTYPES), default='float16')
    parser.add_argument('--json', help='file for the times')
    args = parser.parse_args()
    cases, dtype = {name: CASES[name] for name in args.cases}, DTYPES[args.dtype]
    if args.only == ['resources']:
        return resources(cases, dtype)
    if args.only == ['cpu']:
        return cpu()
    if not torch.cuda.is_available():
        parser.error('this script needs a CUDA device')
    print(torch.cuda.get_device_name(), 'torch', torch.__version__, flush=True)
    begin = time.perf_counter()
    tuned = {name: CASES[name] for name in args.tune_cases}
    # Triton compiles one kernel at a time in a process; these share its cache on disk.
    warm = []
    if set(args.only) & {'time', 'profile'}:
        warm += [(case, dtype, form, {}) for case in cases.values() for form in NAMES[:3]]
    if 'tune' in args.only:
        warm += [(case, dtype, form, option) for case in tuned.values() for form, option in TRIALS]
    runs = check_runs() if 'check' in args.only else []
    layer_runs = []
    if 'layers' in args.only:
        layer_runs = [(*c, d) for d in (torch.float16, torch.bfloat16) for c in LAYER_CHECKS]
    workers = max(1, min(15, os.cpu_count() or 2))
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn')) as pool:
        layered = pool.map(_check_layer_run, layer_runs)
        checked, warmed = pool.map(_check_run, runs), pool.map(_warm, warm)
        passed = True
        if runs:
            labels = [(str(tuple(case)) + (' CL' if options else ''), dtype) for *case, dtype, options in runs]
            passed &= report_check('shape, kernel, dilation', NAMES, labels, checked)
        list(warmed)
        if layer_runs:
            labels = [(f'{shape!s:22} {size:2}', dtype) for shape, size, dtype in layer_runs]
            passed &= report_check('layers', LAYER_NAMES, labels, layered)
    print(f'{time.perf_counter() - begin:.0f} s for checking and compiling', flush=True)
    rows = []
    if passed and 'time' in args.only:
        rows = time_cases(cases, dtype)
    if passed and 'profile' in args.only:
        profile(cases, dtype)
    if passed and 'tune' in args.only:
        tune(tuned, dtype)
    if passed and 'layers' in args.only:
        time_layers(dtype)
    if args.json:
        Path(args.json).write_text(json.dumps(dict(device=torch.cuda.get_device_name(), times=rows), indent=1))
    print(f'{time.perf_counter() - begin:.0f} s in all', flush=True)
    sys.exit(not passed)


if __name__ == '__main__':
    main()
