"""Selection: score units, allocate a budget to them, compensate for what goes.

`options` holds what a spec may say and imports no torch; import the modules by name.
"""
