"""Checks ContMix on a GPU against its definition in float64, then times it; a wrong result is not timed.

    python tools/analysis/benchmark_contmix.py                       # check, time, memory
    python tools/analysis/benchmark_contmix.py --only check
    python tools/analysis/benchmark_contmix.py --only tune linear --json contmix.json
    python tools/analysis/benchmark_contmix.py --only resources      # what the compiler makes of it; needs no GPU

Times are medians in milliseconds: ``eager`` between events as a training step sees it, ``graph`` replayed from a CUDA
graph, which leaves out the launches from Python.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # the check asks for deterministic algorithms
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from mmoverlock.ops.contmix import contmix, general, reference, shared  # noqa: E402
from mmoverlock.ops.contmix import triton as fused  # noqa: E402

NAMES = ('query', 'key', 'weight', 'bias', 'rpb1', 'rpb2', 'value')
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# batch, heads, head width of the queries, H, W, small window, large window, cells, head width of the values
CASES = {
    'T 224 /16': (128, 8, 16, 14, 14, 5, 13, 49, 16),
    'T 800x1280 /16': (2, 8, 16, 50, 80, 5, 13, 49, 16),
    'T 224 /32': (128, 16, 16, 7, 7, 5, 7, 49, 16),
    'T 800x1280 /32': (2, 16, 16, 25, 40, 5, 7, 49, 16),
}
SHAPES = [
    (2, 3, 16, 14, 14, 5, 13, 49, 16),
    (1, 8, 16, 50, 80, 5, 13, 49, 16),
    (3, 12, 14, 7, 7, 5, 7, 49, 14),  # the map is the window
    (1, 18, 16, 13, 29, 5, 13, 49, 16),  # H is the window, one pixel over a tile would be 33
    (2, 4, 32, 17, 33, 5, 13, 49, 32),
    (2, 2, 10, 19, 13, 5, 13, 36, 10),  # W is the window
    (1, 1, 8, 16, 49, 3, 11, 7, 24),
    (2, 5, 3, 31, 15, 7, 15, 64, 5),
    (1, 2, 64, 9, 44, 1, 9, 1, 40),
    (1, 16, 16, 25, 40, 5, 7, 49, 16),
    (2, 16, 16, 7, 7, 5, 7, 49, 16),
    (2, 3, 10, 13, 14, 5, 13, 36, 10),  # two windows
    (1, 2, 64, 10, 9, 1, 9, 1, 40),
    (2, 5, 3, 16, 15, 7, 15, 64, 5),
    (2, 4, 32, 13, 13, 5, 13, 49, 32),  # the positions of one window make several tiles
]


def draw(shape, dtype, parameters=torch.float32, scale=1.0, channels_last=False, seed=0):
    """Random arguments of contmix: query, key and value in ``dtype``, what are parameters in ``parameters``."""
    batch, groups, dim, height, width, small, large, cells, channels = shape
    generator = torch.Generator('cuda').manual_seed(seed)

    def normal(*size, std=1.0, to=dtype):
        return (torch.randn(*size, generator=generator, device='cuda') * std).to(to)

    tensors = [
        normal(batch, groups * dim, height, width, std=dim**-0.5 * scale),
        normal(batch, groups, dim, cells),
        normal(small**2 + large**2, cells, std=cells**-0.5 * 2, to=parameters),
        normal(small**2 + large**2, to=parameters),
        normal(groups, 2 * small - 1, 2 * small - 1, to=parameters),
        normal(groups, 2 * large - 1, 2 * large - 1, to=parameters),
        normal(batch, 2 * groups * channels, height, width),
    ]
    if channels_last:
        tensors[0], tensors[6] = (t.contiguous(memory_format=torch.channels_last) for t in (tensors[0], tensors[6]))
    tensors[0] = tensors[0].unflatten(1, (groups, dim))
    return [t.detach().requires_grad_() for t in tensors]


def error(ours, exact, scale=1.0):
    """‖ours − exact‖ / ‖exact‖ in float64, or / ``scale`` if exact is nought beside it; NaN when ours has one."""
    size = exact.norm()
    return ((ours.double() - exact).norm() / (size if size > 1e-6 * scale else scale)).item()


def check_one(shape, dtype, **options):
    """Errors of the output and of the seven gradients, with every uninitialised tensor poisoned with NaN."""
    args = draw(shape, dtype, **options)
    exact = [a.detach().double().requires_grad_() for a in args]
    expected = reference.contmix_reference(*exact)
    cotangent = torch.randn_like(args[-1])
    gradients = torch.autograd.grad(expected, exact, cotangent.double())
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        out = contmix(*args, backend='triton')
        found = torch.autograd.grad(out, args, cotangent)
        again = torch.autograd.grad(contmix(*args, backend='triton'), args, cotangent)
    finally:
        torch.use_deterministic_algorithms(False)
    errors = {'out': error(out.detach(), expected.detach())}
    for name, a, b, c in zip(NAMES, found, gradients, again):
        # A window of one pixel has weight one whatever its logit: the gradient of its position bias is nought.
        errors[name] = error(a, b, cotangent.double().norm()) if torch.equal(a, c) else float('nan')
    return errors


def _enable(value):
    shared.ENABLED = value


def in_parallel(function, *iterables):
    """``map`` over processes: Triton compiles one kernel at a time in each, and all share its cache on disk."""
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, context, _enable, (shared.ENABLED,)) as pool:
        yield from pool.map(function, *iterables)


def _check_run(run):
    shape, dtype, options = run
    try:
        return check_one(shape, dtype, **options)
    except Exception as problem:
        return f'{type(problem).__name__}: {str(problem)[:300]}'


def check():
    """Runs the sweep; returns whether every error is within its tolerance."""
    passed = True
    print('largest relative error of output and gradients, and of which')
    runs = [(s, d, dict(seed=n)) for n, s in enumerate(SHAPES) for d in TOLERANCE]
    runs += [(SHAPES[n], d, dict(channels_last=True)) for n in (0, 2, 4, 13) for d in TOLERANCE]
    runs += [(SHAPES[n], d, dict(parameters=d)) for n in (0, 1, 3) for d in (torch.float16, torch.bfloat16)]
    line = None
    for (shape, dtype, options), errors in zip(runs, in_parallel(_check_run, runs)):
        note = ' '.join(k for k in options if k != 'seed')
        if line != (shape, note):
            line = (shape, note)
            print(f'\n{str(shape):36} {note:13}', end='')
        if isinstance(errors, str):
            print(f' {str(dtype)[6:]} FAILED {errors}', end='', flush=True)
            passed = False
            continue
        good = all(e <= TOLERANCE[dtype] for e in errors.values())
        passed &= good
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        print(f' {str(dtype)[6:]} {errors[worst]:.1e} {worst}{"" if good else f" BAD {errors}"}', end='', flush=True)
    print()
    # Logits of +-1e4: a softmax of nearly one element. What float32 can give is set by the rounding of the logits.
    for shape, dtype in itertools.product((SHAPES[0], SHAPES[3]), TOLERANCE):
        args = draw(shape, dtype, scale=3000.0)
        exact = [a.detach().double().requires_grad_() for a in args]
        cotangent = torch.randn_like(args[-1])
        results = []
        for inputs, function in ((exact, reference.contmix_reference), (args, fused.contmix_triton)):
            out = function(*inputs)
            results.append([out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))])
        single = [a.detach().float().requires_grad_() for a in args]
        out = reference.contmix_reference(*single)
        results.append([out.detach(), *torch.autograd.grad(out, single, cotangent.float())])
        logits = reference.affinity_logits(*(a.detach().double() for a in args[:4])).abs().max()
        for name, result in (('fused', results[1]), ('float32 definition', results[2])):
            errors = [error(a, b) for a, b in zip(result, results[0])]
            print(f'{f"logits to {logits:.0f}, {str(dtype)[6:]}, {name}":45}', *(f'{e:.0e}' for e in errors))
        passed &= all(torch.isfinite(t).all().item() for t in results[1])
        passed &= error(results[1][0], results[0][0]) <= max(TOLERANCE[dtype], 2e-3)
    print('check', 'passed' if passed else 'FAILED', flush=True)
    return passed


def composition(query, key, weight, bias, rpb1, rpb2, value):
    """The official composition in PyTorch operators: half-precision products, softmax in float32, logits in memory."""
    batch, groups, _, height, width = query.shape
    affinity = torch.einsum('bgdp,bgdl->bgpl', query.flatten(3), key)
    logits = F.linear(affinity, weight.to(query.dtype), bias.to(query.dtype)).unflatten(2, (height, width)).float()
    small, large = value.unflatten(1, (2, groups, -1)).unbind(1)

    def window_sum(attn, values, row0):
        return reference.window_sum(attn.to(values.dtype), values, row0)

    return reference.mix_rows(logits, rpb1, rpb2, small, large, 0, window_sum)


def median(function, repeats=20, inner=5):
    """Median time in ms of ``function`` between CUDA events, ``inner`` calls at a time."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / inner)
    return statistics.median(times)


