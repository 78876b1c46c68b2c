"""The door of the Triton room, installed as pefast.kernels; the hands in it take `triton` and `tl` from here.

HAS_TRITON says whether triton can be imported, WHY_NOT in words why it cannot. Without it `triton` and `tl`
are stand-ins that let kernels be defined and never launched.

The folder has a second name by accident: Python started in the root of a clone finds it first when
transformers asks for Hugging Face's package `kernels`. Under that name this file puts the installed package
in its own place; where there is none it stays an empty module without `__version__`, which transformers
reads as "not installed".
"""

if __name__ == "kernels":
    import importlib.machinery
    import importlib.util
    import pathlib
    import sys

    def _stand_aside() -> None:
        """Put the package `kernels` of the rest of sys.path, if there is one, where this module stands."""
        root = pathlib.Path(__file__).resolve().parent.parent
        rest = [entry for entry in sys.path if pathlib.Path(entry).resolve() != root]
        spec = importlib.machinery.PathFinder.find_spec("kernels", rest)
        # a folder without __init__.py also has a spec, and no loader worth the name
        if spec is None or spec.origin is None:
            return
        module = importlib.util.module_from_spec(spec)
        sys.modules["kernels"] = module
        spec.loader.exec_module(module)

    _stand_aside()
    del importlib, pathlib, sys, _stand_aside
else:
    try:
        import triton
        import triton.language as tl

        HAS_TRITON, WHY_NOT = True, ""
    except ImportError as error:

        class _Absent:
            """Stands for triton: decorates nothing, and every attribute is itself."""

            def __getattr__(self, name):
                return self

            def __call__(self, function=None, **settings):
                return self if function is None else function

        triton = tl = _Absent()
        HAS_TRITON, WHY_NOT = False, f"triton cannot be imported: {error}"
