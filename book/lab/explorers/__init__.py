"""Interactive views over pure functions: a control that moves draws the same figures again.

An explorer shows its picture and its sentence from the first draw on, so an executed notebook holds
them without a kernel; a `*_still` is a plain figure of a few cases, for a page without widgets.
"""
