"""INT8 by onnxruntime's static quantisation, and what it costs on a data set."""

import copy
import os
import os.path as osp
import tempfile
from typing import Callable, Dict, Iterable, List, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from .detectors import Detector
from .exporters import need
from .models import Classifier, Deployable, Segmentor

#: Runtime to the form of INT8 that it takes: TensorRT wants zero points of 0, and biases in float.
TARGETS = dict(
    onnxruntime=dict(activation='QUInt8', symmetric=False, biases=True),
    tensorrt=dict(activation='QInt8', symmetric=True, biases=False),
)
#: Operators that become INT8, where one input is a weight. docs/export.md says why the others stay.
OPERATORS = ('Conv', 'ConvTranspose', 'Gemm')


def weighted(path: str, operators: Sequence[str] = OPERATORS) -> List[str]:
    """Names of the nodes whose second input is a weight: not the products of two activations, as in ContMix.

    Args:
        path (str): ONNX file, as :func:`prepare` writes it.
        operators (Sequence[str]): Kinds of nodes to look at. Defaults to :data:`OPERATORS`.
    """
    import onnx

    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    weights |= {node.output[0] for node in graph.node if node.op_type == 'Constant'}
    return [node.name for node in graph.node if node.op_type in operators and node.input[1] in weights]


def prepare(path: str, out: str) -> None:
    """Folds constants and batch norms and gives every node a name, which the quantiser works by."""
    need('onnx', 'onnxruntime')
    import onnx
    from onnxruntime.quantization import quant_pre_process

    # Its symbolic shapes give up on networks with open sizes, and are not needed.
    quant_pre_process(path, out, skip_symbolic_shape=True, skip_onnx_shape=True)
    proto = onnx.load(out)
    for i, node in enumerate(proto.graph.node):
        node.name = node.name or f'{node.op_type}_{i}'
    onnx.save(proto, out)


