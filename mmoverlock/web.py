"""A web page to drop pictures on: what a model finds, and how OverLoCK looked.

Needs gradio (``pip install "mmoverlock[web]"``), which is imported when a page is built.
"""

import functools
import os
from typing import List, Sequence, Tuple

import numpy as np

from .apis import Inferencer, expand, read
from .cli import UserError

TITLE = 'OverLoCK'
HELP = 'Drop a picture. Then click on the overview map: the two pictures beside it show where ContMix looks from there.'
#: Fonts that are here: gradio's own themes fetch theirs from another host.
FONTS = dict(font=('system-ui', 'sans-serif'), font_mono=('ui-monospace', 'monospace'))


#: Gradio shows pictures no larger than they are: small ones are enlarged to about this many pixels.
SHOWN = 300


def _zoom(picture: np.ndarray) -> int:
    return max(1, SHOWN // max(picture.shape[:2]))


def _enlarge(picture: np.ndarray) -> np.ndarray:
    zoom = _zoom(picture)
    return picture.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _gradio():
    # Read when gradio is imported.
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    try:
        import gradio
    except ImportError as error:
        raise UserError(f'the web page needs gradio ({error}): pip install gradio') from error
    return gradio


def findings(result: dict, task: str) -> List[List[str]]:
    """The rows of the table.

    Args:
        result (dict): From :class:`Inferencer`.
        task (str): Its task.

    Returns:
        list[list[str]]: Class, score or share of the pixels, and of boxes their corners in pixels.
    """
    if task == 'segmentation':
        return [[name, f'{share:.1%}', ''] for name, share in result['shares'].items()]
    boxes = result.get('bboxes') or [()] * len(result['scores'])
    return [
        [name, f'{score:.1%}', ', '.join(f'{v:.0f}' for v in box)]
        for name, score, box in zip(result['classes'], result['scores'], boxes)
    ]


class Viewer:
    """What the page's events do, apart from gradio.

    Args:
        inferencers (Sequence[Inferencer]): The models to choose from.
    """

    def __init__(self, inferencers: Sequence[Inferencer]) -> None:
        self.models = {}
        for inferencer in inferencers:
            name = f'{inferencer.task}: {inferencer.name}'
            while name in self.models:
                name += "'"
            self.models[name] = inferencer

    def picture(self, path: str) -> np.ndarray:
        """Read a picture, (H, W, 3) uint8, BGR.

        Raises:
            UserError: It cannot be read.
        """
        found = next(read(expand(path)))
        if found.error:
            raise UserError(f'This file {found.error}.')
        return found.image

    def find(self, name: str, path: str) -> Tuple[np.ndarray, List[List[str]]]:
        """The drawn picture, RGB, and the rows of the table."""
        model = self.models[name]
        ((picture, sample),) = model.stream(expand(path))
        if picture.error:
            raise UserError(f'This file {picture.error}.')
        return _enlarge(model.draw(picture.image, sample)), findings(model.result(picture, sample), model.task)

    def seen(self, name: str, path: str) -> np.ndarray:
        """The picture as the network gets it from the test pipeline, resized or cropped: (h, w, 3) uint8, RGB."""
        inputs = self.models[name].prepare(self.picture(path))['inputs']
        return np.ascontiguousarray(inputs.numpy().transpose(1, 2, 0)[..., ::-1]).clip(0, 255).astype(np.uint8)

    def overview(self, name: str, path: str) -> np.ndarray:
        """The overview map over what the network gets."""
        from .visualization import normalize, overlay, overview_map

        picture, model = self.seen(name, path), self.models[name].model
        return _enlarge(overlay(picture, overview_map(model, normalize(model, picture))))

    def blocks(self, name: str) -> List[str]:
        """Names of the blocks that use ContMix."""
        from .visualization import contmix_blocks

        return list(contmix_blocks(self.models[name].model))

    def kernels(self, name: str, path: str, position: Tuple[int, int], block: str, head: str):
        """What ContMix looks at from a position, in the small and in the large window.

        Args:
            name (str): The model.
            path (str): The picture.
            position (tuple[int, int]): x and y in what :meth:`overview` gives; from outside, the nearest in it.
            block (str): One of :meth:`blocks`.
            head (str): ``'mean'`` or a number.

        Returns:
            tuple[np.ndarray, np.ndarray]: (h, w, 3) uint8, RGB.
        """
        from PIL import Image, ImageDraw

        from .visualization import contmix_kernels, normalize, overlay

        picture, model = self.seen(name, path), self.models[name].model
        zoom = _zoom(picture)
        x, y = (min(max(value // zoom, 0), size - 1) for value, size in zip(position, picture.shape[1::-1]))
        kernels = contmix_kernels(model, normalize(model, picture), (x, y), block)
        # Another block may have fewer heads.
        head = int(head) if head.isdigit() and int(head) < kernels.heads else None
        drawn = []
        for window in ('small', 'large'):
            image = Image.fromarray(_enlarge(overlay(picture, kernels.heatmap(window, head))))
            centre, radius = ((x + 0.5) * zoom, (y + 0.5) * zoom), max(4, min(image.size) // 40)
            pen = ImageDraw.Draw(image)
            pen.rectangle([round(v * zoom) for v in kernels.box(window)], outline='white')
            pen.ellipse([c + r for r in (-radius, radius) for c in centre], outline='black', fill='white')
            drawn.append(np.asarray(image))
        return tuple(drawn)

    def heads(self, name: str) -> int:
        """The greatest number of heads of a block."""
        from .visualization import contmix_blocks

        return max(block.mixer.groups for block in contmix_blocks(self.models[name].model).values())


def build(inferencers: Sequence[Inferencer]):
    """The page.

    Args:
        inferencers (Sequence[Inferencer]): One or more models, of any task.

    Returns:
        gradio.Blocks: Not launched.

    Raises:
        UserError: gradio is not installed.
    """
    gr = _gradio()
    viewer = Viewer(inferencers)
    names = list(viewer.models)

    def explained(function):
        """A user's mistake as a message on the page."""

        @functools.wraps(function)  # gradio reads which arguments and events it takes
        def call(*args):
            try:
                return function(*args)
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from error

        return call

    def choose(name):
        blocks = viewer.blocks(name)
        heads = ['mean', *map(str, range(viewer.heads(name)))]
        return gr.update(choices=blocks, value=blocks[-1]), gr.update(choices=heads, value='mean')

    @explained
    def show(name, path, block, head):
        if not path:
            return None, None, None, None, None, None
        drawn, rows = viewer.find(name, path)
        overview = viewer.overview(name, path)
        position = overview.shape[1] // 2, overview.shape[0] // 2
        return drawn, rows, overview, position, *viewer.kernels(name, path, position, block, head)

    @explained
    def click(name, path, block, head, event: gr.SelectData):
        if not path:
            return None, None, None
        return tuple(event.index), *viewer.kernels(name, path, tuple(event.index), block, head)

    @explained
    def look(name, path, block, head, position):
        return viewer.kernels(name, path, tuple(position), block, head) if path and position else (None, None)

    # Models are not made for two calls at once.
    one = dict(concurrency_id='models', concurrency_limit=1)
    size = dict(height=320)
    # Without gradio's button that sends a picture to Hugging Face.
    picture_only = dict(interactive=False, format='png', buttons=['download', 'fullscreen'], **size)
    first_blocks = viewer.blocks(names[0])
    # Pictures that were dropped are deleted after an hour, and when the server ends.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f'# {TITLE}\n{HELP}')
        model = gr.Radio(names, value=names[0], label='Model', visible=len(names) > 1)
        with gr.Row():
            picture = gr.Image(
                label='Picture', type='filepath', sources=['upload', 'clipboard'], elem_id='picture', **size
            )
            # The file as it came: whether it is a picture is for the inferencer to say, in words for people.
            picture.preprocess = lambda payload: payload.path if payload else None
            drawn = gr.Image(label='Found', elem_id='found', **picture_only)
            rows = gr.Dataframe(
                headers=['class', 'score or share', 'box (x1, y1, x2, y2)'],
                datatype='str',
                interactive=False,
                label='Findings',
                elem_id='findings',
            )
        with gr.Row():
            overview = gr.Image(label='Overview map: click on it', elem_id='overview', **picture_only)
            small = gr.Image(label='ContMix, small window', elem_id='small', **picture_only)
            large = gr.Image(label='ContMix, large window', elem_id='large', **picture_only)
        with gr.Row():
            block = gr.Dropdown(first_blocks, value=first_blocks[-1], label='Block with ContMix')
            heads = ['mean', *map(str, range(viewer.heads(names[0])))]
            head = gr.Dropdown(heads, value='mean', label='Head')
        position = gr.State()
        everything = [drawn, rows, overview, position, small, large]
        inputs = [model, picture, block, head]
        model.change(choose, model, [block, head], **one).then(show, inputs, everything, **one)
        picture.change(show, inputs, everything, **one)
        overview.select(click, inputs, [position, small, large], **one)
        for choice in (block, head):
            choice.input(look, [*inputs, position], [small, large], **one)
    return page


def launch(inferencers: Sequence[Inferencer], host: str = '127.0.0.1', port: int = None, wait: bool = True):
    """Serve the page, without a link for others and without gradio's analytics.

    Args:
        inferencers (Sequence[Inferencer]): One or more models, of any task.
        host (str): Address to listen at. Anyone who reaches it can use the page. Defaults to '127.0.0.1', this machine.
        port (int, optional): Defaults to None, the first free one from 7860 on.
        wait (bool): Return only when the server ends. Defaults to True.

    Returns:
        gradio.Blocks: The page; ``local_url`` is its address, ``close()`` ends it.

    Raises:
        UserError: gradio is not installed, or the address cannot be listened at.
    """
    gr = _gradio()
    page = build(inferencers)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            quiet=True,
            theme=gr.themes.Default(**FONTS),
            max_file_size='50mb',
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
        )
    except OSError as error:
        raise UserError(f'cannot listen at {host}{f":{port}" if port else ""} ({error})') from error
    if wait:
        print(f'the page is at {page.local_url}; end it with Ctrl-C')
        page.block_thread()
    return page
