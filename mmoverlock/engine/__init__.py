"""Optimizer constructors and hooks, where :mod:`mmoverlock.registry` looks for them.

The recipes in ``configs`` need none of their own: mmengine's constructor reads their weight decay
rules, and mmpretrain's EMA hook averages buffers too.
"""
