"""Packaging of mmoverlock. What it needs is said here; how to lint and test it, in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'mmoverlock/version.py').read_text())[1]

# No mm package is a hard requirement, not even mmengine: the open-mmlab and the onedl-* packages have the same import
# names under different distribution names, and asking for one would overwrite the other. mmcv is in no extra, because
# pip would build it in isolation from torch and so without its operators; the README says how to install it.
CLS = ['mmengine>=0.10.7', 'mmpretrain>=1.2.0', 'torchvision', 'setuptools<81']
DET = CLS + ['mmdet>=3.3.0']
SEG = CLS + ['mmsegmentation>=1.2.2', 'ftfy', 'regex']
EXTRAS = {
    'cls': CLS,
    'det': DET,
    'seg': SEG,
    'all': sorted({*CLS, *DET, *SEG}),
    'onedl': [
        'onedl-mmengine>=0.10.12',
        'onedl-mmpretrain>=1.3.6',
        'onedl-mmdetection>=3.5.1',
        'onedl-mmsegmentation>=1.4.2',
        'torchvision',
        'setuptools<81',
    ],
    'deploy': ['onnx>=1.17', 'onnxruntime>=1.20', 'onnxscript>=0.5'],
    'visual': ['matplotlib'],
    'web': ['gradio>=6', 'matplotlib'],
    'timm': ['timm>=1.0.12', 'safetensors'],
    'natten': ['natten>=0.17,<0.18'],
    'docs': ['sphinx', 'myst-parser', 'linkify-it-py', 'furo', 'sphinx-copybutton'],
    'dev': ['pytest', 'pytest-xdist', 'playwright', 'ruff', 'pre-commit'],
}


class BuildWithConfigs(build_py):
    """Puts configs, tools and model-index.yml into the wheel, in the ``.mim`` folder where MIM looks for them."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        mim = Path(self.build_lib) / 'mmoverlock' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        for name in ('configs', 'tools'):
            shutil.copytree(ROOT / name, mim / name, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT / 'model-index.yml', mim)


setup(
    name='mmoverlock',
    version=VERSION,
    description='OverLoCK (CVPR 2025) as a plugin for mmpretrain, mmdetection and mmsegmentation',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['mmoverlock', 'mmoverlock.*']),
    install_requires=['torch>=2.5', 'numpy'],
    extras_require=EXTRAS,
    cmdclass={'build_py': BuildWithConfigs},
    zip_safe=False,
)
