"""Writing a model to a file: ONNX, torch.export, AOTInductor, TorchScript."""

import importlib.util
import inspect
import os
import re
import warnings
from contextlib import contextmanager
from typing import Dict, Optional, Sequence, Tuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.onnx import symbolic_helper

from ..models import OverLoCK
from ..models.blocks import ContMixer
from ..models.layers import pooling_matrix
from ..ops.backends import ENV_VARIABLE
from .detectors import Detector, nms_to_onnx
from .models import Deployable

#: Format to what it is, for people.
FORMATS = dict(
    onnx='ONNX, for onnxruntime, TensorRT, OpenVINO, ...',
    export='torch.export, for PyTorch without this code',
    aoti='AOTInductor, compiled for this machine: C++ or Python',
    torchscript='TorchScript, for libtorch',
)
#: What may differ from call to call.
DYNAMIC = ('none', 'batch', 'all')
_AXES = ('batch', None, 'height', 'width')


class ExportError(RuntimeError):
    """A model cannot be exported as asked for; the message says why and what would do."""


def need(*packages: str) -> None:
    """Raises ExportError, with the command that helps, where an optional package is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f'{" and ".join(missing)} not installed: pip install "mmoverlock[deploy]"')


def smallest_size(model: nn.Module) -> int:
    """The least side in pixels of a picture on which ContMix's windows fit without the map being enlarged.

    How far a smaller map is enlarged depends on its size, which a graph for all sizes cannot follow.

    Args:
        model (nn.Module): Anything; 1 where there is no OverLoCK in it.
    """
    sizes = [1]
    for module in model.modules():
        if isinstance(module, OverLoCK):
            at16, at32 = module.arch['kernel_sizes'][2:]
            sizes += [16 * (at16 - 1) + 1, 32 * (at32 - 1) + 1]
        elif isinstance(module, ContMixer):
            sizes.append(module.kernel_size)  # in a network of another kind: at stride 1, larger at others
    return max(sizes)


def adaptive_avg_pool2d(x: Tensor, output_size) -> Tensor:
    """``F.adaptive_avg_pool2d`` as two matrix products, which ONNX can say for maps of any size.

    Args:
        x (Tensor): (..., H, W).
        output_size (int | Sequence[int | None]): As PyTorch's.

    Returns:
        Tensor: (..., *output_size), equal to PyTorch's up to rounding.
    """
    if isinstance(output_size, int):
        output_size = (output_size, output_size)
    for dim, cells in zip((-2, -1), output_size):
        if cells is None:
            continue
        mean = pooling_matrix(x.shape[dim], cells, x)
        x = torch.matmul(mean, x) if dim == -2 else torch.matmul(x, mean.t())
    return x


@contextmanager
def recording():
    """While a graph is recorded: operators by their definitions, pooling as above, no gradients, little noise."""
    with (
        mock.patch.dict(os.environ, {ENV_VARIABLE: 'reference'}),
        mock.patch.object(F, 'adaptive_avg_pool2d', adaptive_avg_pool2d),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore')
        yield


def _check(model: Deployable, shape: Sequence[int], dynamic: str) -> None:
    if dynamic not in DYNAMIC:
        raise ExportError(f'dynamic must be one of {", ".join(DYNAMIC)}, got {dynamic!r}')
    if dynamic == 'all' and min(shape) < smallest_size(model):
        raise ExportError(
            f'a file for pictures of any size starts at {smallest_size(model)} pixels a side (smaller maps are '
            f'enlarged by a factor that depends on their size), the example is {shape[0]}x{shape[1]}: give a larger '
            "example, or fix the size with dynamic='batch'"
        )


def example(model: Deployable, shape: Sequence[int], dynamic: str = 'all', seed: int = 0) -> Tensor:
    """Images to record a graph with: two, where the batch is open (of one, PyTorch would conclude always one).

    Returns:
        Tensor: (B, in_channels, *shape), normal noise; times 50 and from 0 to 255 where the model normalises.
    """
    batch = 1 if dynamic == 'none' else 2
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    image = torch.randn(batch, channels, *shape, generator=torch.Generator().manual_seed(seed))
    return (image * 50 + 127).clamp(0, 255) if model.normalizes else image


def open_axes(dynamic: str) -> Dict[int, str]:
    """Axis of the image to its name, for those that may change."""
    wanted = dict(none=(), batch=(0,), all=(0, 2, 3))[dynamic]
    return {axis: _AXES[axis] for axis in wanted}


def export_program(model: Deployable, shape: Sequence[int], dynamic: str = 'all'):
    """``torch.export`` of a model.

    Args:
        model (Deployable): From :func:`mmoverlock.deploy.deployable`.
        shape (Sequence[int]): Height and width of the example.
        dynamic (str): What may differ later: ``'none'``, ``'batch'``, or ``'all'``: batch, height and width. Defaults
            to ``'all'``.

    Returns:
        torch.export.ExportedProgram: Its input is named ``image``.

    Raises:
        ExportError: The example is too small for an open size, or this PyTorch is too old for one.
    """
    _check(model, shape, dynamic)
    options = {}
    # Conditions on sizes that always hold but that its solver cannot prove become checks at run time.
    name = 'prefer_deferred_runtime_asserts_over_guards'
    if name in inspect.signature(torch.export.export).parameters:
        options[name] = True
    elif dynamic == 'all':
        raise ExportError(f"torch {torch.__version__} cannot leave sizes open; use torch 2.9 or newer, or 'batch'")
    least = smallest_size(model)
    axes = {
        axis: torch.export.Dim(name, min=1 if name == 'batch' else least) for axis, name in open_axes(dynamic).items()
    }
    with recording():
        return torch.export.export(
            model, (example(model, shape, dynamic),), dynamic_shapes=(axes,), strict=False, **options
        )


def export_onnx(
    model: Deployable,
    path: str,
    shape: Sequence[int],
    dynamic: str = 'all',
    opset: int = 18,
    exporter: str = 'auto',
    metadata: Optional[Dict[str, str]] = None,
) -> str:
    """ONNX file of a model.

    Args:
        model (Deployable): From :func:`mmoverlock.deploy.deployable`.
        path (str): File to write.
        shape (Sequence[int]): Height and width of the example.
        dynamic (str): As in :func:`export_program`. Defaults to ``'all'``.
        opset (int): ONNX operator set, 17 or newer; the dynamo exporter starts at 18. Defaults to 18.
        exporter (str): ``'dynamo'`` (PyTorch's current one; needs onnxscript), ``'torchscript'`` (the one before: much
            faster, deprecated by PyTorch), ``'auto'``: dynamo where onnxscript is installed. Defaults to ``'auto'``.
        metadata (dict, optional): Strings to keep in the file. Defaults to None.

    Returns:
        str: The exporter that was taken.

    Raises:
        ExportError: A package is missing, or the example is too small for an open size.
    """
    need('onnx')
    import onnx

    _check(model, shape, dynamic)
    if opset < 17:
        raise ExportError(f'opset {opset}: LayerNormalization needs 17 or newer')
    if exporter == 'auto':
        exporter = 'dynamo' if importlib.util.find_spec('onnxscript') else 'torchscript'
    if exporter == 'dynamo':
        need('onnxscript')
        program = export_program(model, shape, dynamic)
        with recording():
            onnx_program = torch.onnx.export(
                program,
                custom_translation_table=_translations(),
                dynamo=True,
                verbose=False,
                opset_version=max(opset, 18),
                input_names=['image'],
                output_names=list(model.output_names),
            )
            onnx_program.save(path)
    elif exporter == 'torchscript':
        axes = {'image': open_axes(dynamic)} if dynamic != 'none' else {}
        with recording(), _symbolics(opset):
            torch.onnx.export(
                model,
                (example(model, shape, dynamic),),
                path,
                dynamo=False,
                opset_version=opset,
                input_names=['image'],
                output_names=list(model.output_names),
                dynamic_axes=axes,
            )
    else:
        raise ExportError(f"exporter must be 'auto', 'dynamo' or 'torchscript', got {exporter!r}")
    proto = onnx.load(path)
    _spell_out(proto)
    _name_axes(proto, open_axes(dynamic))
    if isinstance(model, Detector):  # the exporter loses these sizes at the suppression
        for output, sizes in zip(proto.graph.output, model.output_shapes('batch' if dynamic != 'none' else 1)):
            onnx_type = onnx.helper.make_tensor_type_proto(output.type.tensor_type.elem_type, sizes)
            output.type.CopyFrom(onnx_type)
    onnx.helper.set_model_props(proto, {k: str(v) for k, v in (metadata or {}).items()})
    onnx.checker.check_model(proto)
    onnx.save(proto, path)
    return exporter


def _translations() -> dict:
    """Our operators for the dynamo exporter."""
    from onnxscript import opset18

    def nms(boxes, scores, iou_threshold: float, limit: int):
        return nms_to_onnx(opset18, boxes, scores, iou_threshold, limit)

    return {torch.ops.mmoverlock.nms.default: nms}


class _Nodes:
    """Makes nodes of the earlier exporter's graph in the way of onnxscript: ``op.Gather(x, i, axis=1)``."""

    _SUFFIXES = {int: 'i', float: 'f'}

    def __init__(self, graph) -> None:
        self.graph = graph

    def Constant(self, **value):
        return self.graph.op('Constant', value_t=torch.tensor(next(iter(value.values()))))

    def __getattr__(self, name: str):
        def make(*inputs, **attributes):
            return self.graph.op(name, *inputs, **{f'{k}_{self._SUFFIXES[type(v)]}': v for k, v in attributes.items()})

        return make


