"""The documentation as a site, made from the pages of the repository where they lie.

pip install -e ".[docs]" && sphinx-build -W --keep-going -c .ci/docs . SITE
"""

import gpuconv

project = "gpuconv"
release = gpuconv.__version__
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc"]
root_doc = "gpuconv/guide/index"
include_patterns = [
    "*.md",
    "gpuconv/guide/*.md",
    *(f"{folder}/README.md" for folder in ("gpuconv/compat", "kernels", "bench", "tests")),
]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "gpuconv"
numpydoc_show_class_members = False
# Left out: rules that require extended summaries, "See Also" and examples everywhere, and types of parameters that are
# "as in conv".
numpydoc_validation_checks = {"all", "ES01", "SA01", "EX01", "PR04"}
# Classes that only the library constructs: their attributes are documented.
numpydoc_validation_exclude = {r"\.(Gradients|Explanation|Tuned|CompileError)$"}
autodoc_typehints = "none"  # the docstrings state the types
