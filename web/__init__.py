"""The HTTP API and its page, over jobs and stages. It imports no JAX: a worker process does."""