def quantize(
    path: str,
    out: str,
    batches: Iterable[Tensor],
    target: str = 'onnxruntime',
    operators: Sequence[str] = OPERATORS,
    exclude: Callable[[str], bool] = lambda name: False,
    method: str = 'MinMax',
) -> List[str]:
    """INT8 file of an ONNX file: 8 bits for weights (by channel) and activations of convolutions and linear layers.

    Args:
        path (str): ONNX file from :func:`mmoverlock.deploy.export`.
        out (str): File to write, in QDQ form.
        batches (Iterable[Tensor]): Images to learn ranges from, (B, 3, H, W), as the file takes them.
        target (str): Key of :data:`TARGETS`. Defaults to ``'onnxruntime'``.
        operators (Sequence[str]): Kinds of nodes to quantise. Defaults to :data:`OPERATORS`.
        exclude (Callable): From a node's name to whether it stays float32. Defaults to none.
        method (str): How ranges are taken: ``'MinMax'``, ``'Percentile'``, ``'Entropy'``. The last two keep all
            activations in memory. Defaults to ``'MinMax'``.

    Returns:
        list[str]: Names of the quantised nodes.

    Raises:
        ExportError: A package is missing.
        ValueError: There is nothing to quantise, no image to learn from, or the file does not take the images.
    """
    need('onnx', 'onnxruntime')
    from onnxruntime import quantization

    settings = TARGETS[target]
    feeds = iter([dict(image=batch.numpy()) for batch in batches])
    first = next(feeds, None)
    if first is None:
        raise ValueError('there is no image to learn the ranges of activations from')

    class Reader(quantization.CalibrationDataReader):
        given = 0

        def get_next(self):
            self.given += 1
            return first if self.given == 1 else next(feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = osp.join(folder, 'prepared.onnx')
        prepare(path, prepared)
        nodes = [name for name in weighted(prepared, operators) if not exclude(name)]
        if not nodes:
            raise ValueError('no node is left to quantise')
        try:
            quantization.quantize_static(
                prepared,
                out,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                # Weights of seven bits: processors without VNNI add two products in 16 bits, and eight overflow unseen.
                reduce_range=True,
                activation_type=quantization.QuantType[settings['activation']],
                weight_type=quantization.QuantType.QInt8,
                nodes_to_quantize=nodes,
                calibrate_method=quantization.CalibrationMethod[method],
                extra_options=dict(
                    ActivationSymmetric=settings['symmetric'], WeightSymmetric=True, QuantizeBias=settings['biases']
                ),
            )
        except Exception as error:
            if not type(error).__module__.startswith('onnxruntime'):
                raise
            raise ValueError(
                f'{path} does not run on the pictures of the data set ({str(error).splitlines()[0][:200]}): export it '
                'for their size, with --shape and --dynamic batch'
            ) from error
    return nodes


def calibration_batches(cfg, whole: nn.Module, samples: int, batch_size: int = 8, seed: int = 0) -> List[Tensor]:
    """Pictures of the training set, prepared as for a test.

    Args:
        cfg (Config): Config with ``train_dataloader`` and ``test_dataloader``.
        whole (nn.Module): The config's model: its data preprocessor is used.
        samples (int): How many; drawn at random.
        batch_size (int): Pictures a batch, of one size each. Defaults to 8.
        seed (int): Of the draw. Defaults to 0.

    Returns:
        list[Tensor]: Normalised batches, (B, 3, H, W).
    """
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import DATASETS

    def innermost(dataset):
        while 'pipeline' not in dataset and 'dataset' in dataset:
            dataset = dataset.dataset
        return dataset

    train = copy.deepcopy(innermost(cfg.train_dataloader.dataset))
    train.pipeline = innermost(cfg.test_dataloader.dataset).pipeline
    dataset = DATASETS.build(train)
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    batches, same = [], []
    for i in chosen:
        sample = dataset[i]
        if same and (sample['inputs'].shape != same[0]['inputs'].shape or len(same) == batch_size):
            batches.append(same)
            same = []
        same.append(sample)
    batches += [same] if same else []
    return [whole.data_preprocessor(pseudo_collate(batch), False)['inputs'] for batch in batches]


def predictions(model: Deployable, whole: nn.Module, outputs: Sequence[Tensor], samples: list) -> list:
    """Outputs of a file as the data samples that the task's metrics take.

    Args:
        model (Deployable): What was exported.
        whole (nn.Module): The task's model: how it makes predictions of logits is used.
        outputs (Sequence[Tensor]): The file's.
        samples (list): Data samples, one a picture.
    """
    if isinstance(model, Classifier):
        scores = outputs[0].softmax(1)
        return [s.set_pred_score(p).set_pred_label(p.argmax(0, keepdim=True)) for s, p in zip(samples, scores)]
    if isinstance(model, Segmentor):
        return whole.postprocess_result(outputs[0], samples)
    results = []
    for i, sample in enumerate(samples):
        scale = outputs[0].new_tensor(sample.scale_factor).repeat(2)
        height, width = sample.img_shape[:2]
        boxes = outputs[0][i].minimum(outputs[0].new_tensor([width, height] * 2)) / scale
        own = [boxes[None], *(out[i : i + 1] for out in outputs[1:])]
        results += model.unpack(own, sample.ori_shape[:2])
    return whole.add_pred_to_datasample(samples, results)


def evaluate(cfg, model: Deployable, whole: nn.Module, runs: Sequence[Callable]) -> List[Dict[str, float]]:
    """Metrics of the config's test set for several files, on the same batches.

    Args:
        cfg (Config): Config with ``test_dataloader`` and ``test_evaluator``.
        model (Deployable): What was exported: a classifier, segmentor or detector.
        whole (nn.Module): The config's model.
        runs (Sequence[Callable]): From images to outputs, as :func:`mmoverlock.deploy.load` gives them.

    Returns:
        list[dict[str, float]]: The metrics, one a file.

    Raises:
        ValueError: The model is none of the three.
    """
    from mmengine.evaluator import Evaluator
    from mmengine.runner import Runner

    if not isinstance(model, (Classifier, Segmentor, Detector)):
        raise ValueError('there is no metric for a backbone alone')
    loader = Runner.build_dataloader(copy.deepcopy(cfg.test_dataloader), seed=0)
    evaluators = [Evaluator(copy.deepcopy(cfg.test_evaluator)) for _ in runs]
    for evaluator in evaluators:
        evaluator.dataset_meta = loader.dataset.metainfo
    with torch.no_grad():
        for batch in loader:
            data = whole.data_preprocessor(batch, False)
            for evaluator, run in zip(evaluators, runs):
                found = predictions(model, whole, run(data['inputs']), copy.deepcopy(data['data_samples']))
                evaluator.process(data_samples=found, data_batch=batch)
    return [evaluator.evaluate(len(loader.dataset)) for evaluator in evaluators]


def size_on_disk(path: str) -> float:
    """MiB of a file."""
    return os.path.getsize(path) / 2**20
