"""Where the time of a model goes: by kind of kernel, and by part of the network.

    python tools/analysis/profile.py t --batch 128 --dtype fp16
    python tools/analysis/profile.py t --mode train --batch 64 --dtype fp16 --run compile --top 20
    python tools/analysis/profile.py convnext_tiny --task det --shape 800x1280 --batch 2 --depth 2 --trace trace.json

What is timed is a row of ``benchmark.py``, with its flags. Kernels are those that torch.profiler sees: on a GPU, where
their sum beside the time of a step says how much of it the device waits; on a CPU they are PyTorch's operators, without
what they call. Parts are clocked separately, by hooks before and after modules: those of the first level of the network
(stem, stage1, ..., with ``--depth 2`` one level further down), then by class of layer within the blocks. Backward
passes have a column of their own. A compiled network has no modules left to clock, and gets the first table only.
"""

# Nothing but the standard library is imported at the top, see the next lines.
import argparse
import os.path as osp
import re
import sys
from collections import defaultdict

if __name__ == 'profile':
    # torch imports cProfile, and that imports the standard library's module of this name. When a tool of this folder is
    # run as a script, Python looks here first and finds this file: hand over the one that was meant.
    import importlib.machinery
    import importlib.util
    import sysconfig

    _path = osp.join(sysconfig.get_path('stdlib'), 'profile.py')
    _spec = importlib.util.spec_from_file_location('profile', _path)
    sys.modules['profile'] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules['profile'])

#: Kind of kernel -> what its name holds, tried in this order, case ignored. Names are of CUDA kernels (ours, PyTorch's,
#: cuDNN's, cuBLAS's) and of PyTorch's operators on a CPU.
GROUPS = {
    'contmix': r'contmix|^shared_|query_grad|value_grad|window_sum|na2d',
    'feed-forward': r'^ffn_|^grn_(scale|grad)',
    'squeeze and excitation': r'^excite_',
    'depthwise 3x3': r'^depthwise3_|conv2d_c1_k1',
    'depthwise': r'depthwise|^dilated_|dwconv|conv_dw|^band_|^diagonal_|^weight_grad_kernel',
    'norms': r'norm|welford|grn|^branch_|\bbn_',
    'matmul and convolution': (
        r'gemm|matmul|cutlass|nvjet|xmma|conv|wgrad|dgrad|fprop|addmm|\bmm\b|bmm|linear\b|cudnn|sm\d\d_'
    ),
    'softmax and loss': r'softmax|nll',
    'reductions': r'reduce|sum|mean|pool|argmax',
    'resizing': r'upsample|interp|bilinear',
    'copies and casts': r'copy|cat|transpose|permute|contiguous|memcpy|memset|fill|zero|nchw|nhwc|\bto\b|clone',
    'elementwise': r'elementwise|add|mul|gelu|silu|sigmoid|div|sub|exp|pow|sqrt|foreach|multi_tensor',
}
#: Kernels that inductor makes are named after all that went into them, such as the bias of a convolution; how they are
#: made says more.
INDUCTOR = {'poi': 'elementwise', 'red': 'reductions', 'per': 'reductions', 'tem': 'matmul and convolution'}


def group(name: str) -> str:
    """Kind of a kernel by its name: a key of ``GROUPS``, or 'other'."""
    made = re.match(r'triton_(poi|red|per|tem)_', name)
    if made:
        return 'norms' if made[1] in ('red', 'per') and 'norm' in name else INDUCTOR[made[1]]
    for kind, pattern in GROUPS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return 'other'


def benchmark():
    """benchmark.py, the tool beside this one."""
    import importlib.util

    key = 'mmoverlock_tool_benchmark'
    if key not in sys.modules:
        path = osp.join(osp.dirname(osp.abspath(__file__)), 'benchmark.py')
        spec = importlib.util.spec_from_file_location(key, path)
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


def parse_args(argv=None):
    bench = benchmark()
    parser = argparse.ArgumentParser(description='Where the time of a model goes')
    parser.add_argument('model', help='a variant (xt, t, s, b), a model of timm or mmpretrain, or a config file')
    bench.add_job_arguments(parser, several=False)
    parser.add_argument('--steps', type=bench.positive, default=5, help='to average over; default: 5')
    parser.add_argument('--top', type=int, default=10, help='kernels to name; default: 10')
    parser.add_argument('--depth', type=bench.positive, default=1, help='components of the names of parts; default: 1')
    parser.add_argument('--trace', metavar='JSON', help='also write a trace for chrome://tracing or perfetto')
    args = parser.parse_args(argv)
    args.iters, args.warmup, args.clock, args.cudnn_benchmark = args.steps, 3, 'wall', True
    return args


