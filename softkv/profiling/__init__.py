"""What a kernel, a step or a model costs: `softkv profile static`, `softkv profile trace`, `softkv plan`."""
