"""The compiler: read `compile.py` first, it is the whole program on two pages."""
