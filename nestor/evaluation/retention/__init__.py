"""Retention: does a model that learns while it reads keep what it read, after the context is gone?

The protocol of spec nested-learning, section i. Sessions of facts are read one after another with other text
between them; what each arm still knows is asked for with the context closed and learning off.
"""
