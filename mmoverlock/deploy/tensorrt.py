"""Whether TensorRT reads an ONNX file, by its own list of operators.

The list is that of onnx-tensorrt, ``docs/operators.md``, as of TensorRT 10.15. A file that passes has been held against
a table, not against TensorRT.
"""

import collections
from typing import Dict, List

from .exporters import need

#: What the table was taken from, for people.
SOURCE = 'onnx-tensorrt docs/operators.md, TensorRT 10.15'
#: First and last operator set.
OPSETS = (9, 24)
#: TensorRT's TopK takes less than this.
TOPK_LIMIT = 3840

_FLOATS = 'FLOAT FLOAT16 BFLOAT16'
_HALF = 'FLOAT FLOAT16'
_NUMBERS = f'{_FLOATS} INT32 INT64'
_ANY = f'{_NUMBERS} BOOL'
# Types of the first input (of Where: the second) -> operators.
_TABLE = {
    _FLOATS: 'Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos '
    'Cosh CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization '
    'GRU Hardmax HardSigmoid HardSwish ImageScaler InstanceNormalization IsInf LayerNormalization LeakyRelu Log '
    'LogSoftmax LpNormalization LpPool LRN LSTM MatMul MaxPool MeanVarianceNormalization ParametricSoftplus PRelu '
    'RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RMSNormalization RNN '
    'RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh '
    'ThresholdedRelu Upsample',
    _HALF: 'BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign',
    'FLOAT': 'STFT',
    _NUMBERS: 'Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max '
    'Mean Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin '
    'ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum '
    'TensorScatter TopK',
    _ANY: 'Concat ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity Loop OneHot Reshape '
    'ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where',
    f'{_ANY} UINT8': 'Cast CastLike',
    'BOOL': 'And If Not Or Xor',
    f'{_FLOATS} INT8 FLOAT8E4M3FN': 'Attention QuantizeLinear',
    'INT8 INT4 FLOAT8E4M3FN FLOAT4E2M1': 'DequantizeLinear',
    '': 'Constant',
}
SUPPORTED = {name: types.split() for types, names in _TABLE.items() for name in names.split()}

_RESIZE = dict(
    coordinate_transformation_mode=(
        'half_pixel',
        'pytorch_half_pixel',
        'tf_half_pixel_for_nn',
        'asymmetric',
        'align_corners',
    ),
    mode=('nearest', 'linear'),
    nearest_mode=('floor', 'ceil', 'round_prefer_floor', 'round_prefer_ceil'),
    keep_aspect_ratio_policy=('stretch',),
)


def _attributes(node) -> dict:
    import onnx

    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _restriction(node, constants: Dict[str, 'object']) -> str:
    """What the table forbids of this node although the operator is there, or ''."""
    given = {k: v.decode() if isinstance(v, bytes) else v for k, v in _attributes(node).items()}
    kind = node.op_type
    value = [constants.get(name) for name in node.input]
    if kind == 'TopK':
        if value[1] is not None and int(value[1].reshape(-1)[0]) >= TOPK_LIMIT:
            return f'asks for {int(value[1].reshape(-1)[0])} values, {TOPK_LIMIT - 1} are the most'
        if not given.get('sorted', 1):
            return 'is not sorted'
    elif kind == 'Resize':
        for key, allowed in _RESIZE.items():
            if (
                key in given
                and given[key] not in allowed
                and not (key == 'nearest_mode' and given['mode'] != 'nearest')
            ):
                return f'has {key}={given[key]}'
        if given.get('antialias'):
            return 'has antialias'
    elif kind == 'ScatterND' and given.get('reduction', 'none') != 'none':
        return f'has reduction={given["reduction"]}'
    elif kind in ('LayerNormalization', 'MaxPool', 'Dropout') and sum(map(bool, node.output)) > 1:
        return 'has more than one output'
    elif kind in ('MaxPool', 'AveragePool', 'LpPool') and any(d != 1 for d in given.get('dilations', [])):
        return 'has dilations'
    elif kind.startswith('Reduce') and len(value) > 1 and node.input[1] and value[1] is None:
        return 'has axes that are not constant'
    elif kind in ('QuantizeLinear', 'DequantizeLinear') and len(value) > 2 and value[2] is not None and value[2].any():
        return 'has a zero point other than 0 (quantize.py --target tensorrt)'
    elif kind in ('CumSum', 'OneHot') and value[1] is None:
        return f'has {"an axis" if kind == "CumSum" else "a depth"} that is not constant'
    return ''


def problems(path: str) -> List[str]:
    """What of an ONNX file TensorRT does not take, by the table.

    Args:
        path (str): ONNX file.

    Returns:
        list[str]: One line for each kind of problem, with the number of nodes; empty where there is none.

    Raises:
        ExportError: onnx is not installed.
    """
    need('onnx')
    import onnx

    proto = onnx.load(path)
    typed = onnx.shape_inference.infer_shapes(proto)
    types, constants = {}, {}
    functions = {(f.domain, f.name) for f in proto.functions}
    found = collections.Counter()
    opset = next((o.version for o in proto.opset_import if o.domain in ('', 'ai.onnx')), 0)
    if not OPSETS[0] <= opset <= OPSETS[1]:
        found[f'opset {opset}: TensorRT reads {OPSETS[0]} to {OPSETS[1]}'] += 1

    def visit(graph):
        for tensor in getattr(graph, 'initializer', ()):
            types[tensor.name] = tensor.data_type
            constants[tensor.name] = onnx.numpy_helper.to_array(tensor)
        for value in [*getattr(graph, 'value_info', ()), *graph.input, *graph.output]:
            if not isinstance(value, str):
                types.setdefault(value.name, value.type.tensor_type.elem_type)
        for node in graph.node:
            attributes = _attributes(node)
            if node.op_type == 'Constant' and 'value' in attributes:
                constants[node.output[0]] = onnx.numpy_helper.to_array(attributes['value'])
            for value in attributes.values():
                if isinstance(value, onnx.GraphProto):
                    visit(value)
            if (node.domain, node.op_type) in functions:
                continue
            name = f'{node.domain}::{node.op_type}' if node.domain not in ('', 'ai.onnx') else node.op_type
            if name not in SUPPORTED:
                found[f'{name}: no such operator'] += 1
                continue
            first = node.input[1 if node.op_type == 'Where' else 0] if node.input else ''
            kind = onnx.TensorProto.DataType.Name(types.get(first, 0))
            # DOUBLE is cut down to FLOAT by TensorRT itself.
            if SUPPORTED[name] and kind not in ('UNDEFINED', 'DOUBLE', *SUPPORTED[name]):
                found[f'{name}: not for {kind}'] += 1
            restriction = _restriction(node, constants)
            if restriction:
                found[f'{name}: {restriction}'] += 1

    visit(typed.graph)
    for function in proto.functions:
        visit(function)
    return [f'{text} ({number} node{"s" * (number > 1)})' for text, number in found.items()]


def operators(path: str) -> Dict[str, int]:
    """Operators of an ONNX file, with how often each is there, most frequent first."""
    need('onnx')
    import onnx

    counts = collections.Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    return dict(counts.most_common())
