"""Operations of the prompt block with kernels of their own."""