# -- by kernel ----------------------------------------------------------------------------------


def kernels(step, steps: int, cuda: bool, trace=None) -> dict:
    """Time by kernel.

    Args:
        step (Callable): What to run, warm already.
        steps (int): How often.
        cuda (bool): Kernels of the GPU; else operators of the CPU.
        trace (str, optional): File for the trace.

    Returns:
        dict: Name to (milliseconds a step, calls a step).
    """
    import torch
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    if cuda and not trace:  # what the CPU does costs time to record
        kinds = [ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds, acc_events=True) as prof:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    if trace:
        prof.export_chrome_trace(trace)
    found = {}
    for event in prof.key_averages():
        on_gpu = 'CUDA' in str(event.device_type)
        if on_gpu != cuda:
            continue
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        if time > 0:
            found[event.key] = (time / 1e3 / steps, event.count / steps)
    return found


def show_kernels(found: dict, top: int) -> None:
    """Prints the sums by kind and the dearest kernels."""
    total = sum(ms for ms, _ in found.values())
    sums = defaultdict(lambda: [0.0, 0.0])
    for name, (ms, calls) in found.items():
        kind = sums[group(name)]
        kind[0] += ms
        kind[1] += calls
    print(f'\n{"kind of kernel":28}{"ms":>10}{"share":>8}{"calls":>8}')
    for kind, (ms, calls) in sorted(sums.items(), key=lambda item: -item[1][0]):
        print(f'{kind:28}{ms:10.3f}{ms / total:8.1%}{calls:8.0f}')
    print(f'{"sum":28}{total:10.3f}{"":8}{sum(calls for _, calls in found.values()):8.0f}')
    if top > 0:
        print(f'\n{"dearest kernels":84}{"ms":>10}{"calls":>8}  kind')
        for name, (ms, calls) in sorted(found.items(), key=lambda item: -item[1][0])[:top]:
            short = re.sub(r'void |at::native::|\(anonymous namespace\)::|gpu_kernel_impl\w*<', '', name)
            print(f'{short[:82]:84}{ms:10.3f}{calls:8.0f}  {group(name)}')


# -- by part ------------------------------------------------------------------------------------


class Clock:
    """Time between marks: events on a GPU, which do not stop it, and the wall clock on a CPU."""

    def __init__(self, cuda: bool):
        self.cuda = cuda

    def mark(self):
        if not self.cuda:
            import time

            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, first, last) -> float:
        return first.elapsed_time(last) if self.cuda else (last - first) * 1e3


def units(body) -> dict:
    """The modules that a network calls on its way down, by name: containers are taken apart, all else is whole."""
    import torch.nn as nn

    found = {}

    def visit(prefix, module):
        for name, child in module.named_children():
            path = f'{prefix}.{name}' if prefix else name
            if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or named(child, 'Stage'):
                visit(path, child)
            else:
                found[path] = child

    visit('', body)
    return found


def named(module, word: str) -> bool:
    return type(module).__name__.endswith(word)


def network_of(model) -> dict:
    """Units of a benchmark's network: of its backbone by their own names, of what follows by the top one's."""
    parts = {}
    for name, child in model.named_children():
        inner = {f'{name}.{k}': v for k, v in units(child).items()}
        if name in ('backbone', 'body', 'model'):
            inner = {k.split('.', 1)[1]: v for k, v in inner.items()}
        parts.update(inner or {name: child})
    if any(k.startswith('backbone.') for k in parts):  # a config's model or mmpretrain's
        parts = {k.removeprefix('backbone.'): v for k, v in parts.items()}
    return parts


def part(name: str, depth: int) -> str:
    """First components of a module's name."""
    return '.'.join(name.split('.')[:depth])


