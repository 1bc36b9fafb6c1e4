"""What both ends of a connection share: errors, events, limits, model information. Light imports only."""
