"""Training that survives a step of infinities: the step is taken back whole, counted, and named."""

from typing import Dict, Iterable, List, Optional, Tuple

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.model import ExponentialMovingAverage, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn

from ..registry import HOOKS, MODELS


class NonFiniteError(RuntimeError):
    """Training stops: too many steps in a row had values that are not finite."""


def non_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether an infinity or NaN is anywhere in the tensors, without waiting for the device.

    Every tensor is read once, by the operation that gradient scalers use.

    Args:
        tensors (Iterable[Tensor]): Of any shapes, types and devices; sparse ones too. Integers are finite.

    Returns:
        Tensor: One number, 1 or 0, on the device of the first tensor.
    """
    groups: Dict[Tuple, List[Tensor]] = {}
    for tensor in tensors:
        tensor = tensor.detach()
        tensor = tensor._values() if tensor.is_sparse else tensor
        if tensor.is_floating_point() and tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    flags: Dict[torch.device, Tensor] = {}
    for (device, _), group in groups.items():
        flag = flags.setdefault(device, torch.zeros((), device=device))
        # It multiplies by one too: values stay as they are.
        torch._amp_foreach_non_finite_check_and_unscale_(group, flag, torch.ones((), device=device))
    if not flags:
        return torch.zeros(())
    first = next(iter(flags))
    return torch.stack([flag.to(first) for flag in flags.values()]).amax()


def _bad(named: Iterable[Tuple[str, Optional[Tensor]]]) -> List[str]:
    """Names of the tensors that are not finite. One wait for the device each: for when it is known that some are."""
    return [n for n, t in named if t is not None and t.is_floating_point() and bool(non_finite([t]))]


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Skips optimizer steps whose gradients or running statistics are not finite, and stops after many in a row.

    mmengine's mixed precision skips a step of infinite gradients, but keeps what its forward pass left in the running
    statistics of batch norms, from where evaluation and every weight average turn NaN; full precision (and bfloat16
    without loss scaling) skips nothing and writes NaN into all weights at once. With this hook such a step is as if it
    had never been: parameters, optimizer, and *all* buffers of the model keep the values of before, so that EMA
    averages finite values only. A loss scale still falls, as it should. All processes of a distributed run skip
    together.

    Each skipped step is one line of the log, with the first non-finite gradient or statistic by name; the total is
    logged as ``skipped_steps`` and resumed. In fp16 a few at the start and one now and then are by design: the loss
    scale finds its height in this way.

    It works with any optimizer wrapper of mmengine and needs no setting there. Cost a step: the gradients and buffers
    are read once, the buffers copied once, and the host waits for the device once.

    Args:
        max_consecutive (int): So many skipped steps in a row end the run. A loss scale of 2^16 needs 17 to reach 1/2.
            Defaults to 20.

    Raises:
        NonFiniteError: While training, after ``max_consecutive`` skipped steps in a row.
        ValueError: ``max_consecutive`` is not positive.
    """

    priority = 'VERY_HIGH'

    def __init__(self, max_consecutive: int = 20) -> None:
        if max_consecutive < 1:
            raise ValueError(f'max_consecutive must be positive, got {max_consecutive}')
        self.max_consecutive = max_consecutive
        self.consecutive = self.total = 0
        self._wrappers: List[OptimWrapper] = []

    def before_train(self, runner) -> None:
        """Stands between backward pass and optimizer."""
        self.runner = runner
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.total = int(runner.message_hub.runtime_info.get('skipped_steps', 0))
        self.consecutive = 0
        self._saved: List[Tensor] = []
        self._seen: List[Tensor] = []
        self._find_buffers()
        self._stepped = True
        wrapper = runner.optim_wrapper
        self._wrappers = list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        for wrapper in self._wrappers:
            wrapper.step = self._guarded(wrapper)  # the instance's own, in front of the class's

    def after_train(self, runner) -> None:
        """Steps aside."""
        for wrapper in self._wrappers:
            wrapper.__dict__.pop('step', None)
        self._wrappers, self._saved, self._seen, self._slots = [], [], [], []

    def before_train_epoch(self, runner) -> None:
        """Another hook may have changed the model."""
        self._find_buffers()

    def after_val(self, runner) -> None:
        """Likewise, where training is by iterations."""
        if self._wrappers:
            self._find_buffers()

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Keeps the buffers as they were before the first forward pass of a step (accumulation has several)."""
        if self._stepped:
            buffers = self._buffers()
            same = len(buffers) == len(self._seen) and all(a is b for a, b in zip(buffers, self._seen))
            if same or [_kind(b) for b in buffers] == [_kind(s) for s in self._saved]:
                _copy(self._saved, buffers)
            else:  # the first time, or the model has been changed
                self._saved = [b.detach().clone() for b in buffers]
            self._seen = buffers
            self._stepped = False

    def _find_buffers(self) -> None:
        """Notes where the model has buffers: going through its modules at every step would take the host longer."""
        self._slots = [(module._buffers, name) for module in self.model.modules() for name in module._buffers]

    def _buffers(self) -> List[Tensor]:
        """The model's buffers."""
        found = (slots.get(name) for slots, name in self._slots)
        return list({id(b): b for b in found if b is not None}.values())

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Logs the count of skipped steps."""
        runner.message_hub.update_scalar('train/skipped_steps', self.total)

    def _guarded(self, wrapper: OptimWrapper):
        inner = wrapper.step

        def step(**kwargs) -> None:
            self._stepped = True
            gradients_bad, buffers_bad = self._look(wrapper)
            if not (gradients_bad or buffers_bad):
                self.consecutive = 0
                return inner(**kwargs)
            what = self._what()
            scaler, scale = getattr(wrapper, 'loss_scaler', None), ''
            if gradients_bad and scaler is not None and scaler.is_enabled():
                before = scaler.get_scale()
                scaler.unscale_(wrapper.optimizer)
                scaler.step(wrapper.optimizer)  # which it skips
                scaler.update(getattr(wrapper, '_scale_update_param', None))
                scale = f'; loss scale {before:g} -> {scaler.get_scale():g}'
            _copy(self._buffers(), self._saved)
            self._count(what, scale)

        return step

    def _look(self, wrapper: OptimWrapper) -> Tuple[bool, bool]:
        """Whether gradients and buffers have non-finite values, in any process."""
        parameters = [p for group in wrapper.optimizer.param_groups for p in group['params']]
        gradients = non_finite(p.grad for p in parameters if p.grad is not None)
        flags = torch.stack([gradients, non_finite(self._buffers()).to(gradients.device)])
        all_reduce(flags, op='max')  # a batch norm may break in one process alone; all must skip
        return tuple(bool(flag) for flag in flags.tolist())

    def _what(self) -> str:
        """What is not finite, the most telling first."""
        parameters = list(self.model.named_parameters())
        parts = []
        weights = _bad(parameters)
        if weights:
            parts.append(f'parameter {weights[0]} itself ({len(weights)} of {len(parameters)})')
        buffers = list(self.model.named_buffers())
        statistics = _bad(buffers)
        if statistics:
            parts.append(f'{statistics[0]}, the first of {len(statistics)} buffers')
        gradients = _bad((n, p.grad) for n, p in parameters)
        if gradients:
            # The backward pass goes from the last to the first: what broke in it broke at the last.
            parts.append(f'gradients of {len(gradients)} of {len(parameters)} parameters, the last {gradients[-1]}')
        return '; '.join(parts) or 'values of another process'

    def _count(self, what: str, scale: str) -> None:
        self.total += 1
        self.consecutive += 1
        self.runner.message_hub.update_info('skipped_steps', self.total)
        text = f'not finite at iteration {self.runner.iter + 1}: {what}'
        self.runner.logger.warning(
            f'{text}; step skipped and running statistics put back ({self.consecutive} in a row, {self.total} in all)'
            f'{scale}'
        )
        if self.consecutive >= self.max_consecutive:
            raise NonFiniteError(
                f'{self.consecutive} steps in a row skipped, training stops; {text}. The last checkpoint is good. Try '
                "a lower learning rate or optim_wrapper.dtype='bfloat16'; look at the pictures if it comes at once"
            )


@torch.no_grad()
def _copy(target: List[Tensor], source: List[Tensor]) -> None:
    """Copies tensor by tensor, all at once."""
    for group in _by_type(zip(target, source)):
        torch._foreach_copy_([a for a, _ in group], [b for _, b in group])


def _kind(tensor: Tensor) -> Tuple:
    return tensor.device, tensor.dtype, tensor.shape


def _by_type(pairs: Iterable[Tuple[Tensor, Tensor]]) -> Iterable[List[Tuple[Tensor, Tensor]]]:
    """Pairs grouped by device and type, as operations on lists want them."""
    groups: Dict[Tuple, List[Tuple[Tensor, Tensor]]] = {}
    for first, second in pairs:
        groups.setdefault((first.device, first.dtype, second.device), []).append((first, second))
    return groups.values()


@MODELS.register_module()
class FiniteEMA(ExponentialMovingAverage):
    """mmengine's moving average, which passes over a model with values that are not finite, and updates in one go.

    For ``EMAHook``: ``dict(type='EMAHook', ema_type='mmoverlock.FiniteEMA', momentum=1e-4, update_buffers=True)``. The
    average is the same; the tensors are updated together instead of one after another.

    Args:
        model (nn.Module): The model to average.
        momentum (float): Weight of the new value. Defaults to 0.0002.
        interval (int): Steps between two updates. Defaults to 1.
        device (torch.device, optional): Where the average is kept. Defaults to None: beside the model.
        update_buffers (bool): Average floating-point buffers too, instead of copying them. Defaults to False.

    Raises:
        ValueError: The model's parameters are sharded (FSDP).
    """

    passed_over = 0

    def __init__(self, model: nn.Module, *args, **kwargs) -> None:
        if any(hasattr(module, '_fsdp_wrapped_module') for module in model.modules()):
            raise ValueError(
                'an average of weights needs whole parameters: with FSDP leave EMAHook out of custom_hooks'
            )
        super().__init__(model, *args, **kwargs)

    def update_parameters(self, model: nn.Module) -> None:
        """Takes the model's values into the average; if one of them is not finite, none.

        Args:
            model (nn.Module): The model, of the same structure.
        """
        source = model.state_dict() if self.update_buffers else dict(model.named_parameters())
        pairs = [(average, source[name].detach()) for name, average in self.avg_parameters.items()]
        buffers = [] if self.update_buffers else list(zip(self.module.buffers(), model.buffers()))
        if non_finite(value for _, value in pairs + buffers):
            self.passed_over += 1
            return
        if self.steps == 0:
            buffers, pairs = buffers + pairs, []
        with torch.no_grad():
            for group in _by_type(buffers):
                torch._foreach_copy_([a.detach() for a, _ in group], [v for _, v in group])
            if self.steps % self.interval == 0:
                for group in _by_type(pair for pair in pairs if pair[0].is_floating_point()):
                    averages = [a.detach() for a, _ in group]
                    torch._foreach_lerp_(averages, [v.to(a.device) for a, v in group], self.momentum)
        self.steps += 1
