"""Making kernel repositories: `new` writes one, `check` says what is wrong with one, `export` builds it."""