def graphed(function):
    """``function`` recorded as a CUDA graph; returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def steps(function, args):
    """Forward alone, and forward with the gradients of all arguments."""
    cotangent = torch.randn_like(args[-1])

    def forward():
        with torch.no_grad():
            function(*args)

    def both():
        torch.autograd.grad(function(*args), args, cotangent)

    return forward, both


def peak(function, args):
    """Bytes of forward and backward at their peak, beyond arguments, output and gradients."""
    cotangent = torch.randn_like(args[-1])
    out = function(*args)
    grads = torch.autograd.grad(out, args, cotangent)
    results = sum(t.untyped_storage().nbytes() for t in (out, *grads))
    del out, grads
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function(*args)
    grads = torch.autograd.grad(out, args, cotangent)  # noqa: F841  held, as a training step holds them
    return torch.cuda.max_memory_allocated() - before - results


def floors(shape, size):
    """Least time in ms of forward and of both by bytes (4.3 TB/s) and by operations (400 TFLOP/s, mma.sync fp16)."""
    batch, groups, dim, height, width, small, large, cells, channels = shape
    places, logits = batch * groups * height * width, small**2 + large**2
    forward_bytes = places * size * (dim + 4 * channels) + batch * groups * dim * cells * size
    both_bytes = forward_bytes + places * size * (2 * dim + 6 * channels)
    forward = 2 * places * logits * (dim + channels) + 2 * batch * groups * dim * cells * logits
    both = forward + 2 * places * logits * (3 * dim + 2 * channels) + 6 * batch * groups * dim * cells * logits
    return {
        'bytes': (forward_bytes / 4.3e9, both_bytes / 4.3e9),
        'operations': (forward / 400e9, both / 400e9),
    }


def time_cases(dtypes, cases, slow):
    """Prints and returns the table of times and memory."""
    rows = []
    for (name, shape), dtype, last in itertools.product(cases.items(), dtypes, (False, True)):
        if last and dtype is not torch.float16:
            continue
        args = draw(shape, dtype, channels_last=last)
        row = dict(case=name, dtype=str(dtype)[6:], layout='channels-last' if last else 'contiguous')
        contenders = {'fused': fused.contmix_triton}
        if slow and not last and dtype is torch.float16:
            contenders['composition'] = composition
        for label, function in contenders.items():
            forward, both = steps(function, args)
            row[f'{label} forward eager'] = median(forward)
            row[f'{label} both eager'] = median(both)
            if label == 'fused':
                row[f'{label} forward graph'] = median(graphed(forward))
                row[f'{label} both graph'] = median(graphed(both))
            batch, groups, _, height, width, small, large, *_ = shape
            logits = 4 * batch * groups * height * width * (small**2 + large**2)
            row[f'{label} memory, share of fp32 logits'] = peak(function, args) / logits
        for kind, (forward_floor, both_floor) in floors(shape, args[-1].element_size()).items():
            row[f'floor {kind} forward'], row[f'floor {kind} both'] = forward_floor, both_floor
        rows.append(row)
        print(f'{name}, {row["dtype"]}, {row["layout"]}')
        for label in contenders:
            found = {k.removeprefix(label): v for k, v in row.items() if k.startswith(label)}
            print(f'    {label:12}', ', '.join(f'{k.strip()} {v:.3f}' for k, v in found.items()), flush=True)
    return rows


def profile(cases, dtype=torch.float16):
    """Prints the kernels of one forward and backward."""
    for name, shape in cases.items():
        args = draw(shape, dtype)
        _, both = steps(fused.contmix_triton, args)
        for _ in range(3):
            both()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            for _ in range(10):
                both()
            torch.cuda.synchronize()
        print(f'{name}: microseconds a step')
        for event in sorted(prof.key_averages(), key=lambda e: -e.device_time_total)[:9]:
            print(f'    {event.device_time_total / 10:8.1f} {event.count / 10:5.1f}x  {event.key[:60]}')
        sys.stdout.flush()


TRIALS = [dict(segments=(s,) * 4, stages=(n,) * 4) for s in (2, 4, 8) for n in (1, 2, 3)]
TRIALS += [dict(registers=(n,) * 4) for n in (96, 128)] + [dict(programs=n) for n in (256, 1024, 2048)]
SHARED_KERNELS = ('forward', 'query', 'value', 'table', 'product')
SHARED_TRIALS = [dict()] + [
    dict.fromkeys(SHARED_KERNELS, (columns, warps, registers))
    for columns in (32, 64)
    for warps, registers in ((4, 0), (4, 168), (4, 128), (8, 0), (8, 128))
]
SHARED_TRIALS += [dict(cells=32), dict(share=0.024), dict(share=1.0), dict(sums=0.02), dict(sums=0.04)]


def _shares(shape):
    """Whether the kernels for shared windows serve a shape."""
    return shared.takes(*shape[3:5], shape[6], max(shape[2], shape[8]))


def _kind(shape):
    """The module whose launch parameters serve a shape, and what to try for them."""
    return (shared, SHARED_TRIALS) if _shares(shape) else (general, TRIALS)


def _warm(shape, option):
    module, _ = _kind(shape)
    module.TUNING = dataclasses.replace(module.TUNING, **option)
    try:
        steps(fused.contmix_triton, draw((2, *shape[1:]), torch.float16))[1]()
    except Exception:
        pass  # the timed run will say it


def tune(cases, dtype=torch.float16):
    """Times every kernel under several launch parameters."""
    pairs = [(shape, option) for shape in cases.values() for option in _kind(shape)[1]]
    list(in_parallel(_warm, [s for s, _ in pairs], [o for _, o in pairs]))
    for name, shape in cases.items():
        module, trials = _kind(shape)
        kept = module.TUNING
        args = draw(shape, dtype)
        _, both = steps(fused.contmix_triton, args)
        print(name)
        for option in trials:
            module.TUNING = dataclasses.replace(kept, **option)
            try:
                both()
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
                    for _ in range(5):
                        both()
                    torch.cuda.synchronize()
            except Exception as problem:  # a launch that does not fit is a result, too
                print(f'    {option}: {type(problem).__name__} {str(problem)[:100]}')
                continue
            times = {e.key: e.device_time_total / 5 for e in prof.key_averages() if e.key.endswith('_kernel')}
            print('   ', option, {k.removesuffix('_kernel'): round(v) for k, v in times.items()}, flush=True)
        module.TUNING = kept


def linear(dtype=torch.float16):
    """Time against the size of the map, for the plot."""
    rows = []
    for side in (14, 32, 48, 64, 96, 128, 192, 256):
        args = draw((1, 8, 16, side, side, 5, 13, 49, 16), dtype)
        forward, both = steps(fused.contmix_triton, args)
        row = dict(side=side, forward=median(graphed(forward)), both=median(graphed(both)))
        rows.append(row)
        print(row, flush=True)
    return rows


def plot(rows, path):
    """Draws time against positions, both logarithmic, beside lines of equal time a position."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 4))
    positions = [row['side'] ** 2 for row in rows]
    for key, label in (('forward', 'forward'), ('both', 'forward and backward')):
        times = [row[key] for row in rows]
        (line,) = axes.plot(positions, times, 'o-', label=label)
        axes.plot(positions, [times[-1] * p / positions[-1] for p in positions], ':', color=line.get_color())
    axes.set(xscale='log', yscale='log', xlabel='positions, H x W', ylabel='ms', title='ContMix, 8 groups, K 13, fp16')
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches='tight')