def clocked(modules: dict, step, steps: int, cuda: bool, train: bool) -> dict:
    """Time by label.

    Args:
        modules (dict): Label and name, as a tuple, to module.
        step (Callable): What to run, warm already.
        steps (int): How often.
        cuda (bool): Whether on a GPU.
        train (bool): Clock backward passes too.

    Returns:
        dict: Label to [milliseconds of the forward pass a step, of the backward pass, calls a step].
    """
    import warnings

    import torch

    clock, open_marks, spans, handles = Clock(cuda), defaultdict(list), [], []

    def hooks(label, key):
        def before(*_):
            open_marks[key].append(clock.mark())

        def after(*_):
            if open_marks[key]:
                spans.append((label, key[1], open_marks[key].pop(), clock.mark()))

        return before, after

    for (label, name), module in modules.items():
        before, after = hooks(label, (name, 0))
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        if train:
            before, after = hooks(label, (name, 1))
            handles.append(module.register_full_backward_pre_hook(before))
            handles.append(module.register_full_backward_hook(after))
    # The first layer's input is the picture, which needs no gradient: its backward pass is clocked until its weight's.
    warnings.filterwarnings('ignore', 'Full backward hook is firing')
    try:
        step()
        spans.clear()
        for _ in range(steps):
            open_marks.clear()
            step()
        if cuda:
            torch.cuda.synchronize()
    finally:
        for handle in handles:
            handle.remove()
    result = defaultdict(lambda: [0.0, 0.0, 0.0])
    for label, direction, first, last in spans:
        result[label][direction] += clock.ms(first, last) / steps
        if direction == 0:
            result[label][2] += 1 / steps
    return dict(result)


def show_parts(title: str, times: dict, train: bool) -> None:
    """Prints a table of :func:`clocked`, in the network's order."""
    print(f'\n{title:28}{"forward":>10}{"backward":>10}{"share":>8}{"calls":>8}')
    total = sum(f + b for f, b, _ in times.values()) or 1.0
    for label, (forward, backward, calls) in times.items():
        back = f'{backward:10.3f}' if train else f'{"-":>10}'
        print(f'{label[:27]:28}{forward:10.3f}{back}{(forward + backward) / total:8.1%}{calls:8.0f}')
    print(f'{"sum":28}{sum(t[0] for t in times.values()):10.3f}{sum(t[1] for t in times.values()):10.3f}')


def layers_of(parts: dict) -> dict:
    """Label and name to the modules right below the units, labelled by class; a unit without any stands for itself."""
    found = {}
    for name, unit in parts.items():
        below = units(unit)
        for key, module in below.items() if below else [('', unit)]:
            found[type(module).__name__, f'{name}.{key}'] = module
    return found


def main(argv=None) -> int:
    bench = benchmark()
    bench.compat.apply()
    args = parse_args(argv)
    with bench.cli.one_line_errors():
        bench.set_device(args)
        same = {k: getattr(args, k) for k in ('mode', 'batch', 'dtype', 'run', 'form', 'layout', 'backend')}
        if osp.isfile(args.model):
            scope = bench.read_config(args.model).get('default_scope')
            task = dict(mmdet='det', mmseg='seg').get(scope, 'cls')
            size = args.shape or bench.get_flops.default_shape(task, None)
            job = bench.grid(model=args.model, task='config', shape=size, **same)[0]
        else:
            size = args.shape or bench.get_flops.default_shape(args.task, None)
            job = bench.grid(model=args.model, task=args.task, shape=size, **same)[0]
        bench.check_job(job, args.device)
    return profile(job, args)


def profile(job, args) -> int:
    """Prints the tables of a job; returns 1 if its result was wrong, which makes its times worthless."""
    bench = benchmark()
    row = bench.Row(job, args)
    row.prepare()
    about, result = bench.machine(args.device), row.finish()
    print(f'{about["card"]}, driver {about["driver"]}, torch {about["torch"]}')
    kind = 'between events' if row.cuda else 'wall time'
    print(
        f'{osp.basename(job.model)} {job.form} {job.task} {job.mode} {job.shape[0]}x{job.shape[1]} batch {job.batch} '
        f'{job.dtype} {job.run}: {result["ms"]:.3f} ms a step ({kind}), {result["img_s"]:.1f} img/s, '
        f'error {result["error"]:.1e}, check {result["status"]}'
    )
    with bench.backend(job.backend):
        show_kernels(kernels(row.step, args.steps, row.cuda, args.trace), args.top)
        if job.compiled:
            print('\nno parts: the network is compiled')
        else:
            parts, train = network_of(row.model), job.mode == 'train'
            by_part = {(part(name, args.depth), name): module for name, module in parts.items()}
            show_parts('part', clocked(by_part, row.step, args.steps, row.cuda, train), train)
            times = clocked(layers_of(parts), row.step, args.steps, row.cuda, train)
            show_parts('layers by class', dict(sorted(times.items(), key=lambda t: -sum(t[1][:2]))), train)
    return 0 if result['status'] == 'ok' else 1


if __name__ == '__main__':
    sys.exit(main())
