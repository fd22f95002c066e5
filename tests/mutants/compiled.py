"""Mistakes in what is compiled: graphs that are made again and again, forms that compute something else, functions that
stay as they are.
"""

from mutant import of

COMPILED = of(
    ("tests/unit/model/test_compiled.py",),
    ("Graph.__call__", "if number > 1:", "if number < 0:"),
    ("Graph.__call__", "if number < self.least:", "if number < 0:"),
    ("cross_entropy_gradient_in_a_pass", " & mine_T.unsqueeze(-1)", ""),
    ("turn_halves_in_a_pass", "second * cos + first * sin, rest", "second * cos - first * sin, rest"),
    ("compiled._compile", "setattr(module, name, value.compiled(graphs))", "pass"),
    ("CrossEntropy.compiled", "functions(cross_entropy_gradient), False", "cross_entropy_gradient, False"),
    ("check_compiler", "if missing is not None:", "if missing is None:"),
    ("fusibles_of", "is_accelerator(device) or ", ""),
) + of(
    ("tests/parallel/test_compiled_layers.py",),
    ("compiled.FUSIBLES", "least=2, form=assemble_keys_in_a_pass", "form=assemble_keys_in_a_pass"),
    ("build_stages", "compile_stages(stages, options.compiler, meshes.device)", "pass"),
) + of(
    ("tests/unit/serving/test_served_compiled.py",),
    ("load_settings", "compile=args.compile)", "compile=False)"),
)