HALVES = ('q', 'v', 'g', 'out', 'dq', 'dv', 'key', 'dkey')
# Strides of one: where the channels are contiguous, and where the columns are.
LAST = ('sqd', 'svc', 'soc', 'sgc', 'sdd', 'sdc')
FIRST = ('sqw', 'svw', 'sow', 'sgw', 'sdw', 'skl', 'sdl')


def resources(cases, capability=90):
    """Compiles the kernels for a GPU that need not be there; prints registers, local memory, instructions, loops.

    The shapes of the check are compiled, too, because what is looked for depends on the shape. Returns whether no
    kernel reads a register that nothing wrote.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmoverlock.ops.contmix import general_kernels, shared_kernels

    cuobjdump = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    print(f'{"case":27} {"kernel":19} warps registers local shared instructions  of which loops')
    sound = True
    cases = cases | {'x'.join(map(str, shape[1:])): shape for shape in SHAPES}
    for name, shape in cases.items():
        batch, groups, dim, height, width, small, large, _, channels = shape
        if _shares(shape):
            module = shared_kernels
            plan = shared.Plan(batch, groups, height, width, dim, channels, (small, large))
            names = dict(query='query_grad', value='value_grad', table='table_grad', product='product_grad')
            constants = [dict(plan.constants('forward', True, torch.empty(1, 1)), APART=apart) for apart in (0, 1)]
            constants += [plan.constants(k, True, torch.empty(1, 1)) for k in names]
            constants += [plan.prepare_constants(rows, True) for rows in (1, 10**6)]
            constants.append(plan.key_constants(32, True))
            kernels = ['forward', 'forward', *names.values(), 'prepare', 'prepare', 'key_grad']
            kernels = [f'contmix_shared_{k}_kernel' for k in kernels]
        else:
            module = general_kernels
            kernels = [f'contmix_{k}_kernel' for k in ('forward', 'query_grad', 'value_grad', 'product_grad')]
            plan = general.Plan(batch, groups, height, width, dim, channels, (small, large))
            known = plan.constants(torch.float16, torch.empty(1, 1))
            constants = [dict(known, **plan.launch(n)) for n in range(len(kernels))]
        for label, known in zip(kernels, constants):
            count = known['num_warps']
            kernel = getattr(module, label)
            signature, values, hints = {}, {}, {}
            for place, argument in enumerate(kernel.arg_names):
                if argument in known or argument in (LAST if module is general_kernels else FIRST):
                    signature[argument], values[(place,)] = 'constexpr', known.get(argument, 1)
                elif argument in module._SIZES or (len(argument) == 3 and argument[0] == 's'):
                    signature[argument] = 'i32'
                else:
                    halves = (*HALVES, 'm') if module is general_kernels else HALVES
                    signature[argument] = '*fp16' if argument in halves else '*fp32'
                    hints[(place,)] = [['tt.divisibility', 16]]
            source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)
            options = dict(num_warps=count, num_stages=known['num_stages'], maxnreg=known.get('maxnreg'))
            compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
            with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
                Path(file.name).write_bytes(compiled.asm['cubin'])
                dump = [
                    subprocess.check_output([cuobjdump, flag, file.name], text=True) for flag in ('-res-usage', '-sass')
                ]
            registers, local = re.search(r'REG:(\d+) STACK:(\d+)', dump[0]).groups()
            lines = re.findall(r'/\*([0-9a-f]{4,})\*/\s+(.*?);', dump[1])
            jumps = [re.search(r'BRA.* 0x([0-9a-f]+)', text) for _, text in lines]
            loops = [(int(at, 16) - int(jump[1], 16)) // 16 for (at, _), jump in zip(lines, jumps) if jump]
            label = label.removeprefix('contmix_').removesuffix('_kernel')
            print(
                f'{name:27} {label:19} {count:5} {registers:>9} {local:>5} '
                f'{compiled.metadata.shared:6} {len(lines):12}  {[n for n in loops if n > 0]}',
                flush=True,
            )
            for text in unwritten(lines):
                sound = False
                print(f'    MISCOMPILED: reads a register before it is written: {text}')
    return sound


def unwritten(lines):
    """Instructions that read a uniform register before any wrote it, which ptxas has been seen to make.

    A wrong address of a matrix product's operand is the result: wrong numbers, or an access to memory that is not ours.

    Args:
        lines (list[tuple[str, str]]): Addresses and texts of a kernel's machine code, in order.
    """
    written, found = set(), []
    for _, text in lines:
        name, *operands = re.sub(r'^@!?U?P\w+ ', '', text).strip().replace(',', ' ').split()
        operands = [o for o in operands if not re.match(r'!?U?P[\dT]', o)]
        uniform = name.startswith(('U', 'S2UR', 'R2UR'))
        width = 4 if '.128' in name else 2 if '.64' in name or '.WIDE' in name else 1
        target = ()
        for place, operand in enumerate(operands):
            for kind, number, pair in re.findall(r'(gdesc|desc)?\[?[-~|]*UR(\d+)(\.64)?', operand):
                first = int(number)
                if uniform and place == 0 and not kind:
                    target = range(first, first + width)
                    continue
                if kind == 'gdesc':  # two descriptors; where the left operand is in registers, the right one only
                    reads = range(first + 2 if operands[1][0] == 'R' else first, first + 4)
                else:
                    wide = kind or pair or (uniform and '.64' in name and not name.startswith('ULDC'))
                    reads = range(first, first + (2 if wide else 1))
                if not written.issuperset(reads):
                    found.append(text)
        written.update(target)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ('check', 'time', 'profile', 'tune', 'linear', 'resources')
    parser.add_argument('--only', nargs='+', choices=parts, default=['check', 'time', 'profile'])
    parser.add_argument('--cases', nargs='+', choices=list(CASES), default=list(CASES))
    parser.add_argument('--general', action='store_true', help='use the general kernels on small maps, too')
    parser.add_argument('--no-baseline', action='store_true', help='leave out the composition of PyTorch operators')
    parser.add_argument('--json', help='file for all numbers')
    parser.add_argument('--plot', help='picture of what --only linear gives')
    args = parser.parse_args()
    shared.ENABLED = not args.general
    if args.only == ['resources']:
        sys.exit(not resources({name: CASES[name] for name in args.cases}))
    if not torch.cuda.is_available():
        parser.error('this script needs a CUDA device')
    cases = {name: CASES[name] for name in args.cases}
    result = dict(device=torch.cuda.get_device_name(), torch=torch.__version__)
    print(result)
    passed = check() if 'check' in args.only else True
    if 'profile' in args.only and passed:
        profile(cases)
    if 'time' in args.only and passed:
        result['time'] = time_cases((torch.float16, torch.bfloat16), cases, not args.no_baseline)
    if 'tune' in args.only and passed:
        tune(cases)
    if 'resources' in args.only:
        passed &= resources(cases)
    if 'linear' in args.only and passed:
        result['linear'] = linear()
        if args.plot:
            plot(result['linear'], args.plot)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    sys.exit(not passed)


if __name__ == '__main__':
    main()
