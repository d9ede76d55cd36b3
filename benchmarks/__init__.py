"""What raypipe costs, as ratios to a peer or to a limit in the same run: ``python -m benchmarks [name ...]``.

An absolute time says nothing on a noisy machine, so hardly anything here is judged by one. Each file is a subject:
``real_work``, ``emulated``, ``split_cost``, ``driver_cost``, ``replay_cost``, ``lengths``, ``memory``; ``peer`` and
``deepspeed_peer`` are what raypipe is compared with; the others are what they share.
"""
