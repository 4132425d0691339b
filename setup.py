"""What pyproject.toml cannot say: a wheel carries files that lie outside of recsys/ in the repository.

They go to recsys/shipped, where `recsys.core.settings.shipped` finds them; an editable installation finds the originals."""
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("settings.ini", "constraints.txt", "nbs/jobs/*.ipynb", "nbs/benchmarks/*.ipynb", "nbs/benchmarks/*.txt")

class BuildPy(build_py):
    def _shipped(self) -> dict[str, str]: # {where it goes: where it comes from}
        found = [p.as_posix() for pattern in SHIPPED for p in sorted(Path().glob(pattern))]
        return {str(Path(self.build_lib, "recsys", "shipped", p)): p for p in found}

    def run(self):
        super().run()
        for target, source in {} if self.editable_mode else self._shipped().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode=1): return [*super().get_outputs(include_bytecode), *({} if self.editable_mode else self._shipped())]

    def get_output_mapping(self): return super().get_output_mapping() | ({} if self.editable_mode else self._shipped())

    def get_source_files(self): return [*super().get_source_files(), *self._shipped().values()] # so that an sdist has them, too

setup(cmdclass=dict(build_py=BuildPy))
