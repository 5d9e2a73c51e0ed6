"""ContMix with NATTEN's window sum, for those who have NATTEN 0.17.x installed. Optional; used only when asked for."""

from typing import Optional

import torch
from torch import Tensor

from ..autocast import no_autocast
from .reference import affinity_logits, mix_rows


def _na2d_av():
    from natten.functional import na2d_av  # removed from NATTEN in 0.20

    return na2d_av


def refuse(query: Tensor, *_) -> Optional[str]:
    """Why NATTEN cannot serve the call, or None."""
    try:
        _na2d_av()
    except Exception as error:  # a NATTEN built for another torch fails with more than ImportError
        return (
            f"needs NATTEN 0.17.x, the last with na2d_av ({type(error).__name__}: {error}); the 'auto' backend does not"
        )
    return None


def contmix_natten(query, key, weight, bias, rpb1, rpb2, value) -> Tensor:
    """As :func:`contmix_reference`, the two window sums computed by ``natten.functional.na2d_av``."""
    na2d_av = _na2d_av()

    def natten_sum(attn: Tensor, values: Tensor, row0: int) -> Tensor:
        window = round(attn.shape[-1] ** 0.5)
        values = values.movedim(2, -1).to(out_dtype).contiguous()
        out = na2d_av(attn.to(out_dtype).contiguous(), values, kernel_size=window, dilation=1)
        return out.movedim(-1, 2)

    out_dtype = value.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    with no_autocast(query.device.type):
        groups = query.shape[1]
        logits = affinity_logits(*(t.to(dtype) for t in (query, key, weight, bias)))
        small, large = value.unflatten(1, (2, groups, -1)).unbind(1)
        return mix_rows(logits, rpb1.to(dtype), rpb2.to(dtype), small, large, 0, natten_sum).to(out_dtype)
