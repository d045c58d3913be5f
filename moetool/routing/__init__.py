"""What routers do: counted, measured, reported."""
