"What holds for all tests: the settings of the file, not of the shell that runs them; no deadline that a busy machine would miss."
import os

import hypothesis

for name in [n for n in os.environ if n.startswith("RECSYS_")]: del os.environ[name]

hypothesis.settings.register_profile("house", deadline=None, print_blob=True)
hypothesis.settings.load_profile("house")
