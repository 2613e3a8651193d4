"""`python -m megatron_polar <verb>`: the form that torchrun and srun start."""

# Nothing heavy above the guard: saving a checkpoint spawns a helper process that imports this file again.
if __name__ == "__main__":
    import sys

    from megatron_polar.cli import main

    sys.exit(main())
