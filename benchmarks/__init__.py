"""What raypipe costs, as ratios to a peer or to a limit in the same run: ``python -m benchmarks [name ...]``.

An absolute time says nothing on a noisy machine, so hardly anything here is judged by one. Each file is a subject:
``real_work``, ``emulated``, ``driver_cost``, ``replay_cost``, ``memory``; the others are what they share.
"""
