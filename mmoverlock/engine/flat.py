"""Data-parallel training that averages gradients once, in one piece, when all of them are there."""

import contextlib
import operator
from typing import Dict, List, NamedTuple, Optional

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from torch import Tensor, nn
from torch.autograd import Variable

from ..models import OverLoCK
from ..registry import MODEL_WRAPPERS


class _Flat(NamedTuple):
    """Gradients of one type, one behind the other."""

    parameters: List[nn.Parameter]
    buffer: Tensor
    views: List[Tensor]  # of the buffer, one a gradient


@MODEL_WRAPPERS.register_module()
class FlatDataParallel(nn.Module):
    """In place of ``MMDistributedDataParallel`` where recordings (``cuda_graphs=True``) give all gradients at once.

    DDP copies every gradient into a bucket when it comes and back when the bucket has been averaged: two launches for
    each of a thousand parameters, which pay where averaging hides behind the rest of the backward pass. Here the
    gradients are copied by a few launches into one tensor, averaged by one call, and are parts of that tensor then.

    The same as with DDP: parameters and buffers of the first process go to all at the start; every process must find a
    gradient for every parameter; with accumulation the last backward pass averages. Buffers are not sent again.

    Args:
        module (nn.Module): The model, on its device.
        process_group (ProcessGroup, optional): Who averages. Defaults to all.

    Raises:
        RuntimeError: After a backward pass, if a parameter that is trained has no gradient.

    Examples:
        >>> model_wrapper_cfg = dict(type='mmoverlock.FlatDataParallel')  # in a config
    """

    detect_anomalous_params = False
    # Steps are mmengine's.
    train_step = MMDistributedDataParallel.train_step
    val_step = MMDistributedDataParallel.val_step
    test_step = MMDistributedDataParallel.test_step
    _run_forward = MMDistributedDataParallel._run_forward

    def __init__(self, module: nn.Module, process_group: Optional[dist.ProcessGroup] = None) -> None:
        super().__init__()
        self.module, self.group = module, process_group
        # Going through a thousand modules at every step would take the host milliseconds. DDP keeps a list, too.
        self._all = list(module.parameters())
        self._synced = True
        self._waiting = False
        self._flats: Dict[torch.dtype, _Flat] = {}
        for part in module.modules():
            if isinstance(part, OverLoCK):
                part.averaged_afterwards = True
        first = dist.get_global_rank(process_group, 0) if process_group else 0
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, first, group=process_group)

    @property
    def sent(self) -> List[int]:
        """Bytes of the tensors that a step averages, one for each type of gradient; known after the first step."""
        return [flat.buffer.nbytes for flat in self._flats.values()]

    @contextlib.contextmanager
    def no_sync(self):
        """A context whose forward passes lead to gradients that stay with this process, to be added to."""
        before, self._synced = self._synced, False
        try:
            yield
        finally:
            self._synced = before

    def forward(self, *args, **kwargs):
        """The module's; the backward pass from what it returns ends with the average."""
        out = self.module(*args, **kwargs)
        if self._synced and torch.is_grad_enabled():
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(self._at_the_end)
        return out

    def _at_the_end(self, grad: Tensor) -> None:
        """Called when the backward pass comes to an output of the module, the first time of several."""
        if not self._waiting:
            self._waiting = True
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._waiting = False
        parameters = [p for p in self._all if p.requires_grad]
        if any(p.grad is None for p in parameters):
            lost = [n for n, p in self.module.named_parameters() if p.requires_grad and p.grad is None]
            raise RuntimeError(
                f'FlatDataParallel: {len(lost)} parameters got no gradient, the first {lost[0]}: freeze what is not '
                'used (requires_grad=False), or take MMDistributedDataParallel(find_unused_parameters=True)'
            )
        types: Dict[torch.dtype, List[nn.Parameter]] = {}
        for parameter in parameters:  # in the same order everywhere
            types.setdefault(parameter.grad.dtype, []).append(parameter)
        for group in types.values():
            self._average_type(group)

    def _average_type(self, parameters: List[nn.Parameter]) -> None:
        grads = [p.grad for p in parameters]
        flat = self._flats.get(grads[0].dtype)
        if flat is None or len(flat.views) != len(grads) or not all(map(operator.is_, flat.parameters, parameters)):
            flat = self._flats[grads[0].dtype] = _flat(parameters)
        torch._foreach_copy_(flat.views, grads)
        if dist.get_backend(self.group) == 'nccl':
            dist.all_reduce(flat.buffer, dist.ReduceOp.AVG, group=self.group)
        else:
            dist.all_reduce(flat.buffer, group=self.group)
            flat.buffer.div_(dist.get_world_size(self.group))
        for parameter, view in zip(parameters, flat.views):
            parameter.grad = view


def _flat(parameters: List[nn.Parameter]) -> _Flat:
    grads = [p.grad for p in parameters]
    buffer = grads[0].new_empty(sum(g.numel() for g in grads))
    views, place = [], 0
    for grad in grads:
        part = buffer[place : place + grad.numel()]
        # In the order of the gradient's memory, so that all are copied at once.
        dense = torch.empty_like(grad)
        views.append(part.as_strided(grad.shape, dense.stride()))
        place += grad.numel()
    return _Flat(parameters, buffer, views)
