"""Who may use the service, and how much of it: keys, their limits, and the gate before the routes."""
