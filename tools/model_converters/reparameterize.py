"""Merge the large kernels of a checkpoint: ``reparameterize.py SRC DST``.

The result loads into ``deploy=True`` models. SRC may be official or ours, of a classifier, a
detector or a segmentor; no config is needed, for a large kernel says all about itself.
"""

import argparse
import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))


from mmoverlock import checkpoints, cli, compat  # noqa: E402


def merge(state: dict) -> dict:
    """Merge every large kernel of a state dict in this project's names.

    Args:
        state (dict): Names and tensors.

    Returns:
        dict: The same with each kernel's branches replaced by one weight and one bias.

    Raises:
        mmoverlock.cli.UserError: If it has none, or they are merged already.
    """
    from mmoverlock.models.layers import LargeKernelConv

    weight, bias = 'large_kernel.conv.weight', 'large_kernel.conv.bias'
    prefixes = [k[: -len('conv.weight')] for k in state if k.endswith(weight)]
    if not prefixes:
        raise cli.UserError('the checkpoint holds no large kernels of OverLoCK')
    if any(k.endswith(bias) for k in state):
        raise cli.UserError('the checkpoint is merged already')
    merged = {}
    for prefix in prefixes:
        own = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        channels, _, size, _ = own['conv.weight'].shape
        kernel = LargeKernelConv(channels, size).to(own['conv.weight'].dtype)
        kernel.load_state_dict(own)
        kernel.merge_branches()
        merged.update({prefix + k: v for k, v in kernel.state_dict().items()})
    # In the order of the old file, each kernel where its weight stood.
    out = {}
    for key, value in state.items():
        prefix = ''.join(key.partition('large_kernel.')[:2])
        if prefix not in prefixes:
            out[key] = value
        elif key == prefix + 'conv.weight':
            out[key], out[prefix + 'conv.bias'] = merged[key], merged[prefix + 'conv.bias']
    return out


def main(argv=None):
    compat.apply()
    parser = argparse.ArgumentParser(description='Merge the large kernels of a checkpoint')
    parser.add_argument('src', help='checkpoint, official or ours')
    parser.add_argument('dst', help='file to write')
    parser.add_argument(
        '--official', action='store_true', help='write the official names (the form of the released "reparam" files)'
    )
    args = parser.parse_args(argv)
    with cli.one_line_errors():
        try:
            state = checkpoints.load_state_dict_file(args.src)
            if checkpoints.is_official(state):
                state = checkpoints.from_official(state)
            state = merge(state)
            out = (
                checkpoints.to_official(state)
                if args.official
                else dict(state_dict=state, meta=dict(source=osp.basename(args.src)))
            )
        except (checkpoints.CheckpointError, RuntimeError) as error:
            raise cli.UserError(f'{args.src}: {error}') from error
        with cli.replacing(args.dst) as partial:
            checkpoints.write_checkpoint(out, partial)
    print(f'{len(state)} tensors written to {args.dst}')


if __name__ == '__main__':
    main()
