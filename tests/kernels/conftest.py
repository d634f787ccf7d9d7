from drawn import few_are_four, in_triton  # noqa: F401
