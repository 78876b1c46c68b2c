"""A module of kernels with a fault planted in its source: what a rung of the ladder must find."""

import importlib.util
import itertools

numbers = itertools.count()


def mutant(module, folder, line, fault):
    """`module` with one line changed, under a name and a registry of its own."""
    name = f"{module.__name__}_mutant_{next(numbers)}"
    text = open(module.__file__, encoding="utf-8").read()
    assert line in text, f"no line {line!r} in {module.__file__}"
    text = text.replace(line, fault, 1).replace('Library("pefast"', f'Library("{name.replace(".", "_")}"')
    text = text.replace('register_fake("pefast::', f'register_fake("{name.replace(".", "_")}::')
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    return changed