@contextmanager
def _symbolics(opset: int):
    """Our operators, and torchvision's, for the earlier exporter."""

    @symbolic_helper.parse_args('v', 'v', 'f', 'i')
    def nms(graph, boxes, scores, iou_threshold, limit):
        return nms_to_onnx(_Nodes(graph), boxes, scores, iou_threshold, limit).setType(scores.type())

    torch.onnx.register_custom_op_symbolic('mmoverlock::nms', nms, opset)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic('mmoverlock::nms', opset)


def _name_axes(proto, axes: Dict[int, str]) -> None:
    """Calls the open axes batch, height and width, also where an output's size is said by an input's."""
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    names = {dims[axis].dim_param: name for axis, name in axes.items()}
    for value in [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r'\w+', lambda word: names.get(word[0], word[0]), dim.dim_param)


def _spell_out(proto) -> None:
    """What TensorRT has no operator for, in operators that it has, with equal results.

    Clip of integers becomes Max and Min, Equal of booleans becomes Xor and Not.
    """
    import onnx

    graph = proto.graph
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    types.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    nodes = []
    for node in graph.node:
        kind, (out, *_), made = types.get(node.input[0] if node.input else ''), node.output, None
        if node.op_type == 'Clip' and kind in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
            made = [(op, bound) for op, bound in zip(('Max', 'Min'), node.input[1:]) if bound]
        elif node.op_type == 'Equal' and kind == onnx.TensorProto.BOOL:
            made = [('Xor', node.input[1]), ('Not', None)]
        if not made:
            nodes.append(node)
            continue
        value = node.input[0]
        for i, (op, other) in enumerate(made):
            result = out if i + 1 == len(made) else f'{out}_{op}'
            inputs = [value] if other is None else [value, other]
            nodes.append(onnx.helper.make_node(op, inputs, [result], f'{result}_{op}'))
            value = result
    del graph.node[:]
    graph.node.extend(nodes)


