from drawn import in_triton  # noqa: F401
