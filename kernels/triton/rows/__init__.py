"""What all row kernels share: arguments, tiles, reading rows, sums over rows."""
