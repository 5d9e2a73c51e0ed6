"""Reading an exported file back, and holding it against PyTorch."""

import time
from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .detectors import Detector
from .exporters import need
from .models import Deployable


def load(path: str, format: str, threads: int = 1) -> Callable[[Tensor], Tuple[Tensor, ...]]:
    """An exported file as a function from images to a tuple of tensors, on the CPU.

    Args:
        path (str): The file.
        format (str): Key of :data:`mmoverlock.deploy.FORMATS`. Only load files that you trust.
        threads (int): Of onnxruntime; the others follow ``torch.set_num_threads``. Defaults to 1.

    Raises:
        ExportError: onnxruntime is not installed.
    """
    if format == 'onnx':
        need('onnxruntime')
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4  # its errors are raised, not printed
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        return lambda image: tuple(torch.from_numpy(out) for out in session.run(None, dict(image=image.numpy())))
    if format == 'torchscript':
        run = torch.jit.load(path)
    elif format == 'export':
        run = torch.export.load(path).module()
    else:
        run = torch._inductor.aoti_load_package(path)

    def call(image: Tensor) -> Tuple[Tensor, ...]:
        with torch.no_grad():
            out = run(image)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    return call


@dataclass(frozen=True)
class Row:
    """An exported file against PyTorch, at one size.

    Args:
        shape (tuple[int, ...]): Of the image.
        error (float): Largest absolute difference of any output, in units of the larger of 1 and the output's largest
            magnitude.
        torch_ms (float): PyTorch's processor time of a call, in milliseconds; NaN where it was not timed.
        exported_ms (float): The file's.
        detections (int, optional): How many were compared; None where the model is no detector.
    """

    shape: Tuple[int, ...]
    error: float
    torch_ms: float = float('nan')
    exported_ms: float = float('nan')
    detections: Optional[int] = None


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference as :class:`Row` has it; infinite where number or shapes of outputs differ, or one is NaN."""
    if len(expected) != len(found):
        return float('inf')
    worst = 0.0
    for a, b in zip(expected, found):
        if a.shape != b.shape or not torch.isfinite(b).all():
            return float('inf')
        if a.numel():
            a, b = a.double(), b.double()
            worst = max(worst, float((a - b).abs().max() / max(1.0, float(a.abs().max()))))
    return worst


def detection_difference(expected: Sequence, found: Sequence) -> float:
    """Largest difference between what was detected in the same pictures.

    Each detection is held against the nearest one of the same label that is not taken: two of the same score may have
    changed places.

    Args:
        expected (Sequence[InstanceData]): One a picture.
        found (Sequence[InstanceData]): One a picture, from :meth:`mmoverlock.deploy.detectors.Detector.unpack`.

    Returns:
        float: Of scores; of coordinates, in units of the largest one; of masks, the largest distance of a probability
        to the threshold at a pixel that counts otherwise. Infinite where number or labels differ.
    """
    worst = 0.0
    for a, b in zip(expected, found):
        if len(a) != len(b) or not torch.equal(a.labels.sort().values, b.labels.sort().values):
            return float('inf')
        if not len(a):
            continue
        unit = max(1.0, float(a.bboxes.abs().max()))
        apart = torch.cdist(a.bboxes.double(), b.bboxes.double(), p=float('inf')) / unit
        apart = apart.maximum((a.scores[:, None] - b.scores).abs())
        apart[a.labels[:, None] != b.labels] = float('inf')
        for i in range(len(a)):
            j = int(apart[i].argmin())
            worst = max(worst, float(apart[i, j]))
            if 'masks' in a:
                wrong = b.mask_margins[j][a.masks[i] != b.masks[j]]
                worst = max(worst, float(wrong.max()) if len(wrong) else 0.0)
            apart[:, j] = float('inf')
    return worst


def time_in_turns(functions: Sequence[Callable], repeats: int) -> List[float]:
    """Processor time of calls in milliseconds, the middle one of each function, taken in turns.

    Args:
        functions (Sequence[Callable]): Without arguments; called before, to be warm.
        repeats (int): Timed calls of each.
    """

    def timed(function):
        start = time.process_time()
        function()
        return 1e3 * (time.process_time() - start)

    turns = [[timed(function) for function in functions] for _ in range(repeats)]
    return [sorted(times)[repeats // 2] for times in zip(*turns)]


def compare(model: Deployable, run: Callable, images: Sequence[Tensor], repeats: int = 0) -> List[Row]:
    """Runs a model and its exported file on the same images.

    A detector's file is held against mmdet's own ``predict``.

    Args:
        model (Deployable): What was exported.
        run (Callable): From :func:`load`.
        images (Sequence[Tensor]): Batches.
        repeats (int): Calls to time of each, by :func:`time_in_turns`. The time is of the processor: other programs do
            not count, and with several threads their sum. Defaults to 0: untimed.

    Returns:
        list[Row]: One for each batch.
    """

    rows = []
    original = model.predict if isinstance(model, Detector) else model
    with torch.no_grad():
        for image in images:
            if isinstance(model, Detector):
                expected, found = original(image), model.unpack(run(image), image.shape[2:])
                error, detections = detection_difference(expected, found), sum(map(len, expected))
            else:
                error, detections = difference(original(image), run(image)), None
            times = [float('nan')] * 2
            if repeats:
                times = time_in_turns([lambda x=image: original(x), lambda x=image: run(x)], repeats)
            rows.append(Row(tuple(image.shape), error, *times, detections))
    return rows
