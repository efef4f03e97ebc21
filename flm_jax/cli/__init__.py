"""The command-line programs: each turns flags and gin into objects, calls the library, and reports errors."""
