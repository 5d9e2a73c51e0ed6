"""ONNX files against TensorRT's list of operators."""

import pytest

from mmoverlock.deploy import tensorrt

onnx = pytest.importorskip('onnx')
from onnx import TensorProto, helper  # noqa: E402


def save(path, nodes, opset=18, domain='', **constants):
    """A file that applies nodes to ``x`` (1, 3, 8, 8) and returns ``y``."""
    import numpy as np

    initializers = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(
        nodes,
        'g',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info('y', TensorProto.UNDEFINED, None)],
        initializers,
    )
    opsets = [helper.make_opsetid('', opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return str(path)


def test_what_it_takes(tmp_path):
    nodes = [
        helper.make_node('Sigmoid', ['x'], ['s']),
        helper.make_node('TopK', ['s', 'k'], ['v', 'i'], axis=1),
        helper.make_node('Resize', ['v', '', 'scales'], ['r'], mode='linear'),
        helper.make_node('ReduceSum', ['r', 'axes'], ['y']),
    ]
    path = save(tmp_path / 'a.onnx', nodes, k=[3], scales=[1.0, 1.0, 2.0, 2.0], axes=[1])
    assert tensorrt.problems(path) == []
    assert tensorrt.operators(path) == dict(Sigmoid=1, TopK=1, Resize=1, ReduceSum=1)


@pytest.mark.parametrize(
    'kind, inputs, outputs, attributes, constants, problem',
    [
        ('Unique', ['x'], ['y'], {}, {}, 'Unique: no such operator (1 node)'),
        ('TopK', ['x', 'k'], ['v', 'y'], {}, dict(k=[4000]), 'TopK: asks for 4000 values, 3839 are the most'),
        ('Resize', ['x', '', 'f'], ['y'], dict(mode='cubic'), dict(f=[1.0] * 4), 'Resize: has mode=cubic'),
        ('Clip', ['n', 'n'], ['y'], {}, dict(n=3), 'Clip: not for INT64'),
        ('NonZero', ['b'], ['y'], {}, dict(b=[True]), 'NonZero: not for BOOL'),
        ('ReduceSum', ['x', 'x'], ['y'], {}, {}, 'ReduceSum: has axes that are not constant'),
        ('QuantizeLinear', ['x', 's', 'z'], ['y'], {}, dict(s=0.5, z=7), 'QuantizeLinear: has a zero point other'),
        ('LayerNormalization', ['x', 's'], ['y', 'm'], {}, dict(s=[1.0] * 8), 'has more than one output'),
        ('ScatterND', ['x', 'i', 'u'], ['y'], dict(reduction='add'), dict(i=[[0]], u=[1.0]), 'has reduction=add'),
    ],
)
def test_what_it_does_not_take(kind, inputs, outputs, attributes, constants, problem, tmp_path):
    path = save(tmp_path / 'a.onnx', [helper.make_node(kind, inputs, outputs, **attributes)], **constants)
    found = tensorrt.problems(path)
    assert len(found) == 1 and problem in found[0], found


def test_operators_of_others_and_opsets(tmp_path):
    nodes = [helper.make_node('nms', ['x'], ['y'], domain='mmoverlock')]
    path = save(tmp_path / 'a.onnx', nodes, opset=8, domain='mmoverlock')
    assert tensorrt.problems(path) == [
        'opset 8: TensorRT reads 9 to 24 (1 node)',
        'mmoverlock::nms: no such operator (1 node)',
    ]


def test_graphs_inside_are_looked_at(tmp_path):
    branch = [
        helper.make_graph(
            [helper.make_node('Unique', ['x'], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for name in ('yes', 'no')
    ]
    node = helper.make_node('If', ['b'], ['y'], then_branch=branch[0], else_branch=branch[1])
    path = save(tmp_path / 'a.onnx', [node], b=True)
    assert tensorrt.problems(path) == ['Unique: no such operator (2 nodes)']


def test_the_table():
    assert tensorrt.SUPPORTED['RoiAlign'] == ['FLOAT', 'FLOAT16']
    assert 'INT64' in tensorrt.SUPPORTED['GatherElements'] and 'INT64' not in tensorrt.SUPPORTED['Clip']
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    made_up = set(tensorrt.SUPPORTED) - known - {'ImageScaler', 'ParametricSoftplus', 'ScaledTanh'}  # dropped by ONNX
    assert not made_up
