"""The directive ``{model-zoo} TASK``: a table of the models in ``configs/TASK/metafile.yml``.

Numbers stand in the metafiles alone; the table on the site cannot differ from them.
"""

from pathlib import Path

import yaml
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


def read(task):
    """Rows of a task's table.

    Args:
        task (str): Folder under ``configs/``.

    Returns:
        tuple[list[str], list[list[str]]]: Column titles and rows; the first column is the config's path, the last the
        weights' address or ''.
    """
    models = yaml.safe_load((CONFIGS / task / 'metafile.yml').read_text())['Models']
    metrics = list(dict.fromkeys(name for m in models for r in m.get('Results') or [] for name in r['Metrics']))
    rows = []
    for model in models:
        found = {k: v for r in model.get('Results') or [] for k, v in r['Metrics'].items()}
        meta = model['Metadata']
        rows.append(
            [model['Config'], _millions(meta.get('Parameters')), _billions(meta.get('FLOPs'))]
            + [str(found.get(name, '')) for name in metrics]
            + [model.get('Weights') or '']
        )
    titles = ['config', 'parameters', 'GMACs', *(f'{name}, published' for name in metrics), 'weights']
    empty = [i for i in range(len(titles)) if not any(row[i] for row in rows)]
    keep = [i for i in range(len(titles)) if i not in empty]
    return [titles[i] for i in keep], [[row[i] for i in keep] for row in rows]


def _millions(number):
    return f'{number / 1e6:.2f} M' if number else ''


def _billions(number):
    return f'{number / 1e9:.1f}' if number else ''


class ModelZoo(SphinxDirective):
    required_arguments = 1

    def run(self):
        task = self.arguments[0]
        self.env.note_dependency(str(CONFIGS / task / 'metafile.yml'))
        titles, rows = read(task)
        table = nodes.table()
        group = nodes.tgroup(cols=len(titles))
        table += group
        group += [nodes.colspec(colwidth=1) for _ in titles]
        head, body = nodes.thead(), nodes.tbody()
        group += [head, body]
        head += self._row([nodes.paragraph(text=title) for title in titles])
        for row in rows:
            cells = [nodes.paragraph(text=text) for text in row]
            cells[0] = nodes.paragraph('', '', nodes.literal(text=Path(row[0]).stem))
            if row[-1].startswith('https://'):
                cells[-1] = nodes.paragraph('', '', nodes.reference('', 'file', refuri=row[-1]))
            body += self._row(cells)
        return [table]

    @staticmethod
    def _row(cells):
        row = nodes.row()
        for cell in cells:
            entry = nodes.entry()
            entry += cell
            row += entry
        return row


def setup(app):
    app.add_directive('model-zoo', ModelZoo)
    return dict(version='1', parallel_read_safe=True, parallel_write_safe=True)
