"""The programs: flags and gin to objects, errors to one sentence, one call of the library each."""
