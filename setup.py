"""Packaging of protune_mm; everything static is in pyproject.toml or requirements/."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MIM = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Put configs, tools and the model index into the package's ``.mim`` folder.

    In the source tree ``.mim`` holds symbolic links, so an editable install and a plain checkout
    see them as they are; a wheel gets real files.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source in self._mim_files():
            target = Path(self.build_lib) / 'protune_mm' / '.mim' / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(source), str(target))

    def get_source_files(self) -> list:
        return super().get_source_files() + [str(f.relative_to(ROOT)) for f in self._mim_files()]

    def _mim_files(self) -> list:
        found = []
        for name in MIM:
            path = ROOT / name
            files = [path] if path.is_file() else path.rglob('*')
            found += [f for f in files if f.is_file() and '__pycache__' not in f.parts]
        return sorted(found)


def requirements(name: str) -> list:
    """Lines of a requirements file, without comments, includes and pip options."""
    lines = (ROOT / 'requirements' / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(('#', '-'))]


def version() -> str:
    scope: dict = {}
    exec((ROOT / 'protune_mm' / 'version.py').read_text(), scope)
    return scope['__version__']


setup(
    name='protune_mm',
    version=version(),
    description='Pro-tuning for MMDetection, MMSegmentation and MMPretrain',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['protune_mm', 'protune_mm.*']),
    include_package_data=False,
    # The kernels measured on GPUs: protune_mm/ops/depthwise.py reads it.
    package_data={'protune_mm.ops': ['*.json']},
    # No MM library here: the original libraries and the maintained forks are different
    # distributions of the same import packages, and pip would install one over the other.
    install_requires=requirements('runtime.txt'),
    extras_require={'openmmlab': requirements('openmmlab.txt'), 'forks': requirements('forks.txt')},
    cmdclass={'build_py': BuildWithMim},
    classifiers=[
        'Programming Language :: Python :: 3',
        'Operating System :: POSIX :: Linux',
    ],
)