def export(
    model: Deployable,
    path: str,
    format: str = 'onnx',
    shape: Tuple[int, int] = (224, 224),
    dynamic: str = 'all',
    **options,
) -> str:
    """Writes a model to a file.

    Args:
        model (Deployable): From :func:`mmoverlock.deploy.deployable`.
        path (str): File to write. AOTInductor's must end in ``.pt2``.
        format (str): Key of :data:`FORMATS`. Defaults to ``'onnx'``.
        shape (tuple[int, int]): Height and width of the example; for what ``dynamic`` keeps fixed, the size. Defaults
            to ``(224, 224)``.
        dynamic (str): As in :func:`export_program`. Defaults to ``'all'``.
        **options: Of :func:`export_onnx`.

    Returns:
        str: What wrote the file, for people.

    Raises:
        ExportError: It cannot be done; the message says why.
    """
    if format not in FORMATS:
        raise ExportError(f'format must be one of {", ".join(FORMATS)}, got {format!r}')
    if format == 'onnx':
        return f'torch.onnx ({export_onnx(model, path, shape, dynamic, **options)} exporter)'
    if options:
        raise ExportError(f'{", ".join(options)}: only for ONNX')
    if format == 'torchscript':
        _check(model, shape, dynamic)
        with recording():
            # Traced, not compiled from the source. Tracing keeps sizes open in any case.
            torch.jit.save(torch.jit.trace(model, (example(model, shape, dynamic),), check_trace=False), path)
        return 'torch.jit.trace'
    if isinstance(model, Detector):
        raise ExportError('detectors go to onnx and torchscript: their suppression is an operator of this package')
    program = export_program(model, shape, dynamic)
    if format == 'export':
        torch.export.save(program, path)
        return 'torch.export'
    if not path.endswith('.pt2'):
        raise ExportError(f'{path}: the name of an AOTInductor package must end in .pt2')
    # Frozen weights let it repack them for oneDNN; without, the large depthwise kernels run many times slower on CPU.
    with recording(), torch._inductor.config.patch(freezing=True):
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    return 'AOTInductor'
